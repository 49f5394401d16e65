"""The probe measures what it says it does, and nothing can be told from the pipeline afterwards."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress import measurement
from diffuse_compress.integrations.component import get_state
from diffuse_compress.measurement import PipelineProbe, measure_layer, relative_error
from diffuse_compress.pipeline_call import cheap_arguments, picture_of, untouched
from diffuse_compress.quantization.convert import quantize_module

W4A16 = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT4, dc.PerGroup(128)))
W8A8 = dc.Scheme(
    dc.WeightScheme(dc.NumberFormat.INT8, dc.PerChannel()), dc.ActivationScheme(dc.NumberFormat.INT8, dc.PerToken())
)


def hooks(pipe: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for part in pipe.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            found["pre"] += len(module._forward_pre_hooks)
            found["post"] += len(module._forward_hooks)
    return found


def scheduler_state(pipe: Any) -> str:
    return repr({key: value for key, value in vars(pipe.scheduler).items() if key != "_internal_dict"})


def probe_of(pipe: Any, preset: Any = "w8a8", **options: Any) -> PipelineProbe:
    return PipelineProbe(pipe, pipe.compression_plan(preset), **options)


def test_measure_layer_equals_the_errors_computed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = nn.Linear(256, 48)
    layer = quantize_module(dense, W4A16, dc.RTNConfig())
    x = torch.randn(7, 256)
    # Blocks of a few rows: the sum over blocks must be that over the whole matrix.
    monkeypatch.setattr(measurement, "_CHUNK_ELEMENTS", 5 * 256)
    found = measure_layer(dense, layer, x)
    exact, rounded = dense.weight.detach(), layer.weight.detach()
    assert found.weight_error == pytest.approx(float((exact - rounded).norm() / exact.norm()), rel=1e-5)
    y, yhat = dense(x).detach(), layer(x).detach()
    assert found.output_error == pytest.approx(float((y - yhat).norm() / y.norm()), rel=1e-5)
    assert 0.05 < found.weight_error < 0.2
    assert measure_layer(dense, layer, None).output_error is None


def test_measure_layer_convolution_and_lossless_weight() -> None:
    conv = nn.Conv2d(8, 16, 3)
    error = measure_layer(conv, quantize_module(conv, W8A8, dc.RTNConfig()), None).weight_error
    assert 0.001 < error < 0.02
    # Weights that lie on the grid lose nothing.
    dense = nn.Linear(128, 4, bias=False)
    dense.weight.data = torch.randint(-127, 128, (4, 128)).float()
    dense.weight.data[:, 0] = 127
    layer = quantize_module(dense, W8A8, dc.RTNConfig(observer="minmax"))
    assert measure_layer(dense, layer, None).weight_error == 0.0


def test_relative_error_of_zeros_is_zero_or_infinite() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.zeros(3), torch.ones(3)) == float("inf")


@pytest.mark.parametrize("name", ["pixart", "stable_diffusion", "flux"])
def test_record_dense_sees_four_timesteps_macs_and_rows(name: str) -> None:
    pipe = tiny.build_pipeline(name)
    part = "unet" if name == "stable_diffusion" else "transformer"
    probe = probe_of(pipe)
    probe.record_dense()
    assert probe.reason is None
    planned = [n for n in probe._planned[part] if isinstance(pipe.components[part].get_submodule(n), nn.Linear)]
    for layer in planned:
        rows = probe.layer_inputs(part, layer)
        assert rows is not None, layer
        assert rows.shape[1] == pipe.components[part].get_submodule(layer).in_features
        assert 4 <= rows.shape[0] <= 64
    macs = probe.macs(part)
    assert all(macs[layer] > 0 for layer in planned)
    assert probe.layer_inputs(part, "not.a.layer") is None
    probe.record_compressed()  # nothing was converted in between
    found = probe.output_error(part)
    assert found["relative_error"] == [0.0] * 4
    assert found["timesteps"] == sorted(found["timesteps"], reverse=True)
    assert len(set(found["timesteps"])) == 4
    assert probe.call_seconds(part)["before"] > 0


def test_macs_of_a_linear_are_rows_times_columns_times_outputs() -> None:
    pipe = tiny.build_pipeline("pixart")
    probe = probe_of(pipe)
    probe.record_dense()
    name = "transformer_blocks.0.attn1.to_q"
    layer = pipe.transformer.get_submodule(name)
    arguments = cheap_arguments(pipe, 4, 0, decode=False)
    side = arguments.get("height", pipe.transformer.config.sample_size * pipe.vae_scale_factor) // pipe.vae_scale_factor
    tokens = (side // 2) ** 2 * 2  # patches of 2x2; guidance doubles the batch
    assert probe.macs("transformer")[name] == 4 * tokens * layer.in_features * layer.out_features


def test_probe_leaves_no_trace(untouched_rng: None) -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.transformer.train()
    pipe.transformer.transformer_blocks[0].eval()
    pipe.scheduler.set_timesteps(7)
    pipe.set_progress_bar_config(disable=False, leave=False)
    flags = [module.training for module in pipe.transformer.modules()]
    before = hooks(pipe), scheduler_state(pipe), dict(vars(pipe)), diffusers.utils.logging.get_verbosity()
    weights = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    scheduler = pipe.scheduler
    probe = probe_of(pipe, preview=[tiny.call_kwargs(pipe, output_type="pil")])
    probe.record_dense()
    probe.record_compressed()
    probe.keep_preview(pipe)
    assert probe.reason is None
    assert (hooks(pipe), scheduler_state(pipe), dict(vars(pipe)), diffusers.utils.logging.get_verbosity()) == before
    assert pipe.scheduler is scheduler
    assert [module.training for module in pipe.transformer.modules()] == flags
    assert all(torch.equal(value, weights[key]) for key, value in pipe.transformer.state_dict().items())


def test_untouched_restores_after_an_error() -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.transformer.train()
    before = dict(vars(pipe))

    def fail() -> None:
        with untouched(pipe):
            pipe.surprise = 1
            pipe.scheduler.set_timesteps(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert dict(vars(pipe)) == before
    assert pipe.transformer.training
    assert pipe.scheduler.num_inference_steps is None


class Broken(diffusers.PixArtAlphaPipeline):
    """Fails in the middle of its run, with hooks in place."""

    def __call__(self, *args: Any, num_inference_steps: int = 20, **kwargs: Any) -> Any:
        self.transformer(**tiny.inputs_for(self.transformer))
        raise ValueError("needs a picture\nto start from")


class Demanding(diffusers.PixArtAlphaPipeline):
    def __call__(self, image: Any, prompt: str = "") -> Any:  # type: ignore[override]
        raise AssertionError("must not be called")


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Broken, r"Broken failed \(ValueError: needs a picture to start from\)"), (Demanding, "Demanding needs image")],
)
def test_pipeline_that_cannot_be_called_compresses_without_output_error(cls: type, reason: str) -> None:
    pipe = cls(**tiny.build_pipeline("pixart").components)
    counts = hooks(pipe)
    pipe.compress("w8a8")
    assert hooks(pipe) == counts
    part = pipe.compression_report().components["transformer"]
    assert part["output_error"]["relative_error"] == []
    assert re.search(reason, part["output_error"]["note"])
    assert all(weight > 0 and output is None for _, weight, output in part["layers"])
    assert part["formats"][0]["mac_share"] is None


def test_interrupt_during_the_probe_propagates_and_restores() -> None:
    class Interrupted(diffusers.PixArtAlphaPipeline):
        def __call__(self, *args: Any, num_inference_steps: int = 20, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

    pipe = Interrupted(**tiny.build_pipeline("pixart").components)
    with pytest.raises(KeyboardInterrupt):
        pipe.compress("w8a8")
    assert get_state(pipe.transformer) is None
    assert hooks(pipe) == Counter(pre=0, post=0)


def test_error_of_the_callback_propagates_and_restores() -> None:
    pipe = tiny.build_pipeline("pixart")
    stages = []

    def callback(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        stages.append(stage)
        if stage.startswith("Measuring"):
            raise RuntimeError("cancelled by the user")

    with pytest.raises(RuntimeError, match="cancelled by the user"):
        pipe.compress("w8a8", callback=callback)
    assert stages == ["Measuring the dense pipeline"]
    assert get_state(pipe.transformer) is None


def test_measure_false_runs_nothing_but_the_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.build_pipeline("pixart")
    calls = []
    original = type(pipe).__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["num_inference_steps"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", counted)
    pipe.compress("w8a8", measure=False, preview=[tiny.call_kwargs(pipe, steps=3, output_type="pil")])
    assert calls == [3, 3]
    report = pipe.compression_report()
    assert report.components["transformer"]["output_error"]["note"] == "not measured (measure=False)"
    assert len(report.preview) == 1


def test_preview_starts_both_pictures_from_the_same_noise() -> None:
    pipe = tiny.build_pipeline("pixart")
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    call = {**tiny.call_kwargs(pipe, output_type="pil"), "generator": generator}
    expected = picture_of(pipe(**{**call, "generator": torch.Generator().manual_seed(5)}))
    pipe.compress("w8a8", preview=[call, tiny.call_kwargs(pipe, seed=1, output_type="pil")])
    first, second = pipe.compression_report().preview
    assert first.before.tobytes() == expected.tobytes()
    assert torch.equal(generator.get_state(), state)
    assert first.prompt == "a red cat"
    assert 20 < first.psnr_db < 100  # w8a8 is close; another noise would give far less
    assert second.before.tobytes() != first.before.tobytes()
    after = picture_of(pipe(**call))
    assert first.after.tobytes() == after.tobytes()


def test_preview_refuses_a_bare_model_and_what_is_no_prompt() -> None:
    with pytest.raises(dc.ConfigError, match="preview= needs a pipeline"):
        tiny.build("pixart").compress("w8a8", preview=["a cat"])
    with pytest.raises(dc.ConfigError, match="a prompt or a dict of pipeline arguments, got int"):
        tiny.build_pipeline("pixart").compress("w8a8", preview=[3])
    with pytest.raises(dc.ConfigError, match="FluxPipeline takes no argument 'promt'; did you mean 'prompt'"):
        tiny.build_pipeline("flux").compress("w8a8", preview=[{"promt": "a cat"}])


def test_text_encoder_alone_stops_before_the_denoiser_runs() -> None:
    pipe = tiny.build_pipeline("pixart")
    ran = []
    pipe.transformer.register_forward_hook(lambda *_: ran.append(1))
    pipe.compress({"text_encoder": "w8a16"})
    part = pipe.compression_report().components["text_encoder"]
    assert not ran
    assert len(part["output_error"]["relative_error"]) == 2  # prompt and negative prompt
    assert part["output_error"]["timesteps"] == [None, None]


def test_vae_is_measured_through_its_decoder() -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.compress({"vae": "w8a8"})
    part = pipe.compression_report().components["vae"]
    (error,) = part["output_error"]["relative_error"]
    assert 0 < error < 0.2


def test_run_stops_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "TIME_LIMIT_SECONDS", -1.0)
    pipe = tiny.build_pipeline("pixart")
    pipe.compress("w8a8")
    found = pipe.compression_report().components["transformer"]["output_error"]
    assert found["relative_error"] == []
    assert "the run was stopped after" in found["note"]
    assert hooks(pipe) == Counter(pre=0, post=0)


def test_input_rows_shrink_to_the_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.build_pipeline("pixart")
    plan = pipe.compression_plan("w8a8")
    columns = sum(
        pipe.transformer.get_submodule(name).in_features
        for name in plan.components["transformer"].layers
        if isinstance(pipe.transformer.get_submodule(name), nn.Linear)
    )
    monkeypatch.setattr(measurement, "ROW_MEMORY_BYTES", 8 * 4 * columns)
    probe = PipelineProbe(pipe, plan)
    probe.record_dense()
    assert max(rows.shape[0] for rows in probe._rows.values()) == 8
    assert probe.notes == ["input rows sampled per layer: 8 of 64, for memory"]


def test_calls_are_spread_over_runs_of_any_length() -> None:
    for length in (1, 3, 4, 8, 9, 50, 1000):
        kept = measurement._Spread()
        for index in range(length):
            kept.offer(index if kept.is_due else None)
        picked = kept.pick(4)
        assert len(kept.items) <= 8
        assert len(picked) == min(4, length)
        assert picked[0] == 0
        assert picked[-1] >= length * 0.5 - 1
        assert picked == sorted(set(picked))


def test_cheap_arguments_shrink_large_defaults_and_keep_the_aspect() -> None:
    pipe = tiny.build_pipeline("flux")
    pipe.default_sample_size = 128
    arguments = cheap_arguments(pipe, 4, 0, decode=False)
    assert arguments["height"] * arguments["width"] <= 256 * 256
    assert arguments["output_type"] == "latent"
    assert arguments["num_inference_steps"] == 4

    class Video:
        components = copy.copy(pipe.components)

        def __call__(self, prompt: str = "", height: int = 480, width: int = 832, num_frames: int = 81) -> None: ...

    small = cheap_arguments(Video(), 4, 0, decode=True)
    assert small["num_frames"] == 9
    assert small["width"] / small["height"] == pytest.approx(832 / 480, rel=0.15)
    assert "output_type" not in small


def test_picture_of_a_video_is_its_middle_frame() -> None:
    import numpy as np

    frames = np.stack([np.full((4, 6, 3), value, dtype=np.float32) for value in (0.0, 0.5, 1.0)])[None]
    picture = picture_of(diffusers.utils.BaseOutput(frames=frames))
    assert picture.size == (6, 4)
    assert picture.getpixel((0, 0)) == (128, 128, 128)
    assert picture_of(diffusers.utils.BaseOutput()) is None
