"""The official files of multi_object_datasets, read without TensorFlow, one scene at a time.

A TFRecord file, gzip or not, is a sequence of

    length (8 bytes, little-endian), its checksum (4), payload, the payload's checksum (4)

and each payload a protobuf message, tf.train.Example: a map from names to lists of floats, or of
strings of one byte each. Checksums are not compared, as damage shows in sizes and masks.

The numbers of bytes of image and masks tell which data set it is (FORMATS), not the file's name.
CLEVR is cut to rows 29:221 and columns 64:256. Factors keep the file's names and units.

Axes: E entities, C H W image.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FORMATS = {  # bytes of image and of masks: H, W, C, E; is E the last axis of the masks?
    (h * w * c, h * w * e): (h, w, c, e, last)
    for h, w, c, e, last in (
        (35, 35, 3, 4, False),  # Tetrominoes
        (64, 64, 1, 4, True),  # Multi-dSprites, binarized
        (64, 64, 3, 6, True),  # colored_on_grayscale
        (64, 64, 3, 5, True),  # colored_on_colored
        (240, 320, 3, 11, False),  # CLEVR with masks
    )
}
LARGEST = 2**24  # bytes of a record; CLEVR's have 3 million


def read_scenes(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The scenes of a file in its order, as `to_scene` gives them. ValueError where it is damaged,
    no TFRecord file, or of another data set."""
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


def parse_example(payload: bytes) -> dict[str, np.ndarray]:
    """The features of a tf.train.Example: uint8 or float32, flat."""
    features = {}
    for _, entries in fields(payload):
        for _, entry in fields(entries):
            pair = dict(fields(entry))  # 1: the name, 2: the feature
            for kind, values in fields(pair[2]):  # one list: 1 of strings, 2 of floats
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


def to_scene(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """image (C, H, W) uint8; labels (H, W), each pixel's entity; max_entities; factors (E, ...)."""
    image, masks = features.pop("image"), features.pop("mask")
    if (image.size, masks.size) not in FORMATS:
        raise ValueError(f"image of {image.size} bytes, masks of {masks.size}: no known data set")
    h, w, c, e, last = FORMATS[image.size, masks.size]
    image = image.reshape(h, w, c).transpose(2, 0, 1)
    masks = (masks.reshape(h * w, e).T if last else masks).reshape(e, h, w) > 0
    if h == 240:
        image, masks = image[:, 29:221, 64:256], masks[:, 29:221, 64:256]
    scene = dict(image=image, labels=owners(masks), max_entities=np.int64(e))
    for name, values in features.items():
        whole = values.dtype == np.uint8 or name == "shape"  # which is a float in most files
        values = values.reshape(e, -1) if values.size > e else values
        scene[name] = values.astype(np.int64) if whole else values
    return scene


def owners(masks: np.ndarray) -> np.ndarray:
    """The entity of each pixel, uint8 (..., H, W), from masks (..., E, H, W); ValueError unless it
    is one."""
    if not ((masks.max(-3) == 1) & (masks.sum(-3) == 1)).all():
        raise ValueError("masks must be 1 once in each pixel, and 0 elsewhere")
    return masks.argmax(-3).astype(np.uint8)
