"""The outputs of layers, channel by channel, while a model runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


def channel_rows(output: Tensor, layer: nn.Module) -> Tensor:
    """Return the output of a layer as [positions, channels]."""
    last = output.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else output
    return last.reshape(-1, last.shape[-1])


def shifted(output: Tensor, shift: Tensor, layer: nn.Module) -> Tensor:
    """Add a number to each channel of the output of a layer."""
    return output + (shift.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else shift).to(output.dtype)


@contextmanager
def hooked(model: nn.Module, paths: Iterable[str], look: Callable[..., Any]) -> Iterator[None]:
    """Call `look(path, layer, inputs, output)` after each of some layers; what it returns takes the output's place."""
    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(partial(look, path)).remove)
        yield
