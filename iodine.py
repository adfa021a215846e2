# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11",
#     "triton>=3.6; sys_platform == 'linux'",
#     "numpy>=2.0",
#     "matplotlib>=3.9",
#     "einops>=0.8",
#     "tqdm>=4.66",
#     "tyro>=1.0",
#     "scipy>=1.13",
#     "scikit-learn>=1.5",
#     "mlxtend>=0.23",
# ]
# ///
"""IODINE: Multi-Object Representation Learning with Iterative Variational Inference.

Greff et al., ICML 2019. A scene is K slots. Each slot is decoded alone into a picture of an object
and a mask, the masks compete for pixels, and a network f refines all slots' posteriors T times:

    z_k ~ N(0, 1);   mu_k, a_k = decoder(z_k);   m = softmax_k(a)
    p(x|z) = prod_i sum_k m_ik prod_c N(x_ic; mu_ikc, sigma^2)                            eq. 1
    L^(t) = KL(q(z|x) || p(z)) - log p(x|z),   z_k ~ q(z_k|x) given by lambda_k^(t)       eq. 2
    lambda_k^(t+1) = lambda_k^(t) + f(image-sized inputs of slot k, dL^(t)/dlambda_k)     eq. 3
    minimise sum_t (t/T) L^(t) by gradient descent through all T steps                    eq. 4

    python iodine.py                                         the quick preset, two CPU cores
    python iodine.py --preset tetrominoes --minutes 60       the paper's settings
    python iodine.py --resume runs/iodine-quick-0 --experiment factors

A run writes config.json, metrics.jsonl, checkpoint.pt, evaluation.json and figures/ to
runs/iodine-<preset>-<seed>/.

Measured: ARI-FG 0.961 ± 0.008, above 0.9 on 10 of 10 seeds, by `quick` in 3.1 minutes on two
cores of an AMD EPYC with AVX2 (notebooks/results/).

The defaults of Config are the paper's. `quick` trades them for minutes on small scenes:

    field                        paper     quick        why
    kl_weight, sigma             1, 0.1    0.1, 0.4     smoother: objects first, edges later
    decoder_kernel               5         1            25 times fewer products; shapes are simple
    coordinate_gain              1         5            1x1 layers need it to draw sharp edges
    init_gain, update_gain       1, 1      1.4, 0.1     ReLU; or lambda grows with each step
    pooling, activation          mean, elu max, relu    an object is few of the pixels; faster
    refinement_kernel, _stride   5, 1      3, 2         smaller images
    step_weights, num_steps      t/T, 5    0 .. 1, 7    the first decode knows nothing of the image
    lr, batch_size               3e-4, 32  3e-3, 16     falling to 3e-4 over 1,200 steps

`--variant released` is the authors' code instead of the paper: RELEASED lists the differences.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import Tensor, nn

import data
import kernels
from data import draws, figures, metrics, options, runs

# B batch, K slots, T decodes, D latent, C H W image, F input channels of the refinement network


@dataclass
class Config(options.RunConfig):
    """The defaults are the paper's (appendix C, Tetris); PRESETS override them."""

    dataset: str = "tetrominoes"  # one of data.DATASETS
    # generative model
    num_slots: int = 4  # K
    latent_size: int = 32  # D, of one slot
    component: Literal["gaussian", "logistic"] = "gaussian"  # density of a pixel in a slot
    sigma: float = 0.1  # its standard deviation (logistic: its scale)
    prior_variance: float = 1.0  # p(z) = N(0, this); released code: ln 2
    decoder: Literal["broadcast", "deconv"] = "broadcast"  # deconv: the ablation of section 4.3
    decoder_channels: tuple[int, ...] = (32, 32, 32, 32)  # hidden layers
    decoder_kernel: int = 5  # pixels
    coordinate_gain: float = 1.0  # the decoder's coordinates run from -this to this
    # inference
    num_steps: int = 5  # T, decodes of a training step (released code: one more)
    extra_decode: bool = False  # released code: T refinements, hence T + 1 decodes
    step_weights: Literal["t/T", "from_zero"] = "t/T"  # eq. 4; from_zero: 0 .. 1 over the decodes
    kl_weight: float = 1.0  # of the KL in what is minimised; `elbo` always has weight 1
    posterior_scale: Literal["softplus", "sqrt_softplus"] = "softplus"  # sigma_z from its raw value
    initial_std: float = 1.0  # sigma_z of q at t = 1, before training; 0: raw values Glorot-uniform
    refinement_channels: tuple[int, ...] = (32, 32, 32)  # convolutions of the refinement network
    refinement_kernel: int = 5  # pixels
    refinement_stride: int = 1  # of each of them
    pooling: Literal["mean", "max"] = "mean"  # over pixels, after the convolutions
    mlp_sizes: tuple[int, ...] = (128,)  # after the pooling
    mlp_linear_end: bool = False  # released code: no activation after the MLP's last layer
    lstm_size: int = 0  # 0: none (the paper's Tetris)
    forget_bias: float = 0.0  # added to the LSTM's forget gate
    coordinates: Literal["linear", "cosine"] = "linear"  # refinement input: 2 or 8 channels
    constants: bool = False  # released code: inputs 5 to the decoder, 0.5 to the refinement (twice)
    posterior_epsilon: float = 0.0  # in the posterior mask's denominator; released code: 1e-6
    log_ratio: bool = False  # leave-one-out input: log p(x|z) - log p(x|z without k), as released
    drop_inputs: tuple[str, ...] = ()  # refinement inputs to leave out, of INPUTS
    activation: Literal["elu", "relu"] = "elu"  # after every hidden layer
    init_gain: float = 1.0  # weights: truncated normal of std gain / sqrt(fan-in)
    update_gain: float = 1.0  # the same of the layer that gives lambda's update, times this
    # optimisation
    beta1: float = 0.9  # of Adam
    clip: float = 5.0  # norm of the global gradient
    lr_warmup: int = 0  # steps of linear warm-up
    lr_final: float = 1.0  # lr falls exponentially to this share of itself ...
    lr_horizon: int = 1_000_000  # ... over this many steps, and stays there
    lr_reference_batch: int = 0  # lr * sqrt(batch_size / this), as released; 0: lr as it is


PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        dataset="mini_sprites_16_shaded", num_slots=5, latent_size=16, sigma=0.4, kl_weight=0.1,
        decoder_channels=(32, 32, 32), decoder_kernel=1, coordinate_gain=5.0, num_steps=7,
        step_weights="from_zero", refinement_channels=(32, 64), refinement_kernel=3,
        refinement_stride=2, pooling="max", activation="relu", init_gain=1.4, update_gain=0.1,
        batch_size=16, lr=3e-3, lr_warmup=100, lr_final=0.1, lr_horizon=1200, steps=1200,
    ),
    "tetrominoes": dict(),  # appendix C.3: the defaults
    "multi_dsprites": dict(  # appendix C.2
        dataset="multi_dsprites_colored_on_grayscale", num_slots=6, latent_size=16, lstm_size=128,
    ),
    # Paper: no architecture for the next two. Here: C.2's, with slots for all objects and one more.
    "multi_dsprites_binarized": dict(
        dataset="multi_dsprites_binarized", num_slots=4, latent_size=16, lstm_size=128,
    ),
    "shapes": dict(dataset="shapes", num_slots=4, latent_size=16, lstm_size=128),
}

# What the authors' released code does on every dataset, whatever the preset says.
RELEASED = dict(
    component="logistic", sigma=0.03, prior_variance=math.log(2), extra_decode=True, kl_weight=1.0,
    step_weights="from_zero", posterior_scale="sqrt_softplus", initial_std=0.0, init_gain=1.0,
    refinement_stride=2, mlp_linear_end=True, forget_bias=1.0, coordinates="cosine",
    constants=True, posterior_epsilon=1e-6, log_ratio=True, coordinate_gain=1.0, pooling="mean",
    activation="elu", update_gain=1.0, beta1=0.95, lr=3e-4, lr_warmup=0, lr_final=0.1,
    lr_horizon=1_000_000,
)
RELEASED_BATCH = {"tetrominoes": 256, "quick": 256}  # the other presets: 128

INPUTS = ("image", "means", "mask", "mask_logits", "mask_posterior", "grad_means", "grad_mask",
          "log_likelihood", "leave_one_out", "coordinates", "posterior", "grad_posterior")


def make_config(preset: str = "quick", variant: str = "paper", **overrides: Any) -> Config:
    """A preset's Config; UserError for unknown names."""
    if preset not in PRESETS:
        raise options.UserError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    if variant not in ("paper", "released"):
        raise options.UserError(f"unknown variant {variant!r}: choose paper or released")
    settings = dict(preset=preset, variant=variant) | PRESETS[preset]
    if variant == "released":
        batch = RELEASED_BATCH.get(preset, 128)
        settings |= RELEASED | dict(batch_size=batch, lr_reference_batch=batch)
    return Config(**settings | overrides)


# -- building blocks -------------------------------------------------------------------------------


def linear_coordinates(height: int, width: int) -> Tensor:
    """(2, H, W): rows, then columns, each from -1 to 1."""
    rows, cols = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"))


def cosine_coordinates(height: int, width: int) -> Tensor:
    """(8, H, W): cos(i pi u) cos(j pi v) for i, j in 0..2 but i = j = 0; u, v from 0 to 1."""
    half_turns = (linear_coordinates(height, width) + 1) * (math.pi / 2)  # (2, H, W), 0 .. pi
    waves = torch.cos(torch.arange(3)[:, None, None, None] * half_turns)  # (3, 2, H, W)
    return rearrange(waves[:, None, 0] * waves[None, :, 1], "i j h w -> (i j) h w")[1:]


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


