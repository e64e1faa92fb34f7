#!/usr/bin/env bash
# miniImagenet, 5-way 5-shot, first-order approximation: table 1, appendix A.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
prepare miniImagenet
train miniimagenet_5way_5shot_first_order --datasource=miniimagenet --num_classes=5 \
    --update_batch_size=5 --update_lr=0.01 --num_updates=5 \
    --meta_batch_size=2 --num_filters=32 --max_pool=True --stop_grad=True \
    --metatrain_iterations=60000
evaluate
