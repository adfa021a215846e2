"""apdr.py against an own APDR, written from the notes, and its estimators against exact sums.

The own APDR, of torch.distributions and grid_sample, gets the same weights and noise in float64 and
one history (who survives, how many are new in each frame) at a time; it must agree on everything,
and sums over all histories on the gradient of every parameter. So an estimator is unbiased to nine
digits or wrong. Checks are in one table at the end, mutants that they must catch in another.

Axes: O sequences, S samples, T frames, N objects at most, Z size of z, A histories, C H W image.
"""

import functools
import itertools
import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import mutants
import pytest
import torch
import torch.distributions as D
from checks import assert_close
from test_air import assert_same_gradients, axis_aligned, reference_warp
from torch import Tensor, nn

import air
import apdr
import data
from data import runs

NO, YES = 0.0, 1 - 2.0**-24  # uniform numbers that decide against, and for


@pytest.fixture(autouse=True)
def double_precision():
    """Also of buffers: a float32 0.2 would be 3e-9 off."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- an own APDR, written from the notes -----------------------------------------------------------


def histories_of(frames: int, most: int) -> list[list[tuple[tuple[int, ...], int]]]:
    """All histories: of each frame who survives of those before, and how many are new."""
    if frames == 0:
        return [[]]
    found = []
    for start in histories_of(frames - 1, most):
        before = sum(start[-1][0]) + start[-1][1] if start else 0
        for survive in itertools.product((0, 1), repeat=before):
            found += [[*start, (survive, n)] for n in range(most - sum(survive) + 1)]
    return found


def eager(config: apdr.Config, w: dict, image: Tensor, noise: Tensor, history: list):
    """Eq. 13 to 31 of one sequence (T, C, H, W), noise (T, 2N, Z), one history: of each frame
    log_q, log_p (of n and k), kl, log_ratio (of z), log_likelihood, canvas and identities."""
    c, (channels, *size) = config, image.shape[1:]
    mean, std = torch.tensor([c.scale_mean, 0.0, 0.0]), torch.tensor([c.scale_std, 1.0, 1.0])

    def mlp(name: str, x: Tensor) -> Tensor:
        numbers = sorted({int(key.split(".")[1]) for key in w if key.startswith(f"{name}.")})
        for i in numbers:
            x = w[f"{name}.{i}.weight"] @ x + w[f"{name}.{i}.bias"]
            x = x.clamp(min=0) if i != numbers[-1] else x
        return x

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def gru(name: str, x: Tensor, h: Tensor) -> Tensor:
        a = (w[f"{name}.weight_ih"] @ x + w[f"{name}.bias_ih"]).chunk(3)
        b = (w[f"{name}.weight_hh"] @ h + w[f"{name}.bias_hh"]).chunk(3)
        reset, keep = (a[0] + b[0]).sigmoid(), (a[1] + b[1]).sigmoid()
        return (1 - keep) * (a[2] + reset * b[2]).tanh() + keep * h

    side = c.glimpse_size

    def look(picture: Tensor, where: Tensor, wider: float = 1.0, pixels: int = side) -> Tensor:
        scale, col, row = (mean + std * where) / wider
        theta = axis_aligned(1 / scale, -col / scale, -row / scale)
        return reference_warp(picture[None], theta[None], [pixels] * 2).flatten()

    def draw(z: Tensor) -> Tensor:
        glimpse = (mlp("decoder", z[3:]) - 2).sigmoid().view(1, channels, side, side)
        return reference_warp(glimpse, axis_aligned(*(mean + std * z[:3]))[None], size)[0]

    def matched(picture: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors with and without the object, one shift of the glimpse after the other."""
        wide = side + 2 * c.match
        seen = look(picture, z[:3], wide / side, wide).view(channels, wide, wide)
        known = (mlp("decoder", z[3:]) - 2).sigmoid().view(channels, side, side)
        pixel = size[0] * size[1] / ((mean + std * z[:3])[0] * side) ** 2
        shifts, log_p = [], []
        for row, col in itertools.product(range(wide - side + 1), repeat=2):
            there = torch.zeros_like(seen)
            there[:, row : row + side, col : col + side] = known
            shifts.append(torch.tensor([0, c.match - col, c.match - row]) * 2 / side)
            log_p.append((seen.square().sum() - (there - seen).square().sum()) * pixel / 2)
        log_p = torch.stack(log_p)
        return z[:3] + log_p.softmax(0) @ torch.stack(shifts), log_p.exp().mean().log()

    def explored(logit: Tensor) -> D.Bernoulli:
        return D.Bernoulli(c.exploration / 2 + (1 - c.exploration) * logit.sigmoid())

    def softplus(x: Tensor) -> Tensor:
        return x.exp().log1p()

    frames, objects, born, zeros = [], [], 0, torch.zeros(3 + c.latent_size)
    h_time = w["starts"][0]
    for x, e, (survive, new) in zip(image, noise, history, strict=True):
        f = SimpleNamespace(log_q=0, log_p=0, kl=0, log_ratio=0, canvas=torch.zeros_like(x))
        h_time = gru("time_cell", sum((o.z for o in objects), zeros), h_time)  # eq. 23
        relation, said = w["starts"][1], torch.zeros(4 + c.latent_size)
        kept = []

        def seen(f=f, x=x) -> Tensor:
            return x - f.canvas if c.difference else x

        def add(o, q: D.Normal, p: D.Normal, f=f, kept=kept) -> None:
            f.kl = f.kl + D.kl_divergence(q, p).sum()
            f.log_ratio = f.log_ratio + (p.log_prob(o.z) - q.log_prob(o.z)).sum()
            f.canvas = f.canvas + draw(o.z)
            kept.append(o)

        for j, (o, b) in enumerate(zip(objects, survive, strict=True)):
            h = gru("prior_cell", o.z, o.h)  # eq. 16
            psi, shift, raw = linear("prior_head", h).split([1, len(zeros), len(zeros)])
            loc = o.z + shift
            loc[1:3] += o.z[1:3] - o.before[1:3]
            psi, p = psi.sigmoid(), D.Normal(loc, softplus(raw) + 0.01)  # eq. 14
            relation = gru("relation_cell", said, relation)  # eq. 24
            states = torch.cat([o.z, h_time, relation])
            picture = x - f.canvas if c.difference or c.match else x
            for other in objects[j + 1 :] if c.match else ():
                there = other.z.clone()
                there[1:3] += other.z[1:3] - other.before[1:3]
                picture = picture - draw(there)
            where, fit = matched(picture, p.loc) if c.match else (p.loc[:3], 0.0)
            glimpse = look(picture, where, 2.0)
            logit, shift, raw = mlp("search", torch.cat([glimpse, states])).split([1, 3, 3])
            q = D.Normal(torch.cat([where + shift, p.loc[3:]]),
                         torch.cat([softplus(raw) + 0.01, p.scale[3:]]))  # fmt: skip
            z, value = q.loc + q.scale * e[j], torch.tensor([b * 1.0])
            f.log_q = f.log_q + explored(logit + fit).log_prob(value)[0]
            f.log_p = f.log_p + D.Bernoulli(psi).log_prob(value)[0]
            said = torch.cat([z, torch.ones(1)]) if b else torch.zeros(len(said))
            if b:  # eq. 26
                add(SimpleNamespace(z=z, before=o.z, h=h, identity=o.identity), q, p)
        relation = gru("relation_cell", said, relation)
        room = c.max_objects - len(kept)
        odds = torch.tensor([c.prior_ratio**n for n in range(room + 1)])
        f.log_p = f.log_p + (odds[new] / odds.sum()).log()  # eq. 13
        h, cell, z = w["initial"].split([c.lstm_size, c.lstm_size, len(zeros)])
        for i in range(min(new + 1, room)):  # eq. 27
            drawn = torch.cat([mean + std * z[:3], z[3:]])
            gates = linear("see", seen().flatten()) + linear("known", relation)
            into, now, forget, out = (gates + linear("gates", torch.cat([h, drawn]))).chunk(4)
            cell = (forget + 1).sigmoid() * cell + into.sigmoid() * now.tanh()
            h = out.sigmoid() * cell.tanh()  # eq. 28
            logit, loc, raw = mlp("head", h).split([1, 3, 3])
            f.log_q = f.log_q + explored(logit[0]).log_prob(torch.tensor(1.0 * (i < new)))
            if i < new:
                unit = loc + softplus(raw) * e[c.max_objects + i, :3]
                mu, raw_what = mlp("encoder", look(seen(), unit)).chunk(2)
                q = D.Normal(torch.cat([loc, mu]), softplus(torch.cat([raw, raw_what])))
                z = torch.cat([unit, q.loc[3:] + q.scale[3:] * e[c.max_objects + i, 3:]])
                born += 1
                add(SimpleNamespace(z=z, before=z, h=w["starts"][2], identity=born), q,
                    D.Normal(zeros, torch.ones_like(zeros)))
        shown = f.canvas.clamp(max=1) if c.clipped else f.canvas  # eq. 19
        f.log_likelihood = D.Normal(shown, c.sigma).log_prob(x).sum()  # eq. 20
        f.identity = [o.identity for o in kept] + [0] * (c.max_objects - len(kept))
        f.z = torch.stack([o.z for o in kept] + [zeros] * (c.max_objects - len(kept)))
        objects = kept
        frames.append(f)
    return frames


