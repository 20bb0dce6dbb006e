"""What carries the six files. Nobody needs it to understand the method."""
