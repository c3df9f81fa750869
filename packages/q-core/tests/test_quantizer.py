"""A quantizer is its grid and its rounding, in the dtype of the data."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q_core import (
    CodebookGrid,
    NearestEven,
    NearestTowardZero,
    Quantizer,
    QuantSpec,
    Recipe,
    Rule,
    StateError,
    Stochastic,
    UniformGrid,
    calibrate,
    pack,
    save_packed,
    swap,
)

EXACT = {"rtol": 0, "atol": 0}


def _uniform(**options):
    return UniformGrid(torch.full((1,), 0.25), torch.full((1,), 3.0), qmin=0, qmax=15, **options)


def _table():
    return CodebookGrid(torch.tensor([[-1.0, -0.25, 0.5, 2.0]]), qmin=-2)


@given(values=st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=20))
def test_a_quantizer_replaces_reals_by_the_levels_of_the_loop(oracles, values):
    codes = [oracles.quantize(value, 0.25, 3, 0, 15) for value in values]
    x, quantizer = torch.tensor(values), Quantizer(_uniform())
    torch.testing.assert_close(quantizer.codes(x), torch.tensor(codes, dtype=torch.int32), **EXACT)
    torch.testing.assert_close(quantizer(x), torch.tensor([oracles.dequantize(c, 0.25, 3) for c in codes]), **EXACT)


def test_the_rounding_is_nearest_even_unless_another_is_given():
    tie = torch.tensor([0.375])  # 1.5 scales
    for rounding, expected in ((None, 0.5), (NearestEven(), 0.5), (NearestTowardZero(), 0.25)):
        torch.testing.assert_close(Quantizer(_uniform(), rounding)(tie), torch.tensor([expected]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", [_uniform, _table])
def test_the_result_has_the_dtype_of_the_data(dtype, make):
    quantizer = Quantizer(make())
    for shape in ((), (7,), (1, 3, 5, 1)):
        x = torch.randn(shape).to(dtype)
        assert quantizer(x).dtype == dtype
        assert quantizer(x).shape == shape
        # These levels are exact in every dtype, and the arithmetic before runs in float32 or wider.
        torch.testing.assert_close(quantizer(x), quantizer(x.double()).to(dtype), **EXACT)


@pytest.mark.parametrize("make", [_uniform, _table])
def test_codes_are_integers_in_range_without_a_graph(make):
    quantizer = Quantizer(make())
    codes = quantizer.codes(torch.randn(63, requires_grad=True) * 100)
    assert codes.dtype == torch.int32
    assert not codes.requires_grad
    assert int(codes.min()) == quantizer.grid.qmin
    assert int(codes.max()) == quantizer.grid.qmax


@pytest.mark.parametrize("make", [_uniform, _table])
@pytest.mark.parametrize("rounding", [NearestEven, NearestTowardZero])
def test_codes_and_levels_tell_the_same(make, rounding):
    quantizer, x = Quantizer(make(), rounding()), torch.randn(63)
    levels = quantizer.grid.levels().flatten()
    torch.testing.assert_close(levels[quantizer.codes(x).long() - quantizer.grid.qmin], quantizer(x), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_reaches_the_data_in_its_own_dtype(dtype):
    x = torch.tensor([-9.0, 0.1, 9.0], dtype=dtype, requires_grad=True)
    Quantizer(_uniform(learnable=True))(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1.0, 0.0], dtype=dtype), **EXACT)


def test_training_moves_the_scale_to_a_smaller_error():
    """From a scale of 1, far too wide for reals up to 2 and 12 codes above zero."""
    quantizer = Quantizer(UniformGrid(torch.ones(1), torch.full((1,), 3.0), qmin=0, qmax=15, learnable=True))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    x, losses = torch.rand(63) * 2, []
    for _ in range(60):
        loss = (quantizer(x) - x).pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


def test_a_frozen_quantizer_has_the_same_codes_and_no_parameters():
    quantizer, x = Quantizer(_uniform(learnable=True), NearestTowardZero()), torch.randn(63)
    frozen = quantizer.frozen()
    assert not list(frozen.parameters())
    assert isinstance(frozen.rounding, NearestTowardZero)
    torch.testing.assert_close(frozen(x), quantizer(x).detach(), **EXACT)
    torch.testing.assert_close(frozen.codes(x), quantizer.codes(x), **EXACT)


@pytest.mark.parametrize("make", [_uniform, _table])
def test_a_strict_state_dict_restores_a_quantizer(make):
    quantizer, other, x = Quantizer(make()), Quantizer(make()), torch.randn(63)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(quantizer.state_dict(), strict=True)
    torch.testing.assert_close(other(x), quantizer(x), **EXACT)


def test_a_copy_of_a_quantizer_is_independent():
    quantizer = Quantizer(_uniform(learnable=True), Stochastic())
    twin = copy.deepcopy(quantizer)
    with torch.no_grad():
        twin.grid.scale.mul_(2)
    torch.testing.assert_close(quantizer.grid.scale.detach(), torch.full((1,), 0.25), **EXACT)


class Halved(torch.nn.Module):
    """A transform with something to learn."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, x):
        return x * self.factor


def test_a_transform_comes_before_the_grid_in_values_codes_and_gradients():
    x = torch.linspace(-3, 3, 41, requires_grad=True)
    plain = Quantizer(UniformGrid(torch.tensor([0.25]), qmin=-4, qmax=3))
    quantizer = Quantizer(plain.grid, transform=Halved())
    torch.testing.assert_close(quantizer(x), plain(x * 0.5), rtol=0, atol=0)
    torch.testing.assert_close(quantizer.codes(x), plain.codes(x * 0.5), rtol=0, atol=0)
    quantizer(x).sum().backward()
    inside = ((x / 2 >= -1) & (x / 2 <= 0.75)).float()
    torch.testing.assert_close(x.grad, 0.5 * inside, rtol=0, atol=0)
    torch.testing.assert_close(quantizer.transform.factor.grad, (x * inside).sum().reshape(1).detach())
    frozen = quantizer.frozen()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    torch.testing.assert_close(frozen(x), quantizer(x), rtol=0, atol=0)


def test_an_observer_sees_what_the_transform_of_its_recipe_gives_and_a_packed_weight_is_the_transformed_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    rule = Rule(".*", weight=Recipe(QuantSpec.signed(8), transform=Halved))
    twin, _ = swap(model, [rule])
    calibrate(twin, [torch.randn(2, 6)], progress=False)
    weight = model[0].weight.detach() / 2
    expected = UniformGrid.from_range(QuantSpec.signed(8), weight.min().reshape(1), weight.max().reshape(1))
    torch.testing.assert_close(twin[0].weight_quantizer.grid.scale.flatten(), expected.scale, rtol=0, atol=0)
    x = torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(pack(twin)(x), twin(x), rtol=0, atol=0)


def test_a_file_refuses_an_activation_that_is_transformed_before_it_is_quantized(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    rule = Rule(".*", weight=Recipe(QuantSpec.signed(8)), input=Recipe(QuantSpec.signed(8), transform=Halved))
    twin, _ = swap(model, [rule])
    calibrate(twin, [torch.randn(2, 6)], progress=False)
    with pytest.raises(StateError, match=r"0.input_quantizer transforms its input with a Halved"):
        save_packed(pack(twin), tmp_path / "packed.safetensors")
