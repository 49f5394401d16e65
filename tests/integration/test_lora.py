"""Adapters on compressed models: loaded before or after, weighted, fused and back, trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.api import compression_report
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.skeleton import read_skeleton
from tolerance import relative_rms

peft = pytest.importorskip("peft")

PRESETS = ["w8a8", "fp8", "w8a16", "w4a16", "w4a8"]
PIPELINES = ["stable_diffusion", "flux", "sd3", "wan"]


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def config(rank: int = 4, **kwargs: Any) -> Any:
    # Flux's norm1.linear too: a modulation projection, which gets another format and is told by its name.
    targets = ["to_q", "to_k", "to_v", "to_out.0", "norm1.linear"]
    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False, **kwargs)


def adapter(name: str, seed: int = 1, **kwargs: Any) -> dict[str, torch.Tensor]:
    """An adapter's file, made on a dense twin: keys as diffusers writes them."""
    twin = tiny.build_pipeline(name)
    model = denoiser(twin)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config(**kwargs))
    state = peft.utils.get_peft_model_state_dict(model)
    prefix = "unet" if model is getattr(twin, "unet", None) else "transformer"
    return {f"{prefix}.{key}": value.detach().clone() for key, value in state.items()}


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For one load: peft takes the tensors themselves, and a hotswap then writes into them."""
    return {key: value.clone() for key, value in state.items()}


def packed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of every packed layer, by the layer's name without peft's level."""
    return {
        f"{name.removesuffix('.base_layer')}.{key}": tensor.detach().clone()
        for name, layer in quantized_layers(model).items()
        for key, tensor in layer.named_parameters(recurse=False)
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor.view(torch.uint8), other[key].view(torch.uint8)), key


@pytest.mark.parametrize(
    ("name", "preset"), [*(("flux", preset) for preset in PRESETS), *((name, "w8a8") for name in PIPELINES)]
)
def test_adapter_loaded_before_or_after_compress(name: str, preset: str) -> None:
    state = adapter(name)
    pipe = tiny.build_pipeline(name).compress(preset, measure=False)
    plain, codes, rules = tiny.sample(pipe), packed(denoiser(pipe)), get_state(denoiser(pipe)).config.spec.rules
    pipe.load_lora_weights(copied(state), adapter_name="one")
    assert_same(packed(denoiser(pipe)), codes)
    expected = tiny.sample(pipe)
    assert torch.equal(tiny.sample(pipe), expected)
    assert relative_rms(plain, expected) > 1e-3, "the adapter does nothing"

    first = tiny.build_pipeline(name)
    first.load_lora_weights(copied(state), adapter_name="one")
    first.compress(preset, measure=False)
    assert_same(packed(denoiser(first)), codes)
    assert get_state(denoiser(first)).config.spec.rules == rules
    assert torch.equal(tiny.sample(first), expected)
    for one in (pipe, first):
        one.unload_lora_weights()
        assert torch.equal(tiny.sample(one), plain)


def test_adapter_does_on_packed_layers_what_it_does_on_their_dense_equals() -> None:
    pipe, dense = (tiny.build_pipeline("flux").compress("w8a16", measure=False) for _ in range(2))
    dense.decompress()
    for one in (pipe, dense):
        one.load_lora_weights(adapter("flux"), adapter_name="one")
        one.load_lora_weights(adapter("flux", seed=2, rank=8), adapter_name="two")
    for names, weights in ((["one"], [1.0]), (["one", "two"], [0.5, 1.5]), (["two"], [-1.0])):
        for one in (pipe, dense):
            one.set_adapters(names, weights)
        assert relative_rms(tiny.sample(dense), tiny.sample(pipe)) < 1e-5


def test_dora_does_too() -> None:
    pipe, dense = (tiny.build_pipeline("stable_diffusion").compress("w8a16", measure=False) for _ in range(2))
    dense.decompress()
    plain = tiny.sample(pipe)
    state = adapter("stable_diffusion", use_dora=True)
    assert any("lora_magnitude_vector" in key for key in state)
    for one in (pipe, dense):
        one.load_lora_weights(copied(state), adapter_name="one")
    assert relative_rms(tiny.sample(dense), tiny.sample(pipe)) < 1e-5
    assert relative_rms(plain, tiny.sample(pipe)) > 1e-3
    pipe.fuse_lora()
    assert relative_rms(tiny.sample(dense), tiny.sample(pipe)) < 0.05


