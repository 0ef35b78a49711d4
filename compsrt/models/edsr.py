"""EDSR and its residual-in-residual form: convolutions, ReLU and sums, nothing else.

    edsr   head   n blocks  x + conv(relu(conv(x)))   conv   + skip   tail
    rir    head   groups of such blocks and one conv, each with a skip   conv   + skip   tail

EDSR (Lim et al., CVPR Workshops 2017) has no batch norm; "rir" is RCAN (Zhang et al., ECCV 2018)
without channel attention. The light tail is one convolution to 3 scale^2 channels and a pixel
shuffle, as in SRP (Zhang et al., ICLR 2022, LEDSR and RIRSR); the other one is EDSR's upsampler.
Every width is in the configuration: `channels` of everything that a skip adds to (so they are one
number) and `hidden` inside each block, so that a pruned network is a network like any other.

Parameter names are those of EDSR-PyTorch (and RCAN). Its networks work on colours from 0 to 255;
because ReLU and convolutions are homogeneous, f(255 x; W, b) = 255 f(x; W, b / 255), so a state dict
that has its mean shift in that range is read by dividing the biases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

FORMS = ("edsr", "rir")
TAILS = ("light", "upsampler")
MEAN_RGB = (0.4488, 0.4371, 0.4040)  # of DIV2K, subtracted before and added after


@dataclasses.dataclass(frozen=True)
class EDSRConfig:
    """Hyper-parameters of an EDSR; the defaults are the dense network of SRPN-Lite x2.

    scale: 2, 3 or 4. channels: of head, second convolutions and everything that a skip adds.
    hidden: the first convolutions' channels, one tuple a group ("edsr" has one group). tail:
    "light", or "upsampler" with upsample_channels at every stage. residual_scale: what a block
    multiplies its branch by (0.1 in the published EDSR of 32 x 256, 1 in the baseline).
    """

    scale: int = 2
    form: str = "edsr"
    channels: int = 256
    hidden: tuple[tuple[int, ...], ...] = ((256,) * 16,)
    tail: str = "light"
    upsample_channels: int = 0
    residual_scale: float = 1.0

    def __post_init__(self):
        if self.scale not in (2, 3, 4):
            raise ValueError(f"scale: {self.scale} is not one of 2, 3, 4")
        if self.form not in FORMS:
            raise ValueError(f"form: {self.form!r} is not one of {', '.join(FORMS)}")
        if self.tail not in TAILS:
            raise ValueError(f"tail: {self.tail!r} is not one of {', '.join(TAILS)}")
        if not self.hidden or not all(self.hidden):
            raise ValueError("hidden: every group needs at least one block")
        if self.form == "edsr" and len(self.hidden) != 1:
            raise ValueError(f"hidden: the form 'edsr' has one group, not {len(self.hidden)}")
        if min(self.channels, *(width for group in self.hidden for width in group)) < 1:
            raise ValueError("channels and hidden: every width must be at least 1")
        if (self.tail == "light") != (self.upsample_channels == 0) or self.upsample_channels < 0:
            raise ValueError(
                f"upsample_channels: {self.upsample_channels} does not go with the tail"
                f" {self.tail!r}: 0 for 'light', at least 1 for 'upsampler'"
            )

    @classmethod
    def uniform(
        cls, scale: int, *, blocks: int, channels: int, groups: int = 0, tail: str = "light"
    ) -> EDSRConfig:
        """One width throughout: groups 0 is EDSR of `blocks`; else that many groups of `blocks`."""
        return cls(
            scale=scale,
            form="rir" if groups else "edsr",
            channels=channels,
            hidden=((channels,) * blocks,) * max(groups, 1),
            tail=tail,
            upsample_channels=channels if tail == "upsampler" else 0,
        )


# --- Modules -------------------------------------------------------------------------------------


def _conv(cin: int, cout: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, padding=1)


class ResidualBlock(nn.Module):
    """x + scale * conv(relu(conv(x))) on (B, C, H, W)."""

    def __init__(self, channels: int, hidden: int, scale: float):
        super().__init__()
        self.scale = scale
        self.body = nn.Sequential(
            _conv(channels, hidden), nn.ReLU(inplace=True), _conv(hidden, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + (y if self.scale == 1 else y * self.scale)


class ResidualGroup(nn.Module):
    """Blocks and a convolution, with a skip around: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, hidden: tuple[int, ...], scale: float):
        super().__init__()
        self.body = nn.Sequential(*_blocks(channels, hidden, scale), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _blocks(channels: int, hidden: tuple[int, ...], scale: float) -> list[nn.Module]:
    return [ResidualBlock(channels, width, scale) for width in hidden]


def _factors(scale: int) -> list[int]:
    """Of the pixel shuffles one after another."""
    return [3] if scale == 3 else [2] * int(math.log2(scale))


def _tail(config: EDSRConfig) -> nn.Sequential:
    channels, width = config.channels, config.upsample_channels
    if config.tail == "light":
        return nn.Sequential(_conv(channels, 3 * config.scale**2), nn.PixelShuffle(config.scale))
    stages = []
    for factor in _factors(config.scale):
        stages += [_conv(channels, factor**2 * width), nn.PixelShuffle(factor)]
        channels = width
    return nn.Sequential(nn.Sequential(*stages), _conv(width, 3))


class EDSR(nn.Module):
    """EDSR on pictures in [0, 1]: (B, 3, H, W) -> (B, 3, scale H, scale W), any size."""

    window_size = 1
    mean: Tensor

    def __init__(self, config: EDSRConfig):
        super().__init__()
        self.config = config
        channels, scale = config.channels, config.residual_scale
        self.register_buffer("mean", torch.tensor(MEAN_RGB).view(1, -1, 1, 1), persistent=False)
        if scale != 1:  # no shape tells it, so a file has to
            self.register_buffer("residual_scale", torch.tensor(scale))
        self.head = nn.Sequential(_conv(3, channels))
        if config.form == "edsr":
            parts = _blocks(channels, config.hidden[0], scale)
        else:
            parts = [ResidualGroup(channels, hidden, scale) for hidden in config.hidden]
        self.body = nn.Sequential(*parts, _conv(channels, channels))
        self.tail = _tail(config)

    @property
    def scale(self) -> int:
        return self.config.scale

    def forward(self, x: Tensor) -> Tensor:
        # Channels last: a training step on a CPU takes 0.8 times as long (8 blocks, 32 channels).
        x = self.head((x - self.mean).contiguous(memory_format=torch.channels_last))
        return self.tail(self.body(x) + x) + self.mean


# --- State dicts ---------------------------------------------------------------------------------

Config, Network = EDSRConfig, EDSR
_FIRST = {"edsr": "body.0.body.0.weight", "rir": "body.0.body.0.body.0.weight"}
_SHIFTS = ("sub_mean", "add_mean")


def recognizes(state: Mapping[str, Tensor]) -> bool:
    return (
        "head.0.weight" in state
        and any(key in state for key in _FIRST.values())
        and any(key in state for key in ("tail.0.weight", "tail.0.0.weight"))
        and not any("conv_du" in key for key in state)  # channel attention
    )


def read_config(state: Mapping[str, Tensor]) -> EDSRConfig:
    """Every hyper-parameter from a state dict; ValueError where it is none that is known here."""

    def widths(prefix: str) -> tuple[int, ...]:
        found = []
        while (weight := state.get(f"{prefix}{len(found)}.body.0.weight")) is not None:
            found.append(weight.shape[0])
        return tuple(found)

    form = "rir" if _FIRST["rir"] in state else "edsr"
    hidden = []
    if form == "edsr":
        hidden.append(widths("body."))
    else:
        while f"body.{len(hidden)}.body.0.body.0.weight" in state:
            hidden.append(widths(f"body.{len(hidden)}.body."))
    channels = state["head.0.weight"].shape[0]
    width = 0
    if "tail.1.weight" not in state:
        squared = state["tail.0.weight"].shape[0] // 3
    else:
        width = state["tail.1.weight"].shape[1]
        stages = sum(key.startswith("tail.0.") and key.endswith(".weight") for key in state)
        squared = (state["tail.0.0.weight"].shape[0] // width) ** stages
    residual_scale = 1.0
    if "residual_scale" in state:
        residual_scale = round(float(state["residual_scale"]), 6)
    elif width == channels == 256 and hidden == [(256,) * 32]:
        residual_scale = 0.1  # the published EDSR, whose file does not say it
    return EDSRConfig(
        scale=math.isqrt(squared),
        form=form,
        channels=channels,
        hidden=tuple(hidden),
        tail="upsampler" if width else "light",
        upsample_channels=width,
        residual_scale=residual_scale,
    )


def from_state_dict(state: Mapping[str, Tensor]) -> EDSR:
    """An EDSR in float32 with the given parameters, its biases for colours in [0, 1]."""
    value_range = _value_range(state)
    parameters = {
        key: value.float() / (value_range if key.endswith(".bias") else 1)
        for key, value in state.items()
        if key.partition(".")[0] not in _SHIFTS
    }
    if "tail.1.weight" not in parameters:  # SRP's LEDSR nests its light tail
        parameters = {key.replace("tail.0.0.", "tail.0."): v for key, v in parameters.items()}
    with torch.random.fork_rng(devices=[]):  # initial weights, all overwritten
        model = EDSR(read_config(parameters))
    model.load_state_dict(parameters)
    return model


def _value_range(state: Mapping[str, Tensor]) -> float:
    """1 or 255: the white that a state dict's mean shift is made for."""
    if "sub_mean.bias" not in state:
        return 1.0
    shift, mean = state["sub_mean.bias"].float(), torch.tensor(MEAN_RGB)
    weight = state["sub_mean.weight"].float().flatten(1)
    for value_range in (1.0, 255.0):
        close = torch.allclose(-shift, mean * value_range, atol=1e-3 * value_range)
        if close and torch.equal(weight, torch.eye(3)):
            return value_range
    raise ValueError(
        f"EDSR with a mean shift of {shift.tolist()} is not supported: only DIV2K's mean, times 1"
        " or 255, and no division by a standard deviation"
    )
