"""Names on the Hugging Face hub, wherever weights are named by path.

The cache is one in the hub's own layout, and the hub is a service on this host. A case is one line:
a name and the local path that it is the same as, or words of the answer.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import piflow_jax
from piflow_jax import hub
from piflow_jax.config import ConfigError, parse
from piflow_jax.convert import (
    open_autoencoder,
    open_weights,
    to_torch_state,
    write_safetensors,
)
from piflow_jax.data.text_encoders import load_text_encoder
from piflow_jax.evaluation.image_text import load_image_network
from piflow_jax.loading.hub_weights import with_commits
from piflow_jax.loading.runs import load_student, load_system, spaces_of
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.modes.autoencoder import load_autoencoder
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems import networks
from tests.doors import test_loras
from tests.doors.test_loras import DATA, settings
from tests.hubs import COMMIT, OLDER, service, write_cache
from tests.weights import same

constants = pytest.importorskip("huggingface_hub.constants")

REMEDY = r"fetch it with --config.download=True, .* or by `hf download owner/name"
SMALL = {"a.weight": np.ones((2, 3), np.float32), "b.bias": np.ones(3, np.float32)}


def pipeline(root):
    """A repository of a pipeline, with shards, an autoencoder, and more than is read."""
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        (root / part).mkdir(parents=True)
    (root / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    names = [f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for (key, array), name in zip(SMALL.items(), names, strict=True):
        write_safetensors(root / "transformer" / name, {key: array})
    index = {"weight_map": dict(zip(SMALL, names, strict=True))}
    (root / "transformer" / "m.safetensors.index.json").write_text(json.dumps(index))
    module = AutoencoderKL(channels=(4, 4), layers_per_block=1, norm_groups=2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    write_safetensors(root / "vae" / "v.safetensors", to_torch_state(module, params))
    (root / "vae" / "config.json").write_text('{"norm_num_groups": 2, "scaling_factor": 0.5}')
    (root / "text_encoder" / "config.json").write_text('{"model_type": "other"}')
    for name in ("first.safetensors", "second.safetensors"):  # of another layout
        write_safetensors(root / name, {name: np.ones(2, np.float32)})
    return root


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return pipeline(tmp_path_factory.mktemp("repository") / "pipeline")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a hub that nobody reaches."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


folder = test_loras.folder


def contents(weights):
    return {name: np.asarray(array) for name, array in weights.items()}


NAMES = [
    ("hf:owner/name", "main", "transformer"),
    ("hf:owner/name/transformer", "main", "transformer"),
    ("hf:owner/name/transformer/", "main", "transformer"),
    ("hf:owner/name@main/transformer", "main", "transformer"),
    (f"hf:owner/name@{COMMIT}/transformer", "", "transformer"),
    ("hf:owner/name@v1.0", "v1.0", "transformer"),
    ("hf:owner/name@refs/pr/7/transformer", "refs/pr/7", "transformer"),
    ("hf:owner/name/first.safetensors", "main", "first.safetensors"),
    ("hf:owner/name@v1.0/transformer/m.safetensors.index.json", "v1.0", "transformer"),
]


@pytest.mark.parametrize(("name", "ref", "path"), NAMES)
def test_a_name_is_its_files_in_the_cache(repository, cache, name, ref, path):
    """Of the revision that it names: the cache has no other."""
    write_cache(cache, "owner/name", repository, ref=ref)
    same(contents(open_weights(name)), contents(open_weights(repository / path)))


def test_a_pipeline_is_its_network_or_its_autoencoder(repository, cache):
    """On a disk, too: neither part has to be named."""
    write_cache(cache, "owner/name", repository)
    expected = open_autoencoder(repository / "vae")
    for path in (repository, "hf:owner/name", "hf:owner/name/vae"):
        module, params = open_autoencoder(path)
        assert module == expected[0] and module.latent_scale == 0.5
        same(params, expected[1])
    same(contents(open_weights(repository)), SMALL)


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_place_of_the_cache_is_the_hubs_own(repository, tmp_path, variable):
    cache = tmp_path / "hub"
    snapshot = write_cache(cache, "owner/name", repository)
    place = tmp_path if variable == "HF_HOME" else cache
    code = "from piflow_jax import hub; print(hub.local('hf:owner/name/vae'))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {variable: str(place)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(snapshot / "vae"), done.stderr


ABSENT = [
    ("hf:other/name", r"^hf:other/name is not in the hub's cache, .*/hub: fetch .* other/name`"),
    ("hf:owner/name@v2", rf"^hf:owner/name@v2 is not .*: {REMEDY} --revision v2`"),
    ("hf:owner/name/text", rf"^hf:owner/name/text: text is not in .*{REMEDY} --include 'text\*'`"),
    ("hf:owner/name/transformer", "m-00002-of-00002.*; files of hf:owner/name@0.*/transformer"),
    ("hf:owner/name", "missing shards m-00002-of-00002.safetensors; files of hf:owner/name@0"),
    ("hf:owner/name/text_encoder", r"directory without weight files; .*'text_encoder\*'`"),
]


@pytest.mark.parametrize(("name", "words"), ABSENT)
def test_what_the_cache_lacks_is_named_with_its_remedy(repository, cache, name, words):
    snapshot = write_cache(cache, "owner/name", repository)
    shard = snapshot / "transformer" / "m-00002-of-00002.safetensors"
    os.remove(shard.resolve())  # as after an interrupted download, the link is left
    with pytest.raises(FileNotFoundError, match=words):
        open_weights(name)


def test_torchs_networks_are_found_by_name(repository, cache):
    """What they hold is looked at after that, and named with the remedy."""
    write_cache(cache, "owner/name", repository)
    for load in (load_text_encoder, load_image_network):
        with pytest.raises(ValueError, match=rf"models--owner--name.*; files of .*{REMEDY}"):
            load("hf:owner/name")
        with pytest.raises(FileNotFoundError, match=r"hf:other/name is not in the hub's cache"):
            load("hf:other/name")


BAD = [
    ("hf:name", "is no name on the Hugging Face hub; names are hf:owner/name, "),
    ("hf:", "is no name"),
    ("hf:owner/name/../../x", "is no name"),
    ("hf:owner/name//x", "is no name"),
    ("hf:owner/name@", "is no name"),
    ("hf:owner/na me", "is no name"),
]


@pytest.mark.parametrize(("name", "words"), BAD)
def test_names_are_refused_by_key_before_anything_is_read(repository, name, words):
    with pytest.raises(ValueError, match=f"^{re.escape(repr(name))} {words}"):
        open_weights(name)
    with pytest.raises(ConfigError, match=f"config.teacher.weights = '{name}' {words}"):
        parse(settings(repository, teacher__weights=name))
    with pytest.raises(ConfigError, match=f"config.teacher.loras = '{name}' {words}"):
        parse(settings(repository, teacher__loras=(name,)))


@pytest.mark.parametrize("key", ["data__data_dir", "teacher__checkpoint"])
def test_other_keys_take_no_names(repository, key):
    key_words = f"config.{key.replace('__', '.')} takes no name on the Hugging Face hub"
    with pytest.raises(ConfigError, match=key_words):
        parse(settings(repository, **{key: "hf:owner/name"}))


def test_without_its_library_a_name_says_what_to_install(repository, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "huggingface_hub" else found(n, *a)
    )
    words = r'need huggingface_hub: pip install -e "\.\[hub\]"'
    with pytest.raises(ConfigError, match=f"config.data.vae = hf:owner/name: .* {words}"):
        parse(settings(repository, data__vae="hf:owner/name"))


def test_a_student_of_the_hub_in_a_folder_of_its_pipeline_names_its_spaces(repository, cache):
    snapshot = write_cache(cache, "owner/name", repository)
    for path in snapshot.glob("*.safetensors"):
        path.unlink()
    assert spaces_of("hf:owner/name") == ()


def of_cache(path, cache):
    """A run's files as a repository each, and settings that name them."""
    for name in ("base", "student", "one"):
        root = cache.parent / name
        root.mkdir()
        shutil.copy(path / f"{name}.safetensors", root)
        write_cache(cache, f"owner/{name}", root)
    return settings(
        path,
        teacher__weights="hf:owner/base",
        evaluation__weights="hf:owner/student/student.safetensors",
        teacher__loras=("hf:owner/one@0.25",),
    )


