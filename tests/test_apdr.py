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

    def look(picture: Tensor, where: Tensor, wider: float = 1.0) -> Tensor:
        scale, col, row = (mean + std * where) / wider
        theta = axis_aligned(1 / scale, -col / scale, -row / scale)
        return reference_warp(picture[None], theta[None], [c.glimpse_size] * 2).flatten()

    def draw(z: Tensor) -> Tensor:
        glimpse = (mlp("decoder", z[3:]) - 2).sigmoid().view(1, channels, *[c.glimpse_size] * 2)
        return reference_warp(glimpse, axis_aligned(*(mean + std * z[:3]))[None], size)[0]

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
            psi = torch.tensor([c.survival]) if c.survival else (psi + 4.6).sigmoid()
            p = D.Normal(o.z + shift, softplus(raw - 1) + 0.01)  # eq. 14
            relation = gru("relation_cell", said, relation)  # eq. 24
            states = torch.cat([o.z, h_time, relation])
            glimpse = look(seen(), p.loc[:3], 2.0)
            logit, shift, raw = mlp("search", torch.cat([glimpse, states])).split([1, 3, 3])
            q = D.Normal(p.loc[:3] + shift, softplus(raw - 1) + 0.01)
            where = q.loc + q.scale * e[j, :3]
            loc, raw = mlp("encoder", look(seen(), where)).chunk(2)
            gate, raw_now = linear("renew", torch.cat([loc, softplus(raw), states])).chunk(2)
            keep = (gate + 3).sigmoid()
            what = D.Normal(keep * o.z[3:] + (1 - keep) * loc, softplus(raw_now - 1) + 0.01)
            q = D.Normal(torch.cat([q.loc, what.loc]), torch.cat([q.scale, what.scale]))
            z, value = torch.cat([where, what.loc + what.scale * e[j, 3:]]), torch.tensor([b * 1.0])
            f.log_q = f.log_q + explored(logit + 3).log_prob(value)[0]
            f.log_p = f.log_p + D.Bernoulli(psi).log_prob(value)[0]
            said = torch.cat([z, torch.ones(1)]) if b else torch.zeros(len(said))
            if b:  # eq. 26
                add(SimpleNamespace(z=z, h=h, identity=o.identity), q, p)
        relation = gru("relation_cell", said, relation)
        room = c.max_objects - len(kept)
        odds = torch.tensor([c.prior_ratio**n for n in range(room + 1)])
        f.log_p = f.log_p + (odds[new] / odds.sum()).log()  # eq. 13
        h, cell, drawn = w["initial"].split([c.lstm_size, c.lstm_size, len(zeros)])
        for i in range(min(new + 1, room)):  # eq. 27
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
                drawn, born = torch.cat([mean + std * unit, z[3:]]), born + 1
                add(SimpleNamespace(z=z, h=w["starts"][2], identity=born), q,
                    D.Normal(zeros, torch.ones_like(zeros)))
        shown = f.canvas.clamp(max=1) if c.clipped else f.canvas  # eq. 19
        f.log_likelihood = D.Normal(shown, c.sigma).log_prob(x).sum()  # eq. 20
        f.identity = [o.identity for o in kept] + [0] * (c.max_objects - len(kept))
        objects = kept
        frames.append(f)
    return frames


SMALL = dict(
    max_objects=2, latent_size=2, glimpse_size=4, scale_mean=1.5, scale_std=0.3, lstm_size=4,
    head_sizes=(4,), encoder_sizes=(4,), decoder_sizes=(4,), prior_ratio=0.4, sigma=0.5,
    num_samples=1,
)  # fmt: skip
SHAPE = (1, 6, 5)


def small(**overrides) -> apdr.Config:
    """Networks for exact comparisons in milliseconds."""
    return apdr.Config(**SMALL | overrides)


def make_model(config: apdr.Config, module: ModuleType = apdr, shape=SHAPE) -> nn.Module:
    """With vectors moved off the zeros that would hide mistakes, and survival far from certain."""
    torch.manual_seed(0)
    model = module.APDR(config, *shape)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name == "starts":
                parameter += 0.5 * torch.randn_like(parameter)
        model.prior_head.bias[0] -= 4
        model.search[-1].bias[0] -= 2.5
        model.decoder[-1].bias += 2
    return model


