"use strict";
// Text reaches the page as text nodes and attributes only; nothing here parses markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#3b82c4", "#d9822b", "#3f9b5b", "#b5485d", "#8466b8", "#80756b", "#c06aa8", "#7f8c28"];
const GREY = "#8a919b";
const SVG = "http://www.w3.org/2000/svg";
const SEVERAL = DATA.runs.length > 1;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const number = (x) => x === 0 || (Math.abs(x) >= 0.001 && Math.abs(x) < 1e5) ? String(+x.toPrecision(4)) : x.toExponential(1);
const percent = (x) => x === null || x === undefined ? "–" : `${(100 * x).toFixed(1)} %`;
const whole = (x) => Math.round(x).toLocaleString("en");
const figure = (content, ...captions) =>
  element("figure", {}, content, ...captions.map((c) => element("figcaption", { class: "name", title: c }, c)));
function table(rows, headed = false) {
  return element("div", { class: "scroll" }, element("table", {}, ...rows.map((row, i) =>
    element("tr", {}, ...row.map((cell) => element(headed && i === 0 ? "th" : "td", {}, String(cell)))))));
}

const main = document.querySelector("main");
function section(title, hint) {
  main.append(element("h2", {}, title), element("p", { class: "hint" }, hint));
}
function part(title, hint) {
  main.append(element("h3", {}, title), element("p", { class: "hint" }, hint));
}
const tip = element("div", { id: "tip", hidden: "" });
document.body.append(tip);
function showTip(event, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const left = event.clientX + 14 + tip.offsetWidth > innerWidth ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4))}px`;
}
const hideTip = () => { tip.hidden = true; };
addEventListener("scroll", hideTip);

// ---- pictures of patches

/** Gives a picture of rows × columns patches its size: the longer side is `rem` long. */
function sized(node, { rows, columns }, rem) {
  const longer = Math.max(rows, columns);
  node.style.width = `${rem * columns / longer}rem`;
  node.style.height = `${rem * rows / longer}rem`;
  return node;
}
function pixels(map, rem, colourOf) {
  const canvas = element("canvas", { width: map.columns, height: map.rows, class: "patches" });
  const context = canvas.getContext("2d"), image = context.createImageData(map.columns, map.rows);
  for (let i = 0; i < map.rows * map.columns; i++) image.data.set([...colourOf(i), 255], 4 * i);
  context.putImageData(image, 0, 0);
  return sized(canvas, map, rem);
}
const photo = (map, rem, alt = map.name) => sized(element("img", { src: map.image, alt }), map, rem);
// Dark blue over green to yellow: rises in lightness, so that it also reads in grey print.
const STOPS = [[35, 20, 75], [45, 95, 140], [50, 165, 125], [245, 225, 70]];
function heat(x) {
  const place = Math.max(0, Math.min(1, x)) * (STOPS.length - 1), k = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[k].map((low, c) => low + (STOPS[k + 1][c] - low) * (place - k));
}

// ---- curves, by uPlot

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const charts = [];
let smooth = true;
const UNITS = { share: percent, percent };

/** As ``smoothed`` of charts.py. */
function running(values) {
  const weight = Math.min(0.5, Math.max(0.05, 15 / values.length));
  let mean = values[0];
  return values.map((value) => (mean += weight * (value - mean)));
}
/** The place nearest to `at` where the series has a value: not every metric has one at every step. */
function nearest(plot, series, at) {
  const values = plot.data[series];
  for (let d = 0; d < values.length; d++) {
    if (values[at - d] != null) return at - d;
    if (values[at + d] != null) return at + d;
  }
  return at;
}
function chart(spec) {
  const lines = DATA.runs.flatMap((run, r) => spec.keys.map((key, k) => ({ run, r, key, k, points: run.curves[key] })))
    .filter((line) => line.points && line.points[0].length);
  if (!lines.length) return null;
  const card = element("div", { class: "card chart", "data-title": spec.title }, element("strong", {}, spec.title));
  if (spec.hint) card.append(element("div", { class: "hint" }, spec.hint));
  const smoothing = !spec.exact && lines.some((line) => line.points[0].length > 3);
  const unit = UNITS[spec.axis] ?? number;
  const noun = (line) => [SEVERAL && line.run.name, spec.keys.length > 1 && line.key].filter(Boolean).join(" · ") || line.key;
  const tables = [], series = [{ label: "step", value: (_, x) => x === null ? "–" : whole(x) }];
  for (const line of lines) {
    const colour = COLOURS[(SEVERAL ? line.r : line.k) % COLOURS.length], dash = SEVERAL && line.k ? [2 + 4 * line.k, 3] : undefined;
    const few = line.points[0].length < 30;
    tables.push(line.points);
    series.push({
      label: noun(line), dash, spanGaps: true, width: 1.5, points: { show: few, size: 5 },
      stroke: () => smoothing && smooth ? colour + "59" : colour,
      value: (_, y) => y == null ? "–" : unit(y),
    });
    if (smoothing) {
      tables.push([line.points[0], running(line.points[1])]);
      series.push({ label: "", class: "running", stroke: colour, dash, spanGaps: true, width: 2, show: smooth, points: { show: false } });
    }
  }
  const values = lines.flatMap((line) => line.points[1]);
  const scale = { range: undefined };
  if (spec.axis === "share") scale.range = [0, 1];
  if (spec.axis === "zero") scale.range = (_, low, high) => [Math.min(0, low), high > 0 ? 1.08 * high : 1];
  if (spec.axis === "log" && values.every((v) => v > 0)) scale.distr = 3;
  const axis = { stroke: () => css("--soft"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  const place = element("div");
  card.append(place);
  const width = () => Math.max(160, place.clientWidth);
  charts.push({ card, place, spec, make: () => {
    const plot = new uPlot({
      width: width(), height: 180, series, padding: [8, 8, 0, 0],
      scales: { x: { time: false }, y: scale },
      axes: [{ ...axis, space: 60, size: 28, values: (_, marks) => marks.map(whole) },
        { ...axis, size: 56, values: (_, marks) => marks.map((y) => y === null ? "" : unit(y)) }],
      cursor: { drag: { x: true, y: false }, dataIdx: (u, s, at) => s ? nearest(u, s, at) : at, y: false },
      legend: { live: true },
    }, uPlot.join(tables.map(([x, y]) => [x, y])), place);
    new ResizeObserver(() => plot.setSize({ width: width(), height: 180 })).observe(place);
    return plot;
  } });
  return card;
}
function drawCharts() {
  for (const c of charts) c.plot ??= c.make();
}
function setSmooth(on) {
  smooth = on;
  for (const { plot } of charts) {
    plot.series.forEach((s, i) => { if (s.class === "running") plot.setSeries(i, { show: on }); });
    plot.redraw(false);
  }
}
for (const query of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(query).addEventListener("change", () => charts.forEach((c) => c.plot.redraw(false, true)));
}
const grid = (cards) => element("div", { class: "grid" }, ...cards.filter(Boolean));
const chartsOf = (name) => DATA.charts.filter((c) => c.part === name).map(chart).filter(Boolean);

// ---- 1

const ANSWERS = { yes: "Yes, it is learning", partly: "Partly", no: "Not by this measure", unknown: "Not known yet" };

function verdict() {
  section("Is it learning?", "Look for probes that rise above raw pixels and the untrained network.");
  if (SEVERAL) {
    const row = (name, of) => [name, ...DATA.runs.map((run) => of(run) ?? "–")];
    const first = (run) => run.verdict.measured[0];
    main.append(table([
      row("", (run) => run.name),
      row("learning?", (run) => ANSWERS[run.verdict.answer]),
      row("measured by", (run) => first(run)?.by),
      row("trained", (run) => first(run) && percent(first(run).trained)),
      row("raw pixels", (run) => first(run) && percent(first(run).pixels)),
      row("untrained", (run) => first(run) && percent(first(run).untrained)),
      row("best", (run) => first(run)?.best && `${percent(first(run).best)} at step ${whole(first(run).best_step)}`),
      row("steps", (run) => run.summary.steps === undefined ? null : `${whole(run.summary.steps)} of ${whole(run.summary.total_steps)}`),
      row("images per second", (run) => run.verdict.rate && whole(run.verdict.rate)),
      row("limited by", (run) => run.verdict.limits),
      row("diagnosis", (run) => run.findings && (run.findings.map(([, sentence]) => sentence).join(" ") || "nothing wrong was noticed")),
    ], true));
  }
  for (const run of DATA.runs) {
    const { answer, sentence, measured, best, speed } = run.verdict;
    if (SEVERAL) main.append(element("h3", {}, run.name));
    main.append(element("p", { class: `verdict ${answer}` }, element("strong", {}, `${ANSWERS[answer]}. `), sentence));
    if (measured.length && !SEVERAL) main.append(table([["measured by", "trained", "raw pixels", "untrained"],
      ...measured.map((m) => [m.step === null ? m.by : `${m.by}, step ${whole(m.step)}`, percent(m.trained), percent(m.pixels), percent(m.untrained)])], true));
    for (const text of [best, speed].filter(Boolean)) main.append(element("p", {}, text));
    if (run.findings?.length) main.append(...run.findings.map(([step, text]) =>
      element("p", { class: "note finding" }, element("strong", {}, `Step ${whole(step)}: `), text)));
    else if (run.findings && run.logged) main.append(element("p", {}, "Diagnosis: nothing wrong was noticed in the metrics."));
    main.append(...run.missing.map((text) => element("p", { class: "note missing" }, text)));
  }
  main.append(grid(chartsOf("probes")));
}

// ---- 2

function seen(run) {
  section("What the network saw", "Crops should still show what matters in your images, and the two global crops share something. " +
    "First the image with where it was cut: solid the global, dashed the local crops. Then the crops as cut, and below them as " +
    "the network got them: colours changed, masked patches of the student's global crops grey.");
  const cards = run.seen.map((s) => {
    const [height, width] = s.size;
    const place = element("div", { class: "boxes" }, element("img", { src: s.image, alt: s.name }));
    place.style.aspectRatio = `${width} / ${height}`;
    place.style.width = `${9 * width / Math.max(width, height)}rem`;
    s.boxes.forEach(([top, left, h, w], i) => {
      const box = element("div", { class: i < 2 ? `box global${i}` : "box" });
      Object.assign(box.style, { top: `${100 * top / height}%`, left: `${100 * left / width}%`, height: `${100 * h / height}%`, width: `${100 * w / width}%` });
      place.append(box);
    });
    const masked = (source, mask) => {
      const side = 192, canvas = element("canvas", { class: "crop", width: side, height: side }), image = new Image();
      const edge = side / s.columns;
      image.onload = () => {
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0, side, side);
        context.fillStyle = "rgb(128 128 128 / .88)";
        mask.forEach((on, i) => on && context.fillRect((i % s.columns) * edge, Math.floor(i / s.columns) * edge, edge, edge));
      };
      image.src = source;
      return canvas;
    };
    const row = (title, crops, globalOf) => element("div", { class: "row" }, element("span", { class: "hint label" }, title),
      ...crops.slice(0, 2).map(globalOf),
      ...crops.slice(2).map((src) => element("img", { class: "local", src, alt: `local crop ${title}` })));
    return element("div", { class: "card" }, element("div", { class: "name" }, s.name),
      element("div", { class: "crops" }, place, element("div", { class: "cuts" },
        row("as cut", s.before, (src) => element("img", { class: "crop", src, alt: "global crop as cut" })),
        row("as seen", s.after, (src, i) => masked(src, s.masks[i])))));
  });
  main.append(element("div", { class: "wide grid" }, ...cards));
}

// ---- 3

function learned(run) {
  const found = run.learned;
  section("What it learned", `Made by the teacher (the average of the student over time) of step ${whole(found.step)}, on ` +
    (found.sampled === found.images ? `all ${whole(found.images)} images.` : `a sample of ${whole(found.sampled)} images, evenly spaced among ${whole(found.images)}.`));
  part("Patch features as colours", "Parts of one kind should have one colour in all images: three principal components, common to all of them, as red, green and blue. " +
    (found.hides ? "The background by the first component is dark." : "The first component tells whole images apart rather than background from foreground, so nothing is hidden."));
  main.append(element("div", { class: "row", id: "pca" }, ...found.maps.map((m) => {
    const colours = bytes(m.pca), foreground = bytes(m.foreground);
    return figure(element("div", { class: "row" }, photo(m, 9),
      pixels(m, 9, (i) => !found.hides || foreground[i] ? colours.subarray(3 * i, 3 * i + 3) : [24, 24, 30])), m.name);
  })));
  similarity(found);
  part("Attention of the cls token, per head", "Heads that look at different parts are a good sign. Last block; in each map the brightest 2 % of the patches are yellow.");
  const rem = innerWidth < 600 ? 4.6 : 5.5;
  main.append(element("div", { class: "columns", id: "attention" }, ...found.maps.map((m) => element("div", { class: "row" }, photo(m, rem),
    ...m.attention.map((head) => { const a = bytes(head); return pixels(m, rem, (i) => heat(a[i] / 255)); })))));
  if (found.neighbours.length) neighbours(found);
  if (found.positions) embeddingMap(found);
}

function similarity(found) {
  const width = found.patches.width;
  part("Similarity to a patch", `Click a patch, in a photo or a map: yellow is similar to it, in all images. It should light up what is alike, not what is near. ` +
    `Cosine similarity, scaled to its range here, from ${width} directions that hold ${percent(found.patches.kept)} of the features.`);
  const values = Float32Array.from(bytes(found.patches.values), (b) => b - 128);
  for (let i = 0; i < values.length; i += width) {
    const row = values.subarray(i, i + width), norm = Math.hypot(...row) || 1;
    row.forEach((v, j) => { row[j] = v / norm; });
  }
  const maps = element("div", { class: "row", id: "similarity" });
  function select(image, patch) {
    const at = found.maps[image].start + patch, chosen = values.subarray(at * width, (at + 1) * width);
    const all = new Float32Array(values.length / width);
    for (let i = 0; i < all.length; i++) {
      let sum = 0;
      for (let j = 0; j < width; j++) sum += chosen[j] * values[i * width + j];
      all[i] = sum;
    }
    const low = Math.min(...all);
    maps.replaceChildren(...found.maps.map((m, b) => {
      const canvas = pixels(m, 9, (i) => heat((all[m.start + i] - low) / (1 - low || 1)));
      const view = element("div", { class: "boxes" }, photo(m, 9, `choose a patch of ${m.name}`));
      const patchAt = (target, event) => {
        const box = target.getBoundingClientRect();
        const place = (from, start, size, count) => Math.min(count - 1, Math.max(0, Math.floor((from - start) / size * count)));
        return place(event.clientY, box.top, box.height, m.rows) * m.columns + place(event.clientX, box.left, box.width, m.columns);
      };
      const cells = element("div", { class: "boxes" }, canvas);
      for (const target of [view, cells]) {
        if (b === image) {
          const mark = element("div", { class: "mark" });
          Object.assign(mark.style, { left: `${100 * (patch % m.columns) / m.columns}%`, top: `${100 * Math.floor(patch / m.columns) / m.rows}%`, width: `${100 / m.columns}%`, height: `${100 / m.rows}%` });
          target.append(mark);
        }
        target.classList.add("click");
        target.addEventListener("click", (event) => select(b, patchAt(target, event)));
        target.addEventListener("pointermove", (event) => showTip(event, all[m.start + patchAt(target, event)].toFixed(3)));
        target.addEventListener("pointerleave", hideTip);
      }
      return figure(element("div", { class: "row" }, view, cells), m.name);
    }));
  }
  const { rows, columns } = found.maps[0];
  select(0, Math.floor(rows / 2) * columns + Math.floor(columns / 2));
  main.append(maps);
}

function neighbours(found) {
  const share = found.sameLabel === null ? "" : ` Of the nearest neighbours ${percent(found.sameLabel)} have the image's label; of images drawn blindly ${percent(found.byChance)} would.`;
  part("Nearest neighbours", "First of each row: the image, then its neighbours among the sample, with their cosine similarity. Neighbours should show the same kind of thing." + share);
  const columns = element("div", { class: "columns" });
  for (const [good, title] of [[true, found.sameLabel === null ? "The closest" : "Good ones: the same label, and close"],
    [false, found.sameLabel === null ? "The loneliest: odd images, or mistakes" : "Bad ones: neighbours of other labels"]]) {
    const column = element("div", {}, element("h4", {}, title));
    columns.append(column);
    for (const n of found.neighbours.filter((one) => one.good === good)) column.append(element("div", { class: "row neighbours" },
      ...[n.query, ...n.rows].map((i, k) => {
        const image = element("img", { src: found.thumbnails[i], alt: found.names[i], title: found.names[i] });
        if (found.labels && found.labels[i] !== found.labels[n.query]) image.classList.add("other");
        return figure(image, ...(found.labels ? [found.labels[i]] : []), k ? n.similarities[k - 1].toFixed(3) : "image");
      })));
  }
  main.append(columns);
}

