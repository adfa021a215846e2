"""kernels/mixture.py against a mixture written out in linear space, slot by slot."""

import importlib.util
import itertools
import math
import tempfile
import types
import uuid
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributions as D
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, TRITON
from torch import Tensor

import kernels

ops = importlib.import_module("kernels.mixture")
SIZES = [(1, 1), (1, 7), (5, 4), (7, 7)]
SLOTS = [1, 2, 3, 4, 5, 7, 11]


@pytest.fixture(autouse=True)
def torch_backend():
    with kernels.use("torch"):
        yield


def make_inputs(batch=2, slots=3, colours=3, height=5, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, colours, height, width, generator=generator, dtype=torch.float64)
    shape = (batch, slots, colours + 1, height, width)
    decoded = torch.rand(shape, generator=generator, dtype=torch.float64)
    decoded[:, :, -1] = decoded[:, :, -1] * 6 - 3
    return image, decoded


def brute_densities(image: Tensor, decoded: Tensor, sigma, component) -> list[Tensor]:
    """N_k (B, H, W) of every slot, in linear space, from the textbook densities."""
    densities = []
    for k in range(decoded.shape[1]):
        product = torch.ones_like(image[:, 0])
        for c in range(image.shape[1]):
            z = (image[:, c] - decoded[:, k, c]) / sigma
            if component == "gaussian":
                density = torch.exp(-(z**2) / 2) / (sigma * math.sqrt(2 * math.pi))
            else:
                density = torch.exp(-z) / (sigma * (1 + torch.exp(-z)) ** 2)
            product = product * density
        densities.append(product)
    return densities


def brute_masks(decoded: Tensor) -> list[Tensor]:
    weights = [torch.exp(decoded[:, k, -1]) for k in range(decoded.shape[1])]
    return [weight / sum(weights) for weight in weights]


def brute_likelihood(image: Tensor, decoded: Tensor, sigma, component="gaussian") -> Tensor:
    densities = brute_densities(image, decoded, sigma, component)
    terms = zip(brute_masks(decoded), densities, strict=True)
    return sum(mask * density for mask, density in terms)


def brute_force(image, decoded, sigma, component="gaussian", epsilon=0.0) -> ops.Mixture:
    """Every field of Mixture in linear space; the gradient by automatic differentiation."""
    decoded = decoded.detach().requires_grad_()
    densities, masks = brute_densities(image, decoded, sigma, component), brute_masks(decoded)
    likelihood = brute_likelihood(image, decoded, sigma, component)
    slots = range(decoded.shape[1])
    left_out = []
    for k in slots:  # a model that never had slot k
        others = [j for j in slots if j != k] or [k]
        left_out.append(brute_likelihood(image, decoded[:, others], sigma, component).log())
    (gradient,) = torch.autograd.grad(-likelihood.log().sum(), decoded, retain_graph=True)
    fields = (
        likelihood.log(),
        torch.stack(masks, 1),
        torch.stack([masks[k] * densities[k] / likelihood for k in slots], 1),
        torch.stack([density / (sum(densities) + epsilon) for density in densities], 1),
        torch.stack(left_out, 1),
        gradient,
    )
    return ops.Mixture(*(field.detach() for field in fields))


def assert_same(actual: tuple, expected: tuple, **tolerances):
    """Equal fields; 1e-10 for float64 unless told otherwise."""
    tolerances = {"rtol": 1e-10, "atol": 1e-10} | tolerances
    for field, one, other in zip(type(actual)._fields, actual, expected, strict=True):
        torch.testing.assert_close(
            one, other, **tolerances, msg=lambda text, field=field: f"{field}: {text}"
        )


# Checks of a module, so that the mutants below can be put through them too.


def check_against_brute_force(module, component="gaussian", slots=4, colours=3, epsilon=0.0):
    image, decoded = make_inputs(slots=slots, colours=colours)
    actual = module.mixture(image, decoded, 0.3, component, epsilon)
    assert_same(actual, brute_force(image, decoded, 0.3, component, epsilon))


def check_likelihood_gradient(module, component="gaussian"):
    image, decoded = make_inputs()
    decoded.requires_grad_()
    cotangent = torch.randn_like(image[:, 0])
    actual = module.mixture_log_likelihood(image, decoded, 0.3, component)
    expected = brute_likelihood(image, decoded, 0.3, component).log()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(actual, decoded, cotangent)
    (expected_gradient,) = torch.autograd.grad(expected, decoded, cotangent)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("component", ["gaussian", "logistic"])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("slots", SLOTS)
def test_every_output_equals_brute_force(slots, colours, component):
    check_against_brute_force(ops, component, slots, colours)


@pytest.mark.parametrize("epsilon", [1e-6, 0.5, 100.0])
def test_posterior_epsilon_is_added_to_the_sum_of_densities(epsilon):
    check_against_brute_force(ops, epsilon=epsilon)


