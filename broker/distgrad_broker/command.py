"""``distgrad broker``: settings, logging, signals, exit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import click

from distgrad import config as settings
from distgrad import descriptors, log
from distgrad.environment import check_variables
from distgrad_broker.broker import Served, serve
from distgrad_broker.config import BrokerConfig


@click.command("broker", short_help="Hold the parameters and apply gradients to them.")
@settings.options(BrokerConfig)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML file with any of the settings.")
@click.option("--check-config", is_flag=True, help="Print the settings in force and where each comes from, and end.")
@click.option("--log-level", type=click.Choice(log.LEVELS, case_sensitive=False), default=None, help="[default: info]")
@click.option("--log-json", is_flag=True, default=None, help="Log one JSON object a line.")
def broker(
    config_file: Path | None, check_config: bool, log_level: str | None, log_json: bool | None, **flags: Any
) -> None:
    """Hold one set of parameters, apply the gradients that workers push, and serve the result.

    When it is ready it prints one line with the addresses in use. SIGINT or SIGTERM end it: what is queued is
    applied, and with --save the parameters are written. A setting comes from its flag, else from DISTGRAD_NAME in the
    environment, else from --config, else it has its default.
    """
    check_variables(BrokerConfig, os.environ)
    loaded = settings.load(BrokerConfig, flags, config_file, os.environ)
    if check_config:
        click.echo(loaded.describe())
        return
    level = log_level or os.environ.get("DISTGRAD_LOG_LEVEL") or "info"
    as_json = log_json if log_json is not None else os.environ.get("DISTGRAD_LOG_JSON", "") in ("1", "true", "yes")
    log.install(level, as_json)
    former: dict[int, Any] = {}
    descriptors.keep_spare()  # here and not in `serve`: a program around a broker has limits of its own

    def on_ready(served: Served) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, lambda *_: served.shut_down())
        click.echo(f"distgrad broker control={served.control} gradients={served.gradients}")

    try:
        serve(loaded.config, on_ready)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
