#!/usr/bin/env bash
# CIFAR-FS, 5-way 5-shot, with miniImagenet's settings, as R2D2's paper and Devos et al. have it.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell cifar_fs_5way_5shot
