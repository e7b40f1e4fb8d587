"""Place a broker and workers on a Ray cluster as actors, which Ray starts again when they die.

Ray finds machines and restarts what died; that each gradient counts once is the protocol's doing. Workers keep
their ids across restarts, so a training function that passes cursors goes on where it was; so does a broker with a
data folder.
Needs the extra ``ray``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import ray

from distgrad.admin import Admin
from distgrad.errors import BrokerUnreachable, ConfigError
from distgrad.keys import ClientKeys, Role, add_client
from distgrad.sockets import curve_pair
from distgrad_worker.worker import Worker

__all__ = ["Launch", "launch"]

_FOR_EVER = -1
# How long a broker that is started again may take to recover before its workers give up.
_PATIENCE_S = 300.0
_END_S = 60.0

Files = Mapping[str, str]


class _Broker:
    """The actor that holds the broker; made anew, by the same arguments, when it has died."""

    def __init__(self, make: Callable[..., Any], keys: Files, ports: tuple[int, int]) -> None:
        host = ray.util.get_node_ip_address()
        control, gradients = (f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}" for port in ports)
        # Read as long as the broker runs; gone with it unless it is killed.
        self._folder = _written(keys)
        self._broker = make(control=control, gradients=gradients, keys=self._folder)
        self._broker.start()

    def address(self) -> str:
        """Tell where workers ask."""
        return str(self._broker.address)

    def process_id(self) -> int:
        """Tell which process it is, for those who watch or kill it."""
        return os.getpid()

    def stop(self) -> None:
        """End the broker: what is queued is applied, and a last checkpoint is written."""
        try:
            self._broker.close()
        finally:
            shutil.rmtree(self._folder)


class _Worker:
    """The actor of one worker."""

    def __init__(self, broker: Any, worker_id: str, keys: Files | None, environment: Mapping[str, str]) -> None:
        self._broker, self._id, self._keys = broker, worker_id, keys
        os.environ.update(environment)

    def process_id(self) -> int:
        """Tell which process it is."""
        return os.getpid()

    def run(self, train: Callable[[Worker], Any]) -> Any:
        """Call the function with a worker, again if the broker has moved to another machine."""
        keys = None if self._keys is None else _loaded(self._keys, "worker.key")
        while True:
            address = _address(self._broker)
            try:
                with Worker(address, worker_id=self._id, keys=keys, timeout=_PATIENCE_S) as worker:
                    return train(worker)
            except BrokerUnreachable:
                if _address(self._broker) == address:
                    raise


class Launch:
    """A broker and workers on a Ray cluster; made by `launch`.

    Leaving the with-block ends the workers, then the broker, gently.

    Parameters
    ----------
    broker : ray.actor.ActorHandle or None
        The broker's actor; None if the broker was running already.
    address : str or None
        That broker's address then.
    workers : list of ray.actor.ActorHandle
        The workers' actors, by rank.
    runs : list of ray.ObjectRef
        What they will have returned.
    admin : mapping of str to str
        The admin's key file, by name.

    Attributes
    ----------
    broker, workers
        The actors.
    """

    def __init__(self, broker: Any, address: str | None, workers: list[Any], runs: list[Any], admin: Files) -> None:
        self.broker, self.workers = broker, workers
        self._given_address, self._runs, self._admin = address, runs, admin

    @property
    def address(self) -> str:
        """The broker's control address, as it is now."""
        return _address(self._given_address if self.broker is None else self.broker)

    def admin(self, timeout: float = 30.0) -> Admin:
        """Connect to the broker with a key that may control it.

        Parameters
        ----------
        timeout : float, seconds
            How long a request may stay without an answer.

        Returns
        -------
        Admin
            To be closed by the caller.

        Raises
        ------
        ConfigError
            If the broker was running before the launch, which has no admin's key for it.
        """
        if self.broker is None:
            raise ConfigError("this broker was not launched here: use distgrad.Admin with its address and your key")
        return Admin(self.address, _loaded(self._admin, "admin.key"), timeout)

    def wait(self, timeout: float | None = None) -> list[Any]:
        """Wait until every worker has returned.

        Parameters
        ----------
        timeout : float, optional, seconds
            By default as long as it takes.

        Returns
        -------
        list
            What the training function returned, by rank.

        Raises
        ------
        ray.exceptions.RayTaskError
            If it raised an error in one of them, which is its cause.
        TimeoutError
            If they are not done in time; they go on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        results = []
        for run in self._runs:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                results.append(ray.get(run, timeout=left))
            except ray.exceptions.GetTimeoutError as error:
                raise TimeoutError(f"not all workers are done after {timeout:g} s") from error
        return results

    def close(self) -> None:
        """End workers and broker. Idempotent."""
        for worker in self.workers:
            ray.kill(worker, no_restart=True)
        if self.broker is not None:
            with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                ray.get(self.broker.stop.remote(), timeout=_END_S)
            ray.kill(self.broker, no_restart=True)

    def __enter__(self) -> Launch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def launch(
    train: Callable[[Worker], Any],
    *,
    workers: int,
    broker: Callable[..., AbstractContextManager[Any]] | str,
    name: str = "worker",
    keys: str | os.PathLike[str] | None = None,
    ports: tuple[int, int] = (5556, 5555),
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
) -> Launch:
    """Start a broker and workers on the Ray cluster that ``ray.init`` has connected to.

    A broker that is launched here gets keys of its own, so that nobody else is let in, whatever the network.

    Parameters
    ----------
    train : callable
        Called in each worker's process with one argument, a connected `Worker`. It finds its place in the variables
        ``DISTGRAD_RANK`` and ``DISTGRAD_WORLD``. It is called again, with the same worker id, if its process died.
    workers : int
        How many, at least 1.
    broker : callable or str
        Makes the broker on the node that Ray chooses: ``distgrad_broker.Broker``, or a `functools.partial` of it with
        settings. Or the address of a broker that runs already. With ``data=`` on a disk that the node keeps, a broker
        that died goes on where it was; without, it begins anew.
    name : str
        The workers' ids are ``NAME-0``, ``NAME-1``, …
    keys : path, optional
        A worker's key file, for a broker that runs already and has keys.
    ports : tuple of int
        Of the control and the gradients channel of a broker that is launched here.
    cpus_per_worker, gpus_per_worker : float
        What each worker takes of the cluster.

    Returns
    -------
    Launch
        To wait for the workers, to control the broker, and to end both.

    Raises
    ------
    ConfigError
        If `workers` is less than 1, or keys are given for a broker that is launched here.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    if not isinstance(broker, str) and keys is not None:
        raise ConfigError("keys are for a broker that runs already; one that is launched here gets its own")
    restarts = {"max_restarts": _FOR_EVER, "max_task_retries": _FOR_EVER}
    own: dict[str, str] = {}
    worker_files: Files | None
    if isinstance(broker, str):
        where: Any = broker
        worker_files = None if keys is None else {"worker.key": Path(keys).read_text()}
    else:
        own, worker_files = _new_keys()
        folder = {file: text for file, text in own.items() if file != "admin.key"}
        where = ray.remote(_Broker).options(num_cpus=1, **restarts).remote(broker, folder, ports)
        _address(where)  # what keeps it from starting is told here
    actor = ray.remote(_Worker).options(num_cpus=cpus_per_worker, num_gpus=gpus_per_worker, **restarts)
    started = [
        actor.remote(
            where, f"{name}-{rank}", worker_files, {"DISTGRAD_RANK": str(rank), "DISTGRAD_WORLD": str(workers)}
        )
        for rank in range(workers)
    ]
    runs = [each.run.remote(train) for each in started]
    address = broker if isinstance(broker, str) else None
    return Launch(None if address else where, address, started, runs, {"admin.key": own.get("admin.key", "")})


def _address(broker: Any) -> str:
    return broker if isinstance(broker, str) else str(ray.get(broker.address.remote()))


def _new_keys() -> tuple[dict[str, str], Files]:
    """Make a broker's folder with a worker and an admin; return its files, with the admin's own, and the worker's."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "keys"
        for role in (Role.WORKER, Role.ADMIN):
            add_client(folder, role, role, curve_pair)
        files = {path.name: path.read_text() for path in (*folder.iterdir(), Path(made) / "admin.key")}
        return files, {"worker.key": (Path(made) / "worker.key").read_text()}


def _written(files: Files) -> Path:
    """Write key files to a new folder that only this process's user can read."""
    folder = Path(tempfile.mkdtemp(prefix="distgrad-keys-"))
    for name, text in files.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
    return folder


def _loaded(files: Files, name: str) -> ClientKeys:
    folder = _written(files)
    try:
        return ClientKeys.load(folder / name)
    finally:
        shutil.rmtree(folder)
