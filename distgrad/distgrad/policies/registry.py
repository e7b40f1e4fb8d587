"""Policies by name: the built-in ones, and those that other distributions register."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from distgrad.errors import ConfigError
from distgrad.policies.asynchronous import Asynchronous
from distgrad.policies.bounded import Bounded
from distgrad.policies.buffered import Buffered
from distgrad.policies.chain import Chain
from distgrad.policies.policy import Policy
from distgrad.policies.staleness import Staleness
from distgrad.policies.synchronous import Synchronous

GROUP = "distgrad.policies"
"""Entry points of other distributions: a name, and a class or function that makes a `Policy` from its settings."""

_BUILT_IN: dict[str, Callable[..., Policy]] = {
    "async": Asynchronous,
    "sync": Synchronous,
    "bounded": Asynchronous,
    "buffered": Buffered,
}
# Links that any policy may be given, by their settings; a link that counts gradients comes before one that drops them.
_LINKS: tuple[type[Policy], ...] = (Bounded, Staleness)


def names() -> list[str]:
    """List the policies there are.

    Returns
    -------
    list of str
        The built-in ones first.
    """
    others = {point.name for point in importlib.metadata.entry_points(group=GROUP)}
    return [*_BUILT_IN, *sorted(others - _BUILT_IN.keys())]


def build(name: str, settings: Mapping[str, Any] | None = None) -> Policy:
    """Make a policy from its name and settings.

    Parameters
    ----------
    name : str
        One of `names`.
    settings : mapping, optional
        Those of the policy itself, and of `Bounded` and `Staleness`, which can be combined with each (but ``sync`` with
        no bound).

    Returns
    -------
    Policy
        A new one.

    Raises
    ------
    ConfigError
        If the name is not known, a setting belongs to no part, or a value is out of range.
    """
    rest = dict(settings or {})
    if name == Synchronous.name and "bound" in rest:
        # The step waits for the slowest, who waits for the step: with both, who is too far ahead for a pull stops all.
        raise ConfigError("bound does not go with sync, whose steps wait for the slowest already; leave it out")
    links: list[Policy] = []
    for link in _LINKS:
        given = {key: rest.pop(key) for key in _parameters(link) if key in rest}
        if given or link.name == name:
            links.append(_made(link, given))
    factory = _find(name)
    unknown = sorted(set(rest) - set(_parameters(factory)))
    if unknown and not _takes_any(factory):
        raise ConfigError(f"policy {name!r} has no {', '.join(unknown)}; {_advice(unknown[0], factory)}")
    main = _made(factory, rest)
    return Chain([*links, main], name) if links else main


def _find(name: str) -> Callable[..., Policy]:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    for point in importlib.metadata.entry_points(group=GROUP, name=name):
        try:
            factory: Callable[..., Policy] = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"policy {name!r} ({point.value}) cannot be loaded: {error}") from error
        return factory
    raise ConfigError(f"policy must be one of {', '.join(names())}, got {name!r}")


def _made(factory: Callable[..., Policy], settings: dict[str, Any]) -> Policy:
    try:
        policy: object = factory(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings {settings} do not fit: {error}") from error
    if not isinstance(policy, Policy):
        raise ConfigError(f"{factory!r} must make a distgrad.policies.Policy, got {type(policy).__name__}")
    return policy


def _parameters(factory: Callable[..., Policy]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(factory).parameters.items() if parameter.kind in kinds]


def _takes_any(factory: Callable[..., Policy]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())


def _advice(setting: str, factory: Callable[..., Policy]) -> str:
    owners = [name for name, other in _BUILT_IN.items() if setting in _parameters(other)]
    if owners:
        return f"{setting} belongs to {' and '.join(owners)}"
    own = [*_parameters(factory), *(key for link in _LINKS for key in _parameters(link))]
    return f"it takes {', '.join(own)}"
