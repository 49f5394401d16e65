"""compress with calibrated algorithms: every family, saved and reloaded, refused, undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

import diffuse_compress as dc
import tiny
from diffuse_compress.calibration.work_folder import digest_of_weights
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork
from tolerance import relative_rms

W4 = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT4, dc.PerGroup(32), symmetric=False))
SEQUENCE = [dc.SmoothQuantConfig(), dc.GPTQConfig()]


def items(pipe: Any) -> list[dict[str, Any]]:
    given = tiny.call_kwargs(pipe, steps=3)
    given.pop("generator")
    return [{**given, "prompt": prompt} for prompt in ("a cat", "a dog")]


@pytest.mark.parametrize("name", sorted(tiny.PIPELINES))
def test_pipelines_are_calibrated_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline(name)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, denoiser)
    expected = set(pipe.compression_plan("w8a8").components[denoiser].layers)
    pipe.compress(dc.QuantizationConfig("w8a8", algorithm=SEQUENCE), calibration=items(pipe), measure=False)
    assert set(quantized_layers(model)) == expected
    assert any(layer.act_pre_scale is not None for layer in quantized_layers(model).values())
    assert not any("forward" in vars(module) for module in model.modules())
    picture = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(again), picture)
    assert (
        get_state(getattr(again, denoiser)).config.spec.algorithm
        == dc.QuantizationConfig("w8a8", SEQUENCE).spec.algorithm
    )
    assert "GPTQ" in str(again.compression_report())


@pytest.mark.parametrize("algorithm", [dc.GPTQConfig(), dc.AWQConfig()], ids=lambda c: c.kind)
def test_language_model_beats_rounding_and_twice_is_the_same(algorithm: Any) -> None:
    dense, texts = tiny.build("llama"), [torch.randint(0, 64, (1, 24)) for _ in range(8)]
    fresh = torch.randint(0, 64, (4, 24))
    with torch.no_grad():
        target = dense(input_ids=fresh).logits

    def compressed(config: Any, **given: Any) -> Any:
        return tiny.build("llama").compress(dc.QuantizationConfig(W4, algorithm=config), **given)

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float((model(input_ids=fresh).logits - target).square().mean())

    first, second = (compressed(algorithm, calibration=texts) for _ in range(2))
    assert loss(first) < loss(compressed("rtn"))
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key


def test_weights_of_samples_choose_what_is_kept() -> None:
    """With all the weight on one sample, the others might as well not be there."""
    texts = [torch.randint(0, 64, (1, 24)) for _ in range(3)]
    calibration = dc.Calibration.record(tiny.build("llama"), texts)
    config = dc.QuantizationConfig(W4, algorithm=dc.GPTQConfig(damping=1e-3))

    def weight(given: Any) -> torch.Tensor:
        model = tiny.build("llama").compress(config, calibration=given, measure=False)
        return quantized_layers(model)["model.layers.0.mlp.down_proj"].weight

    one = weight(calibration.weighted(lambda sample: float(sample.item == 0)))
    # The sums differ by a factor, and so in the last bit: a tie may fall either way.
    assert (one == weight(calibration.take(1))).float().mean() > 0.97
    assert (one == weight(calibration)).float().mean() < 0.9


def test_asymmetric_calibration_of_a_model_is_nearer_to_it() -> None:
    dense, texts = tiny.build("llama"), [torch.randint(0, 64, (1, 24)) for _ in range(12)]
    scheme = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT2, dc.PerGroup(32), symmetric=False))

    def loss(algorithm: dc.GPTQConfig) -> float:
        model = tiny.build("llama").compress(dc.QuantizationConfig(scheme, algorithm=algorithm), calibration=texts)
        with torch.no_grad():
            pairs = [(model(input_ids=text).logits, dense(input_ids=text).logits) for text in texts]
        return float(sum((a - b).square().sum() for a, b in pairs))

    assert loss(dc.GPTQConfig(asymmetric=True, asymmetric_share=1.0)) < 0.97 * loss(dc.GPTQConfig())


@pytest.mark.parametrize("name", [pytest.param("unet_sd1", marks=pytest.mark.slow), "llama"])
@pytest.mark.parametrize("algorithm", [dc.AdaRoundConfig(iterations=3), dc.BRECQConfig(iterations=2, batch_size=1)])
def test_learned_rounding_of_models_there_and_back(name: str, algorithm: Any, tmp_path: Path) -> None:
    """Blocks visited on "another" device (``cpu:0`` is compared by name) give the same bytes, also from a work_dir."""
    items = [tiny.inputs_for(tiny.build(name), seed=seed) for seed in range(2)]
    config = dc.QuantizationConfig(
        dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT4, dc.PerGroup(32, pad=True), symmetric=False)),
        algorithm=algorithm,
        overrides={"*.0.*": "w8a8"},
    )
    models = [
        tiny.build(name).compress(config, calibration=items, measure=False, device=device, work_dir=folder)
        for device, folder in ((None, None), ("cpu:0", tmp_path), ("cpu:0", tmp_path))
    ]
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in models[1].modules())
    for model in models[1:]:
        for key, tensor in models[0].state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize("algorithm", [dc.BRECQConfig(iterations=2), dc.GPTQConfig(), None])
def test_inference_mode_around_it_does_not_matter(algorithm: Any) -> None:
    items = [tiny.inputs_for(tiny.build("pixart"), seed=seed) for seed in range(2)]
    config = dc.QuantizationConfig(W4, algorithm=algorithm or "rtn")

    def compressed(model: Any) -> Any:
        return model.compress(config, calibration=dc.Calibration.record(model, items) if algorithm else None)

    model = tiny.build("pixart")
    with torch.inference_mode():
        compressed(model)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    for key, tensor in compressed(tiny.build("pixart")).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_reference_algorithms_refuse_float8() -> None:
    with pytest.raises(dc.ConfigError, match="BRECQConfig: rounds up or down to integer codes, got float8_e4m3fn"):
        tiny.build("llama").compress(dc.QuantizationConfig("fp8", algorithm="brecq"), calibration=[[1, 2, 3]])


@dataclass(frozen=True)
class TooLarge(AlgorithmConfig):
    kind: ClassVar[str] = "too-large"
    needs_calibration: ClassVar[bool] = True


@register_block
def needs_too_much(work: BlockWork, config: TooLarge) -> None:
    torch.empty(1 << 60, dtype=torch.int8)


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "svdquant"])
def test_weights_that_are_not_finite_are_told_by_layer(algorithm: str) -> None:
    model = tiny.build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    before = digest_of_weights(model)
    config = dc.QuantizationConfig("w4a4" if algorithm == "svdquant" else "w4a16", algorithm=algorithm)
    with pytest.raises(dc.ModelStateError, match=r"^model\.layers\.1\.mlp\.up_proj: quantization needs finite weights"):
        model.compress(config, calibration=[torch.arange(2, 10)])
    assert digest_of_weights(model) == before


def test_out_of_memory_says_what_to_lower() -> None:
    model, texts = tiny.build("llama"), [torch.randint(0, 64, (1, 24)) for _ in range(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(dc.ModelStateError, match=r"out of memory on cpu with 3 samples\. .* give fewer"):
        model.compress(dc.QuantizationConfig(W4, algorithm=TooLarge()), calibration=texts)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("way", ["record", "calibrate", "search"])
def test_out_of_memory_in_the_model_says_what_to_lower(way: str) -> None:
    """While a pipeline is recorded, and while a model runs between its blocks."""
    pipe, given = tiny.build_pipeline("pixart"), {}
    given["calibration"] = items(pipe)
    if way != "record":
        given["calibration"] = dc.Calibration.record(pipe, items(pipe), num_samples=2)

    def enter(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = pipe.transformer.pos_embed.register_forward_pre_hook(enter)
    with unchanged_by(pipe.transformer):
        what = r"smaller height=, width= .*CUDA out" if way == "record" else r"on cpu with \d samples?\. .*CUDA out"
        config = "w4a16" if way == "search" else dc.QuantizationConfig("w8a8", algorithm=SEQUENCE)
        given |= {"target_bits": 6.0} if way == "search" else {}
        with pytest.raises(dc.ModelStateError, match=f"out of memory.* {what}"):
            pipe.compress(config, measure=False, **given)
    handle.remove()


@contextlib.contextmanager
def unchanged_by(model: Any) -> Iterator[None]:
    """Inside, a call fails that is to leave the model as it was, bit for bit."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, training = list(model.modules()), model.training
    hooks = [module for module in modules if module._forward_pre_hooks or "forward" in vars(module)]
    yield
    assert list(model.modules()) == modules
    assert [module for module in modules if module._forward_pre_hooks or "forward" in vars(module)] == hooks
    assert model.training == training
    assert get_state(model) is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


