r"""The exact distance of integer codes as one product of zeros and ones.

A code q of b bits becomes its *thermometer*: q ones, then zeros, $2^b - 1$ in all. Then

$$ |x - w| = x + w - 2\,\langle T(x), T(w) \rangle $$

so an adder layer on low-bit codes is an ordinary convolution with $2^b - 1$ times the channels, a sum over each window
and a constant per kernel, in integers, without any rounding. $2^b - 1$ columns are the least possible: the matrix of
$\min(i, j)$ has full rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from q_core.kernels import Kernel

MAX_BITS = 4
_EXACT = 1 << 24  # integers up to here are exact in float32


def thermometer(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Write code q as q ones followed by zeros.

    Args:
        codes: Codes, uint8.
        bits: Bits of a code.
        dim: Axis that grows `2**bits - 1` times, non-negative: all channels at the first threshold, then at the second.

    Returns:
        Zeros and ones, uint8.
    """
    levels = (1 << bits) - 1
    out = codes.new_empty(*codes.shape[:dim], levels, *codes.shape[dim:])
    for level in range(levels):
        # Four times as fast as a comparison, which torch does not vectorise for bytes.
        out.select(dim, level).copy_(codes.clamp(level, level + 1).sub_(level))
    return out.flatten(dim, dim + 1)


def _last(codes: Tensor, bits: int) -> Tensor:
    """Thermometers with the channels in the last place of memory: [n, h, w, (2**bits - 1) * c], uint8."""
    return thermometer(codes.permute(0, 2, 3, 1).contiguous(), bits, 3)


def _convolution(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, bits: int) -> Tensor:
    """One int8 convolution of oneDNN per group, with one more kernel, of ones, that sums each window."""
    parts = []
    x, stride = _without_idle_strides(x, weight, stride, dilation)
    for codes, kernels in zip(x.chunk(groups, 1), weight.chunk(groups), strict=True):
        source = _last(codes, bits).permute(0, 3, 1, 2)
        table = thermometer(kernels, bits, 1).view(torch.int8)
        table = torch.cat([table, table.new_ones(1, *table.shape[1:])])
        # The product leaves as sum of w - 2 <T(x), T(w)>, and that with the ones as sum of x.
        scales, zeros = torch.full((len(table),), -2.0), torch.zeros(len(table), dtype=torch.int32)
        scales[-1] = 1.0
        own = F.pad(kernels.sum((1, 2, 3), dtype=torch.float32), (0, 1))
        packed = torch.ops.onednn.qconv_prepack(table, scales, 1.0, 0, stride, [0, 0], dilation, 1, list(source.shape))
        quantization = (1.0, 0, packed, scales, zeros, own)
        geometry = (stride, [0, 0], dilation, 1)
        after: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        product: Tensor = torch.ops.onednn.qconv2d_pointwise.default(source, *quantization, *geometry, *after)
        parts.append(product[:, :-1] + product[:, -1:])
    return torch.cat(parts, 1).to(torch.int32, memory_format=torch.contiguous_format)


