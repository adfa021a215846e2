"""mvae.py against an independent MVAE and VAE, written from the paper, and against brute force.

The independent models take one image and one object at a time, with the same weights and noise in
float64, and must agree on every intermediate and on the gradient of every parameter. CHECKS holds
what mvae.py must pass and its mutants must fail.

Axes: B batch, N objects, D latent of one object, S places of the encoder's map, C H W image.
"""

import contextlib
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
from scipy import ndimage, optimize
from torch import Tensor, nn

import data
import mvae
from data import runs

DATASET = "sprites_3_32"


@contextlib.contextmanager
def double_precision():
    """Buffers are made in the default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-9):
    """The largest error, as a share of the largest value; 1e-12 for what is zero by symmetry."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, not {expected.shape}"
    error = (actual - expected).abs().max().item()
    limit = tolerance * expected.abs().max().item() + 1e-12
    assert error <= limit, f"{name} is off by {error:.3g}, more than {limit:.3g}"


# -- an independent MVAE and VAE, written from the paper -------------------------------------------


def conv(x: Tensor, layer: tuple) -> Tensor:
    """3 x 3 of one map (C, H, W), zeros around it: a matrix times the patches."""
    weight, bias = layer
    patches = F.unfold(x[None], 3, padding=1)[0]  # (9C, H W)
    return (weight.flatten(1) @ patches + bias[:, None]).view(-1, *x.shape[1:])


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
            loc, log_variance = F.linear(x.flatten(), *self.weights["to_code"][0]).chunk(2)
            pairs = zip(loc.split(size), log_variance.split(size), strict=True)
        return [D.Normal(loc, log_variance.exp().sqrt()) for loc, log_variance in pairs]

    def g(self, z: Tensor) -> Tensor:
        *layers, first, second = self.weights["g"]
        for layer in layers:
            z = F.elu(F.linear(z, *layer))
        side = math.isqrt(len(z) // self.config.base_channels)
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
    hidden_size=5, base_channels=2, object_channels=3, render_channels=4,
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
    size = batch, config.num_slots, config.latent_size
    return image.clamp(0, 1), torch.randn(size, generator=g, dtype=torch.float64)


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
        assert_close("KL map, drawn", model.kl_map(image).flatten(1), own["kl_map"])
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


@pytest.mark.parametrize("case", [
    {}, dict(aggregation="sum"), dict(num_slots=1), dict(num_slots=16),
    dict(encoder_channels=(3, 4, 2), poolings=1, num_slots=5, kl_weight=0.3),
    dict(shape=(1, 32, 32), latent_size=3),
    dict(model="vae"), dict(model="vae", num_slots=4, latent_size=3, kl_weight=2.0),
], ids=str)  # fmt: skip
def test_equals_the_eager_model(case):
    check_eager(**case)


# -- the paper's sizes, selection, aggregation -----------------------------------------------------


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
    assert shapes(vae.encoder) == encoder and shapes(vae.h) == h
    assert shapes(vae.g) == [(g[0][0], 60), *g[1:]]
    assert shapes(vae.to_code) == [(2 * 60, 64 * 24)]
    for one in (model, vae):
        image = scenes.batch(0, 2).image
        assert one.decode(one.encode(image)[0]).shape == (2, 3, 64, 64)


@double_precision()
def check_selection(module: ModuleType = mvae) -> None:
    """Of all sets of N places the chosen one has the largest KL."""
    model = make_model(small(), module=module)
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


@pytest.mark.parametrize("aggregation", ["max", "sum"])
def test_the_decoder_takes_any_number_of_objects_in_any_order(aggregation):
    """An object given twice is one under max and two under sum."""
    model = make_model(small(aggregation=aggregation))
    g = torch.Generator().manual_seed(2)
    for n in (1, 2, 5, 9):
        z = torch.randn(2, n, 2, generator=g, dtype=torch.float64)
        order = torch.randperm(n, generator=g)
        assert_close("logits", model.decode(z[:, order]), model.decode(z), 1e-12)
        objects = model.g(z.flatten(0, 1)).unflatten(0, (2, n))  # (2, n, C, h, w)
        twice = objects.sum(1) + objects[:, 0] if aggregation == "sum" else objects.amax(1)
        again = model.decode(torch.cat([z, z[:, :1]], 1))
        assert_close("an object twice", again, model.h(twice), 1e-12)


# -- the bound -------------------------------------------------------------------------------------


@double_precision()
def check_floor(module: ModuleType = mvae) -> None:
    """Against the least cross-entropy of each colour, searched for."""
    colours = torch.tensor([0.0, 1e-6, 0.01, 0.2, 0.5, 0.77, 0.999, 1.0])

    def least(colour: float) -> float:
        nll = lambda a: math.log1p(math.exp(-abs(a))) + max(a, 0) - colour * a  # noqa: E731
        found = optimize.minimize_scalar(nll, bounds=(-40, 40), method="bounded",
                                         options=dict(xatol=1e-12))  # fmt: skip
        return found.fun

    expected = [sum(map(least, c.tolist())) for c in (colours, colours.square())]
    image = torch.stack([colours, colours.square()]).view(2, 2, 2, 2)
    assert_close("floor", module.nll_floor(image), torch.tensor(expected), 1e-9)


def test_under_autocast_the_bound_is_that_of_float32():
    """bfloat16 has 8 bits: a sum of KL rounded to it would cost nats."""
    scenes = data.make(DATASET)
    model, index = mvae.build(tiny(num_slots=5), scenes), torch.arange(8)
    inputs = scenes.scenes(index).image, model.noise(scenes, index)
    exact = model.loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(*inputs)
    for name, value in rounded.items():
        assert value.dtype == torch.float32
        assert abs(value - exact[name]) < 0.02 * exact[name].abs(), name


# -- counting ------------------------------------------------------------------------------------


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


def check_counting(module: ModuleType = mvae) -> None:
    """Threshold, confusion and accuracy by hand."""
    seen = torch.tensor([(5, 1, 0.2), (5, 4, 0.1), (6, 0.3, 0.2), (0.4, 0.2, 0.1)])
    kl = torch.tensor([(3, 2, 0.5), (3, 0.5, 0.1), (9, 8, 7), (0.5, 0.4, 0), (1.5, 0.1, 0.1),
                       (2, 2, 2)])  # fmt: skip
    counts = torch.tensor([2, 2, 3, 0, 1, 2])
    found = module.count_objects(seen, torch.tensor([1, 2, 1, 0]), kl, counts)
    confusion = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]]
    assert found["confusion"] == confusion, f"confusion is off: {found['confusion']}"
    assert 1 <= found["threshold"] < 4, f"threshold is off: {found['threshold']}"
    assert found["validation_accuracy"] == 1
    assert_close("accuracy", found["count_accuracy"]["mean"], 4 / 6)


