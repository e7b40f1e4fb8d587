"""Settings of a broker, the same for its flags, ``DISTGRAD_*`` variables, TOML file and for the class `Broker`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distgrad import addresses
from distgrad.config import setting
from distgrad.errors import ConfigError
from distgrad.holder import checked_mode
from distgrad.rules import RULES, Rule, rule_from_settings
from distgrad.wire import MIN_CHARGE_BYTES

RULE_NUMBERS = (
    "lr",
    "momentum",
    "dampening",
    "nesterov",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
)


@dataclasses.dataclass(frozen=True)
class BrokerConfig:
    """How a broker is started; every field is described where it is declared."""

    control: str = setting("tcp://127.0.0.1:5556", help="Where to serve control requests; port 0 takes a free one.")
    gradients: str = setting("tcp://127.0.0.1:5555", help="Where to receive gradients; port 0 takes a free one.")
    mode: str = setting("descent", choices=("descent", "ascent"), help="Direction of an update.")
    optimizer: str | None = setting(
        None, choices=tuple(RULES), help="Update rule; without one a gradient is the step itself: p - g."
    )
    lr: float | None = setting(None, minimum=0, help="Learning rate of the optimizer.")
    momentum: float | None = setting(None, minimum=0, help="Momentum of sgd.")
    dampening: float | None = setting(None, help="Dampening of sgd's momentum.")
    nesterov: bool | None = setting(None, help="Nesterov momentum for sgd.")
    beta1: float | None = setting(None, minimum=0, help="Decay of adam's first moment.")
    beta2: float | None = setting(None, minimum=0, help="Decay of adam's second moment.")
    eps: float | None = setting(None, minimum=0, help="Term added to adam's denominator.")
    weight_decay: float | None = setting(None, minimum=0, help="Weight decay of the optimizer.")
    load: Path | None = setting(None, help="Parameters to start with: FILE.safetensors or .npz.")
    save: Path | None = setting(None, help="File that `save` and a clean end write the parameters to.")
    queue_bytes: int | None = setting(
        None,
        unit="bytes",
        minimum=MIN_CHARGE_BYTES,
        help="Most bytes of gradients queued or on their way, over all workers; by default 256MiB or two gradients.",
    )
    max_workers: int = setting(1024, minimum=1, maximum=1_000_000, help="Most worker ids to remember.")
    max_staleness: int | None = setting(
        None, minimum=0, help="Supersede gradients computed on parameters more than this many updates old."
    )
    workers_silent_after: float = setting(
        30.0, unit="seconds", above=0, help="Take a worker for gone after this long without a sign of life."
    )
    keys: Path | None = setting(None, help="Folder made by `distgrad keys`: admit only its keys, and encrypt.")
    insecure: bool = setting(False, help="Allow other than loopback addresses without keys.")
    stopped: bool = setting(False, help="Begin with the updater stopped.")
    threads: int | None = setting(None, minimum=1, maximum=256, help="Threads for large updates; by default the cores.")

    def __post_init__(self) -> None:
        """Refuse what cannot work together.

        Raises
        ------
        ConfigError
            Naming the settings.
        """
        checked_mode(self.mode)
        self.rule()
        for name, default_port in (("control", addresses.CONTROL_PORT), ("gradients", addresses.GRADIENTS_PORT)):
            address = addresses.parse(getattr(self, name), default_port)
            if self.keys is None and not self.insecure and not address.is_loopback:
                raise ConfigError(
                    f"{name} is {address.endpoint}, which others can reach, but there are no keys",
                    hint="make keys with `distgrad keys new NAME --role worker --dir DIR` and pass --keys DIR, "
                    "bind to 127.0.0.1, or pass --insecure if the network is yours alone",
                )

    def rule(self) -> Rule | None:
        """Build the update rule.

        Returns
        -------
        Rule or None
            None if a gradient is the step itself.

        Raises
        ------
        ConfigError
            If numbers are given without an optimizer, or that it does not have.
        """
        given = {name: getattr(self, name) for name in RULE_NUMBERS if getattr(self, name) is not None}
        if self.optimizer is None:
            if given:
                flags = ", ".join("--" + name.replace("_", "-") for name in given)
                raise ConfigError(
                    f"{flags} needs --optimizer ({', '.join(RULES)}): without one a gradient is the step itself"
                )
            return None
        return rule_from_settings(self.optimizer, given)
