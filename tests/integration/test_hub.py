"""push_to_hub and back, over HTTP against a loopback Hub; the model card."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import diffuse_compress as dc
import tiny
from diffuse_compress.companions import complete_upload
from diffuse_compress.evaluation.records import Metric, Record
from diffuse_compress.integrations.origin import forget_local_paths
from diffuse_compress.model_card import model_card
from diffuse_compress.recipe import as_recipe
from loopback_hub import LoopbackHub

ROOT = Path(__file__).parents[2]
USER = Path(__file__).with_name("hub_user.py")
BASE_CARD = "---\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE.md\n---\n# Base\n"
OWNERS_CARD = "---\nlicense: mit\ntags:\n- cats\n---\n# My cats\n\nText of the owner.\n"
OWNERS_PIPELINE = b"# the owner's own code\n"


@dataclass
class Session:
    hub: LoopbackHub
    folder: Path
    pushed: dict[str, Any]
    shim: dict[str, Any]

    def card(self, repo: str, revision: str = "main") -> tuple[dict[str, Any], str]:
        text = self.hub.files(repo, revision)["README.md"].decode()
        match = re.match(r"---\n(.*?)\n---\n(.*)\Z", text, re.DOTALL)
        assert match is not None
        return yaml.safe_load(match[1]), match[2]


def _sharded(folder: Path) -> list[Path]:
    """A compressed transformer in shards, of the spec that the session pushes."""
    pipe = tiny.build_pipeline("pixart", dtype=torch.bfloat16).compress("w4a8", measure=False)
    pipe.transformer.save_pretrained(folder, max_shard_size="60KB")
    return [path for path in folder.iterdir() if path.is_file()]


def shell_record() -> Record:
    """What an evaluation of the pipeline that is pushed from the shell might have found."""
    return Record(
        name="w8a16",
        model={"id": "base/pixart", "class": "PixArtAlphaPipeline"},
        recipe=as_recipe("w8a16").to_dict(),
        device={"type": "cpu", "name": "a processor"},
        versions={},
        date="2026-11-26",
        command="",
        data={"kind": "prompts", "name": "general.txt", "sha256": None},
        seeds={"base": 0, "rule": ""},
        samples=8,
        settings={},
        metrics=(Metric("SSIM", 0.875, None, None, 8, "Gaussian window", True),),
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("hub")
    tiny.build_pipeline("pixart", dtype=torch.bfloat16).save_pretrained(folder / "base")
    with LoopbackHub() as hub:
        files = {p.relative_to(folder / "base").as_posix(): p for p in (folder / "base").rglob("*") if p.is_file()}
        hub.add("base/pixart", {name: path.read_bytes() for name, path in files.items()})
        hub.add("base/pixart", {"README.md": BASE_CARD.encode()})
        tiny.build("pixart").save_pretrained(folder / "sharded", max_shard_size="60KB")
        shards = [path for path in (folder / "sharded").iterdir() if path.is_file()]
        hub.add("base/sharded", {f"transformer/{path.name}": path.read_bytes() for path in shards})
        hub.add("me/sharded", {path.name: path.read_bytes() for path in _sharded(folder / "compressed")})
        hub.add("me/with-card", {"README.md": OWNERS_CARD.encode(), "pipeline.py": OWNERS_PIPELINE})

        shell_record().save(folder / "record.json")

        def user(what: str) -> dict[str, Any]:
            paths = [str(ROOT / name) for name in ("src", "kernels", "tests")]
            env = {**os.environ, **hub.environment(str(folder / "cache")), "PYTHONPATH": os.pathsep.join(paths)}
            command = [sys.executable, str(USER), str(folder), what]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        yield Session(hub, folder, user("push"), user("shim"))


def test_a_pushed_pipeline_comes_back_bit_for_bit(session: Session) -> None:
    assert session.pushed["same picture"]
    assert session.pushed["dtypes"] == ["torch.bfloat16"] * 3
    assert session.pushed["report"]
    # The download filter leaves out what it does not know; everything needed must have come through it.
    fetched = {path for method, path in session.hub.requests if method == "GET" and "/me/pixart/resolve" in path}
    assert not any("README" in path for path in fetched)


@pytest.mark.parametrize("name", ["saved", "saved-llama"])
def test_a_save_that_pushes_uploads_what_it_saved(name: str, session: Session) -> None:
    local = {path.relative_to(session.folder / name).as_posix(): path for path in (session.folder / name).rglob("*")}
    files = session.hub.files(f"me/{name}")
    assert files.keys() == {path for path, file in local.items() if file.is_file()}
    assert all(content == local[path].read_bytes() for path, content in files.items() if path != "README.md")
    weights = [path for path in files if path.endswith(".safetensors")]
    assert len(weights) > 3
    assert all("small" in path for path in weights)
    assert session.hub.repositories[f"me/{name}"].refs["main"].message == "in shards"
    assert session.pushed["same picture from shards"]
    # What the snippet loads must be there: the files have a variant, and only that.
    assert f'from_pretrained("me/{name}", variant="small")' in files["README.md"].decode()
    assert 'from_pretrained("PATH_OR_REPO", variant="small")' in local["README.md"].read_text()


def test_pipeline_py_loads_it_without_our_import(session: Session) -> None:
    assert session.shim == {
        "class": "PixArtAlphaPipeline",
        "same picture": True,
        "dtypes": ["torch.bfloat16"] * 3,
    }


def test_parts_and_language_models_are_pushed_too(session: Session) -> None:
    assert session.pushed["same part"]
    assert session.pushed["same logits"]
    assert set(session.hub.files("me/parts")) == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }
    assert "pipeline.py" not in session.hub.files("me/transformer")


def test_format_and_variant(session: Session) -> None:
    assert session.pushed["torchao"] == "TorchAoHfQuantizer"
    config = json.loads(session.hub.files("me/torchao")["transformer/config.json"])
    assert config["quantization_config"]["quant_method"] == "diffuse_compress"
    assert "variant" in session.pushed["refused"]
    names = set(session.hub.files("base/sharded"))
    assert len(names) > 3
    assert not any("w4a8" in name for name in names)
    assert "found model.safetensors of an earlier save, by which transformers" in session.pushed["refused me/llama"]
    assert "model.safetensors.index.json" not in session.hub.files("me/llama")
    # An index of shards that would stay beside the one file that is pushed, and a dense variant beside compressed ones.
    assert (
        "found diffusion_pytorch_model.safetensors.index.json of an earlier save"
        in session.pushed["refused me/sharded"]
    )
    assert "found compressed ones" in session.pushed["refused me/pixart"]


def test_arguments_pass_through(session: Session) -> None:
    repositories = session.hub.repositories
    private = ("me/pixart", "me/saved", "me/llama", "me/from-shell")
    assert [repositories[name].private for name in private] == [True] * len(private)
    assert not repositories["me/copy"].private
    assert repositories["me/pixart"].refs["main"].message == "the first"
    assert repositories["me/llama"].refs["main"].message == "a language model"
    assert repositories["me/with-card"].refs["refs/pr/1"].message == "for review"
    assert repositories["me/with-card"].refs["main"].files["README.md"].decode() == OWNERS_CARD


@pytest.mark.parametrize("repo", ["me/pixart", "me/saved", "me/copy", "me/transformer", "me/onload", "me/from-shell"])
def test_card_names_base_licence_and_kind(session: Session, repo: str) -> None:
    data, text = session.card(repo)
    assert data["base_model"] == "base/pixart"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "diffusers"
    assert data["license"] == "other"
    assert data["license_name"] == "some-licence"
    assert data["license_link"] == "https://huggingface.co/base/pixart/blob/main/LICENSE.md"
    assert "diffuse_compress" in data["tags"]
    is_pipeline = repo not in ("me/transformer", "me/onload")
    assert data.get("pipeline_tag") == ("text-to-image" if is_pipeline else None)
    variant = ', variant="small"' if repo == "me/saved" else ""
    assert f'from_pretrained("{repo}"{variant})' in text
    assert "More Information Needed" not in text
    assert "secret prompt" not in text
    assert text.count("diffuse_compress: begin") == 1
    if repo != "me/onload":  # quantized on its way in: nothing was measured
        assert re.search(r"on cpu, peak memory .*, 20\d\d-\d\d-\d\dT", text)
        assert "torch " in text


def test_results_reach_the_hub_as_a_model_index(session: Session) -> None:
    data, text = session.card("me/from-shell")
    (index,) = data["model-index"]
    assert index["name"] == "from-shell"
    (metric,) = index["results"][0]["metrics"]
    assert (metric["value"], metric["args"]["device"], metric["args"]["date"]) == (0.875, "a processor", "2026-11-26")
    assert "| SSIM (w8a16) | 0.875 |" in text
    assert "model-index" not in session.card("me/pixart")[0]


def test_card_of_a_language_model(session: Session) -> None:
    data, text = session.card("me/llama")
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert "license" not in data
    assert 'LlamaForCausalLM.from_pretrained("me/llama")' in text


def test_owners_card_and_code_stay(session: Session) -> None:
    data, text = session.card("me/with-card", "refs/pr/1")
    assert data["license"] == "mit"
    assert data["tags"][0] == "cats"
    assert "diffuse_compress" in data["tags"]
    assert data["base_model"] == "base/pixart"
    assert text.startswith("# My cats\n\nText of the owner.\n")
    assert 'from_pretrained("me/with-card")' in text
    assert session.hub.files("me/with-card", "refs/pr/1")["pipeline.py"] == OWNERS_PIPELINE


def test_no_local_path_leaves_this_machine(session: Session) -> None:
    for repo in session.hub.repositories:
        for revision in session.hub.repositories[repo].refs:
            for name, content in session.hub.files(repo, revision).items():
                for place in (str(session.folder), str(Path.home()) + "/", os.fspath(ROOT)):
                    assert place.encode() not in content, (repo, name)


def test_card_of_a_local_model_says_nothing_of_its_folder(tmp_path: Path) -> None:
    tiny.build("pixart").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    model = type(tiny.build("pixart")).from_pretrained(tmp_path / "dense").compress("w8a8", measure=False)
    model.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "license: apache-2.0" in text  # its own card lay beside it
    assert "base_model" not in text
    for file in (tmp_path / "out").rglob("*"):
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_card_is_brought_up_to_date_not_doubled() -> None:
    model = tiny.build("pixart").compress("w8a8", measure=False)
    first = model_card(model)
    changed = first.replace("# PixArt", "Words before.\n\n# PixArt") + "\nWords after.\n"
    second = model_card(model, existing=changed, repo_id=None)
    assert second.count("diffuse_compress: begin") == second.count("diffuse_compress: end") == 1
    assert "Words before." in second
    assert second.rstrip().endswith("Words after.")


def test_card_of_a_torchao_checkpoint_asks_for_torchao_only(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart").compress("w8a16", measure=False)
    pipe.save_pretrained(tmp_path, format="torchao")
    text = (tmp_path / "README.md").read_text()
    assert "pip install diffusers torchao" in text
    assert "import diffuse_compress" not in text
    assert "dtype=torch.float32)" in text
    assert "dequantized in blocks" not in text
    assert not (tmp_path / "pipeline.py").exists()
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "pipeline.py").exists()
    pipe.save_pretrained(tmp_path, format="torchao")
    assert not (tmp_path / "pipeline.py").exists()


@pytest.mark.parametrize(
    "text", [b"---\n\nHello\n\n---\n", b"---\nlicense: [mit\n---\n", b"---\nlicense: mit\n---\n\xe9\n"]
)
def test_a_broken_card_of_the_base_is_no_obstacle(text: bytes, tmp_path: Path) -> None:
    tiny.build("pixart").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense/README.md").write_bytes(text)
    model = type(tiny.build("pixart")).from_pretrained(tmp_path / "dense").compress("w8a8", measure=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_bytes(b"\xe9 is what the user wrote")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out/README.md").read_bytes() == b"\xe9 is what the user wrote"
    model.save_pretrained(tmp_path / "other")
    assert "license" not in (tmp_path / "other/README.md").read_text()


def test_licence_is_given_only_where_all_parts_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cards = {"acme/pixart": "license: other\nlicense_name: flux-nc", "google/t5": "license: apache-2.0"}

    def download(repo: str, file: str, **kwargs: Any) -> str:
        path = tmp_path / repo.replace("/", "-")
        path.write_text(f"---\n{cards[repo]}\npipeline_tag: text2text-generation\n---\n")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    pipe = tiny.build_pipeline("pixart")
    for part in (pipe.transformer, pipe.vae):
        part.register_to_config(_name_or_path="acme/pixart")
    pipe.text_encoder.config._name_or_path = "google/t5"
    pipe.compress({"text_encoder": "w8a16"}, measure=False)
    text = model_card(pipe)
    assert "base_model:\n- acme/pixart\n- google/t5\n" in text
    assert "license" not in text
    assert "pipeline_tag: text-to-image" in text
    pipe.text_encoder.hf_quantizer.state.base_model = "acme/pixart"
    text = model_card(pipe)
    assert "license: other\nlicense_name: flux-nc\n" in text


def test_paths_are_forgotten_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"text_config": {"_name_or_path": "/home/me/x"}, "parts": [{"_name_or_path": "../x"}], "size": 3}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/x"}))
    index = {"vae": ["diffusers", "AutoencoderKL", {"pretrained_model_name_or_path": "/home/me/x"}]}
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
    forget_local_paths(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"text_config": {}, "parts": [{}], "size": 3}
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {"base_model_name_or_path": None}
    assert "/home/me" in (tmp_path / "modular_model_index.json").read_text()
    forget_local_paths(tmp_path, uploading=True)
    assert "/home/me" not in (tmp_path / "modular_model_index.json").read_text()


def test_a_relative_path_is_no_repository_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pixart", "llama"):
        tiny.build(name).save_pretrained(f"models/{name}")
        cls = type(tiny.build(name))
        model = cls.from_pretrained(f"models/{name}", quantization_config=dc.QuantizationConfig("w8a16"))
        (tmp_path / "work").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "work")
        assert "base_model" not in model_card(model)
        monkeypatch.chdir(tmp_path)


def test_a_dense_model_takes_the_place_of_a_compressed_one(tmp_path: Path) -> None:
    model = tiny.build("pixart").compress("w8a8", measure=False)
    (tmp_path / "README.md").write_text(model_card(model, existing="---\nlicense: mit\n---\nMy words.\n"))
    pipe = tiny.build_pipeline("pixart").compress("w8a8", measure=False)
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipeline.py").write_bytes((tmp_path / "pipe/pipeline.py").read_bytes())
    complete_upload(tiny.build("pixart"), tmp_path, "me/model", subfolder="", token=None)
    assert not (tmp_path / "pipeline.py").exists()
    text = (tmp_path / "README.md").read_text()
    assert "My words." in text
    assert "license: mit" in text
    assert "diffuse_compress" not in text
    assert "quantized" not in text


def test_a_dense_save_takes_out_what_the_compressed_one_wrote(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart").compress("w8a8", measure=False)
    model = pipe.transformer
    model.save_pretrained(tmp_path / "mixed")
    for name in ("plain", "worded", "owned"):
        pipe.save_pretrained(tmp_path / name)
    (tmp_path / "worded/README.md").write_text((tmp_path / "worded/README.md").read_text() + "\nMy words.\n")
    (tmp_path / "owned/README.md").write_bytes(b"My card.\r\n")
    (tmp_path / "owned/pipeline.py").write_bytes(OWNERS_PIPELINE)
    licensed = (tmp_path / "plain/README.md").read_text().replace("---\n", "---\nlicense: mit\n", 1)
    (tmp_path / "licensed").mkdir()
    (tmp_path / "licensed/README.md").write_text(licensed)

    # What is compressed in a folder is told of, whatever else is saved there.
    tiny.build("pixart").save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain/pipeline.py").exists()
    assert "diffuse_compress: begin" in (tmp_path / "plain/README.md").read_text()
    tiny.build("pixart").save_pretrained(tmp_path / "mixed")
    assert not (tmp_path / "mixed/README.md").exists()

    dc.decompress(pipe)
    for name in ("plain", "worded", "owned", "licensed"):
        pipe.save_pretrained(tmp_path / name)
        type(pipe).from_pretrained(tmp_path / name)
    assert not (tmp_path / "plain/README.md").exists()
    assert not any((tmp_path / name / "pipeline.py").exists() for name in ("plain", "worded"))
    text = (tmp_path / "worded/README.md").read_text()
    assert text.rpartition("---\n")[2].strip() == "My words."
    assert "diffuse_compress" not in text
    assert (tmp_path / "licensed/README.md").read_text().startswith("---\nlicense: mit\n")
    assert "compressed" not in (tmp_path / "licensed/README.md").read_text()
    assert (tmp_path / "owned/README.md").read_bytes() == b"My card.\r\n"
    assert (tmp_path / "owned/pipeline.py").read_bytes() == OWNERS_PIPELINE


def test_a_form_that_was_filled_in_stays() -> None:
    from huggingface_hub import ModelCard, ModelCardData

    description = (
        "This is the model card of a 🧨 diffusers pipeline that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    form = str(ModelCard.from_template(ModelCardData(), model_description=description))
    model = tiny.build("pixart").compress("w8a8", measure=False)
    assert "More Information" not in model_card(model, existing=form)
    filled = form.replace("- **Developed by:** [More Information Needed]", "- **Developed by:** me")
    assert "- **Developed by:** me" in model_card(model, existing=filled)


def test_a_dense_model_is_pushed_as_ever(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("stock")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("not JSON, and nobody's business")
    tiny.build("pixart").save_pretrained(tmp_path)
    complete_upload(tiny.build("pixart"), tmp_path, "me/dense", subfolder="", token=None)
    assert (tmp_path / "README.md").read_text() == "stock"
    assert dc.compress  # the package is imported and its wrappers are in place
