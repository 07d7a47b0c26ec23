"""What ComfyUI's code logs while it loads and patches a model, wherever it runs: each line once in ComfyUI's log."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator

OURS = __name__.partition(".")[0]
THEIRS = ("root", "comfy")
"""How the names of the loggers of ComfyUI and its packages begin."""
Said = tuple[int, str]
"""Level and text."""


class Heard(logging.Handler):
    """Warnings and errors of ComfyUI's code, in this thread and while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[Said] = []
        self._thread = 0

    def __enter__(self) -> Heard:
        self._thread, self._lines = threading.get_ident(), []
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        theirs = record.name.startswith(THEIRS) and record.name.partition(".")[0] != OURS
        if theirs and record.thread == self._thread:
            self._lines.append((record.levelno, record.getMessage()))

    def take(self) -> list[Said]:
        """The lines since it was entered, or since the last time."""
        found, self._lines = self._lines, []
        return found


@contextlib.contextmanager
def kept_back() -> Iterator[list[Said]]:
    """What ComfyUI's code says in this thread meanwhile, in place of saying it: warnings and errors."""
    lines: list[Said] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            lines.append((record.levelno, record.getMessage()))
        return False

    with _only(keep):
        yield lines


@contextlib.contextmanager
def _only(wanted: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """ComfyUI's code logs in this thread only what is wanted."""
    thread, root = threading.get_ident(), logging.getLogger()

    def mine(record: logging.LogRecord) -> bool:
        return record.thread != thread or wanted(record)

    root.addFilter(mine)  # which does not see what other loggers log
    try:
        yield
    finally:
        root.removeFilter(mine)


class Told:
    """What of a model has been said in ComfyUI's log.

    Several ranks say the same, weights that are patched whenever they are used say it at each use, and this process
    builds and patches some of the model as well.
    """

    def __init__(self) -> None:
        self._state: object = None
        self._lines: dict[bool, set[str]] = {True: set(), False: set()}
        self._lock = threading.Lock()

    def patched(self, state: object) -> None:
        """The patches are others, by what tells them apart: what is wrong with them may be said again."""
        with self._lock:
            if state != self._state:
                self._state = state
                self._lines[False].clear()

    def say(self, lines: Iterable[Said], *, loading: bool) -> None:
        """Say what a worker has heard.

        Args:
            loading: it is of the file, and not of patches.
        """
        for level, text in lines:
            if self._new(text, loading):
                logging.getLogger().log(level, text)

    def here(self, *, loading: bool) -> contextlib.AbstractContextManager[None]:
        """What this thread does meanwhile says only what has not been said."""
        return _only(lambda record: self._new(record.getMessage(), loading))

    def _new(self, text: str, loading: bool) -> bool:
        with self._lock:
            new = text not in self._lines[loading]
            self._lines[loading].add(text)
            return new
