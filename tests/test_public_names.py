"""Every public name says what it takes, in which shapes, what it returns and raises, and whence."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
import textwrap
import types
import typing

import jax
import pytest

import piflow_jax
from piflow_jax.flow.policies.base import per_sample, promote

ROOT = pathlib.Path(__file__).parents[1]
# What users meet. Fields of the configuration have a page of their own, made from their metadata.
PACKAGES = ("convert", "data", "diagnostics", "evaluation", "flow", "kernels", "models", "rivals")
# Neither mathematics nor networks: files, tables and counts have no source to name.
PLUMBING = (
    *("piflow_jax.config", "piflow_jax.convert", "piflow_jax.data"),
    *("piflow_jax.evaluation.adm_files", "piflow_jax.evaluation.evaluator"),
    *("piflow_jax.evaluation.features", "piflow_jax.evaluation.floor"),
    *("piflow_jax.evaluation.images", "piflow_jax.evaluation.image_sets"),
    *("piflow_jax.evaluation.kept", "piflow_jax.evaluation.report"),
    "piflow_jax.evaluation.text_report",
    "piflow_jax.rivals.base",
)
SOURCE = re.compile(r"arXiv|paper|[Ss]ource:")
# NumPy's `ArrayLike` is a name of its own since 2.5, and a union with `_SupportsArray` before.
ARRAY = re.compile(r"\b(Array|ArrayLike|ndarray|_SupportsArray)\b")
# A shape, not an interval such as "in [0, 1]"; of arrays in a mapping, that they go by name.
SHAPE = re.compile(
    r"(?<!\bin )(?<!\bin `)\[[^\]]*\]|scalar|shape|\b[Kk]ey\b|seed|by (official )?name|[Ll]ike `"
)
REFERENCE = re.compile(r"(?:\b[Ss]ee|as in|as those of) `([\w.]+)`")


def is_array(annotation):
    return ARRAY.search(str(annotation)) and "Callable" not in str(annotation)


def section(docstring, title):
    """The text of a section of a docstring in Google's style."""
    match = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)*)", docstring + "\n", flags=re.M)
    return textwrap.dedent(match[1]) if match else ""


def documented(docstring, title):
    """`name -> text` of a section."""
    entries, names = {}, ()
    for line in section(docstring, title).splitlines():
        if entry := re.match(r"(\*{0,2}\w[\w, *]*):(.*)", line):
            names, text = entry[1].replace("*", "").split(", "), entry[2]
        elif line.strip() and entries:
            text = text + " " + line.strip()
        else:
            continue
        entries |= dict.fromkeys(names, text)
    return entries


def in_one_line(text):
    """`name -> text` of a docstring of one line, which names arguments as `x[B, C]` or `x: [B]`."""
    whatever = " any shape" if "any shape" in text else ""
    return {name: rest + whatever for name, rest in re.findall(r"`(\w+)\b([^`]*)`", text)}


def referred(function, text):
    """The docstring to which the first paragraph of another sends its reader, "" if to none."""
    match = REFERENCE.search(text.split("\n\n")[0].replace("\n", " "))
    if not match:
        return ""
    first, *rest = match[1].split(".")
    modules = [sys.modules[function.__module__]]
    modules += [module for name, module in sys.modules.items() if name.startswith("piflow_jax.")]
    thing = next((vars(module)[first] for module in modules if first in vars(module)), None)
    for part in rest:
        thing = getattr(thing, part, None)
    if inspect.isclass(thing):
        thing = getattr(thing, function.__name__, None)
    return inspect.getdoc(thing) or "" if thing is not None else ""


