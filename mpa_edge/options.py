"""Command-line options made from a settings class, so that a flag is declared in one place."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from mpa_edge.config import Settings

Command = TypeVar("Command", bound=Callable[..., Any])


def options_of(settings: type[Settings]) -> Callable[[Command], Command]:
    """A decorator that gives a Typer command one keyword option per field of `settings`.

    An option that is not typed is None (a list: empty), whatever the field's default is: `given` tells what was typed.
    """

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [_option(name, field) for name, field in settings.model_fields.items()]
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
        return command

    return decorate


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were typed, as values of the settings' fields."""
    plain = {name: _plain(value) for name, value in options.items()}
    return {name: value for name, value in plain.items() if value not in (None, [])}


def _option(name: str, field: Any) -> inspect.Parameter:
    extra = field.json_schema_extra
    required = field.is_required()
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=field.description,
        rich_help_panel=None if extra["panel"] == "Main" else extra["panel"],
        show_default=True if required else extra["shown"] or _shown(field.default),
    )
    typed: Any = _typed(name, field.annotation, required)
    annotation = Annotated[typed, option]
    default = inspect.Parameter.empty if required else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _typed(name: str, annotation: Any, required: bool) -> Any:
    """The type for Typer: literals become enums, tuples lists; what has a default may be missing."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(one for one in get_args(annotation) if one is not type(None))
    if get_origin(annotation) is tuple:
        annotation = list[_choice(name, get_args(annotation)[0])]  # type: ignore[misc]
    annotation = _choice(name, annotation)
    return annotation if required else annotation | None


def _choice(name: str, annotation: Any) -> Any:
    if get_origin(annotation) is Literal:
        return Enum(name, {value: value for value in get_args(annotation)}, type=str)  # type: ignore[misc]
    return annotation


def _shown(default: Any) -> str | bool:
    return False if default is None or default is False else str(default)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list) else getattr(value, "value", value)
