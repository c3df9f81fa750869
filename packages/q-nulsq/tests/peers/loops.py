"""The quantizers again, one real at a time in plain Python, from their printed equations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Level, and the derivatives by x, by the scale and by the offset.
Element = tuple[float, float, float, float]


def uniform(x: float, scale: float, offset: float, qmin: int, qmax: int) -> Element:
    """LSQ, and LSQ+ where the offset is not zero."""
    v = (x - offset) / scale
    if v < qmin:
        return scale * qmin + offset, 0.0, float(qmin), 1.0
    if v > qmax:
        return scale * qmax + offset, 0.0, float(qmax), 1.0
    return scale * round(v) + offset, 1.0, round(v) - v, 0.0


def mid_rise(x: float, scale: float, levels: int) -> Element:
    """UniQ: the first three numbers count."""
    end = (levels - 1) / 2
    v = x / scale + end
    if v < 0:
        return -scale * end, 0.0, -end, 0.0
    if v > levels - 1:
        return scale * end, 0.0, end, 0.0
    return scale * (round(v) - end), 1.0, round(v) - v, 0.0


def over(rows: Tensor, function: Callable[[float, int], Sequence[float]]) -> list[Tensor]:
    """Apply a function of an element and the number of its row; return one tensor for each number that it returns."""
    results = [[function(float(x), number) for x in row] for number, row in enumerate(rows)]
    return list(torch.tensor(results, dtype=torch.float64).unbind(-1))
