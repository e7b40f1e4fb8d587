"""Variables ``DISTGRAD_…`` of the environment: one that nothing reads is a slip, and is told."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from distgrad.config import fields
from distgrad.errors import ConfigError

_PREFIX = "DISTGRAD_"
# What other parts of distgrad read, or tell the programs that they start.
_OTHERS = ("DISTGRAD_ADMIN_KEYS", "DISTGRAD_LOG_LEVEL", "DISTGRAD_LOG_JSON", "DISTGRAD_RANK", "DISTGRAD_WORLD")
# What Kubernetes and Docker tell a container of a service with such a name: DISTGRAD_PORT, DISTGRAD_A_SERVICE_HOST.
_OF_SERVICES = re.compile(
    r"DISTGRAD_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


def check_variables(config_class: type, environ: Mapping[str, str]) -> None:
    """Refuse variables that look like settings and are none, so that a slip is not passed over in silence.

    Parameters
    ----------
    config_class : type
        A settings class, as for `distgrad.config.load`.
    environ : mapping of str to str
        The environment; an empty variable counts as not set.

    Raises
    ------
    ConfigError
        If there is a variable ``DISTGRAD_…`` that nothing of distgrad reads. Those that Kubernetes and Docker make
        for a service whose name begins with ``distgrad`` are let be.
    """
    known = [field.variable for field in fields(config_class)]
    for name, value in environ.items():
        is_ours = name.startswith(_PREFIX) and name not in known and name not in _OTHERS
        if not (value and is_ours) or _OF_SERVICES.fullmatch(name):
            continue
        candidates = [other.removeprefix(_PREFIX) for other in (*known, *_OTHERS)]
        near = difflib.get_close_matches(name.removeprefix(_PREFIX), candidates, n=1)
        raise ConfigError(
            f"{name}: unknown variable; those of a setting are {_PREFIX} and its name, as `--check-config` lists them",
            hint=f"did you mean {_PREFIX}{near[0]}? else unset it" if near else f"unset it: unset {name}",
        )
