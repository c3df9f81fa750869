"""Shared by every test: seeds and Hypothesis settings."""

import hypothesis
import pytest
import torch

# Two threads that wait for each other cost more than they save on tensors as small as those of a test.
torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "q-nulsq",
    deadline=None,  # the first call of an operator loads it, which no deadline can foresee
    max_examples=25,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("q-nulsq")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)