function embeddingMap(found) {
  part("Map of the images", `Point at a dot to see its image. Near dots are images with like features (${found.projection})` +
    (found.labels ? "; colours are labels, which the network never saw. Labels that keep together are a good sign." : "."));
  const counts = new Map();
  for (const label of found.labels ?? []) counts.set(label, (counts.get(label) ?? 0) + 1);
  const shown = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a)).slice(0, COLOURS.length);
  const colourOf = (label) => COLOURS[shown.indexOf(label)] ?? GREY;
  const card = element("div", { class: "card" }), svg = document.createElementNS(SVG, "svg");
  const [width, height] = innerWidth < 600 ? [360, 320] : [900, 460];
  for (const [key, value] of Object.entries({ viewBox: `0 0 ${width} ${height}`, id: "map", role: "img", "aria-label": "map of the images" })) svg.setAttribute(key, value);
  const spread = [0, 1].map((k) => { const all = found.positions.map((p) => p[k]); return [Math.min(...all), Math.max(...all)]; });
  const place = (v, [low, high], size) => 12 + (size - 24) * (high > low ? (v - low) / (high - low) : 0.5);
  const dots = found.positions.map(([x, y], i) => {
    const dot = document.createElementNS(SVG, "circle");
    const [cx, cy] = [place(x, spread[0], width), place(y, spread[1], height)];
    for (const [key, value] of Object.entries({ cx, cy, r: 5, fill: found.labels ? colourOf(found.labels[i]) : COLOURS[0], "fill-opacity": 0.8 })) dot.setAttribute(key, value);
    svg.append(dot);
    return { dot, cx, cy };
  });
  let active = null;
  const leave = () => { active?.dot.setAttribute("r", 5); active = null; hideTip(); };
  function point(event) {
    const box = svg.getBoundingClientRect(), scale = width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const gap = (d) => Math.hypot(d.cx - x, d.cy - y);
    const near = dots.reduce((a, b) => gap(b) < gap(a) ? b : a);
    if (active !== near) leave();
    if (gap(near) > 24 * scale) return leave();
    active = near;
    near.dot.setAttribute("r", 8);
    const i = dots.indexOf(near);
    showTip(event, element("img", { src: found.thumbnails[i], alt: "" }), element("div", {}, found.names[i]), ...(found.labels ? [element("div", {}, found.labels[i])] : []));
  }
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, point);
  svg.addEventListener("pointerleave", leave);
  card.append(svg);
  if (shown.length) card.append(element("div", { class: "row hint" }, ...shown.map((label) => {
    const mark = element("span", { class: "key" }, `${label} (${counts.get(label)})`);
    mark.style.setProperty("--dot", colourOf(label));
    return mark;
  }), ...(counts.size > shown.length ? [`grey: ${counts.size - shown.length} further labels`] : [])));
  main.append(card);
}

