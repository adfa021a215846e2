"""Small squares, discs and triangles on black: the quick presets' data.

Ours. A laptop can learn it in minutes; the number of objects varies, shapes and colours repeat.

- Uniform, with repetition: the number of objects, min_objects .. max_objects; shape (0 square,
  1 disc, 2 triangle); colour (0 to 5: red, green, blue, cyan, magenta, yellow).
- Objects are placed one after the other, each uniformly over the pixel positions that are left:
  its bounding box lies inside the image and overlaps no earlier one. Boxes may touch.
- `shaded` multiplies an object's colour by a brightness uniform in [0.5, 1] and by a gradient that
  falls from 1 at the box's top left to 0.7 at its bottom right.
- `exclude` is a (shape, colour) that only the test split shows (Greff et al. 2019, Fig. 7); the
  others stay uniform.

Connected components of one hue find nearly all objects where each has its own colour. In
`mini_sprites_16_same_color` (one colour a scene) only form tells them apart: each box but the first
touches an earlier one, at an edge or a corner, and such components score ARI-FG 0.33.

`present` means exists, and so visible, as nothing overlaps; objects are entities 1 .. number.
Factors: shape, color_id (int64); color (B, E, 3), as it is multiplied; row, col of the bounding
box's top left pixel; brightness (1 where not shaded).

Axes: B scenes, E entities, N = E - 1 objects, S stencils, P positions along a side, H W image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data import Batch, Scenes, draws, make_batch

COLORS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0))
SHAPES = ("square", "disc", "triangle")


class MiniSprites(Scenes):
    """size and sprite are sides in pixels. same_color: all objects of a scene, which touch.

    Raises ValueError where max_objects might not fit.
    """

    def __init__(self, name: str = "mini_sprites", split: str = "train", seed: int = 0,
                 device: str | torch.device = "cpu", size: int = 12, sprite: int = 4,
                 min_objects: int = 2, max_objects: int = 3, shaded: bool = False,
                 same_color: bool = False, exclude: tuple[int, int] | None = None):
        super().__init__(name, split, seed, device)
        # Of positions 2 * sprite - 1 apart, one object blocks at most one, so this many objects
        # fit wherever the ones before them went.
        room = ((size - sprite) // (2 * sprite - 1) + 1) ** 2 if 1 <= sprite <= size else 0
        if not 1 <= min_objects <= max_objects <= room:
            raise ValueError(f"{min_objects} to {max_objects} objects of {sprite} px need not fit "
                             f"into {size} px (at most {room} always do)")  # fmt: skip
        pairs = [(i, j) for i in range(len(SHAPES)) for j in range(len(COLORS))]
        self.excluded = pairs.index(exclude) if exclude and split != "test" else None
        self.height = self.width = self.size = size
        self.sprite, self.shaded, self.same_color = sprite, shaded, same_color
        self.min_objects, self.max_objects = min_objects, max_objects
        self.max_entities = max_objects + 1
        self.stencils = make_stencils(sprite, SHAPES, shaded).to(self.device)
        self.colors = torch.tensor(COLORS, dtype=torch.float32, device=self.device)

    def scenes(self, index: Tensor) -> Batch:
        u = draws.uniform(self.key, index, (5, self.max_objects))
        u_shape, u_color, u_position, u_light, u_number = u.unbind(1)  # (B, N) each
        span = self.max_objects - self.min_objects + 1
        number = self.min_objects + draws.pick(u_number[:, :1], span)
        exists = torch.arange(self.max_objects, device=self.device) < number  # (B, N)
        shape, color_id = draws.pick(u_shape, len(SHAPES)), draws.pick(u_color, len(COLORS))
        if self.excluded is not None:
            pair = draws.pick(u_shape, len(SHAPES) * len(COLORS) - 1)
            pair += pair >= self.excluded
            shape, color_id = pair // len(COLORS), pair % len(COLORS)
        if self.same_color:
            color_id = color_id[:, :1].expand_as(shape)
        color = self.colors[color_id]  # (B, N, 3)
        # A multiple of 2**-24 halved is exact, and so is its sum with one half.
        light = u_light * 0.5 + 0.5 if self.shaded else torch.ones_like(u_light)
        row, col = self.place(u_position)  # (B, N)

        levels = stamp(self.stencils, shape, row, col, self.size)  # (B, N, H, W)
        levels = levels * (light * exists)[..., None, None]
        # Boxes do not overlap, so each sum has one term at most and is exact in any order.
        image = (levels[:, :, None] * color[..., None, None]).sum(1)  # (B, 3, H, W)
        factors = dict(shape=shape, color_id=color_id, color=color, row=row.float(),
                       col=col.float(), brightness=light)  # fmt: skip
        return make_batch(image, levels > 0, factors, exists)

    def place(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the objects, each uniform over what the earlier ones left free.

        u (B, N) in [0, 1) -> two int64 (B, N).
        """
        side = self.size - self.sprite + 1  # P
        positions = torch.arange(side, device=u.device)
        free = torch.ones(len(u), side * side, dtype=torch.bool, device=u.device)  # (B, P*P)
        beside = torch.zeros_like(free)  # where a box would touch one that is there
        rows, cols = [], []
        for k in range(self.max_objects):
            # A free box moved towards another, a pixel at a time, is beside it before it overlaps.
            allowed = free & beside if self.same_color and k else free
            seen = allowed.cumsum(1)
            # The chosen position is the first at which `chosen` + 1 allowed ones have been seen.
            chosen = draws.pick(u[:, k : k + 1], seen[:, -1:])
            place = (seen <= chosen).sum(1, keepdim=True)  # (B, 1)
            row = place // side
            col = place - row * side
            down, across = (positions - row).abs(), (positions - col).abs()  # (B, P)
            apart = torch.maximum(down[:, :, None], across[:, None]).flatten(1)  # (B, P*P)
            free, beside = free & (apart >= self.sprite), beside | (apart == self.sprite)
            rows.append(row)
            cols.append(col)
        return torch.cat(rows, 1), torch.cat(cols, 1)


