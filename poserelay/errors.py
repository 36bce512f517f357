"""The ways a command ends early, each with the exit code of the design's contract."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """The user's mistake (exit 2): one or two lines naming file, record or field, what was found, and the remedy."""


class UnreadableImage(UserError):
    """A picture that is missing, truncated or not a picture; training replaces it, evaluation stops."""

    def __init__(self, path: str | os.PathLike[str], reason: str | None = None) -> None:
        # torch rebuilds an error of a data worker from its whole text alone.
        super().__init__(os.fspath(path) if reason is None else f"{os.fspath(path)}: {reason}; replace or remove it")


class CheckFailed(Exception):
    """A check stopped the run (exit 3): NaN in the loss, collapse, too many unreadable images."""


class Interrupted(Exception):
    """A signal stopped the run after it was saved (exit 75): start it again to go on."""


def exit_code(command: Callable[[], object]) -> int:
    """Run `command`; print what ended it on stderr and return the exit code of the contract."""
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output (`| head`) has seen enough; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        print(f"error: {_own_words(error)}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return 75
    return 0


def _own_words(error: UserError) -> str:
    """The message without the traceback that torch wraps around an error of a data worker."""
    return str(error).strip().splitlines()[-1].split(": ", 1)[1] if "Original Traceback" in str(error) else str(error)
