"""Which implementation of an operator runs, and what is said about it."""

import logging
import pathlib
import threading
from collections.abc import Callable
from importlib import metadata

import pytest

from q_core import kernels
from q_core.errors import BackendError
from q_core.kernels import Kernel, Operator, only


def kernel(name: str, rate: float, refuses: Callable[[int], str | None] = lambda x: None) -> Kernel:
    """A kernel of an operator of one integer, which says who computed."""
    return Kernel(name, refuses, lambda x: rate, lambda x: f"{name} of {x}")


def odd(x: int) -> str | None:
    return f"it takes even numbers, not {x}" if x % 2 else None


def operator(*own: Kernel) -> Operator:
    return Operator("q_test.name", lambda x: f"reference of {x}", own)


SLOW, FAST, EVEN = kernel("slow", 1e9), kernel("fast", 3e9), kernel("even", 9e9, odd)


def test_without_kernels_the_meaning_runs() -> None:
    assert operator()(3) == "reference of 3"
    assert operator().explain(3) == "reference: runs, in plain torch"
    assert operator().choose(3).rate == 0


def test_fastest_of_those_that_can_runs() -> None:
    op = operator(SLOW, EVEN, FAST)
    assert op(2) == "even of 2"
    assert op(3) == "fast of 3"
    assert op.choose(3).kernel is FAST
    assert op.choose(3).rate == 3e9


def test_rate_may_depend_on_the_work() -> None:
    grows = Kernel("grows", lambda x: None, float, lambda x: f"grows of {x}")
    op = operator(grows, kernel("flat", 10.0))
    assert op(9) == "flat of 9"
    assert op(11) == "grows of 11"


def test_every_implementation_has_a_line_that_says_why() -> None:
    assert operator(SLOW, EVEN, FAST).explain(3).splitlines() == [
        "fast: runs, measured to be the fastest of those that can",
        "reference: measured to be slower on work of this kind",
        "slow: measured to be slower on work of this kind",
        "even: it takes even numbers, not 3",
    ]
    assert operator(EVEN).explain(3).splitlines() == [
        "reference: runs, in plain torch",
        "even: it takes even numbers, not 3",
    ]


def test_only_lets_one_implementation_run() -> None:
    op = operator(SLOW, FAST)
    with only("slow"):
        assert op(1) == "slow of 1"
        assert "fast: only slow is asked for" in op.explain(1)
        with only("reference"):
            assert op(1) == "reference of 1"
        assert op(1) == "slow of 1"
    assert op(1) == "fast of 1"


def test_only_ends_with_an_exception() -> None:
    op = operator(FAST)
    with pytest.raises(KeyError), only("reference"):
        raise KeyError
    assert op(1) == "fast of 1"


def test_only_governs_its_own_thread() -> None:
    op, heard = operator(FAST), []
    with only("reference"):
        thread = threading.Thread(target=lambda: heard.append(op(1)))
        thread.start()
        thread.join()
    assert heard == ["fast of 1"]


def test_what_only_asks_for_must_be_there_and_able() -> None:
    with only("even"), pytest.raises(BackendError) as refused:
        operator(EVEN, FAST)(3)
    assert str(refused.value) == (
        "q_test.name: even cannot run: it takes even numbers, not 3; leave the block of only() to let others run"
    )
    with only("fastest"), pytest.raises(BackendError, match="there are only reference, slow, fast"):
        operator(SLOW, FAST)(3)


def test_kernels_can_be_offered_by_hand() -> None:
    op = operator(SLOW)
    assert op(1) == "slow of 1"
    op.offer((FAST,))
    assert op(1) == "fast of 1"
    op.offer([kernel("faster", 4e9)])
    assert op(1) == "faster of 1"


def test_of_several_kernels_with_one_name_the_last_counts() -> None:
    op = operator(SLOW, FAST)
    op.offer([Kernel("fast", lambda x: None, lambda x: 5e9, lambda x: f"new of {x}")])
    assert op(1) == "new of 1"
    assert [k.name for k in op.kernels] == ["slow", "fast"]


def test_falling_back_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    op = operator(EVEN)
    with caplog.at_level(logging.INFO, "q_core.kernels"):
        op(2)
        assert not caplog.messages
        op(3)
        op(5)
        with only("reference"):
            op(2)
    assert caplog.messages == ["q_test.name runs in plain torch (even: it takes even numbers, not 3)"]


def test_running_without_any_kernel_or_by_request_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "q_core.kernels"):
        operator()(3)
        with only("reference"):
            operator(FAST)(3)
    assert not caplog.messages


PACKAGE = """
from q_core.kernels import Kernel

LOADED = (Kernel("loaded", lambda x: None, lambda x: 2e9, lambda x: f"loaded of {x}"),)
"""


@pytest.fixture
def package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with kernels; returns where they are."""
    tmp_path.joinpath("q_test_kernels.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    return "q_test_kernels:LOADED"


def entry_points(monkeypatch: pytest.MonkeyPatch, *values: str) -> list[dict[str, str]]:
    """Pretend that packages with these entry points are installed; returns the questions asked."""
    asked: list[dict[str, str]] = []

    def find(**question: str) -> list[metadata.EntryPoint]:
        asked.append(question)
        return [metadata.EntryPoint("q_test.name", value, kernels.GROUP) for value in values]

    monkeypatch.setattr(kernels.metadata, "entry_points", find)
    return asked


def test_kernels_of_installed_packages_are_found_once(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = entry_points(monkeypatch, package)
    op = operator(SLOW)
    assert not asked  # nor before the first call, so that importing an operator imports no kernels
    assert op(1) == "loaded of 1"
    assert op(2) == "loaded of 2"
    assert asked == [{"group": "q_core.kernels", "name": "q_test.name"}]


def test_kernels_that_cannot_be_loaded_are_reported_once(
    package: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry_points(monkeypatch, "q_no_such_package.cpu:some", "q_no_such_package.cpu:others", package)
    assert operator()(1) == "loaded of 1"
    assert operator()(1) == "loaded of 1"
    assert caplog.messages == [
        "the kernels of q_no_such_package.cpu cannot be loaded, others run in their place: "
        "No module named 'q_no_such_package'"
    ]


def test_where_no_kernels_can_be_loaded_the_meaning_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, "q_no_such_package_either:some")
    assert operator()(1) == "reference of 1"


def test_numbers_are_asked_for_only_of_kernels_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: int) -> float:
        raise ZeroDivisionError

    entry_points(monkeypatch)
    assert operator(Kernel("never", lambda x: "no", fails, fails))(1) == "reference of 1"