@pytest.mark.parametrize("component", ["gaussian", "logistic"])
def test_log_likelihood_and_its_gradient_equal_brute_force(component):
    check_likelihood_gradient(ops, component)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_every_image_size(size, slots):
    image, decoded = make_inputs(slots=slots, height=size[0], width=size[1])
    assert_same(ops.mixture(image, decoded, 0.3), brute_force(image, decoded, 0.3))
    likelihood = ops.mixture_log_likelihood(image, decoded, 0.3)
    torch.testing.assert_close(likelihood, brute_likelihood(image, decoded, 0.3).log())


@pytest.mark.parametrize("component", ["gaussian", "logistic"])
def test_autograd_of_every_differentiable_output_equals_brute_force(component):
    def outputs(terms):
        return terms.log_likelihood, terms.masks, terms.responsibilities, terms.posterior_masks

    image, decoded = make_inputs()
    decoded.requires_grad_()
    actual = outputs(ops.mixture(image, decoded, 0.3, component, 0.5))
    densities, masks = brute_densities(image, decoded, 0.3, component), brute_masks(decoded)
    joint = torch.stack([m * n for m, n in zip(masks, densities, strict=True)], 1)
    total = joint.sum(1, keepdim=True)
    posterior = torch.stack(densities, 1) / (sum(densities)[:, None] + 0.5)
    expected = total[:, 0].log(), torch.stack(masks, 1), joint / total, posterior
    for one, other in zip(actual, expected, strict=True):
        cotangent = torch.randn_like(one)
        (gradient,) = torch.autograd.grad(one, decoded, cotangent, retain_graph=True)
        (brute,) = torch.autograd.grad(other, decoded, cotangent, retain_graph=True)
        torch.testing.assert_close(gradient, brute, rtol=1e-10, atol=1e-10)


def test_leave_one_out_and_gradient_are_constants():
    image, decoded = make_inputs()
    terms = ops.mixture(image, decoded.requires_grad_(), 0.3)
    assert not terms.leave_one_out.requires_grad and not terms.grad_decoded.requires_grad


def test_joint_mixture_is_not_a_mixture_for_every_colour():
    # Slot 0 explains red, slot 1 green and blue: no slot explains the pixel, yet each colour has
    # a slot. A mixture per colour, which several ports use, calls that a perfect fit.
    image = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    decoded = torch.zeros(1, 2, 4, 1, 1, dtype=torch.float64)
    decoded[0, 0, :3, 0, 0] = torch.tensor([1.0, 1.0, 1.0])
    one_perfect_colour = -math.log(0.1) - 0.5 * math.log(2 * math.pi)
    # Squared distances in units of sigma²: 200 from slot 0, 100 from slot 1.
    joint = 3 * one_perfect_colour + math.log(0.5) - 50
    per_colour = 3 * (one_perfect_colour + math.log(0.5))
    actual = ops.mixture(image, decoded, 0.1).log_likelihood.item()
    assert actual == pytest.approx(joint, abs=1e-9)
    assert abs(actual - per_colour) > 40


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("component", ["gaussian", "logistic"])
def test_density_integrates_to_one(component, slots):
    grid = torch.linspace(-4, 5, 20001, dtype=torch.float64)
    _, decoded = make_inputs(batch=1, slots=slots, colours=1, height=1, width=1)
    decoded = decoded.expand(-1, -1, -1, 1, len(grid))
    density = ops.mixture_log_likelihood(grid.reshape(1, 1, 1, -1), decoded, 0.1, component).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-9)


def test_one_slot_is_an_independent_normal():
    image, decoded = make_inputs(slots=1)
    expected = D.Normal(decoded[:, 0, :3], 0.1).log_prob(image).sum(1)
    torch.testing.assert_close(ops.mixture_log_likelihood(image, decoded, 0.1), expected)


def test_one_slot_is_an_independent_logistic():
    image, decoded = make_inputs(slots=1)
    transforms = [D.SigmoidTransform().inv, D.AffineTransform(decoded[:, 0, :3], 0.1)]
    uniform = D.Uniform(torch.zeros_like(image), torch.ones_like(image))
    expected = D.TransformedDistribution(uniform, transforms).log_prob(image).sum(1)
    actual = ops.mixture_log_likelihood(image, decoded, 0.1, "logistic")
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_leave_one_out_is_the_model_rebuilt_without_the_slot():
    image, decoded = make_inputs(slots=5)
    terms = ops.mixture(image, decoded, 0.3)
    for k in range(5):
        rebuilt = ops.mixture(image, decoded[:, [j for j in range(5) if j != k]], 0.3)
        torch.testing.assert_close(terms.leave_one_out[:, k], rebuilt.log_likelihood)


