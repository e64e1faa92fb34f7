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

prepare() {
    case $1 in
    omniglot)
        [ -d "$data_dir/omniglot_resized" ] ||
            python scripts/data/prepare_omniglot.py --target="$data_dir/omniglot_resized" \
                ${OMNIGLOT:+--source="$OMNIGLOT"};;
    miniImagenet)
        [ -d "$data_dir/miniImagenet" ] ||
            python scripts/data/prepare_miniimagenet.py --target="$data_dir/miniImagenet" \
                ${MINIIMAGENET:+--source="$MINIIMAGENET"};;
    cifar_fs)
        [ -d "$data_dir/cifar_fs" ] ||
            python scripts/data/prepare_cifar_fs.py --target="$data_dir/cifar_fs" \
                ${CIFAR100:+--source="$CIFAR100"};;
    esac
}

# maml_plus_plus ITERATIONS: sets plus_plus to its flags, as far as its program tells: a tenth of
# training until the last loss alone counts. Its paper has first order at the beginning, here a third
# of training.
maml_plus_plus() {
    plus_plus=(--learn_lr=layer_step --loss_steps=all --loss_steps_iterations=$(($1 / 10))
        --first_order_iterations=$(($1 / 3)) --meta_lr_decay=cosine --meta_lr_end=0.00001)
}

# train CELL FLAGS: to the end, from where it was.
train() {
    logdir=$(option logdir "logs/$1/seed$(option seed 0)")
    shift
    flags=("$@" ${given[@]+"${given[@]}"} --logdir="$logdir")
    echo "== python main.py ${flags[*]}" >&2
    python main.py "${flags[@]}"
}

# Whether a best checkpoint was kept. The folder's name is no pattern, whatever is in it.
has_best() {
    local index
    for index in "$logdir"/*/best*.index; do
        [ -e "$index" ] && return
    done
    return 1
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
    if has_best; then
        python main.py "${flags[@]}" --train=False $split --test_iter=best "$@"
    fi
}
