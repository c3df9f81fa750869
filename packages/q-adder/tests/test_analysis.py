"""Costs against independent arithmetic, histograms and order statistics against values counted by hand."""

import dataclasses
import itertools
from fractions import Fraction

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from q_adder import AdderConv2d, adder2d
from q_adder.analysis import (
    EnergyTable,
    FlopCount,
    LayerGeometry,
    adder_energy,
    convolution_energy,
    corrected_flops,
    published_flops,
    quantile_index,
    quantile_sweep,
    redistribution_histograms,
    released_quantile_index,
    scale_overhead,
    square_flops,
    square_overhead,
    square_overhead_of_four,
    square_overhead_offline,
    traffic,
)
from q_core import DataError, RangeError, ShapeError

SETTINGS = hypothesis.settings(deadline=None, max_examples=60)


def layer(**sizes) -> LayerGeometry:
    given = {"inputs": 64, "outputs": 64, "height": 14, "width": 14, "padding": (1, 1)}
    return LayerGeometry(**(given | sizes))


@st.composite
def layers(draw) -> LayerGeometry:
    groups = draw(st.integers(1, 3))
    kernel, dilation, padding = (draw(st.tuples(st.integers(low, 3), st.integers(low, 3))) for low in (1, 1, 0))
    reach = [dilation[axis] * (kernel[axis] - 1) + 1 for axis in (0, 1)]
    height, width = (max(1, reach[axis] - 2 * padding[axis]) + draw(st.integers(0, 6)) for axis in (0, 1))
    return LayerGeometry(
        inputs=groups * draw(st.integers(1, 4)),
        outputs=groups * draw(st.integers(1, 4)),
        height=height,
        width=width,
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


# Sizes of a layer ------------------------------------------------------------------------------------------------


@SETTINGS
@hypothesis.given(layers())
def test_sizes_are_those_of_a_layer_that_runs(geometry):
    names = {"inputs": "in_channels", "outputs": "out_channels", "kernel": "kernel_size"}
    facts = {names.get(key, key): value for key, value in dataclasses.asdict(geometry).items()}
    height, width = facts.pop("height"), facts.pop("width")
    adder = AdderConv2d(**facts)
    out = adder(torch.zeros(1, geometry.inputs, height, width))
    assert out.shape == (1, geometry.outputs, geometry.output_height, geometry.output_width)
    assert out.numel() == geometry.output_elements
    assert adder.weight.numel() == geometry.weight_elements
    assert adder.weight[0].numel() == geometry.taps
    assert LayerGeometry.of(adder, height=height, width=width) == geometry


def test_padding_by_name_is_read_as_pixels():
    same = nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2)
    assert LayerGeometry.of(same, height=9, width=9).padding == (2, 4)
    assert LayerGeometry.of(nn.Conv2d(4, 6, 3, padding="valid"), height=9, width=9).padding == (0, 0)


def test_padding_that_differs_from_side_to_side_is_refused():
    uneven = nn.Conv2d(4, 6, 2, padding="same")
    with pytest.raises(ShapeError, match=r"padding='same' of a layer with kernel \(2, 2\)"):
        LayerGeometry.of(uneven, height=9, width=9)


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ({"inputs": 0}, RangeError, "inputs=0: it must be at least 1"),
        ({"stride": (1, 0)}, RangeError, r"stride=\(1, 0\): it must be at least 1"),
        ({"padding": (-1, 0)}, RangeError, r"padding=\(-1, 0\): it must be at least 0"),
        ({"groups": 3}, ShapeError, "groups=3 with 64 input and 64 output channels"),
        ({"width": 2, "kernel": (3, 5)}, ShapeError, "window of 5 pixels on a padded input of 4"),
    ],
)
def test_sizes_that_make_no_layer_are_refused(sizes, error, words):
    with pytest.raises(error, match=words):
        layer(**sizes)


# Operations ------------------------------------------------------------------------------------------------------


def printed_total(h: int, w: int, d: int, c_in: int, c_out: int, g: int) -> int:
    """Eq. 2 of the supplement, character by character."""
    return (
        2 * h * w * (c_in * d**2 + 1) * c_out
        + c_in * d**2 * c_out
        + g * h * w * c_in
        + (h - d + 3) * (w - d + 3) * c_out
    )


