"""Learning what the data say (LSQ), what is logged, moments in 8 bits, float16, and models of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.calls import Call
from diffuse_compress.errors import ModelStateError
from diffuse_compress.pipeline_call import seeded
from diffuse_compress.training.batches import Batch, NoisedLatents, RecordedCalls
from diffuse_compress.training.config import QVGenConfig
from diffuse_compress.training.layers import TrainedLinear
from diffuse_compress.training.loss import task_loss
from diffuse_compress.training.order import draw_generator
from diffuse_compress.training.prepare import prepare
from diffuse_compress.training.setup import accelerated
from diffuse_compress.training.sources import load_data, save_data, synthetic_latents

STEPS = 6


class Wide(nn.Module):
    """One layer in a block, of as many weights as moments in 8 bits begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return hidden_states


def wide() -> Wide:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Wide()


def calls(count: int = 4) -> RecordedCalls:
    return RecordedCalls([Call((), {"hidden_states": torch.randn(16, 64, generator=seeded(i))}) for i in range(count)])


def config(**kwargs: Any) -> QVGenConfig:
    fields: dict[str, Any] = {"quantize_all": True, "clip_groups": 1, "phi_rank": 2, "max_train_steps": STEPS}
    return QVGenConfig(**{"scheme": "w4a4", **fields, "learning_rate": 1e-3, **kwargs})


def latents_of(pipe: Any, count: int = 3) -> NoisedLatents:
    named = {n: v for n, v in tiny.call_kwargs(pipe).items() if n not in ("prompt", "generator", "output_type")}
    return synthetic_latents(pipe, count, **named)


# --- the task -----------------------------------------------------------------------------------------------------


def test_lsq_learns_the_velocity_and_has_no_teacher():
    pipe = tiny.build_pipeline("wan")
    data, kept = latents_of(pipe), dict(clip_groups=8, quantize_all=False, max_train_steps=2, method="lsq")
    trainer = dc.QATTrainer(pipe, config(**kept), data, held_out=1)
    result = trainer.train()
    assert trainer.teacher is None
    assert result.validation[-1].keys() == {"step", "task_with_phi", "task_without_phi"}
    # The first loss, by hand: of the student at its start, to noise less latents.
    pipe = tiny.build_pipeline("wan")
    prepare(pipe.transformer, config(**kept), total_steps=2)
    batch = data.draw(trainer._items[trainer._order(0)[0]], draw_generator(0, 0))
    sigma = batch.call.kwargs["timestep"].reshape(-1, 1, 1, 1, 1) / 1000
    clean = data.items[trainer._items[trainer._order(0)[0]]]["latents"]
    noise = (batch.call.kwargs["hidden_states"] - (1 - sigma) * clean) / sigma
    with torch.no_grad():
        found = batch.call.run(pipe.transformer)[0]
    assert float(result.losses[0]) == pytest.approx(float((found - (noise - clean)).square().mean()), rel=1e-4)
    assert float(result.losses[0]) > 0.5  # of random weights, which know nothing of noise


def test_the_task_of_a_language_model_is_its_next_token():
    model = tiny.build("llama")
    inputs = tiny.inputs_for(model, batch=2)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
    batch = Batch(Call((), inputs), torch.ones(2))
    torch.testing.assert_close(task_loss(expected.logits, batch), expected.loss)
    given = [{"input_ids": inputs["input_ids"][:1]}]
    assert dc.QATTrainer(model, config(method="lsq", max_train_steps=2), given).train().steps == 2


def test_another_clip_is_another_item_and_the_index_alone_says_so(tmp_path, monkeypatch):
    data = latents_of(tiny.build_pipeline("wan"), 2)
    other = NoisedLatents([{**data.items[0], "latents": data.items[0]["latents"] + 1}, data.items[1]], data.noising)
    assert other.fingerprint() != data.fingerprint()
    save_data(data, tmp_path)
    stored = load_data(tmp_path, data.noising)
    monkeypatch.setattr(type(stored.items), "__getitem__", None)  # no item is read
    assert stored.fingerprint() == data.fingerprint()
    assert [stored.signature(i) for i in (0, 1)] == [data.signature(i) for i in (0, 1)]


# --- the run ------------------------------------------------------------------------------------------------------


class Notes(GeneralTracker):
    """Keeps what it is told."""

    name = "notes"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, Any]] = []
        self.ended = False

    tracker = property(lambda self: self.told)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.told.append({**values, "step": step})

    def finish(self) -> None:
        self.ended = True


