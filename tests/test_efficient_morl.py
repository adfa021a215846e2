"""efficient_morl.py against an independent EfficientMORL and against brute force.

The independent model takes one image and one slot at a time, with the same weights and noise in
float64, and must agree on every intermediate and on the gradient of every parameter. Then the
properties of attention, priors and refinement; GECO; evaluation; and mutants of efficient_morl.py,
which must be caught.

Axes: B batch, K slots, L layers, I refinement steps, D latent, P pixels, C H W image.
"""

import contextlib
import functools
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mutants
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from checks import (
    Layers,
    assert_close,
    assert_gradients,
    copies_of,
    double_precision,
    off_zero,
    standardised,
)
from torch import Tensor, nn

import data
import efficient_morl
import kernels
from data import metrics, runs

# -- an independent EfficientMORL, written from the paper ------------------------------------------


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


class Eager(Layers):
    """Both stages of inference, for one image; the weights have efficient_morl.py's names."""

    def __init__(self, config: efficient_morl.Config, weights: dict[str, Tensor], nll_weight=1.0):
        super().__init__(weights)
        self.config, self.nll_weight = config, nll_weight

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (P, D)."""
        x = 2 * image - 1
        for i in range(len(self.config.encoder_channels)):
            x = F.conv2d(x, *self.layer(f"encoder.convs.{i}"), padding="same").clamp(min=0)
        x = (x + self.embedding("encoder.embedding", *image.shape[1:])).flatten(1).T
        x = self.mlp("encoder.mlp.1", self.norm("encoder.mlp.0", x))
        return self.linear("encoder.keys", x), self.linear("encoder.values", x)

    def attend(self, keys: Tensor, values: Tensor, z: list[Tensor], lam: list[Tensor]):
        """One stochastic layer: the slots' next lambda, and who gets how much of which pixel."""
        queries = [self.linear("layer.queries", self.norm("layer.norm", z_k)) for z_k in z]
        scores = [keys @ query / math.sqrt(len(query)) for query in queries]
        attention = torch.stack(scores).softmax(0)  # pixels choose among slots, (K, P)
        result = []
        for shares, old in zip(attention + 1e-8, lam, strict=True):
            by_mean = self.config.normalise == "mean"
            whole = shares.sum() if by_mean else len(keys) / self.config.num_slots
            theta = (shares / whole) @ values  # a mean over pixels
            if self.config.dual_gru:
                halves = zip(("loc", "raw"), old.chunk(2), strict=True)
                halves = [self.gru(f"layer.gru.{name}", theta, half) for name, half in halves]
            else:
                halves = self.gru("layer.gru", self.linear("layer.input", theta), old).chunk(2)
            named = zip(("loc", "raw"), halves, strict=True)
            result.append(torch.cat([
                half + self.mlp(f"layer.{name}.1", self.norm(f"layer.{name}.0", half))
                for name, half in named
            ]))
        return result, attention

    def prior(self, z: Tensor) -> Tensor:
        return self.mlp("prior", z, F.elu)

    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """One slot, (C+1, H, W): its latent at every place, plus the embedding of the place."""
        number, gain = len(self.config.decoder_channels), self.config.coordinate_gain
        # Unpadded convolutions of 3 x 3 cut off 2 pixels, those of 5 x 5 padded by 1 as well.
        margin = dict(iodine=2 * number + 2, small=2 * number).get(self.config.decoder, 0)
        x = z[:, None, None] + self.embedding(
            "decoder.embedding", height + margin, width + margin, gain)
        padding = int(self.config.decoder in ("small", "padded"))
        activation = F.elu if self.config.decoder == "iodine" else F.relu
        for name in ("first", *(f"hidden.{i}" for i in range(number - 1))):
            x = activation(F.conv2d(x, *self.layer(f"decoder.{name}"), padding=padding))
        x = F.conv2d(x, *self.layer("decoder.last"), padding=padding)
        if not self.config.flat_half_life:
            return torch.cat([1 / (1 + (-x[:-1]).exp()), x[-1:]])
        flat = self.linear("flat", z)[:, None, None]
        return torch.cat([flat[:-1] + 0.2 * (x[:-1] / 0.8).tanh(), flat[-1:] + x[-1:]])

    def nll(self, image: Tensor, decoded: Tensor) -> Tensor:
        """image (C, H, W), decoded (K, C+1, H, W)."""
        means, logits = decoded[:, :-1], decoded[:, -1]  # (K, C, H, W), (K, H, W)
        sigma = self.config.sigma
        if self.config.likelihood == "gaussian":
            mean = (logits.softmax(0)[:, None] * means).sum(0)
            return -D.Normal(mean, sigma).log_prob(image).sum()
        slots = D.Categorical(logits=logits.permute(1, 2, 0))
        components = D.Independent(D.Normal(means.permute(2, 3, 0, 1), sigma), 1)
        return -D.MixtureSameFamily(slots, components).log_prob(image.permute(1, 2, 0)).sum()

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
        state = self.gru("refinement.gru", self.mlp("refinement.mlp", x, F.elu), state)
        return self.linear("refinement.head", state), state

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
            steps.append(SimpleNamespace(posterior=torch.stack(lam), gradient=torch.stack(gradient),
                                         decoded=decoded, nll=nll, kl=kl, loss=loss))  # fmt: skip
            updates, states = zip(*map(self.refine, lam, gradient, states), strict=True)
            lam = [a + b for a, b in zip(lam, updates, strict=True)]
        return SimpleNamespace(
            posteriors=[torch.stack(slots) for slots in posteriors], steps=steps,
            samples=[torch.stack(slots) for slots in samples], attention=torch.stack(attention),
        )  # fmt: skip

    def loss(self, steps: list[SimpleNamespace]) -> Tensor:
        """Eq. 8: all of the first, then (I - i + 1) / (I + 1) of step i."""
        number, total = len(steps) - 1, 0.0
        for i, step in enumerate(steps):
            total = total + ((number - i + 1) / (number + 1) if i else 1.0) * step.loss
        return total


