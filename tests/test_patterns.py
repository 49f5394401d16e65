"""Name patterns: the three forms, and writing a set of layers as few of them."""

from __future__ import annotations

import pytest

from diffuse_compress.errors import ConfigError
from diffuse_compress.patterns import first_match, generalize, matches, require_match


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("attn1", "blocks.0.attn1.to_q", True),
        ("attn1.to_q", "blocks.0.attn1.to_q", True),
        ("attn", "blocks.0.attn1.to_q", False),
        ("blocks.1", "blocks.1.ff", True),
        ("blocks.1", "blocks.11.ff", False),
        ("proj_out", "proj_out", True),
        ("proj_out", "proj_out_1", False),
        ("*.ff.*", "blocks.0.ff.net.0.proj", True),
        ("blocks.?.ff", "blocks.0.ff.net.0.proj", True),
        ("blocks.?.ff", "blocks.10.ff", False),
        ("re:blocks\\.[02]\\..*", "blocks.2.ff", True),
        ("re:blocks", "blocks.2.ff", False),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_matches_invalid_regex_is_named() -> None:
    with pytest.raises(ConfigError, match=r"re:\(.*not a regular expression"):
        matches("re:(", "x")


def test_require_match_lists_near_names() -> None:
    with pytest.raises(ConfigError, match=r"overrides: pattern 'atn1' matches no layer.*'attn1'"):
        require_match(["atn1"], ["blocks.0.attn1.to_q", "proj_out"], "overrides")


def test_first_match_last_pattern_wins() -> None:
    assert first_match([("*", 1), ("blocks.0", 2), ("proj_out", 3)], "blocks.0.ff") == 2
    assert first_match([("blocks", 1)], "proj_out") is None


def _expand(rules: list[tuple[str, str]], names: list[str]) -> dict[str, str]:
    return {name: value for name in names if (value := first_match(rules, name)) is not None}


def test_generalize_covers_exactly_what_was_assigned() -> None:
    assigned: dict[str, str | None] = {f"blocks.{i}.{leaf}": "w4" for i in range(12) for leaf in ("q", "k")}
    assigned |= {f"blocks.{i}.norm": "w8" for i in range(12)}
    assigned |= {"blocks.3.q": "w8", "blocks.7.k": None, "proj_in": None, "proj_out": "w8", "up.0.x.1.c": "w4"}
    rules = generalize(assigned)
    expected = {name: value for name, value in assigned.items() if value is not None}
    assert _expand(rules, list(assigned)) == expected
    assert len(rules) < 8, "twelve blocks must not become twelve patterns"


def test_generalize_indices_at_either_end() -> None:
    assigned = {"0.weight": "a", "1.weight": "a", "net.0": "b", "net.2": "b"}
    rules = generalize(assigned)
    assert _expand(rules, list(assigned)) == assigned
    assert len(rules) == 2


def test_generalize_lists_indices_once() -> None:
    assigned: dict[str, str | None] = {f"blocks.{i}.to_q": ("a", "b", None)[i % 3] for i in range(57)}
    assigned |= {f"up.{i}.resnets.{j}.conv": "a" if (i + j) % 2 else "b" for i in range(4) for j in range(12)}
    assigned |= {"norm.linear": "b"}
    rules = generalize(assigned)
    expected = {name: value for name, value in assigned.items() if value is not None}
    assert _expand(rules, [*assigned, "blocks.571.to_q", "up.4.resnets.0.conv"]) == expected
    assert sum(len(pattern) for pattern, _ in rules) < 700
