from __future__ import annotations

import doctest
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tritonconv.models.data import segmentation
from tritonconv.models.data.segmentation import (
    MissingExtraError,
    SegmentationSample,
    load_folder,
    load_icbm152,
    natural_key,
    split_block,
)

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed (the demo extra)")
needs_nilearn = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="nilearn is not installed (the demo extra)"
)


def write(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


def make_pairs(folder: Path, names: list[str], layout=("image", "label"), size=(12, 20)) -> None:
    rng = np.random.default_rng(0)
    for index, name in enumerate(names):
        image = rng.integers(0, 200, size).astype(np.uint8)
        image[0, 0] = 200 + index  # tells the files apart after sorting
        mask = np.zeros(size, np.uint8)
        mask[3:8, 4:11] = 255
        write(folder / layout[0] / f"{name}.png", image)
        write(folder / layout[1] / f"{name}.png", mask)


@pytest.mark.parametrize(
    "layout", [("image", "label"), ("images", "labels"), ("images", "masks")], ids="-".join
)
def test_folder_is_read_in_natural_order_and_split_in_blocks(tmp_path, layout):
    make_pairs(tmp_path, [str(i) for i in range(12)], layout)
    data = load_folder(tmp_path)
    assert [s.name for s in data.train] == [str(i) for i in range(10)]
    assert [s.name for s in data.test] == ["10", "11"]
    assert data.classes == ("label 0", "label 255")
    assert (data.in_channels, data.num_classes) == (1, 2)
    sample = data.train[3]
    assert sample.image.shape == (1, 12, 20)
    assert sample.image.dtype == torch.float32
    assert sample.image.mean().item() == pytest.approx(0, abs=1e-5)
    assert sample.image.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert sample.label.dtype == torch.int64
    assert sample.label.sum() == 35
    assert sample.label[3, 4] == 1


def test_colour_palette_and_sixteen_bit_files(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        write(tmp_path / "image" / f"{name}.png", rng.integers(0, 255, (6, 5, 3)).astype(np.uint8))
        label = Image.fromarray(np.arange(30, dtype=np.uint8).reshape(6, 5) % 3, mode=None)
        label.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        (tmp_path / "label").mkdir(exist_ok=True)
        label.save(tmp_path / "label" / f"{name}.png")
    data = load_folder(tmp_path, classes=("sky", "tree", "road"))
    assert data.train[0].image.shape == (3, 6, 5)
    assert data.classes == ("sky", "tree", "road")
    assert data.train[0].label.unique().tolist() == [0, 1, 2]

    for name in "ab":
        write(tmp_path / "image" / f"{name}.png", rng.integers(0, 60000, (6, 5)).astype(np.uint16))
    assert load_folder(tmp_path).train[0].image.shape == (1, 6, 5)


def damage_missing_label(folder: Path) -> None:
    (folder / "label" / "2.png").unlink()


def damage_missing_image(folder: Path) -> None:
    (folder / "image" / "0.png").unlink()
    (folder / "image" / "3.png").unlink()


def damage_size(folder: Path) -> None:
    write(folder / "label" / "1.png", np.zeros((3, 4), np.uint8))


def damage_channels(folder: Path) -> None:
    write(folder / "image" / "1.png", np.zeros((12, 20, 3), np.uint8))


def damage_colour_label(folder: Path) -> None:
    write(folder / "label" / "1.png", np.zeros((12, 20, 3), np.uint8))


def damage_smooth_label(folder: Path) -> None:
    write(folder / "label" / "1.png", np.arange(240, dtype=np.uint8).reshape(12, 20))


def damage_file(folder: Path) -> None:
    (folder / "image" / "1.png").write_bytes(b"\x80\x04 not an image")


def damage_truncated(folder: Path) -> None:
    path = folder / "image" / "1.png"
    path.write_bytes(path.read_bytes()[:80])


def damage_empty(folder: Path) -> None:
    for path in folder.glob("*/*.png"):
        path.unlink()


def damage_constant(folder: Path) -> None:
    for path in folder.glob("label/*.png"):
        write(path, np.zeros((12, 20), np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing_label, r"label.2\.png, the partner of its namesake, got none"),
        (damage_missing_image, r"image.0\.png, the partner of its namesake, got none and 1 more"),
        (damage_size, r"label .*1\.png: expected the size of its image \(12, 20\), got \(3, 4\)"),
        (damage_channels, r"image .*1\.png: expected 1 channels like 0\.png, got 3"),
        (damage_colour_label, r"label .*1\.png: expected a grey or palette image, got 3 channels"),
        (damage_smooth_label, "expected 2 to 64 different values, one per class, got 24"),
        (damage_constant, "expected 2 to 64 different values, one per class, got 1"),
        (damage_file, r"file .*1\.png: expected a readable PNG image"),
        (damage_truncated, r"file .*1\.png: expected a readable PNG image"),
        (damage_empty, "at least 2 pairs of PNG files"),
    ],
    ids=lambda v: v.__name__.removeprefix("damage_") if callable(v) else "",
)
def test_damaged_folders_say_what_is_wrong(tmp_path, damage, message):
    make_pairs(tmp_path, ["0", "1", "2", "3"])
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path)


