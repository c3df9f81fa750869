r"""LQ-Nets: levels that are all sums of a few learned numbers.

With $b$ basis values $v$ and the $2^b$ vectors $e$ of bits the levels are the numbers $e^\top v$, with bits in
$\{-1, 1\}$ for weights and in $\{0, 1\}$ for activations. An inner product of codes is then a sum of $b_w b_a$ inner
products of bits. A real goes to the nearest level.

The basis is not learned by the loss but fitted to the data, by *quantization error minimisation*: with the bits $B$
that the elements $x$ have now, the basis of least squared error is

$$ v^* = (B^\top B)^{-1} B^\top x, $$

and then the elements go to their new nearest levels. Neither half raises $\lVert B v - x \rVert^2$. In training one
such step is made for each batch, and the basis moves a tenth of the way, $v \leftarrow 0.9\, v + 0.1\, v^*$. The error
for the old bits is convex in $v$, so going a part of the way does not raise it either.

$B^\top B$ is singular where some bit is the same, or two are, in all elements. Then
$(B^\top B + \delta I)^{-1} (B^\top x + \delta v)$ is taken: the minimum of the error plus $\delta$ times the squared
distance from the old basis, which raises the error no more than the other does.

The gradient of weights is 1 everywhere; that of activations 1 up to the largest level, 0 above. (Below the lowest one
it is 0 here and 1 in the public code; after a ReLU nothing lies there.)

Source: Zhang et al. 2018 (LQ-Nets), ECCV, arXiv:1807.10029, section on learnable quantizers and the algorithm of
training; the regularisation, the moving average and the start are those of the authors' public code.
"""

import math
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from q_core import functional
from q_core.errors import RangeError, ShapeError, SpecError
from q_core.rounding import Rounding
from q_core.spec import MAX_BITS, QuantSpec
from q_nulsq.parameters import check_positive, owned
from q_nulsq.peers.clips import clip_of_range
from q_nulsq.tabulated import TabulatedGrid

QUARTILE = 0.6745
"""Three quarters of a normal distribution lie below that many deviations; the public start of the basis."""


