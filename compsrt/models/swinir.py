"""SwinIR (Liang et al., ICCV Workshops 2021): a float network of shifted-window transformer blocks.

Parameter names are the official ones, so official state dicts load as they are; every
hyper-parameter is read off the shapes of a state dict (`read_config`). Inside, tokens stay in one
(B, H, W, C) grid, which is a picture in channels-last order: convolutions see it through a
`permute` without a copy. Shift masks and position indices depend only on sizes and are computed
when they are needed, so a picture of any height and width passes; sides that are no multiple of
the window are padded by reflection (the edge row repeated) and the output is cropped. With weights
of half precision the tokens stay float32 (`layers.py` says why).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.reference.windows import add_bias, from_windows, to_windows
from ..kernels.reference.windows import shift_mask as shift_mask  # a name of this file too
from .layers import Conv2d, LayerNorm
from .replay import Replay

UPSAMPLERS = ("pixelshuffledirect", "pixelshuffle")
MEAN_RGB = (0.4488, 0.4371, 0.4040)  # of DIV2K, subtracted before and added after


@dataclasses.dataclass(frozen=True)
class SwinIRConfig:
    """Hyper-parameters of a SwinIR; the defaults are SwinIR-light x4.

    head_dim: channels of a head, one entry a layer; () where all are embed_dim / heads, as they
    are unless heads were pruned.
    """

    scale: int = 4
    depths: tuple[int, ...] = (6, 6, 6, 6)
    embed_dim: int = 60
    num_heads: tuple[int, ...] = (6, 6, 6, 6)
    window_size: int = 8
    mlp_hidden: tuple[int, ...] = (120, 120, 120, 120)
    upsampler: str = "pixelshuffledirect"
    resi_connection: str = "1conv"
    in_channels: int = 3
    upsample_channels: int = 64
    qkv_bias: bool = True
    patch_norm: bool = True
    head_dim: tuple[int, ...] = ()

    def __post_init__(self):
        if not len(self.depths) == len(self.num_heads) == len(self.mlp_hidden) >= 1:
            raise ValueError(
                f"depths {self.depths}, num_heads {self.num_heads} and mlp_hidden"
                f" {self.mlp_hidden} must have one entry a layer"
            )
        if self.head_dim and len(self.head_dim) != len(self.depths):
            raise ValueError(f"head_dim: {self.head_dim} must have one entry a layer, or none")
        for heads in self.num_heads:
            if heads < 1 or (not self.head_dim and self.embed_dim % heads):
                raise ValueError(f"embed_dim: {self.embed_dim} is not divisible by {heads} heads")
        if min(self.head_dim, default=1) < 1 or min(self.mlp_hidden) < 1:
            raise ValueError("head_dim and mlp_hidden: every width must be at least 1")
        if self.upsampler not in UPSAMPLERS:
            raise ValueError(
                f"upsampler: {self.upsampler!r} is not supported; one of {', '.join(UPSAMPLERS)}"
            )
        if self.scale not in (1, 2, 3, 4, 8):
            raise ValueError(f"scale: {self.scale} is not one of 2, 3, 4, 8")

    def head_dim_of(self, layer: int) -> int:
        """Channels of each head in a layer."""
        return self.head_dim[layer] if self.head_dim else self.embed_dim // self.num_heads[layer]


# --- Padding ---------------------------------------------------------------------------------------


def mirror_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Continue (B, C, H, W) below and to the right by its mirror image (the edge repeated)."""
    for dim in (2, 3):
        size = x.shape[dim]
        padded = -(-size // multiple) * multiple
        if padded > 2 * size:
            i = torch.arange(padded, device=x.device) % (2 * size)
            x = x.index_select(dim, torch.where(i < size, i, 2 * size - 1 - i))
        elif padded > size:
            x = torch.cat([x, x.narrow(dim, 2 * size - padded, padded - size).flip(dim)], dim)
    return x


# --- Modules ---------------------------------------------------------------------------------------


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for each relative position.

    heads * head_dim need not be dim: heads can be pruned.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, window: int, qkv_bias: bool = True):
        super().__init__()
        self.heads, self.head_dim, self.window = heads, head_dim, window
        inner = heads * head_dim
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, size: tuple[int, int, int, int]) -> Tensor:
        """x: (B * windows, N, C); size: height, width, window, shift. Returns x's shape."""
        b, n, _ = x.shape
        windows = size[0] // self.window * (size[1] // self.window)
        shape = -1, windows, n, 3, self.heads, self.head_dim
        q, k, v = self.qkv(x).view(shape).permute(3, 0, 1, 4, 2, 5)
        scores = (q * self.head_dim**-0.5) @ k.mT
        scores = add_bias(scores, self.relative_position_bias_table, size).softmax(-1)
        y = v.mT @ scores.mT  # (scores @ v)^T: on a CPU in half of the time
        return self.proj(y.movedim(-1, 2).reshape(b, n, -1))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on a token grid (B, H, W, C)."""

    def __init__(self, config: SwinIRConfig, layer: int, shift: int):
        super().__init__()
        dim, window = config.embed_dim, config.window_size
        self.window, self.shift = window, shift
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(
            dim, config.num_heads[layer], config.head_dim_of(layer), window, config.qkv_bias
        )
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, config.mlp_hidden[layer])

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        size = height, width, self.window, self.shift
        dtype = self.attn.qkv.weight.dtype
        windows = to_windows(self.norm1(x).to(dtype), self.window, self.shift)
        x = x + from_windows(self.attn(windows, size), *size)
        return x + self.mlp(self.norm2(x).to(dtype))


def _conv(cin: int, cout: int, kernel: int = 3) -> Conv2d:
    return Conv2d(cin, cout, kernel, padding=kernel // 2)


class _ThreeConvs(nn.Sequential):
    """Three convolutions through a quarter of the channels, with leaky ReLUs between."""

    def __init__(self, dim: int):
        super().__init__(
            _conv(dim, dim // 4),
            nn.LeakyReLU(0.2),
            _conv(dim // 4, dim // 4, 1),
            nn.LeakyReLU(0.2),
            _conv(dim // 4, dim),
        )

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        x = self[0](x, slope=self[1].negative_slope)
        return self[4](self[2](x, slope=self[3].negative_slope), residual=residual)


def _residual_conv(dim: int, kind: str) -> nn.Module:
    return _conv(dim, dim) if kind == "1conv" else _ThreeConvs(dim)


def _picture(tokens: Tensor) -> Tensor:
    """(B, H, W, C) tokens as the picture that they are in channels-last order, no copy."""
    return tokens.permute(0, 3, 1, 2)


class ResidualLayer(nn.Module):
    """RSTB: Swin blocks, every second one shifted, then a convolution, with a residual around."""

    def __init__(self, config: SwinIRConfig, index: int):
        super().__init__()
        shifts = (config.window_size // 2 * (i % 2) for i in range(config.depths[index]))
        blocks = (SwinBlock(config, index, shift) for shift in shifts)
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.conv = _residual_conv(config.embed_dim, config.resi_connection)

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.residual_group["blocks"]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        return self.conv(_picture(y), residual=_picture(x)).permute(0, 2, 3, 1)


class _PatchEmbed(nn.Module):
    """Holds the norm of the first tokens under its official name."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = LayerNorm(dim)


