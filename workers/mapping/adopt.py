"""Builds a ComfyUI model whose parameters are views of a mapped file: adopted, not loaded."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import comfy.sd
import comfy.utils
import torch
from comfy import model_management
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...loaders.source import Source
from ...raylight import cfg
from ...raylight.config import ModelSpec
from ...raylight.errors import LoadError
from . import gguf_ops, meta_model
from .loading import load_options

QUANTISED_KEYS = (".comfy_quant", ".scale_weight", ".weight_scale")
"""Endings of the keys by which ComfyUI knows a quantised file (comfy/utils.py, convert_old_quants)."""
READS_DTYPES = re.compile(r"\.weight\.dtype|parameters\(\)\)\.dtype")
"""In the code of a module that casts what it computes to the dtype of one of its layers."""
NARROW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


class _Writing(TorchDispatchMode):
    """Tells a source what is written into its memory, in this thread and scope only."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # operations of higher order have none
        if schema is not None and schema.is_mutable:
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            written = [item for item in schema.arguments if item.alias_info is not None and item.alias_info.is_write]
            for tensor in cfg.tensors([given.get(item.name) for item in written]):
                if type(tensor) in (torch.Tensor, nn.Parameter):
                    self._source.writing(tensor)
        return func(*args, **kwargs)


class Adopting(torch.overrides.TorchFunctionMode):
    """Turns `parameter.copy_(tensor of the source)` into taking the tensor over, in this thread and scope only.

    Conversions of keys may write into tensors of the source: those are taken over as well, as they are then.

    Args:
        convert: take tensors of another dtype over as well: they are converted when they are used. What
            `module.to(dtype)` says of parameters that were taken over is remembered, and not done.
    """

    def __init__(self, source: Source, *, convert: bool) -> None:
        super().__init__()
        self._source = source
        self._convert = convert
        self._writing = _Writing(source)
        # with the parameters themselves, so that an id is never another one's
        self._declared: dict[int, tuple[nn.Parameter, torch.dtype]] = {}

    def __enter__(self) -> Adopting:
        self._writing.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._writing.__exit__(*raised)

    def dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        """What the model means a parameter to be, whatever it was taken over as."""
        return self._declared.get(id(parameter), (parameter, parameter.dtype))[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and not kwargs and len(args) == 2 and self._fits(*args):
            parameter, value = args
            self._declared[id(parameter)] = (parameter, parameter.dtype)
            parameter.data = value
            return parameter
        if func is torch.Tensor.to and self._convert and id(args[0]) in self._declared:
            # as Module.to calls it: device, dtype or None, whether to block
            dtypes = [value for value in args[1:] if isinstance(value, torch.dtype)]
            if len(dtypes) == 1 and args[0].is_floating_point():
                self._declared[id(args[0])] = (args[0], dtypes[0])
                return args[0]
        return func(*args, **(kwargs or {}))

    def _fits(self, target: Any, value: Any) -> bool:
        return (
            isinstance(target, nn.Parameter)
            and type(value) is torch.Tensor
            and target.shape == value.shape
            and target.device == value.device
            and (target.dtype == value.dtype or (self._convert and value.is_floating_point()))
            and self._source.holds(value)
        )


@dataclass(frozen=True)
class Home:
    """Where a parameter lives on the host: memory of the file, or what ComfyUI had to make of it.

    `dtype` is what plain ComfyUI would hold, on the device and as the base of patches; None for quantised
    tensors, whose layout is ComfyUI's business.
    """

    module: nn.Module
    name: str
    tensor: torch.Tensor
    dtype: torch.dtype | None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now, wherever it is."""
        found = self.module._parameters[self.name]
        assert found is not None
        return found

    @property
    def at_home(self) -> bool:
        """Whether the parameter is that memory now. Scales do not count: ComfyUI copies them at every step."""
        return address(self.parameter) == address(self.tensor)

    def put(self, tensor: torch.Tensor) -> None:
        """Replace the parameter."""
        self.module._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)


@dataclass(frozen=True)
class Adopted:
    """A model whose parameters are a file's memory.

    Attributes:
        patcher: ComfyUI's.
        homes: where every parameter lives, by its key in the BaseModel.
    """

    patcher: Any
    homes: dict[str, Home]


def adopt(source: Source, spec: ModelSpec, dtype: torch.dtype) -> Adopted:
    """Build the model of a file without copying its plain weights.

    ComfyUI detects, converts and builds it through its public loader. Call it outside of inference mode: a
    parameter that mixes normal and inference tensors cannot be used.

    Args:
        dtype: what plain ComfyUI keeps the weights in, as the driver found it: ranks must not disagree.

    Raises:
        LoadError: ComfyUI does not know the model, or would load it wrongly.
    """
    arguments, keywords = load_options(spec)
    arguments["dtype"] = dtype
    convert = False
    if source.header.format == "gguf":
        state: dict[str, torch.Tensor] = gguf_ops.state_dict(source, dtype)
        arguments["custom_operations"] = gguf_ops.operations(spec)
        convert = not on_cpu() or dtype == torch.float32
    else:
        state = dict(source.tensors)
        _check_quantisation(source)
        if not _is_quantised(source):
            arguments["dtype"], convert = _kept_dtype(state, dtype)
    metadata = dict(source.header.metadata) or None
    mode = Adopting(source, convert=convert)
    with mode:
        patcher = comfy.sd.load_diffusion_model_state_dict(state, arguments, metadata=metadata, **keywords)
    if patcher is None:
        raise LoadError(
            f"ComfyUI does not recognise a diffusion model in {spec.path}", "", "Choose a diffusion model file"
        )
    kept = arguments["dtype"]

    def wanted(parameter: nn.Parameter) -> torch.dtype:
        # on a CPU what the model was built in is the file's dtype, and plain ComfyUI's is `dtype`
        found = mode.dtype_of(parameter)
        return dtype if found == kept and convert else found

    quantised = source.header.format == "gguf"
    looked_at = _looked_at(patcher.model) if quantised or on_cpu() else []
    if quantised:
        for layer in looked_at:
            gguf_ops.expand(layer, dtype)
    if on_cpu():
        bare = [module for module in patcher.model.modules() if not is_layer(module)]
        _convert(bare + looked_at, wanted)
        if kept != dtype:
            _take_precision(patcher.model, spec, kept)
    return Adopted(patcher, homes_of(patcher.model, wanted))


def _convert(modules: Iterable[nn.Module], wanted: Callable[[nn.Parameter], torch.dtype]) -> None:
    """Convert the parameters of modules that use them as they are, or whose dtype others look at.

    Away from the CPU all are converted on the way to the device.
    """
    for parameter in (parameter for module in modules for parameter in module.parameters(recurse=False)):
        if type(parameter.data) is torch.Tensor and parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted(parameter))


def is_layer(module: nn.Module) -> bool:
    """Whether it is one of ComfyUI's, which cast their weights to what they compute."""
    return hasattr(module, "comfy_cast_weights")


def _looked_at(model: nn.Module) -> list[nn.Module]:
    """Layers whose dtype the code of their module looks at, to cast what it computes to that."""
    readers = {kind for kind in {type(module) for module in model.modules()} if _reads_dtypes(kind)}
    reading = [module for module in model.modules() if type(module) in readers and not is_layer(module)]
    children = [child for module in reading for child in module.children()]
    parts = [child for child in children if is_layer(child) or isinstance(child, nn.Sequential)]
    return [layer for part in parts for layer in part.modules() if is_layer(layer)]


def _reads_dtypes(kind: type) -> bool:
    """Whether the code of a class looks at the dtype of a layer."""
    try:
        return READS_DTYPES.search(inspect.getsource(kind)) is not None
    except (OSError, TypeError):  # made at run time
        return False


def _take_precision(model: nn.Module, spec: ModelSpec, kept: torch.dtype) -> None:
    """Replace what a model derived from the file's dtype while it was built: rotary tables, dtypes to compute in.

    Args:
        kept: that dtype, which plain ComfyUI does not build the model in.
    """
    tables, dtypes = [], []
    for prefix, module in model.named_modules():
        tables += [
            (module, prefix, name)
            for name in module._non_persistent_buffers_set
            if (buffer := module._buffers.get(name)) is not None and buffer.dtype == kept
        ]
        if not is_layer(module):  # of a layer it is its weight's dtype
            dtypes += [(module, prefix, name) for name, value in vars(module).items() if value is kept]
    if not tables and not dtypes:
        return
    exact = meta_model.build(spec)[0]
    for module, prefix, name in tables:
        table = exact.get_submodule(prefix)._buffers[name]
        if not table.is_meta:  # what is there is no computed value
            module._buffers[name] = table
    for module, prefix, name in dtypes:
        setattr(module, name, getattr(exact.get_submodule(prefix), name))


def homes_of(model: nn.Module, wanted: Callable[[nn.Parameter], torch.dtype]) -> dict[str, Home]:
    """Where every parameter of a model is now, by its key.

    Args:
        wanted: what plain ComfyUI would hold a parameter in.
    """
    found: dict[str, Home] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            tensor = parameter.detach()
            scaled = getattr(module, "scale_weight", None) is not None
            plain = type(tensor) is torch.Tensor and not scaled and tensor.is_floating_point()
            key = f"{prefix}.{name}" if prefix else name
            found[key] = Home(module, name, tensor, wanted(parameter) if plain else None)
    return found


def address(tensor: torch.Tensor) -> int:
    """Where a parameter's data is."""
    return parts(tensor)[0].data_ptr()


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors a parameter consists of: ComfyUI's quantised ones hold data and scales inside."""
    return list(_parts(tensor.data if isinstance(tensor, nn.Parameter) else tensor))


def _parts(tensor: Any) -> Iterator[torch.Tensor]:
    inner = getattr(tensor, "_qdata", None)
    if inner is None:
        yield tensor
        return
    yield inner
    params = getattr(tensor, "_params", None) or getattr(tensor, "_layout_params", {})
    values = params.values() if isinstance(params, dict) else vars(params).values()
    yield from (value for value in values if isinstance(value, torch.Tensor))


def _is_quantised(source: Source) -> bool:
    """Whether ComfyUI will take a file for one of its own quantised layouts."""
    if "_quantization_metadata" in source.header.metadata:
        return True
    return any(key.endswith((*QUANTISED_KEYS, "scaled_fp8")) for key in source.tensors)


def _check_quantisation(source: Source) -> None:
    """Refuse a layout that this ComfyUI would load without its scales.

    Raises:
        LoadError: the file needs a newer ComfyUI.
    """
    if hasattr(comfy.utils, "convert_old_quants") or not any(key.endswith(".comfy_quant") for key in source.tensors):
        return
    raise LoadError(
        f"{source.path} is quantised in a way that this version of ComfyUI does not know",
        "it would be loaded without its scales and give a wrong picture",
        "Update ComfyUI, or choose an fp8 scaled or unquantised file",
    )


def _kept_dtype(state: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.dtype, bool]:
    """The dtype to build the model in, and whether tensors of other dtypes are taken over as they are.

    Away from the CPU they are converted on the way to the device. On the CPU the weights that compute are
    those on the host: they stay as they are in the file where ComfyUI computes in float32, which holds
    every value of the narrower types, and casts layer by layer; else ComfyUI converts them.
    """
    if not on_cpu():
        return dtype, True
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    stored = comfy.utils.weight_dtype(state, prefix) or comfy.utils.weight_dtype(state)
    if dtype == torch.float32 and stored in NARROW:
        return stored, True
    return dtype, False


def on_cpu() -> bool:
    """Whether models are used where they are mapped."""
    return bool(model_management.is_device_cpu(model_management.get_torch_device()))


def private_bytes(homes: Mapping[str, Home], source: Source) -> int:
    """Bytes of parameters that ComfyUI had to make anew, out of the file's memory."""
    tensors = (part for home in homes.values() for part in parts(home.tensor))
    return sum(tensor.nbytes for tensor in tensors if source.offset(tensor) is None)
