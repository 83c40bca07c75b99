// The page's side of the worker: `await engine.ready`, then `for await (const step of engine.ask({...}))`.

import { Refused } from "./refused.mjs";

export class Engine {
  /**
   * @param {string} provider `wasm` or `webgpu`
   * @param {(what: string, done: number, total: number) => void} reportProgress progress of downloads, in bytes
   */
  constructor(provider, reportProgress = () => {}) {
    this.worker = new Worker(new URL("./worker.mjs", import.meta.url), { type: "module" });
    this.next = 0;
    this.waiting = null; // who gets the messages of the request that runs
    this.ready = new Promise((opened, refused) => {
      this.worker.onmessage = ({ data }) => {
        if (data.kind === "fetching") reportProgress(data.what, data.done, data.total);
        else if (data.kind === "opened") opened(data);
        else if (data.kind === "refused" && data.id === null) refused(new Refused(data.message));
        else this.waiting?.(data);
      };
      this.worker.onerror = () => {
        refused(new Refused("The worker that runs the models could not start; load the page again."));
        this.#end("The worker that runs the models has stopped; load the page again.");
      };
    });
    this.worker.postMessage({ kind: "open", provider });
  }

  /**
   * Both answers to one request, as `Model.answer` yields them. One request at a time.
   *
   * @param {{prompt: string, picture?: Blob | null, name?: string, most?: number, withLogits?: boolean}} request
   */
  async *ask({ prompt, picture = null, name = "the picture", most = 64, withLogits = false }) {
    await this.ready;
    const id = this.next++;
    const messages = [];
    let wake = () => {};
    this.waiting = (message) => {
      if (message.id === id || message.id === null) messages.push(message);
      wake();
    };
    this.worker.postMessage({ kind: "ask", id, prompt, picture, name, most, withLogits });
    while (true) {
      while (messages.length === 0) await new Promise((done) => (wake = done));
      const message = messages.shift();
      if (message.kind === "refused") throw new Refused(message.message);
      if (message.kind === "done") return;
      yield message;
    }
  }

  /** End the request that runs; its last token may still come. */
  stop() {
    this.worker.postMessage({ kind: "stop" });
  }

  /** End the worker and give its memory back. */
  close() {
    this.worker.terminate();
    this.#end("The models were closed.");
  }

  /** Reject the promise of a running answer. */
  #end(message) {
    this.waiting?.({ kind: "refused", id: null, message });
  }
}
