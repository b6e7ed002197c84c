// node sample.mjs student.onnx noise.f32 samples.f32: raw f32 noise in, raw f32 images out (onnxruntime-web's wasm).
import { readFileSync, writeFileSync } from "node:fs";
import * as ort from "onnxruntime-web";

const [model, noise, out] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
const student = await ort.InferenceSession.create(readFileSync(model));
const z = new Float32Array(new Uint8Array(readFileSync(noise)).buffer);
const n = z.length / 64;
const labels = BigInt64Array.from({ length: n }, (_, k) => BigInt(k % 10));
const { sample } = await student.run({ noise: new ort.Tensor("float32", z, [n, 1, 8, 8]), labels: new ort.Tensor("int64", labels, [n]) });
writeFileSync(out, Buffer.from(sample.data.buffer));
