"""Scenes from disk: `data.make(PATH)`, and so `--dataset PATH` of every model. PATH is one of

- a TFRecord file of multi_object_datasets, gzip or not, read without TensorFlow: Tetrominoes,
  Multi-dSprites, Objects Room (its first four entities are the background), CLEVR with masks (rows
  29:221, columns 64:256). The numbers of bytes of image and masks tell which it is (FORMATS).
  Factors keep the file's names and units;
- .npz with `image` and, where they are known, `masks`; .npy, images alone. Images are (N, H, W, C),
  (N, C, H, W) or (N, H, W), uint8 or float in [0, 1]; masks (N, H, W), any integers, the smallest
  is the background; or (N, E, H, W), where each pixel is 1 in one mask and 0 in the others;
- a folder of PNG or JPEG pictures, read in RGB.

`PATH@64` cuts the centred square out of every record or picture and resizes it to 64 x 64: images
bilinear with antialiasing, to 8 bits, masks to the nearest pixel. Positions among the factors stay.

A file's scenes fall into test, validation and train, 10, 10 and 80 %, by a shuffle that depends on
their number alone. Scene i of a split is entry i of an order of the seed; each pass has its own.
`present` means visible.

Records and pictures, packed as they are, are read once, one scene at a time, MOST at most, and kept
beside PATH as `PATH@64.scenes` (6.5 GB for CLEVR@128). Where that may not be written, a link to
PATH in another folder will do.

Axes: N scenes of a file, B scenes, E entities, C H W image.
"""

import gzip
import os
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data import Batch, Scenes, draws, make_batch

FORMATS = {  # bytes of image and of masks: H, W, C, E; is E the last axis of the masks?
    (h * w * c, h * w * e): (h, w, c, e, last)
    for h, w, c, e, last in (
        (35, 35, 3, 4, False),  # Tetrominoes
        (64, 64, 1, 4, True),  # Multi-dSprites, binarized
        (64, 64, 3, 6, True),  # colored_on_grayscale
        (64, 64, 3, 5, True),  # colored_on_colored
        *((64, 64, 3, e, False) for e in (4, 7, 10)),  # Objects Room: empty, usual, six objects
        (240, 320, 3, 11, False),  # CLEVR with masks
    )
}
LARGEST = 2**24  # bytes of a record; CLEVR's have 3 million
MOST = 100_000  # scenes of a file
Arrays = dict[str, np.ndarray]  # image; labels and max_entities, where known; factors


