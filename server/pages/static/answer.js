// One answer on the page: its text as it arrives, what went wrong, and what is said about it.

import { Problem, request } from "./api.js";

/** A copy of a template's one element. */
export function copy(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

/** Show `text` in `place`: fenced code as code, all else as it stands. Never reads it as HTML. */
export function show(place, text) {
  const parts = split(text);
  parts.forEach(({ code, content }, at) => {
    let block = place.children[at];
    if (block?.localName !== (code ? "pre" : "p")) {
      const made = document.createElement(code ? "pre" : "p");
      if (code) made.append(document.createElement("code"));
      if (code) made.tabIndex = 0; // it may scroll
      block ? block.replaceWith(made) : place.append(made);
      block = made;
    }
    const target = code ? block.firstChild : block;
    const old = target.textContent;
    if (old && content.startsWith(old)) target.firstChild.appendData(content.slice(old.length));
    else if (old !== content) target.textContent = content;
  });
  while (place.children.length > parts.length) place.lastChild.remove();
}

function split(text) {
  const parts = [{ code: false, lines: [] }];
  for (const line of text.split("\n")) {
    const { code, lines } = parts.at(-1);
    if (code ? line.trim() === "```" : /^ {0,3}```[^`]*$/.test(line)) parts.push({ code: !code, lines: [] });
    else lines.push(line);
  }
  return parts
    .map(({ code, lines }) => ({ code, content: code ? lines.join("\n") : lines.join("\n").replace(/^\n+|\s+$/g, "") }))
    .filter(({ code, content }) => code || content);
}

/** An answer. `again` is called where somebody wants it anew. */
export class Answer {
  text = "";
  id = null;
  #rating = null;
  #correction = null;
  #saying = Promise.resolve();

  constructor(again) {
    this.element = copy("answer-template");
    this.find(".again").onclick = again;
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  /** Take in one chunk of the stream. */
  hear(chunk) {
    this.id = chunk.id;
    this.model = chunk.model;
    const choice = chunk.choices[0];
    this.finish = choice?.finish_reason ?? this.finish;
    this.text += choice?.delta?.content ?? "";
    this.frame ??= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.frame = null;
    show(this.find(".text"), this.text);
    this.find(".waiting").hidden = this.text !== "";
  }

  /** No more text comes. An answer that has some can be judged from now on. */
  end(stopped = false) {
    cancelAnimationFrame(this.frame);
    this.#draw();
    this.find(".waiting").hidden = true;
    this.element.ariaBusy = "false";
    const how = stopped ? "stopped" : this.finish === "length" ? "cut at the length limit" : null;
    this.find(".meta").textContent = [this.model, how].filter(Boolean).join(" · ");
    if (!this.text) return;
    this.find(".judge").hidden = false;
    this.find(".up").hidden = how !== null; // half an answer is no good example
    this.find(".down").hidden = stopped;
    this.find(".up").onclick = () => this.#inTurn(() => this.#rate(true));
    this.find(".down").onclick = () => this.#inTurn(() => this.#rate(false));
    this.find(".better").onclick = () => this.#openCorrection(this.find(".correct").hidden);
    this.find(".cancel").onclick = () => this.#openCorrection(false);
    this.find(".withdraw").onclick = () => this.#inTurn(() => this.#correct(null));
    this.find(".why").onsubmit = (event) => {
      event.preventDefault();
      this.#inTurn(() => this.#comment());
    };
    this.find(".correct").onsubmit = (event) => {
      event.preventDefault();
      const { value } = this.find(".correct textarea");
      this.#inTurn(() => this.#correct(value));
    };
  }

  /** Say what went wrong, and below it `hint`. */
  fail(message, hint = "") {
    this.end();
    this.find(".judge").hidden = true;
    this.find(".problem").hidden = false;
    this.find(".problem [role=alert]").textContent = message;
    this.hint(hint);
  }

  hint(text) {
    this.find(".problem .quiet").textContent = text;
  }

  /** Judgements go out one after the other: none of two quick clicks is lost, the last one holds. */
  #inTurn(work) {
    this.#saying = this.#saying.catch(() => {}).then(work);
  }

  async #rate(value) {
    const wanted = this.#rating === value ? null : value; // the same again takes it back
    if (!(await this.#say({ kind: "rating", value: wanted }))) return;
    this.#rating = wanted;
    this.find(".up").ariaPressed = String(wanted === true);
    this.find(".down").ariaPressed = String(wanted === false);
    this.find(".why").hidden = wanted === null;
    this.find(".why").reset();
  }

  async #comment() {
    const comment = this.find(".why input").value.trim();
    const said = comment && (await this.#say({ kind: "rating", value: this.#rating, comment }));
    if (said) this.find(".why").hidden = true;
  }

  #openCorrection(open) {
    const area = this.find(".correct textarea");
    this.find(".correct").hidden = !open;
    this.find(".better").ariaExpanded = String(open);
    this.find(".withdraw").hidden = this.#correction === null;
    if (!open) return this.find(".better").focus();
    area.value = this.#correction ?? this.text;
    area.focus();
  }

  async #correct(value) {
    if (value !== null && value.trim() === this.text.trim()) {
      this.find(".taught").textContent = "Change the text first: an equal answer teaches nothing.";
      return;
    }
    if (!(await this.#say({ kind: "correction", value }))) return;
    this.#correction = value;
    this.#openCorrection(false);
    this.find(".corrected").hidden = value === null;
    show(this.find(".corrected .text"), value ?? "");
  }

  /** Send a judgement and show what the server says that it teaches; true once it is recorded. */
  async #say(judgement) {
    const place = this.find(".taught");
    try {
      const body = { completion_id: this.id, choice_index: 0, ...judgement };
      const { teaches } = await (await request("/v1/feedback", { body })).json();
      place.textContent =
        judgement.value === null ? "Taken back." : `${judgement.comment ? "Comment saved" : "Saved"}. Teaches: ${teaches}.`;
      return true;
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      place.textContent = `Not saved: ${error.message}`;
      return false;
    }
  }
}
