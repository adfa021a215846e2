"""Shapes: three white triangles and squares on black, 28 x 28, binary.

Specified by Greff et al. 2019 (appendix B.4), who use the data of Reichert & Serre 2013: binary
images of 28 x 28 pixels, each with three random shapes out of upward triangle, downward triangle
and square.

Assumed: shapes are uniform, with repetition; each fills a box of 9 x 9 pixels, whose position is
uniform over the pixel positions inside the image, independently of the others. So shapes overlap;
being all white they then merge in the image, while in the masks the topmost wins.

Ours: `shapes_levels`, the same scenes, but each shape has a brightness of its own, uniform in
[0.25, 1], so that the edges between shapes show.

Entities are in depth order, a later one occludes an earlier one. `present` means visible: a shape
of whose mask nothing is left is absent, its factors zero, so `present` can have gaps.
Factors: shape (int64; 0 upward triangle, 1 downward triangle, 2 square), row, col of the box's top
left pixel, brightness.

Axes: B scenes, E = 4 entities, N = 3 shapes, C H W image.
"""

import torch
from torch import Tensor

from data import Batch, Scenes, draws, make_batch
from data.mini_sprites import make_stencils, stamp

SHAPES = ("triangle", "downward", "square")
SIZE = 28
BOX = 9
NUM_SHAPES = 3


class Shapes(Scenes):
    """`levels`: a brightness for each shape, instead of white."""

    num_channels = 1
    height = width = SIZE
    max_entities = NUM_SHAPES + 1

    def __init__(self, name: str = "shapes", split: str = "train", seed: int = 0,
                 device: str | torch.device = "cpu", levels: bool = False):
        super().__init__(name, split, seed, device)
        self.key = draws.make_key("shapes", split, seed)  # also of those with levels
        self.levels = levels
        self.stencils = make_stencils(BOX, SHAPES).to(self.device)  # (3, BOX+2, BOX+2)

    def scenes(self, index: Tensor) -> Batch:
        u = draws.uniform(self.key, index, (4, NUM_SHAPES))
        u_shape, u_row, u_col, u_level = u.unbind(1)  # (B, N) each
        shape = draws.pick(u_shape, len(SHAPES))  # (B, N)
        row = draws.pick(u_row, SIZE - BOX + 1)
        col = draws.pick(u_col, SIZE - BOX + 1)
        level = u_level * 0.75 + 0.25 if self.levels else torch.ones_like(u_level)

        inside = stamp(self.stencils, shape, row, col, SIZE) > 0  # (B, N, H, W)
        numbers = torch.arange(1, self.max_entities, device=self.device)[:, None, None]
        inside = numbers == (inside * numbers).amax(1, keepdim=True)  # the topmost, (B, N, H, W)
        # Each pixel is in one shape at most, so a sum is exact in any order.
        image = (inside * level[..., None, None]).sum(1, keepdim=True)  # (B, 1, H, W)
        factors = dict(shape=shape, row=row.float(), col=col.float(), brightness=level)
        return make_batch(image, inside, factors)
