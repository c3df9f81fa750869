"""Bad input: states with steps that are none, bits that a method does not define, data of the wrong sign."""

import copy
import pathlib
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from q_core import CodebookGrid, Quantizer, QuantSpec, RangeError, Recipe, Rule, SpecError, UniformGrid, calibrate, swap
from q_core.grid import Grid
from q_nulsq import Exponential, Projection, Softplus, StepGrid
from q_nulsq.calibration import ClippingWarning, LloydMaxObserver, LsqObserver, NormalizedMSEObserver
from q_nulsq.peers.apot import ApotGrid
from q_nulsq.peers.lcq import LcqGrid
from q_nulsq.peers.lsq_plus import LsqPlusGrid
from q_nulsq.peers.n2uq import N2uqGrid
from q_nulsq.peers.pact import PactGrid
from q_nulsq.peers.uniq import UniqGrid

from .networks import RECIPES, assert_bit_equal, images, network, state_of

ONE = torch.tensor([0.5])
LEARNED: dict[str, tuple[Callable[[], Grid], str]] = {
    "nuLSQ": (lambda: StepGrid(torch.ones(1, 2), torch.tensor([[0.5]])), "steps"),
    "nuLSQ per channel": (lambda: StepGrid(None, torch.ones(3, 1, 1, 1, 3)), "steps"),
    "nuLSQ that does not learn": (lambda: StepGrid(None, torch.ones(1, 3), learnable=False), "steps"),
    "LSQ": (lambda: UniformGrid(ONE, qmin=0, qmax=3, learnable=True), "scale"),
    "LSQ+": (lambda: LsqPlusGrid(ONE, qmin=0, qmax=3), "scale"),
    "PACT": (lambda: PactGrid(ONE, qmax=3), "alpha"),
    "APoT": (lambda: ApotGrid(ONE, qmin=0, qmax=3), "clip"),
    "LCQ": (lambda: LcqGrid(ONE, qmin=0, qmax=3), "clip"),
    "UniQ": (lambda: UniqGrid(ONE, qmin=-2, qmax=1), "scale"),
    "N2UQ": (lambda: N2uqGrid(torch.ones(1, 3)), "steps"),
    "N2UQ before": (lambda: N2uqGrid(torch.ones(1, 3)), "input_scale"),
    "N2UQ after": (lambda: N2uqGrid(torch.ones(1, 3)), "output_scale"),
}
BAD = [-0.25, 0.0, torch.nan, torch.inf]


def spoiled(state: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    state = {key: tensor.clone() for key, tensor in state.items()}
    state[name].view(-1)[0] = value
    return state


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", LEARNED)
def test_steps_from_a_file_that_are_not_positive_are_refused_by_name(
    name: str, value: float, strict: bool, tmp_path: pathlib.Path
) -> None:
    make, entry = LEARNED[name]
    model = nn.Sequential(nn.Identity(), Quantizer(make()))
    path = tmp_path / "state.safetensors"
    save_file(spoiled(model.state_dict(), f"1.grid.{entry}", value), path)
    # A copy refuses as the original does.
    for each in (model, copy.deepcopy(model)):
        before = state_of(each)
        with pytest.raises(RangeError, match=rf"^1\.grid\.{entry} of the state has 1 of \d+ values") as caught:
            each.load_state_dict(load_file(path), strict=strict)
        assert f"the first is {value}" in str(caught.value)
        assert_bit_equal(each.state_dict(), before)


@pytest.mark.parametrize("name", LEARNED)
def test_sound_states_and_states_of_another_shape_are_for_torch(name: str) -> None:
    make, entry = LEARNED[name]
    grid, other = make(), make()
    state = {key: tensor.clone() for key, tensor in grid.state_dict().items()}
    state[entry] = state[entry] / 2
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=f"size mismatch for {entry}"):
        other.load_state_dict(state | {entry: torch.ones(7)})
    state.pop(entry)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{entry}"'):
        other.load_state_dict(state)


@pytest.mark.parametrize("positivity", [Softplus(), Exponential()])
def test_a_parameter_that_stands_for_positive_steps_wherever_it_is_may_be_negative(positivity: nn.Module) -> None:
    grid = StepGrid(None, torch.full((1, 3), 0.1), positivity=positivity)
    assert bool((grid.steps < 0).all())
    twin = copy.deepcopy(grid)
    twin.load_state_dict(spoiled(grid.state_dict(), "steps", -7.0))
    assert float(twin.widths[0, 0]) > 0
    for value in (torch.nan, torch.inf, -torch.inf, *([1e4] if isinstance(positivity, Exponential) else [])):
        with pytest.raises(RangeError, match="steps of the state has 1 of 3 values"):
            twin.load_state_dict(spoiled(grid.state_dict(), "steps", value))