def test_leave_one_out_of_the_only_slot_is_the_likelihood():
    image, decoded = make_inputs(slots=1)
    terms = ops.mixture(image, decoded, 0.3)
    assert torch.equal(terms.leave_one_out[:, 0], terms.log_likelihood)


def test_permuting_slots_permutes_outputs():
    image, decoded = make_inputs(slots=5)
    order = torch.tensor([3, 0, 4, 2, 1])
    first, second = ops.mixture(image, decoded, 0.3), ops.mixture(image, decoded[:, order], 0.3)
    permuted = [field[:, order] for field in first[1:]]
    assert_same(second, (first.log_likelihood, *permuted))


def test_image_alone_equals_image_in_a_batch():
    image, decoded = make_inputs(batch=3)
    alone, batch = ops.mixture(image[:1], decoded[:1], 0.3), ops.mixture(image, decoded, 0.3)
    assert_same(alone, tuple(field[:1] for field in batch), rtol=1e-13, atol=1e-13)


LAYOUTS = {
    "channels_last": lambda t: t.movedim(2, -1).contiguous().movedim(-1, 2),
    "slots_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every_second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda t: torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    image, decoded = make_inputs()
    expected = ops.mixture(image, decoded, 0.3)
    other = LAYOUTS[layout](decoded).requires_grad_()
    strided_image = image.contiguous(memory_format=torch.channels_last)
    assert_same(ops.mixture(strided_image, other, 0.3), expected, rtol=1e-13, atol=1e-13)
    likelihood = ops.mixture_log_likelihood(strided_image, other, 0.3)
    (gradient,) = torch.autograd.grad(likelihood.sum(), other)
    torch.testing.assert_close(gradient, -expected.grad_decoded)


def test_expanded_inputs():
    image, decoded = make_inputs()
    image, decoded = image[:1].expand(2, -1, -1, -1), decoded[:, :1].expand(-1, 3, -1, -1, -1)
    decoded = decoded.requires_grad_()
    copies = image.contiguous(), decoded.detach().contiguous()
    expected = ops.mixture(*copies, 0.3)
    assert_same(ops.mixture(image, decoded, 0.3), expected, rtol=1e-13, atol=1e-13)
    likelihood = ops.mixture_log_likelihood(image, decoded, 0.3)
    (gradient,) = torch.autograd.grad(likelihood.sum(), decoded)
    torch.testing.assert_close(gradient, -expected.grad_decoded)


def extreme_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """float32 inputs at which linear space has nothing left."""
    image, decoded = (value.float() for value in make_inputs(slots=4, height=7, width=7))
    cases = {}
    cases["all_slots_wrong"] = image.round(), decoded.clone()
    cases["all_slots_wrong"][1][:, :, :3] = 1 - image.round()[:, None]
    cases["logits_of_1000"] = image, decoded.clone()
    cases["logits_of_1000"][1][:, :, 3] = torch.tensor([1e3, -1e3, 1e3, 0])[:, None, None]
    cases["identical_slots"] = image, decoded[:, :1].expand(-1, 4, -1, -1, -1)
    cases["saturated_masks"] = image, decoded.clone()
    cases["saturated_masks"][1][:, 0] = torch.cat([image, torch.full_like(image[:, :1], 40)], 1)
    cases["means_far_away"] = image, decoded.clone()
    cases["means_far_away"][1][:, 1:, :3] += 100
    return cases


def check_extremes(image, decoded, component, epsilon):
    """float32 against the reference in float64."""
    decoded = decoded.clone().requires_grad_()
    actual = ops.mixture(image, decoded, 0.03, component, epsilon)
    expected = ops.mixture_reference(image.double(), decoded.double(), 0.03, component, epsilon)
    # log N reaches 2e3 here (2e7 with means far away), and float32 has 6e-8 of that.
    for name in ("log_likelihood", "leave_one_out"):
        torch.testing.assert_close(
            getattr(actual, name).double(), getattr(expected, name), rtol=2e-6, atol=1e-4
        )
    for name in ("masks", "responsibilities", "posterior_masks"):
        torch.testing.assert_close(
            getattr(actual, name).double(), getattr(expected, name), rtol=0, atol=1e-3
        )
    # Errors of r_k are multiplied by the slope, which is 1/σ² a unit of colour.
    largest = expected.grad_decoded.abs().max().item()
    torch.testing.assert_close(
        actual.grad_decoded.double(), expected.grad_decoded, rtol=0, atol=1e-3 * largest
    )
    likelihood = ops.mixture_log_likelihood(image, decoded, 0.03, component)
    (gradient,) = torch.autograd.grad(likelihood.sum(), decoded)
    torch.testing.assert_close(gradient, -actual.grad_decoded, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("component", ["gaussian", "logistic"])
@pytest.mark.parametrize("case", extreme_inputs())
def test_float32_survives_extremes(case, component, epsilon):
    check_extremes(*extreme_inputs()[case], component, epsilon)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    image, decoded = (value.to(dtype) for value in make_inputs())
    decoded.requires_grad_()
    wide = decoded.detach().float().requires_grad_()
    assert_same(ops.mixture(image, decoded, 0.1), ops.mixture(image.float(), wide, 0.1), rtol=0)
    narrow = ops.mixture_log_likelihood(image, decoded, 0.1)
    expected = ops.mixture_log_likelihood(image.float(), wide, 0.1)
    assert narrow.dtype == torch.float32 and torch.equal(narrow, expected)
    (gradient,) = torch.autograd.grad(narrow.sum(), decoded)
    (wide_gradient,) = torch.autograd.grad(expected.sum(), wide)
    assert torch.equal(gradient, wide_gradient.to(dtype))


def test_gradcheck():
    image, decoded = make_inputs(height=2, width=3)
    for component in ("gaussian", "logistic"):
        torch.autograd.gradcheck(
            lambda d, component=component: ops.mixture_log_likelihood(image, d, 0.3, component),
            decoded.requires_grad_(),
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_second_derivative_raises(weighted):
    image, decoded = make_inputs()
    likelihood = ops.mixture_log_likelihood(image, decoded.requires_grad_(), 0.3)
    weights = torch.ones_like(likelihood, requires_grad=weighted)
    (gradient,) = torch.autograd.grad(likelihood, decoded, weights, create_graph=True)
    # Together with a term that has a gradient, or the second derivative would be lost unseen.
    with pytest.raises(RuntimeError, match="no second derivative"):
        (decoded.sum() + gradient.square().sum()).backward()


def test_inputs_are_left_alone():
    image, decoded = make_inputs()
    before = image.clone(), decoded.clone()
    ops.mixture(image, decoded, 0.3)
    ops.mixture_log_likelihood(image, decoded.requires_grad_(), 0.3).sum().backward()
    assert torch.equal(image, before[0]) and torch.equal(decoded, before[1])


BAD_INPUTS = {
    "image must be": ((3, 5, 4), (2, 3, 4, 5, 4), 0.1, "gaussian"),
    "and decoded": ((2, 3, 5, 4), (3, 4, 5, 4), 0.1, "gaussian"),
    "1 or 3 colours, not 2": ((2, 2, 5, 4), (2, 3, 3, 5, 4), 0.1, "gaussian"),
    r"decoded must be \(2, K, 4, 5, 4\)": ((2, 3, 5, 4), (2, 3, 3, 5, 4), 0.1, "gaussian"),
    "K > 0": ((2, 3, 5, 4), (2, 0, 4, 5, 4), 0.1, "gaussian"),
    "sigma must be positive and finite, not 0": ((2, 3, 5, 4), (2, 3, 4, 5, 4), 0, "gaussian"),
    "not nan": ((2, 3, 5, 4), (2, 3, 4, 5, 4), math.nan, "gaussian"),
    "gaussian or logistic, not 'cauchy'": ((2, 3, 5, 4), (2, 3, 4, 5, 4), 0.1, "cauchy"),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_inputs_are_refused_in_one_line(message):
    image_shape, decoded_shape, sigma, component = BAD_INPUTS[message]
    for op in (ops.mixture, ops.mixture_log_likelihood):
        with pytest.raises(ValueError, match=message) as error:
            image, decoded = (torch.zeros(s, device=DEVICE) for s in (image_shape, decoded_shape))
            op(image, decoded, sigma, component)
        assert "\n" not in str(error.value)


def test_integers_and_a_negative_epsilon_are_refused():
    image, decoded = make_inputs()
    with pytest.raises(ValueError, match="floating point"):
        ops.mixture((image * 255).byte(), decoded, 0.1)
    with pytest.raises(ValueError, match="posterior_epsilon"):
        ops.mixture(image, decoded, 0.1, posterior_epsilon=-1e-6)


# The Triton kernels, against the reference in float64.


@pytest.fixture(params=[TRITON])
def triton_backend(request, monkeypatch):
    """The device. Memory left unwritten is NaN; the interpreter gets few, large programs."""
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "BLOCKS", dict.fromkeys(ops.BLOCKS, (4096, 1)))
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=DEVICE).isnan().all()
    with kernels.use(request.param):
        yield DEVICE
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


# Largest error, in units of the largest number of an output. A gradient in half precision is
# rounded on a GPU and truncated by the interpreter: one unit in the last place.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
LAST_PLACE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def assert_near(actual: Tensor, expected: Tensor, name: str = ""):
    """Within TOLERANCE or LAST_PLACE of the type of `actual`, and finite."""
    tolerance = (TOLERANCE | LAST_PLACE)[actual.dtype]
    error = (actual.double() - expected).abs().max().item() if actual.numel() else 0.0
    largest = max(1.0, expected.abs().max().item()) if actual.numel() else 1.0
    assert error <= tolerance * largest, f"{name}: error {error:.1e} of {largest:.1e}"


def check_kernels(image, decoded, component="gaussian", epsilon=0.5, sigma=0.3):
    """Every output and its gradient, together and alone, types and memory layouts."""
    decoded = decoded.detach().requires_grad_()
    wide = decoded.detach().double().requires_grad_()
    actual = ops.mixture(image, decoded, sigma, component, epsilon)
    expected = ops.mixture_reference(image.double(), wide, sigma, component, epsilon)
    dtype = ops.wide_dtype(image, decoded)
    for name, one, other in zip(ops.Mixture._fields, actual, expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert_near(one, other, name)
    generator = torch.Generator().manual_seed(3)
    cotangents = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        for output in expected[:4]
    ]
    narrow = [cotangent.to(dtype) for cotangent in cotangents]
    cotangents = [cotangent.double() for cotangent in narrow]
    (gradient,) = torch.autograd.grad(actual[:4], decoded, narrow)
    (other,) = torch.autograd.grad(expected[:4], wide, cotangents, retain_graph=True)
    assert gradient.dtype == decoded.dtype
    assert_near(gradient, other, "gradient of all")
    likelihood = ops.mixture_log_likelihood(image, decoded, sigma, component)
    assert likelihood.dtype == dtype
    assert_near(likelihood, expected.log_likelihood, "likelihood alone")
    (gradient,) = torch.autograd.grad(likelihood, decoded, narrow[0])
    (other,) = torch.autograd.grad(expected.log_likelihood, wide, cotangents[0])
    assert_near(gradient, other, "gradient of the likelihood alone")


def on(device, *tensors, dtype=torch.float64):
    return [tensor.to(device, dtype) for tensor in tensors]


KERNEL_CASES = [  # batch, slots, colours, height, width, component
    (2, 1, 3, 1, 1, "gaussian"),
    (1, 1, 1, 7, 7, "logistic"),
    (2, 2, 3, 7, 7, "logistic"),
    (1, 3, 1, 5, 9, "gaussian"),
    (1, 4, 3, 35, 35, "gaussian"),
    (1, 5, 3, 64, 64, "gaussian"),
    (1, 7, 3, 16, 3, "logistic"),
    (1, 11, 1, 1, 65, "gaussian"),
]


@pytest.mark.parametrize("dtype, layout", [("float64", "offset"), ("float32", "channels_last")])
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_kernels_equal_the_reference(case, dtype, layout, triton_backend):
    *sizes, component = case
    image, decoded = on(triton_backend, *make_inputs(*sizes), dtype=getattr(torch, dtype))
    decoded = LAYOUTS[layout](decoded)
    check_kernels(image, decoded, component, 0.5 if sizes[1] % 2 else 0.0)


@pytest.mark.parametrize(
    "size, layout", [((1, 33), "channels_last"), ((7, 7), "offset"), ((8, 8), "channels_last")]
)
def test_kernels_with_several_blocks(size, layout, triton_backend, monkeypatch):
    monkeypatch.setattr(ops, "BLOCKS", dict.fromkeys(ops.BLOCKS, (32, 1)))
    image, decoded = on(triton_backend, *make_inputs(2, 2, 3, *size))
    check_kernels(image, LAYOUTS[layout](decoded))


@pytest.mark.parametrize(
    "image_dtype, dtype",
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float16),
    ],
)
def test_kernels_compute_wide_and_give_the_gradient_of_the_input(
    image_dtype, dtype, triton_backend
):
    image, decoded = on(triton_backend, *make_inputs(slots=2))
    decoded = LAYOUTS["channels_last"](decoded)
    check_kernels(image.to(image_dtype), decoded.to(dtype))


