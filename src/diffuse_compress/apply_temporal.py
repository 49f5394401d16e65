"""Carrying out what is planned for timestep paths: tables and learned codes of the dense weights, and into place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.engine import Quantized
from diffuse_compress.calibration.items import pipeline_arguments
from diffuse_compress.calibration.recording import items_of
from diffuse_compress.components import is_pipeline
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.families.base import Dependence
from diffuse_compress.logging import get_logger
from diffuse_compress.method_plan import MethodPlan
from diffuse_compress.pipeline_call import small_output
from diffuse_compress.plan import CompressionPlan
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.temporal.config import Maintenance, TableConfig, TFMQConfig, WeightPlace
from diffuse_compress.temporal.layout import Layout, layout_of
from diffuse_compress.temporal.maintenance import (
    Choice,
    Maintained,
    PathErrors,
    choose_tables,
    rounded_outputs,
    set_maintained,
    table_config,
    tables_of_rounded,
)
from diffuse_compress.temporal.persist import load_table_state, table_state
from diffuse_compress.temporal.prepare import LoopCalls, calls_of_schedule, prepare_schedule
from diffuse_compress.temporal.storage import store
from diffuse_compress.temporal.table import attach_table, detach_table, table_of
from diffuse_compress.temporal.tiar import Path, path_of, reconstruct
from diffuse_compress.transaction import Transaction

__all__ = [
    "TemporalWork",
    "attach_temporal",
    "put_tables_back",
    "rounded_bytes",
    "take_tables_off",
    "temporal_work",
]

_LOGGER = get_logger(__name__)
_ROUNDED = (WeightPlace.INT8, WeightPlace.INT4)
# Conditions that layers which read one are learned on, and what a scheduler that does not say it was trained with.
_CONDITIONS, _TRAINED = 8, 1000
_TableState = tuple[dict[str, torch.Tensor], dict[str, Any]]


@dataclass
class TemporalWork:
    """What follows from a component's dense weights for its timestep path.

    Attributes:
        tables: rows of the schedules that are to be stored; None without tables.
        ready: quantized layers, by name, that take their places before the blocks that they are in are calibrated.
        late: likewise, once all blocks are: their outputs are looked up at every timestep, as dense layers give them.
        maintained: what was chosen and measured; None where everything is looked up.
        loops: how the denoiser is called in the first schedule, for each set of conditions; where codes are learned or
            input scales are kept for each step.
        timesteps: of all schedules, as it is given them, where input scales are.
    """

    tables: _TableState | None
    ready: dict[str, Quantized] = field(default_factory=dict)
    late: dict[str, Quantized] = field(default_factory=dict)
    maintained: Maintained | None = None
    loops: list[LoopCalls] = field(default_factory=list)
    timesteps: tuple[float, ...] = ()

    def place(self, layers: Mapping[str, Quantized], looked_up: Container[str]) -> None:
        """Put layers into :attr:`ready`, or :attr:`late` where they are looked up at every timestep."""
        for name, layer in layers.items():
            (self.late if name in looked_up else self.ready)[name] = layer


def temporal_work(
    target: Any,
    models: Mapping[str, nn.Module],
    plan: CompressionPlan,
    device: torch.device | str | None,
) -> dict[str, TemporalWork]:
    """By component, made of the dense weights; the models stay as they are.

    Args:
        target: the pipeline or model.
        models: its models, by component name.
        plan: whose calibration, or this package's own items, the pipeline is asked for.
        device: where to compute.
    """
    calibration = plan.calibration
    configs = {method.component: method.config for method in plan.methods if isinstance(method.config, TFMQConfig)}
    work = {}
    for name, config in configs.items():
        work[name] = TemporalWork(None)
        part = plan.components.get(name)
        schemes = {} if part is None else part.path_layers
        # To have ranges, inputs must be seen.
        static = is_pipeline(target) and any(scheme.has_static_inputs for scheme in schemes.values())
        if config.learns or config.scope is not None or static:
            work[name].loops = _loops(target, name, models[name], config, calibration)
        if part is not None and schemes:
            path = _path(target, models[name], config, work[name].loops) if config.learns or static else None
            quantize = functools.partial(_quantized, models[name], generator=part.spec.generator, device=device)
            if config.learns:
                assert path is not None
                _learn(work[name], path, config, schemes, quantize)
            else:
                _round(work[name], layout_of(models[name], config.table), path, schemes, quantize)
    found = {name: table_config(models[name], config, work[name].maintained) for name, config in configs.items()}
    tabled = {name: own for name, own in found.items() if own is not None}
    looping = {name: config for name, config in configs.items() if name in tabled or config.scope is not None}
    calls = _calls_of_schedules(target, models, looping, calibration)
    for name, config in configs.items():
        if config.maintenance is Maintenance.CACHE:
            _measure(work[name], target, models[name], config, calls[name][:1])
        if config.scope is not None:
            seen = [
                value for loop in (*calls[name], *work[name].loops) for value in loop.timesteps if value is not None
            ]
            work[name].timesteps = tuple(sorted(set(seen)))
    for name, own in tabled.items():
        # Where weights are to be rounded or moved is no matter yet.
        table = attach_table(models[name], replace(own, weights=WeightPlace.DEVICE))
        try:
            for loop in calls[name]:
                kept = {} if (found := work[name].maintained) is None else found.kept
                prepare_schedule(table, loop, type(target.scheduler).__name__, kept)
            work[name].tables = table_state(table)
        finally:
            detach_table(models[name])
    return work


def _loops(target: Any, name: str, model: nn.Module, config: TFMQConfig, calibration: Any) -> list[LoopCalls]:
    """Loops of the first schedule, one for each set of conditions that the timestep path is looked at with."""
    layout = layout_of(model, config.table)
    steps = next(iter(config.num_inference_steps or (None,)))
    conditional = Dependence.TIMESTEP_AND_CONDITION in layout.layers.values()
    calls = []
    for item in items_of(target, calibration, _CONDITIONS + 1 if conditional else 1):
        found = calls_of_schedule(target, {name: model}, steps, _arguments(target, item)).get(name)
        if found is None or not found.timesteps or None in found.timesteps:
            raise ConfigError(
                f"{name}: to look at its timestep path, the pipeline must run with one timestep for all in each call; "
                f"of this {type(target).__name__} no such call was seen. Pass calibration=, a list of dicts of its "
                "arguments, or leave maintenance= and scope= out."
            )
        calls.append(found)
    return calls


def _measure(work: TemporalWork, target: Any, model: nn.Module, config: TFMQConfig, loops: list[LoopCalls]) -> None:
    """Add what tables keep of layers that are rounded, where the path can be looked at in these loops."""
    layers = {**work.ready, **work.late}
    if not layers or not loops or not loops[0].timesteps or None in loops[0].timesteps:
        return
    try:
        path = path_of(layout_of(model, config.table), model, loops, None)
    except ModelStateError as error:
        _LOGGER.info("%s: features of the timestep are not measured: %s", type(target).__name__, error)
        return
    work.maintained = tables_of_rounded(path, layers, config)


def _path(target: Any, model: nn.Module, config: TFMQConfig, loops: list[LoopCalls]) -> Path:
    """The timestep path as it is in these loops."""
    trained = getattr(target.scheduler.config, "num_train_timesteps", None) or _TRAINED
    return path_of(layout_of(model, config.table), model, loops, trained)


def _quantized(
    model: nn.Module,
    path: Path | None,
    schemes: Mapping[str, Scheme],
    iterations: int,
    *,
    generator: Callable[[str], torch.Generator],
    device: torch.device | str | None,
) -> dict[str, Quantized]:
    """These layers of a model, quantized: a path's on the timesteps, others to nearest and with dynamic inputs."""
    layers: dict[str, Quantized] = {}
    if path is not None:
        own = {name: scheme for name, scheme in schemes.items() if name in path.kinds}
        dense = dict(zip(path.block.names, path.block.layers, strict=True))

        def put(name: str, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
            layers[name] = convert(dense[name])  # type: ignore[assignment]
            return layers[name]

        reconstruct(path, own, iterations, put, generator=generator, device=device)
    for name in schemes.keys() - layers.keys():
        if path is not None:
            _LOGGER.warning("%s: rounded to nearest: it does not run once for each timestep", name)
        layer, scheme = model.get_submodule(name), schemes[name].with_dynamic_inputs()
        layers[name] = quantize_module(layer, scheme, RTNConfig(), device=device, name=name)
    return layers


def _learn(
    work: TemporalWork,
    path: Path,
    config: TFMQConfig,
    schemes: Mapping[str, Scheme],
    quantize: Callable[[Path, Mapping[str, Scheme], int], dict[str, Quantized]],
) -> None:
    """Add learned layers and what was measured of them."""
    own = {name: scheme for name, scheme in schemes.items() if name in path.kinds}
    errors = PathErrors.none(path)
    errors.add("rtn", path.dense, rounded_outputs(path, own))
    learned = quantize(path, schemes, config.iterations)
    errors.add("tib", path.dense, path.block.outputs(path.given))
    choice = Choice({name: ("tib", "as asked") for name in errors.layers}, {})
    if config.maintenance is Maintenance.AUTO:
        alone = {name: path.dense[name] for name in errors.layers if path.kinds[name] is Dependence.TIMESTEP}
        rows = {name: row for part in store(alone, config.table.table) for name, row in part.rows().items()}
        errors.add("cache", path.dense, path.block.outputs(path.given, rows))
        schedules = 1 if config.num_inference_steps is None else len(config.num_inference_steps)
        choice = choose_tables(path, errors, config.table.table, config.table_budget, schedules)
        samples = len(next(iter(path.dense.values()))) // len(path.timesteps)
        errors.add("auto", path.dense, path.block.outputs(path.given, choice.known(rows, samples)))
    work.maintained = Maintained(config, tuple(own), choice.ways, errors, choice.rows)
    # A layer that is computed at some timesteps is met as it is then.
    work.place(learned, set(work.maintained.cached) - choice.rows.keys())


def _round(
    work: TemporalWork,
    layout: Layout,
    path: Path | None,
    schemes: Mapping[str, Scheme],
    quantize: Callable[[Path | None, Mapping[str, Scheme], int], dict[str, Quantized]],
) -> None:
    """Add layers that tables stand for, rounded to nearest: what a call that cannot be looked up computes with, and
    what rows of those are made of that read a condition."""
    kinds = layout.layers
    work.place(quantize(path, schemes, 0), {name for name in schemes if kinds[name] is Dependence.TIMESTEP})


def _calls_of_schedules(
    target: Any, models: Mapping[str, nn.Module], configs: Mapping[str, TFMQConfig], calibration: Any
) -> dict[str, list[LoopCalls]]:
    """How the components are called in the loops of the schedules that are asked for."""
    numbers = {name: (None,) if c.num_inference_steps is None else c.num_inference_steps for name, c in configs.items()}
    wanted: dict[int | None, list[str]] = {}
    for name, steps in numbers.items():
        for number in steps:
            wanted.setdefault(number, []).append(name)
    arguments = _call_of(target, calibration) if wanted else None
    found: dict[str, list[LoopCalls]] = {name: [] for name in configs}
    if arguments is None:
        return found
    for number, names in wanted.items():
        for name, own in calls_of_schedule(target, {n: models[n] for n in names}, number, arguments).items():
            found[name].append(own)
    return found


def take_tables_off(models: Mapping[str, nn.Module], spill: Transaction) -> dict[str, tuple[TFMQConfig, _TableState]]:
    """Detach the tables of models whose layers are about to be replaced, and return what they hold."""
    found = {}
    for name, model in models.items():
        table = table_of(model)
        if table is None:
            continue
        config = TFMQConfig(table.config, table.prepared)
        found[name] = (config, table_state(table))
        detach_table(model)
        # Undone after the layers are back, so registered before they go.
        spill.after_rollback(functools.partial(_restore_table, model, *found[name]))
    return found


def put_tables_back(models: Mapping[str, nn.Module], tables: Mapping[str, tuple[TFMQConfig, _TableState]]) -> None:
    """Attach these tables again; they stay those of the dense weights."""
    for name, (config, state) in tables.items():
        _restore_table(models[name], config, state)


def _restore_table(model: nn.Module, config: TFMQConfig, state: _TableState, own: TableConfig | None = None) -> None:
    detach_table(model)
    table = attach_table(model, own or config.table)
    table.prepared = config.num_inference_steps
    load_table_state(table, *state, adopt=True)


def rounded_bytes(models: Mapping[str, nn.Module], plans: Iterable[MethodPlan]) -> int:
    """Bytes of the weights that tables round in their place, at most."""
    rounding = {p.component for p in plans if isinstance(p.config, TFMQConfig) and p.config.table.weights in _ROUNDED}
    return sum(
        module.weight.numel() * module.weight.element_size()
        for name in rounding
        for module in models[name].modules()
        if type(module) is nn.Linear
    )


def attach_temporal(model: nn.Module, config: TFMQConfig, work: TemporalWork, spill: Transaction) -> None:
    """Put tables on a model whose weights are quantized, and what was learned on record."""
    spill.on_rollback(lambda: detach_table(model))
    spill.on_rollback(lambda: set_maintained(model, None))
    set_maintained(model, work.maintained)
    if work.tables is None:
        return
    if config.table.weights in _ROUNDED:
        with_tables = attach_table(model, replace(config.table, weights=WeightPlace.DEVICE)).lookups.values()
        detach_table(model)
        for lookup in with_tables:
            if type(lookup.layer) is nn.Linear:
                spill.keep(lookup.layer.weight)  # type: ignore[arg-type]
    _restore_table(model, config, work.tables, table_config(model, config, work.maintained))


def _call_of(target: Any, calibration: Any) -> dict[str, Any] | None:
    """Arguments of a call of the pipeline; None where there is none or they cannot be made up."""
    if not is_pipeline(target):
        return None
    try:
        item = items_of(target, calibration, 1)[0]
    except (ConfigError, IndexError) as error:
        _LOGGER.warning("%s: temporal tables are made in the first run: %s", type(target).__name__, error)
        return None
    return _arguments(target, item)


def _arguments(target: Any, item: Any) -> dict[str, Any]:
    # Some schedulers shift their timesteps by the size of the picture; of the others any will do.
    shifts = getattr(getattr(target, "scheduler", None), "config", {}).get("use_dynamic_shifting", False)
    return {**({} if shifts else small_output(target)), **pipeline_arguments(target, item, {})}
