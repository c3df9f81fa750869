"""Laws that every grid, rounding and observer must obey, as functions to run on parts of your own.

`check_grid(MyGrid(...))`, `check_rounding(MyRounding())` and `check_observer(MyObserver)` return nothing or raise a
`LawError` that names the law, the value and what was expected. Everything else in the family relies on these laws: a
part that obeys them can be swapped in, calibrated, packed and saved. A law that a part breaks by design, and says so in
its documentation, is waived by name.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from q_core import functional
from q_core.errors import LawError, SpecError, StateError
from q_core.grid import Grid, UniformGrid
from q_core.observer import Observer
from q_core.rounding import NearestEven, Rounding

_NARROW, _WIDE = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)


def check_grid(grid: Grid, x: Tensor | None = None, *, waive: Sequence[str] = ()) -> None:
    """Check the laws of a grid, with `NearestEven`.

    Args:
        grid: Any grid. Not changed.
        x: A tensor that `grid.tile_shape` tiles. When None, one is made from the levels: every level, points inside
            each cell, and reals beyond both ends.
        waive: Laws that do not hold by design. They are `levels` (ascending, shape, value), `codes` (integral and in
            range), `composition` (`fake_quantize` is `dequantize` of `quantize`), `idempotence`, `monotone`, `nearest`
            (within half a cell), `gradient` (1 inside, 0 outside), `nan`, `frozen`, `state`, `dtype` and `layout`.

    Raises:
        LawError: The grid breaks a law.
        SpecError: `waive` names no law.
    """
    _GridLaws(grid, x).check(waive)


def check_rounding(rounding: Rounding, u: Tensor | None = None, *, waive: Sequence[str] = ()) -> None:
    """Check the laws of a rounding; of a soft one, in its hardened form.

    Args:
        rounding: Any rounding. Not changed. It may draw from torch's global generator, whose state is kept.
        u: Code coordinates; needed when the rounding is made for one shape.
        waive: Laws that do not hold by design. They are `neighbours` (the result is `floor(u)` or `floor(u) + 1`),
            `integers` (an integer stays), `gradient` (1 everywhere), `nan`, `state` and `dtype`.

    Raises:
        LawError: The rounding breaks a law.
        SpecError: `waive` names no law.
    """
    with torch.random.fork_rng(devices=[]):
        _RoundingLaws(rounding, u).check(waive)


def check_observer(make: Callable[[], Observer], x: Tensor | None = None, *, waive: Sequence[str] = ()) -> None:
    """Check the laws of an observer.

    Args:
        make: Makes a fresh observer, each time the same.
        x: Data that the observer's shape tiles and its codes can hold. When None, heavy-tailed data are made.
        waive: Laws that do not hold by design. They are `identity` (data pass unchanged), `extremes`, `empty` (no grid
            before data), `split` (neither the cut into batches nor the order of the data matters), `repeatable`,
            `zeros`, `nonfinite` (counted), `state` and `layout`.

    Raises:
        LawError: The observer breaks a law.
        SpecError: `waive` names no law.
    """
    _ObserverLaws(make, x).check(waive)


class _BrokenError(Exception):
    """What was found and what was expected; `_Laws.check` adds the name of the law."""


class _Laws:
    """A suite: every public method below this class is a law, checked in the order of definition."""

    def check(self, waive: Sequence[str]) -> None:
        laws = [name for name in vars(type(self)) if not name.startswith("_")]
        if unknown := sorted(set(waive) - set(laws)):
            raise SpecError(f"waived law {unknown[0]!r} is none of {', '.join(laws)}")
        for name in laws:
            if name not in waive:
                try:
                    getattr(self, name)()
                except _BrokenError as broken:
                    raise LawError(f"law {name!r} is broken: {broken}") from None


class _GridLaws(_Laws):
    def __init__(self, grid: Grid, x: Tensor | None) -> None:
        table = grid.levels().detach()
        self._grid, self._shape = grid, (*grid.tile_shape, grid.qmax - grid.qmin + 1)
        self._levels = table.reshape(-1, table.shape[-1]).to(torch.float64)
        self._x = self._probe() if x is None else x.detach()
        self._rows = self._tiles(self._x)
        # A coordinate among n codes is rounded to n eps of a cell, a real to eps of its magnitude, a few times over.
        self._eps = torch.finfo(table.dtype).eps
        widest, largest = self._levels.diff(dim=1).amax(1, keepdim=True), self._levels.abs().amax(1, keepdim=True)
        self._slack = 4 * self._eps * (table.shape[-1] * widest + largest)

    def _probe(self) -> Tensor:
        first, last, width = self._levels[:, :1], self._levels[:, -1:], self._levels.diff(dim=1)
        inside = [self._levels[:, :-1] + width * part for part in (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)]
        near = [last, last + width[:, -1:] / 3, first - width[:, :1] / 3, torch.zeros_like(last)]
        return _from_rows(
            torch.cat([*inside, *near, 3 * last - 2 * first, 3 * first - 2 * last], 1), self._grid.tile_shape
        )

    def _tiles(self, x: Tensor) -> Tensor:
        return functional.to_tiles(x, self._grid.tile_shape).to(torch.float64)

    def _codes(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        with torch.no_grad():
            return (grid or self._grid).quantize(x, NearestEven())

    def _fake(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        with torch.no_grad():
            return (grid or self._grid).fake_quantize(x, NearestEven())

    def _clear_of_ties(self, x: Tensor) -> Tensor:
        """Mark the elements whose nearest level is beyond doubt."""
        below, above = _neighbours((self._levels[:, 1:] + self._levels[:, :-1]) / 2, rows := self._tiles(x))
        clear = torch.minimum((rows - below).abs(), (rows - above).abs()) > self._slack
        return functional.from_tiles(clear, self._grid.tile_shape, tuple(x.shape))

    def levels(self) -> None:
        grid, levels = self._grid, self._grid.levels()
        _require(tuple(levels.shape) == self._shape, f"levels of shape {tuple(levels.shape)}", f"shape {self._shape}")
        _require(not levels.requires_grad, "levels that require a gradient", "a table apart from the graph")
        _all(levels.isfinite(), "level", levels, "a finite real")
        _all(levels.diff(dim=-1) > 0, "step between neighbouring levels", levels.diff(dim=-1), "a positive one")
        numbers = (
            torch.arange(grid.qmin, grid.qmax + 1, device=levels.device).to(levels.dtype).expand(self._levels.shape)
        )
        codes, reals = (_from_rows(rows, grid.tile_shape) for rows in (numbers, levels.flatten(0, -2)))
        with torch.no_grad():
            _same(grid.dequantize(codes), reals, "real", codes)
        _same(self._codes(reals), codes, "code of a level", reals)

    def codes(self) -> None:
        codes, low, high = self._codes(self._x), self._grid.qmin, self._grid.qmax
        _require(codes.is_floating_point(), f"codes of dtype {codes.dtype}", "a floating-point dtype")
        _require(codes.shape == self._x.shape, f"codes of shape {tuple(codes.shape)}", f"shape {tuple(self._x.shape)}")
        _all(codes == codes.round(), "code", codes, "an integer", self._x)
        _all((codes >= low) & (codes <= high), "code", codes, f"a code from {low} to {high}", self._x)

    def composition(self) -> None:
        with torch.no_grad():
            expected = self._grid.dequantize(self._codes(self._x))
        _same(self._fake(self._x), expected, "fake_quantize", self._x)

    def idempotence(self) -> None:
        once = self._fake(self._x)
        _same(self._fake(once), once, "level quantized again", once)

    def monotone(self) -> None:
        rising = functional.to_tiles(self._x, self._grid.tile_shape).sort(1).values
        result = self._fake(functional.from_tiles(rising, self._grid.tile_shape, tuple(self._x.shape)))
        steps = self._tiles(result).diff(dim=1)
        _all(steps >= 0, "step", steps, "none downward while the real grows", rising[:, 1:])

    def nearest(self) -> None:
        below, above = _neighbours(self._levels, self._rows)
        least = torch.minimum((self._rows - below).abs(), (self._rows - above).abs())
        found = self._tiles(self._fake(self._x))
        close = (self._rows - found).abs() <= least + self._slack
        _all(close, "level", found, "the nearest, half a cell away at most", self._rows)

    def gradient(self) -> None:
        leaf = self._x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self._grid.fake_quantize(leaf, NearestEven()).sum(), leaf)
        found, first, last = self._tiles(gradient), self._levels[:, :1], self._levels[:, -1:]
        inside = (self._rows > first + self._slack) & (self._rows < last - self._slack)
        outside = (self._rows < first - self._slack) | (self._rows > last + self._slack)
        # The slope of a cell is divided and multiplied back: a few operations, each rounded once.
        _all(~inside | ((found - 1).abs() <= 16 * self._eps), "gradient", found, "1 inside the range", self._rows)
        _all(~outside | (found == 0), "gradient", found, "0 outside the range", self._rows)

    def nan(self) -> None:
        mask = (torch.arange(self._x.numel(), device=self._x.device) % 3 == 0).reshape(self._x.shape)
        expected = self._fake(self._x).masked_fill(mask, torch.nan)
        _same(self._fake(self._x.masked_fill(mask, torch.nan)), expected, "level beside NaN", self._x)

    def frozen(self) -> None:
        grid, frozen = self._grid, self._grid.frozen()
        _require(not list(frozen.parameters()), "a frozen grid with parameters", "plain buffers")
        ends, expected = (frozen.qmin, frozen.qmax), (grid.qmin, grid.qmax)
        _require(ends == expected, f"a frozen grid with codes {ends}", f"codes {expected}")
        _same(frozen.levels(), grid.levels(), "level of the frozen grid")
        clear = self._clear_of_ties(self._x)
        codes = self._codes(self._x, frozen)
        _same(codes[clear], self._codes(self._x)[clear], "code of the frozen grid", self._x[clear])

    def state(self) -> None:
        _check_state(self._grid, lambda twin: self._fake(self._x, twin))
        for name, tensor in self._grid.named_parameters():
            _require(tensor.ndim > 0, f"parameter {name!r} without an axis", "at least one, which sharding needs")

    def dtype(self) -> None:
        for dtype in (*_NARROW, *_WIDE):
            narrow = self._x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
            wide = narrow.to(torch.float64)
            clear = self._clear_of_ties(wide)
            _same(self._codes(narrow)[clear], self._codes(wide)[clear], f"code of a {dtype}", wide[clear])
            _all((level := self._fake(narrow)).isfinite(), f"level of a {dtype}", level, "a finite real", wide)
        for dtype in _NARROW:
            moved = _narrowed(self._grid, dtype)
            _same(self._codes(self._x, moved), self._codes(self._x), f"code after .to({dtype})", self._x)

    def layout(self) -> None:
        for other in _layouts(self._x):
            found = self._fake(other)
            _same(found, self._fake(self._x), f"level of an input with strides {other.stride()}", self._x)


class _RoundingLaws(_Laws):
    def __init__(self, rounding: Rounding, u: Tensor | None) -> None:
        self._rounding, self._u = rounding, self._probe() if u is None else u.detach()

    @staticmethod
    def _probe() -> Tensor:
        # Every half and quarter near zero, and coordinates up to the 256 codes that a grid can have.
        spread = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 60
        return torch.cat([torch.linspace(-16, 16, 129, dtype=torch.float64), spread])

    def _round(self, u: Tensor, rounding: Rounding | None = None) -> Tensor:
        torch.manual_seed(0)
        result: Tensor = (rounding or self._rounding)(u)
        return result

    def neighbours(self) -> None:
        result, base = self._round(self._u).detach(), self._u.floor()
        _require(result.shape == base.shape, f"a result of shape {tuple(result.shape)}", f"shape {tuple(base.shape)}")
        _all((result == base) | (result == base + 1), "code", result, "floor(u) or floor(u) + 1", self._u)

    def integers(self) -> None:
        whole = self._u.round()
        _same(self._round(whole).detach(), whole, "code of an integer", whole)

    def gradient(self) -> None:
        leaf = self._u.clone().requires_grad_()
        (found,) = torch.autograd.grad(self._round(leaf).sum(), leaf)
        _same(found, torch.ones_like(leaf), "gradient", self._u)

    def nan(self) -> None:
        result = self._round(torch.full_like(self._u, torch.nan)).detach()
        _all(result.isnan(), "code of NaN", result, "NaN")

    def state(self) -> None:
        _check_state(self._rounding, lambda twin: self._round(self._u, twin).detach())

    def dtype(self) -> None:
        for dtype in _WIDE:
            found = self._round(self._u.to(dtype)).dtype
            _require(found == dtype, f"a result of {found} for {dtype}", f"{dtype}")
        for dtype in _NARROW:
            _narrowed(self._rounding, dtype)


class _ObserverLaws(_Laws):
    def __init__(self, make: Callable[[], Observer], x: Tensor | None) -> None:
        observer = make()
        self._make, self._shape, self._tiles = make, observer.shape, observer.low.shape[0]
        self._x = self._probe(observer) if x is None else x.detach()

    def _probe(self, observer: Observer) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(self._tiles, 240, generator=generator, dtype=torch.float64) ** 3
        rows[:, ::7] = 0
        if observer.spec.symmetric and 0 in (observer.spec.qmin, observer.spec.qmax):
            rows = rows.abs() if observer.spec.qmin == 0 else -rows.abs()
        return _from_rows(rows, self._shape)

    def _fed(self, *batches: Tensor) -> Observer:
        observer = self._make()
        for batch in batches:
            observer(batch)
        return observer

    def _levels(self, *batches: Tensor) -> Tensor:
        return self._fed(*batches).grid().levels()

    def identity(self) -> None:
        before = self._x.clone()
        _same(self._make()(self._x), before, "output of the observer")
        _same(self._x, before, "input after the observer saw it")

    def extremes(self) -> None:
        observer, rows = self._fed(self._x), functional.to_tiles(self._x, self._shape).to(torch.float64)
        _same(observer.low, rows.amin(1, keepdim=True), "low")
        _same(observer.high, rows.amax(1, keepdim=True), "high")

    def empty(self) -> None:
        observer = self._make()
        _require(not observer.seen, "a fresh observer that has seen data", "none")
        try:
            observer.grid()
        except StateError:
            return
        raise _BrokenError("found a grid from no data, expected a StateError")

    def split(self) -> None:
        expected, rows = self._levels(self._x), functional.to_tiles(self._x, self._shape)
        for name, order in (("as given", rows), ("reversed", rows.flip(1)), ("ascending", rows.sort(1).values)):
            for first in {1, rows.shape[1] // 3, rows.shape[1] - 1} - {0}:
                parts = [_from_rows(part, self._shape) for part in order.tensor_split([first], 1)]
                _same(self._levels(*parts), expected, f"level from {first} elements and the rest, {name},")

    def repeatable(self) -> None:
        _same(self._levels(self._x, self._x), self._levels(self._x, self._x), "level of a second run")

    def zeros(self) -> None:
        zeros = torch.zeros_like(self._x)
        observer = self._fed(zeros)
        grid, dead = observer.grid(), observer.dead_tiles()
        _require(dead == list(range(self._tiles)), f"dead tiles {dead}", f"all {self._tiles}")
        if isinstance(grid, UniformGrid):
            _same(grid.scale.detach(), torch.ones_like(grid.scale), "scale of all-zero data")
        found = functional.to_tiles(grid.fake_quantize(zeros, NearestEven()).detach(), grid.tile_shape).abs()
        nearest = grid.levels().reshape(found.shape[0], -1).abs().amin(1, keepdim=True)
        _all(found == nearest, "level of zero", found, "the level next to zero")

    def nonfinite(self) -> None:
        for value in (torch.nan, torch.inf, -torch.inf):
            spoiled = self._x.clone()
            spoiled[(0,) * spoiled.ndim] = value
            count = int(self._fed(self._x, spoiled, self._x).nonfinite)
            _require(count == 1, f"nonfinite = {count} after one of three tensors held {value}", "1")

    def state(self) -> None:
        observer, fresh = self._fed(self._x, self._x), self._make()
        _check_state(observer, lambda twin: twin.grid().levels())
        shapes, expected = ({k: tuple(v.shape) for k, v in o.state_dict().items()} for o in (observer, fresh))
        _require(shapes == expected, f"state of shapes {shapes} after data", f"the {expected} of a fresh observer")
        fresh.load_state_dict(observer.state_dict(), strict=True)
        _same(fresh.grid().levels(), observer.grid().levels(), "level of a fresh observer that loaded the state")
        for dtype in _NARROW:
            _narrowed(observer, dtype)

    def layout(self) -> None:
        for other in _layouts(self._x):
            _same(self._levels(other), self._levels(self._x), f"level of an input with strides {other.stride()}")


def _from_rows(rows: Tensor, tile_shape: tuple[int, ...]) -> Tensor:
    """Build a tensor that the shape tiles: one of four axes where nothing forbids it, else with a longer last axis."""
    if all(size == 1 for size in tile_shape) and rows.shape[1] % 4 == 0:
        return rows.reshape(-1, 2, 2, 1)
    return functional.from_tiles(rows, tile_shape, (*tile_shape[:-1], tile_shape[-1] * rows.shape[1]))


def _neighbours(table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of each ascending row of the table on either side of each element."""
    index = torch.searchsorted(table.contiguous(), rows.contiguous())
    last = table.shape[1] - 1
    return table.gather(1, (index - 1).clamp(0, last)), table.gather(1, index.clamp(0, last))


