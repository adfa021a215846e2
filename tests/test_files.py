"""Scenes from disk: every kind of file, written here byte by byte, and every line of error."""

import gzip
import math
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
from data import draws, files

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


def record(payload: bytes) -> bytes:
    return struct.pack("<Q", len(payload)) + b"crc1" + payload + b"crc2"  # which are not read


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
    if kind == "objects_room":
        return found
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
    room = 3 * (kind == "objects_room")  # entities that join the background
    assert batch.masks.shape[1] == e - room == scenes[0].max_entities
    assert batch.present[:, 0].all() and not batch.present[:, -1].any()
    for number, (image, masks) in numbers.items():
        source = features(kind, number)
        source["image"] = source["image"][29:221, 64:256] if kind == "clevr" else source["image"]
        expected = torch.tensor(source["image"]).permute(2, 0, 1) / 255
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-7)
        owner = (np.arange(w) * (e - 1) // w).clip(room) - room
        owner = owner[64:256] if kind == "clevr" else owner
        assert (masks[:, 0].long().argmax(0).numpy() == owner).all()


def test_factors_are_those_of_the_file(tmp_path):
    """Under its names; zero where the entity is not visible; classes are whole numbers."""
    for kind in ("tetrominoes", "colored_on_colored", "clevr"):
        scenes = data.make(write_records(tmp_path / kind, kind, 3))
        batch, source = scenes.batch(0, 1), features(kind, int(scenes.numbers[0]))
        assert batch.factors.keys() == source.keys() - {"image", "mask"}
        for name, values in batch.factors.items():
            classes = source[name].dtype == np.uint8 or name == "shape"
            assert values.dtype == (torch.int64 if classes else torch.float32), name
            assert not values[0, 0].any() and not values[~batch.present].any(), name
            expected = source[name].reshape(values[0].shape)[batch.present[0].numpy()]
            assert values[batch.present][1:].numpy() == pytest.approx(expected[1:]), name


def test_features_of_a_record_come_in_any_order(tmp_path):
    plain, mixed = (features("tetrominoes", number) for number in (0, 1))
    content = [plain, dict(reversed(mixed.items())), plain]
    (tmp_path / "file").write_bytes(b"".join(record(example(f)) for f in content))
    scenes = data.make(str(tmp_path / "file"))
    for name in ("x", "y", "visibility"):
        assert (scenes.arrays[name][1] == mixed[name].astype(np.float32)).all()


def test_clevr_is_cropped_then_resized(tmp_path):
    path = write_records(tmp_path / "clevr.tfrecords", "clevr", 3)
    whole = data.make(f"{path}@192")
    source = features("clevr", int(whole.numbers[0]))["image"][29:221, 64:256]
    image = whole.batch(0, 1).image[0]
    torch.testing.assert_close(image, torch.tensor(source).permute(2, 0, 1) / 255)
    small = data.make(f"{path}@128").batch(0, 1)
    assert small.image.shape == (1, 3, 128, 128) and (small.masks.sum(1) == 1).all()
    assert abs(small.image.mean() - image.mean()) < 0.01
    columns = whole.batch(0, 1).masks[0, :, 0].long().argmax(0)  # (192,)
    nearest = columns[((torch.arange(128) + 0.5) * 1.5).long()]
    assert (small.masks[0, :, 0].long().argmax(0) == nearest).all()


def test_a_file_is_read_once_and_one_record_at_a_time(tmp_path, monkeypatch, capsys):
    path = tmp_path / "big"
    one = record(example(features("tetrominoes", 0)))
    with gzip.open(path, "wb", 1) as file:
        for _ in range(200):
            file.write(one)
    read, reader = [], files.read_records
    monkeypatch.setattr(files, "read_records", lambda p: (read.append(1) or s for s in reader(p)))
    tracemalloc.start()
    data.make(str(path)).batch(0, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read) == 200 and peak < 30 * len(one) < 200 * len(one) / 6
    assert "once, into" in capsys.readouterr().out
    files.open_source.cache_clear()
    data.make(str(path), "test").batch(0, 2)
    assert len(read) == 201 and capsys.readouterr().out == ""  # one, to know what the file is

    monkeypatch.setattr(files, "MOST", 5)
    write_records(path, "tetrominoes", 9)  # another file of the same name, and an older one
    os.utime(path, (10**9, 10**9))
    assert len(data.make(str(path)).numbers) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "big.scenes"]


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
    assert scenes.arrays["image"][0, :, 0, 0].tolist() == [255] * 3
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