class SwinIR(nn.Module):
    """SwinIR on RGB (or grey) pictures in [0, 1]: (B, C, H, W) -> (B, C, scale H, scale W)."""

    mean: Tensor
    layers: nn.ModuleList
    upsample: nn.Sequential
    replay: Replay | None

    def __init__(self, config: SwinIRConfig):
        super().__init__()
        self.config = config
        self.replay = None  # set where the network is only run
        dim, channels = config.embed_dim, config.in_channels
        mean = MEAN_RGB if channels == 3 else (0.0,) * channels
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.conv_first = _conv(channels, dim)
        if config.patch_norm:
            self.patch_embed = _PatchEmbed(dim)
        self.layers = nn.ModuleList(ResidualLayer(config, i) for i in range(len(config.depths)))
        self.norm = LayerNorm(dim)
        self.conv_after_body = _residual_conv(dim, config.resi_connection)
        scale = config.scale
        if config.upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(
                _conv(dim, scale * scale * channels), nn.PixelShuffle(scale)
            )
        else:
            width = config.upsample_channels
            self.conv_before_upsample = nn.Sequential(_conv(dim, width), nn.LeakyReLU())
            factors = [3] if scale == 3 else [2] * int(math.log2(scale))
            self.upsample = nn.Sequential(
                *(
                    module
                    for factor in factors
                    for module in (_conv(width, factor**2 * width), nn.PixelShuffle(factor))
                )
            )
            self.conv_last = _conv(width, channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _apply(self, fn, recurse=True):
        mean = self.mean
        super()._apply(fn, recurse)
        self.mean = mean.to(self.mean.device)  # not rounded with the weights
        return self

    @property
    def scale(self) -> int:
        return self.config.scale

    @property
    def window_size(self) -> int:
        return self.config.window_size

    @property
    def feature_modules(self) -> nn.ModuleList:
        """The modules whose outputs a student is asked to match (B, H, W, C): the layers."""
        return self.layers

    def named_blocks(self) -> Iterator[tuple[str, nn.ModuleList, int, nn.Module]]:
        """(official name, parent list, position, block) of every Swin block."""
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, ResidualLayer)
            for j, block in enumerate(layer.blocks):
                yield f"layers.{i}.residual_group.blocks.{j}", layer.blocks, j, block

    def forward(self, x: Tensor) -> Tensor:
        if self.replay is not None:
            return self.replay(self._enlarge, x)
        return self._enlarge(x)

    def _enlarge(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        given, stream = x.dtype, self.norm.weight.dtype
        mean = self.mean.flatten()
        x = mirror_to_multiple(x, self.config.window_size)
        first = self.conv_first(x, mean=mean, dtype=stream)
        tokens = first.permute(0, 2, 3, 1)
        if self.config.patch_norm:
            tokens = self.patch_embed.norm(tokens)
        for layer in self.layers:
            tokens = layer(tokens)
        x = self.conv_after_body(_picture(self.norm(tokens)), residual=first)
        if self.config.upsampler == "pixelshuffle":
            before, leaky = self.conv_before_upsample
            x = before(x, slope=leaky.negative_slope)
            stages = list(self.upsample)
            for conv, shuffle in zip(stages[::2], stages[1::2], strict=True):
                x = conv(x, shuffle=shuffle.upscale_factor)
            x = self.conv_last(x, offset=mean, dtype=given)
        else:
            x = self.upsample[0](x, shuffle=self.scale, offset=mean, dtype=given)
        return x[..., : height * self.scale, : width * self.scale]


# --- State dicts -----------------------------------------------------------------------------------

Config, Network = SwinIRConfig, SwinIR
_BUFFERS = ("relative_position_index", "attn_mask")


def recognizes(state: Mapping[str, Tensor]) -> bool:
    return {"conv_first.weight", "layers.0.residual_group.blocks.0.attn.qkv.weight"} <= set(state)


def read_config(state: Mapping[str, Tensor]) -> SwinIRConfig:
    """Every hyper-parameter of a SwinIR from its state dict; ValueError where it is none we can run."""
    unsupported = {
        "absolute_pos_embed": "absolute position embedding",
        "conv_up1.weight": "upsampler 'nearest+conv'",
    }
    for key, what in unsupported.items():
        if key in state:
            raise ValueError(f"SwinIR with {what} is not supported")
    if "upsample.0.weight" not in state:
        raise ValueError("SwinIR without an upsampler (denoising, JPEG) is not supported")
    embed_dim, in_channels = state["conv_first.weight"].shape[:2]
    depths, heads, head_dim, hidden = [], [], [], []
    while f"layers.{len(depths)}.residual_group.blocks.0.norm1.weight" in state:
        prefix = f"layers.{len(depths)}.residual_group.blocks."
        depth = 0
        while f"{prefix}{depth}.norm1.weight" in state:
            depth += 1
        depths.append(depth)
        heads.append(state[f"{prefix}0.attn.relative_position_bias_table"].shape[1])
        head_dim.append(state[f"{prefix}0.attn.proj.weight"].shape[1] // heads[-1])
        hidden.append(state[f"{prefix}0.mlp.fc1.weight"].shape[0])
    table = state["layers.0.residual_group.blocks.0.attn.relative_position_bias_table"]
    usual = all(n * d == embed_dim for n, d in zip(heads, head_dim, strict=True))
    window = (math.isqrt(table.shape[0]) + 1) // 2
    upsample_channels = 64
    if "conv_before_upsample.0.weight" in state:
        upsampler = "pixelshuffle"
        upsample_channels = state["conv_last.weight"].shape[1]
        scale = 1
        for key, weight in state.items():
            if key.startswith("upsample.") and key.endswith(".weight"):
                scale *= math.isqrt(weight.shape[0] // weight.shape[1])
    else:
        upsampler = "pixelshuffledirect"
        scale = math.isqrt(state["upsample.0.weight"].shape[0] // in_channels)
    return SwinIRConfig(
        scale=scale,
        depths=tuple(depths),
        embed_dim=embed_dim,
        num_heads=tuple(heads),
        head_dim=() if usual else tuple(head_dim),
        window_size=window,
        mlp_hidden=tuple(hidden),
        upsampler=upsampler,
        resi_connection="1conv" if "layers.0.conv.weight" in state else "3conv",
        in_channels=in_channels,
        upsample_channels=upsample_channels,
        qkv_bias="layers.0.residual_group.blocks.0.attn.qkv.bias" in state,
        patch_norm="patch_embed.norm.weight" in state,
    )


def from_state_dict(state: Mapping[str, Tensor]) -> SwinIR:
    """A SwinIR in float32 with the given official parameters; official buffers are left out."""
    parameters = {
        key: value.float() if value.is_floating_point() else value
        for key, value in state.items()
        if key.rpartition(".")[2] not in _BUFFERS and key != "mean"
    }
    with torch.device("meta"):
        model = SwinIR(read_config(parameters))
    missing, unexpected = model.load_state_dict(parameters, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(
            f"SwinIR state dict: {len(missing)} parameters missing"
            f" ({', '.join(missing[:2])}{'...' if len(missing) > 2 else ''}),"
            f" {len(unexpected)} unknown"
            f" ({', '.join(unexpected[:2])}{'...' if len(unexpected) > 2 else ''})"
        )
    mean = MEAN_RGB if model.config.in_channels == 3 else (0.0,) * model.config.in_channels
    model.mean = torch.tensor(mean).view(1, -1, 1, 1)
    return model.requires_grad_(True)
