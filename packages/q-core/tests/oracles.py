"""Slow, obvious versions, written from the equations: loops over elements of Python numbers."""

import itertools
import math


def round_half_even(u):
    """Python's own rounding, which is IEEE's."""
    return float(round(u))


def round_half_toward_zero(u):
    """Nearest integer; of two equally near ones the smaller in magnitude."""
    magnitude = abs(u)
    base = math.floor(magnitude)
    return math.copysign(base + (magnitude - base > 0.5), u)


def quantize(x, scale, zero_point, qmin, qmax, rounding=round_half_even):
    """Jacob et al. 2018, eq. 1, one real."""
    u = x / scale
    u = min(max(u, qmin - zero_point), qmax - zero_point)
    return min(max(rounding(u) + zero_point, qmin), qmax)


def dequantize(code, scale, zero_point):
    """Jacob et al. 2018, eq. 1, one code."""
    return scale * (code - zero_point)


def nearest_level(x, levels):
    """Index of the level next to x; a tie goes to the lower one."""
    return min(range(len(levels)), key=lambda k: (abs(x - levels[k]), k))


def lsq_gradients(x, scale, zero_point, qmin, qmax):
    """Esser et al. 2020, eq. 3 and 5, one real: derivative of the result by x and by the scale.

    The paper gives the interval without its ends; at an end itself this family takes the formula of the inside.
    """
    low, high, u = qmin - zero_point, qmax - zero_point, x / scale
    if u < low:
        return 0.0, float(low)
    if u > high:
        return 0.0, float(high)
    return 1.0, round_half_even(u) - u


def tile_of(index, shape, tile_shape):
    """Index of the tile that an element belongs to: every axis is cut into equal runs."""
    return tuple(i * tiles // size for i, size, tiles in zip(index, shape, tile_shape, strict=True))


def indices(shape):
    """All indices of a tensor, in row-major order."""
    return list(itertools.product(*(range(size) for size in shape)))


def tiles(x, tile_shape):
    """The elements of each tile in row-major order: a dictionary from the index of the tile."""
    rows = {tile: [] for tile in indices(tile_shape)}
    for index in indices(x.shape):
        rows[tile_of(index, x.shape, tile_shape)].append(x[index].item())
    return rows


def pack(codes, bits, qmin):
    """One integer that holds every code; bit i * bits is the lowest bit of code i. Then cut in words of 32 bits."""
    number = sum((code - qmin) << (i * bits) for i, code in enumerate(codes))
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(math.ceil(len(codes) * bits / 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def histogram(values, bins):
    """Width of a bin and a dictionary from its number to its count: the least power of two that holds every value."""
    largest = max(abs(v) for v in values)
    exponent = -120
    while largest >= 2.0**exponent * (bins // 2):
        exponent += 1
    counts = {}
    for value in values:
        number = math.floor(value / 2.0**exponent)
        counts[number] = counts.get(number, 0) + 1
    return 2.0**exponent, counts


def order_statistic(values, fraction):
    """The least value that at least this fraction of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered), max(1, math.ceil(len(ordered) * fraction - 1e-9))) - 1]


def mse_candidates(low, high, qmin, qmax, symmetric, count):
    """The (scale, zero point) that the p-norm search tries, of a range that holds zero."""
    low, high, last = min(low, 0.0), max(high, 0.0), qmax - qmin
    fractions = [(i + 1) / count for i in range(count)]
    if symmetric:
        full = max(high / qmax if qmax else 0.0, low / qmin if qmin else 0.0)
        return [(full * fraction, 0) for fraction in fractions]
    full = (high - low) / last
    if low == 0 or high == 0:
        zero = qmin if low == 0 else qmax
        return [(full * fraction, zero) for fraction in fractions]
    middle = round(-low / full)
    zeros = range(last + 1) if last < 16 else sorted({min(max(middle + k, 0), last) for k in range(-8, 8)})
    return [(full * fraction, qmin + zero) for fraction in fractions for zero in zeros]


def entropy_divergences(values, bins, candidates, qmin, qmax, symmetric):
    """Migacz 2017: each threshold and the divergence between the clipped histogram and its quantized form."""
    width, counts = histogram(values, bins)
    largest, seen_low, seen_high = max(abs(v) for v in values), min(values), max(values)
    result = []
    for k in range(candidates):
        threshold = largest * ((k + 1) / candidates)
        low, high = min(max(-threshold, seen_low), 0.0), max(min(threshold, seen_high), 0.0)
        scale, zero_point = _uniform(low, high, qmin, qmax, symmetric)
        result.append((threshold, _divergence(counts, width, threshold, scale, zero_point, qmin, qmax)))
    return result


def _uniform(low, high, qmin, qmax, symmetric):
    if symmetric:
        return max(high / qmax if qmax else 0.0, low / qmin if qmin else 0.0), 0
    scale = (high - low) / (qmax - qmin)
    return scale, min(max(qmin - round(low / scale), qmin), qmax)


def _divergence(counts, width, threshold, scale, zero_point, qmin, qmax):
    # A bin [n w, (n + 1) w) is inside when it can hold a value within the threshold.
    inside = {n: c for n, c in counts.items() if n * width <= threshold and (n + 1) * width > -threshold}
    reference = dict(inside)
    last, first = math.floor(threshold / width), -math.ceil(threshold / width)
    for n, c in counts.items():
        if n not in inside:
            edge = last if n > 0 else first
            reference[edge] = reference.get(edge, 0) + c
    by_code = {}
    for n in inside:
        by_code.setdefault(quantize((n + 0.5) * width, scale, zero_point, qmin, qmax), []).append(n)
    quantized = {n: sum(inside[m] for m in members) / len(members) for members in by_code.values() for n in members}
    total, total_quantized = sum(reference.values()), sum(quantized.values())
    divergence = 0.0
    for n, c in reference.items():
        if n not in quantized:
            return math.inf
        divergence += c / total * math.log((c / total) / (quantized[n] / total_quantized))
    return divergence
