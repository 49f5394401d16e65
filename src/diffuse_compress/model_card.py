"""README.md of a compressed pipeline or model: metadata the Hub reads, how to load it, and the report.

An existing card keeps its text and every metadata field it has; ours goes between two marks, where the next save finds
it again. No path of this machine and no prompt is ever written.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from diffuse_compress.components import is_pipeline, model_components
from diffuse_compress.integrations.compat import INSTALL_COMMAND
from diffuse_compress.integrations.component import get_state
from diffuse_compress.integrations.origin import base_model_of, folder_of
from diffuse_compress.pipelines.shim import stock_class_of
from diffuse_compress.report import report_of
from diffuse_compress.report_text import render_markdown

__all__ = ["FILE_NAME", "is_ours", "model_card"]

FILE_NAME = "README.md"
_BEGIN, _END = "<!-- diffuse_compress: begin -->", "<!-- diffuse_compress: end -->"
_UNKNOWN_REPO = "PATH_OR_REPO"
_HOME = "https://github.com/diffuse-compress/diffuse-compress"


def model_card(
    obj: Any,
    *,
    existing: str | None = None,
    repo_id: str | None = None,
    token: str | bool | None = None,
    needs_package: bool = True,
) -> str:
    """Text of the card of a compressed object.

    Args:
        obj: pipeline or model with at least one compressed component.
        existing: text of the card that is there already, or on the Hub.
        repo_id: Hub id it is pushed to. The base model's card is fetched for its licence then; for a save on disk
            only one that is there already is read.
        token: for the base model's card.
        needs_package: False for a checkpoint in a format that the libraries load by themselves.
    """
    card = _card(_without_form(existing or ""))
    bases = _base_models(obj)
    base = _card_of_base(obj, bases, online=repo_id is not None, token=token)
    for key, value in _metadata(obj, bases, base).items():
        if key == "tags":
            card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *value]))
        elif not getattr(card.data, key, None):
            setattr(card.data, key, value)
    if bases and card.data.base_model in (bases, bases[0]):
        card.data.base_model_relation = "quantized"
    card.text = _merged(card.text, _section(obj, bases, repo_id, needs_package), _title(obj, bases, repo_id))
    return str(card)


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


def _merged(text: str, section: str, title: str) -> str:
    block = f"{_BEGIN}\n{section.strip()}\n{_END}"
    found = re.search(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", text, re.DOTALL)
    if found:
        return text[: found.start()] + block + text[found.end() :]
    return f"{text.rstrip()}\n\n{block}\n" if text.strip() else f"\n# {title}\n\n{block}\n"


def _title(obj: Any, bases: list[str], repo_id: str | None) -> str:
    if repo_id is not None:
        return repo_id.rpartition("/")[2]
    return f"{bases[0].rpartition('/')[2]}, compressed" if bases else f"{_class_of(obj).__name__}, compressed"


def _section(obj: Any, bases: list[str], repo_id: str | None, needs_package: bool) -> str:
    report = report_of(obj).to_dict()
    origin = " and ".join(f"[{base}](https://huggingface.co/{base})" for base in bases)
    origin = f" of {origin}" if origin else ""
    versions: dict[str, str] = {}
    for part in report["components"].values():
        versions.update(part["volatile"].get("versions", {}))
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    # Prompts of a preview are the user's own.
    tables = render_markdown({**report, "preview": [], "hint": ""})
    blocks = [
        "## Compression",
        f"`{_class_of(obj).__name__}`{origin}, compressed with [diffuse_compress]({_HOME}).",
        _load_snippet(obj, repo_id or _UNKNOWN_REPO, needs_package),
        tables,
    ]
    return "\n\n".join(blocks) + (f"\nMade with {made}.\n" if made else "")


def _load_snippet(obj: Any, where: str, needs_package: bool) -> str:
    if is_pipeline(obj):
        library, cls = "diffusers", "DiffusionPipeline"
        if stock_class_of(obj) is None:
            cls = _class_of(obj).__name__
    else:
        library, cls = type(obj).__module__.partition(".")[0], type(obj).__name__
    name = "pipe" if is_pipeline(obj) else "model"
    lines = [
        "```bash",
        INSTALL_COMMAND if needs_package else f"pip install {library} torchao",
        "```",
        "",
        "```python",
        *(["import diffuse_compress"] if needs_package else []),
        f"from {library} import {cls}",
        "",
        f'{name} = {cls}.from_pretrained("{where}")',
        "```",
    ]
    if needs_package and stock_class_of(obj) is not None:
        lines += [
            "",
            "Or, with the package installed and no import of it in your code: "
            f'`DiffusionPipeline.from_pretrained("{where}", custom_pipeline="pipeline", trust_remote_code=True)`.',
        ]
    return "\n".join(lines)


# --- metadata ---------------------------------------------------------------------------------------------------


def _metadata(obj: Any, bases: list[str], base: dict[str, Any] | None) -> dict[str, Any]:
    specs = [state.config.spec for state in map(get_state, model_components(obj).values()) if state is not None]
    labels = [spec.preset or spec.scheme.name for spec in specs]
    library = "diffusers" if is_pipeline(obj) else type(obj).__module__.partition(".")[0]
    data: dict[str, Any] = {
        "library_name": library,
        "tags": ["diffuse_compress", "quantized", *dict.fromkeys(labels)],
    }
    if bases:
        data["base_model"] = bases[0] if len(bases) == 1 else bases
    data |= _licence(base, bases)
    tag = (base or {}).get("pipeline_tag") or _pipeline_tag(obj)
    if tag:
        data["pipeline_tag"] = tag
    return data


def _base_models(obj: Any) -> list[str]:
    models = ((model, get_state(model)) for model in model_components(obj).values())
    found = (base_model_of(model, state) for model, state in models if state is not None)
    return list(dict.fromkeys(base for base in found if base is not None))


def _card_of_base(obj: Any, bases: list[str], *, online: bool, token: str | bool | None) -> dict[str, Any] | None:
    """Metadata of the dense model's card: beside the folder it was loaded from, in the cache, or on the Hub."""
    from huggingface_hub import hf_hub_download

    folder = folder_of(obj)
    candidates = [folder / FILE_NAME] if folder is not None else []
    for base in bases[:1]:
        try:
            candidates.append(Path(hf_hub_download(base, FILE_NAME, token=token, local_files_only=not online)))
        except Exception:
            continue
    for path in candidates:
        if path.is_file():
            data: dict[str, Any] = _card(path.read_text(encoding="utf-8")).data.to_dict()
            if data:
                return data
    return None


