"""What carries the six files. Nobody needs it to understand the method."""


class StepError(RuntimeError):
    """A run cannot go on with what the user gave. The message is one line and says why."""
