"""ComfyUI node classes: inputs, tooltips and checks. The work is done in `workers`."""

import sys

from . import routes
from .control import RayControlNetLoader
from .data_parallel import (
    DPConditioningList,
    DPKSamplerAdvanced,
    DPNoiseList,
    DPSamplerCustom,
    UnifiedParallelSampler,
)
from .encoders import RayCLIPLoader
from .initializer import RayInitializer, RayInitializerAdvanced
from .loaders import RayGGUFLoader, RayUNETLoader
from .loras import RayLoraLoader, RayLoraLoaderModelOnly
from .memory import RayKill, RayOffloadModel
from .mirrors import display_names, node_classes
from .model import RayModel
from .report import RayReport
from .samplers import XFuserKSamplerAdvanced
from .settings import RayLTXFFNChunker, RayTorchCompileModel
from .teacache import RayTeaCache
from .vae import RayVAEDecodeDistributed, RayVAEEncodeDistributed

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

routes.publish(sys.modules.get("server"))

NODE_CLASS_MAPPINGS = {
    "DPConditioningList": DPConditioningList,
    "DPKSamplerAdvanced": DPKSamplerAdvanced,
    "DPNoiseList": DPNoiseList,
    "DPSamplerCustom": DPSamplerCustom,
    "RayCLIPLoader": RayCLIPLoader,
    "RayControlNetLoader": RayControlNetLoader,
    "RayGGUFLoader": RayGGUFLoader,
    "RayInitializer": RayInitializer,
    "RayInitializerAdvanced": RayInitializerAdvanced,
    "RayKill": RayKill,
    "RayLTXFFNChunker": RayLTXFFNChunker,
    "RayLoraLoader": RayLoraLoader,
    "RayLoraLoaderModelOnly": RayLoraLoaderModelOnly,
    "RayModel": RayModel,
    "RayOffloadModel": RayOffloadModel,
    "RayReport": RayReport,
    "RayTeaCache": RayTeaCache,
    "RayTorchCompileModel": RayTorchCompileModel,
    "RayUNETLoader": RayUNETLoader,
    "RayVAEDecodeDistributed": RayVAEDecodeDistributed,
    "RayVAEEncodeDistributed": RayVAEEncodeDistributed,
    "UnifiedParallelSampler": UnifiedParallelSampler,
    "XFuserKSamplerAdvanced": XFuserKSamplerAdvanced,
    **node_classes(),
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "DPConditioningList": "Data Parallel Conditioning List",
    "DPKSamplerAdvanced": "Data Parallel KSampler (Advanced)",
    "DPNoiseList": "Data Parallel Noise List",
    "DPSamplerCustom": "Data Parallel SamplerCustom",
    "RayCLIPLoader": "Load CLIP (Ray)",
    "RayControlNetLoader": "Load ControlNet (Ray)",
    "RayGGUFLoader": "Load Diffusion GGUF Model (Ray)",
    "RayInitializer": "Ray Init Actor",
    "RayInitializerAdvanced": "Ray Init Actor (Advanced)",
    "RayKill": "Kill Ray Workers",
    "RayLTXFFNChunker": "Ray LTX FFN Chunker (VRAM Saver)",
    "RayLoraLoader": "Ray LoRA Loader (chain)",
    "RayLoraLoaderModelOnly": "Ray LoRA Loader",
    "RayModel": "Load Model (all GPUs)",
    "RayOffloadModel": "Offload Model (Ray)",
    "RayReport": "Ray Report",
    "RayTeaCache": "TeaCache (Ray)",
    "RayTorchCompileModel": "Torch Compile Model (Ray)",
    "RayUNETLoader": "Load Diffusion Model (Ray)",
    "RayVAEDecodeDistributed": "Distributed VAE (Ray)",
    "RayVAEEncodeDistributed": "Distributed VAE Encode (Ray)",
    "UnifiedParallelSampler": "Unified Parallel Sampler (Advanced)",
    "XFuserKSamplerAdvanced": "XFuser KSampler (Advanced)",
    **display_names(),
}
