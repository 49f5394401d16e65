"""Text encoders that run once for each prompt, and leave the device to the training of the denoiser.

Every trajectory is a call of the stock pipeline, which encodes its prompts anew. Inside :func:`encoded_once` each text
encoder has a stand-in that knows the answers by the bytes of the question. Once every item was asked for, the encoders
wait on the CPU; a question that is new all the same brings its encoder back for the time of the answer.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from diffuse_compress.calibration.trees import hash_tree
from diffuse_compress.components import GROUPS, model_components
from diffuse_compress.errors import ConfigError
from diffuse_compress.pipeline_call import from_noise

__all__ = ["encoded_once"]


class _EncodedError(Exception):
    """Raised at the denoiser: the prompts are encoded, and the rest of the call is not wanted."""


class _StandIn(nn.Module):
    """Answers for an encoder: with its attributes, its dtype and the device that it had."""

    def __init__(self, encoder: nn.Module, movable: bool) -> None:
        super().__init__()
        # Not a submodule: whatever moves the pipeline's modules would move it.
        self.__dict__["encoder"] = encoder
        self.__dict__["device"] = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        self._movable = movable and self.device.type != "cpu"
        self._away = False
        self._answers: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["encoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the encoder answers, or has answered before."""
        key = _digest(args, kwargs)
        if key is None or key not in self._answers:
            with self._here():
                answer = self.encoder(*args, **kwargs)
            if key is None:
                return answer
            self._answers[key] = tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu"), answer)
        return tree_map_only(torch.Tensor, lambda t: t.to(self.device), self._answers[key])

    def put_away(self) -> None:
        """The encoder goes to the CPU until it is needed."""
        if self._movable:
            self.encoder.to("cpu")
            self._away = True

    def bring_back(self) -> None:
        """The encoder is where it was."""
        if self._away:
            self.encoder.to(self.device)
            self._away = False

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        away = self._away
        self.bring_back()
        try:
            yield
        finally:
            if away:
                self.put_away()


def _digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Hash of the arguments of a call; None for what cannot be told apart by its bytes."""
    digest = hashlib.sha256()
    try:
        hash_tree(digest, [list(args), kwargs], "call")
    except ConfigError:
        return None
    return digest.hexdigest()


@contextlib.contextmanager
def encoded_once(pipe: Any, models: Mapping[str, nn.Module], given: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Inside, ``pipe`` does not run its text encoders for what is in ``given``.

    Args:
        pipe: a pipeline that may be called (``untouched``); afterwards it has its encoders back where they were. Those
            of a pipeline that moves its models itself (offloading, a device map) stay where it has put them.
        models: its denoisers.
        given: arguments of the calls to come.
    """
    encoders = {n: model for n, model in model_components(pipe).items() if GROUPS["text_encoders"].match(n)}
    encoders = {name: encoder for name, encoder in encoders.items() if vars(pipe).get(name) is encoder}
    moved = bool(getattr(pipe, "_all_hooks", None)) or getattr(pipe, "hf_device_map", None) is not None
    movable = {n: not moved and not hasattr(encoder, "_hf_hook") for n, encoder in encoders.items()}
    stand_ins = {name: _StandIn(encoder, movable[name]) for name, encoder in encoders.items()}
    try:
        vars(pipe).update(stand_ins)
        if stand_ins:
            _ask(pipe, models, given)
        for stand_in in stand_ins.values():
            stand_in.put_away()
        yield
    finally:
        vars(pipe).update(encoders)
        for stand_in in stand_ins.values():
            stand_in.bring_back()


def _ask(pipe: Any, models: Mapping[str, nn.Module], given: Sequence[Mapping[str, Any]]) -> None:
    """Every call up to its denoiser."""

    def stop(module: nn.Module, args: Any) -> None:
        raise _EncodedError

    handles = [model.register_forward_pre_hook(stop, prepend=True) for model in models.values()]
    try:
        for arguments in given:
            with contextlib.suppress(_EncodedError):
                pipe(**from_noise(pipe, arguments, 0))
    finally:
        for handle in handles:
            handle.remove()
