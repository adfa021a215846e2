"""kernels/mixture.py, torch and Triton, against a mixture in linear space, slot by slot."""

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
    brute_log_likelihood,
    drawn_inputs,
    extreme_inputs,
    few_examples,
    set_block,
    slot_inputs,
    triton_only,
)
from torch import Tensor

ops = importlib.import_module("kernels.mixture")
__all__ = ["backend", "triton_only"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter


def in_float64(image: Tensor, decoded: Tensor, sigma: float) -> Tensor:
    """The fallback in float64, itself held against brute force below."""
    sigma = torch.tensor(sigma, dtype=torch.float64, device=DEVICE)
    return ops.mixture_log_likelihood_torch(image.double(), decoded, sigma)


def check(image: Tensor, decoded: Tensor, sigma=0.3, reference=in_float64, tolerance=0.0) -> None:
    """The likelihood and its gradient, with their types, from a cotangent for every pixel."""
    decoded = decoded.detach().requires_grad_()
    wide = decoded.detach().double().requires_grad_()
    actual = ops.mixture_log_likelihood(image, decoded, sigma)
    expected = reference(image, wide, sigma)
    assert actual.dtype == torch.promote_types(decoded.dtype, torch.float32)
    assert_near(actual, expected, "likelihood", tolerance)
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(actual.shape, generator=generator).to(DEVICE)
    (gradient,) = torch.autograd.grad(actual, decoded, cotangent.to(actual.dtype))
    (expected,) = torch.autograd.grad(expected, wide, cotangent.double())
    assert gradient.dtype == decoded.dtype
    assert_near(gradient, expected, "gradient", tolerance)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 7, 11])
def test_equals_brute_force(backend, slots, colours):
    check(*slot_inputs(2, slots, colours), reference=brute_log_likelihood)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (31, 1), (4, 8), (3, 11), (35, 35), (63, 1)])
def test_every_image_size(backend, size, monkeypatch):
    set_block(monkeypatch, 32 if size[0] < 32 else 512)  # less than one block, one, and several
    check(*slot_inputs(2, 2, 3, *size), reference=brute_log_likelihood)


def test_the_mixture_is_over_pixels_and_not_over_colours(backend):
    # Slot 0 explains red, slot 1 green and blue: no slot explains the pixel, yet each colour has
    # a slot. A mixture per colour, which several ports use, calls that a perfect fit.
    image = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=DEVICE).reshape(1, 3, 1, 1)
    decoded = torch.zeros(1, 2, 4, 1, 1, dtype=torch.float64, device=DEVICE)
    decoded[0, 0, :3] = 1.0
    one_perfect_colour = -math.log(0.1) - 0.5 * math.log(2 * math.pi)
    # Squared distances in units of sigma²: 200 from slot 0, 100 from slot 1.
    joint = 3 * one_perfect_colour + math.log(0.5) - 50
    assert ops.mixture_log_likelihood(image, decoded, 0.1).item() == pytest.approx(joint, abs=1e-9)


def test_density_integrates_to_one(backend):
    grid = torch.linspace(-4, 5, 20001, dtype=torch.float64, device=DEVICE)
    _, decoded = slot_inputs(1, 3, 1, 1, 1)
    decoded = decoded.expand(-1, -1, -1, 1, len(grid))
    density = ops.mixture_log_likelihood(grid.reshape(1, 1, 1, -1), decoded, 0.1).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0, 1e6, 1e30, -1e30, -math.inf])
def test_a_constant_added_to_all_logits_changes_nothing(backend, constant, dtype):
    """Unless it is −∞: then there is no mixture, as softmax says, which is NaN."""
    image, decoded = (value.to(dtype) for value in slot_inputs(1, 2, 3, 1, 3))
    decoded[:, :, 3] = 0
    expected = ops.mixture_log_likelihood(image, decoded, 0.1)
    decoded[:, :, 3] = constant
    actual = ops.mixture_log_likelihood(image, decoded, 0.1)
    assert actual.isnan().all() if constant == -math.inf else torch.equal(actual, expected)


