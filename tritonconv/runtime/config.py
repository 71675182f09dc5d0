"""The base of what an algorithm is configured with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .errors import bad_value


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of an algorithm's configuration: a frozen dataclass of integers."""

    def as_dict(self) -> dict[str, int]:
        """The fields as JSON-ready integers."""
        # The tuner calls this for thousands of configs: dataclasses.asdict takes ten times as long.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Rebuild a config from JSON; unknown, missing and non-integer fields are refused."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names or any(type(value) is not int for value in values.values()):
            raise bad_value("config", f"integers {sorted(names)}", dict(values))
        return cls(**values)


__all__ = ["Config"]
