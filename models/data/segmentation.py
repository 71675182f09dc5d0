"""Images with label maps: what segmentation networks train on, and two ways to get them.

:func:`load_icbm152` reads real brain images that the ``nilearn`` package carries, so it needs no
network; :func:`load_folder` reads pairs of PNG files. Both split in blocks of neighbouring images:
neighbouring slices of a volume are nearly equal, so a random split would test on what was trained.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tritonconv.runtime.errors import TritonConvError, bad_value


class MissingExtraError(TritonConvError, ImportError):
    """An optional package is needed and not installed; the message says how to install it."""


@dataclass(frozen=True, eq=False)
class SegmentationSample:
    """One image and its label map.

    Attributes:
        image: ``(C, *size)`` float32.
        label: ``(*size)`` int64, class indices from 0.
        name: where it comes from, for people.
    """

    image: Tensor
    label: Tensor
    name: str

    def __post_init__(self) -> None:
        if self.image.shape[1:] != self.label.shape:
            raise bad_value(
                f"label of {self.name}",
                f"the size of the image {tuple(self.image.shape[1:])}",
                tuple(self.label.shape),
            )


class SegmentationDataset(torch.utils.data.Dataset[SegmentationSample]):
    """A sequence of samples that ``torch.utils.data`` understands.

    Example:
        >>> import torch
        >>> sample = SegmentationSample(torch.zeros(1, 4, 4), torch.zeros(4, 4).long(), "blank")
        >>> len(SegmentationDataset([sample]))
        1
    """

    def __init__(self, samples: Sequence[SegmentationSample]) -> None:
        self.samples = tuple(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> SegmentationSample:
        return self.samples[index]


@dataclass(frozen=True, eq=False)
class SegmentationData:
    """A training and a test set with the same classes.

    Attributes:
        name: short name of the data.
        classes: names of the classes, in the order of the label values.
        train: samples to train on.
        test: samples to test on, disjoint from ``train``.
        source: where the data come from, and under which terms.
    """

    name: str
    classes: tuple[str, ...]
    train: SegmentationDataset
    test: SegmentationDataset
    source: str

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.train[0].image.shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes, the background included."""
        return len(self.classes)


def split_block(count: int, test_fraction: float = 0.2) -> tuple[range, range]:
    """Split ``count`` neighbouring images: the last block of them is for testing.

    Raises:
        ValueError: fewer than two images, or a fraction outside (0, 1).

    Example:
        >>> split_block(30)
        (range(0, 24), range(24, 30))
    """
    if count < 2:
        raise bad_value("count", "at least 2 images, to train and to test", count)
    if not 0 < test_fraction < 1:
        raise bad_value("test_fraction", "a number between 0 and 1", test_fraction)
    tests = min(max(round(count * test_fraction), 1), count - 1)
    return range(count - tests), range(count - tests, count)


ICBM152_CLASSES = ("background", "grey matter", "white matter")
ICBM152_SOURCE = (
    "ICBM 152 nonlinear symmetric atlas 2009a (Fonov et al. 2009, 2011; Collins et al. 1999): the "
    "average T1-weighted MR image of 152 adult brains, 1 mm, with maps of grey and white matter; "
    "read from the installed nilearn package (BSD-3-Clause). nilearn gives the licence of the "
    "atlas as unknown; DIPY, which distributes the atlas too, gives it as (C) 1993-2004 Louis "
    "Collins, McConnell Brain Imaging Centre, McGill University: use, copying, modification and "
    "distribution for any purpose and without fee, if the copyright notice is kept; no warranty."
)
_ICBM152_FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


