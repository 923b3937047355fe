"""The errors that a user can cause. Each says what is wrong, the value, where, and what to do.

`WsisegError` is the base; each child also inherits the built-in error that fits, so that callers
may catch either. `exit_code` is what the command line returns when the error ends the command.
"""


class WsisegError(Exception):
    """Base of every error this package raises on purpose; its text is fit to show to a user."""

    exit_code = 1


class ConfigError(WsisegError, ValueError):
    """A configuration key, flag or combination of them is wrong."""

    exit_code = 2


class SlideError(WsisegError):
    """Something is wrong with one slide; the other slides go on."""


class SlideOpenError(SlideError, OSError):
    """A path is not a slide that any reader can open."""


class SlideReadError(SlideError, OSError):
    """A slide opened but its pixels could not be read."""


class MissingMppError(SlideError, ValueError):
    """The resolution is missing, not a positive finite number, or absurd."""


class NoTissueError(SlideError, ValueError):
    """The tissue mask is empty, or no tile has enough tissue."""


class SlideTooSmallError(SlideError, ValueError):
    """The slide is smaller than one tile at the wanted resolution."""


class SourceTilesError(SlideError, ValueError):
    """The tiles asked for are not the slide's own JPEG tiles, which were to be kept."""


class AnnotationError(SlideError, ValueError):
    """The annotation of a slide cannot be used: unreadable, outside the slide, unknown class."""


class CohortError(WsisegError, ValueError):
    """The table of slides is inconsistent: double ids, a patient in two splits, missing columns."""

    exit_code = 2


class StoreError(WsisegError, ValueError):
    """A tile store or slide mask is not one, has another format version, or is unfinished."""


class StoreCorruptError(StoreError):
    """A store's data does not match the checksums in its ledger."""


class CheckpointError(WsisegError, ValueError):
    """A checkpoint is not one of ours, is of the wrong kind or version, or is damaged."""


class GeoJSONError(WsisegError, ValueError):
    """A GeoJSON file cannot be read, or a feature in it breaks a rule that cannot be repaired."""


class ExportError(WsisegError, ValueError):
    """A mask cannot be exported in the form that was asked for."""


class OutputExistsError(WsisegError, FileExistsError):
    """The output holds results of a different run; the text shows the difference."""


class OutputLockedError(WsisegError, BlockingIOError):
    """Another process is writing the same output."""


class OutputWriteError(WsisegError, OSError):
    """The operating system does not let an output be written: disk full, no right, broken disk."""


class TrainingMemoryError(WsisegError, MemoryError):
    """A step of training needs more memory than there is."""


class TrainingDivergedError(WsisegError, ArithmeticError):
    """Too many steps gave a loss or gradient that is not finite."""
