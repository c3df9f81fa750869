"""Where the representable reals are.

A grid is a finite ordered set of reals, the *levels*, numbered by integer *codes*. It maps reals to codes and back; a
`Rounding` decides which of two neighbouring levels a real goes to. `UniformGrid` has levels one scale apart,
`CodebookGrid` any levels at all. A method of quantization adds a grid or a rounding, never both at once.
"""

import abc
import dataclasses
import math
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from q_core import functional
from q_core.errors import RangeError, ShapeError, SpecError
from q_core.module import PreciseModule
from q_core.ops import fake_quantize, fake_quantize_levels
from q_core.rounding import NearestEven, Rounding
from q_core.spec import QuantSpec


class Grid(PreciseModule, abc.ABC):
    """A finite ordered set of representable reals, and the map between them and integer codes.

    A grid of your own implements `quantize` and `dequantize`; override `fake_quantize` where the slope of the cell
    matters for the gradient, and `tile_shape` where the parameters are not per tensor. `q_core.testing.check_grid`
    tells whether it obeys the laws.

    Attributes:
        qmin: Smallest code, inclusive.
        qmax: Largest code, inclusive.
    """

    qmin: int
    qmax: int

    @abc.abstractmethod
    def quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to codes in `[qmin, qmax]`, integral in value, in a floating-point dtype."""

    @abc.abstractmethod
    def dequantize(self, codes: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map codes to reals, strictly increasing in the code."""

    def fake_quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to the levels they are represented by, with the gradient used in training."""
        return self.dequantize(self.quantize(x, rounding))

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of one parameter: one entry per tile of the tensor. One element means per tensor."""
        return (1,)

    @property
    def bits(self) -> int:
        """Bits that number the codes."""
        return max(1, math.ceil(math.log2(self.qmax - self.qmin + 1)))

    def levels(self) -> Shaped[Tensor, "... levels"]:
        """Return every representable real, ascending, per tile: shape `(*tile_shape, qmax - qmin + 1)`."""
        probe = next(self.buffers(), next(self.parameters(), torch.zeros(())))
        dtype = probe.dtype if probe.is_floating_point() else torch.float32
        tile = torch.zeros(self.tile_shape, dtype=dtype, device=probe.device)
        with torch.no_grad():
            return torch.stack([self.dequantize(tile + code) for code in range(self.qmin, self.qmax + 1)], dim=-1)

    def frozen(self) -> "Grid":
        """Return a grid of plain tensors with the same codes and levels, for deployment.

        The default tabulates the levels; it is right for every grid in whose code coordinate neighbouring levels
        are linearly interpolated, that is, where `NearestEven` finds the nearest level. Override it otherwise.
        """
        return CodebookGrid(self.levels(), qmin=self.qmin)


