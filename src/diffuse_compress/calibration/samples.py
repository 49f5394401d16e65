"""Recorded inputs of the models that are to be calibrated: what every calibrated method takes, saved or live."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from diffuse_compress.calibration.trees import flatten, hash_tree, unflatten
from diffuse_compress.calls import Call, map_tensors
from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.families.base import TIMESTEP_NAMES
from diffuse_compress.runtime.sampling import SamplingSettings

__all__ = ["Sample", "Samples"]

_METADATA_KEY = "diffuse_compress_calibration"
_SCHEMA_VERSION = 1
# Pipelines make these in a precision of their own, whatever the model's.
_OF_THEIR_OWN_DTYPE = (*TIMESTEP_NAMES, "image_rotary_emb")


@dataclass(frozen=True)
class Sample:
    """One recorded call of a model.

    Attributes:
        call: its arguments, on the CPU.
        item: index of the prompt, text or dict that it comes from.
        timestep: as the model got it (of several, the largest), or None.
        step: of the sampling loop, or None.
        call_in_step: 0 and 1 with guidance by two calls.
        branch: name that the pipeline gave the call ("cond", "uncond"), or None.
        weight: how much its errors count (see :meth:`Samples.weighted`): a number, or fp32 with one for each token.
    """

    call: Call
    item: int = 0
    timestep: float | None = None
    step: int | None = None
    call_in_step: int = 0
    branch: str | None = None
    weight: float | torch.Tensor = 1.0


@dataclass(frozen=True)
class Samples:
    """Samples of each component, and how they were recorded.

    The base of ``Calibration``, which also records. What produced them (a text encoder, say) is not needed any more.

    Attributes:
        components: {component: its samples}; a bare model's name is "".
        settings: JSON-able: pipeline class, scheduler, steps, guidance, resolution, seed, number of items, versions;
            under "components" for each the dtype it computed in and how it was run (:class:`SamplingSettings`).
    """

    components: Mapping[str, Sequence[Sample]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        empty = [name for name, samples in self.components.items() if not samples]
        if not self.components or empty:
            found = f"none for {', '.join(empty) or 'the model'}" if empty else "no component"
            raise ConfigError(
                f"calibration: at least one recorded call is needed, got {found}. Check that the pipeline calls it "
                "with these items (an expert of two may see no step of a short run, or of few samples)."
            )

    def of(self, component: str, dtype: torch.dtype | None = None) -> Sequence[Sample]:
        """Samples of a component.

        Args:
            component: "" for a bare model.
            dtype: that it computes in now; what was in its dtype when it was recorded is cast to it. Timesteps, rotary
                tables and scalars keep theirs. None casts nothing.

        Raises:
            ConfigError: there are none; the message names those that there are.
        """
        if component not in self.components:
            found = ", ".join(repr(name) if name else "a model without pipeline" for name in self.components)
            if component:
                raise ConfigError(
                    f"calibration: no samples of {component!r}, only of {found}. Record it with "
                    f"components=[{component!r}]."
                )
            raise ConfigError(
                f"calibration: a model without its pipeline takes samples of one component, got those of {found}. "
                f"Choose: calibration.only({next(iter(self.components))!r})."
            )
        recorded = self._of_component(component).get("dtype")
        samples = self.components[component]
        if dtype is None or recorded is None or recorded == _name(dtype):
            return samples
        before = getattr(torch, recorded)
        return [replace(sample, call=_cast(sample.call, before, dtype)) for sample in samples]

    def sampling_of(self, component: str) -> SamplingSettings:
        """How a denoiser was run; empty where nothing was told of it."""
        return SamplingSettings.from_dict(self._of_component(component).get("sampling", {}))

    def settings_of(self, component: str) -> dict[str, Any]:
        """What a component is calibrated on, JSON-able: no prompt, and nothing of the other components."""
        common = {key: value for key, value in self.settings.items() if key != "components"}
        return {**common, "samples": len(self.of(component)), **self._of_component(component)}

    def _of_component(self, component: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.settings.get("components", {}).get(component, {})
        return found

    @property
    def fingerprint(self) -> str:
        """Hash of every tensor and argument; equal calibrations have equal ones, on every machine."""
        digest = hashlib.sha256()
        for name, samples in self.components.items():
            for index, sample in enumerate(samples):
                hash_tree(digest, (sample.call.args, dict(sample.call.kwargs)), f"{name}.{index}")
                if _is_weighted(sample):
                    hash_tree(digest, sample.weight, f"{name}.{index}.weight")
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """What is in it, in a few lines."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items() if not isinstance(value, Mapping))
        lines = [f"calibration: {settings}" if settings else "calibration"]
        for name, samples in self.components.items():
            size = sum(t.numel() * t.element_size() for s in samples for t in s.call.tensors())
            line = (
                f"  {name or 'model'}: {len(samples)} calls of {len({s.item for s in samples})} items, {size >> 20} MiB"
            )
            times = sorted(s.timestep for s in samples if s.timestep is not None)
            if times:
                line += f", timesteps {times[0]:g} to {times[-1]:g} ({len(set(times))} different)"
            sampling = str(self.sampling_of(name))
            line += f", run with {sampling}" if sampling else ""
            lines.append(line)
        return "\n".join(lines)

    __str__ = summary

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; no prompt is in it, only what models are given."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        parts = {
            name: [
                {
                    "call": flatten((sample.call.args, dict(sample.call.kwargs)), f"{name}.{index}", tensors),
                    **{key: getattr(sample, key) for key in ("item", "timestep", "step", "call_in_step", "branch")},
                    **(
                        {"weight": flatten(sample.weight, f"{name}.{index}.weight", tensors)}
                        if _is_weighted(sample)
                        else {}
                    ),
                }
                for index, sample in enumerate(samples)
            ]
            for name, samples in self.components.items()
        }
        content = {"schema_version": _SCHEMA_VERSION, "components": parts, "settings": dict(self.settings)}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Copies: views of one batch share memory, which safetensors refuses.
        save_file(
            {key: t.clone().contiguous() for key, t in tensors.items()}, path, {_METADATA_KEY: json.dumps(content)}
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of :meth:`save`. Raises CheckpointError if it is not one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as handle:
                content = json.loads((handle.metadata() or {})[_METADATA_KEY])
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: not a calibration file ({type(error).__name__}: {error}).") from error
        if content["schema_version"] > _SCHEMA_VERSION:
            raise CheckpointError(f"{path}: written by a newer release: pip install -U diffuse-compress.")
        components = {}
        for name, samples in content["components"].items():
            components[name] = [_sample(data, tensors) for data in samples]
        return cls(components, content["settings"])

    def only(self, component: str) -> Self:
        """The samples of a component of a pipeline, for that model without the pipeline.

        Raises:
            ConfigError: there are none; the message names those that there are.
        """
        settings = {**self.settings, "components": {"": dict(self._of_component(component))}}
        return replace(self, components={"": self.of(component)}, settings=settings)

    def take(self, num_samples: int) -> Self:
        """The first ``num_samples`` of each component; they are stratified over timesteps in any such prefix."""
        return replace(self, components={name: list(s[:num_samples]) for name, s in self.components.items()})

    def weighted(self, weight: Callable[[Sample], float | torch.Tensor]) -> Self:
        """The same with weights: how much the error that a sample shows counts, relative to the others.

        GPTQ, AdaRound and BRECQ minimise the weighted error. Scales of AWQ and SmoothQuant do not look at weights.
        Sensitivities and searches for formats count errors so.

        Args:
            weight: gives for a sample a number at least 0, e.g. of its ``timestep``; or one for each row of the hidden
                states, a tensor of batch x tokens elements. Layers whose inputs have another number of rows (texts in
                cross-attention) and losses of whole blocks take the mean of those above 0. Rows of weight 0 are not
                looked at by any algorithm; padding (0 in a 2-d ``attention_mask``) has that weight without being asked.

        Raises:
            ConfigError: weights that are negative or not finite, or none above 0.
        """
        components = {
            name: [replace(s, weight=_checked(weight(s))) for s in old] for name, old in self.components.items()
        }
        for name, samples in components.items():
            if not any(torch.as_tensor(sample.weight).sum() > 0 for sample in samples):
                raise ConfigError(f"calibration: weights must not all be 0, got that for {name or 'the model'}.")
        return replace(self, components=components)


def _checked(weight: float | torch.Tensor) -> float | torch.Tensor:
    value = torch.as_tensor(weight, dtype=torch.float32)
    if not bool((torch.isfinite(value) & (value >= 0)).all()):
        raise ConfigError(f"calibration: weights must be finite and at least 0, got {weight}.")
    return value.cpu() if isinstance(weight, torch.Tensor) and weight.numel() > 1 else float(value)


def _cast(call: Call, before: torch.dtype, now: torch.dtype) -> Call:
    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(now) if tensor.dtype == before and tensor.ndim > 1 else tensor

    kwargs = {
        name: value if name in _OF_THEIR_OWN_DTYPE else map_tensors(cast, value) for name, value in call.kwargs.items()
    }
    return Call(map_tensors(cast, call.args), kwargs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_weighted(sample: Sample) -> bool:
    return isinstance(sample.weight, torch.Tensor) or sample.weight != 1.0


def _sample(data: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Sample:
    args, kwargs = unflatten(data.pop("call"), tensors)
    if "weight" in data:
        data["weight"] = unflatten(data["weight"], tensors)
    return Sample(Call(args, kwargs), **data)
