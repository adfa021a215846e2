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
#     "filelock>=3.14",
#     "pillow>=10.0",
# ]
# ///
"""IODINE: Multi-Object Representation Learning with Iterative Variational Inference.

Greff et al., ICML 2019. A scene is K slots. Each slot is decoded alone into a picture of an object
and a mask, the masks compete for pixels; a network f refines all slots' posteriors T - 1 times:

    z_k ~ N(0, 1);   mu_k, a_k = decoder(z_k);   m = softmax_k(a)
    p(x|z) = prod_i sum_k m_ik prod_c N(x_ic; mu_ikc, sigma^2)                            eq. 1
    L^(t) = KL(q(z|x) || p(z)) - log p(x|z),   z_k ~ q(z_k|x) given by lambda_k^(t)       eq. 2
    lambda_k^(t+1) = lambda_k^(t) + f(images of slot k, lambda_k^(t), dL^(t)/dlambda_k)   eq. 3
    minimise sum_t (t/T) L^(t) by gradient descent through all T steps                    eq. 4

    python iodine.py                                         the quick preset, two CPU cores
    python iodine.py --preset tetrominoes_short      41 to 74 minutes; _long: 38 to 46 more

A run writes config.json, metrics.jsonl, checkpoint.pt, evaluation.json and figures/ to
runs/iodine-<preset>-<seed>/. `quick` (ten seeds): ARI-FG 0.969 (0.965 to 0.978), mIoU 0.952;
`tetrominoes_long` (three): 0.958 (0.934 to 0.965), 0.961. Config's defaults are the paper's
(appendix C); `quick`:

    field                                 paper            quick
    dataset, num_slots                    tetrominoes, 4   mini_sprites_16_shaded, 6: a spare slot
    flat_colors, color_steps              0, none          0.5, 1320 to 1760: masks draw; logits x 4
    sigma, sigma_start, sigma_steps       0.1, 0, none     0.2, 0.4, 660 to 2200: sharp loses slots
    weight of the KL (`kl_weight`)        1                (0.1 / sigma)^2: 1/16, at the end 1/4
    num_steps, test_steps                 5, the same      6, 8: more decodes help at test time
    step_weights                          t/T              from_zero: the first decode is blind
    latent_size, refinement_channels      32, 3 x 32       16, (32, 64)
    decoder_channels, decoder_kernel      4 x 32, 5        3 x 32, 1
    coordinate_gain, update_gain          1, 1             5, 0.1: sharp edges, small updates
    refinement_kernel, refinement_stride  5, 1             3, 2: smaller images
    pooling, activation                   mean, elu        max, relu: objects are small; faster
    lr, lr_warmup, lr_final, lr_steps     3e-4, 0, 1, any  3e-3, 100, 0.067, 1100 to 2200
    batch_size, steps                     32, 1e6          16, 2200
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

import data
import kernels
from data import draws, figures, metrics, processes, runs

# B batch, K slots, N = B K, T decodes, D latent, C H W image, F input channels of the refinement
# network, R its convolutions' channels, h w their output, M mlp_size; O channels of the decoder

INPUTS = ("image", "means", "mask", "mask_logits", "mask_posterior", "grad_means", "grad_mask",
          "log_likelihood", "leave_one_out", "coordinates", "posterior", "grad_posterior")

@dataclass
class Config(runs.RunConfig):
    """Defaults: the paper's (app. C.3, Tetris); PRESETS override them; lr, steps: RunConfig."""

    dataset: str = "tetrominoes"  # one of data.DATASETS
    train_dataset: str = ""  # scenes to train on; empty: those of `dataset`
    # generative model
    num_slots: int = 4  # K
    latent_size: int = 32  # D, of one slot; the tables of C.2 and C.3 print 2 D, the size of lambda
    sigma: float = 0.1  # standard deviation of a pixel's colours in a slot
    sigma_start: float = 0.0  # > 0: sigma falls from it, over training and decodes; see kl_weight
    sigma_steps: tuple[int, int] = (0, 0)  # training steps between which sigma falls, exponentially
    decoder: Literal["broadcast", "deconv"] = "broadcast"  # deconv: the ablation of section 4.3
    decoder_channels: tuple[int, ...] = (32, 32, 32, 32)  # hidden layers
    decoder_kernel: int = 5  # pixels; of broadcast alone, as decoder_channels, coordinate_gain
    coordinate_gain: float = 1.0  # the decoder's coordinates run from -this to this
    flat_colors: float = 0.0  # 0: off; else Flat's final `shading`, the factor on decoded colours
    color_steps: tuple[int, int] = (0, 0)  # training steps between which it rises from 0
    # inference
    num_steps: int = 5  # T, decodes of a training step
    test_steps: int = 0  # T of evaluation; 0: num_steps. Training's noise has the larger T, too
    step_weights: Literal["t/T", "from_zero"] = "t/T"  # from_zero, as released: (t-1)/(T-1)
    pool: int = 1  # images are pooled by this before all else; see `infer`
    refinement_channels: tuple[int, ...] = (32, 32, 32)  # convolutions of the refinement network
    refinement_kernel: int = 5  # pixels
    refinement_stride: int = 1  # of each of them
    pooling: Literal["mean", "max"] = "mean"  # over pixels, after the convolutions
    mlp_size: int = 128  # of the layer after the pooling
    lstm_size: int = 0  # 0: none (the paper's Tetris)
    drop_inputs: tuple[Literal[*INPUTS], ...] = ()  # what the refinement network does not see
    activation: Literal["elu", "relu"] = "elu"  # after every hidden layer
    update_gain: float = 1.0  # factor on the initial weights of the layer that updates lambda
    # optimisation
    clip: float = 5.0  # norm of the global gradient
    lr_warmup: int = 0  # steps of linear warm-up
    lr_final: float = 1.0  # lr falls exponentially to this share of itself ...
    lr_steps: tuple[int, int] = (0, 1_000_000)  # ... between these steps, and stays there


