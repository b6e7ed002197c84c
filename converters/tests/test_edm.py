"""EDM's form: a pickle and a class from a checkout, preconditioning inside and outside, and the whole way to a student."""

import copy
import pickle
import sys

import numpy as np
import onnxruntime as ort
import pytest
import torch
from proof import TEACHERS, card, prove, same_network, same_student, same_weights
from safetensors.torch import load_file

from disback_convert.cli import main
from disback_convert.torch_route.edm import augment_dim

CODE = TEACHERS / "edm_unet"
AUGMENT = "model.map_augment.weight"  # its labels are zero, and so it is in no graph


@pytest.fixture
def trained():
    sys.path.insert(0, str(CODE))
    import networks

    net = networks.EDMPrecond()
    net.load_state_dict(load_file(CODE / "weights.safetensors"))
    yield net.eval()
    sys.path.remove(str(CODE))


def convert(source, out, *more):
    return main(["edm", str(source), "--code", str(CODE), "-o", str(out), "-q", *map(str, more)])


def test_a_pickle_goes_all_the_way(tmp_path, trained, capsys):
    with open(tmp_path / "network-snapshot.pkl", "wb") as handle:
        pickle.dump({"ema": trained, "training_set_kwargs": {}}, handle)
    assert convert(tmp_path / "network-snapshot.pkl", tmp_path / "teacher.onnx", "--card", "dataset=digits") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "132 969 parameters, opset 23" in said and "next: disback parity" in said
    same_network(tmp_path / "teacher.onnx", CODE / "teacher.onnx")
    with capsys.disabled():
        prove("PyTorch, EDM classes", tmp_path / "teacher.onnx", tmp_path)
    same_weights(tmp_path / "teacher.onnx", tmp_path / "run", trained.state_dict())
    # buffers are in no student: the network has its own
    student = copy.deepcopy(trained)
    lacking = student.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"), strict=False)
    assert not lacking.unexpected_keys and set(lacking.missing_keys) <= {name for name, _ in trained.named_buffers()} | {AUGMENT}

    def forward(given):
        with torch.no_grad():
            x, sigma, labels = (torch.from_numpy(given[name]) for name in ("x", "sigma", "class_labels"))
            return student(x, sigma, labels, augment_labels=torch.zeros(len(x), 3)).numpy()

    same_student(tmp_path / "teacher.onnx", tmp_path / "run", forward)


def test_preconditioning_outside_is_the_same_denoiser(tmp_path, trained):
    assert convert("networks:EDMPrecond", tmp_path / "raw.onnx", "--raw", "--state-dict", CODE / "weights.safetensors", "--arguments", '{"img_resolution": 8}') == 0
    about = card(tmp_path / "raw.onnx")
    assert (about["prediction"], about["time_unit"], about["conditions.class_labels.null"]) == ("edm-raw", "ln-sigma-4", "zeros")
    net = ort.InferenceSession(str(tmp_path / "raw.onnx"), providers=["CPUExecutionProvider"])
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.02, 0.5, 3.0, 70.0]), torch.eye(10)[:4]
    s = sigma[:, None, None, None]
    scale = (s**2 + 0.25).sqrt()
    (raw,) = net.run(None, {"x": (x / scale).numpy(), "c_noise": (sigma.log() / 4).numpy(), "class_labels": labels.numpy()})
    with torch.no_grad():
        native = trained(x, sigma, labels, augment_labels=torch.zeros(4, 3))
    np.testing.assert_allclose(0.25 / scale**2 * x + s * 0.5 / scale * raw, native, atol=1e-5)


def test_augment_labels_are_found(trained):
    assert augment_dim(trained) == 3


def test_bad_pickles_are_refused(tmp_path, trained, capsys):
    with open(tmp_path / "stats.pkl", "wb") as handle:
        pickle.dump({"mu": 1}, handle)
    with open(tmp_path / "layer.pkl", "wb") as handle:
        pickle.dump(torch.nn.Linear(2, 2), handle)
    (tmp_path / "text.pkl").write_text("hello")
    for source, words in [
        ("stats.pkl", "no network under ema"),
        ("layer.pkl", "img_resolution"),
        ("text.pkl", "not a network pickle"),
        ("absent.pkl", "no such file"),
    ]:
        assert convert(tmp_path / source, tmp_path / "teacher.onnx") == 1
        assert words in capsys.readouterr().err
    for arguments, words in [("{", "not JSON"), ("[]", "JSON object"), ('{"depth": 3}', "depth")]:
        assert convert("networks:EDMPrecond", tmp_path / "teacher.onnx", "--arguments", arguments) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "teacher.onnx").exists()
