"""A broker in this process: build the parts, run the loop, take everything apart again.

`Broker` runs it on a thread, for notebooks and tests; ``distgrad broker`` calls `serve` on the main thread.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distgrad import addresses, lanes, log, sockets
from distgrad.durable.disk import Disk, OsDisk
from distgrad.errors import CheckpointError, ConfigError, StateError
from distgrad.holder import ParameterHolder
from distgrad.keys import BrokerKeys
from distgrad.policies import Policy
from distgrad.rules import Rule
from distgrad.shared_pages import host_name
from distgrad_broker.authenticator import Authenticator
from distgrad_broker.callers import user_of
from distgrad_broker.channels import ControlChannel, GradientChannel
from distgrad_broker.config import POLICY_SETTINGS, RULE_NUMBERS, BrokerConfig
from distgrad_broker.core import Core
from distgrad_broker.core_settings import CoreSettings
from distgrad_broker.data import open_data
from distgrad_broker.events import Log, SaveParameters, ShutdownAsked
from distgrad_broker.files import FileThread
from distgrad_broker.hooks import Hooks, load
from distgrad_broker.local_lanes import LocalLanes
from distgrad_broker.loop import Loop
from distgrad_broker.requests import RequestError
from distgrad_broker.shared_slots import SharedSlots
from distgrad_broker.shared_versions import SharedArenas
from distgrad_broker.versions import Versions

if TYPE_CHECKING:
    from types import TracebackType

_LOGGER = logging.getLogger("distgrad_broker")


@dataclasses.dataclass(frozen=True)
class Served:
    """A broker that is ready.

    Attributes
    ----------
    control, gradients : str
        Endpoints with their real ports.
    incarnation : str
        Of this broker.
    shut_down : callable
        Ends it cleanly; may be called from any thread or a signal handler.
    """

    control: str
    gradients: str
    incarnation: str
    shut_down: Callable[[], None]


def serve(
    config: BrokerConfig,
    on_ready: Callable[[Served], None],
    *,
    rule: Rule | None = None,
    policy: Policy | None = None,
    parameters: Any = None,
    disk: Disk | None = None,
    hooks: object = None,
) -> None:
    """Run a broker on this thread until it is shut down or destroyed.

    Parameters
    ----------
    config : BrokerConfig
        As started.
    on_ready : callable
        Called once, when both channels are bound.
    rule : Rule, optional
        Instead of the configuration's.
    policy : Policy, optional
        Instead of the configuration's; it must not be in use elsewhere.
    parameters : nest of ndarray, optional
        Instead of the configuration's file.
    disk : Disk, optional
        Where the data folder is; by default on this machine.
    hooks : object, optional
        Is told what happens, instead of the configuration's.

    Raises
    ------
    ConfigError
        If a setting is impossible, an address cannot be bound, or a gradient does not fit in the queue.
    KeyFileError
        If the keys cannot be read.
    CheckpointError
        If the file of parameters cannot be read.
    """
    if config.load is not None and parameters is None:
        from distgrad.parameter_files import as_nest, read  # only who loads a file needs safetensors

        parameters = as_nest(read(config.load))
    if hooks is None and config.hooks is not None:
        hooks = load(config.hooks)
    if config.save is not None:
        from distgrad.parameter_files import check_suffix

        check_suffix(config.save)
    with contextlib.ExitStack() as stack:
        holder = ParameterHolder(config.mode, rule or config.rule(), threads=config.threads)
        stack.callback(holder.close)
        policy = policy or config.consistency()
        data = None
        if config.data is not None:
            data = open_data(config, disk or OsDisk(), holder, policy)
            stack.callback(data.writer.close)
            policy = data.policy
        if parameters is not None:
            if holder.layout is None:
                holder.set_nest(parameters)
            else:
                log.event(
                    _LOGGER, logging.WARNING, "parameters are in the data folder, the given ones are not used",
                    data=config.data, version=holder.version,
                )  # fmt: skip
        incarnation = os.urandom(8).hex()
        context = sockets.open_context()
        stack.callback(context.term)
        authenticator = None
        if config.keys is not None:
            authenticator = Authenticator(context, BrokerKeys.load(config.keys))
            stack.callback(authenticator.close)
        keys = None if authenticator is None else authenticator.keys
        # An address without a port means the one that clients without a port ask.
        control_at = addresses.parse(config.control, addresses.CONTROL_PORT).endpoint
        gradients_at = addresses.parse(config.gradients, addresses.GRADIENTS_PORT).endpoint
        control = sockets.control_server(context, control_at, keys=keys)
        stack.callback(control.close)
        gradients = sockets.gradient_server(context, gradients_at, keys=keys)
        stack.callback(gradients.close)
        if authenticator is not None:
            authenticator.watch(control, gradients)
        host = host_name()
        settings = CoreSettings(
            incarnation=incarnation,
            gradients=gradients.endpoint,
            queue_bytes=config.queue_bytes,
            max_workers=config.max_workers,
            lease_s=config.workers_silent_after,
            is_stopped=config.stopped,
            save_path=None if config.save is None else str(config.save),
            data=None if data is None else data.settings,
            host=host,
            lane=None if host is None else lanes.new_name(),
        )
        versions = Versions(holder, None if settings.host is None else SharedArenas())
        slots = None if settings.host is None else SharedSlots()
        weighing = config.weighing() if data is None else data.weighing
        recovered = None if data is None else data.recovered
        try:
            core = Core(settings, versions, policy, weighing, slots=slots, recovered=recovered, now=time.monotonic())
        except RequestError as error:
            raise ConfigError(error.message) from error
        role_of = None if authenticator is None else authenticator.role_of
        files = FileThread(settings.save_path, lambda event: loop.post(event), None if data is None else data.writer)
        gradient_channel = GradientChannel(gradients, role_of, keeps_frames=core.state.records is not None, slots=slots)
        told = Hooks(hooks, lambda event: loop.post(event)) if hooks is not None else None

        def on_log(line: Log) -> None:
            _log(line)
            if told is not None:
                told.tell(line)

        local = None
        if settings.lane is not None:
            local = LocalLanes(settings.lane, gradient_channel, functools.partial(user_of, core.state))
            stack.callback(local.close)
        loop = Loop(core, ControlChannel(control, role_of), gradient_channel, authenticator, files, on_log, local)
        stack.callback(loop.close)
        if told is not None:
            stack.callback(told.close)
        stack.callback(files.close)
        if authenticator is None and not _is_private(control.endpoint, gradients.endpoint):
            log.event(_LOGGER, logging.WARNING, "no keys: anybody who reaches this address can change the parameters")
        served = Served(control.endpoint, gradients.endpoint, incarnation, lambda: loop.post(ShutdownAsked()))
        log.event(
            _LOGGER,
            logging.INFO,
            "broker ready",
            control=served.control,
            gradients=served.gradients,
            incarnation=incarnation,
            executor=holder.executor,
            keys=config.keys,
        )
        on_ready(served)
        loop.run()
        if settings.save_path is not None and versions.layout is not None:
            _, layout, arenas, version = versions.pin(0.0)
            trouble = files.write_now(SaveParameters(0, layout, arenas, version))
            if trouble is not None:
                raise CheckpointError(f"cannot save the parameters to {settings.save_path}: {trouble}")
            log.event(_LOGGER, logging.INFO, "parameters saved", path=settings.save_path)
        log.event(_LOGGER, logging.INFO, "broker ended", version=versions.version)


class Broker:
    """A broker on a thread of this process, for notebooks and tests.

    It installs no signal handlers. Leaving the with-block ends it cleanly: what is queued is applied first.

    Parameters
    ----------
    config : BrokerConfig, optional
        Settings; the keyword arguments below override it.
    optimizer : Rule or str, optional
        An update rule such as ``distgrad.SGD(lr=0.1)``, or its name.
    policy : Policy or str, optional
        When a gradient counts, such as ``distgrad.policies.Synchronous(quorum=3)``, or its name. It is copied.
    parameters : nest of ndarray, optional
        Parameters to start with.
    hooks : object or str, optional
        Is told what happens, by methods such as ``on_worker_lost`` (`distgrad_broker.hooks`), on a thread of its own.
    **settings : object
        Fields of `BrokerConfig`. The addresses default to free ports on loopback.

    Raises
    ------
    ConfigError
        If a setting is unknown or impossible.

    Examples
    --------
    >>> import distgrad
    >>> with Broker(optimizer=distgrad.SGD(lr=0.1)) as broker:
    ...     print(broker.address.startswith("tcp://127.0.0.1:"))
    True
    """

    def __init__(
        self,
        config: BrokerConfig | None = None,
        *,
        optimizer: Rule | str | None = None,
        policy: Policy | str | None = None,
        parameters: Any = None,
        hooks: Any = None,
        **settings: Any,
    ) -> None:
        if config is not None and not isinstance(config, BrokerConfig):
            raise ConfigError(f"config must be a BrokerConfig, got {config!r:.80}; an address is control='tcp://…'")
        if isinstance(hooks, str):
            settings["hooks"], hooks = hooks, None
        self._hooks = hooks
        if isinstance(policy, str):
            settings["policy"] = policy
        elif policy is not None and any(name in settings for name in POLICY_SETTINGS):
            raise ConfigError("give the policy's settings to the policy, as in Bounded(3), not to the broker")
        # A policy remembers workers and gradients: each broker gets one of its own.
        self._policy = None if isinstance(policy, str) else copy.deepcopy(policy)
        self._rule = optimizer if isinstance(optimizer, Rule) else None
        if isinstance(optimizer, str):
            settings["optimizer"] = optimizer
        elif self._rule is not None and any(name in settings for name in RULE_NUMBERS):
            raise ConfigError("give the rule's numbers to the rule, as in SGD(lr=0.1), not to the broker")
        known = {field.name for field in dataclasses.fields(BrokerConfig)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        if config is None:
            settings = {"control": "tcp://127.0.0.1:0", "gradients": "tcp://127.0.0.1:0", **settings}
            config = BrokerConfig(**settings)
        self.config = dataclasses.replace(config, **settings)
        self._parameters = parameters
        self._served: Served | None = None
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Endpoint of the control channel, for `Worker` and `Admin`."""
        return self._running().control

    @property
    def gradients(self) -> str:
        """Endpoint of the gradients channel; workers are told it by `hello`."""
        return self._running().gradients

    def start(self) -> None:
        """Start the thread and wait until the broker is ready.

        Raises
        ------
        StateError
            If it was started before.
        ConfigError
            If it cannot start.
        """
        if self._thread is not None:
            raise StateError("a Broker is started once; make another")
        self._thread = threading.Thread(target=self._run, name="distgrad-broker", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def close(self) -> None:
        """End the broker cleanly and wait for its thread. Idempotent.

        Raises
        ------
        DistgradError
            If the loop ended by an error, that error.
        """
        if self._thread is None or self._served is None:
            return
        self._served.shut_down()
        self._thread.join()
        # With it goes the memory of the broker, which this object must not keep.
        self._served = dataclasses.replace(self._served, shut_down=lambda: None)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _running(self) -> Served:
        if self._served is None:
            raise StateError("the broker is not started; use it in a with-block")
        return self._served

    def _run(self) -> None:
        try:
            serve(
                self.config,
                self._take,
                rule=self._rule,
                policy=self._policy,
                parameters=self._parameters,
                hooks=self._hooks,
            )
        # The one place of this thread that catches everything: the owner is told by start or close.
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    def _take(self, served: Served) -> None:
        self._served = served
        self._ready.set()


def _log(effect: Log) -> None:
    log.event(_LOGGER, effect.level, effect.phrase, **effect.fields)


def _is_private(*endpoints: str) -> bool:
    return all(addresses.parse(endpoint, 0).is_loopback for endpoint in endpoints)
