"""GPU kernels as they are met on a machine with neither a GPU nor Triton: they can be imported, and say why not."""

import os
import subprocess
import sys

import pytest
import torch

from q_core.kernels import Kernel, Operator
from q_kernels import offers
from q_kernels.gpu import adder, fake, levels, views

NAMES = [
    "fake_quantize",
    "fake_quantize_grad",
    "fake_quantize_levels",
    "fake_quantize_levels_grad",
    "distance_conv2d",
    "distance_conv2d_input_grad",
]


def python(code: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300, check=False
    )


def test_modules_need_neither_triton_nor_numba_nor_a_driver() -> None:
    code = (
        "import sys; sys.modules['triton'] = sys.modules['numba'] = None\n"
        "from q_kernels.gpu import adder, fake, levels\n"
        "from q_kernels import offers\n"
        f"names = {NAMES}\n"
        "assert all([kernel.name.split('-')[0] for kernel in getattr(offers, name)] == ['gpu'] for name in names)\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("some kernels cannot be loaded") == 1
    assert "pip install 'q-kernels[cpu]'" in result.stderr


def test_what_is_compiled_says_that_triton_is_missing() -> None:
    result = python("import sys; sys.modules['triton'] = None; import q_kernels.gpu.jit.fake")
    assert result.returncode == 1
    assert "ImportError: q_kernels.gpu.jit needs Triton" in result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_kernels_of_both_kinds_are_offered(name: str) -> None:
    pytest.importorskip("numba")
    kernels = getattr(offers, name)
    assert all(isinstance(kernel, Kernel) for kernel in kernels)
    assert [kernel.name.split("-")[0] for kernel in kernels] == ["cpu", "gpu"]


def test_what_is_not_offered_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="it offers fake_quantize, "):
        offers.fake_quantise  # noqa: B018


def test_kernels_refuse_tensors_that_are_not_on_a_gpu() -> None:
    x, scale = torch.ones(2, 3), torch.ones(1, 1)
    table, widths = torch.tensor([[[0.0, 1.0, 2.0]]]), torch.ones(1, 1, 2)
    image, kernel = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
    calls = [
        (fake.fake_quantize, (x, scale, None, 0, 3, None)),
        (fake.fake_quantize_grad, (x, x, scale, None, 0, 3, None, True)),
        (levels.fake_quantize_levels, (x, table, widths)),
        (levels.fake_quantize_levels_grad, (x, x, table, widths, widths, True)),
        (adder.distance_conv2d, (image, kernel, [1, 1], [1, 1], 1, 1.0)),
        (adder.distance_conv2d_input_grad, (torch.ones(1, 3, 2, 2), image, kernel, [1, 1], [1, 1], 1, 1.0)),
    ]
    for kernels, arguments in calls:
        assert kernels[0].refuses(*arguments) == "it runs on an NVIDIA GPU, a tensor is on cpu"


def test_an_operator_explains_why_a_gpu_kernel_does_not_run() -> None:
    operator = Operator("q_test.fake_quantize", lambda *_: None)
    operator.offer(fake.fake_quantize)
    said = operator.explain(torch.ones(2, 3), torch.ones(1, 1), None, 0, 3, None)
    assert said.splitlines()[1] == "gpu-fused: it runs on an NVIDIA GPU, a tensor is on cpu"


def test_forms_that_a_kernel_cannot_do_are_named() -> None:
    x, scale = torch.ones(4, 6), torch.ones(4, 1)
    assert views.forms(x, (scale,), (4, 1)) is None
    assert "torch.float64" in str(views.forms(x.double(), (scale,), (4, 1)))
    assert "torch.bfloat16" in str(views.forms(x, (scale.bfloat16(),), (4, 1)))
    assert "torch.float64" in str(views.forms(x, (scale,), (4, 1), grads=(x.double(),)))
    assert "(6, 4) is not that" in str(views.forms(x, (scale,), (4, 1), grads=(x.T,)))
    assert "not torch.uint8" in str(views.forms(x, (scale,), (4, 1), mask=torch.ones(4, 6, dtype=torch.uint8)))
    assert "not a multiple of 3" in str(views.forms(x, (torch.ones(3, 1),), (3, 1)))
    apart = torch.ones(5, 1, 3)
    assert "do not lie together" in str(views.forms(torch.ones(5, 4, 6), (apart,), (5, 1, 3)))
    assert views.forms(torch.ones(0, 6), (torch.ones(1, 6),), (1, 6)) is None
    sizes = (1 << 31, 2)
    assert "31 bits" in str(views.rows_of(sizes, (2, 1), (1 << 31, 1)))


