// A prepared picture through the vision encoder, to the rows that go to its image tokens. As vlmguard's runtime/images/vision.py.

import { Refused } from "./refused.mjs";
import { tensor } from "./tensors.mjs";

/**
 * @param ort onnxruntime-web
 * @param session of the encoder
 * @param {{arrays: object, grid: number[] | null}} prepared as `preparePicture` returns it
 * @returns {Promise<{features, count: number, grid: number[] | null}>} rows `[..., width]` for `count` image tokens
 */
export async function look(ort, session, { arrays, grid }) {
  const feeds = Object.fromEntries(session.inputMetadata.map((port) => [port.name, fed(ort, port, arrays[port.name])]));
  const outputs = await session.run(feeds);
  const features = outputs.image_features ?? outputs[session.outputNames[0]];
  return { features, count: features.size / features.dims.at(-1), grid };
}

/** One input, without the leading axes of length 1 (one prompt, one picture) that this graph leaves out. */
function fed(ort, { name, type, shape }, { dims, data }) {
  const extra = dims.length - shape.length;
  if (extra < 0 || dims.slice(0, extra).some((size) => size !== 1)) {
    throw new Refused(`The vision encoder takes ${name} of ${shape.length} axes, the image processor gives ${dims.join(" x ")}; it is not this model's.`);
  }
  return tensor(ort, type, data, dims.slice(extra));
}
