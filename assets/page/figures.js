/** Plots of the last minutes, one point a poll, and the totals above them. */

import { $, element } from "./elements.js";
import { read } from "./server.js";

const HISTORY_S = 900;
const STORED = "figures"; // in sessionStorage: a reload keeps the plots
const RATE_S = 5; // rates are means over this time
const GAP_S = 20; // a longer silence is a gap in the line

const whole = (x) => (x >= 1000 ? `${+(x / 1000).toFixed(x < 10000 ? 1 : 0)}k` : `${Math.round(x)}`);
const percent = (x) => `${+(x * 100).toFixed(x < 0.1 ? 1 : 0)} %`;
const ms = (x) => `${+(x * 1000).toFixed(x < 0.01 ? 1 : 0)} ms`;
const duration = (x) => (x === 0 ? "0" : x < 1 ? ms(x) : `${+x.toFixed(x < 10 ? 2 : 1)} s`);
const COUNTS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000];
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const clockSeconds = new Intl.DateTimeFormat(undefined, { timeStyle: "medium", hourCycle: "h23" });

/** Tokens per second since the statistics `before`, which are some seconds old: tokens are counted when a request ends. */
function rate(stats, before, key) {
  const seconds = before ? stats.uptime_s - before.uptime_s : 0; // 0: the first poll, or after a restart
  return seconds > 0 ? Math.max(0, stats.tokens[key] - before.tokens[key]) / seconds : null;
}

const latency = (title, key, floor) => ({
  title, format: duration, floor,
  lines: [["p50", (s) => s.latency[key].p50], ["p95", (s) => s.latency[key].p95]],
});
const PLOTS = [
  { title: "Output", unit: "tokens/s", format: whole, floor: 10, lines: [["", (s, before) => rate(s, before, "output")]] },
  { title: "Prompts", unit: "tokens/s", format: whole, floor: 10, lines: [["", (s, before) => rate(s, before, "prompt")]] },
  {
    title: "Requests", format: whole, floor: 4, incrs: COUNTS,
    lines: [["running", (s) => s.engine.num_running], ["waiting", (s) => s.requests.waiting]],
  },
  latency("First token", "ttft_s", 0.05),
  latency("Between tokens", "inter_token_s", 0.01),
  latency("Whole answer", "e2e_s", 0.1),
  { title: "KV cache in use", format: percent, top: 1, lines: [["", (s) => s.engine.kv_usage]] },
  {
    title: "Cache hits", format: percent, top: 1,
    lines: [["prompt", (s) => s.prompt_cache.hit_rate], ["prefix", (s) => s.prefix_cache.hit_rate]],
  },
];
const gpuPlots = (gpus) => [
  { title: "GPU use", format: percent, top: 1, lines: gpus.map((g, i) => [`${g.index}`, (s) => s.gpus[i]?.utilization ?? null]) },
  {
    title: "GPU memory", format: percent, top: 1,
    lines: gpus.map((g, i) => [`${g.index}`, (s) => (s.gpus[i] ? s.gpus[i].used_bytes / s.gpus[i].total_bytes : null)]),
  },
];

/** A colour of the style sheet in the current theme, which a canvas can use. */
function colour(name) {
  const probe = $("moment");
  probe.style.color = `var(${name})`;
  const value = getComputedStyle(probe).color;
  probe.style.color = "";
  return value;
}

