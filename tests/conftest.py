"""What every test file shares: test data, seeds, the hypothesis profile, one thread a worker."""

from __future__ import annotations

import os
import random
from pathlib import Path

import hypothesis
import numpy
import pytest
import torch

# "ci": the same examples every time, few enough for two cores, and no deadline, since the first
# call of an interpreted kernel takes seconds. More of them: pytest --hypothesis-profile=more
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("more", deadline=None, max_examples=500)
hypothesis.settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Without a device kernels run in Triton's interpreter, which Triton asks for when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002  what draws from the old global state has to be seeded too
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of pictures, reference values and weights that lies beside the repository."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' beside the repository: it holds pictures and golden values")
    return folder