// ---- 4 and 5

function ran() {
  section("How it ran", "Losses should fall and stay apart from each other; schedules should be what you planned. Point at a curve to read its numbers; drag over a stretch to enlarge it, double-click to go back.");
  const box = element("input", { type: "checkbox", checked: "" });
  box.addEventListener("change", () => setSmooth(box.checked));
  main.append(element("label", { class: "hint" }, box, " smooth (running mean; numbers are always those measured)"));
  const longest = Math.max(...DATA.runs.map((run) => run.logged));
  const drawn = Math.max(0, ...DATA.runs.flatMap((run) => Object.values(run.curves).map(([x]) => x.length)));
  if (drawn < longest) main.append(element("p", { class: "hint" }, `Of ${whole(longest)} points of a curve at most ${whole(drawn)} are drawn: the smallest and the largest of each stretch.`));
  for (const [name, title] of [["losses", "Losses and gradients"], ["health", "Health of the features"], ["schedules", "Schedules"], ["speed", "Speed and memory"], ["other", "Other metrics"]]) {
    const cards = chartsOf(name);
    if (cards.length) main.append(element("h3", {}, title), grid(cards));
  }
  if (SEVERAL) return;
  const run = DATA.runs[0];
  if (run.groups.length) {
    part("Parameter groups", "At the last step. Which parameters share a learning rate and weight decay, and by which rule.");
    const columns = Object.keys(run.groups[0]);
    main.append(table([columns, ...run.groups.map((group) => columns.map((c) => group[c]))], true));
  }
  if (Object.keys(run.masks).length) {
    part("Masks", "What the student did not see of its global crops, measured on masks that this run's seed draws.");
    main.append(table(Object.entries(run.masks)));
  }
}

