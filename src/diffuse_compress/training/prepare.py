"""A model that is trained to be rounded, from the dense one to the one that is deployed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from diffuse_compress.assignment import LayerAssignment, assign_layers, require_patterns_match, resolve_rules
from diffuse_compress.components import unwrap
from diffuse_compress.errors import CheckpointError, ConfigError, ModelStateError
from diffuse_compress.families.roles import LayerRole
from diffuse_compress.quantization.clips import TimestepGroups
from diffuse_compress.quantization.convert import module_aliases, replace_module
from diffuse_compress.quantization.spec import QuantizationSpec
from diffuse_compress.training.clips import attach_clips, clips_of_training, follow_groups, stop_following
from diffuse_compress.training.config import QVGenConfig, TrainingMethod
from diffuse_compress.training.layers import TrainedLinear
from diffuse_compress.training.rank_decay import RankDecay, turn_moments
from diffuse_compress.training.sharding import is_sharded

__all__ = ["Prepared", "planned_spec", "prepare"]

_STATE_VERSION = 1
# What decides on what is trained; the rest of a config may change between runs of one training.
_FIXED = ("scheme", "weight_zero", "method", "clip_groups", "timestep_range", "phi_rank", "decay", "decay_ratio")
_FIXED += ("decay_fraction", "gate", "last_rank", "quantize_all", "modulation_scheme", "lora_rank")


def prepare(model: nn.Module, config: QVGenConfig, *, total_steps: int) -> Prepared:
    """Put a :class:`TrainedLinear` in place of every layer that will be quantized.

    All parameters of the model stay trainable as they are, and the dense weights stay the very parameters that they
    were, but for ``method="efficientdm"``, which freezes them.

    Args:
        model: dense, loaded; a diffusers or transformers model, or any module whose linears are stock ones.
        config: of the training.
        total_steps: optimizer steps, over which the branch leaves.

    Raises:
        ConfigError: no layer would be trained, a pattern matches nothing, or the branch cannot leave in so few steps.
        IncompatibleShapeError: a layer does not fit the format.
        ModelStateError: a weight is not loaded, or holds inf or nan.

    The model is as it was if anything is raised.
    """
    root = unwrap(model)
    decay = RankDecay(config, total_steps)
    assigned = _trained_layers(root, config)
    groups = None
    if config.clip_groups:
        groups = TimestepGroups(config.clip_groups, *config.timestep_range)
    layers: dict[str, TrainedLinear] = {}
    spec = config.spec
    for name, item in assigned.items():
        linear = root.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert item.scheme is not None
        if linear.weight.is_meta:
            raise ModelStateError(f"{name}: training needs the weight, which is on the meta device. Load it first.")
        layers[name] = TrainedLinear.from_dense(linear, item.scheme, config, spec.generator(name))
        layers[name].timestep_groups = groups
    aliases = module_aliases(root)
    for name, layer in layers.items():
        for alias in aliases[id(root.get_submodule(name))]:
            replace_module(root, alias, layer)
        layer.take_rest()
    if groups is not None:
        follow_groups(root, groups)
    if config.method is TrainingMethod.EFFICIENTDM:
        own = {id(p) for layer in layers.values() for key, p in layer.named_parameters() if key not in _DENSE}
        for parameter in root.parameters():
            parameter.requires_grad_(id(parameter) in own)
    return Prepared(model, config, layers, spec.resolved(resolve_rules(assigned)), decay)


_DENSE = ("weight", "bias")


def planned_spec(model: nn.Module, config: QVGenConfig) -> QuantizationSpec:
    """What ``model`` will be deployed as, with the layers it comes to; meta tensors will do.

    Raises:
        ConfigError: no layer would be trained, or a pattern matches nothing.
    """
    return config.spec.resolved(resolve_rules(_trained_layers(unwrap(model), config)))


def _trained_layers(model: nn.Module, config: QVGenConfig) -> dict[str, LayerAssignment]:
    require_patterns_match({"": model}, config.spec)
    found = {}
    for name, item in assign_layers(model, config.spec).items():
        kept = item.role is LayerRole.MODULATION and config.layer_modulation_scheme is None
        if item.scheme is not None and not kept and isinstance(model.get_submodule(name), nn.Linear):
            found[name] = item
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no layer would be trained: all linears are kept, and convolutions are not "
            "trained. Take quantize_all=True or fewer modules_to_not_convert."
        )
    return found


class Prepared:
    """A model in training; made by :func:`prepare`.

    Attributes:
        model: as it was given.
        config: of the training.
        layers: by name.
        spec: what the deployed model is, with the layers it came to.
        decay: of the branch.
        phase: of it, that is in force.
    """

    def __init__(
        self,
        model: nn.Module,
        config: QVGenConfig,
        layers: dict[str, TrainedLinear],
        spec: QuantizationSpec,
        decay: RankDecay,
    ) -> None:
        self.model, self.config, self.layers, self.spec, self.decay = model, config, layers, spec, decay
        self.phase = 0

    def parameter_groups(self, config: QVGenConfig | None = None) -> list[dict[str, Any]]:
        """Groups for an optimizer: {"name", "params", "lr", "weight_decay"}, those without a parameter left out.

        "weights" (matrices of the model, which decay), "others" (its biases, norms and tables of one dimension),
        "phi", "lora", "scales" (with zero points) and "clips".
        """
        config = config or self.config
        own: dict[int, str] = {}
        for layer in self.layers.values():
            for key, parameter in layer.named_parameters(recurse=False):
                if key not in _DENSE:
                    own[id(parameter)] = _GROUP_OF[key]
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in ("weights", "others", *_OWN_GROUPS)}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                default = "weights" if parameter.dim() > 1 else "others"
                groups[own.get(id(parameter), default)].append(parameter)
        return [
            {
                "name": name,
                "params": parameters,
                "lr": config.clip_learning_rate if name == "clips" else config.learning_rate,
                "weight_decay": config.weight_decay if name in ("weights", "lora") else 0.0,
            }
            for name, parameters in groups.items()
            if parameters
        ]

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Any = None) -> None:
        """Bring the branch to where it is at a step, before its forward passes.

        Where a phase ends, what the gates have left of the leaving components goes into the weights, those that stay
        are decomposed anew, and the optimizer forgets their moments (or turns them, ``rotate_moments``).

        Args:
            step: optimizer steps done, from 0.
            optimizer: torch's, bitsandbytes' or accelerate's around one; None has no moments.

        Raises:
            ModelStateError: the step is of a phase that is over.
        """
        phase, _, gate = self.decay.at(step)
        if phase < self.phase:
            raise ModelStateError(
                f"before_step: step {step} is of phase {phase} of the branch, and phase {self.phase} is in force. "
                "Prepare the dense model again, or load the state of that step."
            )
        while self.phase < phase:
            self.phase += 1
            self._shrink(self.decay.path[self.phase], optimizer)
        for layer in self.layers.values():
            layer.set_gate(gate)

    def _shrink(self, rank: int, optimizer: Any) -> None:
        for layer in self.layers.values():
            before, turn = layer.rank, layer.shrink(rank)
            if layer.rank == before:
                continue
            _share(layer)
            for parameter in (layer.phi_up, layer.phi_down):
                if optimizer is None or parameter is None or parameter not in optimizer.state:
                    continue
                if turn is None or not self.config.rotate_moments:
                    # Made anew, zero, at the next step, with the count that corrects their bias.
                    optimizer.state.pop(parameter)
                else:
                    is_up = parameter is layer.phi_up
                    own = torch.linalg.pinv(turn).t() if is_up else turn
                    turn_moments(optimizer.state[parameter], own, rank, columns=is_up)

    @contextlib.contextmanager
    def phi(self, enabled: bool) -> Iterator[None]:
        """Inside, layers compute with their branch, or without."""
        with self._switched("uses_phi", enabled):
            yield

    @contextlib.contextmanager
    def fake_quantization(self, enabled: bool) -> Iterator[None]:
        """Inside, layers round, or compute as the dense student (without the branch)."""
        with self._switched("rounds", enabled):
            yield

    @contextlib.contextmanager
    def _switched(self, name: str, value: bool) -> Iterator[None]:
        before = [getattr(layer, name) for layer in self.layers.values()]
        for layer in self.layers.values():
            setattr(layer, name, value)
        try:
            yield
        finally:
            for layer, old in zip(self.layers.values(), before, strict=True):
                setattr(layer, name, old)

    def spectrum(self) -> dict[str, torch.Tensor]:
        """{layer: singular values of its branch, gates included, fp32 [rank]}; without branches, empty tensors."""
        return {name: layer.spectrum() for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """What ``model.state_dict()`` does not hold of a training: its phase, the ranks, and what it was asked for."""
        asked = self.config.to_dict()
        return {
            "version": _STATE_VERSION,
            "phase": self.phase,
            "starts": list(self.decay.starts),
            "ranks": {name: layer.rank for name, layer in self.layers.items()},
            "config": {name: asked[name] for name in _FIXED},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was made; ``model.load_state_dict`` brings the tensors, gates included.

        Raises:
            CheckpointError: of another model, or of a training that was asked for otherwise.
        """
        mine = self.state_dict()
        for name in ("version", "config", "starts"):
            if state.get(name) != mine[name]:
                raise CheckpointError(
                    f"training state: {name} must be that of this training, {mine[name]}, found {state.get(name)}. "
                    "Resume with the config and the number of steps that it began with."
                )
        if set(state["ranks"]) != set(self.layers):
            raise CheckpointError("training state: it is of other layers than this model trains. Load that model.")
        self.phase = int(state["phase"])
        for name, rank in state["ranks"].items():
            self.layers[name].rank = int(rank)

    @torch.no_grad()
    def convert(self, *, drop_phi: bool = False) -> nn.Module:
        """Put the deployed layers in place: codes and scales are those that forward has computed with.

        The clips go with them, and branches that were to stay. Other parameters are as they were trained.

        Args:
            drop_phi: leave branches out that have not left yet, as validation without them does.

        Raises:
            ModelStateError: a branch has not left yet.
        """
        left = next((name for name, layer in self.layers.items() if layer.rank and not layer.keeps_phi), None)
        if left is not None and not drop_phi:
            raise ModelStateError(
                f"convert: {left} still has a branch of rank {self.layers[left].rank}, which is not deployed. Train on "
                f"until step {self.decay.starts[-1]} and call before_step, or pass drop_phi=True; decay=False keeps it."
            )
        root = unwrap(self.model)
        made = {name: layer.to_quantized() for name, layer in self.layers.items()}
        clips = clips_of_training(self.layers, *self.config.timestep_range)
        aliases = module_aliases(root)
        for name, layer in made.items():
            for alias in aliases[id(self.layers[name])]:
                replace_module(root, alias, layer)
        stop_following(root)
        if clips is not None:
            attach_clips(root, clips)
        return self.model


_GROUP_OF = {
    "phi_up": "phi",
    "phi_down": "phi",
    "lora_up": "lora",
    "lora_down": "lora",
    "scale": "scales",
    "zero_point": "scales",
    "clip_logits": "clips",
}
_OWN_GROUPS = tuple(dict.fromkeys(_GROUP_OF.values()))


def _share(layer: TrainedLinear) -> None:
    """Let all processes go on with the first one's factors, and the weight that took in what left: theirs may differ in
    the last bits on other hardware."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for parameter in (layer.weight, layer.phi_up, layer.phi_down):
        if parameter is not None and not is_sharded(parameter):
            torch.distributed.broadcast(parameter.data, src=0)