@SETTINGS
@hypothesis.given(
    h=st.integers(3, 60),
    w=st.integers(3, 60),
    d=st.integers(1, 5),
    c_in=st.integers(1, 300),
    c_out=st.integers(4, 300),
    g=st.integers(1, 4),
)
def test_published_count_is_equation_two(h, w, d, c_in, c_out, g):
    geometry = LayerGeometry(inputs=c_in, outputs=c_out, height=h, width=w, kernel=(d, d), padding=(1, 1))
    assert published_flops(geometry, scales=g).total == printed_total(h, w, d, c_in, c_out, g)


def test_terms_of_a_layer_counted_by_hand():
    # 2x2 outputs of 3 kernels with 2*9 taps each, on 4x4x2 inputs.
    geometry = LayerGeometry(inputs=2, outputs=3, height=4, width=4)
    assert corrected_flops(geometry, scales=2) == FlopCount(distance=2 * 4 * 19 * 3, weight=54, input=64, output=12)
    assert published_flops(geometry, scales=2) == FlopCount(distance=2 * 16 * 19 * 3, weight=54, input=64, output=12)
    assert corrected_flops(geometry).per_image == 456 + 32 + 12
    assert corrected_flops(geometry).total == 456 + 32 + 12 + 54


def test_stride_two_is_counted_four_times_too_much():
    geometry = layer(stride=(2, 2))
    assert published_flops(geometry).distance == 4 * corrected_flops(geometry).distance
    assert published_flops(layer()) == corrected_flops(layer())


def test_groups_of_channels_divide_the_taps():
    whole, parts = corrected_flops(layer()), corrected_flops(layer(groups=4))
    assert parts.weight * 4 == whole.weight
    assert (parts.distance - 2 * 196 * 64) * 4 == whole.distance - 2 * 196 * 64
    assert (parts.input, parts.output) == (whole.input, whole.output)


@SETTINGS
@hypothesis.given(c=st.integers(1, 500), k=st.integers(1, 250), g=st.integers(1, 8))
def test_equation_three_is_equation_two_for_equal_channels(c, k, g):
    hypothesis.assume(g <= c)
    assert square_flops(c, k, scales=g) == printed_total(k, k, 3, c, c, g)


@SETTINGS
@hypothesis.given(c=st.integers(8, 500), k=st.integers(1, 250), g=st.integers(1, 8))
def test_equation_four_is_the_increase_of_equation_three(c, k, g):
    one, more = square_flops(c, k), square_flops(c, k, scales=g)
    assert square_overhead(c, k, scales=g) == Fraction(more - one, one)


@SETTINGS
@hypothesis.given(c=st.integers(8, 500), k=st.integers(1, 250), g=st.integers(2, 8))
def test_dropping_the_weight_is_an_error_below_one_in_two_k_squared(c, k, g):
    error = square_overhead_offline(c, scales=g) / square_overhead(c, k, scales=g) - 1
    assert error == Fraction(1, 2 * k * k) * Fraction(18 * c, 18 * c + 4)
    assert 0 < error < Fraction(1, 2 * k * k)


@SETTINGS
@hypothesis.given(c=st.integers(8, 500), k=st.integers(3, 250), g=st.integers(1, 8))
def test_the_approximation_is_exact_for_the_work_of_one_image(c, k, g):
    geometry = layer(inputs=c, outputs=c, height=k, width=k)
    assert scale_overhead(geometry, scales=g) == square_overhead_offline(c, scales=g)


@SETTINGS
@hypothesis.given(c=st.integers(4, 2000))
def test_equation_five_rounds_by_one_in_eighteen_c_plus_three(c):
    error = square_overhead_of_four(c) / square_overhead_offline(c, scales=4) - 1
    assert error == Fraction(1, 18 * c + 3)


def test_the_overhead_at_stride_two_is_almost_four_times_that_at_stride_one():
    one, two = scale_overhead(layer(), scales=4), scale_overhead(layer(stride=(2, 2)), scales=4)
    assert one == Fraction(3, 18 * 64 + 4)
    # A quarter of the outputs: 2 * (9 * 64 + 1) / 4 + 1 + 1/4 operations to each input element.
    assert two == Fraction(3) / (Fraction(2 * (9 * 64 + 1), 4) + 1 + Fraction(1, 4))
    assert Fraction(39, 10) < two / one < 4


