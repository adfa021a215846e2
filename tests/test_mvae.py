"""mvae.py against an own MVAE and VAE, written from the paper, and against brute force.

The own models take one image, and one object at a time, with the same weights and noise in float64,
and must agree on every intermediate and on the gradient of every parameter. Then the mathematics of
selection, aggregation and the bound; what the experiments measure, on a renderer that is perfect
and on models that cheat; training; and mutants of mvae.py, which must be found out.

Axes: B batch, N objects, D latent of one object, S places of the encoder's map, C H W image.
"""

import contextlib
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mutants
import numpy as np
import pytest
import test_runs
import torch
import torch.distributions as D
import torch.nn.functional as F
from scipy import ndimage, optimize
from test_air import assert_close, double_precision, one_thread  # noqa: F401
from test_runs import assert_same_run, checkpoint, context, log, same  # noqa: F401
from test_runs import resumed as resumed_model
from torch import Tensor, nn

import data
import mvae
from data import figures, options, runs

# -- an own MVAE and VAE, written from the paper ---------------------------------------------------


def conv(x: Tensor, layer: tuple) -> Tensor:
    """3 x 3 of one map (C, H, W), zeros around it: a matrix times the patches."""
    weight, bias = layer
    patches = F.unfold(x[None], 3, padding=1)[0]  # (9C, H W)
    return (weight.flatten(1) @ patches + bias[:, None]).view(-1, *x.shape[1:])


def linear(x: Tensor, layer: tuple) -> Tensor:
    weight, bias = layer
    return weight @ x + bias


def double(x: Tensor, axis: int) -> Tensor:
    """Bilinear along one axis: a new pixel has 3/4 of the nearest old one, 1/4 of the next."""
    old, pixels = x.unbind(axis), []
    for i, value in enumerate(old):
        for neighbour in (i - 1, i + 1):
            pixels.append(0.75 * value + 0.25 * old[min(max(neighbour, 0), len(old) - 1)])
    return torch.stack(pixels, axis)


def halve(x: Tensor) -> Tensor:
    """The maxima of 2 x 2 pixels."""
    corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(corners).amax(0)


class Eager:
    """Section 2 and appendix A for one image; `weights` are lists of (weight, bias) by network."""

    def __init__(self, config: mvae.Config, weights: dict[str, list]):
        self.config, self.weights = config, weights

    def posteriors(self, image: Tensor) -> list[D.Normal]:
        """Of every place, row by row; or of the VAE's groups of D latents."""
        *layers, first, last = self.weights["encoder"]
        x = image
        for i, layer in enumerate(layers):
            x = F.elu(conv(x, layer))
            if i < self.config.poolings:
                x = halve(x)
        _, rows, cols = x.shape
        places = [(r, c) for r in range(rows) for c in range(cols)]
        where = [(2 * r / (rows - 1) - 1, 2 * c / (cols - 1) - 1) for r, c in places]
        x = torch.cat([x, torch.tensor(where).T.reshape(2, rows, cols)])
        x = conv(F.elu(conv(x, first)), last)  # (2D, h, w)
        size = self.config.latent_size
        if self.config.model == "mvae":
            pairs = [(x[:size, r, c], x[size:, r, c]) for r, c in places]
        else:
            loc, log_variance = linear(x.flatten(), self.weights["to_code"][0]).chunk(2)
            pairs = zip(loc.split(size), log_variance.split(size), strict=True)
        return [D.Normal(loc, log_variance.exp().sqrt()) for loc, log_variance in pairs]

    def g(self, z: Tensor) -> Tensor:
        *layers, first, second = self.weights["g"]
        for layer in layers:
            z = F.elu(linear(z, layer))
        side = self.config.base_size
        x = z.view(self.config.base_channels, side, side)
        for layer in (first, second):
            x = F.elu(conv(double(double(x, 1), 2), layer))
        return x

    def h(self, x: Tensor) -> Tensor:
        first, second, last = self.weights["h"]
        x = F.elu(conv(F.elu(conv(x, first)), second))
        return conv(double(double(x, 1), 2), last)

    def run(self, image: Tensor, noise: Tensor) -> SimpleNamespace:
        """image (C, H, W), noise (N, D)."""
        c = self.config
        candidates = self.posteriors(image)
        prior = D.Normal(0.0, 1.0)
        kl_map = [D.kl_divergence(q, prior).sum() for q in candidates]
        chosen = list(range(c.num_slots))
        if c.model == "mvae":
            chosen = sorted(range(len(kl_map)), key=lambda s: -kl_map[s].item())[: c.num_slots]
        q = [candidates[s] for s in chosen]
        codes = [q_n.loc + q_n.scale * e for q_n, e in zip(q, noise, strict=True)]
        if c.model == "vae":
            codes = [torch.cat(codes)]
        objects = [self.g(z) for z in codes]
        pooled = sum(objects) if c.aggregation == "sum" else torch.stack(objects).amax(0)
        logits = self.h(pooled)
        likelihood = D.Bernoulli(logits=logits, validate_args=False)  # colours between 0 and 1
        nll = -likelihood.log_prob(image).sum()
        kl = torch.stack([kl_map[s] for s in chosen])
        return SimpleNamespace(
            loc=torch.stack([q_n.loc for q_n in q]), kl_map=torch.stack(kl_map), logits=logits,
            log_scale=torch.stack([q_n.scale.log() for q_n in q]), kls=kl, nll=nll, kl=kl.sum(),
            elbo=-nll - kl.sum(),
        )  # fmt: skip


SMALL = dict(
    num_slots=3, latent_size=2, encoder_channels=(3, 4), poolings=2, head_channels=3,
    hidden_size=5, base_size=2, base_channels=2, object_channels=3, render_channels=4,
)  # fmt: skip
SHAPE = (3, 16, 16)


def small(**overrides) -> mvae.Config:
    """Networks for exact comparisons in milliseconds."""
    return mvae.Config(**SMALL | overrides)


@double_precision()
def make_model(config: mvae.Config, shape=SHAPE, module: ModuleType = mvae) -> nn.Module:
    """In float64, with biases moved off the zeros that would hide mistakes."""
    torch.manual_seed(0)
    model = module.MVAE(config, *shape).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def make_inputs(config: mvae.Config, shape=SHAPE, batch: int = 2) -> tuple[Tensor, Tensor]:
    """image (B, C, H, W) with pixels of 0 and 1, and noise (B, N, D)."""
    g = torch.Generator().manual_seed(1)
    image = torch.rand(batch, *shape, generator=g, dtype=torch.float64) * 1.5 - 0.25
    noise = torch.randn(
        batch, config.num_slots, config.latent_size, generator=g, dtype=torch.float64
    )
    return image.clamp(0, 1), noise


