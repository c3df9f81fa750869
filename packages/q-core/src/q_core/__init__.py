"""Primitives of neural-network quantization: a quantizer is a grid and a rounding."""

from importlib import metadata as _metadata

from q_core.calibrate import CalibrationReport, calibrate, restore
from q_core.checkpoint import load_packed, save_packed
from q_core.errors import (
    BackendError,
    DataError,
    FormatError,
    LawError,
    MatchError,
    QuantizationError,
    RangeError,
    ShapeError,
    SpecError,
    StateError,
)
from q_core.functional import dequantize, floor_ste, quantize, round_ste, scale_gradient, straight_through
from q_core.grid import CodebookGrid, Grid, UniformGrid
from q_core.layers import QuantAdd, QuantConcat, QuantConv2d, QuantLinear, QuantUnit
from q_core.methods import Quantized, nearest
from q_core.observer import (
    EntropyObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    RangeObserver,
)
from q_core.packed import PackedConv2d, PackedLinear, bits_per_weight, pack
from q_core.packing import pack_codes, unpack_codes
from q_core.quantizer import Quantizer
from q_core.rounding import NearestEven, NearestTowardZero, Rounding, Stochastic
from q_core.spec import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, QuantSpec
from q_core.swap import FloatLayer, Recipe, Rule, SwappedLayer, SwapReport, swap
from q_core.trace import fold_batchnorm

try:
    __version__ = _metadata.version("q-core")
except _metadata.PackageNotFoundError:  # run from a source tree that is on the path but not installed
    __version__ = "0+source"

__all__ = [
    "BackendError",
    "CalibrationReport",
    "CodebookGrid",
    "DataError",
    "EntropyObserver",
    "FloatLayer",
    "FormatError",
    "Granularity",
    "Grid",
    "LawError",
    "MSEObserver",
    "MatchError",
    "MinMaxObserver",
    "MovingAverageObserver",
    "NearestEven",
    "NearestTowardZero",
    "Observer",
    "PackedConv2d",
    "PackedLinear",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PercentileObserver",
    "QuantAdd",
    "QuantConcat",
    "QuantConv2d",
    "QuantLinear",
    "QuantSpec",
    "QuantUnit",
    "QuantizationError",
    "Quantized",
    "Quantizer",
    "RangeError",
    "RangeObserver",
    "Recipe",
    "Rounding",
    "Rule",
    "ShapeError",
    "SpecError",
    "StateError",
    "Stochastic",
    "SwapReport",
    "SwappedLayer",
    "UniformGrid",
    "bits_per_weight",
    "calibrate",
    "dequantize",
    "floor_ste",
    "fold_batchnorm",
    "load_packed",
    "nearest",
    "pack",
    "pack_codes",
    "quantize",
    "restore",
    "round_ste",
    "save_packed",
    "scale_gradient",
    "straight_through",
    "swap",
    "unpack_codes",
]