@final
class LqNetsGrid(TabulatedGrid):
    r"""All sums of basis values, times 1 or -1 (signed codes) or times 1 or 0 (unsigned codes).

    The basis is a buffer. In training mode `fake_quantize` updates it with what passes, after use, as a batch norm
    updates its statistics: the step of `update`. In evaluation mode nothing changes; `momentum=0` leaves the update to
    whoever calls `update`, such as a hook. Processes that train in parallel each update from their own part of a batch;
    `DistributedDataParallel` sends the buffers of the first to the others, as the public code takes those of one tower.

    Args:
        basis: Basis values along the last axis, one for each bit; the axes before it tile the tensor: `(1, b)` per
            tensor, `(C, 1, 1, 1, b)` per channel of a kernel.
        signed: Whether bits stand for -1 and 1, and not for 0 and 1.
        momentum: Weight of a new batch in the average, in [0, 1].
        ridge: $\delta$, dimensionless, beside the number of elements in a tile.

    Attributes:
        basis: The buffer.

    Raises:
        ShapeError: No axis of tiles.
        SpecError: No basis value, or more than `MAX_BITS`.
        RangeError: A basis value that is not finite, two levels that are the same, or a number out of its range.

    Gradient:
        To `x`: 1 inside the closed range of levels; outside 0 for unsigned codes and 1 for signed ones. None to the
        basis.

    Note:
        The law `gradient` does not hold for signed codes, by design. The laws are those of evaluation mode.

    Source:
        Zhang et al. 2018 (LQ-Nets), arXiv:1807.10029.
    """

    def __init__(
        self, basis: Float[Tensor, "..."], *, signed: bool, momentum: float = 0.1, ridge: float = 1e-4
    ) -> None:
        super().__init__()
        if basis.ndim < 2:
            raise ShapeError(
                f"basis of shape {tuple(basis.shape)}: it needs the axes of the tiles before the axis of the bits, "
                f"(1, {basis.numel()}) for one basis per tensor"
            )
        bits = basis.shape[-1]
        if not 1 <= bits <= MAX_BITS:
            raise SpecError(f"basis of shape {tuple(basis.shape)}: supported are 1 to {MAX_BITS} values, one for a bit")
        if not 0 <= momentum <= 1:
            raise RangeError(f"momentum={momentum}: it must be from 0 to 1; 0.1 is published")
        if not 0 < ridge < math.inf:
            raise RangeError(f"ridge={ridge}: it must be positive and finite; 1e-4 is published")
        self.momentum, self.ridge, self.signed = momentum, ridge, signed
        self.qmin = -(2 ** (bits - 1)) if signed else 0
        self.qmax = self.qmin + 2**bits - 1
        wide = owned(basis)
        signs = torch.arange(2**bits).unsqueeze(1).bitwise_right_shift(torch.arange(bits)).bitwise_and(1)
        self.encodings: Tensor
        self.basis: Tensor
        self.register_buffer("encodings", (2 * signs - 1 if signed else signs).to(wide), persistent=False)
        self.register_buffer("basis", wide)
        if not wide.is_meta:
            _check_basis(wide, self.table()[0])

    @classmethod
    def from_range(
        cls,
        spec: QuantSpec,
        low: Float[Tensor, "..."],
        high: Float[Tensor, "..."],
        *,
        momentum: float = 0.1,
        ridge: float = 1e-4,
    ) -> "LqNetsGrid":
        """Build the grid of equal steps whose outermost level is the farther end of a range of reals.

        Args:
            spec: The codes: `QuantSpec.signed(bits)`, which has no level at zero, or `QuantSpec.unsigned(bits)`.
            low: Smallest real of each tile.
            high: Largest real of each tile. Shape of `low`.
            momentum: Weight of a new batch in the average.
            ridge: Weight of the old basis in a step.

        Returns:
            A grid whose tiles have the shape of `low`.

        Raises:
            SpecError: Other codes.
            RangeError: The range is not finite, its ends are in the wrong order, or no code holds any of it.
        """
        _check_spec(spec)
        unit = clip_of_range(spec, low, high) / (2**spec.bits - 1)
        return cls(_doubled(unit, spec.bits), signed=spec.qmin < 0, momentum=momentum, ridge=ridge)

    @classmethod
    def from_deviation(
        cls,
        spec: QuantSpec,
        deviation: Float[Tensor, "..."],
        *,
        momentum: float = 0.1,
        ridge: float = 1e-4,
    ) -> "LqNetsGrid":
        r"""Build the grid with the published start, for data of a given size.

        Basis value $j$ is $0.6745\, \sigma\, 2^{j-b+1}$ for signed codes, $1.349\, \sigma\, 2^j / (2^b - 1)$ for
        unsigned ones. The published deviation is 1 for activations and $\sqrt{2/n}$ for weights, with the $n$ of He's
        initialisation.

        Args:
            spec: The codes: `QuantSpec.signed(bits)` or `QuantSpec.unsigned(bits)`.
            deviation: Standard deviation of the data of each tile. Positive.
            momentum: Weight of a new batch in the average.
            ridge: Weight of the old basis in a step.

        Returns:
            A grid whose tiles have the shape of `deviation`.

        Raises:
            SpecError: Other codes.
            RangeError: A deviation that is not positive and finite.
        """
        _check_spec(spec)
        check_positive("deviation", deviation)
        factor = QUARTILE / 2 ** (spec.bits - 1) if spec.qmin < 0 else 2 * QUARTILE / (2**spec.bits - 1)
        return cls(_doubled(deviation * factor, spec.bits), signed=spec.qmin < 0, momentum=momentum, ridge=ridge)

    def table(self) -> tuple[Float[Tensor, "*tiles n"], Float[Tensor, "*tiles n-1"]]:
        """Return the sums in ascending order, and their distances; neither learns."""
        levels = _sums(self.basis, self.encodings).sort(dim=-1).values
        return levels, levels.diff(dim=-1)

    def fake_quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to levels; in training mode, then move the basis toward what fits `x`."""
        levels = super().fake_quantize(x.detach() if self.signed else x, rounding)
        if self.training and self.momentum:
            self.update(x)
        return functional.straight_through(levels, levels + x) if self.signed else levels

    def update(self, x: Float[Tensor, "*shape"], *, momentum: float | None = None) -> None:
        """Take one step of quantization error minimisation with the elements of `x`, in place.

        A tile that the step would leave with two levels alike, or with a NaN, stays as it is.

        Args:
            x: Reals as the grid sees them.
            momentum: Part of the way to go, in place of that of the grid. 1 is a full step.

        Raises:
            ShapeError: The basis does not tile `x`.
        """
        part = self.momentum if momentum is None else momentum
        with torch.no_grad():
            bits = self.basis.shape[-1]
            found = self.fit(x).reshape(self.basis.shape)
            moved = torch.lerp(self.basis.double(), found, part).to(self.basis.dtype)
            apart = _sums(moved, self.encodings).sort(dim=-1).values.diff(dim=-1) > 0
            good = apart.all(-1, keepdim=True).expand(*self.tile_shape, bits)
            self.basis.copy_(torch.where(good, moved, self.basis))

    def fit(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "tiles bits"]:
        """Return the basis of least squared error for the bits that the elements of `x` have now, in float64.

        Raises:
            ShapeError: The basis does not tile `x`.
        """
        with torch.no_grad():
            basis, encodings = self.basis.reshape(-1, self.basis.shape[-1]).double(), self.encodings.double()
            levels, order = _sums(basis, encodings).sort(dim=-1)
            rows = functional.to_tiles(x.detach(), self.tile_shape).double()
            index = torch.searchsorted(functional.middles(levels), rows.contiguous())
            # All elements at one level have the same bits, so that counts and sums of each level are enough.
            counts = torch.zeros_like(levels).scatter_add(1, index, torch.ones_like(rows))
            sums = torch.zeros_like(levels).scatter_add(1, index, rows)
            bits = encodings[order]
            gram = (bits * counts.unsqueeze(-1)).mT @ bits
            right = (bits.mT @ sums.unsqueeze(-1)) + self.ridge * basis.unsqueeze(-1)
            eye = torch.eye(bits.shape[-1], dtype=gram.dtype, device=gram.device)
            solution, _ = torch.linalg.solve_ex(gram + self.ridge * eye, right)
            fitted: Tensor = solution.squeeze(-1)
            return fitted

    def bits_of(self, codes: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape bits"]:
        """Return the bits whose sum with the basis is each code's level: -1 and 1, or 0 and 1.

        Args:
            codes: Codes from `qmin` to `qmax`.
        """
        order = _sums(self.basis.reshape(-1, self.basis.shape[-1]), self.encodings).argsort(dim=-1)
        rows = functional.to_tiles(codes, self.tile_shape).long() - self.qmin
        vectors = self.encodings[order.gather(1, rows)].to(torch.int32)
        shape = tuple(codes.shape)
        return torch.stack([functional.from_tiles(bit, self.tile_shape, shape) for bit in vectors.unbind(-1)], -1)

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the basis without its last axis."""
        return tuple(self.basis.shape[:-1])

    def extra_repr(self) -> str:
        """Show the codes and the granularity."""
        return f"codes {self.qmin} to {self.qmax}, basis {tuple(self.basis.shape)}, momentum {self.momentum}"


