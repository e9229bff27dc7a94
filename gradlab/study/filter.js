// Filters of long tables. A form with data-filter="ID" hides the rows (data-row) of the element with that id which its controls do
// not select, and every group (data-group, or a section) without a row left. A control named `scope` is compared with a row's data-scope: words
// of a text field must all occur, a selection must be one of those that semicolons separate, and of checkboxes with one name one must
// be equal. What shows a row once more has data-row="again" and is not counted. The address keeps the state.
for (const form of document.querySelectorAll("form[data-filter]")) {
  const table = document.getElementById(form.dataset.filter);
  const rows = [...table.querySelectorAll("[data-row]")];
  const counted = rows.filter((row) => row.dataset.row !== "again");
  const groups = [...table.querySelectorAll("[data-group], section")];
  const total = form.querySelector("output");
  const names = [...new Set([...form.elements].map((control) => control.name).filter(Boolean))];
  const passes = (row, name) => {
    const value = (row.dataset[name] ?? "").toLowerCase();
    const controls = [...form.querySelectorAll(`[name="${name}"]`)];
    if (controls[0].type === "checkbox") return controls.some((box) => box.checked && box.value.toLowerCase() === value);
    if (controls[0].tagName === "SELECT") return !controls[0].value || `;${value};`.includes(`;${controls[0].value.toLowerCase()};`);
    return controls[0].value.toLowerCase().split(/\s+/).every((word) => value.includes(word));
  };
  const apply = () => {
    for (const row of rows) row.hidden = !names.every((name) => passes(row, name));
    for (const group of groups) group.hidden = !group.querySelector("[data-row]:not([hidden])");
    total.value = `${counted.filter((row) => !row.hidden).length} of ${counted.length} rows`;
  };
  const remember = () => {
    const state = new URLSearchParams();
    for (const control of form.elements) {
      if (!control.name) continue;
      if (control.type === "checkbox" ? !control.checked : control.value)
        state.append(control.type === "checkbox" ? `no-${control.name}` : control.name, control.value);
    }
    history.replaceState(null, "", `${location.pathname}${state.size ? `?${state}` : ""}${location.hash}`);
  };
  const recall = new URLSearchParams(location.search);
  for (const control of form.elements) {
    if (!control.name) continue;
    if (control.type === "checkbox") control.checked = !recall.getAll(`no-${control.name}`).includes(control.value);
    else control.value = recall.get(control.name) ?? "";
  }
  const reveal = () => {
    const row = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!row || !table.contains(row)) return;
    if (row.hidden || row.closest("[hidden]")) form.reset(), apply();
    if (row.tagName === "DETAILS") row.open = true;
    row.scrollIntoView();
  };
  form.addEventListener("input", () => (apply(), remember()));
  form.addEventListener("reset", () => setTimeout(() => (apply(), remember())));
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", reveal);
  apply();
  reveal();
}
