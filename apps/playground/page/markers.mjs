// The text that stands for a picture in a prompt: its image tokens, and markers around those of each tile. As vlmguard's
// runtime/chat/picture_layouts.py.

import { Refused } from "./refused.mjs";

/**
 * @param {{count: number, grid: number[] | null}} picture its image tokens; rows and columns of its tiles, if it is cut
 * @param {string} token the image token
 * @param {object} layout `chat.layout` of facts.json
 */
export function pictureText(picture, token, layout) {
  const body = picture.grid === null ? filled(layout.alone, layout, { tokens: token.repeat(picture.count) }) : tiled(picture, token, layout);
  return filled(layout.start, layout) + body + filled(layout.end, layout);
}

/** The tiles, and the small copy of the whole picture before or behind them; all of them have as many tokens. */
function tiled({ count, grid: [rows, columns] }, token, layout) {
  const hasWhole = layout.whole !== "" && !(layout.aloneAsTile && rows * columns === 1);
  const parts = rows * columns + Number(hasWhole);
  if (count % parts !== 0) throw new Refused(`The picture's ${count} image tokens cannot be divided among ${parts} tiles; the image processor is not this model's.`);
  const tokens = token.repeat(count / parts);
  const tile = (row, column) => filled(layout.tile, layout, { tokens, row: row + 1, column: column + 1, number: row * columns + column + 1 });
  const line = (row) => Array.from({ length: columns }, (_, column) => tile(row, column)).join(filled(layout.betweenColumns, layout));
  const lines = Array.from({ length: rows }, (_, row) => line(row) + filled(layout.afterRow, layout));
  const body = lines.join(filled(layout.betweenRows, layout));
  const whole = hasWhole ? filled(layout.whole, layout, { tokens }) : "";
  return layout.wholeFirst ? whole + body : body + whole;
}

/** A text with its `{names}` replaced by markers and values. */
function filled(text, { markers }, values = {}) {
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? markers[name]);
}
