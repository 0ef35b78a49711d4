"""An orthonormal matrix that is learned: a fixed one, turned by a small number of angles.

    R = T (C(a) (x) C(b))        C(a) = (1 - A)^-1 (1 + A)        A^T = -A

T (n, n) is where it starts (a Hadamard matrix), C the Cayley transform, which is orthonormal
whatever the entries a of the skew-symmetric A are, and the identity for a = 0. Two factors of about
sqrt(n) rows take 60 numbers for n = 60 where one of all rows would take 1770, more bytes than the
quantized weight that it serves; orders of at most WHOLE have one factor.

A. Cayley, "Sur quelques proprietes des determinants gauches", 1846.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WHOLE = 16


def factors(order: int) -> tuple[int, int]:
    """The two divisors of order that are closest to each other; (order, 1) up to WHOLE."""
    if order <= WHOLE:
        return order, 1
    small = max(n for n in range(1, math.isqrt(order) + 1) if order % n == 0)
    return small, order // small


def cayley(entries: Tensor, order: int) -> Tensor:
    """Orthonormal (order, order) of the order (order - 1)/2 entries above the diagonal, in float64;
    in float32 on Apple's devices, which have no wider type."""
    dtype = torch.float32 if entries.device.type == "mps" else torch.float64
    rows, columns = torch.triu_indices(order, order, 1, device=entries.device)
    skew = entries.new_zeros((order, order), dtype=dtype)
    skew = skew.index_put((rows, columns), entries.to(dtype))
    skew = skew - skew.T
    identity = torch.eye(order, dtype=dtype, device=entries.device)
    return torch.linalg.solve(identity - skew, identity + skew)


class LearnedRotation(nn.Module):
    """The turn C(a) (x) C(b), of an order; zero entries make it the identity."""

    def __init__(self, order: int, requires_grad: bool = True):
        super().__init__()
        self.sizes = factors(order)
        self.angles = nn.Parameter(
            torch.zeros(sum(n * (n - 1) // 2 for n in self.sizes)), requires_grad
        )

    def forward(self) -> Tensor:
        """(order, order), in the parameters' type, orthonormal up to its rounding."""
        parts = self.angles.split([n * (n - 1) // 2 for n in self.sizes])
        first, second = (cayley(part, n) for part, n in zip(parts, self.sizes, strict=True))
        return torch.kron(first, second).to(self.angles.dtype)
