"""Every contender, in the order of the tables."""

from __future__ import annotations

from benchmarks.peers import (
    floor_local,
    floor_shared,
    floor_socket,
    floor_zmq,
    ours,
    over_gloo,
    over_mpi,
    over_pipe,
    over_ray,
    over_rpc,
    over_zmq,
)

CONTENDERS = {
    contender.name: contender
    for module in (
        ours,
        over_mpi,
        over_rpc,
        over_gloo,
        over_ray,
        over_zmq,
        over_pipe,
        floor_shared,
        floor_zmq,
        floor_socket,
        floor_local,
    )
    for contender in module.CONTENDERS
}
