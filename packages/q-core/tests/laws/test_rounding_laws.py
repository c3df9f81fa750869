"""Every rounding of the package obeys the laws, and each its own convention for ties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q_core import NearestEven, NearestTowardZero, Stochastic
from q_core.testing import check_rounding

ROUNDINGS = [NearestEven, NearestTowardZero, Stochastic]
coordinates = st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40)
exact = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_rounding_obeys_the_laws(rounding):
    check_rounding(rounding())


@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(u=coordinates)
def test_every_rounding_obeys_the_laws_on_any_coordinates(rounding, u):
    check_rounding(rounding(), torch.tensor(u, dtype=torch.float64))
    check_rounding(rounding(), torch.tensor(u, dtype=torch.float32))


@given(u=coordinates)
def test_nearest_even_rounds_as_the_loop_does(oracles, u):
    expected = torch.tensor([oracles.round_half_even(value) for value in u], dtype=torch.float64)
    torch.testing.assert_close(NearestEven()(torch.tensor(u, dtype=torch.float64)), expected, **exact)


@given(u=coordinates, halves=st.lists(st.integers(-300, 300), min_size=1))
def test_nearest_toward_zero_rounds_as_the_loop_does(oracles, u, halves):
    values = [*u, *(half / 2 for half in halves)]
    expected = torch.tensor([oracles.round_half_toward_zero(value) for value in values], dtype=torch.float64)
    torch.testing.assert_close(NearestTowardZero()(torch.tensor(values, dtype=torch.float64)), expected, **exact)


@given(u=coordinates)
def test_the_two_nearest_roundings_agree_off_ties(u):
    u = torch.tensor(u, dtype=torch.float64)
    clear = (u - u.floor() - 0.5) != 0
    torch.testing.assert_close(NearestEven()(u)[clear], NearestTowardZero()(u)[clear], **exact)
