"""How a network is reconstructed, on what, and what became of it: facts without behaviour."""

import dataclasses
import math

from torch import Tensor

from q_aquant.caches import InHostMemory, Storage
from q_aquant.forms import Form
from q_aquant.learners import Learner
from q_aquant.losses import Loss, PowerLoss
from q_aquant.starts import Start
from q_core.errors import SpecError


@dataclasses.dataclass(frozen=True)
class Plan:
    """How every unit is learned.

    Attributes:
        learners: What learns.
        form: How activations get borders; None leaves them with nearest rounding.
        start: What sets the borders before they learn, or instead; None starts from one half.
        mixing: Probability that an element of the input of a unit is that of the quantized network, in [0, 1]: 1 is
            AdaRound's and BRECQ's input, 0.5 QDrop's.
        drop: Probability that an element is quantized at the quantizers inside a unit, in (0, 1]: 0.5 is QDrop's.
        loss: What a unit is fitted by.
        iterations: Steps of the optimizer for each unit, at least 1.
        batch_size: Images in a step, over all ranks.
        pace: Multiplies every learning rate; see `pace`.
        looks: How often the unit is evaluated on the held-out images while it learns, at least 1; the last step is
            always evaluated.

    Raises:
        SpecError: A value outside its range.
    """

    learners: tuple[Learner, ...]
    form: Form | None = None
    start: Start | None = None
    mixing: float = 1.0
    drop: float = 1.0
    loss: Loss = dataclasses.field(default_factory=PowerLoss)
    iterations: int = 20_000
    batch_size: int = 32
    pace: float = 1.0
    looks: int = 10

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.iterations < 1 or self.batch_size < 1 or self.looks < 1:
            raise SpecError(
                f"iterations={self.iterations}, batch_size={self.batch_size}, looks={self.looks}: at least 1 each"
            )
        if not 0 <= self.mixing <= 1 or not 0 < self.drop <= 1 or self.pace <= 0:
            raise SpecError(
                f"mixing={self.mixing}, drop={self.drop}, pace={self.pace}: mixing is in [0, 1], drop in (0, 1], pace "
                "above 0"
            )


def pace(iterations: int, published: int = 20_000) -> float:
    r"""Return the factor on published learning rates for another number of steps, $(published / iterations)^{0.8}$.

    Adam moves a value by about its learning rate in each step. A hundredth of the steps at the same rate decides
    nothing, because hardly any weight has come far enough to change its mind; a hundred times the rate keeps the way
    but makes the noise a hundred times as large.

    Args:
        iterations: Steps to be taken.
        published: Steps for which the learning rates were published.

    Note:
        The papers always take 20,000 steps. The exponent is ours, between 1, which keeps the way, and 1/2, which keeps
        the noise: with W2A2 on ResNet-20, judged by 2,000 training images, AQuant reached 89.7 and 92.1 % with 20 and
        60 times the published rates in 150 steps, 86.8 % with 133 times, and 92.5 and 91.7 % with 20 and 40 times in
        500 steps.
    """
    return math.pow(published / iterations, 0.8)


@dataclasses.dataclass(frozen=True)
class Look:
    """One evaluation while a unit learned.

    Attributes:
        iteration: Steps taken before it.
        loss: Average of the loss over the steps since the last look, without the penalty.
        penalty: The penalty at the last step.
        error: Mean squared error, summed over channels, of the unit as it would be left, on the held-out images.
    """

    iteration: int
    loss: float
    penalty: float
    error: float


@dataclasses.dataclass(frozen=True)
class UnitLog:
    """What became of one unit.

    Attributes:
        path: Path of the unit.
        kind: Name of its class.
        learned: Number of values that learned.
        start: Held-out error of the unit as it came: with nearest rounding, in the first stage of a method.
        error: Held-out error of what was kept.
        best: Step after which the kept values were reached; 0 for the unit as it came, or as `Plan.start` made it.
        looks: The evaluations.
        seconds: Wall time.
        outcome: `learned`, `start kept` for what `Plan.start` made, `nothing to learn`, `no better than nearest`, or
            why learning was stopped.
    """

    path: str
    kind: str
    learned: int
    start: float
    error: float
    best: int
    looks: tuple[Look, ...]
    seconds: float
    outcome: str


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The images, and how they are kept.

    Attributes:
        images: Inputs of the network, [images, ...].
        held_out: How many of them, the last ones, judge and do not teach. 0 lets all teach, and judge too.
        storage: Where the activations of a unit are kept.
        seed: Of everything random.
    """

    images: Tensor
    held_out: int = 0
    storage: Storage = dataclasses.field(default_factory=InHostMemory)
    seed: int = 0

    @property
    def teaching(self) -> int:
        """Number of images that teach."""
        return len(self.images) - self.held_out

    @property
    def judging(self) -> range:
        """Which images judge."""
        return range(self.teaching if self.held_out else 0, len(self.images))
