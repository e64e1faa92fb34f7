#!/usr/bin/env bash
# Inner loops that grew from MAML's, on the same tasks and seeds: sinusoids and Omniglot, 20-way
# 1-shot. Trains and evaluates each in LOGDIR/SET/VARIANT/seedN, then draws all of them. Started
# again, it continues; what is finished is neither trained nor evaluated again. Arguments go to
# main.py. SETS names the sets, SEEDS the seeds:
#   SETS=sinusoid SEEDS="0 1" bash scripts/paper/variants.sh --metatrain_iterations=5000
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
folder=$(option logdir logs/variants)

# Whether the newest checkpoint in a folder of one run has been evaluated.
evaluated() {
    local table index
    for table in "$1"/*/test_*.csv; do
        [ -e "$table" ] || return 1
        for index in "${table%/*}"/model*.index; do
            [ "$index" -nt "$table" ] && return 1
        done
        return 0
    done
    return 1
}

# variant NAME FLAGS: of the set, with each seed.
variant() {
    local name=$1 seed logdir
    shift
    for seed in ${SEEDS:-$seeds}; do
        logdir=$folder/$set/$name/seed$seed
        flags=("${common[@]}" "$@" ${given[@]+"${given[@]}"} --seed="$seed" --logdir="$logdir")
        echo "== python main.py ${flags[*]}" >&2
        python main.py "${flags[@]}"
        evaluated "$logdir" || python main.py "${flags[@]}" --train=False --test_set=True
    done
}

# MAML's paper has one update, and no normalisation that could change from one to the next. MAML++
# has five, with batch normalisation: without it their step sizes grow until a loss is infinite, and
# with it sinusoids are not learned. So it gets two here.
sinusoid() {
    seeds='0 1 2'
    iterations=$(option metatrain_iterations 70000)
    common=(--datasource=sinusoid --norm=None --update_batch_size=10 --update_lr=0.01
        --metatrain_iterations="$iterations")
    variant maml
    variant meta-sgd --learn_lr=weight
    maml_plus_plus "$iterations"
    variant maml++ "${plus_plus[@]}" --num_updates=2
}

# One iteration more than a multiple of 500, so that the last one is validated.
omniglot_20way_1shot() {
    prepare omniglot
    seeds=0
    iterations=$(option metatrain_iterations 1501)
    common=(--datasource=omniglot --num_classes=20 --update_batch_size=1 --update_lr=0.1
        --num_updates=5 --meta_batch_size=16 --metatrain_iterations="$iterations")
    variant maml
    variant first_order --stop_grad=True
    variant anil --adapt=head
    variant meta-sgd --learn_lr=weight
    maml_plus_plus "$iterations"
    variant maml++ "${plus_plus[@]}" --norm_steps=True
}

for set in ${SETS:-sinusoid omniglot_20way_1shot}; do
    $set
done
python scripts/paper/variants.py "$folder"
