#!/usr/bin/env bash
# Sinusoid regression, a network that is told amplitude and phase: the lower bound of section 5.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
iterations=$(option metatrain_iterations 70000)
drop metatrain_iterations
train sinusoid_oracle --datasource=sinusoid --norm=None --update_batch_size=10 --update_lr=0.01 \
    --baseline=oracle --pretrain_iterations="$iterations" --metatrain_iterations=0
evaluate
