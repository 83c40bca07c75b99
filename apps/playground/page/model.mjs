// A whole model with two decoders, the base and the guarded one: a prompt and a picture in, both answers out, token by token.

import { Chat, requireSameTokens } from "./chat.mjs";
import { Decoder, gateScores, lastLogits, likeliest } from "./decoder.mjs";
import { fetchAll, fetchJson } from "./files.mjs";
import { readPicture } from "./picture.mjs";
import { preparePicture } from "./prepare.mjs";
import { Refused } from "./refused.mjs";
import { tensor } from "./tensors.mjs";
import { look } from "./vision.mjs";

export const SIDES = ["base", "guarded"];

export class Model {
  /**
   * Fetch and open everything.
   *
   * @param ort onnxruntime-web
   * @param {string} provider `wasm` or `webgpu`
   * @param {(what: string, done: number, total: number) => void} reportProgress progress, in bytes
   */
  static async open(ort, provider, reportProgress) {
    const facts = await fetchJson("model/facts.json");
    const chat = new Chat(await fetchJson("model/tokenizer.json"), facts.chat);
    requireSameTokens(chat, facts.tokenChecks);
    const open = async (name) => openSession(ort, provider, facts.parts[name], await fetchAll(name, facts.parts[name], reportProgress));
    const [vision, embed] = [await open("vision"), await open("embed")];
    const decoders = {};
    for (const side of SIDES) decoders[side] = new Decoder(ort, await open(side), facts, facts.parts[side]);
    return new Model(ort, facts, chat, vision, embed, decoders);
  }

  constructor(ort, facts, chat, vision, embed, decoders) {
    Object.assign(this, { ort, facts, chat, vision, embed, decoders });
  }

  /**
   * Both answers to one request, greedy, in turns.
   *
   * @param {{prompt: string, picture: Blob | null, name: string, most: number}} request
   * @yields {{side: string, token: number, text: string, ended: boolean, scores: number[] | null, logits: Float32Array}}
   *   one token; `text` is the whole answer so far, `scores` what the gates compared at the token before
   */
  async *answer({ prompt, picture, name, most }) {
    const seen = picture === null ? null : await look(this.ort, this.vision, preparePicture(await readPicture(picture, name), this.facts.image));
    const embeds = await this.#embeds(this.chat.encode(prompt, seen), seen?.features ?? null);
    const text = await this.#embeds(this.chat.encode(prompt), null);
    const runs = [];
    try {
      for (const side of SIDES) {
        const decoder = this.decoders[side];
        const supervisor = decoder.supervised ? await decoder.readSupervisor(text) : null;
        const generation = decoder.begin(supervisor);
        runs.push({ side, generation, tokens: [], next: embeds });
      }
      for (let count = 0; count < most && runs.some((run) => run.next !== null); count++) {
        for (const run of runs) if (run.next !== null) yield await this.#step(run, count + 1 === most);
      }
    } finally {
      for (const run of runs) run.generation.end();
    }
  }

  /** One token of one side. */
  async #step(run, last) {
    const outputs = await run.generation.feed(run.next);
    const logits = lastLogits(outputs);
    if (!logits.every((value) => value < Infinity)) throw new Refused("The decoder gave NaN logits: its arithmetic overflows; use another --variant.");
    const token = likeliest(logits);
    const ended = this.chat.ends(token);
    if (!ended) run.tokens.push(token);
    run.next = ended || last ? null : await this.#embeds([token], null);
    return { side: run.side, token, text: this.#said(run.tokens, ended || last), ended, scores: gateScores(outputs), logits };
  }

  /** The answer so far, without the first half of a character that is still coming. */
  #said(tokens, complete) {
    const text = this.chat.decode(tokens);
    return complete ? text : text.replace(/\uFFFD$/, "");
  }

  /** Embeddings of the tokens, with the features where the picture is. */
  async #embeds(ids, features) {
    const [port] = this.embed.inputMetadata;
    const outputs = await this.embed.run({ [port.name]: tensor(this.ort, port.type, ids, [1, ids.length]) });
    const embeds = outputs[this.embed.outputNames[0]];
    if (features === null) return embeds;
    const width = embeds.dims.at(-1);
    let row = 0;
    ids.forEach((id, place) => {
      if (id !== this.facts.chat.imageTokenId) return;
      embeds.data.set(features.data.subarray(row * width, (row + 1) * width), place * width);
      row += 1;
    });
    return embeds;
  }
}

/** On a GPU the decoder's cache stays there from call to call, and the nodes that it would compute wrongly do not run there. */
async function openSession(ort, provider, part, { graph, externalData }) {
  const onCpu = provider === "webgpu" && part.cpuNodes.length > 0 ? { forceCpuNodeNames: part.cpuNodes } : {};
  const options = { executionProviders: [{ name: provider, ...onCpu }], externalData, logSeverityLevel: 3 };
  if (provider === "webgpu") options.preferredOutputLocation = Object.fromEntries(Object.values(part.cache).map((name) => [name, "gpu-buffer"]));
  return ort.InferenceSession.create(graph, options);
}
