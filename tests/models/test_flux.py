"""FLUX.1 against recorded evaluations, against `diffusers` block by block, and against itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state
from piflow_jax.flow.policies import DXPolicy, GMFlowPolicy
from piflow_jax.flow.sampling import few_step_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.models import flux
from piflow_jax.models.flux import Flux, flux_angles
from tests.golden_files import load, sites_last
from tests.models.recorded import assert_output, build, cases, random_state, slow

CASES = cases(
    flux_teacher="flux",
    flux_teacher_noguidance="flux",
    gmflux_student="gm_flux",
    dxflux_student="dx_flux",
)
SMALL = dict(
    in_channels=4,
    hidden=32,
    num_heads=2,
    double_depth=2,
    single_depth=3,
    text_features=12,
    pooled_features=10,
    axes_dims_rope=(4, 6, 6),
)
# Compiling is most of the time of these tests.
UNOPTIMISED = {"xla_backend_optimization_level": 0}
apply = jax.jit(
    lambda module, *inputs: module.apply(*inputs),
    static_argnums=0,
    compiler_options=UNOPTIMISED,
)


def inputs_of(arrays, dtype, x="x"):
    names = ("t", "encoder_hidden_states", "pooled_projections", "guidance")
    named = [arrays[name] for name in names if name in arrays]
    return [jnp.asarray(a, dtype) for a in (sites_last(arrays[x]), *named)]


def small_inputs(batch=2, height=6, width=4):
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (batch, height, width, 4)),
        jnp.linspace(0.2, 1.0, batch),
        jax.random.normal(keys[1], (batch, 5, 12)),
        jax.random.normal(keys[2], (batch, 10)),
        jnp.linspace(1.0, 3.5, batch),
    )


def small_params(module, scale=0.3):
    draw = np.random.default_rng(0).normal
    shapes = jax.eval_shape(module.init, jax.random.key(1), *module.example())
    return jax.tree.map(lambda a: jnp.asarray(draw(size=a.shape, scale=scale), a.dtype), shapes)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_networks_match_the_recordings(name, kind):
    module, variables, arrays = build(name, kind, np.float32)
    output = apply(module, variables, *inputs_of(arrays, np.float32))
    assert_output(output, arrays, "_float32", 1e-5)


@pytest.mark.parametrize(("name", "kind"), [CASES[0], *map(slow, CASES[1:])])
def test_networks_match_the_recordings_in_float64(x64, name, kind):
    # The reference's own tables and sinusoids are float32 in its float64 run.
    module, variables, arrays = build(name, kind, np.float64)
    output = apply(module, variables, *inputs_of(arrays, np.float64))
    assert_output(output, arrays, "", 1e-5)


SAMPLES = cases(sampler_gmflux_nfe4="gm_flux", sampler_dxflux_nfe4="dx_flux")


@pytest.mark.parametrize(("name", "kind"), [SAMPLES[0], slow(SAMPLES[1])])
def test_samples_match_the_recordings(name, kind):
    sizes, arrays = load(name)
    weights = sizes["weights"].split()[-1]
    module, variables, _ = build(weights, kind, np.float32)
    noise, text, pooled, guidance = (
        jnp.asarray(arrays[n])
        for n in ("noise", "encoder_hidden_states", "pooled_projections", "guidance")
    )

    def policy(x, sigma):
        output = module.apply(variables, x, sigma, text, pooled, guidance)
        if kind == "gm_flux":
            return GMFlowPolicy.create(output, x, sigma, eps=1e-4)
        return DXPolicy.create(output, x, sigma, **sizes["policy_kwargs"], eps=1e-4)

    config = sizes["test_cfg"]
    x = jax.jit(
        lambda noise: few_step_sample(
            policy,
            noise,
            config["nfe"],
            TimeWarp(sizes["shift"]),
            total_substeps=config["total_substeps"],
            final_step_size_scale=config["final_step_size_scale"],
            temperature=config["temperature"] if kind == "gm_flux" else 1.0,
        )
    )(sites_last(noise))
    expected = sites_last(arrays["latents"])
    np.testing.assert_allclose(x, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def exact_rotation(x, table, sequence_dim):
    """The rotation of `diffusers` in the precision of `x`; its own is float32."""
    import torch

    assert sequence_dim == 1
    cos, sin = (one.to(x.dtype)[None, :, None] for one in table)
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(3) * sin


@pytest.mark.parametrize("guidance", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_block_is_that_of_diffusers(monkeypatch, guidance):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models import embeddings
    from diffusers.models.transformers import transformer_flux

    peer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    ).double()
    state = random_state(peer)
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", exact_rotation)

    def their_features(t):
        features = embeddings.get_timestep_embedding(
            torch.from_numpy(np.array(t)), 256, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return jnp.asarray(features.numpy())

    # Frequencies are float32 on both sides, but an exponential differs in its last bit.
    monkeypatch.setattr(flux, "time_features", their_features)
    theirs = {"double_blocks": [], "single_blocks": []}
    for blocks, into in (("transformer_blocks", "double"), ("single_transformer_blocks", "single")):
        for block in getattr(peer, blocks):
            # Both return (text, image).
            block.register_forward_hook(
                lambda _, __, out, into=into: theirs[f"{into}_blocks"].append(
                    torch.cat(out, dim=1).numpy()
                )
            )
    draw = np.random.default_rng(1).normal
    x, text, pooled = draw(size=(2, 4, 10, 4)), draw(size=(2, 3, 12)), draw(size=(2, 10))
    t, scales = np.array([0.3, 0.9]), np.array([3.5, 1.25])
    patches = x.reshape(2, 2, 2, 5, 2, 4).transpose(0, 1, 3, 5, 2, 4).reshape(2, 10, 16)
    rows, columns = np.meshgrid(np.arange(2.0), np.arange(5.0), indexing="ij")
    ids = np.stack([0 * rows, rows, columns], axis=-1).reshape(10, 3)
    with torch.no_grad():
        given = [torch.from_numpy(a) for a in (patches, text, pooled, t, ids, np.zeros((3, 3)))]
        (out,) = peer(*given, torch.from_numpy(scales) if guidance else None, return_dict=False)
    out = out.numpy().reshape(2, 2, 5, 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(x.shape)

    with jax.enable_x64(True):
        module, variables = load_torch_state(state, "flux", axes_dims_rope=(4, 6, 6))
        inputs = [jnp.asarray(a) for a in (x, t, text, pooled, *([scales] if guidance else []))]
        ours, seen = module.apply(variables, *inputs, mutable=["intermediates"])
    double, single = (seen["intermediates"][f"{one}_blocks"] for one in ("double", "single"))
    for i, tokens in enumerate(theirs["double_blocks"]):
        stream = np.concatenate([double["text"][0][i], double["image"][0][i]], axis=1)
        np.testing.assert_allclose(stream, tokens, rtol=1e-9, atol=1e-9)
    for i, tokens in enumerate(theirs["single_blocks"]):
        np.testing.assert_allclose(single["tokens"][0][i], tokens, rtol=1e-9, atol=1e-9)
    assert len(theirs["double_blocks"]) == 2 and len(theirs["single_blocks"]) == 3
    np.testing.assert_allclose(ours, out, rtol=1e-9, atol=1e-9)


def test_number_of_parameters():
    module = Flux()
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    # The size of the released FLUX.1 [dev] transformer.
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(shapes)) == 11_901_408_320


def test_remat_and_unrolling_reach_the_scans():
    module = Flux(**SMALL)

    def program(**settings):
        shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())
        return str(jax.make_jaxpr(module.clone(**settings).apply)(shapes, *small_inputs()))

    layers = program().count("remat")  # products whose kernels are put in order, see `in_place`
    assert program(remat="full").count("remat") == layers + 2  # one per scan
    assert program(scan_unroll=2).count("unroll=2") == 2


@pytest.mark.slow
def test_remat_and_unrolling_change_nothing():
    module = Flux(**SMALL)
    params, inputs = small_params(module), small_inputs()

    def gradient(module):
        def loss(layers):
            merged = {"params": params["params"] | layers}
            return (module.apply(merged, *inputs) ** 2).sum()

        layers = {name: params["params"][name] for name in ("time_in", "double_blocks")}
        return jax.jit(jax.value_and_grad(loss), compiler_options=UNOPTIMISED)(layers)

    value, plain = gradient(module)
    assert value > 1
    again, other = gradient(module.clone(remat="full", scan_unroll=2))
    np.testing.assert_allclose(again, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(a).max())


def test_bfloat16_is_close_and_leaves_in_float32():
    module = Flux(**SMALL)
    params, inputs = small_params(module, scale=0.15), small_inputs()
    exact = apply(module, params, *inputs)
    half = apply(module.clone(dtype=jnp.bfloat16), params, *inputs)
    assert half.dtype == jnp.float32
    error = np.abs(half - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.1
    # The trained layers are float32 even where the base is not.
    shapes = jax.eval_shape(
        module.clone(param_dtype=jnp.bfloat16).init, jax.random.key(0), *module.example()
    )["params"]
    assert shapes["double_blocks"]["image_qkv"]["kernel"].dtype == jnp.bfloat16
    assert shapes["head"]["output"]["kernel"].dtype == jnp.float32
    assert shapes["final_modulation"]["kernel"].dtype == jnp.float32


def test_times_of_the_released_pipelines():
    module = Flux(**SMALL, time_dtype=jnp.bfloat16)
    params = small_params(module)
    x, _, text, pooled, _ = small_inputs()

    def at(module, t, guidance):
        scales = jnp.full(2, guidance)
        return apply(module, params, x, jnp.full(2, t), text, pooled, scales)

    # 0.9 is 0.8984375 in bfloat16, and both 898.4375 and 900 are 900 there; 3501 is 3504.
    exact = at(module.clone(time_dtype=jnp.float32), 0.9, 3.504)
    np.testing.assert_allclose(at(module, 0.9, 3.5), exact, atol=1e-4 * np.abs(exact).max())
    other = at(module.clone(time_dtype=jnp.float32), 0.9, 3.5)
    assert np.abs(other - exact).max() > 1e-2 * np.abs(exact).max()


def test_activations_are_pinned_where_they_are_large():
    seen = []

    def constrain(x, axes):
        assert x.ndim == len(axes)
        seen.append((x.shape[1:], tuple(axes)))
        return x

    module = Flux(**SMALL, constrain=constrain)
    jax.eval_shape(module.init, jax.random.key(0), *small_inputs())
    kinds = {axes for _, axes in seen}
    assert kinds == {
        ("batch", None, "embed"),
        ("batch", None, "mlp"),
        ("batch", None, None, "heads"),
        ("batch", None, None, "mlp"),
    }


def test_positions():
    angles = flux_angles((4, 6, 6), 2, 2, 3)
    assert angles.shape == (8, 8)
    assert not angles[:3].any()  # text and the first patch
    # The last patch is at row 1, column 2; each axis starts with the frequency 1.
    np.testing.assert_allclose(angles[-1, [0, 2, 5]], [0, 1, 2])
    np.testing.assert_allclose(angles[-1, 4], 10000 ** (-4 / 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remat": "some"}, "remat 'some'"),
        ({"axes_dims_rope": (4, 6, 8)}, "axes_dims_rope"),
        ({"guidance_embed": False}, "guidance_embed is False"),
        ({"in_channels": 3}, r"x must be \[B, H, W, 3\]"),
        ({"text_features": 8}, r"text must be \[2, L, 8\]"),
        ({"pooled_features": 8}, r"pooled must be \[2, 8\]"),
        ({"patch_size": 5}, "patches of 5"),
    ],
)
def test_misfits_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Flux(**SMALL | change).init, jax.random.key(0), *small_inputs())
