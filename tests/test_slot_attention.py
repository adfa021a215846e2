"""slot_attention.py against an independent autoencoder and against brute force.

The independent model takes one image, one slot and one pixel's competition at a time, with the same
weights and noise in float64, and must agree on every intermediate and on the gradient of every
parameter. Then the properties of the slots, the implicit gradient and the evaluation; and mutants
of slot_attention.py, which must be caught.

Axes: B batch, K slots, T iterations, D size of a slot, P pixels, C H W image.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mutants
import pytest
import torch
import torch.nn.functional as F
from checks import Layers, assert_close, assert_gradients, copies_of, double_precision, off_zero
from torch import Tensor, nn

import data
import slot_attention
from data import metrics, runs

# -- an independent Slot Attention, written from algorithm 1 ---------------------------------------


class Eager(Layers):
    """The autoencoder for one image; the weights have slot_attention.py's names."""

    epsilon = 1e-3

    def __init__(self, config: slot_attention.Config, weights: dict[str, Tensor]):
        super().__init__(weights)
        self.config = config

    def encode(self, image: Tensor) -> Tensor:
        """Features (P, O)."""
        x = 2 * image - 1
        for i in range(len(self.config.encoder_channels)):
            x = F.conv2d(x, *self.layer(f"encoder.convs.{i}"), padding="same").clamp(min=0)
        x = (x + self.embedding("encoder.embedding", *image.shape[1:])).flatten(1).T
        return self.mlp("encoder.mlp.1", self.norm("encoder.mlp.0", x))

    def attend(self, features: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """After each iteration: slots (K, D), and who gets how much of which pixel, (K, P)."""
        pixels = self.norm("slots.norm_inputs", features)
        keys, values = self.linear("slots.keys", pixels), self.linear("slots.values", pixels)
        scale = self.weights["slots.log_scale"][0].exp()
        slots = [self.weights["slots.loc"][0] + scale * epsilon for epsilon in noise]
        trace = []
        for _ in range(self.config.num_iterations):
            queries = [self.linear("slots.queries", self.norm("slots.norm_slots", s))
                       for s in slots]  # fmt: skip
            columns = []
            for key in keys:  # each pixel is shared out among the slots
                scores = torch.stack([q @ key / math.sqrt(len(key)) for q in queries])
                columns.append(scores.exp() / scores.exp().sum())
            attention = torch.stack(columns, 1)
            found = []
            for shares in attention + 1e-8:
                terms = [share * value for share, value in zip(shares, values, strict=True)]
                mean = self.config.normalise == "mean"
                number = shares.sum() if mean else len(shares) / self.config.num_slots
                found.append(sum(terms) / number)
            slots = [self.gru("slots.gru", u, s) for u, s in zip(found, slots, strict=True)]
            slots = [s + self.mlp("slots.mlp.1", self.norm("slots.mlp.0", s)) for s in slots]
            trace.append((torch.stack(slots), attention))
        return trace

    def ordered(self, features: Tensor, height: int, width: int) -> Tensor:
        """Slot MLP: all slots (K, D) of all features, of which 32 rows make 16 averages."""
        x = features.reshape(height, width, -1).movedim(-1, 0)
        x = (x[:, ::2] + x[:, 1::2]).flatten() / 2 if height == 32 else x.flatten()
        return self.mlp("slots.mlp", x).reshape(self.config.num_slots, -1)

    def decode(self, slot: Tensor, height: int, width: int) -> Tensor:
        """One slot, (C+1, H, W): the slot at every place, plus the embedding of the place."""
        gain = self.config.coordinate_gain
        x = slot[:, None, None] + self.embedding("decoder.embedding", height, width, gain)
        hidden = range(len(self.config.decoder_channels) - 1)
        for name in ("first", *(f"hidden.{i}" for i in hidden)):
            x = F.conv2d(x, *self.layer(f"decoder.{name}"), padding="same").clamp(min=0)
        x = F.conv2d(x, *self.layer("decoder.last"), padding="same")
        rows, cols = (self.between(size) for size in (height, width))
        x = torch.einsum("ij, cjk, lk -> cil", rows, x, cols)
        height, width = x.shape[1:]
        if self.config.flat_colors:
            flat = self.linear("flat", slot)[:, None, None].expand(-1, height, width)
            x = torch.cat([flat[:-1], flat[-1:] + 4 * x[-1:]])
        return torch.cat([(x[:-1] + 1) / 2, x[-1:]])

    def between(self, size: int) -> Tensor:
        """Weights (pool size, size) of the values of a line: straight from middle to middle."""
        p = self.config.pool
        middles = ((torch.arange(p * size).double() + 0.5) / p - 0.5).clamp(0, size - 1)
        return (1 - (middles[:, None] - torch.arange(size)).abs()).clamp(min=0)

    def run(self, image: Tensor, noise: Tensor) -> SimpleNamespace:
        p = self.config.pool
        image = sum(image[:, i::p, j::p] for i in range(p) for j in range(p)) / p**2
        features, size = self.encode(image), image.shape[1:]
        if self.config.slots == "mlp":
            trace = [(self.ordered(features, *size), None)] * self.config.num_iterations
        else:
            trace = self.attend(features, noise)
        decoded = torch.stack([self.decode(slot, *size) for slot in trace[-1][0]])
        shares = decoded[:, -1:].exp() / decoded[:, -1:].exp().sum(0)
        entropy = -(shares * shares.log()).sum(0).mean()
        return SimpleNamespace(features=features, trace=trace, decoded=decoded, entropy=entropy,
                               mean=(shares * decoded[:, :-1]).sum(0))  # fmt: skip


# -- both models, side by side ---------------------------------------------------------------------

SMALL = dict(num_slots=3, latent_size=3, encoder_channels=(3, 4), encoder_kernel=3,
             decoder_channels=(4, 3), decoder_kernel=3)  # fmt: skip
SHAPE = (3, 6, 4)


def small(**overrides) -> slot_attention.Config:
    """Networks for exact comparisons in milliseconds."""
    return slot_attention.Config(**SMALL | overrides)


@double_precision()
def make_model(config, shape=SHAPE, module: ModuleType = slot_attention) -> nn.Module:
    torch.manual_seed(0)
    return off_zero(module.SlotAutoencoder(config, *shape).double())


def make_inputs(config, shape=SHAPE, batch: int = 2) -> tuple[Tensor, Tensor]:
    """image (B, C, H, W) and noise (B, K, D)."""
    g = torch.Generator().manual_seed(1)
    image = torch.rand(batch, *shape, generator=g, dtype=torch.float64)
    size = batch, config.num_slots, config.latent_size
    return image, torch.randn(size, generator=g, dtype=torch.float64)


@double_precision()
def check_eager(module: ModuleType = slot_attention, shape=SHAPE, **overrides) -> None:
    """AssertionError, which names the first quantity in which the two models differ."""
    config = small(**overrides)
    model = make_model(config, shape, module)
    model.entropy_weight.fill_(config.mask_entropy)
    image, noise = make_inputs(config, shape)
    copies = copies_of(model)
    eager = Eager(config, copies)
    expected = [eager.run(*inputs) for inputs in zip(image, noise, strict=True)]

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(run, name) for run in expected])

    assert_close("features", model.encoder(image), stacked("features"))
    trace = model.encode(image, noise, config.num_iterations)
    found = len(trace)
    assert found == len(expected[0].trace), f"number of iterations is off: {found}"
    wanted = zip(*(run.trace for run in expected), strict=True)
    for t, (found, want) in enumerate(zip(trace, wanted, strict=True), 1):
        for name, own, others in zip(("slots", "attention"), found, zip(*want, strict=True),
                                     strict=True):  # fmt: skip
            if own is not None:
                assert_close(f"{name}, iteration {t}", own, torch.stack(others))
    decoded = model.decode(trace[-1][0])
    assert_close("decoded", decoded, stacked("decoded"))
    assert_close("mean", module.reconstruct(decoded)[0], stacked("mean"))

    parts = model.loss(image, noise)
    # In [-1, 1], as the paper's.
    error = torch.stack([((2 * x - 1) - (2 * run.mean - 1)).square().mean()
                         for x, run in zip(image, expected, strict=True)]).mean()  # fmt: skip
    loss = error + config.mask_entropy * stacked("entropy").mean()
    for name, value in dict(loss=loss, mse=error / 4, entropy=stacked("entropy").mean()).items():
        assert_close(name, parts[name], value)
    # The softmax over slots removes what shifts all queries, or all masks, alike.
    unused = {"slots.norm_slots.bias", "decoder.last.bias" * config.flat_colors}
    assert_gradients(parts["loss"], model, loss, copies, unused.__contains__)