@pytest.mark.parametrize("scales", [0, 65])
@pytest.mark.parametrize(
    "count",
    [
        published_flops,
        corrected_flops,
        scale_overhead,
        lambda geometry, scales: traffic(geometry, bits=4, scales=scales),
    ],
)
def test_more_scales_than_kernels_are_refused(count, scales):
    with pytest.raises(RangeError, match=f"scales={scales} for 64 kernels: supported are 1 to 64"):
        count(layer(), scales=scales)


def test_square_layers_without_pixels_or_kernels_are_refused():
    with pytest.raises(RangeError, match="channels=8, size=0"):
        square_flops(8, 0)
    with pytest.raises(RangeError, match="scales=4 for 3 kernels"):
        square_overhead_of_four(3)


# Memory ----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_layer_counted_by_hand():
    # 5x5x3 inputs, 9 outputs of 2 kernels with 27 taps; 3 bits of 75 inputs fill 29 bytes, of 54 weights 21.
    geometry = LayerGeometry(inputs=3, outputs=2, height=5, width=5)
    moved = traffic(geometry, bits=3, scales=2)
    assert dataclasses.astuple(moved) == (300, 58, 21, 72)
    assert moved.total == 300 + 2 * 58 + 21 + 72
    still = traffic(geometry)
    assert (dataclasses.astuple(still), still.total) == ((300, 0, 216, 72), 588)


@SETTINGS
@hypothesis.given(geometry=layers(), bits=st.integers(1, 8))
def test_each_scale_adds_one_copy_and_nothing_else(geometry, bits):
    parts = [traffic(geometry, bits=bits, scales=scales) for scales in range(1, geometry.outputs + 1)]
    for fewer, more in itertools.pairwise(parts):
        assert more.copies - fewer.copies == parts[0].copies
        assert (more.source, more.weight, more.output) == (fewer.source, fewer.weight, fewer.output)


@pytest.mark.parametrize("bits", [0, 9])
def test_widths_that_no_code_has_are_refused(bits):
    for count in (traffic, adder_energy, convolution_energy):
        with pytest.raises(RangeError, match=f"bits={bits}: supported are 1 to 8, and None"):
            count(layer(), bits=bits)


def test_a_float_layer_has_no_scales():
    for count in (traffic, adder_energy):
        with pytest.raises(RangeError, match="scales=4 of a float32 layer"):
            count(layer(), scales=4)


# Energy ----------------------------------------------------------------------------------------------------------

# Products and quotients of a handful of float64 numbers: some ten relative errors of 2^-53.
ROUNDING = {"rtol": 1e-14, "atol": 0}


def test_four_requantizations_weigh_against_the_distances_as_in_the_limits_of_proposition_two():
    table = EnergyTable()
    geometry = layer()
    four = adder_energy(geometry, bits=8, scales=4, accumulation=table.int8_add)
    one = adder_energy(geometry, bits=8, scales=1, accumulation=table.int8_add)
    elements = geometry.input_elements
    torch.testing.assert_close(four.requantization / elements, 14.8, **ROUNDING)
    torch.testing.assert_close(four.arithmetic / elements, 18 * 64 * 0.03, **ROUNDING)
    assert round(four.arithmetic / elements, 1) == 34.6
    assert round((four.requantization - one.requantization) / one.arithmetic, 2) == 0.32
    # Counted as operations, the same step is 0.26 %.
    assert round(100 * float(scale_overhead(geometry, scales=4)), 2) == 0.26


def test_energies_of_the_four_layers_by_hand():
    geometry = LayerGeometry(inputs=2, outputs=3, height=4, width=4)  # 216 pairs, 32 inputs, 54 weights, 12 outputs
    conversions = (32 * 3.7, 12 * 3.7)
    float_memory = 4 * (32 + 54 + 12) / 8 * 100.0
    memory = (4 * 32 + 2 * 32 + 54 + 4 * 12) / 8 * 100.0
    expected = {
        (adder_energy, None): (216 * (0.9 + 0.9), 0.0, 0.0, float_memory),
        (adder_energy, 8): (216 * (0.03 + 0.1), *conversions, memory),
        (convolution_energy, None): (216 * (3.7 + 0.9), 0.0, 0.0, float_memory),
        (convolution_energy, 8): (216 * (0.2 + 0.1), *conversions, memory),
    }
    for (energy, bits), parts in expected.items():
        actual = energy(geometry, bits=bits)
        torch.testing.assert_close(dataclasses.astuple(actual), parts, **ROUNDING)
        torch.testing.assert_close(actual.total, sum(parts), **ROUNDING)