def raises_itself(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def source_of(thing):
    module = importlib.import_module(thing.__module__)
    return (inspect.getdoc(thing) or "") + (module.__doc__ or "")


def sourceless(name, thing, cites=""):
    if thing.__module__.startswith(PLUMBING) or SOURCE.search(cites + source_of(thing)):
        return []
    return [f"{name} has no source"]


def function_faults(name, function, cites=""):
    text = inspect.getdoc(function) or ""
    if not text:
        return [f"{name} has no docstring"]
    found = []
    signature = inspect.signature(function)
    parameters = {
        parameter.name: str(parameter.annotation)
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls")
    }
    elsewhere, short = referred(function, text), len(text.splitlines()) == 1
    arguments = documented(elsewhere, "Args") | documented(text, "Args")
    if short:
        arguments |= in_one_line(text)
    for parameter, annotation in parameters.items():
        if parameter not in arguments:
            found.append(f"{name} does not say what {parameter} is")
        elif is_array(annotation) and not SHAPE.search(arguments[parameter]):
            found.append(f"{name} does not give the shape of {parameter}")
    returned = signature.return_annotation
    if returned not in (None, "None"):
        titles = [section(t, title) for t in (text, elsewhere) for title in ("Returns", "Yields")]
        alone = re.sub(rf"`({'|'.join(parameters) or '-'})\b[^`]*`", "", text)
        result = alone if short else "".join(titles)
        if parameters and not result:
            found.append(f"{name} does not say what it returns")
        elif parameters and is_array(returned) and not SHAPE.search(result + "".join(titles)):
            found.append(f"{name} does not give the shape of what it returns")
    named = documented(text, "Raises") or (short and re.search(r"[Rr]aises|Error\b", text))
    if raises_itself(function) and not named:
        found.append(f"{name} does not say what it raises")
    return found + sourceless(name, function, cites)


def making_faults(name, thing, text):
    """Faults in what a class says of its own `__init__` or `__post_init__`."""
    found = []
    for maker in (vars(thing).get("__init__"), vars(thing).get("__post_init__")):
        # That of a dataclass is in no file, that of a Flax module or a protocol in another.
        code = getattr(maker, "__code__", None)
        if code is None or code.co_filename != inspect.getsourcefile(thing):
            continue
        for parameter in list(inspect.signature(maker).parameters)[1:]:
            if parameter not in documented(text, "Args"):
                found.append(f"{name} does not say what {parameter} is")
        if raises_itself(maker) and not documented(text, "Raises"):
            found.append(f"{name} does not say what it raises")
    return found


def class_faults(name, thing):
    text = inspect.getdoc(thing) or ""
    if not text:
        return [f"{name} has no docstring"]
    found = sourceless(name, thing)
    if dataclasses.is_dataclass(thing):
        attributes = {}
        for base in reversed(thing.__mro__):  # a field is described where it is declared
            declared = inspect.cleandoc(vars(base).get("__doc__") or "")
            attributes |= documented(declared, "Attributes")
        for field in dataclasses.fields(thing):
            own = not field.name.startswith("_") and field.name not in ("parent", "name")
            if own and field.name not in attributes:
                found.append(f"{name} does not say what {field.name} is")
            elif own and is_array(field.type) and not SHAPE.search(attributes[field.name]):
                found.append(f"{name} does not give the shape of {field.name}")
    for field in getattr(thing, "_fields", ()):
        if not re.search(rf"\b{field}\b", text, flags=re.IGNORECASE):
            found.append(f"{name} does not say what {field} is")
    if "made by `" not in text:  # otherwise what makes it says it
        found += making_faults(name, thing, text)
    for method, value in vars(thing).items():
        value = getattr(value, "__func__", value)
        # flax.struct gives its classes a `replace` of its own, Flax modules wrap their methods.
        own = isinstance(value, types.FunctionType) and value.__module__ == thing.__module__
        field = method in getattr(thing, "__dataclass_fields__", {})
        public = not method.startswith("_") or method == "__call__"
        if own and public and not field:
            found += function_faults(f"{name}.{method}", value, source_of(thing))
    return found


def faults(name, thing):
    if inspect.isclass(thing):
        return class_faults(name, thing)
    alias = typing.get_origin(thing) is not None  # such as a Callable, which is callable itself
    return function_faults(name, thing) if callable(thing) and not alias else []


def public():
    """Names of the package and of all modules that users meet, each thing once."""
    names = {f"piflow_jax.{name}": getattr(piflow_jax, name) for name in piflow_jax.__all__}
    for package in PACKAGES:
        package = importlib.import_module(f"piflow_jax.{package}")
        inside = pkgutil.walk_packages(getattr(package, "__path__", ()), f"{package.__name__}.")
        for module in (package, *(importlib.import_module(entry.name) for entry in inside)):
            names |= {f"{module.__name__}.{n}": getattr(module, n) for n in module_all(module)}
    names |= shown()
    # Broadcasting helpers in one sentence each.
    first = {id(thing): name for name, thing in reversed(names.items())}
    return {
        name: thing
        for name, thing in names.items()
        if first[id(thing)] == name and thing not in (per_sample, promote)
    }


def shown():
    """Names that the site's pages of the API show."""
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    names = {}
    for path, members in re.findall(
        r"^::: (\S+)(?:\n +options:\n +members: \[(.*)\])?", text, flags=re.M
    ):
        if path.rpartition(".")[2][0].isupper():
            path, _, members = path.rpartition(".")
        module = importlib.import_module(path)
        members = members.split(", ") if members else module.__all__
        names |= {f"{path}.{name}": getattr(module, name) for name in members}
    return names


def module_all(module):
    return getattr(module, "__all__", ())


def test_every_public_name_is_documented():
    names = public()
    assert len(names) > 150
    assert not [fault for name, thing in names.items() for fault in faults(name, thing)]


def planted(x: jax.Array, scale: float) -> jax.Array:
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


def short(x: jax.Array, scale: float) -> jax.Array:
    """Numbers `[B]` of `x[B, C]` and a `scale` (paper, Sec. 2); ValueError for none."""
    raise ValueError(x, scale)


def referring(x: jax.Array, scale: float) -> jax.Array:
    """Does something else (paper, Sec. 3); see `planted`."""
    return x * scale


@dataclasses.dataclass
class Declared:
    """Holds something (paper, Sec. 4).

    Attributes:
      x: `[B]`, numbers.
    """

    x: jax.Array


@dataclasses.dataclass
class Inherited(Declared):
    """Holds more (paper, Sec. 5).

    Attributes:
      scale: a factor.

    Raises:
      ValueError: the factor is zero.
    """

    scale: float

    def __post_init__(self):
        if self.scale == 0:
            raise ValueError(self.scale)


class Made:
    """Does something often (paper, Sec. 6).

    Args:
      scale: a factor.
    """

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """Numbers `[B]` of `x[B]`."""
        return x * self.scale


class Pair(typing.NamedTuple):
    """A mean and its variance (paper, Sec. 7)."""

    mean: float
    variance: float


@pytest.mark.parametrize(
    ("thing", "old", "new", "fault"),
    [
        (planted, None, None, "f has no docstring"),
        (planted, "x: `[B]`, numbers", "x: numbers", "f does not give the shape of x"),
        (planted, "x: `[B]`, numbers", "x: in [0, 1]", "f does not give the shape of x"),
        (planted, "  scale: a factor.\n", "", "f does not say what scale is"),
        (planted, "Returns:\n  `[B]`.\n", "", "f does not say what it returns"),
        (planted, "`[B]`.\n", "numbers.\n", "f does not give the shape of what it returns"),
        (planted, "Raises:\n  ValueError: always.", "", "f does not say what it raises"),
        (planted, " (paper, Sec. 1)", "", "f has no source"),
        (short, "`x[B, C]`", "`x`", "f does not give the shape of x"),
        (short, "`scale`", "factor", "f does not say what scale is"),
        (short, "Numbers `[B]` of", "Numbers of", "f does not give the shape of what it returns"),
        (short, "; ValueError for none", "", "f does not say what it raises"),
        (Declared, "`[B]`, numbers", "numbers", "f does not give the shape of x"),
        (Inherited, "  scale: a factor.\n", "", "f does not say what scale is"),
        (Inherited, "Raises:\n  ValueError: the", "The", "f does not say what it raises"),
        (Made, "Args:\n  scale: a factor.", "", "f does not say what scale is"),
        (Made.__call__, "`x[B]`", "`x`", "f does not give the shape of x"),
        (Pair, " and its variance", "", "f does not say what variance is"),
    ],
)
def test_planted_faults_are_found(monkeypatch, thing, old, new, fault):
    # Without this module, whose own docstring need not be clean.
    monkeypatch.setitem(globals(), "source_of", own_text)
    text, cites = inspect.getdoc(thing), "paper" if thing is Made.__call__ else ""

    def found():
        return function_faults("f", thing, cites) if cites else faults("f", thing)

    assert not found()
    assert old is None or old in text
    monkeypatch.setattr(thing, "__doc__", None if old is None else text.replace(old, new))
    assert found() == [fault]


@pytest.mark.parametrize("name", ["planned", "planted.not_there", "Declared"])
def test_a_reference_to_what_does_not_say_it_is_a_fault(monkeypatch, name):
    monkeypatch.setitem(globals(), "source_of", own_text)
    assert not function_faults("f", referring)
    monkeypatch.setattr(referring, "__doc__", referring.__doc__.replace("planted", name))
    assert {f"f does not say what {argument} is" for argument in ("x", "scale")} < set(
        function_faults("f", referring)
    )


def test_a_field_is_described_where_it_is_declared(monkeypatch):
    assert not class_faults("f", Inherited)
    monkeypatch.setattr(Declared, "__doc__", "Holds something (paper, Sec. 4).")
    assert class_faults("f", Inherited) == ["f does not say what x is"]


def test_plumbing_needs_no_source_and_figures_do(monkeypatch):
    monkeypatch.setitem(globals(), "source_of", own_text)
    monkeypatch.setattr(planted, "__doc__", inspect.getdoc(planted).replace("paper", ""))
    for module, wanted in (("evaluation.report", []), ("evaluation.adm", ["f has no source"])):
        monkeypatch.setattr(planted, "__module__", f"piflow_jax.{module}")
        assert function_faults("f", planted) == wanted


def own_text(thing):
    return inspect.getdoc(thing) or ""
