// Both examples on the cases of integrations/cases.py: the same logits and the same tokens as onnxruntime's CPU provider in Python.
//
//   node check.mjs ROOT      # the repository's folder; writes ROOT/build/integrations/node.json (form: integrations/replay.py)
import { readFileSync, readdirSync, existsSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { load_image } from "@huggingface/transformers";
import { Tensor } from "onnxruntime-node";
import { GuardedModel } from "./onnxruntime_node.mjs";
import { openSmolVLM } from "./smolvlm.mjs";
import { openGuarded } from "./transformers_js.mjs";

const LIMIT = 1e-4; // of a logit; another layer guarded, or none, is off by more than 1
const ROOT = process.argv[2];
const CASES = join(ROOT, "build", "integrations", "cases");
const TYPES = { float32: Float32Array, int64: BigInt64Array };

/** One mode's folder. */
class Cases {
  constructor(mode) {
    this.folder = join(CASES, mode);
    this.content = JSON.parse(readFileSync(join(this.folder, "cases.json"), "utf8"));
    this.bytes = readFileSync(join(this.folder, "tensors.bin"));
  }

  tensor({ offset, dtype, shape }) {
    const size = shape.reduce((a, b) => a * b, 1);
    const buffer = this.bytes.buffer.slice(this.bytes.byteOffset + offset); // a copy, because a typed array needs aligned bytes
    return new Tensor(dtype, new TYPES[dtype](buffer, 0, size), shape);
  }

  ids(shown) {
    return Array.from(this.tensor(shown).data, Number);
  }

  expected(question) {
    return question.calls.map((call) => this.tensor(call.logits));
  }
}

class Agreement {
  largest_difference = 0;
  tokens = 0;
  same_tokens = true;

  /** The logits of every call of one question, in order, and the answer's tokens. */
  take(expected, found, question, tokens) {
    const same = JSON.stringify(tokens) === JSON.stringify(question.tokens);
    if (same && expected.length !== found.length) throw new Error(`${question.name}: ${found.length} calls, not ${expected.length}`);
    found.slice(0, expected.length).forEach((logits, call) => this.compare(expected[call].data, logits.data));
    this.tokens += question.tokens.length;
    this.same_tokens &&= same;
  }

  compare(expected, found) {
    if (expected.length !== found.length) throw new Error(`${found.length} logits, expected ${expected.length}`);
    const worst = expected.reduce((most, logit, i) => (Math.abs(logit - found[i]) <= most ? most : Math.abs(logit - found[i])), 0);
    this.largest_difference = Number.isNaN(worst) ? NaN : Math.max(worst, this.largest_difference);
  }

  get ok() {
    return this.same_tokens && this.tokens > 0 && this.largest_difference <= LIMIT;
  }
}

/** Ask `answer` every question of a mode and compare; the decoder's logits are recorded at its session. */
async function compared(cases, sessionOf, answer) {
  const agreement = new Agreement();
  for (const question of cases.content.cases) {
    const recorded = [];
    const tokens = await recording(sessionOf, recorded, () => answer(question));
    agreement.take(cases.expected(question), recorded, question, tokens);
  }
  return agreement;
}

async function recording([holder, name], recorded, ask) {
  const session = holder[name];
  holder[name] = new Proxy(session, {
    get(target, key) {
      const value = target[key];
      if (key !== "run") return typeof value === "function" ? value.bind(target) : value;
      return async (...given) => {
        const outputs = await target.run(...given);
        recorded.push({ data: outputs.logits.data.slice() });
        return outputs;
      };
    },
  });
  try {
    return await ask();
  } finally {
    holder[name] = session;
  }
}

async function withOnnxruntimeNode(cases) {
  const { image_token_id: imageTokenId, eos_ids: eosIds } = cases.content;
  const model = await GuardedModel.open(join(cases.folder, "model"), { imageTokenId, eosIds });
  return compared(cases, [model, "decoder"], (question) => {
    const prompt = question.calls.find((call) => call.what === "prompt");
    const text = question.calls.find((call) => call.what === "text-only");
    const pixelValues = question.pixel_values && cases.tensor(question.pixel_values);
    return model.answer({ ids: cases.ids(prompt.input_ids), textIds: text && cases.ids(text.input_ids), pixelValues });
  });
}

async function withTransformersJs(cases) {
  const { model, answer } = await openGuarded(cases.folder, "model");
  return compared(cases, [model.sessions, "decoder_model_merged"], async (question) => {
    const image = question.image && (await load_image(join(cases.folder, "images", question.image)));
    const { tokens, text } = await answer(question.prompt, image);
    if (`${tokens}` === `${question.tokens}` && text !== question.answer) throw new Error(`${question.name}: said ${text}, expected ${question.answer}`);
    return tokens;
  });
}

/**
 * SmolVLM's layout: prompt ids with every picture; logits and tokens where the pixels are the same, in text and pictures of one
 * colour. Of other pictures transformers.js makes other pixels than transformers: it resizes with sharp, then bilinearly.
 */
async function withSmolvlm(folder) {
  const { model, answer } = await openSmolVLM(folder, "model");
  const agreement = new Agreement();
  for (const question of JSON.parse(readFileSync(join(folder, "cases.json"), "utf8")).cases) {
    const image = question.image && (await load_image(join(folder, "images", question.image)));
    const recorded = [];
    const { ids, tokens, text } = await recording([model.sessions, "decoder_model_merged"], recorded, () => answer(question.prompt, image, 12));
    if (`${ids}` !== `${question.input_ids}`) throw new Error(`${question.name}: the prompt is ${ids}, expected ${question.input_ids}`);
    if (image && !question.one_colour) continue;
    const expected = question.logits.map((data) => ({ data }));
    agreement.take(expected, recorded.map(({ data }) => ({ data: data.slice(-expected[0].data.length) })), question, tokens);
    if (`${tokens}` === `${question.tokens}` && text !== question.answer) throw new Error(`${question.name}: said ${text}, expected ${question.answer}`);
  }
  return agreement;
}

const modes = readdirSync(CASES).filter((mode) => existsSync(join(CASES, mode, "cases.json")));
if (modes.length === 0) throw new Error(`${CASES}: holds no cases; run python -m integrations.cases first`);
const require = createRequire(import.meta.url);
const version = (name) => JSON.parse(readFileSync(join(require.resolve.paths(name)[0], name, "package.json"), "utf8")).version;
const command = "make integration NAME=node";
const RUNTIMES = [
  { runtime: "onnxruntime-node", version: version("onnxruntime-node"), run: withOnnxruntimeNode, note: "" },
  {
    runtime: "transformers.js (Node.js)",
    version: version("@huggingface/transformers"),
    run: withTransformersJs,
    note: "plain generate() in project, steer and restore; supervise, combined and align through a wrapper of 30 lines",
  },
];
const results = [];

function write({ runtime, version, note }, agreements) {
  for (const [mode, { ok, tokens, largest_difference: difference }] of Object.entries(agreements)) {
    console.log(`${runtime} ${version}, ${mode}: ${ok ? "agrees" : "DIFFERS"}, ${tokens} tokens, ${difference.toExponential(1)}`);
    if (!ok) process.exitCode = 1;
  }
  results.push({ runtime, version, modes: agreements, precision: "fp32", pictures: true, command, note });
}

for (const runtime of RUNTIMES) {
  const agreements = {};
  for (const mode of modes) agreements[mode] = await runtime.run(new Cases(mode));
  write(runtime, agreements);
}
const smolvlm = join(ROOT, "build", "integrations", "smolvlm");
if (existsSync(join(smolvlm, "cases.json"))) {
  const note = "plain generate(); prompt ids with pictures of every shape, logits with pictures of one colour: it resizes others otherwise";
  write({ runtime: "transformers.js (Node.js), SmolVLM's layout", version: version("@huggingface/transformers"), note }, { restore: await withSmolvlm(smolvlm) });
}
writeFileSync(join(ROOT, "build", "integrations", "node.json"), `${JSON.stringify(results, null, 2)}\n`);
