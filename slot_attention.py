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
"""Slot Attention: an autoencoder whose slots compete for pixels, so that each takes an object.

Locatello et al., NeurIPS 2020. Nothing is sampled but the initial slots, and there is no KL;
EfficientMORL's layer is one iteration made stochastic. Here x, mu are in [-1, 1]; in code: [0, 1].

    h_i = encoder(x), a feature of every pixel i;    s_k ~ N(loc, diag(scale^2)), both learned
    T times:                                                                       algorithm 1
        A_ki = softmax_k(Wq LN(s_k) . Wk LN(h_i) / sqrt(D))        slots compete for every pixel
        u_k = sum_i A_ki Wv LN(h_i) / sum_i A_ki                   what slot k has found: a mean
        s_k = GRU(u_k, s_k);   s_k = s_k + MLP(LN(s_k))            the same weights every time
    mu_k, a_k = decoder(s_k);   m = softmax_k(a);   minimise mean (x - sum_k m_k mu_k)^2

    python slot_attention.py                                 the quick preset, 6 minutes of one core
    python slot_attention.py --slots mlp                     the baseline Slot MLP: ordered slots
    python slot_attention.py --preset tetrominoes_short      65 minutes; _long: 39; solids_short: 17

A run writes config.json, metrics.jsonl, checkpoint.pt, evaluation.json and figures/ to runs/
slot_attention-<preset>-<seed>/. `quick` (ten seeds): ARI-FG 0.953 (0.937 to 0.975), mIoU 0.962;
`tetrominoes_long` (three): 0.964 (0.944 to 0.970), 0.569, as slots share the ground. Defaults: the
released code's, in two ports' sizes (addtt/object-centric-library, adityabingi/Slot-Attention):

    field                              default          quick           what changes, why
    dataset, num_slots                 tetrominoes, 4   mini_sprites_16_shaded, 6
    flat_colors                        off              on              mu_k: masks draw the shapes
    normalise                          mean             sum             u_k: spare slots are empty
    mask_entropy, entropy_steps        0, 1             0.1, 10000      loss: a pixel has one slot
    encoder_channels, encoder_kernel   4 x 32, 5        3 x 32, 3       smaller images
    decoder_kernel, coordinate_gain    5, 1             1, 15           less work; sharp edges
    test_iterations                    3                4               mIoU rises by 0.01
    batch_size, clip                   64, none         16, 1           less work; no large step
    lr, lr_warmup, lr_half_life, steps 4e-4, 1e4, 1e5, 5e5  2e-3, 300, 2500, 10500  minutes
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

import data
import kernels
from data import draws, figures, metrics, processes, runs

# B batch, K slots, N = B K, T iterations, D size of a slot, O channels of a convolution;
# C H W image; h w its size after pooling, P = h w the pixels of which slots take their shares


@dataclass
class Config(runs.RunConfig):
    """The defaults are the released code's, in the sizes of two ports; PRESETS override them."""

    dataset: str = "tetrominoes"  # one of data.DATASETS
    num_slots: int = 4  # K
    latent_size: int = 64  # D, of one slot
    slots: Literal["attention", "mlp"] = "attention"  # mlp: the baseline, see `SlotMLP`
    pool: int = 1  # the encoder sees means of pool x pool pixels; decoded images are enlarged
    num_iterations: int = 3  # T in training
    test_iterations: int = 3  # T in tests
    normalise: Literal["mean", "sum"] = "mean"  # sum: times K / P, so that a slot sees its size
    implicit: bool = False  # no gradient of earlier iterations; loc, log_scale are not trained
    encoder_channels: tuple[int, ...] = (32, 32, 32, 32)  # of the convolutions
    encoder_kernel: int = 5  # pixels, odd
    decoder_channels: tuple[int, ...] = (32, 32, 32)  # of the hidden layers
    decoder_kernel: int = 5  # pixels, odd; of the last layer: at most 3
    coordinate_gain: float = 1.0  # the decoder's coordinates run from 0 to this
    flat_colors: bool = False  # one colour a slot, so that only masks draw shapes; see `decode`
    # optimisation
    mask_entropy: float = 0.0  # weight of the masks' entropy (nats per pixel) in the loss
    entropy_steps: int = 1  # training steps over which this weight rises linearly from 0
    batch_size: int = 64  # B, scenes per step
    lr: float = 4e-4  # times warm-up and halving: see `learning_rate`
    clip: float = 0.0  # largest norm of the gradient; 0: any
    lr_warmup: int = 10_000  # training steps
    lr_half_life: int = 100_000  # training steps in which lr halves, from the first on
    steps: int = 500_000  # of training


PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        dataset="mini_sprites_16_shaded", num_slots=6, test_iterations=4, normalise="sum",
        encoder_channels=(32, 32, 32), encoder_kernel=3, decoder_kernel=1, coordinate_gain=15.0,
        flat_colors=True, mask_entropy=0.1, entropy_steps=10_000, batch_size=16, lr=2e-3, clip=1.0,
        lr_warmup=300, lr_half_life=2500, steps=10_500),
    "tetrominoes": dict(),
    "tetrominoes_short": dict(
        decoder_kernel=3, coordinate_gain=3.0, batch_size=16, lr=1e-3, clip=1.0, lr_warmup=500,
        lr_half_life=4000, steps=14_000),
    "multi_dsprites": dict(dataset="multi_dsprites_colored_on_grayscale", num_slots=6),
}
PRESETS["tetrominoes_long"] = PRESETS["tetrominoes_short"] | dict(  # Adam starts anew
    init="notebooks/weights/slot_attention-tetrominoes_short.pt", test_iterations=4, lr=5e-4,
    lr_warmup=300, lr_half_life=3000, steps=9000)
PRESETS["multi_dsprites_short"] = PRESETS["quick"] | PRESETS["multi_dsprites"] | dict(pool=4)
PRESETS["solids_short"] = PRESETS["quick"] | dict(
    dataset="solids_32", num_slots=8, pool=2, flat_colors=False, normalise="mean", mask_entropy=0.0,
    lr_half_life=3500, steps=14_000)


def make_config(preset: str = "quick", **overrides: Any) -> Config:
    """A preset's Config; UserError for an unknown preset."""
    return runs.make_config(Config, PRESETS, preset, **overrides)


# -- building blocks -------------------------------------------------------------------------------

LayerNorm = partial(nn.LayerNorm, eps=1e-3)  # paper: silent; released code, and here: Keras's


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Embedding(nn.Linear):
    """A linear map of gain * (1 - x, x, y, 1 - y) at each pixel; x (column), y (row): 0 to 1."""

    def __init__(self, size: int, height: int, width: int, gain: float = 1.0):
        super().__init__(4, size)
        y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (height, width)), indexing="ij")
        grid = gain * torch.stack([1 - x, x, y, 1 - y], -1)  # (h, w, 4)
        self.register_buffer("grid", grid, persistent=False)

    def forward(self) -> Tensor:  # (size, h, w)
        return super().forward(self.grid).movedim(-1, 0)


