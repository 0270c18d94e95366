"""Settings as options of the command line: a command gets one for each field of a dataclass, by itself."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_args, get_type_hints

import typer

from sdw_fast.config import DistillConfig, TeacherConfig


def settings_of(config: type, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each setting of a dataclass (or for those named), in place of its **settings.

    The command receives those that were given. Where None is a value, it is given as "none".
    """
    hints = get_type_hints(config, include_extras=True)
    options = {}
    for setting in fields(config):
        if not names or setting.name in names:
            kind, help_text = get_args(hints[setting.name])
            default = setting.default
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
            if kind in (bool, bool | None):
                options[setting.name] = Annotated[bool | None, typer.Option(help=help_text)]
                continue
            option = typer.Option(help=f"{help_text} [{shown}]", metavar=_word(kind), parser=_parser(kind))
            options[setting.name] = Annotated[str | None, option]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature, types = inspect.signature(command), get_type_hints(command, include_extras=True)
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [
            parameter.replace(kind=keyword, annotation=types[parameter.name])
            for parameter in signature.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]

        @functools.wraps(command)
        def wrapped(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in options}
            settings = {n: None if v == "none" else v for n, v in given.items() if v is not None}
            command(**arguments, **settings)

        extra = [inspect.Parameter(name, keyword, default=None, annotation=option) for name, option in options.items()]
        wrapped.__signature__ = signature.replace(parameters=own + extra)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {**types, **options}
        return wrapped

    return decorate


def _word(kind: Any) -> str:
    """How a setting's type is written in the help."""
    types = [t for t in get_args(kind) if t is not type(None)] or [kind]
    return "INT,INT,…" if types[0] is int and ... in types else f"{types[0].__name__.upper()}"


def _parser(kind: Any) -> Callable[[str], Any]:
    """What reads text as a setting's type; "none" where it may be None. A function, whose name older Typers ask for."""
    types = get_args(kind) or (kind,)

    def parse(text: str) -> Any:
        if text == "none" and type(None) in types:
            return text
        if ... in types:
            return tuple(int(width) for width in text.split(","))
        return next(t for t in types if t is not type(None))(text)

    return parse


def refuse_unused(config: DistillConfig | TeacherConfig, settings: dict[str, Any]) -> None:
    """Raises ValueError where an option was given that the others leave without effect."""
    for name, reason in config.unused().items():
        if name in settings:
            raise ValueError(f"--{name.replace('_', '-')} would have no effect: {reason}. Leave it out")
