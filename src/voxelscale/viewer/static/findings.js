"use strict";
// The list of findings, the threshold, and what the reader decides about them.

// Findings

const markOf = (name) => view.facts.marks.find((m) => m.finding === name);
const findingOf = (name) => view.facts.findings[Number(name) - 1];
const lesionOf = (name) => (name.startsWith("t") ? view.facts.lesions[Number(name.slice(1)) - 1] : undefined);
const shows = (name) => !findingOf(name) || findingOf(name).probability >= view.threshold;

function names() {
  const lesions = view.facts.lesions.map((_, n) => `t${n + 1}`);
  return [...view.facts.marks.map((m) => m.finding), ...lesions];
}

function placeOf(name) {
  const lesion = lesionOf(name);
  return lesion ? [lesion.x, lesion.y, lesion.z] : markOf(name)?.mm;
}

function list() {
  const { facts } = view,
    rows = [];
  rows.push(element("h3", "", `Findings by confidence (${facts.findings.length})`));
  facts.findings.forEach((f, n) => rows.push(row(String(n + 1), f)));
  const added = facts.marks.filter((m) => m.finding.startsWith("a"));
  if (added.length) rows.push(element("h3", "", "Added by you"), ...added.map((m) => row(m.finding, null)));
  if (facts.has_truth) {
    rows.push(element("h3", "", `Truth (${facts.lesions.length})`));
    facts.lesions.forEach((lesion, n) => rows.push(row(`t${n + 1}`, lesion)));
  }
  $("findings").replaceChildren(...rows);
  $("threshold-value").textContent = view.threshold.toFixed(2);
  $("finish").setAttribute("aria-pressed", facts.finished);
  $("finish").firstChild.data = facts.finished ? "Finished – reopen " : "Finish case ";
  document.querySelector("[data-act=undo]").disabled = !facts.can_undo;
  summarise();
}

function row(name, f) {
  const mark = markOf(name),
    truth = name.startsWith("t"),
    verdict = mark && mark.verdict;
  const out = element("div", "finding");
  out.id = `finding-${name}`;
  out.setAttribute("role", "option");
  out.setAttribute("aria-selected", name === view.selected);
  out.classList.toggle("below", !truth && !shows(name));
  out.classList.toggle("rejected", verdict === "rejected");
  out.append(element("span", "number", name.toUpperCase()));
  const what = element("span", "what");
  if (f && !truth) {
    const meter = element("span", "meter"),
      bar = element("i");
    bar.style.width = `${100 * f.probability}%`;
    meter.append(bar);
    what.append(meter, `${f.probability.toFixed(3)}${f.label ? ` ${f.label}` : ""}`);
  } else if (truth) what.append(f.label || "lesion");
  else what.append(`${mark.diameter_mm.toFixed(1)} mm${mark.class ? ` ${mark.class}` : ""}`);
  out.append(what);
  const measures = f ? measured(f) : `at ${mark.mm.map((v) => v.toFixed(1)).join(", ")} mm`;
  out.append(element("span", "measures", measures + (mark && mark.moved ? " · moved" : "")));
  const tags = element("span", "tags"),
    words = { hit: "hit", false: "false positive", ignored: "ignored" };
  if (verdict && verdict !== "open") tags.append(element("span", `tag ${verdict}`, verdict), " ");
  if (f && f.truth) tags.append(element("span", `tag ${f.truth}`, words[f.truth]));
  if (truth && !f.hits.some((n) => shows(String(n + 1))))
    tags.append(element("span", "tag missed", "missed"));
  out.append(tags);
  out.addEventListener("click", () => select(name));
  return out;
}

function measured(f) {
  const hu = f.mean_hu == null ? "" : ` · ${Math.round(f.mean_hu)} HU`;
  return `${lengths(f)} · ${Math.round(f.volume_mm3).toLocaleString("en")} mm³${hu}`;
}

