"""Shared by every test: seeds, Hypothesis settings, and the oracles."""

import importlib.util
import pathlib
import types

import hypothesis
import pytest
import torch

# Two threads that wait for each other cost more than they save on tensors as small as those of a test.
torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "q-core",
    deadline=None,  # the first call of an operator loads it, which no deadline can foresee
    max_examples=25,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("q-core")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def oracles() -> types.ModuleType:
    """Slow versions written from the equations, see oracles.py."""
    path = pathlib.Path(__file__).with_name("oracles.py")
    spec = importlib.util.spec_from_file_location("q_core_oracles", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