class Plot {
  constructor(figures, spec) {
    Object.assign(this, { figures, spec, columns: spec.lines.map(() => figures.times.map(() => null)) });
    this.values = spec.lines.map(() => element("b", { textContent: "–" }));
    const legend = spec.lines.map(([label], i) =>
      element("span", { className: "value" }, element("i", { className: `swatch s${i % 8}` }), label ? `${label} ` : "", this.values[i]),
    );
    const title = element("span", { className: "title", textContent: spec.title });
    if (spec.unit) title.append(element("small", { textContent: ` ${spec.unit}` }));
    this.canvas = element("div", { className: "canvas", tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    const className = spec.lines.length > 2 ? "plot many" : "plot";
    this.root = element("figure", { className }, element("figcaption", {}, title, element("span", { className: "values" }, ...legend)), this.canvas);
    $("plots").append(this.root);
    this.chart = new window.uPlot(this.#options(), [figures.times, ...this.columns], this.canvas);
    new ResizeObserver(() => this.#fit()).observe(this.canvas);
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.canvas.addEventListener("blur", () => this.hideCursor());
    for (const name of ["pointerdown", "pointermove"]) this.canvas.addEventListener(name, (event) => this.#touch(event));
    this.canvas.addEventListener("touchend", (event) => event.preventDefault()); // no mouse events, whose end hides the cursor
  }

  #options() {
    const { spec, figures } = this;
    const axis = { stroke: () => figures.colours["--soft"], font: "11px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: () => figures.colours["--line"], width: 1 };
    return {
      width: 200,
      height: 100,
      padding: [8, 18, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, sync: { key: "figures" }, points: { size: 7 } },
      scales: {
        x: { range: () => figures.range },
        y: { range: (_, low, high) => [0, spec.top || Math.max(spec.floor, (high || 0) * 1.15)] },
      },
      axes: [
        { ...axis, grid: { show: false }, size: 20, gap: 3, space: 45, incrs: [60, 120, 180, 300, 600], values: (_, at) => at.map((t) => figures.timeLabel(t)) },
        { ...axis, grid, size: 46, gap: 4, space: 26, ...(spec.incrs ? { incrs: spec.incrs } : {}), values: (_, at) => at.map(spec.format) },
      ],
      series: [
        {},
        ...spec.lines.map((_, i) => ({
          stroke: () => figures.colours[`--s${i % 8}`],
          fill: spec.lines.length === 1 ? () => figures.colours["--fill"] : undefined,
          width: 2,
          dash: i % 2 ? [5, 3] : undefined,
          points: { show: false },
        })),
      ],
      hooks: { setCursor: [() => this.show()] },
    };
  }

  #fit() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (width > 0 && height > 0) this.chart.setSize({ width, height });
  }

  /** Moves the cursor of all plots. */
  #cursorAt(left, top = this.canvas.clientHeight / 3) {
    this.chart.setCursor({ left, top }, true, true);
  }

  hideCursor() {
    this.#cursorAt(-10, -10);
  }

  /** A finger moves the cursor; a mouse is followed by the library itself. */
  #touch(event) {
    if (event.pointerType !== "mouse") this.#cursorAt(event.clientX - this.chart.over.getBoundingClientRect().left);
  }

  /** Arrow keys move the cursor from point to point; with Shift by ten. */
  #key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const { times } = this.figures;
    if (!step || !times.length) return;
    event.preventDefault();
    const from = this.chart.cursor.idx ?? times.length - 1;
    const to = Math.min(times.length - 1, Math.max(0, from + step * (event.shiftKey ? 10 : 1)));
    const left = Math.max(0, this.chart.valToPos(times[to], "x"));
    this.#cursorAt(left);
  }

  draw() {
    this.chart.setData([this.figures.times, ...this.columns]);
    this.show();
  }

  /** The values under the cursor, or the latest. */
  show() {
    const { times } = this.figures;
    const hovered = this.chart?.cursor.idx;
    const at = hovered ?? times.length - 1;
    const texts = this.columns.map((column) => (column[at] == null ? "–" : this.spec.format(column[at])));
    texts.forEach((text, i) => (this.values[i].textContent = text));
    const named = texts.map((text, i) => [this.spec.lines[i][0], text === "–" ? "no value" : `${text} ${this.spec.unit || ""}`].join(" ").trim());
    const when = hovered == null ? "now" : `at ${clockSeconds.format(times[at] * 1000)}`;
    this.canvas.setAttribute("aria-label", `${this.spec.title} ${when}: ${named.join(", ")}`);
    $("moment").textContent = hovered == null ? "" : when;
  }
}

export class Figures {
  constructor() {
    this.times = []; // s since 1970
    this.recent = []; // statistics of the last RATE_S
    this.window = Number($("window").value); // s
    this.restyle();
    this.plots = PLOTS.map((spec) => new Plot(this, spec));
    this.#load();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.restyle());
    document.addEventListener("pointerdown", ({ target }) => {
      if (!target.closest(".canvas")) this.plots[0].hideCursor();
    });
    $("window").addEventListener("change", () => {
      this.window = Number($("window").value);
      this.draw();
    });
  }