@final
class UniformGrid(Grid):
    r"""Levels one scale apart: $\hat{x} = s\,(q - z)$ with codes $q \in [q_{min}, q_{max}]$.

    Args:
        scale: Real width of one code. Positive, finite, at least one axis; its shape is the granularity.
        zero_point: Code of real zero. Integral, in `[qmin, qmax]`, shape of `scale`. None means 0.
        qmin: Smallest code, inclusive.
        qmax: Largest code, inclusive.
        learnable: Whether the scale is a parameter.
        gradient_scale: Multiplier of the gradient of the scale, dimensionless.

    Raises:
        SpecError: `qmin` is not below `qmax`.
        ShapeError: The scale has no axis, or the zero point another shape.
        RangeError: A scale that is not positive and finite, or a zero point that is not a code.

    Gradient:
        To `x`: 1 inside the closed range, 0 outside. To the scale: $q - z - x/s$ inside, $q_{min} - z$ below,
        $q_{max} - z$ above, times `gradient_scale`.

    Source:
        Jacob et al. 2018, arXiv:1712.05877, eq. 1; gradient Esser et al. 2020, arXiv:1902.08153, eq. 3.
    """

    def __init__(
        self,
        scale: Float[Tensor, "..."],
        zero_point: Float[Tensor, "..."] | None = None,
        *,
        qmin: int,
        qmax: int,
        learnable: bool = False,
        gradient_scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_codes(qmin, qmax)
        _check_scale(scale)
        self.qmin, self.qmax, self.gradient_scale = qmin, qmax, gradient_scale
        scale = _wide(scale)
        if learnable:
            self.scale: Tensor = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        if zero_point is not None:
            _check_zero_point(zero_point, scale, qmin, qmax)
            zero_point = _wide(zero_point)
        self.zero_point: Tensor | None
        self.register_buffer("zero_point", zero_point)

    @classmethod
    def from_range(
        cls,
        spec: QuantSpec,
        low: Float[Tensor, "..."],
        high: Float[Tensor, "..."],
        *,
        learnable: bool = False,
        gradient_scale: float = 1.0,
    ) -> "UniformGrid":
        """Build the grid that just covers a range of reals.

        The range is widened to hold zero. A range of zero width gets the scale 1, so that a dead channel has code
        zero and a finite scale.

        Args:
            spec: The codes.
            low: Smallest real of each tile.
            high: Largest real of each tile. Shape of `low`.
            learnable: Whether the scale is a parameter.
            gradient_scale: Multiplier of the gradient of the scale.

        Returns:
            A grid whose scale has the shape of `low`.

        Raises:
            RangeError: The range is not finite, or lies wholly on the side of zero that has no codes.
        """
        _check_range(spec, low, high)
        low, high = _wide(low).clamp(max=0), _wide(high).clamp(min=0)
        if not spec.symmetric:
            scale = _positive((high - low) / (spec.qmax - spec.qmin))
            zero_point = (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax)
        else:
            zero = torch.zeros_like(high)
            scale = _positive(
                torch.maximum(high / spec.qmax if spec.qmax else zero, low / spec.qmin if spec.qmin else zero)
            )
            zero_point = None
        return cls(
            scale, zero_point, qmin=spec.qmin, qmax=spec.qmax, learnable=learnable, gradient_scale=gradient_scale
        )

    def quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to codes: round `x / scale`, add the zero point, clamp."""
        return functional.quantize(x, self._scale(), self.zero_point, qmin=self.qmin, qmax=self.qmax, rounding=rounding)

    def dequantize(self, codes: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map codes to reals: `scale * (codes - zero_point)`."""
        return functional.dequantize(codes, self._scale(), self.zero_point)

    def fake_quantize(
        self, x: Float[Tensor, "*shape"], rounding: Rounding, where: Bool[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*shape"]:
        """Map reals to levels; to the nearest in one step, which keeps `x` alone for the backward pass.

        Args:
            x: Reals to quantize.
            rounding: Chooses between the two neighbouring levels.
            where: Which elements to quantize; the others pass through, with a gradient of 1. None means all.
        """
        if type(rounding) is NearestEven:
            return fake_quantize(x, self._scale(), self.zero_point, qmin=self.qmin, qmax=self.qmax, where=where)
        levels = super().fake_quantize(x, rounding)
        return levels if where is None else torch.where(where, levels, x)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if isinstance(scale := state.get(f"{prefix}scale"), Tensor) and scale.shape == self.scale.shape:
            _check_scale(scale, f"{prefix}scale of the state")
        super()._load_from_state_dict(state, prefix, *rest)

    def _scale(self) -> Tensor:
        return functional.scale_gradient(self.scale, self.gradient_scale)

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the scale."""
        return tuple(self.scale.shape)

    def levels(self) -> Shaped[Tensor, "... levels"]:
        """Return every representable real, ascending: shape `(*scale.shape, qmax - qmin + 1)`."""
        codes = torch.arange(self.qmin, self.qmax + 1, dtype=self.scale.dtype, device=self.scale.device)
        offset = 0 if self.zero_point is None else self.zero_point.unsqueeze(-1)
        return self.scale.detach().unsqueeze(-1) * (codes - offset)

    def frozen(self) -> "UniformGrid":
        """Return the same grid with a scale that does not learn."""
        zero_point = None if self.zero_point is None else self.zero_point.detach().clone()
        return UniformGrid(self.scale.detach().clone(), zero_point, qmin=self.qmin, qmax=self.qmax)

    def extra_repr(self) -> str:
        """Show the codes and the granularity."""
        zero = "" if self.zero_point is None else ", zero_point"
        return f"codes {self.qmin} to {self.qmax}, scale {tuple(self.scale.shape)}{zero}"


@dataclasses.dataclass(frozen=True)
class _Cells:
    """Where each element of a tensor lies in its row of levels."""

    cell: Tensor
    fraction: Tensor
    left: Tensor
    right: Tensor
    zero: Tensor


@final
class CodebookGrid(Grid):
    """Any strictly increasing levels, given as a table.

    In the code coordinate neighbouring levels are one apart and reals between them are interpolated linearly, so
    `NearestEven` finds the nearest level. Code 0 of the coordinate is the level nearest to real zero, the upper one of
    two, so that real zero itself goes up where no level is zero, as in a grid of steps that rise in the middle. Which
    level is nearest is found by comparing with the middles between them, see `q_core.functional.middles`.

    Args:
        codebook: Levels in ascending order along the last axis; the axes before it tile the tensor:
            `(1, n)` per tensor, `(C, 1, n)` per channel of a matrix.
        qmin: Code of the first level.

    Raises:
        ShapeError: The table has one axis only.
        SpecError: The table has fewer than 2 levels.
        RangeError: The levels are not finite or not strictly increasing.

    Gradient:
        To `x`: 1 inside the closed range of levels, 0 outside. The levels do not learn.
    """

    def __init__(self, codebook: Float[Tensor, "..."], *, qmin: int = 0) -> None:
        super().__init__()
        if codebook.ndim < 2:
            raise ShapeError(
                f"codebook of shape {tuple(codebook.shape)}: it needs the axes of the tiles before the axis of the "
                f"levels, (1, {codebook.numel()}) for one table per tensor"
            )
        if codebook.shape[-1] < 2:
            raise SpecError(f"codebook of shape {tuple(codebook.shape)}: a grid has at least 2 levels")
        _check_codebook(codebook)
        self.qmin, self.qmax = qmin, qmin + codebook.shape[-1] - 1
        self.codebook: Tensor
        self.register_buffer("codebook", _wide(codebook))

    def quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to codes; the derivative is one over the width of the cell."""
        cells = self._locate(x)
        rounded = self._round(cells, rounding)
        if (edges := self.thresholds(rounding, x.dtype)) is not None:
            rows = functional.to_tiles(x.detach(), self.tile_shape).to(edges.dtype)
            found = torch.searchsorted(edges.reshape(-1, edges.shape[-1]), rows.contiguous()).to(rows.dtype)
            rounded = functional.straight_through(torch.where(rows.isnan(), rows, found), rounded)
        return functional.from_tiles(rounded + self.qmin, self.tile_shape, tuple(x.shape))

    def dequantize(self, codes: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Look the codes up in the table."""
        rows = functional.to_tiles(codes, self.tile_shape)
        index = (rows.detach() - self.qmin).round().long().clamp(0, self.qmax - self.qmin)
        return functional.from_tiles(self._table().gather(1, index), self.tile_shape, tuple(codes.shape))

    def fake_quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to levels with the slope of the cell, so that the derivative inside the range is 1."""
        if (edges := self.thresholds(rounding, x.dtype)) is not None:
            table = self.codebook.to(edges.dtype)
            return fake_quantize_levels(x, table, table.diff(dim=-1), edges)
        cells = self._locate(x)
        weight = self._round(cells, rounding) - cells.cell
        return functional.from_tiles(torch.lerp(cells.left, cells.right, weight), self.tile_shape, tuple(x.shape))

    def thresholds(self, rounding: Rounding, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."] | None:
        """Return what separates the levels, or None for a rounding that does not always take the nearest.

        The code of a real is `qmin` and one for each threshold strictly below it.

        Args:
            rounding: Says where ties go.
            dtype: That of the reals to compare; the thresholds have the wider one of it and the codebook.

        Returns:
            One row for each row of the codebook, one shorter.
        """
        levels = self.codebook.to(torch.promote_types(dtype, self.codebook.dtype))
        codes = torch.arange(1, levels.shape[-1], device=levels.device) - _nearest_to_zero(levels)
        up = rounding.ties_up(codes.to(levels.dtype))
        return None if up is None else functional.middles(levels, up)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if isinstance(codebook := state.get(f"{prefix}codebook"), Tensor) and codebook.shape == self.codebook.shape:
            _check_codebook(codebook, f"{prefix}codebook of the state,")
        super()._load_from_state_dict(state, prefix, *rest)

    def _table(self) -> Tensor:
        return self.codebook.reshape(-1, self.codebook.shape[-1])

    def _locate(self, x: Tensor) -> _Cells:
        table = self._table()
        rows = functional.to_tiles(x, self.tile_shape)
        rows = rows.to(torch.promote_types(x.dtype, table.dtype))
        table = table.to(rows.dtype)
        inner = functional.closed_clamp(rows, table[:, :1], table[:, -1:])
        found = torch.searchsorted(table, inner.detach().contiguous(), right=True)
        cell = (found - 1).clamp(0, table.shape[1] - 2)
        left, right = table.gather(1, cell), table.gather(1, cell + 1)
        zero = _nearest_to_zero(table).to(rows.dtype)
        return _Cells(cell.to(rows.dtype), (inner - left) / (right - left), left, right, zero)

    def _round(self, cells: _Cells, rounding: Rounding) -> Tensor:
        coordinate = cells.cell - cells.zero + cells.fraction
        rounded: Tensor = rounding(coordinate)
        return functional.closed_clamp(rounded + cells.zero, 0, self.qmax - self.qmin)

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the codebook without its last axis."""
        return tuple(self.codebook.shape[:-1])

    def levels(self) -> Shaped[Tensor, "... levels"]:
        """Return the codebook."""
        return self.codebook.detach()

    def frozen(self) -> "CodebookGrid":
        """Return a copy."""
        return CodebookGrid(self.codebook.detach().clone(), qmin=self.qmin)

    def extra_repr(self) -> str:
        """Show the codes and the granularity."""
        return f"codes {self.qmin} to {self.qmax}, codebook {tuple(self.codebook.shape)}"


def _nearest_to_zero(levels: Tensor) -> Tensor:
    """Return the index of the level nearest to zero in each row, the last of two, as a last axis of length 1."""
    return levels.shape[-1] - 1 - levels.abs().flip(-1).argmin(dim=-1, keepdim=True)


def _wide(tensor: Tensor) -> Tensor:
    """Copy, so that the grid owns its tensors, and widen to float32 unless already as wide."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True).contiguous()


def _positive(scale: Tensor) -> Tensor:
    # Below the smallest normal number 1/scale overflows, so such a range counts as zero width.
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))


def _check_codes(qmin: int, qmax: int) -> None:
    if qmin >= qmax:
        raise SpecError(f"codes {qmin} to {qmax}: qmin must be below qmax")


def _check_scale(scale: Tensor, name: str = "scale") -> None:
    if scale.ndim == 0:
        raise ShapeError("scale of shape (): give it at least one axis, (1,) for one scale per tensor")
    if scale.is_meta:
        return
    bad = ~(scale.isfinite() & (scale > 0))
    if bool(bad.any()):
        raise RangeError(
            f"{name} has {int(bad.sum())} of {scale.numel()} values that are not positive and finite, "
            f"the first is {float(scale[bad][0])}"
        )


def _check_codebook(codebook: Tensor, name: str = "codebook") -> None:
    if not codebook.is_meta and not bool(codebook.isfinite().all() & (codebook.diff(dim=-1) > 0).all()):
        raise RangeError(
            f"{name} of shape {tuple(codebook.shape)} is not finite and strictly increasing along its last axis: "
            "sort it and merge equal levels"
        )


def _check_zero_point(zero_point: Tensor, scale: Tensor, qmin: int, qmax: int) -> None:
    if zero_point.shape != scale.shape:
        raise ShapeError(
            f"zero_point of shape {tuple(zero_point.shape)} with a scale of shape {tuple(scale.shape)}: "
            "the two must be equal"
        )
    if zero_point.is_meta:
        return
    bad = (zero_point != zero_point.round()) | (zero_point < qmin) | (zero_point > qmax)
    if bool(bad.any()):
        raise RangeError(f"zero_point {float(zero_point[bad][0])}: it must be an integer from {qmin} to {qmax}")


def _check_range(spec: QuantSpec, low: Tensor, high: Tensor) -> None:
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise RangeError(f"range {float(low.min())} to {float(high.max())} is not finite")
    if bool((low > high).any()):
        raise RangeError(f"range with low {float(low.max())} above high {float(high.min())}")
    if spec.symmetric and spec.qmin == 0 and bool(((high <= 0) & (low < 0)).any()):
        raise RangeError(
            f"range {float(low.min())} to {float(high.max())} is negative, but codes {spec.qmin} to {spec.qmax} with "
            "no zero point hold no negative real: use QuantSpec.signed, or symmetric=False"
        )
    if spec.symmetric and spec.qmax == 0 and bool(((low >= 0) & (high > 0)).any()):
        raise RangeError(
            f"range {float(low.min())} to {float(high.max())} is positive, but codes {spec.qmin} to {spec.qmax} with "
            "no zero point hold no positive real: use 2 bits, or symmetric=False"
        )
