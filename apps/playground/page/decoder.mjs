// One decoder graph, running: the prompt, then a token at a time through the KV cache. As vlmguard's runtime/decoder.py.

import { cast, filled, tensor } from "./tensors.mjs";

const SUPERVISOR = "vlmguard.supervisor";
const PROMPT_SUPERVISOR = "vlmguard.prompt_supervisor"; // for the call with the prompt's end alone
const COORDINATES = "vlmguard.coordinates";
const SCORES = "vlmguard.gate_scores";
const PAST_GATE = "vlmguard.past_gate";
const PRESENT_GATE = "vlmguard.present_gate";
const NO_SUPERVISOR = -1e30; // below every threshold: a pass that is never edited
const UNDECIDED = -1;

export class Decoder {
  /**
   * @param ort onnxruntime-web
   * @param session of the graph
   * @param {object} facts facts.json, for heads that the graph leaves open
   * @param {object} part of facts.json: the graph's cache inputs, and which output refills each
   */
  constructor(ort, session, facts, part) {
    this.ort = ort;
    this.session = session;
    this.facts = facts;
    this.ports = new Map(session.inputMetadata.map((port) => [port.name, port]));
    this.caches = new Map(Object.entries(part.cache));
  }

  get supervised() {
    return this.supervisor !== undefined;
  }

  /** The input for the text-only coordinates, if there is one. */
  get supervisor() {
    return [SUPERVISOR, PROMPT_SUPERVISOR].find((name) => this.ports.has(name));
  }

  /** The supervisor of the text-only pass: no gate opens. */
  noSupervisor() {
    const [, layers, rank] = this.ports.get(this.supervisor).shape;
    return filled(this.ort, "float32", NO_SUPERVISOR, [1, layers, rank]);
  }

  get embedsType() {
    return this.ports.get("inputs_embeds").type;
  }

  /** The coordinates of a text-only prompt, which a supervised graph takes as an input with the real prompt. */
  async readSupervisor(embeds) {
    const generation = new Generation(this, this.noSupervisor());
    try {
      const outputs = await generation.feed(embeds);
      return tensor(this.ort, "float32", outputs[COORDINATES].data, outputs[COORDINATES].dims);
    } finally {
      generation.end();
    }
  }

  /** Start a generation. `supervisor`: the result of `readSupervisor`; `null` for a graph without one. */
  begin(supervisor) {
    return new Generation(this, supervisor);
  }
}

/** The state that one generation keeps between calls. */
class Generation {
  constructor(decoder, supervisor) {
    this.decoder = decoder;
    this.supervisor = supervisor;
    this.length = 0;
    this.gate = null;
    this.cache = new Map();
  }

  /**
   * Run the prompt's embeddings, or the next token's.
   *
   * @returns {Promise<object>} all outputs by name, those of the cache not
   */
  async feed(embeds) {
    const { session, caches } = this.decoder;
    const tokens = embeds.dims[1];
    this.length += tokens;
    const outputs = { ...(await session.run(this.#feeds(embeds, tokens))) };
    for (const [past, present] of caches) {
      this.cache.get(past)?.dispose();
      this.cache.set(past, outputs[present]);
      delete outputs[present];
    }
    if (this.decoder.supervisor === PROMPT_SUPERVISOR) this.supervisor = this.decoder.noSupervisor();
    if (PRESENT_GATE in outputs) this.gate ??= outputs[PRESENT_GATE]; // as the end of the prompt decided it
    return outputs;
  }

  /** Give the cache's memory back. */
  end() {
    for (const value of this.cache.values()) value.dispose();
    this.cache.clear();
  }

  #feeds(embeds, tokens) {
    const { ort, ports, caches } = this.decoder;
    const feeds = { inputs_embeds: cast(ort, embeds, ports.get("inputs_embeds").type) };
    const give = (name, make) => {
      const port = ports.get(name);
      if (port !== undefined) feeds[name] = make(port);
    };
    const positions = Array.from({ length: tokens }, (_, index) => this.length - tokens + index);
    give("attention_mask", ({ type }) => filled(ort, type, 1, [1, this.length]));
    give("position_ids", ({ type }) => tensor(ort, type, positions, [1, tokens]));
    give("use_cache_branch", ({ type, shape }) => filled(ort, type, Number(this.cache.size > 0), shape.map(() => 1)));
    give("num_logits_to_keep", ({ type, shape }) => filled(ort, type, 0, shape.map(() => 1)));
    if (this.decoder.supervised) give(this.decoder.supervisor, () => this.supervisor);
    give(PAST_GATE, ({ shape }) => this.gate ?? filled(ort, "float32", UNDECIDED, [1, shape[1]]));
    for (const past of caches.keys()) feeds[past] = this.cache.get(past) ?? this.#empty(ports.get(past));
    return feeds;
  }

  /** A cache of length 0, `[1, heads, 0, head size]`. */
  #empty({ type, shape }) {
    const { kvHeads, headSize } = this.decoder.facts;
    const size = (value, declared) => (typeof value === "number" ? value : declared);
    return filled(this.decoder.ort, type, 0, [1, size(shape[1], kvHeads), 0, size(shape[3], headSize)]);
  }
}

/** Logits at the last position, float32. */
export function lastLogits(outputs) {
  const { data, dims } = outputs.logits;
  return Float32Array.from(data.subarray(data.length - dims.at(-1)));
}

/** The score of each gate at the last token; `null` if the graph does not output them. */
export function gateScores(outputs) {
  return SCORES in outputs ? Array.from(outputs[SCORES].data) : null;
}

/** The likeliest token. */
export function likeliest(logits) {
  let best = 0;
  for (let token = 1; token < logits.length; token++) if (logits[token] > logits[best]) best = token;
  return best;
}
