"""The kernels of rounding borders on a CPU, against their formulas in float64.

u = clip(x / s, qmin - z0, qmax - z0), v = (u - low) / (high - low), z = b0 + b1 v + b2 v^2
B = clip(1/2 + 5/2 (sigmoid(z) - 1/2), 0, 1 - 2^-20), of a channel: clip(mean of w B, 0, 1 - 2^-20)
Q = s (u + a (floor(u) + [u - floor(u) > B] - u)), Y = W * Q over windows

With G the gradient of Q it is G to x inside the range, G (Q / s - u [inside]) to s, -a s G to B.
"""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from q_kernels.cpu import border

CONV, CONV_GRAD = border.border_conv2d[0], border.border_conv2d_grad[0]
PLAIN, PLAIN_GRAD = border.border_quantize[0], border.border_quantize_grad[0]
LARGEST = 1 - 2.0**-20


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution of quantized patches of a padded input."""

    x: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    zero: float = 0.0
    qmin: int = 0
    influence: float = 1.0
    fused: bool = False
    terms: int = 3
    bias: bool = True

    @property
    def geometry(self) -> list[int]:
        return [*self.stride, *self.dilation, self.groups]

    @property
    def codes(self) -> list[float]:
        ends = [float(self.qmin), float(self.qmin + 7)]
        return [*ends, ends[0] - self.zero, ends[1] - self.zero]

    def arguments(self, seed: int = 0) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        taps = math.prod(self.kernel)
        x, weight, coefficients, fusion, bias = (
            torch.randn(shape, generator=generator)
            for shape in (
                self.x,
                (self.outputs, self.x[1] // self.groups, *self.kernel),
                (self.terms, self.x[1], taps),
                (self.x[1], taps),
                (self.outputs,),
            )
        )
        grid = torch.tensor([0.37, self.zero, self.influence])
        border = 0.6 * coefficients, 1 + fusion / 3 if self.fused else None
        return [x, weight, bias if self.bias else None, grid, *border, self.codes, self.geometry]

    def incoming(self, seed: int = 0) -> Tensor:
        size = [(self.x[2 + a] - self.dilation[a] * (self.kernel[a] - 1) - 1) // self.stride[a] + 1 for a in (0, 1)]
        return torch.randn(self.x[0], self.outputs, *size, generator=torch.Generator().manual_seed(seed + 1))


CASES = [
    Case((2, 5, 9, 8), 6),
    Case((2, 5, 9, 8), 6, fused=True),
    Case((3, 3, 11, 13), 4, (3, 2), (2, 1), zero=3.0, influence=0.5),
    Case((1, 4, 17, 12), 7, (3, 3), (3, 2), (2, 1), influence=0.3, fused=True, qmin=-4),
    Case((3, 6, 8, 8), 9, (2, 2), groups=3, influence=0.0, terms=2),
    Case((2, 5, 9, 7), 5, groups=5, influence=0.8, terms=1, bias=False),
    Case((2, 7, 9, 6), 8, (1, 1), (2, 3), influence=0.4, zero=7.0),
    Case((1, 1, 1, 1), 1, (1, 1), fused=True),
    Case((9, 3, 5, 40), 35, (1, 7), (1, 4), (1, 5), fused=True, bias=False),
    Case((17, 2, 10, 10), 70, influence=0.6),
]
every = pytest.mark.parametrize("case", CASES, ids=str)
LARGE = Case((9, 16, 20, 20), 32, influence=0.7, fused=True)  # enough work for several threads


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
    size = [draw(st.integers(dilation[a] * (kernel[a] - 1) + 1, 19)) for a in (0, 1)]
    qmin = draw(st.sampled_from([0, -4, -7]))
    return Case(
        (draw(st.integers(1, 6)), groups * draw(st.integers(1, 5)), size[0], size[1]),
        groups * draw(st.integers(1, 40)),
        kernel,
        stride,
        dilation,
        groups,
        zero=draw(st.sampled_from([0.0, float(qmin), float(qmin + 3)])),
        qmin=qmin,
        influence=draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        fused=draw(st.booleans()),
        terms=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
    )


@dataclasses.dataclass
class Exact:
    """Quantized elements [n, c, k, l] in float64, and what their gradient needs."""

    value: Tensor
    u: Tensor
    inside: Tensor
    v: Tensor
    sigmoid: Tensor
    single: Tensor
    mean: Tensor | None
    near: Tensor


def quantized(x: Tensor, grid: Tensor, coefficients: Tensor, fusion: Tensor | None, codes: list[float]) -> Exact:
    scale, zero, influence = grid.double()
    # The coordinate is rounded to float32 by definition, not by the kernel.
    real = (x / grid[0]).double()
    u = real.clamp(codes[0] - zero, codes[1] - zero)
    v = (u - codes[2]) / (codes[3] - codes[2])
    z = sum(b.double().unsqueeze(-1) * v**power for power, b in enumerate(coefficients))
    sigmoid = torch.sigmoid(z)
    single = 0.5 + 2.5 * (sigmoid - 0.5)
    own, mean = single.clamp(0, LARGEST), None
    if fusion is not None:
        mean = (own * fusion.double().unsqueeze(-1)).mean(2, keepdim=True)
        own = mean.clamp(0, LARGEST)
    up = u - u.floor() > own
    value = scale * (u + influence * (u.floor() + up - u))
    near = ((u - u.floor() - own).abs() < 3e-6) & (u != u.floor())  # float32 may decide otherwise
    return Exact(value, u, real == u, v, sigmoid, single, mean, near)


def gradients(
    grad: Tensor, found: Exact, grid: Tensor, coefficients: Tensor, fusion: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of elements, scale, coefficients and fusion weights."""
    scale, _, influence = grid.double()
    to_border, to_fusion = -influence * scale * grad, grad.new_zeros(0)
    if fusion is not None:
        within = (found.mean >= 0) & (found.mean <= LARGEST)
        shared = to_border.sum(2, keepdim=True) * within / grad.shape[2]
        to_fusion = (shared * found.single.clamp(0, LARGEST)).sum((0, 3))
        to_border = shared * fusion.double().unsqueeze(-1)
    within = (found.single >= 0) & (found.single <= LARGEST)
    to_z = to_border * 2.5 * found.sigmoid * (1 - found.sigmoid) * within
    to_coefficients = torch.stack([(to_z * found.v**power).sum((0, 3)) for power in range(len(coefficients))])
    to_scale = (grad * (found.value / scale - found.u * found.inside)).sum().reshape(1)
    return grad * found.inside, to_scale, to_coefficients, to_fusion


