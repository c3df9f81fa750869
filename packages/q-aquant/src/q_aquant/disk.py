"""Activations in memory-mapped files, for what fits into no memory.

A file is locked while its process lives, so that what a killed process left behind can be told from what another one
is using. Each sample has a checksum, and the size of the file is looked at before it is touched: a damaged file is an
error, not a number.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import NoReturn, final

import torch
from torch import Tensor

from q_aquant.caches import GIB, Cache, Storage, row_bytes, size_text
from q_core.errors import FormatError, RangeError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_WORD = 8  # bytes of the integers that a checksum adds
_NAME, _UNNAMED, _SUFFIX = "activations-", ".new", ".bin"


@final
class OnDisk(Storage):
    """Keeps activations in memory-mapped files.

    A file takes its room when it is made, so that a full disk is noticed then, and is removed when its cache is closed.
    Files that a killed process left in the folder are removed as well; other processes may use the same folder.

    Args:
        folder: Where the files are; made if there is none.
        budget: Bytes that all open caches may take together.
    """

    advice = "raise the budget, or take fewer images"

    def __init__(self, folder: str | os.PathLike[str], budget: int = 256 * GIB) -> None:
        super().__init__(budget)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_orphans(self.folder)

    def _make(self, count: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> Cache:
        need, free = count * row_bytes(sample_shape, dtype), shutil.disk_usage(self.folder).free
        if need > free:
            raise RangeError(
                f"{count} samples of shape {sample_shape} in {dtype} need {size_text(need)}; {size_text(free)} are "
                f"free in {self.folder}: give another folder, or take fewer images"
            )
        return _FileCache(count, sample_shape, dtype, self.folder)


class _FileCache(Cache):
    """Rows of a file, each with a checksum: the sum of its 64-bit words, which costs little beside reading them."""

    def __init__(self, count: int, sample_shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> None:
        super().__init__(count, sample_shape, dtype)
        self._row = row_bytes(sample_shape, dtype)
        self._length = max(1, -(-self._row // _WORD)) * _WORD
        self._sums = torch.zeros(count, dtype=torch.int64)
        # A mapping of nothing is refused.
        self._path, self._file = _new_file(folder, max(_WORD, count * self._length))
        self._size = os.fstat(self._file).st_size
        self._map = [torch.from_file(str(self._path), shared=True, size=self._size, dtype=torch.uint8)]
        path, file = self._path, self._file
        self._closing += [self._map.clear, lambda: path.unlink(missing_ok=True), lambda: os.close(file)]

    def _allocate(self, device: torch.device) -> None:
        pass

    def _rows(self) -> Tensor:
        # Touching a mapping beyond the end of its file would kill the process.
        try:
            now = self._path.stat()
        except OSError as error:
            self._damaged("is missing", error)
        if now.st_size != self._size:
            self._damaged(f"holds {now.st_size} bytes instead of {self._size}")
        return self._map[0][: self.count * self._length].view(self.count, self._length)

    def _damaged(self, how: str, cause: Exception | None = None) -> NoReturn:
        raise FormatError(
            f"{self._path}, a file of cached activations, {how}: leave the folder alone while units are reconstructed, "
            "and start again"
        ) from cause

    def _put(self, start: int, batch: Tensor) -> None:
        rows = self._rows()[start : start + len(batch)]
        if batch.numel():
            # A copy: the strides of axes of length 1 may be anything, and a view of the bytes minds them.
            values = batch.cpu().reshape(len(batch), -1).clone(memory_format=torch.contiguous_format)
            rows[:, : self._row] = values.view(torch.uint8)
        self._sums[start : start + len(batch)] = rows.view(torch.int64).sum(1)

    def _take(self, indices: Tensor, device: torch.device) -> Tensor:
        indices = indices.cpu()
        rows = self._rows().index_select(0, indices)
        wrong = indices[rows.view(torch.int64).sum(1) != self._sums[indices]]
        if wrong.numel():
            self._damaged(f"is damaged at sample {int(wrong[0])}")
        values = rows[:, : self._row].contiguous().view(self.dtype)
        return values.reshape(len(indices), *self._stored_shape).to(device)


def _new_file(folder: Path, size: int) -> tuple[Path, int]:
    """Make a file of the given size and lock it, which tells others that its process lives."""
    file, unnamed = tempfile.mkstemp(_UNNAMED, _NAME, folder)
    path = Path(unnamed)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        path = path.rename(path.with_suffix(_SUFFIX))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            for at in range(0, size, 1 << 20):
                os.write(file, bytes(min(1 << 20, size - at)))
    except OSError as error:
        os.close(file)
        path.unlink(missing_ok=True)
        raise RangeError(
            f"{folder} has no room for a file of {size_text(size)}: {error.strerror}; give another folder, or take "
            "fewer images"
        ) from error
    return path, file


def _remove_orphans(folder: Path) -> None:
    for path in folder.glob(f"{_NAME}*{_SUFFIX}") if fcntl is not None else ():
        with contextlib.suppress(OSError), path.open("rb") as file:  # locked by a process that lives, or just removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
