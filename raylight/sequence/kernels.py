"""Local attention kernels by name; yunchang and xfuser are imported here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..config import ParallelConfig
from ..errors import ConfigError
from . import torch_kernels
from .torch_kernels import Part

logger = logging.getLogger(__name__)

Override = Callable[..., torch.Tensor]
"""ComfyUI's `optimized_attention_override`: (func, q, k, v, heads, mask=None, ...) -> [B, L, heads * D]."""

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, Any]]
"""(q, k, v, scale), each [B, H, L, D] -> (output [B, H, L, D], log-sum-exp [B, H, at least L] or None)."""

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

# what each kernel cannot run without, as yunchang.globals calls it
_YUNCHANG: Mapping[str, tuple[str, str]] = MappingProxyType(
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

# the same for xfuser's dense kernels that yunchang lacks, as its package checker calls it
_XFUSER: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "FLASH_4": ("has_flash_attn_4", "flash-attn 4 (flash_attn.cute)"),
        "FLASH_4_FP4": ("has_flash_attn_4_fp4", "flash-attn 4 with FP4 (flash_attn.cute)"),
        "FLASH_3_FP8": ("has_flash_attn_3", "flash-attn 3 (hopper)"),
        "NVTE_FP8": ("has_transformer_engine", "transformer-engine"),
        "AITER_BF16": ("has_aiter", "aiter"),
        "AITER_BF16FP8": ("has_aiter", "aiter"),
        "AITER_FP8": ("has_aiter", "aiter"),
        "AITER_I8FP8": ("has_aiter", "aiter"),
        "AITER_MXFP8": ("has_aiter", "aiter"),
        "AITER_F8F6": ("has_aiter", "aiter"),
        "AITER_MXFP6": ("has_aiter", "aiter"),
        "AITER_F6F4": ("has_aiter", "aiter"),
        "AITER_MXFP4": ("has_aiter", "aiter"),
        "AITER_F4F4": ("has_aiter", "aiter"),
        "AITER_FLYDSL": ("has_aiter", "aiter"),
        "AITER_FLYDSL_FP8": ("has_aiter", "aiter"),
    }
)

_XFUSER_LSE = ("FLASH_3_FP8",)
_FULL_PRECISION = ("TORCH", "TORCH_MATH", "TORCH_EFFICIENT")
_EXACT = (*_FULL_PRECISION, "TORCH_FLASH", "TORCH_CUDNN", "FA", "FA3", "FLASHINFER", "AITER", "NPU", "FLASH_4")

NAMES = ("TORCH", *MEMBERS, *ALIASES, *_XFUSER)
"""Every name `resolve` knows."""


class LocalKernel:
    """Attention over what one rank holds: ComfyUI's override signature, and a form that ring attention can merge.

    What the named kernel cannot take (a mask, most of them another dtype than fp16 and bf16, a call that asks
    for no low precision) goes to the function that the model called, or under ring attention to PyTorch's own.

    Attributes:
        name: as in `NAMES`.
    """

    def __init__(self, name: str, forward: Forward) -> None:
        self.name = name
        self._forward = forward
        self._told: set[str] = set()

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
        if not self._takes(q, mask, "ComfyUI's", exact=kwargs.get("low_precision_attention", True) is False):
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
        if not skip_reshape:
            # as ComfyUI's: where q is of tiles, keys and values become tiles of the same number
            rows = [t.flatten(2).unflatten(-1, (heads, -1)) for t in (q, k, v)]
            q, k, v = (t.reshape(q.shape[0], -1, *t.shape[2:]).transpose(1, 2) for t in rows)
        if k.shape[1] != heads and kwargs.get("enable_gqa"):
            k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
        out = self._forward(q, k, v, scale_of(q, kwargs))[0]
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def with_lse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float,
        exact: bool = False,
    ) -> Part:
        """Attention over some keys, and the log-sum-exp of the scores, for merging with other keys.

        Args:
            q, k, v: [B, H, Lq, D] and [B, H, Lk, D].
            mask: added to the scores; finite, in q's dtype, and of 4 dims that broadcast.
            scale: factor of the scores.
            exact: the caller asks for no low precision.

        Returns:
            The output [B, H, Lq, D] and the log-sum-exp [B, H, Lq], fp32 or wider.
        """
        if not self._takes(q, mask, "PyTorch's", exact=exact):
            return torch_kernels.with_lse(q, k, v, mask=mask, scale=scale)
        out, lse = self._forward(q, k, v, scale)
        return out, lse[..., : q.shape[2]].to(torch.promote_types(lse.dtype, torch.float32))

    def _takes(self, q: torch.Tensor, mask: torch.Tensor | None, other: str, *, exact: bool) -> bool:
        reason = ""
        if mask is not None:
            reason = "an attention mask"
        elif q.dtype not in (torch.float16, torch.bfloat16) and self.name not in _FULL_PRECISION:
            reason = f"{q.dtype} tensors"
        elif exact and self.name not in _EXACT:
            reason = "calls that ask for full precision"
        if reason and self.name != "TORCH" and reason not in self._told:
            self._told.add(reason)
            logger.info("%s does not take %s; %s attention computes these calls", self.name, reason, other)
        return not reason


