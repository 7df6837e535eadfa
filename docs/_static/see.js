// Explorers and films: plain functions over the tables that the build put into the page.

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
    label.append(name.replaceAll("_", " "), menu);
    values.forEach(value => menu.add(new Option(value)));
    menu.onchange = update;
    chosen[name] = menu;
  }
  const below = box.appendChild(document.createElement("div"));
  return [below, update];
}

const values = (rows, name) => [...new Set(rows.map(row => String(row[name])))];
const mean = numbers => numbers.reduce((sum, value) => sum + value, 0) / numbers.length;
const plain = { responsive: true, displaylogo: false };

// One line a starting point: the mean of the seeds, their range, and each seed thin.
function lines(box, { rows, menus, x, y, colours, measures }) {
  const draw = (fitting, chosen) => {
    const measure = chosen.measure.value, traces = [];
    for (const start of values(fitting, "initialisation")) {
      const own = fitting.filter(row => row.initialisation === start);
      const at = [...new Set(own.map(row => row[x]))].sort((a, b) => a - b);
      const line = { color: colours[start] || "#555555", width: 2.5 };
      const common = { legendgroup: start, mode: "lines" };
      const every = at.map(point => own.filter(row => row[x] === point).map(row => row[measure]));
      const band = [...every.map(v => Math.max(...v)), ...every.map(v => Math.min(...v)).reverse()];
      traces.push({ ...common, x: [...at, ...at.slice().reverse()], y: band, fill: "toself",
        line: { width: 0, color: line.color }, opacity: 0.25, hoverinfo: "skip", showlegend: false });
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

// Weights of one head between the three kinds of tokens: before, after, difference.
function maps(box, { rows, menus, first, last }) {
  const kinds = values(rows, "query");
  const draw = fitting => {
    const grid = epoch => kinds.map(query => kinds.map(key => mean(fitting.filter(row =>
      row.query === query && row.key === key && row.epoch === epoch).map(row => row.weight))));
    const [before, after] = [grid(first), grid(last)];
    const change = after.map((line, i) => line.map((value, j) => value - before[i][j]));
    const look = { type: "heatmap", x: kinds, y: kinds, texttemplate: "%{z:.2f}", showscale: false,
      hovertemplate: "%{y} looks at %{x}: %{z:.3f}<extra></extra>" };
    const all = { ...look, colorscale: "Blues", reversescale: true, zmin: 0, zmax: 1 };
    const traces = [{ ...all, z: before }, { ...all, z: after, xaxis: "x2", yaxis: "y2" },
      { ...look, z: change, colorscale: "RdBu", zmid: 0, xaxis: "x3", yaxis: "y3" }];
    const titles = ["before", "after", "difference"].map((text, i) => ({ text, showarrow: false,
      xref: "paper", yref: "paper", x: (i + 0.5) / 3, y: 1.1 }));
    const layout = { grid: { rows: 1, columns: 3, pattern: "independent" }, annotations: titles,
      margin: { t: 50, r: 10 } };
    for (const axis of ["yaxis", "yaxis2", "yaxis3"]) layout[axis] = { autorange: "reversed" };
    Plotly.react(below, traces, layout, plain);
  };
  const [below, update] = explore(box, { rows, menus, draw });
  below.className = "plot";
  update();
}

// One line a verdict, that opens: the rule, the effect with its interval, the notebook.
function verdicts(box, { rows, menus }) {
  const marks = { supported: "●", "not supported": "○", undecided: "–" };
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
    ({ lines, maps, verdicts })[given.kind](box, given);
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
