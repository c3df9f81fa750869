r"""The adder operator: a convolution whose product is replaced by a distance.

$$ Y[n,o,i,j] = -\sum_{c,a,b} |X[n,c,\,is + ad,\,js + bd] - W[o,c,a,b]| $$

A padded zero is a real tap and contributes $-|W|$. Outputs are never positive and grow with the number of taps, so a
batch norm follows every adder layer.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from q_adder import ops
from q_core.errors import BackendError, RangeError, ShapeError, SpecError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NARROW = DTYPES[:2]


def pair(value: Any, name: str = "value") -> tuple[int, int]:
    """Return `(value, value)` for a whole number, a pair of them as it is.

    Args:
        value: One number, or one for each axis.
        name: What it is, for messages.

    Raises:
        SpecError: It is neither.
    """
    both = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
    if len(both) != 2 or any(not isinstance(one, int) or isinstance(one, bool) for one in both):
        raise SpecError(f"adder2d: {name}={value!r}: expected one whole number, or two: for rows and for columns")
    return both


def uncast(x: Tensor) -> Tensor:
    """Return a float16 or bfloat16 operand in float32 where autocast is on, anything else as it is.

    Distances are sums of hundreds of numbers of one sign: around -2000 with a spread of 4, where bfloat16 has a number
    every 16. Torch computes norms and softmax in float32 under autocast for less.
    """
    # Asked of the meta device, torch raises.
    return x.float() if x.dtype in _NARROW and not x.is_meta and torch.is_autocast_enabled(x.device.type) else x


def adder2d(
    x: Float[Tensor, "*n c h w"],
    weight: Float[Tensor, "o k kh kw"],
    bias: Float[Tensor, " b"] | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    exponent: float = 1.0,
) -> Float[Tensor, "*n o i j"]:
    r"""Return minus the l1 distance between every window of the input and every kernel.

    Sums run in float32, or in float64 where an operand is float64. The result has the dtype of `x`, whatever that of
    `weight`; under `torch.autocast` it is float32 at least, as that of a norm or a softmax is. A narrow result loses
    what tells outputs apart: they lie far from zero and close to each other, around -2000 with a spread of 4 in a
    ResNet, where bfloat16 has a number every 16 and float16 one every 1 or 2. And float16 ends at 65504, beyond which
    the result is minus infinity. Use autocast, not a model that is cast as a whole.

    Args:
        x: Input, a batch or one image.
        weight: Kernels; `k` is `c / groups`.
        bias: Added to each output channel, [o].
        stride: Step of the window, in pixels.
        padding: Zeros on each side of height and width, in pixels; or "same" for as many outputs as inputs at stride
            1, or "valid" for none. They count as taps.
        dilation: Spacing of the taps, in pixels.
        groups: Groups of channels that do not see each other.
        exponent: Power of the absolute difference, from 1 (the adder operator) to 2.

    Returns:
        Distances, in the dtype of `x`, float32 instead of a narrower one under autocast.

    Raises:
        ShapeError: Channels, groups, kernels and bias do not fit, or the window is larger than the padded input.
        RangeError: `exponent` outside 1 to 2, or a stride, padding or dilation that no window has.
        SpecError: A stride, padding or dilation that is not one or two whole numbers, or "same" with another stride
            than 1.
        BackendError: An operand is not in float16, bfloat16, float32 or float64, or carries a tangent of forward mode.

    Gradient:
        At exponent 1, $X - W$ to the weight and $\mathrm{HardTanh}(W - X)$ to the input, instead of the signs; above 1
        the derivative. Backwards only, also by `torch.func.grad`: there is no second derivative and no forward mode.

    Source:
        Chen et al. 2020, arXiv:1912.13200, eq. 2, 5 and 6; the exponent Xu et al. 2021, arXiv:2105.14202.
    """
    steps, spacing = pair(stride, "stride"), pair(dilation, "dilation")
    _check_operands("adder2d", x, weight, bias, exponent)
    _check_channels(x, weight, groups)
    edges = _edges(padding, weight, steps, spacing)
    _check_window(steps, edges, spacing)
    _check_fit(x, weight, edges, spacing)
    if x.ndim == 3:
        options: dict[str, Any] = {"stride": steps, "padding": padding, "dilation": spacing, "groups": groups}
        return adder2d(x.unsqueeze(0), weight, bias, **options, exponent=exponent).squeeze(0)
    x = uncast(x)
    left, right = _same_width(x, weight)
    padded = F.pad(left, (*edges[1], *edges[0])) if any(map(any, edges)) else left
    geometry = (list(steps), list(spacing), groups, float(exponent))
    out = ops.differentiable(ops.distance_conv2d, padded, right, *geometry)
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
        Distances, in the dtype of `x`, float32 instead of a narrower one under autocast; sums run in float32 or wider.
        What a narrow dtype loses, `adder2d` tells.

    Raises:
        ShapeError: The rows differ in length, or the bias does not fit.
        RangeError: `exponent` outside 1 to 2.
        BackendError: As `adder2d`.

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
        Distances, in the dtype to which `a` and `b` promote, float32 instead of a narrower one under autocast; sums run
        in float32 or wider. What a narrow dtype loses, `adder2d` tells.

    Raises:
        ShapeError: The rows differ in length, or the batch dimensions differ.
        BackendError: As `adder2d`.

    Gradient:
        $\mathrm{HardTanh}(b - a)$ to `a` and $\mathrm{HardTanh}(a - b)$ to `b`, times the incoming gradient: both are
        activations, so both get the gradient that `adder2d` gives its input.

    Source:
        The operator Shu et al. 2021 (NeurIPS, "Adder Attention for Vision Transformer") name for the attention map and
        its product with the values; the gradient is that of Chen et al. 2020, arXiv:1912.13200, eq. 6, for an input.
    """
    out = ops.differentiable(ops.distance_matmul, *as_rows(a, b))
    return out.reshape(*a.shape[:-1], b.shape[-2])