CASES: dict[str, dict] = {
    "eager": {},  # three iterations
    "one iteration": dict(num_iterations=1),
    "five iterations, six slots": dict(num_iterations=5, num_slots=6),
    "1 x 1": dict(decoder_kernel=1, coordinate_gain=7.0),
    "5 x 5 decoder": dict(decoder_kernel=5, encoder_kernel=5),
    "one layer of a decoder": dict(decoder_channels=(4,)),
    "grey images": dict(shape=(1, 5, 7)),
    "flat": dict(flat_colors=True),
    "sum": dict(normalise="sum", mask_entropy=0.15),
    "pool": dict(pool=2),
    "pool, flat": dict(pool=3, flat_colors=True, shape=(3, 6, 9), slots="mlp", mask_entropy=0.15),
    "mlp": dict(slots="mlp"),
    "mlp of large images": dict(slots="mlp", shape=(3, 32, 4)),
}


# -- sizes and initial values ----------------------------------------------------------------------


def test_encoder_and_attention_have_the_released_codes_number_of_parameters():
    """890,308 for CLEVR6, where another decoder doubles 8 x 8 pixels four times: five layers of 64
    channels and 5 x 5 taps, a last one of 3 x 3, and the embedding of positions."""
    config = slot_attention.Config(encoder_channels=(64, 64, 64, 64))
    model = slot_attention.SlotAutoencoder(config, 3, 128, 128)
    parameters = [*model.encoder.parameters(), *model.slots.parameters()]
    decoder = 5 * (64 * 64 * 25 + 64) + (64 * 4 * 9 + 4) + (4 * 64 + 64)
    assert sum(p.numel() for p in parameters) + decoder == 890_308