def test_a_run_reads_the_commit_that_it_records(folder, cache, tmp_path):
    path, _ = folder
    config = parse(of_cache(path, cache))
    here = parse(settings(path, teacher__loras=(str(path / "one.safetensors@0.25"),)))
    expected = load_student(here, DATA, tmp_path)
    found = with_commits(config)
    assert found.teacher.weights == f"hf:owner/base@{COMMIT}"
    assert found.teacher.loras == (f"hf:owner/one@{COMMIT}@0.25",)
    assert found.evaluation.weights == f"hf:owner/student@{COMMIT}/student.safetensors"
    assert with_commits(found) == found and with_commits(here) == here
    # A later commit is not what the run began with.
    write_safetensors(tmp_path / "base" / "base.safetensors", SMALL)
    write_cache(cache, "owner/base", tmp_path / "base", commit=OLDER)
    same(load_student(found, DATA, tmp_path), expected)
    assert with_commits(config).teacher.weights == f"hf:owner/base@{OLDER}"
    with pytest.raises(
        ConfigError, match=r"^config\.teacher\.weights = 'hf:owner/base': .*no place"
    ):
        load_student(config, DATA, tmp_path)
    # What is not cached stays, and is refused where it is read.
    absent = dataclasses.replace(config.teacher, weights="hf:owner/none")
    absent = dataclasses.replace(config, teacher=absent)
    assert with_commits(absent).teacher.weights == "hf:owner/none"
    with pytest.raises(ConfigError, match=r"^config\.teacher\.weights = 'hf:owner/none': .*fetch"):
        load_system(absent, DATA, tmp_path)


