#!/usr/bin/env bash
# Omniglot, 5-way 1-shot: table 1, appendix A.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
prepare omniglot
train omniglot_5way_1shot --datasource=omniglot --num_classes=5 \
    --update_batch_size=1 --update_lr=0.4 --num_updates=1 \
    --meta_batch_size=32 --metatrain_iterations=60000
evaluate
