"""Smoothing scales of layers with one input: shared, and folded into what precedes them, where that changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from calibrated_block import Block, calibrated, inputs, work_of
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.families.registry import family_of
from diffuse_compress.quantization.algorithms.awq import AWQConfig
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, SequenceConfig
from diffuse_compress.quantization.algorithms.block import BlockWork
from diffuse_compress.quantization.algorithms.folding import Fold, preceding, set_scale
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig, collected
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.smoothquant import SmoothQuantConfig
from diffuse_compress.quantization.algorithms.svdquant import SVDQuantConfig
from diffuse_compress.quantization.algorithms.twin import unchanged_twin
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import NumberFormat, PerChannel, PerTensor, Scheme, WeightScheme
from tolerance import Tolerance, assert_close

W8 = PRESETS["w8a16"].scheme
W8A8 = PRESETS["w8a8"].scheme
# Of weights alone nothing is rounded at run time: what is folded differs in the order of two products.
SAME = Tolerance(rms=3e-6, maximum=3e-5)


def setter(block: nn.Module) -> Callable[[str, torch.Tensor], None]:
    def change(name: str, value: torch.Tensor) -> None:
        block.get_parameter(name).data = value

    return change


def block_of(name: str, index: int = 0, **config: Any) -> tuple[nn.Module, Call]:
    """A block of a tiny model, and what the model calls it with."""
    model = tiny.build(name, **config)
    family = family_of(model)
    assert family is not None
    block = model.get_submodule(family.blocks(model)[index])
    calls: list[Call] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**tiny.inputs_for(model), **({"use_cache": False} if hasattr(model, "can_generate") else {}))
    handle.remove()
    return block, calls[0]


def found(block: nn.Module, call: Call, scheme: Scheme = W8, **given: Any) -> dict[tuple[str, ...], Fold | None]:
    """What precedes every group of layers."""
    work = work_of(block, scheme, [call], **given)
    return {names: preceding(work, names) for names in work.subsets}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {}),  # grouped queries: a value channel is read by two heads
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma3", {}),
    ],
)
def test_traced_is_what_the_family_knows(name: str, config: dict[str, Any]) -> None:
    block, call = block_of(name, **config)
    before = {key: (parameter.data_ptr(), parameter.clone()) for key, parameter in block.named_parameters()}
    traced = found(block, call)
    entries = {entry.consumers: entry for entry in family_of(tiny.build(name)).kind_of(block).smoothing(block)}
    assert traced.keys() == entries.keys()
    for names, fold in traced.items():
        entry = entries[names]
        assert (None if fold is None else fold.producer) == entry.producer, names
        assert fold is None or fold.unit_offset == entry.unit_offset
    for key, parameter in block.named_parameters():
        assert parameter.data_ptr() == before[key][0]
        assert torch.equal(parameter, before[key][1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_traced_in_diffusion_blocks() -> None:
    """Norms with weights in SD's block; of PixArt's the values alone, which pass no norm."""
    model = tiny.build("unet_sd1")
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    text = torch.randn(2, 5, 128)
    traced = found(block, Call((torch.randn(2, 16, 32),), {"encoder_hidden_states": text}))
    assert {names: fold and fold.producer for names, fold in traced.items()} == {
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"): "norm1",
        ("attn1.to_out.0",): "attn1.to_v",
        ("attn2.to_q",): "norm2",
        ("attn2.to_k", "attn2.to_v"): None,
        ("attn2.to_out.0",): "attn2.to_v",
        ("ff.net.0.proj",): "norm3",
        ("ff.net.2",): None,  # hidden * gelu(gate) of one linear
    }
    traced = found(*block_of("pixart"))
    assert {names for names, fold in traced.items() if fold} == {("attn1.to_out.0",), ("attn2.to_out.0",)}


class Toy(nn.Module):
    """norm, up and gate, down; ``kind`` says what else reads the norm, or how."""

    def __init__(self, kind: str = "", width: int = 32, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.norm = kind, norm(width)
        self.up, self.gate, self.down = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.router, self.other = nn.Linear(width, 2), nn.Linear(width, width)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.add_(torch.randn(width), alpha=0.2)

    def forward(self, x: torch.Tensor, flag: bool = False) -> Any:
        h = self.norm(x)
        if self.kind.startswith("clamped"):  # not so far that these calls would tell
            h = h.clamp_(max=1e4) if "place" in self.kind else h.clamp(max=1e4)
        read = h.flip(-1) if self.kind == "permuted" else h[..., :16].repeat(1, 1, 2) if self.kind == "cut" else h
        up, gate = self.up(read), self.gate(read)
        up = nn.functional.relu(up) if self.kind == "activation" else up
        y = self.down(nn.functional.silu(gate) * up)
        if self.kind == "post-norm":
            return self.norm(h + y)
        if self.kind == "residual":
            return h + y
        if self.kind == "router":
            return y * torch.softmax(self.router(h), dim=-1)[..., :1]
        if self.kind == "returned":
            return y, h
        if self.kind == "branch" and flag:
            return y + self.other(h)
        if self.kind == "measured":
            return x + y * float(h.max() > 0)
        return x + y


def toy_call(seed: int = 0) -> Call:
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(seed))
    x[..., ::7] *= 20
    return Call((x,))


def toy_work(kind: str = "", scheme: Scheme = W8, norm: Callable[[int], nn.Module] = nn.LayerNorm, **given: Any) -> Any:
    toy = Toy(kind, norm=norm)
    if kind != "branch":
        del toy.other
    work = work_of(toy, scheme, [toy_call()], change=setter(toy), **given)
    # What is no layer of the work stays dense.
    work.layers = {name: layer for name, layer in work.layers.items() if name in ("up", "gate", "down")}
    if kind != "router":
        del toy.router
    return work


def test_toy_folds() -> None:
    work = toy_work()
    assert preceding(work, ("up", "gate")) == Fold("norm", ("up", "gate"))
    assert preceding(work, ("down",)) == Fold("up", ("down",))
    assert preceding(work, ("up",)) is None, "the gate reads the norm as well"


@pytest.mark.parametrize(
    "kind",
    [
        "post-norm", "residual", "router", "returned", "branch", "measured", "permuted", "cut", "clamped",
        "clamped in place",
    ],
)  # fmt: skip
def test_a_norm_that_something_else_reads_is_not_folded_into(kind: str) -> None:
    assert preceding(toy_work(kind), ("up", "gate")) is None


def test_linears_that_cannot_take_a_scale_are_left_alone() -> None:
    assert preceding(toy_work("activation"), ("down",)) is None
    assert preceding(toy_work(scheme=Scheme(WeightScheme(NumberFormat.INT8, PerTensor()))), ("down",)) is None
    assert preceding(toy_work(norm=Exponential), ("up", "gate")) is None


class Exponential(nn.Module):
    """Has a weight for each channel, which is no gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.exp()


