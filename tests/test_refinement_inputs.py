"""kernels/refinement_inputs.py against the table of app. C, written out channel by channel."""

import importlib

import pytest
import torch
from hypothesis import given
from kernel_checks import (
    DEVICE,
    LAYOUTS,
    assert_near,
    backend,
    brute_densities,
    brute_leave_one_out,
    brute_log_likelihood,
    brute_masks,
    drawn_inputs,
    extreme_inputs,
    few_examples,
    set_block,
    slot_inputs,
    triton_only,
)
from torch import Tensor

import iodine

ops = importlib.import_module("kernels.refinement_inputs")
__all__ = ["backend", "triton_only"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
STOPPED = ("grad_means", "grad_mask", "log_likelihood", "leave_one_out")


def make_arguments(batch=2, slots=3, colours=3, height=5, width=4, coordinates=2) -> list[Tensor]:
    """image, decoded, norm_weight, norm_bias, coordinates in float64."""
    generator = torch.Generator().manual_seed(1)
    shapes = (colours + 3,), (colours + 3,), (coordinates, height, width)
    rest = [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes]
    return [*slot_inputs(batch, slots, colours, height, width), *rest]


def split(packed: Tensor, image: Tensor) -> dict[str, Tensor]:
    """The inputs of (B, K, F, H, W) by name."""
    widths = iodine.input_widths(image.shape[1])
    widths["coordinates"] += packed.shape[2] - sum(widths.values())
    return dict(zip(widths, packed.split([*widths.values()], 2), strict=True))


def brute_layer_norm(value: Tensor) -> Tensor:
    """Every number of one value, without an affine part."""
    mean = value.sum() / value.numel()
    variance = ((value - mean) ** 2).sum() / value.numel()
    return (value - mean) / (variance + 1e-5) ** 0.5


def brute_inputs(image, decoded, weight, bias, coordinates, sigma) -> ops.RefinementInputs:
    """One channel after another of one slot after another, from linear space."""
    colours, masks = image.shape[1], brute_masks(decoded)
    densities = brute_densities(image, decoded, sigma)
    likelihood = brute_log_likelihood(image, decoded, sigma)
    constant = decoded.detach().requires_grad_()
    nll = -brute_log_likelihood(image, constant, sigma).sum()
    (gradients,) = torch.autograd.grad(nll, constant)
    left_out = brute_leave_one_out(image, decoded.detach(), sigma)
    rows = []
    for b in range(decoded.shape[0]):
        for k in range(decoded.shape[1]):
            normalised = [
                *brute_layer_norm(gradients[b, k, :colours]),
                brute_layer_norm(gradients[b, k, colours]),
                brute_layer_norm(likelihood[b].detach()),
                brute_layer_norm(left_out[b, k]),
            ]
            channels = [
                *image[b],
                *decoded[b, k, :colours],
                masks[k][b],
                decoded[b, k, colours],
                densities[k][b] / sum(density[b] for density in densities),
                *(g * n + s for g, n, s in zip(weight, normalised, bias, strict=True)),
                *coordinates,
            ]
            rows.append(torch.stack(channels))
    packed = torch.stack(rows).unflatten(0, decoded.shape[:2])
    return ops.RefinementInputs(packed, likelihood, gradients)


def in_float64(image, decoded, weight, bias, coordinates, sigma) -> ops.RefinementInputs:
    """The fallback in float64, itself held against brute force below."""
    sigma = torch.tensor(sigma, dtype=torch.float64, device=DEVICE)
    constants = image.double(), decoded, weight, bias, coordinates.double()
    return ops.refinement_inputs_torch(*constants, sigma)


def check(arguments, sigma=0.3, reference=in_float64, noise=0.0, tolerance=0.0) -> None:
    """Three outputs and three gradients. Noise: of normalised channels, relative to their unit."""
    image, *sources, coordinates = (value.detach() for value in arguments)
    sources = [value.requires_grad_() for value in sources]
    wide = [value.detach().double().requires_grad_() for value in sources]
    actual = ops.refinement_inputs(image, *sources, coordinates, sigma)
    expected = reference(image, *wide, coordinates, sigma)
    dtype = torch.promote_types(torch.promote_types(image.dtype, arguments[1].dtype), torch.float32)
    assert all(value.dtype == dtype for value in actual)
    assert actual.packed.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    known = split(expected.packed, image)
    for name, values in split(actual.packed, image).items():
        assert_near(values, known[name], name, noise if name in STOPPED else tolerance)
    assert_near(actual.log_likelihood, expected.log_likelihood, "log_likelihood", tolerance)
    assert_near(actual.grad_decoded, expected.grad_decoded, "grad_decoded", tolerance)
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(v.shape, generator=generator).to(DEVICE) for v in actual[:2]]
    found = torch.autograd.grad(actual[:2], sources, [c.to(dtype) for c in cotangents])
    expected = torch.autograd.grad(expected[:2], wide, [c.double() for c in cotangents])
    for name, one, other in zip(("decoded", "weight", "bias"), found, expected, strict=True):
        allowed = noise if name == "weight" else tolerance
        assert_near(one, other, f"gradient of {name}", allowed)
    assert [value.dtype for value in found] == [value.dtype for value in sources]


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 7, 11])
def test_equals_brute_force(backend, slots, colours):
    check(make_arguments(1, slots, colours), reference=brute_inputs)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (31, 1), (4, 8), (3, 11), (7, 13)])