def as_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give two operands of `adder_matmul` one batch dimension and one dtype.

    Raises:
        ShapeError: The rows differ in length, or the batch dimensions differ.
        BackendError: An operand is of a dtype that adder operators do not take.
    """
    check_rows(a, b)
    a, b = uncast(a), uncast(b)
    dtype, batch = torch.promote_types(a.dtype, b.dtype), math.prod(a.shape[:-2])
    return a.to(dtype).reshape(batch, *a.shape[-2:]), b.to(dtype).reshape(batch, *b.shape[-2:])


def pad(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Pad an input as a convolution does.

    Raises:
        ShapeError: The input is too small to be reflected or to be continued from its other end.
    """
    # torch's own bookkeeping: padding per side, last axis first, also for padding="same".
    edges, mode = layer._reversed_padding_repeated_twice, layer.padding_mode
    if not any(edges):
        return x
    if mode == "zeros":
        return F.pad(x, edges)
    for axis in (0, 1):
        size, widest = x.shape[-1 - axis], max(edges[2 * axis : 2 * axis + 2])
        least = {"reflect": widest + 1, "circular": widest}.get(mode, 1)
        if size < least:
            raise ShapeError(
                f'padding of {widest} pixels in the mode "{mode}" on an input of {size} pixels: it takes {least} at '
                'least; use a larger input, less padding or padding_mode="zeros"'
            )
    return F.pad(x, edges, mode=mode)


def check_windows(x: Tensor, weight: Tensor, dilation: tuple[int, int], groups: int) -> None:
    """Check that a padded input and kernels fit each other.

    Raises:
        BackendError: The input is of a dtype that adder operators do not take.
        ShapeError: Channels or groups do not fit, or the window is larger than the input.
    """
    _check_operands("adder2d", x, x, None, 1.0)
    _check_channels(x, weight, groups)
    _check_fit(x, weight, ((0, 0), (0, 0)), dilation)


def check_rows(a: Tensor, b: Tensor) -> None:
    """Check that two operands of `adder_matmul` fit each other.

    Raises:
        ShapeError: They do not.
        BackendError: One is of a dtype that adder operators do not take.
    """
    _check_dtypes("adder_matmul", first=a, second=b)
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
    _check_dtypes(name, input=x, weight=weight, bias=bias)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"{name}: bias of shape {tuple(bias.shape)} for {weight.shape[0]} outputs: one value for each")
    check_exponent(exponent)


def _check_dtypes(name: str, **operands: Tensor | None) -> None:
    for role, tensor in operands.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise BackendError(
                f"{name}: {role} of {tensor.dtype}: it takes floating-point dtypes of 16 bits or more, convert"
            )


def check_exponent(exponent: float) -> None:
    """Check that an exponent is between those of the adder operator and of a convolution.

    Raises:
        RangeError: It is not.
    """
    if not 1.0 <= exponent <= 2.0:
        raise RangeError(f"exponent={exponent}: it must be from 1 (the adder operator) to 2")


_Edges = tuple[tuple[int, int], tuple[int, int]]


def _edges(padding: Any, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]) -> _Edges:
    """Return the padding before and behind the rows, and the columns."""
    if not isinstance(padding, str):
        rows, columns = pair(padding, "padding")
        return (rows, rows), (columns, columns)
    if padding not in ("same", "valid"):
        raise SpecError(f'adder2d: padding={padding!r}: expected one or two whole numbers, "same" or "valid"')
    if padding == "valid":
        return (0, 0), (0, 0)
    if stride != (1, 1):
        raise SpecError(f'adder2d: padding="same" with stride={stride}: only at stride 1 are there as many outputs')
    rows, columns = (dilation[axis] * (weight.shape[2 + axis] - 1) for axis in (0, 1))
    # As torch has it: of an odd number the larger half lies behind.
    return (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)


def _check_window(stride: tuple[int, int], padding: _Edges, dilation: tuple[int, int]) -> None:
    sides = (padding[0][0], padding[1][0])
    for name, values, least in (("stride", stride, 1), ("padding", sides, 0), ("dilation", dilation, 1)):
        if min(values) < least:
            raise RangeError(f"adder2d: {name}={values}: it must be at least {least}")


def _check_channels(x: Tensor, weight: Tensor, groups: Any) -> None:
    if x.ndim not in (3, 4) or weight.ndim != 4:
        raise ShapeError(
            f"adder2d: input of shape {tuple(x.shape)} and kernels of shape {tuple(weight.shape)}: expected a batch "
            "[n, c, h, w] or one image [c, h, w], and kernels [o, c / groups, kh, kw]"
        )
    if not isinstance(groups, int):
        raise SpecError(f"adder2d: groups={groups!r}: it must be a whole number")
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


def _check_fit(x: Tensor, weight: Tensor, padding: _Edges, dilation: tuple[int, int]) -> None:
    for axis in (0, 1):
        window = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        size = x.shape[axis - 2] + sum(padding[axis])
        if window > size:
            raise ShapeError(
                f"adder2d: window of {window} pixels on a padded input of {size}: pad more, or use a smaller kernel"
            )
