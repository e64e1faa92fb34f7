# Sourced by the scripts of the paper's cells with their arguments, which main.py gets after the
# cell's own flags:
#   bash scripts/paper/omniglot_5way_1shot.sh                               as in the paper
#   bash scripts/paper/omniglot_5way_1shot.sh --metatrain_iterations=5000   a short run
#   bash scripts/paper/omniglot_5way_1shot.sh --seed=1                      another seed, beside it
# Runs are kept in logs/CELL/seedN. Started again, a script continues: what is trained is not
# trained twice.
# OMNIGLOT=FOLDER, MINIIMAGENET=FOLDER and CIFAR100=FOLDER name what the data is made from, if it has
# to be made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/lib/environment.sh
set_up plots
given=("$@")

# option NAME DEFAULT: the value of --NAME=VALUE or --NAME VALUE among the arguments, the last one
# counts; else the default.
option() {
    local name=$1 value=$2 argument before=
    for argument in ${given[@]+"${given[@]}"}; do
        case $argument in --$name=*|-$name=*) value=${argument#*=};; esac
        case $before in --$name|-$name) value=$argument;; esac
        before=$argument
    done
    echo "${value/#\~\//$HOME/}" # bash leaves --logdir=~/runs as it is
}

# Takes --NAME=VALUE and --NAME VALUE out of the arguments.
drop() {
    local name=$1 kept=() argument before=
    for argument in ${given[@]+"${given[@]}"}; do
        case $argument in
        --$name=*|-$name=*|--$name|-$name) ;;
        *) case $before in --$name|-$name) ;; *) kept+=("$argument");; esac;;
        esac
        before=$argument
    done
    given=(${kept[@]+"${kept[@]}"})
}

data_dir=$(option data_dir data)

# prepare CELL: makes the data of a cell, unless it is there.
prepare() {
    local script folder source
    case $1 in
    omniglot*) script=omniglot folder=omniglot_resized source=${OMNIGLOT:-};;
    miniimagenet*) script=miniimagenet folder=miniImagenet source=${MINIIMAGENET:-};;
    cifar_fs*) script=cifar_fs folder=cifar_fs source=${CIFAR100:-};;
    *) return;;
    esac
    [ -d "$data_dir/$folder" ] ||
        python scripts/data/prepare_$script.py --target="$data_dir/$folder" \
            ${source:+--source="$source"}
}

# flags_of CELL ITERATIONS END: sets table to the cell's flags in fewshot/paper/cells.py. Of the
# arguments it takes what these flags have instead: the folder of the data, joint iterations.
flags_of() {
    local printed flag
    printed=$(python -m fewshot.paper.cells "$@")
    table=()
    while IFS= read -r flag; do
        case $flag in
        --data_dir=*) flag=--data_dir=$data_dir/${flag#*=}; drop data_dir;;
        --pretrain_iterations=*) drop metatrain_iterations;;
        esac
        table+=("$flag")
    done <<<"$printed"
}

# cell NAME [K ...]: trains a cell to the end, from where it was, then evaluates it; a sinusoid's
# with each K.
cell() {
    local name=$1 shots
    shift
    prepare "$name"
    flags_of "$name" '' "$(option metatrain_iterations '')"
    logdir=$(option logdir "logs/$name/seed$(option seed 0)")
    flags=("${table[@]}" ${given[@]+"${given[@]}"} --logdir="$logdir")
    echo "== python main.py ${flags[*]}" >&2
    python main.py "${flags[@]}"
    [ $# -gt 0 ] || evaluate
    for shots in "$@"; do
        evaluate --update_batch_size="$shots" --train_update_batch_size=10
    done
}

# evaluate FLAGS: the last checkpoint of what was trained, and the best of the validations, on 600
# tasks of the test classes.
evaluate() {
    local split=--test_set=True test_classes=$data_dir/miniImagenet/test
    if [[ " ${flags[*]} " == *" --datasource=miniimagenet "* ]] && ! [ -d "$test_classes" ]; then
        echo "There is no $test_classes: the validation classes are used." >&2
        split=--test_set=False
    fi
    python main.py "${flags[@]}" --train=False $split "$@"
    if [ -n "$(find -L "$logdir" -mindepth 2 -maxdepth 2 -name 'best*.index')" ]; then
        python main.py "${flags[@]}" --train=False $split --test_iter=best "$@"
    fi
}
