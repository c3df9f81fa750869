"""What Triton compiles. Nothing here allocates memory or looks at a shape; that is done one floor up.

A kernel works on a *matrix of rows*: the elements of a row share their parameters. How far apart two rows and two
columns lie in memory are arguments, so that one kernel serves a scale per tensor, per row and per column. A program
takes a tile of some rows and `steps` times some columns of them. What it sums up over its columns it writes to a place
of its own, so that the result does not depend on the order in which programs run, nor on the GPU.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(f"q_kernels.gpu.jit needs Triton ({error}): pip install triton") from error
