"""Solids: cubes, spheres and cylinders, ray-cast: a stand-in for CLEVR6, CLEVR.

Scores here are not scores on CLEVR. As in its generator (Johnson et al. 2017): three shapes, two
sizes, two materials, eight colours, x and y in [-3, 3], at least 1/4 between outlines, any turn
about the vertical, a camera moved by up to 1/2 along each axis. As in CLEVR6: 3 to 6 objects. Ours:

- All of it is uniform and independent. Of 64 places the first is taken that is far enough from
  earlier objects, also as seen (HIDES), and whose centre is in the middle four fifths of the image,
  both ways. An object that finds none is left out: in one scene of 25 of up to 10 objects.
- One light with shadows. Glossy solids have a highlight, and mirror surroundings
  whose brightness depends on height alone.
- A pixel is half the colour at its centre and an eighth of that at each corner; a colour is the
  square root of the light.
- `grey`: the luminance of the colours. `exclude` is a (shape, color_id) that only the test split
  shows, e.g. (2, 4), green spheres; the others stay uniform.

Masks show what is at the pixel's centre. `present` means visible: a hidden object (at 32 pixels one
in 900) is absent, its factors zero. Entities are in depth order, the farthest first. Factors:
shape, size, color_id (int64, from 1 in the order below), material (int64, 1 matte, 2 glossy); color
(B, E, C), unlit; x, y, z of the centre; rotation in degrees; row, col of the centre, where pixel i
is [i, i + 1]. Between devices factors are equal, images to 1e-4, masks but for one pixel in 10,000.

A solid is seven numbers: x, y, z of its centre, its radius (0: there is none), cosine and sine of
its turn about the vertical, its shape. Its height is twice its radius; a cube's side is the radius
times sqrt(2). Rays meet solids by + - * /, square roots and comparisons alone, one at a time, which
IEEE 754 rounds correctly and which therefore are the same on every device.

Axes: B scenes, E entities (0 is the ground), N = E - 1 objects, A attempts, R rays, P of them near
a solid, C H W image; x, y, z of a point or direction come first.
"""

import itertools
import math

import torch
from torch import Tensor

from data import Batch, Scenes, draws, make_batch

SHAPES = ("cube", "sphere", "cylinder")
CUBE = math.sqrt(0.5)  # half the side at radius 1
RADII = {"small": 0.35, "large": 0.7}
COLORS = {  # of 255
    "grey": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20),
    "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208),
    "yellow": (255, 238, 51), "ground": (133, 133, 133),
}  # fmt: skip
LUMINANCE = (0.299, 0.587, 0.114)
GROUND = (0, 0, -1e3, 1e3, 1, 0, 3, 9, 1)  # as an object: the top of a wide cylinder
EYE, TARGET, LIGHT = (7.5, -6.5, 5.3), (0.0, 0.0, 0.5), (-2.0, -6.0, 8.0)
ZOOM = 0.29  # half the image's side at distance 1
HIDES = 0.1  # radii of the nearer one, between two centres on the image at distance 1
ATTEMPTS, ANGLES = 64, 4096


