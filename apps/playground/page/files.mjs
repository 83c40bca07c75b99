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
 * @param {(what: string, done: number, total: number) => void} reportProgress
 */
export async function fetchAll(name, part, reportProgress) {
  const graph = await bytes(name, part.graph, reportProgress);
  const externalData = [];
  for (const { path, address } of part.data) externalData.push({ path, data: await bytes(name, address, reportProgress) });
  return { graph, externalData };
}

/** Download by XMLHttpRequest, which reports its progress. */
function bytes(name, address, reportProgress) {
  return new Promise((give, refuse) => {
    const request = new XMLHttpRequest();
    request.open("GET", `model/${address}`);
    request.responseType = "arraybuffer";
    request.onprogress = ({ loaded, total }) => reportProgress(name, loaded, total);
    request.onload = () => (request.status === 200 ? give(new Uint8Array(request.response)) : refuse(lacks(address, request.status)));
    request.onerror = () => refuse(silent());
    request.send();
  });
}

async function answered(address) {
  let answer;
  try {
    answer = await fetch(address);
  } catch {
    throw silent();
  }
  if (!answer.ok) throw lacks(address, answer.status);
  return answer;
}

const silent = () => new Refused("The server does not answer; start `vlmguard playground` again, then load this page again.");
const lacks = (address, status) => new Refused(`The server has no ${address} (${status}); start \`vlmguard playground\` again.`);
