"""Codes in, 32-bit words out.

The layout is a little-endian bit stream: code `i`, minus `qmin`, occupies bits `i * bits` to `(i + 1) * bits - 1`,
where bit `j` of the stream is bit `j % 32` of word `j // 32`. A code may straddle two words, so `n` codes take exactly
`ceil(n * bits / 32)` words for every bit width. Words are stored as int32, the widest integer that every file
format and kernel agrees on.
"""

import torch
from jaxtyping import Int, Int32, Integer
from torch import Tensor

from q_core.errors import RangeError, ShapeError, SpecError
from q_core.spec import MAX_BITS

_WORD = 32
_MASK = (1 << _WORD) - 1


def packed_words(count: int, bits: int) -> int:
    """Return the number of 32-bit words that `count` codes of `bits` bits take: `ceil(count * bits / 32)`."""
    return -(-count * bits // _WORD)


def pack_codes(codes: Integer[Tensor, "*shape"], *, bits: int, qmin: int = 0) -> Int32[Tensor, " words"]:
    """Pack integer codes into 32-bit words.

    Args:
        codes: Integer codes in `[qmin, qmin + 2^bits - 1]`, of any shape, read in row-major order.
        bits: Bits of a code, 1 to 8.
        qmin: The code that is stored as 0.

    Returns:
        `ceil(codes.numel() * bits / 32)` words.

    Raises:
        SpecError: `bits` outside 1 to 8.
        RangeError: A code does not fit.
    """
    _check_bits(bits)
    stored = codes.reshape(-1).to(torch.int64) - qmin
    if stored.numel() and not bool(((stored >= 0) & (stored < 2**bits)).all()):
        raise RangeError(
            f"codes from {int(codes.min())} to {int(codes.max())} do not fit in {bits} bits from {qmin}: "
            f"allowed are {qmin} to {qmin + 2**bits - 1}"
        )
    position = torch.arange(stored.numel(), device=stored.device) * bits
    word, offset = position // _WORD, position % _WORD
    # Two codes never share a bit, so adding is the same as or-ing. The last word catches an empty spill.
    words = torch.zeros(packed_words(stored.numel(), bits) + 1, dtype=torch.int64, device=stored.device)
    words.index_add_(0, word, (stored << offset) & _MASK)
    words.index_add_(0, word + 1, stored >> (_WORD - offset))
    unsigned = words[:-1]
    return torch.where(unsigned > _MASK >> 1, unsigned - (1 << _WORD), unsigned).to(torch.int32)


def unpack_codes(words: Int32[Tensor, " words"], *, bits: int, count: int, qmin: int = 0) -> Int[Tensor, " count"]:
    """Undo `pack_codes`.

    Args:
        words: Words made by `pack_codes`.
        bits: Bits of a code, 1 to 8.
        count: Number of codes.
        qmin: The code that is stored as 0.

    Returns:
        int32 codes.

    Raises:
        SpecError: `bits` outside 1 to 8.
        ShapeError: The number of words is not that of `count` codes.
    """
    _check_bits(bits)
    if words.numel() != packed_words(count, bits):
        raise ShapeError(
            f"{words.numel()} words for {count} codes of {bits} bits: it takes exactly {packed_words(count, bits)}"
        )
    stream = torch.cat([words.to(torch.int64) & _MASK, words.new_zeros(1, dtype=torch.int64)])
    position = torch.arange(count, device=words.device) * bits
    word, offset = position // _WORD, position % _WORD
    stored = (stream[word] >> offset) | (stream[word + 1] << (_WORD - offset))
    return ((stored & ((1 << bits) - 1)) + qmin).to(torch.int32)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise SpecError(f"bits={bits}: supported are 1 to {MAX_BITS}")