# -- both models, side by side ---------------------------------------------------------------------

SMALL = dict(
    num_slots=3, latent_size=3, hidden_size=5, decoder="pixel", decoder_channels=(4, 3),
    encoder_channels=(3, 4), encoder_kernel=3, num_steps=2, kl_weight=0.7, init_gain=1.0,
)  # fmt: skip
SHAPE = (3, 6, 5)


def small(**overrides) -> efficient_morl.Config:
    """Networks for exact comparisons in milliseconds."""
    return efficient_morl.Config(**SMALL | overrides)


@double_precision()
def make_model(config, shape=SHAPE, module: ModuleType = efficient_morl) -> nn.Module:
    torch.manual_seed(0)
    return off_zero(module.EfficientMORL(config, *shape).double())


def make_inputs(config, shape=SHAPE, batch: int = 2, steps: int | None = None, more: int = 0):
    """image (B, C, H, W) and noise (B, 2L + I, K, D)."""
    g = torch.Generator().manual_seed(1)
    steps = config.num_steps if steps is None else steps
    size = batch, 2 * config.num_layers + steps, config.num_slots + more, config.latent_size
    image = torch.rand(batch, *shape, generator=g, dtype=torch.float64)
    return image, torch.randn(size, generator=g, dtype=torch.float64)


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
def check_eager(module: ModuleType = efficient_morl, shape=SHAPE, nll_weight=1.5, more=0,
                **overrides):
    """AssertionError, which names the first quantity in which the two models differ."""
    config = small(**overrides)
    model = make_model(config, shape, module)
    model.geco.multiplier.fill_(nll_weight)
    model.shading.fill_(0.2)
    image, noise = make_inputs(config, shape, more=more)
    copies = copies_of(model)
    eager = Eager(config, copies, nll_weight)
    expected = [eager.run(*inputs) for inputs in zip(image, noise, strict=True)]

    found = model.encode(image, noise)
    for name, layers in zip(("posteriors", "samples", "attention"), found, strict=True):
        for i, layer in enumerate(layers):
            want = torch.stack([getattr(run, name)[i] for run in expected])
            assert_close(f"{name}, layer {i + 1}", layer, want)

    with recorded(model.refinement) as calls:
        steps = model.infer(image, noise)
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
    first = torch.stack([run.steps[0].kl for run in expected]).mean()
    values = dict(nll=nll, elbo=-nll - kl, kl_hierarchy=first) | (dict(kl=kl) if calls else {})
    assert parts.keys() == values.keys() | {"loss", "decoded"}, "parts are off"
    for name, value in values.items():
        assert_close(name, parts[name], value)
    assert_gradients(parts["loss"], model, loss, copies,
                     lambda name: name.startswith(without_gradient(config)))


