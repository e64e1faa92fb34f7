#!/usr/bin/env bash
# What the wrong meta-gradients of other TensorFlow versions do to training: Omniglot, 5-way and
# 20-way 1-shot, each with four meta-gradients on the same tasks, which
# scripts/paper/second_order_ablation.py tells apart. Arguments go to main.py.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
prepare omniglot
folder=$(option logdir logs/ablation)

# ablation CELL FLAGS: all variants of one cell, trained and evaluated.
ablation() {
    local cell=$1 variant
    shift
    flags=(--datasource=omniglot --update_batch_size=1 "$@" ${given[@]+"${given[@]}"}
        --logdir="$folder/$cell")
    for variant in exact held moments first_order; do
        python scripts/paper/second_order_ablation.py $variant "${flags[@]}"
        python scripts/paper/second_order_ablation.py $variant "${flags[@]}" \
            --train=False --test_set=True
    done
}

# One iteration more than a multiple of 500, so that the last one is validated.
ablation omniglot_5way_1shot --num_classes=5 --update_lr=0.4 --num_updates=1 \
    --meta_batch_size=32 --metatrain_iterations=5001
ablation omniglot_20way_1shot --num_classes=20 --update_lr=0.1 --num_updates=5 \
    --meta_batch_size=16 --metatrain_iterations=2001
python scripts/paper/second_order_ablation.py plot "$folder"
