"""The errors Raylight raises: each message says what happened, why, and what to change."""

from __future__ import annotations


class RaylightError(Exception):
    """Base of every error Raylight raises on purpose.

    Args:
        what: what happened, one clause.
        why: the cause, with the offending values; may be empty where `what` says it all.
        remedy: what the user can change; may be empty where nothing can be changed.

    The exception pickles to an equal one, so that it survives the way from a worker to the driver.
    """

    def __init__(self, what: str, why: str = "", remedy: str = "") -> None:
        super().__init__(what, why, remedy)
        self.what = what
        self.why = why
        self.remedy = remedy

    def with_remedy(self, remedy: str) -> RaylightError:
        """The same error with another remedy."""
        return type(self)(self.what, self.why, remedy, *self.args[3:])

    def __str__(self) -> str:
        text = f"{self.what}: {self.why}" if self.why else self.what
        return f"{text}. {self.remedy}" if self.remedy else text


class ConfigError(RaylightError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class PlanError(RaylightError):
    """A plan does not fit the model it is installed on."""


class UnsupportedError(RaylightError, ValueError):
    """A model, node or patch that the pool cannot run correctly, refused by name."""


class MisfitError(UnsupportedError):
    """Tokens, tables or masks that are not what the plan says.

    A patch has changed them, for which `remedy` is, or the model is of another version than the plan. The engine knows
    of neither; who calls it does.
    """


class LoadError(RaylightError, ValueError):
    """A file that is missing, damaged, or not a model."""


class Cancelled(RaylightError):
    """The user cancelled what the workers did; all of them have left it at the same point."""


class WorkerError(RaylightError, RuntimeError):
    """A worker failed, died or stopped answering.

    The attribute `cause_type` names the exception type a worker's Python error had, or is empty.
    """

    def __init__(self, what: str, why: str = "", remedy: str = "", cause_type: str = "") -> None:
        super().__init__(what, why, remedy)
        self.cause_type = cause_type
        # BaseException.__reduce__ rebuilds from args
        self.args = (what, why, remedy, cause_type)