# -- arrays and pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_generated_scenes_come_back_from_an_npz(tmp_path, save):
    batch = data.make("mini_sprites_16_shaded", "test").batch(0, 12)
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
    scenes = data.make(str(tmp_path / "a.npz"))
    seen = [np.unique(labels).tolist() for labels in scenes.arrays["labels"]]
    assert seen == [[0, 2], [1, 3], [0]] and scenes.max_entities == 4


def test_images_have_channels_first_last_or_none(tmp_path):
    image = np.random.default_rng(0).random((3, 5, 6, 3)).astype(np.float32)
    for name, array in (("a", image), ("b", np.asfortranarray(image.transpose(0, 3, 1, 2)))):
        np.savez(tmp_path / f"{name}.npz", image=array)
        read = data.make(str(tmp_path / f"{name}.npz")).arrays["image"]
        assert (read == image.transpose(0, 3, 1, 2)).all()
    np.save(tmp_path / "c.npy", image[..., 0])
    scenes = data.make(str(tmp_path / "c.npy"))
    assert scenes.batch(0, 1).image.shape == (1, 1, 5, 6) and scenes.max_entities == 0


def test_pictures_of_all_sizes_are_resized(tmp_path):
    for i, (name, size) in enumerate({"a.png": (8, 6), "b.JPG": (9, 9), "c.jpeg": (6, 12)}.items()):
        Image.new("L" if i else "RGBA", size, 90).save(tmp_path / name, "PNG" if i < 1 else "JPEG")
    (tmp_path / "notes.txt").touch()
    batch = data.make(f"{tmp_path}@4").batch(0, 6)
    assert batch.image.shape == (6, 3, 4, 4) and (batch.masks, batch.present) == (None, None)
    with pytest.raises(ValueError, match=r"several sizes.*@64"):
        data.make(str(tmp_path))


def test_pictures_are_upright_and_a_damaged_one_is_named(tmp_path):
    sideways = Image.new("L", (8, 4))
    sideways.putpixel((0, 0), 255)
    sideways.getexif()[274] = 6  # a quarter turn to the right
    for number in range(3):
        sideways.save(tmp_path / f"{number}.png", exif=sideways.getexif())
    image = data.make(str(tmp_path)).batch(0, 1).image
    assert image.shape == (1, 3, 8, 4) and image[0, :, 0, 3].tolist() == [1, 1, 1]
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r": 1.png: "):
        data.make(str(tmp_path))


def test_of_a_small_file_no_scene_is_tested_twice(tmp_path):
    np.save(tmp_path / "f.npy", np.zeros((30, 8, 8, 3), np.uint8))
    scenes = data.make(str(tmp_path / "f.npy"), "test")
    assert scenes.count == 3 and data.make("mini_sprites").count == math.inf


def test_a_picture_that_has_changed_is_read_again(tmp_path):
    for value in (10, 200):
        for number in range(3):
            Image.new("L", (4, 4), value).save(tmp_path / f"{number}.png")
        assert (data.make(str(tmp_path)).arrays["image"] == value).all()