DSPRITES = dict(num_slots=6, latent_size=16, lstm_size=128)  # appendix C.2
QUICK = dict(
    dataset="mini_sprites_16_shaded", num_slots=6, latent_size=16, sigma=0.2, sigma_start=0.4,
    sigma_steps=(660, 2200), flat_colors=0.5, color_steps=(1320, 1760), num_steps=6,
    decoder_channels=(32, 32, 32), decoder_kernel=1, coordinate_gain=5.0, test_steps=8,
    step_weights="from_zero", refinement_channels=(32, 64), refinement_kernel=3,
    refinement_stride=2, pooling="max", activation="relu", update_gain=0.1, batch_size=16,
    lr=3e-3, lr_warmup=100, lr_final=0.067, lr_steps=(1100, 2200), steps=2200,
)
SHORT = QUICK | dict(sigma_steps=(1000, 4000), color_steps=(1200, 2000), lr_steps=(2000, 4000),
                     steps=4000)
PRESETS: dict[str, dict[str, Any]] = {
    "quick": QUICK,
    "quick_same_color": QUICK | dict(  # tested where hue says nothing, trained where it does
        dataset="mini_sprites_16_same_color", train_dataset="mini_sprites_16_shaded",
        lr_steps=(1100, 3100), steps=3100),
    "shapes_short": QUICK | dict(  # binary shapes, after training on shapes of several greys
        dataset="shapes", train_dataset="shapes_levels", num_slots=5, sigma_steps=(900, 3000),
        color_steps=(1800, 2400), lr_steps=(1500, 4600), steps=4600),
    "tetrominoes_short": SHORT | dict(  # larger images: f has one more convolution
        dataset="tetrominoes", train_dataset="tetrominoes_distinct", num_slots=5,
        refinement_channels=(32, 64, 64)),
    "multi_dsprites_short": SHORT | dict(dataset="multi_dsprites_colored_on_grayscale", pool=4),
    "multi_dsprites_binarized_short": SHORT | dict(num_slots=5, pool=4,
        dataset="multi_dsprites_binarized", train_dataset="multi_dsprites_levels"),
    "solids_short": SHORT | dict(  # the ground is brighter on one side: colours are never flat
        dataset="solids_32", num_slots=8, sigma=0.1, sigma_start=0.2, sigma_steps=(500, 2000),
        color_steps=(0, 0), lr_steps=(1500, 3000), steps=3000),
    "tetrominoes": dict(),  # appendix C.3: the defaults
    "multi_dsprites": dict(dataset="multi_dsprites_colored_on_grayscale", **DSPRITES),
    "multi_dsprites_binarized": dict(dataset="multi_dsprites_binarized", **DSPRITES),
}
PRESETS |= {f"{name}_long": PRESETS[f"{name}_short"] | dict(  # from kept weights, Adam anew
    init=f"notebooks/weights/iodine-{name}_short.pt", sigma_steps=(0, 0), color_steps=(0, 0),
    lr_steps=(500, 4000), steps=4000,
) | changes for name, changes in dict(
    tetrominoes={}, multi_dsprites=dict(pool=2), solids=dict(test_steps=12)).items()}


