"""The base of every module that holds quantizer parameters.

`model.half()` and `model.to(torch.bfloat16)` cast everything they find. A scale in bfloat16 has
8 significant bits, which moves a 4-bit grid by up to a quarter of a percent and breaks the equality
of training and deployment. Modules that derive from `PreciseModule` follow device moves but keep
their own floating-point dtype when the requested one is narrower.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

_NARROW = (torch.float16, torch.bfloat16)
_Module = TypeVar("_Module", bound="PreciseModule")


class PreciseModule(nn.Module):
    """A module whose floating-point state is never narrower than float32."""

    def _apply(self: _Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Module:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.is_floating_point() and moved.dtype in _NARROW
            return tensor.to(moved.device) if narrowed else moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self
