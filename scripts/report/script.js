"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const first = data.reports ? data.reports[0] : data;
  const column = Object.fromEntries(first.linears.columns.map((name, i) => [name, i]));
  const tip = document.getElementById("tip");
  const quick = window.matchMedia("(prefers-reduced-motion: reduce)");

  // --- what a cell or a mark tells

  const digits = (value) => (value === 0 ? "0" : Math.abs(value) < 1e-5 ? value.toExponential(2) : String(Number(value.toPrecision(3))));

  function linesOf(element) {
    if (element.dataset.tip) return element.dataset.tip.split("\n");
    const i = Number(element.dataset.i);
    const row = first.linears.rows[i];
    const get = (name) => row[column[name]];
    const place = `block ${get("block")}` + (get("expert") === null ? "" : `, expert ${get("expert")}`);
    const lines = [`${get("kind")} · ${place}`];
    const difference = element.closest("[data-difference]");
    if (difference) {
      const number = Number(difference.dataset.difference);
      const other = data.reports[number + 1].linears.rows[i][column.bpw];
      const change = data.differences[number].bpw[i];
      lines.push(`${get("bpw").toFixed(2)} → ${other.toFixed(2)} bits (${change > 0 ? "+" : ""}${change.toFixed(2)})`);
      return lines;
    }
    if (element.closest("table").classList.contains("tokens")) {
      lines[0] = place;
      const seen = first.coverage[get("block")][get("expert")];
      lines.push(`${seen.toLocaleString("en")} calibration tokens`);
      return lines;
    }
    lines.push(`${get("bpw").toFixed(2)} bits a weight`);
    if (get("error") !== null) lines.push(`relative error ${digits(100 * get("error"))} %`);
    if (get("nats") !== null) lines.push(`predicted ${digits(get("nats"))} nats`);
    if (get("tokens") !== null) lines.push(`${get("tokens").toLocaleString("en")} calibration tokens`);
    lines.push(`groups ${get("groups")}`);
    return lines;
  }

  // --- one tooltip for all of them, on hover, on focus and on touch

  let shownFor = null;

  function show(element) {
    if (shownFor === element) return;
    hide();
    shownFor = element;
    tip.replaceChildren(...linesOf(element).map((text) => Object.assign(document.createElement("div"), { textContent: text })));
    tip.hidden = false;
    element.setAttribute("aria-describedby", "tip");
    element.classList.add("looked-at");
    const box = element.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), width - own.width - 8);
    const above = box.top - own.height - 8;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(above > 0 ? above : box.bottom + 8) + window.scrollY}px`;
  }

  function hide() {
    if (!shownFor) return;
    shownFor.removeAttribute("aria-describedby");
    shownFor.classList.remove("looked-at");
    shownFor = null;
    tip.hidden = true;
  }

  const told = (target) => (target instanceof Element ? target.closest("[data-i], [data-tip]") : null);
  document.addEventListener("pointerover", (event) => {
    const element = told(event.target);
    if (element) show(element);
    else if (shownFor !== document.activeElement) hide();
  });
  document.addEventListener("focusin", (event) => {
    const element = told(event.target);
    if (element) show(element);
    else hide();
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });

  // --- heat maps and charts are one stop of the Tab key each; arrow keys walk inside

  function walkable(members, width) {
    if (!members.length) return;
    let at = 0;
    members.forEach((element, i) => {
      element.tabIndex = i ? -1 : 0;
      element.addEventListener("focus", () => {
        members[at].tabIndex = -1;
        at = i;
        element.tabIndex = 0;
      });
      if (element.tagName === "TD") element.addEventListener("click", () => element.focus({ preventScroll: true }));
    });
    members[0].parentNode.closest("table, svg").addEventListener("keydown", (event) => {
      const start = at - (at % width);
      const goals = {
        ArrowRight: width === members.length || at % width < width - 1 ? at + 1 : at,
        ArrowLeft: width === members.length || at % width > 0 ? at - 1 : at,
        ArrowDown: at + (width === members.length ? 1 : width),
        ArrowUp: at - (width === members.length ? 1 : width),
        Home: event.ctrlKey ? 0 : start,
        End: event.ctrlKey ? members.length - 1 : start + width - 1,
      };
      const goal = goals[event.key];
      if (goal === undefined) return;
      event.preventDefault();
      if (members[goal]) members[goal].focus({ preventScroll: false });
    });
  }
  for (const table of document.querySelectorAll("table.heat")) {
    walkable([...table.tBodies[0].querySelectorAll("td")], table.tBodies[0].rows[0].cells.length - 1);
  }
  for (const table of document.querySelectorAll("table.bought")) walkable([...table.querySelectorAll(".shares")], 1);
  for (const chart of document.querySelectorAll("svg.chart")) {
    const marks = [...chart.querySelectorAll(".mark")];
    walkable(marks, marks.length);
  }

  // --- the theme: as the system has it, or as chosen here

  const button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  let theme = "auto";
  function paint() {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  }
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    paint();
  });
  button.hidden = false;
  paint();
  if (!quick.matches) document.documentElement.classList.add("smooth");
})();
