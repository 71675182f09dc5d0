from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tritonconv as tc
from tritonconv.runtime.backend import uses_triton
from tritonconv.runtime.errors import ArgumentValueError
from tritonconv.runtime.settings import TABLE, Settings

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a process whose environment sets none of them."""
    for row in TABLE:
        monkeypatch.delenv(row.env, raising=False)
    return Settings()


# setting: (text of the environment variable, value)
PARSED = {
    "backend": ("torch", "torch"),
    "autotune": ("off", "off"),
    "cache_dir": ("~/somewhere", Path.home() / "somewhere"),
    "cache_path": ("/a:/b", (Path("/a"), Path("/b"))),
    "deterministic": ("Yes", True),
    "device_name": ("NVIDIA H100", "NVIDIA H100"),
    "report_misses": ("0", False),
    "fast_launch": ("off", False),
}


@pytest.mark.parametrize("name", PARSED)
def test_environment_and_assignment_mean_the_same(
    name: str, fresh: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = next(row for row in TABLE if row.name == name)
    text, value = PARSED[name]
    assert getattr(fresh, name) == row.default != value
    setattr(fresh, name, text)
    assert getattr(fresh, name) == value
    fresh.reset(name)
    assert getattr(fresh, name) == row.default
    monkeypatch.setenv(row.env, text)
    fresh.reset()
    assert getattr(fresh, name) == value


def test_every_setting_has_its_own_variable_and_a_meaning() -> None:
    assert len({row.env for row in TABLE}) == len({row.name for row in TABLE}) == len(TABLE)
    assert all(row.env.startswith("TRITONCONV_") and row.meaning for row in TABLE)


@pytest.mark.parametrize("name", ["backend", "autotune", "deterministic", "fast_launch"])
def test_bad_values_name_the_setting(
    name: str, fresh: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = next(row for row in TABLE if row.name == name)
    with pytest.raises(ValueError, match=rf"settings\.{name}: expected .*, got 'perhaps'"):
        setattr(fresh, name, "perhaps")
    monkeypatch.setenv(row.env, "perhaps")
    with pytest.raises(ValueError, match=rf"{row.env}: expected .*, got 'perhaps'"):
        getattr(fresh, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("autotune", 3),
        ("autotune", None),
        ("backend", True),
        ("fast_launch", 2),
        ("fast_launch", None),
        ("deterministic", [1]),
        ("cache_dir", 3),
        ("cache_dir", None),
        ("cache_path", 3),
        ("cache_path", None),
        ("cache_path", b"/x"),
        ("cache_path", ["/x", 3]),
        ("device_name", 3),
    ],
)
def test_bad_values_of_other_types_name_the_setting(
    name: str, value: object, fresh: Settings
) -> None:
    with pytest.raises(ArgumentValueError, match=rf"settings\.{name}: expected .*, got "):
        setattr(fresh, name, value)
    assert getattr(fresh, name) == next(row for row in TABLE if row.name == name).default


@pytest.mark.parametrize(
    ("name", "value", "normal"),
    [
        ("cache_path", ["/x"], (Path("/x"),)),
        ("cache_path", Path("/x"), (Path("/x"),)),
        ("cache_path", (Path("~/x"), "/y:z"), (Path.home() / "x", Path("/y:z"))),
        ("cache_path", iter(["/x"]), (Path("/x"),)),
        ("cache_path", [], ()),
        ("cache_dir", Path("~/x"), Path.home() / "x"),
        ("fast_launch", 0, False),
        ("atomics", True, True),
        ("device_name", None, None),
        ("device_name", "", None),
    ],
)
def test_values_of_other_types_are_normalised(
    name: str, value: object, normal: object, fresh: Settings
) -> None:
    setattr(fresh, name, value)
    assert getattr(fresh, name) == normal and type(getattr(fresh, name)) is type(normal)


def test_unknown_names(fresh: Settings) -> None:
    with pytest.raises(AttributeError, match=r"no setting 'bckend'.*backend"):
        fresh.bckend  # noqa: B018
    with pytest.raises(AttributeError, match="no setting 'bckend'"):
        fresh.bckend = "torch"


def test_override_restores_even_after_an_error(fresh: Settings) -> None:
    fresh.autotune = "off"
    with pytest.raises(KeyError), fresh.override(autotune="tune", backend="torch"):
        assert (fresh.autotune, fresh.backend) == ("tune", "torch")
        raise KeyError
    assert (fresh.autotune, fresh.backend) == ("off", "auto")
    with pytest.raises(ValueError, match="backend"), fresh.override(autotune="tune", backend="x"):
        raise AssertionError
    assert (fresh.autotune, fresh.backend) == ("off", "auto")


def test_watchers_hear_of_their_settings_only(fresh: Settings) -> None:
    heard = []
    fresh.watch(("autotune", "backend"), lambda: heard.append(fresh.autotune))
    fresh.fast_launch = False
    assert heard == []
    with fresh.override(autotune="off"):
        assert heard == ["off"]
    assert heard == ["off", "lookup"]
    fresh.reset()
    assert len(heard) == 3


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with tc.settings.override(backend="auto"):
        yield


def test_who_serves_a_tensor(interpreting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert uses_triton(CPU) and uses_triton(torch.device("cuda", 0))
    with tc.backend("torch"):
        assert not uses_triton(CPU) and not uses_triton(torch.device("cuda", 0))
        with tc.backend("triton"):
            assert uses_triton(CPU)
        assert not uses_triton(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not uses_triton(CPU) and uses_triton(torch.device("cuda", 0))
    with (
        tc.backend("triton"),
        pytest.raises(ValueError, match=r"backend: expected a GPU tensor .* got a cpu tensor"),
    ):
        uses_triton(CPU)


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend: expected 'auto', 'torch' or 'triton', got 'c'"):
        tc.backend("c")  # type: ignore[arg-type]
