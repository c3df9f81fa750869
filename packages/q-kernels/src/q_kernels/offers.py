"""What the package offers for each operator: kernels for CPUs and for GPUs, side by side.

An entry point has room for one name, so it leads here, where the kernels of both are put together when they are asked
for. Kernels for CPUs need numba; without it those for GPUs are offered all the same, and the reason is logged once.
"""

import functools
import importlib
import logging

from q_core.kernels import Kernel

_MODULES = {
    "fake_quantize": ("cpu.fake", "gpu.fake"),
    "fake_quantize_grad": ("cpu.fake", "gpu.fake"),
    "fake_quantize_levels": ("cpu.levels", "gpu.levels"),
    "fake_quantize_levels_grad": ("cpu.levels", "gpu.levels"),
    "distance_conv2d": ("cpu.adder", "gpu.adder"),
    "distance_conv2d_input_grad": ("cpu.adder", "gpu.adder"),
}

_log = logging.getLogger(__name__)


def __getattr__(name: str) -> tuple[Kernel, ...]:
    """Return the kernels of an operator; those whose module cannot be imported are left out."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it offers {', '.join(_MODULES)}")
    found: list[Kernel] = []
    for module in _MODULES[name]:
        try:
            found += getattr(importlib.import_module(f"q_kernels.{module}"), name)
        except (ImportError, OSError) as error:
            _warn_once(f"some kernels cannot be loaded, others run in their place: {error}")
    return tuple(found)


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)