def test_the_centred_square_is_resized_with_its_masks():
    image = np.zeros((3, 4, 8), np.uint8)
    image[:, :, 2:4], image[:, :, 4:6] = 60, 200
    scene = files.resize(dict(image=image, labels=(image[0] == 200).astype(np.uint8)), 2)
    image = scene["image"]
    assert image.tolist() == [[[image[0, 0, 0], image[0, 0, 1]]] * 2] * 3
    assert 60 <= image[0, 0, 0] < 130 < image[0, 0, 1] <= 200
    assert scene["labels"].tolist() == [[0, 1], [0, 1]]


def test_arrays_keep_their_size(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 8), np.uint8))
    with pytest.raises(ValueError, match=r"a\.npy: arrays keep their size"):
        data.make(f"{tmp_path / 'a.npy'}@2")


# -- errors ----------------------------------------------------------------------------------------


SCENE = features("tetrominoes", 0)
NUMBERS = delimited(2, delimited(3, delimited(1, b"\1\2\3\4")))  # an Int64List
WHOLE = record(example(SCENE))
IMAGE, MASKS = np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, 2, 8, 8), np.uint8)
MASKS[:, 0] = 1
ROOMS = [{"image": np.zeros((64, 64, 3), np.uint8), "mask": 255 * np.eye(
    e, 1, dtype=np.uint8)[..., None].repeat(64, 1).repeat(64, 2)} for e in (4, 7)]
ERRORS = {  # what fails: the file's name, its bytes, arrays or picture (None: no file), the message
    "truncated": ("file", WHOLE + WHOLE[:-5], "record 1: truncated"),
    "truncated header": ("file", WHOLE + WHOLE[:5], "record 1: truncated"),
    "truncated gzip": ("file", gzip.compress(WHOLE * 3)[:-40], "Compressed file ended"),
    "damaged gzip": ("file", gzip.compress(WHOLE)[:3000] + b"\xff" * 9999, "record 0: "),
    "text": ("file", b"What is this? It is no TFRecord file.", "record 0: no TFRecord"),
    "damaged": ("file", WHOLE + b"\1" + WHOLE[1:], "record 1: "),
    "empty": ("file", b"", "no scene"),
    "too small": ("file", WHOLE * 2, "2 scenes; each of the three splits needs one"),
    "no example": ("file", record(b"\x0a\x7f"), "record 0: no tf.train.Example"),
    "cut short": ("file", record(b"\x0a"), "record 0: "),
    "other size": ("file", record(example(SCENE | {"image": SCENE["image"][:-1]})),
                   "image of 3570 bytes, masks of 4900: no known data set"),
    "no masks": ("file", record(example({"image": SCENE["image"]})), "record 0: 'mask'"),
    "overlap": ("file", record(example(SCENE | {"mask": SCENE["mask"] | 255})),
                "record 0: masks must be 1 once"),
    "uncovered": ("file", record(example(SCENE | {"mask": SCENE["mask"] * 0})),
                  "record 0: masks must be 1 once"),
    "whole numbers": ("file", record(delimited(1, delimited(1, delimited(1, b"x") + NUMBERS))),
                      "record 0: x: whole numbers, which no known file has"),
    "other factors": ("file", WHOLE + record(example({k: SCENE[k] for k in ("image", "mask")})),
                      "not all scenes have the same factors"),
    "other entities": ("file", b"".join(record(example(room)) for room in ROOMS),
                       "not all scenes have the same factors and entities"),
    "npz overlap": ("f.npz", dict(image=IMAGE, masks=MASKS | 1), "must be 1 once"),
    "npz below 0": ("f.npz", dict(image=IMAGE, masks=np.array(
        [1, 1, -1], np.int8)[None, :, None, None] * np.ones((4, 1, 8, 8), np.int8)), "1 once"),
    "npz 257 masks": ("f.npz", dict(image=IMAGE, masks=np.eye(
        257, 1, dtype=np.uint8)[None, ..., None] * np.ones((4, 1, 8, 8), np.uint8)), "256 at most"),
    "npz five axes": ("f.npz", dict(image=IMAGE, masks=MASKS[:, None]), "do not fit image"),
    "npz uncovered": ("f.npz", dict(image=IMAGE, masks=MASKS * 0), "must be 1 once"),
    "npz 255": ("f.npz", dict(image=IMAGE, masks=MASKS * 255), "must be 1 once"),
    "npz float labels": ("f.npz", dict(image=IMAGE, masks=MASKS[:, 0] / 2), "256 different"),
    "npz other size": ("f.npz", dict(image=IMAGE, masks=MASKS[:, :, 1:]), "do not fit image"),
    "npz other number": ("f.npz", dict(image=IMAGE, masks=MASKS[1:]), "do not fit image"),
    "npz no image": ("f.npz", dict(images=IMAGE), "no array `image`, but images"),
    "npz objects": ("f.npz", dict(image=IMAGE, masks=np.array([None] * 4)), "Object arrays"),
    "npz large floats": ("f.npz", dict(image=IMAGE + 254.5), "floats in [0, 1], not"),
    "npz 0 and 1": ("f.npz", dict(image=IMAGE + np.uint8(1)), "of uint8 in 0 to 255"),
    "npz NaN": ("f.npz", dict(image=IMAGE * np.nan), "floats in [0, 1], not"),
    "npz int": ("f.npz", dict(image=IMAGE.astype(int)), "(4, 8, 8, 3) of int64"),
    "npz five channels": ("f.npz", dict(image=np.zeros((4, 8, 8, 5))), "not (4, 8, 8, 5)"),
    "no npy": ("f.npy", b"no array at all", "pickled"),
    "truncated npy": ("f.npy", b"\x93NUMPY\1\0\x76\0", "EOF"),
    "no npz": ("f.npz", b"text", "pickled"),
    "no picture": ("a.png", b"text", "cannot identify image file"),
    "deep picture": ("a.png", Image.new("I;16", (4, 4), 999), "a.png: more than 8 bits a channel"),
    "empty folder": ("a.txt", b"text", "no PNG or JPEG picture"),
    "missing": ("file", None, "no file or folder, and none of the names mini_sprites"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS)
def test_what_cannot_be_read_is_one_clear_line(tmp_path, kind):
    name, content, message = ERRORS[kind]
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, Image.Image):
        content.save(path)
    elif content is not None:
        path.write_bytes(content)
    path = tmp_path if path.suffix in (".png", ".txt") else path
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        data.make(str(path))
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert not list(tmp_path.glob("*.scenes.*"))  # nothing half-made stays


