"""Every sample reaches every block with the inputs that the model's own forward gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tiny
from diffuse_compress.calibration.lockstep import Visit, lockstep
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.families.registry import family_of
from diffuse_compress.families.roles import block_elements

MODELS = ["pixart", "dit", "sd3", "flux", "wan", "cogvideox", "hunyuan_video", "qwenimage", "unet_sd1", "unet_sdxl",
          "unet", "llama", "t5_encoder"]  # fmt: skip


def blocks_of(model: nn.Module) -> list[str]:
    family = family_of(model)
    return family.blocks(model) if family is not None else block_elements(model)


def inputs_in_forwards(model: nn.Module, blocks: list[str], samples: list[Call]) -> dict[str, list[Any]]:
    """What each block is given when the samples simply run one after the other."""
    seen: dict[str, list[Any]] = {name: [] for name in blocks}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append(_copy((args, kwargs))), with_kwargs=True
        )
        for name in blocks
    ]
    with torch.no_grad():
        for sample in samples:
            model(*sample.args, **sample.kwargs)
    for handle in handles:
        handle.remove()
    return seen


def _copy(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


def same(a: Any, b: Any) -> bool:
    left, right = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    return len(left) == len(right) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else True for x, y in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_blocks_get_the_inputs_of_the_stock_forward(name: str) -> None:
    model = tiny.build(name).eval()
    samples = [Call((), tiny.inputs_for(model, seed=seed)) for seed in range(3)]
    blocks = blocks_of(model)
    expected = inputs_in_forwards(model, blocks, samples)
    visited = []

    def visit(found: Visit) -> None:
        visited.append(found.name)
        assert list(found.calls) == [0, 1, 2]
        for index, call in found.calls.items():
            assert same((call.args, dict(call.kwargs)), expected[found.name][index]), (found.name, index)

    assert lockstep(model, blocks, samples, visit) == []
    assert visited == blocks
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_change_to_a_block_is_in_force_for_the_next() -> None:
    model = tiny.build("flux").eval()
    samples = [Call((), tiny.inputs_for(model, seed=seed)) for seed in range(2)]
    blocks = blocks_of(model)
    changed = tiny.build("flux").eval()
    for name in blocks:
        for parameter in changed.get_submodule(name).parameters():
            parameter.data.mul_(1.1)
    expected = inputs_in_forwards(changed, blocks, samples)

    def visit(found: Visit) -> None:
        for index, call in found.calls.items():
            assert same((call.args, dict(call.kwargs)), expected[found.name][index])
        for parameter in found.block.parameters():
            parameter.data.mul_(1.1)
        for call in found.calls.values():  # running the block inside a visit does not stop at it
            found.block(*call.args, **call.kwargs)

    assert lockstep(model, blocks, samples, visit) == []


@pytest.mark.parametrize("name", ["flux", "unet_sd1", "llama"])
def test_references_are_the_inputs_of_the_unchanged_model(name: str) -> None:
    model = tiny.build(name).eval()
    samples = [Call((), tiny.inputs_for(model, seed=seed)) for seed in range(2)]
    blocks = blocks_of(model)
    expected = inputs_in_forwards(model, blocks, samples)
    changed = tiny.build(name).eval()
    for block in blocks:
        for parameter in changed.get_submodule(block).parameters():
            parameter.data.mul_(1.1)
    expected_changed = inputs_in_forwards(changed, blocks, samples)
    visited = []

    def visit(found: Visit) -> None:
        visited.append(found.name)
        for index in range(2):
            reference, call = found.references[index], found.calls[index]
            assert same((reference.args, dict(reference.kwargs)), expected[found.name][index]), (found.name, index)
            assert same((call.args, dict(call.kwargs)), expected_changed[found.name][index]), (found.name, index)
        for parameter in found.block.parameters():
            parameter.data.mul_(1.1)

    assert lockstep(model, blocks, samples, visit, references=True) == []
    assert visited == blocks


def test_a_block_can_be_replaced_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    second = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    outputs: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))

    def visit(found: Visit) -> None:
        if found.name == "1":
            model[1] = second

    lockstep(model, ["0", "1"], [Call((x,)), Call((2 * x,))], visit)
    assert torch.equal(outputs[0], second(model[0](x)))
    assert torch.equal(outputs[1], second(model[0](2 * x)))


class Branching(nn.Module):
    """Runs a block twice, and another only where the sample says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sometimes, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, detour: bool) -> torch.Tensor:
        x = self.first(self.first(x))
        with torch.autocast("cpu", torch.bfloat16, enabled=detour):
            x = self.sometimes(x) if detour else x
            return self.last(x)


def test_samples_may_take_different_ways() -> None:
    model = Branching()
    samples = [Call((torch.randn(2, 4),), {"detour": index % 2 == 1}) for index in range(4)]
    seen: dict[str, list[int]] = {}
    autocast: list[bool] = []
    model.last.register_forward_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))

    def visit(found: Visit) -> None:
        seen[found.name] = list(found.calls)
        assert not torch.is_autocast_enabled("cpu")  # that of a sample is not the visitor's

    assert lockstep(model, ["first", "sometimes", "last", "never"], samples, visit) == ["never"]
    assert seen == {"first": [0, 1, 2, 3], "sometimes": [1, 3], "last": [0, 1, 2, 3]}
    assert autocast == [False, True, False, True]
    assert not torch.is_autocast_enabled("cpu")
    assert lockstep(model, ["first", "sometimes", "last", "never"], samples, visit, references=True) == ["never"]
    assert seen == {"first": [0, 1, 2, 3], "sometimes": [1, 3], "last": [0, 1, 2, 3]}


@pytest.mark.parametrize("where", ["visit", "model"])
def test_an_error_unwinds_every_forward(where: str) -> None:
    unwound = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                y = self.block(x)
                if where == "model":
                    raise RuntimeError("in the model")
                return y
            finally:
                unwound.append(float(x[0, 0]))

    def visit(found: Visit) -> None:
        if where == "visit":
            raise RuntimeError("in the visit")

    model = Model()
    raised, message = {
        "visit": (RuntimeError, "^in the visit"),
        "model": (ConfigError, r"sample 0 \(Tensor\) cannot be run through Model: RuntimeError: in the model"),
    }[where]
    with pytest.raises(raised, match=message):
        lockstep(model, ["block"], [Call((torch.full((1, 4), float(i)),)) for i in range(3)], visit)
    assert sorted(unwound) == [0.0, 1.0, 2.0]
    assert torch.is_grad_enabled()
    assert "forward" not in vars(model.block)


def test_no_samples_and_unknown_blocks_are_errors() -> None:
    model = Branching()
    with pytest.raises(ConfigError, match="at least one sample"):
        lockstep(model, ["first"], [], lambda found: None)
    with pytest.raises(ConfigError, match="no block 'third'"):
        lockstep(model, ["third"], [Call((torch.ones(1, 4),))], lambda found: None)