def make_inputs(config: apdr.Config, frames: int, count: int = 1, shape=SHAPE):
    """image (O, T, C, H, W), normal (O, T, 2N, Z), uniform (O, T, 2N + 1)."""
    g = torch.Generator().manual_seed(1)
    steps = count, frames, 2 * config.max_objects
    normal = torch.randn(*steps, 3 + config.latent_size, generator=g)
    uniform = torch.rand(*steps[:2], steps[2] + 1, generator=g)
    return torch.rand(count, frames, *shape, generator=g), normal, uniform


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


def unroll(model: nn.Module, module: ModuleType, image, normal, uniform, how="sample") -> list:
    """The rows of every frame."""
    rows, found = model.start(len(image)), []
    for t in range(image.shape[1]):
        found.append(rows := model.advance(rows, module.Frame(
            image[:, t], normal[:, t], uniform[:, t, :-1], how, True)))
    return found


def check_eager(module: ModuleType, frames: int = 2, **overrides) -> None:
    """Every history, and the exact bound with its gradient (eq. 29 to 34)."""
    config = small(**overrides)
    model, all_of = make_model(config, module), histories_of(frames, config.max_objects)
    image, normal, _ = make_inputs(config, frames)
    copies = copies_of(model)
    many = [x.expand(len(all_of), *x.shape[1:]) for x in (image, normal)]
    rows = unroll(model, module, *many, forced(all_of, config.max_objects))
    total = 0
    for a, history in enumerate(all_of):
        log_q = 0
        for t, f in enumerate(eager(config, copies, image[0], normal[0], history)):
            for name in ("log_q", "log_p", "kl", "log_ratio", "log_likelihood"):
                value = torch.as_tensor(getattr(f, name)) * torch.ones(())
                assert_close(f"{name} of {history}", getattr(rows[t], name)[a], value)
            assert_close("canvas", rows[t].canvas[a], f.canvas)
            assert rows[t].objects.identity[a].tolist() == f.identity, "identity is off"
            assert (rows[t].objects.identity[a] > 0).equal(rows[t].objects.present[a])
            log_q = log_q + f.log_q
            # Eq. 34. A frame counts once for all histories that continue it.
            if history[t + 1 :] == [((1,) * len([i for i in g if i]), 0)
                                    for g in [f.identity] * (frames - 1 - t)]:
                total = total + log_q.exp() * (f.log_likelihood - f.kl + f.log_p - f.log_q)
    module.EXACT = frames
    uniform = torch.zeros(1, frames, 2 * config.max_objects + 1)
    surrogate, bound, _ = module.enumerate_histories(model, image, normal, uniform, 1)
    assert_close("bound", bound[0], total)
    everything = frames > 1 and config.max_objects > 1
    assert_same_gradients(model, surrogate, copies, total, all_matter=everything)


@pytest.mark.parametrize(("most", "numbers"), [(2, [3, 16, 95, 572]), (3, [4, 43, 554])])
def test_number_of_histories(most, numbers):
    """Counted by the definition, and by the rows that `enumerate` makes."""
    config = small(max_objects=most)
    image, normal, uniform = make_inputs(config, len(numbers) - 1)
    rows = unroll(make_model(config), apdr, image, normal, uniform, "enumerate")
    assert [len(r.sequence) for r in rows] == numbers[:-1]
    assert [len(histories_of(t, most)) for t in range(1, len(numbers) + 1)] == numbers


