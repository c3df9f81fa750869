"""The kernels of adder layers on a CPU, against loops over windows and taps."""

import concurrent.futures
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from q_core.kernels import Kernel
from q_kernels.cpu import adder

from .oracles import distance, input_grad, output_size

FLOATS, SLOPES = adder.distance_conv2d[0], adder.distance_conv2d_input_grad[0]
SAD, POPCOUNT = adder.code_distance_conv2d
HALF_ULP = 2.0**-24  # of float32, relative


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution: shapes and geometry."""

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: list[int]
    dilation: list[int]
    groups: int

    @property
    def geometry(self) -> tuple[list[int], list[int], int]:
        return self.stride, self.dilation, self.groups

    def floats(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.x, generator=generator), torch.randn(self.weight, generator=generator)

    def codes(self, bits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, weight = (
            torch.randint(0, 1 << bits, s, dtype=torch.uint8, generator=generator) for s in (self.x, self.weight)
        )
        return x, weight

    def incoming(self, seed: int = 0) -> Tensor:
        shape = output_size(torch.empty(self.x), torch.empty(self.weight), self.stride, self.dilation)
        return torch.randn(self.x[0], self.weight[0], *shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def cases(draw: st.DrawFn, channels: int = 12, outputs: int = 11) -> Case:
    """Odd sizes, with fewer positions than a panel has, or some more, and outputs that no tile divides."""
    pair = st.lists(st.integers(1, 3), min_size=2, max_size=2)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
    size = [draw(st.integers(dilation[a] * (kernel[a] - 1) + 1, 19)) for a in (0, 1)]
    inner = draw(st.integers(1, channels))
    outer = draw(st.integers(1, outputs))
    images = draw(st.integers(1, 3))
    return Case((images, inner * groups, *size), (outer * groups, inner, *kernel), stride, dilation, groups)


PLAIN = Case((2, 5, 9, 8), (6, 5, 3, 3), [1, 1], [1, 1], 1)
LARGE = Case((4, 16, 32, 32), (32, 16, 3, 3), [1, 1], [1, 1], 1)  # enough work for several threads
FORMS = [
    PLAIN,
    Case((2, 3, 11, 13), (4, 3, 3, 2), [2, 1], [1, 1], 1),
    Case((1, 4, 17, 12), (7, 4, 3, 3), [3, 2], [2, 1], 1),
    Case((3, 6, 8, 8), (9, 2, 2, 2), [1, 1], [1, 1], 3),
    Case((2, 5, 9, 7), (5, 1, 3, 3), [1, 1], [1, 1], 5),  # every channel for itself
    Case((2, 7, 9, 6), (8, 7, 1, 1), [1, 1], [1, 1], 1),
    Case((2, 7, 9, 6), (8, 7, 1, 1), [2, 3], [1, 1], 1),
    Case((1, 1, 1, 1), (1, 1, 1, 1), [1, 1], [1, 1], 1),
    Case((1, 3, 5, 40), (2, 3, 1, 7), [1, 4], [1, 5], 1),
]


def check_codes(kernel: Kernel, case: Case, x: Tensor, weight: Tensor, bits: int) -> None:
    y = kernel.run(x, weight, *case.geometry, bits)
    torch.testing.assert_close(y, distance(x.long(), weight.long(), *case.geometry).int(), rtol=0, atol=0)


def check_floats(case: Case, x: Tensor, weight: Tensor) -> None:
    y = FLOATS.run(x, weight, *case.geometry, 1.0)
    assert y.dtype == x.dtype
    # One rounding of every difference, and one of the sum at every tap; all terms have one sign, so nothing cancels.
    rounding = (
        weight[0].numel() * HALF_ULP + {torch.float32: 0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[x.dtype]
    )
    torch.testing.assert_close(
        y.double(), -distance(x.double(), weight.double(), *case.geometry), rtol=1.01 * rounding, atol=0
    )


def check_slopes(case: Case, grad: Tensor, x: Tensor, weight: Tensor) -> None:
    result = SLOPES.run(grad, x, weight, *case.geometry, 1.0)
    assert result.dtype == x.dtype
    assert result.shape == x.shape
    exact, size = input_grad(grad.double(), x.double(), weight.double(), *case.geometry)
    error = (result.double() - exact) / size.clamp_min(1e-30)
    # One rounding of the slope, one of the product where it is not fused, one of the sum at every tap.
    terms = weight.shape[0] // case.groups * weight[0, 0].numel()
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=(terms + 2) * HALF_ULP)


@given(cases(), st.integers(1, 8), st.integers(0, 99))
def test_codes_are_summed_exactly(case: Case, bits: int, seed: int) -> None:
    x, weight = case.codes(bits, seed)
    for kernel in (SAD, POPCOUNT):
        if kernel.refuses(x, weight, *case.geometry, bits) is None:
            check_codes(kernel, case, x, weight, bits)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 16, 31, 63, 64, 65, 70])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 8])
def test_words_that_channels_fill_in_part_are_exact(channels: int, bits: int) -> None:
    case = Case((1, channels, 5, 6), (5, channels, 2, 3), [1, 1], [1, 1], 1)
    x, weight = case.codes(bits)
    for kernel in (SAD, POPCOUNT) if bits < 7 else (SAD,):
        check_codes(kernel, case, x, weight, bits)


def test_largest_differences_of_bytes_are_exact() -> None:
    case = Case((1, 70, 9, 9), (6, 70, 3, 3), [1, 1], [1, 1], 1)
    x, weight = torch.full(case.x, 255, dtype=torch.uint8), torch.zeros(case.weight, dtype=torch.uint8)
    check_codes(SAD, case, x, weight, 8)
    check_codes(SAD, case, torch.zeros_like(x), torch.full_like(weight, 255), 8)


@given(cases(), st.integers(0, 99))
def test_distances_of_floats_agree_with_float64(case: Case, seed: int) -> None:
    check_floats(case, *case.floats(seed))


@given(cases(), st.integers(0, 99))
def test_gradients_agree_with_the_formula_in_float64(case: Case, seed: int) -> None:
    check_slopes(case, case.incoming(seed), *case.floats(seed))


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_every_form_of_convolution_agrees(case: Case) -> None:
    x, weight = case.floats()
    check_floats(case, x, weight)
    check_slopes(case, case.incoming(), x, weight)
    for bits, kernel in [(8, SAD), (2, POPCOUNT), (2, SAD)]:
        check_codes(kernel, case, *case.codes(bits), bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FORMS[:3], ids=str)
def test_half_precision_sums_in_float32(dtype: torch.dtype, case: Case) -> None:
    x, weight = (tensor.to(dtype) for tensor in case.floats())
    check_floats(case, x, weight)
    grad = case.incoming().to(dtype)
    wide = SLOPES.run(grad.float(), x.float(), weight.float(), *case.geometry, 1.0)
    torch.testing.assert_close(SLOPES.run(grad, x, weight, *case.geometry, 1.0), wide.to(dtype), rtol=0, atol=0)


def test_slope_is_hardtanh_at_its_corners() -> None:
    case = Case((1, 1, 1, 13), (1, 1, 1, 1), [1, 1], [1, 1], 1)
    x = torch.linspace(-1.5, 1.5, 13).reshape(case.x)  # multiples of a quarter, so nothing rounds
    grad = torch.ones(case.x)
    result = SLOPES.run(grad, x, torch.zeros(case.weight), *case.geometry, 1.0)
    torch.testing.assert_close(result, (-x).clamp(-1, 1), rtol=0, atol=0)


@pytest.mark.parametrize("case", FORMS[:5], ids=str)
def test_numbers_that_are_none_reach_every_window_that_sees_them(case: Case) -> None:
    x, weight = case.floats()
    x[0, 0, 4, 5] = torch.nan
    y = FLOATS.run(x, weight, *case.geometry, 1.0)
    assert torch.equal(y.isnan(), distance(x, weight, *case.geometry).isnan())
    result = SLOPES.run(case.incoming(), x, weight, *case.geometry, 1.0)
    assert result.isnan().sum() == 1
    assert result[0, 0, 4, 5].isnan()
    x, grad = case.floats()[0], case.incoming()
    grad[0, 1, 1, 1] = torch.nan
    result = SLOPES.run(grad, x, weight, *case.geometry, 1.0)
    assert torch.equal(result.isnan(), input_grad(grad, x, weight, *case.geometry)[0].isnan())
    weight[1, 0, 0, 0] = torch.nan
    assert FLOATS.run(x, weight, *case.geometry, 1.0)[:, 1].isnan().all()


def test_infinite_inputs_have_slopes_of_one() -> None:
    x, weight = PLAIN.floats()
    x[0, 0, 4, 4], x[1, 2, 4, 4] = torch.inf, -torch.inf
    assert torch.equal(
        FLOATS.run(x, weight, *PLAIN.geometry, 1.0).isinf(), distance(x, weight, *PLAIN.geometry).isinf()
    )
    far = x.nan_to_num(posinf=1e6, neginf=-1e6)
    grad = PLAIN.incoming()
    results = [SLOPES.run(grad, source, weight, *PLAIN.geometry, 1.0) for source in (x, far)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_layout_of_inputs_does_not_matter(case: Case) -> None:
    x, weight = case.floats()
    grad = case.incoming()
    layouts = [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].reshape(t.shape),  # off the boundary of a vector
    ]
    codes = case.codes(8)
    for layout in layouts:
        for kernel, arguments in [
            (FLOATS, (x, weight)),
            (SLOPES, (grad, x, weight)),
            (SAD, codes),
            (POPCOUNT, [c & 1 for c in codes]),
        ]:
            last = 1.0 if kernel in (FLOATS, SLOPES) else 1
            expected = kernel.run(*arguments, *case.geometry, last)
            result = kernel.run(*map(layout, arguments), *case.geometry, last)
            assert result.is_contiguous()
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_inputs_that_require_gradients_or_are_expanded_work() -> None:
    x, weight = PLAIN.floats()
    row = x[:1, :1].expand(2, 5, 9, 8)
    expected = FLOATS.run(row.contiguous(), weight, *PLAIN.geometry, 1.0)
    result = FLOATS.run(row.requires_grad_(), weight.clone().requires_grad_(), *PLAIN.geometry, 1.0)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_inputs_are_left_as_they_are() -> None:
    x, weight = PLAIN.floats()
    grad, codes = PLAIN.incoming(), PLAIN.codes(3)
    before = [tensor.clone() for tensor in (x, weight, grad, *codes)]
    result = SLOPES.run(grad, x, weight, *PLAIN.geometry, 1.0)
    y = FLOATS.run(x, weight, *PLAIN.geometry, 1.0)
    for kernel in (SAD, POPCOUNT):
        kernel.run(*codes, *PLAIN.geometry, 3)
    y.zero_()
    result.zero_()  # nor do results share their memory
    torch.testing.assert_close([x, weight, grad, *codes], before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "case",
    [
        Case((0, 3, 6, 6), (4, 3, 3, 3), [1, 1], [1, 1], 1),
        Case((2, 3, 6, 6), (0, 3, 3, 3), [1, 1], [1, 1], 1),
        Case((2, 0, 6, 6), (4, 0, 3, 3), [1, 1], [1, 1], 1),
        Case((0, 4, 7, 7), (4, 2, 1, 1), [2, 2], [1, 1], 2),
    ],
    ids=["no images", "no outputs", "no channels", "no images, groups"],
)
def test_empty_tensors_work(case: Case) -> None:
    x, weight = case.floats()
    grad = case.incoming()
    torch.testing.assert_close(FLOATS.run(x, weight, *case.geometry, 1.0), torch.zeros(grad.shape), rtol=0, atol=0)
    torch.testing.assert_close(SLOPES.run(grad, x, weight, *case.geometry, 1.0), torch.zeros(case.x), rtol=0, atol=0)
    for kernel in (SAD, POPCOUNT):
        arguments = (*case.codes(2), *case.geometry, 2)
        assert kernel.refuses(*arguments) is None
        assert kernel.rate(*arguments) >= 0
        zeros = torch.zeros(grad.shape, dtype=torch.int32)
        torch.testing.assert_close(kernel.run(*arguments), zeros, rtol=0, atol=0)


def everything(case: Case, seed: int = 0) -> list[Tensor]:
    """What each kernel makes of the case."""
    x, weight = case.floats(seed)
    codes = case.codes(2, seed)
    return [
        FLOATS.run(x, weight, *case.geometry, 1.0),
        SLOPES.run(case.incoming(seed), x, weight, *case.geometry, 1.0),
        *(kernel.run(*codes, *case.geometry, 2) for kernel in (SAD, POPCOUNT)),
    ]


def test_number_of_threads_does_not_change_a_bit() -> None:
    alone = everything(LARGE)
    torch.set_num_threads(3)
    try:
        together = everything(LARGE)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    alone = [everything(FORMS[index % 3], index) for index in range(12)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda index: everything(FORMS[index % 3], index), range(12)))
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


FORK = """
import os, torch
from q_kernels.cpu import adder
torch.set_num_threads(2)
x, weight = torch.randn(4, 16, 32, 32), torch.randn(32, 16, 3, 3)
run = lambda: adder.distance_conv2d[0].run(x, weight, [1, 1], [1, 1], 1, 1.0)
before = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), before) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_computes() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", FORK], env=environment, timeout=120, check=False).returncode == 0


