"""What one list of blocks may do with tokens: its streams, their segments, and every entry that fits the lengths."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..cuts import Entry, Index, PerFrame, Replicated, Split, Stream
from ..plan import Blocks, Site
from ..sequence.slots import Slot
from .cuts import Count, Counted, Nested, Same
from .lengths import Lengths, Runs, Vector, added, product, token_dims, varies
from .trace import Call
from .values import OPTIONS, Path, Refused, leaves

TEXT = ("txt", "text", "encoder_hidden", "context", "instruct")
"""Names of arguments that are text: only for the names of segments."""
Key = tuple[str, Any]
"""A choice: ("keep", segment), ("arg", path) or ("site", path from the block)."""
Chosen = dict[Key, Any]


@dataclass(frozen=True)
class Crossing:
    """Attention of one segment to another: a site only where whole queries look at keys that are cut."""

    at: str
    keys: tuple[str, ...]

    def site(self, kept: set[str]) -> Site | None:
        """The site, with these segments whole on every rank."""
        return None if set(self.keys) <= kept else Site(at=self.at, order=self.keys, replicated_query=True)


@dataclass(frozen=True)
class Lane:
    """An argument that comes out of the block again: dims `dim` to `dim + grid` are its tokens, so many together."""

    dim: int
    grid: int
    length: Vector


class Guess:
    """The streams of one list of blocks, and what is open.

    Args:
        at: path of the list.
        calls: of its blocks, in order.

    Attributes:
        kinds: one call of each form that blocks are called in.

    Raises:
        Refused: no argument comes out again as a plan can say it.
    """

    def __init__(self, model: nn.Module, runs: Runs, lengths: Lengths, *, at: str, calls: list[Call]) -> None:
        self.model, self.at, self.calls = model, at, calls
        self._runs, self._lengths = runs, lengths
        kinds: dict[Any, Call] = {}
        for call in calls:
            shape = tuple((p, tuple(v.shape) if isinstance(v, torch.Tensor) else v) for p, v in leaves(call.args))
            outs = tuple((p, tuple(v.shape)) for p, v in leaves(call.out) if isinstance(v, torch.Tensor))
            kinds.setdefault((type(model.get_submodule(call.name)), shape, outs), call)
        self.kinds = list(kinds.values())
        self._outs = lengths.tensors_of(calls[0], "out")
        self._passing = self._passed_on()
        self._attention = lengths.attention(calls[0])
        self._lanes = self._lanes_of()
        self._names = self._named()
        self.segments = {name: self._lanes[path].length for path, name in self._names.items()}
        self._numbers: dict[Path, str] = {}
        self._count_segments()

    # --- streams

    def _passed_on(self) -> dict[Path, Path]:
        """Inputs that come out again, and as which output."""
        call = self.calls[0]
        if any(len(path) > 1 for path in self._outs) or not isinstance(call.out, (torch.Tensor, tuple)):
            raise Refused(f"{call.name}: its outputs are nested")
        given = self._lengths.tensors_of(call)
        later = dict(leaves(self.calls[1].args)) if len(self.calls) > 1 else {}
        passing: dict[Path, Path] = {}
        for path, vectors in self._outs.items():
            if not any(map(varies, vectors)):
                continue
            alike = [p for p, v in given.items() if v == vectors and p not in passing]
            value = dict(leaves(call.out))[path]
            # of several that would fit, the one that the next block gets it as
            chained = [p for p in alike if _equal(later.get(p), value)]
            for found in (chained or alike)[:1]:
                passing[found] = path
        if not passing:
            raise Refused(f"{call.name}: no argument of it comes out again")
        if any(len(path) > 2 for path in passing):
            raise Refused(f"{call.name}: its streams are nested")
        return passing

    def _lanes_of(self) -> dict[Path, Lane]:
        given = self._lengths.tensors_of(self.calls[0])
        lanes: dict[Path, Lane] = {}
        for path in self._passing:
            dims = token_dims(given[path])
            if dims != list(range(dims[0], dims[0] + len(dims))):
                raise Refused(f"{self.calls[0].name}: tokens of {path} lie along dims {dims}")
            lanes[path] = Lane(dims[0], len(dims), product([given[path][dim] for dim in dims]))
        wanted = {length for pair in self._attention for length in pair}
        if len(lanes) == 1:
            # a grid of which one side did not change: one frame
            ((path, lane),) = lanes.items()
            for before, behind in ((1, 0), (0, 1), (1, 1)):
                first, last = lane.dim - before, lane.dim + lane.grid + behind
                wider = product(given[path][first:last])
                if lanes[path].length not in wanted and first > 0 and last < len(given[path]) and wider in wanted:
                    lanes[path] = Lane(first, last - first, wider)
        return lanes

    def _named(self) -> dict[Path, str]:
        """The segment of each stream; those of equal lengths are one, unless attention sees one after the other."""
        lengths = {path: lane.length for path, lane in self._lanes.items()}
        distinct = set(lengths.values())
        joined = len(distinct) < len(lengths) and any(q == added(list(lengths.values())) for q, _ in self._attention)
        if len(distinct) == 1 and not joined:
            return dict.fromkeys(lengths, "x")
        names: dict[Path, str] = {}
        for path, length in lengths.items():
            text = any(word in str(path[0]) for word in TEXT) and len(lengths) > 1
            base = "img" if self._runs.image(length) and not text else "txt"
            same = next((name for other, name in names.items() if lengths[other] == length and not joined), None)
            name, number = base, 2
            while name in names.values():
                name, number = f"{base}{number}", number + 1
            names[path] = same or name
        return names

    def _count_segments(self) -> None:
        """Attention may see fewer tokens of a stream than there are: as many as an argument says."""
        given = self._lengths.of(self.calls[0])
        for query, _ in self._attention:
            if self.orders(query) or not self._runs.image(query):
                continue
            for path, value in given.items():
                if len(path) != 1 or not isinstance(value, tuple) or self._numbers:
                    continue
                known, name = self.segments, str(path[0])
                self.segments = {**known, name: value}
                if any(name in order for order in self.orders(query)):
                    self._numbers[path] = name
                else:
                    self.segments = known

    def orders(self, length: Vector) -> list[tuple[str, ...]]:
        """Orders of segments that are that long together, text first."""
        names = list(self.segments)
        every = (order for count in range(1, len(names) + 1) for order in itertools.permutations(names, count))
        found = [order for order in every if added([self.segments[name] for name in order]) == length]
        return sorted(found, key=lambda order: order[0] != "txt")

    # --- what is open

    def choices(self) -> dict[Key, list[Any]]:
        """Options of what is open, the likeliest first."""
        found: dict[Key, list[Any]] = {}
        longest = max(self.segments, key=lambda name: self.segments[name][0])
        for name in self.segments:
            if name != longest:
                found["keep", name] = [True] if name in self._numbers.values() else [False, True]
        for call in self.kinds:
            for path, length in self._lengths.of(call).items():
                if path in self._passing or path in self._numbers or ("arg", path) in found:
                    continue
                options = self._of_tensor(length) if isinstance(length, list) else self._of_int(length)
                if len(options) > 1:
                    found["arg", path] = options
            hosts: dict[str, set[tuple[Vector, Vector]]] = {}
            for record, pair in zip(call.attention, self._lengths.attention(call), strict=True):
                hosts.setdefault(self._host(call, record.path), set()).add(pair)
            for host, pairs in hosts.items():
                sites = self._of_site(host, pairs)
                if sites and ("site", host) not in found:
                    found["site", host] = sites
        return found

    def _host(self, call: Call, path: str) -> str:
        """The innermost module around an attention call, from the block, that can be given an override."""
        while path != call.name and Slot.find(self.model.get_submodule(path).forward, OPTIONS) is None:
            path = path.rpartition(".")[0]
        return path[len(call.name) + 1 :]

    def _of_site(self, host: str, pairs: set[tuple[Vector, Vector]]) -> list[Any]:
        orders = [self.orders(q) for q, k in sorted(pairs) if q == k and self.orders(q)]
        options: list[Any] = []
        if len(orders) == 1:
            options = [Site(at=host, order=order) for order in orders[0]]
        elif len(orders) == 2:
            options = [Site(at=host, order=a, also=b) for a, b in itertools.product(*orders)]
        if orders:
            return [*options, None]
        return [Crossing(host, keys) for q, k in sorted(pairs) if q != k for keys in self.orders(k)]

    def _of_tensor(self, vectors: list[Vector]) -> list[Entry | None]:
        options: list[Entry | None] = []
        for dim, length in enumerate(vectors):
            if varies(length):
                options += [Split(dim, *order) for order in self.orders(length)]
        dims = token_dims(vectors)
        if len(dims) > 1 and dims == list(range(dims[0], dims[0] + len(dims))):
            together = self.orders(product([vectors[dim] for dim in dims]))
            options += [Split(dims[0], *order, grid=len(dims)) for order in together if len(order) == 1]
        for dim, rows in enumerate(vectors[:-1]):
            for name, length in self.segments.items():
                whole = all(-(-n // f) * f >= n and f < n for n, f in zip(length, rows, strict=True))
                if length != rows and whole and self._runs.image(rows) and self._runs.image(length):
                    options.append(PerFrame(dim, (name,), ndim=len(vectors)))
        return [*options, None]

    def _of_int(self, vector: Vector) -> list[Entry | None]:
        options: list[Entry | None] = []
        names = list(self.segments)
        for count in range(1, len(names) + 1) if varies(vector) else ():
            for order in itertools.permutations(names, count):
                total = added([self.segments[name] for name in order])
                if total == vector:
                    options.append(Count(*order))
                elif all(v < t for v, t in zip(vector, total, strict=True)):
                    options.append(Index(*order))
        return [*options, None]

    # --- a plan's entry

    def build(self, chosen: Chosen) -> Blocks:
        """The blocks as a plan says it, for one set of choices."""
        streams: dict[str | int, Stream] = {}
        of: dict[str, Stream] = {}
        for path, name in self._names.items():
            lane = self._lanes[path]
            keep = chosen.get(("keep", name), False)
            of[name] = Replicated(lane.dim, name) if keep else Split(lane.dim, name, grid=lane.grid)
            streams[path[0] if len(path) == 1 else f"{path[0]}.{path[1]}"] = of[name]
        for path, name in self._numbers.items():
            streams[path[0]] = Counted(0, name)
        kept = {name for name in self.segments if chosen.get(("keep", name))}
        sites = []
        for (kind, _), entry in chosen.items():
            site = entry.site(kept) if isinstance(entry, Crossing) else entry
            if kind == "site" and site is not None:
                sites.append(site)
        whole = (site.order for site in sites if site.order and not site.replicated_query)
        order = next(whole, tuple(self.segments)[:1])
        return Blocks(
            at=f"{self.at}.*",
            streams=streams,
            outputs=self._outputs(of),
            attention=tuple(site.at if site == Site(at=site.at, order=order) else site for site in sites),
            shared=self._shared(chosen),
            order=order,
        )

    def _outputs(self, of: dict[str, Stream]) -> tuple[Any, ...]:
        back = {out: of[self._names[path]] for path, out in self._passing.items()}
        single = not isinstance(self.calls[0].out, tuple)
        outputs: list[Any] = []
        for number in range(max(len(call.outs) for call in self.calls)):
            path = () if single else (number,)
            options = self._of_tensor(self._outs[path]) if path in self._outs else []
            others = (option for option in options if isinstance(option, Split))
            outputs.append(back[path] if path in back else next(others, Same()))
        return tuple(outputs)

    def _shared(self, chosen: Chosen) -> dict[str, Entry]:
        """Entries by argument, from those by leaf."""
        given = {name: value for call in self.kinds for name, value in call.args.items() if value is not None}
        found: dict[Any, dict[Path, Entry]] = {}
        for (kind, path), entry in chosen.items():
            if kind == "arg" and entry is not None:
                found.setdefault(path[0], {})[path[1:]] = entry
        return {
            name: parts[()] if set(parts) == {()} else Nested(parts, *(path for path, _ in leaves(given[name])))
            for name, parts in found.items()
        }


def _equal(one: Any, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
