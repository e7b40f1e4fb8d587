// The page of `distgrad dashboard`: reads the stream of looks, shows them, and sends commands.

import { Histogram, LineChart, ago, short } from "./charts.js";

const MAX_POINTS = 600;
const AGAIN_AFTER_MS = 1000;
const $ = (id) => document.getElementById(id);

// What is behind # is never sent to a server. It leaves the address bar, and stays with this tab.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
}
const token = sessionStorage.getItem("token") ?? "";
const headers = { Authorization: `Bearer ${token}` };

const charts = {
  loss: new LineChart($("chart-loss"), "Loss"),
  rate: new LineChart($("chart-rate"), "Gradients per second"),
  queued: new LineChart($("chart-queued"), "Gradients in the queue"),
};
const staleness = new Histogram($("chart-staleness"));
let points = [];
let mayControl = false;
let workers = [];

function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024) return unit === "B" ? `${n} B` : `${n.toFixed(1)} ${unit}`;
    n /= 1024;
  }
  return `${n.toFixed(1)} TiB`;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// The numbers on top

const tiles = new Map();

function tile(name, value, kind = "", isWide = false) {
  if (!tiles.has(name)) {
    const box = document.createElement("div");
    const term = document.createElement("dt");
    const told = document.createElement("dd");
    term.textContent = name;
    if (isWide) box.className = "wide";
    box.append(term, told);
    $("numbers").append(box);
    tiles.set(name, told);
  }
  const told = tiles.get(name);
  setText(told, value);
  told.className = kind;
}

function policy(status) {
  const { policy: name, ...settings } = status.policy;
  const told = Object.entries(settings).filter(([, value]) => value !== null && value !== false);
  const rule = status.optimizer ? `${status.optimizer.name} lr=${short(status.optimizer.lr)}` : "p − g";
  return `${name} (${told.map(([key, value]) => `${key}=${value}`).join(", ")}), rule ${rule}`;
}

function disk(told) {
  if (!told) return ["no data folder", ""];
  if (told.trouble) return [`▲ trouble: ${told.trouble}`, "bad"];
  const last = told.checkpoint
    ? `checkpoint of version ${short(told.checkpoint_version)}, ${ago(told.checkpoint_age_s)} ago`
    : "no checkpoint yet";
  return [`${last}, journal ${bytes(told.journal_bytes)}, ${short(told.unsettled)} waiting`, ""];
}

function showNumbers(status) {
  const sum = (key) => workers.reduce((total, worker) => total + worker[key], 0);
  const refused = Object.values(status.refused).reduce((total, n) => total + n, 0);
  const last = points[points.length - 1];
  tile("Version", short(status.version));
  tile("Rate per second", short(last ? last.rate : null));
  tile("Loss", short(last ? last.loss : null));
  tile("Workers live", `${status.workers_live} of ${status.workers}`, status.workers_live < status.workers ? "warn" : "");
  tile("Queue", `${short(status.queued)} · ${bytes(status.queued_bytes)}`);
  tile("Received", bytes(status.received_bytes));
  tile("Accepted", short(sum("accepted")));
  tile("Settled", short(sum("settled")));
  tile("Repeated", short(sum("repeated")));
  tile("Refused", short(refused), refused ? "warn" : "");
  tile("Lost", status.lost ? `▲ ${status.lost}` : "0", status.lost ? "bad" : "good");
  tile("Held for a step", short(status.held));
  tile("Policy", policy(status), "", true);
  tile("Disk", ...disk(status.disk), true);
}

// The workers

const STATES = { live: "● live", silent: "▲ lost", left: "○ left" };
const KINDS = { live: "good", silent: "bad", left: "" };
const COLUMNS = [
  ["id", "Worker", (worker) => worker.id],
  ["state", "State", (worker) => STATES[worker.state] ?? `? ${worker.state}`],
  ["rate", "Rate/s", (worker) => short(worker.rate)],
  ["staleness", "Staleness", (worker) => short(worker.staleness)],
  ["loss", "Last loss", (worker) => short(worker.loss)],
  ["last_seen_s", "Last seen", (worker) => ago(worker.last_seen_s)],
  ["received_bytes", "Bytes", (worker) => bytes(worker.received_bytes)],
  ["accepted", "Accepted", (worker) => short(worker.accepted)],
  ["settled", "Settled", (worker) => short(worker.settled)],
  ["repeated", "Repeated", (worker) => short(worker.repeated)],
  ["refused", "Refused", (worker) => short(worker.refused)],
];
const order = { key: "id", sign: 1 };
const rows = new Map();
const names = new Intl.Collator("en", { numeric: true });

function makeHead() {
  for (const [key, title] of COLUMNS) {
    const head = document.createElement("th");
    const button = document.createElement("button");
    head.scope = "col";
    button.type = "button";
    button.addEventListener("click", () => {
      order.sign = order.key === key ? -order.sign : 1;
      order.key = key;
      showWorkers();
    });
    head.dataset.key = key;
    head.dataset.title = title;
    head.append(button);
    $("columns").append(head);
  }
  if (mayControl) {
    const head = document.createElement("td");
    $("columns").append(head);
  }
}

