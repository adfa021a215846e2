"""Scenes from disk: every kind of file, written here byte by byte, and every line of error."""

import gzip
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import data.__main__ as sheet
from data import draws, files, tfrecords

KINDS = {  # H, W, C, E, does the entity's axis of the masks come last?
    "tetrominoes": (35, 35, 3, 4, False),
    "binarized": (64, 64, 1, 4, True),
    "colored_on_grayscale": (64, 64, 3, 6, True),
    "colored_on_colored": (64, 64, 3, 5, True),
    "objects_room": (64, 64, 3, 7, False),
    "clevr": (240, 320, 3, 11, False),
}
FACTORS = {
    "tetrominoes": "x y shape visibility",
    "dsprites": "x y shape orientation scale visibility",
    "clevr": "x y z rotation visibility",
}


# -- a second writer of TFRecords ------------------------------------------------------------------


def crc32c(content: bytes) -> int:
    """By long division of polynomials over GF(2), bit-reversed: no table, no shared code."""
    reverse = lambda value, bits: int(f"{value:0{bits}b}"[::-1], 2)  # noqa: E731
    message = int.from_bytes(bytes(reverse(byte, 8) for byte in content), "big") << 32
    message ^= 0xFFFFFFFF << 8 * len(content)
    divisor = 0x11EDC6F41
    while message.bit_length() > 32:
        message ^= divisor << message.bit_length() - 33
    return reverse(message ^ 0xFFFFFFFF, 32)


def masked(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)


def record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + b"\0\0\0\0"  # the payload's checksum is not read


def delimited(number: int, content: bytes) -> bytes:
    size, length = b"", len(content)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def example(features: dict[str, np.ndarray]) -> bytes:
    entries = b""
    for name, array in features.items():
        if array.dtype == np.uint8:
            values = delimited(1, b"".join(b"\n\1" + bytes([byte]) for byte in array.tobytes()))
        else:
            values = delimited(2, delimited(1, array.astype("<f4").tobytes()))
        entries += delimited(1, delimited(1, name.encode()) + delimited(2, values))
    return delimited(1, entries)


def features(kind: str, number: int) -> dict[str, np.ndarray]:
    """Scene `number` of a file: the masks are E upright stripes, the last entity hidden."""
    h, w, c, e, last = KINDS[kind]
    rng = np.random.default_rng(number)
    image = rng.integers(0, 256, (h, w, c), dtype=np.uint8)
    image[0, 0] = number
    owner = np.broadcast_to(np.arange(w) * (e - 1) // w, (h, w))
    masks = (owner == np.arange(e)[:, None, None]).astype(np.uint8) * 255
    found = {"image": image, "mask": np.moveaxis(masks, 0, 2) if last else masks}
    if kind != "objects_room":
        names = FACTORS.get(kind, FACTORS["dsprites"])
        found |= {name: rng.random(e) for name in names.split()}
        found["shape"] = np.arange(e) % 4.0
        found["color"] = np.eye(3)[np.arange(e) % 3][:, :c]
    if kind == "clevr":
        found |= {k: np.arange(e, dtype=np.uint8) for k in ("size", "material", "shape", "color")}
        found["pixel_coords"] = np.stack([np.arange(e) + 100.0, np.arange(e) + 50.0, np.ones(e)], 1)
    return found


def write_records(path: Path, kind: str, count: int, zipped: bool = True) -> str:
    content = b"".join(record(example(features(kind, number))) for number in range(count))
    path.write_bytes(gzip.compress(content, 1) if zipped else content)
    return str(path)


# -- official files --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_official_file_is_recognised_and_read(tmp_path, kind):
    _, w, _, e, _ = KINDS[kind]
    path = write_records(tmp_path / "any-name", kind, 4, zipped=kind != "tetrominoes")
    scenes = [data.make(path, split) for split in data.SPLITS]
    numbers = {}
    for part in scenes:
        batch = part.batch(0, len(part.numbers))
        for row, number in enumerate(part.numbers.tolist()):
            numbers[number] = batch.image[row], batch.masks[row]
            assert (batch.masks[row].sum(0) == 1).all()
    assert sorted(numbers) == [0, 1, 2, 3]
    batch = scenes[0].batch(0, 2)
    room = kind == "objects_room"
    assert batch.masks.shape[1] == (e - 3 if room else e) == scenes[0].max_entities
    assert batch.present[:, 0].all() and not batch.present[:, -1].any()
    for number, (image, masks) in numbers.items():
        source = features(kind, number)
        if kind == "clevr":
            assert image.shape == (3, 128, 128)
            continue
        expected = torch.tensor(source["image"]).permute(2, 0, 1) / 255
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-7)
        owner = np.arange(w) * (e - 1) // w
        owner = (owner - 3).clip(0) if room else owner
        assert (masks[:, 0].long().argmax(0).numpy() == owner).all()


