"""Every public name says what it takes, in which shapes, what it returns and raises, and whence."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
import types

import pytest

import piflow_jax
import piflow_jax.flow
from piflow_jax.flow.policies.base import per_sample, promote

SOURCE = re.compile(r"arXiv|paper|[Ss]ource:")
ARRAY = re.compile(r"\b(Array|ArrayLike|ndarray)\b")
SHAPE = re.compile(r"\[[^\]]*\]|scalar|shape|key\b|seed|state")


def is_array(annotation):
    return ARRAY.search(str(annotation)) and "Callable" not in str(annotation)


def documented(docstring, section):
    """`name -> text` of a section of a docstring in Google's style."""
    match = re.search(rf"^{section}:\n((?:[ ]+.*\n|\n)*)", docstring + "\n", flags=re.M)
    entries = {}
    for line in textwrap.dedent(match[1] if match else "").splitlines():
        if entry := re.match(r"(\w[\w, ]*):(.*)", line):
            names, text = entry[1].split(", "), entry[2]
        elif line.strip() and entries:
            text = text + " " + line.strip()
        else:
            continue
        entries |= dict.fromkeys(names, text)
    return entries


def raises_itself(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def source_of(thing):
    module = importlib.import_module(thing.__module__)
    return (inspect.getdoc(thing) or "") + (module.__doc__ or "")


def function_faults(name, function, cites=""):
    text = inspect.getdoc(function) or ""
    if not text:
        return [f"{name} has no docstring"]
    found = []
    parameters = {
        parameter.name: str(parameter.annotation)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
    }
    # A method of one line that refers to its protocol has said it all there.
    if len(text.splitlines()) == 1 and re.search("see |`\\[|shape", text):
        parameters = {}
    arguments = documented(text, "Args")
    for parameter, annotation in parameters.items():
        if parameter not in arguments:
            found.append(f"{name} does not say what {parameter} is")
        elif is_array(annotation) and not SHAPE.search(arguments[parameter]):
            found.append(f"{name} does not give the shape of {parameter}")
    if parameters and "Returns:" not in text:
        found.append(f"{name} does not say what it returns")
    if raises_itself(function) and not documented(text, "Raises"):
        found.append(f"{name} does not say what it raises")
    if not SOURCE.search(cites + source_of(function)):
        found.append(f"{name} has no source")
    return found


def class_faults(name, thing):
    text = inspect.getdoc(thing) or ""
    if not text:
        return [f"{name} has no docstring"]
    found = [] if SOURCE.search(source_of(thing)) else [f"{name} has no source"]
    if dataclasses.is_dataclass(thing):
        attributes = documented(text, "Attributes")
        for field in dataclasses.fields(thing):
            own = not field.name.startswith("_") and field.name not in ("parent", "name")
            if own and field.name not in attributes:
                found.append(f"{name} does not say what {field.name} is")
            elif own and is_array(field.type) and not SHAPE.search(attributes[field.name]):
                found.append(f"{name} does not give the shape of {field.name}")
    for method, value in vars(thing).items():
        value = getattr(value, "__func__", value)
        # flax.struct gives its classes a `replace` of its own; Flax modules document `__call__`.
        own = isinstance(value, types.FunctionType) and value.__module__ == thing.__module__
        field = method in getattr(thing, "__dataclass_fields__", {})
        if own and not method.startswith("_") and not field:
            found += function_faults(f"{name}.{method}", value, source_of(thing))
    return found


def faults(name, thing):
    if inspect.isclass(thing):
        return class_faults(name, thing)
    return function_faults(name, thing) if callable(thing) else []


def public():
    """Names of the package and of every module of the mathematics."""
    names = {f"piflow_jax.{name}": getattr(piflow_jax, name) for name in piflow_jax.__all__}
    for module in pkgutil.walk_packages(piflow_jax.flow.__path__, "piflow_jax.flow."):
        module = importlib.import_module(module.name)
        names |= {
            f"{module.__name__}.{n}": getattr(module, n) for n in getattr(module, "__all__", ())
        }
    # Broadcasting helpers in one sentence each.
    return {name: thing for name, thing in names.items() if thing not in (per_sample, promote)}


def test_every_public_name_is_documented():
    names = public()
    assert len(names) > 25
    assert not [fault for name, thing in names.items() for fault in faults(name, thing)]


def planted(x: "jax.Array", scale: float):  # noqa: F821
    """Does something (paper, Sec. 1).

    Args:
      x: `[B]`, numbers.
      scale: a factor.

    Returns:
      `[B]`.

    Raises:
      ValueError: always.
    """
    raise ValueError(x, scale)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (None, None, "f has no docstring"),
        ("x: `[B]`, numbers", "x: numbers", "f does not give the shape of x"),
        ("  scale: a factor.\n", "", "f does not say what scale is"),
        ("Returns:\n  `[B]`.\n", "", "f does not say what it returns"),
        ("Raises:\n  ValueError: always.", "", "f does not say what it raises"),
        (" (paper, Sec. 1)", "", "f has no source"),
    ],
)
def test_planted_faults_are_found(monkeypatch, old, new, fault):
    text = inspect.getdoc(planted)
    assert not function_faults("f", planted)
    monkeypatch.setattr(planted, "__doc__", None if old is None else text.replace(old, new))
    # Without this module, whose own docstring need not be clean.
    monkeypatch.setitem(globals(), "source_of", own_text)
    assert function_faults("f", planted) == [fault]


def own_text(thing):
    return inspect.getdoc(thing) or ""
