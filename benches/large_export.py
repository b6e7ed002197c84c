"""large_export.py OUT [LAYERS]: a network of about 300 M random parameters (36 transformer blocks of 1024 channels, or LAYERS,
between two convolutions) as PyTorch's dynamo exporter writes it, with external data: OUT/model.onnx, OUT/model.onnx.data."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "python"))
from native_unet import Transformer  # noqa: E402


class Large(nn.Module):
    def __init__(self, channels=1024, layers=36):
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.time = nn.Linear(1, channels)
        self.blocks = nn.ModuleList(Transformer(channels, 16, explicit=False) for _ in range(layers))
        self.conv_out = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, sample, timestep):
        x = self.conv_in(sample) + self.time(timestep[:, None])[:, :, None, None]
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    # Fresh scales and biases stay ones and zeros, which the exporter merges: importing parts them.
    net = Large(layers=int(sys.argv[2]) if len(sys.argv) > 2 else 36).eval()
    args = (torch.randn(1, 4, 8, 8), torch.ones(1))
    program = torch.onnx.export(net, args, dynamo=True, opset_version=20, input_names=["sample", "timestep"],
                                output_names=["epsilon"], verbose=False)  # fmt: skip
    program.save(out / "model.onnx", external_data=True)
    print(sum(p.numel() for p in net.parameters()))


if __name__ == "__main__":
    main()