def test_the_first_values_are_keras():
    """Glorot's uniform ones, an orthogonal recurrence, biases 0 and gains 1."""
    torch.manual_seed(0)
    model = slot_attention.SlotAutoencoder(slot_attention.Config(), 3, 35, 35)
    for name, p in model.named_parameters():
        if name == "slots.gru.weight_hh":
            assert_close(name, p.T @ p, torch.eye(64), 1e-5)
        elif p.ndim == 1:
            assert (p == (name.endswith(("norm_inputs.weight", "norm_slots.weight", "mlp.0.weight"))
                          and "mlp.1" not in name)).all(), name
        else:
            bound = math.sqrt(6 / (p[0].numel() + p.shape[0] * p[0, 0].numel()))
            assert 0.9 * bound < p.abs().max() <= bound, name


# -- slots -----------------------------------------------------------------------------------------


def test_permuting_the_noise_permutes_the_slots():
    """Slots share all weights and their distribution: only their noise tells them apart."""
    model = make_model(small(num_slots=4))
    image, noise = make_inputs(model.config)
    order = torch.tensor([2, 0, 3, 1])
    traces = (model.encode(image, n, 3) for n in (noise, noise[:, order]))
    for a, b in zip(*traces, strict=True):
        for name, own, permuted in zip(("slots", "attention"), a, b, strict=True):
            assert_close(name, permuted, own[:, order])
    decoded, permuted = (model.decode(slots) for slots in (a[0], b[0]))
    assert_close("decoded", permuted, decoded[:, order])
    means = (slot_attention.reconstruct(one)[0] for one in (decoded, permuted))
    assert_close("mean", *means)
    assert (a[0][:, 0] - a[0][:, 1]).abs().max() > 1e-3  # the order could have mattered


