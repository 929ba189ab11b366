"""What checkpoints held when they were recorded: specs, parameter trees, and real checkpoints.

Records are made again only when a change of them is meant; `tests/test_recorded.py` compares.

    python -m tests.recorded specs         # tests/golden/specs.json
    python -m tests.recorded checkpoints   # tests/golden/checkpoints/, a minute for each
"""

import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

import piflow_jax
from piflow_jax.config import Config, parse
from piflow_jax.data import load_captioned_digits_source
from piflow_jax.parallel import device_mesh, parameter_shardings, state_shardings
from piflow_jax.rivals import METHODS
from piflow_jax.rivals.base import rival_spec
from piflow_jax.systems.datasets import dataset, load_source, shape_of
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.networks import (
    named_variables,
    official_data,
    student_network,
    teacher_network,
)
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import student_spec, teacher_spec, updated
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState

ROOT = Path(__file__).parents[1]
SPECS = Path(__file__).parent / "golden" / "specs.json"
CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
# Data that may be missing on this machine.
MISSING = {
    name: DataShape(name=name, sample_size=size, channels=channels, num_classes=classes)
    for name, size, channels, classes in (
        ("mnist", 28, 1, 10),
        ("fashion_mnist", 28, 1, 10),
        ("emoji", 32, 3, 9),
    )
}

# What no configuration of `configs/` has.
OTHERS = {
    "digits:gm,arc": {"policy.kind": "arc"},
    "digits:gm,polynomial": {
        "policy.kind": "dx",
        "policy.mode": "polynomial",
        "train.gm_dropout": 0.0,
    },
    "flux:runlocal,arc": {"policy.kind": "arc"},
    "flux:runlocal,unguided": {"model.flux.distilled_guidance": 0.0},
}

_COMMON = ("policy.logstd_hidden=4", "checkpoint_every=100")
_SMALL = (*_COMMON, "model.dit.hidden=4", "model.dit.num_heads=1")


def _small_text(network: str) -> tuple[str, ...]:
    sizes = ("hidden=8", "num_heads=1", "lora_rank=1")
    return (*_COMMON, *(f"model.{network}.{size}" for size in sizes))


# Of each checkpoint the configuration, what is changed in it, and the stages that are kept.
KINDS = {
    "gm": ("tiny.py", (*_SMALL, "train.nfe=2"), ("teacher", "student")),
    "dx": (
        "tiny.py",
        (*_SMALL, "policy.kind=dx", "policy.num_grid=3", "train.gm_dropout=0"),
        ("student",),
    ),
    "arc": ("tiny.py", (*_SMALL, "policy.kind=arc"), ("student",)),
    "flux": ("tiny_text.py:flux", _small_text("flux"), ("teacher", "student")),
    "qwen_image": ("tiny_text.py:qwen_image", _small_text("qwen_image"), ("teacher", "student")),
}


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configurations() -> list[str]:
    """Names of all configurations: `file:variant`, some with what is changed in it."""
    files = sorted((ROOT / "configs").glob("*.py"))
    return [f"{f.stem}:{variant}" for f in files for variant in _module(f).VARIANTS] + list(OTHERS)


def configuration(name: str) -> Config:
    """The settings of one of `configurations()`."""
    file, variant = name.split(",")[0].split(":")
    config = _module(ROOT / "configs" / f"{file}.py").get_config(variant)
    config.update_from_flattened_dict(OTHERS.get(name, {}))
    return parse(config)


def shape_of_data(config: Config) -> DataShape:
    """What a configuration's data look like, where the data themselves may be missing."""
    row, side = dataset(config), config.data.image_size
    if row.pictures and not row.latents:
        return DataShape(name=config.data.name, sample_size=side, channels=3, num_classes=10)
    if not row.bundled:
        return official_data(config)
    return MISSING.get(config.data.name) or shape_of(config, load_source(config.data))


def networks(config: Config, data: DataShape) -> dict:
    """The networks of a configuration, by what they are for."""
    found = {
        "teacher": teacher_network(config.model, data),
        "student": student_network(config.model, config.policy, data, config.teacher),
    }
    if config.model.network == "dit":
        found["rival"] = METHODS["meanflow"].network(config.model, data)
    return found


@functools.cache
def named(network):
    """Shapes of a network's variables, with names."""
    return named_variables(network)


@functools.cache
def variables(network):
    """Shapes of a network's variables, as `init` makes them."""
    return abstract_variables(network)


