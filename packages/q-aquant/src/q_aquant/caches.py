"""Activations of the calibration images, kept where there is room for them.

A `Storage` is a place with a budget of bytes: the device of the model, the memory of the host, or a folder. It hands
out caches. A cache is written image after image and read in any order, and gives tensors back on the device they came
from, whatever the place. More than the budget is an error that says what is needed, never a silent move elsewhere.
"""

import abc
import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NoReturn, final

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn

from q_core.calibrate import evaluation
from q_core.errors import DataError, MatchError, RangeError, ShapeError, SpecError, StateError

GIB = 1 << 30


class Cache(abc.ABC):
    """Samples of one shape and dtype, by their index. Made by a `Storage`; close it, or use it in a `with` statement.

    What is read has the order of memory of the first batch that was written, plain or channels last: a convolution on a
    CPU may take twice as long in the one as in the other.

    Attributes:
        count: Number of samples.
        sample_shape: Shape of one.
        dtype: Kept as it is.
    """

    def __init__(self, count: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.count, self.sample_shape, self.dtype = count, sample_shape, dtype
        self._device: torch.device | None = None
        self._written = torch.zeros(count, dtype=torch.bool)
        self._complete = False
        self._channels_last = False
        self._closing: list[Callable[[], object]] = []
        # Also when it is forgotten, and at the end of the interpreter.
        self._finalizer = weakref.finalize(self, _run_all, self._closing)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.count

    def __enter__(self) -> "Cache":
        """Return the cache."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def write(self, start: int, batch: Shaped[Tensor, "rows *sample"]) -> None:
        """Write samples that follow one another. Reading returns to the device of the first batch.

        Args:
            start: Index of the first.
            batch: The samples.

        Raises:
            ShapeError: Samples of another shape.
            SpecError: Samples of another dtype.
            RangeError: More samples than the cache has room for; or no memory for them.
            StateError: The cache is closed.
            FormatError: The file is missing, or has changed its size.
        """
        self._check_open()
        if tuple(batch.shape[1:]) != self.sample_shape:
            raise ShapeError(
                f"samples of shape {tuple(batch.shape[1:])} written to a cache of samples of shape "
                f"{self.sample_shape}: all images must have the same size"
            )
        if batch.dtype != self.dtype:
            raise SpecError(f"samples in {batch.dtype} written to a cache of {self.dtype}: allocate one in their dtype")
        stop = start + len(batch)
        if start < 0 or stop > self.count:
            raise RangeError(f"samples {start} to {stop} written to a cache of {self.count}")
        if self._device is None:
            self._channels_last = not batch.is_contiguous() and batch.is_contiguous(memory_format=torch.channels_last)
            self._allocate(batch.device)
            self._device = batch.device
        self._put(start, batch.detach().permute(0, 2, 3, 1) if self._channels_last else batch.detach())
        self._written[start:stop] = True
        self._complete = bool(self._written.all())

    def read(self, indices: Int64[Tensor, " rows"]) -> Shaped[Tensor, "rows *sample"]:
        """Gather samples into a new tensor.

        Args:
            indices: Which, in any order; best on the host, except for a cache on the device. Indices on a GPU are not
                checked there, since that would wait for it.

        Raises:
            RangeError: An index outside the cache.
            StateError: A sample that was not written, or the cache is closed.
            FormatError: The file is missing or damaged.
        """
        self._check_open()
        if self._device is None or not self._complete or indices.device.type == "cpu":
            self._check_indices(indices.cpu())
        rows = self._take(indices, self._device or torch.device("cpu"))
        return rows.permute(0, 3, 1, 2) if self._channels_last else rows

    def close(self) -> None:
        """Let go of the memory or the file, and of its part of the budget. May be called again."""
        self._finalizer()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        """Shape of one sample as it lies in memory."""
        shape = self.sample_shape
        return (*shape[1:], shape[0]) if self._channels_last else shape

    @property
    def nbytes(self) -> int:
        """Bytes of the budget that it takes."""
        return self.count * row_bytes(self.sample_shape, self.dtype)

    def _check_open(self) -> None:
        if self.closed:
            raise StateError("the cache is closed: its samples are gone")

    def _check_indices(self, indices: Tensor) -> None:
        if not indices.numel():
            return
        low, high = (int(each) for each in indices.aminmax())
        if low < 0 or high >= self.count:
            raise RangeError(f"index {low if low < 0 else high} of a cache of {self.count} samples")
        if self._complete:
            return
        missing = indices[~self._written[indices]]
        if missing.numel():
            raise StateError(f"sample {int(missing[0])} was not written: write all samples before reading them")

    @abc.abstractmethod
    def _allocate(self, device: torch.device) -> None:
        """Make room for samples from a device."""

    @abc.abstractmethod
    def _put(self, start: int, batch: Tensor) -> None:
        """Write checked samples, [rows, *_stored_shape]."""

    @abc.abstractmethod
    def _take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Gather checked samples on a device, [rows, *_stored_shape]."""


class Storage(abc.ABC):
    """A place for caches, with a budget.

    Args:
        budget: Bytes that all open caches may take together.

    Raises:
        SpecError: A budget below 0.
    """

    advice = "raise the budget, take fewer images, or keep them on disk with OnDisk(folder)"
    """What to do when the budget is too small."""

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise SpecError(f"budget={budget}: it is a number of bytes, at least 0")
        self.budget = budget
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes that the open caches take."""
        return self._used

    def allocate(self, count: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> Cache:
        """Make a cache.

        Args:
            count: Number of samples.
            sample_shape: Shape of one.
            dtype: Its dtype.

        Raises:
            RangeError: It does not fit into what is left of the budget.
        """
        need = count * row_bytes(sample_shape, dtype)
        if need > self.budget - self._used:
            raise RangeError(
                f"{count} samples of shape {tuple(sample_shape)} in {dtype} need {size_text(need)}; "
                f"{size_text(self.budget - self._used)} of a budget of {size_text(self.budget)} are left in "
                f"{type(self).__name__}: {self.advice}"
            )
        cache = self._make(count, tuple(sample_shape), dtype)
        self._used += need
        cache._closing.append(lambda: self._release(need))
        return cache

    def _release(self, amount: int) -> None:
        self._used -= amount

    @abc.abstractmethod
    def _make(self, count: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> Cache:
        """Make a cache that fits."""


@final
class OnDevice(Storage):
    """Keeps activations on the device they come from: the fastest, where that has room.

    Args:
        budget: Bytes that all open caches may take together.
    """

    advice = "raise the budget, take fewer images, or keep them in InHostMemory() or OnDisk(folder)"

    def __init__(self, budget: int = 8 * GIB) -> None:
        super().__init__(budget)

    def _make(self, count: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> Cache:
        return _MemoryCache(count, sample_shape, dtype, on_host=False)


@final
class InHostMemory(Storage):
    """Keeps activations in the memory of the host, pinned if they come from a GPU.

    Args:
        budget: Bytes that all open caches may take together.
    """

    def __init__(self, budget: int = 8 * GIB) -> None:
        super().__init__(budget)

    def _make(self, count: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> Cache:
        return _MemoryCache(count, sample_shape, dtype, on_host=True)


class _MemoryCache(Cache):
    def __init__(self, count: int, sample_shape: tuple[int, ...], dtype: torch.dtype, *, on_host: bool) -> None:
        super().__init__(count, sample_shape, dtype)
        self._on_host = on_host
        self._rows: list[Tensor] = []  # a list, so that closing lets go of the tensor
        self._closing.append(self._rows.clear)

    def _allocate(self, device: torch.device) -> None:
        place = torch.device("cpu") if self._on_host else device
        pinned = self._on_host and device.type == "cuda"
        shape = (self.count, *self._stored_shape)
        try:
            self._rows.append(torch.empty(shape, dtype=self.dtype, device=place, pin_memory=pinned))
        except (RuntimeError, MemoryError) as error:
            raise RangeError(
                f"{place} has no room for {size_text(self.nbytes)} of activations, though the budget allows them: take "
                "fewer images, or keep them on disk with OnDisk(folder)"
            ) from error

    def _put(self, start: int, batch: Tensor) -> None:
        self._rows[0][start : start + len(batch)].copy_(batch)

    def _take(self, indices: Tensor, device: torch.device) -> Tensor:
        (rows,) = self._rows or [torch.empty(0, *self._stored_shape, dtype=self.dtype)]
        if rows.device == device:
            return rows.index_select(0, indices.to(device))
        # From pinned to pinned memory; torch keeps the latter until the copy to the device is over.
        staged = torch.empty((len(indices), *self._stored_shape), dtype=self.dtype, pin_memory=rows.is_pinned())
        return torch.index_select(rows, 0, indices.cpu(), out=staged).to(device, non_blocking=True)


def _run_all(actions: list[Callable[[], object]]) -> None:
    with contextlib.ExitStack() as stack:
        for action in reversed(actions):
            stack.callback(action)


def row_bytes(sample_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of one sample."""
    return math.prod(sample_shape) * dtype.itemsize


def size_text(count: int) -> str:
    """Write a number of bytes for people."""
    unit, name = next(((u, n) for u, n in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")) if count >= u), (1, "B"))
    return f"{count / unit:.3g} {name}" if unit > 1 else f"{count} B"


class _Reached(BaseException):
    """Ends a pass at the unit. Not an `Exception`, so that no handler in a model takes it for a fault."""


def collect(
    model: nn.Module,
    images: Shaped[Tensor, "images *shape"],
    path: str,
    storage: Storage,
    *,
    batch_size: int = 64,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Cache:
    """Run a model as far as one of its modules, and keep the input of that module.

    Runs in evaluation mode without gradients; the mode of every module is restored.

    Args:
        model: The model, on the device of the images.
        images: Inputs of the model.
        path: Path of the module; it takes one tensor.
        storage: Where the input is kept.
        batch_size: Images in a pass.
        memory_format: Order of memory in which the images enter the model.

    Returns:
        A cache with a sample for each image. Close it.

    Raises:
        MatchError: There is no such module.
        DataError: There is no image.
        StateError: The module does not run.
        ShapeError: It takes something else than one tensor with the images along its first axis.
        RangeError: The budget of the storage is too small.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise MatchError(f"module {path!r} is not in a {type(model).__name__}: see model.named_modules()") from error

    def entering(batch: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                given = [type(each).__name__ for each in args] + [f"{name}=" for name in kwargs]
                raise ShapeError(f"module {path!r} is called with ({', '.join(given)}): allowed is one tensor")
            seen.append(args[0])
            raise _Reached

        handle = module.register_forward_pre_hook(look, with_kwargs=True)
        try:
            model(batch)
        except _Reached:
            return seen[0]
        finally:
            handle.remove()
        raise StateError(f"module {path!r} did not run: leave it out of the units")

    def batches(size: int) -> Iterator[Tensor]:
        starts = range(0, len(images), size)
        return (images[at : at + size].to(memory_format=memory_format) for at in starts)

    with evaluation(model):
        return _fill(batches, entering, len(images), storage, batch_size, f"module {path!r} takes")


def run_unit(unit: nn.Module, inputs: Cache, storage: Storage, *, batch_size: int = 64) -> Cache:
    """Run a module on cached inputs, and keep its output.

    Runs in evaluation mode without gradients; the mode of every module is restored.

    Args:
        unit: The module, on the device that the inputs came from.
        inputs: A sample for each image. Stays open.
        storage: Where the output is kept.
        batch_size: Images in a pass.

    Returns:
        A cache with a sample for each image. Close it.

    Raises:
        DataError: There is no image.
        ShapeError: The module returns something else than one tensor with the images along its first axis.
        RangeError: The budget of the storage is too small.
    """

    def batches(size: int) -> Iterator[Tensor]:
        starts = range(0, len(inputs), size)
        return (inputs.read(torch.arange(at, min(at + size, len(inputs)))) for at in starts)

    with evaluation(unit):
        return _fill(batches, unit, len(inputs), storage, batch_size, f"a {type(unit).__name__} returns")


def _fill(
    batches: Callable[[int], Iterator[Tensor]],
    function: Callable[[Tensor], Any],
    count: int,
    storage: Storage,
    batch_size: int,
    what: str,
) -> Cache:
    """Write what a function makes of every batch."""
    if batch_size < 1:
        raise SpecError(f"batch_size={batch_size}: it must be at least 1")
    if not count:
        raise DataError("there is no image: give at least one")
    cache: Cache | None = None
    start = 0
    try:
        for batch in batches(batch_size):
            value = function(batch)
            if not isinstance(value, Tensor) or value.shape[:1] != (len(batch),):
                shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
                raise ShapeError(
                    f"{what} a value of {shown} for {len(batch)} images: allowed is one tensor, an image a row"
                )
            if cache is None:
                cache = storage.allocate(count, tuple(value.shape[1:]), value.dtype)
            cache.write(start, value)
            start += len(batch)
    except BaseException:
        if cache is not None:
            cache.close()
        raise
    if cache is None:
        raise DataError("there is no image: give at least one")
    return cache
