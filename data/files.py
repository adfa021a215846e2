"""Scenes from disk: `data.make(PATH)`, and so `--dataset PATH` of every model. PATH is one of

- a TFRecord file of multi_object_datasets, gzip or not: Tetrominoes, Multi-dSprites, Objects Room,
  CLEVR with masks (data/tfrecords.py says what it takes from them);
- .npz with `image` and, where they are known, `masks`; .npy, images alone. Images are (N, H, W, C),
  (N, C, H, W) or (N, H, W), uint8 or float in [0, 1]; masks (N, H, W), any integers, the smallest
  is the background; or (N, E, H, W), where each pixel is 1 in one mask and 0 in the others;
- a folder of PNG or JPEG pictures, read in RGB.

`PATH@64`, or the option `size`, cuts the centred square out of every image and resizes it to
64 x 64: images bilinear with antialiasing, to 8 bits, masks to the nearest pixel. Without it,
images keep their size, but for CLEVR's, which become 128 x 128.

A file's scenes fall into test, validation and train, 10, 10 and 80 %, by a shuffle that depends on
their number alone. Scene i of a split is entry i of an order of the seed; each pass has its own.

A gzip file cannot be read out of order, and unpacked TFRecords are huge (three bytes for one). So
their first use reads them once, one record at a time, MOST scenes at most, and keeps images and
labels beside the file as `PATH@128.scenes` (6.5 GB for CLEVR), or in the system's temporary folder
where the file's is read-only. Scenes come from the disk when they are asked for; only an .npz is
read into memory.

`present` means visible in the image as it is given; absent entities have zero factors.

Axes: N scenes of a file, B scenes, E entities, C H W image.
"""

import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data import Batch, Scenes, add_background, draws
from data.tfrecords import Scene, owners, read_scenes

MOST = 100_000  # scenes of a TFRecord file
Source = tuple[int, Callable[[int], Scene]]  # the number of scenes, and one of them


