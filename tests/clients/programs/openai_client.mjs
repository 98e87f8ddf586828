// OpenAI's client for JavaScript against Burnish: the same scenarios as `openai_client.py`.
//
// Takes address and key from OPENAI_BASE_URL and OPENAI_API_KEY, as any script for OpenAI does, and
// prints one JSON object, scenario by scenario. TypeScript's types are gone at run time, so unlike
// the program in Python it holds no reply to them.

import OpenAI, { toFile } from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const MODEL = "gpt-4o-mini"; // an alias of the deployment: a script names OpenAI's model
const QUESTION = "What is a tide?";
const ASKED = [{ role: "user", content: QUESTION }];
const ELSEWHERE = JSON.parse(process.env.ELSEWHERE ?? "{}");
const WEATHER = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather at a place.",
    strict: true,
    parameters: {
      type: "object",
      properties: {
        place: { type: "string" },
        unit: { type: "string", enum: ["celsius", "kelvin"] },
      },
      required: ["place", "unit"],
      additionalProperties: false,
    },
  },
};

const client = new OpenAI();
const completions = client.chat.completions;

async function all(pages) {
  const found = [];
  for await (const item of await pages) found.push(item);
  return found;
}

const ids = (items) => items.map((item) => item.id);

async function raised(action) {
  let said;
  try {
    said = await action();
  } catch (error) {
    const bases = [];
    let base = error.constructor;
    while (base.name) {
      bases.push(base.name);
      base = Object.getPrototypeOf(base);
    }
    return {
      class: error.constructor.name,
      bases,
      status: error.status ?? null,
      code: error.code ?? null,
      type: error.type ?? null,
      param: error.param ?? null,
      message: error.message,
      retry_after: error.headers?.get("retry-after") ?? null,
      request_id: error.requestID ?? null,
    };
  }
  throw new Error(`no error; it said ${JSON.stringify(said)}`);
}

// What a chat completion says.
function said(completion) {
  const [{ message, finish_reason }] = completion.choices;
  return {
    id: completion.id,
    model: completion.model,
    text: message.content,
    calls: (message.tool_calls ?? []).map((call) => ({
      id: call.id,
      name: call.function.name,
      arguments: JSON.parse(call.function.arguments),
    })),
    finish_reason,
    usage: figures(completion.usage),
  };
}

function figures({ prompt_tokens, completion_tokens, total_tokens }) {
  return { prompt_tokens, completion_tokens, total_tokens };
}

async function asked(options) {
  return said(await completions.create({ model: MODEL, messages: ASKED, ...options }));
}

async function models() {
  const names = ids(await all(client.models.list()));
  return { names, retrieved: await Promise.all(names.map((name) => client.models.retrieve(name))) };
}

async function chat() {
  const made = await completions.create({ model: MODEL, messages: ASKED, max_tokens: 8 });
  return { ...said(made), request_id: made._request_id };
}

async function streamed_chat() {
  const read = async (options) => {
    const request = { model: MODEL, messages: ASKED, max_tokens: 8, stream: true, ...options };
    const chunks = await all(completions.create(request));
    const choices = chunks.flatMap((chunk) => chunk.choices);
    return {
      ids: [...new Set(ids(chunks))],
      models: [...new Set(chunks.map((chunk) => chunk.model))],
      pieces: choices.map((choice) => choice.delta.content).filter(Boolean),
      finish_reasons: choices.map((choice) => choice.finish_reason).filter(Boolean),
      usages: chunks.filter((chunk) => chunk.usage).map((chunk) => figures(chunk.usage)),
    };
  };
  return {
    ...(await read({ stream_options: { include_usage: true } })),
    without_usage: await read({}),
  };
}

async function tools() {
  const request = { tools: [WEATHER] };
  const called = await completions.create({ model: MODEL, messages: ASKED, ...request });
  const message = called.choices[0].message;
  const results = message.tool_calls.map((call) => ({
    role: "tool",
    tool_call_id: call.id,
    content: "20 degrees",
  }));
  const named = { type: "function", function: { name: "weather" } };
  return {
    called: said(called),
    answered: await asked({ ...request, messages: [...ASKED, message, ...results] }),
    named: await asked({ ...request, tool_choice: named }),
  };
}

async function streamed_tools() {
  const other = { type: "function", function: { ...WEATHER.function, name: "tides" } };
  const stream = completions.stream({
    model: MODEL,
    messages: ASKED,
    tools: [WEATHER, other],
    tool_choice: "required",
    stream_options: { include_usage: true },
  });
  return said(await stream.finalChatCompletion());
}

async function json_schema() {
  const Tide = z.object({ phase: z.enum(["high", "low"]), is_spring_tide: z.boolean() });
  const response_format = zodResponseFormat(Tide, "tide");
  const made = await asked({ response_format });
  const parsed = await completions.parse({ model: MODEL, messages: ASKED, response_format });
  return {
    created: Tide.parse(JSON.parse(made.text)),
    parsed: parsed.choices[0].message.parsed,
  };
}

async function for_others() {
  const application = new OpenAI({ apiKey: process.env.APPLICATION_KEY });
  const made = [];
  for (const person of ["ann", "ann", "bob"]) {
    const request = { model: MODEL, messages: ASKED, user: person };
    made.push(
      await application.chat.completions.create({ ...request, metadata: { asked_for: person } }),
    );
  }
  return { ids: ids(made) };
}

