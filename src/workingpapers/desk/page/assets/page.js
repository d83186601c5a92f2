// What the pages do in the browser besides htmx: sorting of tables, copying of code, "/" for the search box, and
// opening what an address points into. Every page reads as well without it.
"use strict";

const words = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}

function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === ""); // what was not measured comes last
  const difference = Number(a) - Number(b);
  return Number.isNaN(difference) ? words.compare(a, b) : difference;
}

function sort(table, header) {
  const rising = header.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const column = header.cellIndex;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [first, second] = [valueOf(a, column), valueOf(b, column)];
    const order = compare(first, second);
    return rising || first === "" || second === "" ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

function makeSortable(table) {
  for (const header of table.querySelectorAll("thead th")) {
    if (header.querySelector("button")) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sort(table, header));
    header.append(button);
  }
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // pages that came by plain http have no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser refused");
}

function makeCopyable(box) {
  if (box.querySelector("button")) return;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-live", "polite");
  button.addEventListener("click", async () => {
    try {
      await copy(box.querySelector("pre").textContent.trimEnd());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Press Ctrl+C";
      getSelection().selectAllChildren(box.querySelector("pre"));
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  box.append(button);
}

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
}

function improve(root) {
  root.querySelectorAll("table.sortable").forEach(makeSortable);
  root.querySelectorAll(".code").forEach(makeCopyable);
}

improve(document);
document.addEventListener("htmx:load", (event) => improve(event.target));
if (location.hash) openTarget();
addEventListener("hashchange", openTarget);
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, select, textarea, [contenteditable]");
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  document.getElementById("find")?.focus();
});
