// A picture's pixels to what the vision encoder takes, by the kind of the model's image processor.

import { pixelValues } from "./pixels.mjs";
import { tiledPicture } from "./tiles.mjs";

const KINDS = {
  whole: (picture, facts) => ({ arrays: { pixel_values: pixelValues(picture, facts) }, grid: null }),
  tiles: tiledPicture,
};

/**
 * @param {{width: number, height: number, data: Uint8ClampedArray}} picture RGBA
 * @param {object} facts `image` of facts.json
 * @returns {{arrays: object, grid: number[] | null}} `{dims, data}` by the encoder's input; rows and columns of tiles, if it is cut
 */
export const preparePicture = (picture, facts) => KINDS[facts.kind](picture, facts);
