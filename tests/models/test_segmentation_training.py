from __future__ import annotations

import dataclasses
import doctest
import math
import os
import signal
import threading

import pytest
import torch

from tritonconv.models.data.segmentation import (
    SegmentationData,
    SegmentationDataset,
    SegmentationSample,
)
from tritonconv.models.vision import segmentation
from tritonconv.models.vision.attention_unet import build
from tritonconv.models.vision.segmentation import (
    TrainConfig,
    demo_config,
    demo_data,
    demo_model,
    evaluate,
    predict,
    render,
    train,
)


def discs(count: int, seed: int, size: int = 40) -> SegmentationDataset:
    """Noisy images of bright discs on a gradient."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    samples = []
    for index in range(count):
        y, x, r = torch.rand(3, generator=generator).tolist()
        y, x, r = 8 + y * (size - 16), 8 + x * (size - 16), 4 + 5 * r
        label = ((rows - y) ** 2 + (columns - x) ** 2 < r**2).long()
        image = label + 0.5 * columns / size + 0.3 * torch.randn(size, size, generator=generator)
        samples.append(SegmentationSample(image[None], label, f"disc {index}"))
    return SegmentationDataset(samples)


@pytest.fixture(scope="module")
def data() -> SegmentationData:
    return SegmentationData("discs", ("outside", "disc"), discs(12, 0), discs(4, 1), "synthetic")


def small(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build(1, 2, widths=(4, 8, 8))


FAST = TrainConfig(steps=6, batch_size=2, crop=24)


def test_dice_rises(data):
    model = small()
    before = evaluate(model, data, device="cpu")
    seen = []
    config = TrainConfig(steps=60, batch_size=4, crop=32, learning_rate=1e-2)
    result = train(model, data, config, device="cpu", progress=seen.append)
    after = evaluate(model, data, device="cpu")
    assert before.dice[1] < 0.6
    assert after.dice[1] > 0.85
    assert after.classes == ("outside", "disc")
    assert after.mean == pytest.approx(sum(after.dice) / 2)
    assert result.steps == len(result.losses) == len(seen) == 60
    assert sum(result.losses[-10:]) < sum(result.losses[:10])
    assert result.step_ms > 0
    assert not result.interrupted
    assert [p.step for p in seen] == list(range(1, 61))
    assert seen[-1].fraction == 1


def test_same_seed_same_weights_and_global_generator_untouched(data):
    one, two, other = small(), small(), small()
    train(one, data, FAST, device="cpu")
    state = torch.get_rng_state()
    train(two, data, FAST, device="cpu")
    assert torch.equal(state, torch.get_rng_state())
    train(other, data, dataclasses.replace(FAST, seed=1), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(
        torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_interrupted_and_resumed_equals_run_through(data, tmp_path):
    through = small()
    expected = train(through, data, FAST, device="cpu")

    config = dataclasses.replace(FAST, checkpoint=tmp_path / "deep" / "run.pt")
    first = small()

    def interrupt(progress):
        if progress.step == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    stopped = train(first, data, config, device="cpu", progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.interrupted
    assert stopped.steps == 3

    second = small(seed=99)
    resumed = train(second, data, config, device="cpu")
    assert resumed.steps == 6
    assert not resumed.interrupted
    assert resumed.losses == expected.losses
    assert resumed.seconds > stopped.seconds
    for name, value in through.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert [p.name for p in config.checkpoint.parent.iterdir()] == ["run.pt"]

    finished = train(small(seed=5), data, config, device="cpu")
    assert finished.steps == 6
    assert math.isnan(finished.step_ms)


def test_second_interrupt_raises(data):
    def interrupt(progress):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(small(), data, FAST, device="cpu", progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_a_thread(data):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(small(), data, FAST, device="cpu"))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 6


def test_time_budget(data):
    config = TrainConfig(seconds=0.3, batch_size=2, crop=24)
    result = train(small(), data, config, device="cpu")
    assert result.steps >= 1
    assert 0.3 <= result.seconds < 5


def test_checkpoint_is_never_unpickled_freely(data, tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    path = tmp_path / "evil.pt"
    torch.save({"format": 1, "model": Evil()}, path)
    with pytest.raises(ValueError, match=r"config\.checkpoint: expected a checkpoint of train\(\)"):
        train(small(), data, dataclasses.replace(FAST, checkpoint=path), device="cpu")
    assert not marker.exists()


def test_checkpoints_of_something_else_are_refused(data, tmp_path):
    path = tmp_path / "run.pt"
    config = dataclasses.replace(FAST, steps=1, checkpoint=path)
    train(small(), data, config, device="cpu")
    with pytest.raises(ValueError, match=r"config\.batch_size: expected 2 as in the checkpoint"):
        train(small(), data, dataclasses.replace(config, batch_size=3), device="cpu")
    with pytest.raises(ValueError, match="expected a checkpoint of this model"):
        train(build(1, 2, widths=(4, 6)), data, config, device="cpu")
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="format 1"):
        train(small(), data, config, device="cpu")
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"config\.checkpoint"):
        train(small(), data, config, device="cpu")


def test_a_failed_save_leaves_the_old_checkpoint(data, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    train(small(), data, dataclasses.replace(FAST, steps=1, checkpoint=path), device="cpu")
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(segmentation.torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        train(small(), data, dataclasses.replace(FAST, checkpoint=path), device="cpu")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_crops_larger_than_the_image_are_extended(data):
    assert train(small(), data, dataclasses.replace(FAST, crop=56), device="cpu").steps == 6


def test_channels_last_trains_alike(data):
    one, two = small(), small()
    a = train(one, data, FAST, device="cpu")
    b = train(two, data, dataclasses.replace(FAST, channels_last=True), device="cpu")
    assert a.losses == pytest.approx(b.losses, abs=1e-3)


def test_diverging_loss_stops(data):
    model = small()
    with torch.no_grad():
        model.fuse.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan"):
        train(model, data, FAST, device="cpu")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(), "steps, seconds: expected at least one of them"),
        (lambda: TrainConfig(steps=0), "steps: expected a positive number, got 0"),
        (lambda: TrainConfig(seconds=-1), "seconds: expected a positive number"),
        (lambda: TrainConfig(steps=1, crop=0), "crop"),
        (lambda: TrainConfig(steps=1, weight_decay=-1), "weight_decay"),
    ],
)
def test_config_is_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_options_that_need_a_gpu_or_a_known_split(data):
    with pytest.raises(ValueError, match=r"config\.amp: expected a CUDA device, got cpu"):
        train(small(), data, dataclasses.replace(FAST, amp=True), device="cpu")
    with pytest.raises(ValueError, match="split: expected 'test' or 'train'"):
        evaluate(small(), data, device="cpu", split="all")


def test_evaluation_restores_the_mode(data):
    model = small().train()
    evaluate(model, data, device="cpu", split="train")
    assert model.training


def test_demo_pieces_fit_together(data, tmp_path):
    model = demo_model(data, "cpu")
    assert model.widths == (8, 16, 32, 64, 128)
    twin = demo_model(data, "cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    config = dataclasses.replace(demo_config("cpu"), steps=1, batch_size=2)
    train(model, data, config, device="cpu")
    sample = data.test[0]
    labels, attention = predict(model, sample, device="cpu")
    assert labels.shape == attention.shape == sample.label.shape
    assert labels.dtype == torch.int64
    assert 0 < attention.min() <= attention.max() < 1


def test_render_writes_a_png(data, tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the demo extra)")
    sample = data.test[0]
    path = tmp_path / "panels.png"
    attention = torch.rand(sample.label.shape)
    arguments = (sample.image, sample.label, sample.label, attention)
    assert render(path, *arguments, classes=data.classes, title="discs") == path
    with image_module.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1000
    render(path, sample.image.expand(3, -1, -1), *arguments[1:])
    with pytest.raises(ValueError, match="prediction: expected the size of the image"):
        render(path, sample.image, sample.label, sample.label[1:], attention)


def test_demo_data_takes_a_folder(tmp_path):
    with pytest.raises(ValueError, match="path: expected an existing folder"):
        demo_data(tmp_path / "nowhere")


@pytest.mark.gpu
def test_mixed_precision_on_a_gpu(data):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = small()
    config = TrainConfig(
        steps=60, batch_size=4, crop=32, learning_rate=1e-2, amp=True, channels_last=True
    )
    result = train(model, data, config, device="cuda")
    assert evaluate(model, data, device="cuda", amp=True).dice[1] > 0.8
    assert result.step_ms > 0
    assert len(result.losses) == 60


def test_examples_run():
    assert doctest.testmod(segmentation).failed == 0