def stamp(stencils: Tensor, shape: Tensor, row: Tensor, col: Tensor, size: int) -> Tensor:
    """Place stencil `shape` with its top-left pixel at (row, col) of an empty size x size image.

    stencils (S, h, w) with a border of zeros; shape, row, col int64 (B, N) -> (B, N, size, size).
    """
    _, h, w = stencils.shape
    pixels = torch.arange(size, device=stencils.device) + 1  # + 1 for the border, where all else is
    y = (pixels - row[..., None]).clamp_(0, h - 1)  # (B, N, H)
    x = (pixels - col[..., None]).clamp_(0, w - 1)  # (B, N, W)
    line = (shape[..., None] * h + y) * w  # (B, N, H)
    return stencils.flatten()[line[..., None] + x[..., None, :]]  # (B, N, H, W)


def make_stencils(side: int, shapes: Sequence[str], shaded: bool = False) -> Tensor:
    """The light of each shape, with a border of zeros: float32 (S, side+2, side+2)."""
    stencils = torch.zeros(len(shapes), side + 2, side + 2)
    for i in range(side):
        for j in range(side):
            # Twice the distance from the box's centre lines to the pixel's centre, an integer.
            down, across = abs(2 * i + 1 - side), abs(2 * j + 1 - side)
            inside = dict(square=True, disc=down**2 + across**2 <= side**2,
                          triangle=across <= i + 1, downward=across <= side - i)  # fmt: skip
            level = 1 - 0.3 * (i + j) / max(2 * side - 2, 1) if shaded else 1.0
            stencils[:, i + 1, j + 1] = level * torch.tensor([inside[shape] for shape in shapes])
    return stencils
