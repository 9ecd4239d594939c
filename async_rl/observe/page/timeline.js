"use strict";
/* Lanes of processes on a canvas: shares of time over the whole run, and every span of the newest steps. */

const Tip = {
  show(text, event) {
    const tip = document.getElementById("tip");
    tip.textContent = text;
    tip.hidden = false;
    const width = tip.offsetWidth, height = tip.offsetHeight;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
  },
  hide() { document.getElementById("tip").hidden = true; },
};

const Timeline = (() => {
  const DOINGS = ["training", "generating", "waiting", "publishing", "evaluating", "checkpoint", "starting", "alive"];
  const LABEL = 132, LANE = 24, GAP = 5, AXIS = 22;
  const drawers = [];

  function prepared(canvas, rows, draw) {
    canvas.style.height = `${rows * (LANE + GAP) + AXIS + 4}px`;
    const paint = () => {
      const width = canvas.clientWidth, height = canvas.clientHeight, ratio = devicePixelRatio || 1;
      if (!width) return;
      canvas.width = width * ratio;
      canvas.height = height * ratio;
      const pen = canvas.getContext("2d");
      pen.scale(ratio, ratio);
      pen.font = "12px system-ui, sans-serif";
      pen.textBaseline = "middle";
      draw(pen, width, height);
      canvas.dataset.drawn = "1";
    };
    drawers.push(paint);
    return paint;
  }

  function axis(pen, width, height, low, high) {
    pen.fillStyle = cssColor("--soft");
    pen.strokeStyle = cssColor("--grid");
    const count = Math.max(2, Math.floor((width - LABEL) / 130));
    for (let i = 0; i <= count; i++) {
      const x = LABEL + (width - LABEL - 1) * i / count;
      pen.beginPath(); pen.moveTo(x, 0); pen.lineTo(x, height - AXIS); pen.stroke();
      pen.textAlign = i === 0 ? "left" : i === count ? "right" : "center";
      pen.fillText(duration(low + (high - low) * i / count), x, height - AXIS / 2);
    }
    pen.textAlign = "left";
  }

  function label(pen, text, row) {
    pen.fillStyle = cssColor("--ink");
    let shown = text;
    while (pen.measureText(shown).width > LABEL - 12 && shown.length > 3) shown = shown.slice(0, -2) + "…";
    pen.fillText(shown, 0, row * (LANE + GAP) + LANE / 2);
  }

  function overview(run) {
    const { edges: [start, end], lanes, marks } = run.timeline, length = end - start;
    const canvas = el("canvas", { class: "lanes", "aria-label": "what each process did over the whole run" });
    const paint = prepared(canvas, lanes.length + 1, (pen, width, height) => {
      const room = width - LABEL;
      axis(pen, width, height, 0, length);
      label(pen, "events", 0);
      for (const [at, , , , level] of marks) {
        pen.fillStyle = cssColor(level === "bad" ? "--bad" : level === "note" ? "--note" : "--faint");
        pen.fillRect(LABEL + room * (at - start) / length - 1, level === "plain" ? 9 : 3, level === "plain" ? 1.5 : 3, level === "plain" ? LANE - 14 : LANE - 4);
      }
      lanes.forEach((lane, i) => {
        label(pen, lane.name, i + 1);
        const top = (i + 1) * (LANE + GAP), parts = DOINGS.filter(doing => lane.shares[doing]);
        const count = parts.length ? lane.shares[parts[0]].length : 0;
        for (let b = 0; b < count; b++) {
          const x = LABEL + room * b / count, wide = room / count + 0.6;
          let filled = 0;
          for (const doing of parts) {
            const high = lane.shares[doing][b] * LANE;
            if (high <= 0) continue;
            pen.fillStyle = cssColor(`--${doing}`);
            pen.fillRect(x, top + LANE - Math.min(LANE, filled + high), wide, Math.min(high, LANE - filled));
            filled += high;
          }
        }
      });
    });
    canvas.addEventListener("mouseleave", Tip.hide);
    canvas.addEventListener("mousemove", event => {
      const room = canvas.clientWidth - LABEL, at = (event.offsetX - LABEL) / room, row = Math.floor(event.offsetY / (LANE + GAP));
      if (at < 0 || at > 1 || row < 0 || row > lanes.length) return Tip.hide();
      if (row === 0) {
        const near = marks.filter(m => Math.abs((m[0] - start) / length - at) * room < 5).slice(0, 6);
        if (!near.length) return Tip.hide();
        return Tip.show(near.map(m => `${duration(m[0] - start)}  ${m[2]} ${m[1]}\n${m[3].slice(0, 240)}`).join("\n"), event);
      }
      const lane = lanes[row - 1];
      const said = DOINGS.filter(d => lane.shares[d]).map(d => [d, lane.shares[d][Math.min(lane.shares[d].length - 1, Math.floor(at * lane.shares[d].length))]]);
      Tip.show([`${lane.name} at ${duration(at * length)}`, ...said.filter(([, v]) => v > 0).map(([d, v]) => `${d} ${(v * 100).toFixed(0)} %`)].join("\n"), event);
    });
    return [canvas, paint];
  }

  function detail(run) {
    const { lanes, seconds, first, last } = run.timeline.detail;
    const view = { low: 0, high: seconds };
    const canvas = el("canvas", { class: "lanes", "aria-label": `every span of steps ${first} to ${last}` });
    const at = x => view.low + (view.high - view.low) * (x - LABEL) / (canvas.clientWidth - LABEL);
    const paint = prepared(canvas, lanes.length, (pen, width, height) => {
      const scale = (width - LABEL) / (view.high - view.low);
      axis(pen, width, height, view.low, view.high);
      lanes.forEach((lane, i) => {
        label(pen, lane.name, i);
        for (const [begin, end, doing] of lane.spans) {
          if (end < view.low || begin > view.high) continue;
          const x = Math.max(LABEL, LABEL + (begin - view.low) * scale), right = Math.min(width, LABEL + (end - view.low) * scale);
          pen.fillStyle = cssColor(`--${doing}`);
          pen.fillRect(x, i * (LANE + GAP), Math.max(0.7, right - x - (right - x > 3 ? 0.7 : 0)), LANE);
        }
      });
    });
    let from = null;
    canvas.addEventListener("mousedown", event => { from = at(event.offsetX); });
    canvas.addEventListener("mouseup", event => {
      const to = at(event.offsetX);
      if (from != null && Math.abs(to - from) > (view.high - view.low) / 100) {
        view.low = Math.max(0, Math.min(from, to));
        view.high = Math.min(seconds, Math.max(from, to));
        paint();
      }
      from = null;
    });
    canvas.addEventListener("dblclick", () => { view.low = 0; view.high = seconds; paint(); });
    canvas.addEventListener("mouseleave", () => { from = null; Tip.hide(); });
    canvas.addEventListener("mousemove", event => {
      const lane = lanes[Math.floor(event.offsetY / (LANE + GAP))], when = at(event.offsetX);
      if (!lane || event.offsetX < LABEL) return Tip.hide();
      const slack = (view.high - view.low) / canvas.clientWidth;
      const span = lane.spans.find(([begin, end]) => begin - slack <= when && when <= end + slack);
      if (!span) return Tip.hide();
      Tip.show(`${lane.name}: ${span[2]} for ${duration(span[1] - span[0])}\n${span[3]}`, event);
    });
    return [canvas, paint];
  }

  function key() {
    return el("div", { class: "key" }, ...DOINGS.map(doing => el("span", {}, el("i", { style: `background: var(--${doing})` }), doing)));
  }

  function cards(run) {
    const made = [];
    if (run.timeline.lanes.length) {
      const [canvas, paint] = overview(run);
      made.push([el("article", { class: "card timeline" }, el("header", {}, el("h3", {}, `${run.name}: the whole run`)), canvas), paint]);
    }
    if (run.timeline.detail) {
      const [canvas, paint] = detail(run), { first, last } = run.timeline.detail;
      made.push([el("article", { class: "card timeline" }, el("header", {}, el("h3", {}, `${run.name}: steps ${first} to ${last}`),
        el("span", { class: "count" }, "drag to zoom, double-click to go back")), canvas), paint]);
    }
    return made;
  }

  const repaint = () => drawers.forEach(paint => paint());
  let pending = 0;
  addEventListener("resize", () => { clearTimeout(pending); pending = setTimeout(repaint, 150); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  return { cards, key, repaint };
})();
