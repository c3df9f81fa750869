"""Codes survive packing, in exactly as many words as their bits take, laid out as the big integer of the oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q_core import RangeError, pack_codes, unpack_codes


@st.composite
def coded(draw):
    """Bits, the lowest code, and codes of a ragged number."""
    bits, qmin = draw(st.integers(1, 8)), draw(st.sampled_from([0, -1, -8, -128, 5]))
    count = draw(st.one_of(st.integers(0, 70), st.sampled_from([1, 31, 32, 33, 63, 64, 65, 127])))
    stored = draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    return bits, qmin, [value + qmin for value in stored]


@given(case=coded())
def test_unpacking_undoes_packing(case):
    bits, qmin, codes = case
    codes = torch.tensor(codes, dtype=torch.int32)
    words = pack_codes(codes, bits=bits, qmin=qmin)
    restored = unpack_codes(words, bits=bits, count=codes.numel(), qmin=qmin)
    torch.testing.assert_close(restored, codes, rtol=0, atol=0)


@given(case=coded())
def test_packed_codes_take_exactly_the_words_of_their_bits(case):
    bits, qmin, codes = case
    words = pack_codes(torch.tensor(codes, dtype=torch.int64), bits=bits, qmin=qmin)
    assert words.dtype == torch.int32
    assert words.shape == (math.ceil(len(codes) * bits / 32),)


@given(case=coded())
def test_the_layout_is_that_of_one_big_integer(oracles, case):
    bits, qmin, codes = case
    expected = torch.tensor(oracles.pack(codes, bits, qmin), dtype=torch.int32)
    words = pack_codes(torch.tensor(codes, dtype=torch.int32), bits=bits, qmin=qmin)
    torch.testing.assert_close(words, expected, rtol=0, atol=0)


@given(case=coded(), where=st.integers(0, 100), beyond=st.integers(1, 300), above=st.booleans())
def test_a_code_out_of_range_is_refused(case, where, beyond, above):
    bits, qmin, codes = case
    codes = [*codes, qmin]
    codes[where % len(codes)] = qmin + 2**bits - 1 + beyond if above else qmin - beyond
    with pytest.raises(RangeError, match=f"do not fit in {bits} bits"):
        pack_codes(torch.tensor(codes), bits=bits, qmin=qmin)