# -- what the evaluation measures ------------------------------------------------------------------


class Renderer(mvae.MVAE):
    """A perfect model: z_n is the n-th largest sprite's own picture, and its KL the pixels it has.

    It cheats: it knows the batch that it is asked about. An object fills `fills` places, in a row
    of the KL map of its own.
    """

    def __init__(self, fills: int = 1):
        super().__init__(tiny(), 3, 32, 32)
        self.fills, self.splits = fills, {}
        for split in ("validation", "test"):
            scenes = self.splits[split] = data.make(DATASET, split)
            scenes.scenes = functools.partial(self.recorded, scenes.scenes)

    def recorded(self, scenes: Callable, index: Tensor) -> data.Batch:
        self.last = scenes(index)
        return self.last

    def encode(self, image: Tensor, number: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        coverage, color = self.last.coverage[:, 1:], self.last.factors["color"][:, 1:]
        kl, order = coverage.sum((2, 3)).sort(1, descending=True)  # (B, N)
        pictures = torch.einsum("bnc,bnhw->bnchw", color, coverage).flatten(2)
        loc = pictures.gather(1, order[..., None].expand_as(pictures))
        return loc, torch.full_like(loc, -math.inf), kl

    def noise(self, scenes: data.Scenes, index: Tensor) -> Tensor:
        return torch.zeros(len(index), 3, 3 * 32 * 32)

    def decode(self, z: Tensor) -> Tensor:
        return z.sum(1).clamp(0, 1).unflatten(1, (3, 32, 32)).logit(1e-6)

    def kl_map(self, image: Tensor) -> Tensor:
        kl = self.encode(image)[2]  # (B, 3)
        places = torch.zeros(len(kl), 3, 5)
        for row in range(self.fills):
            places[:, row, ::2] = (kl - row).clamp(min=0)
        return places

    def evaluate(self, module: ModuleType = mvae, count: int = 20) -> dict:
        def make(name: str, split: str, *_) -> data.Scenes:
            assert split == "validation", f"the split of the threshold is off: {split}"
            return self.splits[split]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "make", make)
            return module.evaluate(self, self.splits["test"], count)


