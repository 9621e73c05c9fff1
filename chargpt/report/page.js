"use strict";
// What the page can do beyond showing: choose the curves' axis and variants, read their points, sort the table.
// The drawing follows chargpt/report/charts.py, which made the first one.
{
  const { variants, curves } = JSON.parse(document.getElementById("data").textContent);
  const COLUMN = { steps: 0, tokens: 1, seconds: 2 }; // of a point; column 3 is the loss
  const SIDE = 1000;
  const WIDTH = 0.99;
  const plot = document.querySelector(".plot");
  const svg = plot.querySelector("svg");
  const ticks = plot.querySelector(".ticks");
  const runs = [...plot.querySelectorAll(".run")]; // in the order of `curves`
  const marker = plot.querySelector(".point");
  const tip = plot.querySelector(".tip");
  const controls = document.getElementById("curves");
  const boxes = [...controls.querySelectorAll("[name=variant]")];
  document.documentElement.classList.add("scripted");

  // ------------------------------------------------------------------------------------------------------- drawing

  let view; // axis, the runs that are visible, and the functions from a point to 0 … 1 in the drawing
  let picked = null; // [run, index of its point] under the pointer or the keyboard

  const axis = () => controls.querySelector("[name=axis]:checked").value;

  function draw() {
    const column = COLUMN[axis()];
    // A run whose times are not known has no place on the axis of seconds.
    const visible = curves.map((curve) => boxes[curve.variant].checked && curve.val.length > 0 && curve.val[0][column] !== null);
    const shown = curves.filter((_, run) => visible[run]);
    const training = controls.querySelector("[name=train]").checked;
    pick(null);
    runs.forEach((line, run) => line.toggleAttribute("hidden", !visible[run]));
    ticks.replaceChildren();
    view = { visible, column };
    if (shown.length === 0) return;

    const xs = shown.flatMap((curve) => curve.val.map((point) => point[column]));
    const losses = shown.flatMap((curve) => curve.val.map((point) => point[3])).sort((a, b) => a - b);
    const ends = shown.flatMap((curve) => [curve.val.at(-1)[3], training && curve.train.length ? curve.train.at(-1)[3] : losses[0]]);
    let [left, right] = [Math.min(...xs), Math.max(...xs)];
    if (left === right) [left, right] = [left / 1.5, right * 1.5];
    const top = Math.max(losses[Math.ceil(0.9 * losses.length) - 1], ...ends);
    const bottom = Math.min(losses[0], ...ends);
    const margin = Math.max((top - bottom) * 0.05, 0.01);
    const [low, high] = [bottom - margin, top + margin];
    const across = (value) => WIDTH * Math.log(value / left) / Math.log(right / left);
    view.x = (point) => across(point[column]);
    view.y = (point) => (high - point[3]) / (high - low);

    runs.forEach((line, run) => {
      if (!visible[run]) return;
      line.querySelector(".val").setAttribute("d", path(curves[run].val));
      line.querySelector(".end").setAttribute("d", `${path(curves[run].val.slice(-1))}h0`);
      line.querySelector(".train").setAttribute("d", training ? path(curves[run].train) : "");
    });
    for (const [value, label] of linearTicks(low, high, 8)) {
      const y = `${100 * (high - value) / (high - low)}%`;
      add("line", { class: "grid", x1: 0, x2: "100%", y1: y, y2: y });
      add("text", { x: -8, y, dy: 4, "text-anchor": "end" }, label);
    }
    for (const [value, label] of logTicks(left, right)) {
      const x = `${100 * across(value)}%`;
      add("line", { class: "grid", y1: 0, y2: "100%", x1: x, x2: x });
      add("text", { x, y: "100%", dy: 18, "text-anchor": "middle" }, label);
    }
    plot.querySelector(".unit").textContent = axis();
  }

  const path = (points) =>
    points.length ? "M" + points.map((point) => `${round(SIDE * view.x(point))} ${round(SIDE * view.y(point))}`).join("L") : "";

  const round = (value) => Math.round(value * 10) / 10;

  function add(name, attributes, text = "") {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    ticks.append(element);
  }

  function linearTicks(low, high, most) {
    let step = 10 ** Math.floor(Math.log10((high - low) / most));
    step *= [1, 2, 5, 10].find((factor) => (high - low) / (step * factor) <= most);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const values = [];
    for (let n = Math.ceil(low / step - 1e-9); n <= high / step + 1e-9; n++) values.push([n * step, (n * step).toFixed(digits)]);
    return values;
  }

  function logTicks(low, high) {
    const factors = Math.log10(high / low) > 3 ? [1] : [1, 2, 5];
    const values = [];
    for (let exponent = Math.floor(Math.log10(low)); exponent <= Math.ceil(Math.log10(high)); exponent++)
      for (const factor of factors) values.push(factor * 10 ** exponent);
    return values.filter((value) => low <= value && value <= high).map((value) => [value, short(value)]);
  }

  function short(value) {
    for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (value >= size) return Number((value / size).toPrecision(3)) + unit;
    return String(Number(value.toPrecision(3)));
  }

  // ------------------------------------------------------------------------------------------------------- reading

  /** Show the values of a point, or of none; the other runs step back. */
  function pick(choice) {
    picked = choice;
    plot.classList.toggle("picking", choice !== null);
    runs.forEach((line, run) => line.classList.toggle("picked", choice !== null && run === choice[0]));
    marker.toggleAttribute("hidden", choice === null);
    tip.hidden = choice === null;
    if (choice === null) return;
    const [run, index] = choice;
    const curve = curves[run];
    const point = curve.val[index];
    const [x, y] = [view.x(point), view.y(point)];
    marker.setAttribute("cx", `${100 * x}%`);
    marker.setAttribute("cy", `${100 * y}%`);
    for (const element of [marker, tip]) element.style.setProperty("--colour", getComputedStyle(runs[run]).getPropertyValue("--colour"));
    tip.textContent =
      `${variants[curve.variant]}, seed ${curve.seed}\nloss ${point[3].toFixed(4)}\n` +
      `step ${point[0].toLocaleString("en")}\n${point[1].toLocaleString("en")} tokens\n${point[2].toLocaleString("en")} seconds`;
    const [frame, outer] = [svg.getBoundingClientRect(), plot.getBoundingClientRect()];
    const [left, top] = [frame.left - outer.left + x * frame.width, frame.top - outer.top + y * frame.height];
    tip.style.left = `${left > outer.width / 2 ? left - tip.offsetWidth - 14 : left + 14}px`;
    tip.style.top = `${Math.min(Math.max(top - tip.offsetHeight / 2, 0), outer.height - tip.offsetHeight)}px`;
  }

  /** The visible point next to a place on the screen, if one is within 60 pixels. */
  function nearest(clientX, clientY) {
    const frame = svg.getBoundingClientRect();
    let [choice, least] = [null, 60];
    curves.forEach((curve, run) => {
      if (!view.visible[run]) return;
      curve.val.forEach((point, index) => {
        const y = view.y(point);
        if (y < 0) return; // above the drawing
        const distance = Math.hypot(frame.left + view.x(point) * frame.width - clientX, frame.top + y * frame.height - clientY);
        if (distance < least) [choice, least] = [[run, index], distance];
      });
    });
    return choice;
  }

  function key(event) {
    const visible = curves.map((_, run) => run).filter((run) => view.visible[run]);
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") return pick(null);
    if (!(event.key in moves) || visible.length === 0) return;
    event.preventDefault();
    if (picked === null) return pick([visible[0], curves[visible[0]].val.length - 1]);
    const [other, along] = moves[event.key];
    const run = visible.at((visible.indexOf(picked[0]) + other) % visible.length);
    const last = curves[run].val.length - 1;
    const index = picked[1] === curves[picked[0]].val.length - 1 && other ? last : picked[1] + along;
    pick([run, Math.min(Math.max(index, 0), last)]);
  }

  controls.addEventListener("change", draw);
  controls.addEventListener("click", ({ target }) => {
    if (!target.dataset.show) return;
    for (const box of boxes) box.checked = target.dataset.show === "all";
    draw();
  });
  plot.addEventListener("pointermove", (event) => pick(nearest(event.clientX, event.clientY)));
  plot.addEventListener("pointerdown", (event) => pick(nearest(event.clientX, event.clientY)));
  plot.addEventListener("pointerleave", () => pick(null));
  plot.addEventListener("keydown", key);
  plot.addEventListener("blur", () => pick(null));
  addEventListener("resize", () => pick(null));
  // Pointing at a variant's name brings its runs forward.
  for (const label of controls.querySelectorAll(".legend [data-variant]")) {
    const lines = runs.filter((line) => line.dataset.variant === label.dataset.variant);
    const forward = (on) => {
      plot.classList.toggle("picking", on);
      for (const line of lines) line.classList.toggle("picked", on);
    };
    label.addEventListener("pointerenter", () => forward(true));
    label.addEventListener("pointerleave", () => forward(false));
  }
  draw();

  // --------------------------------------------------------------------------------------------------------- table

  const body = document.querySelector("tbody");
  const headings = [...document.querySelectorAll("thead th")];
  headings.forEach((heading, column) =>
    heading.firstElementChild.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const value = (row) => row.children[column].dataset.value;
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b) * (descending ? -1 : 1);
      const rows = [...body.rows].sort((a, b) => {
        const [left, right] = [value(a), value(b)];
        if (left === "" || right === "") return (left === "") - (right === ""); // what is missing comes last
        return compare(left, right);
      });
      body.append(...rows);
    }),
  );
}
