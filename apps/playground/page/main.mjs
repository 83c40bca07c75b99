// The page: the prompt, both answers, the gates. The models are in the worker (engine.mjs).

import { Engine } from "./engine.mjs";
import { fetchJson } from "./files.mjs";
import { Gates, element } from "./gates.mjs";
import { Pictures } from "./pictures.mjs";
import { Refused } from "./refused.mjs";

const at = (id) => document.getElementById(id);
const SIDES = ["base", "guarded"];
const PROVIDERS = { wasm: "CPU (WebAssembly)", webgpu: "GPU (WebGPU)" };

let engine = null;
let gates = null;

try {
  const facts = await fetchJson("model/facts.json");
  describe(facts);
  const pictures = new Pictures(facts.samples.pictures);
  offerPrompts(facts.samples.prompts, pictures);
  if (facts.guard.thresholds !== null) {
    gates = new Gates(at("charts"), at("gates-table").querySelector("table"), facts.guard);
    at("gates-table").hidden = false;
  }
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    answer(pictures);
  });
  at("stop").addEventListener("click", () => engine.stop());
  at("provider").addEventListener("change", () => start(at("provider").value));
  await offerProviders();
  await start(at("provider").value);
} catch (error) {
  refuse(error);
}

/**
 * Open the models. If the GPU cannot run them, show a message and use the CPU.
 *
 * @param {string} provider `wasm` or `webgpu`
 * @param {string} news what is said besides, once they are open
 */
async function start(provider, news = "") {
  engine?.close();
  ready(false);
  showStatus("Opening the models …");
  const progress = at("progress");
  engine = new Engine(provider, (what, done, total) => {
    progress.hidden = false;
    Object.assign(progress, { value: done, max: total });
    showStatus(`Fetching ${what} …`);
  });
  try {
    const { version, threads } = await engine.ready;
    addFact("runs on", `onnxruntime-web ${version}, ${PROVIDERS[provider]}, ${threads} thread${threads > 1 ? "s" : ""}`);
    showStatus(`${news}Ready. Pick a picture and a prompt, then ask both.`);
    ready(true);
  } catch (error) {
    if (provider !== "wasm") {
      at("provider").value = "wasm";
      return start("wasm", `${error.message} The CPU runs it now. `);
    }
    refuse(error);
  }
  progress.hidden = true;
}

async function answer(pictures) {
  ready(false);
  at("stop").disabled = false;
  gates?.clear();
  for (const side of SIDES) {
    at(`answer-${side}`).textContent = "";
    at(`answer-${side}`).ariaBusy = "true"; // read out when it is whole, not word by word
    at(`count-${side}`).textContent = "";
  }
  showStatus("Answering …");
  try {
    const request = { prompt: at("prompt").value, most: at("most").valueAsNumber, ...(await pictures.chosen()) };
    const counts = { base: 0, guarded: 0 };
    for await (const step of engine.ask(request)) {
      const before = at(`answer-${step.side}`).textContent;
      at(`answer-${step.side}`).textContent = step.text;
      counts[step.side] += 1;
      at(`count-${step.side}`).textContent = `${counts[step.side]} token${counts[step.side] > 1 ? "s" : ""}${step.ended ? ", ended" : ""}`;
      if (step.side === "guarded" && step.scores !== null) {
        gates.add(step.scores, step.ended ? "end of the answer" : step.text.slice(before.length).trim() || "…");
      }
    }
    const same = at("answer-base").textContent === at("answer-guarded").textContent;
    showStatus(same ? "Done: both answers are equal." : "Done: the answers differ.");
  } catch (error) {
    refuse(error);
  }
  for (const side of SIDES) at(`answer-${side}`).ariaBusy = "false";
  at("stop").disabled = true;
  ready(true);
}

/** Show the facts about the model, before anything runs. */
function describe({ name, decoder, base, guard, libraries }) {
  const layers = `layer${guard.layers.length > 1 ? "s" : ""} ${guard.layers.join(", ")} of ${guard.decoderLayers}`;
  document.title = `${name} · vlmguard playground`;
  at("about").textContent = `${name}, guarded in mode ${guard.mode} on ${layers}. One request goes to the model without and with its guard.`;
  at("base-is").textContent = base === "source" ? "The unguarded model that the folder was made from." : "This model with the guard taken out.";
  at("guarded-is").textContent = "The model with its guard, as it ships.";
  at("gates-about").textContent =
    guard.thresholds === null
      ? `Mode ${guard.mode} has no gate: it edits the planned tokens of every request.`
      : `What each guarded layer compares with its threshold${guard.decided === "prompt" ? "; decided at the end of the prompt, then held" : ""}. A gate that is closed leaves the model as it is.`;
  addFact("decoder", decoder);
  addFact("mode", guard.mode);
  addFact("guarded layers", guard.layers.join(", "));
  addFact("tokens edited", guard.positions === "last" ? "the last of each call" : "all");
  addFact("libraries", libraries.join(", "));
}

function offerPrompts(prompts, pictures) {
  const groups = new Map();
  prompts.forEach(({ prompt, label, setting }, number) => {
    const name = `${label}, ${{ text: "text only", blank: "blank picture", image: "picture", typographic: "harm in the picture" }[setting]}`;
    if (!groups.has(name)) groups.set(name, Object.assign(document.createElement("optgroup"), { label: name }));
    groups.get(name).append(new Option(prompt, number));
  });
  at("sample").append(...groups.values());
  at("sample").addEventListener("change", () => {
    const chosen = prompts[at("sample").value];
    if (chosen === undefined) return;
    at("prompt").value = chosen.prompt;
    pictures.choose(chosen.picture);
  });
}

/** WebGPU where the browser has an adapter; then it is taken. */
async function offerProviders() {
  let adapter = null;
  try {
    adapter = await navigator.gpu?.requestAdapter();
  } catch {
    // as good as none
  }
  if (adapter && !adapter.info?.isFallbackAdapter) at("provider").prepend(new Option(PROVIDERS.webgpu, "webgpu", true, true));
}

/** A row of "What runs here"; its name comes once. */
function addFact(name, value) {
  const known = [...at("facts").querySelectorAll("dt")].find((term) => term.textContent === name);
  if (known) known.nextElementSibling.textContent = value;
  else at("facts").append(element("dt", name), element("dd", value));
}

function ready(is) {
  at("ask").disabled = !is;
  document.documentElement.dataset.ready = is;
}

function showStatus(words) {
  at("status").textContent = words;
  at("status").classList.remove("refused");
}

function refuse(error) {
  if (!(error instanceof Refused)) console.error(error);
  showStatus(error instanceof Refused ? error.message : `The page failed: ${error.message ?? error}`);
  at("status").classList.add("refused");
}
