"""How many multiplications, additions and XNORs a network takes, by the conventions of the adder papers.

One run of the network with hooks gives the number of *pairs* of every layer: how often a weight, or a second
activation, meets an activation. What a pair costs depends on what runs it:

| executed as | multiplications | additions | XNORs |
|---|---|---|---|
| a product | 1 | 1 | 0 |
| a distance | 0 | 2: subtract, accumulate | 0 |
| binary | 0 | 1 | 1 |

An absolute value is free, as the papers have it: it is the sign bit of an adder's input. A padded zero is a pair like
any other. Biases, normalisation, activation functions, pooling and residual additions are not counted: a
percent or two of the pairs in ResNet-20, less in the larger networks.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, final

from torch import Tensor, nn

from q_adder.integer import IntegerAdderConv2d, IntegerAdderLinear, IntegerAdderMatmul
from q_adder.layers import AdderConv2d, AdderLinear, AdderMatmul
from q_adder.models.deit import ProductMatmul
from q_adder.quantized import QuantAdderConv2d, QuantAdderLinear, QuantAdderMatmul
from q_core.calibrate import evaluation
from q_core.errors import StateError

Pairs = Callable[[Any, tuple[Any, ...], Any], int]
"""From a layer, its inputs and its output to its number of pairs."""


def _conv_pairs(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> int:
    # Every element of the output meets a kernel; of a transposed convolution, every element of the input.
    elements = inputs[0].numel() if layer.transposed else output.numel()
    # Not the weight, which a packed layer does not have.
    channels = (layer.out_channels if layer.transposed else layer.in_channels) // layer.groups
    return int(elements) * int(math.prod((channels, *layer.kernel_size)))


def _linear_pairs(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> int:
    return output.numel() * int(layer.in_features)


def _matmul_pairs(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> int:
    return output.numel() * int(inputs[0].shape[-1])


PRODUCTS: Mapping[type[nn.Module], Pairs] = MappingProxyType(
    {
        nn.Conv1d: _conv_pairs,
        nn.Conv2d: _conv_pairs,
        nn.Conv3d: _conv_pairs,
        nn.ConvTranspose1d: _conv_pairs,
        nn.ConvTranspose2d: _conv_pairs,
        nn.ConvTranspose3d: _conv_pairs,
        nn.Linear: _linear_pairs,
        ProductMatmul: _matmul_pairs,
    }
)
"""Layers that multiply, and how their pairs are counted. Subclasses count as their parent unless listed themselves."""

DISTANCES: Mapping[type[nn.Module], Pairs] = MappingProxyType(
    {
        AdderConv2d: _conv_pairs,
        AdderLinear: _linear_pairs,
        AdderMatmul: _matmul_pairs,
        QuantAdderConv2d: _conv_pairs,
        QuantAdderLinear: _linear_pairs,
        QuantAdderMatmul: _matmul_pairs,
        IntegerAdderConv2d: _conv_pairs,
        IntegerAdderLinear: _linear_pairs,
        IntegerAdderMatmul: _matmul_pairs,
    }
)
"""Layers that sum absolute differences, float, quantized or packed, and how their pairs are counted."""


@final
@dataclasses.dataclass(frozen=True)
class Operations:
    """Numbers of operations.

    Attributes:
        multiplications: Multiplications of two numbers.
        additions: Additions and subtractions of two numbers.
        xnors: One-bit products.
    """

    multiplications: int = 0
    additions: int = 0
    xnors: int = 0

    def __add__(self, other: "Operations") -> "Operations":
        """Add the numbers of each kind."""
        return Operations(
            self.multiplications + other.multiplications, self.additions + other.additions, self.xnors + other.xnors
        )


@final
@dataclasses.dataclass(frozen=True)
class LayerCount:
    """The pairs of one layer.

    Attributes:
        path: Path of the layer.
        kind: Name of its class.
        pairs: How often a weight, or a second activation, meets an activation, over all calls and images of the run.
        adds: Whether the layer sums absolute differences; such a layer is a binary one in the binary network.
    """

    path: str
    kind: str
    pairs: int
    adds: bool

    @property
    def as_product(self) -> Operations:
        """Operations if the layer multiplies."""
        return Operations(multiplications=self.pairs, additions=self.pairs)

    @property
    def as_built(self) -> Operations:
        """Operations of the layer as it is."""
        return Operations(additions=2 * self.pairs) if self.adds else self.as_product

    @property
    def as_binary(self) -> Operations:
        """Operations if the layer is binary where it adds, and as it is elsewhere."""
        return Operations(additions=self.pairs, xnors=self.pairs) if self.adds else self.as_product


@final
@dataclasses.dataclass(frozen=True)
class OperationCount:
    """The operations of a network.

    Attributes:
        layers: Every counted layer that ran, in the order of the modules.
        uncounted: Path and class of every module that holds parameters and was not counted: norms, layers of a kind
            that is not in the tables, and layers that did not run. Of a packed model, whose parts hold their tensors as
            buffers, only what has parameters left.
    """

    layers: tuple[LayerCount, ...]
    uncounted: Mapping[str, str]

    @property
    def as_product(self) -> Operations:
        """Operations of the twin that multiplies everywhere (CNN)."""
        return sum((layer.as_product for layer in self.layers), Operations())

    @property
    def as_built(self) -> Operations:
        """Operations of the network as it is (AddNN)."""
        return sum((layer.as_built for layer in self.layers), Operations())

    @property
    def as_binary(self) -> Operations:
        """Operations of the twin that is binary where this network adds (BNN)."""
        return sum((layer.as_binary for layer in self.layers), Operations())

    def __str__(self) -> str:
        """Lay out a table: one line per layer, then the totals of the three executions."""
        width = max([5, *(len(layer.path) for layer in self.layers)])
        lines = [f"{'layer':{width}}  {'pairs':>14}  adds"]
        lines += [f"{x.path:{width}}  {x.pairs:>14,}  {'yes' if x.adds else 'no'}" for x in self.layers]
        lines.append(f"{'total':{width}}  {'#mul':>14} {'#add':>14} {'#xnor':>14}")
        for name, total in (("CNN", self.as_product), ("BNN", self.as_binary), ("AddNN", self.as_built)):
            numbers = " ".join(f"{n:>14,}" for n in (total.multiplications, total.additions, total.xnors))
            lines.append(f"{name:{width}}  {numbers}")
        return "\n".join(lines)


def count_operations(
    model: nn.Module,
    *inputs: Any,
    products: Mapping[type[nn.Module], Pairs] = PRODUCTS,
    distances: Mapping[type[nn.Module], Pairs] = DISTANCES,
) -> OperationCount:
    """Run a model once and count the operations of its layers.

    The model is left as it was: it runs in evaluation mode without gradients, and the hooks are taken off again. Give
    it one image for the counts of one image. Build model and input on the `meta` device and nothing is computed at
    all.

    Args:
        model: Any model. Products and distances written as functions, not modules, cannot be seen.
        *inputs: What the model is called with. A packed model has values to compute with and runs where they are.
        products: Layers that multiply; add your own as `{**PRODUCTS, MyLayer: pairs}`.
        distances: Layers that sum absolute differences. A layer in both tables is counted by the closest class.

    Returns:
        The counts; a layer that runs twice counts twice.

    Raises:
        StateError: No layer of the tables ran.
    """
    pairs: dict[str, int] = {}
    chosen = {name: _counter(type(module), products, distances) for name, module in model.named_modules()}
    handles = []
    try:
        for name, module in model.named_modules():
            if (found := chosen[name]) is not None:
                handles.append(module.register_forward_hook(_hook(pairs, name, found[0]), with_kwargs=True))
        with evaluation(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not pairs:
        raise StateError(
            f"no layer of {type(model).__name__} was counted: none is in the tables, or none ran. Give its layers in "
            "products= or distances="
        )
    modules = dict(model.named_modules())
    layers = tuple(
        LayerCount(name, type(modules[name]).__name__, pairs[name], found[1])
        for name, found in chosen.items()
        if found is not None and name in pairs
    )
    uncounted = {
        name: type(module).__name__
        for name, module in modules.items()
        if name not in pairs and next(module.parameters(recurse=False), None) is not None
    }
    return OperationCount(layers, MappingProxyType(uncounted))


def _counter(
    kind: type[nn.Module], products: Mapping[type[nn.Module], Pairs], distances: Mapping[type[nn.Module], Pairs]
) -> tuple[Pairs, bool] | None:
    """Find how a class is counted and whether it adds: by itself, or by the closest of its parents."""
    for parent in kind.__mro__:
        if parent in distances:
            return distances[parent], True
        if parent in products:
            return products[parent], False
    return None


def _hook(pairs: dict[str, int], name: str, counter: Pairs) -> Callable[..., None]:
    def add(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        pairs[name] = pairs.get(name, 0) + counter(module, (*inputs, *named.values()), output)

    return add
