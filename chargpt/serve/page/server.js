// Requests to the server that this page came from.

let key = ""; // in memory alone

export function useKey(given) {
  key = given;
}

export function hasKey() {
  return key !== "";
}

export class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function answered(path, options) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is it still running?", 0);
  }
  if (response.ok) return response;
  const content = await response.json().catch(() => ({}));
  throw new Problem(content.error?.message ?? `The server answered ${response.status}.`, response.status);
}

function post(path, content, signal) {
  const headers = { "Content-Type": "application/json" };
  return answered(path, { method: "POST", body: JSON.stringify(content), headers, signal });
}

export async function models() {
  return (await (await answered("v1/models", {})).json()).data.map((model) => model.id);
}

// What the model thinks at one place: likeliest next tokens, and attention.
export async function look(content, signal) {
  return (await post("look", content, signal)).json();
}

// Yields the choices of a completion as they come.
export async function* completions(content, signal) {
  const response = await post("v1/completions", { ...content, stream: true, return_token_ids: true, logprobs: 0 }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Problem("The server ended in the middle of an answer.", 0);
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Problem(parsed.error.message, 500);
      yield* parsed.choices;
    }
  }
}
