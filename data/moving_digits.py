"""Moving MNIST: no, one or two handwritten digits that move, 50 x 50.

After Kosiorek et al. 2018 (SQAIR): MNIST digits on 50 x 50, no, one or two with equal probability,
whose bounding boxes do not overlap in the first frame; sequences of 10 frames.

Assumed:
- Digits, their number and their sizes are those of `multi_mnist` (data/digits.py).
- A digit has one velocity, uniform over the whole numbers from -speed to speed in rows and in
  columns. Its frame (the bounding box of all that it draws) is reflected at the borders; SQAIR's
  digits also accelerate, and leave the image.
- Where digits overlap, their light is added, and clipped at 1; SQAIR's take the larger.
- `enter`: a digit is there from a frame on that is uniform over all, at once, and its frame does
  not overlap another one's then. `leave`: it is gone, at once, after a frame that is uniform over
  all from its first one on.
- `crossing` is the share of scenes in which two digits cross: the centres of their frames agree, to
  half a pixel, in frame `length // 2` or the next one (frames count from 0), at a uniform place.

Start, velocities and crossing are redrawn together: `ATTEMPTS` are drawn at once, the first valid
one wins.

A batch has a frame axis after B. Entity e is the same digit in all frames: its number is its
identity. `present` means exists, and so visible unless another digit covers it. `coverage` is a
digit's light, whether or not another one covers it too, and for the background what is left of 1.
A pixel is in `masks` that digit's which is lightest there, if its light is at least INK.
Factors (B, T, E): label; box (B, T, E, 4), row, col, size as in data/digits.py, of the whole digit.

Axes: B scenes, T frames, E entities, N = E - 1 digits, A attempts, C H W image.
"""

from pathlib import Path

import torch
from torch import Tensor

from data import Batch, draws, make_batch
from data.digits import ATTEMPTS, INK, LARGEST, SIZE, MultiMNIST


class MovingDigits(MultiMNIST):
    """`length` frames of at most two digits, `speed` pixels a frame at most.

    Raises ValueError for sizes and numbers that cannot be, UserError where there are no digits.
    """

    def __init__(self, name: str = "moving_mnist", split: str = "train", seed: int = 0,
                 device: str | torch.device = "cpu", length: int = 10, speed: int = 3,
                 crossing: float = 0.0, enter: bool = False, leave: bool = False,
                 folder: str | Path = ""):
        super().__init__(name, split, seed, device, folder=folder)
        if length < 1 or not 0 <= speed <= 10 or not 0 <= crossing <= 1:
            raise ValueError(f"{length} frames at up to {speed} pixels a frame, a share of "
                             f"{crossing} crossing: not 1 or more, 0 to 10, 0 to 1")  # fmt: skip
        # Even the largest two, apart in frame 0, can then meet in frame length // 2 + 1.
        if crossing and (2 * speed * (length // 2 + 1) < LARGEST or enter or leave):
            raise ValueError(f"{length} frames at up to {speed} pixels a frame: too few to cross; "
                             "and digits that cross neither enter nor leave")  # fmt: skip
        self.length, self.speed = length, speed
        self.crossing, self.enter, self.leave = crossing, enter, leave

    def scenes(self, index: Tensor) -> Batch:
        u = draws.uniform(self.key, index, (6 + 5 * ATTEMPTS, self.max_objects))
        u_number, u_digit, u_size, u_first, u_last, u_crossing = u[:, :6].unbind(1)  # (B, N) each
        crossing = u_crossing[:, :1] < self.crossing  # (B, 1)
        number = torch.where(crossing, 2, draws.pick(u_number[:, :1], 3))
        exists = torch.arange(self.max_objects, device=self.device) < number  # (B, N)
        digit, size, light, frame = self.choose(exists, u_digit, u_size)
        first = draws.pick(u_first, self.length) * self.enter  # (B, N)
        last = first + draws.pick(u_last, self.length - first)
        last = last if self.leave else torch.full_like(first, self.length - 1)
        time = torch.arange(self.length, device=self.device)[:, None]  # (T, 1)
        there = exists[:, None] & (time >= first[:, None]) & (time <= last[:, None])  # (B, T, N)
        place = self.move(frame[..., 2:], first, crossing, u[:, 6:])  # (B, T, N, 2)

        offset = place - frame[:, None, :, :2]  # (B, T, N, 2), of the picture
        digits, factors = self.paint(digit[:, None], size[:, None], light[:, None], offset)
        digits = digits * there[..., None, None]  # (B, T, N, H, W)
        covered = digits.sum(2, keepdim=True).clamp_(max=1)  # exact: two terms in any order
        first_wins = digits[:, :, :1] >= digits[:, :, 1:]
        inside = (digits >= INK) & torch.cat([first_wins, ~first_wins], 2)
        coverage = torch.cat([1 - covered, digits], 2)  # (B, T, E, H, W)
        return make_batch(covered, inside, factors, there, coverage)

    def move(self, extent: Tensor, first: Tensor, crossing: Tensor, u: Tensor) -> Tensor:
        """Rows and columns (B, T, N, 2) of the frames' top left in the first valid attempt.

        extent (B, N, 2) of the frames, of absent digits 0; first (B, N) frame of each digit;
        crossing (B, 1) bool; u (B, 5A, N) in [0, 1).
        """
        u = u.unflatten(1, (ATTEMPTS, 5))  # (B, A, 5, N)
        velocity = draws.pick(u[:, :, :2], 2 * self.speed + 1) - self.speed
        velocity = velocity.mT  # (B, A, N, 2)
        room = SIZE - extent  # (B, N, 2)
        # Each digit is drawn in its first frame, crossing ones in the frame in which they meet.
        largest = extent.amax(1, keepdim=True)  # (B, 1, 2)
        alone = draws.pick(u[:, :, 2:4].mT, room[:, None] + 1)  # (B, A, N, 2)
        shared = draws.pick(u[:, :, 2:4, :1].mT, SIZE + 1 - largest[:, None])  # (B, A, 1, 2)
        shared = shared + ((largest - extent) >> 1)[:, None]
        anchor = torch.where(crossing[..., None, None], shared, alone)
        meet = self.length // 2 + draws.pick(u[:, :, 4, :1], 2)  # (B, A, 1)
        when = torch.where(crossing[..., None], meet, first[:, None])  # (B, A, N)

        latest = first.amax(1)[:, None, None]  # (B, 1, 1): all are there, if they stay
        start = reflect(anchor + velocity * (latest - when)[..., None], room[:, None])
        end = start + extent[:, None]
        apart = (end[:, :, 0] <= start[:, :, 1]) | (end[:, :, 1] <= start[:, :, 0])  # (B, A, 2)
        valid = apart.any(2) | (extent[:, None, 1, 0] == 0)  # the absent come last
        chosen = draws.first_valid(valid)[:, None]  # (B, 1)
        scene = torch.arange(len(chosen), device=chosen.device)[:, None]
        anchor, velocity, when = (x[scene, chosen] for x in (anchor, velocity, when))  # (B, 1, ..)
        time = torch.arange(self.length, device=u.device)[:, None]  # (T, 1)
        return reflect(anchor + velocity * (time - when)[..., None], room[:, None])


def reflect(place: Tensor, room: Tensor) -> Tensor:
    """Positions on a line as ones between walls at 0 and at `room`, integers of any size."""
    period = 2 * room.clamp(min=1)
    place = place % period
    return torch.minimum(place, period - place)
