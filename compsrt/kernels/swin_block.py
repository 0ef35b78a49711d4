"""A quantized Swin block at inference; see `reference/swin_block.py` for the mathematics."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .reference import FoldedBlock


def quant_swin_block(x: Tensor, folded: FoldedBlock) -> Tensor:
    """A whole quantized Swin block at inference, x (B, H, W, C) -> (B, H, W, C) in x's type.

    folded: what `fold_block` made of the block. Raises ValueError for an x that does not fit.
    """
    return reference.quant_swin_block(x, folded)
