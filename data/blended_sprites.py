"""Blended sprites: up to three or eight, whose colours add where they overlap.

Specified by Nash et al. 2017 (section 4, appendix A): 64 x 64 images of dSprites' shapes with
random colours, orientations and places; sprites are independent, including whether they exist, up
to a fixed number, three or eight; where they overlap, their RGB values are summed and clipped at
one; training data is always new. By dSprites: square, ellipse, heart; binary sprites.

Assumed:
- A sprite exists with probability 1/2. So the number is binomial, and of scenes of up to three one
  in eight is empty. The background is black: it adds nothing.
- Colour: hue uniform, saturation and value 1. Uniform RGB would hold sprites too dark to count.
- One scale, 0.75, as the paper lists colours, orientations and places only.
- Shape, orientation and centre: uniform, as in data/multi_dsprites.py, whose outlines these are.
  Centres keep a quarter of the image from its edge, so that each sprite is inside the image.

Ours: `sprites_3_32`, 32 x 32, all lengths halved.

Sprites are entities 1 .. N, each of which exists or not, so `present` has gaps by design.
`present` means exists, also of a sprite that others cover. `coverage` is 0 or 1: 1 where the
pixel's centre is inside the sprite's outline, whatever else is there; of the background, where no
sprite is. So image = min(1, sum over e of coverage_e color_e), and a pixel's coverages sum to the
number of sprites there, or to 1 where there is none. In the exclusive `masks` the largest entity
has the pixel, so the mask of a sprite that exists can be empty (of eight, one sprite in 500).
Factors: shape (int64; 0 square, 1 ellipse, 2 heart), color (B, E, 3), scale, orientation (radians,
counter-clockwise as seen; a square is the same after a quarter turn, an ellipse after half a turn),
row, col of the centre in pixels, where pixel i covers [i, i + 1].

Axes: B scenes, E entities, N = E - 1 sprites, H W image.
"""

import torch
from torch import Tensor

from data import Batch, Scenes, draws, make_batch
from data.multi_dsprites import Geometry, pure_hue


class BlendedSprites(Scenes):
    """At most `max_objects` sprites in size x size pixels; `number`: so many, the lowest, in every
    scene, instead of each with probability 1/2."""

    def __init__(self, name: str = "sprites_3", split: str = "train", seed: int = 0,
                 device: str | torch.device = "cpu", size: int = 64, max_objects: int = 3,
                 number: int | None = None):
        super().__init__(name, split, seed, device)
        self.number = number
        self.height = self.width = size
        self.max_objects, self.max_entities = max_objects, max_objects + 1
        self.geometry = Geometry(size, self.device)

    def scenes(self, index: Tensor) -> Batch:
        u = draws.uniform(self.key, index, (7, self.max_objects))
        u[:, 3] = 0.5  # scale 0.75
        exists = u[:, 0] < 0.5  # (B, N)
        if self.number is not None:
            exists[:] = torch.arange(self.max_objects, device=u.device) < self.number
        color = pure_hue(u[:, 1])  # (B, N, 3)
        factors, sprites = self.geometry.pose(u[:, 2:])

        image = u.new_zeros(len(u), 3, self.height, self.width)
        coverage = u.new_zeros(len(u), self.max_entities, self.height, self.width)
        topmost = torch.zeros_like(coverage[:, 1:], dtype=torch.bool)  # (B, N, H, W)
        free = torch.ones_like(topmost[:, 0])  # (B, H, W), no sprite so far
        for k in reversed(range(self.max_objects)):  # from the top
            inside = self.geometry.outline(*(value[:, k] for value in sprites))  # (B, H, W)
            inside &= exists[:, k, None, None]
            coverage[:, k + 1] = inside
            topmost[:, k] = inside & free
            free &= ~inside
            # A product with 0 or 1 is exact and the order is fixed: the same bits on every device.
            image.addcmul_(coverage[:, k + 1, None], color[:, k, :, None, None])
        coverage[:, 0] = free
        factors["color"] = color
        return make_batch(image.clamp_(max=1), topmost, factors, exists, coverage)
