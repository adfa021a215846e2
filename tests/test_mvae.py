"""mvae.py against an independent MVAE and VAE, written from the paper, and against brute force.

The independent models take one image and one object at a time, with the same weights and noise in
float64, and must agree on every intermediate and on the gradient of every parameter. CHECKS holds
what mvae.py must pass and its mutants must fail.

Axes: B batch, N objects, D latent of one object, S places of the encoder's map, C H W image.
"""

import functools
import itertools
import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import mutants
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from checks import assert_close, assert_gradients, copies_of, double_precision, off_zero
from torch import Tensor, nn

import data
import mvae
from data import runs

DATASET = "sprites_3_32"


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

    def surcharge(self, kl_map: list[Tensor], chosen: list[int], step: int) -> Tensor:
        """What the five fields of "one object, one place" add to the loss."""
        c, side = self.config, math.isqrt(len(kl_map))
        begin, full, hold, end = c.exclusion_steps
        rising, falling = (step - begin) / (full - begin), (end - step) / (end - hold)
        times = 1 + (c.exclusion - 1) * min(1, max(0, min(rising, falling)))
        weight = min(1, 0.05 + 0.95 * step / c.unselected_steps) if c.unselected else 0
        total = torch.zeros(())
        for s, kl in enumerate(kl_map):
            near = [t for t in range(len(kl_map)) if t != s
                    and abs(t // side - s // side) <= 1 and abs(t % side - s % side) <= 1]
            total = total + (0 if s in chosen else weight * kl)
            total = total + ((times - 1) * kl if any(kl_map[t] > kl for t in near) else 0)
        return total

    def run(self, image: Tensor, noise: Tensor, step: int = 0) -> SimpleNamespace:
        """image (C, H, W), noise (N, D)."""
        c = self.config
        candidates = self.posteriors(image)
        prior = D.Normal(0.0, 1.0)
        kl_map = [D.kl_divergence(q, prior).sum() for q in candidates]
        chosen = list(range(c.num_slots))
        if c.model == "mvae":
            chosen = sorted(range(len(kl_map)), key=lambda s: -kl_map[s].item())[: len(noise)]
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
        extra = self.surcharge(kl_map, chosen, step) if c.model == "mvae" else torch.zeros(())
        return SimpleNamespace(
            loc=torch.stack([q_n.loc for q_n in q]), kl_map=torch.stack(kl_map), logits=logits,
            log_scale=torch.stack([q_n.scale.log() for q_n in q]), kls=kl, nll=nll, kl=kl.sum(),
            elbo=-nll - kl.sum(), loss=nll + kl.sum() + extra,
        )  # fmt: skip


SMALL = dict(
    num_slots=3, latent_size=2, encoder_channels=(3, 4), poolings=2, head_channels=3,
    hidden_size=5, base_channels=2, object_channels=3, render_channels=4,
)  # fmt: skip
SHAPE = (3, 16, 16)
# One object, one place; with schedules of a few steps.
QUICK = dict(unselected=True, unselected_steps=40, exclusion=8.0, exclusion_steps=(10, 20, 30, 60))


def small(**overrides) -> mvae.Config:
    """Networks for exact comparisons in milliseconds."""
    return mvae.Config(**SMALL | overrides)


@double_precision()
def make_model(config: mvae.Config, shape=SHAPE, module: ModuleType = mvae) -> nn.Module:
    torch.manual_seed(0)
    return off_zero(module.MVAE(config, *shape).double(), 0.3)


def make_inputs(config: mvae.Config, shape=SHAPE, batch: int = 2) -> tuple[Tensor, Tensor]:
    """image (B, C, H, W) with pixels of 0 and 1, and noise (B, N, D)."""
    g = torch.Generator().manual_seed(1)
    image = torch.rand(batch, *shape, generator=g, dtype=torch.float64) * 1.5 - 0.25
    size = batch, config.num_slots, config.latent_size
    return image.clamp(0, 1), torch.randn(size, generator=g, dtype=torch.float64)


def bind(model: nn.Module) -> tuple[Eager, dict[str, Tensor]]:
    """The eager model with a copy of the weights, and the copies under mvae.py's names."""
    copies = copies_of(model)
    weights: dict[str, list] = {}
    for name, weight in copies.items():
        if name.endswith("weight"):
            bias = copies[name.removesuffix("weight") + "bias"]
            weights.setdefault(name.split(".")[0], []).append((weight, bias))
    return Eager(model.config, weights), copies


@double_precision()
def check_eager(module: ModuleType = mvae, shape=SHAPE, step=0, slots=None, **overrides) -> None:
    """AssertionError, which names the first quantity in which the two models differ."""
    config = small(**overrides)
    model = make_model(config, shape, module)
    model.set_step(step)
    image, noise = make_inputs(config, shape)
    noise = noise[:, :slots]
    eager, copies = bind(model)
    expected = [eager.run(*inputs, step) for inputs in zip(image, noise, strict=True)]
    own = {name: torch.stack([vars(run)[name] for run in expected]) for name in vars(expected[0])}
    kl_map = module.gaussian_kl(*model.posterior_map(image))
    assert_close("KL map", kl_map, own["kl_map"])
    if config.model == "mvae":
        assert_close("KL map, drawn", model.kl_map(image).flatten(1), own["kl_map"])
    loc, log_scale, kls = model.encode(image, slots)
    logits = model.decode(loc + log_scale.exp() * noise)
    elbo, nll, kl, all_kl = model.elbo(image, noise)
    assert_close("KL of all places", all_kl, own["kl_map"])
    for name, value in dict(loc=loc, log_scale=log_scale, kls=kls, logits=logits, nll=nll, kl=kl,
                            elbo=elbo).items():  # fmt: skip
        assert_close(name, value, own[name])
    parts = model.loss(image, noise)
    loss = own["loss"].mean()
    assert_close("loss", parts["loss"], loss)
    for name in ("elbo", "nll", "kl"):
        assert_close(name, parts[name], own[name].mean())
    assert_gradients(parts["loss"], model, loss, copies, lambda name: False)


CASES: dict[str, dict] = {
    "eager": {}, "sum": dict(aggregation="sum"),
    "one object": dict(num_slots=1), "every place": dict(num_slots=16),
    "one pooling": dict(encoder_channels=(3, 4, 2), poolings=1, num_slots=5),
    "grey images": dict(shape=(1, 32, 32), latent_size=3),
    "quick": dict(QUICK, step=15),
    **{f"quick, step {step}": dict(QUICK, step=step) for step in (0, 10, 20, 25, 30, 60)},
    "quick, one object": dict(QUICK, step=5, slots=1),
    "exclusion alone": dict(QUICK, step=25, unselected=False),
    "quick vae": dict(QUICK, model="vae", step=25),
    "vae": dict(model="vae"), "larger vae": dict(model="vae", num_slots=4, latent_size=3),
}  # fmt: skip


# -- the paper's sizes, selection, aggregation -----------------------------------------------------


def shapes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in network.named_parameters() if name.endswith("weight")]


def test_the_networks_have_the_sizes_of_appendix_a():
    model, vae = (mvae.build(mvae.make_config("sprites3", model=name), data.make("sprites_3"))
                  for name in ("mvae", "vae"))  # fmt: skip
    encoder, g, h = map(shapes, (model.encoder, model.g, model.h))
    assert [len(shape) for shape in encoder] == [4] * 6  # convolutions
    assert encoder[-1][0] == 24 and encoder[4][1] == encoder[3][0] + 2  # the coordinates
    assert [len(shape) for shape in g] == [2, 2, 4, 4] and [len(shape) for shape in h] == [4] * 3
    assert g[0][1] == 12 and g[1][0] == 8 * 8 * 16 and g[2][1] == 16 and h[-1][0] == 3
    assert shapes(vae.encoder) == encoder and shapes(vae.h) == h
    assert shapes(vae.g) == [(g[0][0], 60), *g[1:]] and shapes(vae.to_code) == [(120, 64 * 24)]


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
    """Against the least cross-entropy of each colour over a grid of logits."""
    colours = torch.tensor([0.0, 1e-6, 0.01, 0.2, 0.5, 0.77, 0.999, 1.0])
    logits = torch.linspace(-40, 40, 400_001).expand(8, -1)
    target = colours[:, None].expand_as(logits)
    least = F.binary_cross_entropy_with_logits(logits, target, reduction="none").amin(1)
    assert_close("floor", module.nll_floor(colours.view(2, 1, 2, 2)), least.view(2, 4).sum(1), 1e-7)


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


@double_precision()
def check_schedule(module: ModuleType = mvae) -> None:
    """Of quick by hand; the paper's values leave the negative ELBO at every step."""
    quick = {name: getattr(mvae.make_config("quick"), name) for name in QUICK}
    model = module.MVAE(small(**quick), *SHAPE)
    for step, unselected, exclusion in (
        (0, 0.05, 0), (400, 0.43, 0), (650, 0.6675, 3.5), (900, 0.905, 7), (1000, 1, 7),
        (2500, 1, 7), (4250, 1, 3.5), (6000, 1, 0), (10**6, 1, 0),
    ):  # fmt: skip
        model.set_step(step)
        assert_close("weight of unselected places", model.unselected, unselected)
        assert_close("weight of neighbours", model.exclusion, exclusion)
    for step, name in itertools.product((0, 1, 2, 10**6), ("mvae", "vae")):
        paper = module.MVAE(small(model=name), *SHAPE)
        paper.set_step(step)
        parts = paper.loss(*make_inputs(paper.config))
        assert_close("the paper's loss", parts["loss"], -parts["elbo"], 1e-14)


# -- counting ------------------------------------------------------------------------------------


def check_threshold(module: ModuleType = mvae) -> None:
    """All lists of up to three scenes of two places, with ties, zeros and counts above them."""
    rows = [(a, b) for a in (0.0, 1.0, 2.0) for b in (0.0, 1.0, 2.0) if a >= b]
    scenes = list(itertools.product(rows, range(4)))
    for chosen in itertools.chain(*(itertools.combinations(scenes, m) for m in (1, 2, 3))):
        kl, counts = (list(values) for values in zip(*chosen, strict=True))
        right = lambda t: sum(sum(v > t for v in row) == c for row, c in chosen)  # noqa: B023, E731
        most = max(map(right, (0.5, 1.5, 2.5)))
        maps = torch.tensor(kl).flip(1)[..., None]  # (M, 2, 1), smallest first
        t = module.best_threshold(maps, torch.tensor(counts))
        found = right(t)
        assert found == most, f"threshold {t} is off: {found} of {chosen}, not {most}"


AROUND = (1, 0), (-1, 0), (0, 1), (0, -1)


def count_by_hand(reading: str, kl: Tensor, t: float) -> int:
    """Of one map (h, w), place by place; regions by a flood fill."""
    kl = {(r, c): kl[r, c].item() for r in range(kl.shape[0]) for c in range(kl.shape[1])}
    left = {place for place, value in kl.items() if value > t}
    if reading == "places":
        return len(left)
    near = {(r, c): [(r + i, c + j) for i, j in AROUND if (r + i, c + j) in kl] for r, c in kl}
    if reading == "peaks":
        return sum(all(kl[place] >= kl[other] for other in near[place]) for place in left)
    number = 0
    while left:
        number, queue = number + 1, [left.pop()]
        while queue:
            queue += (found := left.intersection(near[queue.pop()]))
            left -= found
    return number


def check_readings(module: ModuleType = mvae) -> None:
    """Peaks and regions of random maps, among them full and empty ones, one below the other."""
    g = torch.Generator().manual_seed(0)
    for h, w in ((1, 1), (1, 6), (5, 1), (4, 5), (8, 8)):
        kl = torch.rand(120, h, w, generator=g) + torch.linspace(-1, 1, 120)[:, None, None]
        kl = kl.roll(17, 0).clamp(min=0)
        found = dict(peaks=(module.peaks(kl) > 0.5).flatten(1).sum(1),
                     regions=module.count_regions(kl > 0.5))  # fmt: skip
        for name, counted in found.items():
            expected = [count_by_hand(name, scene, 0.5) for scene in kl]
            assert counted.tolist() == expected, f"{name} of {h} x {w} places are off"


def check_counting(module: ModuleType = mvae) -> None:
    """Thresholds that count all scenes seen; confusion and accuracy by hand, on other scenes."""
    seen = torch.tensor([(5, 2.5, 1, 0, 0.2), (5, 2.5, 4, 0, 0.1), (6, 3, 0.3, 0, 0.2),
                         (0.4, 0.2, 0.2, 0, 0.1)])[:, None]  # fmt: skip
    seen_counts, counts = torch.tensor([1, 2, 1, 0]), torch.tensor([2, 2, 3, 0, 1, 2, 3])
    kl = torch.tensor([(5, 0, 4, 0, 0.5), (5, 1, 0.5, 0, 0.1), (9, 6, 8, 0, 7),
                       (0.5, 0.1, 0.4, 0, 0), (3.5, 3.2, 0.1, 0, 0), (5, 4, 5, 4, 5),
                       (9, 0, 9, 0, 9)])[:, None]  # fmt: skip
    found = module.count_objects(seen, seen_counts, kl, counts)
    for name, result in found.items():
        t = result["threshold"]
        known = [count_by_hand(name, scene, t) for scene in seen]
        assert known == seen_counts.tolist(), f"threshold of {name} is off: {t}"
        counted = [count_by_hand(name, scene, t) for scene in kl]
        pairs = list(zip(counts.tolist(), counted, strict=True))
        most = range(max(map(max, pairs)) + 1)
        confusion = [[pairs.count((true, own)) for own in most] for true in most]
        assert result["confusion"] == confusion, f"confusion of {name} is off"
        accuracy = sum(true == own for true, own in pairs) / len(pairs)
        assert_close("accuracy", result["count_accuracy"]["mean"], accuracy)
    assert list(found) == ["places", "peaks", "regions"]


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

    def posterior_map(self, image: Tensor) -> tuple[Tensor, Tensor]:
        coverage, color = self.last.coverage[:, 1:], self.last.factors["color"][:, 1:]
        order = coverage.sum((2, 3)).argsort(1, descending=True)  # (B, N)
        pictures = torch.einsum("bnc,bnhw->bnchw", color, coverage).flatten(2)
        loc = pictures.gather(1, order[..., None].expand_as(pictures))
        return loc, torch.full_like(loc, -9)

    def select(self, loc: Tensor, log_scale: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        lit = loc.unflatten(2, (3, -1)).amax(2) > 0  # (B, N, H W)
        return loc, log_scale, lit.sum(2).float()

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
    """Of a renderer: no error, no leak, all objects counted; neighbours once, but as places."""
    for fills in (1, 2):
        model = Renderer(fills)
        result = model.evaluate(module)
        means = {name: value["mean"] for name, value in result["metrics"].items()}
        assert_close("mse", means["mse"], 0.0, 0.0)
        assert means["leak"] < 1e-3, "leak of a renderer is off"
        assert_close("nll", means["nll"], means["nll_floor"], 1e-3)
        counts = model.splits["test"].batch(0, 256).present[:, 1:].sum(1).bincount(minlength=4)
        assert_close("chance", means["count_chance"], counts.max().item() / 256)
        for reading, right in {"": fills == 1, "_peaks": True, "_regions": True}.items():
            accuracy = means[f"count_accuracy{reading}"]
            assert (accuracy == 1) == right, f"count{reading} is off: {accuracy}"
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
        {name for name in whole if name.startswith("count_")} if "present" in none else set())


def check_leak(module: ModuleType = mvae) -> None:
    """By hand: of two sprites on the left and one on the right, with borders; an empty scene."""
    coverage = torch.zeros(4, 3, 6, 6)
    coverage[0, 1, 1, 1] = coverage[0, 2, 1, 3:5] = coverage[1, 1, 4, 4] = coverage[3, 1] = 1
    before, after = torch.zeros(4, 1, 6, 6), torch.ones(4, 1, 6, 6)
    outside = before.clone()
    outside[..., 5, 0] = -1
    nan = math.nan  # 12 of 36 pixels belong to the larger one, 9 to the other scene's
    for changed, expected in ((after, [15 / 36, 15 / 36, nan, nan]), (outside, [1, 1, nan, nan])):
        leak = module.exchange_leak(before, changed, coverage)
        assert torch.allclose(leak, torch.tensor(expected), equal_nan=True), f"leak {leak} is off"


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


# -- options and training --------------------------------------------------------------------------

TINY = dict(
    dataset=DATASET, num_slots=3, latent_size=3, encoder_channels=(4, 4, 4), poolings=3,
    head_channels=4, hidden_size=8, base_channels=2, object_channels=4, render_channels=4,
    batch_size=4, steps=2, log_every=1, lr_horizon=5, device="cpu",
)  # fmt: skip


def tiny(**changes) -> mvae.Config:
    return mvae.make_config("quick", **TINY | changes)


@pytest.mark.parametrize(("answer", "changes"), [
    ("tetrominoes: 35 x 35 pixels", dict(dataset="tetrominoes", single_steps=0)),
    ("--poolings 4: too many", dict(poolings=4)),
    ("--poolings 6: too many", dict(poolings=6, model="vae", encoder_channels=(4,) * 6)),
    ("--num-slots: at most 16", dict(num_slots=17)),
    ("no scenes of just one object", dict(dataset="mini_sprites_16_shaded", poolings=2)),
    ("--exclusion-steps must rise", dict(exclusion_steps=(1, 2, 2, 3))),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(answer, changes):
    with pytest.raises(runs.UserError, match=answer):
        mvae.check(tiny(**changes))


def check_learning_rate(module: ModuleType = mvae) -> None:
    paper = module.make_config("sprites3")
    steps = (0, 300_000, 1_500_000, 3_000_000, 9_000_000)
    rates = torch.tensor([module.learning_rate(paper, step) for step in steps])
    assert_close("learning rate", rates, torch.tensor([1e-3, 10**-3.2, 1e-4, 1e-5, 1e-5]), 1e-6)


@pytest.mark.parametrize("changes", [
    {}, dict(model="vae"), dict(aggregation="sum", num_slots=1), dict(precision="bfloat16"),
    dict(dataset="mini_sprites_16_shaded", poolings=2, single_steps=0),
], ids=str)  # fmt: skip
def test_a_run_trains_evaluates_and_draws(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(mvae, "evaluate", functools.partial(mvae.evaluate, count=20))
    config = tiny(out=str(tmp_path), **changes)
    result = mvae.train(config)
    pictures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert pictures == {"exchange", "reconstructions", "training"}
    means = {name: value["mean"] for name, value in result["metrics"].items()}
    assert all(map(math.isfinite, means.values())) and result["skipped"] == 0
    assert means["elbo"] == pytest.approx(-means["nll"] - means["kl"], rel=1e-5)
    assert ("count_accuracy" in means) == (config.model == "mvae")


def check_training(module: ModuleType = mvae) -> None:
    """`single_steps` of one sprite and one code, then all; every step has its weights."""
    scenes, alone = data.make(DATASET), data.make(DATASET, number=1)
    for name in ("mvae", "vae"):
        config, seen = tiny(model=name, single_steps=2, steps=4, out="run", **QUICK), []

        def update(loss, image, noise, lr, seen=seen):
            seen.append((image, noise, loss.__self__.unselected.item(), lr))

        run = SimpleNamespace(update=update, due=lambda step: False, finish=lambda *_, **__: {},
                              steps=lambda: ((s, torch.arange(4 * s, 4 * s + 4)) for s in range(4)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "start", lambda *_, run=run, **__: run)
            module.train(config)
        for step, (image, noise, weight, lr) in enumerate(seen):
            assert lr == mvae.learning_rate(config, step), "learning rate is off"
            shown = (alone if step < 2 else scenes).batch(4 * step, 4).image
            assert torch.equal(image, shown), f"scenes of step {step} are off"
            number = 1 if step < 2 and name == "mvae" else config.num_slots
            assert noise.shape == (4, number, 3), f"codes of step {step} are off"
            assert_close("weight of the step", weight, 0.05 + 0.95 * step / 40, 1e-6)


# -- mutants ---------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., None]] = {
    name: functools.partial(check_eager, **case) for name, case in CASES.items()
} | {
    "schedule": check_schedule, "training": check_training, "readings": check_readings,
    "floor": check_floor, "threshold": check_threshold, "counting": check_counting,
    "evaluation": check_evaluation, "exchange": check_exchange, "leak": check_leak,
    "rate": check_learning_rate,
}  # fmt: skip
MUTANTS = {  # name: (check, text of mvae.py, its mutation)
    "coordinates missing": ("eager", "repeat(grid, ", "repeat(0 * grid, "),
    "log-variance not halved": ("eager", "loc, log_variance / 2", "loc, log_variance"),
    "the VAE's latents sorted": ("vae", "if self.to_code is not None:  #", "if False:  #"),
    "the VAE's pairs interleaved": ("vae", '"b (two n d) ->', '"b (n two d) ->'),
    "chosen detached": ("eager", "return loc.gather(", "return loc.data.gather("),
    "max instead of sum": ("sum", "self.config.aggregation, b=len(z)", '"max", b=len(z)'),
    "sign of the KL": ("eager", "return -nll - kl, nll, kl", "return -nll + kl, nll, kl"),
    "KL of all places": ("eager", "1).sum(1), kl.sum(1)  #", "1).sum(1), all_kl.sum(1)  #"),
    "a largest place beside itself": ("quick", "beside = kl_map < F", "beside = kl_map <= F"),
    "four neighbours pay": ("quick", "F.max_pool2d(kl_map, 3, stride=1, padding=1)",
                            "kl_map.maximum(F.max_pool2d(kl_map, (3, 1), 1, (1, 0)))"),
    "one exclusion more": ("quick", "(c.exclusion - 1)", "c.exclusion"),
    "exclusion from the start": ("schedule", "(0, 1, 1, 0))", "(1, 1, 1, 0))"),
    "selected places pay twice": ("quick", "(all_kl.sum(1) - kl)", "all_kl.sum(1)"),
    "one single step more": ("training", "step < config.single", "step <= config.single"),
    "many sprites for one code": ("training", "single if early", "scenes if early"),
    "weights of the next step": ("training", "model.set_step(step)", "model.set_step(step + 1)"),
    "half of the floor": ("floor", " + torch.special.entr(1 - image)", ""),
    "t reaches the count": ("threshold", "high, low, right=True", "high, low, right=False"),
    "places not sorted": ("threshold", "flatten(1).sort(1, descending=True)[0]", "flatten(1)"),
    "one place at most": ("counting", "descending=True)[0]", "descending=True)[0][:, :1]"),
    "t of the test scenes": ("evaluation", '"validation", scenes', '"test", scenes'),
    "t of peaks for places": ("counting", "best_threshold(before", "best_threshold(peaks(seen)"),
    "confusion transposed": ("counting", "counts * most + counted", "counted * most + counts"),
    "chance of other scenes": ("evaluation", "maps), maps[-1]", "maps), maps[1]"),
    "eight neighbours": ("readings", "torch.maximum(column, row)", "F.max_pool2d(kl, 3, 1, 1)"),
    "regions of two scenes": ("readings", "F.pad(above, (0, 0, 0, 1))", "above"),
    "leak inside": ("leak", "leak = 1 - inside /", "leak = inside /"),
    "sprites of one scene": ("leak", "partner(sprites)[:, None]", "sprites[:, None]"),
    "exchanged with itself": ("exchange", "[partner(loc)[:, :1]", "[loc[:, :1]"),
    "linear decay": ("rate", "config.lr_final ** min", "1 - (1 - config.lr_final) * min"),
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
