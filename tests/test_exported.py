"""Exported samplers: the student's samples without Flax, without this package's networks."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import piflow_jax
from piflow_jax.config import parse
from piflow_jax.exported import ExportedStudent
from piflow_jax.student import Student
from piflow_jax.systems.networks import student_network
from piflow_jax.systems.own import own_network
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import StudentSettings
from tests import tiny, tiny_text
from tests.students import moved

CLASSES = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
TEXT = DataShape(name="prompts", channels=1, text_features=5, pooled_features=3)
LABELS = np.arange(5) % 10
# Everything that a student is made of, and nothing that its exported sampler may need.
ALONE = """
import sys

ROOMS = ("models", "systems", "flow", "kernels", "config", "convert", "student")

class Refuse:
    def find_spec(self, name, *_):
        names = ("flax", "optax", "orbax", *("piflow_jax." + room for room in ROOMS))
        assert not name.startswith(names), name

sys.meta_path.insert(0, Refuse())
import numpy as np
import piflow_jax

student = piflow_jax.load_exported(sys.argv[1])
arrays = dict(np.load(sys.argv[2]))
found = {}
for count in (1, 5):
    given = {name: a[:count] if a.ndim else count for name, a in arrays.items()}
    found[str(count)] = student.sample(3, given.get("labels", given))
np.savez(sys.argv[3], **found)
"""


def made(config, data):
    config = parse(config)
    settings = StudentSettings(
        model=config.model, policy=config.policy, train=config.train, data=data
    )
    network = student_network(config.model, config.policy, data)
    params = moved(jax.jit(lambda: network.init(jax.random.key(0)))())
    return Student(network, params, settings)


def of_classes(policy="gm"):
    config = tiny.get_config()
    config.policy.kind = policy
    config.train.nfe = 2
    return made(config, CLASSES)


def embedded(number):
    rng = np.random.default_rng(0)
    text = rng.normal(size=(5, 4, 5)).astype(np.float32)[:number]
    pooled = rng.normal(size=(5, 3)).astype(np.float32)[:number]
    return {"text": text, "text_length": np.full(number, 4, np.int32), "pooled": pooled}


def unconditional():
    """A network that is not ours, of points without conditions."""
    config = tiny.get_config()
    data = DataShape(name="points", channels=2, sites=())
    settings = parse(config)
    settings = StudentSettings(
        model=settings.model, policy=settings.policy, train=settings.train, data=data
    )
    outputs = POLICIES["gm"].outputs(settings.policy, 2)

    def init(key):
        return {"w": jax.random.normal(key, (3, outputs))}

    def apply(params, x, t):
        return jnp.concatenate([x, t[:, None]], axis=-1) @ params["w"]

    network = own_network("points", (init, apply), data, settings.policy)
    return Student(network, network.init(jax.random.key(0)), settings)


CASES = {
    "no conditions": (unconditional, {"labels": np.int32(5)}, {}),
    "gm": (of_classes, {"labels": LABELS}, {}),
    "dx": (lambda: of_classes("dx"), {"labels": LABELS}, {"nfe": 3, "solver": "euler"}),
    "text": (lambda: made(tiny_text.get_config("flux"), TEXT), embedded(5), {"size": (4, 8)}),
}


@pytest.mark.parametrize(
    "case", ["no conditions", "gm", "dx", pytest.param("text", marks=pytest.mark.slow)]
)
def test_an_exported_sampler_is_its_student_without_flax(case, tmp_path):
    make, conditions, options = CASES[case]
    student, path = make(), tmp_path / "sampler.safetensors"
    student.export(path, substeps=16, text_length=4, **options)
    np.savez(tmp_path / "conditions.npz", **conditions)
    files = [path, tmp_path / "conditions.npz", tmp_path / "samples.npz"]
    command = [sys.executable, "-c", ALONE, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(files[-1])
    expected = student.sample(3, conditions.get("labels", conditions), substeps=16, **options)
    np.testing.assert_allclose(found["5"], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["1"], expected[:1], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A student and its file, of one platform and a batch of 2."""
    student, path = of_classes(), tmp_path_factory.mktemp("exported") / "sampler.safetensors"
    student.export(path, substeps=np.int64(8), platforms=["cpu"], batch=2)
    return student, path


def test_a_batch_of_fixed_size_is_filled_up(exported):
    student, path = exported
    found = piflow_jax.load_exported(path).sample(jax.random.key(1), LABELS)
    np.testing.assert_allclose(found, student.sample(1, LABELS, substeps=8), rtol=0, atol=1e-5)


