"""Owns every exception and warning class of actstore; leaves the wording to whoever raises.

Grouped by what the caller does next::

    ActstoreError
    ├── ConfigError (ValueError)         change the arguments and call again
    ├── MissingFileError (FileNotFoundError)
    │                                    give another path
    ├── CaptureError (RuntimeError)      mend the cause and capture again; what was committed
    │                                    until then is in the log
    ├── FormatError (ValueError)         the file is not what it was opened as
    │   ├── StreamCorruptError           read on with ``open_stream(path, errors="skip")``
    │   └── UnsupportedVersionError      read it with the version of actstore that the text names
    ├── ArchiveError (RuntimeError)      the archive can't be written there, or fails verification:
    │                                    compact again from the log
    └── BucketError                      the store doesn't answer as it should: do the same again
                                         when it does, which goes on with what it has

    ActstoreWarning (UserWarning)        something was done that the caller may not expect
"""

from __future__ import annotations

__all__ = [
    "ActstoreError",
    "ActstoreWarning",
    "ArchiveError",
    "BucketError",
    "CaptureError",
    "ConfigError",
    "FormatError",
    "MissingFileError",
    "StreamCorruptError",
    "UnsupportedVersionError",
]


class ActstoreError(Exception):
    """The root of every error that actstore raises on purpose."""


class ConfigError(ActstoreError, ValueError):
    """An argument or a combination of arguments can't be honoured."""


class MissingFileError(ActstoreError, FileNotFoundError):
    """A file that was to be read is not there."""


class CaptureError(ActstoreError, RuntimeError):
    """A running capture can't go on: a failing disk, a fault in a worker, a misuse of hooks."""


class FormatError(ActstoreError, ValueError):
    """A file is not in the format that it was opened as."""


class StreamCorruptError(FormatError):
    """A log is damaged.

    Parameters
    ----------
    message : str
        What was wanted, what was found, and what to do.
    path : str
        The log.
    offset : int
        Byte offset of the damage.
    """

    def __init__(self, message: str, *, path: str = "", offset: int = -1) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset


class UnsupportedVersionError(FormatError):
    """A log or archive has a format version that this actstore doesn't know."""


class ArchiveError(ActstoreError, RuntimeError):
    """An archive can't be written, or doesn't verify."""


class BucketError(ActstoreError):
    """A bucket doesn't give or take an object, however often it is asked."""


class ActstoreWarning(UserWarning):
    """Something was done that the caller may not expect."""
