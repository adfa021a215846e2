"""The first layer of a spatial broadcast decoder (Watters et al. 2019) without the broadcast.

The layer is a k x k convolution, zero-padded to keep the size, over [z at every pixel; fixed
coordinates], then an activation f. As z is the same at every pixel, its part of the output depends
only on which taps fall inside the image. For that there are k cases of rows, the k // 2 rows at
either edge and one for all rows between them, and k cases of columns. With S_r the taps that are
inside in case r, and exactly:

    out[n, :, i, j] = f(classes[n, r(i), s(j)] + response[:, i, j])
    classes[n, r, s] = Σ_{a ∈ S_r} Σ_{b ∈ S_s} W_z[:, :, a, b] z_n    one sum pooling, one product
    response = convolution of the coordinates alone, + bias           the same for every image

Backward, with g = ∂L/∂out f', and f' from the output (ELU: 1 where out > 0, else out + 1):

    d_classes[n, r, s] = Σ g[n, :, i, j] over the pixels of the case      d_response = Σ_n g[n]

From these two small tensors torch goes on to z, W and bias. Only `out` is kept. Sums are taken in
two stages and in a fixed order. A program adds up a tile of pixels over several images, which gives
parts of d_response, and for each image the pixels of the tile away from the border, which gives
parts of the one case that is large. A second kernel adds the latter up, and visits the border
pixels again for the other cases; torch adds up the former.

Bytes, in numbers per element of out: eager torch stretches classes over the image (1), adds (2) and
activates (2), and goes back in a pass (3) and two sums (2). The kernels write out (1) and go back
with one read of out and its cotangent (2, and a tenth to a half more for border and parts): 3 to
3.5 instead of 10. The convolution itself, which neither does, would be k² (D + C) products for each
element, a quarter or more of a decoder's.

Axes: N images, D latent, C coordinates, O channels, H W image, P = H·W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.bias_elu import activate, in_turn, through_activation
from kernels.launch import jit, launch, tl, triton
from kernels.mixture import refuse_second_derivative

ACTIVATIONS = {"elu": F.elu, "relu": F.relu, "none": lambda x, inplace=False: x}
NUMBERS = 2048  # of a tile: 16 for each thread, in backward 8. Tests raise it.
IMAGES = 16  # whose tile a program takes, at most: fewer reads of response, parts of its cotangent


def broadcast_conv_reference(
    z: Tensor, weight: Tensor, bias: Tensor, coordinates: Tensor, activation: str = "elu"
) -> Tensor:
    """`broadcast_conv` with the broadcast, in the fewest lines of torch."""
    maps = z[:, :, None, None].expand(-1, -1, *coordinates.shape[1:])  # (N, D, H, W)
    image = torch.cat([maps, coordinates.expand(len(z), -1, -1, -1)], 1)  # (N, D+C, H, W)
    return ACTIVATIONS[activation](F.conv2d(image, weight, bias, padding="same"))


def classes_and_response(
    z: Tensor, weight: Tensor, bias: Tensor, coordinates: Tensor
) -> tuple[Tensor, Tensor]:
    """The part of z in every case of rows and columns (N, k, k, O), and all the rest (O, H, W)."""
    kernel = weight.shape[-1]
    w_z, w_xy = weight.split([z.shape[1], len(coordinates)], 1)
    # The taps that are inside in case r lie k // 2 or less from tap k - 1 - r: hence the flip.
    w = F.avg_pool2d(w_z, kernel, 1, kernel // 2, divisor_override=1).flip(2, 3)  # (O, D, k, k)
    w = w.permute(1, 2, 3, 0)  # (D, k, k, O)
    classes = (z @ w.flatten(1)).unflatten(1, w.shape[1:])  # (N, k, k, O)
    response = F.conv2d(coordinates[None].to(w_xy), w_xy, bias, padding=kernel // 2)
    return classes, response[0]


def stretch(classes: Tensor, dim: int, size: int) -> Tensor:
    """From k cases to `size` rows or columns: those at the edges, and all others the middle one."""
    half = classes.shape[dim] // 2
    first, middle, last = classes.split([half, 1, half], dim)
    shape = list(classes.shape)
    shape[dim] = size - 2 * half
    return torch.cat([first, middle.expand(shape), last], dim)


def _broadcast_conv_torch(z, weight, bias, coordinates, activation, memory_format) -> Tensor:
    out, response = classes_and_response(z, weight, bias, coordinates)
    if memory_format == torch.channels_last:
        rows, response = 1, response.permute(1, 2, 0)  # (H, W, O)
    else:
        rows, out = 2, out.permute(0, 3, 1, 2).contiguous()  # (N, O, k, k)
    response = response.contiguous()
    if weight.shape[-1] == 1:
        out = out + response
    else:
        for dim, size in enumerate(coordinates.shape[1:], rows):
            out = stretch(out, dim, size)
        out.add_(response)
    out = ACTIVATIONS[activation](out, inplace=True)
    return out.permute(0, 3, 1, 2) if rows == 1 else out  # (N, O, H, W)


@jit
def _case(index, size, K: tl.constexpr):
    """The case, of K, that row (or column) `index` of `size` is."""
    half: tl.constexpr = K // 2
    return tl.minimum(index, half) + tl.maximum(index - size + half + 1, 0)


@jit
def _place(pixel, channel, num_pixels, NUM_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where a number lies in the memory of an image."""
    if CHANNELS_LAST:
        place = pixel.to(tl.int64) * NUM_CHANNELS + channel
    else:
        place = channel.to(tl.int64) * num_pixels + pixel
    return place