def test_factors_have_our_names_and_units(tmp_path):
    batch = data.make(write_records(tmp_path / "t", "tetrominoes", 3)).batch(0, 1)
    number = int(data.make(str(tmp_path / "t")).numbers[0])
    source = features("tetrominoes", number)
    assert batch.factors["shape"].tolist() == [[0, 1, 2, 0]] and not batch.present[0, 3]
    assert batch.factors["row"][0, 1:3].tolist() == pytest.approx(source["x"][1:3].tolist())
    assert batch.factors["col"][0, 1:3].tolist() == pytest.approx(source["y"][1:3].tolist())
    assert batch.factors["color_id"].tolist() == [[0, 1, 2, 0]]

    scenes = data.make(write_records(tmp_path / "d", "colored_on_colored", 3))
    batch, source = scenes.batch(0, 1), features("colored_on_colored", int(scenes.numbers[0]))
    assert batch.factors["shape"].tolist() == [[0, 0, 1, 2, 0]]
    assert batch.factors["col"][0, 2].item() == pytest.approx(16 + 32 * source["x"][2])
    assert batch.factors["row"][0, 2].item() == pytest.approx(16 + 32 * source["y"][2])
    assert batch.factors["color"].shape == (1, 5, 3)

    path = write_records(tmp_path / "c", "clevr", 3)
    factors = data.make(path, size=96).batch(0, 1).factors
    assert factors["row"][0, 5].item() == pytest.approx((55 - 29) / 2)
    assert factors["col"][0, 5].item() == pytest.approx((105 - 64) / 2)
    assert factors["color_id"][0, 5] == factors["material"][0, 5] == factors["size"][0, 5] == 5
    assert factors["color_id"].dtype == torch.int64 and factors["rotation"].dtype == torch.float32


def test_clevr_is_cropped_then_resized(tmp_path):
    path = write_records(tmp_path / "clevr.tfrecords", "clevr", 3)
    whole = data.make(f"{path}@192")
    source = features("clevr", int(whole.numbers[0]))["image"][29:221, 64:256]
    image = whole.batch(0, 1).image[0]
    torch.testing.assert_close(image, torch.tensor(source).permute(2, 0, 1) / 255)
    small = data.make(path).batch(0, 1)
    assert small.image.shape == (1, 3, 128, 128) and (small.masks.sum(1) == 1).all()
    assert abs(small.image.mean() - image.mean()) < 0.01
    columns = whole.batch(0, 1).masks[0, :, 0].long().argmax(0)  # (192,)
    nearest = columns[((torch.arange(128) + 0.5) * 1.5).long()]
    assert (small.masks[0, :, 0].long().argmax(0) == nearest).all()


def test_a_file_is_read_once_and_one_record_at_a_time(tmp_path, monkeypatch, capsys):
    path = tmp_path / "big"
    one = record(example(features("objects_room", 0)))
    with gzip.open(path, "wb", 1) as file:
        for _ in range(200):
            file.write(one)
    read, reader = [], tfrecords.read_scenes
    monkeypatch.setattr(files, "read_scenes", lambda p: (read.append(1) or s for s in reader(p)))
    tracemalloc.start()
    data.make(str(path)).batch(0, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read) == 201 and peak < 30 * len(one) < 200 * len(one) / 6
    assert "once, into" in capsys.readouterr().out
    files.open_source.cache_clear()
    data.make(str(path), "test").batch(0, 2)
    assert len(read) == 202 and capsys.readouterr().out == ""  # one, to know what the file is

    monkeypatch.setattr(files, "MOST", 5)
    write_records(path, "objects_room", 9)  # another file of the same name, and an older one
    os.utime(path, (10**9, 10**9))
    assert len(data.make(str(path)).numbers) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "big@64.scenes"]


