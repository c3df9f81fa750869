"""Levels that are sums of a fitted basis."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import NearestEven, QuantSpec, RangeError, ShapeError, SpecError
from q_core.functional import to_tiles
from q_core.testing import check_grid
from q_nulsq.peers.lq_nets import LqNetsGrid

exact = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**32 - 1)


def grids(seed, bits, signed, tiles=(1,), dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.rand((*tiles, bits), generator=generator, dtype=torch.float64) + 0.05
    # Doubled and scattered: no two sums are the same, and none too near to another for float32.
    basis = basis + 2.0 ** torch.arange(bits)
    return LqNetsGrid(basis.to(dtype), signed=signed, **options).eval()


def data(seed, shape, signed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) * 2
    return x if signed else x.abs()


def error(grid, x):
    """Return the squared error of each tile."""
    residual = grid.fake_quantize(x, NearestEven()) - x
    return to_tiles(residual.square(), grid.tile_shape).sum(1)


def bits_by_search(grid, x):
    """Return, for each element of one tile, the vector of bits whose sum is nearest."""
    values = (-1, 1) if grid.signed else (0, 1)
    basis = grid.basis.reshape(-1).tolist()
    vectors = list(itertools.product(values, repeat=len(basis)))
    sums = [sum(e * v for e, v in zip(vector, basis, strict=True)) for vector in vectors]
    nearest = [min(range(len(sums)), key=lambda k: abs(sums[k] - real)) for real in x.flatten().tolist()]
    return torch.tensor([vectors[k] for k in nearest], dtype=torch.float64)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tiles", [(1,), (3, 1)])
def test_the_laws_hold_for_all_bits_both_signs_and_both_granularities(bits, tiles):
    check_grid(grids(bits, bits, False, tiles, torch.float32))
    # Published weights have a gradient of 1 everywhere.
    check_grid(grids(bits, bits, True, tiles, torch.float32), waive=["gradient"])


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("signed", [False, True])
def test_the_levels_are_all_sums_of_the_basis(bits, signed):
    grid = grids(0, bits, signed, (2, 1))
    for row, basis in zip(grid.levels().reshape(2, -1), grid.basis.reshape(2, -1).tolist(), strict=True):
        sums = [
            sum(e * v for e, v in zip(vector, basis, strict=True))
            for vector in itertools.product((-1, 1) if signed else (0, 1), repeat=bits)
        ]
        # Sums of 3 terms in another order.
        torch.testing.assert_close(row, torch.tensor(sorted(sums), dtype=torch.float64), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("signed", [False, True])
def test_the_bits_of_a_code_sum_up_to_its_level(signed):
    grid = grids(1, 3, signed, (2, 1), torch.float32)
    x = data(1, (2, 40), signed).float()
    codes = grid.quantize(x, NearestEven()).int()
    bits = grid.bits_of(codes)
    assert set(bits.unique().tolist()) == ({-1, 1} if signed else {0, 1})
    sums = (bits.double() * grid.basis.double()).sum(-1).float()
    torch.testing.assert_close(sums, grid.dequantize(codes.float()), **exact)


@settings(max_examples=60)
@given(seed=seeds, bits=st.integers(1, 4), signed=st.booleans())
def test_the_fit_is_the_least_squares_solution(seed, bits, signed):
    grid = grids(seed, bits, signed, ridge=1e-12)
    # Every level is taken a few times, so that the equations have one solution.
    x = torch.cat([grid.levels().reshape(-1).repeat(3), data(seed, (40,), signed)])
    x = x + 0.01 * data(seed, x.shape, True)
    matrix = bits_by_search(grid, x)
    expected = torch.linalg.lstsq(matrix, x.unsqueeze(1)).solution.squeeze(1)
    fitted = grid.fit(x)[0]
    # The normal equations square a condition below 50, and the ridge is 1e-12.
    torch.testing.assert_close(fitted, expected, rtol=1e-9, atol=1e-9)
    residual = x - matrix @ fitted
    # Orthogonal to every bit: 40 to 90 terms of size 10.
    torch.testing.assert_close(matrix.T @ residual, torch.zeros(bits).double(), rtol=0, atol=1e-8)


@settings(max_examples=100)
@given(
    seed=seeds,
    bits=st.integers(1, 8),
    signed=st.booleans(),
    channels=st.booleans(),
    momentum=st.sampled_from([0.1, 0.5, 1.0]),
    size=st.sampled_from([1, 2, 5, 200]),
)
def test_a_step_never_raises_the_error(seed, bits, signed, channels, momentum, size):
    grid = grids(seed, bits, signed, (2, 1) if channels else (1,))
    x = data(seed, (2, size), signed)
    before = error(grid, x)
    for _ in range(4):
        grid.update(x, momentum=momentum)
        after = error(grid, x)
        # Sums of 400 squares up to 1e5, each rounded to 1e-16 of it.
        assert bool((after <= before + 1e-8 * (1 + before)).all())
        before = after


def test_steps_find_the_basis_that_made_the_data():
    true = torch.tensor([[0.3, 0.8]], dtype=torch.float64)
    x = LqNetsGrid(true, signed=True).levels().reshape(-1).repeat(50)
    grid = LqNetsGrid(torch.tensor([[0.4, 0.7]]).double(), signed=True)
    for _ in range(3):
        grid.update(x, momentum=1.0)
    # The ridge of 1e-4 beside 200 elements pulls a step back by 1e-6 of its length, three times in a row.
    torch.testing.assert_close(grid.basis, true, rtol=0, atol=1e-12)


def test_in_training_the_basis_moves_a_tenth_of_the_way_after_use():
    grid, x = grids(0, 3, True, (2, 1)).train(), data(0, (2, 300), True)
    before, levels = grid.basis.clone(), grid.levels()
    fitted = grid.fit(x).reshape(grid.basis.shape)
    y = grid.fake_quantize(x, NearestEven())
    assert set(y[0].tolist()) <= set(levels[0, 0].tolist())  # the levels of before
    # A mean of two numbers of size 4.
    torch.testing.assert_close(grid.basis, 0.9 * before + 0.1 * fitted, rtol=1e-14, atol=0)


def test_nothing_moves_in_evaluation_nor_without_momentum_nor_when_only_codes_are_asked_for():
    x = data(0, (2, 300), True)
    for grid in (grids(0, 3, True), grids(0, 3, True, momentum=0.0).train()):
        before = copy.deepcopy(grid.state_dict())
        grid.fake_quantize(x, NearestEven())
        torch.testing.assert_close(grid.state_dict(), before, **exact)
    grid = grids(0, 3, True).train()
    grid.quantize(x, NearestEven())
    torch.testing.assert_close(grid.basis, before["basis"], **exact)


@pytest.mark.parametrize("signed", [False, True])
def test_the_gradient_is_that_of_the_public_code(signed):
    grid = grids(0, 2, signed).train()
    top = float(grid.levels().max())
    x = torch.tensor([-2 * top, -0.3, 0.0, 0.4, top, 1.01 * top, torch.inf], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(grid.fake_quantize(x, NearestEven()).sum(), x)
    expected = [1.0] * 7 if signed else [0.0, 0, 1, 1, 1, 0, 0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **exact)


@pytest.mark.parametrize("signed", [False, True])
def test_data_that_determine_nothing_leave_a_grid(signed):
    """All zeros, one element, equal elements, NaN: the equations are singular or worse."""
    for x in (torch.zeros(2, 7), torch.tensor([[0.4], [-0.1]]), torch.full((2, 9), 5.0), torch.full((2, 3), torch.nan)):
        grid = grids(0, 3, signed, (2, 1), torch.float32)
        for _ in range(30):
            grid.update(x, momentum=1.0)
        levels = grid.levels()
        assert bool(levels.isfinite().all())
        assert bool((levels.diff(dim=-1) > 0).all())


def test_a_dead_channel_does_not_disturb_its_neighbour():
    x = data(0, (2, 300), True)
    both, alone = grids(0, 3, True, (2, 1)), grids(0, 3, True, (2, 1))
    both.update(x)
    alone.update(torch.stack([x[0], torch.full((300,), torch.nan)]))
    torch.testing.assert_close(alone.basis[0], both.basis[0], **exact)
    torch.testing.assert_close(alone.basis[1], grids(0, 3, True, (2, 1)).basis[1], **exact)


def test_a_fit_beats_equal_steps_on_normal_data():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spec, one = QuantSpec.signed(2), torch.ones(1, dtype=torch.float64)
    grid = LqNetsGrid.from_deviation(spec, one)
    for _ in range(30):
        grid.update(x, momentum=1.0)
    # The best 4 levels for a normal distribution, 0.4528 and 1.5104, are sums of a basis; 20000 samples tell them to a
    # few percent.
    expected = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104]).double()
    torch.testing.assert_close(grid.levels()[0], expected, rtol=0.03, atol=0)


def test_the_start_covers_a_range_in_equal_steps():
    low, high = torch.tensor([[-3.0], [0.0]]), torch.tensor([[1.0], [0.0]])
    grid = LqNetsGrid.from_range(QuantSpec.signed(2), low, high)
    torch.testing.assert_close(grid.levels()[0, 0], torch.tensor([-3.0, -1.0, 1.0, 3.0]), **exact)
    assert (grid.qmin, grid.qmax, grid.tile_shape) == (-2, 1, (2, 1))
    grid = LqNetsGrid.from_range(QuantSpec.unsigned(2), low, 3 * high)
    torch.testing.assert_close(grid.levels()[0, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]), **exact)


def test_the_published_start_is_that_of_normal_data():
    grid = LqNetsGrid.from_deviation(QuantSpec.signed(3), torch.tensor([[0.5]]))
    # 0.6745 sigma / 2^(b - 1) * 2^j
    torch.testing.assert_close(grid.basis, torch.tensor([[[1.0, 2.0, 4.0]]]) * 0.6745 * 0.5 / 4, rtol=2e-7, atol=0)
    grid = LqNetsGrid.from_deviation(QuantSpec.unsigned(3), torch.tensor([1.0]))
    torch.testing.assert_close(grid.basis, torch.tensor([[1.0, 2.0, 4.0]]) * 0.6745 * 2 / 7, rtol=2e-7, atol=0)


def test_the_basis_is_saved_and_no_parameter():
    grid = grids(0, 3, True)
    assert list(grid.state_dict()) == ["basis"]
    assert not list(grid.parameters())


@pytest.mark.parametrize(
    "spec", [QuantSpec.signed(3, narrow=True), QuantSpec(3, -1, 6, True), QuantSpec(3, 0, 6, True)]
)
def test_codes_that_are_not_all_sums_are_refused(spec):
    with pytest.raises(SpecError, match="LQ-Nets is defined for"):
        LqNetsGrid.from_range(spec, torch.zeros(1), torch.ones(1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"basis of shape \(2,\): it needs the axes of the tiles"):
        LqNetsGrid(torch.tensor([1.0, 2.0]), signed=True)
    with pytest.raises(SpecError, match=r"basis of shape \(1, 9\): supported are 1 to 8"):
        LqNetsGrid(torch.ones(1, 9), signed=True)
    with pytest.raises(RangeError, match="two sums are the same level"):
        LqNetsGrid(torch.tensor([[1.0, 1.0]]), signed=False)
    with pytest.raises(RangeError, match="basis value nan"):
        LqNetsGrid(torch.tensor([[1.0, torch.nan]]), signed=False)
    with pytest.raises(RangeError, match="momentum=2"):
        LqNetsGrid(torch.tensor([[1.0, 2.0]]), signed=False, momentum=2.0)
    with pytest.raises(RangeError, match="ridge=0"):
        LqNetsGrid(torch.tensor([[1.0, 2.0]]), signed=False, ridge=0.0)
    with pytest.raises(RangeError, match="deviation has 1 of 1"):
        LqNetsGrid.from_deviation(QuantSpec.signed(2), torch.zeros(1))
    with pytest.raises(RangeError, match=r"range -2.0 to -1.0 is negative"):
        LqNetsGrid.from_range(QuantSpec.unsigned(2), torch.tensor([-2.0]), torch.tensor([-1.0]))
    with pytest.raises(ShapeError):
        grids(0, 2, True, (3, 1)).update(torch.zeros(4, 5))
