"""kernels/leave_one_out.py, torch and Triton, against mixtures that never had the slot."""

import importlib
import math

import pytest
import torch
from hypothesis import given
from kernel_checks import (
    DEVICE,
    LAYOUTS,
    assert_near,
    backend,
    brute_leave_one_out,
    drawn_inputs,
    extreme_inputs,
    few_examples,
    slot_inputs,
    triton_only,
)
from torch import Tensor

import kernels

ops = importlib.import_module("kernels.leave_one_out")
__all__ = ["backend", "triton_only"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter


def check(image: Tensor, decoded: Tensor, sigma=0.3, tolerance=0.0) -> None:
    """Against the fallback in float64, itself held against brute force below."""
    wide = torch.tensor(sigma, dtype=torch.float64, device=DEVICE)
    expected = ops.leave_one_out_torch(image.double(), decoded, wide)
    actual = ops.leave_one_out(image, decoded, sigma)
    assert actual.dtype == torch.promote_types(decoded.dtype, torch.float32)
    assert_near(actual, expected, tolerance=tolerance)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 7, 11])
def test_equals_brute_force(backend, slots, colours):
    image, decoded = slot_inputs(2, slots, colours)
    actual = ops.leave_one_out(image, decoded, 0.3)
    assert_near(actual, brute_leave_one_out(image, decoded, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "logits", [[0, -math.inf, -math.inf], [0, -math.inf, 0], [1e30, 0, 0], [-1e30, 0, 1e30], [0, 0]]
)
def test_logits_far_apart_are_the_model_without_the_slot(backend, logits, dtype):
    image, decoded = (value.to(dtype) for value in slot_inputs(1, len(logits)))
    decoded[0, :, 3] = torch.tensor(logits, dtype=dtype, device=DEVICE)[:, None, None]
    actual = ops.leave_one_out(image, decoded, 0.3)
    for k in range(len(logits)):
        others = decoded[:, [j for j in range(len(logits)) if j != k]]
        assert_near(actual[:, k], kernels.mixture_log_likelihood(image, others, 0.3), str(k))


@pytest.mark.parametrize("case", extreme_inputs())
def test_float32_survives_extremes(backend, case):
    check(*extreme_inputs()[case], sigma=0.03)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout):
    image, decoded = slot_inputs()
    check(LAYOUTS[layout](image[:, None])[:, 0], LAYOUTS[layout](decoded))


@few_examples
@given(drawn=drawn_inputs())
def test_drawn_inputs(backend, drawn):
    check(*drawn)


def test_operator_is_well_defined(triton_only):
    image, decoded = slot_inputs(1, 2, 1, 2, 3)
    arguments = image, decoded.movedim(2, -1).contiguous(), image.new_tensor(0.3)
    torch.library.opcheck(ops._leave_one_out, arguments)
