"""Fast kernels for the operators of low-bit networks.

Nothing here is called by name: packages that own operators find the kernels through `q_core.kernels`, under the
entry-point group of that name. `q_core.kernels.Operator.explain` tells which kernel runs and why.
"""

from importlib import metadata as _metadata

try:
    __version__ = _metadata.version("q-kernels")
except _metadata.PackageNotFoundError:  # run from a source tree that is on the path but not installed
    __version__ = "0+source"

__all__: list[str] = []
