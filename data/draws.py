"""Counter-based randomness: every draw is a pure function of (key, scene index, counter).

No generator state: scene 7 gets the same bits alone, in a batch of 64, on any rank and on CUDA,
because a draw is a hash of *what* is drawn instead of the next item of a stream. All of it is
integer arithmetic on int64 tensors that hold 32-bit words. Both multipliers are below 2**31, so a
product stays below 2**63 and nothing depends on how a device treats overflow.

How the words are made, `mix` being a bijection of 32-bit words:

    upper, lower = the halves of make_key(key), which makes neighbouring keys as good as any
    a    = mix(mix(index_low ^ lower) ^ index_high ^ upper)
    b    = mix(mix(index_low ^ upper) ^ index_high ^ lower)
    word = mix(a ^ mix(counter)), with b added (xor) between the two multiplications

Two scenes share their words only where all 64 bits of (a, b) agree. Of one key's first 2**32
scenes no two do, since `a` is then a bijection of the index.

Axes: B scenes, N draws per scene.
"""

import hashlib
import math
import operator

import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # 32 bits
MULTIPLIERS = 0x21F0AAAD, 0x735A2D97  # odd, below 2**31
COUNTER_OFFSET = 0x6A09E667  # mix(0) is 0; an offset keeps counter 0 from being special


def make_key(*words: int | str) -> int:
    """A 64-bit key from any words, e.g. `make_key("tetrominoes", "train", seed)`.

    The same in every process (Python's own `hash` of a string is not). Kinds and boundaries count:
    (1, 23), (12, 3), ("1", 23) are three keys. Raises TypeError for what is neither kind.
    """
    text = ""
    for word in words:
        kind, part = ("s", word) if isinstance(word, str) else ("i", str(operator.index(word)))
        text += f"{kind}{len(part)}:{part}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(key: int, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """float32 (B, *shape) in [0, 1): exact multiples of 2**-24, the same bits on every device.

    `key` is any integer; `index` (B,) int64 holds scene numbers, which may exceed 2**32. The first
    n values of a scene do not depend on how many are drawn.
    """
    return _fraction(_words(key, index, math.prod(shape))).reshape(-1, *shape)


def integers(key: int, index: Tensor, high: int, shape: tuple[int, ...] = ()) -> Tensor:
    """int64 (B, *shape) in 0 .. high-1, for high up to 2**31; bias below high / 2**32."""
    return ((_words(key, index, math.prod(shape)) * high) >> 32).reshape(-1, *shape)


def normal(key: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float32 (B, *shape) standard normal, by Box-Muller, of magnitude at most 6.8.

    The words are the same everywhere; log, cos and sin differ by an ulp between devices, and
    between the vector and the scalar lanes of one CPU. Unlike `uniform`, all values of a scene
    change with the number drawn.
    """
    n = math.prod(shape)
    words = _words(key, index, n + n % 2)
    radius_word, angle_word = words.chunk(2, dim=1)
    # Half a step keeps the logarithm finite; all 32 bits go into it, for the tails' sake.
    radius = ((radius_word.float() + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = _fraction(angle_word) * math.tau
    values = torch.cat([radius * angle.cos(), radius * angle.sin_()], dim=1)
    return values[:, :n].reshape(-1, *shape)


def pick(u: Tensor, high: int | Tensor) -> Tensor:
    """int64 in 0 .. high-1 from `uniform` values and a high below 2**24 (a tensor broadcasts): 1 -
    2**-24 times an integer lies more than half a float32 step below it, and never rounds to it."""
    return (u * high).long()


def first_valid(valid: Tensor) -> Tensor:
    """The number of the first True of each row: (..., A) bool -> (...) int64; 0 where none is."""
    return (valid * torch.arange(valid.shape[-1], 0, -1, device=valid.device)).argmax(-1)


def _fraction(words: Tensor) -> Tensor:
    return (words >> 8).float() * 2.0**-24  # 24 bits: exact in float32, and never 1


def _words(key: int, index: Tensor, n: int) -> Tensor:
    """n 32-bit words for each scene: int64 (B, n)."""
    upper, lower = divmod(make_key(key), WORD + 1)
    low, high = index & WORD, (index >> 32) & WORD
    state = _mix(torch.stack([low ^ lower, low ^ upper]))  # (2, B)
    a, b = _mix(state ^ torch.stack([high ^ upper, high ^ lower]))  # (B,) each
    counters = torch.arange(COUNTER_OFFSET, COUNTER_OFFSET + n, device=index.device)
    return _mix(a[:, None] ^ _mix(counters), b[:, None])  # (B, n)


def _mix(x: Tensor, salt: Tensor | None = None) -> Tensor:
    """A bijection of 32-bit words in which each input bit flips each output bit half the time.

    Overwrites x (always a fresh tensor here), as this is most of the time of a draw.
    """
    x ^= x >> 16
    x *= MULTIPLIERS[0]
    x &= WORD
    x ^= x >> 15
    if salt is not None:
        x ^= salt
    x *= MULTIPLIERS[1]
    x &= WORD
    x ^= x >> 15
    return x
