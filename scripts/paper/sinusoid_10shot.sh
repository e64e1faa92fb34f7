#!/usr/bin/env bash
# Sinusoid regression, trained with K = 10, evaluated with K = 10 and 20: section 5.1, figures 2 and
# 3. Shares its run with sinusoid_5shot.sh.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
train sinusoid --datasource=sinusoid --norm=None --update_batch_size=10 --update_lr=0.01 \
    --metatrain_iterations=70000
for shots in 10 20; do
    evaluate --update_batch_size=$shots --train_update_batch_size=10
done
