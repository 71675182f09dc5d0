"""Train a segmentation network, score it and draw what it does.

The pieces that ``autotune quickstart`` is made of, and that work alone::

    data = demo_data()                                  # or demo_data("my/folder")
    model, config = demo_model(data, "cpu"), demo_config("cpu")
    before = evaluate(model, data, device="cpu")
    result = train(model, data, config, device="cpu")
    after = evaluate(model, data, device="cpu")
    labels, attention = predict(model, data.test[0], device="cpu")
    render("out.png", data.test[0].image, data.test[0].label, labels, attention)

Training follows Oktay et al. 2018 (https://arxiv.org/abs/1804.03999) in loss, optimiser and
augmentation by flips and crops; learning rate and schedule are ours, for minutes instead of days.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonconv.runtime.errors import bad_value

from ..data.segmentation import (
    SegmentationData,
    SegmentationSample,
    load_folder,
    load_icbm152,
)
from ._steps import StepTimer, stop_on_interrupt
from .attention_unet import build
from .dice import overlap_counts, soft_dice_loss
from .panels import render as render  # it belongs to the pieces above

_REPORT_EVERY = 10  # steps between reports on a GPU, where each report waits for the device


@dataclass(frozen=True)
class TrainConfig:
    """How to train; at least one of ``steps`` and ``seconds`` ends it.

    Attributes:
        steps: stop after so many steps.
        seconds: stop after so many seconds of training, resumed time included.
        batch_size: crops per step.
        crop: sides of the random crop; smaller images are used whole, extended with class 0.
        learning_rate: Adam's, at the start; it falls to 0 along half a cosine over the budget.
        weight_decay: Adam's L2 penalty (the authors' code: 1e-6).
        flips: mirror every crop at random along each axis.
        seed: of crops, flips and order. The weights of the model are the caller's.
        amp: bfloat16 autocast; CUDA only.
        channels_last: train in that memory format.
        checkpoint: file to resume from when it exists, and to save to at the end, on Ctrl-C and
            every ``checkpoint_every`` seconds.
        checkpoint_every: seconds between checkpoints.

    Raises:
        ValueError: a value is out of its range, or neither budget is given.
    """

    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 8
    crop: int = 96
    learning_rate: float = 3e-3
    weight_decay: float = 1e-6
    flips: bool = True
    seed: int = 0
    amp: bool = False
    channels_last: bool = False
    checkpoint: str | Path | None = None
    checkpoint_every: float = 60.0

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise bad_value("steps, seconds", "at least one of them", "None and None")
        for name in ("steps", "seconds", "batch_size", "crop", "learning_rate", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise bad_value(name, "a positive number", value)
        if self.weight_decay < 0:
            raise bad_value("weight_decay", "0 or more", self.weight_decay)


@dataclass(frozen=True)
class Progress:
    """Handed to the ``progress`` callback of :func:`train`.

    Attributes:
        step: steps done.
        seconds: seconds trained.
        fraction: part of the budget that is used, 0 to 1.
        loss: of the last step.
    """

    step: int
    seconds: float
    fraction: float
    loss: float


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` did.

    Attributes:
        steps: steps done in all, earlier runs of the same checkpoint included.
        seconds: seconds trained in all.
        step_ms: median milliseconds of a step in this run, without its first five; NaN when there
            were no more. On a GPU measured by events on the device.
        losses: loss of every step.
        interrupted: Ctrl-C ended it before its budget.
    """

    steps: int
    seconds: float
    step_ms: float
    losses: tuple[float, ...]
    interrupted: bool


