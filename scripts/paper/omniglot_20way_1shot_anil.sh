#!/usr/bin/env bash
# Omniglot, 20-way 1-shot, ANIL: the inner loop changes the last layer alone.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell omniglot_20way_1shot_anil