@pytest.mark.parametrize("coordinates", [0, 9])
def test_every_size_and_number_of_coordinates(backend, coordinates, size, monkeypatch):
    set_block(monkeypatch, 32)  # less than one block, one, and several
    check(make_arguments(2, 2, 3, *size, coordinates), reference=brute_inputs)


def test_channels_are_those_of_the_paper():
    names = "image", "means", "mask", "mask_logits", "mask_posterior", *STOPPED, "coordinates"
    widths = iodine.input_widths(3)
    assert tuple(widths) == names
    assert [*widths.values()] == [3, 3, 1, 1, 1, 3, 1, 1, 1, 2] and sum(widths.values()) == 17


def test_gradients_stop_where_the_paper_says(backend):
    sources = [value.requires_grad_() for value in make_arguments()]
    outputs = ops.refinement_inputs(*sources, 0.3)
    assert not outputs.grad_decoded.requires_grad
    for name, values in split(outputs.packed, sources[0]).items():
        total = values.pow(3).sum()
        if not total.requires_grad:
            assert name in ("image", "coordinates")
            continue
        found = torch.autograd.grad(total, sources, retain_graph=True, allow_unused=True)
        reached = [gradient is not None and bool(gradient.any()) for gradient in found]
        to_decoded = name in ("means", "mask", "mask_logits", "mask_posterior")
        assert reached == [False, to_decoded, name in STOPPED, name in STOPPED, False], name


@pytest.mark.parametrize("case", extreme_inputs())
def test_float32_survives_extremes(backend, case):
    # log p is known to 1e-4 where it is -1700. Where slots are equal, the gradient of the masks and
    # the likelihood's deviation are 0, and a normalisation divides that noise by 0.003.
    image, decoded = extreme_inputs()[case]
    rest = torch.ones(6), torch.zeros(6), torch.zeros(2, 7, 7)
    arguments = image, decoded, *(value.to(image) for value in rest)
    check(arguments, sigma=0.03, noise=0.2, tolerance=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(backend, dtype):
    arguments = make_arguments()
    narrow = [value.to(dtype) for value in arguments[:2]]
    check([*narrow, *(value.float() for value in arguments[2:])], noise=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout):
    image, decoded, *rest = make_arguments()
    image, rest[2] = LAYOUTS[layout](image[:, None])[:, 0], rest[2].mT.contiguous().mT
    check([image, LAYOUTS[layout](decoded), *rest], reference=brute_inputs)
    expanded = decoded[:, :1].expand(-1, 3, -1, -1, -1)
    check([image[:1].expand(2, -1, -1, -1), expanded, *rest], reference=brute_inputs)


@few_examples
@given(drawn=drawn_inputs())
def test_drawn_inputs(backend, drawn):
    image, decoded, sigma = drawn
    if image.dtype == torch.bfloat16:  # of which the normalisations may make anything
        image, decoded = image.double(), decoded.double()
    rest = [value.to(image) for value in make_arguments(1, 1, *image.shape[1:])[2:]]
    wide = image.dtype == torch.float64
    check([image, decoded, *rest], sigma, noise=1e-8 if wide else 1e-1)


def test_the_likelihood_alone_has_a_gradient(backend):
    arguments = make_arguments()
    arguments[1].requires_grad_()
    outputs = ops.refinement_inputs(*arguments, 0.3)
    (gradient,) = torch.autograd.grad(outputs.log_likelihood.sum(), arguments[1])
    assert_near(gradient, -outputs.grad_decoded)


def test_operators_are_well_defined(triton_only):
    image, decoded, weight, bias, coordinates = make_arguments(1, 2, 1, 2, 3)
    last, sigma = decoded.movedim(2, -1).contiguous(), image.new_tensor(0.3)
    affine = torch.stack([weight, bias])
    sources = last.clone().requires_grad_(), affine.clone().requires_grad_()
    torch.library.opcheck(ops._forward, (image, *sources, coordinates, sigma))
    packed, likelihood, *saved = ops._forward(image, last, affine, coordinates, sigma)
    torch.library.opcheck(
        ops._backward, (image, last, sigma, likelihood, *saved, packed, likelihood)
    )


@pytest.mark.parametrize("bad", ["norm_weight", "norm_bias", "coordinates"])
def test_bad_shapes_are_refused_in_one_line(bad):
    names = "image", "decoded", "norm_weight", "norm_bias", "coordinates"
    arguments = dict(zip(names, make_arguments(), strict=True))
    arguments[bad] = arguments[bad][..., :-1]
    with pytest.raises(ValueError, match=f"{bad} must be") as error:
        ops.refinement_inputs(**arguments, sigma=0.3)
    assert "\n" not in str(error.value)
