#!/usr/bin/env bash
# Every cell of the paper's tables, the cheapest first; arguments go to all of them, and a second
# call continues.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
cells=(
    sinusoid_10shot sinusoid_5shot sinusoid_pretrain sinusoid_oracle sinusoid_published_command
    omniglot_5way_1shot_no_conv omniglot_5way_5shot_no_conv omniglot_5way_1shot
    miniimagenet_5way_1shot_first_order omniglot_5way_5shot miniimagenet_5way_5shot_first_order
    omniglot_20way_1shot miniimagenet_5way_1shot miniimagenet_5way_5shot omniglot_20way_5shot
)
for cell in "${cells[@]}"; do
    bash "$here/$cell.sh" "$@"
done
