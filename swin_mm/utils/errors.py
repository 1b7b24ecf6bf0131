"""The errors that the tools print as one line: what was wrong, what was expected, what to do."""


class InputError(ValueError):
    """Invalid user input."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


class DependencyError(ImportError):
    """A required library is missing or broken; the message names the command that fixes it."""


class Stopped(KeyboardInterrupt):
    """The run was interrupted and its state is saved; the message says how to resume.

    Args:
        message: where the checkpoint is and how to resume.
        signal_number: the signal that stopped the run.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, or its type if it has none."""
    return ' '.join(str(error).split()) or type(error).__name__
