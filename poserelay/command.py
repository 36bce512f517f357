"""One command line for every stage: YAML file, dotted overrides, help from the dataclasses. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from .config import PathField
from .errors import UserError, exit_code

Config = TypeVar("Config")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise UserError(message)


def parse(
    config_class: type[Config], argv: Sequence[str], prog: str, *, partly: Sequence[str] = (), references: bool = False
) -> Config:
    """Read `--config FILE` and dotted overrides into the frozen dataclass `config_class`.

    `partly` are the only top-level fields that are read of the file, where there are any: a command that reads one
    block of a stage's recipe. `references` allows `${`: the launcher's own file, whose references it resolves.

    Raises UserError for an unknown field (with the nearest name), a value of the wrong type, a missing required field,
    every ValueError of a `__post_init__`, and a text with `${`, which only a launcher resolves; SystemExit(0) after
    `--help` and `--print_config`.
    """
    parser = _parser(config_class, prog)
    files = _config_files(argv)
    for file in files:
        _check_yaml(file)
    arguments = _complete_flags(config_class, argv)
    if partly:
        blocks = {
            key: value
            for f in files
            for key, value in yaml.safe_load(f.read_text("utf-8-sig")).items()
            if key in partly
        }
        kept = [
            a
            for a, before in zip(arguments, ["", *arguments], strict=False)
            if "--config" not in (a.split("=")[0], before)
        ]
        arguments = ["--config", yaml.safe_dump(blocks), *kept] if files else kept
    try:
        built = parser.instantiate(parser.parse_args(arguments))
        config = config_class(**{f.name: getattr(built, f.name) for f in dataclasses.fields(config_class)})  # pyright: ignore[reportArgumentType]
    except UserError as error:
        raise UserError(_explain(str(error), config_class, argv, files)) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{', '.join(map(str, files)) or 'command line'}: {error}") from error
    for name, text in _texts(to_plain(config)):
        if "${" in text and not references:
            where, field = _source(name, argv, files)
            raise UserError(
                f"{where}field {field!r} is {text!r}; only `python -m launch` resolves ${{stage}}; write it out"
            )
    return config


@functools.cache
def _parser(config_class: type, prog: str) -> _Parser:
    """Reading the fields and their help takes longer than a parse; a launcher parses hundreds of times."""
    parser = _Parser(prog=f"python -m {prog}", allow_abbrev=False, description=(config_class.__doc__ or "").strip())
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_class, None)
    return parser


def with_absolute_paths(config: Config, base: Path, moved: Callable[[Path], Path] = lambda path: path) -> Config:
    """`config` with every path in it absolute, to be started from another folder.

    A path is what a field holds whose type carries a `config.PathField`, also in a nested or optional dataclass or in
    a list. A leading ~ is the user's home, as in a shell; where it is relative it is joined to `base`, an absolute
    folder, and normalised; symbolic links stay. It then becomes what `moved` makes of it, also where it was given as
    an absolute one.
    """

    def placed(value: Any, mark: PathField | None) -> Any:
        if dataclasses.is_dataclass(value):
            return with_absolute_paths(value, base, moved)
        if isinstance(value, (list, tuple)):
            return type(value)(placed(item, mark) for item in value)
        if mark and isinstance(value, str) and mark.is_path(value):
            return str(moved(Path(os.path.normpath(base / os.path.expanduser(value)))))
        return value

    owner: Any = config
    hints = get_type_hints(type(config), include_extras=True)
    names = [field.name for field in dataclasses.fields(owner)]
    return dataclasses.replace(owner, **{name: placed(getattr(owner, name), path_mark(hints[name])) for name in names})


def path_mark(hint: Any) -> PathField | None:
    """The mark of a type, or of what it holds: `File`, `File | None`, `tuple[File, ...]`; None where it is no path."""
    parts = [*getattr(hint, "__metadata__", ()), *map(path_mark, get_args(hint))]
    return next((part for part in parts if isinstance(part, PathField)), None)


def to_plain(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain dicts and lists, as written to config.yaml and into hand-off files."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))


def run_commands(
    argv: Sequence[str] | None,
    prog: str,
    commands: Mapping[str, tuple[type, Callable[[Any], object]]],
    *,
    partly: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Dispatch `prog NAME ...` to (config class, function) and return the exit code of the contract.

    The commands named in `partly` read only these top-level fields of a config file.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"usage: python -m {prog} COMMAND ...   (python -m {prog} COMMAND --help lists its fields)", ""]
        lines += [f"  {name:<16}{(c.__doc__ or '').strip().splitlines()[0]}" for name, (c, _) in commands.items()]
        stream = sys.stdout if arguments else sys.stderr
        return exit_code(lambda: print("\n".join(lines), file=stream)) or (0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        print(f"error: {prog} has no command {name!r}; choose from {', '.join(commands)}", file=sys.stderr)
        return 2
    config_class, function = commands[name]
    return run_command(rest, f"{prog} {name}", config_class, function, partly=(partly or {}).get(name, ()))


def run_command(
    argv: Sequence[str] | None,
    prog: str,
    config_class: type,
    function: Callable[[Any], object],
    *,
    partly: Sequence[str] = (),
    references: bool = False,
) -> int:
    """Parse `argv` and call `function(config)`; return the exit code of the contract."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return exit_code(lambda: function(parse(config_class, arguments, prog, partly=partly, references=references)))
    except SystemExit as stop:  # --help and --print_config
        return int(stop.code or 0)