class Solids(Scenes):
    """Made for 32 to 128 pixels a side and at most 10 objects."""

    def __init__(self, name: str = "solids_48", split: str = "train", seed: int = 0,
                 device: str | torch.device = "cpu", size: int = 48, min_objects: int = 3,
                 max_objects: int = 6, grey: bool = False,
                 exclude: tuple[int, int] | None = None):
        super().__init__(name, split, seed, device)
        pairs = list(itertools.product(range(1, 4), range(1, 9)))
        if exclude and split != "test":
            pairs.remove(exclude)
        self.pairs = torch.tensor(pairs, device=self.device).mT  # (2, 24 or 23)
        self.height = self.width = size
        self.min_objects, self.max_objects = min_objects, max_objects
        self.max_entities, self.num_channels = max_objects + 1, 1 if grey else 3

        palette = torch.tensor([(0, 0, 0), *COLORS.values()]) / 255
        palette = palette @ torch.tensor(LUMINANCE)[:, None] if grey else palette
        self.palette = palette.to(self.device)  # (10, C)
        self.radii = torch.tensor([0, *RADII.values()], device=self.device)
        angles = [math.tau * k / ANGLES for k in range(ANGLES)]
        turns = [[f(a) for a in angles] for f in (math.degrees, math.cos, math.sin)]
        self.turns = torch.tensor(turns, device=self.device)  # (3, ANGLES)
        self.ground = torch.tensor(GROUND, device=self.device)[:, None, None]
        eye, target, light = torch.tensor([EYE, TARGET, LIGHT])[..., None]  # (3, 1) each
        self.eye, self.light = eye.to(self.device), light[..., None].to(self.device)
        axes, directions = camera(eye, target, size, ZOOM)
        self.axes, self.rays = axes.to(self.device), directions.to(self.device)

    def scenes(self, index: Tensor) -> Batch:
        n = self.max_objects
        u = draws.uniform(self.key, index, (4 + n * (4 + 2 * ATTEMPTS),))
        number = self.min_objects + draws.pick(u[:, :1], n - self.min_objects + 1)
        eye = self.eye + (u[:, 1:4].mT - 0.5)  # (3, B)
        u_pair, u_size, u_material, u_turn, *u_place = u[:, 4:].unflatten(1, (-1, n)).unbind(1)
        shape, color_id = self.pairs[:, draws.pick(u_pair, self.pairs.shape[1])]  # (B, N)
        size, material = draws.pick(u_size, 2) + 1, draws.pick(u_material, 2) + 1
        rotation, cos, sin = self.turns[:, draws.pick(u_turn, ANGLES)]
        radius = self.radii[size]
        z = radius * torch.where(shape == 1, CUBE, 1.0)
        (x, y, up, right, depth), placed = self.place(eye, torch.stack(u_place, 1), radius, z)
        exists = placed & (torch.arange(n, device=self.device) < number)
        row, col = ((ZOOM + v) * (self.height / (2 * ZOOM)) for v in (-up, right))

        order = torch.where(exists, -depth, math.inf).argsort(dim=1, stable=True)
        factors = dict(shape=shape, size=size, material=material, color_id=color_id, x=x, y=y, z=z,
                       rotation=rotation, row=row, col=col)  # fmt: skip
        factors = {name: value.gather(1, order) for name, value in factors.items()}
        factors["color"] = self.palette[factors["color_id"]]  # (B, N, C)
        solids = torch.stack([x, y, z, radius * exists, cos, sin, shape, color_id, material])
        image, owner = self.render(eye[..., None], solids.gather(2, order.expand(9, -1, -1)))
        numbers = torch.arange(1, n + 1, device=self.device)[:, None, None]
        return make_batch(image, owner[:, None] == numbers, factors)

    def place(self, eye: Tensor, u: Tensor, radius: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x, y and `project`'s up, right and depth (5, B, N), and whether a place was found
        (B, N), from draws (B, 2A, N)."""
        x, y = (u * 6 - 3).chunk(2, 1)  # (B, A, N)
        centre = torch.stack([x, y, z[:, None].expand_as(x)])
        seen = project(self.axes, eye[..., None, None], centre)
        valid = torch.maximum(seen[0].abs(), seen[1].abs()) < 0.8 * ZOOM
        tried = torch.stack([x, y, *seen])  # (5, B, A, N)
        chosen = tried[:, :, 0].clone()  # (5, B, N)
        for k in range(self.max_objects):
            x, y, up, right, depth = tried[..., k, None] - chosen[:, :, None, :k]  # (B, A, k)
            one, other = radius[:, None, k, None], radius[:, None, :k]
            gap = one + other + 0.25
            hides = torch.where(depth < 0, one, other) * HIDES
            valid[..., k] &= (x * x + y * y >= gap * gap).all(2)
            valid[..., k] &= (up * up + right * right >= hides * hides).all(2)
            first = draws.first_valid(valid[..., k]).expand(5, 1, -1).mT  # (5, B, 1)
            chosen[..., k] = tried[..., k].gather(2, first)[..., 0]
        return chosen, valid.any(1)

    def render(self, eye: Tensor, solids: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, C, H, W), and entity at each pixel's centre (B, H, W). The rows of solids
        (9, B, N) are the seven numbers of a solid, color_id and material."""
        solids = torch.cat([self.ground.expand(-1, len(solids[0]), 1), solids], 2)  # (9, B, E)
        distance, entity = first_hits(solids[:7], eye, self.rays)  # (B, R) each
        *solid, color_id, material = solids.gather(2, entity.expand(9, -1, -1))  # (B, R) each
        points = eye + self.rays * distance  # (3, B, R)
        normal = normals(torch.stack(solid), points)

        beams = points - self.light
        length = dot(beams, beams).sqrt()
        beams = beams / length
        bright = (-dot(normal, beams)).clamp(min=0) * (130 / (length * length + 10))
        bright = bright * shadows(solids[:7], entity, self.light, beams, length)
        mirrored = self.rays - normal * (dot(self.rays, normal) * 2)
        highlight = (-dot(mirrored, beams)).clamp(min=0) * (bright > 0)
        for _ in range(5):
            highlight = highlight * highlight  # in the end its 32nd power
        matte = normal[2] * 0.1 + bright * 0.85 + 0.3
        glossy = mirrored[2] * (mirrored[2] * 0.4 + 0.22) + bright * 0.45 + 0.22
        color = self.palette[color_id.long()].movedim(2, 0)  # (C, B, R)
        light = color * color * torch.where(material == 2, glossy, matte)
        color = (light + highlight * (material == 2)).clamp(max=1).sqrt()
        s = self.width
        centre = color[..., : s * s].unflatten(2, (s, s))
        corner = color[..., s * s :].unflatten(2, (s + 1, s + 1))
        corner = corner[..., 1:] + corner[..., :-1]
        image = centre * 0.5 + (corner[..., 1:, :] + corner[..., :-1, :]) * 0.125
        return image.movedim(1, 0).contiguous(), entity[:, : s * s].unflatten(1, (s, s))


def camera(eye: Tensor, target: Tensor, size: int, zoom: float) -> tuple[Tensor, Tensor]:
    """Directions (3, 3, 1) to the right, up and forward, and those of rays (3, 1, R).

    The rays go through the centres of size x size pixels, then through their corners. `eye` and
    `target` are (3, 1), `zoom` is half the image's side at distance 1.
    """
    x, y, z = forward = unit(target - eye)
    right = unit(torch.stack([y, -x, 0 * x]))
    up = torch.stack([right[1] * z, -right[0] * z, right[0] * y - right[1] * x])
    lines = (torch.arange(first, 2 * size + 1, 2) / size - 1 for first in (1, 0))
    down, across = torch.cat([torch.cartesian_prod(line, line) for line in lines]).mT * zoom
    rays = unit(forward + right * across - up * down)
    return torch.stack([right, up, forward]), rays[:, None]


def project(axes: Tensor, eye: Tensor, points: Tensor) -> list[Tensor]:
    """Up and right of the middle, on the image at distance 1, and depth, of points (3, B, ...)."""
    right, up, forward = axes.reshape(3, 3, *[1] * (points.ndim - 1))
    away = points - eye
    depth = dot(away, forward)
    return [dot(away, up) / depth, dot(away, right) / depth, depth]


def first_hits(solids: Tensor, eye: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Distance along rays from eyes (3, B, 1) to what is seen, and its entity, (B, R) each."""
    distance = -eye[2] / rays[2]  # of the ground
    entity = torch.zeros_like(distance, dtype=torch.int64)
    for k in range(1, solids.shape[2]):
        begin, end = crossing(solids[..., k], eye, rays)
        hit = (begin < end) & (begin < distance)
        distance = torch.where(hit, begin, distance)
        entity.masked_fill_(hit, k)
    return distance, entity


def shadows(solids: Tensor, entity: Tensor, light: Tensor, beams: Tensor, length: Tensor) -> Tensor:
    """The share of the light (3, 1, 1) that reaches points of entities at the ends of its beams.

    A solid takes as much as the beam's way through it is long, compared with a quarter of that
    from there to the point, so that edges are soft, and softer far away.
    """
    share = torch.ones_like(length)  # (B, R)
    for k in range(1, solids.shape[2]):
        begin, end = crossing(solids[..., k], light, beams)
        between = (begin < end) & (end < length) & (entity != k)
        taken = (end - begin) / ((length - end) * 0.25 + 0.01)
        share = share * torch.where(between, 1 - taken.clamp(max=1), 1)
    return share


def crossing(solid: Tensor, origin: Tensor, rays: Tensor) -> Tensor:
    """How far along rays a solid begins and ends, (2, B, R): begin < end only where they meet it.

    One solid (7, B) a scene; origins (3, B or 1, 1), unit directions (3, B or 1, R).
    """
    away = origin - solid[:3, :, None]  # (3, B, 1)
    along = dot(away, rays)  # (B, R)
    radius = solid[3, :, None]
    # Every point of a solid is within sqrt(2) radii of its centre.
    near = (along * along > dot(away, away) - radius * radius * 2.01) & (radius > 0)
    scene, ray = near.nonzero(as_tuple=True)  # (P,)
    *_, radius, cos, sin, shape = solid[:, scene]
    start = turn(away[:, scene, 0], cos, sin) / radius  # (3, P), in the solid's own frame
    step = turn(rays.expand(-1, len(near), -1)[:, scene, ray], cos, sin) / radius
    half = torch.where(shape == 1, CUBE, 1.0)
    one, other = (half - start) / step, (-half - start) / step
    begin, end = torch.minimum(one, other).amax(0), torch.maximum(one, other).amin(0)
    # Round ones are where a t t + 2 b t + c < 0 too; the vertical does not count for a cylinder.
    flat = torch.stack([step[0], step[1], step[2] * (shape == 2)])
    a, b = dot(flat, step), dot(flat, start)
    c = dot(start, start) - 1 - start[2] * start[2] * (shape != 2)
    root = (b * b - a * c).sqrt()  # NaN, as begin and end then are, where a ray misses
    begin = torch.where(shape == 1, begin, torch.maximum(begin, (-b - root) / a))
    end = torch.where(shape == 1, end, torch.minimum(end, (root - b) / a))
    both = torch.full((2, *along.shape), math.inf, device=along.device)
    both[:, scene, ray] = torch.stack([begin, end])
    return both


def normals(solid: Tensor, points: Tensor) -> Tensor:
    """Unit normals (3, B, R) at points of solids (7, B, R), rounded near the edges."""
    *_, radius, cos, sin, shape = solid
    local = turn(points - solid[:3], cos, sin) / radius
    x, y, z = local * local
    is_cube = shape == 1
    weight = torch.stack([torch.where(is_cube, x, x + y), torch.where(is_cube, y, x + y), z])
    for _ in range(4):  # its 16th power: nearly all on the face, or on the side or the top
        weight = weight * weight
    return unit(turn(local * torch.where(shape == 2, 1.0, weight), cos, -sin))


def turn(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In a frame turned about the vertical; with -sin, back from it."""
    return torch.stack([cos * v[0] + sin * v[1], cos * v[1] - sin * v[0], v[2]])


def dot(a: Tensor, b: Tensor) -> Tensor:
    x, y, z = a * b
    return x + y + z  # in this order; a sum over an axis has its own on each device


def unit(v: Tensor) -> Tensor:
    return v / dot(v, v).sqrt()
