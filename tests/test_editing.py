"""Editing by reference images: latents of the pipelines of `diffusers`, guidance, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.config import ConfigError, base_config, parse
from piflow_jax.convert import load_params, open_autoencoder
from piflow_jax.models.vae import picture_encoder
from piflow_jax.student import Student
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.networks import student_network, teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import StudentSettings
from tests import tiny_text
from tests.models.recorded import random_state
from tests.models.test_references import drawn, unpacked

STEPS, SHIFT = 3, 3.2
PEERS = dict(
    in_channels=64,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    axes_dims_rope=(4, 6, 6),
)


def settings(network, references, guidance=1.0, **own_settings):
    """A network of two heads of 16, whose student is its teacher: one x_0, by Euler's method."""
    config = tiny_text.get_config(network)
    own = config.model[network]
    own.hidden, own.num_heads, own.depth = 32, 2, 2
    own.rope_axes = (4,) * 4 if len(own.rope_axes) == 4 else (4, 6, 6)
    own.references = references
    own.update(own_settings)
    config.policy.kind, config.policy.num_grid, config.train.gm_dropout = "dx", 1, 0.0
    config.train.nfe, config.train.final_step_size_scale = STEPS, 1.0
    config.teacher.guidance_scale = guidance
    return parse(config)


def data_of(network, channels=16):
    return DataShape(
        name="prompts",
        channels=channels,
        text_features=12,
        pooled_features=10 if network == "flux" else 0,
    )


def student_of(network, state, references, **own_settings):
    """The student that starts at a teacher of official weights."""
    config, data = settings(network, references, **own_settings), data_of(network)
    teacher = teacher_network(config.model, data)
    base = load_params(teacher.module, state, network)
    student = student_network(config.model, config.policy, data)
    trained = student.start(jax.random.key(0), teacher, base)
    return Student(student, student.with_base(trained, base), StudentSettings.of(config, data))


def scheduler():
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def written(folder, peer):
    """An autoencoder of `diffusers` with random weights, and ours of the same file."""
    import torch

    torch.manual_seed(0)
    for name, parameter in peer.named_parameters():
        if parameter[0].numel() > 1:  # an image's details shall reach its latents
            torch.nn.init.normal_(parameter, 0, 1.5 / parameter[0].numel() ** 0.5)
        elif not name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1, 0.2)
    peer.eval().save_pretrained(folder)
    return open_autoencoder(folder)


def pictures(*sizes):
    from PIL import Image

    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in sizes]
    return drawn, [Image.fromarray(pixels) for pixels in drawn]


