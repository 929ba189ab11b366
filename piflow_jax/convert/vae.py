"""Autoencoders of Stable Diffusion, VA-VAE, FLUX.1 and FLUX.2 with the names of `diffusers`."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from piflow_jax.convert.kinds import Kind
from piflow_jax.convert.rules import Place, Rule, import_state, linear
from piflow_jax.models.vae import AutoencoderKL

# In early releases of `diffusers`, attention had other names, and 1x1 convolutions instead of
# linear layers. The published files of `sd-vae-ft-ema` and `sd-vae-ft-mse` still have them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\..*)")

# Scale and shift of latents, from the releases' `config.json`.
_STABLE_DIFFUSION = (0.18215, 0.0)
_FLUX = (0.3611, 0.1159)
# Statistics of FLUX.2's patches of latents, a batch norm without scale and shift.
_PATCHES = "bn."


Norm = Callable[[str, tuple[str, ...], int], list[Rule]]
"""`(official name, path, features) -> rules` of a norm."""


def conv(name: str, path: tuple[str, ...], out: int, in_: int, size: int = 3) -> list[Rule]:
    """Rules for the weight and the bias of a convolution with kernels of `size` by `size`."""
    sizes = {"o": out, "i": in_, "h": size, "w": size}
    return [
        Rule((f"{name}.weight",), (*path, "kernel"), "o i h w -> h w i o", sizes),
        Rule((f"{name}.bias",), (*path, "bias"), "o -> o", {"o": out}),
    ]


def _norm(name: str, path: tuple[str, ...], features: int) -> list[Rule]:
    return [
        Rule((f"{name}.weight",), (*path, "scale"), "o -> o", {"o": features}),
        Rule((f"{name}.bias",), (*path, "bias"), "o -> o", {"o": features}),
    ]


def resnet(norm: Norm, name: str, path: tuple[str, ...], out: int, in_: int) -> list[Rule]:
    """Rules for a residual block."""
    rules = [
        *norm(f"{name}.norm1", (*path, "norm1"), in_),
        *conv(f"{name}.conv1", (*path, "conv1"), out, in_),
        *norm(f"{name}.norm2", (*path, "norm2"), out),
        *conv(f"{name}.conv2", (*path, "conv2"), out, out),
    ]
    if out != in_:
        rules += conv(f"{name}.conv_shortcut", (*path, "conv_shortcut"), out, in_, 1)
    return rules


def attention(
    norm: Norm, name: str, path: tuple[str, ...], features: int, normed: str, out: str
) -> list[Rule]:
    """Rules for an attention block; `normed` and `out` are official names of its layers."""
    rules = norm(f"{name}.{normed}", (*path, "group_norm"), features)
    for ours, official in (("to_q",) * 2, ("to_k",) * 2, ("to_v",) * 2, ("to_out", out)):
        rules += linear(f"{name}.{official}", (*path, ours), features, features)
    return rules


def middle(norm: Norm, half: str, features: int, normed: str, out: str) -> list[Rule]:
    """Rules for the blocks between the way down and the way up; see `attention`."""
    name, path = f"{half}.mid_block.attentions.0", (half, "mid_attention")
    rules = attention(norm, name, path, features, normed, out)
    for i in range(2):
        name = f"{half}.mid_block.resnets.{i}"
        rules += resnet(norm, name, (half, f"mid_resnet_{i}"), features, features)
    return rules


def vae_rules(module: AutoencoderKL) -> list[Rule]:
    """The table for an autoencoder; it covers every parameter once.

    Raises:
        ValueError: The autoencoder is Qwen-Image's, which is read for one frame.
    """
    if module.norm_groups is None:
        raise ValueError("Qwen-Image's autoencoder was read for one frame and cannot be exported")
    widths, latent = module.channels, module.latent_channels
    rules = [
        *conv("encoder.conv_in", ("encoder", "conv_in"), widths[0], module.in_channels),
        *conv("encoder.conv_out", ("encoder", "conv_out"), 2 * latent, widths[-1]),
        *_norm("encoder.conv_norm_out", ("encoder", "conv_norm_out"), widths[-1]),
        *middle(_norm, "encoder", widths[-1], "group_norm", "to_out.0"),
        *conv("decoder.conv_in", ("decoder", "conv_in"), widths[-1], latent),
        *conv("decoder.conv_out", ("decoder", "conv_out"), module.in_channels, widths[0]),
        *_norm("decoder.conv_norm_out", ("decoder", "conv_norm_out"), widths[0]),
        *middle(_norm, "decoder", widths[-1], "group_norm", "to_out.0"),
    ]
    if module.quant_convs:
        rules += conv("quant_conv", ("quant_conv",), 2 * latent, 2 * latent, 1)
        rules += conv("post_quant_conv", ("post_quant_conv",), latent, latent, 1)
    halves = (
        ("encoder", "down", widths, module.layers_per_block),
        ("decoder", "up", widths[::-1], module.layers_per_block + 1),
    )
    with_attention = [level in module.attention_levels for level in range(len(widths))]
    for half, way, levels, layers in halves:
        width = levels[0]
        attends = with_attention if half == "encoder" else with_attention[::-1]
        for level, features in enumerate(levels):
            block = f"{half}.{way}_blocks.{level}"
            for layer in range(layers):
                path = (half, f"{way}_{level}_resnet_{layer}")
                rules += resnet(_norm, f"{block}.resnets.{layer}", path, features, width)
                width = features
                if attends[level]:
                    name = f"{block}.attentions.{layer}"
                    path = (half, f"{way}_{level}_attention_{layer}")
                    rules += attention(_norm, name, path, features, "group_norm", "to_out.0")
            if level + 1 < len(levels):
                path = (half, f"{way}_{level}_{way}sample")
                rules += conv(f"{block}.{way}samplers.0.conv", path, features, features)
    return rules


def load_vae(
    state: Mapping[str, np.ndarray],
    *,
    norm_groups: int = 32,
    latent_scale: float | None = None,
    latent_shift: float | None = None,
    latents_mean: Sequence[float] | None = None,
    latents_std: Sequence[float] | None = None,
    batch_norm_eps: float = 1e-4,
    place: Place | None = None,
) -> tuple[AutoencoderKL, dict]:
    """Loads an autoencoder; names and shapes show its widths, depth, channels and attention.

    Args:
        state: Arrays by official name, new or old.
        norm_groups: Groups of every normalisation, which shapes do not show.
        latent_scale: Scale of latents, which shapes do not show either. None is the scale of FLUX.1
            if there are no convolutions around the latents, otherwise that of Stable Diffusion.
        latent_shift: Shift of latents, with the same default.
        latents_mean: Mean of raw latents, per channel. Together with `latents_std` it takes the
            place of scale and shift, as in `diffusers`.
        latents_std: Standard deviation of raw latents, per channel.
        batch_norm_eps: What is added to the variances of patches that FLUX.2's weights contain.
            These take the place of scale and shift.
        place: Puts each leaf on its devices as soon as it is built, see `import_state`; None keeps
            leaves on the default device.

    Returns:
        The module, and `{"params": ...}` as JAX arrays with the dtypes of `state`.

    Raises:
        ValueError: Names, shapes or dtypes do not match (the message lists the faults), or numbers
            are not finite.
    """
    state = _new_names(state)
    patches = {name: state.pop(name) for name in list(state) if name.startswith(_PATCHES)}
    widths = {}
    for name, array in state.items():
        match = re.fullmatch(r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight", name)
        if match:
            widths[int(match[1])] = np.shape(array)[0]
    layers = {
        int(match[1])
        for match in (re.match(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", n) for n in state)
        if match
    }
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight")
    if sorted(widths) != list(range(len(widths))) or not widths or set(needed) - set(state):
        raise ValueError(
            "the state does not fit an autoencoder: it needs encoder.down_blocks.0 and on, "
            f"{' and '.join(needed)}"
        )
    undivided = [width for width in widths.values() if width % norm_groups]
    if undivided:
        raise ValueError(
            f"{norm_groups} groups of normalisation do not divide {undivided[0]} channels"
        )
    quant_convs = any(name.startswith(("quant_conv.", "post_quant_conv.")) for name in state)
    channels = np.shape(state["decoder.conv_in.weight"])[1]
    scale, shift = _STABLE_DIFFUSION if quant_convs else _FLUX
    scale = scale if latent_scale is None else latent_scale
    shift = shift if latent_shift is None else latent_shift
    if latents_mean is not None and latents_std is not None:
        scale, shift = by_channel(latents_mean, latents_std, channels)
    if patches:
        scale, shift = _by_place(patches, channels, batch_norm_eps)
    module = AutoencoderKL(
        channels=tuple(widths[level] for level in range(len(widths))),
        layers_per_block=1 + max(layers),
        latent_channels=channels,
        in_channels=np.shape(state["encoder.conv_in.weight"])[1],
        norm_groups=norm_groups,
        attention_levels=tuple(
            level
            for level in range(len(widths))
            if any(name.startswith(f"encoder.down_blocks.{level}.attentions.") for name in state)
        ),
        quant_convs=quant_convs,
        latent_scale=scale,
        latent_shift=shift,
    )
    return module, {"params": import_state(state, vae_rules(module), place)}


def by_channel(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of latents whose mean and standard deviation are given per channel.

    Raises:
        ValueError: There is not one number for each channel.
    """
    for key, numbers in (("latents_mean", mean), ("latents_std", std)):
        if len(numbers) != channels:
            raise ValueError(f"{key} has {len(numbers)} numbers, the latents {channels} channels")
    return tuple(1 / float(value) for value in std), tuple(float(value) for value in mean)