def check_evaluation(module: ModuleType = mvae) -> None:
    """Of a renderer: no error, no leak, every object counted, neighbours once as peaks alone."""
    for fills in (1, 2):
        model = Renderer(fills)
        result = model.evaluate(module)
        means = {name: value["mean"] for name, value in result["metrics"].items()}
        assert_close("mse", means["mse"], 0.0, 0.0)
        assert means["leak"] < 1e-3, "leak of a renderer is off"
        assert_close("nll", means["nll"], means["nll_floor"], 1e-3)
        counts = model.splits["test"].batch(0, 256).present[:, 1:].sum(1).bincount(minlength=4)
        assert_close("chance", means["count_chance"], counts.max().item() / 256)
        for name, metric, right in (("places", "count_accuracy", fills == 1),
                                    ("peaks", "count_accuracy_peaks", True)):  # fmt: skip
            chosen = result["counting"][name]["validation_accuracy"]
            assert (means[metric] == 1) == right, f"count of {name} is off: {means[metric]}"
            assert (chosen == 1) == right, f"threshold of {name} is off: {chosen}"
        assert result["counting"]["peaks"]["confusion"] == counts.diag().tolist()
        assert result["metrics"]["count_accuracy"]["n"] == 256


@pytest.mark.parametrize("lacking", ["coverage", "coverage masks", "coverage masks present"])
def test_scores_that_the_data_cannot_give_are_left_out(lacking):
    model = Renderer()
    whole = model.evaluate()["metrics"]
    none = dict.fromkeys(lacking.split())
    for scenes in model.splits.values():
        make = scenes.scenes
        scenes.scenes = lambda index, make=make: make(index)._replace(**none)
    found = model.evaluate()["metrics"]
    assert found.keys() == whole.keys() - ({"leak"} if "masks" in none else set()) - (
        {"count_accuracy", "count_accuracy_peaks", "count_chance"} if "present" in none else set())


def check_leak(module: ModuleType = mvae) -> None:
    """All that changes lies outside; all there is changes, of which two sprites are a part."""
    batch = data.make(DATASET, "test").batch(0, 64)
    sprites = [[ndimage.binary_dilation(mask, np.ones((3, 3))) for mask in scene]
               for scene in batch.coverage[:, 1:].numpy()]  # fmt: skip
    there = batch.present[:, 1:].any(1).tolist()
    pairs = [i for i in range(64) if there[i] and there[i ^ 1]]
    everywhere = torch.tensor(np.array(sprites)).any(1)  # (B, H, W)
    everywhere |= everywhere[torch.arange(64) ^ 1]
    covered = [max((a | b).mean() for a in sprites[i] for b in sprites[i ^ 1]) for i in pairs]
    zeros = torch.zeros_like(batch.image)
    for changed, expected in ((~everywhere, torch.ones(len(pairs))),
                              (torch.ones_like(everywhere), 1 - torch.tensor(covered))):
        after = changed[:, None].expand_as(zeros).float()
        leak = module.exchange_leak(zeros, after, batch.coverage)
        assert leak.isfinite().nonzero()[:, 0].tolist() == pairs, "scenes with a leak are off"
        assert_close("leak", leak[pairs], expected.float(), 1e-5)


@double_precision()
def check_exchange(module: ModuleType = mvae) -> None:
    """Scene by scene: the largest object, or the VAE's first group, comes from the neighbour."""
    for name in ("mvae", "vae"):
        config = small(model=name)
        model = make_model(config, module=module)
        image, _ = make_inputs(config, batch=4)
        before, after = model.exchange(image)
        codes = model.encode(image)[0]
        for i in range(4):
            own, other = codes[i], codes[i ^ 1]
            assert_close("before", before[i], model.decode(own[None])[0].sigmoid())
            swapped = torch.stack([other[0], *own[1:]])
            assert_close("after", after[i], model.decode(swapped[None])[0].sigmoid())


def check_peaks(module: ModuleType = mvae) -> None:
    """Against the eight neighbours one by one."""
    kl = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    around = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if r or c]
    for b, r, c in itertools.product(*map(range, kl.shape)):
        near = [kl[b, r + i, c + j] for i, j in around if 0 <= r + i < 4 and 0 <= c + j < 5]
        expected = kl[b, r, c] if kl[b, r, c] > max(near) else 0.0
        assert module.peaks(kl)[b, r, c] == expected, "peaks are off"


# -- options and training --------------------------------------------------------------------------

TINY = dict(
    dataset=DATASET, num_slots=3, latent_size=3, encoder_channels=(4, 4, 4), poolings=3,
    head_channels=4, hidden_size=8, base_channels=2, object_channels=4, render_channels=4,
    batch_size=4, steps=2, log_every=1, lr_horizon=5, device="cpu",
)  # fmt: skip


