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
"""MVAE, the Multi-Entity VAE: objects in one shot, at the places whose KL is largest.

Nash, Eslami, Burgess, Higgins, Zoran, Weber & Battaglia, 2017. Every place of a feature map offers
a posterior; the N that say most about the image (KL against the prior) become the objects. The
decoder draws each object alone, then pools, so that their order means nothing:

    z_n ~ N(0, I), n = 1..N;   o_n = g(z_n);   x ~ Bernoulli(sigmoid h(max_n o_n))  section 2
    q(z_s|x) = N(loc_s, scale_s^2) for each place s of the encoder's map
    q(z_1..N|x): the N places of largest KL_s = KL(q(z_s|x) || p(z))                 section 2.1
    L = E_q log p(x|z) - sum of the N selected KL_s

    python mvae.py                                           the quick preset, two CPU cores
    python mvae.py --model vae --num-slots 5 --single-steps 0      the baseline of appendix A
    python mvae.py --resume notebooks/weights/mvae-quick.pt --eval-only

A run writes config.json, metrics.jsonl, checkpoint.pt, evaluation.json, figures/. count_accuracy:
`quick` 0.865 (0.843 to 0.875, ten seeds), `sprites3_short` 0.884 (0.879 to 0.896, three).

The defaults of Config are the paper's, or ours where it is silent; short presets trade them for
minutes. The scenes of `single_steps` use the generator's counts, which is mild supervision.

    field                         default         quick         sprites3_short  why
    dataset                       sprites_3       sprites_3_32  sprites_3       fewer pixels
    encoder_channels              32 32 64 64     16 32 32 64   as quick        less work
    poolings                      3               2             3               8 x 8 places
    hidden_size, render_channels  256, 32         256, 32       512, 16         shapes; less work
    num_slots, batch_size         5, 64           3, 16         3, 16           3 sprites; minutes
    lr, lr_final, steps           1e-3, .01, 3e6  3e-3, .1, 6e3  3e-3, .03, 15e3  = lr_horizon
    single_steps                  0               1,500         3,000           one code a sprite
    unselected, unselected_steps  no              yes, in 1,000  as quick       others fall silent
    exclusion, exclusion_steps    1, off          8 until 2,500 8 until 6,000   one place an object
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from scipy import ndimage
from torch import Tensor, nn

import data
from data import draws, figures, metrics, runs

# B batch, N objects, D latent of one object, S places of the encoder's map, E entities, C H W image


@dataclass
class Config(runs.RunConfig):
    """The defaults are the paper's, or ours where it is silent; PRESETS override them."""

    dataset: str = "sprites_3"  # one of data.DATASETS
    model: Literal["mvae", "vae"] = "mvae"  # vae: the baseline, one code of N * D latents
    num_slots: int = 5  # N. The paper's baseline has 60 latents, which are 5 of 12
    latent_size: int = 12  # D
    # Paper: four convolutions with max-pooling, sizes open. Here 64 pixels become 8 x 8 places.
    encoder_channels: tuple[int, ...] = (32, 32, 64, 64)
    poolings: int = 3  # how many of these convolutions are followed by 2 x 2 max-pooling
    head_channels: int = 64  # of the first of the two convolutions after the coordinates; open
    hidden_size: int = 256  # of the first of g's two linear layers; open
    base_channels: int = 16  # of the map that the second makes, an eighth of the image's side
    object_channels: int = 16  # of g's two convolutions, each after upsampling; open
    render_channels: int = 32  # of h's first two convolutions; open
    aggregation: Literal["max", "sum"] = "max"  # over objects; the VAE has one
    # Open; torch's own 0.58 leaves little of z after the seven layers from it to the image.
    init_gain: float = 1.2  # times 1 / sqrt(inputs): deviation of the initial weights
    # One object, one place. Paper: none of the next five.
    single_steps: int = 0  # first training steps, of scenes with exactly one sprite, with N = 1
    unselected: bool = False  # the places that are not selected pay their KL too, ...
    unselected_steps: int = 1  # ... with a weight that rises from 0.05 to 1 over this many steps
    exclusion: float = 1.0  # a place with a larger one around it pays this - 1 KLs more, at most
    exclusion_steps: tuple[int, int, int, int] = (0, 1, 2, 3)  # it is 1, at most, at most, 1 again
    batch_size: int = 64  # scenes per step; open
    lr: float = 1e-3  # of Adam, at first
    lr_final: float = 0.01  # lr falls exponentially to this share of itself ...
    lr_horizon: int = 3_000_000  # ... over this many steps. Paper: "scheduled", shape open
    steps: int = 3_000_000  # of training


PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        dataset="sprites_3_32", encoder_channels=(16, 32, 32, 64), poolings=2,
        num_slots=3, single_steps=1500, unselected=True, unselected_steps=1000,
        exclusion=8.0, exclusion_steps=(400, 900, 2500, 6000),
        batch_size=16, lr=3e-3, lr_final=0.1, lr_horizon=6000, steps=6000,
    ),
    "sprites3": dict(),
    "sprites8": dict(dataset="sprites_8", num_slots=10),  # N: open
}
PRESETS["sprites3_short"] = PRESETS["quick"] | dict(
    dataset="sprites_3", poolings=3, hidden_size=512, render_channels=16, single_steps=3000,
    exclusion_steps=(400, 900, 6000, 15000), lr_final=0.03, lr_horizon=15000, steps=15000,
)
PRESETS["sprites8_short"] = PRESETS["sprites3_short"] | dict(
    dataset="sprites_8", init="notebooks/weights/mvae-sprites3_short.pt", num_slots=10,
    single_steps=0, unselected_steps=1, lr=1e-3,
)


def make_config(preset: str = "quick", **overrides: Any) -> Config:
    """A preset's Config; UserError for an unknown preset."""
    return runs.make_config(Config, PRESETS, preset, **overrides)


# -- building blocks -------------------------------------------------------------------------------


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """3 x 3, same size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def upsample() -> nn.Upsample:
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)


class Coordinates(nn.Module):
    """Adds two channels, -1 .. 1 over rows and columns, as selection forgets an object's place."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + 2, H, W)."""
        rows, cols = (torch.linspace(-1, 1, n, device=x.device) for n in x.shape[-2:])
        grid = torch.stack(torch.meshgrid(rows, cols, indexing="ij"))  # (2, H, W)
        return torch.cat([x, repeat(grid, "c h w -> b c h w", b=len(x)).to(x.dtype)], 1)


def gaussian_kl(loc: Tensor, log_scale: Tensor) -> Tensor:
    """KL(N(loc, scale^2) || N(0, 1)), summed over the last axis, nats."""
    return ((loc.square() + (2 * log_scale).exp() - 1) / 2 - log_scale).sum(-1)


def partner(x: Tensor) -> Tensor:
    """The rows of x (B, ...) in the order 1 0 3 2 5 4 ...; the last of an odd number stays."""
    return x[(torch.arange(len(x), device=x.device) ^ 1).clamp(max=len(x) - 1)]


# -- the model -------------------------------------------------------------------------------------


