"""The tables of docs/configuration.md, made from the fields of config.py.

python -m tests.config_document    # writes them anew: `make config-docs`
"""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import msgspec
from msgspec import inspect

from memserve.config import tables
from memserve.flags import Flag, flags_of

PAGE = Path(__file__).parent.parent / "docs/configuration.md"
BEGIN, END = "<!-- begin: make config-docs -->\n", "<!-- end -->\n"
# Environment variables that stand for a key, by table and key.
VARIABLES = {
    ("gateway", "api_keys"): "MEMSERVE_API_KEYS",
    ("security", "tls_ca"): "MEMSERVE_TLS_CA, of commands that are only clients",
    ("traces", "endpoint"): "OTEL_EXPORTER_OTLP_ENDPOINT",
    ("traces", "sample"): "OTEL_TRACES_SAMPLER_ARG",
}


def reference() -> str:
    return "\n".join(_table(name, section) for name, section in tables().items())


def _table(name: str, section: type[msgspec.Struct]) -> str:
    title = f"[[{name}]]" if name == "instance" else f"[{name}]"
    doc = " ".join((section.__doc__ or "").split())
    rows = [f"## {title}\n\n{doc}\n\n", "| key | flag | default | meaning |\n"]
    rows.append("| --- | --- | --- | --- |\n")
    flags = {flag.field: flag for flag in flags_of(section)}
    hints = get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        meaning = _meaning(hints[field.name])
        if (variable := VARIABLES.get((name, field.name))) is not None:
            meaning += f"; also {variable}"
        flag = "" if field.name not in flags else _flag(flags[field.name])
        rows.append(f"| `{field.name}` | {flag} | {_default(field.default)} | {meaning} |\n")
    return "".join(rows)


def _meaning(hint: object) -> str:
    described = inspect.type_info(hint)
    assert isinstance(described, inspect.Metadata)
    assert described.extra_json_schema is not None
    return str(described.extra_json_schema["description"]).replace("|", "\\|")


def _flag(flag: Flag) -> str:
    if flag.is_switch:
        return f"`{flag.name}`, `--no-{flag.name[2:]}`"
    return f"`{flag.name} {flag.values}`".replace("|", "\\|")


def _default(value: object) -> str:
    if value is None or value in ((), {}) or value is msgspec.NODEFAULT:
        return ""
    return f"`{msgspec.json.encode(value).decode()}`"


def whole() -> str:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + reference() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(whole(), encoding="utf-8")