def tiny(**changes) -> mvae.Config:
    return mvae.make_config("quick", **TINY | changes)


@pytest.mark.parametrize(("answer", "changes"), [
    ("tetrominoes: 35 x 35 pixels", dict(dataset="tetrominoes")),
    ("--poolings 4: 3 layers", dict(poolings=4)),
    ("map has 16 places, and 17 are needed", dict(num_slots=17)),
    ("map has 0 places, and 1 are", dict(model="vae", poolings=6, encoder_channels=(1,) * 6)),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(answer, changes):
    with pytest.raises(runs.UserError, match=answer):
        mvae.check(tiny(**changes))


def check_learning_rate(module: ModuleType = mvae) -> None:
    paper = module.make_config("sprites3")
    steps = (0, 300_000, 1_500_000, 3_000_000, 9_000_000)
    rates = torch.tensor([module.learning_rate(paper, step) for step in steps])
    assert_close("learning rate", rates, torch.tensor([1e-3, 10**-3.2, 1e-4, 1e-5, 1e-5]), 1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(model="vae"), dict(aggregation="sum", num_slots=1), dict(precision="bfloat16"),
     dict(dataset="sprites_8_32", num_slots=10), dict(dataset="mini_sprites_16", poolings=2)],
    ids=lambda changes: ", ".join(map(str, changes.values())) or "tiny",
)  # fmt: skip
def test_a_run_trains_evaluates_and_draws(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(mvae, "evaluate", functools.partial(mvae.evaluate, count=20))
    config = tiny(out=str(tmp_path), **changes)
    result = mvae.train(config)
    own = {"sequential"} if config.model == "mvae" else set()
    pictures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert pictures == {"exchange", "reconstructions", "training"} | own
    means = {name: value["mean"] for name, value in result["metrics"].items()}
    assert all(map(math.isfinite, means.values())) and result["skipped"] == 0
    assert means["elbo"] == pytest.approx(-means["nll"] - means["kl"], rel=1e-5)
    assert ("count_accuracy" in means) == (config.model == "mvae")
    log = runs.read_log(tmp_path)
    assert [record["lr"] for record in log] == pytest.approx(
        [mvae.learning_rate(config, step) for step in (0, 1)], rel=1e-5)


def test_it_learns_eight_scenes_by_heart():
    """200 nats above the best single image for all; and objects beyond those that are there, which
    change an untrained model's images about as much as those that are, decode to nothing."""
    scenes, index, steps = data.make(DATASET), torch.arange(8), 300
    batch = scenes.batch(0, 8)
    config = tiny(encoder_channels=(8, 16, 16), head_channels=16, hidden_size=32, latent_size=4,
                  base_channels=8, object_channels=8, render_channels=8, num_slots=5,
                  kl_weight=2.0)  # fmt: skip
    model = mvae.build(config, scenes)

    @torch.no_grad()
    def surplus() -> float:
        """Change by the objects after as many as there are, as a share of that by the others."""
        loc = model.encode(batch.image)[0]
        images = torch.stack([model.mean_image(loc[:, :n]) for n in range(1, 6)], 1)
        change = images.diff(dim=1).abs().flatten(2).mean(2)  # (B, N-1), by object 2 .. N
        more = torch.arange(2, 6) > batch.present[:, 1:].sum(1, keepdim=True)
        return (change[more].mean() / change[~more].mean()).item()

    before = surplus()
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 - 2 * step / steps)
        parts = model.loss(batch.image, model.noise(scenes, index + 8 * step))
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
    best = mvae.nll_floor(batch.image.mean(0, keepdim=True)).item()  # of one image for all
    assert parts["elbo"].item() > 200 - best, (parts["elbo"].item(), best)
    assert before > 0.5 and surplus() < 0.25, (before, surplus())


# -- mutants ---------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., None]] = {
    "eager": check_eager,
    "sum": lambda module: check_eager(module, aggregation="sum", kl_weight=0.3),
    "vae": lambda module: check_eager(module, model="vae"),
    "selection": check_selection, "floor": check_floor, "threshold": check_threshold,
    "counting": check_counting, "evaluation": check_evaluation, "peaks": check_peaks,
    "exchange": check_exchange, "leak": check_leak, "rate": check_learning_rate,
}  # fmt: skip
MUTANTS = {  # name: (check, text of mvae.py, its mutation)
    "coordinates missing": ("eager", "repeat(grid, ", "repeat(0 * grid, "),
    "rows and columns exchanged": ("eager", 'indexing="ij"', 'indexing="xy"'),
    "mean of four pixels": ("eager", "nn.MaxPool2d(2)", "nn.AvgPool2d(2)"),
    "log-variance not halved": ("eager", "loc, log_variance / 2", "loc, log_variance"),
    "loc, log-variance exchanged": ("eager", "loc, log_variance = f", "log_variance, loc = f"),
    "the VAE's latents sorted": ("vae", "if self.to_code is not None:  #", "if False:  #"),
    "the VAE's pairs interleaved": ("vae", '"b (two n d) ->', '"b (n two d) ->'),
    "sign of the KL's logarithm": ("eager", "- 1) / 2 - log_scale)", "- 1) / 2 + log_scale)"),
    "deviation as a variance": ("eager", "(2 * log_scale).exp() -", "log_scale.exp() -"),
    "smallest, not largest": ("selection", "shape[1]))  #", "shape[1]), largest=False)  #"),
    "one choice for all": ("selection", "kl.topk(min", "kl.mean(0, True).expand_as(kl).topk(min"),
    "largest mean, not KL": ("selection", "kl.topk(min", "loc.square().sum(-1).topk(min"),
    "chosen detached": ("eager",
                        "return loc.gather(1, chosen)", "return loc.data.gather(1, chosen)"),
    "mean instead of max": ("eager", "self.config.aggregation, b=len(z)", '"mean", b=len(z)'),
    "max instead of sum": ("sum", "self.config.aggregation, b=len(z)", '"max", b=len(z)'),
    "objects of other scenes": ("eager", '"(b n) c h w -> b', '"(n b) c h w -> b'),
    "corners aligned": ("eager", "align_corners=False", "align_corners=True"),
    "noise ignored": ("eager", "self.decode(loc + log_scale.exp() * noise)", "self.decode(loc)"),
    "noise of deviation one": ("eager", "loc + log_scale.exp() * noise", "loc + noise"),
    "nll a mean over pixels": ("eager", "nll.flatten(1).sum(1), kl", "nll.flatten(1).mean(1), kl"),
    "sign of the KL": ("eager", "return -nll - kl, nll, kl", "return -nll + kl, nll, kl"),
    "KL of all places": ("eager", "1).sum(1), kl.sum(1)  #",
                         "1).sum(1), gaussian_kl(*self.posterior_map(image)).sum(1)  #"),
    "KL not weighted": ("sum", "nll + self.config.kl_weight * kl", "nll + kl"),
    "half of the floor": ("floor", " + torch.special.entr(1 - image)", ""),
    "t reaches the count": ("threshold", "high, low, right=True", "high, low, right=False"),
    "one object more": ("threshold", "for i in (1, 0))", "for i in (2, 1))"),
    "empty scenes left out": ("threshold", "kl[:, 0] = math.inf", "kl[:, 0] = 0"),
    "t of the test scenes": ("evaluation", '"validation", model', '"test", model'),
    "t of peaks for places": ("evaluation", "count_objects(seen[i]", "count_objects(seen[-1]"),
    "confusion transposed": ("counting", "counts * most + counted", "counted * most + counts"),
    "chance of other scenes": ("evaluation", "(counts == counts.m", "(counts == seen_counts.m"),
    "four neighbours": ("peaks", "F.max_pool2d(kl, 3, stride=1, padding=1)",
                        "F.max_pool2d(kl, (1, 3), stride=1, padding=(0, 1))"),
    "places for peaks": ("evaluation", "torch.stack([kl, peaks(kl)])", "torch.stack([kl, kl])"),
    "leak inside": ("leak", "leak = 1 - inside /", "leak = inside /"),
    "sprites of one scene": ("leak", "partner(sprites)[:, None]", "sprites[:, None]"),
    "no border": ("leak", "F.max_pool2d(sprites, 3, stride=1, padding=1)", "sprites"),
    "empty scenes have a leak": ("leak", "~(seen & partner(seen))", "~(seen | True)"),
    "exchanged with itself": ("exchange", "[partner(loc)[:, :1]", "[loc[:, :1]"),
    "all objects exchanged": ("exchange", "[partner(loc)[:, :1], loc[:, 1:]]", "[partner(loc)]"),
    "linear decay": ("rate", "config.lr_final ** min", "1 - (1 - config.lr_final) * min"),
    "decay beyond its end": ("rate", "min(step / config.lr_horizon, 1.0)",
                             "(step / config.lr_horizon)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_checks_pass(name):
    """Through the machinery of the mutants, or the next test would prove nothing."""
    CHECKS[name](mutants.mutated(mvae))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    check, old, new = MUTANTS[name]
    with pytest.raises(AssertionError, match=r" (is|are) off\b"):
        CHECKS[check](mutants.mutated(mvae, old, new))