def test_trackers_are_told_norms_ranks_and_singular_values_of_every_step(tmp_path):
    notes = Notes()
    asked = config(decay_fraction=0.7, phi_rank=4)
    trainer = dc.QATTrainer(
        wide(), asked, calls(), report_to=(notes,), output_dir=tmp_path, spectrum_steps=2, held_out=1
    )
    result = trainer.train()
    assert [told["step"] for told in notes.told] == [*range(1, STEPS + 1), STEPS]
    assert [told["grad_norm"] for told in notes.told[:STEPS]] == result.gradient_norms.tolist()
    assert [told["rank"] for told in notes.told[:STEPS]] == [4, 2, 1, 1, 0, 0]
    assert notes.told[-1].keys() == {"kd_with_phi", "kd_without_phi", "step"}
    assert {told["step"] for told in notes.told if "sigma_small_share" in told} == {1, 2, 4} == set(result.spectra)
    assert {name: len(values) for name, values in result.spectra[2].items()} == {"blocks.0.0": 2, "blocks.0.2": 2}
    largest = torch.stack([values[0] for values in result.spectra[1].values()]).mean()
    assert notes.told[0]["sigma_largest"] == pytest.approx(float(largest))
    assert notes.settings["max_train_steps"] == STEPS
    assert notes.ended


def test_moments_in_8_bits_learn_and_resume_bit_for_bit(tmp_path):
    options: dict[str, Any] = {"optimizer_8bit": True, "checkpointing_steps": 3}
    model = wide()
    expected = dc.QATTrainer(model, config(), calls(), output_dir=tmp_path, **options).train()
    plain = dc.QATTrainer(wide(), config(), calls()).train()
    assert not torch.equal(expected.losses, plain.losses)
    torch.testing.assert_close(expected.losses, plain.losses, rtol=0.1, atol=0)
    again, options["resume_from_checkpoint"] = wide(), "checkpoint-3"
    found = dc.QATTrainer(again, config(), calls(), output_dir=tmp_path, **options).train()
    assert torch.equal(found.losses, expected.losses)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_float16_learns_under_a_scale_and_gives_up_where_nothing_helps():
    plain = dc.QATTrainer(wide(), config(), calls()).train()
    half = dc.QATTrainer(wide(), config(mixed_precision="fp16"), calls()).train()
    assert not torch.equal(half.losses, plain.losses)
    torch.testing.assert_close(half.losses[:2], plain.losses[:2], rtol=0.1, atol=0)  # codes flip later
    model = wide()
    with pytest.raises(ModelStateError, match="overflow in float16"):
        dc.QATTrainer(
            model, config(mixed_precision="fp16", max_train_steps=40), calls(), loss=lambda s, t, b: s.sum() * torch.inf
        ).train()
    assert all(torch.equal(value, wide().state_dict()[name]) for name, value in model.state_dict().items())


def test_a_launchers_precision_counts(monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "bf16")
    options = dc.TrainerOptions()
    from accelerate import Accelerator

    with accelerated(options, Accelerator(cpu=True), config()) as accelerator:
        found = dc.QATTrainer(wide(), config(max_train_steps=3), calls(), accelerator=accelerator).train()
    asked = dc.QATTrainer(wide(), config(max_train_steps=3, mixed_precision="bf16"), calls()).train()
    assert torch.equal(found.losses, asked.losses)


# --- models -------------------------------------------------------------------------------------------------------


OFTEN, SELDOM = ("hunyuan_video", "flux"), ("cogvideox", "sd3", "qwenimage", "dit", "unet_sdxl")


@pytest.mark.parametrize("name", [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM)])
def test_denoisers_learn_and_are_deployed_as_they_were_trained(name):
    model = tiny.build(name)
    inputs = tiny.inputs_for(model)
    low_high = (0.0, 1.0) if name in ("flux", "qwenimage") else (0.0, 1000.0)
    prepared = prepare(model, QVGenConfig(phi_rank=2, timestep_range=low_high), total_steps=4)
    prepared.before_step(0)
    model(**inputs, return_dict=False)[0].square().mean().backward()
    learning = 0
    for layer in prepared.layers.values():
        grads = [parameter.grad for parameter in layer.parameters()]
        learning += all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)
    assert learning >= 0.6 * len(prepared.layers)  # the text stream of a last block ends in nothing
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
        prepared.before_step(4)
        expected = model(**inputs, return_dict=False)[0]
        prepared.convert()
        assert torch.equal(model(**inputs, return_dict=False)[0], expected)
    assert not any(isinstance(module, TrainedLinear) for module in model.modules())
