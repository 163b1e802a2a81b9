"""The report, as a page: alone on disk, in a real browser, in every light."""

import json
import re
import shutil

import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.audit.report.charts import PAGE_COLOURS, svg


@pytest.fixture(scope="module")
def audit(data, _trained):
    return ek.audit(
        _trained,
        data,
        devices=["pcm", "gaussian:0.1", "gaussian:0.2"],
        ages=["0", "1d", "1y"],
        remedies=["none", "drift", "calibrate", "drift+calibrate"],
        chips=3,
        floor=98,
        store=":memory:",
        workers=0,
        command="evenkeel audit --floor 98",
    )


@pytest.fixture(scope="module")
def page(audit, tmp_path_factory):
    return audit.report(tmp_path_factory.mktemp("report") / "report.html")


def text_of(html: str) -> str:
    html = re.sub(r"<style.*?</style>|<svg.*?</svg>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_the_page_needs_nothing_else(page):
    html = page.read_text()
    assert "<script" not in html  # it reads the same with scripts off
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', html)
    assert all(link.startswith(("data:", "#")) for link in links), links
    others = set(re.findall(r"https?://[^\s\"'<]+", html)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not others


def test_the_answers_come_in_their_order(page, audit):
    text = text_of(page.read_text())
    order = [
        audit.verdict[0], "What to do next", "Every device at a glance", "against age and level",
        "Every chip", "How far each layer's activations have moved", "What stayed digital",
        "What was run", "evenkeel audit --floor 98",
    ]  # fmt: skip
    places = [
        text.index(part.replace("'", "&#39;") if part not in text else part) for part in order
    ]
    assert places == sorted(places)


def test_page_and_json_tell_the_same(page, audit):
    text, facts = text_of(page.read_text()), audit.to_dict()
    for cell in facts["cells"]:
        assert f"{cell['worst']:.1f} (#{cell['worst_chip']})" in text
        assert f"{cell['mean']:.1f} ±" in text
    assert facts["provenance"]["model_fingerprint"] in text
    json.dumps(facts, allow_nan=False)


def test_charts_take_their_colours_from_the_page(audit):
    chart = svg(audit.plot())
    assert "var(--ink)" in chart
    assert "var(--series-1)" in chart
    assert not set(re.findall(r"#[0-9a-f]{6}", chart)) & set(PAGE_COLOURS.values())


def test_what_stayed_digital_is_told(data, tmp_path):
    class Multiplied(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = nn.Bilinear(64, 64, 20)
            self.classifier = nn.Linear(20, 10)

        def forward(self, x):
            return self.classifier(self.two(x.flatten(1), x.flatten(1)))

    result = ek.audit(
        Multiplied(), data, devices=["gain:0.9"], chips=2, store=":memory:", workers=0,
        remedies=["none"],
    )  # fmt: skip
    text = text_of(result.report(tmp_path / "r.html").read_text())
    assert "Bilinear is not a kind of layer that can be programmed" in text


def test_nothing_a_user_names_becomes_markup(data, tmp_path):
    class Sly(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"<img src=x onerror=alert(1)>": nn.Linear(64, 10)})

        def forward(self, x):
            return next(iter(self.layers.values()))(x.flatten(1))

    Sly.__name__ = "<b>Sly</b>"
    result = ek.audit(
        Sly(), data, devices=["gaussian:0.1"], chips=2, store=":memory:", workers=0,
        remedies=["none", "clip"],
    )  # fmt: skip
    html = result.report(tmp_path / "r.html").read_text()
    assert "<b>Sly" not in html
    assert "<img src=x" not in html


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


# Elements that stick out to the side, but for those that scroll on their own.
STICKING_OUT = """
return [...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".scroll, pre, svg"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))
"""
# Text of charts that lies outside of its chart, give or take what a margin forgives.
CUT_LABELS = """
return [...document.querySelectorAll("svg")].flatMap(s => {
  const b = s.getBoundingClientRect()
  return [...s.querySelectorAll("text")]
    .map(t => [t.getBoundingClientRect(), t.textContent])
    .filter(([r]) => r.width && (r.left < b.left - 8 || r.right > b.right + 8))
    .map(([r, text]) => text)
})
"""
LABEL_COLOURS = """
return [...new Set([...document.querySelectorAll("svg text")].map(t => getComputedStyle(t).fill))]
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(page, browser, width, scheme):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []  # no console error, nothing that failed to load
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    sheet = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert sheet == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(18, 22, 28)")
    assert browser.execute_script(STICKING_OUT) == []
    assert browser.execute_script(CUT_LABELS) == []
    colours = browser.execute_script(LABEL_COLOURS)
    assert colours == ["rgb(28, 36, 48)" if scheme == "light" else "rgb(230, 234, 240)"]


def test_pictures_show_what_the_worst_chip_gets_wrong(page, audit, data):
    html = page.read_text()
    figures = re.findall(r"<figure><img[^>]+><figcaption>(\d)<ul>(.*?)</ul>", html)
    assert figures
    worst = min(audit.verdicts[0].recommended, key=lambda cell: cell.mean)
    chip = audit.mended_chip(0, worst.age_s, 0, worst.worst_chip)
    with torch.no_grad():
        said = chip(data.test[0][0]).argmax(1)
    wrong = [int(t) for t, s in zip(data.test[0][1], said, strict=True) if t != s]
    assert [int(truth) for truth, _ in figures] == wrong[: len(figures)]