def check_sums(module: ModuleType) -> None:
    """p and q of all histories sum to 1, and the number of survivors is Poisson-binomial."""
    config = small(max_objects=2)
    model = make_model(config, module)
    all_of = histories_of(2, 2)
    image, normal, _ = make_inputs(config, 2)
    many = [x.expand(len(all_of), *x.shape[1:]) for x in (image, normal)]
    rows = unroll(model, module, *many, forced(all_of, 2))
    for name in ("log_q", "log_p"):
        total = sum(getattr(r, name) for r in rows).exp()
        assert_close(f"sum of {name}", total.sum(), torch.tensor(1.0))
        assert total.min() > 1e-6
    first = [a for a, history in enumerate(all_of) if history[0][1] == 2]
    with torch.no_grad():
        psi = model.predict(module.take(rows[0], torch.tensor(first[:1]))).survival[0].sigmoid()
    expected = [(1 - psi).prod(), (psi * (1 - psi.flip(0))).sum(), psi.prod()]
    for k, value in enumerate(expected):
        chosen = [a for a in first if sum(all_of[a][1][0]) == k]
        assert_close(f"p(k = {k})", rows[1].log_p[chosen].exp().sum(), value)


def check_air(module: ModuleType) -> None:
    """One frame is AIR: the same weights, noise and ELBO, to the last digit."""
    config = small(max_objects=3)
    model = make_model(config, module)
    with torch.no_grad():
        model.known.weight.zero_()  # nothing is known
    own = air.AIR(air.Config(**SMALL | dict(max_objects=3)), *SHAPE)
    own.load_state_dict(model.state_dict(), strict=False)
    image, normal, uniform = make_inputs(config, 1, count=2)
    u = own.unroll(image[:, 0], normal[:, 0, 3:])
    bound, nll, _ = air.elbo(u, own.log_prior)
    _, elbo, own_nll = module.enumerate_histories(model, image, normal, uniform, 1)
    assert_close("ELBO", elbo, bound)
    assert_close("nll", own_nll, nll)


# -- estimators ------------------------------------------------------------------------------------


def leaves(model: nn.Module, image: Tensor, normal: Tensor, frames: int) -> list:
    """Of one sequence: (probability, uniform numbers (T,)) of every choice of the rows that go on
    in all frames but the last."""
    rows, found = model.start(1), []

    def descend(rows, t: int, weight: float, chosen: list) -> None:
        if t == frames - 1:
            found.append((weight, torch.tensor([*chosen, 0.5])))
            return
        frame = apdr.Frame(image[None, t], normal[None, t],
                           torch.full((1, normal.shape[1]), 0.5), "enumerate", True)
        rows = model.advance(rows, frame)
        q = rows.log_q.exp().detach()
        middle = q.cumsum(0) - q / 2
        for i in range(len(q)):
            one = apdr.take(rows, torch.tensor([i]))
            descend(one, t + 1, weight * q[i].item(), [*chosen, middle[i].item()])

    descend(rows, 0, 1.0, [])
    return found


def check_unbiased(module: ModuleType, samples: int, **overrides) -> None:
    """Per-frame enumeration of three frames: the expectation of its gradient over all choices is
    the gradient of the sum over all 95 histories."""
    frames, config = 3, small(num_samples=samples, **overrides)
    model = make_model(config, module)
    image, normal, _ = make_inputs(config, frames, count=samples)
    image = image[:1].expand(samples, *image.shape[1:])
    trees = [leaves(model, image[s], normal[s], frames) for s in range(samples)]
    pairs = list(itertools.product(*trees))
    weight = torch.tensor([math.prod(w for w, _ in pair) for pair in pairs])
    assert_close("probability", weight.sum(), torch.tensor(1.0))
    chosen = torch.stack([u for pair in pairs for _, u in pair])  # (pairs * S, T)
    uniform = torch.full((*chosen.shape, 2 * config.max_objects + 1), 0.5)
    uniform[..., -1] = chosen
    many = [x.repeat(len(pairs), *[1] * (x.ndim - 1)) for x in (image, normal)]
    surrogate, bound, _ = module.enumerate_histories(model, *many, uniform, samples)
    module.EXACT = frames
    exact = module.enumerate_histories(model, image, normal, uniform[:samples], samples)[0].mean()
    mean = weight @ surrogate.view(-1, samples).mean(1)
    assert_close("bound", weight @ bound.view(-1, samples).mean(1), exact)
    parameters = dict(model.named_parameters())
    assert_same_gradients(model, mean, parameters, exact, "enumerate", config.max_objects > 1)


