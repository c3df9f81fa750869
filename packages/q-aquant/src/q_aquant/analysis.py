r"""What borders see, what they look like, and what they cost.

`propagated_error` is figure 2 of AQuant: the error that arrives at a layer against the size of the activation that it
comes with. `border_curve` draws learned borders. `layer_shapes` and `border_cost` count their parameters before there
is any, `held_border_parameters` those of a model that has them. For the error of each layer take
`q_core.analysis.compare`.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from q_aquant.border import FusedBorder, LearnedBorder
from q_core.analysis import Feed
from q_core.calibrate import evaluation, feed
from q_core.errors import DataError, MatchError, RangeError, ShapeError, StateError


@final
@dataclasses.dataclass(frozen=True)
class ErrorByMagnitude:
    """The error that arrives at a layer, in groups of activations of about one size.

    Attributes:
        edges: Edges of the groups on the axis of |x'|, in the units of the activation, float64, one more than the
            groups.
        counts: Activations in each group.
        mean: Mean of x' - x in each group, float64; NaN where the group is empty.
        spread: Standard deviation of x' - x in each group, float64; NaN where the group is empty.
    """

    edges: Float64[Tensor, " edges"]
    counts: Int64[Tensor, " groups"]
    mean: Float64[Tensor, " groups"]
    spread: Float64[Tensor, " groups"]


def propagated_error(
    noised: Float[Tensor, "..."], exact: Float[Tensor, "..."], *, groups: int = 16
) -> ErrorByMagnitude:
    """Group activations by their size and describe the error of each group.

    For the picture of one pixel or one channel, as in the paper, slice both tensors.

    Args:
        noised: Activations x' of the quantized network.
        exact: The same activations x of the float network.
        groups: Number of groups, equally wide from 0 to the largest |x'|.

    Raises:
        ShapeError: The two differ in shape.
        RangeError: No group.
        DataError: There is no activation, or one that is not finite.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, figure 2.
    """
    if noised.shape != exact.shape:
        raise ShapeError(f"activations of shape {tuple(noised.shape)} and {tuple(exact.shape)}: give the same of both")
    if groups < 1:
        raise RangeError(f"groups={groups}: at least 1")
    wide, errors = noised.detach().double().flatten(), (noised - exact).detach().double().flatten()
    size = wide.abs()
    if not len(size) or not bool(torch.isfinite(size + errors).all()):
        raise DataError(f"{len(size)} activations, some perhaps not finite: give at least one, and finite ones")
    largest = float(size.max())
    edges = torch.linspace(0, largest, groups + 1, dtype=torch.float64, device=size.device)
    group = torch.bucketize(size, edges[1:-1].contiguous(), right=True)
    counts = torch.bincount(group, minlength=groups)
    mean = torch.bincount(group, errors, minlength=groups) / counts
    square = torch.bincount(group, (errors - mean[group]).square(), minlength=groups) / counts
    return ErrorByMagnitude(edges.cpu(), counts.cpu(), mean.cpu(), square.sqrt().cpu())


def inputs_of(
    float_model: nn.Module,
    quantized_model: nn.Module,
    path: str,
    batches: Iterable[Any],
    *,
    forward: Feed = feed,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Collect what enters a layer in a quantized network and in its float network, for `propagated_error`.

    Args:
        float_model: The float network. Not changed.
        quantized_model: The network with everything before the layer quantized. Not changed.
        path: Path of the layer, the same in both.
        batches: Batches, as `calibrate` takes them.
        forward: Runs one batch: `(model, batch) -> anything`.

    Returns:
        The noised and the exact input, all batches along the first axis.

    Raises:
        MatchError: One of the models has no module at the path.
        StateError: The layer did not run, or more often in one of the models.
    """
    taken: tuple[list[Tensor], list[Tensor]] = ([], [])
    batches = list(batches)
    for model, inputs in zip((quantized_model, float_model), taken, strict=True):
        try:
            layer = model.get_submodule(path)
        except AttributeError as error:
            raise MatchError(f"no module {path!r} in the {type(model).__name__}: see model.named_modules()") from error

        def keep(_: nn.Module, args: tuple[Tensor, ...], into: list[Tensor] = inputs) -> None:
            # A copy, because what runs next may overwrite it.
            into.append(args[0].detach().clone())

        handle = layer.register_forward_pre_hook(keep)
        try:
            with evaluation(model):
                for batch in batches:
                    forward(model, batch)
        finally:
            handle.remove()
    noised, exact = taken
    if not noised or len(noised) != len(exact):
        raise StateError(
            f"layer {path!r} ran {len(noised)} times in the quantized and {len(exact)} times in the float model on "
            f"{len(batches)} batches: give a layer that runs, and the same forward to both"
        )
    return torch.cat(noised), torch.cat(exact)


