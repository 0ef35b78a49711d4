"""Codes of 1 to 8 bits in as many bits as they have: one stream, in whole bytes.

Code j occupies bits j*bits to (j + 1)*bits - 1 of the stream, its least significant bit first, and
bit i of the stream is bit i % 8 of byte i // 8, counted from the least significant. So codes of 3,
5, 6 or 7 bits cross the borders of bytes; the last byte is filled up with zeros. Three codes of
3 bits, a, b and c:

    byte 0: c1 c0 b2 b1 b0 a2 a1 a0        byte 1: 0 0 0 0 0 0 0 c2

A mask is a stream of codes of one bit. Tensors of different widths follow each other in one stream
(`pack_parts`), with nothing filled up between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def packed_size(count: int, bits: int = 1) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_mask(mask: Tensor) -> Tensor:
    """Eight entries a byte: bool of any shape, N entries -> (ceil(N / 8),) uint8.

    Raises ValueError for another type.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: it is {mask.dtype}, not bool")
    stream = mask.new_zeros(8 * packed_size(mask.numel()))
    stream[: mask.numel()] = mask.flatten()
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (stream.view(-1, 8).to(torch.uint8) << places).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_mask`: (ceil(count / 8),) uint8 -> (count,) bool.

    Raises ValueError for another type or size.
    """
    _check_packed(packed, count, 1)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> places & 1).bool().flatten()[:count]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 of any shape, N codes below 2^bits -> (ceil(N bits / 8),) uint8.

    Raises ValueError for bits outside 1 to 8, another type, and codes that do not fit.
    """
    return pack_parts([(codes, bits)])


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_codes`: (ceil(count bits / 8),) uint8 -> (count,) uint8.

    Raises ValueError for bits outside 1 to 8 and another type or size.
    """
    _check_bits(bits)
    _check_packed(packed, count, bits)
    return unpack_parts(packed, [(count, bits)])[0]


def pack_parts(parts: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Several tensors of codes, each with its bits, as one stream: (bytes,) uint8.

    Raises ValueError for no parts and as `pack_codes`.
    """
    streams = [_stream(codes, bits) for codes, bits in parts]
    if not streams:
        raise ValueError("parts: there are none; pass one tensor of codes at least")
    return pack_mask(torch.cat(streams))


def unpack_parts(packed: Tensor, parts: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The inverse of `pack_parts`, for (count, bits) of each part: (count,) uint8 each.

    Raises ValueError as `unpack_codes`.
    """
    for _, bits in parts:
        _check_bits(bits)
    counts = [count * bits for count, bits in parts]
    streams = unpack_mask(packed, sum(counts)).split(counts)
    return [_codes(stream, bits) for stream, (_, bits) in zip(streams, parts, strict=True)]


def _stream(codes: Tensor, bits: int) -> Tensor:
    """(N,) codes -> (N bits,) bool."""
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes: they are {codes.dtype}, not uint8")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes: {int(codes.max())} does not fit {bits} bits")
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    return (codes.flatten()[:, None] >> places & 1).bool().flatten()


def _codes(stream: Tensor, bits: int) -> Tensor:
    """The inverse of `_stream`."""
    places = torch.arange(bits, dtype=torch.uint8, device=stream.device)
    return (stream.view(-1, bits).to(torch.uint8) << places).sum(1, dtype=torch.uint8)


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits: {bits!r} is not a whole number from 1 to 8")


def _check_packed(packed: Tensor, count: int, bits: int) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"packed: it is {packed.dtype} {tuple(packed.shape)}, not uint8 (bytes,)")
    if count < 0 or len(packed) != packed_size(count, bits):
        raise ValueError(
            f"packed: {len(packed)} bytes do not hold {count} codes of {bits} bits,"
            f" which take {packed_size(max(count, 0), bits)}"
        )
