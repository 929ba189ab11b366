"""Weights of the Inception network in and out, under the names of the published file."""

import hashlib

import jax
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state, to_torch_state
from piflow_jax.convert.inception import INCEPTION_FILE, read_inception
from piflow_jax.models.inception import InceptionV3, convolutions


@pytest.fixture(scope="module")
def state():
    """A random state; the first test says what its names and shapes should be."""
    rng = np.random.default_rng(0)
    state = {"fc.weight": rng.random((1008, 2048), np.float32), "fc.bias": rng.random(1008)}
    for path, width, conv in convolutions():
        name = ".".join(path)
        state[f"{name}.conv.weight"] = rng.random((conv.features, width, *conv.kernel), np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.bn.{part}"] = rng.random(conv.features, np.float32)
    return {name: array.astype(np.float32) for name, array in state.items()}


def test_names_and_shapes_of_the_published_file(state):
    # A sample over all kinds of blocks, as `torchvision` registers them.
    listed = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_3.bn.weight": (96,),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
        "Mixed_7c.branch_pool.bn.running_mean": (192,),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: state[name].shape for name in listed} == listed
    assert len(state) == 94 * 5 + 2


def test_weights_come_back_bit_for_bit(state):
    counters = {"Mixed_7c.branch_pool.bn.num_batches_tracked": np.array(0)}
    module, params = load_torch_state(state | counters, "inception")
    assert isinstance(module, InceptionV3) and module.num_classes == 1008
    back = to_torch_state(module, params)
    assert set(back) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 75, 75, 3), np.uint8))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)


def test_leaves_stand_where_their_names_say(state):
    _, params = load_torch_state(state, "inception")
    conv = params["params"]["Mixed_6b"]["branch7x7_2"]
    kernel = state["Mixed_6b.branch7x7_2.conv.weight"]
    np.testing.assert_array_equal(conv["kernel"][0, 5, 3, 11], kernel[11, 3, 0, 5])
    for ours, official in (("mean", "running_mean"), ("variance", "running_var")):
        np.testing.assert_array_equal(conv[ours], state[f"Mixed_6b.branch7x7_2.bn.{official}"])
    np.testing.assert_array_equal(params["params"]["fc_kernel"][7], state["fc.weight"][:, 7])


def test_what_does_not_fit_is_listed(state):
    wrong = dict(state)
    del wrong["Mixed_5b.branch1x1.bn.bias"]
    wrong["AuxLogits.fc.bias"] = np.zeros(1000)
    wrong["Mixed_7c.branch_pool.conv.weight"] = np.zeros((192, 2048))
    with pytest.raises(ValueError) as error:
        load_torch_state(wrong, "inception")
    for part in ("missing Mixed_5b.branch1x1.bn.bias", "unexpected AuxLogits.fc.bias"):
        assert part in str(error.value)
    assert "Mixed_7c.branch_pool.conv.weight has shape (192, 2048)" in str(error.value)


def test_a_file_is_read_with_its_hash(state, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / INCEPTION_FILE
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    found, digest = read_inception(path)
    module, params = load_torch_state(found, "inception")
    np.testing.assert_array_equal(to_torch_state(module, params)["fc.bias"], state["fc.bias"])
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_missing_file_is_an_error_that_says_where_to_get_it(tmp_path):
    path = tmp_path / INCEPTION_FILE
    with pytest.raises(FileNotFoundError) as error:
        read_inception(path)
    assert str(path) in str(error.value) and "https://github.com/mseitzer/" in str(error.value)
