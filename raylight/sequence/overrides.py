"""The attention override of one call of a site: the exchange around the user's own override, around the kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..draws import states
from ..errors import UnsupportedError
from . import kernels

OVERRIDE = "optimized_attention_override"
RING = "TORCH"
"""The name of the kernel of a ring where the user chose none, which is PyTorch's attention."""


def compose(
    attention: Callable[..., torch.Tensor] | None,
    kernel: kernels.LocalKernel | None,
    options: Mapping[str, Any],
    named: Callable[..., torch.Tensor] | None = None,
) -> kernels.Override:
    """An override that computes over all tokens and then calls what was there before.

    Args:
        attention: the exchange, called as a `SequenceAttention` is; None where nothing is cut.
        kernel: the named local kernel, None for the function the model calls.
        options: the model's own transformer_options, whose override is the user's.
        named: what the checkpoint names for this module. As in ComfyUI it takes the place of the function that the
            model calls, and an override of the user's, or a kernel that the user chose, takes its place.

    The override raises UnsupportedError where the user's draws random numbers: each rank has other heads, so it
    would draw others than the plain model does.
    """
    user = options.get(OVERRIDE)
    if user is not None and kernel is not None and kernel.name == RING and _is_pytorch(user):
        options = {key: value for key, value in options.items() if key != OVERRIDE}
        user = named = None

    def override(func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        def base(*a: Any, **k: Any) -> torch.Tensor:
            return func(*a, **k) if kernel is None else kernel(func, *a, **k)

        def local(q: torch.Tensor, *a: Any, **k: Any) -> torch.Tensor:
            if user is None:
                return base(q, *a, **k) if named is None or kernel is not None else named(q, *a, **k)
            if attention is None:
                return user(base, q, *a, **k)
            before = states(q.device)
            out = user(base, q, *a, **k)
            if not all(map(torch.equal, before, states(q.device))):
                raise UnsupportedError(
                    "An attention override draws random numbers",
                    "each worker sees other heads and would draw others than ComfyUI alone",
                    "Remove the node that sets it, or set ulysses_degree to 1",
                )
            return out

        if named is not None and user is None and kernel is not None and kernel.name == RING:
            raise UnsupportedError(
                "A checkpoint that names an attention kernel for its layers cannot be used with ring attention",
                "the workers merge parts of the attention, and its kernel gives no log-sum-exp to merge them by",
                "Set ring_degree to 1 and ulysses_degree higher, or choose a kernel in XFuser_attention",
            )
        # the local kernel sees all tokens, so the options it may look at are those of the whole
        kwargs["transformer_options"] = options
        return local(*args, **kwargs) if attention is None else attention(local, *args, **kwargs)

    return override


def _is_pytorch(user: Any) -> bool:
    """Whether an override of ComfyUI's own asks for PyTorch's attention (Model Attention Backend, 0.33 and later)."""
    held = [cell.cell_contents for cell in getattr(user, "__closure__", None) or ()]
    names = [getattr(value, "__name__", "") for value in held]
    return getattr(user, "__module__", "") == "comfy.model_patcher" and names == ["attention_pytorch"]
