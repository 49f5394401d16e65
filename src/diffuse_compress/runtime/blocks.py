"""The one owner of a block's forward.

Fused kernels, feature caches and temporal tables all change what happens inside of a block. Each is a
:class:`BlockOption` of one instance forward, composed from the family's branches, instead of a patch over a patch. The
forward is a bound method, so a copied, pickled or loaded block has its own. Without options the composition gives the
bits of the stock forward, and whenever it might not (another version of the class, an unknown attention processor, an
argument that the composition does not cover), the stock forward runs.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
import types
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

from torch import nn

from diffuse_compress.errors import DiffuseCompressWarning, ModelStateError
from diffuse_compress.families.base import BlockKind, Branch, Conditioning, Streams
from diffuse_compress.families.registry import FAMILIES

__all__ = ["BlockOption", "compose", "disown", "fingerprint", "own", "owned_options", "why_not_composed"]

_OWNER = "_diffuse_compress_owner"


class BlockOption:
    """Something that changes how a block's branches are computed; subclasses override what they need.

    Attributes:
        name: one option of a name on each block.
        rank: options are asked in ascending order: tables (0) set values before caches (10) skip branches, and fused
            kernels (20) compute what is left.
        fuses: layers, relative to the block, whose weights the option reads itself. It is left out of a call in which
            one of them carries an adapter (LoRA) or a hook (offloading, an observer): a fused kernel would not see it.
    """

    name = "option"
    rank = 10
    fuses: tuple[str, ...] = ()

    def prepare(self, block: nn.Module, conditioning: Conditioning) -> None:
        """Before any branch: set values that were looked up (``conditioning.preset``)."""

    def branch(
        self,
        block: nn.Module,
        branch: Branch,
        streams: Streams,
        conditioning: Conditioning,
        compute: Callable[[], Streams],
    ) -> Streams:
        """What the branch adds to the streams; ``compute()`` asks the options below and the stock layers."""
        return compute()


class _Owner:
    """Options of one block, and the forward that asks them.

    Pickles and copies without the kind, which is looked up again: it holds functions, and says of which versions of
    the class it is true.
    """

    def __init__(self, block: nn.Module, kind: BlockKind) -> None:
        self.block = block
        self.kind: BlockKind | None = kind
        self.options: list[BlockOption] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"block": self.block, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.kind, reason = _kind_of(type(self.block))
        if reason is not None:
            warnings.warn(
                f"{type(self.block).__name__} runs its stock forward, without "
                f"{', '.join(option.name for option in self.options)}: {reason}.",
                DiffuseCompressWarning,
                stacklevel=2,
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward; stock whenever the composition does not hold for this call."""
        block, kind = self.block, self.kind
        begun = None
        if kind is not None and _why_stock_now(block, kind) is None:
            begun = kind.begin(block, *args, **kwargs)
        if kind is None or begun is None:
            return type(block).forward(block, *args, **kwargs)
        options = [option for option in self.options if all(_is_bare(block, name) for name in option.fuses)]
        return compose(block, kind, options, *begun)


def compose(
    block: nn.Module, kind: BlockKind, options: list[BlockOption], streams: Streams, conditioning: Conditioning
) -> Any:
    """Run a block branch by branch, from what its kind's ``begin`` made of its arguments."""
    for option in options:
        option.prepare(block, conditioning)
    for branch in kind.branches(block):
        compute = partial(branch.compute, block, streams, conditioning)
        for option in reversed(options):
            compute = partial(option.branch, block, branch, streams, conditioning, compute)
        streams = branch.add(block, streams, compute())
    return kind.end(block, streams, conditioning)


def own(block: nn.Module, option: BlockOption) -> None:
    """Add an option to a block, and take over its forward if nobody has yet.

    Raises:
        ModelStateError: the block cannot be composed (:func:`why_not_composed`), has an option of that name, or its
            forward was replaced by somebody else.
    """
    kind, reason = _kind_now(block)
    if kind is None:
        raise ModelStateError(f"{type(block).__name__} keeps its own forward: {reason}.")
    owner: _Owner | None = block.__dict__.get(_OWNER)
    if owner is None:
        slot = _innermost(block)
        if slot is None:
            raise ModelStateError(
                f"{type(block).__name__}.forward was replaced by another library; remove that first "
                "(disable its cache or hooks), then compress."
            )
        owner = _Owner(block, kind)
        setattr(block, _OWNER, owner)
        slot(owner.forward)
    if any(present.name == option.name for present in owner.options):
        raise ModelStateError(f"{type(block).__name__} already has the option {option.name!r}; remove it first.")
    owner.options = sorted([*owner.options, option], key=lambda item: item.rank)