# -- python -m data --------------------------------------------------------------------------------


def test_a_contact_sheet_of_a_file_shows_images_and_masks(tmp_path, capsys):
    path, out = write_records(tmp_path / "official", "tetrominoes", 9), tmp_path / "sheet.png"
    sheet.main(path, "test", count=5, out=str(out))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{out}: 3 x 35 x 35, up to 3 objects; factors: x, y, shape, visibility, color"
    with Image.open(out) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(10**6)}
    assert {(0xCD, 0xD0, 0xD6), (0x56, 0xB4, 0xE9), (0x00, 0x9E, 0x73)} <= colors


def test_a_contact_sheet_needs_no_masks(tmp_path, capsys):
    path, out = numbered(tmp_path / "a.npy", 5), tmp_path / "sheet.png"
    sheet.main(path, count=1, out=str(out))
    assert capsys.readouterr().out.endswith("1 x 4 x 4, no masks; factors: none\n") and out.exists()


def test_without_a_name_all_names_are_listed(capsys):
    sheet.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0] == " "] == list(data.DATASETS)
    assert max(map(len, lines)) < 80 and "Shapes: three white triangles" in lines[10]


def test_an_error_is_one_line_and_status_2():
    command = [sys.executable, "-m", "data", "tetrominoes", "--count", "0"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("data: batch needs start >= 0 and size >= 1")
