"""The server that a team writes by itself around a student: FastAPI, uvicorn, onnxruntime. python peer.py STUDENT.onnx PORT

GET /sample?seed=1&n=2 gives the samples as .npy, as `disback serve` does with format=npy; the noise is NumPy's.
"""

import io
import sys

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI, Response

session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
output = session.get_outputs()[0].name
app = FastAPI()


@app.get("/sample")
def sample(seed: int = 0, n: int = 1):
    draw = np.random.default_rng(seed)
    feed = {}
    for i in session.get_inputs():
        shape = [n, *i.shape[1:]]
        is_class = "int" in i.type
        feed[i.name] = draw.integers(0, 10, shape).astype("i8" if "64" in i.type else "i4") if is_class else draw.standard_normal(shape, "f4")
    (images,) = session.run([output], feed)
    out = io.BytesIO()
    np.save(out, images)
    return Response(out.getvalue(), media_type="application/x-npy")


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
