#!/usr/bin/env bash
# Runs main.py in its own environment, which it makes at the first call:
#   bash scripts/run.sh --datasource=omniglot ...    main.py with these flags
#   bash scripts/run.sh                              the 10-shot sinusoid of the paper: training,
#                                                    evaluation, a picture
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/environment.sh
set_up plots

[ $# -eq 0 ] || exec python main.py "$@"

logdir=logs/sine/
flags=(--datasource=sinusoid --norm=None --update_batch_size=10 --metatrain_iterations=70000
    --logdir=$logdir)
python main.py "${flags[@]}"
python main.py "${flags[@]}" --train=False --test_set=True
python scripts/paper/plot_sinusoid.py "${logdir}cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm"
echo 'To type python commands in this environment: . .venv/bin/activate'
