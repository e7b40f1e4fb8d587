"""The process that holds the parameters; `Broker` runs it on a thread, ``distgrad broker`` as a process."""

from distgrad_broker.broker import Broker
from distgrad_broker.config import BrokerConfig

__all__ = ["Broker", "BrokerConfig"]