def test_levels_from_a_file_that_are_not_sorted_are_refused_by_name() -> None:
    model = nn.Sequential(Quantizer(CodebookGrid(torch.tensor([[-1.0, 0.0, 2.0]]), qmin=-1)))
    before = state_of(model)
    for value in (0.5, 0.0, torch.nan):
        with pytest.raises(
            RangeError, match=r"^0\.grid\.codebook of the state, of shape \(1, 3\) is not finite and str"
        ):
            model.load_state_dict(spoiled(model.state_dict(), "0.grid.codebook", value))
    assert_bit_equal(model.state_dict(), before)
    with pytest.raises(RangeError, match=r"^levels 2\.0 and 1\.0 of tile \(0,\) .*ascending order"):
        StepGrid.from_levels(torch.tensor([[0.0, 2.0, 1.0]]), qmin=0)


def test_what_an_update_without_projection_left_is_projected_then_saved_then_loaded() -> None:
    grid = StepGrid(None, torch.ones(1, 3), positivity=Projection())
    with torch.no_grad():
        grid.steps[0, 1] = -0.5
    twin = copy.deepcopy(grid)
    with pytest.raises(RangeError, match=r"see project_after$"):
        twin.load_state_dict(grid.state_dict())
    grid.project()
    assert int(grid.raised) == 1  # and it is told of
    twin.load_state_dict(grid.state_dict())
    torch.testing.assert_close(twin.levels(), grid.levels(), rtol=0, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_names_the_layer_whose_steps_are_none(name: str) -> None:
    model = RECIPES[name](network(), images(), weight_bits=3, activation_bits=2, progress=False).model
    entries = [
        key for key in model.state_dict() if key.endswith(("grid.steps", "grid.scale", "grid.clip", "grid.alpha"))
    ]
    assert entries
    for entry in entries:
        with pytest.raises(RangeError, match=f"^{entry} of the state has".replace(".", r"\.")):
            model.load_state_dict(spoiled(model.state_dict(), entry, -1.0))


def test_the_state_of_another_recipe_is_refused_with_the_entries_that_differ() -> None:
    options = {"weight_bits": 3, "activation_bits": 2, "progress": False}
    model = RECIPES["nulsq_wa"](network(), images(), **options).model
    with pytest.raises(RuntimeError, match=r'Missing key.*"inner\.weight_quantizer\.grid\.steps"'):
        model.load_state_dict(RECIPES["lsq"](network(), images(), **options).model.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for inner\.weight_quantizer\.grid\.steps"):
        model.load_state_dict(
            RECIPES["nulsq_wa"](network(), images(), **options | {"weight_bits": 2}).model.state_dict()
        )
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(network().state_dict())


@pytest.mark.parametrize("name", ["apot", "lcq"])
@pytest.mark.parametrize(
    ("bits", "layer", "message"),
    [
        ({"weight_bits": 1}, "the weight of inner", "bits=1"),
        ({"activation_bits": 1}, "the input of linear", "bits=1"),  # the first whose input is signed
        ({"weight_bits": 9}, "the weight of ", "bits=9"),
        ({"activation_bits": 9}, "the input of ", "bits=9"),
        ({"weight_bits": 0}, "the weight of inner", "bits=0"),
    ],
)
def test_bits_that_a_method_does_not_define_are_refused_with_the_layer(
    name: str, bits: dict[str, int], layer: str, message: str
) -> None:
    model = network()
    before = state_of(model)
    with pytest.raises(SpecError, match=message) as caught:
        RECIPES[name](model, images(), **{"weight_bits": 3, "activation_bits": 3, "progress": False} | bits)
    assert any(note.startswith(f"while choosing the codes of {layer}") for note in caught.value.__notes__)
    assert_bit_equal(model.state_dict(), before)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"lsq_plus"}))  # whose offset can go below zero
def test_negative_values_that_the_first_batch_did_not_have_are_told_of_with_fraction_and_layer(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    nn.init.eye_(model[0].weight), nn.init.zeros_(model[0].bias)
    batches = [torch.rand(3, 4), torch.tensor([[-0.1, 0.2, 0.3, 0.4]])]
    with pytest.warns(
        ClippingWarning, match=r"^1 of the 16 elements \(6\.2%\) that 1\.input_quantizer saw are negative"
    ):
        RECIPES[name](model, batches, progress=False)


@pytest.mark.parametrize("observer", [LsqObserver, NormalizedMSEObserver, LloydMaxObserver])
def test_data_that_are_all_negative_are_refused_by_an_unsigned_grid(observer: type) -> None:
    recipe = Recipe(QuantSpec.unsigned(2, symmetric=True), observer, StepGrid.from_range)
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4)).eval()
    twin, _ = swap(model, [Rule("1", input=recipe)])
    with pytest.raises(RangeError, match=r"8 of the 8 elements .*all would be clipped to zero") as caught:
        calibrate(twin, [-torch.rand(2, 4) - 0.1], progress=False)
    assert "1.input_quantizer" in str(caught.value.__notes__)
