"""A grid that no longer learns, for grids whose codes are no nearest levels and cannot become a table."""

import copy
from typing import TypeVar

from q_core.grid import Grid

_Grid = TypeVar("_Grid", bound=Grid)


def without_parameters(grid: _Grid) -> _Grid:
    """Return a copy of the grid in which each parameter has become a buffer of the same name and value."""
    twin = copy.deepcopy(grid)
    for module in twin.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    return twin