SMALL = dict(
    max_objects=2, latent_size=2, glimpse_size=4, scale_mean=1.5, scale_std=0.3, lstm_size=4,
    prior_ratio=0.4, sigma=0.5,
)  # fmt: skip
SHAPE = (1, 6, 5)


def small(**overrides) -> apdr.Config:
    """Networks for exact comparisons in milliseconds."""
    return apdr.Config(**SMALL | dict(hidden_size=4) | overrides)


def make_model(config: apdr.Config, module: ModuleType = apdr, shape=SHAPE) -> nn.Module:
    """With vectors moved off the zeros that would hide mistakes, and survival far from certain."""
    torch.manual_seed(0)
    model = module.APDR(config, *shape)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name == "starts" or not parameter.any():
                parameter += 0.5 * torch.randn_like(parameter)
        model.prior_head.bias[0] -= 4
        model.search[-1].bias[0] -= 2.5
        model.decoder[-1].bias += 2
    return model


def make_inputs(config: apdr.Config, frames: int, count: int = 1, samples: int = 1) -> apdr.Inputs:
    """Of `count` sequences, each with S = `samples` histories."""
    g = torch.Generator().manual_seed(1)
    image = torch.rand(count, frames, *SHAPE, generator=g).repeat_interleave(samples, 0)
    steps = count * samples, frames, 2 * config.max_objects
    normal = torch.randn(*steps, 3 + config.latent_size, generator=g)
    uniform = torch.rand(*steps[:2], steps[2] + 1, generator=g)
    return apdr.Inputs(image, normal, uniform, samples)


