"""The networks this package loads, and detection of a network from a state dict.

A family is a file beside this one with a configuration class (`Config`), a network class (`Network`), and
`recognizes(state)` and `from_state_dict(state)`. A network takes (B, 3, H, W) pictures in [0, 1] and has
`.config`, `.scale` and `.window_size` (tiles begin at its multiples; 1 if any place will do).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..quantization import QuantSpec
from ..quantizers import quant_spec
from . import edsr, sesr, swinir

_FAMILIES: tuple[Any, ...] = (swinir, edsr, sesr)


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
    if has("body.0.body.0.body.0.weight") and has("head.0"):
        return "EDSR of residual groups (RCAN without channel attention)"
    if has("body.0.body.0.weight") and has("head.0"):
        return "EDSR"
    if has("body.0.conv1.weight") and has("conv_after_body"):
        return "EDSR as BasicSR names it"
    if has("body.first.expand.weight"):
        return "SESR of wide blocks, whose files hold narrow ones: store network.collapsed()"
    if sesr.recognizes(state):
        return "SESR"
    return (
        f"an unknown network ({len(keys)} tensors, the first is {keys[0]!r})" if keys else "empty"
    )


def names() -> list[str]:
    """The classes of the networks that can be loaded."""
    return [family.Network.__name__ for family in _FAMILIES]


def from_state_dict(state: Mapping[str, Tensor]) -> nn.Module:
    """The float network that a state dict belongs to, loaded. ValueError names what it looks like."""
    for family in _FAMILIES:
        if family.recognizes(state):
            return family.from_state_dict(state)
    raise ValueError(
        f"state dict: this looks like {describe_state_dict(state)}; supported: {', '.join(names())}"
    )


def create(config: Any) -> nn.Module:
    """A network with fresh weights from its configuration."""
    for family in _FAMILIES:
        if isinstance(config, family.Config):
            return family.Network(config)
    raise ValueError(f"config: {type(config).__name__} belongs to no network; {', '.join(names())}")


def describe(network: nn.Module) -> dict[str, Any]:
    """What `from_description` makes a network of the same shape from, of what JSON can hold."""
    config: Any = getattr(network, "config", None)
    if type(network).__name__ not in names():
        raise ValueError(
            f"model: {type(network).__name__} is not supported; one of {', '.join(names())}"
        )
    return {"name": type(network).__name__, "config": dataclasses.asdict(config)}


def from_description(description: Mapping[str, Any]) -> nn.Module:
    """A network with fresh weights. Raises ValueError for a class that is not known here."""
    for family in _FAMILIES:
        if family.Network.__name__ == description["name"]:
            fields = {key: _frozen(value) for key, value in description["config"].items()}
            return family.Network(family.Config(**fields))
    raise ValueError(f"its architecture {description['name']!r} is not known here")


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list) else value


def narrow(network: nn.Module) -> nn.Module:
    """The network as it runs and is stored: a SESR of wide blocks collapsed, others as they are."""
    return network.collapsed() if isinstance(network, sesr.SESR) else network


def quantizable_weights(network: nn.Module) -> list[Tensor]:
    """The weights of a float network that its quantized form quantizes."""
    if isinstance(network, swinir.SwinIR):
        kind, roots = nn.Linear, [block for *_, block in network.named_blocks()]
    else:
        kind, roots = nn.Conv2d, [network]
    return [m.weight for root in roots for m in root.modules() if isinstance(m, kind)]


def quantized(network: nn.Module, spec: QuantSpec) -> nn.Module:
    """A quantized copy of a float network, not calibrated. ValueError if there is no such form."""
    if quant_spec(network) is not None:
        raise ValueError("model: it is quantized already; start from the float model")
    if isinstance(network, swinir.SwinIR):
        from .quant_swinir import swap_blocks

        return swap_blocks(network, spec)
    if isinstance(network, sesr.SESR):
        from .quant_sesr import swap_body

        return swap_body(network, spec)
    raise ValueError(
        f"model: {type(network).__name__} has no quantized form; SwinIR and SESR have one"
    )


def arithmetics(model: nn.Module) -> tuple[str, ...]:
    """The ways in which a model can compute, for `set_arithmetic`; () for one that has one way only."""
    from .quant_swinir import ARITHMETICS, QuantSwinBlock

    blocks = any(isinstance(module, QuantSwinBlock) for module in model.modules())
    return ARITHMETICS if blocks else ()


def set_arithmetic(model: nn.Module, arithmetic: str) -> None:
    """How a quantized SwinIR computes from now on: "auto", "fold", "integer" or "reference".

    See `quant_swinir.ARITHMETICS`. Other networks have one way only. Raises ValueError for an unknown
    word and for a way that the model's transforms or codes do not have.
    """
    from . import quant_swinir

    quant_swinir.set_arithmetic(model, arithmetic)


def equalized(network: nn.Module, pictures: Tensor) -> nn.Module:
    """A float network that computes the same and is easier to quantize; most stay as they are."""
    if isinstance(network, sesr.SESR):
        from .quant_sesr import equalized

        return equalized(network, pictures)
    return network
