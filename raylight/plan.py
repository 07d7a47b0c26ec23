"""The vocabulary in which a model family says where its tokens are: data that `install` carries out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .cuts import Entry, Split, Stream, Stretch


@dataclass(frozen=True, kw_only=True)
class Site:
    """A module whose attention spans tokens of several ranks, by ComfyUI's attention override.

    Attributes:
        at: path from the block; "" is the block.
        order: how the segments are concatenated there; None is the blocks' own order.
        also: another order, for a module that computes a second attention over other segments. The
            number of query tokens tells which one a call is.
        replicated_query: its queries are whole on every rank, only keys and values are cut.
    """

    at: str = ""
    order: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()
    replicated_query: bool = False


@dataclass(frozen=True, kw_only=True)
class Called:
    """A function that a node may hand to blocks, which they call in place of a module: it looks at all tokens.

    Attributes:
        stream: how its first argument and its result are cut.
        shared: names of other arguments that blocks get whole and hand on to it.
    """

    stream: Split
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """One list of transformer blocks.

    Names of arguments may go on with the index of an element ("x.0"); a number stands for a positional
    argument without a name.

    Attributes:
        at: path of the blocks from the root, such as "blocks.*".
        streams: block arguments that are token tensors, and how they are cut; they name the segments.
        shared: arguments that every block gets whole, and their local form.
        outputs: how the block's outputs are joined, in their order; one that is None stays so.
        attention: paths, from a block, of the modules whose attention spans all tokens, or `Site`s.
        order: how the segments are concatenated inside that attention.
        optional: names in `shared` that some versions of the model do not have.
        called: arguments that are functions of tokens, None for the model's own; some versions do not have them.
        patches: names of transformer_options patch lists that the block calls, with the token dim of the
            tensors they are called with; they are shown the whole sequence.
        patch_mask: how the mask in those calls is cut, None where blocks hold a whole one.
    """

    at: str
    streams: Mapping[str | int, Stream]
    outputs: tuple[Stream, ...]
    attention: tuple[str | Site, ...]
    shared: Mapping[str, Entry] = field(default_factory=dict)
    order: tuple[str, ...] = ("x",)
    optional: tuple[str, ...] = ()
    called: Mapping[str, Called] = field(default_factory=dict)
    patches: Mapping[str, int] = field(default_factory=dict)
    patch_mask: Split | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The attention modules, each with its order."""
        sites = [Site(at=entry) if isinstance(entry, str) else entry for entry in self.attention]
        return tuple(replace(site, order=site.order or self.order) for site in sites)


@dataclass(frozen=True)
class Head:
    """A module after the last block that treats every token by itself: its small outputs are joined, not its input.

    Attributes:
        at: path from the root.
        shared: arguments that it gets whole, and their local form.
        outputs: how its outputs are joined, in their order.
        optional: names in `shared` that some versions of the model do not have.
    """

    at: str
    shared: Mapping[str, Entry] = field(default_factory=dict)
    outputs: tuple[Split | Stretch, ...] = (Split(1),)
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    """Modules that look across tokens in another way than attention: they get a stream whole, their outputs are cut.

    Attributes:
        at: path from the root; inside a block, or called between blocks.
        arg: the argument that is the stream.
        stream: how it is cut.
    """

    at: str
    arg: str
    stream: Split = field(default_factory=lambda: Split(1))


@dataclass(frozen=True)
class Part:
    """Modules inside blocks that get something whole beside this rank's tokens, and need the part of it for those.

    Attributes:
        at: path from the root.
        shared: arguments that it gets whole, and their local form.
    """

    at: str
    shared: Mapping[str, Entry]


@dataclass(frozen=True, init=False)
class Region:
    """Tokens are cut on entry to the first block and joined at `exit`, or after the last block where that is None.

    Everything outside sees whole tensors.

    Attributes:
        blocks: the lists of blocks; the first is entered first and left last, others are fed from it.
        exit: needs that nothing between the last block and it adds, drops or looks across tokens.
        whole: modules inside the region that need all tokens.
        parts: modules inside blocks that need their part of what those leave whole.
        per_block: tokens are cut and joined around every block, since the model changes them in between.
    """

    blocks: tuple[Blocks, ...]
    exit: Head | None
    whole: tuple[Whole, ...]
    parts: tuple[Part, ...]
    per_block: bool

    def __init__(
        self,
        *blocks: Blocks,
        exit: Head | None = None,
        whole: tuple[Whole, ...] = (),
        parts: tuple[Part, ...] = (),
        per_block: bool = False,
    ) -> None:
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "exit", exit)
        object.__setattr__(self, "whole", whole)
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "per_block", per_block)


@dataclass(frozen=True, init=False)
class Plan:
    """The regions of a model, in the order in which they run.

    Attributes:
        regions: parts of the model that run on cut tokens.
        block_patches: transformer_options patch lists that see tokens between blocks, so that their
            presence asks for block granularity.
    """

    regions: tuple[Region, ...]
    block_patches: tuple[str, ...]

    def __init__(self, *regions: Region, block_patches: tuple[str, ...] = ("double_block", "noise_refiner")) -> None:
        object.__setattr__(self, "regions", regions)
        object.__setattr__(self, "block_patches", block_patches)


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """A model whose activations are maps, [batch, channels, ..., rows, width], and cut by rows from end to end.

    What its convolutions and norms need of other rows follows from their calls (`row_rules`).

    Attributes:
        halvings: how often it halves the rows, rounding up.
        attention: paths of the modules that attend among a map's tokens, row by row, and have it in
            transformer_options (`row_patches.SHAPE`).
        cross: paths of those that attend from a map's tokens to something else, or to themselves where they are
            given no `context`.
        refused: names of patch lists and of replacements that cannot be shown all rows.
    """

    halvings: int
    attention: tuple[str, ...]
    cross: tuple[str, ...] = ()
    refused: frozenset[str] = frozenset()
