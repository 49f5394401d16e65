"""Which family a model belongs to."""

from __future__ import annotations

from torch import nn

from diffuse_compress.families.base import Family
from diffuse_compress.families.cogvideox import COGVIDEOX
from diffuse_compress.families.decoder import DECODERS
from diffuse_compress.families.dit import DIT
from diffuse_compress.families.flux import FLUX
from diffuse_compress.families.hunyuan_video import HUNYUAN_VIDEO
from diffuse_compress.families.pixart import PIXART
from diffuse_compress.families.qwenimage import QWENIMAGE
from diffuse_compress.families.sd3 import SD3
from diffuse_compress.families.unet import UNET_2D, UNET_2D_CONDITION
from diffuse_compress.families.wan import WAN

__all__ = ["FAMILIES", "family_of"]

FAMILIES: tuple[Family, ...] = (
    UNET_2D,
    UNET_2D_CONDITION,
    DIT,
    PIXART,
    SD3,
    FLUX,
    WAN,
    COGVIDEOX,
    HUNYUAN_VIDEO,
    QWENIMAGE,
    *DECODERS,
)


def family_of(model: nn.Module) -> Family | None:
    """Family of a model by its class or a base class; None for a class that no file describes (``generic.py``)."""
    for cls in type(model).__mro__:
        for family in FAMILIES:
            if cls.__name__ in family.classes:
                return family
    return None
