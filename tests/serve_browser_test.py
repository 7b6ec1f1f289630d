"""The service's page in a real browser: texts stay texts, keys and phones suffice, both themes."""

import json
import pathlib
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

ATTACK = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, service):
    """The service's page, of which nothing may fail or come from elsewhere."""
    page, said, asked = browser.new_page(viewport={"width": 360, "height": 740}), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{service.port}/")
    yield page
    assert not said
    own = (f"http://127.0.0.1:{service.port}/", "data:")
    assert all(url.startswith(own) for url in asked)
    page.close()


def test_a_question_is_asked_by_keys_alone(page):
    page.keyboard.type("scale the gradient")  # The field has the focus.
    page.keyboard.press("Enter")
    page.wait_for_selector("blockquote")
    assert page.locator("ol").count() == 2
    assert page.locator("ol li").count() == 20
    assert page.locator("ol >> nth=1").locator(".moved").count() == 10
    assert "gradient" in {text.lower() for text in page.locator("mark.asked").all_inner_texts()}
    assert "encode" in page.inner_text("section >> nth=0")


def test_a_query_of_the_report_is_there_to_click(page):
    link = page.locator(".examples a").first
    query = link.inner_text()
    link.click()
    page.wait_for_selector("ol")
    assert page.input_value("#q") == query


def test_nothing_that_is_asked_or_found_becomes_markup(page, service):
    page.click("summary")
    page.fill("#id", "attack-'\"<b>")
    page.fill("#text", f"{ATTACK} pelican")
    page.click("#add button")
    page.wait_for_function("document.getElementById('said').textContent.includes('found')")
    page.fill("#q", f"pelican {ATTACK}")
    page.keyboard.press("Enter")
    page.wait_for_selector("ol")
    assert "taken" not in page.title().replace(ATTACK, "")
    assert page.locator("img, main script").count() == 0
    assert page.input_value("#q") == f"pelican {ATTACK}"
    assert "onerror" in page.inner_text("ol >> nth=0")
    service.ask("DELETE", "/documents/attack-'%22%3Cb%3E")


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_it_fits_a_phone_and_either_theme(page, scheme, dark):
    page.emulate_media(color_scheme=scheme)
    page.fill("#q", "a" * 300)
    page.keyboard.press("Enter")
    page.wait_for_selector("ol")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour.strip("rgb()").split(","))) < 380) == dark


def test_a_page_elsewhere_gets_nothing(browser, service, tmp_path):
    (tmp_path / "evil.html").write_text("<title>elsewhere</title>")
    page = browser.new_page()
    page.goto(pathlib.Path(tmp_path / "evil.html").as_uri())
    url = f"http://127.0.0.1:{service.port}"
    body = json.dumps({"documents": [{"id": "elsewhere", "text": "x"}]})
    # A form's kind of request, of which a browser asks the service for no leave.
    post = "([url, body]) => fetch(url, {method: 'POST', mode: 'no-cors', body})"
    page.evaluate(f"{post}.then(() => 1, () => 0)", [f"{url}/documents", body])
    assert service.ask("GET", "/documents/elsewhere")[0] == 404
    read = page.evaluate("(url) => fetch(url).then(() => 'read', () => 'refused')", f"{url}/health")
    assert read == "refused"
    page.close()
