"""pytorch-fid's and clean-fid's own computation of a Frechet distance from features that lie on disk.

    python3 benches/frechet_peers.py --setup            # a virtual environment with both, in benches/.frechet-venv
    .frechet-venv/bin/python frechet_peers.py PEER DIR  # reads DIR/a.npy and DIR/b.npy; prints: peer distance seconds MiB

Both packages' feature networks are left out: what is timed is their means, covariances and `calculate_frechet_distance`.
"""
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PINS = ["pytorch-fid==0.3.0", "clean-fid==0.1.35"]


def setup():
    folder = HERE / ".frechet-venv"
    # torch and scipy come from the project's environment; what the two packages pull in beside them is not needed here.
    subprocess.check_call([str(HERE.parent / ".venv/bin/python"), "-m", "venv", "--system-site-packages", str(folder)])
    site = next((HERE.parent / ".venv/lib").glob("python3*/site-packages"))
    mine = next((folder / "lib").glob("python3*/site-packages"))
    (mine / "project.pth").write_text(f"{site}\n")
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.check_call(pip + ["--no-deps", *PINS])
    subprocess.check_call(pip + ["requests", "tqdm", "torchvision==0.26.0", "--no-deps"])


def main(peer, folder):
    import numpy as np

    if peer == "pytorch-fid":
        from pytorch_fid.fid_score import calculate_frechet_distance as frechet

        # calculate_activation_statistics: activations in f64, np.mean, np.cov(rowvar=False)
        read = lambda name: np.load(folder / name).astype(np.float64)
    else:
        from cleanfid.fid import frechet_distance as frechet

        # fid_folder: np.mean and np.cov(rowvar=False) of f32 features
        read = lambda name: np.load(folder / name)
    began = time.perf_counter()
    a = read("a.npy")
    mu1, sigma1 = np.mean(a, axis=0), np.cov(a, rowvar=False)
    del a
    b = read("b.npy")
    mu2, sigma2 = np.mean(b, axis=0), np.cov(b, rowvar=False)
    del b
    distance = frechet(mu1, sigma1, mu2, sigma2)
    seconds = time.perf_counter() - began
    print(f"{peer} {distance:.9f} {seconds:.2f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--setup"]:
        setup()
    elif len(sys.argv) == 3:
        main(sys.argv[1], Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
