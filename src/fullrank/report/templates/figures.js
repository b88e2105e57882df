/* Shared pieces, and the panels that draw: profiles, maps, spectra. */

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
  if (layout.title) { /* the page says it above the figure */
    delete layout.title;
    layout.margin = { ...layout.margin, t: DATA.template.layout.margin.t };
  }
  if (narrow()) {
    traces = structuredClone(traces);
    fitNarrow(traces, layout);
  }
  return Plotly.react(element, structuredClone(traces), layout, {
    responsive: true, displaylogo: false, displayModeBar: narrow() ? false : "hover", modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  });
}

/* On a phone: smaller numbers in cells, panels below each other, colour bars where they cost no width. */
function fitNarrow(traces, layout) {
  layout.margin = { ...DATA.template.layout.margin, ...layout.margin, l: 46, r: 8 };
  const maps = traces.filter((trace) => trace.type === "heatmap");
  for (const map of maps) Object.assign(map, { xgap: 1, ygap: 1, ...(map.texttemplate && { textfont: { ...map.textfont, size: 9 } }) });
  if (maps.length === 1) {
    const tall = layout.height - layout.margin.t - layout.margin.b;
    const below = { orientation: "h", x: 0.5, len: 1, yanchor: "top", y: -62 / tall };
    layout.coloraxis.colorbar = { ...layout.coloraxis.colorbar, ...below };
    return;
  }
  const count = maps.length;
  layout.height = count ? count * layout.height : layout.height;
  maps.forEach((map, index) => {
    const top = 1 - index / count;
    const bottom = top - 0.8 / count;
    const suffix = index ? String(index + 1) : "";
    layout[`xaxis${suffix}`].domain = [0, 1];
    layout[`yaxis${suffix}`].domain = [bottom, top];
    layout.annotations[index] = { ...layout.annotations[index], x: 0, y: top };
    if (map.colorbar) map.colorbar = { ...map.colorbar, y: (top + bottom) / 2, len: 0.8 / count, x: 1.01 };
  });
  if (count) layout.coloraxis.colorbar = { ...layout.coloraxis.colorbar, y: 1 - 0.4 / count, len: 0.8 / count, x: 1.01 };
}

function options(select, values, chosen) {
  const kept = values.map(String).includes(String(chosen)) ? chosen : values[0];
  select.replaceChildren(...values.map((value) => make("option", value, { value })));
  select.value = kept;
  select.closest("label").hidden = values.length < 2 && select.name !== "metric" && select.name !== "scope";
  select.disabled = values.length < 2;
}

function explain(paragraph, metric, scope) {
  const entry = DATA.terms[metric] || {};
  paragraph.replaceChildren(termOf(metric), document.createTextNode(entry.definition ? `: ${entry.definition} ` : " "));
  const ends = ["healthy", "collapsed"].filter((name) => entry[name]).map((name) => `${name}: ${entry[name]}`);
  if (ends.length) paragraph.append(make("span", ends.join(" · "), { class: "aside" }));
  paragraph.append(make("span", `${scope}: ${DATA.scopes[scope]}`, { class: "aside" }));
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
    const scopes = here.map((candidate) => candidate.scope);
    options(fields.scope, scopes, scopes.includes(state.scope) ? state.scope : source.headline[metric]);
    const one = here.find((candidate) => candidate.scope === fields.scope.value);
    explain(panel.querySelector(".meaning"), metric, one.scope);
    plot.setAttribute("role", "figure");
    plot.setAttribute("aria-label", `${metric}, ${one.place}, ${one.scope}; the numbers are in the section Table`);
    const other = fields.sheet && fields.sheet.checked; /* the same numbers as colours */
    if (fields.sheet) fields.log.disabled = other;
    draw(plot, other ? one.sheet : one.figure, fields.log && fields.log.checked && !other);
    const missing = (one.figure.layout.meta || {}).missing || [];
    panel.querySelector(".missing").textContent = missing.length ? `Not available: ${missing.join("; ")}` : "";
    after(state, fields, one);
  }
  form.addEventListener("change", (event) => {
    if (event.target.name === "scope") state.scope = event.target.value;
    show(fields.metric.value);
  });
  return show;
}

/* ------------------------------------------------------------ overview */

function showOpenings() {
  DATA.openings.forEach((one, index) => {
    for (const [name, said] of [["depth", "share of the stream particular to a token, over depth"], ["heads", "every head by entropy and selectivity"], ["theories", "similarity of tokens over depth, by theory"]]) {
      const element = byId(`opening-${name}-${index}`);
      if (!element) continue;
      element.closest("figure").hidden = !one[name];
      if (!one[name] || !element.offsetParent) continue;
      element.setAttribute("role", "figure");
      element.setAttribute("aria-label", said);
      draw(element, one[name]);
    }
  });
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
    ends.append(make("span", known[0] || "–"), make("span", known[known.length - 1] || "–"));
    button.append(make("b", one.metric, { title: one.metric }), sparkline(one), ends);
    button.addEventListener("click", () => showProfile(one.metric));
    return button;
  }));
}

const showProfile = chooser(byId("depth"), DATA.profiles, byId("profile"), fillSparks);
const showMap = chooser(byId("heads"), DATA.maps, byId("map"));
const showCourse = DATA.series ? chooser(byId("series"), DATA.series, byId("course")) : () => {};

/* ------------------------------------------------------------ contexts */

function showSlopes(state, fields, one) {
  const steep = byId("slopes");
  steep.closest(".steepness").hidden = !one.slopes;
  if (!one.slopes) return;
  steep.setAttribute("role", "figure");
  steep.setAttribute("aria-label", `${one.metric}, ${one.place}: change per doubling of the context`);
  draw(steep, one.slopes);
}

const showContext = DATA.contexts ? chooser(byId("contexts"), DATA.contexts, byId("by-context"), showSlopes) : () => {};

/* ------------------------------------------------------------ spectra */

function showSpectrum(place, layer, head) {
  const fields = byId("spectra").querySelector("form").elements;
  options(fields.place, unique(DATA.spectra.map((one) => one.place)), place ?? fields.place.value);
  const here = DATA.spectra.filter((one) => one.place === fields.place.value);
  options(fields.layer, unique(here.map((one) => one.layer)), layer ?? fields.layer.value);
  const heads = here.filter((one) => String(one.layer) === fields.layer.value);
  options(fields.head, heads.map((one) => one.head), head ?? fields.head.value);
  const one = heads.find((candidate) => String(candidate.head) === fields.head.value);
  byId("spectra").querySelector(".said").textContent = one.figure.layout.meta.said;
  draw(byId("scree"), one.figure, fields.log.checked);
}

if (DATA.spectra.length) {
  const form = byId("spectra").querySelector("form");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", () => showSpectrum());
}
