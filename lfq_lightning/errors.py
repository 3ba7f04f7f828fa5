"""The one exception that reaches a user, how to quote another one in it, and what raises it for a missing package."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


def named(error: BaseException, length: int = 200) -> str:
    """Return the class of a foreign error and its text in one line, cut to `length` characters."""
    return f"{type(error).__name__}: {one_line(error)[:length]}"


@contextmanager
def said(sentence: Callable[[Exception], str]) -> Iterator[None]:
    """Turn whatever foreign code raises inside into a UserError with this sentence; a UserError, a signal's too, stays.

    For code that cannot be known: which errors a class of transformers raises over a user's file is not documented.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(sentence(error)) from error