class Encoder(nn.Module):
    """Image (B, C, H, W) in [0, 1] -> a feature of every pixel after pooling, (B, P, O)."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        self.pool, k = config.pool, config.encoder_kernel
        sizes = (channels, *config.encoder_channels)
        self.convs = nn.ModuleList(kernels.Conv2d(*pair, k) for pair in pairwise(sizes))
        self.embedding = Embedding(sizes[-1], height, width)
        self.mlp = nn.Sequential(LayerNorm(sizes[-1]), mlp(sizes[-1], sizes[-1], sizes[-1]))

    def forward(self, image: Tensor) -> Tensor:
        x = F.avg_pool2d(2 * image - 1, self.pool)
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        return self.mlp(rearrange(x + self.embedding(), "b c h w -> b (h w) c"))


class SlotAttention(nn.Module):
    """Algorithm 1: features of pixels (B, P, O) -> slots (B, K, D), which start as random draws."""

    def __init__(self, config: Config):
        super().__init__()
        size, inputs = config.latent_size, config.encoder_channels[-1]
        self.config = config
        # Mean and log std of the initial slots, the same for all. (1, D): Xavier needs a matrix.
        self.loc, self.log_scale = (nn.Parameter(torch.empty(1, size)) for _ in range(2))
        self.norm_inputs, self.norm_slots = LayerNorm(inputs), LayerNorm(size)
        # Paper: silent. Released code, and here: no biases.
        self.keys, self.values = (nn.Linear(inputs, size, bias=False) for _ in range(2))
        self.queries = nn.Linear(size, size, bias=False)
        self.gru = nn.GRUCell(size, size)
        self.mlp = nn.Sequential(LayerNorm(size), mlp(size, 2 * size, size))

    def iterate(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """keys and values (B, P, D), slots (B, K, D) -> slots, attention (B, K, P)."""
        queries = self.queries(self.norm_slots(slots)) * slots.shape[-1] ** -0.5
        attention = (queries @ keys.mT).softmax(1)  # over slots, (B, K, P)
        weights = attention + 1e-8  # a slot without pixels: no division by 0
        number = weights.sum(2, keepdim=True)  # of each slot's pixels, (B, K, 1)
        if self.config.normalise == "sum":  # the same for all: a slot without pixels reads 0
            number = keys.shape[1] / self.config.num_slots  # training's K, whatever K is in tests
        updates = weights / number @ values  # what a slot has found, (B, K, D)
        slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).unflatten(0, slots.shape[:2])
        return slots + self.mlp(slots), attention

    def forward(self, features: Tensor, noise: Tensor, num_iterations: int) -> list[tuple]:
        """Slots and attention after each iteration; noise (B, K, D) standard normal."""
        x = self.norm_inputs(features)
        keys, values = self.keys(x), self.values(x)
        slots, results = self.loc + self.log_scale.exp() * noise, []
        for t in range(1, num_iterations + 1):
            if self.config.implicit and t == num_iterations:
                # Chang et al. 2022: the gradient at a fixed point has a factor (1 - J)^-1, here 1;
                slots = slots.detach()  # J = d iterate / d slots
            slots, attention = self.iterate(keys, values, slots)
            results.append((slots, attention))
        return results


class SlotMLP(nn.Module):
    """The baseline: an MLP makes all slots at once, in order; normalise, implicit, T: not read."""

    def __init__(self, config: Config, height: int, width: int):
        super().__init__()
        self.shape, self.sizes = (height, width), (config.num_slots, config.latent_size)
        # Paper: features "resized and flattened". Here: averaged to at most 16 x 16.
        self.size = min(height, 16), min(width, 16)
        inputs = config.encoder_channels[-1] * math.prod(self.size)
        self.mlp = mlp(inputs, 8 * config.latent_size, math.prod(self.sizes))  # 8: ours

    def forward(self, features: Tensor, noise: Tensor, num_iterations: int) -> list[tuple]:
        """As SlotAttention, but the same after every iteration, K slots whatever the noise."""
        x = F.adaptive_avg_pool2d(features.mT.unflatten(2, self.shape), self.size)
        return [(self.mlp(x.flatten(1)).unflatten(1, self.sizes), None)] * num_iterations


class BroadcastDecoder(nn.Module):
    """Spatial broadcast decoder: every pixel gets the slot, plus the embedding of its position."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        size, sizes, k = config.latent_size, config.decoder_channels, config.decoder_kernel
        self.pool = config.pool
        self.embedding = Embedding(size, height, width, config.coordinate_gain)
        self.first = kernels.Conv2d(size, sizes[0], k)
        self.hidden = nn.ModuleList(kernels.Conv2d(*pair, k) for pair in pairwise(sizes))
        self.last = kernels.Conv2d(sizes[-1], channels + 1, min(k, 3))

    def forward(self, slots: Tensor) -> Tensor:  # (N, D) -> (N, C+1, H, W)
        # The first layer sees slot plus embedding at every pixel. A convolution is linear: its
        # response to the embedding (O, h, w), bias included, is the same for every slot.
        response = self.first.layout(self.first(self.embedding()[None]))[0]
        x = F.relu(kernels.broadcast_conv(slots, self.first.weight, response), inplace=True)
        for conv in self.hidden:
            x = F.relu(conv(x), inplace=True)
        x = kernels.full_precision(self.last, x)
        return F.interpolate(x, scale_factor=self.pool, mode="bilinear")


# -- the model -------------------------------------------------------------------------------------


