"""What transformers asks while it saves a model in a format of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.quantizers import HfQuantizer

__all__ = ["WritingQuantizer"]


class WritingQuantizer(HfQuantizer):  # type: ignore[misc]
    """Stands in for a model's quantizer during a save; the reader's own package need not be installed."""

    requires_calibration = False

    def __init__(self, state_dict: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._state_dict = state_dict

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return self._state_dict(), {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