def test_attention_is_shared_out_among_any_number_of_slots():
    """More slots at test time than in training, and more iterations."""
    model = make_model(small(latent_size=4))
    image, _ = make_inputs(model.config)
    noise = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(2)).double()
    trace = model.encode(image, noise, 5)
    assert len(trace) == 5
    for slots, attention in trace:
        assert slots.shape == (2, 7, 4) and attention.shape == (2, 7, 24)
        assert_close("sum over slots", attention.sum(1), torch.ones(2, 24).double())


@pytest.mark.parametrize("name", ["loc", "log_scale"])
def test_the_gradient_reaches_the_slots_distribution(name):
    """And is that of finite differences, in the direction of the gradient."""
    model = make_model(small())
    inputs, parameter = make_inputs(model.config), getattr(model.slots, name)
    (gradient,) = torch.autograd.grad(model.loss(*inputs)["loss"], parameter)
    losses = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            parameter += step * gradient / gradient.norm()
            losses.append(model.loss(*inputs)["loss"].item())
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(gradient.norm().item(), rel=1e-5)


def check_implicit(module: ModuleType = slot_attention) -> None:
    """The values of the whole graph, and the gradient of the last iteration alone."""
    config = small(implicit=True, num_iterations=4)
    model, plain = (make_model(c, module=module) for c in (config, small(num_iterations=4)))
    image, noise = make_inputs(config)
    parts = model.loss(image, noise)
    assert_close("loss", parts["loss"], plain.loss(image, noise)["loss"])

    before = plain.encode(image, noise, 4)[-2][0].detach()
    pixels = plain.slots.norm_inputs(plain.encoder(image))
    slots, _ = plain.slots.iterate(plain.slots.keys(pixels), plain.slots.values(pixels), before)
    mean = module.reconstruct(plain.decode(slots))[0]
    last = 4 * (mean - image).square().mean()
    names = [name for name, _ in model.named_parameters()]
    actual, wanted = (torch.autograd.grad(loss, list(m.parameters()), materialize_grads=True)
                      for m, loss in ((model, parts["loss"]), (plain, last)))
    for name, a, w in zip(names, actual, wanted, strict=True):
        if name != "slots.norm_slots.bias":  # zero by symmetry
            assert_close(f"gradient of {name}", a, w)
    assert not actual[names.index("slots.loc")].any(), "gradient of the start is off: there is one"


def test_under_autocast_slots_and_colours_are_of_float32():
    scenes = data.make("mini_sprites")
    model = slot_attention.build(tiny(), scenes)
    inputs = scenes.batch(0, 2).image, model.noise(scenes, torch.arange(2))
    exact = model.loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(*inputs)
    assert rounded["loss"].dtype == torch.float32
    assert abs(rounded["loss"] - exact["loss"]) < 0.02 * exact["loss"]
    colours = rounded["decoded"]
    assert (colours != colours.bfloat16()).float().mean() > 0.8  # not merely cast at the end


# -- schedules and options -------------------------------------------------------------------------


def check_learning_rate(module: ModuleType = slot_attention) -> None:
    config = small(lr=1e-2, lr_warmup=4, lr_half_life=100)
    rates = [module.learning_rate(config, step) for step in (0, 3, 4, 100, 300)]
    expected = [2e-3, 8e-3 * 0.5**0.03, 1e-2 * 0.5**0.04, 5e-3, 1.25e-3]
    assert_close("learning rate", torch.tensor(rates), torch.tensor(expected), 1e-6)


@pytest.mark.parametrize(("steps", "weight"), [(1, 0.0), (2, 0.25), (3, 0.5), (4, 0.5)])
def test_the_weight_of_the_entropy_rises_in_a_line(steps, weight, tmp_path, monkeypatch):
    monkeypatch.setattr(slot_attention, "evaluate", lambda *_: dict(metrics={}))
    monkeypatch.setattr(slot_attention, "draw", lambda *_: None)
    slot_attention.train(tiny(tmp_path, steps=steps, mask_entropy=0.5, entropy_steps=2))
    model = slot_attention.load_model(tmp_path)
    assert model.entropy_weight == weight  # of the last step


