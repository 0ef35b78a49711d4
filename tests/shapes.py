"""The one table of shapes and types of the kernels' tests and benchmarks, and how tests use it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import hypothesis
import pytest
import torch
from torch import Tensor

from compsrt.kernels import dispatch, reference

TYPES = [torch.float32, torch.float16, torch.bfloat16]

# What the interpreter can take: the widths of SwinIR-light (60, its hidden 120, a head of 10, 64
# tokens), a window that lost a token, odd sizes, one entry, none.
SMALL = [(2, 63, 60), (3, 7, 10), (1, 64, 64), (5, 120), (1023,), (1,), (0, 60), (2, 0, 10)]

# (size, order) of Hadamard transforms: powers of two, Paley's orders and their doubles, padded.
ORDERS = [(1, 1), (2, 2), (8, 8), (64, 64), (12, 12), (20, 20), (28, 28), (60, 60), (120, 120)]
ORDERS += [(180, 180), (240, 240), (512, 512), (10, 16), (60, 64), (63, 64), (120, 128), (150, 180)]

# Of a DQC step of SwinIR-light x4 on 16 pictures of 64x64: tokens, hidden tokens, heads, softmax;
# and four times the tokens, several times the cache of any device.
LARGE = {
    "tokens": (65536, 60),
    "hidden": (65536, 120),
    "heads": (393216, 10),
    "softmax": (393216, 64),
    "cold": (1048576, 60),
}


class OnDevice(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    is_cuda = True


# Where a test of a kernel runs: interpreted on the CPU, or on a device where there is one.
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not dispatch.INTERPRETED, reason="not interpreted: a CUDA device or no Triton"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]

# For @given: shrinking a failure takes many calls, and an interpreted kernel is slow.
without_shrinking = hypothesis.settings(
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate]
)

# The functions of `reference` that have a kernel.
REFERENCES = (
    "convolve",
    "enlarge_by_convolutions",
    "fake_quantize",
    "hadamard_transform",
    "layer_norm",
    "masked_matmul",
    "quant_linear",
    "quant_mlp",
    "quant_swin_block",
    "quant_window_attention",
    "search_bounds",
)


@contextlib.contextmanager
def triton_only() -> Iterator[None]:
    """Kernels run and nothing else: no reference to fall back on, and unwritten outputs are NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPSRT_KERNELS", "triton")
        for name in REFERENCES:
            patch.setattr(reference, name, None)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def four_scalars(shape: tuple[int, ...], bits: int, codes: str, seed: int = 0) -> list[Tensor]:
    """Lower, upper, alpha and beta that clip some of N(0, 1) and take some to saturated codes."""
    draws = torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed))
    lower, upper = -1.5 - draws[0] / 2, 1.2 + draws[1] / 2
    step = (upper - lower) / (2**bits - 1)
    # Unclamped codes differ from clamped ones where the step is smaller than the bounds say.
    alpha = step * draws[2] * (-0.5 if codes == "unclamped" else 0.2)
    return [lower, upper, alpha, step * (draws[3] - 0.5)]


def leaves(
    tensors: Sequence[Tensor], device: str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Copies of tensors that want gradients."""
    return [t.detach().to(device, dtype, copy=True).requires_grad_() for t in tensors]


def error(found: Tensor, exact: Tensor) -> float:
    """Root of the mean squared difference, in float64."""
    difference = found.detach().cpu().double() - exact.detach().cpu().double()
    return float(difference.square().mean().sqrt()) if difference.numel() else 0.0


# What one rounding to the type may cost, relative to a tensor's size; the interpreter cuts bf16
# off instead of rounding it. In float32 sums of another order.
UNIT = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_as_good(found: Tensor, torch_found: Tensor, exact: Tensor, unit: float) -> None:
    """The error is at most twice that of torch in the same type, plus unit times the size."""
    assert found.shape == exact.shape
    limit = 2 * error(torch_found, exact) + unit * error(exact, torch.zeros(()))
    assert error(found, exact) <= limit
