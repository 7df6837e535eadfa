// Explorers and films: plain functions over the tables that the build put into the page.

// What menus are called, where the tables say it otherwise.
const called = { initialisation: "starting point", model: "starting point", task: "robot" };
const plainly = text => (called[text] || String(text)).replaceAll("_", " ");

// A labelled menu for each column named in `menus`; calls `draw` with the rows that fit.
function explore(box, { rows, menus, draw }) {
  const controls = box.appendChild(document.createElement("div"));
  controls.className = "controls";
  const chosen = {};
  const update = () => draw(rows.filter(row =>
    Object.entries(chosen).every(([name, menu]) =>
      menu.value === "all" || !(name in row) || String(row[name]) === menu.value)), chosen);
  for (const [name, values] of Object.entries(menus)) {
    const label = controls.appendChild(document.createElement("label"));
    const menu = document.createElement("select");
    label.append(plainly(name), menu);
    values.forEach(value => menu.add(new Option(String(value).replaceAll("_", " "), value)));
    menu.onchange = update;
    chosen[name] = menu;
  }
  const below = box.appendChild(document.createElement("div"));
  return [below, update];
}

const values = (rows, name) => [...new Set(rows.map(row => String(row[name])))];
const mean = numbers => numbers.reduce((sum, value) => sum + value, 0) / numbers.length;
const plain = { responsive: true, displayModeBar: false };
const aroundWhite = [[0, "#2166ac"], [0.5, "#ffffff"], [1, "#b2182b"]];

// One line a starting point: the mean of the seeds, and each seed thin.
function lines(box, { rows, menus, x, y, colours, measures }) {
  const draw = (fitting, chosen) => {
    const measure = chosen.measure.value, traces = [];
    for (const start of values(fitting, "initialisation")) {
      const own = fitting.filter(row => row.initialisation === start);
      const at = [...new Set(own.map(row => row[x]))].sort((a, b) => a - b);
      const line = { color: colours[start] || "#555555", width: 2.5 };
      const common = { legendgroup: start, mode: "lines" };
      const every = at.map(point => own.filter(row => row[x] === point).map(row => row[measure]));
      for (const seed of values(own, "seed")) {
        const one = at.map(point => mean(own.filter(row =>
          row[x] === point && String(row.seed) === seed).map(row => row[measure])));
        traces.push({ ...common, x: at, y: one, line: { ...line, width: 0.7 },
          name: `${start}, seed ${seed}`, showlegend: false });
      }
      traces.push({ ...common, x: at, y: every.map(mean), line, name: start });
    }
    const type = measure === "action_error" ? "log" : "linear";
    const layout = { xaxis: { title: { text: x } }, yaxis: { title: { text: measure.replaceAll("_", " ") }, type },
      margin: { t: 20, r: 10 }, legend: { orientation: "h", y: -0.25 } };
    Plotly.react(below, traces, layout, plain);
  };
  const [below, update] = explore(box, { rows, menus: { ...menus, measure: measures }, draw });
  below.className = "plot";
  update();
}

// Three maps, before, after and difference: side by side, on a narrow screen below each other.
function three(below, traces, look = {}) {
  const wide = below.clientWidth > 600, titles = ["before", "after", "difference"];
  const axes = ["", "2", "3"], layout = { annotations: [], plot_bgcolor: "#d8d8d8", margin: { t: 40, r: 10 },
    grid: { rows: wide ? 1 : 3, columns: wide ? 3 : 1, pattern: "independent", ygap: 0.25 } };
  axes.forEach((end, i) => {
    traces[i] = { type: "heatmap", showscale: false, ...traces[i], xaxis: "x" + end, yaxis: "y" + end };
    layout["xaxis" + end] = { ...look };
    layout["yaxis" + end] = { ...look, autorange: "reversed" };
    layout.annotations.push({ text: titles[i], showarrow: false, xref: `x${end} domain`,
      yref: `y${end} domain`, x: 0.5, y: 1, yanchor: "bottom" });
  });
  below.style.height = wide ? "" : "1100px";
  return Plotly.react(below, traces, layout, plain);
}

// Weights of one head between the three kinds of tokens.
function maps(box, { rows, menus, first, last }) {
  const kinds = values(rows, "query");
  const draw = fitting => {
    const grid = epoch => kinds.map(query => kinds.map(key => mean(fitting.filter(row =>
      row.query === query && row.key === key && row.epoch === epoch).map(row => row.weight))));
    const [before, after] = [grid(first), grid(last)];
    const change = after.map((line, i) => line.map((value, j) => value - before[i][j]));
    const look = { x: kinds, y: kinds, texttemplate: "%{z:.2f}",
      hovertemplate: "%{y} looks at %{x}: %{z:.3f}<extra></extra>" };
    const all = { ...look, colorscale: "Blues", reversescale: true, zmin: 0, zmax: 1 };
    three(below, [{ ...all, z: before }, { ...all, z: after },
      { ...look, z: change, colorscale: aroundWhite, zmid: 0 }]);
  };
  const [below, update] = explore(box, { rows, menus, draw });
  below.className = "plot";
  update();
  window.addEventListener("resize", update);
}

