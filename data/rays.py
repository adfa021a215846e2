"""Rays and cubes, spheres and cylinders that stand on the ground: hits, shadows, normals.

A solid is seven numbers: x, y, z of its centre, its radius (0: there is none), cosine and sine of
its turn about the vertical, its shape (1 cube, 2 sphere, 3 cylinder). Its height is twice its
radius; a cube's side is the radius times sqrt(2), so that its base has that radius.

All of it is + - * /, square roots and comparisons, one operation at a time, which IEEE 754 rounds
correctly. Those alone are the same on every device.

Axes: B scenes, E entities (0 is the ground), R rays, P of them near a solid; x, y, z of a point or
direction come first.
"""

import math

import torch
from torch import Tensor

CUBE = math.sqrt(0.5)  # half the side at radius 1


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
