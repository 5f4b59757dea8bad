
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  // -- how things are said ----------------------------------------------------------------------

  const number = (value) => {
    if (value === null || value === undefined) return "no value";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e").replace("-", "−");
    return String(Number(value.toPrecision(4))).replace("-", "−");
  };
  const SHOWN = { " ": "·", "\t": "⇥", "\n": "⏎", "\r": "␍", "\u00a0": "⍽" };
  // controls, and what turns the direction of text or can't be seen
  const UNSEEN = /[\u0000-\u0020\u007f-\u00a0\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff\ufff9-\ufffb]/g;
  const visible = (text) => text.replace(UNSEEN, (one) =>
    SHOWN[one] || (one === "\u200c" || one === "\u200d" ? one
      : "⟨" + one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩"));
  const make = (tag, attributes = {}, text = null) => {
    const found = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
    if (text !== null) found.textContent = text;
    return found;
  };
  const draw = (parent, tag, attributes = {}, text = null) => {
    const found = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
    if (text !== null) found.textContent = text;
    parent.append(found);
    return found;
  };

  // -- colours: cividis, which is read alike by all kinds of colour vision -----------------------

  const STOPS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"]
    .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const colour = (share) => {
    const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
    const low = Math.min(Math.floor(at), STOPS.length - 2);
    return STOPS[low].map((one, i) => Math.round(one + (STOPS[low + 1][i] - one) * (at - low)));
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((one) => {
      const part = one / 255;
      return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const inkOn = (rgb) => {
    const light = luminance(rgb);
    return 1.05 / (light + 0.05) >= (light + 0.05) / 0.05 ? "#ffffff" : "#000000";
  };
  const css = (rgb) => `rgb(${rgb.join(",")})`;
  const span = (values) => {
    const there = values.filter((one) => one !== null).sort((a, b) => a - b);
    if (!there.length) return null;
    const at = (share) => there[Math.min(there.length - 1, Math.round(share * (there.length - 1)))];
    const [low, high] = there.length > 20 ? [at(0.02), at(0.98)] : [there[0], there[there.length - 1]];
    const [least, most] = [there[0], there[there.length - 1]];
    return high > low ? { low, high, least, most } : { low: least, high: most, least, most };
  };
  const share = (value, range) => range.high > range.low ? (value - range.low) / (range.high - range.low) : 0.5;

  // -- what is selected -------------------------------------------------------------------------

  const variables = data.variables;
  const served = data.served || null; // then values come when they are asked for
  const onStrip = (one) => Boolean(one.norms && one.norms.length && data.strips[one.dim] && data.strips[one.dim].count > 0);
  const state = { variable: 0, layer: 0, by: "norm", token: 0, number: 0 };
  const variable = () => variables[state.variable];
  const strip = () => data.strips[variable().dim];
  const depth = (one) => Math.max((one.norms || []).length, (one.quantiles || []).length, 1);
  const layerName = (one, place) => one.layers.length ? String(one.layers[place]) : "";
  const module = (one, place) => one.modules[place] || one.name;
  const series = () => {
    const one = variable();
    if (!onStrip(one)) return null;
    if (state.by === "norm") return one.norms[state.layer];
    if (state.by === "any") return one.any && one.any.key === `${state.layer}:${state.number}` ? one.any.values : null;
    const found = (one.features[state.layer] || [])[Number(state.by)];
    return found ? found.values : null;
  };
  const byName = () => {
    if (state.by === "norm") return "norm";
    if (state.by === "any") return `feature ${state.number}`;
    const found = (variable().features[state.layer] || [])[Number(state.by)];
    return found ? `feature ${found.feature}` : "feature";
  };
  const absent = () => served ? "not loaded" : "no value";
  const range = () => {
    const one = variable();
    if (state.by === "norm" && $("scale").value === "all") return span(one.norms.flat());
    return span(series() || []);
  };

  // -- the tooltip ------------------------------------------------------------------------------

  const tip = $("tip");
  const hideTip = () => { tip.hidden = true; };
  const showTip = (text, box) => {
    tip.textContent = text;
    tip.hidden = false;
    const width = document.documentElement.clientWidth;
    const mine = tip.getBoundingClientRect();
    const left = Math.max(6, Math.min(box.left + box.width / 2 - mine.width / 2, width - mine.width - 6));
    const above = box.top - mine.height - 8;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(above > 4 ? above : box.bottom + 8) + window.scrollY}px`;
  };
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

  // -- the strip --------------------------------------------------------------------------------

  const tokens = $("strip");
  let options = [];
  let shownStrip = null;
  const textOf = (place) => {
    const text = (strip().token_text || [])[place];
    return text ? visible(text) : null;
  };
  const called = (place) => {
    const id = (strip().token_id || [])[place];
    return textOf(place) || (id === undefined || id === null ? `row ${strip().row[place]}`
      : id < 0 ? "no id" : `#${id}`);
  };
  const about = (place) => {
    const mine = strip();
    const found = [["token", called(place)]];
    for (const [key, name] of [["token_id", "id"], ["position", "position"], ["step", "predicted step"],
      ["pass_index", "pass"], ["batch_item", "batch item"]]) {
      const value = (mine[key] || [])[place];
      if (value !== undefined && !(key === "step" && value < 0)) found.push([name, String(value)]);
    }
    found.push(["row", String(mine.row[place])]);
    for (const [name, values] of Object.entries(mine.labels)) {
      const value = values[place];
      found.push([name, typeof value === "number" ? number(value) : value === null ? "no value" : visible(String(value))]);
    }
    return found;
  };
  const where = () => variable().layers.length ? `layer ${layerName(variable(), state.layer)}` : variable().name;
  const valueText = (place) => {
    const values = series();
    return values ? `${byName()} ${number(values[place])}` : absent();
  };

  const buildStrip = () => {
    if (shownStrip === variable().dim) return;
    shownStrip = variable().dim;
    tokens.textContent = "";
    options = [];
    const mine = strip();
    let right = 0;
    for (let place = 0; place < mine.count; place += 1) {
      const text = textOf(place);
      const one = make("span", { role: "option", dir: "auto", tabindex: "-1", "aria-selected": "false" }, called(place));
      if (!text) one.className = "named";
      if (text && /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/.test(text)) right += 1;
      options.push(one);
      tokens.append(one, document.createElement("wbr"));
      const raw = (mine.token_text || [])[place];
      if (raw && raw.endsWith("\n")) tokens.append(document.createElement("br"));
    }
    tokens.dir = right * 2 > mine.count ? "rtl" : "ltr";
    state.token = Math.min(state.token, mine.count - 1);
  };
  const paintStrip = () => {
    const values = series() || [];
    const mine = range();
    options.forEach((one, place) => {
      const value = values[place];
      if (value === null || value === undefined || !mine) {
        one.style.background = "";
        one.style.color = "";
      } else {
        const rgb = colour(share(value, mine));
        one.style.background = css(rgb);
        one.style.color = inkOn(rgb);
      }
      one.setAttribute("aria-label", `${called(place)}, ${valueText(place)}`);
    });
    $("legend-low").textContent = mine ? (mine.low > mine.least ? "≤ " : "") + number(mine.low) : "";
    $("legend-high").textContent = mine ? (mine.high < mine.most ? "≥ " : "") + number(mine.high) : "";
    $("legend").hidden = !mine;
    $("legend-none").hidden = values.length > 0 && values.every((one) => one !== null);
    $("strip").setAttribute("aria-label", `Tokens, coloured by the ${byName()} of ${where()}`);
  };
  const paintLegend = () => {
    const context = $("legend").getContext("2d");
    for (let x = 0; x < 256; x += 1) {
      context.fillStyle = css(colour(x / 255));
      context.fillRect(x, 0, 1, 1);
    }
  };
  const tellToken = () => {
    const list = make("dl");
    const values = series();
    const pairs = [...about(state.token), [`${byName()}, ${where()}`, values ? number(values[state.token]) : absent()]];
    for (const [name, value] of pairs) {
      const cell = make("div");
      cell.append(make("dt", {}, name), make("dd", { dir: "auto" }, value));
      list.append(cell);
    }
    $("detail").replaceChildren(list);
  };
  const markToken = () => {
    options.forEach((one, place) => {
      const chosen = place === state.token;
      if ((one.getAttribute("aria-selected") === "true") !== chosen) one.setAttribute("aria-selected", String(chosen));
      one.tabIndex = chosen ? 0 : -1;
    });
  };
  const selectToken = (place, focus = false) => {
    state.token = Math.max(0, Math.min(place, options.length - 1));
    markToken();
    tellToken();
    paintMap();
    if (focus) options[state.token].focus();
  };
  const tipOfToken = (place) => {
    const pairs = about(place).slice(1).map(([name, value]) => `${name} ${value}`);
    showTip(`${called(place)}\n${valueText(place)}, ${where()}\n${pairs.join(" · ")}`, options[place].getClientRects()[0]);
  };
  const placeOf = (target) => options.indexOf(target.closest ? target.closest("[role=option]") : null);
  tokens.addEventListener("click", (event) => { const at = placeOf(event.target); if (at >= 0) selectToken(at, true); });
  // when the strip scrolls under a pointer that rests, the browser says mouseover too
  let pointer = [-1, -1];
  const rests = (event) => event.clientX === pointer[0] && event.clientY === pointer[1];
  tokens.addEventListener("mouseover", (event) => {
    const at = placeOf(event.target);
    if (at >= 0 && !rests(event)) tipOfToken(at);
    pointer = [event.clientX, event.clientY];
  });
  tokens.addEventListener("mousemove", (event) => { pointer = [event.clientX, event.clientY]; });
  tokens.addEventListener("mouseleave", (event) => { if (!rests(event)) hideTip(); });
  tokens.addEventListener("focusin", (event) => {
    const at = placeOf(event.target);
    if (at < 0) return;
    if (at !== state.token) selectToken(at);
    tipOfToken(at);
  });
  tokens.addEventListener("focusout", hideTip);
  const lineAway = (step) => {
    const here = options[state.token].getClientRects()[0];
    let best = state.token, gap = Infinity, line = null;
    for (let place = state.token + step; place >= 0 && place < options.length; place += step) {
      const box = options[place].getClientRects()[0];
      if (!box || Math.abs(box.top - here.top) < 4) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) > 4) break;
      const away = Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
      if (away < gap) { gap = away; best = place; }
    }
    return best;
  };
  tokens.addEventListener("keydown", (event) => {
    const forth = tokens.dir === "rtl" ? -1 : 1;
    const to = {
      ArrowRight: () => state.token + forth, ArrowLeft: () => state.token - forth,
      ArrowDown: () => lineAway(1), ArrowUp: () => lineAway(-1),
      Home: () => 0, End: () => options.length - 1,
      PageDown: () => state.token + 20, PageUp: () => state.token - 20,
    }[event.key];
    if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    selectToken(to(), true);
  });

  // -- the map of norms -------------------------------------------------------------------------

  const map = $("map");
  const cells = () => {
    const one = variable();
    return onStrip(one) ? [strip().count, one.norms.length] : [0, 0];
  };
  const paintMap = () => {
    const [columns, rows] = cells();
    $("map-figure").hidden = rows < 2 || !columns;
    if (rows < 2 || !columns) return;
    const scale = window.devicePixelRatio || 1;
    const width = map.clientWidth;
    const height = Math.max(60, Math.min(rows * 18, 320));
    map.style.height = `${height}px`;
    map.width = Math.round(width * scale);
    map.height = Math.round(height * scale);
    const context = map.getContext("2d");
    const wide = map.width / columns, high = map.height / rows;
    const mine = span(variable().norms.flat());
    const none = getComputedStyle(document.documentElement).getPropertyValue("--missing");
    const gap = wide > 6 ? 1 : 0;
    variable().norms.forEach((values, layer) => (values || new Array(columns).fill(null)).forEach((value, token) => {
      context.fillStyle = value === null || !mine ? none : css(colour(share(value, mine)));
      const left = Math.round(token * wide), top = Math.round((rows - 1 - layer) * high);
      context.fillRect(left, top, Math.round((token + 1) * wide) - left - gap, Math.round((rows - layer) * high) - top - gap);
    }));
    const x = state.token * wide, y = (rows - 1 - state.layer) * high;
    for (const [ink, line] of [["#000", 4 * scale], ["#fff", 2 * scale]]) {
      context.strokeStyle = ink;
      context.lineWidth = line;
      context.strokeRect(x, y, Math.max(wide, 3), Math.max(high, 3));
    }
  };
  const cellAt = (event) => {
    const box = map.getBoundingClientRect();
    const [columns, rows] = cells();
    const at = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
    return [at((event.clientX - box.left) / box.width, columns), rows - 1 - at((event.clientY - box.top) / box.height, rows)];
  };
  const tellCell = (token, layer, box) => {
    const values = variable().norms[layer];
    const value = values ? number(values[token]) : absent();
    showTip(`${called(token)}\nnorm ${value}, layer ${layerName(variable(), layer)}`, box);
  };
  map.addEventListener("mousemove", (event) => {
    const [token, layer] = cellAt(event);
    tellCell(token, layer, { left: event.clientX, top: event.clientY - 6, width: 0, bottom: event.clientY + 14 });
  });
  map.addEventListener("mouseleave", hideTip);
  map.addEventListener("blur", hideTip);
  const tellFocused = () => {
    const box = map.getBoundingClientRect();
    const [columns, rows] = cells();
    const top = box.top + (rows - 1 - state.layer) * box.height / rows;
    tellCell(state.token, state.layer, { left: box.left + (state.token + 0.5) * box.width / columns, top, width: 0, bottom: top + box.height / rows });
  };
  map.addEventListener("focus", () => { if (map.matches(":focus-visible")) tellFocused(); });
  map.addEventListener("click", (event) => {
    const [token, layer] = cellAt(event);
    selectToken(token);
    selectLayer(layer);
  });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (step[0]) selectToken(state.token + step[0]);
    else selectLayer(state.layer + step[1]);
    tellFocused();
  });

  // -- the charts -------------------------------------------------------------------------------

  const charts = $("charts");
  const ticks = (low, high, count = 4) => {
    const rough = (high - low) / count;
    const base = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((one) => one * base).find((one) => one >= rough);
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9 && found.length < 12; at += step) found.push(Math.abs(at) < step / 1e6 ? 0 : at);
    return found;
  };
  const path = (points) => {
    let open = false;
    return points.map(([x, y]) => {
      if (y === null) { open = false; return ""; }
      const mark = open ? "L" : "M";
      open = true;
      return `${mark}${x.toFixed(1)} ${y.toFixed(1)}`;
    }).join("");
  };
  let updates = [];
  const chart = (title, spec) => {
    const one = variable();
    const count = spec.lines[0].values.length;
    const all = [...spec.lines.map((line) => line.values), ...(spec.bands || []).flat()].flat().filter((value) => value !== null && value !== undefined);
    if (!all.length) return;
    const figure = make("figure");
    const caption = make("figcaption");
    const now = make("span", { class: "now hint" });
    caption.append(make("strong", {}, title), document.createTextNode(" "), now);
    figure.append(caption);
    const svg = document.createElementNS(SVG, "svg");
    figure.append(svg);
    charts.append(figure);
    const width = Math.max(figure.clientWidth, 240), height = 200;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    let low = Math.min(...all), high = Math.max(...all);
    if (spec.zero) low = Math.min(low, 0);
    if (!(high > low)) { const pad = Math.abs(high) / 10 || 1; low -= pad; high += pad; }
    const marks = ticks(low, high);
    const left = 14 + 7 * Math.max(...marks.map((mark) => number(mark).length)), right = 12, top = 10, bottom = 36;
    const x = (place) => count === 1 ? (left + width - right) / 2 : left + place * (width - left - right) / (count - 1);
    const y = (value) => top + (high - value) / (high - low) * (height - top - bottom);
    for (const mark of marks) {
      draw(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) });
      draw(svg, "text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, number(mark));
    }
    const every = Math.ceil(count / Math.max(2, Math.floor((width - left) / 44)));
    for (let place = 0; place < count; place += every) {
      draw(svg, "text", { x: x(place), y: height - bottom + 16, "text-anchor": "middle" }, layerName(one, place) || one.name.slice(0, 30));
    }
    if (one.layers.length) draw(svg, "text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "layer");
    (spec.bands || []).forEach(([lows, highs], index) => {
      let edge = [];
      const flush = () => {
        if (edge.length === 1) {
          const [at, a, b] = edge[0];
          draw(svg, "rect", { class: index ? "inner" : "band", x: at - 5, width: 10, y: b, height: Math.max(a - b, 1) });
        } else if (edge.length) {
          const outline = [...edge.map(([at, a]) => [at, a]), ...edge.slice().reverse().map(([at, , b]) => [at, b])];
          draw(svg, "path", { class: index ? "inner" : "band", d: path(outline) + "Z" });
        }
        edge = [];
      };
      lows.forEach((value, place) => {
        if (value === null || highs[place] === null) flush();
        else edge.push([x(place), y(value), y(highs[place])]);
      });
      flush();
    });
    spec.lines.forEach((line, index) => {
      const points = line.values.map((value, place) => [x(place), value === null || value === undefined ? null : y(value)]);
      draw(svg, "path", { class: index ? "second" : "line", d: path(points) });
      if (count <= 40) for (const [px, py] of points) if (py !== null) draw(svg, "circle", { class: index ? "dot-2" : "dot", cx: px, cy: py, r: 2.5 });
    });
    const here = draw(svg, "line", { class: "here", y1: top, y2: height - bottom });
    const told = (place) => spec.told.map(([name, values]) => `${name} ${number(values[place])}`).join(", ");
    const update = () => {
      const place = Math.min(state.layer, count - 1);
      here.setAttribute("x1", x(place));
      here.setAttribute("x2", x(place));
      now.textContent = `${one.layers.length ? `Layer ${layerName(one, place)}: ` : ""}${told(place)}`;
      if (count > 1) {
        svg.setAttribute("aria-valuenow", place);
        svg.setAttribute("aria-valuetext", now.textContent);
      }
    };
    if (count > 1) {
      for (const [name, value] of [["role", "slider"], ["tabindex", "0"], ["aria-valuemin", 0], ["aria-valuemax", count - 1], ["aria-label", `${title}, by layer`]]) svg.setAttribute(name, value);
      const nearest = (event) => {
        const box = svg.getBoundingClientRect();
        const at = (event.clientX - box.left) / box.width * width;
        return Math.max(0, Math.min(count - 1, Math.round((at - left) / (width - left - right) * (count - 1))));
      };
      svg.addEventListener("mousemove", (event) => {
        const place = nearest(event);
        showTip(`layer ${layerName(one, place)}, ${module(one, place)}\n${told(place)}`, { left: event.clientX, top: event.clientY - 8, width: 0, bottom: event.clientY + 14 });
      });
      svg.addEventListener("mouseleave", hideTip);
      svg.addEventListener("click", (event) => selectLayer(nearest(event)));
      svg.addEventListener("keydown", (event) => {
        const to = { ArrowRight: state.layer + 1, ArrowUp: state.layer + 1, ArrowLeft: state.layer - 1, ArrowDown: state.layer - 1, Home: 0, End: count - 1 }[event.key];
        if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        selectLayer(to);
      });
    } else {
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", `${title}: ${told(0)}`);
    }
    updates.push(update);
    update();
  };
  const numbers = (one, columns) => {
    const box = make("details");
    box.append(make("summary", {}, "The numbers"));
    const wide = make("div", { class: "wide", role: "region", tabindex: "0", "aria-label": `Numbers of ${one.name}` });
    const table = make("table");
    table.append(make("caption", {}, `${one.name}, in the sample`));
    const head = make("tr");
    for (const name of ["layer", ...columns.map(([name]) => name)]) head.append(make("th", { scope: "col" }, name));
    table.append(make("thead"));
    table.tHead.append(head);
    const body = make("tbody");
    for (let place = 0; place < one.quantiles.length; place += 1) {
      const row = make("tr");
      row.append(make("th", { scope: "row" }, layerName(one, place) || one.name));
      for (const [, values] of columns) row.append(make("td", {}, values[place] === null || values[place] === undefined ? "–" : number(values[place])));
      body.append(row);
    }
    table.append(body);
    wide.append(table);
    box.append(wide);
    return box;
  };
  const buildCharts = () => {
    const one = variable();
    charts.textContent = "";
    updates = [];
    for (const old of document.querySelectorAll("#charts ~ details")) old.remove();
    if (!one.quantiles || !one.quantiles.length) {
      const waits = served && !one.sample && !one.cut;
      $("layers-of").textContent = waits ? `${one.name}: a sample is being read…` : `${one.name}: no values were read.`;
      return;
    }
    const quantile = data.probabilities.map((_, index) => one.quantiles.map((layer) => layer[index]));
    const all = one.sample.rows + (one.sample.padding || 0) >= one.sample.of;
    const rows = `${one.sample.rows.toLocaleString("en")}${all ? "" : ` of ${one.sample.of.toLocaleString("en")}`} rows`;
    $("layers-of").textContent = `${one.name}, of ${rows}${all ? "" : ", runs spread evenly"}. The variable and the layer are those chosen above.`;
    chart("Values", {
      lines: [{ values: quantile[3] }], bands: [[quantile[1], quantile[5]], [quantile[2], quantile[4]]],
      told: [["median", quantile[3]], ["5 %", quantile[1]], ["25 %", quantile[2]], ["75 %", quantile[4]], ["95 %", quantile[5]]],
    });
    chart("Norms of rows", { zero: true, lines: [{ values: one.norm }, { values: one.norm_max }], told: [["mean", one.norm], ["largest (dashed)", one.norm_max]] });
    if (one.cosine.some((value) => value !== null)) chart("Cosine with the layer before", { lines: [{ values: one.cosine }], told: [["mean", one.cosine]] });
    if (one.nonfinite.some((value) => value > 0)) chart("Values that are NaN or infinite", { zero: true, lines: [{ values: one.nonfinite }], told: [["values", one.nonfinite]] });
    if (one.zeros.some((value) => value > 0)) chart("Share of zeros", { zero: true, lines: [{ values: one.zeros }], told: [["share", one.zeros]] });
    if (!charts.childElementCount) $("layers-of").textContent += " None of its values is finite.";
    charts.after(numbers(one, [
      ...data.probabilities.map((share, index) => [`${Math.round(share * 100)} %`, quantile[index]]),
      ["mean", one.mean], ["norm", one.norm], ["largest norm", one.norm_max], ["cosine", one.cosine],
      ["zeros", one.zeros], ["not finite", one.nonfinite],
    ]));
  };

  // -- what the controls do ---------------------------------------------------------------------

  const slider = $("layer");
  const fillBy = () => {
    const one = variable();
    const by = $("by");
    const before = state.by;
    by.textContent = "";
    by.append(make("option", { value: "norm" }, "norm"));
    const tops = (one.features || [])[state.layer];
    (tops || []).forEach((feature, index) =>
      by.append(make("option", { value: String(index) }, `feature ${feature.feature}`)));
    if (served && !tops && /^[0-9]+$/.test(before)) by.append(make("option", { value: before }, "feature …"));
    if (served && one.width > 1) by.append(make("option", { value: "any" }, "feature number…"));
    state.by = [...by.options].some((option) => option.value === before) ? before : "norm";
    by.value = state.by;
    $("number-field").hidden = state.by !== "any";
  };
  const tellLayer = () => {
    const one = variable();
    const name = layerName(one, state.layer);
    $("layer-name").textContent = name;
    slider.value = state.layer;
    slider.setAttribute("aria-valuetext", `layer ${name}, ${module(one, state.layer)}`);
    slider.title = module(one, state.layer);
  };
  const paint = () => {
    if (!onStrip(variable())) return;
    $("scale").disabled = state.by !== "norm" || variable().norms.length < 2;
    const waits = served && !series();
    tokens.setAttribute("aria-busy", String(Boolean(waits)));
    if (!waits) paintStrip(); // until then it keeps the colours that it had
    tellToken();
    paintMap();
  };
  const selectLayer = (place) => {
    state.layer = Math.max(0, Math.min(place, depth(variable()) - 1));
    tellLayer();
    fillBy();
    paint();
    updates.forEach((update) => update());
    askValues();
  };
  const selectVariable = (index) => {
    state.variable = index;
    const one = variable();
    const shown = onStrip(one);
    state.layer = Math.min(state.layer, depth(one) - 1);
    slider.max = Math.max(depth(one) - 1, 1);
    $("layer-field").hidden = depth(one) < 2;
    for (const id of ["strip", "detail", "strip-hint", "by", "scale"]) {
      const field = ["by", "scale"].includes(id) ? $(id).parentElement : $(id);
      field.hidden = !shown;
    }
    document.querySelector(".legend").hidden = !shown;
    $("map-figure").hidden = !shown;
    if (shown) { buildStrip(); markToken(); }
    buildCharts();
    selectLayer(state.layer);
    if (served) askVariable();
  };

  // -- what a served page asks for --------------------------------------------------------------

  const server = served && fetched((waits, failed, again) => {
    $("explore").setAttribute("aria-busy", String(waits));
    clearTimeout(server.due);
    if (waits) server.due = setTimeout(() => { $("asking").textContent = "Loading…"; }, 150);
    else $("asking").textContent = "";
    $("failed").hidden = !failed;
    $("failed-why").textContent = failed || "";
    $("again").onclick = again;
  });
  const window_ = () => {
    const { sequence, first } = served.axes[variable().dim];
    return { sequence, first, count: served.tokens };
  };
  const asksFor = (one) => ({ variable: one.name, ...window_() });
  const forget = (dim) => {
    for (const one of variables.filter((other) => other.dim === dim)) {
      one.norms = one.cut ? [] : new Array(Math.max(one.layers.length, 1)).fill(null);
      one.features = one.norms.map(() => null);
      one.any = null;
    }
    shownStrip = null;
  };
  const askValues = () => {
    const one = variable();
    if (!served || !onStrip(one) || (state.by === "any" ? series() : one.features[state.layer])) return;
    const layer = state.layer, wanted = state.number;
    if (state.by === "any") {
      server.ask("values", "feature", { ...asksFor(one), layer, feature: wanted }, (said) => {
        one.any = { key: `${layer}:${wanted}`, values: said.values };
        if (one === variable()) paint();
      });
    } else {
      server.ask("values", "layer", { ...asksFor(one), layer }, (said) => {
        one.norms[layer] = said.norms;
        one.features[layer] = said.features;
        if (one !== variable() || layer !== state.layer) return;
        fillBy();
        paint();
        if (!one.norms.some((values) => !values)) return;
        askMap(one);
      });
    }
  };
  // the norms of the other layers, some at a time, those next to the chosen one first
  const askMap = (one) => {
    const left = one.norms.map((values, layer) => values ? null : layer).filter((layer) => layer !== null);
    if (one !== variable() || !left.length) return;
    const nearest = left.reduce((best, layer) => Math.abs(layer - state.layer) < Math.abs(best - state.layer) ? layer : best);
    let layer = nearest, layers = 1;
    while (layers < one.together && layer + layers < one.norms.length && !one.norms[layer + layers]) layers += 1;
    while (layers < one.together && layer > 0 && !one.norms[layer - 1]) { layer -= 1; layers += 1; }
    server.ask("map", "norms", { ...asksFor(one), layer, layers }, (said) => {
      said.norms.forEach((values, place) => { one.norms[layer + place] = values; });
      if (one !== variable()) return;
      if ($("scale").value === "all" || !series()) paint();
      else paintMap();
      askMap(one);
    });
  };
  const askVariable = () => {
    const one = variable();
    server.stop("map");
    $("number").min = one.least;
    $("number").max = one.most;
    $("number-of").textContent = `(${one.least.toLocaleString("en")} to ${one.most.toLocaleString("en")})`;
    if (!one.sample && !one.cut) {
      server.ask("distribution", "distribution", { variable: one.name }, (said) => {
        Object.assign(one, said);
        if (one === variable()) { buildCharts(); updates.forEach((update) => update()); }
      });
    }
    if (!data.strips[one.dim]) askTokens();
    else tellSequence();
    if (onStrip(one) && one.norms.some((values) => !values) && series()) askMap(one);
  };
  const askTokens = () => {
    const dim = variable().dim;
    if (!served.axes[dim].sequences || variable().cut) { tellSequence(); return; }
    server.ask("tokens", "tokens", { axis: dim, ...window_() }, (said) => {
      data.strips[dim] = said;
      forget(dim);
      if (dim !== variable().dim) return;
      state.token = 0;
      selectVariable(state.variable);
    });
  };
  const tellSequence = () => {
    const axis = served.axes[variable().dim], mine = strip();
    $("asked").hidden = !mine;
    if (!mine) return;
    const { pass, item, passes, tokens: of } = mine.about;
    $("sequence").max = axis.sequences - 1;
    $("sequence").value = axis.sequence;
    $("sequence-of").textContent = `(0 to ${(axis.sequences - 1).toLocaleString("en")})`;
    $("sequence-back").disabled = axis.sequence <= 0;
    $("sequence-on").disabled = axis.sequence >= axis.sequences - 1;
    const told = `${of.toLocaleString("en")} token${of === 1 ? "" : "s"}`;
    $("sequence-is").textContent = pass < 0 ? told
      : `${told}, batch item ${item}, ${passes > 1 ? `${passes.toLocaleString("en")} passes from ${pass} on` : `pass ${pass}`}`;
    $("from-field").hidden = of <= served.tokens && !axis.first;
    $("from").max = of - 1;
    $("from").value = axis.first;
    $("from-of").textContent = `(0 to ${(of - 1).toLocaleString("en")})`;
    $("from-back").disabled = axis.first <= 0;
    $("from-on").disabled = axis.first + served.tokens >= of;
  };
  const goTo = (sequence, first) => {
    const axis = served.axes[variable().dim];
    const within = (value, most) => Math.max(0, Math.min(Math.floor(value) || 0, most));
    const other = within(sequence, axis.sequences - 1);
    axis.first = other === axis.sequence ? within(first, strip().about.tokens - 1) : 0;
    axis.sequence = other;
    server.stop("map");
    askTokens();
  };
  const listen = () => {
    $("asking").hidden = false;
    for (const dim of Object.keys(served.axes)) forget(dim);
    const axis = () => served.axes[variable().dim];
    for (const [id, event, go] of [
      ["sequence", "change", () => goTo(Number($("sequence").value), 0)],
      ["sequence-back", "click", () => goTo(axis().sequence - 1, 0)],
      ["sequence-on", "click", () => goTo(axis().sequence + 1, 0)],
      ["from", "change", () => goTo(axis().sequence, Number($("from").value))],
      ["from-back", "click", () => goTo(axis().sequence, axis().first - served.tokens)],
      ["from-on", "click", () => goTo(axis().sequence, axis().first + served.tokens)],
      ["number", "change", () => {
        const one = variable();
        state.number = Math.max(one.least, Math.min(Math.floor(Number($("number").value)) || 0, one.most));
        $("number").value = state.number;
        paint();
        askValues();
      }],
    ]) $(id).addEventListener(event, go);
  };

  if (variables.length) {
    $("explore").hidden = false;
    variables.forEach((one, index) => $("variable").append(make("option", { value: index }, one.name)));
    $("variable").addEventListener("change", (event) => selectVariable(Number(event.target.value)));
    slider.addEventListener("input", () => selectLayer(Number(slider.value)));
    $("by").addEventListener("change", (event) => {
      state.by = event.target.value;
      $("number-field").hidden = state.by !== "any";
      paint();
      askValues();
    });
    $("scale").addEventListener("change", paint);
    paintLegend();
    if (served) listen();
    state.layer = Math.floor(depth(variables[0]) / 2);
    selectVariable(0);
    let width = document.documentElement.clientWidth, due = 0;
    window.addEventListener("resize", () => {
      if (document.documentElement.clientWidth === width) return;
      width = document.documentElement.clientWidth;
      cancelAnimationFrame(due);
      due = requestAnimationFrame(() => { hideTip(); buildCharts(); updates.forEach((update) => update()); paintMap(); });
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintMap);
  } else {
    $("empty").hidden = false;
    $("layers-of").textContent = "There are no values to tell of.";
  }

  const copy = $("copy");
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    const code = $("code").textContent;
    try {
      await navigator.clipboard.writeText(code);
      $("copied").textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren($("code"));
      $("copied").textContent = "Selected: press Ctrl+C.";
    }
  });
})();
