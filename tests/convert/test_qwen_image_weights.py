"""Official names and layouts of Qwen-Image and its students, in and out."""

import jax
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state, to_torch_state
from piflow_jax.models.heads import GMHead
from piflow_jax.models.qwen_image import QwenImage
from tests.models.recorded import assert_bit_equal, random_state

D = 32
ROPE = {"axes_dims_rope": (4, 6, 6)}


def official_state(outputs):
    """A random state as the release lays it out, with the given output layers."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    state = random_state(
        diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
        )
    )
    del state["proj_out.weight"], state["proj_out.bias"]
    draw = np.random.default_rng(1).normal
    for name, shape in outputs.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(size=shape), draw(size=shape[0])
    return {name: np.asarray(array, np.float32) for name, array in state.items()}


GM = {
    "proj_out_means": (48, D),
    "proj_out_logweights": (12, D),
    "proj_out_logstds.1": (7, D),
    "proj_out_logstds.3": (1, 7),
}


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        ("qwen_image", {"proj_out": (16, D)}),
        ("gm_qwen_image", GM),
        ("dx_qwen_image", {"proj_out": (80, D)}),
    ],
)
def test_round_trip_is_bit_exact(kind, outputs):
    state = official_state(outputs)
    module, params = load_torch_state(state, kind, **ROPE)
    assert_bit_equal(to_torch_state(module, params), state)
    # The module is the one whose fresh parameters have these shapes.
    fresh = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, fresh)


def test_sizes_are_read_off_the_shapes():
    module, params = load_torch_state(official_state(GM), "gm_qwen_image", depth=3, **ROPE)
    assert module == QwenImage(
        in_channels=4,
        hidden=D,
        num_heads=2,
        depth=3,
        text_features=12,
        axes_dims_rope=(4, 6, 6),
        head=GMHead(num_components=3, logstd_hidden=7),
    )
    assert params["params"]["joint_blocks"]["text_mlp_in"]["kernel"].shape == (3, D, 4 * D)


def test_misfits_are_listed():
    state = official_state(GM)
    del state["transformer_blocks.1.txt_mod.1.bias"]
    state["surplus"] = np.zeros(3)
    with pytest.raises(ValueError) as error:
        load_torch_state(state, "gm_qwen_image", **ROPE)
    assert "missing transformer_blocks.1.txt_mod.1.bias (192,)" in str(error.value)
    assert "unexpected surplus (3,)" in str(error.value)
    with pytest.raises(ValueError, match="no size can be read"):
        load_torch_state({}, "qwen_image", **ROPE)
