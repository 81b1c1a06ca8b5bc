"""The package's own errors: what was expected, what came, what to do.

The command line prints them without a traceback and exits with their code. Anything else that escapes is a bug, and
exits with 1.
"""

from typing import ClassVar

RECURRING = frozenset({2, 3})
"""Exit codes of what would happen again if the same command were started again."""


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
