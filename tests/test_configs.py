"""Every shipped configuration and variant is accepted, and says what its file promises."""

import importlib.util
from pathlib import Path

import pytest

from piflow_jax.config import mesh_sizes, parse
from piflow_jax.modes.compile import _data
from piflow_jax.rivals import find_method
from piflow_jax.systems.networks import official_data

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", load("digits").VARIANTS)
def test_digits_variants_are_valid(variant):
    config = parse(load("digits").get_config(variant))
    expected = {
        "gm": ("gm", 1, False, 1.0),
        "quick": ("gm", 1, False, 1.0),
        "dx": ("dx", 1, False, 1.0),
        "gm_2nfe": ("gm", 2, False, 1.0),
        "gm_any_nfe": ("gm", 1, False, 1.0),
        "datafree": ("gm", 2, True, 1.0),
        "guided": ("gm", 1, False, 2.0),
        "gm_any_guidance": ("gm", 1, False, 2.0),
        "rivals": ("gm", 1, False, 1.0),
    }[variant]
    train = config.train
    found = (config.policy.kind, train.nfe, train.data_free, config.teacher.guidance_scale)
    assert found == expected


@pytest.mark.parametrize("variant", load("mnist").VARIANTS)
def test_mnist_is_valid(variant):
    assert parse(load("mnist").get_config(variant)).data.name == "mnist"


@pytest.mark.parametrize("variant", load("images").VARIANTS)
def test_images_are_small_colour_pictures(variant):
    config = parse(load("images").get_config(variant))
    assert (config.data.name, config.data.image_size, config.train.nfe) == ("images", 32, 1)
    assert config.data.image_size % config.model.own.patch_size == 0


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_rivals_are_compared_on_equal_terms(name):
    """All methods of the table but the simplest, three seeds, 1, 2 and 4 evaluations."""
    rivals = parse(load(name).get_config("rivals")).rivals
    assert all(find_method(method) for method in rivals.methods)
    methods = {method.split("_")[0] for method in rivals.methods}
    known = {"gm", "arc", "meanflow", "shortcut", "consistency", "reflow", "dmd"}
    assert known <= methods
    assert rivals.seeds == (0, 1, 2) and rivals.nfes == (1, 2, 4)


@pytest.mark.parametrize(
    ("variant", "policy", "window", "guidance", "interval", "steps", "time_scale", "nfe"),
    [
        ("gm_repa", 32, 0, 3.2, (0.0, 0.7), 140_000, 1.0, 1),
        ("gm_repa_2nfe", 32, 0, 2.8, (0.0, 0.7), 24_000, 1.0, 2),
        ("gm_repae", 32, 0, 2.4, (0.0, 0.73), 140_000, 1.0, 1),
        ("gm_repae_2nfe", 32, 0, 2.4, (0.0, 0.73), 24_000, 1.0, 2),
        ("gm_fm", 32, 0, 2.7, (0.0, 0.6), 140_000, 1000.0, 1),
        ("dx_repa_10", 10, 10, 3.2, (0.0, 0.7), 40_000, 1.0, 1),
        ("dx_repa_20", 20, 5, 3.2, (0.0, 0.7), 40_000, 1.0, 1),
        ("dx_repa_40", 40, 3, 3.2, (0.0, 0.7), 40_000, 1.0, 1),
    ],
)
def test_imagenet_recipes_are_those_of_the_design(
    variant, policy, window, guidance, interval, steps, time_scale, nfe
):
    """Section 6 of the design."""
    config = parse(load("imagenet").get_config(variant))
    train, model, teacher = config.train, config.model.own, config.teacher
    grid = config.policy.kind == "dx"
    assert (config.policy.num_grid if grid else config.policy.num_components) == policy
    assert (train.window_substeps, train.total_substeps, train.num_states) == (window, 128, 2)
    assert (teacher.guidance_scale, teacher.guidance_interval) == (guidance, interval)
    assert (train.steps, train.batch_size, train.nfe, train.shift) == (steps, 4096, nfe, 1.0)
    repae = variant.startswith("gm_repae")
    patch, sites, channels = (1, 16, 32) if repae else (2, 32, 4)
    assert (model.depth, model.num_heads, model.hidden, model.patch_size) == (28, 16, 1152, patch)
    assert official_data(config).shape == (sites, sites, channels)
    assert _data(config).shape == (sites, sites, channels)  # of --mode=compile
    assert model.time_scale == time_scale
    assert (train.gm_dropout, config.policy.logstd_hidden) == (0.0 if grid else 0.05, 1024)
    optimizer = train.optimizer
    assert (optimizer.kind, optimizer.learning_rate) == ("adamw", 5e-5)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.0)
    assert (optimizer.warmup_steps, optimizer.grad_clip, optimizer.ema_gamma) == (400, 50, 7)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
