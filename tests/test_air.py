"""air.py against an own AIR, written from the paper, and its estimators against exact sums.

The own AIR, of torch.distributions and grid_sample, gets the same weights and noise in float64 and
must agree on every intermediate and on the gradient of every parameter. Expectations over z_pres
are sums over all its values, each weighed by its probability, and REBAR's over noise are
Gauss-Legendre quadratures: no sampling error, so an estimator is unbiased to nine digits or wrong.
The checks are in one table at the end, and mutants of air.py that they must catch in another.

Axes: B batch, S samples, N steps, R rows (a value of all z_pres each), D latent, C H W image.
"""

import functools
import itertools
import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import mutants
import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from checks import assert_close
from torch import Tensor, nn

import air
import data
from data import runs

HALF = 2.0**-25  # what air.logistic adds to uniform numbers


@pytest.fixture(autouse=True)
def double_precision():
    """Also of buffers: a float32 0.2 would be 3e-9 off."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- an own AIR, written from the paper ------------------------------------------------------------


def eager(config: air.Config, w: dict, image: Tensor, noise: Tensor) -> SimpleNamespace:
    """Eq. 2 to 12 of one image (C, H, W), noise (N, 3 + D), by torch.distributions and grid_sample.

    `w` holds see, gates, head, encoder, decoder, background (lists of weight and bias) and initial
    (h^0, its cell, where^0, what^0). Lists: of N steps, or of every n from 0 to N.
    """

    def mlp(name: str, x: Tensor) -> Tensor:
        *hidden, (weight, bias) = w[name]
        for matrix, vector in hidden:
            x = (matrix @ x + vector).clamp(min=0)
        return weight @ x + bias

    c, (channels, *size) = config, image.shape
    mean, std = torch.tensor([c.scale_mean, 0.0, 0.0]), torch.tensor([c.scale_std, 1.0, 1.0])
    priors = D.Normal(mean, std), D.Normal(torch.zeros(c.latent_size), torch.ones(c.latent_size))
    h, cell, where, what = w["initial"].split([c.lstm_size, c.lstm_size, 3, c.latent_size])
    e = SimpleNamespace(logits=[], kl=[], log_ratio=[], z_where=[], z_what=[], objects=[],
                        canvases=[], log_likelihood=[], log_q=[], bound=[], log_w=[])  # fmt: skip
    log_more, log_stop = [], []
    for i in range(c.max_objects):
        seen = image - sum(e.objects) if c.difference else image
        gates = w["see"][0][0] @ seen.flatten() + w["see"][0][1]
        gates = gates + w["gates"][0] @ torch.cat([h, where, what])
        into, new, forget, out = gates.chunk(4)  # the order of Sonnet; its forget bias is 1
        cell = (forget + 1).sigmoid() * cell + into.sigmoid() * new.tanh()
        h = out.sigmoid() * cell.tanh()  # eq. 5
        logit, loc, raw = mlp("head", h).split([1, 3, 3])
        more = D.Bernoulli(c.exploration / 2 + (1 - c.exploration) * logit[0].sigmoid())
        q_where = D.Normal(mean + loc * std, raw.exp().log1p() * std)
        where = q_where.loc + q_where.scale * noise[i, :3]
        # The window, image to glimpse: u = scale * v + shift solved for v.
        scale, col, row = where
        theta = axis_aligned(1 / scale, -col / scale, -row / scale)
        seen = reference_warp(image[None], theta[None], [c.glimpse_size] * 2)
        loc, raw = mlp("encoder", seen.flatten()).chunk(2)
        q_what = D.Normal(loc, raw.exp().log1p())
        what = q_what.loc + q_what.scale * noise[i, 3:]
        pixels = (mlp("decoder", what) + c.decoder_bias).sigmoid()
        pixels = pixels.view(1, channels, c.glimpse_size, c.glimpse_size)
        e.objects.append(reference_warp(pixels, axis_aligned(scale, col, row)[None], size)[0])
        pairs = list(zip((q_where, q_what), priors, (where, what), strict=True))
        e.kl.append(sum(D.kl_divergence(q, p).sum() for q, p, _ in pairs))
        e.log_ratio.append(sum((p.log_prob(z) - q.log_prob(z)).sum() for q, p, z in pairs))
        for name, value in dict(logits=more.probs.logit(), z_where=where, z_what=what).items():
            getattr(e, name).append(value)
        log_more.append(more.log_prob(torch.ones(())))
        log_stop.append(more.log_prob(torch.zeros(())))
    background = mlp("background", h).view_as(image) if c.background else torch.zeros_like(image)
    total = sum(c.prior_ratio**n for n in range(c.max_objects + 1))
    for n in range(c.max_objects + 1):
        e.canvases.append(background + sum(e.objects[:n]))  # eq. 11, 12
        e.log_likelihood.append(D.Normal(e.canvases[-1], c.sigma).log_prob(image).sum())
        e.log_q.append(sum(log_more[:n]) + sum(log_stop[n : n + 1]))  # eq. 6
        value = e.log_likelihood[-1] + math.log(c.prior_ratio**n / total) - e.log_q[-1]
        e.bound.append(value - sum(e.kl[:n]))
        e.log_w.append(value + sum(e.log_ratio[:n]))
    for name, values in vars(e).items():
        setattr(e, name, torch.stack(values))
    e.elbo = e.log_q.exp() @ e.bound  # eq. 8
    return e


SMALL = dict(
    max_objects=2, latent_size=2, glimpse_size=4, scale_mean=1.5, scale_std=0.3, lstm_size=5,
    head_sizes=(4,), encoder_sizes=(4,), decoder_sizes=(4,), prior_ratio=0.4, sigma=0.5,
)  # fmt: skip
SHAPE = (1, 6, 5)


def small(**overrides) -> air.Config:
    """Networks for exact comparisons in milliseconds."""
    return air.Config(**SMALL | overrides)


def make_model(config: air.Config, shape=SHAPE, module: ModuleType = air) -> nn.Module:
    """With vectors moved off the zeros that would hide mistakes, and a baseline whose predictions
    differ by some nats between steps and images."""
    torch.manual_seed(0)
    model = module.AIR(config, *shape)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.5 * torch.randn_like(parameter)
        if model.baseline is not None:
            model.baseline.head[-1].weight *= 30
            model.baseline.head[-1].bias -= 20
    return model


def make_inputs(config: air.Config, shape=SHAPE, batch: int = 2, samples: int = 1):
    """image (B, C, H, W); normal (B, S, N, 3 + D); uniform (B, S, N, 2)."""
    g = torch.Generator().manual_seed(1)
    steps = batch, samples, config.max_objects
    normal = torch.randn(*steps, 3 + config.latent_size, generator=g)
    return torch.rand(batch, *shape, generator=g), normal, torch.rand(*steps, 2, generator=g)


def bind(model: nn.Module) -> tuple[Callable[..., SimpleNamespace], dict[str, Tensor]]:
    """The eager model with a copy of the weights, and the copies under air.py's names."""
    p = {name: v.detach().clone().requires_grad_() for name, v in model.named_parameters()}
    weights: dict = {"initial": p["initial"], "gates": [p["gates.weight"]]}
    for part in ("see", "head", "encoder", "decoder", "background"):
        names = [n.removesuffix(".weight") for n in p if n.startswith(part) and "weight" in n]
        weights[part] = [(p[n + ".weight"], p[n + ".bias"]) for n in names]
    return functools.partial(eager, model.config, weights), p


