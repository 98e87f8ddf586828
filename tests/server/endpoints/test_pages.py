"""The chat page in a real browser, over a whole gateway and a fake engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from sqlalchemy import select

from feedback.tables import Answer, AnswerStatus, Conversation, Judgement, JudgementRevision
from server.endpoints.pages import CONTENT_SECURITY_POLICY
from tests.fake_engine import FakeEngine
from tests.fake_engine.faults import Faults
from tests.gateway_fixtures import RunningGateway

pytestmark = pytest.mark.processes

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script> **not bold** &amp;"
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(event.violatedDirective);
});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("the pages are tested in chromium, which is not installed")
    expect.set_options(timeout=20_000)  # a busy machine is slow, not wrong
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=options)
        yield started
        started.close()


@dataclass
class ChatPage:
    """The page in one tab, and what a person does there. `trouble` is what must not happen."""

    page: Page
    gateway: RunningGateway
    trouble: list[str] = field(default_factory=list)

    def sign_in(self, key: str | None = None) -> None:
        self.page.goto(self.gateway.url)
        self.page.get_by_label("API key").fill(key or self.gateway.key("ada"))
        self.page.get_by_role("button", name="Sign in").click()

    def send(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.keyboard.press("Enter")

    def answer(self, number: int = -1) -> Any:
        return self.page.get_by_role("article", name="Answer").nth(number)

    def text(self) -> Any:
        """What the model said in the newest answer."""
        return self.answer().locator(".text").first

    def wait_for_answer(self) -> None:
        expect(self.page.get_by_role("button", name="Send")).to_be_visible()

    def press(self, name: str, says: str) -> None:
        self.answer().get_by_role("button", name=name).click()
        expect(self.answer().get_by_role("status")).to_have_text(says)

    def judgements(self) -> list[tuple[str, Any, str | None]]:
        """What the database has, oldest first."""
        with self.gateway.database.read() as session:
            rows = session.scalars(select(Judgement).order_by(Judgement.id))
            return [(row.kind, row.value, row.comment) for row in rows]


@pytest.fixture
def chat(browser: Browser, sqlite_gateway: RunningGateway) -> Iterator[ChatPage]:
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(20_000)
    context.add_init_script(WATCH)
    chat = ChatPage(context.new_page(), sqlite_gateway)
    chat.page.on("pageerror", lambda error: chat.trouble.append(str(error)))
    chat.page.on("dialog", lambda dialog: (chat.trouble.append(dialog.message), dialog.dismiss()))
    yield chat
    chat.trouble += chat.page.evaluate("window.violations")
    context.close()
    assert not chat.trouble


def test_only_the_files_of_the_page_are_served_and_each_with_the_strict_policy(
    sqlite_gateway: RunningGateway,
) -> None:
    client = sqlite_gateway.client()
    types = {
        "/": "text/html; charset=utf-8",
        "/static/page.js": "text/javascript; charset=utf-8",
        "/static/page.css": "text/css; charset=utf-8",
        "/static/icon.svg": "image/svg+xml",
    }
    for path, content_type in types.items():
        reply = client.get(path)
        assert (reply.status_code, reply.headers["content-type"]) == (200, content_type)
        assert reply.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert reply.headers["cache-control"] == "no-cache"
        again = client.get(path, headers={"if-none-match": reply.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in (
        "index.html",
        "..%2findex.html",
        "..%2f..%2fapp.py",
        "%2fetc%2fpasswd",
        "",
        "x.js",
    ):
        reply = client.get(f"/static/{path}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


def test_a_wrong_key_is_refused_in_plain_words_and_a_right_one_stays_in_the_tab(
    chat: ChatPage,
) -> None:
    chat.sign_in("sk-burnish-wrong")
    alert = chat.page.get_by_role("alert")
    expect(alert).to_have_text("this API key is unknown or was revoked")
    assert chat.page.evaluate("sessionStorage.length") == 0

    key = chat.gateway.key("ada")
    chat.page.get_by_label("API key").fill(key)
    chat.page.keyboard.press("Enter")
    expect(chat.page.get_by_label("Message")).to_be_focused()
    expect(chat.page.get_by_label("Model")).to_have_value("assistant")
    assert chat.page.get_by_label("Model").locator("option").all_inner_texts() == [
        "assistant",
        "gpt-4o-mini",
        "tiny",
    ]
    chat.page.reload()
    expect(chat.page.get_by_label("Message")).to_be_visible()
    assert chat.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]

    chat.page.get_by_role("button", name="Sign out").click()
    expect(chat.page.get_by_label("API key")).to_be_focused()
    assert chat.page.evaluate("sessionStorage.length") == 0
    assert key not in chat.page.content()


def test_an_answer_arrives_in_pieces_and_escape_stops_it(
    chat: ChatPage, gateway_engine: FakeEngine
) -> None:
    gateway_engine.faults = Faults(token_seconds=0.02, endless=True)
    chat.sign_in()
    chat.page.get_by_label("Message").fill("first line")
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("second line")
    chat.page.keyboard.press("Enter")
    text = chat.text()
    expect(text).to_contain_text("base")
    expect(chat.answer()).to_have_attribute("aria-busy", "true")
    seen = text.inner_text()
    chat.page.wait_for_function(
        "(n) => document.querySelector('.answer .text').textContent.length > n", arg=len(seen)
    )
    assert text.inner_text().startswith(seen)

    chat.page.keyboard.press("Escape")
    expect(chat.answer()).to_have_attribute("aria-busy", "false")
    expect(chat.answer().locator(".meta")).to_have_text("assistant@0 · stopped")
    gateway_engine.wait_until(lambda engine: engine.aborted == 1)
    assert gateway_engine.requests[-1].body["messages"][-1]["content"] == "first line\nsecond line"
    # Half an answer can be bettered, not called good or bad.
    expect(chat.answer().get_by_role("button")).to_have_text(
        [r"Better answer becomes a training example"]
    )


def test_a_rating_is_stored_changed_explained_and_taken_back(chat: ChatPage) -> None:
    chat.sign_in()
    chat.send("hello")
    good = chat.answer().get_by_role("button", name="labelled good")
    chat.press("labelled good", "Saved. Teaches: labelled true.")
    expect(good).to_have_attribute("aria-pressed", "true")
    assert chat.judgements() == [("rating", True, None)]

    chat.press("labelled bad", "Saved. Teaches: labelled false.")
    expect(good).to_have_attribute("aria-pressed", "false")
    chat.answer().get_by_label("Comment on your rating").fill("wrong town")
    chat.page.keyboard.press("Enter")
    expect(chat.answer().get_by_role("status")).to_have_text(
        "Comment saved. Teaches: labelled false."
    )
    assert chat.judgements() == [("rating", False, "wrong town")]

    chat.press("labelled bad", "Taken back.")
    with chat.gateway.database.read() as session:
        said = session.scalars(select(JudgementRevision.value).order_by(JudgementRevision.revision))
        assert list(said) == [True, False, False, None]


def test_a_better_answer_is_stored_as_a_correction_and_shown_as_it_was_written(
    chat: ChatPage,
) -> None:
    chat.sign_in()
    chat.send("hello")
    chat.answer().get_by_role("button", name="Better answer").click()
    area = chat.answer().get_by_label("Your better answer")
    expect(area).to_be_focused()
    expect(area).to_have_value(chat.text().inner_text())
    chat.press("Save", "Change the text first: an equal answer teaches nothing.")
    area.fill(MARKUP)
    chat.answer().get_by_role("button", name="Save").click()
    expect(chat.answer().get_by_role("status")).to_contain_text("Saved. Teaches: supervised")
    expect(chat.answer().locator(".corrected .text")).to_have_text(MARKUP)
    assert chat.judgements() == [("correction", {"role": "assistant", "content": MARKUP}, None)]

    chat.answer().get_by_role("button", name="Better answer").click()
    chat.press("Take back", "Taken back.")
    expect(chat.answer().locator(".corrected")).to_be_hidden()


def test_turns_continue_one_conversation_and_a_new_chat_begins_another(
    chat: ChatPage, gateway_engine: FakeEngine
) -> None:
    chat.sign_in()
    chat.send("hello")
    chat.wait_for_answer()
    first = chat.text().inner_text()
    chat.send("and then?")
    expect(chat.page.get_by_role("article", name="Answer")).to_have_count(2)
    chat.wait_for_answer()
    sent = [(m["role"], m["content"]) for m in gateway_engine.requests[-1].body["messages"]]
    assert sent == [("user", "hello"), ("assistant", first), ("user", "and then?")]

    chat.page.get_by_role("button", name="New chat").click()
    expect(chat.page.get_by_role("article")).to_have_count(0)
    chat.send("hello")
    expect(chat.answer().locator(".meta")).to_have_text("assistant@0")
    with chat.gateway.database.read() as session:
        answers = list(session.scalars(select(Answer).order_by(Answer.id)))
        conversations = list(session.scalars(select(Conversation.id).order_by(Conversation.id)))
    assert [a.conversation_id for a in answers] == [conversations[n] for n in (0, 0, 1)]
    assert [a.parent_id for a in answers] == [None, answers[0].id, None]
    assert {a.status for a in answers} == {AnswerStatus.COMPLETE}


def test_markup_from_the_model_is_text_and_fenced_code_is_code(chat: ChatPage) -> None:
    said = f"{MARKUP}\n\n```html\n{MARKUP}\n```\nend"
    pieces = [said[at : at + 7] for at in range(0, len(said), 7)]

    def answer(route: Route) -> None:
        choices: list[dict[str, Any]] = [{"delta": {"content": piece}} for piece in pieces]
        choices.append({"delta": {}, "finish_reason": "stop"})
        chunks = [{"id": "chatcmpl-1", "model": MARKUP, "choices": [choice]} for choice in choices]
        events = [*map(json.dumps, chunks), "[DONE]"]
        route.fulfill(
            body="".join(f"data: {event}\n\n" for event in events),
            headers={"content-type": "text/event-stream"},
        )

    chat.page.route("**/v1/chat/completions", answer)
    chat.sign_in()
    chat.send(MARKUP)
    expect(chat.answer().locator(".meta")).to_have_text(MARKUP)
    expect(chat.page.get_by_role("article", name="You")).to_have_text(MARKUP)
    expect(chat.text().locator("> *")).to_have_text([MARKUP, MARKUP, "end"])
    expect(chat.answer().locator("pre code")).to_have_text(MARKUP)
    assert chat.page.locator("#log img, #log script").count() == 0


def test_an_engine_that_is_not_ready_is_explained_and_asked_again(
    chat: ChatPage, gateway_engine: FakeEngine
) -> None:
    gateway = chat.gateway.gateway
    chat.sign_in()
    gateway_engine.dead = True
    chat.gateway.reconcile()
    chat.send("hello")
    problem = chat.answer().locator(".problem")
    expect(problem.get_by_role("alert")).to_have_text(gateway.chooser.picture.explain_not_ready())
    expect(problem).to_contain_text("Trying again in")
    expect(chat.page.get_by_role("button", name="Stop")).to_be_visible()
    gateway_engine.restart()
    chat.gateway.reconcile()
    assert gateway.chooser.picture.is_ready
    problem.get_by_role("button", name="Try again").click()
    expect(chat.answer().locator(".meta")).to_have_text("assistant@0")
    expect(chat.page.get_by_role("article", name="Answer")).to_have_count(1)


def test_a_gateway_that_starts_says_why_it_waits_and_is_asked_again_by_itself(
    chat: ChatPage,
) -> None:
    refusal = {"error": {"message": "no engine is there yet", "code": "engine_not_ready"}}
    loading = {"status": "loading", "reason": "the engine is starting"}

    def refuse(route: Route) -> None:
        route.fulfill(status=503, headers={"retry-after": "1"}, json=refusal)

    chat.page.route("**/v1/chat/completions", refuse, times=1)
    chat.page.route("**/readyz", lambda route: route.fulfill(status=503, json=loading))
    chat.sign_in()
    chat.send("hello")
    hint = chat.answer().locator(".problem .quiet")
    expect(hint).to_have_text("the engine is starting. Trying again in 1 s.")
    expect(chat.answer().locator(".meta")).to_have_text("assistant@0")


def test_an_answer_that_breaks_off_is_explained_and_can_be_asked_for_again(
    chat: ChatPage, gateway_engine: FakeEngine
) -> None:
    gateway_engine.faults = Faults(errs_after_tokens=3)
    chat.sign_in()
    chat.send("hello")
    expect(chat.answer().get_by_role("alert")).to_contain_text("the engine failed")
    expect(chat.answer().get_by_role("group", name="Judge this answer")).to_be_hidden()
    gateway_engine.faults = Faults()
    chat.answer().get_by_role("button", name="Try again").click()
    expect(chat.answer().locator(".meta")).to_have_text("assistant@0")
    expect(chat.page.get_by_role("article", name="Answer")).to_have_count(1)


def test_nothing_is_wider_than_a_phone(chat: ChatPage) -> None:
    chat.page.set_viewport_size({"width": 390, "height": 844})
    chat.sign_in()
    chat.send("x" * 300)
    chat.answer().get_by_role("button", name="Better answer").click()
    chat.answer().get_by_label("Your better answer").fill(f"```\n{'x' * 300}\n```\n{'y' * 300}")
    chat.answer().get_by_role("button", name="Save").click()
    chat.answer().get_by_role("button", name="labelled good").click()
    chat.answer().get_by_role("button", name="Better answer").click()
    expect(chat.answer().get_by_role("button", name="Add comment")).to_be_visible()
    too_wide = """[...document.querySelectorAll("body *:not(pre *)")]
        .filter((element) => element.getBoundingClientRect().right > innerWidth)
        .map((element) => element.outerHTML)"""
    assert chat.page.evaluate(too_wide) == []
