// A picture's file to pixels: upright, transparency on white, as vlmguard's runtime/images/open_picture.py opens it.

import { Refused } from "./refused.mjs";

const LARGEST_FILE = 64 * 2 ** 20; // bytes
const MOST_PIXELS = 50_000_000;

/**
 * @param {Blob} blob the file
 * @param {string} name its name, for error messages
 * @returns {Promise<{width: number, height: number, data: Uint8ClampedArray}>} RGBA, opaque, row by row
 */
export async function readPicture(blob, name) {
  if (blob.size > LARGEST_FILE) throw new Refused(`${name}: has more than ${LARGEST_FILE / 2 ** 20} MiB; scale it down first.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch {
    throw new Refused(`${name}: is not a picture that this browser can read; choose a PNG, JPEG or WebP file.`);
  }
  const { width, height } = bitmap;
  try {
    if (width * height > MOST_PIXELS) throw new Refused(`${name}: has ${width} x ${height} pixels; scale it down first.`);
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0);
    return { width, height, data: context.getImageData(0, 0, width, height).data };
  } finally {
    bitmap.close();
  }
}
