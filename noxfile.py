"""The front door: every check, the main job and the evidence, one session each.

`nox` runs what CI runs. `nox -l` lists everything.
"""

import os
import pathlib
import shutil
import tomllib
from collections.abc import Mapping, Sequence

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "contracts", "types", "tests", "compile", "docs", "build", "quickstart"]

ROOT = pathlib.Path(__file__).parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
CONSTRAINTS = ["-c", "constraints/ci.txt"]
# What the optional parts of a package need; every session but the minimal ones installs it.
EXTRAS = {"q-core": "[cli]", "q-kernels": "[cpu]"}
DEV_TOOLS = ["nox[uv]", "ruff==0.17.6", "mypy", "import-linter", "scikit-learn", "hatch", "towncrier"]
# Only what the session installed can be imported, so that an import of a sibling that is not declared fails.
INSTALLED_ONLY = ["-o", "pythonpath=benchmarks"]
TEST_TOOLS = ["pytest>=8.3", "hypothesis>=6.100", "beartype>=0.20"]
# Networks on real digits; what the command needs, which q-core brings as an extra.
OWN_TOOLS = {"q-core": ["scikit-learn>=1.5"], "q-aquant": ["matplotlib>=3.9", "tyro>=0.9"]}

# uv does not read pip's setting, so a machine that keeps wheels on disk for pip keeps them for uv too.
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])


def module(package: str) -> str:
    return package.replace("-", "_")


def dependencies(package: str) -> list[str]:
    """Names of the workspace packages that `package` declares it needs, itself last."""
    project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]
    siblings = [name for name in PACKAGES if any(line.startswith(name) for line in project.get("dependencies", []))]
    return [*siblings, package]


def editable(*packages: str, extras: Mapping[str, str] = EXTRAS) -> list[str]:
    """Arguments that install packages from the tree."""
    return [part for name in packages for part in ("-e", f"packages/{name}{extras.get(name, '')}")]


def install(session: nox.Session, *packages: str, tools: Sequence[str] = ()) -> None:
    """Install packages editable with the siblings they declare, in one command, so that none is sought elsewhere."""
    names = dict.fromkeys(name for package in packages for name in dependencies(package))
    extras = {name: EXTRAS[name] for name in packages if name in EXTRAS}
    session.install(*CONSTRAINTS, *editable(*names, extras=extras), *tools)
    session.log(f"installed {', '.join(names)} with the declared dependencies only")


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """Test one package, installed with only the siblings it declares."""
    install(session, package, tools=[*TEST_TOOLS, *OWN_TOOLS.get(package, [])])
    hook = f"--jaxtyping-packages={module(package)},beartype.beartype"
    arguments = session.posargs or ["-m", "not compile and not zoo"]
    session.run("pytest", f"packages/{package}/tests", hook, *INSTALLED_ONLY, *arguments)


@nox.session
def kernels(session: nox.Session) -> None:
    """Run the GPU kernels in Triton's interpreter, and count the instructions of their machine code; needs no GPU."""
    install(session, "q-kernels", tools=[*TEST_TOOLS, "triton"])
    tests = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("packages/q-kernels/tests/test_gpu_*.py"))]
    session.run("pytest", *tests, *INSTALLED_ONLY, *session.posargs, env={"TRITON_INTERPRET": "1"})
    session.run("pytest", "packages/q-kernels/tests/test_gpu_code.py", *INSTALLED_ONLY, *session.posargs)


