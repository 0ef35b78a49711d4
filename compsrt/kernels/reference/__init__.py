"""Every op in plain PyTorch: the definition of right, and what runs on a CPU."""

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

__all__ = [
    "CODES",
    "Grid",
    "check_quantizer",
    "dequantize",
    "fake_quantize",
    "hadamard_transform",
    "quant_matmul",
    "quantize_codes",
    "search_bounds",
    "sort_rows",
    "step_and_zero",
]
