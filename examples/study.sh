#!/bin/sh
# The study: methods, ablations and controls on the same data, with the same steps, into one store.
#
#   sh examples/study.sh study.duckdb --data FOLDER_WITH_ARTICLES
#
# Everything after the store goes to every training. SEEDS, RATIOS and SKIP may be set: RATIOS are E_max over
# what tabs spends, the last of them is also that of the greedy control and, but for fp16-only, of the ablations.
# HESTCTL_* variables change any setting. A row that is there already is not trained again.
set -eu
db=${1:-study.duckdb}
[ $# -eq 0 ] || shift
seeds=${SEEDS:-42}
ratios=${RATIOS:-0.9 0.8 0.6 0.4}
skip=${SKIP:-3}
for last in $ratios; do :; done

row() {
    name=$1
    shift
    mkdir -p "$db.rows"
    if [ ! -e "$db.rows/$name" ]; then
        echo "== $name"
        hestctl train --db "$db" -q "$@" && touch "$db.rows/$name"
    fi
}

[ -e "$db" ] || hestctl calibrate --db "$db" -q
for seed in $seeds; do
    s="--seed $seed"
    row "tabs $seed" --method tabs $s "$@"
    for ratio in $ratios; do
        row "hest $ratio $seed" --method hest --emax-ratio "$ratio" $s "$@"
    done
    row "hest greedy $seed" --method hest --emax-ratio "$last" --set method.layers=greedy $s "$@"
    row "lora int8 $seed" --method lora --backbone-precision int8 $s "$@"
    row "lora int8 skip $seed" --method lora --backbone-precision int8 --set backbone.skip_last="$skip" $s "$@"
    row "base $seed" --method base $s "$@"
    row "lora $seed" --method lora $s "$@"
    row "bhsp $seed" --method bhsp $s "$@"
    row "hest adapter $seed" --method hest --scope adapter --emax-ratio 0.6 $s "$@"
    row "hest fp16-only $seed" --method hest --emax-ratio 0.6 --precision fp16-only $s "$@"
    row "hest no dual $seed" --method hest --emax-ratio "$last" --dual none $s "$@"
    row "hest unfactorised $seed" --method hest --emax-ratio "$last" --controller unfactorised $s "$@"
done
hestctl compare --db "$db" --out figures