async function stored_completions() {
  const mine = { run: String(process.hrtime.bigint()) };
  const made = [];
  for (let number = 0; number < 5; number += 1) {
    made.push(
      await completions.create({
        model: MODEL,
        messages: [
          { role: "system", content: "Be brief." },
          { role: "user", content: [{ type: "text", text: `${QUESTION} ${number}` }] },
        ],
        max_tokens: 4,
        store: true,
        metadata: { ...mine, number: String(number) },
        user: "somebody",
      }),
    );
  }
  const listed = async (options) => ids(await all(completions.list({ metadata: mine, ...options })));
  const first = await completions.list({ metadata: mine, limit: 2, order: "asc" });
  const id = made[0].id;
  const facts = {
    made: ids(made),
    all: await listed({ limit: 2 }), // page by page
    descending: await listed({ order: "desc" }),
    after: await listed({ after: made[2].id }),
    of_the_release: await listed({ model: made[0].model }),
    of_another_model: await listed({ model: "assistant@999" }),
    first_page: ids(first.data),
    has_more: first.hasNextPage(),
    retrieved: await completions.retrieve(id),
    messages: await all(completions.messages.list(id)),
    updated: await completions.update(id, { metadata: { kept: "yes" } }),
    deleted: [],
  };
  for (const completion of made) facts.deleted.push(await completions.delete(completion.id));
  facts.then = await raised(() => completions.retrieve(id));
  return facts;
}

// A file of eight examples in OpenAI's own form.
async function examples(first = 0) {
  const rows = Array.from({ length: 8 }, (_, index) => ({
    messages: [
      { role: "user", content: `What is bird ${first + index}?` },
      { role: "assistant", content: `Bird ${first + index} sings.` },
    ],
  }));
  return toFile(Buffer.from(rows.map((row) => `${JSON.stringify(row)}\n`).join("")), "birds.jsonl");
}

async function files() {
  const made = await client.files.create({ file: await examples(), purpose: "fine-tune" });
  const content = await (await client.files.content(made.id)).text();
  return {
    made,
    listed: ids(await all(client.files.list({ purpose: "fine-tune", limit: 1 }))),
    retrieved: await client.files.retrieve(made.id),
    rows: content.trim().split("\n").map(JSON.parse),
    deleted: await client.files.delete(made.id),
    then: await raised(() => client.files.retrieve(made.id)),
  };
}

async function fine_tuning() {
  const jobs = client.fineTuning.jobs;
  const upload = async (file) => client.files.create({ file: await file, purpose: "fine-tune" });
  const file = await upload(examples());
  const validation = await upload(examples(100));
  const made = await jobs.create({
    model: MODEL,
    training_file: file.id,
    validation_file: validation.id,
    suffix: "birds",
    seed: 7,
    method: {
      type: "supervised",
      supervised: { hyperparameters: { n_epochs: 1, batch_size: "auto" } },
    },
    metadata: { made_by: "a script" },
  });
  const while_needed = await raised(() => client.files.delete(file.id, { maxRetries: 0 }));
  let job = await jobs.retrieve(made.id);
  while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
    // OpenAI's API has no call that waits for a job.
    await new Promise((resolve) => setTimeout(resolve, 250));
    job = await jobs.retrieve(made.id);
  }
  return {
    made,
    job,
    while_needed,
    events: await all(jobs.listEvents(made.id, { limit: 2 })),
    checkpoints: await all(jobs.checkpoints.list(made.id)),
    listed: ids(await all(jobs.list({ limit: 1 }))),
    model: await client.models.retrieve(job.fine_tuned_model),
  };
}

async function fine_tuned_model() {
  return asked({ model: process.env.FINE_TUNED_MODEL, max_tokens: 8 });
}

async function errors() {
  const asking = (there, options = {}) =>
    raised(async () => {
      const answer = await there.chat.completions.create({ model: MODEL, messages: ASKED, ...options });
      return options.stream ? all(answer) : answer;
    });
  const impatient = client.withOptions({ maxRetries: 0 });
  const facts = {
    bad_request: await asking(impatient, { temperature: 9 }),
    unknown_model: await asking(impatient, { model: "gpt-17" }),
    too_long: await asking(impatient, {
      messages: [{ role: "user", content: "a".repeat(150_000) }],
    }),
    too_large: await asking(impatient, {
      messages: [{ role: "user", content: "a".repeat(2 ** 23) }],
    }),
  };
  for (const [name, { base_url, api_key }] of Object.entries(ELSEWHERE)) {
    const there = new OpenAI({ baseURL: base_url, apiKey: api_key, maxRetries: 0 });
    if (name === "at_limit") await there.chat.completions.create({ model: MODEL, messages: ASKED });
    facts[name] = await asking(there, name === "breaks_off" ? { stream: true } : {});
  }
  return facts;
}

const SCENARIOS = {
  models,
  chat,
  streamed_chat,
  tools,
  streamed_tools,
  json_schema,
  for_others,
  stored_completions,
  files,
  fine_tuning,
  errors,
  fine_tuned_model,
};

const report = {};
for (const name of process.argv.slice(2)) {
  try {
    report[name] = await SCENARIOS[name]();
  } catch (error) {
    report[name] = { failure: error.stack }; // no reason not to hear of the others
  }
}
process.stdout.write(JSON.stringify(report));
