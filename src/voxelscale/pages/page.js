for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value;
    const rows = [...table.tBodies[0].rows].sort((a, b) =>
      (column ? value(a) - value(b) : value(a).localeCompare(value(b))) * (up ? 1 : -1));
    table.tBodies[0].append(...rows);
  }));
}
for (const box of document.querySelectorAll(".wide, .scroll")) {
  const hint = document.createElement("p");
  hint.className = "hint";
  hint.textContent = "more to the right: scroll sideways \u2192";
  box.before(hint);
  const look = () => { hint.hidden = box.scrollWidth - box.clientWidth < 4; };
  addEventListener("resize", look);
  look();
}
for (const box of document.querySelectorAll(".toggles input"))
  box.addEventListener("change", () => document.body.classList.toggle("hide-" + box.name, !box.checked));
