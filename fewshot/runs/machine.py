"""Sets up devices, memory and threads as the flags of a run want them."""

import json
import os
from contextlib import suppress

import tensorflow as tf
from absl import flags

from fewshot.checks import first_line
from fewshot.engine.devices import Replicas, keep_freed_memory, process_index, set_up_gpus
from fewshot.sources import source_of


def make_replicas(f: flags.FlagValues) -> Replicas:
    """Returns --strategy's devices, before TensorFlow's first operation. Raises ValueError."""
    if f.strategy == 'mirrored':
        kind = 'GPU' if tf.config.list_logical_devices('GPU') else 'CPU'
        names = [device.name for device in tf.config.list_logical_devices(kind)]
        return Replicas(tf.distribute.MirroredStrategy(names))
    if f.strategy == 'none':
        return Replicas()
    if not os.environ.get('TF_CONFIG'):
        raise ValueError(
            '--strategy=multi_worker needs TF_CONFIG, which tells each worker the addresses of '
            'all; `python scripts/launch_workers.py N -- FLAGS` starts N workers on this machine'
        )
    check_cluster(os.environ['TF_CONFIG'])
    wrong = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, tf.errors.OpError)
    try:
        return Replicas(tf.distribute.MultiWorkerMirroredStrategy())
    except wrong as error:
        given, reason = os.environ['TF_CONFIG'], first_line(error)
        raise ValueError(f'TF_CONFIG={given} gives no cluster ({reason})') from error


def check_cluster(text: str):
    """Raises ValueError if TF_CONFIG names processes that are neither the chief nor workers."""
    kinds = set()
    with suppress(ValueError, TypeError, AttributeError):  # TensorFlow tells of these
        config = json.loads(text)
        kinds = {*config.get('cluster', {}), config.get('task', {}).get('type', 'worker')}
    if others := sorted(kinds - {'chief', 'worker'}):
        raise ValueError(
            f'TF_CONFIG names {" and ".join(others)}, but only a chief and workers train here: '
            'leave the others out, and evaluate with --train=False'
        )


def worker_index(f: flags.FlagValues) -> int:
    """Returns this process's index among the workers of --strategy=multi_worker; 0 is the chief."""
    if f.strategy != 'multi_worker':
        return 0
    try:
        config = json.loads(os.environ['TF_CONFIG'])
        task = config['task']
        return process_index(config['cluster'], task.get('type', 'worker'), task['index'])
    except (KeyError, ValueError, TypeError, AttributeError):
        return 0  # a TF_CONFIG that cannot be read is refused later


def tune(f: flags.FlagValues):
    """Sets TensorFlow up to suit a run; call it before anything else of TensorFlow.

    GPUs are set up as `set_up_gpus` says; the rest is by measurement. Operations have one thread
    where tasks are tiny: handing work over takes longer than the work. Omniglot and the networks
    here have XLA's older generator of loops: it compiles a quarter faster and into less, and a step
    on miniImagenet takes a tenth less; Keras models on large images were not tried. XLA ends the
    process at options it does not know, so only the version tried is given this one.
    """
    source = source_of(f.datasource)
    keep_freed_memory()
    set_up_gpus(f.tf32)
    if source.threads:
        with suppress(RuntimeError):  # in a notebook that has used TensorFlow before
            tf.config.threading.set_intra_op_parallelism_threads(source.threads)
    if bool(f.network) in source.fusion_tried and tf.__version__.startswith('2.21.'):
        others = os.environ.get('XLA_FLAGS', '')
        os.environ['XLA_FLAGS'] = f'--xla_cpu_use_fusion_emitters=false {others}'
