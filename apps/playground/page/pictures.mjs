// Which picture is shown to the models: none, a sample, or one that the user chose, dropped or pasted.

import { element } from "./gates.mjs";
import { readPicture } from "./picture.mjs";
import { Refused } from "./refused.mjs";

const [NONE, BLANK, OWN] = ["none", "blank", "own"];
const SMALL = 64; // pixels; below it a preview shows each of them

export class Pictures {
  /**
   * @param {{name: string, title: string}[]} samples of facts.json
   */
  constructor(samples) {
    this.choices = document.getElementById("choices");
    this.refusal = document.getElementById("picture-refusal");
    this.own = null;
    this.#offer(NONE, "no picture", null);
    this.#offer(BLANK, "blank", `model/${BLANK}.png`);
    for (const { name, title } of samples) this.#offer(name, title, `model/${name}.png`);
    this.choose(NONE);
    this.choices.addEventListener("change", () => this.#refuse(null));
    this.#addListeners();
  }

  choose(name) {
    this.choices.querySelector(`input[value="${CSS.escape(name)}"]`).checked = true;
  }

  /** `{picture, name}` as `Engine.ask` takes them. */
  async chosen() {
    const input = this.choices.querySelector("input:checked");
    if (input.value === NONE) return { picture: null, name: "" };
    if (input.value === OWN) return { picture: this.own, name: this.own.name };
    const answer = await fetch(`model/${input.value}.png`);
    if (!answer.ok) throw new Refused("The server does not give the sample picture; start `vlmguard playground` again.");
    return { picture: await answer.blob(), name: input.value };
  }

  /** Use the user's file, or show why it cannot be used. */
  async take(file) {
    try {
      await readPicture(file, file.name);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.#refuse(error.message);
      return;
    }
    this.#refuse(null);
    this.own = file;
    const known = this.choices.querySelector(`input[value="${OWN}"]`)?.parentElement;
    if (known) {
      URL.revokeObjectURL(known.querySelector("img").src);
      known.remove();
    }
    this.#offer(OWN, file.name, URL.createObjectURL(file));
    this.choose(OWN);
  }

  #offer(value, title, address) {
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "picture", value, className: "unseen" });
    const choice = element("label", input, address === null ? nothing() : preview(address), title);
    choice.className = "choice";
    this.choices.append(choice);
  }

  #refuse(message) {
    this.refusal.textContent = message ?? "";
    this.refusal.hidden = message === null;
  }

  /** File dialog, drag and drop anywhere on the page, clipboard. */
  #addListeners() {
    const file = document.getElementById("file");
    const drop = document.getElementById("drop");
    const first = (list) => {
      if (list.length > 0) this.take(list[0]);
    };
    file.addEventListener("change", () => {
      first(file.files);
      file.value = ""; // so that the same file can be chosen again
    });
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
    for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => drop.classList.remove("over"));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      first(event.dataTransfer.files);
    });
    document.addEventListener("paste", (event) => first(event.clipboardData.files));
  }
}

function preview(address) {
  const image = Object.assign(new Image(), { src: address, alt: "" }); // its label has the name
  image.addEventListener("load", () => {
    image.parentElement?.classList.toggle("smooth", Math.max(image.naturalWidth, image.naturalHeight) >= SMALL);
  });
  return image;
}

function nothing() {
  const made = element("span", "∅");
  made.className = "nothing";
  made.ariaHidden = "true";
  return made;
}
