#!/usr/bin/env bash
# Omniglot, 20-way 1-shot, ANIL: the inner loop changes the last layer alone.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
prepare omniglot
train omniglot_20way_1shot_anil --datasource=omniglot --num_classes=20 \
    --update_batch_size=1 --update_lr=0.1 --num_updates=5 \
    --meta_batch_size=16 --adapt=head --metatrain_iterations=60000
evaluate
