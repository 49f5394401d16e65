"""What is recorded of a pipeline's trajectory and of a model, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.runtime.steps import tracker_of


def arguments(pipe: Any, steps: int = 10) -> dict[str, Any]:
    given = tiny.call_kwargs(pipe, steps=steps)
    return {key: value for key, value in given.items() if key not in ("generator", "prompt", "output_type")}


@pytest.mark.parametrize("name", sorted(tiny.PIPELINES))
def test_samples_are_calls_of_real_trajectories_spread_over_the_steps(name: str) -> None:
    pipe = tiny.build_pipeline(name)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, denoiser)
    found = Calibration.record(pipe, ["a cat", "a dog", "a red house"], num_samples=10, **arguments(pipe))
    samples = found.of(denoiser)
    assert {s.item for s in samples} == {0, 1, 2}
    assert len({s.step for s in samples}) >= 8  # of ten
    calls_per_step = 2 if name == "wan" else 1
    assert len(samples) == 10 * calls_per_step
    # Any prefix is spread, too: the first five of ten steps are not neighbours.
    first = sorted({s.step for s in found.take(5 * calls_per_step).of(denoiser)})
    assert len(first) == 5
    assert first[-1] - first[0] >= 6
    for sample in samples:  # they can be run again
        with torch.no_grad():
            sample.call.run(model)
    assert tracker_of(model) is None
    assert not model._forward_pre_hooks


def test_recorded_inputs_are_those_of_the_same_seed() -> None:
    pipe = tiny.build_pipeline("pixart")
    seen: list[torch.Tensor] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    pipe("a cat", generator=torch.Generator().manual_seed(7), **arguments(pipe))
    handle.remove()
    found = Calibration.record(pipe, ["a cat"], num_samples=4, seed=7, **arguments(pipe))
    for sample in found.of("transformer"):
        x = sample.call.args[0] if sample.call.args else sample.call.kwargs["hidden_states"]
        assert torch.equal(x, seen[sample.step])


def test_dicts_override_what_is_given_for_all() -> None:
    pipe = tiny.build_pipeline("pixart")
    items = [{"prompt": "a cat", "num_inference_steps": 3}, {"prompt": "a dog"}]
    found = Calibration.record(pipe, items, num_samples=6, **arguments(pipe, steps=6))
    steps = {item: max(s.step for s in found.of("transformer") if s.item == item) for item in (0, 1)}
    assert steps[0] <= 2 < steps[1]
    assert "num_inference_steps 3" in found.summary()


def test_text_encoder_and_denoiser_together() -> None:
    pipe = tiny.build_pipeline("pixart")
    found = Calibration.record(
        pipe, ["a cat", "a dog"], num_samples=4, components=["transformer", "text_encoder"], **arguments(pipe)
    )
    assert set(found.components) == {"transformer", "text_encoder"}
    assert 0 < len(found.of("text_encoder")) <= 4


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline(name)
    found = Calibration.record(pipe, ["a very secret cat"], num_samples=3, **arguments(pipe))
    found.save(tmp_path / "calibration.safetensors")
    assert b"secret" not in (tmp_path / "calibration.safetensors").read_bytes()
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    assert isinstance(loaded, Calibration)
    assert loaded.fingerprint == found.fingerprint
    assert loaded.summary() == found.summary()
    with torch.no_grad():
        for a, b in zip(found.of("transformer"), loaded.of("transformer"), strict=True):
            left, right = (s.call.run(pipe.transformer)[0] for s in (a, b))
            assert torch.equal(left, right)
    other = Calibration.record(pipe, ["a dog"], num_samples=3, **arguments(pipe))
    assert other.fingerprint != found.fingerprint
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a calibration file"):
        Calibration.load(tmp_path / "bad.safetensors")


def test_weights_are_kept_and_checked(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    found = Calibration.record(pipe, ["a cat"], num_samples=4, **arguments(pipe))
    late = found.weighted(lambda sample: 2.0 if sample.timestep < 500 else torch.arange(4.0))
    assert {type(sample.weight) for sample in late.of("transformer")} == {float, torch.Tensor}
    assert found.weighted(lambda sample: 1.0).fingerprint == found.fingerprint != late.fingerprint
    late.save(tmp_path / "weighted.safetensors")
    again = Calibration.load(tmp_path / "weighted.safetensors")
    assert again.fingerprint == late.fingerprint
    for mine, theirs in zip(again.of("transformer"), late.of("transformer"), strict=True):
        assert torch.equal(torch.as_tensor(mine.weight), torch.as_tensor(theirs.weight))
    for weight in (-1.0, float("nan"), torch.tensor([1.0, -1.0])):
        with pytest.raises(ConfigError, match="weights must be finite and at least 0"):
            found.weighted(lambda sample, weight=weight: weight)
    with pytest.raises(ConfigError, match="must not all be 0, got that for transformer"):
        found.weighted(lambda sample: 0.0)


def test_language_model_items() -> None:
    model = tiny.build("llama")

    class Tokenizer:
        def __call__(self, text: str, **kwargs: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[ord(c) % 32 for c in text][: kwargs["max_length"]]])}

        def apply_chat_template(self, messages: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            return self("".join(m["content"] for m in messages), max_length=kwargs["max_length"])

    items = [
        "some text",
        [1, 2, 3],
        torch.tensor([4, 5]),
        {"input_ids": [[6, 7, 8]]},
        [{"role": "user", "content": "hi"}],
    ]
    found = Calibration.record(model, items, tokenizer=Tokenizer(), max_length=4)
    ids = [s.call.kwargs["input_ids"] for s in found.of("")]
    assert [x.shape[1] for x in ids] == [4, 3, 2, 3, 2]
    with torch.no_grad():
        for sample in found.of(""):
            sample.call.run(model)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "at least one item"),
        ("a prompt", "a list of items is needed"),
        ([3], "takes no class label"),
        ([2.5], "a prompt, a class label or a dict"),
        ([{"promt": "a cat"}], "takes no promt"),
    ],
)
def test_wrong_items_for_a_pipeline(items: Any, message: str) -> None:
    pipe = tiny.build_pipeline("flux")
    with pytest.raises(ConfigError, match=message):
        Calibration.record(pipe, items, **arguments(pipe))


@pytest.mark.parametrize("given", [{"num_samples": 0}, {"num_samples": 2.5}, {"num_samples": "2"}, {"seed": None}])
def test_wrong_numbers(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(given))} must be a .*number.*, got "):
        Calibration.record(tiny.build_pipeline("pixart"), ["a cat"], **given)


def test_wrong_items_for_a_model() -> None:
    model = tiny.build("llama")
    with pytest.raises(ConfigError, match="texts need a tokenizer"):
        Calibration.record(model, ["text"])
    with pytest.raises(ConfigError, match="without any"):
        Calibration.record(model, [{"words": "text"}])
    with pytest.raises(ConfigError, match="arguments of a pipeline's call"):
        Calibration.record(model, [[1]], num_inference_steps=3)
    with pytest.raises(ConfigError, match="num_samples"):
        Calibration.record(model, [[1]], num_samples=0)
