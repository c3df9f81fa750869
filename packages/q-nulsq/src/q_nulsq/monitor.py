"""What becomes of steps and levels in training, seen without slowing it.

Steps collapse when hardly anything lies between their two levels; a level that no value takes is dead and wastes a
code; what lies beyond the range pushes all steps up. None of this is an error, and no forward pass asks about it.
`inspect` looks once. `StepMonitor` counts while a model trains: everything is counted on the device of the model, and
fetched by `StepMonitor.report` alone.
"""

import dataclasses
from types import TracebackType
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from q_core import functional
from q_core.calibrate import evaluation, feed
from q_core.errors import DataError, MatchError, RangeError
from q_core.quantizer import Quantizer
from q_core.rounding import NearestEven
from q_nulsq.grid import StepGrid


@dataclasses.dataclass(frozen=True, eq=False)
class LayerReport:
    """What became of one quantizer.

    Attributes:
        path: Path of the quantizer.
        steps: Distances between neighbouring levels, all tiles together.
        smallest: The smallest step, as a part of the mean step of its tile; NaN where a step is.
        collapsed: How many steps are a smaller part of the mean than was asked about.
        nonfinite: How many steps are NaN or infinite.
        raised: How often `StepGrid.project` put a step back since the monitor was made or reset.
        counts: How many values took each level, the lowest first, one row per tile.
        seen: How many values passed, without the NaN.
        below: Part of them that lay below the lowest level.
        above: Part of them that lay above the highest level.
        nan: How many NaN passed.
    """

    path: str
    steps: int
    smallest: float
    collapsed: int
    nonfinite: int
    raised: int
    counts: Int64[Tensor, "tiles n"]
    seen: int
    below: float
    above: float
    nan: int

    @property
    def overflow(self) -> float:
        """Part of the values that lay beyond the range."""
        return self.below + self.above

    @property
    def dead(self) -> int:
        """How many levels no value took; 0 where no value passed, which says nothing about levels."""
        return int((self.counts == 0).sum()) if self.seen else 0

    def __str__(self) -> str:
        """Say it in one line."""
        text = (
            f"{self.path}: smallest step {self.smallest:.3g} of the mean, {self.collapsed} of {self.steps} collapsed, "
            f"{self.dead} of {self.counts.numel()} levels dead, {self.below:.2%} below and {self.above:.2%} above "
            f"the range of {self.seen} values"
        )
        notes = {"steps not finite": self.nonfinite, "steps put back": self.raised, "NaN values": self.nan}
        return text + "".join(f", {count} {what}" for what, count in notes.items() if count)


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What became of every quantizer of a model.

    Attributes:
        layers: One entry per quantizer, in the order of the model.
    """

    layers: tuple[LayerReport, ...]

    def require_finite(self) -> None:
        """Refuse to go on with steps or values that are not numbers.

        Raises:
            RangeError: A step is NaN or infinite, or a NaN passed a quantizer. The message names the first.
        """
        for layer in self.layers:
            if layer.nonfinite:
                raise RangeError(
                    f"{layer.path}: {layer.nonfinite} of {layer.steps} steps are NaN or infinite; go back to the last "
                    "checkpoint and lower the learning rate of steps"
                )
            if layer.nan:
                raise RangeError(
                    f"{layer.path}: {layer.nan} values that are NaN came in; look at the layers before it with "
                    "check_finite"
                )

    def __str__(self) -> str:
        """Say it in one line per quantizer."""
        return "\n".join(str(layer) for layer in self.layers)


@final
class StepMonitor:
    """Counts what passes the quantizers of a model, while it is open as a context.

        with StepMonitor(model) as monitor:
            train_one_epoch(model)
            print(monitor.report())

    Nothing is left on the model afterwards. Values count for the level nearest to them, whatever the rounding.

    Args:
        model: Any model that holds `q_core.Quantizer`s; those put in later are not seen.
        collapsed: Part of the mean step of its tile below which a step counts as collapsed. Above the floor of
            `Projection`, so that a step held there counts.

    Raises:
        MatchError: The model holds no quantizer.
        RangeError: `collapsed` is not between 0 and 1.
    """

    def __init__(self, model: nn.Module, *, collapsed: float = 0.01) -> None:
        if not 0 < collapsed < 1:
            raise RangeError(f"collapsed={collapsed}: a part of the mean step, above 0 and below 1")
        self._collapsed = collapsed
        found = {path: module for path, module in model.named_modules() if isinstance(module, Quantizer)}
        if not found:
            raise MatchError(f"a {type(model).__name__} without quantizers: calibrate() puts them in")
        self._tallies = [_Tally(path, quantizer) for path, quantizer in found.items()]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "StepMonitor":
        """Begin to count."""
        self._handles = [tally.quantizer.register_forward_hook(tally.count) for tally in self._tallies]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off the model. What was counted stays."""
        while self._handles:
            self._handles.pop().remove()

    def reset(self) -> None:
        """Forget what was counted."""
        for tally in self._tallies:
            tally.reset()

    def report(self) -> Report:
        """Return what was counted so far, and how the steps are now. This waits for the device."""
        return Report(tuple(tally.report(self._collapsed) for tally in self._tallies))