@nox.session(name="compile")
def compiled(session: nox.Session) -> None:
    """Check that every quantizer and layer compiles as one graph; the type hook of `tests` would break it."""
    install(session, *PACKAGES, tools=TEST_TOOLS)
    session.run("pytest", "packages", "-m", "compile", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check format and lint rules."""
    session.install("ruff==0.17.6")
    session.run("ruff", "format", "--check", "--diff", ".")
    session.run("ruff", "check", ".")


@nox.session
def contracts(session: nox.Session) -> None:
    """Check who imports whom."""
    install(session, *PACKAGES, tools=["import-linter>=2.3"])
    session.run("lint-imports", "--no-cache")


@nox.session
def types(session: nox.Session) -> None:
    """Check types strictly."""
    install(session, *PACKAGES, tools=["mypy>=1.15"])
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site, failing on any warning, after checking its tables and running its snippets."""
    install(session, *PACKAGES, tools=["mkdocs<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.29"])
    # mkdocstrings lets ruff lay out the signatures.
    session.install(*CONSTRAINTS, "sybil>=9", "scikit-learn>=1.5", "ruff==0.17.6", *TEST_TOOLS)
    session.run("python", "benchmarks/tables.py", "--check")
    readmes = [f"packages/{package}/README.md" for package in PACKAGES]
    session.run("pytest", "docs", "README.md", *readmes, "-p", "no:cacheprovider")
    session.run("mkdocs", "build", "--strict")


@nox.session
def build(session: nox.Session) -> None:
    """Build wheel and sdist of each package, check them, install them in a clean environment and import them."""
    session.install("build>=1.2", "hatchling>=1.26", "twine>=6")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for package in PACKAGES:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", "dist", f"packages/{package}")
    artefacts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "dist").iterdir())
    session.run("twine", "check", "--strict", *artefacts)
    clean = pathlib.Path(session.create_tmp()) / "clean"
    session.run("python", "-m", "venv", "--clear", str(clean))
    wheels = [name for name in artefacts if name.endswith(".whl")]
    session.run(str(clean / "bin" / "pip"), "install", "-q", *CONSTRAINTS, *wheels, external=True)
    for package in PACKAGES:
        code = f"import {module(package)} as m; print({package!r}, m.__version__, 'imports', len(m.__all__), 'names')"
        session.run(str(clean / "bin" / "python"), "-I", "-c", code, external=True)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def minimums(session: nox.Session, package: str) -> None:
    """Test one package against the lowest versions it declares."""
    extras = {name: extra for name, extra in EXTRAS.items() if name != "q-core"}
    lowest = ("--resolution", "lowest-direct")
    session.run_install("uv", "pip", "install", *lowest, *editable(*dependencies(package), extras=extras))
    # The tools of the tests are no dependency of the package, so they are as new as they come.
    session.run_install("uv", "pip", "install", "--upgrade-package", "pytest", *TEST_TOOLS)
    session.run(
        "pytest", f"packages/{package}/tests", *INSTALLED_ONLY, "-m", "not compile and not zoo", *session.posargs
    )


@nox.session
def quickstart(session: nox.Session) -> None:
    """Run the main job: train a small ResNet on real digits, quantize it, report."""
    install(session, *PACKAGES, tools=["scikit-learn>=1.5"])
    session.run("python", "benchmarks/quickstart/digits.py", "--out", "out/quickstart", *session.posargs)


@nox.session
def dev(session: nox.Session) -> None:
    """Make .venv with every package editable and every tool."""
    venv = ROOT / ".venv"
    session.run("python", "-m", "venv", str(venv))
    pip = [str(venv / "bin" / "pip"), "install", "-q", *CONSTRAINTS]
    session.run(*pip, *editable(*PACKAGES), *TEST_TOOLS, *DEV_TOOLS, external=True)
    session.log(f"activate it with: source {venv.relative_to(ROOT)}/bin/activate")


def install_torchvision(session: nox.Session, *packages: str, tools: Sequence[str] = ()) -> None:
    """Install packages beside the ordinary pair torch and torchvision, whose compiled parts fit each other.

    pip, not uv: it is the resolver that a user's machine is set up for, down to its cache of large wheels.
    """
    session.run("python", "-m", "ensurepip", "--upgrade", silent=True)
    session.run("python", "-m", "pip", "install", "-q", "torch", "torchvision", *editable(*packages), *tools)


@nox.session
def zoo(session: nox.Session) -> None:
    """Run torchvision's models through the whole pipeline."""
    install_torchvision(session, *PACKAGES, tools=[*TEST_TOOLS, "scikit-learn>=1.5"])
    session.run("pytest", "packages", "-m", "zoo", *session.posargs)


ACCURACY = {
    "ptq": "ptq.py",
    "adder": "adder.py",
    "adder-deit": "adder_deit.py",
    "adder-qat": "adder_qat.py",
    "reconstruction": "reconstruction.py",
    "reconstruction-past": "reconstruction_past.py",
    "qat": "qat.py",
}
SPEED = {"quantizers": "run.py", "adder": "adder.py", "reconstruction": "reconstruction.py", "nulsq": "nulsq.py"}


def scripts(session: nox.Session, suites: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The scripts of all suites, or of the one that `--suite` names, and the other arguments."""
    arguments = list(session.posargs)
    if "--suite" not in arguments:
        return list(suites.values()), arguments
    place = arguments.index("--suite")
    name = " ".join(arguments[place + 1 : place + 2])
    if name not in suites:
        session.error(f"--suite {name}: there are {', '.join(suites)}")
    return [suites[name]], arguments[:place] + arguments[place + 2 :]


@nox.session
def accuracy(session: nox.Session) -> None:
    """Measure accuracy on real images: `nox -s accuracy -- --data DIR [--suite NAME]`."""
    chosen, arguments = scripts(session, ACCURACY)
    if "--data" not in arguments:
        session.error("say where the images and networks are: nox -s accuracy -- --data DIR")
    install(session, *PACKAGES, tools=["pillow>=10"])
    for script in chosen:
        session.run("python", f"benchmarks/accuracy/{script}", *arguments)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure speed beside the named peers: `nox -s bench -- [--suite NAME]`."""
    chosen, arguments = scripts(session, SPEED)
    install_torchvision(session, *PACKAGES)
    for script in chosen:
        session.run("python", f"benchmarks/speed/{script}", *arguments)