def test_unpacked_floats_and_strings_are_understood():
    packed = features("tetrominoes", 1)
    values = delimited(1, packed["image"].tobytes())
    floats = b"".join(b"\x0d" + struct.pack("<f", x) for x in (1.5, -2.0))
    entry = delimited(1, delimited(1, b"image") + delimited(2, delimited(1, values)))
    entry += delimited(1, delimited(1, b"x") + delimited(2, delimited(2, floats)))
    found = tfrecords.parse_example(delimited(1, entry))
    assert (found["image"] == packed["image"].ravel()).all() and found["x"].tolist() == [1.5, -2]


# -- the contract ----------------------------------------------------------------------------------


def numbered(path: Path, count: int) -> str:
    """An .npy whose image i has the brightness i everywhere."""
    brightness = np.arange(count, dtype=np.uint8)[:, None, None, None]
    np.save(path, np.broadcast_to(brightness, (count, 4, 4, 1)))
    return str(path)


def shown(path: str, split: str, seed: int, start: int, size: int) -> list[int]:
    image = data.make(path, split, seed).batch(start, size).image
    return (image[:, 0, 0, 0] * 255).round().int().tolist()


def test_splits_are_disjoint_complete_and_independent_of_the_seed(tmp_path):
    path = numbered(tmp_path / "a.npy", 50)
    parts = {s: set(shown(path, s, 0, 0, n)) for s, n in zip(data.SPLITS, (40, 5, 5), strict=True)}
    assert set().union(*parts.values()) == set(range(50))
    assert [len(part) for part in parts.values()] == [40, 5, 5]
    assert all(set(shown(path, split, 7, 0, len(part))) == part for split, part in parts.items())
    assert parts["test"] != set(range(5)) and set(shown(path, "test", 0, 0, 4)) != parts["test"]
    moved = numbered(tmp_path / "b.npy", 50)
    assert shown(path, "train", 0, 0, 40) == shown(moved, "train", 0, 0, 40)


def test_a_scene_is_a_function_of_split_seed_and_number(tmp_path):
    path = numbered(tmp_path / "a.npy", 20)
    together = shown(path, "train", 3, 0, 64)
    assert [shown(path, "train", 3, i, 1)[0] for i in range(64)] == together
    assert together != shown(path, "train", 4, 0, 64)
    epochs = [together[i : i + 16] for i in range(0, 64, 16)]
    assert all(len(set(epoch)) == 16 for epoch in epochs)  # endless: 16 scenes, in a new order
    assert len(set(map(tuple, epochs))) == 4
    assert len(shown(path, "train", 3, 2**40, 2)) == 2


def test_a_large_array_is_not_read_as_a_whole(tmp_path):
    path, count = tmp_path / "sparse.npy", 100_000
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 128, 128, 3))  # 4.9 GB
    array[0, 0, 0] = 255
    tracemalloc.start()
    scenes = data.make(str(path))
    assert scenes.batch(0, 4).image.shape == (4, 3, 128, 128)
    assert scenes.read(0).image[:, 0, 0].tolist() == [255] * 3
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


# -- arrays and pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_generated_scenes_come_back_from_an_npz(tmp_path, save):
    batch = data.make("mini_sprites_16", "test").batch(0, 12)
    labels = batch.masks.long().argmax(1).numpy()
    for name, masks in (("labels", labels * 50 - 100), ("one_hot", batch.masks.numpy())):
        save(tmp_path / f"{name}.npz", image=batch.image.numpy(), masks=masks)
        scenes = data.make(str(tmp_path / f"{name}.npz"))
        first = draws.make_key(scenes.key, 0)  # of the first pass
        back, order = scenes.batch(0, 10), scenes.numbers[files.permutation(first, 10)]
        assert torch.equal(back.image, batch.image[order])
        assert torch.equal(back.masks, batch.masks[order])
        assert torch.equal(back.present, batch.present[order])


