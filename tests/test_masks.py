"""kernels/masks.py, torch and Triton, against the softmax of the definition in float64."""

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DEVICE, backend, few_examples, set_block, triton_only
from torch import Tensor

ops = importlib.import_module("kernels.masks")
__all__ = ["backend", "triton_only"]  # fixtures
TOLERANCE = {  # of numbers of size 1; a half of twice the last digit is a last digit truncated
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def make_logits(*shape: int, dtype=torch.float64, scale=4.0, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return logits.to(DEVICE, dtype)


def brute_force(logits: Tensor) -> Tensor:
    """The definition, slot by slot, in float64."""
    weights = [torch.exp(logits[:, k].double()) for k in range(logits.shape[1])]
    return torch.stack([weight / sum(weights) for weight in weights], 1)


def check(logits: Tensor) -> None:
    """Masks and gradient against brute force; type, shape and place of both."""
    logits = logits.detach().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    masks, expected = ops.masks(logits), brute_force(wide)
    cotangent = make_logits(*masks.shape, dtype=masks.dtype, scale=1.0, seed=1)
    assert masks.dtype == logits.dtype and masks.shape == logits.shape
    (gradient,) = torch.autograd.grad(masks, logits, cotangent)
    (expected_gradient,) = torch.autograd.grad(expected, wide, cotangent.double())
    tolerance = dict(rtol=0, atol=TOLERANCE[logits.dtype])
    torch.testing.assert_close(masks.double(), expected, **tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, **tolerance)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7, 11])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 11), (8, 8)])
def test_every_shape(backend, slots, size):
    check(make_logits(2, slots, *size))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_type(backend, dtype):
    check(make_logits(2, 5, 7, 9, dtype=dtype))


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (16, 5)])
def test_many_blocks_of_few_pixels(backend, size, monkeypatch):
    set_block(monkeypatch, 4)
    check(make_logits(3, 3, *size))


LAYOUTS = {
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "a channel of many": lambda t: torch.stack([t * 0 + math.nan, t], -1)[..., 1],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every second row": lambda t: t.repeat_interleave(2, -2)[..., ::2, :],
    "expanded over slots": lambda t: t[:, :1].expand(t.shape),
    "expanded over images": lambda t: t[:1].expand(t.shape),
    "expanded over pixels": lambda t: t[..., :1, :1].expand(t.shape),
    "between numbers that are none": lambda t: torch.cat(
        [t.new_full((3,), math.nan), t.flatten(), t.new_full((3,), math.nan)]
    )[3:-3].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout):
    logits = make_logits(2, 3, 5, 4)
    check(LAYOUTS[layout](logits))
    # Of the cotangent too: a sum's is expanded.
    cotangent = LAYOUTS[layout](make_logits(2, 3, 5, 4, seed=1))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(ops.masks(logits), logits, cotangent)
    (expected,) = torch.autograd.grad(brute_force(logits), logits, cotangent)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_logits(backend, dtype):
    rows = [[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [88, 89, 90], [0, -math.inf, 0]]
    rows += [[-math.inf, -math.inf, 3], [3e38, -3e38, 1e30], [torch.finfo(dtype).min] * 3]
    rows += [[1e30, 1e30, 1e30]]
    logits = torch.tensor(rows, dtype=torch.float64, device=DEVICE).to(dtype)
    logits = logits[:, :, None, None].expand(-1, -1, 2, 3).requires_grad_()
    masks = ops.masks(logits)
    expected = logits.double().softmax(1)  # brute force has no number for these
    torch.testing.assert_close(masks.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    (gradient,) = torch.autograd.grad(masks[:, 0].sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("slots", [[math.nan, 0, 1], [0, 1, math.nan], [-math.inf] * 3])
def test_what_has_no_masks_is_nan(backend, slots):
    logits = torch.tensor(slots, device=DEVICE)[None, :, None, None]
    assert ops.masks(logits).isnan().all()


def test_operators_are_well_defined(triton_only):
    logits = make_logits(2, 3, 2, 4).transpose(2, 3).requires_grad_()
    torch.library.opcheck(ops._forward, (logits,))
    masks = ops.masks(logits.detach())
    torch.library.opcheck(ops._backward, (masks.transpose(2, 3).contiguous().mT, masks))


@few_examples
@given(
    shape=st.tuples(*[st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)]),
    order=st.permutations(range(4)),
    steps=st.tuples(*[st.integers(1, 3)] * 4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_drawn_shapes_strides_and_values(backend, shape, order, steps, dtype, scale):
    memory = make_logits(*[shape[i] * steps[i] for i in order], dtype=dtype, scale=scale)
    logits = memory.permute([order.index(i) for i in range(4)])
    logits = logits[tuple(slice(None, None, step) for step in steps)]
    check(logits)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 0, 5, 4), (1, 2, 3, 5, 4)])
def test_bad_inputs_are_refused_in_one_line(shape):
    for logits in torch.zeros(shape), torch.zeros(2, 3, 5, 4, dtype=torch.int64):
        with pytest.raises(ValueError, match="floating point and") as error:
            ops.masks(logits)
        assert "\n" not in str(error.value)
