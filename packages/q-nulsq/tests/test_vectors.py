"""The vectors of the brief: values, gradients and the Jacobian of single elements."""

import json
from pathlib import Path

import pytest
import torch

from q_core import NearestTowardZero
from q_nulsq import StepGrid

from . import oracles

VECTORS = {
    entry["name"]: entry for entry in json.loads(Path(__file__).with_name("vectors.json").read_text())["vectors"]
}
DTYPES = [torch.float32, torch.float64]
# Exact in binary: every sum, product and quotient is a float.
DYADIC = {"u2_uniform_eq_LSQ", "u2_nonuniform", "u2_ties_and_knots", "s2_ties_and_knots", "s3_eq13_discriminator"}
EXACT = {"rtol": 0, "atol": 0}
# The file says it agrees with the authors' code to 7e-7 in float32.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def tolerance(name):
    return EXACT if name in DYADIC else CLOSE


def grid_of(entry, dtype, tiles=()):
    """Build the grid of a vector, once or in that many tiles."""
    tiles = tiles or (1,)
    sides = [torch.tensor(entry[side], dtype=dtype) for side in ("neg_steps", "pos_steps")]
    below, above = (side.expand(*tiles, side.numel()) if side.numel() else None for side in sides)
    factor = (entry["num_elements"] * len(entry["pos_steps"])) ** -0.5 if entry["grad_scale_mode"] != "none" else 1.0
    return StepGrid(below, above, gradient_scale=factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VECTORS)
def test_value_and_gradients_are_those_of_the_vectors(name, dtype):
    entry = VECTORS[name]
    grid = grid_of(entry, dtype)
    x = torch.tensor(entry["x"], dtype=dtype, requires_grad=True)
    out = grid.fake_quantize(x, NearestTowardZero())
    out.backward(torch.tensor(entry["upstream"], dtype=dtype))
    torch.testing.assert_close(out.detach(), torch.tensor(entry["output"], dtype=dtype), **tolerance(name))
    torch.testing.assert_close(x.grad, torch.tensor(entry["grad_x"], dtype=dtype), **EXACT)
    torch.testing.assert_close(grid.steps.grad, torch.tensor([entry["grad_steps"]], dtype=dtype), **tolerance(name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VECTORS)
def test_the_gradient_of_every_single_element_is_that_of_the_vectors(name, dtype):
    """With a tile for each element, the gradient of the steps is the Jacobian."""
    entry = VECTORS[name]
    x = torch.tensor(entry["x"], dtype=dtype).unsqueeze(1)
    grid = grid_of({**entry, "grad_scale_mode": "none"}, dtype, tiles=(x.shape[0], 1))
    grid.fake_quantize(x, NearestTowardZero()).sum().backward()
    expected = torch.tensor(entry["jac_steps_unscaled"], dtype=dtype).unsqueeze(1)
    torch.testing.assert_close(grid.steps.grad, expected, **tolerance(name))


@pytest.mark.parametrize("name", VECTORS)
def test_the_oracle_agrees_with_the_vectors(name):
    entry = VECTORS[name]
    sides = entry["neg_steps"], entry["pos_steps"]
    for x, out, row in zip(entry["x"], entry["output"], entry["jac_steps_unscaled"], strict=True):
        # Sums of a few numbers in float64.
        torch.testing.assert_close(oracles.output(x, *sides), out, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(oracles.jacobian(x, *sides), row, rtol=1e-13, atol=1e-13)


# Two more of the brief, whose outputs and steps it prints.
PRINTED = {
    "s2_nonuniform": (
        [0.5, 1.0],
        [1.0],
        [-3, -1.25, -0.875, -0.625, -0.375, -0.125, 0.25, 0.375, 0.75, 1.5],
        [-1.5, -1.5, -0.5, -0.5, -0.5, 0.0, 0.0, 0.0, 1.0, 1.0],
    ),
    "s3_eq13_discriminator": (
        [0.25, 0.5, 1.0, 1.0],
        [0.25, 0.25, 0.25],
        [-0.0625, -0.375, -1, -2],
        [0.0, -0.25, -0.75, -1.75],
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_printed_outputs_are_reached(name):
    below, above, x, expected = PRINTED[name]
    grid = StepGrid(torch.tensor([below]), torch.tensor([above]))
    out = grid.fake_quantize(torch.tensor(x, dtype=torch.float32), NearestTowardZero())
    torch.testing.assert_close(out.detach(), torch.tensor(expected), **EXACT)


def test_a_step_that_fell_to_zero_has_no_value_of_its_own_and_no_nan():
    """Vector u2_zero_middle_step: steps 0.5, 0, 0.5. Its upstream is not known; here it is ones."""
    grid = StepGrid(None, torch.full((1, 3), 0.5))
    with torch.no_grad():
        grid.steps[0, 1] = 0.0
    x = torch.tensor([0.125, 0.375, 0.5, 0.625, 0.875, 1.0, 1.5], requires_grad=True)
    out = grid.fake_quantize(x, NearestTowardZero())
    out.sum().backward()
    torch.testing.assert_close(out.detach(), torch.tensor([0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0]), **EXACT)
    # -0.25 and 0.25 in either outer cell cancel; the one element above the range adds 1 to every step.
    torch.testing.assert_close(grid.steps.grad, torch.ones(1, 3), **EXACT)
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 1, 1, 1, 1, 1, 0]), **EXACT)


def test_equation_13_as_printed_is_told_apart():
    """The right gradient is 0.25 for each step below zero; with the sum as printed it would be -0.75."""
    entry = VECTORS["s3_eq13_discriminator"]
    grid = grid_of(entry, torch.float64)
    x = torch.tensor(entry["x"], dtype=torch.float64)
    grid.fake_quantize(x, NearestTowardZero()).sum().backward()
    torch.testing.assert_close(grid.steps.grad[0, :4], torch.full((4,), 0.25, dtype=torch.float64), **EXACT)
    printed = torch.tensor([oracles.printed_equation_13(value, entry["neg_steps"]) for value in entry["x"]]).sum(0)
    torch.testing.assert_close(printed, torch.full((4,), -0.75), **EXACT)
