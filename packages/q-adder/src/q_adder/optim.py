r"""The learning-rate rule of adder layers, applied where it is right: in the optimizer's step.

An adder layer's weight gradient is normalised to $\eta \sqrt{k}$, with $k$ the number of weights of the layer. Done in
the backward pass, as elsewhere, the rule breaks under loss scaling (the normalised gradient is divided by the scale),
under gradient accumulation (normalised parts are added) and under data parallelism (normalised replicas are averaged).
Here it runs once per step, on the gradient that the optimizer is about to use.
"""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from q_adder.layers import AdderConv2d, AdderLinear
from q_adder.quantized import QuantAdderConv2d, QuantAdderLinear
from q_core.errors import MatchError, RangeError, StateError


def adder_weights(model: nn.Module) -> list[nn.Parameter]:
    """List the weights of all adder layers of a model that are trained, float and quantized, each once.

    Frozen weights, which have `requires_grad=False`, are left away.

    Args:
        model: A model with adder layers.

    Raises:
        MatchError: The model has none, or all are frozen.
        StateError: The weight of a layer is computed from other tensors, by weight norm or the like.
    """
    kinds = (AdderConv2d, AdderLinear, QuantAdderConv2d, QuantAdderLinear)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    if not layers:
        raise MatchError(f"{type(model).__name__} has no adder layer: leave the rule away for a model of other layers")
    for path, layer in layers.items():
        if layer._parameters.get("weight") is None:
            raise StateError(
                f"the weight of {path or 'the layer'} is computed from other tensors, by weight norm, pruning or so, "
                "and the rule is about the gradient of the weight itself: take the parametrization off"
            )
    weights: list[Any] = [layer.weight for layer in layers.values() if layer.weight.requires_grad]
    if not weights:
        raise MatchError(
            f"all {len(layers)} adder layers are frozen, {next(iter(layers))!r} to begin with: leave the rule away, or "
            "set requires_grad before"
        )
    return list(dict.fromkeys(weights))


_ruled: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()
"""The weights of each optimizer that have a rule. An optimizer keeps its weights alive, so an id stays that of one."""


class AdderLearningRate:
    r"""Scales the gradient of every adder weight to $\eta \sqrt{k} / \lVert g \rVert_2$ just before each step.

    The update is the same for any scale of the loss and any split of the batch by accumulation or over ranks. A
    gradient of zero stays zero; one with a NaN or an infinity becomes NaN throughout, so it is seen. The rule rewrites
    `grad`: clear it after each step, as usual.

    A step that is given a closure evaluates the gradient itself, and the rule runs after the closure. Optimizers that
    compare gradients of several evaluations, such as LBFGS, then compare normalised ones, which are the gradients of no
    function: do not use them with this rule.

    The rule has no state of its own and is not part of the optimizer's state dict: a new optimizer needs it again. One
    that loads a state keeps it.

    Args:
        optimizer: The optimizer that holds the weights.
        weights: Weights of adder layers, see `adder_weights`. Under data parallelism those of the wrapped model. Frozen
            ones are passed over.
        eta: Length of the update per weight, relative to the learning rate. 0.2 for all published networks.

    Raises:
        RangeError: `eta` is not positive and finite.
        StateError: There is no weight, or one does not belong to the optimizer, or has a rule there already.

    Source:
        Chen et al. 2020, arXiv:1912.13200, eq. 12 and 13; eta = 0.2 as released.
    """

    def __init__(self, optimizer: Optimizer, weights: Iterable[nn.Parameter], *, eta: float = 0.2) -> None:
        if not 0 < eta < float("inf"):
            raise RangeError(f"eta={eta}: it must be positive and finite; 0.2 is what all published networks use")
        self.eta, self.weights = eta, [weight for weight in weights if weight.requires_grad]
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        strangers = [weight for weight in self.weights if id(weight) not in held]
        if strangers or not self.weights:
            first = f", one of shape {tuple(strangers[0].shape)} to begin with" if strangers else ""
            raise StateError(
                f"{len(strangers)} of {len(self.weights)} adder weights are not in the optimizer{first}: build it over "
                "all parameters of the model first"
            )
        ruled = _ruled.setdefault(optimizer, set())
        again = sum(id(weight) in ruled for weight in self.weights)
        if again:
            raise StateError(
                f"{again} of {len(self.weights)} adder weights have a rule in this optimizer already, which loading a "
                "state does not take off: keep that one, or remove() it first"
            )
        ruled.update(id(weight) for weight in self.weights)
        self._ruled = ruled
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # The arguments are those of `step`, the optimizer itself in the first place.
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._followed(args[1], optimizer), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, kwargs | {"closure": self._followed(kwargs["closure"], optimizer)}
        self.normalize_(optimizer)
        return None

    def _followed(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def closure_then_rule() -> Any:
            loss = closure()
            self.normalize_(optimizer)
            return loss

        return closure_then_rule

    @torch.no_grad()
    def normalize_(self, optimizer: Optimizer) -> None:
        """Normalise the gradients in place. Runs by itself in every step of the optimizer."""
        # Fused optimizers divide by this inside their kernel, after this rule.
        scale: Any = getattr(optimizer, "grad_scale", None)
        for weight in self.weights:
            if weight.grad is not None:
                _set_length_(weight.grad, self.eta * weight.numel() ** 0.5, scale)

    def remove(self) -> None:
        """Take the rule off the optimizer."""
        self._handle.remove()
        self._ruled.difference_update(id(weight) for weight in self.weights)


def _set_length_(grad: Tensor, length: float, scale: Tensor | None) -> None:
    # Squares of large or small gradients leave the range of float32, so the largest is brought to 1 beforehand.
    grad.div_(_or_one(torch.linalg.vector_norm(grad, float("inf"))))
    norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    factor = length / _or_one(norm)
    grad.mul_(factor if scale is None else factor * scale.to(factor.device))


def _or_one(norm: Tensor) -> Tensor:
    return torch.where(norm == 0, torch.ones_like(norm), norm)
