"""air.py against an own AIR, written from the paper, and its estimators against exact sums.

The own AIR gets the same weights and noise in float64, takes its steps once for every number of
objects, and must agree on every intermediate and on the gradient of every parameter. Expectations
over answers are sums over all answers, each weighed by its probability, and REBAR's over noise are
Gauss-Legendre quadratures: no sampling error, so an estimator is unbiased to nine digits or wrong.
(6,000 draws say the same, at five standard errors.) Then what follows from the mathematics,
training, and mutants of air.py, which must be found out.

Axes: B batch, S samples, N steps, R rows (a set of answers each), D latent, C H W image.
"""

import contextlib
import functools
import itertools
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mutants
import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from test_runs import assert_same_run, checkpoint, log, same
from test_runs import resumed as resumed_model
from torch import Tensor, nn

import air
import data
from data import draws, options, runs

TOLERANCE = 1e-9  # of the largest value of a tensor
HALF = 2.0**-25  # what air.logistic adds to uniform numbers


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def double_precision():
    """Buffers are made in the default precision; a float32 0.2 would be 3e-9 off."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE):
    """The largest error, as a share of the largest value; 1e-12 for what is zero by symmetry."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, not {expected.shape}"
    assert actual.isfinite().all(), f"{name} is off: not finite"
    error = (actual - expected).abs().max().item()
    limit = tolerance * expected.abs().max().item() + 1e-12
    assert error <= limit, f"{name} is off by {error:.3g}, more than {limit:.3g}"


# -- an own AIR, written from the paper ------------------------------------------------------------


class Eager:
    """Eq. 2 to 12 for one image and one number of objects at a time.

    `weights` holds see, gates, head, encoder, decoder, background (lists of weight and bias) and
    initial (h^0, its cell, where^0, what^0): tensors that require grad.
    """

    def __init__(self, config: air.Config, weights: dict, exploration: float = 0.0):
        self.config, self.weights, self.exploration = config, weights, exploration
        c = config
        mean, std = [c.scale_mean, 0.0, 0.0], [c.scale_std, 1.0, 1.0]
        self.where_prior = D.Normal(torch.tensor(mean), torch.tensor(std))
        self.what_prior = D.Normal(torch.zeros(c.latent_size), torch.ones(c.latent_size))
        ratio = c.prior_ratio
        numbers = range(c.max_objects + 1)
        self.prior = [ratio**n / sum(ratio**m for m in numbers) for n in numbers]  # eq. 2, cut off

    def mlp(self, name: str, x: Tensor) -> Tensor:
        *hidden, (weight, bias) = self.weights[name]
        for w, b in hidden:
            x = (w @ x + b).clamp(min=0)
        return weight @ x + bias

    @staticmethod
    def warp(picture: Tensor, scale: Tensor, col: Tensor, row: Tensor, size: tuple) -> Tensor:
        """A spatial transformer: the output (C, *size) at (x, y) is the picture's scale * (x, y) +
        (col, row)."""
        zero = torch.zeros_like(scale)
        theta = torch.stack([torch.stack([scale, zero, col]), torch.stack([zero, scale, row])])
        grid = F.affine_grid(theta[None], [1, len(picture), *size], align_corners=False)
        return F.grid_sample(picture[None], grid, align_corners=False)[0]

    def run(self, image: Tensor, noise: Tensor, n: int) -> SimpleNamespace:
        """Eq. 4 to 6 where z^p is n ones and a zero: image (C, H, W), noise (N, 3 + D).

        The steps after the zero exist for eq. 11 alone, whose h^N they end in.
        """
        c, w = self.config, self.weights
        channels, *size = image.shape
        glimpse = [c.glimpse_size] * 2
        h, cell, where, what = w["initial"].split([c.lstm_size, c.lstm_size, 3, c.latent_size])
        log_q, objects = torch.zeros(()), []
        run = SimpleNamespace(logits=[], kl=[], log_ratio=[], where=[], what=[], objects=objects)
        for i in range(c.max_objects):
            seen = image - sum(objects) if c.difference else image
            gates = w["see"][0][0] @ seen.flatten() + w["see"][0][1]
            gates = gates + w["gates"][0] @ torch.cat([h, where, what])
            into, new, forget, out = gates.chunk(4)  # the order of Sonnet; its forget bias is 1
            cell = (forget + 1).sigmoid() * cell + into.sigmoid() * new.tanh()
            h = out.sigmoid() * cell.tanh()  # eq. 5
            logit, loc, raw = self.mlp("head", h).split([1, 3, 3])
            chance = self.exploration
            yes = chance / 2 + (1 - chance) * logit[0].sigmoid()
            q = D.Normal(
                self.where_prior.loc + loc * self.where_prior.scale,
                raw.exp().log1p() * self.where_prior.scale,
            )
            where = q.loc + q.scale * noise[i, :3]
            kl = D.kl_divergence(q, self.where_prior).sum()
            ratio = (self.where_prior.log_prob(where) - q.log_prob(where)).sum()
            # The window, image to glimpse: u = scale * v + shift solved for v.
            scale, col, row = where
            seen = self.warp(image, 1 / scale, -col / scale, -row / scale, glimpse)
            loc, raw = self.mlp("encoder", seen.flatten()).chunk(2)
            q = D.Normal(loc, raw.exp().log1p())
            what = q.loc + q.scale * noise[i, 3:]
            kl = kl + D.kl_divergence(q, self.what_prior).sum()
            ratio = ratio + (self.what_prior.log_prob(what) - q.log_prob(what)).sum()
            pixels = (self.mlp("decoder", what) + c.decoder_bias).sigmoid()
            objects.append(self.warp(pixels.view(channels, *glimpse), scale, col, row, size))
            if i <= n:  # this was asked, and the answer is z^{p, i+1}
                log_q = log_q + D.Bernoulli(yes).log_prob(torch.tensor(float(i < n)))
            run.logits.append(yes.log() - (1 - yes).log())
            for name, value in dict(kl=kl, log_ratio=ratio, where=where, what=what).items():
                getattr(run, name).append(value)
        background = torch.zeros_like(image)
        if c.background:
            background = self.mlp("background", h).view_as(image)  # eq. 11
        run.background = background
        run.canvas = background + sum(objects[:n])  # eq. 12
        run.log_likelihood = D.Normal(run.canvas, c.sigma).log_prob(image).sum()
        run.log_q, run.log_p = log_q, math.log(self.prior[n])
        run.bound = run.log_likelihood + run.log_p - run.log_q - sum(run.kl[:n])
        run.log_w = run.log_likelihood + run.log_p - run.log_q + sum(run.log_ratio[:n])
        return run

    def runs(self, image: Tensor, noise: Tensor) -> list[SimpleNamespace]:
        return [self.run(image, noise, n) for n in range(self.config.max_objects + 1)]

    def elbo(self, image: Tensor, noise: Tensor) -> Tensor:
        """Eq. 8 of one image, the expectation over n a sum."""
        return sum(run.log_q.exp() * run.bound for run in self.runs(image, noise))

    def multi_sample_bound(self, image: Tensor, noise: Tensor) -> Tensor:
        """VIMCO's: E log mean_s w_s over all numbers of all S samples. noise (S, N, 3 + D)."""
        total = torch.zeros(())
        for combination in itertools.product(*(self.runs(image, each) for each in noise)):
            log_w = torch.stack([run.log_w for run in combination])
            q = torch.stack([run.log_q for run in combination]).sum().exp()
            total = total + q * (log_w.logsumexp(0) - math.log(len(noise)))
        return total


SMALL = dict(
    max_objects=2, latent_size=2, glimpse_size=4, scale_mean=1.5, scale_std=0.3, lstm_size=5,
    head_sizes=(4,), encoder_sizes=(4,), decoder_sizes=(4,), prior_ratio=0.4, sigma=0.5,
    background_size=256,
)  # fmt: skip
SHAPE = (1, 6, 5)


def small(**overrides) -> air.Config:
    """Networks for exact comparisons in milliseconds; both priors' ratios are the same."""
    return air.Config(**SMALL | overrides)


@double_precision()
def make_model(config: air.Config, shape=SHAPE, module: ModuleType = air) -> nn.Module:
    """In float64, with vectors moved off the zeros that would hide mistakes."""
    torch.manual_seed(0)
    model = module.AIR(config, *shape).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.5 * torch.randn_like(parameter)
    return model


def make_inputs(config: air.Config, shape=SHAPE, batch: int = 2, samples: int = 1, seed: int = 1):
    """image (B, C, H, W); normal (B, S, N, 3 + D); uniform (B, S, N, 2)."""
    g = torch.Generator().manual_seed(seed)
    steps = batch, samples, config.max_objects
    kind = dict(generator=g, dtype=torch.float64)
    image = torch.rand(batch, *shape, **kind)
    normal = torch.randn(*steps, 3 + config.latent_size, **kind)
    return image, normal, torch.rand(*steps, 2, **kind)


def bind(model: nn.Module, exploration: float = 0.0) -> tuple[Eager, dict[str, Tensor]]:
    """The eager model with a copy of the weights, and the copies under air.py's names."""
    p = {name: v.detach().clone().requires_grad_() for name, v in model.named_parameters()}
    weights: dict = {"initial": p["initial"], "gates": [p["gates.weight"]]}
    for part in ("see", "head", "encoder", "decoder", "background"):
        names = [n.removesuffix(".weight") for n in p if n.startswith(part) and "weight" in n]
        weights[part] = [(p[n + ".weight"], p[n + ".bias"]) for n in names]
    return Eager(model.config, weights, exploration), p


def log_prior_of(config: air.Config) -> Tensor:
    return torch.tensor(Eager(config, {}).prior, dtype=torch.float64).log()


