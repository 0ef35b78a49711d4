"""Which channels of a network stand and fall together, found from its graph.

`torch.fx` writes a network down as a list of operations. Going through it once, every tensor gets
the set of channels that its channels belong to: a convolution begins a new set, ReLU and the like
hand on the one they get, and a sum joins the sets of its two sides, because only equal channels
can be added. In the end a set is a `Group`: it knows the layers that make its channels (one: they
are free; several: they are tied, as the layers around a skip are) and every slice of every tensor
that has to go with a channel. No name of a layer plays a part.

A channel whose filter and bias are zero must stay zero until the convolutions that read it, or the
cut would change the output. So what a channel may pass through is listed below. A pixel shuffle
and the network's output fix their channels; anything else that is not listed is an obstacle: it is
reported when a group that meets it is to be pruned.

The blocks of a SwinIR have two kinds of groups of their own: the heads of its attention, and the
channels inside its MLP.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..models import sesr, swinir
from ..quantizers import quant_spec


@dataclasses.dataclass(frozen=True)
class Part:
    """Where the units of a group lie in one tensor of the state dict.

    Unit i is the `size` entries from offset + i * size on along `dim`. makes: where these are zero,
    the unit contributes nothing (a filter, its bias); elsewhere they only go with it.
    """

    tensor: str
    dim: int
    size: int = 1
    offset: int = 0
    makes: bool = False

    def entries(self, units: Tensor) -> Tensor:
        """Indices along dim that belong to these units, in their order."""
        return (self.offset + units[:, None] * self.size + torch.arange(self.size)).flatten()


@dataclasses.dataclass(frozen=True)
class Group:
    """Units of a network that are kept or cut by one common set of indices.

    kind: "filters", "heads" or "hidden". layers: the modules whose outputs the units are. units:
    how many. fixed: why none can go ("" where they can). obstacle: why it is not known what would
    have to go with them ("" where it is). alike: groups with the same word here must keep equally
    many units. rotated: channels a unit, where a quantized form rotates over all units (else 0).
    """

    kind: str
    layers: tuple[str, ...]
    units: int
    parts: tuple[Part, ...]
    fixed: str = ""
    obstacle: str = ""
    alike: str = ""
    rotated: int = 0

    @property
    def name(self) -> str:
        return self.layers[0]

    @property
    def tied(self) -> bool:
        return len(self.layers) > 1


def groups_of(network: nn.Module) -> list[Group]:
    """All groups of a network, in the order of their first layers, fixed ones included.

    Raises ValueError for a quantized network, one whose graph cannot be traced, and one whose sums
    do not fit.
    """
    if quant_spec(network) is not None:
        raise ValueError("network: it is quantized already; structure is cut from the float one")
    if isinstance(network, swinir.SwinIR):
        return list(_groups_of_blocks(network))
    if isinstance(network, sesr.SESR):  # around it there is only colour
        return _traced_groups(network.body, "body.")
    return _traced_groups(network, "")


# --- From the graph ------------------------------------------------------------------------------

# What keeps channels apart and a channel of zeros at zero.
_MODULES = (
    nn.ReLU, nn.PReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Identity, nn.Dropout,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample,
)  # fmt: skip
_FUNCTIONS: set[Any] = {
    F.relu, F.leaky_relu, F.gelu, F.silu, F.elu, F.dropout, F.interpolate, F.avg_pool2d,
    F.max_pool2d, torch.relu, torch.tanh, operator.neg,
}  # fmt: skip
_METHODS = {"relu", "relu_", "tanh", "contiguous", "clone", "neg"}
_SUMS: set[Any] = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
_PRODUCTS: set[Any] = {
    operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div,
}  # fmt: skip
_SHUFFLES = (nn.PixelShuffle, nn.PixelUnshuffle)


class _Channels:
    """A set of channels; joined sets are found by `root` (a union-find)."""

    def __init__(self, width: int | None, fixed: str = ""):
        self.parent = self
        self.width = width  # None: unknown
        self.fixed, self.obstacle = fixed, ""
        self.layers: list[str] = []
        self.parts: list[Part] = []

    def root(self) -> _Channels:
        while self.parent is not self:
            self = self.parent
        return self

    def join(self, other: _Channels, where: str) -> _Channels:
        one, two = self.root(), other.root()
        if one is two:
            return one
        if None not in (one.width, two.width) and one.width != two.width:
            raise ValueError(
                f"network: {where} adds {one.width} channels of {_names(one.layers)} and"
                f" {two.width} of {_names(two.layers)}"
            )
        two.parent = one
        one.width = one.width or two.width
        one.fixed, one.obstacle = one.fixed or two.fixed, one.obstacle or two.obstacle
        one.layers += two.layers
        one.parts += two.parts
        return one


def _names(layers: list[str]) -> str:
    return (", ".join(layers[:2]) + (", ..." if layers[2:] else "")) or "the input"


class _Walk:
    """Goes through the operations of a traced network and collects its sets of channels."""

    def __init__(self, network: nn.Module, prefix: str):
        self.network, self.prefix = network, prefix
        self.channels: dict[fx.Node, _Channels] = {}
        self.calls: dict[str, tuple[_Channels, _Channels]] = {}  # convolution -> its two sides

    def groups(self) -> list[Group]:
        for node in self._trace().nodes:
            found = self._visit(node)
            if found is not None:
                self.channels[node] = found
        order = [self.prefix + target for target in self.calls]
        roots = dict.fromkeys(out.root() for _, out in self.calls.values())
        return [
            Group(
                kind="filters",
                layers=tuple(sorted(root.layers, key=order.index)),
                units=root.width or 0,
                parts=tuple(root.parts),
                fixed=root.fixed,
                obstacle=root.obstacle,
            )
            for root in roots
        ]

    def _trace(self) -> fx.Graph:
        try:
            return fx.Tracer().trace(self.network)
        # Whatever a forward does with a stand-in for a tensor may fail in its own way.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"network: the graph of {type(self.network).__name__} cannot be traced, so its ties"
                f" are not known ({reason})"
            ) from None

    def _visit(self, node: fx.Node) -> _Channels | None:
        sources = [self.channels[n].root() for n in node.all_input_nodes if n in self.channels]
        if node.op == "placeholder":
            return _Channels(None, "they are the picture's")
        if node.op == "output":
            for source in sources:
                source.fixed = "they are the network's output"
            return None
        if not sources:
            return None  # constants
        if node.op == "call_module":
            return self._module(str(node.target), sources)
        return self._function(node, sources)

    def _module(self, target: str, sources: list[_Channels]) -> _Channels:
        module, name = self.network.get_submodule(target), self.prefix + target
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            return self._convolution(target, module, sources[0])
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            part = Part(f"{name}.weight", 0)
            if part not in sources[0].parts:
                sources[0].parts.append(part)
            return sources[0]
        if isinstance(module, _MODULES):
            return sources[0]
        what = type(module).__name__
        if isinstance(module, _SHUFFLES):
            sources[0].fixed = sources[0].fixed or f"a {what} mixes them ({name})"
            return _Channels(None, f"they come from {name}")
        return self._stop(sources, f"{name} is a {what}")

    def _convolution(self, target: str, module: nn.Conv2d, source: _Channels) -> _Channels:
        name = self.prefix + target
        if target in self.calls:  # one convolution in two places: both must be cut alike
            before, out = self.calls[target]
            before.join(source, name)
            return out.root()
        source.parts.append(Part(f"{name}.weight", 1))
        out = _Channels(module.out_channels)
        out.layers.append(name)
        out.parts.append(Part(f"{name}.weight", 0, makes=True))
        if module.bias is not None:
            out.parts.append(Part(f"{name}.bias", 0, makes=True))
        self.calls[target] = source, out
        return out

    def _function(self, node: fx.Node, sources: list[_Channels]) -> _Channels | None:
        target = node.target
        if target is getattr or target in ("size", "dim", "numel"):
            return None  # about a tensor, no tensor
        constants = [a for a in node.args if not isinstance(a, fx.Node) or a.op == "get_attr"]
        if target in _SUMS | _PRODUCTS:
            if len(sources) == 2:
                if 1 in (sources[0].width, sources[1].width):
                    return self._stop(sources, f"{node.name} spreads one channel over all")
                return sources[0].join(sources[1], f"{_where(node)} ({node.name})")
            each = any(isinstance(constant, fx.Node) for constant in constants)
            if target in _PRODUCTS and not each:
                return sources[0]
            if len(sources) == 1 and len(node.all_input_nodes) == 1 and not constants:
                return sources[0]  # x + x
            # Their ties are known, but zeros would not stay zeros.
            sources[0].obstacle = sources[0].obstacle or f"{node.name} adds a constant to them"
            return sources[0]
        if target in _FUNCTIONS or (node.op == "call_method" and target in _METHODS):
            return sources[0]
        return self._stop(sources, f"{getattr(target, '__name__', target)} ({node.name})")

    def _stop(self, sources: list[_Channels], what: str) -> _Channels:
        """Beyond an operation that is not understood nothing is known."""
        for source in sources:
            source.obstacle = source.obstacle or what
        unknown = _Channels(None)
        unknown.obstacle = what
        return unknown


def _where(node: fx.Node) -> str:
    """The module that an operation is written in, as far as fx knows it."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack)[-1] if stack else "a sum"