def bind(model: nn.Module) -> tuple[Eager, dict[str, Tensor]]:
    """The eager model with a copy of the weights, and the copies under mvae.py's names."""
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    weights: dict[str, list] = {}
    for name, weight in copies.items():
        if name.endswith("weight"):
            bias = copies[name.removesuffix("weight") + "bias"]
            weights.setdefault(name.split(".")[0], []).append((weight, bias))
    return Eager(model.config, weights), copies


@double_precision()
def check_eager(module: ModuleType = mvae, shape=SHAPE, **overrides) -> None:
    """AssertionError, which names the first quantity in which the two models differ."""
    config = small(**overrides)
    model = make_model(config, shape, module)
    image, noise = make_inputs(config, shape)
    eager, copies = bind(model)
    expected = [eager.run(*inputs) for inputs in zip(image, noise, strict=True)]
    own = {name: torch.stack([vars(run)[name] for run in expected]) for name in vars(expected[0])}
    kl_map = module.gaussian_kl(*model.posterior_map(image))
    assert_close("KL map", kl_map, own["kl_map"])
    if config.model == "mvae":
        assert_close("KL map, drawn", module.kl_map(model, image).flatten(1), own["kl_map"])
    loc, log_scale, kls = model.encode(image)
    logits = model.decode(loc + log_scale.exp() * noise)
    elbo, nll, kl = model.elbo(image, noise)
    for name, value in dict(loc=loc, log_scale=log_scale, kls=kls, logits=logits, nll=nll, kl=kl,
                            elbo=elbo).items():  # fmt: skip
        assert_close(name, value, own[name])
    parts = model.loss(image, noise)
    loss = (own["nll"] + config.kl_weight * own["kl"]).mean()
    assert_close("loss", parts["loss"], loss)
    for name in ("elbo", "nll", "kl"):
        assert_close(name, parts[name], own[name].mean())
    actual = torch.autograd.grad(parts["loss"], list(model.parameters()), materialize_grads=True)
    wanted = torch.autograd.grad(loss, list(copies.values()))
    largest = max(g.abs().max() for g in wanted)
    for name, a, w in zip(copies, actual, wanted, strict=True):
        assert w.abs().max() > 1e-6 * largest, f"{name}: nothing to compare"
        assert_close(f"gradient of {name}", a, w)


CASES: dict[str, dict] = {
    "max": {},
    "sum": dict(aggregation="sum"),
    "one object": dict(num_slots=1),
    "every place": dict(num_slots=16),
    "one pooling of three layers": dict(
        encoder_channels=(3, 4, 2), poolings=1, num_slots=5, kl_weight=0.3
    ),
    "grey, 32 x 32": dict(shape=(1, 32, 32), base_size=4, latent_size=3),
    "vae": dict(model="vae"),
    "vae of other sizes": dict(model="vae", num_slots=4, latent_size=3, kl_weight=2.0),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_eager_model(case):
    check_eager(**CASES[case])


# -- the paper's sizes -----------------------------------------------------------------------------


def shapes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in network.named_parameters() if name.endswith("weight")]


def test_the_networks_have_the_sizes_of_appendix_a():
    scenes = data.make("sprites_3")
    model, vae = (
        mvae.build(mvae.make_config("sprites3", model=name), scenes) for name in ("mvae", "vae")
    )
    encoder, g, h = map(shapes, (model.encoder, model.g, model.h))
    assert [len(shape) for shape in encoder] == [4] * 6  # convolutions
    assert encoder[-1][0] == 24 and encoder[4][1] == encoder[3][0] + 2  # the coordinates
    assert [len(shape) for shape in g] == [2, 2, 4, 4] and [len(shape) for shape in h] == [4] * 3
    assert g[0][1] == 12 and g[1][0] == 8 * 8 * 16 and g[2][1] == 16 and h[-1][0] == 3
    for network, doublings in ((model.encoder, 0), (model.g, 2), (model.h, 1)):
        kinds = [type(layer) for layer in network.modules()]
        assert kinds.count(nn.Upsample) == doublings
        assert set(kinds) <= {
            nn.Sequential, nn.Conv2d, nn.Linear, nn.ELU, nn.MaxPool2d, nn.Upsample, nn.Unflatten,
            mvae.Coordinates,
        }  # fmt: skip
    image = scenes.batch(0, 2).image
    assert model.decode(model.encode(image)[0]).shape == (2, 3, 64, 64)

    assert shapes(vae.encoder) == encoder and shapes(vae.h) == h
    assert shapes(vae.g) == [(g[0][0], 60), *g[1:]]
    places = model.posterior_map(image)[0].shape[1]
    assert shapes(vae.to_code) == [(2 * 60, places * 24)]
    assert vae.decode(vae.encode(image)[0]).shape == (2, 3, 64, 64)


# -- selection -------------------------------------------------------------------------------------


@double_precision()
def check_selection(module: ModuleType = mvae) -> None:
    """Of all sets of N places the chosen one has the largest KL; the others have no influence."""
    config = small(num_slots=3)
    model = make_model(config, module=module)
    g = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.5, 2.0):  # posteriors wider and narrower than the prior
        loc, log_scale = (torch.randn(4, 7, 2, generator=g) for _ in range(2))
        q = D.Normal(loc, (scale * log_scale).exp())
        kl = D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(2)  # (4, 7)
        number = round(scale) + 2
        picked = model.select(loc, scale * log_scale, number)
        for b in range(4):
            best = max(itertools.combinations(range(7), number), key=lambda s: kl[b, list(s)].sum())
            order = sorted(best, key=lambda s: -kl[b, s])
            for name, value, of_all in zip(
                ("loc", "log scale", "KL"), picked, (loc, scale * log_scale, kl), strict=True
            ):
                assert_close(f"chosen {name}", value[b], of_all[b, order])

    # What is chosen gets its own gradient, as if it had been given; the rest gets none.
    image, noise = make_inputs(config)
    leaves = [x.detach().requires_grad_() for x in model.posterior_map(image)]  # (B, S, D)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "posterior_map", lambda image: leaves)
        elbo = model.elbo(image, noise)[0].sum()
        gradients = torch.autograd.grad(elbo, leaves)
        chosen = module.gaussian_kl(*leaves).argsort(1, descending=True)[:, :3]
        own = [x.gather(1, chosen[..., None].expand(-1, -1, 2)).detach().requires_grad_()
               for x in leaves]  # fmt: skip
        nll = F.binary_cross_entropy_with_logits(
            model.decode(own[0] + own[1].exp() * noise), image, reduction="sum"
        )
        wanted = torch.autograd.grad(-nll - module.gaussian_kl(*own).sum(), own)
    rest = torch.ones(2, 16, dtype=torch.bool).scatter(1, chosen, False)
    for name, gradient, expected in zip(("loc", "log scale"), gradients, wanted, strict=True):
        assert (gradient[rest] == 0).all(), f"gradient of {name} is off: not zero where not chosen"
        picked = gradient.gather(1, chosen[..., None].expand(-1, -1, 2))
        assert_close(f"gradient of {name}", picked, expected)