def check_vimco(module: ModuleType, samples: int = 2, frames: int = 2, **overrides) -> None:
    """The expectation over all 16^2 pairs of histories of two frames."""
    config = small(estimator="vimco", num_samples=samples, **overrides)
    model = make_model(config, module)
    image, normal, _ = make_inputs(config, frames, count=samples)
    image = image[:1].expand(samples, *image.shape[1:])
    one = forced(histories_of(frames, config.max_objects), config.max_objects)  # (A, T, 2N + 1)
    order = torch.tensor(list(itertools.product(range(len(one)), repeat=samples)))  # (A^S, S)
    uniform = one[order].flatten(0, 1)
    many = [x.repeat(len(order), *[1] * (x.ndim - 1)) for x in (image, normal)]
    surrogate = module.vimco(model, *many, uniform, samples)[0]
    rows = unroll(model, apdr, *many, uniform)
    log_q = sum(r.log_q for r in rows).view(-1, samples).sum(1)
    log_w = sum(r.log_weight for r in rows)
    bound = log_w.view(-1, samples).logsumexp(1) - math.log(samples)
    assert_close("probability", log_q.exp().sum(), torch.tensor(1.0))
    expected = log_q.exp() @ bound
    mean = log_q.exp().detach() @ surrogate
    parameters = dict(model.named_parameters())
    assert_same_gradients(model, mean, parameters, expected, "vimco", config.max_objects > 1)


def check_relaxed(module: ModuleType) -> None:
    """torch's own density of the logit of a relaxed presence; black at 0; absent below."""
    t = 0.7
    model = make_model(small(estimator="fivo", num_samples=2, temperature=t), module)
    u, q, p = torch.linspace(0.02, 0.98, 9), torch.tensor(0.3), torch.tensor(-1.1)
    frame = module.Frame(None, None, None, "relax")
    y = (q + torch.logit(u + 2.0**-25)) / t
    relaxed = functools.partial(D.relaxed_bernoulli.LogitRelaxedBernoulli, torch.tensor(t))
    for present in (False, True):
        index, log_q, log_p, light = model.decide(q.expand(9), p.expand(9), u, present, frame)
        assert index.tolist() == [i for i in range(9) if (y[i] > 0) == present], "presence is off"
        assert_close("log q", log_q, relaxed(logits=q).log_prob(y[index]))
        assert_close("log p", log_p, relaxed(logits=p).log_prob(y[index]))
        assert_close("light", light, 2 * y[index].sigmoid() - 1)


class States(NamedTuple):
    z: Tensor  # (O,)


# pi, A, B, x = 0, 1, 1 and proposals of a hidden Markov model; E log of the estimate by other code.
START, MOVE, EMIT, SEEN = [0.6, 0.4], [[0.7, 0.3], [0.2, 0.8]], [[0.9, 0.1], [0.3, 0.7]], (0, 1, 1)
PROPOSE = [[0.5, 0.5], [0.6, 0.4], [0.35, 0.65]]  # at first; after state 0; after state 1
BOUNDS = {(1, 0.0): -3.3093205, (2, 0.0): -2.7880881, (2, 2.0): -2.7265758, (3, 0.0): -2.5739296,
          (3, 2.0): -2.5116254}  # (particles, least): E log; 2: always resampled  # fmt: skip


