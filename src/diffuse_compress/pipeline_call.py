"""Calling a diffusers pipeline without knowing it, and leaving no trace of the call."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import GROUPS, model_components

__all__ = [
    "CannotCallError",
    "accepted_arguments",
    "bundled_items",
    "cheap_arguments",
    "from_noise",
    "named_arguments",
    "outputs_of",
    "picture_of",
    "prompt_arguments",
    "seeded",
    "small_output",
    "untouched",
]

MAX_PIXELS = {"cpu": 256 * 256}
"""Area of the pictures of a probe run; other devices get ``MAX_PIXELS_ACCELERATOR``."""
MAX_PIXELS_ACCELERATOR = 512 * 512
MAX_FRAMES = 9
_SIZE_MULTIPLE = 32
_SUPPLIED = {"prompt", "class_labels", "generator", "num_inference_steps", "output_type", "batch_size"}


class CannotCallError(Exception):
    """The pipeline needs arguments that cannot be made up; the message names them."""


def bundled_prompts(name: str = "general") -> list[str]:
    """Prompts that come with the package: "general", or "motion" for videos."""
    text = resources.files("diffuse_compress").joinpath("prompts").joinpath(f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def bundled_items(pipe: Any, count: int) -> list[Any]:
    """``count`` things to ask ``pipe`` for, as far apart as this package knows: prompts, class labels, or nothing.

    Raises:
        CannotCallError: an argument is required that this function does not know.
    """
    known = _parameters(pipe)
    _require_known(pipe, known)
    if "prompt" in known:
        prompts = bundled_prompts("motion" if "num_frames" in known else "general")
        return [prompts[number * len(prompts) // count] for number in range(min(count, len(prompts)))]
    if "class_labels" in known:
        classes = getattr(_denoiser_config(pipe), "num_embeds_ada_norm", None) or 1000
        return [number * classes // count for number in range(count)]
    return [{"batch_size": 1} if "batch_size" in known else {} for _ in range(count)]


def cheap_arguments(pipe: Any, steps: int, seed: int, *, decode: bool) -> dict[str, Any]:
    """Arguments of the cheapest call that runs the whole denoising loop of ``pipe``.

    Args:
        pipe: any diffusers pipeline.
        steps: number of denoising steps.
        seed: of the call's own generator.
        decode: let the VAE run too.

    Raises:
        CannotCallError: an argument is required that this function does not know.
    """
    known = _parameters(pipe)
    _require_known(pipe, known)
    choices: dict[str, Any] = {
        "prompt": bundled_prompts()[0],
        "class_labels": [0],
        "num_inference_steps": steps,
        "use_resolution_binning": False,
        "clean_caption": False,
        "generator": seeded(seed),
    }
    if "prompt" not in known and "class_labels" not in known:
        choices["batch_size"] = 1
    if not decode:
        choices["output_type"] = "latent"
    return {name: value for name, value in choices.items() if name in known} | small_output(pipe)


def small_output(pipe: Any) -> dict[str, int]:
    """height, width and num_frames of a picture or clip that this device makes in little time; {} to leave them."""
    known = _parameters(pipe)
    frames = known.get("num_frames")
    fewer = {"num_frames": MAX_FRAMES} if isinstance(frames, int) and frames > MAX_FRAMES else {}
    return {**fewer, **_reduced_size(pipe, known)}


def accepted_arguments(pipe: Any) -> set[str] | None:
    """Names of the arguments that a call of ``pipe`` takes; None if it takes any."""
    if getattr(getattr(pipe, "blocks", None), "inputs", None) is None:
        parameters = inspect.signature(type(pipe).__call__).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return None
    return set(_parameters(pipe))


def named_arguments(pipe: Any) -> set[str]:
    """Names that a call of ``pipe`` lists, whatever else it may swallow."""
    return set(_parameters(pipe))


def prompt_arguments(pipe: Any, prompt: str | list[str]) -> dict[str, Any]:
    """Arguments that generate a picture for ``prompt`` in the pipeline's default size and number of steps."""
    arguments: dict[str, Any] = {"prompt": prompt}
    if "use_resolution_binning" in _parameters(pipe):
        # At the default size binning changes nothing, but pipelines of small models refuse to start with it.
        arguments["use_resolution_binning"] = False
    return arguments


def from_noise(pipe: Any, arguments: Mapping[str, Any], seed: int, *, decode: bool = False) -> dict[str, Any]:
    """``arguments`` of a call of ``pipe``, where they do not say it with its noise, and without decoding its output.

    Args:
        pipe: a diffusers pipeline.
        arguments: are not changed.
        seed: of the noise.
        decode: leave the form of the output to the pipeline.
    """
    accepted = accepted_arguments(pipe)
    own: dict[str, Any] = {"generator": seeded(seed), **({} if decode else {"output_type": "latent"})}
    given = {**{name: value for name, value in own.items() if accepted is None or name in accepted}, **arguments}
    # The caller's own generator would give other noise to the next call of the same arguments.
    return {**given, **({"generator": _copied(given["generator"])} if "generator" in given else {})}


def _copied(generator: Any) -> Any:
    if isinstance(generator, list | tuple):
        return [_copied(one) for one in generator]
    if not isinstance(generator, torch.Generator):
        return generator
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied


