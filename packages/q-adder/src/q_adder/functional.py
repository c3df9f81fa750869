r"""The adder operator: a convolution whose product is replaced by a distance.

$$ Y[n,o,i,j] = -\sum_{c,a,b} |X[n,c,\,is + ad,\,js + bd] - W[o,c,a,b]| $$

A padded zero is a real tap and contributes $-|W|$. Outputs are never positive and grow with the number of taps, so a
batch norm follows every adder layer.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from q_adder import ops
from q_core.errors import BackendError, RangeError, ShapeError


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Return `(value, value)` for a number, a pair as it is."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def adder2d(
    x: Float[Tensor, "*n c h w"],
    weight: Float[Tensor, "o k kh kw"],
    bias: Float[Tensor, " b"] | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    exponent: float = 1.0,
) -> Float[Tensor, "*n o i j"]:
    r"""Return minus the l1 distance between every window of the input and every kernel.

    Nothing is cast under `torch.autocast`: the result has the dtype of `x` whatever that of `weight`, and sums run in
    float32, or in float64 where an operand is float64.

    Args:
        x: Input, a batch or one image.
        weight: Kernels; `k` is `c / groups`.
        bias: Added to each output channel, [o].
        stride: Step of the window, in pixels.
        padding: Zeros on each side of height and width, in pixels. They count as taps.
        dilation: Spacing of the taps, in pixels.
        groups: Groups of channels that do not see each other.
        exponent: Power of the absolute difference, from 1 (the adder operator) to 2.

    Returns:
        Distances, in the dtype of `x`.

    Raises:
        ShapeError: Channels, groups, kernels and bias do not fit, or the window is larger than the padded input.
        RangeError: `exponent` outside 1 to 2, or a stride, padding or dilation that no window has.
        BackendError: An operand is not of a floating-point dtype.

    Gradient:
        At exponent 1, $X - W$ to the weight and $\mathrm{HardTanh}(W - X)$ to the input, instead of the signs; above 1
        the derivative. There is no second derivative.

    Source:
        Chen et al. 2020, arXiv:1912.13200, eq. 2, 5 and 6; the exponent Xu et al. 2021, arXiv:2105.14202.
    """
    steps, edges, spacing = pair(stride), pair(padding), pair(dilation)
    _check_operands("adder2d", x, weight, bias, exponent)
    _check_window(steps, edges, spacing)
    _check_channels(x, weight, groups)
    _check_fit(x, weight, edges, spacing)
    if x.ndim == 3:
        options = {"stride": steps, "padding": edges, "dilation": spacing}
        return adder2d(x.unsqueeze(0), weight, bias, **options, groups=groups, exponent=exponent).squeeze(0)
    left, right = _same_width(x, weight)
    padded = F.pad(left, (edges[1], edges[1], edges[0], edges[0])) if any(edges) else left
    out: Tensor = ops.distance_conv2d(padded, right, list(steps), list(spacing), groups, float(exponent))
    return (out if bias is None else out + bias.reshape(-1, 1, 1)).to(x.dtype)


def adder_linear(
    x: Float[Tensor, "*n k"],
    weight: Float[Tensor, "o k"],
    bias: Float[Tensor, " b"] | None = None,
    *,
    exponent: float = 1.0,
) -> Float[Tensor, "*n o"]:
    """Return minus the l1 distance between every row of the input and every row of the weight.

    Args:
        x: Input.
        weight: One row per output.
        bias: Added to each output, [o].
        exponent: Power of the absolute difference, from 1 to 2.

    Returns:
        Distances, in the dtype of `x`; sums run in float32 or wider.

    Raises:
        ShapeError: The rows differ in length, or the bias does not fit.
        RangeError: `exponent` outside 1 to 2.
        BackendError: An operand is not of a floating-point dtype.

    Gradient:
        As `adder2d`.
    """
    _check_operands("adder_linear", x, weight, bias, exponent)
    if x.shape[-1] != weight.shape[-1]:
        raise ShapeError(
            f"adder_linear: input with {x.shape[-1]} features, weight with {weight.shape[-1]}: the two must be equal"
        )
    kernels = weight.reshape(*weight.shape, 1, 1)
    rows = math.prod(x.shape[:-1])
    if rows == 0:  # no row is no image, but a line without pixels is an error
        out = adder2d(x.reshape(rows, x.shape[-1], 1, 1), kernels, bias, exponent=exponent)
    else:
        # As the pixels of one image, in one line: a row for each image would be as many images as rows.
        line = x.reshape(rows, x.shape[-1]).T.reshape(1, x.shape[-1], 1, rows)
        out = adder2d(line, kernels, bias, exponent=exponent).reshape(weight.shape[0], rows).T
    return out.reshape(*x.shape[:-1], weight.shape[0])


def adder_matmul(a: Float[Tensor, "*b n k"], b: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b n m"]:
    r"""Return minus the l1 distance between every row of `a` and every row of `b`, the adder form of $a b^\top$.

    $$ Y[\ldots,n,m] = -\sum_k |a[\ldots,n,k] - b[\ldots,m,k]| $$

    Memory is that of inputs, output and one panel; the cube of n x m x k differences is never built.

    Args:
        a: Rows, with any number of batch dimensions.
        b: Rows, with the same batch dimensions.

    Returns:
        Distances, in the dtype to which `a` and `b` promote; sums run in float32 or wider.

    Raises:
        ShapeError: The rows differ in length, or the batch dimensions differ.

    Gradient:
        $\mathrm{HardTanh}(b - a)$ to `a` and $\mathrm{HardTanh}(a - b)$ to `b`, times the incoming gradient: both are
        activations, so both get the gradient that `adder2d` gives its input.

    Source:
        The operator Shu et al. 2021 (NeurIPS, "Adder Attention for Vision Transformer") name for the attention map and
        its product with the values; the gradient is that of Chen et al. 2020, arXiv:1912.13200, eq. 6, for an input.
    """
    check_rows(a, b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    batch = math.prod(a.shape[:-2])
    rows = (x.to(dtype).reshape(batch, *x.shape[-2:]) for x in (a, b))
    out: Tensor = ops.distance_matmul(*rows)
    return out.reshape(*a.shape[:-1], b.shape[-2])


def check_windows(x: Tensor, weight: Tensor, dilation: tuple[int, int], groups: int) -> None:
    """Check that a padded input and kernels fit each other.

    Raises:
        BackendError: The input is not of a floating-point dtype.
        ShapeError: Channels or groups do not fit, or the window is larger than the input.
    """
    _check_operands("adder2d", x, x, None, 1.0)
    _check_channels(x, weight, groups)
    _check_fit(x, weight, (0, 0), dilation)


def check_rows(a: Tensor, b: Tensor) -> None:
    """Check that two operands of `adder_matmul` fit each other.

    Raises:
        ShapeError: They do not.
    """
    if a.dim() < 2 or b.dim() < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ShapeError(
            f"adder_matmul: rows of shape {tuple(a.shape)} and {tuple(b.shape)}: batch dimensions and the last "
            "dimension must be equal"
        )


def _same_width(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # The operators sum each operand in float32 or wider, so only a float64 beside another dtype keeps them apart.
    wide = torch.promote_types(x.dtype, weight.dtype)
    return (x.to(wide), weight.to(wide)) if wide == torch.float64 else (x, weight)


def _check_operands(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, exponent: float) -> None:
    for role, tensor in (("input", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise BackendError(f"{name}: {role} of {tensor.dtype}: it takes floating-point dtypes, convert it first")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"{name}: bias of shape {tuple(bias.shape)} for {weight.shape[0]} outputs: one value for each")
    check_exponent(exponent)


def check_exponent(exponent: float) -> None:
    """Check that an exponent is between those of the adder operator and of a convolution.

    Raises:
        RangeError: It is not.
    """
    if not 1.0 <= exponent <= 2.0:
        raise RangeError(f"exponent={exponent}: it must be from 1 (the adder operator) to 2")


def _check_window(stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]) -> None:
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(values) < least:
            raise RangeError(f"adder2d: {name}={values}: it must be at least {least}")


def _check_channels(x: Tensor, weight: Tensor, groups: int) -> None:
    if x.ndim not in (3, 4) or weight.ndim != 4:
        raise ShapeError(
            f"adder2d: input of shape {tuple(x.shape)} and kernels of shape {tuple(weight.shape)}: expected a batch "
            "[n, c, h, w] or one image [c, h, w], and kernels [o, c / groups, kh, kw]"
        )
    if groups < 1 or x.shape[-3] % groups or weight.shape[0] % groups:
        raise ShapeError(
            f"adder2d: groups={groups} with {x.shape[-3]} input and {weight.shape[0]} output channels: "
            "it must divide both"
        )
    if weight.shape[1] * groups != x.shape[-3]:
        raise ShapeError(
            f"adder2d: kernels with {weight.shape[1]} channels in {groups} groups on an input with {x.shape[-3]}: "
            f"expected {x.shape[-3] // groups}"
        )


def _check_fit(x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]) -> None:
    for axis in (0, 1):
        window = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        size = x.shape[axis - 2] + 2 * padding[axis]
        if window > size:
            raise ShapeError(
                f"adder2d: window of {window} pixels on a padded input of {size}: pad more, or use a smaller kernel"
            )
