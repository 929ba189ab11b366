"""Reference images in FLUX.1 and Qwen-Image, against the transformers and pipelines of `diffusers`.

The transformers are called as `FluxKontextPipeline` and `QwenImageEditPlusPipeline` call them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state
from piflow_jax.models.flux import Flux, flux_angles
from piflow_jax.models.qwen_image import QwenImage, qwen_angles
from tests.models.recorded import random_state

AXES = (4, 6, 6)
SIZES = dict(
    in_channels=16,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    axes_dims_rope=AXES,
)
# Odd numbers of rows and of columns, none of them alike.
IMAGE, REFERENCES = (6, 10), [(14, 6), (2, 8)]
apply = jax.jit(
    lambda module, *inputs: module.apply(*inputs),
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0},
)


def drawn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def packed(x):
    """Tokens of patches, in the order of `diffusers`: channels first."""
    b, h, w, c = x.shape
    patches = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return patches.reshape(b, h * w // 4, 4 * c)


def unpacked(tokens, height, width):
    tokens = np.asarray(tokens)
    patches = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(len(tokens), height, width, -1)


def close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def flux_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    sizes = SIZES | {"num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": 10}
    return diffusers.FluxTransformer2DModel(**sizes, guidance_embeds=True)


def qwen_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.QwenImageTransformer2DModel(**SIZES, out_channels=4, num_layers=2)


def ids(height, width, frame):
    rows, columns = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
    return np.stack([0 * rows + frame, rows, columns], axis=-1).reshape(-1, 3)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_flux_reads_references_as_kontext_does(count):
    torch = pytest.importorskip("torch")
    peer = flux_of_diffusers()
    state = random_state(peer)
    x, references = drawn(2, *IMAGE, 4), [drawn(2, *size, 4) for size in REFERENCES[:count]]
    text, pooled = drawn(2, 3, 12), drawn(2, 10)
    t, scales = np.float32([0.3, 0.9]), np.float32([2.5, 1.25])
    images = [x, *references]
    where = np.concatenate([ids(*image.shape[1:3], frame) for frame, image in enumerate(images)])
    tokens = np.concatenate([packed(image) for image in images], axis=1)
    given = (tokens, text, pooled, t, where.astype(np.float32), np.zeros((3, 3), np.float32))
    with torch.no_grad():
        (out,) = peer(*map(torch.from_numpy, given), torch.from_numpy(scales), return_dict=False)
    theirs = unpacked(out[:, : IMAGE[0] * IMAGE[1] // 4], *IMAGE)
    module, variables = load_torch_state(state, "flux", axes_dims_rope=AXES)
    close(apply(module, variables, x, t, text, pooled, scales, references), theirs)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_qwen_image_reads_references_as_its_editor_does(count):
    torch = pytest.importorskip("torch")
    peer = qwen_of_diffusers()
    state = random_state(peer)
    x, references = drawn(2, *IMAGE, 4), [drawn(2, *size, 4) for size in REFERENCES[:count]]
    text, t, mask = drawn(2, 4, 12), np.float32([0.3, 0.9]), np.int64([[1, 1, 0, 0], [1] * 4])
    images = [x, *references]
    tokens = np.concatenate([packed(image) for image in images], axis=1)
    shapes = [(1, image.shape[1] // 2, image.shape[2] // 2) for image in images]
    with torch.no_grad():
        given = map(torch.from_numpy, (tokens, text, mask, t))
        (out,) = peer(*given, img_shapes=[shapes] * 2, return_dict=False)
    theirs = unpacked(out[:, : IMAGE[0] * IMAGE[1] // 4], *IMAGE)
    module, variables = load_torch_state(state, "qwen_image", axes_dims_rope=AXES)
    close(apply(module, variables, x, t, text, mask, references), theirs)


def test_positions_of_references():
    # Each axis starts with the frequency 1: frame, row, column.
    first = [0, 2, 5]
    angles = flux_angles(AXES, 1, 1, 2, [(2, 1), (1, 1)])[:, first]
    np.testing.assert_array_equal(
        angles, [[0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0], [2, 0, 0]]
    )
    angles = qwen_angles(AXES, 1, 1, 2, [(4, 1), (1, 1)])[:, first]
    text, *rest = angles.tolist()
    assert text == [2, 2, 2]  # beyond the longest side of all, four
    assert rest[:2] == [[0, -1, -1], [0, -1, 0]]
    assert rest[2:6] == [[1, row, -1] for row in (-2, -1, 0, 1)]
    assert rest[6:] == [[2, -1, -1]]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4, 4), r"references\[1\] \(2, 3, 4, 4\) is not divisible"),
        ((2, 4, 4, 3), r"references\[1\] must be \[B, H, W, 4\]"),
        ((1, 4, 4, 4), r"references\[1\] must be \[2, H, W, 4\]"),
    ],
)
@pytest.mark.parametrize(("kind", "extra"), [(Flux, [(2, 10), (2,)]), (QwenImage, [(2, 3)])])
def test_references_that_do_not_fit_are_named(kind, extra, shape, message):
    sizes = dict(in_channels=4, hidden=32, num_heads=2, text_features=12, axes_dims_rope=AXES)
    sizes |= {"pooled_features": 10} if kind is Flux else {}
    shapes = [(2, 4, 4, 4), (2,), (2, 3, 12), *extra]
    inputs = [jnp.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        references = [jnp.zeros((2, 2, 2, 4)), jnp.zeros(shape)]
        jax.eval_shape(kind(**sizes).init, jax.random.key(0), *inputs, references)
