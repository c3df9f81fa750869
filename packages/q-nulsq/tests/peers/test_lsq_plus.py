"""Equal steps with a learned offset."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q_core import NearestEven, QuantSpec, RangeError, ShapeError, SpecError, Stochastic, UniformGrid
from q_core.spec import PerChannel
from q_core.testing import check_grid
from q_nulsq.peers.lsq_plus import LsqPlusGrid
from q_nulsq.positivity import Exponential, Projection, Softplus

from .loops import over, uniform

exact = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**32 - 1)
specs = st.one_of(
    st.builds(QuantSpec.signed, st.integers(1, 8)),
    st.builds(QuantSpec.unsigned, st.integers(1, 8)),
    st.builds(lambda bits: QuantSpec.signed(bits, narrow=True), st.integers(2, 8)),
)


def gradients(grid: torch.nn.Module, x: Tensor, upstream: Tensor, rounding=None) -> tuple[Tensor, ...]:
    """Return the levels, and the gradients to x and to each parameter."""
    leaf = x.clone().requires_grad_()
    levels = grid.fake_quantize(leaf, rounding or NearestEven())
    return (levels.detach(), *torch.autograd.grad((levels * upstream).sum(), [leaf, *grid.parameters()]))


@settings(deadline=None, max_examples=12)
@given(spec=specs, seed=seeds, wide=st.booleans(), channels=st.booleans())
def test_the_laws_hold_for_all_codes_and_both_granularities(spec, seed, wide, channels):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if wide else torch.float32
    shape = (3, 1) if channels else (1,)
    scale = torch.rand(shape, generator=generator, dtype=dtype) + 0.05
    offset = torch.randn(shape, generator=generator, dtype=dtype)
    check_grid(LsqPlusGrid(scale, offset, qmin=spec.qmin, qmax=spec.qmax))


@pytest.mark.parametrize("positivity", [Projection(), Softplus(), Exponential()])
def test_the_laws_hold_for_every_way_to_be_positive(positivity):
    grid = LsqPlusGrid(torch.tensor([0.3]), torch.tensor([-0.2]), qmin=0, qmax=7, positivity=positivity)
    check_grid(grid)
    # A logarithm and an exponential of numbers of size 1, each rounded to 2**-24 of it.
    torch.testing.assert_close(positivity.steps(grid.scale).detach(), torch.tensor([0.3]), rtol=3e-7, atol=0)


@pytest.mark.parametrize("spec", [QuantSpec.signed(3), QuantSpec.unsigned(2), QuantSpec.unsigned(8)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1)])
def test_with_no_offset_it_is_lsq_to_the_last_bit(spec, shape):
    # Scale, data and upstream are whole numbers of 1/32: nothing is rounded, ties and range ends are all met.
    scale = torch.tensor([[0.5], [0.25], [1.0]])[: shape[0]]
    steps = torch.arange(-8 * 2 - 3, 8 * (spec.qmax + 2))
    x = (steps / 8 * scale).repeat(1, 1)
    upstream = (steps.remainder(5) - 2).float().expand_as(x)
    plus = LsqPlusGrid(scale, qmin=spec.qmin, qmax=spec.qmax)
    lsq = UniformGrid(scale, qmin=spec.qmin, qmax=spec.qmax, learnable=True)
    expected = gradients(lsq, x, upstream)
    torch.testing.assert_close(gradients(plus, x, upstream)[:3], expected, **exact)
    codes = [grid.quantize(x, NearestEven()).detach() for grid in (plus, lsq)]
    torch.testing.assert_close(*codes, **exact)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, spec=specs, exponent=st.integers(-10, 10))
def test_values_and_gradients_are_the_printed_ones(seed, spec, exponent):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    scale = (torch.rand(2, 1, **options) + 0.1) * 2.0**exponent
    offset = torch.randn(2, 1, **options) * 2.0**exponent
    middle, width = (spec.qmin + spec.qmax) / 2, spec.qmax - spec.qmin + 3
    x = offset + scale * (middle + width * (torch.rand(2, 31, **options) - 0.5))
    upstream = torch.randn(2, 31, **options)
    y, dx, ds, db = over(
        x, lambda real, row: uniform(real, float(scale[row]), float(offset[row]), spec.qmin, spec.qmax)
    )
    found = gradients(LsqPlusGrid(scale, offset, qmin=spec.qmin, qmax=spec.qmax), x, upstream)
    expected = (y, dx * upstream, (ds * upstream).sum(1, True), (db * upstream).sum(1, True))
    # The residual of a code up to 255 is known to 255 eps of a step, and the offset adds its own size in steps, up to
    # 100: below 1e-13 of a step, 31 times over, times an upstream below 6.
    torch.testing.assert_close(found[2:], expected[2:], rtol=0, atol=2e-11)
    torch.testing.assert_close(found[1], expected[1], **exact)
    torch.testing.assert_close(found[0], y, rtol=1e-13, atol=1e-13 * 2.0**exponent)


def test_the_offset_has_no_gradient_at_all_while_nothing_is_clipped():
    x = torch.rand(4, 1000)
    grid = LsqPlusGrid(torch.tensor([1.0]), torch.tensor([-1.0]), qmin=0, qmax=3)
    *_, offset = gradients(grid, x, torch.randn_like(x))
    torch.testing.assert_close(offset, torch.zeros(1), **exact)


def test_a_shift_of_data_and_offset_shifts_the_levels_and_no_gradient():
    x = torch.arange(-40, 40) / 16
    upstream = (torch.arange(80).remainder(7) - 3).float()
    here = gradients(LsqPlusGrid(torch.tensor([0.5]), torch.tensor([0.0]), qmin=-2, qmax=1), x, upstream)
    there = gradients(LsqPlusGrid(torch.tensor([0.5]), torch.tensor([2.0]), qmin=-2, qmax=1), x + 2, upstream)
    # Ties count from the level nearest to zero, code 0 here and code -2 there. Whole numbers of 1/16 are exact.
    torch.testing.assert_close(there, (here[0] + 2, *here[1:]), **exact)


def test_the_learnable_fake_quantize_of_torch_is_another_one_at_the_ends():
    """It asks the rounded code whether it was clipped, so half a step beyond the end still counts as inside."""
    x = torch.tensor([0.7, 1.6, 3.0], requires_grad=True)
    scale, zero = torch.tensor([0.5], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, 3, 1.0)
    grid = LsqPlusGrid(torch.tensor([0.5]), qmin=0, qmax=3)
    for upstream, their_x, their_scale, our_x, our_scale in (
        ([1.0, 0, 0], [1.0, 0, 0], -0.4, [1.0, 0, 0], -0.4),  # inside: the same
        ([0, 1.0, 0], [0, 1.0, 0], -0.2, [0.0, 0, 0], 3.0),  # beyond 1.5, nearer than 1.75
        ([0, 0, 1.0], [0.0, 0, 0], 3.0, [0.0, 0, 0], 3.0),  # far beyond: the same
    ):
        weights = torch.tensor(upstream)
        found = torch.autograd.grad((theirs * weights).sum(), [x, scale], retain_graph=True)
        # One quotient and one difference of numbers up to 3.2: a few times 2**-23.
        torch.testing.assert_close(found, (torch.tensor(their_x), torch.tensor([their_scale])), rtol=0, atol=1e-6)
        mine = gradients(grid, x.detach(), weights)
        torch.testing.assert_close(mine[1:3], (torch.tensor(our_x), torch.tensor([our_scale])), rtol=0, atol=1e-6)


def test_a_range_is_covered_from_end_to_end():
    low, high = torch.tensor([[-0.25], [1.0], [0.0]]), torch.tensor([[1.5], [1.0], [0.0]])
    grid = LsqPlusGrid.from_range(QuantSpec.unsigned(3), low, high)
    levels = grid.levels()
    torch.testing.assert_close(levels[0, 0], torch.linspace(-0.25, 1.5, 8), **exact)
    torch.testing.assert_close(levels[1, 0], torch.arange(1.0, 9.0), **exact)  # no width: a scale of 1 from there
    torch.testing.assert_close(levels[2, 0], torch.arange(0.0, 8.0), **exact)
    signed = LsqPlusGrid.from_range(QuantSpec.signed(3), low[:1], high[:1])
    torch.testing.assert_close(signed.levels(), levels[:1], **exact)
    assert (signed.qmin, signed.qmax, signed.tile_shape) == (-4, 3, (1, 1))


def test_a_short_negative_tail_is_kept_where_other_grids_lose_it():
    x = torch.nn.functional.silu(torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    low, high = x.min().reshape(1), x.max().reshape(1)
    grids = [
        LsqPlusGrid.from_range(QuantSpec.unsigned(4), low, high),
        UniformGrid.from_range(QuantSpec.signed(4), low, high),
        UniformGrid.from_range(QuantSpec.unsigned(4, symmetric=True), low, high),
    ]
    errors = [float((grid.fake_quantize(x, NearestEven()).detach() - x).square().mean()) for grid in grids]
    assert errors[0] < 0.8 * min(errors[1:])


@settings(deadline=None, max_examples=40)
@given(seed=seeds, bits=st.integers(1, 8))
def test_frozen_it_takes_the_same_codes_next_to_every_threshold(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    scale, offset = torch.rand(2, 1, generator=generator) + 0.01, torch.randn(2, 1, generator=generator)
    grid = LsqPlusGrid(scale, offset, qmin=0, qmax=2**bits - 1)
    middles = (grid.levels()[:, 0, 1:] + grid.levels()[:, 0, :-1]) / 2
    up, down = (torch.nextafter(middles, torch.full_like(middles, end)) for end in (torch.inf, -torch.inf))
    x = torch.cat([middles, up, down, grid.levels()[:, 0]], 1)
    found = [each.quantize(x, NearestEven()).detach() for each in (grid, grid.frozen())]
    torch.testing.assert_close(*found, **exact)
    reals = [each.fake_quantize(x, NearestEven()).detach() for each in (grid, grid.frozen())]
    torch.testing.assert_close(*reals, **exact)


def test_another_rounding_has_the_same_gradients_up_to_its_own_choice():
    x = torch.linspace(-2, 3, 41, dtype=torch.float64)
    grid = LsqPlusGrid(torch.tensor([0.4], dtype=torch.float64), torch.tensor([-0.3]).double(), qmin=0, qmax=5)
    torch.manual_seed(0)
    levels, dx, ds, db = gradients(grid, x, torch.ones_like(x), Stochastic())
    low, high = grid.levels()[0, 0], grid.levels()[0, -1]
    inside = (x >= low) & (x <= high)
    torch.testing.assert_close(dx, inside.double(), **exact)
    # (level - x) / scale inside, the end's code outside: 41 terms below 6, each rounded a few times.
    terms = torch.where(inside, (levels - x) / 0.4, torch.where(x > high, 5.0, 0.0))
    torch.testing.assert_close(ds, terms.sum().reshape(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(db, (~inside).sum().double().reshape(1), rtol=0, atol=1e-12)


def test_the_gradient_scale_multiplies_both():
    x, ones = torch.tensor([-3.0, 0.3, 9.0]), torch.ones(3)
    plain, scaled = (
        gradients(LsqPlusGrid(torch.ones(1), torch.zeros(1), qmin=-2, qmax=3, gradient_scale=factor), x, ones)
        for factor in (1.0, 0.25)
    )
    torch.testing.assert_close(scaled, (*plain[:2], plain[2] / 4, plain[3] / 4), **exact)


def test_a_scale_that_was_pushed_below_zero_comes_back():
    grid = LsqPlusGrid(torch.tensor([[0.5], [0.5]]), qmin=0, qmax=3)
    with torch.no_grad():
        grid.scale.copy_(torch.tensor([[-0.5], [0.25]]))
    assert grid.levels().diff(dim=-1).min() >= 0  # until then, too, no two levels change places
    grid.project()
    torch.testing.assert_close(grid.scale.detach(), torch.tensor([[0.0005], [0.25]]), **exact)


def test_a_grid_that_does_not_learn_has_no_parameters():
    grid = LsqPlusGrid(torch.ones(1), qmin=0, qmax=3, learnable=False)
    assert not list(grid.parameters())
    assert sorted(grid.state_dict()) == ["offset", "scale"]
    check_grid(grid)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_width_is_refused(scale):
    with pytest.raises(RangeError, match="1 of 2 values that are not positive and finite"):
        LsqPlusGrid(torch.tensor([1.0, scale]), qmin=0, qmax=3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpecError, match="qmin must be below qmax"):
        LsqPlusGrid(torch.ones(1), qmin=3, qmax=3)
    with pytest.raises(ShapeError, match="at least one axis"):
        LsqPlusGrid(torch.tensor(1.0), qmin=0, qmax=3)
    with pytest.raises(ShapeError, match=r"offset of shape \(2,\)"):
        LsqPlusGrid(torch.ones(1), torch.zeros(2), qmin=0, qmax=3)
    with pytest.raises(RangeError, match="offset nan"):
        LsqPlusGrid(torch.ones(1), torch.tensor([torch.nan]), qmin=0, qmax=3)
    spec = QuantSpec.unsigned(2, granularity=PerChannel(0))
    with pytest.raises(RangeError, match="not finite"):
        LsqPlusGrid.from_range(spec, torch.zeros(1), torch.tensor([torch.inf]))
    with pytest.raises(RangeError, match="above high"):
        LsqPlusGrid.from_range(spec, torch.ones(1), torch.zeros(1))