def windows(x: Tensor, case: Case) -> list[Tensor]:
    """What every tap sees: views [n, c, rows, columns] of the input."""
    rows, columns = case.incoming().shape[2:]
    return [
        x[
            :,
            :,
            a * case.dilation[0] : a * case.dilation[0] + (rows - 1) * case.stride[0] + 1 : case.stride[0],
            b * case.dilation[1] : b * case.dilation[1] + (columns - 1) * case.stride[1] + 1 : case.stride[1],
        ]
        for a, b in itertools.product(range(case.kernel[0]), range(case.kernel[1]))
    ]


def patches(x: Tensor, case: Case) -> Tensor:
    return torch.stack([window.flatten(2) for window in windows(x, case)], 2)


def split(weight: Tensor, groups: int) -> Tensor:
    """Weights [groups, outputs, channels, taps]."""
    return weight.double().reshape(groups, len(weight) // groups, weight.shape[1], -1)


def in_groups(values: Tensor, groups: int) -> Tensor:
    return values.reshape(len(values), groups, -1, *values.shape[2:])


def clear(case: Case, seed: int) -> list[Any]:
    """Arguments without an element so near to its border that float32 and float64 may decide differently."""
    for attempt in range(20):
        arguments = case.arguments(seed + 100 * attempt)
        x, _, _, *rest, codes, _ = arguments
        if not quantized(patches(x, case), *rest, codes).near.any():
            return arguments
    raise AssertionError("no case is clear")


def close(actual: Tensor, expected: Tensor, size: Tensor, terms: float) -> None:
    """Compare sums with as many rounding errors of float32 as they have terms, for terms of that total size."""
    error = (actual.double() - expected) / size.clamp_min(1e-30)
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=(terms + 24) * 2.0**-24)


