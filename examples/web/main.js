import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { imageNoise } from "./noise.js";

const SHAPE = [1, 8, 8];
const SIZE = 64;
const CLASSES = 10;

const find = (id) => document.getElementById(id);
let chosen = 0;
let student;

function say(text, state = "ok") {
  find("status").textContent = text;
  find("status").dataset.state = state;
}

/** Images [n, 64] in [-1, 1] of a seed and a class. */
async function sample(seed, label, count) {
  const noise = new Float32Array(count * SIZE);
  for (let k = 0; k < count; k++) noise.set(imageNoise(seed, k, SIZE), k * SIZE);
  const labels = new BigInt64Array(count).fill(BigInt(label));
  const { sample } = await student.run({
    noise: new ort.Tensor("float32", noise, [count, ...SHAPE]),
    labels: new ort.Tensor("int64", labels, [count]),
  });
  return sample.data;
}

function picture(values) {
  const canvas = document.createElement("canvas");
  [, canvas.height, canvas.width] = SHAPE;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  values.forEach((v, k) => {
    const grey = Math.min(255, Math.max(0, Math.trunc(v * 127.5 + 128)));
    pixels.data.set([grey, grey, grey, 255], 4 * k);
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

async function draw() {
  const count = Math.min(64, Math.max(1, Number(find("count").value) || 1));
  const seed = Math.max(0, Math.trunc(Number(find("seed").value) || 0));
  find("draw").disabled = true;
  try {
    const began = performance.now();
    const values = await sample(seed, chosen, count);
    const ms = performance.now() - began;
    const images = Array.from({ length: count }, (_, k) => picture(values.subarray(k * SIZE, (k + 1) * SIZE)));
    find("images").replaceChildren(...images);
    say(`${count} images of class ${chosen} in ${ms.toFixed(1)} ms`);
    window.drawn = { seed, label: chosen, values: Array.from(values) };
  } catch (error) {
    say(`The student failed: ${error.message}`, "error");
  } finally {
    find("draw").disabled = false;
  }
}

for (let label = 0; label < CLASSES; label++) {
  const button = document.createElement("button");
  button.textContent = label;
  button.setAttribute("aria-pressed", label === chosen);
  button.addEventListener("click", () => {
    chosen = label;
    for (const other of find("classes").querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    if (student) draw();
  });
  find("classes").append(button);
}
find("draw").addEventListener("click", draw);

try {
  ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
  ort.env.wasm.numThreads = 1;
  const file = new URLSearchParams(location.search).get("student") ?? "student.onnx";
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file} is not beside this page (${response.status})`);
  student = await ort.InferenceSession.create(await response.arrayBuffer());
  find("draw").disabled = false;
  await draw();
} catch (error) {
  say(`The student could not be loaded: ${error.message}`, "error");
}