@pytest.mark.parametrize("variant", ["gm_4nfe", "gm_8nfe", "dx_4nfe", "datafree"])
def test_text_recipes_are_those_of_the_design(name, variant):
    """Section 6 of the design; sizes are those of the released networks (tests/models)."""
    config = parse(load(name).get_config(variant))
    model, train, flux = config.model.own, config.train, name == "flux"
    assert (config.data.name, config.model.network) == ("prompts", name)
    assert (model.hidden, model.num_heads, model.rope_axes) == (3072, 24, (16, 56, 56))
    assert model.depth == (19 if flux else 60) and (not flux or model.single_depth == 38)
    assert (model.lora_rank, model.lora_dropout, model.base_dtype) == (256, 0.05, "bfloat16")
    grid = variant == "dx_4nfe"
    policy = config.policy
    assert (policy.num_grid if grid else policy.num_components) == (10 if grid else 8)
    assert (policy.kind, train.gm_dropout) == (("dx", 0.0) if grid else ("gm", 0.1))
    assert (train.num_states, train.window_substeps, train.total_substeps) == (
        *(4 if flux else 2, 3, 128),
    )
    assert (train.shift, train.final_step_size_scale, train.loss_scale) == (3.2, 0.5, 30.0)
    assert (train.steps, train.mixing_steps) == ((3000, 2000) if flux else (9000, 0))
    assert train.nfe == (8 if variant == "gm_8nfe" else 4)
    assert train.data_free == (variant == "datafree")
    assert config.teacher.guidance_scale == (1.0 if flux else 4.0)
    assert not flux or model.distilled_guidance == 3.5
    optimizer = train.optimizer
    # A data-free batch walks all four segments: as many gradients of 64 samples as of 256.
    assert train.batch_size == (64 if train.data_free else 256)
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1e-4, 100)
    assert (optimizer.beta1, optimizer.beta2, optimizer.ema_gamma) == (0.9, 0.95, 7.0)
    assert config.evaluation.temperature == (1.0 if grid else 0.7 if train.nfe == 8 else 0.3)


FLUX2 = [  # width, heads, blocks, text, guidance of the network and of the teacher
    ("", 6144, 48, 8, 48, 15360, 4.0, 1.0),
    ("klein_4b", 3072, 24, 5, 20, 7680, 0.0, 4.0),
    ("klein_9b", 4096, 32, 8, 24, 12288, 0.0, 4.0),
]


@pytest.mark.parametrize("sizes", FLUX2, ids=lambda sizes: sizes[0] or "dev")
@pytest.mark.parametrize(
    ("recipe", "references"), [("gm_4nfe", 0), ("datafree", 0), ("edit", 4), ("edit_datafree", 4)]
)
def test_flux2_recipes(sizes, recipe, references):
    """Sizes are those of the releases, and what pi-FLUX.2's example says; the rest is FLUX.1's."""
    klein, hidden, heads, depth, single, text, distilled, guidance = sizes
    short = "" if recipe == "gm_4nfe" else f"_{recipe}"
    config = load("flux2").get_config(f"{klein}{short}" if klein else recipe)
    own = config.model.flux2
    assert (own.hidden, own.num_heads, own.depth, own.single_depth) == (
        hidden,
        heads,
        depth,
        single,
    )
    assert own.rope_axes == (32, 32, 32, 32) and own.references == references
    assert own.distilled_guidance == distilled and config.teacher.guidance_scale == guidance
    settings = parse(config)
    data = official_data(settings)
    assert data.shape == (128, 128, 32) and data.text_features == text
    assert (settings.policy.kind, settings.policy.num_components) == ("gm", 8)
    train = settings.train
    assert (train.nfe, train.shift, train.final_step_size_scale) == (4, 3.2, 0.5)
    flux = load("flux").get_config("datafree" if "datafree" in recipe else "gm_4nfe")
    config.teacher.guidance_scale = flux.teacher.guidance_scale
    for group in ("train", "policy", "data", "teacher", "evaluation", "mesh"):
        assert config[group] == flux[group], group
    shared = set(own) & set(flux.model.flux) - {
        *("hidden", "num_heads", "depth", "single_depth", "rope_axes", "references"),
        "distilled_guidance",
    }
    assert all(own[key] == flux.model.flux[key] for key in shared) and len(shared) > 4


EDITING = [("flux", "kontext", 1), ("qwen_image", "edit", 1), ("qwen_image", "edit_2509", 3)]


