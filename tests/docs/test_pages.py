"""The documentation keeps its word: code runs, commands parse, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from blocks import PAGES, ROOT, Block, blocks, plain_environment

from tritonconv.autotune.cli import app
from tritonconv.runtime.operators import operator_names
from tritonconv.runtime.settings import TABLE

PYTHON = ("python", "pycon")
SHELL = ("bash", "console")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_blocks(languages: tuple[str, ...]) -> list[Path]:
    return [p for p in PAGES if any(b.language in languages for b in blocks(p))]


@pytest.mark.parametrize("page", with_blocks(PYTHON), ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_page.py")), str(page)],
        cwd=tmp_path,
        env=plain_environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def command_lines(block: Block) -> list[list[str]]:
    """The commands of a shell block as words, without comments, prompts and continuations."""
    joined = block.text.replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in joined.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [command for command in words if command]


SHELL_PAGES = with_blocks(SHELL)


def commands_of(page: Path) -> list[list[str]]:
    return [c for b in blocks(page) if b.language in SHELL for c in command_lines(b)]


@pytest.mark.parametrize("page", SHELL_PAGES, ids=name)
def test_autotune_command_lines_parse(page: Path) -> None:
    group = typer.main.get_command(app)
    for words in commands_of(page):
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if not words or words[0] != "autotune":
            continue
        context = group.make_context("autotune", words[1:2], resilient_parsing=True)
        verb = group.get_command(context, words[1])
        assert verb is not None, words
        if not {"--help", "-h"} & set(words):
            verb.make_context(words[1], words[2:], parent=context)  # raises on a wrong option


@pytest.mark.parametrize("page", SHELL_PAGES, ids=name)
def test_commands_use_pinned_versions_and_files_that_exist(page: Path) -> None:
    for words in commands_of(page):
        if words[:2] == ["pip", "install"]:
            assert "constraints.txt" in words, words
        if words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words


def test_ci_runs_the_readmes_test_command() -> None:
    commands = commands_of(ROOT / "README.md")
    (tests,) = {shlex.join(words) for words in commands if "pytest" in words}
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_repository(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|href)=\"([^\"#]+)\"", text):
        link = target[0] or target[1]
        if not link.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / link).exists(), f"{name(page)}: {link}"


def test_the_settings_table() -> None:
    rows = ["| Python | environment | default | meaning |", "|---|---|---|---|"]
    for row in TABLE:
        default = row.default
        if row.name == "cache_dir":
            default = "$XDG_CACHE_HOME/tritonconv or ~/.cache/tritonconv"
        shown = "none" if default in (None, ()) else default
        if isinstance(default, bool):
            shown = int(default)
        rows.append(f"| `{row.name}` | `{row.env}` | `{shown}` | {row.meaning} |")
    expected = "\n".join(rows)
    assert expected in (ROOT / "docs" / "tuning.md").read_text(), f"should be\n{expected}"


def test_the_readme_names_every_operator_family_and_stays_short() -> None:
    text = (ROOT / "README.md").read_text()
    for family in {operator.split(".")[0] for operator in operator_names()}:
        assert f"`tc.{family}`" in text
    assert len(text.splitlines()) < 120


def test_the_changelog_has_this_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_architecture_names_modules_that_exist() -> None:
    text = (ROOT / "docs" / "design" / "architecture.md").read_text()
    folders = {"tritonconv.autotune": "autotune", "tritonconv.models": "models"}
    for module in set(re.findall(r"`(tritonconv(?:\.\w+)+)`", text)):
        for package, folder in folders.items():
            module = re.sub(rf"^{re.escape(package)}\b", folder, module)
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), module
