"""Parameters of a grid at their start: copied, widened, checked, or derived from a range."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from q_core.errors import RangeError, ShapeError, SpecError
from q_core.spec import QuantSpec


def owned(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Copy, so that the grid owns its tensors, and widen to float32 unless already as wide."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True).contiguous()


def check_positive(name: str, tensor: Float[Tensor, "..."]) -> None:
    """Check that a parameter can be the width of something, one for each tile.

    Raises:
        ShapeError: It has no axis.
        RangeError: A value is not positive and finite.
    """
    if tensor.ndim == 0:
        raise ShapeError(f"{name} of shape (): give it at least one axis, (1,) for one {name} per tensor")
    if tensor.is_meta:
        return
    bad = ~(tensor.isfinite() & (tensor > 0))
    if bool(bad.any()):
        raise RangeError(
            f"{name} has {int(bad.sum())} of {tensor.numel()} values that are not positive and finite, "
            f"the first is {float(tensor[bad][0])}"
        )


def spread(
    low: Float[Tensor, "..."], high: Float[Tensor, "..."], steps: int
) -> tuple[Float[Tensor, "..."], Bool[Tensor, "..."]]:
    """Divide a range of reals into equal steps.

    Args:
        low: Smallest real of each tile.
        high: Largest real of each tile. Shape of `low`.
        steps: Into how many.

    Returns:
        The steps, and where the range has no width; there the step is 1.

    Raises:
        RangeError: The range is not finite, or its ends are in the wrong order.
    """
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise RangeError(f"range {float(low.min())} to {float(high.max())} is not finite")
    if bool((low > high).any()):
        raise RangeError(f"range with low {float(low.max())} above high {float(high.min())}")
    # Divided before they are subtracted: the width of a range may overflow.
    step = owned(high) / steps - owned(low) / steps
    flat = step <= torch.finfo(step.dtype).tiny  # below it one over the step overflows
    return torch.where(flat, torch.ones_like(step), step), flat


def check_unsigned(method: str, spec: QuantSpec) -> None:
    """Check that a method that clips at zero is given codes that begin there.

    Raises:
        SpecError: The smallest code is not 0.
    """
    if spec.qmin != 0:
        raise SpecError(
            f"{method} with codes {spec.qmin} to {spec.qmax}: it clips activations at zero, so use QuantSpec.unsigned, "
            "and LsqPlusGrid where they are negative, too"
        )
