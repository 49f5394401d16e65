"""Methods beside quantized weights: how a component carries them, and how they go into its checkpoint and come back.

Their tensors are entries ``diffuse_compress.<kind>.<name>`` of the component's safetensors file, what they are in its
metadata, and their configurations under ``methods`` of ``quantization_config``: the Hub drops files beside the weights.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from diffuse_compress.caching.config import CACHE_KIND, CacheConfig, cache_config_from_dict
from diffuse_compress.caching.runtime import apply_cache, cache_of, remove_cache
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.errors import (
    CheckpointError,
    ConfigError,
    DiffuseCompressWarning,
    MissingDependencyError,
    ModelStateError,
)
from diffuse_compress.integrations.compat import NO_PATCH_VARIABLE, may_patch
from diffuse_compress.integrations.kv_cache import attach_kv_cache, detach_kv_cache, kv_config_of
from diffuse_compress.integrations.quantization_config import QUANT_METHOD
from diffuse_compress.quantization.kv_config import KV_KIND, KVCacheConfig, kv_config_from_dict
from diffuse_compress.temporal.config import TEMPORAL_KIND, TableConfig, TFMQConfig
from diffuse_compress.temporal.maintenance import Maintained, maintained_of, set_maintained, table_config
from diffuse_compress.temporal.persist import load_table_state, table_state
from diffuse_compress.temporal.step_scales import StepQParams, attach_step_scales, detach_step_scales, step_scales_of
from diffuse_compress.temporal.table import attach_table, detach_table, table_of
from diffuse_compress.training.clips import (
    CLIP_KIND,
    InputClips,
    attach_clips,
    clips_of,
    describe_clips,
    detach_clips,
)

__all__ = [
    "KINDS",
    "CacheMethod",
    "ClipMethod",
    "KVCacheMethod",
    "Method",
    "Stored",
    "TemporalMethod",
    "is_method_key",
    "live_methods",
    "method_keys",
    "read_methods",
    "remove_methods",
    "restore_methods",
    "stored_methods",
]

_PREFIX = f"{QUANT_METHOD}."


@dataclass(frozen=True)
class Stored:
    """A method as a checkpoint holds it.

    Attributes:
        config: what it was asked for, ``to_dict()``.
        meta: JSON-able, what the tensors are.
        tensors: by name within the method.
    """

    config: Mapping[str, Any]
    meta: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


class Method(ABC):
    """One kind of method. A model has at most one of each; everything that is live is the model's, nothing is here."""

    kind: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def config_of(self, model: nn.Module) -> Any:
        """Its configuration on ``model``; None where it is not."""

    @abstractmethod
    def is_embedded(self, model: nn.Module) -> bool:
        """Whether the checkpoint of a model whose weights are dense must hold it."""

    @abstractmethod
    def store(self, model: nn.Module) -> Stored:
        """What a checkpoint of ``model`` is to hold."""

    @abstractmethod
    def restore(self, model: nn.Module, stored: Stored) -> None:
        """Put it on ``model``, whose weights are loaded."""

    @abstractmethod
    def remove(self, model: nn.Module) -> None:
        """Leave ``model`` without it; nothing happens if it is not there."""

    @abstractmethod
    def describe(self, config: Mapping[str, Any], stored: Stored | None) -> str:
        """What a checkpoint of this configuration holds, in one line."""

    def _described(self, model: nn.Module) -> str:
        stored = self.store(model)
        return self.describe(stored.config, stored)

    @abstractmethod
    def facts(self, model: nn.Module) -> dict[str, Any]:
        """For the report, JSON-able: at least "summary", one line."""


