"""The one owner of a block's forward.

Fused kernels, feature caches and temporal tables all change what happens inside of a block. Each is a
:class:`BlockOption` of one instance forward, composed from the family's branches, instead of a patch over a patch. The
forward is a bound method, so a copied, pickled or loaded block has its own. Without options the composition gives the
bits of the stock forward, and whenever it might not (another version of the class, an unknown attention processor, an
argument that the composition does not cover), the stock forward runs.

An owner stands in two places. Innermost, below the hooks of accelerate and diffusers, it computes the block. Outermost,
above them and above a compiled block, it asks whether the block is to be run at all: of a block that is left out no
hook may move the weights, and the decision must not become a part of anybody's graph.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import DiffuseCompressWarning, ModelStateError
from diffuse_compress.families.base import BlockKind, Branch, Conditioning, Streams
from diffuse_compress.families.registry import FAMILIES

__all__ = [
    "BlockOption",
    "asked",
    "compose",
    "disown",
    "fingerprint",
    "keep_outermost",
    "known_kind",
    "own",
    "owned_options",
    "why_not_composed",
]

_OWNER = "_diffuse_compress_owner"


class BlockOption:
    """Something that changes how a block's branches are computed; subclasses override what they need.

    Attributes:
        name: one option of a name on each block.
        rank: options are asked in ascending order: tables (0) set values before caches (10) skip branches, and fused
            kernels (20) compute what is left.
        fuses: layers, relative to the block, whose weights the option reads itself. It is left out of a call in which
            one of them carries an adapter (LoRA) or a hook (offloading, an observer): a fused kernel would not see it.
        composes: the option changes branches, so the block must be one that can be composed. An option that is about
            whole blocks leaves them their stock forward.
        wraps: the option is asked outside of the block (:meth:`around`).
    """

    name = "option"
    rank = 10
    fuses: tuple[str, ...] = ()
    composes = True
    wraps = False

    def around(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """What the block returns; ``run(*args, **kwargs)`` runs it, with its hooks and as it was compiled.

        Never traced: in a call that is being compiled the block itself runs.
        """
        return run(*args, **kwargs)

    def instead(
        self,
        block: nn.Module,
        kind: BlockKind | None,
        options: list[BlockOption],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What the block returns, below its hooks and in the place of its composition; NotImplemented to have that.

        ``kind`` is None where the block cannot be composed now; ``options`` are all that are in force, this one too.
        """
        return NotImplemented

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


class _Inside(threading.local):
    """Owners whose compiled block is running in this thread."""

    def __init__(self) -> None:
        self.owners: set[int] = set()


_inside = _Inside()


