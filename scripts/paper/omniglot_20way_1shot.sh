#!/usr/bin/env bash
# Omniglot, 20-way 1-shot: table 1, appendix A.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell omniglot_20way_1shot
