# ruff: noqa: RUF005 (Triton has no (*tuple, value))
"""The spatial mixture likelihood of slot models: one mixture per pixel (Greff et al. 2019, eq. 1).

The colours x_c of a pixel, explained by K slots with mask logits a_k and means μ_kc:

    m_k  = softmax_k(a_k)                                  masks
    N_k  = Π_c N(x_c; μ_kc, σ²)                            one density per slot, colours multiplied
    log p(x|z)     = log Σ_k m_k N_k                       the mixture is over whole pixels
    r_k            = m_k N_k / Σ_j m_j N_j                 responsibilities
    P_k            = N_k / (Σ_j N_j + ε)                   posterior masks: no mask prior in them
    log p(x|z∖k)   = log Σ_{j≠k} m_j N_j / Σ_{j≠k} m_j     leave-one-out: the other masks sum to 1

The gradient has a closed form, so that none of it needs automatic differentiation:

    ∂(−log p)/∂μ_kc = −r_k s_kc,   s_kc = (x_c−μ_kc)/σ²               Gaussian, standard deviation σ
                                   s_kc = tanh((x_c−μ_kc)/2σ)/σ       logistic, scale σ
    ∂(−log p)/∂a_k  = m_k − r_k

Everything stays in log space: in float32 every N_k underflows once a colour is 1.3 away at σ = 0.1.
The gradient is that of the mask *logit*, which lies in [−1, 1]; with respect to the mask it is
−N_k/Σ_j m_j N_j, which overflows for small masks.

Bytes, in numbers per pixel for C = 3. Eager torch is counted by operation, its inputs and outputs:

                                 fused reads    writes     eager moves    at K = 7
    mixture                      3 + 4K         1 + 8K     83K − 32       6 times as much
    mixture_log_likelihood       3 + 4K         1          79K + 13       18 times
      its backward               4 + 4K         4K         73K + 2        9 times

On large images that is the speed-up to expect, as the arithmetic fits in the time of the transfers
(some 250 instructions for a slot of a pixel). On small ones the count of kernels matters more: one
instead of 19 to 49. Backward saves nothing but the inputs and computes the rest again.

Axes: B batch, K slots, C colours (1 or 3), H W image.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.launch import jit, launch, tl, triton


class Mixture(NamedTuple):
    """What `mixture` returns; logarithms are in nats."""

    log_likelihood: Tensor  # (B, H, W)           log p(x|z)
    masks: Tensor  # (B, K, H, W)                 m_k
    responsibilities: Tensor  # (B, K, H, W)      r_k
    posterior_masks: Tensor  # (B, K, H, W)       P_k
    leave_one_out: Tensor  # (B, K, H, W)         log p(x|z∖k), no gradient flows through it
    grad_decoded: Tensor  # (B, K, C+1, H, W)     of −Σ log p(x|z), no gradient flows through it


def mixture_reference(
    image: Tensor,
    decoded: Tensor,
    sigma: float,
    component: str = "gaussian",
    posterior_epsilon: float = 0.0,
) -> Mixture:
    """`mixture` in the fewest lines of torch."""
    image, decoded = check_inputs(image, decoded, sigma, component, posterior_epsilon)
    difference = image[:, None] - decoded[:, :, :-1]  # (B, K, C, H, W)
    log_masks = decoded[:, :, -1].log_softmax(1)  # (B, K, H, W)
    log_density = component_log_density(difference, sigma, component)  # (B, K, H, W)
    joint = log_masks + log_density  # (B, K, H, W)
    masks, responsibilities = log_masks.exp(), joint.softmax(1)
    with torch.no_grad():
        leave_one_out = logsumexp_of_others(joint) - logsumexp_of_others(log_masks)
        if decoded.shape[1] == 1:  # no other slot: the log-ratio of the two likelihoods is 0
            leave_one_out = joint.logsumexp(1, keepdim=True)
        grad_means = -responsibilities[:, :, None] * score(difference, sigma, component)
        grad_logits = (masks - responsibilities)[:, :, None]  # (B, K, 1, H, W)
        grad_decoded = torch.cat([grad_means, grad_logits], 2)  # (B, K, C+1, H, W)
    return Mixture(
        joint.logsumexp(1),
        masks,
        responsibilities,
        posterior(log_density, posterior_epsilon),
        leave_one_out,
        grad_decoded,
    )


def component_log_density(difference: Tensor, sigma: float, component: str) -> Tensor:
    """log N_k, nats, of x − μ (B, K, C, H, W): a product over colours, (B, K, H, W)."""
    colours = difference.shape[2]
    if component == "gaussian":
        constant = colours * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
        return difference.square().sum(2) * (-0.5 / sigma**2) - constant
    standard = difference / sigma
    # The logistic density is sigmoid(z) sigmoid(−z) / σ.
    log_density = F.logsigmoid(standard) + F.logsigmoid(-standard)  # (B, K, C, H, W)
    return log_density.sum(2) - colours * math.log(sigma)


def score(difference: Tensor, sigma: float, component: str) -> Tensor:
    """s_kc, the derivative of log N_k by μ_kc, of x − μ."""
    if component == "gaussian":
        return difference / sigma**2
    return (difference / (2 * sigma)).tanh() / sigma


def posterior(log_density: Tensor, epsilon: float) -> Tensor:
    """P_k = N_k / (Σ_j N_j + ε) of log N_k (B, K, H, W), without leaving log space."""
    if epsilon == 0:
        return log_density.softmax(1)
    # ε is one more component, so that the softmax may be taken where every N_k underflows.
    floor = torch.full_like(log_density[:, :1], math.log(epsilon))
    return torch.cat([log_density, floor], 1).softmax(1)[:, :-1]


def logsumexp_and_softmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ_k exp(values_k) (B, H, W) and the softmax (B, K, H, W), both along axis 1.

    The largest term has the largest share in the sum, so one gives the other. That saves the pass
    of exp in torch.logsumexp, which on a CPU is up to ten times slower where it underflows.
    """
    shares = values.softmax(1)
    return values.amax(1) - shares.amax(1).log(), shares


