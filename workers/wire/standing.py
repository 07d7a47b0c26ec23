"""Which ComfyUI this is, whether the pack is tested with it, and what that means for an error."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence

from ...raylight.errors import MisfitError, PlanError, RaylightError, UnsupportedError, WorkerError
from .failures import TRANSPORT_SIGNS

log = logging.getLogger(__name__)

TESTED = ("0.3.75", "0.20.1", "0.33.0")
"""Versions of ComfyUI that the pack is tested with, the oldest first. README says the same."""
CHECK = "`python benchmarks/compat.py` of Raylight's repository"
PROGRAM_ERRORS = frozenset(
    {
        "AssertionError",
        "AttributeError",
        "ImportError",
        "IndexError",
        "KeyError",
        "ModuleNotFoundError",
        "NotImplementedError",
        "RuntimeError",
        "TypeError",
        "ValueError",
    }
)
"""What Python and PyTorch raise where names, shapes or arguments are not those that code was written for."""


def version() -> str:
    """ComfyUI's own, in any of its processes; "unknown" where it has none to tell."""
    try:
        from comfyui_version import __version__
    except ModuleNotFoundError:
        return "unknown"
    return str(__version__)


def standing(found: str) -> str:
    """What a version of ComfyUI is to those of TESTED: "" for one of them."""
    here, tested = _numbers(found), [_numbers(each) for each in TESTED]
    if here in tested:
        return ""
    if not here:
        return "of a version that does not say what it is to those that Raylight is tested with"
    if here > tested[-1]:
        return f"newer than any that Raylight is tested with ({TESTED[-1]})"
    if here < tested[0]:
        return f"older than any that Raylight is tested with ({TESTED[0]})"
    after = next(index for index, each in enumerate(tested) if here < each)
    return f"between two that Raylight is tested with ({TESTED[after - 1]} and {TESTED[after]})"


def line() -> str:
    """ComfyUI's version and its standing, for the log and the report."""
    found = version()
    return f"ComfyUI {found}, {standing(found) or 'which Raylight is tested with'}"


@functools.cache
def announce() -> None:
    """Say it in the log, once per process."""
    if standing(version()):
        log.warning("%s: %s says what works", line(), CHECK)
    else:
        log.info("%s", line())


def note() -> str:
    """What to add to an error that another version of ComfyUI may have caused; "" on one of TESTED."""
    found = version()
    return f"ComfyUI {found} is {standing(found)}: {CHECK} says what works with it" if standing(found) else ""


@contextlib.contextmanager
def explaining(changes: Callable[[], Sequence[str]] = tuple) -> Iterator[None]:
    """Have errors `explained`; `changes` is called when there is one."""
    try:
        yield
    except RaylightError as error:
        better = explained(error, changes())
        if better is error:
            raise
        raise better from error


def explained(error: RaylightError, changes: Sequence[str]) -> RaylightError:
    """The error with what may have caused it, and what to do about that.

    Args:
        changes: names of what nodes change in the model; empty where none does.
    """
    if isinstance(error, (MisfitError, PlanError)):
        if changes:
            blamed = f"{error.remedy or 'Remove the node that changes it'}. Here the model is changed by "
            return error.with_remedy(blamed + ", ".join(dict.fromkeys(changes)) + _sentence(note()))
        cause = note() or f"This is a fault of Raylight, which is tested with ComfyUI {version()}: please report it"
        return error.with_remedy(
            f"No node changes the model here. {cause}. Until then set ulysses_degree and ring_degree to 1: "
            "cfg_degree and data parallel work with every model"
        )
    if changes or not _of_the_model(error):
        return error
    return noted(error)


def noted(error: RaylightError) -> RaylightError:
    """The error, with the standing of this ComfyUI where it is none of TESTED."""
    return error.with_remedy(error.remedy + _sentence(note()) if error.remedy else note()) if note() else error


def _of_the_model(error: RaylightError) -> bool:
    if isinstance(error, WorkerError):
        other = any(sign in error.why for sign in ("memory", *TRANSPORT_SIGNS))
        return error.cause_type in PROGRAM_ERRORS and not other
    return isinstance(error, UnsupportedError)


def _sentence(text: str) -> str:
    return f". {text}" if text else ""


def _numbers(found: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", found)[:3]))
