"""Choosing which filters, heads and hidden channels go, and the network without them.

SRP (Zhang et al., ICLR 2022): a free layer loses its filters of smallest L1 norm; layers that a
skip ties together lose one common set of indices, drawn at random as published, or those whose
norms sum to the least.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import models
from ..cli import nearest
from ..transforms import has_hadamard
from .groups import Group, Part, groups_of

TIED = ("random", "l1")
WIDTHS = ("hadamard", "exact")


@dataclasses.dataclass(frozen=True)
class StructureSpec:
    """What is to be cut out of a network.

    ratios: (pattern, share of the units that go, at least 0 and below 1); a pattern is matched
    against names of layers and kinds ("filters", "heads", "hidden"), and the last one that fits
    counts. skip_layers: patterns of layers that lose nothing, and their groups with them.
    same_groups: each a tuple of patterns whose layers share one set of indices, besides those that
    the graph ties. tied: how the common indices are chosen, "random" (by seed) or "l1". widths:
    "hadamard" rounds what a quantized network rotates to the nearest width that has a Hadamard
    matrix, "exact" takes the shares as they are.
    """

    ratios: tuple[tuple[str, float], ...] = ()
    skip_layers: tuple[str, ...] = ()
    same_groups: tuple[tuple[str, ...], ...] = ()
    tied: str = "random"
    widths: str = "hadamard"
    seed: int = 0

    def __post_init__(self):
        for pattern, ratio in self.ratios:
            if not 0 <= ratio < 1:
                raise ValueError(f"ratio: {ratio} of {pattern!r} is not at least 0 and below 1")
        for name, known in (("tied", TIED), ("widths", WIDTHS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: {value!r} is unknown; one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A group and the units of it that are kept, in ascending order.

    asked: how many the ratio would have kept, before widths were rounded.
    """

    group: Group
    kept: tuple[int, ...]
    asked: int

    @property
    def doomed(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.group.units)) - set(self.kept)))

    def __str__(self) -> str:
        group = self.group
        more = f" and {len(group.layers) - 1} tied to it" if group.tied else ""
        text = f"{group.name}{more}: {group.units} {group.kind} -> {len(self.kept)}"
        if len(self.kept) != self.asked:
            text += f" ({self.asked} asked; {len(self.kept)} has a Hadamard matrix)"
        return text


def choose(network: nn.Module, spec: StructureSpec) -> list[Choice]:
    """Which units of a network are kept, for every group that loses some.

    The same network and spec give the same choice. Raises ValueError for a pattern that matches
    nothing (with the nearest name), a ratio that leaves nothing of a layer, layers of unequal width
    or different ratios in one group, and a group whose ties the graph does not tell.
    """
    groups = _merged(groups_of(network), spec.same_groups)
    skipped = {
        group for pattern in spec.skip_layers for group in _matching(groups, pattern, "skip_layers")
    }
    wanted: dict[Group, dict[str, float]] = {}
    for pattern, ratio in spec.ratios:
        found = _matching(groups, pattern, "ratio")
        movable = [group for group in found if not group.fixed]
        if not movable:
            raise ValueError(
                f"ratio: nothing can be cut from {pattern!r}: {found[0].name} has"
                f" {found[0].units} {found[0].kind} and {found[0].fixed}"
            )
        for group in movable:
            for layer in group.layers:
                if _fits(pattern, layer, group):
                    wanted.setdefault(group, {})[layer] = ratio
    counts = {
        group: _count(group, ratios, spec)
        for group, ratios in wanted.items()
        if group not in skipped
    }
    _check_alike(groups, {group: count.kept for group, count in counts.items()})
    state = network.state_dict()
    return [
        Choice(group, _kept(state, group, counts[group].kept, spec), counts[group].asked)
        for group in groups
        if group in counts and counts[group].kept < group.units
    ]


def _fits(pattern: str, layer: str, group: Group) -> bool:
    return pattern == group.kind or fnmatch.fnmatchcase(layer, pattern)


def _matching(groups: Sequence[Group], pattern: str, argument: str) -> list[Group]:
    found = [g for g in groups if any(_fits(pattern, layer, g) for layer in g.layers)]
    if not found:
        known = dict.fromkeys([*(g.kind for g in groups), *(n for g in groups for n in g.layers)])
        close = nearest(pattern, known, listed=False) or f"; a layer is {groups[0].name!r}"
        raise ValueError(f"{argument}: {pattern!r} matches no layer{close}")
    return found


def _merged(groups: list[Group], same: Sequence[Sequence[str]]) -> list[Group]:
    """Groups joined as `same_groups` says."""
    for patterns in same:
        members = list(
            dict.fromkeys(g for p in patterns for g in _matching(groups, p, "same_groups"))
        )
        first = members[0]
        for other in members[1:]:
            if (other.kind, other.units) != (first.kind, first.units):
                raise ValueError(
                    f"same_groups: layers of unequal width cannot share indices: {first.name} has"
                    f" {first.units} {first.kind}, {other.name} {other.units} {other.kind}"
                )
        joined = dataclasses.replace(
            first,
            layers=tuple(name for group in members for name in group.layers),
            parts=tuple(part for group in members for part in group.parts),
            fixed=next((g.fixed for g in members if g.fixed), ""),
            obstacle=next((g.obstacle for g in members if g.obstacle), ""),
        )
        groups = [joined if g is first else g for g in groups if g is first or g not in members]
    return groups


