"""The text: Python 3.11's standard library, its test suite and its documentation, split by file.

    mkdir packages && cd packages
    apt-get download libpython3.11-stdlib libpython3.11-minimal libpython3.11-testsuite python3.11-doc
    for file in *.deb; do dpkg-deb -x $file .; done
    cd .. && python data.py --packages packages --tokens tokens.npz --folder .

Version 3.11.2-6+deb12u9 of Debian 12, under the Python licence (PSF-2.0). Whole files go either into
the training text or, one in twenty by the hash of their paths, into the held-out text. Writes the
tokenizer (trained on the training text) and ``heldout.txt`` into the model's folder.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.export import compact

# One 4,096-token vocabulary for code and prose, the end of a file included.
VOCABULARY = 4096
END_OF_FILE = "<|endoftext|>"
CONTEXT = 512

SOURCES = ("usr/lib/python3.11/**/*.py", "usr/share/doc/python3.11/html/_sources/**/*.txt")
# Tables and generated text: code pages, the documentation once more, name and number lists.
EXCLUDED = (
    "/encodings/cp",
    "/encodings/iso",
    "/encodings/mac_",
    "/encodings/koi8",
    "/pydoc_data/",
    "/_sysconfigdata",
    "/test/test_unicode_identifiers",
    "/test/datetimetester",
    "/test/encoded_modules/",
    "/whatsnew/changelog",
)
HELD_OUT_SHARE = 20
HELD_OUT_TEXT_BYTES = 110_000
HELD_OUT_FILE_BYTES = 30_000


def read_corpus(packages: Path) -> dict[str, str]:
    """Path and text of every file that is UTF-8 and longer than 200 characters, in path order."""
    corpus = {}
    for pattern in SOURCES:
        for path in sorted(Path(packages).glob(pattern)):
            name = str(path.relative_to(packages))
            if any(part in "/" + name for part in EXCLUDED):
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if len(text) > 200 and END_OF_FILE not in text:
                corpus[name] = text
    return corpus


def is_held_out(name: str) -> bool:
    """By the path's hash: a file stays on its side whatever else joins the corpus."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text splits into known tokens, and decoding gives it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_FILE,
        eos_token=END_OF_FILE,
        pad_token=END_OF_FILE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one row of uint16 tokens, each text after an end-of-file token."""
    end = [tokenizer.eos_token_id]
    rows = tokenizer.backend_tokenizer.encode_batch(texts)
    return np.concatenate([np.array(end + row.ids, dtype=np.uint16) for row in rows])


def held_out_text(corpus: dict[str, str]) -> str:
    """Some held-out files as one text, each after `END_OF_FILE`, in an order by seed 0.

    Only files of up to `HELD_OUT_FILE_BYTES`, so that there are many, and none that speaks of a
    copyright of its own.
    """
    names = sorted(corpus)
    random.Random(0).shuffle(names)
    text = ""
    for name in names:
        piece = END_OF_FILE + corpus[name]
        small = len(piece.encode()) <= HELD_OUT_FILE_BYTES
        if small and "copyright" not in piece.lower() and len((text + piece).encode()) <= HELD_OUT_TEXT_BYTES:
            text += piece
    return text


def load_tokens(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out tokens, uint16."""
    stored = np.load(path)
    return stored["train"], stored["held_out"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the unpacked packages")
    parser.add_argument("--tokens", type=Path, required=True, help=".npz to write")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="the model's folder")
    args = parser.parse_args()

    corpus = read_corpus(args.packages)
    held_out = {name: text for name, text in corpus.items() if is_held_out(name)}
    train = {name: text for name, text in corpus.items() if name not in held_out}
    tokenizer = train_tokenizer(list(train.values()))
    tokenizer.save_pretrained(args.folder)
    compact(args.folder / "tokenizer.json")
    (args.folder / "heldout.txt").write_text(held_out_text(held_out), encoding="utf-8")
    rows = {}
    for key, part in (("train", train), ("held_out", held_out)):
        rows[key] = encode(tokenizer, list(part.values()))
        size = sum(len(text.encode()) for text in part.values())
        print(f"{key}: {len(part)} files, {size} bytes, {len(rows[key])} tokens")
    args.tokens.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.tokens, **rows)


if __name__ == "__main__":
    main()
