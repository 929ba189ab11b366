"""The Inception network against one written in PyTorch, and the resize against TensorFlow's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state, to_torch_state
from piflow_jax.models.inception import InceptionV3, class_logits, convolutions, resize_bilinear


@pytest.fixture(scope="module")
def state():
    """A state under official names, every moment and scale random."""
    module = InceptionV3()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 75, 75, 3))))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    rng = np.random.default_rng(0)
    draw = {
        "conv.weight": lambda s: rng.normal(size=s) * np.sqrt(2 / np.prod(s[1:])),
        "bn.weight": lambda s: rng.uniform(0.8, 1.2, s),
        "bn.bias": lambda s: rng.normal(size=s) * 0.2,
        "bn.running_mean": lambda s: rng.normal(size=s) * 0.2,
        "bn.running_var": lambda s: rng.uniform(0.5, 1.5, s),
        "fc.weight": lambda s: rng.normal(size=s) / 45,
        "fc.bias": lambda s: rng.normal(size=s),
    }
    return {
        name: draw[".".join(name.split(".")[-2:])](array.shape).astype(np.float32)
        for name, array in to_torch_state(module, zeros).items()
    }


def by_torch(state, images):
    """The network as a function of names, in PyTorch; images as ours, not resized."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F

    weights = {name: torch.from_numpy(array) for name, array in state.items()}

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=padding)
        names = ("running_mean", "running_var", "weight", "bias")
        moments = [weights[f"{name}.bn.{part}"] for part in names]
        return F.relu(F.batch_norm(x, *moments, training=False, eps=1e-3))

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def block_a(x, b):
        five = conv(conv(x, f"{b}.branch5x5_1"), f"{b}.branch5x5_2", padding=2)
        double = conv(conv(x, f"{b}.branch3x3dbl_1"), f"{b}.branch3x3dbl_2", padding=1)
        double = conv(double, f"{b}.branch3x3dbl_3", padding=1)
        pooled = conv(average(x), f"{b}.branch_pool")
        return torch.cat([conv(x, f"{b}.branch1x1"), five, double, pooled], 1)

    def block_b(x, b):
        double = conv(conv(x, f"{b}.branch3x3dbl_1"), f"{b}.branch3x3dbl_2", padding=1)
        double = conv(double, f"{b}.branch3x3dbl_3", stride=2)
        three = conv(x, f"{b}.branch3x3", stride=2)
        return torch.cat([three, double, F.max_pool2d(x, 3, 2)], 1)

    def block_c(x, b):
        one = conv(x, f"{b}.branch1x1")
        seven = conv(x, f"{b}.branch7x7_1")
        seven = conv(seven, f"{b}.branch7x7_2", padding=(0, 3))
        seven = conv(seven, f"{b}.branch7x7_3", padding=(3, 0))
        double = conv(x, f"{b}.branch7x7dbl_1")
        for i, padding in enumerate([(3, 0), (0, 3), (3, 0), (0, 3)], 2):
            double = conv(double, f"{b}.branch7x7dbl_{i}", padding=padding)
        pooled = conv(average(x), f"{b}.branch_pool")
        return torch.cat([one, seven, double, pooled], 1)

    def block_d(x, b):
        three = conv(conv(x, f"{b}.branch3x3_1"), f"{b}.branch3x3_2", stride=2)
        seven = conv(x, f"{b}.branch7x7x3_1")
        seven = conv(seven, f"{b}.branch7x7x3_2", padding=(0, 3))
        seven = conv(seven, f"{b}.branch7x7x3_3", padding=(3, 0))
        seven = conv(seven, f"{b}.branch7x7x3_4", stride=2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def block_e(x, b, pool):
        three = conv(x, f"{b}.branch3x3_1")
        double = conv(conv(x, f"{b}.branch3x3dbl_1"), f"{b}.branch3x3dbl_2", padding=1)
        outputs = [conv(x, f"{b}.branch1x1")]
        for h, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3")):
            outputs.append(conv(h, f"{b}.{name}a", padding=(0, 1)))
            outputs.append(conv(h, f"{b}.{name}b", padding=(1, 0)))
        outputs.append(conv(pool(x), f"{b}.branch_pool"))
        return torch.cat(outputs, 1)

    with torch.no_grad():
        x = (torch.from_numpy(images).permute(0, 3, 1, 2) - 128) / 128
        x = conv(conv(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3")
        x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", padding=1), 3, 2)
        x = conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
        x = F.max_pool2d(x, 3, 2)
        for letter in "bcd":
            x = block_a(x, f"Mixed_5{letter}")
        x = block_b(x, "Mixed_6a")
        for letter in "bcde":
            x = block_c(x, f"Mixed_6{letter}")
            if letter == "d":
                spatial = x[:, :7].permute(0, 2, 3, 1)
        x = block_d(x, "Mixed_7a")
        x = block_e(x, "Mixed_7b", average)
        x = block_e(x, "Mixed_7c", lambda h: F.max_pool2d(h, 3, 1, 1))
        pool = x.mean((2, 3))
        logits = F.linear(pool, weights["fc.weight"], weights["fc.bias"])
    return pool.numpy(), spatial.numpy(), logits.numpy()


def test_features_match_pytorch(state):
    images = np.random.default_rng(1).uniform(0, 255, (1, 139, 123, 3)).astype(np.float32)
    module, params = load_torch_state(state, "inception")
    found = jax.jit(lambda p, x: module.apply(p, x, resize=False))(params, images)
    expected = by_torch(state, images)
    assert found.pool.shape == (1, 2048) and found.spatial.shape == (1, 7, 6, 7)
    for ours, theirs in zip(found, expected, strict=True):
        # Nothing is dead, or the comparison would say little.
        assert theirs.std() > 0.1 and np.mean(theirs == 0) < 0.7
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    # The Inception Score's logits lack the bias.
    np.testing.assert_allclose(
        class_logits(params, found.pool), found.logits - state["fc.bias"][None], atol=1e-4
    )


def test_images_are_resized_to_17_by_17_sites():
    module = InceptionV3()
    images = jnp.zeros((2, 64, 40, 3), jnp.uint8)
    shapes = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), images)[0])
    assert shapes.spatial.shape == (2, 17, 17, 7)
    assert (shapes.pool.shape, shapes.logits.shape) == ((2, 2048), (2, 1008))
    assert shapes.pool.dtype == jnp.float32


