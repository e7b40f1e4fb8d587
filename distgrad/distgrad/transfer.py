"""Whole parameters over the control channel: a `get` and its `range` requests, and the frames of a `set`.

Every part is copied once, from the memory that it was received into to its place in an arena; or not at all, where a
whole arena has come in one part and the caller named no memory to put it in. A few ranges are asked for ahead, so that
the link is busy while parts are copied; why few and small ones is in
``docs/decisions/0005-small-ranges-asked-for-ahead.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distgrad import codec, wire
from distgrad.client import ControlClient
from distgrad.errors import BrokerRestarted, MalformedMessage, SnapshotRevoked
from distgrad.layout import Layout, aligned_empty
from distgrad.ranges import Places, Ranges
from distgrad.requests_sent import Reply
from distgrad.shared_reading import Lease, SharedReading

# A broker takes a snapshot back when it needs the memory: a reader that meets this again and again is too slow for
# the rate of updates and is told so, instead of loading the link for ever.
MAX_TRIES = 5
# How long one request waits for the outcome of another client's offer; the broker's own limit.
_OFFER_WAIT_S = 5.0
_REPLY_BYTES = wire.RANGE_PARTS * wire.PART_BYTES

Array = np.ndarray[Any, Any]


class Fetched(NamedTuple):
    """Parameters as fetched from a broker: one consistent version.

    Attributes
    ----------
    layout : Layout
        What the arenas hold.
    arenas : list of ndarray, 1-D
        All arenas in the layout's order. They belong to the caller.
    state : State
        Incarnation, generation and version that the numbers have.
    lease : Lease or None
        If the arenas are the broker's own.
    settled : tuple of int or None
        If a worker asked in its session: up to which number its gradients were settled by then, and how many of them
        had been superseded.
    """

    layout: Layout
    arenas: list[Array]
    state: wire.State
    lease: Lease | None = None
    settled: tuple[int, int] | None = None


def fetch(
    client: ControlClient,
    *,
    newer_than: wire.State | None = None,
    wait_s: float = 0.0,
    have: Layout | None = None,
    out_arenas: Sequence[Array] | None = None,
    timeout: float | None = None,
    worker: str | None = None,
    pushed: int = 0,
    session: str | None = None,
    shared: SharedReading | None = None,
    leases: bool = False,
    own: bool = False,
    push: Callable[[int | None], int] | None = None,
) -> Fetched | None:
    """Fetch the broker's parameters.

    Parameters
    ----------
    client : ControlClient
        Whom to ask; other threads wait until all parts are here.
    newer_than : State, optional
        Ask for something else than this state.
    wait_s : float, seconds, 0 to 5
        How long the broker may wait for something newer.
    have : Layout, optional
        The layout that the caller knows; it does not travel again while the broker has the same.
    out_arenas : sequence of ndarray, optional
        Memory to reuse. It is written to if it fits the layout, and then holds a mixture if the call fails;
        otherwise new arenas are made.
    timeout : float, optional, seconds
        For each request, instead of the client's.
    worker : str, optional
        The worker that asks: the broker's policy may then let it wait.
    pushed : int
        The number of its last gradient, which is to be decided on before.
    session : str, optional
        Its session, to be told what is settled.
    shared : SharedReading, optional
        Reads the broker's memory, if that is on this host.
    leases : bool
        Whether the arenas may be the broker's own; it then leaves them alone until `worker`'s next gradient or `get`.
        Of another host's `out_arenas` are used only for what has to be copied.
    own : bool
        Whether to wait for that gradient under every policy.
    push : callable, optional
        Pushes that gradient first and returns its number. If it is given one, its message has to ask under that for
        what the last call has asked for, and nothing else is sent.

    Returns
    -------
    Fetched or None
        ``None`` if there is nothing newer than `newer_than`, or the policy lets the worker wait for longer.

    Raises
    ------
    NoParameters
        If none were set yet.
    SnapshotRevoked
        If the broker took `MAX_TRIES` snapshots back before all of it was read.
    MalformedMessage
        If the replies do not add up to the layout.
    DistgradError
        As `ControlClient.request`.
    """
    asked: dict[str, Any] = {"newer_than": None if newer_than is None else list(newer_than), "wait_s": wait_s}
    asked |= {"lease": True} if leases else {}
    if worker is not None:
        asked |= {"worker": worker, "pushed": pushed, "own": own, "session": session}
    client.check_alive()
    # As `ControlClient.conversation`, which costs as much as all the bookkeeping of a short exchange.
    with client.lock:
        client.adopt()
        try:
            return _converse(client, asked, have, out_arenas, timeout, shared, push)
        except BaseException:
            client.give_up()
            raise


def fetch_layout(client: ControlClient) -> Layout:
    """Fetch the layout of the broker's parameters.

    Parameters
    ----------
    client : ControlClient
        Whom to ask.

    Returns
    -------
    Layout
        What the broker has now.

    Raises
    ------
    NoParameters
        If none were set yet.
    MalformedMessage
        If the reply brings no layout.
    DistgradError
        As `ControlClient.request`.
    """
    reply = client.request("get", newer_than=None, wait_s=0.0, have=None, reply_bytes=_REPLY_BYTES)
    return _layout(reply, None)[0]


def payload(nest: Any) -> tuple[Layout, list[Any]]:
    """Lay parameters out and cut them into the frames of a `set`.

    Parameters
    ----------
    nest : nest of arrays
        Dict, list, tuple or namedtuple of arrays, or one array. It is copied.

    Returns
    -------
    Layout
        The layout of the parameters.
    list of buffers
        Layout frame, then the parts.

    Raises
    ------
    LayoutError
        If the parameters cannot be laid out.
    """
    layout = Layout.of(nest)
    return layout, [layout.to_frame(), *codec.encode(layout, layout.pack(nest), trained_only=False)]


def offer(client: ControlClient, nest: Any) -> Layout:
    """Offer the first parameters, and return when there are some: these, or those of another client.

    Only who is asked to sends its parameters; a hundred workers would send a hundred models.

    Parameters
    ----------
    client : ControlClient
        Whom to ask.
    nest : nest of arrays
        As for `payload`.

    Returns
    -------
    Layout
        Of what was offered.

    Raises
    ------
    LayoutError
        If the parameters cannot be laid out.
    DistgradError
        As `ControlClient.request`.
    """
    layout, frames = payload(nest)
    while True:
        try:
            reply = client.request("offer", bytes=layout.parameter_bytes, wait_s=_OFFER_WAIT_S).header
            if reply["wanted"]:
                client.request("set", frames=frames, mutating=True, if_absent=True)
            if reply["wanted"] or reply["fingerprint"] is not None:
                return layout
        except BrokerRestarted:
            continue  # the offer is right for the new broker too; who lost something is told of it elsewhere


def _converse(
    client: ControlClient,
    asked: dict[str, Any],
    have: Layout | None,
    out_arenas: Sequence[Array] | None,
    timeout: float | None,
    shared: SharedReading | None,
    push: Callable[[int | None], int] | None,
) -> Fetched | None:
    reserved: int | None = None
    if push is not None:
        reserved = client.reserve() if client.last_pull == _wish(client, asked, have, shared) else None
        asked["pushed"] = push(reserved)
    for _ in range(MAX_TRIES - 1):
        try:
            return _fetch_once(client, asked, have, out_arenas, timeout, shared, reserved)
        except SnapshotRevoked:
            client.give_up()  # ranges of it that are still asked for
            reserved = None
    # Whoever did not get through to its end so far does not try shared memory again, of which nothing is held.
    return _fetch_once(client, asked, have, out_arenas, timeout, None)


def _fetch_once(
    client: ControlClient,
    asked: Mapping[str, Any],
    have: Layout | None,
    out_arenas: Sequence[Array] | None,
    timeout: float | None,
    shared: SharedReading | None,
    reserved: int | None = None,
) -> Fetched | None:
    pending = client.send(
        "get",
        reserved=reserved,
        **asked,
        have=None if have is None else have.fingerprint,
        host=None if shared is None else shared.host,
        reply_bytes=_REPLY_BYTES if have is None else min(have.parameter_bytes, _REPLY_BYTES),
        timeout=timeout,
    )
    if reserved is None and asked.get("session") is not None and asked["wait_s"] > 0:
        # The broker remembers it from now on, in place of the one before it.
        client.last_pull = _wish(client, asked, have, shared)
    reply = client.receive(pending)
    if reply.header.get("unchanged"):
        return None
    layout, parts = _layout(reply, have)
    state, settled = reply.state, _settled(reply.header)
    places = reply.header.get("places")
    if places is not None and shared is not None:
        if reply.header.get("token") is not None:
            lease = shared.lease(places, parts, [(arena.size, arena.dtype) for arena in layout.arenas])
            if lease is not None:
                return Fetched(layout, lease.arenas, state, lease, settled)
        arenas = _arenas(layout, out_arenas)
        if shared.copy(places, parts, arenas):
            return Fetched(layout, arenas, state, None, settled)
        raise SnapshotRevoked("revoked", "the version was replaced while it was read")
    n_parts = wire.field(reply.header, "parts", int, low=0)
    token = wire.field(reply.header, "token", str, None)
    if len(parts) < n_parts and token is None:
        raise MalformedMessage(f"a reply has {len(parts)} of {n_parts} parts and no token to ask for the others")
    del reply  # and so the memory of its parts, once they are copied
    if len(parts) >= n_parts and (asked.get("lease") or out_arenas is None) and not client.ways.has_answered:
        received = codec.as_arenas(layout, parts)
        if received is not None:
            return Fetched(layout, received, state, None, settled)
    arenas = _arenas(layout, out_arenas)
    filling = Places(arenas)
    if len(parts) >= n_parts:
        filling.fill(parts)
    else:
        ranges = Ranges(client, token, len(parts), n_parts, timeout)
        while True:
            ranges.ask()
            filling.fill(parts)
            # Given back before more is received: ZeroMQ then takes the same memory, which the processor has at hand.
            parts = []
            if ranges.is_complete:
                break
            parts = ranges.receive()
    filling.check_full()
    return Fetched(layout, arenas, state, None, settled)


def _wish(
    client: ControlClient, asked: Mapping[str, Any], have: Layout | None, shared: SharedReading | None
) -> tuple[Any, ...]:
    """Tell what a worker's `get` asks for that is not of one gradient, and whom the reply reaches."""
    return client.connection, asked["session"], have and have.fingerprint, shared and shared.host, "lease" in asked