@pytest.mark.parametrize("preset", PRESETS)
def test_fuse_quantizes_anew_and_unfuse_restores_every_byte(preset: str) -> None:
    pipe = tiny.build_pipeline("flux").compress(preset, measure=False)
    plain, codes = tiny.sample(pipe), packed(pipe.transformer)
    pipe.load_lora_weights(adapter("flux"), adapter_name="one")
    pipe.load_lora_weights(adapter("flux", seed=2), adapter_name="two")
    pipe.set_adapters(["one", "two"], [1.0, 0.5])
    live = tiny.sample(pipe)
    assert "fused_adapters" not in pipe.compression_report().to_dict()["components"]["transformer"]
    pipe.fuse_lora(adapter_names=["one"])
    pipe.fuse_lora(adapter_names=["one", "two"])
    fused = tiny.sample(pipe)
    assert not torch.equal(fused, plain)
    # The grid is as coarse as before: what is left of the adapter is its effect, give or take that.
    assert relative_rms(live, fused) < (0.3 if preset.startswith("w4") else 0.05) + relative_rms(live, plain) / 2
    found = pipe.compression_report().to_dict()["components"]["transformer"]["fused_adapters"]
    assert found["layers"] > 0
    assert 0 < found["worst_error"] < 1
    assert "quantizing these anew lost up to" in str(pipe.compression_report())
    pipe.unfuse_lora()
    assert_same(packed(pipe.transformer), codes)
    assert torch.equal(tiny.sample(pipe), live)
    pipe.unload_lora_weights()
    assert torch.equal(tiny.sample(pipe), plain)


@pytest.mark.parametrize("kind", ["quarot", "svdquant", "both"])
def test_adapters_on_rotated_layers_and_beside_branches(kind: str) -> None:
    """Live they see the input as it comes; fused they are in the codes, the branch stays; taken back, nothing moved."""
    pipe = tiny.build_pipeline("flux")
    rotation, branch = dc.QuaRotConfig(), dc.SVDQuantConfig(8, num_alphas=1, iterations=0)
    algorithm = {"quarot": rotation, "svdquant": branch, "both": [rotation, branch]}[kind]
    given = tiny.call_kwargs(pipe, steps=1)
    given.pop("generator")
    calibration = None if kind == "quarot" else [given]
    pipe.compress(dc.QuantizationConfig("w8a8", algorithm=algorithm), calibration=calibration, measure=False)
    name = "transformer_blocks.0.attn.to_q"
    layer, x = pipe.transformer.get_submodule(name), torch.randn(5, 128)
    plain, codes = layer(x), packed(pipe.transformer)
    state = adapter("flux")
    pipe.load_lora_weights(copied(state), adapter_name="one")
    down, up = (state[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
    change = x @ down.t() @ up.t()
    live = pipe.transformer.get_submodule(name)(x)
    assert relative_rms(change, live - plain) < 1e-4
    pipe.fuse_lora()
    fused = pipe.transformer.get_submodule(name).base_layer
    assert relative_rms(live, fused(x)) < 0.02
    if kind != "quarot":
        assert torch.equal(fused.low_rank_down, layer.low_rank_down)
    pipe.unfuse_lora()
    assert_same(packed(pipe.transformer), codes)


def test_fusing_one_after_the_other_is_fusing_both() -> None:
    pipes = [tiny.build_pipeline("flux").compress("w4a8", measure=False) for _ in range(2)]
    for pipe, steps in zip(pipes, ([["one", "two"]], [["one"], ["one", "two"]]), strict=True):
        pipe.load_lora_weights(adapter("flux"), adapter_name="one")
        pipe.load_lora_weights(adapter("flux", seed=2), adapter_name="two")
        for names in steps:
            pipe.fuse_lora(adapter_names=names)
    assert_same(*(packed(pipe.transformer) for pipe in pipes))


def fused_adapters(target: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = compression_report(target).to_dict()["components"][name]["fused_adapters"]
    return found


def test_fused_and_unloaded_saves_and_reloads(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("flux").compress("w4a8", measure=False)
    pipe.load_lora_weights(adapter("flux"), adapter_name="one")
    with pytest.raises(dc.CheckpointError, match=r"holds no adapters, found peft layers.*unload_lora_weights\(\)"):
        pipe.save_pretrained(tmp_path / "adapted")
    pipe.fuse_lora()
    expected = tiny.sample(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(tiny.sample(pipe), expected)
    fused = fused_adapters(pipe, "transformer")
    assert fused["worst_error"] > 0
    pipe.save_pretrained(tmp_path / "fused")
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "fused")
    reloaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(reloaded), expected)
    assert fused_adapters(reloaded, "transformer") == fused
    assert "quantizing these anew lost up to" in str(reloaded.compression_report())
    reloaded.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    again = read_skeleton(tmp_path / "again")
    assert fused_adapters(again, "transformer") == fused
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert fused_adapters(again, "transformer") == fused


def test_error_of_a_fused_adapter_goes_with_the_adapter(tmp_path: Path) -> None:
    """Fused anew after a reload, in a text encoder too; taken back, it is gone from what is saved next."""
    pipe = tiny.build_pipeline("stable_diffusion")
    pipe.compress({"unet": "w8a8", "text_encoder": "w4a16"}, measure=False)
    words = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(words, pipe.text_encoder)
    for module in pipe.text_encoder.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    pipe.load_lora_weights(adapter("stable_diffusion"), adapter_name="one")
    pipe.fuse_lora(components=["unet"])
    states = {name: fused_adapters(pipe, name) for name in ("unet", "text_encoder")}
    assert all(state["layers"] > 0 for state in states.values())
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "fused", safety_checker=None)
    assert fused_adapters(reloaded, "unet") == states["unet"]
    assert fused_adapters(reloaded, "text_encoder") == states["text_encoder"]
    reloaded.load_lora_weights(adapter("stable_diffusion", seed=2), adapter_name="two")
    reloaded.fuse_lora(components=["unet"])
    assert fused_adapters(reloaded, "unet") != states["unet"]
    reloaded.unfuse_lora(components=["unet"])
    assert fused_adapters(reloaded, "unet") == states["unet"], "what was fused before stays"
    pipe = tiny.build_pipeline("flux").compress("w8a8", measure=False)
    pipe.load_lora_weights(adapter("flux"), adapter_name="one")
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "plain")
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "plain").compression_report().to_dict()
    assert "fused_adapters" not in plain["components"]["transformer"]


