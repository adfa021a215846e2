"""The operations of kernels/ as ports of the models write them, in nothing but torch.

Each takes what the public operation of the same name takes. torch.distributions for the density,
autograd for the gradients, a loop over slots for leave-one-out, layer_norm and cat, a convolution
over z at every pixel. The benchmark times them, and in float64 they are the truth that it compares
everything with: they share no line with the operations. Below them: inputs, calls and bytes.

Axes: B batch, K slots, C H W image, N = B K, D latent, O channels, F input channels of refinement.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def masks(logits: Tensor) -> Tensor:
    """(B, K, H, W) to the same shape."""
    return logits.softmax(1)


def log_densities(image: Tensor, decoded: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Mask logits and log N(image; means, sigma), both (B, K, H, W), in float32 at least."""
    wide = decoded.to(torch.promote_types(decoded.dtype, torch.float32))
    means, logits = wide[:, :, :-1], wide[:, :, -1]
    return logits, torch.distributions.Normal(means, sigma).log_prob(image[:, None]).sum(2)


def mixture_log_likelihood(image: Tensor, decoded: Tensor, sigma: float) -> Tensor:
    """(B, C, H, W), (B, K, C+1, H, W) to (B, H, W), nats."""
    logits, log_density = log_densities(image, decoded, sigma)
    return (logits.log_softmax(1) + log_density).logsumexp(1)


def leave_one_out(image: Tensor, decoded: Tensor, sigma: float) -> Tensor:
    """The log-likelihood of the other slots alone (B, K, H, W), their masks normalised again."""
    logits, log_density = log_densities(image, decoded, sigma)
    slots = range(decoded.shape[1])
    others = [[j for j in slots if j != k] for k in slots]
    terms = [logits[:, o].log_softmax(1) + log_density[:, o] for o in others]
    return torch.stack([t.logsumexp(1) for t in terms], 1)


def refinement_inputs(
    image: Tensor, decoded: Tensor, norm_weight: Tensor, norm_bias: Tensor, coordinates: Tensor,
    sigma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed inputs (B, K, F, H, W), log-likelihood (B, H, W), gradient of decoded, as decoded."""
    with torch.enable_grad():
        leaf = decoded if decoded.requires_grad else decoded.detach().requires_grad_()
        log_likelihood = mixture_log_likelihood(image, leaf, sigma)
        (gradient,) = torch.autograd.grad(-log_likelihood.sum(), leaf, retain_graph=True)
    logits, log_density = log_densities(image, decoded, sigma)
    shape = (*decoded.shape[:2], -1, -1, -1)
    stopped = (
        gradient[:, :, :-1].to(norm_weight), gradient[:, :, -1:].to(norm_weight),
        log_likelihood.detach()[:, None, None].expand(*shape),
        leave_one_out(image, decoded.detach(), sigma)[:, :, None],
    )
    normalised = torch.cat([F.layer_norm(value, value.shape[2:]) for value in stopped], 2)
    packed = torch.cat(
        [image[:, None].expand(*shape), decoded[:, :, :-1], logits.softmax(1)[:, :, None],
         decoded[:, :, -1:], log_density.softmax(1)[:, :, None],
         normalised * norm_weight[:, None, None] + norm_bias[:, None, None],
         coordinates.expand(*shape)], 2,
    )  # (B, K, F, H, W)
    return packed, log_likelihood, gradient


def broadcast_conv(z: Tensor, weight: Tensor, response: Tensor) -> Tensor:
    """(N, D), (O, D, k, k), (O, H, W) to (N, O, H, W)."""
    image = z[:, :, None, None].expand(-1, -1, *response.shape[1:])  # (N, D, H, W)
    return F.conv2d(image, weight, padding="same") + response


GRADIENTS = {  # name: which inputs have a gradient
    "masks": slice(0, 1),
    "mixture_log_likelihood": slice(1, 2),
    "leave_one_out": slice(0, 0),
    "refinement_inputs": slice(1, 4),
    "broadcast_conv": slice(0, 3),
}
SIGMA = 0.1


def make_inputs(
    op: str, batch: int, slots: int, side: int, latent: int, outputs: int, kernel: int
) -> list[Any]:
    """What the op takes; images of slots in channels-last memory, as decoders give them."""
    draw = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=draw)
    if op == "broadcast_conv":
        weight = normal(outputs, latent, kernel, kernel) / (math.sqrt(latent) * kernel)
        return [normal(batch * slots, latent), weight, normal(outputs, side, side)]
    decoded = normal(batch, slots, side, side, 4)
    decoded[..., :3].mul_(0.25).add_(0.5)
    decoded = decoded.movedim(-1, 2)  # (B, K, C+1, H, W)
    if op == "masks":
        return [decoded[:, :, -1]]
    affine = [1 + 0.1 * normal(6), 0.1 * normal(6), normal(2, side, side)]
    more = affine if op == "refinement_inputs" else []
    return [torch.rand(batch, 3, side, side, generator=draw), decoded, *more, SIGMA]


def make_call(op: str, function: Callable, inputs: list[Any], backward: bool) -> Callable:
    """A call that gives the outputs and, with `backward`, their cotangents and the gradients."""
    arguments, cotangents = list(inputs), []
    leaves = [tensor.detach().requires_grad_(backward) for tensor in inputs[GRADIENTS[op]]]
    arguments[GRADIENTS[op]] = leaves

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            outputs = function(*arguments)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        ends, gradients = [output for output in outputs if output.requires_grad], ()
        if backward:
            if not cotangents:  # always the same numbers, each in the memory layout of its output
                draw = torch.Generator().manual_seed(1)
                for end in ends:
                    random = torch.randn(end.shape, generator=draw)
                    cotangents.append(torch.empty_like(end).copy_(random))
            gradients = torch.autograd.grad(ends, leaves, cotangents)
        return [*(output.detach() for output in outputs), *cotangents, *gradients]

    return call


def num_bytes(values: Sequence[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def perfect_bytes(inputs: list[Any], results: list[Tensor], backward: bool) -> int:
    """Inputs (backward reads them again), outputs, cotangents and gradients, once each."""
    return num_bytes(inputs) * (1 + backward) + num_bytes(results)


def bytes_moved(op: str, batch: int, *shape: int, backward: bool) -> tuple[int, int]:
    """Of forward or of backward alone: by a perfect kernel, and by the operation above."""
    inputs, moved = make_inputs(op, 1, *shape), []
    for both in (False, True)[: 1 + backward]:
        call = make_call(op, globals()[op], inputs, both)
        results = call()  # the first call makes the cotangents
        with Traffic() as traffic:
            call()
        moved.append((batch * perfect_bytes(inputs, results, both), batch * traffic.num_bytes))
    (perfect, eager), *forward = reversed(moved)
    return (perfect - forward[0][0], eager - forward[0][1]) if forward else (perfect, eager)


class Traffic(TorchDispatchMode):
    """Adds up the bytes that every torch operation reads and writes; views move nothing."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if not function.is_view:
            every = {id(t): t for t in tree_leaves((arguments, options, result))}.values()
            for t in filter(torch.is_tensor, every):  # stride 0: the same number again
                sizes = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
                self.num_bytes += math.prod(sizes) * t.element_size()
        return result