def _without_idle_strides(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Crop an axis that has room for one window only to that window, and give it a stride of 1.

    The int8 convolution of oneDNN reads the wrong rows, also beyond the input, where the output is one column wide and
    only the horizontal stride is above 1.
    """
    reach = [dilation[a] * (weight.shape[2 + a] - 1) + 1 for a in (0, 1)]
    idle = [x.shape[2 + a] - reach[a] < stride[a] for a in (0, 1)]
    rows, columns = (reach[a] if idle[a] else x.shape[2 + a] for a in (0, 1))
    return x[:, :, :rows, :columns], [1 if idle[a] else stride[a] for a in (0, 1)]


def _product(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, bits: int) -> Tensor:
    """One product of int8 matrices per group and panel of positions."""
    parts = []
    for codes, kernels in zip(x.chunk(groups, 1), weight.chunk(groups), strict=True):
        source = _last(codes, bits).view(torch.int8)
        table = _last(kernels, bits).view(torch.int8).flatten(1)
        table = torch.cat([table, torch.ones_like(table[:1])])
        table = F.pad(table, (0, -table.shape[1] % 8, 0, -len(table) % 8))
        windows = _windows(source, weight, stride, dilation)
        rows = [_multiply(part, table, windows.shape[1:3].numel()) for part in torch.split(windows, _images(windows))]
        product = torch.cat(rows).reshape(*windows.shape[:3], -1).permute(0, 3, 1, 2)
        own = kernels.sum((1, 2, 3), dtype=torch.int32).reshape(1, -1, 1, 1)
        shared = product[:, : len(kernels)]
        parts.append(product[:, len(kernels) : len(kernels) + 1] + own - 2 * shared)
    return torch.cat(parts, 1).contiguous()


def _windows(source: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    """View the windows of [n, h, w, c]: [n, rows, columns, kh, kw, c]."""
    size = [(source.shape[1 + a] - dilation[a] * (weight.shape[2 + a] - 1) - 1) // stride[a] + 1 for a in (0, 1)]
    image, row, column, channel = source.stride()
    steps = (image, row * stride[0], column * stride[1], row * dilation[0], column * dilation[1], channel)
    return source.as_strided((len(source), *size, *weight.shape[2:], source.shape[3]), steps)


def _images(windows: Tensor) -> int:
    """Images of a panel of some 8 MiB."""
    return max(1, (1 << 23) // max(1, windows[0].numel() if len(windows) else 1))


def _multiply(windows: Tensor, table: Tensor, positions: int) -> Tensor:
    rows = windows.reshape(len(windows) * positions, -1)
    count = len(rows)
    # CUDA takes 17 rows at least, and columns by eights.
    rows = F.pad(rows, (0, table.shape[1] - rows.shape[1], 0, max(0, 32 - count)))
    return torch._int_mm(rows, table.T)[:count]


def _refuses(x: Tensor, weight: Tensor, bits: int) -> str | None:
    if bits > MAX_BITS:
        return f"the thermometer of a {bits}-bit code has {(1 << bits) - 1} places; it takes {MAX_BITS} bits at most"
    return "there is nothing to compute" if not x.numel() or not weight.numel() else None


def _refuses_convolution(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, bits: int
) -> str | None:
    if x.device.type != "cpu":
        return f"oneDNN runs on a CPU, not on {x.device.type}"
    if not torch.backends.mkldnn.is_available() or not hasattr(  # type: ignore[no-untyped-call]
        torch.ops.onednn, "qconv2d_pointwise"
    ):
        return "this build of torch has no int8 convolution of oneDNN"
    largest = weight.shape[1:].numel() * ((1 << bits) - 1)
    if largest >= _EXACT:
        return f"a window sums up to {largest}, and its float32 results are exact below {_EXACT}"
    return _refuses(x, weight, bits)


def _refuses_product(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, bits: int
) -> str | None:
    if x.device.type not in ("cpu", "cuda"):
        return f"torch multiplies int8 matrices on a CPU and on CUDA, not on {x.device.type}"
    return _refuses(x, weight, bits)


# Pairs (tap, output position, output) a second and core, codes and windows included, measured on a server CPU with
# units for products of int8 matrices; benchmarks/speed/adder.py measures them again.
_CONVOLUTION_RATE = {1: 200e9, 2: 120e9, 3: 75e9, 4: 35e9}
_PRODUCT_RATE = {1: 80e9, 2: 45e9, 3: 20e9, 4: 10e9}

KERNELS = (
    Kernel("thermometer-convolution", _refuses_convolution, lambda *a: _CONVOLUTION_RATE[a[5]], _convolution),
    Kernel("thermometer-product", _refuses_product, lambda *a: _PRODUCT_RATE[a[5]], _product),
)
