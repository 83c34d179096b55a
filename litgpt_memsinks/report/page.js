"use strict";
// What a point says, beside it at once, for pointers, fingers and arrow keys. Without this script each point has a title.
const tip = document.getElementById("tip");

function hide() {
  tip.hidden = true;
  for (const point of document.querySelectorAll(".point.on")) point.classList.remove("on");
}

function tell(point) {
  hide();
  point.classList.add("on");
  tip.textContent = point.told;
  tip.hidden = false;
  const at = point.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left + at.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
  const above = at.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above < 8 ? at.bottom + 8 : above}px`;
}

for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.firstElementChild;
  const points = [...svg.querySelectorAll(".point")].map((point) => {
    const title = point.querySelector("title");
    const at = point.transform.baseVal.getItem(0).matrix;
    point.told = title.textContent;
    title.remove(); // or the browser shows it as well
    return { point, x: at.e, y: at.f };
  });
  const ordered = [...points].sort((a, b) => a.x - b.x || a.y - b.y);
  let current = -1;
  plot.tabIndex = 0;
  plot.setAttribute("role", "group");
  plot.setAttribute("aria-label", `${svg.querySelector("title").textContent}: arrow keys go from point to point`);
  const follow = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let best = null, least = 20;
    for (const one of points) {
      const far = Math.hypot(one.x - x, one.y - y);
      if (far < least) [best, least] = [one, far];
    }
    if (!best) return hide();
    current = ordered.indexOf(best);
    tell(best.point);
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") return hide();
    if (!step || !ordered.length) return;
    event.preventDefault();
    current = (current + step + ordered.length) % ordered.length;
    tell(ordered[current].point);
  });
}
addEventListener("scroll", hide, { passive: true });

// Tables that are sorted by their heads.
for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.textContent = head.firstChild.textContent.trim();
    head.firstChild.replaceWith(" ");
    head.prepend(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const sign = down ? -1 : 1;
      const compare = (a, b) => {
        const [left, right] = [key(a), key(b)];
        if (left === "" || right === "") return (left === "") - (right === ""); // what was not measured comes last
        return sign * (isNaN(left) || isNaN(right) ? left.localeCompare(right) : left - right);
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(compare));
    });
  });
}
