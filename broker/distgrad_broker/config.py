"""Settings of a broker, the same for its flags, ``DISTGRAD_*`` variables, TOML file and for the class `Broker`."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from distgrad import addresses, policies
from distgrad.config import setting
from distgrad.errors import ConfigError
from distgrad.modes import checked_mode
from distgrad.policies import SCALINGS, Policy, Weighing
from distgrad.quantities import parse_bytes, parse_seconds
from distgrad.rules import RULES, Rule, rule_from_settings
from distgrad.wire import MIN_CHARGE_BYTES

# With a size as `sync_every`, what is left over is not kept waiting for longer than this.
MAX_SYNC_WAIT_S = 1.0

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


POLICY_SETTINGS = (
    "max_staleness",
    "staleness_scaling",
    "staleness_decay",
    "quorum",
    "grace",
    "workers",
    "bound",
    "buffer_size",
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
    data: Path | None = setting(
        None, help="Folder that keeps all that happens, so that a broker killed at any moment goes on where it was."
    )
    durability: str | None = setting(
        None,
        choices=("journal", "checkpoint", "none"),
        help="Settle a gradient when it is in the journal (as by default with --data), in a checkpoint, or at once.",
    )
    sync_every: str = setting(
        "0", help="Force the journal to the disk after every batch (0), after this long (50ms), or this much (8MiB)."
    )
    checkpoint_every: float | None = setting(
        300.0, unit="seconds", above=0, help="Write a checkpoint after this long, if anything has happened."
    )
    checkpoint_updates: int | None = setting(None, minimum=1, help="Also write one after so many updates.")
    checkpoint_journal: int | None = setting(
        2 * 1024**3, unit="bytes", minimum=1, help="Also write one after this much journal, which bounds a recovery."
    )
    keep_checkpoints: int = setting(2, minimum=1, help="How many checkpoints to keep, with the journal behind them.")
    segment_bytes: int = setting(
        64 * 1024**2, unit="bytes", minimum=4096, help="Size of the journal's files; the room is reserved beforehand."
    )
    recover_until: int | None = setting(
        None, minimum=0, help="Go back to this version of the data folder; what came after it is set aside."
    )
    queue_bytes: int | None = setting(
        None,
        unit="bytes",
        minimum=MIN_CHARGE_BYTES,
        help="Most bytes of gradients queued or on their way, over all workers; by default 256MiB or two gradients.",
    )
    max_workers: int = setting(1024, minimum=1, maximum=1_000_000, help="Most worker ids to remember.")
    policy: str = setting(
        "async", help="When a gradient counts: async, sync, bounded, buffered, or one that is installed."
    )
    max_staleness: int | None = setting(
        None, minimum=0, help="Supersede gradients computed on parameters more than this many updates old."
    )
    staleness_scaling: str | None = setting(
        None, choices=SCALINGS, help="Scale a gradient s updates old by 1, 1/(1+s) or 1/sqrt(1+s)."
    )
    staleness_decay: float | None = setting(None, above=0, maximum=1, help="Or scale it by this to the power of s.")
    quorum: int | None = setting(
        None, minimum=1, help="A step of sync needs this many gradients; later ones are superseded."
    )
    grace: float | None = setting(
        None,
        unit="seconds",
        minimum=0,
        help="How long sync waits for the others once it has its quorum, and buffered for more when a worker flushes.",
    )
    workers: int | None = setting(
        None, minimum=1, help="Fix the set of sync to this many workers: a step waits for all."
    )
    bound: int | None = setting(
        None, minimum=1, help="No worker may run more than this many steps ahead of the slowest; 4 under bounded."
    )
    buffer_size: int | None = setting(None, minimum=1, help="How many gradients buffered averages into one update; 10.")
    policy_settings: str | None = setting(
        None, help="Settings of an installed policy, as a TOML inline table: '{cooldown = 3}'."
    )
    reduction: str = setting("mean", choices=("mean", "sum"), help="How the gradients of one step are combined.")
    weigh_by_examples: bool = setting(False, help="Weigh the gradients of a step by the examples behind them.")
    workers_silent_after: float = setting(
        30.0, unit="seconds", above=0, help="Take a worker for gone after this long without a sign of life."
    )
    hooks: str | None = setting(
        None, help="Your code that is told what happens: module:object, with methods such as on_worker_lost."
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
        self._check_data()
        self.consistency().check(self.max_workers)
        for name, default_port in (("control", addresses.CONTROL_PORT), ("gradients", addresses.GRADIENTS_PORT)):
            address = addresses.parse(getattr(self, name), default_port)
            if self.keys is None and not self.insecure and not address.is_loopback:
                raise ConfigError(
                    f"{name} is {address.endpoint}, which others can reach, but there are no keys",
                    hint="make keys with `distgrad keys new NAME --role worker --dir DIR` and pass --keys DIR, "
                    "bind to 127.0.0.1, or pass --insecure if the network is yours alone",
                )

    def _check_data(self) -> None:
        self.sync_pace()
        if self.data is None:
            # What else belongs to a data folder has a default, and says nothing without one.
            for name in ("durability", "recover_until"):
                if getattr(self, name) not in (None, "none"):
                    flag = "--" + name.replace("_", "-")
                    raise ConfigError(f"{flag} needs --data DIR: without a data folder nothing is kept on disk")

    def sync_pace(self) -> tuple[float, int]:
        """Read `sync_every`.

        Returns
        -------
        seconds : float
            Wait for so long before records are forced to the disk.
        n_bytes : int
            Or until there are so many bytes; 0 if only time counts.

        Raises
        ------
        ConfigError
            If it is neither.
        """
        try:
            if self.sync_every[-1:] in ("s", "m", "h") or self.sync_every.replace(".", "", 1).isdecimal():
                return parse_seconds(self.sync_every), 0
            return MAX_SYNC_WAIT_S, parse_bytes(self.sync_every)
        except ConfigError as error:
            raise ConfigError(f"sync_every must be 0, a time such as 50ms, or a size such as 8MiB: {error}") from error

    def consistency(self) -> Policy:
        """Build the consistency policy.

        Returns
        -------
        Policy
            A new one.

        Raises
        ------
        ConfigError
            If it is not known, or settings are given that it does not have.
        """
        given = {name: getattr(self, name) for name in POLICY_SETTINGS if getattr(self, name) is not None}
        return policies.build(self.policy, given | self._policy_table())

    def weighing(self) -> Weighing:
        """Build what combines the gradients of a step.

        Returns
        -------
        Weighing
            Mean or sum.
        """
        return Weighing(self.reduction, self.weigh_by_examples)

    def _policy_table(self) -> dict[str, Any]:
        if self.policy_settings is None:
            return {}
        try:
            table = tomllib.loads(f"settings = {self.policy_settings}")["settings"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"policy_settings must be a TOML inline table: {error}") from error
        if not isinstance(table, dict):
            raise ConfigError(
                f"policy_settings must be a TOML inline table such as '{{cooldown = 3}}', got {table!r:.40}"
            )
        return table

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
