"""iodine.py against an own IODINE, written from the paper with autograd and torch.distributions.

Both get the same weights and noise in float64 and must agree on every intermediate and on the
gradient of every parameter. Then what follows from the mathematics: the gradient inputs against
finite differences, symmetries, memory; and mutants of iodine.py, which must all be found out.

Axes: B batch, K slots, T decodes, D latent, C H W image, F input channels of the refinement.
"""

import contextlib
import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
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


# -- an own IODINE, written from the paper (algorithm 1, appendix C) before iodine.py was read -----


class Logistic(D.Distribution):
    """torch has none, and its softplus is only good to 2e-9, so not D.SigmoidTransform either."""

    arg_constraints: ClassVar = {}
    support = D.constraints.real

    def __init__(self, loc: Tensor, scale: float):
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        distance = (value - self.loc).abs() / self.scale
        return -distance - 2 * torch.log1p(torch.exp(-distance)) - math.log(self.scale)


class Eager:
    """Algorithm 1 with autograd for every gradient and one mixture rebuilt for each left-out slot.

    `weights` holds lambda, decoder.i, conv.i, mlp.i, lstm, head (weight, bias) and norm.<input>
    (gain, bias): lists and pairs of tensors that require grad.
    """

    def __init__(self, config: iodine.Config, weights: dict[str, Any]):
        self.config, self.weights = config, weights
        self.act = {"elu": F.elu, "relu": F.relu}[config.activation]

    # generative model

    def coordinates(self, height: int, width: int, gain: float = 1.0) -> Tensor:
        """Two channels, rows then columns, from -gain to gain: (2, H, W)."""
        rows, cols = (torch.linspace(-gain, gain, n, dtype=torch.float64) for n in (height, width))
        return torch.stack(torch.meshgrid(rows, cols, indexing="ij"))

    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """(B, K, D) -> (B, K, C+1, H, W): every slot on its own, its latent at every pixel."""
        batch = z.shape[:2]
        z = z.flatten(0, 1)
        *hidden, last = self.weights["decoder"]
        if self.config.decoder == "deconv":
            return self.deconvolve(z, hidden, last)[..., :height, :width].unflatten(0, batch)
        if self.config.constants:
            z = torch.cat([z, torch.full_like(z[:, :1], 5.0)], 1)
        grid = self.coordinates(height, width, self.config.coordinate_gain)
        # The image that iodine.py never builds.
        tiled = z[:, :, None, None].expand(-1, -1, height, width)
        x = torch.cat([tiled, grid.expand(len(z), -1, -1, -1)], 1)
        for weight, bias in hidden:
            x = self.act(F.conv2d(x, weight, bias, padding="same"))
        return F.conv2d(x, *last, padding="same").unflatten(0, batch)

    def deconvolve(self, z: Tensor, layers: list, last: tuple[Tensor, Tensor]) -> Tensor:
        """The ablation's decoder: 8 x 8 pixels, doubled by every layer but the last two."""
        for weight, bias in self.weights["decoder_mlp"]:
            z = F.elu(z @ weight.T + bias)
        x = z.unflatten(1, (8, 8, 8))
        *doubling, (weight, bias) = layers
        for up, shift in doubling:
            height, width = 2 * x.shape[2], 2 * x.shape[3]
            x = F.conv_transpose2d(x, up, shift, stride=2)  # with a margin of 2 before, 1 after
            x = F.elu(x[..., 2 : 2 + height, 2 : 2 + width])
        return F.conv2d(F.elu(F.conv2d(x, weight, bias, padding=2)), *last, padding=2)

    def components(self, means: Tensor) -> D.Distribution:
        """Densities of a pixel under each slot, all channels together: batch (B, H, W, K)."""
        # Independent multiplies the colours: one mixture for a pixel, not one for a channel.
        density = D.Normal if self.config.component == "gaussian" else Logistic
        return D.Independent(density(means.permute(0, 3, 4, 1, 2), self.config.sigma), 1)

    def log_likelihood(self, image: Tensor, means: Tensor, logits: Tensor) -> Tensor:
        """log p(x | z) of each pixel, eq. 1: (B, 1, 1, H, W)."""
        mixture = D.MixtureSameFamily(
            D.Categorical(logits=logits.squeeze(2).permute(0, 2, 3, 1)), self.components(means)
        )
        return mixture.log_prob(image.permute(0, 2, 3, 1))[:, None, None]

    def posterior(self, lam: Tensor) -> D.Normal:
        """q(z | x): the first half of lambda is the mean, the second the raw scale."""
        loc, raw = lam.chunk(2, -1)
        scale = torch.log1p(torch.exp(raw))
        if self.config.posterior_scale == "sqrt_softplus":
            scale = scale.sqrt()
        return D.Normal(loc, scale)

    # inference

    def normalise(self, name: str, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """LayerNorm over all of `axes` together; gain and bias for each index of the first axis."""
        gain, bias = self.weights["norm"][name]
        centred = x - x.mean(axes, keepdim=True)
        unit = centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()
        shape = (-1,) + (1,) * (len(axes) - 1)
        return unit * gain.reshape(shape) + bias.reshape(shape)

    def refinement_coordinates(self, height: int, width: int) -> Tensor:
        """Fixed channels: 2 of the paper; 8 cosines and a constant of the released code."""
        if self.config.coordinates == "linear":
            grid = self.coordinates(height, width)
        else:  # cos(i pi u) cos(j pi v), 3 x 3 of them less the constant one
            v, u = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (height, width))
            grid = torch.stack([
                torch.cos(j * math.pi * v)[:, None] * torch.cos(i * math.pi * u)
                for j in range(3) for i in range(3) if i or j
            ])
        if self.config.constants:
            grid = torch.cat([grid, torch.full_like(grid[:1], 0.5)])
        return grid

    def inputs(self, image: Tensor, means: Tensor, logits: Tensor, grads) -> dict[str, Tensor]:
        """The image-sized rows of appendix C's table: name -> (B, K, channels, H, W)."""
        config, slots = self.config, means.shape[1]
        log_p = self.log_likelihood(image, means, logits)
        # A mixture of the other slots only: the softmax makes their masks sum to 1 again.
        without = []
        for k in range(slots):
            others = [j for j in range(slots) if j != k] or [0]  # an only slot is not left out
            without.append(self.log_likelihood(image, means[:, others], logits[:, others]))
        without = torch.cat(without, 1)
        if config.log_ratio:
            without = log_p - without
        # Who explains the pixel best, whatever the masks say.
        log_n = self.components(means).log_prob(image.permute(0, 2, 3, 1)[..., None, :])
        if config.posterior_epsilon:
            share = log_n.exp() / (log_n.exp().sum(-1, keepdim=True) + config.posterior_epsilon)
        else:
            share = log_n.softmax(-1)

        every = lambda x: x.expand(len(image), slots, *x.shape[-3:])  # noqa: E731
        chw = (-3, -2, -1)
        rows = {
            "image": every(image[:, None]),
            "means": means,
            "mask": logits.softmax(1),
            "mask_logits": logits,
            "mask_posterior": share.permute(0, 3, 1, 2)[:, :, None],
            "grad_means": self.normalise("grad_means", grads[0].detach(), chw),
            "grad_mask": self.normalise("grad_mask", grads[1].detach(), chw),
            "log_likelihood": every(self.normalise("log_likelihood", log_p.detach(), chw)),
            "leave_one_out": self.normalise("leave_one_out", without.detach(), chw),
            "coordinates": every(self.refinement_coordinates(*image.shape[-2:])),
        }
        dropped = config.drop_inputs
        return {name: 0 * x if name in dropped else x for name, x in rows.items()}

    def refine(self, channels: Tensor, lam: Tensor, grad: Tensor, state):
        """(B, K, F, H, W) and (B, K, 2D) twice -> the update of lambda and the LSTM's state."""
        config, w = self.config, self.weights
        x = channels.flatten(0, 1)
        for weight, bias in w["conv"]:
            pad = weight.shape[-1] // 2
            x = self.act(F.conv2d(x, weight, bias, stride=config.refinement_stride, padding=pad))
        x = x.mean((2, 3)) if config.pooling == "mean" else x.amax((2, 3))
        for i, (weight, bias) in enumerate(w["mlp"]):
            x = x @ weight.T + bias
            if not (config.mlp_linear_end and i == len(w["mlp"]) - 1):
                x = self.act(x)
        lam = 0 * lam if "posterior" in config.drop_inputs else lam
        x = [x.unflatten(0, lam.shape[:2]), lam, grad]
        if config.constants:
            x.append(torch.full_like(lam[..., :1], 0.5))
        x = torch.cat(x, -1)
        if w["lstm"]:
            hidden, cell = state
            weight, bias = w["lstm"]  # gates: input, candidate, forget, output (as in Sonnet)
            i, g, f, o = (torch.cat([x, hidden], -1) @ weight.T + bias).chunk(4, -1)
            cell = (f + config.forget_bias).sigmoid() * cell + i.sigmoid() * g.tanh()
            x = o.sigmoid() * cell.tanh()
            state = x, cell
        weight, bias = w["head"]
        return x @ weight.T + bias, state

    def run(self, image: Tensor, noise: Tensor) -> list[SimpleNamespace]:
        """Algorithm 1. noise (T, B, K, D), one slice a decode; the last decode is not refined."""
        config = self.config
        batch, slots = noise.shape[1:3]
        channels, height, width = image.shape[1:]
        # The initial posterior and a state of zeros are the same for every image and slot.
        lam = self.weights["lambda"].expand(batch, slots, -1)
        state = (lam.new_zeros(batch, slots, config.lstm_size),) * 2
        variance = torch.tensor(config.prior_variance, dtype=lam.dtype)
        prior = D.Normal(torch.zeros_like(variance), variance.sqrt())
        steps = []
        for t, epsilon in enumerate(noise):
            q = self.posterior(lam)
            z = q.loc + q.scale * epsilon  # eq. 2
            decoded = self.decode(z, height, width)
            means, logits = decoded[:, :, :channels], decoded[:, :, channels:]
            nll = -self.log_likelihood(image, means, logits).sum((1, 2, 3, 4))
            kl = D.kl_divergence(q, prior).sum((1, 2))
            step = SimpleNamespace(lam=lam, z=z, decoded=decoded, nll=nll, kl=kl)
            steps.append(step)
            if t == len(noise) - 1:
                break
            # Summed over images, which do not interact: each gets its own gradient, no 1 / B.
            objective = (nll + config.kl_weight * kl).sum()
            grads = torch.autograd.grad(objective, [means, logits, lam], retain_graph=True)
            step.grad_lam = grads[2]
            # No create_graph, and detached below: the double derivatives are dropped (sec. 2.3).
            step.inputs = self.inputs(image, means, logits, grads)
            step.normalised = self.normalise("grad_posterior", grads[2].detach(), (-1,))
            if "grad_posterior" in config.drop_inputs:
                step.normalised = 0 * step.normalised
            delta, state = self.refine(torch.cat([*step.inputs.values()], 2), lam,
                                       step.normalised, state)
            lam = lam + delta  # eq. 3
        return steps

    def loss(self, steps: list[SimpleNamespace]) -> Tensor:
        """Eq. 4, averaged over the images."""
        total, number = 0.0, len(steps)
        for t, step in enumerate(steps):
            released = self.config.step_weights == "from_zero"
            weight = t / (number - 1) if released else (t + 1) / number
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


