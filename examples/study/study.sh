#!/bin/sh
# The study: methods, ablations and controls on the same articles, with the same steps, in one store; then
# the table, the figures and the report.
#
#   sh examples/study/study.sh study.duckdb --data FOLDER_WITH_ARTICLES
#
# Everything after the store goes to every training. PROFILE is the settings that all runs share (default:
# study.toml beside this script). SEEDS and RATIOS may be set: RATIOS are E_max over what tabs spends, and the
# last of them is also that of the greedy control and of the ablations that need a tight budget. SKIP is how
# many layers the static control leaves out. A row that is there already is not trained again; one that fails
# is told, and the others go on.
set -u
here=$(dirname "$0")
db=${1:-study.duckdb}
[ $# -eq 0 ] || shift
profile=${PROFILE:-$here/study.toml}
seeds=${SEEDS:-1 2 3}
ratios=${RATIOS:-0.9 0.8 0.6 0.45}
skip=${SKIP:-2}
for last in $ratios; do :; done
failed=0

row() {
    name=$1
    shift
    mkdir -p "$db.rows"
    [ ! -e "$db.rows/$name" ] || return 0
    echo "== $name"
    if hestctl train --db "$db" --profile "$profile" -q "$@"; then
        touch "$db.rows/$name"
    else
        failed=1
    fi
}

if [ ! -e "$db" ]; then
    hestctl calibrate --db "$db" --profile "$profile" -q "$@" || exit
fi
first=
for seed in $seeds; do
    [ -n "$first" ] || first=$seed
    s="--seed $seed"
    row "tabs $seed" --method tabs $s "$@"
    for ratio in $ratios; do
        row "hest $ratio $seed" --method hest --emax-ratio "$ratio" $s "$@"
    done
    row "hest greedy $seed" --method hest --emax-ratio "$last" --set method.layers=greedy $s "$@"
    row "lora int8 $seed" --method lora --backbone-precision int8 $s "$@"
    row "lora int8 skip $seed" --method lora --backbone-precision int8 --set backbone.skip_last="$skip" $s "$@"
    row "lora $seed" --method lora $s "$@"
    row "bhsp $seed" --method bhsp $s "$@"
    row "hest adapter $seed" --method hest --scope adapter --emax-ratio 0.6 $s "$@"
    row "hest fp16-only $seed" --method hest --emax-ratio 0.6 --precision fp16-only $s "$@"
    row "hest no dual $seed" --method hest --emax-ratio "$last" --dual none $s "$@"
    row "hest unfactorised $seed" --method hest --emax-ratio "$last" --controller unfactorised $s "$@"
    # What is run twice with one seed is the A/A control: what the comparison sees where nothing differs. It
    # stands here, for the next seed's tabs run is another reference, and so another budget.
    [ "$seed" != "$first" ] || row "hest again $seed" --method hest --emax-ratio "$last" $s "$@"
done
row "base" --method base --seed "$first" "$@"
row "base again" --method base --seed "$first" "$@"
hestctl compare --db "$db" --out "${db%.duckdb}-figures" --report "${db%.duckdb}-report.html"
exit $failed
