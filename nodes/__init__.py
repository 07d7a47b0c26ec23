"""ComfyUI node classes: inputs, tooltips and checks. The work is done in `workers`."""

from .initializer import RayInitializer, RayInitializerAdvanced
from .loaders import RayUNETLoader
from .ltx import RayLTXFFNChunker
from .samplers import XFuserKSamplerAdvanced
from .vae import RayVAEDecodeDistributed, RayVAEEncodeDistributed

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODE_CLASS_MAPPINGS = {
    "RayInitializer": RayInitializer,
    "RayInitializerAdvanced": RayInitializerAdvanced,
    "RayLTXFFNChunker": RayLTXFFNChunker,
    "RayUNETLoader": RayUNETLoader,
    "RayVAEDecodeDistributed": RayVAEDecodeDistributed,
    "RayVAEEncodeDistributed": RayVAEEncodeDistributed,
    "XFuserKSamplerAdvanced": XFuserKSamplerAdvanced,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "RayInitializer": "Ray Init Actor",
    "RayInitializerAdvanced": "Ray Init Actor (Advanced)",
    "RayLTXFFNChunker": "Ray LTX FFN Chunker (VRAM Saver)",
    "RayUNETLoader": "Load Diffusion Model (Ray)",
    "RayVAEDecodeDistributed": "Distributed VAE (Ray)",
    "RayVAEEncodeDistributed": "Distributed VAE Encode (Ray)",
    "XFuserKSamplerAdvanced": "XFuser KSampler (Advanced)",
}