class FromDisk(Scenes):
    """Raises ValueError, in one line, for a file that is damaged, of no known kind or too small."""

    def __init__(self, name: str, split: str = "train", seed: int = 0,
                 device: str | torch.device = "cpu", size: int = 0):
        super().__init__(name, split, seed, device)
        stem, _, suffix = name.rpartition("@")
        if suffix.isdecimal() and not Path(name).exists():
            name, size = stem, int(suffix)
        path = Path(name)
        if not name or not path.exists():
            raise ValueError(f"{name}: no data set has this name, and no file or folder")
        count, self.read = open_source(path.resolve(), size, path.stat().st_mtime_ns)
        if count < 3:
            raise ValueError(f"{path}: {count} scenes; each of the three splits needs one")
        held_out = max(1, count // 10)
        order = permutation(draws.make_key("splits of a file"), count)
        parts = order.split([held_out, held_out, count - 2 * held_out])
        self.numbers = parts[("test", "validation", "train").index(split)]  # in the file
        self.key = draws.make_key("order of a file", count, split, seed)
        first = self.read(0)
        self.num_channels, self.height, self.width = first.image.shape
        self.max_entities = first.max_entities

    def scenes(self, index: Tensor) -> Batch:
        scenes = []
        for i in index.tolist():
            epoch, place = divmod(i, len(self.numbers))
            order = permutation(draws.make_key(self.key, epoch), len(self.numbers))
            scenes.append(self.read(int(self.numbers[order[place]])))

        def stack(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(arrays)).to(self.device)

        image = stack([unit(s.image) for s in scenes])  # (B, C, H, W)
        if not self.max_entities:
            return Batch(image, None, None, {})
        entities = torch.arange(self.max_entities, device=self.device)[:, None, None]
        masks = stack([s.labels for s in scenes])[:, None] == entities  # (B, E, H, W)
        visible = masks[:, 1:].flatten(2).any(2)  # (B, N)
        present = add_background(visible)
        present[:, 0] = True
        factors = {}
        for name in scenes[0].factors:
            value = stack([s.factors[name] for s in scenes])[:, 1:]  # (B, N, ...)
            value = value * visible.reshape(visible.shape + (1,) * (value.ndim - 2))
            factors[name] = add_background(value)
        return Batch(image, masks, present, factors)


@lru_cache(maxsize=8)
def permutation(key: int, count: int) -> Tensor:
    """A permutation of 0 .. count-1, int64."""
    return draws.integers(key, torch.arange(count), 2**31).argsort(stable=True)


@lru_cache(maxsize=8)  # the splits of a file share the work
def open_source(path: Path, size: int, changed: int) -> Source:
    """`changed`: when the file was, in nanoseconds."""
    try:
        if path.is_dir():
            return open_pictures(path, size)
        if path.suffix in (".npy", ".npz"):
            return open_arrays(path, size)
        return open_records(path, size, changed)
    except OSError as error:  # may not be read, no space left, no picture
        raise ValueError(f"{path}: {error}") from None


def unit(image: np.ndarray) -> np.ndarray:  # float32 in [0, 1]
    return np.divide(image, 255 if image.dtype == np.uint8 else 1, dtype=np.float32)


def resize(scene: Scene, size: int) -> Scene:
    """The centred square of a scene, size x size; the scene as it is for size 0."""
    image, labels, _, factors = scene
    if not size or image.shape[1:] == (size, size):
        return scene
    side = min(image.shape[1:])
    top, left = ((n - side) // 2 for n in image.shape[1:])
    window = slice(top, top + side), slice(left, left + side)
    square = torch.from_numpy(unit(image[:, *window]))[None]
    image = F.interpolate(square, (size, size), mode="bilinear", antialias=True)[0]
    image = (image.clamp(0, 1) * 255).round().byte().numpy()
    if labels is not None:
        nearest = ((np.arange(size) + 0.5) * side / size).astype(int)
        labels = labels[window][np.ix_(nearest, nearest)]
    places = {name: start for name, start in (("row", top), ("col", left)) if name in factors}
    scale = np.float32(size / side)
    moved = {name: (factors[name] - start) * scale for name, start in places.items()}
    return scene._replace(image=image, labels=labels, factors=factors | moved)


def open_records(path: Path, size: int, changed: int) -> Source:
    """Keeps what the TFRecord file holds as one array of records, made when there is none."""
    first = next(read_scenes(path), None)
    if first is None:
        raise ValueError(f"{path}: empty")
    size = size or min(128, first.image.shape[1])

    def parts(scene: Scene) -> dict[str, np.ndarray]:
        scene = resize(scene, size)
        return {"image": scene.image, "labels": scene.labels, **scene.factors}

    layout = np.dtype([(name, p.dtype, p.shape) for name, p in parts(first).items()])
    folder = path.parent if os.access(path.parent, os.W_OK) else Path(tempfile.gettempdir())
    kept = folder / f"{path.name}@{size}.scenes"
    if not kept.exists() or kept.stat().st_mtime_ns != changed:  # it bears the file's own time
        print(f"reading up to {MOST:,} scenes of {path}, once, into {kept}")
        growing = kept.with_name(f"{kept.name}.{os.getpid()}")
        try:
            with open(growing, "wb") as file:
                for scene in tqdm(islice(read_scenes(path), MOST), unit=" scenes", disable=None):
                    file.write(np.array(tuple(parts(scene).values()), layout).tobytes())
            os.utime(growing, ns=(changed, changed))
            growing.replace(kept)
        finally:
            growing.unlink(missing_ok=True)
    scenes = np.memmap(kept, layout, "r")

    def read(number: int) -> Scene:
        values = {name: scenes[number][name] for name in layout.names}
        return Scene(values.pop("image"), values.pop("labels"), first.max_entities, values)

    return len(scenes), read


def open_pictures(folder: Path, size: int) -> Source:
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise ValueError(f"{folder}: no PNG or JPEG picture in this folder")

    def read(number: int) -> Scene:
        try:
            with Image.open(files[number]) as picture:
                image = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        except OSError as error:
            raise ValueError(f"{files[number]}: {error}") from None
        return resize(Scene(image), size)

    sizes = set()
    for file in files if not size else ():
        with Image.open(file) as picture:  # reads the header alone
            sizes.add(picture.size)
    if len(sizes) > 1:
        raise ValueError(f"{folder}: pictures of {len(sizes)} sizes; {folder.name}@64 resizes them")
    return len(files), read


def open_arrays(path: Path, size: int) -> Source:
    """Where there are masks, or floats, every scene is checked at once, which reads the file."""
    image, masks = load_arrays(path)
    shape = image.shape
    image = image[..., None] if image.ndim == 3 else image
    if image.ndim == 4 and image.shape[3] in (1, 3):
        image = image.transpose(0, 3, 1, 2)
    if image.ndim != 4 or image.shape[1] not in (1, 3):
        raise ValueError(f"{path}: image is {shape}, not (N, H, W, 1 or 3) or (N, 1 or 3, H, W)")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise ValueError(f"{path}: image must be uint8 or float in [0, 1], not {image.dtype}")
    if masks is not None:
        n, _, *pixels = image.shape
        if masks.ndim not in (3, 4) or (masks.shape[0], *masks.shape[-2:]) != (n, *pixels):
            raise ValueError(f"{path}: masks {masks.shape} do not fit image {shape}")
        background = masks.min() if masks.size else 0

    def load(number: int) -> Scene:
        pixels = np.array(image[number])
        if pixels.dtype != np.uint8 and not ((pixels >= 0) & (pixels <= 1)).all():
            raise ValueError(f"{path}: image {number} is not in [0, 1]")
        if masks is None:
            return Scene(pixels)
        try:
            return Scene(pixels, *entities(np.array(masks[number]), background))
        except ValueError as error:
            raise ValueError(f"{path}: masks {number}: {error}") from None

    most = 0
    if masks is not None or image.dtype != np.uint8:
        most = max((load(number).max_entities for number in range(len(image))), default=0)
    return len(image), lambda number: resize(load(number)._replace(max_entities=most), size)


def entities(mask: np.ndarray, background: int) -> tuple[np.ndarray, int]:
    """The entity of each pixel (H, W), and how many there are, from labels or one-hot masks."""
    if mask.ndim == 3:
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"one-hot masks hold 0 and 1, not {mask.max():g}")
        return owners(mask == 1), len(mask)
    if mask.dtype.kind not in "biu":
        raise ValueError(f"labels must be integers, not {mask.dtype}")
    values = np.unique(mask[mask != background])
    return np.where(mask == background, 0, np.searchsorted(values, mask) + 1), len(values) + 1


def load_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """`image` and `masks`: those of an .npz in memory, an .npy on the disk."""
    try:
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, mode="r"), None
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as arrays:
            if "image" not in arrays:
                raise ValueError(f"no array `image`, but {', '.join(arrays) or 'nothing'}")
            return arrays["image"], arrays.get("masks")
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from None