function summarise() {
  const { facts } = view,
    left = facts.findings.filter((f) => f.probability >= view.threshold);
  const parts = [`<b>${left.length}</b> of ${facts.findings.length} findings`];
  if (facts.has_truth) {
    const hit = facts.lesions.filter((l) =>
      l.hits.some((n) => facts.findings[n].probability >= view.threshold),
    ).length;
    const wrong = left.filter((f) => f.truth === "false").length;
    parts.push(
      `<b>${hit}</b> of ${facts.lesions.length} lesions found`,
      `<b>${wrong}</b> false positive${wrong === 1 ? "" : "s"}`,
    );
  }
  $("summary").innerHTML = parts.join(" · "); // numbers only
  $("summary").title =
    "Whole findings and their masks are filtered; the probabilities of single voxels are not kept.";
}

function select(name) {
  if (!names().includes(name)) {
    // A case is opened at its first finding, where nobody asks for another one: to have none is no error.
    const none = name === "1" && !view.facts.findings.length;
    return say(none ? "Nothing was found" : `There is no finding ${name}`, !none);
  }
  view.selected = name;
  const asked = new URLSearchParams({ case: view.facts.name, finding: name });
  history.replaceState(null, "", `${location.pathname}#${asked}`);
  view.voxel = view.lattice.toVoxel(placeOf(name));
  const number = view.facts.classes.indexOf((lesionOf(name) || {}).label || markOf(name)?.class);
  if (number >= 0) $("class").value = number; // what is painted or added beside it is of its class
  list();
  $(`finding-${name}`).scrollIntoView({ block: "nearest" });
  $("findings").setAttribute("aria-activedescendant", `finding-${name}`);
  place();
}

function step(by) {
  const all = names().filter((n) => n.startsWith("t") || shows(n));
  if (all.length) select(all[(all.indexOf(view.selected) + by + all.length) % all.length]);
}

function setThreshold(value) {
  view.threshold = Math.min(1, Math.max(0, Math.round(100 * value) / 100));
  $("threshold").value = view.threshold;
  list();
  draw();
  draw3d();
}

// Judging: one thing after the other, so that the journal has them in the order they were done

function act(line) {
  const { facts } = view,
    reloads = !["brush", "finish"].includes(line.action);
  view.reloading += reloads;
  view.queue = view.queue.then(async () => {
    try {
      // With what it is based on: another window may have decided something since.
      const state = await ask(`/api/case/${facts.number}/act`, { ...line, after: facts.lines });
      view.cases[facts.number].state = state.finished ? "finished" : "begun";
      listCases();
      Object.assign(facts, state);
      if (facts !== view.facts) return;
      if (line.action === "add") view.selected = state.marks[state.marks.length - 1].finding;
      if (!names().includes(view.selected)) view.selected = names()[0] || "";
      list();
      if (reloads) await loadMask("decided");
      draw();
      draw3d();
      say(line.action === "finish" && state.finished ? "Finished: N leads to the next case" : "Saved");
    } catch (error) {
      say(error.message, true);
      if (line.action === "brush" && facts === view.facts) await loadMask("decided").catch(() => {});
    }
    view.reloading -= reloads;
  });
  return view.queue;
}

const ACTS = {
  accept: () => judge("accept"),
  reject: () => judge("reject"),
  move: () => judge("move"),
  undo: () => act({ action: "undo" }),
  add: () =>
    act({
      action: "add",
      mm: view.lattice.toMm(view.voxel),
      diameter_mm: Number($("diameter").value),
      label: label(),
    }),
  finish: () => act({ action: "finish", value: !view.facts.finished }),
  brush: () => setBrush(view.brush === "paint" ? "" : "paint"),
  erase: () => setBrush(view.brush === "erase" ? "" : "erase"),
};
const label = () => Number($("class").value) || 0;

function judge(action) {
  if (!markOf(view.selected)) return say("Select a finding first", true);
  const line = { action, finding: view.selected };
  if (action === "move") line.mm = view.lattice.toMm(view.voxel);
  const done = act(line);
  if (action !== "move") done.then(() => nextOpen());
}

function nextOpen() {
  if (view.reading) return;
  const open = view.facts.marks.filter((m) => m.verdict === "open" && shows(m.finding));
  if (open.length && !$("said").classList.contains("error")) select(open[0].finding);
}
