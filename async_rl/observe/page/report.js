"use strict";
/* The page: run chips, overview, sections of charts, histograms, timeline, samples, settings, events. */

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main"), nav = document.getElementById("nav");
  const several = data.runs.length > 1, later = [];
  main.textContent = "";
  Charts.state.runs = data.runs;
  data.runs.forEach((_, r) => Charts.state.shown.add(r));

  function section(title, hint, ...children) {
    const id = title.toLowerCase().replace(/\W+/g, "-");
    nav.append(el("a", { href: `#${id}` }, title));
    const made = el("section", { id }, el("h2", {}, title), hint ? el("p", { class: "hint" }, hint) : null, ...children);
    main.append(made);
    return made;
  }

  function stateBadge(run) {
    const kind = { finished: "good", failed: "bad", "broken off": "bad", stopped: "note", "going on": "note" }[run.state];
    return el("span", { class: `badge ${kind}` }, run.state);
  }

  function chips() {
    data.runs.forEach((run, r) => document.getElementById("runs").append(el("button", {
      class: "chip", "aria-pressed": "true", "data-run": r, title: several ? "show or hide this run" : run.path,
      onclick: event => {
        const shown = Charts.state.shown;
        if (several) shown.has(r) ? shown.delete(r) : shown.add(r);
        event.currentTarget.setAttribute("aria-pressed", String(shown.has(r)));
        Charts.redraw();
      },
    }, el("span", { class: "dot", style: `color: var(${Charts.runColor(r)}); background: currentColor` }), run.name, stateBadge(run))));
    const axis = document.getElementById("axis");
    for (const name of ["step", "time"]) axis.append(el("button", { "aria-pressed": String(name === "step"), onclick: event => {
      Charts.state.axis = name;
      Charts.state.ranges = {};
      for (const other of axis.children) other.setAttribute("aria-pressed", String(other === event.currentTarget));
      Charts.redraw();
    } }, name));
    document.getElementById("smooth").addEventListener("input", event => { Charts.state.smooth = +event.target.value; Charts.redraw(); });
  }

  function overview() {
    const cards = data.runs.map((run, r) => el("article", { class: "card" },
      el("h3", {}, el("span", { class: "dot", style: `color: var(${Charts.runColor(r)}); background: currentColor` }), run.name, stateBadge(run)),
      el("p", {}, run.words),
      el("dl", { class: "facts" }, ...[["state", run.state_words], ["folder", run.path], ...run.facts].flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
      run.incidents.length ? el("ul", { class: "notes" }, ...run.incidents.map(([step, name, text]) => el("li", {}, `step ${step}, ${name}: ${text}`))) : null,
      run.notes.length ? el("ul", { class: "notes" }, ...run.notes.map(note => el("li", {}, note))) : null));
    const made = new Date(data.made_at * 1000).toISOString().replace("T", " ").slice(0, 16);
    section("Overview", `Made by async_rl ${data.version} at ${made} UTC.`, el("div", { class: "overview" }, ...cards));
  }

  function curves() {
    const sections = new Map();
    for (const chart of data.charts) sections.set(chart.section, [...(sections.get(chart.section) || []), chart]);
    const buckets = data.runs.some(run => Object.values(run.curves).some(curve => curve.lo));
    const hint = "Drag to zoom in, double-click to zoom out; click a name to hide its curve, the line below a chart to read what it means."
      + (buckets ? " Long curves show the mean of each bucket of steps, the band its lowest and highest value." : "")
      + (several ? " Colours are runs, dashes metrics; values in a legend stand in the order of the runs." : "");
    let first = true;
    for (const [name, charts] of sections) {
      const grid = el("div", { class: "grid" }, ...charts.map(chart => Charts.card(chart, data.meanings)));
      if (name === "Everything else") section(name, null, el("details", { class: "more" }, el("summary", {}, `${charts.length} more metrics, each on a chart of its own`), grid));
      else section(name, first ? hint : null, grid);
      first = false;
    }
  }

  function histogram(title, unit, named, note) {
    const labels = [...new Set(named.flatMap(s => s.counts.map(([value]) => value)))].sort((a, b) => a - b);
    if (!labels.length) return null;
    const series = named.map(s => { const of = new Map(s.counts); return { ...s, values: labels.map(label => of.get(label) || 0) }; });
    return el("article", { class: "card histogram" },
      el("header", {}, el("h3", {}, title), el("div", { class: "key" }, ...series.map(s => el("span", {}, el("i", { style: `background: var(${s.color})` }), s.name)))),
      bars(labels.map(String), series, unit), note ? el("div", { class: "meaning" }, note) : null);
  }

  function histograms() {
    const runs = data.runs.map((run, r) => ({ run, r })).filter(({ run }) => run.survey);
    if (!runs.length) return;
    const cards = [];
    if (several) {
      for (const part of ["oldest token", "in the queue", "in flight"]) {
        cards.push(histogram(`Staleness: ${part}`, "steps", runs.map(({ run, r }) => ({ name: run.name, color: Charts.runColor(r), counts: run.survey.staleness[part] }))));
      }
      const all = survey => [...survey.lengths.trained || [], ...survey.lengths.refused || []];
      cards.push(histogram("Length of trajectories, trained and refused", "policy tokens", runs.map(({ run, r }) => ({ name: run.name, color: Charts.runColor(r), counts: all(run.survey) }))));
      cards.push(histogram("Turns", "turns", runs.map(({ run, r }) => ({ name: run.name, color: Charts.runColor(r), counts: run.survey.turns }))));
    } else {
      const survey = runs[0].run.survey;
      const colored = rows => rows.map(([name, counts], k) => ({ name, counts, color: `--c${k % 8}` }));
      cards.push(histogram("Staleness of trained trajectories", "steps", colored(Object.entries(survey.staleness)),
        "of the oldest token = weights that changed in flight + steps waited in the queue"));
      cards.push(histogram("Length of trajectories", "policy tokens", colored(Object.entries(survey.lengths)), "shares of each kind; long lengths in buckets from this one on"));
      cards.push(histogram("Turns", "turns", colored([["training", survey.turns]])));
    }
    for (const { run } of runs) {
      const reasons = Object.entries(run.survey.refused_lengths);
      if (reasons.length) cards.push(histogram(`Refused by the buffer${several ? `: ${run.name}` : ""}`, "policy tokens", reasons.map(([name, counts], k) => ({ name, counts, color: `--c${k % 8}` }))));
    }
    const read = runs.filter(({ run }) => run.survey.read < run.survey.stored).map(({ run }) => `${run.name}: evenly spread stretches of ${run.survey.read.toLocaleString("en-US")} out of ${run.survey.stored.toLocaleString("en-US")} trajectories.`);
    section("Histograms", read.join(" ") || null, el("div", { class: "grid" }, ...cards.filter(Boolean)), ...leftOut());
  }

  function leftOut() {
    const rows = [];
    for (const run of data.runs) {
      for (const [reason, groups] of run.refusals) rows.push([run.name, "buffer", reason, `${groups.toLocaleString("en-US")} groups`, "", ""]);
      for (const [reason, episodes] of run.failures) rows.push([run.name, "an error", reason, `${episodes.toLocaleString("en-US")} episodes`, "", ""]);
      for (const one of run.rejects) {
        const by = Object.entries(one.buckets).map(([bucket, count]) => `${bucket.replace("_", " ")}: ${count.toLocaleString("en-US")}`).join(", ");
        rows.push([run.name, "objective", one.reason, `${one.trajectories.toLocaleString("en-US")} trajectories`, `${one.tokens.toLocaleString("en-US")} tokens`, by]);
      }
    }
    if (!rows.length) return [el("p", { class: "count", id: "left-out" }, "No episode failed; nothing was refused by the buffer or rejected by the objective.")];
    const head = ["run", "by", "reason", "how many", "tokens", "trajectories by policy tokens"];
    return [el("article", { class: "card", id: "left-out" }, el("header", {}, el("h3", {}, "What was left out, and why")),
      el("table", {}, el("thead", {}, el("tr", {}, ...head.map(h => el("th", {}, h)))), el("tbody", {}, ...rows.map(row => el("tr", {}, ...row.map(cell => el("td", {}, cell)))))))];
  }

  function timelines() {
    const cards = data.runs.flatMap(run => Timeline.cards(run));
    if (!cards.length) return;
    section("Timeline", "Each lane is a process: how much of the time it spent on what.", Timeline.key(), ...cards.map(([node]) => node));
    later.push(...cards.map(([, paint]) => paint));
  }

  function trajectories() {
    const notes = [...new Set(data.runs.flatMap(run => run.sample_notes))];
    const hint = notes.map(note => {
      const runs = data.runs.filter(run => run.sample_notes.includes(note));
      return runs.length === data.runs.length ? note : `${runs.map(run => run.name).join(", ")}: ${note}`;
    }).join(" ");
    if (data.runs.some(run => run.samples.length)) section("Trajectories", hint, ...Samples.section(data.runs));
    else section("Trajectories", hint);
  }

  function settings() {
    const paths = [...new Set(data.runs.flatMap(run => run.settings.map(([path]) => path)))];
    const tables = data.runs.map(run => new Map(run.settings.map(row => [row[0], row])));
    const written = value => (value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
    const rows = paths.map(path => {
      const found = tables.map(table => table.get(path)), values = found.map(row => written(row && row[1]));
      const differs = several && new Set(values).size > 1, known = found.find(Boolean);
      const node = el("tr", { class: differs ? "differs" : null },
        el("td", {}, el("code", {}, path)), ...values.map(value => el("td", {}, el("code", {}, value))),
        el("td", {}, known[2], known[3] ? el("small", {}, known[3]) : null));
      return { node, differs, text: `${path} ${values.join(" ")} ${known[2]}`.toLowerCase() };
    });
    const wanted = { query: "", only: several && rows.some(row => row.differs) };
    const filter = () => rows.forEach(row => { row.node.hidden = (wanted.only && !row.differs) || !row.text.includes(wanted.query); });
    const only = el("input", { type: "checkbox", id: "differing", onchange: e => { wanted.only = e.target.checked; filter(); } });
    only.checked = wanted.only;
    filter();
    section("Settings", null,
      el("div", { class: "filters" }, el("input", { type: "search", id: "settings-search", placeholder: "search in the settings", oninput: e => { wanted.query = e.target.value.toLowerCase(); filter(); } }),
        several ? el("label", {}, only, " only those that differ") : null),
      el("article", { class: "card scroll" }, el("table", { id: "settings-table" },
        el("thead", {}, el("tr", {}, el("th", {}, "setting"), ...data.runs.map(run => el("th", {}, several ? run.name : "value")), el("th", {}, "meaning"))),
        el("tbody", {}, ...rows.map(row => row.node)))));
  }

  function events() {
    const all = data.runs.flatMap((run, r) => run.events.map(event => ({ run, r, event }))), limit = 1500;
    const wanted = { trouble: false };
    const body = el("tbody", {});
    const draw = () => {
      const found = all.filter(({ event }) => !wanted.trouble || event[4] !== "plain");
      body.replaceChildren(...found.slice(-limit).map(({ run, r, event: [at, kind, lane, text, level] }) => el("tr", { class: level },
        el("td", { class: "when" }, several ? el("span", { class: "dot", style: `color: var(${Charts.runColor(r)}); display: inline-block; margin-right: 6px` }) : null, duration(at - run.start)),
        el("td", {}, kind.replaceAll("_", " ")), el("td", {}, lane), el("td", {}, text))));
    };
    draw();
    const trouble = all.filter(({ event }) => event[4] !== "plain").length;
    section("Events", trouble ? `${trouble} of ${all.length} tell of trouble or of something worth a look.` : "No alarm, stall, death or restart.",
      el("div", { class: "filters" }, el("label", {}, el("input", { type: "checkbox", id: "trouble", onchange: e => { wanted.trouble = e.target.checked; draw(); } }), " only these")),
      el("article", { class: "card scroll" }, el("table", { id: "events-table" }, el("thead", {}, el("tr", {}, ...["at", "event", "process", "detail"].map(h => el("th", {}, h)))), body)));
  }

  chips();
  overview();
  curves();
  histograms();
  timelines();
  trajectories();
  settings();
  events();
  later.forEach(paint => paint());
  document.documentElement.dataset.ready = "1";
})();