def check_markov(module: ModuleType, samples: int, least: float) -> None:
    """All values of all particles, and all ancestors: E of the estimate is p(x) = .116004, E of its
    logarithm the tabulated bound; never resampling is the importance-weighted bound."""
    start, move, emit, propose = map(torch.tensor, (START, MOVE, EMIT, PROPOSE))
    values = torch.tensor(list(itertools.product((0, 1), repeat=3 * samples))).view(-1, 3, samples)
    who = torch.tensor(list(itertools.product(range(samples), repeat=2 * samples)) if least else
                       [[0] * 2 * samples]).view(-1, 2, samples)  # fmt: skip
    a, b = (x.flatten() for x in torch.meshgrid(
        torch.arange(len(values)), torch.arange(len(who)), indexing="ij"))
    values, who = values[a], who[b]  # (A, 3, S), (A, 2, S)
    uniform, log_weight = torch.zeros(len(a), samples, 3), torch.zeros(len(a))

    def advance(rows: States, t: int) -> tuple[States, Tensor]:
        z, before = values[:, t], rows.z.view(-1, samples)
        q = propose[1 + before] if t else propose[0].expand(*z.shape, 2)
        p = move[before] if t else start.expand(*z.shape, 2)
        q, p = (x.gather(2, z[..., None])[..., 0] for x in (q, p))
        w = p * emit[z, SEEN[t]] / q  # (A, S)
        log_weight.add_(q.log().sum(1))
        if t < 2 and least:
            share = w / w.sum(1, keepdim=True)
            chance = share.gather(1, who[:, t])
            uniform[:, :, t] = share.cumsum(1).gather(1, who[:, t]) - chance / 2
            log_weight.add_(chance.log().sum(1))
        return States(z.flatten()), w.log().flatten()

    log_z = module.particle_filter(States(torch.zeros(len(a) * samples).long()), advance, uniform,
                                   least)
    assert_close("probability", log_weight.exp().sum(), torch.tensor(1.0))
    assert_close("E of the estimate", log_weight.exp() @ log_z.exp(), torch.tensor(0.116004))
    assert_close("bound", log_weight.exp() @ log_z, torch.tensor(BOUNDS[samples, least]), 1e-7)


@torch.no_grad()
def check_kalman(module: ModuleType) -> None:
    """One object that is always there, a linear decoder and a random walk: log p(x_1:T) in closed
    form. Importance-weighted bound and FIVO rise towards it from below."""

    class Linear(module.APDR):
        def draw(self, z: Tensor) -> Tensor:
            return (z[:, 3:] @ torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.8, -1.0]])).view(-1, 1, 1, 3)

    config = small(max_objects=1, glimpse_size=2, prior_ratio=1e15, survival=1 - 1e-13, sigma=0.4)
    model, frames = Linear(config, 1, 1, 3), 4
    for p in model.parameters():
        p.zero_()
    model.head[-1].bias.copy_(torch.tensor([40, 0, 0, 0, *[math.log(math.e - 1)] * 3]))
    model.encoder[-1].bias.copy_(torch.tensor([0.3, -0.2, 0.2, 0.2]))  # q(z_what) at first
    model.search[-1].bias[0] = 40
    model.prior_head.bias[-2:] = 0.5  # wider steps of z_what, ...
    model.prior_head.bias[4:6] = torch.tensor([0.4, -0.3])  # ... which drifts
    model.renew.bias[2:] = 0.7
    g = torch.Generator().manual_seed(3)
    x = torch.randn(frames, 3, generator=g)
    step = torch.nn.functional.softplus(torch.tensor(0.5 - 1)) + 0.01
    mix = model.draw(torch.eye(5)[3:]).view(2, 3)
    time = torch.arange(frames)
    shared = 1 + step**2 * torch.minimum(time[:, None], time)  # covariance of z in time
    covariance = torch.kron(shared, mix.T @ mix) + 0.16 * torch.eye(3 * frames)
    mean = (time[:, None] * (torch.tensor([0.4, -0.3]) @ mix)).flatten()
    log_p = D.MultivariateNormal(mean, covariance).log_prob(x.flatten())

    count, bounds = 300, {}
    for samples in (1, 4, 64):
        image = x.view(1, frames, 1, 1, 3).expand(count * samples, -1, -1, -1, -1)
        normal = torch.randn(count * samples, frames, 2, 5, generator=g)
        uniform = torch.rand(count * samples, frames, 3, generator=g)
        for least in (0.0, 2.0):
            value, _ = module.filtered(model, image, normal, uniform, samples, least=least)
            stderr = value.std() / count**0.5
            bounds[samples, least] = value.mean()
            assert value.mean() - 4 * stderr < log_p, "the bound is off: above log p(x)"
            if samples == 64:
                ratio = (value - log_p).exp()
                error = (ratio.mean() - 1).abs()
                assert error < 4 * ratio.std() / count**0.5, f"E of the estimate is off by {error}"
    for least in (0.0, 2.0):
        gaps = [log_p - bounds[samples, least] for samples in (1, 4, 64)]
        assert gaps[0] > 2 * gaps[1] > 8 * gaps[2], f"the bound is off: it does not rise, {gaps}"
    assert bounds[64, 2.0] > bounds[64, 0.0], "FIVO is off: below the importance-weighted bound"
    assert log_p - bounds[64, 2.0] < 0.5, "FIVO is off: far from log p(x)"