def test_selection_is_that_of_all_sets_which_has_the_largest_kl():
    check_selection()


def test_the_kl_of_places_that_were_not_chosen_is_not_counted():
    """More of it leaves the bound as it is, to the bit."""
    model = make_model(small())
    image, noise = make_inputs(model.config)
    loc, log_scale = model.posterior_map(image)
    kl = mvae.gaussian_kl(loc, log_scale)
    before = model.elbo(image, noise)
    rest = kl < kl.sort(1, descending=True)[0][:, 2:3]
    loc = loc + 1e-3 * rest[..., None] * loc.sign()
    assert (mvae.gaussian_kl(loc, log_scale) > kl)[rest].all()
    model.posterior_map = lambda image: (loc, log_scale)
    assert same(model.elbo(image, noise), before)


# -- the decoder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["max", "sum"])
def test_the_decoder_takes_any_number_of_objects_in_any_order(aggregation):
    model = make_model(small(aggregation=aggregation))
    g = torch.Generator().manual_seed(2)
    seen = []
    for n in (1, 2, 5, 9):
        z = torch.randn(2, n, 2, generator=g, dtype=torch.float64)
        logits = model.decode(z)
        assert logits.shape == (2, *SHAPE)
        for _ in range(4):
            order = torch.randperm(n, generator=g)
            assert_close("logits", model.decode(z[:, order]), logits, 1e-12)
        assert_close("one scene", model.decode(z[1:]), logits[1:], 1e-12)
        seen.append(logits)
    assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(seen, 2))


def test_an_object_twice_is_once_under_max_and_twice_under_sum():
    z = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    again = torch.cat([z, z[:, 1:2]], 1)
    model = make_model(small(aggregation="max"))
    assert_close("logits", model.decode(again), model.decode(z), 1e-12)
    model = make_model(small(aggregation="sum"))
    objects = model.g(z.flatten(0, 1)).unflatten(0, (2, 3))  # (2, 3, C, h, w)
    assert_close("logits", model.decode(again), model.h(objects.sum(1) + objects[:, 1]), 1e-12)
    assert (model.decode(again) - model.decode(z)).abs().max() > 0.01


def test_an_object_below_the_others_everywhere_is_nothing_under_max():
    """What surplus slots can become. ELU is -1 at least, and nothing is below that."""
    model = make_model(small(aggregation="max"))
    g = model.g
    del model.g  # a network; instead of it, a function
    model.g = lambda z: torch.where((z[:, 0] > 50)[:, None, None, None], -1.0, g(z.clamp(max=9)))
    z = torch.randn(2, 3, 2, dtype=torch.float64)
    nothing = torch.full((2, 4, 2), 99.0, dtype=torch.float64)
    assert_close("logits", model.decode(torch.cat([z, nothing], 1)), model.decode(z), 1e-12)


# -- the bound -------------------------------------------------------------------------------------


@double_precision()
def check_floor(module: ModuleType = mvae) -> None:
    """Against the least cross-entropy of each colour, searched for; then the ELBO's ceiling."""
    colours = torch.tensor([0.0, 1e-6, 0.01, 0.2, 0.5, 0.77, 0.999, 1.0])

    def least(colour: float) -> float:
        nll = lambda a: math.log1p(math.exp(-abs(a))) + max(a, 0) - colour * a  # noqa: E731
        return optimize.minimize_scalar(
            nll, bounds=(-40, 40), method="bounded", options=dict(xatol=1e-12)
        ).fun

    floors = torch.tensor([least(colour) for colour in colours.tolist()])
    image = torch.stack([colours, colours.flip(0), colours.square()]).view(3, 2, 2, 2)
    total = sum(floors.tolist()), sum(least(c) for c in colours.square().tolist())
    expected = torch.tensor([total[0], total[0], total[1]])
    assert_close("floor", module.nll_floor(image), expected, 1e-9)

    model = make_model(small(), module=module)
    image, noise = make_inputs(model.config)
    floor = module.nll_floor(image)
    assert (model.elbo(image, noise)[0] < -floor).all(), "ELBO is off: above its ceiling"
    none = torch.zeros_like(noise)
    model.encode = lambda image, number: (none, none, none.sum(2))
    model.decode = lambda z: image.logit(1e-15)
    elbo, _, kl = model.elbo(image, noise)
    assert_close("ceiling", elbo, -floor)
    assert (kl == 0).all()
    model.decode = lambda z: image.logit(1e-15) + 0.1
    assert (model.elbo(image, noise)[0] < -floor - 1e-3).all()


def test_no_logits_reach_less_than_the_floor():
    check_floor()


def test_under_autocast_the_bound_is_that_of_float32():
    """bfloat16 has 8 bits: a sum of KL rounded to it would cost nats."""
    scenes = data.make("sprites_3_32")
    model = mvae.build(tiny(num_slots=5), scenes)
    index = torch.arange(8)
    inputs = scenes.scenes(index).image, model.noise(scenes, index)
    exact = model.loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(*inputs)
    for name, value in rounded.items():
        assert value.dtype == torch.float32
        assert abs(value - exact[name]) < 0.02 * exact[name].abs(), name


def test_noise_is_a_function_of_the_scene():
    scenes = data.make("sprites_3_32")
    model, other = (mvae.build(tiny(seed=seed), scenes) for seed in (0, 1))
    noise = model.noise(scenes, torch.tensor([5, 2**40, 7]))
    assert noise.shape == (3, 3, 3) and len(set(noise.flatten().tolist())) == 27
    assert torch.equal(noise[2:], model.noise(scenes, torch.tensor([7])))
    assert not torch.equal(noise[2:], other.noise(scenes, torch.tensor([7])))