@dataclass(frozen=True)
class Scores:
    """Dice per class, all images of a set counted together.

    Attributes:
        classes: names of the classes.
        dice: score of each class; 1 for a class that occurs neither in truth nor prediction.
    """

    classes: tuple[str, ...]
    dice: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over all classes, the background (class 0) included."""
        return statistics.fmean(self.dice)


def demo_data(folder: str | Path | None = None) -> SegmentationData:
    """Load your own ``folder`` of PNG pairs or, without one, slices of a real brain atlas.

    The slices get simulated noise and shading, without which two thresholds would solve them; with
    them, the best two thresholds score a mean Dice of 0.787 on the test slices (0.988, 0.680 and
    0.693 for background, grey and white matter).

    See :func:`~tritonconv.models.data.segmentation.load_folder` and
    :func:`~tritonconv.models.data.segmentation.load_icbm152`, also for the errors.
    """
    return load_icbm152(noise=0.05, shading=0.4) if folder is None else load_folder(folder)


def demo_model(
    data: SegmentationData,
    device: str | torch.device,
    *,
    seed: int = 0,
    sized_for: str | torch.device | None = None,
) -> nn.Module:
    """Build an Attention U-Net that suits the data and the device.

    On a GPU it has the widths of the paper, on a CPU half of them. ``sized_for`` names another
    device to take the widths for: the network of a GPU, on a machine that has none.
    """
    gpu = torch.device(sized_for or device).type == "cuda"
    widths = (16, 32, 64, 128, 256) if gpu else (8, 16, 32, 64, 128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(data.in_channels, data.num_classes, widths=widths).to(device)


def demo_config(device: str | torch.device, *, seconds: float = 60.0) -> TrainConfig:
    """Return settings with which :func:`demo_model` gets far in ``seconds`` on the device."""
    if torch.device(device).type == "cuda":
        return TrainConfig(seconds=seconds, batch_size=32, crop=192, amp=True, channels_last=True)
    return TrainConfig(seconds=seconds)


def train(
    model: nn.Module,
    data: SegmentationData,
    config: TrainConfig,
    *,
    device: str | torch.device,
    progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train ``model`` in place on ``data.train`` with Adam and the soft Dice loss.

    Ctrl-C ends training after the running step: the model keeps what it has learned, the
    checkpoint is written and the result says ``interrupted``. A second Ctrl-C raises. With a
    budget in steps, an interrupted and resumed training ends with the same weights as one that
    ran through, on a CPU bit for bit.

    Args:
        model: maps ``(N, C, H, W)`` float32 to logits ``(N, classes, H, W)``; moved to ``device``.
        data: images and labels; kept whole on the device.
        config: budget and settings.
        device: where to train.
        progress: called after every step, on a GPU every tenth.

    Raises:
        ValueError: ``amp`` without a CUDA device, or a checkpoint of other settings.
        FloatingPointError: the loss is not finite.

    Example:
        >>> import torch
        >>> from tritonconv.models.data.segmentation import SegmentationDataset
        >>> label = torch.zeros(32, 32).long()
        >>> label[8:24, 8:24] = 1
        >>> samples = SegmentationDataset([SegmentationSample(label[None].float(), label, "box")])
        >>> data = SegmentationData("boxes", ("out", "in"), samples, samples, "synthetic")
        >>> model = build(1, 2, widths=(4, 8))
        >>> train(model, data, TrainConfig(steps=3, crop=32), device="cpu").steps
        3
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    if config.amp and not cuda:
        raise bad_value("config.amp", "a CUDA device", device)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=cuda,  # one launch: small networks wait for the host
    )
    generator = torch.Generator().manual_seed(config.seed)
    images = [s.image.to(device) for s in data.train.samples]
    labels = [s.label.to(device) for s in data.train.samples]

    step, spent, losses = 0, 0.0, torch.zeros(0)
    path = None if config.checkpoint is None else Path(config.checkpoint)
    if path is not None and path.exists():
        step, spent, losses = _load(path, config, model, optimizer, generator, device)

    new_losses: list[Tensor] = []
    timer = StepTimer(cuda)
    saved = began = time.perf_counter()

    def seconds() -> float:
        return spent + time.perf_counter() - began

    def save() -> None:
        if path is not None:
            everything = torch.cat([losses, _stack(new_losses)])
            _save(path, config, model, optimizer, generator, step, seconds(), everything)

    with stop_on_interrupt() as stopped:
        while not stopped() and (used := _used(config, step, seconds())) < 1:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * used))
            with timer:
                image, label = _batch(images, labels, config, generator)
                with _autocast(config.amp):
                    logits = model(image)
                loss = soft_dice_loss(logits, label)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            step += 1
            new_losses.append(loss.detach())
            if cuda and step % _REPORT_EVERY and step != config.steps:
                continue
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss of step {step} is {value}")
            if progress is not None:
                elapsed = seconds()
                progress(Progress(step, elapsed, min(_used(config, step, elapsed), 1.0), value))
            if time.perf_counter() - saved > config.checkpoint_every:
                save()
                saved = time.perf_counter()
        interrupted = stopped() and _used(config, step, seconds()) < 1
        if cuda:
            torch.cuda.synchronize(device)
        total = seconds()
        if new_losses:
            save()
    values = torch.cat([losses, _stack(new_losses)]).tolist()
    return TrainResult(step, total, timer.median_ms(), tuple(values), interrupted)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: SegmentationData,
    *,
    device: str | torch.device,
    split: str = "test",
    amp: bool = False,
) -> Scores:
    """Score ``model`` on whole images of ``data``; all pixels of the set count together.

    Args:
        model: maps ``(1, C, H, W)`` to logits; put into evaluation mode and back.
        data: images and labels.
        device: where to run; the model is moved there.
        split: ``"test"`` or ``"train"``.
        amp: bfloat16 autocast; CUDA only.

    Raises:
        ValueError: ``split`` is neither, or ``amp`` without a CUDA device.
    """
    if split not in ("test", "train"):
        raise bad_value("split", "'test' or 'train'", repr(split))
    device = torch.device(device)
    if amp and device.type != "cuda":
        raise bad_value("amp", "a CUDA device", device)
    counts: list[Tensor] = []
    with _evaluating(model.to(device)):
        for sample in getattr(data, split).samples:
            with _autocast(amp):
                labels = model(sample.image[None].to(device)).argmax(1)[0]
            target = sample.label.to(device)
            counts.append(torch.stack(overlap_counts(labels, target, data.num_classes)))
    both, ours, theirs = torch.stack(counts).sum(0).cpu()
    total = ours + theirs
    dice = torch.where(total > 0, 2 * both / total.clamp(min=1), torch.ones_like(total))
    return Scores(data.classes, tuple(dice.tolist()))


@torch.no_grad()
def predict(
    model: nn.Module, sample: SegmentationSample, *, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """Segment one image with an :class:`~.attention_unet.AttentionUNet`.

    Returns:
        Labels ``(H, W)`` int64 and attention ``(H, W)`` float32, the mean of the maps of the
        finest gated level (zeros without gates); both on the CPU.
    """
    device = torch.device(device)
    with _evaluating(model.to(device)):
        logits, maps = model(sample.image[None].to(device), return_attention=True)
    attention = torch.zeros(sample.label.shape)
    if maps:
        attention = maps[min(maps)][0].mean(0).float().cpu()
    return logits.argmax(1)[0].cpu(), attention


def _autocast(amp: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if amp else nullcontext()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _used(config: TrainConfig, step: int, seconds: float) -> float:
    by_steps = step / config.steps if config.steps else 0.0
    by_seconds = seconds / config.seconds if config.seconds else 0.0
    return max(by_steps, by_seconds)


def _batch(
    images: list[Tensor], labels: list[Tensor], config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw crops ``(N, C, crop, crop)`` and their labels ``(N, crop, crop)``."""
    crop = config.crop

    def draw(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    chosen_images, chosen_labels = [], []
    for _ in range(config.batch_size):
        index = draw(len(images))
        image, label = images[index], labels[index]
        height, width = label.shape
        y, x = draw(max(height - crop, 0) + 1), draw(max(width - crop, 0) + 1)
        image, label = image[:, y : y + crop, x : x + crop], label[y : y + crop, x : x + crop]
        missing = (0, crop - label.shape[1], 0, crop - label.shape[0])
        if any(missing):
            image, label = F.pad(image, missing), F.pad(label, missing)
        mirrored = [d for d in (-2, -1) if config.flips and draw(2)]
        if mirrored:
            image, label = image.flip(mirrored), label.flip(mirrored)
        chosen_images.append(image)
        chosen_labels.append(label)
    batch = torch.stack(chosen_images)
    if config.channels_last:
        # Images of one channel are in both formats; only their strides say which is meant.
        batch = torch.empty_like(batch, memory_format=torch.channels_last).copy_(batch)
    return batch, torch.stack(chosen_labels)


def _stack(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).float().cpu() if losses else torch.zeros(0)


# Settings that a resumed training must share; budget and checkpoint may change.
_FIXED = ("batch_size", "crop", "learning_rate", "weight_decay", "flips", "seed")
_FORMAT = 1


def _save(
    path: Path,
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    step: int,
    seconds: float,
    losses: Tensor,
) -> None:
    """Write a checkpoint beside ``path`` and move it there, so that no half file is ever seen."""
    state = {
        "format": _FORMAT,
        "config": {name: asdict(config)[name] for name in _FIXED},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "step": step,
        "seconds": seconds,
        "losses": losses,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _load(
    path: Path,
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[int, float, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = isinstance(state, dict) and state.get("format") == _FORMAT
    except Exception as error:
        raise bad_value(
            "config.checkpoint", "a checkpoint of train()", f"{path}: {error}"
        ) from error
    if not known:
        raise bad_value("config.checkpoint", f"a checkpoint of train(), format {_FORMAT}", path)
    for name, value in state["config"].items():
        if getattr(config, name) != value:
            raise bad_value(
                f"config.{name}", f"{value} as in the checkpoint {path}", getattr(config, name)
            )
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise bad_value(
            "config.checkpoint", "a checkpoint of this model", f"{path}: {error}"
        ) from error
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return state["step"], state["seconds"], state["losses"]
