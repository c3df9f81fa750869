"""The clip of a quantizer: the largest real that its levels hold.

Where the other grids learn the width of a code, APoT and LCQ learn the level of the outermost code, and the levels
within follow from it. Their level sets are the same on both sides of zero.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from q_core.errors import RangeError, SpecError
from q_core.spec import QuantSpec
from q_nulsq.parameters import owned


def magnitude_bits(method: str, qmin: int, qmax: int) -> int:
    """Return how many bits number the magnitudes of codes that are the same on both sides of zero.

    Args:
        method: What asks, for the message.
        qmin: Smallest code, 0 or `-qmax`.
        qmax: Largest code, one less than a power of two.

    Raises:
        SpecError: Other codes, or codes of one bit, for which the methods define nothing.
    """
    bits = (qmax + 1).bit_length() - 1
    if qmax < 1 or 2**bits != qmax + 1 or qmin not in (0, -qmax) or (qmin, qmax) == (0, 1) or bits + (qmin < 0) > 8:
        raise SpecError(
            f"codes {qmin} to {qmax}: {method} is defined for QuantSpec.signed(bits, narrow=True), the same on both "
            "sides of zero, and QuantSpec.unsigned(bits), of 2 to 8 bits"
        )
    return bits


def clip_of_range(spec: QuantSpec, low: Tensor, high: Tensor, clip: float | None = None) -> Float[Tensor, "..."]:
    """Return the clip that just covers a range of reals: the farther end, or the upper one where codes are unsigned.

    Args:
        spec: The codes.
        low: Smallest real of each tile.
        high: Largest real of each tile. Shape of `low`.
        clip: A constant to take instead, such as a published one; the range is then only checked.

    Returns:
        A clip of the shape of `low`, float32 or wider; 1 where the range has no width.

    Raises:
        RangeError: The range is not finite, its ends are in the wrong order, or it is wholly negative while no code is.
    """
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise RangeError(f"range {float(low.min())} to {float(high.max())} is not finite")
    if bool((low > high).any()):
        raise RangeError(f"range with low {float(low.max())} above high {float(high.min())}")
    lost = (high <= 0) & (low < 0)
    if spec.qmin == 0 and bool(lost.any()):
        raise RangeError(
            f"range {float(low[lost][0])} to {float(high[lost][0])} is negative, but codes {spec.qmin} to {spec.qmax} "
            "hold no negative real: use QuantSpec.signed(bits, narrow=True)"
        )
    low, high = owned(low), owned(high)
    if clip is not None:
        return torch.full_like(high, clip)
    end = high if spec.qmin == 0 else torch.maximum(high.abs(), low.abs())
    # Below the smallest normal number the inverse overflows, so such a range counts as zero width.
    return torch.where(end > torch.finfo(end.dtype).tiny, end, torch.ones_like(end))
