"""Where the roundings differ: ties, chance, and numbers far from zero."""

import pytest
import torch

from q_core import NearestEven, NearestTowardZero, Rounding, Stochastic

EXACT = {"rtol": 0, "atol": 0}
TIES = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])


def test_nearest_even_takes_the_even_code_of_a_tie():
    torch.testing.assert_close(NearestEven()(TIES), torch.tensor([-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]), **EXACT)


def test_nearest_toward_zero_takes_the_code_next_to_zero():
    torch.testing.assert_close(NearestTowardZero()(TIES), torch.tensor([-2.0, -1.0, 0.0, 0.0, 1.0, 2.0]), **EXACT)


@pytest.mark.parametrize("rounding", [NearestEven(), NearestTowardZero()])
def test_the_neighbours_of_a_tie_go_to_the_nearer_code(rounding):
    below, above = TIES.nextafter(TIES - 1), TIES.nextafter(TIES + 1)
    torch.testing.assert_close(rounding(below), torch.floor(TIES), **EXACT)
    torch.testing.assert_close(rounding(above), torch.ceil(TIES), **EXACT)


def test_stochastic_rounding_is_right_on_average():
    u = torch.tensor([-1.75, -0.1, 0.0, 0.25, 3.5, 7.9], dtype=torch.float64)
    draws = 40_000
    mean = Stochastic()(u.expand(draws, -1)).mean(0)
    # The deviation of one draw is at most 1/2, of their mean 1/2/200; six of these are seen once in 500 million runs.
    torch.testing.assert_close(mean, u, rtol=0, atol=6 * 0.5 / draws**0.5)


def test_stochastic_rounding_repeats_with_the_seed_of_torch():
    u = torch.rand(63)
    results = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        results.append(Stochastic()(u))
    torch.testing.assert_close(results[0], results[1], **EXACT)
    assert (results[0] != results[2]).any()


def test_stochastic_rounding_never_moves_a_level():
    levels = torch.arange(-8.0, 8.0).repeat(100)
    torch.testing.assert_close(Stochastic()(levels), levels, **EXACT)


def test_roundings_hold_no_state():
    for rounding in (NearestEven(), NearestTowardZero(), Stochastic()):
        assert not rounding.state_dict()


def test_a_rounding_must_say_how_it_rounds():
    with pytest.raises(TypeError, match="abstract"):
        Rounding()