@pytest.mark.parametrize(("name", "variant", "references"), EDITING)
@pytest.mark.parametrize(("suffix", "plain"), [("", "gm_4nfe"), ("_datafree", "datafree")])
def test_editing_recipes_are_those_of_text(name, variant, references, suffix, plain):
    edit, text = (load(name).get_config(v) for v in (f"{variant}{suffix}", plain))
    assert parse(edit).model.own.references == references
    assert parse(text).model.own.references == 0
    # Nothing differs but what the editors' networks need: references, guidance, longer prompts.
    own = edit.model[name]
    own.references = 0
    if name == "flux":
        assert own.distilled_guidance == 2.5
        own.distilled_guidance = 3.5
    else:
        assert edit.data.text_length >= 1024
        edit.data.text_length = 512
    assert edit == text


@pytest.mark.parametrize(("name", "variant"), [("flux", "kontext"), ("qwen_image", "edit")])
def test_editing_miniatures_are_the_same_program(name, variant):
    small, large = (load(name).get_config(v) for v in (f"{variant}_runlocal", "runlocal"))
    assert parse(small).data.name == "edited_digits" and small.model[name].references == 1
    assert small.train == large.train and small.teacher == large.teacher


def test_the_miniature_of_flux2_is_that_of_kontext():
    small, large = load("flux2").get_config("runlocal"), load("flux").get_config("kontext_runlocal")
    assert parse(small).data.name == "edited_digits" and small.model.flux2.references == 1
    assert small.train == large.train and small.teacher == large.teacher
    assert small.policy == large.policy and small.evaluation == large.evaluation


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_arcflow_recipes_are_those_of_its_code(name):
    """`configs/*/arc*_2nfe_k16.py` of pnotp/ArcFlow."""
    config, flux = parse(load(name).get_config("arc_2nfe")), name == "flux"
    model, train = config.model.own, config.train
    assert (config.policy.kind, config.policy.num_components) == ("arc", 16)
    assert (train.nfe, train.final_step_size_scale, train.shift) == (2, 1.0, 3.2)
    assert (train.num_states, train.window_substeps, train.total_substeps) == (4, 3, 128)
    assert (train.gm_dropout, train.loss_scale, train.data_free) == (0.1, 30.0, True)
    assert (train.steps, train.mixing_steps) == ((10_000, 2000) if flux else (15_000, 1000))
    assert (model.lora_rank, model.lora_dropout) == (256, 0.05)
    assert config.teacher.guidance_scale == (1.0 if flux else 4.0)
    assert (train.optimizer.learning_rate, train.optimizer.growth_rate_scale) == (1e-4, 0.1)


def test_the_polynomial_recipe_differs_from_the_grid_s_in_its_mode_alone():
    """`dxqwen_p10_piid_4step_32gpus.py` of the release, beside `dxqwen_n10`."""
    qwen = load("qwen_image")
    polynomial, grid = (qwen.get_config(v) for v in ("dx_polynomial_4nfe", "dx_4nfe"))
    settings = parse(polynomial)
    assert (settings.policy.mode, settings.policy.num_grid) == ("polynomial", 10)
    train = settings.train
    assert (train.window_substeps, train.num_states, train.steps) == (3, 2, 9000)
    polynomial.policy.mode = "grid"
    assert polynomial == grid
    with pytest.raises(ValueError, match="variants gm_4nfe"):
        load("flux").get_config("dx_polynomial_4nfe")


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_miniatures_are_the_same_program(name):
    small, large = (parse(load(name).get_config(v)) for v in ("runlocal", "datafree"))
    assert small.data.name == "captioned_digits" and small.train.data_free
    for key in ("nfe", "shift", "final_step_size_scale", "window_substeps", "gm_dropout"):
        assert getattr(small.train, key) == getattr(large.train, key)
    assert small.teacher.guidance_scale == large.teacher.guidance_scale
    for key in {"distilled_guidance"} & set(vars(large.model.own)):
        assert getattr(small.model.own, key) == getattr(large.model.own, key)


def test_imagenet_splits_its_state_over_sixteen_devices_at_most():
    config = parse(load("imagenet").get_config(), None)
    sizes = {n: tuple(mesh_sizes(config, n).values()) for n in (1, 8, 16, 64, 1024)}
    assert sizes == {
        1: (1, 1, 1),
        8: (1, 8, 1),
        16: (1, 16, 1),
        64: (4, 16, 1),
        1024: (64, 16, 1),
    }


def test_unknown_variant_is_named():
    with pytest.raises(
        ValueError,
        match="variants gm, quick, dx, gm_2nfe, gm_any_nfe, datafree, guided, "
        "gm_any_guidance, rivals, not 'xd'",
    ):
        load("digits").get_config("xd")
