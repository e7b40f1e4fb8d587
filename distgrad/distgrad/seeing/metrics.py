"""A broker's numbers in the text format of Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

STATES = ("live", "silent", "left")


class Metric(NamedTuple):
    """One metric: its name without the prefix ``distgrad_``, its kind, and where its number is found."""

    name: str
    kind: str
    help: str
    key: str


_BROKER = (
    Metric("parameter_version", "gauge", "Version of the parameters: how many updates they have had.", "version"),
    Metric("running", "gauge", "1 while gradients are applied, 0 between stop and start.", "running"),
    Metric("parameter_bytes", "gauge", "Size of the parameters.", "parameter_bytes"),
    Metric("queued_gradients", "gauge", "Gradients that are accepted and not decided on.", "queued"),
    Metric("held_gradients", "gauge", "Gradients that the policy holds for a step.", "held"),
    Metric("queued_bytes", "gauge", "What gradients that are not settled take.", "queued_bytes"),
    Metric("queue_limit_bytes", "gauge", "The most that they may take (--queue-bytes).", "queue_bytes"),
    Metric("granted_bytes", "gauge", "What the workers may have on their way.", "granted_bytes"),
    Metric("lost_gradients", "gauge", "Accepted and not to be found any more; not 0 is a bug.", "lost"),
    Metric("received_bytes_total", "counter", "Accepted gradients since this broker began.", "received_bytes"),
    Metric("waiting_pulls", "gauge", "Pulls that wait for news or for a turn.", "waiting_pulls"),
)
_BROKER_BY_REASON = (
    Metric("refused_total", "counter", "Gradients that were refused, by reason.", "refused"),
    Metric("dropped_total", "counter", "Gradients dropped as if they had never come, by reason.", "dropped"),
    Metric("rejected_messages_total", "counter", "Messages that were no valid request, by reason.", "rejected"),
)
_DISK = (
    Metric("unsettled_gradients", "gauge", "Gradients that are decided on and wait for the disk.", "unsettled"),
    Metric("journal_bytes", "gauge", "Journal since the last checkpoint.", "journal_bytes"),
    Metric("checkpoint_version", "gauge", "Version of the last checkpoint.", "checkpoint_version"),
    Metric("checkpoint_age_seconds", "gauge", "Time since the last checkpoint.", "checkpoint_age_s"),
)
_WORKER = (
    Metric("worker_accepted_total", "counter", "Gradients accepted.", "accepted"),
    Metric("worker_settled_total", "counter", "Gradients settled, whatever became of them.", "settled"),
    Metric("worker_applied_total", "counter", "Gradients applied.", "applied"),
    Metric("worker_superseded_total", "counter", "Gradients that came too late to count.", "superseded"),
    Metric("worker_refused_total", "counter", "Gradients refused.", "refused"),
    Metric("worker_repeated_total", "counter", "Gradients sent again that were accepted before.", "repeated"),
    Metric("worker_received_bytes_total", "counter", "Bytes of accepted gradients.", "received_bytes"),
    Metric("worker_examples_total", "counter", "Examples behind the applied gradients.", "examples"),
    Metric("worker_loss", "gauge", "The last loss that it told.", "loss"),
    Metric("worker_staleness", "gauge", "How many updates old its last gradient was.", "staleness"),
    Metric("worker_last_seen_seconds", "gauge", "Time since its last sign of life.", "last_seen_s"),
)
# Composed differently, one by one.
_OTHERS = (
    Metric("up", "gauge", "1 if the broker answered.", ""),
    Metric("info", "gauge", "Always 1; the labels tell what runs.", ""),
    Metric("workers", "gauge", "Workers by state.", ""),
    Metric("gradients_total", "counter", "Gradients by what became of them.", ""),
    Metric("staleness", "histogram", "How many updates old gradients were when their turn came.", ""),
    Metric("disk_trouble", "gauge", "1 while the disk does not take what is to be settled.", ""),
    Metric("hooks_total", "counter", "Calls of the user's hooks, those that failed, and what was dropped.", ""),
    Metric("worker_live", "gauge", "1 while its lease runs.", ""),
)
ALL = (*_OTHERS, *_BROKER, *_BROKER_BY_REASON, *_DISK, *_WORKER)

Sample = tuple[str, Mapping[str, object], float]


def render(status: Mapping[str, Any] | None, workers: Sequence[Mapping[str, Any]] = ()) -> str:
    """Write the metrics of one look.

    Parameters
    ----------
    status : mapping or None
        As `distgrad.Admin.status` gives it; None if the broker did not answer.
    workers : sequence of mapping
        As `distgrad.Admin.workers` gives them.

    Returns
    -------
    str
        In the text format; only ``distgrad_up`` without an answer.
    """
    blocks = {metric.name: metric for metric in ALL}
    told: dict[str, list[Sample]] = {"up": [("", {}, 0 if status is None else 1)]}
    if status is not None:
        told |= _broker(status) | _workers(workers)
    lines: list[str] = []
    for name, samples in told.items():
        if not samples:
            continue
        metric = blocks[name]
        # The type line of a counter has the suffix too: that is how this format, unlike OpenMetrics, names it.
        lines += [f"# HELP distgrad_{name} {metric.help}", f"# TYPE distgrad_{name} {metric.kind}"]
        lines += [f"distgrad_{name}{suffix}{_labels(labels)} {_number(value)}" for suffix, labels, value in samples]
    return "\n".join(lines) + "\n"


def _broker(status: Mapping[str, Any]) -> dict[str, list[Sample]]:
    optimizer = status.get("optimizer")
    told: dict[str, list[Sample]] = {
        "info": [
            (
                "",
                {
                    "version": status["distgrad"],
                    "incarnation": status["incarnation"],
                    "policy": status["policy"]["policy"],
                    "mode": status["mode"],
                    "optimizer": optimizer["name"] if optimizer else "none",
                },
                1,
            )
        ],
        "gradients_total": [
            ("", {"outcome": outcome}, status[outcome]) for outcome in ("applied", "superseded", "cleared")
        ]
        + [("", {"outcome": "refused"}, sum(status["refused"].values()))],
        "staleness": list(_histogram(status["staleness"], status["staleness_sum"])),
    }
    told |= {metric.name: _plain(metric, status) for metric in _BROKER}
    told |= {
        metric.name: [("", {"reason": reason}, count) for reason, count in sorted(status[metric.key].items())]
        for metric in _BROKER_BY_REASON
    }
    hooks = status.get("hooks") or {}
    told["hooks_total"] = [("", {"outcome": outcome}, count) for outcome, count in hooks.items()]
    disk = status.get("disk")
    if disk is not None:
        told["disk_trouble"] = [("", {}, disk["trouble"] is not None)]
        told |= {metric.name: _plain(metric, disk) for metric in _DISK}
    return told


def _histogram(classes: Sequence[int], total: int) -> Iterator[Sample]:
    """Add up classes 0, 1, 2-3, 4-7, … into buckets "up to"."""
    count = 0
    for bits, n in enumerate(classes):
        count += n
        yield "_bucket", {"le": str(2**bits - 1)}, count
    yield "_bucket", {"le": "+Inf"}, count
    yield "_sum", {}, total
    yield "_count", {}, count


def _workers(workers: Sequence[Mapping[str, Any]]) -> dict[str, list[Sample]]:
    states = [worker["state"] for worker in workers]
    told: dict[str, list[Sample]] = {
        "workers": [("", {"state": state}, states.count(state)) for state in STATES],
        "worker_live": [("", {"worker": worker["id"]}, worker["state"] == "live") for worker in workers],
    }
    for metric in _WORKER:
        told[metric.name] = [
            ("", {"worker": worker["id"]}, worker[metric.key]) for worker in workers if worker[metric.key] is not None
        ]
    return told


def _plain(metric: Metric, values: Mapping[str, Any]) -> list[Sample]:
    value = values[metric.key]
    return [] if value is None else [("", {}, value)]


def _labels(labels: Mapping[str, object]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items()) + "}" if labels else ""


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: int | float) -> str:
    if type(value) is float:
        return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(repr(value), repr(value))
    return str(int(value))


def names() -> Iterable[str]:
    """Name every series that `render` may write.

    Returns
    -------
    iterable of str
        With prefix, and with the suffixes of a histogram.
    """
    for metric in ALL:
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        yield from (f"distgrad_{metric.name}{suffix}" for suffix in suffixes)
