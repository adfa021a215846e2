"""The official files of multi_object_datasets, read without TensorFlow, one scene at a time.

A TFRecord file, gzip or not, is a sequence of

    length (8 bytes, little-endian), its masked CRC-32C (4), payload, the payload's CRC (4)

and each payload a protobuf message, tf.train.Example: a map from names to lists of strings or
floats. Images and masks are lists of strings of one byte each; masks are 0 or 255. Of the checksums
only that of the length is compared: the other would take longer than all the rest.

The numbers of bytes of image and masks tell which data set it is (FORMATS), not the file's name.
Factors get our generators' names and units. Tetrominoes stores the row as x and the column as y.
Multi-dSprites stores dSprites' x and y in [0, 1]; assumed: across and down, from pixel 16 to 48.
CLEVR is cut to rows 29:221 and columns 64:256; its shape, size, material and color_id count from 1,
x, y, z are places in space, rotation is in degrees. Objects Room has no factors; its first four
entities (sky, floor, two halves of the wall) become entity 0.

Axes: E entities, C H W image.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.tetrominoes import COLORS

FORMATS = {  # bytes of image and of masks: name, H, W, C, E
    (h * w * c, h * w * e): (name, h, w, c, e)
    for name, h, w, c, e in (
        ("tetrominoes", 35, 35, 3, 4),
        ("multi_dsprites", 64, 64, 1, 4),  # binarized
        ("multi_dsprites", 64, 64, 3, 6),  # colored_on_grayscale
        ("multi_dsprites", 64, 64, 3, 5),  # colored_on_colored
        ("objects_room", 64, 64, 3, 7),  # train
        ("objects_room", 64, 64, 3, 4),  # test_empty_room
        ("objects_room", 64, 64, 3, 10),  # test_six_objects, test_identical_color
        ("clevr", 240, 320, 3, 11),
    )
}
TOP, LEFT, SIDE = 29, 64, 192  # the part of CLEVR's images that is used


class Scene(NamedTuple):
    image: np.ndarray  # (C, H, W) uint8, or float in [0, 1]
    labels: np.ndarray | None = None  # (H, W), the entity of each pixel; None where unknown
    max_entities: int = 0  # E
    factors: dict[str, np.ndarray] = {}  # (E, ...)  # noqa: RUF012 (nobody writes into it)


def read_scenes(path: Path) -> Iterator[Scene]:
    """The scenes of a file in its order. ValueError, in one line, where it is damaged."""
    for number, payload in enumerate(read_records(path)):
        try:
            yield to_scene(parse_example(payload))
        except (ValueError, LookupError) as error:
            reasons = {KeyError: f"no feature {error}", IndexError: "no tf.train.Example"}
            reason = reasons.get(type(error), error)
            raise ValueError(f"{path}: record {number}: {reason}") from None


def read_records(path: Path) -> Iterator[bytes]:
    """The payloads of a TFRecord file."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            while header := file.read(12):
                if len(header) == 12 and masked_crc(header[:8]) != header[8:]:
                    kind = "damaged" if number else "no TFRecord file"
                    raise ValueError(f"{path}: {kind} (wrong checksum in record {number})")
                length = int.from_bytes(header[:8], "little")
                payload = file.read(length + 4)
                if len(header) < 12 or len(payload) < length + 4:
                    raise EOFError
                yield payload[:-4]
                number += 1
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ValueError(f"{path}: truncated or damaged in record {number}") from None


def masked_crc(data: bytes) -> bytes:
    """The checksum of TFRecords: CRC-32C, rotated by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def parse_example(payload: bytes) -> dict[str, np.ndarray]:
    """The features of a tf.train.Example: uint8 or float32, flat."""
    features = {}
    for _, entries in fields(payload):
        for _, entry in fields(entries):
            pair = dict(fields(entry))  # 1: the name, 2: the feature
            for kind, values in fields(pair[2]):  # one list: 1 of strings, 2 of floats
                parts = np.frombuffer(values, np.uint8)
                one_byte = kind == 1 and len(parts) % 3 == 0  # each is 10, 1 (its length), byte
                if one_byte and (parts[::3] == 10).all() and (parts[1::3] == 1).all():
                    array = parts[2::3]
                else:
                    joined = b"".join(value for _, value in fields(values))
                    array = np.frombuffer(joined, np.uint8 if kind == 1 else "<f4")
                features[pair[1].decode()] = array
    return features


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field of a protobuf message."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        kind, length = key & 7, 4  # kind 5: a float that is not packed into a string
        if kind == 2:
            length, at = varint(message, at)
        if kind not in (2, 5) or at + length > len(message):
            raise ValueError("no tf.train.Example")
        yield key >> 3, message[at : at + length]
        at += length


def varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that starts at a byte, seven bits each, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        value |= (message[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if message[at - 1] < 0x80:
            return value, at


def to_scene(features: dict[str, np.ndarray]) -> Scene:
    """ValueError where sizes are no format's, or a pixel is not exactly one entity's."""
    image, masks = features["image"], features["mask"]
    if (image.size, masks.size) not in FORMATS:
        raise ValueError(f"image of {image.size} bytes, masks of {masks.size}: no known data set")
    name, h, w, c, e = FORMATS[image.size, masks.size]
    image = image.reshape(h, w, c).transpose(2, 0, 1)
    masks = masks.reshape(h * w, e).T if name == "multi_dsprites" else masks
    masks = masks.reshape(e, h, w) > 0
    if name == "clevr":
        window = np.s_[:, TOP : TOP + SIDE, LEFT : LEFT + SIDE]
        image, masks = image[window], masks[window]
    labels = owners(masks)
    if name == "objects_room":
        return Scene(image, labels.clip(3) - 3, e - 3)

    def integer(key: str) -> np.ndarray:
        return features[key].reshape(e).astype(np.int64)

    def real(key: str) -> np.ndarray:
        return features[key].reshape(e)

    factors = {"shape": integer("shape")}
    if name == "tetrominoes":
        factors["color"] = features["color"].reshape(e, 3)
        factors["color_id"] = (factors["color"][:, None] == COLORS).all(2).argmax(1)  # (E,)
        factors |= {"row": real("x"), "col": real("y")}
    elif name == "multi_dsprites":
        factors["shape"] -= 1  # from 0, as in our generator
        factors["color"] = features["color"].reshape(e, c)
        factors |= {key: real(key) for key in ("scale", "orientation")}
        factors |= {"row": 16 + 32 * real("y"), "col": 16 + 32 * real("x")}
    else:
        factors |= {key: integer(key) for key in ("size", "material")}
        factors |= {key: real(key) for key in ("x", "y", "z", "rotation")}
        col, row, _depth = features["pixel_coords"].reshape(e, 3).T
        factors |= {"color_id": integer("color"), "row": row - TOP, "col": col - LEFT}
    return Scene(image, labels, e, factors)


def owners(masks: np.ndarray) -> np.ndarray:
    """The entity of each pixel, uint8 (H, W), from masks (E, H, W) bool; ValueError unless one."""
    number = masks.sum(0)
    if number.max() > 1:
        raise ValueError("masks overlap")
    if number.min() < 1:
        raise ValueError("masks leave pixels uncovered")
    return masks.argmax(0).astype(np.uint8)
