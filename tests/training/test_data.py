"""Training data: prompts, pictures and clips, latents on disk, texts; batches and their order."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
from PIL import Image

import diffuse_compress  # noqa: F401  attaches compress
import tiny
from diffuse_compress.calls import Call
from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.pipeline_call import seeded
from diffuse_compress.training.batches import collated, sample_of, timestep_of
from diffuse_compress.training.media import media_in
from diffuse_compress.training.order import BatchOrder
from diffuse_compress.training.sources import (
    encode_media,
    load_data,
    record_calls,
    save_data,
    synthetic_latents,
    training_data,
)


def call_of(pipe: Any, **kwargs: Any) -> dict[str, Any]:
    found = {n: v for n, v in tiny.call_kwargs(pipe).items() if n not in ("prompt", "generator", "output_type")}
    return {**found, **kwargs}


def cogvideox() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ).eval()
    pipe = CogVideoXPipeline(
        tokenizer=tiny.t5_tokenizer(),
        text_encoder=tiny.build("t5_encoder"),
        vae=vae,
        transformer=tiny.build("cogvideox"),
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(seed: int, frames: int = 5) -> torch.Tensor:
    return torch.rand(frames, 3, 32, 32, generator=seeded(seed))


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_clips_are_encoded_once_and_noised_at_every_draw(name, monkeypatch, tmp_path):
    pipe = cogvideox() if name == "cogvideox" else tiny.build_pipeline(name)
    calls, stock = [], type(pipe.vae).encode
    monkeypatch.setattr(type(pipe.vae), "encode", lambda self, x: (calls.append(x), stock(self, x))[1])
    options = {"max_sequence_length": tiny.TEXT_LENGTH}
    items = [{"video": clip(0), "caption": "a red cat"}, {"video": clip(1, frames=7), "prompt": "a blue house"}]
    data = encode_media(pipe, items, **options)
    assert [tuple(pixels.shape) for pixels in calls] == [(1, 3, 5, 32, 32)] * 2  # 7 frames are 4 k + 1 too many
    one, again, other = (data.draw(0, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(sample_of(one.call), sample_of(again.call))
    assert not torch.equal(sample_of(one.call), sample_of(other.call))
    assert not torch.equal(timestep_of(one.call), timestep_of(other.call))
    assert len(calls) == 2
    monkeypatch.setattr("diffuse_compress.training.sources._CLIPS_IN_SHARD", 1)
    stored = encode_media(pipe, items, folder=tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json",
        "items-00000.safetensors",
        "items-00001.safetensors",
    ]
    assert stored.fingerprint() == data.fingerprint()
    made = len(calls)
    assert encode_media(pipe, items, folder=tmp_path, **options).fingerprint() == data.fingerprint()
    assert len(calls) == made + 1  # the first one, for comparison
    with torch.no_grad():
        next(pipe.vae.parameters()).mul_(2)
    other = encode_media(pipe, items, folder=tmp_path, **options)
    assert len(calls) == made + 4
    assert other.fingerprint() != data.fingerprint()
    with torch.no_grad():
        next(pipe.vae.parameters()).div_(2)
    assert encode_media(pipe, items[:1], folder=tmp_path, **options).notes(0) == data.notes(0)
    stored = encode_media(pipe, items, folder=tmp_path, **options)
    assert torch.equal(sample_of(stored.draw(0, seeded(0)).call), sample_of(one.call))
    assert torch.equal(load_data(tmp_path, pipe=pipe).draw(0, seeded(0)).truth, one.truth)
    both = collated([one, data.draw(1, seeded(2))])
    with torch.no_grad():
        found = both.call.run(pipe.transformer)[0]
        alone = one.call.run(pipe.transformer)[0]
    torch.testing.assert_close(found[:1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["wan", "pixart", "flux"])
def test_latents_are_normalized_as_the_pipeline_undoes_it(name):
    pipe = tiny.build_pipeline(name)
    pixels = clip(0) if name == "wan" else clip(0)[:1]
    content = pixels if name == "wan" else pixels[0]
    data = encode_media(pipe, [{"image": content, "caption": ""}], max_sequence_length=tiny.TEXT_LENGTH)
    found = data.items[0]["mean"]
    with torch.no_grad():
        given = pixels.movedim(0, 1)[None] if name == "wan" else pixels
        expected = pipe.vae.encode(given * 2 - 1).latent_dist.mean
    config = pipe.vae.config
    if name == "wan":  # the inverse, as in WanPipeline.__call__
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        found = found * std + mean
    elif name == "flux":
        found = pipe._unpack_latents(found, 32, 32, pipe.vae_scale_factor) / config.scaling_factor + config.shift_factor
    else:
        found = found / config.scaling_factor
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_folders_are_read_in_every_form(tmp_path):
    for form in ("csv", "jsonl", "pairs", "lists"):
        folder = tmp_path / form
        folder.mkdir()
        for number in range(2):
            Image.new("RGB", (40, 32), (number * 90, 20, 20)).save(folder / f"{number}.png")
        rows = [(f"{number}.png", f"caption, {number}") for number in range(2)]
        if form == "csv":
            (folder / "metadata.csv").write_text('file_name,text\n0.png,"caption, 0"\n1.png,"caption, 1"\n')
        elif form == "jsonl":
            lines = [json.dumps({"file_name": name, "caption": text}) for name, text in rows]
            (folder / "metadata.jsonl").write_text("\n".join(lines))
        elif form == "lists":
            (folder / "prompts.txt").write_text("\n".join(text for _, text in rows))
            (folder / "videos.txt").write_text("\n".join(name for name, _ in rows))
        else:
            for name, text in rows:
                (folder / name).with_suffix(".txt").write_text(text)
        assert [media.caption for media in media_in(folder)] == ["caption, 0", "caption, 1"]
    with pytest.raises(ConfigError, match="no pictures or clips"):
        media_in(tmp_path / "none")
    (tmp_path / "csv" / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"0\.png"):
        media_in(tmp_path / "csv")
    pipe = tiny.build_pipeline("pixart")
    data = training_data(pipe, "transformer", tmp_path / "pairs")
    assert sample_of(data.call(0)).shape == (1, 4, 8, 10)  # of 40 x 32 pixels


@pytest.mark.parametrize("name", ["pixart", "wan", "flux"])
def test_prompts_alone_give_the_calls_of_the_pipeline_itself(name):
    pipe = tiny.build_pipeline(name)
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sample_of(Call(args, kwargs)).clone()), with_kwargs=True
    )
    data = record_calls(pipe, ["a red cat"], num_samples=3, **call_of(pipe, num_inference_steps=4))
    handle.remove()
    assert len(data) >= 3
    for index in range(len(data)):
        assert any(torch.equal(sample_of(data.call(index)), sample) for sample in seen)
    assert data.is_fixed


def test_data_come_back_from_the_disk_draw_for_draw(tmp_path):
    pipe = tiny.build_pipeline("flux")
    latents = synthetic_latents(pipe, 3, **call_of(pipe))
    calls = record_calls(pipe, ["a red cat"], num_samples=2, space="x0", **call_of(pipe))
    calls = calls.with_targets([torch.ones(1, 4)] * len(calls))
    for name, data in (("latents", latents), ("calls", calls)):
        save_data(data, tmp_path / name)
        again = load_data(tmp_path / name, pipe=pipe)
        assert len(again) == len(data)
        for index in range(len(data)):
            one, other = data.draw(index, seeded(5)), again.draw(index, seeded(5))
            assert torch.equal(sample_of(one.call), sample_of(other.call))
            assert torch.equal(timestep_of(one.call), timestep_of(other.call))
            assert torch.equal(one.weight, other.weight)
            assert data.signature(index) == again.signature(index)
        assert again.fingerprint() == data.fingerprint()
    assert float(timestep_of(latents.draw(0, seeded(0)).call).max()) <= 1  # Flux divides by 1000
    (tmp_path / "calls" / "items-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        load_data(tmp_path / "calls")


def test_every_item_is_seen_in_an_epoch_and_batches_are_of_one_kind():
    order = BatchOrder(["a"] * 5 + ["b"] * 4, 2, seed=3)
    for epoch in range(2):
        batches = [order(epoch * order.per_epoch + number) for number in range(order.per_epoch)]
        assert {index for batch in batches for index in batch} == set(range(9))
        assert all(len({index < 5 for index in batch}) == 1 and len(batch) == 2 for batch in batches)
    assert [BatchOrder(["a"] * 5 + ["b"] * 4, 2, seed=3)(n) for n in range(8)] == [order(n) for n in range(8)]
    assert [order(n) for n in range(5)] != [order(n) for n in range(5, 10)]


def test_what_is_no_data_is_refused():
    pipe = tiny.build_pipeline("wan")
    with pytest.raises(ConfigError, match="no folder"):
        training_data(pipe, "transformer", "a red cat")
    with pytest.raises(ConfigError, match="data= is needed"):
        training_data(pipe.transformer, "", None)
    with pytest.raises(ConfigError, match="pixels"):
        encode_media(pipe, [{"video": torch.rand(5, 4, 32, 32), "caption": ""}])