  get range() {
    const now = Date.now() / 1000;
    return [now - this.window, now];
  }

  /** A label of the time axis; none at its start, where it would touch the other axis. */
  timeLabel(time) {
    return time - this.range[0] < this.window * 0.08 ? "" : clock.format(time * 1000);
  }

  restyle() {
    const names = ["--soft", "--line", "--fill", ...Array.from({ length: 8 }, (_, i) => `--s${i}`)];
    this.colours = Object.fromEntries(names.map((name) => [name, colour(name)]));
    for (const plot of this.plots || []) plot.chart.redraw();
  }

  add(stats) {
    if (stats.gpus.length && this.plots.length === PLOTS.length) this.#withGpus(stats.gpus);
    const now = Date.now() / 1000;
    if (this.times.length && now - this.times.at(-1) > GAP_S) this.#push(now - 1, () => null);
    const age = (old) => stats.uptime_s - old.uptime_s; // negative after a restart of the server
    this.recent = this.recent.filter((old) => age(old) > 0 && age(old) <= RATE_S + 0.5);
    this.#push(now, (value) => value(stats, this.recent[0]));
    this.recent.push(stats);
    this.#totals(stats);
    this.#gpuTable(stats.gpus);
    this.draw();
  }

  draw() {
    if (document.hidden) return;
    for (const plot of this.plots) plot.draw();
  }

  /** Keeps the points for the page's next load in this tab. */
  save() {
    const columns = this.plots.slice(0, PLOTS.length).map((plot) => plot.columns);
    try {
      sessionStorage.setItem(STORED, JSON.stringify({ times: this.times, columns }));
    } catch {
      // storage is blocked or full: the plots start anew
    }
  }

  #load() {
    const { times = [], columns = [] } = JSON.parse(read(sessionStorage, STORED) || "{}");
    const fits = this.plots.every((plot, i) => plot.columns.length === columns[i]?.length);
    if (!fits || columns.flat().some((column) => column.length !== times.length)) return;
    this.times = times;
    this.plots.forEach((plot, i) => (plot.columns = columns[i]));
  }

  #push(time, value) {
    const old = this.times.findIndex((t) => t > time - HISTORY_S);
    for (const column of [this.times, ...this.plots.flatMap((plot) => plot.columns)]) column.splice(0, Math.max(0, old));
    this.times.push(time);
    for (const plot of this.plots) plot.columns.forEach((column, i) => column.push(value(plot.spec.lines[i][1]) ?? null));
  }

  #withGpus(gpus) {
    this.plots.push(...gpuPlots(gpus).map((spec) => new Plot(this, spec)));
  }

  #totals({ requests, uptime_s: uptime }) {
    const up = uptime < 120 ? `${Math.floor(uptime)} s` : uptime < 7200 ? `${Math.floor(uptime / 60)} min` : `${Math.floor(uptime / 3600)} h`;
    const totals = [["Answered", requests.ok], ["Failed", requests.failed], ["Cancelled", requests.cancelled], ["Rejected", requests.rejected], ["Up", up]];
    $("totals").replaceChildren(
      ...totals.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))),
    );
  }

  #gpuTable(gpus) {
    $("gpus").hidden = !gpus.length;
    const gb = (bytes) => (bytes / 1e9).toFixed(1);
    const cells = (gpu) => [
      `${gpu.index} ${gpu.name}`,
      `${gb(gpu.used_bytes)} / ${gb(gpu.total_bytes)} GB`,
      gpu.utilization === null ? "–" : percent(gpu.utilization),
      gpu.temperature_c === null ? "–" : `${gpu.temperature_c} °C`,
    ];
    $("gpus").tBodies[0].replaceChildren(
      ...gpus.map((gpu) => element("tr", {}, ...cells(gpu).map((textContent) => element("td", { textContent })))),
    );
  }
}
