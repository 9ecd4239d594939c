"use strict";
/* The page of a lab: recipe chips, what the words mean, for each task final rewards, tables and curves, failed cells. */

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main"), nav = document.getElementById("nav");
  main.textContent = "";
  Charts.state.runs = data.runs;
  data.runs.forEach((_, r) => Charts.state.shown.add(r));

  function section(title, ...children) {
    const id = title.toLowerCase().replace(/\W+/g, "-");
    nav.append(el("a", { href: `#${id}` }, title));
    main.append(el("section", { id }, el("h2", {}, title), ...children));
  }

  function chips() {
    data.runs.forEach((run, r) => document.getElementById("runs").append(el("button", {
      class: "chip", "aria-pressed": "true", title: "show or hide this recipe",
      onclick: event => {
        const shown = Charts.state.shown;
        shown.has(r) ? shown.delete(r) : shown.add(r);
        event.currentTarget.setAttribute("aria-pressed", String(shown.has(r)));
        Charts.redraw();
      },
    }, el("span", { class: "dot", style: `color: var(${Charts.runColor(r)}); background: currentColor` }), run.name)));
    const smooth = document.getElementById("smooth");
    smooth.value = Charts.state.smooth = 0.6;
    smooth.addEventListener("input", () => { Charts.state.smooth = +smooth.value; Charts.redraw(); });
  }

  function overview() {
    section("Overview", el("p", { class: "hint" }, data.summary),
      el("article", { class: "card" }, el("dl", { class: "facts" }, ...data.words.flatMap(([word, meaning]) => [el("dt", {}, word), el("dd", {}, meaning)]))));
  }

  function tasks() {
    for (const task of data.tasks) {
      const sections = new Map();
      for (const chart of task.charts) sections.set(chart.section, [...(sections.get(chart.section) || []), chart]);
      let first = true;
      for (const [name, charts] of sections) {
        const grid = el("div", { class: "grid" }, ...charts.map(chart => Charts.card(chart, data.meanings)));
        section(`${task.name}: ${name}`, grid, first ? table(task.table) : null);
        first = false;
      }
    }
  }

  function table([head, ...rows]) {
    return el("article", { class: "card scroll merits" }, el("table", {},
      el("thead", {}, el("tr", {}, ...head.map(name => el("th", {}, name)))),
      el("tbody", {}, ...rows.map(row => el("tr", {}, ...row.map(cell => el("td", {}, cell)))))));
  }

  function failed() {
    if (data.failed.length) section("Failed cells", el("ul", { class: "notes" }, ...data.failed.map(([name, why]) => el("li", {}, `${name}: ${why}`))));
  }

  chips();
  overview();
  tasks();
  failed();
  document.documentElement.dataset.ready = "1";
})();
