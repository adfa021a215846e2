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
#     "filelock>=3.12",
#     "pillow>=10.0",
# ]
# ///
"""Slot Attention: slots compete for pixels, and an autoencoder makes them objects.

Locatello et al., NeurIPS 2020, "Object-Centric Learning with Slot Attention". A deterministic
autoencoder: no posterior, no KL. EfficientMORL's layer is a stochastic relative of one iteration.

    h_i = encoder(x), a feature of every pixel i;   s_k ~ N(mu, diag(sigma^2)), mu and sigma learned
    T times:                                                                      algorithm 1
        A_ki = softmax_k(Wq LN(s_k) . Wk LN(h_i) / sqrt(D))         slots compete for each pixel
        u_k = sum_i A_ki Wv LN(h_i) / sum_i A_ki                    what slot k has found, a mean
        s_k = GRU(u_k, s_k);   s_k = s_k + MLP(LN(s_k))             the same weights each time
    mu_k, a_k = decoder(s_k);   m = softmax_k(a);   minimise the mean of (x - sum_k m_k mu_k)^2

    python slot_attention.py                                 the quick preset, two CPU cores
    python slot_attention.py --slots mlp                     the baseline Slot MLP: ordered slots
    python slot_attention.py --preset tetrominoes --minutes 60 --implicit

A run writes config.json, metrics.jsonl, checkpoint.pt, evaluation.json and figures/ to
runs/slot_attention-<preset>-<seed>/. The defaults of Config are the paper's for Tetrominoes; where
`quick` differs:

    field                                   paper            quick           why
    dataset, num_slots                      tetrominoes, 4   mini_sprites_16_shaded, 5
    latent_size, mlp_size, batch_size       64, 128, 64      32, 64, 16      less work
    encoder_channels, encoder_kernel        4 x 32, 5        3 x 32, 3       smaller images
    decoder_kernel, coordinate_gain         5, 1             1, 15           1x1: less work
    lr, lr_warmup, lr_half_life             4e-4, 1e4, 1e5   2e-3, 500, 2000
    clip                                    none             1
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

import data
import kernels
from data import draws, figures, metrics, runs

# B batch, K slots, N = B K, T iterations, D size of a slot, P pixels = H W, C H W image,
# O channels of a convolution, E entities of a scene (0: the background)


@dataclass
class Config(runs.RunConfig):
    """The defaults are the paper's for Tetrominoes; PRESETS override them."""

    dataset: str = "tetrominoes"  # one of data.DATASETS
    # slots
    num_slots: int = 4  # K
    latent_size: int = 64  # D, of one slot
    slots: Literal["attention", "mlp"] = "attention"  # mlp: the baseline Slot MLP
    mlp_size: int = 128  # of the hidden layer of a slot's residual MLP; Slot MLP: a quarter of it
    num_iterations: int = 3  # T
    test_iterations: int = 0  # T of evaluation; 0: num_iterations
    implicit: bool = False  # the gradient of the last iteration alone; memory does not grow with T
    # networks
    encoder_channels: tuple[int, ...] = (32, 32, 32, 32)  # of the convolutions
    encoder_kernel: int = 5  # pixels, odd
    decoder_channels: tuple[int, ...] = (32, 32, 32)  # of the hidden layers
    decoder_kernel: int = 5  # pixels, odd; of the last layer: at most 3
    decoder_doublings: int = 0  # layers that double the image before those; CLEVR6: 4
    coordinate_gain: float = 1.0  # the decoder's coordinates run from 0 to this
    # optimisation
    batch_size: int = 64
    lr: float = 4e-4
    clip: float = 0.0  # largest norm of the gradient; 0: any
    lr_warmup: int = 10_000  # training steps
    lr_half_life: int = 100_000  # training steps in which lr halves, warm-up included
    steps: int = 500_000


PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        dataset="mini_sprites_16_shaded", num_slots=5, latent_size=32, mlp_size=64,
        encoder_channels=(32, 32, 32), encoder_kernel=3, decoder_kernel=1, coordinate_gain=15.0,
        batch_size=16, lr=2e-3, clip=1.0, lr_warmup=500, lr_half_life=2000, steps=8000,
    ),
    "tetrominoes": dict(),
    "multi_dsprites": dict(dataset="multi_dsprites_colored_on_grayscale", num_slots=6),
}
CLEVR6 = dict(num_slots=7, encoder_channels=(64,) * 4, decoder_channels=(64,),
              decoder_doublings=4)  # benchmark


