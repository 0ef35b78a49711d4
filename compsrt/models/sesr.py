"""SESR: tiny convolutional networks that train wide and run narrow (Bhardwaj et al., MLSys 2022).

    y = conv5x5(x)   act   m times: conv3x3 with a short residual, act   + y   conv5x5   + x   depth to space

on luma alone: x (B, 1, H, W), first and last convolution 1 -> f and f -> scale^2 channels. Of a
colour picture luma (ITU-R BT.601, as PSNR is measured) goes through the network, the two colour
differences are enlarged bicubically.

While it is trained, every k x k convolution is a *collapsible linear block*: a k x k convolution to
p channels and a 1x1 convolution back, nothing between them. Both are linear, so they are one
narrow convolution, its kernel a product of two matrices:

    W[o, i, y, x] = sum_p W2[o, p] W1[p, i, y, x]  (+ 1 where o = i at the centre: the short residual)
    b[o] = sum_p W2[o, p] b1[p] + b2[o]

which is what Algorithms 1 and 2 of the paper get by pushing identity impulses through the block.
Zero padding does not disturb it, because the 1x1 convolution comes second. "collapsed" blocks
form that kernel at every step and run narrow, the gradients flow on to the wide weights; "expanded"
blocks run wide. Files hold narrow weights only.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from .layers import HALVES

ACTIVATIONS = ("prelu", "relu")
BLOCKS = ("collapsed", "expanded")
EXPANSION = 256  # channels p inside a block, as in the paper


@dataclasses.dataclass(frozen=True)
class SESRConfig:
    """Hyper-parameters of a SESR; the defaults are M5 x2.

    scale: 2 or 4. blocks: m, the 3x3 convolutions. features: f, their channels. widths: those of
    the first convolution and of every block where they differ, because filters were pruned; the
    first and the last are `features`, since a skip adds them.
    """

    scale: int = 2
    blocks: int = 5
    features: int = 16
    activation: str = "prelu"
    widths: tuple[int, ...] = ()

    def __post_init__(self):
        if self.scale not in (2, 4):
            raise ValueError(f"scale: {self.scale} is not 2 or 4")
        if min(self.blocks, self.features, *self.widths) < 1:
            raise ValueError("blocks, features and widths: each must be at least 1")
        ends = {*self.widths[:1], *self.widths[-1:]} or {self.features}
        if (self.widths and len(self.widths) != self.blocks + 1) or ends != {self.features}:
            raise ValueError(
                f"widths: {self.widths} must have {self.blocks + 1} entries, the first and the last"
                f" {self.features}, or none"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: {self.activation!r} is not one of {', '.join(ACTIVATIONS)}"
            )

    @property
    def all_widths(self) -> tuple[int, ...]:
        """Channels of the first convolution and of every block."""
        return self.widths or (self.features,) * (self.blocks + 1)


SIZES = {  # name in the paper -> (blocks, features)
    "m3": (3, 16),
    "m5": (5, 16),
    "m7": (7, 16),
    "m11": (11, 16),
    "xl": (11, 32),
}


# --- Colour --------------------------------------------------------------------------------------

# Luma and the colour differences of RGB in [0, 1]: ITU-R BT.601 in its narrow range, as MATLAB's
# rgb2ycbcr has it. Luma reaches from 16/255 to 235/255.
_TO_YCBCR = (
    (65.481, 128.553, 24.966),
    (-37.797, -74.203, 112.0),
    (112.0, -93.786, -18.214),
)
_OFFSET = (16.0, 128.0, 128.0)


def _matrix(x: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    matrix = x.new_tensor(_TO_YCBCR)[rows] / 255
    return matrix[:, :, None, None], x.new_tensor(_OFFSET)[rows] / 255


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] -> (B, 1, H, W)."""
    return F.conv2d(x, *_matrix(x, slice(0, 1)))


