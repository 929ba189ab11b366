"""The command line and the config file: what can be written there, and what is answered.

A case is one line: what is written, and words of the answer, whose exit status is 2. Cases run in
this process, and none of them trains; what only a process shows stands at the end.
"""

import contextlib
import dataclasses
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from piflow_jax import main, modes
from piflow_jax.config import Config, ConfigError, parse
from piflow_jax.config.parsing import key_types
from piflow_jax.distillation import sizes
from piflow_jax.modes import adm
from tests import tiny

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny.py"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command line in this process: `(exit status, what it says)`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        flags.FLAGS.unparse_flags()
        try:
            status = main.main(main.parse_flags(["piflow_jax.main", *arguments]))
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err

    yield run
    flags.FLAGS.unparse_flags()


@pytest.fixture
def refused(run):
    """Checks that a command line is refused in one paragraph with these words."""

    def refused(words, *arguments):
        status, said = run(*arguments)
        assert status == 2, said
        assert said.startswith("error: ") and said.count("error: ") == 1, said
        assert re.search(words, said), said

    return refused


@pytest.fixture
def settings(run, monkeypatch):
    """The configuration that a command line comes to."""

    def settings(*arguments):
        made = []
        monkeypatch.setattr(modes, "run", lambda mode, config, workdir: made.append(config) or 0)
        status, said = run(*arguments, "--workdir=unused")
        assert status == 0, said
        return made[0]

    return settings


# --- Flags --------------------------------------------------------------------------------------

