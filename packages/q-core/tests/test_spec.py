"""Codes and granularities are facts: right, or refused with the value."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q_core import PerBlock, PerChannel, PerGroup, PerTensor, QuantSpec, ShapeError, SpecError


@given(bits=st.integers(1, 8), symmetric=st.booleans())
def test_signed_and_unsigned_codes_fill_their_bits(bits, symmetric):
    signed, unsigned = QuantSpec.signed(bits, symmetric=symmetric), QuantSpec.unsigned(bits, symmetric=symmetric)
    assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)
    assert signed.symmetric is unsigned.symmetric is symmetric


@given(bits=st.integers(2, 8))
def test_narrow_codes_are_symmetric_about_zero(bits):
    spec = QuantSpec.signed(bits, narrow=True)
    assert spec.qmin == -spec.qmax == 1 - 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [0, 9, 16, -1])
def test_unsupported_bits_are_refused_by_value(bits):
    for make in (QuantSpec.signed, QuantSpec.unsigned):
        with pytest.raises(SpecError, match=f"bits={bits}: supported are 1 to 8; leave the slot empty to keep it"):
            make(bits)
    with pytest.raises(SpecError, match=f"bits={bits}: supported are 1 to 8"):
        QuantSpec(bits, 0, 1, True)


def test_a_narrow_grid_of_one_bit_is_refused():
    with pytest.raises(SpecError, match="only code 0 would be left; use bits=2"):
        QuantSpec.signed(1, narrow=True)


@pytest.mark.parametrize(
    ("qmin", "qmax", "message"),
    [
        (0, 16, "codes 0 to 16 with bits=4: a grid has 2 to 16 codes"),
        (3, 3, "codes 3 to 3 with bits=4: a grid has 2 to 16 codes"),
        (7, 0, "codes 7 to 0 with bits=4: a grid has 2 to 16 codes"),
        (1, 4, "codes 1 to 4: code 0 must be among them"),
        (-4, -1, "codes -4 to -1: code 0 must be among them"),
    ],
)
def test_codes_that_contradict_their_bits_are_refused(qmin, qmax, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec(4, qmin, qmax, True)


def test_a_spec_is_a_value():
    assert QuantSpec.signed(4) == QuantSpec.signed(4)
    assert QuantSpec.signed(4) != QuantSpec.signed(4, granularity=PerChannel(0))
    assert len({QuantSpec.signed(4), QuantSpec.signed(4), QuantSpec.unsigned(4)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec.signed(4).bits = 8


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        (PerTensor(), (3, 5, 7), (1, 1, 1)),
        (PerTensor(), (), (1,)),
        (PerChannel(), (3, 5, 7), (3, 1, 1)),
        (PerChannel(1), (3, 5, 7), (1, 5, 1)),
        (PerChannel(-1), (3, 5, 7), (1, 1, 7)),
        (PerGroup(7), (3, 63), (3, 9)),
        (PerGroup(5, axis=1), (3, 5, 7), (3, 1, 1)),
        (PerGroup(1, axis=-1), (3, 5, 7), (3, 1, 7)),
        (PerGroup(3, axis=0, channel_axis=1), (9, 4), (3, 4)),
        (PerBlock((2, 3)), (4, 9), (2, 3)),
        (PerBlock((2,)), (4, 9), (2, 1)),
        (PerBlock(()), (4, 9), (1, 1)),
        (PerBlock((1, 1, 3)), (4, 2, 3), (4, 2, 1)),
    ],
)
def test_a_granularity_gives_the_shape_of_the_scale(granularity, shape, expected):
    assert granularity.scale_shape(shape) == expected


@pytest.mark.parametrize(
    ("granularity", "shape", "error", "message"),
    [
        (PerChannel(3), (3, 5, 7), ShapeError, r"axis 3 of a tensor of shape \(3, 5, 7\): it has 3 axes"),
        (PerChannel(-4), (3, 5, 7), ShapeError, r"axis -4 of a tensor of shape"),
        (PerChannel(0), (), ShapeError, r"axis 0 of a tensor of shape \(\): it has 0 axes"),
        (PerGroup(4), (3, 63), ShapeError, "groups of 4 along axis 1 .* 63 is not a multiple of 4"),
        (PerGroup(0), (3, 63), ShapeError, "groups of 0 along axis 1"),
        (PerGroup(3, axis=0), (3, 63), SpecError, "axis and channel_axis are both axis 0: they must differ"),
        (PerGroup(3, axis=-1, channel_axis=1), (3, 63), SpecError, "are both axis 1"),
        (PerBlock((2, 4)), (4, 9), ShapeError, "blocks of .* axis 1 has 9 elements, not a multiple of 4"),
        (PerBlock((0,)), (4, 9), ShapeError, "not a multiple of 0"),
        (PerBlock((1, 1, 1)), (4, 9), ShapeError, "blocks of .* it has 2 axes"),
    ],
)
def test_a_granularity_that_does_not_fit_is_refused(granularity, shape, error, message):
    with pytest.raises(error, match=message):
        granularity.scale_shape(shape)
