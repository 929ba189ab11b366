"""The same work in plain PyTorch: DiT, Gaussian-mixture policy, pi-ID step, few-step sampler.

Written as the method's formulas stand (arXiv 2510.14974, Sec. 3), in PyTorch's own layout (channels
first) and with what PyTorch has ready: scaled dot-product attention, fused AdamW, multi-tensor
averages. `tests/benchmarks/test_torch_twin.py` checks that its loss, gradients, samples and updates
are ours.
"""

import copy
import math
import operator
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piflow_jax.config import Config, OptimizerConfig
from piflow_jax.models.layers import TIME_FEATURES, position_table

__all__ = ["DiT", "Distillation", "FlowMatching", "GMPolicy", "few_step_sample", "from_flax"]

EPS = 1e-6
# Settings of which the twin has one value.
_ONLY = {
    "policy.kind": "gm",
    "train.data_free": False,
    "train.nfe_choices": (),
    "train.final_step_size_scale": 1.0,
    "train.window_substeps": 0,
    "train.mixing_steps": 0,
    "train.state_power": 0.0,
    "train.corrector.kind": "",
    "teacher.guidance_range": (),
    "teacher.orthogonal_guidance": 0.0,
}


class Block(nn.Module):
    """Self-attention and an MLP under adaptive layer norm."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """Maps `tokens[B, T, D]` under `conditioning[B, D]`."""
        b, t, width = tokens.shape
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(conditioning)[:, None].chunk(
            6, dim=-1
        )
        hidden = F.layer_norm(tokens, (width,), eps=1e-6) * (1 + scale) + shift
        qkv = self.qkv(hidden).view(b, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = self.attention_out(attended.transpose(1, 2).reshape(b, t, width))
        tokens = tokens + gate * attended
        hidden = F.layer_norm(tokens, (width,), eps=1e-5) * (1 + scale2) + shift2
        return tokens + gate2 * self.mlp_out(F.gelu(self.mlp_in(hidden), approximate="tanh"))


class DiT(nn.Module):
    """A DiT with a velocity head (`components` 0) or a head of Gaussian mixtures."""

    def __init__(self, module, components: int, logstd_hidden: int):
        """Takes its sizes from a Flax module."""
        super().__init__()
        width, self.patch, self.channels = module.hidden, module.patch_size, module.in_channels
        self.components, self.time_scale = components, module.time_scale
        pixels = self.patch**2
        self.patch_embed = nn.Linear(pixels * self.channels, width)
        self.time_in = nn.Linear(TIME_FEATURES, width)
        self.time_out = nn.Linear(width, width)
        self.class_embed = nn.Embedding(module.num_classes + 1, width)
        hidden = int(width * module.mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(width, module.num_heads, hidden) for _ in range(module.depth)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        if components:
            self.means = nn.Linear(width, pixels * components * self.channels)
            self.logweights = nn.Linear(width, pixels * components)
            self.logstd_in = nn.Linear(width, logstd_hidden)
            self.logstd_out = nn.Linear(logstd_hidden, 1)
        else:
            self.output = nn.Linear(width, pixels * self.channels)
        side = module.sample_size // self.patch
        table = position_table(width, side, side, side).reshape(1, side * side, width)
        self.register_buffer("positions", torch.from_numpy(table), persistent=False)
        # On the host and rounded as released networks round them.
        half = TIME_FEATURES // 2
        exponents = np.float32(-math.log(1e4)) * np.arange(half, dtype=np.float32)
        frequencies = np.exp((exponents / np.float32(half)).astype(np.float64)).astype(np.float32)
        self.register_buffer("frequencies", torch.from_numpy(frequencies), persistent=False)

    def _pixels(self, rows: Tensor, side: int, features: int) -> Tensor:
        """Rows `[B, T, p * p * features]` of patches as `[B, features, H, W]`."""
        p = self.patch
        rows = rows.view(rows.shape[0], side, side, p, p, features)
        return rows.permute(0, 5, 1, 3, 2, 4).reshape(-1, features, side * p, side * p)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor):
        """Maps `x[B, C, H, W]`, `t[B]`, `labels[B]` to `u[B, C, H, W]`, or to a mixture.

        The mixture is `means[B, K, C, H, W]`, `logweights[B, K, 1, H, W]`, `logstd[B]`.
        """
        b, c, height, _ = x.shape
        p, side = self.patch, height // self.patch
        with torch.autocast(x.device.type, enabled=False):
            angles = t.float()[:, None] * self.time_scale * self.frequencies[None].float()
            features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype)
            time = self.time_out(F.silu(self.time_in(features)))
            embedding = time + self.class_embed(labels)
        conditioning = F.silu(embedding)
        patches = x.view(b, c, side, p, side, p).permute(0, 2, 4, 3, 5, 1)
        tokens = self.patch_embed(patches.reshape(b, side * side, -1)) + self.positions
        for block in self.blocks:
            tokens = block(tokens, conditioning)
        shift, scale = self.final_modulation(conditioning)[:, None].chunk(2, dim=-1)
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
        if not self.components:
            return self._pixels(self.output(tokens), side, self.channels).to(x.dtype)
        means = self._pixels(self.means(tokens), side, self.components * self.channels)
        means = means.view(b, self.components, self.channels, height, height).to(x.dtype)
        logits = self._pixels(self.logweights(tokens), side, self.components)[:, :, None]
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.silu(self.logstd_in(F.silu(embedding.detach())))
            logstd = self.logstd_out(hidden)[:, 0]
        return means, logits.to(x.dtype).log_softmax(dim=1), logstd


def from_flax(module, params: Mapping, components: int = 0, logstd_hidden: int = 0) -> DiT:
    """A network with the weights of one of ours.

    Args:
      module: the Flax `DiT`.
      params: its variables.
      components: mixture components of its head; 0 for a velocity head.
      logstd_hidden: hidden width of the head's standard deviation.

    Returns:
      The network, in the parameters' dtype.
    """
    twin = DiT(module, components, logstd_hidden)
    ours = params["params"]
    dtype = torch.from_numpy(np.array(ours["class_embed"])).dtype
    twin.to(dtype)

    def fill(layer: nn.Linear, leaf: Mapping, *index) -> None:
        kernel, bias = (np.array(leaf[name])[index] for name in ("kernel", "bias"))
        layer.weight.copy_(torch.from_numpy(kernel.reshape(kernel.shape[0], -1).T.copy()))
        layer.bias.copy_(torch.from_numpy(bias.reshape(-1).copy()))

    with torch.no_grad():
        twin.class_embed.weight.copy_(torch.from_numpy(np.array(ours["class_embed"])))
        for name in ("patch_embed", "time_in", "time_out", "final_modulation"):
            fill(getattr(twin, name), ours[name])
        for name, leaf in ours["head"].items():
            fill(getattr(twin, name), leaf)
        for name, leaf in ours["blocks"].items():
            for index, block in enumerate(twin.blocks):
                fill(getattr(block, name), leaf, index)
    return twin


def _expand(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (like.ndim - 1))


class GMPolicy:
    """The velocity field of a Gaussian mixture, in the formulas of the paper."""

    def __init__(self, mixture, x: Tensor, sigma: Tensor, eps: float = EPS):
        """Takes a network's mixture at `x[B, C, H, W]` and `sigma[B]`."""
        means, self.logweights, logstd = mixture
        self.x, self.sigma, self.eps = x, sigma, eps
        self.means = x[:, None] - _expand(sigma, means) * means
        self.variance = (logstd.exp() * sigma).square()

    def detached(self, drop: Tensor | None = None) -> "GMPolicy":
        """Without gradient, and without the components in `drop[B, K]`."""
        policy = copy.copy(self)
        policy.means, policy.variance = self.means.detach(), self.variance.detach()
        policy.logweights = self.logweights.detach()
        if drop is not None:
            drop = drop & ~drop.all(dim=1, keepdim=True)
            mask = drop[:, :, None, None, None]
            policy.logweights = policy.logweights.masked_fill(mask, -math.inf)
        return policy

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Velocity at `x[B, C, H, W]` and `sigma[B]`."""
        t, s = sigma.clamp(min=self.eps), self.sigma.clamp(min=self.eps)
        alpha_t, alpha_s = 1 - t, 1 - s
        zeta = (alpha_t / t).square() - (alpha_s / s).square()
        nu = _expand(alpha_t / t**2, x) * x - _expand(alpha_s / s**2, x) * self.x
        denominator = (self.variance * zeta + 1).clamp(min=self.eps)
        nu, means = nu[:, None], self.means
        inner = (means * (nu - 0.5 * _expand(zeta, means) * means)).sum(2, keepdim=True)
        weights = (self.logweights + inner / _expand(denominator, inner)).softmax(dim=1)
        posterior = (_expand(self.variance, x) * nu[:, 0] + (weights * means).sum(1)) / _expand(
            denominator, x
        )
        return (x - posterior) / _expand(t, x)


def warp(tau: Tensor, shift: float) -> Tensor:
    """Raw time to noise level."""
    return shift * tau / (1 + (shift - 1) * tau)


def rollout(
    policy: GMPolicy,
    x: Tensor,
    start: Tensor,
    end: Tensor,
    shift: float,
    total: int,
    solver: str = "euler",
) -> Tensor:
    """Steps from `start[B]` down to `end[B]`; a sample that has arrived stands still.

    `multistep` is the two-step method of Adams and Bashforth.
    """
    before = previous = None
    count = ((start - end) * total).round().clamp(min=1)
    size = (start - end) / count
    for index in range(int(count.max().item())):
        now = (start - size * torch.clamp(count - 1, max=index)).clamp(min=0)
        sigma = warp(now, shift)
        after = warp((start - size * torch.clamp(count, max=index + 1)).clamp(min=0), shift)
        step = torch.where(index < count, after - sigma, 0)
        velocity = policy.velocity(x, sigma)
        slope = 0
        if solver == "multistep" and previous is not None:
            gap = sigma - before
            ratio = step / (2 * torch.where(gap == 0, torch.ones_like(gap), gap))
            slope = _expand(ratio, x) * (velocity - previous)
        x = x + _expand(step, x) * (velocity + slope)
        before, previous = sigma, velocity
    return x


def few_step_sample(
    network: Callable, noise: Tensor, labels: Tensor, nfe: int, total: int, shift: float
) -> Tensor:
    """Samples `x_0[B, C, H, W]` with `nfe` evaluations in equal segments."""
    x = noise
    for index in range(nfe):
        tau = torch.full(labels.shape, 1 - index / nfe, dtype=x.dtype, device=x.device)
        sigma = warp(tau, shift)
        policy = GMPolicy(network(x, sigma, labels), x, sigma, eps=1e-4)
        x = rollout(policy, x, tau, tau - 1 / nfe, shift, total)
    return x


class Muon(torch.optim.Optimizer):
    """Muon with all matrices of a shape orthogonalised at once, in their own precision.

    `torch.optim.Muon` takes them one by one and in bfloat16, which few CPUs have.
    """

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter; one with several outputs is several matrices."""
        for group in self.param_groups:
            shapes: dict[tuple, list] = {}
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"], state["count"] = torch.zeros_like(p), 0
                state["count"] += 1
                state["momentum"].lerp_(p.grad, 0.05)
                update = state["momentum"].lerp(p.grad, 0.05)
                pieces = update.view(-1, p.shape[0] // p.pieces, p.shape[1])
                shapes.setdefault(tuple(pieces.shape[1:]), []).append((p, pieces))
            for (rows, columns), found in shapes.items():
                x = torch.cat([pieces for _, pieces in found])
                x = x.mT if rows > columns else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-8)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315) @ x
                x = x.mT if rows > columns else x
                scale = -group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                first = 0
                for p, pieces in found:
                    part = x[first : first + len(pieces)].reshape(p.shape)
                    p.add_(part, alpha=scale)
                    first += len(pieces)


