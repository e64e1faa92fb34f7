#!/usr/bin/env bash
# Omniglot, 5-way 1-shot, without convolutions: table 1, appendix A.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell omniglot_5way_1shot_no_conv
