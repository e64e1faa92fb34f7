#!/usr/bin/env bash
# What the wrong meta-gradients of other TensorFlow versions do to training: Omniglot, 5-way and 20-way 1-shot, each with four
# meta-gradients on the same tasks (scripts/paper/second_order_ablation.py tells them apart). Arguments go to main.py.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
prepare omniglot
ablation() {
    local cell=$1 variant
    shift
    for variant in exact held moments first_order; do
        flags=(--datasource=omniglot --update_batch_size=1 "$@" ${given[@]+"${given[@]}"} --logdir="$(option logdir logs/ablation)/$cell")
        python scripts/paper/second_order_ablation.py $variant "${flags[@]}"
        python scripts/paper/second_order_ablation.py $variant "${flags[@]}" --train=False --test_set=True
    done
}
ablation omniglot_5way_1shot --num_classes=5 --update_lr=0.4 --num_updates=1 --meta_batch_size=32 --metatrain_iterations=5001   # the last is validated
ablation omniglot_20way_1shot --num_classes=20 --update_lr=0.1 --num_updates=5 --meta_batch_size=16 --metatrain_iterations=2001
python scripts/paper/second_order_ablation.py plot "$(option logdir logs/ablation)"
