/* One tooltip for every metric name, by mouse and by keyboard. */

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