class Conv(nn.Conv2d):
    """Size-preserving convolution (padding k // 2) and activation, in the layout that is faster.

    That is channels-last, but for stride 1 and k > 1 on a CPU without AVX-512 (measured on an AMD
    EPYC with AVX2, torch 2.13).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, activation: str = "none"
    ):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2)
        self.activation, self.planes = activation, kernel > 1 and stride == 1 and not AVX512

    def layout(self, x: Tensor) -> torch.memory_format:
        planes = self.planes and x.device.type == "cpu"
        return torch.contiguous_format if planes else torch.channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=self.layout(x))
        return activate(super().forward(x), self.activation)


class BroadcastConv(Conv):
    """A convolution over [z at every pixel; fixed coordinates], without building that image."""

    def __init__(
        self, latent: int, coordinates: Tensor, outputs: int, kernel: int, activation: str = "none"
    ):
        super().__init__(latent + len(coordinates), outputs, kernel, activation=activation)
        self.register_buffer("coordinates", coordinates, persistent=False)

    def forward(self, z: Tensor) -> Tensor:  # (N, D) -> (N, O, H, W)
        taps_z, taps_xy = self.weight.split([z.shape[1], len(self.coordinates)], 1)
        response = F.conv2d(self.coordinates[None], taps_xy, self.bias, padding=self.padding)
        response = response.contiguous(memory_format=self.layout(z))[0]  # (O, H, W)
        return activate(kernels.broadcast_conv(z, taps_z, response), self.activation)


def activate(x: Tensor, name: str) -> Tensor:
    """In place, so that a layer keeps one tensor for backward."""
    return ACTIVATIONS[name](x, inplace=True) if name != "none" else x


ACTIVATIONS = {"elu": F.elu, "relu": F.relu}


def activation(config: Config) -> nn.Module:
    return nn.ELU(inplace=True) if config.activation == "elu" else nn.ReLU(inplace=True)


class BroadcastDecoder(nn.Module):
    """Spatial broadcast decoder (section 2.1, Fig. 2; tables of appendix C)."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        sizes, k = config.decoder_channels, config.decoder_kernel
        coordinates = config.coordinate_gain * linear_coordinates(height, width)
        latent = config.latent_size + config.constants
        self.first = BroadcastConv(latent, coordinates, sizes[0], k, config.activation)
        hidden = (Conv(i, o, k, activation=config.activation) for i, o in pairwise(sizes))
        self.hidden = nn.Sequential(*hidden)
        self.last = Conv(sizes[-1], channels + 1, k)

    def forward(self, z: Tensor) -> Tensor:  # (N, D) -> (N, C+1, H, W)
        return full_precision(self.last, self.hidden(self.first(z)))


class DeconvDecoder(nn.Module):
    """The ablation of section 4.3 (table "Deconv Decoder" of appendix C.1)."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        self.size = height, width
        # Paper: 8x8 doubled four times, for 128x128. Here: until it covers the image, then cropped.
        doublings = max(0, math.ceil(math.log2(max(height, width) / 8)))
        latent = config.latent_size + config.constants
        self.mlp = nn.Sequential(nn.Linear(latent, 512), activation(config),
                                 nn.Linear(512, 512), activation(config))
        self.hidden = nn.Sequential()
        for i in range(doublings):
            up = nn.ConvTranspose2d(64 if i else 8, 64, 5, stride=2, padding=2, output_padding=1)
            self.hidden += nn.Sequential(up, activation(config))
        self.hidden.append(Conv(64 if doublings else 8, 64, 5, activation=config.activation))
        self.last = Conv(64, channels + 1, 5)

    def forward(self, z: Tensor) -> Tensor:  # (N, D) -> (N, C+1, H, W)
        image = rearrange(self.mlp(z), "n (c h w) -> n c h w", h=8, w=8)
        decoded = full_precision(self.last, self.hidden(image))
        return decoded[..., : self.size[0], : self.size[1]]


def full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """float32 even under autocast: the mixture divides the rounding of a colour by sigma."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype))


class LSTMCell(nn.Module):
    """LSTM (Hochreiter & Schmidhuber 1997) with one matrix and one bias vector."""

    def __init__(self, inputs: int, size: int, forget_bias: float):
        super().__init__()
        self.gates, self.forget_bias = nn.Linear(inputs + size, 4 * size), forget_bias

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, cell = state
        i, g, f, o = self.gates(torch.cat([x, hidden], -1)).chunk(4, -1)  # Sonnet's order
        cell = torch.sigmoid(f + self.forget_bias) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