def small(preset: str = "tetrominoes", variant: str = "paper", **overrides) -> iodine.Config:
    """A preset with networks small enough for exact comparisons in milliseconds."""
    sizes = dict(
        num_slots=3, latent_size=3, num_steps=3, decoder_channels=(4, 5), decoder_kernel=3,
        refinement_channels=(4, 5), refinement_kernel=3, mlp_sizes=(6,), kl_weight=0.7,
    )
    return iodine.make_config(preset, variant, **sizes | overrides)


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
    steps = sizes.get("steps", config.num_steps + config.extra_decode)
    image = torch.rand(batch, channels, height, width, generator=generator, dtype=torch.float64)
    shape = batch, steps, slots, config.latent_size
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
    # iodine.py keeps the gains of the four normalised images in one vector: C + 1 + 1 + 1.
    gains, biases = (
        p[f"refinement.norm_{kind}"].split([len(p["decoder.last.bias"]) - 1, 1, 1, 1])
        for kind in ("weight", "bias")
    )
    norm = dict(zip(names, zip(gains, biases, strict=True), strict=True))
    weights = {
        "lambda": p["initial"],
        "decoder": [x for part in ("first", "hidden", "last") for x in layers(f"decoder.{part}")],
        "decoder_mlp": layers("decoder.mlp"),
        "conv": layers("refinement.convs"),
        "mlp": layers("refinement.mlp"),
        "lstm": sum(layers("refinement.lstm"), ()),
        "head": layers("refinement.head")[0],
        "norm": norm | {"grad_posterior": layers("refinement.norm_grad")[0]},
    }
    return Eager(model.config, weights), p