def test_shared_parameters_stay() -> None:
    work = toy_work()
    for name, group in (("norm.bias", ("up", "gate")), ("gate.weight", ("up", "gate")), ("up.weight", ("down",))):
        again = toy_work(shared=frozenset({id(work.block.get_parameter(name))}))
        assert preceding(again, group) is not None, "of another block"
        again.shared, again.reached = frozenset({id(again.block.get_parameter(name))}), None
        assert preceding(again, group) is None, name


class UnitOffset(nn.Module):
    """As Gemma's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


def run(algorithm: AlgorithmConfig, scheme: Scheme, norm: Callable[[int], nn.Module]) -> BlockWork:
    toy = Toy(norm=norm)
    del toy.router, toy.other
    return calibrated(toy, scheme, algorithm, [toy_call(), toy_call(1)], change=setter(toy))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, UnitOffset])
@pytest.mark.parametrize("name", ["w8a16", "w4a16"])
def test_folded_is_the_same_function_from_the_same_codes(norm: Callable[[int], nn.Module], name: str) -> None:
    """Against the layers that keep their scale, and the norm's new weight against its formula in float64."""
    scheme = PRESETS[name].scheme if name == "w8a16" else Scheme(WeightScheme(NumberFormat.INT4, PerChannel()))
    kept, folded = (run(AWQConfig(fold=fold, clip=False), scheme, norm) for fold in (False, True))
    scales = {name: layer.act_pre_scale for name, layer in kept.layers.items()}
    assert all(scale is not None for scale in scales.values())
    with torch.no_grad():
        for call in (toy_call(2), toy_call(3)):
            assert_close(call.run(folded.block), call.run(kept.block), SAME)
    for name in kept.layers:
        one, other = kept.block.get_submodule(name), folded.block.get_submodule(name)
        assert other.act_pre_scale is None
        assert other.folded
        assert not one.folded
        assert torch.equal(one.qweight, other.qweight), name
    offset = float(norm is UnitOffset)
    gain = kept.block.norm.weight.double() + offset
    assert torch.allclose(folded.block.norm.weight.double() + offset, gain * scales["up"].double(), rtol=1e-5)
    rows = kept.block.up.scale.double() * scales["down"].double().reshape(-1, 1)
    assert torch.allclose(folded.block.up.scale.double(), rows, rtol=1e-5)


def test_with_a_low_rank_branch_and_quantized_inputs() -> None:
    """The branch of a layer reads the input before the scale, and writes to rows that a scale follows."""
    sequence = [
        SequenceConfig((SmoothQuantConfig(fold=fold), SVDQuantConfig(rank=4, iterations=2))) for fold in (False, True)
    ]
    kept, folded = (run(config, W8, nn.LayerNorm) for config in sequence)
    assert not any(layer.folded for layer in folded.block.children() if isinstance(layer, QuantizedLinear)), "no inputs"
    kept, folded = (run(config, W8A8, nn.LayerNorm) for config in sequence)
    assert all(layer.folded for layer in folded.block.children() if isinstance(layer, QuantizedLinear))
    with torch.no_grad():
        call = toy_call(2)
        # An input that lies between two codes may go to either.
        assert_close(call.run(folded.block), call.run(kept.block), Tolerance(rms=2e-3, maximum=2e-2))