class _Owner:
    """Options of one block, and the forwards that ask them.

    Pickles and copies without the kind, which is looked up again: it holds functions, and says of which versions of
    the class it is true. What torch compiled does not survive that either.

    Attributes:
        inner: the forward that :meth:`gate` stands before, hooks and all; None while no option wraps the block.
        compiled: what ``block.compile()`` made, while :meth:`outside` stands in its place.
    """

    def __init__(self, block: nn.Module, kind: BlockKind | None) -> None:
        self.block = block
        self.kind = kind
        # Dynamo cannot trace ``type(block).forward`` of classes that it is told to leave in the graph as they are.
        self.stock: Callable[..., Any] = type(block).forward
        self.options: list[BlockOption] = []
        self.inner: Callable[..., Any] | None = None
        self.compiled: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"block": self.block, "options": self.options, "inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"inner": None, "compiled": None, **state})
        self.stock = type(self.block).forward
        self.kind, reason = _kind_of(type(self.block))
        lost = [option.name for option in self.options if option.composes]
        if reason is not None and lost:
            warnings.warn(
                f"{type(self.block).__name__} runs its stock forward, without {', '.join(lost)}: {reason}.",
                DiffuseCompressWarning,
                stacklevel=2,
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward; stock whenever the composition does not hold for this call."""
        block, kind = self.block, self.kind
        if kind is not None and _why_stock_now(block, kind) is not None:
            kind = None
        options = [option for option in self.options if all(_is_bare(block, name) for name in option.fuses)]
        for option in options:
            output = option.instead(block, kind, options, args, kwargs)
            if output is not NotImplemented:
                return output
        composing = [option for option in options if option.composes]
        begun = kind.begin(block, *args, **kwargs) if kind is not None and composing else None
        if kind is None or begun is None:
            return self.stock(block, *args, **kwargs)
        return compose(block, kind, composing, *begun)

    def gate(self, *args: Any, **kwargs: Any) -> Any:
        """Outermost: asks the options that wrap the block, unless they were asked already (:meth:`outside`)."""
        assert self.inner is not None
        if torch.compiler.is_compiling() or id(self) in _inside.owners:
            return self.inner(*args, **kwargs)
        return self._around(self.inner, args, kwargs)

    def outside(self, *args: Any, **kwargs: Any) -> Any:
        """The same around a compiled block."""
        if torch.compiler.is_compiling() or self.compiled is None:
            return self.block._call_impl(*args, **kwargs)
        return self._around(self._run_compiled, args, kwargs)

    def _run_compiled(self, *args: Any, **kwargs: Any) -> Any:
        assert self.compiled is not None
        _inside.owners.add(id(self))
        try:
            return self.compiled(*args, **kwargs)
        finally:
            _inside.owners.discard(id(self))

    def _around(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for option in reversed(self.options):
            if option.wraps:
                run = partial(_wrapped, option, self.block, run)
        return run(*args, **kwargs)


def _wrapped(option: BlockOption, block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return option.around(block, args, kwargs, run)


def compose(
    block: nn.Module, kind: BlockKind, options: list[BlockOption], streams: Streams, conditioning: Conditioning
) -> Any:
    """Run a block branch by branch, from what its kind's ``begin`` made of its arguments."""
    for option in options:
        option.prepare(block, conditioning)
    for branch in kind.branches(block):
        streams = branch.add(block, streams, asked(options, block, branch, streams, conditioning))
    return kind.end(block, streams, conditioning)


def asked(
    options: list[BlockOption], block: nn.Module, branch: Branch, streams: Streams, conditioning: Conditioning
) -> Streams:
    """What one branch adds to the streams, options asked from the first on."""
    compute = partial(branch.compute, block, streams, conditioning)
    for option in reversed(options):
        compute = partial(option.branch, block, branch, streams, conditioning, compute)
    return compute()


def own(block: nn.Module, option: BlockOption) -> None:
    """Add an option to a block, and take over its forward if nobody has yet.

    Raises:
        ModelStateError: the block cannot be composed (:func:`why_not_composed`) and the option needs that, it has an
            option of that name, or its forward was replaced by somebody else.
    """
    name = type(block).__name__
    if option.composes and (reason := why_not_composed(block)) is not None:
        raise ModelStateError(f"{name} keeps its own forward: {reason}.")
    owner: _Owner | None = block.__dict__.get(_OWNER)
    if owner is None:
        slot = _slot(block, lambda value: _is_stock(block, value))
        if slot is None:
            raise ModelStateError(
                f"{name}.forward was replaced by another library; remove that first "
                "(disable its cache or hooks), then compress."
            )
        owner = _Owner(block, _kind_of(type(block))[0])
        setattr(block, _OWNER, owner)
        _put(block, slot, owner.forward)
    if any(present.name == option.name for present in owner.options):
        raise ModelStateError(f"{name} already has the option {option.name!r}; remove it first.")
    owner.options = sorted([*owner.options, option], key=lambda item: item.rank)
    keep_outermost(block)


def disown(block: nn.Module, name: str) -> None:
    """Remove an option; with the last one the block has its stock forward again."""
    owner: _Owner | None = block.__dict__.get(_OWNER)
    if owner is None:
        return
    owner.options = [option for option in owner.options if option.name != name]
    if not any(option.wraps for option in owner.options):
        _open_gate(block, owner)
    if owner.options:
        return
    slot = _slot(block, lambda value: _is_method(value, owner, _Owner.forward))
    if slot is not None:
        _put(block, slot, None)
    delattr(block, _OWNER)


def keep_outermost(block: nn.Module) -> None:
    """Ask options that wrap a block before the hooks and the compilation that came after them; cheap if none did."""
    owner: _Owner | None = block.__dict__.get(_OWNER)
    if owner is None or not any(option.wraps for option in owner.options):
        return
    compiled = block._compiled_call_impl
    if compiled is not None and not _is_method(compiled, owner, _Owner.outside):
        owner.compiled = compiled
        block._compiled_call_impl = owner.outside
    if not _is_method(block.forward, owner, _Owner.gate):
        below = _slot(block, lambda value: _is_method(value, owner, _Owner.gate))
        if below is not None:
            _put(block, below, owner.inner)
        owner.inner = block.forward
        block.forward = owner.gate  # type: ignore[method-assign]


def _open_gate(block: nn.Module, owner: _Owner) -> None:
    """Take the owner out of the outermost place."""
    if _is_method(block._compiled_call_impl, owner, _Owner.outside):
        block._compiled_call_impl = owner.compiled
    slot = _slot(block, lambda value: _is_method(value, owner, _Owner.gate))
    if slot is not None:
        _put(block, slot, owner.inner)
    owner.inner, owner.compiled = None, None


def owned_options(block: nn.Module) -> list[BlockOption]:
    """Options of a block, in the order they are asked."""
    owner: _Owner | None = block.__dict__.get(_OWNER)
    return [] if owner is None else list(owner.options)


def known_kind(block: nn.Module) -> BlockKind | None:
    """The composition of a block's class, if there is one for this version of it."""
    return _kind_of(type(block))[0]


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


_Slot = tuple[Any, str]
"""Where a forward stands: an object, and the name of its attribute."""


def _slot(block: nn.Module, wanted: Callable[[Any], bool]) -> _Slot | None:
    """The first place, from the block's own forward down through the hooks of accelerate and diffusers, that holds a
    wanted forward. None if no such place does: somebody replaced it by a function of their own."""
    return next((slot for slot in _slots(block) if wanted(getattr(*slot, None))), None)


def _slots(block: nn.Module) -> Iterator[_Slot]:
    owner = block.__dict__.get(_OWNER)
    yield block, "forward"
    if owner is not None and owner.inner is not None:
        yield owner, "inner"
    if "_old_forward" in block.__dict__:
        yield block, "_old_forward"
    for reference in getattr(block.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        yield reference, "original_forward"
        yield reference, "forward"


def _put(block: nn.Module, slot: _Slot, forward: Callable[..., Any] | None) -> None:
    """Set a forward, None for the class's own, of which a block itself holds no copy."""
    holder, name = slot
    if holder is block and name == "forward" and (forward is None or _is_stock(block, forward)):
        block.__dict__.pop("forward", None)
    else:
        setattr(holder, name, forward if forward is not None else types.MethodType(type(block).forward, block))


def _is_stock(block: nn.Module, value: Any) -> bool:
    return _is_method(value, block, type(block).forward)


def _is_method(value: Any, owner: object, function: Any) -> bool:
    return isinstance(value, types.MethodType) and value.__self__ is owner and value.__func__ is function


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
