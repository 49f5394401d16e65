"""The loop: what it learns, resuming bit for bit, several processes, failures, and what comes out."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.calls import Call
from diffuse_compress.cli import main
from diffuse_compress.errors import CheckpointError, ConfigError, MissingDependencyError, ModelStateError
from diffuse_compress.training import trainer as trainer_module
from diffuse_compress.training.batches import Batch, RecordedCalls
from diffuse_compress.training.checkpoints import find_checkpoint
from diffuse_compress.training.layers import TrainedLinear
from diffuse_compress.training.loss import distance
from diffuse_compress.training.optimization import Average, clip_gradients, learning_rate_factor
from diffuse_compress.training.sources import record_calls, synthetic_latents

STEPS = 12
ROWS = 64


class Mlp(nn.Module):
    """Two layers in blocks, so that they are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return hidden_states


def mlp() -> Mlp:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mlp()


def calls(count: int = 8) -> RecordedCalls:
    return RecordedCalls([Call((), {"hidden_states": rows(i)}) for i in range(count)])


def rows(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(seed))


def config(**kwargs: Any) -> dc.QVGenConfig:
    fields: dict[str, Any] = {"quantize_all": True, "clip_groups": 1, "phi_rank": 4, "max_train_steps": STEPS}
    return dc.QVGenConfig(**{"scheme": "w4a4", **fields, "learning_rate": 1e-3, "decay_fraction": 0.75, **kwargs})


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- learning -----------------------------------------------------------------------------------------------------


