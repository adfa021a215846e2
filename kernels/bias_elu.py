"""Bias and ELU in one pass, for the bias-free output of a convolution.

    y = elu(x + b),   elu(v) = v for v > 0, exp(v) − 1 else
    backward, from the output:   elu' = 1 for y > 0, y + 1 else;   dx = dy elu',   db = Σ dx

Only y is kept for backward, and it may lie where x was. db is summed in two stages, in a fixed
order: each program over its pixels, then torch over the programs.

Bytes, in numbers per element of x. On CUDA a convolution with a bias adds it in a pass of its own
(2), and nn.ELU(inplace=True) is another (2); backward through them is a pass of three and, for the
bias, one that reads dx again (1). Here 2 forward and 3 backward: 5 instead of 8. At 128x128 pixels,
B·K = 224, O = 64 in float32 that saves 2.8 of 7.5 GB for every layer and decode. On a CPU the
convolution adds the bias itself, for nothing: there, use it.

Axes: N images, O channels, H W image, P = H·W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.launch import jit, launch, tl, triton
from kernels.masks import exp
from kernels.mixture import refuse_second_derivative

NUMBERS = 2048  # of a tile: 16 for each thread, in backward 8. Tests raise it.
TILES = 16  # of a program in backward, at most: fewer partial sums
PROGRAMS = 512  # at least, before programs get several tiles: 4 for each of 132 processors


def bias_elu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_elu` in one line of torch."""
    return F.elu(x + bias.to(x.dtype)[:, None, None])


@jit
def activate(x, ACTIVATION: tl.constexpr):
    """elu, relu or none."""
    if ACTIVATION == "elu":
        below = exp(x) - 1
        if x.dtype != tl.float64:  # near 0 all digits cancel, and five terms of the series do
            series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120)))))
            below = tl.where(x > -0.125, series, below)
        x = tl.where(x > 0, x, below)
    if ACTIVATION == "relu":
        x = tl.where(x <= 0, 0.0, x)
    return x


@jit
def through_activation(gradient, out, ACTIVATION: tl.constexpr):
    """From the cotangent of the output `out` of `activate` to that of its input."""
    if ACTIVATION == "elu":
        gradient = tl.where(out > 0, gradient, gradient * (out + 1))
    if ACTIVATION == "relu":
        gradient = tl.where(out <= 0, 0.0, gradient)
    return gradient


