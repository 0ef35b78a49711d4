"""quant_window_attention: windows, shift, bias, mask and softmax in one pass over q, k and v."""

from __future__ import annotations

import pytest
import torch
from shapes import TYPES, four_scalars, leaves

from compsrt import kernels, transforms
from compsrt.kernels import reference
from compsrt.kernels.reference import Grid

on_each_type = pytest.mark.parametrize("dtype", TYPES[::2], ids=str)
# Of a DQC step of SwinIR-light x4, 16 pictures of 64x64, as it is and as the paper rotates it; and
# four times the pictures.
on_each_use = pytest.mark.parametrize(
    ("batch", "head", "shift"),
    [(16, "none", 0), (16, "none", 4), (16, "hadamard-padded", 4), (64, "none", 4)],
)
HEADS, WINDOW, SIZE = 6, 8, 10


def prepare(implementation, batch, head, shift, dtype):
    """The call, its leaves, and the bytes of q."""
    function = implementation(kernels.quant_window_attention, reference.quant_window_attention)
    rotations = [
        None if matrix is None else matrix.to("cuda", dtype)
        for matrix in (
            transforms.transform_matrix(head, SIZE),
            transforms.transform_matrix(head, SIZE),
            transforms.transform_matrix("hadamard", WINDOW**2),
        )
    ]
    qkv = torch.randn(batch, 64, 64, 3 * HEADS * SIZE, device="cuda").to(dtype)
    table = torch.randn((2 * WINDOW - 1) ** 2, HEADS)
    scalars = [s for i in range(4) for s in four_scalars((), 4, "clamped", i)]
    qkv, table, *scalars = leaves([qkv, table, *scalars], "cuda")
    grids = [Grid(*scalars[4 * i : 4 * i + 4], 4) for i in range(4)]

    def call():
        return function(
            *qkv.chunk(3, -1),
            table,
            grids,
            heads=HEADS,
            window=WINDOW,
            shift=shift,
            scale=SIZE**-0.5,
            head_rotation=rotations[0],
            value_rotation=rotations[1],
            token_rotation=rotations[2],
        )

    return call, (qkv, table, *scalars), qkv.nbytes // 3


def operations(batch, products, rotations):
    """Of products (N, d) with (N, N), and of rotations of (N, N) over the tokens."""
    tokens, n = batch * 64 * 64, WINDOW**2
    return 2 * HEADS * tokens * n * (products * SIZE + rotations * n)


@on_each_use
@on_each_type
def test_forward(implementation, measure, batch, head, shift, dtype):
    call, _, size = prepare(implementation, batch, head, shift, dtype)
    with torch.no_grad():
        measure(call, bytes_moved=4 * size, operations=operations(batch, 2, 2))


@on_each_use
@on_each_type
def test_backward(implementation, measure, batch, head, shift, dtype):
    call, inputs, size = prepare(implementation, batch, head, shift, dtype)
    out = call()
    grad = torch.randn_like(out)
    measure(
        lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True),
        bytes_moved=7 * size,
        operations=operations(batch, 5, 4),
    )