KERNEL_LAYOUTS = LAYOUTS | {
    "cropped": lambda t: torch.cat([t, t], -1).movedim(2, -1).contiguous().movedim(-1, 2)[
        ..., : t.shape[-1]
    ],
    "expanded_slots": lambda t: t[:, :1].expand(t.shape),
    "expanded_pixels": lambda t: t[..., :1, :1].expand(t.shape),
    "slots_inside_pixels": lambda t: t.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
    "offset_channels_last": lambda t: torch.cat(
        [t.new_full((1,), math.nan), t.movedim(2, -1).flatten()]
    )[1:].view(t.movedim(2, -1).shape).movedim(-1, 2),
}  # fmt: skip


@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
def test_kernels_take_any_strides(layout, triton_backend):
    image, decoded = on(triton_backend, *make_inputs(slots=2))
    check_kernels(image, KERNEL_LAYOUTS[layout](decoded))


@pytest.mark.parametrize("layout", ["channels_last", "expanded_pixels", "cropped"])
def test_kernels_take_images_of_any_strides(layout, triton_backend):
    image, decoded = on(triton_backend, *make_inputs(slots=2))
    image = KERNEL_LAYOUTS[layout](image[:, None])[:, 0]
    check_kernels(image, decoded)


def test_kernels_read_memory_where_it_lies(triton_backend, monkeypatch):
    """No copy is made where pixels lie at one stride, and gradients come in decoded's layout."""
    image, decoded = on(triton_backend, *make_inputs(2, 2))
    for name in ("channels_last", "planes", "slots_first", "expanded_slots", "offset"):
        value = KERNEL_LAYOUTS.get(name, Tensor.clone)(decoded)
        layout = ops.layout(value)
        assert layout.tensor is value and layout.unit == 4 * (name == "channels_last")
        value.requires_grad_()
        terms = ops.mixture(image, value, 0.3)
        (gradient,) = torch.autograd.grad(terms.log_likelihood.sum(), value)
        for result in (gradient, terms.grad_decoded):
            lies = result.movedim(2, -1) if layout.unit else result
            assert lies.is_contiguous(), name
    assert ops.layout(KERNEL_LAYOUTS["cropped"](decoded)).unit == 4


