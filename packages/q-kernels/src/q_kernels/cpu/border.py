"""The operators of rounding borders on a CPU.

The meaning of each is in `q_aquant.ops`; the arguments are the same. The unfolded input is never built: a block of
positions, a few dozen, is quantized for all taps, multiplied while it is in the first cache, and forgotten; it is
quantized again in the backward pass.

Neighbouring positions are neighbours in memory. Where the input is wider than the output, what lies between two rows of
positions is computed too, as a position that nobody asks for: that costs less than to step over it.
"""

import dataclasses
import functools
import math
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from q_core.kernels import Kernel
from q_kernels.cpu import lanes, windows
from q_kernels.cpu.lanes import ROWS
from q_kernels.cpu.registers import LANES, POSITIONS, VECTORS
from q_kernels.cpu.vector import FEATURES, WIDE

Array = Any

# Measured on one core of a Xeon of the fourth generation, with all its instructions, with those of AVX2, and with SSE2
# alone: borders (tap, position) a second, forward and backward with products of 32 outputs, and of elements alone.
_FORWARD_RATE, _BACKWARD_RATE, _ELEMENTS_RATE, _ELEMENTS_BACKWARD_RATE = (
    (1.4e9, 6e8, 2e9, 6e8) if WIDE else (8e8, 3e8, 1.4e9, 6e8) if "avx2" in FEATURES else (2e8, 1e8, 4e8, 2e8)
)

_PARTS = 8
"""Parts of a batch that are differentiated apart, at most."""

_SUMS = 1 << 22
"""Weights that all parts together may have sums of, beyond those of one."""

_HUGE = 1e30
"""Coefficients below it make polynomials that do not overflow."""

_COST = 8
"""What a border costs, in multiplications."""

_ADD4, _ADD2, _ADD1, _ROWS2 = lanes.add4, lanes.add2, lanes.add1, lanes.ROWS2


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Where the positions and taps of a convolution are, for a few images that are worked on together.

    Attributes:
        offsets: Of every tap of every channel, from the place of a position.
        vectors: Vectors that hold the positions of one image.
        width: From one row of positions to the next, in positions.
        images: How many images there are in a party: enough for blocks without gaps.
        parts: Parts of the batch, each with sums of its own whatever the number of threads, as the first image of each.
    """

    offsets: Array
    vectors: int
    width: int
    images: int
    parts: Array

    def places(self, pitch: int, spare: bool = False) -> Array:
        """Place the vectors of a party with images that are `pitch` elements apart.

        What fills the last block is the last vector again, or the first one of a `spare` image behind the others.
        """
        every = np.arange(self.images)[:, None] * pitch + np.arange(self.vectors) * LANES
        flat = every.astype(np.int64).reshape(-1)
        rest = np.full(-len(flat) % VECTORS, self.images * pitch if spare else flat[-1], np.int64)
        return np.concatenate([flat, rest])


@functools.lru_cache(maxsize=256)
def _plan(
    images: int,
    channels: int,
    kernel: tuple[int, int],
    lattice: tuple[int, int],
    size: tuple[int, int],
    geometry: tuple[int, ...],
    weights: int,
) -> _Plan:
    """Plan a convolution.

    Args:
        images: Of the batch.
        channels: Of the input.
        kernel: Rows and columns.
        lattice: Rows and columns of a lattice of the input.
        size: Rows and columns of positions.
        geometry: As the operator takes it.
        weights: How many there are.
    """
    down, right = (np.arange(kernel[a]) * geometry[2 + a] for a in (0, 1))
    offsets = windows.offsets(channels, down, right, list(geometry[:2]), lattice)
    vectors = -(-((size[0] - 1) * lattice[1] + size[1]) // LANES)
    parts = min(images, _PARTS, 1 + _SUMS // weights)
    starts = np.arange(parts + 1) * images // parts
    together = min(-(-images // parts), VECTORS // math.gcd(vectors, VECTORS))
    return _Plan(offsets, vectors, lattice[1], together, starts)


def _planned(x: Tensor, pixels: Tensor, weight: Tensor, geometry: list[int]) -> _Plan:
    lattice, kernel = tuple(pixels.shape[2:]), tuple(weight.shape[2:])
    size = _size(x, weight, geometry)
    return _plan(x.shape[0], x.shape[1], kernel, lattice, size, tuple(geometry), weight.numel())


def _size(x: Tensor, weight: Tensor, geometry: list[int]) -> tuple[int, int]:
    rows, columns = (
        (x.shape[2 + a] - geometry[2 + a] * (weight.shape[2 + a] - 1) - 1) // geometry[a] + 1 for a in (0, 1)
    )
    return rows, columns


def _parameters(grid: Tensor, codes: list[float]) -> Array:
    scale, zero, influence = grid.tolist()
    table = np.zeros(lanes.PARAMETERS, np.float32)
    rounded = influence >= 0.5
    table[lanes.SCALE], table[lanes.LOW], table[lanes.HIGH] = scale, codes[0] - zero, codes[1] - zero
    table[lanes.SHARE], table[lanes.ROUNDED] = influence - rounded, rounded
    return table


def _powers(codes: list[float]) -> Array:
    """Powers of the place in the border's range as polynomials of the code coordinate: a row for each, [3, 3]."""
    inverse = 1 / (codes[3] - codes[2])
    start = -codes[2] * inverse
    return np.array([[1, 0, 0], [start, inverse, 0], [start**2, 2 * start * inverse, inverse**2]])