def repeated(inputs: apdr.Inputs, uniform: Tensor) -> apdr.Inputs:
    """All of the inputs again and again, with these uniform numbers (.., T, 2N + 1)."""
    count = len(uniform) // len(inputs.image)
    image, normal = (x.repeat(count, *[1] * (x.ndim - 1)) for x in inputs[:2])
    return inputs._replace(image=image, normal=normal, uniform=uniform)


def copies_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: v.detach().clone().requires_grad_() for name, v in model.named_parameters()}


def forced(histories: list, most: int) -> Tensor:
    """Uniform numbers (A, T, 2N + 1) with which these histories are drawn."""
    uniform = torch.full((len(histories), len(histories[0]), 2 * most + 1), NO)
    for row, history in zip(uniform, histories, strict=True):
        for frame, (survive, new) in zip(row, history, strict=True):
            frame[: len(survive)] = torch.tensor([YES if b else NO for b in survive])
            frame[most : most + new] = YES
    return uniform


def check_eager(module: ModuleType, frames: int = 2, **overrides) -> None:
    """Every history, and the exact bound with its gradient (eq. 29 to 34)."""
    config = small(**overrides)
    model, all_of = make_model(config, module), histories_of(frames, config.max_objects)
    inputs, copies, total = make_inputs(config, frames), copies_of(model), 0
    run = module.histories(model, repeated(inputs, forced(all_of, config.max_objects)))
    for a, history in enumerate(all_of):
        log_q = 0
        for t, f in enumerate(eager(config, copies, inputs.image[0], inputs.normal[0], history)):
            for name in ("log_q", "log_p", "kl", "log_ratio", "log_likelihood"):
                value = torch.as_tensor(getattr(f, name)) * torch.ones(())
                assert_close(f"{name} of {history}", getattr(run, name)[a, t], value)
            assert_close("canvas", run.canvas[a, t], f.canvas)
            assert_close("z", run.objects.z[a, t], f.z)
            assert run.objects.identity[a, t].tolist() == f.identity, "identity is off"
            log_q = log_q + f.log_q
            # Eq. 34. A frame counts once for all histories that continue it.
            if history[t + 1 :] == [((1,) * len([i for i in g if i]), 0)
                                    for g in [f.identity] * (frames - 1 - t)]:
                total = total + log_q.exp() * (f.log_likelihood - f.kl + f.log_p - f.log_q)
    module.EXACT = frames
    surrogate, bound = module.enumerate_histories(model, inputs)
    assert_close("bound", bound[0], total)
    everything = frames > 1 and config.max_objects > 1
    assert_same_gradients(model, surrogate, copies, total, all_matter=everything)


@pytest.mark.parametrize(("most", "numbers"), [(2, [3, 16, 95, 572]), (3, [4, 43, 554])])
def test_number_of_histories(most, numbers):
    """Counted by the definition, and by the rows that `enumerate` makes."""
    config = small(max_objects=most)
    inputs = make_inputs(config, len(numbers) - 1)._replace(how="enumerate")
    model = make_model(config)
    rows = model.start(1)
    for t, number in enumerate(numbers[:-1]):
        rows = model.advance(rows, inputs, t)
        assert len(rows.sequence) == number
    assert [len(histories_of(t, most)) for t in range(1, len(numbers) + 1)] == numbers


def check_sums(module: ModuleType) -> None:
    """p and q of all histories sum to 1, and the number of survivors is Poisson-binomial."""
    config = small(max_objects=2)
    model = make_model(config, module)
    all_of = histories_of(2, 2)
    inputs = repeated(make_inputs(config, 2), forced(all_of, 2))
    run = module.histories(model, inputs)
    for name in ("log_q", "log_p"):
        total = getattr(run, name).sum(1).exp()
        assert_close(f"sum of {name}", total.sum(), torch.tensor(1.0))
        assert total.min() > 1e-6
    first = [a for a, history in enumerate(all_of) if history[0][1] == 2]
    objects = module.each(lambda v: v[first[:1], 0], run.objects)
    before = model.start(1)._replace(before=objects)
    psi = torch.cat([model.propagate(before, inputs, 1, j)[3][0].sigmoid() for j in (0, 1)])
    expected = [(1 - psi).prod(), (psi * (1 - psi.flip(0))).sum(), psi.prod()]
    for k, value in enumerate(expected):
        chosen = [a for a in first if sum(all_of[a][1][0]) == k]
        assert_close(f"p(k = {k})", run.log_p[chosen, 1].exp().sum(), value)


def check_air(module: ModuleType) -> None:
    """One frame is AIR: the same weights, noise and ELBO, to the last digit."""
    config = small(max_objects=3)
    model = make_model(config, module)
    with torch.no_grad():
        model.known.weight.zero_()  # nothing is known
    sizes = dict.fromkeys(("head_sizes", "encoder_sizes", "decoder_sizes"), (4,))
    own = air.AIR(air.Config(**SMALL | sizes | dict(max_objects=3)), *SHAPE)
    own.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():  # AIR's z_where^0 is not standardised
        own.initial[8:11] = model.window(model.initial[8:])
    inputs = make_inputs(config, 1, count=2)
    u = own.unroll(inputs.image[:, 0], inputs.normal[:, 0, 3:])
    _, elbo = module.enumerate_histories(model, inputs)
    assert_close("ELBO", elbo, air.elbo(u, own.log_prior)[0])


# -- estimators ------------------------------------------------------------------------------------