def close(ours, theirs):
    ours = np.asarray(ours)
    assert ours.std() > 0.3  # there is something to compare
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_latents_are_those_of_the_pipeline_of_kontext(tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    sizes = {"num_layers": 2, "num_single_layers": 1, "pooled_projection_dim": 10}
    peer = diffusers.FluxTransformer2DModel(**PEERS | sizes, guidance_embeds=True)
    state = random_state(peer)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=16,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    encode = picture_encoder(*written(tmp_path, vae))
    pipeline = diffusers.FluxKontextPipeline(
        scheduler=scheduler(),
        vae=vae,
        transformer=peer,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    text, pooled, noise = drawn(1, 5, 12), drawn(1, 10), drawn(1, 8, 8, 16)
    [pixels], [picture] = pictures((48, 112))
    packed = noise.reshape(1, 4, 2, 4, 2, 16).transpose(0, 1, 3, 5, 2, 4).reshape(1, 16, 64)
    out = pipeline(
        image=picture,
        prompt_embeds=torch.from_numpy(text),
        pooled_prompt_embeds=torch.from_numpy(pooled),
        latents=torch.from_numpy(packed),
        height=64,
        width=64,
        max_area=64 * 64,
        guidance_scale=2.5,
        num_inference_steps=STEPS,
        output_type="latent",
        _auto_resize=False,
    ).images
    student = student_of("flux", state, references=1)
    told = {"text": text, "text_length": np.int32([5]), "pooled": pooled, "guidance": 2.5}
    reference = encode(pixels[None] / np.float32(127.5) - 1)
    options = {"size": (8, 8), "noise": noise, "solver": "euler"}
    latents = student.sample(0, told, references=[reference], **options)
    close(latents, unpacked(out, 8, 8))
    # The reference is read, and one that is in the condition is the same.
    within = told | {"references": [reference[0]]}
    np.testing.assert_array_equal(student.sample(0, within, **options), latents)
    assert np.abs(student.sample(0, told, **options) - latents).max() > 0.1


def test_latents_are_those_of_the_pipeline_of_qwen_image_edit(tmp_path, monkeypatch):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    peer = diffusers.QwenImageTransformer2DModel(**PEERS, out_channels=16, num_layers=2)
    state = random_state(peer)
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    encode = picture_encoder(*written(tmp_path, vae))
    pipeline = diffusers.QwenImageEditPlusPipeline(
        scheduler=scheduler(),
        vae=vae,
        transformer=peer,
        text_encoder=None,
        tokenizer=None,
        processor=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, name, 64 * 64)
    text, noise = drawn(1, 5, 12), drawn(1, 6, 10, 16)
    pixels, images = pictures((64, 64), (32, 128))
    packed = noise.reshape(1, 3, 2, 5, 2, 16).transpose(0, 1, 3, 5, 2, 4).reshape(1, 15, 64)
    out = pipeline(
        image=images,
        prompt_embeds=torch.from_numpy(text),
        prompt_embeds_mask=torch.ones(1, 5, dtype=torch.int64),
        latents=torch.from_numpy(packed),
        height=48,
        width=80,
        num_inference_steps=STEPS,
        true_cfg_scale=1.0,
        output_type="latent",
    ).images
    student = student_of("qwen_image", state, references=2)
    references = [encode(one[None] / np.float32(127.5) - 1) for one in pixels]
    told = {"text": text, "text_length": np.int32([5])}
    options = {"size": (6, 10), "noise": noise, "solver": "euler"}
    latents = student.sample(0, told, references=references, **options)
    close(latents, unpacked(out, 6, 10))
    turned = student.sample(0, told, references=references[::-1], **options)
    assert np.abs(turned - latents).max() > 5e-3
    assert np.abs(student.sample(0, told, **options) - latents).max() > 0.1


@pytest.mark.parametrize("klein", [False, True], ids=["dev", "klein"])
def test_latents_are_those_of_the_pipelines_of_flux2(klein, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    sizes = PEERS | {"num_layers": 2, "num_single_layers": 1, "axes_dims_rope": (4,) * 4}
    peer = diffusers.Flux2Transformer2DModel(**sizes, guidance_embeds=not klein)
    state = random_state(peer)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,) * 4, norm_num_groups=4, layers_per_block=1, latent_channels=16
    )
    torch.manual_seed(1)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    module, params = written(tmp_path, vae)
    encode = picture_encoder(module, params)
    kind = diffusers.Flux2KleinPipeline if klein else diffusers.Flux2Pipeline
    parts = {"vae": vae, "transformer": peer, "text_encoder": None, "tokenizer": None}
    pipeline = kind(scheduler=scheduler(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    text, noise = drawn(1, 5, 12), drawn(1, 6, 10, 16)
    pixels, images = pictures((64, 64), (70, 120))
    patches = noise.reshape(1, 3, 2, 5, 2, 16).transpose(0, 5, 2, 4, 1, 3).reshape(1, 64, 3, 5)

    def theirs(images):
        out = pipeline(
            image=images or None,
            prompt_embeds=torch.from_numpy(text),
            latents=torch.from_numpy(patches),
            height=48,
            width=80,
            guidance_scale=1.0 if klein else 4.0,
            num_inference_steps=STEPS,
            output_type="latent",
        ).images
        # Those of [klein] are ready to be decoded.
        return module.scaled(out.permute(0, 2, 3, 1).numpy()) if klein else unpacked(out, 6, 10)

    student = student_of("flux2", state, 2, distilled_guidance=0.0 if klein else 4.0)
    # The second picture is cut at its centre to multiples of 16.
    seen = [pixels[0], pixels[1][3:67, 4:116]]
    references = [encode(one[None] / np.float32(127.5) - 1) for one in seen]
    told = {"text": text, "text_length": np.int32([5])}
    options = {"size": (6, 10), "noise": noise, "solver": "euler"}
    latents = student.sample(0, told, references=references, **options)
    close(latents, theirs(images))
    close(student.sample(0, told, **options), theirs([]))
    close(student.sample(0, told, references=references[1:], **options), theirs(images[1:]))
    turned = student.sample(0, told, references=references[::-1], **options)
    assert np.abs(turned - latents).max() > 5e-3


@pytest.fixture(scope="module")
def qwen():
    """An editing network of one channel, its weights, and conditions of two samples."""
    config = settings("qwen_image", references=2, guidance=3.0)
    data = data_of("qwen_image", channels=1)
    network = teacher_network(config.model, data)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(
        lambda a: jnp.asarray(0.3 * drawn(*a.shape) if a.shape else drawn(1)[0]), shapes
    )
    condition = {
        "text": drawn(2, 4, 12),
        "text_length": np.int32([4, 2]),
        "references": (drawn(2, 2, 6, 1), drawn(2, 4, 4, 1)),
    }
    return config, data, network, params, condition


@pytest.mark.parametrize("own", [False, True])
def test_guidance_leaves_the_references_and_takes_the_prompt(qwen, own):
    config, data, network, params, condition = qwen
    empty = {"text": drawn(4, 12, seed=7), "text_length": np.int32(1)}
    x, t = drawn(2, 4, 2, 1), np.float32([0.4, 0.8])
    nothing = {"text": np.stack([empty["text"]] * 2), "text_length": np.int32([1, 1])}
    if own:  # a text encoder that sees pictures has another empty prompt for each
        nothing = {"text": drawn(2, 4, 12, seed=8), "text_length": np.int32([2, 3])}
        condition = condition | {"null": nothing}
    teacher = Systems.of(config, data, empty).teacher
    u, without = (
        jax.jit(network.apply)(params, x, t, one) for one in (condition, condition | nothing)
    )
    expected = u + (config.teacher.guidance_scale - 1) * (u - without)
    assert np.abs(u - without).max() > 0.1
    found = jax.jit(teacher.velocity)(params, x, t, condition)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_references_that_a_student_does_not_take_are_named(qwen):
    config, data, network, params, condition = qwen
    student = Student(network, params, StudentSettings.of(config, data))
    plain = dataclasses.replace(network.conditioning, references=0)
    plain = Student(
        dataclasses.replace(network, conditioning=plain), params, StudentSettings.of(config, data)
    )
    first, second = condition["references"]
    for one, references, message in (
        (student, [first] * 3, "at most 2 reference images, got 3"),
        (plain, [first], "at most 0 reference images, got 1"),
        (student, first, "references must be a list of arrays, .* got ndarray"),
        (
            student,
            [first, first[:1]],
            r"references\[1\] must be \[2, h, w, 1\].*got \[1, 2, 6, 1\]",
        ),
        (student, [np.zeros((4, 4, 3))], r"references\[0\] must be .* got \[4, 4, 3\]"),
        (student, [np.zeros((4, 4, 1), np.uint8)], r"references\[0\] .* got uint8"),
        (student, [second * np.nan], r"references\[0\] .*finite"),
    ):
        with pytest.raises(ValueError, match=message):
            one.sample(0, condition, references=references, size=(4, 4))
    with pytest.raises(ValueError, match=r"references\[0\] \(.*not divisible into patches of 2"):
        student.sample(0, condition, references=[second[:, :3]], size=(4, 4))
    more = dataclasses.replace(data, references=3)
    with pytest.raises(ConfigError, match=r"qwen_image\.references is 2, .* up to 3 reference"):
        Systems.of(config, more, None)


def test_older_networks_have_no_references():
    from piflow_jax.systems.spec import teacher_settings, teacher_spec

    config = parse(tiny_text.get_config("flux"))
    spec = teacher_spec(config, data_of("flux"))
    assert spec.pop("model.references") == 0
    assert teacher_settings(spec)[0].own.references == 0
    assert base_config().model.qwen_image.references == 0
