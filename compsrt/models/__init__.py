"""The networks this package loads, and detection of a network from a state dict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from . import swinir


def describe_state_dict(state: Mapping[str, Tensor]) -> str:
    """What architecture a state dict looks like, in words, for error messages."""
    keys = list(state)

    def has(*fragments: str) -> bool:
        return any(all(fragment in key for fragment in fragments) for key in keys)

    if has("residual_group.blocks", "attn.qkv"):
        return "SwinIR"
    if has("self_attn", "conv_ffn") or has("assm") or has("selectiveScan"):
        return "MambaIR"
    if has("overlap_attn") or has("residual_group.blocks", "conv_block.cab"):
        return "HAT"
    if has("RDB1") or has("rdb1"):
        return "RRDBNet (ESRGAN, Real-ESRGAN)"
    if has("body.0.body.0.weight") and has("conv_du"):
        return "RCAN"
    if has("body.0.body.0.weight") and has("head.0"):
        return "EDSR"
    if has("body.0.conv1.weight") and has("conv_after_body"):
        return "EDSR as BasicSR names it"
    return (
        f"an unknown network ({len(keys)} tensors, the first is {keys[0]!r})" if keys else "empty"
    )


def from_state_dict(state: Mapping[str, Tensor]) -> nn.Module:
    """The float network that a state dict belongs to, loaded. ValueError names what it looks like."""
    needed = ("conv_first.weight", "layers.0.residual_group.blocks.0.attn.qkv.weight")
    if all(key in state for key in needed):
        return swinir.from_state_dict(state)
    raise ValueError(
        f"state dict: this looks like {describe_state_dict(state)}; only SwinIR is supported"
    )
