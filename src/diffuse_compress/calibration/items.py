"""What an item of calibration data means: to a pipeline arguments of its call, to a model those of its forward.

Items come as users have them: as a list or a generator gives them one by one, as rows of ``datasets.Dataset``, or as
batches of a DataLoader.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffuse_compress.calls import Call
from diffuse_compress.components import unwrap
from diffuse_compress.errors import ConfigError
from diffuse_compress.failures import failures_explained
from diffuse_compress.pipeline_call import accepted_arguments, named_arguments, prompt_arguments

__all__ = ["MAX_LENGTH", "ModelItems", "is_integer", "pipeline_arguments"]

MAX_LENGTH = 2048
# transformers' names for the tokens that pictures, clips and sounds are put in the place of.
_MEDIA_TOKENS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}
_MEDIA_PARTS = ("image", "image_url", "video", "audio")
# Columns that are turned into items of their own, where a row holds no forward arguments.
_TEXT_COLUMNS = ("text", "messages")


# --- pipelines --------------------------------------------------------------------------------------------------


def pipeline_arguments(pipe: Any, item: Any, shared: Mapping[str, Any], index: int = 0) -> dict[str, Any]:
    """Arguments of ``pipe(...)`` for an item; its own go before ``shared`` if it is a dict.

    Args:
        pipe: a diffusers pipeline.
        item: a prompt, a class label, a batch of either, or a dict of arguments, of which "text" may mean the prompt.
        shared: arguments for every item.
        index: of the item, for messages.

    Raises:
        ConfigError: an item of another kind, or arguments that the pipeline does not take.
    """
    accepted, named, where = accepted_arguments(pipe), named_arguments(pipe), type(pipe).__name__
    labels = _class_labels(item)
    if isinstance(item, str) or _is_list_of(item, str):
        if accepted is not None and "prompt" not in accepted:
            what = repr(item) if isinstance(item, str) else f"{len(item)} of them"
            raise ConfigError(f"calibration: {where} takes no prompt, got {what}. Give dicts of its arguments.")
        given = prompt_arguments(pipe, item if isinstance(item, str) else list(item))
    elif labels is not None:
        if accepted is None or "class_labels" not in accepted:
            raise ConfigError(f"calibration: {where} takes no class label, got {item}. Give prompts or dicts.")
        given = {"class_labels": labels}
    elif isinstance(item, Mapping):
        given = dict(item)
        if "text" in given and "text" not in named and "prompt" in named:
            given.setdefault("prompt", given.pop("text"))
        if "class_labels" in given:
            given["class_labels"] = _class_labels(given["class_labels"]) or given["class_labels"]
    else:
        raise ConfigError(
            f"calibration: an item for {where} is a prompt, a class label or a dict of its arguments, got a "
            f"{type(item).__name__} as item {index}."
        )
    given = {
        **given,
        **{key: value for key, value in shared.items() if key not in given or not isinstance(item, Mapping)},
    }
    unknown = [] if accepted is None else [name for name in given if name not in accepted]
    if unknown:
        raise ConfigError(
            f"calibration: {where} takes no {', '.join(unknown)}. It takes {', '.join(sorted(accepted or ()))}."
        )
    return given


def _class_labels(item: Any) -> list[int] | None:
    """Labels of one label or a batch; None for anything else."""
    if isinstance(item, torch.Tensor) and not item.is_floating_point() and item.ndim <= 1 and item.numel():
        return [int(label) for label in item.reshape(-1)]
    if _is_list_of(item, numbers.Integral):
        return [int(label) for label in item]
    return [int(item)] if is_integer(item) else None


# --- models -----------------------------------------------------------------------------------------------------


class ModelItems:
    """Items as calls of one model.

    Args:
        model: of transformers, of diffusers, or any other.
        tokenizer: for texts and chats, or a processor; None takes the one beside the model's weights.
        max_length: tokens of a text that are kept; a text with pictures is kept whole.
    """

    def __init__(self, model: Any, tokenizer: Any = None, max_length: int = MAX_LENGTH) -> None:
        self.model = unwrap(model)
        self.where = type(self.model).__name__
        self.max_length = max_length
        self._given, self._own = tokenizer, dict[str, Any]()
        self._signature = inspect.signature(self.model.forward)
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self._names = [name for name, it in self._signature.parameters.items() if it.kind not in variable]
        self._is_transformers = hasattr(self.model, "can_generate")
        # A wrapper may pass on whatever it is given.
        self._is_language = "input_ids" in self._names or (self._is_transformers and not self._names)

    def calls(self, item: Any, index: int) -> list[Call]:
        """The calls that an item stands for: one for each text, chat or list of token ids of a batch, else one.

        Args:
            item: a text, a chat (messages), token ids, a batch of them, a dict of forward arguments (a row of a
                dataset, a batch, what a processor returns), or tensors by position.
            index: of the item, for messages.

        Raises:
            ConfigError: it does not fit the model; the message says what would.
        """
        if isinstance(item, Mapping):
            return self._of_mapping(item, index)
        tensor = _as_tensor(item)
        if isinstance(item, str):
            return [self._encoded(item, index)]
        if tensor is not None and tensor.ndim and self._is_language and not tensor.is_floating_point():
            ids = tensor.unsqueeze(0) if tensor.ndim == 1 else tensor.flatten(0, -2)
            return [self._call((), {"input_ids": ids}, index)]
        if tensor is not None and not isinstance(item, Sequence) and not self._is_language:
            return [self._call((tensor,), {}, index)]
        if _is_chat(item):
            return [self._encoded(item, index)]
        if _is_list_of(item, torch.Tensor):
            return [self._call(tuple(item), {}, index)]
        if _is_list_of(item, str) or (_is_list_of(item, Sequence) and all(map(_is_chat_or_ids, item))):
            return [call for part in item for call in self.calls(part, index)]
        if self._is_language:
            kinds = "a text, chat messages, token ids or a dict of forward arguments"
        else:
            kinds = "a dict of forward arguments"
        raise ConfigError(
            f"calibration: an item for {self.where} is {kinds}, got a {type(item).__name__} as item {index}."
        )

    def _of_mapping(self, item: Mapping[str, Any], index: int) -> list[Call]:
        # Rows of datasets have lists for tensors. Beside tensors a list is meant as it is: QwenImage's img_shapes.
        as_is = not self._is_transformers and any(isinstance(value, torch.Tensor) for value in item.values())
        found = {
            key: None if as_is and isinstance(value, list | tuple) else _as_tensor(value) for key, value in item.items()
        }
        values = {key: value if found[key] is None else found[key] for key, value in item.items()}
        taken = [key for key in self._names if found.get(key) is not None and key != "labels"]
        if not taken and self._is_language:
            text = next((item[key] for key in _TEXT_COLUMNS if key in item), None)
            if text is not None:
                return self.calls(text, index)
        if not any(tensor is not None for tensor in found.values()):
            raise ConfigError(
                f"calibration: a dict for {self.where} holds the tensors of its forward, got {sorted(item)} without "
                "any. Of a dataset, give the prepared columns (input_ids, ...) or its texts."
            )
        if self._is_language:
            values = self._in_batches(values)
        return [self._call((), self._without_extras(values, index), index)]

    def _in_batches(self, values: dict[str, Any]) -> dict[str, Any]:
        """``values`` with a leading axis for the columns of one sequence, as rows of datasets have them."""
        ids = values.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 1:
            return values
        columns = {key for key, value in values.items() if isinstance(value, torch.Tensor) and value.shape == ids.shape}
        return {key: value.unsqueeze(0) if key in columns else value for key, value in values.items()}

    def _without_extras(self, values: dict[str, Any], index: int) -> dict[str, Any]:
        """What of ``values`` the forward names; what else a row holds about its tokens or in words is left out.

        Raises:
            ConfigError: for other tensors and objects, pictures for a language model above all.
        """
        # Other libraries' forwards raise for what they do not know, transformers' take no notice of it.
        if not self._is_transformers or not self._names:
            return values
        ids = values.get("input_ids")
        extra = {key: value for key, value in values.items() if key not in self._names and value is not None}
        about_tokens = {
            key
            for key, value in extra.items()
            if isinstance(value, torch.Tensor) and isinstance(ids, torch.Tensor) and value.shape == ids.shape
        }
        unused = [key for key in extra if key not in about_tokens and not _is_words(extra[key])]
        if unused:
            raise ConfigError(
                f"calibration: {self.where} takes no {', '.join(unused)}, which item {index} holds. It takes "
                f"{', '.join(self._names)}. Leave it out, or record the model that it is for."
            )
        return {key: value for key, value in values.items() if key in self._names and value is not None}

    def _call(self, args: tuple[Any, ...], values: dict[str, Any], index: int) -> Call:
        kwargs = dict(values)
        if self._is_transformers:
            decoder = getattr(self.model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in kwargs
            if not decoder:  # which makes its decoder's inputs of them
                kwargs.pop("labels", None)
            if self.model.can_generate():
                kwargs = {"use_cache": False, **kwargs}
            self._require_media(kwargs, index)
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(
                f"calibration: item {index} does not fit the forward of {self.where}: {error}. It takes "
                f"{', '.join(self._names)}."
            ) from error
        call = Call(args, kwargs)
        ids = kwargs.get("input_ids")
        looked_at = [ids] if isinstance(ids, torch.Tensor) else call.tensors()
        if looked_at and not any(tensor.numel() for tensor in looked_at):
            what = "no tokens" if looked_at[0] is ids else "tensors without values"
            raise ConfigError(f"calibration: item {index} is empty, it holds {what}. Leave it out.")
        return call

    def _require_media(self, values: Mapping[str, Any], index: int) -> None:
        """Raise ConfigError if the text has tokens for pictures and there are none: noise would be calibrated on."""
        ids = values.get("input_ids")
        holds_media = any(isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim > 2 for v in values.values())
        holds_media = holds_media or any(key.startswith(("pixel_values", "input_features")) for key in values)
        if holds_media or not isinstance(ids, torch.Tensor):
            return
        for medium, names in _MEDIA_TOKENS.items():
            tokens = [value for name in names if (value := getattr(self.model.config, name, None)) is not None]
            count = int((ids == tokens[0]).sum()) if tokens else 0
            if count:
                raise ConfigError(
                    f"calibration: item {index} has {count} {medium} tokens and no pixel_values or the like. Give all "
                    "that the processor returns: processor.apply_chat_template(messages, tokenize=True, "
                    'return_dict=True, return_tensors="pt").'
                )

    # --- texts and chats ---

    def _encoded(self, item: Any, index: int) -> Call:
        if not self._is_language:
            raise ConfigError(
                f"calibration: {self.where} takes no texts, got one as item {index}. Give dicts of its forward "
                f"arguments ({', '.join(self._names)}), or record the pipeline that it belongs to."
            )
        media = not isinstance(item, str) and _holds_media(item)
        encoder = self._encoder(media=media, index=index)
        with failures_explained(f"item {index} cannot be encoded by {type(encoder).__name__}"):
            cut = {"truncation": True, "max_length": self.max_length}
            if isinstance(item, str):
                # A processor's first argument is the picture.
                found = getattr(encoder, "tokenizer", encoder)(text=item, return_tensors="pt", **cut)
            else:
                cut = {} if hasattr(encoder, "tokenizer") else cut
                found = encoder.apply_chat_template(item, tokenize=True, return_dict=True, return_tensors="pt", **cut)
        values = {key: value for key, value in dict(found).items() if value is not None}
        if not media:
            length = values["input_ids"].shape[1]
            values = {
                key: value[:, : self.max_length]
                if isinstance(value, torch.Tensor) and value.shape[1:] == (length,)
                else value
                for key, value in values.items()
            }
        return self._call((), self._without_extras(values, index), index)

    def _encoder(self, *, media: bool, index: int) -> Any:
        """The tokenizer, or where pictures are to be encoded the processor."""
        if media and not any(hasattr(self.model.config, name) for names in _MEDIA_TOKENS.values() for name in names):
            raise ConfigError(
                f"calibration: {self.where} takes texts only, got messages with pictures as item {index}."
            )
        encoder = self._given if self._given is not None else self._load("AutoProcessor" if media else "AutoTokenizer")
        if media and not hasattr(encoder, "tokenizer"):
            raise ConfigError(
                f"calibration: the messages of item {index} hold pictures, which needs the processor of {self.where}, "
                f"got {type(encoder).__name__}. Pass tokenizer=processor, or what it returns."
            )
        return encoder

    def _load(self, kind: str) -> Any:
        if kind in self._own:
            return self._own[kind]
        name = getattr(getattr(self.model, "config", None), "_name_or_path", "")
        try:
            import transformers

            self._own[kind] = getattr(transformers, kind).from_pretrained(name)
        except Exception as error:
            what = "a processor" if kind == "AutoProcessor" else "a tokenizer"
            raise ConfigError(
                f"calibration: texts need {what}, and none was found beside the weights of {self.where} "
                f"({name or 'not loaded from a folder'}: {type(error).__name__}). Pass token ids, or "
                "calibration=Calibration.record(model, texts, tokenizer=...)."
            ) from error
        return self._own[kind]


def _as_tensor(value: Any) -> torch.Tensor | None:
    """A tensor, an array or nested lists of numbers as a tensor; None for anything else, and for ragged lists."""
    if isinstance(value, torch.Tensor):
        return value
    first = value
    while isinstance(first, list | tuple) and first:
        first = first[0]
    is_array = type(value).__module__ == "numpy" and getattr(value, "ndim", 0) > 0
    if not is_array and (first is value or not isinstance(first, int | float) or isinstance(first, bool)):
        return None
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError):
        return None


def is_integer(value: Any) -> bool:
    """A whole number of Python or numpy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(part, kind) for part in value)


def _is_chat(value: Any) -> bool:
    return _is_list_of(value, Mapping) and all("role" in message for message in value)


def _is_chat_or_ids(value: Any) -> bool:
    return _is_chat(value) or (_is_list_of(value, numbers.Integral) and all(map(is_integer, value)))


def _is_words(value: Any) -> bool:
    """Text, a number, or a list of either: what datasets hold about an item, or about those of a batch."""
    if isinstance(value, torch.Tensor):
        return value.ndim < 2
    return isinstance(value, str | numbers.Number) or _is_list_of(value, str)


def _holds_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") in _MEDIA_PARTS for part in parts)
