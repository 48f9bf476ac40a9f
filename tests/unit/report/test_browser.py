"""The report page in a real browser: nothing is wider than a phone, no error, no markup from responses."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_s2d.report.report import write_report
from megatron_s2d.report.results import RolloutExample

sys.path.insert(0, str(Path(__file__).parent))
from test_report import HOSTILE, fake_results

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = HOSTILE + "</script><!--<script>\u2028'\"`${1}\\u003c" + "wide" * 200
# A page around the report, which opens each of its tabs and measures. A headless window is at least 500 pixels wide: a
# frame is as wide as a phone. The report keeps its policy, which would stop scripts inside of it.
PROBE = """<!doctype html><body>
<iframe src="report.html" width="WIDTH" height="900" style="border:0"></iframe>
<script>
addEventListener("load", () => setTimeout(() => {
  const page = document.querySelector("iframe").contentWindow, doc = page.document, wide = [];
  const top = page.scrollY;
  for (const button of doc.querySelectorAll("#tabs button")) {
    button.click();
    if (doc.documentElement.scrollWidth > page.innerWidth) wide.push(button.textContent);
  }
  const search = doc.querySelector("input[type=search]");
  search.value = "12 + 5";
  search.dispatchEvent(new page.Event("input"));
  const found = doc.querySelectorAll(".sample").length;
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify({width: page.innerWidth, top, wide, found,
    tabs: doc.querySelectorAll("#tabs button").length, charts: doc.querySelectorAll(".card svg[role]").length,
    alien: doc.querySelectorAll("main img[onerror], a, script").length});
  document.body.append(out);
}, 1000));
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(tmp_path, width):
    results = fake_results(tmp_path)
    evil = RolloutExample(EVIL, EVIL, EVIL, EVIL, EVIL, 0.0, EVIL, EVIL, tokens=[{"text": EVIL, "advantage": 1.0}])
    write_report(tmp_path, replace(results, rollouts=(*results.rollouts, evil)))
    (tmp_path / "outer.html").write_text(PROBE.replace("WIDTH", str(width)))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
        "--virtual-time-budget=8000", "--window-size=1400,1000", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "outer.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen.pop("charts") >= 10
    # alien: the two scripts of the page
    assert seen == {"width": width, "top": 0, "wide": [], "found": 1, "tabs": 7, "alien": 2}
    assert "CONSOLE" not in done.stderr, done.stderr  # no error, and nothing that the policy stopped
