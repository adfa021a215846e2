"""Multi-dSprites: squares, ellipses and hearts that occlude each other, 64 x 64.

Specified by Greff et al. 2019 (appendix B.2): two to five sprites that vary in shape (square,
ellipse, heart), colour ("uniform saturated colors"), scale, position and rotation (all three
continuous), on a background that is grey and varies in brightness; binarized: two or three white
sprites on black. By the published data set (multi_object_datasets): "HSV-random" sprites on grey;
at most 4 and 6 entities. By dSprites: scales 0.5 to 1, binary sprites. Ours: `_levels`, binarized,
but each sprite has a brightness of its own, so that the edges between sprites show.

Assumed:
- Number, shape, scale, orientation in [0, 2 pi) and centre are uniform and independent. Centres
  lie in [16, 48], so that each sprite is inside the image whatever its scale and orientation.
- At scale 1 the square's side is 22 pixels, the ellipse's semi-axes are 15 and 10, the heart is
  26 wide; each covers about 475 pixels, so that size tells nothing of shape.
- On grey: hue uniform, saturation and value 1. Brightness uniform: of the ground in [0, 1], of a
  sprite of `_levels` in [0.25, 1].
- Orientation has 4096 steps (0.02 px at a sprite's rim), its sine and cosine come from a table.
- A pixel is a sprite's where its centre lies inside the outline, without anti-aliasing.

Entities are in depth order, a later one occludes an earlier one. `present` means visible: a sprite
that others hide completely is absent, its mask empty, its factors zero, so `present` can have gaps.
The number of sprites that is uniform counts the hidden ones.
Factors: shape (int64; 0 square, 1 ellipse, 2 heart), color (B, E, C), scale, orientation (radians,
counter-clockwise as seen; a square is the same after a quarter turn, an ellipse after half a turn),
row, col of the centre in pixels, where pixel i covers [i, i + 1].

Axes: B scenes, E entities, N = E - 1 sprites, C H W image.
"""

import math

import torch
from torch import Tensor

from data import Batch, Scenes, draws, make_batch

SHAPES = ("square", "ellipse", "heart")
SIZE = 64
MARGIN = 16.0  # of the centres, in an image of SIZE pixels
ANGLES = 4096
# The outlines are in units of these lengths, in pixels at scale 1 in an image of SIZE pixels.
UNITS = (11.0, 15.0, 11.4)  # half a side, the longer semi-axis, the curve's own unit
HEART_RISE = 0.118  # from the middle of the heart's bounding box down to the curve's own origin


class MultiDSprites(Scenes):
    """`colors`: two to five sprites of a "hue" on grey; two or three "white", "grey" on black."""

    height = width = SIZE

    def __init__(self, name: str = "multi_dsprites_colored_on_grayscale", split: str = "train",
                 seed: int = 0, device: str | torch.device = "cpu", colors: str = "hue"):
        super().__init__(name, split, seed, device)
        self.colors = colors
        self.num_channels, self.max_objects = (3, 5) if colors == "hue" else (1, 3)
        self.max_entities = self.max_objects + 1
        self.geometry = Geometry(SIZE, self.device)

    def scenes(self, index: Tensor) -> Batch:
        u = draws.uniform(self.key, index, (8, self.max_objects))
        u_number, u_ground, u_hue = u[:, 0, :1], u[:, 1, :1], u[:, 7]
        number = 2 + draws.pick(u_number, self.max_objects - 1)
        exists = torch.arange(self.max_objects, device=self.device) < number  # (B, N)
        factors, sprites = self.geometry.pose(u[:, 2:7])
        ground, color = u_ground[..., None].expand(-1, -1, 3), pure_hue(u_hue)  # (B, 1 or N, 3)
        if self.colors != "hue":
            level = torch.ones_like(u_hue) if self.colors == "white" else u_hue * 0.75 + 0.25
            ground, color = torch.zeros_like(ground[..., :1]), level[..., None]

        owner = torch.zeros(len(index), SIZE, SIZE, dtype=torch.uint8, device=self.device)
        for k in range(self.max_objects):  # one by one stays in the cache: twice as fast
            inside = self.geometry.outline(*(value[:, k] for value in sprites))  # (B, H, W)
            owner.masked_fill_(inside & exists[:, k, None, None], k + 1)
        palette = torch.cat([ground, color], 1).mT  # (B, C, E)
        pixels = owner.flatten(1)[:, None].long().expand(-1, self.num_channels, -1)  # (B, C, HW)
        image = palette.gather(2, pixels).unflatten(2, (SIZE, SIZE))  # (B, C, H, W)
        numbers = torch.arange(1, self.max_entities, dtype=torch.uint8, device=self.device)
        factors["color"] = color
        return make_batch(image, owner[:, None] == numbers[:, None, None], factors)


