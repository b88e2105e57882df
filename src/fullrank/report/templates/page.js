"use strict";
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const narrow = () => window.innerWidth < 640;
const unique = (values) => [...new Set(values)];

function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/* ------------------------------------------------------------ figures */

function draw(element, figure, logarithmic = false) {
  const layout = { ...structuredClone(figure.layout), template: DATA.template, autosize: true };
  let traces = figure.data;
  if (logarithmic) {
    layout.yaxis = { ...layout.yaxis, type: "log" };
    delete layout.yaxis.rangemode;
    for (const key of Object.keys(layout)) if (/^yaxis\d/.test(key)) layout[key].type = "log";
    layout.annotations = (layout.annotations || []).filter((note) => note.yref === "paper" || note.y > 0)
      .map((note) => (note.yref === "paper" ? note : { ...note, y: Math.log10(note.y) }));
    layout.shapes = (layout.shapes || []).filter((shape) => shape.y0 > 0);
  }
  if (narrow()) {
    layout.margin = { ...DATA.template.layout.margin, ...layout.margin, l: 46, r: 8 };
    const maps = traces.filter((trace) => trace.type === "heatmap");
    if (maps.length > 1) element.style.width = `${maps.length * 320}px`;
    traces = traces.map((trace) => (trace.texttemplate ? { ...trace, textfont: { size: 9 }, xgap: 1, ygap: 1 } : trace));
    if (layout.coloraxis) layout.coloraxis.colorbar = { ...layout.coloraxis.colorbar, orientation: "h", y: -0.2, x: 0.5, len: 1 };
  }
  return Plotly.react(element, structuredClone(traces), layout, {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  });
}

function options(select, values, chosen) {
  const kept = values.map(String).includes(String(chosen)) ? chosen : values[0];
  select.replaceChildren(...values.map((value) => make("option", value, { value })));
  select.value = kept;
  select.closest("label").hidden = values.length < 2 && select.name !== "metric" && select.name !== "scope";
  select.disabled = values.length < 2;
}

function explain(paragraph, metric) {
  const entry = DATA.terms[metric] || {};
  paragraph.replaceChildren(termOf(metric), document.createTextNode(entry.definition ? `: ${entry.definition} ` : " "));
  const ends = ["healthy", "collapsed"].filter((name) => entry[name]).map((name) => `${name}: ${entry[name]}`);
  if (ends.length) paragraph.append(make("span", ends.join(" · "), { class: "aside" }));
}

function termOf(metric) {
  return make("span", metric, { class: "term", tabindex: "0", "data-term": metric });
}

/* A panel in which a metric, a place and a scope choose one of several figures. */
function chooser(panel, source, plot, after = () => {}) {
  const form = panel.querySelector("form");
  const fields = form.elements;
  const state = { metric: source.first };
  form.addEventListener("submit", (event) => event.preventDefault());

  function show(metric = state.metric) {
    state.metric = metric;
    const ofMetric = source.figures.filter((one) => one.metric === metric);
    options(fields.metric, unique(source.figures.map((one) => one.metric)), metric);
    options(fields.place, unique(ofMetric.map((one) => one.place)), fields.place.value);
    const here = ofMetric.filter((one) => one.place === fields.place.value);
    options(fields.scope, here.map((one) => one.scope), state.scope || source.headline[metric]);
    const one = here.find((candidate) => candidate.scope === fields.scope.value);
    explain(panel.querySelector(".meaning"), metric);
    draw(plot, one.figure, fields.log && fields.log.checked);
    const missing = (one.figure.layout.meta || {}).missing || [];
    panel.querySelector(".missing").textContent = missing.length ? `Not available: ${missing.join("; ")}` : "";
    after(state, fields);
  }
  form.addEventListener("change", (event) => {
    if (event.target.name === "scope") state.scope = event.target.value;
    show(fields.metric.value);
  });
  return show;
}

/* ------------------------------------------------------------ depth */

const sparks = document.querySelector(".sparks");

function sparkline(one) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 140 34");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const traces = one.figure.data.filter((trace) => trace.mode === "lines+markers").slice(0, 6);
  const points = traces.flatMap((trace) => trace.x.map((x, i) => [x, trace.y[i]])).filter(([, y]) => y !== null);
  if (!points.length) return svg;
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  for (const trace of traces.reverse()) {
    let path = "";
    trace.x.forEach((x, i) => {
      if (trace.y[i] === null) return;
      const across = 140 * (x - left) / (right - left || 1);
      path += `${path ? "L" : "M"}${across.toFixed(1)} ${(32 - 30 * (trace.y[i] - low) / (high - low || 1)).toFixed(1)}`;
    });
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("d", path);
    line.setAttribute("fill", "none");
    line.setAttribute("stroke", trace.line.color);
    line.setAttribute("stroke-width", trace.line.width > 1.5 ? "1.6" : "1");
    line.setAttribute("vector-effect", "non-scaling-stroke");
    svg.append(line);
  }
  return svg;
}

