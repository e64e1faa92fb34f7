#!/usr/bin/env bash
# Omniglot, 20-way 5-shot: table 1, appendix A.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
prepare omniglot
train omniglot_20way_5shot --datasource=omniglot --num_classes=20 \
    --update_batch_size=5 --update_lr=0.1 --num_updates=5 \
    --meta_batch_size=16 --metatrain_iterations=60000
evaluate