@pytest.mark.parametrize("step, copied", [(2**24 - 1, False), (2**24, True)])
def test_pixels_too_far_apart_for_32_bits_are_copied(step, copied):
    shape, strides = (2, 3, 4, 1, 9), (4096, 1024, 1, 9 * step, step)
    decoded = torch.empty_strided(shape, strides, device="meta")
    layout = ops.layout(decoded)
    assert (layout.tensor is not decoded) == copied
    assert layout.strides[3] * max(1, layout.unit) == (4 if copied else step)
    image = decoded[:, 0]
    assert ops.planes(image)[1][2] == (1 if copied else step)


@pytest.mark.parametrize(
    "case, component", list(zip(extreme_inputs(), itertools.cycle(["gaussian", "logistic"])))
)
def test_kernels_survive_extremes(case, component, triton_backend):
    image, decoded = on(triton_backend, *extreme_inputs()[case], dtype=torch.float32)
    check_extremes(image, decoded, component, 1e-6)


def test_kernels_with_a_slot_switched_off(triton_backend):
    image, decoded = on(triton_backend, *make_inputs())
    decoded[:, 0, 3] = -math.inf
    decoded.requires_grad_()
    actual = ops.mixture(image, decoded, 0.3)
    assert_same(actual, ops.mixture_reference(image, decoded, 0.3))
    (gradient,) = torch.autograd.grad(actual.log_likelihood.sum(), decoded)
    torch.testing.assert_close(gradient, -actual.grad_decoded)
    assert not actual.masks[:, 0].any() and not gradient[:, 0].any()


