"""Read a process's settings: flag, then ``DISTGRAD_*`` variable, then TOML file, then default.

Settings are a frozen dataclass whose fields are made by `setting`. Flags, variables, the file's keys and the help all
come from those fields, so they cannot drift apart; each value remembers where it came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from distgrad.errors import ConfigError
from distgrad.quantities import parse_bytes, parse_seconds

Config = TypeVar("Config")
Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT = "default"

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
_MAX_FILE_BYTES = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known about one field beside its name, type and default.

    Parameters
    ----------
    help : str
        One sentence for people.
    unit : str, optional
        ``"bytes"`` lets an int be written ``256MiB``, ``"seconds"`` lets a float be written ``30s``; others are
        for display.
    env : str, optional
        The variable's name instead of ``DISTGRAD_`` and the field's name in capitals.
    minimum, maximum : float, optional
        The range, ends included.
    above : float, optional
        The range's lower end, itself excluded.
    choices : tuple of str
        What a text may be, in any case; empty for anything.
    secret : bool
        The value is never shown.
    """

    help: str
    unit: str | None = None
    env: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    secret: bool = False


def setting(default: Any = dataclasses.MISSING, **about: Any) -> Any:
    """Declare a field of a settings class.

    Parameters
    ----------
    default : object, optional
        The field's default; without one the setting must be given.
    **about : object
        The parameters of `Setting`; `help` is required.

    Returns
    -------
    dataclasses.Field
        Typed as anything, so that the class's annotation is what counts.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(**about)})


@dataclasses.dataclass(frozen=True)
class Loaded(Generic[Config]):
    """Settings in force, and where each came from.

    Parameters
    ----------
    config : dataclass
        The settings.
    origins : mapping of str to str
        By field: the flag, the variable, the file's path, or ``default``.
    """

    config: Config
    origins: Mapping[str, str]

    def describe(self) -> str:
        """Write the settings for people, one a line, with their origins; secrets are masked.

        Returns
        -------
        str
            Lines ``name = value  # origin``. The values are what a TOML file would say, where it can.
        """
        rows = [(field.name, _shown(field.setting, getattr(self.config, field.name))) for field in fields(self.config)]
        width = max((len(f"{name} = {value}") for name, value in rows), default=0)
        return "\n".join(f"{f'{name} = {value}':<{width}}  # {self.origins[name]}" for name, value in rows)


class Field(typing.NamedTuple):
    """One field of a settings class.

    Parameters
    ----------
    name : str
        As in the class and in the file.
    kind : type
        One of bool, int, float, str and Path.
    is_optional : bool
        None is allowed.
    default : object
        ``dataclasses.MISSING`` if there is none.
    setting : Setting
        The rest.
    """

    name: str
    kind: type
    is_optional: bool
    default: Any
    setting: Setting

    @property
    def flag(self) -> str:
        """Return the command line's name for it.

        Returns
        -------
        str
            Such as ``--queue-bytes``.
        """
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Return the environment's name for it.

        Returns
        -------
        str
            Such as ``DISTGRAD_QUEUE_BYTES``.
        """
        return self.setting.env or f"DISTGRAD_{self.name.upper()}"


def fields(config: Any) -> list[Field]:
    """List what a settings class, or one of its instances, consists of.

    Parameters
    ----------
    config : dataclass
        Made of fields from `setting`.

    Returns
    -------
    list of Field
        In the order of the class.
    """
    hints = typing.get_type_hints(config if isinstance(config, type) else type(config))
    listed = []
    for field in dataclasses.fields(config):
        kinds = [kind for kind in typing.get_args(hints[field.name]) if kind is not types.NoneType]
        kind = kinds[0] if kinds else hints[field.name]
        listed.append(Field(field.name, kind, bool(kinds), field.default, field.metadata["setting"]))
    return listed


def load(
    config_class: type[Config], flags: Mapping[str, Any], file: str | Path | None, environ: Mapping[str, str]
) -> Loaded[Config]:
    """Merge flags, variables and a file into settings.

    Parameters
    ----------
    config_class : type
        A frozen dataclass made of fields from `setting`; its ``__post_init__`` may refuse combinations.
    flags : mapping of str to object
        By field; None where the flag was not given.
    file : path, optional
        A TOML file. Relative paths in it are relative to its folder.
    environ : mapping of str to str
        The environment; an empty variable counts as not set.

    Returns
    -------
    Loaded
        The settings and their origins.

    Raises
    ------
    ConfigError
        If a key is unknown, a value has the wrong type or is out of range, or a required one is missing. The
        message names where it was written and what is allowed.
    """
    known = fields(config_class)
    in_file = {} if file is None else _read(Path(file), [field.name for field in known])
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for field in known:
        if flags.get(field.name) is not None:
            origin, raw, where = field.flag, flags[field.name], field.flag
        elif environ.get(field.variable):
            origin, raw, where = field.variable, environ[field.variable], field.variable
        elif field.name in in_file:
            origin, raw, where = str(file), in_file[field.name], f"{file}: {field.name}"
        elif field.default is not dataclasses.MISSING:
            origins[field.name] = DEFAULT
            continue
        else:
            raise ConfigError(f"{field.name} is needed: {field.setting.help}", hint=f"give {field.flag}")
        value = _converted(field, raw, where)
        if isinstance(value, Path) and field.name in in_file and origin == str(file):
            value = Path(str(file)).parent / value
        values[field.name], origins[field.name] = value, origin
    return Loaded(config_class(**values), origins)