class TemporalMethod(Method):
    """The timestep path: tables, and layers whose codes were learned on the timesteps (``temporal/``)."""

    kind, title = TEMPORAL_KIND, "timestep path"

    def config_of(self, model: nn.Module) -> TFMQConfig | None:
        maintained, table, scales = maintained_of(model), table_of(model), step_scales_of(model)
        if maintained is not None:
            return maintained.config
        scope = None if scales is None else scales.qparams.scope
        return None if table is None else TFMQConfig(table.config, table.prepared, scope=scope)

    def is_embedded(self, model: nn.Module) -> bool:
        return True

    def store(self, model: nn.Module) -> Stored:
        config, maintained, table = self.config_of(model), maintained_of(model), table_of(model)
        assert config is not None
        tensors, meta = ({}, dict[str, Any]()) if table is None else table_state(table)
        if maintained is not None:
            found, meta["maintained"] = maintained.to_tensors()
            tensors |= {f"{_MAINTAINED}{name}": tensor for name, tensor in found.items()}
        scales = step_scales_of(model)
        if scales is not None:
            found, meta["scales"] = scales.qparams.to_tensors()
            tensors |= {f"{_SCALES}{name}": tensor for name, tensor in found.items()}
        return Stored(config.to_dict(), meta, tensors)

    def restore(self, model: nn.Module, stored: Stored) -> None:
        config = TFMQConfig.from_dict(stored.config)
        maintained = _maintained(config, stored)
        set_maintained(model, maintained)
        scales, own = _step_qparams(stored), table_config(model, config, maintained)
        if own is not None:
            self._restore_table(model, stored, config, own)
        if scales is not None:
            attach_step_scales(model, scales)

    @staticmethod
    def _restore_table(model: nn.Module, stored: Stored, config: TFMQConfig, own: TableConfig) -> None:
        table = attach_table(model, own)
        table.prepared = config.num_inference_steps
        weights = stored.tensors.get("weights")
        if weights is not None and not torch.equal(weights.cpu(), table.weights_signature()):
            warnings.warn(
                f"{type(model).__name__}: its stored temporal tables were made from other weights (it is loaded in "
                "another dtype, or its weights were replaced); each is made anew in the first run that needs it.",
                DiffuseCompressWarning,
                stacklevel=2,
            )
            return
        load_table_state(table, stored.tensors, stored.meta)

    def remove(self, model: nn.Module) -> None:
        detach_step_scales(model)
        detach_table(model)
        set_maintained(model, None)

    def facts(self, model: nn.Module) -> dict[str, Any]:
        table, maintained, scales = table_of(model), maintained_of(model), step_scales_of(model)
        config, qparams = self.config_of(model), None if scales is None else scales.qparams
        assert config is not None
        schedules = [
            {
                "scheduler": known.scheduler,
                "rows": len(known.values),
                "bytes": known.nbytes,
                "layers": len({name for part in known.rows for name in part.columns}),
            }
            for known in (() if table is None else table.schedules)
        ]
        summary, facts = (
            _path_line(config, maintained, None if scales is None else scales.qparams, schedules),
            dict[str, Any](),
        )
        if table is not None:
            summary = f"{table.num_served} layers looked up, {summary}"
            if not schedules:
                summary += "; rows are made in the first run"
            live = dict(table.left) if maintained is None else table.left | maintained.live
            facts |= {
                "layers": table.num_served,
                "live": live,
                "schedules": schedules,
                "bytes": table.nbytes(),
            }
        if maintained is not None:
            facts["path"] = maintained.facts()
        if qparams is not None:
            facts["step_scales"] = qparams.facts()
        return {"summary": summary, **facts}

    def describe(self, config: Mapping[str, Any], stored: Stored | None) -> str:
        asked = TFMQConfig.from_dict(config)
        if stored is None:
            return asked.summary
        schedules = [
            {
                "scheduler": known["scheduler"],
                "rows": len(stored.tensors[f"{number}.timesteps"]),
                "bytes": sum(
                    tensor.nbytes
                    for key, tensor in stored.tensors.items()
                    if key.startswith(f"{number}.") and key != f"{number}.timesteps"
                ),
                "layers": len({name for part in known["parts"] for name in part["columns"]}),
            }
            for number, known in enumerate(stored.meta.get("schedules", ()))
        ]
        return _path_line(asked, _maintained(asked, stored), _step_qparams(stored), schedules)


_MAINTAINED, _SCALES = "path.", "scales."


def _step_qparams(stored: Stored) -> StepQParams | None:
    if "scales" not in stored.meta:
        return None
    own = {key.removeprefix(_SCALES): t for key, t in stored.tensors.items() if key.startswith(_SCALES)}
    return StepQParams.from_tensors(own, stored.meta["scales"])


