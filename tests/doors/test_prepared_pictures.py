"""The door of pictures, as `--mode=prepare` sees it: what is refused, left out, scaled, turned."""

import io
import json
import os
import shutil
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from piflow_jax.config import base_config, parse
from piflow_jax.convert import to_torch_state, write_safetensors
from piflow_jax.data.latents import load_latents_source
from piflow_jax.data.prompts import load_prompts_source
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.modes import run, sample_prompts
from piflow_jax.modes.autoencoder import Autoencoder, pixel_sampler, tree_digest
from piflow_jax.modes.prepare import prepare
from piflow_jax.systems.networks import NETWORKS
from piflow_jax.systems.shapes import DataShape

SMALL = {"layers_per_block": 1, "norm_groups": 4}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("piflow_jax.modes.command._start", lambda *_: None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The folder of an autoencoder whose sites have 8 pixels."""
    folder = tmp_path_factory.mktemp("vae")
    module = AutoencoderKL(channels=(4, 4, 4, 4), **SMALL)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    write_safetensors(folder / "vae.safetensors", to_torch_state(module, params))
    return folder


def autoencoder(weights, **settings):
    """The folder with a `config.json`."""
    (weights / "config.json").write_text(json.dumps({"norm_num_groups": 4} | settings))
    return str(weights)


def save(path, value=128, size=(24, 20), **options):
    path.parent.mkdir(exist_ok=True, parents=True)
    pixels = np.full((*size, 3), value, np.uint8)
    with open(path, "wb") as file:
        Image.fromarray(pixels).save(file, "PNG", **options)


def of_classes(tmp_path, vae, **data):
    config = base_config()
    config.data.name = "latents"
    config.data.images = str(tmp_path / "images")
    config.data.data_dir = str(tmp_path / "set")
    config.data.vae = vae
    config.data.image_size = 256
    config.data.update(data)
    return config


def of_prompts(tmp_path, entries, **data):
    config = base_config()
    config.data.name, config.model.network, config.model.flux.rope_axes = (
        "prompts",
        "flux",
        (8, 4, 4),
    )
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, entries)))
    config.data.prompts = str(tmp_path / "list.jsonl")
    config.data.text_encoder = "words:6:4"
    config.data.data_dir = str(tmp_path / "set")
    config.data.image_size = 64
    config.data.update(data)
    return config


@pytest.mark.parametrize(
    ("settings", "scale", "shift"),
    [
        ({}, 0.18215, 0.0),
        ({"scaling_factor": 0.13025, "shift_factor": None}, 0.13025, 0.0),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.3611, 0.1159),
    ],
)
def test_prepared_latents_have_the_scale_of_their_autoencoder(
    tmp_path, weights, settings, scale, shift
):
    save(tmp_path / "images" / "a" / "0.png")
    vae = autoencoder(weights, **settings)
    assert run("prepare", of_classes(tmp_path, vae), tmp_path) == 0
    data = DataShape.of("latents", load_latents_source(tmp_path / "set"))
    assert (data.latent_scale, data.latent_shift) == (scale, shift)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling_factor": "x"}, "scaling_factor must be a positive number, got 'x'"),
        ({"scaling_factor": 0}, "scaling_factor must be a positive number, got 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor must be a positive number, got nan"),
        ({"scaling_factor": True}, "scaling_factor must be a positive number, got True"),
        ({"scaling_factor": [0.5]}, "scaling_factor must be a positive number, got [0.5]"),
        ({"scaling_factor": 10**400}, "scaling_factor must be a positive number, got 1000"),
        ({"shift_factor": {}}, "shift_factor must be a number, got {}"),
        ({"scaling_factor": 1e308}, "scaling_factor must be a positive number, got 1e+308"),
        ({"norm_num_groups": 2.5}, "norm_num_groups must be a positive whole number, got 2.5"),
        ({"norm_num_groups": 4.0}, "norm_num_groups must be a positive whole number, got 4.0"),
        ({"norm_num_groups": 3}, "3 groups of normalisation do not divide 4 channels"),
    ],
)
def test_settings_of_an_autoencoder_are_checked(tmp_path, weights, settings, message, capfd):
    save(tmp_path / "images" / "a" / "0.png")
    config = of_classes(tmp_path, autoencoder(weights, **settings))
    assert run("prepare", config, tmp_path) == 2
    said = capfd.readouterr().err
    assert message in said and str(weights) in said


STATISTICS = {
    "latents_mean": [float(i) for i in range(32)],
    "latents_std": [float(2 ** (i % 3)) for i in range(32)],
}
VA_VAE = [  # settings, channels of the autoencoder, and the words of an error
    (STATISTICS, 32, ""),
    (STATISTICS | {"scaling_factor": 0.3, "shift_factor": 0.1}, 32, ""),
    (STATISTICS | {"latents_std": [1.0] * 31}, 32, "latents_std has 31 numbers, the latents 32 ch"),
    (STATISTICS | {"latents_std": [0.0] * 32}, 32, "latents_std must be a positive number, got [0"),
    ({"scaling_factor": 0.3}, 32, "no latents_mean and latents_std, with which these latents are"),
    ({}, 32, "put the config.json of its release next to its weights"),
    ({}, 4, "makes latents with 4 channels, these have 32"),
]


@pytest.mark.parametrize(("settings", "channels", "words"), VA_VAE)
def test_latents_of_va_vae_have_the_statistics_in_its_settings(
    tmp_path, settings, channels, words, capfd
):
    module = AutoencoderKL(channels=(4,) * 5, latent_channels=channels, **SMALL)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    write_safetensors(tmp_path / "vae.safetensors", to_torch_state(module, params))
    save(tmp_path / "images" / "a" / "0.png")
    config = of_classes(tmp_path, autoencoder(tmp_path, **settings), latents="va_vae")
    status = run("prepare", config, tmp_path)
    if words:
        assert status == 2 and words in capfd.readouterr().err
        return
    data = DataShape.of("latents", load_latents_source(tmp_path / "set"))
    assert status == 0 and data.shape == (16, 16, 32)
    assert data.latent_shift == tuple(STATISTICS["latents_mean"])
    np.testing.assert_allclose(data.latent_scale, 1 / np.array(STATISTICS["latents_std"]))


@pytest.mark.parametrize("spoil", [lambda path: path.symlink_to("gone"), lambda path: path.mkdir()])
def test_settings_of_an_autoencoder_that_cannot_be_read_are_not_left_out(
    tmp_path, weights, spoil, capfd
):
    """The numbers of another autoencoder would take their place."""
    save(tmp_path / "images" / "a" / "0.png")
    folder = shutil.copytree(weights, tmp_path / "vae")
    (folder / "config.json").unlink(missing_ok=True)
    spoil(folder / "config.json")
    assert run("prepare", of_classes(tmp_path, str(folder)), tmp_path) == 2
    assert f"{folder / 'config.json'} is damaged" in capfd.readouterr().err


def test_a_scale_for_each_channel_reaches_the_networks_and_comes_back(tmp_path):
    scales, shifts = (0.5, 1.0, 2.0, 4.0), (0.0, 0.1, -0.2, 0.3)
    module = AutoencoderKL(channels=(4, 4), latent_scale=scales, latent_shift=shifts, **SMALL)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    autoencoder = Autoencoder(module, params, tree_digest(params))

    class One:
        class_names, description = ("a",), "one"

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return np.full((16, 16, 3), 200, np.uint8), 0, "one"

    for _ in range(2):  # the second finds the plan of the first to be its own
        prepare(One(), autoencoder, tmp_path, image_size=16)
    source = load_latents_source(tmp_path, expect_scale=scales, expect_shift=shifts)
    data = DataShape.of("latents", source)
    mean = jnp.asarray(source[0]["x"]["mean"])[None]
    seen = np.asarray(source.draw(jax.random.key(0), {"mean": mean, "std": 0 * mean}))
    either = (np.asarray(mean[0], np.float32) - shifts) * scales
    assert min(np.abs(seen[0] - mean).max() for mean in either) < 1e-6
    sampler = pixel_sampler(lambda params, noise, labels: noise, module, data)
    raw = (seen / scales + shifts).astype(np.float32)
    expected = module.apply(params, raw, method="decode")
    np.testing.assert_allclose(sampler((None, params), seen, None), expected, atol=1e-5)


@pytest.mark.parametrize("prepared", [False, True])
def test_samples_are_decoded_at_the_right_scale(prepared):
    """Of official weights that of the autoencoder's settings, of a prepared set the set's."""
    module = AutoencoderKL(channels=(4, 4), latent_scale=0.13025, latent_shift=0.5, **SMALL)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    known = {"latent_scale": 0.3611, "latent_shift": 0.1159, "vae": "its identity"}
    data = DataShape(name="latents", channels=4, **known)
    data = data if prepared else NETWORKS["dit"].official
    scale, shift = (0.3611, 0.1159) if prepared else (0.13025, 0.5)
    latents = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))
    sampler = pixel_sampler(lambda params, noise, labels: noise, module, data)
    expected = module.apply(params, latents / scale + shift, method="decode")
    np.testing.assert_allclose(sampler((None, params), latents, None), expected, atol=1e-5)


def nothing(path):
    path.symlink_to("gone.png")


BROKEN = {
    "half.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "text.JPEG": lambda path: path.write_text("hello"),
    "folder.png": lambda path: path.mkdir(),
    "link.png": nothing,
    os.fsdecode(b"\xff.png"): lambda path: path.write_bytes(b""),
}


def test_refused_images_are_listed_and_can_be_left_out(tmp_path, weights, capfd):
    vae = autoencoder(weights)
    good = ["a/0.png", "a/narrow.png", f"b/{os.fsdecode(bytes([0xFE]))}.png"]
    for value, name in enumerate(good):
        save(tmp_path / "images" / name, 50 * value, (1, 5000) if "narrow" in name else (24, 20))
    for name, make in BROKEN.items():
        make(tmp_path / "images" / "b" / name)
    assert run("prepare", of_classes(tmp_path, vae), tmp_path) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and "5 pictures were refused: replace them" in said
    for name in BROKEN:
        path = f"{tmp_path}/images/b/{name}".encode("ascii", "replace").decode()
        assert f"{path} is not a readable image: " in said.replace("\ufffd", "?")
    config = of_classes(tmp_path, vae, skip_refused=True)
    for _ in range(2):  # the second has nothing to do
        assert run("prepare", config, tmp_path) == 0
    source = load_latents_source(tmp_path / "set")
    assert [source.key(i) for i in range(len(source))] == good
    assert [int(source[i]["condition"]) for i in range(3)] == [0, 0, 1]
    refused = source.manifest["shards"][0]["refused"]
    assert [os.path.basename(entry["picture"]) for entry in refused] == sorted(BROKEN)
    means = [source[i]["x"]["mean"].astype(float).mean() for i in range(3)]
    assert len({round(mean, 3) for mean in means}) == 3  # each has its own picture


def test_nothing_is_left_of_refused_images_alone(tmp_path, weights, capfd):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.png").write_text("")
    vae = autoencoder(weights)
    assert run("prepare", of_classes(tmp_path, vae, skip_refused=True), tmp_path) == 2
    assert "would be empty: all pictures were refused" in capfd.readouterr().err


def text(path):
    path.write_text("hello")


def classes(*folders, **links):
    """A folder of class folders with a picture each, and links."""

    def make(path):
        path.mkdir()
        for folder in folders:
            save(path / folder / "0.png")
        for name, target in links.items():
            (path / name).symlink_to(target)

    return make


def with_an_empty_class(path):
    classes("a")(path)
    (path / "b").mkdir()


def tar(name, content=b"", kind=tarfile.REGTYPE):
    def make(path):
        with tarfile.open(path, "w") as file:
            entry = tarfile.TarInfo(name)
            entry.size, entry.type, entry.linkname = len(content), kind, "gone.tar"
            file.addfile(entry, io.BytesIO(content))

    return make


def tfds(version, content):
    def make(path):
        (path / "imagenet2012" / version).mkdir(parents=True)
        (path / "imagenet2012" / version / "dataset_info.json").write_text(content)

    return make


# What `config.data.images` names, what lies there, and what is said of it.
WRONG = {
    "nothing": ("images", lambda path: None, "there is no such folder of images"),
    "a file": ("images", text, "is neither a folder of images"),
    "nothing in it": ("images", classes(), "has neither images nor folders of them"),
    "an empty class": ("images", with_an_empty_class, "no images in "),
    "a class that is a link to nothing": ("images", classes("a", b="gone"), "b is a link to noth"),
    "no tar": ("x.tar", lambda path: None, "there is no such file of images"),
    "a text called tar": ("x.tar", text, "x.tar is damaged"),
    "a tar of texts": ("x.tar", tar("a.txt"), "has no images in it, and no tar files"),
    "a tar of folders": ("x.tar", tar("a.tar", kind=tarfile.DIRTYPE), "has no images in it"),
    "a tar of links": ("x.tar", tar("a.tar", kind=tarfile.SYMTYPE), "has links to what is no file"),
    "a tar of a damaged tar": ("x.tar", tar("a.tar", b"x" * 600), "x.tar is damaged"),
    "no TFDS": ("tfds:x", lambda path: None, "x' is not prepared in "),
    "damaged TFDS": ("tfds:x", tfds("5.1.0", "{"), "cannot be read by TFDS"),
    "TFDS of no version": ("tfds:x", tfds("new", "{}"), "cannot be read by TFDS: Invalid version"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_has_no_images_is_named(tmp_path, weights, case, capfd):
    where, make, message = WRONG[case]
    kind, _, name = where.rpartition(":")
    make(tmp_path / name)
    config = of_classes(tmp_path, autoencoder(weights))
    config.data.images = f"{kind}:{tmp_path / name}" if kind else str(tmp_path / name)
    assert run("prepare", config, tmp_path) == 2
    said = capfd.readouterr().err
    assert message in said and str(tmp_path) in said and "Traceback" not in said


def test_a_broken_picture_of_a_prompt_is_named_and_can_be_left_out(
    tmp_path, weights, capfd, monkeypatch
):
    vae = autoencoder(weights)
    entries = [
        {"prompt": "a", "image": "0.png"},
        {"prompt": "b", "image": "1.png", "aspect": "2:1"},
        {"prompt": "c", "image": "2.png"},
        {"prompt": "d", "image": "gone.png"},
    ]
    save(tmp_path / "0.png", 0)
    (tmp_path / "1.png").write_text("hello")  # the only one of its shape
    save(tmp_path / "2.png", 255)
    assert run("prepare", of_prompts(tmp_path, entries, vae=vae), tmp_path) == 2
    said = capfd.readouterr().err
    assert f"{tmp_path}/1.png is not a readable image: its format" in said
    assert f"{tmp_path}/gone.png is not a readable image: No such file" in said
    config = of_prompts(tmp_path, entries, vae=vae, skip_refused=True)
    assert run("prepare", config, tmp_path) == 0
    source = load_prompts_source(tmp_path / "set")
    assert list(source.prompts) == ["a", "c"] and source.buckets == ((8, 8),)
    assert [int(source[i]["index"]) for i in range(2)] == [0, 2] and source.bucket_sizes == (2,)
    assert source.null["text_length"] == 1
    assert not np.array_equal(source[0]["x"], source[1]["x"])

    # Pictures have their places in the list, as noise and texts do that they are compared with.
    def sampler(config, data, mesh, null):
        return lambda params, places, batch: jnp.broadcast_to(
            places[:, None, None, None].astype(jnp.float32), (len(places), 8, 8, data.channels)
        )

    monkeypatch.setattr(sample_prompts, "load_system", lambda *_: {})
    monkeypatch.setattr(sample_prompts, "_sampler", sampler)
    config.data.prompts = config.data.vae = ""
    files = sample_prompts.sample_prompts(parse(config), tmp_path / "run")
    assert [path.name for path in files] == ["00000-0.npy", "00002-0.npy"]
    assert [np.load(path).max() for path in files] == [0, 2]


TAGS = Image.Exif()
TAGS[274] = 6


@pytest.mark.parametrize(
    ("listed", "bucket"),
    [
        ({"width": 200, "height": 100}, (12, 6)),  # as it is stored, before its orientation
        ({"width": 100, "height": 200}, (12, 6)),  # as it is seen
        ({"aspect": "2:1"}, (12, 6)),
        ({"aspect": "16:9"}, (6, 10)),  # a cut that is wanted
        ({}, (8, 8)),
    ],
)
def test_a_listed_size_is_that_of_the_upright_picture(tmp_path, weights, listed, bucket):
    save(tmp_path / "0.png", size=(100, 200), exif=TAGS.tobytes())
    entries = [{"prompt": "a", "image": "0.png", **listed}]
    config = of_prompts(tmp_path, entries, vae=autoencoder(weights))
    assert run("prepare", config, tmp_path) == 0
    assert load_prompts_source(tmp_path / "set").buckets == (bucket,)
