"""What the float network makes of an output that a unit could have."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from q_aquant.units import Unit
from q_core.swap import replace_modules, share


@final
class UnitTail:
    """The part of a network behind one of its units: `(images, output) -> prediction`.

    The units before it need not run for that, unless what they make is read again behind the unit. Whether it is, the
    first call finds out, by leaving them out.

    Args:
        model: The float network, in evaluation mode. Not changed.
        unit: The unit.
        before: The units that run before it.
    """

    def __init__(self, model: nn.Module, unit: Unit, before: Sequence[Unit]) -> None:
        self.model, self.unit, self.before = model, unit, tuple(before)
        self._given = _Given()
        self._twin: nn.Module | None = None

    def __call__(self, images: Tensor, output: Tensor) -> Tensor:
        """Return what the network makes of an output; gradients flow to it.

        Args:
            images: Inputs of the network.
            output: Of the unit, for these images.
        """
        if self._twin is None:
            self._twin = self._built(images, output)
        return self._run(self._twin, images, output)

    def _built(self, images: Tensor, output: Tensor) -> nn.Module:
        whole, short = self._with(()), self._with(self.before)
        with torch.no_grad():
            expected, found = (self._run(twin, images[:2], output[:2]) for twin in (whole, short))
        return short if torch.equal(expected, found) else whole

    def _with(self, left_out: Sequence[Unit]) -> nn.Module:
        twin = share(self.model)
        replaced: dict[int, nn.Module] = {id(twin.get_submodule(u.path)): _Blank(u.output_shape) for u in left_out}
        replaced[id(twin.get_submodule(self.unit.path))] = self._given
        return replace_modules(twin, replaced)

    def _run(self, twin: nn.Module, images: Tensor, output: Tensor) -> Tensor:
        # A copy: what follows a unit may work in place, as ReLU(inplace=True) does.
        self._given.output = output.clone()
        prediction: Tensor = twin(images)
        self._given.output = None
        return prediction


class _Given(nn.Module):
    """Returns what it was given, whatever comes in."""

    output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        return self.output


class _Blank(nn.Module):
    """Returns zeros of the shape that a unit returns."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros((len(x), *self.shape))
