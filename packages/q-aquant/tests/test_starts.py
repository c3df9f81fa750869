"""Borders from a formula: as a start, and as all there is."""

import copy
import inspect

import pytest
import torch
from torch import nn

from q_aquant import (
    Borders,
    ChannelBorder,
    ClosedForm,
    ElementBorder,
    InputPlacement,
    LearnedBorder,
    Plan,
    WindowBorder,
    aquant_closed_form,
    rounding,
)
from q_aquant.closed_form import PropagatedError, border_coefficients, closed_form_border, positions_as_outputs
from q_aquant.forms import Form
from q_aquant.layers import PatchConv2d
from q_aquant.methods import one_stage
from q_aquant.reconstruct import fork, with_borders
from q_aquant.setup import Bits
from q_aquant.starts import Sight
from q_core import load_packed, pack, save_packed
from q_core.errors import RangeError
from q_core.trace import fold_batchnorm

from .networks import images, net

BITS = {"weight_bits": 2, "activation_bits": 2, "progress": False}
FORMS = [ElementBorder(), ElementBorder(degree=1), WindowBorder(), ChannelBorder()]


def unit(form: Form, path: str = "block2") -> tuple[nn.Module, nn.Module]:
    """Return a quantized block with borders, and its float original."""
    model = net()
    quantized = rounding(model, [images()], **BITS).model
    return with_borders(fork(quantized.get_submodule(path)), form), fold_batchnorm(model, images(2)).get_submodule(path)


