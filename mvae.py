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
"""MVAE, the Multi-Entity VAE: objects in one shot, found where the code is longest.

Nash, Eslami, Burgess, Higgins, Zoran, Weber & Battaglia, 2017. Every place of a feature map offers
a posterior; the N that say most about the image (KL against the prior) become the objects. The
decoder treats them alike, and pools, so that their order means nothing:

    z_n ~ N(0, I), n = 1..N;   o_n = g(z_n);   x ~ Bernoulli(sigmoid h(max_n o_n))  section 2
    q(z_s|x) = N(loc_s, scale_s^2) for each place s of the encoder's map
    q(z_1..N|x): the N places of largest KL_s = KL(q(z_s|x) || p(z))                 section 2.1
    L = E_q log p(x|z) - sum of the N selected KL_s

    python mvae.py                                           the quick preset, two CPU cores
    python mvae.py --model vae                               the baseline of appendix A
    python mvae.py --resume runs/mvae-quick-0 --experiment exchange

A run writes config.json, metrics.jsonl, checkpoint.pt, early.pt, evaluation.json and figures/ to
runs/mvae-<preset>-<seed>/.

Measured: 60.4 ± 2.1 % counted right as places, 77.7 ± 0.9 % as peaks, ten seeds, by `quick` in 4.7
minutes on one core of an AMD EPYC with AVX2 (notebooks/results/).

The defaults of Config are the paper's, or ours where it is silent. `quick` trades them for minutes:

    field                    paper            quick           why
    dataset                  sprites_3, 64px  sprites_3_32_scaled: a quarter of the pixels
    poolings, base_size      3, 8             2, 4            8 x 8 places, as at 64 pixels
    encoder_channels         32 32 64 64      16 32 32 64     less work
    batch_size               64               16              more training steps a minute
    lr, falling to           1e-3, 1e-5       3e-3, 3e-4      within 5,000 steps, not 3,000,000
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

import data
from data import draws, figures, metrics, options, runs

# B batch, N objects, D latent of one object, S places of the encoder's map, E entities, C H W image


@dataclass
class Config(options.RunConfig):
    """The defaults are the paper's, or stand where it is silent; PRESETS override them."""

    dataset: str = "sprites_3"  # one of data.DATASETS
    model: Literal["mvae", "vae"] = "mvae"  # vae: the baseline, one code of N * D latents
    num_slots: int = 5  # N. The paper's baseline has 60 latents, which are 5 of 12
    latent_size: int = 12  # D
    # Paper: four convolutions with max-pooling, sizes open. Here: the first `poolings` of the four
    # are followed by one, so that 64 pixels become 8 x 8 places, the side of the decoder's map.
    encoder_channels: tuple[int, ...] = (32, 32, 64, 64)
    poolings: int = 3
    head_channels: int = 64  # of the first of the two convolutions after the coordinates; open
    hidden_size: int = 256  # of the first of g's two linear layers; open
    base_size: int = 8  # side of the map that the second of them makes
    base_channels: int = 16  # of this map
    object_channels: int = 16  # of g's two convolutions, each after upsampling; open
    render_channels: int = 32  # of h's first two convolutions; open
    aggregation: Literal["max", "sum"] = "max"  # over objects; the VAE has one
    # Weights start normal with deviation gain / sqrt(inputs), biases at 0; open. torch's own
    # initialisation has a gain of 0.58: seven such layers, from z to the image, leave little of z.
    init_gain: float = 1.2
    # optimisation
    kl_weight: float = 1.0  # of the KL in the loss; the ELBO has 1
    batch_size: int = 64  # open
    lr: float = 1e-3
    lr_final: float = 0.01  # lr falls exponentially to this share of itself ...
    lr_horizon: int = 3_000_000  # ... over this many steps. Paper: "scheduled", shape open
    clip: float = 1e6  # norm of the global gradient; open
    early_step: int = 300  # its weights are kept, in early.pt, for --experiment maps; 0: never
    compare: str = ""  # with --experiment compare: the other run's folder

    run_control: ClassVar[set[str]] = {"compare"}  # may differ on --resume


PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        dataset="sprites_3_32_scaled", encoder_channels=(16, 32, 32, 64), base_size=4,
        poolings=2,  # 8 x 8 places, as at 64 pixels
        batch_size=16, lr=3e-3, lr_final=0.1, lr_horizon=5000, steps=5000,
    ),
    "sprites3": dict(dataset="sprites_3", steps=3_000_000),
    "sprites8": dict(dataset="sprites_8", num_slots=10, steps=3_000_000),
}


def make_config(preset: str = "quick", variant: str = "paper", **overrides: Any) -> Config:
    """A preset's Config; UserError for unknown names."""
    if preset not in PRESETS:
        raise options.UserError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    if variant != "paper":
        raise options.UserError(f"no variant {variant!r}: MVAE's authors released no code")
    return Config(**dict(preset=preset) | PRESETS[preset] | overrides)


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


# -- the model -------------------------------------------------------------------------------------


class MVAE(nn.Module):
    """And the VAE: the same layers, but all places together make one code of N * D latents."""

    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        c = self.config = config
        self.shape = channels, height, width
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
        places, self.code_size = (height >> c.poolings) * (width >> c.poolings), c.latent_size
        self.to_code = None
        if c.model == "vae":
            self.code_size = c.num_slots * c.latent_size
            self.to_code = nn.Linear(places * 2 * c.latent_size, 2 * self.code_size)
        self.g = nn.Sequential(
            nn.Linear(self.code_size, c.hidden_size), nn.ELU(inplace=True),
            nn.Linear(c.hidden_size, c.base_channels * c.base_size**2), nn.ELU(inplace=True),
            nn.Unflatten(1, (c.base_channels, c.base_size, c.base_size)),
            upsample(), conv(c.base_channels, c.object_channels), nn.ELU(inplace=True),
            upsample(), conv(c.object_channels, c.object_channels), nn.ELU(inplace=True),
        )
        self.h = nn.Sequential(
            conv(c.object_channels, c.render_channels), nn.ELU(inplace=True),
            conv(c.render_channels, c.render_channels), nn.ELU(inplace=True),
            upsample(), conv(c.render_channels, channels),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=c.init_gain / math.sqrt(layer.weight[0].numel()))
                nn.init.zeros_(layer.bias)

    def posterior_map(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """loc and log scale of every place's candidate (B, S, D); of the VAE's code (B, N, D)."""
        features = self.encoder(image)  # (B, 2D, h, w)
        if self.to_code is not None:
            features = self.to_code(features.flatten(1))  # (B, 2ND)
            features = rearrange(features, "b (two n d) -> b n (two d)", two=2,
                                 n=self.config.num_slots)
        else:
            features = rearrange(features, "b d h w -> b (h w) d")
        features = features.to(torch.promote_types(features.dtype, torch.float32))  # of autocast
        loc, log_variance = features.chunk(2, -1)
        return loc, log_variance / 2

    def select(
        self, loc: Tensor, log_scale: Tensor, number: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maximal-information attention: the `number` N of candidates whose KL is largest.

        (B, S, D) twice -> loc and log scale (B, N, D) and their KL (B, N), largest first. The
        choice has no gradient; what was not chosen gets none either.
        """
        kl = gaussian_kl(loc, log_scale)  # (B, S)
        kl, chosen = kl.topk(min(number, kl.shape[1]))  # (B, N)
        chosen = repeat(chosen, "b n -> b n d", d=loc.shape[-1])
        return loc.gather(1, chosen), log_scale.gather(1, chosen), kl

    def encode(
        self, image: Tensor, number: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q(z|x) of images (B, C, H, W) in [0, 1]: loc, log scale (B, N, D), KL (B, N) in nats.

        `number` is N; None: that of the config, as for the VAE always.
        """
        loc, log_scale = self.posterior_map(image)
        if self.to_code is not None:  # to its decoder the order means something
            return loc, log_scale, gaussian_kl(loc, log_scale)
        return self.select(loc, log_scale, number or self.config.num_slots)

    def decode(self, z: Tensor) -> Tensor:
        """Logits (B, C, H, W) of p(x|z) for any number of objects (B, N, D), N > 0."""
        if self.to_code is not None:
            z = rearrange(z, "b n d -> b 1 (n d)")
        objects = self.g(rearrange(z, "b n d -> (b n) d"))
        return self.h(reduce(objects, "(b n) c h w -> b c h w", self.config.aggregation, b=len(z)))

    def elbo(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ELBO, nll and KL (B,) in nats, for standard normal noise (B, N, D)."""
        loc, log_scale, kl = self.encode(image, noise.shape[1])
        logits = self.decode(loc + log_scale.exp() * noise)
        nll = F.binary_cross_entropy_with_logits(logits, image, reduction="none")
        nll, kl = nll.flatten(1).sum(1), kl.sum(1)
        return -nll - kl, nll, kl

    def loss(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """`loss` to minimise, and the ELBO with its parts: means over the batch, nats."""
        elbo, nll, kl = (part.mean() for part in self.elbo(image, noise))
        return dict(loss=nll + self.config.kl_weight * kl, elbo=elbo, nll=nll, kl=kl)

    def noise(self, scenes: data.Scenes, index: Tensor) -> Tensor:
        """Standard normal (B, N, D), a function of seed, split and scene."""
        key = draws.make_key("mvae noise", scenes.split, self.config.seed)
        return draws.normal(key, index, (self.config.num_slots, self.config.latent_size))


# -- evaluation ------------------------------------------------------------------------------------


def nll_floor(image: Tensor) -> Tensor:
    """The least nll (B,) that any logits reach: colours between 0 and 1 have an entropy, nats."""
    return (torch.special.entr(image) + torch.special.entr(1 - image)).flatten(1).sum(1)


def best_threshold(kl: Tensor, counts: Tensor) -> tuple[float, float]:
    """The t that counts best as the number of KL > t, and its accuracy on these scenes.

    kl (M, N), largest first; counts (M,). A scene of c objects is counted right by every t from its
    (c+1)-th KL up to below its c-th, so t lies where most of these intervals overlap.
    """
    kl = F.pad(kl, (1, 1 + int(counts.max())))  # KL is above 0: nothing follows the last
    kl[:, 0] = math.inf
    low, high = (kl.gather(1, counts[:, None] + i).squeeze(1).sort()[0] for i in (1, 0))
    begun = torch.searchsorted(low, low, right=True)  # intervals with low <= t, for t in low
    ended = torch.searchsorted(high, low, right=True)
    right, best = (begun - ended).max(0)
    return low[best].item(), right.item() / len(kl)


def kl_map(model: MVAE, image: Tensor) -> Tensor:
    """KL of every place's candidate (B, h, w), nats."""
    kl = gaussian_kl(*model.posterior_map(image))
    return rearrange(kl, "b (h w) -> b h w", h=model.shape[1] >> model.config.poolings)


def peaks(kl: Tensor) -> Tensor:
    """A map (B, h, w) with 0 wherever one of the eight neighbours is larger."""
    return kl * (kl == F.max_pool2d(kl, 3, stride=1, padding=1))


@torch.no_grad()
def sorted_kl(
    model: MVAE, scenes: data.Scenes, count: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The N largest KL (count, N) of places and of peaks; true numbers (count,) of objects."""
    parts = []
    for index in torch.arange(count, device=scenes.device).split(256):
        batch = scenes.scenes(index)
        kl = kl_map(model, batch.image)
        kl = torch.stack([kl, peaks(kl)]).flatten(2).topk(model.config.num_slots)[0]  # (2, B, N)
        parts.append((*kl.cpu(), batch.present[:, 1:].sum(1).cpu()))
    places, tops, counts = (torch.cat(values) for values in zip(*parts, strict=True))
    return dict(places=places, peaks=tops), counts


def count_objects(model: MVAE, scenes: data.Scenes, count: int = 6400) -> dict[str, Any]:
    """Section 4.3: thresholds from `count` validation scenes, tested on twice as many test scenes.

    Paper: a threshold on the KL maps; what is counted, it leaves open. Here: the places above it,
    and their peaks alone, as one object can fill neighbouring places. `present` means exists: a
    sprite that others hide counts too.
    """
    validation = data.make(model.config.dataset, "validation", model.config.seed, scenes.device)
    seen, seen_counts = sorted_kl(model, validation, count)
    kl, true = sorted_kl(model, scenes, 2 * count)
    chance = true.bincount().max().item() / len(true)  # always the most frequent number
    results = dict(count_chance=dict(mean=chance, stderr=0.0, n=len(true)))
    most = max(model.config.num_slots, scenes.max_entities - 1) + 1
    for name in kl:
        threshold, accuracy = best_threshold(seen[name], seen_counts)
        predicted = (kl[name] > threshold).sum(1)
        confusion = torch.zeros(most, most, dtype=torch.int64)
        confusion.index_put_((true, predicted), torch.tensor(1), accumulate=True)
        results[name] = dict(
            count_accuracy=metrics.mean_stderr((true == predicted).double()),
            threshold=threshold, validation_accuracy=accuracy, confusion=confusion.tolist(),
        )
    return results


def evaluate(model: MVAE, scenes: data.Scenes, count: int = 1000) -> dict[str, Any]:
    """`metrics` over the first `count` scenes; of `--model mvae` the counting of section 4.3 too.

    `nll_floor` is the part of nll that no model can avoid; `mse` is that of the posterior means.
    """
    values: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for index in torch.arange(count, device=scenes.device).split(64):
            image = scenes.scenes(index).image
            elbo, nll, kl = model.elbo(image, model.noise(scenes, index))
            mean = torch.sigmoid(model.decode(model.encode(image)[0]))
            for name, value in dict(elbo=elbo, nll=nll, kl=kl, nll_floor=nll_floor(image),
                                    mse=metrics.mse(image, mean)).items():
                values.setdefault(name, []).append(value.double().cpu())
    results = {name: metrics.mean_stderr(torch.cat(parts)) for name, parts in values.items()}
    if model.config.model == "vae":
        return dict(metrics=results)
    counting = count_objects(model, scenes, math.ceil(6.4 * count))
    results["count_accuracy"] = counting["places"]["count_accuracy"]
    results["count_accuracy_peaks"] = counting["peaks"]["count_accuracy"]
    results["count_chance"] = counting.pop("count_chance")
    return dict(metrics=results, counting=counting)


# -- what the paper shows --------------------------------------------------------------------------
#
# Each draws a figure into `folder` and returns numbers: (model, scenes, folder) -> results.


def heat(values: Tensor, size: tuple[int, int], most: float) -> Tensor:
    """Maps (..., h, w) as grey images (..., 3, H, W): white where the value is `most`."""
    rows, cols = size[0] // values.shape[-2], size[1] // values.shape[-1]
    return repeat(values / most, "... h w -> ... c (h i) (w j)", c=3, i=rows, j=cols).clamp(0, 1)


@torch.no_grad()
def maps(model: MVAE, scenes: data.Scenes, folder: Path) -> dict[str, Any]:
    """Fig. 2b: reconstructions and KL maps, early in training and now.

    `share`: of the map's KL, how much lies in as many places as there are objects (512 scenes).
    """
    early, run = build(model.config, scenes), folder.parent
    if model.config.experiment:  # --out may be elsewhere
        run = runs.checkpoint_file(model.config.resume).parent
    early.load_state_dict(runs.load_checkpoint(run / "early.pt", "mvae")["model"])
    batch = scenes.batch(0, 512)
    counts, shares = batch.present[:, 1:].sum(1), {}
    shown = batch.image[counts > 0][:8]
    columns = [shown]
    for name, one in dict(early=early, now=model).items():
        kl = kl_map(one, batch.image)
        largest = kl.flatten(1).sort(1, descending=True)[0].cumsum(1)  # (B, S)
        seen = counts.clamp(max=largest.shape[1])[:, None]
        share = F.pad(largest, (1, 0)).gather(1, seen)[:, 0] / largest[:, -1]
        shares[name] = metrics.mean_stderr(share[counts > 0])
        kl = kl[counts > 0][:8]
        columns += [torch.sigmoid(one.decode(one.encode(shown)[0])),
                    heat(kl, model.shape[1:], kl.max().item())]
    step = model.config.early_step
    figures.grid(folder / "maps.png", torch.stack(columns, 1),
                 "KL maps and reconstructions, early in training and now",
                 ["Input", f"Step {step:,}", "KL", "Now", "KL"], apart=(1, 3))
    return dict(share=shares, early_step=step)


@torch.no_grad()
def exchange(model: MVAE, scenes: data.Scenes, folder: Path, pairs: int = 500) -> dict[str, Any]:
    """Fig. 3: two scenes exchange the object of largest KL (the VAE: D of its latents).

    `leak`, which the paper does not measure: the share of an image's change that lies outside two
    sprites, one of each scene, with a border of one pixel. They are chosen so that it is least,
    which favours a model without objects. 0: a clean exchange; 1: everything else has changed.
    `change`: mean absolute change per value.
    """
    what = "object of largest KL" if model.config.model == "mvae" else "first group of latents"
    index = torch.arange(2 * pairs, device=scenes.device)
    leaks, changes = [], []
    for part in index.split(64):
        batch = scenes.scenes(part)
        loc, _, _ = model.encode(batch.image)  # (B, N, D)
        other = torch.arange(len(part), device=part.device) ^ 1  # 0 1 2 3 -> 1 0 3 2
        swapped = torch.cat([loc[other, :1], loc[:, 1:]], 1)
        before, after = (torch.sigmoid(model.decode(z)) for z in (loc, swapped))
        delta = (after - before).abs().sum(1)  # (B, H, W)
        sprites = (batch.coverage[:, 1:] > 0).float()  # (B, E-1, H, W)
        sprites = F.max_pool2d(sprites, 3, stride=1, padding=1)
        union = torch.maximum(sprites[:, :, None], sprites[other][:, None])  # (B, E-1, E-1, H, W)
        inside = (union * delta[:, None, None]).flatten(3).sum(3).flatten(1).amax(1)  # (B,)
        both = batch.present[:, 1:].any(1)
        both &= both[other]
        leaks.append((1 - inside / delta.flatten(1).sum(1))[both])
        changes.append((after - before).abs().flatten(1).mean(1)[both])
        if part[0] == 0:
            rows = torch.stack([batch.image, before, after], 1)
            rows = rearrange(rows, "(r two) v c h w -> r (v two) c h w", two=2)[both[::2]][:8]
            heads = [f"{name} {side}" for name in ("Input", "Reconstruction", "Exchanged")
                     for side in ("A", "B")]
            figures.grid(folder / "exchange.png", rows,
                         f"A and B exchange their {what}", heads, apart=(2, 4))
    return dict(leak=metrics.mean_stderr(torch.cat(leaks)),
                change=metrics.mean_stderr(torch.cat(changes)))


@torch.no_grad()
def sequential(model: MVAE, scenes: data.Scenes, folder: Path, count: int = 512) -> dict[str, Any]:
    """Fig. 4b: objects are added one by one, largest KL first.

    `mse` after 1 .. N objects. `surplus`: mean absolute change per value by the objects after as
    many as there are; by those before it, `needed`. Surplus slots should decode to nothing.
    """
    sums, surplus, needed = [], [], []
    for index in torch.arange(count, device=scenes.device).split(64):
        batch = scenes.scenes(index)
        loc, _, _ = model.encode(batch.image)
        images = torch.stack([  # (B, N, C, H, W)
            torch.sigmoid(model.decode(loc[:, : n + 1])) for n in range(loc.shape[1])
        ], 1)
        sums.append((images - batch.image[:, None]).square().flatten(2).mean(2))
        change = images.diff(dim=1).abs().flatten(2).mean(2)  # (B, N-1), by object 2 .. N
        number = torch.arange(2, loc.shape[1] + 1, device=index.device)
        more = number > batch.present[:, 1:].sum(1, keepdim=True)
        surplus.append(change[more])
        needed.append(change[~more])
        if index[0] == 0:
            columns = torch.cat([batch.image[:, None], images], 1)[batch.present[:, 1:].any(1)][:8]
            heads = ["Input", *(f"{n} object{'s' * (n > 1)}" for n in range(1, loc.shape[1] + 1))]
            figures.grid(folder / "sequential.png", columns,
                         "Objects added one by one, largest KL first", heads, apart=(1,))
    return dict(
        mse=torch.cat(sums).mean(0).tolist(),
        surplus=metrics.mean_stderr(torch.cat(surplus)),
        needed=metrics.mean_stderr(torch.cat(needed)),
    )


@torch.no_grad()
def traversals(model: MVAE, scenes: data.Scenes, folder: Path) -> dict[str, Any]:
    """Figs 4a and 5: one latent from -2.25 to 2.25, all others as inferred, in the fullest of 64
    scenes.

    The rows are the latents of the object of largest KL, or of the VAE's first group.
    `change` of each: mean absolute difference per value between the ends.
    """
    batch = scenes.batch(0, 64)
    scene = batch.present[:, 1:].sum(1).argmax()
    loc, _, _ = model.encode(batch.image[scene][None])  # (1, N, D)
    values = torch.linspace(-2.25, 2.25, 7, device=loc.device)
    size = model.config.latent_size
    z = repeat(loc, "1 n d -> r v n d", r=size, v=len(values)).clone()
    z[torch.arange(size), :, 0, torch.arange(size)] = values
    images = torch.sigmoid(model.decode(z.flatten(0, 1))).unflatten(0, z.shape[:2])
    change = (images[:, -1] - images[:, 0]).abs().flatten(1).mean(1)
    order = change.argsort(descending=True)
    figures.traversals(folder / "traversals.png", images[order],
                       [f"latent {d + 1}" for d in order.tolist()], values.tolist(),
                       "One latent at a time; everything else stays as it is")
    return dict(change=change.tolist())


@torch.no_grad()
def reconstructions(model: MVAE, scenes: data.Scenes, folder: Path) -> dict[str, Any]:
    """Fig. 6: data, reconstructions, and samples from the prior."""
    index = torch.arange(8, device=scenes.device)
    image = scenes.scenes(index).image
    key = draws.make_key("mvae samples", model.config.seed)
    z = draws.normal(key, index, (model.config.num_slots, model.config.latent_size))
    rows = [image, torch.sigmoid(model.decode(model.encode(image)[0])),
            torch.sigmoid(model.decode(z))]
    figures.grid(folder / "reconstructions.png", torch.stack(rows),
                 "Data, reconstructions, and scenes from the prior",
                 labels=["Data", "Reconstructions", "Samples"])
    return dict(mse=metrics.mean_stderr(metrics.mse(*rows[:2])))


def counting(model: MVAE, scenes: data.Scenes, folder: Path) -> dict[str, Any]:
    """Section 4.3, and its confusion matrix."""
    result = count_objects(model, scenes)
    draw_confusion(folder, result)
    return result


def draw_confusion(folder: Path, counting: dict[str, Any]) -> None:
    for name, what in dict(places="places of large KL", peaks="peaks of the KL map").items():
        matrix = np.array(counting[name]["confusion"])
        most = np.nonzero(matrix.any(0) | matrix.any(1))[0].max() + 1
        accuracy = counting[name]["count_accuracy"]["mean"]
        figures.confusion(folder / f"counting_{name}.png", matrix[:most, :most],
                          f"Objects counted as {what}: {accuracy:.1%} right")


def compare(model: MVAE, scenes: data.Scenes, folder: Path) -> dict[str, Any]:
    """Fig. 2a: training curves of this run and of --compare, smoothed; their scores side by side.

    The other run is the VAE's, one with the other aggregation, or any run of this model.
    """
    other = model.config.compare
    dataset = load(other)["config"]["dataset"]
    options.require(dataset == model.config.dataset,
                    f"--compare {other}: trained on {dataset}, this run on {model.config.dataset}")
    panels, results = {}, {}
    for path in (other, model.config.resume):  # this run last: exchange.png is then its own
        run, config = runs.checkpoint_file(path).parent, load(path)["config"]
        name = config["model"].upper() + f", {config['aggregation']}" * (config["model"] == "mvae")
        name += f", {run.name}" * (name in results)
        history = [record for record in runs.read_log(run) if record["loss"] is not None]
        for metric in ("elbo", "nll", "kl"):
            y = [record[metric] for record in history]
            average = [y[0]] if y else []  # exponential moving average, as in the paper
            for value in y[1:]:
                average.append(0.9 * average[-1] + 0.1 * value)
            x = [record["step"] for record in history]
            panels.setdefault(metric, {})[name] = (x, average, None)
        one = load_model(path, scenes.device)
        results[name] = dict(evaluate(one, scenes)["metrics"],
                             leak=exchange(one, scenes, folder)["leak"])
    figures.curves(folder / "compare.png", panels, "training step",
                   "Training, moving averages, scenes of each step")
    return results


EXPERIMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "maps": maps, "exchange": exchange, "sequential": sequential, "traversals": traversals,
    "reconstructions": reconstructions, "counting": counting, "compare": compare,
}  # fmt: skip


def draw(model: MVAE, scenes: data.Scenes, folder: Path, results: dict[str, Any]) -> None:
    """Writes every experiment's figure but that of `compare`, and training.png."""
    for experiment in (exchange, traversals, reconstructions):
        experiment(model, scenes, folder)
    if model.config.model == "mvae":
        sequential(model, scenes, folder)
        draw_confusion(folder, results["counting"])
        if (folder.parent / "early.pt").exists():
            maps(model, scenes, folder)
    history = runs.read_log(folder.parent)
    if len(history) > 1:
        x = [record["step"] for record in history]
        panels = {name: {"": (x, [record[name] for record in history], None)}
                  for name in ("elbo", "nll", "kl")}
        figures.curves(folder / "training.png", panels, "training step",
                       f"Training, preset {model.config.preset}, scenes of each step")


# -- training --------------------------------------------------------------------------------------


def learning_rate(config: Config, step: int) -> float:
    """Exponential decay from lr to lr * lr_final at lr_horizon, constant after it."""
    return config.lr * config.lr_final ** min(step / config.lr_horizon, 1.0)


def check(config: Config) -> None:
    """UserError, in one line, where the options cannot be."""
    options.check(config, EXPERIMENTS)
    options.at_least_one(config, "num_slots", "latent_size", "encoder_channels",
                         "head_channels", "hidden_size", "base_size", "base_channels",
                         "object_channels", "render_channels", "lr_horizon")
    options.at_least_zero(config, "poolings", "kl_weight", "early_step")
    options.positive(config, "init_gain", "lr_final", "clip")
    options.require(config.kernels == "auto", "--kernels: MVAE uses none; leave it away")
    one_code = config.model == "vae" and config.experiment in ("maps", "sequential", "counting")
    options.require(not one_code,
                    f"--experiment {config.experiment}: only --model mvae has objects")
    options.require(config.experiment != "compare" or bool(config.compare),
                    "--experiment compare needs --compare RUN, another run's folder")
    options.require(config.experiment == "compare" or not config.compare,
                    "--compare: only with --experiment compare")
    try:
        scenes = data.make(config.dataset)
        has_coverage = scenes.batch(0, 1).coverage is not None
    except ValueError as error:
        raise options.UserError(error) from None
    options.require(scenes.num_channels == 3 and has_coverage, f"--dataset {config.dataset}: "
                    "choose one of the sprites data sets, whose colours are summed")
    places = (scenes.height >> config.poolings) * (scenes.width >> config.poolings)
    layers = len(config.encoder_channels)
    options.require(config.poolings <= layers, f"--poolings {config.poolings}: {layers} layers")
    options.require(places > 0, f"--poolings {config.poolings}: nothing is left of {scenes.height} "
                    "pixels")
    options.require(config.model == "vae" or config.num_slots <= places,
                    f"--num-slots {config.num_slots}: the encoder's map has {places} places")
    options.require(8 * config.base_size == scenes.height,
                    f"--base-size {config.base_size}: three upsamplings make {8 * config.base_size}"
                    f" pixels, the images of {config.dataset} have {scenes.height}")


def build(config: Config, scenes: data.Scenes) -> MVAE:
    """The model for these scenes, initialised from the seed."""
    torch.manual_seed(config.seed)
    model = MVAE(config, scenes.num_channels, scenes.height, scenes.width)
    return model.to(scenes.device, memory_format=torch.channels_last)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> MVAE:
    """The trained model of a checkpoint (a file or a run's folder)."""
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
    optimizer = torch.optim.Adam(parameters, fused=True)
    done = dict(steps=0, minutes=0.0, skipped=0)
    if config.resume:
        saved = load(config.resume)
        model.load_state_dict(saved["model"])
        if not (config.eval_only or config.experiment):
            optimizer.load_state_dict(saved["optimizer"])
        done = dict(steps=saved["step"], minutes=saved["minutes"], skipped=saved["skipped"])
    leader, folder = runs.rank() == 0, Path()
    if leader:
        folder = runs.open_folder(config, "mvae")
        default = make_config(config.preset, config.variant)
        size = sum(p.numel() for p in parameters)
        runs.header(f"{config.model.upper()}, {size:,} parameters", config, default, device, folder)
    if config.eval_only or config.experiment:
        return finish(config, model, device, folder, done) if leader else {}
    if config.compile:
        for part in (model.encoder, model.g, model.h):
            part.compile()
    amp = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")

    def forward_backward(image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad()
        with amp:
            parts = model.loss(image, noise)
        parts["loss"].backward()
        return parts

    def save(name: str = "checkpoint.pt") -> float:
        if leader:
            runs.save_checkpoint(folder, "mvae", config, name, model=model.state_dict(),
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
            parts = forward_backward(scenes.scenes(index).image, model.noise(scenes, index))
            runs.average([p.grad for p in parameters])
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
                means = torch.stack([value.detach().float() for value in parts.values()])
                runs.average([means])
                if leader:
                    progress.report(dict(
                        step=step, **dict(zip(parts, means.tolist(), strict=True)),
                        grad_norm=norm.item(), lr=lr, skipped=done["skipped"],
                        seconds=60 * done["minutes"],
                    ))
            if step == config.early_step:
                save("early.pt")
            if time.monotonic() - last_save > config.checkpoint_seconds:
                last_save = save()
    save()
    if runs.any_process(bool(stop), device):
        raise KeyboardInterrupt(f"stopped after step {step}; go on with --resume {folder}")
    return finish(config, model, device, folder, done) if leader else {}


def finish(
    config: Config, model: MVAE, device: torch.device, folder: Path, done: dict[str, Any]
) -> dict[str, Any]:
    """Evaluates on test scenes, writes evaluation.json and the figures, says what was reached."""
    scenes = data.make(config.dataset, "test", config.seed, device)
    if config.experiment:
        result = EXPERIMENTS[config.experiment](model, scenes, folder / "figures")
        runs.write(folder / f"{config.experiment}.json", result)
        print(json.dumps(result, indent=1))
        return result
    with runs.announced("evaluating test scenes"):
        results = evaluate(model, scenes)
    evaluation = runs.evaluation("mvae", config, device, **done, **results, settings=[])
    runs.write(folder / "evaluation.json", evaluation)
    with runs.announced("drawing figures"):
        draw(model, scenes, folder / "figures", results)
    m = {name: math.nan if result["mean"] is None else result["mean"]
         for name, result in results["metrics"].items()}
    reached = f"elbo {m['elbo']:.1f} nats"
    if "count_accuracy" in m:
        reached = f"count accuracy {m['count_accuracy']:.3f} (chance {m['count_chance']:.3f})"
    print(f"reached  {reached} after {done['steps']:,} steps in {done['minutes']:.1f} min")
    print(f"look at  {folder / 'figures' / 'exchange.png'}")
    return evaluation


def load(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this model."""
    return runs.load_checkpoint(path, "mvae")


if __name__ == "__main__":
    options.main(Config, make_config, load, train)
