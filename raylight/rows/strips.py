"""Who owns which rows of a picture, and what ranks tell each other about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..comm import Beside, Comm
from ..errors import UnsupportedError
from ..layout import dealt

ROWS = -2
"""The dim of rows: the last but one of every activation, in pictures and in videos."""
COPIED = 1 << 24
"""Elements of a 16-bit activation that are copied to fp32 at a time for its statistics, unless a group has more."""


@dataclass(frozen=True, kw_only=True)
class Strips:
    """Consecutive strips of rows, one per rank, as even as they can be.

    Attributes:
        sizes: rows of the latent that each rank owns, from the top; every one at least 1.
        rank: the rank whose strip is "own".
        halvings: how often a model may halve the rows of the latent, rounding up; 0 for one that only makes
            activations whose number of rows per row of the latent is the same everywhere.
    """

    sizes: tuple[int, ...]
    rank: int
    halvings: int = 0

    def __post_init__(self) -> None:
        assert self.sizes and min(self.sizes) > 0 and 0 <= self.rank < len(self.sizes), self

    @classmethod
    def of(cls, rows: int, *, ranks: int, rank: int, halvings: int = 0, speeds: tuple[float, ...] = ()) -> Strips:
        """Divide `rows` over `ranks`, not more than `most` there are, in proportion to their speeds where given."""
        assert ranks <= cls.most(rows, halvings=halvings), (ranks, rows)
        unit = 2**halvings
        units = cls.most(rows, halvings=halvings)
        given = dealt(units, speeds or (1.0,) * ranks, least=1)
        sizes = [unit * count for count in given]
        sizes[-1] += rows - unit * units
        return cls(sizes=tuple(sizes), rank=rank, halvings=halvings)

    @staticmethod
    def most(rows: int, *, halvings: int = 0) -> int:
        """How many strips `rows` give: all but the last a multiple of what becomes one row, which takes the rest.

        A rest of up to half of that is no strip by itself, so that the height of a strip tells how often it was
        halved.
        """
        unit = 2**halvings
        return max(1, rows // unit + (rows % unit > unit // 2))

    @property
    def total(self) -> int:
        """Rows of the whole latent."""
        return sum(self.sizes)

    @property
    def height(self) -> int:
        """Own rows."""
        return self.sizes[self.rank]

    @property
    def start(self) -> int:
        """First own row."""
        return sum(self.sizes[: self.rank])

    def own(self, x: torch.Tensor, *, dim: int = ROWS) -> torch.Tensor:
        """The own rows of a whole activation or picture, whatever its number of rows per latent row.

        Raises:
            UnsupportedError: with `halvings`, its rows are not those of the latent, however often halved.
        """
        rows = x.shape[dim]
        if self.halvings:
            level = self._level(rows, of=self.total)
            return x.narrow(dim, self.start >> level, _halved(self.height, level))
        each = rows // self.total
        assert each * self.total == rows, (tuple(x.shape), self)
        return x.narrow(dim, self.start * each, self.height * each)

    def heights(self, own: int) -> tuple[int, ...]:
        """Rows of an activation on every rank, by how many there are here.

        Raises:
            UnsupportedError: there is no whole number of them on each rank. All ranks raise it.
        """
        if self.halvings:
            level = self._level(own, of=self.height)
            return tuple(_halved(size, level) for size in self.sizes)
        heights = tuple(size * own // self.height for size in self.sizes)
        if any(height * self.height != size * own for height, size in zip(heights, self.sizes, strict=True)):
            raise UnsupportedError(
                "A model makes a number of rows that is no multiple of the latent's", f"{own} of {self.height} rows"
            )
        return heights

    def doubled(self, own: int) -> int:
        """Own rows of an activation that is halved once less; 0 where there is none."""
        level = self._level(own, of=self.height)
        return _halved(self.height, level - 1) if level else 0

    def least(self, own: int) -> int:
        """Rows of an activation on the rank with the fewest, by how many there are here."""
        return min(self.heights(own)) if self.halvings else min(self.sizes) * own // self.height

    def _level(self, rows: int, *, of: int) -> int:
        """How often `of` rows were halved to become `rows`."""
        for level in range(self.halvings + 1):
            if _halved(of, level) == rows:
                return level
        raise UnsupportedError(
            "A model, a patch or a ControlNet makes rows that halving the latent's does not give",
            f"{rows} rows where there are {of}",
            "Set ulysses_degree and ring_degree to 1",
        )


def _halved(rows: int, times: int) -> int:
    """Rows after as many strided convolutions with padding, each of which rounds up."""
    return -(-rows >> times)


class Rows:
    """The exchanges about rows: neighbours' rows, all rows, statistics over all rows.

    Args:
        comm: the ranks that share a picture, the top strip's first.
        strips: what each of them owns.
        model: what errors call the model.
        remedy: what the user can do where it cannot be divided by rows.
    """

    def __init__(
        self, comm: Comm, strips: Strips, *, model: str = "This VAE", remedy: str = "Set mode to tiles"
    ) -> None:
        assert comm.size == len(strips.sizes) and comm.rank == strips.rank, (comm.ranks, strips)
        self.comm = comm
        self.strips = strips
        self.model = model
        self.remedy = remedy
        self._shares: dict[tuple[tuple[int, ...], torch.dtype, torch.device], torch.Tensor] = {}

    @property
    def top(self) -> bool:
        """Whether the own strip is the picture's first."""
        return self.comm.rank == 0

    @property
    def bottom(self) -> bool:
        """Whether the own strip is the picture's last."""
        return self.comm.rank == self.comm.size - 1

    def extend(self, x: torch.Tensor, *, above: int, below: int, edge: int = 0) -> torch.Tensor:
        """`x` with rows of the neighbours at its inner edges.

        Args:
            edge: rows of zeros at the picture's own edges.

        Raises:
            UnsupportedError: a strip is shorter than what its neighbour needs. All ranks raise it.
        """
        top, bottom = self.start_neighbours(x, above=above, below=below)()
        if edge and (self.top or self.bottom):
            zeros = x.new_zeros(*x.shape[:ROWS], edge, x.shape[-1])
            top, bottom = zeros if self.top else top, zeros if self.bottom else bottom
        parts = [part for part in (top, x, bottom) if part is not None]
        return torch.cat(parts, ROWS) if len(parts) > 1 else x

    def start_neighbours(self, x: torch.Tensor, *, above: int, below: int) -> Callable[[], Beside]:
        """Start getting the last rows of the strip above and the first of the one below, see Comm.start_halo.

        Raises:
            UnsupportedError: a strip is shorter than what its neighbour needs. All ranks raise it.
        """
        if self.strips.least(x.shape[ROWS]) < max(above, below):
            raise UnsupportedError(
                f"{self.model} cannot be divided over so many workers, whose strips of the picture are too low",
                f"a strip of {self.strips.least(x.shape[ROWS])} rows has to give {max(above, below)}",
                self.remedy,
            )
        return self.comm.start_halo(x, dim=x.ndim + ROWS, above=above, below=below)

    def beside(
        self, x: torch.Tensor, work: Callable[[], torch.Tensor], *, above: int, below: int
    ) -> tuple[torch.Tensor, Beside]:
        """What `work` returns, and the neighbours' rows, which come while it runs; see start_neighbours."""
        arriving = self.start_neighbours(x, above=above, below=below)
        try:
            done = work()
        finally:
            rows = arriving()
        return done, rows

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' rows in order."""
        heights = self.strips.heights(x.shape[ROWS])
        return torch.cat(self.comm.all_gather(x, dim=x.ndim + ROWS, sizes=heights), ROWS)

    def group_norm(
        self,
        x: torch.Tensor,
        groups: int,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """Group norm with the statistics of all rows.

        Means and squared deviations are merged pairwise exact (Chan, Golub and LeVeque 1979), in fp32 for 16-bit
        activations. Applying them is one batch norm with given statistics: no second activation is made.

        Args:
            x: [batch, channels, ..., rows, width].
        """
        batch, channels = x.shape[:2]
        flat = x.reshape(batch, groups, -1)
        if x.dtype in (torch.float32, torch.float64):
            variance, mean = torch.var_mean(flat, -1, correction=0)
        else:
            # some groups at a time, so that the fp32 copy stays small
            each = max(1, COPIED * groups // flat.numel())
            found = [torch.var_mean(part.float(), -1, correction=0) for part in flat.split(each, 1)]
            variance, mean = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        # few and small operations: on a fast device they take longer to start than the norm itself
        means, variances = self.comm.stack(torch.stack((mean, variance))).unbind(1)
        shares = self._shares_of(x.shape[ROWS], like=mean)
        mean = (means * shares).sum(0)
        apart = means - mean
        variance = (torch.addcmul(variances, apart, apart) * shares).sum(0)
        both = torch.stack((mean, variance)).repeat_interleave(channels // groups, 2)
        mean, variance = both.view(2, batch * channels).unbind()
        scale, shift = (None if value is None else value.to(mean.dtype) for value in (weight, bias))
        if batch > 1:
            scale, shift = (None if value is None else value.repeat(batch) for value in (scale, shift))
        merged = x.reshape(1, batch * channels, *x.shape[2:])
        return torch.nn.functional.batch_norm(merged, mean, variance, scale, shift, eps=eps).reshape(x.shape)

    def _shares_of(self, own: int, *, like: torch.Tensor) -> torch.Tensor:
        """Each rank's part of the rows of an activation, [ranks, 1, 1], by how many there are here."""
        heights = self.strips.heights(own)
        key = heights, like.dtype, like.device
        if key not in self._shares:
            total = sum(heights)
            # not from the host: that would wait for the device, and could not be recorded
            self._shares[key] = torch.stack([like.new_full((1, 1), height / total) for height in heights])
        return self._shares[key]
