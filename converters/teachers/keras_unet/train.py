"""Trains the Keras teacher on TensorFlow: python train.py (about ten minutes on one core). Writes weights.npz."""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
import tensorflow as tf

import model
import recipe


def main():
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    net = model.build()
    weights = net.trainable_variables
    optimiser = keras.optimizers.Adam(0.0, beta_1=0.9, beta_2=0.99, global_clipnorm=1.0)
    optimiser.build(weights)
    average = [tf.Variable(w.value) for w in weights]

    @tf.function(jit_compile=False)
    def step(x0, noise, sigma, labels, keep):
        with tf.GradientTape() as tape:
            x = x0 + sigma[:, None, None, None] * noise
            error = net({"x": x, "sigma": sigma, "labels": labels}, training=True) - x0
            loss = tf.reduce_mean(recipe.loss_weight(sigma) * tf.reduce_mean(tf.square(error), (1, 2, 3)))
        optimiser.apply(tape.gradient(loss, [w.value for w in weights]), weights)
        for mean, weight in zip(average, weights):
            mean.assign(keep * mean + (1 - keep) * weight.value)
        return loss

    progress = recipe.Progress()
    for k, (x0, noise, sigma, labels) in enumerate(recipe.batches()):
        optimiser.learning_rate.assign(recipe.rate(k))
        x0, noise = (tf.constant(value.transpose(0, 2, 3, 1)) for value in (x0, noise))
        loss = step(x0, noise, tf.constant(sigma), tf.constant(labels), tf.constant(recipe.keep(k + 1), tf.float32))
        progress(k + 1, loss)
    for weight, mean in zip(weights, average):
        weight.assign(mean)
    np.savez_compressed(model.WEIGHTS, **{v.path.replace("/", "."): np.asarray(v) for v in net.variables})
    trained = tf.function(lambda x, s, c: net({"x": x, "sigma": s, "labels": c}))
    recipe.report(
        "Keras 3",
        net.count_params(),
        lambda x, s, c: trained(x.transpose(0, 2, 3, 1), s, c.astype("int32")).numpy().transpose(0, 3, 1, 2),
    )


if __name__ == "__main__":
    main()