def _by_place(patches: Mapping[str, np.ndarray], channels: int, eps: float) -> tuple[tuple, tuple]:
    """Scale and shift of latents by place and channel of a patch, as nested tuples.

    Raises:
        ValueError: The statistics are not those of square patches, or not finite.
    """
    names = ("running_mean", "running_var")
    mean, var = (np.asarray(patches.get(f"{_PATCHES}{name}", ()), np.float64) for name in names)
    side = round((mean.size / channels) ** 0.5)
    if not mean.size or mean.shape != var.shape or mean.shape != (channels * side * side,):
        raise ValueError(
            f"{_PATCHES}{names[0]} and {names[1]} have shapes {mean.shape} and {var.shape}, not "
            f"those of square patches of {channels} channels"
        )
    if not np.isfinite([mean, var]).all() or (var + eps <= 0).any():
        raise ValueError(f"{_PATCHES}{names[0]} or {names[1]} has numbers that are no statistics")
    scale, shift = (
        array.reshape(channels, side, side).transpose(1, 2, 0).tolist()
        for array in (1 / np.sqrt(var + eps), mean)
    )
    return _frozen(scale), _frozen(shift)


def _frozen(rows: Sequence) -> tuple:
    """Nested lists as tuples, which a module can have as a field."""
    return tuple(_frozen(row) if isinstance(row, list) else row for row in rows)


def _exported(module: AutoencoderKL) -> list[Rule]:
    """The table of an autoencoder whose weights are all parameters; ValueError for others."""
    if np.ndim(module.latent_scale) > 1:
        raise ValueError("FLUX.2's autoencoder cannot be exported: its weights include statistics")
    return vae_rules(module)


def _new_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in state.items():
        match = _OLD_NAME.fullmatch(name)
        if match:
            name = f"{match[1]}{_OLD_ATTENTION[match[2]]}{match[3]}"
            if np.ndim(array) == 4:
                array = np.asarray(array)[:, :, 0, 0]
        renamed[name] = array
    return renamed


VAE = Kind(
    name="vae",
    mark="decoder.mid_block.resnets.0.norm1.weight",
    load=load_vae,
    module=AutoencoderKL,
    rules=_exported,
)
