"""Recorded FLUX.1 and Qwen-Image networks of the reference, in our layout, for the tests beside it.

Most of these files are beside the repository only (they are 3.5 MB); the tests that need one are
left out where there is none.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state
from piflow_jax.flow.policies import GMOutput
from tests.golden_files import load, mixture_last, names, sites_last


def cases(**kinds):
    """Parameters `(file, kind)` of a test; those without a file are skipped."""
    have = set(names(""))
    absent = pytest.mark.skipif(True, reason="kept beside the repository only")
    return [
        pytest.param(f"{name}.npz", kind, marks=[] if f"{name}.npz" in have else [absent])
        for name, kind in kinds.items()
    ]


def slow(case):
    """The same case, for `-m slow` only."""
    return pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow])


def build(name, kind, dtype):
    """Module, variables and arrays of a file."""
    sizes, arrays = load(name)
    weights = load(sizes["weights"].split()[-1])[1] if "weights" in sizes else arrays
    state = {n[3:]: a.astype(dtype) for n, a in weights.items() if n.startswith("sd/")}
    module, variables = load_torch_state(state, kind, axes_dims_rope=sizes["axes_dims_rope"])
    return module, variables, arrays


def assert_output(output, arrays, suffix, atol):
    """Compares what a network made to what was recorded."""
    if isinstance(output, GMOutput):
        pairs = [
            (output.means, mixture_last(arrays[f"means{suffix}"])),
            (output.logweights, mixture_last(arrays[f"logweights{suffix}"])[..., 0]),
            (output.logstd, arrays[f"logstds{suffix}"].reshape(-1)),
        ]
    else:
        recorded = arrays[f"out{suffix}"]
        layout = sites_last if recorded.ndim == 4 else mixture_last
        pairs = [(output, layout(recorded))]
    for ours, theirs in pairs:
        assert ours.dtype == (jnp.float32 if suffix else jnp.float64)
        assert np.abs(theirs).max() > 0.05
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol * np.abs(theirs).max())


def assert_bit_equal(actual, expected):
    """Two states have the same names, dtypes, shapes and bits."""
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def random_state(peer, seed=0):
    """Random weights for a PyTorch module, in place, and their state as numpy arrays.

    Fresh parameters of transformers hide faults: their modulations and biases are mostly zero.
    """
    import torch

    draw = np.random.default_rng(seed).normal
    with torch.no_grad():
        for name, value in peer.named_parameters():
            spread = 0.1 if value.ndim == 1 else 0.7 / np.sqrt(value.shape[1])
            new = draw(scale=spread, size=tuple(value.shape)) + float(".norm_" in name)
            value.copy_(torch.from_numpy(new))
    return {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
