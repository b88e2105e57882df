/* All rows: searched, sorted, and only the visible ones in the document. */

const ROW = 27;
/* what is the same in every row is said once, above */
const isConstant = (column) => column.codes && column.distinct.length === 1 && column.name !== "metric";
const SHOWN = DATA.table.columns.filter((column) => !isConstant(column));
const FIRST = ["report", "variant", "layer", "head", "metric", "value", "stderr"]; /* on a phone, what fits without scrolling */
const rank = (column) => (FIRST.includes(column.name) ? FIRST.indexOf(column.name) : FIRST.length);
if (narrow()) SHOWN.sort((a, b) => rank(a) - rank(b));
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
  if (sheet.sorted !== null) rows.sort(compare(SHOWN[sheet.sorted]));
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
    line.append(make("td", undefined, { colspan: SHOWN.length, style: `height:${rows * ROW}px` }));
    return line;
  };
  const lines = sheet.order.slice(first, last).map((row) => {
    const line = make("tr");
    for (const column of SHOWN) {
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
  SHOWN.forEach((column, index) => {
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
  const constant = DATA.table.columns.filter((column) => isConstant(column) && column.distinct[0]);
  byId("table").querySelector(".constant").textContent = constant.length
    ? `In every row: ${constant.map((column) => `${column.name} ${column.distinct[0]}`).join(", ")}.` : "";
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
