"""A VAE on this rank's strip of rows: ComfyUI's own decode and encode loops around its own model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy import model_management

from ....raylight.comm import Comm
from ....raylight.mesh import Mesh
from ....raylight.rows.strips import ROWS, Rows, Strips
from ....raylight.watch import Watch, quiet
from ....vae import budget
from ....vae.divided import strip_of
from ....vae.frames import counting
from ...wire.vae_messages import Block, DecodeRequest, EncodeRequest, PartReply, VAEPlan
from ..conversation import Line
from .loading import attend

COLOURS = 3
"""A VAE that makes fewer channels makes sound."""
PIXEL_ROWS = -3
"""The dim of rows in [batch, (frames,) rows, width, channels]."""


def output_dtype(vae: Any) -> torch.dtype:
    """Type of ComfyUI's pixels and latents: older versions know fp32 only."""
    return vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32


def undividable(vae: Any) -> str:
    """Why no strips of this VAE's pictures can be right, whatever a small test of it shows; "" for nothing."""
    if vae.output_channels < COLOURS or vae.latent_dim == 1 or getattr(vae, "extra_1d_channel", None) is not None:
        return "it has no rows"
    if getattr(vae, "handles_tiling", False):
        return "it cuts large pictures into tiles of its own, which strips would move"
    return ""


