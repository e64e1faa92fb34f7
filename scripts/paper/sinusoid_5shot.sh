#!/usr/bin/env bash
# Sinusoid regression, trained with K = 10, evaluated with K = 5: section 5.1, figures 2 and 3.
# Shares its run with sinusoid_10shot.sh.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
train sinusoid --datasource=sinusoid --norm=None --update_batch_size=10 --update_lr=0.01 \
    --metatrain_iterations=70000
evaluate --update_batch_size=5 --train_update_batch_size=10
