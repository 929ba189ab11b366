"""GMFlow policy against the reference's vectors, a NumPy posterior, and its own extremes."""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.policies import GMFlowPolicy, GMOutput
from tests import golden_files
from tests.golden_files import mixture_last, sites_last

# Per-component standard deviations are outside the contract (DESIGN section 4).
PI_CASES = [name for name in golden_files.names("gm_pi_") if name != "gm_pi_4.npz"]
F32_OVER_F64 = 2.0**29  # ratio of the two unit roundings


def mixture(a, dtype=np.float64):
    logstd = a["logstds"].reshape(a["logstds"].shape[0], -1)[:, 0]
    return GMOutput(
        means=jnp.asarray(mixture_last(a["means"]), dtype),
        logweights=jnp.asarray(mixture_last(a["logweights"])[..., 0], dtype),
        logstd=jnp.asarray(logstd, dtype),
    )


def make_policy(a, eps, dtype=np.float64):
    return GMFlowPolicy.create(
        mixture(a, dtype),
        jnp.asarray(sites_last(a["x_t_src"]), dtype),
        jnp.asarray(a["sigma_t_src"], dtype),
        eps=eps,
    )


def single_std(name):
    return golden_files.load(name)[1]["logstds"].shape[1] == 1


@pytest.mark.parametrize("name", [n for n in PI_CASES if single_std(n)])
def test_velocity_and_gradients_match_reference(name, x64):
    params, a = golden_files.load(name)
    x_src = jnp.asarray(sites_last(a["x_t_src"]))
    sigma_src = jnp.asarray(a["sigma_t_src"])

    def weighted(output, x, sigma, w):
        policy = GMFlowPolicy.create(output, x_src, sigma_src, eps=params["eps"])
        u = policy.velocity(x, sigma)
        return jnp.sum(u * w), u

    grads = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
    for i in range(a["sigma_t"].shape[0]):
        (_, u), (g, gx) = grads(
            mixture(a), sites_last(a["x_t"][i]), a["sigma_t"][i], sites_last(a["w"][i])
        )
        found = {"u": u, "grad_means": g.means, "grad_logweights": g.logweights}
        found |= {"grad_logstds": g.logstd, "grad_x_t": gx}
        expected = {
            "u": sites_last(a["u"][i]),
            "grad_means": mixture_last(a["grad_means"][i]),
            "grad_logweights": mixture_last(a["grad_logweights"][i])[..., 0],
            "grad_logstds": a["grad_logstds"][i].reshape(-1),
            "grad_x_t": sites_last(a["grad_x_t"][i]),
        }
        if i == 0:
            # The reference's shortcut at the source has no x_t in its x_0; ours has none of it.
            expected.pop("grad_x_t")
        for what, value in expected.items():
            key = "conditioning" + ("" if what == "u" else f"_{what}")
            noise = a[key][i] if i else 0.0
            if i == 0 and what != "u":
                noise = a[key][1]
            if what != "u":
                # The reference forms gradients from (x_t - x_0) / t with x_0 rounded, so they carry
                # absolute noise that input noise does not show: see the decimal test below.
                t = np.maximum(a["sigma_t"][i].min(), params["eps"])
                amplitude = np.abs(a["x_t"][i]).max() * np.abs(a["w"][i]).max()
                noise = max(noise, 2.0**-52 * (10 if what == "grad_x_t" else 1) * amplitude / t)
            scale = np.abs(value).max()
            np.testing.assert_allclose(
                found[what],
                value,
                rtol=0,
                atol=max(1e-9 * scale, 100 * noise, 1e-12),
                err_msg=f"{what}, query {i}: {params['queries'][i]}",
            )


@pytest.mark.parametrize("name", [n for n in PI_CASES if single_std(n)])
def test_float32_velocity_is_as_good_as_its_inputs_allow(name):
    params, a = golden_files.load(name)
    policy = make_policy(a, params["eps"], np.float32)
    velocity = jax.jit(policy.velocity)
    for i in range(a["sigma_t"].shape[0]):
        u = velocity(
            jnp.asarray(sites_last(a["x_t"][i]), jnp.float32),
            jnp.asarray(a["sigma_t"][i], jnp.float32),
        )
        expected = sites_last(a["u"][i])
        assert u.dtype == jnp.float32
        atol = max(2e-4 * np.abs(expected).max(), 2 * F32_OVER_F64 * a["conditioning"][i])
        np.testing.assert_allclose(u, expected, rtol=0, atol=atol, err_msg=params["queries"][i])


