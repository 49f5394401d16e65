"""On a CUDA device: exact integer sums, every preset end to end, compute there and return. `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

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


def test_random_state_of_the_device_is_left_alone() -> None:
    model = tiny.build("pixart").to("cuda")
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    model.compress("w4a8")
    assert torch.equal(torch.cuda.get_rng_state(), before)