def check_filter(module: ModuleType) -> None:
    """Resampling carries all that a history is: against a loop that keeps whole histories."""
    config, samples, frames = small(num_samples=6), 6, 4
    model = make_model(config, module)
    with torch.no_grad():  # objects that live long
        model.search[-1].bias[0] += 4
        model.head[-1].bias[0] += 1
    image, normal, uniform = make_inputs(config, frames, count=samples)
    image = image[:1].expand_as(image)
    log_z, passed = module.filtered(model, image, normal, uniform, samples, least=2.0)
    total, alive = 0, [[] for _ in range(samples)]  # uniform numbers of each particle's past
    for t in range(frames):
        now = []
        for s in range(samples):
            pasts = [*alive[s], (image[s, t], normal[s, t], uniform[s, t])]
            inputs = [torch.stack(v)[None] for v in zip(*pasts, strict=True)]
            rows, f = model.start(1), None
            for i in range(t + 1):
                f = module.Frame(inputs[0][:, i], inputs[1][:, i], inputs[2][:, i, :-1], "sample")
                rows = model.advance(rows, f)
            now.append((pasts, rows, rows.log_weight))
            assert torch.equal(passed[t].objects.identity[s], rows.objects.identity[0]), (
                "identity is off")
            assert passed[t].born[s] == rows.born[0], "the number of identities is off"
        w = torch.cat([w for *_, w in now]).exp()
        total = total + w.mean().log()
        cumulative = (w / w.sum()).cumsum(0)
        ancestors = [int((cumulative < u).sum()) for u in uniform[:, t, -1]]
        alive = [now[a][0] for a in ancestors]
    assert_close("log of the estimate", log_z[0], total)


