"""The metrics of a real broker, read by Prometheus's own parser."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from distgrad import addresses
from distgrad.seeing import metrics
from distgrad.seeing.commands import metrics as command
from distgrad.seeing.metrics_server import MetricsServer
from distgrad.seeing.watcher import Watcher
from distgrad_broker import Broker
from distgrad_worker import Worker

parser = pytest.importorskip("prometheus_client.parser", reason="needs the extra `test`: prometheus-client")
DASHBOARD = Path(__file__).resolve().parents[3] / "deploy" / "grafana-dashboard.json"


def read(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Parse, and give every sample by name and labels."""
    families = list(parser.text_string_to_metric_families(text))
    assert all(family.type != "unknown" and family.documentation for family in families)
    samples = [
        (sample.name, tuple(sorted(sample.labels.items())), sample.value) for f in families for sample in f.samples
    ]
    assert len({(name, labels) for name, labels, _ in samples}) == len(samples), "no series is there twice"
    return {(name, labels): value for name, labels, value in samples}


def pushed(broker: Broker, worker: str, *gradients: Any, **keys: Any) -> None:
    with Worker(broker.address, worker_id=worker) as pushing:
        pushing.pull()
        for gradient in gradients:
            pushing.push({"w": np.asarray(gradient, np.float32)}, **keys)
        pushing.flush(30)


def test_what_the_broker_tells_is_what_prometheus_reads() -> None:
    with Broker(parameters={"w": np.zeros(2, np.float32)}) as broker, Watcher(broker.address) as watcher:
        pushed(broker, "a", [1, 1], [1, 1], [1, 1], loss=0.5, examples=4)
        pushed(broker, 'odd "name\\', [1, 1])
        sight = watcher.look()
        samples = read(metrics.render(sight.status, sight.workers))

    assert samples["distgrad_up", ()] == 1
    assert samples["distgrad_parameter_version", ()] == 4
    assert samples["distgrad_lost_gradients", ()] == 0
    assert samples["distgrad_gradients_total", (("outcome", "applied"),)] == 4
    assert samples["distgrad_workers", (("state", "left"),)] == 2
    assert samples["distgrad_worker_settled_total", (("worker", "a"),)] == 3
    assert samples["distgrad_worker_settled_total", (("worker", 'odd "name\\'),)] == 1
    assert samples["distgrad_worker_loss", (("worker", "a"),)] == 0.5
    assert ("distgrad_worker_loss", (("worker", 'odd "name\\'),)) not in samples
    assert samples["distgrad_staleness_count", ()] == 4
    assert samples["distgrad_staleness_sum", ()] == 3  # three gradients of one pull: 0, 1, 2 updates old
    assert samples["distgrad_staleness_bucket", (("le", "1"),)] == 3
    assert {name for name, _ in samples} <= set(metrics.names())


def test_what_is_no_number_is_written_as_prometheus_has_it() -> None:
    text = metrics.render(None)

    assert read(text) == {("distgrad_up", ()): 0}
    assert [metrics._number(value) for value in (float("nan"), float("inf"), -float("inf"), 1.5, True, 2**62)] == [
        "NaN", "+Inf", "-Inf", "1.5", "1", str(2**62)
    ]  # fmt: skip


def test_the_exporter_answers_scrapes_and_tells_that_the_broker_is_gone() -> None:
    broker = Broker(parameters={"w": np.zeros(2)})
    broker.start()
    with (
        Watcher(broker.address, timeout=0.5) as watcher,
        MetricsServer(watcher, addresses.parse("127.0.0.1:0", 0)) as server,
    ):
        thread = Thread(target=server.serve_forever, name="exporter")
        thread.start()
        try:
            with urllib.request.urlopen(server.url, timeout=30) as answer:
                assert answer.headers["Content-Type"] == metrics.CONTENT_TYPE
                assert read(answer.read().decode())["distgrad_up", ()] == 1
            with pytest.raises(urllib.error.HTTPError, match="404") as missing:
                urllib.request.urlopen(server.url + "/other", timeout=30)
            missing.value.close()
            broker.close()
            with urllib.request.urlopen(server.url, timeout=30) as answer:
                assert read(answer.read().decode()) == {("distgrad_up", ()): 0}
        finally:
            server.shutdown()
            thread.join()


def test_the_command_prints_the_metrics_once() -> None:
    with Broker(parameters={"w": np.zeros(2)}) as broker:
        result = CliRunner().invoke(command, [broker.address, "--once"])

    assert result.exit_code == 0, result.output
    assert read(result.stdout)["distgrad_running", ()] == 1


def test_grafanas_dashboard_shows_only_metrics_that_exist() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", ())]

    used = {name for expression in expressions for name in re.findall(r"distgrad_\w+", expression)}
    assert len(expressions) >= 8
    assert used <= set(metrics.names())
    assert used >= {"distgrad_worker_loss", "distgrad_staleness_bucket", "distgrad_lost_gradients"}


def test_every_metric_is_documented() -> None:
    page = (DASHBOARD.parents[1] / "docs" / "seeing.md").read_text()

    assert [name for metric in metrics.ALL if (name := f"distgrad_{metric.name}") not in page] == []
