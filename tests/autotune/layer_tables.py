"""Convolutions of well-known networks, derived from the tables of their papers.

The packaged suites were written from these derivations; tests compare the two, and both with the
networks of torchvision where that is installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

OPERATORS = ("conv2d.forward", "conv2d.dgrad", "conv2d.wgrad")
CHOICES = {
    "dtype": ["bfloat16", "float16", "float32"],
    "layout": ["channels_last", "contiguous"],
}


@dataclass(frozen=True)
class Conv:
    """One square convolution at one map size; ``epilogue`` is what the forward product fuses.

    ``second`` of the inputs come in a tensor of their own; ``operators`` are those of the row
    where they are not the suite's.
    """

    part: str
    inputs: int
    outputs: int
    size: int
    kernel: int = 1
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    epilogue: str = "none"
    second: int = 0
    operators: tuple[str, ...] = ()

    @property
    def pad(self) -> int:
        """Zeros at either end: those that keep the size, unless said."""
        return self.kernel // 2 if self.padding is None else self.padding

    def row(self, batch: int, many: bool) -> dict[str, Any]:
        """The layer as a row of a suite; ``many`` batches are told apart by their names."""
        hop = f"s{self.stride}" if self.stride > 1 else ""
        name = f"{self.part} {self.inputs}-{self.outputs} {self.size}x{self.size} k{self.kernel}"
        if self.epilogue.endswith("+acc"):
            name += " acc"
        row: dict[str, Any] = {
            "name": f"n{batch} {name}{hop}" if many else f"{name}{hop}",
            "batch": batch,
            "in_channels": self.inputs,
            "out_channels": self.outputs,
            "height": self.size,
            "width": self.size,
            "kernel": f"{self.kernel}x{self.kernel}",
            "stride": f"{self.stride}x{self.stride}",
            "padding": f"{self.pad}x{self.pad}",
        }
        if self.groups > 1:
            row["groups"] = self.groups
        if self.epilogue != "none":
            row["epilogue"] = self.epilogue
        if self.second:
            row["second_channels"] = self.second
        if self.operators:
            row["operators"] = list(self.operators)
        return row


def divisible(value: float, by: int = 8) -> int:
    """The multiple of ``by`` nearest to ``value``, at least 90 % of it (the authors' rounding)."""
    rounded = max(by, int(value + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * value else rounded


def depthwise(width: int, size: int, kernel: int, stride: int = 1) -> Conv:
    return Conv("depthwise", width, width, size, kernel, stride, groups=width)


def squeeze(width: int, inner: int) -> list[Conv]:
    """Squeeze-and-excitation: two 1x1 convolutions with bias of a pooled map."""
    return [
        Conv("squeeze", width, inner, 1, epilogue="fused"),
        Conv("excite", inner, width, 1, epilogue="fused"),
    ]


def convnext(depth_widths: Sequence[int] = (96, 192, 384, 768)) -> Iterator[Conv]:
    """Liu et al. 2022, arXiv 2201.03545, table 9; every convolution has a bias."""
    size = 224 // 4
    yield Conv("stem", 3, depth_widths[0], 224, 4, 4, 0, epilogue="fused")
    for index, width in enumerate(depth_widths):
        if index:
            before = depth_widths[index - 1]
            yield Conv("downsample", before, width, size, 2, 2, 0, epilogue="fused")
            size //= 2
        yield replace(depthwise(width, size, 7), epilogue="fused")


def mobilenet_v2() -> Iterator[Conv]:
    """Sandler et al. 2018, arXiv 1801.04381, table 2: expansion, width, blocks, stride."""
    yield Conv("stem", 3, 32, 224, 3, 2)
    width, size = 32, 112
    for expansion, after, blocks, hop in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for block in range(blocks):
            stride = hop if block == 0 else 1
            inner = width * expansion
            if expansion > 1:
                yield Conv("expand", width, inner, size)
            yield depthwise(inner, size, 3, stride)
            size //= stride
            yield Conv("project", inner, after, size)
            width = after
    yield Conv("head", width, 1280, size)


def mobilenet_v3_large() -> Iterator[Conv]:
    """Howard et al. 2019, arXiv 1905.02244, table 1: kernel, expanded, out, squeeze, stride."""
    yield Conv("stem", 3, 16, 224, 3, 2)
    width, size = 16, 112
    for kernel, inner, after, squeezed, stride in (
        (3, 16, 16, False, 1),
        (3, 64, 24, False, 2),
        (3, 72, 24, False, 1),
        (5, 72, 40, True, 2),
        (5, 120, 40, True, 1),
        (5, 120, 40, True, 1),
        (3, 240, 80, False, 2),
        (3, 200, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 480, 112, True, 1),
        (3, 672, 112, True, 1),
        (5, 672, 160, True, 2),
        (5, 960, 160, True, 1),
        (5, 960, 160, True, 1),
    ):
        if inner != width:
            yield Conv("expand", width, inner, size)
        yield depthwise(inner, size, kernel, stride)
        size //= stride
        if squeezed:
            yield from squeeze(inner, divisible(inner / 4))
        yield Conv("project", inner, after, size)
        width = after
    yield Conv("head", width, 960, size)


def efficientnet_b0() -> Iterator[Conv]:
    """Tan and Le 2019, arXiv 1905.11946, table 1: expansion, width, blocks, stride, kernel."""
    yield Conv("stem", 3, 32, 224, 3, 2)
    width, size = 32, 112
    for expansion, after, blocks, hop, kernel in (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ):
        for block in range(blocks):
            stride = hop if block == 0 else 1
            inner = width * expansion
            if expansion > 1:
                yield Conv("expand", width, inner, size)
            yield depthwise(inner, size, kernel, stride)
            size //= stride
            yield from squeeze(inner, width // 4)
            yield Conv("project", inner, after, size)
            width = after
    yield Conv("head", width, 1280, size)


def vit_patch() -> Iterator[Conv]:
    """Dosovitskiy et al. 2020, arXiv 2010.11929: patch side and width of B, L and H."""
    for name, patch, width in (("B/16", 16, 768), ("L/16", 16, 1024), ("L/14", 14, 1024)):
        yield Conv(name, 3, width, 224, patch, patch, 0, epilogue="fused")
    yield Conv("H/14", 3, 1280, 224, 14, 14, 0, epilogue="fused")


def pair(part: str, first: int, second: int, outputs: int, size: int, kernel: int = 1) -> Conv:
    """Two inputs that are not concatenated; each has gradients of its own."""
    fused = ("conv2d.fused",)
    inputs = first + second
    layer = Conv(part, inputs, outputs, size, kernel, epilogue="fused")
    return replace(layer, second=second, operators=fused)


def attention_unet(
    size: int = 256, widths: Sequence[int] = (16, 32, 64, 128, 256), classes: int = 2
) -> Iterator[Conv]:
    """Our ``AttentionUNet`` in training: what its gates compute rides on their convolutions."""
    *levels, centre = widths
    sizes = [size >> level for level in range(len(widths))]
    before = 1
    for width, side in zip(widths, sizes, strict=True):
        part = "centre" if width == centre else "encoder"
        yield Conv(part, before, width, side, 3, epilogue="fused")
        yield Conv(part, width, width, side, 3, epilogue="fused")
        before = width
    yield Conv("gating", centre, centre, sizes[-1], epilogue="fused")
    for level in range(len(levels) - 1, -1, -1):
        width, coarser, side = levels[level], widths[level + 1], sizes[level]
        if level:
            yield Conv("gate phi", coarser, width, side // 2, epilogue="fused")
            yield Conv("gate theta", width, width, side, 2, 2, 0, epilogue="fused+operand+acc")
            yield Conv("gate psi", width, 1, side // 2, epilogue="fused+acc")
            yield Conv("gate W", width, width, side, epilogue="fused+acc")
            yield pair("gate combine", width, width, width, side)
        yield pair("decoder", width, coarser, width, side, 3)
        yield Conv("decoder half", coarser, width, side, 3, operators=OPERATORS[1:])
        yield Conv("decoder", width, width, side, 3, epilogue="fused")
        yield Conv("head", width, classes, side, epilogue="fused")
    yield Conv("fuse", len(levels) * classes, classes, size, epilogue="fused")


@dataclass(frozen=True)
class Table:
    """A suite as derived."""

    name: str
    description: str
    layers: tuple[Conv, ...]
    batches: tuple[int, ...]
    operators: tuple[str, ...] = OPERATORS

    def rows(self) -> list[dict[str, Any]]:
        """Its rows, one per different call; layers of the same geometry stand once."""
        rows: dict[str, dict[str, Any]] = {}
        for batch in self.batches:
            for layer in self.layers:
                row = layer.row(batch, len(self.batches) > 1)
                fields = {name: value for name, value in row.items() if name != "name"}
                rows.setdefault(json.dumps(fields), row)
        return list(rows.values())

    def text(self) -> str:
        """The suite's file."""
        head = {
            "schema_version": 1,
            "name": self.name,
            "description": self.description,
            "operators": list(self.operators),
            "choices": CHOICES,
        }
        lines = ",\n".join(f"  {json.dumps(row)}" for row in self.rows())
        return json.dumps(head, indent=1)[:-2] + f',\n "problems": [\n{lines}\n ]\n}}\n'


def _table(name: str, description: str, layers: Iterable[Conv], *batches: int) -> Table:
    operators = OPERATORS
    if name == "vit_patch":  # nobody asks for the gradient of an image
        operators = ("conv2d.forward", "conv2d.wgrad")
    return Table(name, description, tuple(layers), batches, operators)


TABLES = (
    _table(
        "attention_unet",
        "Attention U-Net 2-D in training at 256x256, batch 8, with what its gates fuse",
        attention_unet(),
        8,
    ),
    _table(
        "convnext_tiny",
        "Convolutions of ConvNeXt-T at 224x224, batches 1 and 64; its 1x1 layers are linear",
        convnext(),
        1,
        64,
    ),
    _table("efficientnet_b0", "EfficientNet-B0 at 224x224, batch 128", efficientnet_b0(), 128),
    _table("mobilenet_v2", "MobileNetV2 at 224x224, batch 128", mobilenet_v2(), 128),
    _table(
        "mobilenet_v3_large", "MobileNetV3-Large at 224x224, batch 128", mobilenet_v3_large(), 128
    ),
    _table(
        "vit_patch",
        "Patch embeddings of ViT and MAE at 224x224: B/16, L/16, L/14, H/14; batches 1 and 64",
        vit_patch(),
        1,
        64,
    ),
)


def write(folder: Path) -> None:
    """Write the suites' files; what ``python tests/autotune/layer_tables.py FOLDER`` does."""
    for table in TABLES:
        (folder / f"{table.name}.json").write_text(table.text())


if __name__ == "__main__":
    import sys

    write(Path(sys.argv[1]))