@contextlib.contextmanager
def recorded(model: nn.Module):
    """Yields a list that gets what each call of the refinement network was given and made."""
    calls: list[SimpleNamespace] = []

    # Hooks see what is handed over between the parts and change nothing.
    def before(module, args):
        packed, lam, gradient, _ = args
        calls.append(SimpleNamespace(packed=packed, lam=lam, gradient=gradient, normalised=None))

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
        steps = list(model.infer(image, noise))

    assert len(steps) == len(expected) == len(calls) + 1, "T decodes, T - 1 refinements"
    # In the order of the algorithm, so that the first message names the cause.
    for t, (step, want) in enumerate(zip(steps, expected, strict=True)):
        assert_close(f"lambda at step {t}", step.posterior, want.lam)
        assert_close(f"decoded at step {t}", step.decoded, want.decoded)
        assert_close(f"nll at step {t}", step.nll, want.nll)
        assert_close(f"kl at step {t}", step.kl, want.kl)
        if t == len(calls):
            break
        widths = [x.shape[2] for x in want.inputs.values()]
        assert calls[t].packed.shape[2] == sum(widths), "number of input channels is off by some"
        parts = dict(zip(want.inputs, calls[t].packed.split(widths, 2), strict=True))
        for name, part in parts.items():
            if name not in config.drop_inputs:  # those are zeroed later, inside of the network
                assert_close(f"{name} at step {t}", part, want.inputs[name])
        if "grad_posterior" in config.drop_inputs:
            assert calls[t].gradient is None
        else:
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