def test_kernels_keep_a_nan_in_its_pixel(triton_backend):
    image, decoded = on(triton_backend, *make_inputs(), dtype=torch.float32)
    decoded[0, 1, 2, 3, 1] = math.nan
    for name, field in ops.mixture(image, decoded, 0.3)._asdict().items():
        bad = field.isnan()
        assert bad[0, ..., 3, 1].any() or name == "masks"
        bad[0, ..., 3, 1] = False
        assert not bad.any()


@pytest.mark.parametrize("component", ["gaussian", "logistic"])
def test_gradcheck_of_the_kernels(component, triton_backend):
    image, decoded = on(triton_backend, *make_inputs(1, 2, 1, 1, 2))
    decoded = LAYOUTS["channels_last"](decoded).requires_grad_()

    torch.autograd.gradcheck(
        lambda d: ops.mixture(image, d, 0.3, component, 0.5)[:4], decoded, fast_mode=True
    )


def test_kernels_are_well_behaved_operators(triton_backend):
    image, planes = on(triton_backend, *make_inputs(1, 1, 1, 2, 3))
    last, cotangents = LAYOUTS["channels_last"](planes), (image[:, 0], None, planes[:, :, 0], None)
    operators = {
        ops._mixture: (0.3, "gaussian", 0.5),
        ops._mixture_log_likelihood: (0.3, "logistic"),
        ops.mixture_backward: (*cotangents, 0.3, "gaussian", 0.5),
    }
    for operator, options in operators.items():
        decoded = last.clone().requires_grad_(operator is not ops.mixture_backward)
        torch.library.opcheck(operator, (image, decoded, *options))
        tests = "test_faketensor"  # strides of the other layout
        torch.library.opcheck(operator, (image, planes, *options), test_utils=tests)