def latent_shape(vae: Any, plan: VAEPlan) -> tuple[int, ...]:
    """Shape of the latent, as the model takes or makes it: [batch, channels, (frames,) rows, width].

    Channels are not meant to be read where the plan is to encode.
    """
    shape = plan.shape
    if not plan.encode:
        return (*shape[:2], *shape[-2:]) if vae.latent_dim == 2 and len(shape) == 5 else shape
    # a picture on the meta device goes ComfyUI's own way to the model
    pixels = model_input(vae, torch.empty(shape, device="meta"))
    each = vae.spacial_compression_encode()
    frames = [_frames(vae.downscale_ratio, pixels.shape[2])] if pixels.ndim == 5 else []
    return (pixels.shape[0], vae.latent_channels, *frames, pixels.shape[-2] // each, pixels.shape[-1] // each)


def model_input(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What `vae.encode` does to pictures before its model sees them.

    Args:
        pixels: [frames, rows, width, channels], or with a batch in front.
    """
    # older versions leave it to the node to drop an alpha channel
    pixels = vae.vae_encode_crop_pixels(pixels)[..., : vae.output_channels].movedim(-1, 1)
    if vae.latent_dim == 3 and pixels.ndim < 5:
        return pixels.unsqueeze(2) if vae.not_video else pixels.movedim(1, 0).unsqueeze(0)
    return pixels


def sample(vae: Any, plan: VAEPlan, shape: tuple[int, ...], *, rows: int, columns: int, frames: int) -> torch.Tensor:
    """A small random input of the kind that is planned, the same on every rank.

    Args:
        shape: of the latent.
        rows: of the latent, as `columns` and `frames`.
    """
    generator = torch.Generator().manual_seed(1)
    times: tuple[int, ...] = (min(shape[2], frames),) if len(shape) == 5 else ()
    if not plan.encode:
        size = (min(shape[0], 2), shape[1], *times, rows, columns)
        return torch.randn(size, generator=generator).to(device=vae.device, dtype=vae.vae_dtype)
    each = vae.spacial_compression_encode()
    times = tuple(_frames(vae.upscale_ratio, count) for count in times)
    size = (1, vae.output_channels, *times, rows * each, columns * each)
    return vae.process_input(torch.rand(size, generator=generator)).to(device=vae.device, dtype=vae.vae_dtype)


def result_shape(
    vae: Any, plan: VAEPlan, shape: tuple[int, ...], given: tuple[int, ...], made: tuple[int, ...]
) -> tuple[int, ...]:
    """Shape of the result, from what a small input became.

    Returns:
        [batch, (frames,) rows, width, channels] of pixels, or the latent's own shape.
    """
    if plan.encode:
        return (shape[0], made[1], *shape[2:])
    if len(made) != len(shape):
        return ()
    times: list[int] = []
    if len(shape) == 5:
        count = _frames(vae.upscale_ratio, given[2])
        # a VAE whose frames do not follow ComfyUI's own formula keeps their number, or is not understood
        if made[2] not in (count, given[2]):
            return ()
        times = [_frames(vae.upscale_ratio, shape[2]) if made[2] == count else shape[2]]
    sizes = [size * new // old for size, new, old in zip(shape[-2:], made[-2:], given[-2:], strict=True)]
    return (shape[0], *times, *sizes, made[1])


def fitting(vae: Any, plan: VAEPlan, shape: tuple[int, ...], ranks: int, world: int) -> int:
    """Of how many pictures, or videos, one strip each fits on the device at once, by ComfyUI's own estimate."""
    tallest = -(-shape[-2] // ranks)
    if plan.encode:
        tallest *= vae.spacial_compression_encode()
        size = model_input(vae, torch.empty(plan.shape, device="meta")).shape
        needed = vae.memory_used_encode((*size[:-2], tallest, size[-1]), vae.vae_dtype)
    else:
        needed = vae.memory_used_decode((*shape[:-2], tallest, shape[-1]), vae.vae_dtype)
    model_management.load_models_gpu([vae.patcher], memory_required=needed)
    ask = getattr(vae.patcher, "get_free_memory", model_management.get_free_memory)
    free = ask(vae.device)
    if model_management.is_device_cpu(vae.device):
        free /= world  # the ranks of a host share its memory
    return int(free / max(1, needed))


def decode(vae: Any, request: DecodeRequest, mesh: Mesh, line: Line, last: torch.nn.Module | None) -> PartReply:
    """Decode the own rows of a latent into the shared output, or into the reply.

    Args:
        last: the module whose runs finish frames; None to count whole decodes only.

    Raises:
        Cancelled: the driver wanted it to end.
    """
    model, latent, comm = vae.first_stage_model, request.latent.open(), mesh.first(request.ranks)
    assert comm is not None
    if vae.latent_dim == 2 and latent.ndim == 5:
        latent = latent[:, :, 0]
    strips = Strips.of(latent.shape[ROWS], ranks=comm.size, rank=comm.rank)
    rows = Rows(comm, strips)
    strip = strips.own(latent)
    assert request.output is not None
    shape = request.output.shape
    pixels: torch.Tensor | None = None
    if request.output.arena is not None:
        pixels = strips.own(request.output.open(), dim=len(shape) + PIXEL_ROWS)
    else:
        mine = shape[PIXEL_ROWS] // strips.total * strips.height
        pixels = torch.empty((*shape[:PIXEL_ROWS], mine, *shape[-2:]), dtype=request.output.dtype)
    target = pixels.movedim(-1, 1)
    needed = vae.memory_used_decode(strip.shape, vae.vae_dtype)
    model_management.load_models_gpu([vae.patcher], memory_required=needed)
    watch = watching(mesh.control_of(comm), line, shape[0] * (shape[1] if len(shape) == 5 else 1))
    for first in range(0, latent.shape[0], request.batch):
        given = strip[first : first + request.batch].to(device=vae.device, dtype=vae.vae_dtype).contiguous()
        to = target[first : first + request.batch]
        with budget.agreed(model, strips, request.budget or 1), counting(last, watch):
            if getattr(model, "comfy_has_chunked_io", False):
                _divided(model, rows, model.decode, given, output_buffer=to)
                finish(vae, to, to)
            else:
                made = _divided(model, rows, model.decode, given)
                assert made.shape == to.shape, (tuple(made.shape), tuple(to.shape))
                finish(vae, made, to)
                del made
        if last is None:
            watch.step(to[:, 0, ..., 0, 0].numel())
    watch.finish()
    each = shape[PIXEL_ROWS] // strips.total
    span = (strips.start * each, (strips.start + strips.height) * each)
    return PartReply(rows=span, part=None if request.output.arena is not None else inline(pixels))


def finish(vae: Any, made: torch.Tensor, to: torch.Tensor) -> None:
    """Put the model's pixels where they belong, in ComfyUI's range, a frame at a time: no second copy of a strip.

    Args:
        made: [batch, channels, (frames,) rows, width], perhaps `to` itself; overwritten.
    """
    if made.ndim == 5:
        for source, target in zip(made.unbind(2), to.unbind(2), strict=True):
            finish(vae, source, target)
        return
    done = vae.process_output(made.to(device=to.device, dtype=to.dtype))
    if done.data_ptr() != to.data_ptr():
        to.copy_(done)


def encode(vae: Any, request: EncodeRequest, mesh: Mesh, line: Line) -> PartReply:
    """Encode the own rows of pictures; their latent's rows go into the reply."""
    model, comm = vae.first_stage_model, mesh.first(request.ranks)
    assert comm is not None
    pixels = model_input(vae, request.pixels.open())
    each = vae.spacial_compression_encode()
    strips = Strips.of(pixels.shape[ROWS] // each, ranks=comm.size, rank=comm.rank)
    rows, strip = Rows(comm, strips), strips.own(pixels)
    model_management.load_models_gpu([vae.patcher], memory_required=vae.memory_used_encode(strip.shape, vae.vae_dtype))
    watch = watching(mesh.control_of(comm), line, pixels.shape[0])
    parts = []
    for first in range(0, pixels.shape[0], request.batch):
        given = vae.process_input(strip[first : first + request.batch]).to(vae.vae_dtype)
        chunked = getattr(model, "comfy_has_chunked_io", False)
        where: dict[str, Any] = {"device": vae.device} if chunked else {}
        given = given.contiguous() if chunked else given.to(vae.device).contiguous()
        with budget.agreed(model, strips, request.budget or 1):
            made = _divided(model, rows, model.encode, given, **where)
        parts.append(made.to(device="cpu", dtype=output_dtype(vae)))
        watch.step(len(given))
    watch.finish()
    return PartReply(rows=(strips.start, strips.start + strips.height), part=inline(torch.cat(parts)))


def inline(tensor: torch.Tensor) -> Block:
    """A tensor as bytes of a message."""
    tensor = tensor.contiguous()
    content = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    return Block(shape=tuple(tensor.shape), dtype=tensor.dtype, arena=None, inline=content)


def _divided(
    model: torch.nn.Module, rows: Rows, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Call a method of the model on a strip; alone, as it is."""
    if rows.comm.size == 1:
        return function(*args, **kwargs)
    with strip_of(model, rows, attend):
        return function(*args, **kwargs)


def watching(control: Comm, line: Line, total: int) -> Watch:
    """Counts what is finished of `total`, tells the driver, and hears from it. Only the first rank tells."""
    return Watch(control, total=total, report=quiet if control.rank else line.report, wanted=line.cancelled)


def _frames(ratio: Any, count: int) -> int:
    """Frames that become of `count`, by a VAE's upscale_ratio or downscale_ratio."""
    if not isinstance(ratio, (tuple, list)):
        return count
    return int(ratio[0](count)) if callable(ratio[0]) else int(ratio[0] * count)
