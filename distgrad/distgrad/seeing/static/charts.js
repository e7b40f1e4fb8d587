// Two kinds of charts, drawn as SVG and as boxes; what they show is also told in words.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600, HEIGHT = 200, ROOM = 0.06;

function add(parent, name, className, namespace) {
  const element = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
  if (className) element.setAttribute("class", className);
  parent.append(element);
  return element;
}

// A number in at most four digits that matter.
export function short(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (Number.isInteger(value) || Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

export function ago(seconds) {
  return seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

// A line over time; `points` are [seconds, number], oldest first.
export class LineChart {
  constructor(figure, name) {
    this.name = name;
    this.now = add(figure.querySelector("figcaption"), "output");
    this.now.setAttribute("aria-live", "off");
    const plot = add(figure, "div", "plot");
    this.svg = add(plot, "svg", "", SVG);
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.area = add(this.svg, "path", "area", SVG);
    this.line = add(this.svg, "path", "line", SVG);
    this.high = add(plot, "span", "high");
    this.low = add(plot, "span", "low");
    const times = add(figure, "p", "times");
    this.from = add(times, "span");
    add(times, "span").textContent = "now";
    this.draw([]);
  }

  draw(points) {
    const known = points.filter(([, value]) => typeof value === "number");
    if (!known.length) {
      this.now.textContent = "–";
      this.svg.setAttribute("aria-label", `${this.name}: nothing yet`);
      return;
    }
    const values = known.map(([, value]) => value);
    const top = Math.max(...values), bottom = Math.min(0, ...values);
    const begin = known[0][0], end = known[known.length - 1][0];
    const span = Math.max(end - begin, 1), height = (top - bottom || 1) * (1 + ROOM);
    const x = (at) => (end === begin ? WIDTH : ((at - begin) / span) * WIDTH).toFixed(1);
    const y = (value) => (HEIGHT - ((value - bottom) / height) * HEIGHT).toFixed(1);
    const path = known.map(([at, value], i) => `${i ? "L" : "M"}${x(at)} ${y(value)}`).join("");
    this.line.setAttribute("d", path);
    this.area.setAttribute("d", `${path}L${x(end)} ${HEIGHT}L${x(begin)} ${HEIGHT}Z`);
    const last = short(values[values.length - 1]);
    this.now.textContent = last;
    this.high.textContent = top > bottom ? short(top) : "";
    this.low.textContent = short(bottom);
    this.from.textContent = `${ago(end - begin)} ago`;
    this.svg.setAttribute(
      "aria-label",
      `${this.name}: now ${last}, at first ${short(values[0])}, between ${short(Math.min(...values))} and ${short(top)} ` +
        `in the last ${ago(end - begin)}`,
    );
  }
}

// How many gradients were 0, 1, 2 to 3, 4 to 7, … updates old.
export class Histogram {
  constructor(figure) {
    this.list = add(figure, "ol", "bars");
    this.bars = [];
  }

  draw(classes) {
    const most = Math.max(1, ...classes);
    while (this.bars.length < classes.length) {
      const item = add(this.list, "li");
      const stand = add(item, "span", "stand");
      const count = add(stand, "span");
      const bar = add(stand, "span", "bar");
      const label = add(item, "span");
      this.bars.push({ item, bar, count, label });
    }
    while (this.bars.length > Math.max(1, classes.length)) this.bars.pop().item.remove();
    classes.forEach((count, bits) => {
      const { bar, count: told, label } = this.bars[bits];
      bar.style.height = `${(count / most) * 80}%`;
      told.textContent = short(count);
      label.textContent = bits < 2 ? String(bits) : `${2 ** (bits - 1)}–${2 ** bits - 1}`;
    });
  }
}