LEARNED = dc.BRECQConfig(iterations=2, batch_size=1)


@pytest.mark.parametrize("algorithm", [dc.GPTQConfig(), dc.SmoothQuantConfig(), LEARNED], ids=lambda c: c.kind)
def test_inputs_that_are_not_finite_are_told_by_layer_and_sample(algorithm: Any) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    config = dc.QuantizationConfig("w8a8", algorithm=algorithm)
    message = r"^model\.layers\.0\.self_attn\.q_proj: calibration needs finite inputs, got inf or nan in sample 1\."
    with unchanged_by(model), pytest.raises(dc.ModelStateError, match=message):
        model.compress(config, calibration=[[2, 3, 4], [2, 5, 4]], measure=False)


def test_a_pipeline_that_overflows_half_way_is_told_by_layer() -> None:
    pipe = tiny.build_pipeline("pixart")
    calibration = dc.Calibration.record(pipe, items(pipe), num_samples=2)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].ff.net[0].proj.bias[0] = float("inf")
    config = dc.QuantizationConfig(W4, algorithm=dc.GPTQConfig())
    message = r"^transformer_blocks\.1\.ff\.net\.2: .* in sample 0 \(item 0, timestep \d+\)\."
    with unchanged_by(pipe.transformer), pytest.raises(dc.ModelStateError, match=message):
        pipe.compress(config, calibration=calibration, measure=False)