def test_sizes_are_the_published_ones():
    found = list(convolutions())
    assert len(found) == 94
    weights = sum(conv.features * width * np.prod(conv.kernel) for _, width, conv in found)
    # torchvision's network of the same widths has 21,785,568 parameters before its classifiers,
    # of which two for each of the normalised channels.
    channels = sum(conv.features for _, _, conv in found)
    assert weights + 2 * channels == 21_785_568


@pytest.mark.parametrize("shape", [(1, 75, 75, 4), (75, 75, 3), (1, 75, 74, 3)])
def test_malformed_images_are_refused(shape):
    with pytest.raises(ValueError, match="images"):
        jax.eval_shape(
            lambda: InceptionV3().init(jax.random.key(0), jnp.zeros(shape), resize=False)
        )


SIZES = [(256, 299), (64, 299), (32, 45), (299, 299), (512, 299), (7, 3)]


@pytest.mark.parametrize(("size", "out"), SIZES)
def test_resize_agrees_with_its_definition(size, out):
    images = np.random.default_rng(2).uniform(0, 255, (2, size, size + 3, 2)).astype(np.float32)
    # One matrix for each axis, in float64.
    matrices = []
    for n in (size, size + 3):
        matrix = np.zeros((out, n))
        for i in range(out):
            at = i * n / out
            low = min(int(np.floor(at + 1e-9)), n - 1)
            matrix[i, low] += 1 - (at - low)
            matrix[i, min(low + 1, n - 1)] += at - low
        matrices.append(matrix)
    expected = np.einsum("yi,xj,bijc->byxc", *matrices, images.astype(float), optimize=True)
    found = jax.jit(resize_bilinear, static_argnums=(1, 2))(images, out, out)
    np.testing.assert_allclose(found, expected, atol=0.01)  # positions are float32: i * n / out


@pytest.mark.parametrize(("size", "out"), SIZES)
def test_resize_agrees_with_tensorflow(size, out):
    tf = pytest.importorskip("tensorflow")
    images = np.random.default_rng(3).integers(0, 256, (2, size, size + 3, 3)).astype(np.float32)
    expected = tf.compat.v1.image.resize_bilinear(
        images, (out, out), align_corners=False, half_pixel_centers=False
    ).numpy()
    found = resize_bilinear(jnp.asarray(images), out, out)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)  # a unit in the last place


def test_resize_to_the_same_size_is_the_identity():
    images = np.random.default_rng(4).uniform(0, 255, (1, 9, 11, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize_bilinear(jnp.asarray(images), 9, 11), images)
