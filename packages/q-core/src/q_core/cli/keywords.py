"""What a method takes beside the model, the images and the bits: seen in its signature, read from words.

A method is an ordinary function, so its keyword-only parameters, with their types and defaults, say all that a command
and a row of evidence must know. Numbers and texts can be written as words; anything else is Python's to build.
"""

import difflib
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Union, get_args, get_origin

from q_core.errors import SpecError

FLAGS = ("weight_bits", "activation_bits", "edge_bits", "seed", "iterations", "journal")
"""Keywords that have a flag of their own."""

_TRUTH = {"true": True, "false": False}


def taken(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters of a method by their names.

    Args:
        method: A function with the signature of `q_core.nearest`.
    """
    parameters = inspect.signature(method).parameters.values()
    return {each.name: each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def read(name: str, method: Callable[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """Read keyword arguments from words of the form `NAME=VALUE`.

    A value becomes what the parameter is declared to be: a number, true or false, a text, several texts between
    commas, or none where that is allowed.

    Args:
        name: What the method is called in messages.
        method: The method that gets them.
        words: The words.

    Raises:
        SpecError: A word of another form, a name that the method does not take or that comes twice, or a value that is
            not what it takes.
    """
    parameters = {key: each for key, each in taken(method).items() if key not in (*FLAGS, "progress")}
    found: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.partition("=")
        key = key.replace("-", "_")
        if not separator:
            raise SpecError(f"--option {word}: expected NAME=VALUE")
        if key in FLAGS:
            raise SpecError(f"--option {word}: give it as --{key.replace('_', '-')} {text}")
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            known = ", ".join(parameters) or "no option"
            raise SpecError(f"--option {word}: method {name!r} takes {known}{hint}")
        if key in found:
            raise SpecError(f"--option {word}: {key} is given twice")
        found[key] = _value(word, text, parameters[key])
    return found


def flag(name: str, method: Callable[..., Any], key: str, value: object) -> dict[str, Any]:
    """Return a keyword argument that was given by a flag of its own, or none if it was not given.

    Args:
        name: What the method is called in messages.
        method: The method that gets it.
        key: The keyword.
        value: What was given; None for nothing.

    Raises:
        SpecError: The method does not take it.
    """
    if value is None:
        return {}
    if key not in taken(method):
        raise SpecError(f"--{key} {value}: method {name!r} takes no {key}; leave it out")
    return {key: value}


def least(method: Callable[..., Any]) -> dict[str, Any]:
    """Return keyword arguments by which a method that learns takes one step on one image, and keeps nothing.

    Args:
        method: The method; one that does not learn takes none of these.
    """
    quick: dict[str, Any] = {"batch_size": 1, "held_out": 0, "journal": None}
    return {key: quick.get(key, 1) for key in taken(method) if key in quick or key.split("_")[-1] == "iterations"}


def _value(word: str, text: str, parameter: inspect.Parameter) -> Any:
    kinds = _kinds(parameter)
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    if Sequence[str] in kinds:
        return tuple(text.split(","))
    if all(kind in _LABELS for kind in kinds):
        allowed = " or ".join(label for kind, label in _LABELS.items() if kind in kinds)
        raise SpecError(f"--option {word}: {parameter.name} is {allowed}")
    raise SpecError(
        f"--option {word}: {parameter.name} is no number and no text; write a function that calls the method with it, "
        "and give that as --method FILE.py:FUNCTION"
    )


_LABELS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", type(None): "none"}


def _kinds(parameter: inspect.Parameter) -> tuple[Any, ...]:
    annotation = parameter.annotation
    if annotation is parameter.empty or isinstance(annotation, str):
        # Undeclared, or declared as a text that only its module can evaluate: the default tells.
        return (type(parameter.default),) if parameter.default not in (parameter.empty, None) else (str,)
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)
