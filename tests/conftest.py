"""What all tests share: quiet TensorFlow, and `--slow`."""

import os

import pytest

# Before any test module imports TensorFlow; child processes inherit it.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')


# Cases that take long of tests whose other cases do not.
SLOW_CASES = {
    'test_resumed_run_is_exact[meta-training]',
    'test_converted_checkpoint_evaluates_alike[convolutional]',
    'test_python[scripts/README.md]',
    'test_examples_are_the_papers_networks[miniimagenet]',
    'test_original[omniglot_5way_1shot-float32-compiled]',
    'test_original[omniglot_5way_1shot-float64-uncompiled]',
    'test_original[omniglot_no_norm-float64-uncompiled]',
    'test_original[sinusoid_5shot_5steps-float32-compiled]',
    'test_original[sinusoid_batchnorm-float32-compiled]',
    'test_original[sinusoid_batchnorm-float32-uncompiled]',
    'test_original[sinusoid_batchnorm-float64-uncompiled]',
    'test_meta_gradient_equals_differences[convolutional-plus_plus]',
    'test_meta_gradient_equals_differences[GRU-1]',
    'test_meta_gradient_of_convolutional_networks[batch_norm-stride-mean]',
    'test_meta_gradient_of_convolutional_networks[layer_norm-stride-flatten]',
    'test_meta_gradient_of_convolutional_networks[layer_norm-max_pool-mean]',
    'test_meta_gradient_of_convolutional_networks[None-max_pool-flatten]',
    'test_right[tokens, both ways]',
    'test_names_count_not_the_order[data set]',
    'test_what_older_files_do_not_hold[clip]',
    'test_what_older_files_do_not_hold[trained_on]',
}


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker('slow') is not None or item.name in SLOW_CASES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--slow', action='store_true', help='run the tests marked slow too')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_name = any('::' in argument for argument in config.args)
    if config.getoption('--slow') or config.getoption('-m') or by_name:
        return  # they are asked for
    slow = [item for item in items if is_slow(item)]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not is_slow(item)]


@pytest.fixture
def eager(monkeypatch):
    """See command_line.running_eagerly."""
    from command_line import running_eagerly  # imports TensorFlow, which not all tests need

    with running_eagerly(monkeypatch):
        yield
