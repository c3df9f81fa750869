"""Sums of powers of two."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import NearestEven, NearestTowardZero, Quantizer, QuantSpec, RangeError, ShapeError, SpecError, UniformGrid
from q_core.testing import check_grid
from q_nulsq.peers.apot import ApotGrid, additive_powers
from q_nulsq.peers.normalization import WeightNormalization
from q_nulsq.positivity import Exponential, Softplus

from .derivatives import gradients
from .loops import over

exact = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**32 - 1)


def specs(bits):
    return [QuantSpec.unsigned(bits), QuantSpec.signed(bits, narrow=True)]


def published(bits):
    """Return the level set from the formula, with k = 2, as fractions."""
    count = bits // 2
    if bits % 2 == 0:
        terms = [[0, *(Fraction(1, 2 ** (i + j * count)) for j in range(3))] for i in range(count)]
    else:
        terms = [[0, *(Fraction(1, 2**e) for e in (i, i + count, i + 2 * count + 1))] for i in range(count)]
        terms.append([0, Fraction(1, 2 ** (2 * count))])
    sums = {Fraction(0)}
    for term in terms:
        sums = {total + power for total in sums for power in term}
    return sorted(total / max(sums) for total in sums)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_level_set_is_the_papers_formula_for_every_number_of_bits(bits):
    expected = torch.tensor([float(level) for level in published(bits)], dtype=torch.float64)
    assert len(expected) == 2**bits
    # One division of sums that float64 holds exactly.
    torch.testing.assert_close(additive_powers(bits), expected, rtol=2.3e-16, atol=0)


def test_the_level_sets_of_two_three_and_four_bits_are_the_published_ones():
    """Those of activations; weights have one bit for the sign, so a weight of 3 bits has the set of 2."""
    torch.testing.assert_close(additive_powers(2), torch.tensor([0, 1 / 4, 1 / 2, 1]).double(), **exact)
    three = torch.tensor([0, 1, 2, 3, 4, 6, 8, 10]).double() / 10  # 1/2, 1/4, 1/16 and 1/8, over 5/8
    torch.testing.assert_close(additive_powers(3), three, **exact)
    pairs = [a + b for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2, 1 / 8, 1 / 32)]
    torch.testing.assert_close(additive_powers(4), torch.tensor(pairs).double().sort().values / 1.5, **exact)


@pytest.mark.parametrize(("bits", "base_bits"), [(2, 1), (8, 1), (4, 4), (3, 3), (6, 3), (1, 1)])
def test_terms_of_other_sizes_make_the_sets_of_the_formula(bits, base_bits):
    count = bits // base_bits
    sums = {Fraction(0)}
    for i in range(count):
        powers = [Fraction(0), *(Fraction(1, 2 ** (i + j * count)) for j in range(2**base_bits - 1))]
        sums = {total + power for total in sums for power in powers}
    expected = torch.tensor([float(total / max(sums)) for total in sorted(sums)], dtype=torch.float64)
    torch.testing.assert_close(additive_powers(bits, base_bits=base_bits), expected, rtol=2.3e-16, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("channels", [False, True])
def test_the_laws_hold_for_all_bits_both_signs_and_both_granularities(bits, channels):
    clip = torch.tensor([[0.7], [3.0], [0.02]]) if channels else torch.tensor([1.7])
    for spec in specs(bits):
        check_grid(ApotGrid(clip, qmin=spec.qmin, qmax=spec.qmax))
        # Published weights go on learning outside.
        check_grid(ApotGrid(clip, qmin=spec.qmin, qmax=spec.qmax, pass_outside=True), waive=["gradient"])


@pytest.mark.parametrize("positivity", [Softplus(), Exponential()])
def test_the_laws_hold_for_other_ways_to_be_positive(positivity):
    check_grid(ApotGrid(torch.tensor([1.7]), qmin=-7, qmax=7, positivity=positivity))


@settings(max_examples=40)
@given(seed=seeds, bits=st.integers(2, 8), signed=st.booleans(), exponent=st.integers(-10, 10))
def test_values_and_gradients_are_the_printed_ones(seed, bits, signed, exponent):
    spec = specs(bits)[signed]
    options = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    clip = (torch.rand(2, 1, **options) + 0.1) * 2.0**exponent
    x = clip * (3 * torch.rand(2, 31, **options) - 1.5)
    upstream = torch.randn(2, 31, **options)
    magnitudes = [float(level) for level in published(bits - signed)]
    units = [-level for level in magnitudes[:0:-1]] * signed + magnitudes

    def element(real, row):
        alpha = float(clip[row])
        v = real / alpha
        if v > 1:
            return alpha, 0.0, 1.0
        if v < units[0]:
            return alpha * units[0], 0.0, units[0]
        q = min(units, key=lambda unit: abs(unit - v))
        return alpha * q, 1.0, q - v

    y, dx, da = over(x, element)
    grid = ApotGrid(clip, qmin=spec.qmin, qmax=spec.qmax)
    found = gradients(grid, x, upstream)
    # Sums of 31 terms of at most 1, each known to a few eps of 1, times an upstream below 6.
    torch.testing.assert_close(found["clip"], (da * upstream).sum(1, True), rtol=0, atol=1e-13)
    torch.testing.assert_close(found["x"], dx * upstream, **exact)
    torch.testing.assert_close(found["levels"], y, rtol=1e-14, atol=0)
    weights = gradients(ApotGrid(clip, qmin=spec.qmin, qmax=spec.qmax, pass_outside=True), x, upstream)
    torch.testing.assert_close(weights["x"], upstream, **exact)
    torch.testing.assert_close(weights["levels"], found["levels"], **exact)
    torch.testing.assert_close(weights["clip"], found["clip"], **exact)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_powers_it_is_a_uniform_grid(bits):
    for spec in specs(bits):
        # A scale of 1/8 and data of whole numbers of 1/64: levels and middles are exact, ties and ends are all met.
        clip, scale = torch.tensor([spec.qmax / 8]), torch.tensor([1 / 8])
        x = torch.arange(-9 * spec.qmax, 9 * spec.qmax) / 64
        upstream = (torch.arange(len(x)).remainder(5) - 2).float()
        found = gradients(ApotGrid(clip, qmin=spec.qmin, qmax=spec.qmax, base_bits=1), x, upstream)
        uniform = UniformGrid(scale, qmin=spec.qmin, qmax=spec.qmax, learnable=True)
        expected = gradients(uniform, x, upstream)
        # The unit k / qmax times the clip is k/8 but for two roundings, 2**-24 of each.
        torch.testing.assert_close(found["levels"], expected["levels"], rtol=1.2e-7, atol=0)
        torch.testing.assert_close(found["x"], expected["x"], **exact)
        # The clip is qmax scales, so its gradient is that of the scale over qmax: 4000 terms of at most 2, summed in
        # float64 but each rounded to 2**-23 or so.
        torch.testing.assert_close(found["clip"], expected["scale"] / spec.qmax, rtol=1e-6, atol=1e-3 / spec.qmax)


def test_a_weight_of_two_bits_has_three_levels():
    grid = ApotGrid.from_range(QuantSpec.signed(2, narrow=True), torch.tensor([-1.0]), torch.tensor([0.5]))
    torch.testing.assert_close(grid.levels(), torch.tensor([[-1.0, 0.0, 1.0]]), **exact)


def test_the_start_is_the_range_or_a_published_constant():
    low, high = torch.tensor([[-0.5], [-3.0], [0.0]]), torch.tensor([[2.0], [1.0], [0.0]])
    signed, unsigned = specs(4)[::-1]
    grid = ApotGrid.from_range(signed, low, high)
    torch.testing.assert_close(grid.clip.detach(), torch.tensor([[2.0], [3.0], [1.0]]), **exact)
    assert (grid.qmin, grid.qmax, grid.tile_shape, grid.pass_outside) == (-7, 7, (3, 1), True)
    grid = ApotGrid.from_range(unsigned, low, high)
    torch.testing.assert_close(grid.clip.detach(), torch.tensor([[2.0], [1.0], [1.0]]), **exact)
    assert not grid.pass_outside
    grid = partial(ApotGrid.from_range, clip=8.0)(unsigned, low, high)
    torch.testing.assert_close(grid.clip.detach(), torch.full((3, 1), 8.0), **exact)


def test_weights_are_normalised_before():
    weight = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.5
    grid = ApotGrid.from_range(specs(3)[1], weight.min().reshape(1), weight.max().reshape(1), clip=3.0)
    quantizer = Quantizer(grid, transform=WeightNormalization())
    used = quantizer.codes(weight).unique()
    torch.testing.assert_close(used, torch.arange(-3, 4, dtype=torch.int32), **exact)
    normal = (weight - weight.mean()) / (weight.std() + 1e-5)
    torch.testing.assert_close(quantizer(weight), grid.fake_quantize(normal, NearestEven()), **exact)


def test_frozen_it_is_a_table_that_takes_the_same_codes_next_to_every_threshold():
    grid = ApotGrid(torch.tensor([[0.3], [1.9]]), qmin=-15, qmax=15)
    middles = (grid.levels()[:, 0, 1:] + grid.levels()[:, 0, :-1]) / 2
    up, down = (torch.nextafter(middles, torch.full_like(middles, end)) for end in (torch.inf, -torch.inf))
    x = torch.cat([middles, up, down, grid.levels()[:, 0]], 1)
    for rounding in (NearestEven(), NearestTowardZero()):
        found = [each.quantize(x, rounding).detach() for each in (grid, grid.frozen())]
        torch.testing.assert_close(*found, **exact)


def test_a_clip_that_was_pushed_below_zero_comes_back():
    grid = ApotGrid(torch.tensor([[0.5, 0.25]]), qmin=0, qmax=3)
    with torch.no_grad():
        grid.clip.copy_(torch.tensor([[-0.5, 0.25]]))
    assert grid.levels().diff(dim=-1).min() >= 0  # until then, too, no two levels change places
    grid.project()
    torch.testing.assert_close(grid.clip.detach(), torch.tensor([[0.0005, 0.25]]), **exact)


def test_the_gradient_scale_multiplies_that_of_the_clip():
    x, ones = torch.tensor([-3.0, 0.3, 9.0]), torch.ones(3)
    plain, scaled = (
        gradients(ApotGrid(torch.ones(1), qmin=-3, qmax=3, gradient_scale=factor), x, ones)["clip"]
        for factor in (1.0, 0.25)
    )
    torch.testing.assert_close(scaled, plain / 4, **exact)


def test_infinities_are_clipped_and_leave_finite_gradients():
    x = torch.tensor([-torch.inf, 0.2, torch.inf])
    found = gradients(ApotGrid(torch.ones(1), qmin=-3, qmax=3), x, torch.ones(3))
    torch.testing.assert_close(found["levels"][[0, 2]], torch.tensor([-1.0, 1.0]), **exact)
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


@pytest.mark.parametrize(
    ("qmin", "qmax"), [(-4, 3), (0, 1), (0, 2), (-3, 7), (0, 511), (-255, 255), (-7, 0), (0, 0), (-8, 8)]
)
def test_codes_that_the_method_does_not_define_are_refused(qmin, qmax):
    with pytest.raises(SpecError, match=f"codes {qmin} to {qmax}: APoT is defined for"):
        ApotGrid(torch.ones(1), qmin=qmin, qmax=qmax)


@pytest.mark.parametrize("spec", [QuantSpec.unsigned(1), QuantSpec.signed(4), QuantSpec.signed(1)])
def test_specs_that_the_method_does_not_define_are_refused(spec):
    with pytest.raises(SpecError, match="APoT is defined for"):
        ApotGrid.from_range(spec, torch.zeros(1), torch.ones(1))


def test_terms_that_do_not_make_up_the_bits_are_refused():
    with pytest.raises(SpecError, match="4 bits with base_bits=3: the bits of the magnitude must be a multiple"):
        additive_powers(4, base_bits=3)
    with pytest.raises(SpecError, match="closer together than float32"):
        additive_powers(8, base_bits=8)
    with pytest.raises(SpecError, match="closer together than float32"):
        additive_powers(8, base_bits=4)
    for bits, base_bits in ((0, 2), (9, 2), (4, 0)):
        with pytest.raises(SpecError, match="supported are 1 to 8 bits"):
            additive_powers(bits, base_bits=base_bits)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_that_is_no_level_is_refused(clip):
    with pytest.raises(RangeError, match="clip has 1 of 2 values"):
        ApotGrid(torch.tensor([1.0, clip]), qmin=0, qmax=3)


def test_ranges_that_cannot_be_covered_are_refused():
    unsigned = QuantSpec.unsigned(2)
    with pytest.raises(ShapeError, match="at least one axis"):
        ApotGrid(torch.tensor(1.0), qmin=0, qmax=3)
    with pytest.raises(RangeError, match=r"range -2.0 to -1.0 is negative"):
        ApotGrid.from_range(unsigned, torch.tensor([0.0, -2.0]), torch.tensor([1.0, -1.0]))
    with pytest.raises(RangeError, match="not finite"):
        ApotGrid.from_range(unsigned, torch.zeros(1), torch.tensor([torch.inf]))
    with pytest.raises(RangeError, match="above high"):
        ApotGrid.from_range(unsigned, torch.ones(1), torch.zeros(1))
    with pytest.raises(RangeError, match="clip has 1 of 1"):
        ApotGrid.from_range(unsigned, torch.zeros(1), torch.ones(1), clip=-1.0)