def test_loaded_compressed_and_unloaded_saves_and_reloads(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("stable_diffusion")
    pipe.load_lora_weights(adapter("stable_diffusion"), adapter_name="one")
    pipe.compress("w8a8", measure=False)
    pipe.unload_lora_weights()
    expected = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    reloaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(reloaded), expected)
    other = tiny.build_pipeline("stable_diffusion").compress(pipe.compression_recipe(), measure=False)
    assert torch.equal(tiny.sample(other), expected)


def test_unfuse_of_what_was_fused_before_compress_says_so() -> None:
    pipe = tiny.build_pipeline("stable_diffusion")
    pipe.load_lora_weights(adapter("stable_diffusion"), adapter_name="one")
    pipe.fuse_lora()
    pipe.compress("w8a8", measure=False)
    expected = tiny.sample(pipe)
    with pytest.raises(dc.ModelStateError, match=r"unfuse_lora: .* fused before the model was compressed"):
        pipe.unfuse_lora()
    assert torch.equal(tiny.sample(pipe), expected)


def test_kohya_keys() -> None:
    pipe = tiny.build_pipeline("stable_diffusion").compress("w8a8", measure=False)
    state = adapter("stable_diffusion")
    pipe.load_lora_weights(copied(state), adapter_name="one")
    expected = tiny.sample(pipe)
    kohya: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        layer, kind, _ = key.rsplit(".", 2)
        name = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
        kohya[f"{name}.lora_{'down' if kind == 'lora_A' else 'up'}.weight"] = value
        kohya[f"{name}.alpha"] = torch.tensor(4.0)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(kohya, adapter_name="kohya")
    assert torch.equal(tiny.sample(pipe), expected)


def test_hotswap_takes_the_other_adapter_in_place() -> None:
    pipe = tiny.build_pipeline("stable_diffusion").compress("w8a8", measure=False)
    states = [adapter("stable_diffusion", seed=seed) for seed in (1, 2)]
    expected = []
    for state in states:
        pipe.load_lora_weights(copied(state), adapter_name="one")
        expected.append(tiny.sample(pipe))
        pipe.unload_lora_weights()
    pipe.load_lora_weights(copied(states[0]), adapter_name="one")
    codes, tensors = packed(pipe.unet), {name: id(tensor) for name, tensor in pipe.unet.named_parameters()}
    for number in (1, 0):
        pipe.load_lora_weights(copied(states[number]), adapter_name="one", hotswap=True)
        assert torch.equal(tiny.sample(pipe), expected[number])
        # The same tensors, which is why a compiled model is not traced again.
        assert {name: id(tensor) for name, tensor in pipe.unet.named_parameters()} == tensors
    assert_same(packed(pipe.unet), codes)


