#!/usr/bin/env bash
# Trains a recipe, converts the model and measures both: a gate for continuous integration.
#
#     ci.sh RECIPE OUTPUT [BASE]
#
# RECIPE has the blocks model, data, train and convert. BASE is the bench.json of an earlier call on the same processor:
# the script fails when a model decodes more slowly than there by more than FAIL_ABOVE (10%).
#
# The first command that fails ends the script, with its exit code: 1 failure, 2 wrong recipe, 3 slower than BASE,
# 4 the conversion keeps no budget or its files compute something else, 75 stopped: the same call resumes.
set -euo pipefail
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
  echo "usage: ci.sh RECIPE OUTPUT [BASE]" >&2
  exit 2
fi
recipe=$1 output=$2 base=${3:-} fail_above=${FAIL_ABOVE:-10%}
if [ -n "$base" ] && [ "$base" -ef "$output/bench.json" ]; then
  echo "ci.sh: BASE is $output/bench.json, which this call replaces; copy it, or choose another OUTPUT" >&2
  exit 2
fi

sparsecli recipes check "$recipe"
if [ -n "$base" ]; then  # now, not after minutes: BASE can be read, and FAIL_ABOVE is a share
  sparsecli bench --from "$base" --against "$base" --fail-above "$fail_above" > /dev/null
fi
sparsecli train "$recipe" --output "$output/dense" --resume auto
if [ ! -e "$output/sparse/report.json" ]; then
  sparsecli sparsify-convert "$recipe" --model "$output/dense" --output "$output/sparse"
fi
measure=(sparsecli bench "$recipe" --model "$output/dense" --model "$output/sparse" --output "$output/bench.json")
if [ -n "$base" ]; then
  measure+=(--against "$base" --fail-above "$fail_above")
fi
"${measure[@]}"
