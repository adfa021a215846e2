"""What the tests of the models share: arithmetic in float64, and when two tensors agree."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


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