def make_config(preset: str = "quick", **overrides: Any) -> Config:
    """A preset's Config; UserError for an unknown preset."""
    return runs.make_config(Config, PRESETS, preset, **overrides)


# -- building blocks -------------------------------------------------------------------------------


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def layer_norm(size: int) -> nn.LayerNorm:
    """Paper: silent. Released code, and here: Keras's epsilon."""
    return nn.LayerNorm(size, eps=1e-3)


def full_precision(layer: nn.Module, x: Tensor, *others: Any) -> Any:
    """float32 even under autocast: for colours, and for attention, which is little work."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(next(layer.parameters()).dtype), *others)


class Embedding(nn.Linear):
    """Of every pixel's position, from 1 - column, column, row, 1 - row, each from 0 to `gain`."""

    def __init__(self, size: int, height: int, width: int, gain: float = 1.0):
        super().__init__(4, size)
        rows, cols = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
        y, x = torch.meshgrid(rows, cols, indexing="ij")
        grid = gain * torch.stack([1 - x, x, y, 1 - y], -1)  # (H, W, 4)
        self.register_buffer("grid", grid, persistent=False)

    def forward(self) -> Tensor:  # (size, H, W)
        return super().forward(self.grid).movedim(-1, 0)


class Conv(nn.Conv2d):
    """Size-preserving convolution, in the memory layout that is faster."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        layout = kernels.layout(x, self.kernel_size[0])
        return super().forward(x.contiguous(memory_format=layout))


class Encoder(nn.Module):
    """Image (B, C, H, W) in [0, 1] -> a feature of every pixel, (B, P, O)."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        sizes = channels, *config.encoder_channels
        self.convs = nn.ModuleList(Conv(i, o, config.encoder_kernel) for i, o in pairwise(sizes))
        self.embedding = Embedding(sizes[-1], height, width)
        self.mlp = nn.Sequential(layer_norm(sizes[-1]), mlp(sizes[-1], sizes[-1], sizes[-1]))

    def forward(self, image: Tensor) -> Tensor:
        x = 2 * image - 1
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        return self.mlp(rearrange(x + self.embedding(), "b c h w -> b (h w) c"))


