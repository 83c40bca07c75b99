// A guarded vision-language model in Node.js with onnxruntime-node alone: token ids (and pixels) in, token ids out.
//
//   const model = await GuardedModel.open("guarded");       // an onnx-community folder that vlmguard-export wrote
//   const tokens = await model.answer({ ids, textIds, pixelValues });
//
// Nothing of the guard is here: it is part of the decoder's graph. Modes supervise, combined and align take one more input,
// the coordinates of the text-only prompt, which a first, short pass gives; align takes them in the prompt's call alone.
import { join } from "node:path";
import { InferenceSession, Tensor } from "onnxruntime-node";

const SUPERVISORS = ["vlmguard.supervisor", "vlmguard.prompt_supervisor"]; // supervise and combined; align
const COORDINATES = "vlmguard.coordinates";
const NO_SUPERVISOR = -1e30; // no gate opens, so the text-only pass is the unguarded model's

export class GuardedModel {
  static async open(folder, { imageTokenId, eosIds }) {
    const part = (name) => InferenceSession.create(join(folder, "onnx", `${name}.onnx`));
    const model = new GuardedModel();
    model.decoder = await part("decoder_model_merged");
    model.embedTokens = await part("embed_tokens");
    model.visionEncoder = await part("vision_encoder");
    return Object.assign(model, { imageTokenId, eosIds });
  }

  /**
   * The greedy answer, its end-of-sequence token included.
   *
   * @param ids the prompt, with the image tokens where the picture goes
   * @param textIds the prompt as it is without a picture (modes supervise, combined and align)
   * @param pixelValues Float32 Tensor [1, 3, height, width], or null
   */
  async answer({ ids, textIds, pixelValues = null, maxNewTokens = 24 }) {
    let guard = this.supervisor ? { [this.supervisor]: await this.coordinates(textIds) } : {};
    let embeds = await this.embed(ids, pixelValues && (await this.look(pixelValues)));
    let cache = this.emptyCache();
    const tokens = [];
    for (let seen = ids.length; tokens.length < maxNewTokens; seen += 1) {
      const outputs = await this.run(embeds, seen, { ...cache, ...guard });
      const token = likeliest(outputs.logits);
      tokens.push(token);
      if (this.eosIds.includes(token)) break;
      cache = refilled(outputs);
      if (this.supervisor === SUPERVISORS[1]) guard = this.silence(); // no token of the answer is edited
      embeds = await this.embed([token]);
    }
    return tokens;
  }

  /** The input for the text-only coordinates, if the mode has one. */
  get supervisor() {
    return SUPERVISORS.find((name) => this.decoder.inputNames.includes(name));
  }

  /** The coordinates of the text alone: the first of the two passes. */
  async coordinates(textIds) {
    const outputs = await this.run(await this.embed(textIds), textIds.length, { ...this.emptyCache(), ...this.silence() });
    return outputs[COORDINATES];
  }

  /** No supervisor: nothing is edited. */
  silence() {
    const { name, shape } = this.decoder.inputMetadata.find((input) => input.name === this.supervisor);
    const [layers, rank] = shape.slice(1);
    return { [name]: new Tensor("float32", new Float32Array(layers * rank).fill(NO_SUPERVISOR), [1, layers, rank]) };
  }

  /** One call of the decoder; `seen` tokens so far, the new ones included. */
  run(embeds, seen, more) {
    const fresh = embeds.dims[1];
    return this.decoder.run({
      inputs_embeds: embeds,
      attention_mask: integers(Array(seen).fill(1)),
      position_ids: integers(Array.from({ length: fresh }, (_, i) => seen - fresh + i)),
      ...more,
    });
  }

  async look(pixelValues) {
    const outputs = await this.visionEncoder.run({ pixel_values: pixelValues });
    return outputs[this.visionEncoder.outputNames[0]];
  }

  /** Embeddings of the tokens, with the picture's features at the image tokens. */
  async embed(ids, features = null) {
    const outputs = await this.embedTokens.run({ input_ids: integers(ids) });
    const embeds = outputs[this.embedTokens.outputNames[0]];
    if (features === null) return embeds;
    const width = embeds.dims[2];
    const at = ids.flatMap((id, position) => (id === this.imageTokenId ? [position] : []));
    if (at.length * width !== features.data.length) {
      throw new Error(`the prompt has ${at.length} image tokens, the picture ${features.data.length / width} features`);
    }
    at.forEach((position, row) => embeds.data.set(features.data.subarray(row * width, (row + 1) * width), position * width));
    return embeds;
  }

  emptyCache() {
    const past = this.decoder.inputMetadata.filter((input) => input.name.startsWith("past_key_values."));
    return Object.fromEntries(
      past.map(({ name, type, shape: [, heads, , size] }) => [name, new Tensor(type, new Float32Array(0), [1, heads, 0, size])]),
    );
  }
}

const integers = (numbers) => new Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);

const refilled = (outputs) =>
  Object.fromEntries(
    Object.entries(outputs)
      .filter(([name]) => name.startsWith("present."))
      .map(([name, tensor]) => [name.replace("present.", "past_key_values."), tensor]),
  );

/** The token with the highest logit at the last position. */
function likeliest(logits) {
  const last = logits.data.subarray(logits.data.length - logits.dims[2]);
  return last.reduce((best, logit, token) => (logit > last[best] ? token : best), 0);
}