@pytest.mark.parametrize(
    ("name", "item", "message"),
    [
        (
            "llama",
            {"input_ids": torch.full((1, 3), 999)},
            r"sample 0 \(use_cache, input_ids\) cannot be run through Llama",
        ),
        (
            "dit",
            {"hidden_states": torch.ones(1, 4, 8, 8)},
            r"sample 0 cannot be run through transformer_blocks\.0: Attr",
        ),
    ],
)
def test_items_that_a_model_cannot_run(name: str, item: Any, message: str) -> None:
    model = tiny.build(name)
    with unchanged_by(model), pytest.raises(dc.ConfigError, match=message):
        model.compress(dc.QuantizationConfig(W4, algorithm=dc.GPTQConfig()), calibration=[item], measure=False)


def test_algorithms_for_quantized_inputs_are_refused_without_any() -> None:
    model = tiny.build("llama")
    for algorithm in (SEQUENCE, dc.QuaRotConfig()):
        config = dc.QuantizationConfig("w8a16", algorithm=algorithm)
        with pytest.raises(dc.ConfigError, match=r"Config is for quantized inputs, got none \(w8a16\)"):
            model.compression_plan(config, calibration=[[1, 2, 3]])
    model.compression_plan(dc.QuantizationConfig("w8a16", SEQUENCE, overrides={"q_proj": "w8a8"}), calibration=[[1, 2]])


@pytest.mark.parametrize(
    "algorithm",
    [
        SEQUENCE,
        dc.GPTQConfig(asymmetric=True),
        dc.AWQConfig(num_ratios=4),
        dc.BRECQConfig(iterations=10, warmup=0.0, learning_rate=0.1, batch_size=4),
    ],
    ids=["smoothing", "gptaq", "awq", "brecq"],
)
def test_padding_does_not_count(algorithm: Any) -> None:
    """A padded batch calibrates as its texts do one by one; taken for text, the padding decides."""
    size = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128}
    texts = [torch.randint(2, 120, (1, length)) for length in (5, 24, 9, 7)]
    batch = {"input_ids": torch.ones(4, 24, dtype=torch.long), "attention_mask": torch.zeros(4, 24, dtype=torch.long)}
    for row, text in enumerate(texts):
        places = slice(24 - text.shape[1], 24) if row % 2 else slice(0, text.shape[1])
        batch["input_ids"][row, places], batch["attention_mask"][row, places] = text[0], 1
    scheme = "w8a8" if algorithm is SEQUENCE else W4

    def weights(calibration: list[Any]) -> torch.Tensor:
        model = tiny.build("llama", **size)
        with torch.no_grad():  # the padding's embedding points nowhere near the others
            model.model.embed_tokens.weight[1, 8:] = 0
        model.compress(dc.QuantizationConfig(scheme, algorithm), calibration=calibration, measure=False)
        return torch.cat([layer.weight.flatten() for layer in quantized_layers(model).values()])

    expected, found, unmasked = weights(texts), weights([batch]), weights([{"input_ids": batch["input_ids"]}])
    # Sums differ in the last bits, and so may a tie.
    assert (found - expected).norm() < 0.1 * (unmasked - expected).norm()


