"""The page docs/recipe.md: every key of a recipe, its type, default and meaning, made from the types and their docstrings.

python -m jobs.recipe_reference > docs/recipe.md
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import annotated_types
import pydantic
from pydantic_core import PydanticUndefined

from jobs.recipe import Recipe

HEAD = """# Recipe reference

Every key of a recipe, made from the types by `make docs`. A recipe is one YAML file with these sections; any key can also be given on
the command line, dotted: `train.epochs=10`. Unknown keys are refused. Keys that are left out take the default.
"""
BOUNDS = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
}


def markdown() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_sections()])


def _sections() -> Iterator[str]:
    for name, section in _hints(Recipe).items():
        if _members(section):
            yield from _section(name, section)


def _section(path: str, section: type) -> Iterator[str]:
    """A table of the section's keys, then a section for each key that has keys of its own."""
    names = list(_members(section))
    intro, meanings = split_docstring(section.__doc__ or "", names)
    yield f"## {path}\n\n{intro}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    hints, nested = _hints(section), []
    for name in names:
        inner = next((option for option in (hints[name], *typing.get_args(hints[name])) if _members(option)), None)
        if inner is not None:
            nested.append((f"{path}.{name}", inner))
        several = "list of " if inner is not None and typing.get_origin(hints[name]) is tuple else ""
        shown = f"{several}[section](#{path.replace('.', '')}{name})" if inner is not None else _escaped(_type(hints[name]))
        default = "" if inner is not None and _members(section)[name] is not None else _default(_members(section)[name])
        yield f"| `{name}` | {shown} | {default} | {_escaped(meanings.get(name, ''))} |"
    yield ""
    for inner_path, inner in nested:
        yield from _section(inner_path, inner)


def split_docstring(text: str, names: list[str]) -> tuple[str, dict[str, str]]:
    """(what a docstring says of the whole, field -> what it says of the field).

    The docstrings write `name: meaning` or `name, other: meaning`, one after the other, behind an introduction.
    """
    text = " ".join(text.split("\n    Raises ")[0].split())
    any_name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    starts = list(re.finditer(rf"(?:^|(?<=[.;:] ))((?:{any_name})(?:, (?:{any_name}))*): ", text))
    meanings = {}
    for i, start in enumerate(starts):
        end = starts[i + 1].start() if i + 1 < len(starts) else len(text)
        meaning = text[start.end() : end].strip().removesuffix(";")
        meanings.update(dict.fromkeys(start.group(1).split(", "), meaning))
    return (text[: starts[0].start()].strip() if starts else text), meanings


def _hints(section: type) -> dict[str, typing.Any]:
    if issubclass(section, pydantic.BaseModel):
        return {name: typing.Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
                for name, field in section.model_fields.items()}  # fmt: skip
    return typing.get_type_hints(section, include_extras=True)


def _members(section: object) -> dict[str, object]:
    """Key -> default of a section; empty for anything that is not one."""
    if isinstance(section, type) and issubclass(section, pydantic.BaseModel):
        return {name: field.default for name, field in section.model_fields.items()}
    if isinstance(section, type) and dataclasses.is_dataclass(section):
        return {field.name: field.default for field in dataclasses.fields(section)}
    return {}


def _type(hint: typing.Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return " ".join([_type(options[0]), *_bounds(options[1:])])
    if origin is typing.Literal:
        return " or ".join(f"`{_value(option)}`" for option in options)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(option) for option in options)
    if origin is tuple:
        return f"[{', '.join('...' if option is ... else _type(option) for option in options)}]"
    if origin in (list, dict):
        return f"{origin.__name__} of {', '.join(_type(option) for option in options)}"
    if hint is type(None):
        return "null"
    return {Path: "path", str: "text", int: "whole number", float: "number", bool: "true or false"}.get(hint, str(hint))


def _bounds(metadata: tuple[object, ...]) -> Iterator[str]:
    for item in metadata:
        for constraint in item.metadata if isinstance(item, pydantic.fields.FieldInfo) else [item]:
            if type(constraint) in BOUNDS:
                attribute, sign = BOUNDS[type(constraint)]
                yield f"{sign} {getattr(constraint, attribute)}"


def _default(value: object) -> str:
    return "none: must be set" if value is PydanticUndefined else _escaped(f"`{_value(value)}`")


def _value(value: object) -> str:
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown())
