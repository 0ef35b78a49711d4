"""Every op in plain PyTorch: the definition of right, and what runs on a CPU."""

from .attention import quant_window_attention
from .conv_stack import ConvStack, enlarge_by_convolutions
from .convolution import convolve
from .folded import FoldedBlock
from .folding import fold_block
from .linear import (
    LayerNormWeights,
    PackedWeight,
    QuantLayer,
    QuantWeight,
    layer_norm,
    masked_matmul,
    pack_weight,
    quant_linear,
    quant_linears,
    quant_mlp,
)
from .quantize import (
    CODES,
    Grid,
    check_quantizer,
    dequantize,
    fake_quantize,
    hadamard_transform,
    quant_matmul,
    quantize_codes,
    search_bounds,
    sort_rows,
    step_and_zero,
)
from .swin_block import quant_swin_block

__all__ = [
    "CODES",
    "ConvStack",
    "FoldedBlock",
    "Grid",
    "LayerNormWeights",
    "PackedWeight",
    "QuantLayer",
    "QuantWeight",
    "check_quantizer",
    "convolve",
    "dequantize",
    "enlarge_by_convolutions",
    "fake_quantize",
    "fold_block",
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
    "sort_rows",
    "step_and_zero",
]
