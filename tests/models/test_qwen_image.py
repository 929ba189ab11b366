"""Qwen-Image against recorded evaluations, against `diffusers` block by block, and its masking."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state
from piflow_jax.flow.policies import GMFlowPolicy
from piflow_jax.flow.sampling import few_step_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.models import qwen_image
from piflow_jax.models.qwen_image import QwenImage, qwen_angles
from tests.golden_files import load, sites_last
from tests.models.recorded import assert_output, build, cases, random_state, slow

CASES = cases(
    qwen_teacher="qwen_image",
    gmqwen_student="gm_qwen_image",
    dxqwen_student_grid="dx_qwen_image",
    dxqwen_student_polynomial="dx_qwen_image",
)
SMALL = dict(
    in_channels=4, hidden=32, num_heads=2, depth=3, text_features=12, axes_dims_rope=(4, 6, 6)
)
# Compiling is most of the time of these tests.
apply = jax.jit(
    lambda module, *inputs: module.apply(*inputs),
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0},
)


def inputs_of(arrays, dtype):
    named = [sites_last(arrays["x"]), arrays["t"], arrays["encoder_hidden_states"]]
    return [jnp.asarray(a, dtype) for a in named]


def small_inputs(batch=2):
    draw = np.random.default_rng(3).normal
    x, text = draw(size=(batch, 6, 4, 4)), draw(size=(batch, 5, 12))
    return [jnp.asarray(a, jnp.float32) for a in (x, np.linspace(0.2, 1, batch), text)]


def small_params(module):
    draw = np.random.default_rng(0).normal
    shapes = jax.eval_shape(module.init, jax.random.key(1), *module.example())
    return jax.tree.map(lambda a: jnp.asarray(draw(size=a.shape, scale=0.3), a.dtype), shapes)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_networks_match_the_recordings(name, kind):
    module, variables, arrays = build(name, kind, np.float32)
    mask = jnp.asarray(arrays["encoder_hidden_states_mask"])
    assert mask.all()
    output = apply(module, variables, *inputs_of(arrays, np.float32), mask)
    assert_output(output, arrays, "_float32", 1e-5)


@pytest.mark.parametrize(("name", "kind"), [CASES[0], *map(slow, CASES[1:])])
def test_networks_match_the_recordings_in_float64(x64, name, kind):
    # The reference's own tables and sinusoids are float32 in its float64 run.
    module, variables, arrays = build(name, kind, np.float64)
    output = apply(module, variables, *inputs_of(arrays, np.float64))
    assert_output(output, arrays, "", 1e-5)


@pytest.mark.parametrize(("name", "kind"), cases(qwen_teacher_ragged_mask="qwen_image"))
def test_padded_text_is_masked_unlike_in_the_recording(name, kind):
    module, variables, arrays = build(name, kind, np.float32)
    x, t, text = inputs_of(arrays, np.float32)
    mask = arrays["encoder_hidden_states_mask"]
    longest = mask.sum(1).max()
    shorter = mask.sum(1) < longest
    assert shorter.any() and not shorter.all()
    # Recorded with diffusers 0.36: text is cut to the batch's longest prompt, the rest is seen.
    unmasked = apply(module, variables, x, t, text[:, :longest])
    assert_output(unmasked, arrays, "_float32", 1e-5)
    masked = apply(module, variables, x, t, text, jnp.asarray(mask))
    change = np.abs(masked - unmasked).max((1, 2, 3))
    assert (change[~shorter] < 1e-5).all() and (change[shorter] > 1e-2).all()


def test_padding_is_never_seen():
    module = QwenImage(**SMALL)
    params, (x, t, text) = small_params(module), small_inputs()
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    out = apply(module, params, x, t, text, mask)
    other = apply(module, params, x, t, text.at[0, 3:].set(50.0), mask)
    np.testing.assert_array_equal(out, other)
    # It is the image that the prompt has alone, at its own length.
    alone = apply(module, params, x[:1], t[:1], text[:1, :3])
    np.testing.assert_allclose(out[:1], alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    everything = apply(module, params, x, t, text)
    assert np.abs(everything[0] - out[0]).max() > 1e-2 * np.abs(out).max()


@pytest.mark.parametrize(("name", "kind"), cases(sampler_gmqwen_nfe4="gm_qwen_image"))
def test_samples_match_the_recordings(name, kind):
    sizes, arrays = load(name)
    module, variables, _ = build(sizes["weights"].split()[-1], kind, np.float32)
    noise, text, mask = (
        jnp.asarray(arrays[n])
        for n in ("noise", "encoder_hidden_states", "encoder_hidden_states_mask")
    )
    config = sizes["test_cfg"]
    sample = jax.jit(
        lambda noise: few_step_sample(
            lambda x, sigma: GMFlowPolicy.create(
                module.apply(variables, x, sigma, text, mask), x, sigma, eps=1e-4
            ),
            noise,
            config["nfe"],
            TimeWarp(sizes["shift"]),
            total_substeps=config["total_substeps"],
            final_step_size_scale=config["final_step_size_scale"],
            temperature=config["temperature"],
        )
    )
    expected = sites_last(arrays["latents"])
    x = sample(sites_last(noise))
    np.testing.assert_allclose(x, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_every_block_is_that_of_diffusers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    state = random_state(peer)
    theirs = []
    for block in peer.transformer_blocks:
        block.register_forward_hook(lambda _, __, out: theirs.append([a.numpy() for a in out]))
    draw = np.random.default_rng(1).normal
    # An odd number of rows and another one of columns: the positions are not symmetric.
    x, text = draw(size=(2, 6, 10, 4)), draw(size=(2, 4, 12))
    t, mask = np.array([0.3, 0.9]), np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    patches = x.reshape(2, 3, 2, 5, 2, 4).transpose(0, 1, 3, 5, 2, 4).reshape(2, 15, 16)
    given = [torch.from_numpy(a).float() for a in (patches, text)]
    given += [torch.from_numpy(mask), torch.from_numpy(t).float()]
    with torch.no_grad():
        (out,) = peer(*given, img_shapes=[[(1, 3, 5)]] * 2, return_dict=False)
    out = out.numpy().reshape(2, 3, 5, 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(x.shape)

    module, variables = load_torch_state(state, "qwen_image", axes_dims_rope=(4, 6, 6))
    inputs = [jnp.asarray(a, jnp.float32) for a in (x, t, text)]
    ours, seen = module.apply(variables, *inputs, jnp.asarray(mask), mutable=["intermediates"])
    seen = seen["intermediates"]["joint_blocks"]
    assert len(theirs) == 3

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())

    for i, (tokens, image) in enumerate(theirs):
        close(seen["image"][0][i], image)
        close(seen["text"][0][i][mask > 0], tokens[mask > 0])
    close(ours, out)


def test_number_of_parameters():
    module = QwenImage()
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    # The size of the released Qwen-Image transformer.
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(shapes)) == 20_430_401_088


def test_times_of_the_released_pipelines(monkeypatch):
    module = QwenImage(**SMALL, time_dtype=jnp.bfloat16)
    params, (x, _, text) = small_params(module), small_inputs()
    seen = []
    monkeypatch.setattr(
        qwen_image,
        "time_features",
        lambda t, **options: seen.append((t, options)) or jnp.zeros((2, 256)),
    )
    module.apply(params, x, jnp.full(2, 0.9), text)
    ((t, options),) = seen
    np.testing.assert_array_equal(t, 0.8984375)
    assert options == {"scale": 1000.0}  # the frequencies stay float32


def test_positions():
    angles = qwen_angles((4, 6, 6), 2, 3, 4)
    assert angles.shape == (14, 8) and angles.dtype == np.float32
    # Each axis starts with the frequency 1: frame, row, column.
    np.testing.assert_array_equal(angles[2, [0, 2, 5]], [0, -2, -2])
    np.testing.assert_array_equal(angles[-1, [0, 2, 5]], [0, 0, 1])
    np.testing.assert_array_equal(angles[:2, [0, 2, 5]], [[2, 2, 2], [3, 3, 3]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remat": "some"}, "remat 'some'"),
        ({"axes_dims_rope": (3, 7, 6)}, "axes_dims_rope"),
        ({"in_channels": 3}, r"x must be \[B, H, W, 3\]"),
        ({"text_features": 8}, r"text must be \[2, L, 8\]"),
        ({"patch_size": 5}, "patches of 5"),
    ],
)
def test_misfits_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(QwenImage(**SMALL | change).init, jax.random.key(0), *small_inputs())


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"mask \(2, 4\)"):
        jax.eval_shape(
            QwenImage(**SMALL).init, jax.random.key(0), *small_inputs(), jnp.ones((2, 4), bool)
        )
