// What each guarded layer's gate compares with its threshold, token by token: a small line chart per layer, and a table.

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, MARGIN] = [480, 112, 8]; // units of the drawing
const END_OF_PROMPT = "end of the prompt";

export class Gates {
  /**
   * @param {HTMLElement} charts where the charts go
   * @param {HTMLTableElement} table
   * @param {object} guard `guard` of facts.json, of a mode that has gates
   */
  constructor(charts, table, guard) {
    this.guard = guard;
    this.table = table;
    this.thresholds = guard.thresholds.map(Math.fround); // the graph compares float32 numbers
    this.charts = guard.layers.map((layer, row) => new Chart(charts, layer, this.thresholds[row]));
    const head = element("tr", element("th", "at"), ...guard.layers.map((layer) => element("th", `layer ${layer}`)));
    const below = element("tr", element("th", "threshold"), ...this.thresholds.map((value) => element("th", shown(value))));
    for (const cell of [...head.cells, ...below.cells]) cell.scope = "col";
    table.tHead.replaceChildren(head, below);
    this.clear();
  }

  clear() {
    this.rows = [];
    this.said = END_OF_PROMPT;
    this.table.tBodies[0].replaceChildren();
    for (const chart of this.charts) chart.clear();
  }

  /**
   * One more token.
   *
   * @param {number[]} scores by guarded layer: what the gates compared before it was chosen
   * @param {string} word the token that was chosen then
   */
  add(scores, word) {
    this.rows.push(scores);
    const open = this.opened(this.rows.length - 1);
    const cells = scores.map((score, row) => element("td", shown(score) + (open[row] ? " open" : "")));
    cells.forEach((cell, row) => cell.classList.toggle("open", open[row]));
    const at = element("th", this.said);
    at.scope = "row";
    this.table.tBodies[0].append(element("tr", at, ...cells));
    this.said = word;
    this.charts.forEach((chart, row) => chart.add(scores[row], open[row]));
  }

  /** Which gates were open at a token; a gate that is held was decided at the end of the prompt. */
  opened(number) {
    const deciding = this.guard.decided === "prompt" ? this.rows[0] : this.rows[number];
    return deciding.map((score, row) => score > this.thresholds[row]);
  }
}

class Chart {
  constructor(parent, layer, threshold) {
    this.threshold = threshold;
    this.name = element("strong", `Layer ${layer}`);
    this.score = element("span", "");
    this.state = element("span", "");
    this.drawing = document.createElementNS(SVG, "svg");
    this.drawing.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.drawing.setAttribute("role", "img");
    const figure = element("figure", element("figcaption", this.name, this.score, this.state), this.drawing);
    figure.className = "gate";
    parent.append(figure);
    this.clear();
  }

  clear() {
    this.scores = [];
    this.open = [];
    this.draw();
  }

  add(score, open) {
    this.scores.push(score);
    this.open.push(open);
    this.draw();
  }

  draw() {
    const [count, last] = [this.scores.length, this.scores.at(-1)];
    const opened = this.open.filter(Boolean).length;
    this.score.textContent = `score ${count ? shown(last) : "–"}, threshold ${shown(this.threshold)}`;
    this.state.textContent = count ? (opened ? `open at ${opened} of ${count}` : "closed") : "not asked";
    this.state.className = opened ? "state open" : "state";
    this.drawing.setAttribute("aria-label", `${this.name.textContent}: ${count} scores, ${opened} times open; the table has the numbers`);
    const values = [...this.scores, this.threshold];
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = (high - low) * 0.15 || Math.abs(high) * 0.15 || 1;
    const y = (value) => MARGIN + ((high + room - value) / (high - low + 2 * room)) * (HEIGHT - 2 * MARGIN);
    const x = (index) => MARGIN + (count > 1 ? index / (count - 1) : 0) * (WIDTH - 2 * MARGIN);
    const level = y(this.threshold);
    const points = this.scores.map((score, index) => [x(index), y(score)]);
    this.drawing.replaceChildren(
      shape("rect", "above", { x: 0, y: 0, width: WIDTH, height: level }),
      shape("line", "threshold", { x1: 0, x2: WIDTH, y1: level, y2: level }),
      shape("polyline", "line", { points: points.map((point) => point.join()).join(" ") }),
      ...points.map(([cx, cy], index) => shape("circle", this.open[index] ? "mark open" : "mark", { cx, cy, r: 3.2 })),
      label("opens above", level > 22 ? level - 5 : level + 13),
    );
  }
}

function label(words, y) {
  const text = shape("text", "", { x: WIDTH - 4, y, "text-anchor": "end" });
  text.textContent = words;
  return text;
}

function shape(name, kind, attributes) {
  const made = document.createElementNS(SVG, name);
  if (kind) made.setAttribute("class", kind);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export function element(name, ...content) {
  const made = document.createElement(name);
  made.append(...content); // strings become text, never markup
  return made;
}

function shown(value) {
  return Math.abs(value) >= 1e5 ? value.toExponential(2) : value.toFixed(3);
}
