"""Who may import whom. Reads the source with `ast`; the checker is itself tested on planted faults.

A room is a layer of the package: one of its directories, or one of its modules. It imports lower
ones only, and of these only the ones listed here. `docs/extending.md` has the same list.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "piflow_jax"
NAME = "piflow_jax"
MAX_LINES = 500

GROUND = {"arguments", "buckets", "hub", "keys", "origin", "progress", "safetensors_files"}
GROUND |= {"whole_files"}
# These write no files, so they have no use for the modules that do.
WRITE_NOTHING = {"flow", "kernels", "models", "config", "training", "parallel", "rivals"}
ROOMS = {
    "__init__": set(),
    "arguments": set(),
    "origin": set(),
    "progress": set(),
    "keys": {"arguments"},
    "buckets": {"gcs"},
    "gcs": set(),
    "hub": set(),
    "safetensors_files": {"buckets", "whole_files"},
    "whole_files": {"buckets"},
    "exported": set(),
    "kernels": set(),
    "flow": {"kernels"},
    "models": {"flow"},
    "config": set(),
    "data": set(),
    "convert": {"models"},
    "parallel": {"config", "models"},
    "evaluation": {"data", "models"},
    "systems": {"flow", "models", "config", "data", "convert", "parallel", "evaluation"},
    "training": {"flow", "config", "data", "parallel", "systems"},
    "student": {"flow", "config", "exported", "systems"},
    "runs": {"config", "data", "parallel", "training"},
    "rivals": {"flow", "models", "config", "systems", "training"},
    "diagnostics": {"flow", "data"},
    "main": {"config", "modes"},
}
ROOMS["loading"] = ROOMS["student"] | {"student", "convert", "parallel", "runs"}
ROOMS["distillation"] = {"flow", "config", "data", "diagnostics", "evaluation", "parallel"}
ROOMS["distillation"] |= {"runs", "student", "systems", "training"}
ROOMS["modes"] = ROOMS["systems"] | {"systems", "training", "runs", "rivals", "loading"}
ROOMS["modes"] |= {"distillation"}
ROOMS["demo"] = {"__init__", "flow", "models", "config", "convert", "data", "evaluation"}
ROOMS["demo"] |= {"systems", "runs", "loading"}
for room in set(ROOMS) - GROUND:
    ROOMS[room] |= GROUND
    if room in WRITE_NOTHING:
        ROOMS[room] -= {"safetensors_files", "whole_files"}

# All that models know of the policies is the types of their own outputs.
MODELS_TAKE_FROM_FLOW = {
    ("piflow_jax.flow.policies", "GMOutput"),
    ("piflow_jax.flow.policies", "ArcOutput"),
}
# What the mathematics may use besides the standard library.
FLOW_TAKES = {"jax", "numpy", "einops", "flax.struct"}
# Slow to load and not always there: imported where they are used, inside functions.
LATE = {"tensorflow", "tensorflow_datasets", "tensorboard", "clu", "torch", "transformers"}
LATE |= {"pyarrow", "matplotlib", "gradio", "huggingface_hub", "qwix"}
# Of the package itself: it imports such at top level, and is imported inside functions.
LATE_FILE = "runs/events.py"
LATE.add("piflow_jax.runs.events")


def imports(tree):
    """`(line, module, name or None, at top level)` of every import, wherever it stands."""

    def visit(node, top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield child.lineno, alias.name, None, top
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    yield child.lineno, "." * child.level + (child.module or ""), alias.name, top
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, top and not function)

    return visit(tree, True)


def room_of(parts):
    return parts[0].removesuffix(".py")


def within(module, roots):
    return any(module == root or module.startswith(root + ".") for root in roots)


def import_faults(room, module, name, top):
    """What is wrong with one import in a room; usually nothing."""
    full = module if name is None else f"{module}.{name}"
    if module.startswith("."):
        yield f"relative import of {full}"
    elif within(module, [NAME]):
        rest = full.split(".")[1:]
        # The package's own names are for notebooks: inside, they would hide where one comes from.
        target = rest[0] if rest and rest[0] in ROOMS else "__init__"
        if target != room and target not in ROOMS[room] and name != "__version__":
            yield f"{room} may not import {full}"
        elif room == "models" and target == "flow" and (module, name) not in MODELS_TAKE_FROM_FLOW:
            yield f"models take only outputs from flow, not {full}"
    else:
        known = within(full, FLOW_TAKES) or module.split(".")[0] in sys.stdlib_module_names
        if room == "flow" and not known:
            yield f"flow may not import {full}"
    if top and within(full, LATE):
        yield f"{full} is imported at top level, not where it is used"


def faults(package):
    """Everything wrong with the imports and the files of a package, as `file:line: fault`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        room = room_of(where.parts)
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_LINES:
            found.append(f"{where}: has {len(text.splitlines())} lines, over {MAX_LINES}")
        if path.name == "utils.py":
            found.append(f"{where}: no module is called utils.py")
        if room not in ROOMS:
            found.append(f"{where}: {room} is no room of the house")
            continue
        for line, module, name, top in imports(ast.parse(text)):
            top = top and where.as_posix() != LATE_FILE
            faulty = import_faults(room, module, name, top)
            found += [f"{where}:{line}: {fault}" for fault in faulty]
    return found