def assert_same_gradients(
    model: nn.Module, value: Tensor, copies: dict, expected: Tensor, what: str = "",
    all_matter: bool = True,
) -> None:  # fmt: skip
    """Of every parameter that is not the baseline's, which the paper's bound does not contain."""
    names = [n for n in copies if not n.startswith("baseline")]
    mine = dict(model.named_parameters())
    how = dict(allow_unused=True, retain_graph=True)
    actual = torch.autograd.grad(value, [mine[n] for n in names], **how)
    wanted = torch.autograd.grad(expected, [copies[n] for n in names], **how)
    largest = max(g.abs().max().item() for g in wanted if g is not None)
    for name, a, w in zip(names, actual, wanted, strict=True):
        a, w = (torch.zeros_like(copies[name]) if g is None else g for g in (a, w))
        if all_matter:
            assert w.abs().max() > 1e-5 * largest, f"{name}: nothing to compare"
        assert_close(f"{what} gradient of {name}", a, w)


def bound_of(eager: Eager, name: str, image: Tensor, normal: Tensor) -> Tensor:
    """What an estimator's gradient is of, for image (1, C, H, W) and normal (1, S, N, 3 + D)."""
    if name == "vimco":
        return eager.multi_sample_bound(image[0], normal[0])
    return eager.elbo(image[0], normal[0, 0])


def flat_gradient(value: Tensor, parameters: dict) -> Tensor:
    """(P,) of all parameters that are not the baseline's."""
    chosen = [p for name, p in parameters.items() if not name.startswith("baseline")]
    gradients = torch.autograd.grad(value, chosen, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


@double_precision()
def check_eager(
    module: ModuleType = air, shape=SHAPE, exploration: float | None = None, **overrides
) -> None:
    """AssertionError, which names the first quantity in which the two models differ."""
    config = small(**overrides)
    model = make_model(config, shape, module)
    image, normal, uniform = make_inputs(config, shape)
    share = None if exploration is None else torch.tensor(exploration)
    eager, copies = bind(model, exploration or 0.0)
    log_prior = model.log_prior(0)
    assert_close("log p(n)", log_prior, torch.tensor(eager.prior).log())
    u = model.unroll(image, normal[:, 0], share)
    bounds, nlls, kls = module.elbo(u, log_prior)
    total = 0
    for b in range(len(image)):
        results = eager.runs(image[b], normal[b, 0])
        for name in ("logits", "where", "kl", "what", "log_ratio", "objects"):
            assert_close(name, getattr(u, name)[b], torch.stack(getattr(results[-1], name)))
        assert_close("background", u.background[b], results[0].background)
        log_q = module.count_log_probs(u.logits[b])
        for n, run in enumerate(results):
            assert_close(f"canvas of {n}", u.canvases[b, n], run.canvas)
            assert_close(f"log p(x|{n})", u.log_likelihood[b, n], run.log_likelihood)
            assert_close(f"log q({n})", log_q[n], run.log_q)
        weights = [run.log_q.exp() for run in results]
        nll = sum(-w * run.log_likelihood for w, run in zip(weights, results, strict=True))
        bound = sum(w * run.bound for w, run in zip(weights, results, strict=True))
        assert_close("nll", nlls[b], nll)
        assert_close("KL", kls[b], -bound - nll)
        assert_close("ELBO", bounds[b], bound)
        total = total + bound
    parts = model.loss(image, normal, uniform, log_prior, share)
    for name, value in dict(elbo=bounds, nll=nlls, kl=kls).items():
        assert_close(name, parts[name], value.mean())
    assert_close("loss", parts["loss"], -total / len(image))
    assert_same_gradients(model, parts["loss"], copies, -total / len(image))


CASES: dict[str, dict] = {
    "two steps": {},
    "one step": dict(max_objects=1),
    "four steps": dict(max_objects=4),
    "colour": dict(shape=(3, 5, 7)),
    "difference": dict(difference=True, max_objects=3),
    "background": dict(background=True),
    "background, difference, three steps": dict(background=True, difference=True, max_objects=3),
    "exploration": dict(exploration=0.3),
    "no exploration": dict(exploration=0.0),
    "more layers, other sizes": dict(
        head_sizes=(4, 3), encoder_sizes=(3, 5), decoder_sizes=(3, 4, 5), glimpse_size=3,
        latent_size=3, decoder_bias=0.5, sigma=0.3,
    ),
    "glimpse larger than the image": dict(glimpse_size=9, scale_mean=0.9),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_eager_model(case):
    check_eager(**CASES[case])


# -- the spatial transformer -----------------------------------------------------------------------


def reference_warp(picture: Tensor, theta: Tensor, size: tuple, align_corners: bool) -> Tensor:
    grid = F.affine_grid(theta, [*picture.shape[:2], *size], align_corners=align_corners)
    return F.grid_sample(picture, grid, align_corners=align_corners)


def axis_aligned(scale: Tensor, col: Tensor, row: Tensor) -> Tensor:
    """(B, 2, 3) of affine_grid: x is the column, and comes first."""
    zero = torch.zeros_like(scale)
    return torch.stack([scale, zero, col, zero, scale, row], -1).unflatten(-1, (2, 3))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "inputs"), [(7, 5, (4, 4)), (5, 9, (6, 3)), (11, 2, (2, 8)), (2, 2, (2, 2))]
)
def test_interpolation_is_grid_sample(height, width, inputs, align_corners):
    """Values and gradients of picture, scales and shifts; mirrored and far-off windows too."""
    g = torch.Generator().manual_seed(0)
    scale, col, row = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(3))
    scale = 1.5 * scale
    picture = torch.randn(20, 3, *inputs, generator=g, dtype=torch.float64)
    output = torch.randn(20, 3, height, width, generator=g, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (picture, scale, col, row)]
    rows = air.interpolation(scale, row, height, inputs[0], align_corners)
    cols = air.interpolation(scale, col, width, inputs[1], align_corners)
    assert rows.shape == (20, height, inputs[0]) and cols.shape == (20, width, inputs[1])
    mine = rows[:, None] @ picture @ cols[:, None].mT
    theta = axis_aligned(scale, col, row)
    other = reference_warp(picture, theta, (height, width), align_corners)
    assert_close("image", mine, other, 1e-12)
    actual, expected = (torch.autograd.grad(x, leaves, output) for x in (mine, other))
    for name, a, e in zip(("picture", "scale", "column", "row"), actual, expected, strict=True):
        assert_close(f"gradient of {name}", a, e, 1e-10)


@double_precision()
def check_transformer(module: ModuleType = air) -> None:
    """place and attend against grid_sample, with several axes in front; boxes against ink."""
    g = torch.Generator().manual_seed(0)
    where = torch.randn(4, 5, 3, generator=g) * torch.tensor([0.7, 1, 1])
    where[..., 0] += 1.5
    scale, col, row = where.flatten(0, 1).unbind(-1)
    glimpse, image = (torch.rand(4, 5, 3, *size, generator=g) for size in ((6, 6), (9, 7)))
    placed = reference_warp(glimpse.flatten(0, 1), axis_aligned(scale, col, row), (9, 7), False)
    theta = axis_aligned(1 / scale, -col / scale, -row / scale)
    attended = reference_warp(image.flatten(0, 1), theta, (6, 6), False)
    assert_close("place", module.place(glimpse, where, (9, 7)).flatten(0, 1), placed, 1e-12)
    assert_close("attend", module.attend(image, where, 6).flatten(0, 1), attended, 1e-12)

    # A white glimpse fades at its edges, and they are where it is half as bright as inside.
    size = (50, 40)
    where = torch.tensor([[3.0, 0.9, -1.1], [2.5, -0.7, 1.2], [4.0, 2.0, 0.0], [-2.0, 0.3, 0.4]])
    ink = module.place(torch.ones(4, 1, 28, 28), where, size)[:, 0]  # (4, 50, 40)
    windows = module.boxes(where, size)
    for axis, length in enumerate(size):
        profile = ink.amax(2 - axis)  # (4, length)
        begin, extent = windows[:, axis, None], windows[:, 2 + axis, None]
        pixels = torch.arange(length) + 0.5
        inside = (begin <= pixels) & (pixels <= begin + extent)
        assert torch.equal(profile >= 0.5 - 1e-9, inside), "boxes are off"
    assert_close("size of boxes", windows[:, 2:], torch.tensor(size) / where[:, :1].abs())


def test_place_and_attend_are_grid_sample_and_boxes_are_where_the_ink_is():
    check_transformer()


def test_attending_undoes_placing():
    """A smooth glimpse comes back through a window that has as many pixels as it has."""
    glimpse = torch.rand(1, 1, 7, 7, dtype=torch.float64)
    where = torch.tensor([[3.0, 4 / 7, -2 / 7]], dtype=torch.float64)  # 7 of 21 pixels, from 8, 5
    image = air.place(glimpse, where, (21, 21))
    assert_close("glimpse", air.attend(image, where, 7), glimpse, 1e-12)
    top, left, height, width = air.boxes(where, (21, 21))[0].round().int().tolist()
    assert_close("pixels", image[0, 0, top : top + height, left : left + width], glimpse[0, 0])


def test_the_transformer_has_second_derivatives():
    """grid_sample has none, and estimators that minimise their own variance need them."""
    g = torch.Generator().manual_seed(0)
    where = torch.tensor([[1.4, 0.3, -0.2], [-0.8, 0.1, 0.4]], dtype=torch.float64)
    glimpse, image = (torch.rand(2, 1, *s, generator=g, dtype=torch.float64)
                      for s in ((3, 3), (4, 5)))  # fmt: skip
    for x in (where, glimpse, image):
        x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: air.place(a, b, (4, 5)), (glimpse, where))
    assert torch.autograd.gradgradcheck(lambda a, b: air.attend(a, b, 3), (image, where))