def disown(block: nn.Module, name: str) -> None:
    """Remove an option; with the last one the block has its stock forward again."""
    owner: _Owner | None = block.__dict__.get(_OWNER)
    if owner is None:
        return
    owner.options = [option for option in owner.options if option.name != name]
    if owner.options:
        return
    slot = _innermost(block)
    if slot is not None:
        slot(None)
    delattr(block, _OWNER)


def owned_options(block: nn.Module) -> list[BlockOption]:
    """Options of a block, in the order they are asked."""
    owner: _Owner | None = block.__dict__.get(_OWNER)
    return [] if owner is None else list(owner.options)


def why_not_composed(block: nn.Module) -> str | None:
    """Why a block runs its stock forward whatever is asked of it, or None if it can be composed."""
    return _kind_now(block)[1]


def _kind_now(block: nn.Module) -> tuple[BlockKind | None, str | None]:
    """The composition of a block as it is, or why there is none."""
    kind, reason = _kind_of(type(block))
    reason = _why_stock_now(block, kind) if kind is not None else reason
    return (None, reason) if reason is not None else (kind, None)


def _kind_of(cls: type[nn.Module]) -> tuple[BlockKind | None, str | None]:
    """The composition of a class of blocks, or why there is none."""
    kind = _kinds().get(cls.__name__)
    if kind is None or not cls.__module__.startswith(("diffusers.", "transformers.")):
        return None, f"no family describes the class {cls.__name__}"
    if fingerprint(cls, kind.replaced) not in kind.fingerprints:  # type: ignore[arg-type]
        return None, f"this version of {cls.__name__} is not the one that we know"
    return kind, None


def _why_stock_now(block: nn.Module, kind: BlockKind) -> str | None:
    """What a user can change at any time: options of the class, and attention processors."""
    return kind.unsupported(block) or _foreign_processor(block, kind)


@cache
def _kinds() -> dict[str, BlockKind]:
    return {name: kind for family in FAMILIES for name, kind in family.kinds.items()}


def _foreign_processor(block: Any, kind: BlockKind) -> str | None:
    if not kind.processors:
        return None
    for module in (block, *block.children()):
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor).__name__ not in kind.processors:
            return f"its attention runs {type(processor).__name__}"
    return None


def _is_bare(block: nn.Module, name: str) -> bool:
    """Does a layer compute what its class and weights say, and nobody wants to know when?"""
    layer = block.get_submodule(name)
    replaced = getattr(layer.forward, "__func__", None) is not type(layer).forward
    adapted = hasattr(layer, "lora_A") or hasattr(layer, "base_layer")
    return not (replaced or adapted or layer._forward_hooks or layer._forward_pre_hooks)


def _innermost(block: nn.Module) -> Callable[[Any], None] | None:
    """Setter of the place where a block's own forward stands, below the hooks of accelerate and diffusers.

    None if no such place holds it: somebody replaced it by a function of their own. Setting None restores the class's.
    """

    def plain(value: Any) -> bool:
        if not isinstance(value, types.MethodType):
            return False
        stock = value.__self__ is block and value.__func__ is type(block).forward
        return stock or value.__self__ is block.__dict__.get(_OWNER)

    def setter(owner: Any, name: str) -> Callable[[Any], None]:
        def put(value: Any) -> None:
            if value is None and owner is block and name == "forward":
                owner.__dict__.pop("forward", None)
            else:
                setattr(owner, name, value if value is not None else types.MethodType(type(block).forward, block))

        return put

    if plain(block.forward):
        return setter(block, "forward")
    if plain(block.__dict__.get("_old_forward")):
        return setter(block, "_old_forward")
    for reference in getattr(block.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        for name in ("original_forward", "forward"):
            if plain(getattr(reference, name)):
                return setter(reference, name)
    return None


@cache
def fingerprint(cls: Any, replaced: tuple[str, ...] = ()) -> str:
    """16 hex digits of what a class's forward does, and the classes it is composed from.

    Comments, formatting, docstrings and annotations do not count. Empty if there is no source to look at.
    """
    try:
        texts = [_body(cls.forward)]
        for path in replaced:
            module, _, name = path.partition(":")
            target: Any = import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            texts.append(_body(getattr(target, "forward", target)))
    except (OSError, TypeError, AttributeError, ImportError, SyntaxError):
        return ""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


class _Messages(ast.NodeTransformer):
    """Drops formatted strings, which Python versions write out differently."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")


def _body(function: Any) -> str:
    tree = _Messages().visit(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        elif isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(tree)
