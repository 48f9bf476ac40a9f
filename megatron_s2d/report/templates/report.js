"use strict";
// The tabs, charts and the sample browser of report.html. Data comes from the JSON block of the page; all text is set
// with textContent, so that nothing in it is markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLORS = ["#0072B2", "#D55E00", "#009E73", "#8a5ba6", "#6b7280", "#b58900", "#c2407f", "#222222"];
  const DASHES = ["", "6 3", "2 2", "8 3 2 3", "1 3", "10 4", "4 2", "3 5"];
  const SAMPLES_AT_ONCE = 20;
  const HASH = "#tab=";  // never the id of an element: the browser would scroll to it

  function el(tag, attributes, ...children) {
    const svg = ["svg", "g", "path", "line", "text", "rect", "circle"].includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    for (const child of children) node.append(child);
    return node;
  }

  function short(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
    return String(Number(value.toPrecision(3)));
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= rough) || 10 * power;
    const result = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) result.push(value);
    return result.map(value => Math.abs(value) < step * 1e-6 ? 0 : Number(value.toPrecision(12)));
  }

  function isConstant(panel) {
    return panel.lines.every(line => {
      const low = Math.min(...line.y), high = Math.max(...line.y);
      return high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high));
    });
  }

  function constant(panel) {
    const values = panel.lines.map(line => el("span", {}, line.label + " ", el("b", {}, short(line.y[0]))));
    return el("div", {class: "card"}, el("h4", {}, panel.title + " ", el("span", {class: "muted"}, "constant")),
      el("div", {class: "legend"}, ...values));
  }

  function chart(panel) {
    const W = 420, H = 210, L = 46, R = 10, T = 8, B = 24;
    const xs = panel.lines.flatMap(line => line.x);
    const ys = panel.lines.flatMap(line => line.y.flatMap((y, i) => {
      const error = (line.err || [])[i] || 0;
      return [y - error, y + error];
    }));
    const x0 = Math.min(...xs), x1 = Math.max(...xs);
    let y0 = Math.min(...ys), y1 = Math.max(...ys);
    if (y1 - y0 <= 1e-9 * Math.max(Math.abs(y0), Math.abs(y1), 1e-12)) {
      const pad = Math.abs(y0) * 0.1 || 1;
      y0 -= pad; y1 += pad;
    }
    const px = x => L + (x - x0) / (x1 - x0 || 1) * (W - L - R);
    const py = y => H - B - (y - y0) / (y1 - y0) * (H - T - B);
    const svg = el("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": panel.title});
    for (const y of ticks(y0, y1, 4)) {
      svg.append(el("line", {x1: L, x2: W - R, y1: py(y), y2: py(y), class: "grid"}));
      svg.append(el("text", {x: L - 5, y: py(y) + 4, class: "tick end"}, short(y)));
    }
    const labels = panel.x_labels;
    for (const x of labels ? labels.map((_, i) => i) : ticks(x0, x1, 5).filter(Number.isInteger)) {
      if (labels && labels.length > 6 && x % Math.ceil(labels.length / 6)) continue;
      svg.append(el("text", {x: px(x), y: H - 7, class: "tick middle"}, labels ? labels[x] : String(x)));
    }
    if (panel.mark !== undefined && panel.mark >= x0 && panel.mark <= x1) {
      svg.append(el("line", {x1: px(panel.mark), x2: px(panel.mark), y1: T, y2: H - B, class: "mark"}));
    }
    panel.lines.forEach((line, index) => {
      const color = COLORS[index % COLORS.length];
      (line.err || []).forEach((error, i) => error && svg.append(el("line", {
        x1: px(line.x[i]), x2: px(line.x[i]), y1: py(line.y[i] - error), y2: py(line.y[i] + error), stroke: color})));
      const path = line.x.map((x, i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(line.y[i]).toFixed(1)}`).join("");
      svg.append(el("path", {d: path, stroke: color, "stroke-dasharray": DASHES[index % DASHES.length],
        class: "curve"}));
      if (line.x.length <= 12) line.x.forEach((x, i) =>
        svg.append(el("circle", {cx: px(x), cy: py(line.y[i]), r: 2.2, fill: color})));
    });
    const cursor = el("line", {y1: T, y2: H - B, class: "cursor", visibility: "hidden"});
    svg.append(cursor);
    const legend = el("div", {class: "legend"});
    const values = panel.lines.map((line, index) => {
      const value = el("b", {}, short(line.y[line.y.length - 1]));
      const key = el("svg", {viewBox: "0 0 22 8", class: "key"}, el("line", {x1: 0, x2: 22, y1: 4, y2: 4,
        stroke: COLORS[index % COLORS.length], "stroke-width": 2.5, "stroke-dasharray": DASHES[index % DASHES.length]}));
      legend.append(el("span", {}, key, line.label + " ", value));
      return value;
    });
    const where = el("span", {class: "muted"}, "last");
    const show = event => {
      const box = svg.getBoundingClientRect();
      const wanted = x0 + ((event.clientX - box.left) / box.width * W - L) / (W - L - R) * (x1 - x0);
      let nearest = x0;
      panel.lines.forEach((line, index) => {
        let best = 0;
        line.x.forEach((x, i) => { if (Math.abs(x - wanted) < Math.abs(line.x[best] - wanted)) best = i; });
        const error = (line.err || [])[best];
        values[index].textContent = short(line.y[best]) + (error ? ` ± ${short(error)}` : "");
        nearest = line.x[best];
      });
      cursor.setAttribute("x1", px(nearest)); cursor.setAttribute("x2", px(nearest));
      cursor.setAttribute("visibility", "visible");
      where.textContent = labels ? labels[nearest] : `step ${nearest}`;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      where.textContent = "last";
      panel.lines.forEach((line, index) => { values[index].textContent = short(line.y[line.y.length - 1]); });
    });
    const title = el("h4", {}, panel.title + " ", el("span", {class: "muted"}, panel.unit ? panel.unit + ", " : "", where));
    const zoom = el("button", {class: "zoom", title: "larger or smaller", "aria-label": `zoom ${panel.title}`}, "⤢");
    const card = el("div", {class: "card"}, zoom, title, svg, legend);
    if (panel.mark !== undefined) legend.append(el("span", {class: "muted"}, `dotted: ${panel.mark_label}`));
    zoom.addEventListener("click", () => card.classList.toggle("wide"));
    return card;
  }

  function groups(panels) {
    const box = el("div", {});
    for (const name of new Set(panels.map(panel => panel.group))) {
      box.append(el("h3", {}, name));
      box.append(el("div", {class: "cards"}, ...panels.filter(panel => panel.group === name)
        .map(panel => isConstant(panel) ? constant(panel) : chart(panel))));
    }
    return box;
  }

  function stageTab(stage) {
    const section = el("section", {class: "tab"}, el("h2", {}, stage.name));
    const facts = el("dl", {class: "facts"});
    for (const [name, value] of stage.facts) facts.append(el("div", {}, el("dt", {}, name), el("dd", {}, value)));
    section.append(facts);
    for (const warning of stage.warnings) section.append(el("p", {class: "note"}, warning));
    const count = data.samples.filter(sample => sample.stage === stage.name).length;
    if (count) {
      const button = el("button", {class: "link"}, `${count} sample responses`);
      button.addEventListener("click", () => { browser.only(stage.name); open("samples"); });
      section.append(el("p", {}, button));
    }
    section.append(groups(stage.panels));
    const numbers = Object.entries(stage.latest);
    if (numbers.length) {
      const body = el("tbody", {});
      for (const [name, value] of numbers) body.append(el("tr", {}, el("td", {}, name),
        el("td", {class: "number"}, short(value))));
      const table = el("table", {class: "narrow"}, body);
      section.append(el("details", stage.panels.length ? {} : {open: ""},
        el("summary", {}, "All numbers of the last step"), el("div", {class: "scroll"}, table)));
    } else if (!stage.panels.length) section.append(el("p", {class: "muted"}, "No metrics yet."));
    return section;
  }

  function tokenBox(sample) {
    const tokens = sample.tokens.filter(token => token.facts);
    if (!tokens.length) return "";
    const readout = el("p", {class: "muted readout"}, "Point at a token: probabilities of student and teacher.");
    const box = el("div", {class: "tokens"});
    for (const token of sample.tokens) {
      const span = el("span", {title: token.facts || "", tabindex: "0"}, token.text);
      if (token.color) span.style.background = token.color;
      const show = () => { readout.textContent = `${JSON.stringify(token.text)}: ${token.facts}`; };
      span.addEventListener("pointerenter", show);
      span.addEventListener("focus", show);
      box.append(span);
    }
    return el("div", {}, box, readout);
  }

  function sampleCard(sample) {
    const verdict = sample.verdict || "not graded";
    const kind = sample.verdict === "correct" ? "agrees" : sample.verdict ? "against" : "undecided";
    const head = el("p", {class: "muted"}, el("span", {class: `tag ${kind}`}, verdict), ` ${sample.stage}, `,
      `${sample.source}${sample.step === null ? "" : `, step ${sample.step}`}, ${sample.id}, reward `,
      `${sample.reward === null ? "none" : short(sample.reward)}, ended by ${sample.finish}`,
      sample.answer === null ? "" : `, label ${sample.answer}`);
    const card = el("div", {class: "sample"}, head, el("pre", {class: "prompt"}, sample.prompt),
      el("pre", {}, sample.response));
    if (sample.detail) card.append(el("p", {class: "muted"}, sample.detail));
    card.append(tokenBox(sample));
    return card;
  }

  const browser = (() => {
    const search = el("input", {type: "search", placeholder: "search prompts and responses", "aria-label": "search"});
    const pick = (label, values) => {
      const select = el("select", {"aria-label": label}, el("option", {value: ""}, `all ${label}`));
      for (const value of values) select.append(el("option", {value}, value || "not graded"));
      return select;
    };
    const unique = key => [...new Set(data.samples.map(sample => sample[key]))];
    const stage = pick("stages", unique("stage")), source = pick("sources", unique("source"));
    const verdict = pick("verdicts", unique("verdict").filter(Boolean));
    const list = el("div", {}), count = el("p", {class: "muted"}), more = el("button", {}, "show more");
    let shown = SAMPLES_AT_ONCE;
    const text = data.samples.map(sample => `${sample.prompt}\n${sample.response}\n${sample.id}`.toLowerCase());
    const draw = () => {
      const words = search.value.toLowerCase();
      const found = data.samples.filter((sample, index) => (!stage.value || sample.stage === stage.value)
        && (!source.value || sample.source === source.value) && (!verdict.value || sample.verdict === verdict.value)
        && (!words || text[index].includes(words)));
      list.replaceChildren(...found.slice(0, shown).map(sampleCard));
      count.textContent = `${found.length} of ${data.samples.length} samples in this page` +
        (data.samples_total > data.samples.length ? `, which has ${data.samples.length} of the ${data.samples_total} ` +
        "that the run saved, evenly spaced" : "") + ".";
      more.hidden = found.length <= shown;
    };
    const restart = () => { shown = SAMPLES_AT_ONCE; draw(); };
    for (const input of [search, stage, source, verdict]) input.addEventListener("input", restart);
    more.addEventListener("click", () => { shown += SAMPLES_AT_ONCE; draw(); });
    const section = el("section", {class: "tab"}, el("h2", {}, "Samples"),
      el("p", {class: "muted"}, "Text as the model wrote it; control characters are spelled out."),
      el("div", {class: "filters"}, search, stage, source, verdict), count, list, more);
    draw();
    return {section, only: name => { stage.value = name; search.value = source.value = verdict.value = ""; restart(); },
      busy: () => search.value !== ""};
  })();

  const tabs = {};
  const nav = document.getElementById("tabs"), main = document.getElementById("main");
  function add(id, label, section, dot) {
    section.hidden = true;
    const button = el("button", {role: "tab"}, label);
    if (dot) button.prepend(el("span", {class: `dot ${dot}`, title: dot}));
    button.addEventListener("click", () => open(id));
    nav.append(button);
    if (!section.parentNode) main.append(section);
    tabs[id] = {button, section};
  }
  function open(id) {
    for (const [name, tab] of Object.entries(tabs)) {
      tab.section.hidden = name !== id;
      tab.button.setAttribute("aria-selected", String(name === id));
    }
    history.replaceState(null, "", HASH + encodeURIComponent(id));
    tabs[id].button.scrollIntoView({block: "nearest", inline: "nearest"});
  }
  add("overview", "Overview", document.getElementById("overview"));
  data.stages.forEach((stage, index) => add(`stage-${index}-${stage.name}`, stage.name, stageTab(stage), stage.state));
  if (data.samples.length) add("samples", "Samples", browser.section);
  const provenance = document.getElementById("provenance");
  if (provenance) add("provenance", "Provenance", provenance);
  const wanted = decodeURIComponent(location.hash.slice(HASH.length));
  open(tabs[wanted] ? wanted : "overview");
  if (data.live) setTimeout(() => { if (!browser.busy()) location.reload(); }, 30000);
})();
