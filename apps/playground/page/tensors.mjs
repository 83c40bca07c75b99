// Tensors of onnxruntime-web in the dtypes of a graph's inputs.

import { Refused } from "./refused.mjs";

const ARRAYS = {
  float32: Float32Array,
  float16: globalThis.Float16Array, // not in every browser yet
  int64: BigInt64Array,
  int32: Int32Array,
  bool: Uint8Array,
};

/** The typed array of a dtype. */
export function arrayOf(dtype) {
  const found = ARRAYS[dtype];
  if (found === undefined) throw new Refused(`This browser has no ${dtype} numbers, which the model needs; use a newer one, or another --variant.`);
  return found;
}

/** A tensor of ordinary numbers; `numbers` is any list of them. */
export function tensor(ort, dtype, numbers, dims) {
  const list = dtype === "int64" ? Array.from(numbers, BigInt) : numbers;
  return new ort.Tensor(dtype, arrayOf(dtype).from(list), dims);
}

/** A tensor of one number. */
export function filled(ort, dtype, number, dims) {
  const count = dims.reduce((product, size) => product * size, 1);
  return tensor(ort, dtype, new Array(count).fill(number), dims);
}

/** The tensor in another float dtype, itself if it is of that one. */
export function cast(ort, value, dtype) {
  return value.type === dtype ? value : new ort.Tensor(dtype, arrayOf(dtype).from(value.data), value.dims);
}
