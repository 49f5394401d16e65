"""Which family a model belongs to."""

from __future__ import annotations

from torch import nn

from diffuse_compress.errors import ConfigError
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
from diffuse_compress.quantization.residual import ResidualStream

__all__ = ["FAMILIES", "family_of", "residual_stream_of"]

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


def residual_stream_of(model: nn.Module) -> ResidualStream:
    """The residual stream of a model whose family knows it. Raises ConfigError with the reason for any other."""
    family = family_of(model)
    if family is None or family.residual is None:
        known = ", ".join(family.name for family in FAMILIES if family.residual is not None)
        raise ConfigError(
            f"{type(model).__name__}: the residual stream cannot be rotated in the weights: this class is not known to "
            f"have norms that allow it ({known} are). QuaRotConfig() without residual=True rotates any linear's input."
        )
    return family.residual(model)