CASES: dict[str, dict] = {
    "eager": {}, "reversed": dict(prior="reversed"), "bottom up": dict(prior="bottom_up"),
    **{f"{prior}, I = {steps}": dict(prior=prior, num_steps=steps)
       for prior in ("reversed++", "reversed", "bottom_up") for steps in (0, 1, 3)},
    "iodine's decoder": dict(decoder="iodine", decoder_channels=(3, 4, 2), num_steps=1),
    "small": dict(decoder="small", num_steps=1),
    "padded decoder": dict(decoder="padded", num_steps=1),
    "one layer of a decoder": dict(decoder_channels=(3,), coordinate_gain=4.0),
    "flat": dict(flat_half_life=10, num_steps=1),
    "sum": dict(normalise="sum", num_steps=1, more=1),  # and a slot more than in training
    "mixture": dict(likelihood="mixture"),
    "mixture of grey images": dict(likelihood="mixture", shape=(1, 4, 7)),
    "one GRU": dict(dual_gru=False, num_steps=3),
    "one layer": dict(num_layers=1),
    "four layers": dict(num_layers=4, num_steps=1, encoder_kernel=5),
    "six slots": dict(num_slots=6),
    "KL of weight 1": dict(kl_weight=1.0, nll_weight=1.0),
}  # fmt: skip


# -- sizes and initial values ----------------------------------------------------------------------

PAPER = {"clevr6": efficient_morl.Config(**efficient_morl.CLEVR6),
         "tetrominoes": efficient_morl.make_config("tetrominoes")}  # fmt: skip


@pytest.mark.parametrize(("name", "size", "parameters"),
                         [("clevr6", 96, 666_500), ("tetrominoes", 35, 467_236)])
def test_the_models_have_the_papers_number_of_parameters(name, size, parameters):
    model = efficient_morl.EfficientMORL(PAPER[name], 3, size, size)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_first_values_are_those_of_the_released_code():
    """Xavier's with gain 0.02 (of layers as they are here: refinement's two heads are one), biases
    0, but N(0, 1) for all of the DualGRU, and PyTorch's for the encoder's embedding and the
    refinement's GRU: uniform to 1 / sqrt(fan in)."""
    torch.manual_seed(0)
    model = efficient_morl.EfficientMORL(PAPER["tetrominoes"], 3, 35, 35)
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
            assert p.std().item() == pytest.approx(0.02 * math.sqrt(2 / fans), rel=0.15), name


# -- attention, priors, refinement -----------------------------------------------------------------


@pytest.mark.parametrize("prior", ["reversed++", "bottom_up"])
def test_permuting_the_slots_of_the_noise_permutes_the_outputs(prior):
    """Slots start equal and share all weights: only their noise tells them apart."""
    model = make_model(small(prior=prior, num_slots=4, likelihood="mixture"))
    image, noise = make_inputs(model.config)
    order = torch.tensor([2, 0, 3, 1])
    (*_, attention), (*_, permuted) = (model.encode(image, n) for n in (noise, noise[:, :, order]))
    assert_close("attention", torch.stack(permuted), torch.stack(attention)[:, :, order])
    for a, b in zip(model.infer(image, noise), model.infer(image, noise[:, :, order]), strict=True):
        for name in ("decoded", "posterior"):
            assert_close(name, getattr(b, name), getattr(a, name)[:, order])
        assert_close("nll", b.nll, a.nll)
        assert_close("kl", b.kl, a.kl)
    assert (a.decoded[:, 0] - a.decoded[:, 1]).abs().max() > 1e-3  # the order could have mattered


