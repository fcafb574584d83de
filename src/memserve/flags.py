"""Conversion of configuration tables to command-line flags, and back.

A flag is the field's name with dashes, without its table: tables in one command share no field
names. `model.path` is `--model`; those of `log` are `--log-level` and `--log-format`, those of
`traces` begin with `--traces-`, those of `planner` with `--planner-`, those of `dashboard` with
`--dashboard-`; `planner.enabled` is `--planner`, `dashboard.enabled` `--dashboard`.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

import msgspec
from msgspec import inspect

from memserve.config import DashboardConfig, LogConfig, ModelConfig, PlannerConfig, TracesConfig
from memserve.errors import ConfigError

# Values from a command line, by parameter name; None for a flag that was not used.
Given = Mapping[str, str | bool | None]

_Section = TypeVar("_Section", bound=msgspec.Struct)


# Other names of flags, by field: those that vLLM's server has.
_ALIASES: Mapping[str, tuple[str, ...]] = {"cors_origins": ("--allowed-origins",)}


@dataclass(frozen=True, slots=True)
class Flag:
    """The flag of one field of one table."""

    section: type[msgspec.Struct]
    field: str
    type: Any  # annotation with constraints
    default: Any
    help: str

    @property
    def parameter(self) -> str:
        """The flag's name as a Python identifier."""
        if self.section is ModelConfig and self.field == "path":
            return "model"
        if self.section is LogConfig:
            return f"log_{self.field}"
        if self.section is TracesConfig:
            return f"traces_{self.field}"
        if self.section is DashboardConfig:
            return "dashboard" if self.field == "enabled" else f"dashboard_{self.field}"
        if self.section is PlannerConfig:
            return "planner" if self.field == "enabled" else f"planner_{self.field}"
        return self.field

    @property
    def name(self) -> str:
        return "--" + self.parameter.replace("_", "-")

    @property
    def names(self) -> tuple[str, ...]:
        """All names, `name` first."""
        return (self.name, *_ALIASES.get(self.field, ()))

    @property
    def is_switch(self) -> bool:
        return isinstance(self._kind, inspect.BoolType)

    @property
    def is_list(self) -> bool:
        return isinstance(self._kind, inspect.VarTupleType)

    @property
    def is_command_line(self) -> bool:
        """Whether the flag is a list of arguments in shell quoting; items may have commas."""
        described = inspect.type_info(self.type)
        extra = described.extra if isinstance(described, inspect.Metadata) else None
        return extra is not None and extra.get("flag") == "shell"

    @property
    def values(self) -> str:
        """The choices, or the kind of value, for help texts."""
        kind = self._kind
        if self.is_command_line:
            return "'ARGUMENTS'"
        if isinstance(kind, inspect.LiteralType):
            return "|".join(map(str, kind.values))
        if isinstance(kind, inspect.EnumType):
            return "|".join(member.value for member in kind.cls)
        if isinstance(kind, inspect.IntType | inspect.FloatType):
            return "NUMBER"
        kind = kind.item_type if isinstance(kind, inspect.VarTupleType) else kind
        item = "TEXT" if isinstance(kind, inspect.StrType) else "N"
        return f"{item},{item},..." if self.is_list else "TEXT"

    @property
    def _kind(self) -> inspect.Type:
        kind = inspect.type_info(self.type)
        if isinstance(kind, inspect.Metadata):
            kind = kind.type
        if isinstance(kind, inspect.UnionType):  # of one type and None
            (kind,) = (t for t in kind.types if not isinstance(t, inspect.NoneType))
        return kind


def flags_of(section: type[msgspec.Struct], leave_out: Collection[str] = ()) -> Iterator[Flag]:
    """Yield the flags of one table, in its order, without the fields in `leave_out`."""
    hints = get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        if field.name in leave_out:
            continue
        kind = hints[field.name]
        described = inspect.type_info(kind)
        text = ""
        if isinstance(described, inspect.Metadata):
            if described.extra is not None and described.extra.get("flag") is False:
                continue
            if described.extra_json_schema:
                text = described.extra_json_schema["description"]
        yield Flag(section, field.name, kind, field.default, text)


def with_flags(section: _Section, given: Given, leave_out: Collection[str] = ()) -> _Section:
    """Return the table with the given values, except for the fields in `leave_out`.

    Raises ConfigError with the flag whose value is refused.
    """
    changes: dict[str, object] = {}
    for flag in flags_of(type(section), leave_out):
        value = given.get(flag.parameter)
        if value is not None:
            changes[flag.field] = _parse(flag, value)
    return msgspec.structs.replace(section, **changes)


def to_flags(section: msgspec.Struct) -> list[str]:
    """Return the command-line arguments for a table, without fields at their defaults."""
    arguments: list[str] = []
    for flag in flags_of(type(section)):
        value = msgspec.structs.asdict(section)[flag.field]
        if value == flag.default:
            continue
        if flag.is_switch:
            arguments.append(flag.name if value else f"--no-{flag.name[2:]}")
        else:
            arguments += [flag.name, _text(flag, value)]
    return arguments


def _text(flag: Flag, value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return shlex.join(value) if flag.is_command_line else ",".join(map(str, value))


def _parse(flag: Flag, value: str | bool) -> object:
    parts: object = value
    try:
        if isinstance(value, str) and flag.is_command_line:
            parts = shlex.split(value)
        elif isinstance(value, str) and flag.is_list:
            # vLLM's lists are JSON.
            parts = msgspec.json.decode(value) if value.startswith("[") else value.split(",")
    except (ValueError, msgspec.DecodeError) as error:  # an unclosed quotation, or no JSON
        raise ConfigError(f"{flag.name} {value}: {error}") from error
    try:
        return msgspec.convert(parts, flag.type, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{flag.name} {value}: {error}") from error
    except UnicodeError as error:  # an argument that is not UTF-8
        raise ConfigError(f"{flag.name} {value!a}: not UTF-8") from error
