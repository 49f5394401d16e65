"""The units of a denoiser that a feature cache computes or reuses, and where in the model they stand.

A unit is a branch of a block (an attention, a feed-forward), a block as a whole, or of a UNet everything below its
first resolution level (DeepCache, Ma et al. 2023, arXiv 2312.00858). Whole blocks can be told of any model that keeps
its blocks in lists; the others of those that a family describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from torch import nn

from diffuse_compress.components import unwrap
from diffuse_compress.errors import ConfigError
from diffuse_compress.families.base import Below, Branch
from diffuse_compress.families.registry import family_of
from diffuse_compress.families.roles import block_elements
from diffuse_compress.runtime.blocks import fingerprint, known_kind, why_not_composed

__all__ = ["Granularity", "Site", "Unit", "below_of", "sites_of", "units_of"]

BLOCK_KIND = "block"
LEVEL_KIND = "level"
MODEL_KIND = "model"


class Granularity(str, Enum):
    """What a unit is. LEVEL takes all below the first resolution level of a UNet as one, and blocks above it; MODEL is
    the denoiser itself, so that steps are computed or left out as wholes."""

    BLOCK = "block"
    BRANCH = "branch"
    LEVEL = "level"
    MODEL = "model"


@dataclass(frozen=True)
class Unit:
    """Something that is computed or reused as one.

    Attributes:
        block: qualified name of the module it belongs to.
        branch: name of the branch within it; "" for all of the module.
        kind: what it computes: a value of ``BranchRole``, "block", "level", or "model", whose block is "".
    """

    block: str
    branch: str = ""
    kind: str = BLOCK_KIND

    @property
    def name(self) -> str:
        """Qualified name of the unit."""
        if self.kind == MODEL_KIND:
            return MODEL_KIND
        return f"{self.block}.{self.branch}" if self.branch else self.block


@dataclass(frozen=True)
class Site:
    """A module with the units in it, which stand next to each other in the order of all.

    Attributes:
        block: qualified name of the module.
        first: index of its first unit.
        count: of its units.
        whole: its one unit is the module, seen from outside; no composition is needed.
        residual: what its units compute is added to streams that keep their shape, so neighbours may be stored as one.
        chain: sites of a chain hand their streams on to each other, with nothing but additions in between.
        modules: all that is run for the one value that ``block``, the last of them, returns; () for a block alone.
    """

    block: str
    first: int
    count: int
    whole: bool
    residual: bool
    chain: int
    modules: tuple[str, ...] = ()

    @property
    def is_model(self) -> bool:
        """The module is the denoiser itself."""
        return not self.block

    @property
    def owned(self) -> tuple[str, ...]:
        """Names of the modules that are run or left out."""
        return self.modules or (self.block,)


def units_of(model: nn.Module, granularity: Granularity | str = Granularity.BLOCK) -> tuple[Unit, ...]:
    """Units of ``model`` in the order they run in (of a class without a family, the order they are registered in).

    ``granularity="branch"`` lists the branches of every block that can be composed, and the others as wholes;
    ``"level"`` blocks, and all below the first resolution level as one; ``"model"`` the model itself.

    Raises:
        ConfigError: there is nothing that could be reused, or no resolution level.
    """
    model, family = unwrap(model), family_of(unwrap(model))
    granularity = Granularity(granularity)
    if granularity is Granularity.MODEL:
        return (Unit("", kind=MODEL_KIND),)
    if family is None:
        names = block_elements(model)
    elif granularity is not Granularity.BRANCH and family.wholes is not None:
        names = family.wholes(model)
    else:
        names = family.blocks(model)
    units = [unit for name in names for unit in _units(model.get_submodule(name), name, granularity)]
    if granularity is Granularity.LEVEL:
        units = _with_level(units, below_of(model))
    if not units:
        raise ConfigError(
            f"{type(model).__name__}: a feature cache needs blocks, and found neither a family of this class nor a "
            "list of blocks in it (an nn.ModuleList whose elements hold layers)."
        )
    return tuple(units)


def _units(block: nn.Module, name: str, granularity: Granularity) -> list[Unit]:
    kind = known_kind(block)
    branches = () if kind is None or why_not_composed(block) is not None else kind.branches(block)
    divided = len(branches) > 1 and granularity is Granularity.BRANCH
    if divided or any(not branch.residual for branch in branches):
        return [Unit(name, branch.name, branch.role.value) for branch in branches]
    return [Unit(name)]


def below_of(model: nn.Module) -> Below:
    """What a model runs below its first resolution level; ConfigError without one."""
    family = family_of(unwrap(model))
    below = None if family is None else family.below(unwrap(model))
    if below is None or fingerprint(type(unwrap(model))) not in below.fingerprints:  # type: ignore[arg-type]
        raise ConfigError(
            f"{type(unwrap(model)).__name__}: not known to have resolution levels, which a cache schedule by level "
            'needs. Use granularity="block".'
        )
    return below


def _with_level(units: Sequence[Unit], below: Below) -> list[Unit]:
    """All units inside of ``below`` as one, where the first of them stands."""
    inside = [any(f"{unit.block}.".startswith(f"{name}.") for name in below.modules) for unit in units]
    first = inside.index(True)
    level = Unit(below.modules[-1], "below", LEVEL_KIND)
    return [
        *units[:first],
        level,
        *(unit for unit, is_in in zip(units[first:], inside[first:], strict=True) if not is_in),
    ]


def branch_of(block: nn.Module, name: str) -> Branch:
    """A branch of a block by its name."""
    kind = known_kind(block)
    found = None if kind is None else next((b for b in kind.branches(block) if b.name == name), None)
    if found is None:
        raise ConfigError(f"{type(block).__name__} has no branch {name!r}, which the cache schedule names.")
    return found


def sites_of(model: nn.Module, units: Sequence[Unit], *, merge: bool = True) -> tuple[Site, ...]:
    """The modules that hold ``units``, in order.

    Args:
        model: the denoiser.
        units: of it.
        merge: let sites that hand on their streams make a chain; otherwise each is one of its own.

    Raises:
        ConfigError: units of one block that do not stand together or are not all of its branches in their order.
    """
    model = unwrap(model)
    family = family_of(model)
    chained = merge and family is not None and fingerprint(type(model)) in family.chained  # type: ignore[arg-type]
    sites: list[Site] = []
    first = 0
    while first < len(units):
        block = units[first].block
        if units[first].kind == MODEL_KIND:
            sites.append(Site(block, first, 1, True, True, len(sites) + 1))
            first += 1
            continue
        if units[first].kind == LEVEL_KIND:
            sites.append(Site(block, first, 1, True, False, len(sites) + 1, below_of(model).modules))
            first += 1
            continue
        count = next((n for n, unit in enumerate(units[first:]) if unit.block != block), len(units) - first)
        branches = [unit.branch for unit in units[first : first + count]]
        module = model.get_submodule(block)
        whole = branches == [""]
        kind = known_kind(module)
        present = [] if kind is None else [branch.name for branch in kind.branches(module)]
        if not whole and branches != present:
            raise ConfigError(
                f"{block}: a cache schedule lists all branches of a block in their order ({', '.join(present)}) or the "
                f"block as one, got {', '.join(branches)}."
            )
        residual = whole or all(branch_of(module, name).residual for name in branches)
        sites.append(Site(block, first, count, whole, residual, 0 if chained and residual else len(sites) + 1))
        first += count
    if len({site.block for site in sites}) != len(sites):
        raise ConfigError("units of one block must stand next to each other in a cache schedule.")
    return tuple(sites)
