// Pixels to tiles and a small copy of the whole, as Idefics3 and SmolVLM take them: the steps, order and roundings of vlmguard's
// runtime/images/images_idefics3.py, which are those of transformers.

import { normalised, withoutAlpha } from "./pixel_steps.mjs";
import { resize } from "./resize.mjs";

/**
 * @param {{width: number, height: number, data: Uint8ClampedArray}} picture RGBA
 * @param {object} facts `image` of facts.json
 * @returns {{arrays: object, grid: number[] | null}} `pixel_values [1, tiles, 3, edge, edge]` and `pixel_attention_mask
 *   [1, tiles, edge, edge]`, each `{dims, data}`; rows and columns of tiles, `null` for a picture of one tile
 */
export function tiledPicture(picture, facts) {
  const { longestEdge, tile: edge } = facts;
  let whole = withoutAlpha(picture);
  if (longestEdge !== null) whole = resized(whole, withLongestEdge(whole, longestEdge), facts);
  const { frames, grid } = cut(whole, facts);
  const values = new Float32Array(frames.length * 3 * edge * edge);
  frames.forEach((frame, number) => values.set(normalised(frame, facts), number * 3 * edge * edge));
  const mask = new Uint8Array(frames.length * edge * edge).fill(1); // no tile is padded
  return {
    arrays: {
      pixel_values: { dims: [1, frames.length, 3, edge, edge], data: values },
      pixel_attention_mask: { dims: [1, frames.length, edge, edge], data: mask },
    },
    grid,
  };
}

/** The tiles in reading order, then the small copy. */
function cut(whole, facts) {
  const { tile: edge, splits } = facts;
  if (!splits) return { frames: [resized(whole, [edge, edge], facts)], grid: null };
  const [height, width] = inTiles(whole, edge);
  const fitted = resized(whole, [height, width], facts);
  if (height <= edge && width <= edge) return { frames: [fitted], grid: null };
  const frames = [];
  for (let top = 0; top < height; top += edge) {
    for (let left = 0; left < width; left += edge) frames.push(part(fitted, top, left, edge));
  }
  frames.push(resized(fitted, [edge, edge], facts));
  return { frames, grid: [height / edge, width / edge] };
}

/** `[height, width]` with that longer side; the shorter one is even. */
function withLongestEdge({ height, width }, longest) {
  const aspect = width / height;
  const wide = width >= height;
  let short = Math.trunc(wide ? longest / aspect : longest * aspect);
  short = Math.max(short + (short % 2), 1);
  return wide ? [short, longest] : [longest, short];
}

/** `[height, width]` as multiples of a tile's edge, rounded up; the longer side decides first. */
function inTiles({ height, width }, edge) {
  const aspect = width / height;
  const up = (length) => Math.ceil(length / edge) * edge;
  if (width >= height) return [up(Math.trunc(up(width) / aspect)), up(width)];
  return [up(height), up(Math.trunc(up(height) * aspect))];
}

const resized = (picture, [height, width], { resample }) => resize(picture, width, height, resample);

function part({ width, data }, top, left, edge) {
  const out = new Uint8ClampedArray(edge * edge * 3);
  for (let y = 0; y < edge; y++) {
    const from = ((top + y) * width + left) * 3;
    out.set(data.subarray(from, from + edge * 3), y * edge * 3);
  }
  return { width: edge, height: edge, data: out };
}
