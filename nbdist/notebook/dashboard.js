// Draws the view that Python sends; all texts are made there, here they are only placed.
function element(tag, className, parent) {
  const made = document.createElement(tag);
  made.className = className;
  parent.append(made);
  return made;
}

function bar(share) {
  const track = document.createElement("span");
  track.className = "nbdist-bar";
  const fill = element("span", "", track);
  const set = (value) => {
    track.classList.toggle("nbdist-unknown", value === null);
    fill.style.width = `${100 * (value ?? 1)}%`;
  };
  set(share);
  return { track, set };
}

const COLUMNS = ["rank", "device", "state", "step", "progress", "loss", "speed", "memory"];

function render({ model, el }) {
  const root = element("section", "nbdist-panel", el);
  root.setAttribute("aria-label", "nbdist run");
  const head = element("header", "", root);
  const title = element("strong", "", head);
  const state = element("span", "nbdist-state", head);
  state.setAttribute("role", "status");
  const stop = element("button", "", head);
  stop.type = "button";
  stop.textContent = "Stop";
  stop.title = "Stop all ranks after this step; the weights come home";
  stop.onclick = () => {
    stop.disabled = true;
    model.send({ command: "stop" });
  };
  const overall = element("div", "nbdist-overall", root);
  const progress = bar(null);
  progress.track.setAttribute("role", "progressbar");
  overall.append(progress.track);
  const step = element("span", "", overall);
  const facts = element("span", "nbdist-facts", overall);
  const table = element("table", "", root);
  const headings = element("tr", "", element("thead", "", table));
  for (const name of COLUMNS) element("th", "", headings).textContent = name;
  const body = element("tbody", "", table);
  const epoch = element("p", "nbdist-epoch", root);
  const notes = element("p", "nbdist-notes", root);
  notes.setAttribute("aria-live", "polite");
  const error = element("p", "nbdist-error", root);
  const rows = new Map();

  function row(rank) {
    if (!rows.has(rank)) {
      const line = element("tr", "", body);
      line.dataset.rank = rank;
      const cells = Object.fromEntries(COLUMNS.map((name) => [name, element("td", `nbdist-${name}`, line)]));
      const share = bar(null);
      cells.progress.append(share.track);
      rows.set(rank, { line, cells, share });
    }
    return rows.get(rank);
  }

  function draw() {
    const view = model.get("view");
    root.dataset.state = view.state;
    title.textContent = view.title;
    state.textContent = view.state;
    stop.hidden = !["starting", "running", "recovering"].includes(view.state);
    progress.set(view.share);
    progress.track.setAttribute("aria-valuenow", Math.round(100 * (view.share ?? 0)));
    progress.track.setAttribute("aria-label", view.step);
    step.textContent = view.step;
    facts.textContent = view.facts;
    epoch.textContent = view.epoch;
    notes.textContent = view.notes;
    error.textContent = view.error;
    for (const rank of view.ranks) {
      const { line, cells, share } = row(rank.rank);
      line.dataset.state = rank.state;
      line.title = `rank ${rank.rank} on ${rank.host}`;
      for (const name of COLUMNS) if (name !== "progress") cells[name].textContent = rank[name];
      share.set(rank.share);
    }
  }

  model.on("change:view", draw);
  draw();
  return () => model.off("change:view", draw);
}

export default { render };