RELEASED_LSTM = dict(preset="multi_dsprites", variant="released", lstm_size=5, kl_weight=1.0)
CASES: dict[str, tuple[dict, dict]] = {  # name: (Config, image)
    "paper": (dict(), dict()),
    "paper, LSTM": (dict(preset="multi_dsprites", lstm_size=5), dict()),
    "released": (dict(variant="released"), dict()),
    "released, LSTM": (RELEASED_LSTM, dict(height=7)),
    "released, linear coordinates": (RELEASED_LSTM | dict(coordinates="linear"), dict()),
    "quick": (dict(preset="quick", decoder_kernel=1, kl_weight=0.1), dict(height=8, width=7)),
    "max pooling": (dict(pooling="max"), dict()),
    "relu": (dict(activation="relu"), dict()),
    "logistic": (dict(component="logistic", sigma=0.2), dict()),
    "1x1": (dict(decoder_kernel=1, refinement_kernel=1), dict()),
    "5x5": (dict(decoder_kernel=5, refinement_kernel=5), dict()),
    "stride 2": (dict(refinement_stride=2), dict(height=5, width=8)),
    "two layers, the last linear": (dict(mlp_sizes=(6, 4), mlp_linear_end=True), dict()),
    "gray": (dict(), dict(channels=1)),
    "gray, released": (RELEASED_LSTM, dict(channels=1)),
    "K = 1": (dict(num_slots=1), dict()),
    "K = 1, released": (RELEASED_LSTM | dict(num_slots=1), dict()),
    "K = 2": (dict(num_slots=2), dict()),
    "K = 5": (dict(num_slots=5), dict()),
    "T = 1": (dict(num_steps=1), dict()),
    "T = 1, released": (RELEASED_LSTM | dict(num_steps=1), dict()),
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


@pytest.mark.parametrize(
    ("kernel", "height", "width"),
    [(1, 1, 1), (1, 2, 5), (3, 3, 3), (3, 3, 8), (3, 9, 4), (3, 2, 3), (5, 5, 5), (5, 5, 9),
     (5, 7, 6), (5, 4, 11), (7, 7, 8)],
)  # fmt: skip
def test_broadcast_convolution_is_a_convolution_of_the_tiled_latent(kernel, height, width):
    """Outputs and gradients; the sizes include images no larger than the kernel."""
    generator = torch.Generator().manual_seed(0)
    z, out = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 3), (4, 6, height, width))
    )
    with double_precision():
        grid = 3 * iodine.linear_coordinates(height, width)
        fast = iodine.BroadcastConv(3, grid, 6, kernel).double()
        plain = nn.Conv2d(5, 6, kernel, padding=kernel // 2)
    plain.load_state_dict(fast.state_dict())
    za, zb = z.clone().requires_grad_(), z.clone().requires_grad_()
    tiled = torch.cat(
        [zb[:, :, None, None].expand(-1, -1, height, width), grid.expand(4, -1, -1, -1)], 1
    )
    a, b = fast(za), plain(tiled)
    assert_close("output", a, b, 1e-13)
    a.backward(out)
    b.backward(out)
    assert_close("gradient of z", za.grad, zb.grad, 1e-13)
    assert_close("gradient of the weights", fast.weight.grad, plain.weight.grad, 1e-13)
    assert_close("gradient of the bias", fast.bias.grad, plain.bias.grad, 1e-13)


def test_linear_coordinates_are_rows_then_columns():
    rows, cols = iodine.linear_coordinates(3, 5)
    assert torch.equal(rows[:, 0], torch.tensor([-1.0, 0.0, 1.0])) and (rows == rows[:, :1]).all()
    assert torch.equal(cols[0], torch.linspace(-1, 1, 5)) and (cols == cols[:1]).all()


def test_cosine_coordinates_tell_every_position_from_its_mirror_image():
    """The authors' code: half a period over the image, cos(0) at one edge and cos(pi) at the other.

    Full periods (u from -1 to 1) would be the same left and right of the centre.
    """
    grid = iodine.cosine_coordinates(6, 9)
    u, v = torch.linspace(0, math.pi, 6)[:, None], torch.linspace(0, math.pi, 9)
    want = [(i * u).cos() * (j * v).cos() for i in range(3) for j in range(3) if i or j]
    assert_close("cosines", grid, torch.stack(want), 1e-5)
    pixels = grid.flatten(1).T
    assert torch.cdist(pixels, pixels).fill_diagonal_(math.inf).min() > 0.05


# -- sizes -----------------------------------------------------------------------------------------

CLEVR = dict(
    num_slots=7, latent_size=64, decoder_channels=(64,) * 4, decoder_kernel=3,
    refinement_channels=(64,) * 4, refinement_kernel=3, refinement_stride=2, mlp_sizes=(256, 256),
    lstm_size=256, coordinates="linear",
)  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "overrides", "size", "parameters", "inputs"),
    [("tetrominoes", CLEVR, 128, 1_177_168, 18), ("multi_dsprites", {}, 64, 339_152, 24),
     ("tetrominoes", {}, 35, 199_568, 24)],
)  # fmt: skip
def test_the_released_models_have_the_sizes_of_their_checkpoints(
    preset, overrides, size, parameters, inputs
):
    model = iodine.IODINE(iodine.make_config(preset, "released", **overrides), 3, size, size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.refinement.convs[0].in_channels == inputs


@pytest.mark.parametrize("preset", ["tetrominoes", "multi_dsprites", "shapes", "quick"])
def test_the_papers_refinement_network_sees_17_channels(preset):
    model = iodine.IODINE(iodine.make_config(preset), 3, 35, 35)
    assert model.refinement.convs[0].in_channels == 17


# -- the objective and its gradient ----------------------------------------------------------------


@pytest.mark.parametrize("case", ["paper", "paper, LSTM", "released, linear coordinates"])
def test_the_gradient_of_lambda_is_the_slope_of_the_bound_with_the_noise_held_fixed(case):
    """Central differences of L(lambda) = -log p(x|loc + scale * noise) + weight * KL."""
    model = make_model(small(**CASES[case][0]))
    image, noise = make_inputs(model, batch=1)
    eager, _ = bind(model)
    weight = model.config.kl_weight
    prior = D.Normal(*torch.tensor([0.0, model.config.prior_variance]).sqrt())

    @torch.no_grad()
    def parts(lam: Tensor, epsilon: Tensor) -> Tensor:
        q = eager.posterior(lam)
        decoded = eager.decode(q.loc + q.scale * epsilon, *image.shape[2:])
        nll = -eager.log_likelihood(image, decoded[:, :, :3], decoded[:, :, 3:]).sum()
        return torch.stack([nll, weight * D.kl_divergence(q, prior).sum()])

    with recorded(model) as calls:
        list(model.infer(image, noise))
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


def test_without_noise_the_raw_scales_get_the_gradient_of_the_kl_alone():
    """z = loc + scale * 0 does not depend on them, which isolates the KL's part exactly."""
    model = make_model(small())
    image, noise = make_inputs(model)
    with recorded(model) as calls:
        list(model.infer(image, 0 * noise))
    for call in calls:
        raw = call.lam.detach()[..., 3:].requires_grad_()
        kl = D.kl_divergence(D.Normal(call.lam.detach()[..., :3], F.softplus(raw)),
                             D.Normal(0.0, 1.0)).sum()  # fmt: skip
        (want,) = torch.autograd.grad(model.config.kl_weight * kl, raw)
        assert_close("raw half", call.gradient[..., 3:], want)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_kl_and_posterior_are_those_of_torch_distributions(variant):
    """The paper's prior has variance 1 and q a scale of softplus; released: ln 2, and its root."""
    model = make_model(small(variant=variant))
    lam = 3 * torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    loc, scale = model.posterior(lam)
    assert torch.equal(loc, lam[..., :3])
    variance = scale**2 if variant == "released" else scale
    assert_close("softplus", variance, F.softplus(lam[..., 3:]))
    variance = torch.tensor(1.0 if variant == "paper" else math.log(2), dtype=torch.float64)
    prior = D.Normal(torch.zeros_like(variance), variance.sqrt())
    assert_close("kl", model.kl_terms(loc, scale), D.kl_divergence(D.Normal(loc, scale), prior))


def test_inference_starts_at_the_prior_of_the_paper():
    """Appendix C: initially q(z) = N(0, 1); the released code draws lambda instead."""
    paper, released = (
        iodine.IODINE(iodine.make_config("tetrominoes", v), 3, 35, 35)
        for v in ("paper", "released")
    )
    loc, scale = paper.posterior(paper.initial)
    assert (loc == 0).all() and torch.allclose(scale, torch.ones(32))
    bound = math.sqrt(6 / 128)  # Glorot, as TensorFlow counts the fans of a vector of 2D = 64
    assert 0.8 * bound < released.initial.abs().max() <= bound
    assert paper.initial.requires_grad and released.initial.requires_grad


@pytest.mark.parametrize(
    ("variant", "weights"),
    [("paper", [0.2, 0.4, 0.6, 0.8, 1.0]), ("released", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])],
)
def test_the_loss_is_the_weighted_sum_of_equation_4(variant, weights):
    """t / T over T decodes; the released code makes one more, whose weights start at 0."""
    model = make_model(small(variant=variant, num_steps=5, kl_weight=0.3))
    assert model.step_weights() == pytest.approx(weights, rel=1e-12)
    image, noise = make_inputs(model)
    steps = list(model.infer(image, noise))
    assert len(steps) == len(weights)
    bounds = [(s.nll + 0.3 * s.kl).mean() for s in steps]
    result = model.loss(image, noise)
    want = sum(w * bound for w, bound in zip(weights, bounds, strict=True))
    assert_close("loss", result["loss"], want)
    assert_close("elbo", result["elbo"], -(steps[-1].nll + steps[-1].kl).mean())  # weight 1
    assert not (result["elbo"].requires_grad or result["decoded"].requires_grad)