function fillSparks(state, fields) {
  const shown = unique(DATA.profiles.figures.map((one) => one.metric)).map((metric) => {
    const here = DATA.profiles.figures.filter((one) => one.metric === metric && one.place === fields.place.value);
    return here.find((one) => one.scope === DATA.profiles.headline[metric]) || here[0];
  }).filter(Boolean);
  sparks.replaceChildren(...shown.map((one) => {
    const button = make("button", undefined, { type: "button", "aria-pressed": String(one.metric === state.metric) });
    const main = one.figure.data[0];
    const known = main ? main.customdata.filter((entry, i) => main.y[i] !== null).map((entry) => entry[1]) : [];
    const ends = make("span");
    ends.append(make("i", known[0] || "–"), make("i", known[known.length - 1] || "–"));
    button.append(make("b", one.metric, { title: one.metric }), sparkline(one), ends);
    button.addEventListener("click", () => showProfile(one.metric));
    return button;
  }));
}

const showProfile = chooser(byId("depth"), DATA.profiles, byId("profile"), fillSparks);
const showMap = chooser(byId("heads"), DATA.maps, byId("map"));

/* ------------------------------------------------------------ spectra */

function showSpectrum(place, layer, head) {
  const fields = byId("spectra").querySelector("form").elements;
  options(fields.place, unique(DATA.spectra.map((one) => one.place)), place ?? fields.place.value);
  const here = DATA.spectra.filter((one) => one.place === fields.place.value);
  options(fields.layer, unique(here.map((one) => one.layer)), layer ?? fields.layer.value);
  const heads = here.filter((one) => String(one.layer) === fields.layer.value);
  options(fields.head, heads.map((one) => one.head), head ?? fields.head.value);
  const one = heads.find((candidate) => String(candidate.head) === fields.head.value);
  draw(byId("scree"), one.figure, fields.log.checked);
}

if (DATA.spectra.length) {
  const form = byId("spectra").querySelector("form");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", () => showSpectrum());
}

/* ------------------------------------------------------------ table */

const ROW = 27;
const sheet = {
  order: null, sorted: null, down: false,
  text(column, row) {
    if (column.codes) return column.distinct[column.codes[row]] ?? "";
    if (column.shown) return column.shown[row];
    return column.values[row] === null ? "" : String(column.values[row]);
  },
  key(column, row) {
    if (column.codes) return column.distinct[column.codes[row]] ?? "";
    const value = column.values[row];
    return value === null ? null : Number(String(value).replace("inf", "Infinity"));
  },
};

function compare(column) {
  return (a, b) => {
    const [x, y] = [sheet.key(column, a), sheet.key(column, b)];
    if (x === null || y === null) return (x === null) - (y === null); /* missing last, either way */
    return (x < y ? -1 : x > y ? 1 : 0) * (sheet.down ? -1 : 1) || a - b;
  };
}

function arrange() {
  const words = byId("table").querySelector("form").elements.find.value.toLowerCase().split(/\s+/).filter(Boolean);
  const columns = DATA.table.columns;
  const holds = (row, word) => columns.some((column) => sheet.text(column, row).toLowerCase().includes(word));
  let rows = Array.from({ length: DATA.table.rows }, (_, index) => index);
  /* "layer 3" means the column layer holds exactly 3 */
  const joined = words.join(" ").replace(/\b(layer|head|n) (\d+)\b/g, "$1=$2").split(" ").filter(Boolean);
  for (const word of joined) {
    const [name, wanted] = word.split("=");
    const column = wanted !== undefined && columns.find((one) => one.name === name);
    rows = rows.filter((row) => (column ? sheet.text(column, row).toLowerCase() === wanted : holds(row, word)));
  }
  if (sheet.sorted !== null) rows.sort(compare(columns[sheet.sorted]));
  sheet.order = rows;
  byId("table").querySelector(".count").textContent =
    `${rows.length.toLocaleString("en")} of ${DATA.table.rows.toLocaleString("en")} rows`;
  byId("table").querySelector(".sheet").scrollTop = 0;
  paint();
}

function paint() {
  const box = byId("table").querySelector(".sheet");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 10);
  const last = Math.min(sheet.order.length, first + Math.ceil(box.clientHeight / ROW) + 24);
  const space = (rows) => {
    const line = make("tr", undefined, { class: "spacer" });
    line.append(make("td", undefined, { colspan: DATA.table.columns.length, style: `height:${rows * ROW}px` }));
    return line;
  };
  const lines = sheet.order.slice(first, last).map((row) => {
    const line = make("tr");
    for (const column of DATA.table.columns) {
      const cell = make("td", undefined, column.values ? { class: "right" } : {});
      if (column.name === "metric") cell.append(termOf(sheet.text(column, row)));
      else cell.textContent = sheet.text(column, row);
      line.append(cell);
    }
    return line;
  });
  box.querySelector("tbody").replaceChildren(space(first), ...lines, space(sheet.order.length - last));
}