def assert_same_gradients(
    model: nn.Module, value: Tensor, copies: dict, expected: Tensor, what: str = "",
    all_matter: bool = True,
) -> None:  # fmt: skip
    """Of every parameter that is not the baseline's, which the paper's bound does not contain."""
    names = [n for n in copies if not n.startswith("baseline")]
    mine = dict(model.named_parameters())
    how = dict(materialize_grads=True, retain_graph=True)
    actual = torch.autograd.grad(value, [mine[n] for n in names], **how)
    wanted = torch.autograd.grad(expected, [copies[n] for n in names], **how)
    largest = max(g.abs().max().item() for g in wanted)
    for name, a, w in zip(names, actual, wanted, strict=True):
        if all_matter:
            assert w.abs().max() > 1e-5 * largest, f"{name}: nothing to compare"
        assert_close(f"{what} gradient of {name}", a, w)


def check_eager(module: ModuleType, shape=SHAPE, **overrides) -> None:
    """AssertionError, which names the first quantity in which the two models differ."""
    config = small(**overrides)
    model = make_model(config, shape, module)
    image, normal, uniform = make_inputs(config, shape)
    own, copies = bind(model)
    u = model.unroll(image, normal[:, 0], explore=True)
    bounds, nlls, kls = module.elbo(u, model.log_prior)
    results = [own(image[b], normal[b, 0]) for b in range(len(image))]
    for b, e in enumerate(results):
        for name in air.Unrolled._fields:
            assert_close(name, getattr(u, name)[b], getattr(e, name))
        assert_close("log q(n)", module.count_log_probs(u.logits[b]), e.log_q)
        assert_close("nll", nlls[b], -e.log_q.exp() @ e.log_likelihood)
        assert_close("ELBO", bounds[b], e.elbo)
        assert_close("KL", kls[b], -e.elbo - nlls[b])
    parts, total = model.loss(image, normal, uniform), sum(e.elbo for e in results) / len(results)
    for name, value in dict(elbo=bounds, nll=nlls, kl=kls).items():
        assert_close(name, parts[name], value.mean())
    assert_close("loss", parts["loss"], -total)
    assert_same_gradients(model, parts["loss"], copies, -total)


# -- the spatial transformer -----------------------------------------------------------------------


def reference_warp(picture: Tensor, theta: Tensor, size: tuple) -> Tensor:
    grid = F.affine_grid(theta, [*picture.shape[:2], *size], align_corners=False)
    return F.grid_sample(picture, grid, align_corners=False)


def axis_aligned(scale: Tensor, col: Tensor, row: Tensor) -> Tensor:
    """(..., 2, 3) of affine_grid: x is the column, and comes first."""
    zero = torch.zeros_like(scale)
    return torch.stack([scale, zero, col, zero, scale, row], -1).unflatten(-1, (2, 3))


def check_transformer(module: ModuleType) -> None:
    """place and attend against grid_sample, values and gradients, mirrored and far-off windows too;
    boxes against ink."""
    g = torch.Generator().manual_seed(0)
    where = torch.randn(4, 5, 3, generator=g) * torch.tensor([1.5, 1, 1])
    glimpse, image = (torch.rand(4, 5, 3, *size, generator=g) for size in ((6, 6), (9, 7)))
    for x in (where, glimpse, image):
        x.requires_grad_()
    scale, col, row = where.flatten(0, 1).unbind(-1)
    placed = reference_warp(glimpse.flatten(0, 1), axis_aligned(scale, col, row), (9, 7))
    theta = axis_aligned(1 / scale, -col / scale, -row / scale)
    attended = reference_warp(image.flatten(0, 1), theta, (6, 6))
    for name, mine, other, picture in (
        ("place", module.place(glimpse, where, (9, 7)), placed, glimpse),
        ("attend", module.attend(image, where, 6), attended, image),
    ):
        mine = mine.flatten(0, 1)
        assert_close(name, mine, other, 1e-12)
        output = torch.randn(mine.shape, generator=g)
        actual, expected = (torch.autograd.grad(x, (picture, where), output) for x in (mine, other))
        assert_close(f"{name}: gradient of the picture", actual[0], expected[0])
        assert_close(f"{name}: gradient of where", actual[1], expected[1])

    # A box's edges are where the glimpse's are: scale * u + shift = -1 and 1.
    top, left, height, width = module.boxes(where.detach(), (50, 40)).unbind(-1)
    for i, (begin, extent, size) in {2: (top, height, 50), 1: (left, width, 40)}.items():
        edges = torch.stack([begin, begin + extent], -1) * 2 / size - 1  # (4, 5, 2) as u
        glimpse_edges = (where[..., :1] * edges + where[..., i, None]).detach().sort(-1)[0]
        assert_close("boxes", glimpse_edges, torch.tensor([-1.0, 1.0]).expand(4, 5, 2))


