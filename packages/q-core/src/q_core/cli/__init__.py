"""The command `q-quantize`, behind the extra `q-core[cli]`.

Everything here stands on the public parts of the package and adds what a command needs: finding a model and images,
writing rows of evidence, and a report. `q_core.cli.job.run` does the same job from Python.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words after the name of the command; those of the process when None.

    Returns:
        0 when all went well, 2 when the input cannot be used; the reason is then on standard error.
    """
    try:
        from q_core.cli.command import execute
    except ModuleNotFoundError as error:
        if error.name not in ("tyro", "matplotlib"):
            raise
        sys.stderr.write(f"q-quantize needs {error.name}: install it with pip install 'q-core[cli]'\n")
        return 2
    return execute(sys.argv[1:] if arguments is None else list(arguments))
