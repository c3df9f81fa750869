"""Grids of steps of every kind, as plain values for Hypothesis: what is drawn is built in the test.

The checks of shapes and types at run time use a random generator, which Hypothesis does not allow while it draws.
"""

import dataclasses

import hypothesis.strategies as st
import torch

from q_core import functional
from q_nulsq import StepGrid

# The tiles, and a tensor that they tile; sizes are odd on purpose.
TILINGS = [
    ((1,), (37,)),
    ((1, 1), (3, 13)),
    ((5, 1, 1, 1), (5, 3, 3, 1)),
    ((1, 3, 1, 1), (2, 3, 5, 1)),
    ((3, 2), (3, 14)),
]
SEEDS = st.integers(0, 2**31)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a grid, a tensor and its gradient are made from."""

    tiling: tuple[tuple[int, ...], tuple[int, ...]]
    below: int
    above: int
    decades: float
    seed: int

    def generator(self):
        return torch.Generator().manual_seed(self.seed)

    def steps(self, dtype=torch.float64):
        """Return steps below and above zero that spread over the decades, None for a side without."""
        generator, tiles = self.generator(), self.tiling[0]

        def side(count):
            exponents = torch.rand((*tiles, count), generator=generator, dtype=torch.float64) - 0.5
            return (10.0 ** (exponents * self.decades)).to(dtype)

        below, above = side(self.below), side(self.above)
        return below if self.below else None, above if self.above else None

    def grid(self, dtype=torch.float64, **options):
        return StepGrid(*self.steps(dtype), **options)

    def x(self, grid):
        """Return a tensor that reaches beyond both ends of every tile and into every cell."""
        generator, (tiles, shape) = self.generator(), self.tiling
        levels = grid.levels().reshape(-1, grid.levels().shape[-1])
        rows = functional.to_tiles(torch.rand(shape, generator=generator, dtype=torch.float64), tiles) * 1.2 - 0.1
        place = rows * (levels.shape[1] - 1)
        cell = place.floor().clamp(0, levels.shape[1] - 2).long()
        left, right = levels.gather(1, cell), levels.gather(1, cell + 1)
        return functional.from_tiles(left + (right - left) * (place - cell), tiles, shape).to(levels.dtype)

    def upstream(self, x):
        return torch.randn(x.shape, generator=self.generator(), dtype=x.dtype)


@st.composite
def cases(draw, decades=4.0):
    bits = draw(st.integers(1, 8))
    half = 2 ** (bits - 1)
    below, above = draw(st.sampled_from([(0, 2 * half - 1), (half, half - 1), (max(1, half - 1), max(1, half - 1))]))
    spread = draw(st.sampled_from([0.0, 1.0, decades]))
    return Case(draw(st.sampled_from(TILINGS)), below, above, spread, draw(SEEDS))
