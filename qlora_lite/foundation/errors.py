"""What can go wrong by the user's hand.

Every message has three parts: what we got, what we need, what to do next. A command that ends in
one of these prints the message, without a traceback, and exits with status 2. Anything else that
escapes is our bug and exits with status 1.
"""


class QloraLiteError(Exception):
    """A mistake or a limit that the user can do something about."""


class RecipeError(QloraLiteError):
    """A setting that does not exist, has the wrong type, or contradicts another."""


class BaseModelError(QloraLiteError):
    """A base model that cannot be found, read, or used as asked."""


class DataError(QloraLiteError):
    """A data file or a row that cannot be used; names file, line and field."""


class AdapterError(QloraLiteError):
    """Targets that match nothing, or an adapter that does not fit its base."""


class BudgetError(QloraLiteError):
    """More memory needed than allowed; says what takes it and which settings save how much."""


class DeviceError(QloraLiteError):
    """A device that cannot run what was asked."""


class RunError(QloraLiteError):
    """A run folder that is in use, belongs to another recipe, or is not a run."""


class TrainingError(QloraLiteError):
    """Training that had to stop: a loss that is not finite, a gradient that is zero."""


class ExportError(QloraLiteError):
    """Weights that cannot be written as asked."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived and the state is saved; the command exits with status 130.

    Not an `Exception`, so that no handler for errors swallows it.
    """
