"""Leaving weights out: masks inside a quantized model, and structure that is cut away for good.

`masks`: which single weights of a quantized model are zero. `groups`: which channels of a network
stand and fall together, found from its graph. `structure`: choosing among them, and the cut.
The training that prepares a network for the cut is `compsrt.srp`.
"""

from .groups import Group, Part, groups_of
from .masks import magnitude_mask, prune
from .structure import TIED, WIDTHS, Choice, StructureSpec, choose, cut, cut_state, doomed_weights

__all__ = [
    "TIED",
    "WIDTHS",
    "Choice",
    "Group",
    "Part",
    "StructureSpec",
    "choose",
    "cut",
    "cut_state",
    "doomed_weights",
    "groups_of",
    "magnitude_mask",
    "prune",
]