def test_energies_can_be_replaced():
    table = EnergyTable(int8_add=1.0, int32_add=2.0, float32_multiply=4.0, cache_1m=8.0)
    geometry = LayerGeometry(inputs=1, outputs=1, height=1, width=1, kernel=(1, 1))
    energy = adder_energy(geometry, bits=8, table=table)
    # 4 + 2 + 1 + 4 bytes moved, of 1 pJ each.
    assert dataclasses.astuple(energy) == (3.0, 4.0, 4.0, 11.0)
    assert adder_energy(geometry, bits=8, table=table, accumulation=0.0, access=16.0).total == 1 + 4 + 4 + 22


@SETTINGS
@hypothesis.given(geometry=layers(), bits=st.integers(1, 8))
def test_with_one_scale_an_adder_layer_differs_from_a_convolution_in_arithmetic_alone(geometry, bits):
    adder, convolution = adder_energy(geometry, bits=bits), convolution_energy(geometry, bits=bits)
    assert adder.arithmetic < convolution.arithmetic
    assert dataclasses.replace(adder, arithmetic=0.0) == dataclasses.replace(convolution, arithmetic=0.0)


def test_energies_that_are_none_are_refused():
    with pytest.raises(RangeError, match=r"int8_add=-1.0 pJ"):
        EnergyTable(int8_add=-1.0)
    with pytest.raises(RangeError, match=r"dram=nan pJ"):
        EnergyTable(dram=float("nan"))
    with pytest.raises(RangeError, match=r"access=-2.0 pJ"):
        adder_energy(layer(), bits=8, access=-2.0)
    with pytest.raises(RangeError, match=r"accumulation=inf pJ"):
        convolution_energy(layer(), accumulation=float("inf"))


# Distributions ---------------------------------------------------------------------------------------------------


def counted(values: torch.Tensor, ends: tuple[float, float], qmin: int, bits: int) -> list[int]:
    """Round each value on its own, in exact arithmetic, and count."""
    last = 2**bits - 1
    scale = (Fraction(ends[1]) - Fraction(ends[0])) / last
    codes = [min(max(round(Fraction(value) / scale), qmin), qmin + last) for value in values.flatten().tolist()]
    return [codes.count(code) for code in range(qmin, qmin + 2**bits)]


def test_a_layer_counted_by_hand():
    weight = torch.tensor([[-6.0, 0.0, 1.0], [2.0, 3.0, 9.0]])
    inputs = torch.tensor([0.0, 1.0, 1.0, 2.0, 4.0])
    found = redistribution_histograms(weight, inputs, low=0.0, high=3.0, bits=2, bins=3)
    after = found.redistributed
    assert (after.weight.qmin, after.weight.codes.tolist(), after.input.codes.tolist()) == (
        0,
        [2, 1, 1, 2],
        [1, 2, 1, 1],
    )
    assert after.weight.edges.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert (after.weight.counts.tolist(), after.input.counts.tolist()) == ([2, 1, 3], [1, 2, 2])
    assert (after.weight.occupied, after.weight.unused) == (4, 0.0)
    # -6 and 9 of the weights lie outside, 4 of the inputs; 3 lies on the end.
    assert (after.weight.clamped, after.input.clamped) == (2 / 6, 1 / 5)
    assert found.bias.tolist() == [-6.0, -6.0]
    assert torch.equal(found.narrow.weight.codes, after.weight.codes)
    # One range of [-9, 9]: a scale of 6, codes -2 to 1, zero among them; 3 is a tie between 0 and 1, and 0 is even.
    assert (found.wide.weight.qmin, found.wide.weight.codes.tolist()) == (-2, [0, 1, 4, 1])
    assert (found.wide.input.codes.tolist(), found.wide.input.unused) == ([0, 0, 4, 1], 0.5)
    assert (found.wide.weight.clamped, found.wide.input.clamped) == (0.0, 0.0)
    # Own ranges: [-6, 9] with a scale of 5, and [0, 4] with a scale of 4/3.
    assert (found.separate.weight.qmin, found.separate.weight.codes.tolist()) == (-1, [1, 3, 1, 1])
    assert (found.separate.input.qmin, found.separate.input.codes.tolist()) == (0, [1, 2, 1, 1])
    assert found.separate.weight.edges.tolist() == [-6.0, -1.0, 4.0, 9.0]


