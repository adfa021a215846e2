"""What the tests of the kernels share: back-ends, guarded memory and a quicker interpreter."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import kernels
from kernels.launch import tl, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 4096  # numbers on either side of an output, more than a mutant writes beyond it
UNTOUCHED = 0.7071067811865476  # what they are
TRITON = pytest.param(
    "triton",
    marks=[pytest.mark.skipif(triton is None, reason="needs the package triton")]
    + [pytest.mark.gpu] * (DEVICE == "cuda"),
)


@pytest.fixture(params=["torch", TRITON])
def backend(request) -> Iterator[str]:
    with kernels.use(request.param):
        yield request.param


@pytest.fixture(params=[TRITON])
def triton_only(request) -> Iterator[None]:
    with kernels.use(request.param):
        yield


@contextlib.contextmanager
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """New tensors are NaN, between guards that must be as they were at the end."""
    buffers: list[Tensor] = []
    empty = torch.empty

    def guard(plain: Tensor) -> Tensor:
        if not plain.is_floating_point() or plain.is_meta or not plain.numel():
            return plain
        size = plain.numel() + 2 * GUARD
        buffers.append(empty(size, dtype=plain.dtype, device=plain.device).fill_(UNTOUCHED))
        return buffers[-1].as_strided(plain.shape, plain.stride(), GUARD).fill_(torch.nan)

    def guarded(original: Callable) -> Callable:
        return lambda *arguments, **options: guard(original(*arguments, **options))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded(torch.empty))
        patch.setattr(torch, "empty_like", guarded(torch.empty_like))
        patch.setattr(Tensor, "new_empty", guarded(Tensor.new_empty))
        yield buffers
    for buffer in buffers:
        around = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        untouched = around == around.new_tensor(UNTOUCHED)
        assert untouched.all(), f"written beside an output of {buffer.numel() - 2 * GUARD} numbers"


def patch_language_once() -> None:
    """Halve the time of Triton's interpreter.

    It replaces the functions of triton.language by its own before every call of a device function,
    hundreds of times in a launch, and restores them after it. Here, once and for all.
    """
    from triton.runtime import interpreter

    for language in (tl, tl.core):
        interpreter._patch_lang(SimpleNamespace(__globals__={"language": language}))
    nothing = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda function: nothing


if triton is not None and triton.knobs.runtime.interpret:
    patch_language_once()