@jit
def _tile(
    plane,
    tile,
    num_pixels,
    NUM_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Where a tile starts in memory; of its (BLOCK_P, BLOCK_O) numbers: place, channel, mask."""
    start = tile.to(tl.int64) * BLOCK_P
    pixel = tl.arange(0, BLOCK_P)[:, None]
    channel = tl.arange(0, BLOCK_O)[None, :]
    left = tl.minimum(num_pixels - start, BLOCK_P).to(tl.int32)
    inside = (pixel < left) & (channel < NUM_CHANNELS)
    if CHANNELS_LAST:  # one plane: all pixels of all images, with their channels
        return start * NUM_CHANNELS, pixel * NUM_CHANNELS + channel, channel, inside
    else:  # a plane is one channel of one image, and BLOCK_O is 1
        first = plane * num_pixels + start
        return first, pixel, channel + (plane % NUM_CHANNELS).to(tl.int32), inside


@jit
def _forward_kernel(
    x,  # (N, O, H, W), channels-last or planes
    bias,  # (O,)
    out,  # (N, O, H, W) in the layout of x, or x itself
    num_pixels,  # of a plane
    num_tiles,  # of a plane
    FLOAT: tl.constexpr,  # the type of the arithmetic
    NUM_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    plane, tile = tl.program_id(0).to(tl.int64) // num_tiles, tl.program_id(0) % num_tiles
    start, place, channel, inside = _tile(
        plane, tile, num_pixels, NUM_CHANNELS, CHANNELS_LAST, BLOCK_P, BLOCK_O
    )
    shift = tl.load(bias + channel, mask=channel < NUM_CHANNELS, other=0).to(FLOAT)
    value = tl.load(x + start + place, mask=inside, other=0).to(FLOAT)
    tl.store(out + start + place, activate(value + shift, "elu"), mask=inside)


@jit
def _backward_kernel(
    gradient,  # (N, O, H, W) in the layout of out: the cotangent of out
    out,  # (N, O, H, W), channels-last or planes: what forward returned
    d_x,  # (N, O, H, W) in the layout of out: the cotangent of x
    parts,  # (groups, O), of planes (N * groups, O): sums of d_x over the pixels of a program
    num_pixels,  # of a plane
    num_groups,  # of tiles of a plane, one for each program
    TILES: tl.constexpr,  # of a group
    FLOAT: tl.constexpr,  # the type of the arithmetic
    NUM_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    plane, group = tl.program_id(0).to(tl.int64) // num_groups, tl.program_id(0) % num_groups
    total = tl.zeros([BLOCK_P, BLOCK_O], FLOAT)
    for i in range(TILES):
        start, place, _channel, inside = _tile(
            plane, group * TILES + i, num_pixels, NUM_CHANNELS, CHANNELS_LAST, BLOCK_P, BLOCK_O
        )
        cotangent = tl.load(gradient + start + place, mask=inside, other=0).to(FLOAT)
        value = tl.load(out + start + place, mask=inside, other=0).to(FLOAT)
        cotangent = through_activation(cotangent, value, "elu")
        tl.store(d_x + start + place, cotangent, mask=inside)
        total += cotangent
    _start, _place, channel, _inside = _tile(
        plane, group, num_pixels, NUM_CHANNELS, CHANNELS_LAST, BLOCK_P, BLOCK_O
    )
    row = plane // NUM_CHANNELS * num_groups + group
    total = tl.sum(total, 0)[None, :]
    tl.store(parts + row * NUM_CHANNELS + channel, total, mask=channel < NUM_CHANNELS)


def in_turn(num_tiles: int, most: int) -> int:
    """How many tiles a program should take, one after the other: a power of two, `most` or less."""
    tiles = 1
    while 2 * tiles <= most and triton.cdiv(num_tiles, 2 * tiles) >= PROGRAMS:
        tiles *= 2
    return tiles


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of x, or the one to copy it to."""
    if x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _plan(x: Tensor) -> tuple[int, int, dict]:
    """Planes, pixels of each and the constants of the kernels, for tensors in the layout of x."""
    images, channels, height, width = x.shape
    block_o, planes, pixels = triton.next_power_of_2(channels), 1, images * height * width
    channels_last = _layout(x) == torch.channels_last
    if not channels_last:
        block_o, planes, pixels = 1, images * channels, height * width
    constants = dict(
        FLOAT=tl.float64 if x.dtype == torch.float64 else tl.float32,
        NUM_CHANNELS=channels,
        CHANNELS_LAST=channels_last,
        BLOCK_P=max(1, NUMBERS // block_o),
        BLOCK_O=block_o,
    )
    return planes, pixels, constants


def _launch_forward(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """out may be x."""
    planes, pixels, constants = _plan(out)
    tiles = triton.cdiv(pixels, constants["BLOCK_P"])
    launch(_forward_kernel, (planes * tiles,), x, bias, out, pixels, tiles, **constants)


@torch.library.custom_op("slot_kernels::bias_elu", mutates_args=())
def _bias_elu(x: Tensor, bias: Tensor) -> Tensor:
    out = _empty(x)
    _launch_forward(x.contiguous(memory_format=_layout(x)), bias.contiguous(), out)
    return out


@torch.library.custom_op("slot_kernels::bias_elu_backward", mutates_args=())
def _bias_elu_backward(gradient: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    layout = _layout(out)
    gradient, out = gradient.contiguous(memory_format=layout), out.contiguous(memory_format=layout)
    planes, pixels, constants = _plan(out)
    tiles = triton.cdiv(pixels, constants["BLOCK_P"])
    in_a_group = in_turn(planes * tiles, min(TILES, tiles))
    groups = triton.cdiv(tiles, in_a_group)
    rows = groups if constants["CHANNELS_LAST"] else groups * out.shape[0]
    wide = torch.promote_types(out.dtype, torch.float32)
    parts = torch.empty(rows, out.shape[1], dtype=wide, device=out.device)
    d_x = _empty(out)
    launch(
        _backward_kernel, (planes * groups,), gradient, out, d_x, parts, pixels, groups,
        TILES=in_a_group, num_warps=8, **constants,
    )  # fmt: skip
    return d_x, parts.sum(0)


@_bias_elu.register_fake
def _empty(like: Tensor, *_) -> Tensor:
    return torch.empty(
        like.shape, dtype=like.dtype, device=like.device, memory_format=_layout(like)
    )


@_bias_elu_backward.register_fake
def _(gradient: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(out.dtype, torch.float32)
    return _empty(out), torch.empty(out.shape[1], dtype=wide, device=out.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output)
    ctx.bias_dtype = inputs[1].dtype


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    d_x, d_bias = _bias_elu_backward(gradient, *ctx.saved_tensors)
    return d_x, d_bias.to(ctx.bias_dtype)


_bias_elu.register_autograd(_backward, setup_context=_setup_context)
_bias_elu_backward.register_autograd(refuse_second_derivative)


class _Overwrite(torch.autograd.Function):
    """The same in the memory of x."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:
        _launch_forward(x, bias.contiguous(), x)
        ctx.mark_dirty(x)
        _setup_context(ctx, (x, bias), x)
        return x

    backward = staticmethod(_backward)


def _bias_elu_triton(x: Tensor, bias: Tensor, overwrite: bool = False) -> Tensor:
    # A compiler decides itself what to keep and what to overwrite.
    if overwrite and not torch.compiler.is_compiling():
        return _Overwrite.apply(x, bias)
    return _bias_elu(x, bias)


if triton is not None:
    kernels.TRITON["bias_elu"] = _bias_elu_triton


def bias_elu(x: Tensor, bias: Tensor, overwrite: bool = False) -> Tensor:
    """elu(x + bias) of x (N, O, H, W) and bias (O,), of the same shape and type as x.

    Channels-last stays channels-last and planes stay planes; any other layout is copied to the
    former. bfloat16 and float16 are computed in float32. Differentiable; under Triton, once.
    overwrite: the result may take the memory of x, which nobody else needs (a convolution's output,
    say). Raises ValueError for shapes that do not fit and for integers.
    """
    if x.ndim != 4 or x.shape[1] == 0:
        raise ValueError(f"x must be (N, O, H, W) with O > 0, not {tuple(x.shape)}")
    if bias.shape != x.shape[1:2]:
        raise ValueError(f"bias must be ({x.shape[1]},) for this x, not {tuple(bias.shape)}")
    if not (x.is_floating_point() and bias.is_floating_point()):
        raise ValueError(f"x and bias must be floating point, not {x.dtype} and {bias.dtype}")
    overwrite = overwrite and x.is_contiguous(memory_format=_layout(x))
    if kernels.backend(x, "bias_elu") == "triton":
        return kernels.TRITON["bias_elu"](x, bias, overwrite)
    shift = bias.to(x.dtype)[:, None, None]
    return F.elu(x.add_(shift) if overwrite else x + shift, inplace=True)


def conv_elu(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """elu(conv2d(x, weight, bias)), with `bias_elu` where that saves bytes, as said above."""
    if kernels.backend(x, "bias_elu") == "triton":
        return bias_elu(F.conv2d(x, weight, None, stride, padding), bias, overwrite=True)
    return F.elu(F.conv2d(x, weight, bias, stride, padding), inplace=True)
