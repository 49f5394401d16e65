"""A schedule at work: the option of every block that decides, step by step, what runs and what is added instead.

For each call of the denoiser whose place in the loop is known a ``Call`` follows the compiled schedule from block to
block. Of a block that is left out nothing runs: no norm, no projection of its conditioning, no hook.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.call import NAME, Call
from diffuse_compress.caching.compiler import Program, compile_schedule, within_memory
from diffuse_compress.caching.config import CacheConfig
from diffuse_compress.caching.outputs import ModelBoundary, OutputCall
from diffuse_compress.caching.patterns import Op, Variants, run_pattern
from diffuse_compress.caching.schedule import CachePoint, Schedule, noise_levels
from diffuse_compress.caching.store import Signature
from diffuse_compress.caching.units import (
    BLOCK_KIND,
    LEVEL_KIND,
    MODEL_KIND,
    Granularity,
    Site,
    Unit,
    below_of,
    sites_of,
    units_of,
)
from diffuse_compress.components import unwrap
from diffuse_compress.errors import CompressionConflictError, ConfigError, DiffuseCompressWarning, ModelStateError
from diffuse_compress.families.base import BlockKind
from diffuse_compress.families.boundary import Boundary
from diffuse_compress.runtime.blocks import BlockOption, disown, keep_outermost, known_kind, own
from diffuse_compress.runtime.run import Run
from diffuse_compress.runtime.steps import Consumer, current, hook_owner, remove_hooks, track, tracker_of, untrack

__all__ = ["NAME", "FeatureCache", "apply_cache", "cache_of", "caches_off", "compile_variants", "remove_cache"]


@dataclass(frozen=True)
class Planner:
    """Units that a schedule reuses in each step of a run; a value, so that tracked models can be copied and pickled."""

    reused: tuple[int, ...]
    levels: torch.Tensor

    def __call__(self, run: Run) -> Sequence[int] | None:
        if run.num_rows is None or run.first_row is None:
            return None
        reused: Sequence[int] = self.reused
        if run.num_rows != len(reused):
            rows = _rows_for(run, self.levels)
            reused = [0, *(self.reused[row] for row in rows[1:])]
        # The first step computes all, wherever in the schedule the run starts.
        return [0, *reused[run.first_row + 1 :]]


def _rows_for(run: Run, levels: torch.Tensor) -> list[int]:
    distance = _levels_of(run).double()[:, None] - levels.double()[None]
    rows: list[int] = distance.abs().argmin(dim=1).tolist()
    return rows


def _levels_of(run: Run) -> torch.Tensor:
    assert run.timesteps is not None
    return noise_levels(run.scheduler(), torch.tensor(run.values))


class FeatureCache:
    """A schedule on a model; made by :func:`apply_cache`.

    Attributes:
        schedule: as it was given.
        config: how features are kept, and how the schedule was found.
        placement: dtype and device of what is kept.
        memory_budget: bytes that may be kept for each call of a step, or None.
        enabled: False computes everything.
        variants: compiled functions of its blocks, or None.
        last_bytes: what the last call left for later steps.
        peak_bytes: the most that a call has left for later steps.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, config: CacheConfig) -> None:
        self.schedule = schedule
        self.config = config
        self.placement = config.placement
        self.memory_budget = config.memory_budget
        planner = Planner(tuple((1 - schedule.mask.int()).sum(dim=1).tolist()), schedule.levels)
        self.consumer = Consumer(NAME, planner, config.strict)
        self.merge = schedule.cache_point is CachePoint.POST_GATE
        self.sites = sites_of(model, schedule.units, merge=self.merge)
        self.boundaries = [_boundary(model.get_submodule(site.block), site) for site in self.sites]
        self.below = below_of(model) if any(site.modules for site in self.sites) else None
        self.enabled = True
        self.variants: Variants | None = None
        self.last_bytes = self.peak_bytes = 0
        self._warned: set[str] = set()
        self._programs: dict[Any, Program] = {}
        self._calls = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_calls", "_programs", "variants")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.variants, self._programs, self._calls = None, {}, threading.local()

    @property
    def owned(self) -> list[str]:
        """Names of the modules that are run or left out."""
        return [name for site in self.sites for name in site.owned]

    @property
    def whole_steps(self) -> bool:
        """The one unit is the model."""
        return self.sites[0].is_model

    @property
    def call(self) -> Call | None:
        """The call of the model that is running in this thread, if it follows the schedule."""
        return getattr(self._calls, "call", None)

    def enable(self, model: nn.Module, enabled: bool) -> None:
        """Follow the schedule from the next call on, or compute everything, which is no plan that could be missed."""
        self.enabled = enabled
        tracker = tracker_of(model)
        assert tracker is not None
        if enabled:
            tracker.consumers[NAME] = self.consumer
        else:
            tracker.consumers.pop(NAME, None)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the model."""
        if torch.compiler.is_compiling():
            _refuse_compilation()
            return
        for name in self.owned:
            keep_outermost(module.get_submodule(name))
        # After an interrupt a call may be left over: torch's hooks see exceptions only.
        call = self._calls.call = self._begin(module) if self.enabled else None
        if call is not None and self.below is not None:
            given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
            call.injected = any(given.get(name) is not None for name in self.below.injected)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model, called after an exception too."""
        if torch.compiler.is_compiling():
            return
        call, self._calls.call = self.call, None
        if call is not None:
            self.last_bytes = call.end(failed=output is None)
            self.peak_bytes = max(self.peak_bytes, self.last_bytes)

    def program(self, run: Run, streams: Signature) -> Program:
        """The schedule compiled for a run, and for streams of this size if there is a budget."""
        if self.whole_steps and (self.schedule.input_coefficients is None or run.num_rows != self.schedule.num_steps):
            streams = {name: value for name, value in streams.items() if name == "output"}
        size = 0
        if self.memory_budget is not None and len({site.chain for site in self.sites}) == 1:
            size = sum(shape.numel() * (self.placement.dtype or dtype).itemsize for shape, dtype, _ in streams.values())
        schedule = self.schedule
        same = run.num_rows == schedule.num_steps
        key = (None if same else tuple(run.values), size)
        if key not in self._programs:
            if not same:
                schedule = schedule.resampled(torch.tensor(run.values), _levels_of(run))
                self._warn_resampled(schedule)
            if size and self.memory_budget is not None:
                schedule = within_memory(schedule, self.sites, [size] * len(self.sites), self.memory_budget)
            self._programs[key] = compile_schedule(schedule, self.sites, merge=self.merge)
        return self._programs[key]

    def _warn_resampled(self, schedule: Schedule) -> None:
        if "steps" in self._warned:
            return
        self._warned.add("steps")
        warnings.warn(
            f"feature cache: the schedule was made for {self.schedule.num_steps} steps, and this run has "
            f"{schedule.num_steps}: each takes the row of the nearest noise level, which reuses "
            f"{100 * schedule.reused:.0f} % instead of {100 * self.schedule.reused:.0f} %. Calibrate one for "
            f"{schedule.num_steps} steps for best quality.",
            DiffuseCompressWarning,
            stacklevel=2,
        )

    def _begin(self, module: nn.Module) -> Call | None:
        context = current()
        if context is None or context.tracker is not tracker_of(module) or context.run is None or context.row is None:
            return None
        self._warn_scheduler(type(context.run.scheduler()).__name__)
        planned = self.consumer.plan(context.run)
        wanted = planned[context.step] if planned is not None and context.step is not None else 0
        if context.blocker is not None:
            if wanted:
                context.miss(NAME, context.blocker, wanted)
            return None
        kind = OutputCall if self.whole_steps else Call
        return kind(self, context, context.run, context.row, module, wanted)

    def _warn_scheduler(self, name: str) -> None:
        if name != self.schedule.scheduler and "scheduler" not in self._warned:
            self._warned.add("scheduler")
            self.schedule.check(self.schedule.model, self.schedule.units, scheduler=name)