def _sums(basis: Tensor, encodings: Tensor) -> Tensor:
    """Return the sums of the basis values for all vectors of bits, in the order of the encodings."""
    # In float64 and not as a matrix product, so that no device and no setting of it makes other levels.
    sums: Tensor = (basis.double().unsqueeze(-2) * encodings).sum(-1)
    return sums.to(basis.dtype)


def _doubled(unit: Tensor, bits: int) -> Tensor:
    return unit.unsqueeze(-1) * 2.0 ** torch.arange(bits, device=unit.device)


def _check_spec(spec: QuantSpec) -> None:
    if spec.qmax - spec.qmin + 1 != 2**spec.bits or spec.qmin not in (0, -(2 ** (spec.bits - 1))):
        raise SpecError(
            f"codes {spec.qmin} to {spec.qmax} with bits={spec.bits}: LQ-Nets is defined for QuantSpec.signed(bits) "
            "and QuantSpec.unsigned(bits), all codes of which stand for a sum"
        )


def _check_basis(basis: Tensor, levels: Tensor) -> None:
    if not bool(basis.isfinite().all()):
        raise RangeError(f"basis value {float(basis[~basis.isfinite()][0])}: it must be finite")
    same = levels.diff(dim=-1) <= 0
    if bool(same.any()):
        raise RangeError(
            f"a basis of which two sums are the same level, {float(levels[..., 1:][same][0])}: double each value, or "
            "scatter them"
        )
