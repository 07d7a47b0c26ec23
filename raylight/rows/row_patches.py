"""Patches inside a model that is cut by rows: they are shown all rows, and what they return is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import UnsupportedError
from ..names import name_of
from ..plan import RowPlan
from ..sequence.overrides import OVERRIDE
from .row_rules import RowParallel
from .strips import ROWS, Rows

Patch = Callable[..., Any]
ORIGINAL = "original_shape"
SHAPE = "activations_shape"
"""Where ComfyUI's transformers say which map their tokens are from, [batch, channels, rows, width]."""
MAPS = ("input_block_patch", "input_block_patch_after_skip", "output_block_patch")
"""Lists whose patches get maps and then the options."""
NEUTRAL = ("emb_patch",)
"""Lists whose patches see nothing that has rows."""
INTO = "attn1_patch"
OUT_OF = "attn1_output_patch"
INTO_CROSS = "attn2_patch"
TOKENS = (OUT_OF, "attn2_output_patch", "middle_patch")
"""Lists whose patches get tokens and then the options."""


class WholePatches:
    """The patches of one forward, each as a function of this rank's rows.

    A patch sees what it would see on one rank: every row or token, and the model's own options with the shapes of
    the whole picture. All ranks call it, on the same bytes and from equal random states.

    Args:
        rows: the ranks that share the picture.
        mode: the model's rules, which patches run without.
        shape: of the whole input.
        text: whether cross-attention is to something else than the picture's own tokens.

    Attributes:
        regrouped: self-attention is computed on all tokens by every rank, since patches around it may merge or
            regroup them.
        options: the transformer_options for this rank.

    Raises:
        UnsupportedError: a patch that cannot be shown the whole. All ranks raise it.
    """

    def __init__(
        self,
        options: dict[str, Any],
        plan: RowPlan,
        rows: Rows,
        mode: RowParallel,
        *,
        shape: Sequence[int],
        text: bool,
    ) -> None:
        self._given = options
        self._rows = rows
        self._mode = mode
        self._shape = list(shape)
        self._text = text
        lists = {name: patches for name, patches in options.get("patches", {}).items() if patches}
        replaced = {name: found for name, found in options.get("patches_replace", {}).items() if found}
        for name in sorted(plan.refused & {*lists, *replaced}):
            patches = lists.get(name) or list(replaced[name].values())
            self._refuse(_first_function(patches), f"it sets {name}, which this model cannot show all rows")
        for name in sorted(lists.keys() - {*MAPS, *NEUTRAL, *TOKENS, INTO, INTO_CROSS}):
            self._refuse(_first_function(lists[name]), f"it sets {name}, which is not known to leave rows alone")
        self.regrouped = INTO in lists
        self.options = {**options}
        if lists:
            self.options["patches"] = {**options["patches"], **self._lists(lists)}
        if replaced:
            self.options["patches_replace"] = {**options["patches_replace"], **self._replaced(replaced)}

    def shown(self, options: dict[str, Any]) -> dict[str, Any]:
        """A copy of some of the model's options as they are where nothing is cut."""
        whole = {key: value for key, value in options.items() if key != OVERRIDE}
        whole |= {key: self._given[key] for key in ("patches", "patches_replace") if key in options}
        if OVERRIDE in self._given:
            whole[OVERRIDE] = self.apart(self._given[OVERRIDE])
        whole[ORIGINAL] = list(self._shape)
        if SHAPE in options:
            batch, channels, height, width = options[SHAPE]
            whole[SHAPE] = [batch, channels, sum(self._rows.strips.heights(height)), width]
        return whole

    def join(self, tokens: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """All ranks' tokens, [batch, rows * width, channels]."""
        lengths = self.lengths(options)
        return torch.cat(self._rows.comm.all_gather(tokens, dim=1, sizes=lengths), 1)

    def cut(self, tokens: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """This rank's part of all tokens.

        Raises:
            UnsupportedError: there are more or less of them than the picture has.
        """
        lengths, rank = self.lengths(options), self._rows.comm.rank
        if tokens.shape[1] != sum(lengths):
            raise UnsupportedError(
                "A patch changes the number of tokens of a model that is divided by rows",
                f"it returned {list(tokens.shape)} for {sum(lengths)} tokens",
                self._rows.remedy,
            )
        return tokens.narrow(1, sum(lengths[:rank]), lengths[rank]).contiguous()

    def apart(self, function: Patch) -> Patch:
        """The same function without the rules, which are for rows."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._mode.suspended():
                return function(*args, **kwargs)

        return call

    def lengths(self, options: dict[str, Any]) -> list[int]:
        """Tokens of each rank in the transformer at hand."""
        _, _, height, width = options[SHAPE]
        return [rows * width for rows in self._rows.strips.heights(height)]

    def _lists(self, lists: dict[str, list[Patch]]) -> dict[str, list[Patch]]:
        own: dict[str, list[Patch]] = {name: list(map(self._of_maps, lists[name])) for name in MAPS if name in lists}
        own |= {name: list(map(self._of_whole, lists[name])) for name in NEUTRAL if name in lists}
        for name in TOKENS:
            if name in lists:
                own[name] = [self.join, *map(self._of_whole, lists[name]), self.cut]
        if INTO in lists:
            own[INTO] = [self._join_same, *map(self._of_whole, lists[INTO])]
            own[OUT_OF] = [*map(self._of_whole, lists.get(OUT_OF, ())), self.cut]
        if INTO_CROSS in lists:
            into: Patch = lambda n, context, value, options: (self.join(n, options), context, value)  # noqa: E731
            out: Patch = lambda n, context, value, options: (self.cut(n, options), context, value)  # noqa: E731
            own[INTO_CROSS] = [into, *map(self._of_whole, lists[INTO_CROSS]), out]
        return own

    def _replaced(self, replaced: dict[str, dict[Any, Patch]]) -> dict[str, dict[Any, Patch]]:
        own = {}
        if "attn1" in replaced:
            make = self._of_whole if self.regrouped else self._of_attention
            own["attn1"] = {key: make(patch) for key, patch in replaced["attn1"].items()}
        if "attn2" in replaced:
            own["attn2"] = {key: self._of_cross(patch) for key, patch in replaced["attn2"].items()}
        return own

    def _join_same(self, n: torch.Tensor, context: Any, value: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        """Self-attention has one tensor as queries, keys and values."""
        whole = self.join(n, options)
        return tuple(whole if t is n else t for t in (n, context, value))

    def _of_maps(self, patch: Patch) -> Patch:
        def call(*args: Any) -> Any:
            *local, options = args
            whole = [self._rows.gather(x) for x in local]
            out = self._call(patch, whole, options)
            outs = out if isinstance(out, tuple) else (out,)
            for x, made in zip(whole, outs, strict=True):
                if made.shape[ROWS] != x.shape[ROWS]:
                    self._refuse(patch, "it resizes the picture inside the model")
            own = []
            for x, joined, made in zip(local, whole, outs, strict=True):
                # it may have been written to, and a skip connection may hold it
                x.copy_(self._rows.strips.own(joined))
                own.append(x if made is joined else self._rows.strips.own(made).contiguous())
            return tuple(own) if isinstance(out, tuple) else own[0]

        return call

    def _of_whole(self, patch: Patch) -> Patch:
        return lambda *args: self._call(patch, args[:-1], args[-1])

    def _of_attention(self, patch: Patch) -> Patch:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
            whole = [self.join(t, options) for t in (q, k, v)]
            return self.cut(self._call(patch, whole, options), options)

        return call

    def _of_cross(self, patch: Patch) -> Patch:
        if not self._text:
            return self._of_attention(patch)

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
            return self.cut(self._call(patch, (self.join(q, options), k, v), options), options)

        return call

    def _call(self, patch: Patch, args: Sequence[Any], options: dict[str, Any]) -> Any:
        shown = self.shown(options)
        before = dict(shown)
        with self._mode.suspended():
            out = patch(*args, shown)
        # patches leave notes for each other
        options.update({key: value for key, value in shown.items() if before.get(key, shown) is not value})
        return out

    def _refuse(self, patch: object, why: str) -> None:
        raise UnsupportedError(
            f"{name_of(patch)} cannot be used with a model that is divided by rows", why, self._rows.remedy
        )


def _first_function(patches: Sequence[Any]) -> object:
    """Some lists hold pairs of a class and a function."""
    first = patches[0]
    return next((item for item in first if not isinstance(item, type)), first) if isinstance(first, tuple) else first
