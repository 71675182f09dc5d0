"""Named sets of problems: packaged JSON files, files of the user's, and shapes on a command line.

A suite names the operators it is for, the problems as fields that ``Operator.parse`` accepts, and
for some fields (``dtype``, ``layout``) the values to choose from, the first being the default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from tritonconv.runtime.errors import bad_value

_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Suite:
    """A named set of problems.

    Attributes:
        name: what the command line calls it.
        description: one line.
        operators: names of the operators that some problem is meant for; any when empty.
        choices: values to choose from by field, the default first.
        shared: those that a problem is for if it does not say.
        problems: fields of each problem; ``name`` is its label, and ``operators`` names those that
            it is for, where these are not the suite's.
    """

    name: str
    description: str
    operators: tuple[str, ...]
    problems: tuple[Mapping[str, Any], ...]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()

    def rows(
        self, chosen: Mapping[str, Sequence[Any]] | None = None, operator: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """Fields of every problem, once per combination of the chosen values.

        Args:
            chosen: values by field name; a field that is not named takes the suite's default,
                unless the problem itself sets it.
            operator: leave out problems that are for other operators only.
        """
        chosen = {name: tuple(values) for name, values in (chosen or {}).items() if values}
        axes = {name: values[:1] for name, values in self.choices.items()} | chosen
        for combination in product(*axes.values()):
            picked = dict(zip(axes, combination, strict=True))
            for problem in self.problems:
                asked = {name: value for name, value in picked.items() if name in chosen}
                row = {**picked, **problem, **asked}
                meant = row.pop("operators", None)
                if operator is None or self._is_for(operator, meant):
                    yield row

    def _is_for(self, operator: str, meant: Sequence[str] | None) -> bool:
        return operator in meant if meant is not None else operator not in self._named_by_rows

    @cached_property
    def _named_by_rows(self) -> frozenset[str]:
        """Operators of single problems, which the others are not meant for."""
        named = {name for problem in self.problems for name in problem.get("operators", ())}
        return frozenset(named - set(self.shared))


def suite_names() -> tuple[str, ...]:
    """Names of the packaged suites."""
    folder = resources.files(__package__)
    return tuple(sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".json")))


def load_suite(name: str) -> Suite:
    """A packaged suite by name, or a JSON file by path.

    Raises:
        ArgumentValueError: there is neither, or the file is no suite.

    Example:
        >>> load_suite("resnet50").operators[0]
        'conv2d.forward'
    """
    if name in suite_names():
        return _parse(name, resources.files(__package__).joinpath(f"{name}.json").read_text())
    path = Path(name)
    if not path.is_file():
        raise bad_value("suite", f"{' | '.join(suite_names())} or a JSON file", repr(name))
    return _parse(path.stem, path.read_text())


def _parse(name: str, text: str) -> Suite:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise bad_value(f"suite {name}", "JSON", str(error)) from None
    if isinstance(value, list):
        value = {"problems": value}
    problems = value.get("problems") if isinstance(value, dict) else None
    if not isinstance(problems, list) or not all(isinstance(row, dict) for row in problems):
        raise bad_value(f"suite {name}", "a list of objects, or an object with 'problems'", value)
    version = value.get("schema_version", _SCHEMA_VERSION)
    if version != _SCHEMA_VERSION:
        raise bad_value(f"suite {name}", f"schema_version {_SCHEMA_VERSION}", version)
    shared = tuple(value.get("operators", ()))
    named = (operator for row in problems for operator in row.get("operators", ()))
    return Suite(
        name,
        str(value.get("description", "")),
        tuple(dict.fromkeys((*shared, *named))),
        tuple(problems),
        {key: tuple(values) for key, values in value.get("choices", {}).items()},
        shared,
    )


def parse_shape(text: str) -> dict[str, Any]:
    """Fields from ``N=8,C=64,H=56``; numbers become integers, everything else stays a string.

    Raises:
        ArgumentValueError: a part is not ``name=value``.

    Example:
        >>> parse_shape("N=8, C=64, kernel=3x3")
        {'N': 8, 'C': 64, 'kernel': '3x3'}
    """
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise bad_value("shape", "name=value pairs such as N=8,C=64,H=56", repr(text))
        try:
            fields[name] = int(value)
        except ValueError:
            fields[name] = value
    return fields


def load_shapes(text: str) -> Suite:
    """What ``--shapes`` names: a packaged suite, a JSON file, or one shape."""
    if "=" in text and not Path(text).exists():
        return Suite("shape", text, (), (parse_shape(text),))
    return load_suite(text)
