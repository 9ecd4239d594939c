"use strict";
/* Curves (uPlot) and histograms (SVG). All text goes in as text nodes. */

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child != null));
  return node;
}

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function short(value) {
  if (value == null || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0*e/, "e");
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return String(+value.toPrecision(4));
}

function duration(seconds) {
  if (seconds < 0) return "-" + duration(-seconds);
  if (seconds < 120) return +seconds.toFixed(seconds < 10 ? 2 : 1) + " s";
  if (seconds < 7200) return +(seconds / 60).toFixed(1) + " min";
  return +(seconds / 3600).toFixed(2) + " h";
}

const Charts = (() => {
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [4, 2], [1, 2]];
  const state = { runs: [], shown: new Set(), axis: "step", smooth: 0, ranges: {} };
  const cards = [];
  let watcher = null;

  function runColor(index) { return `--c${index % 8}`; }

  /* The horizontal axis of a chart: training steps (or time) unless it names another; charts of one axis zoom together. */
  function axisOf(chart) { return chart.x || "step"; }
  function inTime(chart) { return !chart.x && state.axis === "time"; }

  /* Seconds at a step, between the points that the clock has. */
  function secondsAt(clock, steps) {
    const { x, y } = clock;
    let i = 0;
    return steps.map(step => {
      if (!x.length) return step;
      while (i < x.length - 1 && x[i + 1] < step) i++;
      while (i > 0 && x[i] > step) i--;
      if (i >= x.length - 1) return y[x.length - 1];
      const share = (step - x[i]) / (x[i + 1] - x[i]);
      return y[i] + (y[i + 1] - y[i]) * Math.max(0, share);
    });
  }

  /* Exponential mean over steps, unbiased at the start. */
  function smoothed(values, weight) {
    if (!weight) return values;
    let mean = 0, mass = 0;
    return values.map(value => {
      if (value == null) return value;
      mean = weight * mean + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return mean / mass;
    });
  }

  function lines(chart, hidden) {
    const several = state.runs.length > 1, found = [];
    state.runs.forEach((run, r) => chart.keys.forEach((key, k) => {
      const curve = run.curves[key];
      if (!curve || !state.shown.has(r) || hidden.has(key)) return;
      found.push({
        run: r, key, curve,
        color: several ? runColor(r) : `--c${k % 8}`,
        dash: several ? DASHES[(k + Math.floor(r / 8)) % DASHES.length] : [],
        x: inTime(chart) ? secondsAt(run.clock, curve.x) : curve.x,
      });
    }));
    return found;
  }

  /* Alarms and rollbacks of the runs shown: a line from top to bottom, with its name. */
  function incidents(card, u) {
    if (card.chart.x) return;
    const { left, top, width, height } = u.bbox, scale = devicePixelRatio || 1;
    let drawn = 0;
    u.ctx.save();
    u.ctx.font = `${10 * scale}px system-ui, sans-serif`;
    state.runs.forEach((run, r) => state.shown.has(r) && (run.incidents || []).forEach(([step, name]) => {
      const at = u.valToPos(inTime(card.chart) ? secondsAt(run.clock, [step])[0] : step, "x", true);
      if (!(at >= left && at <= left + width)) return;
      u.ctx.strokeStyle = u.ctx.fillStyle = cssColor(name.startsWith("alarm") ? "--bad" : "--note");
      u.ctx.lineWidth = scale;
      u.ctx.setLineDash([4 * scale, 3 * scale]);
      u.ctx.beginPath();
      u.ctx.moveTo(at, top);
      u.ctx.lineTo(at, top + height);
      u.ctx.stroke();
      const right = at + u.ctx.measureText(name).width + 8 * scale < left + width;
      u.ctx.textAlign = right ? "left" : "right";
      u.ctx.fillText(name, at + (right ? 4 : -4) * scale, top + (10 + 12 * (drawn++ % 4)) * scale);
    }));
    u.ctx.restore();
    card.node.dataset.incidents = String(drawn);
  }

  function positive(values, log) { return log ? values.map(v => (v > 0 ? v : null)) : values; }

  function options(card, drawn, data, log) {
    const soft = cssColor("--soft"), grid = cssColor("--grid");
    const series = [{}], bands = [];
    for (const line of drawn) {
      const color = cssColor(line.color), few = line.curve.x.length < 60;
      line.index = series.length;
      series.push({
        label: line.key, stroke: color, width: 1.6, dash: line.dash, spanGaps: true,
        points: { show: few, size: 4, fill: color },
      });
      if (line.curve.lo) {
        const edge = { stroke: color + "70", width: 1, spanGaps: true, points: { show: false } };
        series.push({ ...edge, label: "high" }, { ...edge, label: "low" });
        bands.push({ series: [line.index + 1, line.index + 2], fill: color + "38" });
      }
    }
    const ticks = { stroke: grid, width: 1, size: 4 };
    const axis = { stroke: soft, grid: { stroke: grid, width: 1 }, ticks, font: "11px system-ui, sans-serif" };
    const range = state.ranges[axisOf(card.chart)], named = card.chart.x ? { label: card.chart.x, labelSize: 18, labelFont: "11px system-ui, sans-serif" } : {};
    return {
      width: card.plot.clientWidth, height: 210, legend: { show: false }, series, bands,
      cursor: { sync: { key: axisOf(card.chart) }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
      scales: { x: { time: false, ...(card.chart.log_x ? { distr: 3 } : {}), ...(range ? { range: () => range } : {}) }, y: log ? { distr: 3 } : { range: padded } },
      axes: [
        { ...axis, ...named, size: 28, ...(card.chart.log_x ? { splits: u => [...u.data[0]], filter: (_, splits) => splits } : {}),
          values: (_, v) => v.map(x => (inTime(card.chart) ? duration(x) : short(x))) },
        { ...axis, size: 58, ...(log ? { splits: decades, filter: (_, splits) => splits } : {}), values: (_, v) => v.map(x => (x == null ? "" : short(x))) },
      ],
      hooks: {
        draw: [u => incidents(card, u)],
        setCursor: [u => legendValues(card, u.cursor.idx, data)],
        setSelect: [u => {
          if (u.select.width < 4) return;
          zoom(card, [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
        }],
      },
    };
  }

  /* Powers of ten only, and not more of them than can be read. */
  function decades(u, _, low, high) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    if (last - first < 1) return u.scales.y.distr === 3 ? [low, Math.sqrt(low * high), high] : [low, high];
    const step = Math.ceil((last - first) / 6), found = [];
    for (let power = first; power <= last; power += step) found.push(10 ** power);
    return found;
  }

  function padded(_, low, high) {
    if (low == null) return [0, 1];
    if (low === 0 && high === 0) return [0, 1];
    if (low === high) { const room = Math.abs(low) * 0.1 || 0.5; return [low - room, high + room]; }
    const room = (high - low) * 0.06;
    return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  }

  function draw(card) {
    if (card.plotted) { card.plotted.destroy(); card.plotted = null; }
    card.plot.textContent = "";
    const drawn = lines(card.chart, card.hidden);
    card.drawn = drawn;
    legend(card);
    const usable = drawn.filter(line => line.x.length);
    if (!usable.length) {
      card.plot.append(el("div", { class: "empty" }, drawn.length ? "no finite value" : "nothing chosen"));
      return;
    }
    const anyPositive = usable.some(line => line.curve.y.some(v => v > 0));
    const log = card.chart.log && anyPositive;
    const tables = usable.map(line => {
      const columns = [smoothed(line.curve.y, card.chart.x ? 0 : state.smooth)];
      if (line.curve.lo) columns.push(line.curve.hi, line.curve.lo);
      return [line.x, ...columns.map(column => positive(column, log))];
    });
    const data = tables.length === 1 ? tables[0] : uPlot.join(tables);
    card.plotted = new uPlot(options(card, usable, data, log), data, card.plot);
    card.plotted.over.addEventListener("dblclick", () => zoom(card, null));
    card.node.dataset.drawn = String(usable.length);
    legendValues(card, null, data);
  }

  function legend(card) {
    card.legend.textContent = "";
    const several = state.runs.length > 1;
    card.values = [];
    if (card.chart.by_run) {
      state.runs.forEach((run, r) => {
        if (!state.shown.has(r) || !card.chart.keys.some(key => run.curves[key])) return;
        const value = el("b", {});
        card.legend.append(el("span", {}, el("i", { style: `border-color: var(${runColor(r)}); border-top-style: ${r < 8 ? "solid" : "dashed"}` }), run.name, value));
        card.values.push([line => line.run === r, value]);
      });
      return;
    }
    const known = card.chart.keys.filter(key => state.runs.some((run, r) => run.curves[key] && state.shown.has(r)));
    known.forEach(key => {
      const k = card.chart.keys.indexOf(key);
      const value = el("b", {});
      const line = el("i", { style: `border-color: ${several ? "var(--soft)" : `var(--c${k % 8})`}; border-top-style: ${several && k ? "dashed" : "solid"}` });
      const bad = state.runs.reduce((sum, run, r) => sum + (state.shown.has(r) && run.curves[key] ? run.curves[key].bad : 0), 0);
      card.legend.append(el("button", {
        "aria-pressed": String(!card.hidden.has(key)), title: "show or hide", "data-key": key,
        onclick: () => { card.hidden.has(key) ? card.hidden.delete(key) : card.hidden.add(key); draw(card); },
      }, line, key, value, bad ? el("span", { class: "badge bad" }, `${bad} not finite`) : null));
      card.values.push([line => line.key === key, value]);
    });
  }

  /* At the cursor, else the last value; of several runs in their order. */
  function legendValues(card, index, data) {
    for (const [belongs, node] of card.values) {
      const found = card.drawn.filter(line => belongs(line) && line.index).map(line => {
        const column = data[line.index];
        let at = index == null ? column.length - 1 : index;
        while (at > 0 && column[at] == null) at--;
        return short(column[at]);
      });
      node.textContent = found.join(" / ");
    }
  }

  function zoom(card, range) { state.ranges[axisOf(card.chart)] = range; redraw(); }

  function redraw() {
    for (const card of cards) {
      card.stale = true;
      if (card.visible) { card.stale = false; draw(card); }
    }
  }

  function meaningOf(keys, meanings) {
    const known = keys.filter(key => meanings[key]);
    if (!known.length) return el("div", { class: "meaning" });
    const [first, ...others] = known;
    const one = key => [el("code", {}, key), " ", meanings[key]];
    return el("details", { class: "meaning" }, el("summary", { title: "what these mean" }, ...one(first)), ...others.map(key => el("p", {}, ...one(key))));
  }

  function card(chart, meanings) {
    const made = { chart, hidden: new Set(), plotted: null, visible: false, stale: true, values: [], drawn: [] };
    made.legend = el("div", { class: "legend" });
    made.plot = el("div", { class: "plot" });
    made.node = el("article", { class: "card chart", "data-title": chart.title },
      el("header", {}, el("h3", {}, chart.title), made.legend), made.plot, meaningOf(chart.keys, meanings));
    cards.push(made);
    watcher = watcher || new IntersectionObserver(entries => {
      for (const entry of entries) {
        const known = cards.find(c => c.node === entry.target);
        known.visible = entry.isIntersecting;
        if (known.visible && known.stale) { known.stale = false; draw(known); }
      }
    }, { rootMargin: "300px" });
    watcher.observe(made.node);
    return made.node;
  }

  let pending = 0;
  addEventListener("resize", () => { clearTimeout(pending); pending = setTimeout(redraw, 150); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  return { state, card, redraw, runColor };
})();

/* Grouped bars. groups: labels; series: [{name, color (css variable), values}], values as shares of their sum. */
function bars(labels, series, unit) {
  const NS = "http://www.w3.org/2000/svg", width = 520, height = 190, left = 44, bottom = 34, top = 8;
  const svg = (tag, attributes, text) => {
    const node = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text != null) node.textContent = text;
    return node;
  };
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "bars", role: "img", width: "100%" });
  const shares = series.map(s => { const sum = s.values.reduce((a, b) => a + b, 0) || 1; return s.values.map(v => v / sum); });
  const most = Math.max(1e-9, ...shares.flat());
  const step = (width - left - 6) / Math.max(1, labels.length), thick = Math.min(34, step * 0.82 / Math.max(1, series.length));
  const y = share => top + (height - top - bottom) * (1 - share / most);
  for (const share of [0, most / 2, most]) {
    root.append(svg("line", { x1: left, x2: width, y1: y(share), y2: y(share) }));
    root.append(svg("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, `${+(share * 100).toPrecision(2)}%`));
  }
  const every = Math.ceil(labels.length / 14);
  labels.forEach((label, i) => {
    const middle = left + step * (i + 0.5);
    if (i % every === 0) root.append(svg("text", { x: middle, y: height - bottom + 15, "text-anchor": "middle" }, label));
    series.forEach((s, k) => {
      if (!s.values[i]) return;
      const x = middle + (k - series.length / 2) * thick;
      const bar = svg("rect", { x, y: y(shares[k][i]), width: Math.max(1, thick - 1.5), height: Math.max(1, height - bottom - y(shares[k][i])), rx: 2, style: `fill: var(${s.color})` });
      bar.append(svg("title", {}, `${s.name}: ${label} ${unit}: ${s.values[i].toLocaleString("en-US")} (${(shares[k][i] * 100).toFixed(2)} %)`));
      root.append(bar);
    });
  });
  root.append(svg("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, unit));
  return root;
}
