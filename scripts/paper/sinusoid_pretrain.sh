#!/usr/bin/env bash
# Sinusoid regression, one network trained on all tasks together, then fine-tuned: the baseline of
# section 5.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell sinusoid_pretrain 5 10 20
