"""The configurations of a stage's jobs, checked as its command would check them. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from types import NoneType
from typing import Any, get_args, get_type_hints

from poserelay.command import parse, path_mark
from poserelay.errors import UserError

WHOLE = re.compile(r"[-+]?\d{1,18}")
DECIMAL = re.compile(r"[-+]?\d{1,18}\.\d{1,18}")


class Configurations:
    """Parses the command lines of one stage's jobs, which differ in a few fields.

    Parsing takes 15 ms. A command line that differs from the first only in plain numbers and paths is the first's
    configuration with these replaced, and is checked by its dataclasses; every other one is parsed.
    """

    def __init__(self, config_class: type, prog: str) -> None:
        self._config_class = config_class
        self._prog = prog
        self._first: tuple[list[str], Any] | None = None

    def parse(self, arguments: list[str], where: str) -> Any:
        """The configuration of `arguments`, each as `--field=value`. UserError beginning with `where`."""
        if self._first is not None:
            changed = _replaced(*self._first, arguments)
            if changed is not None:
                return changed
        try:
            config = parse(self._config_class, arguments, self._prog)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('command line: ')}") from error
        if self._first is None:
            self._first = arguments, config
        return config


def _replaced(flags: Sequence[str], config: Any, arguments: Sequence[str]) -> Any | None:
    """`config`, which `flags` parse to, as `arguments` would; None where only parsing can tell."""
    names = [flag.partition("=")[0][2:] for flag in flags]
    if names != [argument.partition("=")[0][2:] for argument in arguments]:
        return None
    for name, before, argument in zip(names, flags, arguments, strict=True):
        if before == argument:
            continue
        # A later field of the same name, or one that holds it, decides.
        if name == "config" or sum(f"{name}.".startswith(f"{other}.") for other in names) > 1:
            return None
        try:
            config = _with(config, name.split("."), argument.partition("=")[2])
        except (AttributeError, KeyError, ValueError):
            return None
    return config


def _with(owner: Any, parts: Sequence[str], text: str) -> Any:
    """A dataclass with one field replaced, at any depth. ValueError where its type is not a number or a path."""
    if len(parts) > 1:
        return dataclasses.replace(owner, **{parts[0]: _with(getattr(owner, parts[0]), parts[1:], text)})
    return dataclasses.replace(owner, **{parts[0]: _value(_hints(type(owner))[parts[0]], text)})


def _value(hint: Any, text: str) -> int | float | str:
    kinds = set(get_args(hint) or (hint,)) - {NoneType}
    if kinds == {int} and WHOLE.fullmatch(text):
        return int(text)
    if kinds == {float} and (DECIMAL.fullmatch(text) or WHOLE.fullmatch(text)):
        return float(text)
    # A single path, also of a field that takes a list of them: that would not begin with a slash.
    for single in (hint, *get_args(hint)):
        origin = getattr(single, "__origin__", None)
        mark = path_mark(single) if set(get_args(origin) or (origin,)) <= {str, NoneType} else None
        if mark is not None and mark.is_path(text) and text.startswith("/") and "${" not in text:
            return text
    raise ValueError(f"{text!r} is to be parsed")


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)
