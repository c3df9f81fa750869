"""Fake quantization in one step is the composition of its parts, in value, in gradient and to whoever looks inside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from q_core import (
    NearestEven,
    NearestTowardZero,
    Rounding,
    ShapeError,
    UniformGrid,
    dequantize,
    functional,
    ops,
    quantize,
    round_ste,
)
from q_core.functional import middles
from q_core.kernels import Kernel, Operator, only
from q_core.ops import fake_quantize, fake_quantize_levels

EXACT = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def meaning():
    """Kernels of other packages have tests of their own."""
    with only("reference"):
        yield


def composition(x, scale, zero_point=None, *, qmin, qmax, where=None):
    """What fake quantization means."""
    levels = dequantize(quantize(x, scale, zero_point, qmin=qmin, qmax=qmax), scale, zero_point)
    return levels if where is None else torch.where(where, levels, x)


@st.composite
def cases(draw):
    """Any granularity, sign, zero point and mask; reals beyond both ends, on ties and on the ends."""
    tiles = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shape = [count * draw(st.integers(1, 4)) for count in tiles]
    tiles = [1] if draw(st.booleans()) else tiles
    bits = draw(st.integers(1, 8))
    qmin = draw(st.sampled_from([0, -(2 ** (bits - 1)), -(2 ** (bits - 1)) + (bits > 1)]))
    qmax = (2**bits - 1) if qmin == 0 else 2 ** (bits - 1) - (bits > 1)
    generator = torch.Generator().manual_seed(draw(seeds))
    scale = torch.rand(tiles, generator=generator, dtype=torch.float64) + 0.05
    zero = torch.randint(qmin, qmax + 1, tiles, generator=generator).double() if draw(st.booleans()) else None
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * (qmax - qmin) / 3
    if draw(st.booleans()):
        # Scales that are powers of two, so that halves of them lie exactly on ties, levels and ends.
        scale = torch.exp2(torch.randint(-3, 4, tiles, generator=generator)).double()
        x = torch.randint(2 * (qmin - qmax) - 3, 2 * (qmax - qmin) + 4, shape, generator=generator) * 0.125
    where = torch.rand(shape, generator=generator) < 0.5 if draw(st.booleans()) else None
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.double(), scale, {"zero_point": zero, "qmin": qmin, "qmax": qmax, "where": where}, grad


def results(function, x, scale, options, grad):
    leaves = [x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()]
    y = function(*leaves, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def assert_same(found, expected, x, scale, grad):
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    assert torch.equal(found[0].signbit(), expected[0].signbit())
    eps = torch.finfo(expected[0].dtype).eps
    # The composition multiplies by the scale and divides by it, and the dtype of x rounds once more.
    torch.testing.assert_close(found[1], expected[1], rtol=2 * eps, atol=0)
    # Its two terms of the scale, codes and coordinates, are sums of their own: a rounding of each of few operations and
    # one for every sum, of terms up to the largest coordinate or code.
    size = float((grad.abs() * ((x.double() / scale.min()).abs() + 512)).sum())
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=8 * eps * size)


@given(cases())
def test_one_step_is_the_composition_of_its_parts(case):
    x, scale, _, grad = case
    found, expected = (results(function, *case) for function in (fake_quantize, composition))
    assert_same(found, expected, x, scale, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(cases())
def test_narrow_inputs_are_computed_in_the_dtype_of_the_scale(dtype, case):
    x, scale, options, grad = case
    x, scale, zero = x.to(dtype), scale.float(), options["zero_point"]
    options = {**options, "zero_point": None if zero is None else zero.float()}
    found, expected = (results(function, x, scale, options, grad.float()) for function in (fake_quantize, composition))
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, torch.float32]
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    # In float32 the composition is off by two roundings, which the narrow dtype may see as one of its own.
    torch.testing.assert_close(found[1], expected[1], rtol=2 * torch.finfo(dtype).eps, atol=0)
    size = float((grad.abs() * ((x.double() / scale.min()).abs() + 512)).sum())
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=8 * 2.0**-23 * size)  # as in float64


def test_a_wider_zero_point_widens_the_result_as_in_the_composition():
    x, scale, zero = torch.randn(3, 5), torch.rand(3, 1) + 0.1, torch.full((3, 1), 2.0, dtype=torch.float64)
    found, expected = (f(x, scale, zero, qmin=0, qmax=15) for f in (fake_quantize, composition))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("zero_point", [None, 3.0])
def test_ends_are_inside_and_the_scale_gets_the_residual(oracles, zero_point):
    """Every quarter of a code from far below to far above, with a scale that makes them exact."""
    x = torch.arange(-60, 100, dtype=torch.float64) / 4 * 0.5
    scale = torch.tensor([0.5], dtype=torch.float64)
    zero = None if zero_point is None else torch.tensor([zero_point], dtype=torch.float64)
    for index, value in enumerate(x.tolist()):
        grad = torch.zeros_like(x)
        grad[index] = 1
        options = {"zero_point": zero, "qmin": -4, "qmax": 11}
        _, by_x, by_scale = results(fake_quantize, x, scale, options, grad)
        slope, residual = oracles.lsq_gradients(value, 0.5, zero_point or 0.0, -4, 11)
        torch.testing.assert_close(by_x, grad * slope, **EXACT)
        torch.testing.assert_close(by_scale, torch.tensor([residual], dtype=torch.float64), **EXACT)


def test_infinity_is_outside_and_leaves_the_gradient_of_the_scale_finite():
    x = torch.tensor([torch.inf, -torch.inf, 0.25])
    y, by_x, by_scale = results(fake_quantize, x, torch.ones(1), {"qmin": -4, "qmax": 3}, torch.tensor([1.0, 10, 100]))
    torch.testing.assert_close(y, torch.tensor([3.0, -4.0, 0.0]), **EXACT)
    torch.testing.assert_close(by_x, torch.tensor([0.0, 0.0, 100.0]), **EXACT)
    torch.testing.assert_close(by_scale, torch.tensor([3.0 - 40.0 - 25.0]), **EXACT)


def test_nan_stays_and_reaches_the_gradient_of_its_own_scale_alone():
    x = torch.tensor([[0.3, torch.nan], [0.3, 0.6]])
    options = {"qmin": -4, "qmax": 3}
    y, by_x, by_scale = results(fake_quantize, x, torch.ones(2, 1), options, torch.ones(2, 2))
    assert torch.equal(y.isnan(), x.isnan())
    torch.testing.assert_close(by_x, torch.ones(2, 2), **EXACT)
    assert by_scale.isnan().flatten().tolist() == [True, False]


def test_a_gradient_that_is_not_finite_stops_at_elements_outside():
    x, grad = torch.tensor([9.0, 0.25]), torch.tensor([torch.inf, 1.0])
    _, by_x, by_scale = results(fake_quantize, x, torch.ones(1), {"qmin": -4, "qmax": 3}, grad)
    torch.testing.assert_close(by_x, torch.tensor([0.0, 1.0]), **EXACT)
    torch.testing.assert_close(by_scale, torch.tensor([torch.inf]), **EXACT)


def test_elements_outside_the_mask_pass_untouched():
    x, where = torch.tensor([0.1, 99.0, torch.nan, 0.3]), torch.tensor([False, False, False, True])
    y, by_x, by_scale = results(fake_quantize, x, torch.ones(1), {"qmin": 0, "qmax": 3, "where": where}, torch.ones(4))
    torch.testing.assert_close(y, torch.tensor([0.1, 99.0, torch.nan, 0.0]), **EXACT, equal_nan=True)
    torch.testing.assert_close(by_x, torch.ones(4), **EXACT)
    torch.testing.assert_close(by_scale, torch.tensor([-0.3]), **EXACT)


@pytest.mark.parametrize(("shape", "tiles"), [((0,), (1,)), ((0, 4), (1,)), ((0, 4), (1, 4)), ((0, 4), (1, 2))])
def test_empty_tensors_have_scales_without_a_gradient(shape, tiles):
    y, by_x, by_scale = results(
        fake_quantize, torch.ones(shape), torch.ones(tiles), {"qmin": 0, "qmax": 3}, torch.ones(shape)
    )
    assert y.shape == by_x.shape == shape
    torch.testing.assert_close(by_scale, torch.zeros(tiles), **EXACT)


@pytest.mark.parametrize("tiles", [(1,), (1, 1)])
def test_a_number_without_axes_has_one_scale(tiles):
    found, expected = (
        results(f, torch.tensor(0.7), torch.full(tiles, 0.5), {"qmin": 0, "qmax": 3}, torch.tensor(2.0))
        for f in (fake_quantize, composition)
    )
    # The two sums of the composition, 2 and 2 x 1.4, cancel in part: three roundings of numbers up to 3.
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * 2.0**-23)


LAYOUTS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("tiles", [(1,), (1, 6, 1, 1), (4, 1, 1, 1), (2, 3, 1, 5)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(layout, tiles):
    x, grad = torch.randn(4, 6, 3, 5, dtype=torch.float64), torch.randn(4, 6, 3, 5, dtype=torch.float64)
    scale = torch.rand(tiles, dtype=torch.float64) + 0.1
    for view, incoming in ((LAYOUTS[layout](x), grad), (x, LAYOUTS[layout](grad))):
        leaf, step = view.detach().requires_grad_(), scale.clone().requires_grad_()
        y = fake_quantize(leaf, step, qmin=-8, qmax=7)
        found = (y.detach(), *torch.autograd.grad(y, (leaf, step), incoming))
        expected = results(composition, view.contiguous(), scale, {"qmin": -8, "qmax": 7}, incoming.contiguous())
        assert_same(found, expected, view, scale, incoming)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_keeps_the_input_alone(masked, dtype):
    x, scale = torch.randn(64, 64, dtype=dtype, requires_grad=True), torch.full((64, 1), 0.1, requires_grad=True)
    where = torch.rand(64, 64) < 0.5 if masked else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quantize(x, scale, torch.full((64, 1), 3.0), qmin=0, qmax=15, where=where)
    large = [tensor for tensor in kept if tensor.numel() > scale.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr(), *([where.data_ptr()] if masked else [])]


@pytest.mark.parametrize(("by_x", "by_scale"), [(True, False), (False, True)])
def test_only_gradients_that_are_wanted_are_computed(by_x, by_scale):
    case = torch.randn(5, 7, dtype=torch.float64), torch.full((5, 1), 0.3, dtype=torch.float64)
    both = results(fake_quantize, *case, {"qmin": -4, "qmax": 3}, torch.ones(5, 7))[1:]
    x, scale = case[0].requires_grad_(by_x), case[1].requires_grad_(by_scale)
    fake_quantize(x, scale, qmin=-4, qmax=3).sum().backward()
    for tensor, wanted, expected in ((x, by_x, both[0]), (scale, by_scale, both[1])):
        if wanted:
            torch.testing.assert_close(tensor.grad, expected, **EXACT)
        else:
            assert tensor.grad is None


def test_a_zero_point_that_learns_gets_its_gradient():
    """Both ends move with it, so it gets minus one for every element outside, and nothing else."""
    zero = torch.tensor([2.0], requires_grad=True)
    fake_quantize(torch.tensor([-9.0, 0.2, 7.3, 99.0]), torch.ones(1), zero, qmin=0, qmax=15).sum().backward()
    torch.testing.assert_close(zero.grad, torch.tensor([-2.0]), **EXACT)


@given(cases())
def test_second_derivatives_are_those_of_the_composition(case):
    x, scale, options, grad = case

    def second(function):
        leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
        y = function(*leaves, **options)
        first = torch.autograd.grad((y.square() * grad).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), leaves)

    found, expected = second(fake_quantize), second(composition)
    # Products of levels, codes and coordinates, each below 512 / 0.05, twice over; what cancels is as large.
    size = float((x.abs().max() / scale.min() + 512) ** 4 * (1 + grad.abs().max()) ** 2) * x.numel() ** 2
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * 2.0**-52 * max(1.0, size))


@pytest.mark.parametrize("tiles", [(1,), (3, 1)])
def test_transformations_of_functions_see_the_same(tiles):
    x, scale = torch.randn(4, 3, 6, dtype=torch.float64), torch.rand(tiles, dtype=torch.float64) + 0.1

    def loss(x, scale):
        return fake_quantize(x, scale, qmin=-4, qmax=3).square().sum()

    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x, scale)
    levels = torch.vmap(lambda row: fake_quantize(row, scale, qmin=-4, qmax=3))(x)
    for index, row in enumerate(x):
        leaves = [row.clone().requires_grad_(), scale.clone().requires_grad_()]
        y = composition(*leaves, qmin=-4, qmax=3)
        torch.testing.assert_close(levels[index], y.detach(), **EXACT)
        expected = torch.autograd.grad(y.square().sum(), leaves)
        # Up to 18 terms below 8 x 0.8 x 8, in another order.
        torch.testing.assert_close([part[index] for part in found], list(expected), rtol=0, atol=18 * 52 * 2.0**-52)


def standard(graph):
    return all(str(node.target).startswith("aten.") for node in graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_tracer_sees_operations_of_torch(mode):
    x, scale = torch.randn(4, 6), torch.full((1,), 0.3)
    traced = make_fx(lambda x, scale: fake_quantize(x, scale, qmin=-4, qmax=3), tracing_mode=mode)(x, scale)
    assert standard(traced.graph)
    torch.testing.assert_close(traced(2 * x, scale), composition(2 * x, scale, qmin=-4, qmax=3), **EXACT)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_grid_holds_operations_of_torch(strict):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.grid = UniformGrid(torch.tensor([0.3]), torch.tensor([2.0]), qmin=0, qmax=15)

        def forward(self, x):
            return self.grid.fake_quantize(x, NearestEven())

    network, x = Network(), torch.randn(4, 6)
    exported = torch.export.export(network, (x,), strict=strict)
    assert standard(exported.graph)
    torch.testing.assert_close(exported.module()(x), network(x), **EXACT)


def test_a_scale_that_does_not_tile_is_refused():
    with pytest.raises(ShapeError, match=r"axis 1 has 8 elements, not a multiple of 3"):
        fake_quantize(torch.ones(4, 8), torch.ones(4, 3), qmin=0, qmax=3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("zero_point", [None, torch.tensor([[5.0], [1.0], [9.0]])])
def test_a_grid_takes_one_step_to_the_nearest_level(zero_point, masked):
    """A rounding that the grid does not know takes the way over the codes."""

    class Other(Rounding):
        def forward(self, u):
            return round_ste(u)

    grid = UniformGrid(torch.rand(3, 1) + 0.1, zero_point, qmin=0, qmax=15, learnable=True, gradient_scale=0.25)
    x, where = torch.randn(3, 8, requires_grad=True), torch.rand(3, 8) < 0.5 if masked else None
    both = []
    for rounding in (NearestEven(), Other()):
        y = grid.fake_quantize(x, rounding, where)
        both.append((y.detach(), *torch.autograd.grad(y.sum(), (x, grid.scale))))
    torch.testing.assert_close(both[0][0], both[1][0], **EXACT)
    # Two roundings of a slope; sums of eight codes below 16 times 0.25, twice.
    torch.testing.assert_close(both[0][1:], both[1][1:], rtol=0, atol=2 * 8 * 16 * 2.0**-23)


def test_a_kernel_that_is_offered_runs_forward_and_backward(monkeypatch):
    calls = []

    def kernel(operator):
        def run(*arguments):
            calls.append(operator.name)
            return operator.reference.run(*arguments)

        return Kernel("test", lambda *_: None, lambda *_: 1.0, run)

    for name in ("FAKE_QUANTIZE", "FAKE_QUANTIZE_GRAD"):
        operator = getattr(ops, name)
        monkeypatch.setattr(ops, name, Operator(operator.name, operator.reference.run, [kernel(operator)]))
    with only("test"):
        fake_quantize(torch.randn(5, requires_grad=True), torch.ones(1), qmin=0, qmax=3).sum().backward()
    assert calls == ["q_core.fake_quantize", "q_core.fake_quantize_grad"]


# Any levels


def table(levels, rounding=None):
    """Distances and thresholds that go with levels, of which the lowest but one is real zero."""
    codes = torch.arange(levels.shape[-1] - 1).to(levels.dtype)
    return levels.diff(dim=-1), middles(levels.detach(), (rounding or NearestTowardZero()).ties_up(codes))


@st.composite
def level_cases(draw):
    """Levels of any granularity; reals beyond both ends, on levels and on middles."""
    tiles = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    shape = [count * draw(st.integers(1, 4)) for count in tiles]
    tiles = [1] if draw(st.booleans()) else tiles
    count = draw(st.sampled_from([2, 3, 4, 16, 40]))
    generator = torch.Generator().manual_seed(draw(seeds))
    # Multiples of an eighth, so that reals that are multiples of a sixteenth lie exactly on levels and middles.
    steps = torch.randint(1, 9, (*tiles, count), generator=generator).double() / 8
    levels = steps.cumsum(-1) - 2 * steps[..., :1] - draw(st.integers(0, count)) / 4
    x = torch.randint(-16 * count, 16 * count, shape, generator=generator).double() / 16
    if draw(st.booleans()):
        x = x + torch.randn(shape, generator=generator, dtype=torch.float64)
    grad = torch.randint(-8, 9, shape, generator=generator).double()
    return x, levels, grad


def surrogate(x, levels, thresholds):
    """One element after the other, from the formulas of the module."""
    pieces = []
    tiled = functional.to_tiles(x, tuple(levels.shape[:-1]))
    rows, edges = levels.reshape(tiled.shape[0], -1), thresholds.reshape(tiled.shape[0], -1)
    for row, line, edge in zip(rows, tiled, edges, strict=True):
        for value in line:
            code = int((edge < value.detach()).sum())
            smooth = row[0] if value < row[0] else row[-1] if value > row[-1] else value
            smooth = smooth + 0 * value + 0 * row.sum()  # part of the graph in any case
            for k in range(1, len(row)):
                if row[k - 1] < value <= row[k]:
                    width = row[k] - row[k - 1]
                    smooth = smooth + width * ((row[code] - value) / width).detach()
            pieces.append(smooth)
    return functional.from_tiles(torch.stack(pieces).reshape(tiled.shape), tuple(levels.shape[:-1]), tuple(x.shape))


@settings(max_examples=50)
@given(level_cases())
def test_any_levels_have_the_gradient_of_the_surrogate(case):
    x, levels, grad = case
    found, expected = [], []
    for function, out in ((fake_quantize_levels, found), (surrogate, expected)):
        leaf, learned = x.clone().requires_grad_(), levels.clone().requires_grad_()
        widths, thresholds = table(learned)
        parts = (learned, widths, thresholds) if function is fake_quantize_levels else (learned, thresholds)
        y = function(leaf, *parts)
        out += [y.detach(), *torch.autograd.grad(y, (leaf, learned), grad)]
    # Sums of at most 81 terms below 64: dyadic but for the quotients, a few roundings each.
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-11)


@settings(max_examples=50)
@given(level_cases())
def test_whoever_looks_inside_sees_any_levels_in_parts_of_the_same_value_and_gradient(case):
    x, levels, grad = case
    found = []
    for function in (fake_quantize_levels, ops._levels_in_parts):
        leaf, learned = x.clone().requires_grad_(), levels.clone().requires_grad_()
        y = function(leaf, learned, *table(learned))
        found.append((y.detach(), *torch.autograd.grad(y, (leaf, learned), grad)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-11)  # as above


@pytest.mark.parametrize("rounding", [NearestEven(), NearestTowardZero()])
def test_a_tie_goes_where_the_rounding_says(rounding):
    levels = torch.arange(-8.0, 8.0).reshape(1, -1) * 0.3
    codes = torch.arange(-7.0, 8.0)
    edges = middles(levels, rounding.ties_up(codes))
    ties = 0.5 * levels[:, 1:].double() + 0.5 * levels[:, :-1].double()
    single = ties.float()
    exact = single.double() == ties
    found = torch.searchsorted(edges[0], single[0]) - 8
    torch.testing.assert_close(found[exact[0]].float(), rounding(codes - 0.5)[exact[0]], **EXACT)
    assert exact.any()


def test_any_levels_pass_nan_and_take_infinities_to_the_ends():
    levels = torch.tensor([[-1.0, 0.0, 2.0]])
    y = fake_quantize_levels(torch.tensor([torch.nan, torch.inf, -torch.inf]), levels, *table(levels))
    torch.testing.assert_close(y, torch.tensor([torch.nan, 2.0, -1.0]), equal_nan=True, **EXACT)
    empty = fake_quantize_levels(torch.empty(3, 0), levels, *table(levels))
    assert empty.shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_levels_compare_narrow_reals_in_the_dtype_of_the_table(dtype):
    levels = torch.tensor([[-1.003, 0.0, 0.7, 2.001]])
    x = torch.linspace(-3, 3, 301).to(dtype)
    y = fake_quantize_levels(x, levels, *table(levels))
    torch.testing.assert_close(y, fake_quantize_levels(x.float(), levels, *table(levels)), **EXACT)


def test_any_levels_keep_the_input_alone_for_the_backward_pass():
    x = torch.randn(1000, requires_grad=True)
    levels = torch.tensor([[-1.0, 0.0, 2.0]], requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize_levels(x, levels, *table(levels))
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= 1000}
    assert large == {x.data_ptr()}


def test_the_graph_of_any_levels_holds_operations_of_torch_only():
    levels = torch.tensor([[-1.0, 0.0, 2.0]])
    graph = make_fx(lambda x: fake_quantize_levels(x, levels, *table(levels)))(torch.randn(5))
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not any("q_core" in name for name in called)
    assert any(name.startswith("aten") for name in called)
