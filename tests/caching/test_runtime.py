"""A schedule at work gives what a naive cache gives, runs nothing of what it leaves out, and computes when in doubt."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import HookRegistry, ModelHook
from torch._dynamo.utils import counters

import tiny
from caching.loops import Operations, inputs_of, loop, naive_cache, random_mask, schedule_for
from diffuse_compress.caching.call import ADAPTERS, CHANGED, MISSING, NAME, NOT_COMPOSED, NOT_RETURNED, OVER_BUDGET
from diffuse_compress.caching.config import CacheConfig
from diffuse_compress.caching.runtime import (
    apply_cache,
    cache_of,
    compile_variants,
    remove_cache,
)
from diffuse_compress.caching.units import units_of
from diffuse_compress.errors import CompressionConflictError, ConfigError, DiffuseCompressWarning, ModelStateError
from diffuse_compress.feature_cache import cache_disabled
from diffuse_compress.runtime import steps
from families import unknown_classes
from families.composition import SKIPS
from tolerance import KERNEL, assert_close

pytestmark = pytest.mark.usefixtures("fresh_thread")

STEPS = 5
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("unet", SKIPS),
    ("unet_sd1", {}),
    ("unet_sdxl", {"transformer_layers_per_block": (1, 1)}),
    ("dit", {"num_layers": 4}),
    ("pixart", {"num_layers": 3}),
    ("sd35", {}),
    ("flux", {"num_layers": 2, "num_single_layers": 3}),
    ("wan", {}),
    ("cogvideox", {}),
    ("hunyuan_video", {}),
    ("qwenimage", {}),
]


def stats(model: torch.nn.Module) -> Any:
    return steps.tracker_of(model).last.methods[NAME]


def reasons(model: torch.nn.Module) -> dict[str, int]:
    return {reason.what: count for reason, count in stats(model).misses.items()}


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert [bool(torch.equal(a, b)) for a, b in zip(found, wanted, strict=True)] == [True] * len(wanted)


def assert_near(found: list[torch.Tensor], wanted: list[torch.Tensor], dtype: torch.dtype = torch.float64) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert_close(other, one, KERNEL[dtype])


@pytest.mark.parametrize(("name", "config"), MODELS, ids=[name for name, _ in MODELS])
def test_every_family_reuses_as_a_naive_cache_does(name, config):
    # Wan adds its residuals in float32 whatever the dtype.
    model = tiny.build(name, dtype=torch.float32 if name == "wan" else torch.float64, **config)
    dtype = model.dtype
    inputs = inputs_of(model, batch=1)
    stock = loop(model, inputs, STEPS)
    for granularity in ("block", "branch"):
        count = len(units_of(model, granularity))
        apply_cache(model, schedule_for(model, torch.ones(STEPS, count, dtype=torch.uint8), granularity))
        assert_equal(loop(model, inputs, STEPS), stock)
        remove_cache(model)
        schedule = schedule_for(model, random_mask(STEPS, count), granularity)
        with naive_cache(model, schedule):
            expected = loop(model, inputs, STEPS)
        apply_cache(model, schedule)
        found = loop(model, inputs, STEPS)
        assert_near(found, expected, dtype)
        assert not torch.equal(found[-1], stock[-1])
        assert stats(model).hits == stats(model).planned == int((schedule.mask == 0).sum())
        remove_cache(model)
    assert_equal(loop(model, inputs, STEPS), stock)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert cache_of(model) is None
    assert steps.tracker_of(model) is None


@pytest.mark.parametrize("name", ["dit", "flux", "wan", "qwenimage", "cogvideox", "sd35", "hunyuan_video"])
def test_before_the_gates_the_gates_are_those_of_the_step(name):
    dtype = torch.float32 if name == "wan" else torch.float64
    model = tiny.build(name, dtype=dtype)
    inputs = inputs_of(model, batch=1)
    count = len(units_of(model, "branch"))
    schedule = schedule_for(model, random_mask(4, count, seed=1), "branch", cache_point="pre_gate")
    with naive_cache(model, schedule, raw=True):
        expected = loop(model, inputs, 4)
    apply_cache(model, schedule)
    assert_near(loop(model, inputs, 4), expected, dtype)
    remove_cache(model)
    with naive_cache(model, schedule):
        assert not torch.equal(loop(model, inputs, 4)[-1], expected[-1])


def test_a_forecast_adds_past_changes_by_their_weights():
    model = tiny.build("pixart", dtype=torch.float64, num_layers=3)
    inputs = inputs_of(model, batch=1)
    for granularity in ("block", "branch"):
        count = len(units_of(model, granularity))
        mask = random_mask(7, count, seed=2)
        mask[1] = 1
        coefficients = torch.zeros(7, count, 2)
        coefficients[:] = torch.tensor([1.5, -0.5])
        coefficients[3] = torch.tensor([0.75, 0.25])
        schedule = schedule_for(model, mask, granularity).with_mask(mask, coefficients)
        with naive_cache(model, schedule):
            expected = loop(model, inputs, 7)
        apply_cache(model, schedule)
        assert_near(loop(model, inputs, 7), expected)
        remove_cache(model)


@pytest.mark.parametrize("name", ["sana", "auraflow", "lumina2"])
def test_unknown_classes_reuse_whole_blocks(name):
    model = unknown_classes.build(name)
    inputs = unknown_classes.forward_kwargs(name)
    mask = random_mask(STEPS, len(units_of(model)), seed=4)
    schedule = schedule_for(model, mask)
    with naive_cache(model, schedule):
        expected = loop(model, inputs, STEPS)
    apply_cache(model, schedule)
    assert_near(loop(model, inputs, STEPS), expected, torch.float32)
    assert stats(model).hits == stats(model).planned == int((mask == 0).sum())
    with cache_disabled(model):
        stock = loop(model, inputs, STEPS)
    assert not all(torch.equal(a, b) for a, b in zip(stock, expected, strict=True))


def operations_of(model: torch.nn.Module, mask: torch.Tensor) -> list[list[str]]:
    """Operations of each step."""
    seen: list[list[str]] = []
    apply_cache(model, schedule_for(model, mask[:, None].expand(-1, len(units_of(model)))))
    with Operations() as operations:

        def before(step: int, given: dict[str, Any]) -> dict[str, Any]:
            operations.names = []
            seen.append(operations.names)
            return given

        loop(model, inputs_of(model, batch=1), len(mask), before=before)
    return seen


@pytest.mark.parametrize(("name", "streams"), [("flux", 2), ("dit", 1), ("wan", 1)])
def test_what_is_skipped_runs_no_operation(name, streams):
    mask = torch.tensor([1, 0, 0, 1], dtype=torch.uint8)

    def of(depth: int) -> list[list[str]]:
        config = {"num_layers": depth, "num_single_layers": depth} if name == "flux" else {"num_layers": depth}
        return operations_of(tiny.build(name, **config), mask)

    shallow, deep = of(1), of(4)
    # The embeddings, one addition for each stream, and the head; however deep the model is.
    assert deep[1] == deep[2] == shallow[1]
    assert len(deep[0]) > len(shallow[0]) + 60
    # Of work, what a model does whose blocks do nothing.
    idle = tiny.build(name, num_layers=1)
    for block in (m for m in idle.modules() if type(m).__name__.endswith("TransformerBlock")):
        block.forward = lambda hidden_states, *args, encoder_hidden_states=None, **kwargs: (
            hidden_states if name != "flux" else (encoder_hidden_states, hidden_states)
        )
    with Operations() as operations:
        loop(idle, inputs_of(idle, batch=1), 1)
    for work in ("addmm", "native_layer_norm", "_scaled_dot_product", "convolution", "gelu", "silu"):
        assert sum(work in op for op in deep[1]) == sum(work in op for op in operations.names), work
    assert streams == sum(op == "aten.add.Tensor" for op in deep[1]) - sum(
        op == "aten.add.Tensor" for op in operations.names
    )


def test_only_what_is_reused_is_kept_and_no_longer_than_that():
    model = tiny.build("pixart", num_layers=4)
    inputs = inputs_of(model, batch=1)
    mask = torch.tensor(
        [[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.uint8
    )
    cache = apply_cache(model, schedule_for(model, mask))
    kept: list[int] = []
    model.register_forward_hook(lambda *_: kept.append(cache.last_bytes))
    loop(model, inputs, 6)
    stream = inputs["hidden_states"].shape[-1] ** 2 // 4 * model.config.num_attention_heads
    size = stream * model.config.attention_head_dim * 4
    # Step 0 keeps the sum of blocks 2 and 3, step 1 block 0 for two steps, step 2 blocks 1 and 2, step 3 block 3.
    assert [count / size for count in kept] == [1, 1, 2, 1, 0, 0]
    assert [len(program.atoms) for program in cache._programs.values()] == [4]


def test_two_calls_in_a_step_have_caches_of_their_own():
    model = tiny.build("dit", dtype=torch.float64)
    both = inputs_of(model, batch=2)
    count = len(units_of(model))
    schedule = schedule_for(model, random_mask(STEPS, count))
    apply_cache(model, schedule)
    together = loop(model, both, STEPS)
    halves = [{name: value[half : half + 1] for name, value in both.items()} for half in (0, 1)]
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    apart = []
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            given = [
                {**h, "hidden_states": h["hidden_states"] * (1 - 0.03 * step), "timestep": t[None]} for h in halves
            ]
            apart.append(torch.cat([model(**one, return_dict=False)[0] for one in given]))
            scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
    assert_near(apart, together)
    assert stats(model).hits == stats(model).planned


def residuals(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    shape = (inputs["hidden_states"].shape[0], inputs["hidden_states"].shape[1], 128)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(*shape[:2], width, generator=generator, dtype=torch.float64) for _ in range(5)]
    return {"controlnet_block_samples": drawn[:2], "controlnet_single_block_samples": drawn[2:]}


def test_residuals_of_a_controlnet_are_added_afresh_in_every_step():
    model = tiny.build("flux", dtype=torch.float64, num_layers=2, num_single_layers=3)
    inputs = inputs_of(model, batch=1)
    inputs |= residuals(model, inputs)

    def fading(step: int, given: dict[str, Any]) -> dict[str, Any]:
        return {n: [r / (1 + step) for r in v] if n.startswith("controlnet") else v for n, v in given.items()}

    mask = torch.tensor([[1] * 5, [0] * 5, [1, 0, 0, 0, 1], [0] * 5, [1, 1, 0, 0, 0]], dtype=torch.uint8)
    schedule = schedule_for(model, mask)
    with naive_cache(model, schedule):
        expected = loop(model, inputs, STEPS, before=fading)
    apply_cache(model, schedule)
    assert_near(loop(model, inputs, STEPS, before=fading), expected)


# When in doubt --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dit():
    model = tiny.build("dit", num_layers=3)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.uint8)
    return model, inputs_of(model), schedule_for(model, mask)


def test_a_batch_that_shrinks_computes_and_goes_on(dit):
    model, inputs, schedule = dit
    apply_cache(model, schedule)
    names = ("hidden_states", "class_labels", "timestep")

    def drop(step: int, given: dict[str, Any]) -> dict[str, Any]:
        return {n: v[:1] if n in names and step >= 3 else v for n, v in given.items()}

    with pytest.warns(DiffuseCompressWarning, match="changed during the run"):
        found = loop(model, inputs, 6, before=drop)
    assert reasons(model) == {CHANGED.what: 2}
    with cache_disabled(model):
        stock = loop(model, inputs, 6, before=drop)
    assert_equal([found[3], found[5]], [stock[3], stock[5]])
    # What step 3 computed after all is reused in step 4.
    assert not torch.equal(found[4], stock[4])


def test_gradients_are_never_cut(dit):
    model, inputs, schedule = dit
    apply_cache(model, schedule)
    stock = copy.deepcopy(model)
    remove_cache(stock)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(6)

    def train() -> None:
        for t in scheduler.timesteps:
            given = {**inputs, "timestep": t.expand(2)}
            output = model(**given)[0]
            assert torch.equal(output, stock(**given)[0])
            assert output.requires_grad
            scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))

    with pytest.warns(DiffuseCompressWarning, match="gradients are enabled"):
        train()
    assert reasons(model) == {steps.GRADIENT.what: 9}


def test_a_loop_that_starts_within_the_schedule_fills_the_cache_first(dit):
    model, inputs, schedule = dit
    apply_cache(model, schedule)
    found = loop(model, inputs, 6, start=3)
    assert reasons(model) == {}
    assert stats(model).hits == 3
    with cache_disabled(model):
        stock = loop(model, inputs, 6, start=3)
    assert_equal([found[0], found[2]], [stock[0], stock[2]])
    assert not torch.equal(found[1], stock[1])


def test_a_second_expert_begins_with_an_empty_cache(dit):
    high, inputs, schedule = dit
    low = copy.deepcopy(high)
    stock = loop(low, inputs, 6)
    apply_cache(high, schedule)
    apply_cache(low, schedule)

    class Experts(torch.nn.Module):
        def forward(self, **given):
            return (high if steps.current() is None and self.step < 3 else low)(**given)

    experts = Experts()

    def count(step: int, given: dict[str, Any]) -> dict[str, Any]:
        experts.step = step
        return given

    with pytest.warns(DiffuseCompressWarning, match="had not been kept"):
        found = loop(experts, inputs, 6, before=count)
    assert_equal([found[3], found[5]], [stock[3], stock[5]])
    assert reasons(low) == {MISSING.what: 2}
    assert not torch.equal(found[4], stock[4])


def test_without_a_schedule_of_a_scheduler_everything_is_computed(dit):
    model, inputs, schedule = dit
    with torch.no_grad():
        expected = model(**inputs)[0]
        apply_cache(model, schedule)
        assert torch.equal(model(**inputs)[0], expected)
        assert torch.equal(model(**inputs)[0], expected)


def test_adapters_that_change_empty_the_cache():
    peft = pytest.importorskip("peft")
    model = tiny.build("flux")
    model.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False), "a")
    inputs = inputs_of(model, batch=1)
    mask = torch.tensor([[1, 1], [0, 0], [0, 0], [0, 0]], dtype=torch.uint8)
    apply_cache(model, schedule_for(model, mask))

    def switch(step: int, given: dict[str, Any]) -> dict[str, Any]:
        (model.disable_adapters if step == 2 else model.enable_adapters)()
        return given

    with pytest.warns(DiffuseCompressWarning, match="adapters changed"):
        found = loop(model, inputs, 4, before=switch)
    assert reasons(model) == {ADAPTERS.what: 4}
    with cache_disabled(model):
        stock = loop(model, inputs, 4, before=switch)
    assert_equal([found[2], found[3]], [stock[2], stock[3]])


def test_a_foreign_attention_processor_computes_what_was_to_run_in_part():
    model = tiny.build("flux")
    inputs = inputs_of(model, batch=1)
    mask = torch.ones(3, len(units_of(model, "branch")), dtype=torch.uint8)
    mask[1, 1] = 0  # the feed-forward of the first block
    apply_cache(model, schedule_for(model, mask, "branch"))

    class Mine(type(model.transformer_blocks[0].attn.processor)):
        pass

    model.transformer_blocks[0].attn.set_processor(Mine())
    with pytest.warns(DiffuseCompressWarning, match="cannot be run in part"):
        found = loop(model, inputs, 3)
    assert reasons(model) == {NOT_COMPOSED.what: 1}
    remove_cache(model)
    assert_equal(found, loop(model, inputs, 3))


def test_a_block_that_returns_something_else_is_computed():
    model = unknown_classes.build("sana")
    inputs = unknown_classes.forward_kwargs("sana")
    cls = type(model.transformer_blocks[0])

    class Other(cls):
        def forward(self, hidden_states, *args, **kwargs):
            return Both((super().forward(hidden_states, *args, **kwargs),))

    class Both(tuple):
        def __getattr__(self, name):
            return getattr(self[0], name)

    model.transformer_blocks[1].__class__ = Other
    model.norm_out.register_forward_pre_hook(
        lambda _, args: (args[0][0] if type(args[0]) is Both else args[0], *args[1:])
    )
    stock = loop(model, inputs, 3)
    mask = torch.tensor([[1, 1], [0, 0], [1, 1]], dtype=torch.uint8)
    apply_cache(model, schedule_for(model, mask))
    with pytest.warns(DiffuseCompressWarning, match="does not return the streams"):
        found = loop(model, inputs, 3)
    assert reasons(model) == {NOT_RETURNED.what: 1}
    assert stats(model).hits == 1
    assert_equal([found[0], found[2]], [stock[0], stock[2]])


def test_a_memory_budget_keeps_what_saves_most(dit):
    model, inputs, schedule = dit
    stream = 2 * 16 * 128 * 4
    cache = apply_cache(model, schedule, CacheConfig(memory_budget=stream))
    with pytest.warns(DiffuseCompressWarning, match="memory budget did not allow"):
        loop(model, inputs, 6)
    (program,) = cache._programs.values()
    assert program.peak() <= 1
    assert 0 < program.schedule.reused < schedule.reused
    remove_cache(model)
    apply_cache(model, schedule, CacheConfig(memory_budget=stream - 1))
    with pytest.warns(DiffuseCompressWarning, match="saved 0 of 9"):
        loop(model, inputs, 6)
    assert reasons(model) == {OVER_BUDGET.what: 9}
    assert cache_of(model).last_bytes == 0


@pytest.mark.parametrize("placement", [{"cache_dtype": torch.bfloat16}, {"cache_device": "cpu"}])
def test_what_is_kept_may_be_kept_elsewhere(dit, placement):
    model, inputs, schedule = dit
    apply_cache(model, schedule)
    expected = loop(model, inputs, 6)
    remove_cache(model)
    cache = apply_cache(model, schedule, CacheConfig(**placement))
    kept: list[int] = []
    model.register_forward_hook(lambda *_: kept.append(cache.last_bytes))
    found = loop(model, inputs, 6)
    if placement.get("cache_device"):
        assert_equal(found, expected)
    else:
        assert_near(found, expected, torch.bfloat16)
        assert max(kept) == 3 * 2 * 16 * 128 * 2


def test_another_number_of_steps_takes_the_nearest_rows(dit):
    model, inputs, schedule = dit
    apply_cache(model, schedule)
    with pytest.warns(DiffuseCompressWarning, match="made for 6 steps, and this run has 12"):
        loop(model, inputs, 12)
    assert stats(model).hits == stats(model).planned > 9
    loop(model, inputs, 12)  # a second warning would be an error
    remove_cache(model)
    apply_cache(model, schedule_for(model, schedule.mask, scheduler="DDIMScheduler"))
    with pytest.warns(DiffuseCompressWarning, match="calibrated with DDIMScheduler, used with FlowMatch"):
        loop(model, inputs, 6, scheduler=FlowMatchEulerDiscreteScheduler())


def test_a_cache_that_does_not_fit_changes_nothing(dit):
    model, _, schedule = dit
    other = tiny.build("dit", num_layers=2)
    with pytest.raises(ConfigError, match="its units are not those of this DiT"):
        apply_cache(other, schedule)
    with pytest.raises(ConfigError, match="made for DiTTransformer2DModel, got a Pix"):
        apply_cache(tiny.build("pixart", num_layers=3), schedule)
    model.transformer_blocks[2].forward = lambda *args, **kwargs: None
    with pytest.raises(ModelStateError, match="replaced by another library"):
        apply_cache(model, schedule)
    assert not any("forward" in block.__dict__ for block in model.transformer_blocks[:2])
    del model.transformer_blocks[2].forward
    apply_cache(model, schedule)
    with pytest.raises(CompressionConflictError, match="remove_cache"):
        apply_cache(model, schedule)


# Together with others -------------------------------------------------------------------------------------------------


class Counting(ModelHook):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("later", [False, True], ids=["hooks first", "cache first"])
def test_hooks_of_skipped_blocks_do_not_fire(dit, later):
    model, inputs, schedule = dit
    hooks = [Counting() for _ in model.transformer_blocks]

    def add() -> None:
        for block, hook in zip(model.transformer_blocks, hooks, strict=True):
            HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "offload")

    if not later:
        add()
    apply_cache(model, schedule)
    if later:
        add()
    expected = loop(model, inputs, 6)
    assert [hook.calls for hook in hooks] == schedule.mask.sum(dim=0).tolist()
    for block in model.transformer_blocks:
        block._diffusers_hook.remove_hook("offload")
    # The removal took the outermost place with it; the next run takes it back.
    assert_equal(loop(model, inputs, 6), expected)
    assert stats(model).hits == stats(model).planned
    remove_cache(model)
    assert not any("forward" in block.__dict__ for block in model.transformer_blocks)


def test_copies_and_pickles_follow_the_schedule_on_their_own(dit):
    model, inputs, schedule = dit
    apply_cache(model, schedule)
    expected = loop(model, inputs, 6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(loop(twin, inputs, 6), expected)
        assert stats(twin).hits == 9
        assert cache_of(twin) is not cache_of(model)
        with torch.no_grad():
            twin.transformer_blocks[0].ff.net[2].weight.zero_()
        remove_cache(twin)
    assert_equal(loop(model, inputs, 6), expected)


def test_interrupted_and_shared_pipelines():
    pipe = tiny.build_pipeline("pixart")
    count = len(units_of(pipe.transformer))
    mask = torch.ones(6, count, dtype=torch.uint8)
    mask[1::2] = 0
    apply_cache(pipe.transformer, schedule_for(pipe.transformer, mask))
    other = type(pipe)(**{**pipe.components, "scheduler": EulerDiscreteScheduler()})
    other.set_progress_bar_config(disable=True)
    expected, theirs = tiny.sample(pipe, num_inference_steps=6), tiny.sample(other, num_inference_steps=6)
    call = pipe.compression_stats().components["transformer"].methods[NAME]
    assert call.hits == call.planned == 3 * count

    def stop(module: Any, args: Any) -> None:
        if steps.current().step == 3:
            raise KeyboardInterrupt

    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.sample(pipe, num_inference_steps=6)
    handle.remove()
    assert torch.equal(tiny.sample(other, num_inference_steps=6), theirs)
    assert torch.equal(tiny.sample(pipe, num_inference_steps=6), expected)
    assert cache_of(pipe.transformer).call is None


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "granularity"),
    [("dit", {"num_layers": 3}, "branch"), ("flux", {"num_layers": 1, "num_single_layers": 2}, "block")],
    ids=["dit", "flux"],
)
def test_variants_compile_once_for_all_blocks(name, config, granularity, fresh_compiler):
    model = tiny.build(name, **config)
    inputs = inputs_of(model, batch=1)
    mask = torch.ones(3, len(units_of(model, granularity)), dtype=torch.uint8)
    mask[1, ::3], mask[2, -2:] = 0, 0
    apply_cache(model, schedule_for(model, mask, granularity))
    expected = loop(model, inputs, 3)
    variants = compile_variants(model, backend="eager")
    assert_equal(loop(model, inputs, 3), expected)
    graphs = int(counters["stats"]["unique_graphs"])
    assert graphs == len(variants) <= 4
    assert not counters["graph_break"]
    assert_equal(loop(model, inputs, 3), expected)
    assert int(counters["stats"]["unique_graphs"]) == graphs


@pytest.mark.parametrize("later", [False, True], ids=["compiled first", "cache first"])
def test_blocks_that_a_user_compiles_stay_compiled(later, fresh_compiler):
    model = tiny.build("dit", num_layers=2)
    inputs = inputs_of(model, batch=1)
    mask = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 1]], dtype=torch.uint8)
    schedule = schedule_for(model, mask)
    apply_cache(model, schedule)
    expected = loop(model, inputs, 4)
    if not later:
        remove_cache(model)
    for block in model.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    if not later:
        apply_cache(model, schedule)
    assert_equal(loop(model, inputs, 4), expected)
    graphs = int(counters["stats"]["unique_graphs"])
    assert 1 <= graphs <= 2
    loop(model, inputs, 4)
    assert int(counters["stats"]["unique_graphs"]) == graphs
    assert stats(model).hits == int((mask == 0).sum())
    remove_cache(model)
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_denoiser_with_a_cache_is_not_compiled_as_a_whole(wrapped, dit, fresh_compiler):
    model, inputs, schedule = dit
    apply_cache(model, schedule)
    compiled = torch.compile(model, backend="eager") if wrapped else model
    if not wrapped:
        model.compile(backend="eager")
    with pytest.raises(Exception, match="compile_repeated_blocks"):
        loop(compiled, inputs, 2)
