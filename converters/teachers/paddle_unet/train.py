"""Trains the Paddle teacher: python train.py (about ten minutes on one core). Writes teacher.pdparams."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import paddle

import model
import recipe


def main():
    paddle.set_device("cpu")
    net = model.build()
    average = {name: value.numpy().copy() for name, value in net.state_dict().items()}
    optimiser = paddle.optimizer.Adam(
        0.0, beta1=0.9, beta2=0.99, parameters=net.parameters(), grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0)
    )
    progress = recipe.Progress()
    for k, (x0, noise, sigma, labels) in enumerate(recipe.batches()):
        x = x0 + sigma[:, None, None, None] * noise
        made = net(*(paddle.to_tensor(value) for value in (x, sigma, labels.astype("int64"))))
        weight = paddle.to_tensor(recipe.loss_weight(sigma))
        loss = (weight * (made - paddle.to_tensor(x0)).square().mean(axis=[1, 2, 3])).mean()
        loss.backward()
        optimiser.set_lr(recipe.rate(k))
        optimiser.step()
        optimiser.clear_grad()
        keep = recipe.keep(k + 1)
        for name, value in net.state_dict().items():
            average[name] += (1 - keep) * (value.numpy() - average[name])
        progress(k + 1, loss)
    net.set_state_dict({name: paddle.to_tensor(value) for name, value in average.items()})
    paddle.save(net.state_dict(), str(model.WEIGHTS))
    net.eval()

    def denoise(x, sigma, labels):
        with paddle.no_grad():
            return net(*(paddle.to_tensor(value) for value in (x, sigma, labels))).numpy()

    count = sum(int(p.size) for p in net.parameters())
    recipe.report("PaddlePaddle", count, denoise)


if __name__ == "__main__":
    main()