def scale_of(q: torch.Tensor, kwargs: Mapping[str, Any]) -> float:
    """The factor of the scores that a call asks for, or the usual one."""
    scale = kwargs.get("scale")
    return q.shape[-1] ** -0.5 if scale is None else scale


def chosen(parallel: ParallelConfig, *, device: torch.device | None = None) -> LocalKernel | None:
    """What `resolve` gives for the kernel and the ring of a pool."""
    return resolve(parallel.attention, ring=parallel.degrees["ring"] > 1, device=device)


def resolve(name: str, *, ring: bool = False, device: torch.device | None = None) -> LocalKernel | None:
    """The kernel called `name`, or None for "TORCH" without a ring, which is ComfyUI's own.

    Runs it once on a few numbers, so that what cannot run is found here.

    Args:
        ring: its partial results will be merged, so it must give their log-sum-exp.
        device: where it will run; None means the current accelerator, or the CPU where there is none.

    Raises:
        ConfigError: the name is unknown, its package is not installed, this machine cannot run it, or `ring`
            and it gives no log-sum-exp.
    """
    member = ALIASES.get(name, name)
    if member == "TORCH":
        return LocalKernel("TORCH", _torch("TORCH")) if ring else None
    if member not in NAMES:
        raise ConfigError(
            f"There is no attention kernel {name}", "", f"Set XFuser_attention to one of {', '.join(NAMES)}"
        )
    if member == "SPARSE_SAGE":
        raise ConfigError(
            f"The attention kernel {name} cannot run",
            "it needs a tuned sparsity pattern",
            "Set XFuser_attention to TORCH",
        )
    if ring and member in _XFUSER and member not in _XFUSER_LSE:
        raise ConfigError(
            f"The attention kernel {name} cannot be used with ring attention",
            "it gives no log-sum-exp, so its partial results cannot be merged",
            "Set XFuser_attention to TORCH, or ring_degree to 1 and ulysses_degree higher",
        )
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    if member != "TORCH_MATH" and (device is None or device.type == "cpu"):
        raise ConfigError(
            f"The attention kernel {name} cannot run here", "it needs an accelerator", "Set XFuser_attention to TORCH"
        )
    if member in _YUNCHANG:
        forward = _yunchang(name, member)
    elif member in _XFUSER:
        forward = _xfuser(name, member)
    else:
        forward = _torch(member)
    kernel = LocalKernel(member, forward)
    _try(name, forward, device=device, ring=ring)
    return kernel


def _torch(member: str) -> Forward:
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Part:
        return torch_kernels.with_lse(q, k, v, scale=scale, member=member)

    return forward


