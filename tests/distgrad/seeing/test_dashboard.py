"""The dashboard over HTTP: what it streams, who may command it, and what it never does."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `dashboard`: starlette and uvicorn")
pytest.importorskip("uvicorn", reason="needs the extra `dashboard`: starlette and uvicorn")

from distgrad.admin import Admin
from distgrad.errors import Fenced
from distgrad.seeing.dashboard import Tokens, is_own_name
from distgrad.seeing.dashboard_server import DashboardServer
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.served_dashboard import ask, events, served

PAGE = ("/", "/dashboard.css", "/dashboard.js", "/charts.js", "/icon.svg")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    save = tmp_path_factory.mktemp("saved") / "model.npz"
    with Broker(parameters={"w": np.zeros(2, np.float32)}, save=save) as running, Admin(running.address) as admin:
        admin.save()  # the thread that writes files begins with the first save
        yield running


@pytest.fixture
def server(broker: Broker) -> Iterator[DashboardServer]:
    with served(broker.address) as running:
        yield running


def bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_the_stream_tells_of_workers_as_they_come_and_learn(server: DashboardServer, broker: Broker) -> None:
    with events(server, server.tokens.watch) as told, Worker(broker.address, worker_id="a") as worker:
        name, history = next(told)
        assert (name, history["may"]) == ("history", "watch")
        worker.pull()
        worker.push({"w": np.ones(2, np.float32)}, loss=0.5)
        worker.push({"w": np.ones(2, np.float32)}, loss=float("nan"))
        worker.flush(30)

        for _, look in told:
            rows = {row["id"]: row for row in look["workers"]}
            if "a" in rows and rows["a"]["settled"] == 2 and look["point"]["rate"] is not None:
                break

        assert (rows["a"]["state"], rows["a"]["loss"]) == ("live", "nan")
        assert look["status"]["lost"] == 0
        assert look["error"] is None


def test_who_comes_later_is_given_the_history(server: DashboardServer) -> None:
    with events(server, server.tokens.watch) as told:
        next(told)
        for _, look in told:
            if look["point"]:
                break
    with events(server, server.tokens.watch) as told:
        _, history = next(told)

    assert history["points"]
    assert history["points"][0].keys() == {"at", "rate", "loss", "queued", "version"}


def test_the_link_that_controls_stops_starts_saves_and_evicts(server: DashboardServer, broker: Broker) -> None:
    control = bearer(server.tokens.control)
    with contextlib.suppress(Fenced), Worker(broker.address, worker_id="victim") as worker:
        worker.pull()

        assert ask(server, "POST", "/api/stop", **control).told == {"said": "stopped"}
        assert ask(server, "POST", "/api/start", **control).told == {"said": "started"}
        assert Path(ask(server, "POST", "/api/save", **control).told["said"].removeprefix("saved to ")).exists()
        assert ask(server, "POST", "/api/evict", {"worker": "victim"}, **control).told == {"said": "evicted victim"}
    refused = ask(server, "POST", "/api/evict", {"worker": "nobody"}, **control)
    assert (refused.status, "no worker 'nobody'" in refused.told["error"]) == (409, True)


@pytest.mark.parametrize("command", ["start", "stop", "save", "evict"])
def test_nothing_is_commanded_without_the_token_that_controls(server: DashboardServer, command: str) -> None:
    path = f"/api/{command}"

    assert ask(server, "POST", path).status == 401
    assert ask(server, "POST", path, **bearer("wrong")).status == 401
    assert ask(server, "POST", path, **bearer("")).status == 401
    assert ask(server, "POST", path, **bearer(server.tokens.watch)).status == 403
    assert ask(server, "GET", path, **bearer(server.tokens.control)).status == 405


def test_without_controls_no_token_controls(broker: Broker) -> None:
    with served(broker.address, controls=False) as server:
        assert server.tokens.control is None
        for token in ("", "None", server.tokens.watch):
            assert ask(server, "POST", "/api/stop", **bearer(token)).status in (401, 403)


def test_nothing_is_told_without_a_token(server: DashboardServer) -> None:
    assert ask(server, "GET", "/api/events").status == 401
    assert ask(server, "GET", f"/api/events?token={server.tokens.watch}").status == 401


def test_a_foreign_name_that_leads_here_is_not_answered(server: DashboardServer) -> None:
    control = bearer(server.tokens.control)

    for path in PAGE:
        assert ask(server, "GET", path, Host="evil.example").status == 421
    assert ask(server, "POST", "/api/stop", Host="evil.example", **control).status == 421
    assert ask(server, "GET", "/", Host=f"localhost:{server.address.port}").status == 200


def test_another_site_cannot_command(server: DashboardServer) -> None:
    """Browsers say where a request comes from; and they send no Authorization that the page does not set."""
    control = bearer(server.tokens.control)

    assert ask(server, "POST", "/api/stop", Sec_Fetch_Site="cross-site", **control).status == 403
    preflight = ask(server, "OPTIONS", "/api/stop", Origin="http://evil.example", Access_Control_Request_Method="POST")
    assert preflight.status == 405
    for answer in (preflight, ask(server, "GET", "/", Origin="http://evil.example")):
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("path", [*PAGE, "/api/events", "/nowhere", "/../commands.py"])
def test_every_answer_forbids_what_is_not_ours(server: DashboardServer, path: str) -> None:
    answer = ask(server, "GET", path)

    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.status == (200 if path in PAGE else 401 if path.startswith("/api") else 404)


@pytest.mark.parametrize("name", [path.lstrip("/") or "index.html" for path in PAGE])
def test_the_page_names_no_other_host_and_has_no_inline_code(name: str) -> None:
    text = files("distgrad.seeing").joinpath("static", name).read_text()

    assert re.findall(r"(?:https?:)?//[\w.]+", text.replace("http://www.w3.org/2000/svg", "")) == []
    assert not re.search(r"<script>|\sstyle=|\son\w+=|innerHTML|eval\(", text)


def test_bodies_are_bounded_and_must_be_objects(server: DashboardServer) -> None:
    control = bearer(server.tokens.control)

    assert ask(server, "POST", "/api/evict", {"worker": "x" * 5000}, **control).status == 400
    assert ask(server, "POST", "/api/evict", [1], **control).status == 400
    assert ask(server, "POST", "/api/fly", {}, **control).status == 404


@pytest.mark.parametrize(
    ("header", "is_own"),
    [
        ("127.0.0.1:8420", True),
        ("[::1]:8420", True),
        ("[::1]", True),
        ("localhost", True),
        ("192.168.1.5:8420", True),  # no name, so nobody can resolve it to something else
        ("boss:8420", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8420", False),
        ("", False),
        ("[evil]", False),
    ],
)
def test_only_names_that_nobody_else_can_own_are_ours(header: str, is_own: bool) -> None:
    assert is_own_name(header, "boss") is is_own


def test_tokens_are_told_apart_and_never_printed() -> None:
    tokens = Tokens()

    assert tokens.allows(f"Bearer {tokens.control}") == "control"
    assert tokens.allows(f"Bearer {tokens.watch}") == "watch"
    assert [tokens.allows(header) for header in (None, "", "Bearer ", "Bearer x", "Bearer ü")] == [None] * 5
    assert Tokens(control=None).allows("Bearer ") is None
    assert tokens.watch not in repr(tokens)
    assert len({Tokens().watch, Tokens().watch, tokens.watch}) == 3


def test_the_page_says_when_the_broker_is_gone() -> None:
    gone = Broker(parameters={"w": np.zeros(2)})
    gone.start()
    with served(gone.address) as server, events(server, server.tokens.watch) as told:
        looks: list[Any] = []
        for _, look in told:
            looks.append(look)
            if look.get("point"):
                break
        with Admin(gone.address) as admin:
            admin.destroy()
        for _, look in told:
            if look["error"]:
                break

        assert look["status"]["version"] == 0, "what was last known stays"
    gone.close()
