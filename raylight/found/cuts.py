"""Entries of plans that were found, for what a hand-written one seldom needs; they print as they are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cuts import Entry, Replicated
from ..errors import UnsupportedError
from ..layout import Layout, Segment
from .values import Path, changed, leaves

if TYPE_CHECKING:
    from ..comm import Comm


@dataclass(frozen=True)
class Same:
    """An output without tokens, equal on all ranks."""

    def __call__(self, value: Any, layout: Layout) -> Any:
        return value

    def join(self, value: Any, layout: Layout, comm: Comm) -> Any:
        """Nothing has to be joined."""
        return value

    @property
    def over(self) -> tuple[str, ...]:
        """It has no segments."""
        return ()


@dataclass(frozen=True, init=False)
class Count:
    """The number of tokens of some segments, from that of all ranks to this rank's.

    Raises:
        UnsupportedError: it is another number.
    """

    over: tuple[str, ...]

    def __init__(self, *over: str) -> None:
        object.__setattr__(self, "over", over or ("x",))

    def __call__(self, value: int, layout: Layout) -> int:
        if value != layout.total(self.over):
            raise UnsupportedError(
                "A block is told another number of tokens than it has", f"{value}, not {layout.total(self.over)}"
            )
        return layout.local(self.over)


@dataclass(frozen=True)
class Counted(Replicated):
    """A segment that stays whole, given by the argument that says how many of its tokens attention sees."""

    def segment(self, value: Any) -> Segment:
        """As many tokens as the argument says."""
        return Segment(self.name, value, whole=True)

    def __call__(self, value: Any, layout: Layout) -> Any:
        return value


@dataclass(frozen=True, init=False)
class Nested:
    """Entries for the leaves of an argument that is a tuple, a list or a dict.

    Attributes:
        entries: by the leaf's path, for those that are not the same on all ranks.
        form: paths of all leaves.

    Raises:
        UnsupportedError: the argument has other leaves.
    """

    entries: tuple[tuple[Path, Entry], ...]
    form: tuple[Path, ...]

    def __init__(self, entries: dict[Path, Entry], *form: Path) -> None:
        object.__setattr__(self, "entries", tuple(entries.items()))
        object.__setattr__(self, "form", form)

    def __call__(self, value: Any, layout: Layout) -> Any:
        found = tuple(path for path, _ in leaves(value))
        if set(found) != set(self.form):
            raise UnsupportedError(
                "A block is given something of another form than its plan is for", f"{found}, not {self.form}"
            )
        for path, entry in self.entries:

            def cut(leaf: Any, entry: Entry = entry) -> Any:
                return entry(leaf, layout)

            value = changed(value, path, cut)
        return value
