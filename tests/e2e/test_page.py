"""The page of `smedjan serve` in a real Chromium: real clicks and keys, a real server, nothing in the console, nothing from elsewhere.

Without Chromium and its driver (Debian: chromium, chromium-driver) what needs them is skipped.
"""

import gzip
import importlib.util
import json
import re
from pathlib import Path

import pytest

from smedjan_common.chat import files
from smedjan_common.chat.talk import Talk
from smedjan_common.serving.page import page, policy
from smedjan_common.tokenizer.chat import Plain
from tests.fakes.browser import CHROMIUM, DRIVER, IS_THERE, Browser
from tests.fakes.serve import tokenizer
from tests.fakes.serving import fake

pytestmark = pytest.mark.xdist_group("page")
browser_test = pytest.mark.skipif(not IS_THERE, reason=f"Chromium or its driver is missing: chromium {CHROMIUM}, chromedriver {DRIVER}")
HOSTILE = (
    "Hi 👩‍🔬<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>\n\n"
    "[run](javascript:alert(1)) [site](https://example.org/a?b=1)\n\n![pic](https://example.org/pixel.png)\n\n- one\n- **two** `x<y`\n\n"
    "```html\n<b onclick=alert(1)>bold</b>\n```\n\nשלום עולם\n\nend<|endoftext|>"
)
CHECK = """
const done = arguments[0], told = (result) => done(result.violations.map((each) => [each.id, each.nodes.map((node) => node.html)]));
axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"] }).then(told, (error) => done(String(error)));
"""
AXE = importlib.util.find_spec("axe_playwright_python")


@pytest.fixture(scope="module")
def server():
    with fake(names=["forge"], context=2048, rows=2, step=0.008, script=HOSTILE) as running:
        yield running


