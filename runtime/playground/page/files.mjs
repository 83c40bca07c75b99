// Files of the page's own server.

import { Refused } from "./refused.mjs";

export async function fetchJson(address) {
  return (await answered(address)).json();
}

/**
 * A graph and its external data.
 *
 * @param {string} name of the part, for progress
 * @param {{graph: string, data: {path: string, address: string}[]}} part of facts.json
 * @param {(what: string, done: number, total: number) => void} tell
 */
export async function fetchAll(name, part, tell) {
  const graph = await bytes(name, part.graph, tell);
  const externalData = [];
  for (const { path, address } of part.data) externalData.push({ path, data: await bytes(name, address, tell) });
  return { graph, externalData };
}

async function bytes(name, address, tell) {
  const answer = await answered(`model/${address}`);
  const total = Number(answer.headers.get("Content-Length"));
  const content = new Uint8Array(total);
  let done = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done: ended, value } = await reader.read();
    if (ended) break;
    content.set(value, done);
    done += value.length;
    tell(name, done, total);
  }
  return content;
}

async function answered(address) {
  let answer;
  try {
    answer = await fetch(address);
  } catch {
    throw new Refused("The server does not answer; start `vlmguard playground` again, then load this page again.");
  }
  if (!answer.ok) throw new Refused(`The server has no ${address} (${answer.status}); start \`vlmguard playground\` again.`);
  return answer;
}
