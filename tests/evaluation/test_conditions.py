"""Prompt files of every form, class labels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.conditions import class_conditions, conditions_digest, read_prompts, unconditional

COCO = {
    "images": [{"id": 7}, {"id": 9}],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": " A dog runs. "},
        {"id": 2, "image_id": 7, "caption": "A cat."},
        {"id": 3, "image_id": 9, "caption": "The same dog."},
    ],
}
VBENCH = [
    {"prompt_en": "a boat", "dimension": ["subject_consistency", "motion_smoothness"]},
    {"prompt_en": "a person is running", "dimension": ["human_action"], "auxiliary_info": {"human_action": 1}},
]
FILES = {
    "list.txt": ("# made up\na red cat\n\n  two dogs  \n", ["a red cat", "two dogs"]),
    "drawbench.csv": (
        'Prompts,Category\n"A red, round apple",Colors\nTwo cars,Counting\n',
        ["A red, round apple", "Two cars"],
    ),
    "parti.tsv": ("Prompt\tCategory\na b\tc\n", ["a b"]),
    "geneval.jsonl": (
        '{"tag": "two_object", "include": [], "prompt": "a photo of a bench and a bear"}\n\n{"prompt": "x"}\n',
        ["a photo of a bench and a bear", "x"],
    ),
    "coco.json": (json.dumps(COCO), ["A dog runs.", "A cat."]),
    "vbench.json": (json.dumps(VBENCH), ["a boat", "a person is running"]),
    "texts.json": ('["one", "two"]', ["one", "two"]),
    "wrapped.json": ('{"prompts": ["one", "two"]}', ["one", "two"]),
    "named.json": ('{"00A": "one", "00B": "two"}', ["one", "two"]),
}


@pytest.mark.parametrize("name", FILES)
def test_read_prompts_knows_the_form(name: str, tmp_path: Path) -> None:
    text, expected = FILES[name]
    path = tmp_path / name
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert [condition.prompt for condition in read_prompts(path)] == expected
    assert [condition.prompt for condition in read_prompts(path, limit=1)] == expected[:1]


def test_read_prompts_keeps_what_else_is_said(tmp_path: Path) -> None:
    for name in ("drawbench.csv", "geneval.jsonl", "coco.json", "vbench.json"):
        (tmp_path / name).write_text(FILES[name][0])
    assert read_prompts(tmp_path / "drawbench.csv")[0].metadata == {"Category": "Colors"}
    assert read_prompts(tmp_path / "geneval.jsonl")[0].metadata == {"tag": "two_object", "include": []}
    assert read_prompts(tmp_path / "coco.json")[0].metadata == {"id": 1, "image_id": 9}
    (found,) = read_prompts(tmp_path / "vbench.json", dimension="human_action")
    assert found.prompt == "a person is running"
    with pytest.raises(ConfigError, match="has no prompts of dimension 'colour'; it has human_action, motion"):
        read_prompts(tmp_path / "vbench.json", dimension="colour")


def test_read_prompts_shuffles_by_seed_before_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(50)))
    one, two = (read_prompts(path, limit=10, shuffle=seed) for seed in (1, 2))
    assert one == read_prompts(path, limit=20, shuffle=1)[:10]
    assert one != two
    assert conditions_digest(one) != conditions_digest(two)
    assert len({condition.prompt for condition in read_prompts(path, shuffle=1)}) == 50


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "# nothing\n", "need at least one prompt, got 0"),
        ("a.md", "x", r"prompt files end with \.txt"),
        ("a.csv", "Name,Kind\nx,y\n", "a.csv:2: need a text, or an object with one of prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{broken\n', "a.jsonl:2: not readable as JSON"),
        ("a.json", "3", "need a list of prompts or COCO captions, got int"),
        ("a.json", '[{"prompt": ""}]', "entry 0: need a text"),
        ("a.json", '{"annotations": [{"image_id": 1}]}', r"annotations\[0\]: need a text"),
    ],
)
def test_read_prompts_names_the_place_of_what_it_cannot_read(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(ConfigError, match="not a readable prompt file"):
        read_prompts(tmp_path / f"missing{Path(name).suffix}" if name != "a.md" else tmp_path / "missing.txt")


def test_class_conditions_cycle_and_parse() -> None:
    assert [c.class_label for c in class_conditions("3,5-7", 6)] == [3, 5, 6, 7, 3, 5]
    assert [c.class_label for c in class_conditions([4, 2])] == [4, 2]
    assert class_conditions("0")[0].kind == "classes"
    assert [c.kind for c in unconditional(2)] == ["unconditional"] * 2
    for bad in ("a-b", "", "7-3"):
        with pytest.raises(ConfigError, match="classes: need"):
            class_conditions(bad)
    with pytest.raises(ConfigError, match="need count >= 1"):
        unconditional(0)
