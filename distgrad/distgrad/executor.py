"""Who runs the kernels: numba or NumPy, on one thread or several.

Elements do not depend on each other, so neither the number of threads nor where the work is cut
changes a bit of the result.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from . import blocked
from .blocked import Kernel
from .errors import ConfigError

if TYPE_CHECKING:
    from .kernels import Compiler

EXECUTORS = ("numba", "numpy")

MAX_THREADS = 8
"""An update is bound by memory, which a few cores saturate."""

CHUNK_BYTES = 1 << 20
"""Work is handed to threads in pieces of this size: 60 microseconds or more, against 2 for a call."""

SPLIT_BYTES = 16 << 20
"""Gradients from which several threads are worth waking.

Measured on 2 cores that others used too: waking a thread loses up to 8 MiB, is even at 16 MiB, and on
an idle machine gains at 100 MB (plain 12 to 9.8 ms, Adam 26 to 19 ms).
"""


class Executor:
    """Compiles kernels and runs them over pieces of arenas.

    Parameters
    ----------
    threads : int, optional
        Threads that share a large update, the caller's included. By default as many as the process
        may use cores, at most 8.
    kind : {"numba", "numpy"}, optional
        By default numba if it is installed.

    Raises
    ------
    ConfigError
        If `threads` is less than 1, the kind is not known, or numba is asked for and missing.
    """

    def __init__(self, threads: int | None = None, kind: str | None = None) -> None:
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ConfigError(f"threads must be an integer of at least 1, got {threads!r}")
        if kind is not None and kind not in EXECUTORS:
            raise ConfigError(f"executor must be one of {', '.join(EXECUTORS)}, got {kind!r}")
        self.threads = threads if threads is not None else min(_usable_cores(), MAX_THREADS)
        self._wanted = kind
        self._compiler: Compiler | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = 0

    @property
    def kind(self) -> str:
        """Which one it is; asking imports numba, if it is not ruled out."""
        if self._wanted == "numpy":
            return "numpy"
        if self._compiler is None:
            try:
                from .kernels import Compiler  # not before parameters exist: it takes most of a second
            except ImportError as error:
                if self._wanted == "numba":
                    raise ConfigError(
                        "executor 'numba' needs the extra: pip install '.[fast]' in the clone of distgrad"
                    ) from error
                self._wanted = "numpy"
                return "numpy"
            self._compiler = Compiler()
        return "numba"

    def kernel(self, name: str, dtype: np.dtype[Any]) -> Kernel:
        """Prepare a kernel.

        Parameters
        ----------
        name : str
            A kernel of `distgrad.rules`.
        dtype : dtype
            One of `arrays.TRAINABLE`. Those of 16 bits always run on NumPy, with float32 between.

        Returns
        -------
        Kernel
            Its functions, compiled.
        """
        if dtype.itemsize == 2 or self.kind == "numpy":
            return blocked.kernel(name, dtype)
        assert self._compiler is not None
        return self._compiler.kernel(name, dtype)

    def splits(self, kernel: Kernel, n_bytes: int) -> bool:
        """Tell whether several threads should share an update.

        Parameters
        ----------
        kernel : Kernel
            What would run.
        n_bytes : int
            Bytes of the gradient.

        Returns
        -------
        bool
            True if it is worth it; the update should then be cut into pieces of `CHUNK_BYTES`.
        """
        return kernel.compiled and self.threads > 1 and n_bytes >= SPLIT_BYTES

    def run(self, function: Callable[..., int], calls: Iterable[tuple[Any, ...]], *, split: bool) -> int:
        """Call a kernel's function on every piece.

        Parameters
        ----------
        function : callable
            One of a `Kernel`'s.
        calls : iterable of tuple
            Arguments of each call; the pieces do not overlap.
        split : bool
            Whether threads share the calls.

        Returns
        -------
        int
            The largest of what the calls returned, 0 if there was none.
        """
        waiting = deque(calls)
        if not split or len(waiting) < 2:
            return _work(function, waiting)
        pool = self._threads()
        futures = [pool.submit(_work, function, waiting) for _ in range(min(self.threads, len(waiting)) - 1)]
        try:
            worst = _work(function, waiting)
        finally:  # nobody may still write when this returns, whatever happened
            waiting.clear()
            results = [future.result() for future in futures]
        return max(worst, *results)

    def close(self) -> None:
        """End the threads. The executor can still be used, and starts new ones when it has to."""
        pool, self._pool = self._pool, None
        if pool is not None and self._pool_pid == os.getpid():
            pool.shutdown()

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool_pid != os.getpid():  # a forked child has the object, not the threads
            self._pool = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="distgrad-kernel")
            self._pool_pid = os.getpid()
        return self._pool


def _work(function: Callable[..., int], waiting: deque[tuple[Any, ...]]) -> int:
    """Call until nothing waits. Threads take pieces as they get to them: cores are not equally free."""
    worst = 0
    while True:
        try:
            arguments = waiting.popleft()
        except IndexError:
            return worst
        worst = max(worst, function(*arguments))


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; it respects containers and taskset
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
