// Runs the models beside the page, so that the page stays awake: requests come in as messages, tokens go out as messages.

import { Model } from "./model.mjs";
import { Refused } from "./refused.mjs";

const MOST_THREADS = 4; // more gain nothing on the models that fit here
let model = null;
let wanted = null; // id of the request that is being answered

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "open") await open(data.provider);
    if (data.kind === "ask") await ask(data);
    if (data.kind === "stop") wanted = null;
  } catch (error) {
    if (!(error instanceof Refused)) console.error(error);
    const message = error instanceof Refused ? error.message : `The browser could not run it (${error.message ?? error}).`;
    postMessage({ kind: "refused", id: data.id ?? null, message });
  }
};

async function open(provider) {
  const ort = await import(provider === "webgpu" ? "./lib/ort.webgpu.min.mjs" : "./lib/ort.wasm.min.mjs");
  ort.env.logLevel = "error";
  ort.env.wasm.wasmPaths = new URL("./lib/", self.location.href).href;
  // threads share memory, which browsers give to isolated pages alone
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;
  model = await Model.open(ort, provider, (what, done, total) => postMessage({ kind: "fetching", what, done, total }));
  postMessage({ kind: "opened", version: ort.env.versions.web, threads: ort.env.wasm.numThreads });
}

async function ask({ id, withLogits, ...request }) {
  wanted = id;
  for await (const { logits, ...step } of model.answer(request)) {
    postMessage({ kind: "step", id, ...step, ...(withLogits ? { logits } : {}) });
    await new Promise((done) => setTimeout(done)); // let a "stop" come in
    if (wanted !== id) break;
  }
  postMessage({ kind: "done", id, stopped: wanted !== id });
}