def test_no_room_imports_a_higher_one():
    assert len(list(PACKAGE.rglob("*.py"))) > 30
    assert not faults(PACKAGE)


def named(cell):
    """The rooms that a cell of the page's table names."""
    return {name.removesuffix(".py") for name in re.findall(r"`(\w+(?:\.py)?)`", cell)}


def test_the_page_has_the_same_rooms():
    text = (PACKAGE.parent / "docs" / "extending.md").read_text(encoding="utf-8")
    table = re.search(r"^\| layer \|.*?(?=\n\n)", text, flags=re.M | re.S)[0]
    ground, *rows = (row.split(" | ") for row in table.splitlines()[2:])
    assert named(ground[0]) == GROUND | {"gcs"}
    written = {name: named(may) for room, may, _ in rows for name in named(room)}
    own = ROOMS.keys() - GROUND - {"__init__", "gcs"}
    assert written == {room: ROOMS[room] - GROUND for room in own}
    assert named(re.search(r"^(.*)write no files", text, flags=re.M)[1]) == WRITE_NOTHING


def test_every_folder_of_modules_is_a_package():
    """Others would be missing in a wheel."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


@pytest.mark.parametrize(
    ("file", "code", "fault"),
    [
        (
            "flow/x.py",
            "from piflow_jax.models.dit import DiT",
            "flow may not import piflow_jax.mod",
        ),
        ("flow/x.py", "import piflow_jax.models", "flow may not import piflow_jax.models"),
        ("flow/x.py", "from piflow_jax import training", "flow may not import piflow_jax.training"),
        ("flow/x.py", "def f():\n    import piflow_jax.training", "x.py:2: flow may not import"),
        ("flow/policies/x.py", "import optax", "flow may not import optax"),
        ("flow/x.py", "from flax import linen", "flow may not import flax.linen"),
        ("flow/x.py", "import flax", "flow may not import flax"),
        ("flow/x.py", "from ..models import dit", "relative import of ..models.dit"),
        ("flow/x.py", "import piflow_jax", "flow may not import piflow_jax"),
        ("kernels/x.py", "from piflow_jax.flow import rollout", "kernels may not import"),
        ("data/x.py", "from piflow_jax import rollout", "data may not import piflow_jax.rollout"),
        ("models/x.py", "from piflow_jax.flow.policies import GMFlowPolicy", "only outputs"),
        ("models/x.py", "import piflow_jax.flow.policies", "only outputs"),
        ("models/x.py", "from piflow_jax.config import Config", "models may not import"),
        ("config.py", "from piflow_jax.runs import loop", "config may not import"),
        ("data/x.py", "from piflow_jax.flow.schedule import TimeWarp", "data may not import"),
        ("evaluation/x.py", "from piflow_jax.runs import loop", "evaluation may not import"),
        ("evaluation/x.py", "import piflow_jax.runs.loop", "evaluation may not import"),
        ("convert/x.py", "from piflow_jax.parallel import device_mesh", "convert may not import"),
        ("parallel/x.py", "from piflow_jax.training import state", "parallel may not import"),
        ("training/x.py", "from piflow_jax.convert import rules", "training may not import"),
        ("training/x.py", "from piflow_jax import evaluation", "training may not import"),
        ("training/x.py", "if True:\n    import piflow_jax.modes", "training may not import"),
        ("training/x.py", "from piflow_jax.rivals import METHODS", "training may not import"),
        ("rivals/x.py", "from piflow_jax.modes import train", "rivals may not import"),
        ("rivals/x.py", "from piflow_jax.whole_files import replacing", "rivals may not import"),
        ("modes/x.py", "from piflow_jax.main import main", "modes may not import"),
        ("data/x.py", "import tensorflow_datasets as tfds", "at top level"),
        (
            "main.py",
            "try:\n    from tensorflow import io\nexcept ImportError:\n    pass",
            "top lev",
        ),
        ("training/x.py", "class A:\n    import clu.metric_writers", "at top level"),
        ("runs/x.py", "from piflow_jax.runs import events", "at top level"),
        ("runs/events.py", "from piflow_jax.modes import train", "runs may not import"),
        ("attic/x.py", "", "attic is no room"),
        ("data/utils.py", "", "no module is called utils.py"),
        ("main.py", "\n" * 501, "has 501 lines, over 500"),
    ],
)
def test_planted_faults_are_found(tmp_path, file, code, fault):
    plant(tmp_path, file, code)
    (found,) = faults(tmp_path)
    assert found.startswith(file) and fault in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("flow/x.py", "import functools, jax.numpy, flax.struct\nfrom flax import struct"),
        ("flow/x.py", "from collections.abc import Callable\nfrom piflow_jax.flow import rollout"),
        ("models/x.py", "from flax import linen\nfrom piflow_jax.flow.policies import GMOutput"),
        ("data/x.py", "def f():\n    import tensorflow_datasets as tfds"),
        ("runs/events.py", "import tensorboard"),
        ("training/x.py", "from piflow_jax import __version__\nimport tensorflow_free"),
        ("main.py", "from piflow_jax import modes\nimport piflow_jax.config"),
        ("main.py", "\n" * 500),
    ],
)
def test_allowed_imports_are_not_found(tmp_path, file, code):
    plant(tmp_path, file, code)
    assert not faults(tmp_path)


def plant(package, file, code):
    path = package / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)


def test_the_library_loads_neither_tensorflow_nor_torch():
    modules = [
        ".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for room in ("flow", "models", "evaluation", "convert", "data")
        for path in sorted((PACKAGE / room).rglob("*.py"))
    ]
    assert {"piflow_jax.flow.policies.gmflow", "piflow_jax.models.dit"} < set(modules)
    code = f"import sys, {NAME}, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "piflow_jax.models.dit" in loaded
    assert not [module for module in loaded if within(module, LATE)]


# Rooms whose paths may lie in a bucket.
ANYWHERE = ("data", "runs", "modes", "distillation", "systems", "loading", "evaluation", "convert")
# Modules that open something else, or that still read local files only.
OPEN_LOCALLY = {
    "data/digits.py": "a file of scikit-learn",
    "data/picture_sets.py": "names in local folders; sets of TFDS: local",
    "data/pictures.py": "pictures of a disk, which may be pipes or links to nothing",
    "data/released_encoders.py": "networks of transformers: local",
    "data/text_encoders.py": "networks of transformers: local",
    "evaluation/features.py": "a file of the package",
    "evaluation/image_sets.py": "times of local files, to the nanosecond",
    "evaluation/image_text.py": "networks of transformers: local",
    "runs/events.py": "an event file, in the local directory of a spool",
    "runs/lease.py": "what the system says of processes",
    "runs/metrics.py": "lines, in the local directory of a spool",
    "runs/run_lock.py": "the lock of a local directory",
    "runs/spool.py": "its own temporary directory",
    "runs/workdir.py": "the one place that makes users' paths",
}
OPENERS = {"open", "Path", "os.open", "os.listdir", "os.scandir", "os.stat", "os.makedirs"}
OPENERS |= {"os.path.exists", "os.path.isfile", "os.path.isdir", "os.path.lexists", "io.open"}


def local_openings(package):
    """Calls by which a path that may lie in a bucket would be taken for a local one."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        if room_of(where.parts) not in ANYWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in OPENERS:
                found.setdefault(where.as_posix(), []).append(ast.unparse(node.func))
    return found


def test_paths_of_users_are_opened_by_epath():
    assert set(local_openings(PACKAGE)) == set(OPEN_LOCALLY)


@pytest.mark.parametrize(
    "code", ["open(p)", "with open(p) as f:\n    pass", "x = Path(p) / 'y'", "os.path.exists(p)"]
)
def test_planted_openings_are_found(tmp_path, code):
    plant(tmp_path, "modes/x.py", code)
    plant(tmp_path, "runs/x.py", "epath.Path(p).open()\np.open('rb')\nuser_path(p).exists()")
    plant(tmp_path, "flow/x.py", code)
    assert list(local_openings(tmp_path)) == ["modes/x.py"]
