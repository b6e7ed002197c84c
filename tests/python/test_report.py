"""report.html as a person meets it: one file, no network, no console errors, any width, light, dark and print.

With a Chromium on the PATH (or DISBACK_CHROMIUM) it is opened there; without one only what can be read from the file is checked.
DISBACK_UPDATE_SCREENS=1 writes the pictures that the layout is compared with anew.
"""

import io
import json
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from blocks import font
from browser import Browser, find
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SCREENS = Path(__file__).resolve().parent / "screens"
NODES = 10


def sheet(rng, soft):
    """64 colour images of 64x64 pixels, as the sheets of a run are: the worst case of a report's size."""
    low = rng.random((8 * 8, 8 * 8, 3))
    image = np.kron(low, np.ones((8, 8, 1))) * soft + rng.random((512, 512, 3)) * (1 - soft)
    return Image.fromarray((255 * image).astype(np.uint8))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run = tmp_path_factory.mktemp("reports") / "ten nodes"
    (run / "samples").mkdir(parents=True)
    (run / "trajectory").mkdir()
    rng = np.random.default_rng(0)
    for k in range(1, NODES + 1):
        sheet(rng, k / 12).save(run / f"samples/degraded-node-{k:03}.png")
        sheet(rng, 0.5).save(run / f"samples/student-node-{k:03}.png")
    for name in ["teacher", "student-final", "neighbours"]:
        sheet(rng, 0.9).save(run / f"samples/{name}.png")
    (run / "config.toml").write_text('seed = 0\nnote = "</script><img src=https://example.invalid/x onerror=alert(1)>"\n')
    rows = []
    base = dict(loss_generator=None, grad_norm_fake=1.0, grad_norm_generator=None, mismatch=None, lr=1e-5, updates=0,
                images=0, images_per_s=100.0, seconds=1.0, skipped=0)
    for i in range(1, 200):
        rows.append(dict(base, stage="degrade", iteration=i, node=i // 20, loss_fake=1 / i))
    for i in range(1, 2000, 5):
        rows.append(dict(base, stage="backtrack", iteration=i, node=max(0, 9 - i // 180), loss_fake=0.5 + 0.1 * rng.random(),
                         loss_generator=rng.random(), grad_norm_generator=2.0, mismatch=float(np.exp(-i / 400)), updates=i))
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    nodes = [dict(index=k, iteration=20 * k, loss=1.5 - 0.1 * k, hash=f"{k:064x}") for k in range(NODES + 1)]
    (run / "trajectory/trajectory.json").write_text(json.dumps(dict(teacher_hash="f" * 64, nodes=nodes)))
    points = [dict(update=100 * k, images=12800 * k, passes=50000 * k, seconds=60.0 * k, node=0, frechet=9 / k, kernel=0.1,
                   kernel_standard_error=0.01, precision=0.5, recall=0.4, sliced=None, samples=1000, best=True)
              for k in range(1, 12)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    levels = [dict(stage="backtrack", iteration=i, node=1, sigmas=list(np.geomspace(0.01, 80, 12)),
                   target=list(np.linspace(1, 2, 12) / i), fake=list(np.linspace(1, 1.5, 12) / i)) for i in [1, 2]]
    (run / "levels.jsonl").write_text("".join(json.dumps(r) + "\n" for r in levels))
    row = dict(name="student.onnx", kind="student", frechet=3.2, frechet_deviation=0.1, kernel=0.002, precision=0.7, recall=0.6,
               images=[5000, 1797], nfe=1, ms_per_image=0.2)
    (run / "evaluation.json").write_text(json.dumps(dict(
        best="student.onnx", setting="s", command="disback evaluate ...", reference="digits.npz",
        entries=[dict(file=f"snapshots/update-{100 * k:08}-{kind}.onnx", hash=f"{kind}{k}", setting="s",
                      row=dict(row, frechet=9 / k + extra)) for kind, extra in [("average", 0.3), ("student", 0.5)]
                 for k in range(1, 4)] + [dict(file="student.onnx", hash="h", setting="s", row=row)],
        others=[dict(row, name="/models/teacher.onnx, heun 18", kind="teacher", nfe=35, frechet=1.6)],
        neighbours=[dict(image=0, nearest=[[5, 1.25], [6, 1.5]])])))
    (run / "summary.json").write_text(json.dumps(dict(
        teacher=dict(frechet=1.6, nfe=35, ms_per_image=5.8), student=dict(frechet=3.2, nfe=1, ms_per_image=0.2),
        run=dict(command="disback distill teacher.onnx -o run", teacher="/models/teacher.onnx", method="disback", objective="sid",
                 nodes=NODES, generator_updates=2000, device="cpu", teacher_hash="e" * 64, seconds_degrade=60, seconds_backtrack=600,
                 peak_host_bytes=1 << 30, parameters=654753))))
    (run / "student.onnx").write_bytes(b"not looked into")
    disback = ROOT / "target/release/disback"
    timing = dict(engine="onnxruntime 1.32.0 (CPU)", batch=64, p50_ms=12.8, images_per_s=5000, peak_mib=400)
    beside = dict(engine="onnxruntime 1.32.0 (CPU)", batch=64, steps=18, nfe=35, ms_per_image=5.8, peak_mib=410)
    (run / "bench.json").write_text(json.dumps(dict(timings=[timing], teacher=[beside])))
    subprocess.run([disback, "report", run], check=True, stdout=subprocess.DEVNULL)
    # The one path of this machine that is in the page: it must not move a line.
    page = run / "report.html"
    page.write_text(page.read_text().replace(str(run.resolve()), "/runs/ten nodes"))
    return page


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.inputs = [], []

    def handle_starttag(self, tag, attrs):
        self.inputs += [dict(attrs)] if tag == "input" else []
        self.found += [(tag, k, v) for k, v in attrs if k in ("src", "href", "data", "action", "poster") or k.startswith("on")]


def test_the_file_alone_is_enough(report):
    text = report.read_text()
    assert len(text) < 5_000_000, f"{len(text)} bytes for a run of {NODES} nodes"
    links = Links()
    links.feed(text)
    assert links.found and all(tag == "img" and k == "src" and v.startswith("data:image/") for tag, k, v in links.found)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket", text)
    assert "default-src 'none'" in text and len(links.inputs) == 2
    for part in ["Distance while training", "Mismatch per node", "Losses by noise level", "Cost", "Nearest neighbours", "Hashes",
                 "To repeat it", "student.onnx (best)", "3.200 ± 0.100", "1.00 GiB", "The run", "a trajectory of 10 nodes",
                 "teacher 5.800: 29 times as long", "all 8 sets that were measured", "teacher, 18 steps", "peak memory, MiB",
                 "Fréchet distance of the students kept on the way", "e" * 64]:
        assert part in text, part


def compare(name, png):
    """The whole page, an eighth as large. Its text is blocks of one size (blocks.font), so that no machine's fonts matter."""
    page = Image.open(io.BytesIO(png)).convert("L")
    small = page.resize((page.width // 8, page.height // 8), Image.Resampling.BOX)
    path = SCREENS / f"{name}.png"
    if os.environ.get("DISBACK_UPDATE_SCREENS"):
        SCREENS.mkdir(exist_ok=True)
        small.save(path, optimize=True)
    wanted = Image.open(path)
    # A page that is longer or shorter by a line has another layout.
    assert small.width == wanted.width and abs(small.height - wanted.height) <= 1, (name, small.size, wanted.size)
    height = min(small.height, wanted.height)
    apart = np.abs(np.asarray(small, dtype=float)[:height] - np.asarray(wanted, dtype=float)[:height])
    moved = (apart > 24).mean()
    assert apart.mean() < 0.5 and moved < 0.002, f"{name}: {apart.mean():.2f} grey levels from {path}, {100 * moved:.1f} % of it moved"


@pytest.mark.skipif(not find(), reason="no Chromium: the report is checked without a browser")
def test_a_browser_shows_it(report):
    browser = Browser(find())
    try:
        url = report.as_uri()
        shots = {}
        for name, width, height, scheme in [("wide", 1200, 1800, "light"), ("dark", 1200, 1800, "dark"), ("phone", 390, 844, "light")]:
            browser.view(width, height, scheme)
            browser.open(url)
            shots[name] = browser.picture()
            # Nothing sticks out sideways but what scrolls by itself.
            assert browser.run("document.documentElement.scrollWidth") <= width, name
            assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            browser.write_all_in(font())
            # Form controls are each browser's own.
            browser.run("document.querySelectorAll('input').forEach(i => { i.style.visibility = 'hidden'; })")
            compare(name, browser.picture(whole=True))
        tone = {n: np.asarray(Image.open(io.BytesIO(p)).convert("L")).mean() for n, p in shots.items()}
        assert tone["wide"] > 150 > 110 > tone["dark"], tone
        # The sliders.
        at = "getComputedStyle(document.getElementById('wipe')).getPropertyValue('--at').trim()"
        assert browser.run(at) == "50%"
        slide = "(s => { s.value = %d; s.dispatchEvent(new Event('input')); })(document.querySelector('input[%s]'))"
        browser.run(slide % (80, "data-wipe"))
        assert browser.run(at) == "80%"
        on = "[...document.querySelectorAll('.frame')].map(f => f.classList.contains('on')).indexOf(true)"
        assert browser.run("document.querySelectorAll('.frame').length") == NODES + 1 and browser.run(on) == 0
        browser.run(slide % (7, "data-strip"))
        assert browser.run(on) == 7
        # In print there is nothing to slide.
        browser.view(800, 1100, "light", "print")
        compare("print", browser.picture(whole=True))
        assert browser.run("[...document.querySelectorAll('.control')].every(c => getComputedStyle(c).display === 'none')")
        assert browser.run("getComputedStyle(document.querySelector('.strip')).display") == "grid"
        assert browser.run("document.documentElement.scrollWidth") <= 800
        assert browser.console == []
        outside = [r for r in browser.requests if r != url[:200] and not r.startswith("data:")]
        assert outside == [], outside
        folder = os.environ.get("DISBACK_SCREENS_TO")
        for name, png in shots.items():
            if folder:
                (Path(folder) / f"{name}.png").write_bytes(png)
    finally:
        browser.close()
