"""PyTorch's own attention with its log-sum-exp, which `scaled_dot_product_attention` computes but does not return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch.backends import cuda
from torch.nn.attention import SDPBackend

aten = torch.ops.aten

CHUNK = 1 << 26
"""Scores that the explicit form holds at a time."""

_NAMED: Mapping[str, SDPBackend] = MappingProxyType(
    {
        "TORCH_FLASH": SDPBackend.FLASH_ATTENTION,
        "TORCH_EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,
        "TORCH_CUDNN": SDPBackend.CUDNN_ATTENTION,
    }
)
_USABLE: Mapping[SDPBackend, Callable[[cuda.SDPAParams], bool]] = MappingProxyType(
    {
        SDPBackend.FLASH_ATTENTION: cuda.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: cuda.can_use_efficient_attention,
        SDPBackend.CUDNN_ATTENTION: cuda.can_use_cudnn_attention,
    }
)

Part = tuple[torch.Tensor, torch.Tensor]
"""An output [B, H, Lq, D] in v's dtype, and the log-sum-exp of its scores, [B, H, Lq] in fp32 (fp64 for fp64)."""


def with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float,
    member: str = "TORCH",
) -> Part:
    """Attention of q [B, H, Lq, D] over k [B, H, Lk, D] and v [B, H, Lk, Dv], views of any strides.

    Args:
        mask: added to the scores; finite, in q's dtype, and of 4 dims that broadcast.
        scale: factor of the scores.
        member: the backend to use where it takes the tensors (names as in `kernels.MEMBERS`), else, and for
            "TORCH", the one that plain attention would take.
    """
    batch, heads, rows, width = q.shape
    if mask is not None:
        mask = mask.expand(batch, heads, rows, k.shape[2])
    if q.device.type == "cpu" and member != "TORCH_MATH" and v.shape[3] == width:
        # strides of a transposed view cost nothing here, but the last dim must be dense
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *(_dense(t) for t in (q, k, v)), attn_mask=mask, scale=scale
        )
        return out, lse
    if q.device.type == "cuda" and member != "TORCH_MATH":
        part = _cuda(q, k, v, mask=mask, scale=scale, member=member)
        if part is not None:
            return part
    return explicit(q, k, v, mask=mask, scale=scale)


def _cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float, member: str
) -> Part | None:
    """One of the fused kernels, or None where none takes these tensors."""
    rows, width = q.shape[2], v.shape[3]
    # zeros added to the head dim change no score; the kernels want multiples of 8
    q, k, v = (_dense(F.pad(t, (0, -t.shape[3] % 8)) if t.shape[3] % 8 else t) for t in (q, k, v))
    if mask is not None:
        mask = _aligned(mask)
    given = cuda.SDPAParams(q, k, v, mask, 0.0, False, False)
    backend = _NAMED.get(member)
    if backend is None or not _USABLE[backend](given):
        # what plain attention would take
        backend = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, 0.0, False, scale=scale))
    if backend == SDPBackend.CUDNN_ATTENTION:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, scale=scale)[:2]
        # [B, H, Lq, 1]
        lse = lse.view(lse.shape[:3])
    elif backend == SDPBackend.FLASH_ATTENTION:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    elif backend == SDPBackend.EFFICIENT_ATTENTION:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)[:2]
    else:
        return None
    # lse rows are padded to the kernel's tile
    return out[..., :width], lse[..., :rows]


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float) -> Part:
    """The same by matrix products in fp32 (fp64 for fp64), some queries at a time: for every device and dtype."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, rows, _ = q.shape
    keys, values = k.to(dtype), v.to(dtype)
    outs, lses = [], []
    step = max(1, CHUNK // max(1, batch * heads * k.shape[2]))
    for start in range(0, rows, step):
        scores = (q[:, :, start : start + step].to(dtype) * scale) @ keys.mT
        if mask is not None:
            scores += mask[:, :, start : start + step]
        lse = scores.logsumexp(-1)
        outs.append((scores - lse[..., None]).exp() @ values)
        lses.append(lse)
    return torch.cat(outs, 2).to(v.dtype), torch.cat(lses, 2)


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    """A mask whose rows start where the memory-efficient kernel can load them: at multiples of 16 elements."""
    if mask.stride(3) == 1 and not any(stride % 16 for stride in mask.stride()[:3]) and mask.data_ptr() % 32 == 0:
        return mask
    # a dim that is expanded stays so
    small = mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride()[:3])]
    room = small.new_empty(*small.shape[:3], -(-mask.shape[3] // 16) * 16)[..., : mask.shape[3]]
    return room.copy_(small).expand(mask.shape)
