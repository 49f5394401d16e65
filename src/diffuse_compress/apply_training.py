"""What a trained model carries once it is converted, so that both libraries save and load it as a compressed one."""

from __future__ import annotations

from torch import nn

from diffuse_compress.components import compute_dtype_of, unwrap
from diffuse_compress.integrations.component import ComponentState, layer_entries
from diffuse_compress.integrations.doors import marks_of
from diffuse_compress.integrations.origin import repository_of
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.training.prepare import Prepared

__all__ = ["deploy"]


def deploy(prepared: Prepared, *, drop_phi: bool = False) -> nn.Module:
    """Convert a trained model and mark it as ``compress`` does: ``save_pretrained`` writes packed weights, and plain
    ``from_pretrained`` reads them.

    Args:
        prepared: of a diffusers or transformers model.
        drop_phi: as in :meth:`Prepared.convert`.

    Raises:
        ConfigError: the model is of neither library; nothing is converted then.
        ModelStateError: a branch has not left yet.
    """
    root = unwrap(prepared.model)
    mark, _ = marks_of(root)
    prepared.convert(drop_phi=drop_phi)
    config = QuantizationConfig.from_spec(prepared.spec, compute_dtype_of(root))
    mark(root, ComponentState(config, layer_entries(root), base_model=repository_of(root)))
    return prepared.model
