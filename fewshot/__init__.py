"""The additions to the original program: `from fewshot import FastMAML, Learner, MetaModel`."""

import importlib
import os
import sys

KERAS_CAME_FIRST = 'keras' in sys.modules
# Keras reads them when it is loaded: another backend, or Keras 2, would not do.
if not KERAS_CAME_FIRST:
    os.environ['KERAS_BACKEND'] = 'tensorflow'
for name in ('TF_USE_LEGACY_KERAS', 'TF2_BEHAVIOR'):
    os.environ.pop(name, None)
# Hides TensorFlow's messages on CPU instructions and absent GPUs; errors come through.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

PLACES = {
    'FastMAML': 'engine.fast',
    'Replicas': 'engine.devices',
    'KerasNetwork': 'networks.keras_network',
    'Network': 'networks.paper_networks',
    'FullyConnected': 'networks.paper_networks',
    'Convolutional': 'networks.paper_networks',
    'Normalization': 'networks.paper_networks',
    'make_model': 'networks.build',
    'make_network': 'networks.build',
    'UserTasks': 'data.user_tasks',
    'load_folder': 'data.own_images',
    'read_image': 'data.image_files',
    'run_layout': 'data.image_files',
    'load_miniimagenet': 'data.image_folders',
    'load_omniglot': 'data.image_folders',
    'Schedule': 'runs.trainer',
    'Trainer': 'runs.trainer',
    'Learner': 'use.learner',
    'MetaModel': 'use.fit',
}
__all__ = sorted(PLACES)


def __getattr__(name: str):
    """Imports a name when it is first asked for, and no more: TensorFlow takes seconds."""
    if name not in PLACES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    importlib.import_module('fewshot.start')
    return getattr(importlib.import_module(f'fewshot.{PLACES[name]}'), name)


def __dir__() -> list[str]:
    return __all__