def test_labels_may_be_any_integers(tmp_path):
    masks = np.zeros((3, 4, 4), np.int64)
    masks[0, 0], masks[1, :2], masks[1, 2:] = 255, 7, 10**12  # scene 1 shows no background
    np.savez(tmp_path / "a.npz", image=np.zeros((3, 4, 4), np.uint8), masks=masks)
    read = data.make(str(tmp_path / "a.npz")).read
    assert [np.unique(read(i).labels).tolist() for i in range(3)] == [[0, 1], [1, 2], [0]]
    assert read(0).max_entities == 3


def test_images_have_channels_first_last_or_none(tmp_path):
    image = np.random.default_rng(0).random((3, 5, 6, 3)).astype(np.float32)
    for name, array in (("a", image), ("b", np.asfortranarray(image.transpose(0, 3, 1, 2)))):
        np.savez(tmp_path / f"{name}.npz", image=array)
        read = data.make(str(tmp_path / f"{name}.npz")).read
        assert (read(1).image == image[1].transpose(2, 0, 1)).all()
    np.save(tmp_path / "c.npy", image[..., 0])
    scenes = data.make(str(tmp_path / "c.npy"))
    assert scenes.batch(0, 1).image.shape == (1, 1, 5, 6) and scenes.max_entities == 0


def test_pictures_of_all_sizes_are_resized(tmp_path):
    for i, (name, size) in enumerate({"a.png": (8, 6), "b.JPG": (9, 9), "c.jpeg": (6, 12)}.items()):
        Image.new("L" if i else "RGBA", size, 90).save(tmp_path / name, "PNG" if i < 1 else "JPEG")
    (tmp_path / "notes.txt").touch()
    batch = data.make(f"{tmp_path}@4").batch(0, 6)
    assert batch.image.shape == (6, 3, 4, 4) and (batch.masks, batch.present) == (None, None)
    assert torch.equal(data.make(str(tmp_path), size=4).batch(0, 6).image, batch.image)
    with pytest.raises(ValueError, match=r"3 sizes.*@64"):
        data.make(str(tmp_path))


def test_the_centred_square_is_resized_with_its_masks(tmp_path):
    image = np.zeros((3, 4, 8), np.uint8)
    image[:, :, 2:4], image[:, :, 4:6] = 60, 200
    np.savez(tmp_path / "a.npz", image=image, masks=(image == 200).astype(np.uint8))
    scene = data.make(f"{tmp_path / 'a.npz'}@2").read(0)
    assert scene.image.tolist() == [[[scene.image[0, 0, 0], scene.image[0, 0, 1]]] * 2]
    assert 60 <= scene.image[0, 0, 0] < 130 < scene.image[0, 0, 1] <= 200
    assert scene.labels.tolist() == [[0, 1], [0, 1]]


# -- errors ----------------------------------------------------------------------------------------


