#!/usr/bin/env bash
# miniImagenet, 5-way 5-shot: table 1, appendix A.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell miniimagenet_5way_5shot
