"""What a network costs: parameters, multiply-adds and bytes, layer by layer.

MACs are counted as papers on super-resolution do: for an output of a given size, from an input of
the whole sides below it, a multiplication and its addition as one, of convolutions, linear layers
and the two products of attention; additions of biases, norms, activations and colour transforms are
not counted. Nothing is computed: a twin of the network runs on the meta device.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .cli import format_table
from .models import swinir
from .models.sesr import SESR
from .quantization import SCALARS
from .quantizers import WeightQuantizer, named_quantizers, quant_spec, stored_as_float


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """One layer. weights: its parameters without biases. bytes: of all that it stores."""

    name: str
    parameters: int
    weights: int
    macs: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Count:
    """The layers of a network in the order in which they run; prints as a table with its sums.

    height, width: of the output that the MACs are for.
    """

    layers: tuple[LayerCount, ...]
    height: int
    width: int

    def _sum(self, key: str) -> int:
        return sum(getattr(layer, key) for layer in self.layers)

    @property
    def parameters(self) -> int:
        return self._sum("parameters")

    @property
    def weights(self) -> int:
        """Entries of convolutions and linear layers, biases left out."""
        return self._sum("weights")

    @property
    def macs(self) -> int:
        return self._sum("macs")

    @property
    def bytes(self) -> int:
        """Of the tensors: float ones in their type, quantized ones as a packed file has them."""
        return self._sum("bytes")

    def __str__(self) -> str:
        total = {key: self._sum(key) for key in ("parameters", "weights", "macs", "bytes")}
        rows = [dataclasses.asdict(layer) for layer in self.layers] + [{"name": "sum", **total}]
        for row in rows:
            row["macs"] = row["macs"] / 1e6
        columns = {
            "name": "layer",
            "parameters": "parameters",
            "weights": "weights",
            "macs": f"MMACs at {self.width}x{self.height}",
            "bytes": "bytes",
        }
        return format_table(rows, columns, decimals={"macs": 2})


def count(model: nn.Module, height: int, width: int) -> Count:
    """Parameters, MACs and bytes of a network of this package, by layer.

    model: float or quantized. height, width: of the output in pixels, 720 and 1280 in most papers;
    the input is that over the scale, rounded down (and padded to whole windows where a network does
    that). Raises ValueError for an output smaller than one input pixel, and for other networks.
    """
    description = models.describe(model)
    twin: Any = _twin(description)
    size = height // twin.scale, width // twin.scale
    if min(size) < 1:
        raise ValueError(f"height, width: {height} x {width} is less than one pixel of the input")
    macs = _macs(twin, size)
    stored = _bytes(model)
    rows: dict[str, Counter[str]] = {}
    order = [name for name, module in twin.named_modules() if isinstance(module, _COUNTED)]
    for name, parameter in twin.named_parameters():
        layer = _layer(name, order)
        row = rows.setdefault(layer, Counter())
        row["parameters"] += parameter.numel()
        if layer in macs and name.endswith(".weight"):
            row["weights"] += parameter.numel()
    for name, found in macs.items():
        rows.setdefault(name, Counter())["macs"] += found
    for name, found in stored.items():
        rows.setdefault(_layer(name, order), Counter())["bytes"] += found
    fields = ("parameters", "weights", "macs", "bytes")
    layers = (LayerCount(name, **{key: row[key] for key in fields}) for name, row in rows.items())
    return Count(tuple(layers), height, width)


_COUNTED = (nn.Conv2d, nn.Linear, swinir.WindowAttention)


def _twin(description: dict[str, Any]) -> nn.Module:
    """A float network of the same shape without memory for its tensors."""
    with torch.device("meta"):
        return models.from_description(description)


def _layer(tensor: str, layers: list[str]) -> str:
    """The layer that a tensor belongs to: the innermost one that is counted, else its own module."""
    owners = [name for name in layers if tensor.startswith(f"{name}.")]
    return max(owners, key=len, default=tensor.rpartition(".")[0] or tensor)


def _macs(network: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Of every layer that multiplies, by name, for an input of this height and width."""
    found: Counter[str] = Counter()

    def hook(name: str):
        def run(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                found[name] += output.numel() * module.weight[0].numel()
            elif isinstance(module, nn.Linear):
                found[name] += output.numel() * module.in_features
            elif isinstance(module, swinir.WindowAttention):  # q k^T, and the mix of v
                windows, tokens, _ = inputs[0].shape
                found[name] += 2 * windows * tokens**2 * module.heads * module.head_dim

        return run

    for name, module in network.named_modules():
        if isinstance(module, _COUNTED):
            module.register_forward_hook(hook(name))
    channels = 1 if isinstance(network, SESR) else getattr(network.config, "in_channels", 3)
    with torch.no_grad(), torch.device("meta"):
        network(torch.empty(1, channels, *size))
    return dict(found)


# --- Bytes ---------------------------------------------------------------------------------------

# The parts of a quantized block, by the layer of the float one that they come from.
_FLOAT_NAMES = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "proj": "attn.proj",
                "fc1": "mlp.fc1", "fc2": "mlp.fc2", "query": "attn", "key": "attn",
                "value": "attn", "attention": "attn", "relative_position_bias_table": "attn"}  # fmt: skip


def _bytes(model: nn.Module) -> dict[str, int]:
    """What every tensor takes: by name, those of quantized parts under their float layer's name."""
    spec = quant_spec(model)
    if spec is None:
        return {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    blocks = [name for name, *_ in model.named_blocks()] if isinstance(model, swinir.SwinIR) else []
    sizes: dict[str, float] = {}
    for name, bits in _quantized_bits(model):
        sizes[_float_name(name, blocks)] = sizes.get(_float_name(name, blocks), 0) + bits / 8
    each = 2 if spec.storage == "float16" else 4
    for name, tensor in stored_as_float(model).items():
        key = _float_name(name, blocks)
        sizes[key] = sizes.get(key, 0) + each * tensor.numel()
    return {name: round(size) for name, size in sizes.items()}


def _quantized_bits(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Bits of codes, masks and scalars of every quantizer."""
    for name, quantizer in named_quantizers(model):
        stored = getattr(quantizer, "stored", SCALARS)
        each = 8 * (quantizer.scale_type or torch.float32).itemsize
        bits = sum(each * getattr(quantizer, scalar).numel() for scalar in stored)
        if isinstance(quantizer, WeightQuantizer):
            mask = quantizer.mask
            kept = quantizer.size.numel() if mask is None else int(mask.sum())
            bits += kept * quantizer.bits + (0 if mask is None else mask.numel())
        yield name, bits


def _float_name(name: str, blocks: list[str]) -> str:
    for block in blocks:
        if name.startswith(f"{block}."):
            part, _, rest = name[len(block) + 1 :].partition(".")
            if part in _FLOAT_NAMES:
                return f"{block}.{_FLOAT_NAMES[part]}.{rest or part}"
    if name.startswith("body.convolutions."):  # of a quantized SESR
        number, _, rest = name.removeprefix("body.convolutions.").partition(".")
        return f"body.first.{rest}" if number == "0" else f"body.blocks.{int(number) - 1}.{rest}"
    return name