def test_the_gradient_of_the_entropy_is_finite_where_masks_are_zero(monkeypatch):
    model = make_model(small())
    model.entropy_weight.fill_(0.3)
    image, noise = make_inputs(model.config)
    logits = (1e4 * noise[..., 0]).requires_grad_()  # (B, K)
    decoded = torch.cat([image[:, None].expand(-1, 3, -1, -1, -1),
                         logits[..., None, None, None].expand(-1, -1, 1, *SHAPE[1:])], 2)
    monkeypatch.setattr(model, "decode", lambda slots: decoded)
    parts = model.loss(image, noise)
    assert parts["entropy"] == 0 and parts["mse"] == 0
    assert torch.autograd.grad(parts["loss"], logits)[0].isfinite().all()


@pytest.mark.parametrize(("changes", "message"), [
    (dict(decoder_kernel=4), "--decoder-kernel must be odd"),
    (dict(encoder_kernel=2), "--encoder-kernel must be odd"),
    (dict(pool=5), "--pool 5 does not divide images of"), (dict(pool=0), "--pool"),
    (dict(pool=6, decoder_kernel=5), "--decoder-kernel: at most 3"),
    (dict(decoder_kernel=15), "--decoder-kernel: at most 13"),
    (dict(coordinate_gain=math.nan), "--coordinate-gain must be"),
    (dict(mask_entropy=-0.1), "--mask-entropy must be at least 0"),
    (dict(num_iterations=0), "--num-iterations must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(runs.UserError, match=message):
        slot_attention.check(tiny(**changes))


# -- evaluation ------------------------------------------------------------------------------------


def tiny(out: Path | str = "", **changes) -> slot_attention.Config:
    small = dict(dataset="mini_sprites", num_slots=3, latent_size=4, encoder_channels=(4,),
                 decoder_channels=(4,), batch_size=4, device="cpu", out=str(out))  # fmt: skip
    return slot_attention.make_config("quick", **small | changes)


@pytest.mark.parametrize("slots", ["attention", "mlp"])
def test_evaluation_scores_every_iteration_and_any_number_of_scenes(slots):
    """33 scenes are 32 and the last one, alone; its scores are those of its own inference."""
    scenes = data.make("mini_sprites", "test")
    model = slot_attention.build(tiny(slots=slots, test_iterations=4), scenes)
    few, more = (slot_attention.evaluate(model, scenes, count) for count in (32, 33))
    assert [s["num_iterations"] for s in more["settings"]] == [*range(1, 9)]
    assert more["metrics"] == more["settings"][3]["metrics"]
    batch, index = scenes.batch(32, 1), torch.tensor([32])
    trace = model.encode(batch.image, model.noise(scenes, index), 8)
    for i, (own, _) in enumerate(trace):
        mean, masks, _ = slot_attention.reconstruct(model.decode(own))
        expected = dict(mse=metrics.mse(batch.image, mean), ari_fg=metrics.ari(batch.masks, masks),
                        ari=metrics.ari(batch.masks, masks, foreground=False),
                        miou=metrics.miou(batch.masks, batch.present, masks))  # fmt: skip
        for name, value in expected.items():
            sums = (count * result["settings"][i]["metrics"][name]["mean"]
                    for count, result in ((33, more), (-32, few)))  # fmt: skip
            assert sum(sums) == pytest.approx(value.item(), abs=1e-5), name


# -- mutants ---------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., None]] = {
    name: functools.partial(check_eager, **case) for name, case in CASES.items()
} | {"implicit": check_implicit, "learning rate": check_learning_rate}
MUTANTS = {  # name: (check, text of slot_attention.py, its mutation)
    # Encoder and attention
    "image in [0, 1]": ("eager", "avg_pool2d(2 * image - 1", "avg_pool2d(image"),
    "embedding missing": ("eager", "rearrange(x + self.embedding()", "rearrange(x"),
    "columns mirrored": ("eager", "[1 - x, x, y, 1 - y]", "[x, 1 - x, y, 1 - y]"),
    "every other pixel instead of means": ("pool", "F.avg_pool2d(2 * image - 1, self.pool)",
                                           "2 * image[..., :: self.pool, :: self.pool] - 1"),
    "enlarged from corner to corner": ("pool", 'mode="bilinear")',
                                       'mode="bilinear", align_corners=True)'),
    "PyTorch's epsilon": ("eager", "eps=1e-3", "eps=1e-5"),
    "inputs not normalised": ("eager", "x = self.norm_inputs(features)", "x = features"),
    "slots not normalised": ("eager", "self.queries(self.norm_slots(slots))",
                             "self.queries(slots)"),
    "queries not scaled": ("eager", " * slots.shape[-1] ** -0.5", ""),
    "softmax over pixels": ("eager", "softmax(1)  # over slots", "softmax(2)  # over slots"),
    "always a sum over pixels": ("eager", '== "sum"', '!= "sum"'),
    "normalised over slots twice": ("eager", "weights.sum(2, keep", "weights.sum(1, keep"),
    "keys for values": ("eager", "self.keys(x), self.values(x)", "self.keys(x), self.keys(x)"),
    "no GRU": ("eager", "self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).unflatten(0, slots.",
               "updates.flatten(0, 1).unflatten(0, slots."),
    "GRU's state normalised": ("eager", "1), slots.flatten(0, 1)).unfl",
                               "1), self.norm_slots(slots).flatten(0, 1)).unfl"),
    "no residual": ("eager", "return slots + self.mlp(slots)", "return self.mlp(slots)"),
    "slots start at their mean": ("eager", "+ self.log_scale.exp() * noise",
                                  "+ 0 * self.log_scale.exp() * noise"),
    "sigma without exp": ("eager", "self.log_scale.exp()", "self.log_scale"),
    "no gradient to the distribution": ("eager", "self.loc + self.log_scale.exp() * noise",
                                        "(self.loc + self.log_scale.exp() * noise).detach()"),
    "an iteration too few": ("eager", "range(1, num_iterations + 1)", "range(1, num_iterations)"),
    "a share of the wrong number": ("sum", "keys.shape[1] / self", "1 / self"),
    "slots not carried": ("eager", "slots, attention = self.iterate(keys, values, slots)",
                          "_, attention = self.iterate(keys, values, slots)"),
    "always implicit": ("eager", "if self.config.implicit and", "if"),
    "never implicit": ("implicit", "if self.config.implicit and", "if False and"),
    "the first iteration in the graph": ("implicit", "t == num_iterations:", "t == 2:"),
    # Slot MLP, decoder, loss
    "slots of interleaved values": ("mlp", "unflatten(1, self.sizes)",
                                    "unflatten(1, self.sizes[::-1]).mT"),
    "decoder without positions": ("eager", "self.first(self.embedding()[None])",
                                  "self.first(0 * self.embedding()[None])"),
    "embedding without its gain": ("1 x 1", "grid = gain * ", "grid = 0.5 * "),
    "no activation between layers": ("eager", "x = F.relu(conv(x), inplace=True)\n        x = k",
                                     "x = conv(x)\n        x = k"),
    "colours not moved to [0, 1]": ("eager", "[(means + 1) / 2, mask", "[means, mask"),
    "masks not normalised": ("eager", "kernels.masks(decoded[:, :, -1])", "decoded[:, :, -1]"),
    "error in [0, 1]": ("eager", "loss = 4 * mse", "loss = mse"),
    "error of a sum": ("eager", ".square().mean()", ".square().sum()"),
    "entropy summed over pixels": ("sum", "log_softmax(1)).sum(1).mean()", "log_softmax(1)).sum()"),
    "entropy of logits": ("sum", "log_softmax(1)).sum", "neg()).sum"),
    # Flat colours, learning rate
    "logits at their own scale": ("flat", "4 * mask_logits", "mask_logits"),
    "no logit of the whole slot": ("flat", "flat[:, :, -1:] + 4", "4"),
    "colours that differ between pixels": ("flat", "flat[:, :, :-1].expand_as(means), ",
                                           "flat[:, :, :-1] + means, "),
    "halving after the warm-up": ("learning rate", "0.5 ** (step / config",
                                  "0.5 ** ((step - config.lr_warmup) / config"),
    "no warm-up": ("learning rate", "config.lr * warmup", "config.lr"),
}  # fmt: skip
mutated = functools.partial(mutants.mutated, slot_attention)


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
