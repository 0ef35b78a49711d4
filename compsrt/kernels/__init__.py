"""Tensors in, tensors out: the ops that compression needs, importable on their own.

A name is looked up when it is first used (PEP 562): importing this package, or only its
`reference`, loads no Triton. Which implementation then runs is decided in `dispatch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import quant_window_attention
    from .bounds import search_bounds
    from .conv_stack import enlarge_by_convolutions
    from .convolution import convolve
    from .fake_quant import fake_quantize
    from .hadamard import hadamard_transform
    from .hadamard_fake_quant import hadamard_fake_quantize
    from .linear import masked_matmul, quant_linear, quant_linears
    from .mlp import quant_mlp
    from .norm import layer_norm
    from .reference import (
        ConvStack,
        FoldedBlock,
        Grid,
        LayerNormWeights,
        PackedWeight,
        QuantLayer,
        QuantWeight,
        dequantize,
        fold_block,
        pack_weight,
        quant_matmul,
        quantize_codes,
        step_and_zero,
    )
    from .swin_block import quant_swin_block

__all__ = [
    "ConvStack",
    "FoldedBlock",
    "Grid",
    "LayerNormWeights",
    "PackedWeight",
    "QuantLayer",
    "QuantWeight",
    "convolve",
    "dequantize",
    "enlarge_by_convolutions",
    "fake_quantize",
    "fold_block",
    "hadamard_fake_quantize",
    "hadamard_transform",
    "layer_norm",
    "masked_matmul",
    "pack_weight",
    "quant_linear",
    "quant_linears",
    "quant_matmul",
    "quant_mlp",
    "quant_swin_block",
    "quant_window_attention",
    "quantize_codes",
    "search_bounds",
    "step_and_zero",
]

_FILES = {  # of the ops that have a kernel; all else is in reference/
    "convolve": "convolution",
    "enlarge_by_convolutions": "conv_stack",
    "fake_quantize": "fake_quant",
    "hadamard_fake_quantize": "hadamard_fake_quant",
    "hadamard_transform": "hadamard",
    "layer_norm": "norm",
    "masked_matmul": "linear",
    "quant_linear": "linear",
    "quant_linears": "linear",
    "quant_mlp": "mlp",
    "quant_swin_block": "swin_block",
    "quant_window_attention": "attention",
    "search_bounds": "bounds",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_FILES.get(name, 'reference')}", __name__)
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
