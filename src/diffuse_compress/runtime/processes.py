"""The processes of one training."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Processes"]


class Processes:
    """How many there are, which one this is, and what they do together.

    Args:
        state: accelerate's ``Accelerator`` or ``PartialState``; None for a process by itself.
    """

    def __init__(self, state: Any = None) -> None:
        self.state = state
        self.count = 1 if state is None else int(state.num_processes)
        self.index = 0 if state is None else int(state.process_index)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the processes, on the CPU where there are several."""
        if self.count == 1:
            return values
        from accelerate.utils import reduce

        found: torch.Tensor = reduce(values.to(self.state.device), reduction="mean")
        return found.cpu()

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self.state.wait_for_everyone()