class SlotAutoencoder(nn.Module):
    """Images (B, C, H, W) in [0, 1] as K slots (B, K, D), and back."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        self.config, height, width = config, height // config.pool, width // config.pool
        self.encoder = Encoder(config, channels, height, width)
        ordered = config.slots == "mlp"
        self.slots = SlotMLP(config, height, width) if ordered else SlotAttention(config)
        self.decoder = BroadcastDecoder(config, channels, height, width)
        self.flat = nn.Linear(config.latent_size, channels + 1) if config.flat_colors else None
        self.register_buffer("entropy_weight", torch.tensor(0.0))  # a CUDA graph reads new values
        # Paper: silent. Released code, and here: Keras's initial values; flat colours are smaller.
        for name, parameter in self.named_parameters():
            if name.endswith("weight_hh"):
                nn.init.orthogonal_(parameter)
            elif parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, 0.3 if name == "flat.weight" else 1.0)
            elif "bias" in name:
                nn.init.zeros_(parameter)

    def noise(self, scenes: data.Scenes, index: Tensor) -> Tensor:
        """(B, K, D) standard normal, a function of seed, split and scene."""
        key = draws.make_key("slot_attention noise", scenes.split, self.config.seed)
        return draws.normal(key, index, (self.config.num_slots, self.config.latent_size))

    def encode(self, image: Tensor, noise: Tensor, num_iterations: int) -> list[tuple]:
        """Slots (B, K, D), attention (B, K, P; Slot MLP: None) after each of T; noise (B, K, D)."""
        return kernels.full_precision(self.slots, self.encoder(image), noise, num_iterations)

    def decode(self, slots: Tensor) -> Tensor:
        """Every slot alone: (B, K, D) -> means (not clipped) and mask logits (B, K, C+1, H, W).

        With flat_colors, a linear map of the slot is its colour and a logit, the same everywhere.
        4 times the decoder's logit is added to that one (masks learn faster); its means are unused.
        """
        decoded = self.decoder(slots.flatten(0, 1)).unflatten(0, slots.shape[:2])
        means, mask_logits = decoded[:, :, :-1], decoded[:, :, -1:]
        if self.flat:
            flat = kernels.full_precision(self.flat, slots)[..., None, None]  # (B, K, C+1, 1, 1)
            means, mask_logits = flat[:, :, :-1].expand_as(means), flat[:, :, -1:] + 4 * mask_logits
        # Paper: means of images in [-1, 1]. Here: of images in [0, 1], for scores and figures.
        return torch.cat([(means + 1) / 2, mask_logits], 2)

    def loss(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Mean squared error of images in [-1, 1], plus the weighted entropy of the masks; also
        mse (of images in [0, 1]), entropy (nats, a mean over pixels) and decoded."""
        slots, _ = self.encode(image, noise, self.config.num_iterations)[-1]
        decoded = self.decode(slots)
        mean, masks, _ = reconstruct(decoded)
        mse = (image - mean).square().mean()
        entropy = -(masks * decoded[:, :, -1].log_softmax(1)).sum(1).mean()
        loss = 4 * mse + self.entropy_weight * entropy  # 4: from [0, 1] to [-1, 1]
        return dict(loss=loss, mse=mse, entropy=entropy, decoded=decoded)


def reconstruct(decoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, C+1, H, W) -> mixture mean (B, C, H, W), masks (B, K, H, W), means (B, K, C, H, W)."""
    means, masks = decoded[:, :, :-1], kernels.masks(decoded[:, :, -1])  # softmax over slots
    return reduce(masks[:, :, None] * means, "b k c h w -> b c h w", "sum"), masks, means


# -- evaluation and figures ------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: SlotAutoencoder, scenes: data.Scenes, count: int = 320) -> dict[str, Any]:
    """`metrics` after the test's T iterations; `settings`: after 1 to 2T of them."""
    test = model.config.test_iterations
    results: list[dict[str, list]] = [{} for _ in range(2 * test)]
    for index in torch.arange(min(count, scenes.count), device=scenes.device).split(32):
        batch = scenes.scenes(index)
        trace = model.encode(batch.image, model.noise(scenes, index), len(results))
        for result, (slots, _) in zip(results, trace, strict=True):
            mean, masks, _ = reconstruct(model.decode(slots))
            for name, value in metrics.segmentation(batch, mean, masks).items():
                result.setdefault(name, []).append(value)
    scores = [{n: metrics.mean_stderr(torch.cat(v)) for n, v in r.items()} for r in results]
    settings = [dict(num_iterations=t, metrics=m) for t, m in enumerate(scores, 1)]
    return dict(metrics=scores[test - 1], settings=settings)


