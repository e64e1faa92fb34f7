"""A network, a loss and a loop of your own, without Keras: python scripts/examples/own_loop.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import tensorflow as tf

from data_generator import Batch, SinusoidGenerator
from fewshot import FastMAML, Learner
from special_grads import dense


class Network:
    parameters = {  # adapted by the inner loop: kind of initial value, shape
        'w1': ('normal', (1, 40)),
        'b1': ('zeros', (40,)),
        'w2': ('glorot', (40, 1)),
        'b2': ('zeros', (1,)),
    }
    norm_parameters = {}  # learned by the outer loop only
    dim_input = dim_output = 1  # for checks of arrays

    def prepare(self, x):  # steps without weights
        return x

    def __call__(self, x, weights, norms):  # x: [T, examples, 1]; weights: [T, ...] each
        x = tf.tanh(dense(x, weights['w1'], weights['b1']))
        return dense(x, weights['w2'], weights['b2'])  # [T, examples, out]


def loss(output, label):  # [T, examples, out] each; returns [T]
    return tf.reduce_mean(tf.abs(output - label), axis=[1, 2])


model = FastMAML(Network(), loss, update_lr=0.1)
optimizer = tf.keras.optimizers.Adam(0.01)
optimizer.build(model.parameters)


@tf.function
def step(batch):
    outer_loss, gradients = model.meta_gradient(batch)  # means over tasks
    optimizer.apply(gradients, model.parameters)
    return outer_loss


tasks = SinusoidGenerator(num_support=10, num_query=10)
for iteration in range(1000):
    step(Batch(*map(tf.constant, tasks.batch('train', iteration, num_tasks=25))))

learner, test = Learner(model), tasks.batch('test', 0, num_tasks=100)
before, after = (learner.adapt(test.inputa, test.labela, steps) for steps in (0, 5))
errors = [learner.task_loss(test.inputb, test.labelb, w).mean() for w in (before, after)]
print(f'error of 100 new tasks: {errors[0]:.3f}, after 5 updates {errors[1]:.3f}')