def check_unbiased(module: ModuleType, samples: int, **overrides) -> None:
    """Per-frame enumeration of three frames: the expectation of its gradient over the histories
    that continue is the gradient of the sum over all 95 histories."""
    frames, config = 3, small(**overrides)
    model, most = make_model(config, module), config.max_objects
    inputs = make_inputs(config, frames, samples=samples)
    drawn = forced([[*history, ((), 0)] for history in histories_of(frames - 1, most)], most)
    weights = []
    for s in range(samples):
        one = apdr.Inputs(*(v[s : s + 1] for v in inputs[:3]))
        run = module.histories(model, repeated(one, drawn))
        weights.append(run.log_q[:, : frames - 1].sum(1).exp().detach())
    pairs = list(itertools.product(range(len(drawn)), repeat=samples))
    weight = torch.stack([math.prod(w[a] for w, a in zip(weights, p, strict=True)) for p in pairs])
    assert_close("probability", weight.sum(), torch.tensor(1.0))
    uniform = torch.stack([drawn[a] for pair in pairs for a in pair])  # (pairs * S, T, 2N + 1)
    surrogate, bound = module.enumerate_histories(model, repeated(inputs, uniform))
    module.EXACT = frames
    exact = module.enumerate_histories(model, inputs)[0].mean()
    mean = weight @ surrogate.view(-1, samples).mean(1)
    assert_close("bound", weight @ bound.view(-1, samples).mean(1), exact)
    parameters = dict(model.named_parameters())
    assert_same_gradients(model, mean, parameters, exact, "enumerate", most > 1)


def check_vimco(module: ModuleType, samples: int = 2, frames: int = 2, **overrides) -> None:
    """The expectation over all 16^2 pairs of histories of two frames."""
    config = small(estimator="vimco", **overrides)
    model = make_model(config, module)
    one = forced(histories_of(frames, config.max_objects), config.max_objects)  # (A, T, 2N + 1)
    order = torch.tensor(list(itertools.product(range(len(one)), repeat=samples)))  # (A^S, S)
    inputs = repeated(make_inputs(config, frames, samples=samples), one[order].flatten(0, 1))
    surrogate = module.vimco(model, inputs)[0]
    run = apdr.histories(model, inputs)
    log_q = run.log_q.sum(1).view(-1, samples).sum(1)
    log_w = run.log_weight.sum(1)
    bound = log_w.view(-1, samples).logsumexp(1) - math.log(samples)
    assert_close("probability", log_q.exp().sum(), torch.tensor(1.0))
    expected = log_q.exp() @ bound
    mean = log_q.exp().detach() @ surrogate
    parameters = dict(model.named_parameters())
    assert_same_gradients(model, mean, parameters, expected, "vimco", config.max_objects > 1)


def check_relaxed(module: ModuleType) -> None:
    """torch's own density of the logit of a relaxed presence; black at 0; absent below."""
    u, q, p = torch.linspace(0.02, 0.98, 9), torch.tensor(0.3), torch.tensor(-1.1)
    model, one = make_model(small(), module), D.Normal(torch.zeros(9, 5), 1.0)
    model.discover = lambda rows, *_: (  # proposes this, whatever it sees
        rows, rows.born + 1, rows.objects.h_prior[:, 0], (p.expand(9), one), (q.expand(9), one))
    inputs = make_inputs(small(), 1, count=9)
    inputs = inputs._replace(uniform=u.view(9, 1, 1).expand(9, 1, 5), how="relax")
    rows = model.start(9)
    rows = model.decide(rows._replace(said=rows.said + 1), inputs, 0, 2)
    y = (q + torch.logit(u + 2.0**-25))[rows.sequence]
    assert len(y) == 9 and torch.equal(rows.objects.count, (y > 0).long()), "presence is off"
    relaxed = functools.partial(D.relaxed_bernoulli.LogitRelaxedBernoulli, torch.tensor(1.0))
    assert_close("log q", rows.log_q, relaxed(logits=q).log_prob(y))
    assert_close("log p", rows.log_p, relaxed(logits=p).log_prob(y))
    light = (2 * y.sigmoid() - 1).clamp(min=0).view(-1, 1, 1, 1)
    full = model.draw(inputs.normal[rows.sequence, 0, 2])
    assert_close("light", rows.canvas, light * full)


class States(NamedTuple):
    """Rows of a hidden Markov model."""

    z: Tensor  # (O,)
    sequence: Tensor
    log_weight: Tensor


# pi, A, B, x = 0, 1, 1 and proposals of a hidden Markov model; E log of the estimate by other code.
START, MOVE, EMIT, SEEN = [0.6, 0.4], [[0.7, 0.3], [0.2, 0.8]], [[0.9, 0.1], [0.3, 0.7]], (0, 1, 1)
PROPOSE = [[0.5, 0.5], [0.6, 0.4], [0.35, 0.65]]  # at first; after state 0; after state 1
BOUNDS = {(1, False): -3.3093205, (2, False): -2.7880881, (2, True): -2.7265758,
          (3, False): -2.5739296, (3, True): -2.5116254}  # (particles, resample): E log


