// A guarded vision-language model in transformers.js: its processor, its tokenizer, its generate().
//
//   const { model, processor, answer } = await openGuarded("path/to", "guarded");     // path/to/guarded, nothing is downloaded
//   console.log(await answer("what is in this picture", await load_image("photo.png")));
//
// With a guard of mode restore, project or steer, `model` is used like any other. Modes supervise and combined need the
// text-only coordinates at every call of the decoder, align at the prompt's call; generate() passes only inputs that it
// knows, so `supervise` below feeds them to the session.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import {
  AutoTokenizer,
  CLIPImageProcessor,
  LlavaForConditionalGeneration,
  LlavaProcessor,
  Tensor,
  env,
} from "@huggingface/transformers";

const SUPERVISORS = ["vlmguard.supervisor", "vlmguard.prompt_supervisor"]; // supervise and combined; align
const COORDINATES = "vlmguard.coordinates";
const NO_SUPERVISOR = -1e30; // no gate opens, so the text-only pass is the unguarded model's

export async function openGuarded(parent, name) {
  env.allowRemoteModels = false;
  env.localModelPath = parent;
  const processor = await openProcessor(parent, name);
  const model = await LlavaForConditionalGeneration.from_pretrained(name, { device: "cpu", dtype: "fp32" });
  const readText = supervise(model);

  const inputsOf = async (prompt, image) => {
    const content = [...(image ? [{ type: "image" }] : []), { type: "text", text: prompt }];
    const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    const options = { add_special_tokens: false }; // the template has them
    return image ? await processor(image, text, options) : processor.tokenizer(text, options);
  };

  const answer = async (prompt, image = null) => {
    if (readText) await readText(await inputsOf(prompt, null));
    const inputs = await inputsOf(prompt, image);
    const sequences = await model.generate({ ...inputs, max_new_tokens: 24, do_sample: false });
    const tokens = sequences.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number);
    return { tokens, text: processor.tokenizer.decode(tokens, { skip_special_tokens: true }).trim() };
  };
  return { model, processor, answer };
}

/**
 * Feed the decoder's supervisor input: `model.generate()` then uses the coordinates of the last `readText(inputs)`.
 *
 * @returns readText: runs the text-only prompt and keeps its coordinates; null for a guard without a supervisor
 */
export function supervise(model) {
  const session = model.sessions.decoder_model_merged;
  const guard = SUPERVISORS.find((name) => session.inputNames.includes(name));
  if (guard === undefined) return null;
  const { shape } = session.inputMetadata.find((input) => input.name === guard);
  const [layers, rank] = shape.slice(1);
  const silence = new Tensor("float32", new Float32Array(layers * rank).fill(NO_SUPERVISOR), [1, layers, rank]);
  let coordinates = null;
  model.sessions.decoder_model_merged = new Proxy(session, {
    get(target, key) {
      if (key === "inputNames") return target.inputNames.filter((name) => name !== guard);
      if (key === "run") {
        return (feeds, ...rest) => {
          if (coordinates === null) throw new Error("the guard needs the text-only prompt first: call readText(inputs)");
          const fed = { ...feeds, [guard]: coordinates.ort_tensor };
          if (guard === SUPERVISORS[1]) coordinates = silence; // align: the prompt's call alone
          return target.run(fed, ...rest);
        };
      }
      const value = target[key];
      return typeof value === "function" ? value.bind(target) : value;
    },
  });
  return async (inputs) => {
    coordinates = silence;
    coordinates = (await model.forward(inputs))[COORDINATES];
  };
}

/** LlavaProcessor.from_pretrained for folders as transformers 5 writes them; transformers.js 4.3 reads those of transformers 4. */
async function openProcessor(parent, name) {
  const read = (file) => readFile(join(parent, name, file), "utf8");
  const config = JSON.parse(await read("processor_config.json"));
  // The class token counts, but "default" features come without it. In Python the processor subtracts one; here we do.
  if (config.vision_feature_select_strategy === "default") config.num_additional_image_tokens -= 1;
  const components = {
    tokenizer: await AutoTokenizer.from_pretrained(name),
    image_processor: new CLIPImageProcessor(config.image_processor), // else in preprocessor_config.json
  };
  components.tokenizer.chat_template ??= await read("chat_template.jinja"); // else in tokenizer_config.json
  return new LlavaProcessor(config, components, null);
}
