"""What the tests of the models share: arithmetic in float64, when two tensors agree, commands."""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

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
