// Requests to this server. `askKey` is called when it wants an API key, and resolves to one or to null.

import { loadKey, saveKey } from "./store.js";

export class ServerError extends Error {}

async function post(path, body, { askKey, signal } = {}) {
  for (;;) {
    const headers = { "Content-Type": "application/json" };
    const key = loadKey();
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    const given = await askKey();
    if (!given) throw error;
    saveKey(given);
  }
}

async function errorOf(response) {
  try {
    return new ServerError((await response.json()).error.message);
  } catch {
    return new ServerError(`HTTP ${response.status}`);
  }
}

export async function vote(body, askKey) {
  await post("/api/vote", body, { askKey });
}

// Yields { text } for each piece and { finish } at the end. Throws ServerError with "" when the stream breaks off.
export async function* chat(body, options) {
  const response = await post("/v1/chat/completions", { ...body, stream: true }, options);
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const part = JSON.parse(data);
    if (part.error) throw new ServerError(part.error.message);
    const [choice] = part.choices;
    if (choice?.delta.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) {
      finished = true;
      yield { finish: choice.finish_reason };
    }
  }
  if (!finished) throw new ServerError("");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split("\n\n");
      buffer = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield part.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