def make_config(preset: str = "quick", **overrides: Any) -> Config:
    """A preset's Config; UserError for an unknown name."""
    return runs.make_config(Config, PRESETS, preset, **overrides)


# -- the mixture of slots, and what the refinement network sees of it ------------------------------


def log_density(image: Tensor, means: Tensor, sigma: Tensor) -> Tensor:
    """log prod_c N(x_c; mu_kc, sigma^2) of every pixel in every slot: (B, K, 1, H, W), nats."""
    squares = (image[:, None] - means).square().sum(2, keepdim=True)  # (B, K, 1, H, W)
    return squares * (-0.5 / sigma**2) - means.shape[2] * (sigma.log() + math.log(2 * math.pi) / 2)


def mixture_log_likelihood(image: Tensor, decoded: Tensor, sigma: Tensor) -> Tensor:
    """Eq. 1: log p(x_i|z) = log sum_k m_ik N(x_i; mu_ik, sigma^2) of every pixel, (B, H, W), nats.

    image (B, C, H, W) in [0, 1]; decoded (B, K, C+1, H, W): means, then the mask logit.
    """
    # Paper: silent. Released code, and here: one mixture a pixel, its colours multiplied before.
    means, mask_logits = decoded[:, :, :-1], decoded[:, :, -1:]
    joint = mask_logits.log_softmax(1) + log_density(image, means, sigma)  # log m_k N_k
    return joint.logsumexp(1)[:, 0]


def logsumexp_of_others(x: Tensor) -> Tensor:
    """log sum_{j != k} exp(x_j) along axis 1; an only slot is not left out.

    Sums before and after k: the total minus slot k is mere rounding where that slot owns a pixel.
    """
    *first, last = x.unbind(1)
    if not first:
        return x
    before = [*accumulate(first, torch.logaddexp)]  # slots 0 to k
    after = [*accumulate([last, *first[:0:-1]], torch.logaddexp)][::-1]  # slots k + 1 to K - 1
    both = map(torch.logaddexp, before[:-1], after[1:])
    return torch.stack([after[0], *both, before[-1]], 1)


