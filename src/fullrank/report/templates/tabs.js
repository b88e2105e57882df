/* Sections as tabs; a figure is drawn when its section is first seen. */

const openings = {
  overview: () => showOpenings(),
  series: () => showCourse(),
  depth: () => DATA.profiles.first && showProfile(),
  heads: () => DATA.maps.first && showMap(),
  contexts: () => showContext(),
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
}

/* #/depth names a section without being any element's id, to which the browser would scroll */
const asked = () => location.hash.replace(/^#\//, "");

tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => {
    open(tab.getAttribute("aria-controls"));
    history.replaceState(null, "", `#/${tab.getAttribute("aria-controls")}`);
  });
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) open(tabs[(index + step + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
  });
});
document.querySelectorAll("details.variant").forEach((one) => one.addEventListener("toggle", () => showOpenings()));
window.addEventListener("hashchange", () => open(asked()));
open(asked());

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
