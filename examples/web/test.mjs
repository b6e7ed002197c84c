// node --test test.mjs: the page in headless Chromium and the Node consumer, against images that `disback sample` made.
// Expects in the folder $DISBACK_WEB: student.onnx, samples.npy (`-n 6 --seed 5 --classes 3`), digits.npy (`-n 10 --seed 2
// --classes 0-9`). CHROMIUM says where the browser is.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { copyFileSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";
import { imageNoise } from "./noise.js";
import { serve } from "./server.mjs";

const here = dirname(fileURLToPath(import.meta.url));
const data = process.env.DISBACK_WEB ?? here;
const file = (name) => join(data, name);

/** The f32 values of a .npy file. */
function npy(name) {
  const bytes = readFileSync(file(name));
  const start = 10 + bytes.readUInt16LE(8);
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset + start, bytes.byteOffset + bytes.length));
}

function worst(a, b) {
  assert.equal(a.length, b.length);
  return a.reduce((m, v, k) => Math.max(m, Math.abs(v - b[k])), 0);
}

let browser, server, page, base;

before(async () => {
  server = serve(file("student.onnx")).listen(0, "127.0.0.1");
  await once(server, "listening");
  base = `http://127.0.0.1:${server.address().port}`;
  const args = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"];
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });
  page = await browser.newPage({ viewport: { width: 640, height: 480 } });
  // A busy machine may take its time to compile 14 MB of wasm.
  page.setDefaultTimeout(180_000);
});

after(async () => {
  await browser?.close();
  server?.close();
});

test("the page draws what the command line samples", async () => {
  await page.goto(base);
  await page.waitForFunction(() => window.drawn);
  assert.equal(await page.locator("canvas").count(), 16);
  await page.fill("#seed", "5");
  await page.fill("#count", "6");
  await page.getByRole("button", { name: "3", exact: true }).click();
  await page.waitForFunction(() => window.drawn.seed === 5 && window.drawn.label === 3);
  const drawn = await page.evaluate(() => window.drawn.values);
  assert.ok(worst(drawn, npy("samples.npy")) < 1e-4);
  assert.equal(await page.locator("canvas").count(), 6);
  assert.equal(await page.getByRole("button", { name: "3", exact: true }).getAttribute("aria-pressed"), "true");
  // What is on the canvas is what was computed, rounded.
  const shown = await page.evaluate(() => {
    const canvas = document.querySelector("canvas");
    return Array.from(canvas.getContext("2d").getImageData(0, 0, 8, 8).data).filter((_, k) => k % 4 === 0);
  });
  const want = drawn.slice(0, 64).map((v) => Math.min(255, Math.max(0, Math.trunc(v * 127.5 + 128))));
  assert.deepEqual(shown, want);
  await page.screenshot({ path: file("page.png") });
});

test("a student that is not there is said", async () => {
  await page.goto(`${base}/?student=none.onnx`);
  await page.waitForSelector("#status[data-state=error]");
  assert.match(await page.textContent("#status"), /none\.onnx is not beside this page/);
  assert.ok(await page.locator("#draw").isDisabled());
});

test("the Node consumer makes the same images of the same noise", () => {
  const noise = new Float32Array(10 * 64);
  for (let k = 0; k < 10; k++) noise.set(imageNoise(2, k, 64), 64 * k);
  writeFileSync(file("noise.f32"), new Uint8Array(noise.buffer));
  // Node looks for packages beside the script.
  copyFileSync(join(here, "../consumers/sample.mjs"), join(here, ".sample.mjs"));
  execFileSync(process.execPath, [join(here, ".sample.mjs"), file("student.onnx"), file("noise.f32"), file("node.f32")]);
  const got = new Float32Array(new Uint8Array(readFileSync(file("node.f32"))).buffer);
  assert.ok(worst(got, npy("digits.npy")) < 1e-4);
});