def load_icbm152(
    *,
    slices: range = range(28, 148),
    test_blocks: Sequence[range] = (range(60, 74), range(108, 122)),
    gap: int = 4,
    noise: float = 0.0,
    shading: float = 0.0,
    seed: int = 0,
) -> SegmentationData:
    """Load axial slices of an average of 152 real brains, with grey and white matter.

    The files are part of the ``nilearn`` package (about 5 MB) and are read from there with
    ``nibabel``; nilearn itself is not imported and nothing is downloaded. The image is the T1 MR
    template, brain only, at 1 mm, brought to mean 0 and standard deviation 1 over the volume. A
    pixel's class is the likeliest of grey matter, white matter and the rest (outside, ventricles,
    other fluid) in the atlas's tissue maps. These maps are averages of automatic segmentations: a
    Dice score on them shows that training works, and is no clinical benchmark.

    The average of 152 brains is so clean that two thresholds on the intensity already score a mean
    Dice of 0.978 on the test slices. ``noise`` and ``shading`` make it as hard as a single scan, by
    simulating the two artefacts that simulators of brain MR do: Rician noise of the receiver and
    the smooth shading of the coil.

    Args:
        slices: axial slices to use, of 0 to 188; below 10 and above 155 there is hardly tissue.
        test_blocks: the slices to test on, in blocks.
        gap: slices on both sides of each test block that are used for neither.
        noise: standard deviation of the noise, as a part of the brightest intensity.
        shading: range of the factor by which the intensity varies over a slice: 0.4 for 0.8 to
            1.2. Every slice gets its own shading and noise.
        seed: of noise and shading.

    Returns:
        Samples of ``(1, 233, 197)`` float32 (nose up) and ``(233, 197)`` int64; by default 76 to
        train on and 28 to test on. ``source`` names origin and terms.

    Raises:
        MissingExtraError: nilearn or nibabel is not installed.
        ValueError: a slice is outside the volume, a test block outside ``slices``, no slice is
            left for one of the sets, or ``noise`` or ``shading`` is outside [0, 1].

    Example:
        >>> data = load_icbm152()
        >>> len(data.train), len(data.test), data.train[0].image.shape
        (76, 28, torch.Size([1, 233, 197]))
    """
    for name, value in (("noise", noise), ("shading", shading)):
        if not 0 <= value <= 1:
            raise bad_value(name, "a number from 0 to 1", value)
    volumes = {kind: _read_icbm152(kind) for kind in ("t1", "gm", "wm")}
    t1 = volumes["t1"].astype(np.float32) / 255
    grey, white = (volumes[kind].astype(np.int16) for kind in ("gm", "wm"))
    classes = np.stack([255 - grey - white, grey, white]).argmax(0)
    source = ICBM152_SOURCE
    if noise or shading:
        t1 = _degrade(t1, noise, shading, np.random.default_rng(seed))
        source += f" Noise ({noise:.0%}) and shading ({shading:.0%}) are simulated."
    t1 = (t1 - t1.mean()) / t1.std()

    depth = t1.shape[2]
    if not slices or min(slices) < 0 or max(slices) >= depth:
        raise bad_value("slices", f"slices in [0, {depth})", slices)
    tested = {z for block in test_blocks for z in block}
    if not tested <= set(slices):
        raise bad_value("test_blocks", f"slices of {slices}", tuple(test_blocks))
    unused = {z + d for z in tested for d in range(-gap, gap + 1)}

    def sample(z: int) -> SegmentationSample:
        # The arrays run left to right, back to front: turn them so that the nose is up.
        image = np.ascontiguousarray(t1[:, ::-1, z].T)
        label = np.ascontiguousarray(classes[:, ::-1, z].T)
        return SegmentationSample(
            torch.from_numpy(image)[None], torch.from_numpy(label), f"icbm152 z={z - 72:+d} mm"
        )

    train = [sample(z) for z in slices if z not in unused]
    test = [sample(z) for z in sorted(tested)]
    if not train or not test:
        raise bad_value(
            "test_blocks", "slices left to train and to test", f"{len(train)} and {len(test)}"
        )
    return SegmentationData(
        "icbm152",
        ICBM152_CLASSES,
        SegmentationDataset(train),
        SegmentationDataset(test),
        source,
    )


def _degrade(
    volume: np.ndarray, noise: float, shading: float, rng: np.random.Generator
) -> np.ndarray:
    """Shade every slice ``volume[:, :, z]`` by a smooth random factor and add Rician noise."""
    width, height, depth = volume.shape
    u = np.linspace(-1, 1, width, dtype=np.float32)[:, None]
    v = np.linspace(-1, 1, height, dtype=np.float32)[None, :]
    out = np.empty_like(volume)
    for z in range(depth):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        wave = np.sin(rng.uniform(1.5, 3.0) * (np.cos(angle) * u + np.sin(angle) * v) + phase)
        wave = 2 * (wave - wave.min()) / np.ptp(wave) - 1
        shaded = volume[:, :, z] * (1 + shading / 2 * wave)
        real, imaginary = rng.normal(0, noise, (2, width, height)) if noise else (0.0, 0.0)
        out[:, :, z] = np.hypot(shaded + real, imaginary)
    return out


def _read_icbm152(kind: str) -> np.ndarray:
    hint = "pip install 'tritonconv[demo]' (or: pip install nilearn)"
    spec = importlib.util.find_spec("nilearn")  # finds the folder without importing nilearn
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"load_icbm152 reads images from the nilearn package: {hint}")
    try:
        import nibabel
    except ImportError as error:
        raise MissingExtraError(f"load_icbm152 needs the nibabel package: {hint}") from error
    path = Path(spec.submodule_search_locations[0]) / _ICBM152_FILE.format(kind)
    if not path.is_file():
        raise MissingExtraError(
            f"the installed nilearn has no {path.name} (0.11 and 0.14 have it): {hint}"
        )
    return np.asarray(nibabel.nifti1.load(path).dataobj)


_LAYOUTS = (("image", "label"), ("images", "labels"), ("images", "masks"))
_MOST_CLASSES = 64


