"""Weights that jump between two levels."""

import pytest
import torch
from torch import nn

from q_core import MatchError, NearestEven, Quantizer, QuantLinear, RangeError, SpecError, StateError, UniformGrid
from q_core.testing import check_grid
from q_nulsq.oscillation import OscillationTracker, oscillation_damping, weight_damping
from q_nulsq.peers.dorefa import DorefaGrid, TanhNormalization
from q_nulsq.peers.uniq import UniqGrid

exact = {"rtol": 0, "atol": 0}


def layer(values, scale=1.0, quantizer=None):
    """Return a linear layer with these weights and 2-bit codes."""
    made = QuantLinear(len(values), 1, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([values]))
    grid = UniformGrid(torch.full((1, 1), scale), qmin=-2, qmax=1, learnable=True)
    made.weight_quantizer = Quantizer(grid) if quantizer is None else quantizer
    return made


def put(made, values):
    with torch.no_grad():
        made.weight.copy_(torch.tensor([values]))


# The penalty


def test_the_penalty_is_the_squared_distance_to_the_level_inside_the_range():
    made = layer([0.25, -0.75, -2.0, 1.0, 1.5, -9.0])
    penalty = oscillation_damping(made)
    # 0.25 from 0, 0.25 from -1, and nothing on a level or beyond the ends.
    torch.testing.assert_close(penalty.detach(), torch.tensor(0.125), **exact)
    weight, scale = torch.autograd.grad(penalty, [made.weight, made.weight_quantizer.grid.scale], allow_unused=True)
    torch.testing.assert_close(weight, torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0, 0.0]]), **exact)
    assert scale is None