class Trainer:
    """An optimiser with warm-up, clipping after it and a Karras average, of one network."""

    def __init__(self, network: DiT, config: OptimizerConfig):
        self.config, self.count = config, 0
        self.ema = copy.deepcopy(network)
        parameters = list(network.parameters())
        matrices = []
        if config.kind == "muon":
            for block in network.blocks:
                for name, p in block.named_parameters():
                    if p.ndim == 2:
                        p.pieces = {"modulation": 6, "qkv": 3}.get(name.split(".")[0], 1)
                        matrices.append(p)
        chosen = {id(p) for p in matrices}
        adam = torch.optim.AdamW(
            [p for p in parameters if id(p) not in chosen],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        muon = [Muon(matrices, config.learning_rate)] if matrices else []
        self.optimizers = [adam, *muon]
        self._pair = (list(self.ema.parameters()), parameters)

    def advance(self, loss: Tensor) -> Tensor:
        """Backward pass and update; the loss, without its graph."""
        config = self.config
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        rate = config.learning_rate * min(1.0, (self.count + 1) / max(config.warmup_steps, 1))
        if config.grad_clip and self.count >= config.warmup_steps:
            torch.nn.utils.clip_grad_norm_(self._pair[1], config.grad_clip, foreach=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        decay = (1 - 1 / max(self.count + 1 - config.warmup_steps, 1)) ** (config.ema_gamma + 1)
        with torch.no_grad():
            torch._foreach_lerp_(*self._pair, 1 - decay)
        self.count += 1
        return loss.detach()


def _precision(config: Config, like: Tensor):
    bfloat16 = config.model.dtype == "bfloat16"
    return torch.autocast(like.device.type, torch.bfloat16, enabled=bfloat16)


class Distillation:
    """The pi-ID step of a Gaussian-mixture student: one segment, no window, no mixing."""

    def __init__(self, student: DiT, teacher: DiT, config: Config, null_label: int):
        for key, value in _ONLY.items():
            found = operator.attrgetter(key)(config)
            if found != value:
                raise ValueError(f"the twin has no config.{key} = {found!r}, only {value!r}")
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.config, self.null_label = config, null_label
        if config.model.dtype == "bfloat16":
            self.teacher.blocks.to(torch.bfloat16)
        self.trainer = Trainer(student, config.train.optimizer)

    def guided(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """The teacher's velocity, both halves of the guidance in one batch."""
        settings = self.config.teacher
        if settings.guidance_scale == 1:
            return self.teacher(x, sigma, labels)
        null = torch.full_like(labels, self.null_label)
        both = self.teacher(x.repeat(2, 1, 1, 1), sigma.repeat(2), torch.cat([labels, null]))
        cond, uncond = both.chunk(2)
        low, high = settings.guidance_interval
        inside = (sigma >= low) & (sigma <= high)
        return cond + _expand((settings.guidance_scale - 1) * inside, cond) * (cond - uncond)

    def draws(self, images: Tensor) -> dict[str, Tensor]:
        """The random numbers of a step."""
        b, train, options = images.shape[0], self.config.train, {"device": images.device}
        return {
            "tau": 1 - torch.rand(b, **options),
            "noise": torch.randn_like(images),
            "student": torch.rand(b, train.num_states, **options),
            "dropout": torch.rand(b, self.config.policy.num_components, **options),
        }

    def loss(self, images: Tensor, labels: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """The loss of `images[B, C, H, W]`."""
        train = self.config.train
        tau = (draws["tau"].clamp(min=1e-4) * train.nfe).ceil().clamp(1, train.nfe) / train.nfe
        sigma = warp(tau, train.shift)
        x = torch.lerp(images, draws["noise"], _expand(sigma, images))
        policy = GMPolicy(self.student(x, sigma, labels), x, sigma)
        drop = draws["dropout"] < train.gm_dropout if train.gm_dropout else None
        detached = policy.detached(drop)
        ends = (draws["student"] / train.nfe).sort(dim=1).values
        lengths = torch.diff(ends, dim=1, prepend=torch.zeros_like(ends[:, :1]))
        loss = 0.0
        for index in range(train.num_states):
            with torch.no_grad():
                end = (tau - lengths[:, index]).clamp(min=0)
                x = rollout(detached, x, tau, end, train.shift, train.total_substeps, train.solver)
                tau, sigma = end, warp(end, train.shift)
                target = self.guided(x, sigma, labels)
            loss = loss + F.mse_loss(policy.velocity(x, sigma), target)
        return train.loss_scale * 0.5 * loss / train.num_states

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step; the loss."""
        with _precision(self.config, images):
            loss = self.loss(images, labels, self.draws(images))
        return self.trainer.advance(loss)


class FlowMatching:
    """The teacher's flow-matching step."""

    def __init__(self, network: DiT, config: Config, null_label: int):
        self.network, self.config, self.null_label = network, config, null_label
        self.trainer = Trainer(network, config.teacher.optimizer)

    def loss(self, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """The loss of `images[B, C, H, W]` at `sigma[B]`."""
        x = torch.lerp(images, noise, _expand(sigma, images))
        return F.mse_loss(self.network(x, sigma, labels), noise - images)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step; the loss."""
        b = images.shape[0]
        offsets = torch.rand(b, device=images.device)
        tau = (torch.arange(b, device=images.device) + offsets) / b
        sigma = warp(tau, self.config.train.shift)
        dropped = torch.rand(b, device=images.device) < self.config.teacher.label_dropout
        labels = labels.masked_fill(dropped, self.null_label)
        with _precision(self.config, images):
            loss = self.loss(images, labels, sigma, torch.randn_like(images))
        return self.trainer.advance(loss)
