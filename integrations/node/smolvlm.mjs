// A guarded SmolVLM or Idefics3 in transformers.js: its processor with tiles and markers, its tokenizer, its generate().
//
//   const { answer } = await openSmolVLM("path/to", "guarded");     // path/to/guarded, nothing is downloaded
//   console.log((await answer("what is in this picture", await load_image("photo.png"))).text);
//
// For a guard of mode restore, project or steer; transformers_js.mjs has the wrapper that the other modes need.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { AutoModelForImageTextToText, AutoProcessor, env } from "@huggingface/transformers";

export async function openSmolVLM(parent, name) {
  env.allowRemoteModels = false;
  env.localModelPath = parent;
  const processor = await AutoProcessor.from_pretrained(name);
  const { tokenizer } = processor;
  tokenizer.chat_template ??= await readFile(join(parent, name, "chat_template.jinja"), "utf8"); // else in tokenizer_config.json
  const model = await AutoModelForImageTextToText.from_pretrained(name, { device: "cpu", dtype: "fp32" });

  const inputsOf = async (prompt, image) => {
    const content = [...(image ? [{ type: "image" }] : []), { type: "text", text: prompt }];
    const text = tokenizer.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true, tokenize: false });
    return image ? await processor(text, [image]) : tokenizer(text);
  };

  const answer = async (prompt, image = null, maxNewTokens = 64) => {
    const inputs = await inputsOf(prompt, image);
    const sequences = await model.generate({ ...inputs, max_new_tokens: maxNewTokens, do_sample: false });
    const ids = sequences.tolist()[0].map(Number);
    const tokens = ids.splice(inputs.input_ids.dims[1]);
    return { ids, tokens, text: tokenizer.decode(tokens, { skip_special_tokens: true }).trim() };
  };
  return { model, processor, answer };
}
