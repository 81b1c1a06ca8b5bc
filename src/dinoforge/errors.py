"""The package's own errors: what was expected, what came, what to do.

The command line prints them without a traceback and exits with their code. Anything else that escapes is a bug, and
exits with 1.
"""

import json
import os
import time
import traceback
from pathlib import Path
from typing import ClassVar

RECURRING = frozenset({2, 3})
"""Exit codes of what would happen again if the same command were started again."""

STOPPED = frozenset({129, 130, 138, 140, 143})
"""Exit codes of what a signal has stopped: SIGHUP, SIGINT, SIGUSR1, SIGUSR2, SIGTERM."""


class DinoforgeError(Exception):
    """Base of every error that a user can cause and mend."""

    exit_code: ClassVar[int] = 2


class RecipeError(DinoforgeError):
    """A recipe, or a key=value override, that cannot be run as it stands."""


class DataError(DinoforgeError):
    """Images, folders or labels that cannot be used."""


class ImageError(DataError):
    """One image that cannot be read or converted; training skips and counts it."""


class WorkerError(DataError):
    """A data-loading worker that was killed or hangs: not for its images, so another start may well do without it."""

    exit_code = 1


class RunError(DinoforgeError):
    """A run directory that cannot be used: another run's, read-only, or without room."""


class WeightsError(DinoforgeError):
    """A weight file or checkpoint that does not fit, is damaged, or could run code."""


class TrainingError(DinoforgeError):
    """Training that cannot go on, such as a loss that is not finite."""


class LostRankError(TrainingError):
    """Another rank is gone, so this one cannot go on; the cause is there, not here."""

    exit_code = 4


class OutOfMemoryError(DinoforgeError):
    """The memory of the device does not hold what was asked of it."""

    exit_code = 3


class ExportError(DinoforgeError):
    """A backbone that another library's format cannot hold, or whose outputs differ there."""


LAUNCHER = "dinoforge-"
"""What the names of the launches of ``dinoforge train --nproc`` begin with."""


def has_launcher() -> bool:
    """Whether ``dinoforge train --nproc`` started this rank, and prints what it fails of when all have ended."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(LAUNCHER)


def is_of_one_rank(error: BaseException) -> bool:
    """Whether perhaps only this rank has the error; what is wrong with recipe or run directory, all have."""
    return not isinstance(error, DinoforgeError) or isinstance(error, DataError | TrainingError | OutOfMemoryError)


def record_failure(error: BaseException) -> None:
    """Tells whoever started this rank why it fails: writes the file that PyTorch's elastic agent reads.

    Writes nothing where there is no agent, or where an earlier error of this rank is there already.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not name or os.path.exists(name):
        return
    if isinstance(error, DinoforgeError):
        text = trace = str(error)
    else:
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        trace = "".join(traceback.format_exception(error))
    now = time.time() + isinstance(error, LostRankError)  # the agent takes the first for the cause, in whole seconds
    extra = {"py_callstack": trace, "timestamp": now, "of_one_rank": is_of_one_rank(error)}
    told = {"message": text, "extraInfo": extra}
    aside = Path(f"{name}.partial")  # the agent fails on half a file
    aside.write_text(json.dumps({"message": told}), encoding="utf-8")
    aside.rename(name)