def _licence(base: dict[str, Any] | None, bases: list[str]) -> dict[str, str]:
    """licence fields of the base model's card; none where it is not known, for it is not ours to guess."""
    fields = {key: (base or {}).get(key) for key in ("license", "license_name", "license_link")}
    found = {key: str(value) for key, value in fields.items() if value}
    link = found.get("license_link")
    if link and "://" not in link and bases:  # a file of the base repository
        found["license_link"] = f"https://huggingface.co/{bases[0]}/blob/main/{link.removeprefix('./')}"
    return found


def _pipeline_tag(obj: Any) -> str | None:
    """What it makes of what, told from the arguments of the pipeline's call; None if they don't tell."""
    if not is_pipeline(obj):
        generates = callable(getattr(obj, "can_generate", None)) and obj.can_generate()
        return "text-generation" if generates and not hasattr(obj.config, "vision_config") else None
    arguments = inspect.signature(type(obj).__call__).parameters
    if any(name.startswith("audio_") for name in arguments):
        return "text-to-audio"
    source = "image" if "image" in arguments and arguments["image"].kind is not inspect.Parameter.VAR_KEYWORD else ""
    source = source or ("text" if "prompt" in arguments else "")
    target = "video" if "num_frames" in arguments else "image"
    if not source:
        return "unconditional-image-generation" if target == "image" else None
    return f"{source}-to-{target}"


def _class_of(obj: Any) -> type:
    return stock_class_of(obj) or type(obj)
