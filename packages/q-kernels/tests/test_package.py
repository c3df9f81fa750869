"""The package as others meet it: entry points, machines without numba, narrower machines."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import tomllib

import pytest

from q_core.kernels import Kernel

PROJECT = tomllib.loads(pathlib.Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
ENTRIES = PROJECT["entry-points"]["q_core.kernels"]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("name", ENTRIES)
def test_entry_points_lead_to_kernels(name: str) -> None:
    kernels = importlib.metadata.EntryPoint(name, ENTRIES[name], "q_core.kernels").load()
    assert kernels
    assert all(isinstance(kernel, Kernel) for kernel in kernels)


def test_package_imports_nothing_heavy() -> None:
    code = "import sys, q_kernels; raise SystemExit(bool({'numba', 'llvmlite', 'torch', 'triton'} & set(sys.modules)))"
    assert python("-c", code).returncode == 0


def test_without_numba_the_kernels_say_what_to_install() -> None:
    result = python("-c", "import sys; sys.modules['numba'] = None; import q_kernels, q_kernels.cpu.adder")
    assert result.returncode == 1
    assert "ImportError: q_kernels.cpu needs numba" in result.stderr
    assert "pip install 'q-kernels[cpu]'" in result.stderr


AVX2 = "+sse4.2,+popcnt,+avx,+avx2,+fma,+bmi,+bmi2,+f16c"
MACHINES = {
    "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2},
    "no vectors in particular": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
}


@pytest.mark.parametrize("machine", MACHINES)
def test_kernels_built_for_narrower_machines_are_as_right(machine: str) -> None:
    if "NUMBA_CPU_NAME" in os.environ:
        pytest.skip("these are the tests that this test runs")
    if machine == "AVX2" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"AVX2 does not exist on {platform.machine()}")
    names = ("test_cpu_adder.py", "test_cpu_border.py", "test_cpu_fake.py", "test_cpu_levels.py")
    paths = [str(pathlib.Path(__file__).with_name(name)) for name in names]
    some = "exact or agree or corners or none or infinite or threads or empty"
    result = python("-m", "pytest", *paths, "-q", "-p", "no:cacheprovider", "-k", some, **MACHINES[machine])
    assert result.returncode == 0, result.stdout
