"""Runs the documentation: `pytest docs README.md`.

On every Markdown page, in one namespace and one scratch folder per page:

- a ```python block is executed; with a title it is a file, and is written under that name instead;
- a ```console block is executed line by line where a line starts with `$ `; what follows is the expected output;
- a ```text block straight after a ```python block is what that block prints.

`...` in an expected output stands for anything. A decimal fraction may be off by a tenth: processors differ in the last
bit of a sum, and training amplifies it. `<!-- skip: next "reason" -->` leaves the next block out.
"""

import contextlib
import io
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([*map(str, ROOT.glob("packages/*/src")), *filter(None, [os.environ.get("PYTHONPATH")])])
PROGRAMS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "q-quantize": [sys.executable, "-c", "import sys; from q_core.cli import main; sys.exit(main())"],
}
FRACTION = r"-?\d+\.\d+"
LEXER = FencedCodeBlockLexer(".+")


def blocks(document: Document) -> Iterable[Region]:
    """Find the blocks that run, and the outputs to check."""
    printed = -1
    for region in sorted(LEXER(document), key=lambda region: region.start):
        language, _, rest = region.lexemes["language"].strip().partition(" ")
        region.parsed = region.lexemes["source"]
        follows = not document.text[printed : region.start].strip() if printed >= 0 else False
        printed = -1
        if language == "python" and (title := re.search(r'title="([^"]+)"', rest)):
            region.parsed, region.evaluator = (title[1], region.parsed), write
        elif language == "python":
            region.evaluator, printed = execute, region.end
        elif language == "text" and follows:
            region.evaluator = compare
        elif language == "console" and region.parsed.startswith("$ "):
            region.evaluator = command
        else:
            continue
        yield region


def write(example: Example) -> None:
    """Write a block with a title to a file."""
    name, source = example.parsed
    pathlib.Path(name).write_text(source, encoding="utf-8")


def execute(example: Example) -> None:
    """Run Python, and keep what it prints for `compare`."""
    lines = "\n" * (example.line + example.parsed.line_offset)  # so that a traceback shows the line of the page
    code = compile(lines + example.parsed, example.path, "exec", dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, example.namespace)
    example.namespace["__printed__"] = output.getvalue()


def compare(example: Example) -> str | None:
    """Hold what the last block printed against the page."""
    return difference(example.parsed, example.namespace["__printed__"])


def command(example: Example) -> str | None:
    """Run commands; each starts with `$ ` and is followed by what it prints."""
    for part in re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)[1:]:
        line, _, expected = re.sub(r"\\\n\s*", "", part).partition("\n")
        program, *arguments = shlex.split(line)
        done = subprocess.run(
            [*PROGRAMS[program], *arguments],
            env={**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return f"{line} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        if expected.strip() and (found := difference(expected, done.stdout)):
            return f"{line}\n{found}"
    return None


def difference(expected: str, actual: str) -> str | None:
    """Tell how an output differs from what the page shows."""
    parts = re.split(rf"(\.\.\.|\s+|{FRACTION})", expected.strip())
    wanted = re.findall(FRACTION, expected)
    pattern = "".join(
        ".*?" if part == "..." else r"\s+" if part.isspace() else f"({FRACTION})" if part in wanted else re.escape(part)
        for part in parts
    )
    found = re.fullmatch(pattern, actual.strip(), re.DOTALL)
    if found and all(
        math.isclose(float(one), float(other), rel_tol=0.1, abs_tol=0.05)
        for one, other in zip(wanted, found.groups(), strict=True)
    ):
        return None
    return f"expected:\n{expected}\nprinted:\n{actual}"


def enter(namespace: dict[str, Any]) -> None:
    """Begin a page in a scratch folder of its own."""
    namespace["__folder__"] = folder = tempfile.TemporaryDirectory()
    namespace["__home__"] = os.getcwd()
    os.chdir(folder.name)
    sys.path.insert(0, folder.name)  # files of the page can be imported
    torch.manual_seed(0)


def leave(namespace: dict[str, Any]) -> None:
    """Go back and remove the folder."""
    os.chdir(namespace["__home__"])
    sys.path.remove(namespace["__folder__"].name)
    namespace["__folder__"].cleanup()


SYBIL = Sybil([blocks, SkipParser()], pattern="*.md", path=str(ROOT), setup=enter, teardown=leave)


def pytest_configure(config: pytest.Config) -> None:
    """Collect the pages."""

    # Hooks of this file hold for this folder only; registered as a plugin, they hold for README.md too.
    class Pages:
        """Collects every Markdown page that is asked for."""

        pytest_collect_file = staticmethod(SYBIL.pytest())

    config.pluginmanager.register(Pages())
