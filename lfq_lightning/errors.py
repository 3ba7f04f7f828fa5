"""The one exception that reaches a user, how to quote another one in it, and what raises it for a missing package."""

import importlib.util


class UserError(ValueError):
    """A mistake the user can mend: one clear sentence with the cure. The command line prints it and exits with 2."""

    exit_code = 2


class StoppedError(UserError):
    """A signal ended the run; what was done is kept, and the same command resumes from there.

    Args:
        message: the sentence.
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # what a shell shows for it


def require(package: str, who: str) -> None:
    """Raise UserError if a package that not every machine has is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{who} needs {package}; pip install {package}.")


def one_line(error: object) -> str:
    """Return the text of a foreign error without its line breaks."""
    return " ".join(str(error).split())