def logsumexp_of_others(values: Tensor) -> Tensor:
    """log Σ_{j≠k} exp(values_j) along axis 1 in O(K); −inf where there is no other.

    Sums from both ends meet around slot k. Subtracting slot k from the full sum instead would
    leave nothing but rounding error where that slot owns the pixel.
    """
    slots = values.unbind(1)
    before, after = [None, slots[0]], [None, slots[-1]]
    for k in range(1, len(slots) - 1):
        before.append(torch.logaddexp(before[-1], slots[k]))
        after.append(torch.logaddexp(after[-1], slots[-1 - k]))
    if len(slots) == 1:
        return torch.full_like(values, -math.inf)
    inner = [torch.logaddexp(b, a) for b, a in zip(before[1:-1], after[-2:0:-1], strict=True)]
    return torch.stack([after[-1], *inner, before[-1]], 1)


def check_inputs(
    image: Tensor, decoded: Tensor, sigma: float, component: str, posterior_epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Refuse what has no meaning; give both at the precision of the arithmetic, image constant."""
    refuse_bad_inputs(image, decoded, sigma, component, posterior_epsilon)
    wide = wide_dtype(image, decoded)
    return image.detach().to(wide), decoded.to(wide)


def wide_dtype(image: Tensor, decoded: Tensor) -> torch.dtype:
    """Half precision would round x − μ to 1 % of σ and more: never compute in it."""
    return torch.promote_types(torch.promote_types(image.dtype, decoded.dtype), torch.float32)


def refuse_bad_inputs(
    image: Tensor, decoded: Tensor, sigma: float, component: str, posterior_epsilon: float = 0.0
) -> None:
    """Raise ValueError, in one line, for what has no meaning."""
    if image.ndim != 4 or decoded.ndim != 5:
        raise ValueError(
            f"image must be (B, C, H, W) and decoded (B, K, C+1, H, W), "
            f"not {tuple(image.shape)} and {tuple(decoded.shape)}"
        )
    batch, colours, height, width = image.shape
    if colours not in (1, 3):
        raise ValueError(f"image must have 1 or 3 colours, not {colours}")
    slots = decoded.shape[1]
    if decoded.shape != (batch, slots, colours + 1, height, width) or slots == 0:
        raise ValueError(
            f"decoded must be ({batch}, K, {colours + 1}, {height}, {width}) with K > 0 "
            f"for this image, not {tuple(decoded.shape)}"
        )
    if not (image.is_floating_point() and decoded.is_floating_point()):
        raise ValueError(
            f"image and decoded must be floating point, not {image.dtype} and {decoded.dtype}"
        )
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    if component not in ("gaussian", "logistic"):
        raise ValueError(f"component must be gaussian or logistic, not {component!r}")
    if not 0 <= posterior_epsilon < math.inf:
        raise ValueError(f"posterior_epsilon must be 0 or more, not {posterior_epsilon}")


class FirstDerivative(torch.autograd.Function):
    """The identity on a gradient made by hand; to differentiate it again is an error.

    `once_differentiable` does not see a second derivative through the sources alone: it would
    take the gradient of `likelihood.sum()` for a constant, without a word.
    """

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("kernels: there is no second derivative; use the reference for one")


class _LogLikelihood(torch.autograd.Function):
    """log p(x|z) that keeps its gradient, so that backward is one multiplication."""

    @staticmethod
    def forward(ctx, image, decoded, sigma, component):
        planes = decoded.contiguous()  # sums over colours are slow where these lie innermost
        difference = image[:, None] - planes[:, :, :-1]  # (B, K, C, H, W)
        joint = planes[:, :, -1].log_softmax(1)  # (B, K, H, W)
        joint = joint + component_log_density(difference, sigma, component)
        log_likelihood, responsibilities = logsumexp_and_softmax(joint)
        if ctx.needs_input_grad[1]:
            slope = score(difference, sigma, component)  # (B, K, C, H, W)
            by_means = responsibilities[:, :, None] * slope
            by_logits = responsibilities - planes[:, :, -1].softmax(1)  # (B, K, H, W)
            gradient = torch.cat([by_means, by_logits[:, :, None]], 2)  # (B, K, C+1, H, W)
            ctx.save_for_backward(gradient, decoded)
        return log_likelihood

    @staticmethod
    def backward(ctx, cotangent):
        gradient, decoded = ctx.saved_tensors
        with torch.no_grad():
            d_decoded = gradient * cotangent[:, None, None]  # (B, K, C+1, H, W)
        return None, FirstDerivative.apply(d_decoded, decoded, cotangent), None, None


# -- Triton ----------------------------------------------------------------------------------------
#
# A program works on BLOCK pixels of one image and goes twice through its K slots, in rolled loops.
# The first sweep collects what a pixel needs of all slots, as running log-sum-exps; the second
# gives every slot its share. So registers do not depend on K: 40 a thread for `mixture`, where to
# hold all slots would take 64 for K = 5 and 160 for K = 11. The second sweep reads from the cache:
# 128 pixels of 7 slots are 14 KB.
#
# Logarithms are to base 2 until they are stored: exp2 is one instruction of the device. A logarithm
# costs about twenty, so that a slot takes only one, of a quotient. (The logistic density takes one
# more in each sweep.)
#
# sigma and epsilon are arguments, not constants of the compiler: to anneal them costs nothing. They
# are declared as float64, or they would reach a kernel in float64 with the digits of float32.


@jit
def locate(num_pixels, BLOCK: tl.constexpr):
    """This program's image and first pixel; its pixels: their numbers from there, which exist."""
    tiles = tl.cdiv(num_pixels, BLOCK)
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.minimum(num_pixels - start, BLOCK).to(tl.int32)
    return batch, start, (lanes, inside)


@jit
def split_columns(tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """(BLOCK, PADDED) -> a tuple of its first WIDTH columns."""
    parts = (tile,)  # of n parts, number i holds the columns c with c mod n = i
    for level in tl.static_range(5):
        if (1 << level) < PADDED:
            even = ()
            odd = ()
            for i in tl.static_range(1 << level):
                halves = tl.split(tl.reshape(parts[i], [BLOCK, PADDED >> (level + 1), 2]))
                even = even + (halves[0],)
                odd = odd + (halves[1],)
            parts = even + odd
    columns = ()
    for c in tl.static_range(WIDTH):
        columns = columns + (tl.reshape(parts[c], [BLOCK]),)
    return columns


@jit
def join_columns(columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """The inverse of split_columns, with zeros behind the last column."""
    parts = ()
    for c in tl.static_range(PADDED):
        column = columns[c] if c < WIDTH else tl.zeros_like(columns[0])
        parts = parts + (tl.reshape(column, [BLOCK, 1]),)
    for level in tl.static_range(5):
        if (1 << level) < PADDED:
            joined = ()
            for i in tl.static_range(PADDED >> (level + 1)):
                pair = tl.join(parts[i], parts[i + (PADDED >> (level + 1))])
                joined = joined + (tl.reshape(pair, [BLOCK, 2 << level]),)
            parts = joined
    return parts[0]


@jit
def tile_of(pixels, WIDTH: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr):
    """Offsets and mask of a (BLOCK, PADDED) tile: a row for a pixel, UNIT numbers apart."""
    lanes, inside = pixels
    numbers = tl.arange(0, PADDED)
    wanted = inside[:, None]
    if PADDED > WIDTH:
        wanted = wanted & (numbers < WIDTH)[None, :]
    return lanes[:, None] * UNIT + numbers[None, :], wanted


@jit
def load_channels(
    pointer, channel_stride, pixel_stride, pixels,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """WIDTH channels of the pixels from `pointer` on, as a tuple of blocks.

    UNIT > 0: the channels of a pixel lie side by side, those of the next UNIT numbers further. They
    are read as a tile, a row of which is a single load: 16 bytes for four channels in float32.
    UNIT = 0: every channel is a plane, with the strides given.
    """
    channels = ()
    if UNIT > 0:
        PADDED: tl.constexpr = triton.next_power_of_2(WIDTH)
        offsets, wanted = tile_of(pixels, WIDTH, PADDED, UNIT)
        tile = tl.load(pointer + offsets, mask=wanted, other=0.0).to(dtype)
        channels = split_columns(tile, WIDTH, BLOCK, PADDED)
    else:
        lanes, inside = pixels
        for c in tl.static_range(WIDTH):
            plane = pointer + tl.cast(c, tl.int64) * channel_stride
            value = tl.load(plane + lanes * pixel_stride, mask=inside, other=0.0).to(dtype)
            channels = channels + (value,)
    return channels


@jit
def store_channels(
    pointer, slot, start, num_pixels, pixels, channels,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The inverse of load_channels, into a slot of memory without gaps: (P, WIDTH) or planes."""
    if UNIT > 0:
        PADDED: tl.constexpr = triton.next_power_of_2(WIDTH)
        offsets, wanted = tile_of(pixels, WIDTH, PADDED, UNIT)
        tile = join_columns(channels, WIDTH, BLOCK, PADDED)
        tl.store(pointer + (slot * num_pixels + start) * UNIT + offsets, tile, mask=wanted)
    else:
        lanes, inside = pixels
        for c in tl.static_range(WIDTH):
            plane = pointer + (slot * WIDTH + c) * num_pixels + start
            tl.store(plane + lanes, channels[c], mask=inside)


@jit
def open_slots(
    decoded, strides, x, constants, place, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """What `read_slot` wants to know: where the slots are, the colours x to explain, and how.

    The constants are those of `explain`, and arrive in float64; `place` is from `locate`.
    """
    batch_stride, slot_stride, channel_stride, pixel_stride = strides
    precision, slope, log_norm = constants
    batch, start, pixels = place
    decoded += (batch * batch_stride + start * pixel_stride) * (UNIT if UNIT > 0 else 1)
    constants = (
        tl.full([BLOCK], precision, dtype),
        tl.full([BLOCK], slope, dtype),
        tl.full([BLOCK], log_norm, dtype),
    )
    return decoded, (slot_stride, channel_stride, pixel_stride), x, constants, pixels


@jit
def read_slot(
    decoded, k, COLOURS: tl.constexpr, LOGISTIC: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The channels of slot k, its mask logit and log N_k to base 2, and its scores.

    A logit of -inf switches a slot off.
    """
    first, strides, x, constants, pixels = decoded
    slot_stride, channel_stride, pixel_stride = strides
    slot = first + tl.cast(k, tl.int64) * slot_stride * (UNIT if UNIT > 0 else 1)
    channels = load_channels(
        slot, channel_stride, pixel_stride, pixels, COLOURS + 1, UNIT, BLOCK, dtype
    )
    logit = channels[COLOURS] * 1.4426950408889634  # log2 e
    logit = tl.where(logit < -1e30, -1e30, logit)  # without inf - inf
    density, scores = explain(x, channels, constants, COLOURS, LOGISTIC)
    return channels, logit, density, scores


@jit
def explain(x, means, constants, COLOURS: tl.constexpr, LOGISTIC: tl.constexpr):
    """log2 N_k of the colours x, and the score s_kc of each."""
    precision, slope, log_norm = constants
    distance = tl.zeros_like(x[0])
    spread = distance + 1.0
    scores = ()
    for c in tl.static_range(COLOURS):
        difference = x[c] - means[c]
        if LOGISTIC:
            scaled = tl.abs(difference) * precision  # |z| log2 e
            decay = tl.exp2(-scaled)  # exp(-|z|)
            distance += scaled
            spread *= 1.0 + decay
            score = slope * (1.0 - decay) / (1.0 + decay)  # tanh(|z| / 2) / sigma
            scores = scores + (tl.where(difference < 0, -score, score),)
        else:
            distance += difference * difference * precision
            scores = scores + (difference * slope,)
    if LOGISTIC:
        distance += 2.0 * tl.log2(spread)
    return -distance - log_norm, scores


# A running log-sum-exp is (top, total): total * 2^top is the sum, top the largest term so far.


@jit
def add_term(state, value):
    top, total = state
    gap = tl.exp2(-tl.abs(value - top))
    wins = value > top
    return tl.where(wins, value, top), tl.where(wins, total * gap + 1.0, total + gap)


@jit
def add_weight(weighted, top, value, weight):
    """weighted * 2^top, the same sum with weights. To be called before `value` moves `top`."""
    gap = tl.exp2(-tl.abs(value - top))
    return tl.where(value > top, weighted * gap + weight, weighted + gap * weight)


@jit
def add_contender(state, value, k):
    """(top, total, best, second, rest), where rest * 2^second leaves out the term of slot `best`.

    To subtract the largest term from the sum would leave nothing but rounding error.
    """
    top, total, best, second, rest = state
    wins, follows = value > top, value > second
    gap, behind = tl.exp2(-tl.abs(value - top)), tl.exp2(-tl.abs(value - second))
    rest = tl.where(follows, rest * behind + 1.0, rest + behind)
    rest = tl.where(wins, total, rest)
    second = tl.where(wins, top, tl.where(follows, value, second))
    total = tl.where(wins, total * gap + 1.0, total + gap)
    return tl.where(wins, value, top), total, tl.where(wins, k, best), second, rest


@jit
def compare_slots(
    decoded, floor, K: tl.constexpr, COLOURS: tl.constexpr, LOGISTIC: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The first sweep: sums of exp(a_k) N_k and exp(a_k), contests, and of N_k with ε = 2^floor."""
    joint, prior = empty_contest(BLOCK, dtype), empty_contest(BLOCK, dtype)
    density_sum = tl.full([BLOCK], floor, dtype), tl.full([BLOCK], 1.0, dtype)  # ε is a component
    for k in range(K):
        _slot, logit, density, _ = read_slot(decoded, k, COLOURS, LOGISTIC, UNIT, BLOCK, dtype)
        joint = add_contender(joint, logit + density, k)
        prior = add_contender(prior, logit, k)
        density_sum = add_term(density_sum, density)
    return joint, prior, density_sum


@jit
def empty_contest(BLOCK: tl.constexpr, dtype: tl.constexpr):
    """The state of add_contender before the first slot."""
    nothing, zero = tl.full([BLOCK], float("-inf"), dtype), tl.zeros([BLOCK], dtype)
    return nothing, zero, tl.zeros([BLOCK], tl.int32), nothing, zero


@jit
def quotient_of_others(joint, prior, joint_term, prior_term, k):
    """log2 of Σ_{j≠k} m_j N_j / Σ_{j≠k} m_j, from both sums and their terms of slot k."""
    top, total, best, second, rest = joint
    prior_top, prior_total, prior_best, prior_second, prior_rest = prior
    owns, leads = best == k, prior_best == k
    others = tl.where(owns, rest, total - joint_term)  # at least 1, the largest term
    prior_others = tl.where(leads, prior_rest, prior_total - prior_term)
    reference = tl.where(owns, second, top) - tl.where(leads, prior_second, prior_top)
    return reference + tl.log2(others / prior_others)


@jit
def quotient(joint, prior):
    """log2 of Σ_j m_j N_j, from the sums of exp(a_j) N_j and of exp(a_j)."""
    return joint[0] - prior[0] + tl.log2(joint[1] / prior[1])


@jit
def nats(log2):
    return log2 * 0.6931471805599453  # ln 2


@jit
def slot_terms(
    joint, prior, likelihood, logit, density, scores, k, K: tl.constexpr, COLOURS: tl.constexpr
):
    """Of slot k: m_k, r_k, the gradient of its means and logit, log p(x|z∖k) in nats."""
    joint_term, prior_term = tl.exp2(logit + density - joint[0]), tl.exp2(logit - prior[0])
    responsibility, mask = joint_term / joint[1], prior_term / prior[1]
    left_out = likelihood
    if K > 1:
        left_out = nats(quotient_of_others(joint, prior, joint_term, prior_term, k))
    gradient = ()
    for c in tl.static_range(COLOURS):
        gradient = gradient + (-responsibility * scores[c],)
    return mask, responsibility, gradient + (mask - responsibility,), left_out


@jit
def mixture_kernel(
    image,  # (B, C, P) any strides
    decoded,  # (B, K, C+1, P) any strides, or UNIT numbers a pixel
    log_likelihood,  # out (B, P) nats
    masks,  # out (B, K, P)
    responsibilities,  # out (B, K, P)
    posterior_masks,  # out (B, K, P)
    leave_one_out,  # out (B, K, P) nats
    grad_decoded,  # out (B, K, C+1, P), or (B, K, P, C+1) where UNIT says so
    image_batch, image_channel, image_pixel,  # strides in numbers
    batch_stride, slot_stride, channel_stride, pixel_stride,  # of decoded, in pixels of UNIT
    num_pixels,
    precision: "tl.float64", slope: "tl.float64", log_norm: "tl.float64", floor: "tl.float64",
    K: tl.constexpr, COLOURS: tl.constexpr, LOGISTIC: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = log_likelihood.dtype.element_ty
    batch, start, pixels = locate(num_pixels, BLOCK)
    image += batch * image_batch + start * image_pixel
    x = load_channels(image, image_channel, image_pixel, pixels, COLOURS, 0, BLOCK, dtype)
    decoded = open_slots(
        decoded, (batch_stride, slot_stride, channel_stride, pixel_stride), x,
        (precision, slope, log_norm), (batch, start, pixels), UNIT, BLOCK, dtype,
    )  # fmt: skip
    joint, prior, density_sum = compare_slots(
        decoded, floor, K, COLOURS, LOGISTIC, UNIT, BLOCK, dtype
    )

    lanes, inside = pixels
    likelihood = nats(quotient(joint, prior))
    tl.store(log_likelihood + batch * num_pixels + start + lanes, likelihood, mask=inside)
    for k in range(K):
        _slot, logit, density, scores = read_slot(decoded, k, COLOURS, LOGISTIC, UNIT, BLOCK, dtype)
        mask, responsibility, gradient, left_out = slot_terms(
            joint, prior, likelihood, logit, density, scores, k, K, COLOURS
        )
        posterior_mask = tl.exp2(density - density_sum[0]) / density_sum[1]
        plane = (batch * K + k) * num_pixels + start
        tl.store(masks + plane + lanes, mask, mask=inside)
        tl.store(responsibilities + plane + lanes, responsibility, mask=inside)
        tl.store(posterior_masks + plane + lanes, posterior_mask, mask=inside)
        tl.store(leave_one_out + plane + lanes, left_out, mask=inside)
        store_channels(
            grad_decoded, batch * K + k, start, num_pixels, pixels, gradient,
            COLOURS + 1, UNIT, BLOCK,
        )  # fmt: skip


@jit
def log_likelihood_kernel(
    image,  # (B, C, P) any strides
    decoded,  # (B, K, C+1, P) any strides, or UNIT numbers a pixel
    log_likelihood,  # out (B, P) nats
    image_batch, image_channel, image_pixel,  # strides in numbers
    batch_stride, slot_stride, channel_stride, pixel_stride,  # of decoded, in pixels of UNIT
    num_pixels,
    precision: "tl.float64", slope: "tl.float64", log_norm: "tl.float64",
    K: tl.constexpr, COLOURS: tl.constexpr, LOGISTIC: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first sweep of mixture_kernel."""
    dtype: tl.constexpr = log_likelihood.dtype.element_ty
    batch, start, pixels = locate(num_pixels, BLOCK)
    image += batch * image_batch + start * image_pixel
    x = load_channels(image, image_channel, image_pixel, pixels, COLOURS, 0, BLOCK, dtype)
    decoded = open_slots(
        decoded, (batch_stride, slot_stride, channel_stride, pixel_stride), x,
        (precision, slope, log_norm), (batch, start, pixels), UNIT, BLOCK, dtype,
    )  # fmt: skip

    joint = tl.full([BLOCK], float("-inf"), dtype), tl.zeros([BLOCK], dtype)
    prior = joint
    for k in range(K):
        _slot, logit, density, _ = read_slot(decoded, k, COLOURS, LOGISTIC, UNIT, BLOCK, dtype)
        joint, prior = add_term(joint, logit + density), add_term(prior, logit)
    lanes, inside = pixels
    likelihood = nats(quotient(joint, prior))
    tl.store(log_likelihood + batch * num_pixels + start + lanes, likelihood, mask=inside)


@jit
def load_plane(pointer, offset, pixels, dtype: tl.constexpr, stride=1):
    """A cotangent; zero where there is none."""
    lanes, inside = pixels
    if pointer is None:
        value = tl.zeros_like(lanes).to(dtype)
    else:
        value = tl.load(pointer + offset + lanes * stride, mask=inside, other=0.0).to(dtype)
    return value


@jit
def mixture_backward_kernel(
    image,  # (B, C, P) any strides
    decoded,  # (B, K, C+1, P) any strides, or UNIT numbers a pixel
    d_log_likelihood,  # (B, P) any strides, or None
    d_masks,  # (B, K, P), or None
    d_responsibilities,  # (B, K, P), or None
    d_posterior_masks,  # (B, K, P), or None
    d_decoded,  # out (B, K, C+1, P), or (B, K, P, C+1) where UNIT says so
    image_batch, image_channel, image_pixel,  # strides in numbers
    batch_stride, slot_stride, channel_stride, pixel_stride,  # of decoded, in pixels of UNIT
    likelihood_batch, likelihood_pixel,  # of d_log_likelihood
    num_pixels,
    precision: "tl.float64", slope: "tl.float64", log_norm: "tl.float64", floor: "tl.float64",
    K: tl.constexpr, COLOURS: tl.constexpr, LOGISTIC: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    batch, start, pixels = locate(num_pixels, BLOCK)
    image += batch * image_batch + start * image_pixel
    x = load_channels(image, image_channel, image_pixel, pixels, COLOURS, 0, BLOCK, dtype)
    decoded = open_slots(
        decoded, (batch_stride, slot_stride, channel_stride, pixel_stride), x,
        (precision, slope, log_norm), (batch, start, pixels), UNIT, BLOCK, dtype,
    )  # fmt: skip
    plane = batch * likelihood_batch + start * likelihood_pixel
    d_likelihood = load_plane(d_log_likelihood, plane, pixels, dtype, likelihood_pixel)

    zero = tl.zeros([BLOCK], dtype)
    joint = tl.full([BLOCK], float("-inf"), dtype), zero
    prior, density_sum = joint, (tl.full([BLOCK], floor, dtype), zero + 1.0)
    joint_mean, prior_mean, density_mean = zero, zero, zero
    for k in range(K):
        _slot, logit, density, _ = read_slot(decoded, k, COLOURS, LOGISTIC, UNIT, BLOCK, dtype)
        plane = (batch * K + k) * num_pixels + start
        value, weight = logit + density, load_plane(d_responsibilities, plane, pixels, dtype)
        joint_mean, joint = add_weight(joint_mean, joint[0], value, weight), add_term(joint, value)
        weight = load_plane(d_masks, plane, pixels, dtype)
        prior_mean, prior = add_weight(prior_mean, prior[0], logit, weight), add_term(prior, logit)
        if d_posterior_masks is not None:
            weight = load_plane(d_posterior_masks, plane, pixels, dtype)
            density_mean = add_weight(density_mean, density_sum[0], density, weight)
            density_sum = add_term(density_sum, density)

    # Each softmax sends back its probabilities times (cotangent - their mean).
    joint_mean, prior_mean = joint_mean / joint[1], prior_mean / prior[1]
    density_mean = density_mean / density_sum[1]
    for k in range(K):
        _slot, logit, density, scores = read_slot(decoded, k, COLOURS, LOGISTIC, UNIT, BLOCK, dtype)
        mask = tl.exp2(logit - prior[0]) / prior[1]
        responsibility = tl.exp2(logit + density - joint[0]) / joint[1]
        plane = (batch * K + k) * num_pixels + start
        d_mask = load_plane(d_masks, plane, pixels, dtype) - prior_mean
        d_responsibility = load_plane(d_responsibilities, plane, pixels, dtype) - joint_mean
        through_joint = responsibility * (d_likelihood + d_responsibility)
        d_density = through_joint
        if d_posterior_masks is not None:
            posterior_mask = tl.exp2(density - density_sum[0]) / density_sum[1]
            d_posterior = load_plane(d_posterior_masks, plane, pixels, dtype) - density_mean
            d_density += posterior_mask * d_posterior
        gradient = ()
        for c in tl.static_range(COLOURS):
            gradient = gradient + (d_density * scores[c],)
        gradient = gradient + (through_joint + mask * (d_mask - d_likelihood),)
        store_channels(
            d_decoded, batch * K + k, start, num_pixels, pixels, gradient,
            COLOURS + 1, UNIT, BLOCK,
        )  # fmt: skip


# Kernel -> pixels of a program, pixels of a thread. One pixel is a load of 16 bytes already.
BLOCKS = {"mixture": (128, 1), "log_likelihood": (128, 1), "mixture_backward": (128, 1)}


def block(blocks: tuple[int, int], num_pixels: int) -> dict[str, int]:
    """BLOCK and num_warps of a kernel for images of so many pixels."""
    pixels = min(blocks[0], max(32, triton.next_power_of_2(num_pixels)))
    return {"BLOCK": pixels, "num_warps": min(8, max(1, pixels // blocks[1] // 32))}


class Layout(NamedTuple):
    """How a kernel reads (B, K, C, H, W)."""

    tensor: Tensor
    strides: tuple[int, int, int, int]  # of batch, slot, channel and pixel, in units
    unit: int  # numbers of a unit: C where the channels of a pixel lie side by side, else 0 for 1


def pixel_stride(tensor: Tensor) -> int | None:
    """From each pixel of (..., H, W) to the next; None where a kernel has no such number.

    Offsets from a program's first pixel have 32 bits, which suffice for 128 pixels and this limit.
    """
    (height, width), (row, column) = tensor.shape[-2:], tensor.stride()[-2:]
    if height * width == 1:
        return 1
    stride = column if width > 1 else row
    even = height == 1 or width == 1 or row == width * column
    return stride if even and stride < 2**24 else None


def layout(tensor: Tensor) -> Layout:
    """The tensor as it is if its pixels lie at one stride, else its channels-last copy."""
    channels, height, width = tensor.shape[2:]
    if pixel_stride(tensor) is None:
        tensor = tensor.movedim(2, -1).contiguous().movedim(-1, 2)
    batch, slot, channel, *_ = tensor.stride()
    pixel = channels if height * width == 1 else pixel_stride(tensor)
    side_by_side = channels > 1 and channel == 1 and pixel == channels
    if side_by_side and batch % channels == slot % channels == 0:
        return Layout(tensor, (batch // channels, slot // channels, 1, 1), channels)
    return Layout(tensor, (batch, slot, channel, pixel), 0)


def planes(tensor: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """(B, C, H, W) to read plane by plane, and its strides of batch, channel and pixel."""
    if pixel_stride(tensor) is None:
        tensor = tensor.contiguous()
    return tensor, (tensor.stride(0), tensor.stride(1), pixel_stride(tensor))


def cotangent_planes(cotangent: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """(B, H, W) where it lies, as that of a sum is expanded; its strides of batch and pixel."""
    if cotangent is None:
        return None, (0, 0)
    plane, (batch, _, pixel) = planes(cotangent[:, None])
    return plane, (batch, pixel)


def new_like(decoded: Layout, dtype: torch.dtype) -> Tensor:
    """Memory without gaps for a gradient of decoded: channels-last where that is, or planes."""
    batch, slots, channels, height, width = decoded.tensor.shape
    if decoded.unit:
        memory = decoded.tensor.new_empty((batch, slots, height, width, channels), dtype=dtype)
        return memory.movedim(-1, 2)  # (B, K, C+1, H, W)
    return decoded.tensor.new_empty(decoded.tensor.shape, dtype=dtype)


def constants(
    sigma: float, component: str, colours: int, epsilon: float = 0.0
) -> tuple[float, float, float, float]:
    """precision, slope and log_norm of `explain`; floor, log2 of the posterior's epsilon."""
    floor = math.log2(epsilon) if epsilon else -math.inf
    if component == "gaussian":
        log_norm = colours * (math.log2(sigma) + 0.5 * math.log2(2 * math.pi))
        return 0.5 * math.log2(math.e) / sigma**2, 1 / sigma**2, log_norm, floor
    return math.log2(math.e) / sigma, 1 / sigma, colours * math.log2(sigma), floor


def launch_on_pixels(
    kernel: Any, blocks: tuple[int, int], image: Tensor, decoded: Layout, tensors: tuple,
    strides: tuple, numbers: tuple, **constexprs: Any,
) -> None:  # fmt: skip
    """Start a kernel with a program for every block of every image."""
    image, image_strides = planes(image)
    batch, slots, channels, height, width = decoded.tensor.shape
    shape = block(blocks, height * width)
    launch(
        kernel, (batch * -(-height * width // shape["BLOCK"]),),
        image, decoded.tensor, *tensors, *image_strides, *decoded.strides, *strides,
        height * width, *numbers,
        K=slots, COLOURS=channels - 1, UNIT=decoded.unit, **shape, **constexprs,
    )  # fmt: skip


@torch.library.custom_op("slot_kernels::mixture", mutates_args=())
def _mixture(
    image: Tensor, decoded: Tensor, sigma: float, component: str, posterior_epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = layout(decoded)
    outputs = _empty_mixture(image, given)
    numbers = constants(sigma, component, image.shape[1], posterior_epsilon)
    launch_on_pixels(
        mixture_kernel, BLOCKS["mixture"], image, given, outputs, (), numbers,
        LOGISTIC=component == "logistic",
    )  # fmt: skip
    return outputs


def _empty_mixture(image: Tensor, decoded: Layout) -> tuple[Tensor, ...]:
    batch, slots, _, height, width = decoded.tensor.shape
    dtype = wide_dtype(image, decoded.tensor)
    shapes = (batch, height, width), *[(batch, slots, height, width)] * 4
    fields = [decoded.tensor.new_empty(shape, dtype=dtype) for shape in shapes]
    return *fields, new_like(decoded, dtype)


@_mixture.register_fake
def _(image, decoded, sigma, component, posterior_epsilon):
    return _empty_mixture(image, layout(decoded))


@torch.library.custom_op("slot_kernels::mixture_log_likelihood", mutates_args=())
def _mixture_log_likelihood(image: Tensor, decoded: Tensor, sigma: float, component: str) -> Tensor:
    given = layout(decoded)
    batch, _, _, height, width = decoded.shape
    log_likelihood = decoded.new_empty((batch, height, width), dtype=wide_dtype(image, decoded))
    launch_on_pixels(
        log_likelihood_kernel, BLOCKS["log_likelihood"], image, given, (log_likelihood,), (),
        constants(sigma, component, image.shape[1])[:3], LOGISTIC=component == "logistic",
    )  # fmt: skip
    return log_likelihood


@_mixture_log_likelihood.register_fake
def _(image, decoded, sigma, component):
    batch, _, _, height, width = decoded.shape
    return decoded.new_empty((batch, height, width), dtype=wide_dtype(image, decoded))


@torch.library.custom_op("slot_kernels::mixture_backward", mutates_args=())
def mixture_backward(
    image: Tensor, decoded: Tensor, d_log_likelihood: Tensor | None, d_masks: Tensor | None,
    d_responsibilities: Tensor | None, d_posterior_masks: Tensor | None,
    sigma: float, component: str, posterior_epsilon: float,
) -> Tensor:  # fmt: skip
    given = layout(decoded)
    d_decoded = new_like(given, decoded.dtype)
    d_log_likelihood, strides = cotangent_planes(d_log_likelihood)
    cotangents = [
        cotangent if cotangent is None else cotangent.contiguous()
        for cotangent in (d_masks, d_responsibilities, d_posterior_masks)
    ]
    numbers = constants(sigma, component, image.shape[1], posterior_epsilon)
    dtype = tl.float64 if wide_dtype(image, decoded) == torch.float64 else tl.float32
    launch_on_pixels(
        mixture_backward_kernel, BLOCKS["mixture_backward"], image, given,
        (d_log_likelihood, *cotangents, d_decoded), strides, numbers,
        LOGISTIC=component == "logistic", dtype=dtype,
    )  # fmt: skip
    return d_decoded


@mixture_backward.register_fake
def _(image, decoded, *_):
    return new_like(layout(decoded), decoded.dtype)


def refuse_second_derivative(ctx, *_):
    """Backward of every backward."""
    raise RuntimeError("kernels: there is no second derivative; use the reference for one")


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]
    ctx.set_materialize_grads(False)  # an output that nothing is asked of is not read
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(*output[4:])


def _backward_of_mixture(ctx, *cotangents):
    d_decoded = None
    if any(cotangent is not None for cotangent in cotangents):
        d_decoded = mixture_backward(*ctx.saved_tensors, *cotangents[:4], *ctx.options)
    return None, d_decoded, None, None, None


def _backward_of_log_likelihood(ctx, cotangent):
    gradients = None, None, None
    if cotangent is None:
        return None, None, None, None
    d_decoded = mixture_backward(*ctx.saved_tensors, cotangent, *gradients, *ctx.options, 0.0)
    return None, d_decoded, None, None


_mixture.register_autograd(_backward_of_mixture, setup_context=_save_inputs)
_mixture_log_likelihood.register_autograd(_backward_of_log_likelihood, setup_context=_save_inputs)
mixture_backward.register_autograd(refuse_second_derivative)


def _triton_mixture(image, decoded, sigma, component="gaussian", posterior_epsilon=0.0) -> Mixture:
    refuse_bad_inputs(image, decoded, sigma, component, posterior_epsilon)
    return Mixture(*_mixture(image.detach(), decoded, sigma, component, posterior_epsilon))


def _triton_log_likelihood(image, decoded, sigma, component="gaussian") -> Tensor:
    refuse_bad_inputs(image, decoded, sigma, component)
    return _mixture_log_likelihood(image.detach(), decoded, sigma, component)


if triton is not None:
    kernels.TRITON["mixture"] = _triton_mixture
    kernels.TRITON["mixture_log_likelihood"] = _triton_log_likelihood


def mixture(
    image: Tensor,
    decoded: Tensor,
    sigma: float,
    component: str = "gaussian",
    posterior_epsilon: float = 0.0,
) -> Mixture:
    """The mixture likelihood of every pixel and all that inference wants to know of it.

    image (B, C, H, W), C 1 or 3, constant; decoded (B, K, C+1, H, W), means first and the mask
    logit last, any strides. sigma is the standard deviation of "gaussian", the scale of
    "logistic"; posterior_epsilon is ε. bfloat16 and float16 are computed and returned in float32.

    With one slot, leave_one_out is log_likelihood. Raises ValueError for shapes that do not fit,
    sigma <= 0 and an unknown component.
    """
    arguments = (image, decoded, sigma, component, posterior_epsilon)
    if kernels.backend(decoded, "mixture") == "triton":
        return kernels.TRITON["mixture"](*arguments)
    return mixture_reference(*arguments)


def mixture_log_likelihood(
    image: Tensor, decoded: Tensor, sigma: float, component: str = "gaussian"
) -> Tensor:
    """log p(x|z) alone, nats, (B, H, W), differentiable once with respect to decoded.

    Arguments and errors as for `mixture`.
    """
    if kernels.backend(decoded, "mixture_log_likelihood") == "triton":
        return kernels.TRITON["mixture_log_likelihood"](image, decoded, sigma, component)
    return _LogLikelihood.apply(*check_inputs(image, decoded, sigma, component), sigma, component)
