#!/bin/sh
# From nothing to a comparison: a small real model and the embedded articles, in six steps.
# About ten minutes on two cores, without a GPU. HESTCTL_* variables change any setting.
set -eu
db=${1:-runs.duckdb}

hestctl calibrate --db "$db"                                      # what a direction costs on this device
hestctl train --db "$db" --method tabs                            # the reference of the budget
hestctl train --db "$db" --method hest --emax-ratio 0.6           # at most 0.6 of what tabs spent
hestctl harden --db "$db"                                         # the plan, its bound, its certificate
hestctl profile --db "$db" --seq-len "${HESTCTL_PROFILE__SEQ_LEN:-512}"
hestctl compare --db "$db" --out figures
