#!/usr/bin/env bash
# Sinusoid regression with the step size of the command that the authors published, α = 0.001, where
# the paper's text has 0.01.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
train sinusoid_published_command --datasource=sinusoid --norm=None --update_batch_size=10 \
    --update_lr=0.001 --metatrain_iterations=70000
for shots in 5 10; do
    evaluate --update_batch_size=$shots --train_update_batch_size=10
done
