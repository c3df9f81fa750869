"""Costs against independent arithmetic."""

import dataclasses
import itertools
from fractions import Fraction

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from q_adder import AdderConv2d
from q_adder.cost import (
    EnergyTable,
    FlopCount,
    LayerGeometry,
    adder_energy,
    convolution_energy,
    corrected_flops,
    published_flops,
    scale_overhead,
    square_flops,
    square_overhead,
    square_overhead_of_four,
    square_overhead_offline,
    traffic,
)
from q_core import RangeError, ShapeError

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
