"""Pages of the reference that are generated: the command line from its parsers, the configuration
from its model.

mkdocs calls `on_page_markdown`; tests/test_docs.py calls the generators.
"""

from __future__ import annotations

import argparse
import re
import types
from importlib import import_module
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from mmtransfer.cli import VERBS
from mmtransfer.config import Config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page's text with its generated parts."""
    parts = {"cli": command_line, "configuration": configuration}
    return re.sub(r"<!-- generated: (\w+) -->", lambda mark: parts[mark[1]](), markdown)


def command_line() -> str:
    """Every verb with its arguments and options, as its parser has them."""
    return "\n\n".join(_verb(name) for name in VERBS)


def _verb(name: str) -> str:
    parser = argparse.ArgumentParser(prog=f"mmtransfer {name}", add_help=False)
    # argparse breaks usage at the terminal's width otherwise.
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=96)
    module = import_module(f"mmtransfer.cli.{name.replace('-', '_')}")
    module.add_arguments(parser)
    text = [f"## mmtransfer {name}", (parser.description or "").replace("%%", "%")]
    has_fields = any("--train.steps" in one.option_strings for one in parser._actions)
    actions = [one for one in parser._actions if not (has_fields and _is_field(one))]
    if len(actions) == len(parser._actions):
        text.append(f"```text\n{parser.format_usage().strip()}\n```")
    else:
        text.append(
            "Every field of the [configuration](configuration.md) is an option as well: "
            "`--train.learning_rate 1e-4`."
        )
    rows = [(_called(action), _cell(action.help or "")) for action in actions]
    if rows:
        text.append(_table(("argument", "meaning"), rows))
    return "\n\n".join(text)


def _is_field(action: argparse.Action) -> bool:
    """Whether it is an option that stands for a field of the configuration."""
    from mmtransfer.config import field_names

    names = {option.removeprefix("--") for option in action.option_strings}
    return bool(names & set(field_names()))


def _called(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = str(action.metavar).replace("|", ", ") if action.metavar else None
    if value is None and action.choices:
        value = ", ".join(map(str, action.choices))
    elif value is None and action.nargs != 0:
        value = action.dest.upper()
    names = ", ".join(f"`{option}`" for option in action.option_strings)
    return f"{names} {f'`{_cell(str(value))}`' if value else ''}".strip()


def configuration() -> str:
    """Every section of the configuration with its fields, their types, defaults and meaning."""
    text = [_section("", Config)]
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            text.append(_section(name, field.annotation))
    from mmtransfer.config import StageConfig

    text.append(_section("transfer.stages", StageConfig))
    return "\n\n".join(text)


def _section(name: str, model: type[BaseModel]) -> str:
    rows = []
    for field_name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = field.get_default(call_default_factory=True)
        shown = "none" if default is None else str(default).lower()
        shown = shown if not isinstance(default, str) else default
        whole = f"{name}.{field_name}" if name and name != "transfer.stages" else field_name
        meaning = _cell(field.description or "")
        rows.append((f"`{whole}`", f"`{_cell(_type(field.annotation))}`", f"`{shown}`", meaning))
    title = f"## {name}" if name else "## Top level"
    about = " ".join((model.__doc__ or "").split())
    return f"{title}\n\n{about}\n\n{_table(('field', 'type', 'default', 'meaning'), rows)}"


def _type(annotation: Any) -> str:
    """A type as people write it: `int`, `all, none or int`, `list of str`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, types.UnionType) or str(origin).endswith("Union"):
        return " or ".join(_type(one) for one in arguments if one is not type(None))
    if str(origin).endswith("Literal"):
        return ", ".join(map(str, arguments))
    if str(origin).endswith("Annotated"):
        return _type(arguments[0])
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[0])} to {_type(arguments[1])}"
    if origin is tuple:
        return ", ".join(map(_type, arguments))
    if annotation is Any:
        return "any"
    return str(getattr(annotation, "__name__", annotation)).replace("StageConfig", "stage")


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|")