def test_levels_that_do_not_fit_in_registers_are_refused() -> None:
    x, table = torch.ones(2, 3), torch.arange(17.0).reshape(1, 1, 17)
    refuses = levels.fake_quantize_levels[0].refuses
    assert "2 to 16 levels" in str(refuses(x, table, torch.ones(1, 1, 16)))
    assert "not (1, 1, 16)" in str(refuses(x, table[..., :16], torch.ones(1, 1, 16)))


def test_adders_that_a_kernel_cannot_do_are_named() -> None:
    x, weight = torch.ones(1, 4, 5, 5), torch.ones(6, 2, 3, 3)
    grad = torch.ones(1, 6, 3, 3)
    assert adder.forms(x, weight, [1, 1], [1, 1], 2, 1.0, grad) is None
    assert "not 1.5" in str(adder.forms(x, weight, [1, 1], [1, 1], 2, 1.5))
    assert "torch.float64" in str(adder.forms(x.double(), weight, [1, 1], [1, 1], 2, 1.0))
    assert "in 1 groups" in str(adder.forms(x, weight, [1, 1], [1, 1], 1, 1.0))
    assert "do not fit" in str(adder.forms(x, weight, [1, 1], [3, 1], 2, 1.0))
    assert "not those of outputs of (1, 6, 2, 2)" in str(adder.forms(x, weight, [2, 2], [1, 1], 2, 1.0, grad))
    huge = torch.empty(1 << 12, 1 << 10, 32, 32, device="meta")
    small = torch.empty(4, 1 << 10, 1, 1, device="meta")
    assert "31 bits" in str(adder.forms(huge, small, [1, 1], [1, 1], 1, 1.0))
    many = torch.empty(1, 1 << 16, 1, 1, device="meta")
    assert "fewer than 65536 groups" in str(
        adder.forms(many, torch.empty(1 << 16, 1, 1, 1), [1, 1], [1, 1], 1 << 16, 1.0)
    )


VIEWS = [
    ((7, 9), (9, 1), (1, 1), (1, 63), (63, 1), False),
    ((6, 35), (35, 1), (6, 1), (6, 35), (35, 1), False),
    ((4, 6, 9, 9), (486, 81, 9, 1), (1, 6, 1, 1), (24, 81), (81, 1), False),
    ((4, 6, 9, 9), (486, 1, 54, 6), (1, 6, 1, 1), (6, 324), (1, 6), True),  # channels last
    ((40, 96), (96, 1), (40, 3), (120, 32), (32, 1), False),
    ((9, 3, 5), (15, 5, 1), (1, 3, 1), (15, 9), (1, 15), True),
]


@pytest.mark.parametrize(("size", "strides", "tiles", "matrix", "steps", "short"), VIEWS)
def test_rows_share_their_parameters(size, strides, tiles, matrix, steps, short) -> None:
    view = views.rows_of(size, strides, tiles)
    assert isinstance(view, views.Rows)
    assert (view.matrix, view.steps, view.short) == (matrix, steps, short)
    # The tile of every element, laid out in memory, is that of its row.
    numbers = torch.arange(float(torch.Size(tiles).numel())).reshape(tiles)
    spread = numbers
    for axis, length in enumerate(size):
        spread = spread.repeat_interleave(length // spread.shape[axis], axis)
    memory = view.read(spread.as_strided(size, spread.stride())).reshape(-1)
    where = torch.arange(matrix[0])[:, None] * steps[0] + torch.arange(matrix[1]) * steps[1]
    rows = view.spread(numbers)[0][torch.arange(matrix[0]) % view.period]
    torch.testing.assert_close(memory[where], rows[:, None].expand(matrix), rtol=0, atol=0)
    sums = memory[where].sum(1).reshape(1, 1, -1)
    expected = numbers.double() * (spread.numel() / numbers.numel())
    torch.testing.assert_close(view.gathered(sums)[..., 0], expected, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "strides", "tiles"), [case[:3] for case in VIEWS] + [((1 << 27,), (1,), (1,))])
@pytest.mark.parametrize("sums", [False, True])
def test_tiles_cover_the_matrix_without_idle_programs(size, strides, tiles, sums: bool) -> None:
    view = views.rows_of(size, strides, tiles)
    tile = views.tile(view, 1024, sums=sums)
    rows, columns = view.matrix
    assert tile.rows * tile.columns <= 1024
    assert (tile.blocks - 1) * tile.rows < rows <= tile.blocks * tile.rows
    each = tile.columns * tile.steps
    assert (tile.chunks - 1) * each < columns <= tile.chunks * each
    assert not sums or tile.chunks <= max(1, 2048 // tile.blocks)