def check_markov(module: ModuleType, samples: int, resample: bool) -> None:
    """All values of all particles, and all ancestors: E of the estimate is p(x) = .116004, E of its
    logarithm the tabulated bound; never resampling is the importance-weighted bound."""
    start, move, emit, propose = map(torch.tensor, (START, MOVE, EMIT, PROPOSE))
    values = torch.tensor(list(itertools.product((0, 1), repeat=3 * samples))).view(-1, 3, samples)
    who = torch.tensor(list(itertools.product(range(samples), repeat=2 * samples)) if resample else
                       [[0] * 2 * samples]).view(-1, 2, samples)  # fmt: skip
    a, b = (x.flatten() for x in torch.meshgrid(
        torch.arange(len(values)), torch.arange(len(who)), indexing="ij"))
    values, who = values[a], who[b]  # (A, 3, S), (A, 2, S)
    uniform, log_weight = torch.zeros(len(a), samples, 3), torch.zeros(len(a))

    def advance(rows: States, inputs: apdr.Inputs, t: int) -> States:
        z, before = values[:, t], rows.z.view(-1, samples)
        q = propose[1 + before] if t else propose[0].expand(*z.shape, 2)
        p = move[before] if t else start.expand(*z.shape, 2)
        q, p = (x.gather(2, z[..., None])[..., 0] for x in (q, p))
        w = p * emit[z, SEEN[t]] / q  # (A, S)
        log_weight.add_(q.log().sum(1))
        if t < 2 and resample:
            share = w / w.sum(1, keepdim=True)
            chance = share.gather(1, who[:, t])
            uniform[:, :, t] = share.cumsum(1).gather(1, who[:, t]) - chance / 2
            log_weight.add_(chance.log().sum(1))
        return States(z.flatten(), rows.sequence, w.log().flatten())

    none = torch.zeros(len(a) * samples)
    model = SimpleNamespace(start=lambda count: States(none.long(), none, none), advance=advance)
    inputs = apdr.Inputs(none.view(-1, 1).expand(-1, 3), none, uniform.view(-1, 3, 1), samples)
    log_z = module.particle_filter(model, inputs, resample)
    assert_close("probability", log_weight.exp().sum(), torch.tensor(1.0))
    assert_close("E of the estimate", log_weight.exp() @ log_z.exp(), torch.tensor(0.116004))
    assert_close("bound", log_weight.exp() @ log_z, torch.tensor(BOUNDS[samples, resample]), 1e-7)


@torch.no_grad()
def check_kalman(module: ModuleType) -> None:
    """One object that is always there, a linear decoder and a random walk: log p(x_1:T) in closed
    form. Importance-weighted bound and FIVO rise towards it from below."""

    class Linear(module.APDR):
        def draw(self, z: Tensor) -> Tensor:
            return (z[:, 3:] @ torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.8, -1.0]])).view(-1, 1, 1, 3)

    config = small(max_objects=1, glimpse_size=2, prior_ratio=1e15, sigma=0.6)
    model, frames = Linear(config, 1, 1, 3), 4
    for p in model.parameters():
        p.zero_()
    model.head[-1].bias.copy_(torch.tensor([40, 0, 0, 0, *[math.log(math.e - 1)] * 3]))
    model.encoder[-1].bias.copy_(torch.tensor([0.3, -0.2, 0.2, 0.2]))  # q(z_what) at first
    model.search[-1].bias[0] = model.prior_head.bias[0] = 40  # it survives, ...
    model.search[-1].bias[4:] = model.prior_head.bias[6:9] = -2.0  # ... q(z_where) is p(z_where)
    model.prior_head.bias[-2:] = -0.5  # wider steps of z_what, ...
    model.prior_head.bias[4:6] = torch.tensor([0.4, -0.3])  # ... which drifts
    g = torch.Generator().manual_seed(3)
    x = torch.randn(frames, 3, generator=g)
    step = torch.nn.functional.softplus(torch.tensor(-0.5)) + 0.01
    mix = model.draw(torch.eye(5)[3:]).view(2, 3)
    time = torch.arange(frames)
    shared = 1 + step**2 * torch.minimum(time[:, None], time)  # covariance of z in time
    covariance = torch.kron(shared, mix.T @ mix) + 0.36 * torch.eye(3 * frames)
    mean = (time[:, None] * (torch.tensor([0.4, -0.3]) @ mix)).flatten()
    log_p = D.MultivariateNormal(mean, covariance).log_prob(x.flatten())

    count, bounds = 300, {}
    for samples in (1, 4, 64):
        image = x.view(1, frames, 1, 1, 3).expand(count * samples, -1, -1, -1, -1)
        normal = torch.randn(count * samples, frames, 2, 5, generator=g)
        uniform = torch.rand(count * samples, frames, 3, generator=g)
        inputs = apdr.Inputs(image, normal, uniform, samples)
        for resample in (False, True):
            value = module.particle_filter(model, inputs, resample)
            stderr = value.std() / count**0.5
            bounds[samples, resample] = value.mean()
            assert value.mean() - 4 * stderr < log_p, "the bound is off: above log p(x)"
            if samples == 64:
                ratio = (value - log_p).exp()
                error = (ratio.mean() - 1).abs()
                assert error < 4 * ratio.std() / count**0.5, f"E of the estimate is off by {error}"
    for resample in (False, True):
        gaps = [log_p - bounds[samples, resample] for samples in (1, 4, 64)]
        assert gaps[0] > 2 * gaps[1] > 8 * gaps[2], f"the bound is off: it does not rise, {gaps}"
    assert bounds[64, True] > bounds[64, False], "FIVO is off: below the importance-weighted bound"
    assert log_p - bounds[64, True] < 0.5, "FIVO is off: far from log p(x)"


