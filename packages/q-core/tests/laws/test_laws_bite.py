"""Each law catches a part that breaks it, and names itself, the value and what it expected."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from q_core import (
    CodebookGrid,
    Grid,
    LawError,
    MinMaxObserver,
    MovingAverageObserver,
    NearestEven,
    NearestTowardZero,
    Observer,
    PercentileObserver,
    QuantSpec,
    Rounding,
    SpecError,
    UniformGrid,
    straight_through,
)
from q_core.testing import check_grid, check_observer, check_rounding

GRID_LAWS = [
    "levels",
    "codes",
    "composition",
    "idempotence",
    "monotone",
    "nearest",
    "gradient",
    "nan",
    "frozen",
    "state",
    "dtype",
    "layout",
]
ROUNDING_LAWS = ["neighbours", "integers", "gradient", "nan", "state", "dtype"]
OBSERVER_LAWS = ["identity", "extremes", "empty", "split", "repeatable", "zeros", "nonfinite", "state", "layout"]


class Sound(Grid):
    """Codes -4 to 3, half a unit apart: obeys every law, and is broken below in one way each."""

    qmin, qmax = -4, 3

    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.tensor([0.5]))

    def quantize(self, x, rounding):
        return rounding((x / self.step).clamp(self.qmin, self.qmax))

    def dequantize(self, codes):
        return codes * self.step


class DescendingLevels(Sound):
    def levels(self):
        return super().levels().flip(-1)


class UnroundedCodes(Sound):
    def quantize(self, x, rounding):
        return (x / self.step).clamp(self.qmin, self.qmax)


class CodesOutOfRange(Sound):
    def quantize(self, x, rounding):
        return rounding(x / self.step)


class OtherTiesInTraining(Sound):
    def fake_quantize(self, x, rounding):
        return self.dequantize(self.quantize(x, NearestTowardZero()))


class DriftingLevels(Sound):
    def dequantize(self, codes):
        return codes * self.step + 0.3


class SwappedCells(Sound):
    def quantize(self, x, rounding):
        codes = super().quantize(x, rounding)
        return torch.where(codes == 1, torch.where(x > 0.5, 0.0, codes), codes)


class RoundsDown(Sound):
    def quantize(self, x, rounding):
        return torch.floor((x / self.step).clamp(self.qmin, self.qmax))


class NoSurrogate(Sound):
    def quantize(self, x, rounding):
        return torch.round((x / self.step).clamp(self.qmin, self.qmax))


class GradientBeyondTheEnds(Sound):
    def fake_quantize(self, x, rounding):
        return straight_through(super().fake_quantize(x, rounding), x)


class NanBecomesALevel(Sound):
    def quantize(self, x, rounding):
        return super().quantize(x.nan_to_num(), rounding)


class FrozenElsewhere(Sound):
    def frozen(self):
        return CodebookGrid(self.levels() * 2, qmin=self.qmin)


class FrozenWithOtherCodes(Sound):
    def frozen(self):
        return CodebookGrid(self.levels())


class FrozenStillLearns(Sound):
    def frozen(self):
        return UniformGrid(self.step, qmin=self.qmin, qmax=self.qmax, learnable=True)


class FrozenCodesDiffer(Sound):
    def frozen(self):
        return RoundsDown()


class LooseTensor(Sound):
    def __init__(self):
        super().__init__()
        self.table = torch.ones(1)


class StateNotSaved(Sound):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.zeros(1), persistent=False)
        self.twins = 0

    def __deepcopy__(self, memo):
        twin = StateNotSaved()
        twin.twins = self.twins + 1
        return twin

    def dequantize(self, codes):
        return codes * self.step + self.twins


class ParameterWithoutAxes(Sound):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


class NarrowingState(Sound):
    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


class HalfArithmetic(Sound):
    def quantize(self, x, rounding):
        if x.dtype in (torch.float16, torch.bfloat16):
            return rounding((x / (3 * self.step).to(x.dtype) * 3.1).clamp(self.qmin, self.qmax)).float()
        return super().quantize(x, rounding)


class MemoryOrder(Sound):
    def fake_quantize(self, x, rounding):
        return super().fake_quantize(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()), rounding)


BROKEN_GRIDS = [
    ("levels", DescendingLevels),
    ("levels", DriftingLevels),
    ("codes", UnroundedCodes),
    ("codes", CodesOutOfRange),
    ("composition", OtherTiesInTraining),
    ("idempotence", DriftingLevels),
    ("monotone", SwappedCells),
    ("nearest", RoundsDown),
    ("gradient", NoSurrogate),
    ("gradient", GradientBeyondTheEnds),
    ("nan", NanBecomesALevel),
    ("frozen", FrozenElsewhere),
    ("frozen", FrozenWithOtherCodes),
    ("frozen", FrozenStillLearns),
    ("frozen", FrozenCodesDiffer),
    ("state", LooseTensor),
    ("state", StateNotSaved),
    ("state", ParameterWithoutAxes),
    ("dtype", NarrowingState),
    ("dtype", HalfArithmetic),
    ("layout", MemoryOrder),
]


def _others(laws, law):
    return [other for other in laws if other != law]


def test_the_sound_grid_obeys_every_law():
    check_grid(Sound())


@pytest.mark.parametrize(("law", "broken"), BROKEN_GRIDS)
def test_a_grid_that_breaks_a_law_is_caught(law, broken):
    with pytest.raises(LawError, match=f"law '{law}' is broken: found .*, expected "):
        check_grid(broken(), waive=_others(GRID_LAWS, law))


def test_every_law_of_a_grid_has_a_grid_that_breaks_it():
    assert {law for law, _ in BROKEN_GRIDS} == set(GRID_LAWS)


def test_a_law_that_does_not_hold_by_design_is_waived():
    with pytest.raises(
        LawError, match=r"law 'gradient' is broken: found gradient 1.0 for -?[0-9.]+, expected 0 outside"
    ):
        check_grid(GradientBeyondTheEnds())
    check_grid(GradientBeyondTheEnds(), waive=["gradient"])


def test_an_unknown_law_cannot_be_waived():
    with pytest.raises(SpecError, match="waived law 'gradients' is none of levels, codes"):
        check_grid(Sound(), waive=["gradients"])


class TowardMinusTwo(Rounding):
    def forward(self, u):
        return torch.floor(u) - 2 + (u - u.detach())


class AlwaysUp(Rounding):
    def forward(self, u):
        return torch.floor(u) + 1 + (u - u.detach())


class FlatRounding(Rounding):
    def forward(self, u):
        return torch.round(u) + 0 * u


class NanToZero(Rounding):
    def forward(self, u):
        return NearestEven()(u.nan_to_num())


class LooseBorder(Rounding):
    def __init__(self):
        super().__init__()
        self.border = torch.full((1,), 0.5)

    def forward(self, u):
        return NearestEven()(u)


class AlwaysFloat32(Rounding):
    def forward(self, u):
        return NearestEven()(u).float()


class NarrowBorder(Rounding):
    def __init__(self):
        super().__init__()
        self.register_buffer("border", torch.full((1,), 0.5))

    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)

    def forward(self, u):
        return NearestEven()(u)


BROKEN_ROUNDINGS = [
    ("neighbours", TowardMinusTwo),
    ("integers", AlwaysUp),
    ("gradient", FlatRounding),
    ("nan", NanToZero),
    ("state", LooseBorder),
    ("dtype", AlwaysFloat32),
    ("dtype", NarrowBorder),
]


@pytest.mark.parametrize(("law", "broken"), BROKEN_ROUNDINGS)
def test_a_rounding_that_breaks_a_law_is_caught(law, broken):
    with pytest.raises(LawError, match=f"law '{law}' is broken: found .*, expected "):
        check_rounding(broken(), waive=_others(ROUNDING_LAWS, law))


def test_every_law_of_a_rounding_has_a_rounding_that_breaks_it():
    assert {law for law, _ in BROKEN_ROUNDINGS} == set(ROUNDING_LAWS)


def test_checking_a_rounding_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    check_rounding(NearestEven())
    torch.testing.assert_close(torch.random.get_rng_state(), before, rtol=0, atol=0)


class Extremes(Observer):
    """The smallest observer: a grid over the extremes."""

    def update(self, rows, low, high):
        pass

    def grid(self):
        self._require_data()
        low, high = self.low.reshape(self.shape), self.high.reshape(self.shape)
        return UniformGrid.from_range(self.spec, low, high)


class Doubles(Extremes):
    def forward(self, x):
        return super().forward(x) * 2


class WritesIntoItsInput(Extremes):
    def forward(self, x):
        return super().forward(x.mul_(2))


class ForgetsExtremes(Extremes):
    def forward(self, x):
        return super().forward(x[:1])


class GridFromNothing(Extremes):
    def grid(self):
        return UniformGrid(torch.ones(self.shape), qmin=self.spec.qmin, qmax=self.spec.qmax)


class RandomGrid(Extremes):
    def grid(self):
        self._require_data()
        return UniformGrid(torch.rand(self.shape) + 0.1, qmin=self.spec.qmin, qmax=self.spec.qmax)


class TinyScaleOfZeros(Extremes):
    def grid(self):
        self._require_data()
        low, high = (bound.reshape(self.shape) for bound in (self.low, self.high))
        return UniformGrid.from_range(self.spec, low - 1e-8, high + 1e-8)


class IgnoresInfinity(Extremes):
    def forward(self, x):
        super().forward(x.nan_to_num())
        return x


class GrowingState(Extremes):
    def update(self, rows, low, high):
        self.register_buffer(f"batch{len(self._buffers)}", rows)


class LooseState(Extremes):
    def update(self, rows, low, high):
        self.last = rows


class MemoryOrderObserver(Extremes):
    def forward(self, x):
        super().forward(torch.as_strided(x, (x.numel() // 12,), (1,)))
        return x


BROKEN_OBSERVERS = [
    ("identity", Doubles),
    ("identity", WritesIntoItsInput),
    ("extremes", ForgetsExtremes),
    ("empty", GridFromNothing),
    ("split", MovingAverageObserver),
    ("repeatable", RandomGrid),
    ("zeros", TinyScaleOfZeros),
    ("nonfinite", IgnoresInfinity),
    ("state", GrowingState),
    ("state", LooseState),
    ("layout", MemoryOrderObserver),
]


def test_the_smallest_observer_obeys_every_law():
    check_observer(partial(Extremes, QuantSpec.signed(4)))


@pytest.mark.parametrize(("law", "broken"), BROKEN_OBSERVERS)
def test_an_observer_that_breaks_a_law_is_caught(law, broken):
    with pytest.raises(LawError, match=f"law '{law}' is broken: found .*, expected "):
        check_observer(partial(broken, QuantSpec.unsigned(4)), waive=_others(OBSERVER_LAWS, law))


def test_every_law_of_an_observer_has_an_observer_that_breaks_it():
    assert {law for law, _ in BROKEN_OBSERVERS} == set(OBSERVER_LAWS)


def test_checks_do_not_change_what_they_check():
    grid, observer = Sound(), PercentileObserver(QuantSpec.signed(4), bins=64)
    before = copy.deepcopy([grid.state_dict(), observer.state_dict()])
    check_grid(grid)
    check_observer(lambda: copy.deepcopy(observer))
    for old, new in zip(before, [grid.state_dict(), observer.state_dict()], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_the_default_data_of_an_observer_suit_codes_of_one_sign():
    check_observer(partial(MinMaxObserver, QuantSpec.unsigned(4, symmetric=True)))
    check_observer(partial(MinMaxObserver, QuantSpec.signed(1)))