@dataclasses.dataclass(frozen=True)
class _Count:
    kept: int
    asked: int


def _count(group: Group, ratios: Mapping[str, float], spec: StructureSpec) -> _Count:
    """How many units of a group are kept."""
    (first, ratio), *others = ratios.items()
    for layer, other in others:
        if other != ratio:
            raise ValueError(
                f"ratio: {first} and {layer} are tied, so they cannot have {ratio} and {other}"
            )
    removed = round(ratio * group.units)
    if removed == 0:
        return _Count(group.units, group.units)
    if group.obstacle:
        raise ValueError(
            f"network: the ties of {first} cannot be resolved, because {group.obstacle};"
            " leave it out with skip_layers"
        )
    asked = group.units - removed
    if asked < 1:
        most = (group.units - 1) / group.units
        raise ValueError(
            f"ratio: {ratio} leaves none of the {group.units} {group.kind} of {first}; at most"
            f" {most:.4g}"
        )
    if not group.rotated or spec.widths == "exact":
        return _Count(asked, asked)
    fitting = [n for n in range(1, group.units + 1) if has_hadamard(n * group.rotated)]
    return _Count(min(fitting, key=lambda n: (abs(n - asked), -n), default=asked), asked)


def _kept(
    state: Mapping[str, Tensor], group: Group, count: int, spec: StructureSpec
) -> tuple[int, ...]:
    if group.tied and spec.tied == "random":
        digest = hashlib.sha256(f"{spec.seed} {group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        order = torch.randperm(group.units, generator=generator)
    else:
        order = norms(state, group).sort(descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def norms(state: Mapping[str, Tensor], group: Group) -> Tensor:
    """(units,) float64: the L1 norm of what makes a unit, biases left out, summed over the layers."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for part in group.parts:
        if part.makes and state[part.tensor].dim() > 1:
            weight = state[part.tensor].detach().double().abs().transpose(0, part.dim)
            rows = weight.flatten(1).sum(1).cpu()
            total += rows[part.offset :][: group.units * part.size].view(group.units, -1).sum(1)
    return total


def _check_alike(groups: Sequence[Group], counts: Mapping[Group, int]) -> None:
    firsts: dict[str, Group] = {}
    for group in groups:
        first = firsts.setdefault(group.alike, group)
        one, two = counts.get(first, first.units), counts.get(group, group.units)
        if group.alike and one != two:
            raise ValueError(
                f"ratio: {first.name} would keep {one} {first.kind} and {group.name} {two}, but all"
                " blocks of a layer have the same number"
            )


# --- The cut -------------------------------------------------------------------------------------


def cut_state(state: Mapping[str, Tensor], choices: Sequence[Choice]) -> dict[str, Tensor]:
    """A state dict without the units that are not kept; tensors that lose nothing are shared."""
    units: dict[tuple[str, int], list[tuple[Part, Tensor]]] = {}
    for choice in choices:
        kept = torch.tensor(choice.kept)
        for part in choice.group.parts:
            units.setdefault((part.tensor, part.dim), []).append((part, kept))
    smaller = dict(state)
    for (name, dim), found in units.items():
        found.sort(key=lambda entry: entry[0].offset)
        entries = torch.cat([part.entries(kept) for part, kept in found])
        smaller[name] = smaller[name].index_select(dim, entries.to(smaller[name].device))
    return smaller


@torch.no_grad()
def cut(network: nn.Module, choices: Sequence[Choice]) -> nn.Module:
    """The smaller network, a network like any other: its configuration is read off its tensors.

    Computes the same as `network` if all that makes the doomed units is zero. Raises ValueError for
    a class of network that this package does not know (`cut_state` serves any).
    """
    smaller = models.from_state_dict(cut_state(network.state_dict(), choices))
    first = next(network.parameters())
    smaller = smaller.to(first.device, first.dtype).train(network.training)
    return smaller.requires_grad_(first.requires_grad)


def doomed_weights(state: Mapping[str, Tensor], choices: Sequence[Choice]) -> dict[str, Tensor]:
    """Boolean masks by name: the weights and biases that are zero when all doomed units are."""
    masks: dict[str, Tensor] = {}
    for choice in choices:
        doomed = torch.tensor(choice.doomed)
        for part in choice.group.parts:
            if part.makes:
                tensor = state[part.tensor]
                mask = masks.setdefault(part.tensor, torch.zeros_like(tensor, dtype=torch.bool))
                mask.index_fill_(part.dim, part.entries(doomed).to(tensor.device), True)
    return masks
