"""The page in a real browser: it fails in nothing, asks for nothing, and can be read and worked, wide and narrow."""

import json
import re
import shutil
import subprocess

import pytest

from litgpt_memsinks.report.report import report
from tests.made_results import HOSTILE, make_results

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH (apt-get install chromium)")

# What a reader would do and see, told to the page around: overflow, contrast as it is drawn, sorting, arrow keys.
PROBE = """
function shown(colour) { return colour.match(/[\\d.]+/g).map(Number); }
function luminance([r, g, b]) {
  const linear = [r, g, b].map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}
function ground(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = shown(getComputedStyle(at).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
}
function worst() {
  let least = 99, where = "", number = 0;
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("title, desc, script")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [element.closest("svg") ? style.fill : style.color, null].map(c => c && luminance(shown(c)));
    const c = luminance(ground(element));
    const ratio = (Math.max(a, c) + 0.05) / (Math.min(a, c) + 0.05);
    number += 1;
    if (ratio < least) [least, where] = [ratio, element.outerHTML.slice(0, 120)];
  }
  return { least, where, number };
}
const table = document.querySelector(".sortable");
const column = () => [...table.tBodies[0].rows].map(row => row.cells[1].dataset.value).map(Number);
const sort = table.querySelectorAll(".sort")[1];
sort.click(); const down = column(); sort.click(); const up = column();
const plot = document.querySelector("#documents").parentElement.querySelector(".plot");
const tip = document.getElementById("tip"), told = [];
for (let i = 0; i < 40; i++) {
  plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", cancelable: true }));
  told.push(tip.textContent);
}
const focusable = plot.tabIndex;
plot.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
const button = document.querySelector(".why"); button.click();
const defined = document.querySelector(":popover-open")?.textContent;
document.querySelector(":popover-open")?.hidePopover();
for (const details of document.querySelectorAll("details")) details.open = true;
parent.postMessage({
  width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth, title: document.title,
  images: document.images.length, figures: document.querySelectorAll("figure svg.chart").length, contrast: worst(),
  page: luminance(ground(document.body)),
  native: document.querySelectorAll(".point title").length, hidden: tip.hidden,
  sort: table.querySelectorAll("th")[1].ariaSort, down, up, told, focusable, defined,
}, "*");
"""
FRAMES = """<!doctype html><title>frames</title><body><script>
onmessage = event => {
  const line = document.createElement("pre");
  line.textContent = JSON.stringify(event.data);
  document.body.append(line);
};
for (const width of [390, 1400]) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.src = "probed.html";
  document.body.append(frame);
}
</script></body>
"""


def browse(page, folder, *options):
    """Open a page and return what the browser printed: the document at the end, and its log."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report whose arms, documents and versions would like to be markup."""
    folder = tmp_path_factory.mktemp("browser")
    path = make_results(folder, seeds=(1, 2))
    for file in (path, path.with_suffix(".documents.jsonl")):
        file.write_text(file.read_text().replace('"id_noise"', json.dumps(HOSTILE)))
    report(path, folder / "report.html")
    return folder / "report.html"


def asked(log):
    """What a page asked the network for, without what the browser does on its own account."""
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    return [one["url"] for one in events if one.get("initiator", "not an origin") != "not an origin"]


def test_page_opens_without_errors_and_asks_for_nothing(page, tmp_path):
    log = tmp_path / "net.json"
    document, console = browse(page, tmp_path, f"--log-net-log={log}")
    assert "<title>Pass: memsinks repeated" in document
    assert console == []
    assert asked(log) == []


def test_markup_that_got_into_the_page_would_neither_run_nor_load(page, tmp_path):
    """And the test above would see it."""
    markup = (
        "<script>document.title = 'owned'; console.error('owned')</script><img src='https://example.invalid/a.png'>"
    )
    html, log = page.read_text().replace("<body>", f"<body>{markup}", 1), tmp_path / "net.json"
    foreign = tmp_path / "foreign.html"
    foreign.write_text(html)
    document, console = browse(foreign, tmp_path, f"--log-net-log={log}")
    assert "<title>Pass: memsinks repeated" in document
    assert any("Content Security Policy" in line for line in console)
    assert asked(log) == []
    foreign.write_text(html.replace("Content-Security-Policy", "x"))
    document, console = browse(foreign, tmp_path, f"--log-net-log={log}")
    assert "<title>owned" in document
    assert any("owned" in line for line in console)
    assert asked(log) == ["https://example.invalid/a.png"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_can_be_read_and_worked_on_a_phone_and_a_screen(page, dark, tmp_path):
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    (tmp_path / "probed.html").write_text(html.replace("</body>", f"<script>{{{PROBE}}}</script></body>"))
    (tmp_path / "frames.html").write_text(FRAMES)
    scheme = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
    document, console = browse(tmp_path / "frames.html", tmp_path, scheme, "--window-size=1500,2000")
    assert console == []
    found = [json.loads(unescape(line)) for line in re.findall(r"<pre>(.*?)</pre>", document)]
    assert sorted(one["width"] for one in found) == [390, 1400]
    for one in found:
        assert (one["page"] < 0.05) if dark else (one["page"] > 0.8)
        assert one["overflow"] <= 0
        assert one["contrast"]["least"] >= 4.5, one["contrast"]
        assert one["contrast"]["number"] > 500
        assert one["title"].startswith("Pass: ")
        assert one["images"] == one["native"] == 0
        assert one["figures"] == 18
        assert (one["down"], one["up"]) == (sorted(one["down"], reverse=True), sorted(one["up"]))
        assert one["sort"] == "ascending"
        assert one["focusable"] == 0
        assert len(set(one["told"])) > 30
        assert all(re.match(r"own [\d.]+, dropped [\d.]+: ", text) for text in one["told"])
        assert any("</script><img src=x" in text for text in one["told"])
        assert one["hidden"]
        assert "How far the loss on the repeated documents comes" in one["defined"]


def unescape(text):
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
