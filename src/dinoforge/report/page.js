"use strict";
// Text reaches the page as text nodes and attributes only; nothing here parses markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#3b82c4", "#d9822b", "#3f9b5b", "#b5485d", "#8466b8", "#80756b", "#c06aa8", "#7f8c28"];
const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
function shape(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const number = (x) => x === 0 || (Math.abs(x) >= 0.01 && Math.abs(x) < 1e5) ? String(+x.toPrecision(4)) : x.toExponential(2);
const figure = (content, caption) =>
  element("figure", {}, content, element("figcaption", { class: "name", title: caption }, caption));
const table = (rows) =>
  element("div", { class: "scroll" }, element("table", {},
    ...rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, String(cell)))))));

const main = document.querySelector("main");
function section(title, hint) {
  main.append(element("h2", {}, title), element("p", { class: "hint" }, hint));
}
const tip = element("div", { id: "tip", hidden: "" });
document.body.append(tip);
function showTip(event, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4)}px`;
  tip.style.top = `${Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4)}px`;
}
const hideTip = () => { tip.hidden = true; };

function pixels(side, colourOf) {
  const canvas = element("canvas", { width: side, height: side, class: "tile" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(side, side);
  for (let i = 0; i < side * side; i++) image.data.set([...colourOf(i), 255], 4 * i);
  context.putImageData(image, 0, 0);
  return canvas;
}
// Dark blue over green to yellow: rises in lightness, so that it also reads in grey print.
const STOPS = [[35, 20, 75], [45, 95, 140], [50, 165, 125], [245, 225, 70]];
function heat(x) {
  const place = Math.max(0, Math.min(1, x)) * (STOPS.length - 1), k = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[k].map((low, c) => low + (STOPS[k + 1][c] - low) * (place - k));
}

function chart(title, series, exact) {
  const width = 320, height = 170, left = 48, bottom = 20;
  const card = element("div", { class: "card" }, element("strong", {}, title));
  const points = series.flatMap((s) => s.points);
  const [x0, x1] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  let [y0, y1] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  if (y0 === y1) [y0, y1] = [y0 - Math.abs(y0) / 10 - 1e-9, y1 + Math.abs(y1) / 10 + 1e-9];
  const X = (x) => left + (width - left - 8) * (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5);
  const Y = (y) => 8 + (height - bottom - 8) * (y1 - y) / (y1 - y0);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const y of [y0, (y0 + y1) / 2, y1]) {
    svg.append(shape("line", { x1: left, x2: width - 8, y1: Y(y), y2: Y(y), stroke: "var(--line)" }),
      shape("text", { x: left - 4, y: Y(y) + 4, "text-anchor": "end" }, number(y)));
  }
  svg.append(shape("text", { x: left, y: height - 4 }, `step ${x0}`),
    shape("text", { x: width - 8, y: height - 4, "text-anchor": "end" }, String(x1)));
  const lines = series.map((s, i) => {
    const line = shape("polyline", { fill: "none", stroke: COLOURS[i % COLOURS.length], "stroke-width": 1.6 });
    svg.append(line);
    return line;
  });
  const draw = (smooth) => series.forEach((s, i) => {
    let mean = s.points[0][1];
    const shown = s.points.map(([x, y]) => [x, smooth && !exact ? (mean += 0.15 * (y - mean)) : y]);
    lines[i].setAttribute("points", shown.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" "));
  });
  draw(true);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * width / box.width;
    const text = series.map((s) => {
      const near = s.points.reduce((a, b) => Math.abs(X(b[0]) - x) < Math.abs(X(a[0]) - x) ? b : a);
      return `${s.name} ${number(near[1])} (step ${near[0]})`;
    });
    showTip(event, ...text.map((t) => element("div", {}, t)));
  });
  svg.addEventListener("pointerleave", hideTip);
  card.append(svg);
  if (series.length > 1) card.append(element("div", { class: "row hint" }, ...series.map((s, i) => {
    const mark = element("span", {}, `● ${s.name}`);
    mark.style.color = COLOURS[i % COLOURS.length];
    return mark;
  })));
  return { card, draw };
}

function verdict() {
  section("Is it learning?", "Look for probes that rise above raw pixels and the untrained network.");
  const rows = [["", ...DATA.runs.map((r) => r.name)]];
  const scalars = new Set(DATA.runs.flatMap((r) => Object.keys(r.summary).filter((k) => typeof r.summary[k] !== "object")));
  for (const key of scalars) rows.push([key.replaceAll("_", " "), ...DATA.runs.map((r) => r.summary[key] ?? "–")]);
  main.append(table(rows));
  for (const run of DATA.runs) {
    for (const sentence of [].concat(run.summary.diagnosis ?? [])) main.append(element("p", { class: "note" }, String(sentence)));
    for (const sentence of run.missing) main.append(element("p", { class: "note missing" }, `${run.name}: ${sentence}`));
    const wait = run.curves.data_wait_share?.filter((x) => x !== null).at(-1);
    if (wait !== undefined) main.append(element("p", {}, `${run.name}: ${(100 * wait).toFixed(0)} % of the time goes into waiting for data` +
      (wait > 0.2 ? "; data limits the speed." : "; computing limits the speed.")));
  }
}

function seen(run) {
  section("What the network saw", "Crops should still show what matters in your images. Left: as cut; right: after colour changes, masked patches grey.");
  const cards = run.seen.map((s) => {
    const masked = (source, mask) => {
      const canvas = element("canvas", { class: "crop", width: 192, height: 192 });
      const image = new Image();
      image.onload = () => {
        const context = canvas.getContext("2d"), edge = 192 / s.side;
        context.drawImage(image, 0, 0, 192, 192);
        context.fillStyle = "rgb(128 128 128 / .85)";
        mask.forEach((on, i) => on && context.fillRect((i % s.side) * edge, Math.floor(i / s.side) * edge, edge, edge));
      };
      image.src = source;
      return canvas;
    };
    const globals = [0, 1].flatMap((i) => [element("img", { class: "crop", src: s.before[i], alt: "global crop as cut" }), masked(s.after[i], s.masks[i])]);
    const locals = s.after.slice(2).map((src) => element("img", { class: "local", src, alt: "local crop" }));
    return element("div", { class: "card" }, element("div", { class: "name" }, s.name),
      element("div", { class: "pairs" }, ...globals), element("div", { class: "row" }, ...locals));
  });
  main.append(element("div", { class: "grid" }, ...cards));
}

function learned(run) {
  section("What it learned", `From the teacher at step ${run.step}, on ${run.sampled} evenly spaced images of ${run.images}.`);
  const side = run.side, count = side * side, width = run.patches.width;
  const shares = run.maps.map((m) => m.foreground.reduce((a, b) => a + b, 0) / count);
  const hides = shares.every((share) => share > 0.1); // or else the first component parts images, not their parts
  main.append(element("h3", {}, "Patch features as colours"),
    element("p", { class: "hint" }, "Parts of one kind should have one colour in all images. " + (hides ? "The background by the first component is dark."
      : "The first component tells whole images apart rather than background from foreground, so nothing is hidden.")));
  main.append(element("div", { class: "row" }, ...run.maps.map((m) => {
    const colours = bytes(m.pca);
    return figure(element("div", { class: "row" }, element("img", { class: "tile", src: m.image, alt: m.name }),
      pixels(side, (i) => !hides || m.foreground[i] ? colours.subarray(3 * i, 3 * i + 3) : [24, 24, 30])), m.name);
  })));

  main.append(element("h3", {}, "Similarity to a patch"),
    element("p", { class: "hint" }, `Click a patch: yellow is similar to it, in all images. Cosine similarity, from ${width} directions that hold ${(100 * run.patches.kept).toFixed(1)} % of the features.`));
  const values = Float32Array.from(bytes(run.patches.values), (b) => b - 128);
  for (let i = 0; i < values.length; i += width) {
    const row = values.subarray(i, i + width), norm = Math.hypot(...row) || 1;
    row.forEach((v, j) => { row[j] = v / norm; });
  }
  const maps = element("div", { class: "row", id: "similarity" });
  function select(image, patch) {
    const chosen = values.subarray((image * count + patch) * width, (image * count + patch + 1) * width);
    maps.replaceChildren(...run.maps.map((m, b) => {
      const similarity = (i) => chosen.reduce((sum, v, j) => sum + v * values[(b * count + i) * width + j], 0);
      const canvas = pixels(side, (i) => b === image && i === patch ? [255, 60, 60] : heat(similarity(i)));
      const patchAt = (event) => {
        const box = canvas.getBoundingClientRect();
        const place = (at, from, size) => Math.min(side - 1, Math.max(0, Math.floor((at - from) / size * side)));
        return place(event.clientY, box.top, box.height) * side + place(event.clientX, box.left, box.width);
      };
      const photo = element("img", { class: "tile click", src: m.image, alt: `choose a patch of ${m.name}` });
      for (const target of [canvas, photo]) {
        target.classList.add("click");
        target.addEventListener("click", (event) => {
          const box = target.getBoundingClientRect();
          const place = (at, from, size) => Math.min(side - 1, Math.max(0, Math.floor((at - from) / size * side)));
          select(b, place(event.clientY, box.top, box.height) * side + place(event.clientX, box.left, box.width));
        });
      }
      canvas.addEventListener("pointermove", (event) => showTip(event, similarity(patchAt(event)).toFixed(3)));
      canvas.addEventListener("pointerleave", hideTip);
      return figure(element("div", { class: "row" }, photo, canvas), m.name);
    }));
  }
  select(0, Math.floor(count / 2 + side / 2));
  main.append(maps);

  main.append(element("h3", {}, "Attention of the cls token, per head"),
    element("p", { class: "hint" }, "Heads that look at different parts are a good sign; each map is scaled to its largest value."));
  for (const m of run.maps.slice(0, 3)) main.append(element("div", { class: "row" },
    element("img", { class: "crop", src: m.image, alt: m.name }),
    ...m.attention.map((head) => { const a = bytes(head), c = pixels(side, (i) => heat(a[i] / 255)); c.className = "crop"; return c; })));

  if (run.neighbours) {
    main.append(element("h3", {}, "Nearest neighbours"),
      element("p", { class: "hint" }, "First of each row: the image; then its neighbours with their similarity. Above the closest pairs, below the images with the most distant neighbours."));
    for (const n of run.neighbours) main.append(element("div", { class: "row neighbours" },
      ...[n.query, ...n.rows].map((i, k) => figure(element("img", { src: run.thumbnails[i], alt: run.names[i], title: run.names[i] }), k ? String(n.similarities[k - 1]) : "image"))));
    embeddingMap(run);
  }
}

function embeddingMap(run) {
  main.append(element("h3", {}, "Map of the images"),
    element("p", { class: "hint" }, "Two principal components of the cls tokens" + (run.labels ? ", coloured by label" : "") + ". Point at a dot to see its image."));
  const classes = [...new Set(run.labels ?? [])];
  const svg = shape("svg", { viewBox: "0 0 640 400", id: "map" });
  const range = (k) => [Math.min(...run.map.map((p) => p[k])), Math.max(...run.map.map((p) => p[k]))];
  const place = (v, [low, high], size) => 10 + (size - 20) * (high > low ? (v - low) / (high - low) : 0.5);
  const [rx, ry] = [range(0), range(1)];
  run.map.forEach(([x, y], i) => {
    const colour = COLOURS[run.labels ? classes.indexOf(run.labels[i]) % COLOURS.length : 0];
    const dot = shape("circle", { cx: place(x, rx, 640), cy: place(y, ry, 400), r: 5, fill: colour, "fill-opacity": 0.75 });
    dot.addEventListener("pointerenter", (event) => showTip(event,
      element("img", { src: run.thumbnails[i], alt: "" }), element("div", {}, run.names[i]), ...(run.labels ? [element("div", {}, run.labels[i])] : [])));
    dot.addEventListener("pointerleave", hideTip);
    svg.append(dot);
  });
  main.append(element("div", { class: "card" }, svg));
}

// Titles and metrics; the third says that smoothing would only falsify: these are schedules, not measurements.
const GROUPS = [["Loss", ["total"]], ["Loss terms", ["dino_global", "dino_local", "ibot", "koleo"]], ["Learning rate", ["lr", "last_layer_lr"], true],
  ["Weight decay", ["weight_decay"], true], ["Momentum", ["momentum"], true], ["Teacher temperature", ["teacher_temp"], true],
  ["Images per second", ["images_per_second"]], ["Share of time waiting for data", ["data_wait_share"]], ["Memory, GiB", ["memory_gib"]]];
function ran() {
  section("How it ran", "Losses should fall and stay apart from each other; jumps in gradient norms are worth a look. Point at a curve to read it.");
  const known = new Set(["step", "train_seconds", "skipped_images", ...GROUPS.flatMap((g) => g[1])]);
  const others = [...new Set(DATA.runs.flatMap((r) => Object.keys(r.curves)))].filter((k) => !known.has(k));
  const charts = [];
  for (const [title, keys, exact] of [...GROUPS, ...others.map((k) => [k, [k]])]) {
    const series = DATA.runs.flatMap((run) => keys.filter((k) => run.curves[k]).map((k) => ({
      name: DATA.runs.length > 1 ? `${run.name} ${k}` : k,
      points: run.curves[k].map((y, i) => [run.curves.step[i], y]).filter((p) => p[1] !== null),
    })));
    if (series.length) charts.push(chart(title, series, exact));
  }
  const box = element("input", { type: "checkbox", checked: "" });
  box.addEventListener("change", () => charts.forEach((c) => c.draw(box.checked)));
  main.append(element("label", { class: "hint" }, box, " smooth (running mean)"), element("div", { class: "grid" }, ...charts.map((c) => c.card)));
}

function was() {
  section("What it was", "Everything needed to repeat or continue the run.");
  if (DATA.runs.length > 1) {
    const keys = Object.keys(DATA.runs[0].recipe).filter((k) => new Set(DATA.runs.map((r) => r.recipe[k])).size > 1);
    main.append(element("h3", {}, "Recipe differences"), table([["key", ...DATA.runs.map((r) => r.name)], ...keys.map((k) => [k, ...DATA.runs.map((r) => r.recipe[k] ?? "–")])]));
  }
  for (const run of DATA.runs) {
    const start = run.info.starts?.at(-1) ?? {}, data = run.info.data ?? {};
    main.append(element("h3", {}, run.name), table([
      ["data", data.path ?? "–"], ["images", data.images ?? "–"], ["fingerprint", data.fingerprint ?? "–"], ["skipped", run.skippedCount],
      ["device", start.device ?? "–"], ["precision", start.precision ?? "–"],
      ["versions", Object.entries(start.versions ?? {}).map(([k, v]) => `${k} ${v}`).join(", ")]]));
    main.append(element("h3", {}, `Differences from the recipe ${run.base}`), table([["key", run.base, "here"], ...run.differences]));
    if (run.skipped.length) main.append(element("h3", {}, "Skipped images"), table(run.skipped.map((s) => [s])));
    main.append(element("h3", {}, "Next"), table([["evaluate", `dinoforge eval knn ${run.name} --data DIR`]]));
  }
}

main.append(element("h1", {}, DATA.runs.map((r) => r.name).join(" · ")), element("p", { class: "hint" }, `dinoforge report of ${DATA.made}`));
verdict();
if (DATA.runs.length === 1) {
  if (DATA.runs[0].seen) seen(DATA.runs[0]);
  if (DATA.runs[0].maps) learned(DATA.runs[0]);
}
ran();
was();
