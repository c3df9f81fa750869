"""Every observer of the package obeys the laws, over every granularity and kind of codes."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import (
    EntropyObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    NearestTowardZero,
    PercentileObserver,
    QuantSpec,
)
from q_core.functional import from_tiles
from q_core.testing import check_observer

# Small tables keep the search short; the laws do not depend on their size.
OBSERVERS = {
    "min-max": MinMaxObserver,
    "moving average": MovingAverageObserver,
    "percentile": partial(PercentileObserver, fraction=0.95, bins=128),
    "mse": partial(MSEObserver, candidates=7, bins=64),
    "entropy": partial(EntropyObserver, candidates=9, bins=64),
}
SPECS = [
    QuantSpec.signed(4),
    QuantSpec.unsigned(4),
    QuantSpec.unsigned(8),
    QuantSpec.signed(8, narrow=True),
    QuantSpec.unsigned(3, symmetric=True),
    QuantSpec.signed(1),
    QuantSpec.signed(2, symmetric=False),
]
# Per tensor, channel of a weight, channel of an activation, group, block.
SHAPES = [(1,), (3, 1, 1, 1), (1, 5, 1, 1), (3, 7), (2, 3, 1)]


def _waived(name):
    # An average over batches depends on what a batch is.
    return ("split",) if name == "moving average" else ()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OBSERVERS)
def test_every_observer_obeys_the_laws(name, shape):
    for spec in SPECS:
        check_observer(lambda spec=spec: OBSERVERS[name](spec, shape), waive=_waived(name))


@pytest.mark.parametrize("name", OBSERVERS)
@settings(max_examples=12)
@given(data=st.data())
def test_every_observer_obeys_the_laws_on_any_data(name, data):
    """Values of very different sizes, zeros, ties, and tiles of which some are dead."""
    spec, shape = data.draw(st.sampled_from(SPECS)), data.draw(st.sampled_from(SHAPES))
    tiles = torch.Size(shape).numel()
    # Below 2**-100 a scale may fall under the least normal number and count as a range of zero width.
    real = st.one_of(st.just(0.0), st.integers(-7, 7).map(float), st.floats(2.0**-100, 2.0**100, width=32))
    rows = data.draw(st.lists(st.lists(real, min_size=5, max_size=5), min_size=tiles, max_size=tiles))
    x = torch.tensor(rows, dtype=torch.float32)
    if not (spec.symmetric and spec.qmin == 0):
        x[::2] = -x[::2]
    if spec.symmetric and spec.qmax == 0:
        x = -x.abs()
    if spec.symmetric and spec.qmin == 0:
        x = x.abs()
    x = from_tiles(x, shape, (*shape[:-1], shape[-1] * 5))
    check_observer(lambda: OBSERVERS[name](spec, shape), x, waive=_waived(name))


def test_a_moving_average_weighs_the_last_batch_most():
    observer = MovingAverageObserver(QuantSpec.signed(4), momentum=0.5)
    observer(torch.tensor([-1.0, 1.0]))
    observer(torch.tensor([-4.0, 2.0]))
    low, high = observer.range()
    # (0.5 * -1 - 4) / 1.5 and (0.5 * 1 + 2) / 1.5, up to one rounding of float64.
    torch.testing.assert_close(low.item(), -3.0, rtol=2.3e-16, atol=0)
    torch.testing.assert_close(high.item(), 5 / 3, rtol=2.3e-16, atol=0)


@pytest.mark.parametrize("name", OBSERVERS)
def test_the_rounding_asked_for_goes_into_the_quantizer(name):
    observer = OBSERVERS[name](QuantSpec.signed(4), rounding=NearestTowardZero)
    observer(torch.randn(9))
    assert isinstance(observer.quantizer().rounding, NearestTowardZero)