def test_every_channel_is_clipped_to_its_own_range():
    w = torch.tensor([[0.4, 5.0], [3.0, 5.0]], requires_grad=True)
    quantizer = Quantizer(UniformGrid(torch.tensor([[0.5], [4.0]]), qmin=-2, qmax=1))
    penalty = weight_damping(w, quantizer)
    # Levels 0.5 and 4: 0.1 and nothing; 1 and 1 beyond 4, which is clipped. 0.4 is rounded to 2**-26.
    torch.testing.assert_close(penalty.detach(), torch.tensor(0.01 + 1.0), rtol=0, atol=1e-7)
    (found,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(found, torch.tensor([[-0.2, 0.0], [-2.0, 0.0]]), rtol=0, atol=1e-7)


def test_the_penalty_of_a_transformed_weight_reaches_the_weight_through_the_transform():
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    transform = TanhNormalization()
    quantizer = Quantizer(DorefaGrid(qmin=-2, qmax=1), transform=transform)
    penalty = weight_damping(w, quantizer)
    t = transform(w)
    expected = (t - quantizer(w).detach()).square().sum()
    torch.testing.assert_close(penalty, expected, rtol=1e-6, atol=0)  # 12 positive terms in another order
    (found,), (through,) = torch.autograd.grad(penalty, w), torch.autograd.grad(expected, w)
    torch.testing.assert_close(found, through, rtol=0, atol=1e-6)  # sums of 12 numbers below 1


def test_the_penalty_of_a_model_is_that_of_its_weights_each_counted_once():
    made = layer([0.25])
    model = nn.Sequential(made, nn.Sequential(layer([0.5 + 0.25])), made, nn.Linear(1, 1))
    torch.testing.assert_close(oscillation_damping(model).detach(), torch.tensor(2 * 0.25**2), **exact)
    tied = layer([0.0])
    tied.weight = made.weight
    assert list(OscillationTracker(nn.Sequential(made, tied)).frequencies()) == ["0.weight"]


def test_the_penalty_makes_weights_settle():
    made = layer([0.45])
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        oscillation_damping(made).backward()
        optimizer.step()
    # The distance shrinks by 1 - 2 * 0.1 a step: 0.45 * 0.8**50 is below 1e-5.
    torch.testing.assert_close(made.weight.detach(), torch.zeros(1, 1), rtol=0, atol=1e-5)


# The measure


def reference(codes, momentum):
    """Frequency, moving average and number of turns of one weight, from its codes at each step."""
    frequency, average, last, direction = 0.0, float(codes[0]), codes[0], 0
    turns = 0
    for code in codes[1:]:
        change = (code > last) - (code < last)
        turned = change != 0 and change == -direction
        turns += turned
        frequency = momentum * turned + (1 - momentum) * frequency
        average = momentum * code + (1 - momentum) * average
        direction, last = change or direction, code
    return frequency, average, turns


def test_the_frequency_is_that_of_the_algorithm():
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(-2, 2, (40, 6), generator=generator)
    history[:, 0] = 1  # a weight that rests
    history[:, 1] = (torch.arange(40) // 10).clamp(max=3) - 2  # one that goes one way
    made = layer(history[0].tolist())
    tracker = OscillationTracker(made, momentum=0.1)
    for codes in history[1:]:
        put(made, codes.tolist())
        tracker.step()
    expected = [reference(history[:, i].tolist(), 0.1) for i in range(6)]
    found = tracker.state_dict()["weight"]
    # 39 weighted means in float32 of numbers up to 2, the error of each shrinks with the weight: below 10 * 2**-23.
    close = {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(found["frequency"][0], torch.tensor([each[0] for each in expected]), **close)
    torch.testing.assert_close(found["average"][0], torch.tensor([each[1] for each in expected]), **close)
    assert [each[2] > 5 for each in expected] == [False, False, True, True, True, True]
    torch.testing.assert_close(tracker.frequencies()["weight"], found["frequency"], **exact)


def test_a_rest_between_two_changes_does_not_hide_that_they_are_opposite():
    made = layer([0.0])
    tracker = OscillationTracker(made, momentum=1.0)
    frequencies = []
    for value in (1.0, 1.0, 1.0, 0.0, 0.0, -1.0, 0.0):
        put(made, [value])
        tracker.step()
        frequencies.append(float(tracker.frequencies()["weight"]))
    assert frequencies == [0, 0, 0, 1, 0, 0, 1]


# The stop


def swing(made, tracker, steps):
    """Let the first weight jump between codes 0 and 1, two thirds of the time at 1, and the second one rest."""
    for step in range(steps):
        put(made, [0.45 if step % 3 == 2 else 0.55, -1.2])
        tracker.step()


def test_a_weight_that_turns_too_often_is_held_at_the_level_where_it_is_more_of_the_time():
    made = layer([0.55, -1.2])
    tracker = OscillationTracker(made, momentum=0.05, threshold=0.3)
    swing(made, tracker, 60)
    torch.testing.assert_close(tracker.frozen()["weight"], torch.tensor([[True, False]]), **exact)
    torch.testing.assert_close(made.weight.detach(), torch.tensor([[1.0, -1.2]]), **exact)
    with torch.no_grad():
        made.weight_quantizer.grid.scale.fill_(0.75)
    put(made, [-5.0, 0.1])
    tracker.step()
    torch.testing.assert_close(made.weight.detach(), torch.tensor([[0.75, 0.1]]), **exact)  # where the level is now
    tracker.threshold = None
    put(made, [0.5, 0.1])
    tracker.step()
    torch.testing.assert_close(made.weight.detach(), torch.tensor([[0.5, 0.1]]), **exact)


def test_without_a_threshold_no_weight_is_touched():
    made = layer([0.55, -1.2])
    tracker = OscillationTracker(made, momentum=0.05)
    swing(made, tracker, 60)
    torch.testing.assert_close(made.weight.detach(), torch.tensor([[0.45, -1.2]]), **exact)
    assert float(tracker.frequencies()["weight"][0, 0]) > 0.3


def test_levels_of_another_grid_are_taken_from_it():
    made = layer([0.1, -1.2], quantizer=Quantizer(UniqGrid(torch.ones(1, 1), qmin=-2, qmax=1)))
    check_grid(made.weight_quantizer.grid)
    tracker = OscillationTracker(made, momentum=0.3, threshold=0.2)
    for step in range(20):
        put(made, [-0.1 if step % 2 else 0.1, -1.2])
        tracker.step()
    assert abs(float(made.weight[0, 0].detach())) == 0.5


def test_it_runs_after_each_step_of_the_optimizer_until_it_is_removed():
    made = layer([0.4])
    tracker = OscillationTracker(made, momentum=1.0)
    optimizer = torch.optim.SGD([made.weight], lr=1.0)
    handle = tracker.attach(optimizer)
    frequencies = []
    for gradient in (-0.2, 0.2, -0.2):
        made.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        frequencies.append(float(tracker.frequencies()["weight"]))
    assert frequencies == [0, 1, 1]
    handle.remove()
    made.weight.grad = torch.tensor([[0.0]])
    optimizer.step()
    assert float(tracker.frequencies()["weight"]) == 1


def test_resumed_it_goes_on_as_if_nothing_had_been(tmp_path):
    made, again = layer([0.55, -1.2]), layer([0.0, 0.0])
    tracker = OscillationTracker(made, momentum=0.05, threshold=0.3)
    swing(made, tracker, 25)
    torch.save({"model": made.state_dict(), "oscillation": tracker.state_dict()}, tmp_path / "state.pt")
    swing(made, tracker, 25)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = OscillationTracker(again, momentum=0.05, threshold=0.3)
    again.load_state_dict(state["model"])
    other.load_state_dict(state["oscillation"])
    swing(again, other, 25)
    torch.testing.assert_close(other.state_dict(), tracker.state_dict(), **exact)
    torch.testing.assert_close(again.state_dict(), made.state_dict(), **exact)


def test_what_does_not_fit_is_refused():
    with pytest.raises(MatchError, match="no weight of this Linear has a quantizer"):
        oscillation_damping(nn.Linear(2, 2))
    with pytest.raises(MatchError, match="no weight"):
        OscillationTracker(nn.Linear(2, 2))
    for momentum in (0.0, 1.1):
        with pytest.raises(RangeError, match="momentum"):
            OscillationTracker(layer([0.0]), momentum=momentum)
    transformed = Quantizer(DorefaGrid(qmin=-2, qmax=1), NearestEven(), TanhNormalization())
    with pytest.raises(SpecError, match="TanhNormalization before it is quantized"):
        OscillationTracker(layer([0.5], quantizer=transformed), threshold=0.1)
    tracker = OscillationTracker(layer([0.5], quantizer=transformed))
    tracker.step()
    tracker.threshold = 0.1
    with pytest.raises(SpecError, match="cannot be frozen"):
        tracker.step()
    with pytest.raises(StateError, match=r"differ in 0\.weight"):
        tracker.load_state_dict(OscillationTracker(nn.Sequential(layer([0.5]))).state_dict())
    with pytest.raises(StateError, match="does not fit its shape"):
        tracker.load_state_dict(OscillationTracker(layer([0.5, 0.5])).state_dict())