function openTable() {
  if (sheet.order) return paint();
  const box = byId("table").querySelector(".sheet");
  const heading = make("tr");
  DATA.table.columns.forEach((column, index) => {
    const cell = make("th", undefined, { scope: "col", "aria-sort": "none", ...(column.values ? { class: "right" } : {}) });
    const button = make("button", column.name, { type: "button" });
    button.addEventListener("click", () => {
      sheet.down = sheet.sorted === index && !sheet.down;
      sheet.sorted = index;
      heading.querySelectorAll("th").forEach((one) => one.setAttribute("aria-sort", "none"));
      cell.setAttribute("aria-sort", sheet.down ? "descending" : "ascending");
      arrange();
    });
    cell.append(button);
    heading.append(cell);
  });
  box.querySelector("thead").replaceChildren(heading);
  box.addEventListener("scroll", () => window.requestAnimationFrame(paint), { passive: true });
  const form = byId("table").querySelector("form");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.find.addEventListener("input", arrange);
  form.elements.csv.addEventListener("click", downloadCsv);
  arrange();
}

function csv() {
  const quote = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const exact = (column, row) => (column.values ? String(column.values[row] ?? "") : sheet.text(column, row));
  const lines = sheet.order.map((row) => DATA.table.columns.map((column) => quote(exact(column, row))).join(","));
  return [DATA.table.columns.map((column) => column.name).join(","), ...lines].join("\r\n");
}

function downloadCsv() {
  const link = make("a", undefined, { download: "fullrank.csv" });
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.click();
  URL.revokeObjectURL(link.href);
}

/* ------------------------------------------------------------ definitions */

const tip = byId("tip");

function showTip(target) {
  const metric = target.dataset.term;
  const entry = DATA.terms[metric] || {};
  const facts = make("dl");
  for (const name of ["unit", "range", "healthy", "collapsed", "null", "source"]) {
    if (entry[name]) facts.append(make("dt", name), make("dd", entry[name]));
  }
  tip.replaceChildren(make("strong", metric), make("span", entry.definition || "not in this version's vocabulary"), facts);
  tip.hidden = false;
  target.setAttribute("aria-describedby", "tip");
  const [box, own] = [target.getBoundingClientRect(), tip.getBoundingClientRect()];
  const left = Math.min(Math.max(12, box.left), window.innerWidth - own.width - 12);
  const below = box.bottom + 8 + own.height < window.innerHeight;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 8 : Math.max(4, box.top - own.height - 8)) + window.scrollY}px`;
}

function hideTip() {
  tip.hidden = true;
  document.querySelectorAll("[aria-describedby='tip']").forEach((one) => one.removeAttribute("aria-describedby"));
}

for (const [on, off] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
  document.addEventListener(on, (event) => { if (event.target.closest?.("[data-term]")) showTip(event.target.closest("[data-term]")); });
  document.addEventListener(off, (event) => { if (event.target.closest?.("[data-term]")) hideTip(); });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

/* ------------------------------------------------------------ tabs */

const openings = {
  depth: () => DATA.profiles.first && showProfile(),
  heads: () => DATA.maps.first && showMap(),
  spectra: () => showSpectrum(),
  table: openTable,
};
const tabs = [...document.querySelectorAll("[role=tab]")];

function open(name, focus = false) {
  const chosen = tabs.find((tab) => tab.getAttribute("aria-controls") === name) || tabs[0];
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", String(tab === chosen));
    tab.tabIndex = tab === chosen ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  }
  hideTip();
  if (focus) chosen.focus();
  const section = chosen.getAttribute("aria-controls");
  if (openings[section]) openings[section]();
  if (location.hash.slice(1) !== section) history.replaceState(null, "", `#${section}`);
}

tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => open(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) open(tabs[(index + step + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
  });
});
window.addEventListener("hashchange", () => open(location.hash.slice(1)));
open(location.hash.slice(1));

let listening = false;
byId("heads").addEventListener("mouseenter", () => {
  const map = byId("map");
  if (listening || !DATA.spectra.length || !map.on) return;
  listening = true;
  map.on("plotly_click", ({ points: [point] }) => {
    const place = byId("heads").querySelector("form").elements.place.value;
    if (!DATA.spectra.some((one) => one.place === place && one.layer === point.y && one.head === point.x)) return;
    open("spectra");
    showSpectrum(place, point.y, point.x);
  });
});
})();