def check(case: Case, seed: int = 0) -> None:
    arguments = clear(case, seed)
    x, weight, bias, grid, coefficients, fusion, codes, _ = arguments
    found = quantized(patches(x, case), grid, coefficients, fusion, codes)
    kernels, values = split(weight, case.groups), in_groups(found.value, case.groups)
    grad = case.incoming(seed)

    assert CONV.refuses(*arguments) is None
    y = CONV.run(*arguments)
    shift = torch.zeros(case.outputs, 1, 1) if bias is None else bias.reshape(-1, 1, 1)
    exact, size = (
        torch.einsum("gock,ngckl->ngol", w, v).reshape(grad.shape) + b
        for w, v, b in ((kernels, values, shift), (kernels.abs(), values.abs(), shift.abs()))
    )
    terms = math.prod(weight.shape[1:])
    close(y, exact, size, terms)

    incoming = in_groups(grad.double().flatten(2), case.groups)
    inner = (grad, x, weight, grid, coefficients, fusion, codes, case.geometry)
    assert CONV_GRAD.refuses(*inner) is None
    to_x, to_weight, to_scale, to_coefficients, to_fusion = CONV_GRAD.run(*inner)
    positions = grad.shape[0] * grad.shape[2] * grad.shape[3]
    exact, size = (
        torch.einsum("ngol,ngckl->gock", i, v).reshape(weight.shape)
        for i, v in ((incoming, values), (incoming.abs(), values.abs()))
    )
    close(to_weight, exact, size, positions)
    to_patches, size = (
        torch.einsum("gock,ngol->ngckl", w, i).reshape(found.value.shape)
        for w, i in ((kernels, incoming), (kernels.abs(), incoming.abs()))
    )
    exact = gradients(to_patches, found, grid, coefficients, fusion)
    sizes = bounds(size, found, grid, coefficients, fusion)
    folded, total = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
    for goal, source in ((folded, exact[0]), (total, sizes[0])):
        for tap, window in enumerate(windows(goal, case)):
            window += source[:, :, tap].reshape(window.shape)
    outputs = case.outputs // case.groups
    close(to_x, folded, total, outputs + math.prod(case.kernel))
    for actual, wanted, bound in zip((to_scale, to_coefficients, to_fusion), exact[1:], sizes[1:], strict=True):
        assert actual.is_contiguous()
        close(actual, wanted, bound, outputs + positions)


