"""Brokers and workers that are killed at random moments, and come back."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from support.durable_broker import DurableBroker
from support.processes import Process


def kill_in_turns(
    broker: DurableBroker, workers: list[Process], begin: Callable[[int], Process], kills: int, seed: int
) -> None:
    """Kill the broker and one of the workers in turns, and start each again at once.

    Parameters
    ----------
    broker : DurableBroker
        Running.
    workers : list of Process
        Running; those that take a killed one's place are put in.
    begin : callable
        Starts the worker of a place.
    kills : int
        How many in all; the broker's is the first.
    seed : int
        Of the moments.
    """
    chance, moment = random.Random(seed), threading.Event()
    for kill in range(kills):
        # At any moment: while a process starts, recovers, sends, writes.
        moment.wait(chance.uniform(0.05, 0.6))
        if kill % 2:
            place = chance.randrange(len(workers))
            workers[place].kill()
            workers[place] = begin(place)
        else:
            broker.kill()
            broker.start()
