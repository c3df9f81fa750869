"""Adder layers on a GPU, run by Triton's interpreter against loops written from the equations."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from q_kernels.gpu import adder

from . import oracles
from .triton_needed import interpreted

pytest.importorskip("triton")
pytestmark = [
    interpreted,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, of infinities that are meant
]

DISTANCE, SLOPES = adder.distance_conv2d[0].run, adder.distance_conv2d_input_grad[0].run
HALF_ULP = 2.0**-24  # of float32, relative
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, so that an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Input, weight, stride, dilation, groups.
FORMS = [
    ((2, 3, 9, 8), (5, 3, 3, 3), [1, 1], [1, 1], 1),
    ((2, 4, 9, 8), (6, 2, 3, 2), [2, 1], [1, 2], 2),
    ((1, 4, 11, 7), (4, 1, 3, 3), [3, 2], [1, 1], 4),  # depthwise
    ((2, 5, 4, 4), (7, 5, 1, 1), [2, 2], [1, 1], 1),  # pixels that no window sees
    ((1, 2, 9, 9), (3, 2, 3, 3), [2, 2], [2, 2], 1),  # lattices that no window sees
    ((1, 37, 3, 3), (70, 37, 3, 3), [1, 1], [1, 1], 1),  # one position; outputs of two blocks
    ((3, 1, 7, 8), (1, 1, 2, 2), [1, 1], [1, 1], 1),  # positions of two blocks
]
IDS = [f"{x}-{w}-{s}-{d}-{g}" for x, w, s, d, g in FORMS]


def arguments(form: tuple) -> tuple[Tensor, Tensor, list[int], list[int], int]:
    x, weight, *rest = form
    return torch.randn(x) * 2, torch.randn(weight), *rest


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_distances_and_gradients_agree_with_float64(form: tuple) -> None:
    x, weight, *rest = arguments(form)
    y, exact = DISTANCE(x, weight, *rest, 1.0), oracles.distance(x.double(), weight.double(), *rest)
    # One rounding for each difference and one for each addition, relative to a sum of what has one sign.
    torch.testing.assert_close(y.double(), -exact, rtol=(2 + weight[0].numel()) * HALF_ULP, atol=0)
    grad = torch.randn(y.shape)
    found = SLOPES(grad, x, weight, *rest, 1.0)
    exact, _ = oracles.input_grad(grad.double(), x.double(), weight.double(), *rest)
    # Three roundings of the slope, of which one is relative to half of |x|, doubled; and for each addition one, of a
    # sum that is at most that of the gradients, each taken once with a slope up to 2 and once with 1.
    windows = weight[:, 0].numel() // rest[2]
    reach, _ = oracles.input_grad(grad.abs().double(), x.double() * 0, weight.double() * 0 + 1, *rest)
    atol = HALF_ULP * (2 + float(x.abs().max()) + 3 * (windows + 2)) * float(reach.max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)


def test_the_sign_of_an_exact_difference_is_right() -> None:
    """Sums of few small integers have no rounding, and pixels that meet their weights none of the slope."""
    x = torch.randint(-4, 5, (2, 3, 6, 6)).float()
    weight = torch.randint(-4, 5, (4, 3, 3, 3)).float()
    torch.testing.assert_close(
        DISTANCE(x, weight, [1, 1], [1, 1], 1, 1.0), -oracles.distance(x, weight, [1, 1], [1, 1], 1), **EXACT
    )
    grad = torch.randint(-2, 3, (2, 4, 4, 4)).float()
    found = SLOPES(grad, x, weight, [1, 1], [1, 1], 1, 1.0)
    torch.testing.assert_close(found, oracles.input_grad(grad, x, weight, [1, 1], [1, 1], 1)[0], **EXACT)


@pytest.mark.parametrize("form", FORMS[:2], ids=IDS[:2])
def test_half_precision_is_summed_in_float32(form: tuple) -> None:
    x, weight, *rest = arguments(form)
    x, weight = x.half(), weight.half()
    y = DISTANCE(x, weight, *rest, 1.0)
    wide = DISTANCE(x.float(), weight.float(), *rest, 1.0)
    torch.testing.assert_close(y, wide.half(), **EXACT)
    grad = torch.randn(y.shape).half()
    wide = SLOPES(grad.float(), x.float(), weight.float(), *rest, 1.0)
    torch.testing.assert_close(SLOPES(grad, x, weight, *rest, 1.0), wide.half(), **EXACT)


def test_layouts_of_tensors_do_not_matter() -> None:
    x, weight, *rest = arguments(FORMS[1])
    y = DISTANCE(x, weight, *rest, 1.0)
    grad = torch.randn(y.shape)
    plain = SLOPES(grad, x, weight, *rest, 1.0)
    for change in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        torch.testing.assert_close(DISTANCE(change(x), change(weight), *rest, 1.0), y, **EXACT)
        torch.testing.assert_close(SLOPES(change(grad), change(x), change(weight), *rest, 1.0), plain, **EXACT)


def test_nan_and_infinity_go_where_they_go_in_the_meaning() -> None:
    x, weight, *rest = arguments(FORMS[0])
    x[0, 1, 4, 4], x[1, 0, 0, 0] = torch.nan, torch.inf
    y = DISTANCE(x, weight, *rest, 1.0)
    expected = -oracles.distance(x, weight, *rest)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    grad = torch.randn(y.shape)
    found, expected = SLOPES(grad, x, weight, *rest, 1.0), oracles.input_grad(grad, x, weight, *rest)[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert bool(found[1, 0, 0, 0].isfinite())
    weight[3, 2, 1, 1] = torch.nan
    assert torch.equal(SLOPES(grad, x, weight, *rest, 1.0)[:, 2].isnan().all(), torch.tensor(True))


@pytest.mark.parametrize("images", [0, 2])
def test_no_images_and_no_outputs_work(images: int) -> None:
    x, weight = torch.randn(images, 3, 5, 5), torch.randn(0 if images else 4, 3, 3, 3)
    y = DISTANCE(x, weight, [1, 1], [1, 1], 1, 1.0)
    assert y.shape == (images, len(weight), 3, 3)
    found = SLOPES(torch.ones_like(y), x, weight, [1, 1], [1, 1], 1, 1.0)
    torch.testing.assert_close(found, torch.zeros_like(x), **EXACT)
