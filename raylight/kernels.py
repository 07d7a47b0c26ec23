"""Local attention kernels by name, other than ComfyUI's own; yunchang is imported here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from .errors import ConfigError

logger = logging.getLogger(__name__)

Override = Callable[..., torch.Tensor]
"""ComfyUI's `optimized_attention_override`: (func, q, k, v, heads, mask=None, ...) -> [B, L, heads * D]."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "FLASH_ATTN": "FA",
        "FLASH_ATTN_3": "FA3",
        "SAGE_AUTO_DETECT": "SAGE_AUTO",
        "SAGE_FP16_CUDA": "SAGE_FP16",
        "SAGE_FP8_CUDA": "SAGE_FP8",
        "AITER_ROCM": "AITER",
    }
)
"""Names that older workflows use."""

MEMBERS = (
    "AITER",
    "FA",
    "FA3",
    "FLASHINFER",
    "TORCH_MATH",
    "TORCH_FLASH",
    "TORCH_EFFICIENT",
    "TORCH_CUDNN",
    "SAGE_AUTO",
    "SAGE_FP16",
    "SAGE_FP16_TRITON",
    "SAGE_FP8",
    "SAGE_FP8_SM90",
    "SPARSE_SAGE",
    "NPU",
)
"""Members of `yunchang.kernels.AttnType`, here so that a menu needs no yunchang."""

NAMES = ("TORCH", *MEMBERS, *ALIASES)
"""Every name `resolve` knows."""

# what each kernel cannot run without, as yunchang.globals calls it
_NEEDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "AITER": ("HAS_AITER", "aiter"),
        "FA": ("HAS_FLASH_ATTN", "flash-attn"),
        "FA3": ("HAS_FLASH_ATTN_HOPPER", "flash-attn 3 (hopper)"),
        "FLASHINFER": ("HAS_FLASHINFER", "flashinfer"),
        "SAGE_AUTO": ("HAS_SAGE_ATTENTION", "sageattention"),
        "SAGE_FP16": ("HAS_SAGE_ATTENTION", "sageattention"),
        "SAGE_FP16_TRITON": ("HAS_SAGE_ATTENTION", "sageattention"),
        "SAGE_FP8": ("HAS_SAGE_ATTENTION", "sageattention"),
        "SAGE_FP8_SM90": ("HAS_SAGE_ATTENTION", "sageattention"),
        "NPU": ("HAS_NPU", "torch_npu"),
    }
)


def resolve(name: str) -> Override | None:
    """The kernel called `name` as an attention override, or None for "TORCH", which is ComfyUI's own.

    The override computes [B, L, heads * D] from q, k, v as ComfyUI's attention functions take them. What the
    kernel cannot take (a mask, and for most of them another dtype than fp16 and bf16) goes to the function
    that the model called.

    Raises:
        ConfigError: the name is unknown, its package is not installed, or this machine cannot run it.
    """
    member = ALIASES.get(name, name)
    if member == "TORCH":
        return None
    if member not in MEMBERS:
        raise ConfigError(
            f"There is no attention kernel {name}", "", f"Set XFuser_attention to one of {', '.join(NAMES)}"
        )
    if member == "SPARSE_SAGE":
        raise ConfigError(
            f"The attention kernel {name} cannot run",
            "it needs a tuned sparsity pattern",
            "Set XFuser_attention to TORCH",
        )
    if member != "TORCH_MATH" and not torch.accelerator.is_available():
        raise ConfigError(
            f"The attention kernel {name} cannot run here", "it needs an accelerator", "Set XFuser_attention to TORCH"
        )
    try:
        from yunchang import globals as installed
        from yunchang.kernels import AttnType, select_flash_attn_impl
    except ImportError as error:
        raise ConfigError(
            f"The attention kernel {name} is not installed",
            str(error),
            "Set XFuser_attention to TORCH or install yunchang",
        ) from error
    flag, package = _NEEDS.get(member, ("", ""))
    if flag and not getattr(installed, flag):
        raise ConfigError(
            f"The attention kernel {name} is not installed",
            f"{package} cannot be imported",
            f"Set XFuser_attention to TORCH or install {package}",
        )
    return _Named(member, select_flash_attn_impl(AttnType[member], stage="fwd-only"))


class _Named:
    """A yunchang forward, [B, L, H, D] -> ([B, L, H, D], log-sum-exp), behind ComfyUI's signature."""

    def __init__(self, member: str, forward: Callable[..., Any]) -> None:
        self._member = member
        self._forward = forward
        self._told = False

    def __call__(  # noqa: PLR0917, the signature is ComfyUI's
        self,
        func: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        half = q.dtype in (torch.float16, torch.bfloat16)
        if mask is not None or not (half or self._member in ("TORCH_MATH", "TORCH_EFFICIENT")):
            if not self._told:
                self._told = True
                reason = f"{q.dtype} tensors" if mask is None else "an attention mask"
                logger.info("%s does not take %s; ComfyUI's attention computes these calls", self._member, reason)
            return func(
                q,
                k,
                v,
                heads,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
                **kwargs,
            )
        if skip_reshape:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        else:
            q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        out = self._compute(q, k, v, kwargs.get("scale") or q.shape[-1] ** -0.5)
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)

    def _compute(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if self._member.startswith("SAGE"):
            return self._forward(q, k, v, is_causal=False, sm_scale=scale)[0]
        if self._member == "NPU":
            return self._forward(q, k, v, head_num=q.shape[2], input_layout="BSND", scale=scale)[0]
        # flashinfer takes one sequence at a time
        batches = zip(*(t.split(1) for t in (q, k, v)), strict=True) if self._member == "FLASHINFER" else [(q, k, v)]
        outs = [
            self._forward(
                *batch,
                dropout_p=0.0,
                softmax_scale=scale,
                causal=False,
                window_size=(-1, -1),
                softcap=0.0,
                alibi_slopes=None,
                return_softmax=False,
            )[0]
            for batch in batches
        ]
        return torch.cat(outs) if len(outs) > 1 else outs[0]