@pytest.mark.parametrize("case", extreme_inputs())
def test_float32_survives_extremes(backend, case):
    # log N reaches 2e7 with means far away; errors of r_k are multiplied by 1/σ² a unit of colour.
    check(*extreme_inputs()[case], sigma=0.03, tolerance=1e-3 if case == "far" else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(backend, dtype):
    check(*(value.to(dtype) for value in slot_inputs()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout):
    image, decoded = slot_inputs()
    image = LAYOUTS[layout](image[:, None])[:, 0]
    check(image, LAYOUTS[layout](decoded), reference=brute_log_likelihood)
    expanded = decoded[:, :1].expand(-1, 3, -1, -1, -1)
    check(image[:1].expand(2, -1, -1, -1), expanded, reference=brute_log_likelihood)


@few_examples
@given(drawn=drawn_inputs())
def test_drawn_inputs(backend, drawn):
    check(*drawn)


def test_sigma_is_a_number_or_a_tensor_that_gets_no_gradient(backend):
    image, decoded = slot_inputs()
    image.requires_grad_(), decoded.requires_grad_()
    for dtype in (torch.float32, torch.float64):
        sigma = torch.tensor(0.25, dtype=dtype, device=DEVICE, requires_grad=True)
        likelihood = ops.mixture_log_likelihood(image, decoded, sigma)
        assert torch.equal(likelihood, ops.mixture_log_likelihood(image, decoded, 0.25))
        by = torch.autograd.grad(likelihood.sum(), (sigma, image), allow_unused=True)
        assert by == (None, None)


def test_cotangents_of_any_strides(backend):
    image, decoded = slot_inputs()
    decoded.requires_grad_()
    likelihood = ops.mixture_log_likelihood(image, decoded, 0.3)
    (ones,) = torch.autograd.grad(likelihood.sum(), decoded, retain_graph=True)  # expanded
    weights = torch.rand(4, 5, 2, dtype=torch.float64, device=DEVICE).transpose(0, 2)
    (gradient,) = torch.autograd.grad(likelihood, decoded, weights)
    torch.testing.assert_close(gradient, ones * weights[:, None, None])


def test_a_nan_stays_in_its_pixel(backend):
    image, decoded = slot_inputs()
    decoded[0, 1, 2, 3, 1] = math.nan
    bad = ops.mixture_log_likelihood(image, decoded, 0.3).isnan()
    assert bad[0, 3, 1] and bad.sum() == 1


def test_operators_are_well_defined(triton_only):
    image, decoded = slot_inputs(1, 2, 1, 2, 3)
    last, sigma = decoded.movedim(2, -1).contiguous(), image.new_tensor(0.3)
    torch.library.opcheck(ops._forward, (image, last.clone().requires_grad_(), sigma))
    torch.library.opcheck(ops._backward, (image, last, sigma, image[:, 0]))


BAD_INPUTS = {  # message: shapes of image and decoded, sigma
    "image must be": ((2, 3, 5), (2, 3, 4, 5, 4), 0.1),
    "1 or 3 colours": ((2, 2, 5, 4), (2, 3, 3, 5, 4), 0.1),
    "decoded must be": ((2, 3, 5, 4), (2, 3, 3, 5, 4), 0.1),
    "K > 0": ((2, 3, 5, 4), (2, 0, 4, 5, 4), 0.1),
    "positive and finite, not 0": ((2, 3, 5, 4), (2, 3, 4, 5, 4), 0.0),
    "positive and finite, not nan": ((2, 3, 5, 4), (2, 3, 4, 5, 4), math.nan),
    "one number": ((2, 3, 5, 4), (2, 3, 4, 5, 4), torch.ones(1)),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_inputs_are_refused_in_one_line(message):
    image, decoded, sigma = BAD_INPUTS[message]
    with pytest.raises(ValueError, match=message) as error:
        ops.mixture_log_likelihood(torch.zeros(image), torch.zeros(decoded), sigma)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="floating point"):
        image, decoded = slot_inputs()
        ops.mixture_log_likelihood((image * 255).byte(), decoded, 0.1)
