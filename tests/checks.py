"""What the tests of the models share: arithmetic in float64, when two tensors agree, layers written
out, commands."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import runs


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Buffers are made in the default precision; a float32 0.2 would be 3e-9 off."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """The largest error, as a share of the largest value; 1e-12 for what is zero by symmetry."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, not {expected.shape}"
    assert actual.isfinite().all(), f"{name} is off: not finite"
    error = (actual - expected).abs().max().item()
    limit = tolerance * expected.abs().max().item() + 1e-12
    assert error <= limit, f"{name} is off by {error:.3g}, more than {limit:.3g}"


def off_zero(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """The model with biases and gains moved off the 0 and 1 that would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += scale * torch.randn_like(parameter)
    return model


def assert_gradients(
    loss: Tensor, model: nn.Module, expected: Tensor, copies: dict[str, Tensor],
    unused: Callable[[str], bool],
) -> None:  # fmt: skip
    """Of every parameter those of its copy; 0, but for rounding, where the name is `unused`."""
    actual = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    wanted = torch.autograd.grad(expected, list(copies.values()), materialize_grads=True)
    largest = max(g.abs().max() for g in wanted)
    for name, a, w in zip(copies, actual, wanted, strict=True):
        assert (w.abs().max() < 1e-9 * largest) == unused(name), f"{name}: nothing to compare"
        assert_close(f"gradient of {name}", a, 0 * w if unused(name) else w)


def copies_of(model: nn.Module) -> dict[str, Tensor]:
    """Leaves with the parameters' names and values."""
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def standardised(x: Tensor, epsilon: float = 1e-5) -> Tensor:
    """LayerNorm of the last axis, without gain and bias."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()


class Layers:
    """Layers written out, which find their weights by the model file's names."""

    epsilon = 1e-5  # of LayerNorm

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights

    def layer(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.layer(name)
        return x @ weight.T + (0 if bias is None else bias)

    def norm(self, name: str, x: Tensor) -> Tensor:
        gain, bias = self.layer(name)
        return gain * standardised(x, self.epsilon) + bias

    def mlp(self, name: str, x: Tensor, activation: Callable = F.relu) -> Tensor:
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


def command_line(
    monkeypatch, capsys, model: ModuleType, *arguments: object
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `python MODEL.py ARGUMENTS`."""
    name, status = model.__name__, 0
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    try:
        runs.main(name, model.Config, model.PRESETS, model.train)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()
