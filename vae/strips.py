"""Who owns which rows of a picture, and what ranks tell each other about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..raylight.comm import Comm
from ..raylight.errors import UnsupportedError

ROWS = -2
"""The dim of rows: the last but one of every activation, in pictures and in videos."""


@dataclass(frozen=True, kw_only=True)
class Strips:
    """Consecutive strips of rows, one per rank, as even as they can be.

    Attributes:
        sizes: rows of the latent that each rank owns, from the top; every one at least 1.
        rank: the rank whose strip is "own".
    """

    sizes: tuple[int, ...]
    rank: int

    def __post_init__(self) -> None:
        assert self.sizes and min(self.sizes) > 0 and 0 <= self.rank < len(self.sizes), self

    @classmethod
    def of(cls, rows: int, *, ranks: int, rank: int) -> Strips:
        """Divide `rows` over `ranks`, not more than there are rows."""
        assert ranks <= rows, (ranks, rows)
        return cls(sizes=tuple(rows // ranks + (index < rows % ranks) for index in range(ranks)), rank=rank)

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
        """The own rows of a whole activation or picture, whatever its number of rows per latent row."""
        each = x.shape[dim] // self.total
        assert each * self.total == x.shape[dim], (tuple(x.shape), self)
        return x.narrow(dim, self.start * each, self.height * each)

    def heights(self, own: int) -> tuple[int, ...]:
        """Rows of an activation on every rank, by how many there are here.

        Raises:
            UnsupportedError: there is no whole number of them on each rank. All ranks raise it.
        """
        heights = tuple(size * own // self.height for size in self.sizes)
        if any(height * self.height != size * own for height, size in zip(heights, self.sizes, strict=True)):
            raise UnsupportedError(
                "A VAE makes a number of rows that is no multiple of the latent's", f"{own} of {self.height} rows"
            )
        return heights

    def least(self, own: int) -> int:
        """Rows of an activation on the rank with the fewest, by how many there are here."""
        return min(self.sizes) * own // self.height


class Rows:
    """The exchanges about rows: neighbours' rows, all rows, statistics over all rows.

    Args:
        comm: the ranks that share a picture, the top strip's first.
        strips: what each of them owns.
    """

    def __init__(self, comm: Comm, strips: Strips) -> None:
        assert comm.size == len(strips.sizes) and comm.rank == strips.rank, (comm.ranks, strips)
        self.comm = comm
        self.strips = strips

    @property
    def top(self) -> bool:
        """Whether the own strip is the picture's first."""
        return self.comm.rank == 0

    @property
    def bottom(self) -> bool:
        """Whether the own strip is the picture's last."""
        return self.comm.rank == self.comm.size - 1

    def extend(self, x: torch.Tensor, *, above: int, below: int, zeros: bool = False) -> torch.Tensor:
        """`x` with rows of the neighbours at its inner edges.

        Args:
            zeros: add rows of zeros at the picture's own edges, where else is nothing.

        Raises:
            UnsupportedError: a strip is shorter than what its neighbour needs. All ranks raise it.
        """
        top, bottom = self.neighbours(x, above=above, below=below)
        if zeros:
            top = x.new_zeros(*x.shape[:ROWS], above, x.shape[-1]) if self.top and above else top
            bottom = x.new_zeros(*x.shape[:ROWS], below, x.shape[-1]) if self.bottom and below else bottom
        parts = [part for part in (top, x, bottom) if part is not None]
        return torch.cat(parts, ROWS) if len(parts) > 1 else x

    def neighbours(self, x: torch.Tensor, *, above: int, below: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The last rows of the strip above and the first of the one below; None where there is no such strip.

        Raises:
            UnsupportedError: a strip is shorter than what its neighbour needs. All ranks raise it.
        """
        if self.strips.least(x.shape[ROWS]) < max(above, below):
            raise UnsupportedError(
                "The strips of the picture are too low for this VAE on so many workers",
                f"a strip of {self.strips.least(x.shape[ROWS])} rows has to give {max(above, below)}",
                "Set mode to tiles",
            )
        return self.comm.halo(x, dim=x.ndim + ROWS, above=above, below=below)

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
            # one group at a time, so that the fp32 copy stays small
            found = [torch.var_mean(flat[:, group].float(), -1, correction=0) for group in range(groups)]
            variance, mean = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
        count = float(flat.shape[-1])
        mine = torch.stack([mean, variance * count, torch.full_like(mean, count)])[None]
        parts = self.comm.all_gather(mine, dim=0, sizes=[1] * self.comm.size)
        means, squares, counts = torch.cat(parts).unbind(1)
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total
        variance = (squares + counts * (means - mean) ** 2).sum(0) / total
        each = channels // groups
        mean, variance = (value.repeat_interleave(each, 1).reshape(-1) for value in (mean, variance))
        scale, shift = (None if value is None else value.to(mean.dtype).repeat(batch) for value in (weight, bias))
        merged = x.reshape(1, batch * channels, *x.shape[2:])
        return torch.nn.functional.batch_norm(merged, mean, variance, scale, shift, eps=eps).reshape(x.shape)
