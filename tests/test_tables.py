"""What depends on a choice stands in its row: nothing compares with a table's keys.

The checker reads the source with `ast`, and is itself tested on planted faults.
"""

import ast
from pathlib import Path

import pytest

from piflow_jax.convert.heads import HEADS
from piflow_jax.convert.table import KINDS
from piflow_jax.evaluation.features import SHIPPED
from piflow_jax.modes import MODES
from piflow_jax.rivals import METHODS
from piflow_jax.systems.datasets import DATASETS
from piflow_jax.systems.networks import NETWORKS
from piflow_jax.systems.policies import POLICIES

PACKAGE = Path(__file__).parents[1] / "piflow_jax"
TABLES = {
    "NETWORKS": NETWORKS,
    "POLICIES": POLICIES,
    "DATASETS": DATASETS,
    "METHODS": METHODS,
    "MODES": MODES,
    "KINDS": KINDS,
    "HEADS": HEADS,
    "SHIPPED": SHIPPED,
}
# By key the tables that have it.
KEYS = {
    key: ", ".join(name for name, other in TABLES.items() if key in other)
    for table in TABLES.values()
    for key in table
    if key
}
LITERALS = ast.Constant | ast.Tuple | ast.List | ast.Set | ast.Dict | ast.pattern
COLLECTIONS = ("frozenset", "set", "tuple", "list")


def constants(tree):
    """Literals that a module gives names to, by name."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node.value for t in targets if isinstance(t, ast.Name)}
    return found


def words(node, named):
    """Strings of an operand: a literal, a collection of literals, or a name of one, but a table's.

    Whether a word is a key of the table at all may be asked.
    """
    if isinstance(node, ast.Name):
        node = None if node.id in TABLES else named.get(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        node = node.args[0] if node.func.id in COLLECTIONS and node.args else node
    if isinstance(node, ast.Dict):
        node = ast.Tuple([key for key in node.keys if key is not None])
    if isinstance(node, LITERALS):
        for leaf in ast.walk(node):
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                yield leaf.value


def comparisons(tree):
    """`(line, operands)` of every `==`, `!=`, `in`, `not in` and `case`."""
    asked = ast.Eq | ast.NotEq | ast.In | ast.NotIn
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(isinstance(op, asked) for op in node.ops):
            yield node.lineno, [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            yield node.pattern.lineno, [node.pattern]


def faults(package):
    """Every comparison with a table's key, as `file:line: key of TABLE`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = constants(tree)
        for line, operands in comparisons(tree):
            asked = {word for node in operands for word in words(node, named)}
            where = path.relative_to(package)
            found += [
                f"{where}:{line}: {key!r} of {KEYS[key]}" for key in sorted(asked & set(KEYS))
            ]
    return found


def test_nothing_asks_for_a_name():
    assert len(list(PACKAGE.rglob("*.py"))) > 100 and len(KEYS) > 30
    assert not faults(PACKAGE)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("if model.network == 'dit':\n    pass", "x.py:1: 'dit' of NETWORKS"),
        ("if 'gm' != policy.kind:\n    pass", "'gm' of "),
        ("x = kind in ('dx', 'other')", "'dx' of "),
        ("x = data.name not in {'prompts'}", "'prompts' of DATASETS"),
        ("x = name in ['flux']", "'flux' of "),
        ("x = mode in {'sample': 1}", "'sample' of MODES"),
        (
            "SOME = ('meanflow', 'dmd')\n\ndef f(x):\n    return x == 1 or x in SOME",
            "x.py:4: 'dmd'",
        ),
        ("SOME: frozenset = frozenset({'qwen_vae'})\nx = y in SOME", "x.py:2: 'qwen_vae' of KINDS"),
        ("ONE = 'mnist'\nx = y == ONE", "'mnist' of DATASETS"),
        ("match x:\n    case 'arc' | None:\n        pass", "x.py:2: 'arc' of "),
        ("match x:\n    case {'kind': 'shortcut'}:\n        pass", "'shortcut' of METHODS"),
        ("x = lambda m: m == 'evaluate'", "'evaluate' of MODES"),
        ("x = [y for y in z if y.model == 'qwen_image']", "'qwen_image' of "),
    ],
)
def test_planted_comparisons_are_found(tmp_path, code, fault):
    (tmp_path / "x.py").write_text(code)
    assert any(fault in found for found in faults(tmp_path)), faults(tmp_path)


@pytest.mark.parametrize(
    "code",
    [
        "x = TABLE['dit'], name in TABLE, 'other' == name",
        "x = row.tempered or kind == other.kind",
        "x = {'dit': 1}",
        "NETWORKS = {'dit': 1}\nx = name in NETWORKS",
        "config.policy.kind = 'gm'",
        "x = y > 'gm' or y is 'dx'",
    ],
)
def test_other_uses_of_names_are_not_found(tmp_path, code):
    (tmp_path / "x.py").write_text(code)
    assert not faults(tmp_path)
