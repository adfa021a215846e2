"""Tetrominoes: three coloured pieces of four cells, without overlap, on black.

Specified by Greff et al. 2019 (appendix B.3): 35 x 35 pixels, three random pieces without overlap,
blocks of 5 x 5 pixels, each piece in one of six colours. The paper says 17 different pieces,
counting rotations; the published file has 19, all fixed tetrominoes (issue 10 of the repository
multi_object_datasets, whose author read all of it); so 19 are drawn here. Read off its images and
records: the pieces and their numbers, the shading of a cell, pixel offsets that are on no grid,
pieces that lie fully inside and may touch.

Assumed: shapes and colours are uniform and independent, repetition allowed; given the shapes,
positions are uniform over all placements without overlap.

So positions alone are redrawn: of `ATTEMPTS` placements the first valid one wins. One is valid with
probability 0.145 (0.10 for the worst three shapes), so all fail in less than a scene in 10**11.

`mini_tetrominoes` is ours: flat cells of 2 x 2 pixels in 14 x 14, all else the same. In the scenes
of `tetrominoes_distinct` and `mini_tetrominoes_distinct`, ours too, no two pieces have one colour.

`present` means exists, and so visible. Factors: shape (int64, the numbers below), color_id (int64,
of mini_sprites.COLORS), color (B, E, 3); row, col (published: x, y) of the box's top left pixel.

Axes: B scenes, E = 4 entities, N = 3 pieces, A attempts, S = 19 shapes, C H W image.
"""

import torch
from torch import Tensor

from data import Batch, Scenes, draws, make_batch
from data.mini_sprites import COLORS, stamp

PIECES = dict(enumerate((  # number: rows from top to bottom
    "####", "#/#/#/#", "###/#..", "#../###", "..#/###", "###/..#", "##/.#/.#", ".#/.#/##",
    "##/#./#.", "#./#./##", "##./.##", ".##/##.", ".#/##/#.", "#./##/.#", ".#./###", "###/.#.",
    ".#/##/.#", "#./##/#.", "##/##",
), 1))  # fmt: skip
CELLS = [
    [(i, j) for i, line in enumerate(piece.split("/")) for j, c in enumerate(line) if c == "#"]
    for piece in PIECES.values()
]
TILES = {  # the light on one cell, of 255; it multiplies the colour
    "shaded": [
        [191, 255, 255, 255, 223],
        [127, 159, 159, 159, 191],
        [127, 159, 159, 159, 191],
        [127, 159, 159, 159, 191],
        [95, 63, 63, 63, 127],
    ],
    "flat": [[255] * 2] * 2,
}
NUM_PIECES = 3
SIDE = 7  # the image, in cells
ATTEMPTS = 256


class Tetrominoes(Scenes):
    """`tile` is a key of TILES; `distinct`: the colours of a scene differ."""

    max_entities = NUM_PIECES + 1

    def __init__(self, name: str = "tetrominoes", split: str = "train", seed: int = 0,
                 device: str | torch.device = "cpu", tile: str = "shaded", distinct: bool = False):
        super().__init__(name, split, seed, device)
        self.distinct = distinct
        self.cell = cell = len(TILES[tile])  # its side in pixels
        self.height = self.width = self.size = SIDE * cell
        extent = torch.tensor([[max(axis) + 1 for axis in zip(*c, strict=True)] for c in CELLS])
        self.places = (self.size - cell * extent + 1).to(self.device)  # (S, 2) rows, columns
        self.stencils = make_stencils(TILES[tile]).to(self.device)
        self.cells = (torch.tensor(CELLS).short() * cell).to(self.device)  # (S, 4, 2), in pixels
        self.colors = torch.tensor(COLORS, dtype=torch.float32, device=self.device)

    def scenes(self, index: Tensor) -> Batch:
        u = draws.uniform(self.key, index, (2 + 2 * ATTEMPTS, NUM_PIECES))
        shape = draws.pick(u[:, 0], len(PIECES))  # (B, N), a position in PIECES
        color_id = draws.pick(u[:, 1], len(COLORS))
        if self.distinct:
            order = draws.uniform(self.key + 1, index, (len(COLORS),)).argsort(dim=1, stable=True)
            color_id = order[:, :NUM_PIECES]
        color = self.colors[color_id]  # (B, N, 3)
        row, col = self.place(shape, u[:, 2:])  # (B, N)

        levels = stamp(self.stencils, shape, row, col, self.size)  # (B, N, H, W)
        # Without overlap each sum has one term at most and is exact in any order.
        image = (levels[:, :, None] * color[..., None, None]).sum(1)  # (B, 3, H, W)
        factors = dict(shape=shape + 1, color_id=color_id, color=color)
        factors |= dict(row=row.float(), col=col.float())
        return make_batch(image, levels > 0, factors)

    def place(self, shape: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns (B, N) of the first attempt without overlap; u (B, 2A, N) in [0, 1)."""
        rows_of, cols_of = self.places[shape][:, None].unbind(-1)  # (B, 1, N)
        u_row, u_col = u.chunk(2, dim=1)
        row, col = draws.pick(u_row, rows_of), draws.pick(u_col, cols_of)  # (B, A, N)
        one, other = [0, 0, 1], [1, 2, 2]  # the three pairs
        cells = self.cells[shape]  # (B, N, 4, 2)
        apart = cells[:, other, None] - cells[:, one, :, None]  # (B, 3, 4, 4, 2)
        near = torch.ones((), dtype=torch.bool, device=u.device)
        for place, between in zip((row, col), apart[:, None].unbind(-1), strict=True):
            offset = (place[..., other] - place[..., one]).short()[..., None, None]
            near = near & ((offset + between).abs() < self.cell)  # (B, A, 3, 4, 4)
        chosen = draws.first_valid(~near.flatten(2).any(2))  # (B,)
        scene = torch.arange(len(chosen), device=chosen.device)
        return row[scene, chosen], col[scene, chosen]


def make_stencils(tile: list[list[int]]) -> Tensor:
    """The pieces' light in [0, 1], a border of zeros: float32 (S, 4 cells + 2, 4 cells + 2)."""
    light = torch.tensor(tile, dtype=torch.float32) / 255
    cell = len(tile)
    stencils = torch.zeros(len(PIECES), 4 * cell + 2, 4 * cell + 2)
    for stencil, cells in zip(stencils, CELLS, strict=True):
        for i, j in cells:
            top, left = 1 + i * cell, 1 + j * cell
            stencil[top : top + cell, left : left + cell] = light
    return stencils
