"""Which tests of GPU kernels run where; there is no GPU in any of them.

Kernels are run by Triton's interpreter where `TRITON_INTERPRET=1` is set before Triton is imported, and compiled where
it is not: one process does one of the two.
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1, as the session `kernels` does")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing; runs without TRITON_INTERPRET")