def inputs(count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what enters the block in the quantized and in the float network."""
    generator = torch.Generator().manual_seed(3)
    exact = torch.rand(count, 6, 8, 8, generator=generator)
    return (exact + 0.2 * torch.randn(exact.shape, generator=generator)).relu(), exact


def sight(original: nn.Module, errors=None) -> Sight:
    """See a block; `errors` are what the judge says, one after the other, instead of the squared error."""
    noised, exact = inputs()
    answers = None if errors is None else iter(errors)

    def error(made: nn.Module) -> float:
        if answers is not None:
            return next(answers)
        with torch.no_grad():
            return float((made(noised) - original(exact)).square().mean())

    return Sight(original, lambda: iter([(noised[:16], exact[:16]), (noised[16:], exact[16:])]), error)


def coefficients(made: nn.Module) -> list[torch.Tensor]:
    return [module.coefficients for module in made.modules() if isinstance(module, LearnedBorder)]


@pytest.mark.parametrize("form", FORMS)
def test_it_sets_the_borders_of_the_formula(form) -> None:
    made, original = unit(form)
    # Only the first trial of the first layer is better than what was there.
    ClosedForm(shares=(1.0,)).put(made, sight(original, [1.0, 0.5, 0.7, 0.7]))
    layer = made.conv1
    border = next(module for module in layer.modules() if isinstance(module, LearnedBorder))
    noised, exact = inputs()
    sums = PropagatedError(
        6, scale=layer.patch_quantizer.grid.scale.reshape(1), low=border.low, high=border.high, degree=form.degree
    )
    sums.add(noised, exact)
    weights = layer.weight, layer.weight_quantizer(layer.weight)
    if isinstance(form, ChannelBorder):
        weights = tuple(map(positions_as_outputs, weights))
    expected = closed_form_border(
        *weights, low=border.low, high=border.high, propagated=sums.regression(), degree=form.degree
    )
    # The sums of the regression are taken in two parts.
    torch.testing.assert_close(border.coefficients, border_coefficients(expected).float(), rtol=1e-5, atol=1e-6)
    for other in coefficients(made)[1:]:
        torch.testing.assert_close(other, torch.zeros_like(other), rtol=0, atol=0)


def test_the_best_share_is_kept_or_none() -> None:
    made, original = unit(ElementBorder())
    whole = copy.deepcopy(made)
    ClosedForm(shares=(1.0,)).put(whole, sight(original, [1.0, 0.5, 0.7, 0.7]))
    ClosedForm(shares=(1.0, 0.5, 0.25)).put(made, sight(original, [1.0, 0.9, 0.5, 0.7] + [0.5] * 6))
    torch.testing.assert_close(coefficients(made)[0], 0.5 * coefficients(whole)[0], rtol=0, atol=0)
    for other in coefficients(made)[1:]:
        torch.testing.assert_close(other, torch.zeros_like(other), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_it_never_makes_a_unit_worse_and_here_makes_it_better(form) -> None:
    made, original = unit(form)
    seen = sight(original)
    before = seen.error(made)
    ClosedForm().put(made, seen)
    assert seen.error(made) < before


def test_exact_weights_and_inputs_leave_borders_at_one_half() -> None:
    made, original = unit(ElementBorder())
    for layer in made.modules():
        if isinstance(layer, PatchConv2d):
            layer.weight_quantizer = nn.Identity()
    _, exact = inputs()
    seen = Sight(original, lambda: iter([(exact, exact)]), lambda _: 0.0)
    ClosedForm().put(made, seen)
    for each in coefficients(made):
        torch.testing.assert_close(each, torch.zeros_like(each), rtol=0, atol=0)


def test_layers_are_taken_in_the_order_in_which_they_run() -> None:
    made, original = unit(ElementBorder())
    made.conv1, made.conv2 = made.conv2, made.conv1
    original.conv1, original.conv2 = original.conv2, original.conv1

    def forward(x):
        return torch.relu(made.conv1(torch.relu(made.conv2(x))) + made.shortcut(x))

    made.forward = forward
    original.forward = lambda x: torch.relu(original.conv1(torch.relu(original.conv2(x))) + original.shortcut(x))
    # Accepts the first layer only: the one that runs first, not the one that was registered first.
    ClosedForm(shares=(1.0,)).put(made, sight(original, [1.0, 0.5, 0.7, 0.7]))
    layers = {name: layer for name, layer in made.named_children() if isinstance(layer, PatchConv2d)}
    moved = {name: bool(layer.patch_quantizer.rounding.coefficients.any()) for name, layer in layers.items()}
    assert moved == {"conv1": False, "conv2": True, "shortcut": False}


@pytest.mark.parametrize("shares", [(), (0.0,), (1.5,), (1.0, -0.5)])
def test_shares_that_make_no_sense_are_refused(shares) -> None:
    with pytest.raises(RangeError, match="shares="):
        ClosedForm(shares=shares)


@pytest.mark.parametrize("form", FORMS)
def test_with_nothing_to_learn_it_is_a_method_by_itself(form, tmp_path) -> None:
    options = BITS | {"form": form, "batch_size": 8, "journal": tmp_path / "journal"}
    first = aquant_closed_form(net(), [images(64)], **options)
    assert {log.outcome for log in first.logs} <= {"start kept", "no better than nearest"}
    kept = [log for log in first.logs if log.outcome == "start kept"]
    assert kept
    assert all(log.error < log.start and log.best == 0 and log.learned == 0 for log in kept)
    again = aquant_closed_form(net(), [images(64)], **options)
    data = images(4)
    torch.testing.assert_close(again.model(data), first.model(data), rtol=0, atol=0)
    loaded = load_packed(save_packed(pack(first.model), tmp_path / "model.safetensors"), net())
    torch.testing.assert_close(loaded(data), first.model(data), rtol=0, atol=0)


def test_the_alias_is_at_most_ten_lines_over_the_parts() -> None:
    source = inspect.getsource(aquant_closed_form)
    body = source.partition(aquant_closed_form.__doc__)[2].strip().removeprefix('"""').strip()
    assert len(body.splitlines()) <= 10


def test_learning_goes_on_from_the_start_and_keeps_it_if_nothing_better_comes() -> None:
    options = {"progress": False, "batch_size": 8, "looks": 2}
    plan = Plan((Borders(lr=10.0),), form=ElementBorder(), start=ClosedForm(), iterations=6)
    harmed = one_stage(net(), [images(64)], Bits(2, 2, 8), plan, InputPlacement(), **options)
    alone = aquant_closed_form(net(), [images(64)], **BITS, batch_size=8)
    assert "start kept" in {log.outcome for log in harmed.logs}
    for found, bare in zip(harmed.logs[:2], alone.logs[:2], strict=True):
        assert found.error <= bare.error
