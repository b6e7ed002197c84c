"""Trains the Flax teacher: python train.py (about five minutes on one core). Writes weights.npz."""

import os
import sys
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import model
import recipe


def main():
    net = model.build()
    graph, state = nnx.split(net, nnx.Param)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.99), optax.scale_by_learning_rate(1.0))
    moments, average = optimiser.init(state), state

    @jax.jit
    def step(state, average, moments, x0, noise, sigma, labels, rate, keep):
        def loss(state):
            x = x0 + sigma[:, None, None, None] * noise
            error = nnx.merge(graph, state)(x, sigma, labels) - x0
            return (recipe.loss_weight(sigma) * jnp.square(error).mean((1, 2, 3))).mean()

        value, gradient = jax.value_and_grad(loss)(state)
        update, moments = optimiser.update(gradient, moments)
        state = jax.tree.map(lambda p, u: p + rate * u, state, update)
        average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, state)
        return state, average, moments, value

    progress = recipe.Progress()
    for k, (x0, noise, sigma, labels) in enumerate(recipe.batches()):
        nhwc = [value.transpose(0, 2, 3, 1) for value in (x0, noise)]
        state, average, moments, value = step(
            state, average, moments, *nhwc, sigma, labels, recipe.rate(k), recipe.keep(k + 1)
        )
        progress(k + 1, value)
    model.save(average, model.WEIGHTS)
    trained = jax.jit(nnx.merge(graph, average))
    count = sum(p.size for p in jax.tree.leaves(average))
    recipe.report("Flax NNX", count, lambda x, s, c: np.asarray(trained(x.transpose(0, 2, 3, 1), s, c)).transpose(0, 3, 1, 2))


if __name__ == "__main__":
    main()