def _colour_differences(x: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] -> (B, 2, H, W)."""
    return F.conv2d(x, *_matrix(x, slice(1, 3)))


def _to_rgb(x: Tensor) -> Tensor:
    """(B, 3, H, W) luma and colour differences -> RGB."""
    matrix = torch.linalg.inv(torch.tensor(_TO_YCBCR, dtype=torch.float64) / 255).to(x)
    offset = x.new_tensor(_OFFSET).view(3, 1, 1) / 255
    return F.conv2d(x - offset, matrix[:, :, None, None])


# --- The collapsible linear block ----------------------------------------------------------------


class CollapsibleConv2d(nn.Module):
    """k x k to `expansion` channels, then 1x1 to the output, with a short residual if `residual`.

    x: (B, C_in, H, W) -> (B, C_out, H, W). `collapsed`: whether it forms the narrow kernel
    (`collapse`) and convolves once, or convolves twice.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        *,
        expansion: int = EXPANSION,
        residual: bool = False,
        collapsed: bool = True,
    ):
        super().__init__()
        if residual and channels != out:
            raise ValueError(f"residual: {channels} channels cannot be added to {out}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel: {kernel} has no centre; it must be odd")
        self.residual, self.collapsed = residual, collapsed
        self.expand = nn.Conv2d(channels, expansion, kernel, padding=kernel // 2)
        self.project = nn.Conv2d(expansion, out, 1)

    def collapse(self) -> tuple[Tensor, Tensor]:
        """The narrow kernel (C_out, C_in, k, k) and bias (C_out,), differentiable."""
        wide, narrow = self.expand.weight, self.project.weight.flatten(1)
        assert self.expand.bias is not None and self.project.bias is not None
        kernel = (narrow @ wide.flatten(1)).unflatten(1, wide.shape[1:])
        if self.residual:
            kernel = kernel + _identity_kernel(kernel)
        return kernel, torch.addmv(self.project.bias, narrow, self.expand.bias)

    @torch.no_grad()
    def start_from(self, kernel: Tensor, bias: Tensor) -> None:
        """Set the wide weights to ones that collapse to this narrow kernel and bias.

        The k x k weights stay as they were drawn. Where they are fewer than a kernel has entries,
        the first of them are replaced by the kernel itself, so that a solution exists.
        """
        wanted = kernel - _identity_kernel(kernel) if self.residual else kernel
        wanted = wanted.flatten(1).double()
        wide = self.expand.weight.flatten(1).double()
        if wide.shape[0] < wide.shape[1]:
            size = wide.norm(dim=1).mean()
            lengths = wanted.norm(dim=1, keepdim=True).clamp_min(1e-12)
            wide[: len(wanted)] = wanted / lengths * size
            self.expand.weight.copy_(wide.view_as(self.expand.weight))
        narrow = torch.linalg.lstsq(wide.mT, wanted.mT).solution.mT
        assert self.expand.bias is not None and self.project.bias is not None
        self.project.weight.copy_(narrow[:, :, None, None])
        self.project.bias.copy_(bias - narrow @ self.expand.bias.double())

    def forward(self, x: Tensor) -> Tensor:
        if self.collapsed:
            kernel, bias = self.collapse()
            return F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)
        y = self.project(self.expand(x))
        return y + x if self.residual else y


def _identity_kernel(kernel: Tensor) -> Tensor:
    """1 at the centre tap where output and input channel are the same: convolves to the input."""
    identity = torch.zeros_like(kernel)
    centre = kernel.shape[-1] // 2
    identity[:, :, centre, centre].fill_diagonal_(1)
    return identity


# --- The network ---------------------------------------------------------------------------------


class SESRBody(nn.Module):
    """The network itself, on luma: (B, 1, H, W) -> (B, 1, scale H, scale W)."""

    def __init__(self, config: SESRConfig):
        super().__init__()
        self.config = config
        widths, out = config.all_widths, config.scale**2

        def activation(width: int) -> nn.Module:
            return nn.PReLU(width, 0.25) if config.activation == "prelu" else nn.ReLU()

        self.first = nn.Conv2d(1, widths[0], 5, padding=2)
        self.blocks = nn.ModuleList(
            nn.Conv2d(before, width, 3, padding=1) for before, width in itertools.pairwise(widths)
        )
        self.last = nn.Conv2d(widths[-1], out, 5, padding=2)
        self.activations = nn.ModuleList(activation(width) for width in widths)
        self.shuffle = nn.Sequential(
            *(nn.PixelShuffle(2) for _ in range(config.scale.bit_length() - 1))
        )

    def stack(self) -> kernels.ConvStack | None:
        """The parameters as one kernel takes them; None for wide blocks and pruned widths."""
        convolutions: list[Any] = [self.first, *self.blocks, self.last]
        plain = all(type(convolution) is nn.Conv2d for convolution in convolutions)
        if not plain or self.config.widths:
            return None
        slopes = [
            activation.weight if isinstance(activation, nn.PReLU) else torch.zeros_like(c.bias)
            for activation, c in zip(self.activations, convolutions, strict=False)
        ]
        return kernels.ConvStack(
            self.first.weight,
            torch.stack([convolution.weight for convolution in convolutions[1:-1]]),
            self.last.weight,
            torch.stack([convolution.bias for convolution in convolutions[:-1]]),
            torch.stack(slopes),
            convolutions[-1].bias,
        )

    def _in_one_kernel(self, x: Tensor) -> kernels.ConvStack | None:
        """The stack where nobody trains the layers or looks at what is between them, on a GPU.

        In half precision, which is what the kernel is for; the features of a SESR stay below 10.
        """
        # Asked of the weights, since a traced x has no type.
        if self.training or torch.is_grad_enabled() or next(self.parameters()).dtype not in HALVES:
            return None
        from ..kernels.dispatch import use_triton  # which loads Triton

        if not use_triton(x) or any(module._forward_hooks for module in self.activations):
            return None
        return self.stack()

    def forward(self, x: Tensor) -> Tensor:
        stack = self._in_one_kernel(x)
        if stack is not None:
            return kernels.enlarge_by_convolutions(x, stack)
        first = self.activations[0](self.first(x))
        y = first
        for convolution, activation in zip(self.blocks, self.activations[1:], strict=True):
            y = activation(convolution(y))
        return self.shuffle(self.last(y + first) + x)