# -- symmetries, evaluation, precision -------------------------------------------------------------


@pytest.mark.parametrize("case", ["paper, LSTM", "released, LSTM", "quick"])
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


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", ["paper, LSTM", "released, LSTM", "quick"])
def test_an_image_has_the_same_result_alone_and_in_a_batch(case, grad):
    """Nothing normalises over the batch, and the gradient inputs carry no 1 / B."""
    model = make_model(small(**CASES[case][0]))
    image, noise = make_inputs(model, batch=3)
    with torch.set_grad_enabled(grad):
        steps = zip(model.infer(image, noise), model.infer(image[:1], noise[:1]), strict=True)
        for together, alone in steps:
            for name in together._fields:
                assert_close(name, getattr(alone, name), getattr(together, name)[:1])


@pytest.mark.parametrize("case", ["paper, LSTM", "released", "quick"])
def test_inference_without_grad_gives_the_same_values(case):
    model = make_model(small(**CASES[case][0]))
    image, noise = make_inputs(model, steps=8, slots=5)  # more of both than in training
    with_grad = list(model.infer(image, noise))
    with torch.no_grad():
        without = list(model.infer(image, noise))
    assert len(without) == 8 and with_grad[-1].nll.requires_grad
    for a, b in zip(with_grad, without, strict=True):
        for name in a._fields:
            assert_close(name, getattr(b, name), getattr(a, name))