def test_a_denoiser_without_its_pipeline_takes_the_calibration_of_it(tmp_path: Path) -> None:
    pipe, config = tiny.build_pipeline("pixart"), dc.QuantizationConfig("w8a8", algorithm=SEQUENCE)
    found = dc.Calibration.record(pipe, items(pipe), components=["transformer", "text_encoder"])
    with pytest.raises(dc.ConfigError, match=r"got those of 'transformer', 'text_encoder'\. Choose: calibration\.only"):
        tiny.build("pixart").compress(config, calibration=found)
    dc.Calibration.record(pipe, items(pipe)).save(tmp_path / "whole.safetensors")
    pipe.compress(config, calibration=found, measure=False)
    for one in (found.only("transformer"), dc.Calibration.load(tmp_path / "whole.safetensors")):
        alone = tiny.build_pipeline("pixart").transformer.compress(config, calibration=one, measure=False)
        assert get_state(alone).config.calibration["sampling"]["steps"] == [3]
        assert digest_of_weights(alone) == digest_of_weights(pipe.transformer)
    with pytest.raises(dc.ConfigError, match="no samples of 'unet', only of 'transformer'"):
        found.only("unet")


def test_a_plan_carries_its_calibration() -> None:
    pipe = tiny.build_pipeline("pixart")
    calibration = dc.Calibration.record(pipe, items(pipe), num_samples=2)
    plan = pipe.compression_plan(dc.QuantizationConfig(W4, algorithm=dc.GPTQConfig()), calibration=calibration)
    plan.keep("transformer.transformer_blocks.0")
    pipe.compress(plan, measure=False)
    assert "transformer_blocks.0.attn1.to_q" not in quantized_layers(pipe.transformer)
    assert "transformer_blocks.1.attn1.to_q" in quantized_layers(pipe.transformer)


def test_bars_can_be_switched_off() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = tiny.build("llama").compress("w8a16", calibration=[[1, 2, 3]], measure=False)
    finally:
        logging.enable_progress_bar()
    assert quantized_layers(model)


def test_an_interrupted_call_leaves_the_model_as_it_was() -> None:
    pipe = tiny.build_pipeline("flux")
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    modules = list(pipe.transformer.modules())

    def callback(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if stage.startswith("Calibrating") and done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.compress(
            dc.QuantizationConfig("w8a8", algorithm=SEQUENCE), calibration=items(pipe), callback=callback, measure=False
        )
    assert list(pipe.transformer.modules()) == modules
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in modules)
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_errors_come_before_any_work(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    gptq = dc.QuantizationConfig("w8a8", algorithm=dc.GPTQConfig())
    with pytest.raises(dc.ConfigError, match=r"GPTQ .* needs calibration data, got none"):
        pipe.compress(gptq)
    with pytest.raises(dc.ConfigError, match="calibration: given, but nothing uses it"):
        pipe.compress("w8a8", algorithm="rtn", calibration=["a cat"])
    with pytest.raises(dc.ConfigError, match="at least one item"):
        pipe.compress(gptq, calibration=[])
    other = dc.Calibration.record(
        tiny.build_pipeline("stable_diffusion"), ["a cat"], num_samples=1, height=32, width=32
    )
    with pytest.raises(dc.ConfigError, match="no samples of 'transformer', only of 'unet'"):
        pipe.compress(gptq, calibration=other)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(dc.ConfigError, match="weights quantized while they load see none"):
        type(pipe.transformer).from_pretrained(tmp_path / "transformer", quantization_config=gptq)
    assert not quantized_layers(pipe.transformer)


class KeywordBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)
        self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(input=torch.nn.functional.gelu(self.up(input=self.norm(x))))


class KeywordModel(ModelMixin, ConfigMixin):
    """Gives its layers their input by its name."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(KeywordBlock() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    "algorithm",
    [dc.GPTQConfig(), [dc.AWQConfig(), dc.GPTQConfig()], dc.SmoothQuantConfig(), dc.BRECQConfig(iterations=2)],
    ids=["gptq", "awq, gptq", "smoothquant", "brecq"],
)
def test_layers_that_get_their_input_by_name(algorithm: Any) -> None:
    torch.manual_seed(0)
    model = KeywordModel().eval()
    data = [{"x": torch.randn(2, 5, 64)} for _ in range(3)]
    with torch.no_grad():
        dense = model(data[0]["x"])
        model.compress("w8a8", algorithm=algorithm, calibration=data)
        assert relative_rms(model(data[0]["x"]), dense) < 0.02
    assert not any(module._forward_pre_hooks for module in model.modules())