def test_kernels_in_a_compiled_graph(triton_backend):
    def loss(image, decoded):
        terms = ops.mixture(image, decoded * 1.0, 0.3, "logistic", 0.5)
        alone = ops.mixture_log_likelihood(image, decoded, 0.3)
        return (terms.log_likelihood + terms.masks.square().sum(1) + alone).sum()

    image, decoded = on(triton_backend, *make_inputs(1, 2))
    decoded = LAYOUTS["channels_last"](decoded).requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(image, decoded), decoded)
    (expected,) = torch.autograd.grad(loss(image, decoded), decoded)
    torch.testing.assert_close(gradient, expected)


def test_kernels_backward_twice_but_no_second_derivative(triton_backend):
    image, decoded = on(triton_backend, *make_inputs(1, 2))
    decoded.requires_grad_()
    for total in (
        ops.mixture_log_likelihood(image, decoded, 0.3).sum(),
        ops.mixture(image, decoded, 0.3).responsibilities.square().sum(),
    ):
        (first,) = torch.autograd.grad(total, decoded, retain_graph=True)
        (second,) = torch.autograd.grad(total, decoded, create_graph=True)
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (decoded.sum() + second.square().sum()).backward()


def test_kernels_take_expanded_cotangents_and_none(triton_backend):
    image, decoded = on(triton_backend, *make_inputs())
    decoded.requires_grad_()
    terms = ops.mixture(image, decoded, 0.3)
    reference = ops.mixture_reference(image, decoded, 0.3)
    for i in range(4):  # alone: the others have no cotangent; of a sum: it is expanded
        (gradient,) = torch.autograd.grad(terms[i].sum(), decoded, retain_graph=True)
        (expected,) = torch.autograd.grad(reference[i].sum(), decoded, retain_graph=True)
        assert_near(gradient, expected, ops.Mixture._fields[i])
    weights = torch.rand(2, 1, 1, dtype=torch.float64, device=decoded.device)
    likelihood = ops.mixture_log_likelihood(image, decoded, 0.3)
    for cotangent in (weights.expand(2, 5, 4), weights.new_ones(4, 5, 2).transpose(0, 2)):
        (gradient,) = torch.autograd.grad(likelihood, decoded, cotangent, retain_graph=True)
        assert_near(gradient, -terms.grad_decoded * cotangent[:, None, None])


def test_kernels_leave_inputs_alone_and_repeat_themselves(triton_backend):
    image, decoded = on(triton_backend, *make_inputs(), dtype=torch.float32)
    before = image.clone(), decoded.clone()
    first = ops.mixture(image, decoded.requires_grad_(), 0.3)
    with torch.no_grad():
        second = ops.mixture(image, decoded, 0.3)
    assert all(map(torch.equal, first, second))
    assert not first.leave_one_out.requires_grad and not first.grad_decoded.requires_grad
    first.log_likelihood.sum().backward()
    assert torch.equal(image, before[0]) and torch.equal(decoded, before[1])


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_kernels_refuse_bad_inputs(message, triton_backend):
    test_bad_inputs_are_refused_in_one_line(message)


