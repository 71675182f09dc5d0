"""The directory of generated modules is private, and its files are what their names say."""

from __future__ import annotations

import inspect
import os
import stat
import traceback

import pytest

from tritonconv.codegen import CacheSecurityError, modules
from tritonconv.runtime.settings import settings

SOURCE = "def f():\n    raise RuntimeError('here')\n"


@pytest.fixture
def cache(tmp_path):
    with settings.override(cache_dir=tmp_path / "cache"):
        yield tmp_path / "cache" / "generated"


def test_directory_is_private_and_files_are_named_by_content(cache):
    path = modules.write(SOURCE)
    assert path.parent == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert path.name == f"{modules.digest(SOURCE)}.py"
    assert [p.name for p in cache.iterdir()] == [path.name]
    assert modules.write(SOURCE) == path


def test_traceback_shows_the_source(cache):
    module = modules.load(modules.write(SOURCE))
    assert inspect.getsource(module.f) == SOURCE
    with pytest.raises(RuntimeError) as error:
        module.f()
    assert "raise RuntimeError('here')" in "".join(traceback.format_exception(error.value))
    assert not list(cache.glob("**/*.pyc"))


@pytest.mark.parametrize(
    ("which", "mode"),
    [
        ("cache", 0o702),
        ("cache", 0o777),
        ("generated", 0o770),
        ("generated", 0o702),
        ("generated", 0o777),
    ],
)
def test_a_directory_others_can_write_is_refused(cache, which, mode):
    modules.directory()
    (cache if which == "generated" else cache.parent).chmod(mode)
    with pytest.raises(CacheSecurityError, match=r"others can write.*TRITONCONV_CACHE_DIR"):
        modules.write(SOURCE)


def test_a_cache_directory_of_a_team_holds_a_private_one(cache):
    cache.parent.mkdir()
    cache.parent.chmod(0o2775)
    assert modules.load(modules.write(SOURCE)).f.__name__ == "f"
    assert stat.S_IMODE(cache.stat().st_mode) & 0o777 == 0o700
    # A colleague may put another directory in its place: it is not ours, or not private.
    cache.rename(cache.with_name("away"))
    cache.mkdir()
    cache.chmod(0o775)
    with pytest.raises(CacheSecurityError, match="others can write"):
        modules.write(SOURCE)


@pytest.mark.parametrize("umask", [0o002, 0o022])
def test_the_cache_directory_follows_the_umask(cache, umask):
    before = os.umask(umask)
    try:
        modules.write(SOURCE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.parent.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_directory_of_somebody_else_is_refused(cache, monkeypatch):
    modules.directory()
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(CacheSecurityError, match="belongs to user"):
        modules.write(SOURCE)


def test_a_symbolic_link_is_refused(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheSecurityError, match="symbolic link"):
        modules.write(SOURCE)


def test_a_file_that_was_changed_is_not_loaded(cache):
    path = modules.write(SOURCE)
    path.write_text("raise SystemExit('ran')\n")
    with pytest.raises(CacheSecurityError, match="does not have the hash"):
        modules.load(path)
    assert modules.load(modules.write(SOURCE)).f.__name__ == "f"


def test_a_linked_file_is_replaced(cache, tmp_path):
    path = modules.write(SOURCE)
    path.unlink()
    (tmp_path / "other.py").write_text(SOURCE)
    path.symlink_to(tmp_path / "other.py")
    with pytest.raises(CacheSecurityError):
        modules.load(path)
    modules.write(SOURCE)
    assert not path.is_symlink()