def _path_line(
    config: TFMQConfig,
    maintained: Maintained | None,
    scales: StepQParams | None,
    schedules: Sequence[Mapping[str, Any]],
) -> str:
    """How a timestep path is kept: what was asked for, what was learned, input scales, and the rows that are stored."""
    parts = [config.summary, *(part.describe() for part in (maintained, scales) if part is not None)]
    if schedules:
        rows = [f"{known['rows']} timesteps of {known['scheduler'] or 'a schedule'}" for known in schedules]
        layers, size = max(known["layers"] for known in schedules), sum(known["bytes"] for known in schedules)
        parts.append(f"rows of {layers} layers for {', '.join(rows)}, {size / 1024:.1f} KiB")
    return "; ".join(parts)


def _maintained(config: TFMQConfig, stored: Stored) -> Maintained | None:
    if "maintained" not in stored.meta:
        return None
    own = {key.removeprefix(_MAINTAINED): t for key, t in stored.tensors.items() if key.startswith(_MAINTAINED)}
    return Maintained.from_tensors(config, own, stored.meta["maintained"])


class CacheMethod(Method):
    """Feature caches (``caching/``)."""

    kind, title = CACHE_KIND, "feature cache"

    def config_of(self, model: nn.Module) -> CacheConfig | None:
        cache = cache_of(model)
        return None if cache is None else cache.config

    def is_embedded(self, model: nn.Module) -> bool:
        cache = cache_of(model)
        return cache is not None and cache.config.embed

    def store(self, model: nn.Module) -> Stored:
        cache = cache_of(model)
        assert cache is not None
        tensors, meta = cache.schedule.to_tensors()
        return Stored(cache.config.to_dict(), meta, tensors)

    def restore(self, model: nn.Module, stored: Stored) -> None:
        config = cache_config_from_dict(stored.config)
        apply_cache(model, Schedule.from_tensors(stored.tensors, stored.meta), config)

    def remove(self, model: nn.Module) -> None:
        remove_cache(model)

    def facts(self, model: nn.Module) -> dict[str, Any]:
        cache = cache_of(model)
        assert cache is not None
        schedule = cache.schedule
        summary = self._described(model)
        return {
            "summary": summary if cache.enabled else f"{summary}; off",
            "units": [unit.name for unit in schedule.units],
            "mask": schedule.mask.tolist(),
            "picture": schedule.picture().splitlines(),
            "timesteps": schedule.timesteps.tolist(),
            "reused": schedule.reused,
            "flops": schedule.total_flops,
            "predicted_speedup": schedule.predicted_speedup,
            "details": dict(schedule.details),
        }

    def describe(self, config: Mapping[str, Any], stored: Stored | None) -> str:
        if stored is None:
            return cache_config_from_dict(config).summary
        schedule = Schedule.from_tensors(stored.tensors, stored.meta)
        summary = f"{len(schedule.units)} units, {schedule.num_steps} steps, {100 * schedule.reused:.1f} % reused"
        if schedule.predicted_speedup is not None:
            summary += f", {schedule.predicted_speedup:.2f}x predicted"
        if "measured_speedup" in schedule.details:
            summary += f", {schedule.details['measured_speedup']:.2f}x measured"
        return summary


class ClipMethod(Method):
    """Clips of dynamic inputs that a training has learned (``training/clips.py``): nothing that can be asked for."""

    kind, title = CLIP_KIND, "learned input clips"

    def config_of(self, model: nn.Module) -> InputClips | None:
        return clips_of(model)

    def is_embedded(self, model: nn.Module) -> bool:
        return True

    def store(self, model: nn.Module) -> Stored:
        clips = clips_of(model)
        assert clips is not None
        tensors, meta = clips.to_tensors()
        return Stored({"groups": clips.groups, "layers": len(clips.layers)}, meta, tensors)

    def restore(self, model: nn.Module, stored: Stored) -> None:
        attach_clips(model, InputClips.from_tensors(stored.tensors, stored.meta))

    def remove(self, model: nn.Module) -> None:
        detach_clips(model)

    def describe(self, config: Mapping[str, Any], stored: Stored | None) -> str:
        return describe_clips(config["groups"], config["layers"])

    def facts(self, model: nn.Module) -> dict[str, Any]:
        clips = clips_of(model)
        assert clips is not None
        return {
            "summary": self._described(model),
            "groups": clips.groups,
            "timesteps": [clips.low, clips.high],
            "mean": float(clips.values.mean()),
        }


