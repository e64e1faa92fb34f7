#!/usr/bin/env bash
# What the wrong meta-gradients of other TensorFlow versions do to training: Omniglot, 5-way and
# 20-way 1-shot, each with four meta-gradients on the same tasks, which
# scripts/paper/second_order_ablation.py tells apart. Arguments go to main.py.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
prepare omniglot
folder=$(option logdir logs/ablation)

# ablation CELL ITERATIONS: all variants of one cell, trained and evaluated.
ablation() {
    local variant
    flags_of "$1" "$2"
    flags=("${table[@]}" ${given[@]+"${given[@]}"} --logdir="$folder/$1")
    for variant in exact held moments first_order; do
        python scripts/paper/second_order_ablation.py $variant "${flags[@]}"
        python scripts/paper/second_order_ablation.py $variant "${flags[@]}" \
            --train=False --test_set=True
    done
}

# One iteration more than a multiple of 500, so that the last one is validated.
ablation omniglot_5way_1shot 5001
ablation omniglot_20way_1shot 2001
python scripts/paper/second_order_ablation.py plot "$folder"
