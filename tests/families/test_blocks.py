"""Composed from its family's branches, every supported block gives the bits of its stock forward."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import tiny
from diffuse_compress.errors import DiffuseCompressWarning, ModelStateError
from diffuse_compress.families.registry import FAMILIES, family_of
from diffuse_compress.runtime import blocks
from diffuse_compress.runtime.blocks import BlockOption, disown, own, owned_options, why_not_composed
from families.composition import CASES, IDS, Watch, output_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "side"), [(2, 8), (1, 12)])
@pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
def test_composed_equals_stock(name, config, batch, side, dtype):
    model = tiny.build(name, dtype=dtype, **config)
    inputs = tiny.inputs_for(model, batch=batch, side=side)
    expected = output_of(model, inputs)
    family = family_of(model)
    names = family.blocks(model)
    watch = Watch()
    for block in names:
        own(model.get_submodule(block), watch)
    assert torch.equal(output_of(model, inputs), expected)
    wanted = [
        branch.name
        for block in names
        for branch in family.kind_of(model.get_submodule(block)).branches(model.get_submodule(block))
    ]
    assert watch.seen == wanted
    assert len(names) >= 2
    for block in names:
        disown(model.get_submodule(block), "watch")
    assert torch.equal(output_of(model, inputs), expected)
    assert not any("forward" in module.__dict__ or owned_options(module) for module in model.modules())


@pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
def test_blocks_are_listed_in_the_order_they_run_in(name, config):
    model = tiny.build(name, **config)
    names = family_of(model).blocks(model)
    classes = {type(model.get_submodule(block)) for block in names}
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, block=block: order.append(block))
        for block, module in model.named_modules()
        if type(module) in classes
    ]
    output_of(model, tiny.inputs_for(model))
    for handle in handles:
        handle.remove()
    # Attention inside of a listed block is its own.
    inner = [block for block in order if any(block.startswith(f"{name}.") for name in names)]
    assert [block for block in order if block not in inner] == names
    assert {block: why_not_composed(model.get_submodule(block)) for block in names} == dict.fromkeys(names)


@pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
def test_branches_hold_the_modules_they_name(name, config):
    """A branch that is skipped must skip the layers it says it owns, and no layer may belong to two branches."""
    model = tiny.build(name, **config)
    family = family_of(model)
    inputs = tiny.inputs_for(model)
    for block_name in family.blocks(model):
        block = model.get_submodule(block_name)
        branches = family.kind_of(block).branches(block)
        for branch in branches:
            ran: list[str] = []
            handles = [
                block.get_submodule(part).register_forward_hook(lambda *_, part=part, ran=ran: ran.append(part))
                for other in branches
                for part in other.modules
            ]
            option = Skip(branch.name)
            own(block, option)
            try:
                output_of(model, inputs)
            finally:
                disown(block, option.name)
                for handle in handles:
                    handle.remove()
            assert option.skipped
            assert not set(ran) & set(branch.modules)
            assert set(ran) == {part for other in branches for part in other.modules} - set(branch.modules)


class Skip(BlockOption):
    """Adds zeros instead of one branch's output."""

    name = "skip"

    def __init__(self, branch: str) -> None:
        self.target, self.skipped = branch, False

    def branch(self, block, branch, streams, conditioning, compute):
        if branch.name != self.target:
            return compute()
        self.skipped = True
        return {name: x.new_zeros(()) for name, x in streams.items()}


@pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
def test_smoothing_names_layers_that_share_an_input(name, config):
    model = tiny.build(name, **config)
    family = family_of(model)
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for block_name in family.blocks(model):
        block = model.get_submodule(block_name)
        for entry in family.kind_of(block).smoothing(block):
            for layer in entry.consumers:
                full = f"{block_name}.{layer}"
                handles.append(
                    model.get_submodule(full).register_forward_pre_hook(
                        lambda _, args, full=full: seen.__setitem__(full, args[0].clone())
                    )
                )
    output_of(model, tiny.inputs_for(model))
    for handle in handles:
        handle.remove()
    for block_name in family.blocks(model):
        block = model.get_submodule(block_name)
        for entry in family.kind_of(block).smoothing(block):
            first, *others = (seen[f"{block_name}.{layer}"] for layer in entry.consumers)
            assert all(torch.equal(first, other) for other in others), entry
            if entry.producer is not None:
                assert block.get_submodule(entry.producer).weight.shape[0] in (first.shape[-1], 2 * first.shape[-1])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        case
        for case in CASES
        if case[0]
        in {"dit", "sd3", "sd35", "flux", "qwenimage", "hunyuan_video", "unet_sd1", "llama", "gemma", "gemma3"}
    ],
)
def test_scales_move_into_what_precedes_without_changing_the_function(name, config):
    """Smoothing as its entries say, in float64: consumers times s, and the producer or modulation over s."""
    model = tiny.build(name, dtype=torch.float64, **config)
    inputs = tiny.inputs_for(model)
    expected = output_of(model, inputs)
    moved = 0
    with torch.no_grad():
        for block_name in family_of(model).blocks(model):
            block = model.get_submodule(block_name)
            for entry in family_of(model).kind_of(block).smoothing(block):
                moved += smooth(block, entry)
    assert moved > 0
    actual = output_of(model, inputs)
    # Gemma's norms compute in float32 whatever the dtype.
    rtol, atol = (1e-3, 1e-6) if name.startswith("gemma") else (1e-6, 1e-8)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def smooth(block: torch.nn.Module, entry) -> int:
    consumers = [block.get_submodule(layer) for layer in entry.consumers]
    width = consumers[0].in_features
    s = torch.rand(width, dtype=torch.float64) + 0.5
    if entry.producer is not None:
        producer = block.get_submodule(entry.producer)
        if isinstance(producer, torch.nn.Linear):
            producer.weight.div_(s[:, None])
            if producer.bias is not None:
                producer.bias.div_(s)
        elif entry.unit_offset:
            producer.weight.copy_((1 + producer.weight) / s - 1)
        else:
            producer.weight.div_(s)
            if getattr(producer, "bias", None) is not None:
                producer.bias.div_(s)
    elif entry.modulation is not None:
        linear = block.get_submodule(entry.modulation)
        weight, bias = linear.weight.view(entry.chunks, width, -1), linear.bias.view(entry.chunks, width)
        for chunk in (entry.shift, entry.scale):
            weight[chunk].div_(s[:, None])
        bias[entry.shift].div_(s)
        bias[entry.scale].copy_((1 + bias[entry.scale]) / s - 1)
    else:
        return 0
    for layer in consumers:
        layer.weight.mul_(s)
    return 1


def test_a_deep_copy_owns_its_own_forward():
    model = tiny.build("pixart")
    block = model.transformer_blocks[0]
    own(block, Watch())
    twin = copy.deepcopy(model)
    inputs = tiny.inputs_for(model)
    output_of(twin, inputs)
    assert owned_options(block)[0].seen == []
    assert owned_options(twin.transformer_blocks[0])[0].seen == ["attn1", "attn2", "ff"]
    with torch.no_grad():
        twin.transformer_blocks[0].ff.net[2].weight.zero_()
    assert not torch.equal(output_of(twin, inputs), output_of(model, inputs))


class Doubled(BlockOption):
    """Doubles what the feed-forward adds, so that its absence shows."""

    name = "doubled"

    def branch(self, block, branch, streams, conditioning, compute):
        factor = 2 if branch.name == "ff" else 1
        return {name: factor * delta for name, delta in compute().items()}


def test_a_pickled_block_owns_its_own_forward():
    model = tiny.build("pixart")
    block, inputs = model.transformer_blocks[0], tiny.inputs_for(model)
    stock = output_of(model, inputs)
    own(block, Doubled())
    expected = output_of(model, inputs)
    twin = pickle.loads(pickle.dumps(model))
    assert not torch.equal(expected, stock)
    assert torch.equal(output_of(twin, inputs), expected)
    with torch.no_grad():
        twin.transformer_blocks[0].attn1.to_q.weight.zero_()
    assert torch.equal(output_of(model, inputs), expected)
    disown(twin.transformer_blocks[0], "doubled")
    assert "forward" not in twin.transformer_blocks[0].__dict__


_IN_A_FRESH_PROCESS = """
import sys, torch
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
from diffuse_compress.runtime import blocks
block, composed, compose = model.transformer_blocks[0], [], blocks.compose
blocks.compose = lambda *args: composed.append(args[0]) or compose(*args)
assert [option.name for option in blocks.owned_options(block)] == ["option"]
with torch.no_grad():
    assert torch.equal(model(**inputs)[0], expected)
assert composed == [block]
"""


