"""search_bounds: all 100 candidates; the loop is the published way, a pass for each candidate."""

from __future__ import annotations

import pytest
import torch
from shapes import LARGE

from compsrt import kernels
from compsrt.kernels import reference


def published(x, bits):
    """DOBI as its authors run it: quantize the whole tensor once a candidate."""
    least, greatest = x.min(), x.max()
    best = torch.full((), torch.inf, device=x.device)
    found = least, greatest
    for i in range(100):
        shrink = i * (greatest - least) / 200
        lower, upper = least + shrink, greatest - shrink
        error = torch.dist(x, reference.fake_quantize(x, lower, upper, bits=bits))
        if error < best:
            best, found = error, (lower, upper)
    return found


FUNCTIONS = {
    "kernel": kernels.search_bounds,
    "sorting reference": reference.search_bounds,
    "published loop": published,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("name", LARGE)
def test_search(measure, function, name):
    x = torch.randn(LARGE[name], device="cuda").reshape(1, -1)
    measure(lambda: function(x, 4), bytes_moved=x.nbytes, operations=8 * 100 * x.numel())