# -- counting --------------------------------------------------------------------------------------


def check_threshold(module: ModuleType = mvae) -> None:
    """All lists of up to three scenes of two objects, with ties, zeros and counts above N."""
    rows = [(a, b) for a in (0.0, 1.0, 2.0) for b in (0.0, 1.0, 2.0) if a >= b]
    scenes = list(itertools.product(rows, range(4)))
    for chosen in itertools.chain(*(itertools.combinations(scenes, m) for m in (1, 2, 3))):
        kl, counts = (list(values) for values in zip(*chosen, strict=True))
        right = lambda t: sum(sum(v > t for v in row) == c for row, c in chosen)  # noqa: B023, E731
        most = max(map(right, (0.5, 1.5, 2.5)))
        t, accuracy = module.best_threshold(torch.tensor(kl), torch.tensor(counts))
        found = right(t)
        assert found == most, f"threshold {t} is off: {found} of {chosen}, not {most}"
        assert accuracy == found / len(chosen), f"accuracy of {t} is off: {accuracy}"


def test_the_threshold_is_the_best_of_all():
    check_threshold()


def check_counting(module: ModuleType = mvae) -> None:
    """Threshold, confusion and chance by hand."""
    asked = []
    known = {
        "validation": ([(5, 1, 0.2), (5, 4, 0.1), (6, 0.3, 0.2), (0.4, 0.2, 0.1)], [1, 2, 1, 0]),
        "test": ([(3, 2, 0.5), (3, 0.5, 0.1), (9, 8, 7), (0.5, 0.4, 0), (1.5, 0.1, 0.1), (2, 2, 2)],
                 [2, 2, 3, 0, 1, 2]),
    }  # fmt: skip

    def canned(model, scenes, count):
        asked.append((scenes.split, count))
        kl, counts = known[scenes.split]
        return dict(places=torch.tensor(kl), peaks=8 * torch.tensor(kl)), torch.tensor(counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sorted_kl", canned)
        scenes = data.make("sprites_3_32", "test")
        result = module.count_objects(SimpleNamespace(config=tiny()), scenes, 10)
    assert asked == [("validation", 10), ("test", 20)], f"what was asked for is off: {asked}"
    confusion = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]]
    for name, scale in (("places", 1), ("peaks", 8)):
        found = result[name]
        assert found["confusion"] == confusion, f"confusion is off: {found['confusion']}"
        assert 1 <= found["threshold"] / scale < 4, f"threshold is off: {found['threshold']}"
        assert found["validation_accuracy"] == 1
        assert_close("accuracy", found["count_accuracy"]["mean"], 4 / 6)
    assert_close("chance", result["count_chance"]["mean"], 3 / 6)


def test_counting_by_hand():
    check_counting()


# -- what the experiments measure ------------------------------------------------------------------


class Renderer:
    """A perfect model: z_n is the n-th largest sprite's own picture, and its KL the pixels it has.

    It cheats: what it is given is in `scenes.last`.
    """

    shape = (3, 32, 32)

    def __init__(self):
        self.config = tiny()
        self.scenes = data.make("sprites_3_32", "test")
        scenes = self.scenes.scenes

        def recorded(index):
            self.scenes.last = scenes(index)
            return self.scenes.last

        self.scenes.scenes = recorded

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = self.scenes.last
        coverage, color = batch.coverage[:, 1:], batch.factors["color"][:, 1:]
        kl, order = coverage.sum((2, 3)).sort(1, descending=True)  # (B, N)
        pictures = torch.einsum("bnc,bnhw->bnchw", color, coverage).flatten(2)
        loc = pictures.gather(1, order[..., None].expand_as(pictures))
        return loc, torch.full_like(loc, -math.inf), kl

    def decode(self, z: Tensor) -> Tensor:
        return z.sum(1).clamp(0, 1).unflatten(1, self.shape).logit()


@contextlib.contextmanager
def no_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "grid", lambda *_, **__: None)
        yield


def check_exchange(module: ModuleType = mvae) -> None:
    """No leak if the sprites are exchanged, all if everything else changes, and in between."""
    model, count = Renderer(), 32
    with no_pictures():
        result = module.exchange(model, model.scenes, Path(), count)
        batch = model.scenes.batch(0, 2 * count)
        sprites = [[ndimage.binary_dilation(mask, torch.ones(3, 3)) for mask in scene]
                   for scene in batch.coverage[:, 1:].numpy()]  # fmt: skip
        both = [a.any() and b.any() for a, b in zip(*[iter(batch.present[:, 1:])] * 2, strict=True)]
        pairs = [(sprites[2 * i], sprites[2 * i + 1]) for i in range(count) if both[i]]
        n = 2 * len(pairs)
        assert result["leak"]["n"] == n, f"number is off: {result['leak']['n']}, not {n}"
        assert_close("leak of a renderer", result["leak"]["mean"], 0.0, 0.0)
        assert result["change"]["mean"] > 0.01

        # All but the sprites changes; and all that there is, of which the two largest are a part.
        everywhere = torch.tensor(np.array(sprites)).any(1)  # (B, H, W)
        everywhere |= everywhere[torch.arange(2 * count) ^ 1]
        covered = [max((a | b).mean() for a in one for b in other) for one, other in pairs]
        for changed, leak in ((~everywhere, 1.0), (torch.ones_like(everywhere),
                                                   1 - sum(covered) / len(covered))):
            logits = iter([torch.zeros(count * 2, *model.shape),
                           changed[:, None].expand(-1, 3, -1, -1).float()])  # fmt: skip
            model.decode = lambda z, logits=logits: next(logits)
            result = module.exchange(model, model.scenes, Path(), count)
            assert_close("leak", result["leak"]["mean"], leak, 1e-6)


def test_the_leak_of_an_exchange():
    check_exchange()


def check_sequential(module: ModuleType = mvae) -> None:
    """The renderer's surplus objects draw nothing; those of one that draws all at once do not."""
    model = Renderer()
    with no_pictures():
        result = module.sequential(model, model.scenes, Path(), 64)
        assert_close("surplus", result["surplus"]["mean"], 0.0, 0.0)
        assert_close("mse of all", result["mse"][-1], 0.0, 0.0)
        assert result["needed"]["mean"] > 0.01 and result["mse"][0] > 0.01, "needed is off: none"
        counts = model.scenes.batch(0, 64).present[:, 1:].sum(1)
        needed = int((counts - 1).clamp(min=0).sum())  # of objects 2 and 3
        found = result["needed"]["n"], result["surplus"]["n"]
        assert found == (needed, 2 * 64 - needed), f"numbers are off: {found}"
        # The n-th object makes everything 0.1 n brighter.
        model.decode = lambda z: torch.full((len(z), *model.shape), 0.1 * z.shape[1]).logit()
        result = module.sequential(model, model.scenes, Path(), 64)
        for name in ("surplus", "needed"):
            assert_close(f"{name} of any", result[name]["mean"], 0.1, 1e-5)