@pytest.mark.parametrize("name", golden_files.names("gm_dropout_"))
def test_dropout_matches_reference(name, x64):
    params, a = golden_files.load(name)
    drawn = jnp.asarray(a["uniforms"].reshape(a["uniforms"].shape[:2]) < params["p"])
    policy = make_policy(a, params["eps"]).drop(drawn)
    for i in range(a["sigma_t"].shape[0]):
        u = policy.velocity(sites_last(a["x_t"][i]), a["sigma_t"][i])
        np.testing.assert_allclose(u, sites_last(a["u"][i]), rtol=1e-9, atol=1e-6)


def test_dropping_everything_drops_nothing():
    _, a = golden_files.load("gm_dropout_a_0.npz")
    policy = make_policy(a, 1e-6, np.float32)
    batch, components = policy.logweights.shape[0], policy.logweights.shape[1]
    dropped = policy.drop(jnp.ones((batch, components), bool))
    np.testing.assert_array_equal(dropped.logweights, policy.logweights)
    one_left = policy.drop(jnp.arange(components)[None] != jnp.full((batch, 1), 2))
    assert np.isneginf(one_left.logweights).sum() == one_left.logweights.size * 7 // 8


@pytest.mark.parametrize("name", golden_files.names("gm_temperature_"))
def test_temperature_matches_reference(name, x64):
    params, a = golden_files.load(name)
    plain = make_policy(a, params["eps"])
    sharp = plain.with_temperature(params["temperature"])
    for i in range(a["sigma_t"].shape[0]):
        query = sites_last(a["x_t"][i]), a["sigma_t"][i]
        for policy, key in ((sharp, "u"), (plain, "u_without_temperature")):
            np.testing.assert_allclose(
                policy.velocity(*query), sites_last(a[key][i]), rtol=1e-9, atol=1e-6
            )


def naive(output, x_src, s, x, t):
    """DESIGN 3.1 as printed, in float64 NumPy, for one sample without sites."""
    m = x_src - s * output.means
    v = (np.exp(output.logstd) * s) ** 2
    zeta = ((1 - t) / t) ** 2 - ((1 - s) / s) ** 2
    nu = (1 - t) * x / t**2 - (1 - s) * x_src / s**2
    den = v * zeta + 1
    logits = output.logweights + (m * (nu - zeta * m / 2)).sum(-1) / den
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    return (x - (weights[:, None] * (v * nu + m) / den).sum(0)) / t, weights


