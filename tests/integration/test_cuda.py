"""On a CUDA device: exact integer sums, every preset end to end, compute there and return. `make test-gpu`.

And what test_offload.py and test_compile.py cannot see without a second device: where packed tensors are, and Inductor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress_kernels import int_matmul
from tolerance import relative_rms

pytestmark = pytest.mark.gpu
PRESETS = ["w8a8", "fp8", "w8a16", "w4a16", "w4a8", "w4a4"]


def config_for(preset: str) -> dc.QuantizationConfig:
    return dc.QuantizationConfig(preset, algorithm=dc.RTNConfig() if preset == "w4a4" else None)


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 100, 4096])
@pytest.mark.parametrize(("columns", "outputs"), [(128, 128), (1152, 4608), (100, 37), (4608, 1152)])
def test_integer_sums_equal_the_cpu(rows: int, columns: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (outputs, columns), generator=generator, dtype=torch.int8)
    expected = (x.double() @ weight.double().T).to(torch.int32)
    assert torch.equal(int_matmul(x.cuda(), weight.cuda()).cpu(), expected)
    assert torch.equal(int_matmul(x, weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_layer_on_cuda_against_cpu(preset: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    dense = torch.nn.Linear(384, 256, dtype=dtype)
    layer = quantize_module(dense, config_for(preset).spec.scheme, dc.RTNConfig())
    x = torch.randn(2, 33, 384, generator=generator).to(dtype)
    with torch.no_grad():
        cpu, gpu = layer(x), layer.cuda()(x.cuda()).cpu()
    # fp8 multiplies in float8 on CUDA and leaves the input alone on the CPU: 2**-4 relative rounding of each input.
    limit = 0.04 if preset == "fp8" else {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert relative_rms(cpu.float(), gpu.float()) < limit


@pytest.mark.parametrize("preset", PRESETS)
def test_pipeline_on_cuda_compress_save_reload(preset: str, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart", dtype=torch.bfloat16).to("cuda")
    pipe.compress({"transformer": config_for(preset), "text_encoder": "w8a16"})
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cuda"}
    kwargs = tiny.call_kwargs(pipe, output_type="latent")
    expected = pipe(**kwargs).images
    assert torch.isfinite(expected).all()
    pipe.save_pretrained(tmp_path)
    from diffusers import DiffusionPipeline

    again = DiffusionPipeline.from_pretrained(tmp_path).to("cuda")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**tiny.call_kwargs(again, output_type="latent")).images, expected)


def test_compute_device_returns_each_layer() -> None:
    on_gpu = tiny.build("pixart", dtype=torch.bfloat16).compress("w4a8", device="cuda")
    assert {p.device.type for p in on_gpu.parameters()} == {"cpu"}
    twice = tiny.build("pixart", dtype=torch.bfloat16).compress("w4a8", device="cuda")
    for name, layer in quantized_layers(on_gpu).items():
        other = quantized_layers(twice)[name]
        assert torch.equal(layer.qweight, other.qweight), name
        assert torch.equal(layer.scale, other.scale), name


@pytest.mark.parametrize("name", ["pixart", "unet_sd1", "llama"])
@pytest.mark.parametrize(
    "algorithm",
    [[dc.SmoothQuantConfig(), dc.GPTQConfig()], dc.AWQConfig(num_ratios=4), dc.GPTQConfig(asymmetric=True)],
    ids=lambda value: getattr(value, "summary", "sequence"),
)
def test_calibration_on_the_device_returns_each_block(name: str, algorithm: Any, tmp_path: Path) -> None:
    """The model and its samples stay on the CPU; blocks are calibrated, run, stored and restored through the device."""
    items = [tiny.inputs_for(tiny.build(name), seed=seed) for seed in range(3)]
    given = {"calibration": items, "measure": False}
    config = dc.QuantizationConfig("w8a8", algorithm=algorithm)
    torch.cuda.reset_peak_memory_stats()
    model = tiny.build(name).compress(config, device="cuda", work_dir=tmp_path, **given)
    assert torch.cuda.max_memory_allocated() > 0
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"cpu"}
    resumed = tiny.build(name).compress(config, device="cuda", work_dir=tmp_path, **given)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    with torch.no_grad():
        dense, ours, theirs = (
            m.eval()(**items[0])[0] for m in (tiny.build(name), model, tiny.build(name).compress(config, **given))
        )
    errors = [relative_rms(dense.float(), found.float()) for found in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.15), errors


def test_interrupted_on_the_device_everything_is_back() -> None:
    model = tiny.build("pixart")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def callback(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.compress(
            dc.QuantizationConfig("w8a8", algorithm=dc.GPTQConfig(asymmetric=True)),
            calibration=[tiny.inputs_for(model)],
            device="cuda",
            callback=callback,
            measure=False,
        )
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"cpu"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_random_state_of_the_device_is_left_alone() -> None:
    model = tiny.build("pixart").to("cuda")
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    model.compress("w4a8")
    assert torch.equal(torch.cuda.get_rng_state(), before)


# --- offloading: the plain bits, and every packed tensor where it should be between steps -----------------------


def packed_devices(model: torch.nn.Module) -> set[str]:
    layers = quantized_layers(model).values()
    return {parameter.device.type for layer in layers for parameter in layer.parameters(recurse=False)}


def sample_and_watch(pipe: Any) -> tuple[torch.Tensor, set[str]]:
    """Latents, and the devices on which packed tensors of the UNet were seen between steps."""
    seen: set[str] = set()

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.update(packed_devices(pipe.unet))
        return tensors

    return tiny.sample(pipe, num_inference_steps=3, callback_on_step_end=watch).cpu(), seen


def group_offload(**kwargs: Any) -> Callable[[Any, Path], Any]:
    def enable(pipe: Any, folder: Path) -> None:
        disk = {"offload_to_disk_path": str(folder)} if kwargs.get("disk") else {}
        arguments = {key: value for key, value in kwargs.items() if key != "disk"}
        pipe.enable_group_offload(torch.device("cuda"), **arguments, **disk)

    return enable


# {name: (how, where packed tensors may be between steps)}
OFFLOADS: dict[str, tuple[Callable[[Any, Path], Any], set[str]]] = {
    "model": (lambda pipe, folder: pipe.enable_model_cpu_offload(), {"cuda"}),
    "sequential": (lambda pipe, folder: pipe.enable_sequential_cpu_offload(), {"meta"}),
    "block": (group_offload(offload_type="block_level", num_blocks_per_group=1), {"cpu"}),
    "leaf": (group_offload(offload_type="leaf_level"), {"cpu"}),
    # The stream fetches ahead, so that the first layers may be there already.
    "leaf-stream": (group_offload(offload_type="leaf_level", use_stream=True), {"cpu", "cuda"}),
    "leaf-disk": (group_offload(offload_type="leaf_level", disk=True), {"cpu"}),
}


def compressed_pipeline(preset: str) -> Any:
    pipe = tiny.build_pipeline("stable_diffusion", dtype=torch.bfloat16)
    return pipe.compress({"unet": preset, "text_encoder": "w8a16"}, device="cuda", measure=False)


@pytest.mark.parametrize("mode", OFFLOADS)
@pytest.mark.parametrize("preset", PRESETS[:5])
def test_offload_gives_the_plain_bits_and_puts_packed_tensors_back(preset: str, mode: str, tmp_path: Path) -> None:
    pipe = compressed_pipeline(preset)
    pipe.save_pretrained(tmp_path / "saved")
    expected, seen = sample_and_watch(copy.deepcopy(pipe).to("cuda"))
    assert seen == {"cuda"}
    enable, where = OFFLOADS[mode]
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    reloaded.set_progress_bar_config(disable=True)
    for number, one in enumerate((pipe, reloaded)):
        enable(one, tmp_path / f"offload{number}")
        for _ in range(2):
            latents, seen = sample_and_watch(one)
            assert torch.equal(latents, expected)
            assert seen <= where
        if mode == "model":
            assert packed_devices(one.unet) == {"cpu"}, "after the call"


@pytest.mark.parametrize(
    ("name", "preset"), [*((name, "w8a8") for name in tiny.PIPELINES), *(("flux", preset) for preset in PRESETS[1:5])]
)
def test_sequential_offload_of_every_pipeline(name: str, preset: str, tmp_path: Path) -> None:
    """Loaded from its folder; between calls every tensor is on meta, and without the hooks all are there again."""
    pipe = tiny.build_pipeline(name, dtype=torch.bfloat16)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    pipe.compress({denoiser: preset, "text_encoder": "w8a16"}, device="cuda", measure=False)
    pipe.save_pretrained(tmp_path / "saved")
    expected = tiny.sample(pipe.to("cuda")).cpu()
    offloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    offloaded.set_progress_bar_config(disable=True)
    offloaded.enable_sequential_cpu_offload()
    model = getattr(offloaded, denoiser)
    for _ in range(2):
        assert torch.equal(tiny.sample(offloaded).cpu(), expected)
        assert packed_devices(model) == {"meta"}
    with pytest.raises(dc.CheckpointError, match=r"found a meta tensor.*remove_all_hooks\(\)"):
        offloaded.save_pretrained(tmp_path / "again")
    offloaded.remove_all_hooks()
    assert packed_devices(model) == {"cpu"}
    offloaded.save_pretrained(tmp_path / "again")
    assert torch.equal(tiny.sample(offloaded.to("cuda")).cpu(), expected)


@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_compress_under_model_offload_and_not_under_sequential(preset: str) -> None:
    expected, _ = sample_and_watch(compressed_pipeline(preset).to("cuda"))
    pipe = tiny.build_pipeline("stable_diffusion", dtype=torch.bfloat16)
    pipe.enable_sequential_cpu_offload()
    with pytest.raises(dc.ModelStateError, match=r"compress before enable_sequential_cpu_offload\(\)"):
        pipe.compress(preset)
    pipe.remove_all_hooks()
    pipe.enable_model_cpu_offload()
    pipe.compress({"unet": preset, "text_encoder": "w8a16"}, device="cuda")
    for _ in range(2):
        assert torch.equal(sample_and_watch(pipe)[0], expected)


@pytest.mark.parametrize("device_map", ["cuda", "balanced"])
def test_reload_of_a_pipeline_with_a_device_map(device_map: str, tmp_path: Path) -> None:
    pipe = compressed_pipeline("w8a8")
    pipe.save_pretrained(tmp_path)
    expected, _ = sample_and_watch(pipe.to("cuda"))
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, device_map=device_map, safety_checker=None)
    reloaded.set_progress_bar_config(disable=True)
    for _ in range(2):
        assert torch.equal(sample_and_watch(reloaded)[0], expected)


@pytest.mark.parametrize("preset", PRESETS[:5])
def test_reload_with_less_memory_than_the_model(preset: str, tmp_path: Path) -> None:
    model = tiny.build("unet_sd1", dtype=torch.bfloat16).compress(preset, measure=False)
    model.save_pretrained(tmp_path / "saved")
    half = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // 2
    reloaded = type(model).from_pretrained(
        tmp_path / "saved", device_map="auto", max_memory={0: half, "cpu": "1GB"}, offload_folder=tmp_path / "offload"
    )
    assert packed_devices(reloaded) == {"cuda", "meta"}
    model.cuda()
    inputs = tiny.inputs_for(model)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        for _ in range(2):
            assert torch.equal(reloaded(**inputs, return_dict=False)[0], expected)


@pytest.mark.parametrize("preset", PRESETS[:5])
def test_pipeline_moved_and_cast_at_once(preset: str) -> None:
    pipe = compressed_pipeline(preset)
    expected, _ = sample_and_watch(copy.deepcopy(pipe).to("cuda"))
    assert torch.equal(sample_and_watch(pipe.to("cuda", torch.bfloat16))[0], expected)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet.dtype == torch.bfloat16
    assert torch.equal(sample_and_watch(pipe)[0], expected)


# --- compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixart", "flux"])
@pytest.mark.parametrize("preset", ["w8a8", "fp8", "w4a16"])
def test_inductor_in_one_graph(preset: str, name: str) -> None:
    torch._dynamo.reset()
    model = tiny.build(name, dtype=torch.bfloat16).compress(preset, measure=False).cuda()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for side in (8, 16, 8):
        inputs = tiny.inputs_for(model, side=side)
        with torch.no_grad():
            expected, got = model(**inputs, return_dict=False)[0], compiled(**inputs, return_dict=False)[0]
        # Fused kernels round to bfloat16 less often than eager's, and an activation's code may fall one over.
        assert relative_rms(expected.float(), got.float()) < 0.05
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


# --- language models ------------------------------------------------------------------------------------------------


def greedy(model: Any, call: dict[str, torch.Tensor], **how: Any) -> Any:
    """New tokens [batch, steps] and the scores of each step."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        found = model.generate(
            **call, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True, **how
        )
    return found.sequences[:, call["input_ids"].shape[1] :], found.scores


