"""iodine.py against an independent IODINE, written from the paper with autograd alone.

Both get the same weights and noise in float64 and must agree on every intermediate and on the
gradient of every parameter. Then what follows from the mathematics: finite differences, symmetries,
memory; and mutants of iodine.py, all of which the comparison must catch.

Axes: B batch, K slots, T decodes, D latent, C H W image, F input channels of the refinement.
"""

import contextlib
import math
import weakref
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from kernel_checks import TRITON
from mutants import mutated
from torch import Tensor, nn

import data
import iodine
import kernels
from data import metrics
from data.mini_sprites import MiniSprites

TOLERANCE = 1e-9  # of the largest value of a tensor


@pytest.fixture(autouse=True)
def torch_backend():
    with kernels.use("torch"):
        yield


# -- an independent IODINE, from algorithm 1 and appendix C ----------------------------------------


class Eager:
    """Algorithm 1 with autograd for every gradient and one mixture rebuilt for each left-out slot.

    `weights` holds lambda, decoder, decoder_mlp, conv, mlp, lstm, head (weight, bias) and
    norm.<input> (gain, bias): lists and pairs of tensors that require grad.
    """

    def __init__(self, config: iodine.Config, weights: dict[str, Any]):
        self.config, self.weights = config, weights
        self.act = {"elu": F.elu, "relu": F.relu}[config.activation]

    def coordinates(self, height: int, width: int, gain: float = 1.0) -> Tensor:
        """Two channels, rows then columns, from -gain to gain: (2, H, W)."""
        rows, cols = (torch.linspace(-gain, gain, n, dtype=torch.float64) for n in (height, width))
        return torch.stack(torch.meshgrid(rows, cols, indexing="ij"))

    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """(B, K, D) -> (B, K, C+1, H, W): every slot on its own, its latent at every pixel."""
        batch, z = z.shape[:2], z.flatten(0, 1)
        *hidden, last = self.weights["decoder"]
        if self.config.decoder == "deconv":
            return self.deconvolve(z, hidden, last)[..., :height, :width].unflatten(0, batch)
        grid = self.coordinates(height, width, self.config.coordinate_gain)
        tiled = z[:, :, None, None].expand(-1, -1, height, width)  # iodine.py never builds it
        x = torch.cat([tiled, grid.expand(len(z), -1, -1, -1)], 1)
        for weight, bias in hidden:
            x = self.act(F.conv2d(x, weight, bias, padding="same"))
        return F.conv2d(x, *last, padding="same").unflatten(0, batch)

    def deconvolve(self, z: Tensor, layers: list, last: tuple[Tensor, Tensor]) -> Tensor:
        """The ablation's decoder: two dense layers, 8 x 8 pixels, doubled by all layers but two."""
        *dense_and_doubling, (weight, bias) = layers
        for w, b in dense_and_doubling[:2]:
            z = self.act(z @ w.T + b)
        x = z.unflatten(1, (8, 8, 8))
        for up, shift in dense_and_doubling[2:]:
            height, width = 2 * x.shape[2], 2 * x.shape[3]
            x = F.conv_transpose2d(x, up, shift, stride=2)  # with a margin of 2 before, 1 after
            x = self.act(x[..., 2 : 2 + height, 2 : 2 + width])
        return F.conv2d(self.act(F.conv2d(x, weight, bias, padding=2)), *last, padding=2)

    def components(self, means: Tensor) -> D.Distribution:
        """Densities of a pixel under each slot, all channels together: batch (B, H, W, K)."""
        return D.Independent(D.Normal(means.permute(0, 3, 4, 1, 2), self.config.sigma), 1)

    def log_likelihood(self, image: Tensor, means: Tensor, logits: Tensor) -> Tensor:
        """log p(x | z) of each pixel, eq. 1: (B, 1, 1, H, W)."""
        mixture = D.MixtureSameFamily(
            D.Categorical(logits=logits.squeeze(2).permute(0, 2, 3, 1)), self.components(means)
        )
        return mixture.log_prob(image.permute(0, 2, 3, 1))[:, None, None]

    def posterior(self, lam: Tensor) -> D.Normal:
        """q(z | x): the first half of lambda is the mean, the second the raw scale."""
        loc, raw = lam.chunk(2, -1)
        return D.Normal(loc, torch.log1p(torch.exp(raw)))

    def normalise(self, name: str, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """LayerNorm over all of `axes` together; gain and bias for each index of the first axis."""
        gain, bias = self.weights["norm"][name]
        centred = x - x.mean(axes, keepdim=True)
        unit = centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()
        shape = (-1,) + (1,) * (len(axes) - 1)
        return unit * gain.reshape(shape) + bias.reshape(shape)

    def inputs(self, image: Tensor, means: Tensor, logits: Tensor, grads) -> dict[str, Tensor]:
        """The image-sized rows of appendix C's table: name -> (B, K, channels, H, W)."""
        slots, chw = means.shape[1], (-3, -2, -1)
        log_p = self.log_likelihood(image, means, logits)
        # A mixture of the other slots only: the softmax makes their masks sum to 1 again.
        without = []
        for k in range(slots):
            others = [j for j in range(slots) if j != k] or [0]  # an only slot is not left out
            without.append(self.log_likelihood(image, means[:, others], logits[:, others]))
        log_n = self.components(means).log_prob(image.permute(0, 2, 3, 1)[..., None, :])
        every = lambda x: x.expand(len(image), slots, *x.shape[-3:])  # noqa: E731
        rows = {
            "image": every(image[:, None]),
            "means": means,
            "mask": logits.softmax(1),
            "mask_logits": logits,
            "mask_posterior": log_n.softmax(-1).permute(0, 3, 1, 2)[:, :, None],
            "grad_means": self.normalise("grad_means", grads[0].detach(), chw),
            "grad_mask": self.normalise("grad_mask", grads[1].detach(), chw),
            "log_likelihood": every(self.normalise("log_likelihood", log_p.detach(), chw)),
            "leave_one_out": self.normalise("leave_one_out", torch.cat(without, 1).detach(), chw),
            "coordinates": every(self.coordinates(*image.shape[-2:])),
        }
        return {n: 0 * x if n in self.config.drop_inputs else x for n, x in rows.items()}

    def refine(self, channels: Tensor, lam: Tensor, grad: Tensor, state):
        """(B, K, F, H, W) and (B, K, 2D) twice -> the update of lambda and the LSTM's state."""
        config, w = self.config, self.weights
        x = channels.flatten(0, 1)
        for weight, bias in w["conv"]:
            pad = weight.shape[-1] // 2
            x = self.act(F.conv2d(x, weight, bias, stride=config.refinement_stride, padding=pad))
        x = x.mean((2, 3)) if config.pooling == "mean" else x.amax((2, 3))
        weight, bias = w["mlp"]
        x = self.act(x @ weight.T + bias).unflatten(0, lam.shape[:2])
        lam, grad = (0 * value if name in config.drop_inputs else value
                     for name, value in (("posterior", lam), ("grad_posterior", grad)))
        x = torch.cat([x, lam, grad], -1)
        if w["lstm"]:
            hidden, cell = state
            weight, bias = w["lstm"]  # gates: input, candidate, forget, output
            i, g, f, o = (torch.cat([x, hidden], -1) @ weight.T + bias).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            x = o.sigmoid() * cell.tanh()
            state = x, cell
        weight, bias = w["head"]
        return x @ weight.T + bias, state

    def run(self, image: Tensor, noise: Tensor) -> list[SimpleNamespace]:
        """Algorithm 1. noise (T, B, K, D), one slice a decode; the last decode is not refined."""
        batch, slots = noise.shape[1:3]
        channels, height, width = image.shape[1:]
        lam = self.weights["lambda"].expand(batch, slots, -1)
        state = (lam.new_zeros(batch, slots, self.config.lstm_size),) * 2
        prior, steps = D.Normal(torch.zeros((), dtype=lam.dtype), 1), []
        for t, epsilon in enumerate(noise):
            q = self.posterior(lam)
            z = q.loc + q.scale * epsilon  # eq. 2
            decoded = self.decode(z, height, width)
            means, logits = decoded[:, :, :channels], decoded[:, :, channels:]
            nll = -self.log_likelihood(image, means, logits).sum((1, 2, 3, 4))
            kl = D.kl_divergence(q, prior).sum((1, 2))
            step = SimpleNamespace(lam=lam, decoded=decoded, nll=nll, kl=kl)
            steps.append(step)
            if t == len(noise) - 1:
                break
            # Summed over images, which do not interact: each gets its own gradient, no 1 / B.
            objective = (nll + self.config.kl_weight * kl).sum()
            grads = torch.autograd.grad(objective, [means, logits, lam], retain_graph=True)
            step.grad_lam = grads[2]
            # No create_graph, and detached below: the double derivatives are dropped (sec. 2.3).
            step.inputs = self.inputs(image, means, logits, grads)
            step.normalised = self.normalise("grad_posterior", grads[2].detach(), (-1,))
            packed = torch.cat([*step.inputs.values()], 2)
            delta, state = self.refine(packed, lam, step.normalised, state)
            lam = lam + delta  # eq. 3
        return steps

    def loss(self, steps: list[SimpleNamespace]) -> Tensor:
        """Eq. 4, averaged over the images."""
        total, number = 0.0, len(steps)
        for t, step in enumerate(steps):
            from_zero = self.config.step_weights == "from_zero"
            weight = t / (number - 1) if from_zero else (t + 1) / number
            total = total + weight * (step.nll + self.config.kl_weight * step.kl).mean()
        return total


# -- both models, side by side ---------------------------------------------------------------------


@contextlib.contextmanager
def double_precision():
    """Coordinates are made in the default precision; float32 ones would be 1e-8 off."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def small(preset: str = "tetrominoes", **overrides) -> iodine.Config:
    """A preset with networks small enough for exact comparisons in milliseconds."""
    sizes = dict(
        num_slots=3, latent_size=3, num_steps=3, decoder_channels=(4, 5), decoder_kernel=3,
        refinement_channels=(4, 5), refinement_kernel=3, mlp_size=6, kl_weight=0.7,
    )
    return iodine.make_config(preset, **sizes | overrides)


def make_model(
    config: iodine.Config, channels: int = 3, height: int = 6, width: int = 5,
    module: ModuleType = iodine,
) -> nn.Module:  # fmt: skip
    """In float64, with biases and gains moved off the 0 and 1 that would hide mistakes."""
    torch.manual_seed(0)
    with double_precision():
        model = module.IODINE(config, channels, height, width).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_inputs(model: nn.Module, channels: int = 3, height: int = 6, width: int = 5, **sizes):
    """An image (B, C, H, W) and noise (B, T, K, D)."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    batch, slots = sizes.get("batch", 2), sizes.get("slots", config.num_slots)
    shape = batch, sizes.get("steps", config.num_steps), slots, config.latent_size
    image = torch.rand(batch, channels, height, width, generator=generator, dtype=torch.float64)
    return image, torch.randn(shape, generator=generator, dtype=torch.float64)


def bind(model: nn.Module) -> tuple[Eager, dict[str, Tensor]]:
    """The eager model with a copy of the weights, and the copies under iodine.py's names."""
    p = {
        name: value.detach().clone().contiguous().requires_grad_()
        for name, value in model.named_parameters()
    }

    def layers(prefix: str) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of each layer below `prefix`, in the order of their definition."""
        names = [n.removesuffix(".weight") for n in p if n.startswith(prefix)]
        return [(p[n + ".weight"], p[n + ".bias"]) for n in names if n + ".weight" in p]

    names = "grad_means", "grad_mask", "log_likelihood", "leave_one_out"
    gains, biases = (
        p[f"refinement.norm_{kind}"].split([len(p["decoder.last.bias"]) - 1, 1, 1, 1])
        for kind in ("weight", "bias")
    )
    norm = dict(zip(names, zip(gains, biases, strict=True), strict=True))
    weights = {
        "lambda": p["initial"],
        "decoder": [x for part in ("first", "hidden", "last") for x in layers(f"decoder.{part}")],
        "conv": layers("refinement.convs"),
        "mlp": layers("refinement.mlp")[0],
        "lstm": sum(layers("refinement.gates"), ()),
        "head": layers("refinement.head")[0],
        "norm": norm | {"grad_posterior": layers("refinement.norm_grad")[0]},
    }
    return Eager(model.config, weights), p


@contextlib.contextmanager
def recorded(model: nn.Module):
    """Yields a list that gets what each call of the refinement network was given and made."""
    calls: list[SimpleNamespace] = []

    def before(module, args):
        packed, lam, gradient, _ = args
        calls.append(SimpleNamespace(packed=packed, lam=lam, gradient=gradient))

    def normalised(module, args, output):
        calls[-1].normalised = output

    def after(module, args, output):
        calls[-1].update = output[0]

    refinement = model.refinement
    hooks = [
        refinement.register_forward_pre_hook(before),
        refinement.norm_grad.register_forward_hook(normalised),
        refinement.register_forward_hook(after),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE):
    """The largest error, as a share of the largest value; 1e-12 for what is zero by symmetry."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, not {expected.shape}"
    error = (actual - expected).abs().max().item()
    limit = tolerance * expected.abs().max().item() + 1e-12
    assert error <= limit, f"{name} is off by {error:.3g}, more than {limit:.3g}"


def compare(config: iodine.Config, module: ModuleType = iodine, channels=3, height=6, width=5):
    """AssertionError, which names the first quantity in which the two models differ."""
    model = make_model(config, channels, height, width, module)
    image, noise = make_inputs(model, channels, height, width)
    eager, copies = bind(model)
    expected = eager.run(image, noise.transpose(0, 1))
    with recorded(model) as calls:
        steps = model.infer(image, noise, training=True)

    assert len(steps) == len(expected) == len(calls) + 1, "T decodes, T - 1 refinements"
    for t, (step, want) in enumerate(zip(steps, expected, strict=True)):
        assert_close(f"lambda at step {t}", step.posterior, want.lam)
        assert_close(f"decoded at step {t}", step.decoded, want.decoded)
        assert_close(f"nll at step {t}", step.nll, want.nll)
        assert_close(f"kl at step {t}", step.kl, want.kl)
        if t == len(calls):
            break
        assert {n: x.shape[2] for n, x in want.inputs.items()} == iodine.input_widths(channels)
        parts = calls[t].packed.split([*iodine.input_widths(channels).values()], 2)
        for name, part in zip(want.inputs, parts, strict=True):
            if name not in config.drop_inputs:  # those are zeroed later, inside of the network
                assert_close(f"{name} at step {t}", part, want.inputs[name])
        assert_close(f"gradient of lambda at step {t}", calls[t].gradient, want.grad_lam)
        assert_close(f"its LayerNorm at step {t}", calls[t].normalised, want.normalised)

    # The gradients of all parameters, through all steps.
    loss, wanted = model.loss(image, noise)["loss"], eager.loss(expected)
    assert_close("loss", loss, wanted)
    loss.backward()
    wanted.backward()
    for name, parameter in model.named_parameters():
        zero = torch.zeros_like(parameter)  # T = 1 never calls the refinement network
        actual, want = (zero if g is None else g for g in (parameter.grad, copies[name].grad))
        assert_close(f"gradient of {name}", actual, want)


LSTM = dict(preset="multi_dsprites", lstm_size=5)
CASES: dict[str, tuple[dict, dict]] = {  # name: (Config, image)
    "paper": (dict(), dict()),
    "LSTM": (LSTM, dict(height=7)),
    "quick": (dict(preset="quick", decoder_kernel=1, kl_weight=0.1), dict(height=8, width=7)),
    "max pooling, relu": (dict(pooling="max", activation="relu"), dict()),
    "5x5": (dict(decoder_kernel=5, refinement_kernel=5), dict()),
    "stride 2, gray": (dict(refinement_stride=2), dict(height=5, width=8, channels=1)),
    "K = 1": (dict(num_slots=1), dict()),
    "K = 2": (dict(num_slots=2), dict()),
    "K = 5": (LSTM | dict(num_slots=5), dict()),
    "T = 1": (dict(num_steps=1), dict()),
    "T = 5": (dict(num_steps=5, kl_weight=1.0), dict()),
    "deconv, cropped": (dict(decoder="deconv"), dict(height=12, width=10)),
    "deconv, doubled twice": (dict(decoder="deconv", num_slots=2, num_steps=2), dict(height=17)),
    "inputs dropped": (
        dict(drop_inputs=("means", "grad_mask", "coordinates", "posterior")), dict(),
    ),
    "no gradient of lambda": (dict(drop_inputs=("grad_posterior",)), dict()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_eager_model(case):
    config, image = CASES[case]
    compare(small(**config), **image)


@pytest.mark.parametrize("backend", [TRITON])
def test_equals_the_eager_model_on_the_kernels(backend, monkeypatch):
    """The fused functions stand in for the lines of iodine.py, which are not called."""
    for name in ("mixture_log_likelihood", "refinement_inputs"):
        monkeypatch.delattr(iodine, name)
        monkeypatch.setattr(iodine, name, None, raising=False)
    with kernels.use(backend):
        compare(small(num_steps=2), height=4, width=3)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("slots", "channels", "height", "width"),
                         [(3, 3, 5, 4), (1, 1, 3, 3), (5, 3, 1, 7)])  # fmt: skip
def test_the_fused_inputs_are_these_lines(backend, dtype, slots, channels, height, width):
    """kernels.refinement_inputs and mixture_log_likelihood: every value and every gradient."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(shape, generator=generator, dtype=dtype)  # noqa: E731
    image, decoded = rand(2, channels, height, width), rand(2, slots, channels + 1, height, width)
    gains = rand(channels + 3), rand(channels + 3)
    maps = iodine.coordinate_maps(height, width).to(dtype)
    pull = rand(2, slots, sum(iodine.input_widths(channels).values()), height, width)

    def run(inputs: Callable, likelihood: Callable) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (decoded, *gains)]
        packed, log_p, grad_decoded = inputs(image, *leaves, maps, 0.3)
        only = likelihood(image, leaves[0], 0.3)
        ((packed * pull).sum() + log_p.square().sum() + only.sum()).backward()
        return [packed.detach(), log_p.detach(), only.detach(), grad_decoded,
                *(x.grad for x in leaves)]

    want = run(iodine.refinement_inputs, iodine.mixture_log_likelihood)
    with kernels.use(backend):
        actual = run(kernels.refinement_inputs, kernels.mixture_log_likelihood)
    names = "packed", "log p", "eq. 1", "grad_decoded", "d decoded", "d gain", "d bias"
    for name, a, b in zip(names, actual, want, strict=True):
        assert_close(name, a, b, 1e-10 if dtype == torch.float64 else 1e-4)


def test_extreme_colours_and_logits_stay_finite_in_float32():
    """A slot that owns a pixel, and colours hundreds of sigmas away; float64 says what is right."""
    image = torch.tensor([0.0, 0.5, 1.0]).expand(1, 1, 1, 3)
    decoded = torch.tensor([[0.0, 40.0], [5.0, -40.0], [-3.0, 0.0]])  # mean and logit of each slot
    decoded = decoded[None, :, :, None, None].expand(1, 3, 2, 1, 3)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        gains = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
        maps = iodine.coordinate_maps(1, 3).to(dtype)
        return iodine.refinement_inputs(image.to(dtype), decoded.to(dtype), *gains, maps, 0.01)

    for actual, want in zip(run(torch.float32), run(torch.float64), strict=True):
        assert actual.isfinite().all()
        assert_close("value", actual.double(), want, 1e-3)


@pytest.mark.parametrize("case", ["paper", "LSTM", "quick"])
def test_sigma_may_be_a_tensor(case):
    """Of 0 dimensions: the same loss and gradients, and it is the sigma that counts."""
    model = make_model(small(**CASES[case][0], sigma=0.3))
    image, noise = make_inputs(model)
    results = []
    for sigma in (None, image.new_tensor(0.3), image.new_tensor(0.6)):
        model.zero_grad()
        loss = model.loss(image, noise, sigma)["loss"]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results[:2], strict=True):
        assert_close("loss or gradient", b, a, 1e-12)
    model.config.sigma = 0.6
    assert_close("loss at 0.6", results[2][0], model.loss(image, noise)["loss"], 1e-12)
    assert abs(results[2][0] / results[0][0] - 1) > 0.1


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "latent", "lstm"), [("tetrominoes", 32, 0),
                                                        ("multi_dsprites", 16, 128)])
def test_the_papers_networks_have_the_sizes_of_its_tables(preset, latent, lstm):
    """Appendix C.2 and C.3: inputs, outputs and kernel of every layer; 17 input channels."""
    model = iodine.IODINE(iodine.make_config(preset), 3, 35, 35)
    conv = lambda i, o: 25 * i * o + o  # noqa: E731
    dense = lambda i, o: i * o + o  # noqa: E731
    decoder = conv(latent + 2, 32) + 3 * conv(32, 32) + conv(32, 4)
    joined = 128 + 4 * latent  # the table's row "Concat": 256 and 192
    assert joined == {"tetrominoes": 256, "multi_dsprites": 192}[preset]
    refinement = conv(17, 32) + 2 * conv(32, 32) + dense(32, 128)
    refinement += dense(joined + lstm, 4 * lstm) + dense(lstm or joined, 2 * latent)
    norms, initial = 2 * (6 + 2 * latent), 2 * latent
    assert sum(p.numel() for p in model.parameters()) == decoder + refinement + norms + initial


# -- the objective and its gradient ----------------------------------------------------------------


@pytest.mark.parametrize("case", ["paper", "LSTM"])
def test_the_gradient_of_lambda_is_the_slope_of_the_bound_with_the_noise_held_fixed(case):
    """Central differences of L(lambda) = -log p(x|loc + scale * noise) + weight * KL."""
    model = make_model(small(**CASES[case][0]))
    image, noise = make_inputs(model, batch=1)
    eager, _ = bind(model)

    @torch.no_grad()
    def parts(lam: Tensor, epsilon: Tensor) -> Tensor:
        q = eager.posterior(lam)
        decoded = eager.decode(q.loc + q.scale * epsilon, *image.shape[2:])
        nll = -eager.log_likelihood(image, decoded[:, :, :3], decoded[:, :, 3:]).sum()
        kl = D.kl_divergence(q, D.Normal(0.0, 1.0)).sum()
        return torch.stack([nll, model.config.kl_weight * kl])

    with recorded(model) as calls:
        model.infer(image, noise)
    for t, call in enumerate(calls):
        lam, step = call.lam.detach(), 1e-5
        slopes = []
        for nudge in step * torch.eye(lam.numel(), dtype=lam.dtype).view(-1, *lam.shape):
            ahead, behind = parts(lam + nudge, noise[:, t]), parts(lam - nudge, noise[:, t])
            slopes.append((ahead - behind) / (2 * step))
        nll, kl = torch.stack(slopes, 1).view(2, *lam.shape)
        assert_close(f"step {t}", call.gradient, nll + kl, 1e-6)
        # Were one of these zero, the comparison would not notice that it is missing.
        raw = nll[..., model.config.latent_size :]  # only the noise leads to the raw scales
        assert raw.abs().max() > 1e-3 * nll.abs().max()
        assert kl.abs().max() > 1e-4 * nll.abs().max()


def test_inference_starts_at_the_prior_of_the_paper():
    """Appendix C: initially q(z) = N(0, 1), where the KL is 0."""
    model = iodine.IODINE(iodine.make_config("tetrominoes"), 3, 35, 35)
    loc, scale = model.posterior(model.initial)
    assert (loc == 0).all() and torch.allclose(scale, torch.ones(32))
    assert model.kl_terms(loc, scale).abs().max() < 1e-6


@pytest.mark.parametrize(("kind", "weights"), [("t/T", [0.2, 0.4, 0.6, 0.8, 1.0]),
                                               ("from_zero", [0.0, 0.25, 0.5, 0.75, 1.0])])
def test_the_loss_is_the_weighted_sum_of_equation_4(kind, weights):
    model = make_model(small(step_weights=kind, num_steps=5, kl_weight=0.3))
    image, noise = make_inputs(model)
    steps = model.infer(image, noise)
    bounds = [(s.nll + 0.3 * s.kl).mean() for s in steps]
    result = model.loss(image, noise)
    want = sum(w * bound for w, bound in zip(weights, bounds, strict=True))
    assert_close("loss", result["loss"], want)
    assert_close("elbo", result["elbo"], -(steps[-1].nll + steps[-1].kl).mean())  # weight 1
    assert not (result["elbo"].requires_grad or result["decoded"].requires_grad)


# -- symmetries, evaluation, precision -------------------------------------------------------------


@pytest.mark.parametrize("case", ["LSTM", "quick"])
def test_permuting_the_slots_of_the_noise_permutes_the_outputs(case):
    """Slots start equal and share all weights: only their noise tells them apart."""
    model = make_model(small(**CASES[case][0] | dict(num_slots=4)))
    image, noise = make_inputs(model)
    order = torch.tensor([2, 0, 3, 1])
    for a, b in zip(model.infer(image, noise), model.infer(image, noise[:, :, order]), strict=True):
        assert_close("decoded", b.decoded, a.decoded[:, order])
        assert_close("lambda", b.posterior, a.posterior[:, order])
        assert_close("nll", b.nll, a.nll)
        assert_close("kl", b.kl, a.kl)
    # The slots do differ, so the order could have mattered.
    assert (a.decoded[:, 0] - a.decoded[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["LSTM", "quick"])
def test_an_image_has_the_same_result_alone_and_in_a_batch(case, training):
    """Nothing normalises over the batch, and the gradient inputs carry no 1 / B."""
    model = make_model(small(**CASES[case][0]))
    image, noise = make_inputs(model, batch=3)
    together = model.infer(image, noise, training=training)
    alone = model.infer(image[:1], noise[:1], training=training)
    for a, b in zip(together, alone, strict=True):
        for name in a._fields:
            assert_close(name, getattr(b, name), getattr(a, name)[:1])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", ["LSTM", "paper", "quick"])
def test_inference_that_does_not_train_has_the_same_values_and_no_graph(case, grad):
    """Whatever the caller's grad mode. Who keeps the steps, as figures do, keeps no graphs."""
    model = make_model(small(**CASES[case][0]))
    image, noise = make_inputs(model, steps=8, slots=5)  # more of both than in training
    with torch.set_grad_enabled(grad):
        training = model.infer(image, noise, 8, training=True)
        plain = model.infer(image, noise, 8)
        assert torch.is_grad_enabled() == grad
    assert len(plain) == 8 and training[-1].nll.requires_grad
    for a, b in zip(training, plain, strict=True):
        for name in a._fields:
            assert_close(name, getattr(b, name), getattr(a, name))
            assert not getattr(b, name).requires_grad, name


def saved_tensors(model: nn.Module, steps: int, training: bool) -> list[int]:
    """How many tensors wait for a backward pass at each refinement of one inference."""
    alive: weakref.WeakSet = weakref.WeakSet()
    counts: list[int] = []

    class Saved:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor.detach()  # an output would keep its own node, hence itself, alive
            alive.add(self)

    hook = model.refinement.register_forward_hook(lambda *_: counts.append(len(alive)))
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        model.infer(*make_inputs(model, steps=steps), steps, training)
    hook.remove()
    return counts


@pytest.mark.parametrize("drop_inputs", [(), ("grad_posterior",)])
def test_memory_does_not_grow_with_the_steps_unless_training(drop_inputs):
    model = make_model(small("multi_dsprites", lstm_size=5, drop_inputs=drop_inputs))
    counts = saved_tensors(model, 9, training=False)
    assert len(counts) == 8 and len(set(counts[1:])) == 1, counts
    growing = saved_tensors(model, 3, training=True)
    assert growing[1] > growing[0] + 10  # in training it has to grow, and the count shows it


def test_under_autocast_the_decoder_ends_in_float32():
    """A colour rounded to bfloat16 (8 bits) would be off by up to 0.04 sigma in each pixel."""
    for decoder in ("broadcast", "deconv"):
        torch.manual_seed(0)
        model = iodine.IODINE(small(decoder=decoder, decoder_channels=(16, 16)), 3, 8, 8)
        image, noise = (x.float() for x in make_inputs(model, height=8, width=8))
        with torch.autocast("cpu", torch.bfloat16):
            decoded = model.decode(noise[:, 0])
            parts = model.loss(image, noise)
        assert decoded.dtype == parts["loss"].dtype == torch.float32
        assert (decoded != decoded.bfloat16()).float().mean() > 0.9  # not merely cast at the end
        assert_close("decoded", decoded, model.decode(noise[:, 0]), 0.02)
        parts["loss"].backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("dropped", iodine.INPUTS)
def test_a_dropped_input_has_no_influence_and_the_others_keep_theirs(dropped):
    """Each input is changed by hand where the refinement network receives it."""
    model = make_model(small(drop_inputs=(dropped,)))
    with recorded(model) as calls:
        model.infer(*make_inputs(model))
    call, widths = calls[0], [*iodine.input_widths(3).values()]
    for i, name in enumerate(iodine.INPUTS):
        packed, lam, gradient = call.packed.clone(), call.lam, call.gradient
        if name == "posterior":
            lam = lam + 1
        elif name == "grad_posterior":
            gradient = gradient.flip(-1)
        else:
            packed.split(widths, 2)[i].add_(1)
        update, _ = model.refinement(packed, lam, gradient, None)
        assert torch.equal(update, call.update) == (name == dropped), name


# -- scores ----------------------------------------------------------------------------------------


class WithoutMasks(MiniSprites):
    """Scenes as pictures from disk have them."""

    def scenes(self, index: Tensor) -> data.Batch:
        return super().scenes(index)._replace(masks=None, present=None, factors={})


def test_images_without_masks_are_scored_and_drawn_without_them(tmp_path):
    scenes = WithoutMasks(size=8, sprite=3, min_objects=2, max_objects=2)
    model = iodine.build(small("quick", decoder_kernel=1, num_steps=2), scenes)
    results = iodine.evaluate(model, scenes, count=8)
    assert results["metrics"].keys() == {"mse", "elbo", "nll", "kl"}
    assert iodine.further_scores(model, scenes) == {}
    iodine.draw(model, scenes, tmp_path, results)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_a_scene_whose_inference_diverges_is_left_out_and_counted():
    scenes = MiniSprites(size=8, sprite=3, min_objects=2, max_objects=2)
    model = iodine.build(small("quick", decoder_kernel=1, num_steps=2), scenes)
    with torch.no_grad():
        model.refinement.head.bias.fill_(math.inf)
    first, second = iodine.score(model, scenes, 2, 3, count=8)
    assert first["ari_fg"]["n"] == 8 and second["ari_fg"]["n"] == 0
    assert second["elbo"]["left_out"] == 8 and second["mse"]["mean"] is None


# -- learning --------------------------------------------------------------------------------------

LEARNING = dict(
    preset="quick", num_slots=3, num_steps=3, latent_size=8, refinement_channels=(32, 32),
    mlp_size=64, decoder_channels=(32, 32, 32), decoder_kernel=1, kl_weight=0.1,
)  # fmt: skip


def test_it_learns_to_separate_the_objects_of_unseen_scenes():
    """Two objects on 8 x 8 pixels, always new scenes: 300 steps on one core take some seconds."""
    scenes = MiniSprites(size=8, sprite=3, min_objects=2, max_objects=2)
    model = iodine.build(small(**LEARNING), scenes)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 30)
        index = torch.arange(16) + 16 * step
        loss = model.loss(scenes.scenes(index).image, model.noise(scenes, index))["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), model.config.clip)
        optimizer.step()
    index = torch.arange(64) + 10**7
    batch = scenes.scenes(index)
    last = model.infer(batch.image, model.noise(scenes, index))[-1]
    mean, masks, _ = iodine.reconstruct(last.decoded)
    single = batch.image.mean(0, keepdim=True).expand_as(batch.image)  # the best single image
    mse, baseline = (metrics.mse(batch.image, x).mean() for x in (mean, single))
    assert mse < baseline / 1.5 and metrics.ari(batch.masks, masks).mean() > 0.35


# -- mutants ---------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[str, str, dict]] = {  # name: (text of iodine.py, its mutation, Config)
    "gradient of lambda without the KL": (
        "torch.full_like(kl, c.kl_weight)", "torch.zeros_like(kl)", {}),
    "gradient of lambda with the KL unweighted": (
        "torch.full_like(kl, c.kl_weight)", "torch.ones_like(kl)", {}),
    "gradient of lambda does not pass through the noise": (
        "z = loc + scale * noise[:, t]", "z = loc + scale.detach() * noise[:, t]", {}),
    "gradient of lambda not stopped": ("retain_graph=training", "create_graph=training", {}),
    "gradient of lambda normalised per half": (
        "self.norm_grad = nn.LayerNorm(lam_size)",
        "self.norm_grad = type('Halves', (nn.LayerNorm,), {'forward': lambda m, x: m.bias"
        " + m.weight * F.layer_norm(x.unflatten(-1, (2, -1)), (lam_size // 2,)).flatten(-2)})("
        "lam_size)", {}),
    "gradient of lambda of the batch's mean, a wide sigma": (
        "self.norm_grad(gradient)", "self.norm_grad(gradient / len(lam))", dict(sigma=1.0)),
    "image inputs stopped": ("f(packed, lam,", "f(packed.detach(), lam,", {}),
    "lambda stopped": ("f(packed, lam,", "f(packed, lam.detach(),", {}),
    "lambda replaced": ("lam = lam + update", "lam = update", {}),
    "the same noise in every step": ("scale * noise[:, t]", "scale * noise[:, 0]", {}),
    "exponential instead of softplus": ("return loc, F.softplus(raw)", "return loc, raw.exp()", {}),
    "KL of mean and scale exchanged": ("/ 2 - scale.log()", "/ 2 - loc.exp().log()", {}),
    "nll a mean over the pixels": (
        'nll = -reduce(log_p, "b h w -> b", "sum")',
        'nll = -reduce(log_p, "b h w -> b", "mean")', {}),
    "weights reversed": ("(t - blind) / (c.num_steps - blind)",
                         "(c.num_steps + 1 - t) / c.num_steps", {}),
    "last loss left out": ("(t - blind) / (c.num_steps - blind)",
                           "t / c.num_steps * (t < c.num_steps)", {}),
    "weights that start at zero": ('c.step_weights == "from_zero"', "True", {}),
    "KL unweighted in the loss": ("(step.nll + c.kl_weight * step.kl)", "(step.nll + step.kl)", {}),
    "hidden state not carried": ("update, state = f(", "update, _ = f(", {}),
    "cell state not carried": ("state = x, cell", "state = x, 0 * cell", {}),
    "forget and input gate exchanged": ("i, g, f, o = self", "f, g, i, o = self", {}),
    "rows and columns exchanged": (
        'torch.stack(torch.meshgrid(rows, cols, indexing="ij"))',
        'torch.stack(torch.meshgrid(rows, cols, indexing="ij")[::-1])', {}),
    "no coordinates in the decoder": ("F.conv2d(self.coordinates", "F.conv2d(0 * self.coordinates",
                                      {}),
    "no activation in the first layer": (
        "self.activation(kernels.broadcast_conv(z, taps_z, response))",
        "kernels.broadcast_conv(z, taps_z, response)", {}),
    "gain left out": ("config.coordinate_gain * coord", "coord", dict(coordinate_gain=3.0)),
    "slots mixed with images": ("unflatten(0, z.shape[:2])",
                                "unflatten(0, z.shape[:2][::-1]).transpose(0, 1)", {}),
    "sum instead of mean pooling": ("x = x.mean((-2, -1))", "x = x.sum((-2, -1))", {}),
    # eq. 1 and the inputs of appendix C
    "a mixture for each colour": (  # as several ports have it: sum_c log sum_k m_k N(x_c)
        "return joint.logsumexp(1)[:, 0]",
        "return sum((mask_logits.log_softmax(1) + log_density(image[:, [c]],"
        " means[:, :, [c]], sigma)).logsumexp(1)[:, 0] for c in range(means.shape[2]))", {}),
    "normaliser of one colour": ("- means.shape[2] * (log_sigma", "- (log_sigma", {}),
    "gradient wrt masks": ("grad_mask = mask - r", "grad_mask = (mask - r) / mask", {}),
    "gradient wrt means of the other sign": ("r * (means - image[:, None])",
                                             "r * (image[:, None] - means)", {}),
    "gradient wrt means without the mask": ("grad_means = r *", "grad_means = mask_posterior *",
                                            {}),
    "none of the inputs stopped": ("with torch.no_grad():  # SG", "with torch.enable_grad():", {}),
    "likelihood not stopped": ("        normalised = torch.cat(", "        torch.set_grad_enabled("
                               "True); normalised = torch.cat(", {}),
    "gradient wrt means not stopped": (  # its values are the same, its graph is the formula's
        "    return packed, log_likelihood[:, 0, 0],",
        "    free = F.layer_norm(x := joint.softmax(1) * (means - image) / sigma**2, x.shape[2:])\n"
        "    free = (free - free.detach()) * norm_weight[:3, None, None]\n"
        "    packed = packed + F.pad(free, (0, 0, 0, 0, 9, 5))\n"
        "    return packed, log_likelihood[:, 0, 0],", {}),
    "posterior with the masks": ("mask_posterior = log_n", "mask_posterior = joint", {}),
    "leave-one-out not renormalised": (
        "logsumexp_of_others(joint) - logsumexp_of_others(log_masks)",
        "logsumexp_of_others(joint)", {}),
    "leave-one-out leaves out none": (
        "leave_one_out = logsumexp_of_others(joint) - logsumexp_of_others(log_masks)",
        "leave_one_out = log_likelihood", {}),
    "leave-one-out of the neighbour": ("map(torch.logaddexp, before[:-1], after[1:])",
                                       "map(torch.logaddexp, before[1:], after[1:])", {}),
    "likelihood instead of its logarithm": (
        "stopped = grad_means, grad_mask, log_likelihood,",
        "stopped = grad_means, grad_mask, log_likelihood.exp(),", {}),
    "LayerNorm of each channel": (
        "F.layer_norm(x, x.shape[2:])", "F.layer_norm(x, x.shape[3:])", {}),
    "gains of other channels": ("normalised * norm_weight[:", "normalised * norm_weight.flip(0)[:",
                                {}),
    "mask logits for masks": ("mask = log_masks.exp()", "mask = mask_logits", {}),
}  # fmt: skip
MUTATED = LSTM | dict(sigma=0.5)


@pytest.mark.parametrize("overrides", [{}, dict(sigma=1.0), dict(coordinate_gain=3.0)])
def test_the_unmutated_source_agrees(overrides):
    """Otherwise the next test would prove nothing."""
    compare(small(**MUTATED | overrides), mutated(iodine))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    old, new, overrides = MUTANTS[name]
    module = mutated(iodine, old, new)
    with pytest.raises(AssertionError, match=r"off by|refinements"):
        compare(small(**MUTATED | overrides), module)
