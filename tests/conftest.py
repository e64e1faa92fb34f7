"""What all tests share: quiet TensorFlow, and `--slow`."""

import collections
import os

import pytest

# Before any test module imports TensorFlow; child processes inherit it.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')


# Cases that take long of tests whose other cases do not.
SLOW_CASES = {
    'test_resumed_run_is_exact[images]',
    'test_converted_checkpoint_evaluates_alike[convolutional]',
    'test_python[scripts/README.md]',
    'test_original[omniglot_5way_1shot-float32-compiled]',
    'test_original[omniglot_5way_1shot-float64-uncompiled]',
    'test_original[omniglot_no_norm-float64-uncompiled]',
    'test_original[sinusoid_5shot_5steps-float32-compiled]',
    'test_original[sinusoid_batchnorm-float32-compiled]',
    'test_original[sinusoid_batchnorm-float32-uncompiled]',
    'test_original[sinusoid_batchnorm-float64-uncompiled]',
    'test_meta_gradient_equals_differences[convolutional-plus_plus]',
    'test_meta_gradient_equals_differences[GRU-1]',
    'test_meta_gradient_of_convolutional_networks[batch_norm-max_pool-flatten]',
    'test_meta_gradient_of_convolutional_networks[batch_norm-stride-mean]',
    'test_meta_gradient_of_convolutional_networks[layer_norm-stride-flatten]',
    'test_meta_gradient_of_convolutional_networks[layer_norm-max_pool-mean]',
    'test_meta_gradient_of_convolutional_networks[None-max_pool-flatten]',
    'test_right[tokens, both ways]',
    'test_names_count_not_the_order[data set]',
}
# Of the cases of these, which are much alike, every n-th runs by default; all with --slow.
EVERY = {
    'test_a_project_with_a_utils_and_a_main_of_its_own': 2,
    'test_an_answer_does_not_depend_on_other_queries': 4,
    'test_any_size_without_a_program_for_each': 2,
    'test_bytes_go_in_as_in_training': 8,
    'test_converted_checkpoint_evaluates_alike': 4,
    'test_damaged_checkpoint': 3,
    'test_derivatives_that_tensorflow_takes_for_zero': 3,
    'test_evaluate_is_that_of_maml': 2,
    'test_first_order_meta_gradient': 3,
    'test_flags_that_contradict_the_run': 2,
    'test_keras_models': 5,
    'test_meta_gradient_equals_differences': 5,
    'test_meta_gradient_of_fully_connected_networks': 3,
    'test_names_count_not_the_order': 4,
    'test_network_is_that_of_tensorflows_layers': 4,
    'test_only_miniimagenet_clips_the_meta_gradient': 2,
    'test_original': 2,
    'test_refused_tasks': 4,
    'test_right': 7,
    'test_tasks_are_independent': 3,
    'test_tasks_do_not_mix': 4,
    'test_the_audit_finds_nothing': 5,
    'test_without_the_queries_statistics_an_answer_stands_alone': 4,
}


def slow_items(items: list[pytest.Item]) -> list[pytest.Item]:
    counts, found = collections.Counter(), []
    for item in items:
        function = item.nodeid.partition('[')[0]
        position, counts[function] = counts[function], counts[function] + 1
        by_mark = item.get_closest_marker('slow') or item.name in SLOW_CASES
        if by_mark or position % EVERY.get(item.originalname, 1):
            found.append(item)
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--slow', action='store_true', help='run the tests marked slow too')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_name = any('::' in argument for argument in config.args)
    if config.getoption('--slow') or config.getoption('-m') or by_name:
        return  # they are asked for
    if slow := slow_items(items):
        config.hook.pytest_deselected(items=slow)
        left_out = {*slow}
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def eager(monkeypatch):
    """See command_line.running_eagerly."""
    from command_line import running_eagerly  # imports TensorFlow, which not all tests need

    with running_eagerly(monkeypatch):
        yield