class SlotAttention(nn.Module):
    """Algorithm 1: features of pixels (B, P, O) -> slots (B, K, D), which start as random draws."""

    def __init__(self, config: Config):
        super().__init__()
        size, inputs, self.implicit = config.latent_size, config.encoder_channels[-1], config.implicit
        # Of the initial slots, the same for all: only their noise tells slots apart.
        self.loc, self.log_scale = (nn.Parameter(torch.empty(1, size)) for _ in range(2))
        self.norm_inputs, self.norm_slots = layer_norm(inputs), layer_norm(size)
        # Paper: silent. Released code, and here: no biases (some ports have them).
        self.keys = nn.Linear(inputs, size, bias=False)
        self.values = nn.Linear(inputs, size, bias=False)
        self.queries = nn.Linear(size, size, bias=False)
        self.gru = nn.GRUCell(size, size)
        self.mlp = nn.Sequential(layer_norm(size), mlp(size, config.mlp_size, size))

    def iterate(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """keys and values (B, P, D), slots (B, K, D) -> slots, attention (B, K, P)."""
        queries = self.queries(self.norm_slots(slots)) * slots.shape[-1] ** -0.5
        attention = (queries @ keys.mT).softmax(1)  # over slots, (B, K, P)
        weights = attention + 1e-8  # a slot without pixels: no division by 0
        weights = weights / weights.sum(2, keepdim=True)  # over pixels
        updates = weights @ values  # what a slot has found: a mean of values, (B, K, D)
        rows = self.gru(updates.flatten(0, 1), slots.flatten(0, 1))  # (N, D)
        slots = rows.unflatten(0, slots.shape[:2])
        return slots + self.mlp(slots), attention

    def forward(self, features: Tensor, noise: Tensor, num_iterations: int) -> list[tuple]:
        """Slots and attention after each iteration; noise (B, K, D) standard normal."""
        x = self.norm_inputs(features)
        keys, values = self.keys(x), self.values(x)
        slots, results = self.loc + self.log_scale.exp() * noise, []
        graph = torch.is_grad_enabled()
        for t in range(1, num_iterations + 1):
            # Implicit: all iterations but the last are a search for a fixed point, without a graph.
            with torch.set_grad_enabled(graph and not (self.implicit and t < num_iterations)):
                slots, attention = self.iterate(keys, values, slots)
            results.append((slots, attention))
        return results


class SlotMLP(nn.Module):
    """The baseline: an MLP makes all slots at once, in an order, of an image of features."""

    def __init__(self, config: Config, height: int, width: int):
        super().__init__()
        self.shape, self.num_slots = (height, width), config.num_slots
        # Paper: features "resized and flattened". Here: averaged to at most 16 x 16.
        self.pool = nn.AdaptiveAvgPool2d((min(height, 16), min(width, 16)))
        inputs = config.encoder_channels[-1] * math.prod(self.pool.output_size)
        self.mlp = mlp(inputs, 4 * config.mlp_size, config.num_slots * config.latent_size)

    def forward(self, features: Tensor, noise: Tensor, num_iterations: int) -> list[tuple]:
        """As SlotAttention, with neither noise nor iterations: one result, without attention."""
        x = self.pool(features.mT.unflatten(2, self.shape)).flatten(1)
        return [(self.mlp(x).unflatten(1, (self.num_slots, -1)), None)]


class BroadcastDecoder(nn.Module):
    """Spatial broadcast decoder: every pixel gets the slot, plus the embedding of its position."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        sizes, kernel, doublings = (
            config.decoder_channels, config.decoder_kernel, config.decoder_doublings)
        grid = height >> doublings, width >> doublings
        self.embedding = Embedding(config.latent_size, *grid, config.coordinate_gain)
        inputs = [config.latent_size, *[sizes[0]] * doublings]
        self.doubling = nn.ModuleList(nn.ConvTranspose2d(i, o, 5, 2, padding=2, output_padding=1)
                                      for i, o in pairwise(inputs))
        self.first = Conv(inputs[-1], sizes[0], kernel)
        self.hidden = nn.ModuleList(Conv(i, o, kernel) for i, o in pairwise(sizes))
        self.last = Conv(sizes[-1], channels + 1, min(kernel, 3))

    def forward(self, slots: Tensor) -> Tensor:  # (N, D) -> (N, C+1, H, W)
        embedding = self.embedding()  # (D, H, W), or smaller by the doublings
        if self.doubling:
            x = slots[:, :, None, None] + embedding  # (N, D, h, w)
            for conv in self.doubling:
                x = F.relu(conv(x), inplace=True)
            x = self.first(x)
        else:  # the image of slots plus embeddings is never built: convolutions are linear
            response = self.first(embedding[None])  # the same for every slot
            layout = kernels.layout(response, self.first.kernel_size[0])
            response = response.contiguous(memory_format=layout)[0]  # (O, H, W)
            x = kernels.broadcast_conv(slots, self.first.weight, response)
        for conv in self.hidden:
            x = conv(F.relu(x, inplace=True))
        return full_precision(self.last, F.relu(x, inplace=True))


# -- the model -------------------------------------------------------------------------------------


class SlotAutoencoder(nn.Module):
    """Images (B, C, H, W) in [0, 1] as K slots (B, K, D), and back."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, channels, height, width)
        attention = config.slots == "attention"
        self.slots = SlotAttention(config) if attention else SlotMLP(config, height, width)
        self.decoder = BroadcastDecoder(config, channels, height, width)
        # Paper: silent. Released code, and here: Keras's initial values.
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if attention:
            for weight in (self.slots.loc, self.slots.log_scale, self.slots.gru.weight_ih):
                nn.init.xavier_uniform_(weight)
            nn.init.orthogonal_(self.slots.gru.weight_hh)
            for bias in (self.slots.gru.bias_ih, self.slots.gru.bias_hh):
                nn.init.zeros_(bias)

    def noise(self, scenes: data.Scenes, index: Tensor, num_slots: int = 0) -> Tensor:
        """(B, K, D) standard normal: a function of seed, split and scene; num_slots 0: Config's."""
        c = self.config
        key = draws.make_key("slot_attention noise", scenes.split, c.seed)
        return draws.normal(key, index, (num_slots or c.num_slots, c.latent_size))

    def encode(self, image: Tensor, noise: Tensor, num_iterations: int = 0) -> list[tuple]:
        """Slots (B, K, D) and attention (B, K, P) after each of T iterations (0: Config's).

        image (B, C, H, W) in [0, 1]; noise (B, K, D) standard normal, of any number K of slots.
        """
        features = self.encoder(image)
        return full_precision(self.slots, features, noise,
                              num_iterations or self.config.num_iterations)

    def decode(self, slots: Tensor) -> Tensor:
        """Every slot alone: (B, K, D) -> means and mask logits (B, K, C+1, H, W)."""
        decoded = self.decoder(slots.flatten(0, 1))  # (N, C+1, H, W)
        # Paper: means of images in [-1, 1]. Here: in [0, 1], the same but for the scale.
        means, mask_logits = (decoded[:, :-1] + 1) / 2, decoded[:, -1:]
        return torch.cat([means, mask_logits], 1).unflatten(0, slots.shape[:2])

    def loss(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The mean squared error of images in [-1, 1], as `mse` in [0, 1], and `decoded`."""
        slots, _ = self.encode(image, noise)[-1]
        decoded = self.decode(slots)
        mse = (image - reconstruct(decoded)[0]).square().mean()
        return dict(loss=4 * mse, mse=mse, decoded=decoded)


def reconstruct(decoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, C+1, H, W) -> mixture mean (B, C, H, W), masks (B, K, H, W), means (B, K, C, H, W)."""
    means, masks = decoded[:, :, :-1], kernels.masks(decoded[:, :, -1])  # softmax over slots
    return reduce(masks[:, :, None] * means, "b k c h w -> b c h w", "sum"), masks, means


# -- evaluation and figures ------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: SlotAutoencoder, scenes: data.Scenes, count: int = 320) -> dict[str, Any]:
    """`metrics` after the test's T iterations; `settings`: after 1 to 2T of them."""
    c = model.config
    test = c.test_iterations or c.num_iterations
    results: list[dict[str, list]] = [{} for _ in range(max(test, 2 * c.num_iterations))]
    for index in torch.arange(count, device=scenes.device).split(32):
        batch = scenes.scenes(index)
        trace = model.encode(batch.image, model.noise(scenes, index), len(results))
        for result, (slots, _) in zip(results, trace, strict=False):  # Slot MLP: one
            mean, masks, _ = reconstruct(model.decode(slots))
            values = dict(mse=metrics.mse(batch.image, mean))
            if batch.masks is not None:
                values |= dict(ari_fg=metrics.ari(batch.masks, masks),
                               ari=metrics.ari(batch.masks, masks, foreground=False),
                               miou=metrics.miou(batch.masks, batch.present, masks))
            for name, value in values.items():
                result.setdefault(name, []).append(value.cpu())
    scores = [{n: metrics.mean_stderr(torch.cat(v)) for n, v in r.items()} for r in results if r]
    settings = [dict(num_iterations=t, metrics=m) for t, m in enumerate(scores, 1)]
    return dict(metrics=scores[min(test, len(scores)) - 1], settings=settings)


@torch.no_grad()
def draw(model: SlotAutoencoder, scenes: data.Scenes, folder: Path, results: dict) -> None:
    """Writes decomposition.png and iterations.png."""
    c, index = model.config, torch.arange(6, device=scenes.device)
    batch, known = scenes.scenes(index), scenes.scenes(index).masks is not None
    trace = model.encode(batch.image, model.noise(scenes, index),
                         c.test_iterations or c.num_iterations)
    decoded = [model.decode(slots) for slots, _ in trace]
    mean, masks, means = reconstruct(decoded[-1])
    figures.decomposition(
        folder / "decomposition.png", batch.image, mean, batch.masks, masks, means,
        "Slot Attention decomposes unseen scenes, trained without masks",
        metrics.ari(batch.masks, masks) if known else None)
    first = torch.stack([one[0] for one in decoded])  # (T, K, C+1, H, W) of scene 0
    figures.refinement(
        folder / "iterations.png", batch.image[0], batch.masks[0] if known else None,
        *reconstruct(first), "Slots compete for pixels, again and again",
        [f"iteration {t}" for t in range(1, len(first) + 1)])


@torch.no_grad()
def further_scores(model: SlotAutoencoder, scenes: data.Scenes) -> dict[str, Any]:
    """DCI of the slots, as EfficientMORL's paper measures it (app. E.2): the masks match slots to
    the objects of 320 scenes, those with an IoU above 0.1."""
    c, latents, factors = model.config, [], {}
    for index in torch.arange(320, device=scenes.device).split(32):
        batch = scenes.scenes(index)
        if batch.masks is None:
            return {}
        slots, _ = model.encode(batch.image, model.noise(scenes, index),
                                c.test_iterations or c.num_iterations)[-1]
        masks = reconstruct(model.decode(slots))[1]
        owners = metrics.match(batch.masks, masks, least_iou=0.1).to(index.device)  # (B, E)
        scene, entity = (batch.present & (owners >= 0))[:, 1:].nonzero().unbind(1)
        latents.append(slots[scene, owners[scene, entity + 1]])
        for name, values in batch.factors.items():
            factors.setdefault(name, []).append(values[scene, entity + 1])
    codes = torch.cat(latents)
    scores = metrics.dci(codes, {name: torch.cat(values) for name, values in factors.items()})
    return dict(dci=scores | dict(pairs=len(codes)))


# -- training --------------------------------------------------------------------------------------


def learning_rate(config: Config, step: int) -> float:
    """Paper and released code: a linear warm-up, and halving from the first step on."""
    warmup = min(1.0, (step + 1) / (config.lr_warmup + 1))
    return config.lr * warmup * 0.5 ** (step / config.lr_half_life)


def check(config: Config) -> None:
    """UserError, in one line, where the options cannot be."""
    runs.check(config)
    runs.at_least(config, 1, "num_slots", "latent_size", "mlp_size", "num_iterations",
                  "encoder_channels", "decoder_channels", "lr_half_life")
    runs.at_least(config, 0, "test_iterations", "decoder_doublings", "lr_warmup", "clip")
    for name in ("encoder_kernel", "decoder_kernel"):
        runs.require(getattr(config, name) % 2 == 1, f"{runs.option(name)} must be odd")
    try:
        scenes = data.make(config.dataset)
        kernels.use(config.kernels)
        kernels.backend(runs.pick_device(config.device))  # no Triton on a CPU
    except (ValueError, RuntimeError) as error:
        raise runs.UserError(error) from None
    runs.require(math.gcd(scenes.height, scenes.width) % 2**config.decoder_doublings == 0,
                 f"--decoder-doublings {config.decoder_doublings}: images of {scenes.height} x "
                 f"{scenes.width} pixels cannot be halved as often")


def build(config: Config, scenes: data.Scenes) -> SlotAutoencoder:
    """The model for these scenes, initialised from the seed."""
    torch.manual_seed(config.seed)
    model = SlotAutoencoder(config, scenes.num_channels, scenes.height, scenes.width)
    layout = torch.channels_last if scenes.device.type == "cuda" else torch.preserve_format
    return model.to(scenes.device, memory_format=layout)


def load_model(path: str | Path, device: str = "cpu") -> SlotAutoencoder:
    """The trained model of a checkpoint (a file or a run's folder), ready for `encode`."""
    return runs.load_model(path, "slot_attention", Config,
                           lambda config: build(config, data.make(config.dataset, device=device)))


def train(config: Config) -> dict[str, Any]:
    """Trains or resumes one run, evaluates it; returns the content of evaluation.json."""
    check(config)
    device = runs.set_up(config)
    scenes = data.make(config.dataset, "train", config.seed, device)
    model = build(config, scenes)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    run = runs.start("slot_attention", config, PRESETS, model, optimizer, title="Slot Attention",
                     kernels=kernels.describe(device), compiled=(model.encoder, model.decoder))
    for step, index in run.steps():
        batch = scenes.scenes(index)
        parts = run.update(model.loss, batch.image, model.noise(scenes, index),
                           lr=learning_rate(config, step), clip=config.clip or math.inf)
        if run.due(step):
            _, masks, _ = reconstruct(parts["decoded"].nan_to_num())
            known = batch.masks is not None
            scores = dict(ari_fg=metrics.ari(batch.masks, masks).nanmean()) if known else {}
            run.log(parts, **scores)
    test = data.make(config.dataset, "test", config.seed, device)
    return run.finish(test, evaluate, draw, show=("ari_fg", "miou", "mse"),
                      picture="decomposition.png")


if __name__ == "__main__":
    runs.main("slot_attention", Config, PRESETS, train)
