"""The device functions that the kernels of the slot mixture share; masks.py explains the basics.

A pixel's C means and its mask logit lie side by side in memory (channels-last) and are one row of a
tile (BLOCK, C + 1): a load of 16 bytes for C = 3 in float32. A sum over colours is a sum along the
row without the last column. Triton's tiles are powers of two, hence C is 1 or 3.

Axes: B batch, K slots, C colours, P = H·W pixels; CHANNELS = C + 1. The arithmetic has the type
of sigma.
"""

from kernels.launch import jit, tl


@jit
def load_block(image, sigma, num_pixels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's image x, (BLOCK, C + 1) with a last column of 0; sigma; and which pixels."""
    batch = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = pixel < num_pixels
    column = tl.arange(0, CHANNELS)[None, :]  # (1, C+1)
    offset = (batch * (CHANNELS - 1) + column) * num_pixels + pixel[:, None]  # (BLOCK, C+1)
    wanted = inside[:, None] & (column < CHANNELS - 1)
    x = tl.load(image + offset, mask=wanted, other=0.0).to(sigma.dtype.element_ty)
    return x, tl.load(sigma), batch, pixel, inside


@jit
def slot_offsets(index, pixel, num_pixels, CHANNELS: tl.constexpr):
    """Where the rows of slot number `index` = b K + k lie in (B, K, P, C + 1): (BLOCK, C + 1)."""
    return (index * num_pixels + pixel[:, None]) * CHANNELS + tl.arange(0, CHANNELS)[None, :]


@jit
def load_slot(x, decoded, index, pixel, inside, num_pixels):
    """The rows of slot number `index`, as wide as x and in its type, and their last column."""
    CHANNELS: tl.constexpr = x.shape[1]
    offset = slot_offsets(index, pixel, num_pixels, CHANNELS)
    slot = tl.load(decoded + offset, mask=inside[:, None], other=0.0).to(x.dtype)
    column = tl.arange(0, CHANNELS)[None, :]
    return slot, tl.sum(tl.where(column == CHANNELS - 1, slot, 0.0), 1)


@jit
def log_density_and_score(x, slot, sigma):
    """log N_k (BLOCK,) and (x − μ_k) / σ² (BLOCK, C + 1), whose last column is 0."""
    CHANNELS: tl.constexpr = x.shape[1]
    column = tl.arange(0, CHANNELS)[None, :]
    standard = tl.where(column < CHANNELS - 1, x - slot, 0.0) / sigma  # (BLOCK, C+1)
    log_norm = (CHANNELS - 1) * (tl.log(sigma) + 0.9189385332046727)  # log √2π
    return -0.5 * tl.sum(standard * standard, 1) - log_norm, standard / sigma


@jit
def empty_sum(x):
    """Largest term and total of a sum of nothing, for every row of x: −∞ and 0."""
    return tl.full([x.shape[0]], float("-inf"), x.dtype), tl.zeros([x.shape[0]], x.dtype)


@jit
def update_logsumexp(largest, total, value):
    """Add exp(value) to the sum total · exp(largest)."""
    new = tl.maximum(largest, value)
    shift = tl.where(new == float("-inf"), 0.0, new)  # −∞ − −∞ would be NaN
    return new, total * tl.exp(largest - shift) + tl.exp(value - shift)


@jit
def update_top2(first, second, slot, value, k):
    """Insert the value of slot k into the two largest; `slot` is that of the first."""
    wins = value > first
    second = tl.where(wins, first, tl.maximum(second, value))
    return tl.maximum(first, value), second, tl.where(wins, k, slot)


@jit
def compare_slots(x, decoded, batch, pixel, inside, num_pixels, sigma, K: tl.constexpr):
    """What `without_slot` needs of all slots; the terms of the sums are exp(logit + log N_k)."""
    nothing, zero = empty_sum(x)
    no_slot = tl.full([x.shape[0]], -1, tl.int32)
    # The two largest logits, and the slot of the first.
    logit1, logit2, leader = nothing, nothing, no_slot
    for k in range(K):
        _, logit = load_slot(x, decoded, batch * K + k, pixel, inside, num_pixels)
        logit1, logit2, leader = update_top2(logit1, logit2, leader, logit, k)
    # The two largest terms; the largest without the leader, whose logits are taken from logit2.
    term1, term2, owner, other1 = nothing, nothing, no_slot, nothing
    for k in range(K):
        slot, logit = load_slot(x, decoded, batch * K + k, pixel, inside, num_pixels)
        log_density, _ = log_density_and_score(x, slot, sigma)
        term1, term2, owner = update_top2(term1, term2, owner, logit - logit1 + log_density, k)
        other = tl.where(k == leader, float("-inf"), logit - logit2 + log_density)
        other1 = tl.maximum(other1, other)
    # The sums, relative to these.
    total, rest, prior, other_total, other_prior = zero, zero, zero, zero, zero
    for k in range(K):
        slot, logit = load_slot(x, decoded, batch * K + k, pixel, inside, num_pixels)
        log_density, _ = log_density_and_score(x, slot, sigma)
        term, other = logit - logit1 + log_density, logit - logit2 + log_density
        prior += tl.exp(logit - logit1)
        total += tl.exp(term - term1)
        rest += tl.where(k == owner, 0.0, tl.exp(term - term2))
        other_prior += tl.where(k == leader, 0.0, tl.exp(logit - logit2))
        other_total += tl.where(k == leader, 0.0, tl.exp(other - other1))
    without_leader = other1 + tl.log(other_total / other_prior)
    return logit1, leader, prior, term1, term2, owner, total, rest, without_leader


@jit
def without_slot(sums, logit, log_density, k, K: tl.constexpr):
    """log p(x|z∖k), nats, (BLOCK,); with one slot, log p(x|z)."""
    logit1, leader, prior, term1, term2, owner, total, rest, without_leader = sums
    if K == 1:
        result = term1 + tl.log(total / prior)
    else:
        others = tl.where(k == owner, rest, total - tl.exp(logit - logit1 + log_density - term1))
        other_prior = prior - tl.exp(logit - logit1)
        result = tl.where(k == owner, term2, term1) + tl.log(others / other_prior)
        result = tl.where(k == leader, without_leader, result)
    return result