def test_kernels_refuse_what_they_cannot_do() -> None:
    x, weight = PLAIN.floats()
    grad, geometry = PLAIN.incoming(), PLAIN.geometry
    assert "torch.float64" in str(FLOATS.refuses(x.double(), weight.double(), *geometry, 1.0))
    assert "1.5" in str(FLOATS.refuses(x, weight, *geometry, 1.5))
    assert "meta" in str(FLOATS.refuses(x.to("meta"), weight, *geometry, 1.0))
    assert "torch.float64" in str(SLOPES.refuses(grad, x.double(), weight, *geometry, 1.0))
    weight[0, 0, 0, 0] = torch.inf
    assert "finite" in str(SLOPES.refuses(grad, x, weight, *geometry, 1.0))
    assert FLOATS.refuses(x, weight, *geometry, 1.0) is None
    codes = PLAIN.codes(7)
    assert "127 places" in str(POPCOUNT.refuses(*codes, *geometry, 7))
    assert "torch.int32" in str(SAD.refuses(codes[0].int(), codes[1], *geometry, 7))
    assert SAD.refuses(*codes, *geometry, 7) is None
    assert "(2, 5, 9, 8), (6, 5, 3, 3) do not fit in 2 groups" in str(FLOATS.refuses(x, weight, [1, 1], [1, 1], 2, 1.0))
    assert "do not fit" in str(SAD.refuses(codes[0][:, :, :2], codes[1], *geometry, 7))
    assert "(2, 6, 6, 6) do not fit" in str(SLOPES.refuses(grad[:, :, 1:], x, weight.nan_to_num(), *geometry, 1.0))
    wide = torch.zeros(1, dtype=torch.uint8).expand(1, 1 << 24, 1, 1)
    assert "4278190080" in str(SAD.refuses(wide, wide, [1, 1], [1, 1], 1, 8))


@pytest.mark.parametrize(("bits", "fastest"), [(1, POPCOUNT), (2, POPCOUNT), (4, SAD), (6, SAD), (8, SAD)])
def test_few_bits_are_counted_and_many_are_subtracted(bits: int, fastest: Kernel) -> None:
    arguments = (*LARGE.codes(bits), *LARGE.geometry, bits)
    able = [kernel for kernel in (SAD, POPCOUNT) if kernel.refuses(*arguments) is None]
    assert max(able, key=lambda kernel: kernel.rate(*arguments)) is fastest
