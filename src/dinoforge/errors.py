"""The package's own errors: what was expected, what came, what to do.

The command line prints them without a traceback and exits with code 2. Anything else that escapes is a bug.
"""


class DinoforgeError(Exception):
    """Base of every error that a user can cause and mend."""


class RecipeError(DinoforgeError):
    """A recipe, or a key=value override, that cannot be run as it stands."""


class DataError(DinoforgeError):
    """Images, folders or labels that cannot be used."""


class ImageError(DataError):
    """One image that cannot be read or converted; training skips and counts it."""


class RunError(DinoforgeError):
    """A run directory that cannot be used: another run's, read-only, or without room."""


class WeightsError(DinoforgeError):
    """A weight file or checkpoint that does not fit, is damaged, or could run code."""


class TrainingError(DinoforgeError):
    """Training that cannot go on, such as a loss that is not finite."""


class ExportError(DinoforgeError):
    """A backbone that another library's format cannot hold, or whose outputs differ there."""