def _traced_groups(network: nn.Module, prefix: str) -> list[Group]:
    return _Walk(network, prefix).groups()


# --- Swin blocks ---------------------------------------------------------------------------------


def _groups_of_blocks(network: swinir.SwinIR) -> Iterator[Group]:
    """Heads and hidden channels of every block. Those of one layer share their number."""
    has_tensor: Callable[[str], bool] = network.state_dict().__contains__
    for name, _, _, block in network.named_blocks():
        assert isinstance(block, swinir.SwinBlock)
        layer = name.partition(".residual_group")[0]
        attention, mlp = block.attn, block.mlp
        size, inner = attention.head_dim, attention.heads * attention.head_dim
        qkv = f"{name}.attn.qkv"
        # A head is nothing without its value rows, and nothing without its columns of proj.
        heads = [
            Part(f"{qkv}.{kind}", 0, size, part * inner, makes=part == 2)
            for kind in ("weight", "bias")
            if has_tensor(f"{qkv}.{kind}")
            for part in range(3)
        ]
        heads.append(Part(f"{name}.attn.proj.weight", 1, size, makes=True))
        heads.append(Part(f"{name}.attn.relative_position_bias_table", 1))
        yield Group(
            "heads", (qkv,), attention.heads, tuple(heads), alike=f"{layer} heads", rotated=size
        )
        fc1 = f"{name}.mlp.fc1"
        hidden = (
            Part(f"{fc1}.weight", 0, makes=True),
            Part(f"{fc1}.bias", 0, makes=True),
            Part(f"{name}.mlp.fc2.weight", 1),
        )
        width = mlp.fc1.out_features
        yield Group("hidden", (fc1,), width, hidden, alike=f"{layer} hidden", rotated=1)