@pytest.mark.parametrize("changes", [{}, dict(prior="reversed"), dict(num_layers=2)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_inference_outside_training_gives_the_same_values_and_no_graph(changes, mode):
    """With more steps than in training; each starts from a lambda without a history, and so does
    the state, so that memory does not grow with the number of steps."""
    model = make_model(small(**changes))
    inputs = make_inputs(model.config, steps=5)
    trained = model.infer(*inputs, training=True)
    with mode(), recorded(model.refinement) as calls:
        steps = model.infer(*inputs)
    assert len(steps) == 6 and trained[-1].nll.requires_grad
    for a, b in zip(trained, steps, strict=True):
        for name in a._fields:
            assert_close(name, getattr(b, name), getattr(a, name))
            assert not getattr(b, name).requires_grad
    assert all(lam.is_leaf for lam, *_ in calls)
    assert not any(state.requires_grad for *_, state in calls[1:])


def test_under_autocast_the_bound_is_that_of_float32():
    """bfloat16 has 8 bits: colours and posteriors rounded to it would cost nats."""
    scenes = data.make("mini_sprites")
    model = efficient_morl.build(tiny(decoder="small", init_gain=0.5), scenes)
    inputs = scenes.batch(0, 2).image, model.noise(scenes, torch.arange(2), 1)
    exact = model.loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(*inputs)
    for name in ("loss", "nll", "kl"):
        assert rounded[name].dtype == torch.float32
        assert abs(rounded[name] - exact[name]) < 0.02 * exact[name].abs(), name
    colours = rounded["decoded"]
    assert (colours != colours.bfloat16()).float().mean() > 0.9  # not merely cast at the end


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled for the device, not interpreted")
def test_the_fused_mixture_is_that_of_the_file():
    """Values and gradients, in float64."""
    model = make_model(small(likelihood="mixture"))
    image, noise = make_inputs(model.config)
    decoded = model.infer(image, noise)[-1].decoded.contiguous()
    results = []
    for backend in ("torch", "triton"):
        with kernels.use(backend):
            leaf = decoded.clone().requires_grad_()
            nll = model.nll(image, leaf)
            results.append((nll.detach(), *torch.autograd.grad(nll.sum(), leaf)))
    for name, plain, fused in zip(("nll", "gradient"), *results, strict=True):
        assert_close(name, fused, plain)


# -- GECO and schedules ----------------------------------------------------------------------------

@double_precision()
def check_geco(module: ModuleType = efficient_morl) -> None:
    """The multiplier step by step: it rises while the constraint is violated, and then rests."""
    geco, values, target = module.GECO(small(geco=True, geco_target=-0.2), 100), [], -20.0
    geco.start, geco.rate = 3, 0.01
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

    without = module.GECO(small(geco=False), 100)
    without.update(torch.tensor(1e6), 9999)
    assert without.multiplier == 1, "multiplier is off: there is no GECO"


@double_precision()
def check_geco_gradient(module: ModuleType = efficient_morl) -> None:
    """Of Rezende & Viola's Lagrangian, KL - softplus(zeta) (target - NLL), with the constraint's
    value replaced by its average: grad KL + softplus(zeta) grad NLL."""
    config = small(geco=True, geco_target=-0.2, kl_weight=1.0)
    model = make_model(config, module=module)
    model.geco.start, model.geco.rate = 0, 0.01
    for step in (1, 2, 3):
        model.geco.update(torch.tensor(40.0 * step), step)
    zeta, average, target = model.geco.zeta, model.geco.constraint, -0.2 * 90
    assert zeta > 1, "zeta is off"
    inputs, lagrangian, plain = make_inputs(config), 0.0, []
    for weight, step in zip((1, 2 / 3, 1 / 3), model.infer(*inputs, training=True), strict=True):
        constraint = target - step.nll.mean()
        smoothed = constraint + (average - constraint).detach()
        lagrangian = lagrangian + weight * (step.kl.mean() - F.softplus(zeta) * smoothed)
        plain.append(weight * torch.stack([step.nll.mean(), step.kl.mean()]))
    loss = model.loss(*inputs)["loss"]
    nll, kl = sum(plain)
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
                 for value in (loss, lagrangian, nll, kl)]  # fmt: skip
    for name, actual, own, of_nll, of_kl in zip(parameters, *gradients, strict=True):
        assert_close(f"gradient of {name}", actual, own)
        assert_close(f"gradient of {name}", actual, of_kl + F.softplus(zeta) * of_nll)


@pytest.mark.parametrize("likelihood", ["gaussian", "mixture"])
def test_the_lowest_nll_and_the_target_check(likelihood):
    """No decode has less NLL than a perfect one, and a target below that is refused."""
    config = small(likelihood=likelihood, dataset="mini_sprites", geco=True, device="cpu")
    model = make_model(config)
    image, _ = make_inputs(config)
    logits = torch.randn(2, 3, 1, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    perfect = torch.cat([image[:, None].expand(-1, 3, -1, -1, -1), logits], 2)
    lowest = model.nll(image, perfect)
    for scale in (-0.1, 0.01, 1.0):
        other = perfect.clone()
        other[:, :, :3] += scale * torch.rand_like(other[:, :, :3])
        assert (model.nll(image, other) > lowest).all()
    per_value = lowest[0].item() / image[0].numel()
    assert per_value == pytest.approx(math.log(0.3 * math.sqrt(2 * math.pi)))
    config.geco_target = per_value + 1e-6
    efficient_morl.check(config)
    config.geco_target = per_value - 1e-6
    with pytest.raises(runs.UserError, match="no model has an NLL below -0\\.285"):
        efficient_morl.check(config)
    config.geco = False
    efficient_morl.check(config)


@pytest.mark.parametrize("config", [efficient_morl.make_config(), *PAPER.values()])
def test_targets_allow_the_error_that_the_papers_for_clevr6_does(config):
    """2 sigma^2 (target - lowest); the published one for Tetrominoes allows none."""
    lowest = math.log(config.sigma * math.sqrt(2 * math.pi))
    assert 2 * config.sigma**2 * (config.geco_target - lowest) == pytest.approx(1.9e-3, rel=0.05)
    # The released code's densities lack 1 / sqrt(2 pi).
    published = efficient_morl.make_config("tetrominoes", geco_target=-1.224 + 0.918939)
    with pytest.raises(runs.UserError, match="no model"):
        efficient_morl.check(published)


def check_schedules(module: ModuleType = efficient_morl) -> None:
    config = small(lr=1e-2, lr_warmup=4, lr_half_life=100)
    rates = [module.learning_rate(config, step) for step in (0, 3, 4, 54, 104, 304)]
    expected = [1e-2 / 5, 1e-2 * 0.8, 1e-2, 1e-2 * 0.5**0.5, 5e-3, 1.25e-3]
    assert_close("learning rate", torch.tensor(rates), torch.tensor(expected), 1e-6)


def check_curriculum(module: ModuleType = efficient_morl) -> None:
    """A run of four steps: refinement begins after one, and then shading halves twice."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "evaluate", functools.partial(module.evaluate, count=4))
        config = tiny(folder, steps=4, num_steps=2, num_steps_final=1, curriculum_step=1,
                      flat_half_life=1)  # fmt: skip
        module.train(config)
        records = runs.read_log(Path(folder))
        steps, shading = [r["num_steps"] for r in records], module.load_model(folder).shading
    assert steps == [2, 1, 1, 1], f"curriculum is off: {steps}"
    assert shading == 0.25, f"shading is off: {shading}"


def test_shading_that_has_halved_too_often_stays_above_zero(tmp_path):
    efficient_morl.train(tiny(tmp_path, steps=1, flat_half_life=1, curriculum_step=-200))
    (record,) = runs.read_log(tmp_path)
    assert math.isfinite(record["grad_norm"])


# -- evaluation ------------------------------------------------------------------------------------

TINY = dict(
    dataset="mini_sprites", num_slots=3, latent_size=3, hidden_size=4, decoder_channels=(4,),
    encoder_channels=(4,), batch_size=4, steps=2, log_every=1, lr_warmup=2, device="cpu",
)  # fmt: skip


def tiny(out: Path | str = "", **changes) -> efficient_morl.Config:
    return efficient_morl.make_config("quick", **{**TINY, "out": str(out), **changes})


def test_evaluation_scores_every_stage_and_any_number_of_scenes():
    """33 scenes are 32 and the last one, alone; its scores are those of its own inference."""
    scenes = data.make("mini_sprites", "test")
    model = efficient_morl.build(tiny(num_steps_final=2), scenes)
    few, more = (efficient_morl.evaluate(model, scenes, count) for count in (32, 33))
    stages = [(s["layer"], s["num_steps"]) for s in more["settings"]]
    assert stages == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert more["metrics"] == more["settings"][4]["metrics"]
    batch, index = scenes.batch(32, 1), torch.tensor([32])
    noise = model.noise(scenes, index, 3)
    with torch.no_grad():
        _, samples, _ = model.encode(batch.image, noise)
        steps = model.infer(batch.image, noise)
        decoded = [*map(model.decode, samples[:-1]), *(step.decoded for step in steps)]

    def last(i: int, name: str) -> float:
        means = (result["settings"][i]["metrics"][name]["mean"] for result in (more, few))
        return sum(number * mean for number, mean in zip((33, -32), means, strict=True))

    for i, one in enumerate(decoded):
        mean, masks, _ = efficient_morl.reconstruct(one)
        assert last(i, "mse") == pytest.approx(metrics.mse(batch.image, mean).item(), abs=1e-6)
        assert last(i, "ari_fg") == pytest.approx(metrics.ari(batch.masks, masks).item(), abs=1e-6)
    for i, step in enumerate(steps, 2):
        assert last(i, "elbo") == pytest.approx(-(step.nll + step.kl).item(), rel=1e-3)
        name = "kl" if i > 2 else "kl_hierarchy"  # two quantities, two names
        assert last(i, name) == pytest.approx(step.kl.item(), rel=1e-3)
        assert len({"kl", "kl_hierarchy"} & more["settings"][i]["metrics"].keys()) == 1


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


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_run_with_geco_and_one_without_refinement(num_steps, tmp_path, monkeypatch):
    few = functools.partial(efficient_morl.evaluate, count=4)
    monkeypatch.setattr(efficient_morl, "evaluate", few)
    monkeypatch.setattr(efficient_morl.GECO, "start", 0)
    config = tiny(tmp_path, geco=True, num_steps=num_steps, num_steps_final=num_steps)
    found = efficient_morl.train(config)["metrics"].keys()
    assert found & {"kl", "kl_hierarchy"} == ({"kl"} if num_steps else {"kl_hierarchy"})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and records[1]["nll_weight"] > 1


def test_an_even_encoder_kernel_is_refused():
    with pytest.raises(runs.UserError, match="--encoder-kernel must be odd"):
        efficient_morl.check(tiny(encoder_kernel=4))


# -- mutants ---------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., None]] = {
    name: functools.partial(check_eager, **case) for name, case in CASES.items()
} | {
    "geco": check_geco,
    "lagrangian": check_geco_gradient,
    "schedules": check_schedules,
    "curriculum": check_curriculum,
}
MUTANTS = {  # name: (check, text of efficient_morl.py, its mutation)
    # Encoder and attention
    "image in [0, 1]": ("eager", "x = 2 * image - 1", "x = image"),
    "embedding missing": ("eager", "rearrange(x + self.embedding()", "rearrange(x"),
    "columns mirrored": ("eager", "[1 - x, x, y, 1 - y]", "[x, 1 - x, y, 1 - y]"),
    "softmax over pixels": ("eager", "softmax(1)  # over slots", "softmax(2)  # over slots"),
    "a sum over pixels": ("eager", "weights / number @ values", "weights @ values"),
    "a sum that grows with the image": ("sum", "keys.shape[1] / self.config.num_slots", "1.0"),
    "a sum that grows with the slots": ("sum", "/ self.config.num_slots", "/ z.shape[1]"),
    "normalised over slots twice": ("eager", "weights.sum(2, keep", "weights.sum(1, keep"),
    "queries not scaled": ("eager", " * z.shape[-1] ** -0.5", ""),
    "queries not normalised": ("eager", "self.queries(self.norm(z))", "self.queries(z)"),
    "lambda not carried from layer to layer": (
        "eager", "theta.flatten(0, 1), lam.flatten(0, 1))",
        "theta.flatten(0, 1), 0 * lam.flatten(0, 1))"),
    "no residual": ("eager", "loc + self.loc(loc)", "self.loc(loc)"),
    "raw variances from means": ("eager", "raw + self.raw(raw)", "raw + self.raw(loc)"),
    "GRU of the raw variances with the means' state": (
        "eager", "self.raw(x, raw)]", "self.raw(x, loc)]"),
    "no linear layer before the single GRU": (
        "one GRU", "self.input(weights / number @ values)",
        "(weights / number @ values).repeat(1, 1, 2)"),
    "the same noise in every layer": ("eager", "z = sample(lam, epsilon)",
                                      "z = sample(lam, others[0])"),
    "softplus a deviation": ("eager", "(F.softplus(raw) + 1e-5).sqrt()", "F.softplus(raw) + 1e-5"),
    # Priors
    "the layer's own sample in its prior": (
        "reversed", "map(sample, posteriors[1:], noise.unbind(1))", "samples[1:]"),
    "a prior of one layer up": ("eager", "priors[0] if", "priors[-2] if"),
    "KL the other way": ("eager", "kl_divergence(normal(lam), prior)",
                         "kl_divergence(prior, normal(lam))"),
    "prior++ in the plain reversed prior": ("reversed", 'self.config.prior == "reversed++"',
                                            'self.config.prior != "bottom_up"'),
    "bottom-up prior from the same layer": ("bottom up", "samples[:-1] if", "samples[1:] if"),
    # Refinement
    "both halves normalised together": ("eager", "(-1, (2, -1))", "(-1, (1, -1))"),
    "gradient not a constant": ("eager", "self.refinement, lam, gradient, state)",
                                "self.refinement, lam, gradient + lam - lam.detach(), state)"),
    "gradient of the NLL alone": ("eager", "self.objective(nll, kl).sum()",
                                  "self.objective(nll, 0 * kl).sum()"),
    "gradient of a mean over images": ("eager", "self.objective(nll, kl).sum()",
                                       "self.objective(nll, kl).mean()"),
    "state not carried": ("eager", "update, state = ker", "update, _ = ker"),
    "lambda replaced": ("eager", "lam = lam + update", "lam = update"),
    "lambda stopped": ("eager", "lam = lam + update", "lam = lam.detach() + update"),
    "the same noise in every step": ("eager", "self.decode(sample(lam, epsilon))",
                                     "self.decode(sample(lam, for_steps[:, 0]))"),
    # Likelihood, decoder, loss
    "a mixture for each colour": ("mixture", ":-1], sigma).sum(2)", ":-1], sigma).mean(2)"),
    "masks not normalised": ("mixture", "decoded[:, :, -1].log_softmax(1)", "decoded[:, :, -1]"),
    "nll a mean": ("eager", '"b h w -> b", "sum"', '"b h w -> b", "mean"'),
    "colours not squashed": ("eager", "means.sigmoid()", "means"),
    "flat colours not bounded": ("flat", "(means / (4 * self.shading)).tanh()", "means / 4"),
    "flat colours squashed": ("flat", "(self.flat, z)", "(self.flat, z).sigmoid()"),
    "padded by as much as keeps the size": ("small", ", first.padding[0])", ")"),
    "embedding without its gain": ("small", "grid = gain * ", "grid = 0.5 * "),
    "no discount": ("eager", "(len(steps) - i) / len(steps)", "1.0"),
    "the released code's discount": ("eager", "(len(steps) - i)", "(len(steps) - i + 2)"),
    "discount of the NLL alone": ("eager", "weight * self.objective(step.nll, step.kl)",
                                  "self.objective(weight * step.nll, step.kl)"),
    "KL not weighted": ("eager", "nll + self.config.kl_weight * kl", "nll + kl"),
    "KL weighted by GECO": ("lagrangian", "nll + self.config.kl_weight * kl",
                            "(nll + self.config.kl_weight * kl)"),
    # GECO and schedules
    "constraint turned around": ("geco", "self.target - nll", "nll - self.target"),
    "no floor": ("geco", ".clamp(min=0.55)", ""),
    "no average": ("geco", "self.constraint.lerp(now, 0.01)", "now"),
    "starts at once": ("geco", " and step > self.start", ""),
    "zeta without softplus": ("geco", "copy_(F.softplus(self.zeta))", "copy_(self.zeta)"),
    "curriculum a step late": ("curriculum", "since < 0 else", "since <= 0 else"),
    "halving overlaps the warm-up": ("schedules", "max(0, step - config.lr_warmup)", "step"),
    "shading falls twice as fast": ("curriculum", "0.5 ** min(h", "0.25 ** min(h"),
    "shading falls from the start": ("curriculum", "max(0, since)", "step"),
    "no warm-up": ("schedules", "config.lr * warmup", "config.lr"),
}  # fmt: skip
mutated = functools.partial(mutants.mutated, efficient_morl)


@pytest.mark.parametrize("check", CHECKS)
def test_the_file_passes_all_checks(check):
    """Unmutated, but read again in the same way."""
    CHECKS[check](mutated())


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    check, old, new = MUTANTS[name]
    module = mutated(old, new)
    with pytest.raises(AssertionError, match=r" (is|are) off\b"):
        CHECKS[check](module)
