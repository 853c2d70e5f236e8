# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause, each one clear line that names the file, the field and the fix."""


class StarkvError(Exception):
    """Base of all errors that bad input causes.

    The command line prints the message as one line on stderr and exits with code 2.
    Anything that is not a ``StarkvError`` is a bug in starkv and keeps its traceback.
    """


class CalibrationError(StarkvError):
    """Statistics that a calibration gathered are no numbers, or stand on too few tokens."""


class CheckpointError(StarkvError):
    """A checkpoint is missing, truncated, or of an architecture that starkv does not know."""


class ImageError(StarkvError):
    """An image can't be read, is empty, or has a size that the model can't take."""


class EngineError(StarkvError):
    """An engine directory is missing, damaged, or built for another machine or version."""


class UsageError(StarkvError):
    """An argument names something that does not exist, or two arguments contradict each other."""