def check_filter(module: ModuleType) -> None:
    """Resampling carries all that a history is: against a loop that keeps whole histories."""
    config, samples, frames = small(), 6, 4
    model = make_model(config, module)
    with torch.no_grad():  # objects that live long
        model.search[-1].bias[0] += 4
        model.head[-1].bias[0] += 1
    inputs, passed, advance = make_inputs(config, frames, samples=samples), [], model.advance
    model.advance = lambda *arguments: passed.append(advance(*arguments)) or passed[-1]
    log_z = module.particle_filter(model, inputs)
    model.advance = advance
    total, alive = 0, [[] for _ in range(samples)]  # (particle, frame) of each particle's past
    for t in range(frames):
        now = []
        for s in range(samples):
            past = [*alive[s], (s, t)]
            one = apdr.Inputs(*(torch.stack([v[i] for i in past])[None] for v in inputs[:3]))
            rows = model.start(1)
            for i in range(t + 1):
                rows = model.advance(rows, one, i)
            now.append((past, rows.log_weight))
            assert torch.equal(passed[t].objects.identity[s], rows.objects.identity[0]), (
                "identity is off")
            assert passed[t].born[s] == rows.born[0], "the number of identities is off"
        w = torch.cat([w for _, w in now]).exp()
        total = total + w.mean().log()
        cumulative = (w / w.sum()).cumsum(0)
        alive = [now[int((cumulative < u).sum())][0] for u in inputs.uniform[:, t, -1]]
    assert_close("log of the estimate", log_z[0], total)


