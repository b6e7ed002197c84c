"""python sample.py student.onnx noise.f32 samples.f32: raw f32 noise in, raw f32 images out (onnxruntime)."""
import sys
import numpy as np
import onnxruntime as ort

model, noise, out = sys.argv[1:]
student = ort.InferenceSession(model)
shape = [d if isinstance(d, int) else -1 for d in student.get_inputs()[0].shape]
z = np.fromfile(noise, "f4").reshape(shape)
labels = np.arange(len(z)) % 10
student.run(["sample"], {"noise": z, "labels": labels})[0].tofile(out)
