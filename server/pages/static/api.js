// Requests to the gateway, what can be wrong with them in plain words, and the events of a stream.

const KEY = "burnish-key"; // in sessionStorage: gone with the tab

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** A request that failed. `retryAfter`: seconds after which the server wants it again, or null. */
export class Problem extends Error {
  constructor(message, { status = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

/** The reply to a GET, or to a POST where there is a `body`. Throws Problem, or AbortError. */
export async function request(path, { body, signal, token = key.get() } = {}) {
  const headers = { authorization: `Bearer ${token}` };
  if (body) headers["content-type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    throw plain(error);
  }
  if (reply.ok) return reply;
  const found = await reply.json().catch(() => null);
  const seconds = Number.parseInt(reply.headers.get("retry-after"), 10);
  throw new Problem(found?.error?.message ?? `The server replied with status ${reply.status}.`, {
    status: reply.status,
    retryAfter: seconds > 0 ? seconds : null,
  });
}

/** The chunks of a streamed completion. Throws Problem where the stream breaks or says so. */
export async function* chunks(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Problem("The connection ended in the middle of the answer.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (event === "data: [DONE]") return;
        if (!event.startsWith("data: ")) continue;
        const chunk = JSON.parse(event.slice(6));
        if (chunk.error) throw new Problem(chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    throw plain(error);
  } finally {
    reader.cancel().catch(() => {}); // the stream has failed already
  }
}

/** Why the server is not ready, or null. */
export async function reasonNotReady() {
  const reply = await fetch("/readyz").catch(() => null);
  return (await reply?.json().catch(() => null))?.reason ?? null;
}

function plain(error) {
  return error instanceof TypeError ? new Problem("The server cannot be reached.") : error;
}