def test_surplus_and_needed_objects():
    check_sequential()


def check_maps(module: ModuleType = mvae) -> None:
    """All KL in one place: a share of 1. As much in each of 16: one in 16 for every object."""
    model, early = Renderer(), Renderer()
    early.load_state_dict = lambda state: None
    early.scenes = model.scenes
    one_hot = F.one_hot(torch.tensor(5), 16).view(4, 4).double()

    def kl_map(of, image):
        return (one_hot if of is model else torch.ones(4, 4)).expand(len(image), 4, 4)

    with no_pictures(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build", lambda *_: early)
        patch.setattr(module, "kl_map", kl_map)
        patch.setattr(runs, "load_checkpoint", lambda *_: dict(model={}))
        patch.setattr(Renderer, "encode", lambda self, image: (image[:, None],))
        patch.setattr(Renderer, "decode", lambda self, z: z[:, 0])
        share = module.maps(model, model.scenes, Path())["share"]
    counts = model.scenes.batch(0, 512).present[:, 1:].sum(1)
    counts = counts[counts > 0].double()
    assert_close("share of a sharp map", share["now"]["mean"], 1.0)
    assert_close("share of a flat map", share["early"]["mean"], counts.mean().item() / 16, 1e-6)
    assert share["now"]["n"] == len(counts)


def test_the_share_of_the_kl_that_lies_in_as_many_places_as_objects():
    check_maps()


def check_peaks(module: ModuleType = mvae) -> None:
    """Against the eight neighbours one by one; then where an object fills one place, or two."""
    kl = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    around = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if r or c]
    for b, r, c in itertools.product(*map(range, kl.shape)):
        near = [kl[b, r + i, c + j] for i, j in around if 0 <= r + i < 4 and 0 <= c + j < 5]
        expected = kl[b, r, c] if kl[b, r, c] > max(near) else 0.0
        assert module.peaks(kl)[b, r, c] == expected, "peaks are off"

    model = Renderer()
    counts = model.scenes.batch(0, 200).present[:, 1:].sum(1).bincount(minlength=4)
    for fills in (1, 2):

        def kl_map(model, image, fills=fills):
            kl = model.encode(image)[2]  # (B, 3)
            places = torch.zeros(len(kl), 3, 5)
            for row in range(fills):
                places[:, row, ::2] = (kl - row).clamp(min=0)
            return places

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "kl_map", kl_map)
            patch.setattr(data, "make", lambda *_: model.scenes)
            result = module.count_objects(model, model.scenes, 100)
        for name, right in (("places", fills == 1), ("peaks", True)):
            found = result[name]["count_accuracy"]["mean"]
            assert (found == 1) == right, f"count of {name} is off: {found}"
        assert result["peaks"]["confusion"] == counts.diag().tolist()
        assert_close("chance", result["count_chance"]["mean"], counts.max().item() / 200)


def test_peaks_count_an_object_once_that_fills_two_places():
    check_peaks()


def test_heat_is_white_where_the_kl_is_most():
    kl = torch.tensor([[[0.0, 1.0], [2.0, 4.0]]])
    image = mvae.heat(kl, (4, 6), 4.0)
    assert image.shape == (1, 3, 4, 6)
    assert torch.equal(image[0, 1], torch.tensor([[0, 0.25], [0.5, 1]]).kron(torch.ones(2, 3)))


# -- options ---------------------------------------------------------------------------------------

resumed = functools.partial(resumed_model, model=mvae)
TINY = dict(
    dataset="sprites_3_32", num_slots=3, latent_size=3, encoder_channels=(4, 4, 4), poolings=3,
    head_channels=4, hidden_size=8, base_size=4, base_channels=2, object_channels=4,
    render_channels=4, batch_size=4, steps=6, log_every=1, lr_horizon=5, early_step=2, device="cpu",
)  # fmt: skip


def tiny(out: Path | str = "", **changes) -> mvae.Config:
    return mvae.make_config("quick", **{**TINY, "out": str(out), **changes})


