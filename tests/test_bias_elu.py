"""kernels/bias_elu.py, torch and Triton, against F.elu(x + bias) and its derivative in float64."""

import importlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, GUARD, backend, guarded_memory, triton_only
from torch import Tensor, nn

ops = importlib.import_module("kernels.bias_elu")
# The interpreter computes exp of positive numbers too, and warns of what is then not taken.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
__all__ = ["backend", "triton_only"]  # fixtures
# Relative to the result; half precision gives up its last digit, as the interpreter truncates.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LAYOUTS = {"channels_last": torch.channels_last, "planes": torch.contiguous_format}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """What the interpreter takes is their number, whatever they have to do."""
    monkeypatch.setattr(ops, "NUMBERS", 2**16)


def make(*shape: int, dtype=torch.float64, layout="planes", scale=2.0, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    if len(shape) == 4:
        values = values.contiguous(memory_format=LAYOUTS[layout])
    return values.to(DEVICE, dtype)


def definition(x: Tensor, bias: Tensor) -> Tensor:
    """In float64, with the derivative that automatic differentiation gives."""
    shifted = x.double() + bias.double().reshape(1, -1, 1, 1)
    return torch.where(shifted > 0, shifted, shifted.clamp(max=0).expm1())


def check(x: Tensor, bias: Tensor, overwrite: bool = False, cotangent: Tensor | None = None):
    """Result and gradients against the definition; type and layout of the result; x as it was."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    memory = x.clone() if overwrite else x  # not the leaf, which autograd keeps from being written
    before = x.detach().clone()
    out, expected = ops.bias_elu(memory, bias, overwrite), definition(x, bias)
    assert out.dtype == x.dtype and out.shape == x.shape
    if cotangent is None:
        cotangent = make(*out.shape, dtype=out.dtype, scale=1.0, seed=1)
    gradients = torch.autograd.grad(out, (x, bias), cotangent)
    expected_gradients = torch.autograd.grad(expected, (x, bias), cotangent)
    tolerance = TOLERANCE[x.dtype]
    atol = 1e-16 if x.dtype == torch.float64 else 1e-30  # float64 gives digits up near 0
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=atol)
    assert gradients[1].dtype == bias.dtype
    # A derivative is y + 1, so that the rounding of y is that of numbers of size 1; the bias's is
    # a sum, and a narrow type rounds it once more.
    size = cotangent.double().abs().sum((0, 2, 3)).max().item() if out.numel() else 0.0
    for one, other, atol in zip(gradients, expected_gradients, (4, size), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * atol)
    assert torch.equal(x, before)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 32, 33, 64])
def test_every_number_of_channels(backend, channels, overwrite):
    check(make(3, channels, 5, 7, layout="channels_last"), make(channels), overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_planes(backend, overwrite):
    check(make(3, 5, 5, 7), make(5), overwrite)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (8, 8), (35, 35), (64, 64)])
def test_every_size(backend, size, layout):
    check(make(2, 3, *size, layout=layout), make(3))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_type(backend, dtype, overwrite):
    check(make(2, 5, 7, 3, dtype=dtype, layout="channels_last"), make(5, dtype=dtype), overwrite)


def test_a_wide_bias_of_narrow_numbers(backend):
    """As under autocast: the convolution's output is bfloat16 and the parameter float32."""
    x, bias = make(2, 5, 7, 3, dtype=torch.bfloat16), make(5, dtype=torch.float32)
    assert ops.bias_elu(x, bias).dtype == torch.bfloat16
    check(x, bias.bfloat16().float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("numbers", "programs"), [(16, 10**9), (16, 1), (64, 4)])
def test_many_tiles(triton_only, layout, numbers, programs, monkeypatch):
    """One for each program, all for one, and some."""
    monkeypatch.setattr(ops, "NUMBERS", numbers)
    monkeypatch.setattr(ops, "PROGRAMS", programs)
    check(make(2, 3, 7, 5, layout=layout), make(3))


def test_as_many_tiles_in_turn_as_leave_enough_programs(triton_only, monkeypatch):
    monkeypatch.setattr(ops, "PROGRAMS", 100)
    assert [ops.in_turn(n, 16) for n in (1, 198, 199, 200, 400, 10**6)] == [1, 1, 2, 2, 4, 16]
    assert [ops.in_turn(10**6, most) for most in (0, 1, 3, 8)] == [1, 1, 2, 8]


STRIDES = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second channel": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded over images": lambda t: t[:1].expand(t.shape),
    "expanded over channels": lambda t: t[:, :1].expand(t.shape),
    "expanded over pixels": lambda t: t[..., :1, :1].expand(t.shape),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(backend, strides, overwrite):
    """Also of the bias and of the cotangent; what cannot be overwritten is copied."""
    other = STRIDES[strides]
    x, bias = other(make(2, 3, 5, 4)), make(3, 2)[:, 1]
    before = x.clone()
    check(x, bias, cotangent=other(make(2, 3, 5, 4, seed=1)))
    ops.bias_elu(x, bias, overwrite)
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overwrites_where_it_may(backend, layout):
    x, bias = make(2, 3, 5, 4, layout=layout), make(3)
    copy = x.clone()
    assert ops.bias_elu(x, bias).data_ptr() != x.data_ptr() and torch.equal(x, copy)
    out = ops.bias_elu(x, bias, overwrite=True)
    assert out.data_ptr() == x.data_ptr() and torch.equal(out, x)
    assert out.is_contiguous(memory_format=LAYOUTS[layout])


def test_nothing_beside_x_is_overwritten(triton_only):
    memory = torch.full((2 * GUARD + 105,), math.nan, dtype=torch.float64, device=DEVICE)
    x = memory[GUARD:-GUARD].view(1, 3, 7, 5).copy_(make(1, 3, 7, 5))
    ops.bias_elu(x, make(3), overwrite=True)
    assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all()
    assert not x.isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_written_whole_and_nothing_beside_them(triton_only, layout, monkeypatch):
    monkeypatch.setattr(ops, "NUMBERS", 32)
    with guarded_memory(monkeypatch) as buffers:
        check(make(2, 3, 7, 5, layout=layout), make(3))
    assert len(buffers) == 3  # the result, the gradient of x, partial sums of that of the bias


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_values(backend, dtype):
    values = [1e4, -1e4, 88.0, -88.0, -104.0, 0.0, math.inf, -math.inf]
    values += [s * 10.0**-e for e in range(1, 30) for s in (1, -1)]
    values += [-0.125, -0.1249, -0.126, -1e-3, -0.69]
    x = torch.tensor(values, dtype=torch.float64, device=DEVICE).to(dtype).reshape(1, 1, 1, -1)
    zero = torch.zeros(1, dtype=dtype, device=DEVICE)
    check(x, zero, cotangent=torch.ones_like(x).where(x.isfinite(), 0))
    out = ops.bias_elu(x, zero)
    assert out[..., 6] == math.inf and out[..., 7] == -1
    assert ops.bias_elu(x * math.nan, zero).isnan().all()


@pytest.mark.parametrize("overwrite", [False, True])
def test_gradcheck(backend, overwrite):
    x, bias = make(1, 2, 1, 2).requires_grad_(), make(2).requires_grad_()
    torch.autograd.gradcheck(lambda x, b: ops.bias_elu(x.clone(), b, overwrite), (x, bias))


@pytest.mark.parametrize("overwrite", [False, True])
def test_backward_twice(backend, overwrite):
    x, bias = make(2, 3, 5, 4).requires_grad_(), make(3).requires_grad_()
    out, cotangent = ops.bias_elu(1 * x, bias, overwrite), make(2, 3, 5, 4, seed=1)
    first = torch.autograd.grad(out, (x, bias), cotangent, retain_graph=True)
    second = torch.autograd.grad(out, (x, bias), cotangent)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_leaf_is_not_overwritten(backend):
    with pytest.raises(RuntimeError, match="leaf"):
        ops.bias_elu(make(2, 3, 5, 4).requires_grad_(), make(3), overwrite=True)


def test_a_later_change_of_the_result_is_seen(backend):
    x, bias = make(2, 3, 5, 4).requires_grad_(), make(3)
    out = ops.bias_elu(1 * x, bias, overwrite=True)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("by", ["x", "cotangent"])
def test_second_derivative_raises(triton_only, by, overwrite):
    x, bias = make(1, 2, 1, 3).requires_grad_(), make(2).requires_grad_()
    out = ops.bias_elu(1 * x, bias, overwrite)
    cotangent = torch.ones_like(out, requires_grad=by == "cotangent")
    (gradient,) = torch.autograd.grad(out, x, cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (x.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_are_well_defined(triton_only, layout):
    x = make(2, 3, 2, 4, layout=layout).requires_grad_()
    torch.library.opcheck(ops._bias_elu, (x, make(3).requires_grad_()))
    torch.library.opcheck(ops._bias_elu_backward, (x.detach(), x.detach()))


@pytest.mark.parametrize("overwrite", [False, True])
def test_torch_compile_sees_through(backend, overwrite):
    x, bias = make(2, 3, 5, 4).requires_grad_(), make(3).requires_grad_()

    def function(x, bias):
        return ops.bias_elu(2 * x, bias, overwrite).square()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, bias), function(x, bias))
    gradients = torch.autograd.grad(compiled(x, bias).sum(), (x, bias))
    expected = torch.autograd.grad(function(x, bias).sum(), (x, bias))
    torch.testing.assert_close(gradients, expected)


def test_conv_elu_is_a_convolution_and_an_elu(backend):
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1).to(DEVICE, torch.float64)
    x = make(2, 3, 7, 6, layout="channels_last").requires_grad_()
    out = ops.conv_elu(x, conv.weight, conv.bias, stride=2, padding=1)
    expected = nn.functional.elu(conv(x))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    cotangent, sources = make(*out.shape, seed=1), (x, conv.weight, conv.bias)
    gradients = torch.autograd.grad(out, sources, cotangent)
    expected_gradients = torch.autograd.grad(expected, sources, cotangent)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-12)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(*[st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)]),
    order=st.permutations(range(4)),
    steps=st.tuples(*[st.integers(1, 2)] * 4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_drawn_shapes_strides_and_values(backend, shape, order, steps, dtype, scale):
    memory = make(*[shape[i] * steps[i] for i in order], dtype=dtype, scale=scale)
    x = memory.permute([order.index(i) for i in range(4)])
    x = x[tuple(slice(None, None, step) for step in steps)]
    check(x, make(shape[1], dtype=dtype, scale=scale, seed=2))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        ((3, 5, 4), (5,), "x must be"),
        ((2, 0, 5, 4), (0,), "O > 0"),
        ((2, 3, 5, 4), (4,), r"bias must be \(3,\)"),
        ((2, 3, 5, 4), (3, 1, 1), r"bias must be \(3,\)"),
    ],
)
def test_bad_shapes_are_refused_in_one_line(x, bias, message):
    with pytest.raises(ValueError, match=message) as error:
        ops.bias_elu(torch.zeros(x), torch.zeros(bias))
    assert "\n" not in str(error.value)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        ops.bias_elu(torch.zeros(2, 3, 5, 4, dtype=torch.int64), torch.zeros(3))


def test_no_images(backend):
    check(make(0, 3, 5, 4), make(3))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA device")
def test_same_bits_every_time(triton_only):
    x = make(224, 64, 64, 64, dtype=torch.float32, layout="channels_last").requires_grad_()
    bias, cotangent = make(64, dtype=torch.float32).requires_grad_(), torch.randn_like(x)
    outs = [ops.bias_elu(x, bias) for _ in range(3)]
    gradients = [torch.autograd.grad(out, (x, bias), cotangent) for out in outs]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert all(torch.equal(g, f) for gs in gradients for g, f in zip(gs, gradients[0], strict=True))
