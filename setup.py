"""Installation: `pip install -e .` for training and evaluation, `'.[plots]'` for the pictures too.

`'.[gpu]'` adds CUDA's libraries, by which TensorFlow uses an NVIDIA GPU, `'.[test]'` what the tests
need, `'.[dev]'` the linter and formatter as well, `'.[notebook]'` what executes
docs/tutorials/keras_fit.ipynb, `'.[demo]'` what scripts/model/demo.py needs, `'.[demo_test]'` what
draws on its page in a browser, `'.[docs]'` what builds the site, and `'.[jax]'` what
scripts/device/train.py needs.
"""

from setuptools import find_packages, setup

PLOTS = ['matplotlib>=3.7']
NOTEBOOK = [*PLOTS, 'ipykernel', 'nbclient>=0.8']
TEST = [*PLOTS, 'pytest>=7', 'pytest-xdist>=3.2']
DEMO = ['nicegui>=3.5']
DEMO_TEST = [*TEST, *DEMO, 'playwright>=1.40']
DOCS = ['sphinx>=8.1', 'myst-nb>=1.2', 'furo>=2024.8.6']
JAX = ['jax>=0.6,<0.13']  # 0.6.2, 0.8.3, 0.10.2, 0.11.2 and 0.12.0.1 were tried
# One version, because another one formats differently.
DEV = [*TEST, 'ruff==0.17.6']

setup(
    name='maml-tf2',
    version='1.0.0',
    description='Model-Agnostic Meta-Learning (Finn, Abbeel, Levine, ICML 2017) in TensorFlow 2',
    license='MIT',
    # main.py and utils.py belong to the checkout: names that every project has.
    packages=find_packages(include=['fewshot', 'fewshot.*']),
    package_data={'fewshot.data': ['*.json'], 'fewshot.use': ['*.js']},
    py_modules=['maml', 'data_generator', 'special_grads'],
    python_requires='>=3.10,<3.14',
    # TensorFlow no longer brings TensorBoard (since 2.21), but tf.summary.scalar needs it.
    install_requires=[
        'tensorflow>=2.16',
        'tensorboard>=2.16',
        'absl-py',
        'numpy',
        'pillow>=10.1',
        'scipy',
    ],
    extras_require={
        'plots': PLOTS,
        'notebook': NOTEBOOK,
        'demo': DEMO,
        'demo_test': DEMO_TEST,
        'test': TEST,
        'dev': DEV,
        'docs': DOCS,
        'jax': JAX,
        'gpu': ['tensorflow[and-cuda]>=2.16'],
    },
)