// Weights of one head on one window, token by token, below the window's frames.
function windows(box, { models, menus, context }) {
  const kinds = ["R̂", "s", "a"], tokens = 3 * context, steps = [...Array(context).keys()];
  const name = i => `${kinds[i % 3]} of step ${Math.floor(i / 3) + 1}`;
  const rows = text => { // for each head, rows of weights without the future
    const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
    const numbers = new DataView(bytes.buffer), heads = [];
    for (let at = 0; at < bytes.length;) {
      const own = [];
      for (let i = 0; i < tokens; i++) {
        own.push(Array.from({ length: i + 1 }, (_, j) => numbers.getUint16(at + 2 * j, true) / 65535));
        at += 2 * (i + 1);
      }
      heads.push(own);
    }
    return heads;
  };
  const times = (weights, others) => weights.map((row, i) =>
    row.map((value, j) => Math.log2(Math.max(value, 1e-5) / Math.max(others[i][j], 1e-5))));
  const even = Array.from({ length: tokens }, (_, i) => Array(i + 1).fill(1 / (i + 1)));
  const draw = (_, { model, block, head, window }) => {
    const [before, after] = ["before", "after"].map(when =>
      rows(models[model.value][when][block.value][window.value]));
    [...head.options].forEach((option, i) => { option.disabled = i >= before.length; });
    if (head.selectedOptions[0].disabled) head.value = "0";
    const [old, now] = [before[head.value], after[head.value]];
    const words = old.map((row, i) => row.map((value, j) => `${name(i)} looks at ${name(j)}:<br>`
      + `before ${value.toFixed(3)}, after ${now[i][j].toFixed(3)}, even ${even[i][j].toFixed(3)}`));
    const all = { colorscale: aroundWhite, zmin: -3, zmax: 3, text: words,
      hovertemplate: "%{text}<extra></extra>" };
    frames.forEach(frame => {
      frame.className = "";
      frame.firstChild.style.backgroundImage = `url(windows/${window.value}.webp)`;
    });
    const ticks = { tickvals: steps.filter(i => i % 5 === 4).map(i => 3 * i + 1),
      ticktext: steps.filter(i => i % 5 === 4).map(i => i + 1), showgrid: false, zeroline: false };
    return three(below, [times(old, even), times(now, even), times(now, old)].map(z =>
      ({ ...all, z })), ticks);
  };
  const [under, update] = explore(box, { rows: [], menus, draw });
  const strip = under.appendChild(document.createElement("div"));
  strip.className = "frames";
  strip.role = "img";
  strip.ariaLabel = `The robot at each of the ${context} steps`;
  const frames = steps.map(i => {
    const frame = strip.appendChild(document.createElement("span"));
    frame.append(document.createElement("i"), `step ${i + 1}`);
    frame.firstChild.style.backgroundPosition = `${100 * i / (context - 1)}% 0`;
    return frame;
  });
  const below = under.appendChild(document.createElement("div"));
  below.className = "plot";
  update().then(() => below.on("plotly_hover", ({ points: [{ x, y }] }) =>
    frames.forEach((frame, i) => {
      frame.classList.toggle("from", i === Math.floor(y / 3));
      frame.classList.toggle("to", i === Math.floor(x / 3));
    })));
  window.addEventListener("resize", update);
}

// One line a verdict, that opens: the rule, the effect with its interval, the notebook.
function verdicts(box, { rows, menus }) {
  const marks = { supported: "●", undecided: "○", "not supported": "✕" };
  const draw = fitting => {
    below.replaceChildren(`${fitting.length} of ${rows.length} verdicts.`);
    for (const row of fitting) {
      const item = below.appendChild(document.createElement("details"));
      const title = item.appendChild(document.createElement("summary"));
      title.textContent = `${marks[row.verdict]} ${row.verdict}: ${row.claim} (${row.section}; `
        + `${row.measure}; ${row.task})`;
      const ends = row.low === null ? "" : ` [${row.low.toPrecision(3)}, ${row.high.toPrecision(3)}]`;
      const text = item.appendChild(document.createElement("p"));
      text.textContent = `Rule: ${row.rule}. Effect: ${row.effect?.toPrecision(3)}${ends}, `
        + `threshold ${row.threshold}, ${row.seeds} seeds, profile ${row.profile}. `;
      const link = text.appendChild(document.createElement("a"));
      link.href = `../notebooks/${row.page}.html`;
      link.textContent = "The notebook.";
    }
  };
  const [below, update] = explore(box, { rows, menus, draw });
  update();
}

// A click plays a film or stops it; the button starts all films at the same time.
function films(box) {
  const all = [...box.querySelectorAll("img")];
  const show = (image, end) => { image.src = image.dataset.film + end; };
  const plays = image => image.src.endsWith("webp");
  const toggle = image => show(image, plays(image) ? ".png" : ".webp");
  all.forEach(image => {
    image.onclick = () => toggle(image);
    image.onkeydown = event => event.key === "Enter" && toggle(image);
  });
  box.querySelector("button").onclick = () => {
    const stop = all.some(plays);
    all.forEach(image => show(image, stop ? ".png" : ".webp"));
  };
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".explorer").forEach(box => {
    const given = JSON.parse(box.querySelector("script").textContent);
    ({ lines, maps, verdicts, windows })[given.kind](box, given);
  });
  document.querySelectorAll(".film-gallery").forEach(films);
});

// What scrolls sideways can be reached and scrolled with the keyboard.
function reachable() {
  document.querySelectorAll("table, pre, .cell_output, mjx-container").forEach(box => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else if (!box.matches("mjx-container")) box.removeAttribute("tabindex");
  });
}
window.addEventListener("load", reachable);
window.addEventListener("resize", reachable);
