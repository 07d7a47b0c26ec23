"""The tiles of a tiled decode dealt out to ranks; rank 0 blends them, in the order of the walk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from ..raylight.comm import Comm, Passing
from ..raylight.draws import states
from ..raylight.watch import Watch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_DIMS = 5
UNDERWAY = 2
"""Finished tiles that a rank keeps while rank 0 has not taken them: more would only take memory."""

Decode = Callable[[torch.Tensor], torch.Tensor]


def deal(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank that decodes each tile: whoever has had least to do before it."""
    loads = [0] * ranks
    owners = []
    for cost in costs:
        owners.append(min(range(ranks), key=loads.__getitem__))
        loads[owners[-1]] += cost
    return owners


class Survey:
    """Stands in for the decoder in a walk that only finds out what tiles there are; nothing is decoded."""

    def __init__(self) -> None:
        self.tiles: list[torch.Tensor] = []

    @property
    def costs(self) -> list[int]:
        """What each tile takes, relative to the others."""
        return [tile.numel() for tile in self.tiles]

    def decode(self, tile: torch.Tensor) -> torch.Tensor:
        """Notes the tile; one element on the meta device, which blends with anything there."""
        self.tiles.append(tile)
        return nothing(tile)


class Dealer:
    """Stands in for the decoder in a walk over tiles that every rank takes.

    On rank 0 it returns every tile decoded, here or elsewhere. On other ranks it decodes their own and sends them,
    and returns one element on the meta device: their walk blends nothing. While rank 0 waits for somebody else's tile,
    it decodes its own next one.

    Args:
        decode: of one tile.
        tiles: of the walk (`Survey`), to decode some ahead of it; none where they take too much memory to be kept.
        owners: which rank decodes each tile (`deal`).
        seed: tile i is decoded after torch.manual_seed(seed + i).
        watch: told of every tile.

    Attributes:
        drew: whether decoding drew random numbers here.
    """

    def __init__(
        self,
        comm: Comm,
        decode: Decode,
        tiles: Sequence[torch.Tensor],
        owners: Sequence[int],
        *,
        seed: int,
        watch: Watch,
    ) -> None:
        self.drew = False
        self._comm = comm
        self._decode = decode
        self._tiles = tiles
        self._owners = list(owners)
        self._indices = iter(range(len(owners)))
        self._seed = seed
        self._watch = watch
        self._underway: deque[Passing] = deque()
        self._ahead: dict[int, torch.Tensor] = {}

    def decode(self, tile: torch.Tensor) -> torch.Tensor:
        """The next tile of the walk."""
        index = next(self._indices)
        owner = self._owners[index]
        mine = owner == self._comm.rank
        # as often on every rank, whoever decodes
        if index % self._comm.size == 0:
            self._watch.step(self._comm.size if index else 0)
        result = self._own(index, tile) if mine else None
        header = torch.zeros(MOST_DIMS + 1, dtype=torch.int64, device=tile.device)
        if result is not None and owner:
            header = header.new_tensor([DTYPES.index(result.dtype), *result.shape, *[0] * (MOST_DIMS - result.ndim)])
        announced = self._comm.to_first(header if mine else None, source=owner, like=header)
        if self._comm.rank == 0 and not mine:
            self._look_ahead(index)
            kind, *shape = announced.wait()[0].tolist()
            like = torch.empty(shape[: tile.ndim], dtype=DTYPES[kind], device=tile.device)
            return self._comm.to_first(None, source=owner, like=like).wait()[0]
        sending = self._comm.to_first(result, source=owner, like=tile)
        if self._comm.rank == 0:
            assert result is not None
            return result
        if mine:
            self._underway += (announced, sending)
            while len(self._underway) > 2 * UNDERWAY:
                self._underway.popleft().wait()
        return nothing(tile)

    def finish(self) -> None:
        """Wait until rank 0 has everything."""
        while self._underway:
            self._underway.popleft().wait()
        self._watch.finish()

    def _look_ahead(self, index: int) -> None:
        """Decode the next own tile after this one, unless it is done: one at a time, since each takes memory."""
        own = [later for later in range(index + 1, len(self._tiles)) if self._owners[later] == self._comm.rank]
        if own and not self._ahead:
            self._ahead[own[0]] = self._decoded(own[0], self._tiles[own[0]])

    def _own(self, index: int, tile: torch.Tensor) -> torch.Tensor:
        return self._ahead.pop(index) if index in self._ahead else self._decoded(index, tile)

    def _decoded(self, index: int, tile: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(self._seed + index)
        before = states(tile.device)
        result = self._decode(tile).to(tile.device)
        self.drew |= any(not torch.equal(a, b) for a, b in zip(before, states(tile.device), strict=True))
        return result


def nothing(tile: torch.Tensor) -> torch.Tensor:
    """One element on the meta device."""
    return tile.new_zeros([1] * tile.ndim, device="meta")