class MVAE(nn.Module):
    """The MVAE; with `--model vae` the baseline of appendix A: a linear layer, `to_code`, turns all
    places into one code of N * D latents, which g decodes as one object."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        c = self.config = config
        self.map_size = height >> c.poolings, width >> c.poolings
        encoder, inputs = nn.Sequential(), channels
        for i, outputs in enumerate(c.encoder_channels):
            encoder += nn.Sequential(conv(inputs, outputs), nn.ELU(inplace=True))
            inputs = outputs
            if i < c.poolings:
                encoder.append(nn.MaxPool2d(2))
        self.encoder = encoder + nn.Sequential(
            Coordinates(), conv(inputs + 2, c.head_channels), nn.ELU(inplace=True),
            conv(c.head_channels, 2 * c.latent_size),
        )
        code_size, self.to_code = c.latent_size, None
        if c.model == "vae":
            code_size = c.num_slots * c.latent_size
            self.to_code = nn.Linear(math.prod(self.map_size) * 2 * c.latent_size, 2 * code_size)
        base = c.base_channels, height // 8, width // 8  # three upsamplings lead to the image
        self.g = nn.Sequential(
            nn.Linear(code_size, c.hidden_size), nn.ELU(inplace=True),
            nn.Linear(c.hidden_size, math.prod(base)), nn.ELU(inplace=True),
            nn.Unflatten(1, base),
            upsample(), conv(c.base_channels, c.object_channels), nn.ELU(inplace=True),
            upsample(), conv(c.object_channels, c.object_channels), nn.ELU(inplace=True),
        )
        self.h = nn.Sequential(
            conv(c.object_channels, c.render_channels), nn.ELU(inplace=True),
            conv(c.render_channels, c.render_channels), nn.ELU(inplace=True),
            upsample(), conv(c.render_channels, channels),
        )
        # Weights of the two terms of `loss` that the paper does not have; `set_step` sets them.
        self.register_buffer("unselected", torch.tensor(0.0), persistent=False)
        self.register_buffer("exclusion", torch.tensor(0.0), persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=c.init_gain / math.sqrt(layer.weight[0].numel()))
                nn.init.zeros_(layer.bias)

    def posterior_map(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """loc and log scale of every place's candidate (B, S, D); of the VAE's code (B, N, D)."""
        features = self.encoder(image)  # (B, 2D, h, w)
        if self.to_code is None:
            features = rearrange(features, "b d h w -> b (h w) d")  # (B, S, 2D)
        else:
            features = self.to_code(features.flatten(1))  # (B, 2ND)
            features = rearrange(features, "b (two n d) -> b n (two d)", two=2,
                                 n=self.config.num_slots)  # (B, N, 2D)
        features = features.to(torch.promote_types(features.dtype, torch.float32))  # not half
        loc, log_variance = features.chunk(2, -1)
        return loc, log_variance / 2

    def select(self, loc: Tensor, log_scale: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Maximal-information attention: the N = `number` candidates whose KL is largest.

        (B, S, D) twice -> loc and log scale (B, N, D) and their KL (B, N), largest first. The
        choice has no gradient, nor do the others through it. The VAE has nothing to choose.
        """
        kl = gaussian_kl(loc, log_scale)  # (B, S)
        if self.to_code is not None:  # the order of a code's parts means something to its decoder
            return loc, log_scale, kl
        kl, chosen = kl.topk(min(number, kl.shape[1]))  # (B, N)
        chosen = repeat(chosen, "b n -> b n d", d=loc.shape[-1])  # (B, N, D)
        return loc.gather(1, chosen), log_scale.gather(1, chosen), kl

    def encode(self, image: Tensor, number: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q(z|x) of images in [0, 1]: loc, log scale (B, N, D), KL (B, N), nats; N is `number`."""
        return self.select(*self.posterior_map(image), number or self.config.num_slots)

    def decode(self, z: Tensor) -> Tensor:
        """Logits (B, C, H, W) of p(x|z) for any number of objects (B, N, D), N > 0."""
        if self.to_code is not None:
            z = rearrange(z, "b n d -> b 1 (n d)")  # one object
        objects = self.g(rearrange(z, "b n d -> (b n) d"))  # (B * N, C', H/2, W/2)
        return self.h(reduce(objects, "(b n) c h w -> b c h w", self.config.aggregation, b=len(z)))

    def elbo(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ELBO, nll, KL (B,) for standard normal noise (B, N, D); KL of all places (B, S); nats."""
        candidates = self.posterior_map(image)
        all_kl = gaussian_kl(*candidates)
        loc, log_scale, kl = self.select(*candidates, noise.shape[1])
        logits = self.decode(loc + log_scale.exp() * noise)
        nll = F.binary_cross_entropy_with_logits(logits, image, reduction="none")
        nll, kl = nll.flatten(1).sum(1), kl.sum(1)  # (B,)
        return -nll - kl, nll, kl, all_kl

    def set_step(self, step: int) -> None:
        """Sets the weights in the loss that change with the training step."""
        c = self.config
        if c.unselected:
            self.unselected.fill_(0.05 + 0.95 * min(step / c.unselected_steps, 1.0))
        self.exclusion.fill_((c.exclusion - 1) * np.interp(step, c.exclusion_steps, (0, 1, 1, 0)))

    def loss(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """`loss` to minimise, and the ELBO with its parts: means over the batch, nats.

        Paper: the negative ELBO. The short presets add the KL of the places that are not selected,
        and for a while a multiple of that of places with a larger one among eight neighbours.
        """
        elbo, nll, kl, all_kl = self.elbo(image, noise)
        loss = -elbo
        if self.to_code is None:
            kl_map = all_kl.unflatten(1, self.map_size)  # (B, h, w)
            beside = kl_map < F.max_pool2d(kl_map, 3, stride=1, padding=1)
            loss = loss + self.unselected * (all_kl.sum(1) - kl)
            loss = loss + self.exclusion * (kl_map * beside).flatten(1).sum(1)
        parts = dict(loss=loss, elbo=elbo, nll=nll, kl=kl)
        return {name: value.mean() for name, value in parts.items()}

    def noise(self, scenes: data.Scenes, index: Tensor) -> Tensor:
        """Standard normal (B, N, D), a function of seed, split and scene."""
        key = draws.make_key("mvae noise", scenes.split, self.config.seed)
        return draws.normal(key, index, (self.config.num_slots, self.config.latent_size))

    def kl_map(self, image: Tensor) -> Tensor:
        """KL of every place's candidate (B, h, w), nats; of the MVAE only."""
        return gaussian_kl(*self.posterior_map(image)).unflatten(1, self.map_size)

    def mean_image(self, z: Tensor) -> Tensor:
        """Means of the pixels (B, C, H, W) in [0, 1], of codes (B, N, D)."""
        return torch.sigmoid(self.decode(z))

    def exchange(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Fig. 3: images (B, C, H, W), B even, before and after pairs exchange their first code."""
        loc, _, _ = self.encode(image)  # (B, N, D)
        swapped = torch.cat([partner(loc)[:, :1], loc[:, 1:]], 1)
        return self.mean_image(loc), self.mean_image(swapped)


# -- evaluation ------------------------------------------------------------------------------------


def nll_floor(image: Tensor) -> Tensor:
    """The least nll (B,) that any logits reach: colours between 0 and 1 have an entropy, nats."""
    return (torch.special.entr(image) + torch.special.entr(1 - image)).flatten(1).sum(1)


def exchange_leak(before: Tensor, after: Tensor, coverage: Tensor) -> Tensor:
    """The share (B,) of the change between two images that lies outside two sprites.

    Not of the paper. before, after (B, C, H, W) as `exchange` gives them; coverage (B, E, H, W).
    Of all pairs of sprites, one of each scene, a pixel of border added, the one with the least leak
    counts: the true leak may be larger. 0: a clean exchange. NaN: a scene is empty, or no change.
    """
    delta = (after - before).abs().sum(1)  # (B, H, W)
    sprites = (coverage[:, 1:] > 0).float()  # (B, E-1, H, W)
    seen = sprites.flatten(1).any(1)
    sprites = F.max_pool2d(sprites, 3, stride=1, padding=1)
    union = torch.maximum(sprites[:, :, None], partner(sprites)[:, None])  # (B, E-1, E-1, H, W)
    inside = (union * delta[:, None, None]).flatten(3).sum(3).flatten(1).amax(1)  # (B,)
    leak = 1 - inside / delta.flatten(1).sum(1)
    return leak.masked_fill(~(seen & partner(seen)), math.nan)


def peaks(kl: Tensor) -> Tensor:
    """A map (B, h, w) with 0 wherever one of the four neighbours is larger."""
    column, row = F.max_pool2d(kl, (3, 1), 1, (1, 0)), F.max_pool2d(kl, (1, 3), 1, (0, 1))
    return kl * (kl == torch.maximum(column, row))


def count_regions(above: Tensor) -> Tensor:
    """Number (B,) of four-connected regions of a bool map (B, h, w)."""
    rows = F.pad(above, (0, 0, 0, 1)).flatten(0, 1)  # (B * (h+1), w), a gap below each scene
    labels, _ = ndimage.label(rows.cpu())  # numbered from the top
    last = labels.reshape(len(above), -1).max(1)  # (B,)
    return torch.from_numpy(np.diff(np.maximum.accumulate(last), prepend=0))


def best_threshold(kl: Tensor, counts: Tensor) -> float:
    """The t for which the number of KL > t is right most often; kl (M, h, w), counts (M,)."""
    # A scene of c objects is counted right by every t from its (c+1)-th largest KL up to below its
    # c-th, so t lies where most of these intervals overlap.
    kl = kl.flatten(1).sort(1, descending=True)[0]
    kl = F.pad(kl, (1, 1 + int(counts.max())))  # KL is above 0: nothing follows the last
    kl[:, 0] = math.inf
    low, high = (kl.gather(1, counts[:, None] + i).squeeze(1).sort()[0] for i in (1, 0))
    begun = torch.searchsorted(low, low, right=True)  # intervals with low <= t, for t in low
    ended = torch.searchsorted(high, low, right=True)
    return low[(begun - ended).argmax()].item()


def count_objects(seen: Tensor, seen_counts: Tensor, kl: Tensor, counts: Tensor) -> dict[str, Any]:
    """Section 4.3: a threshold that is best on some scenes, tested on others.

    seen (M, h, w), kl (M', h, w): KL maps; seen_counts (M,), counts (M',): true numbers. Result:
    confusion[true][counted]. Paper: what is counted above the threshold stays open. Here: `places`
    (the literal reading), `peaks`, larger than four neighbours, four-connected `regions` of places.
    """
    found = {}
    for name, before, after in (("places", seen, kl), ("peaks", peaks(seen), peaks(kl))):
        t = best_threshold(before, seen_counts)
        found[name] = t, (after > t).flatten(1).sum(1)
    tried = np.quantile(seen, 1 - np.logspace(-4, 0, 100)).tolist()  # up to half a point from best
    t = max(tried, key=lambda t: (count_regions(seen > t) == seen_counts).sum())
    found["regions"] = t, count_regions(kl > t)
    for name, (t, counted) in found.items():
        most = int(max(counted.max(), counts.max())) + 1
        confusion = (counts * most + counted).bincount(minlength=most**2).view(most, most)
        found[name] = dict(count_accuracy=metrics.mean_stderr((counted == counts).double()),
                           threshold=t, confusion=confusion.tolist())
    return found


@torch.no_grad()
def kl_maps(model: MVAE, scenes: data.Scenes, count: int) -> tuple[Tensor, Tensor]:
    """KL maps (count, h, w) of the first scenes; numbers (count,) of objects, hidden ones too."""
    maps, counts, number = [], [], min(count, scenes.count)
    for batch in map(scenes.scenes, torch.arange(number, device=scenes.device).split(256)):
        maps.append(model.kl_map(batch.image).cpu())
        counts.append(batch.present[:, 1:].sum(1).cpu())
    return torch.cat(maps), torch.cat(counts)


@torch.no_grad()
def evaluate(model: MVAE, scenes: data.Scenes, count: int = 1000) -> dict[str, Any]:
    """`metrics` over the first `count` scenes, and of the MVAE the counting of section 4.3.

    `mse` is that of the posterior means, `leak` that of an exchange. Thresholds are chosen on
    6.4 x count validation scenes (paper: 6,400 for training), tested on 12.8 x count.
    `count_accuracy` is of places, the literal reading; `count_chance` of the most frequent number.
    """
    values = defaultdict(list)
    for index in torch.arange(min(count, scenes.count), device=scenes.device).split(64):
        batch = scenes.scenes(index)
        elbo, nll, kl, _ = model.elbo(batch.image, model.noise(scenes, index))
        before, after = model.exchange(batch.image)
        scores = dict(elbo=elbo, nll=nll, kl=kl, nll_floor=nll_floor(batch.image),
                      mse=metrics.mse(batch.image, before))
        objects = batch.masks if batch.coverage is None else batch.coverage
        if objects is not None:
            scores["leak"] = exchange_leak(before, after, objects)
        for name, value in scores.items():
            values[name].append(value.double().cpu())
    results = {name: metrics.mean_stderr(torch.cat(parts)) for name, parts in values.items()}
    if model.config.model == "vae" or batch.present is None:
        return dict(metrics=results)

    validation = data.make(scenes.name, "validation", scenes.seed, scenes.device)
    number = math.ceil(6.4 * count)
    maps = *kl_maps(model, validation, number), *kl_maps(model, scenes, 2 * number)
    counting, counts = count_objects(*maps), maps[-1]
    for name, suffix in dict(places="", peaks="_peaks", regions="_regions").items():
        results[f"count_accuracy{suffix}"] = counting[name]["count_accuracy"]
    results["count_chance"] = metrics.mean_stderr((counts == counts.mode()[0]).double())
    return dict(metrics=results, counting=counting)


def heat(values: Tensor, shape: tuple[int, int, int], most: float) -> Tensor:
    """Maps (B, h, w) as grey images (B, *shape), shape = C, H, W: white where a value is `most`."""
    image = F.interpolate(values[:, None] / most, shape[1:]).clamp(0, 1)  # (B, 1, H, W)
    return image.expand(-1, shape[0], -1, -1)


@torch.no_grad()
def draw(model: MVAE, scenes: data.Scenes, folder: Path, results: dict[str, Any]) -> None:
    """Writes exchange.png (Fig. 3), reconstructions.png (Figs 6, 2b) and training.png (Fig. 2a)."""
    image = scenes.batch(0, 64).image
    seen = image.flatten(1).any(1)  # not black
    image = image[seen & partner(seen)][:16]  # eight pairs
    before, after = model.exchange(image)
    rows = torch.stack([image, before, after], 1)
    rows = rearrange(rows, "(r two) v c h w -> r (v two) c h w", two=2)
    heads = [f"{name} {side}" for name in ("Input", "Reconstruction", "Exchanged") for side in "AB"]
    figures.grid(folder / "exchange.png", rows, "A and B exchange their first code", heads,
                 apart=(2, 4))

    image, noise = image[:8], model.noise(scenes, torch.arange(8, device=scenes.device))
    rows = {"Data": image, "Reconstructions": before[:8]}
    if model.config.model == "mvae":
        kl = model.kl_map(image)
        rows["KL maps"] = heat(kl, image.shape[1:], kl.max().item())
    rows["Samples"] = model.mean_image(noise)
    figures.grid(folder / "reconstructions.png", torch.stack(list(rows.values())),
                 "Data, reconstructions, and scenes from the prior", labels=list(rows))

    history = runs.read_log(folder.parent)
    if len(history) > 1:
        x = [record["step"] for record in history]
        panels = {name: {"": (x, [record[name] for record in history], None)}
                  for name in ("elbo", "nll", "kl")}
        figures.curves(folder / "training.png", panels, "training step", "Training")


# -- training --------------------------------------------------------------------------------------


def learning_rate(config: Config, step: int) -> float:
    """Exponential decay from lr to lr * lr_final at lr_horizon, constant after it."""
    return config.lr * config.lr_final ** min(step / config.lr_horizon, 1.0)


def check(config: Config) -> None:
    """UserError, in one line, where the options cannot be."""
    runs.check(config)
    sizes = [name for name in vars(config) if name.endswith(("_channels", "_size"))]
    runs.at_least(config, 1, "num_slots", "lr_horizon", "unselected_steps", "exclusion", *sizes)
    runs.at_least(config, 0, "poolings", "single_steps")
    runs.positive(config, "init_gain", "lr_final")
    runs.require(config.kernels == "auto", "--kernels: MVAE uses none; leave it out")
    try:
        scenes = data.images(config.dataset)
    except ValueError as error:
        raise runs.UserError(error) from None
    runs.require(not config.single_steps or hasattr(scenes, "number"), f"--dataset "
                 f"{config.dataset}: it has no scenes of just one object; use --single-steps 0")
    runs.require(sorted(set(config.exclusion_steps)) == list(config.exclusion_steps),
                 f"--exclusion-steps must rise, not {config.exclusion_steps}")
    height, width, layers = scenes.height, scenes.width, len(config.encoder_channels)
    runs.require(height % 8 == width % 8 == 0, f"--dataset {config.dataset}: {height} x {width} "
                 "pixels; the decoder's three upsamplings need multiples of 8")
    room = (height >> config.poolings) * (width >> config.poolings)  # places
    runs.require(room and config.poolings <= layers, f"--poolings {config.poolings}: too many")
    runs.require(config.model == "vae" or room >= config.num_slots, f"--num-slots: at most {room}")


def build(config: Config, scenes: data.Scenes) -> MVAE:
    """The model for these scenes, initialised from the seed."""
    torch.manual_seed(config.seed)
    model = MVAE(config, scenes.num_channels, scenes.height, scenes.width)
    return model.to(scenes.device, memory_format=torch.channels_last)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> MVAE:
    """The trained model of a checkpoint (a file or a run's folder)."""
    return runs.load_model(path, "mvae", Config, lambda config: build(
        config, data.make(config.dataset, device=device)))


def train(config: Config) -> dict[str, Any]:
    """Trains one run, or resumes it, and evaluates it; returns the content of evaluation.json."""
    check(config)
    device = runs.set_up(config)
    scenes = data.make(config.dataset, "train", config.seed, device)
    model = build(config, scenes)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    run = runs.start("mvae", config, PRESETS, model, optimizer, title=config.model.upper(),
                     compiled=(model.encoder, model.g, model.h))
    number = dict(number=1) if config.single_steps else {}
    single = data.make(config.dataset, "train", config.seed, device, **number)
    for step, index in run.steps():
        early = step < config.single_steps
        image = (single if early else scenes).scenes(index).image
        slots = 1 if early and config.model == "mvae" else config.num_slots
        noise = model.noise(scenes, index)[:, :slots]
        model.set_step(step)
        parts = run.update(model.loss, image, noise, lr=learning_rate(config, step))
        if run.due(step):
            run.log(parts)
    test = data.make(config.dataset, "test", config.seed, device)
    show = "count_accuracy", "count_accuracy_peaks", "count_accuracy_regions", "leak", "elbo"
    return run.finish(test, evaluate, draw, show, picture="exchange.png")


if __name__ == "__main__":
    runs.main("mvae", Config, PRESETS, train)
