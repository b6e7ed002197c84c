"""Triton's own client and configuration reader: `disback serve` answers the one, `disback package --triton` writes for the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "python"))
# (After the environment's own: scripts/setup.)
sys.path.append(str(ROOT / ".venv/tritonclient"))
DISBACK = os.environ.get("DISBACK", str(ROOT / "target/release/disback"))

from test_api import halved  # noqa: E402

import tritonclient.http as http  # noqa: E402


@pytest.fixture
def server(tmp_path):
    student = halved(tmp_path / "digits.onnx", None, ("label", "text"))
    command = [DISBACK, "serve", student, "--port", "0", "--json", "--max-batch", "16"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        yield json.loads(process.stdout.readline())["listening"]
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_triton_s_client_gets_the_samples_of_the_command(server, tmp_path):
    client = http.InferenceServerClient(server)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("digits") and client.is_model_ready("digits", "1")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    found = client.get_model_metadata("digits")
    assert [(i["name"], i["datatype"], i["shape"]) for i in found["inputs"]] == [("noise", "FP32", [-1, 3]), ("label", "FP32", [-1, 4]), ("text", "FP32", [-1, 2])]
    text = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "text.npy", text)
    out = tmp_path / "out.npy"
    subprocess.run([DISBACK, "sample", tmp_path / "digits.onnx", "-n", "3", "--seed", "4", "--condition", f"text={tmp_path}/text.npy", "-o", out, "--quiet"], check=True)
    expected = np.load(out)
    for binary in (True, False):
        given = http.InferInput("text", [3, 2], "FP32")
        given.set_data_from_numpy(text, binary_data=binary)
        answer = client.infer("digits", [given], outputs=[http.InferRequestedOutput("sample", binary_data=binary)], parameters={"seed": 4})
        np.testing.assert_array_equal(answer.as_numpy("sample"), expected)
    with pytest.raises(Exception, match="no input `x`"):
        wrong = http.InferInput("x", [1], "FP32")
        wrong.set_data_from_numpy(np.zeros(1, np.float32))
        client.infer("digits", [wrong])
    client.close()


def test_the_configuration_is_one_for_triton(tmp_path):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    for fixed, most, dims in [(None, 8, [3]), (5, 0, [5, 3])]:
        folder = tmp_path / f"out-{fixed}"
        student = halved(tmp_path / f"s{fixed}.onnx", fixed, ("label", "text"))
        subprocess.run([DISBACK, "package", student, "-o", folder, "--triton", "--name", "digits", "--max-batch", "8", "--quiet"], check=True)
        config = text_format.Parse((folder / "models/digits/config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", most)
        assert [(i.name, model_config_pb2.DataType.Name(i.data_type)) for i in config.input] == [("noise", "TYPE_FP32"), ("label", "TYPE_FP32"), ("text", "TYPE_FP32")]
        assert list(config.input[0].dims) == dims and config.output[0].name == "sample"
        assert config.HasField("dynamic_batching") == (fixed is None)
        assert config.model_warmup[0].inputs["noise"].random_data and len(config.model_warmup) == (2 if fixed is None else 1)
        assert (folder / "models/digits/1/model.onnx").read_bytes() == student.read_bytes()
