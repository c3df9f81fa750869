"""The layout of packed codes on hand-written examples; the laws are in laws/test_packing_laws.py."""

import pytest
import torch

from q_core import RangeError, ShapeError, SpecError, pack_codes, unpack_codes

EXACT = {"rtol": 0, "atol": 0}


def test_the_first_code_lies_in_the_lowest_bits():
    words = pack_codes(torch.tensor([1, 2, 3]), bits=4)
    torch.testing.assert_close(words, torch.tensor([0x321], dtype=torch.int32), **EXACT)


def test_a_code_may_straddle_two_words():
    """Ten codes of 3 bits fill 30; the eleventh, 0b110, leaves two bits in the first word and one in the second."""
    words = pack_codes(torch.tensor([0] * 10 + [6]), bits=3)
    torch.testing.assert_close(words, torch.tensor([-(2**31), 1], dtype=torch.int32), **EXACT)


def test_signed_codes_are_stored_from_the_lowest():
    words = pack_codes(torch.tensor([-8, 7]), bits=4, qmin=-8)
    torch.testing.assert_close(words, torch.tensor([0xF0], dtype=torch.int32), **EXACT)


def test_the_sign_bit_of_a_word_is_a_bit_like_any_other():
    codes = torch.full((8,), 15, dtype=torch.int32)
    words = pack_codes(codes, bits=4)
    torch.testing.assert_close(words, torch.tensor([-1], dtype=torch.int32), **EXACT)
    torch.testing.assert_close(unpack_codes(words, bits=4, count=8), codes, **EXACT)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_codes_of_every_integer_dtype_are_packed_alike(dtype):
    codes = torch.tensor([[0, 3, 1], [2, 2, 3]], dtype=dtype)
    expected = pack_codes(codes.long(), bits=2)
    torch.testing.assert_close(pack_codes(codes, bits=2), expected, **EXACT)


def test_codes_are_read_in_row_major_order_whatever_the_strides():
    codes = torch.arange(12).reshape(3, 4)
    torch.testing.assert_close(pack_codes(codes.t(), bits=4), pack_codes(codes.t().contiguous(), bits=4), **EXACT)


def test_nothing_packs_to_nothing():
    words = pack_codes(torch.empty(0, dtype=torch.int64), bits=5)
    assert words.shape == (0,)
    assert unpack_codes(words, bits=5, count=0).shape == (0,)


@pytest.mark.parametrize("bits", [0, 9])
def test_unsupported_bits_are_refused(bits):
    with pytest.raises(SpecError, match=f"bits={bits}: supported are 1 to 8"):
        pack_codes(torch.zeros(1, dtype=torch.int64), bits=bits)
    with pytest.raises(SpecError, match=f"bits={bits}: supported are 1 to 8"):
        unpack_codes(torch.zeros(1, dtype=torch.int32), bits=bits, count=1)


def test_codes_that_do_not_fit_are_refused_with_their_range():
    with pytest.raises(RangeError, match="codes from -1 to 3 do not fit in 2 bits from 0: allowed are 0 to 3"):
        pack_codes(torch.tensor([3, -1]), bits=2)


@pytest.mark.parametrize(("words", "count"), [(1, 11), (3, 11), (0, 1)])
def test_a_wrong_number_of_words_is_refused(words, count):
    with pytest.raises(ShapeError, match=f"{words} words for {count} codes of 3 bits: it takes exactly"):
        unpack_codes(torch.zeros(words, dtype=torch.int32), bits=3, count=count)
