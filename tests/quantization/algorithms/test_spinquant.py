"""SpinQuant: rotations stay orthogonal, logits stay, learning lowers the loss, and runs resume and fail cleanly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffuse_compress as dc
import tiny
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.families.registry import residual_stream_of
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.integrations.doors import untie_head
from diffuse_compress.quantization.algorithms.base import algorithm_from_dict, algorithm_to_dict
from diffuse_compress.quantization.algorithms.spinquant import RotationLearner, SpinQuantConfig, cayley_step
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.residual import Rotations, hadamard_rotations, rotate_residual
from diffuse_compress.quantization.rotation import rotate
from diffuse_compress.quantization.scheme import Scheme
from tolerance import assert_close, relative_rms

SHORT = SpinQuantConfig(iterations=2)


def tokens(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, 20), generator=torch.Generator().manual_seed(seed))


def texts(count: int = 3) -> list[torch.Tensor]:
    return [tokens(1, seed) for seed in range(1, count + 1)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def off(matrix: torch.Tensor) -> float:
    """How far a matrix is from an orthogonal one."""
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype)
    return float((matrix @ matrix.t() - identity).abs().max())


def schemes_of(model: Any, preset: str = "w4a4") -> dict[str, Scheme]:
    plan = model.compression_plan(dc.QuantizationConfig(preset, algorithm=SHORT), calibration=texts())
    return plan.components[""].layers


def learner(model: Any, config: SpinQuantConfig = SHORT, preset: str = "w4a4") -> RotationLearner:
    schemes, stream = schemes_of(model, preset), residual_stream_of(model)
    untie_head(model, stream.head, stream.embedding)
    return RotationLearner(model, stream, schemes, config, torch.device("cpu"))


def test_steps_stay_on_the_manifold_and_go_downhill() -> None:
    torch.manual_seed(0)
    target = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    if torch.linalg.det(target) < 0:
        target[0] *= -1
    matrix = torch.eye(24, dtype=torch.float64)
    before = float((matrix - target).square().sum())
    for _ in range(200):
        matrix = cayley_step(matrix, 2 * (matrix - target), 0.1)
    assert off(matrix) < 1e-12
    assert float((matrix - target).square().sum()) < 0.05 * before
    # To first order it is the gradient's skew part; whatever its size, a step is bounded.
    gradient = torch.randn(24, 24, dtype=torch.float64)
    skew = gradient @ matrix.t()
    skew = (skew - skew.t()) / 2
    small = cayley_step(matrix, gradient, 1e-6)
    assert torch.allclose((small - matrix) / 1e-6, -skew @ matrix, atol=1e-4)
    far = cayley_step(matrix, 1e9 * gradient, 1.0)
    assert off(far) < 1e-12
    assert float((far - matrix).norm()) < 1.01
    assert torch.equal(cayley_step(matrix, torch.zeros_like(matrix), 1.0), matrix)
    assert torch.equal(cayley_step(matrix, torch.full_like(matrix, torch.nan), 1.0), matrix)


def test_starts_with_the_rotations_that_quarot_takes() -> None:
    """And a random Hadamard matrix written out does what the fast one does."""
    fast, written = tiny.build("qwen2"), tiny.build("qwen2")
    stream = residual_stream_of(fast)
    generator = torch.Generator().manual_seed(7)
    rotations = hadamard_rotations(stream, generator)
    assert max(off(matrix) for matrix in rotations.matrices) < 1e-12
    assert not torch.equal(rotations.stream, rotate(torch.eye(stream.width, dtype=torch.float64), stream.width))
    with torch.no_grad():
        for model, given in ((fast, None), (written, rotations)):
            rotate_residual(model, stream, torch.Generator().manual_seed(7), lambda parameter: None, given)
    for key, tensor in fast.state_dict().items():
        assert torch.allclose(tensor, written.state_dict()[key], atol=1e-6), key


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
def test_logits_stay_with_any_rotation_and_the_loop_computes_the_folded_model(name: str) -> None:
    model = tiny.build(name)
    dense = logits(model)
    found = learner(model, preset="w8a8")
    torch.manual_seed(0)
    start = hadamard_rotations(residual_stream_of(model), torch.Generator())
    moved = start.of([cayley_step(matrix, torch.randn_like(matrix), 0.5) for matrix in start.matrices])
    assert max(off(matrix) for matrix in moved.matrices) < 1e-6
    schemes, found.layers = found.layers, {}
    call = Call((), {"input_ids": tokens()})
    exact = found.loss(moved, [call], [1.0])
    expected = torch.nn.functional.cross_entropy(dense[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    assert exact == pytest.approx(float(expected), rel=1e-5)
    found.layers = schemes
    found._clips = found._ranges(moved)
    loop = found._tensors(moved)
    with torch.no_grad():
        rotate_residual(model, residual_stream_of(model), torch.Generator(), lambda parameter: None, moved)
    assert_close(logits(model), dense, torch.float32)
    for layer, scheme in schemes.items():
        weight = model.get_submodule(layer).weight.detach()
        weight = weight if scheme.input_rotation is None else rotate(weight, scheme.input_rotation)
        assert relative_rms(weight, loop[f"{layer}.weight"]) < 0.02, layer


@pytest.mark.parametrize("objective", ["language", "output"])
def test_learning_lowers_the_loss_and_leaves_the_model(objective: str) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 20  # something to rotate away
        model.model.embed_tokens.weight[:, 40] *= -15
    config = SpinQuantConfig(iterations=8, objective=objective)
    found = learner(model, config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = hadamard_rotations(found.stream, torch.Generator().manual_seed(0))
    calls = [Call((), {"input_ids": text}) for text in texts(2)]
    learned = found.learn(start, calls, [1.0, 1.0], torch.Generator().manual_seed(1))
    assert max(off(matrix) for matrix in learned.matrices) < 1e-6
    assert any(not torch.equal(one, other) for one, other in zip(start.matrices, learned.matrices, strict=True))
    assert found.loss(learned, calls, [1.0, 1.0]) < found.loss(start, calls, [1.0, 1.0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_does_worse_is_not_taken() -> None:
    found = learner(tiny.build("llama"), SpinQuantConfig(iterations=1))
    start = hadamard_rotations(found.stream, torch.Generator().manual_seed(0))
    found.loss = lambda rotations, calls, weights: float(rotations is not start)  # type: ignore[method-assign]
    calls = [Call((), {"input_ids": tokens()})]
    learned = found.learn(start, calls, [1.0], torch.Generator())
    assert torch.equal(learned.stream, start.stream)


def test_padding_does_not_count() -> None:
    found = learner(tiny.build("llama"))
    start = hadamard_rotations(found.stream, torch.Generator())
    found._clips = found._ranges(start)
    ids = tokens(1)
    padded = torch.cat([ids, torch.zeros(1, 6, dtype=ids.dtype)], dim=1)
    mask = (torch.arange(26) < 20).long()[None]
    alone = found.loss(start, [Call((), {"input_ids": ids})], [1.0])
    both = Call((), {"input_ids": padded, "attention_mask": mask})
    assert found.loss(start, [both], [mask[0].float()]) == pytest.approx(alone, rel=1e-4)
    assert found.loss(start, [both], [1.0]) != pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_compress_saves_reloads_and_decompresses(tied: bool, tmp_path: Path) -> None:
    model = tiny.build("llama", tie_word_embeddings=tied)
    dense = logits(model)
    config = dc.QuantizationConfig("w8a8", algorithm=[SHORT, dc.GPTQConfig()])
    plan = model.compression_plan(config, calibration=texts())
    model.compress(plan, measure=False)
    assert plan.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())
    rotations = {name: layer.scheme.input_rotation for name, layer in quantized_layers(model).items()}
    assert {name.rpartition(".")[2] for name, size in rotations.items() if size} == {"down_proj"}
    assert relative_rms(dense, logits(model)) < 0.03
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert "SpinQuant (2 steps), then GPTQ" in str(again.compression_report())
    again.decompress()
    assert relative_rms(dense, logits(again)) < 0.03


def test_no_iterations_are_quarot() -> None:
    spun = tiny.build("llama").compress(
        dc.QuantizationConfig("w4a4", algorithm=SpinQuantConfig(iterations=0)), calibration=texts()
    )
    rotated = tiny.build("llama").compress(dc.QuantizationConfig("w4a4", algorithm=dc.QuaRotConfig(residual=True)))
    for key, tensor in rotated.state_dict().items():
        if key.endswith("qweight"):
            assert (tensor == spun.state_dict()[key]).float().mean() > 0.999, key  # but for ties


def test_a_failure_leaves_the_model_and_a_second_run_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffuse_compress.apply_rotation._SAVED_EVERY", 2)
    config = dc.QuantizationConfig("w4a4", algorithm=SpinQuantConfig(iterations=4))
    whole = tiny.build("llama").compress(config, calibration=texts(), measure=False)
    model, seen = tiny.build("llama"), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if stage.startswith("Learning") and done == 3:
            raise KeyboardInterrupt

    def note(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if stage.startswith("Learning"):
            seen.append((done, total, metrics["loss"]))

    with pytest.raises(KeyboardInterrupt):
        model.compress(config, calibration=texts(), measure=False, work_dir=tmp_path, callback=stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not quantized_layers(model)
    assert not any(module._forward_hooks for module in model.modules())
    model.compress(config, calibration=texts(), measure=False, work_dir=tmp_path, callback=note)
    assert [done for done, _, _ in seen] == [3, 4]
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_on_another_device_it_is_the_same() -> None:
    """``cpu:0`` is compared by name."""
    config = dc.QuantizationConfig("w4a4", algorithm=SpinQuantConfig(iterations=2))
    here, there = (
        tiny.build("llama").compress(config, calibration=texts(), measure=False, device=device)
        for device in (None, "cpu:0")
    )
    for key, tensor in here.state_dict().items():
        assert torch.equal(tensor, there.state_dict()[key]), key


def test_config_is_json_and_refuses() -> None:
    assert algorithm_from_dict(algorithm_to_dict(SHORT)) == SHORT
    config = dc.QuantizationConfig("w4a4", algorithm=SHORT)
    for fields, message in (
        ({"iterations": -1}, "iterations >= 0"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"objective": "kl"}, "objective must be one of"),
    ):
        with pytest.raises(ConfigError, match=f"SpinQuantConfig: .*{message}"):
            SpinQuantConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="SpinQuantConfig has nothing to do after QuaRotConfig"):
        dc.QuantizationConfig("w4a4", algorithm=[dc.QuaRotConfig(), SHORT])
    with pytest.raises(ConfigError, match="QuaRotConfig has nothing to do after SpinQuantConfig"):
        dc.QuantizationConfig("w4a4", algorithm=[SHORT, dc.QuaRotConfig()])
    with pytest.raises(ConfigError, match=r"Gemma2ForCausalLM: .* normed before it is added"):
        tiny.build("gemma2").compression_plan(config, calibration=texts())
    with pytest.raises(ConfigError, match=r"PixArtTransformer2DModel: .* not known to have norms"):
        tiny.build("pixart").compression_plan(config)
    with pytest.raises(ConfigError, match="needs calibration data"):
        tiny.build("llama").compress(config)
    assert PRESETS["w4a4"].scheme.activation is not None
    model = tiny.build("llama")
    embeddings = [{"inputs_embeds": torch.randn(1, 8, 128)}]
    with pytest.raises(ConfigError, match=r'gives no input_ids. Give texts or token ids, or take objective="output"'):
        model.compress(config, calibration=embeddings)
    output = dc.QuantizationConfig("w4a4", algorithm=SpinQuantConfig(iterations=1, objective="output"))
    assert quantized_layers(model.compress(output, calibration=embeddings))
    assert isinstance(hadamard_rotations(residual_stream_of(tiny.build("llama")), torch.Generator()), Rotations)
