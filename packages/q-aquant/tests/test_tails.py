"""What the float network makes of the output of a unit, with and without the units before it."""

import pytest
import torch
from torch import nn

from q_aquant import find_units
from q_aquant.tails import UnitTail
from q_core.trace import fold_batchnorm

from .networks import Block, images, net


def test_the_output_of_the_float_unit_gives_the_prediction_of_the_network() -> None:
    model = fold_batchnorm(net(), images(2))
    units = find_units(model, images(2))
    data = images(5)
    with torch.no_grad():
        for number, unit in enumerate(units):
            taken = []
            handle = model.get_submodule(unit.path).register_forward_hook(
                lambda _m, _i, out, into=taken: into.append(out)
            )
            expected = model(data)
            handle.remove()
            found = UnitTail(model, unit, units[:number])(data, taken[0])
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_units_before_do_not_run() -> None:
    model = fold_batchnorm(net(), images(2))
    units = find_units(model, images(2))
    tail = UnitTail(model, units[2], units[:2])
    tail(images(2), torch.rand(2, 8, 4, 4))
    # Half an image is no image for the stem, but the units behind never see it.
    images_alone = torch.full((3, 3, 8, 8), torch.nan)
    assert bool(tail(images_alone, torch.rand(3, 8, 4, 4)).isfinite().all())


class Remembering(nn.Module):
    """A network whose head reads what the first block made as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(3, 4, 2), Block(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        early = self.first(x)
        return self.head((self.second(early) + 0.5 * early).mean((2, 3)))


def test_units_whose_output_is_read_again_behind_the_unit_do_run() -> None:
    model = fold_batchnorm(Remembering().eval(), images(2))
    units = find_units(model, images(2), blocks=(Block,))
    data = images(3)
    with torch.no_grad():
        expected = model(data)
        output = model.second(model.first(data))
        torch.testing.assert_close(UnitTail(model, units[1], units[:1])(data, output), expected, rtol=0, atol=0)


def test_gradients_flow_to_the_output_and_the_model_stays_as_it_is() -> None:
    model = fold_batchnorm(net(), images(2))
    units = find_units(model, images(2))
    before = dict(model.named_modules())
    output = torch.rand(3, 8, 4, 4, requires_grad=True)
    found = UnitTail(model, units[2], units[:2])(images(3), output)
    expected = model.head(output.mean((2, 3)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(found.square().sum(), output)
    (wanted,) = torch.autograd.grad(expected.square().sum(), output)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("count", [1, 4])
def test_the_whole_network_as_a_unit_has_nothing_behind_it(count) -> None:
    model = fold_batchnorm(net(), images(2))
    (unit,) = find_units(model, images(2), blocks=("",))
    output = torch.rand(count, 5)
    torch.testing.assert_close(UnitTail(model, unit, ())(images(count), output), output, rtol=0, atol=0)


def test_an_output_survives_a_layer_behind_the_unit_that_works_in_place() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 64, 5)).eval()
    units = find_units(body, images(2), blocks=("0",))
    output = torch.randn(2, 4, 8, 8)
    before = output.clone()
    leaf = output.requires_grad_()
    UnitTail(body, units[0], ())(images(2), leaf).sum().backward()
    torch.testing.assert_close(leaf.detach(), before, rtol=0, atol=0)
    assert bool(leaf.grad.any())