class KVCacheMethod(Method):
    """How ``generate`` keeps keys and values (``kv_cache.py``): a configuration, no tensors."""

    kind, title = KV_KIND, "KV cache"

    def config_of(self, model: nn.Module) -> KVCacheConfig | None:
        return kv_config_of(model)

    def is_embedded(self, model: nn.Module) -> bool:
        return True

    def store(self, model: nn.Module) -> Stored:
        config = kv_config_of(model)
        assert config is not None
        return Stored(config.to_dict(), {}, {})

    def restore(self, model: nn.Module, stored: Stored) -> None:
        attach_kv_cache(model, kv_config_from_dict(stored.config))

    def remove(self, model: nn.Module) -> None:
        detach_kv_cache(model)

    def facts(self, model: nn.Module) -> dict[str, Any]:
        return {"summary": self._described(model)}

    def describe(self, config: Mapping[str, Any], stored: Stored | None) -> str:
        return kv_config_from_dict(config).summary


KINDS: dict[str, Method] = {
    method.kind: method for method in (ClipMethod(), TemporalMethod(), CacheMethod(), KVCacheMethod())
}
"""By kind, in the order in which they are put on a model."""


def live_methods(model: nn.Module) -> dict[str, Method]:
    """The kinds that ``model`` carries."""
    return {kind: method for kind, method in KINDS.items() if method.config_of(model) is not None}


def remove_methods(model: nn.Module) -> None:
    """Leave ``model`` without any."""
    for method in KINDS.values():
        method.remove(model)


def stored_methods(model: nn.Module) -> dict[str, Stored]:
    """What a checkpoint of ``model`` is to hold, by kind."""
    return {kind: method.store(model) for kind, method in live_methods(model).items()}


def method_keys(stored: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
    """Entries of the checkpoint, contiguous and on the CPU."""
    return {
        f"{_PREFIX}{kind}.{name}": tensor.detach().cpu().contiguous()
        for kind, method in stored.items()
        for name, tensor in method.tensors.items()
    }


def read_methods(files: Iterable[str], described: Mapping[str, Any]) -> dict[str, Stored]:
    """The methods of a checkpoint, read past the library's loader: it would cast their tensors to the model's dtype.

    Args:
        files: of the checkpoint.
        described: ``{kind: {"config", "meta"}}`` of its metadata.

    Raises:
        CheckpointError: a kind that this release does not know.
    """
    from safetensors import safe_open

    unknown = next((kind for kind in described if kind not in KINDS), None)
    if unknown is not None:
        raise CheckpointError(
            f"the checkpoint holds a method of kind {unknown!r}, which this release does not know: "
            "pip install -U diffuse-compress."
        )
    tensors: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in described}
    for file in files if described else ():
        with safe_open(str(file), framework="pt") as handle:
            for key in handle.keys():
                kind, _, name = key.removeprefix(_PREFIX).partition(".")
                if key.startswith(_PREFIX) and kind in tensors:
                    tensors[kind][name] = handle.get_tensor(key)
    return {kind: Stored(found["config"], found["meta"], tensors[kind]) for kind, found in described.items()}


def is_method_key(key: str) -> bool:
    """Whether an entry of a checkpoint is a method's, not the model's."""
    return key.startswith(_PREFIX)


def restore_methods(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Put the methods of a checkpoint on a model; where the libraries' classes are to be left alone, none.

    Raises:
        CheckpointError: one of them does not fit the model.
    """
    if stored and not may_patch():
        warnings.warn(
            f"{type(model).__name__}: its {' and '.join(KINDS[kind].title for kind in stored)} stay off, since "
            f"{NO_PATCH_VARIABLE} leaves the libraries' classes alone.",
            DiffuseCompressWarning,
            stacklevel=2,
        )
        return
    for kind, found in stored.items():
        try:
            KINDS[kind].restore(model, found)
        except (MissingDependencyError, ModelStateError) as error:  # a part of diffusers is missing; offloaded weights
            warnings.warn(f"{KINDS[kind].title}: off. {error}", DiffuseCompressWarning, stacklevel=2)
        except ConfigError as error:
            raise CheckpointError(f"{type(model).__name__}: its stored {KINDS[kind].title}: {error}") from error
