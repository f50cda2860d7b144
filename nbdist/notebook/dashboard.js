// Draws the data of panel_view.py; all texts are made there and only placed here.

const COLUMNS = ["rank", "device", "step", "loss", "samples/s", "memory", "time", "state"];
const TIMES = ["compute", "communication", "data", "idle"];
const SHORT = { communication: "comm" };
const ENDED = ["finished", "stopped", "failed"];
const FIRST_PING_MS = 100; // the front end may still be looking for a subshell beside the running cell
const UNREACHABLE_AFTER_MS = 3000;
const LONGEST_PING_MS = 60000;
const UNREACHABLE =
  "Clicks do not reach the kernel while this cell runs: ■ (interrupt the kernel) stops the run after its step; " +
  "with --background the buttons work everywhere.";

const drafts = new WeakMap(); // the text in the learning-rate field, in case the output is redrawn

function element(tag, className, parent, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function bar(parent) {
  const track = element("span", "nbdist-bar", parent);
  const fill = element("span", "", track);
  return (share) => {
    track.classList.toggle("nbdist-unknown", share === null);
    fill.style.width = share === null ? "100%" : `${(100 * share).toFixed(1)}%`;
  };
}

function times(parent) {
  const stack = element("span", "nbdist-times", parent);
  stack.setAttribute("role", "img");
  const parts = TIMES.map((name) => element("span", `nbdist-${name}`, stack));
  return (percents) => {
    const words = percents === null ? "not known yet" : TIMES.map((name, i) => `${name} ${percents[i]} %`).join(", ");
    if (stack.title === words) return;
    stack.title = words;
    stack.setAttribute("aria-label", words);
    parts.forEach((part, i) => (part.style.width = `${percents === null ? 0 : percents[i]}%`));
  };
}

function controls(parent, model) {
  const group = element("div", "nbdist-controls", parent);
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", "Controls");
  const pending = new Map();
  let answered = false;
  let late = false;

  function send(command, value) {
    pending.set(command, model.get("head").commands);
    model.send({ command, value });
    draw();
  }

  function button(name, title, command, value, text) {
    const made = element("button", "", group, text ?? name);
    made.type = "button";
    made.title = title;
    if (text) made.setAttribute("aria-label", name);
    made.onclick = () => send(command, value?.());
    return made;
  }

  const rate = () => parseFloat(model.get("head").lr);
  const buttons = Object.fromEntries(model.get("buttons").map(({ name, label, title }) => [name, button(label, title, name)]));
  const label = element("label", "nbdist-rate", group);
  element("span", "", label, "Learning rate");
  const field = element("input", "", label);
  field.type = "text";
  field.inputMode = "decimal";
  field.size = 8;
  field.spellcheck = false;
  field.autocomplete = "off";
  field.setAttribute("aria-label", "Learning rate");
  field.title = "Enter sets it, Escape leaves it as it is";
  const halve = button("Halve learning rate", "Halve the learning rate", "lr", () => String(rate() / 2), "÷2");
  const twice = button("Double learning rate", "Double the learning rate", "lr", () => String(rate() * 2), "×2");
  const changed = () => field.value !== (field.dataset.shown ?? "");
  field.oninput = () => drafts.set(model, field.value);
  field.onkeydown = (event) => {
    event.stopPropagation(); // or the notebook's own shortcuts would see the key
    if (event.key === "Escape") {
      field.value = field.dataset.shown ?? "";
      drafts.delete(model);
    } else if (event.key === "Enter" && changed()) {
      event.preventDefault();
      drafts.delete(model);
      send("lr", field.value);
    }
  };
  const draft = drafts.get(model);

  function draw() {
    const { state, lr, commands } = model.get("head");
    const over = ENDED.includes(state);
    for (const [command, before] of pending) if (commands > before || over) pending.delete(command);
    const waits = state === "queued";
    const unreachable = late && !answered;
    group.hidden = over;
    for (const [name, made] of Object.entries(buttons)) {
      made.disabled = unreachable || pending.has(name) || (waits && name !== "stop") || (name === "stop" && state === "stopping");
      made.setAttribute("aria-busy", String(pending.has(name)));
    }
    buttons.pause.hidden = state === "paused";
    buttons.resume.hidden = state !== "paused";
    const noRate = unreachable || pending.has("lr") || lr === "";
    for (const made of [field, halve, twice]) made.disabled = noRate;
    if (!pending.has("lr") && !(document.activeElement === field && changed()) && field.dataset.shown !== lr) {
      field.value = lr;
      field.dataset.shown = lr;
    }
  }

  draw();
  if (draft !== undefined) field.value = draft;
  return {
    draw,
    refused: () => {
      pending.clear();
      delete field.dataset.shown;
      draw();
    },
    setAnswered: (yes) => {
      answered = yes;
      late = !yes;
      draw();
    },
  };
}

function render({ model, el }) {
  const root = element("section", "nbdist-panel", el);
  const header = element("header", "", root);
  const name = element("div", "nbdist-name", header);
  const title = element("strong", "", name);
  const state = element("span", "nbdist-state", name);
  state.setAttribute("role", "status");
  const buttons = controls(header, model);

  const overall = bar(root);
  const progress = root.lastChild;
  progress.classList.add("nbdist-overall");
  progress.setAttribute("role", "progressbar");
  progress.setAttribute("aria-label", "Steps done");
  const facts = element("dl", "nbdist-facts", root);
  const values = new Map();

  const pictures = element("div", "nbdist-charts", root);
  const strip = element("div", "nbdist-strip", root);
  strip.setAttribute("role", "group");
  const wrapper = element("div", "nbdist-table", root);
  const table = element("table", "", wrapper);
  table.setAttribute("aria-label", "Engines");
  const headings = element("tr", "", element("thead", "", table));
  for (const column of COLUMNS) {
    const heading = element("th", `nbdist-${column.replace("/", "-")}`, headings, column === "time" ? "" : column);
    heading.scope = "col";
    if (column === "time") {
      for (const kind of TIMES) {
        element("i", `nbdist-${kind}`, heading);
        element("span", "", heading, SHORT[kind] ?? kind);
      }
    }
  }
  const body = element("tbody", "", table);
  const happened = element("ol", "nbdist-events", root);
  happened.setAttribute("aria-live", "polite");
  happened.setAttribute("aria-label", "Events");
  const hint = element("p", "nbdist-hint", root);
  hint.setAttribute("role", "status");
  let lines = new Map();
  let cells = new Map();
  let order = "";

  function drawHead() {
    const head = model.get("head");
    root.dataset.state = head.state;
    root.setAttribute("aria-label", `nbdist run: ${head.title}`);
    put(title, head.title);
    put(state, head.state);
    overall(head.share);
    if (head.share === null) progress.removeAttribute("aria-valuenow");
    else progress.setAttribute("aria-valuenow", String(Math.round(100 * head.share)));
    progress.setAttribute("aria-valuetext", `step ${head.facts[0][1]}`);
    for (const [key, value] of head.facts) {
      if (!values.has(key)) {
        const pair = element("div", "", facts);
        element("dt", "", pair, key);
        values.set(key, element("dd", "", pair));
      }
      put(values.get(key), value);
    }
    buttons.draw();
  }

  function newRow(rank) {
    const line = element("tr", "", body);
    line.dataset.rank = rank;
    const made = Object.fromEntries(
      COLUMNS.map((column) => {
        const cell = element(column === "rank" ? "th" : "td", `nbdist-${column.replace("/", "-")}`, line);
        if (column === "rank") cell.scope = "row";
        return [column, cell];
      }),
    );
    const share = bar(made.step);
    const count = element("span", "nbdist-count", made.step);
    return { line, made, share, count, time: times(made.time) };
  }

  function drawRows() {
    const { groups, strip: all } = model.get("rows");
    const key = JSON.stringify(groups.map(([group, ranks]) => [group, ranks.map(([rank]) => rank)]));
    if (key !== order) {
      order = key;
      body.replaceChildren();
      lines = new Map();
      for (const [group, ranks] of groups) {
        if (group) {
          const heading = element("th", "", element("tr", "nbdist-stage", body), group);
          heading.colSpan = COLUMNS.length;
          heading.scope = "rowgroup";
        }
        for (const [rank] of ranks) lines.set(rank, newRow(rank));
      }
    }
    for (const [, ranks] of groups) {
      for (const [rank, standing, about, where, step, share, loss, speed, memory, percents] of ranks) {
        const { line, made, share: setShare, count, time } = lines.get(rank);
        line.dataset.state = standing;
        line.title = about;
        put(made.rank, String(rank));
        put(made.device, where);
        setShare(share);
        put(count, step);
        put(made.loss, loss);
        put(made["samples/s"], speed);
        put(made.memory, memory);
        time(percents);
        put(made.state, standing);
      }
    }
    const [standings, heats] = all.length ? all : [[], []];
    strip.hidden = !all.length;
    strip.setAttribute("aria-label", `${heats.length} engines; the darker, the longer its step takes`);
    for (const [rank, heat] of heats.entries()) {
      const standing = standings[rank];
      if (!cells.has(rank)) {
        const cell = element("span", "", strip);
        cell.setAttribute("role", "img");
        cell.dataset.rank = rank;
        cells.set(rank, cell);
      }
      const cell = cells.get(rank);
      cell.dataset.state = standing;
      cell.style.setProperty("--heat", `${heat}%`);
      cell.title = `rank ${rank}: ${standing}`;
      cell.setAttribute("aria-label", cell.title);
    }
  }

  function drawCharts() {
    pictures.innerHTML = model.get("charts").join(""); // svg_chart.py has escaped the texts in them
  }

  function drawEvents() {
    const shown = model.get("events");
    while (happened.children.length > shown.length) happened.lastChild.remove();
    shown.forEach(([kind, text], i) => {
      const line = happened.children[i] ?? element("li", "", happened);
      line.className = `nbdist-${kind}`;
      put(line, text);
    });
  }

  function drawReply() {
    const { text } = model.get("reply");
    put(hint, text);
    if (text) buttons.refused();
  }

  const listeners = { head: drawHead, rows: drawRows, charts: drawCharts, events: drawEvents, reply: drawReply };
  for (const [trait, draw] of Object.entries(listeners)) model.on(`change:${trait}`, draw);
  // No version number tells whether clicks reach the kernel: ping it, ever more rarely, until it answers.
  let timer = null;
  const started = Date.now();
  const ping = (next) => {
    if (ENDED.includes(model.get("head").state)) return;
    if (Date.now() - started > UNREACHABLE_AFTER_MS) {
      buttons.setAnswered(false);
      put(hint, UNREACHABLE);
    }
    model.send({ command: "hello" });
    timer = setTimeout(ping, next, Math.min(2 * next, LONGEST_PING_MS));
  };
  const stopPinging = () => {
    clearTimeout(timer);
    buttons.setAnswered(true);
    if (hint.textContent === UNREACHABLE) put(hint, "");
  };
  model.on("change:received", stopPinging);
  ping(FIRST_PING_MS);
  for (const draw of Object.values(listeners)) draw();
  return () => {
    clearTimeout(timer);
    for (const [trait, draw] of Object.entries(listeners)) model.off(`change:${trait}`, draw);
    model.off("change:received", stopPinging);
  };
}

export default { render };
