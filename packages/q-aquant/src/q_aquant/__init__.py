"""Post-training quantization by reconstruction, with a learned rounding border for activations."""

from importlib import metadata as _metadata

from q_aquant.border import FusedBorder, LearnedBorder
from q_aquant.disk import OnDisk
from q_aquant.forms import ChannelBorder, ElementBorder, WindowBorder
from q_aquant.layers import PatchConv2d
from q_aquant.learners import ActivationScales, Borders, WeightRounding
from q_aquant.losses import FisherLoss, PowerLoss
from q_aquant.methods import Reconstructed, a_rounding, adaround, aquant, brecq, qdrop, rounding
from q_aquant.packed import PackedPatchConv2d, border_bits
from q_aquant.placement import InputPlacement, OutputPlacement
from q_aquant.plan import Calibration, Plan
from q_aquant.reconstruct import reconstruct
from q_aquant.roundings import FixedRounding, LearnedRounding
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
    "ElementBorder",
    "FisherLoss",
    "FixedRounding",
    "FusedBorder",
    "InputPlacement",
    "LearnedBorder",
    "LearnedRounding",
    "OnDisk",
    "OutputPlacement",
    "PackedPatchConv2d",
    "PatchConv2d",
    "Plan",
    "PowerLoss",
    "Reconstructed",
    "Units",
    "WeightRounding",
    "WindowBorder",
    "a_rounding",
    "adaround",
    "aquant",
    "border_bits",
    "brecq",
    "find_layers",
    "find_units",
    "qdrop",
    "reconstruct",
    "rounding",
]
