import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsrt import transforms

ORDERS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 40, 56, 60, 64, 120, 180, 240, 360, 1024)


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_is_orthonormal_with_entries_of_one_size(order):
    matrix = transforms.hadamard(order)
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))


def test_the_orders_that_swinir_uses_are_symmetric_and_20_is_not():
    for order in (12, 28, 60, 64, 120, 180):
        assert torch.equal(transforms.hadamard(order), transforms.hadamard(order).T)
    assert not torch.equal(transforms.hadamard(20), transforms.hadamard(20).T)


@pytest.mark.parametrize("order", [0, 3, 10, 30, 62])
def test_impossible_orders_are_refused_with_a_remedy(order):
    assert not transforms.has_hadamard(order)
    with pytest.raises(ValueError, match="pad to"):
        transforms.hadamard(order)


@given(
    name=st.sampled_from([t for t in transforms.TRANSFORMS if t != "none"]),
    size=st.integers(1, 130),
    seed=st.integers(0, 3),
)
def test_rows_of_every_transform_are_orthonormal(name, size, seed):
    matrix = transforms.transform_matrix(name, size, seed)
    if matrix is None:
        assert name == "hadamard" and not transforms.has_hadamard(size)
        return
    assert matrix.dtype == torch.float64 and matrix.shape[0] == size
    assert matrix.shape[1] == (
        transforms.next_power_of_two(size) if name == "hadamard-padded" else size
    )
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_none_is_no_matrix_and_unknown_names_are_refused():
    assert transforms.transform_matrix("none", 60) is None
    with pytest.raises(ValueError, match="hadamrad"):
        transforms.transform_matrix("hadamrad", 60)


def test_random_depends_on_its_seed_alone():
    first, again, other = (transforms.random_orthogonal(10, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
