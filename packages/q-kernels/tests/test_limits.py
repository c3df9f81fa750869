"""Limits of GPUs, against figures worked out by hand."""

import pytest

from q_kernels import limits
from q_kernels.limits import KNOWN, Gpu, Limit

H200 = KNOWN["H200"]


def test_float32_adders_of_an_h200_are_bound_by_16_7_trillion_pairs_a_second() -> None:
    limit = limits.distance(H200, 10**13, 10**9)
    assert limit.bound == "arithmetic"
    # 132 multiprocessors, 1.98 GHz, 64 pairs each.
    assert 10**13 / limit.seconds == pytest.approx(132 * 1.98e9 * 64)


def test_fake_quantization_of_float32_is_bound_by_memory_and_of_15_steps_backward_nearly_by_both() -> None:
    gpu = Gpu(132, 1.98e9, 4.3e12)
    assert 1 / limits.fake_quantize(gpu, 1, 4).seconds == pytest.approx(4.3e12 / 8)
    assert 1 / limits.fake_quantize_grad(gpu, 1, 4).seconds == pytest.approx(4.3e12 / 12)
    backward = limits.fake_quantize_levels_grad(gpu, 1, 4, 16)
    assert backward.bound == "memory"
    assert 0.8 < backward.arithmetic / backward.memory < 0.9
    assert limits.fake_quantize_levels_grad(gpu, 1, 2, 16).bound == "arithmetic"


def test_percent_of_a_limit() -> None:
    assert Limit(2.0, 1.0).percent(4.0) == pytest.approx(50.0)
    assert Limit(1.0, 2.0).bound == "memory"
