"""Which layers of a model have tables, what they depend on, and why the others have none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.families.base import Dependence, Family, TemporalMap
from diffuse_compress.families.decoder import DECODERS
from diffuse_compress.families.registry import FAMILIES, family_of
from diffuse_compress.patterns import matches, require_match
from diffuse_compress.runtime.blocks import fingerprint
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.parking import Parking

__all__ = ["Layout", "layout_of"]

_TOKENS = "it sees every token, or runs several times in a call: its rows would be larger than its weights"
_KINDS = (Dependence.TIMESTEP, Dependence.TIMESTEP_AND_CONDITION, Dependence.CONDITION)


@dataclass(frozen=True)
class Layout:
    """The tables of one model.

    Attributes:
        temporal: of the model.
        entry: name of the block up to which the model is run to make its embeddings.
        layers: what each layer with a table depends on.
        left: why other layers of the temporal map have none.
    """

    temporal: TemporalMap
    entry: str
    layers: dict[str, Dependence]
    left: dict[str, str]


def layout_of(model: nn.Module, config: TableConfig, family: Family | None = None) -> Layout:
    """The layout of a model, by its family.

    Raises:
        ConfigError: the class is unknown and no family is given, nothing in it depends on a timestep alone, or a
            pattern of ``skip`` matches nothing.
    """
    family = family or family_of(model)
    if family is None:
        known = ", ".join(cls for f in FAMILIES if f not in DECODERS for cls in f.classes)
        raise ConfigError(
            f"{type(model).__name__}: temporal tables need to know which layers do not see the sample, found a class "
            f"that no family describes (known: {known}). Pass family=generic_family(model, probe(model, inputs)) of "
            "diffuse_compress.families.generic, with the arguments of one forward pass."
        )
    temporal, blocks = family.temporal(model), family.blocks(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: temporal.of(name) for name in linears}
    found = {name: dependence for name, dependence in found.items() if dependence in _KINDS}
    require_match(config.skip, found, "TableConfig.skip")
    if not blocks or not any(dependence is not Dependence.CONDITION for dependence in found.values()):
        raise ConfigError(
            f"{type(model).__name__}: no layer of it depends on a timestep and not on the sample, so there is nothing "
            "to put in a table. Leave this model out."
        )
    layers, left = {}, {}
    for name, dependence in found.items():
        reason = _why_left(model, family, temporal, config, name, dependence, _block_of(name, blocks))
        if reason is None:
            layers[name] = dependence
        else:
            left[name] = reason
    return Layout(temporal, temporal.entry or blocks[0], layers, left)


def _block_of(name: str, blocks: list[str]) -> str | None:
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def _why_left(
    model: nn.Module,
    family: Family,
    temporal: TemporalMap,
    config: TableConfig,
    name: str,
    dependence: Dependence,
    block: str | None,
) -> str | None:
    """Why a layer gets no table, or None."""
    layer, reader = model.get_submodule(name), temporal.reader_of(name)
    if any(matches(pattern, name) for pattern in config.skip):
        return "skipped as asked"
    if dependence is Dependence.CONDITION and not config.conditions:
        return "conditions=False"
    if any(matches(pattern, name) for pattern in temporal.live):
        return _TOKENS
    if "forward" in layer.__dict__:
        return "its forward was replaced by another library"
    if not Parking.fits(layer, config.weights):
        return f"{type(layer).__name__} cannot be stored as {config.weights.value}"
    if block is None:
        return None
    through = (pattern for reader in temporal.readers for pattern in reader.through)
    if reader is None and not any(matches(pattern, name) for pattern in through):
        return "it runs in a block, and what it reads there is not known"
    module = model.get_submodule(block)
    kind = family.kind_of(module)
    if kind is not None and fingerprint(type(module), kind.replaced) not in kind.fingerprints:  # type: ignore[arg-type]
        return f"this version of {type(module).__name__} is not the one that we know"
    return None