def _boundary(module: nn.Module, site: Site) -> Boundary:
    return ModelBoundary(module) if site.is_model else Boundary(module, known_kind(module))


class CacheOption(BlockOption):
    """Of one block, or of the number of a module that is run for one value; ``composes`` only where the units are
    branches of it."""

    name, rank, wraps = NAME, 10, True

    def __init__(self, cache: FeatureCache, site: int, number: int) -> None:
        self.cache = cache
        self.site = site
        self.number = number
        self.composes = not cache.sites[site].whole

    def around(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: Any) -> Any:
        """Runs the block, or adds what is kept of it."""
        call = self.cache.call
        if call is None:
            return run(*args, **kwargs)
        if self.cache.sites[self.site].modules:
            return call.below(self.site, self.number, block, args, kwargs, run)
        return call.at(self.site, args, kwargs, run)

    def instead(
        self,
        block: nn.Module,
        kind: BlockKind | None,
        options: list[BlockOption],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs the branches that :meth:`around` found must run, or the whole block as it was compiled."""
        if torch.compiler.is_compiling():
            return NotImplemented
        call, variants = self.cache.call, self.cache.variants
        parts = None if call is None else call.parts
        if parts is not None and parts.site == self.site:
            if kind is None:
                return NotImplemented
            below = [option for option in options if option is not self and option.composes]
            function = run_pattern if variants is None else variants.pattern
            result = function(block, kind, below, parts.pattern, parts.given, args, kwargs)
            if result is None:
                return NotImplemented
            output, parts.kept = result
            return output
        if variants is None or len(options) > 1:
            return NotImplemented
        if self.composes and kind is not None:
            pattern = (Op.COMPUTE,) * self.cache.sites[self.site].count
            result = variants.pattern(block, kind, [], pattern, [], args, kwargs)
            return NotImplemented if result is None else result[0]
        return variants.forward(block, args, kwargs)


@torch.compiler.assume_constant_result
def _refuse_compilation() -> None:
    """Runs while Dynamo traces the model: an exception of traced code would make it run eagerly, without a word."""
    raise ModelStateError(
        "feature cache: a denoiser with a cache cannot be compiled as a whole, since every step would become a graph "
        "of its own. Compile its blocks: model.compile_repeated_blocks(), or compile_variants(model) under a schedule "
        "of blocks or branches, or block.compile() each."
    )


def apply_cache(model: nn.Module, schedule: Schedule, config: CacheConfig | None = None) -> FeatureCache:
    """Let ``model`` follow ``schedule`` from its next run on.

    Args:
        model: a denoiser, in the loop of a diffusers scheduler.
        schedule: made for its class and size.
        config: how features are kept.

    Raises:
        ConfigError: the schedule does not belong to the model.
        CompressionConflictError: the model has a cache already.
        ModelStateError: a block's forward was replaced by another library.
    """
    model = unwrap(model)
    if cache_of(model) is not None:
        raise CompressionConflictError(f"{type(model).__name__} has a feature cache; remove_cache(model) first.")
    try:
        units = _units_like(model, schedule.units)
    except ConfigError as error:
        raise ConfigError(f"feature cache: {error}") from error
    schedule.check(type(model).__name__, units)
    cache = FeatureCache(model, schedule, config or CacheConfig())
    owned: list[nn.Module] = []
    try:
        for index, site in enumerate(cache.sites):
            for number, name in enumerate(site.owned):
                block = model.get_submodule(name)
                own(block, CacheOption(cache, index, number))
                owned.append(block)
    except BaseException:
        for block in owned:
            disown(block, NAME)
        raise
    track(model, cache.consumer)
    model.register_forward_pre_hook(cache.enter, with_kwargs=True)
    model.register_forward_hook(cache.leave, always_call=True)
    return cache


def _units_like(model: nn.Module, wanted: Sequence[Unit]) -> tuple[Unit, ...]:
    """Units of the model in the granularity of others."""
    kinds = {unit.kind for unit in wanted}
    if MODEL_KIND in kinds:
        return units_of(model, Granularity.MODEL)
    if LEVEL_KIND in kinds:
        return units_of(model, Granularity.LEVEL)
    units = units_of(model, Granularity.BLOCK)
    same_blocks = {unit.block for unit in units} == {unit.block for unit in wanted}
    fits = same_blocks and (kinds == {BLOCK_KIND} or units == tuple(wanted))
    return units if fits else units_of(model, Granularity.BRANCH)


def remove_cache(model: nn.Module) -> None:
    """The model as it was before :func:`apply_cache`; nothing if it has no cache."""
    model = unwrap(model)
    cache = cache_of(model)
    if cache is None:
        return
    for name in cache.owned:
        disown(model.get_submodule(name), NAME)
    remove_hooks(model, cache)
    untrack(model, NAME)


def cache_of(model: nn.Module) -> FeatureCache | None:
    """The cache of a model, if it has one."""
    return hook_owner(model, FeatureCache)


@contextlib.contextmanager
def caches_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these models compute everything, with their caches in place; those without one are left alone."""
    before = {model: (cache, cache.enabled) for model in models if (cache := cache_of(model)) is not None}
    for model, (cache, _) in before.items():
        cache.enable(model, False)
    try:
        yield
    finally:
        for model, (cache, enabled) in before.items():
            if cache_of(model) is cache:
                cache.enable(model, enabled)


def compile_variants(model: nn.Module, **options: Any) -> Variants:
    """Compile what the cache runs of the model's blocks: one function for each kind of block and each pattern of
    branches, shared by all blocks of the kind, at the first call that needs it.

    Blocks that were compiled one by one are not any more. ``options`` are those of ``torch.compile``; ``fullgraph`` is
    True unless given.

    Raises:
        ConfigError: the model has no cache, or one of whole steps, which runs the model as it is.
    """
    cache = cache_of(model)
    if cache is None:
        raise ConfigError(f"{type(model).__name__} has no feature cache; apply_cache(model, schedule) first.")
    if cache.whole_steps:
        raise ConfigError(
            f"{type(model).__name__}: its cache leaves out whole steps, so its blocks have no variants. Compile them "
            "as they are: model.compile_repeated_blocks()."
        )
    model = unwrap(model)
    for name in cache.owned:
        block: Any = model.get_submodule(name)
        keep_outermost(block)
        block._compiled_call_impl = None
    cache.variants = Variants(options)
    return cache.variants