@pytest.fixture(scope="module")
def opened(server, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        browser.folder = tmp_path_factory.getbasetemp()
        yield browser


@pytest.fixture
def browser(opened, server):
    """The page as somebody sees it for the first time. Afterwards the console must be empty."""
    opened.open(f"http://127.0.0.1:{server.port}/")
    opened.run("localStorage.clear(); sessionStorage.clear(); window.onpagehide = null; talk = blank()")
    opened.reload()
    opened.wait(lambda: "forge" in opened.one("#model").text)
    opened.one("#tab-chat").click()
    yield opened
    assert opened.logged() == []


def ask(browser, text: str, wait: bool = True, tokens: int | str = 12) -> None:
    """Ask for an answer of some tokens; "": to its end."""
    browser.run("settings.max_tokens = arguments[0]", tokens)
    browser.one("#ask").type(text)
    if len(text) % 2:
        browser.one("#send").click()
    else:
        browser.press("Enter")
    if wait:
        done(browser)


def done(browser) -> None:
    browser.wait(
        lambda: browser.run("return running === null && document.querySelectorAll('article.assistant .info').length > 0"), "an answer"
    )


def requests(browser) -> None:
    """Remember the bodies of what is asked from now on in window.asked."""
    browser.run(
        "window.asked = []; const before = window.fetch;"
        "window.fetch = (path, more) => { if (more && more.body) window.asked.push(JSON.parse(more.body)); return before(path, more); }"
    )


def test_the_policy_names_style_and_script_by_their_hashes(server):
    status, headers, _ = server.ask("GET", "/")
    assert status == 200
    assert headers["content-security-policy"] == policy(page().body)
    for rule in (
        "default-src 'none'",
        "connect-src 'self'",
        "require-trusted-types-for 'script'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    ):
        assert rule in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert len(re.findall("'sha256-", headers["content-security-policy"])) == 2
    assert policy(page().body.replace(b'"use strict";', b'"use strict"; ')) != policy(page().body)
    assert server.ask("GET", "/", headers={"if-none-match": headers["etag"]})[0] == 304
    status, body, told = page().answer("gzip, br", "")
    assert (status, told["content-encoding"]) == (200, "gzip")
    assert gzip.decompress(body) == page().body


@browser_test
def test_an_answer_comes_as_it_is_written_and_says_what_it_took(browser):
    ask(browser, "Hello there", wait=False, tokens="")
    lengths = set()
    browser.wait(
        lambda: lengths.add(browser.run("return talk.nodes[branch(talk)[1]].content.length")) or len(lengths) > 3, "a growing answer"
    )
    done(browser)
    assert "tokens/s" in browser.one("article.assistant .info").text
    assert re.fullmatch(r"\d+ of 2,048 tokens", browser.one("#used").text)
    assert browser.one("article.user .said").text == "Hello there"
    assert "end" in browser.one("article.assistant .said").text
    assert browser.run("return document.activeElement.id") == "ask"
    browser.wait(lambda: browser.run("return document.getElementById('told').textContent.startsWith('Answer: Hi')"), "what is read aloud")


@browser_test
def test_what_a_model_writes_stays_text(browser):
    ask(browser, "<b>me</b> <img src=x onerror='window.hacked=1'>", tokens="")
    assert browser.run("return window.hacked === undefined")
    made = browser.run("return [...document.querySelectorAll('#log *')].map((each) => each.tagName.toLowerCase())")
    assert not set(made) & {"img", "script", "b", "iframe", "svg", "style", "object", "form"}
    assert browser.run("return [...document.querySelectorAll('#log a')].map((each) => [each.protocol, each.rel, each.textContent])") == [
        ["https:", "noopener noreferrer nofollow", "site"],
        ["https:", "noopener noreferrer nofollow", "pic"],
    ]
    shown = browser.one("article.assistant .said").text
    for text in ("👩‍🔬<img src=x onerror='window.hacked=1'><script>", "[run](javascript:alert(1))", "<b onclick=alert(1)>bold</b>", "x<y"):
        assert text in shown
    assert browser.one("article.user .said").text == "<b>me</b> <img src=x onerror='window.hacked=1'>"
    assert (
        browser.run("return document.querySelector('#log strong').textContent + document.querySelector('#log li code').textContent")
        == "twox<y"
    )


KINDS = {
    "# a\n\ntext *em* **strong** ~~gone~~ `code`\nline": "h3 p em strong del code",
    "> quote\n> more\n\n---\n\nend": "blockquote p hr p",
    "1. x\n2. y\n   - z\n": "ol li li ul li",
    "| a | b |\n|---|---|\n| 1 | 2 |": "div table thead tr th th tbody tr td td",
    "```py\nopen": "div div span button pre code",
    "a_b_c 2*3*4 __init__.py": "p",
    "<details open ontoggle=alert(1)>": "p",
}
LONG = (
    *("a" * 100_000, "*a " * 10_000, "a" + "`" * 20_000, "[" * 20_000, "> " * 5000, "_a" * 20_000, "**a " * 10_000, "``a` " * 8000),
    *("|" * 20_000 + "\n" + "-|" * 5000, "x\n" * 20_000, "".join(f"{'  ' * depth}- a\n" for depth in range(300))),
)


@browser_test
def test_markdown_of_every_kind_is_quick_and_whole(browser):
    """Every text is shown in full, whatever it looks like, and none takes long."""
    made = "const box = make('div'), begun = performance.now(); markdown(arguments[0], box); const took = performance.now() - begun;"
    for text, tags in KINDS.items():
        found = browser.run(f"{made} return [...box.querySelectorAll('*')].map((each) => each.tagName.toLowerCase())", text)
        assert " ".join(found) == tags, text
    for text in LONG:
        took, shown = browser.run(f"{made} return [took, box.textContent]", text)
        assert took < 3000, text[:10]
        assert shown.count("a") == text.count("a"), text[:10]


@browser_test
def test_stop_and_escape_end_an_answer_and_free_its_slot(browser, server):
    for stop in (lambda: browser.one("#stop").click(), lambda: browser.press("Escape")):
        ask(browser, "Go", wait=False, tokens="")
        browser.wait(
            lambda: browser.run("const ids = branch(talk); return talk.nodes[ids[ids.length - 1]].content.length > 20"), "a beginning"
        )
        assert server.metrics()["requests_running"] == 1
        stop()
        server.wait_for(2, requests_running=0)
        assert "stopped" in browser.one("article.assistant .info").text
        assert browser.one("article.assistant .said").text.startswith("Hi")
        assert browser.one("#send").is_shown


@browser_test
def test_another_answer_and_another_question_keep_the_ones_before(browser):
    ask(browser, "First")
    browser.one("article.assistant .acts button", "Again").click()
    done(browser)
    assert browser.one("article.assistant .acts > span:not(.info)").text == "2/2"
    browser.run("document.querySelector('[aria-label=\"Earlier version\"]').click()")
    assert browser.one("article.assistant .acts > span:not(.info)").text == "1/2"
    browser.one("article.user .acts button", "Edit").click()
    browser.one("form.edit textarea").type(" changed")
    browser.one("form.edit button", "Send").click()
    done(browser)
    assert browser.one("article.user .said").text == "First changed"
    browser.run("document.querySelector('article.user [aria-label=\"Earlier version\"]').click()")
    assert browser.one("article.user .said").text == "First"
    browser.press("Tab")
    browser.one("#ask").click()
    browser.press("Up")
    assert browser.one("form.edit textarea").property("value") == "First", "arrow up edits the last message"
    browser.press("Escape")
    assert browser.one("article.user .said").text == "First"


@browser_test
def test_an_answer_goes_on_where_it_stopped(browser):
    ask(browser, "Go", wait=False, tokens="")
    browser.wait(lambda: browser.run("return talk.nodes[branch(talk)[1]].content.length > 20"), "a beginning")
    browser.press("Escape")
    before = browser.run("return talk.nodes[branch(talk)[1]].content")
    requests(browser)
    browser.run("settings.max_tokens = 12")
    browser.one("article.assistant .acts button", "Continue").click()
    browser.wait(lambda: browser.run("return running === null"), "the end")
    [asked] = browser.run("return window.asked")
    assert asked["continue_final_message"] is True
    assert asked["messages"][-1] == {"role": "assistant", "content": before}
    after = browser.run("return talk.nodes[branch(talk)[1]].content")
    assert after.startswith(before)
    assert len(after) > len(before)


@browser_test
def test_a_reload_keeps_the_talk_even_in_the_middle_of_an_answer(browser):
    ask(browser, "Keep me", wait=False, tokens="")
    browser.wait(lambda: browser.run("return talk.nodes[branch(talk)[1]].content.length > 20"), "a beginning")
    browser.reload()
    browser.wait(lambda: browser.one("article.assistant .said").text.startswith("Hi"), "the talk")
    assert browser.one("article.user .said").text == "Keep me"
    assert browser.one("#list button").text == "Keep me"
    browser.one("#new").click()
    assert browser.one(".welcome").is_shown
    browser.one("#list button", "Keep me").click()
    assert browser.one("article.user .said").text == "Keep me"
    browser.one("#delete").click()
    browser.one("#delete", "Really delete?").click()
    assert browser.run("return store.keys('smedjan.talk.').length") == 0


@browser_test
def test_settings_and_the_system_text_are_sent(browser):
    browser.one("#open-settings").click()
    browser.one("#system").type("You are a smith.")
    for name, value in (("temperature", "0.25"), ("max_tokens", "7"), ("seed", "5")):
        browser.run("arguments[0].value = ''", {"element-6066-11e4-a52e-4f735466cecf": browser.one(f"#set-{name}").number})
        browser.one(f"#set-{name}").type(value)
    browser.one("#done").click()
    browser.reload()
    browser.wait(lambda: "forge" in browser.one("#model").text)
    requests(browser)
    ask(browser, "Hello", tokens=7)
    [asked] = browser.run("return window.asked")
    assert asked["messages"] == [{"role": "system", "content": "You are a smith."}, {"role": "user", "content": "Hello"}]
    assert (asked["temperature"], asked["max_tokens"], asked["seed"], asked["stream"]) == (0.25, 7, 5, True)
    assert "cut at the limit" in browser.one("article.assistant .info").text


@browser_test
def test_a_talk_that_outgrows_the_context_leaves_its_oldest_turns_out(browser):
    requests(browser)
    browser.run("settings.max_tokens = 12")
    for number in range(3):
        browser.run("ask(arguments[0])", f"{number} {'iron ' * 420}")
        done(browser)
        browser.wait(lambda: browser.run("return running === null"), "the end")
    assert "no longer fit into the context" in browser.one("article.assistant .note").text
    sent = browser.run("return window.asked")[-1]["messages"]
    assert sent[0]["content"].startswith(("1", "2")), "the oldest question is not sent"
    assert browser.run("return branch(talk).length") == 6, "the talk has it still"


@browser_test
def test_a_text_goes_on_and_can_be_taken_back(browser):
    browser.one("#tab-text").click()
    assert "base model" in browser.one("#text-why").text
    browser.one("#text").type("Once ")
    browser.run("settings.max_tokens = 40")
    browser.one("#go").click()
    browser.wait(lambda: "tokens" in browser.one("#text-state").text, "the end")
    assert browser.one("#text").property("value").startswith("Once Hi")
    assert "40 tokens" in browser.one("#text-state").text
    browser.one("#text-undo").click()
    assert browser.one("#text").property("value") == "Once "
    browser.reload()
    browser.wait(lambda: browser.one("#text").property("value") == "Once ", "the text of before")


@browser_test
def test_a_talk_is_exported_for_the_terminal_and_read_again(browser, tmp_path):
    browser.one("#open-settings").click()
    browser.one("#system").type("Be brief.")
    browser.one("#done").click()
    ask(browser, "Export me")
    said = browser.run("return talk.nodes[branch(talk)[1]].content")
    browser.call(
        "POST", "/goog/cdp/execute", {"cmd": "Browser.setDownloadBehavior", "params": {"behavior": "allow", "downloadPath": str(tmp_path)}}
    )
    browser.one("#export").click()
    file = browser.wait(lambda: next(iter(tmp_path.glob("Export-me.json")), None), "the file")
    talk = Talk(tokenizer(), Plain(tokenizer()), 2048)
    files.load(file, talk)
    assert (talk.system, [each["content"] for each in talk.messages]) == ("Be brief.", ["Export me", said])
    files.save(tmp_path / "again.json", talk, "forge")
    browser.one("#new").click()
    browser.run("document.getElementById('file').hidden = false")
    browser.one("#file").type(str(tmp_path / "again.json"))
    browser.wait(lambda: browser.one("article.user .said").text == "Export me", "the talk")
    circle = {"nodes": {"a": {"parent": "", "role": "user", "content": "round"}}, "chosen": {"": "a", "a": "a"}, "system": 5}
    (tmp_path / "circle.json").write_text(json.dumps({"talk": circle}))
    browser.one("#file").type(str(tmp_path / "circle.json"))
    browser.wait(lambda: browser.one("article.user .said").text == "round", "a talk that goes in a circle")
    (tmp_path / "none.json").write_text('{"messages": 5}')
    browser.one("#file").type(str(tmp_path / "none.json"))
    browser.wait(lambda: browser.one("#state").text == "That file holds no talk.", "a refusal")
    assert json.loads(file.read_text())["model"] == "forge"


@browser_test
def test_what_the_server_refuses_is_said_and_can_be_tried_again(browser):
    browser.run("window.real = window.fetch; window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    ask(browser, "Anybody?", wait=False)
    assert "does not answer" in browser.one("article .wrong").text
    browser.run("window.fetch = window.real")
    browser.one("article.assistant .acts button", "Again").click()
    done(browser)
    assert browser.one("article.assistant .said").text.startswith("Hi")


@browser_test
def test_a_key_is_asked_for_and_kept_for_the_tab_alone(opened):
    with fake(names=["secret"], key="open sesame", script="Hi<|endoftext|>") as guarded:
        opened.open(f"http://127.0.0.1:{guarded.port}/")
        opened.wait(lambda: "API key" in opened.one("#state").text, "a refusal")
        opened.one("#open-settings").click()
        opened.one("#set-key").type("open sesame")
        opened.one("#done").click()
        opened.wait(lambda: "secret" in opened.one("#model").text, "the model")
        assert opened.run("return JSON.stringify(localStorage).includes('sesame')") is False
    assert all("401" in line for line in opened.logged())


@browser_test
def test_a_narrow_page_fits_and_its_parts_can_be_touched(server, tmp_path):
    with Browser(tmp_path, 360, 740, dark=True, touch=True) as phone:
        phone.open(f"http://127.0.0.1:{server.port}/")
        phone.wait(lambda: "forge" in phone.one("#model").text)
        assert phone.run("return matchMedia('(prefers-color-scheme: dark)').matches && document.documentElement.dataset.theme") == "dark"
        phone.one("#tab-chat").click()
        phone.run("settings.max_tokens = 12")
        phone.one("#ask").type("Hello")
        phone.one("#send").click()
        done(phone)
        for tab in ("#tab-text", "#tab-chat"):
            phone.one(tab).click()
            assert phone.run("return document.scrollingElement.scrollWidth") <= 360, tab
        low = "each.offsetParent && each.getBoundingClientRect().height < 44"
        small = f"return [...document.querySelectorAll('button')].filter((each) => {low}).map((each) => each.id || each.textContent)"
        assert phone.run(small) == []
        assert not phone.all("#new")[0].is_shown or phone.run("return document.getElementById('talks').getBoundingClientRect().right <= 0")
        phone.one("#open-talks").click()
        phone.wait(lambda: phone.run("return document.getElementById('talks').getBoundingClientRect().left === 0"), "the talks")
        phone.press("Escape")
        phone.wait(lambda: phone.run("return document.getElementById('talks').getBoundingClientRect().right <= 0"), "the talk")
        phone.one("#theme").click()
        assert phone.run("return document.documentElement.dataset.theme") == "light"
        assert phone.logged() == []


@browser_test
@pytest.mark.skipif(AXE is None, reason="the package axe-playwright-python, which has axe.min.js, is not installed")
def test_axe_finds_no_barrier(browser):
    """axe-core's rules of WCAG 2.2, levels A and AA, in both themes, with a talk, the settings and the text."""
    assert AXE is not None
    script = (Path(next(iter(AXE.submodule_search_locations or []))) / "axe.min.js").read_text()
    ask(browser, "Hello")
    for theme in ("light", "dark"):
        browser.run("document.documentElement.dataset.theme = arguments[0]", theme)
        for step in ("void 0", "showSettings()", "document.getElementById('settings').close(); setMode('text')", "setMode('chat')"):
            browser.run(step)
            browser.run("if (!window.axe) { (function () { " + script + " }).call(window); }")
            found = browser.call("POST", "/execute/async", {"script": CHECK, "args": []})
            assert found == [], (theme, step)