@jit
def _tile(
    tile,
    height,
    width,
    K: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Of the (BLOCK_P, BLOCK_O) numbers of a tile: pixel, channel, case, place in an image."""
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = tl.arange(0, BLOCK_O)[None, :]
    case = _case(pixel // width, height, K) * K + _case(pixel % width, width, K)
    where = _place(pixel, channel, height * width, NUM_CHANNELS, CHANNELS_LAST)
    return pixel, channel, case, where


@jit
def _forward_kernel(
    classes,  # (N, K, K, O): the part of z in every case
    response,  # (H, W, O) channels-last, (O, H, W) planes: the part that all images share
    out,  # (N, O, H, W), channels-last or planes
    num_images,
    height,
    width,
    num_tiles,  # of an image
    K: tl.constexpr,  # the convolution's kernel
    ACTIVATION: tl.constexpr,
    FLOAT: tl.constexpr,  # the type of the arithmetic
    IMAGES: tl.constexpr,  # of a program
    NUM_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tile, group = tl.program_id(0) % num_tiles, (tl.program_id(0) // num_tiles).to(tl.int64)
    pixel, channel, case, where = _tile(
        tile, height, width, K, NUM_CHANNELS, CHANNELS_LAST, BLOCK_P, BLOCK_O
    )
    inside = (pixel < height * width) & (channel < NUM_CHANNELS)
    shared = tl.load(response + where, mask=inside, other=0).to(FLOAT)
    offset = case * NUM_CHANNELS + channel
    for i in range(IMAGES):
        image = group * IMAGES + i
        num_pixels = tl.where(image < num_images, height * width, 0)  # none of an image too many
        exists = (pixel < num_pixels) & (channel < NUM_CHANNELS)
        own = classes + image * (K * K * NUM_CHANNELS) + offset
        value = tl.load(own, mask=exists, other=0).to(FLOAT) + shared
        value = activate(value, ACTIVATION)
        tl.store(out + image * height * width * NUM_CHANNELS + where, value, mask=exists)


@jit
def _backward_kernel(
    gradient,  # (N, O, H, W) in the layout of out: its cotangent
    out,  # (N, O, H, W), channels-last or planes: what forward returned
    responses,  # (groups of images, P * O) in the layout of response: parts of its cotangent
    middles,  # (N, tiles, O): parts of the cotangent of the middle case
    num_images,
    height,
    width,
    num_tiles,  # of an image
    K: tl.constexpr,  # the convolution's kernel
    ACTIVATION: tl.constexpr,
    FLOAT: tl.constexpr,  # the type of the arithmetic
    IMAGES: tl.constexpr,  # of a program
    NUM_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tile, group = tl.program_id(0) % num_tiles, (tl.program_id(0) // num_tiles).to(tl.int64)
    pixel, channel, case, where = _tile(
        tile, height, width, K, NUM_CHANNELS, CHANNELS_LAST, BLOCK_P, BLOCK_O
    )
    total = tl.zeros([BLOCK_P, BLOCK_O], FLOAT)
    for i in range(IMAGES):
        image = group * IMAGES + i
        num_pixels = tl.where(image < num_images, height * width, 0)  # none of an image too many
        exists = (pixel < num_pixels) & (channel < NUM_CHANNELS)
        start = image * height * width * NUM_CHANNELS
        cotangent = tl.load(gradient + start + where, mask=exists, other=0).to(FLOAT)
        value = tl.load(out + start + where, mask=exists, other=0).to(FLOAT)
        cotangent = through_activation(cotangent, value, ACTIVATION)
        total += cotangent
        middle = tl.sum(tl.where(case == K * K // 2, cotangent, 0.0), 0)[None, :]
        num_channels = tl.where(image < num_images, NUM_CHANNELS, 0)
        place = middles + (image * num_tiles + tile) * NUM_CHANNELS + channel
        tl.store(place, middle, mask=channel < num_channels)
    inside = (pixel < height * width) & (channel < NUM_CHANNELS)
    tl.store(responses + group * height * width * NUM_CHANNELS + where, total, mask=inside)


@jit
def _classes_kernel(
    gradient,  # (N, O, H, W) in the layout of out: its cotangent
    out,  # (N, O, H, W), channels-last or planes: what forward returned
    middles,  # (N, tiles, O): parts of the cotangent of the middle case
    d_classes,  # (N, K, K, O): the cotangent of classes
    height,
    width,
    num_tiles,  # of an image
    K: tl.constexpr,  # the convolution's kernel
    ACTIVATION: tl.constexpr,
    FLOAT: tl.constexpr,  # the type of the arithmetic
    MIDDLE_ROUNDS: tl.constexpr,  # of BLOCK_P tiles
    BORDER_ROUNDS: tl.constexpr,  # of BLOCK_P pixels
    NUM_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    half: tl.constexpr = K // 2
    image, case = (tl.program_id(0) // (K * K)).to(tl.int64), tl.program_id(0) % (K * K)
    row, column = case // K, case % K
    number = tl.arange(0, BLOCK_P)[:, None]
    channel = tl.arange(0, BLOCK_O)[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_O], FLOAT)
    if case == K * K // 2:
        middles += image * num_tiles * NUM_CHANNELS
        for i in range(MIDDLE_ROUNDS):
            part = i * BLOCK_P + number
            inside = (part < num_tiles) & (channel < NUM_CHANNELS)
            total += tl.load(middles + part * NUM_CHANNELS + channel, mask=inside, other=0)
    else:  # the pixels of any other case lie on a line: part of a row or column, or one corner
        first_row = tl.where(row <= half, row, height - K + row)
        first_column = tl.where(column <= half, column, width - K + column)
        step = tl.where(row == half, width, 1)
        length = tl.where(row == half, height, tl.where(column == half, width, K)) - 2 * half
        gradient += image * height * width * NUM_CHANNELS
        out += image * height * width * NUM_CHANNELS
        for i in range(BORDER_ROUNDS):
            place_in_line = i * BLOCK_P + number
            pixel = first_row * width + first_column + place_in_line * step
            inside = (place_in_line < length) & (channel < NUM_CHANNELS)
            where = _place(pixel, channel, height * width, NUM_CHANNELS, CHANNELS_LAST)
            cotangent = tl.load(gradient + where, mask=inside, other=0).to(FLOAT)
            value = tl.load(out + where, mask=inside, other=0).to(FLOAT)
            total += through_activation(cotangent, value, ACTIVATION)
    total = tl.sum(total, 0)[None, :]
    d_classes += tl.program_id(0).to(tl.int64) * NUM_CHANNELS + channel
    tl.store(d_classes, total, mask=channel < NUM_CHANNELS)


def _constants(out: Tensor, kernel: int, activation: str, channels_last: bool) -> dict:
    """What all three kernels take by keyword."""
    block_o = triton.next_power_of_2(out.shape[1])
    numbers = NUMBERS if channels_last else NUMBERS // 2  # more addresses, more registers
    return dict(
        K=kernel,
        ACTIVATION=activation,
        FLOAT=tl.float64 if out.dtype == torch.float64 else tl.float32,
        NUM_CHANNELS=out.shape[1],
        CHANNELS_LAST=channels_last,
        BLOCK_P=max(1, numbers // block_o),
        BLOCK_O=block_o,
    )


@torch.library.custom_op("slot_kernels::broadcast_conv", mutates_args=())
def _broadcast_conv(
    classes: Tensor, response: Tensor, activation: str, channels_last: bool
) -> Tensor:
    out = _empty_out(classes, response, activation, channels_last)
    images, _, height, width = out.shape
    if channels_last:
        response = response.permute(1, 2, 0)
    constants = _constants(out, classes.shape[1], activation, channels_last)
    tiles = triton.cdiv(height * width, constants["BLOCK_P"])
    images_each = in_turn(tiles * images, min(IMAGES, images))
    launch(
        _forward_kernel, (tiles * triton.cdiv(images, images_each),), classes.contiguous(),
        response.contiguous(), out, images, height, width, tiles, IMAGES=images_each, **constants,
    )  # fmt: skip
    return out


@_broadcast_conv.register_fake
def _empty_out(classes: Tensor, response: Tensor, activation: str, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (len(classes), *response.shape)
    return torch.empty(shape, dtype=classes.dtype, device=classes.device, memory_format=layout)


@torch.library.custom_op("slot_kernels::broadcast_conv_backward", mutates_args=())
def _broadcast_conv_backward(
    gradient: Tensor, out: Tensor, kernel: int, activation: str, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """The cotangents of classes, in the type of out, and of response, in that of the arithmetic."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    gradient = gradient.contiguous(memory_format=layout)
    out = out.contiguous(memory_format=layout)  # as it is, unless a compiler has changed it
    images, channels, height, width = out.shape
    constants = _constants(out, kernel, activation, channels_last)
    block = constants["BLOCK_P"]
    tiles = triton.cdiv(height * width, block)
    images_each = in_turn(tiles * images, min(IMAGES, images))
    groups = triton.cdiv(images, images_each)
    wide = dict(dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
    shape = (height, width, channels) if channels_last else (channels, height, width)
    responses = torch.empty(groups, *shape, **wide)
    middles = torch.empty(images, tiles, channels, **wide)
    d_classes = torch.empty(images, kernel, kernel, channels, dtype=out.dtype, device=out.device)
    launch(
        _backward_kernel, (tiles * groups,), gradient, out, responses, middles,
        images, height, width, tiles, IMAGES=images_each, num_warps=8, **constants,
    )  # fmt: skip
    launch(
        _classes_kernel, (images * kernel**2,), gradient, out, middles, d_classes,
        height, width, tiles, MIDDLE_ROUNDS=triton.cdiv(tiles, block),
        BORDER_ROUNDS=triton.cdiv(max(height, width), block), num_warps=8, **constants,
    )  # fmt: skip
    d_response = responses.sum(0)
    return d_classes, d_response.permute(2, 0, 1) if channels_last else d_response


@_broadcast_conv_backward.register_fake
def _(gradient: Tensor, out: Tensor, kernel: int, activation: str, channels_last: bool):
    images, channels, height, width = out.shape
    wide = dict(dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
    d_classes = out.new_empty(images, kernel, kernel, channels)
    if channels_last:
        return d_classes, torch.empty(height, width, channels, **wide).permute(2, 0, 1)
    return d_classes, torch.empty(channels, height, width, **wide)


def _setup_context(ctx, inputs, output) -> None:
    classes, response, ctx.activation, ctx.channels_last = inputs
    ctx.kernel, ctx.response_dtype = classes.shape[1], response.dtype
    ctx.save_for_backward(output)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
    d_classes, d_response = _broadcast_conv_backward(
        gradient, *ctx.saved_tensors, ctx.kernel, ctx.activation, ctx.channels_last
    )
    return d_classes, d_response.to(ctx.response_dtype), None, None


_broadcast_conv.register_autograd(_backward, setup_context=_setup_context)
_broadcast_conv_backward.register_autograd(refuse_second_derivative)


def _broadcast_conv_triton(z, weight, bias, coordinates, activation, memory_format) -> Tensor:
    parts = classes_and_response(z, weight, bias, coordinates)
    return _broadcast_conv(*parts, activation, memory_format == torch.channels_last)


if triton is not None:
    kernels.TRITON["broadcast_conv"] = _broadcast_conv_triton


def broadcast_conv(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    coordinates: Tensor,
    activation: str = "elu",
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """A convolution over [z at every pixel; coordinates] and its activation, without that image.

    z (N, D), weight (O, D+C, k, k) with odd k, bias (O,), coordinates (C, H, W) with H and W at
    least k - 1 -> (N, O, H, W) in the memory format that the next layer wants. activation: elu,
    relu or none. Equals nn.Conv2d(D+C, O, k, padding=k // 2) up to rounding, of which it has less.
    Differentiable in all four tensors; under Triton, once. Raises ValueError for what does not fit.
    """
    _check(z, weight, bias, coordinates, activation, memory_format)
    arguments = (z, weight, bias, coordinates, activation, memory_format)
    if kernels.backend(z, "broadcast_conv") == "triton":
        return kernels.TRITON["broadcast_conv"](*arguments)
    return _broadcast_conv_torch(*arguments)


def _check(z, weight, bias, coordinates, activation, memory_format) -> None:
    """Refuse what has no meaning."""
    if z.ndim != 2 or coordinates.ndim != 3:
        raise ValueError(
            f"z must be (N, D) and coordinates (C, H, W), "
            f"not {tuple(z.shape)} and {tuple(coordinates.shape)}"
        )
    outputs, kernel, inputs = len(weight), weight.shape[-1], z.shape[1] + len(coordinates)
    if weight.shape != (outputs, inputs, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(
            f"weight must be (O, {inputs}, k, k) with an odd k for this z and these coordinates, "
            f"not {tuple(weight.shape)}"
        )
    if bias.shape != (outputs,):
        raise ValueError(f"bias must be ({outputs},) for this weight, not {tuple(bias.shape)}")
    height, width = coordinates.shape[1:]
    if min(height, width) < max(1, kernel - 1):  # then there are more cases than k²
        raise ValueError(f"kernel {kernel} is too large for images of {height}x{width} pixels")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be elu, relu or none, not {activation!r}")
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(f"memory_format must be channels_last or contiguous, not {memory_format}")