def seeded(seed: int) -> torch.Generator:
    """A CPU generator: pipelines draw from it on every device alike."""
    return torch.Generator("cpu").manual_seed(seed)


@contextlib.contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """Inside, ``pipe`` may be called: it is in eval mode, silent, and runs on copies of its schedulers.

    Afterwards its attributes, schedulers, training flags and the libraries' verbosity are as they were.
    """
    attributes = dict(vars(pipe))
    models = model_components(pipe)
    training = [(module, module.training) for model in models.values() for module in model.modules()]
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, pipe, attributes, training)
        for name, part in pipe.components.items():
            if name in attributes and hasattr(part, "set_timesteps"):
                vars(pipe)[name] = copy.deepcopy(part)
        vars(pipe)["_progress_bar_config"] = {**(attributes.get("_progress_bar_config") or {}), "disable": True}
        for model in models.values():
            model.eval()
        for library in ("diffusers", "transformers"):
            stack.enter_context(_quiet(library))
        if "torch._dynamo" in sys.modules:
            # Hooks must see every call, and a probe is not worth a compilation.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield


def picture_of(output: Any) -> Any:
    """The first picture of a pipeline's output as a PIL image, of a video its middle frame; None if it has none."""
    found = outputs_of(output)
    if found is None or len(found) == 0:
        return None
    first = found[0]
    if isinstance(first, list | tuple) or getattr(first, "ndim", 0) == 4:
        first = first[len(first) // 2]
    return first if hasattr(first, "convert") else _from_array(first)


def outputs_of(output: Any) -> Any:
    """All pictures or clips of a pipeline's output, in whatever form it gives them; None if it has none."""
    values = getattr(output, "values", None)
    source = values if isinstance(values, dict) else vars(output) if hasattr(output, "__dict__") else {}
    found = next((source[name] for name in ("images", "frames", "videos") if source.get(name) is not None), None)
    return output[0] if found is None and isinstance(output, tuple | list) else found


def _from_array(array: Any) -> Any:
    import numpy as np
    from PIL import Image

    values = array.detach().float().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    if values.ndim != 3:
        return None
    if values.shape[0] in (1, 3) and values.shape[-1] not in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.dtype != np.uint8:
        values = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values)


def _parameters(pipe: Any) -> dict[str, Any]:
    """{argument: default} of a call; a modular pipeline names its own in its blocks."""
    inputs = getattr(getattr(pipe, "blocks", None), "inputs", None)
    if inputs is not None:
        empty = inspect.Parameter.empty
        return {item.name: empty if item.required else item.default for item in inputs if item.name}
    parameters = inspect.signature(type(pipe).__call__).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
    return {parameter.name: parameter.default for parameter in named}


def _require_known(pipe: Any, known: Mapping[str, Any]) -> None:
    missing = [
        name
        for name, default in known.items()
        if default is inspect.Parameter.empty and name not in _SUPPLIED and name not in ("height", "width")
    ]
    if missing:
        raise CannotCallError(f"{type(pipe).__name__} needs {', '.join(missing)}")


def _reduced_size(pipe: Any, known: dict[str, Any]) -> dict[str, int]:
    """height and width of the default aspect ratio within the area that this device affords; {} to leave them."""
    if "height" not in known or "width" not in known:
        return {}
    size = _default_size(pipe, known)
    device = getattr(pipe, "_execution_device", None) or torch.device("cpu")
    area = MAX_PIXELS.get(device.type, MAX_PIXELS_ACCELERATOR)
    if size is None or size[0] * size[1] <= area:
        return {}
    factor = math.sqrt(area / (size[0] * size[1]))
    height, width = (max(1, round(side * factor / _SIZE_MULTIPLE)) * _SIZE_MULTIPLE for side in size)
    return {"height": height, "width": width}


def _denoiser_config(pipe: Any) -> Any:
    """Of the first denoiser; None without one."""
    denoiser = next((part for name, part in model_components(pipe).items() if GROUPS["denoisers"].match(name)), None)
    return getattr(denoiser, "config", None)


def _default_size(pipe: Any, known: dict[str, Any]) -> tuple[int, int] | None:
    if isinstance(known["height"], int) and isinstance(known["width"], int):
        return known["height"], known["width"]
    config = _denoiser_config(pipe)
    square = getattr(pipe, "default_sample_size", None) or getattr(config, "sample_size", None)
    latent = (getattr(config, "sample_height", None), getattr(config, "sample_width", None))
    if None in latent:
        latent = tuple(square) if isinstance(square, list | tuple) else (square, square)
    factor = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None)
    if not isinstance(factor, int) or len(latent) != 2 or not all(isinstance(side, int) for side in latent):
        return None
    return latent[0] * factor, latent[1] * factor  # type: ignore[operator]


def _restore(pipe: Any, attributes: dict[str, Any], training: list[tuple[nn.Module, bool]]) -> None:
    for module, flag in training:
        module.training = flag
    if hasattr(pipe, "maybe_free_model_hooks") and getattr(pipe, "_all_hooks", None):
        pipe.maybe_free_model_hooks()
        attributes["_all_hooks"] = vars(pipe).get("_all_hooks", attributes.get("_all_hooks"))
    vars(pipe).clear()
    vars(pipe).update(attributes)


@contextlib.contextmanager
def _quiet(library: str) -> Iterator[None]:
    logging = sys.modules.get(f"{library}.utils.logging")
    if logging is None:
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
