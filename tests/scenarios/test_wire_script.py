"""``docs/wire.md`` is enough: a script with zmq, msgpack and NumPy alone controls a broker and pushes a gradient."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import msgpack
import numpy as np
import zmq

from distgrad_broker import Broker


def test_a_short_script_with_zmq_and_msgpack_alone_controls_the_broker_and_pushes() -> None:
    with Broker() as broker, zmq.Context() as context, context.socket(zmq.REQ) as control:
        control.connect(broker.address)

        def ask(op: str, *frames: bytes, **keys: Any) -> Any:
            control.send_multipart([msgpack.packb({"v": 1, "op": op, **keys}), *frames])
            header, *raw = control.recv_multipart()
            reply = msgpack.unpackb(header)
            assert reply["ok"], reply
            return reply, raw

        me = ask("status")[0]["incarnation"]
        leaves = [["w", [3], "float32"]]
        layout = msgpack.packb({"leaves": leaves, "structure": ["dict", [["w", 0]]]})
        ask("set", layout, np.ones(3, "<f4").tobytes(), incarnation=me)
        assert ask("stop", incarnation=me)[0]["changed"]
        assert not ask("status")[0]["status"]["running"]
        assert ask("start", incarnation=me)[0]["changed"]
        assert np.frombuffer(ask("get")[1][1], "<f4").tolist() == [1, 1, 1]

        told, _ = ask("hello", worker="script", nonce=os.urandom(16))
        mine = {"worker": "script", "session": told["session"], "attempt": 1}
        fingerprint = int.from_bytes(hashlib.blake2b(msgpack.packb(leaves), digest_size=8).digest(), "big")
        header = {"v": 1, "kind": "gradient", **mine, "number": told["accepted"] + 1, "fingerprint": fingerprint}
        with context.socket(zmq.PUSH) as push:
            push.connect(told["gradients"])
            push.send_multipart([msgpack.packb(header), np.full(3, 0.5, "<f4").tobytes()])
            beat = {"sent": 1, "settled": 0, "grant_seq": told["grant_seq"], "held": told["grant"], "wait_s": 0.05}
            while ask("heartbeat", **mine, **beat, until=1, fingerprint=fingerprint)[0]["settled"] < 1:
                pass
        _, (_, part) = ask("get")
        assert np.frombuffer(part, "<f4").tolist() == [0.5, 0.5, 0.5]
