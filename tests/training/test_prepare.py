"""From the dense model to the deployed one: what training computes with is what is stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tiny
from diffuse_compress.apply_training import deploy
from diffuse_compress.errors import CheckpointError, CompressionConflictError, ConfigError, ModelStateError
from diffuse_compress.evaluation.fake_quantize import FakeQuantizedLayer
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import fake_quantize, unpacked_codes
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.training.clips import GroupFollower, clips_of
from diffuse_compress.training.config import QVGenConfig, parse_scheme
from diffuse_compress.training.fake_quantize import FakeWeight
from diffuse_compress.training.layers import TrainedLinear
from diffuse_compress.training.prepare import Prepared, prepare
from diffuse_compress.training.sharding import is_sharded, whole
from tolerance import KERNEL, assert_close

STEPS = 12
DEPLOYED: dict[str, dict[str, Any]] = {
    "w4a4": {},
    "w4a8": {"scheme": "w4a8"},
    "w4a16": {"scheme": "w4a16"},
    "w4a16 float zero": {"scheme": "w4a16", "weight_zero": "float"},
    "w3a16": {"scheme": "w3a16"},
    "w3a3": {"scheme": "w3a3"},
    "w4a4 kept branch": {"decay": False},
    "w4a4 kept loftq": {"decay": False, "phi_init": "loftq", "loftq_iterations": 2},
    "w4a4 efficientdm": {"method": "efficientdm", "lora_rank": 4},
    "w4a4 all": {"quantize_all": True},
    "w4a4 modulation": {"modulation_scheme": "w4a16"},
}


def small(**given: Any) -> QVGenConfig:
    return QVGenConfig(**{"phi_rank": 4, "decay_fraction": 0.5, "clip_groups": 5, **given})


def toy(**given: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = tiny.build("wan", num_layers=1, **given).eval()
    return model, tiny.inputs_for(model)


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = model(**inputs, return_dict=False)[0]
    return y


def train(prepared: Prepared, inputs: dict[str, Any], steps: range, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in steps:
        prepared.before_step(step, optimizer)
        generator = torch.Generator().manual_seed(step)
        timestep = torch.randint(0, 1000, inputs["timestep"].shape, generator=generator)
        y = prepared.model(**{**inputs, "timestep": timestep}, return_dict=False)[0]
        loss = (y - 0.1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(prepared: Prepared) -> torch.optim.Optimizer:
    config = QVGenConfig(learning_rate=1e-3)
    return torch.optim.AdamW(prepared.parameter_groups(config), betas=config.betas)


@pytest.mark.parametrize("name", DEPLOYED)
def test_deployed_layers_hold_and_compute_what_training_did(name: str) -> None:
    model, inputs = toy()
    prepared = prepare(model, small(**DEPLOYED[name]), total_steps=STEPS)
    train(prepared, inputs, range(3), optimizer_of(prepared))
    prepared.before_step(8)
    expected = output(model, inputs)
    fakes = {
        key: FakeWeight(t.latent_weight().detach(), t.scheme.weight, t.qparams()) for key, t in prepared.layers.items()
    }
    assert prepared.convert() is model
    assert not any(isinstance(module, TrainedLinear) for module in model.modules())
    for key, fake in fakes.items():
        layer = model.get_submodule(key)
        assert isinstance(layer, QuantizedLinear)
        stored = layer.quantized_weight()
        assert torch.equal(unpacked_codes(stored), fake.codes())
        assert torch.equal(stored.scale, fake.qparams.scale)
        if stored.zero_point is not None:
            assert torch.equal(stored.zero_point, fake.qparams.zero_point)
    assert torch.equal(output(model, inputs), expected)
    # Simulated from the stored form, in another order of operations: of one layer, since codes of the next would follow
    # the last bits of its inputs.
    layer = model.get_submodule("blocks.0.ffn.net.2")
    x = torch.randn(2, 32, 256)
    with torch.no_grad():
        assert_close(layer(x), FakeQuantizedLayer(layer)(x), KERNEL[torch.float32])


def test_bf16_layer_is_within_the_kernel_tolerance_of_float32_codes() -> None:
    linear = nn.Linear(256, 64).bfloat16()
    x = torch.randn(2, 9, 256).bfloat16()
    for scheme in ("w4a4", "w4a8", "w4a16", "w3a3"):
        config = small(scheme=scheme, clip_groups=1, method="kd")
        trained = TrainedLinear.from_dense(linear, config.layer_scheme, config)
        stored = trained.to_quantized()
        clips = trained.clips()
        stored.set_input_clip(clips)
        assert stored.compute_dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(stored(x), trained(x))
        exact = copy.deepcopy(stored).float()
        with torch.no_grad():
            assert_close(stored(x), exact(x.float()), KERNEL[torch.bfloat16], scheme)


@pytest.mark.parametrize("scheme", ["w4a4", "w3a3", "w4a16"])
def test_ranges_of_least_error_are_never_worse_than_full_ones(scheme: str) -> None:
    weight = torch.randn(48, 256) * torch.linspace(0.1, 3, 48).unsqueeze(1)
    weight[:, 7] *= 6
    errors = {}
    for start in ("mse", "minmax"):
        linear = nn.Linear(256, 48)
        linear.weight.data.copy_(weight)
        config = small(scheme=scheme, range_init=start, method="kd")
        layer = TrainedLinear.from_dense(linear, config.layer_scheme, config)
        values = FakeWeight(weight, layer.scheme.weight, layer.qparams()).values()
        errors[start] = (values - weight).abs().pow(2.4).sum(dim=1)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()
    assert errors["mse"].sum() < 0.99 * errors["minmax"].sum()


def test_branch_starts_as_the_largest_part_of_the_rounding_error() -> None:
    linear = nn.Linear(96, 64)
    config = small(scheme="w3a3", phi_rank=8)
    layer = TrainedLinear.from_dense(linear, config.layer_scheme, config)
    weight = linear.weight.detach()
    rounded = fake_quantize(weight, layer.scheme.weight, weight_qparams(weight, layer.scheme.weight, norm=2.4))
    error = weight - rounded
    left, values, right = torch.linalg.svd(error)
    best = (left[:, :8] * values[:8]) @ right[:8]
    branch = layer.branch()
    assert branch is not None
    effective = rounded + branch[0].detach() @ branch[1].detach()
    assert torch.allclose(effective - weight, -(error - best), atol=1e-5)
    assert torch.allclose(layer.spectrum(), values[:8], rtol=1e-4)
    zero = TrainedLinear.from_dense(linear, config.layer_scheme, small(scheme="w3a3", phi_init="zero"))
    assert not zero.spectrum().any()


def test_boundary_leaves_the_function_of_the_layer_and_halves_the_branch() -> None:
    linear = nn.Linear(64, 48)
    config = small(phi_rank=8, clip_groups=0, scheme="w4a16")
    layer = TrainedLinear.from_dense(linear, config.layer_scheme, config)
    with torch.no_grad():
        layer.phi_up += torch.randn_like(layer.phi_up) * 0.1
    layer.set_gate(torch.tensor([1.0] * 4 + [0.1] * 4))
    branch = layer.branch()
    assert branch is not None
    up, down = (factor.detach().clone() for factor in branch)
    before = layer.weight.detach() + (up * layer.gate) @ down
    turn = layer.shrink(4)
    kept = layer.branch()
    assert kept is not None
    assert layer.rank == 4
    assert torch.allclose(kept[0] @ kept[1], up[:, :4] @ down[:4], atol=1e-5)
    assert torch.allclose(layer.weight + kept[0] @ kept[1], before, atol=1e-5)
    assert not layer.phi_up[:, 4:].any()
    # up @ A = new up, inv(A) @ down = new down.
    assert torch.allclose(up[:, :4] @ turn.float(), kept[0], atol=1e-4)
    assert torch.allclose(turn.float() @ kept[1], down[:4], atol=1e-4)


def test_moments_of_the_branch_are_forgotten_at_a_boundary() -> None:
    model, inputs = toy()
    prepared = prepare(model, small(), total_steps=STEPS)
    optimizer = optimizer_of(prepared)
    train(prepared, inputs, range(2), optimizer)
    layer = next(iter(prepared.layers.values()))
    others = copy.deepcopy(optimizer.state[layer.weight])
    prepared.before_step(2, optimizer)
    assert prepared.phase == 1
    assert layer.phi_up not in optimizer.state
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], others["exp_avg"])
    train(prepared, inputs, range(2, 3), optimizer)
    assert optimizer.state[layer.phi_up]["step"] == 1


def test_moments_of_the_branch_turn_with_its_factors() -> None:
    model, _ = toy()
    prepared = prepare(model, small(rotate_moments=True), total_steps=STEPS)
    optimizer = optimizer_of(prepared)
    layer = next(iter(prepared.layers.values()))
    with torch.no_grad():
        layer.phi_up += torch.randn_like(layer.phi_up) * 0.01
    of_dense = torch.randn_like(layer.weight)  # the gradient of up @ down
    for parameter, grad in (
        (layer.phi_up, of_dense @ layer.phi_down.detach().t()),
        (layer.phi_down, layer.phi_up.detach().t() @ of_dense),
    ):
        optimizer.state[parameter] = {"exp_avg": grad.clone(), "exp_avg_sq": grad.square()}
    prepared.before_step(2, optimizer)
    expected = of_dense @ layer.phi_down.detach().t()
    assert_close(optimizer.state[layer.phi_up]["exp_avg"], expected, KERNEL[torch.float32] * 10)
    expected = layer.phi_up.detach().t() @ of_dense
    assert_close(optimizer.state[layer.phi_down]["exp_avg"], expected, KERNEL[torch.float32] * 10)
    assert (optimizer.state[layer.phi_up]["exp_avg_sq"] >= 0).all()


def test_sharded_branch_shrinks_as_a_whole_one_does(tmp_path: Path) -> None:
    model, plain = (tiny.build("wan", num_layers=1) for _ in range(2))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        prepared = [prepare(each, small(), total_steps=STEPS) for each in (plain, model)]
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = optimizer_of(prepared[1])
        for each in prepared:
            each.before_step(1)
            each.before_step(2, optimizer if each is prepared[1] else None)
        for name, layer in prepared[0].layers.items():
            sharded = prepared[1].layers[name]
            assert is_sharded(sharded.phi_up)
            for key, parameter in layer.named_parameters():
                assert torch.equal(whole(sharded.get_parameter(key)), parameter), key
        assert prepared[1].spectrum().keys() == prepared[0].spectrum().keys()
    finally:
        torch.distributed.destroy_process_group()


def test_resume_is_exact_across_boundaries() -> None:
    torch.manual_seed(1)
    model, inputs = toy()
    prepared = prepare(model, small(), total_steps=STEPS)
    optimizer = optimizer_of(prepared)
    train(prepared, inputs, range(3), optimizer)  # phases begin at 0, 2, 4 and 6
    # Copies: the tensors of a state dict are those that are trained on.
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), prepared.state_dict()))
    straight = train(prepared, inputs, range(3, STEPS), optimizer)

    model, inputs = toy()
    again = prepare(model, small(), total_steps=STEPS)
    model.load_state_dict(saved[0])
    resumed = optimizer_of(again)
    resumed.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert again.phase == 1
    assert train(again, inputs, range(3, STEPS), resumed) == straight
    assert again.phase == 3
    with pytest.raises(ModelStateError, match="step 0 is of phase 0"):
        again.before_step(0)
    with pytest.raises(CheckpointError, match="starts must be that of this training"):
        prepare(toy()[0], small(), total_steps=2 * STEPS).load_state_dict(saved[2])
    with pytest.raises(CheckpointError, match="config must be that"):
        prepare(toy()[0], small(gate="linear"), total_steps=STEPS).load_state_dict(saved[2])


@pytest.mark.parametrize("deployed", [False, True], ids=["training", "deployed"])
def test_group_is_the_same_for_guidance_in_one_call_or_two(deployed: bool) -> None:
    model, inputs = toy()
    prepared = prepare(model, small(), total_steps=STEPS)
    with torch.no_grad():
        for layer in prepared.layers.values():
            assert layer.clip_logits is not None
            layer.clip_logits.copy_(torch.linspace(-1, 3, 5))
    if deployed:
        prepared.convert(drop_phi=True)
    layer = model.get_submodule("blocks.0.ffn.net.2")
    x = torch.randn(2, 7, 256)

    def after(*timesteps: int, samples: slice = slice(0, 2)) -> torch.Tensor:
        """What a layer makes of the same input as part of a call at these timesteps."""
        given = {key: value[samples] for key, value in inputs.items()}
        output(model, {**given, "timestep": torch.tensor(timesteps)})
        with torch.no_grad(), prepared.phi(False):
            return layer(x[samples])

    together = after(900, 100)
    first, second = after(900, samples=slice(0, 1)), after(100, samples=slice(1, 2))
    assert torch.equal(together, torch.cat([first, second]))
    # However often it is called, and at whatever other steps of the group.
    assert torch.equal(after(899, samples=slice(0, 1)), first)
    assert torch.equal(after(850, 101), together)
    assert torch.equal(after(900, 900)[:1], first)
    assert not torch.equal(after(100, 900)[:1], first)


def test_clips_learn_per_sample() -> None:
    model, inputs = toy()
    prepared = prepare(model, small(), total_steps=STEPS)
    inputs["timestep"] = torch.tensor([950, 250])
    prepared.model(**inputs, return_dict=False)[0].square().mean().backward()
    for layer in prepared.layers.values():
        assert layer.clip_logits is not None
        assert layer.clip_logits.grad is not None
        assert layer.clip_logits.grad.nonzero().flatten().tolist() in ([1, 4], [])
    assert any(layer.clip_logits.grad.any() for layer in prepared.layers.values())


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model, inputs = toy()
    prepared = prepare(model.train(), small(), total_steps=STEPS)
    layer = next(iter(prepared.layers.values()))
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        grads.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
        model.enable_gradient_checkpointing()
    assert len(grads[0]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_switches_and_groups() -> None:
    model, inputs = toy()
    dense = output(model, inputs)
    parameters = dict(model.named_parameters())
    prepared = prepare(model, small(), total_steps=STEPS)
    kept = {key: parameter for key, parameter in model.named_parameters() if key in parameters}
    assert all(kept[key] is parameter for key, parameter in parameters.items())
    assert not torch.equal(output(model, inputs), dense)
    with prepared.fake_quantization(False):
        assert torch.equal(output(model, inputs), dense)
    with_branch = output(model, inputs)
    with prepared.phi(False):
        assert not torch.equal(output(model, inputs), with_branch)
    assert torch.equal(output(model, inputs), with_branch)
    groups = {group["name"]: group for group in prepared.parameter_groups()}
    assert list(groups) == ["weights", "others", "phi", "scales", "clips"]
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    assert (groups["clips"]["lr"], groups["phi"]["lr"]) == (1e-2, 3e-5)
    assert {name for name, group in groups.items() if group["weight_decay"]} == {"weights"}
    with pytest.raises(ModelStateError, match="still has a branch of rank 4"):
        prepared.convert()
    spectrum = prepared.spectrum()
    assert all(values.shape == (4,) and values[0] > 0 for values in spectrum.values())
    # No modulation or last layer, and no embedder but the second layer of the text's, which sees every token.
    assert {name.partition(".")[0] for name in spectrum} == {"blocks", "condition_embedder"}
    assert not any("time_" in name for name in spectrum)


def test_efficientdm_trains_what_it_adds_alone() -> None:
    model, _ = toy()
    prepared = prepare(model, small(method="efficientdm"), total_steps=STEPS)
    assert [group["name"] for group in prepared.parameter_groups()] == ["lora", "scales", "clips"]


def test_casting_keeps_quantizers_in_float32() -> None:
    model, _ = toy()
    prepared = prepare(model, small(), total_steps=STEPS)
    model.bfloat16()
    layer = next(iter(prepared.layers.values()))
    assert layer.weight.dtype == layer.phi_up.dtype == torch.bfloat16
    assert layer.scale.dtype == layer.clip_logits.dtype == layer.gate.dtype == torch.float32
    assert layer.group_scale.dtype == torch.int8
    prepared.convert(drop_phi=True)
    model.half()
    assert all(m.input_clip.dtype == torch.float32 for m in model.modules() if isinstance(m, QuantizedLinear))


def test_failed_prepare_leaves_the_model() -> None:
    model, inputs = toy()
    name = "blocks.0.ffn.net.2"
    before, modules = output(model, inputs), [id(module) for module in model.modules()]
    with torch.no_grad():
        value = model.get_submodule(name).weight[0, 0].clone()
        model.get_submodule(name).weight[0, 0] = float("nan")
    with pytest.raises(ModelStateError, match="finite"):
        prepare(model, small(), total_steps=STEPS)
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = value
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(output(model, inputs), before)
    assert not any(
        isinstance(getattr(hook, "__self__", None), GroupFollower) for hook in model._forward_pre_hooks.values()
    )
    with pytest.raises(ConfigError, match="modules_to_not_convert"):
        prepare(model, small(modules_to_not_convert="no_such_layer"), total_steps=STEPS)


def test_bare_module_without_timesteps() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)))
    prepared = prepare(model, small(scheme="w4a8", clip_groups=1, quantize_all=True), total_steps=STEPS)
    assert len(prepared.layers) == 3
    prepared.before_step(STEPS)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(prepared.convert()(x), expected)


def test_saved_small_and_reloaded_by_the_library(tmp_path: Path) -> None:
    model, inputs = toy(ffn_dim=1024, num_attention_heads=8)
    for folder, dtype in (("dense", torch.bfloat16), ("model", torch.float32)):
        copy.deepcopy(model).to(dtype).save_pretrained(tmp_path / folder)
    dense = sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors"))
    prepared = prepare(model, small(quantize_all=True), total_steps=STEPS)
    train(prepared, inputs, range(3), optimizer_of(prepared))
    prepared.before_step(8)
    deploy(prepared)
    inputs["timestep"] = torch.tensor([900, 100])
    expected = output(model, inputs)
    copy.deepcopy(model).save_pretrained(tmp_path / "trained")
    loaded = type(model).from_pretrained(tmp_path / "trained").eval()
    clips, stored = clips_of(loaded), clips_of(model)
    assert clips is not None
    assert stored is not None
    assert torch.equal(clips.values, stored.values)
    assert clips.values.unique().numel() > 5
    assert torch.equal(output(loaded, inputs), expected)
    report = str(loaded.compression_report())
    assert "quantization-aware training (qvgen)" in report
    assert "a clip for each of 5 groups of timesteps" in report
    ratio = sum(file.stat().st_size for file in (tmp_path / "trained").glob("*.safetensors")) / dense
    # Norms, biases and the patch convolution stay as they are; clips and metadata come on top.
    assert ratio < 0.30  # measured 0.281
    with pytest.raises(CompressionConflictError, match="already compressed"):
        loaded.compress("w4a8")


def test_scheme_names() -> None:
    assert parse_scheme("w3a3").name == "w3a3"
    assert parse_scheme("W4A4") == parse_scheme("w4a4")
    assert parse_scheme("w3a16").weight.symmetric is False
