"""Kernels for CPUs, compiled on first use by LLVM through numba: `pip install "q-kernels[cpu]"`."""

try:
    import numba as _numba  # noqa: F401
except ImportError as error:
    raise ImportError(f"q_kernels.cpu needs numba ({error}): pip install 'q-kernels[cpu]'") from error