@SETTINGS
@hypothesis.given(
    seed=st.integers(0, 2**31),
    bits=st.integers(1, 8),
    spread=st.floats(0.1, 30),
    ends=st.sampled_from([(0.0, 1.75), (-2.25, 2.25), (-0.375, 3.125), (0.625, 2.0)]),  # exact: -2.25 is a tie
)
def test_counts_are_complete_and_codes_are_those_of_single_values(seed, bits, spread, ends):
    generator = torch.Generator().manual_seed(seed)
    weight = spread * torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=generator)
    inputs = torch.randn(2, 3, 4, 3, dtype=torch.float64, generator=generator)
    low, high = ends
    found = redistribution_histograms(weight, inputs, low=low, high=high, bits=bits, bins=17)
    for stage in (found.separate, found.wide, found.narrow, found.redistributed):
        for use, values in ((stage.weight, weight), (stage.input, inputs)):
            assert int(use.counts.sum()) == int(use.codes.sum()) == values.numel()
            assert (len(use.codes), len(use.edges)) == (2**bits, 18)
            assert use.occupied == sum(count > 0 for count in use.codes.tolist())
            assert (
                use.clamped
                == sum(not use.low <= value <= use.high for value in values.flatten().tolist()) / values.numel()
            )
    after = found.redistributed
    assert after.weight.codes.tolist() == counted(weight.clamp(low, high), (low, high), after.weight.qmin, bits)
    assert after.input.codes.tolist() == counted(inputs.clamp(low, high), (low, high), after.input.qmin, bits)


@SETTINGS
@hypothesis.given(high=st.floats(2**-10, 2**10, width=32))
def test_a_symmetric_range_of_four_bits_has_the_codes_of_the_paper(high):
    ends = torch.tensor([[-high, 0.0, high]], dtype=torch.float64)
    found = redistribution_histograms(ends, ends, low=-high, high=high)
    # -7.5 and 7.5 are ties: the even neighbours are -8 and 8, and 8 is beyond the last code.
    assert found.redistributed.weight.qmin == -8
    assert found.redistributed.weight.codes.nonzero().flatten().tolist() == [0, 8, 15]


@SETTINGS
@hypothesis.given(seed=st.integers(0, 2**31), ends=st.sampled_from([(0.0, 1.5), (-1.5, 1.5), (-0.5, 2.0)]))
def test_the_bias_is_what_the_lossless_clamp_owes(seed, ends):
    generator = torch.Generator().manual_seed(seed)
    low, high = ends
    weight = 4 * torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=generator)
    x = low + (high - low) * torch.rand(1, 2, 5, 4, dtype=torch.float64, generator=generator)
    found = redistribution_histograms(weight, x, low=low, high=high)
    clamped = adder2d(x, weight.clamp(low, high), found.bias, padding=1)
    # Sums of 18 differences below 30: errors of 2^-53 relative to some 500.
    torch.testing.assert_close(clamped, adder2d(x, weight, padding=1), atol=1e-12, rtol=0)


def test_wide_weights_waste_the_codes_of_the_activations():
    weight, inputs = torch.linspace(-50, 50, 400).reshape(4, 100), torch.linspace(0, 2, 1000)
    found = redistribution_histograms(weight, inputs, low=0.0, high=2.0)
    assert found.separate.input.occupied == found.redistributed.input.occupied == 16
    assert found.wide.input.occupied == 1
    assert found.wide.input.unused == 15 / 16
    assert 0.97 < found.narrow.weight.clamped < 0.99


def test_a_constant_tensor_takes_one_code():
    zeros = redistribution_histograms(torch.zeros(2, 3), torch.zeros(4), low=0.0, high=1.0, bits=3)
    for stage in (zeros.separate, zeros.wide, zeros.narrow, zeros.redistributed):
        assert (stage.weight.occupied, stage.input.occupied) == (1, 1)
    assert zeros.bias.tolist() == [0.0, 0.0]