def refinement_inputs(
    image: Tensor, decoded: Tensor, norm_weight: Tensor, norm_bias: Tensor, coordinates: Tensor,
    sigma: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ten image-sized inputs of appendix C, in its order: (B, K, F, H, W), F = 17 in colour.

    Also log p(x|z) (B, H, W), nats, and its negative's gradient wrt decoded (B, K, C+1, H, W).
    SG: no gradient flows back from the lines under no_grad. LN: of a slot, over channels and
    pixels; norm_weight and norm_bias (C+3) are a gain and a bias for each normalised channel.
    """
    means, mask_logits = decoded[:, :, :-1], decoded[:, :, -1:]  # (B, K, C, H, W), (B, K, 1, H, W)
    log_masks, log_n = mask_logits.log_softmax(1), log_density(image, means, sigma)
    joint = log_masks + log_n  # log m_k N_k
    mask = log_masks.exp()
    mask_posterior = log_n.softmax(1)  # N_k / sum_j N_j: who fits best, whatever the masks say
    log_likelihood = joint.logsumexp(1, keepdim=True).expand_as(joint)  # eq. 1, (B, K, 1, H, W)
    # Paper: dL/dm_k, P = p(x|z), Q = p(x|z_{i != k}). Released code: dL/da_k, log P, log of the
    # ratio of P and Q. Here: dL/da_k, log P, log Q: densities underflow, and 1/m_k overflows.
    with torch.no_grad():  # SG
        r = joint.softmax(1)  # responsibilities m_k N_k / p(x|z)
        # d(-log p)/dmu_k = -(m_k / p) dN_k/dmu_k, where dN_k/dmu_k = N_k (x - mu_k) / sigma^2
        grad_means = r * (means - image[:, None]) / sigma**2
        # d(-log p)/da_k = -sum_j (N_j / p) dm_j/da_k, where dm_j/da_k = m_j ([j = k] - m_k)
        grad_mask = mask - r
        # Q = sum_{j != k} m_j N_j / sum_{j != k} m_j: the other masks sum to 1 again (paper silent)
        leave_one_out = logsumexp_of_others(joint) - logsumexp_of_others(log_masks)
        stopped = grad_means, grad_mask, log_likelihood, leave_one_out
        normalised = torch.cat([F.layer_norm(x, x.shape[2:]) for x in stopped], 2)  # LN
    image, coordinates = (x.expand(*joint.shape[:2], -1, -1, -1)
                          for x in (image[:, None], coordinates))
    packed = torch.cat([
        image, means, mask, mask_logits, mask_posterior,
        normalised * norm_weight[:, None, None] + norm_bias[:, None, None], coordinates,
    ], 2)  # (B, K, F, H, W)
    return packed, log_likelihood[:, 0, 0], torch.cat([grad_means, grad_mask], 2)


def input_widths(channels: int) -> dict[str, int]:
    """Channels of each image-sized input, in the order of `refinement_inputs`."""
    colours = dict.fromkeys(("image", "means", "grad_means"), channels)
    return dict.fromkeys(INPUTS[:10], 1) | colours | dict(coordinates=2)


# -- building blocks -------------------------------------------------------------------------------


def coordinate_maps(height: int, width: int) -> Tensor:
    """(2, H, W): rows, then columns, each from -1 to 1."""
    rows, cols = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"))


def share(step: int, between: tuple[int, int]) -> float:
    """0 until the first of two steps, 1 from the second on, and linear between them."""
    first, second = between
    return 1.0 if step >= second else max(step - first, 0) / max(second - first, 1)


ACTIVATIONS = {"elu": nn.ELU(inplace=True), "relu": nn.ReLU(inplace=True)}


class Flat(nn.Module):
    """One colour and logit a slot, linear in z, to which the decoder's are added: colours times
    `shading`, logits times four. While colours are flat, only masks draw shapes."""

    def __init__(self, config: Config, channels: int):
        super().__init__()
        self.linear = nn.Linear(config.latent_size, channels + 1)
        self.register_buffer("shading", torch.tensor(0.0))

    def forward(self, z: Tensor, decoded: Tensor) -> Tensor:  # (N, D), (N, C+1, H, W) -> the same
        colors, logits = decoded[:, :-1] * self.shading, decoded[:, -1:] * 4
        flat = kernels.full_precision(self.linear, z)[:, :, None, None]
        return torch.cat([colors, logits], 1) + flat


class BroadcastDecoder(nn.Module):
    """Spatial broadcast decoder (section 2.1, Fig. 2; tables of appendix C)."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        sizes, k = config.decoder_channels, config.decoder_kernel
        coordinates = config.coordinate_gain * coordinate_maps(height, width)
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.first = kernels.Conv2d(config.latent_size + 2, sizes[0], k)
        self.hidden = nn.ModuleList(kernels.Conv2d(i, o, k) for i, o in pairwise(sizes))
        self.last = kernels.Conv2d(sizes[-1], channels + 1, k)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, z: Tensor, pool: int = 1) -> Tensor:  # (N, D) -> (N, C+1, H/pool, W/pool)
        # The first layer sees z at every pixel and the coordinates; that image is never built.
        taps_z, taps_xy = self.first.weight.split([z.shape[1], 2], 1)
        coordinates = F.avg_pool2d(self.coordinates[None], pool)  # the middles of larger pixels
        response = F.conv2d(coordinates, taps_xy, self.first.bias, padding="same")
        response = self.first.layout(response)[0]  # (O, H, W)
        x = self.activation(kernels.broadcast_conv(z, taps_z, response))
        for conv in self.hidden:
            x = self.activation(conv(x))
        return kernels.full_precision(self.last, x)


