"""Static input scales through compress: saved, resumed, refused; and runs that are far from their calibration."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler

import diffuse_compress as dc
import tiny
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.calibration.work_folder import digest_of_weights
from diffuse_compress.calls import Call
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.runtime.sampling import SamplingSettings
from diffuse_compress.runtime.steps import tracker_of

ACT = dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False, symmetric=False)
W8A8 = dc.Scheme(dc.WeightScheme("int8"), ACT)
STEPS = 5


def call(pipe: Any, **changes: Any) -> dict[str, Any]:
    given = tiny.call_kwargs(pipe, steps=STEPS, output_type="latent")
    return {**given, "guidance_scale": 3.0, **changes}


def recorded(pipe: Any, **changes: Any) -> dc.Calibration:
    given = call(pipe, **changes)
    for name in ("generator", "prompt", "output_type"):
        given.pop(name)
    return dc.Calibration.record(pipe, ["a secret cat", "a dog"], num_samples=4, **given)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, dc.Calibration]:
    """A compressed tiny PixArt, the latents it gives, and what it was calibrated on."""
    pipe, folder = tiny.build_pipeline("pixart"), tmp_path_factory.mktemp("static")
    calibration = recorded(pipe)
    config = dc.QuantizationConfig(W8A8, modulation_scheme="w8a16", observer="percentile")
    plan = pipe.compression_plan(config, calibration=calibration)
    assert "w8a8-static by round-to-nearest" in str(plan)
    pipe.compress(plan, measure=False)
    assert plan.bytes_after == pipe.compression_report().bytes_after
    latents = tiny.sample(pipe, **call(pipe))
    pipe.save_pretrained(folder)
    return folder, latents, calibration


def load(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_reloaded_bit_for_bit_with_what_it_was_calibrated_on(saved: tuple[Path, torch.Tensor, dc.Calibration]) -> None:
    folder, latents, calibration = saved
    pipe = load(folder)
    assert torch.equal(tiny.sample(pipe, **call(pipe)), latents)
    config = get_state(pipe.transformer).config
    assert config.spec.observer == dc.ObserverConfig("percentile")
    assert config.calibration == calibration.settings_of("transformer")
    text = (folder / "transformer" / "config.json").read_text()
    assert "secret" not in text
    stored = json.loads(text)["quantization_config"]["calibration"]
    assert stored["sampling"] == {
        "schedulers": ["DPMSolverMultistepScheduler"],
        "steps": [STEPS],
        "guidance": ["batched"],
        "sizes": [[4, 8, 8]],
    }
    assert (stored["items"], stored["samples"], stored["guidance_scale"], stored["seed"]) == (2, 4, 3.0, 0)
    assert {"python", "torch", "diffusers"} <= stored["versions"].keys()
    report = str(pipe.compression_report())
    assert "w8a8-static" in report
    assert "calibrated on 4 calls of 2 items, run with DPMSolverMultistepScheduler, 5 steps, guidance batched" in report
    pipe.decompress()
    assert tracker_of(pipe.transformer) is None


FAR = {
    "steps": ({"num_inference_steps": 2 * STEPS + 1}, r"5 steps, and this call ran with 11 steps\."),
    "few steps": ({"num_inference_steps": 2}, r"5 steps, and this call ran with 2 steps\."),
    "guidance": ({"guidance_scale": 1.0}, r"guidance batched, and this call ran with guidance none\."),
    "size": ({"height": 64, "width": 48}, r"latents of 4x8x8, and this call ran with latents of 4x16x12\."),
}


@pytest.mark.parametrize("what", [*FAR, "scheduler"])
def test_a_run_far_from_the_calibration_is_told_of_once(
    what: str, saved: tuple[Path, torch.Tensor, dc.Calibration]
) -> None:
    pipe = load(saved[0])
    pipe(**call(pipe))
    if what == "scheduler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    changes, words = FAR.get(
        what, ({}, r"DPMSolverMultistepScheduler, and this call ran with EulerDiscreteScheduler\.")
    )
    with pytest.warns(dc.DiffuseCompressWarning, match=rf"^transformer: static input scales .*with {words}") as caught:
        pipe(**call(pipe, **changes))
    assert [item.filename for item in caught if item.category is dc.DiffuseCompressWarning] == [__file__]
    pipe(**call(pipe, **changes))  # a second warning would be an error
    pipe(**call(pipe, num_inference_steps=20))


def test_near_runs_and_runs_that_cannot_be_judged_are_silent(saved: tuple[Path, torch.Tensor, dc.Calibration]) -> None:
    """Our warnings are errors in every test."""
    pipe = load(saved[0])
    pipe(**call(pipe, num_inference_steps=2 * STEPS, height=64, width=32))
    pipe(**call(pipe, num_inference_steps=3))
    for _ in range(4):  # no scheduler
        with torch.no_grad():
            pipe.transformer(**tiny.inputs_for(pipe.transformer, side=32))
    dynamic = tiny.build_pipeline("pixart")
    dynamic.compress(dc.QuantizationConfig("w8a8", algorithm="gptq"), calibration=saved[2], measure=False)
    assert tracker_of(dynamic.transformer) is None
    assert "calibrated on 4 calls" in str(dynamic.compression_report())
    dynamic(**call(dynamic, num_inference_steps=20))


def test_a_copy_and_a_hand_written_loop_are_compared_too(saved: tuple[Path, torch.Tensor, dc.Calibration]) -> None:
    model = copy.deepcopy(load(saved[0]).transformer)
    scheduler, given = DDIMScheduler(), tiny.inputs_for(model, batch=2)
    scheduler.set_timesteps(STEPS)
    given.pop("timestep")
    x = given.pop("hidden_states")

    def loop() -> None:
        for t in scheduler.timesteps:
            with torch.no_grad():
                noise = model(x, timestep=t.expand(2), **given)[0]
            scheduler.step(noise[:, :4], t, x)

    with pytest.warns(
        dc.DiffuseCompressWarning,
        match=r"with DPMSol.*, guidance batched, and this call ran with DDIMScheduler, guidance none",
    ):
        loop()
    loop()


def test_guidance_kinds_of_pipelines() -> None:
    kinds = {}
    for name, changes in (("wan", {}), ("flux", {}), ("flux", {"true_cfg_scale": 2.0, "negative_prompt": "x"})):
        pipe = tiny.build_pipeline(name)
        found = recorded(pipe, **changes)
        kinds[name, bool(changes)] = found.sampling_of("transformer").guidance
    assert kinds == {
        ("wan", False): ("sequential",),
        ("flux", False): ("embedded",),
        ("flux", True): ("embedded and sequential",),
    }


def test_settings_are_far_by_ratio_and_name_only() -> None:
    known = SamplingSettings(("A", "B"), (10, 30), ("none", "batched"), ((4, 8, 8), (4, 16, 16)))
    assert SamplingSettings.from_dict(json.loads(json.dumps(known.to_dict()))) == known
    near = SamplingSettings(("B",), (5, 60), ("none",), ((4, 8, 4), (4, 32, 16)))
    assert known.far(near) == []
    assert known.far(SamplingSettings()) == SamplingSettings().far(known) == []
    far = SamplingSettings(("C",), (4,), ("sequential",), ((4, 32, 17),))
    assert [theirs for _, theirs in known.far(far)] == ["C", "guidance sequential", "4 steps", "latents of 4x32x17"]
    assert [theirs for _, theirs in known.far(SamplingSettings(steps=(61,)))] == ["61 steps"]
    assert str(known | far).startswith("A or B or C, 4 or 10 or 30 steps, guidance batched or none or sequential")


@pytest.mark.parametrize("name", ["unet_sd1", "llama"])
def test_finished_blocks_hold_static_scales(name: str, tmp_path: Path) -> None:
    """Convolutions and a language model; the observer is part of the recipe."""
    items = [tiny.inputs_for(tiny.build(name), seed=seed) for seed in range(2)]
    given: dict[str, Any] = {"calibration": items, "work_dir": tmp_path, "measure": False}
    algorithm = [dc.SmoothQuantConfig(), dc.GPTQConfig()]
    models = [
        tiny.build(name).compress(dc.QuantizationConfig(W8A8, algorithm, observer="minmax"), device=device, **given)
        for device in ("cpu:0", None)
    ]
    assert digest_of_weights(models[0]) == digest_of_weights(models[1])
    layers = quantized_layers(models[1])
    assert all(layer.input_scale.item() > 0 for layer in layers.values())
    assert len({layer.input_zero_point.item() for layer in layers.values()}) > 1
    with pytest.raises(dc.ConfigError, match=r'recipe \(observer \{"kind": "minmax".* -> \{"kind": "mse"'):
        tiny.build(name).compress(dc.QuantizationConfig(W8A8, algorithm, observer="mse"), **given)
    assert tracker_of(models[0]) is None  # nothing told how these calls came about


def with_spare_layer() -> Any:
    model = tiny.build("pixart")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.transformer_blocks[0].spare = torch.nn.Linear(128, 128).eval()
    return model


def test_layers_that_no_sample_reaches_are_dynamic_and_listed(tmp_path: Path) -> None:
    items = [tiny.inputs_for(tiny.build("pixart"), seed=seed) for seed in range(2)]
    config = dc.QuantizationConfig(W8A8, modules_to_not_convert=["transformer_blocks.1"])
    given: dict[str, Any] = {"calibration": items, "measure": False}
    models = [with_spare_layer().compress(config, work_dir=tmp_path, **given) for _ in range(2)]
    models.append(with_spare_layer().compress(models[0].compression_recipe(), **given))
    for model in models:  # the second from finished blocks, the third from the resolved recipe
        layer = model.transformer_blocks[0].spare
        assert layer.scheme == W8A8.with_dynamic_inputs()
        assert model.transformer_blocks[0].ff.net[2].scheme == W8A8
        assert digest_of_weights(model) == digest_of_weights(models[0])
    line = "no sample reached 1 layers that were to have static inputs, e.g. transformer_blocks.0.spare: their inputs"
    assert [line in str(model.compression_report()) for model in models] == [True, True, False]


def test_what_static_inputs_need_is_said_first(tmp_path: Path) -> None:
    model = tiny.build("llama")
    before = digest_of_weights(model)
    for config in (dc.QuantizationConfig(W8A8), dc.QuantizationConfig("w8a8", overrides={"*.q_proj": W8A8})):
        with pytest.raises(dc.ConfigError, match=r"a static input scale \(w8a8-static\) needs .* Pass calibration="):
            model.compress(config)
    with pytest.raises(dc.ConfigError, match="observer: chooses ranges of static inputs, and w8a8 has none"):
        dc.QuantizationConfig("w8a8", observer="minmax")
    with pytest.raises(dc.ConfigError, match="unknown kind 'mimax'; did you mean 'minmax'"):
        dc.QuantizationConfig(W8A8, observer="mimax")
    with pytest.raises(dc.ConfigError, match="unknown field 'percent'; did you mean 'percentile'"):
        dc.QuantizationConfig(W8A8, observer={"kind": "percentile", "percent": 99})
    with pytest.raises(dc.ConfigError, match="a search tries formats with dynamic inputs, got w8a8-static"):
        dc.sensitivity(model, [W8A8])
    model.save_pretrained(tmp_path)
    with pytest.raises(dc.ConfigError, match="a static input scale needs calibration data, and weights quantized"):
        type(model).from_pretrained(tmp_path, quantization_config=dc.QuantizationConfig(W8A8))
    assert digest_of_weights(model) == before


def test_configs_keep_the_observer_only_where_something_is_static() -> None:
    config = dc.QuantizationConfig(W8A8, observer=dc.ObserverConfig("mse", norm=2.0))
    again = dc.QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert config.spec.differences(dc.QuantizationConfig(W8A8).spec) == [
        "observer: ObserverConfig(kind='mse', norm=2.0, percentile=99.99) -> "
        "ObserverConfig(kind='minmax', norm=2.4, percentile=99.99)"
    ]
    assert "observer" not in dc.QuantizationConfig("w8a8").to_dict()


def test_models_in_train_mode_are_calibrated_in_eval_mode() -> None:
    """A dropout of 0.9 would change every sum; afterwards all modules are as before, the new ones too."""
    items = [tiny.inputs_for(tiny.build("pixart"), seed=seed) for seed in range(2)]
    config = dc.QuantizationConfig(W8A8, algorithm=dc.GPTQConfig())
    expected = tiny.build("pixart").compress(config, calibration=items, measure=False)
    model = tiny.build("pixart", dropout=0.9).train()
    model.transformer_blocks[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}

    def stop(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.compress(config, calibration=items, measure=False, callback=stop)
    assert {name: module.training for name, module in model.named_modules()} == flags
    model.compress(config, calibration=items, measure=False)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert digest_of_weights(model) == digest_of_weights(expected)


@pytest.mark.parametrize("name", sorted(tiny.PIPELINES))
def test_samples_of_a_float32_pipeline_fit_a_bfloat16_one(name: str) -> None:
    """Argument by argument of the dtype that the bfloat16 pipeline gives."""
    pipes = [tiny.build_pipeline(name, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    denoiser = "unet" if hasattr(pipes[0], "unet") else "transformer"
    full, half = (recorded(pipe).of(denoiser, torch.bfloat16)[0].call for pipe in pipes)
    assert full.kwargs.keys() == half.kwargs.keys()
    for key, mine, theirs in (
        *((str(i), *pair) for i, pair in enumerate(zip(full.args, half.args, strict=True))),
        *((key, full.kwargs[key], half.kwargs[key]) for key in full.kwargs),
    ):
        if isinstance(mine, torch.Tensor) and mine.ndim > 1:
            assert mine.dtype == theirs.dtype, key
    with torch.no_grad():
        full.run(getattr(pipes[1], denoiser))


def test_what_pipelines_make_in_a_dtype_of_its_own_keeps_it() -> None:
    """999.0 would be 1000 in bfloat16, and the cosines of a rotary table lose what tells neighbours apart."""
    table, wide = torch.rand(6, 8), torch.rand(2, 6, 8)
    kwargs = {"hidden_states": wide, "timestep": torch.full((2, 6), 999.0), "image_rotary_emb": (table, table)}
    settings = {"components": {"": {"dtype": "float32"}}}
    samples = {
        "": [Sample(Call((wide, torch.tensor(999.0)), {**kwargs, "added": {"ids": wide, "n": torch.arange(3)}}))]
    }
    (cast,) = dc.Calibration(samples, settings).of("", torch.bfloat16)
    assert torch.equal(cast.call.args[0], wide.bfloat16())
    assert torch.equal(cast.call.kwargs["added"]["ids"], wide.bfloat16())
    assert cast.call.args[1].dtype == cast.call.kwargs["timestep"].dtype == table.dtype
    assert torch.equal(cast.call.kwargs["image_rotary_emb"][1], table)
    assert cast.call.kwargs["added"]["n"].dtype == torch.int64
    for same in (
        dc.Calibration(samples, settings).of("", torch.float32),
        dc.Calibration(samples).of("", torch.float16),
    ):
        assert same is samples[""]
