"""The chat page in a headless Chromium: a page around it types, presses and tells what it sees."""

from __future__ import annotations

import queue
import shutil
import subprocess

import pytest

pytest.importorskip("fastapi")
from fastapi import Request
from fastapi.responses import HTMLResponse
from http_servers import served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

AROUND = """<!doctype html><iframe id="chat" src="/#key=secret"></iframe><script>
const seen = {};
async function until(what) {
  const end = Date.now() + 30000;
  while (!what()) {
    if (Date.now() > end) throw new Error("never: " + what);
    await new Promise(go => setTimeout(go, 10));
  }
}
async function use(page) {
  const $ = id => page.getElementById(id);
  const turns = kind => [...page.querySelectorAll(".turn." + kind)].map(one => one.textContent);
  const press = text => { $("prompt").value = text; $("send").click(); };
  const isReady = () => $("send").textContent === "Send";
  await until(() => $("model").textContent);
  seen.model = $("model").textContent;
  press("  ");
  seen.blank = turns("user").length;
  press("a<b>");
  await until(() => turns("assistant")[0]);
  seen.button = $("send").textContent;
  $("send").click();  // stops it
  await until(isReady);
  seen.stopped = [turns("user"), turns("assistant").length, turns("error")];
  const enter = new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true });
  $("prompt").value = "again";
  $("prompt").dispatchEvent(enter);
  await until(() => !isReady());
  await until(isReady);
  const answered = turns("assistant").map(text => text.length > 0);
  seen.whole = [turns("user"), answered, $("stats").textContent];
  press("x".repeat(5000));
  await until(() => turns("error")[0]);
  await until(isReady);
  seen.error = turns("error");
  seen.left = turns("assistant").length;
}
document.getElementById("chat").onload = async event => {
  try { await use(event.target.contentDocument); } catch (error) { seen.failure = String(error); }
  fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_chat(tmp_path):
    told: queue.Queue[dict] = queue.Queue()
    with served(api_key="secret", step_s=0.002) as (address, server):
        app = server.config.app

        @app.get("/around", response_class=HTMLResponse)
        async def around() -> str:
            return AROUND

        @app.post("/seen")
        async def note(request: Request) -> None:
            told.put(await request.json())

        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += [f"--user-data-dir={tmp_path}", "--remote-debugging-port=0"]
        browser = subprocess.Popen(
            [*command, f"{address}/around"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            seen = told.get(timeout=60)
        finally:
            browser.terminate()
            browser.wait(30)
    assert "failure" not in seen, seen
    assert (seen["model"], seen["blank"], seen["button"]) == ("tiny", 0, "Stop")
    assert seen["stopped"] == [["a<b>"], 1, []]
    users, answers, stats = seen["whole"]
    assert (users, answers) == (["a<b>", "again"], [True, True])
    assert stats.startswith("first token after ")
    assert len(seen["error"]) == 1
    assert "context" in seen["error"][0]
    assert seen["left"] == 2
