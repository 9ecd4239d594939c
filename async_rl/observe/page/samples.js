"use strict";
/* Trajectories: a list that can be searched, and one of them token by token. */

const Samples = (() => {
  const MODES = ["ratio", "version", "log-prob", "plain"];
  const state = { mode: "ratio", query: "", run: "", kind: "", sort: "step", current: null };
  let all = [], list, view, counted;

  function mix(variable, share) { return `color-mix(in srgb, var(${variable}) ${(share * 100).toFixed(0)}%, transparent)`; }

  /* Background of a policy token. */
  function paint(sample, i) {
    if (state.mode === "ratio" && sample.ratio && sample.ratio[i] != null) {
      const size = Math.log(Math.max(sample.ratio[i], 1e-9)) / Math.log(4);
      return mix(size > 0 ? "--c3" : "--c0", Math.min(0.72, 0.04 + 0.68 * Math.min(1, Math.abs(size))));
    }
    if (state.mode === "version") {
      const age = lag(sample, i);
      return mix("--c4", Math.min(0.7, 0.08 + 0.62 * age / Math.max(1, sample.mostLag)));
    }
    if (state.mode === "log-prob" && sample.logp[i] != null) return mix("--c1", Math.min(0.75, 0.03 + Math.min(1, -sample.logp[i] / 5) * 0.72));
    return state.mode === "plain" ? "transparent" : mix("--soft", 0.1);
  }

  function lag(sample, i) { return (sample.step == null ? sample.versions[1] : sample.step) - sample.version[i]; }

  function tip(sample, i) {
    if (sample.turn[i] < 0) return "given (prompt or environment)";
    const said = [spoken(sample, sample.turn[i]), `version ${sample.version[i]}` + (sample.step == null ? "" : `, ${lag(sample, i)} steps old when trained`)];
    if (sample.logp[i] != null) said.push(`log-prob when sampled ${short(sample.logp[i])}`);
    if (sample.ratio && sample.ratio[i] != null) said.push(`ratio ${short(sample.ratio[i])} to the weights of version ${sample.ratio_version}`);
    return said.join("\n");
  }

  /* Which turn, whose and how it was sampled. */
  function spoken(sample, number) {
    const [, , , agent, temperature] = sample.turns[number];
    const how = temperature == null ? "" : temperature === "greedy" ? " · greedy" : ` · temperature ${short(temperature)}`;
    return `turn ${number + 1}${agent ? ` · ${agent}` : ""}${how}`;
  }

  function marked(text, query) {
    if (!query) return [text];
    const found = [], low = text.toLowerCase();
    let at = 0;
    for (let next = low.indexOf(query); next >= 0; next = low.indexOf(query, at)) {
      found.push(text.slice(at, next), el("mark", {}, text.slice(next, next + query.length)));
      at = next + query.length;
    }
    return [...found, text.slice(at)];
  }

  /* Which characters of the whole text the search found, to mark them across tokens. */
  function hits(text, query) {
    const found = new Set(), low = text.toLowerCase();
    if (query) for (let at = low.indexOf(query); at >= 0; at = low.indexOf(query, at + 1)) for (let i = 0; i < query.length; i++) found.add(at + i);
    return found;
  }

  function tokens(sample) {
    const box = el("div", { class: "tokens" }), found = hits(sample.whole, state.query.toLowerCase());
    const contexts = new Map(sample.context_at);
    let place = 0, turn = -1, version = null;
    sample.text.forEach((text, i) => {
      if (sample.cut === i) box.append(el("div", { class: "count" }, `… ${sample.length - sample.text.length} tokens left out …`));
      if (contexts.has(i)) box.append(el("div", { class: "count context" }, `context ${contexts.get(i)} of ${sample.contexts}: the model sees nothing from above`));
      const own = sample.turn[i] >= 0;
      if (own && sample.turn[i] !== turn) {
        const reward = sample.turns[sample.turn[i]][2];
        box.append(el("span", { class: "turn" }, `${spoken(sample, sample.turn[i])}${reward ? ` · ${short(reward)}` : ""}`));
      }
      turn = sample.turn[i];
      const swapped = own && version != null && sample.version[i] !== version;
      if (own) version = sample.version[i];
      const token = el("span", { class: `${own ? "tok" : "given"}${swapped ? " swap" : ""}`, "data-i": i });
      if (own) token.style.background = paint(sample, i);
      let run = "", lit = false;
      const flush = () => { if (run) token.append(lit ? el("mark", {}, run) : run); run = ""; };
      for (let c = 0; c < text.length; c++) {
        const now = found.has(place + c);
        if (now !== lit) { flush(); lit = now; }
        run += text[c];
      }
      flush();
      place += text.length;
      box.append(token);
    });
    box.addEventListener("mousemove", event => {
      const token = event.target.closest("[data-i]");
      token ? Tip.show(tip(sample, +token.dataset.i), event) : Tip.hide();
    });
    box.addEventListener("mouseleave", Tip.hide);
    return box;
  }

  function legend(sample) {
    const ramp = (...colors) => el("span", { class: "ramp", style: `background: linear-gradient(90deg, ${colors.join(",")})` });
    if (state.mode === "ratio") {
      if (!sample.ratio) return el("div", { class: "key" }, "no importance ratios for this trajectory");
      const exact = sample.step === sample.ratio_version;
      return el("div", { class: "key" }, el("span", {}, "less likely now ¼", ramp(mix("--c0", 0.72), "transparent", mix("--c3", 0.72)), "4 times likelier"),
        el("span", {}, exact ? `the ratios step ${sample.step} was trained with` : `to the weights of version ${sample.ratio_version}${sample.step == null ? "" : `; it was trained in step ${sample.step}`}`));
    }
    if (state.mode === "version") return el("div", { class: "key" }, el("span", {}, "fresh", ramp(mix("--c4", 0.08), mix("--c4", 0.7)), `${Math.max(1, sample.mostLag)} step${sample.mostLag > 1 ? "s" : ""} old`), el("span", {}, "a bar: new weights in the middle of the episode"));
    if (state.mode === "log-prob") return el("div", { class: "key" }, el("span", {}, "log-prob when sampled: 0", ramp(mix("--c1", 0.03), mix("--c1", 0.75)), "-5"));
    return el("div", { class: "key" });
  }

  function rewardBadge(sample) {
    return el("span", { class: `badge ${sample.reward > 0 ? "good" : sample.reward < 0 ? "bad" : ""}` }, sample.reward == null ? "no reward" : `reward ${short(sample.reward)}`);
  }

  function kindBadge(sample) {
    if (sample.kind === "refused" || sample.kind === "failed") return el("span", { class: "badge bad" }, sample.kind);
    return sample.kind === "held out" ? el("span", { class: "badge note" }, "held out") : null;
  }

  function show(sample) {
    state.current = sample;
    view.textContent = "";
    for (const item of list.children) item.setAttribute("aria-current", String(item.sample === sample));
    if (!sample) return view.append(el("p", { class: "count" }, "no trajectory matches"));
    const facts = [
      ["group, sample", `${sample.group}, ${sample.sample} (problem ${sample.problem})`],
      ["trained in step", sample.step == null ? "–" : String(sample.step)],
      ["weights", sample.versions[0] === sample.versions[1] ? `version ${sample.versions[0]}` : `versions ${sample.versions[0]} to ${sample.versions[1]}`],
      ["length", `${sample.length} tokens, ${sample.policy} of the policy in ${sample.turns.length} turn${sample.turns.length === 1 ? "" : "s"}`],
      ...(sample.contexts > 1 ? [["contexts", String(sample.contexts)]] : []),
      ["ended", sample.ended + (sample.reason ? `: ${sample.reason}` : "")],
      ["made by", `${sample.generator || "?"} in ${duration(sample.seconds)}`],
      ...Object.entries(sample.info).map(([name, value]) => [name, String(value)]),
    ];
    view.append(
      el("h3", {}, `${sample.runName} `, rewardBadge(sample), " ", kindBadge(sample)),
      el("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
      legend(sample), tokens(sample));
  }

  function matching() {
    const query = state.query.toLowerCase();
    const found = all.filter(s => (!query || s.whole.toLowerCase().includes(query)) && (state.run === "" || s.run === +state.run) && (!state.kind || s.kind === state.kind));
    const by = { step: s => (s.step == null ? 1e12 : s.step), reward: s => (s.reward == null ? -1e12 : s.reward), length: s => s.policy, staleness: s => -s.mostLag }[state.sort];
    return found.sort((a, b) => by(a) - by(b) || a.run - b.run || a.group - b.group || a.sample - b.sample);
  }

  function refresh() {
    const found = matching();
    list.textContent = "";
    counted.textContent = `${found.length} of ${all.length}`;
    for (const sample of found.slice(0, 600)) {
      const item = el("button", { class: "item", onclick: () => show(sample) },
        el("span", { class: "dot", style: `color: var(${Charts.runColor(sample.run)}); background: currentColor` }),
        el("span", {}, sample.step == null ? `group ${sample.group}` : `step ${sample.step}`, " ", kindBadge(sample)), rewardBadge(sample),
        el("span", { class: "snippet" }, ...marked(sample.whole.slice(0, 400).replace(/\s+/g, " "), state.query.toLowerCase())));
      item.sample = sample;
      list.append(item);
    }
    show(found.includes(state.current) ? state.current : found[0]);
  }

  function section(runs) {
    all = runs.flatMap((run, r) => run.samples.map(s => ({
      ...s, run: r, runName: run.name, whole: s.text.join(""),
      kind: s.ended === "error" || s.ended === "aborted" ? "failed" : s.refused ? "refused" : s.split === "eval" ? "held out" : "trained",
      mostLag: s.step == null ? s.versions[1] - s.versions[0] : s.step - s.versions[0],
    })));
    list = el("div", { class: "card list", id: "sample-list" });
    view = el("div", { class: "card view", id: "sample-view" });
    counted = el("span", { class: "count", id: "sample-count" });
    const choose = (name, choices) => el("select", { "aria-label": name, onchange: e => { state[name] = e.target.value; refresh(); } },
      ...choices.map(([value, text]) => el("option", { value }, text)));
    const modes = el("div", { class: "segmented", id: "modes", role: "group", "aria-label": "colour of tokens" });
    for (const mode of MODES) modes.append(el("button", { "aria-pressed": String(mode === state.mode), onclick: e => {
      state.mode = mode;
      for (const other of modes.children) other.setAttribute("aria-pressed", String(other === e.currentTarget));
      show(state.current);
    } }, mode));
    const kinds = [...new Set(all.map(s => s.kind))].map(kind => [kind, kind]);
    const filters = el("div", { class: "filters" },
      el("input", { type: "search", id: "sample-search", placeholder: "search in the text of these trajectories", oninput: e => { state.query = e.target.value; refresh(); } }),
      runs.length > 1 ? choose("run", [["", "all runs"], ...runs.map((run, r) => [r, run.name])]) : null,
      choose("kind", [["", "all kinds"], ...kinds]),
      choose("sort", [["step", "by step"], ["reward", "by reward"], ["length", "by length"], ["staleness", "stalest first"]]), counted, modes);
    if (!all.some(s => s.ratio)) { state.mode = "log-prob"; for (const b of modes.children) b.setAttribute("aria-pressed", String(b.textContent === state.mode)); }
    refresh();
    return [filters, el("div", { class: "browser" }, list, view)];
  }

  return { section };
})();