@torch.no_grad()
def draw(model: SlotAutoencoder, scenes: data.Scenes, folder: Path, results: dict) -> None:
    """Writes decomposition.png, iterations.png and inference.gif."""
    image, truth, *_ = scenes.batch(0, 6)
    noise = model.noise(scenes, torch.arange(6, device=scenes.device))
    trace = model.encode(image, noise, model.config.test_iterations)
    parts = zip(*(reconstruct(model.decode(slots)) for slots, _ in trace), strict=True)
    mean, masks, means = map(torch.stack, parts)  # (T, B, ...)
    first, ari = (None, None) if truth is None else (truth[0], metrics.ari(truth, masks[-1]))
    title = "Unseen scenes, taken apart by slots that trained without masks"
    figures.decomposition(folder / "decomposition.png", image, mean[-1], truth, masks[-1],
                          means[-1], title, ari)
    figures.refinement(folder / "iterations.png", image[0], first, mean[:, 0], masks[:, 0],
                       means[:, 0], "Slots, iteration by iteration")
    figures.animation(folder / "inference.gif", image, mean, truth, masks, means, title)


# -- training --------------------------------------------------------------------------------------


def learning_rate(config: Config, step: int) -> float:
    """Paper: a warm-up, then halving. Released code, and here: halving from the first step on."""
    warmup = min(1.0, (step + 1) / (config.lr_warmup + 1))
    return config.lr * warmup * 0.5 ** (step / config.lr_half_life)


def check(config: Config) -> None:
    """UserError, in one line, for options that cannot work."""
    runs.check(config)
    runs.at_least(config, 1, "num_slots", "latent_size", "num_iterations", "test_iterations",
                  "encoder_channels", "encoder_kernel", "decoder_channels", "decoder_kernel",
                  "entropy_steps", "lr_half_life", "pool")
    runs.at_least(config, 0, "mask_entropy", "lr_warmup", "clip")
    runs.positive(config, "coordinate_gain")
    try:
        shape = data.images(config.dataset).shape
        runs.require(not any(size % config.pool for size in shape[1:]),
                     f"--pool {config.pool} does not divide images of {shape}")
        largest = min(shape[1:]) // config.pool + 1
        runs.require(config.decoder_kernel <= largest, f"--decoder-kernel: at most {largest}")
        with kernels.use(config.kernels):
            kernels.backend(processes.pick_device(config.device))  # no Triton on a CPU
    except (ValueError, RuntimeError) as error:
        raise runs.UserError(error) from None


def build(config: Config, scenes: data.Scenes) -> SlotAutoencoder:
    """The model for these scenes, initialised from the seed."""
    torch.manual_seed(config.seed)
    layout = torch.channels_last if scenes.device.type == "cuda" else torch.preserve_format
    return SlotAutoencoder(config, *scenes.shape).to(scenes.device, memory_format=layout)


def load_model(path: str | Path, device: str = "cpu") -> SlotAutoencoder:
    """The trained model of a checkpoint (a file or a run's folder): see `encode`, `decode`."""
    return runs.load_model(path, "slot_attention", Config,
                           lambda config: build(config, data.make(config.dataset, device=device)))


def train(config: Config) -> dict[str, Any]:
    """Trains or resumes one run, evaluates it; returns the content of evaluation.json."""
    check(config)
    kernels.use(config.kernels)
    device = runs.set_up(config)
    scenes = data.make(config.dataset, "train", config.seed, device)
    model = build(config, scenes)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    run = runs.start("slot_attention", config, PRESETS, model, optimizer, title="Slot Attention",
                     kernels=kernels.describe(device), compiled=(model.encoder, model.decoder))
    for step, index in run.steps():
        batch = scenes.scenes(index)
        model.entropy_weight.fill_(config.mask_entropy * min(step / config.entropy_steps, 1.0))
        parts = run.update(model.loss, batch.image, model.noise(scenes, index),
                           lr=learning_rate(config, step), clip=config.clip or math.inf)
        if run.due(step):
            scores = {}
            if batch.masks is not None:
                _, masks, _ = reconstruct(parts["decoded"].nan_to_num())  # `ari` refuses NaN
                scores["ari_fg"] = metrics.ari(batch.masks, masks).nanmean()
            run.log(parts, **scores)
    test = data.make(config.dataset, "test", config.seed, device)
    return run.finish(test, evaluate, draw, show=("ari_fg", "miou", "mse"),
                      picture="decomposition.png")


if __name__ == "__main__":
    runs.main("slot_attention", Config, PRESETS, train)