def test_a_bare_module_learns_and_is_deployed_as_it_was_trained():
    model, teacher = mlp(), mlp()
    trainer = dc.QATTrainer(
        model, config(scheme="w2a16", max_train_steps=100, learning_rate=2e-3), calls(16), held_out=4
    )
    result = trainer.train()
    assert float(result.losses[-20:].mean()) < 0.75 * float(result.losses[0])
    assert result.validation[-1]["kd_with_phi"] == result.validation[-1]["kd_without_phi"]  # it has left
    with torch.no_grad():
        before = model(rows(99))
        trainer.convert()
        assert torch.equal(model(rows(99)), before)
        assert float((model(rows(99)) - teacher(rows(99))).square().mean()) < 1.0
    assert not any(isinstance(module, TrainedLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_training_halves_the_error_and_the_branch_lowers_the_first_gradients():
    """The toy of the reference: nothing is claimed of the branch at the end but that it does no harm."""
    found = {}
    for method in ("kd", "qvgen"):
        model = mlp()
        with torch.no_grad():
            for block in model.blocks:
                for layer in (block[0], block[2]):
                    layer.weight[:, ::11] *= 4
        asked = config(scheme="w3a16", method=method, phi_rank=8, max_train_steps=60, decay_fraction=0.6)
        asked = dataclasses.replace(asked, learning_rate=2e-3)
        found[method] = dc.QATTrainer(model, asked, calls(16), held_out=2).train()
    at_start = float(found["kd"].losses[0])  # rounded within ranges of least error, before the first step
    last = {method: float(result.validation[-1]["kd_without_phi"]) for method, result in found.items()}
    assert max(last.values()) < at_start / 2  # 2.2 and 2.3
    assert last["qvgen"] < 1.05 * last["kd"]
    norms = {method: float(result.gradient_norms[:8].mean()) for method, result in found.items()}
    assert norms["qvgen"] < 0.9 * norms["kd"]  # 0.81


def test_the_callers_forward_and_loss_are_used():
    seen = []

    def forward(model, batch):
        return model(batch.call.kwargs["hidden_states"])[:, :3]

    def loss(student, teacher, batch):
        seen.append(student.shape)
        return (student - teacher).abs().mean()

    result = dc.QATTrainer(mlp(), config(), calls(), forward=forward, loss=loss).train()
    assert set(seen) == {(ROWS, 3)}
    assert result.steps == STEPS


def test_a_language_model_learns_the_logits_of_its_dense_self():
    model = tiny.build("llama")
    texts = [{"input_ids": tiny.inputs_for(model, seed=i)["input_ids"]} for i in range(3)]
    trainer = dc.QATTrainer(model, config(learning_rate=1e-4, max_train_steps=8), texts, loss="mse")
    assert trainer.train().steps == 8
    logits = torch.randn(2, 4, 7)
    batch = Batch(Call((), {"input_ids": torch.ones(2, 4, dtype=torch.long)}), torch.ones(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=2 * logits)
    )
    torch.testing.assert_close(distance(2 * logits, logits, batch, "kl"), expected.mean())
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    batch = Batch(Call((), {**batch.call.kwargs, "attention_mask": mask}), torch.ones(2))
    changed = logits.clone()
    changed[1, 1:] += 100.0
    assert float(distance(changed, logits, batch)) == 0.0


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_a_pipeline_trains_on_prompts_and_reloads(name, tmp_path):
    pipe = tiny.build_pipeline(name)
    call = {n: v for n, v in tiny.call_kwargs(pipe, steps=3).items() if n not in ("generator", "output_type")}
    plan = dc.compression_plan(pipe, config(quantize_all=False, max_train_steps=4, phi_rank=1))
    pipe.compress(config(quantize_all=False, max_train_steps=4, phi_rank=1), data=[call])
    assert sorted(plan.components["transformer"].layers) == sorted(
        n for n, m in pipe.transformer.named_modules() if type(m).__name__ == "QuantizedLinear"
    )
    expected = tiny.sample(pipe)
    assert torch.equal(tiny.sample(tiny.reloaded(pipe, tmp_path)), expected)
    assert "quantization-aware training" in str(pipe.compression_report())


def test_half_precision_trains_in_float32_and_comes_back_in_its_own():
    pipe = tiny.build_pipeline("wan", dtype=torch.bfloat16)
    before = {n: p.dtype for n, p in pipe.transformer.named_parameters()}
    data = synthetic_latents(pipe, 2, **_call(pipe))
    trainer = dc.QATTrainer(pipe, config(quantize_all=False, max_train_steps=4, phi_rank=1), data)
    trainer.train()
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
    trainer.convert()
    now = dict(pipe.transformer.named_parameters())
    kept = [name for name in before if name in now]
    assert len(kept) > 40
    assert {n: now[n].dtype for n in kept} == {n: before[n] for n in kept}
    assert pipe.transformer.blocks[0].attn1.to_q.compute_dtype is torch.bfloat16


def _call(pipe: Any) -> dict[str, Any]:
    return {n: v for n, v in tiny.call_kwargs(pipe).items() if n not in ("prompt", "generator", "output_type")}


def test_checkpointed_blocks_accumulated_passes_and_cached_teachers_change_no_bit():
    pipe = tiny.build_pipeline("wan")
    pipe.transformer = tiny.build("wan", num_layers=1)
    data = record_calls(pipe, ["a red cat", "the blue house"], num_samples=4, **_call(pipe))
    base = {"quantize_all": False, "clip_groups": 8, "max_train_steps": 4, "phi_rank": 2}

    def losses(options: dict[str, Any] | None = None, **kwargs: Any) -> torch.Tensor:
        own = copy.deepcopy(pipe.transformer)
        return dc.QATTrainer(own, config(**{**base, **kwargs}), data, **(options or {})).train().losses

    plain = losses()
    assert torch.equal(losses(gradient_checkpointing=True), plain)
    assert torch.equal(losses({"teacher": "cached"}), plain)
    # Two items at once, or one after the other, are one step.
    data = RecordedCalls([data.call(index) for index in (0, 1)])
    together, in_turn = losses(train_batch_size=2), losses(gradient_accumulation_steps=2)
    torch.testing.assert_close(together[:2], in_turn[:2], rtol=1e-3, atol=1e-6)  # codes flip later


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow)])
def test_a_resumed_training_gives_the_same_losses_across_phases(stop, tmp_path):
    """Phases of rank 4, 2 and 1 start at steps 0, 3 and 6, and the branch has left at 9."""
    settings: dict[str, Any] = {"output_dir": tmp_path, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    settings["held_out"] = 2
    asked = config(ema_decay=0.9)
    whole = mlp()
    expected = dc.QATTrainer(whole, asked, calls(), held_out=2).train()

    class StopError(Exception):
        pass

    def stopping(stage, done, total, metrics):
        if done == stop:
            raise StopError

    model = mlp()
    untouched = bits(model)
    with pytest.raises(StopError):
        dc.QATTrainer(model, asked, calls(), callback=stopping, **settings).train()
    assert same(bits(model), untouched)
    assert (tmp_path / f"checkpoint-{stop}").is_dir()
    seen = []
    again = dc.QATTrainer(model, asked, calls(), callback=lambda *a: seen.append(a[1]), **settings).train()
    assert seen[:2] == [stop, stop + 1]
    assert torch.equal(again.losses, expected.losses)
    assert torch.equal(again.gradient_norms, expected.gradient_norms)
    assert again.validation == expected.validation
    assert same(bits(model), bits(whole))


def test_checkpoints_are_pruned_whole_and_of_one_training(tmp_path):
    settings: dict[str, Any] = {"output_dir": tmp_path, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    dc.QATTrainer(mlp(), config(), calls(), **settings).train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12"]
    (tmp_path / "checkpoint-14").mkdir()  # one that was not finished
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-12"
    with pytest.raises(CheckpointError, match="checkpoint-10, checkpoint-12"):
        find_checkpoint(tmp_path, "checkpoint-3")
    model = mlp()
    before = bits(model)
    other = config(learning_rate=2e-3)
    with pytest.raises(ConfigError, match="learning_rate"):
        dc.QATTrainer(model, other, calls(), resume_from_checkpoint="latest", **settings).train()
    with pytest.raises(ConfigError, match="content"):
        dc.QATTrainer(model, config(), calls(7), resume_from_checkpoint="latest", **settings).train()
    (tmp_path / "checkpoint-12" / "training.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="damaged"):
        dc.QATTrainer(model, config(), calls(), resume_from_checkpoint="latest", **settings).train()
    assert same(bits(model), before)


# --- processes ----------------------------------------------------------------------------------------------------


def _one_of_two(index: int, folder: Path, port: int, sharded: bool) -> None:
    torch.set_num_threads(1)
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a test before may have left one of a single process
    accelerator = Accelerator(cpu=True)
    stock = trainer_module.Team

    def team(state):  # accelerate knows no FSDP on a CPU
        made = stock(state)
        made.shards = sharded
        return made

    trainer_module.Team = team
    model = mlp()
    trainer = dc.QATTrainer(
        model, config(), calls(), accelerator=accelerator, output_dir=folder / "out", checkpointing_steps=6
    )
    result = trainer.train()
    again = dc.QATTrainer(  # from the middle, across two phases
        mlp(),
        config(),
        calls(),
        accelerator=accelerator,
        output_dir=folder / "out",
        resume_from_checkpoint="checkpoint-6",
    ).train()
    assert torch.equal(again.losses, result.losses)
    assert torch.equal(again.gradient_norms, result.gradient_norms)
    torch.save({"losses": result.losses, "norms": result.gradient_norms, "model": bits(model)}, folder / f"{index}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["whole", "sharded"])
def test_two_processes_are_one_with_twice_the_batch(sharded, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_one_of_two, args=(index, tmp_path, port, sharded)) for index in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    one, other = (torch.load(tmp_path / f"{index}.pt") for index in (0, 1))
    assert torch.equal(one["losses"], other["losses"])
    assert same(one["model"], other["model"])
    model = mlp()
    alone = dc.QATTrainer(model, config(train_batch_size=2), calls()).train()
    torch.testing.assert_close(one["losses"], alone.losses, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(one["norms"], alone.gradient_norms, rtol=1e-3, atol=1e-6)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoint-12", "checkpoint-6"]


# --- failures and pieces ------------------------------------------------------------------------------------------


def test_a_failure_leaves_everything_as_it_was():
    pipe = tiny.build_pipeline("wan")
    before, modules = bits(pipe.transformer), [id(m) for m in pipe.transformer.modules()]
    hooks = len(pipe.transformer._forward_pre_hooks)
    data = record_calls(pipe, ["a red cat"], num_samples=2, **_call(pipe))

    def failing(stage, done, total, metrics):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.compress(config(quantize_all=False, phi_rank=2, gradient_checkpointing=True), data=data, callback=failing)
    assert same(bits(pipe.transformer), before)
    assert [id(m) for m in pipe.transformer.modules()] == modules
    assert len(pipe.transformer._forward_pre_hooks) == hooks
    assert not any(getattr(m, "gradient_checkpointing", False) for m in pipe.transformer.modules())
    assert "quantization_config" not in pipe.transformer.config


def test_what_cannot_be_is_refused_before_anything_is_touched(tmp_path, monkeypatch):
    model, pipe = mlp(), tiny.build_pipeline("wan")
    before = bits(model)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        dc.QATTrainer(model, config(), calls(), report_to="wandb", output_dir=tmp_path).train()
    with pytest.raises(ConfigError, match="unknown report_to='tensorbord'"):
        dc.QATTrainer(model, config(), calls(), report_to="tensorbord", output_dir=tmp_path).train()
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(ConfigError, match=r"DEEPSPEED optimizes copies.*fsdp2\.yaml"):
            dc.QATTrainer(model, config(), calls()).train()
        assert main(["train", "--pretrained_model_name_or_path", "no/such", "--output_dir", str(tmp_path)]) == 1
    with pytest.raises(ConfigError, match="say nothing of their outputs"):
        dc.QATTrainer(model, config(method="lsq"), calls()).train()
    with pytest.raises(ConfigError, match="has no teacher"):
        dc.QATTrainer(model, config(method="lsq"), calls(), teacher=mlp()).train()
    with pytest.raises(ConfigError, match="held_out"):
        dc.QATTrainer(model, config(), calls(), held_out=8).train()
    latents = synthetic_latents(pipe, 1, **_call(pipe))
    with pytest.raises(ConfigError, match="never change"):
        dc.QATTrainer(pipe, config(quantize_all=False), latents, teacher="cached").train()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        dc.QATTrainer(model, config(gradient_checkpointing=True), calls()).train()
    with pytest.raises(ModelStateError, match="loss of step"):
        dc.QATTrainer(model, config(), calls(), loss=lambda s, t, b: s.sum() * float("nan")).train()
    with pytest.raises(ConfigError, match="output_dir"):
        dc.TrainerOptions(checkpointing_steps=2)
    with pytest.raises(ConfigError, match="call of its own"):
        pipe.compress({"transformer": config(), "text_encoder": "w8a16"}, data=["a red cat"])
    with pytest.raises(ConfigError, match="data= is of a training"):
        pipe.compress("w8a8", data=["a red cat"])
    with pytest.raises(ModelStateError, match="before convert"):
        dc.QATTrainer(model, config(), calls()).convert()
    assert same(bits(model), before)


def test_learning_rates_norms_and_averages_are_what_they_are_called():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] > 0
    assert factors[10] == 1.0 == max(factors)
    assert factors[99] < 1e-3
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 2.0)
    assert float(clip_gradients([parameter], 1.0)) == 4.0
    torch.testing.assert_close(parameter.grad.norm(), torch.tensor(1.0), rtol=1e-5, atol=0)
    average = Average({"p": parameter}, 0.5)
    parameter.data += 1.0
    average.update()  # keeps 2 / 11 of the old value at first
    torch.testing.assert_close(average.values["p"], torch.full((4,), 9 / 11))
    average.exchange()
    torch.testing.assert_close(parameter.data, torch.full((4,), 9 / 11))
    average.exchange()
    assert torch.equal(parameter.data, torch.ones(4))


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_trains_saves_and_fails_with_a_code(tmp_path, capsys):
    pipe = tiny.build_pipeline("wan")
    pipe.save_pretrained(tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text("a red cat\nthe blue house\n")
    command = ["train", "--pretrained_model_name_or_path", str(tmp_path / "wan"), "--device", "cpu", "--json"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--num_samples", "4", "--num_inference_steps", "2"]
    command += ["--height", "32", "--width", "32", "--num_frames", "5", "--max_train_steps", "3", "--phi_rank", "1"]
    command += ["--validation_epochs", "1", "--num_validation_videos", "2"]
    command += ["--validation_prompt", "a red cat", "--held_out", "1", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == len(found["losses"]) == 3
    assert {"kd_with_phi", "psnr_without_phi"} <= found["validation"][-1].keys()
    names = sorted(p.name for p in (tmp_path / "out" / "validation" / "step-3").iterdir())
    assert names == [f"{index}-{name}_phi.gif" for index in (0, 1) for name in ("with", "without")]
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(again.transformer.blocks[0].attn1.to_q).__name__ == "QuantizedLinear"
    assert main([*command, "--synthetic", "2"]) == 1
    assert "one of --prompts" in capsys.readouterr().err
