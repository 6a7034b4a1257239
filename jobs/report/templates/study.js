"use strict";
(() => {
  const { columns, rows } = JSON.parse(document.getElementById("data").textContent);
  const table = document.getElementById("table");
  const query = document.getElementById("query");
  const order = { column: null, falls: false };

  const make = (name, text) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const shown = (value) => {
    if (value === null) return "-";
    return typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : String(value);
  };
  const compared = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  };

  const head = make("thead");
  const heads = make("tr");
  columns.forEach((name, index) => {
    const cell = make("th");
    cell.scope = "col";
    const button = make("button", name);
    button.type = "button";
    button.addEventListener("click", () => {
      order.falls = order.column === index && !order.falls;
      order.column = index;
      draw();
    });
    cell.append(button);
    heads.append(cell);
  });
  head.append(heads);
  const body = make("tbody");
  table.append(head, body);

  const draw = () => {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) => {
      const text = row.map(shown).join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    if (order.column !== null) {
      found.sort((a, b) => compared(a[order.column], b[order.column]) * (order.falls ? -1 : 1));
    }
    [...heads.children].forEach((cell, index) => {
      cell.ariaSort = index === order.column ? (order.falls ? "descending" : "ascending") : "none";
    });
    body.replaceChildren(
      ...found.map((row) => {
        const line = make("tr");
        line.append(...row.map((value) => {
          const cell = make("td", shown(value));
          cell.className = "short";
          return cell;
        }));
        return line;
      }),
    );
    document.getElementById("found").textContent = `${found.length} of ${rows.length} rows`;
  };
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  query.addEventListener("input", draw);
  draw();
})();