def test_narrow_dtypes_are_counted_as_the_values_they_hold():
    weight, inputs = torch.randn(4, 9).to(torch.bfloat16), torch.rand(50).to(torch.float16)
    found = redistribution_histograms(weight, inputs, low=0.0, high=0.7)
    wide = redistribution_histograms(weight.double(), inputs.double(), low=0.0, high=0.7)
    assert torch.equal(found.redistributed.weight.codes, wide.redistributed.weight.codes)
    assert torch.equal(found.wide.input.counts, wide.wide.input.counts)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"low": 1.0, "high": 1.0}, RangeError, "low=1.0, high=1.0: the range must be finite"),
        ({"high": float("inf")}, RangeError, "high=inf"),
        ({"bits": 9}, RangeError, "bits=9: supported are 1 to 8"),
        ({"bins": 0}, RangeError, "bins=0"),
        ({"inputs": torch.zeros(0)}, DataError, r"inputs of shape \(0,\) holds no values"),
        ({"weight": torch.tensor([[1.0, float("nan")]])}, DataError, "1 of 2 weight are NaN or infinite"),
    ],
)
def test_histograms_of_what_is_no_distribution_are_refused(options, error, words):
    given = {"weight": torch.ones(2, 2), "inputs": torch.ones(3), "low": 0.0, "high": 1.0}
    with pytest.raises(error, match=words):
        redistribution_histograms(**(given | options))


# Order statistics ------------------------------------------------------------------------------------------------


def test_order_statistics_of_a_thousand_values_by_hand():
    values = torch.arange(-1000.0, 0.0)[torch.randperm(1000)]  # magnitudes 1 to 1000: the one at index i is i + 1
    low, middle, all_of_them = quantile_sweep(values, [0.5, 0.99, 1.0])
    # 0.5 * 999 = 499.5 is a tie, and 500 is even; released: (500 - 1) * 0.5 = 249.5, cut to 249.
    assert dataclasses.astuple(low) == (0.5, 501.0, 0.499, 250.0, 0.75)
    # 0.99 * 999 = 989.01; released: (990 - 1) * 0.99 = 979.11.
    assert dataclasses.astuple(middle) == (0.99, 990.0, 0.01, 980.0, 0.02)
    assert dataclasses.astuple(all_of_them) == (1.0, 1000.0, 0.0, 1000.0, 0.0)


@SETTINGS
@hypothesis.given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=200),
    alphas=st.lists(st.floats(0, 1, exclude_min=True), max_size=5),
)
def test_each_entry_is_the_order_statistic_of_its_formula(values, alphas):
    ascending, n = sorted(map(abs, values)), len(values)
    entries = quantile_sweep(torch.tensor(values, dtype=torch.float32), iter(alphas))
    assert [entry.alpha for entry in entries] == alphas
    for entry in entries:
        assert entry.range == ascending[round(entry.alpha * (n - 1))]
        assert entry.released_range == ascending[int((round(n * entry.alpha) - 1) * entry.alpha)]
        assert entry.clipped == sum(value > entry.range for value in ascending) / n
        assert entry.released_clipped == sum(value > entry.released_range for value in ascending) / n
        assert entry.released_range <= entry.range


def test_the_released_code_applies_alpha_twice():
    n = 10**7
    assert quantile_index(n, 0.9997) == 9_996_999
    assert abs(released_quantile_index(n, 0.9997) - 0.9997**2 * n) < 2


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0000001, float("nan")])
def test_alpha_outside_its_interval_is_refused(alpha):
    with pytest.raises(RangeError, match=f"alpha={alpha}: it must be above 0 and at most 1"):
        quantile_sweep(torch.ones(3), [0.5, alpha])
    with pytest.raises(RangeError, match="alpha="):
        released_quantile_index(3, alpha)


def test_order_statistics_of_nothing_and_of_nan_are_refused():
    with pytest.raises(DataError, match=r"values of shape \(2, 0\) holds no values"):
        quantile_sweep(torch.zeros(2, 0), [0.5])
    with pytest.raises(DataError, match="no values to take an order statistic of"):
        quantile_index(0, 0.5)
    with pytest.raises(DataError, match="2 of 3 values are NaN or infinite"):
        quantile_sweep(torch.tensor([float("nan"), 1.0, float("-inf")]), [0.5])
