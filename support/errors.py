"""Errors that end a run. This file imports nothing heavy: scoring processes import it too."""


class StepError(RuntimeError):
    """A step cannot be finished. The message is one line and says why."""
