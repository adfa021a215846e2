"""What the tests of the kernels share: back-ends, inputs, brute force, guarded memory."""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels.launch import tl, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILES = "masks", "mixture", "leave_one_out", "refinement_inputs"
GUARD = 4096  # numbers on either side of an output, more than a mutant writes beyond it
UNTOUCHED = 0.7071067811865476  # what they are
TRITON = pytest.param(
    "triton",
    marks=[pytest.mark.skipif(triton is None, reason="needs the package triton")]
    + [pytest.mark.gpu] * (DEVICE == "cuda"),
)


def set_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    for name in FILES:
        monkeypatch.setattr(importlib.import_module(f"kernels.{name}"), "BLOCK", block)


@pytest.fixture(params=["torch", TRITON])
def backend(request, monkeypatch) -> Iterator[str]:
    if DEVICE == "cpu":  # the interpreter's time is that of the number of programs
        set_block(monkeypatch, 1024)
    with kernels.use(request.param):
        yield request.param


@pytest.fixture(params=[TRITON])
def triton_only(request, monkeypatch) -> Iterator[None]:
    if DEVICE == "cpu":
        set_block(monkeypatch, 1024)
    with kernels.use(request.param):
        yield


# -- inputs ----------------------------------------------------------------------------------------


def slot_inputs(batch=2, slots=3, colours=3, height=5, width=4, seed=0) -> tuple[Tensor, Tensor]:
    """image (B, C, H, W) and decoded (B, K, C+1, H, W), float64; logits within ±3."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, colours, height, width, generator=generator, dtype=torch.float64)
    shape = (batch, slots, colours + 1, height, width)
    decoded = torch.rand(shape, generator=generator, dtype=torch.float64)
    decoded[:, :, -1] = decoded[:, :, -1] * 6 - 3
    return image.to(DEVICE), decoded.to(DEVICE)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of (B, K, C, H, W), the same numbers
    "channels_last": lambda t: t.movedim(2, -1).contiguous().movedim(-1, 2),
    "slots_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every_second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda t: torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape),
}


def extreme_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """float32 inputs at which linear space has nothing left."""
    image, decoded = (value.float() for value in slot_inputs(slots=4, height=7, width=7))
    cases = {name: (image, decoded.clone()) for name in ("logits_of_1000", "logits_of_1e30")}
    for name, size in ("logits_of_1000", 1e3), ("logits_of_1e30", 1e30):
        logits = torch.tensor([size, -size, size, 0], device=DEVICE)
        cases[name][1][:, :, 3] = logits[:, None, None]
    wrong = decoded.clone()
    wrong[:, :, :3] = 1 - image.round()[:, None]
    cases["all_slots_wrong"] = image.round(), wrong
    cases["identical_slots"] = image, decoded[:, :1].expand(-1, 4, -1, -1, -1)
    saturated, far, off = decoded.clone(), decoded.clone(), decoded.clone()
    saturated[:, 0] = torch.cat([image, torch.full_like(image[:, :1], 40)], 1)
    far[:, 1:, :3] += 100
    off[:, 1:, 3] = -math.inf
    off[:, 2, 3, 3:] = 0  # below, two slots are left; above, one
    return cases | {"saturated": (image, saturated), "far": (image, far), "off": (image, off)}


@st.composite
def drawn_inputs(draw) -> tuple[Tensor, Tensor, float]:
    """image, decoded in memory of any order and density, and sigma."""
    shape = [draw(st.integers(1, most)) for most in (2, 4, 7, 9)]
    colours, order = draw(st.sampled_from([1, 3])), draw(st.permutations(range(5)))
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = [*shape[:2], colours + 1, *shape[2:]]
    steps = draw(st.lists(st.integers(1, 2), min_size=5, max_size=5))
    memory = [shape[axis] * steps[axis] for axis in order]
    decoded = torch.randn(memory, generator=generator, dtype=torch.float64)
    decoded = decoded.permute([order.index(axis) for axis in range(5)])
    decoded = decoded[tuple(slice(None, None, step) for step in steps)]
    decoded[:, :, :-1] *= draw(st.sampled_from([0.1, 1.0, 10.0]))
    decoded[:, :, -1] *= draw(st.sampled_from([1.0, 30.0, 1e4, 1e30]))
    if draw(st.booleans()):
        decoded[:, 0, -1] = -math.inf
    image = torch.rand([shape[0], *shape[2:]], generator=generator, dtype=torch.float64)[:, 1:]
    return image.to(DEVICE, dtype), decoded.to(DEVICE, dtype), draw(st.sampled_from([0.1, 1.0]))


few_examples = settings(
    max_examples=12, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


# -- brute force: linear space, slot by slot, textbook densities --------------------------------


def brute_densities(image: Tensor, decoded: Tensor, sigma: float) -> list[Tensor]:
    """N_k (B, H, W) of every slot."""
    densities = []
    for k in range(decoded.shape[1]):
        product = torch.ones_like(image[:, 0])
        for c in range(image.shape[1]):
            z = (image[:, c] - decoded[:, k, c]) / sigma
            product = product * torch.exp(-(z**2) / 2) / (sigma * math.sqrt(2 * math.pi))
        densities.append(product)
    return densities


def brute_masks(decoded: Tensor) -> list[Tensor]:
    weights = [torch.exp(decoded[:, k, -1]) for k in range(decoded.shape[1])]
    return [weight / sum(weights) for weight in weights]


def brute_log_likelihood(image: Tensor, decoded: Tensor, sigma: float) -> Tensor:
    terms = zip(brute_masks(decoded), brute_densities(image, decoded, sigma), strict=True)
    return sum(mask * density for mask, density in terms).log()


def brute_leave_one_out(image: Tensor, decoded: Tensor, sigma: float) -> Tensor:
    """Models that never had slot k."""
    slots = range(decoded.shape[1])
    others = [[j for j in slots if j != k] or [k] for k in slots]
    return torch.stack([brute_log_likelihood(image, decoded[:, o], sigma) for o in others], 1)


# Largest error, in units of the largest number of an output. A gradient in half precision is
# rounded on a GPU and truncated by the interpreter: one unit in the last place.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
TOLERANCE |= {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def assert_near(actual: Tensor, expected: Tensor, name: str = "", tolerance: float = 0) -> None:
    """Finite where `expected` is, within TOLERANCE of the type of `actual` times its largest."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: not finite elsewhere"
    actual, expected, dtype = actual[finite].double(), expected[finite].double(), actual.dtype
    if actual.numel():
        largest, error = expected.abs().max().item(), (actual - expected).abs().max().item()
        tolerance = tolerance or TOLERANCE[dtype]
        assert error <= tolerance * max(1, largest), f"{name}: error {error:.1e} of {largest:.1e}"


# -- guarded memory, and a quicker interpreter ---------------------------------------------------


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