def assert_same_choices(one: Any, other: Any) -> None:
    """Equal tokens, up to where two were as good as each other: what follows then is another text."""
    (tokens, scores), (others, _) = one, other
    for row in range(tokens.shape[0]):
        differing = (tokens[row] != others[row]).nonzero()
        if len(differing):
            step = int(differing[0])
            choices = scores[step][row].float()
            margin = choices[tokens[row, step]] - choices[others[row, step]]
            assert margin < 0.05 * choices.std(), (row, step)


@pytest.mark.parametrize(
    ("preset", "algorithm"),
    [("w4a16", dc.GPTQConfig()), ("w8a8", [dc.AWQConfig(num_ratios=4), dc.GPTQConfig()])],
    ids=["w4a16", "w8a8"],
)
def test_generate_after_calibration(preset: str, algorithm: Any, tmp_path: Path) -> None:
    """Eager, compiled by ``generate`` itself (static cache), reloaded, and with a layer offloaded to the CPU."""
    torch._dynamo.reset()
    model = tiny.build("llama", dtype=torch.bfloat16, initializer_range=0.2)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 120, (1, 32), generator=generator) for _ in range(6)]
    config = dc.QuantizationConfig(preset, algorithm=algorithm)
    model.compress(config, calibration=texts, device="cuda", measure=False).cuda()
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, :4] = 0
    prompts = torch.randint(5, 120, (3, 10), generator=generator)
    call = {"input_ids": prompts.cuda(), "attention_mask": mask.cuda()}
    expected = greedy(model, call)
    assert len(expected[0].unique()) > 5
    static = {"cache_implementation": "static"}
    assert_same_choices(expected, greedy(model, call, **static, disable_compile=True))
    torch._dynamo.utils.counters.clear()
    assert_same_choices(expected, greedy(model, call, **static))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    model.save_pretrained(tmp_path)
    parts = {f"model.{part}": 0 for part, _ in model.model.named_children() if part != "layers"}
    places = {**parts, "lm_head": 0, "model.layers.0": "cpu", "model.layers.1": 0}
    for device_map in ("cuda", places):
        again = type(model).from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(greedy(again, call)[0], expected[0])