SCENE = features("tetrominoes", 0)
WHOLE = record(example(SCENE))
IMAGE, MASKS = np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, 2, 8, 8), np.uint8)
MASKS[:, 0] = 1
ERRORS = {  # what fails: the file's name, its bytes, arrays or picture (None: no file), the message
    "truncated": ("file", WHOLE + WHOLE[:-5], "truncated or damaged in record 1"),
    "truncated header": ("file", WHOLE + WHOLE[:5], "truncated or damaged in record 1"),
    "truncated gzip": ("file", gzip.compress(WHOLE * 3)[:-40], "truncated or damaged in record"),
    "damaged gzip": ("file", gzip.compress(WHOLE)[:3000] + b"\xff" * 9999, "truncated or damaged"),
    "text": ("file", b"What is this? It is no TFRecord file.", "no TFRecord file"),
    "damaged": ("file", WHOLE + b"\1" + WHOLE[1:], "damaged (wrong checksum in record 1)"),
    "empty": ("file", b"", "empty"),
    "too small": ("file", WHOLE * 2, "2 scenes; each of the three splits needs one"),
    "no example": ("file", record(b"\x0a\x7f"), "record 0: no tf.train.Example"),
    "cut short": ("file", record(b"\x0a"), "record 0: no tf.train.Example"),
    "other size": ("file", record(example(SCENE | {"image": SCENE["image"][:-1]})),
                   "image of 3570 bytes, masks of 4900: no known data set"),
    "no masks": ("file", record(example({"image": SCENE["image"]})), "record 0: no feature 'mask'"),
    "overlap": ("file", record(example(SCENE | {"mask": SCENE["mask"] | 255})),
                "record 0: masks overlap"),
    "uncovered": ("file", record(example(SCENE | {"mask": SCENE["mask"] * 0})),
                  "record 0: masks leave pixels uncovered"),
    "npz overlap": ("f.npz", dict(image=IMAGE, masks=MASKS | 1), "masks 0: masks overlap"),
    "npz uncovered": ("f.npz", dict(image=IMAGE, masks=MASKS * 0), "leave pixels uncovered"),
    "npz 255": ("f.npz", dict(image=IMAGE, masks=MASKS * 255), "masks hold 0 and 1, not 255"),
    "npz float labels": ("f.npz", dict(image=IMAGE, masks=MASKS[:, 0] / 2), "must be integers"),
    "npz other size": ("f.npz", dict(image=IMAGE, masks=MASKS[:, :, 1:]), "do not fit image"),
    "npz other number": ("f.npz", dict(image=IMAGE, masks=MASKS[1:]), "do not fit image"),
    "npz no image": ("f.npz", dict(images=IMAGE), "no array `image`, but images"),
    "npz objects": ("f.npz", dict(image=IMAGE, masks=np.array([None] * 4)), "Object arrays"),
    "npz large floats": ("f.npz", dict(image=IMAGE + 254.5), "image 0 is not in [0, 1]"),
    "npz NaN": ("f.npz", dict(image=IMAGE * np.nan), "image 0 is not in [0, 1]"),
    "npz int": ("f.npz", dict(image=IMAGE.astype(int)), "uint8 or float in [0, 1], not int64"),
    "npz five channels": ("f.npz", dict(image=np.zeros((4, 8, 8, 5))), "image is (4, 8, 8, 5)"),
    "no npy": ("f.npy", b"no array at all", "the magic string is not correct"),
    "truncated npy": ("f.npy", b"\x93NUMPY\1\0\x76\0", "EOF"),
    "no npz": ("f.npz", b"text", "File is not a zip file"),
    "no picture": ("a.png", b"text", "cannot identify image file"),
    "empty folder": ("a.txt", b"text", "no PNG or JPEG picture in this folder"),
    "missing": ("file", None, "no data set has this name, and no file or folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS)
def test_what_cannot_be_read_is_one_clear_line(tmp_path, kind):
    name, content, message = ERRORS[kind]
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    path = tmp_path if kind in ("no picture", "empty folder") else path
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        data.make(str(path))
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert not list(tmp_path.glob("*.scenes.*"))  # nothing half-made stays


def test_an_unknown_name_is_no_path():
    with pytest.raises(ValueError, match="unknown dataset 'tetromino'; choose from mini_sprites"):
        data.make("tetromino")


# -- python -m data --------------------------------------------------------------------------------


def test_a_contact_sheet_of_a_file_shows_images_and_masks(tmp_path, capsys):
    path, out = write_records(tmp_path / "official", "objects_room", 9), tmp_path / "sheet.png"
    sheet.main(path, "test", count=5, out=str(out))
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == f"{out}: scenes 0 to 4 of {path}, test, seed 0"
    assert second == "3 x 64 x 64, up to 3 objects; factors: none"
    with Image.open(out) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(10**6)}
    assert {(0xCD, 0xD0, 0xD6), (0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)} <= colors


def test_a_contact_sheet_needs_no_masks(tmp_path, capsys):
    path, out = numbered(tmp_path / "a.npy", 5), tmp_path / "sheet.png"
    sheet.main(path, count=1, out=str(out))
    assert capsys.readouterr().out.endswith("1 x 4 x 4, no masks; factors: none\n") and out.exists()


def test_without_a_name_all_names_are_listed(capsys):
    sheet.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(data.DATASETS)


def test_an_error_is_one_line_and_status_2():
    command = [sys.executable, "-m", "data", "tetrominoes", "--count", "0"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (2, "data: --count must be at least 1, not 0\n")