def test_a_path_may_be_in_the_home_directory(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    exported[0].export("~/sampler.safetensors", substeps=8, platforms=["cpu"], batch=2)
    assert (tmp_path / "sampler.safetensors").is_file()
    assert piflow_jax.load_exported("~/sampler.safetensors").settings["batch"] == 2


def test_a_file_says_what_it_is(exported):
    settings = piflow_jax.load_exported(exported[1]).settings
    wanted = {"nfe": 2, "substeps": 8, "solver": "multistep", "shape": [8, 8, 1], "batch": 2}
    wanted |= {"num_classes": 10, "platforms": ["cpu"], "jax": jax.__version__}
    assert wanted.items() <= settings.items()


WRONG = {
    "a class that there is not": ([10], r"labels must be in \[0, 10\), got 10"),
    "words": (["cat"], r"labels must be integers \[N\]"),
    "prompts": ({"text": np.zeros((1, 2, 3))}, r"labels must be integers \[N\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_conditions(exported, case):
    given, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        piflow_jax.load_exported(exported[1]).sample(0, given)


def test_wrong_prompts(tmp_path):
    student, path = CASES["text"][0](), tmp_path / "sampler"
    student.export(path, size=(4, 8), text_length=4, substeps=2, platforms=["cpu"])
    loaded = piflow_jax.load_exported(path)
    with pytest.raises(ValueError, match="arrays by name: text, text_length, pooled"):
        loaded.sample(0, [1])
    wrong = embedded(2) | {"pooled": np.zeros((2, 4), np.float32)}
    with pytest.raises(ValueError, match=r"pooled must be \[N, 3\], got \[2, 4\]"):
        loaded.sample(0, wrong)
    for name, values, words in (
        ("text", np.full((2, 4, 5), np.nan), "text must be .*, got nan"),
        ("text_length", [2.5, 4], "text_length must be int32 as in training, got 2.5"),
        ("text_length", [2, 5], r"text_length must be in \[0, 4\], got 5"),
        ("guidance", -1.0, "guidance must be finite and at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            loaded.sample(0, embedded(2) | {name: values})
    guided = embedded(1) | {"guidance": 5.0}
    expected = student.sample(0, guided, size=(4, 8), substeps=2)
    np.testing.assert_allclose(loaded.sample(0, guided), expected, rtol=0, atol=1e-5)


def test_guidance_is_that_of_the_student(recwarn):
    settings = {"condition": {"labels": ("int32", []), "guidance": ("float32", [])}}
    settings |= {"defaults": {"guidance": 2.0}, "num_classes": 10, "batch": None}

    def program(weights, key, places, condition):
        return condition["guidance"]

    older = ExportedStudent(settings, {}, program)
    exported = ExportedStudent(settings | {"guidance_range": [1.0, 4.0]}, {}, program)
    for one in (older, exported):
        np.testing.assert_array_equal(one.sample(0, [1, 2]), [2, 2])
        np.testing.assert_array_equal(one.sample(0, [1, 2], guidance=[1, 4]), [1, 4])
    older.sample(0, [1, 2], guidance=9.0)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="guidance from 1 to 4; guidance=9 is outside"):
        exported.sample(0, [1, 2], guidance=9.0)
    with pytest.raises(ValueError, match=r"guidance must be a number or \[2\], got \[3\]"):
        exported.sample(0, [1, 2], guidance=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda labels: exported.sample(0, labels))(jnp.arange(2))


def test_files_that_cannot_be_loaded(exported, tmp_path):
    from piflow_jax.safetensors_files import open_safetensors, write_safetensors

    other = tmp_path / "other.safetensors"
    write_safetensors(other, {"weights": np.zeros(3)})
    with pytest.raises(ValueError, match="is no file of Student"):
        piflow_jax.load_exported(other)
    with pytest.raises(
        ValueError, match=r"a sampler of Student\.export: piflow_jax\.load_exported"
    ):
        piflow_jax.load(exported[1])
    arrays, metadata = open_safetensors(exported[1])
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    description = json.loads(metadata["piflow_jax_sampler"])
    for change, words in (
        ({"platforms": ["tpu"]}, "was exported for tpu, here is cpu: export it with that"),
        ({"jax": "0.1"}, f"holds a program of jax 0.1, which jax {jax.__version__} does not read"),
    ):
        damaged = arrays | ({} if "platforms" in change else {"program": np.zeros(9, np.uint8)})
        text = json.dumps(description | change)
        write_safetensors(other, damaged, {"piflow_jax_sampler": text})
        with pytest.raises(ValueError, match=words):
            piflow_jax.load_exported(other)


def test_what_cannot_be_exported(exported, tmp_path):
    for options, words in (
        ({"platforms": ["abacus"]}, "platforms are some of cpu, cuda, rocm, tpu, got .'abacus'."),
        ({"nfe": 0}, "nfe must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            exported[0].export(tmp_path / "sampler", **options)
    assert not list(tmp_path.iterdir())