def tree(named) -> dict[str, str]:
    """Dtype, shape and axes of the mesh of every leaf by its path."""
    mesh = device_mesh(devices=jax.devices()[:1])
    shardings = flatten_dict(parameter_shardings(mesh, named), sep="/")
    leaves = sorted(flatten_dict(nn.unbox(named), sep="/").items())
    return {path: f"{described(leaf)} {placed(shardings[path])}" for path, leaf in leaves}


def described(leaf) -> str:
    """Dtype and shape."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def placed(sharding) -> str:
    """The axes of the mesh that split those of an array."""
    return " ".join(axis or "." for axis in sharding.spec)


def digest(lines) -> str:
    """A short name of a tree."""
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:12]


def initial_state(config: Config, student):
    """Shapes of a student's state."""
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    trained = student.trained(variables(student))
    return jax.eval_shape(lambda params: TrainState.create(params, optimizer), trained)


def record(name: str) -> dict:
    """Specs and trees of a configuration."""
    config = configuration(name)
    data = shape_of_data(config)
    specs = {"teacher": teacher_spec(config, data), "student": student_spec(config, data)}
    modules = networks(config, data)
    trees = {key: tree(named(module)) for key, module in modules.items()}
    if "rival" in modules:
        specs["rival"] = rival_spec(config, data, "meanflow")
    trained = modules["student"].trained(named(modules["student"]))
    state = initial_state(config, modules["student"])
    shardings = state_shardings(device_mesh(devices=jax.devices()[:1]), state, trained)
    state = [
        f"{jax.tree_util.keystr(path)} {described(leaf)} {placed(sharding)}"
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True
        )
    ]
    return {
        "specs": json.loads(json.dumps(specs)),
        "trees": trees | {"trained": tree(trained)},
        "state": f"{len(state)} leaves, {digest(state)}",
    }


def read(name: str) -> dict:
    """What `record` found when it was recorded."""
    recorded = json.loads(SPECS.read_text())
    found = recorded["configurations"][name]
    found["specs"] = {kind: updated(spec) for kind, spec in found["specs"].items()}
    return found | {"trees": {key: recorded["trees"][d] for key, d in found["trees"].items()}}


def _write_specs() -> None:
    found, trees = {name: record(name) for name in configurations()}, {}
    for entry in found.values():
        for key, lines in entry["trees"].items():
            trees[digest(lines)], entry["trees"][key] = lines, digest(lines)
    text = json.dumps({"configurations": found, "trees": trees}, indent=1)
    SPECS.write_text(text + "\n", encoding="utf-8")


def unpack(kind: str, folder: Path) -> Path:
    """Unpacks a recorded work directory, with checkpoints alone."""
    with tarfile.open(CHECKPOINTS / f"{kind}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def numbers(kind: str, workdir: Path) -> dict:
    """What is computed with the checkpoints of a work directory: sums and a velocity."""

    def total(params):
        return float(sum(np.abs(np.asarray(a, np.float64)).sum() for a in jax.tree.leaves(params)))

    student = piflow_jax.load(workdir)
    found = {"student": total(student.params)}
    shape = (3, 8, 8, 1)
    x = np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)
    t, labels = jnp.array([1.0, 0.8, 0.5]), np.array([0, 3, 9])
    if student.network.conditioning.reads_text:
        source = load_captioned_digits_source()
        labels = {name: a[labels] for name, a in source.of_classes().items()}
    elif kind == "gm":
        teacher, params = piflow_jax.load_teacher(workdir, guidance_scale=2.0)
        found["teacher"] = total(params)
        found["guided"] = jax.jit(teacher.velocity)(params, x, t, labels)[:, ::3, ::3, 0]
    policy = jax.jit(lambda params: student.policy(x, t, labels, params))(student.params)
    found["policy"] = policy.velocity(x, t / 2)[:, ::3, ::3, 0]
    return {key: np.asarray(value).tolist() for key, value in found.items()}


def _write_checkpoints() -> None:
    CHECKPOINTS.mkdir(exist_ok=True)
    found = {}
    for kind, (file, changes, stages) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "piflow_jax.main", f"--config=tests/{file}"]
            command += [f"--workdir={folder}", *(f"--config.{change}" for change in changes)]
            subprocess.run(command, cwd=ROOT, check=True, env=os.environ)
            with tarfile.open(CHECKPOINTS / f"{kind}.tar.xz", "w:xz") as archive:
                for stage in stages:
                    archive.add(Path(folder) / stage / "checkpoints", f"{stage}/checkpoints")
            found[kind] = numbers(kind, Path(folder))
    path = CHECKPOINTS / "numbers.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    {"specs": _write_specs, "checkpoints": _write_checkpoints}[sys.argv[1]]()
