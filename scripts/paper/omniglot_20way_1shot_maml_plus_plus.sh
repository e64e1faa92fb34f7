#!/usr/bin/env bash
# Omniglot, 20-way 1-shot, MAML++.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
prepare omniglot
maml_plus_plus "$(option metatrain_iterations 60000)"
train omniglot_20way_1shot_maml_plus_plus --datasource=omniglot --num_classes=20 \
    --update_batch_size=1 --update_lr=0.1 --num_updates=5 \
    --meta_batch_size=16 "${plus_plus[@]}" --norm_steps=True --metatrain_iterations=60000
evaluate
