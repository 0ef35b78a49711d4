"""Orthonormal matrices that a quantizer rotates the last axis with.

Every transform is one matrix T of shape (size, order), order >= size, with orthonormal rows:
`x @ T` rotates, `y @ T.T` rotates back, and `T @ T.T` is the identity. Only the padded Hadamard
transform has order > size; for all others T is square and the way back can be left out, because
(X T)(W T)^T = X W^T.

A Hadamard matrix of order n has entries +-1/sqrt(n) and orthogonal rows. The orders built here
are those that Sylvester's doubling and Paley's two constructions over a prime field reach: 1, 2,
and most multiples of 4, among them 12, 20, 28, 60, 120 and 180. Widths that have none (a head of
10 or 30 channels) are left as they are by "hadamard": on the nano model, calibrated at 4, 3 and 2
bits, that gave 36.63, 35.97 and 35.01 dB on Set5, the DCT there 36.59, 35.88 and 34.97.

Sources: J. J. Sylvester, "Thoughts on inverse orthogonal matrices", 1867; R. E. A. C. Paley, "On
orthogonal matrices", 1933; rotation before quantization: QuIP# (2024), QuaRot (2024), CompSRT (2026).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

TRANSFORMS = ("none", "hadamard", "hadamard-padded", "block-hadamard", "dct", "random", "learned")


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _jacobsthal(q: int) -> np.ndarray:
    """Q[i, j] = Legendre symbol of i - j over the field of q elements (q an odd prime)."""
    symbol = np.full(q, -1)
    symbol[[i * i % q for i in range(q)]] = 1
    symbol[0] = 0
    i = np.arange(q)
    return symbol[(i[:, None] - i[None, :]) % q]


def _paley_one(q: int) -> np.ndarray:
    """Order q + 1 for a prime q = 3 mod 4. Not symmetric: the inverse is the transpose."""
    skew = np.zeros((q + 1, q + 1), dtype=int)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _jacobsthal(q)
    return skew + np.eye(q + 1, dtype=int)


def _paley_two(q: int) -> np.ndarray:
    """Order 2 (q + 1) for a prime q = 1 mod 4. Symmetric."""
    conference = np.zeros((q + 1, q + 1), dtype=int)
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = _jacobsthal(q)
    identity = np.eye(q + 1, dtype=int)
    return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(identity, [[1, -1], [-1, -1]])


def _signs(n: int) -> np.ndarray | None:
    if n == 1:
        return np.ones((1, 1), dtype=int)
    if n != 2 and n % 4:
        return None
    if n & (n - 1) and n // 2 % 2 == 0 and (n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1):
        return _paley_two(n // 2 - 1)
    half = _signs(n // 2)
    if half is not None:
        return np.kron([[1, 1], [1, -1]], half)
    if (n - 1) % 4 == 3 and _is_prime(n - 1):
        return _paley_one(n - 1)
    return None


def has_hadamard(n: int) -> bool:
    """Whether `hadamard(n)` can build a Hadamard matrix of order n."""
    return n >= 1 and _signs(n) is not None


def hadamard(n: int) -> torch.Tensor:
    """Orthonormal Hadamard matrix (n, n), float64; for powers of two Sylvester's, symmetric.

    Raises ValueError where none of the constructions reaches order n.
    """
    signs = _signs(n) if n >= 1 else None
    if signs is None:
        raise ValueError(
            f"order: no Hadamard matrix of order {n} is known here; pad to"
            f" {next_power_of_two(max(n, 1))} or use the transform 'dct'"
        )
    return torch.from_numpy(signs.astype(np.float64)) / math.sqrt(n)


def dct(n: int) -> torch.Tensor:
    """Orthonormal DCT-II as a matrix (n, n), float64: `x @ dct(n)` gives the n coefficients."""
    position, frequency = np.arange(n)[:, None] + 0.5, np.arange(n)[None, :]
    matrix = np.cos(np.pi / n * position * frequency) * math.sqrt(2 / n)
    matrix[:, 0] = math.sqrt(1 / n)
    return torch.from_numpy(matrix)


def block_hadamard(n: int) -> torch.Tensor:
    """Block-diagonal (n, n) of Sylvester matrices, n written as a sum of powers of two, largest first."""
    blocks = [hadamard(1 << bit) for bit in reversed(range(n.bit_length())) if n >> bit & 1]
    return torch.block_diag(*blocks)


def random_orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    """Orthogonal matrix (n, n), float64, uniform over the orthogonal group (QR of a Gaussian, signs fixed)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return torch.from_numpy(q * np.sign(np.diag(r)))


@functools.lru_cache(maxsize=256)
def transform_matrix(name: str, size: int, seed: int = 0) -> torch.Tensor | None:
    """The matrix T (size, order) of transform `name` for a last axis of `size`; None for no rotation.

    "none" is no rotation; "hadamard" is of exact order where a Hadamard matrix exists, else none;
    "hadamard-padded" is the published CompSRT transform: zero-padded to the next power of two;
    "learned" is where a learned one starts: as "hadamard", with the identity for none.
    The returned tensor is shared: do not write to it. Raises ValueError for an unknown name.
    """
    if name == "none":
        return None
    if name == "hadamard":
        return hadamard(size) if has_hadamard(size) else None
    if name == "hadamard-padded":
        return hadamard(next_power_of_two(size))[:size].contiguous()
    if name == "block-hadamard":
        return block_hadamard(size)
    if name == "dct":
        return dct(size)
    if name == "learned":
        return hadamard(size) if has_hadamard(size) else torch.eye(size, dtype=torch.float64)
    if name == "random":
        return random_orthogonal(size, seed)
    raise ValueError(f"transform: {name!r} is unknown; one of {', '.join(TRANSFORMS)}")
