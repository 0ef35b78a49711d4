"""Packed codes: nothing lost, not a byte too many, and the layout that the docstring promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsrt.kernels.packing import (
    pack_codes,
    pack_mask,
    pack_parts,
    packed_size,
    unpack_codes,
    unpack_mask,
    unpack_parts,
)


@st.composite
def codes_of_some_bits(draw):
    bits = draw(st.integers(1, 8))
    codes = draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    return bits, torch.tensor(codes, dtype=torch.uint8)


@given(codes_of_some_bits())
def test_codes_come_back_and_take_no_byte_too_many(case):
    bits, codes = case
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(len(codes), bits) == (len(codes) * bits + 7) // 8
    assert torch.equal(unpack_codes(packed, bits, len(codes)), codes)


@given(codes_of_some_bits())
def test_the_layout_is_one_little_endian_number(case):
    bits, codes = case
    number = sum(int(code) << (j * bits) for j, code in enumerate(codes))
    packed = bytes(pack_codes(codes, bits).tolist())
    assert packed == number.to_bytes(len(packed), "little")


@given(st.lists(codes_of_some_bits(), min_size=1, max_size=5))
def test_parts_of_different_widths_are_one_little_endian_number(parts):
    number = size = 0
    for bits, codes in parts:
        for code in codes.tolist():
            number |= code << size
            size += bits
    packed = pack_parts((codes, bits) for bits, codes in parts)
    assert bytes(packed.tolist()) == number.to_bytes((size + 7) // 8, "little")
    found = unpack_parts(packed, [(len(codes), bits) for bits, codes in parts])
    assert all(torch.equal(a, codes) for a, (_, codes) in zip(found, parts, strict=True))


@given(st.lists(st.booleans(), max_size=70))
def test_a_mask_comes_back(entries):
    mask = torch.tensor(entries, dtype=torch.bool)
    packed = pack_mask(mask)
    assert len(packed) == (len(entries) + 7) // 8
    assert torch.equal(unpack_mask(packed, len(entries)), mask)
    assert torch.equal(packed, pack_codes(mask.to(torch.uint8), 1))


def test_any_shape_is_packed_row_by_row():
    codes = torch.randint(0, 8, (3, 5, 2), dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes.mT, 3), 3, 30).view(3, 2, 5), codes.mT)


def test_many_codes():
    codes = torch.randint(0, 32, (100_003,), dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, 5), 5, len(codes)), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_out_of_range_is_refused(bits):
    with pytest.raises(ValueError, match=f"codes: {2**bits} does not fit {bits} bits"):
        pack_codes(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True])
def test_bits_are_1_to_8(bits):
    for call in (
        lambda: pack_codes(torch.zeros(0, dtype=torch.uint8), bits),
        lambda: unpack_codes(torch.zeros(0, dtype=torch.uint8), bits, 0),
    ):
        with pytest.raises(ValueError, match=r"bits: .* is not a whole number from 1 to 8"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_codes(torch.zeros(3), 2), "codes: they are torch.float32"),
        (lambda: pack_mask(torch.zeros(3)), "mask: it is torch.float32"),
        (lambda: unpack_codes(torch.zeros(1), 2, 4), "packed: it is torch.float32"),
        (lambda: unpack_mask(torch.zeros(1, 1, dtype=torch.uint8), 4), r"packed: .*\(1, 1\)"),
        (lambda: unpack_codes(torch.zeros(1, dtype=torch.uint8), 3, 3), "1 bytes do not hold 3"),
        (lambda: unpack_codes(torch.zeros(3, dtype=torch.uint8), 3, 3), "which take 2"),
        (lambda: unpack_mask(torch.zeros(0, dtype=torch.uint8), -1), "do not hold -1"),
        (lambda: pack_parts([]), "parts: there are none"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
