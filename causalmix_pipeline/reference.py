"""Writes `docs/REFERENCE.md`: commands, settings, assets, checks and jobs as the code has them.

    python -m causalmix_pipeline.reference docs/REFERENCE.md

Without a file it prints. What a column of a printed or written table means is in
`reference_columns.py`; all else is read from where it is defined.
"""

import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from causalmix_pipeline.reference_columns import PRINTED, WRITTEN, Column

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >="}

_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path",
          type(None): "null", Any: "any"}  # fmt: skip

_HEAD = """# Reference

Written from the code by `python -m causalmix_pipeline.reference docs/REFERENCE.md`: don't edit it.
For what to do with these, see the [tutorial](TUTORIAL.md) and the
[how-to guides](howto/README.md); for words, the [glossary](GLOSSARY.md).

- [Commands](#commands), and the [columns](#columns) of the tables that they print and write
- [Settings](#settings): every field of `causalmix.yaml`
- [Assets](#assets), [checks](#checks), [jobs](#jobs),
  [sensors and schedule](#sensors-and-schedule): what the UI shows
- [Covariates](#covariates)
"""


def reference() -> str:
    """The whole text."""
    parts = (
        _HEAD.strip().splitlines(),
        commands_section(),
        columns_section(),
        settings_section(),
        graph_sections(),
        covariates_section(),
    )
    text = "\n\n".join("\n".join(part).strip() for part in parts) + "\n"
    return re.sub(r"\n{3,}", "\n\n", text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; a blank line before and after it."""
    yield ""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def code(text: object) -> str:
    """The text as code."""
    return f"`{text}`"


# ---------------------------------------------------------------------------- commands


def commands_section() -> Iterator[str]:
    """Each command with its options."""
    yield "## Commands"
    yield ""
    yield "Exit status: 0, or 2 where you can mend something, or 1 for a bug (the trace is kept in"
    yield "a file). Each command has `--help`."
    for name, function in commands().items():
        yield ""
        yield f"### causalmix {name}"
        yield ""
        yield inspect.getdoc(function) or ""
        rows = [option_row(*each) for each in options(function)]
        if rows:
            yield from table(["option", "value", "default", "what it does"], rows)


def commands() -> dict[str, Any]:
    """The function of each command, by the name it's called by."""
    from causalmix_pipeline.cli import app

    found = [(each.name, each.callback) for each in app.registered_commands]
    return {
        name or function.__name__.replace("_", "-"): function
        for name, function in found
        if function is not None
    }


def options(function: Any) -> Iterator[tuple[inspect.Parameter, Any, Any]]:
    """Each parameter of a command, its type, and typer's description of it."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = get_args(hints[name])[:2]
        yield parameter, kind, info


def option_names(parameter: inspect.Parameter, info: Any) -> list[str]:
    """How an option is written, the long form first; an argument is in capitals."""
    if type(info).__name__ == "ArgumentInfo":
        return [parameter.name.upper()]
    # Behind `Annotated`, typer takes the first name that is given for a default.
    named = [each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str)]
    return named or [f"--{parameter.name.replace('_', '-')}"]


def option_row(parameter: inspect.Parameter, kind: Any, info: Any) -> tuple[str, ...]:
    """Name, type, default and description of an option."""
    if parameter.default is inspect.Parameter.empty:
        default = "required"
    else:
        value = parameter.default
        default = "" if value is None or value is False else code(value)
    flag = kind is bool
    words = "" if flag else kind_text(kind).removesuffix(" or null")
    limits = [f"{sign} {getattr(info, name)}" for name, sign in (("min", ">="), ("max", "<="))
              if getattr(info, name, None) is not None]  # fmt: skip
    names = ", ".join(code(name) for name in option_names(parameter, info))
    return names, ", ".join([words, *limits]).strip(", "), default, info.help or ""


# ---------------------------------------------------------------------------- columns


def columns_section() -> Iterator[str]:
    """What the columns of printed and written tables mean."""
    yield "## Columns"
    yield ""
    yield "`<domain>`, `<task>`, `<metric>` and `<covariate>` stand for names from your data."
    for title, tables in (("Printed", PRINTED), ("Written", WRITTEN)):
        for where, columns in tables.items():
            yield ""
            yield f"### {title}: {where}"
            yield from table(["column", "means"], [_column_row(each) for each in columns])


def _column_row(column: Column) -> tuple[str, str]:
    return code(column.name), column.means


# ---------------------------------------------------------------------------- settings


def settings_section() -> Iterator[str]:
    """Every field of the settings, by section."""
    from causalmix_pipeline.resources.settings import Settings

    yield "## Settings"
    yield ""
    yield "`causalmix init` writes them all, with defaults and descriptions, into `causalmix.yaml`."
    yield "Paths are relative to the folder of that file. A field that isn't known is refused."
    for prefix, section in sections("", Settings).items():
        yield ""
        yield f"### {prefix or 'At the top'}"
        yield ""
        yield inspect.getdoc(section) or ""
        inner = [
            (code(f"{prefix}.{name}".lstrip(".")), kind_text(field.annotation) + _limits(field),
             _default(field), field.description or "")
            for name, field in section.model_fields.items()
        ]  # fmt: skip
        yield from table(["field", "value", "default", "what it is"], inner)
    yield from overrides_section()


def sections(prefix: str, section: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Each section by the path to it: `design.states`, or `tasks[]` for those in a list."""
    found = {prefix: section}
    for name, field in section.model_fields.items():
        path = f"{prefix}.{name}".lstrip(".")
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= sections(path if kind is field.annotation else f"{path}[]", kind)
    return found


def kind_text(kind: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is typing.Annotated:
        return kind_text(inner[0])
    if origin is Literal:
        return (" or " if len(inner) < 5 else ", ").join(code(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_text(each) for each in inner)
    if origin is tuple and Ellipsis not in inner:
        return "[" + ", ".join(kind_text(each) for each in inner) + "]"
    if origin in (list, tuple):
        return f"list of {kind_text(inner[0])}"
    if origin is dict:
        return f"mapping of {kind_text(inner[0])} to {kind_text(inner[1])}"
    return "section"


def _limits(field: Any) -> str:
    """The bounds of a field."""
    found = [
        f"{sign} {getattr(each, name):g}"
        for each in field.metadata
        for name, sign in _SIGNS.items()
        if getattr(each, name, None) is not None
    ]
    return "".join(f", {each}" for each in found)


def _default(field: Any) -> str:
    """The default as it's written in YAML; nothing for a section, whose fields have theirs."""
    import yaml

    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    value = list(value) if isinstance(value, tuple) else value
    written = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return code(written.strip().removesuffix("...").strip())


def overrides_section() -> Iterator[str]:
    """What `proxy.overrides` may hold, and the presets."""
    from causalmix_pipeline.core.pretrained import PretrainedConfig
    from causalmix_pipeline.core.proxy import ProxyConfig
    from causalmix_pipeline.resources import study_settings

    for title, config, presets in (
        ("proxy.overrides, trained from scratch", ProxyConfig, study_settings.PRESET_PROXY),
        (
            "proxy.overrides, with proxy.pretrained",
            PretrainedConfig,
            study_settings.PRESET_PRETRAINED,
        ),
    ):
        yield ""
        yield f"### {title}"
        rows = [
            (code(each.name), code(each.default), each.metadata["description"])
            for each in dataclasses.fields(config)
            if each.name not in study_settings.NOT_OVERRIDDEN
            and each.default is not dataclasses.MISSING
        ]
        if config is PretrainedConfig:
            means = "Documents a run reads; turned into tokens by the pool's mean length."
            rows.insert(0, (code("samples"), "by preset", means))
        yield from table(["field", "default", "what it is"], rows)
        yield "What presets change of it:"
        yield from table(
            ["preset", "proxy runs", "changes"],
            [
                (code(name), str(study_settings.PRESET_RUNS[name]), _changes(values))
                for name, values in presets.items()
            ],
        )


def _changes(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{code(name)} {value}" for name, value in values.items())


# ---------------------------------------------------------------------------- Dagster


def graph_sections() -> Iterator[str]:
    """Assets, checks, jobs, sensors and the schedule."""
    defs = widest_definitions()
    graph, repository = defs.resolve_asset_graph(), defs.get_repository_def()
    yield "## Assets"
    for key in sorted(graph.get_all_asset_keys()):
        node = graph.get(key)
        first, _, stale = one_line(node.description).partition("Stale when ")
        yield ""
        yield f"### {key.to_user_string()}"
        yield ""
        yield from wrapped(first)
        yield ""
        yield from wrapped(f"- **Stale when** {stale}" if stale else "- Observed, not made.")
        above = sorted(each.to_user_string() for each in node.parent_keys)
        made_of = f"; made of {', '.join(map(code, above))}" if above else ""
        yield from wrapped(f"- Group {code(node.group_name)}{made_of}.")
    yield from ("", "## Checks", "", "A check that blocks stops what would be made next.")
    yield from table(
        ["asset", "check", "blocks", "passes when"],
        [
            (code(key.asset_key.to_user_string()), code(key.name),
             "yes" if graph.get(key).blocking else "no", one_line(graph.get(key).description))
            for key in sorted(graph.asset_check_keys, key=str)
        ],
    )  # fmt: skip
    yield "## Jobs"
    jobs = sorted((j.name, j.description) for j in repository.get_all_jobs() if j.description)
    yield from table(["job", "does"], [(code(name), one_line(text)) for name, text in jobs])
    yield "## Sensors and schedule"
    yield ""
    yield "They work while the daemon runs (`causalmix ui` starts it)."
    watching = [*repository.sensor_defs, *repository.schedule_defs]
    rows = [(code(each.name), one_line(each.description)) for each in watching]
    yield from table(["name", "does"], sorted(rows))


def widest_definitions() -> Any:
    """The definitions of a project that uses everything: with imported runs, which add a sensor."""
    from causalmix_pipeline.definitions import build_definitions
    from causalmix_pipeline.resources.settings import Settings

    tables = {"source": "larger_proxy", "ratios": "r", "metrics": "m", "covariates": "c"}
    settings = Settings.model_validate({"imported_runs": [tables]})
    return build_definitions(Path("causalmix.yaml"), settings)


def wrapped(text: str) -> list[str]:
    """A paragraph or a list's item, in lines of 100 characters."""
    return textwrap.wrap(text, 100, subsequent_indent="  " if text.startswith("- ") else "")


def one_line(text: str | None) -> str:
    """A description without its line breaks."""
    return " ".join((text or "").split())


# ---------------------------------------------------------------------------- covariates


def covariates_section() -> Iterator[str]:
    """Every covariate by name; what each is and costs has a page of its own."""
    from causalmix_pipeline.core.covariates import (
        DOMAIN_COVARIATES,
        LANGUAGE_PREFIX,
        LOG_TASK_LIKE_PREFIX,
        METRICS,
        MODEL_METRICS,
        QUANTILES,
    )
    from causalmix_pipeline.resources.study_settings import DEFAULT_COVARIATES

    def names(of: Iterable[str]) -> str:
        return ", ".join(map(code, of))

    yield "## Covariates"
    yield ""
    yield "Numbers that describe a domain; [covariates](COVARIATES.md) says what each is and costs."
    yield from table(
        ["kind", "names"],
        [
            ("used unless set otherwise", names(DEFAULT_COVARIATES)),
            ("means of a document's number, no model needed", names(METRICS)),
            ("the same, by a model (`profile.lm`, `profile.rater`)", names(MODEL_METRICS)),
            ("of a domain as a whole", names(DOMAIN_COVARIATES)),
            ("share of documents in a language", code(f"{LANGUAGE_PREFIX}<ISO code>")),
            ("how much is like a task's held-out text", code(f"{LOG_TASK_LIKE_PREFIX}<task>")),
            ("quantiles of a document's number", names(f"<name>{end}" for end in QUANTILES)),
            ("your own columns of numbers", "as named in `columns.numbers`"),
        ],
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
    else:
        sys.stdout.write(reference())