function was() {
  section("What it was", "Everything needed to repeat, continue and use the run.");
  if (SEVERAL) {
    const keys = [...new Set(DATA.runs.flatMap((r) => Object.keys(r.recipe)))].filter((k) => new Set(DATA.runs.map((r) => r.recipe[k])).size > 1);
    main.append(element("h3", {}, "Recipe differences"), keys.length
      ? table([["key", ...DATA.runs.map((r) => r.name)], ...keys.map((k) => [k, ...DATA.runs.map((r) => r.recipe[k] ?? "–")])], true)
      : element("p", {}, "The recipes are equal."));
  }
  for (const run of DATA.runs) {
    const start = run.info.starts?.at(-1) ?? {}, data = run.info.data ?? {}, look = data.look;
    const range = ([low, high]) => low === high ? String(low) : `${low} to ${high}`;
    main.append(element("h3", {}, run.name), table([
      ["data", data.path ?? "–"], ["images", data.images === undefined ? "–" : whole(data.images)],
      ["sizes", look ? `${range(look.widths)} × ${range(look.heights)} pixels (width × height, of ${look.sampled} images looked at)` : "–"],
      ["channels", look ? `${Object.keys(look.modes).join(", ")}; the network gets ${run.recipe["student.in_chans"]}` : run.recipe["student.in_chans"]],
      ["fingerprint", data.fingerprint ?? "–"], ["skipped files", run.skippedCount],
      ["seed", run.info.seed ?? "–"],
      ["started", (run.info.starts ?? []).map((s) => `${s.time} at step ${whole(s.step)}`).join("; ") || "–"],
      ["device", start.device ? `${start.device}, ${start.precision}, ${start.threads} threads` : "–"],
      ["versions", Object.entries(start.versions ?? {}).map(([k, v]) => `${k} ${v}`).join(", ") || "–"],
      ["checkpoints kept", run.checkpoints.map(whole).join(", ") || "none"]]));
    if (!SEVERAL) {
      main.append(element("h3", {}, `Recipe: what differs from ${run.base}`), run.differences.length
        ? table([["key", run.base, "here"], ...run.differences], true) : element("p", {}, "Nothing."));
      const rest = element("details", {}, element("summary", {}, "The whole recipe"), table(Object.entries(run.recipe)));
      main.append(rest);
      if (run.skipped.length) main.append(element("h3", {}, "Skipped files"), table(run.skipped.map((s) => [s])),
        ...(run.skippedCount > run.skipped.length ? [element("p", { class: "hint" }, `and ${whole(run.skippedCount - run.skipped.length)} more in skipped.txt`)] : []));
      main.append(element("h3", {}, "Next"), element("div", { class: "scroll" }, element("table", { class: "commands" }, ...run.commands.map(([what, command]) =>
        element("tr", {}, element("td", {}, what), element("td", {}, element("code", {}, command)))))));
    }
  }
}

main.append(element("h1", {}, DATA.runs.map((r) => r.name).join(" · ")), element("p", { class: "hint" }, `dinoforge report of ${DATA.made}`));
verdict();
if (!SEVERAL) {
  if (DATA.runs[0].seen) seen(DATA.runs[0]);
  if (DATA.runs[0].learned) learned(DATA.runs[0]);
}
ran();
was();
drawCharts();