def _settled(header: Mapping[str, Any]) -> tuple[int, int] | None:
    settled = wire.field(header, "settled", int, None, low=0)
    return None if settled is None else (settled, wire.field(header, "superseded", int, 0, low=0))


def _layout(reply: Reply, have: Layout | None) -> tuple[Layout, list[memoryview]]:
    if reply.header.get("layout"):
        if not reply.frames:
            raise MalformedMessage("a reply announces a layout and has no frame for it")
        layout, parts = Layout.from_frame(reply.frames[0]), reply.frames[1:]
    elif have is not None:
        layout, parts = have, reply.frames
    else:
        raise MalformedMessage("a reply to a client that knows no layout must bring one")
    if reply.header.get("fingerprint") != layout.fingerprint:
        raise MalformedMessage("a reply's fingerprint is not that of its layout")
    return layout, parts


def _arenas(layout: Layout, out_arenas: Sequence[Array] | None) -> list[Array]:
    wanted = layout.arenas
    if out_arenas is None or len(out_arenas) != len(wanted):
        return [aligned_empty(arena.size, arena.dtype) for arena in wanted]
    for out, arena in zip(out_arenas, wanted, strict=True):
        flags = out.flags
        is_fit = out.ndim == 1 and out.dtype == arena.dtype and out.size == arena.size
        if not (is_fit and flags.c_contiguous and flags.writeable):
            return [aligned_empty(arena.size, arena.dtype) for arena in wanted]
    return list(out_arenas)