def test_inference_without_grad_gives_no_graphs_away():
    """Who keeps the steps, as the figures do, would keep their graphs."""
    model = make_model(small())
    with torch.no_grad():
        for step in model.infer(*make_inputs(model)):
            assert [name for name in step._fields if getattr(step, name).requires_grad] == []


def saved_tensors(model: nn.Module, steps: int) -> list[int]:
    """How many tensors wait for a backward pass after each of the steps of one inference."""
    alive: weakref.WeakSet = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor.detach()  # an output would keep its own node, hence itself, alive
            alive.add(self)

    counts, kept = [], []
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        for step in model.infer(*make_inputs(model, steps=steps)):
            kept.append(step)  # as the figures do
            counts.append(len(alive))
    return counts


@pytest.mark.parametrize("drop_inputs", [(), ("grad_posterior",)])
def test_memory_does_not_grow_with_the_steps_without_grad(drop_inputs):
    model = make_model(small("multi_dsprites", lstm_size=5, drop_inputs=drop_inputs))
    with torch.no_grad():
        counts = saved_tensors(model, steps=9)
    assert len(set(counts[1:-1])) == 1, counts
    growing = saved_tensors(model, steps=3)
    assert growing[2] > growing[1] + 10  # in training it has to grow, and the count shows it


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
        list(model.infer(*make_inputs(model)))
    call = calls[0]
    if dropped == "grad_posterior":  # it is not even computed
        assert all(c.gradient is None and c.normalised is None for c in calls)
    slices = kernels.channel_slices(3, 2)
    assert {*slices, "posterior", "grad_posterior"} == {*iodine.INPUTS}
    for name in iodine.INPUTS:
        packed, lam = call.packed.clone(), call.lam
        gradient = call.gradient
        if name == "posterior":
            lam = lam + 1
        elif name == "grad_posterior":
            if gradient is None:
                continue
            gradient = gradient.flip(-1)
        else:
            packed[:, :, slices[name]] += 1
        update, _ = model.refinement(packed, lam, gradient, None)
        assert torch.equal(update, call.update) == (name == dropped), name


# -- learning --------------------------------------------------------------------------------------