def stopped(monkeypatch, capsys, *arguments: object) -> str:
    """The one line with which `python mvae.py ARGUMENTS` ends, and nothing but it."""
    monkeypatch.setattr(sys, "argv", ["/some/where/mvae.py", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        options.main(mvae.Config, mvae.make_config, mvae.load, mvae.train)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in printed
    assert printed.startswith("mvae.py: ") and printed.count("\n") == 1, printed
    return printed.strip().removeprefix("mvae.py: ")


# What is MVAE's own; what all models refuse is in test_options.py. The command line -> its answer.
SPRITES = "--preset sprites3 --num-slots 5"
IMPOSSIBLE = {
    "--preset nonsense": "unknown preset 'nonsense': choose from quick, sprites3, sprites8",
    "--variant released": "no variant 'released': MVAE's authors released no code",
    "--dataset nonsense": "unknown dataset 'nonsense'; choose from",
    "--dataset tetrominoes": "--dataset tetrominoes: choose one of the sprites data sets",
    "--dataset multi_mnist": "--dataset multi_mnist: choose one of the sprites data sets",
    "--kernels torch": "--kernels: MVAE uses none",
    f"{SPRITES} --base-size 4": "--base-size 4: three upsamplings make 32 pixels, the images of "
    "sprites_3 have 64",
    f"{SPRITES} --poolings 5": "--poolings 5: 4 layers",
    f"{SPRITES} --poolings 4 --num-slots 17": "--num-slots 17: the encoder's map has 16 places",
    f"{SPRITES} --model vae --poolings 7 --encoder-channels 1 1 1 1 1 1 1": "--poolings 7: nothing "
    "is left of 64 pixels",
}
for value, answer, names in (
    ("0", "must be at least 1", "num_slots latent_size encoder_channels head_channels hidden_size "
     "base_size base_channels object_channels render_channels lr_horizon"),
    ("-1", "must be 0 or more", "poolings kl_weight early_step"),
    ("0", "must be larger than 0", "init_gain lr_final clip"),
):  # fmt: skip
    for name in map(options.option, names.split()):
        IMPOSSIBLE[f"{name} {value}"] = f"{name} {answer}"


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_one_line(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "set_up", lambda config: pytest.fail("this would have trained"))
    assert IMPOSSIBLE[line] in stopped(monkeypatch, capsys, *line.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", mvae.PRESETS)
@pytest.mark.parametrize("model", ["mvae", "vae"])
def test_presets_are_possible(preset, model):
    config = mvae.make_config(preset, model=model)
    mvae.check(config)
    assert config.early_step < config.steps and config.lr_horizon <= config.steps


def check_learning_rate(module: ModuleType = mvae) -> None:
    config = small(lr=1e-2, lr_final=0.01, lr_horizon=100)
    rates = [module.learning_rate(config, step) for step in (0, 1, 50, 100, 9999)]
    expected = [1e-2, 1e-2 * 0.1**0.02, 1e-3, 1e-4, 1e-4]
    assert_close("learning rate", torch.tensor(rates), torch.tensor(expected), 1e-6)


def test_the_learning_rate_falls_exponentially():
    check_learning_rate()
    paper = mvae.make_config("sprites3")
    assert mvae.learning_rate(paper, 0) == 1e-3
    assert mvae.learning_rate(paper, 3_000_000) == pytest.approx(1e-5)


# -- training --------------------------------------------------------------------------------------


@contextlib.contextmanager
def short_evaluations() -> Iterator[pytest.MonkeyPatch]:
    """Of tens of scenes; nothing is left of torchrun."""
    evaluate, count_objects = mvae.evaluate, mvae.count_objects
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvae, "evaluate", functools.partial(evaluate, count=20))
        patch.setattr(mvae, "count_objects", lambda m, scenes, _=0: count_objects(m, scenes, 50))
        for name, few in (("exchange", dict(pairs=32)), ("sequential", dict(count=64))):
            quick = functools.partial(getattr(mvae, name), **few)
            patch.setattr(mvae, name, quick)
            patch.setitem(mvae.EXPERIMENTS, name, quick)
        yield patch


@pytest.fixture
def quick(monkeypatch):
    for name in test_runs.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with short_evaluations():
        yield


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(mvae, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """The folders of an MVAE's and a VAE's two steps, with all that a run leaves."""
    folder = tmp_path_factory.mktemp("trained")
    with short_evaluations():
        for model in ("mvae", "vae"):
            mvae.train(tiny(folder / model, model=model, steps=2, early_step=1))
    return {model: folder / model for model in ("mvae", "vae")}


def pictures(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "figures").glob("*.png")}


def test_what_a_run_leaves(trained):
    both = {"exchange", "traversals", "reconstructions", "training"}
    assert pictures(trained["vae"]) == both
    own = {"counting_places", "counting_peaks", "maps", "sequential"}
    assert pictures(trained["mvae"]) == both | own
    scores = {"elbo", "nll", "kl", "nll_floor", "mse"}
    for model, folder in trained.items():
        evaluation = json.loads((folder / "evaluation.json").read_text())
        found = {name: value["mean"] for name, value in evaluation["metrics"].items()}
        counted = {"count_accuracy", "count_accuracy_peaks", "count_chance"}
        assert found.keys() == scores | (counted if model == "mvae" else set())
        assert all(map(math.isfinite, found.values()))
        assert found["elbo"] == pytest.approx(-found["nll"] - found["kl"], rel=1e-6)
        assert evaluation["model"] == "mvae" and evaluation["steps"] == 2
        assert [record["step"] for record in log(folder)] == [1, 2]
        assert log(folder)[0].keys() >= {"loss", "elbo", "nll", "kl", "grad_norm", "lr"}
        one = mvae.load_model(folder)
        assert same(dict(one.state_dict()), checkpoint(folder)["model"]) and not one.training


@pytest.mark.parametrize(
    ("model", "experiment"),
    [("mvae", name) for name in mvae.EXPERIMENTS if name != "compare"]
    + [("vae", name) for name in ("exchange", "traversals", "reconstructions")],
)
def test_experiments_draw_and_write(model, experiment, trained, quick):
    folder = trained[model]
    pictures = list((folder / "figures").glob(f"{experiment}*.png"))
    for picture in pictures:
        picture.unlink()
    before = (folder / "evaluation.json").read_bytes()
    result = mvae.train(resumed(folder, "--experiment", experiment))
    assert pictures and all(picture.is_file() for picture in pictures)
    written = json.loads((folder / f"{experiment}.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert (folder / "evaluation.json").read_bytes() == before


def test_compare_smooths_two_runs_in_one_figure(trained, quick, monkeypatch):
    drawn = []
    curves = figures.curves
    monkeypatch.setattr(figures, "curves", lambda *a, **k: drawn.append(a[1]) or curves(*a, **k))
    line = "--experiment", "compare", "--compare", trained["vae"]
    result = mvae.train(resumed(trained["mvae"], *line))
    assert (trained["mvae"] / "figures" / "compare.png").is_file()
    assert result.keys() == {"MVAE, max", "VAE"}
    assert all(scores["leak"]["n"] > 10 for scores in result.values())
    (panels,) = drawn
    assert panels.keys() == {"elbo", "nll", "kl"}
    for name, folder in (("MVAE, max", trained["mvae"]), ("VAE", trained["vae"])):
        first, second = (record["nll"] for record in log(folder))
        assert panels["nll"][name][:2] == ([1, 2], [first, 0.9 * first + 0.1 * second])


def test_experiments_that_cannot_be(trained, tmp_path, monkeypatch, capsys):
    """Without objects, without another run, or with one of other data or another model."""
    for experiment in ("maps", "sequential", "counting"):
        line = stopped(monkeypatch, capsys, "--resume", trained["vae"], "--experiment", experiment)
        assert f"--experiment {experiment}" in line and "objects" in line
    compare = "--resume", trained["mvae"], "--experiment", "compare"
    line = stopped(monkeypatch, capsys, *compare)
    assert line == "--experiment compare needs --compare RUN, another run's folder"
    content = checkpoint(trained["mvae"])
    other = tmp_path / "checkpoint.pt"
    for changes, answer in (
        (dict(model_name="air"), "a checkpoint of air.py, not mvae.py"),
        (dict(config=content["config"] | dict(dataset="sprites_3")), "trained on sprites_3, this"),
    ):
        torch.save(content | changes, other)
        assert answer in stopped(monkeypatch, capsys, *compare, "--compare", tmp_path)
    torch.save(content | dict(model_name="air"), other)
    assert "a checkpoint of air.py" in stopped(monkeypatch, capsys, "--resume", other)
    line = stopped(monkeypatch, capsys, *compare, "--compare", tmp_path / "nowhere")
    assert "nowhere: no such checkpoint" in line
    line = stopped(monkeypatch, capsys, "--resume", trained["mvae"], "--aggregation", "sum")
    assert "--aggregation sum: trained with max" in line


@pytest.mark.parametrize(("model", "early_step"), [("mvae", 2), ("mvae", 4), ("vae", 3)])
def test_six_steps_are_three_and_three(model, early_step, tmp_path, quick, no_figures):
    """Bit for bit, with an evaluation in between; early.pt, written once, is that of its step."""
    changes = dict(model=model, early_step=early_step)
    whole = mvae.train(tiny(tmp_path / "six", **changes))
    half = mvae.train(tiny(tmp_path / "half", steps=3, **changes))
    early = tmp_path / "half" / "early.pt"
    before = early.read_bytes() if early_step <= 3 else None
    assert early.exists() == (before is not None)
    continued = mvae.train(resumed(tmp_path / "half", "--steps", 6))
    assert_same_run(tmp_path / "half", tmp_path / "six")
    assert continued["metrics"] == whole["metrics"] != half["metrics"]
    assert before in (None, early.read_bytes())
    a, b = (mvae.load(tmp_path / name / "early.pt") for name in ("half", "six"))
    assert a["step"] == b["step"] == early_step and same(a["model"], b["model"])
    rates = [record["lr"] for record in log(tmp_path / "six")]
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_the_same_seed_has_the_same_metrics_and_another_has_others(tmp_path, quick, no_figures):
    results = [mvae.train(tiny(tmp_path / str(i), steps=2, seed=seed))["metrics"]
               for i, seed in enumerate((0, 0, 1))]  # fmt: skip
    assert results[0] == results[1] != results[2]
    assert log(tmp_path / "0") == log(tmp_path / "1") != log(tmp_path / "2")


@pytest.mark.parametrize(
    "changes",
    [dict(aggregation="sum"), dict(num_slots=1), dict(poolings=2), dict(precision="bfloat16"),
     dict(dataset="sprites_8_32", num_slots=10), dict(kl_weight=0.0)],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)  # fmt: skip
def test_every_option_trains(changes, tmp_path, quick, no_figures):
    result = mvae.train(tiny(tmp_path / "run", steps=2, **changes))
    assert result["skipped"] == 0 and sum(map(sum, result["counting"]["peaks"]["confusion"])) == 100
    assert all(v is not None for record in log(tmp_path / "run") for v in record.values())


def test_evaluation_is_the_same_with_and_without_grad(trained, quick):
    for folder in trained.values():
        model, scenes = mvae.load_model(folder), data.make("sprites_3_32", "test")
        results = []
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                results.append(mvae.evaluate(model, scenes))
        assert results[0] == results[1]
        assert all(p.grad is None for p in model.parameters())


def train_in_double(config: mvae.Config) -> None:
    """In a process of its own. In float32 a bias's gradient, a sum over pixels, is 1e-6 off."""
    build, loss = mvae.build, mvae.MVAE.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvae, "build", lambda *arguments: build(*arguments).double())
        patch.setattr(mvae.MVAE, "loss", lambda self, *x: loss(self, *(v.double() for v in x)))
        patch.setattr(mvae, "evaluate", lambda *_: dict(metrics=dict(elbo=dict(mean=0.0))))
        patch.setattr(mvae, "draw", test_runs.no_figures)
        test_runs.recorded(config)


def test_two_processes_are_one(tmp_path, context):  # noqa: F811
    """What test_runs.py demands of every model."""
    config = tiny(steps=2, batch_size=8)
    alone = test_runs.Child(context, tmp_path / "alone", train_in_double, config)
    ranks = test_runs.start_ranks(context, tmp_path, train_in_double, config)
    for child in (alone, *ranks):
        status, printed = child.wait(90)
        assert status == 0, printed
    folders = tuple(tmp_path / name for name in ("alone", "rank0", "rank1"))
    test_runs.test_two_processes_are_one(folders)
    test_runs.test_the_log_of_two_processes_is_that_of_one(folders)
    test_runs.test_only_rank_0_writes(folders)


# -- learning --------------------------------------------------------------------------------------


class Eight(data.Scenes):
    """The first eight scenes of sprites_3_32, over and over."""

    num_channels, height, width, max_entities = 3, 32, 32, 4

    def __init__(self):
        super().__init__("eight", "train", 0, "cpu")
        self.all = data.make("sprites_3_32").batch(0, 8)

    def scenes(self, index: Tensor) -> data.Batch:
        image, masks, present, factors, coverage = self.all
        i = index % 8
        factors = {name: value[i] for name, value in factors.items()}
        return data.Batch(image[i], masks[i], present[i], factors, coverage[i])


def test_it_learns_eight_scenes_by_heart():
    """200 nats above the best single image for all; and objects beyond those that are there, which
    change an untrained model's images about as much as those that are, decode to nothing."""
    scenes, index, steps = Eight(), torch.arange(8), 300
    config = tiny(encoder_channels=(8, 16, 16), head_channels=16, hidden_size=32, latent_size=4,
                  base_channels=8, object_channels=8, render_channels=8, num_slots=5, kl_weight=2.0)
    model = mvae.build(config, scenes)
    image = scenes.all.image
    with no_pictures():
        before = mvae.sequential(model, scenes, Path(), 8)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 - 2 * step / steps)
        parts = model.loss(image, model.noise(scenes, index + 8 * step))
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
    with no_pictures():
        after = mvae.sequential(model, scenes, Path(), 8)
    best = mvae.nll_floor(image.mean(0, keepdim=True)).item()  # of one image for all
    elbo = parts["elbo"].item()
    assert elbo > 200 - best, (elbo, best)
    share = [result["surplus"]["mean"] / result["needed"]["mean"] for result in (before, after)]
    assert share[0] > 0.5 and share[1] < 0.25, share
    assert after["mse"][-1] < 0.1 * before["mse"][-1]


# -- mutants ---------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., None]] = {
    "eager": check_eager,
    "sum": lambda module: check_eager(module, aggregation="sum", kl_weight=0.3),
    "vae": lambda module: check_eager(module, model="vae"),
    "selection": check_selection,
    "floor": check_floor,
    "threshold": check_threshold,
    "counting": check_counting,
    "peaks": check_peaks,
    "exchange": check_exchange,
    "sequential": check_sequential,
    "maps": check_maps,
    "rate": check_learning_rate,
}
MUTANTS = {  # name: (check, text of mvae.py, its mutation)
    # Encoder
    "coordinates missing": ("eager", "repeat(grid, ", "repeat(0 * grid, "),
    "rows and columns exchanged": ("eager", 'indexing="ij"', 'indexing="xy"'),
    "coordinates from 0": ("eager", "torch.linspace(-1, 1, n", "torch.linspace(0, 1, n"),
    "the mean instead of the largest of four pixels": ("eager", "nn.MaxPool2d(2)",
                                                       "nn.AvgPool2d(2)"),
    "log-variance not halved": ("eager", "return loc, log_variance / 2",
                                "return loc, log_variance"),
    "loc and log-variance exchanged": ("eager", "loc, log_variance = features.chunk",
                                       "log_variance, loc = features.chunk"),
    "the VAE's latents sorted": ("vae", "if self.to_code is not None:  #", "if False:  #"),
    "the VAE's pairs interleaved": ("vae", '"b (two n d) -> b n (two d)", two=2,\n'
                                    "                                 n=self.config.num_slots",
                                    '"b (n two d) -> b n (two d)", two=2,\n'
                                    "                                 n=self.config.num_slots"),
    # KL and selection
    "sign of the KL's logarithm": ("eager", "- 1) / 2 - log_scale)", "- 1) / 2 + log_scale)"),
    "KL of a deviation as a variance": ("eager", "(2 * log_scale).exp() - 1",
                                        "log_scale.exp() - 1"),
    "smallest instead of largest": ("selection", "kl.shape[1]))  #",
                                    "kl.shape[1]), largest=False)  #"),
    "one choice for the whole batch": ("selection", "kl, chosen = kl.topk(",
                                       "kl, chosen = kl.mean(0, True).expand_as(kl).topk("),
    "largest mean instead of KL": ("selection", "kl, chosen = kl.topk(",
                                   "kl, chosen = loc.square().sum(-1).topk("),
    "log scales of other places": ("selection", "log_scale.gather(1, chosen), kl",
                                   "log_scale[:, : chosen.shape[1]], kl"),
    "no gradient through what was chosen": ("selection", "return loc.gather(1, chosen),",
                                            "return loc.gather(1, chosen).detach(),"),
    "KL of all places": ("eager", "return -nll - kl, nll, kl",
                         "kl = gaussian_kl(*self.posterior_map(image)).sum(1)\n"
                         "        return -nll - kl, nll, kl"),
    # Decoder
    "mean instead of max": ("eager", "self.config.aggregation, b=len(z)", '"mean", b=len(z)'),
    "max instead of sum": ("sum", "self.config.aggregation, b=len(z)", '"max", b=len(z)'),
    "objects of other scenes": ("eager", '"(b n) c h w -> b c h w"', '"(n b) c h w -> b c h w"'),
    "corners aligned": ("eager", "align_corners=False", "align_corners=True"),
    "nearest pixels": ("eager", 'mode="bilinear", align_corners=False', 'mode="nearest"'),
    # Bound
    "noise ignored": ("eager", "self.decode(loc + log_scale.exp() * noise)", "self.decode(loc)"),
    "noise of deviation one": ("eager", "loc + log_scale.exp() * noise", "loc + noise"),
    "gradient of the logits stopped": ("eager", "logits(logits, image,",
                                       "logits(logits.detach(), image,"),
    "nll a mean over pixels": ("eager", "nll.flatten(1).sum(1), kl.sum(1)",
                               "nll.flatten(1).mean(1), kl.sum(1)"),
    "sign of the KL": ("eager", "return -nll - kl, nll, kl", "return -nll + kl, nll, kl"),
    "weight of the KL on the nll": ("sum", "nll + self.config.kl_weight * kl",
                                    "self.config.kl_weight * nll + kl"),
    "half of the floor": ("floor", "torch.special.entr(image) + torch.special.entr(1 - image)",
                          "torch.special.entr(image)"),
    # Experiments
    "a threshold that the count itself must be above": ("threshold", "high, low, right=True",
                                                        "high, low, right=False"),
    "intervals of one object more": ("threshold", "for i in (1, 0))", "for i in (2, 1))"),
    "scenes without objects left out": ("threshold", "kl[:, 0] = math.inf", "kl[:, 0] = 0"),
    "threshold found on the test scenes": ("counting", '"validation", model', '"test", model'),
    "confusion transposed": ("counting", "((true, predicted), torch", "((predicted, true), torch"),
    "chance of the validation scenes": ("counting", "chance = true.", "chance = seen_counts."),
    "peaks among four neighbours": ("peaks", "F.max_pool2d(kl, 3, stride=1, padding=1)",
                                    "F.max_pool2d(kl, (1, 3), stride=1, padding=(0, 1))"),
    "places instead of peaks": ("peaks", "torch.stack([kl, peaks(kl)])", "torch.stack([kl, kl])"),
    "leak inside instead of outside": ("exchange", "leaks.append((1 - inside /",
                                       "leaks.append((inside /"),
    "sprites of one scene alone": ("exchange", "sprites[other][:, None]", "sprites[:, None]"),
    "exchanged with itself": ("exchange", "torch.cat([loc[other, :1]", "torch.cat([loc[:, :1]"),
    "sprites without their border": ("exchange", "F.max_pool2d(sprites, 3, stride=1, padding=1)",
                                     "sprites"),
    "the last object that is there is surplus": (
        "sequential", "number > batch.present", "number >= batch.present"),
    "objects added from the last": ("sequential", "loc[:, : n + 1]", "loc[:, -n - 1 :]"),
    "the share of one place more": ("maps", "largest, (1, 0))", "largest, (0, 0))"),
    "linear decay": ("rate", "config.lr_final ** min(step / config.lr_horizon, 1.0)",
                     "(1 - (1 - config.lr_final) * min(step / config.lr_horizon, 1.0))"),
    "decay beyond its end": ("rate", "min(step / config.lr_horizon, 1.0)",
                             "(step / config.lr_horizon)"),
}  # fmt: skip
mutated = functools.partial(mutants.mutated, mvae)


def test_the_unmutated_source_passes_all_checks():
    """Else the next test would prove nothing."""
    module = mutated()
    for check in CHECKS.values():
        check(module)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found_out(name):
    check, old, new = MUTANTS[name]
    module = mutated(old, new)
    with pytest.raises(AssertionError, match=r" (is|are) off\b"):
        CHECKS[check](module)