STEPS = "unknown key config.train.stepz; config.train has steps, .* mean config.train.steps?"
OF_PROMPTS = "is for config.data.name = 'prompts' and must be empty with 'digits'"
OF_FLUX = "is for config.model.network = 'flux' and must be 3, its default, with 'dit'"
REFUSED_FLAGS = [
    ("--mode=evil", r"--mode=evil: value should be one of <train\|"),
    ("--worker=3", "unexpected argument '--worker=3'.*; did you mean workdir?"),
    ("digits", "unexpected argument 'digits'; settings are --config.KEY=VALUE"),
    ("-- --mode=train", "unexpected argument '--'"),
    ("--nomode", "unexpected argument '--nomode'"),
    ("--flagfile=nowhere", "nowhere"),
    ("--verbosity=loud", "--verbosity=loud"),
    (f"--flagfile={ROOT / 'tests/cases/07-16-bit-png/ramp.png'}", "--flagfile: .* can't decode"),
    (
        "--workdir=~no_such_user/run",
        "--workdir ~no_such_user/run is of no user here; ./~no_such_user/run is a path",
    ),
    ("--config.rivals.seeds=1,1", r"config.rivals.seeds must not hold a value twice, got \(1, 1\)"),
    ("--config.rivals.methods=gm,gm", "config.rivals.methods must not hold a value twice"),
    (
        "--config.mesh.data=-1 --config.mesh.tensor=-1",
        "but config.mesh.data and config.mesh.tensor",
    ),
    (f"--config.data.name=mnist --config.data.data_dir={TINY}", "tiny.py is no directory"),
    ("--config.data.name=mnist --config.data.data_dir=foo://x", "has the unknown scheme foo://;"),
    ("--config.model.network=os:system", r"must take \(outputs, shape, num_classes\) to make"),
    ("--config.model.network=tests.tiny:get_config", "must take .* too many positional arguments"),
    ("--config.data.name=latents", "there are no latents.* or correct config.data.data_dir"),
    (
        "--config.teacher.weights=nowhere",
        "config.teacher.weights = 'nowhere': .* no such checkpoint or weight file",
    ),
    ("--prompts=a.txt", f"config.data.prompts {OF_PROMPTS}"),
    ("--config.train.stepz=3", STEPS),
    ("--config.train.stepz 3", STEPS),
    ("--config.train_steps=3", "; did you mean config.train.steps?"),
    ("--config.learning_rate=3", r"; did you mean config\..*\.learning_rate?"),
    ("--config.train.steps.x=3", "unknown key config.train.steps.x; config.train has"),
    ("--config.=3", "unknown key config.; config has seed, data"),
    ("--config.train.steps", "--config.train.steps has no value"),
    ("--noconfig.train.steps", "is no switch"),
    ("--noconfig.train.data_free=1", "is no switch"),
    ("--config.train.steps=1e3", "config.train.steps must be of type int, got '1e3'"),
    ("--config.train.steps=", "config.train.steps must be of type int, got ''"),
    ("--config.train.data_free=maybe", "must be of type bool, got 'maybe'"),
    ("--config.train.shift=nan", "config.train.shift must be finite, got nan"),
    ("--config.train.shift=wide", "config.train.shift must be of type float, got 'wide'"),
    ("--config.rivals.seeds=a,b", "config.rivals.seeds must be of type int, got 'a'"),
    ("--config.rivals.seeds=", "config.rivals.seeds must not be empty"),
    ("--config.train=3", "config.train must be a group of keys, got 3"),
    ("--config.train={'steps':3}", "missing key config.train.batch_size"),
    ("--config.seed=" + "9" * 5000, r"config.seed must be of type int, got '9{199}\.\.\."),
    ("--config.data.data_dir=nowhere", "config.data.data_dir is for .* empty with 'digits'"),
    ("--config.evaluation.clip=x", f"config.evaluation.clip {OF_PROMPTS}"),
    ("--config.model.flux.depth=5", f"config.model.flux.depth {OF_FLUX}, got 5"),
    ("--config.model.network=a:b --config.model.flux.depth=5", OF_FLUX.replace("dit", "a:b")),
    (
        "--config.model.network=flux --config.model.dit.depth=2",
        "config.model.dit.depth is for .*'dit'",
    ),
    ("--config.model.network=own", "must be one of dit, flux, qwen_image, flux2 or a function"),
    ("--config.data.name=mnist --config.data.data_dir=nowhere", "nowhere does not exist"),
    (f"--config.compilation_cache={TINY}", "config.compilation_cache must be a directory, .*tiny"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED_FLAGS)
def test_flags_that_are_refused(refused, tmp_path, arguments, words):
    refused(words, f"--config={TINY}", "--workdir=run", *arguments.split(" "))


@pytest.mark.parametrize("given", ["", f"--config={TINY}", "--workdir=x"])
def test_config_and_workdir_are_needed(refused, given):
    missing = "workdir" if given.startswith("--config") else "config"
    refused(f"--{missing} must have a value", *given.split())


ACCEPTED_FLAGS = [
    ("--config.train.steps=5", "train.steps", 5),
    ("--config.train.steps 5 --mode=train", "train.steps", 5),
    ("-config.mesh.data -1", "mesh.data", -1),
    ("--config.seed=0x10", "seed", 16),
    ("--config.train.data_free", "train.data_free", True),
    ("--config.train.data_free=t", "train.data_free", True),
    ("--config.train.data_free --noconfig.train.data_free", "train.data_free", False),
    ("--config.train.shift=3", "train.shift", 3.0),
    ("--config.data.data_dir=", "data.data_dir", ""),
    ("--config.data.data_dir=a=b", "data.data_dir", "a=b"),
    ("--prompts=list.txt", "data.prompts", "list.txt"),
    # Of a key given twice, the last counts, of tuples too.
    ("--config.seed=1 --config.seed=2", "seed", 2),
    ("--config.rivals.seeds=(0,1) --config.rivals.seeds=(2,)", "rivals.seeds", (2,)),
    ("--config.rivals.seeds=7", "rivals.seeds", (7,)),
    ("--config.rivals.seeds=[3,4]", "rivals.seeds", (3, 4)),
    ("--config.rivals.methods=gm,arc+teacher", "rivals.methods", ("gm", "arc+teacher")),
    ("--config.rivals.methods=('gm',)", "rivals.methods", ("gm",)),
    ("--config.profile=", "profile", ()),
    # What a file says of its network goes with it.
    ("--config.model.network=a:b --config.seed=1", "model.dit.hidden", 64),
    ("--config.model.dit.depth=7 --config.model.network=dit", "model.dit.hidden", 16),
]


@pytest.mark.parametrize(("arguments", "key", "value"), ACCEPTED_FLAGS)
def test_flags_that_are_accepted(settings, arguments, key, value):
    found = settings(f"--config={TINY}", *arguments.split(" "))
    for name in key.split("."):
        found = found[name]
    assert found == value and type(found) is type(value)


# --- Config files -------------------------------------------------------------------------------

MINE = "from piflow_jax.config import base_config\n"
REFUSED_FILES = [
    (None, "--config must name a config file.*'mine.py' does not exist or cannot be read"),
    ("", "mine.py is no config file: it has no function get_config"),
    ("get_config = 3", "mine.py is no config file"),
    ("not a config", "the config file fails: mine.py, line 1: SyntaxError"),
    ("x = 1\n\0", "the config file fails: mine.py"),
    (b"\xff\xfe", "the config file fails: mine.py"),
    ("import nowhere", "mine.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
    ("raise SystemExit('no')", "mine.py, line 1: SystemExit: no"),
    ("def get_config():\n  return 1 / 0", "mine.py, line 2: ZeroDivisionError: division by zero"),
    ("def get_config():\n  pass", "get_config must return a ConfigDict .*, got None"),
    ("def get_config(variant):\n  pass", "mine.py has variants, name one: mine.py:..."),
    ("def get_config():\n  return {'a.b': 2}", "the config file fails: mine.py: ValueError"),
    ("def get_config():\n  return {}", "missing key config.seed"),
    ("def get_config():\n  return {'sed': 1}", "unknown key config.sed;.* mean config.seed?"),
    (f"{MINE}def get_config():\n  c = base_config()\n  c.train.steps = 1e4\n  return c",
     "mine.py, line 4: TypeError: .*steps"),
    (f"{MINE}def get_config():\n  c = base_config()\n  c.train.stepz = 1\n  return c", STEPS),
    (f"{MINE}def get_config():\n  c = base_config()\n  c.train.shift = 10 ** 400\n  return c",
     "mine.py, line 4: OverflowError"),
    (f"{MINE}def get_config():\n  c = base_config()\n  c.seed = 10 ** 5000\n  return c",
     "config.seed must be at most 9,223,372,036,854,775,807, got int of more digits"),
    (f"{MINE}def get_config():\n  c = base_config()\n  c.topology = 'a\\0b'\n  return c",
     "config.topology must have no NUL character"),
    (f"{MINE}def get_config():\n  c = base_config()\n  c.model.flux.depth = 5\n  return c",
     OF_FLUX),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), REFUSED_FILES)
def test_config_files_that_are_refused(refused, content, words):
    if content is not None:
        Path("mine.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(words, "--config=mine.py", "--workdir=run")


REFUSED_NAMES = [
    ("", "but '' does not exist or cannot be read"),
    (".", "but '.' is a directory"),
    (str(TINY.parent), "tests' is a directory"),
    (f"{ROOT}/configs/digit.py", "digit.py' does not exist.*; did you mean .*/configs/digits?"),
    ("x" * 5000, "does not exist or cannot be read"),
    ("\udcff.py", "does not exist or cannot be read"),
    ("/dev/null", "/dev/null is no config file"),
    # From another directory than the checkout's.
    ("digit", r"one of digits, emoji, .*'digit' does not exist .*; did you mean digits\?"),
    ("digts", r"did you mean digits\?"),
    ("configs/digits.py", r"'configs/digits.py' does not exist .*; did you mean digits\?"),
    ("digits:guide", r"digits.py: there are the variants .*, not 'guide'; did you mean guided\?"),
    (f"{TINY}:gm", "tiny.py has no variants, got 'gm'"),
    *(
        (f"{ROOT}/configs/{name}.py:{variant}x", f"not '{variant}x'; did you mean {variant}?")
        for name, variant in (
            *(("digits", "guided"), ("mnist", "gm"), ("imagenet", "dx_repa_10")),
            *(("flux", "datafree"), ("qwen_image", "runlocal")),
        )
    ),
]


@pytest.mark.parametrize(("name", "words"), REFUSED_NAMES)
def test_names_of_config_files_that_are_refused(refused, name, words):
    Path("edit.py").touch()  # also similar to "digts", but less so than "digits"
    refused(words, f"--config={name}", "--workdir=run")


def test_a_config_that_ships_with_the_package_is_found_by_its_name(settings):
    assert settings("--config=digits").policy.kind == "gm"
    assert settings("--config=digits:dx").policy.kind == "dx"
    Path("digits").mkdir()  # a work directory of this name is no config file
    assert settings("--config=digits:dx").policy.kind == "dx"
    Path("mnist").write_text("def get_config():\n  return {'seed': 3}")
    assert settings("--config=mnist").seed == 3


def test_a_config_file_is_read_anew_and_may_have_a_colon_in_its_path(settings):
    """Python's cache of compiled files goes by seconds; a sweep writes several in one."""
    for seed in (1, 2):
        Path("a:b.py").write_text(f"def get_config(seed='{seed}'):\n  return {{'seed': int(seed)}}")
        assert settings("--config=a:b.py").seed == seed
        assert settings("--config=a:b.py:7").seed == 7
    assert settings(f"--config={ROOT}/configs/digits.py:dx").policy.kind == "dx"


# --- Values -------------------------------------------------------------------------------------

MEMORY = r"takes at least [\d,.]+ GiB of memory, there are [\d,.]+; lower config\.{key} \({value}\)"
REFUSED_VALUES = [
    ("seed", 2**63, "must be at most 9,223,372,036,854,775,807"),
    ("seed", -1, "must be at least 0"),
    ("train.steps", 10**20, "must be at most 2,147,483,647"),
    ("train.shift", 1e300, "must be a number of float32"),
    ("train.shift", 1e30, "must be at most 1,000"),
    ("train.shift", 1e-9, "must be at least 0.001"),
    ("train.optimizer.ema_gamma", 1e300, "must be a number of float32"),
    ("train.optimizer.learning_rate", 1e-300, "must be a number of float32"),
    ("train.total_substeps", 10**9, "must be at most 65,536"),
    ("evaluation.substeps", 10**9, "must be at most 65,536"),
    ("train.nfe", 10**6, "must be at most 1,024"),
    ("evaluation.nfe", 10**6, "must be at most 1,024"),
    ("train.num_states", 10**8, "must be at most 1,024"),
    ("evaluation.teacher_steps", "(1,100000)", "must be at most 10,000"),
    (
        "model.dit.mlp_ratio",
        1e-9,
        r"times .*hidden \(16\) must be at least 1, got 1e-09",
    ),
    # Found when the data is known.
    ("model.dit.hidden", 10**8, "must be at most 1,048,576, got 100000000"),
    ("model.dit.patch_size", 3, "must divide the 8 sites of a side of 'digits', got 3"),
    ("model.dit.patch_size", 16, "must divide the 8 sites of a side of 'digits', got 16"),
    ("evaluation.num_samples", 10, "must be at least 11 for all figures"),
    ("evaluation.weights", "a.safetensors", "are for data sets of latents"),
    ("evaluation.checkpoint", "best", "= 'best' needs looks .*; set config.evaluation.every"),
    (
        *("evaluation.checkpoint", "best --config.evaluation.every=100"),
        "= 'best' needs looks .*; set config.evaluation.every to at most config.train.steps = 6",
    ),
    ("evaluation.grid_classes", "(3,10) --config.evaluation.every=1", "must be below 10, got 10"),
    (
        *("train.corrector.critic_steps", "7 --config.train.corrector.kind=policy"),
        "is for config.train.corrector.kind = 'critic' and must be its default with 'policy'",
    ),
    ("evaluation.every_samples", "10 --config.evaluation.every=1", "must be at least 11 for all"),
    # Found by an estimate, before anything is compiled.
    ("model.dit.hidden", 2**20, MEMORY),
    ("model.dit.depth", 10**9, MEMORY),
    ("policy.num_components", 10**8, MEMORY),
    ("policy.logstd_hidden", 10**9, MEMORY),
    ("train.batch_size", 10**9, MEMORY),
    ("teacher.batch_size", 10**9, MEMORY),
    ("evaluation.num_samples", 10**9, MEMORY),
    ("policy.num_grid", "100000000 --config.policy.kind=dx --config.train.gm_dropout=0", MEMORY),
]


@pytest.mark.parametrize(("key", "value", "words"), REFUSED_VALUES)
def test_values_that_are_refused(refused, key, value, words):
    value, *others = str(value).split()
    words = words.format(key=re.escape(key), value=value) if words is MEMORY else f"{key} {words}"
    refused(words, f"--config={TINY}", "--workdir=run", f"--config.{key}={value}", *others)
    assert not list(Path("run").glob("*/checkpoints"))


def test_a_week_of_operations_is_refused(refused, monkeypatch):
    monkeypatch.setattr(sizes.Machine, "here", lambda: sizes.Machine(memory=2**60, flops=1.0))
    words = r"step of the teacher's training takes at least .* operations, [\d,]+ days at 1.0e\+00"
    refused(words, f"--config={TINY}", "--workdir=run")


def test_what_no_estimate_foresaw_is_one_sentence(run, monkeypatch):
    def allocate(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    sample = dataclasses.replace(modes.MODES["sample"], run=allocate)
    monkeypatch.setitem(modes.MODES, "sample", sample)
    status, said = run(f"--config={TINY}", "--workdir=run", "--mode=sample")
    assert status == 1
    assert said.startswith("error: not enough memory (RESOURCE_EXHAUSTED") and "batch sizes" in said


@pytest.mark.parametrize("key", ["num_samples", "every_samples"])
def test_precision_and_recall_of_latents_need_neighbours(monkeypatch, key):
    config = tiny.get_config()
    config.data.name, config.evaluation.reference = "latents", "reference.npz"
    config.evaluation.every, config.evaluation[key] = 1, 3
    reference = types.SimpleNamespace(images=10, check=lambda digest: None)
    monkeypatch.setattr(adm, "read_reference", lambda path: reference)
    network = types.SimpleNamespace(digest="")
    with pytest.raises(ConfigError, match=f"{key} must be at least 4 for precision and recall"):
        adm.load_reference(parse(config), network)
    reference.images = 0
    assert adm.load_reference(parse(config), network) is reference


WRONG = [
    *(0, 1, -1, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf),
    *("", "x", "a\0b", True, False, None, (), (0,), (-1, 2, 3), ("x",), (None,), [1], {}, {"x": 1}),
    *(b"x", 1j, np.float32(1), np.int64(3), np.zeros(2), object()),
]


@pytest.mark.parametrize("key", key_types(Config, "config"))
def test_any_value_of_any_key_is_accepted_or_refused_by_name(key):
    """No other exception, whatever is written."""
    for value in WRONG:
        config = node = tiny.get_config().to_dict()
        *groups, name = key.split(".")[1:]
        for group in groups:
            node = node[group]
        node[name] = value
        with contextlib.suppress(ConfigError):
            parse(config)


# --- Modes --------------------------------------------------------------------------------------

REFUSED_MODES = [
    *(
        (f"compile --config.topology={name}", "config.topology: unknown topology '.*it is a chip")
        for name in ("x", "v5e", "v5e:0x0", "v5e:2x", "v5e:-1x2", "v5e:1.5x2", "v5e:2x2*0")
    ),
    ("prepare", "is for config.data.name = 'images' or 'latents' or 'prompts', got 'digits'"),
    ("statistics", "is for config.data.name = .*'latents', got 'digits'"),
    (
        "rivals --config.rivals.methods=gm_9999nfe",
        "methods: config.train.nfe must be at most 1,024",
    ),
    ("rivals --config.rivals.methods=meanfow", "there is no 'meanfow'; did you mean meanflow?"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED_MODES)
def test_modes_that_are_refused(refused, arguments, words):
    mode, *others = arguments.split()
    refused(words, f"--config={TINY}", "--workdir=run", f"--mode={mode}", *others)


# --- Processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=nowhere.py"], "--config must name a config file"),
        ([f"--config={TINY}", "--config.train.stepz=3"], "did you mean config.train.steps?"),
        ([f"--config={TINY}", "--config.train.steps=many"], "must be of type int, got 'many'"),
    ],
)
def test_a_process_ends_with_one_line(tmp_path, arguments, words):
    done = subprocess.run(
        [sys.executable, "-m", "piflow_jax.main", f"--workdir={tmp_path / 'run'}", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr


def test_the_home_directory_is_that_of_all_paths(monkeypatch):
    """Shells leave the `~` of `--key=~/path` as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    config = tiny.get_config()
    config.teacher.checkpoint, config.data.vae = "~/run", "a/~b"
    parsed = parse(config)
    assert (parsed.teacher.checkpoint, parsed.data.vae) == ("/home/me/run", "a/~b")