def test_renaming_identities_changes_nothing():
    config = small()
    model = make_model(config)
    image, normal, uniform = make_inputs(config, 2, count=32)
    rows = unroll(model, apdr, image[:, :1], normal, uniform)[0]
    objects = rows.objects
    renamed = objects._replace(identity=(7 * objects.identity).flip(1).flip(1))
    frame = apdr.Frame(image[:, 1], normal[:, 1], uniform[:, 1, :-1], "sample")
    one, other = (model.advance(rows._replace(objects=o), frame) for o in (objects, renamed))
    for name in ("log_q", "log_p", "kl", "log_ratio", "log_likelihood", "canvas"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_pick_is_fair():
    """Each row for the share of uniform numbers that is its probability; float32 too."""
    sequence = torch.tensor([0, 0, 1, 2, 2, 2])
    q = torch.tensor([0.3, 0.7, 1.0, 0.2, 0.5, 0.3])
    for u, rows in ((0.0, [0, 2, 3]), (0.29, [0, 2, 4]), (0.31, [1, 2, 4]), (0.71, [1, 2, 5]),
                    (1 - 2.0**-24, [1, 2, 5])):  # fmt: skip
        uniform = torch.full((3,), u)
        for kind in (torch.float64, torch.float32):
            assert apdr.pick(sequence, q.log().to(kind), uniform.to(kind)).tolist() == rows


def test_samples_of_the_prior_are_of_the_prior():
    """The number of new objects, and of survivors with psi held."""
    config = small(prior_ratio=0.5, survival=0.7)
    model = make_model(config)
    image, normal, uniform = make_inputs(config, 2, count=4000)
    run = apdr.histories(model, image, normal, uniform, "prior")
    first = run.objects.present[:, 0].sum(1)
    share = first.bincount() / 4000
    assert_close("p(n)", share, torch.tensor([4, 2, 1]) / 7, 0.05)
    identity = run.objects.identity
    lives = (identity[:, 1, :, None] == identity[:, :1]).any(2) & (identity[:, 1] > 0)
    assert abs(lives.sum() / first.sum() - 0.7) < 0.03
    assert_close("weight", run.log_weight, run.log_likelihood)


# -- evaluation ------------------------------------------------------------------------------------


def test_identity_swaps():
    """Two objects that pass each other; boxes keep, exchange, lose and renew their identities."""
    col = torch.tensor([[0.0, 30], [10, 20], [20, 10], [30, 0]])  # (T, E)
    true = torch.stack([torch.zeros_like(col), col, *[torch.full_like(col, 12)] * 2], -1)[None]
    present = torch.ones(1, 4, 2, dtype=torch.bool)
    for identity, used, swaps in (
        ([[1, 2]] * 4, None, [0] * 8), ([[2, 1]] * 4, None, [0] * 8),
        ([[1, 2]] * 2 + [[2, 1]] * 2, None, [0, 0, 0, 0, 1, 1, 0, 0]),
        ([[1, 2], [1, 2], [3, 2], [3, 2]], None, [0, 0, 0, 0, 1, 0, 0, 0]),
        ([[1, 2]] * 4, (1, 0), [0, 0, None, 0, 0, 0, 0, 0]),
    ):  # fmt: skip
        there = present.clone()
        if used:
            there[0, used[0], used[1]] = False
        found = apdr.identity_swaps(true, present, true, there, torch.tensor([identity]))
        expected = torch.tensor([math.nan if s is None else s for s in swaps]).view(1, 4, 2)
        assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))
    # Boxes that cover both objects stay with the one that they had.
    wide = true.clone()
    wide[0, 1:3, :, 1], wide[0, 1:3, :, 3] = 5, 30
    ids = torch.tensor([[[1, 2]] * 4])
    assert apdr.identity_swaps(true, present, wide.flip(2), present, ids.flip(2)).sum() == 0


TINY = dict(latent_size=3, glimpse_size=6, lstm_size=8, head_sizes=(8,), encoder_sizes=(8,),
            decoder_sizes=(8,), batch_size=2, steps=2, log_every=1, device="cpu", lengths=(1, 6),
            stage_steps=(1,))  # fmt: skip


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
    assert mean["swaps"] is None and mean["box_iou"] == 0
    assert mean["elbo"] == pytest.approx(-mean["nll"] - mean["kl"], rel=1e-5)
    assert mean["fivo"] == pytest.approx(mean["iw_elbo"])  # nothing is random
    assert len(result["frames"]["count_accuracy"]) == 10


# -- options and training --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    dict(dataset="multi_mnist"), dict(mnist_dir="nowhere"), dict(kernels="torch"),
    dict(estimator="vimco", num_samples=1), dict(estimator="fivo", num_samples=1),
    dict(head_sizes=(8, 0)), dict(exploration=1.0), dict(survival=1.0), dict(sigma=0.0),
    dict(stage_steps=(5,)), dict(stage_steps=(), lengths=(3,)), dict(lengths=(1, 6, 2)),
    dict(dataset="moving_mnist_enter", crossing=0.5),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused(changes):
    """By an error that names the last option."""
    with pytest.raises(runs.UserError, match=runs.option(list(changes)[-1])):
        apdr.check(apdr.make_config(**changes))