def test_the_transformer_has_second_derivatives():
    """grid_sample has none, and estimators that minimise their own variance need them."""
    where = torch.tensor([[1.4, 0.3, -0.2]]).requires_grad_()
    picture = torch.rand(1, 1, 3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: air.place(a, b, (4, 5)), (picture, where))
    assert torch.autograd.gradgradcheck(lambda a, b: air.attend(a, b, 3), (picture, where))


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


def success_probabilities(log_prior: Tensor) -> Tensor:
    """p(n >= i | n >= i - 1) for i = 1 .. N."""
    after = log_prior.exp().flip(0).cumsum(0).flip(0)
    return after[1:] / after[:-1]


def check_numbers(module: ModuleType) -> None:
    """The closed forms of q(n) and p(n), and the schedules of what p(n) and q(n) are made of."""
    for more, q in (
        ([0.5, 0.5, 0.5], [0.5, 0.25, 0.125, 0.125]), ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]),
        ([0.9, 0.2, 0.7], [0.1, 0.72, 0.054, 0.126]),
    ):  # fmt: skip
        actual = module.count_log_probs(torch.tensor(more).logit()).exp()
        assert_close("q(n)", actual, torch.tensor(q))
    extreme = module.count_log_probs(torch.tensor([100.0, -100.0, 100.0, 1000.0]))
    assert_close("log q", extreme, torch.tensor([-100.0, 0.0, -200.0, -1100.0, -100.0]))

    model = make_model(small(max_objects=3, prior_ratio=0.01), module=module)
    expected = torch.tensor([0.99000001, 0.0099, 9.9e-5, 9.9e-7])
    assert_close("p(n)", model.log_prior.exp(), expected, 1e-8)
    success = torch.tensor([0.00999999, 0.00999901, 0.00990099])
    assert_close("p(one more)", success_probabilities(model.log_prior), success, 1e-6)

    config = small(prior_ratio=1e-9, prior_ratio_final=0.1, prior_hold=5, prior_horizon=10,
                   exploration=0.4, exploration_horizon=8)  # fmt: skip
    model = make_model(config, module=module)
    for step, exponent, share in ((0, -9, 0.4), (2, -9, 0.3), (5, -9, 0.15), (10, -5, 0.0),
                                  (15, -1, 0.0), (99, -1, 0.0)):  # fmt: skip
        model.set_step(step)
        assert_close("ratio", model.log_prior.diff(), torch.full((2,), exponent * math.log(10)))
        assert_close("sum of p", model.log_prior.exp().sum(), torch.tensor(1.0))
        assert_close("exploration", model.exploration, torch.tensor(share))


@pytest.mark.parametrize("logit", [-100.0, -20.0, 0.0, 20.0, 100.0])
def test_exploration_leaves_both_values_of_z_pres_their_share(logit):
    """In float32; and the gradient is finite, also at e = 0, whose logarithm is not."""
    torch.set_default_dtype(torch.float32)
    model = make_model(small()).float()
    with torch.no_grad():
        model.head[-1].weight[0], model.head[-1].bias[0] = 0, logit
    image, normal, _ = (x.float() for x in make_inputs(model.config))
    for share in (0.0, 1e-6, 0.2, 0.999):
        model.exploration.fill_(share)
        u = model.unroll(image, normal[:, 0], explore=True)
        for sign in (1, -1):
            expected = share / 2 + (1 - share) * torch.tensor(sign * logit).sigmoid()
            assert torch.allclose((sign * u.logits).sigmoid(), expected, 1e-4)
        gradients = torch.autograd.grad(air.elbo(u, model.log_prior)[0].sum(), model.parameters())
        assert all(g.isfinite().all() for g in gradients)


def test_z_pres_is_one_with_its_probability():
    """For a uniform number above 1 - p; finite for every number that `draws.uniform` can give."""
    u, p = torch.linspace(0.001, 0.999, 999), torch.tensor([[0.02], [0.5], [0.93]])
    assert torch.equal(air.logistic(p.logit(), u) > 0, u + HALF > 1 - p)
    ends = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-23, 1 - 2.0**-24]).float()
    samples = air.logistic(torch.zeros(4).float(), ends)
    assert samples.isfinite().all() and (samples.diff() > 0).all()
    assert torch.allclose(samples, -samples.flip(0), 1e-6)


@pytest.mark.parametrize("logit", [-40.0, -1.0, 0.5, 10.0, 40.0])
def test_logistic_samples_given_their_sign(logit):
    """The inverse distribution function, where it has digits; in float32 for every logit."""
    v = torch.linspace(0.001, 0.999, 999)
    logits = torch.full_like(v, logit)
    p = logits.sigmoid()
    for z_pres, u in ((torch.tensor(True), 1 - p + p * v), (torch.tensor(False), (1 - p) * v)):
        sample = air.logistic_given(logits, z_pres, v - HALF)
        assert ((sample > 0) == z_pres).all()
        if abs(logit) < 20:
            assert_close("sample", sample, logits + torch.logit(u))
        single = air.logistic_given(logits.float(), z_pres, v.float() - HALF)
        assert torch.allclose(single, sample.float(), 1e-4)


