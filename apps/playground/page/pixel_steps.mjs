// Steps that image processors share, on `{width, height, data}` with 3 channels, row by row. As vlmguard's
// runtime/images/pixel_steps.py.

/** RGBA, opaque, to RGB. */
export function withoutAlpha({ width, height, data }) {
  const out = new Uint8ClampedArray(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) out.set(data.subarray(from, from + 3), to);
  return { width, height, data: out };
}

/** Channels first; rounded to float32 after each operation, as numpy does. */
export function normalised({ width, height, data }, { rescaleFactor, mean, std }) {
  const plane = width * height;
  const values = new Float32Array(3 * plane);
  for (let channel = 0; channel < 3; channel++) {
    for (let at = 0; at < plane; at++) {
      let value = Math.fround(data[at * 3 + channel] * (rescaleFactor ?? 1));
      if (mean !== null && std !== null) {
        value = Math.fround(value - Math.fround(mean[channel])) / Math.fround(std[channel]);
      }
      values[channel * plane + at] = value;
    }
  }
  return values;
}