def _yunchang(name: str, member: str) -> Forward:
    """A yunchang forward; its tensors are [B, L, H, D]."""
    try:
        from yunchang import globals as installed
        from yunchang.kernels import AttnType, select_flash_attn_impl
    except ImportError as error:
        raise _missing(name, "yunchang", str(error)) from error
    flag, package = _YUNCHANG[member]
    if not getattr(installed, flag, False):
        raise _missing(name, package)
    if member not in AttnType.__members__:
        raise _missing(name, "a newer yunchang", "the installed yunchang does not know it")
    compute = select_flash_attn_impl(AttnType[member], stage="fwd-only")

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, Any]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if member.startswith("SAGE"):
            out, lse = compute(q, k, v, is_causal=False, sm_scale=scale)
        elif member == "NPU":
            out, top, total, *_ = compute(q, k, v, head_num=q.shape[2], input_layout="BSND", scale=scale)
            # [B, H, L, 8], eight times the same
            lse = (top + total.log())[..., 0]
        else:
            options = {"dropout_p": 0.0, "softmax_scale": scale, "causal": False, "window_size": (-1, -1)}
            options |= {"softcap": 0.0, "alibi_slopes": None, "return_softmax": False}
            # flashinfer takes one sequence at a time
            single = member == "FLASHINFER" and q.shape[0] > 1
            rows = zip(*(t.split(1) for t in (q, k, v)), strict=True) if single else [(q, k, v)]
            outs, lses = zip(*(compute(*row, **options) for row in rows), strict=True)
            out, lse = (torch.cat(outs), torch.cat(lses)) if single else (outs[0], lses[0])
        return out.transpose(1, 2), lse

    return forward


def _xfuser(name: str, member: str) -> Forward:
    """A function of xfuser's registry; it takes no scale, so the queries are scaled."""
    group_norm = torch.nn.GroupNorm
    try:
        from xfuser.core.distributed.attention_backend import (
            ATTENTION_FUNCTION_REGISTRY,
            AttentionBackendType,
            env_info,
        )
    except ImportError as error:
        raise _missing(name, "xfuser", str(error)) from error
    finally:
        # on ROCm the import puts another class in its place
        torch.nn.GroupNorm = group_norm  # type: ignore[misc]
    flag, package = _XFUSER[member]
    if not env_info.get(flag):
        raise _missing(name, package)
    compute = ATTENTION_FUNCTION_REGISTRY.get(AttentionBackendType.__members__.get(member))
    if compute is None:
        raise _missing(name, "a newer xfuser", "the installed xfuser does not know it")

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, Any]:
        usual = q.shape[-1] ** -0.5
        if scale != usual:
            q = q * (scale / usual)
        out, lse = compute(q, k, v, 0.0, False)
        return out.to(v.dtype), lse

    return forward


def _missing(name: str, package: str, why: str = "") -> ConfigError:
    return ConfigError(
        f"The attention kernel {name} is not installed",
        why or f"{package} cannot be imported",
        f"Set XFuser_attention to TORCH or install {package}",
    )


def _try(name: str, forward: Forward, *, device: torch.device | None, ring: bool) -> None:
    """Run a kernel on numbers of its own, without touching any random state.

    Low-precision kernels are off by some percent; what this finds is one that cannot run, and a log-sum-exp
    that is zero, in another base or in another order.
    """
    shape = (1, 2, 128, 64)
    q, k, v = (torch.linspace(-step, step, 2 * 128 * 64).sin().view(shape) for step in (500, 700, 900))
    scale = 64**-0.5
    _, want = torch_kernels.explicit(q, k, v, mask=None, scale=scale)
    try:
        q, k, v = (t.to(device, torch.bfloat16) for t in (q, k, v))
        out, lse = forward(q, k, v, scale)
        result = out.float().cpu()
    except Exception as error:
        raise ConfigError(
            f"The attention kernel {name} cannot run here",
            f"{type(error).__name__}: {error}",
            "Set XFuser_attention to TORCH",
        ) from error
    problem = ""
    if result.shape != shape or not result.isfinite().all():
        problem = "its output is not a number for every query"
    elif ring and (lse is None or lse.ndim != 3 or lse.shape[:2] != shape[:2] or lse.shape[2] < shape[2]):
        problem = "it gives no log-sum-exp, so its partial results cannot be merged"
    elif ring and not (lse[..., :128].float().cpu() - want).abs().max() < 0.25:
        problem = "its log-sum-exp is wrong, so its partial results cannot be merged"
    if problem:
        raise ConfigError(
            f"The attention kernel {name} cannot be used here",
            problem,
            "Set XFuser_attention to TORCH" + (", or ring_degree to 1 and ulysses_degree higher" if ring else ""),
        )
