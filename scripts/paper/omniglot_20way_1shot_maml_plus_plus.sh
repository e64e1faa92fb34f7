#!/usr/bin/env bash
# Omniglot, 20-way 1-shot, MAML++.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell omniglot_20way_1shot_maml_plus_plus