class _Tally:
    """Counts of one quantizer, on its device."""

    def __init__(self, path: str, quantizer: Quantizer) -> None:
        self.path, self.quantizer = path, quantizer
        self._sums: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        self._sums = None
        grid = self.quantizer.grid
        self._raised = grid.raised.clone() if isinstance(grid, StepGrid) else torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def count(self, quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Take in one tensor; a forward hook of the quantizer."""
        grid, tiles = self.quantizer.grid, self.quantizer.grid.tile_shape
        x = args[0].detach()
        x = x if self.quantizer.transform is None else self.quantizer.transform(x)
        table = grid.levels().reshape(-1, grid.qmax - grid.qmin + 1)
        rows, codes = (functional.to_tiles(each, tiles) for each in (x, grid.quantize(x, NearestEven())))
        # One sum for each level of each tile, then those for NaN, below and above.
        size = table.numel()
        first = torch.arange(0, size, table.shape[1], device=x.device).unsqueeze(1)
        index = torch.where(codes.isnan(), size, codes.nan_to_num().round().long() - grid.qmin + first)
        ends = [(rows < table[:, :1]).sum(), (rows > table[:, -1:]).sum()]
        sums = torch.zeros(size + 1, dtype=torch.int64, device=x.device)
        sums.scatter_add_(0, index.flatten(), torch.ones((), dtype=torch.int64, device=x.device).expand(index.numel()))
        sums = torch.cat([sums, torch.stack(ends)])
        self._sums = sums if self._sums is None else self._sums + sums

    def report(self, collapsed: float) -> LayerReport:
        grid = self.quantizer.grid
        table = grid.levels().detach().double()
        widths = table.diff(dim=-1)
        part = widths / widths.mean(-1, keepdim=True)
        sums = torch.zeros(table.numel() + 3, dtype=torch.int64) if self._sums is None else self._sums.cpu()
        counts, (nan, below, above) = sums[:-3].reshape(-1, table.shape[-1]), sums[-3:].tolist()
        seen = int(counts.sum())
        raised = int(grid.raised - self._raised) if isinstance(grid, StepGrid) else 0
        return LayerReport(
            path=self.path,
            steps=widths.numel(),
            smallest=float(part.min()),
            collapsed=int((part < collapsed).sum()),
            nonfinite=int((~_steps(grid).isfinite()).sum()),
            raised=raised,
            counts=counts,
            seen=seen,
            below=below / max(seen, 1),
            above=above / max(seen, 1),
            nan=nan,
        )


def _steps(grid: Any) -> Tensor:
    # One step that is NaN makes all levels beyond it NaN, so where a grid has steps, those are counted.
    return grid.widths if isinstance(grid, StepGrid) else grid.levels().diff(dim=-1)


def inspect(model: nn.Module, batch: Any, *, collapsed: float = 0.01) -> Report:
    """Run one batch and tell what became of steps and levels.

    The model runs in evaluation mode without gradients, so that batch norms stay as they are. Nothing is left on it.

    Args:
        model: Any model that holds `q_core.Quantizer`s.
        batch: A tensor, a mapping of keywords, or a list that starts with the input, as `DataLoader` yields it.
        collapsed: Part of the mean step of its tile below which a step counts as collapsed.

    Raises:
        MatchError: The model holds no quantizer.
        DataError: The batch is none of these.
    """
    with StepMonitor(model, collapsed=collapsed) as monitor, evaluation(model):
        feed(model, batch)
    return monitor.report()


def first_nonfinite(model: nn.Module, batch: Any) -> str | None:
    """Run one batch and name the module that made the first value that is not finite.

    The model runs in the mode it is in, without gradients. Its buffers are put back, and nothing is left on it.

    Args:
        model: Any model.
        batch: A tensor, a mapping of keywords, or a list that starts with the input, as `DataLoader` yields it.

    Returns:
        Path of the module, the innermost that returned the value; None where all are finite.

    Raises:
        DataError: The batch is none of these.
    """
    found: list[str] = []

    def watch(path: str, module: nn.Module) -> RemovableHandle:
        def look(_: nn.Module, args: Any, output: Any) -> None:
            made = [each for each in (output if isinstance(output, tuple) else [output]) if isinstance(each, Tensor)]
            if not found and not all(bool(each.isfinite().all()) for each in made):
                found.append(path or "the model")

        return module.register_forward_hook(look)

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    handles = [watch(path, module) for path, module in model.named_modules()]
    try:
        with torch.no_grad():
            feed(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return found[0] if found else None


def check_finite(model: nn.Module, loss: Float[Tensor, ""] | None = None, batch: Any = None) -> None:
    """Refuse a loss, parameters or gradients that are not numbers.

    It waits for the device once, so call it now and then, or when a loss looks wrong.

    Args:
        model: Any model; gradients are those in its parameters.
        loss: The loss, where it is to be checked too.
        batch: What the loss came from. It is run again where the loss is not finite though all parameters are, to name
            the layer.

    Raises:
        RangeError: A parameter, what a layer returns, or a gradient is not finite. The message names the first
            parameter or layer of the model, or the last gradient, from which those before it have it.
        DataError: The loss is not finite, but everything else is.
    """
    named = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    gradients = [
        (f"the gradient of {name}", parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    ]
    losses = [] if loss is None else [loss.detach()]
    checked = [*(tensor for _, tensor in (*named, *gradients)), *losses]
    if not checked or bool(torch.stack([tensor.isfinite().all() for tensor in checked]).all()):
        return
    value = "" if loss is None else f" (loss {float(loss.detach())})"
    _refuse(named, value)
    if loss is not None and batch is not None and not bool(loss.isfinite()):
        layer = first_nonfinite(model, batch)
        if layer is not None:
            raise RangeError(
                f"{layer} is the first to return values that are NaN or infinite{value}: go back to the last "
                "checkpoint and lower learning rates, or look at what comes into it"
            )
    _refuse(gradients[::-1], value)
    raise DataError(
        f"sound parameters and gradients{value}: the batch or its labels hold values that are not numbers, or the loss "
        "overflows in its dtype"
    )


def _refuse(named: list[tuple[str, Tensor]], value: str) -> None:
    for name, tensor in named:
        if bad := int((~tensor.isfinite()).sum()):
            raise RangeError(
                f"{name} holds {bad} of {tensor.numel()} values that are NaN or infinite{value}: go back to the last "
                "checkpoint and lower its learning rate, or clip gradients"
            )