def _layouts(x: Tensor) -> Iterator[Tensor]:
    """Yield the same tensor with other strides."""
    yield x.repeat_interleave(2, -1)[..., ::2]
    backward = tuple(reversed(range(x.ndim)))
    yield x.permute(backward).contiguous().permute(backward)
    if x.ndim == 4:
        yield x.contiguous(memory_format=torch.channels_last)


def _require(ok: bool, found: str, expected: str) -> None:
    if not ok:
        raise _BrokenError(f"found {found}, expected {expected}")


def _all(ok: Tensor, what: str, found: Tensor, expected: str, at: Tensor | None = None) -> None:
    """Require a condition of every element; report the first that fails, and the input it belongs to."""
    if not bool(ok.all()):
        bad = int((~ok).flatten().int().argmax())
        where = "" if at is None else f" for {float(at.flatten()[bad])!r}"
        raise _BrokenError(f"found {what} {float(found.flatten()[bad])!r}{where}, expected {expected}")


def _same(actual: Tensor, expected: Tensor, what: str, at: Tensor | None = None) -> None:
    """Require equality of all values, NaN included; the dtype may differ."""
    shape = tuple(expected.shape)
    _require(tuple(actual.shape) == shape, f"{what} in a tensor of shape {tuple(actual.shape)}", f"shape {shape}")
    equal = (actual == expected) | (actual.isnan() & expected.isnan())
    bad = int((~equal).flatten().int().argmax()) if equal.numel() else 0
    _all(equal, what, actual, f"{float(expected.flatten()[bad])!r}" if equal.numel() else "nothing", at)


def _check_state(module: nn.Module, output: Callable[[Any], Tensor]) -> None:
    """Require that all state is registered, and that a twin that loads it strictly has the same output."""
    loose = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    _require(not loose, f"tensor {', '.join(loose)} that is not registered", "a parameter or a buffer")
    twin = copy.deepcopy(module)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    twin.load_state_dict(module.state_dict(), strict=True)
    _same(output(twin), output(module), "output of a deep copy that loaded the state")


def _narrowed(module: Any, dtype: torch.dtype) -> Any:
    """Cast a copy, and require that its state stayed float32 or wider."""
    twin = copy.deepcopy(module).to(dtype)
    for name, tensor in twin.state_dict().items():
        narrow = tensor.is_floating_point() and tensor.element_size() < 4
        _require(
            not narrow, f"{name} of {tensor.dtype} after .to({dtype})", "float32 or wider, as PreciseModule keeps it"
        )
    return twin
