"""AdderNets: networks whose layers sum absolute differences instead of products."""

from importlib import metadata as _metadata

from q_adder.functional import adder2d, adder_linear, adder_matmul
from q_adder.integer import IntegerAdderConv2d, IntegerAdderLinear, IntegerAdderMatmul, explain
from q_adder.layers import AdderConv2d, AdderLinear, AdderMatmul, anneal_exponent
from q_adder.optim import AdderLearningRate, adder_weights
from q_adder.quantized import QuantAdderConv2d, QuantAdderLinear, QuantAdderMatmul, TiedGrid, TiedSpec
from q_adder.ranges import ExactRange, InputRange, StreamingRange
from q_adder.redistribution import Redistributed, correct_means, redistribute, reestimate_batchnorm
from q_adder.refinement import Tuning, search_ranges, trainable, tune_ranges
from q_adder.schemes import (
    Interval,
    OneScale,
    OneSided,
    Published,
    Scheme,
    Symmetric,
    clamp_weights,
    cluster_kernels,
)

try:
    __version__ = _metadata.version("q-adder")
except _metadata.PackageNotFoundError:  # run from a source tree that is on the path but not installed
    __version__ = "0+source"

__all__ = [
    "AdderConv2d",
    "AdderLearningRate",
    "AdderLinear",
    "AdderMatmul",
    "ExactRange",
    "InputRange",
    "IntegerAdderConv2d",
    "IntegerAdderLinear",
    "IntegerAdderMatmul",
    "Interval",
    "OneScale",
    "OneSided",
    "Published",
    "QuantAdderConv2d",
    "QuantAdderLinear",
    "QuantAdderMatmul",
    "Redistributed",
    "Scheme",
    "StreamingRange",
    "Symmetric",
    "TiedGrid",
    "TiedSpec",
    "Tuning",
    "adder2d",
    "adder_linear",
    "adder_matmul",
    "adder_weights",
    "anneal_exponent",
    "clamp_weights",
    "cluster_kernels",
    "correct_means",
    "explain",
    "redistribute",
    "reestimate_batchnorm",
    "search_ranges",
    "trainable",
    "tune_ranges",
]