@pytest.mark.parametrize("changes", [
    dict(estimator="vimco"), dict(estimator="fivo", precision="bfloat16"),
    dict(survival=0.0, dataset="moving_mnist_leave", crossing=0.0, difference=False), dict(),
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
    ("long", check_eager, dict(frames=3, max_objects=1)),
    ("options", check_eager, dict(difference=True, clipped=True, survival=0.8, exploration=0.3)),
    ("per frame", check_unbiased, dict(samples=1)),
    ("per frame of two", check_unbiased, dict(samples=2, max_objects=1, exploration=0.2)),
    ("vimco of three", check_vimco, dict(samples=3, max_objects=1, exploration=0.2)),
    *((f"markov {s}, {least}", check_markov, dict(samples=s, least=least)) for s, least in BOUNDS),
):  # fmt: skip
    CHECKS[name] = functools.partial(check, **options)

GATHERED = "rows = take(rows, ancestor.flatten())"
LAST_STEP = "relation=self.relation_cell(work.said, work.relation),"
FUTURE = "future = bounds.detach().flip(1).cumsum(1).flip(1) - bounds.detach()"
OTHERS = "others = (log_w.sum(1, keepdim=True) - log_w) / (samples - 1)"
MUTANTS: dict[str, tuple[str, str, str]] = {  # name: (check, text of apdr.py, its mutation)
    "identities not gathered on resampling": (
        "filter", GATHERED, f"before = rows\n        {GATHERED}\n        rows = rows._replace("
        "objects=rows.objects._replace(identity=before.objects.identity))"),
    "h^q not gathered on resampling": (
        "filter", GATHERED, f"before = rows\n        {GATHERED}\n"
        "        rows = rows._replace(h_time=before.h_time)"),
    "p(n) of N instead of N - k": (
        "eager", "self.log_more[work.room, i]", "self.log_more[work.room.clamp(min=2), i]"),
    "q(n) of N instead of N - k": ("eager", "& (work.room > i)", "& (i < 2)"),
    "h^prior not reset for a new object": (
        "eager", "self.starts[2].expand(len(z), -1)", "self.starts[0].expand(len(z), -1)"),
    "h^prior not updated": ("long", "last._replace(h_prior=h)", "last"),
    "p(b) of the state before": ("eager", "self.prior_head(h)", "self.prior_head(last.h_prior)"),
    "the last object is not in h^P": ("eager", LAST_STEP, "relation=work.relation,"),
    "x among the arguments of p": (
        "eager", "bound = rows.log_likelihood -", "bound = 2 * rows.log_likelihood -"),
    "b and z given z^1:i": ("eager", "[work.h, work.drawn]", "[work.h, work.drawn + noise]"),
    "an object that is gone is remembered": ("eager", "value=1.0) * present", "value=1.0)"),
    "identities given anew": (
        "eager", "prior, work.last.identity[:, j]", "prior, work.rows.born + 1"),
    "identities not counted": (
        "eager", "born=torch.maximum(rows.born, found.identity)", "born=rows.born"),
    "the prior forgets where objects were": ("eager", "Normal(last.z + shift", "Normal(shift"),
    "the search looks no wider": ("eager", "prior.loc[:, :3]) / 2", "prior.loc[:, :3])"),
    "the search looks where it was": (
        "eager", "self.where_std * prior.loc[:, :3]) / 2", "self.where_std * before[:, :3]) / 2"),
    "gates exchanged": (
        "eager", "keep * before[:, 3:] + (1 - keep)", "(1 - keep) * before[:, 3:] + keep"),
    "survival not held": ("options", "if c.survival:", "if not c.survival:"),
    "not clipped": ("options", "canvas.clamp(max=1) if", "canvas if"),
    "the difference is what is drawn": (
        "options", "return image - work.rows.canvas", "return work.rows.canvas"),
    "exploration doubled": ("options", "self.exploration / 2", "self.exploration"),
    "KL of q and p exchanged": (
        "eager", "found.posterior.kl(found.prior)", "found.prior.kl(found.posterior)"),
    "forget gate": ("air", "torch.sigmoid(f + 1)", "torch.sigmoid(f)"),
    "stop not in q(n)": ("sums", "F.logsigmoid(sign * q), F", "sign * F.logsigmoid(q), F"),
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
    "weights not reset": (
        "markov 2, 2.0", "log_w.masked_fill(few[:, None], 0.0)", "log_w"),
    "weights at resampling not counted": (
        "markov 2, 2.0", "total + torch.where(few, mean, 0.0)", "total"),
    "a sum of weights": (
        "markov 2, 0.0", "mean = log_w.logsumexp(1) - math.log(samples)",
        "mean = log_w.logsumexp(1)"),
    "relaxed: wrong temperature": ("relaxed", "softplus(v - t * y)", "softplus(v - y)"),
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