def test_a_notebook_loads_by_name(folder, cache, monkeypatch):
    path, _ = folder
    config = of_cache(path, cache)
    row = dataclasses.replace(networks.NETWORKS["flux"], official=DATA)
    monkeypatch.setitem(networks.NETWORKS, "flux", row)
    files = [path / f"{name}.safetensors" for name in ("student", "base", "one")]
    expected = piflow_jax.load(files[0], config, teacher=files[1], loras={files[2]: 0.5})
    found = piflow_jax.load(
        "hf:owner/student", config, teacher="hf:owner/base", loras=["hf:owner/one@0.5"]
    )
    same(found.params, expected.params)
    with pytest.raises(FileNotFoundError, match=r"^hf:owner/none is not in the hub's cache"):
        piflow_jax.load("hf:owner/none", config)
    with pytest.raises(FileNotFoundError, match=r"^hf:owner/none is not in the hub's cache"):
        piflow_jax.load("hf:owner/student", config, teacher="hf:owner/none")


def test_the_command_names_the_key(cache, command, tmp_path):
    status, said = command(
        *("--config=tests/tiny.py", f"--workdir={tmp_path / 'run'}"),
        "--config.teacher.weights=hf:owner/name",
    )
    assert status == 2 and said.startswith(
        "error: config.teacher.weights = 'hf:owner/name': hf:owner/name is not in the hub's cache"
    )