@pytest.mark.parametrize("scale", [1e-2, 1e-4, -1e-6, 1e-8, 1e4])
def test_the_transformer_is_finite_for_scales_near_zero(scale):
    """In float32; shifts at random, and none, where the centre of the window is a pixel's."""
    for shift in (0.0, 0.3):
        where = torch.tensor([[scale, shift, -shift]], requires_grad=True)
        picture = torch.rand(1, 1, 5, 5, requires_grad=True)
        for output in (air.attend(picture, where, 3), air.place(picture, where, (3, 3))):
            gradients = torch.autograd.grad(output.square().sum(), (picture, where))
            assert all(x.isfinite().all() for x in (output, *gradients))


# -- the number of objects -------------------------------------------------------------------------


@double_precision()
def check_numbers(module: ModuleType = air) -> None:
    """The closed forms of q(n) and p(n), and the schedules of what p(n) and q(n) are made of."""
    for yes, q in (
        ([0.5, 0.5, 0.5], [0.5, 0.25, 0.125, 0.125]), ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]),
        ([0.9, 0.2, 0.7], [0.1, 0.72, 0.054, 0.126]),
    ):  # fmt: skip
        actual = module.count_log_probs(torch.tensor(yes).logit()).exp()
        assert_close("q(n)", actual, torch.tensor(q))
    logits = 3 * torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    q = module.count_log_probs(logits)
    assert q.shape == (5, 4, 7)
    assert_close("sum of q", q.exp().sum(-1), torch.ones(5, 4))
    extreme = module.count_log_probs(torch.tensor([100.0, -100.0, 100.0, 1000.0]))
    assert_close("log q", extreme, torch.tensor([-100.0, 0.0, -200.0, -1100.0, -100.0]))

    ratios = dict(prior_ratio=0.01, prior_ratio_final=0.01)
    model = make_model(small(max_objects=3, **ratios), module=module)
    expected = torch.tensor([0.99000001, 0.0099, 9.9e-5, 9.9e-7])
    assert_close("p(n)", model.log_prior(0).exp(), expected, 1e-8)
    after = expected.flip(0).cumsum(0).flip(0)  # p(n >= i)
    success = torch.tensor([0.00999999, 0.00999901, 0.00990099])
    assert_close("p(one more)", after[1:] / after[:-1], success, 1e-6)

    config = small(prior_ratio=1e-9, prior_ratio_final=0.1, prior_hold=5, prior_horizon=10,
                   exploration=0.4, exploration_horizon=8)  # fmt: skip
    model = make_model(config, module=module)
    for step, exponent in ((0, -9), (5, -9), (10, -5), (15, -1), (99, -1)):
        log_prior = model.log_prior(step)
        assert_close("ratios", log_prior.diff(), torch.full((2,), exponent * math.log(10)))
        assert_close("sum of p", log_prior.exp().sum(), torch.tensor(1.0))
    shares = torch.stack([model.exploration(step) for step in (0, 2, 6, 8, 99)])
    assert_close("exploration", shares, torch.tensor([0.4, 0.3, 0.1, 0.0, 0.0]))


def test_numbers_have_the_closed_forms_and_the_schedules():
    check_numbers()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [-100.0, -20.0, 0.0, 20.0, 100.0])
def test_exploration_leaves_every_answer_its_share(logit, dtype):
    """And the gradient is finite, also at e = 0, whose logarithm is none."""
    model = make_model(small()).to(dtype)
    last = model.head[-1]
    with torch.no_grad():
        last.weight[0], last.bias[0] = 0, logit
    image, normal, _ = (x.to(dtype) for x in make_inputs(model.config))
    plain = model.unroll(image, normal[:, 0])
    assert torch.allclose(plain.logits, torch.tensor(logit, dtype=dtype))
    for share in (0.0, 1e-6, 0.2, 0.999):
        u = model.unroll(image, normal[:, 0], torch.tensor(share, dtype=dtype))
        yes, no = u.logits.sigmoid(), (-u.logits).sigmoid()
        assert (torch.minimum(yes, no) >= share / 2 * (1 - 1e-5)).all()
        expected = share / 2 + (1 - share) * torch.tensor([logit, -logit], dtype=dtype).sigmoid()
        assert torch.allclose(yes, expected[0], 1e-4) and torch.allclose(no, expected[1], 1e-4)
        if share == 0:
            assert torch.allclose(u.logits, plain.logits, 1e-6)
        bound = air.elbo(u, model.log_prior(0).to(dtype))[0].sum()
        gradients = torch.autograd.grad(bound, list(model.parameters()))
        assert all(g.isfinite().all() for g in gradients)


def test_answers_are_yes_with_their_probability():
    """For a uniform number above 1 - p; finite for every number that `draws.uniform` can give."""
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    for p in (0.02, 0.5, 0.93):
        yes = air.logistic(torch.full_like(u, p).logit(), u) > 0
        assert torch.equal(yes, u + HALF > 1 - p)
    ends = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-23, 1 - 2.0**-24])  # float32
    samples = air.logistic(torch.zeros(4), ends)
    assert samples.isfinite().all() and (samples.diff() > 0).all()
    assert torch.allclose(samples, -samples.flip(0), 1e-6)


@pytest.mark.parametrize("logit", [-40.0, -10.0, -1.0, 0.5, 10.0, 40.0])
def test_logistic_samples_given_their_sign(logit):
    """The inverse distribution function, where it has digits; in float32 for every logit."""
    v = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    logits = torch.full_like(v, logit).requires_grad_()
    p = logits.sigmoid()
    for yes, u in ((True, 1 - p + p * v), (False, (1 - p) * v)):
        yes = torch.tensor(yes)
        sample = air.logistic_given(logits, yes, v - HALF)
        assert ((sample > 0) == yes).all()
        if abs(logit) < 20:
            expected = logits + torch.logit(u)
            assert_close("sample", sample, expected)
            slopes = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]
                      for x in (sample, expected)]  # fmt: skip
            assert (slopes[0] - slopes[1]).abs().max() < 1e-8
        single = air.logistic_given(logits.float(), yes, v.float() - HALF)
        assert torch.allclose(single, sample.float(), 1e-4)


# -- ELBO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "ceiling"), [(50, 712.586), (20, 114.01)])
def test_a_perfect_canvas_and_no_kl_is_the_ceiling(size, ceiling):
    """Every n draws the image, and q(n) = p(n): -log 0.3 - log(2 pi) / 2 nats for every pixel."""
    model = make_model(small(max_objects=3, sigma=0.3), (1, size, size))
    image = torch.rand(2, 1, size, size, dtype=torch.float64)
    log_prior = log_prior_of(model.config)
    after = log_prior.exp().flip(0).cumsum(0).flip(0)  # p(n >= i)
    logits = (after[1:] / after[:-1]).logit().expand(2, -1)
    canvases = image[:, None].expand(-1, 4, -1, -1, -1)
    u = fake_unrolled(logits, model.log_likelihood(image[:, None], canvases))
    bound, _, kl = air.elbo(u, log_prior)
    exact = size**2 * -(math.log(0.3) + math.log(2 * math.pi) / 2)
    assert bound.tolist() == pytest.approx([exact] * 2, abs=1e-6)
    assert exact == pytest.approx(ceiling, abs=5e-3)
    assert_close("KL", kl, torch.zeros(2))
    assert (model.log_likelihood(image, image + 0.01) < bound).all()


# -- estimators: check values ----------------------------------------------------------------------


def fake_unrolled(logits: Tensor, log_likelihood: Tensor) -> air.Unrolled:
    """An `Unrolled` of (B, N) logits and (B, N+1) values of f(n), without objects and KL."""
    none = torch.zeros_like(logits)
    return air.Unrolled(logits, none, none, None, None, None, None, None, log_likelihood)


def all_answers(samples: int, steps: int) -> Tensor:
    """Every set of answers that S samples can give: (R, S, N) bool, R = 2^(S N)."""
    answers = itertools.product([False, True], repeat=samples * steps)
    return torch.tensor(list(answers)).view(-1, samples, steps)


