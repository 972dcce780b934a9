"""The page in a real browser: pointer, keys, prompt, comparison, budget, export, errors, narrow screens, themes, no foreign host."""

import shutil
import threading
import time

import pytest

from headwise.hub import load_model
from headwise.units import HeadScores, HeadSet
from headwise.view.points import Points
from headwise.view.server import make_explorer, make_server
from view_helper import LLAMA, folder_of

pytest.importorskip("dash")
pytest.importorskip("waitress")
sync_api = pytest.importorskip("playwright.sync_api", reason="the page is driven by playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"), pytest.mark.slow]

ROW = {"exact": 1.0, "tokens": 0.75, "prompts": 4, "tokens_per_s": 0.0}
RUNS = [
    {**ROW, "kind": "full cache", "full_heads": 6, "perplexity": 3.0, "cache_bytes": 1000},
    {**ROW, "kind": "by score", "full_heads": 2, "perplexity": 4.25, "cache_bytes": 400},
    {**ROW, "kind": "random", "full_heads": 4, "perplexity": 5.5, "cache_bytes": 700},
]
TEXT = "a quick <b>brown</b> fox"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


def serve(paths, models):
    explorer = make_explorer(paths, [(*load_model(name), label) for name, label in models])
    running, url = make_server(explorer)
    threading.Thread(target=running.run, daemon=True).start()
    return running, url


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("artifacts")
    folder_of(made)
    Points.from_report({"budgets": RUNS}, "toy").save(made / "points.json")
    (made / "broken.json").write_text("{")
    return made


@pytest.fixture(scope="module")
def url(folder):
    running, address = serve([folder], [(LLAMA, "tiny"), ("tiny-random-qwen3", "other")])
    yield address
    running.close()


@pytest.fixture
def opened(browser, url):
    """`opened(width=…, scheme=…)` → a page; errors of scripts and requests to other hosts fail the test."""
    contexts, wrong = [], []

    def call(width=1300, scheme="light", address=url):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.on(
            "request",
            lambda request: (
                wrong.append(request.url) if not request.url.startswith((address, "data:", "blob:")) else None
            ),
        )
        page.goto(address)
        page.wait_for_selector("#grid .heatmaplayer image", timeout=60_000)
        return page

    yield call
    for context in contexts:
        context.close()
    assert wrong == []


def wait_text(page, selector, text):
    page.wait_for_function("([s, t]) => (document.querySelector(s) || {}).innerText?.includes(t)", arg=[selector, text])


def choose(page, name, label):
    search = page.locator(".dash-dropdown-search")
    for _ in range(5):  # a list that is closing takes the first click
        page.click(f"#{name}")
        try:
            search.fill(label, timeout=2000)  # long lists are drawn in part: their own search finds the rest
            break
        except sync_api.TimeoutError:
            continue
    page.get_by_role("option", name=label, exact=True).click()


def show(page, label):
    page.locator("#view").get_by_text(label, exact=True).click()


def test_the_best_head_is_open_at_once_and_its_attention_is_shown(opened, folder):
    page = opened()
    best = str(HeadScores.load(folder / "alpha.safetensors").ranking()[0][0])
    wait_text(page, "#detail-title", best)
    page.wait_for_selector(".token")
    wait_text(page, "#effect", "mean loss")
    assert page.locator(".chip").count() > 4


def test_a_click_opens_a_head(opened):
    page = opened()
    wait_text(page, "#detail-title", "L")
    box = page.locator("#grid .heatmaplayer image").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 2.5 / 3, box["y"] + box["height"] * 1.5 / 4)
    wait_text(page, "#detail-title", "L2H1")