def test_a_saved_model_loads_in_a_fresh_process(tmp_path):
    model = tiny.build("pixart")
    inputs = tiny.inputs_for(model)
    expected = output_of(model, inputs)
    own(model.transformer_blocks[0], BlockOption())
    torch.save((model, inputs, expected), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", _IN_A_FRESH_PROCESS, tmp_path / "model.pt"], check=True)


def test_loaded_under_another_version_of_its_class_a_block_runs_its_stock_forward(monkeypatch):
    model = tiny.build("pixart")
    inputs = tiny.inputs_for(model)
    expected = output_of(model, inputs)
    own(model.transformer_blocks[0], Doubled())
    data = pickle.dumps(model)
    monkeypatch.setattr(blocks, "fingerprint", lambda cls, replaced=(): "of another release")
    with pytest.warns(DiffuseCompressWarning, match="this version of BasicTransformerBlock is not the one"):
        twin = pickle.loads(data)
    assert torch.equal(output_of(twin, inputs), expected)
    with pytest.raises(ModelStateError, match="this version"):
        own(twin.transformer_blocks[0], Watch())
    disown(twin.transformer_blocks[0], "doubled")
    assert "forward" not in twin.transformer_blocks[0].__dict__


def test_options_are_asked_by_rank_and_presets_reach_the_branches():
    model = tiny.build("dit")
    block, inputs = model.transformer_blocks[0], tiny.inputs_for(model)
    expected = output_of(model, inputs)
    order: list[str] = []

    class Ranked(BlockOption):
        def __init__(self, name, rank):
            self.name, self.rank = name, rank

        def branch(self, block, branch, streams, conditioning, compute):
            order.append(self.name)
            return compute()

    class Table(BlockOption):
        name, rank = "table", 0

        def prepare(self, block, conditioning):
            emb = block.norm1.emb(conditioning.timestep, conditioning.class_labels, hidden_dtype=torch.float32)
            conditioning.preset("modulation", block.norm1.linear(block.norm1.silu(emb)).chunk(6, dim=1))

    own(block, Ranked("fused", 20))
    own(block, Ranked("cache", 10))
    own(block, Table())
    calls: list[int] = []
    block.norm1.linear.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(output_of(model, inputs), expected)
    assert order == ["cache", "fused"] * 2
    assert len(calls) == 1  # the table's own: no branch computed it again
    with pytest.raises(ModelStateError, match="already has the option 'cache'"):
        own(block, Ranked("cache", 10))


def test_an_unknown_attention_processor_runs_the_stock_forward():
    model = tiny.build("flux")
    block, inputs, watch = model.transformer_blocks[0], tiny.inputs_for(model), Watch()
    own(block, watch)

    class Mine(type(block.attn.processor)):
        pass

    block.attn.set_processor(Mine())
    assert "Mine" in (blocks.why_not_composed(block) or "")
    output_of(model, inputs)
    assert watch.seen == []
    fresh = tiny.build("flux").transformer_blocks[0]
    fresh.attn.set_processor(Mine())
    with pytest.raises(ModelStateError, match="its attention runs Mine"):
        own(fresh, Watch())


def test_another_version_of_a_class_keeps_its_forward(monkeypatch):
    block = tiny.build("wan").blocks[0]
    monkeypatch.setattr(blocks, "fingerprint", lambda cls, replaced=(): "of another release")
    with pytest.raises(ModelStateError, match="this version of WanTransformerBlock is not the one that we know"):
        own(block, Watch())


def test_an_adapter_switches_a_fused_option_off():
    peft = pytest.importorskip("peft")
    model, stock = tiny.build("flux"), tiny.build("flux")

    class Fused(Watch):
        name, fuses = "fused", ("attn.to_q",)

    watch, fused = Watch(), Fused()
    own(model.transformer_blocks[0], watch)
    own(model.transformer_blocks[0], fused)
    inputs = tiny.inputs_for(model)
    output_of(model, inputs)
    assert fused.seen == watch.seen == ["attn", "ff", "ff_context"]
    for each in (model, stock):
        each.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    stock.load_state_dict(model.state_dict())
    assert torch.equal(output_of(model, inputs), output_of(stock, inputs))
    assert len(fused.seen) == 3
    assert len(watch.seen) == 6


def test_a_hook_on_a_layer_switches_a_fused_option_off():
    """Offloading brings a layer's weights, and an observer sees its input, only when the layer itself runs."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = tiny.build("pixart")
    block, inputs = model.transformer_blocks[0], tiny.inputs_for(model)
    fused = Watch()
    fused.fuses = ("attn1.to_q",)
    own(block, fused)
    observer = block.attn1.to_q.register_forward_pre_hook(lambda *_: None)
    output_of(model, inputs)
    assert fused.seen == []
    observer.remove()
    add_hook_to_module(block.attn1.to_q, AlignDevicesHook(execution_device="cpu"))
    output_of(model, inputs)
    assert fused.seen == []
    remove_hook_from_module(block.attn1.to_q)
    output_of(model, inputs)
    assert fused.seen == ["attn1", "attn2", "ff"]


@pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
def test_composed_equals_stock_with_adapters_in_inference_mode_and_under_autocast(name, config):
    peft = pytest.importorskip("peft")
    model = tiny.build(name, **config)
    inputs = tiny.inputs_for(model)
    queries = [layer for layer, _ in model.named_modules() if layer.endswith((".to_q", ".q_proj", ".to_out.0"))]
    if queries:
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=queries, init_lora_weights=False), model)
        with torch.no_grad():
            for layer, parameter in model.named_parameters():
                if ".lora_" in layer:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
    expected = [torch.inference_mode()(model)(**inputs), _autocast(model, inputs)]
    watch = Watch()
    for block in family_of(model).blocks(model):
        own(model.get_submodule(block), watch)
    actual = [torch.inference_mode()(model)(**inputs), _autocast(model, inputs)]
    for after, before in zip(actual, expected, strict=True):
        assert torch.equal(after[0], before[0])
    assert watch.seen


def _autocast(model: torch.nn.Module, inputs: dict):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return model(**inputs)


def test_hooks_of_accelerate_and_diffusers_stay_outside():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
    from diffusers.hooks import HookRegistry, ModelHook

    model = tiny.build("pixart")
    inputs = tiny.inputs_for(model)
    expected = output_of(model, inputs)
    first, second = model.transformer_blocks
    add_hook_to_module(first, AlignDevicesHook(execution_device="cpu"))
    HookRegistry.check_if_exists_or_initialize(second).register_hook(ModelHook(), "theirs")
    watch = Watch()
    own(first, watch)
    own(second, watch)
    assert torch.equal(output_of(model, inputs), expected)
    assert len(watch.seen) == 6
    remove_hook_from_module(first)
    second._diffusers_hook.remove_hook("theirs")
    assert torch.equal(output_of(model, inputs), expected)
    assert len(watch.seen) == 12
    disown(first, "watch")
    disown(second, "watch")
    assert torch.equal(output_of(model, inputs), expected)
    assert len(watch.seen) == 12


def test_a_replaced_forward_is_left_alone():
    block = tiny.build("pixart").transformer_blocks[0]
    block.forward = lambda *args, **kwargs: None
    with pytest.raises(ModelStateError, match="replaced by another library"):
        own(block, Watch())


def test_every_family_is_tested():
    tested = {family_of(tiny.build(name, **config)).name for name, config in CASES}
    assert tested == {family.name for family in FAMILIES}


def test_blocks_compose_under_compile():
    model = tiny.build("pixart")
    inputs = tiny.inputs_for(model)
    expected = output_of(model, inputs)
    for block in model.transformer_blocks:
        own(block, BlockOption())
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(output_of(model, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_wan_with_pictures_and_with_a_timestep_for_every_token(dtype):
    """Wan 2.1 image-to-video adds picture tokens to cross-attention; Wan 2.2 TI2V gives tokens their own timesteps."""
    with_picture = tiny.build("wan", dtype=dtype, added_kv_proj_dim=128, image_dim=32)
    inputs = tiny.inputs_for(with_picture)
    inputs["encoder_hidden_states_image"] = torch.randn(2, 257, 32).to(dtype)
    per_token = tiny.build("wan", dtype=dtype)
    tokens = tiny.inputs_for(per_token)
    count = tokens["hidden_states"][0, 0].numel() // 4
    tokens["timestep"] = torch.where(torch.arange(count) < count // 2, 0, tokens["timestep"][:, None])
    for model, arguments in ((with_picture, inputs), (per_token, tokens)):
        expected, watch = output_of(model, arguments), Watch()
        for block in model.blocks:
            own(block, watch)
        assert torch.equal(output_of(model, arguments), expected)
        assert len(watch.seen) == 6


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_decoders_keep_their_cache(name):
    """Generation reads and fills the key-value cache through the composed forward."""
    model = tiny.build(name)
    ids = tiny.inputs_for(model, batch=1)["input_ids"]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    for block in family_of(model).blocks(model):
        own(model.get_submodule(block), Watch())
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
