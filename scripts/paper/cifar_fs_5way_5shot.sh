#!/usr/bin/env bash
# CIFAR-FS, 5-way 5-shot, with miniImagenet's settings, as R2D2's paper and Devos et al. have it.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
prepare cifar_fs
drop data_dir
train cifar_fs_5way_5shot --datasource=folder --data_dir="$data_dir/cifar_fs" --image_size=32 \
    --num_classes=5 --update_batch_size=5 --num_query=15 --update_lr=0.01 --num_updates=5 \
    --meta_batch_size=4 --num_filters=32 --max_pool=True --metatrain_iterations=60000
evaluate
