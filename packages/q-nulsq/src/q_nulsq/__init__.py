"""Quantization-aware training with learned steps, uniform or not, and its peers on the same bench."""

from importlib import metadata as _metadata

from q_nulsq.calibration import LloydMaxObserver, LsqObserver, NormalizedMSEObserver
from q_nulsq.distillation import distillation_loss
from q_nulsq.grid import StepGrid
from q_nulsq.monitor import StepMonitor, check_finite, inspect
from q_nulsq.optim import parameter_groups, project_after, warmup_cosine
from q_nulsq.positivity import Exponential, Positivity, Projection, Softplus
from q_nulsq.preparation import Part, prepare
from q_nulsq.progressive import lower_bits
from q_nulsq.recipes import lsq, nulsq_a, nulsq_w, nulsq_wa
from q_nulsq.thermometer import ThermometerConv2d, ThermometerLinear, deploy

try:
    __version__ = _metadata.version("q-nulsq")
except _metadata.PackageNotFoundError:  # run from a source tree that is on the path but not installed
    __version__ = "0+source"

__all__ = [
    "Exponential",
    "LloydMaxObserver",
    "LsqObserver",
    "NormalizedMSEObserver",
    "Part",
    "Positivity",
    "Projection",
    "Softplus",
    "StepGrid",
    "StepMonitor",
    "ThermometerConv2d",
    "ThermometerLinear",
    "check_finite",
    "deploy",
    "distillation_loss",
    "inspect",
    "lower_bits",
    "lsq",
    "nulsq_a",
    "nulsq_w",
    "nulsq_wa",
    "parameter_groups",
    "prepare",
    "project_after",
    "warmup_cosine",
]