def bounds(
    size: Tensor, found: Exact, grid: Tensor, coefficients: Tensor, fusion: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of the magnitudes of all terms. A residual or a slope has an error of its own, that of terms up to 1."""
    scale, _, influence = grid.double()
    largest = max(1.0, float(found.u.abs().max()))
    to_border, to_fusion = influence * scale * size, size.new_zeros(0)
    if fusion is not None:
        shared = to_border.sum(2, keepdim=True) / size.shape[2]
        to_fusion = (shared * torch.ones_like(size)).sum((0, 3))
        to_border = shared * fusion.double().abs().unsqueeze(-1)
    # Powers of v are made of powers of u, and a polynomial of v likewise.
    powers = [(to_border.sum((0, 3))) * 9.0**power for power in range(len(coefficients))]
    return size, (size * largest).sum().reshape(1), torch.stack(powers), to_fusion


@every
def test_every_form_of_convolution_agrees_with_the_formulas(case: Case) -> None:
    check(case)


@given(cases(), st.integers(0, 99))
def test_any_convolution_agrees_with_the_formulas(case: Case, seed: int) -> None:
    check(case, seed)


@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (3, 4, 65), (1, 1, 1), (2, 5), (5, 2, 4, 4, 9)])
@pytest.mark.parametrize("influence", [0.0, 0.3, 0.5, 1.0])
def test_elements_agree_with_the_formulas(shape: tuple[int, ...], influence: float) -> None:
    x, grad = torch.randn(shape), torch.randn(shape)
    grid, coefficients = torch.tensor([0.37, 2.0, influence]), 0.6 * torch.randn(3, shape[1])
    codes = [0.0, 7.0, -2.0, 5.0]
    arguments = x, grid, coefficients, codes
    assert PLAIN.refuses(*arguments) is None
    found = quantized(x.reshape(*shape[:2], 1, -1), grid, coefficients.unsqueeze(2), None, codes)
    assert not found.near.any()
    # A rounding of the step, the sum and the product.
    torch.testing.assert_close(PLAIN.run(*arguments).double(), found.value.reshape(shape), rtol=3e-7, atol=3e-7)
    incoming = grad.double().reshape(found.value.shape)
    assert PLAIN_GRAD.refuses(grad, *arguments) is None
    to_x, to_scale, to_coefficients = PLAIN_GRAD.run(grad, *arguments)
    exact = gradients(incoming, found, grid, coefficients.unsqueeze(2), None)
    sizes = bounds(incoming.abs(), found, grid, coefficients.unsqueeze(2), None)
    torch.testing.assert_close(to_x.double(), exact[0].reshape(shape), rtol=0, atol=0)
    terms = x.numel() / x.shape[1]
    close(to_scale, exact[1], sizes[1], terms)
    close(to_coefficients, exact[2].squeeze(2), sizes[2].squeeze(2), terms)


def test_border_agrees_with_the_sigmoid_everywhere() -> None:
    # One element for every z; the codes tell on which side of the fraction its border is.
    z = torch.linspace(-3, 3, 4001)
    exact = (0.5 + 2.5 * (torch.sigmoid(z.double()) - 0.5)).clamp(0, LARGEST)
    for shift, up in ((-1e-6, 0.0), (1e-6, 1.0)):
        fraction = (exact + shift).float()
        real = (fraction > 0) & (fraction < 1)
        x = fraction.clamp(1e-9, 1 - 6e-8).reshape(1, -1, 1)
        y = PLAIN.run(x, torch.tensor([1.0, 0.0, 1.0]), z.reshape(1, -1), [0.0, 7.0, 0.0, 7.0])
        torch.testing.assert_close(y.flatten()[real], torch.full_like(z, up)[real], rtol=0, atol=0)


@pytest.mark.parametrize("value", [-50.0, -0.8472979, 0.0, 0.8472979, 50.0])
@pytest.mark.parametrize("low", [-128.0, -8.0, 0.0])
def test_levels_stay_where_they_are(value: float, low: float) -> None:
    levels = torch.arange(low, low + 16).reshape(1, 1, -1)
    grid = torch.tensor([1.0, 0.0, 1.0])
    y = PLAIN.run(levels, grid, torch.full((1, 1), value), [low, low + 15, low, low + 15])
    torch.testing.assert_close(y, levels, rtol=0, atol=0)


@every
def test_layout_of_inputs_does_not_matter(case: Case) -> None:
    arguments, grad = case.arguments(), case.incoming()
    inner = [grad, *arguments[:2], *arguments[3:]]
    expected = CONV.run(*arguments), *CONV_GRAD.run(*inner)
    for layout in (
        lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t,
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].reshape(t.shape),  # off the boundary of a vector
    ):
        changed = [layout(part) if isinstance(part, Tensor) else part for part in arguments]
        found = CONV.run(*changed), *CONV_GRAD.run(layout(grad), *changed[:2], *changed[3:])
        assert all(tensor.is_contiguous() for tensor in found)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every
def test_inputs_are_left_as_they_are(case: Case) -> None:
    arguments, grad = case.arguments(), case.incoming()
    before = [part.clone() for part in (*arguments, grad) if isinstance(part, Tensor)]
    results = CONV.run(*arguments), *CONV_GRAD.run(grad, *arguments[:2], *arguments[3:])
    for result in results:
        result.zero_()  # nor do results share their memory
    after = [part for part in (*arguments, grad) if isinstance(part, Tensor)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@every
def test_inputs_that_are_no_numbers_reach_every_window_that_sees_them(case: Case) -> None:
    arguments = case.arguments()
    arguments[0][0, 0, 0, 0] = torch.nan
    x, _, _, *rest, codes, _ = arguments
    values = in_groups(quantized(patches(x, case), *rest, codes).value, case.groups)
    expected = torch.einsum("gock,ngckl->ngol", split(arguments[1], case.groups), values).reshape(case.incoming().shape)
    assert torch.equal(CONV.run(*arguments).isnan(), expected.isnan())
    assert "finite" in str(CONV_GRAD.refuses(case.incoming(), *arguments[:2], *arguments[3:]))


def everything(case: Case, seed: int = 0) -> list[Tensor]:
    x, weight, *rest = case.arguments(seed)
    plain = x, rest[1], rest[2][:, :, 0], case.codes
    return [
        CONV.run(x, weight, *rest),
        *CONV_GRAD.run(case.incoming(seed), x, weight, *rest[1:]),
        PLAIN.run(*plain),
        *PLAIN_GRAD.run(x, *plain),
    ]


def test_number_of_threads_does_not_change_a_bit() -> None:
    alone = everything(LARGE)
    torch.set_num_threads(3)
    try:
        together = everything(LARGE)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_kernels_refuse_what_they_cannot_do() -> None:
    arguments = CASES[0].arguments()
    x, weight, bias, grid, coefficients, _, codes, geometry = arguments
    grad = CASES[0].incoming()

    def reason(**changes: Any) -> str:
        names = ("x", "weight", "bias", "grid", "coefficients", "fusion", "codes", "geometry")
        return str(CONV.refuses(*(changes.get(name, value) for name, value in zip(names, arguments, strict=True))))

    assert "torch.float64" in reason(x=x.double())
    assert "meta" in reason(weight=weight.to("meta"))
    assert "no elements" in reason(x=x[:0])
    assert "degree 3" in reason(coefficients=torch.zeros(4, 5, 9))
    assert "far from 0" in reason(codes=[0.0, 7.0, 90.0, 97.0])
    assert "numbers" in reason(coefficients=coefficients * torch.nan)
    assert "numbers" in reason(fusion=torch.full((5, 9), torch.inf))
    assert "do not fit in 2 groups" in reason(geometry=[1, 1, 1, 1, 2])
    assert "do not fit" in reason(coefficients=coefficients[:, 1:])
    assert "do not fit" in reason(fusion=torch.ones(5, 8))
    assert "do not fit" in reason(bias=bias[1:])
    assert "do not fit" in reason(grid=grid[:2])
    assert "do not fit" in reason(x=x[:, :, :2])
    inner = (x, weight, grid, coefficients, None, codes, geometry)
    assert "does not fit the output" in str(CONV_GRAD.refuses(grad[:, :, 1:], *inner))
    assert "finite" in str(CONV_GRAD.refuses(grad, x, weight / 0, *inner[2:]))
    plain = (x, grid, coefficients[:, :, 0], codes)
    assert "do not fit" in str(PLAIN.refuses(x[:, 1:], *plain[1:]))
    assert "torch.bfloat16" in str(PLAIN.refuses(x.bfloat16(), *plain[1:]))
    assert "does not fit an input" in str(PLAIN_GRAD.refuses(grad, *plain))
    assert all(kernel.rate() > 0 for kernel in (CONV, CONV_GRAD, PLAIN, PLAIN_GRAD))