class RefinementNetwork(nn.Module):
    """f_phi of eq. 3 (tables "Refinement Network" of appendix C), the same for every slot."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        c, latent = config, config.latent_size
        coordinates = linear_coordinates if c.coordinates == "linear" else cosine_coordinates
        xy = coordinates(height, width)
        if c.constants:
            xy = torch.cat([xy, torch.full((1, height, width), 0.5)])
        self.register_buffer("coordinates", xy, persistent=False)
        slices = kernels.channel_slices(channels, len(xy))
        # An input that is left out is fed as zeros: the network without its weights.
        keep = torch.ones(max(s.stop for s in slices.values()), 1, 1)
        for name in set(c.drop_inputs) & slices.keys():
            keep[slices[name]] = 0
        self.register_buffer("keep", keep if (keep == 0).any() else None, persistent=False)
        self.drop_posterior = "posterior" in c.drop_inputs

        # LayerNorm gains and biases of the inputs that are normalised, shared over steps: gradient
        # of the means (C), of the mask logit (1), log-likelihood (1), leave-one-out (1).
        self.norm_weight = nn.Parameter(torch.ones(channels + 3))
        self.norm_bias = nn.Parameter(torch.zeros(channels + 3))
        self.norm_grad = nn.LayerNorm(2 * latent)  # over means and raw scales together
        self.convs, size = nn.Sequential(), len(keep)
        for out in c.refinement_channels:
            conv = Conv(size, out, c.refinement_kernel, c.refinement_stride, c.activation)
            self.convs.append(conv)
            size = out
        self.pooling, self.mlp = c.pooling, nn.Sequential()
        for out in c.mlp_sizes:
            self.mlp += nn.Sequential(nn.Linear(size, out), activation(c))
            size = out
        if c.mlp_linear_end:
            del self.mlp[-1]
        size += 4 * latent + c.constants
        self.constants = c.constants
        self.lstm = LSTMCell(size, c.lstm_size, c.forget_bias) if c.lstm_size else None
        self.head = nn.Linear(c.lstm_size or size, 2 * latent)

    def forward(self, packed: Tensor, lam: Tensor, gradient: Tensor | None, state: Any) -> Any:
        """(B, K, F, H, W), (B, K, 2D) twice, LSTM state -> update of lambda (B, K, 2D), state."""
        shape, x = packed.shape[:2], packed.flatten(0, 1)
        x = self.convs(x if self.keep is None else x * self.keep)  # (B*K, R, h, w)
        x = x.mean((-2, -1)) if self.pooling == "mean" else x.amax((-2, -1))  # (B*K, R)
        x = self.mlp(x).unflatten(0, shape)  # (B, K, M)
        gradient = torch.zeros_like(lam) if gradient is None else self.norm_grad(gradient)
        x = [x, torch.zeros_like(lam) if self.drop_posterior else lam, gradient]
        if self.constants:
            x.append(lam.new_full((*shape, 1), 0.5))
        x = torch.cat(x, -1)
        if self.lstm is not None:
            if state is None:
                zeros = x.new_zeros(*shape, self.head.in_features)  # alg. 1, h^(1) = 0
                state = zeros, zeros
            state = self.lstm(x, state)
            x = state[0]
        return self.head(x), state


# -- the model -------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One decode of Algorithm 1."""

    decoded: Tensor  # (B, K, C+1, H, W) means and mask logits
    posterior: Tensor  # (B, K, 2D) lambda that z was drawn from: means and raw scales of q(z|x)
    nll: Tensor  # (B,) -log p(x|z), nats per image
    kl: Tensor  # (B,) KL(q(z|x) || p(z)), nats per image