def options(config_class: type) -> Callable[[Command], Command]:
    """Make a decorator that gives a click command the flags of a settings class.

    Flags arrive as they were written, None where they were not; `load` reads them.

    Parameters
    ----------
    config_class : type
        As for `load`.

    Returns
    -------
    callable
        The decorator.
    """
    # Here, because settings classes are imported by programs that have no command line.
    import click

    def decorate(command: Command) -> Command:
        for field in reversed(fields(config_class)):
            names = f"{field.flag}/--no-{field.flag[2:]}" if field.kind is bool else field.flag
            command = click.option(names, field.name, default=None, help=_help(field), metavar=_metavar(field) or None)(
                command
            )
        return command

    return decorate


def _read(path: Path, known: list[str]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
        values = tomllib.loads(text[:_MAX_FILE_BYTES].decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    for key, value in values.items():
        if key not in known:
            if isinstance(value, dict):
                raise ConfigError(
                    f"{path}: unknown table [{key}]; settings stand at the top level of the file, in no table",
                    hint=f"take the line [{key}] out",
                )
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]}?" if near else None
            raise ConfigError(f"{path}: unknown key {key!r}; allowed are {', '.join(known)}", hint=hint)
    return values


def _converted(field: Field, raw: Any, where: str) -> Any:
    try:
        value = _typed(field, raw)
        _check_range(field.setting, value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return value


def _typed(field: Field, raw: Any) -> Any:
    kind, about = field.kind, field.setting
    if kind is bool:
        return _typed_bool(raw)
    if kind is str or kind is Path:
        if not isinstance(raw, (str, Path)):
            raise ConfigError(f"expected text, got {raw!r}")
        return Path(raw).expanduser() if kind is Path else _chosen(str(raw), about.choices)
    if isinstance(raw, str):
        if about.unit == "bytes":
            raw = parse_bytes(raw)
        elif about.unit == "seconds":
            raw = parse_seconds(raw)
        else:
            raw = _number(raw, kind)
    is_number = isinstance(raw, int) or (isinstance(raw, float) and kind is float)
    if isinstance(raw, bool) or not is_number:
        raise ConfigError(f"expected {'a whole number' if kind is int else 'a number'}, got {raw!r}")
    return kind(raw)


def _typed_bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in (*_TRUE, *_FALSE):
        return raw.lower() in _TRUE
    raise ConfigError(f"expected true or false, got {raw!r}")


def _chosen(text: str, choices: tuple[str, ...]) -> str:
    if not choices:
        return text
    if text.lower() not in choices:
        raise ConfigError(f"expected one of {', '.join(choices)}, got {text!r}")
    return text.lower()


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"expected {'a whole number' if kind is int else 'a number'}, got {text!r}") from None


def _check_range(about: Setting, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"expected a finite number, got {value}")
    if isinstance(value, (bool, str, Path)):
        return
    limits = []
    if about.above is not None:
        limits.append((value > about.above, f"more than {about.above:g}"))
    if about.minimum is not None:
        limits.append((value >= about.minimum, f"at least {about.minimum:g}"))
    if about.maximum is not None:
        limits.append((value <= about.maximum, f"at most {about.maximum:g}"))
    if not all(holds for holds, _ in limits):
        unit = f" {about.unit}" if about.unit else ""
        raise ConfigError(f"expected {' and '.join(words for _, words in limits)}{unit}, got {value:g}")


def _shown(about: Setting, value: Any) -> str:
    if value is None:
        return "(none)"
    if about.secret:
        return "***"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _metavar(field: Field) -> str:
    if field.kind is bool:
        return ""
    if field.setting.choices:
        return f"[{'|'.join(field.setting.choices)}]"
    return {"bytes": "SIZE", "seconds": "TIME"}.get(
        field.setting.unit or "", {int: "N", float: "NUMBER", Path: "PATH"}.get(field.kind, "TEXT")
    )


def _help(field: Field) -> str:
    told = field.default in (dataclasses.MISSING, None) or field.setting.secret
    default = "" if told else f"  [default: {_shown(field.setting, field.default)}]"
    return f"{field.setting.help}{default}"