def test_a_coarse_dtype_gives_the_layers_the_scale_that_its_norm_holds() -> None:
    for norm in (nn.LayerNorm, UnitOffset):
        work = toy_work(norm=norm)
        work.block.to(torch.bfloat16)
        work.calls = [Call((toy_call().args[0].bfloat16(),))]
        offset, before = float(norm is UnitOffset), work.block.norm.weight.detach().double()
        wanted = torch.rand(32) + 0.5
        set_scale(work, [work.layers[name] for name in ("up", "gate")], wanted, True)
        held = work.layers["up"].act_pre_scale
        assert held is work.layers["gate"].act_pre_scale
        stored = ((before + offset) * wanted.double() - offset).bfloat16().double()
        assert torch.allclose(held.double(), (stored + offset) / (before + offset), rtol=1e-6)
        assert 0 < (held / wanted - 1).abs().max() < 1 / 32
        # bfloat16 cannot tell 1 + weight = 0.001 from 0.003.
        tiny_scale = torch.full((32,), 0.001)
        work.folded.clear()
        set_scale(work, [work.layers[name] for name in ("up", "gate")], tiny_scale, True)
        assert bool(work.folded) == (norm is nn.LayerNorm)
        assert work.folded or work.layers["up"].act_pre_scale is tiny_scale


@pytest.mark.parametrize(
    ("fold", "default", "expected"), [(None, False, 0), (None, True, 3), (True, False, 3), (False, True, 0)]
)
def test_what_a_config_leaves_open_the_model_decides(fold: bool | None, default: bool, expected: int) -> None:
    toy = Toy()
    del toy.router, toy.other
    work = calibrated(
        toy, W8A8, SmoothQuantConfig(fold=fold), [toy_call()], change=setter(toy), folds=default
    )  # fmt: skip
    assert sum(layer.folded for layer in work.block.children() if isinstance(layer, QuantizedLinear)) == expected


def test_the_unchanged_twin_stays_so() -> None:
    toy, call = Toy(), toy_call(4)
    del toy.router, toy.other
    twin, weight = unchanged_twin(toy), toy.norm.weight.clone()
    with torch.no_grad():
        expected = call.run(twin)
        calibrated(toy, W8A8, SmoothQuantConfig(fold=True), [toy_call()], change=setter(toy))
        assert not torch.equal(toy.norm.weight, weight)
        assert torch.equal(call.run(twin), expected)


def test_layers_with_one_input_share_scale_and_hessian_but_no_memory() -> None:
    for algorithm in (SmoothQuantConfig(), AWQConfig(clip=False)):
        block = Block()
        dense = copy.deepcopy(block)
        work = calibrated(block, W8A8, SequenceConfig((algorithm, GPTQConfig())), inputs(2))
        scales = [work.layers[name].act_pre_scale for name in ("to_q", "to_k", "to_v")]
        assert scales[0] is scales[1] is scales[2]
        layers = [block.get_submodule(name) for name in ("to_q", "to_k", "to_v")]
        assert len({layer.act_pre_scale.data_ptr() for layer in layers}) == 3
        again = work_of(dense, W8A8, inputs(2))
        for name, layer in again.layers.items():
            layer.act_pre_scale = work.layers[name].act_pre_scale
        assert len(set(collected(again, ["to_q", "to_k", "to_v", "to_out"], pairs=False).values())) == 2


def test_a_block_is_run_no_further_than_what_is_looked_at() -> None:
    class Twice(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(super().forward(x))

    for kind, runs in ((Block, 0), (Twice, 6)):
        block, calls = kind(), inputs(3)
        work, seen = work_of(block, W8, calls), []
        assert work.subsets[0] == ("to_q", "to_k", "to_v")
        block.down.register_forward_hook(lambda *given, seen=seen: seen.append(1))
        rows = collected(work, ["to_k"], pairs=False)["to_k"].rows
        assert len(seen) == runs
        assert rows == (2 if kind is Twice else 1) * sum(call.args[0].shape[0] * 24 for call in calls)


@pytest.mark.parametrize("config", [SmoothQuantConfig, AWQConfig])
def test_fold_must_be_a_truth_value(config: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{config.__name__}: fold is True, False or None .* got 'yes'"):
        config(fold="yes")


def test_nothing_is_folded_where_only_layers_may_change() -> None:
    toy = Toy()
    del toy.router, toy.other
    work = calibrated(toy, W8A8, SmoothQuantConfig(fold=True), [toy_call()])
    assert all(layer.act_pre_scale is not None for layer in work.block.children() if isinstance(layer, QuantizedLinear))


def test_rounding_folds_nothing() -> None:
    toy = Toy()
    del toy.router, toy.other
    assert not calibrated(toy, W8A8, RTNConfig(), [toy_call()], change=setter(toy), folds=True).folded
