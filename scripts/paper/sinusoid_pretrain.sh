#!/usr/bin/env bash
# Sinusoid regression, one network trained on all tasks together, then fine-tuned: the baseline of
# section 5.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
iterations=$(option metatrain_iterations 70000)
drop metatrain_iterations
train sinusoid_pretrain --datasource=sinusoid --norm=None --update_batch_size=10 --update_lr=0.01 \
    --pretrain_iterations="$iterations" --metatrain_iterations=0
for shots in 5 10 20; do
    evaluate --update_batch_size=$shots --train_update_batch_size=10
done
