"""Small quantized Swin blocks without a model: what `fold_block` takes, and the block it comes from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from shapes import randn
from torch import Tensor

from compsrt import transforms
from compsrt.kernels import reference
from compsrt.kernels.reference import Grid, LayerNormWeights, QuantLayer, QuantWeight
from compsrt.kernels.reference.attention import merge_heads, split_heads
from compsrt.kernels.reference.windows import add_bias

SITES = ("q", "k", "v", "query", "key", "value", "attention", "proj", "fc1", "fc2")


class Kind(NamedTuple):
    """A block but for its numbers."""

    size: int = 12
    heads: int = 2
    head_dim: int = 6
    hidden: int = 24
    window: int = 4
    shift: int = 0
    transform: str = "dct"
    head_transform: str = "none"
    bits: int = 4
    weight_bits: int = 4
    channels: bool = False  # a scale for each output channel of a weight
    by_head: bool = False  # grids of attention for each head
    masked: bool = False
    seed: int = 0


class Block:
    """Draws a block of a kind whose quantizers fit what they see; float64."""

    def __init__(self, kind: Kind):
        self.kind, self._draws = kind, 0
        inner, tokens = kind.heads * kind.head_dim, kind.window**2
        self.norms = tuple(
            LayerNormWeights(1 + self._randn(kind.size) / 4, self._randn(kind.size) / 4, 1e-3)
            for _ in range(2)
        )
        self.rotations: dict[str, Tensor | None] = {
            "rotation": self._rotation(kind.transform, kind.size),
            "head_rotation": self._rotation(kind.head_transform, kind.head_dim),
            "value_rotation": self._rotation(kind.head_transform, kind.head_dim),
            "token_rotation": self._rotation(kind.transform, tokens),
        }
        self.table = self._randn((2 * kind.window - 1) ** 2, kind.heads)
        shapes = {
            "q": (inner, kind.size),
            "k": (inner, kind.size),
            "v": (inner, kind.size),
            "proj": (kind.size, inner),
            "fc1": (kind.hidden, kind.size),
            "fc2": (kind.size, kind.hidden),
        }
        self.weights = {name: self._weight(*shape) for name, shape in shapes.items()}
        self.biases = {name: self._randn(shape[0]) / 4 for name, shape in shapes.items()}
        self.before = {
            "proj": self._rotation(kind.transform, inner),
            "fc1": self._rotation(kind.transform, kind.size),
            "fc2": self._rotation(kind.transform, kind.hidden),
        }
        self.grids: dict[str, Grid] = {}
        side = 2 * kind.window
        self(self.tokens(1, side, side))

    def _randn(self, *shape: int) -> Tensor:
        self._draws += 1
        return randn(*shape, seed=1000 * self.kind.seed + self._draws, dtype=torch.double)

    @staticmethod
    def _rotation(name: str, size: int) -> Tensor | None:
        return transforms.transform_matrix(name, size)

    def _grid(self, lower: Tensor, upper: Tensor, bits: int) -> Grid:
        """Of these bounds, with alpha and beta that make of some codes less than their bits allow."""
        step = (upper - lower) / (2**bits - 1)
        alpha, beta = (step * self._randn(*step.shape) / 4 for _ in range(2))
        return Grid(lower, upper, alpha, beta, bits)

    def _weight(self, out: int, size: int) -> QuantWeight:
        values = self._randn(out, size) / size**0.5
        ends = values.aminmax(dim=1, keepdim=True) if self.kind.channels else values.aminmax()
        grid = self._grid(*(end * 0.9 for end in ends), self.kind.weight_bits)
        mask = self._randn(out, size) > -0.3 if self.kind.masked else None
        return QuantWeight(values, grid, mask)

    def _quantize(self, site: str, v: Tensor) -> Tensor:
        """v_hat; of attention v is (B, windows, heads, ...)."""
        by_head = self.kind.by_head and site in SITES[3:7]
        if site not in self.grids:
            ends = v.transpose(0, 2).flatten(1).aminmax(dim=1) if by_head else v.aminmax()
            self.grids[site] = self._grid(*(end * 0.9 for end in ends), self.kind.bits)
        *scalars, bits, _ = self.grids[site]
        if by_head:
            scalars = [scalar.view(-1, 1, 1) for scalar in scalars]
        return reference.fake_quantize(v, *scalars, bits=bits)

    def _linear(self, site: str, x: Tensor) -> Tensor:
        x = x if self.before.get(site) is None else x @ self.before[site]
        weight = self.weights[site].quantized()
        return F.linear(self._quantize(site, x), weight, self.biases[site])

    def __call__(self, x: Tensor) -> Tensor:
        """The block by its definition, nothing folded. x: (B, H, W, C) in float64."""
        kind = self.kind
        head, of_value, token = (
            torch.eye(n, dtype=torch.double) if r is None else r
            for r, n in zip(
                list(self.rotations.values())[1:],
                (kind.head_dim, kind.head_dim, kind.window**2),
                strict=True,
            )
        )
        size = x.shape[1], x.shape[2], kind.window, kind.shift
        t = reference.linear.layer_norm(x, self.norms[0])
        t = t if self.rotations["rotation"] is None else t @ self.rotations["rotation"]
        q, k, v = (split_heads(self._linear(s, t), kind.heads, *size[2:]) for s in SITES[:3])
        q = self._quantize("query", q * kind.head_dim**-0.5 @ head)
        k = self._quantize("key", k @ head)
        v = self._quantize("value", v @ of_value)
        p = add_bias(q @ k.mT, self.table, size).softmax(-1)
        p = self._quantize("attention", p @ token)
        y = merge_heads(p @ (token.mT @ v) @ of_value.mT, *size)
        x = x + self._linear("proj", y)
        hidden = F.gelu(self._linear("fc1", reference.linear.layer_norm(x, self.norms[1])))
        return x + self._linear("fc2", hidden)

    def tokens(self, batch: int, height: int, width: int, seed: int = 0) -> Tensor:
        shape = batch, height, width, self.kind.size
        return randn(*shape, seed=self.kind.seed + seed, dtype=torch.double)

    def layer(self, site: str) -> QuantLayer:
        return QuantLayer(
            self.grids[site], self.weights[site], self.biases[site], self.before.get(site)
        )

    def folded(self, mode: str = "fold", dtype: torch.dtype = torch.float32, **changes: Any):
        kind = self.kind
        arguments = {
            "qkv": [self.layer(site) for site in SITES[:3]],
            **{site: self.layer(site) for site in SITES[7:]},
            "table": self.table,
            "grids": [self.grids[site] for site in SITES[3:7]],
            "norms": self.norms,
            "heads": kind.heads,
            "window": kind.window,
            "shift": kind.shift,
            "scale": kind.head_dim**-0.5,
            **self.rotations,
            "mode": mode,
            "dtype": dtype,
        }
        return reference.fold_block(**{**arguments, **changes})
