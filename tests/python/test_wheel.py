"""The wheel of the built program, installed by pip into an empty environment: it starts beside torch with CUDA, beside one for the
CPU, and says what is missing without one."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISBACK = os.environ.get("DISBACK", str(ROOT / "target/release/disback"))
SITE = Path(sysconfig.get_paths()["purelib"])
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("DISBACK", "ORT_", "LD_", "PYTHONPATH", "LIBTORCH", "VIRTUAL_ENV"))}


def out(*args, code=0, **env):
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, env=CLEAN | env)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    return Path(out(sys.executable, ROOT / "scripts/wheel", "--binary", DISBACK, "--out", folder, "--level", "1").strip())


@pytest.fixture(scope="module")
def place(wheel):
    """site-packages of an environment with the wheel, and nothing else."""
    venv = wheel.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "--no-deps", "--no-index", "--quiet", wheel]
    out(*pip, PIP_DISABLE_PIP_VERSION_CHECK="1")
    return next(venv.glob("lib/python*/site-packages"))


def beside(folder, without=()):
    """A folder with the torch of these tests as pip would lay it out, but for some of its libraries. (The files themselves: a link
    leads the program to where all of them lie.)"""
    lib = folder / "torch" / "lib"
    lib.mkdir(parents=True)
    for file in (SITE / "torch/lib").iterdir():
        if not file.name.startswith(tuple(without) or ("-",)):
            if not file.is_file():
                continue
            try:
                (lib / file.name).hardlink_to(file)
            except OSError:
                shutil.copyfile(file, lib / file.name)
    (folder / "torch/version.py").symlink_to(SITE / "torch/version.py")
    (folder / "torch/__init__.py").touch()
    for name in ("nvidia", "onnxruntime", "numpy", "numpy.libs", "onnx", "ml_dtypes", "google"):
        if (SITE / name).is_dir():
            (folder / name).symlink_to(SITE / name)
    return folder


def checks(text):
    return {c["name"]: c for c in json.loads(text.strip().splitlines()[-1])["checks"]}


def test_the_tag_is_what_the_program_asks_for(wheel, place):
    major, minor = map(int, re.search(r"-py3-none-manylinux_(\d+)_(\d+)_x86_64\.whl$", wheel.name).groups())
    for name in ("disback", "disback-train"):
        program = (place / "disback/_bin" / name).read_bytes()
        asked = {tuple(map(int, m)) for m in re.findall(rb"GLIBC_(\d+)\.(\d+)\0", program)}
        assert asked and max(asked) <= (major, minor), (name, wheel.name, sorted(asked)[-3:])


def test_an_environment_without_torch_says_what_to_install(place):
    scripts = place.parents[2] / "bin"
    text = out(scripts / "disback", "inspect", "teacher.onnx", code=1)
    assert text.startswith("error: ") and re.search(r"help: pip install torch==2\.11\.0$", text.strip()), text
    text = out(scripts / "disback", "doctor", code=1)
    assert "missing  libtorch" in text and "BROKEN   libtorch" in text and "tract" in text, text
    # What needs no torch runs without it.
    assert re.fullmatch(r"disback \d+\.\d+\.\d+\n", out(scripts / "disback", "--version"))
    run = place.parents[3] / "run"
    run.mkdir()
    assert "No such file" in out(scripts / "disback", "sample", "no.onnx", "-o", run / "x.npz", code=1)
    fake = place.parents[3] / "old"
    (fake / "torch/lib").mkdir(parents=True)
    (fake / "torch/lib/libtorch_cpu.so").touch()
    (fake / "torch/__init__.py").touch()
    (fake / "torch/version.py").write_text("__version__ = '2.9.1+cpu'\n")
    text = out(scripts / "disback", "doctor", code=1, PYTHONPATH=str(fake))
    assert "built for torch 2.11.0, this Python has 2.9.1+cpu" in text, text


def test_it_runs_where_torch_lies_elsewhere(place, tmp_path):
    """(A user's site-packages beside a virtual environment: the launcher leads the loader there.)"""
    scripts = place.parents[2] / "bin"
    (place / "elsewhere.pth").write_text(f"{SITE}\n")
    try:
        assert re.fullmatch(r"disback \d+\.\d+\.\d+\n", out(scripts / "disback", "--version"))
        found = checks(out(scripts / "disback", "doctor", "--json"))
        assert str(SITE / "torch") in found["libtorch"]["detail"] and str(SITE) in found["ONNX Runtime"]["detail"], found
        share = place.parents[2] / "share"
        assert ".TH disback-distill 1" in (share / "man/man1/disback-distill.1").read_text()
        assert "--model-card" in (share / "bash-completion/completions/disback").read_text()
        assert "--card-file" in out(scripts / "disback-convert", "torch", "--help")
        assert out(scripts / "python", "-c", "import disback; print(disback.__version__, disback.binary())").endswith("_bin/disback\n")
    finally:
        (place / "elsewhere.pth").unlink()


def test_its_own_search_path_finds_a_torch_beside_it_and_the_cuda_half(place, tmp_path):
    for name in ("torch", "nvidia"):
        (place / name).symlink_to(SITE / name)
    try:
        found = checks(out(place / "disback/_bin/disback", "doctor", "--json"))
    finally:
        for name in ("torch", "nvidia"):
            (place / name).unlink()
    if (SITE / "torch/lib/libtorch_cuda.so").is_file():
        half = found["libtorch for CUDA"]
        assert half["state"] == "ok" and half["detail"].startswith("loaded: "), half


def test_it_starts_and_trains_beside_a_torch_for_the_cpu(place, tmp_path):
    site = beside(tmp_path / "site", without=("libtorch_cuda", "libc10_cuda", "libtorch.so", "libtorch_nvshmem"))
    python = place.parents[2] / "bin/python"
    path = os.pathsep.join([str(site), str(place)])
    found = checks(out(python, "-m", "disback", "doctor", "--json", PYTHONPATH=path))
    assert found["libtorch for CUDA"]["detail"] == "this libtorch is a CPU build", found
    few = ["--set", "log.samples=0", "--batch", "8", "--threads", "1", "--nodes", "1", "--degrade-steps", "3", "--updates", "2"]
    words = ["distill", ROOT / "examples/digits/teacher.onnx", "-o", tmp_path / "run", "--quiet", *few]
    out(python, "-m", "disback", *words, PYTHONPATH=path)
    assert (tmp_path / "run/student.onnx").is_file()


def test_the_wrong_program_is_not_packed(tmp_path):
    text = out(sys.executable, ROOT / "scripts/wheel", "--binary", DISBACK, "--out", tmp_path, "--runtime", code=1)
    assert "trains: build the small one" in text and not list(tmp_path.iterdir())