def load_folder(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    test_fraction: float = 0.2,
) -> SegmentationData:
    """Load pairs of PNG files: ``image/NAME.png`` with ``label/NAME.png``.

    The folders may also be called ``images`` and ``labels``, or ``images`` and ``masks``. Pairs
    are put in natural order (2 before 10); the last block of them is the test set, and all others
    the training set. The values that occur in the label files, sorted, become classes 0, 1, ...:
    a mask of 0 and 255 has two. Every image is brought to mean 0 and standard deviation 1 per
    channel. Images may differ in size.

    Args:
        path: the folder that holds the two folders.
        classes: names of the classes in the order of their label values; by default the values.
        test_fraction: part of the images to test on.

    Returns:
        Samples of ``(C, H, W)`` float32, C being 1 for grey and 3 for colour images, and
        ``(H, W)`` int64.

    Raises:
        MissingExtraError: pillow is not installed.
        ValueError: the folder or a partner is missing, sizes differ, a file is no readable image,
            a label file is not a label map, or there are fewer than two pairs.

    Example:
        The membranes of the ISBI 2012 challenge, 24 slices to train on and 6 to test on::

            data = load_folder("isbi2012_em", classes=("membrane", "interior"))
    """
    folder = Path(path)
    if not folder.is_dir():
        raise bad_value("path", "an existing folder", repr(str(path)))
    for image_name, label_name in _LAYOUTS:
        image_folder, label_folder = folder / image_name, folder / label_name
        if image_folder.is_dir() and label_folder.is_dir():
            break
    else:
        layouts = ", ".join(f"{a}/ and {b}/" for a, b in _LAYOUTS)
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        raise bad_value("path", f"a folder with {layouts}", f"{folder} with {found}")

    images, labels = (_png_files(p) for p in (image_folder, label_folder))
    for have, want, at in ((images, labels, label_folder), (labels, images, image_folder)):
        missing = sorted(have.keys() - want.keys(), key=natural_key)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise bad_value(
                "path", f"{at / missing[0]}.png, the partner of its namesake", f"none{more}"
            )
    if len(images) < 2:
        raise bad_value("path", f"at least 2 pairs of PNG files in {folder}", len(images))
    train, test = split_block(len(images), test_fraction)

    names = sorted(images, key=natural_key)
    maps = [_read_png(labels[name], label=True) for name in names]
    for name, label in zip(names, maps, strict=True):
        if label.ndim != 2:
            raise bad_value(
                f"label {labels[name]}", "a grey or palette image", f"{label.shape[2]} channels"
            )
    values = np.unique(np.concatenate([np.unique(label) for label in maps]))
    if not 2 <= len(values) <= _MOST_CLASSES:
        raise bad_value(
            f"labels in {label_folder}",
            f"2 to {_MOST_CLASSES} different values, one per class",
            f"{len(values)} (has a mask been smoothed, or is it empty?)",
        )
    if classes is None:
        classes = [f"label {value}" for value in values]
    elif len(classes) != len(values):
        raise bad_value("classes", f"{len(values)} names, for {values.tolist()}", tuple(classes))

    samples: list[SegmentationSample] = []
    for name, label in zip(names, maps, strict=True):
        pixels = _read_png(images[name]).astype(np.float32)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if pixels.shape[1:] != label.shape:
            raise bad_value(
                f"label {labels[name]}", f"the size of its image {pixels.shape[1:]}", label.shape
            )
        if samples and len(pixels) != len(samples[0].image):
            raise bad_value(
                f"image {images[name]}",
                f"{len(samples[0].image)} channels like {names[0]}.png",
                f"{len(pixels)} channels",
            )
        pixels -= pixels.mean((1, 2), keepdims=True)
        pixels /= np.maximum(pixels.std((1, 2), keepdims=True), 1e-6)
        samples.append(
            SegmentationSample(
                torch.from_numpy(np.ascontiguousarray(pixels)),
                torch.from_numpy(np.searchsorted(values, label).astype(np.int64)),
                name,
            )
        )
    return SegmentationData(
        folder.resolve().name,
        tuple(classes),
        SegmentationDataset([samples[i] for i in train]),
        SegmentationDataset([samples[i] for i in test]),
        f"files of {folder}",
    )


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which numbers inside names count as numbers.

    Example:
        >>> sorted(["10", "9", "s2", "s10"], key=natural_key)
        ['9', '10', 's2', 's10']
    """
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p)


def _png_files(folder: Path) -> dict[str, Path]:
    return {
        p.stem: p
        for p in folder.iterdir()
        if p.is_file() and p.suffix.lower() == ".png" and not p.name.startswith(".")
    }


def _read_png(path: Path, *, label: bool = False) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(
            "load_folder needs the pillow package: pip install 'tritonconv[demo]'"
        ) from error
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            image: Image.Image = opened
            if not label:  # a palette's indices are labels, but no intensities
                plain = {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "LA": "L", "La": "L"}
                image = image.convert(plain.get(image.mode, image.mode))
            array = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise bad_value(
            f"file {path}", "a readable PNG image", f"{type(error).__name__}: {error}"
        ) from error
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