def train_on(
    scenes: data.Scenes, choose: Callable[[int], Tensor], model: nn.Module, steps: int
) -> list[float]:
    """The losses of some steps of Adam on the scenes that `choose` gives, always with new noise."""
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 30)
        index = choose(step)
        noise = model.noise(scenes, index + 1000 * step)
        loss = model.loss(scenes.scenes(index).image, noise)["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), model.config.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_same_seed_gives_the_same_losses_bit_for_bit():
    config = small("quick", seed=3)
    scenes = data.make(config.dataset, seed=3)

    def losses(config: iodine.Config) -> list[float]:
        return train_on(scenes, lambda step: torch.arange(4), iodine.build(config, scenes), 3)

    first = losses(config)
    assert losses(config) == first and len(set(first)) == 3
    assert losses(small("quick", seed=4)) != first


LEARNING = dict(
    preset="quick", num_slots=3, num_steps=3, latent_size=8, refinement_channels=(32, 32),
    mlp_sizes=(64,), decoder_channels=(32, 32, 32), decoder_kernel=1, kl_weight=0.1,
)  # fmt: skip


# A decoder of 1x1 kernels on a few pixels: 15 to 30 ms a step on one core.
def two_sprites(seed: int) -> data.Scenes:
    """Two objects on 8 x 8 pixels: half of mini_sprites' size, for the sake of time."""
    return MiniSprites(seed=seed, size=8, sprite=3, min_objects=2, max_objects=2)


@torch.no_grad()
def scores(scenes: data.Scenes, index: Tensor, model: nn.Module) -> tuple[float, float, float]:
    """Mean squared error, that of the best single image, and ARI of the foreground."""
    batch = scenes.scenes(index)
    *_, last = model.infer(batch.image, model.noise(scenes, index + 10**6))
    mean, masks, _ = iodine.reconstruct(last.decoded)
    single = batch.image.mean(0, keepdim=True).expand_as(batch.image)
    values = (
        metrics.mse(batch.image, mean),
        metrics.mse(batch.image, single),
        metrics.ari(batch.masks, masks),
    )
    return tuple(value.mean().item() for value in values)


def test_it_learns_eight_scenes_by_heart():
    scenes, index = two_sprites(0), torch.arange(8)
    model = iodine.build(small(**LEARNING, sigma=0.5), scenes)
    train_on(scenes, lambda step: index, model, 200)
    mse, single, _ = scores(scenes, index, model)
    assert mse < single / 3  # seeds 0 to 3: 4.5 to 8 times smaller


def test_it_learns_to_separate_the_objects_of_unseen_scenes():
    """ARI-FG near 0.2 is what the test above ends at.

    Eight scenes can be learnt by heart in one slot; ever new ones need objects.
    """
    scenes = two_sprites(0)
    model = iodine.build(small(**LEARNING), scenes)
    train_on(scenes, lambda step: torch.arange(16) + 16 * step, model, 300)
    mse, single, ari_fg = scores(scenes, torch.arange(64) + 10**7, model)
    assert mse < single / 1.5 and ari_fg > 0.35  # seeds 0 to 2: 2.1 to 2.3 times, 0.41 to 0.82


# -- mutants ---------------------------------------------------------------------------------------

SOURCE = Path(iodine.__file__)
LSTM = dict(preset="multi_dsprites", lstm_size=5, forget_bias=0.5, prior_variance=0.5)
MUTANTS: dict[str, tuple[str, str, dict]] = {  # name: (text of iodine.py, its mutation, Config)
    "gradient of lambda without the KL": (
        "torch.full_like(kl, c.kl_weight)", "torch.zeros_like(kl)", {}),
    "gradient of lambda with the KL unweighted": (
        "torch.full_like(kl, c.kl_weight)", "torch.ones_like(kl)", {}),
    "gradient of lambda does not pass through the noise": (
        "z = loc + scale * noise[:, t]", "z = loc + scale.detach() * noise[:, t]", {}),
    "gradient of lambda not stopped": (
        "cotangents, retain_graph=training", "cotangents, create_graph=training", {}),
    "gradient of lambda normalised per half": (
        "self.norm_grad = nn.LayerNorm(2 * latent)",
        "self.norm_grad = type('Halves', (nn.LayerNorm,), {'forward': lambda m, x: m.bias"
        " + m.weight * F.layer_norm(x.unflatten(-1, (2, -1)), (latent,)).flatten(-2)})(2 * latent)",
        {}),
    "gradient of lambda of the batch's mean, a wide sigma": (
        "self.norm_grad(gradient)", "self.norm_grad(gradient / len(lam))", dict(sigma=1.0)),
    "image inputs stopped": ("(inputs.packed, lam,", "(inputs.packed.detach(), lam,", {}),
    "lambda stopped": ("(inputs.packed, lam,", "(inputs.packed, lam.detach(),", {}),
    "lambda replaced": ("lam = lam + update", "lam = update", {}),
    "the same noise in every step": ("scale * noise[:, t]", "scale * noise[:, 0]", {}),
    "exponential instead of softplus": ("scale = F.softplus(raw)", "scale = raw.exp()", {}),
    "variance and deviation exchanged": ("v = self.config.prior_variance",
                                         "v = self.config.prior_variance ** 2", {}),
    "KL of mean and scale exchanged": ("(scale.square() + loc.square()) / v",
                                       "scale.square() / v + loc.square()", {}),
    "nll a mean over the pixels": (
        'nll = -reduce(log_likelihood, "b h w -> b", "sum")',
        'nll = -reduce(log_likelihood, "b h w -> b", "mean")', {}),
    "weights reversed": ("return [t / n for t in range(1, n + 1)]",
                         "return [t / n for t in range(n, 0, -1)]", {}),
    "last loss left out": ("return [t / n for t in range(1, n + 1)]",
                           "return [t / n for t in range(1, n)] + [0.0]", {}),
    "weights of the other variant": ("return [t / n for t in range(1, n + 1)]",
                                     "return [t / (n - 1) for t in range(n)]", {}),
    "KL unweighted in the loss": ("(step.nll + self.config.kl_weight * step.kl)",
                                  "(step.nll + step.kl)", {}),
    "a refinement after the last decode": ("last = t == num_decodes - 1", "last = False", {}),
    "hidden state not carried": ("update, state = self.refinement(",
                                 "update, _ = self.refinement(", {}),
    "cell state not carried": ("return torch.sigmoid(o) * torch.tanh(cell), cell",
                               "return torch.sigmoid(o) * torch.tanh(cell), 0 * cell", {}),
    "forget bias left out": ("f + self.forget_bias", "f", {}),
    "rows and columns exchanged": (
        'torch.stack(torch.meshgrid(rows, cols, indexing="ij"))',
        'torch.stack(torch.meshgrid(rows, cols, indexing="ij")[::-1])', {}),
    "no coordinates in the decoder": (
        "self.bias, self.coordinates, self.activation",
        "self.bias, 0 * self.coordinates, self.activation", {}),
    "no activation in the first layer": (
        "self.coordinates, self.activation, self", 'self.coordinates, "none", self', {}),
    "gain left out": ("config.coordinate_gain * linear", "linear", dict(coordinate_gain=3.0)),
    "slots mixed with images": ("unflatten(0, z.shape[:2])",
                                "unflatten(0, z.shape[:2][::-1]).transpose(0, 1)", {}),
    "sum instead of mean pooling": ("x = x.mean((-2, -1))", "x = x.sum((-2, -1))", {}),
    "constant of z forgotten": ("value=5.0", "value=0.0", dict(constants=True)),
    "linear end forgotten": ("del self.mlp[-1]", "pass", dict(mlp_linear_end=True)),
}  # fmt: skip


def mutated(old: str, new: str) -> ModuleType:
    """iodine.py as a module of its own, with `new` in the place of `old`."""
    source = SOURCE.read_text()
    assert not old or source.count(old) >= 1, f"iodine.py has no more {old!r}: adapt this mutant"
    module = ModuleType("mutated_iodine")
    sys.modules[module.__name__] = module  # dataclasses look it up
    try:
        exec(compile(source.replace(old, new) if old else source, SOURCE, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def test_the_unmutated_source_agrees():
    """Else the next two tests would prove nothing."""
    for overrides in ({}, dict(sigma=1.0), dict(coordinate_gain=3.0), dict(constants=True),
                      dict(mlp_linear_end=True)):  # fmt: skip
        compare(small(**LSTM | overrides), mutated("", ""))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found_out(name):
    old, new, overrides = MUTANTS[name]
    module = mutated(old, new)
    with pytest.raises(AssertionError, match=r"off by|refinements"):
        compare(small(**LSTM | overrides), module)


# Mutants of what the kernels compute: (config, image, decoded, inputs) -> inputs.


def replaced(inputs: kernels.RefinementInputs, name: str, value: Tensor, model_norm=None):
    """`inputs` with other values in the channels of one input, normalised as the model does it."""
    where = kernels.channel_slices(3, 2)[name]
    if model_norm is not None:
        weight, bias = (p[where.start - 9 : where.stop - 9, None, None] for p in model_norm)
        value = F.layer_norm(value, value.shape[2:]) * weight + bias
    packed = inputs.packed.clone()
    packed[:, :, where] = value
    return inputs._replace(packed=packed)


# The gradient of the masks instead of their logits, up to the constant that LayerNorm removes:
# -r_k / m_k = (m_k - r_k) / m_k - 1.
def wrt_masks(image, decoded, norm, sigma, inputs):
    masks = decoded[:, :, 3:].softmax(1)
    return replaced(inputs, "grad_mask", (inputs.grad_decoded[:, :, 3:] / masks).detach(), norm)


def grad_means_not_stopped(image, decoded, norm, sigma, inputs):
    difference = image[:, None] - decoded[:, :, :3]
    joint = decoded[:, :, 3].log_softmax(1) - difference.square().sum(2) / (2 * sigma**2)
    value = -joint.softmax(1)[:, :, None] * difference / sigma**2
    return replaced(inputs, "grad_means", value, norm)


def likelihood_not_stopped(image, decoded, norm, sigma, inputs):
    value = kernels.mixture_log_likelihood(image, decoded, sigma)[:, None, None]
    return replaced(inputs, "log_likelihood", value.expand(-1, decoded.shape[1], -1, -1, -1), norm)


def likelihood_no_logarithm(image, decoded, norm, sigma, inputs):
    value = inputs.log_likelihood.detach().exp()[:, None, None]
    return replaced(inputs, "log_likelihood", value.expand(-1, decoded.shape[1], -1, -1, -1), norm)


# Responsibilities r = m - (m - r): they contain the mask prior, which the paper's input does not.
def posterior_with_masks(image, decoded, norm, sigma, inputs):
    masks = decoded[:, :, 3:].softmax(1)
    return replaced(inputs, "mask_posterior", masks - inputs.grad_decoded[:, :, 3:])


# log of sum_{j != k} m_j N_j alone = log p + log(1 - r_k), the other masks not renormalised.
def leave_one_out_not_renormalised(image, decoded, norm, sigma, inputs):
    share = 1 - (decoded[:, :, 3:].softmax(1) - inputs.grad_decoded[:, :, 3:])
    value = inputs.log_likelihood[:, None, None] + share.log()
    return replaced(inputs, "leave_one_out", value.detach(), norm)


# As several ports have it: sum_c log sum_k m_k N(x_c).
def per_channel_mixture(image, decoded, norm, sigma, inputs):
    density = D.Normal(decoded[:, :, :3], sigma).log_prob(image[:, None])
    mixture = (decoded[:, :, 3:].log_softmax(1) + density).logsumexp(1)
    return inputs._replace(log_likelihood=mixture.sum(1))


# No mutant: recomputes an input the right way, so that a mistake of `replaced` itself shows.
def unchanged(image, decoded, norm, sigma, inputs):
    return replaced(inputs, "grad_mask", inputs.grad_decoded[:, :, 3:], norm)


KERNEL_MUTANTS = [
    wrt_masks, grad_means_not_stopped, likelihood_not_stopped, likelihood_no_logarithm,
    posterior_with_masks, leave_one_out_not_renormalised, per_channel_mixture,
]  # fmt: skip


@pytest.mark.parametrize("mutant", [unchanged, *KERNEL_MUTANTS])
def test_mutants_of_the_inputs_are_found_out(mutant, monkeypatch):
    original = kernels.refinement_inputs

    def changed(image, decoded, weight, bias, coordinates, sigma, *rest):
        inputs = original(image, decoded, weight, bias, coordinates, sigma, *rest)
        return mutant(image, decoded, (weight, bias), sigma, inputs)

    monkeypatch.setattr(kernels, "refinement_inputs", changed)
    expected = pytest.raises(AssertionError, match="off by")
    with contextlib.nullcontext() if mutant is unchanged else expected:
        compare(small(**LSTM, sigma=0.5))