def test_wrong_folders_and_arguments(tmp_path):
    with pytest.raises(ValueError, match="path: expected an existing folder"):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match=r"image/ and label/.*got .* with pictures"):
        load_folder(tmp_path)
    make_pairs(tmp_path, ["0", "1"])
    with pytest.raises(ValueError, match="classes: expected 2 names"):
        load_folder(tmp_path, classes=("one",))
    with pytest.raises(ValueError, match="test_fraction"):
        load_folder(tmp_path, test_fraction=1.0)


def test_sample_refuses_a_label_of_another_size():
    with pytest.raises(ValueError, match=r"label of x: expected the size of the image \(4, 4\)"):
        SegmentationSample(torch.zeros(1, 4, 4), torch.zeros(4, 5).long(), "x")


@pytest.mark.parametrize("count", [2, 3, 7, 30, 100])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
def test_blocks_are_disjoint_and_cover_all(count, fraction):
    train, test = split_block(count, fraction)
    assert [*train, *test] == list(range(count))
    assert len(train) and len(test)


def test_natural_key():
    names = ["a10", "a2", "10", "9", "b", "a", "2b"]
    assert sorted(names, key=natural_key) == ["2b", "9", "10", "a", "a2", "a10", "b"]


@needs_nilearn
def test_brain_slices():
    data = load_icbm152()
    assert data.classes == ("background", "grey matter", "white matter")
    assert data.train[0].image.shape == (1, 233, 197)
    for split in (data.train, data.test):
        labels = torch.stack([s.label for s in split])
        share = torch.bincount(labels.flatten(), minlength=3) / labels.numel()
        assert (share > torch.tensor([0.5, 0.1, 0.08])).all()
    # White matter is brighter than grey matter, and that than what surrounds them.
    means = [
        torch.cat([s.image[0][s.label == c] for s in data.test]).mean().item() for c in range(3)
    ]
    assert means[0] < means[1] < means[2]
    # Nose up: the brain is longer than wide, and the first row is the front of the head.
    assert "nilearn" in data.source
    assert "McConnell" in data.source


@needs_nilearn
def test_brain_blocks_are_disjoint_with_a_gap():
    data = load_icbm152()
    train, test = (
        {int(s.name.split("=")[1].split()[0]) for s in d} for d in (data.train, data.test)
    )
    assert len(train) == len(data.train)
    assert min(abs(a - b) for a in train for b in test) == 5


@needs_nilearn
def test_noise_and_shading_are_seeded_and_leave_labels_alone():
    few = {"slices": range(60, 90), "test_blocks": (range(80, 90),)}
    plain = load_icbm152(**few)
    noisy, again, other = (
        load_icbm152(noise=0.05, shading=0.4, seed=seed, **few).test[0] for seed in (0, 0, 1)
    )
    torch.testing.assert_close(noisy.image, again.image, rtol=0, atol=0)
    assert (noisy.image - other.image).abs().mean() > 0.01
    assert (noisy.image - plain.test[0].image).abs().mean() > 0.01
    assert torch.equal(noisy.label, plain.test[0].label)


@needs_nilearn
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slices": range(180, 200)}, "slices: expected slices in"),
        ({"test_blocks": (range(10, 12),)}, "test_blocks: expected slices of"),
        ({"test_blocks": ()}, "test_blocks: expected slices left to train and to test"),
        ({"noise": -1}, "noise: expected a number from 0 to 1"),
    ],
)
def test_brain_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        load_icbm152(**options)


def test_without_nilearn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(segmentation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tritonconv\[demo\]'"):
        load_icbm152()


def test_membranes_split_24_to_6():
    root = os.environ.get("TRITONCONV_DATA")
    if not root:
        pytest.skip("TRITONCONV_DATA does not name a folder with vision/isbi2012_em")
    folder = Path(root) / "vision" / "isbi2012_em"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    data = load_folder(folder, classes=("membrane", "interior"))
    assert [s.name for s in data.train] == [str(i) for i in range(24)]
    assert [s.name for s in data.test] == [str(i) for i in range(24, 30)]
    labels = torch.stack([s.label for d in (data.train, data.test) for s in d])
    assert labels.shape == (30, 512, 512)
    assert (labels == 0).double().mean().item() == pytest.approx(0.2196, abs=1e-4)


@needs_nilearn
def test_examples_run():
    assert doctest.testmod(segmentation).failed == 0
