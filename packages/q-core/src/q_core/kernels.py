"""How an operator finds a faster implementation than its meaning in plain torch.

A package that owns an operator declares it with its meaning, an `Operator`. A package of kernels offers `Kernel`s for
it under the entry-point group `q_core.kernels`, by the name of the operator. Neither imports the other.

For every call the kernels are asked in turn whether they refuse. Of the rest, the one runs that was measured to be
fastest on work of that kind. `Operator.explain` tells which, and why not the others.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, final

from q_core.errors import BackendError

GROUP = "q_core.kernels"
REFERENCE = "reference"

_log = logging.getLogger(__name__)
_wanted: contextvars.ContextVar[str | None] = contextvars.ContextVar("q_core_kernel", default=None)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A faster implementation of an operator.

    Attributes:
        name: What `explain` calls it, such as `cpu-sad`.
        refuses: Takes the arguments of the operator; returns why the kernel cannot run them, or None.
        rate: Takes the same; returns how much work it does a second, in the unit of the operator, as measured.
        run: Takes the same; computes what the meaning computes.
    """

    name: str
    refuses: Callable[..., str | None]
    rate: Callable[..., float]
    run: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation runs, and why.

    Attributes:
        kernel: The implementation.
        rate: Its measured rate, in the unit of the operator; 0 for the reference.
        others: For every other implementation, why it does not run.
    """

    kernel: Kernel
    rate: float
    others: dict[str, str]

    def __str__(self) -> str:
        """Say it in one line for each implementation."""
        if self.kernel.name == REFERENCE:
            reason = "runs, in plain torch"
        else:
            reason = "runs, measured to be the fastest of those that can"
        return "\n".join(f"{name}: {why}" for name, why in {self.kernel.name: reason, **self.others}.items())


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


@final
class Operator:
    """An operator with a meaning in plain torch and any number of kernels.

    Args:
        name: Package and function, such as `q_adder.distance_conv2d`; kernels are offered under it.
        meaning: Computes the result in plain torch, on any device.
        kernels: Implementations that the owner of the operator brings itself.
    """

    def __init__(self, name: str, meaning: Callable[..., Any], kernels: Sequence[Kernel] = ()) -> None:
        self.name = name
        self.reference = Kernel(REFERENCE, lambda *_: None, lambda *_: 0.0, meaning)
        self._own = tuple(kernels)
        self._offered: tuple[Kernel, ...] = ()
        self._told = False

    @functools.cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """Every implementation but the reference: the owner's, those of installed packages, those offered by hand.

        Of several with one name the last counts.
        """
        found = list(self._own)
        for entry in metadata.entry_points(group=GROUP, name=self.name):
            try:
                found += entry.load()
            except (ImportError, OSError) as error:
                # The package of kernels is there, but not what it needs: said once, and not in the way of the user.
                _warn_once(f"the kernels of {entry.module} cannot be loaded, others run in their place: {error}")
        return tuple({kernel.name: kernel for kernel in (*found, *self._offered)}.values())

    def offer(self, kernels: Sequence[Kernel]) -> None:
        """Add implementations by hand, where the package that brings them is on the path but not installed."""
        self._offered = (*self._offered, *kernels)
        self.__dict__.pop("kernels", None)

    def choose(self, *arguments: Any) -> Choice:
        """Find the implementation for these arguments.

        Raises:
            BackendError: Inside `only`, the implementation asked for is not there or refuses.
        """
        wanted = _wanted.get()
        others: dict[str, str] = {}
        able: dict[str, tuple[float, Kernel]] = {}
        for kernel in (self.reference, *self.kernels):
            reason = kernel.refuses(*arguments)
            if reason is None and wanted in (None, kernel.name):
                able[kernel.name] = (kernel.rate(*arguments), kernel)
            else:
                others[kernel.name] = reason or f"only {wanted} is asked for"
        if not able:
            reason = others.get(str(wanted), f"there are only {', '.join(others)}")
            raise BackendError(
                f"{self.name}: {wanted} cannot run: {reason}; leave the block of only() to let others run"
            )
        rate, best = max(able.values(), key=lambda entry: entry[0])
        del able[best.name]
        slower = dict.fromkeys(able, "measured to be slower on work of this kind")
        return Choice(best, rate, {**slower, **others})

    def explain(self, *arguments: Any) -> str:
        """Say which implementation runs these arguments, and why not the others."""
        return str(self.choose(*arguments))

    def __call__(self, *arguments: Any) -> Any:
        """Run the implementation for these arguments."""
        choice = self.choose(*arguments)
        if choice.kernel is self.reference and choice.others and _wanted.get() is None and not self._told:
            self._told = True
            _log.info(
                "%s runs in plain torch (%s)", self.name, "; ".join(f"{n}: {why}" for n, why in choice.others.items())
            )
        return choice.kernel.run(*arguments)


@contextlib.contextmanager
def only(name: str) -> Iterator[None]:
    """Let only the implementation `name` run inside the block; `"reference"` is the meaning in plain torch.

    Calls of an operator that does not have it, or where it refuses, raise `BackendError`. The block governs its own
    thread; the backward pass of a GPU runs in another.
    """
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)
