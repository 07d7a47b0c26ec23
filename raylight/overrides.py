"""The attention override of one call of a site: the exchange around the user's own override, around the kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import kernels
from .draws import states
from .errors import UnsupportedError


def compose(
    attention: Callable[..., torch.Tensor] | None, kernel: kernels.LocalKernel | None, options: Mapping[str, Any]
) -> kernels.Override:
    """An override that computes over all tokens and then calls what was there before.

    Args:
        attention: the exchange, called as a `SequenceAttention` is; None where nothing is cut.
        kernel: the named local kernel, None for the function the model calls.
        options: the model's own transformer_options, whose override is the user's.

    The override raises UnsupportedError where the user's draws random numbers: each rank has other heads, so it
    would draw others than the plain model does.
    """
    user = options.get("optimized_attention_override")

    def override(func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        def base(*a: Any, **k: Any) -> torch.Tensor:
            return func(*a, **k) if kernel is None else kernel(func, *a, **k)

        def local(q: torch.Tensor, *a: Any, **k: Any) -> torch.Tensor:
            if user is None:
                return base(q, *a, **k)
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

        # the local kernel sees all tokens, so the options it may look at are those of the whole
        kwargs["transformer_options"] = options
        return local(*args, **kwargs) if attention is None else attention(local, *args, **kwargs)

    return override