def test_points_without_sites_match_the_printed_formula(x64):
    rng = np.random.default_rng(0)
    batch, components, channels = 5, 3, 2
    output = GMOutput(
        rng.normal(size=(batch, components, channels)),
        rng.normal(size=(batch, components)),
        rng.normal(size=batch) - 1,
    )
    x_src, x = rng.normal(size=(2, batch, channels))
    s, t = rng.uniform(0.5, 1, batch), rng.uniform(0.1, 0.5, batch)
    policy = GMFlowPolicy.create(output, x_src, s)
    u, w = policy.velocity(x, t), policy.weights(x, t)
    for b in range(batch):
        one = jax.tree.map(lambda leaf, b=b: leaf[b], output)
        velocity, weights = naive(one, x_src[b], s[b], x[b], t[b])
        np.testing.assert_allclose(u[b], velocity, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(w[b], weights, rtol=1e-11, atol=1e-11)


def test_gradient_below_eps_is_exact(x64):
    """At t = 1e-7 against central differences of the printed formula in 60-digit decimals."""
    _, a = golden_files.load("site_of_gm_pi_0.npz")
    x, w, x_src, s, logstd = (a[k] for k in ("x_t", "w", "x_t_src", "sigma_t_src", "logstd"))
    site = a["means"], a["logweights"]

    def ours(means):
        output = GMOutput(means[None], site[1][None], jnp.asarray(logstd)[None])
        policy = GMFlowPolicy.create(output, x_src[None], s[None])
        return jnp.sum(policy.velocity(x[None], jnp.full((1,), 1e-7)) * w[None])

    gradient = jax.jit(jax.grad(ours))(jnp.asarray(site[0]))
    with decimal.localcontext(prec=60):
        exact = decimal_gradient(site[0], site[1], logstd, x_src, s, x, w, (2, 1))
    np.testing.assert_allclose(gradient[2, 1], exact, rtol=1e-12)
    official = a["grad_means"][2, 1]
    assert abs(official / exact - 1) > 1e-8  # the reason for the wider tolerance above


def decimal_gradient(means, logweights, logstd, x_src, s, x, w, index):
    number = np.vectorize(lambda value: decimal.Decimal(float(value)), otypes=[object])
    means, logweights, x_src, x, w = map(number, (means, logweights, x_src, x, w))
    s, t, one = decimal.Decimal(float(s)), decimal.Decimal("1e-6"), decimal.Decimal(1)
    v = (decimal.Decimal(float(logstd)).exp() * s) ** 2

    def objective(means):
        m = x_src - s * means
        zeta = ((one - t) / t) ** 2 - ((one - s) / s) ** 2
        nu = (one - t) * x / t**2 - (one - s) * x_src / s**2
        den = v * zeta + 1
        logits = logweights + (m * (nu - zeta * m / 2)).sum(-1) / den
        weights = np.array([(logit - max(logits)).exp() for logit in logits], object)
        x0 = (weights[:, None] * (v * nu + m) / den).sum(0) / weights.sum()
        return ((x - x0) / t * w).sum()

    step = decimal.Decimal("1e-20")
    up, down = means.copy(), means.copy()
    up[index] += step
    down[index] -= step
    return float((objective(up) - objective(down)) / (2 * step))


def test_velocity_at_source_is_the_mixture_mean(x64):
    _, a = golden_files.load("gm_pi_2.npz")
    policy = make_policy(a, 1e-6)
    output = mixture(a)
    u = policy.velocity(sites_last(a["x_t_src"]), a["sigma_t_src"])
    weights = np.exp(output.logweights)
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(u, np.einsum("...k,...kc->...c", weights, output.means), rtol=1e-9)
    own = policy.weights(sites_last(a["x_t_src"]), a["sigma_t_src"])
    np.testing.assert_allclose(own, weights, rtol=1e-9)


@pytest.mark.parametrize("logstd", [-12.0, -5.0, 0.0, 3.0])
@pytest.mark.parametrize("dropped", [False, True])
def test_float32_extremes_stay_finite(logstd, dropped):
    """t to 1e-4, logstd -12 to 3, logits +-50, at the source, all but one component dropped."""
    rng = np.random.default_rng(1)
    times = np.array([1.0, 0.999, 0.5, 1e-2, 1e-3, 1e-4], np.float32)
    sources = np.array([1.0, 0.5, 1e-2, 1e-3, 1e-4], np.float32)
    s, t = (grid.reshape(-1) for grid in np.meshgrid(sources, times, indexing="ij"))
    keep = t <= s
    s, t = jnp.asarray(s[keep]), jnp.asarray(t[keep])
    batch, sites, components, channels = len(t), 7, 8, 4
    output = GMOutput(
        jnp.asarray(rng.normal(size=(batch, sites, components, channels)), jnp.float32),
        jnp.asarray(rng.choice([-50.0, 0.0, 50.0], (batch, sites, components)), jnp.float32),
        jnp.full((batch,), logstd, jnp.float32),
    )
    noise = jnp.asarray(rng.normal(size=(2, batch, sites, channels)), jnp.float32)

    def objective(output, x_src, x):
        policy = GMFlowPolicy.create(output, x_src, s)
        if dropped:
            policy = policy.drop(jnp.broadcast_to(jnp.arange(components) != 3, (batch, components)))
        u = policy.velocity(x, t)
        return jnp.sum(jnp.square(u)), u

    x_src = s[:, None, None] * noise[0]
    at_source = (s == t)[:, None, None]
    x = jnp.where(at_source, x_src, t[:, None, None] * noise[1] + (1 - t[:, None, None]) * 0.5)
    (_, u), grads = jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))(
        output, x_src, x
    )
    assert np.all(np.isfinite(u))
    for leaf in jax.tree.leaves(grads):
        assert np.all(np.isfinite(leaf))


def test_policy_is_float32_for_bfloat16_networks():
    output = GMOutput(*(jnp.ones(shape, jnp.bfloat16) for shape in ((2, 3, 4, 1), (2, 3, 4), (2,))))
    x, sigma = jnp.ones((2, 3, 1), jnp.bfloat16), jnp.full((2,), 0.5, jnp.bfloat16)
    policy = GMFlowPolicy.create(output, x, sigma)
    assert policy.velocity(x, sigma).dtype == jnp.float32


def test_mismatched_shapes_are_named():
    output = GMOutput(jnp.ones((2, 3, 4, 1)), jnp.ones((2, 3, 5)), jnp.ones((2,)))
    with pytest.raises(ValueError, match=r"GMOutput.logweights has shape \(2, 3, 5\)"):
        GMFlowPolicy.create(output, jnp.ones((2, 3, 1)), jnp.ones((2,)))