def _coefficients(coefficients: Tensor, codes: list[float]) -> Array:
    """Coefficients for powers of the code coordinate: [channels, taps, 3]."""
    table = coefficients.detach().numpy().transpose(1, 2, 0) @ _powers(codes)[: len(coefficients)]
    return np.ascontiguousarray(table, np.float32)


@numba.njit(nogil=True)
@no_type_check
def _coordinates(x: Array, planes: Array, parameters: Array) -> None:
    """Write clamped code coordinates: [images, pixels] to the beginning of `planes`."""
    scale, low, high = parameters[lanes.SCALE], parameters[lanes.LOW], parameters[lanes.HIGH]
    for image in range(x.shape[0]):
        source, target = x[image], planes[image]
        for pixel in range(source.shape[0]):
            u = source[pixel] / scale
            u = low if u < low else u
            target[pixel] = high if u > high else u


@numba.njit(nogil=True, fastmath={"reassoc", "contract"})
@no_type_check
def _to_pixels(x: Array, pixels: Array, parameters: Array, result: Array) -> float:
    """Write the gradient of `x`, 0 outside the range, and return what the scale gets from there: the ends."""
    scale, low, high = parameters[lanes.SCALE], parameters[lanes.LOW], parameters[lanes.HIGH]
    total, run = 0.0, 1024
    for image in range(x.shape[0]):
        for start in range(0, x.shape[1], run):
            stop = min(start + run, x.shape[1])
            source, gradient, target = x[image, start:stop], pixels[image, start:stop], result[image, start:stop]
            part = np.float32(0)
            for pixel in range(stop - start):
                u, own = source[pixel] / scale, gradient[pixel]
                below, above = u < low, u > high
                target[pixel] = np.float32(0) if below or above else own
                part += own * (low if below else high if above else np.float32(0))
            total += part
    return total


@numba.njit(nogil=True)
@no_type_check
def _fill(frame: Any, fused: bool, channel: int, row: int) -> None:
    """Quantize the taps of a channel, to the rows of a panel from `row` on."""
    own = _of_channel(frame, channel)
    if fused:
        lanes.fill_fused(own, row)
    else:
        lanes.fill(own, row)


@numba.njit(nogil=True)
@no_type_check
def _spread(frame: Any, fused: bool, channel: int, row: int, pixels: int, totals: int) -> None:
    """Take the gradient of what `_fill` writes apart."""
    own, total = _of_channel(frame, channel), totals + channel * frame[6] * lanes.TERMS * LANES * 4
    if fused:
        lanes.spread_fused(own, row, pixels, total)
    else:
        lanes.spread(own, row, pixels, total)


@numba.njit(nogil=True)
@no_type_check
def _of_channel(frame: Any, channel: int) -> Any:
    planes, places, offsets, coefficients, weights, parameters, taps = frame
    first = channel * taps
    return planes, places, offsets + first * 8, coefficients + first * 12, weights + first * 4, parameters, taps


@numba.njit(nogil=True)
@no_type_check
def _frame(planes: int, places: int, border: Any, parameters: Array) -> Any:
    """What `lanes` wants to know, for the first channel."""
    offsets, coefficients, fusion = border
    tables = offsets.ctypes.data, coefficients.ctypes.data, fusion.ctypes.data
    taps = coefficients.shape[1]
    return planes, places, tables[0], tables[1], tables[2], parameters.ctypes.data, taps