@final
@dataclasses.dataclass(frozen=True)
class BorderCurve:
    """Borders against the activation.

    Attributes:
        u: Code coordinates, float64.
        border: The border at each: [*index, points]; the index is that of the coefficients.
    """

    u: Float64[Tensor, " points"]
    border: Float[Tensor, "*index points"]


def border_curve(rounding: LearnedBorder | FusedBorder, *, points: int = 257) -> BorderCurve:
    """Evaluate borders over the whole range.

    Args:
        rounding: A border. Of a fused one, the curve is for windows whose elements are all equal, `[channels, 1,
            points]`; the curves of its elements are those of `rounding.elements`.
        points: Points from the smallest to the largest level.

    Raises:
        RangeError: Fewer than 2 points.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, eq. 8 and 9.
    """
    if points < 2:
        raise RangeError(f"points={points}: at least 2")
    elements = rounding.elements if isinstance(rounding, FusedBorder) else rounding
    coefficients = elements.coefficients
    index = coefficients.shape[1:]
    u = torch.linspace(elements.low, elements.high, points, dtype=torch.float64)
    grid = u.to(coefficients).reshape(-1, *[1] * len(index)).expand(-1, *index)
    with torch.no_grad():
        border = rounding.border(grid).movedim(0, -1)
    if isinstance(rounding, FusedBorder):
        border = border.squeeze(2)
    return BorderCurve(u, border)


@final
@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What a layer needs to know of itself to count its border.

    Attributes:
        path: Path of the layer.
        channels: Input channels, of all groups together; features of a linear layer.
        positions: Positions of the kernel; 1 for a linear layer.
        weights: Elements of the weight, without bias.
        groups: Of the convolution.
    """

    path: str
    channels: int
    positions: int
    weights: int
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        """Whether every channel is a group of its own."""
        return self.groups == self.channels > 1

    @property
    def elements(self) -> int:
        """Elements of a window, each with a border of its own."""
        return self.channels * self.positions


@final
@dataclasses.dataclass(frozen=True)
class BorderCost:
    """The borders of a network against its weights.

    Attributes:
        parameters: Parameters of all borders.
        weights: Weights of all convolutions and linear layers, the first included; no biases and no norms.
    """

    parameters: int
    weights: int

    @property
    def ratio(self) -> float:
        """Parameters of borders for each weight."""
        return self.parameters / self.weights

    def bytes_of(self, *, weight_bits: int, border_bits: int = 16) -> tuple[int, int]:
        """Return the bytes of the weights and of the borders, each packed densely.

        Raises:
            RangeError: Fewer than 1 bit.
        """
        if weight_bits < 1 or border_bits < 1:
            raise RangeError(f"weight_bits={weight_bits}, border_bits={border_bits}: at least 1")
        return math.ceil(self.weights * weight_bits / 8), math.ceil(self.parameters * border_bits / 8)


def layer_shapes(model: nn.Module) -> list[LayerShape]:
    """List the shapes of every two-dimensional convolution and linear layer, in the order of the modules.

    Any other layer with weights takes no border and is not listed.
    """
    found: list[LayerShape] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            positions = module.kernel_size[0] * module.kernel_size[1]
            found.append(LayerShape(path, module.in_channels, positions, module.weight.numel(), module.groups))
        elif isinstance(module, nn.Linear):
            found.append(LayerShape(path, module.in_features, 1, module.weight.numel()))
    return found


def border_cost(shapes: Sequence[LayerShape], *, terms: int = 3, depthwise_terms: int | None = None) -> BorderCost:
    """Count the parameters of element-wise borders as the paper does.

    Every layer but the first, whose input is the image, has `terms` parameters for each element of its window, whatever
    the groups. The weights of fused borders are not counted. The numbers of the paper are those of 3 terms; that of
    MobileNetV2 has 2 in its depthwise convolutions.

    Args:
        shapes: Of the layers, the first one first: `layer_shapes(model)`.
        terms: Parameters of one border: 3 quadratic, 2 linear.
        depthwise_terms: Parameters of one border in a depthwise convolution; `terms` when None.

    Raises:
        RangeError: Fewer than 1 term.
        MatchError: No layer.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, section 5.3; the convention is the one that gives its numbers.
    """
    inner = terms if depthwise_terms is None else depthwise_terms
    if terms < 1 or inner < 1:
        raise RangeError(f"terms={terms}, depthwise_terms={depthwise_terms}: at least 1")
    if not shapes:
        raise MatchError("no convolution and no linear layer: there is nothing to count")
    parameters = sum((inner if shape.depthwise else terms) * shape.elements for shape in shapes[1:])
    return BorderCost(parameters, sum(shape.weights for shape in shapes))


def held_border_parameters(model: nn.Module) -> int:
    """Count the parameters of the borders that a model holds, weights of fused borders included."""
    count = 0
    for module in model.modules():
        if isinstance(module, LearnedBorder):
            count += module.coefficients.numel()
        elif isinstance(module, FusedBorder):
            count += module.weights.numel()
    return count
