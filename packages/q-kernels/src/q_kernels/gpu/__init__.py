"""Kernels for NVIDIA GPUs, compiled on first use by Triton, which torch brings along where it was built for them.

What is offered can be imported, and says why it refuses, on a machine with neither a GPU nor Triton. Only the modules
of `q_kernels.gpu.jit` import Triton, and only `run` imports them. No module talks to a driver when it is imported.
"""
