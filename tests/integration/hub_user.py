"""What a user does with the Hub, in a process of its own: run by test_hub.py with HF_ENDPOINT set to a loopback Hub.

``python hub_user.py FOLDER push`` compresses a base repository, pushes it in every way, loads it back; ``... shim``
loads with no import of the package. Results are JSON on the last line of standard output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel

import tiny


def picture(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**tiny.call_kwargs(pipe, output_type="pt")).images


def push(folder: Path) -> dict[str, Any]:
    import transformers

    import diffuse_compress as dc
    from diffuse_compress.cli import main

    found: dict[str, Any] = {}
    dense = DiffusionPipeline.from_pretrained("base/pixart", dtype=torch.bfloat16)
    pipe = dense.compress({"transformer": "w4a8", "text_encoder": "w8a16"}, preview=["a secret prompt"])
    pipe.push_to_hub("me/pixart", private=True, commit_message="the first")
    expected = picture(pipe)
    torch.save(expected, folder / "expected.pt")

    again = DiffusionPipeline.from_pretrained("me/pixart")
    found["same picture"] = torch.equal(picture(again), expected)
    found["dtypes"] = [str(part.dtype) for part in (again.transformer, again.text_encoder, again.vae)]
    found["report"] = "w4a8" in str(again.compression_report())
    again.push_to_hub("me/copy")

    pipe.push_to_hub("me/with-card", create_pr=True, commit_message="for review")
    saved = {"push_to_hub": True, "private": True, "commit_message": "in shards", "max_shard_size": "60KB"}
    pipe.save_pretrained(folder / "saved", variant="small", repo_id="me/saved", **saved)
    again = DiffusionPipeline.from_pretrained("me/saved", variant="small")
    found["same picture from shards"] = torch.equal(picture(again), expected)
    pipe.transformer.push_to_hub("me/parts", subfolder="transformer")
    part = PixArtTransformer2DModel.from_pretrained("me/parts", subfolder="transformer")
    weight = "transformer_blocks.0.attn1.to_q.qweight"
    found["same part"] = torch.equal(part.state_dict()[weight], pipe.transformer.state_dict()[weight])
    pipe.transformer.push_to_hub("me/transformer")

    command = ["compress", "base/pixart", "--recipe", "w8a16", "--push", "me/from-shell", "--private", "--no-measure"]
    command += ["--results", str(folder / "record.json")]
    assert main(command) == 0

    config = dc.QuantizationConfig("w8a8")
    onload = PixArtTransformer2DModel.from_pretrained(
        "base/pixart", subfolder="transformer", quantization_config=config
    )
    onload.push_to_hub("me/onload")

    pipe.push_to_hub("me/torchao", format={"text_encoder": "torchao"})
    native = transformers.T5EncoderModel.from_pretrained("me/torchao", subfolder="text_encoder")
    found["torchao"] = type(native.hf_quantizer).__name__
    try:
        pipe.push_to_hub("base/sharded", variant="w4a8")
    except dc.CheckpointError as error:
        found["refused"] = str(error)

    for name, model in (
        ("me/sharded", pipe.transformer),
        ("me/pixart", DiffusionPipeline.from_pretrained("base/pixart")),
    ):
        try:
            model.push_to_hub(name, variant="fp16" if name == "me/pixart" else None)
        except dc.CheckpointError as error:
            found[f"refused {name}"] = str(error)

    llama = tiny.build("llama").compress("w8a16")
    llama.push_to_hub("me/llama", commit_message="a language model", private=True)
    try:
        llama.push_to_hub("me/llama", max_shard_size="100KB")
    except dc.CheckpointError as error:
        found["refused me/llama"] = str(error)
    llama.save_pretrained(folder / "saved-llama", variant="small", **saved)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained("me/llama")
    inputs = tiny.inputs_for(llama)
    with torch.no_grad():
        found["same logits"] = torch.equal(llama(**inputs).logits, reloaded(**inputs).logits)
    return found


def shim(folder: Path) -> dict[str, Any]:
    assert "diffuse_compress" not in sys.modules
    pipe = DiffusionPipeline.from_pretrained("me/pixart", custom_pipeline="pipeline", trust_remote_code=True)
    expected = torch.load(folder / "expected.pt")
    return {
        "class": type(pipe).__name__,
        "same picture": torch.equal(picture(pipe), expected),
        "dtypes": [str(part.dtype) for part in (pipe.transformer, pipe.text_encoder, pipe.vae)],
    }


if __name__ == "__main__":
    print(json.dumps({"push": push, "shim": shim}[sys.argv[2]](Path(sys.argv[1]))))
