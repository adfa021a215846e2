"""kernels/mixture.py against a mixture written out in linear space, slot by slot."""

import importlib.util
import math
import subprocess
import sys
import tempfile
import types
import uuid
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributions as D
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


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("component", ["gaussian", "logistic"])
@pytest.mark.parametrize("case", extreme_inputs())
def test_float32_survives_extremes(case, component, epsilon):
    image, decoded = extreme_inputs()[case]
    decoded = decoded.clone().requires_grad_()
    actual = ops.mixture(image, decoded, 0.03, component, epsilon)
    expected = ops.mixture(image.double(), decoded.double(), 0.03, component, epsilon)
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
            op(torch.zeros(image_shape), torch.zeros(decoded_shape), sigma, component)
        assert "\n" not in str(error.value)


def test_integers_and_a_negative_epsilon_are_refused():
    image, decoded = make_inputs()
    with pytest.raises(ValueError, match="floating point"):
        ops.mixture((image * 255).byte(), decoded, 0.1)
    with pytest.raises(ValueError, match="posterior_epsilon"):
        ops.mixture(image, decoded, 0.1, posterior_epsilon=-1e-6)


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
    monkeypatch.setattr(kernels, "TRITON", {})
    with pytest.raises(RuntimeError, match="no op of this repository has a Triton kernel yet"):
        kernels.use("triton")
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


def test_import_does_not_need_triton():
    code = "import sys; sys.modules['triton'] = None; import kernels; print(kernels.backend())"
    root = Path(kernels.__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout == "torch\n", run.stderr