class SESR(nn.Module):
    """SESR on pictures in [0, 1]: (B, 3, H, W) RGB -> (B, 3, scale H, scale W), or luma of 1 channel.

    Narrow; `widened` makes the form that is trained.
    """

    luma_only = True  # what is trained and measured is luma
    window_size = 1

    def __init__(self, config: SESRConfig):
        super().__init__()
        self.config = config
        self.body = SESRBody(config)
        with torch.no_grad():  # as if collapsed from wide blocks: near the identity
            for convolution in self.body.blocks:
                assert isinstance(convolution, nn.Conv2d)
                convolution.weight.mul_(0.3).add_(_identity_kernel(convolution.weight))

    @property
    def scale(self) -> int:
        return self.config.scale

    @property
    def feature_modules(self) -> nn.ModuleList:
        """The modules whose outputs a student is asked to match (B, f, H, W): the activations."""
        return self.body.activations

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return self.body(x)
        colours = _colour_differences(x)
        if x.dtype in (torch.float16, torch.bfloat16):  # bicubic is not there on every device
            colours = colours.float()
        colours = F.interpolate(
            colours, scale_factor=self.scale, mode="bicubic", antialias=True
        ).to(x.dtype)
        return _to_rgb(torch.cat([self.body(luma(x)), colours], 1))

    def _convolutions(self) -> list[tuple[nn.Module, str]]:
        body = self.body
        return [
            (body, "first"),
            *((body.blocks, str(i)) for i in range(len(body.blocks))),
            (body, "last"),
        ]

    def widened(self, *, block: str = "collapsed", expansion: int = EXPANSION) -> SESR:
        """A copy that computes the same with collapsible linear blocks: the form that is trained.

        Raises ValueError for an unknown block and an expansion below the features, scale^2.
        """
        if block not in BLOCKS:
            raise ValueError(f"block: {block!r} is not one of {', '.join(BLOCKS)}")
        least = max(*self.config.all_widths, self.config.scale**2)
        if expansion < least:
            raise ValueError(f"expansion: {expansion} is below {least}, the widest narrow layer")
        wide = SESR(self.config)
        wide.load_state_dict(self.state_dict())
        for parent, name in wide._convolutions():
            narrow = getattr(parent, name)
            new = CollapsibleConv2d(
                narrow.in_channels,
                narrow.out_channels,
                narrow.kernel_size[0],
                expansion=expansion,
                residual=parent is wide.body.blocks and narrow.in_channels == narrow.out_channels,
                collapsed=block == "collapsed",
            )
            new.start_from(narrow.weight, narrow.bias)
            setattr(parent, name, new)
        return wide.to(next(self.parameters()).device)

    @torch.no_grad()
    def collapsed(self) -> SESR:
        """A narrow copy, whatever of the network is wide."""
        narrow = SESR(self.config).to(next(self.parameters()))
        state = narrow.state_dict()
        state |= {name: tensor for name, tensor in self.state_dict().items() if name in state}
        for name, module in self.named_modules():
            if isinstance(module, CollapsibleConv2d):
                state[f"{name}.weight"], state[f"{name}.bias"] = module.collapse()
        narrow.load_state_dict(state)
        return narrow.train(self.training)


def training_macs(config: SESRConfig, block: str, expansion: int = EXPANSION) -> tuple[int, int]:
    """Multiply-adds of a training step's forward: for each pixel of LR, and once for a step.

    Once a step is what "collapsed" blocks take to form their kernels. Pushing impulses through the
    blocks, as the paper does, takes some 20 times as many as the product here.
    """
    width, out = config.features, config.scale**2
    layers = [(1, width, 25), *[(width, width, 9)] * config.blocks, (width, out, 25)]
    if block == "expanded":
        return sum(i * taps * expansion + expansion * o for i, o, taps in layers), 0
    narrow = sum(i * o * taps for i, o, taps in layers)
    return narrow, narrow * expansion


# --- State dicts ---------------------------------------------------------------------------------

Config, Network = SESRConfig, SESR


def recognizes(state: Mapping[str, Any]) -> bool:
    return {"body.first.weight", "body.blocks.0.weight", "body.last.weight"} <= set(state)


def read_config(state: Mapping[str, Tensor]) -> SESRConfig:
    """Every hyper-parameter from a narrow state dict."""
    blocks = 0
    while f"body.blocks.{blocks}.weight" in state:
        blocks += 1
    names = ["body.first", *(f"body.blocks.{i}" for i in range(blocks))]
    widths = tuple(state[f"{name}.weight"].shape[0] for name in names)
    return SESRConfig(
        scale={4: 2, 16: 4}.get(state["body.last.weight"].shape[0], 0),
        blocks=blocks,
        features=widths[0],
        widths=widths if len(set(widths)) > 1 else (),
        activation="prelu" if "body.activations.0.weight" in state else "relu",
    )


def from_state_dict(state: Mapping[str, Tensor]) -> SESR:
    """A narrow SESR in float32 with the given parameters."""
    with torch.random.fork_rng(devices=[]):  # initial weights, all overwritten
        model = SESR(read_config(state))
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model
