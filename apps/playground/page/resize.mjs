// Pillow's resampling, in its own fixed-point arithmetic: a browser's scaling gives other pixels than the model was trained
// on. After src/libImaging/Resample.c of Pillow 13 (8 bits per channel); older ones always began with the rows.

const PRECISION = 22; // bits behind the point: 32, less 8 of a pixel, less 2 for sums beyond it

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0);

// name -> [how far it reaches, its weight at a distance]
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(x * Math.PI)))],
  bicubic: [2, (x) => cubic(Math.abs(x))],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/** `{width, height, data}` with 3 channels, to another size. */
export function resize(picture, width, height, filter) {
  if (filter === "nearest") return nearest(picture, width, height);
  const [fewerRows, fewerColumns] = [picture.height - height, picture.width - width];
  const columnsFirst = fewerRows > 0 && fewerRows > 2 * fewerColumns; // what each pass rounds is seen in the next
  return columnsFirst ? toWidth(toHeight(picture, height, filter), width, filter) : toHeight(toWidth(picture, width, filter), height, filter);
}

function toWidth(picture, width, filter) {
  if (width === picture.width) return picture;
  const data = pass(picture.data, 3, picture.width * 3, picture.height, weights(picture.width, width, filter), 3, width * 3);
  return { width, height: picture.height, data };
}

function toHeight(picture, height, filter) {
  if (height === picture.height) return picture;
  const line = picture.width * 3;
  return { width: picture.width, height, data: pass(picture.data, line, 3, picture.width, weights(picture.height, height, filter), line, 3) };
}

/**
 * One direction: `lines` lines, along which pixels are `step` apart; the lines themselves are `line` apart. `toStep` and
 * `toLine` are the same of what comes out.
 */
function pass(data, step, line, lines, reach, toStep, toLine) {
  const out = new Uint8ClampedArray(lines * reach.length * 3);
  for (let number = 0; number < lines; number++) {
    reach.forEach(({ first, fixed }, place) => {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 1 << (PRECISION - 1);
        for (let k = 0; k < fixed.length; k++) sum += data[number * line + (first + k) * step + channel] * fixed[k];
        out[number * toLine + place * toStep + channel] = sum >> PRECISION; // clamped to 0 .. 255
      }
    });
  }
  return out;
}

/** For each place of the new line: the first place of the old one that counts, and the weights from there on. */
function weights(from, to, filter) {
  const [support, weight] = FILTERS[filter];
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: to }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const last = Math.min(from, Math.trunc(center + support * stretch + 0.5));
    const found = Array.from({ length: last - first }, (_, k) => weight((k + first - center + 0.5) * (1 / stretch)));
    const total = found.reduce((sum, value) => sum + value, 0) || 1;
    const fixed = Int32Array.from(found, (value) => {
      const scaled = (value / total) * 2 ** PRECISION;
      return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
    return { first, fixed };
  });
}

function nearest({ width: fromWidth, height: fromHeight, data }, width, height) {
  const out = new Uint8ClampedArray(width * height * 3);
  const [columns, rows] = [places(fromWidth, width), places(fromHeight, height)];
  rows.forEach((fromY, y) => {
    columns.forEach((fromX, x) => {
      const from = (fromY * fromWidth + fromX) * 3;
      out.set(data.subarray(from, from + 3), (y * width + x) * 3);
    });
  });
  return { width, height, data: out };
}

/** The old place of each new one, summed up as Pillow's Geometry.c does: a product would round elsewhere. */
function places(from, to) {
  const scale = from / to;
  let at = scale * 0.5;
  return Array.from({ length: to }, () => {
    const place = Math.trunc(at);
    at += scale;
    return place;
  });
}
