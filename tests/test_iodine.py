"""iodine.py against an independent IODINE, written from the paper with autograd alone.

Both get the same weights and noise in float64 and must agree on every intermediate and on the
gradient of every parameter. Then what follows from the mathematics: finite differences, symmetries,
memory; and mutants of iodine.py, all of which the comparison must catch.

Axes: B batch, K slots, T decodes, D latent, C H W image, F input channels of the refinement.
"""

import contextlib
import math
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from checks import assert_close, double_precision, off_zero
from kernel_checks import TRITON
from mutants import mutated
from torch import Tensor, nn

import iodine
import kernels
from data import metrics, runs
from data.mini_sprites import MiniSprites


@pytest.fixture(autouse=True)
def torch_backend():
    with kernels.use("torch"):
        yield


# -- an independent IODINE, from algorithm 1 and appendix C ----------------------------------------


class Eager:
    """Algorithm 1 with autograd for every gradient and one mixture rebuilt for each left-out slot.

    `weights` holds lambda, decoder, flat, conv, mlp, lstm, head (weight, bias) and norm.<input>
    (gain, bias): lists and pairs of tensors that require grad. final_sigma and shading are those
    of a training step.
    """

    def __init__(self, config: iodine.Config, weights: dict, final_sigma: float, shading: float):
        self.config, self.weights = config, weights
        self.final_sigma, self.shading = final_sigma, shading
        self.act = {"elu": F.elu, "relu": F.relu}[config.activation]

    def coordinates(self, height: int, width: int, gain: float = 1.0) -> Tensor:
        """Two channels, rows then columns, from -gain to gain: (2, H, W)."""
        rows, cols = (torch.linspace(-gain, gain, n, dtype=torch.float64) for n in (height, width))
        return torch.stack(torch.meshgrid(rows, cols, indexing="ij"))

    def sigma(self, t: int) -> float:
        """Of decode t = 0, 1, ...: its logarithm falls linearly over all decodes but the last."""
        start, last = self.config.sigma_start, self.config.num_steps - 2
        share = t / last if t < last else 1
        logs = math.log(start or self.final_sigma), math.log(self.final_sigma)
        return math.exp((1 - share) * logs[0] + share * logs[1])

    def bound(self, t: int, nll: Tensor, kl: Tensor) -> Tensor:
        """What decode t minimises: with a sigma that falls, sigma^2 times the weight stays."""
        tempered = 0.01 / self.sigma(t) ** 2 if self.config.sigma_start else 1.0
        return nll + tempered * kl

    def pooled(self, image: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., C, H/pool, W/pool): means of blocks of pixels."""
        p = self.config.pool
        return sum(image[..., i::p, j::p] for i in range(p) for j in range(p)) / p**2

    def decode(self, z: Tensor, height: int, width: int, pooled: bool = False) -> Tensor:
        """(B, K, D) -> (B, K, C+1, H, W): flat colours and logits are linear in the latent."""
        grid = self.coordinates(height, width, self.config.coordinate_gain)
        grid = self.pooled(grid) if pooled else grid
        decoded = self.decode_alone(z.flatten(0, 1), grid).unflatten(0, z.shape[:2])
        if not self.config.flat_colors:
            return decoded
        weight, bias = self.weights["flat"]
        flat = (z @ weight.T + bias)[..., None, None].expand_as(decoded)
        shaded = flat[:, :, :-1] + self.shading * decoded[:, :, :-1]
        return torch.cat([shaded, flat[:, :, -1:] + 4 * decoded[:, :, -1:]], 2)

    def decode_alone(self, z: Tensor, grid: Tensor) -> Tensor:
        """(N, D) -> (N, C+1, H, W): every slot on its own, its latent at every pixel."""
        *hidden, last = self.weights["decoder"]
        height, width = grid.shape[1:]
        if self.config.decoder == "deconv":
            return self.deconvolve(z, hidden, last)[..., :height, :width]
        tiled = z[:, :, None, None].expand(-1, -1, height, width)  # iodine.py never builds it
        x = torch.cat([tiled, grid.expand(len(z), -1, -1, -1)], 1)
        for weight, bias in hidden:
            x = self.act(F.conv2d(x, weight, bias, padding="same"))
        return F.conv2d(x, *last, padding="same")

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

    def components(self, means: Tensor, sigma: float) -> D.Distribution:
        """Densities of a pixel under each slot, all channels together: batch (B, H, W, K)."""
        return D.Independent(D.Normal(means.permute(0, 3, 4, 1, 2), sigma), 1)

    def log_likelihood(self, image: Tensor, means: Tensor, logits: Tensor, sigma: float) -> Tensor:
        """log p(x | z) of each pixel, eq. 1: (B, 1, 1, H, W)."""
        masks = D.Categorical(logits=logits.squeeze(2).permute(0, 2, 3, 1))
        mixture = D.MixtureSameFamily(masks, self.components(means, sigma))
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

    def inputs(
        self, image: Tensor, means: Tensor, logits: Tensor, sigma: float, grads: tuple
    ) -> dict[str, Tensor]:
        """The image-sized rows of appendix C's table: name -> (B, K, channels, H, W)."""
        slots, chw = means.shape[1], (-3, -2, -1)
        log_p = self.log_likelihood(image, means, logits, sigma)
        # A mixture of the other slots only: the softmax makes their masks sum to 1 again.
        without = []
        for k in range(slots):
            others = [j for j in range(slots) if j != k] or [0]  # an only slot is not left out
            without.append(self.log_likelihood(image, means[:, others], logits[:, others], sigma))
        log_n = self.components(means, sigma).log_prob(image.permute(0, 2, 3, 1)[..., None, :])
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
        """Algorithm 1. noise (T, B, K, D), one slice a decode; the last decode is not refined.

        An image (B, C, H, W), or as many frames, (B, T, C, H, W): appendix A.1.
        """
        batch, slots = noise.shape[1:3]
        channels, height, width = image.shape[-3:]
        frames = self.pooled(image)
        image = frames
        lam = self.weights["lambda"].expand(batch, slots, -1)
        state = (lam.new_zeros(batch, slots, self.config.lstm_size),) * 2
        prior, steps = D.Normal(torch.zeros((), dtype=lam.dtype), 1), []
        for t, epsilon in enumerate(noise):
            image = frames[:, t] if frames.ndim == 5 else frames
            q = self.posterior(lam)
            z = q.loc + q.scale * epsilon  # eq. 2
            decoded = self.decode(z, height, width, pooled=True)
            means, logits = decoded[:, :, :channels], decoded[:, :, channels:]
            nll = -self.log_likelihood(image, means, logits, self.sigma(t)).sum((1, 2, 3, 4))
            kl = D.kl_divergence(q, prior).sum((1, 2))
            step = SimpleNamespace(lam=lam, decoded=decoded, nll=nll, kl=kl)
            steps.append(step)
            if t == len(noise) - 1:
                break
            # Summed over images, which do not interact: each gets its own gradient, no 1 / B.
            bound = self.bound(t, nll, kl).sum()
            grads = torch.autograd.grad(bound, [means, logits, lam], retain_graph=True)
            step.grad_lam = grads[2]
            # No create_graph, and detached below: the double derivatives are dropped (sec. 2.3).
            step.inputs = self.inputs(image, means, logits, self.sigma(t), grads)
            normalised = self.normalise("grad_posterior", grads[2].detach(), (-1,))
            packed = torch.cat([*step.inputs.values()], 2)
            delta, state = self.refine(packed, lam, normalised, state)
            lam = lam + delta  # eq. 3
        return steps

    def loss(self, steps: list[SimpleNamespace]) -> Tensor:
        """Eq. 4, averaged over the images."""
        total, number = 0.0, len(steps)
        for t, step in enumerate(steps):
            from_zero = self.config.step_weights == "from_zero"
            weight = t / (number - 1) if from_zero else (t + 1) / number
            total = total + weight * self.bound(t, step.nll, step.kl).mean()
        return total