class DeconvDecoder(nn.Module):
    """The ablation of section 4.3 (table "Deconv Decoder" of appendix C.1)."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        self.size, activation = (height, width), ACTIVATIONS[config.activation]
        # Paper: 8x8 doubled four times, for 128x128. Here: until it covers the image, then cropped.
        doublings = max(1, math.ceil(math.log2(max(height, width) / 8)))
        layers = [nn.Linear(config.latent_size, 512), activation, nn.Linear(512, 512), activation,
                  nn.Unflatten(1, (8, 8, 8))]
        for i in [8, *[64] * (doublings - 1)]:
            layers += [nn.ConvTranspose2d(i, 64, 5, 2, padding=2, output_padding=1), activation]
        self.hidden = nn.Sequential(*layers, kernels.Conv2d(64, 64, 5), activation)
        self.last = kernels.Conv2d(64, channels + 1, 5)

    def forward(self, z: Tensor, pool: int = 1) -> Tensor:  # (N, D) -> (N, C+1, H, W); pool: 1
        decoded = kernels.full_precision(self.last, self.hidden(z))
        return decoded[..., : self.size[0], : self.size[1]]


class RefinementNetwork(nn.Module):
    """f_phi of eq. 3 (tables "Refinement Network" of appendix C), the same for every slot."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        c, lam_size = config, 2 * config.latent_size
        coordinates = coordinate_maps(height // c.pool, width // c.pool)
        self.register_buffer("coordinates", coordinates, persistent=False)
        widths = input_widths(channels)
        # An input that is left out is all zeros, so that its weights have no effect.
        keep = [torch.full((w, 1, 1), float(n not in c.drop_inputs)) for n, w in widths.items()]
        self.register_buffer("keep", torch.cat(keep) if c.drop_inputs else None, persistent=False)
        self.keep_lam, self.keep_gradient = (n not in c.drop_inputs for n in INPUTS[10:])
        # Shared over steps: gradients of means (C) and logit, log-likelihood, leave-one-out.
        self.norm_weight = nn.Parameter(torch.ones(channels + 3))
        self.norm_bias = nn.Parameter(torch.zeros(channels + 3))
        self.norm_grad = nn.LayerNorm(lam_size)  # over means and raw scales together
        sizes = sum(widths.values()), *c.refinement_channels  # F, ...
        self.convs = nn.ModuleList(kernels.Conv2d(i, o, c.refinement_kernel, c.refinement_stride)
                                   for i, o in pairwise(sizes))
        self.activation, self.pooling = ACTIVATIONS[c.activation], c.pooling
        self.mlp = nn.Linear(sizes[-1], c.mlp_size)
        size = c.mlp_size + 2 * lam_size
        self.gates = nn.Linear(size + c.lstm_size, 4 * c.lstm_size) if c.lstm_size else None
        self.head = nn.Linear(c.lstm_size or size, lam_size)

    def forward(self, packed: Tensor, lam: Tensor, gradient: Tensor, state: Any) -> Any:
        """(B, K, F, H, W), (B, K, 2D) twice, LSTM state -> update of lambda (B, K, 2D), state."""
        x = packed.flatten(0, 1)
        x = x if self.keep is None else x * self.keep
        for conv in self.convs:
            x = self.activation(conv(x))  # (N, R, h, w)
        x = x.mean((-2, -1)) if self.pooling == "mean" else x.amax((-2, -1))  # (N, R)
        x = self.activation(self.mlp(x)).unflatten(0, packed.shape[:2])  # (B, K, M)
        x = torch.cat([x, lam * self.keep_lam, self.norm_grad(gradient) * self.keep_gradient], -1)
        if self.gates is not None:  # LSTM with a forget gate (Gers et al. 2000), its bias 0
            zeros = x.new_zeros(*x.shape[:2], self.head.in_features)  # alg. 1, h^(1) = 0
            hidden, cell = (zeros, zeros) if state is None else state
            i, g, f, o = self.gates(torch.cat([x, hidden], -1)).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            x = o.sigmoid() * cell.tanh()
            state = x, cell
        return self.head(x), state


# -- the model -------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One decode of Algorithm 1."""

    decoded: Tensor  # (B, K, C+1, H, W) means and mask logits; in training of the pooled size
    posterior: Tensor  # (B, K, 2D) lambda of z's q: means, raw scales; `posterior()` reads it
    nll: Tensor  # (B,) -log p(x|z), nats per pooled image
    kl: Tensor  # (B,) KL(q(z|x) || p(z)), nats per image


class IODINE(nn.Module):
    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        self.config = config
        decoder = BroadcastDecoder if config.decoder == "broadcast" else DeconvDecoder
        self.decoder = decoder(config, channels, height, width)
        self.decoder.flat = Flat(config, channels) if config.flat_colors else None  # see decode
        self.refinement = RefinementNetwork(config, channels, height, width)
        self.initial = nn.Parameter(torch.zeros(2 * config.latent_size))  # lambda^(1)
        self.register_buffer("sigma", torch.tensor(config.sigma))  # the last decode's, see set_step
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Paper: silent. Released code, and here: truncated normal, std 1/sqrt(fan-in) for ELU."""
        gain = 1.4 if self.config.activation == "relu" else 1.0  # relu halves the mean square
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                transposed = isinstance(module, nn.ConvTranspose2d)  # its weight is (in, out, k, k)
                fan_in = module.weight[:, 0].numel() if transposed else module.weight[0].numel()
                std = gain / math.sqrt(fan_in)
                nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.refinement.head.weight.mul_(self.config.update_gain)
            if self.config.flat_colors:
                self.decoder.flat.linear.weight.mul_(0.3 / gain)  # colours near black
                self.decoder.last.weight[:-1] = 0  # shading fades in from none, not from random
            self.initial[self.config.latent_size :] = math.log(math.expm1(1))  # app. C: q = N(0, 1)

    def posterior(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """lambda (..., 2D) -> mean and standard deviation of q(z_k|x), each (..., D)."""
        loc, raw = lam.chunk(2, -1)
        # Paper: silent. Released code: softplus gives the variance. Here: the standard deviation.
        return loc, F.softplus(raw)

    def kl_terms(self, loc: Tensor, scale: Tensor) -> Tensor:
        """KL(N(loc, scale^2) || N(0, 1)) of every latent, nats; same shape."""
        return (scale.square() + loc.square() - 1) / 2 - scale.log()

    def decode(self, z: Tensor, pool: int = 1) -> Tensor:
        """g_theta, each slot alone: (B, K, D) -> means, mask logits (B, K, C+1, H/pool, W/pool)."""
        rows, flat = z.flatten(0, 1), self.decoder.flat  # (B*K, D)
        decoded = self.decoder(rows, pool)
        return (decoded if flat is None else flat(rows, decoded)).unflatten(0, z.shape[:2])

    def set_step(self, step: int) -> None:
        """Sets what changes with the training step: sigma and the shading of flat colours."""
        c = self.config
        start = c.sigma_start or c.sigma
        self.sigma.fill_(start * (c.sigma / start) ** share(step, c.sigma_steps))
        if c.flat_colors:
            self.decoder.flat.shading.fill_(c.flat_colors * share(step, c.color_steps))

    def sigmas(self, num_steps: int) -> list[Tensor]:
        """Of each decode: from sigma_start to self.sigma, which training's last refinement sees."""
        start, between = self.config.sigma_start or self.sigma, (0, self.config.num_steps - 2)
        return [start * (self.sigma / start) ** share(t, between) for t in range(num_steps)]

    def kl_weight(self, sigma: Tensor) -> Tensor | float:
        """1; with sigma_start, the KL weighs against squared errors as it does at sigma 0.1."""
        return (0.1 / sigma) ** 2 if self.config.sigma_start else 1.0

    def infer(self, image: Tensor, noise: Tensor, num_steps: int = 0,
              training: bool = False) -> list[Step]:
        """Algorithm 1, Fig. 3: T = num_steps decodes (0: the config's), no refinement after them.

        image (B, C, H, W) in [0, 1], or a sequence (B, T, C, H, W), which sets T: decode t predicts
        frame t (app. A.1). noise (B, T or more, K, D), normal. With `training` the steps are one
        graph; else each is detached, so memory does not grow with T. config.pool: all of this, nll
        too, is of the pooled image; outside training `decoded` is then drawn whole.
        """
        c, f, steps, state = self.config, self.refinement, [], None
        num_steps = num_steps or (c.num_steps if training else c.test_steps or c.num_steps)
        image = F.avg_pool2d(image.flatten(0, -4), c.pool).unflatten(0, image.shape[:-3])
        frames = [image] * num_steps if image.ndim == 4 else image.unbind(1)  # (B, C, H, W) each
        fused = kernels.backend(image) == "triton"  # then kernels/ replaces these two functions:
        eq_1 = kernels.mixture_log_likelihood if fused else mixture_log_likelihood
        inputs = kernels.refinement_inputs if fused else refinement_inputs
        with torch.set_grad_enabled(training):
            lam = self.initial.expand(len(image), noise.shape[2], -1)  # (B, K, 2D), slots alike
            for t, (frame, sigma) in enumerate(zip(frames, self.sigmas(len(frames)), strict=True)):
                with torch.enable_grad():  # for dL/dlambda; `inputs` gives d(-log p)/d decoded
                    lam = lam if training else lam.detach().requires_grad_()
                    loc, scale = self.posterior(lam)
                    z = loc + scale * noise[:, t]  # eq. 2, (B, K, D)
                    decoded = self.decode(z, c.pool)
                    kl = reduce(self.kl_terms(loc, scale), "b k d -> b", "sum")
                if last := t == len(frames) - 1:
                    log_p = eq_1(frame, decoded, sigma)
                else:
                    packed, log_p, grad_decoded = inputs(frame, decoded, f.norm_weight, f.norm_bias,
                                                         f.coordinates, sigma)
                nll = -reduce(log_p, "b h w -> b", "sum")  # eq. 1
                whole = decoded if training or c.pool == 1 else self.decode(z)
                step = Step(whole, lam, nll, kl)
                steps.append(step if training else Step(*(value.detach() for value in step)))
                if last:
                    return steps
                # dL/dlambda = (d decoded / d lambda)^T grad_decoded + kl_weight dKL/dlambda, one
                # vector-Jacobian product; SG: without create_graph it is a constant.
                weight = self.kl_weight(sigma) * torch.ones_like(kl)
                (gradient,) = torch.autograd.grad((decoded, kl), lam, (grad_decoded, weight),
                                                  retain_graph=training)
                update, state = f(packed, lam, gradient, state)
                lam = lam + update  # eq. 3

    def noise(self, scenes: data.Scenes, index: Tensor, num_steps: int = 0,
              num_slots: int = 0) -> Tensor:
        """(B, T, K, D) standard normal: a function of scenes `index`, seed, split, T and K."""
        c = self.config
        shape = num_steps or max(c.num_steps, c.test_steps), num_slots or c.num_slots, c.latent_size
        return draws.normal(draws.make_key("iodine noise", scenes.split, c.seed), index, shape)

    def loss(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Eq. 4 with kl_weight, a batch's mean; the last decode's nll, kl, elbo (nats), decoded."""
        c, total = self.config, image.new_zeros(())
        steps = self.infer(image, noise, training=True)
        blind = c.step_weights == "from_zero" and len(steps) > 1  # the first decode has weight 0
        for t, (step, sigma) in enumerate(zip(steps, self.sigmas(len(steps)), strict=True), 1):
            weight = (t - blind) / (len(steps) - blind)  # t/T, or (t-1)/(T-1)
            total = total + weight * (step.nll + self.kl_weight(sigma) * step.kl).mean()
        nll, kl = step.nll.detach().mean(), step.kl.detach().mean()
        return dict(loss=total, nll=nll, kl=kl, elbo=-nll - kl, decoded=step.decoded.detach())


def reconstruct(decoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, C+1, H, W) -> mixture mean (B, C, H, W), masks (B, K, H, W), means (B, K, C, H, W)."""
    means, masks = decoded[:, :, :-1], decoded[:, :, -1].softmax(1)
    return reduce(masks[:, :, None] * means, "b k c h w -> b c h w", "sum"), masks, means


# -- evaluation and figures ------------------------------------------------------------------------


def score(model: IODINE, scenes: data.Scenes, num_steps: int, num_slots: int, count: int) -> list:
    """{metric: `mean_stderr`} of the first scenes after each decode; nll at that decode's sigma."""
    results: list[dict[str, list]] = [{} for _ in range(num_steps)]
    for index in torch.arange(min(count, scenes.count), device=scenes.device).split(32):
        batch = scenes.scenes(index)
        noise = model.noise(scenes, index, num_steps, num_slots)
        for result, step in zip(results, model.infer(batch.image, noise, num_steps), strict=True):
            mean, masks, _ = reconstruct(step.decoded.nan_to_num())
            # Far beyond the trained T inference can diverge: such a scene has no score.
            finite = (step.nll + step.kl + step.decoded.flatten(1).sum(1)).isfinite().cpu()
            values = metrics.segmentation(batch, mean, masks)
            values |= dict(elbo=-step.nll - step.kl, nll=step.nll, kl=step.kl)
            for name, value in values.items():
                result.setdefault(name, []).append(value.cpu().double().where(finite, math.nan))
    return [{k: metrics.mean_stderr(torch.cat(v)) for k, v in r.items()} for r in results]


def evaluate(model: IODINE, scenes: data.Scenes, count: int = 320) -> dict[str, Any]:
    """`metrics` after test_steps decodes; `settings`: 1 to 2T (Fig. 8), more slots (Fig. 9)."""
    c = model.config
    steps, slots = c.test_steps or c.num_steps, c.num_slots
    by_step = score(model, scenes, max(2 * c.num_steps, steps), slots, count)
    settings = [dict(num_steps=t, num_slots=slots, metrics=m) for t, m in enumerate(by_step, 1)]
    settings += [dict(num_steps=steps, num_slots=more, metrics=score(
        model, scenes, steps, more, count)[-1]) for more in (slots + 2, slots + 4)]
    return dict(metrics=by_step[steps - 1], settings=settings)


@torch.no_grad()
def draw(model: IODINE, scenes: data.Scenes, folder: Path, results: dict[str, Any]) -> None:
    """Writes decomposition.png, refinement.png and inference.gif."""
    batch = scenes.batch(0, 6)
    steps = model.infer(batch.image, model.noise(scenes, torch.arange(6, device=scenes.device)))
    parts = zip(*(reconstruct(step.decoded.nan_to_num()) for step in steps), strict=True)
    mean, masks, means = map(torch.stack, parts)  # (T, B, ...)
    truth, title = batch.masks, "IODINE takes unseen scenes apart, without ever having seen a mask"
    first, ari = (None, None) if truth is None else (truth[0], metrics.ari(truth, masks[-1]))
    figures.decomposition(folder / "decomposition.png", batch.image, mean[-1], truth, masks[-1],
                          means[-1], title, ari)
    figures.refinement(folder / "refinement.png", batch.image[0], first, mean[:, 0], masks[:, 0],
                       means[:, 0], "Iterative inference: every row refines the one above")
    figures.animation(folder / "inference.gif", batch.image, mean, truth, masks, means, title)


# -- training --------------------------------------------------------------------------------------


def learning_rate(config: Config, step: int) -> float:
    """Warm-up; exponential decay to lr * lr_final between lr_steps, constant after them."""
    lr = config.lr * config.lr_final ** share(step, config.lr_steps)
    return lr * min(1.0, (step + 1) / (config.lr_warmup + 1))


def check(config: Config) -> None:
    """UserError, in one line, for options that are impossible, alone or together."""
    runs.check(config)
    sizes = [name for name in vars(config) if name.endswith(("_channels", "_kernel", "_size"))]
    sizes.remove("lstm_size")
    runs.at_least(config, 1, "num_slots", "num_steps", "refinement_stride", "pool", *sizes)
    runs.at_least(config, 0, "test_steps", "lstm_size", "lr_warmup", "flat_colors", "sigma_start")
    runs.positive(config, "sigma", "update_gain", "clip", "lr_final", "coordinate_gain")
    pixelwise = config.decoder == "broadcast" and config.decoder_kernel == 1
    runs.require(config.pool == 1 or pixelwise, "--pool needs --decoder-kernel 1, no deconv")
    try:
        shape = data.images(config.dataset).shape
        other = data.images(config.train_dataset or config.dataset).shape
        runs.require(other == shape, f"--train-dataset: images of {other}, not {shape}")
        runs.require(not any(size % config.pool for size in shape[1:]),
                     f"--pool {config.pool} does not divide images of {shape}")
        runs.require(config.decoder == "deconv" or config.decoder_kernel <= min(shape[1:]) + 1,
                     f"--decoder-kernel: at most {min(shape[1:]) + 1}")
        with kernels.use(config.kernels):
            kernels.backend(processes.pick_device(config.device))  # no Triton on a CPU
    except (ValueError, RuntimeError) as error:
        raise runs.UserError(error) from None


def build(config: Config, scenes: data.Scenes) -> IODINE:
    """The model for these scenes, initialised from the seed."""
    torch.manual_seed(config.seed)
    layout = torch.channels_last if scenes.device.type == "cuda" else torch.preserve_format
    return IODINE(config, *scenes.shape).to(scenes.device, memory_format=layout)


def load_model(path: str | Path, device: str = "cpu") -> IODINE:
    """The trained model of a checkpoint (a file or a run's folder), ready for `infer`."""
    return runs.load_model(
        path, "iodine", Config, lambda c: build(c, data.make(c.dataset, device=device)))


def train(config: Config) -> dict[str, Any]:
    """Trains one run, or resumes it, and evaluates it; returns the content of evaluation.json."""
    check(config)
    kernels.use(config.kernels)
    device = runs.set_up(config)
    scenes = data.make(config.train_dataset or config.dataset, "train", config.seed, device)
    model = build(config, scenes)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    run = runs.start("iodine", config, PRESETS, model, optimizer, title="IODINE",
                     kernels=kernels.describe(device), compiled=(model.decoder, model.refinement))
    for step, index in run.steps():
        batch = scenes.scenes(index)
        model.set_step(step)
        parts = run.update(model.loss, batch.image, model.noise(scenes, index),
                           lr=learning_rate(config, step), clip=config.clip)
        if run.due(step):
            masks = reconstruct(parts["decoded"].nan_to_num())[1]
            masks = F.interpolate(masks, batch.image.shape[-2:])  # of pooled images: blocks
            scores = {} if batch.masks is None else {
                "ari_fg": metrics.ari(batch.masks, masks).nanmean()}
            run.log(parts, **scores)
    test = data.make(config.dataset, "test", config.seed, device)
    return run.finish(test, evaluate, draw, show=("ari_fg", "miou", "mse", "elbo"),
                      picture="decomposition.png")


if __name__ == "__main__":
    runs.main("iodine", Config, PRESETS, train)
