"""Weights of Qwen-Image's autoencoder with the names of `diffusers`, for single frames.

Source: the release's `AutoencoderKLQwenImage` (arXiv 2508.02324, section 2.3). Its convolutions are
three-dimensional and causal. A picture has zeros before it, so only the last slice in time of each
kernel has an effect. The other slices, and convolutions in time alone, are not read.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from piflow_jax.convert.kinds import Kind
from piflow_jax.convert.rules import Place, Rule, import_state
from piflow_jax.convert.vae import by_channel, conv, middle, resnet
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.safetensors_files import LazyArray

__all__ = [
    "LATENTS_MEAN",
    "LATENTS_STD",
    "QWEN_VAE",
    "flattened",
    "load_qwen_vae",
    "qwen_vae_rules",
]

# From the release, per channel: latents are `(raw - mean) / std`.
LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

_FIRST = re.compile(r"encoder\.down_blocks\.(\d+)\.(conv1|resample\.1)\.weight")


def _norm(name: str, path: tuple[str, ...], features: int) -> list[Rule]:
    return [Rule((f"{name}.gamma",), (*path, "scale"), "o -> o", {"o": features})]


def qwen_vae_rules(module: AutoencoderKL) -> list[Rule]:
    """The table for an autoencoder, for states from `flattened`.

    Args:
        module: The autoencoder from `load_qwen_vae`.

    Returns:
        Rules that cover every parameter once.
    """
    widths, latent = module.channels, module.latent_channels
    rules = [
        *conv("encoder.conv_in", ("encoder", "conv_in"), widths[0], module.in_channels),
        *conv("encoder.conv_out", ("encoder", "conv_out"), 2 * latent, widths[-1]),
        *_norm("encoder.norm_out", ("encoder", "conv_norm_out"), widths[-1]),
        *middle(_norm, "encoder", widths[-1], "norm", "proj"),
        *conv("quant_conv", ("quant_conv",), 2 * latent, 2 * latent, 1),
        *conv("post_quant_conv", ("post_quant_conv",), latent, latent, 1),
        *conv("decoder.conv_in", ("decoder", "conv_in"), widths[-1], latent),
        *conv("decoder.conv_out", ("decoder", "conv_out"), module.in_channels, widths[0]),
        *_norm("decoder.norm_out", ("decoder", "conv_norm_out"), widths[0]),
        *middle(_norm, "decoder", widths[-1], "norm", "proj"),
    ]
    width, place = widths[0], 0
    for level, features in enumerate(widths):  # residual blocks and downsampling are in one list
        for layer in range(module.layers_per_block):
            path = ("encoder", f"down_{level}_resnet_{layer}")
            rules += resnet(_norm, f"encoder.down_blocks.{place}", path, features, width)
            width, place = features, place + 1
        if level + 1 < len(widths):
            path = ("encoder", f"down_{level}_downsample")
            rules += conv(f"encoder.down_blocks.{place}.resample.1", path, features, features)
            place += 1
    width = widths[-1]
    for level, features in enumerate(widths[::-1]):
        block = f"decoder.up_blocks.{level}"
        for layer in range(module.layers_per_block + 1):
            path = ("decoder", f"up_{level}_resnet_{layer}")
            rules += resnet(_norm, f"{block}.resnets.{layer}", path, features, width)
            width = features
        if level + 1 < len(widths):
            path = ("decoder", f"up_{level}_upsample")
            width = features // 2
            rules += conv(f"{block}.upsamplers.0.resample.1", path, width, features)
    return rules


def load_qwen_vae(
    state: Mapping[str, np.ndarray],
    *,
    latents_mean: Sequence[float] = LATENTS_MEAN,
    latents_std: Sequence[float] = LATENTS_STD,
    place: Place | None = None,
) -> tuple[AutoencoderKL, dict]:
    """Loads the part of Qwen-Image's autoencoder that acts on pictures; shapes show its sizes.

    Args:
        state: Arrays by official name.
        latents_mean: Mean of raw latents, per channel.
        latents_std: Standard deviation of raw latents, per channel.
        place: Puts each leaf on its devices as soon as it is built, see `import_state`; None keeps
            leaves on the default device.

    Returns:
        The module, and `{"params": ...}` as JAX arrays with the dtypes of `state`.

    Raises:
        ValueError: Names, shapes or dtypes do not match (the message lists the faults), or numbers
            are not finite.
    """
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight")
    found = [(int(m[1]), m[2], name) for name in state if (m := _FIRST.fullmatch(name))]
    if set(needed) - set(state) or not found:
        raise ValueError(
            "the state does not fit Qwen-Image's autoencoder: it needs encoder.down_blocks and "
            f"{' and '.join(needed)}"
        )
    widths, layers = [], 0
    for _, kind, name in sorted(found):
        if kind == "conv1":
            layers += 1
            width = np.shape(state[name])[0]
        else:
            widths.append(width)
    widths.append(width)
    channels = np.shape(state["decoder.conv_in.weight"])[1]
    scale, shift = by_channel(latents_mean, latents_std, channels)
    module = AutoencoderKL(
        channels=tuple(widths),
        layers_per_block=max(layers // len(widths), 1),
        latent_channels=channels,
        in_channels=np.shape(state["encoder.conv_in.weight"])[1],
        norm_groups=None,
        halving_upsample=True,
        latent_scale=scale,
        latent_shift=shift,
    )
    flat = flattened(state)
    return module, {"params": import_state(flat, qwen_vae_rules(module), place)}


def flattened(state: Mapping[str, np.ndarray]) -> dict[str, LazyArray]:
    """The state of a network for pictures: the part of each array that the first frame uses.

    Args:
        state: Arrays by official name.

    Returns:
        Arrays, sliced when they are read: two-dimensional kernels, linear layers in attention
        (separate queries, keys and values), and flat scales, without convolutions in time.
    """
    flat = {}
    for name, array in state.items():
        shape = np.shape(array)
        if ".time_conv." in name:  # the first frame bypasses it
            continue
        if name.endswith(".gamma"):
            flat[name] = _lazy(array, (shape[0],), lambda a: a.reshape(len(a)))
        elif len(shape) == 5:
            flat[name] = _lazy(array, (*shape[:2], *shape[3:]), lambda a: a[:, :, -1])
        elif ".attentions." in name:
            parts = ("to_q", "to_k", "to_v") if ".to_qkv." in name else ("proj",)
            sizes = (shape[0] // len(parts), *shape[1:2])
            for i, part in enumerate(parts):
                own = name.replace(".to_qkv.", f".{part}.")
                flat[own] = _lazy(
                    array,
                    sizes,
                    lambda a, i=i, sizes=sizes: a[i * sizes[0] :][: sizes[0]].reshape(sizes),
                )
        else:
            flat[name] = array
    return flat


def _lazy(array, shape, cut) -> LazyArray:
    return LazyArray(shape, array.dtype, lambda: np.ascontiguousarray(cut(np.asarray(array))))


QWEN_VAE = Kind(
    name="qwen_vae",
    mark="decoder.mid_block.resnets.0.norm1.gamma",
    load=load_qwen_vae,
    module=AutoencoderKL,
)