def test_a_perfect_canvas_and_no_kl_is_the_ceiling():
    """Every n draws the image, and q(n) = p(n): -log 0.3 - log(2 pi) / 2 nats for every pixel."""
    model = make_model(small(max_objects=3, sigma=0.3), (1, 50, 50))
    image = torch.rand(2, 1, 50, 50)
    logits = success_probabilities(model.log_prior).logit().expand(2, -1)
    canvases = image[:, None].expand(-1, 4, -1, -1, -1)
    u = fake_unrolled(logits, model.log_likelihood(image[:, None], canvases))
    bound, _, kl = air.elbo(u, model.log_prior)
    assert bound.tolist() == pytest.approx([712.586] * 2, abs=5e-4)
    assert_close("KL", kl, torch.zeros(2))


# -- estimators ------------------------------------------------------------------------------------


def fake_unrolled(logits: Tensor, log_likelihood: Tensor) -> air.Unrolled:
    """Of (B, N) logits and (B, N+1) values of f(n), without objects and KL."""
    none = torch.zeros_like(logits)
    return air.Unrolled(logits, none, none, None, None, None, None, log_likelihood)


def weigh(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every value of z_pres (R, S, N) bool, R = 2^(S N), of logits (S, N); their probabilities
    (R,), and uniform numbers that give them (R, S, N, 2). Nothing has a gradient."""
    rows = itertools.product([False, True], repeat=logits.numel())
    z_pres = torch.tensor(list(rows)).view(-1, *logits.shape)
    p = logits.detach().sigmoid()
    weight = torch.where(z_pres, p, 1 - p).flatten(1).prod(1)
    uniform = torch.where(z_pres, 1 - p / 2, (1 - p) / 2)  # the middle of where they lie
    return z_pres, weight, torch.stack([uniform, torch.full_like(uniform, 0.5)], -1)


def quadrature(logits: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """For logits (N,): weights (R,) and uniform numbers (R, N, 2) that integrate over noise.

    Given z_pres, REBAR's surrogate is a sum of a function of u and one of v. So one grid, gone
    through with u and v at the same node, integrates both.
    """
    x, w = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(nodes))
    grid = torch.cartesian_prod(*[(x + 1) / 2] * len(logits)).view(-1, 1, len(logits))
    share = torch.cartesian_prod(*[w / 2] * len(logits)).view(-1, 1, len(logits)).prod(2)
    z_pres, weight, _ = weigh(logits[None])
    p, z_pres = logits.detach().sigmoid(), z_pres[:, 0]  # (2^N, N)
    u = torch.where(z_pres, 1 - p + p * grid, (1 - p) * grid)  # (nodes^N, 2^N, N)
    uniform = torch.stack([u, grid.expand_as(u)], -1) - HALF
    return (share * weight).flatten(), uniform.flatten(0, 1)


# Three numbers of objects with softmax logits a and joint p(x, n), below. samples: the gradient of
# the bound, and the total variance of VIMCO's estimate of it, by exact enumeration of other code.
TOY = {
    2: ([0.0096990731, 0.2937058892, -0.3034049623], 0.47481),
    3: ([-0.0246002885, 0.2530307185, -0.22843043], 0.21015),
    5: ([-0.0379322815, 0.1858917464, -0.147959465], 0.081412),
}


def check_toy(module: ModuleType) -> None:
    """VIMCO's moments over all values of z_pres."""
    a0, joint = torch.tensor([0.2, -0.4, 0.7]), torch.tensor([0.10, 0.25, 0.05])

    def stick(a: Tensor) -> Tensor:  # logits of "one more": p(n >= 1) / p(0), p(2) / p(1)
        return torch.stack([a[..., 1:].logsumexp(-1) - a[..., 0], a[..., 2] - a[..., 1]], -1)

    for samples, (expected, least) in TOY.items():
        z_pres, weight, uniform = weigh(stick(a0).expand(samples, -1))
        a = a0.expand(len(z_pres), -1).clone().requires_grad_()  # a copy for every row
        log_prior = torch.tensor([0.5, 0.3, 0.2]).log()
        logits = stick(a).repeat_interleave(samples, 0)
        u = fake_unrolled(logits, (joint.log() - log_prior).expand(len(logits), -1))
        model = SimpleNamespace(config=SimpleNamespace(num_samples=samples), log_prior=log_prior)
        surrogate = module.vimco(model, None, u, uniform.flatten(0, 1))
        (gradient,) = torch.autograd.grad(surrogate.sum(), a)
        mean = weight @ gradient
        assert_close(f"vimco of {samples}", mean, torch.tensor(expected), 1e-7)
        variance = weight @ gradient.square().sum(1) - mean.square().sum()
        assert_close("variance of vimco", variance, torch.tensor(least), 1e-4)


def check_unbiased(module: ModuleType, name: str, samples: int = 1, **overrides) -> None:
    """The expectation of model.loss's gradient is that of the ELBO, or of vimco's own bound; nvil's
    with moments of earlier steps, which each loss moves."""
    config = small(estimator=name, num_samples=max(samples, 2), **overrides)
    model = make_model(config, module=module)
    image, normal, _ = make_inputs(config, batch=1, samples=samples)
    own, copies = bind(model)
    u = model.unroll(image.expand(samples, -1, -1, -1), normal[0], explore=True)
    expected = torch.zeros(())
    for _, weight, uniform in zip(*weigh(u.logits), strict=True):
        if name == "nvil":
            model.baseline.moments.copy_(torch.tensor([5.0, 100.0]))
        expected = expected + weight * model.loss(image, normal, uniform[None])["loss"]
    results = [own(image[0], normal[0, s]) for s in range(samples)]
    bound = results[0].elbo
    if name == "vimco":  # E log mean_s w_s over all numbers of all S samples
        bound = 0
        for numbers in itertools.product(range(config.max_objects + 1), repeat=samples):
            chosen = list(zip(results, numbers, strict=True))
            log_w = torch.stack([e.log_w[n] for e, n in chosen]).logsumexp(0) - math.log(samples)
            bound = bound + sum(e.log_q[n] for e, n in chosen).exp() * log_w
    assert_same_gradients(model, expected, copies, -bound, name)


def test_under_autocast_no_sum_is_of_bfloat16():
    """Its 8 bits would cost nats: KL and logits are sums of what is float32 again."""
    torch.set_default_dtype(torch.float32)
    scenes = data.make("multi_mnist")
    model, index = air.build(air.make_config("quick"), scenes), torch.arange(16)
    image, (normal, _) = scenes.scenes(index).image, model.noise(scenes, index, 1)
    exact = model.unroll(image, normal[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.unroll(image, normal[:, 0])
    for name in ("logits", "kl", "log_ratio", "log_likelihood"):
        assert getattr(rounded, name).dtype == torch.float32, name
    torch.testing.assert_close(rounded.kl, exact.kl, rtol=0.02, atol=0.02)


def check_rebar(module: ModuleType, **overrides) -> None:
    config = small(estimator="rebar", **overrides)
    model = make_model(config, module=module)
    image, normal, _ = make_inputs(config, batch=1)
    own, copies = bind(model)
    u = model.unroll(image, normal[:, 0])
    weight, uniform = quadrature(u.logits[0], 16)
    rows = len(weight)
    u = type(u)(*(v.expand(rows, *v.shape[1:]) for v in u))
    surrogate = weight @ module.rebar(model, image.expand(rows, -1, -1, -1), u, uniform)
    assert_same_gradients(model, surrogate, copies, own(image[0], normal[0, 0]).elbo, "rebar")


def check_concrete(module: ModuleType) -> None:
    """Likelihood and KL by hand, and torch's own density of the logit of a relaxed z_pres."""
    t = 0.7
    config = small(estimator="concrete", temperature=t, max_objects=3, background=True)
    model = make_model(config, module=module)
    image, normal, uniform = make_inputs(config)
    u = model.unroll(image, normal[:, 0])
    surrogate = module.concrete(model, image, u, uniform[:, 0])
    noise = uniform[:, 0, :, 0] + HALF
    relaxed = functools.partial(D.relaxed_bernoulli.LogitRelaxedBernoulli, torch.tensor(t))
    for b in range(len(image)):
        y = (u.logits[b] + noise[b].log() - (1 - noise[b]).log()) / t
        p, q = (relaxed(probs=success_probabilities(model.log_prior)), relaxed(logits=u.logits[b]))
        value = (p.log_prob(y) - q.log_prob(y)).sum()
        canvas, there = u.canvases[b, 0], torch.ones(())
        for i, presence in enumerate(y.sigmoid()):
            there = there * presence
            canvas = canvas + there * u.objects[b, i]
            value = value - there * u.kl[b, i]
        value = value + D.Normal(canvas, config.sigma).log_prob(image[b]).sum()
        assert_close("concrete", surrogate[b], value)


def check_nvil(module: ModuleType, normalise: bool = False, square: float = 80.0) -> None:
    """The surrogate for every value of z_pres, each decision by hand: its gradient in the model and
    in the baseline, which has a loss of its own. The moments are those of earlier steps."""
    config = small(estimator="nvil", max_objects=3, normalise=normalise)
    model = make_model(config, module=module)
    image, normal, _ = make_inputs(config, batch=1)
    u = model.unroll(image, normal[:, 0])
    predicted, earlier = model.baseline(image, u)[0], torch.tensor([-7.0, square])
    deviation = max(square - 49, 1) ** 0.5 if normalise else 1.0
    assert predicted.std() > 0.1
    log_q = module.count_log_probs(u.logits[0])
    kl = (log_q.exp() * (log_q - model.log_prior)).sum()
    parameters = dict(model.named_parameters())
    own = [p for name, p in parameters.items() if name.startswith("baseline")]
    z_pres, _, uniforms = weigh(u.logits)
    for chosen, uniform in zip(z_pres[:, 0].tolist(), uniforms, strict=True):
        n = [*chosen, False].index(False)
        value, fit, errors = u.log_likelihood[0, n] - u.kl[0, :n].sum() - kl, 0, []
        for i in range(min(n + 1, 3)):  # n ones and, before the end, a zero
            signal = (u.log_likelihood[0, n] - u.kl[0, i:n].sum()).detach()
            errors.append(signal - predicted[i])
            log_q_i = F.logsigmoid(u.logits[0, i] if chosen[i] else -u.logits[0, i])
            value = value + (errors[-1] - earlier[0]).detach() / deviation * log_q_i
            fit = fit + (errors[-1] - earlier[0]).square()
        model.baseline.moments.copy_(earlier)
        surrogate = module.nvil(model, image, u, uniform)[0]
        assert_close("surrogate", surrogate, value - fit)
        assert_same_gradients(model, surrogate, parameters, value, f"nvil, {n} objects:", n == 3)
        actual, wanted = (torch.autograd.grad(x, own, retain_graph=True) for x in (surrogate, -fit))
        for a, w in zip(actual, wanted, strict=True):
            assert_close("gradient of the baseline", a, w)
        errors = torch.stack(errors).detach()
        new = torch.stack([errors.mean(), errors.square().mean()])
        assert_close("moments", model.baseline.moments, 0.8 * earlier + 0.2 * new)


def test_moments_survive_what_is_not_finite():
    baseline = make_model(small(estimator="nvil")).baseline
    baseline.track(torch.full((1, 2), math.nan), torch.ones(1, 2))
    assert baseline.moments.tolist() == [0, 0]


def test_the_baseline_of_a_step_sees_the_image_and_the_objects_before_it():
    model = make_model(small(estimator="nvil", max_objects=3))
    image, normal, _ = make_inputs(model.config)
    u = model.unroll(image, normal[:, 0])
    before = model.baseline(image, u)
    assert (model.baseline(image + 0.1, u) != before).all()
    for i, name in itertools.product(range(3), ("z_where", "z_what")):
        value = getattr(u, name).clone()
        value[:, i] += 1
        changed = model.baseline(image, u._replace(**{name: value})) != before
        assert changed.all(0).tolist() == [j > i for j in range(3)] == changed.any(0).tolist()


@pytest.mark.parametrize("name", air.ESTIMATORS)
def test_the_loss_of_a_batch_is_the_mean_over_its_images(name):
    samples = 3 if name == "vimco" else 1
    config = small(estimator=name, num_samples=samples, background=True)
    inputs = make_inputs(config, batch=3, samples=samples)
    alone = [make_model(config).loss(*(x[b : b + 1] for x in inputs))["loss"] for b in range(3)]
    assert_close("loss", make_model(config).loss(*inputs)["loss"], sum(alone) / 3, 1e-12)


# -- evaluation ------------------------------------------------------------------------------------


class Fixed(data.Scenes):
    """These scenes, over and over: image (E, C, H, W), present (E, O + 1), box (E, O + 1, 4)."""

    def __init__(self, image: Tensor, present: Tensor, box: Tensor):
        super().__init__("fixed", "train", 0, "cpu")
        self.content, self.max_objects = (image, present, box), present.shape[1] - 1

    def scenes(self, index: Tensor) -> data.Batch:
        image, present, box = (x[index % len(x)] for x in self.content)
        return data.Batch(image, None, present, dict(box=box))


def grey_model(module: ModuleType, head_bias: list[float], **config) -> nn.Module:
    """At most one object, of 2 x 3 pixels: always the same grey, whatever z_what; one scale. q is
    the same for every image: logit, three means and three raw deviations of z_where."""
    model = module.AIR(small(max_objects=1, latent_size=1, glimpse_size=2, scale_mean=1.2,
                             scale_std=1e-6, decoder_bias=2.0, **config), 1, 2, 3)
    with torch.no_grad():
        for layer in (model.head[-1], model.encoder[-1], model.decoder[-1]):
            layer.weight.zero_(), layer.bias.zero_()
        model.head[-1].bias.copy_(torch.tensor(head_bias))
        # q(z_what) = p(z_what): softplus(log(e - 1)) = 1
        model.encoder[-1].bias.copy_(torch.tensor([0.0, math.log(math.e - 1)]))
    return model


def grey_canvases(reach: float, points: int) -> tuple[Tensor, Tensor]:
    """All canvases (R, 1, 2, 3) of that object on a grid of shifts, and their prior mass (R,)."""
    axis = torch.linspace(-reach, reach, points)
    col, row = (x.flatten() for x in torch.meshgrid(axis, axis, indexing="ij"))
    theta = axis_aligned(torch.full_like(col, 1.2), col, row)
    grey = torch.full((len(col), 1, 2, 2), 2.0).sigmoid()
    mass = D.Normal(0.0, 1.0).log_prob(torch.stack([col, row])).sum(0).exp()
    return reference_warp(grey, theta, (2, 3)), mass * (axis[1] - axis[0]) ** 2


def check_score(module: ModuleType) -> None:
    """iw_elbo against log p(x) by quadrature."""
    model = grey_model(module, [0.4, 0.0, 0.2, -0.2, 0.6, 0.9, 0.7], prior_ratio=0.8, sigma=0.6)
    image = torch.tensor([[0.1, 0.9, 0.6], [0.3, 0.6, 0.2]])
    canvases, mass = grey_canvases(7, 281)
    pixel = lambda mean: D.Normal(mean, 0.6).log_prob(image).sum((-3, -2, -1))  # noqa: E731
    none = pixel(torch.zeros(1, 1, 2, 3)).exp()[0]
    log_p = ((none + 0.8 * mass @ pixel(canvases).exp()) / 1.8).log().item()
    scenes = Fixed(image[None, None], torch.ones(1, 2).bool(), torch.rand(1, 2, 4))
    metrics = module.evaluate(model, scenes)["metrics"]
    iw, stderr = metrics["iw_elbo"]["mean"], metrics["iw_elbo"]["stderr"]
    # By the delta method it lies half its variance, here that of one of 200 images, below log p(x).
    error = iw - (log_p - 200 * stderr**2 / 2)
    assert abs(error) < 4 * stderr < 0.025, f"iw_elbo is off by {error:.3g}"
    assert metrics["elbo"]["mean"] < log_p - 0.1, "the ELBO is off: above log p(x)"


def test_concrete_is_no_bound():
    """Above log p(x) of its own model, by quadrature over presence and shifts: the object is half
    present, and only half of the KL of its narrow posterior is charged."""
    t = 10.0  # presences near 1/2, under q and, as the prior's odds are 1, under p
    model = grey_model(air, [0.0, 0.0, 1.0, -1.0, 0.0, -2.5, -2.5], estimator="concrete",
                       temperature=t, prior_ratio=1.0, sigma=0.05)  # fmt: skip
    where = torch.tensor([[1.2, 1.0, -1.0]])
    image = 0.5 * air.place(torch.full((1, 1, 2, 2), 2.0).sigmoid(), where, (2, 3))
    canvases, mass = grey_canvases(3, 121)
    presence = (torch.linspace(0.02, 0.98, 25).logit() / t).sigmoid()  # equally probable
    log_x = D.Normal(presence[:, None, None, None, None] * canvases, 0.05).log_prob(image)
    log_p = (mass.log() + log_x.sum((-3, -2, -1))).flatten().logsumexp(0) - math.log(25)

    g = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(1000, 1, 4, generator=g), torch.rand(1000, 1, 2, generator=g)
    images = image.expand(1000, -1, -1, -1)
    u = model.unroll(images, normal)
    values = air.concrete(model, images, u, uniform)
    stderr = values.std().item() / 1000**0.5
    assert values.mean() - 5 * stderr > log_p + 1
    assert values.mean() - u.kl[:, 0].mean() / 2 < log_p  # all of it charged: a bound


def test_evaluation_counts_and_compares_boxes():
    """Scenes of two, no, one and one 4 x 4 squares; a model that always says one object, in a
    window as large as the image."""
    model = air.AIR(small(max_objects=1, scale_mean=1.0, scale_std=1e-3), 1, 12, 12)
    model.where_std.fill_(1e-3)
    with torch.no_grad():
        model.head[-1].weight.zero_()
        model.head[-1].bias.copy_(torch.tensor([5.0, 0, 0, 0, 0, 0, 0]))
    present = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    box = torch.tensor([[0, 0, 12, 12], [0, 0, 4, 4], [7, 6, 4, 4.0]]).expand(4, 3, 4)
    result = air.evaluate(model, Fixed(torch.rand(4, 1, 12, 12), present, box), 16)
    assert result["confusion"] == [[0, 4, 0], [0, 8, 0], [0, 4, 0]]
    mean = {name: value["mean"] for name, value in result["metrics"].items()}
    assert mean["count_accuracy"] == mean["count_chance"] == 8 / 16
    assert result["metrics"]["box_iou"]["n"] == 12  # empty scenes are left out
    share = 16 / 144  # of the image in each square; with two of them, one has no window
    assert mean["box_iou"] == pytest.approx((2 * share + share / 2) / 3, rel=0.01)
    assert mean["elbo"] == pytest.approx(-mean["nll"] - mean["kl"], rel=1e-5)


def test_estimator_variance():
    """None of the exact gradient; unbiased estimators miss it by no more than chance."""
    torch.set_default_dtype(torch.float32)
    config = air.make_config("quick", max_objects=1, **TINY)
    scenes = data.make("multi_mnist", "test")
    model = air.build(config, scenes)
    measured = air.estimator_variance(model, scenes, 40)
    assert measured.keys() == air.ESTIMATORS.keys()
    assert measured.pop("enumerate") == dict(variance=0, bias=0, chance=0)
    assert all(r["variance"] > 0 and r["bias"] > 0 for r in measured.values())
    assert all(measured[n]["bias"] < 4 * measured[n]["chance"] for n in ("nvil", "mvd", "rebar"))


# -- options and training --------------------------------------------------------------------------

TINY = dict(latent_size=3, glimpse_size=6, lstm_size=8, head_sizes=(8,), encoder_sizes=(8,),
            decoder_sizes=(8,), batch_size=4, steps=2, log_every=1, device="cpu")  # fmt: skip


@pytest.mark.parametrize("changes", [
    dict(dataset="tetrominoes"), dict(mnist_dir="nowhere"), dict(kernels="torch"),
    dict(estimator="vimco", num_samples=1), dict(head_sizes=(8, 0)), dict(glimpse_size=1),
    dict(exploration=1.0), dict(prior_hold=-1), dict(sigma=0.0), dict(prior_ratio=0.0),
    dict(decoder_bias=math.nan),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused(changes):
    """By an error that names the last option."""
    with pytest.raises(runs.UserError, match=runs.option(list(changes)[-1])):
        air.check(air.make_config(**changes))


@pytest.mark.parametrize("changes", [
    dict(estimator="nvil", normalise=True), dict(estimator="vimco"), dict(estimator="concrete"),
    dict(estimator="mvd"), dict(estimator="rebar", precision="bfloat16"),
    dict(difference=True, background=True), dict(dataset="multi_mnist_grid"),
], ids=str)  # fmt: skip
def test_every_option_trains(changes, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(air, "evaluate", functools.partial(air.evaluate, count=20))
    monkeypatch.setattr(air, "draw", lambda *_: None)
    result = air.train(air.make_config(out=tmp_path / "run", **TINY | changes))
    assert result["skipped"] == 0 and sum(map(sum, result["confusion"])) == 20
    assert all(math.isfinite(score["mean"]) for score in result["metrics"].values())


# -- all checks, and mutants that they must catch --------------------------------------------------

CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "transformer": check_transformer, "numbers": check_numbers, "toy": check_toy,
    "concrete": check_concrete, "nvil by hand": check_nvil, "score": check_score,
}  # fmt: skip
for name, check, options in (
    ("eager", check_eager, dict()),
    ("colour", check_eager, dict(shape=(3, 5, 7), max_objects=4)),
    ("background", check_eager, dict(background=True, max_objects=1)),
    ("difference", check_eager, dict(background=True, difference=True, max_objects=3)),
    ("exploration", check_eager, dict(exploration=0.3)),
    ("more layers", check_eager, dict(
        head_sizes=(4, 3), encoder_sizes=(3, 5), decoder_sizes=(3, 4, 5), glimpse_size=9,
        latent_size=3, decoder_bias=0.5, sigma=0.3)),
    ("enumerate", check_unbiased, dict(name="enumerate")),
    ("nvil", check_unbiased, dict(name="nvil")),
    ("nvil, all options", check_unbiased, dict(
        name="nvil", max_objects=3, exploration=0.3, background=True, difference=True)),
    ("mvd", check_unbiased, dict(name="mvd", max_objects=3, background=True)),
    ("mvd, exploration", check_unbiased, dict(name="mvd", exploration=0.3)),
    ("vimco", check_unbiased, dict(name="vimco", samples=2, background=True)),
    ("vimco of three", check_unbiased, dict(name="vimco", samples=3, exploration=0.2)),
    ("nvil, normalised", check_nvil, dict(normalise=True)),
    ("nvil, small deviation", check_nvil, dict(normalise=True, square=49.5)),
    ("rebar", check_rebar, dict()),
    ("rebar, cooler", check_rebar, dict(temperature=0.5, background=True)),
):  # fmt: skip
    CHECKS[name] = functools.partial(check, **options)

OTHERS = "others = (log_w.sum(1, keepdim=True) - log_w) / (samples - 1)"
EARLIER = "    mean, square = model.baseline.moments.clone()"
MUTANTS: dict[str, tuple[str, str, str]] = {  # name: (check, text of air.py, its mutation)
    "vimco: signal log w_k instead of the bound": (
        "vimco", "(bound - (without", "(log_w - (without"),
    "vimco: mean over samples": ("vimco", "(signal * log_q).sum(1)", "(signal * log_q).mean(1)"),
    "vimco: no path term": ("vimco", "return bound[:, 0]", "return bound.detach()[:, 0]"),
    "vimco: own sample in the baseline": (
        "vimco", OTHERS, "others = log_w.mean(1, keepdim=True).expand_as(log_w)"),
    "vimco: arithmetic mean": (
        "toy", OTHERS, OTHERS.replace("= (", "= ((").replace("log_w", "log_w.exp()") + ").log()"),
    "vimco: no q(n) in the weights": ("vimco", "model.log_prior - log_q  #", "model.log_prior  #"),
    "KL of the first absent object is charged": (
        "nvil", "return u.log_likelihood - sums(u.kl)",
        "return u.log_likelihood - sums(u.kl)[:, [*range(1, u.kl.shape[1] + 1), -1]]"),
    "nvil: later KL dropped": ("nvil", "(f + sums(u.kl)[:, :-1])", "u.log_likelihood.gather(1, n)"),
    "nvil: earlier KL kept": ("nvil by hand", "(f + sums(u.kl)[:, :-1])", "(f + 0 * u.kl)"),
    "nvil: no KL of n": ("nvil", "score - count_kl(u, model.log_prior) - fit", "score - fit"),
    "nvil: signal not stopped": ("nvil by hand", "[:, :-1]).detach()", "[:, :-1])"),
    "nvil: baseline not stopped": ("nvil by hand", "weight = error.detach()", "weight = error"),
    "nvil: the stop is not scored": ("nvil by hand", "asked = steps <= n", "asked = steps < n"),
    "nvil: running mean of this step too": (
        "nvil", EARLIER, f"    model.baseline.track(error.detach(), asked)\n{EARLIER}"),
    "nvil: no running mean": ("nvil by hand", "(error - mean) * asked", "error * asked"),
    "mvd: later ones all 1": ("mvd", "(value - f[:, i])", "(f[:, -1] - f[:, i])"),
    "mvd: against no object": ("mvd", "(value - f[:, i])", "(value - f[:, 0])"),
    "mvd: by the logit": ("mvd", "(p - p.detach())[:, i]", "(u.logits - u.logits.detach())[:, i]"),
    "rebar: second sample stopped": ("rebar", "- relaxed_again -", "- relaxed_again.detach() -"),
    "rebar: second of another sign": ("rebar", "u.logits, z_pres, un", "u.logits, ~z_pres, un"),
    "rebar: no control variate": ("rebar", "(f - relaxed_again).detach()", "f.detach()"),
    "concrete: wrong odds": ("concrete", "log_after[1:] - log_prior[:-1]", "log_after.diff()"),
    "concrete: wrong temperature": ("concrete", "softplus(logits - t * y)", "softplus(logits - y)"),
    "concrete: own presence": ("concrete", "there = presence.cumprod(1)", "there = presence"),
    "KL of all objects": ("eager", "log_prior + sums(u.kl)", "log_prior + u.kl.sum(1, True)"),
    "the stop is not in q(n)": ("numbers", "+ F.pad(no, (0, 1))", ""),
    "prior not normalised": ("numbers", ".log_softmax(0)", ""),
    "prior starts at once": ("numbers", "max(step - c.prior_hold, 0)", "max(step, 0)"),
    "exploration doubled": ("exploration", "self.exploration / 2", "self.exploration"),
    "likelihood without its constant": ("eager", "sigma**2) - constant", "sigma**2)"),
    "a sum over images": ("eager", "-surrogate.mean()", "-surrogate.sum()"),
    "the same noise in every step": ("eager", "noise[:, i, :3]", "noise[:, 0, :3]"),
    "state not carried": ("eager", "torch.sigmoid(f + 1) * cell", "torch.sigmoid(f + 1) * 0"),
    "attention before the noise": ("eager", "(image, z_where,", "(image, z_where - unit,"),
    "objects not added up": ("eager", "objects.cumsum(1)", "objects"),
    "no background below no object": ("background", "cat([background[", "cat([0 * background["),
    "the difference is what is drawn": ("difference", "see((image - canvas)", "see((canvas)"),
    "rows and columns exchanged": ("transformer", "(scale, row, size[0]", "(scale, col, size[0]"),
    "attend looks the other way": ("transformer", "-row / scale, size", "row / scale, size"),
    "half a pixel off": ("transformer", "shift * inputs + inputs - 1", "shift * inputs + inputs"),
    "boxes on the other side": ("transformer", "(1 - row / scale)", "(1 + row / scale)"),
    "iw_elbo with KL": ("score", "log_prior + sums(u.log_ratio)", "log_prior - sums(u.kl)"),
    "iw_elbo a mean of logs": ("score", "s=100).logsumexp(1) - math.log(100)", "s=100).mean(1)"),
}  # fmt: skip
mutated = functools.partial(mutants.mutated, air)


@pytest.mark.parametrize("name", CHECKS)
def test_check(name):
    """Of the source read as the mutants are: else the next test would prove nothing."""
    CHECKS[name](mutated())


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    check, old, new = MUTANTS[name]
    with pytest.raises(AssertionError, match=r" off\b"):
        CHECKS[check](mutated(old, new))
