#!/usr/bin/env bash
# Omniglot, 5-way 5-shot: table 1, appendix A.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell omniglot_5way_5shot
