"""A headless Chromium driven over its own pipe: no driver, no port, nothing to install beside the browser."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

NAMES = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome"]


def find():
    """The browser's path, from DISBACK_CHROMIUM or the PATH; None where there is none."""
    return os.environ.get("DISBACK_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. Collects what the console says and what is requested."""

    def __init__(self, path):
        to_browser, self.write = os.pipe()
        self.read, from_browser = os.pipe()
        # Its processes may write a last file while the folder goes.
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

        # The protocol's ends are descriptors 3 (commands) and 4 (answers) of the browser; moved there by way of high ones.
        def place():
            a, b = os.dup2(to_browser, 30), os.dup2(from_browser, 31)
            os.dup2(a, 3, inheritable=True)
            os.dup2(b, 4, inheritable=True)

        command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                   "--no-first-run", "--hide-scrollbars", "--font-render-hinting=none", f"--user-data-dir={self.folder.name}", "about:blank"]
        self.process = subprocess.Popen(command, preexec_fn=place, close_fds=False, start_new_session=True,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.buffer, self.number, self.session = b"", 0, None
        self.console, self.requests, self.events = [], [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ["Page", "Runtime", "Log", "Network"]:
            self.send(f"{domain}.enable")

    def message(self, until):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.read, 1 << 20)
            if not part:
                raise RuntimeError(f"the browser ended with {self.process.wait()}")
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\0", 1)
        found = json.loads(line)
        method, about = found.get("method"), found.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.console.append(about["type"] + ": " + " ".join(str(a.get("value")) for a in about["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(about["exceptionDetails"])[:400])
        elif method == "Log.entryAdded":
            self.console.append(about["entry"]["level"] + ": " + about["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"][:200])
        elif method:
            self.events.append(method)
        return found

    def send(self, method, **params):
        self.number += 1
        call = {"id": self.number, "method": method, "params": params}
        if self.session:
            call["sessionId"] = self.session
        os.write(self.write, json.dumps(call).encode() + b"\0")
        until = time.monotonic() + 300
        while True:
            found = self.message(until)
            if found.get("id") == self.number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found.get("result", {})

    def open(self, url):
        self.events.clear()
        self.send("Page.navigate", url=url)
        until = time.monotonic() + 300
        while "Page.loadEventFired" not in self.events:
            self.message(until)

    def view(self, width, height, scheme="light", medium=""):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setEmulatedMedia", media=medium, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def run(self, script):
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def write_all_in(self, font):
        """Shows all text of the page in this font, given as bytes: no policy of the page is asked, nothing is fetched.

        One weight and true widths: how wide a made-up bold is, and whether widths are rounded, is each browser's own.
        """
        self.run("""(async () => {
          const bytes = Uint8Array.from(atob("%s"), c => c.charCodeAt(0));
          document.fonts.add(await new FontFace("Given", bytes).load());
          const style = document.createElement("style");
          style.textContent = "* { font-family: Given !important; font-synthesis: none !important; "
            + "text-rendering: geometricPrecision !important; }";
          document.head.append(style);
          await document.fonts.ready;
        })()""" % base64.b64encode(font).decode())

    def picture(self, whole=False):
        """PNG bytes of what is seen, or of the whole page, once two in a row are the same.

        A loaded image may still be decoding, and a new font not be laid out everywhere.
        """
        self.run("Promise.all([...document.images].map(i => i.decode()))"
                 ".then(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))).then(() => 0)")
        last = None
        for _ in range(10):
            now = self._picture(whole)
            if now == last:
                return now
            last = now
        raise TimeoutError("the page does not come to rest")

    def _picture(self, whole):
        more = {}
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            more = {"captureBeyondViewport": True, "clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", **more)["data"])

    def close(self):
        os.close(self.write)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.read)
        self.folder.cleanup()
