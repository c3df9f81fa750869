"""Where training leads: the fixed point of the squared error under nuLSQ's gradient, which is not Lloyd and Max's.

The gradient of 1/2 E(Q - x)^2 by a step is -s_k E[(H - f)^2; cell k] + E[(x - C)+] up to sign, so that at rest every
step has the same weight of squared residuals, that of what lies beyond the range.
"""

import itertools

import pytest
import torch

from q_core import NearestTowardZero
from q_nulsq import Exponential, Projection, Softplus, StepGrid

# For |N(0, 1)|, solved from the condition above by numerical integration.
FIXED_POINTS = {
    2: [0.5096, 0.5890, 0.9084],
    3: [0.2355, 0.2423, 0.2573, 0.2845, 0.3335, 0.4338, 0.7424],
}


def half_normal(count):
    """Return the quantiles of |N(0, 1)| in the middle of equal parts: a sample without noise."""
    parts = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.erfinv(parts) * 2**0.5


def train(grid, x, updates, rate):
    optimizer = torch.optim.SGD(grid.parameters(), lr=rate, momentum=0.9)
    for _ in range(updates):
        optimizer.zero_grad()
        (grid.fake_quantize(x, NearestTowardZero()) - x).square().mean().div(2).backward()
        optimizer.step()
        grid.project()


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("bits", [2, 3])
def test_sgd_on_the_squared_error_comes_to_the_fixed_point(bits, scale):
    expected = torch.tensor([FIXED_POINTS[bits]], dtype=torch.float64)
    grid = StepGrid(None, torch.full_like(expected, float(expected.mean())) * scale)
    x = half_normal(2001) * scale
    train(grid, x, updates=200, rate=4.0)
    # Stated in the brief; the values have four digits and the sample 2001 points.
    torch.testing.assert_close(grid.widths / scale, expected, rtol=0.02, atol=0)
    residuals = (grid.fake_quantize(x, NearestTowardZero()).detach() - x).square()
    ends = grid.levels()[0]
    cells = torch.stack([residuals[(x > low) & (x <= high)].sum() for low, high in itertools.pairwise(ends)])
    weights = cells / grid.widths[0] / x.numel()
    beyond = (x - ends[-1]).clamp(min=0).mean()
    torch.testing.assert_close(weights, beyond.expand(weights.shape), rtol=0.02, atol=0)


@pytest.mark.parametrize("positivity", [Projection(), Softplus(), Exponential()])
def test_a_signed_grid_comes_to_the_mirrored_fixed_point_under_every_positivity(positivity):
    expected = torch.tensor([FIXED_POINTS[2]], dtype=torch.float64)
    grid = StepGrid(torch.full_like(expected, 0.6), torch.full_like(expected, 0.6), positivity=positivity)
    half = half_normal(1001)
    train(grid, torch.cat([-half, half]), updates=200, rate=8.0)
    below, above = grid.sides()
    torch.testing.assert_close(above, expected, rtol=0.02, atol=0)  # as above
    torch.testing.assert_close(below, above, rtol=1e-9, atol=0)  # the same sums, negated