def weigh(answers: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (R,) of answers (R, S, N) given logits (S, N), and uniform numbers that give
    them (R, S, N, 2). No gradient: the estimators are to supply it."""
    p = logits.detach().sigmoid()
    weight = torch.where(answers, p, 1 - p).prod(2).prod(1)
    uniform = torch.where(answers, 1 - p / 2, (1 - p) / 2)  # the middle of where they lie
    return weight, torch.stack([uniform, torch.full_like(uniform, 0.5)], -1)


LOGITS = torch.tensor([0.2, -0.4, 0.7], dtype=torch.float64)  # q(n) = softmax, n = 0, 1, 2
JOINT = torch.tensor([0.10, 0.25, 0.05], dtype=torch.float64)  # p(x, n)
# samples: bound, its gradient, total variance of a gradient by REINFORCE and by VIMCO
TOY = {
    1: (-1.4951695683, [0.111011843, 0.3211746094, -0.4321864525], None, None),
    2: (-1.2841017501, [0.0096990731, 0.2937058892, -0.3034049623], 4.6010, 0.47481),
    3: (-1.1813800667, [-0.0246002885, 0.2530307185, -0.22843043], 5.5139, 0.21015),
    5: (-1.0816725367, [-0.0379322815, 0.1858917464, -0.147959465], 6.7179, 0.081412),
}


def own_bound(samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """The bound of S samples, its gradient, and REINFORCE's total variance, all by enumeration."""
    a = LOGITS.clone().requires_grad_()
    log_q = a.log_softmax(0)
    numbers = torch.cartesian_prod(*[torch.arange(3)] * samples).view(-1, samples)  # (R, S)
    bounds = (JOINT.log() - log_q)[numbers].logsumexp(1) - math.log(samples)
    total = (log_q[numbers].sum(1).exp() * bounds).sum()
    (gradient,) = torch.autograd.grad(total, a)
    rows = LOGITS.expand(len(numbers), -1).clone().requires_grad_()
    log_q = rows.log_softmax(1).gather(1, numbers)
    bounds = (JOINT.log()[numbers] - log_q).logsumexp(1)
    surrogate = bounds + (bounds - math.log(samples)).detach() * log_q.sum(1)
    (each,) = torch.autograd.grad(surrogate.sum(), rows)
    weight = log_q.sum(1).exp().detach()
    variance = (weight * each.square().sum(1)).sum() - gradient.square().sum()
    assert_close("mean of REINFORCE", weight @ each, gradient)
    return total.detach(), gradient, variance


def toy_moments(module: ModuleType, name: str, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact moments on the toy: mean surrogate, mean and total variance of its gradient."""

    def stick(a: Tensor) -> Tensor:  # logits of "one more": p(n >= 1) / p(0), p(2) / p(1)
        return torch.stack([a[..., 1:].logsumexp(-1) - a[..., 0], a[..., 2] - a[..., 1]], -1)

    answers = all_answers(samples, 2)
    weight, uniform = weigh(answers, stick(LOGITS).expand(samples, -1))
    a = LOGITS.expand(len(answers), -1).clone().requires_grad_()  # a copy for every row
    logits = stick(a).repeat_interleave(samples, 0)
    log_prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    u = fake_unrolled(logits, (JOINT.log() - log_prior).expand(len(logits), -1))
    config = SimpleNamespace(num_samples=samples, normalise=False)
    baseline = lambda image, u: torch.tensor([0.3, -0.8]).expand_as(u.logits)  # noqa: E731
    model = SimpleNamespace(config=config, baseline=baseline)
    surrogate, _ = module.ESTIMATORS[name](model, None, u, uniform.flatten(0, 1), log_prior)
    (gradient,) = torch.autograd.grad(surrogate.sum(), a)
    mean = weight @ gradient
    variance = weight @ gradient.square().sum(1) - mean.square().sum()
    return weight @ surrogate.detach(), mean, variance


@double_precision()
def check_toy(module: ModuleType = air) -> None:
    for samples, (bound, gradient, reinforce, least) in TOY.items():
        own = own_bound(samples)
        assert_close("own bound", own[0], torch.tensor(bound))
        assert_close("own gradient", own[1], torch.tensor(gradient), 1e-8)
        names = ["vimco"] if samples > 1 else ["enumerate", "nvil"]
        for name in names:
            value, mean, variance = toy_moments(module, name, samples)
            assert_close(f"{name}, {samples} samples", mean, own[1])
            if name == "enumerate":
                assert_close("bound", value, own[0])
                assert variance < 1e-12
        if samples > 1:
            assert_close("own variance", own[2], torch.tensor(reinforce), 1e-4)
            assert_close("variance of vimco", variance, torch.tensor(least), 1e-4)


def test_estimators_have_the_check_values_of_a_toy():
    """Three numbers of objects, of which no object knows: vimco of 2, 3, 5 samples, nvil, exact."""
    check_toy()


def legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Places in (0, 1) and weights."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return torch.tensor((x + 1) / 2), torch.tensor(w / 2)


def rebar_rows(logits: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """For logits (N,): weights (R,) and uniform numbers (R, N, 2) of a quadrature.

    Given the answers, the surrogate is a sum of a function of u and one of v. So one grid, gone
    through with u and v at the same node, integrates both.
    """
    p = logits.detach().sigmoid()
    x, w = legendre(nodes)
    steps = len(p)
    grid = torch.cartesian_prod(*[x] * steps).view(-1, 1, steps)  # (nodes^N, 1, N)
    share = torch.cartesian_prod(*[w] * steps).view(-1, 1, steps).prod(2)  # (nodes^N, 1)
    answers = all_answers(1, steps)[:, 0]  # (2^N, N)
    u = torch.where(answers, 1 - p + p * grid, (1 - p) * grid)  # (nodes^N, 2^N, N)
    weight = share * torch.where(answers, p, 1 - p).prod(1)
    uniform = torch.stack([u, grid.expand_as(u)], -1) - HALF
    return weight.flatten(), uniform.flatten(0, 1)


# temperature: expectation of concrete's gradient, of which three in four have the wrong sign
RELAXED = {0.1: 0.012714, 0.5: -0.007689, 1.0: -0.010427, 2.0: -0.004494}


@double_precision()
def check_relaxed_toy(module: ModuleType = air) -> None:
    """E (b - 0.45)^2 for b ~ Bernoulli(0.3) has the slope 0.021 in the logit."""
    p = torch.tensor([0.3])
    weight, uniform = rebar_rows(p.logit(), 400)

    def slope(name: str, temperature: float, scale: float) -> float:
        logit = p.logit().requires_grad_()
        rows = len(uniform)
        values = torch.tensor([0.45**2, 0.55**2]).expand(rows, -1)
        u = fake_unrolled(logit.expand(rows, 1), values)
        u = u._replace(objects=torch.ones(rows, 1, 1, 1, 1), background=torch.zeros(rows, 1, 1, 1))
        model = SimpleNamespace(
            config=SimpleNamespace(temperature=temperature, rebar_scale=scale),
            log_likelihood=lambda image, canvas: (canvas - 0.45).square()[:, 0, 0, 0],
        )
        log_prior = torch.cat([1 - p, p]).log()  # is q(n): its KL has the slope 0
        surrogate, _ = module.ESTIMATORS[name](model, None, u, uniform, log_prior)
        (gradient,) = torch.autograd.grad(weight @ surrogate, logit)
        return gradient.item()

    for temperature, biased in RELAXED.items():
        for scale in (0.5, 1.0):
            error = abs(slope("rebar", temperature, scale) - 0.021)
            assert error < 1e-6, f"rebar at {temperature} is off by {error}"
        error = abs(slope("concrete", temperature, 1.0) - biased)
        assert error < 1e-6, f"concrete at {temperature} is off by {error}"


def test_rebar_is_unbiased_and_concrete_biased_on_a_toy():
    check_relaxed_toy()


# -- estimators: their expectation on an AIR -------------------------------------------------------


def spread_baseline(model: nn.Module) -> None:
    """Makes the baseline's predictions differ by some nats between steps and images."""
    with torch.no_grad():
        model.baseline.head[-1].weight *= 30
        model.baseline.head[-1].bias -= 20


@double_precision()
def check_unbiased(
    name: str, module: ModuleType = air, samples: int = 1, exploration: float = 0.0, **overrides
) -> None:
    """The expectation of model.loss's gradient is that of the ELBO, or of vimco's own bound."""
    config = small(estimator=name, num_samples=max(samples, 2), **overrides)
    model = make_model(config, module=module)
    if name == "nvil":
        spread_baseline(model)
    image, normal, _ = make_inputs(config, batch=1, samples=samples)
    eager, copies = bind(model, exploration)
    log_prior = log_prior_of(config)
    share = torch.tensor(exploration)
    u = model.unroll(image.expand(samples, -1, -1, -1), normal[0], share)
    answers = all_answers(samples, config.max_objects)
    expected = torch.zeros(())
    for weight, uniform in zip(*weigh(answers, u.logits), strict=True):
        loss = model.loss(image, normal, uniform[None], log_prior, share)["loss"]
        expected = expected + weight * loss
    bound = bound_of(eager, name, image, normal)
    assert_same_gradients(model, expected, copies, -bound, name)


UNBIASED = {
    "enumerate": dict(name="enumerate"),
    "nvil": dict(name="nvil"),
    "nvil, three steps, exploration": dict(name="nvil", max_objects=3, exploration=0.3),
    "vimco of 2": dict(name="vimco", samples=2),
    "vimco of 3, exploration": dict(name="vimco", samples=3, exploration=0.2),
    "nvil, background, difference": dict(name="nvil", background=True, difference=True),
    "vimco of 2, background": dict(name="vimco", samples=2, background=True),
}


@pytest.mark.parametrize("case", UNBIASED)
def test_the_expected_gradient_is_that_of_the_bound(case):
    check_unbiased(**UNBIASED[case])


def expanded(u: air.Unrolled, rows: int) -> air.Unrolled:
    """One image's `Unrolled`, as often as there are rows."""
    return type(u)(*(v.expand(rows, *v.shape[1:]) for v in u))


@double_precision()
def relaxed_gradient(
    name: str, module: ModuleType, temperature: float, scale: float = 1.0, **overrides
) -> tuple[nn.Module, dict, Tensor, Tensor]:
    """The model, the eager weights, and the exact means of a surrogate and of the ELBO."""
    config = small(estimator=name, temperature=temperature, rebar_scale=scale, **overrides)
    model = make_model(config, module=module)
    image, normal, _ = make_inputs(config, batch=1)
    eager, copies = bind(model)
    u = model.unroll(image, normal[:, 0])
    weight, uniform = rebar_rows(u.logits[0], 16)
    surrogate, other = module.ESTIMATORS[name](
        model, image.expand(len(weight), -1, -1, -1), expanded(u, len(weight)), uniform,
        log_prior_of(config),
    )
    assert (other == 0).all()
    return model, copies, weight @ surrogate, eager.elbo(image[0], normal[0, 0])


def check_rebar(module: ModuleType = air, **overrides) -> None:
    settings = dict(temperature=1.0, scale=0.7) | overrides
    model, copies, surrogate, bound = relaxed_gradient("rebar", module, **settings)
    assert_same_gradients(model, surrogate, copies, bound, "rebar")


@pytest.mark.parametrize(
    "settings",
    [dict(temperature=0.5), dict(temperature=1.0), dict(temperature=1.0, background=True)],
    ids=str,
)
def test_the_expected_gradient_of_rebar_is_that_of_the_bound(settings):
    check_rebar(**settings)


# temperature: |mean of concrete's gradient - the ELBO's| / |the ELBO's|
BIAS = {0.5: 0.10650, 1.0: 0.11889, 2.0: 0.18214}


@pytest.mark.parametrize("temperature", BIAS)
def test_the_bias_of_concrete_on_an_air(temperature):
    """What it optimises is another model's bound."""
    model, copies, surrogate, bound = relaxed_gradient("concrete", air, temperature)
    wanted = flat_gradient(bound, copies)
    bias = flat_gradient(surrogate, dict(model.named_parameters())) - wanted
    assert (bias.norm() / wanted.norm()).item() == pytest.approx(BIAS[temperature], rel=0.01)


@double_precision()
def sampled_error(name: str, module: ModuleType = air) -> tuple[float, float]:
    """Error and standard error of the mean gradient of 6,000 draws, relative to the bound's."""
    samples = 2 if name == "vimco" else 1
    config = small(estimator=name, num_samples=2)
    model = make_model(config, module=module)
    image, normal, _ = make_inputs(config, batch=1, samples=samples)
    eager, copies = bind(model)
    parameters, gradients = dict(model.named_parameters()), []
    wanted = flat_gradient(bound_of(eager, name, image, normal), copies)
    if name == "nvil":  # about what it would learn
        with torch.no_grad():
            u = model.unroll(image, normal[0])
            model.baseline.head[-1].bias.fill_(u.log_likelihood.mean())
    image, normal = (x.expand(200, *x.shape[1:]) for x in (image, normal))
    for i in range(30):
        key = draws.make_key("test of the estimators", i)
        uniform = draws.uniform(key, torch.arange(200), (samples, 2, 2)).double()
        loss = model.loss(image, normal, uniform, log_prior_of(config))["loss"]
        gradients.append(-flat_gradient(loss, parameters))
    gradients = torch.stack(gradients)
    stderr = (gradients.var(0).sum() / len(gradients)).sqrt()
    error = (gradients.mean(0) - wanted).norm()
    return (error / wanted.norm()).item(), (stderr / wanted.norm()).item()


@pytest.mark.parametrize("name", ["nvil", "vimco", "rebar"])
def test_the_mean_gradient_of_draws_goes_to_that_of_the_bound(name):
    error, stderr = sampled_error(name)
    assert stderr < 0.02 and error < 4 * stderr


@double_precision()
def check_concrete(module: ModuleType = air) -> None:
    """The relaxed model's bound, by torch's own density of the logit of a relaxed answer."""
    t = 0.7
    config = small(estimator="concrete", temperature=t, max_objects=3, background=True)
    model = make_model(config, module=module)
    image, normal, uniform = make_inputs(config)
    log_prior = log_prior_of(config)
    u = model.unroll(image, normal[:, 0])
    surrogate, _ = module.ESTIMATORS["concrete"](model, image, u, uniform[:, 0], log_prior)
    after = log_prior.exp().flip(0).cumsum(0).flip(0)
    prior = after[1:] / after[:-1]  # p(n >= i | n >= i - 1)
    noise = uniform[:, 0, :, 0] + HALF
    relaxed = D.relaxed_bernoulli.LogitRelaxedBernoulli
    for b in range(len(image)):
        y = (u.logits[b] + noise[b].log() - (1 - noise[b]).log()) / t
        p, q = (relaxed(torch.tensor(t), logits=x) for x in (prior.logit(), u.logits[b]))
        value = (p.log_prob(y) - q.log_prob(y)).sum()
        canvas, there = u.background[b], torch.ones(())
        for i, presence in enumerate(y.sigmoid()):
            there = there * presence
            canvas = canvas + there * u.objects[b, i]
            value = value - there * u.kl[b, i]
        value = value + D.Normal(canvas, config.sigma).log_prob(image[b]).sum()
        assert_close("concrete", surrogate[b], value)
        parameters = dict(model.named_parameters())
        assert_same_gradients(model, surrogate[b], parameters, value, "concrete")
    hard = all_answers(1, 3)[:, 0]  # presences of 0 and 1 are worth what the numbers are worth
    u = expanded(type(u)(*(v[:1] for v in u)), len(hard))
    gain = module.relaxed_gain(model, image[:1], u, hard.double())
    numbers = hard.cumprod(1).sum(1, keepdim=True)
    assert_close("gain", gain, module.gains(u).gather(1, numbers)[:, 0])


def test_concrete_is_the_bound_of_a_relaxed_model():
    check_concrete()


@pytest.mark.parametrize("ratio", [1e-9, 1e-3, 1.0, 1e9])
def test_concrete_is_finite_for_any_prior(ratio):
    """In float32, where p(one more) rounds to 1 for the last."""
    config = small(estimator="concrete", prior_ratio=ratio, prior_ratio_final=ratio)
    model = make_model(config).float()
    inputs = (x.float() for x in make_inputs(config))
    loss = model.loss(*inputs, model.log_prior(0).float())["loss"]
    assert loss.isfinite()


@double_precision()
def check_nvil(module: ModuleType = air) -> None:
    """Surrogate and baseline's loss for every set of answers, each decision by hand."""
    config = small(estimator="nvil", max_objects=3)
    model = make_model(config, module=module)
    spread_baseline(model)
    image, normal, _ = make_inputs(config, batch=1)
    log_prior = log_prior_of(config)
    u = model.unroll(image, normal[:, 0])
    answers = all_answers(1, 3)
    _, uniform = weigh(answers, u.logits)
    predicted = model.baseline(image, u)[0]
    assert predicted.std() > 0.1
    log_q = module.count_log_probs(u.logits[0])
    kl = (log_q.exp() * (log_q - log_prior)).sum()
    parameters = dict(model.named_parameters())
    own = [p for name, p in parameters.items() if name.startswith("baseline")]
    rest = {name: p for name, p in parameters.items() if not name.startswith("baseline")}
    for answer, uniform_row in zip(answers[:, 0].tolist(), uniform, strict=True):
        n = [*answer, False].index(False)
        value, error = u.log_likelihood[0, n] - u.kl[0, :n].sum() - kl, 0
        for i in range(min(n + 1, 3)):  # what was asked: n times yes and, before the end, no
            signal = (u.log_likelihood[0, n] - u.kl[0, i:n].sum()).detach()
            log_answer = D.Bernoulli(logits=u.logits[0, i]).log_prob(torch.tensor(float(answer[i])))
            value = value + (signal - predicted[i]).detach() * log_answer
            error = error + (signal - predicted[i]).square()
        surrogate, other = module.ESTIMATORS["nvil"](model, image, u, uniform_row, log_prior)
        assert_close("surrogate", surrogate[0], value)
        assert_close("loss of the baseline", other[0], error)
        assert_same_gradients(model, surrogate[0], rest, value, f"nvil, {n} objects:", n == 3)
        actual, wanted = (torch.autograd.grad(x, own, retain_graph=True) for x in (other[0], error))
        for a, w in zip(actual, wanted, strict=True):
            assert_close("gradient of the baseline", a, w)
        for loss, strangers in ((other, rest.values()), (surrogate, own)):
            found = torch.autograd.grad(loss[0], list(strangers), allow_unused=True,
                                        retain_graph=True)  # fmt: skip
            assert all(g is None for g in found), "a loss is off: it reaches what is not its own"


def test_nvil_by_hand():
    check_nvil()


def test_the_baseline_of_a_step_sees_the_image_and_the_objects_before_it():
    model = make_model(small(estimator="nvil", max_objects=3))
    image, normal, _ = make_inputs(model.config)
    u = model.unroll(image, normal[:, 0])
    before = model.baseline(image, u)
    assert (model.baseline(image + 0.1, u) != before).all()
    for i in range(3):
        for name in ("where", "what"):
            value = getattr(u, name).clone()
            value[:, i] += 1
            changed = model.baseline(image, u._replace(**{name: value})) != before
            assert changed.all(0).tolist() == [j > i for j in range(3)] == changed.any(0).tolist()


def test_normalising_brings_large_signals_to_deviation_one_and_leaves_small_ones():
    config = small(estimator="nvil", normalise=True, max_objects=2)
    g = torch.Generator().manual_seed(0)
    for mean, deviation, expected in ((50.0, 100.0, 1.0), (0.0, 0.1, 0.1)):
        baseline = make_model(config).baseline.float()
        for _ in range(100):
            signal = mean + deviation * torch.randn(512, 2, generator=g)
            asked = torch.rand(512, 2, generator=g) < 0.7
            result = baseline.normalise(signal * asked, asked)[asked]
        assert abs(result.mean()) < 0.3 * expected
        assert result.std().item() == pytest.approx(expected, rel=0.2)
    model = make_model(config)
    image, normal, uniform = make_inputs(config)
    assert model.loss(image, normal, uniform, model.log_prior(0))["loss"].isfinite()


# -- consistency -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", air.ESTIMATORS)
def test_an_image_has_the_same_result_alone_and_in_a_batch(name):
    """Unrolled, loss and gradients: those of a batch are means over its images."""
    samples = 3 if name == "vimco" else 1
    config = small(estimator=name, num_samples=samples, background=True)
    model = make_model(config)
    inputs = make_inputs(config, batch=3, samples=samples)
    log_prior = log_prior_of(config)
    together = model.unroll(inputs[0], inputs[1][:, 0])
    losses = []
    for b in range(3):
        own = [x[b : b + 1] for x in inputs]
        alone = model.unroll(own[0], own[1][:, 0])
        for field in alone._fields:
            assert_close(field, getattr(alone, field)[0], getattr(together, field)[b], 1e-12)
        losses.append(model.loss(*own, log_prior)["loss"])
    loss = model.loss(*inputs, log_prior)["loss"]
    assert_close("loss", loss, sum(losses) / 3, 1e-12)
    parameters = list(model.parameters())
    actual = torch.autograd.grad(loss, parameters)
    wanted = torch.autograd.grad(sum(losses) / 3, parameters)
    for a, w in zip(actual, wanted, strict=True):
        assert_close("gradient", a, w)


def test_noise_is_a_function_of_the_scene():
    scenes = Blobs()
    model = air.AIR(small(estimator="vimco", num_samples=3), *BLOBS_SHAPE)
    normal, uniform = model.noise(scenes, torch.tensor([5, 2**40, 7]))
    assert normal.shape == (3, 3, 2, 5) and uniform.shape == (3, 3, 2, 2)
    for value, alone in zip((normal, uniform), model.noise(scenes, torch.tensor([7])), strict=True):
        assert torch.equal(value[2], alone[0]) and not torch.equal(value[1], value[2])
    other = air.AIR(small(estimator="vimco", num_samples=3, seed=1), *BLOBS_SHAPE)
    assert not torch.equal(other.noise(scenes, torch.tensor([7]))[0], alone)


# -- evaluation ------------------------------------------------------------------------------------


BLOBS_SHAPE = (1, 12, 12)


class Blobs(data.Scenes):
    """Eight scenes of none to two 4 x 4 squares, over and over; `images` replaces them."""

    num_channels, height, width = BLOBS_SHAPE
    max_objects, max_entities = 2, 3
    PLACES = ([(0, 0), (7, 6)], [], [(2, 7)], [(0, 8), (8, 1)], [(5, 3)], [], [(7, 7), (1, 2)],
              [(3, 0)])  # fmt: skip

    def __init__(self, images: Tensor | None = None):
        super().__init__("blobs", "train", 0, "cpu")
        self.present = torch.zeros(8, 3, dtype=torch.bool)
        self.present[:, 0] = True
        self.box = torch.zeros(8, 3, 4)
        self.image = torch.zeros(8, *BLOBS_SHAPE)
        for scene, corners in enumerate(self.PLACES):
            for i, (top, left) in enumerate(corners, 1):
                self.present[scene, i] = True
                self.box[scene, i] = torch.tensor([top, left, 4, 4])
                self.image[scene, :, top : top + 4, left : left + 4] = 1
        if images is not None:
            self.image = images

    def scenes(self, index: Tensor) -> data.Batch:
        i = index % 8
        masks = torch.zeros(len(i), 3, *self.image.shape[-2:], dtype=torch.bool)
        return data.Batch(self.image[i], masks, self.present[i], dict(box=self.box[i]))


@double_precision()
def check_score(module: ModuleType = air) -> None:
    """log p(x) by quadrature, of two rows of pixels where all glimpses are the same grey.

    There is one object at most, what it is does not matter, and its scale does not vary.
    """
    config = small(max_objects=1, latent_size=1, glimpse_size=2, scale_mean=1.2, scale_std=1e-6,
                   prior_ratio=0.8, prior_ratio_final=0.8, sigma=0.6, decoder_bias=2.0)  # fmt: skip
    model = module.AIR(config, 1, 2, 3).double()
    with torch.no_grad():
        for layer in (model.head[-1], model.encoder[-1], model.decoder[-1]):
            layer.weight.zero_(), layer.bias.zero_()
        model.head[-1].bias.copy_(torch.tensor([0.4, 0.0, 0.2, -0.2, 0.6, 0.9, 0.7]))
        model.encoder[-1].bias.copy_(torch.tensor([0.2, 0.6]))
    image = torch.tensor([[0.1, 0.9, 0.6], [0.3, 0.6, 0.2]])
    scenes = Blobs(image.expand(8, 1, 2, 3))

    axis = torch.linspace(-7, 7, 281)
    col, row = torch.meshgrid(axis, axis, indexing="ij")
    scale = torch.full_like(col, 1.2).flatten()
    theta = axis_aligned(scale, col.flatten(), row.flatten())
    grey = torch.full((len(scale), 1, 2, 2), 2.0).sigmoid()
    canvas = reference_warp(grey, theta, (2, 3), False)
    pixel = lambda mean: D.Normal(mean, 0.6).log_prob(image).sum((-3, -2, -1))  # noqa: E731
    density = D.Normal(0.0, 1.0).log_prob(axis).exp() * (axis[1] - axis[0])
    one = (density[:, None] * density).flatten() @ pixel(canvas).exp()
    none = pixel(torch.zeros(1, 1, 2, 3)).exp()[0]
    log_p = ((none + 0.8 * one) / 1.8).log().item()

    metrics = module.evaluate(model, scenes, model.log_prior(0))["metrics"]
    iw, stderr = metrics["iw_elbo"]["mean"], metrics["iw_elbo"]["stderr"]
    assert metrics["iw_elbo"]["n"] == 200
    # By the delta method it lies half its variance, here that of one of 200 images, below log p(x).
    error = iw - (log_p - 200 * stderr**2 / 2)
    assert abs(error) < 4 * stderr < 0.025, f"iw_elbo is off by {error:.3g}"
    assert metrics["elbo"]["mean"] < log_p - 0.1, "the ELBO is off: above log p(x)"


def test_the_importance_weighted_bound_is_log_p():
    check_score()


def test_evaluation_counts_and_compares_boxes():
    model = air.AIR(small(), *BLOBS_SHAPE)
    with torch.no_grad():  # whatever it sees: one object, in a window as large as the image
        for layer in (model.head[-1], model.gates, model.see):
            for parameter in layer.parameters():
                parameter.zero_()
        model.where_mean.copy_(torch.tensor([1.0, 0, 0]))
        model.where_std.fill_(1e-3)
    answers = itertools.cycle([5.0, -5.0])
    model.head.register_forward_hook(
        lambda module, args, output: output + F.pad(output.new_full((1,), next(answers)), (0, 6))
    )
    result = air.evaluate(model, Blobs(), model.log_prior(0), 16)
    assert result["confusion"] == [[0, 4, 0], [0, 6, 0], [0, 6, 0]]
    mean = {name: value["mean"] for name, value in result["metrics"].items()}
    assert mean["count_accuracy"] == mean["count_chance"] == 6 / 16
    assert result["metrics"]["box_iou"]["n"] == 12  # two empty scenes of eight are left out
    share = 16 / 144  # of the image in each square; with two of them, one has no window
    assert mean["box_iou"] == pytest.approx((share + share / 2) / 2, rel=0.01)
    assert mean["elbo"] == pytest.approx(-mean["nll"] - mean["kl"], rel=1e-5)
    assert mean["kl_count"] < mean["kl"]


def test_evaluation_is_the_same_with_and_without_grad():
    model = air.AIR(small(), *BLOBS_SHAPE)
    results = []
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            results.append(air.evaluate(model, Blobs(), model.log_prior(0), 16))
    assert results[0] == results[1]
    assert all(p.grad is None for p in model.parameters())


# -- options ---------------------------------------------------------------------------------------

resumed = functools.partial(resumed_model, model=air)
TINY = dict(
    max_objects=2, latent_size=3, glimpse_size=6, lstm_size=8, head_sizes=(8,), encoder_sizes=(8,),
    decoder_sizes=(8,), batch_size=4, steps=6, log_every=1, device="cpu", num_samples=2,
    prior_ratio=1e-4, prior_ratio_final=0.1, prior_hold=1, prior_horizon=4, exploration=0.3,
    exploration_horizon=5, lr=1e-3, lr_warmup=2, lr_horizon=5, lr_final=0.1,
)  # fmt: skip


def tiny(out: Path | str = "", **changes) -> air.Config:
    return air.make_config("quick", **{**TINY, "out": str(out), **changes})


def stopped(monkeypatch, capsys, *arguments: object, status: int = 2) -> str:
    """The one line with which `python air.py ARGUMENTS` ends, and nothing but it."""
    monkeypatch.setattr(sys, "argv", ["/some/where/air.py", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        options.main(air.Config, air.make_config, air.load, air.train)
    printed = capsys.readouterr().err
    assert stop.value.code == status and "Traceback" not in printed
    assert status == 130 or (printed.startswith("air.py: ") and printed.count("\n") == 1), printed
    return printed.splitlines()[-1].removeprefix("air.py: ")


# What is AIR's own; what all models refuse is in test_options.py. The command line -> its answer.
IMPOSSIBLE = {
    "--preset nonsense": "unknown preset 'nonsense': choose from quick, multi_mnist",
    "--variant released": "no variant 'released': AIR's authors released no code",
    "--dataset nonsense": "unknown dataset 'nonsense'; choose from",
    "--dataset tetrominoes": "--dataset tetrominoes: its objects have no boxes",
    "--dataset multi_dsprites_binarized": "--dataset multi_dsprites_binarized: its objects have",
    "--mnist-dir nowhere": "--mnist-dir nowhere: no such folder",
    "--kernels torch": "--kernels: AIR uses none",
    "--estimator vimco --num-samples 1": "--estimator vimco needs --num-samples 2 or more",
    "--head-sizes 8 0": "--head-sizes must be at least 1, not (8, 0)",
    "--glimpse-size 1": "--glimpse-size 1: at least 2",
    "--exploration 1": "--exploration 1.0: below 1",
}
for value, answer, names in (
    ("0", "must be at least 1", "max_objects latent_size lstm_size encoder_sizes decoder_sizes "
     "num_samples prior_horizon exploration_horizon lr_horizon"),
    ("-1", "must be 0 or more", "prior_hold exploration rebar_scale lr_warmup"),
    ("0", "must be larger than 0", "sigma scale_mean scale_std prior_ratio prior_ratio_final "
     "temperature baseline_lr clip lr_final"),
):  # fmt: skip
    for name in map(options.option, names.split()):
        IMPOSSIBLE[f"{name} {value}"] = f"{name} {answer}"


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_one_line(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "set_up", lambda config: pytest.fail("this would have trained"))
    assert IMPOSSIBLE[line] in stopped(monkeypatch, capsys, *line.split())
    assert not list(tmp_path.iterdir())


def test_learning_rate_warms_up_and_decays():
    config = small(lr=1e-2, lr_warmup=3, lr_final=0.01, lr_horizon=100)
    assert air.learning_rate(config, 0) == pytest.approx(0.25e-2)
    assert air.learning_rate(config, 1) == pytest.approx(0.5e-2 * 0.01**0.01)
    assert air.learning_rate(config, 50) == pytest.approx(1e-3)
    assert air.learning_rate(config, 100) == air.learning_rate(config, 9999) == pytest.approx(1e-4)


def test_presets_are_possible_and_their_schedules_end_within_their_steps():
    for preset in air.PRESETS:
        config = air.make_config(preset)
        air.check(config)
        assert config.prior_hold + config.prior_horizon <= config.steps
        assert config.exploration_horizon <= config.steps


# -- training --------------------------------------------------------------------------------------


@pytest.fixture
def quick_evaluation(monkeypatch):
    """Scores 20 scenes, not 2,000; nothing is left of torchrun."""
    monkeypatch.setattr(air, "evaluate", functools.partial(air.evaluate, count=20))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(air, "draw", lambda *_: None)


def assert_finite(result: dict) -> None:
    """An evaluation of 20 scenes, complete."""
    assert result["metrics"].keys() == {
        "count_accuracy", "count_chance", "elbo", "nll", "kl", "kl_count", "mse", "box_iou",
        "iw_elbo",
    }  # fmt: skip
    assert all(math.isfinite(m["mean"]) for m in result["metrics"].values())
    assert sum(map(sum, result["confusion"])) == 20


@pytest.mark.parametrize(
    "changes",
    [*(dict(estimator=name) for name in ("vimco", "concrete", "rebar")), dict(difference=True),
     dict(precision="bfloat16"), dict(dataset="multi_mnist_color"),
     dict(estimator="nvil", normalise=True)],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)  # fmt: skip
def test_every_option_trains(changes, tmp_path, quick_evaluation, no_figures):
    result = air.train(tiny(tmp_path / "run", steps=2, **changes))
    assert result["skipped"] == 0
    assert_finite(result)
    assert all(v is not None for record in log(tmp_path / "run") for v in record.values())


def test_what_a_run_leaves(tmp_path, quick_evaluation, capsys):
    folder = tmp_path / "run"
    result = air.train(tiny(folder, steps=2, background=True))
    assert_finite(result)
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    assert result["model"] == "air" and result["steps"] == 2
    pictures = {path.name for path in (folder / "figures").glob("*.png")}
    assert pictures == {"attention.png", "confusion.png", "samples.png", "training.png"}
    records = log(folder)
    assert [record["step"] for record in records] == [1, 2]
    assert {"loss", "elbo", "nll", "kl", "count_accuracy", "grad_norm", "lr"} <= records[0].keys()
    model = air.load_model(folder)
    assert same(dict(model.state_dict()), checkpoint(folder)["model"]) and not model.training
    printed = capsys.readouterr().out
    assert "true count" in printed and "chance" in printed and "attention.png" in printed


@pytest.mark.parametrize("estimator", ["enumerate", "nvil"])
def test_six_steps_are_three_and_three(estimator, tmp_path, quick_evaluation, no_figures):
    """Bit for bit, across all schedules, with an evaluation in between; nvil has two optimisers'
    groups and a baseline."""
    whole = air.train(tiny(tmp_path / "six", estimator=estimator))
    half = air.train(tiny(tmp_path / "half", estimator=estimator, steps=3))
    resumed_whole = air.train(resumed(tmp_path / "half", "--steps", 6))
    assert_same_run(tmp_path / "half", tmp_path / "six")
    assert resumed_whole["metrics"] == whole["metrics"] != half["metrics"]
    # Every schedule was under way when the run was cut in two.
    rates = [record["lr"] for record in log(tmp_path / "six")]
    assert rates[0] < rates[1] and rates[2] > rates[3] > rates[4] > rates[5]
    model = air.load_model(tmp_path / "six")
    for schedule in (model.log_prior, model.exploration):
        values = [schedule(step) for step in (1, 2, 3, 4, 5)]
        assert len({tuple(v.flatten().tolist()) for v in values}) == 5


def test_ctrl_c_saves_and_the_run_goes_on(
    tmp_path, quick_evaluation, no_figures, monkeypatch, capsys
):
    """In its fourth step; vimco, whose samples are then the same as without the interruption."""
    whole, broken = (tiny(tmp_path / name, estimator="vimco") for name in ("whole", "broken"))
    air.train(whole)
    loss, calls = air.AIR.loss, itertools.count(1)

    def interrupted(self, *inputs):
        if next(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return loss(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(air.AIR, "loss", interrupted)
        patch.setattr(air, "make_config", lambda *_: broken)
        line = stopped(monkeypatch, capsys, status=130)
    assert line == f"stopped after step 4; go on with --resume {tmp_path / 'broken'}"
    assert not (tmp_path / "broken" / "evaluation.json").exists()
    air.train(resumed(tmp_path / "broken"))
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_files_that_cannot_be(tmp_path, quick_evaluation, no_figures, monkeypatch, capsys):
    """A truncated checkpoint, another model's, and a folder that cannot be written."""
    air.train(tiny(tmp_path / "run", steps=1))
    good, bad = tmp_path / "run" / "checkpoint.pt", tmp_path / "bad.pt"
    bad.write_bytes(good.read_bytes()[:-2000])
    line = stopped(monkeypatch, capsys, "--resume", bad)
    assert str(bad) in line and "not a readable checkpoint" in line
    torch.save(checkpoint(tmp_path / "run") | dict(model_name="iodine"), bad)
    line = stopped(monkeypatch, capsys, "--resume", bad)
    assert str(bad) in line and "a checkpoint of iodine.py, not air.py" in line
    line = stopped(monkeypatch, capsys, "--resume", good, "--max-objects", 4)
    assert "--max-objects" in line
    monkeypatch.chdir(tmp_path)
    line = stopped(monkeypatch, capsys, "--device", "cpu", "--out", "bad.pt/run")
    assert line.startswith("cannot write to bad.pt/run")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "bad.pt"}


def test_experiments_run(tmp_path, quick_evaluation, no_figures):
    air.train(tiny(tmp_path / "run", steps=1, max_objects=1))
    before = (tmp_path / "run" / "evaluation.json").read_bytes()
    results = {}
    for name in ("variance", "extrapolation"):
        results[name] = air.train(resumed(tmp_path / "run", "--experiment", name))
        written = json.loads((tmp_path / "run" / f"{name}.json").read_text())
        assert written == json.loads(json.dumps(results[name]))
    measured = results["variance"]
    assert measured.keys() == air.ESTIMATORS.keys()
    assert measured.pop("enumerate") == dict(variance=0, bias=0, chance=0)
    assert all(r["variance"] > 0 and r["bias"] > 0 for r in measured.values())
    assert all(r["bias"] < 4 * r["chance"] for n, r in measured.items() if n in ("nvil", "rebar"))
    assert all((tmp_path / "run" / "figures" / f"{name}.png").is_file() for name in results)
    assert [sum(row) for row in results["extrapolation"]["confusion"]] == [0, 0, 0, 20]
    assert results["extrapolation"]["metrics"]["count_chance"]["mean"] == 1
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == before


def test_gradients_that_are_not_finite_change_nothing_and_several_stop_the_run(
    tmp_path, quick_evaluation, no_figures, monkeypatch
):
    loss, calls = air.AIR.loss, itertools.count()

    def broken(self, *inputs):
        parts = loss(self, *inputs)
        return parts | dict(loss=parts["loss"] * (math.nan if next(calls) in bad else 1))

    monkeypatch.setattr(air.AIR, "loss", broken)
    bad = {1}
    result = air.train(tiny(tmp_path / "one", steps=2))
    assert result["skipped"] == 1 and log(tmp_path / "one")[1]["loss"] is None
    air.train(tiny(tmp_path / "first", steps=1))
    assert same(*(checkpoint(tmp_path / name)["model"] for name in ("one", "first")))
    bad = range(1000)
    with pytest.raises(options.UserError, match="10 gradients in a row not finite"):
        air.train(tiny(tmp_path / "all", steps=20))
    assert (tmp_path / "all" / "checkpoint.pt").is_file()


def test_under_autocast_the_likelihood_is_that_of_float32():
    """bfloat16 has 8 bits: a canvas rounded to it would cost nats."""
    model = air.AIR(tiny(max_objects=3), 1, 50, 50)
    scenes = data.make("multi_mnist")
    image = scenes.batch(0, 8).image
    inputs = image, *model.noise(scenes, torch.arange(8)), model.log_prior(0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(*inputs)
    exact = model.loss(*inputs)
    for name in ("elbo", "nll", "kl"):
        assert rounded[name].dtype == torch.float32
        assert abs(rounded[name] - exact[name]) < 1 + 0.01 * abs(exact[name]), name


# -- learning --------------------------------------------------------------------------------------


def test_it_learns_eight_scenes_by_heart():
    """35 nats above what the best single image for all of them reaches, for which no latent is
    needed, with windows on the squares. To count all of them right takes longer."""
    scenes, index, steps = Blobs(), torch.arange(16), 250
    config = air.Config(
        max_objects=2, latent_size=2, glimpse_size=4, lstm_size=32, head_sizes=(32,),
        encoder_sizes=(32,), decoder_sizes=(32,), difference=True, prior_ratio=1e-9, prior_hold=50,
        prior_ratio_final=0.1, prior_horizon=50, exploration=0.6, exploration_horizon=steps,
    )  # fmt: skip
    model = air.build(config, scenes)
    optimizer = torch.optim.Adam(model.parameters())
    image = scenes.scenes(index).image
    for step in range(steps):
        noise = model.noise(scenes, index + 16 * step)
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, 2 - 2 * step / steps)
        parts = model.loss(image, *noise, model.log_prior(step), model.exploration(step))
        optimizer.zero_grad()
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
    result = air.evaluate(model, scenes, model.log_prior(steps), 80)
    best = model.log_likelihood(image, image.mean(0, keepdim=True)).mean().item()
    mean = {name: value["mean"] for name, value in result["metrics"].items()}
    assert mean["elbo"] > best + 35, (mean, best)
    assert mean["box_iou"] > 0.5
    assert mean["count_accuracy"] > mean["count_chance"], result["confusion"]


# -- mutants ---------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., None]] = {
    "eager": check_eager,
    "background": lambda module: check_eager(module, background=True),
    "difference": lambda module: check_eager(module, difference=True, max_objects=3),
    "exploration": lambda module: check_eager(module, exploration=0.3),
    "transformer": check_transformer,
    "numbers": check_numbers,
    "nvil": lambda module: check_unbiased("nvil", module),
    "nvil by hand": check_nvil,
    "vimco": lambda module: check_unbiased("vimco", module, samples=2),
    "toy": check_toy,
    "rebar": check_rebar,
    "concrete": check_concrete,
    "score": check_score,
}
WRONG: dict[str, tuple[str, str, str]] = {  # of the literature; name: (check, text, its mutation)
    "vimco: signal log w_k instead of the bound": (
        "vimco", "signal = (bound - (without", "signal = (log_w - (without"),
    "vimco: mean over the samples": (
        "vimco", "(signal * log_q).sum(1)", "(signal * log_q).mean(1)"),
    "vimco: no path term": ("vimco", "surrogate = bound[:, 0]", "surrogate = bound.detach()[:, 0]"),
    "nvil: KL of the first absent object is charged": (
        "nvil", "return u.log_likelihood - sums(u.kl)",
        "return u.log_likelihood - sums(u.kl)[:, [*range(1, u.kl.shape[1] + 1), -1]]"),
    "rebar: KL of the first absent object is charged": (
        "rebar", "return u.log_likelihood - sums(u.kl)",
        "return u.log_likelihood - sums(u.kl)[:, [*range(1, u.kl.shape[1] + 1), -1]]"),
    "nvil: later KL terms dropped": (
        "nvil", "signal = (f + sums(u.kl)[:, :-1]).detach()",
        "signal = u.log_likelihood.gather(1, n).detach()"),
}  # fmt: skip
MUTANTS = {  # text of air.py
    **WRONG,
    # Estimators
    "vimco: own sample in the baseline": (
        "vimco", "others = (log_w.sum(1, keepdim=True) - log_w) / (samples - 1)",
        "others = log_w.mean(1, keepdim=True).expand_as(log_w)"),
    "vimco: arithmetic instead of geometric mean": (
        "toy", "others = (log_w.sum(1, keepdim=True) - log_w) / (samples - 1)",
        "others = ((log_w.exp().sum(1, keepdim=True) - log_w.exp()) / (samples - 1)).log()"),
    "vimco: no KL of where and what": ("vimco", "+ sums(u.log_ratio).gather(1, n)\n", "\n"),
    "vimco: no q(n) in the weights": ("vimco", "log_prior[n] - log_q", "log_prior[n]"),
    "nvil: no KL of the number": ("nvil", "score - count_kl(u, log_prior)", "score"),
    "nvil: earlier KL terms in the signal": (
        "nvil by hand", "signal = (f + sums(u.kl)[:, :-1])",
        "signal = (f + 0 * sums(u.kl)[:, :-1])"),
    "nvil: signal not stopped": ("nvil by hand", "sums(u.kl)[:, :-1]).detach()",
                                 "sums(u.kl)[:, :-1])"),
    "nvil: baseline not stopped": ("nvil by hand", "centred = error.detach()", "centred = error"),
    "nvil: the stop is not scored": ("nvil by hand", "asked = steps <= n", "asked = steps < n"),
    "nvil: answers after the stop are scored": (
        "nvil by hand", "asked = steps <= n", "asked = steps <= n + 1"),
    "rebar: no gradient through the second sample": (
        "rebar", "relaxed - relaxed_again -", "relaxed - relaxed_again.detach() -"),
    "rebar: second sample of the other answer": (
        "rebar", "logistic_given(u.logits, yes", "logistic_given(u.logits, ~yes"),
    "rebar: second sample without its sign": (
        "rebar", "return sign * (F.softplus", "return (F.softplus"),
    "rebar: control variate not subtracted": (
        "rebar", "score = (f - relaxed_again).detach()", "score = f.detach()"),
    "rebar: control variate subtracted in full": (
        "rebar", "(f - relaxed_again).detach()", "(f - relaxed_again / eta).detach()"),
    "concrete: KL of binary answers": (
        "concrete", "(y)) + log_ratio", "(y)) - count_kl(u, log_prior)"),
    "concrete: the prior's probability as its odds": (
        "concrete", "log_after[1:] - log_prior[:-1]", "log_after[1:] - log_after[:-1]"),
    "concrete: density at another temperature": (
        "concrete", "F.softplus(logits - t * y)", "F.softplus(logits - y)"),
    "concrete: an object without those before it": (
        "concrete", "there = presence.cumprod(1)", "there = presence"),
    # Objective
    "KL of all objects, whatever their number": (
        "eager", "log_q - log_prior + sums(u.kl)", "log_q - log_prior + u.kl.sum(1, keepdim=True)"),
    "the stop is not in q(n)": ("numbers", "+ F.pad(no, (0, 1))", ""),
    "prior not normalised": ("numbers", "device=self.zero.device)).log_softmax(0)",
                             "device=self.zero.device))"),
    "prior starts at once": ("numbers", "max(step - c.prior_hold, 0)", "max(step, 0)"),
    "the share of exploration doubled": ("exploration", "torch.log(exploration / 2)",
                                         "torch.log(exploration)"),
    "likelihood without its constant": ("eager", ".sum(-1) * (-0.5 / sigma**2) - constant",
                                        ".sum(-1) * (-0.5 / sigma**2)"),
    "a sum over images": ("eager", "other.mean() - surrogate.mean()",
                          "other.sum() - surrogate.sum()"),
    # Model
    "the same noise in every step": ("eager", "where_q[1] * noise[:, i, :3]",
                                     "where_q[1] * noise[:, 0, :3]"),
    "state not carried": ("eager", "torch.sigmoid(f + 1) * cell", "torch.sigmoid(f + 1) * 0"),
    "no feedback of what was drawn": ("eager", "torch.cat([h, where, what], 1)",
                                      "torch.cat([h, 0 * where, 0 * what], 1)"),
    "attention before the noise": ("eager", "attend(image, where, c.glimpse_size)",
                                   "attend(image, where_q[0], c.glimpse_size)"),
    "objects not added up": ("eager", "objects.cumsum(1)", "objects"),
    "no background below no object": ("background", "canvases = torch.cat([background[:, None],",
                                      "canvases = torch.cat([0 * background[:, None],"),
    "the difference is what is drawn": ("difference", "see((image - canvas)", "see((canvas)"),
    "rows and columns exchanged in place": ("transformer", "interpolation(scale, row, size[0]",
                                            "interpolation(scale, col, size[0]"),
    "attend looks the other way": ("transformer", "-row / scale, size", "row / scale, size"),
    "half a pixel off": ("transformer", "(shift * gaps_in + inputs - 1) / 2",
                         "(shift * gaps_in + inputs) / 2"),
    "corners aligned by default": ("transformer", "align_corners: bool = False",
                                   "align_corners: bool = True"),
    "boxes on the other side": ("transformer", "(1 - row / scale)", "(1 + row / scale)"),
    # Evaluation
    "iw_elbo with KL instead of log ratios": ("score", "log_prior + sums(u.log_ratio)",
                                              "log_prior - sums(u.kl)"),
    "iw_elbo a mean of logarithms": ("score", "s=100).logsumexp(1) - math.log(100)",
                                     "s=100).mean(1)"),
    "iw_elbo without the prior": ("score", "(log_prior + sums(u.log_ratio)", "(sums(u.log_ratio)"),
}  # fmt: skip
mutated = functools.partial(mutants.mutated, air)


def test_the_unmutated_source_passes_all_checks():
    """Else the next test would prove nothing."""
    module = mutated()
    for check in CHECKS.values():
        check(module)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found_out(name):
    check, old, new = MUTANTS[name]
    module = mutated(old, new)
    with pytest.raises(AssertionError, match=r" off\b"):
        CHECKS[check](module)


@pytest.mark.parametrize("name", WRONG)
def test_draws_tell_the_wrong_estimators_of_the_literature(name):
    """At five standard errors, of at most 2 % of the gradient."""
    check, old, new = WRONG[name]
    error, stderr = sampled_error(check, mutated(old, new))
    assert stderr < 0.02 and error > 5 * stderr
