// Pixels to `pixel_values` of one size, as CLIP, SigLIP and LLaVA do it: the steps, order and roundings of vlmguard's
// runtime/images/images.py, which are those of transformers.

import { normalised, withoutAlpha } from "./pixel_steps.mjs";
import { resize } from "./resize.mjs";

/**
 * @param {{width: number, height: number, data: Uint8ClampedArray}} picture RGBA
 * @param {object} facts `image` of facts.json
 * @returns {{dims: number[], data: Float32Array}} `[1, 3, height, width]`
 */
export function pixelValues(picture, facts) {
  let made = withoutAlpha(picture);
  if (facts.padToSquare) made = paddedToSquare(made, facts.mean);
  const size = resizedSize(made, facts);
  if (size !== null) made = resize(made, size[1], size[0], facts.resample);
  if (facts.cropTo !== null) made = centerCropped(made, ...facts.cropTo);
  return { dims: [1, 3, made.height, made.width], data: normalised(made, facts) };
}

/** `[height, width]` after resizing, `null` to leave it; the longer side is rounded down. */
function resizedSize({ width, height }, { shortestEdge, resizeTo }) {
  if (shortestEdge === null) return resizeTo;
  const long = Math.trunc((shortestEdge * Math.max(width, height)) / Math.min(width, height));
  return height <= width ? [shortestEdge, long] : [long, shortestEdge];
}

function paddedToSquare(picture, mean) {
  const edge = Math.max(picture.width, picture.height);
  if (picture.width === picture.height) return picture;
  const color = (mean ?? [0, 0, 0]).map((channel) => Math.trunc(channel * 255));
  const top = Math.trunc((edge - picture.height) / 2);
  return pasted(picture, edge, edge, top, Math.trunc((edge - picture.width) / 2), color);
}

function centerCropped(picture, height, width) {
  const top = Math.floor((picture.height - height) / 2);
  return pasted(picture, height, width, -top, -Math.floor((picture.width - width) / 2), [0, 0, 0]);
}

/** What of a picture falls on a sheet of one colour, its corner put at `(top, left)`. */
function pasted({ width: fromWidth, height: fromHeight, data }, height, width, top, left, color) {
  const out = new Uint8ClampedArray(width * height * 3);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [fromY, fromX] = [y - top, x - left];
      const inside = fromY >= 0 && fromY < fromHeight && fromX >= 0 && fromX < fromWidth;
      const from = (fromY * fromWidth + fromX) * 3;
      out.set(inside ? data.subarray(from, from + 3) : color, (y * width + x) * 3);
    }
  }
  return { width, height, data: out };
}
