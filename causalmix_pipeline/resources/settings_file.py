"""Reading `causalmix.yaml`, and writing a commented one.

Errors name the field as the user wrote it, the rule, the value and what the field is for.
"""

import os
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.study_settings import Section, Task

#: Environment variable with the path of the settings file; the only one that is read.
CONFIG_VARIABLE = "CAUSALMIX_CONFIG"

#: Settings file where the variable isn't set.
DEFAULT_CONFIG = "causalmix.yaml"

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

_EXAMPLE_TASK = {"name": "manuals", "path": "data/eval/manuals.jsonl", "weight": 1.0}


def config_path() -> Path:
    """The settings file of this process: `CAUSALMIX_CONFIG`, else `causalmix.yaml` here."""
    return Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG)


def load_settings(path: Path | str | None = None, *, missing_ok: bool = False) -> Settings:
    """Read and check a settings file.

    Args:
        path: the YAML file; None takes `config_path()`.
        missing_ok: whether a file that isn't there means the defaults.

    Raises:
        ConfigError: if the file is missing, isn't YAML, or breaks a rule; one line per field.
    """
    path = config_path() if path is None else Path(path)
    if not path.is_file():
        if missing_ok:
            return _rooted(Settings(), path)
        raise ConfigError(
            f"{path} must be a settings file, got no file: run `causalmix init`, or name "
            f"another file by --config or {CONFIG_VARIABLE}."
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be YAML in UTF-8, got: {error}") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must hold `field: value` lines, got {type(raw).__name__}: "
            "see `causalmix init`."
        )
    try:
        return _rooted(Settings.model_validate(raw), path)
    except ValidationError as error:
        lines = [_explain(dict(item)) for item in error.errors()]
        raise ConfigError("\n".join([f"{path}: {len(lines)} wrong", *lines])) from error


def _rooted(settings: Settings, path: Path) -> Settings:
    settings._root = path.resolve().parent
    return settings


def _written(location: tuple) -> str:
    """The place in the file as the user sees it: `tasks[2].weight`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _section_at(location: tuple) -> tuple[type[BaseModel], FieldInfo | None]:
    """The section a location lies in, and its field where there is one."""
    section: type[BaseModel] = Settings
    field = None
    for part in location:
        field = section.model_fields.get(part) if isinstance(part, str) else field
        inner = next((t for t in _types_in(field) if _is_section(t)), None) if field else None
        section = inner or section
    return section, field


def _types_in(field: FieldInfo | None) -> list[Any]:
    """All types inside an annotation, unions and lists opened."""
    found, todo = [], [field.annotation] if field else []
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo.extend(get_args(kind))
    return found


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _explain(error: dict[str, Any]) -> str:
    """One pydantic error as: field, rule, value, what the field is for."""
    location, kind = tuple(error["loc"]), error["type"]
    context = error.get("ctx", {})
    if kind == "value_error":  # our own rules already say it all
        return str(context["error"])
    if kind == "extra_forbidden":
        section, _ = _section_at(location[:-1])
        return f"{_written(location)} is no setting; known here: {', '.join(section.model_fields)}."
    _, field = _section_at(location)
    purpose = f": {field.description}" if field and field.description else "."
    if kind == "missing":
        return f"{_written(location)} must be given, got nothing{purpose}"
    bound = next((name for name in _SIGNS if name in context), None)
    if bound:
        rule = f"must be {_SIGNS[bound]} {context[bound]:g}"
    elif kind == "literal_error":
        rule = f"must be {context['expected']}"
    else:
        rule = error["msg"].replace("Input should", "must").replace("String should", "must")
        rule = rule.replace("List should", "must").replace("must be a valid", "must be a")
    return f"{_written(location)} {rule}, got {error['input']!r}{purpose}"


def write_commented_settings(path: Path | str) -> Path:
    """Write a settings file that holds every field with its default and what it is for.

    Raises:
        ConfigError: if the file is already there; it is never overwritten.
    """
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path} must not exist yet, got a file: move it away, or edit it.")
    head = ["# Settings of causalmix. Paths are relative to the folder of this file.", ""]
    path.write_text("\n".join(head + _section_lines(Settings(), indent=0)) + "\n", encoding="utf-8")
    return path


def _section_lines(section: BaseModel, *, indent: int) -> list[str]:
    lines: list[str] = []
    pad = "  " * indent
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        lines += [f"{pad}# {line}" for line in _wrapped(_comment(field), 96 - len(pad))]
        if isinstance(value, BaseModel):
            lines += [f"{pad}{name}:", *_section_lines(value, indent=indent + 1)]
        else:
            text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000)
            lines.append(f"{pad}{name}: {text.removesuffix(chr(10)).removesuffix('...').strip()}")
        if name == "tasks":
            lines += [f"{pad}# {line}" for line in _example_task()]
        if indent == 0:
            lines.append("")
    return lines


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _comment(field: FieldInfo) -> str:
    bounds = [
        f"{_SIGNS[name]} {getattr(item, name):g}"
        for item in field.metadata
        for name in _SIGNS
        if getattr(item, name, None) is not None
    ]
    return f"{field.description}{' (' + ', '.join(bounds) + ')' if bounds else ''}"


def _example_task() -> list[str]:
    lines = ["tasks:"]
    for i, (name, value) in enumerate(_EXAMPLE_TASK.items()):
        description = Task.model_fields[name].description
        lines.append(f"  {'-' if i == 0 else ' '} {name}: {value}  # {description}")
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)
