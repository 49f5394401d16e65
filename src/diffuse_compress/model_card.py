"""README.md of a compressed pipeline or model: metadata the Hub reads, how to load it, and the report.

An existing card keeps its text and every metadata field it has; ours goes between two marks, where the next save finds
it again. No path of this machine and no prompt is ever written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.card_results import SOURCE, card_results, foreign_results, results_text
from diffuse_compress.components import GROUPS, generates_text, is_pipeline, model_components
from diffuse_compress.integrations.compat import INSTALL_COMMAND
from diffuse_compress.integrations.component import get_state
from diffuse_compress.integrations.doors import library_of
from diffuse_compress.integrations.origin import base_model_of, folder_of, repository_of
from diffuse_compress.pipeline_call import named_arguments
from diffuse_compress.pipelines.shim import stock_class_of
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.report import report_of
from diffuse_compress.report_text import render_markdown

__all__ = ["FILE_NAME", "is_ours", "model_card", "says_nothing", "without_section"]

FILE_NAME = "README.md"
_BEGIN, _END = "<!-- diffuse_compress: begin -->", "<!-- diffuse_compress: end -->"
# One section: a mark that lost its counterpart does not reach into the text around it.
_SECTION = re.compile(f"{re.escape(_BEGIN)}(?:(?!{re.escape(_BEGIN)}).)*?{re.escape(_END)}", re.DOTALL)
# With the title that a card without text was given.
_TITLED_SECTION = re.compile(rf"(?:^# [^\n]*, compressed\n+)?{_SECTION.pattern}", re.DOTALL | re.MULTILINE)
# Names that schemes have, which are tags too.
_LABEL = re.compile(r"w\d+a\d+|fp8(-tensor|-block)?(-static)?(-weight-only)?")
# Fields that are read off the model: a card of nothing else tells nothing.
_DERIVED = {"base_model", "library_name", "pipeline_tag"}
_UNKNOWN_REPO = "PATH_OR_REPO"
_OUR_TAGS = ("diffuse_compress", "quantized")


def model_card(
    obj: Any,
    *,
    existing: str | None = None,
    repo_id: str | None = None,
    token: str | bool | None = None,
    reader: str | None = None,
    variant: str | None = None,
) -> str:
    """Text of the card of a compressed object.

    Args:
        obj: pipeline or model with at least one compressed component.
        existing: text of the card that is there already, or on the Hub.
        repo_id: Hub id it is pushed to. The base model's card is fetched for its licence then; for a save on disk
            only one that is there already is read.
        token: for the base model's card.
        reader: what the libraries need to load it, where it is in a format that they read without this package.
        variant: that of the weight files, which the load snippet must name.
    """
    card = _card(_without_form((existing or "").replace("\r\n", "\n")))
    bases = _base_models(obj)
    for key, value in _metadata(obj, bases, online=repo_id is not None, token=token).items():
        if key == "tags":
            card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *value]))
        elif not getattr(card.data, key, None):
            setattr(card.data, key, value)
    if bases and card.data.base_model in (bases, bases[0]):
        card.data.base_model_relation = "quantized"
    title = _title(obj, bases, repo_id)
    results = card_results(obj, card.data.eval_results)
    _set_results(card.data, results, title)
    card.text = _merged(card.text, _section(obj, bases, repo_id, reader, variant, results_text(results)), title)
    return str(card)


def without_section(text: str) -> str:
    """A card of a compressed model as that of the dense one which takes its place."""
    card = _card(text)
    card.text = _TITLED_SECTION.sub("", card.text)
    ours = {*_OUR_TAGS, *PRESETS}
    card.data.tags = [tag for tag in card.data.tags or () if tag not in ours and not _LABEL.fullmatch(tag)] or None
    if getattr(card.data, "base_model_relation", None) == "quantized":
        card.data.base_model_relation = None
    _set_results(card.data, foreign_results(card.data.eval_results), card.data.model_name)
    return str(card)


def says_nothing(text: str) -> bool:
    """True for a card without a word in it, and with no field but what is read off the model."""
    card = _card(text)
    return not card.text.strip() and card.data.to_dict().keys() <= _DERIVED


def is_ours(text: str) -> bool:
    """True for the text of a card that has our section."""
    return _BEGIN in text


# --- text -------------------------------------------------------------------------------------------------------


def _card(text: str) -> Any:
    from huggingface_hub import ModelCard

    # Without metadata it would log a warning that is meant for authors.
    return ModelCard(text if text.lstrip().startswith("---") else f"---\n\n---\n{text}", ignore_metadata_errors=True)


def _without_form(text: str) -> str:
    """``text``, or only its metadata where the rest is the form to fill in that both libraries push."""
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.utils import is_jinja_available

    description = re.search(r"^This is the model card of a .* automatically generated\.$", text, re.MULTILINE)
    if description is None or not is_jinja_available():
        return text
    form = ModelCard.from_template(ModelCardData(), model_description=description[0])
    card = _card(text)
    if card.text.strip() == form.text.strip():  # filled in at any place, it is the user's
        card.text = ""
    return str(card)


def _set_results(data: Any, results: list[Any], name: str | None) -> None:
    """The model-index; a card without results has none, and no name in it."""
    data.model_name = (data.model_name or name) if results else None
    data.eval_results = results or None


def _merged(text: str, section: str, title: str) -> str:
    block = f"{_BEGIN}\n{section.strip()}\n{_END}"
    found = _SECTION.search(text)
    if found:
        return text[: found.start()] + block + text[found.end() :]
    return f"{text.rstrip()}\n\n{block}\n" if text.strip() else f"\n# {title}\n\n{block}\n"


def _title(obj: Any, bases: list[str], repo_id: str | None) -> str:
    if repo_id is not None:
        return repo_id.rpartition("/")[2]
    return f"{bases[0].rpartition('/')[2]}, compressed" if bases else f"{_class_of(obj).__name__}, compressed"


def _section(
    obj: Any, bases: list[str], repo_id: str | None, reader: str | None, variant: str | None, results: str
) -> str:
    report = report_of(obj).to_dict()
    origin = " and ".join(f"[{base}](https://huggingface.co/{base})" for base in bases)
    origin = f" of {origin}" if origin else ""
    versions: dict[str, str] = {}
    for part in report["components"].values():
        versions.update(part["volatile"].get("versions", {}))
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    if reader:  # how our layers compute says nothing about it
        report["components"] = {name: {**part, "compute": []} for name, part in report["components"].items()}
    # Prompts of a preview are the user's own.
    tables = render_markdown({**report, "preview": [], "hint": ""})
    blocks = [
        "## Compression",
        f"`{_class_of(obj).__name__}`{origin}, compressed with [diffuse_compress]({SOURCE}).",
        _load_snippet(obj, repo_id or _UNKNOWN_REPO, reader, variant),
        f"{tables}\nMade with {made}.\n" if made else tables,
        results,
    ]
    return "\n\n".join(filter(None, blocks))


def _load_snippet(obj: Any, where: str, reader: str | None, variant: str | None) -> str:
    is_modular = is_pipeline(obj) and stock_class_of(obj) is None and hasattr(obj, "load_components")
    if is_modular:
        library, cls, name = "diffusers", "ModularPipeline", "pipe"
    elif is_pipeline(obj):
        library, cls, name = "diffusers", "DiffusionPipeline", "pipe"
    else:
        library, name = library_of(obj), "model"
        cls = next(base.__name__ for base in type(obj).__mro__ if base.__module__.partition(".")[0] == library)
    # What stays dense would be float32 in diffusers, and what torchao holds is not.
    dtype = f", dtype={_dtype_of(obj)}" if reader and library == "diffusers" else ""
    rest = f', variant="{variant}"' if variant else ""
    lines = [
        "```bash",
        f"pip install {library} {reader}" if reader else INSTALL_COMMAND,
        "```",
        "",
        "```python",
        *(["import torch"] if dtype else []),
        *([] if reader else ["import diffuse_compress"]),
        f"from {library} import {cls}",
        "",
        f'{name} = {cls}.from_pretrained("{where}"{rest}{dtype})',
        *(["pipe.load_components()"] if is_modular else []),
        "```",
    ]
    if type(obj) is not _class_of(obj):
        lines += ["", f"Its own class is `{type(obj).__name__}`, which this needs beside it."]
    if not reader and stock_class_of(obj) is not None:
        lines += [
            "",
            "Or, with the package installed and no import of it in your code: "
            f'`DiffusionPipeline.from_pretrained("{where}"{rest}, custom_pipeline="pipeline", '
            "trust_remote_code=True)`.",
        ]
    return "\n".join(lines)


def _dtype_of(obj: Any) -> torch.dtype:
    states = [state for state in map(get_state, model_components(obj).values()) if state is not None]
    return next((state.config.compute_dtype for state in states if state.config.compute_dtype), torch.float32)


# --- metadata ---------------------------------------------------------------------------------------------------


def _metadata(obj: Any, bases: list[str], *, online: bool, token: str | bool | None) -> dict[str, Any]:
    specs = [state.config.spec for state in map(get_state, model_components(obj).values()) if state is not None]
    labels = [spec.label for spec in specs]
    data: dict[str, Any] = {
        "library_name": "diffusers" if is_pipeline(obj) else library_of(obj),
        "tags": [*_OUR_TAGS, *dict.fromkeys(labels)],
    }
    if bases:
        data["base_model"] = bases[0] if len(bases) == 1 else bases
    cards = _cards_of_bases(obj, bases, online, token)
    data |= _licence(cards)
    # A part's card tells what the part was for.
    own = next(iter(cards.values()), None) or {}
    tag = _pipeline_tag(obj) or (own.get("pipeline_tag") if not is_pipeline(obj) and len(bases) == 1 else None)
    if tag:
        data["pipeline_tag"] = tag
    return data


def _base_models(obj: Any) -> list[str]:
    """Repositories of the dense models, the denoisers' first; those of a pipeline's dense components too."""
    models = model_components(obj)
    states = {name: get_state(model) for name, model in models.items()}
    compressed = {name: state for name, state in states.items() if state is not None}
    bases = {name: base_model_of(models[name], state) for name, state in compressed.items()}
    # A compressed checkpoint is no base: what is dense in it came from where the rest came from.
    checkpoints = {repository_of(models[name]) for name, base in bases.items() if repository_of(models[name]) != base}
    for name, model in models.items():
        if name not in compressed and repository_of(model) not in checkpoints:
            bases[name] = repository_of(model)
    ordered = sorted(bases, key=lambda name: not GROUPS["denoisers"].match(name))
    return list(dict.fromkeys(base for base in (bases[name] for name in ordered) if base is not None))


def _cards_of_bases(obj: Any, bases: list[str], online: bool, token: str | bool | None) -> dict[str, Any]:
    """{repository: metadata of its card, or None}; a folder that a model was loaded from is called ""."""
    from huggingface_hub import hf_hub_download

    cards: dict[str, Any] = {}
    for base in bases:
        try:
            path = Path(hf_hub_download(base, FILE_NAME, token=token, local_files_only=not online))
            cards[base] = _read_card(path, base)
        except Exception:  # no network, no such repository or card, no access
            cards[base] = None
    folder = folder_of(obj)
    if not bases and folder is not None:
        cards[""] = _read_card(folder / FILE_NAME, "")
    return cards


def _read_card(path: Path, base: str) -> dict[str, Any] | None:
    """Metadata of a card, links made absolute; None if there is none that can be read."""
    try:
        data: dict[str, Any] = _card(path.read_text(encoding="utf-8")).data.to_dict()
    except Exception:  # absent, or whatever else a stranger's file may be
        return None
    link = data.get("license_link")
    if isinstance(link, str) and "://" not in link:  # a file of that repository
        data["license_link"] = f"https://huggingface.co/{base}/blob/main/{link.removeprefix('./')}" if base else None
    return data


def _licence(cards: dict[str, Any]) -> dict[str, Any]:
    """licence fields that all base models agree on; none where one is not known, for it is not ours to guess."""
    keys = ("license", "license_name", "license_link")
    found = [{key: (card or {}).get(key) for key in keys} for card in cards.values()]
    if not found or any(fields != found[0] for fields in found):
        return {}
    return {key: value for key, value in found[0].items() if value}


def _pipeline_tag(obj: Any) -> str | None:
    """What it makes of what, told from the arguments of the pipeline's call; None if they don't tell."""
    if not is_pipeline(obj):
        return "text-generation" if generates_text(obj) and not hasattr(obj.config, "vision_config") else None
    arguments = named_arguments(obj)
    if any(name.startswith("audio_") for name in arguments):
        return "text-to-audio"
    source = "image" if "image" in arguments else "text" if "prompt" in arguments else ""
    target = "video" if "num_frames" in arguments else "image"
    if not source:
        return "unconditional-image-generation" if target == "image" else None
    return f"{source}-to-{target}"


def _class_of(obj: Any) -> type:
    """The library's class that ``obj`` is, or comes from."""
    stock = stock_class_of(obj)
    if stock is not None:
        return stock
    libraries = ("diffusers", "transformers")
    return next((base for base in type(obj).__mro__ if base.__module__.partition(".")[0] in libraries), type(obj))