def test_keys_move_open_and_select(opened):
    page = opened()
    page.focus("#grid-box")
    for key in ("Home", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    wait_text(page, "#cursor-line", "L1H1")
    page.keyboard.press("Enter")
    wait_text(page, "#detail-title", "L1H1: head 1 of layer 1")
    page.keyboard.press("Space")
    wait_text(page, "#selection-text", "1: L1H1")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    wait_text(page, "#selection-text", "2: L1H1,L1H2")
    page.keyboard.press("Space")
    wait_text(page, "#selection-text", "1: L1H1")
    for key in ("End", "ArrowRight"):  # the edge holds
        page.keyboard.press(key)
    wait_text(page, "#cursor-line", "L2H2")
    outline = page.evaluate("getComputedStyle(document.querySelector('#grid-box')).outlineStyle")
    assert outline != "none"


def test_a_prompt_of_ones_own_and_its_tokens_by_keys(opened):
    page = opened()
    page.fill("#prompt", TEXT)
    page.click("#run")
    page.wait_for_function("n => document.querySelectorAll('.token').length === n", arg=len(TEXT))
    assert page.locator("#strip b").count() == 0  # text of the user stays text
    assert page.locator(".token").nth(8).inner_text() == "‹"
    last = page.locator('.token[aria-selected="true"]')
    assert last.get_attribute("data-place") == str(len(TEXT) - 1)
    last.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(f'.token[aria-selected="true"][data-place="{len(TEXT) - 2}"]')
    page.wait_for_function("n => document.activeElement.dataset.place === String(n)", arg=len(TEXT) - 2)
    widths = page.evaluate("[...document.querySelectorAll('.token')].map(t => +t.style.getPropertyValue('--w'))")
    assert max(widths) == 1
    assert widths[-1] == 0  # it cannot look ahead


def test_prompts_that_cannot_be_read_are_said(opened):
    page = opened()
    page.wait_for_selector(".token")
    page.fill("#prompt", "")
    page.click("#run")
    wait_text(page, "#run-message", "the prompt is empty")
    page.fill("#prompt", "x" * 500)
    page.click("#run")
    wait_text(page, "#run-message", "500 tokens")
    assert page.locator(".token").count() > 0  # what was there stays


def test_random_heads_plans_and_edits(opened):
    page = opened()
    page.wait_for_selector(".token")
    page.click("#chance")
    wait_text(page, "#chance-line", "8 random heads")
    choose(page, "under-plan", "plan.json")
    wait_text(page, "#under", "tokens kept of this prompt")
    choose(page, "under-edits", "edits.json")
    wait_text(page, "#under", "edits.json")
    choose(page, "under-plan", "wide.json")
    wait_text(page, "#under", "The whole model under them")
    assert page.locator("#under-message").inner_text() == ""


def test_export_writes_a_file_that_reads_back_and_says_what_is_wrong(opened, folder):
    page = opened()
    page.fill("#take-k", "3")
    page.click("#take")
    wait_text(page, "#selection-text", "3: ")
    page.fill("#export-name", "../out")
    page.click("#export")
    wait_text(page, "#export-line", "no file name")
    page.fill("#export-name", "mine.safetensors")
    page.click("#export")
    wait_text(page, "#export-line", "written: mine.safetensors")
    best = HeadScores.load(folder / "alpha.safetensors").top(3)
    assert HeadSet.load(folder / "mine.safetensors") == best
    page.click("#export")
    wait_text(page, "#export-line", "exists already")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(folder / "downloaded.safetensors")
    assert HeadSet.load(folder / "downloaded.safetensors") == best
    assert download.value.suggested_filename == "mine.safetensors"
    page.click("#clear")
    page.click("#download")
    wait_text(page, "#export-line", "nothing is selected")


def test_two_tables_two_plans_two_models(opened, folder):
    page = opened()
    show(page, "Compare")
    choose(page, "compare-b", "beta.safetensors")
    a, b = (HeadScores.load(folder / f"{name}.safetensors") for name in ("alpha", "beta"))
    wait_text(page, "#compare-numbers", f"{a.rank_correlation(b):+.3f}")
    page.wait_for_selector("#compare-scatter .scatterlayer")
    choose(page, "compare-b", "gates.safetensors")
    wait_text(page, "#compare-numbers", "cannot be paired")
    choose(page, "compare-a", "tiny, now: entropy")
    choose(page, "compare-b", "other, now: entropy")
    wait_text(page, "#compare-numbers", "two models")
    page.locator("#compare-list .chip").first.click()
    page.wait_for_selector("#view-heads:not([hidden])")
    show(page, "Compare")
    page.locator("#compare-kind").get_by_text("plans").click()
    wait_text(page, "#compare-numbers", "kv heads with another pattern")
    page.fill("#compare-tokens", "0")
    wait_text(page, "#compare-message", "it must be from 1")


def test_the_budget_stops_at_measured_points_only(opened):
    page = opened()
    show(page, "Budget")
    page.wait_for_selector("#budget-figure .scatterlayer")
    wait_text(page, "#budget-cards", "5.5")  # the last but one: 4 full heads, by lot
    assert "4.25" not in page.inner_text("#budget-cards")
    page.locator("#full [role=slider]").focus()
    page.keyboard.press("ArrowLeft")
    wait_text(page, "#budget-cards", "4.25")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    wait_text(page, "#budget-cards", "100%")


def test_measuring_from_the_page(opened, folder):
    page = opened()
    show(page, "Budget")
    page.fill("#measure-counts", "nine")
    page.click("#measure")
    wait_text(page, "#job-line", "full kv heads is 'nine'")
    page.fill("#measure-counts", "2")
    page.fill("#measure-length", "300")
    page.fill("#measure-keys", "1")
    page.click("#measure")
    wait_text(page, "#job-line", "written: points-1.json")
    assert Points.load(folder / "points-1.json").counts() == [2, 6]
    wait_text(page, "#budget-cards", "1 passkeys of 300 tokens")


def test_files_and_what_is_wrong_with_them(opened):
    page = opened()
    show(page, "Files")
    wait_text(page, "#file-list", "alpha scores of 3 × 4 head units")
    wait_text(page, "#file-list", "broken.json")
    wait_text(page, "#file-list", "not read")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_do_not_scroll_sideways_and_themes_follow(opened, scheme):
    page = opened(width=390, scheme=scheme)
    page.wait_for_selector(".token")
    wait_text(page, "#effect", "mean loss")
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    for view in ("Heads", "Compare", "Budget", "Files"):
        show(page, view)
        time.sleep(0.3)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
    meta = page.evaluate("document.querySelector('#grid .js-plotly-plot').layout.meta")
    assert meta["upright"] is True
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, ground) > 7


def contrast(one, two):
    def light(colour):
        parts = [int(part) / 255 for part in colour.strip("rgb()").split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_picture_model_is_asked_about_pictures(opened, tmp_path):
    running, address = serve([tmp_path], [("tiny-random-vit", "vit")])
    try:
        page = opened(address=address)
        wait_text(page, "#detail-title", "L0H0")
        page.wait_for_selector("#map .heatmaplayer image")
        assert page.locator(".token").count() == 17
        page.locator(".token").nth(0).click()
        page.wait_for_selector('.token[aria-selected="true"][data-place="0"]')
        wait_text(page, "#effect", "KL of the last prediction")
        assert page.locator("#prompt").is_hidden()
        page.fill("#picture", "5")
        page.click("#run")
        wait_text(page, "#effect", "KL of the last prediction")
    finally:
        running.close()


def test_files_without_a_model(opened, folder):
    running, address = serve([folder], [])
    try:
        page = opened(address=address)
        wait_text(page, "#detail-title", "L")
        wait_text(page, "#page", "Start with --model")
        assert page.locator("#run").is_hidden()
    finally:
        running.close()