function makeRow(worker) {
  const row = document.createElement("tr");
  COLUMNS.forEach((_, i) => {
    const cell = document.createElement(i ? "td" : "th");
    if (!i) cell.scope = "row";
    row.append(cell);
  });
  if (mayControl) {
    const cell = document.createElement("td");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Evict";
    button.setAttribute("aria-label", `Evict ${worker.id}`);
    button.addEventListener("click", () => askToEvict(worker.id));
    cell.append(button);
    row.append(cell);
  }
  return row;
}

function compare(one, other) {
  const [a, b] = [one[order.key], other[order.key]];
  const isText = typeof a === "string" || typeof b === "string";
  const by = isText ? names.compare(String(a), String(b)) : (a ?? -Infinity) - (b ?? -Infinity);
  return order.sign * by || names.compare(one.id, other.id);
}

// Rows and buttons stay the same elements from look to look, so that a focus stays where it is.
function showWorkers() {
  for (const head of $("columns").querySelectorAll("th")) {
    const isOurs = head.dataset.key === order.key;
    if (isOurs) head.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
    setText(head.firstChild, head.dataset.title + (isOurs ? (order.sign > 0 ? " ▲" : " ▼") : ""));
  }
  const sorted = [...workers].sort(compare);
  const gone = new Set(rows.keys());
  sorted.forEach((worker, i) => {
    gone.delete(worker.id);
    if (!rows.has(worker.id)) rows.set(worker.id, makeRow(worker));
    const row = rows.get(worker.id);
    COLUMNS.forEach(([, , text], column) => setText(row.children[column], text(worker)));
    row.children[1].className = KINDS[worker.state] ?? "";
    if (mayControl) row.lastChild.firstChild.disabled = worker.state === "left";
    if ($("rows").children[i] !== row) $("rows").insertBefore(row, $("rows").children[i] ?? null);
  });
  for (const id of gone) {
    rows.get(id).remove();
    rows.delete(id);
  }
  $("no-workers").hidden = workers.length > 0;
}

// What the stream tells

function tellState(text, kind) {
  setText($("state"), text);
  $("state").className = `state ${kind}`;
}

function tellTrouble(text) {
  $("trouble").hidden = !text;
  setText($("trouble"), text ?? "");
}

function drawCharts() {
  for (const [name, chart] of Object.entries(charts)) chart.draw(points.map((point) => [point.at, point[name]]));
}

function begin({ address, may, points: told }) {
  const isFirst = !$("columns").children.length;
  setText($("address"), address);
  document.title = `distgrad ${address}`;
  mayControl = may === "control";
  $("controls").hidden = !mayControl;
  points = told;
  if (isFirst) makeHead();
}

function show({ error, status, workers: told, point }) {
  if (point && (!points.length || point.at > points[points.length - 1].at)) {
    points.push(point);
    if (points.length > MAX_POINTS) points.shift();
  }
  tellTrouble(error ? `▲ The broker does not answer: ${error}` : null);
  if (error) tellState("▲ no answer", "bad");
  if (!("version" in status)) return;
  if (!error) tellState(status.running ? "● running" : "■ stopped", status.running ? "good" : "warn");
  workers = told;
  showNumbers(status);
  drawCharts();
  staleness.draw(status.staleness);
  showWorkers();
}

async function listen() {
  const answer = await fetch("api/events", { headers, cache: "no-store" });
  if (!answer.ok) {
    tellState("▲ refused", "bad");
    tellTrouble(`▲ ${(await answer.json()).error}`);
    return false;
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return true;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const [, name, data] = /^event: (\w+)\ndata: (.*)$/.exec(event);
      (name === "history" ? begin : show)(JSON.parse(data));
    }
  }
}

async function keepListening() {
  for (;;) {
    try {
      if (!(await listen())) return;
    } catch (error) {
      console.info(error);
    }
    tellState("▲ disconnected", "bad");
    tellTrouble("▲ The dashboard itself does not answer; trying again.");
    await new Promise((resume) => setTimeout(resume, AGAIN_AFTER_MS));
  }
}

// Commands

async function command(name, body = {}) {
  setText($("said"), "…");
  try {
    const answer = await fetch(`api/${name}`, {
      method: "POST",
      headers: { ...headers, "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    const { said, error } = await answer.json();
    setText($("said"), error ? `▲ ${error}` : said);
  } catch (error) {
    setText($("said"), `▲ ${error}`);
  }
}

function askToEvict(worker) {
  setText($("confirm-worker"), worker);
  $("confirm-yes").onclick = () => {
    $("confirm").close();
    command("evict", { worker });
  };
  $("confirm").showModal();
}

$("confirm-no").addEventListener("click", () => $("confirm").close());
for (const button of document.querySelectorAll("[data-command]")) {
  button.addEventListener("click", () => command(button.dataset.command));
}
keepListening();