class Geometry:
    """Poses and outlines of sprites in images of size x size; every length is in proportion."""

    def __init__(self, size: int, device: torch.device):
        angles = [math.tau * k / ANGLES for k in range(ANGLES)]
        rows = [angles, [math.cos(a) for a in angles], [math.sin(a) for a in angles]]
        self.angles = torch.tensor(rows, dtype=torch.float32, device=device)  # (3, ANGLES)
        self.units = torch.tensor(UNITS, device=device) * (size / SIZE)
        self.centres = torch.arange(size, device=device) + 0.5  # of the pixels
        self.size, self.margin = size, MARGIN * (size / SIZE)

    def pose(self, u: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Factors of sprites and the arguments of `outline`, (B, N) each, from draws (B, 5, N)."""
        u_shape, u_scale, u_angle, u_row, u_col = u.unbind(1)
        shape = draws.pick(u_shape, len(SHAPES))
        scale = u_scale * 0.5 + 0.5
        orientation, cos, sin = self.angles[:, draws.pick(u_angle, ANGLES)]
        row = u_row * (self.size - 2 * self.margin) + self.margin
        col = u_col * (self.size - 2 * self.margin) + self.margin
        factors = dict(shape=shape, scale=scale, orientation=orientation, row=row, col=col)
        return factors, (shape, scale, cos, sin, row, col)

    def outline(self, shape: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, row: Tensor,
                col: Tensor) -> Tensor:
        """Which pixels' centres are inside each sprite, (...) each -> bool (..., H, W)."""
        scale = self.units[shape] * scale
        cos, sin = cos / scale, sin / scale
        right = self.centres - col[..., None]  # (..., W)
        up = row[..., None] - self.centres  # (..., H)
        is_heart = shape == SHAPES.index("heart")
        # The pixel in the sprite's own frame, x to its right and y up, in units of its size. Both
        # are one sum of a column and a row, the only place where H meets W.
        x = (sin[..., None] * up)[..., None] + (cos[..., None] * right)[..., None, :]
        y_up = cos[..., None] * up + (is_heart * HEART_RISE)[..., None]  # (..., H)
        y = y_up[..., None] - (sin[..., None] * right)[..., None, :]  # (..., H, W)
        xx, yy = x * x, y * y
        ring = xx + yy - 1
        is_square = (shape == SHAPES.index("square"))[..., None, None]
        convex = torch.where(is_square, torch.maximum(xx, yy), xx + yy * 2.25) - 1
        heart = ring * ring * ring - xx * yy * y
        return torch.where(is_heart[..., None, None], heart, convex) <= 0


def pure_hue(u: Tensor) -> Tensor:
    """The colour of saturation and value 1 whose hue is u in [0, 1): (...) -> RGB (..., 3)."""
    hue = u * 6
    red = (hue - 3).abs() - 1
    green = 2 - (hue - 2).abs()
    blue = 2 - (hue - 4).abs()
    return torch.stack([red, green, blue], -1).clamp_(0, 1)
