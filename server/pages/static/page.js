// The chat page: signing in and out, the conversation, sending and stopping.

import { Answer, copy, show } from "./answer.js";
import { Problem, chunks, key, reasonNotReady, request } from "./api.js";

const at = (id) => document.getElementById(id);
const prompt = at("prompt");
const scroller = at("scroller");

let conversation; // {id, turns: [{question, element, answer}]}
let running = null; // the AbortController of the answer that is being written or waited for

// Signing in and out

async function enter(token) {
  const { data } = await (await request("/v1/models", { token })).json();
  key.set(token);
  at("model").replaceChildren(...data.map(({ id }) => new Option(id)));
  if (data.some(({ id }) => id === "assistant")) at("model").value = "assistant";
  at("sign-in").hidden = true;
  at("chat").hidden = false;
  startConversation();
}

function leave(message = "") {
  key.forget();
  startConversation();
  at("model").replaceChildren();
  at("chat").hidden = true;
  at("sign-in").hidden = false;
  at("sign-in").querySelector(".error").textContent = message;
  at("key").focus();
}

at("sign-in").querySelector("form").onsubmit = async (event) => {
  event.preventDefault();
  const token = at("key").value.trim();
  at("sign-in").querySelector(".error").textContent = "";
  try {
    if (!/^[\x21-\x7e]+$/.test(token)) throw new Problem("This is not an API key: it has spaces or unusual characters.");
    await enter(token);
    at("key").value = "";
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    at("sign-in").querySelector(".error").textContent = error.message;
    at("key").select();
  }
};

// The conversation

function startConversation() {
  running?.abort();
  // The gateway finds out by itself what continues what; the id keeps two chats that begin alike apart.
  const id = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0"));
  conversation = { id: `page-${id.join("")}`, turns: [] };
  at("log").replaceChildren();
  at("welcome").hidden = false;
  at("status").textContent = prompt.value = "";
  grow();
  prompt.focus();
}

function send() {
  const question = prompt.value.trim();
  if (!question || running) return;
  const failed = conversation.turns.at(-1);
  if (failed && !failed.kept) drop(conversation.turns.pop()); // what is seen is what is sent
  const turn = { question, element: copy("question-template"), answer: null, kept: false };
  show(turn.element.querySelector(".text"), question);
  conversation.turns.push(turn);
  at("welcome").hidden = true;
  at("log").append(turn.element);
  prompt.value = "";
  grow();
  ask(turn);
}

function drop(turn) {
  turn.element.remove();
  turn.answer.element.remove();
}

/** Ask for the answer of the last turn, again while the server says when to. */
async function ask(turn) {
  const control = (running = new AbortController());
  const { signal } = control;
  setRunning(true);
  try {
    for (;;) {
      turn.answer?.element.remove();
      const answer = (turn.answer = new Answer(() => (running ? wake?.() : ask(turn))));
      at("log").append(answer.element);
      scroller.scrollTop = scroller.scrollHeight;
      try {
        await stream(turn, signal);
        turn.kept = true;
        return;
      } catch (error) {
        if (signal.aborted) {
          turn.kept = answer.text !== "";
          turn.kept ? answer.end(true) : answer.fail("Stopped before the answer began.");
          return;
        }
        if (!(error instanceof Problem)) throw error;
        answer.fail(error.message);
        follow();
        if (error.retryAfter === null || !(await countDown(answer, error, signal))) return;
      } finally {
        follow();
      }
    }
  } finally {
    if (running === control) setRunning((running = null));
  }
}

async function stream(turn, signal) {
  const messages = conversation.turns.flatMap(({ question, answer, kept }) => [
    { role: "user", content: question },
    ...(kept ? [{ role: "assistant", content: answer.text }] : []),
  ]);
  const body = { model: at("model").value, messages, stream: true, metadata: { conversation_id: conversation.id } };
  const reply = await request("/v1/chat/completions", { body, signal });
  for await (const chunk of chunks(reply)) {
    turn.answer.hear(chunk);
    follow();
  }
  turn.answer.end();
}

let wake = null; // ends the countdown at once

/** Wait as long as the server wants, saying why; false where it was stopped. */
async function countDown(answer, error, signal) {
  let reason = error.status === 503 ? await reasonNotReady() : null;
  if (reason && error.message.includes(reason)) reason = null;
  for (let left = error.retryAfter; left > 0 && !signal.aborted; left--) {
    answer.hint([reason && `${reason}.`, `Trying again in ${left} s.`].filter(Boolean).join(" "));
    follow();
    const pressed = await new Promise((resolve) => {
      const timer = setTimeout(resolve, 1000, false);
      wake = (again = true) => (clearTimeout(timer), resolve(again));
      signal.addEventListener("abort", () => wake?.(false), { once: true });
    });
    if (pressed) break;
  }
  wake = null;
  if (signal.aborted) answer.hint("Stopped.");
  return !signal.aborted;
}

function setRunning(on) {
  at("send").hidden = Boolean(on);
  at("stop").hidden = !on;
  at("status").textContent = on ? "The answer is being written." : "The answer has ended.";
}

/** Keep the end in sight for whoever was looking at it. */
function follow() {
  const near = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 160;
  if (near) requestAnimationFrame(() => (scroller.scrollTop = scroller.scrollHeight));
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

prompt.oninput = grow;
prompt.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
at("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
at("stop").onclick = () => {
  running?.abort();
  prompt.focus();
};
at("new-chat").onclick = startConversation;
at("sign-out").onclick = () => leave();

if (key.get()) enter(key.get()).catch((error) => leave(error.message));
else leave();
