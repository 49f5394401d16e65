"""``variant=``: compressed pipelines save and load under one, and never beside weights that would then not load."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.integrations.variants import variant_of


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", ""),
        ("unet/diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", ""),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
        ("model.safetensors.index.json", ""),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("pytorch_model.non_ema.bin", "non_ema"),
        ("diffusion_pytorch_model.bin", ""),
        ("config.json", None),
        ("model_index.json", None),
        ("router.safetensors", None),
        ("pytorch_lora_weights.safetensors", None),
    ],
)
def test_variant_of_a_file(name: str, expected: str | None) -> None:
    assert variant_of(name) == expected


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "100KB"}], ids=["whole", "sharded"])
def test_pipeline_saved_and_loaded_with_a_variant(shards: dict[str, str], tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart", dtype=torch.float16)
    pipe.compress({"transformer": "w8a8", "text_encoder": "w8a16"}, measure=False)
    expected = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path, variant="fp16", **shards)
    weights = [path.name for path in tmp_path.rglob("*.safetensors")]
    assert {variant_of(name) for name in weights} == {"fp16"}
    assert (len(weights) > 3) == bool(shards)
    for arguments in ({}, {"dtype": torch.float16}):
        reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", **arguments)
        reloaded.set_progress_bar_config(disable=True)
        assert {part.dtype for part in (reloaded.transformer, reloaded.vae)} == {torch.float16}
        assert torch.equal(tiny.sample(reloaded), expected)
        assert torch.equal(tiny.sample(reloaded), expected)
    alone = type(pipe.transformer).from_pretrained(tmp_path, subfolder="transformer", variant="fp16")
    assert torch.equal(output(alone), output(pipe.transformer))
    with pytest.raises(OSError, match="no file named"):
        type(pipe.transformer).from_pretrained(tmp_path, subfolder="transformer")


@pytest.mark.parametrize("name", ["pixart", "llama"])
def test_saving_a_variant_whole_leaves_no_shards_of_it(name: str, tmp_path: Path) -> None:
    model = tiny.build(name).compress("w8a8", measure=False)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    model.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.index.fp16.json")), "another variant's files are not this save's"
    model.save_pretrained(tmp_path, variant="fp16")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert not list(tmp_path.glob("*.index*"))
    for variant in (None, "fp16"):
        assert torch.equal(output(type(model).from_pretrained(tmp_path, variant=variant)), output(model))


@pytest.mark.parametrize(("there", "new"), [(None, "fp16"), ("fp16", None), ("fp16", "int8")])
@pytest.mark.parametrize("name", ["pixart", "llama"])
def test_compressed_beside_dense_weights_is_refused(
    name: str, there: str | None, new: str | None, tmp_path: Path
) -> None:
    model = tiny.build(name)
    model.save_pretrained(tmp_path, variant=there)
    expected, before = output(model), content(tmp_path)
    model.compress("w8a8", measure=False)
    with pytest.raises(dc.CheckpointError, match=r"found dense ones.*One config.json.*repository of its own"):
        model.save_pretrained(tmp_path, variant=new)
    assert content(tmp_path) == before
    assert torch.equal(output(type(model).from_pretrained(tmp_path, variant=there)), expected)
    # In their place, under the same variant, they may stand.
    model.save_pretrained(tmp_path, variant=there)
    assert torch.equal(output(type(model).from_pretrained(tmp_path, variant=there)), output(model))


@pytest.mark.parametrize("name", ["pixart", "llama"])
def test_dense_or_otherwise_compressed_beside_compressed_weights_is_refused(name: str, tmp_path: Path) -> None:
    model, dense = tiny.build(name).compress("w8a8", measure=False), tiny.build(name)
    model.save_pretrained(tmp_path)
    before = content(tmp_path)
    with pytest.raises(dc.CheckpointError, match="found compressed ones of no variant, got a dense model"):
        dense.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(dc.CheckpointError, match=r"found otherwise compressed ones of no variant, got .*'w4a8'"):
        tiny.build(name).compress("w4a8", measure=False).save_pretrained(tmp_path, variant="fp16")
    assert content(tmp_path) == before
    # The same compression in another dtype is a variant as good as any.
    model.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert quantized_layers(type(model).from_pretrained(tmp_path, variant="fp16"))
    dense.save_pretrained(tmp_path / "dense")
    dense.save_pretrained(tmp_path / "dense", variant="fp16")


def test_loading_the_variant_that_was_not_saved_last_asks_for_its_dtype(tmp_path: Path) -> None:
    model = tiny.build("pixart").compress("w8a8", measure=False)
    model.save_pretrained(tmp_path)
    model.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    with pytest.warns(dc.errors.DiffuseCompressWarning, match="saved in float32, and are loaded in float16") as caught:
        assert type(model).from_pretrained(tmp_path).dtype == torch.float16
    assert sum(issubclass(item.category, dc.errors.DiffuseCompressWarning) for item in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.errors.DiffuseCompressWarning)
        assert type(model).from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
        assert type(model).from_pretrained(tmp_path, variant="fp16").dtype == torch.float16


def test_pipeline_beside_dense_weights_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.save_pretrained(tmp_path)
    before = content(tmp_path)
    pipe.compress("w8a8", measure=False)
    with pytest.raises(dc.CheckpointError, match=r"transformer: needs a place without other weights, found dense ones"):
        pipe.save_pretrained(tmp_path, variant="fp16")
    assert content(tmp_path) == before
    pipe.save_pretrained(tmp_path / "new", variant="fp16")


@pytest.mark.parametrize("name", ["pixart", "t5_encoder"])
def test_dense_variant_under_a_compressed_config_is_a_clear_error(name: str, tmp_path: Path) -> None:
    # As other tools leave it: files copied together.
    dense = tiny.build(name)
    dense.save_pretrained(tmp_path / "dense", variant="fp16")
    dense.compress("w8a8", measure=False).save_pretrained(tmp_path / "both")
    (file,) = (tmp_path / "dense").glob("*.safetensors")
    shutil.copy(file, tmp_path / "both")
    assert torch.equal(output(type(dense).from_pretrained(tmp_path / "both")), output(dense))
    with pytest.raises(
        dc.CheckpointError, match=r"found a file of dense ones.*Load with the variant= that is compressed"
    ):
        type(dense).from_pretrained(tmp_path / "both", variant="fp16")


def test_push_beside_dense_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client is replaced: what is in the repository decides."""
    pipe = tiny.build_pipeline("pixart")
    pipe.save_pretrained(tmp_path / "repo")
    pushed: list[str] = []
    files = [path for path in content(tmp_path / "repo")]

    def upload(self: Any, folder: str, repo: str, **kwargs: Any) -> str:
        pushed.extend(content(Path(folder)))
        return repo

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **kwargs: SimpleNamespace(repo_id=f"me/{repo}"))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, **kwargs: files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **kwargs: str(tmp_path / "repo" / file))
    hub = diffusers.utils.hub_utils
    monkeypatch.setattr(hub, "create_repo", huggingface_hub.create_repo)
    monkeypatch.setattr(
        hub, "load_or_create_model_card", lambda *args, **kwargs: SimpleNamespace(save=lambda path: None)
    )
    monkeypatch.setattr(hub, "populate_model_card", lambda card: card)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "_upload_folder", upload)

    pipe.push_to_hub("small", variant="fp16")  # dense: none of our business
    pushed.clear()
    pipe.compress("w8a8", measure=False)
    with pytest.raises(
        dc.CheckpointError, match=r"push_to_hub: me/small/transformer: .* found dense ones of no variant"
    ):
        pipe.push_to_hub("small", variant="fp16")
    assert not pushed
    pipe.push_to_hub("small")  # over them
    assert "transformer/diffusion_pytorch_model.safetensors" in pushed
    files.append("transformer/diffusion_pytorch_model.safetensors.index.json")
    with pytest.raises(dc.CheckpointError, match="found dense ones in shards"):
        pipe.push_to_hub("small")
    config = json.loads((tmp_path / "repo/transformer/config.json").read_text())
    pipe.save_pretrained(tmp_path / "ours")
    config["quantization_config"] = json.loads((tmp_path / "ours/transformer/config.json").read_text())[
        "quantization_config"
    ]
    (tmp_path / "repo/transformer/config.json").write_text(json.dumps(config))
    pipe.push_to_hub("small", variant="fp16")
