"use strict";
// Draws the curves and distributions from the numbers in the page. No library, no network.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Set();
  let axis = "steps";

  const LEFT = 52, RIGHT = 14, TOP = 8, BOTTOM = 22, COLOURS = 8, MAX_NAMED = 12, MAX_DOTS = 40;

  // ---- colours: a fixed few that are told apart well, evenly spread hues for more -------------------------------

  function colour(run) {
    if (data.runs.length <= COLOURS) return `var(--run-${run})`;
    return `oklch(var(--run-lightness) 0.15 ${Math.round((360 * run) / data.runs.length)})`;
  }
  for (const element of document.querySelectorAll("[data-run]")) {
    element.style.setProperty("--run", colour(Number(element.dataset.run)));
  }

  // ---- numbers as people read them -----------------------------------------------------------------------------

  function short(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
    return String(Number(value.toPrecision(3)));
  }
  function exact(value) {
    const size = Math.abs(value);
    return value !== 0 && (size >= 1e7 || size < 1e-4) ? value.toExponential(3) : String(Number(value.toPrecision(6)));
  }
  function timeUnit(longest) {
    if (longest < 180) return [1, "s"];
    return longest < 3 * 3600 ? [60, "min"] : [3600, "h"];
  }
  function ticks(low, high, wanted) {
    const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const found = [];
    for (let place = Math.ceil(low / step - 1e-9); place <= high / step + 1e-9; place += 1) found.push(place * step);
    return found;
  }

  // ---- drawing -------------------------------------------------------------------------------------------------

  function make(name, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }
  function range(values, padding) {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      if (value === null) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (low > high) return [0, 1];
    const spread = high - low || Math.abs(high) * 0.1 || 1;
    return [low - padding * spread, high + padding * spread];
  }
  function plane(svg, [left, right], [bottom, top], { xUnit = [1, ""], whole = false } = {}) {
    const width = svg.clientWidth, height = svg.clientHeight;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const group = svg.querySelector("g");
    group.replaceChildren();
    const span = right - left || 1;
    const x = (value) => LEFT + ((value - left) / span) * (width - LEFT - RIGHT);
    const y = (value) => height - BOTTOM - ((value - bottom) / (top - bottom)) * (height - TOP - BOTTOM);
    for (const value of ticks(bottom, top, 4)) {
      group.append(make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
      group.append(make("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    const [size, unit] = xUnit;
    let places = ticks(left / size, (left + span) / size, Math.max(2, Math.floor(width / 90)));
    if (whole) places = places.filter(Number.isInteger);
    for (const value of places) {
      const label = `${short(value)}${unit && " " + unit}`;
      const at = Math.min(x(value * size), width - 3.5 * label.length);
      group.append(make("text", { x: at, y: height - 6, "text-anchor": "middle" }, label));
    }
    return { group, x, y, width, height };
  }

  // A point that is not a number leaves a gap.
  function outline(curve, x, y) {
    let path = "", open = false;
    curve.values.forEach((value, place) => {
      const at = curve[axis][place];
      if (value === null || at === null) { open = false; return; }
      path += `${open ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      open = true;
    });
    return path;
  }

  function drawCurves(figure, chart) {
    const svg = figure.querySelector("svg");
    const shown = chart.curves.filter((curve) => !hidden.has(curve.run));
    const across = range(shown.flatMap((curve) => curve[axis]), 0);
    const up = range(shown.flatMap((curve) => curve.values), 0.05);
    const xUnit = axis === "seconds" ? timeUnit(across[1]) : [1, ""];
    const { group, x, y, width, height } = plane(svg, across, up, { xUnit, whole: axis === "steps" });
    for (const curve of shown) {
      const kind = curve.held_out ? "curve held-out" : "curve";
      const path = make("path", { class: kind, "data-run": curve.run, "data-field": curve.field, d: outline(curve, x, y) });
      path.style.setProperty("--run", colour(curve.run));
      group.append(path);
      if (curve.values.length > (curve.held_out ? MAX_DOTS : 1)) continue;
      curve.values.forEach((value, place) => {
        if (value === null || curve[axis][place] === null) return;
        const dot = make("circle", { cx: x(curve[axis][place]), cy: y(value), r: 2.5 });
        dot.style.setProperty("--run", colour(curve.run));
        group.append(dot);
      });
    }
    svg.querySelector("desc").textContent = shown.map(inWords).join("; ");
    figure.cursor = {
      places: [...new Set(shown.flatMap((curve) => curve[axis]))].filter((at) => at !== null).sort((a, b) => a - b),
      x, width, height,
      heading: (at) => (axis === "steps" ? `update ${at}` : `${short(at / xUnit[0])} ${xUnit[1]}`),
      rows: (at) => shown.map((curve) => [curveName(curve), nearest(curve, at), curve.run]).filter((row) => row[1] !== null),
    };
  }
  function curveName(curve) {
    return data.runs[curve.run] + (curve.held_out ? ", held out" : "");
  }
  function inWords(curve) {
    const known = curve.values.map((value, place) => [value, curve.steps[place]]).filter(([value]) => value !== null);
    if (!known.length) return `${curveName(curve)}: nothing finite`;
    const [first, last] = [known[0], known[known.length - 1]];
    return `${curveName(curve)}: ${exact(first[0])} at update ${first[1]}, ${exact(last[0])} at update ${last[1]}`;
  }
  // The curve's nearest point while the run lasted; of the few held-out points only the one right there.
  function nearest(curve, at) {
    let best = null, distance = Infinity, last = -Infinity;
    curve[axis].forEach((place, index) => {
      if (place === null || curve.values[index] === null) return;
      last = place;
      if (Math.abs(place - at) >= distance) return;
      distance = Math.abs(place - at);
      best = curve.values[index];
    });
    return (curve.held_out && distance > 0) || at > last ? null : best;
  }

  function drawHistogram(figure, histogram) {
    const svg = figure.querySelector("svg"), { edges, counts } = histogram;
    const groups = Object.entries(counts);
    const highest = Math.max(1, ...groups.flatMap(([, values]) => values));
    const { group, x, y, width, height } = plane(svg, [edges[0], edges[edges.length - 1]], [0, highest * 1.05]);
    for (const [name, values] of groups) {
      let path = `M${x(edges[0])} ${y(0)}`;
      values.forEach((count, bin) => { path += `V${y(count).toFixed(1)}H${x(edges[bin + 1]).toFixed(1)}`; });
      group.append(make("path", { class: `bars ${groups.length > 1 ? name : "all"}`, d: `${path}V${y(0)}Z` }));
    }
    const total = (values) => values.reduce((sum, count) => sum + count, 0);
    svg.querySelector("desc").textContent = groups
      .map(([name, values]) => `${name}: ${total(values)} values between ${exact(edges[0])} and ${exact(edges[edges.length - 1])} ${histogram.unit}`)
      .join("; ");
    const bin = (at) => Math.max(0, Math.min(edges.length - 2, edges.findLastIndex((edge) => edge <= at)));
    figure.cursor = {
      places: edges.slice(0, -1).map((edge, place) => (edge + edges[place + 1]) / 2),
      x, width, height,
      heading: (at) => `${exact(edges[bin(at)])} to ${exact(edges[bin(at) + 1])} ${histogram.unit}`,
      rows: (at) => groups.map(([name, values]) => [groups.length > 1 ? name : "pairs", values[bin(at)], null]),
    };
  }

  // ---- pointing at a value -------------------------------------------------------------------------------------

  function point(figure, at) {
    const { x, width, height, heading, rows } = figure.cursor, group = figure.querySelector("svg g");
    hide(figure);
    figure.at = at;
    group.append(make("line", { class: "cursor", x1: x(at), x2: x(at), y1: TOP, y2: height - BOTTOM }));
    const readout = figure.querySelector(".readout"), title = document.createElement("strong");
    title.textContent = heading(at);
    const found = rows(at), lines = found.slice(0, MAX_NAMED).map(([name, value, run]) => {
      const line = document.createElement("div"), label = document.createElement("span"), number = document.createElement("span");
      if (run !== null) {
        const swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.style.setProperty("--run", colour(run));
        label.append(swatch);
      }
      label.append(name);
      number.textContent = exact(value);
      line.append(label, number);
      return line;
    });
    readout.replaceChildren(title, ...lines);
    if (found.length > MAX_NAMED) readout.append(`and ${found.length - MAX_NAMED} more`);
    readout.hidden = false;
    const room = figure.clientWidth - readout.offsetWidth - 4;
    const beside = x(at) > width / 2 ? x(at) - readout.offsetWidth - 4 : x(at) + 20;
    readout.style.left = `${Math.max(4, Math.min(room, beside))}px`;
    readout.style.top = `${figure.querySelector("svg").offsetTop + 4 || 40}px`;
  }
  function hide(figure) {
    figure.at = null;
    figure.querySelector(".cursor")?.remove();
    figure.querySelector(".readout").hidden = true;
  }
  function listen(figure) {
    const svg = figure.querySelector("svg");
    svg.addEventListener("pointermove", (event) => {
      const { places, x } = figure.cursor, at = event.clientX - svg.getBoundingClientRect().left;
      if (!places.length) return;
      const distance = (place) => Math.abs(x(place) - at);
      point(figure, places.reduce((best, place) => (distance(place) < distance(best) ? place : best)));
    });
    svg.addEventListener("pointerleave", () => hide(figure));
    svg.addEventListener("blur", () => hide(figure));
    svg.addEventListener("keydown", (event) => {
      const { places } = figure.cursor, last = places.length - 1;
      const now = places.indexOf(figure.at);
      const next = { ArrowRight: Math.min(last, now + 1), ArrowLeft: now < 0 ? last : Math.max(0, now - 1), Home: 0, End: last }[event.key];
      if (event.key === "Escape") hide(figure);
      if (next === undefined || last < 0) return;
      event.preventDefault();
      point(figure, places[next]);
    });
  }

  // ---- all together --------------------------------------------------------------------------------------------

  function draw(figure) {
    if (!figure.querySelector("svg").clientWidth) return;
    hide(figure);
    if (figure.dataset.chart !== undefined) drawCurves(figure, data.charts[figure.dataset.chart]);
    else drawHistogram(figure, data.histograms[figure.dataset.histogram]);
  }
  const figures = document.querySelectorAll("figure.chart");
  const resized = new ResizeObserver((entries) => entries.forEach((entry) => draw(entry.target)));
  for (const figure of figures) {
    draw(figure);
    listen(figure);
    resized.observe(figure);
  }
  const controls = document.querySelector(".controls"), boxes = controls ? [...controls.querySelectorAll("[name=run]")] : [];
  function follow() {
    axis = controls.querySelector("[name=axis]:checked").value;
    hidden.clear();
    for (const box of boxes) if (!box.checked) hidden.add(Number(box.value));
    figures.forEach(draw);
  }
  controls?.addEventListener("change", follow);
  for (const button of controls?.querySelectorAll("button") ?? []) {
    button.addEventListener("click", () => {
      for (const box of boxes) box.checked = button.value === "all";
      follow();
    });
  }
})();