@numba.njit(nogil=True)
@no_type_check
def _scratch(rows: int, columns: int) -> Array:
    """Allocate zeros that begin with a line of the cache, so that no vector lies in two."""
    line = 64
    room = np.zeros(rows * columns + line // 4, np.float32)
    start = (-room.ctypes.data % line) // 4
    return room[start : start + rows * columns].reshape(rows, columns)


@numba.njit(nogil=True)
@no_type_check
def _convolve(
    x: Array, border: Any, parameters: Array, table: Array, bias: Array, places: Any, result: Array, plan: Any
) -> None:
    """Convolve some parties of images.

    Args:
        x: [images, pixels].
        border: Offsets, coefficients [channels, taps, 3], fusion weights [channels, taps] or of no element.
        parameters: Table.
        table: Weights [groups, rows, terms], with as many rows of zeros as make tiles full.
        bias: [groups, outputs].
        places: Of the vectors of a party, in planes and in results.
        result: [images, groups, outputs, rows, columns].
        plan: Images of a party, vectors of an image, its width, first and last party.
    """
    groups, rows, terms = table.shape
    channels, taps = border[1].shape[:2]
    together, vectors, width, first, last = plan
    pitch, fused, sources, goals = vectors * LANES, border[2].shape[0] > 0, places[0], places[1]
    panel, planes = _scratch(channels * taps, POSITIONS), _scratch(together, x.shape[1] + LANES)
    out = _scratch(together, groups * rows * pitch)
    steps = np.arange(VECTORS) * LANES
    for party in range(first, last):
        start = party * together
        images = min(together, x.shape[0] - start)
        _coordinates(x[start : start + images], planes, parameters)
        for block in range((images * vectors + VECTORS - 1) // VECTORS):
            frame = _frame(planes.ctypes.data, sources.ctypes.data + block * VECTORS * 8, border, parameters)
            for channel in range(channels):
                _fill(frame, fused, channel, panel.ctypes.data + channel * taps * POSITIONS * 4)
            goal = goals.ctypes.data + block * VECTORS * 8
            for group in range(groups):
                right = panel.ctypes.data + group * terms * POSITIONS * 4, POSITIONS, steps.ctypes.data
                for output in range(0, rows, 4):
                    line = group * rows + output
                    left, target = table.ctypes.data + line * terms * 4, out.ctypes.data + line * pitch * 4
                    lanes.multiply((left, terms), right, (target, pitch, goal), terms)
        for image in range(images):
            for group in range(groups):
                for output in range(result.shape[2]):
                    lines, add = result[start + image, group, output], bias[group, output]
                    begin = (group * rows + output) * pitch
                    for row in range(lines.shape[0]):
                        source, target = out[image, begin + row * width :], lines[row]
                        for column in range(target.shape[0]):
                            target[column] = source[column] + add


@numba.njit(nogil=True)
@no_type_check
def _correlate(panel: int, rows: int, beside: Array, sums: Array, steps: Array) -> None:
    """Add the products of `rows` rows of the panel and all columns of `beside` to `sums` [rows, columns]."""
    columns = beside.shape[1]
    done = 0
    while done < columns:
        vectors = min((columns - done) // LANES, VECTORS)
        right = beside.ctypes.data + done * 4, columns, steps.ctypes.data
        target = sums.ctypes.data + done * 4
        if vectors >= 4:
            for row in range(0, rows, 4):
                left, result = panel + row * POSITIONS * 4, target + row * columns * 4
                _ADD4((left, POSITIONS), right, (result, columns, steps.ctypes.data), POSITIONS)
            done += 4 * LANES
        elif vectors >= 2:
            for row in range(0, rows, _ROWS2):
                left, result = panel + row * POSITIONS * 4, target + row * columns * 4
                _ADD2((left, POSITIONS), right, (result, columns, steps.ctypes.data), POSITIONS)
            done += 2 * LANES
        else:
            for row in range(0, rows, 8):
                left, result = panel + row * POSITIONS * 4, target + row * columns * 4
                _ADD1((left, POSITIONS), right, (result, columns, steps.ctypes.data), POSITIONS)
            done += LANES


@numba.njit(nogil=True)
@no_type_check
def _differentiate(
    grad: Array, x: Array, border: Any, parameters: Array, table: Array, places: Any, results: Any, plan: Any
) -> None:
    """Backward pass of some parts of the batch.

    Args:
        grad: [images, groups, outputs, rows, columns].
        x: [images, pixels].
        border: As for `_convolve`.
        parameters: Table.
        table: Transposed weights [groups, rows, outputs], with as many rows of zeros as make tiles full.
        places: Of the vectors of a party, in planes and in gradients; the first image of every part.
        results: Gradients of `x`; of the coefficients, over minus scale and influence, and the fusion weights
            [parts, channels, taps, terms]; of the transposed weights [parts, groups, rows, columns], zero at the start;
            what the scale gets from pixels outside the range [parts], zero at the start.
        plan: Images of a party, vectors of an image, its width, first and last part.
    """
    groups, rows, outputs = table.shape
    channels, taps = border[1].shape[:2]
    together, vectors, width, first, last = plan
    pitch, inner, fused = vectors * LANES, channels // groups, border[2].shape[0] > 0
    panel, beside = _scratch(groups * rows, POSITIONS), _scratch(POSITIONS, results[2].shape[3])
    planes, pixels = _scratch(together, x.shape[1] + LANES), _scratch(together, x.shape[1] + LANES)
    incoming, totals = _scratch(together + 1, groups * outputs * pitch), _scratch(channels * taps, lanes.TERMS * LANES)
    steps = np.arange(max(VECTORS, 4)) * LANES
    tile = rows * POSITIONS * 4
    for part in range(first, last):
        totals[:] = 0
        for start in range(places[2][part], places[2][part + 1], together):
            images = min(together, places[2][part + 1] - start)
            _coordinates(x[start : start + images], planes, parameters)
            _receive(grad[start : start + images], incoming, pitch, width)
            pixels[:] = 0
            for block in range((images * vectors + VECTORS - 1) // VECTORS):
                frame = _frame(planes.ctypes.data, places[0].ctypes.data + block * VECTORS * 8, border, parameters)
                source = places[1].ctypes.data + block * VECTORS * 8
                for channel in range(channels):
                    group, inside = divmod(channel, inner)
                    _fill(frame, fused, channel, panel.ctypes.data + group * tile + inside * taps * POSITIONS * 4)
                for group in range(groups):
                    left = panel.ctypes.data + group * tile
                    right = incoming.ctypes.data + group * outputs * pitch * 4, pitch, source
                    lanes.turn(right, (beside.ctypes.data, beside.shape[1]), outputs)
                    sums = results[2][part, group]
                    _correlate(left, rows, beside, sums, steps)
                    for row in range(0, rows, 4):
                        weights = table.ctypes.data + (group * rows + row) * outputs * 4
                        target = left + row * POSITIONS * 4
                        lanes.multiply((weights, outputs), right, (target, POSITIONS, steps.ctypes.data), outputs)
                for channel in range(channels):
                    group, inside = divmod(channel, inner)
                    line = panel.ctypes.data + group * tile + inside * taps * POSITIONS * 4
                    _spread(frame, fused, channel, line, pixels.ctypes.data, totals.ctypes.data)
            stop = start + images
            results[3][part] += _to_pixels(x[start:stop], pixels, parameters, results[0][start:stop])
        for line in range(channels * taps):
            for term in range(lanes.TERMS):
                found = totals[line, term * LANES : (term + 1) * LANES].sum()
                results[1][part, line // taps, line % taps, term] = found


@numba.njit(nogil=True)
@no_type_check
def _receive(grad: Array, incoming: Array, pitch: int, width: int) -> None:
    """Write gradients [images, groups, outputs, rows, columns] as `_convolve` has its results; zeros for no image."""
    images, groups, outputs, rows, columns = grad.shape
    for image in range(images):
        for group in range(groups):
            for output in range(outputs):
                begin = (group * outputs + output) * pitch
                for row in range(rows):
                    source, target = grad[image, group, output, row], incoming[image, begin + row * width :]
                    for column in range(columns):
                        target[column] = source[column]
    incoming[images:] = 0


def _border(plan: _Plan, coefficients: Tensor, fusion: Tensor | None, codes: list[float]) -> tuple[Array, Array, Array]:
    weights = np.zeros((0, 0), np.float32) if fusion is None else fusion.detach().contiguous().numpy()
    return plan.offsets, _coefficients(coefficients, codes), weights


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Tensor,
    coefficients: Tensor,
    fusion: Tensor | None,
    codes: list[float],
    geometry: list[int],
) -> Tensor:
    groups = geometry[4]
    outputs, pixels = weight.shape[0] // groups, windows.lattices(x.detach(), geometry[:2])
    plan = _planned(x, pixels, weight, geometry)
    table = F.pad(weight.detach().reshape(groups, outputs, -1), (0, 0, 0, -outputs % 4)).contiguous()
    result = torch.empty(len(x), len(weight), *_size(x, weight, geometry))
    added = torch.zeros(len(weight)) if bias is None else bias.detach().contiguous()
    places = plan.places(pixels[0].numel() + LANES), plan.places(table.shape[:2].numel() * plan.vectors * LANES)
    arrays = (
        pixels.flatten(1).numpy(),
        _border(plan, coefficients, fusion, codes),
        _parameters(grid, codes),
        table.numpy(),
    )
    more = added.view(groups, -1).numpy(), places, result.view(len(x), groups, outputs, *result.shape[2:]).numpy()
    parties, count = -(-len(x) // plan.images), (plan.images, plan.vectors, plan.width)
    work = len(x) * plan.vectors * LANES * (table.numel() + _COST * coefficients[0].numel())
    windows.in_threads(lambda first, last: _convolve(*arrays, *more, (*count, first, last)), parties, work)
    return result


def _conv_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    grid: Tensor,
    coefficients: Tensor,
    fusion: Tensor | None,
    codes: list[float],
    geometry: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups, stride = geometry[4], geometry[:2]
    outputs, terms, pixels = weight.shape[0] // groups, weight[0].numel(), windows.lattices(x.detach(), stride)
    plan, parameters = _planned(x, pixels, weight, geometry), _parameters(grid, codes)
    table = weight.detach().reshape(groups, outputs, terms).transpose(1, 2)
    table = F.pad(table, (0, 0, 0, -terms % ROWS)).contiguous()
    parts, rows = len(plan.parts) - 1, table.shape[1]
    result, sums = torch.empty_like(pixels), torch.zeros(parts, groups, rows, outputs + -outputs % LANES)
    totals, moved = np.empty((parts, *coefficients.shape[1:], lanes.TERMS)), np.zeros(parts)
    pitch = plan.vectors * LANES
    places = plan.places(pixels[0].numel() + LANES), plan.places(len(weight) * pitch, spare=True), plan.parts
    incoming = grad.detach().reshape(len(x), groups, outputs, *grad.shape[2:]).contiguous().numpy()
    arrays = (
        incoming,
        pixels.flatten(1).numpy(),
        _border(plan, coefficients, fusion, codes),
        parameters,
        table.numpy(),
        places,
    )
    results = result.flatten(1).numpy(), totals, sums.numpy(), moved
    count = plan.images, plan.vectors, plan.width
    work = len(x) * pitch * (2 * table.numel() + 3 * _COST * coefficients[0].numel())
    windows.in_threads(lambda first, last: _differentiate(*arrays, results, (*count, first, last)), parts, work)
    grad_weight = sums.sum(0)[:, :terms, :outputs].transpose(1, 2).reshape(weight.shape).contiguous()
    to_border, grad_fusion, grad_scale = _found(totals.sum(0), moved, grid, codes)
    grad_coefficients = to_border[..., : len(coefficients)].permute(2, 0, 1).contiguous()
    grad_fusion = torch.empty(0) if fusion is None else grad_fusion
    grad_x = windows.joined(result, stride, x.shape[2:]) if stride != [1, 1] else result
    return grad_x, grad_weight, grad_scale, grad_coefficients, grad_fusion


def _found(totals: Array, outside: Array, grid: Tensor, codes: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of three coefficients [..., 3], of the fusion weights [...], and of the scale."""
    scale, _, influence = grid.tolist()
    to_scale = influence * totals[..., lanes.RESIDUAL].sum() + outside.sum()
    to_powers = totals[..., [lanes.B0, lanes.B1, lanes.B2]] @ (_powers(codes).T * (-scale * influence))
    to_weights = totals[..., lanes.WEIGHT] * (-scale * influence)
    to_border, to_fusion = (torch.from_numpy(array.astype(np.float32)) for array in (to_powers, to_weights))
    return to_border, to_fusion, torch.tensor([to_scale], dtype=torch.float32)


@numba.njit(nogil=True)
@no_type_check
def _quantize(x: Array, border: Any, parameters: Array, out: Array, plan: Any) -> None:
    """Quantize planes [images * channels, pixels], from the first to the last of `plan`."""
    pixels = x.shape[1]
    u, tail = _scratch(1, pixels + POSITIONS), _scratch(1, POSITIONS)
    steps = np.arange(VECTORS) * LANES
    for plane in range(plan[0], plan[1]):
        channel = plane % border[1].shape[0]
        _coordinates(x[plane : plane + 1], u, parameters)
        for start in range(0, pixels, POSITIONS):
            frame = _frame(u.ctypes.data + start * 4, steps.ctypes.data, border, parameters)
            if start + POSITIONS <= pixels:
                _fill(frame, False, channel, out.ctypes.data + (plane * pixels + start) * 4)
            else:
                _fill(frame, False, channel, tail.ctypes.data)
                out[plane, start:] = tail[0, : pixels - start]


@numba.njit(nogil=True)
@no_type_check
def _quantize_grad(arrays: Any, border: Any, parameters: Array, results: Any, plan: Any) -> None:
    """Backward pass of [images, channels, pixels], from the first to the last channel of `plan`."""
    grad, x = arrays
    result, totals, sums = results
    count = x.shape[2]
    room = count + POSITIONS
    u, incoming, pixels = _scratch(1, room), _scratch(1, room), _scratch(1, room)
    steps = np.arange(VECTORS) * LANES
    for channel in range(plan[0], plan[1]):
        for image in range(x.shape[0]):
            source, target = x[image, channel : channel + 1], result[image, channel : channel + 1]
            _coordinates(source, u, parameters)
            incoming[0, :count] = grad[image, channel]  # and zeros behind, which add nothing
            pixels[:] = 0
            for start in range(0, count, POSITIONS):
                frame = _frame(u.ctypes.data + start * 4, steps.ctypes.data, border, parameters)
                row, own = incoming.ctypes.data + start * 4, pixels.ctypes.data + start * 4
                _spread(frame, False, channel, row, own, totals.ctypes.data)
            sums[channel] += _to_pixels(source, pixels, parameters, target)


def _plain(coefficients: Tensor, codes: list[float]) -> tuple[Array, Array, Array]:
    """Describe a border without taps."""
    table = _coefficients(coefficients.unsqueeze(2), codes)
    return np.zeros(len(table), np.int64), table, np.zeros((0, 0), np.float32)


def _elements(x: Tensor, grid: Tensor, coefficients: Tensor, codes: list[float]) -> Tensor:
    source = x.detach().contiguous()
    out = torch.empty_like(source)
    planes = x.shape[0] * x.shape[1]
    flat = (tensor.view(planes, -1).numpy() for tensor in (source, out))
    arrays = next(flat), _plain(coefficients, codes), _parameters(grid, codes), next(flat)
    windows.in_threads(lambda first, last: _quantize(*arrays, (first, last)), planes, _COST * x.numel())
    return out


def _elements_grad(
    grad: Tensor, x: Tensor, grid: Tensor, coefficients: Tensor, codes: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    source, parameters = x.detach().contiguous(), _parameters(grid, codes)
    result, channels = torch.empty_like(source), x.shape[1]
    totals, sums = np.zeros((channels, 1, lanes.TERMS, LANES), np.float32), np.zeros(channels)
    shape = (x.shape[0], channels, -1)
    arrays = grad.detach().contiguous().view(shape).numpy(), source.view(shape).numpy()
    results = result.view(shape).numpy(), totals, sums
    border = _plain(coefficients, codes)
    windows.in_threads(
        lambda first, last: _quantize_grad(arrays, border, parameters, results, (first, last)),
        channels,
        3 * _COST * x.numel(),
    )
    to_border, _, grad_scale = _found(totals.sum((1, 3), dtype=np.float64), sums, grid, codes)
    return result, grad_scale, to_border[:, : len(coefficients)].T.contiguous()


def _refuses_dtypes(*tensors: Tensor | None) -> str | None:
    """Say what is wrong with the tensors. What passes is read and written at addresses that nothing else checks."""
    there = [tensor for tensor in tensors if tensor is not None]
    other = sorted({str(tensor.dtype) for tensor in there if tensor.dtype != torch.float32})
    if other:
        return f"it computes in torch.float32, and would change {', '.join(other)}"
    devices = sorted({str(tensor.device) for tensor in there if tensor.device.type != "cpu"})
    if devices:
        return f"it runs on a CPU, a tensor is on {', '.join(devices)}"
    empty = [tuple(tensor.shape) for tensor in there if not tensor.numel()]
    return f"a tensor of shape {empty[0]} has no elements" if empty else None


def _refuses_border(coefficients: Tensor, fusion: Tensor | None, codes: list[float]) -> str | None:
    if len(coefficients) > 3:
        return f"the border is of degree {len(coefficients) - 1}, it computes up to degree 2"
    _, _, low, high = codes
    if abs(low) > 4 * (high - low):
        return f"the border's range, {low} to {high}, is so far from 0 that powers of codes would lose digits"
    for tensor in (coefficients,) if fusion is None else (coefficients, fusion):
        if not float(tensor.abs().max()) < _HUGE:
            return f"it compares borders that are numbers, and a parameter of them is {float(tensor.abs().max())}"
    return None


def _refuses_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Tensor,
    coefficients: Tensor,
    fusion: Tensor | None,
    codes: list[float],
    geometry: list[int],
) -> str | None:
    reason = _refuses_dtypes(x, weight, bias, grid, coefficients, fusion) or _refuses_border(
        coefficients, fusion, codes
    )
    if reason:
        return reason
    groups, border = geometry[4], (x.shape[1], weight.shape[2:].numel())
    shapes = [tuple(tensor.shape) for tensor in (x, weight, bias, grid, coefficients, fusion) if tensor is not None]
    fit = x.ndim == weight.ndim == 4 and x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    fit = fit and min(_size(x, weight, geometry)) > 0 and tuple(coefficients.shape[1:]) == border
    fit = fit and (fusion is None or tuple(fusion.shape) == border) and tuple(grid.shape) == (3,)
    if fit and (bias is None or tuple(bias.shape) == (weight.shape[0],)):
        return None
    return f"tensors of {', '.join(map(str, shapes))} do not fit in {groups} groups"


def _refuses_conv_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    grid: Tensor,
    coefficients: Tensor,
    fusion: Tensor | None,
    codes: list[float],
    geometry: list[int],
) -> str | None:
    reason = _refuses_conv(x, weight, None, grid, coefficients, fusion, codes, geometry) or _refuses_dtypes(grad)
    if reason:
        return reason
    if tuple(grad.shape) != (len(x), len(weight), *_size(x, weight, geometry)):
        return f"a gradient of {tuple(grad.shape)} does not fit the output"
    # Positions that nobody asks for get zeros, which only finite numbers turn into zeros.
    finite = not bool(x.sum().isnan()) and bool(weight.isfinite().all())
    return None if finite else "it computes with finite numbers, and some are not finite"


def _refuses_elements(x: Tensor, grid: Tensor, coefficients: Tensor, codes: list[float]) -> str | None:
    reason = _refuses_dtypes(x, grid, coefficients) or _refuses_border(coefficients, None, codes)
    if reason:
        return reason
    fit = x.ndim >= 2 and coefficients.ndim == 2 and x.shape[1] == coefficients.shape[1] and tuple(grid.shape) == (3,)
    return None if fit else f"tensors of {tuple(x.shape)}, {tuple(grid.shape)}, {tuple(coefficients.shape)} do not fit"


def _refuses_elements_grad(
    grad: Tensor, x: Tensor, grid: Tensor, coefficients: Tensor, codes: list[float]
) -> str | None:
    reason = _refuses_elements(x, grid, coefficients, codes) or _refuses_dtypes(grad)
    if reason is None and grad.shape != x.shape:
        return f"a gradient of {tuple(grad.shape)} does not fit an input of {tuple(x.shape)}"
    return reason


border_conv2d = (Kernel("cpu-simd", _refuses_conv, lambda *_: _FORWARD_RATE, _conv),)
border_conv2d_grad = (Kernel("cpu-simd", _refuses_conv_grad, lambda *_: _BACKWARD_RATE, _conv_grad),)
border_quantize = (Kernel("cpu-simd", _refuses_elements, lambda *_: _ELEMENTS_RATE, _elements),)
border_quantize_grad = (Kernel("cpu-simd", _refuses_elements_grad, lambda *_: _ELEMENTS_BACKWARD_RATE, _elements_grad),)