# -- both models, side by side ---------------------------------------------------------------------


def small(preset: str = "tetrominoes", **overrides) -> iodine.Config:
    """A preset with networks small enough for exact comparisons in milliseconds."""
    sizes = dict(
        num_slots=3, latent_size=3, num_steps=3, decoder_channels=(4, 5), decoder_kernel=3,
        refinement_channels=(4, 5), refinement_kernel=3, mlp_size=6, test_steps=0,
    )
    return iodine.make_config(preset, **sizes | overrides)


def make_model(
    config: iodine.Config, channels: int = 3, height: int = 6, width: int = 5,
    module: ModuleType = iodine,
) -> nn.Module:  # fmt: skip
    """In float64, amid its schedules, and nothing has the 0 or 1 that would hide mistakes."""
    torch.manual_seed(0)
    with double_precision():
        model = off_zero(module.IODINE(config, channels, height, width).double())
    if config.flat_colors:
        with torch.no_grad():
            model.decoder.last.weight[:-1] = torch.randn_like(model.decoder.last.weight[:-1])
    model.set_step(sum(config.color_steps) // 2)
    return model


def make_inputs(model: nn.Module, channels: int = 3, height: int = 6, width: int = 5, **sizes):
    """An image (B, C, H, W), or with `frames` a sequence (B, T, C, H, W), noise (B, T, K, D)."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    batch, slots = sizes.get("batch", 2), sizes.get("slots", config.num_slots)
    shape = batch, sizes.get("steps", config.num_steps), slots, config.latent_size
    frames = shape[1:2] if sizes.get("frames") else ()
    size = batch, *frames, channels, height, width
    image = torch.rand(size, generator=generator, dtype=torch.float64)
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
        "flat": sum(layers("decoder.flat"), ()),
        "decoder": [x for part in ("first", "hidden", "last") for x in layers(f"decoder.{part}")],
        "conv": layers("refinement.convs"),
        "mlp": layers("refinement.mlp")[0],
        "lstm": sum(layers("refinement.gates"), ()),
        "head": layers("refinement.head")[0],
        "norm": norm | {"grad_posterior": layers("refinement.norm_grad")[0]},
    }
    shading = model.decoder.flat.shading.item() if model.decoder.flat else 0.0
    return Eager(model.config, weights, model.sigma.item(), shading), p


@contextlib.contextmanager
def recorded(model: nn.Module):
    """Yields a list that gets the arguments of each call of the refinement network."""
    calls: list[SimpleNamespace] = []

    def note(module: nn.Module, args: tuple):
        calls.append(SimpleNamespace(packed=args[0], lam=args[1], gradient=args[2]))

    hook = model.refinement.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


def compare(config: iodine.Config, module: ModuleType = iodine, channels=3, height=6, width=5,
            frames=False):
    """AssertionError, which names the first quantity in which the two models differ."""
    model = make_model(config, channels, height, width, module)
    image, noise = make_inputs(model, channels, height, width, frames=frames)
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

    # The gradients of all parameters, through all steps.
    parts, wanted = model.loss(image, noise), eager.loss(expected)
    loss = parts["loss"]
    assert_close("loss", loss, wanted)
    assert_close("elbo", parts["elbo"], -(expected[-1].nll + expected[-1].kl).mean())  # weight 1
    assert not (parts["elbo"].requires_grad or parts["decoded"].requires_grad)
    loss.backward()
    wanted.backward()
    for name, parameter in model.named_parameters():
        zero = torch.zeros_like(parameter)  # T = 1 never calls the refinement network
        actual, want = (zero if g is None else g for g in (parameter.grad, copies[name].grad))
        assert_close(f"gradient of {name}", actual, want)


LSTM = dict(preset="multi_dsprites", lstm_size=5)
QUICK = dict(preset="quick", decoder_kernel=1, num_steps=5)  # 5: sigma falls over several decodes
CASES: dict[str, tuple[dict, dict]] = {  # name: (Config, image)
    "paper": (dict(), dict()),
    "LSTM": (LSTM, dict(height=7)),
    "quick": (QUICK, dict(height=8, width=7)),
    "quick, deconv": (QUICK | dict(decoder="deconv", num_steps=2), dict(height=9)),
    "only sigma falls": (dict(sigma_start=0.5, num_steps=4), dict()),
    "only colours are flat": (dict(flat_colors=0.3), dict(channels=1)),
    "max pooling, relu": (dict(pooling="max", activation="relu"), dict()),
    "5x5": (dict(decoder_kernel=5, refinement_kernel=5), dict()),
    "stride 2, gray": (dict(refinement_stride=2), dict(height=5, width=8, channels=1)),
    "K = 1": (dict(num_slots=1), dict()),
    "K = 2": (dict(num_slots=2), dict()),
    "K = 5": (LSTM | dict(num_slots=5), dict()),
    "T = 1": (dict(num_steps=1), dict()),
    "T = 5": (dict(num_steps=5), dict()),
    "pool": (QUICK | dict(pool=2), dict(height=8, width=6)),
    "pool, frames": (dict(pool=2, decoder_kernel=1), dict(width=4, frames=True)),
    "frames": (LSTM | dict(num_steps=4), dict(frames=True)),
    "frames, quick": (QUICK, dict(frames=True)),
    "deconv, cropped": (dict(decoder="deconv"), dict(height=12, width=10)),
    "deconv, doubled twice": (dict(decoder="deconv", num_slots=2, num_steps=2), dict(height=17)),
} | {f"without {name}": (dict(drop_inputs=(name, "means")), dict()) for name in iodine.INPUTS}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_eager_model(case):
    config, image = CASES[case]
    compare(small(**config), **image)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("case", ["paper", "quick"])
def test_equals_the_eager_model_on_the_kernels(backend, case, monkeypatch):
    """The fused functions and their fallback stand in for the lines of iodine.py, not called."""
    for name in ("mixture_log_likelihood", "refinement_inputs"):
        monkeypatch.setattr(iodine, name, None)
    as_on_cuda = SimpleNamespace(**vars(kernels) | dict(backend=lambda x: "triton"))
    monkeypatch.setattr(iodine, "kernels", as_on_cuda)
    with kernels.use(backend):
        compare(small(**CASES[case][0] | dict(num_steps=2)), height=4, width=3)


def test_extreme_colours_and_logits_stay_finite_in_float32():
    """A slot that owns a pixel, and colours hundreds of sigmas away; float64 says what is right."""
    image = torch.tensor([0.0, 0.5, 1.0]).expand(1, 1, 1, 3)
    decoded = torch.tensor([[0.0, 40.0], [5.0, -40.0], [-3.0, 0.0]])  # mean and logit of each slot
    decoded = decoded[None, :, :, None, None].expand(1, 3, 2, 1, 3)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        gains = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
        maps, sigma = iodine.coordinate_maps(1, 3).to(dtype), torch.tensor(0.01, dtype=dtype)
        return iodine.refinement_inputs(image.to(dtype), decoded.to(dtype), *gains, maps, sigma)

    for actual, want in zip(run(torch.float32), run(torch.float64), strict=True):
        assert actual.isfinite().all()
        assert_close("value", actual.double(), want, 1e-3)


# -- what changes with the training step -----------------------------------------------------------


@pytest.mark.parametrize(("step", "sigma", "shading", "lr"), [
    (0, 0.4, 0.0, 1 / 101), (100, 0.4, 0.0, 1.0), (660, 0.4, 0.0, 1.0), (1100, None, 0.0, 1.0),
    (1430, 0.08**0.5, 0.125, None), (1650, None, 0.375, 0.067**0.5), (1760, None, 0.5, None),
    (2200, 0.2, 0.5, 0.067), (10**6, 0.2, 0.5, 0.067),
])  # fmt: skip
def test_the_schedules_of_quick(step, sigma, shading, lr):
    """Logarithms of sigma (0.4 to 0.2) and of the learning rate fall linearly; shading rises."""
    config = iodine.make_config("quick", latent_size=2)
    model = iodine.IODINE(config, 3, 4, 4)
    model.set_step(step)
    assert model.decoder.flat.shading.item() == pytest.approx(shading)
    assert sigma is None or model.sigma.item() == pytest.approx(sigma)
    assert lr is None or iodine.learning_rate(config, step) == pytest.approx(3e-3 * lr)
    # Within an inference: T = 6, so decode 5 and all later ones have this step's sigma.
    ratio, *sigmas = model.sigma.item() / 0.4, *model.sigmas(8)
    assert [x.item() for x in sigmas] == pytest.approx(
        [0.4 * ratio**share for share in (0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1)])
    assert [x**2 * model.kl_weight(x) for x in sigmas] == pytest.approx([0.01] * 8)


@pytest.mark.parametrize("preset", ["tetrominoes_long", "multi_dsprites_long", "solids_long"])
def test_a_long_run_begins_where_the_short_one_ended(preset):
    config, short = (iodine.make_config(name) for name in (preset, preset[:-4] + "short"))
    model = iodine.IODINE(config, 3, 4, 4)
    values = []
    for step, c in ((short.steps, short), (0, config)):
        model.config = c
        model.set_step(step)
        values.append((*model.sigmas(9), model.decoder.flat.shading.item()))
    assert values[0] == values[1]


def test_few_decodes_have_the_last_sigma():
    config = iodine.make_config("quick", num_steps=2)
    assert iodine.IODINE(config, 3, 4, 4).sigmas(3) == [config.sigma] * 3


@pytest.mark.parametrize("preset", ["tetrominoes", "multi_dsprites", "multi_dsprites_binarized"])
@pytest.mark.parametrize("step", [0, 1000])
def test_the_papers_values_switch_all_of_it_off(preset, step):
    config = iodine.make_config(preset)
    model = iodine.IODINE(config, 3, 4, 4)
    model.set_step(step)
    assert model.decoder.flat is None and all(x == model.sigma for x in model.sigmas(9))
    assert model.sigma.item() == pytest.approx(0.1) and model.kl_weight(model.sigma) == 1
    assert iodine.learning_rate(config, step) == 3e-4


@pytest.mark.parametrize("case", ["paper", "quick"])
def test_the_loss_follows_the_buffers(case):
    """They are filled in place, where a captured graph reads them."""
    model = make_model(small(**CASES[case][0]))
    image, noise = make_inputs(model)
    places = [x.data_ptr() for x in model.buffers()]
    losses = [model.loss(image, noise)["loss"]]
    for buffer in [model.sigma, model.decoder.flat.shading] if case == "quick" else [model.sigma]:
        buffer.fill_(0.6)
        eager, _ = bind(model)
        losses.append(model.loss(image, noise)["loss"])
        assert_close("loss", losses[-1], eager.loss(eager.run(image, noise.transpose(0, 1))))
        assert abs(losses[-1] / losses[-2] - 1) > 1e-3
    model.set_step(0)
    assert places == [x.data_ptr() for x in model.buffers()]


def test_with_the_same_noise_test_steps_change_the_evaluation_alone():
    scenes = MiniSprites(size=8, sprite=3, min_objects=2, max_objects=2)
    image, losses = scenes.batch(0, 2).image, []
    for test_steps, expected in ((0, 3), (2, 2), (8, 8)):
        model = iodine.build(small("quick", decoder_kernel=1, test_steps=test_steps), scenes)
        noise = torch.randn(2, 8, 3, 3, generator=torch.manual_seed(0))
        losses.append(model.loss(image, noise)["loss"].item())
        assert len(model.infer(image, noise)) == expected
        results = iodine.evaluate(model, scenes, count=4)
        assert results["metrics"] == results["settings"][expected - 1]["metrics"]
        assert results["settings"][-1]["num_steps"] == expected  # with more slots
    assert losses[0] == losses[1] == losses[2]


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


@pytest.mark.parametrize("case", ["paper", "LSTM", "only sigma falls"])
def test_the_gradient_of_lambda_is_the_slope_of_the_bound_with_the_noise_held_fixed(case):
    """Central differences of L(lambda) = -log p(x|loc + scale * noise) + weight * KL."""
    model = make_model(small(**CASES[case][0]))
    image, noise = make_inputs(model, batch=1)
    eager, _ = bind(model)

    @torch.no_grad()
    def bound(lam: Tensor, t: int) -> Tensor:
        q = eager.posterior(lam)
        decoded = eager.decode(q.loc + q.scale * noise[:, t], *image.shape[2:])
        means, logits = decoded[:, :, :3], decoded[:, :, 3:]
        nll = -eager.log_likelihood(image, means, logits, eager.sigma(t)).sum()
        return eager.bound(t, nll, D.kl_divergence(q, D.Normal(0.0, 1.0)).sum())

    with recorded(model) as calls:
        model.infer(image, noise)
    for t, call in enumerate(calls):
        lam = call.lam.detach()
        nudges = 1e-5 * torch.eye(lam.numel(), dtype=lam.dtype).view(-1, *lam.shape)
        slopes = [(bound(lam + nudge, t) - bound(lam - nudge, t)) / 2e-5 for nudge in nudges]
        assert_close(f"step {t}", call.gradient, torch.stack(slopes).view(lam.shape), 1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_equal_frames_are_a_still_image_and_a_frame_is_seen_at_its_decode(training):
    """The same bits; and what decode t predicts knows nothing of frame t and all that follow."""
    model = make_model(small(**LSTM | dict(num_steps=2)))
    image, noise = make_inputs(model, steps=5)
    frames = image[:, None].repeat(1, 5, 1, 1, 1)
    still = model.infer(image, noise, 5, training)
    frames_of_it = model.infer(frames, noise, training=training)
    assert len(still) == len(frames_of_it) == 5
    for a, b in zip(still, frames_of_it, strict=True):
        assert all(map(torch.equal, a, b))
    frames[:, 2] = 1 - image
    other = model.infer(frames, noise, training=training)
    for t, (a, b) in enumerate(zip(still, other, strict=True)):
        assert torch.equal(a.decoded, b.decoded) == (t <= 2)
        assert torch.equal(a.nll, b.nll) == (t < 2)


def test_inference_starts_at_the_prior_of_the_paper():
    """Appendix C: initially q(z) = N(0, 1), where the KL is 0."""
    model = iodine.IODINE(iodine.make_config("tetrominoes"), 3, 35, 35)
    loc, scale = model.posterior(model.initial)
    assert (loc == 0).all() and torch.allclose(scale, torch.ones(32))
    assert model.kl_terms(loc, scale).abs().max() < 1e-6


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


def test_inference_on_pooled_images_draws_whole_ones():
    """And is, but for that, the inference of a model of small images."""
    model = make_model(small(**QUICK | dict(pool=2)), height=8, width=6)
    image, noise = make_inputs(model, height=8, width=6)
    tiny = make_model(small(**QUICK), height=4, width=3)
    tiny.decoder.coordinates.copy_(F.avg_pool2d(model.decoder.coordinates, 2))
    pairs = model.infer(image, noise), tiny.infer(F.avg_pool2d(image, 2), noise)
    for t, (step, wanted) in enumerate(zip(*pairs, strict=True)):
        for name in ("posterior", "nll", "kl"):
            assert_close(name, getattr(step, name), getattr(wanted, name))
        loc, scale = model.posterior(step.posterior)
        assert_close("decoded", step.decoded, model.decode(loc + scale * noise[:, t]))


@pytest.mark.parametrize(("overrides", "message"), [
    (dict(pool=3), "does not divide"), (dict(pool=2, decoder_kernel=3), "--decoder-kernel 1"),
    (dict(pool=2, decoder="deconv"), "no deconv"),
    (dict(decoder_kernel=19), "--decoder-kernel: at most 17"),
    (dict(decoder_kernel=2), "--decoder-kernel must be odd"),
    (dict(coordinate_gain=math.nan), "--coordinate-gain"),
])  # fmt: skip
def test_what_cannot_be_is_refused(overrides, message):
    with pytest.raises(runs.UserError, match=message):
        iodine.check(iodine.make_config("quick", device="cpu", **overrides))


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


# -- scores ----------------------------------------------------------------------------------------


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
    preset="quick", num_slots=3, num_steps=4, latent_size=8, refinement_channels=(32, 32),
    mlp_size=64, decoder_channels=(32, 32, 32), decoder_kernel=1, sigma_steps=(100, 300),
    color_steps=(150, 250),
)  # fmt: skip


def test_it_learns_to_separate_the_objects_of_unseen_scenes():
    """Two objects on 8 x 8 pixels, always new scenes: 300 steps on one core take some seconds.
    ARI-FG would not do: two halves of the image score 0.60 there."""
    scenes = MiniSprites(size=8, sprite=3, min_objects=2, max_objects=2)
    model = iodine.build(small(**LEARNING), scenes)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 30)
        model.set_step(step)
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
    low = torch.arange(8) < 4
    sides = [(rows[:, None] & cols).expand(64, 8, 8)
             for rows in (low, ~low) for cols in (low, ~low)]
    found, blind = (metrics.miou(batch.masks, batch.present, segments).mean()
                    for segments in (masks, torch.stack(sides, 1)))
    assert mse < baseline / 1.5 and found > 0.5 > 1.2 * blind  # blind: four quarters of the image


# -- mutants ---------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[str, str, dict]] = {  # name: (text of iodine.py, its mutation, Config)
    "gradient of lambda without the KL": ("= self.kl_weight(sigma) *", "= 0 *", {}),
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
        'log_p, "b h w -> b", "sum")', 'log_p, "b h w -> b", "mean")', {}),
    "weights reversed": ("(t - blind) / (len(steps) - blind)",
                         "(c.num_steps + 1 - t) / c.num_steps", {}),
    "last loss left out": ("(t - blind) / (len(steps) - blind)",
                           "t / c.num_steps * (t < c.num_steps)", {}),
    "weights that start at zero": ('c.step_weights == "from_zero"', "True", {}),
    "hidden state not carried": ("update, state = f(", "update, _ = f(", {}),
    "cell state not carried": ("state = x, cell", "state = x, 0 * cell", {}),
    "forget and input gate exchanged": ("i, g, f, o = self", "f, g, i, o = self", {}),
    "rows and columns exchanged": (
        '(rows, cols, indexing="ij"))', '(rows, cols, indexing="ij")[::-1])', {}),
    "no coordinates in the decoder": ("F.conv2d(coord", "F.conv2d(0 * coord", {}),
    "no activation in the first layer": (
        "self.activation(kernels.broadcast_conv(z, taps_z, response))",
        "kernels.broadcast_conv(z, taps_z, response)", {}),
    "gain left out": ("config.coordinate_gain * coord", "coord", dict(coordinate_gain=3.0)),
    "slots mixed with images": ("unflatten(0, z.shape[:2])",
                                "unflatten(0, z.shape[:2][::-1]).transpose(0, 1)", {}),
    "sum instead of mean pooling": ("x = x.mean((-2, -1))", "x = x.sum((-2, -1))", {}),
    # the recipe of quick
    "shading not applied": ("decoded[:, :-1] * self.shading", "decoded[:, :-1]", QUICK),
    "no flat colours": ("1) + flat", "1) + 0 * flat", QUICK),
    "mask logits count once": ("decoded[:, -1:] * 4", "decoded[:, -1:]", QUICK),
    "flat colours left out": ("if flat is None", "if True", QUICK),
    "sigma of the last decode in the inputs": ("f.coordinates, s", "f.coordinates, self.s", QUICK),
    "sigma of the next decode": ("sigmas(len(frames))", "sigmas(len(frames) + 1)[1:]", QUICK),
    "sigma final in the last decode only": ("num_steps - 2)", "num_steps - 1)", QUICK),
    "sigma of the end of training": (
        "(self.sigma / start) ** share", "torch.tensor(self.config.sigma / start) ** share", QUICK),
    "sigma falls linearly": (
        "start * (self.sigma / start) ** share", "start + (self.sigma - start) * share", QUICK),
    "KL weight not tempered in the gradient": ("= self.kl_weight(sigma) *", "=", QUICK),
    "KL weight not tempered in the loss": ("+ self.kl_weight(sigma) *", "+", QUICK),
    "KL weight of the last decode": ("+ self.kl_weight(s", "+ self.kl_weight(self.s", QUICK),
    "KL weight by sigma, not its square": ("(0.1 / sigma) ** 2", "(0.1 / sigma)", QUICK),
    # eq. 1 and the inputs of appendix C
    "a mixture for each colour": (  # as several ports have it: sum_c log sum_k m_k N(x_c)
        "return joint.logsumexp(1)[:, 0]",
        "return sum((mask_logits.log_softmax(1) + log_density(image[:, [c]],"
        " means[:, :, [c]], sigma)).logsumexp(1)[:, 0] for c in range(means.shape[2]))", {}),
    "normaliser of one colour": ("- means.shape[2] * (sigma.log()", "- (sigma.log()", {}),
    "gradient wrt masks": ("grad_mask = mask - r", "grad_mask = (mask - r) / mask", {}),
    "gradient wrt means of the other sign": ("r * (means - image[:, None])",
                                             "r * (image[:, None] - means)", {}),
    "gradient wrt means without mask": ("grad_means = r", "grad_means = mask_posterior", {}),
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
    "leave-one-out not renormalised": (" - logsumexp_of_others(log_masks)", "", {}),
    "leave-one-out leaves out none": (
        "logsumexp_of_others(joint) - logsumexp_of_others(log_masks)", "log_likelihood", {}),
    "leave-one-out of the neighbour": ("map(torch.logaddexp, before[:-1], after[1:])",
                                       "map(torch.logaddexp, before[1:], after[1:])", {}),
    "likelihood instead of its logarithm": (
        "grad_mask, log_likelihood, leave", "grad_mask, log_likelihood.exp(), leave", {}),
    "LayerNorm of each channel": ("_norm(x, x.shape[2:])", "_norm(x, x.shape[3:])", {}),
    "gains of other channels": ("normalised * norm_weight[:", "normalised * norm_weight.flip(0)[:",
                                {}),
    "mask logits for masks": ("mask = log_masks.exp()", "mask = mask_logits", {}),
}  # fmt: skip
MUTATED = LSTM | dict(sigma=0.5)  # of quick: 0.4 at the first decode, about 0.45 at the last


@pytest.mark.parametrize("overrides", [{}, dict(sigma=1.0), dict(coordinate_gain=3.0), QUICK])
def test_the_unmutated_source_agrees(overrides):
    """Otherwise the next test would prove nothing."""
    compare(small(**MUTATED | overrides), mutated(iodine))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    old, new, overrides = MUTANTS[name]
    module = mutated(iodine, old, new)
    with pytest.raises(AssertionError, match=r"off by|refinements"):
        compare(small(**MUTATED | overrides), module)


@pytest.mark.parametrize(("old", "new"), [
    ("else image.unbind(1)", "else [image[:, 0]] * image.shape[1]"),  # the first frame at each step
    ("inputs(frame,", "inputs(frames[t - 1],"),  # refined by the frame before
    ("eq_1(frame,", "eq_1(frames[t - 1],"),  # the last decode compared with the frame before
])  # fmt: skip
def test_mutants_of_sequences_are_caught(old, new):
    with pytest.raises(AssertionError, match="off by"):
        compare(small(**MUTATED), mutated(iodine, old, new), frames=True)