def _complete_flags(config_class: Any, argv: Sequence[str]) -> list[str]:
    """`--json` alone means `--json=true`."""
    hints = get_type_hints(config_class)
    following = [*argv, "--"][1:]
    return [
        f"{argument}=true"
        if argument.startswith("--") and hints.get(argument[2:]) is bool and after.startswith("--")
        else argument
        for argument, after in zip(argv, following, strict=True)
    ]


def _config_files(argv: Sequence[str]) -> list[Path]:
    files = [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    return [Path(f) for f in files + [value for flag, value in pairwise(argv) if flag == "--config"]]


def _check_yaml(file: Path) -> None:
    """Errors that the parser would report without the line: absent, not YAML, not a mapping, a key given twice."""
    try:
        node = yaml.compose(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {file}: not a text file; give the path of a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{file}: expected fields (name: value), found {'nothing' if node is None else node.value!r}")
    seen: dict[str, int] = {}
    for key, line in _yaml_keys(node):
        if key in seen:
            raise UserError(f"{file}:{line}: field {key!r} is given twice (first on line {seen[key]}); keep one")
        seen[key] = line


def _yaml_keys(node: yaml.Node, prefix: str = "") -> list[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return []
    keys = []
    for key, value in node.value:
        name = prefix + str(key.value)
        keys += [(name, key.start_mark.line + 1), *_yaml_keys(value, name + ".")]
    return keys


def _field_names(config_class: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields, through nested and optional dataclasses."""
    names = []
    for name, hint in get_type_hints(config_class).items():
        names.append(prefix + name)
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                names += _field_names(part, f"{prefix}{name}.")
    return names


def _explain(message: str, config_class: Any, argv: Sequence[str], files: Sequence[Path]) -> str:
    """Turn a parser message into `file:line: field ...: what was found; nearest name`."""
    text = " ".join(line.strip() for line in message.splitlines() if line.strip() and "--help" not in line)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("typing.", "")
    unknown = re.search(
        r"(?i)unrecognized arguments: --([\w.]+)|Group '([\w.]+)' does not accept option '([\w.]+)'"
        r"|(?:Key|Option|Subkey) '([\w.]+)' is not (?:accepted|expected)",
        text,
    )
    known = re.search(r"Parser key [\"']([\w.]+)[\"']:?\s*", text)
    if not unknown and not known:
        return text
    field = ".".join(part for part in (unknown or known).groups() if part)  # pyright: ignore[reportOptionalMemberAccess]
    where, field = _source(field, argv, files)
    if lacking := re.search(r"Union subtypes.*following arguments are required: ([\w.]+)", text):
        return f"{where}field '{field}.{lacking[1]}' is missing; give it, or leave {field!r} out"
    if not unknown:
        return f"{where}field {field!r}: {text[known.end() :] if known else text}"
    near = difflib.get_close_matches(field, _field_names(config_class), n=1, cutoff=0.5)
    return f"{where}unknown field {field!r}; " + (f"did you mean {near[0]!r}?" if near else "see --help for the fields")


def _source(field: str, argv: Sequence[str], files: Sequence[Path]) -> tuple[str, str]:
    """Where a field is given, `FILE:LINE: ` or nothing for an argument, and its whole dotted name."""
    keys = [("", argument[2:].split("=")[0]) for argument in argv if argument.startswith("--")]
    keys += [(f"{file}:{line}: ", key) for file in files for key, line in _yaml_keys(_compose(file))]
    # Inside an optional dataclass the parser names only the last part of the key.
    match = [item for item in keys if item[1] == field] or [item for item in keys if item[1].endswith("." + field)]
    return match[0] if match else ("", field)


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a plain config with its dotted name; an item of a list has its list's."""
    if isinstance(value, str):
        yield name, value
    for key, item in value.items() if isinstance(value, Mapping) else ():
        yield from _texts(item, f"{name}.{key}" if name else key)
    for item in value if isinstance(value, list) else ():
        yield from _texts(item, name)


def _compose(file: Path) -> yaml.Node:
    node = yaml.compose(file.read_text(encoding="utf-8-sig"))
    assert node is not None, "checked by _check_yaml"
    return node