@st.composite
def drawn_inputs(draw):
    """image, decoded in memory of any order and density, and the options."""
    sizes = [draw(st.integers(1, most)) for most in (2, 3, 6, 6)]
    batch, slots, height, width = sizes
    colours = draw(st.sampled_from([1, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = batch, slots, colours + 1, height, width
    order = draw(st.permutations(range(5)))
    steps = draw(st.lists(st.integers(1, 2), min_size=5, max_size=5))
    memory = [shape[axis] * steps[axis] for axis in order]
    decoded = torch.randn(memory, generator=generator, dtype=torch.float64)
    decoded = decoded.permute([order.index(axis) for axis in range(5)])
    decoded = decoded[tuple(slice(None, None, step) for step in steps)]
    decoded = decoded * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    image = torch.rand((batch, colours, height, width), generator=generator, dtype=torch.float64)
    options = (
        draw(st.sampled_from(["gaussian", "logistic"])),
        draw(st.sampled_from([0.0, 1e-6, 1.0])),
        draw(st.sampled_from([0.1, 1.0])),
    )
    return image, decoded, options


@settings(
    max_examples=6, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(drawn=drawn_inputs())
def test_kernels_on_drawn_inputs(triton_backend, drawn):
    image, decoded, options = drawn
    assert decoded.shape[3:] == image.shape[2:]
    check_kernels(image.to(triton_backend), decoded.to(triton_backend), *options)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA device")
def test_kernels_are_deterministic_bit_for_bit():
    image, decoded = on("cuda", *make_inputs(8, 7, 3, 128, 128), dtype=torch.float32)
    decoded.requires_grad_()
    results = []
    for _ in range(3):
        terms = kernels.TRITON["mixture"](image, decoded, 0.1)
        results.append((*terms, *torch.autograd.grad(terms.log_likelihood.sum(), decoded)))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


# Mutants: a changed formula has to fail one of the checks above.

MUTANTS = {
    "mixture for every colour": (
        "joint.logsumexp(1),",
        "(log_masks[:, :, None] - 0.5 * (difference / sigma) ** 2 - math.log(sigma)"
        " - 0.5 * math.log(2 * math.pi)).logsumexp(1).sum(1),",
    ),
    "leave-one-out keeps the full masks": (" - logsumexp_of_others(log_masks)", ""),
    "leave-one-out keeps the slot": ("before[-1]], 1)", "values.logsumexp(1)], 1)"),
    "posterior with the mask prior": ("posterior(log_density,", "posterior(joint,"),
    "epsilon forgotten": ("if epsilon == 0:", "if True:"),
    "gradient of mask probabilities": (
        "(masks - responsibilities)[:",
        "(-responsibilities / masks)[:",
    ),
    "gradient of the likelihood, not of minus it": ("= -responsibilities[", "= responsibilities["),
    "score by sigma, not sigma squared": ("difference / sigma**2", "difference / sigma"),
    "logistic score without its half": ("(2 * sigma)).tanh()", "sigma).tanh()"),
    "constant for one colour only": ("constant = colours *", "constant ="),
    "masks over colours": ("[:, :, -1].log_softmax(1)", "[:, :, -1].log_softmax(2)"),
    "first channel is the logit": ("log_masks = decoded[:, :, -1]", "log_masks = decoded[:, :, 0]"),
}


def load_mutant(module, old: str, new: str) -> types.ModuleType:
    """The module with `old` replaced by `new` in its source, its Triton ops under another name."""
    source = Path(module.__file__).read_text()
    assert old in source, f"the mutant's text is gone from {module.__file__}: {old}"
    name = f"mutant_{uuid.uuid4().hex}"
    source = source.replace(old, new).replace("slot_kernels::", f"{name}::")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")  # triton.jit wants to read the source of its functions
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        mutant = importlib.util.module_from_spec(spec)
        with mock.patch.dict(kernels.TRITON):  # what the mutant registers there is its own affair
            spec.loader.exec_module(mutant)
            mutant.TRITON = dict(kernels.TRITON)
    return mutant


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    mutant = load_mutant(ops, *MUTANTS[name])
    with pytest.raises(AssertionError):
        for component in ("gaussian", "logistic"):
            check_against_brute_force(mutant, component)
            check_against_brute_force(mutant, component, epsilon=0.5)


@pytest.mark.parametrize(
    "old, new",
    [
        ("gradient * cotangent", "-gradient * cotangent"),
        ("* cotangent[:, None, None]", "* cotangent.mean()"),
        ("by_logits = responsibilities -", "by_logits = -responsibilities -"),
    ],
)
def test_mutant_of_the_backward_fails(old, new):
    with pytest.raises(AssertionError):
        check_likelihood_gradient(load_mutant(ops, old, new))


# The choice of back-end.


def test_use_is_a_switch_and_a_context_manager():
    kernels.use("auto")
    assert kernels.backend() == kernels.backend(torch.zeros(1)) == kernels.backend("cpu") == "torch"
    with kernels.use("torch"), kernels.use("auto"):
        assert kernels._choice == "auto"
    assert kernels._choice == "auto"
    kernels.use("torch")
    with pytest.raises(KeyError), kernels.use("auto"):
        raise KeyError
    assert kernels._choice == "torch"


def test_use_refuses_unknown_names():
    with pytest.raises(ValueError, match="choose triton, torch or auto"):
        kernels.use("cuda")


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(kernels, "TRITON", {"mixture": None})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        kernels.use("triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        kernels.use("triton")
    assert kernels._choice == "torch"


def test_triton_is_called_where_it_can_run(monkeypatch):
    monkeypatch.setattr(kernels, "TRITON", {"mixture": lambda *arguments: arguments})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    image, decoded = make_inputs()
    with kernels.use("auto"):
        assert kernels.backend("cuda", "mixture") == "triton"
        assert kernels.backend("cpu", "mixture") == "torch"
        assert kernels.backend("cuda", "refinement_inputs") == "torch"
    with kernels.use("triton"):
        with pytest.raises(RuntimeError, match="refinement_inputs has no Triton kernel"):
            kernels.backend("cuda", "refinement_inputs")
        with pytest.raises(RuntimeError, match="on cpu, not on CUDA"):
            ops.mixture(image, decoded, 0.3)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert ops.mixture(image, decoded, 0.3) == (image, decoded, 0.3, "gaussian", 0.0)
    with kernels.use("auto"):  # the interpreter runs only where it is asked for
        assert kernels.backend("cpu", "mixture") == "torch"