def test_text_encoder_adapter() -> None:
    pipe = tiny.build_pipeline("stable_diffusion").compress({"text_encoder": "w4a8"}, measure=False)
    plain = tiny.sample(pipe)
    rows = pipe.text_encoder.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        state = {
            f"text_encoder.{name}.lora_{side}.weight": torch.randn((4, rows) if side == "A" else (rows, 4)) / 8
            for name, module in pipe.text_encoder.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(("q_proj", "v_proj"))
            for side in ("A", "B")
        }
    pipe.load_lora_weights(copied(state), adapter_name="one")
    live = tiny.sample(pipe)
    assert not torch.equal(live, plain)
    codes = packed(pipe.text_encoder)
    pipe.fuse_lora(components=["text_encoder"])
    assert not torch.equal(tiny.sample(pipe), plain)
    pipe.unfuse_lora(components=["text_encoder"])
    assert_same(packed(pipe.text_encoder), codes)
    assert torch.equal(tiny.sample(pipe), live)


OTHER_METHODS = {
    "loha": lambda targets: peft.LoHaConfig(r=2, target_modules=targets, init_weights=False),
    "lokr": lambda targets: peft.LoKrConfig(r=2, target_modules=targets, init_weights=False),
    "ia3": lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False),
    "adalora": lambda targets: peft.AdaLoraConfig(
        init_r=3, target_r=2, total_step=9, target_modules=targets, init_lora_weights=False
    ),
    "oft": lambda targets: peft.OFTConfig(r=0, oft_block_size=8, target_modules=targets, init_weights=False),
}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_of_peft_merge_and_unload(method: str, tmp_path: Path) -> None:
    """Each has a merge of its own, which would write into a weight that is made anew at every access."""
    model = tiny.build("qwen2").compress("w8a16", measure=False)
    plain, codes = output(model), packed(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        adapted = peft.get_peft_model(model, OTHER_METHODS[method](["q_proj", "v_proj"])).eval()
    live = output(model)
    effect = relative_rms(plain, live)
    assert effect > 1e-2, "the adapter does nothing"
    adapted.merge_adapter()
    assert not torch.equal(output(model), live)
    assert relative_rms(live, output(model)) < min(0.05, effect / 2)
    adapted.unmerge_adapter()
    assert_same(packed(model), codes)
    assert torch.equal(output(model), live)
    with pytest.raises(dc.CheckpointError, match="holds no adapters, found peft layers"):
        model.save_pretrained(tmp_path)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert relative_rms(live, output(merged)) < min(0.05, effect / 2)
    assert torch.equal(output(adapted.unload()), plain)
    assert_same(packed(model), codes)


@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapter_of_convolutions(kwargs: dict[str, Any]) -> None:
    """SD1's proj_in and proj_out are convolutions, and most adapters for it reach them."""
    models = [tiny.build("unet_sd1").compress("w8a16", measure=False) for _ in range(2)]
    model, dense = models[0], models[1].decompress()
    plain, codes = output(model), packed(model)
    assert isinstance(quantized_layers(model)["down_blocks.0.attentions.0.proj_in"], nn.Conv2d)
    for one in (model, dense):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            targets = ["proj_in", "proj_out", "conv1", "to_q"]
            one.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **kwargs))
    state = peft.utils.get_peft_model_state_dict(model)
    peft.utils.set_peft_model_state_dict(dense, copied(state))
    live = output(model)
    assert relative_rms(plain, live) > 1e-2
    assert relative_rms(output(dense), live) < 1e-4
    model.fuse_lora()
    assert relative_rms(live, output(model)) < 0.05
    model.unfuse_lora()
    assert_same(packed(model), codes)
    model.unload_lora()
    assert torch.equal(output(model), plain)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_initialization_that_rewrites_the_base_is_refused(method: str) -> None:
    model = tiny.build("flux").compress("w8a16", measure=False)
    plain, codes = output(model), packed(model)
    with pytest.raises(dc.ModelStateError, match=rf"init_lora_weights='{method}': needs dense base weights.*in w8a16"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=method), model)
    assert torch.equal(output(model), plain)
    assert_same(packed(model), codes)
    # Before compress the base is there to be rewritten.
    first = tiny.build("flux")
    expected = output(first)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=method), first)
    assert relative_rms(expected, output(first.compress("w8a16", measure=False))) < 0.05


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("how", ["plain", "checkpointing", "autocast"])
def test_training_on_a_compressed_base(preset: str, how: str) -> None:
    model = tiny.build("flux").compress(preset, measure=False)
    inputs = tiny.inputs_for(model)
    codes = packed(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(
            peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
        )
        target = torch.randn_like(model(**inputs, return_dict=False)[0])
    if how == "checkpointing":
        model.enable_gradient_checkpointing()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    model.train()
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = (model(**inputs, return_dict=False)[0].float() - target).square().mean()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_same(packed(model), codes)
