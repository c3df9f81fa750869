"""One tree: a caller can catch what the standard library would raise, or everything of this family."""

import inspect

import pytest

import q_core
from q_core import errors

TREE = {
    "SpecError": ValueError,
    "ShapeError": ValueError,
    "RangeError": ValueError,
    "DataError": ValueError,
    "MatchError": LookupError,
    "StateError": RuntimeError,
    "FormatError": ValueError,
    "BackendError": RuntimeError,
    "LawError": AssertionError,
}


def test_the_tree_is_complete():
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined == {"QuantizationError", *TREE}


@pytest.mark.parametrize("name", TREE)
def test_an_error_is_one_of_ours_and_one_of_the_standard_library(name):
    error = getattr(errors, name)
    assert issubclass(error, errors.QuantizationError)
    assert issubclass(error, TREE[name])
    assert getattr(q_core, name) is error
    assert f"{name}({TREE[name].__name__})" in errors.__doc__


def test_every_error_is_exported():
    assert {"QuantizationError", *TREE} <= set(q_core.__all__)
