"""torch.compile of compressed models: no graph break, at most one more graph for a second resolution, eager's bits.

"aot_eager" traces and decomposes as every backend does and runs the same kernels, so its bits are eager's. Inductor
makes kernels of its own, whose float sums may differ in the last bits; where inputs are quantized, such a bit can move
a code by one, which is a rounding of eight bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import quantized_layers
from tolerance import KERNEL, Tolerance, assert_close

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# One block of each kind: tracing is what takes the time.
SMALL: dict[str, dict[str, Any]] = {
    "pixart": {"num_layers": 1},
    "sd3": {"num_layers": 1},
    "wan": {"num_layers": 1},
    "flux": {},
    "unet_sdxl": {"transformer_layers_per_block": (1, 1), "up_block_types": ("UpBlock2D", "UpBlock2D")},
}


def compressed(name: str, preset: str) -> Any:
    return tiny.build(name, **SMALL[name]).compress(preset, measure=False)


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**inputs, return_dict=False)))


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def check(model: Any, compiled: Any, *, blocks: int = 1, tolerance: Tolerance | None = None) -> None:
    """Two resolutions, each twice; ``blocks`` classes of blocks are compiled one by one, 1 for a whole model.

    Equal bits, or within ``tolerance``.
    """
    sizes = [tiny.inputs_for(model), tiny.inputs_for(model, side=16)]
    # A layer that is compiled in place is not called here.
    with torch.compiler.set_stance("force_eager"):
        expected = [run(model, inputs) for inputs in sizes]
    for turn in range(2):
        for number, (inputs, reference) in enumerate(zip(sizes, expected, strict=True)):
            result = run(compiled, inputs)
            if tolerance is None:
                assert torch.equal(result, reference)
            else:
                assert_close(result, reference, tolerance)
            assert blocks <= graphs() <= blocks * (2 if turn or number else 1)
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        *(("pixart", preset) for preset in ("w8a8", "w4a16", "w4a8")),
        *((name, "w8a8") for name in ("flux", "sd3", "wan")),
    ],
)
@pytest.mark.slow
def test_whole_model_in_one_graph(name: str, preset: str) -> None:
    model = compressed(name, preset)
    check(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("preset", ["w8a8", "fp8"])
def test_one_resolution_twice_in_one_graph(preset: str) -> None:
    model = compressed("pixart", preset)
    inputs = tiny.inputs_for(model)
    expected, compiled = run(model, inputs), torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled, inputs), expected)
    assert torch.equal(run(compiled, inputs), expected)
    assert graphs() == 1


def test_rotated_layers_with_branches_in_one_graph() -> None:
    model = tiny.build("pixart", dtype=torch.bfloat16, **SMALL["pixart"])
    algorithm = [dc.QuaRotConfig(), dc.SVDQuantConfig(rank=8, num_alphas=1, iterations=1)]
    config = dc.QuantizationConfig("w4a4", algorithm=algorithm)
    model.compress(config, calibration=[tiny.inputs_for(model)], measure=False)
    branch, x = model.transformer_blocks[0].ff, torch.randn(2, 5, 128, dtype=torch.bfloat16)
    assert branch.net[2].scheme.input_rotation == 512
    assert branch.net[2].low_rank_down.dtype == torch.bfloat16
    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), branch(x))
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preset"), [("pixart", "w8a8"), ("pixart", "w4a16"), ("wan", "fp8")])
def test_second_resolution_of_a_dynamic_graph(name: str, preset: str) -> None:
    model = compressed(name, preset)
    check(model, torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blocks"), [("flux", 2), ("wan", 1), ("unet_sdxl", 1)])
@pytest.mark.parametrize("preset", ["w8a8", "w4a16"])
def test_repeated_blocks(name: str, blocks: int, preset: str) -> None:
    model = compressed(name, preset)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    check(model, model, blocks=blocks)


@pytest.mark.parametrize("name", ["pixart", "sd3", "dit"])
def test_repeated_blocks_of_a_class_that_names_none_is_the_stock_error(name: str) -> None:
    with pytest.raises(ValueError, match="`_repeated_blocks` attribute is empty"):
        tiny.build(name).compress("w8a8", measure=False).compile_repeated_blocks(fullgraph=True)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("pixart", "w8a8"),
        pytest.param("pixart", "w4a16", marks=pytest.mark.slow),
        pytest.param("flux", "w8a8", marks=pytest.mark.slow),
        pytest.param("flux", "w4a16", marks=pytest.mark.slow),
    ],
)
def test_inductor(name: str, preset: str) -> None:
    model = compressed(name, preset)
    rule = KERNEL[torch.float32 if preset == "w4a16" else torch.bfloat16]
    check(model, torch.compile(model, fullgraph=True), tolerance=rule)


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_compress_what_was_compiled_and_run(way: str) -> None:
    model, inputs = tiny.build("pixart", num_layers=1), tiny.inputs_for(tiny.build("pixart"))
    if way == "wrapped":
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    else:
        model.compile(fullgraph=True, backend="eager")
        compiled = model
    dense = run(compiled, inputs)
    assert dc.compress(compiled, "w8a8", measure=False) is compiled
    assert quantized_layers(model)
    expected = run(compressed("pixart", "w8a8"), inputs)
    assert not torch.equal(expected, dense)
    assert torch.equal(run(compiled, inputs), expected)
    assert torch.equal(run(compiled, inputs), expected)


def test_hotswapped_adapter_is_not_traced_again() -> None:
    peft = pytest.importorskip("peft")
    states = []
    for seed in (1, 2):
        twin = tiny.build("flux")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            twin.add_adapter(
                peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
            )
        states.append({key: value.clone() for key, value in peft.utils.get_peft_model_state_dict(twin).items()})
    model, inputs = compressed("flux", "w8a8"), tiny.inputs_for(tiny.build("flux"))
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(states[0], prefix=None, adapter_name="one")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    first = run(compiled, inputs)
    assert torch.equal(first, run(model, inputs))
    assert graphs() == 1
    model.load_lora_adapter(states[1], prefix=None, adapter_name="one", hotswap=True)
    second = run(compiled, inputs)
    assert torch.equal(second, run(model, inputs))
    assert not torch.equal(first, second)
    assert graphs() == 1
