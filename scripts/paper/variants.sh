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
    local tables=("$1"/*/test_*.csv)
    [ -e "${tables[0]}" ] || return 1
    [ -z "$(find "${tables[0]%/*}" -name 'model*.index' -newer "${tables[0]}")" ]
}

# common_of ITERATIONS: sets common to the flags of the set's cell, and plus_plus to MAML++'s, for so
# many iterations where the arguments say nothing.
common_of() {
    local iterations
    iterations=$(option metatrain_iterations "$1")
    flags_of "$set" "$iterations"
    common=("${table[@]}")
    flags_of maml_plus_plus "$iterations"
    plus_plus=("${table[@]}")
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
    common_of 70000
    variant maml
    variant meta-sgd --learn_lr=weight
    variant maml++ "${plus_plus[@]}" --num_updates=2
}

# One iteration more than a multiple of 500, so that the last one is validated.
omniglot_20way_1shot() {
    seeds=0
    prepare omniglot
    common_of 1501
    variant maml
    variant first_order --stop_grad=True
    variant anil --adapt=head
    variant meta-sgd --learn_lr=weight
    variant maml++ "${plus_plus[@]}" --norm_steps=True
}

for set in ${SETS:-sinusoid omniglot_20way_1shot}; do
    $set
done
python scripts/paper/variants.py "$folder"
