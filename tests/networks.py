"""Small networks and pictures that several test files share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compsrt import models
from compsrt.models.sesr import SESR, SESRConfig
from compsrt.models.swinir import SwinIR, SwinIRConfig


def tiny_swinir(seed: int = 0, **changes) -> SwinIR:
    """A random SwinIR, x2, 24 wide, one plain and one shifted block; norms away from identity."""
    config = {
        "scale": 2,
        "depths": (2,),
        "embed_dim": 24,
        "num_heads": (2,),
        "mlp_hidden": (48,),
        **changes,
    }
    torch.manual_seed(seed)
    model = SwinIR(SwinIRConfig(**config)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif "table" in name or "attn" in name or "mlp" in name:
            parameter.mul_(8)
    return model


def tiny_sesr(seed: int = 0, **changes) -> SESR:
    """A random SESR, x2, three blocks of 8, that adds a little to the picture; slopes of both signs."""
    torch.manual_seed(seed)
    model = SESR(SESRConfig(**{"scale": 2, "blocks": 3, "features": 8, **changes}))
    model = model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "activations" in name:
            parameter.uniform_(-0.2, 0.6)
    model.body.last.weight.mul_(0.2)
    model.body.last.bias.mul_(0.2)
    return model


def golden_swinir(file) -> SwinIR:
    """The float network of a swinir_tiny_x*.npz, in float32."""
    state = {key[2:]: torch.from_numpy(file[key]) for key in file.files if key.startswith("w/")}
    return models.from_state_dict(state).eval().requires_grad_(False)


def write_pictures(folder: Path, count: int = 4, height: int = 96, width: int = 112) -> Path:
    """Smooth random photographs as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3))
        image = Image.fromarray(noise.astype(np.uint8))
        image.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"p{number}.png")
    return folder