def test_renaming_identities_changes_nothing():
    config = small()
    model, inputs = make_model(config), make_inputs(config, 2, count=32)
    rows = model.advance(model.start(32), inputs, 0)
    objects = rows.objects._replace(identity=7 * rows.objects.identity)
    one, other = (model.advance(rows._replace(objects=o), inputs, 1)
                  for o in (rows.objects, objects))
    assert (one.objects.identity != other.objects.identity).any()
    for name in ("log_q", "log_p", "kl", "log_ratio", "log_likelihood", "canvas"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_samples_of_the_prior_are_of_the_prior():
    """The number of new objects, and of survivors where psi does not depend on the object; q's
    exploration is none of p's."""
    config = small(prior_ratio=0.5, exploration=0.3)
    model = make_model(config)
    with torch.no_grad():
        model.prior_head.weight[0] = 0
        model.prior_head.bias[0] = math.log(0.7 / 0.3)
    run = apdr.histories(model, make_inputs(config, 2, count=4000)._replace(how="prior"))
    count = run.objects.count[:, 0]
    assert_close("p(n)", count.bincount() / 4000, torch.tensor([4, 2, 1]) / 7, 0.05)
    identity = run.objects.identity
    lives = (identity[:, 1, :, None] == identity[:, :1]).any(2) & (identity[:, 1] > 0)
    assert abs(lives.sum() / count.sum() - 0.7) < 0.03
    assert_close("weight", run.log_weight, run.log_likelihood)


# -- evaluation ------------------------------------------------------------------------------------


TINY = dict(latent_size=3, glimpse_size=6, lstm_size=8, hidden_size=8, batch_size=2, steps=2,
            log_every=1, device="cpu", lengths=(1, 6), stage_steps=(1,))  # fmt: skip


def test_evaluation(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(apdr, "PARTICLES", 3)
    config = apdr.make_config("quick", **TINY)
    scenes = data.make("moving_mnist", "test")
    model = apdr.build(config, scenes)
    model.head[-1].bias.data[0] = -50  # finds nothing
    result = apdr.evaluate(model, scenes, 20)
    mean = {name: value["mean"] for name, value in result["metrics"].items()}
    empty = (scenes.batch(0, 20).present[:, 0].sum(1) == 1).double().mean().item()
    assert mean["count_accuracy"] == mean["count_accuracy_alone"] == pytest.approx(empty)
    assert mean["swaps"] is None and mean["discovered"] == mean["propagated"] == 0
    assert mean["elbo"] == pytest.approx(-mean["nll"] - mean["kl"], rel=1e-5)
    assert mean["fivo"] == pytest.approx(mean["iw_elbo"])  # nothing is random
    assert len(result["frames"]["count_accuracy"]) == 10
    # Finds two in each frame; alone, they are new in each.
    model.head[-1].bias.data[0] = model.search[-1].bias.data[0] = 99
    mean = {k: v["mean"] for k, v in apdr.evaluate(model, scenes, 20)["metrics"].items()}
    assert (mean["discovered_alone"], mean["propagated_alone"]) == (2, 0)
    assert mean["discovered"] == pytest.approx(0.2)  # known in the nine frames that follow


def test_who_was_not_there_at_first_is_not_exchanged(monkeypatch):
    """A perfect tracker, but for the last frame, in which the identities change places."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(apdr, "PARTICLES", 3)
    scenes = data.make("moving_mnist_enter", "test")
    batch = scenes.batch(0, 20)
    present = batch.present[..., 1:]  # (B, T, 2)
    identity = torch.tensor([1, 2]).repeat(20, 10, 1)
    identity[:, -1] = torch.tensor([2, 1])
    objects = SimpleNamespace(identity=identity * present, count=present.sum(2))
    zero = torch.zeros(20, 10)
    found = SimpleNamespace(objects=objects, born=zero, log_weight=zero, log_likelihood=zero)
    model = apdr.build(apdr.make_config("quick", **TINY), scenes)
    monkeypatch.setattr(apdr, "follow", lambda *_: found)
    monkeypatch.setattr(model, "boxes", lambda _: batch.factors["box"][:, :, 1:])
    exchanged = apdr.evaluate(model, scenes, 20)["metrics"]["exchanged"]
    there = int((present[:, 0] & present[:, -1]).sum())
    assert 0 < there < present[:, -1].sum() and (exchanged["mean"], exchanged["n"]) == (100, there)


def test_noise_does_not_depend_on_the_number_of_processes(monkeypatch):
    """A step's four sequences at once, or two by two: each half of each gets the same noise."""
    seen = []  # {brightness of a half: number of its noise}, where there is a digit

    def inputs(self, scenes, image, number, samples):
        light = image.sum((1, 2, 3, 4)).tolist()
        seen.append({x: n for x, n in zip(light, number.tolist(), strict=True) if x})

    monkeypatch.setattr(apdr.APDR, "inputs", inputs)
    config = apdr.make_config("quick", **TINY | dict(batch_size=4, lengths=(3, 6)))
    for numbers in ([4, 5, 6, 7], [4, 5], [6, 7]):
        run = SimpleNamespace(steps=lambda numbers=numbers: [(0, torch.tensor(numbers))],
                              update=lambda *_, **__: {}, due=lambda _: False,
                              finish=lambda *_: None)
        monkeypatch.setattr(runs, "start", lambda *_, run=run, **__: run)
        apdr.train(config)
    assert len(seen[0]) >= 4 and seen[0] == seen[1] | seen[2]


# -- options and training --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    dict(dataset="multi_mnist"), dict(mnist_dir="nowhere"), dict(kernels="torch"),
    dict(estimator="vimco", num_samples=1), dict(estimator="fivo", num_samples=1),
    dict(hidden_size=0), dict(exploration=1.0), dict(sigma=0.0), dict(stage_steps=(5,)),
    dict(stage_steps=(), lengths=(3,)),
    dict(crossing=2.0), dict(dataset="runs/moving_mnist"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused(changes):
    """By an error that names the last option."""
    with pytest.raises(runs.UserError, match=runs.option(list(changes)[-1])):
        apdr.check(apdr.make_config(**changes))


@pytest.mark.parametrize("changes", [
    dict(estimator="vimco"), dict(estimator="fivo", precision="bfloat16"),
    dict(dataset="moving_mnist_leave", crossing=0.0, difference=False), dict(),
], ids=str)  # fmt: skip
def test_every_option_trains(changes, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(apdr, "PARTICLES", 3)
    monkeypatch.setattr(apdr, "evaluate", functools.partial(apdr.evaluate, count=20))
    monkeypatch.setattr(apdr, "draw", lambda *_: None)
    result = apdr.train(apdr.make_config(out=tmp_path / "run", **TINY | changes))
    assert result["skipped"] == 0
    assert all(math.isfinite(result["metrics"][name]["mean"]) for name in ("elbo", "fivo"))


# -- all checks, and mutants that they must catch --------------------------------------------------

CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "sums": check_sums, "air": check_air, "relaxed": check_relaxed, "kalman": check_kalman,
    "filter": check_filter, "vimco": check_vimco,
}  # fmt: skip
for name, check, options in (
    ("eager", check_eager, dict()),
    ("one frame", check_eager, dict(frames=1)),
    ("three", check_eager, dict(max_objects=3)),
    ("long", check_eager, dict(frames=4, max_objects=1)),
    ("options", check_eager, dict(difference=True, clipped=True, exploration=0.3)),
    ("match", check_eager, dict(match=2, max_objects=1)),
    ("match of two", check_eager, dict(match=1, frames=3, difference=True)),
    ("per frame", check_unbiased, dict(samples=1)),
    ("per frame of two", check_unbiased, dict(samples=2, max_objects=1, exploration=0.2)),
    ("vimco of three", check_vimco, dict(samples=3, max_objects=1, exploration=0.2)),
    *((f"markov {s}, {r}", check_markov, dict(samples=s, resample=r)) for s, r in BOUNDS),
):  # fmt: skip
    CHECKS[name] = functools.partial(check, **options)

GATHERED = "rows = take(rows, (order[:, :1] + drawn).flatten())"
FUTURE = "future = bounds.detach().flip(1).cumsum(1).flip(1) - bounds.detach()"
OTHERS = "others = (log_w.sum(1, keepdim=True) - log_w) / (samples - 1)"
MUTANTS: dict[str, tuple[str, str, str]] = {  # name: (check, text of apdr.py, its mutation)
    "identities not gathered on resampling": (
        "filter", GATHERED, f"before = rows\n            {GATHERED}\n"
        "            ids = before.objects.identity\n"
        "            rows = rows._replace(objects=rows.objects._replace(identity=ids))"),
    "h^q not gathered on resampling": (
        "filter", GATHERED, f"before = rows\n            {GATHERED}\n"
        "            rows = rows._replace(h_time=before.h_time)"),
    "p(n) of N instead of N - k": (
        "eager", "c.max_objects - rows.objects.count]", "2 - (number - 2)]"),
    "q(n) of N - 1": (
        "eager", "count < self.config.max_objects)", "count < self.config.max_objects - 1)"),
    "h^prior not reset for a new object": (
        "eager", "self.starts[2].expand(len(noise), -1)", "self.starts[0].expand(len(noise), -1)"),
    "h^prior not updated": (
        "long", "[state, before[:, 1:3]]", "[h_prior[:, :-2], before[:, 1:3]]"),
    "the place is not updated": ("long", "[state, before[:, 1:3]]", "[state, earlier]"),
    "a new object moves": (
        "eager", "where[:, 1:3]], 1)\n        return", "loc[:, 1:3]], 1)\n        return"),
    "p(b) of the state before": (
        "eager", "self.prior_head(state)", "self.prior_head(h_prior[:, :-2])"),
    "the last object is not in h^P": (
        "eager", "rows._replace(relation=relation, said=", "rows._replace(said="),
    "x among the arguments of p": (
        "eager", "q * (rows.log_likelihood -", "q * (2 * rows.log_likelihood -"),
    "b and z given z^1:i": ("eager", "torch.cat([h, last], 1)", "torch.cat([h, last + noise], 1)"),
    "an object that is gone is remembered": (
        "eager", "ask._replace(said=torch.zeros_like(ask.said))",
        "ask._replace(said=yes.said * torch.eye(6)[5].neg().add(1))"),
    "identities given anew": (
        "eager", "return rows, identity, h_prior,", "return rows, rows.born + 1, h_prior,"),
    "identities not counted": ("eager", "born=torch.maximum(ask.born, identity)", "born=ask.born"),
    "the prior forgets where objects were": ("eager", "loc = before + F.pad", "loc = F.pad"),
    "the search looks no wider": ("eager", "self.window(where) / 2", "self.window(where)"),
    "the search looks where it was": ("eager", "self.window(where) / 2", "self.window(before) / 2"),
    "z_what as it was": ("eager", "[where + shift, loc[:, 3:]]", "[where + shift, before[:, 3:]]"),
    "match: away from the picture": ("match", "- F.pad(log_ratio", "+ F.pad(log_ratio"),
    "match: rows for columns": (
        "match", "cartesian_prod(shift, shift).flip(1)", "cartesian_prod(shift, shift)"),
    "match: does not say who is gone": ("match", "logit[:, 0] + fit", "logit[:, 0]"),
    "match: sum over shifts": ("match", "- 2 * math.log(shifts)", "- 0 * shifts"),
    "match: without the object's own light": ("match", "* area / 2", "* area * 0"),
    "match: pixels of the glimpse": ("match", "products.flatten(1) * area", "products.flatten(1)"),
    "match: other objects seen": ("match of two", "(there > 0)[:, None", "0 * (there > 0)[:, None"),
    "match: itself not seen": ("match of two", "v[:, j + 1 :].unbind(1)", "v[:, j:].unbind(1)"),
    "match: others where they were": (
        "match of two", "F.pad(z[:, 1:3] - h[:, -2:], (", "0 * F.pad(z[:, 1:3], ("),
    "not clipped": ("options", "rows.canvas.clamp(max=1) if", "rows.canvas if"),
    "exploration doubled": ("options", "self.exploration / 2", "self.exploration"),
    "KL of q and p exchanged": ("eager", "D.kl_divergence(q_z, p_z)", "D.kl_divergence(p_z, q_z)"),
    "forget gate": ("air", "torch.sigmoid(f + 1)", "torch.sigmoid(f)"),
    "stop not in q(n)": ("sums", "((F.logsigmoid(-v), F", "((-F.logsigmoid(v), F"),
    "per frame: no score": (
        "per frame", "surrogate + (signal * torch.stack(chosen, 1)).sum(1)", "surrogate"),
    "per frame: the present is in the future": ("per frame", FUTURE, FUTURE.partition(" - ")[0]),
    "per frame: only the next frame": (
        "per frame", FUTURE, "future = F.pad(bounds.detach()[:, 1:], (0, 1))"),
    "per frame: future not stopped": ("per frame", FUTURE, FUTURE.replace(".detach()", "")),
    "per frame: own future in the baseline": (
        "per frame of two", "others = (future.sum(1, keepdim=True) - future) / max(samples - 1, 1)",
        "others = future.mean(1, keepdim=True)"),
    "per frame: whole history weighs": (
        "per frame", "(rows.log_history if exact else rows.log_q)", "rows.log_history"),
    "vimco: signal log w_k instead of the bound": (
        "vimco", "(bound - (without", "(log_w - (without"),
    "vimco: mean over samples": ("vimco", "(signal * log_q).sum(1)", "(signal * log_q).mean(1)"),
    "vimco: no path term": ("vimco", "return bound[:, 0] +", "return bound.detach()[:, 0] +"),
    "vimco: own sample in the baseline": (
        "vimco", OTHERS, "others = log_w.mean(1, keepdim=True).expand_as(log_w)"),
    "weights not reset": ("markov 2, True", "log_w = torch.zeros_like(log_w)", "log_w = log_w * 1"),
    "weights at resampling not counted": (
        "markov 2, True", "total = total + log_w.logsumexp(1) - math.log(samples)", "pass"),
    "a sum of weights": (
        "markov 2, False", "return total + log_w.logsumexp(1) - math.log(samples)",
        "return total + log_w.logsumexp(1)"),
    "relaxed: wrong density": ("relaxed", "2 * F.softplus(v - y)", "F.softplus(v - y)"),
    "relaxed: not black at 0": ("relaxed", "torch.tanh(y / 2)", "torch.sigmoid(y)"),
}  # fmt: skip
mutated = functools.partial(mutants.mutated, apdr)


@pytest.mark.parametrize("name", CHECKS)
def test_check(name):
    """Of the source read as the mutants are: else the next test would prove nothing."""
    CHECKS[name](mutated())


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    check, old, new = MUTANTS[name]
    with pytest.raises(AssertionError, match=r" off\b"):
        CHECKS[check](mutated(old, new))
