// Prompts to token ids and back: the model's own chat template and tokenizer, with the rules of vlmguard's runtime/chat/chat.py.

import { Template } from "./lib/jinja.mjs";
import { Tokenizer } from "./lib/tokenizers.mjs";
import { pictureText } from "./markers.mjs";
import { Refused } from "./refused.mjs";
import { TurnMarkers } from "./turn_markers.mjs";

export class Chat {
  /**
   * @param {object} tokenizer tokenizer.json, with every token that the configs declare
   * @param {object} facts `chat` of facts.json
   */
  constructor(tokenizer, facts) {
    this.facts = facts;
    this.tokenizer = new Tokenizer(tokenizer, {});
    this.template = facts.template === null ? null : new Template(facts.template);
    this.markers = new TurnMarkers(facts.turnMarkers);
    this.control = new Map(Object.entries(facts.controlTokens).map(([id, text]) => [Number(id), text]));
  }

  /** Ids of one user turn; `picture` is its picture's image tokens, `{count, grid}`, or `null`. */
  encode(prompt, picture = null) {
    this.#refuseControlTokens(prompt);
    let text = this.#render(prompt, picture !== null);
    const special = this.#addsSpecialTokens(text);
    const { imageToken, imageTokenId, written, layout } = this.facts;
    const imageTokens = picture?.count ?? 0;
    if (picture !== null) text = text.split(written).join(pictureText(picture, imageToken, layout));
    const ids = this.#ids(text, special);
    if (ids.length === 0) throw new Refused("The prompt gives no tokens; write a prompt.");
    const found = ids.filter((id) => id === imageTokenId).length;
    if (found !== imageTokens) {
      throw new Refused(`${imageTokens} image tokens became ${found} after tokenization; the tokenizer is not this model's.`);
    }
    return ids;
  }

  decode(ids) {
    if (ids.length === 0) return "";
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }

  ends(id) {
    return this.facts.eosIds.includes(id);
  }

  /** The text of one user turn, the image placeholder in it once. */
  #render(prompt, withImage) {
    const { content, written, specialTokens } = this.facts;
    const inFront = withImage ? `${written}\n` : "";
    if (this.template === null) return inFront + prompt;
    const parts = [...(withImage ? [{ type: "image" }] : []), { type: "text", text: prompt }];
    const text = this.template.render({
      messages: [{ role: "user", content: content === "parts" ? parts : inFront + prompt }],
      add_generation_prompt: true,
      ...specialTokens,
    });
    if (text.split(written).length - 1 !== Number(withImage)) {
      throw new Refused("The chat template does not write one placeholder for one picture; it is not this model's.");
    }
    return text;
  }

  /** Whether tokenizer.json's own special tokens come on top: only a processor's, unless the template wrote the first. */
  #addsSpecialTokens(text) {
    if (this.template === null) return true;
    const bos = this.facts.specialTokens.bos_token;
    return this.facts.multimodal && !(bos && text.startsWith(bos));
  }

  /** Whoever writes the prompt must not be able to end the user's turn, or to claim a picture. */
  #refuseControlTokens(prompt) {
    const found =
      [...this.control.values()].find((text) => prompt.includes(text)) ??
      this.control.get(this.#ids(prompt, false).find((id) => this.control.has(id)));
    if (found !== undefined) throw new Refused(`The prompt contains ${found}, a control token of this model; remove it.`);
    const marker = this.markers.foundIn(prompt);
    if (marker !== null) {
      throw new Refused(`The prompt contains ${marker}, which this model's chat template writes between turns; write it in another way.`);
    }
  }

  #ids(text, special) {
    return text === "" ? [] : this.tokenizer.encode(text, { add_special_tokens: special }).ids;
  }
}

/** Check that this browser tokenizes the sample prompts like Python; otherwise the models would get other prompts. */
export function requireSameTokens(chat, checks) {
  for (const { prompt, picture, ids } of checks) {
    const found = chat.encode(prompt, picture);
    if (found.join() !== ids.join()) {
      throw new Refused(`The page's tokenizer reads ${JSON.stringify(prompt)} otherwise than vlmguard does; it cannot ask this model.`);
    }
  }
}