class IODINE(nn.Module):
    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        self.config = config
        decoder = BroadcastDecoder if config.decoder == "broadcast" else DeconvDecoder
        self.decoder = decoder(config, channels, height, width)
        self.refinement = RefinementNetwork(config, channels, height, width)
        self.initial = nn.Parameter(torch.zeros(2 * config.latent_size))  # lambda^(1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Paper: silent. Released code, and here: truncated normal, std 1/sqrt(fan-in)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                transposed = isinstance(module, nn.ConvTranspose2d)  # its weight is (in, out, k, k)
                fan_in = module.weight[:, 0].numel() if transposed else module.weight[0].numel()
                std = self.config.init_gain / math.sqrt(fan_in)
                nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.refinement.head.weight.mul_(self.config.update_gain)
            if std := self.config.initial_std:
                target = std if self.config.posterior_scale == "softplus" else std**2
                self.initial[self.config.latent_size :] = math.log(math.expm1(target))
            else:
                nn.init.uniform_(self.initial, -1, 1).mul_(math.sqrt(6 / (2 * len(self.initial))))

    def posterior(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """lambda (..., 2D) -> mean and standard deviation of q(z_k|x), each (..., D)."""
        loc, raw = lam.chunk(2, -1)
        scale = F.softplus(raw)
        return loc, scale if self.config.posterior_scale == "softplus" else scale.sqrt()

    def kl_terms(self, loc: Tensor, scale: Tensor) -> Tensor:
        """KL(N(loc, scale^2) || N(0, prior variance)) of every latent, nats; same shape."""
        v = self.config.prior_variance
        return ((scale.square() + loc.square()) / v - 1 - torch.log(scale.square() / v)) / 2

    def decode(self, z: Tensor) -> Tensor:
        """g_theta, every slot alone: z (B, K, D) -> means and mask logits (B, K, C+1, H, W)."""
        flat = z.flatten(0, 1)  # (B*K, D)
        if self.config.constants:
            flat = F.pad(flat, (0, 1), value=5.0)
        return self.decoder(flat).unflatten(0, z.shape[:2])

    def infer(self, image: Tensor, noise: Tensor) -> Iterator[Step]:
        """Algorithm 1, Fig. 3: yields each of the T decodes; no refinement after the last.

        image (B, C, H, W) in [0, 1]; noise (B, T, K, D) standard normal, whose T and K count. Under
        no_grad (evaluation) the graph is cut between steps: memory does not grow with T, and the
        values are the same. Decoding always records a graph, as f_phi is fed with gradients.

        Stop-gradients (SG of appendix C): kernels.refinement_inputs cuts those of the image-sized
        inputs, autograd.grad without create_graph that of the gradient wrt lambda.
        """
        c, training, num_decodes = self.config, torch.is_grad_enabled(), noise.shape[1]
        lam = self.initial.expand(len(image), noise.shape[2], -1)  # (B, K, 2D)
        state = None
        for t in range(num_decodes):
            with torch.enable_grad():
                if not training:
                    lam = lam.detach().requires_grad_()
                loc, scale = self.posterior(lam)
                z = loc + scale * noise[:, t]  # eq. 2, (B, K, D)
                decoded = self.decode(z)
                kl = reduce(self.kl_terms(loc, scale), "b k d -> b", "sum")
            last = t == num_decodes - 1
            with torch.set_grad_enabled(training):
                if last:
                    log_likelihood = kernels.mixture_log_likelihood(
                        image, decoded, c.sigma, c.component
                    )
                else:
                    inputs = kernels.refinement_inputs(
                        image, decoded, self.refinement.norm_weight, self.refinement.norm_bias,
                        self.refinement.coordinates, c.sigma, c.component, c.posterior_epsilon,
                        c.log_ratio,
                    )
                    log_likelihood = inputs.log_likelihood
                nll = -reduce(log_likelihood, "b h w -> b", "sum")  # eq. 1
            step = Step(decoded, lam, nll, kl)
            yield step if training else Step(*(value.detach() for value in step))
            if not last:
                # dL/dlambda = (d decoded / d lambda)^T grad_decoded + kl_weight dKL/dlambda: one
                # vector-Jacobian product. grad_decoded is d(-log p) / d decoded in closed form.
                gradient = None
                if "grad_posterior" not in c.drop_inputs:
                    cotangents = inputs.grad_decoded, torch.full_like(kl, c.kl_weight)
                    (gradient,) = torch.autograd.grad(
                        (decoded, kl), lam, cotangents, retain_graph=training
                    )
                with torch.set_grad_enabled(training):
                    update, state = self.refinement(inputs.packed, lam, gradient, state)
                    lam = lam + update  # eq. 3

    def noise(
        self, scenes: data.Scenes, index: Tensor, num_steps: int = 0, num_slots: int = 0
    ) -> Tensor:
        """(B, T, K, D) standard normal for scenes `index`: a function of seed, split and scene."""
        c = self.config
        key = draws.make_key("iodine noise", scenes.split, c.seed)
        shape = num_steps or len(self.step_weights()), num_slots or c.num_slots, c.latent_size
        return draws.normal(key, index, shape)

    def step_weights(self) -> list[float]:
        """Weight of each decode's loss (eq. 4); as many as there are decodes in training."""
        n = self.config.num_steps + self.config.extra_decode
        if self.config.step_weights == "t/T":
            return [t / n for t in range(1, n + 1)]
        return [t / (n - 1) for t in range(n)] if n > 1 else [1.0]

    def loss(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Eq. 4, a mean over the batch, and of the last decode: nll, kl, elbo (nats), decoded."""
        total = image.new_zeros(())
        for step, weight in zip(self.infer(image, noise), self.step_weights(), strict=True):
            total = total + weight * (step.nll + self.config.kl_weight * step.kl).mean()
        nll, kl = step.nll.detach().mean(), step.kl.detach().mean()
        return dict(loss=total, nll=nll, kl=kl, elbo=-nll - kl, decoded=step.decoded.detach())


def reconstruct(decoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, C+1, H, W) -> mixture mean (B, C, H, W), masks (B, K, H, W), means (B, K, C, H, W)."""
    means, masks = decoded[:, :, :-1], decoded[:, :, -1].softmax(1)
    return reduce(masks[:, :, None] * means, "b k c h w -> b c h w", "sum"), masks, means


# -- evaluation and figures ------------------------------------------------------------------------


@torch.no_grad()
def score(model: IODINE, scenes: data.Scenes, num_steps: int, num_slots: int, count: int) -> list:
    """Means and standard errors over the first `count` scenes, after each decode."""
    results: list[dict[str, list]] = [{} for _ in range(num_steps)]
    for index in torch.arange(count, device=scenes.device).split(32):
        batch = scenes.scenes(index)
        noise = model.noise(scenes, index, num_steps, num_slots)
        for result, step in zip(results, model.infer(batch.image, noise), strict=True):
            mean, masks, _ = reconstruct(step.decoded)
            # Far beyond the trained number of steps inference can diverge: such a scene has no
            # score, and `left_out` counts it.
            finite = (step.nll + step.kl).isfinite() & masks.isfinite().flatten(1).all(1)
            mean, masks = mean.nan_to_num(), masks.nan_to_num()
            for name, values in dict(
                ari_fg=metrics.ari(batch.masks, masks),
                ari=metrics.ari(batch.masks, masks, foreground=False),
                miou=metrics.miou(batch.masks, batch.present, masks),
                mse=metrics.mse(batch.image, mean),
                elbo=-step.nll - step.kl, nll=step.nll, kl=step.kl,
            ).items():
                values = values.double().where(finite, math.nan)
                result.setdefault(name, []).append(values.cpu())
    return [{k: metrics.mean_stderr(torch.cat(v)) for k, v in r.items()} for r in results]


def evaluate(model: IODINE, scenes: data.Scenes, count: int = 320) -> dict[str, Any]:
    """`metrics` of the trained setting; `settings`: 1 to 2T steps (Fig. 8), more slots (Fig. 9)."""
    steps, slots = len(model.step_weights()), model.config.num_slots
    by_step = score(model, scenes, 2 * steps, slots, count)
    settings = [dict(num_steps=t, num_slots=slots, metrics=m) for t, m in enumerate(by_step, 1)]
    for more in (slots + 2, slots + 4):
        last = score(model, scenes, steps, more, count)[-1]
        settings.append(dict(num_steps=steps, num_slots=more, metrics=last))
    return dict(metrics=by_step[steps - 1], settings=settings)


@torch.no_grad()
def draw(model: IODINE, scenes: data.Scenes, folder: Path, results: dict[str, Any]) -> None:
    """Writes decomposition, refinement, traversals, samples, steps and training .png."""
    config, num_steps = model.config, len(model.step_weights())
    index = torch.arange(6, device=scenes.device)
    batch = scenes.scenes(index)
    steps = list(model.infer(batch.image, model.noise(scenes, index)))
    mean, masks, means = reconstruct(steps[-1].decoded)
    figures.decomposition(
        folder / "decomposition.png", batch.image, mean, batch.masks, masks, means,
        "IODINE takes unseen scenes apart, without ever having seen a mask",
        metrics.ari(batch.masks, masks),
    )

    first = zip(*([part[0] for part in reconstruct(step.decoded)] for step in steps), strict=True)
    figures.refinement(
        folder / "refinement.png", batch.image[0], batch.masks[0], *map(torch.stack, first),
        "Iterative inference: every row refines the one above",
    )

    # The latents of one object's slot that hold the most information, moved one at a time.
    loc, scale = model.posterior(steps[-1].posterior[:1])
    slot = metrics.match(batch.masks[:1], masks[:1])[0, 1:].max()  # -1, the last: nothing matched
    information = model.kl_terms(loc, scale)[0, slot]  # (D,)
    latents = information.topk(min(6, config.latent_size)).indices
    values = torch.linspace(-2, 2, 7, device=loc.device) * math.sqrt(config.prior_variance)
    z = loc.repeat(len(latents) * len(values), 1, 1)  # (R*V, K, D)
    rows = torch.arange(len(z), device=loc.device)
    z[rows, slot, latents.repeat_interleave(len(values))] = values.repeat(len(latents))
    images = rearrange(reconstruct(model.decode(z))[0], "(r v) c h w -> r v c h w", r=len(latents))
    figures.traversals(
        folder / "traversals.png", images, [f"latent {i}" for i in latents.tolist()],
        values.tolist(), "One latent of one slot at a time; the other slots stay as they are",
    )

    key = draws.make_key("iodine samples", config.seed)
    z = draws.normal(key, torch.arange(16, device=loc.device), tuple(loc.shape[1:]))  # (16, K, D)
    mean, masks, _ = reconstruct(model.decode(z * math.sqrt(config.prior_variance)))
    figures.samples(folder / "samples.png", mean, "Samples from the prior, and their masks", masks)

    series = [s for s in results["settings"] if s["num_slots"] == config.num_slots]
    x = [s["num_steps"] for s in series]
    panels = {}
    for name in ("ari_fg", "mse", "kl"):
        m = [s["metrics"][name] for s in series]
        panels[name] = {"": (x, [v["mean"] for v in m], [v["stderr"] for v in m])}
    figures.curves(folder / "steps.png", panels, "refinement steps at test time",
                   "More steps than in training", {"trained": num_steps}, logy=("mse",))

    history = runs.read_log(folder.parent)
    if len(history) > 1:
        x = [record["step"] for record in history]
        panels = {name: {"": (x, [record[name] for record in history], None)}
                  for name in ("elbo", "nll", "kl", "ari_fg")}
        figures.curves(folder / "training.png", panels, "training step",
                       f"Training, preset {config.preset}, scenes of each step")


# -- what the paper shows beyond its main table ----------------------------------------------------


@torch.no_grad()
def ambiguity(model: IODINE, scenes: data.Scenes, folder: Path) -> dict[str, Any]:
    """Section 4.4, Fig. 10: sampled z decide between explanations. Eight inferences per scene.

    `agreement`: ARI (all pixels) between the first segmentation and the seven others, 64 scenes.
    """
    agreements, least, repeats = [], None, 8
    for i in range(64):
        index = torch.full((repeats,), i, device=scenes.device)
        batch = scenes.scenes(index)
        noise = model.noise(scenes, torch.arange(repeats, device=scenes.device) + repeats * i)
        *_, last = model.infer(batch.image, noise)
        mean, masks, means = reconstruct(last.decoded)
        segments = F.one_hot(masks[:1].argmax(1), masks.shape[1]).movedim(-1, 1).bool()
        again = metrics.ari(segments.expand(repeats, -1, -1, -1), masks, foreground=False)
        agreements.append(again[1:].mean())
        if agreements[-1] <= min(agreements):
            least = batch.image, mean, batch.masks, masks, means
    figures.decomposition(folder / "ambiguity.png", *least,
                          "One scene, eight inferences: the least certain of 64 scenes")
    return dict(agreement=metrics.mean_stderr(torch.stack(agreements)))


@torch.no_grad()
def factors(model: IODINE, scenes: data.Scenes, folder: Path) -> dict[str, Any]:
    """Section 4.2, Fig. 5: factors of an object from its slot's latent mean, by linear maps.

    Accuracy for classes, R^2 for numbers. The masks match slots to objects; the first half of 2,048
    scenes fits the maps, the second scores them.
    """
    latents, targets = [], {}
    for index in torch.arange(2048, device=scenes.device).split(64):
        batch = scenes.scenes(index)
        *_, last = model.infer(batch.image, model.noise(scenes, index))
        slots = metrics.match(batch.masks, reconstruct(last.decoded)[1])  # (B, E)
        scene, entity = (batch.present & (slots >= 0))[:, 1:].nonzero().unbind(1)
        loc, _ = model.posterior(last.posterior)
        latents.append(loc[scene, slots[scene, entity + 1]].cpu().numpy())
        for name, values in batch.factors.items():
            targets.setdefault(name, []).append(values[scene, entity + 1].cpu().numpy())
    z, scores = np.concatenate(latents), {}
    for name, parts in targets.items():
        y, half = np.concatenate(parts), len(z) // 2
        if len(np.unique(y, axis=0)) > 1:  # else a constant of this data set
            probe = LinearRegression() if y.dtype.kind == "f" else LogisticRegression(max_iter=1000)
            scores[name] = float(probe.fit(z[:half], y[:half]).score(z[half:], y[half:]))
    return dict(scores=scores, objects=len(z))


EXPERIMENTS = {"ambiguity": ambiguity, "factors": factors}


# -- training --------------------------------------------------------------------------------------


def learning_rate(config: Config, step: int) -> float:
    """Warm-up, then exponential decay to lr * lr_final at lr_horizon, constant after it."""
    lr = config.lr * config.lr_final ** min(step / config.lr_horizon, 1.0)
    if config.lr_reference_batch:
        lr *= math.sqrt(config.batch_size / config.lr_reference_batch)
    return lr * min(1.0, (step + 1) / (config.lr_warmup + 1))


def check(config: Config) -> None:
    """UserError, in one line, where the options cannot be."""
    options.check(config, EXPERIMENTS)
    options.at_least_one(
        config, "num_slots", "num_steps", "latent_size", "decoder_channels", "decoder_kernel",
        "refinement_channels", "refinement_kernel", "refinement_stride", "mlp_sizes", "lr_horizon",
    )
    options.at_least_zero(config, "lstm_size", "kl_weight", "initial_std", "posterior_epsilon",
                          "beta1", "lr_warmup", "lr_reference_batch")
    options.positive(config, "sigma", "prior_variance", "init_gain", "update_gain", "clip",
                     "lr_final")
    options.require(config.beta1 < 1, f"--beta1 must be below 1, not {config.beta1}")
    for name in ("decoder_kernel", "refinement_kernel"):
        size = getattr(config, name)
        options.require(size % 2 == 1, f"{options.option(name)} must be odd, not {size}")
    for name in config.drop_inputs:
        options.require(name in INPUTS, f"--drop-inputs {name}: choose from {', '.join(INPUTS)}")
    try:
        scenes = data.make(config.dataset)
        kernels.use(config.kernels)
        kernels.backend(options.pick_device(config.device))  # no Triton on a CPU
    except (ValueError, RuntimeError) as error:
        raise options.UserError(error) from None
    smallest = min(scenes.height, scenes.width)
    options.require(config.decoder_kernel <= smallest,
                    f"--decoder-kernel {config.decoder_kernel}: images are {smallest} pixels")


def build(config: Config, scenes: data.Scenes) -> IODINE:
    """The model for these scenes, initialised from the seed."""
    torch.manual_seed(config.seed)
    model = IODINE(config, scenes.num_channels, scenes.height, scenes.width).to(scenes.device)
    on_cuda = scenes.device.type == "cuda"
    return model.to(memory_format=torch.channels_last) if on_cuda else model


def load_model(path: str | Path, device: str = "cpu") -> IODINE:
    """The trained model of a checkpoint (a file or a run's folder), ready for `infer`."""
    content = load(path)
    config = options.saved_config(Config, content, path)
    model = build(config, data.make(config.dataset, device=device))
    model.load_state_dict(content["model"])
    return model.eval()


def train(config: Config) -> dict[str, Any]:
    """Trains one run (or goes on with it), evaluates it; returns the content of evaluation.json."""
    check(config)
    device = runs.set_up(config)
    scenes = data.make(config.dataset, "train", config.seed, device)
    model = build(config, scenes)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, betas=(config.beta1, 0.999), fused=True)
    done = dict(steps=0, minutes=0.0, skipped=0)
    if config.resume:
        saved = load(config.resume)
        model.load_state_dict(saved["model"])
        if not (config.eval_only or config.experiment):
            optimizer.load_state_dict(saved["optimizer"])
        done = dict(steps=saved["step"], minutes=saved["minutes"], skipped=saved["skipped"])
    leader, folder = runs.rank() == 0, Path()
    if leader:
        folder = runs.open_folder(config, "iodine")
        default = make_config(config.preset, config.variant)
        size = sum(p.numel() for p in parameters)
        runs.header(f"IODINE, {size:,} parameters", config, default, device, folder)
    if config.eval_only or config.experiment:
        return finish(config, model, device, folder, done) if leader else {}
    if config.compile:
        model.decoder.compile()
        model.refinement.compile()
    amp = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")

    def forward_backward(image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad()
        with amp:
            parts = model.loss(image, noise)
        parts["loss"].backward()
        return parts

    def save() -> float:
        if leader:
            runs.save_checkpoint(folder, "iodine", config, model=model.state_dict(),
                                 optimizer=optimizer.state_dict(), step=step,
                                 minutes=done["minutes"], skipped=done["skipped"])
        return time.monotonic()

    if config.cuda_graph:
        forward_backward = runs.cuda_graph(forward_backward)
    share = config.batch_size // runs.world_size()  # this process's scenes of each step
    step, bad_in_a_row = done["steps"], 0
    if leader:
        runs.read_log(folder, last_step=step)
    last_save = save()
    started = last_save - 60 * done["minutes"]
    with runs.StopFlag() as stop, runs.Progress(folder, config, step) as progress:
        while step < config.steps and not runs.any_process(
            bool(stop) or done["minutes"] >= (config.minutes or math.inf), device
        ):
            first = step * config.batch_size + runs.rank() * share
            index = torch.arange(first, first + share, device=device)
            batch = scenes.scenes(index)
            parts = forward_backward(batch.image, model.noise(scenes, index))
            runs.average([p.grad for p in parameters if p.grad is not None])
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            lr = optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            step += 1
            if norm.isfinite():
                optimizer.step()
                bad_in_a_row = 0
            else:  # parameters stay as they are; several in a row mean that the run is lost
                done["skipped"], bad_in_a_row = done["skipped"] + 1, bad_in_a_row + 1
                options.require(bad_in_a_row < 10, f"step {step}: 10 gradients in a row not finite "
                                f"(loss {parts['loss']:.4g}); last checkpoint in {folder}")
            done |= dict(steps=step, minutes=(time.monotonic() - started) / 60)
            if step % config.log_every == 0:
                _, masks, _ = reconstruct(parts.pop("decoded").nan_to_num())
                parts["ari_fg"] = metrics.ari(batch.masks, masks).nanmean()
                means = torch.stack([value.detach().float() for value in parts.values()])
                runs.average([means])
                if leader:
                    progress.report(dict(
                        step=step, **dict(zip(parts, means.tolist(), strict=True)),
                        grad_norm=norm.item(), lr=lr, skipped=done["skipped"],
                        seconds=60 * done["minutes"],
                    ))
            if time.monotonic() - last_save > config.checkpoint_seconds:
                last_save = save()
    save()
    if runs.any_process(bool(stop), device):
        raise KeyboardInterrupt(f"stopped after step {step}; go on with --resume {folder}")
    return finish(config, model, device, folder, done) if leader else {}


def finish(
    config: Config, model: IODINE, device: torch.device, folder: Path, done: dict[str, Any]
) -> dict[str, Any]:
    """Evaluates on test scenes, writes evaluation.json and the figures, says what was reached."""
    scenes = data.make(config.dataset, "test", config.seed, device)
    if config.experiment:
        result = EXPERIMENTS[config.experiment](model, scenes, folder / "figures")
        runs.write(folder / f"{config.experiment}.json", result)
        print(json.dumps(result, indent=1))
        return result
    with runs.announced("evaluating 320 test scenes"):
        results = evaluate(model, scenes)
    evaluation = runs.evaluation("iodine", config, device, **done, **results)
    runs.write(folder / "evaluation.json", evaluation)
    with runs.announced("drawing figures"):
        draw(model, scenes, folder / "figures", results)
    m = {name: math.nan if score["mean"] is None else score["mean"]
         for name, score in results["metrics"].items()}
    print(f"reached  ARI-FG {m['ari_fg']:.3f}, mse {m['mse']:.4f}, elbo {m['elbo']:.1f} nats"
          f" after {done['steps']:,} steps in {done['minutes']:.1f} min")
    print(f"look at  {folder / 'figures' / 'decomposition.png'}")
    return evaluation


def load(path: str) -> dict[str, Any]:
    """A checkpoint of this model."""
    return runs.load_checkpoint(path, "iodine")


if __name__ == "__main__":
    options.main(Config, make_config, load, train)
