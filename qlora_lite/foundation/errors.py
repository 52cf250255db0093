"""Errors that a user can fix.

Every message has three parts: what was given, what is needed, what to do next. The command prints
the message without a traceback and exits with status 2. `CheckError` is a result that failed its
check. Any other exception is a bug of ours. The command exits with status 1 after both.
"""


class QloraLiteError(Exception):
    """Base class: a mistake in the input, or a limit that the user can change."""


class RecipeError(QloraLiteError):
    """A setting that does not exist, has the wrong type, or contradicts another."""


class BaseModelError(QloraLiteError):
    """A base model that cannot be found, read, or used as asked."""


class DataError(QloraLiteError):
    """A data file or a row that cannot be used. The message names file, line and field."""


class AdapterError(QloraLiteError):
    """Targets that match no layer, or an adapter that does not fit its base."""


class BudgetError(QloraLiteError):
    """More memory needed than allowed. The message says which settings save how much."""


class DeviceError(QloraLiteError):
    """A device that is absent or does not support the settings."""


class RunError(QloraLiteError):
    """A run folder that is in use, belongs to another recipe, or holds no run."""


class TrainingError(QloraLiteError):
    """Training that must stop: a loss that is not finite, a gradient of zero."""


class ExportError(QloraLiteError):
    """Weights that cannot be written with these settings or to this place."""


class CheckError(Exception):
    """A result failed its check, and is neither put in place nor printed. Exits with status 1."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived, and the state is saved. The command exits with status 130.

    Derives from BaseException, so that `except Exception` does not swallow it.
    """
