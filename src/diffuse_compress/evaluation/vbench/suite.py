"""VBench's prompt suite, the names of its videos, and whether a set of videos has all that a dimension asks for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.vbench.dimensions import DIMENSIONS, FLICKERING, FLICKERING_SAMPLES, SAMPLES, Dimension

__all__ = ["SUITE_FILE", "PromptEntry", "PromptSuite", "find_suite", "load_suite", "missing_videos", "video_name"]

SUITE_FILE = "VBench_full_info.json"
_PUBLISHED_SHA256 = "7bca4fabb55f8aeeda5d63d8377f144e9757ac706b69161951c8810b9a1bf706"
"""Of the suite of vbench 0.1.5 as :attr:`PromptSuite.sha256` takes it."""


@dataclass(frozen=True)
class PromptEntry:
    """One prompt.

    Attributes:
        prompt: text, verbatim: it is part of the videos' names.
        dimensions: that it is for.
        auxiliary: {dimension: what it looks for in the videos}.
    """

    prompt: str
    dimensions: tuple[str, ...]
    auxiliary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSuite:
    """Prompts by dimension.

    Attributes:
        name: of its file.
        entries: in the file's order; a prompt may come more than once, for different dimensions.
        sha256: of its content, or None where prompts are those of the videos at hand.
    """

    name: str
    entries: tuple[PromptEntry, ...]
    sha256: str | None

    @property
    def is_published(self) -> bool:
        """The suite of vbench 0.1.5: only its scores compare with published ones."""
        return self.sha256 == _PUBLISHED_SHA256

    def of(self, dimension: str) -> tuple[PromptEntry, ...]:
        """Entries of one dimension."""
        return tuple(entry for entry in self.entries if dimension in entry.dimensions)

    @classmethod
    def of_any_prompts(cls, prompts: Iterable[str]) -> PromptSuite:
        """Any prompts, for the dimensions that ask nothing of them."""
        names = tuple(name for name, dimension in DIMENSIONS.items() if dimension.any_prompt or name == FLICKERING)
        return cls(
            "prompts of the videos", tuple(PromptEntry(prompt, names) for prompt in dict.fromkeys(prompts)), None
        )


def load_suite(path: str | Path) -> PromptSuite:
    """Read a file of the form of ``VBench_full_info.json``.

    Raises:
        ConfigError: not there, or another form; the message names the entry.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable prompt suite ({error}).") from error
    if not isinstance(data, list) or not data:
        raise ConfigError(f"{path}: a prompt suite is a list of entries, got {type(data).__name__}.")
    entries = []
    for number, entry in enumerate(data):
        try:
            dimensions = entry["dimension"]
            unknown = [name for name in dimensions if name not in DIMENSIONS]
            if not isinstance(entry["prompt_en"], str) or not isinstance(dimensions, list) or unknown:
                raise ValueError(f"prompt_en must be text and dimension a list of VBench's names, got {entry!r:.120}")
            entries.append(PromptEntry(entry["prompt_en"], tuple(dimensions), entry.get("auxiliary_info") or {}))
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"{path}: entry {number} is not one of a prompt suite ({error}).") from error
    canonical = json.dumps(data, sort_keys=True, ensure_ascii=False).encode()
    return PromptSuite(path.name, tuple(entries), hashlib.sha256(canonical).hexdigest())


def find_suite(environments: Iterable[Path] = ()) -> Path:
    """``VBench_full_info.json`` of the installed package, else of one in the site-packages of ``environments``.

    Raises:
        ConfigError: vbench is nowhere; the message says how to get the file.
    """
    folders = []
    spec = importlib.util.find_spec("vbench")
    if spec is not None and spec.submodule_search_locations:
        folders += [Path(place) for place in spec.submodule_search_locations]
    for environment in environments:
        folders += sorted(environment.glob("lib/python3.*/site-packages/vbench"))
    for folder in folders:
        if (folder / SUITE_FILE).is_file():
            return folder / SUITE_FILE
    raise ConfigError(
        f"VBench's prompts are in its package ({SUITE_FILE}, 228 kB), which is not installed. `pip install --no-deps "
        "vbench==0.1.5` (0.4 MB, changes no other package) brings them; or give the file with --suite FILE, or "
        "--any-prompts to take the videos' own."
    )


def video_name(prompt: str, index: int) -> str:
    """``{prompt}-{index}.mp4``, the prompt verbatim.

    Raises:
        ConfigError: a prompt that cannot be a file's name.
    """
    name = f"{prompt}-{index}.mp4"
    if "/" in prompt or "\0" in prompt or len(name.encode()) > 255:
        raise ConfigError(
            f"{prompt!r:.80}: cannot be the name of a video (255 bytes at most, no '/'). Give --any-prompts."
        )
    return name


def samples_of(dimension: str, static_filter: str) -> int:
    """Videos that each prompt of a dimension must have; ``static_filter`` as in :func:`~.runner.evaluate_videos`."""
    return FLICKERING_SAMPLES if dimension == FLICKERING and static_filter == "run" else SAMPLES


def missing_videos(
    suite: PromptSuite,
    dimensions: Sequence[Dimension],
    present: Iterable[tuple[str, int]],
    static_filter: str,
) -> dict[str, list[str]]:
    """What is not there.

    Args:
        suite: prompts.
        dimensions: to be evaluated.
        present: (prompt, index) of every video.
        static_filter: "run": temporal_flickering needs 25 of each prompt; "done": what is left of them, at least one
            of any prompt; "skip": 5.

    Returns:
        {dimension: names of its missing videos}, without dimensions that have all.
    """
    have = set(present)
    found: dict[str, list[str]] = {}
    for dimension in dimensions:
        entries = suite.of(dimension.name)
        wanted = [(e.prompt, i) for e in entries for i in range(samples_of(dimension.name, static_filter))]
        if dimension.name == FLICKERING and static_filter == "done" and have & set(wanted):
            continue
        missing = [video_name(*one) for one in wanted if one not in have]
        if missing or not entries:
            found[dimension.name] = missing
    return found
