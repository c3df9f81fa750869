"""nuLSQ as it is written in its equations: one element and one step at a time.

With steps s above zero and r below it, C_k = s_1 + ... + s_k and K_k = r_1 + ... + r_k, and H(0) = 0:

    Q(x)    = sum_k s_k H(x - C_k + s_k/2) - sum_k r_k H(-x - K_k + r_k/2)
    dQ/dx   = 1 if -K_Qn <= x <= C_Qp else 0
    dQ/ds_k = H(x - C_k + s_k/2) - (x - C_(k-1))/s_k     if C_(k-1) < x <= C_k;   1 if x > C_Qp;     else 0
    dQ/dr_k = (-x - K_(k-1))/r_k - H(-x - K_k + r_k/2)   if K_(k-1) < -x <= K_k;  -1 if -x > K_Qn;   else 0
"""

import itertools

import torch


def heaviside(value):
    return 1.0 if value > 0 else 0.0


def _sums(steps):
    return list(itertools.accumulate(steps, initial=0.0))


def output(x, negative, positive):
    """Q(x) of one number; the steps are lists."""
    above, below = _sums(positive), _sums(negative)
    total = 0.0
    for k, step in enumerate(positive, 1):
        total += step * heaviside(x - above[k] + step / 2)
    for k, step in enumerate(negative, 1):
        total -= step * heaviside(-x - below[k] + step / 2)
    return total


def slope(x, negative, positive):
    """dQ/dx of one number."""
    return 1.0 if -sum(negative) <= x <= sum(positive) else 0.0


def jacobian(x, negative, positive):
    """dQ/dr_1, ..., dQ/dr_Qn, dQ/ds_1, ..., dQ/ds_Qp of one number."""
    return [-part for part in _one_side(-x, negative)] + _one_side(x, positive)


def _one_side(x, steps):
    ends = _sums(steps)
    parts = []
    for k, step in enumerate(steps, 1):
        if x > ends[-1]:
            parts.append(1.0)
        elif ends[k - 1] < x <= ends[k]:
            parts.append(heaviside(x - ends[k] + step / 2) - (x - ends[k - 1]) / step)
        else:
            parts.append(0.0)
    return parts


def surrogate(x, negative, positive):
    """A tensor that ordinary autograd differentiates as nuLSQ: the clipped real and each step times a constant.

    x is a vector; the steps are vectors, which may learn. Equal in value to Q(x), up to rounding.
    """
    zero = x.new_zeros(())
    top, bottom = positive.sum(), -negative.sum()
    total = torch.where(x > top, top, torch.where(x < bottom, bottom, x))
    for sign, steps in ((1, positive), (-1, negative)):
        end = zero
        for step in steps:
            up = (sign * x > end + step / 2).to(x.dtype)
            part = ((sign * x - end) / step).clamp(0, 1)
            total = total + sign * step * (up - part).detach()
            end = end + step
    return total


def printed_equation_13(x, negative):
    """dQ/dr_k as the supplement prints it: its first sum ends at k - 1 instead of k."""
    ends = _sums(negative)
    parts = []
    for k, step in enumerate(negative, 1):
        inside = ends[k - 1] < -x <= ends[k]
        parts.append(-heaviside(-x - ends[k - 1] + step / 2) - (x + ends[k - 1]) / step if inside else 0.0)
    return parts


def planes(codes, levels, qmin):
    """Cut codes into planes of zeros and ones in int64: [planes, *shape].

    The plane between two codes says whether an element is beyond them, seen from the level nearest to zero. Where that
    is not zero, it has a plane of ones before the others. `levels` has one row for each index of the first axis of the
    codes, or one.
    """
    rows = levels.reshape(-1, levels.shape[-1])
    index = codes.long() - qmin
    found = [torch.ones_like(index)] if bool((rows != 0).all(1).any()) else []
    zero = rows.abs().argmin(1).reshape(-1, *[1] * (index.ndim - 1))
    for upper in range(1, rows.shape[1]):
        found.append(torch.where(upper > zero, (index >= upper).long(), (index < upper).long()))
    return torch.stack(found)


def counts_linear(inputs, weights):
    """Multiply planes [k, *n, c] with planes [j, o, c] one product at a time: [k, j, *n, o], int64."""
    out = torch.zeros(len(inputs), len(weights), *inputs.shape[1:-1], weights.shape[1], dtype=torch.int64)
    for k, j, o, c in itertools.product(*map(range, (len(inputs), len(weights), weights.shape[1], weights.shape[2]))):
        out[k, j, ..., o] += inputs[k, ..., c] * weights[j, o, c]
    return out


def counts_conv2d(inputs, weights, layer):
    """Convolve planes [k, n, c, h, w] with planes [j, o, c/g, kh, kw] of a layer, one tap at a time, in int64."""
    sides = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # Padding copies integers, which float64 holds.
    padded = torch.nn.functional.pad(inputs.flatten(0, 1).double(), sides, mode).long().unflatten(0, inputs.shape[:2])
    (high, wide), (down, across), (tall, broad) = layer.kernel_size, layer.stride, layer.dilation
    rows = (padded.shape[3] - tall * (high - 1) - 1) // down + 1
    columns = (padded.shape[4] - broad * (wide - 1) - 1) // across + 1
    groups, outputs = layer.groups, weights.shape[1] // layer.groups
    kernels = weights.unflatten(1, (groups, outputs))  # [j, g, o, c, kh, kw]
    out = torch.zeros(len(inputs), len(weights), padded.shape[1], groups, outputs, rows, columns, dtype=torch.int64)
    for row, column, a, b in itertools.product(range(rows), range(columns), range(high), range(wide)):
        pixel = padded[..., row * down + a * tall, column * across + b * broad].unflatten(2, (groups, -1))
        seen = pixel[:, None, :, :, None]  # [k, 1, n, g, 1, c]
        out[..., row, column] += (seen * kernels[:, None, :, :, :, a, b]).sum(-1)
    return out.flatten(3, 4)