class FromDisk(Scenes):
    """Raises ValueError, in one line, for a file that is damaged, of no known kind or too small."""

    def __init__(self, name: str, split: str = "train", seed: int = 0,
                 device: str | torch.device = "cpu"):
        super().__init__(name, split, seed, device)
        stem, _, suffix = name.rpartition("@")
        size = int(suffix) if suffix.isdecimal() and not Path(name).exists() else 0
        path = Path(stem if size else name)
        changed = max(p.stat().st_mtime_ns for p in (path, *path.glob("*")))
        self.arrays = open_source(path.absolute(), size, changed)
        count, *shape = self.arrays["image"].shape
        self.num_channels, self.height, self.width = shape
        if count < 3:
            raise ValueError(f"{path}: {count} scenes; each of the three splits needs one")
        held_out = max(1, count // 10)
        order = permutation(draws.make_key("splits of a file"), count)
        parts = order.split([held_out, held_out, count - 2 * held_out])
        self.numbers = parts[("test", "validation", "train").index(split)]  # in the file
        self.count = len(self.numbers)
        self.key = draws.make_key("order of a file", count, split, seed)
        self.max_entities = int(self.arrays["max_entities"][0]) if "labels" in self.arrays else 0

    def scenes(self, index: Tensor) -> Batch:
        numbers = []
        for i in index.tolist():
            epoch, place = divmod(i, len(self.numbers))
            order = permutation(draws.make_key(self.key, epoch), len(self.numbers))
            numbers.append(int(self.numbers[order[place]]))
        arrays = {name: values[numbers] for name, values in self.arrays.items()}  # from the disk
        image = torch.from_numpy(unit(arrays.pop("image"))).to(self.device)
        if not self.max_entities:
            return Batch(image, None, None, {})
        del arrays["max_entities"]
        labels = torch.from_numpy(arrays.pop("labels").astype(np.int64)).to(self.device)
        objects = torch.arange(1, self.max_entities, device=self.device)[:, None, None]
        factors = {name: torch.from_numpy(values[:, 1:]).to(self.device)
                   for name, values in arrays.items()}  # fmt: skip
        return make_batch(image, labels[:, None] == objects, factors)


@lru_cache(maxsize=8)
def permutation(key: int, count: int) -> Tensor:
    """A permutation of 0 .. count-1, int64."""
    return draws.integers(key, torch.arange(count), 2**31).argsort(stable=True)


@lru_cache(maxsize=8)  # the splits of a file share the work
def open_source(path: Path, size: int, changed: int) -> Arrays:
    """All scenes of a file or folder; `changed`: when it (or a file in it) was, nanoseconds."""
    try:
        if path.is_dir():
            scenes = read_pictures(path)
        elif path.suffix.lower() in (".npy", ".npz"):
            if size:
                raise ValueError(f"arrays keep their size, and are not cut to {size} x {size}")
            return read_arrays(path)
        else:
            scenes = read_records(path)
        return keep(scenes, path, size, changed)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def keep(scenes: Iterator[Arrays], path: Path, size: int, changed: int) -> Arrays:
    """The scenes from a file beside `path`, which is made first where it is not there."""
    scenes = (resize(scene, size) for scene in islice(scenes, MOST))
    first = next(scenes, None)
    if first is None:
        raise ValueError("no scene, and no PNG or JPEG picture")
    layout = np.dtype([(name, np.asarray(v).dtype, np.shape(v)) for name, v in first.items()])
    most = first.get("max_entities", 0)
    kept = path.with_name(path.name + f"@{size}" * bool(size) + ".scenes")
    if not kept.exists() or kept.stat().st_mtime_ns != changed:  # it bears the file's own time
        print(f"reading up to {MOST:,} scenes of {path}, once, into {kept}")
        growing = kept.with_name(f"{kept.name}.{os.getpid()}")
        try:
            with open(growing, "wb") as file:
                for scene in tqdm(chain([first], scenes), unit=" scenes", disable=None):
                    if scene["image"].shape != first["image"].shape:
                        raise ValueError(f"images of several sizes; {path.name}@64 resizes them")
                    if scene.keys() != first.keys() or scene.get("max_entities", 0) != most:
                        raise ValueError("not all scenes have the same factors and entities")
                    values = tuple(scene[name] for name in layout.names)  # in any order in files
                    file.write(np.array(values, layout).tobytes())
            os.utime(growing, ns=(changed, changed))
            growing.replace(kept)
        finally:
            growing.unlink(missing_ok=True)
    table = np.memmap(kept, layout, "r")
    return {name: table[name] for name in layout.names}


def resize(scene: Arrays, size: int) -> Arrays:
    """The centred square of a scene, size x size; the scene as it is for size 0."""
    image, labels = scene["image"], scene.get("labels")
    if not size or image.shape[1:] == (size, size):
        return scene
    side = min(image.shape[1:])
    top, left = ((n - side) // 2 for n in image.shape[1:])
    window = slice(top, top + side), slice(left, left + side)
    square = torch.from_numpy(unit(image[:, *window]))[None]
    image = F.interpolate(square, (size, size), mode="bilinear", antialias=True)[0]
    cut = dict(image=(image.clamp(0, 1) * 255).round().byte().numpy())
    if labels is not None:
        nearest = ((np.arange(size) + 0.5) * side / size).astype(int)
        cut["labels"] = labels[window][np.ix_(nearest, nearest)]
    return scene | cut


def unit(image: np.ndarray) -> np.ndarray:  # float32 in [0, 1]
    return np.divide(image, 255 if image.dtype == np.uint8 else 1, dtype=np.float32)


def read_pictures(folder: Path) -> Iterator[Arrays]:
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in (".png", ".jpg", ".jpeg"):
            try:
                with Image.open(file) as picture:
                    if picture.mode[0] in "IF":
                        raise ValueError("more than 8 bits a channel")
                    upright = ImageOps.exif_transpose(picture).convert("RGB")
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"{file.name}: {error}") from None
            yield dict(image=np.asarray(upright).transpose(2, 0, 1))


def read_arrays(path: Path) -> Arrays:
    """Those of an .npz in memory, an .npy on the disk, where floats are read once, as a check."""
    arrays = np.load(path, mmap_mode="r")
    if path.suffix.lower() == ".npy":
        arrays = {"image": arrays}
    if "image" not in arrays:
        raise ValueError(f"no array `image`, but {', '.join(arrays) or 'nothing'}")
    image, masks = arrays["image"], arrays.get("masks")
    shape, kind = image.shape, image.dtype
    image = image[..., None] if image.ndim == 3 else image
    image = np.moveaxis(image, -1, 1) if image.ndim == 4 and image.shape[3] in (1, 3) else image
    if image.ndim != 4 or image.shape[1] not in (1, 3) or not (
        image[:100].max(initial=0) != 1 if kind == np.uint8 else
        kind.kind == "f" and image.min(initial=0) >= 0 and image.max(initial=0) <= 1
    ):
        raise ValueError(f"image must be (N, H, W, 1 or 3) or (N, 1 or 3, H, W), of uint8 in 0 to "
                         f"255 or of floats in [0, 1], not {shape} of {kind}")  # fmt: skip
    if masks is None:
        return {"image": image}
    fits = (len(masks), *masks.shape[-2:]) == (len(image), *image.shape[2:])
    if not fits or masks.ndim not in (3, 4):
        raise ValueError(f"masks {masks.shape} do not fit image {shape}")
    if masks.ndim == 4:
        labels, most = owners(masks), masks.shape[1]
    else:
        values = np.unique(masks)
        if masks.dtype.kind not in "biu" or len(values) > 256:
            raise ValueError("masks (N, H, W) must be up to 256 different integers, not "
                             f"{len(values)} of {masks.dtype}")  # fmt: skip
        labels, most = np.searchsorted(values, masks).astype(np.uint8), len(values)
    return dict(image=image, labels=labels, max_entities=np.full(len(image), most))


# -- TFRecords -------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[Arrays]:
    """The scenes of a file, as `to_scene` gives them; ValueError where it is damaged or another's.

    A record is its length (8 bytes, little-endian), a checksum (4), a message, a checksum (4).
    Checksums are not compared: damage shows in sizes and masks.
    """
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            while header := file.read(12):
                length = int.from_bytes(header[:8], "little")
                if length > LARGEST:
                    raise ValueError("no TFRecord")
                payload = file.read(length + 4)
                if len(payload) < length + 4:
                    raise EOFError("truncated")
                yield to_scene(parse_example(payload[:-4]))
                number += 1
    except (OSError, EOFError, zlib.error, ValueError, LookupError) as error:
        raise ValueError(f"record {number}: {error}") from None


def parse_example(payload: bytes) -> Arrays:
    """The features of a tf.train.Example, a protobuf message: uint8 or float32, flat."""
    features = {}
    for _, entries in fields(payload):
        for _, entry in fields(entries):
            pair = dict(fields(entry))  # 1: the name, 2: the feature
            for kind, values in fields(pair[2]):  # one list: 1 of strings, 2 of floats
                if kind == 3:
                    raise ValueError(f"{pair[1].decode()}: whole numbers, which no known file has")
                if kind == 1:  # each is 10, its length 1, the byte
                    array = np.frombuffer(values, np.uint8)[2::3]
                else:
                    array = np.frombuffer(b"".join(v for _, v in fields(values)), "<f4")
                features[pair[1].decode()] = array
    return features


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field of a protobuf message; here all are of kind 2, bytes."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        length, at = varint(message, at)
        if key & 7 != 2 or at + length > len(message):
            raise ValueError("no tf.train.Example")
        yield key >> 3, message[at : at + length]
        at += length


def varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that starts at a byte, seven bits each, the lowest first, and where it ends."""
    end = at
    while message[end] & 0x80:
        end += 1
    digits = enumerate(message[at : end + 1])
    return sum((byte & 0x7F) << 7 * i for i, byte in digits), end + 1


def to_scene(features: Arrays) -> Arrays:
    """image (C, H, W) uint8; labels (H, W), each pixel's entity; max_entities; factors (E, ...)."""
    image, masks = features.pop("image"), features.pop("mask")
    if (image.size, masks.size) not in FORMATS:
        raise ValueError(f"image of {image.size} bytes, masks of {masks.size}: no known data set")
    h, w, c, e, last = FORMATS[image.size, masks.size]
    image = image.reshape(h, w, c).transpose(2, 0, 1)
    masks = (masks.reshape(h * w, e).T if last else masks).reshape(e, h, w) > 0
    if h == 240:
        image, masks = image[:, 29:221, 64:256], masks[:, 29:221, 64:256]
    labels = owners(masks)
    if (h, last) == (64, False):
        labels, e = labels.clip(3) - 3, e - 3
    scene = dict(image=image, labels=labels, max_entities=np.int64(e))
    for name, values in features.items():
        whole = values.dtype == np.uint8 or name == "shape"  # which is a float in most files
        values = values.reshape(e, -1) if values.size > e else values
        scene[name] = values.astype(np.int64) if whole else values
    return scene


def owners(masks: np.ndarray) -> np.ndarray:
    """The entity of each pixel, uint8 (..., H, W), from masks (..., E, H, W); ValueError unless it
    is one."""
    once = (masks.max(-3) == 1) & (masks.min(-3) >= 0) & (masks.sum(-3) == 1)
    if not once.all() or masks.shape[-3] > 256:
        raise ValueError("masks must be 1 once in each pixel and 0 elsewhere, 256 at most")
    return masks.argmax(-3).astype(np.uint8)
