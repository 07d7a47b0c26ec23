"""A folder of temporary files that no other user of the machine can enter; what dead processes left is swept."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...raylight.errors import ConfigError

log = logging.getLogger(__name__)

PREFIX = "rl-"
SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Bytes that the path of a socket file may have."""
BELOW = len("/rl-12345678/ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store")
"""Of the longest path of a socket of Ray, after the folder that ours is in."""
LONGEST = SOCKET_PATH - BELOW
LAST = "/tmp"
"""Where it is made when no variable says a better place."""
TRIES = 5


@dataclass(frozen=True)
class PrivateFolder:
    """A folder with mode 0700 that this user owns.

    Attributes:
        path: absolute, ASCII, and short enough for the sockets of a Ray below it.
        lock: descriptor of the folder. The lock on it lasts as long as a process has the descriptor, however that
            process ends: a folder that nobody locks is nobody's.
    """

    path: Path
    lock: int

    def remove(self) -> None:
        """Delete the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def make() -> PrivateFolder:
    """A new one, in the first of TMPDIR, XDG_RUNTIME_DIR and /tmp that can have it. What others have left goes first.

    Raises:
        ConfigError: there is no such place.
    """
    _sweep()
    tried = []
    for name, place in _places():
        why = _unfit(place)
        if not why:
            try:
                return _made(place)
            except OSError as error:
                why = error.strerror or str(error)
        tried.append(f"{name} ({place}) {why}" if name else f"{place} {why}")
    raise ConfigError(
        "There is no place for the workers' temporary files",
        "; ".join(tried),
        f"Set TMPDIR to a folder that you can write and other users cannot, with a path of at most {LONGEST} plain "
        "characters",
    )


def _places() -> Iterator[tuple[str, str]]:
    for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
        if place := os.environ.get(name):
            yield name, place.rstrip("/") or "/"
    yield "", LAST


def _unfit(place: str) -> str:
    """Why there can be no private folder in this one, "" where there can."""
    if not os.path.isabs(place):
        return "is no absolute path"
    if not place.isascii():
        return "has characters beyond ASCII"
    if len(place) > LONGEST:
        return f"has more than {LONGEST} characters, and a socket's path may have {SOCKET_PATH}"
    if not os.path.isdir(place):
        return "is no folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return "cannot be written"
    real = Path(place).resolve()
    trusted = {os.geteuid(), 0, os.stat("/").st_uid}  # whoever owns / is root, under whatever number
    for folder in (real, *real.parents):
        found = folder.stat()
        shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
        if shared or found.st_uid not in trusted:
            return f"can be replaced by other users (see the mode and owner of {folder})"
    return ""


def _made(place: str) -> PrivateFolder:
    """
    Raises:
        OSError: it cannot be made, or others could enter it.
    """
    for _ in range(TRIES):
        path = tempfile.mkdtemp(prefix=PREFIX, dir=place)
        lock = _locked(path)
        if lock is None:  # another process has swept it away before it could be locked
            continue
        found = os.fstat(lock)
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == stat.S_IRWXU:
            return PrivateFolder(Path(path), lock)
        os.close(lock)
        os.rmdir(path)
        break
    raise OSError(0, "cannot have folders that other users cannot enter")


def _locked(path: str) -> int | None:
    """A descriptor of the folder with a lock; None where another process has one, or the folder is gone."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with contextlib.ExitStack() as closing:
        closing.callback(os.close, lock)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path, follow_symlinks=False)):
                closing.pop_all()
                return lock
    return None


def _sweep() -> None:
    """Delete the folders that processes of this user have left."""
    for _, place in _places():
        if _unfit(place):
            continue
        for entry in os.scandir(place):
            if entry.name.startswith(PREFIX) and _left(entry.path):
                log.info("deleting %s, which an earlier process has left", entry.path)


def _left(path: str) -> bool:
    """Delete a folder of this user's that nobody locks; whether it was one."""
    try:
        found = os.stat(path, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return False
        lock = _locked(path)
    except OSError:  # it went while we looked
        return False
    if lock is None:
        return False
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    return True
