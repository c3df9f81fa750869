"""Post-training quantization by reconstruction, with a learned rounding border for activations."""

from importlib import metadata as _metadata

from q_aquant.border import FusedBorder, LearnedBorder
from q_aquant.deploy import by_shifts, by_thresholds, by_warp, deploy, in_integers
from q_aquant.disk import OnDisk
from q_aquant.forms import ChannelBorder, ElementBorder, WindowBorder
from q_aquant.layers import PatchConv2d
from q_aquant.learners import ActivationScales, Borders, WeightRounding, WeightScales
from q_aquant.losses import DivergenceLoss, FisherLoss, PowerLoss, PredictionDifference
from q_aquant.methods import (
    Reconstructed,
    a_rounding,
    adaround,
    aquant,
    aquant_closed_form,
    brecq,
    qdrop,
    rounding,
)
from q_aquant.packed import PackedPatchConv2d, border_bits
from q_aquant.placement import InputPlacement, OutputPlacement
from q_aquant.plan import Calibration, Plan
from q_aquant.reconstruct import reconstruct
from q_aquant.roundings import FixedRounding, LearnedRounding
from q_aquant.shifted import IntegerConv2d, ShiftedConv2d
from q_aquant.starts import ClosedForm
from q_aquant.thresholds import ThresholdRounding, WarpedRounding, carrier_table
from q_aquant.units import Units, find_layers, find_units

try:
    __version__ = _metadata.version("q-aquant")
except _metadata.PackageNotFoundError:  # run from a source tree that is on the path but not installed
    __version__ = "0+source"

__all__ = [
    "ActivationScales",
    "Borders",
    "Calibration",
    "ChannelBorder",
    "ClosedForm",
    "DivergenceLoss",
    "ElementBorder",
    "FisherLoss",
    "FixedRounding",
    "FusedBorder",
    "InputPlacement",
    "IntegerConv2d",
    "LearnedBorder",
    "LearnedRounding",
    "OnDisk",
    "OutputPlacement",
    "PackedPatchConv2d",
    "PatchConv2d",
    "Plan",
    "PowerLoss",
    "PredictionDifference",
    "Reconstructed",
    "ShiftedConv2d",
    "ThresholdRounding",
    "Units",
    "WarpedRounding",
    "WeightRounding",
    "WeightScales",
    "WindowBorder",
    "a_rounding",
    "adaround",
    "aquant",
    "aquant_closed_form",
    "border_bits",
    "brecq",
    "by_shifts",
    "by_thresholds",
    "by_warp",
    "carrier_table",
    "deploy",
    "find_layers",
    "find_units",
    "in_integers",
    "qdrop",
    "reconstruct",
    "rounding",
]
