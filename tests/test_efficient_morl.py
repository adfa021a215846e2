"""efficient_morl.py against an own EfficientMORL, written from the paper, and against brute force.

The own model takes one image and one slot at a time, with the same weights and noise in float64,
and must agree on every intermediate and on the gradient of every parameter. Then the properties of
attention, priors and refinement; GECO; what the experiments measure, on models whose answer is
known; training; and mutants of efficient_morl.py, which must be found out.

Axes: B batch, K slots, L layers, I refinement steps, D latent, P pixels, C H W image.
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
import pytest
import test_runs
import torch
import torch.distributions as D
import torch.nn.functional as F
from test_air import assert_close, double_precision, one_thread  # noqa: F401
from test_runs import assert_same_run, checkpoint, context, log, same  # noqa: F401
from test_runs import resumed as resumed_model
from torch import Tensor, nn

import data
import efficient_morl
import kernels
from data import figures, metrics, options, runs
from data.mini_sprites import MiniSprites


@pytest.fixture(autouse=True)
def torch_backend():
    with kernels.use("torch"):
        yield


# -- an own EfficientMORL, written from the paper --------------------------------------------------


def normal(lam: Tensor) -> D.Normal:
    """lambda (2D,): a mean and what softplus makes a variance of."""
    loc, raw = lam.chunk(2)
    return D.Normal(loc, (torch.log1p(raw.exp()) + 1e-5).sqrt())


def draw(lam: Tensor, noise: Tensor) -> Tensor:
    return normal(lam).loc + normal(lam).scale * noise


def kl_of_slots(lam: list[Tensor], priors: list[Tensor] | None) -> Tensor:
    """Of one layer; the prior N(0, 1) where there is none."""
    standard = D.Normal(torch.zeros(len(lam[0]) // 2), 1.0)
    priors = [standard] * len(lam) if priors is None else map(normal, priors)
    pairs = zip(map(normal, lam), priors, strict=True)
    return sum(D.kl_divergence(q, p).sum() for q, p in pairs)


def standardised(x: Tensor) -> Tensor:
    """LayerNorm of the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class Eager:
    """Both stages of inference, for one image; the weights have efficient_morl.py's names."""

    def __init__(self, config: efficient_morl.Config, weights: dict[str, Tensor], nll_weight=1.0):
        self.config, self.weights, self.nll_weight = config, weights, nll_weight

    def layer(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.layer(name)
        return x @ weight.T + (0 if bias is None else bias)

    def norm(self, name: str, x: Tensor) -> Tensor:
        gain, bias = self.layer(name)
        return gain * standardised(x) + bias

    def mlp(self, name: str, activation: Callable, x: Tensor) -> Tensor:
        return self.linear(f"{name}.2", activation(self.linear(f"{name}.0", x)))

    def gru(self, name: str, x: Tensor, state: Tensor) -> Tensor:
        w = {part: self.weights[f"{name}.{part}"]
             for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}  # fmt: skip
        reset, update, new = (w["weight_ih"] @ x + w["bias_ih"]).chunk(3)
        old_reset, old_update, old = (w["weight_hh"] @ state + w["bias_hh"]).chunk(3)
        keep = (update + old_update).sigmoid()
        return keep * state + (1 - keep) * (new + (reset + old_reset).sigmoid() * old).tanh()

    def embedding(self, name: str, height: int, width: int, gain: float = 1.0) -> Tensor:
        """(size, H, W): of [1 - x, x, y, 1 - y]."""
        places = []
        for row, col in itertools.product(range(height), range(width)):
            x, y = (i / max(n - 1, 1) for i, n in ((col, width), (row, height)))
            places.append([1 - x, x, y, 1 - y])
        return self.linear(name, gain * torch.tensor(places)).T.unflatten(1, (height, width))

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (P, D)."""
        x = 2 * image - 1
        for i in range(len(self.config.encoder_channels)):
            x = F.conv2d(x, *self.layer(f"encoder.convs.{i}"), padding="same").clamp(min=0)
        x = (x + self.embedding("encoder.embedding", *image.shape[1:])).flatten(1).T
        x = self.mlp("encoder.mlp.1", F.relu, self.norm("encoder.mlp.0", x))
        return self.linear("encoder.keys", x), self.linear("encoder.values", x)

    def attend(self, keys: Tensor, values: Tensor, z: list[Tensor], lam: list[Tensor]):
        """One stochastic layer: the slots' next lambda, and who gets how much of which pixel."""
        queries = [self.linear("layer.queries", self.norm("layer.norm", z_k)) for z_k in z]
        scores = [keys @ query / math.sqrt(len(query)) for query in queries]
        attention = torch.stack(scores).softmax(0)  # pixels choose among slots, (K, P)
        result = []
        for shares, old in zip(attention + 1e-8, lam, strict=True):
            theta = (shares / shares.sum()) @ values  # a mean over pixels
            if self.config.dual_gru:
                halves = zip(("loc", "raw"), old.chunk(2), strict=True)
                halves = [self.gru(f"layer.gru.{name}", theta, half) for name, half in halves]
            else:
                halves = self.gru("layer.gru", theta, old).chunk(2)
            named = zip(("loc", "raw"), halves, strict=True)
            result.append(torch.cat([
                half + self.mlp(f"layer.{name}.1", F.relu, self.norm(f"layer.{name}.0", half))
                for name, half in named
            ]))
        return result, attention

    def prior(self, z: Tensor) -> Tensor:
        hidden = F.elu(self.linear("prior.0", z))
        return torch.cat([self.linear(f"prior.2.{part}", hidden) for part in ("loc", "raw")])

    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """One slot, (C+1, H, W): its latent at every place, plus the embedding of the place."""
        number, gain = len(self.config.decoder_channels), self.config.coordinate_gain
        if self.config.decoder == "big":
            grid = math.ceil(height / 16), math.ceil(width / 16)
            x = z[:, None, None] + self.embedding("decoder.embedding", *grid, gain)
            for i, stride in enumerate((2, 2, 2, 2, 1)):
                size = stride * x.shape[1], stride * x.shape[2]
                x = F.conv_transpose2d(x, *self.layer(f"decoder.hidden.{2 * i}"), stride).relu()
                x = x[:, 2 : 2 + size[0], 2 : 2 + size[1]]
            x = F.conv_transpose2d(x, *self.layer("decoder.last"))[:, 1:, 1:]
        else:
            # Unpadded convolutions of 3 x 3 cut off 2 pixels, those of 5 x 5 padded by 1 as well.
            margin = dict(iodine=2 * number + 2, small=2 * number, pixel=0)[self.config.decoder]
            grid = height + margin, width + margin
            x = z[:, None, None] + self.embedding("decoder.embedding", *grid, gain)
            padding, activation = int(self.config.decoder == "small"), F.relu
            if self.config.decoder == "iodine":
                activation = F.elu
            for name in ("first", *(f"hidden.{i}" for i in range(number - 1))):
                x = activation(F.conv2d(x, *self.layer(f"decoder.{name}"), padding=padding))
            x = F.conv2d(x, *self.layer("decoder.last"), padding=padding)
        colours, logit = x[:-1, :height, :width], x[-1:, :height, :width]
        return torch.cat([1 / (1 + (-colours).exp()), logit])

    def nll(self, image: Tensor, decoded: Tensor) -> Tensor:
        """image (C, H, W), decoded (K, C+1, H, W)."""
        means, logits = decoded[:, :-1], decoded[:, -1]  # (K, C, H, W), (K, H, W)
        sigma = self.config.sigma
        if self.config.likelihood == "gaussian":
            mean = (logits.softmax(0)[:, None] * means).sum(0)
            return -D.Normal(mean, sigma).log_prob(image).sum()
        slots = D.Categorical(logits=logits.permute(1, 2, 0))
        if self.config.likelihood == "mixture":  # of colours
            components = D.Independent(D.Normal(means.permute(2, 3, 0, 1), sigma), 1)
            return -D.MixtureSameFamily(slots, components).log_prob(image.permute(1, 2, 0)).sum()
        densities = [D.Normal(mean.permute(1, 2, 0), sigma) for mean in means.unbind(1)]
        pairs = zip(densities, image, strict=True)
        return -sum(D.MixtureSameFamily(slots, d).log_prob(x).sum() for d, x in pairs)

    def hierarchy_kl(self, posteriors, samples, noise: Tensor) -> tuple[Tensor, list | None]:
        """KL of all layers, and the prior of the refined slots; lists by layer of lists by slot."""
        number = len(posteriors)
        if self.config.prior == "bottom_up":  # p(z^1) = N(0, 1), p(z^l | z^(l-1))
            priors = [None, *([self.prior(z) for z in layer] for layer in samples[:-1])]
        else:  # p(z^L) = N(0, 1), p(z^l | z^(l+1)) from a fresh z^(l+1)
            priors = [None] * number
            for below in reversed(range(number - 1)):
                slots = zip(posteriors[below + 1], noise[below], strict=True)
                priors[below] = [self.prior(draw(*slot)) for slot in slots]
        kl = sum(map(kl_of_slots, posteriors, priors))
        return kl, priors[0] if self.config.prior == "reversed++" else None

    def refine(self, lam: Tensor, gradient: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One slot's update of lambda, each half of whose gradient is normalised for itself."""
        x = torch.cat([lam, *map(standardised, gradient.chunk(2))])
        state = self.gru("refinement.gru", self.mlp("refinement.mlp", F.elu, x), state)
        heads = [self.linear(f"refinement.head.{part}", state) for part in ("loc", "raw")]
        return torch.cat(heads), state

    def run(self, image: Tensor, noise: Tensor) -> SimpleNamespace:
        """image (C, H, W), noise (2L + I, K, D): fresh ones for the priors, z^0, layers, steps."""
        number = self.config.num_layers
        fresh, first, *drawn = noise.split([number - 1] + [1] * (len(noise) - number + 1))
        drawn = [epsilon[0] for epsilon in drawn]
        keys, values = self.encode(image)
        lam = [self.weights["initial"]] * noise.shape[1]
        z = list(map(draw, lam, first[0]))
        posteriors, samples, attention = [], [], []
        for epsilon in drawn[:number]:
            lam, shares = self.attend(keys, values, z, lam)
            z = list(map(draw, lam, epsilon))
            posteriors.append(lam)
            samples.append(z)
            attention.append(shares.unflatten(1, image.shape[1:]))

        kl, prior = self.hierarchy_kl(posteriors, samples, fresh)
        states, steps = [torch.zeros_like(z_k) for z_k in z], []
        for i, epsilon in enumerate(drawn[number - 1 :]):
            if i:
                kl = kl_of_slots(lam, prior)
            z = map(draw, lam, epsilon)
            decoded = torch.stack([self.decode(z_k, *image.shape[1:]) for z_k in z])
            nll = self.nll(image, decoded)
            loss = self.nll_weight * nll + self.config.kl_weight * kl
            gradient = torch.autograd.grad(loss, lam, retain_graph=True)  # seen as a constant
            steps.append(SimpleNamespace(
                posterior=torch.stack(lam), decoded=decoded, nll=nll, kl=kl, loss=loss,
                gradient=torch.stack(gradient),
            ))
            updates, states = zip(*map(self.refine, lam, gradient, states), strict=True)
            lam = [a + b for a, b in zip(lam, updates, strict=True)]
        return SimpleNamespace(
            posteriors=[torch.stack(slots) for slots in posteriors], steps=steps,
            samples=[torch.stack(slots) for slots in samples], attention=torch.stack(attention),
        )  # fmt: skip

    def loss(self, steps: list[SimpleNamespace]) -> Tensor:
        """Eq. 8: all of the first, then (I - i + 1) / (I + 1) of step i; or the released code's."""
        number, total = len(steps) - 1, 0.0
        for i, step in enumerate(steps):
            weight = (number - i + 1) / (number + 1) if i else 1.0
            if self.config.loss_weights == "released":
                weight = (number - i + 3) / (number + 1)
            total = total + weight * step.loss
        return total


# -- both models, side by side ---------------------------------------------------------------------

SMALL = dict(
    num_slots=3, latent_size=3, prior_size=4, decoder="pixel", decoder_channels=(4, 3),
    encoder_channels=(3, 4), encoder_kernel=3, refinement_size=5, num_steps=2, kl_weight=0.7,
    init_gain=1.0,
)  # fmt: skip
SHAPE = (3, 6, 5)


def small(**overrides) -> efficient_morl.Config:
    """Networks for exact comparisons in milliseconds."""
    return efficient_morl.Config(**SMALL | overrides)


@double_precision()
def make_model(config, shape=SHAPE, module: ModuleType = efficient_morl) -> nn.Module:
    """In float64, with biases and gains moved off the 0 and 1 that would hide mistakes."""
    torch.manual_seed(0)
    model = module.EfficientMORL(config, *shape).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_inputs(config, shape=SHAPE, batch: int = 2, steps: int | None = None):
    """image (B, C, H, W) and noise (B, 2L + I, K, D)."""
    g = torch.Generator().manual_seed(1)
    steps = config.num_steps if steps is None else steps
    size = batch, 2 * config.num_layers + steps, config.num_slots, config.latent_size
    image = torch.rand(batch, *shape, generator=g, dtype=torch.float64)
    return image, torch.randn(size, generator=g, dtype=torch.float64)


def bind(model: nn.Module, nll_weight: float = 1.0) -> tuple[Eager, dict[str, Tensor]]:
    """The eager model with a copy of the weights, and the copies."""
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return Eager(model.config, copies, nll_weight), copies


@contextlib.contextmanager
def recorded(network: nn.Module) -> Iterator[list[tuple]]:
    """Yields a list that gets the arguments of each call of the network."""
    calls: list[tuple] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    yield calls
    hook.remove()


def without_gradient(config) -> tuple[str, ...]:
    """What the loss does not depend on: a shift of all queries, which the softmax over slots
    removes; the refinement network where it is not used, the states of its GRU where only the
    first, zero, is; the prior of a single layer."""
    parts = {"layer.norm.bias": True, "refinement.": config.num_steps == 0,
             "refinement.gru.weight_hh": config.num_steps == 1, "prior.": config.num_layers == 1}
    return tuple(name for name, unused in parts.items() if unused)


@double_precision()
def check_eager(module: ModuleType = efficient_morl, shape=SHAPE, nll_weight=1.5, **overrides):
    """AssertionError, which names the first quantity in which the two models differ."""
    config = small(**overrides)
    model = make_model(config, shape, module)
    model.geco.multiplier.fill_(nll_weight)
    image, noise = make_inputs(config, shape)
    eager, copies = bind(model, nll_weight)
    expected = [eager.run(*inputs) for inputs in zip(image, noise, strict=True)]

    hierarchy = model.encode(image, noise)
    for i in range(config.num_layers):
        for name in ("posteriors", "samples"):
            want = torch.stack([getattr(run, name)[i] for run in expected])
            assert_close(f"{name}, layer {i + 1}", getattr(hierarchy, name)[i], want)
    assert_close("attention", hierarchy.attention, torch.stack([r.attention for r in expected]))

    with recorded(model.refinement) as calls:
        steps = list(model.infer(image, noise))
    found = len(steps), len(calls)
    assert found == (config.num_steps + 1, config.num_steps), f"numbers are off: {found}"
    for i, (step, *want) in enumerate(zip(steps, *(run.steps for run in expected), strict=True)):
        for name in ("posterior", "decoded", "nll", "kl"):
            own = torch.stack([getattr(one, name) for one in want])
            assert_close(f"{name}, step {i}", getattr(step, name), own)
        if i < len(calls):
            own = torch.stack([one.gradient for one in want])
            assert_close(f"gradient of lambda, step {i}", calls[i][1], own)

    parts = model.loss(image, noise)
    loss = torch.stack([eager.loss(run.steps) for run in expected]).mean()
    assert_close("loss", parts["loss"], loss)
    nll, kl = (torch.stack([getattr(run.steps[-1], name) for run in expected]).mean()
               for name in ("nll", "kl"))  # fmt: skip
    for name, value in dict(nll=nll, kl=kl, elbo=-nll - kl).items():
        assert_close(name, parts[name], value)
    actual = torch.autograd.grad(parts["loss"], list(model.parameters()), materialize_grads=True)
    wanted = torch.autograd.grad(loss, list(copies.values()), materialize_grads=True)
    largest = max(g.abs().max() for g in wanted)
    for name, a, w in zip(copies, actual, wanted, strict=True):
        unused = name.startswith(without_gradient(config))
        assert (w.abs().max() < 1e-9 * largest) == unused, f"{name}: nothing to compare"
        assert_close(f"gradient of {name}", a, 0 * w if unused else w)


CASES: dict[str, dict] = {
    f"{prior}, I = {steps}": dict(prior=prior, num_steps=steps)
    for prior in ("reversed++", "reversed", "bottom_up") for steps in range(4)
} | {
    "iodine's decoder": dict(decoder="iodine", decoder_channels=(3, 4, 2), num_steps=1),
    "small decoder": dict(decoder="small", num_steps=1),
    "big decoder, cropped": dict(decoder="big", num_steps=1, shape=(3, 18, 4)),
    "one layer of a decoder": dict(decoder_channels=(3,), coordinate_gain=4.0),
    "mixture": dict(likelihood="mixture"),
    "released": dict(likelihood="channel_mixture", loss_weights="released", num_steps=3),
    "mixture of grey images": dict(likelihood="mixture", shape=(1, 4, 7)),
    "channel mixture of grey images": dict(likelihood="channel_mixture", shape=(1, 4, 7)),
    "one GRU": dict(dual_gru=False, num_steps=3),
    "one layer": dict(num_layers=1),
    "four layers": dict(num_layers=4, num_steps=1, encoder_kernel=5),
    "six slots": dict(num_slots=6),
    "KL of weight 1": dict(kl_weight=1.0, nll_weight=1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_eager_model(case):
    check_eager(**CASES[case])


# -- sizes and initial values ----------------------------------------------------------------------

CLEVR6 = efficient_morl.Config(**efficient_morl.CLEVR6)


@pytest.mark.parametrize(
    ("config", "size", "parameters"),
    [(CLEVR6, 96, 666_500), (efficient_morl.make_config("tetrominoes"), 35, 467_236)],
    ids=["clevr6", "tetrominoes"],
)
def test_the_models_have_the_papers_number_of_parameters(config, size, parameters):
    model = efficient_morl.EfficientMORL(config, 3, size, size)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_first_values_are_those_of_the_released_code():
    """Xavier's with gain 0.02, biases 0, but N(0, 1) for all of the DualGRU, and PyTorch's for the
    encoder's embedding and the refinement's GRU: uniform to 1 / sqrt(fan in)."""
    torch.manual_seed(0)
    config = efficient_morl.make_config("tetrominoes")
    model = efficient_morl.EfficientMORL(config, 3, 35, 35)
    for name, p in model.named_parameters():
        if name.startswith("layer.gru"):
            assert p.std().item() == pytest.approx(1, rel=0.2) and p.mean().abs() < 0.3, name
        elif name.startswith(("encoder.embedding", "refinement.gru")):
            bound = 4**-0.5 if name.startswith("encoder") else 32**-0.5
            assert 0.9 * bound < p.abs().max() <= bound, name
        elif name == "initial":
            assert p.tolist() == 32 * [0] + 32 * [1]
        elif p.ndim == 1:
            norm = name in ("layer.norm.weight", "encoder.mlp.0.weight", "layer.loc.0.weight",
                            "layer.raw.0.weight")  # fmt: skip
            assert (p == norm).all(), name
        else:
            fans = p[0].numel() + p.shape[0] * p[0, 0].numel()
            gain = 0.02
            assert p.std().item() == pytest.approx(gain * math.sqrt(2 / fans), rel=0.15), name


# -- attention, priors, refinement -----------------------------------------------------------------


def test_attention_is_normalised_over_slots_and_then_over_pixels():
    model = make_model(small())
    g = torch.Generator().manual_seed(2)
    keys, values, z, lam = (
        torch.randn(2, *shape, generator=g, dtype=torch.float64)
        for shape in ((30, 3), (30, 3), (3, 3), (3, 6))
    )
    _, attention = model.layer(keys, values, z, lam)
    assert_close("sum over slots", attention.sum(1), torch.ones(2, 30).double(), 1e-12)
    assert (attention.sum(2) - 1).abs().min() > 0.1
    # What a slot receives is a mean of values: of equal ones it is that one, however few it has.
    with recorded(model.layer.gru) as calls:
        model.layer(9 * keys, values[:, :1].expand_as(values), z, lam)
        model.layer(0 * keys, values, z, lam)
    same_value, same_share = (theta.unflatten(0, (2, 3)) for theta, _ in calls)
    assert_close("mean of equal values", same_value, values[:, :1].expand(-1, 3, -1), 1e-12)
    mean = values.mean(1, keepdim=True)
    assert_close("mean of all values", same_share, mean.expand(-1, 3, -1), 1e-12)


def test_means_and_raw_scales_of_the_gradient_are_normalised_apart():
    """Each half's own shift and factor make no difference, up to the epsilon of LayerNorm."""
    network = make_model(small()).refinement
    lam, gradient = 1000 * torch.randn(2, 2, 3, 6, generator=torch.Generator().manual_seed(3))
    lam, gradient = lam.double() / 1000, gradient.double()
    update, _ = network(lam, gradient, None)
    shift = torch.tensor([500.0, -200]).repeat_interleave(3)
    factor = torch.tensor([1.0, 7.0]).repeat_interleave(3)
    assert_close("update", network(lam, factor * gradient + shift, None)[0], update, 1e-6)
    assert (network(lam, -gradient, None)[0] - update).abs().max() > 0.01


@pytest.mark.parametrize("prior", ["reversed++", "reversed", "bottom_up"])
def test_kl_and_its_way_to_the_prior_network(prior):
    """For posteriors far from those of any image. Once refined, only prior++ trains the network:
    the gradient that makes the updates depends on it too, but is a constant."""
    model = make_model(small(prior=prior))
    g = torch.Generator().manual_seed(4)
    lam, z, noise = (torch.randn(2, *shape, generator=g, dtype=torch.float64)
                     for shape in ((3, 3, 6), (3, 3, 3), (2, 3, 3)))  # fmt: skip
    kl, refined = model.hierarchy_kl(list((3 * lam).unbind(1)), list(z.unbind(1)), noise)
    with double_precision():
        eager, _ = bind(model)
        own = [eager.hierarchy_kl(*inputs) for inputs in zip(3 * lam, z, noise, strict=True)]
    assert_close("KL", kl, torch.stack([k for k, _ in own]))
    assert (refined is None) == (prior != "reversed++")
    if refined is not None:
        assert_close("prior", refined, torch.stack([torch.stack(p) for _, p in own]))
    *_, last = model.infer(*make_inputs(model.config))
    parameters = list(model.prior.parameters())
    for gradient in torch.autograd.grad(last.kl.sum(), parameters, materialize_grads=True):
        assert (gradient != 0).any() == (prior == "reversed++")


@pytest.mark.parametrize("prior", ["reversed++", "bottom_up"])
def test_permuting_the_slots_of_the_noise_permutes_the_outputs(prior):
    """Slots start equal and share all weights: only their noise tells them apart."""
    model = make_model(small(prior=prior, num_slots=4, likelihood="mixture"))
    image, noise = make_inputs(model.config)
    order = torch.tensor([2, 0, 3, 1])
    attention, permuted = (
        model.encode(image, n).attention for n in (noise, noise[:, :, order])
    )
    assert_close("attention", permuted, attention[:, :, order])
    for a, b in zip(model.infer(image, noise), model.infer(image, noise[:, :, order]), strict=True):
        for name in ("decoded", "posterior"):
            assert_close(name, getattr(b, name), getattr(a, name)[:, order])
        assert_close("nll", b.nll, a.nll)
        assert_close("kl", b.kl, a.kl)
    assert (a.decoded[:, 0] - a.decoded[:, 1]).abs().max() > 1e-3  # the order could have mattered


@pytest.mark.parametrize("grad", [True, False])
def test_an_image_has_the_same_result_in_a_batch_of_any_size(grad):
    """Nothing normalises over the batch, and the gradient that is fed back has no 1 / B."""
    model = make_model(small())
    image, noise = make_inputs(model.config, batch=5)
    with torch.set_grad_enabled(grad):
        whole = list(model.infer(image, noise))
        for part in ([0], [1, 2], [2, 3, 4]):
            for a, b in zip(whole, model.infer(image[part], noise[part]), strict=True):
                for name in a._fields:
                    assert_close(name, getattr(b, name), getattr(a, name)[part])


@pytest.mark.parametrize("prior", ["reversed++", "reversed"])
def test_inference_without_grad_gives_the_same_values_and_keeps_no_graph(prior):
    """With more steps than in training; each starts from a lambda without a history."""
    model = make_model(small(prior=prior))
    inputs = make_inputs(model.config, steps=5)
    with_grad = list(model.infer(*inputs))
    with torch.no_grad(), recorded(model.refinement) as calls:
        without = list(model.infer(*inputs))
    assert len(without) == 6 and with_grad[-1].nll.requires_grad
    for a, b in zip(with_grad, without, strict=True):
        for name in a._fields:
            assert_close(name, getattr(b, name), getattr(a, name))
            assert not getattr(b, name).requires_grad
    assert all(lam.is_leaf for lam, *_ in calls)
    assert not any(state.requires_grad for *_, state in calls[1:])


def test_noise_is_a_function_of_the_scene():
    scenes = data.make("mini_sprites")
    model, other = (efficient_morl.build(tiny(seed=seed), scenes) for seed in (0, 1))
    index = torch.tensor([5, 2**40, 7])
    noise = model.noise(scenes, index, 2)
    assert noise.shape == (3, 2 * 3 + 2, 3, 3) and len(set(noise.flatten().tolist())) == 216
    assert torch.equal(noise[2:], model.noise(scenes, index[2:], 2))
    assert not torch.equal(noise, other.noise(scenes, index, 2))


def test_under_autocast_the_bound_is_that_of_float32():
    """bfloat16 has 8 bits: colours and posteriors rounded to it would cost nats."""
    scenes = data.make("mini_sprites")
    for decoder in ("small", "big"):
        model = efficient_morl.build(tiny(decoder=decoder, init_gain=0.5), scenes)
        inputs = scenes.batch(0, 2).image, model.noise(scenes, torch.arange(2), 1)
        exact = model.loss(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.loss(*inputs)
        for name in ("loss", "nll", "kl"):
            assert rounded[name].dtype == torch.float32
            assert abs(rounded[name] - exact[name]) < 0.02 * exact[name].abs(), name
        colours = rounded["decoded"]
        assert (colours != colours.bfloat16()).float().mean() > 0.9  # not merely cast at the end


# -- GECO ------------------------------------------------------------------------------------------

SCENES = SimpleNamespace(num_channels=3, height=6, width=5)


@double_precision()
def check_geco(module: ModuleType = efficient_morl) -> None:
    """The multiplier step by step: it rises while the constraint is violated, and then rests."""
    config = small(geco=True, geco_target=-0.2, geco_start=3, geco_rate=0.01)
    geco, values, target = module.GECO(config, 100), [], -20.0
    average, zeta = None, 0.55
    for step, nll in enumerate([-10.0] * 30 + [-60.0] * 170, 1):
        geco.update(torch.tensor(nll), step)
        values.append(geco.multiplier.item())
        if step <= 3:
            assert values[-1] == 1, "multiplier is off: it moved before the start"
            continue
        now = target - nll
        average = now if average is None else 0.99 * average + 0.01 * now
        zeta = max(0.55, zeta - 0.01 * average)
        assert_close(f"multiplier, step {step}", values[-1], math.log1p(math.exp(zeta)), 1e-12)
    assert all(a < b for a, b in itertools.pairwise(values[3:30])), "multiplier is off: no rise"
    assert set(values[-10:]) == {F.softplus(torch.tensor(0.55)).item()}, "floor is off"

    without = module.GECO(small(geco=False, geco_start=0), 100)
    without.update(torch.tensor(1e6), 9)
    assert without.multiplier == 1, "multiplier is off: there is no GECO"


def test_gecos_multiplier():
    check_geco()


@double_precision()
def check_geco_gradient(module: ModuleType = efficient_morl) -> None:
    """Of Rezende & Viola's Lagrangian, KL - softplus(zeta) (target - NLL), with the constraint's
    value replaced by its average: grad KL + softplus(zeta) grad NLL."""
    config = small(geco=True, geco_start=0, geco_rate=0.01, geco_target=-0.2, kl_weight=1.0)
    model = make_model(config, module=module)
    for step in (1, 2, 3):
        model.geco.update(torch.tensor(40.0 * step), step)
    zeta, average, target = model.geco.zeta, model.geco.constraint, -0.2 * 90
    assert zeta > 1, "zeta is off"
    inputs, lagrangian, plain = make_inputs(config), 0.0, []
    for weight, step in zip((1, 2 / 3, 1 / 3), model.infer(*inputs), strict=True):
        constraint = target - step.nll.mean()
        smoothed = constraint + (average - constraint).detach()
        lagrangian = lagrangian + weight * (step.kl.mean() - F.softplus(zeta) * smoothed)
        plain.append(weight * torch.stack([step.nll.mean(), step.kl.mean()]))
    loss = model.loss(*inputs)["loss"]
    nll, kl = sum(plain)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(value, parameters, retain_graph=True)
                 for value in (loss, lagrangian, nll, kl)]  # fmt: skip
    for name, actual, own, of_nll, of_kl in zip(
        dict(model.named_parameters()), *gradients, strict=True
    ):
        assert_close(f"gradient of {name}", actual, own)
        assert_close(f"gradient of {name}", actual, of_kl + F.softplus(zeta) * of_nll)


def test_the_gradient_under_geco_is_that_of_its_lagrangian():
    check_geco_gradient()


@double_precision()
def check_bounds(module: ModuleType = efficient_morl) -> None:
    """No decode has less NLL than that of a perfect reconstruction, which has the least."""
    for likelihood in ("gaussian", "mixture", "channel_mixture"):
        config = small(likelihood=likelihood, geco_target=-0.2)
        model = make_model(config, module=module)
        image, _ = make_inputs(config)
        logits = torch.randn(2, 3, 1, 6, 5, generator=torch.Generator().manual_seed(0)).double()
        perfect = torch.cat([image[:, None].expand(-1, 3, -1, -1, -1), logits], 2)
        target, lowest = module.nll_bounds(config, SCENES)
        assert_close("target", target, -0.2 * 90)
        assert_close("lowest NLL", model.nll(image, perfect), torch.full((2,), lowest))
        for scale in (-0.1, 0.01, 1.0):
            other = perfect.clone()
            other[:, :, :3] += scale * torch.rand_like(other[:, :, :3])
            assert (model.nll(image, other) > lowest).all(), "lowest NLL is off: there is less"


def test_the_lowest_nll():
    check_bounds()


@pytest.mark.parametrize("preset", ["quick", "tetrominoes"])
def test_targets_allow_the_error_that_the_papers_for_clevr6_does(preset):
    """2 sigma^2 (target - lowest) per value; the published one for Tetrominoes allows none."""
    config = efficient_morl.make_config(preset)
    scenes = data.make(config.dataset)
    values = scenes.num_channels * scenes.height * scenes.width

    def error(config: efficient_morl.Config) -> float:
        target, lowest = efficient_morl.nll_bounds(config, scenes)
        return 2 * config.sigma**2 * (target - lowest) / values

    assert error(config) == pytest.approx(1.9e-3, rel=0.05)
    assert error(CLEVR6) == pytest.approx(1.9e-3, rel=0.05)
    published = efficient_morl.make_config("tetrominoes", "released")
    target, lowest = efficient_morl.nll_bounds(published, data.make("tetrominoes"))
    constant = 3675 * 0.5 * math.log(2 * math.pi)  # which the released code's densities lack
    assert target - constant == pytest.approx(-4498.2)
    assert lowest - constant == pytest.approx(-4424.6, abs=0.05)


# -- schedules -------------------------------------------------------------------------------------


def check_schedules(module: ModuleType = efficient_morl) -> None:
    config = small(lr=1e-2, lr_warmup=3, lr_final=0.01, lr_horizon=100, num_steps=3,
                   num_steps_final=1, curriculum_step=10)  # fmt: skip
    rates = [module.learning_rate(config, step) for step in (0, 2, 3, 50, 100, 9999)]
    expected = [1e-2 / 4, 1e-2 * 0.75 * 0.01**0.02, 1e-2 * 0.01**0.03, 1e-3, 1e-4, 1e-4]
    assert_close("learning rate", torch.tensor(rates), torch.tensor(expected), 1e-6)
    model = make_model(config, module=module)
    steps = [model.num_steps(step) for step in (0, 9, 10, 99)]
    assert steps == [3, 3, 1, 1], f"curriculum is off: {steps}"


def test_schedules():
    check_schedules()
    for preset, horizon in (("tetrominoes", 200_000), ("multi_dsprites", 300_000)):
        config = efficient_morl.make_config(preset)  # half of it after 100,000 steps, and so on
        assert efficient_morl.learning_rate(config, 100_000) == pytest.approx(2e-4)
        assert efficient_morl.learning_rate(config, 10**6) == pytest.approx(
            4e-4 * 0.5 ** (horizon / 100_000))  # fmt: skip


# -- evaluation and what a latent means ------------------------------------------------------------


def test_evaluation_scores_every_stage_and_any_number_of_scenes():
    """33 scenes are 32 and the last one, alone; its scores are those of its own inference."""
    scenes = data.make("mini_sprites", "test")
    model = efficient_morl.build(tiny(test_steps=2), scenes)
    few, more = (efficient_morl.evaluate(model, scenes, count) for count in (32, 33))
    stages = [(s["layer"], s["num_steps"]) for s in more["settings"]]
    assert stages == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert more["metrics"] == more["settings"][4]["metrics"]
    batch, index = scenes.batch(32, 1), torch.tensor([32])
    noise = model.noise(scenes, index, 3)
    hierarchy = model.encode(batch.image, noise)
    decoded = [*map(model.decode, hierarchy.samples[:-1])]
    steps = list(model.infer(batch.image, noise))
    decoded += [step.decoded for step in steps]
    last = lambda i, name: (  # noqa: E731
        33 * more["settings"][i]["metrics"][name]["mean"]
        - 32 * few["settings"][i]["metrics"][name]["mean"]
    )
    for i, one in enumerate(decoded):
        mean, masks, _ = efficient_morl.reconstruct(one)
        assert last(i, "mse") == pytest.approx(metrics.mse(batch.image, mean).item(), abs=1e-6)
        assert last(i, "ari_fg") == pytest.approx(metrics.ari(batch.masks, masks).item(), abs=1e-6)
    for i, step in enumerate(steps, 2):
        assert last(i, "elbo") == pytest.approx(-(step.nll + step.kl).item(), rel=1e-3)
        assert last(i, "kl") == pytest.approx(step.kl.item(), rel=1e-3)


def test_evaluation_is_the_same_with_and_without_grad():
    scenes = data.make("mini_sprites", "test")
    model = efficient_morl.build(tiny(), scenes)
    results = []
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            results.append(efficient_morl.evaluate(model, scenes, 4))
    assert results[0] == results[1]
    assert all(p.grad is None for p in model.parameters())


def test_a_scene_that_diverges_has_no_score(monkeypatch):
    scenes = data.make("mini_sprites", "test")
    model = efficient_morl.build(tiny(), scenes)
    decode = model.decode

    def broken(z):
        decoded = decode(z).clone()
        decoded[1] = math.nan
        return decoded

    expected = efficient_morl.evaluate(model, scenes, 1)["metrics"]["mse"]["mean"]
    monkeypatch.setattr(model, "decode", broken)
    score = efficient_morl.evaluate(model, scenes, 2)["metrics"]["mse"]
    assert score == dict(mean=pytest.approx(expected), stderr=None, n=1, left_out=1)


def check_sweep(module: ModuleType = efficient_morl) -> None:
    """Against decoding every picture anew."""
    model = make_model(small(), module=module)
    g = torch.Generator().manual_seed(5)
    z, low, high = (torch.randn(shape, generator=g, dtype=torch.float64)
                    for shape in ((3, 3), (3,), (3,)))  # fmt: skip
    values = torch.tensor([0.0, 0.3, 1.0]).double()
    pictures = module.sweep(model, z, 1, low, high, values)
    for latent, (v, value) in itertools.product(range(3), enumerate(values)):
        moved = z.clone()
        moved[1, latent] = low[latent] + value * (high - low)[latent]
        decoded = model.decode(moved[None])
        own = (decoded[0, :, 3:].softmax(0) * decoded[0, :, :3]).sum(0)
        assert_close(f"latent {latent} at {value}", pictures[latent, v], own)


def test_a_sweep_moves_one_latent_of_one_slot():
    check_sweep()


class Known:
    """A model whose slots are the objects, in another order, and whose latents are four factors and
    noise. Of the first scene of each batch it finds a single pixel of every object. Latent 0 is the
    brightness of what it draws.

    It cheats: what it is given is in `scenes.last`.
    """

    config = SimpleNamespace(num_slots=4, latent_size=5, num_layers=3, test_steps=1, seed=0)
    order = (2, 0, 3, 1)  # the slots of the entities

    def __init__(self):
        self.scenes = data.make("mini_sprites", "test")
        scenes = self.scenes.scenes

        def recorded(index: Tensor) -> data.Batch:
            self.scenes.last = scenes(index)
            return self.scenes.last

        self.scenes.scenes = recorded

    def noise(self, scenes: data.Scenes, index: Tensor, num_steps: int) -> Tensor:
        g = torch.Generator().manual_seed(int(index[0]))
        return torch.randn(len(index), 6 + num_steps, 4, 5, generator=g)

    def infer(self, image: Tensor, noise: Tensor) -> list[efficient_morl.Step]:
        batch = self.scenes.last
        factors = [batch.factors[name] for name in ("color_id", "shape", "row", "col")]
        code = torch.stack([*factors, noise[:, 0, :, 0]], -1).float()  # (B, E, D)
        masks = batch.masks.clone()
        if len(masks) > 1:
            pixels = masks[0].flatten(1)
            pixels[1:] &= pixels[1:].long().cumsum(1) == 1
            pixels[0] = ~pixels[1:].any(0)
        decoded = torch.cat([torch.zeros(*masks.shape[:2], 3, *masks.shape[2:]),
                             50 * masks[:, :, None].float()], 2)  # fmt: skip
        slots = torch.tensor(self.order).argsort()
        lam = torch.cat([code, torch.full_like(code, -30.0)], -1)
        return [efficient_morl.Step(decoded[:, slots], lam[:, slots], None, None)]

    def decode(self, z: Tensor) -> Tensor:
        decoded = torch.zeros(*z.shape[:2], 4, 12, 12)
        decoded[:, :, :3] = z[:, :, 0, None, None, None]
        return decoded


def check_dci(module: ModuleType = efficient_morl) -> None:
    """The perfect code is found in the slots that match, and its latents' activity is known."""
    model = Known()
    asked = {}

    def scored(codes, factors, train):
        asked.update(codes=codes, factors=factors, train=train)
        return dict(disentanglement=1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "bars", lambda *_: None)
        patch.setattr(metrics, "dci", scored)
        result = module.dci(model, model.scenes, Path())
    present = model.scenes.batch(0, 320).present[:, 1:].clone()
    present[::32] = False
    pairs = int(present.sum())
    found = result["pairs"], len(asked["codes"]), asked["train"]
    assert found == (pairs, pairs, pairs // 2), f"numbers are off: {found}, not {pairs}"
    # `color` says the same as `color_id`, and all are as bright.
    assert asked["factors"].keys() == {"color_id", "shape", "row", "col"}, "factors are off"
    for latent, name in enumerate(("color_id", "shape", "row", "col")):
        factor = torch.tensor(asked["factors"][name], dtype=torch.float32)
        assert_close(f"latent {latent}", asked["codes"][:, latent], factor)

    # In the picture, a mean over four slots; from color_id 0 to 5; the noise of z is 0.003.
    variance = (torch.linspace(0, 5, 6) / 4).var(correction=0).item()
    active = result["activeness"]
    assert next(iter(active)) == "latent 0", "order is off"
    assert_close("activeness", active["latent 0"]["mean"], variance, 0.01)
    assert all(v["mean"] == 0 for k, v in active.items() if k != "latent 0"), "others are off"


def test_dci_and_activeness_of_a_model_that_is_known():
    check_dci()


# -- options ---------------------------------------------------------------------------------------

resumed = functools.partial(resumed_model, model=efficient_morl)
TINY = dict(
    dataset="mini_sprites", num_slots=3, latent_size=3, prior_size=4, decoder_channels=(4,),
    encoder_channels=(4,), refinement_size=4, batch_size=4, steps=6, log_every=1, lr_warmup=2,
    lr_horizon=5, device="cpu", kernels="torch",
)  # fmt: skip


def tiny(out: Path | str = "", variant: str = "paper", **changes) -> efficient_morl.Config:
    return efficient_morl.make_config("quick", variant, **{**TINY, "out": str(out), **changes})


def stopped(monkeypatch, capsys, *arguments: object) -> str:
    """The one line with which `python efficient_morl.py ARGUMENTS` ends, and nothing but it."""
    monkeypatch.setattr(sys, "argv", ["/some/where/efficient_morl.py", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        options.main(efficient_morl.Config, efficient_morl.make_config, efficient_morl.load,
                     efficient_morl.train)  # fmt: skip
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in printed
    assert printed.startswith("efficient_morl.py: ") and printed.count("\n") == 1, printed
    return printed.strip().removeprefix("efficient_morl.py: ")


# What is this model's own; what all refuse is in test_options.py. The command line -> its answer.
IMPOSSIBLE = {
    "--preset nonsense": "unknown preset 'nonsense': choose from quick, tetrominoes, multi",
    "--variant nonsense": "unknown variant 'nonsense': choose paper or released",
    "--dataset nonsense": "unknown dataset 'nonsense'; choose from",
    "--experiment dci": "--experiment needs --resume",
    "--encoder-kernel 4": "--encoder-kernel must be odd, not 4",
    "--preset tetrominoes --geco-target -0.3": "--geco-target -0.3: -1102.5 nats per image, and no "
    "model gets below -1047.5",
    "--preset tetrominoes --sigma 0.4": "--geco-target -0.274: -1007.0 nats per image, and no "
    "model gets below 9.7",
}
for value, answer, names in (
    ("0", "must be at least 1", "num_slots latent_size prior_size decoder_channels num_layers "
     "encoder_channels encoder_kernel refinement_size lr_horizon"),
    ("-1", "must be 0 or more", "num_steps num_steps_final curriculum_step test_steps kl_weight "
     "geco_start geco_rate gru_std lr_warmup"),
    ("0", "must be larger than 0", "sigma coordinate_gain init_gain clip "
     "lr_final"),
):  # fmt: skip
    for name in map(options.option, names.split()):
        IMPOSSIBLE[f"{name} {value}"] = f"{name} {answer}"


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_one_line(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "set_up", lambda config: pytest.fail("this would have trained"))
    assert IMPOSSIBLE[line] in stopped(monkeypatch, capsys, *line.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", efficient_morl.PRESETS)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_presets_are_possible(preset, variant):
    config = efficient_morl.make_config(preset, variant)
    efficient_morl.check(config)
    assert config.lr_horizon <= config.steps and config.num_steps_final <= config.num_steps
    released = variant == "released"
    assert config.loss_weights == variant
    differs = config.geco_target != efficient_morl.make_config(preset).geco_target
    assert differs == (released and preset == "tetrominoes")


# -- training --------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Evaluates four scenes; nothing is left of torchrun."""
    few = functools.partial(efficient_morl.evaluate, count=4)
    monkeypatch.setattr(efficient_morl, "evaluate", few)
    for name in test_runs.TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(efficient_morl, "draw", test_runs.no_figures)


def test_what_a_run_and_its_experiment_leave(tmp_path, quick, monkeypatch, capsys):
    """All figures and scores; where no slot matches an object there is no DCI."""
    efficient_morl.train(tiny(tmp_path, steps=2, geco=True, geco_start=0))
    printed = capsys.readouterr().out
    assert "-422.6 nats at the lowest, GECO's target is -403.9\n" in printed
    pictures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert pictures == {
        "decomposition", "stages", "attention", "traversals", "steps", "training",
    }  # fmt: skip
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    found = {name: value["mean"] for name, value in evaluation["metrics"].items()}
    assert found.keys() == {"ari_fg", "ari", "miou", "mse", "elbo", "nll", "kl"}
    assert found["elbo"] == pytest.approx(-found["nll"] - found["kl"], rel=1e-6)
    assert [record["step"] for record in log(tmp_path)] == [1, 2]
    model = efficient_morl.load_model(tmp_path)
    assert same(dict(model.state_dict()), checkpoint(tmp_path)["model"]) and not model.training

    line = tmp_path, "--experiment", "dci"
    result = efficient_morl.train(resumed(*line))
    assert json.loads((tmp_path / "dci.json").read_text()) == json.loads(json.dumps(result))
    assert 0 <= result["disentanglement"] <= 1 and len(result["activeness"]) == 3
    assert (tmp_path / "figures" / "activeness.png").is_file()
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation
    monkeypatch.setattr(metrics, "match", lambda true, *_, **__: torch.full(true.shape[:2], -1))
    answer = stopped(monkeypatch, capsys, "--resume", *line)
    assert answer.startswith("--experiment dci: dci needs")


def test_six_steps_are_three_and_three(tmp_path, quick, no_figures):
    """Bit for bit, across warm-up, decay, GECO's start and the curriculum."""
    changes = dict(geco=True, geco_start=1, geco_rate=1e-3, num_steps=2,
                   num_steps_final=1, curriculum_step=4)  # fmt: skip
    whole = efficient_morl.train(tiny(tmp_path / "six", **changes))
    half = efficient_morl.train(tiny(tmp_path / "half", steps=3, **changes))
    continued = efficient_morl.train(resumed(tmp_path / "half", "--steps", 6))
    assert_same_run(tmp_path / "half", tmp_path / "six")
    assert continued["metrics"] == whole["metrics"] != half["metrics"]
    records = log(tmp_path / "six")
    assert [record["num_steps"] for record in records] == [2, 2, 2, 2, 1, 1]
    weights = [record["nll_weight"] for record in records]
    assert weights[0] == 1 and all(a < b for a, b in itertools.pairwise(weights))
    rates = [record["lr"] for record in records]
    assert rates[0] < rates[1] > rates[2] > rates[3] > rates[4] > rates[5]


def test_a_target_that_cannot_be_reached_is_a_warning_in_the_released_code(
    tmp_path, quick, no_figures, capsys
):
    changes = dict(geco=True, steps=1, sigma=0.3, geco_target=-1.224 + 0.918939)
    efficient_morl.train(tiny(tmp_path, "released", **changes))
    printed = capsys.readouterr()
    assert "-123.1 nats at the lowest, GECO's target is -131.8" in printed.out
    assert "warning: GECO's target cannot be reached" in printed.err


@pytest.mark.parametrize(
    "changes",
    [dict(prior="bottom_up", num_steps=0, num_steps_final=0, test_steps=0),
     dict(prior="reversed", dual_gru=False, likelihood="mixture", num_layers=1),
     dict(variant="released", likelihood="channel_mixture", precision="bfloat16", decoder="small"),
     dict(dataset="tetrominoes", decoder="big", num_slots=1, kl_weight=0.0)],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)  # fmt: skip
def test_every_option_trains(changes, tmp_path, quick, no_figures):
    result = efficient_morl.train(tiny(tmp_path / "run", steps=2, **changes))
    assert result["skipped"] == 0
    assert all(v is not None for record in log(tmp_path / "run") for v in record.values())


def train_in_double(config: efficient_morl.Config) -> None:
    """In a process of its own: float32 gradients, sums over pixels, are 1e-6 off."""
    build, model = efficient_morl.build, efficient_morl.EfficientMORL
    loss = model.loss

    def built(*arguments: object) -> nn.Module:
        result = build(*arguments).double()
        nn.init.ones_(result.layer.norm.bias)  # its gradient, 0, is all rounding: not from 0 too
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficient_morl, "EFFICIENT_MORL", model, raising=False)  # what test_runs asks
        patch.setattr(efficient_morl, "build", built)
        patch.setattr(model, "loss", lambda self, *x: loss(self, *(v.double() for v in x)))
        empty = dict(mean=0.0)
        scores = dict(metrics=dict(ari_fg=empty, mse=empty, kl=empty))
        patch.setattr(efficient_morl, "evaluate", lambda *_: scores)
        patch.setattr(efficient_morl, "draw", test_runs.no_figures)
        test_runs.recorded(config)


def test_two_processes_are_one(tmp_path, context):  # noqa: F811
    """What test_runs.py demands of every model, with GECO, which needs all NLLs."""
    config = tiny(steps=3, batch_size=8, geco=True, geco_start=0, geco_rate=1e-3)
    alone = test_runs.Child(context, tmp_path / "alone", train_in_double, config)
    ranks = test_runs.start_ranks(context, tmp_path, train_in_double, config)
    for child in (alone, *ranks):
        status, printed = child.wait(90)
        assert status == 0, printed
    folders = tuple(tmp_path / name for name in ("alone", "rank0", "rank1"))
    test_runs.test_two_processes_are_one(folders)
    test_runs.test_the_log_of_two_processes_is_that_of_one(folders)
    test_runs.test_only_rank_0_writes(folders)
    assert log(test_runs.only_run(folders[1]))[-1]["nll_weight"] > 1


# -- learning --------------------------------------------------------------------------------------


def test_it_learns_eight_scenes_by_heart():
    """With a third of the error of the best single image for all. To learn them object by object,
    it would have to see ever new ones."""
    scenes = MiniSprites(size=8, sprite=3, min_objects=2, max_objects=2)
    config = tiny(
        latent_size=8, prior_size=32, decoder_channels=(32, 32, 32), encoder_channels=(32, 32),
        refinement_size=32, init_gain=1.4, coordinate_gain=7.0,
    )  # fmt: skip
    model, index = efficient_morl.build(config, scenes), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters())
    image, steps = scenes.scenes(index).image, 300
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 30, 2 - 2 * step / steps)
        parts = model.loss(image, model.noise(scenes, index + 8 * step, 1))
        optimizer.zero_grad()
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
    with torch.no_grad():
        *_, last = model.infer(image, model.noise(scenes, index + 10**6, 1))
    mean, _, _ = efficient_morl.reconstruct(last.decoded)
    single = image.mean(0, keepdim=True).expand_as(image)
    error, of_one = (metrics.mse(image, x).mean().item() for x in (mean, single))
    assert error < of_one / 3, of_one / error


# -- mutants ---------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., None]] = {
    "eager": check_eager,
    "reversed": functools.partial(check_eager, prior="reversed", num_steps=1),
    "bottom up": functools.partial(check_eager, prior="bottom_up", num_steps=1),
    "released": functools.partial(check_eager, **CASES["released"]),
    "mixture": functools.partial(check_eager, likelihood="mixture", num_steps=1),
    "small": functools.partial(check_eager, **CASES["small decoder"]),
    "geco": check_geco,
    "lagrangian": check_geco_gradient,
    "bounds": check_bounds,
    "schedules": check_schedules,
    "sweep": check_sweep,
    "dci": check_dci,
}
MUTANTS = {  # name: (check, text of efficient_morl.py, its mutation)
    # Encoder and attention
    "image in [0, 1]": ("eager", "self.convs(2 * image - 1)", "self.convs(image)"),
    "embedding missing": ("eager", "(2 * image - 1) + self.embedding()", "(2 * image - 1)"),
    "columns mirrored": ("eager", "[1 - x, x, y, 1 - y]", "[x, 1 - x, y, 1 - y]"),
    "softmax over pixels": ("eager", "softmax(1)  # over slots", "softmax(2)  # over slots"),
    "a sum over pixels": ("eager", "(weights / weights.sum(2, keepdim=True)) @", "weights @"),
    "normalised over slots twice": ("eager", "weights.sum(2, keep", "weights.sum(1, keep"),
    "queries not scaled": ("eager", " * z.shape[-1] ** -0.5", ""),
    "queries not normalised": ("eager", "self.queries(self.norm(z))", "self.queries(z)"),
    "lambda not carried from layer to layer": (
        "eager", "theta.flatten(0, 1), lam.flatten(0, 1))",
        "theta.flatten(0, 1), 0 * lam.flatten(0, 1))"),
    "no residual": ("eager", "loc + self.loc(loc)", "self.loc(loc)"),
    "raw scales from means": ("eager", "raw + self.raw(raw)", "raw + self.raw(loc)"),
    "GRU of the raw scales with the means' state": (
        "eager", "self.raw(x, raw)]", "self.raw(x, loc)]"),
    "the same noise in every layer": (
        "eager", "noise[:, c.num_layers - 1 + layer]", "noise[:, c.num_layers]"),
    "softplus a deviation": ("eager", "loc + variance.sqrt() * noise", "loc + variance * noise"),
    # Priors
    "sign of the KL's logarithm": ("eager", "- 1 - ratio.log()) / 2", "- 1 + ratio.log()) / 2"),
    "KL the other way": ("eager", "ratio = variance / prior_variance",
                         "ratio = prior_variance / variance"),
    "KL of the distance by its own variance": (
        "eager", "(loc - mean).square() / prior_variance",
        "(loc - mean).square() / variance"),
    "the layer's own sample in its prior": (
        "reversed", "map(sample, posteriors[1:], noise.unbind(1))", "samples[1:]"),
    "a prior of one layer up": ("eager", "priors[0] if", "priors[-2] if"),
    "refined slots against N(0, 1)": (
        "eager", "gaussian_kl(lam, prior), ", "gaussian_kl(lam), "),
    "prior++ without its gradient": ("eager", "priors[0] if", "priors[0].detach() if"),
    "prior++ in the plain reversed prior": ("reversed", ' if self.config.prior == "reversed++"',
                                            ' if self.config.prior != "bottom_up"'),
    "bottom-up prior from the same layer": ("bottom up", "in samples[:-1])]", "in samples[1:])]"),
    # Refinement
    "both halves normalised together": ("eager", "(-1, (2, -1))", "(-1, (1, -1))"),
    "gradient not a constant": ("eager", "self.refinement, lam, gradient, state)",
                                "self.refinement, lam, gradient + lam - lam.detach(), state)"),
    "gradient of the NLL alone": ("eager", "self.objective(nll, kl).sum()",
                                  "self.objective(nll, 0 * kl).sum()"),
    "gradient of a mean over images": ("eager", "self.objective(nll, kl).sum()",
                                       "self.objective(nll, kl).mean()"),
    "state not carried": ("eager", "update, state = full", "update, _ = full"),
    "lambda replaced": ("eager", "lam = lam + update", "lam = update"),
    "lambda stopped": ("eager", "lam = lam + update", "lam = lam.detach() + update"),
    "the same noise in every step": ("eager", "2 * c.num_layers - 1 + i]",
                                     "2 * c.num_layers - 1]"),
    # Likelihood, decoder, loss
    "one mixture for all colours": ("released", 'likelihood == "channel_mixture"',
                                    'likelihood == ""'),
    "a mixture for each colour": ("mixture", 'likelihood == "channel_mixture"',
                                  'likelihood != "channel_mixture"'),
    "nll a mean": ("eager", '"(b c) h w -> b", "sum"', '"(b c) h w -> b", "mean"'),
    "colours not squashed": ("eager", "decoded[:, :-1].sigmoid()", "decoded[:, :-1]"),
    "inner taps averaged": ("small", "inner.sum(dim, keepdim=True)",
                            "inner.mean(dim, keepdim=True)"),
    "embedding without its gain": ("eager", "grid = gain * ", "grid = 0.5 * "),
    "no discount": ("eager", "((num_steps - i) / (num_steps + 1) for", "(1.0 for"),
    "discount of the NLL alone": ("eager", "weight * self.objective(step.nll, step.kl).mean()",
                                  "self.objective(weight * step.nll, step.kl).mean()"),
    "the paper's weights": ("released", "(num_steps + 3 - i)", "(num_steps + 1 - i)"),
    "KL not weighted": ("eager", "nll + self.config.kl_weight * kl", "nll + kl"),
    "KL weighted by GECO": ("lagrangian", "nll + self.config.kl_weight * kl",
                            "(nll + self.config.kl_weight * kl)"),
    # GECO and schedules
    "constraint turned around": ("geco", "self.target - nll",
                                 "nll - self.target"),
    "no floor": ("geco", ".clamp(min=0.55)", ""),
    "no average": ("geco", "self.constraint.lerp(now, 0.01)", "now"),
    "starts at once": ("geco", "or step <= c.geco_start", ""),
    "zeta without softplus": ("geco", "copy_(F.softplus(self.zeta))", "copy_(self.zeta)"),
    "lowest NLL without its constant": ("bounds", " + HALF_LOG_2PI\n", "\n"),
    "lowest NLL of a variance": ("bounds", "lowest = math.log(config.sigma)",
                                 "lowest = 2 * math.log(config.sigma)"),
    "curriculum a step late": ("schedules", "step < c.curriculum_step",
                               "step <= c.curriculum_step"),
    "decay beyond its end": ("schedules", "min(step / config.lr_horizon, 1.0)",
                             "(step / config.lr_horizon)"),
    "no warm-up": ("schedules", "lr * min(1.0, (step + 1) / (config.lr_warmup + 1))", "lr"),
    # What a latent means
    "another slot is moved": ("sweep", "decoded[:, slot] =", "decoded[:, slot - 1] ="),
    "from high to low": ("sweep", "torch.lerp(low[latent], high[latent], values)",
                         "torch.lerp(high[latent], low[latent], values)"),
    "any slot that shares a pixel": ("dci", ", least_iou=0.1)", ")"),
    "slots not matched": ("dci", "slots[scene, entity + 1]]", "entity + 1]"),
    "the next entity's factors": ("dci", "values[scene, entity + 1]", "values[scene, entity]"),
    "a sample's variance": ("dci", "pictures.var(1, correction=0)", "pictures.var(1)"),
    "most active last": ("dci", "argsort(descending=True)", "argsort()"),
}  # fmt: skip
mutated = functools.partial(mutants.mutated, efficient_morl)


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
