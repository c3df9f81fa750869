"""How a parameter stands for steps, which are positive.

An optimizer moves a parameter anywhere, and a step must not become negative: levels would change places. Either the
parameter is the step and is put back after each update of the optimizer (`Projection`), or it is another number of
which the step is a positive function (`Softplus`, `Exponential`), which changes what an update means. No way waits for
the device or refuses to go on. `q_nulsq.monitor` tells what became of the steps.
"""

import abc
import functools
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from q_core.errors import RangeError
from q_core.functional import straight_through
from q_core.module import PreciseModule


class Positivity(PreciseModule, abc.ABC):
    """A parameter that stands for steps.

    One of your own implements `raw` and `steps`, and `project` where steps are free to leave what is allowed.
    """

    @abc.abstractmethod
    def raw(self, steps: Float[Tensor, "*tiles n"]) -> Float[Tensor, "*tiles n"]:
        """Return the parameter that stands for positive `steps`."""

    @abc.abstractmethod
    def steps(self, raw: Float[Tensor, "*tiles n"]) -> Float[Tensor, "*tiles n"]:
        """Return the steps that a parameter stands for: not below the smallest normal number of its dtype, or NaN."""

    def project(self, raw: Float[Tensor, "*tiles n"]) -> None:
        """Put the parameter back to where it is allowed to be, in place, without waiting for the device."""
        return

    def allowed(self, raw: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Tell which elements of a parameter stand for a positive and finite step."""
        return raw.isfinite() & self.steps(raw).isfinite()


@final
class Projection(Positivity):
    """The parameter is the step. What the optimizer moved too low is put back afterwards, see `project`.

    Until then a step that is not positive counts as next to nothing: its two levels are one, none change places.

    Args:
        floor: Smallest step, as a part of the mean magnitude of the steps of its tile.

    Raises:
        RangeError: `floor` is not between 0 and 1.

    Gradient:
        1 from step to parameter, wherever it is, so that a lost step can grow again.

    Source:
        Projected gradient descent. Gongyo et al. 2024 (nuLSQ), supplement, section D-III names negative steps and stops
        there.
    """

    def __init__(self, floor: float = 1e-3) -> None:
        super().__init__()
        if not 0 < floor < 1:
            raise RangeError(f"floor={floor}: a part of the mean step, above 0 and below 1; 0.001 is usual")
        self.floor = floor

    def raw(self, steps: Float[Tensor, "*tiles n"]) -> Float[Tensor, "*tiles n"]:
        """Return the steps."""
        return steps

    def steps(self, raw: Float[Tensor, "*tiles n"]) -> Float[Tensor, "*tiles n"]:
        """Return the parameter, next to nothing where it is not positive."""
        return straight_through(_normal(raw), raw)

    def project(self, raw: Float[Tensor, "*tiles n"]) -> None:
        """Raise each step to `floor` times the mean magnitude of the steps of its tile; a NaN stays one."""
        with torch.no_grad():
            # The magnitude: a plain mean may itself be negative, and then would be no floor.
            lowest = raw.abs().mean(-1, keepdim=True).mul_(self.floor)
            raw.copy_(torch.maximum(raw, lowest))

    def allowed(self, raw: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Tell which elements are positive and finite."""
        return raw.isfinite() & (raw > 0)

    def extra_repr(self) -> str:
        """Show the floor."""
        return f"floor {self.floor}"


@final
class Softplus(Positivity):
    r"""The step is $\log(1 + e^p)$ of the parameter: about $p$ where that is large, about $e^p$ where it is negative.

    Gradient:
        $1 - e^{-s}$ from step $s$ to parameter.

    Source:
        Dugas et al. 2000, "Incorporating second-order functional knowledge for better option pricing".
    """

    def raw(self, steps: Float[Tensor, "*tiles n"]) -> Float[Tensor, "*tiles n"]:
        """Return the inverse of the softplus."""
        return steps + torch.log(-torch.expm1(-steps))

    def steps(self, raw: Float[Tensor, "*tiles n"]) -> Float[Tensor, "*tiles n"]:
        """Return the softplus."""
        # Above the threshold torch returns its argument; e^-40 is below the precision of float64.
        return _normal(nn.functional.softplus(raw, threshold=40))


@final
class Exponential(Positivity):
    r"""The step is $e^p$ of the parameter: the optimizer changes steps by factors.

    Gradient:
        $s$ from step $s$ to parameter.

    Source:
        Wang et al. 2022, "Learnable lookup table for neural network quantization", learns the logarithm of a scale.
    """

    def raw(self, steps: Float[Tensor, "*tiles n"]) -> Float[Tensor, "*tiles n"]:
        """Return the logarithm."""
        return steps.log()

    def steps(self, raw: Float[Tensor, "*tiles n"]) -> Float[Tensor, "*tiles n"]:
        """Return the exponential."""
        return _normal(raw.exp())


def refuse_unsound_states(grid: nn.Module, *names: str) -> None:
    """Let a grid refuse a state in which a parameter does not stand for positive steps.

    `load_state_dict` then raises a `RangeError` that names the entry, before any of this grid is changed.

    Args:
        grid: It has a `positivity`.
        names: Its parameters or buffers that stand for something positive.
    """
    grid.register_load_state_dict_pre_hook(functools.partial(_check_state, names))  # type: ignore[no-untyped-call]


def _check_state(names: tuple[str, ...], grid: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    positivity = grid.positivity
    if not isinstance(positivity, Positivity):
        raise TypeError(f"positivity is a {type(positivity).__name__}")
    for name in names:
        raw = state.get(f"{prefix}{name}")
        if not isinstance(raw, Tensor) or raw.is_meta:
            continue  # what is missing or of another shape is for load_state_dict to tell
        bad = ~positivity.allowed(raw)
        if bool(bad.any()):
            raise RangeError(
                f"{prefix}{name} of the state has {int(bad.sum())} of {raw.numel()} values that do not stand for a "
                f"positive and finite {name.removesuffix('s')}, the first is {float(raw[bad][0])}: save a model whose "
                "grids were projected after the last update, see project_after"
            )


def _normal(steps: Tensor) -> Tensor:
    # A residual is divided by its step, and 0/0 would be a NaN in the gradient of an empty cell.
    return steps.clamp(min=torch.finfo(steps.dtype).tiny)