def test_a_work_directory_is_no_name_on_the_hub(cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert user_path("hf:owner/name") == tmp_path / "hf:owner" / "name"


# --- Downloads, which are asked for ---------------------------------------------------------------

FILES = [
    *("README.md", "model_index.json", "first.safetensors", "second.safetensors"),
    *("transformer/config.json", "transformer/m.safetensors", "transformer/m.fp16.safetensors"),
    *("transformer/m.bin", "vae/config.json", "vae/v.fp16.safetensors", "vae/v.msgpack"),
    *("tokenizer/vocab.json", "tokenizer/merges.txt", "text_encoder/e.safetensors"),
]
TRANSFORMER = ["model_index.json", "transformer/config.json", "transformer/m.safetensors"]
VAE = ["model_index.json", "vae/config.json", "vae/v.fp16.safetensors"]
NEEDED = [
    ("", ("transformer",), TRANSFORMER),
    ("transformer", ("transformer",), TRANSFORMER[1:]),
    ("", ("vae",), VAE),
    ("vae", (), VAE[1:]),
    ("", ("tokenizer", "text_encoder"), ["model_index.json", *FILES[-3:]]),
    ("", (), ["model_index.json", "first.safetensors", "second.safetensors"]),
    ("", ("text_encoder_9",), ["model_index.json", "first.safetensors", "second.safetensors"]),
    ("transformer/m.bin", (), ["transformer/m.bin", "transformer/config.json"]),
    ("nowhere", (), []),
]


@pytest.mark.parametrize(("inside", "parts", "expected"), NEEDED)
def test_only_what_is_read_is_fetched(inside, parts, expected):
    assert hub.needed(FILES, inside, parts) == expected


@pytest.fixture
def served(repository, cache, monkeypatch):
    """`(names of files that were fetched)` of a hub that has the repository."""
    with service(repository) as (address, fetched):
        serve(monkeypatch, address)
        yield fetched


def serve(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_nothing_is_fetched_that_is_not_asked_for(repository, served, cache, monkeypatch):
    name = "hf:owner/name"
    config = parse(settings(repository, teacher__weights=name, data__vae=name))
    assert with_commits(config) == config
    with pytest.raises(FileNotFoundError):
        open_weights("hf:owner/name")
    assert not served
    found = with_commits(dataclasses.replace(config, download=True), fetch=True)
    assert found.teacher.weights == found.data.vae == f"hf:owner/name@{COMMIT}"
    folders = {name.rpartition("/")[0] for name in served}
    assert folders == {"", "transformer", "vae"} and served.count("model_index.json") == 1
    assert not {"first.safetensors", "second.safetensors"} & set(served)
    same(contents(open_weights("hf:owner/name")), SMALL)
    assert load_autoencoder(found).module == open_autoencoder(repository / "vae")[0]
    # The rest comes from the cache, even without a hub.
    count = len(served)
    with_commits(found, fetch=True)
    serve(monkeypatch, "http://127.0.0.1:9")
    assert with_commits(found, fetch=True) == found and len(served) == count


def test_a_notebook_asks_by_an_argument(served, repository):
    config = settings(repository)
    with pytest.raises(FileNotFoundError, match="not in the hub's cache"):
        piflow_jax.load("hf:owner/name", config)
    with pytest.raises(ValueError, match=r"models--owner--name.*"):  # no network of ours
        piflow_jax.load("hf:owner/name", config, download=True)
    assert {name.rpartition("/")[0] for name in served} == {"", "transformer"}


REFUSALS = [
    (401, "RepoNotFound", FileNotFoundError, "no such repository, or it is private: .*auth login"),
    (404, "RepoNotFound", FileNotFoundError, "no such repository, or it is private"),
    (403, "GatedRepo", FileNotFoundError, "is gated: accept its terms at https://.*/owner/name"),
    (404, "RevisionNotFound", FileNotFoundError, "owner/name has no branch, tag or commit main"),
    (500, "", OSError, "cannot be fetched from the hub: "),
]


@pytest.mark.parametrize(("status", "code", "error", "words"), REFUSALS)
def test_what_the_hub_refuses(repository, cache, monkeypatch, status, code, error, words):
    with service(repository, refusal=(status, code)) as (address, _):
        serve(monkeypatch, address)
        with pytest.raises(error, match=f"^hf:owner/name.*{words}"):
            hub.fetch("hf:owner/name")


def test_a_hub_that_is_not_reached_and_folders_without_weights(served, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no .safetensors files; .*: \., transformer, vae"):
        hub.fetch("hf:owner/name/tokenizer")
    serve(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"^hf:owner/name cannot be fetched from the hub: "):
        hub.fetch("hf:owner/name")
