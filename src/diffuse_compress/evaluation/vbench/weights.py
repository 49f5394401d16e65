"""The weight files of VBench's dimensions: their names, where they come from, and where the package looks for them.

The folder has vbench's own layout and place, so files that it downloaded are found and the other way round.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.vbench.dimensions import Dimension
from diffuse_compress.progress import bar

__all__ = ["WEIGHTS", "WeightFile", "default_folder", "ensure_weights", "weights_identity"]

_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class WeightFile:
    """One file.

    Attributes:
        path: below the folder.
        url: of the file, or of the archive that holds it.
        member: of an archive: the path in it of the file; of a folder ends with "/", and ``path`` then is a file in the
            folder by whose presence it is known to be there.
        sha256: first digits, where the publisher gives them.
        repo: on the Hub; then ``path`` is in it, the place is the Hub's cache, and ``url`` is its page.
    """

    path: str
    url: str
    member: str = ""
    sha256: str = ""
    repo: str = ""

    def location(self, folder: Path) -> Path | None:
        """Where the file is, or None if it is not there."""
        if self.repo:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(self.repo, self.path)
            return Path(found) if isinstance(found, str) else None
        path = folder / self.path
        return path if path.is_file() else None

    def how_to_place(self, folder: Path) -> str:
        """What to do by hand, in one line."""
        if self.repo:
            return f"{self.repo} (its {self.path}): hf download {self.repo}, or copy its folder into the Hub's cache"
        target = folder / self.path
        if self.member.endswith("/"):
            return f"{self.url}: unpack, and place the folder {self.member} as {target.parent}"
        if self.member:
            return f"{self.url}: unpack, and place {self.member} as {target}"
        return f"{self.url}: place it as {target}"


_CLIP = "https://openaipublic.azureedge.net/clip/models"
_CLIP_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_CLIP_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
_USED = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main"

WEIGHTS: Mapping[str, WeightFile] = {
    "aesthetic": WeightFile(
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth",
    ),
    "amt": WeightFile("amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth"),
    "bert": WeightFile("vocab.txt", "https://huggingface.co/google-bert/bert-base-uncased", repo="bert-base-uncased"),
    "clip-b32": WeightFile("clip_model/ViT-B-32.pt", f"{_CLIP}/{_CLIP_B32}/ViT-B-32.pt", sha256=_CLIP_B32),
    "clip-l14": WeightFile("clip_model/ViT-L-14.pt", f"{_CLIP}/{_CLIP_L14}/ViT-L-14.pt", sha256=_CLIP_L14),
    "dino": WeightFile(
        "dino_model/dino_vitbase16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ),
    "dino-code": WeightFile(
        "dino_model/facebookresearch_dino_main/hubconf.py",
        "https://github.com/facebookresearch/dino/archive/refs/heads/main.zip",
        member="dino-main/",
    ),
    "grit": WeightFile("grit_model/grit_b_densecap_objectdet.pth", f"{_USED}/grit_b_densecap_objectdet.pth"),
    "musiq": WeightFile(
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        sha256="358bb6af",
    ),
    "raft": WeightFile(
        "raft_model/models/raft-things.pth",
        "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
        member="models/raft-things.pth",
    ),
    "tag2text": WeightFile(
        "caption_model/tag2text_swin_14m.pth",
        "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
    ),
    "umt": WeightFile(
        "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth", f"{_USED}/l16_ptk710_ftk710_ftk400_f16_res224.pth"
    ),
    "viclip": WeightFile("ViCLIP/ViClip-InternVid-10M-FLT.pth", f"{_USED}/ViClip-InternVid-10M-FLT.pth"),
    "viclip-words": WeightFile(
        "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
        "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
    ),
}
"""Every file, by the key that :class:`~diffuse_compress.evaluation.vbench.dimensions.Dimension` names."""


def default_folder() -> Path:
    """``$VBENCH_CACHE_DIR``, else ``~/.cache/vbench``: the package's own rule."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def weights_of(dimensions: Iterable[Dimension], static_filter: bool) -> list[str]:
    """Keys of all files that dimensions need, each once."""
    wanted = {key for dimension in dimensions for key in dimension.weights}
    return sorted(wanted | ({"raft"} if static_filter else set()))


def ensure_weights(
    names: Iterable[str], folder: Path, *, download: bool = True, files: Mapping[str, WeightFile] = WEIGHTS
) -> None:
    """Have every file in its place; those that are missing are downloaded.

    Args:
        names: keys of ``files``.
        folder: of the weights.
        download: try to; without, or where ``HF_HUB_OFFLINE`` is set, what is missing is an error at once.
        files: the table.

    Raises:
        ConfigError: files are missing and could not be downloaded; the message says for each where it is to be had and
            where to place it.
    """
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    failed: list[str] = []
    for name in names:
        file = files[name]
        if file.location(folder) is not None:
            continue
        reason = "not downloaded: HF_HUB_OFFLINE is set" if offline else "not downloaded, as asked"
        if download and not offline:
            try:
                _download(file, folder)
                continue
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                reason = f"{type(error).__name__}: {error}"
        failed.append(f"  {file.how_to_place(folder)} ({reason})")
    if failed:
        raise ConfigError(
            f"VBench: {len(failed)} weight files are missing and were not downloaded. On a machine with a network, "
            "fetch each and place it where it says, or give --weights FOLDER:\n" + "\n".join(failed)
        )


def weights_identity(names: Iterable[str], folder: Path) -> dict[str, str]:
    """{key: first 16 digits of the file's SHA-256}; of what is not there, "missing"."""
    found = {}
    for name in names:
        path = WEIGHTS[name].location(folder)
        found[name] = "missing" if path is None else _sha256(path)[:16]
    return found


def _download(file: WeightFile, folder: Path) -> None:
    """Fetch one file; it appears in its place when it is whole."""
    if file.repo:
        from huggingface_hub import snapshot_download

        snapshot_download(file.repo, allow_patterns=["*.json", "*.txt", "*.safetensors"])
        return
    target = folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        _fetch(file.url, partial)
        if file.sha256 and not _sha256(partial).startswith(file.sha256):
            raise ValueError(f"what came has another SHA-256 than {file.sha256}...")
        if file.member.endswith("/"):
            _unpack_folder(partial, file.member, target.parent)
        elif file.member:
            with zipfile.ZipFile(partial) as archive, archive.open(_member(archive, file.member)) as source:
                whole = target.with_name(f"{target.name}.{os.getpid()}.whole")
                with whole.open("wb") as out:
                    shutil.copyfileobj(source, out)
                whole.replace(target)
        else:
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _fetch(url: str, target: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer, target.open("wb") as out:
        total = int(answer.headers.get("Content-Length") or 0)
        with bar(f"download {url.rpartition('/')[2]}", total, None, None) as advance:
            done = 0
            while chunk := answer.read(_CHUNK_BYTES):
                out.write(chunk)
                done += len(chunk)
                advance(done, {})
    if total and done != total:
        raise ValueError(f"the download broke off after {done} of {total} bytes")


def _member(archive: zipfile.ZipFile, name: str) -> str:
    if name not in archive.namelist():
        raise ValueError(f"the archive has no {name}")
    return name


def _unpack_folder(path: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(member)
            if not name.startswith(member) or not inside or name.endswith("/") or ".." in Path(inside).parts:
                continue
            out = target / inside
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(archive.read(name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
