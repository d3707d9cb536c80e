#!/usr/bin/env bash
# Builds, tests and measures the CUDA path on a machine with one GPU: offline, within SECONDS_IN_ALL, whatever fails.
#
#   benchmarks/gpu_suite.sh OUTDIR [WINDOW...]
#
# Each window takes less than nine minutes; several run one after the other within the same time (all of them by default):
#
#   main        the self-check of every op, then the main case (50,000 tokens, 768/3072, bf16): every launch, and both
#               passes beside their peers; then a few CUDA tests. Needs no compiled extension
#   choices     tiles, descriptors and merged launches, each in turn with the usual one
#   tests       every CUDA test
#   sizes       other sizes and types, small ones first, and routing stage by stage
#   models      whole CLIP models (needs open_clip; see WHEELS)
#   sanitizers  small shapes under compute-sanitizer's memcheck and racecheck
#
# OUTDIR receives a log and, from benchmarks, a CSV for every step, steps.csv, and summary.md (gpu_summary.py), whose exit
# status is this program's; its end, with the verdict, is printed last. A step that fails, is slow, checks nothing or
# lacks its tool is recorded, and the next one begins. What matters most comes first: a step without time left does not
# begin. summary.md is written again after every step, so that a run that is killed leaves what it has found.
#
#   PYTHON          with torch and triton                                                    (python3)
#   SECONDS_IN_ALL  when the last step has to end                                            (520)
#   PACK            1: OUTDIR keeps steps.csv, summary.md and, of steps that have ended, all (0)
#                   else in results.tar.gz, at most the last 500 kB of each log: under 16 MiB
#   WHEELS          a folder of wheels to install first, without a network (benchmarks/README.md); NAME.whl.0 and
#                   NAME.whl.1 are the two halves of one that is too large for a single transfer  (none)
set -uo pipefail

out=${1:?usage: benchmarks/gpu_suite.sh OUTDIR [WINDOW...]}
shift
windows=("$@")
((${#windows[@]})) || windows=(main choices tests sizes models sanitizers)
for window in "${windows[@]}"; do
  if [[ ! " main choices tests sizes models sanitizers " == *" $window "* ]]; then
    echo "there is no window $window; there are main, choices, tests, sizes, models and sanitizers" >&2
    exit 2
  fi
done
unset CDPATH
if [[ ! ${PACK:-0} == [01] ]]; then
  echo "PACK: got '$PACK', wanted 0 or 1" >&2
  exit 2
fi
if [[ ! ${SECONDS_IN_ALL:-520} =~ ^[0-9]+$ ]]; then
  echo "SECONDS_IN_ALL: got '$SECONDS_IN_ALL', wanted a number of seconds" >&2
  exit 2
fi
if [[ -n ${WHEELS:-} ]]; then
  WHEELS=$(cd -- "$WHEELS" && pwd) || exit 2
fi
PYTHON=${PYTHON:-python3}
if [[ $PYTHON == */* && $PYTHON != /* ]]; then
  PYTHON=$PWD/$PYTHON
fi
mkdir -p -- "$out" || exit 2
out=$(cd -- "$out" && pwd) || exit 2
cd -- "$(dirname -- "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
deadline=$((SECONDS + 10#${SECONDS_IN_ALL:-520}))
columns="step,status,seconds,words"
shopt -s nullglob
old=("$out"/*.csv "$out"/*.log)
for file in "$out"/{summary.md,results.tar.gz,results.tar.gz.part}; do
  [[ ! -e $file ]] || old+=("$file")
done
first=
[[ ! -f $out/steps.csv ]] || read -r first < "$out/steps.csv"
if ((${#old[@]})) && [[ $first != "$columns" ]]; then
  echo "$out holds files of something else, which could be overwritten; name another OUTDIR:" "${old[@]##*/}" >&2
  exit 2
fi
if ((${#old[@]})); then  # those of an earlier run, and no others
  while IFS=, read -r name _; do
    [[ ! $name =~ ^[a-z0-9_]+$ ]] || rm -f -- "$out/$name.csv" "$out/$name.log"
  done < "$out/steps.csv"
  rm -f -- "$out"/{steps.csv,summary.md,results.tar.gz,results.tar.gz.part}
fi
echo "$columns" > "$out/steps.csv"

kept=$out  # where the results of steps that have ended are
if ((${PACK:-0})); then kept=$(mktemp -d); fi
site=$(mktemp -d)
trap 'rm -rf -- "$site"; [[ $kept == "$out" ]] || rm -rf -- "$kept"' EXIT

tell() {  # tell [--unfinished]: writes summary.md, of a run that goes on with the option; moves what has ended into the pack
  local name file code ended=()
  if [[ $kept != "$out" ]]; then
    while IFS=, read -r name _; do
      for file in "$out/$name".{log,csv}; do
        [[ ! -f $file ]] || { tail -c 500000 "$file" > "$kept/${file##*/}" && ended+=("$file"); }
      done
    done < "$out/steps.csv"
    cp -- "$out/steps.csv" "$kept"
  fi
  "$PYTHON" benchmarks/gpu_summary.py "$kept" --windows "${windows[@]}" "$@"
  code=$?
  if [[ $kept != "$out" ]]; then
    cp -- "$kept/summary.md" "$out"
    (cd -- "$kept" && tar -czf "$out/results.tar.gz.part" -- *) && mv -- "$out/results.tar.gz.part" "$out/results.tar.gz" &&
      rm -f -- ${ended[@]+"${ended[@]}"}
  fi
  return "$code"
}

record() {  # record STEP STATUS SECONDS WORDS: WORDS without what a CSV would read as more than words
  local words
  words=$(LC_ALL=C tr -cd ' !#-+\055-~' <<< "$4" | cut -c 1-200)
  printf '%s,%s,%s,%s\n' "$1" "$2" "$3" "$words" >> "$out/steps.csv"
  printf '%-18s %-12s %4s s  %s\n' "$1" "$2" "$3" "$words" 2> /dev/null || exec > /dev/null  # nobody reads it any more
  tell --unfinished > /dev/null
}
trap '' PIPE  # a write without a reader fails instead

step() {  # step NAME LIMIT COMMAND...; with $checks, a word, a log without "1 $checks" or more is a failure
  local name=$1 limit=$2 began=$SECONDS left=$((deadline - SECONDS)) status=ok code
  shift 2
  if ((left < 10)); then
    record "$name" "no time left" 0 "$*"
    return
  fi
  ((limit < left)) || limit=$left
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 &
  running=$!  # in the background: a signal that comes meanwhile is acted upon at once
  wait "$running"
  code=$?
  running=
  if ((code == 124 || (code == 137 && SECONDS - began >= limit))); then
    status="timed out"
  elif ((code)); then
    status=failed
  elif [[ -n ${checks:-} ]] && ! grep -qaE "(^|[^0-9])[1-9][0-9]* ($checks)" "$out/$name.log"; then
    status="checked nothing"
  fi
  record "$name" "$status" "$((SECONDS - began))" "$(tail -c 2000 "$out/$name.log" | tr -d '\0' | grep -a . | tail -n 1)"
}

running=
name=
stopped() {  # stopped CODE: ends the running step, which timeout has put into a process group of its own
  trap '' INT TERM HUP
  if [[ -n $running ]]; then
    kill -TERM "$running"
    wait "$running"
    [[ -z $name ]] || record "$name" stopped "$((SECONDS - began))" "by signal $(($1 - 128))"
  fi
  exit "$1"
}
trap 'stopped 130' INT
trap 'stopped 143' TERM
trap 'stopped 129' HUP

layer() {  # layer NAME LIMIT forward|training OPTIONS...: one CSV of layers
  step "$1" "$2" "$PYTHON" "benchmarks/moe_$3.py" --device cuda --skip-failing --seconds 1.5 --csv "$out/$1.csv" "${@:4}"
}

declare -A has
probe() {  # probe MODULE: whether Python has it, asked once and while there is time
  local left=$((deadline - SECONDS))
  if [[ -z ${has[$1]:-} ]]; then
    has[$1]=no
    ((left > 0)) || return 1
    timeout "$((left < 30 ? left : 30))" "$PYTHON" -c "import $1" &> /dev/null &
    running=$!
    wait "$running" && has[$1]=yes
    running=
  fi
  [[ ${has[$1]} == yes ]]
}

needing() {  # needing PROGRAM|MODULE.py NAME LIMIT COMMAND...: a step, skipped where its tool is not installed
  if command -v "$1" > /dev/null || { [[ $1 == *.py ]] && { ((deadline - SECONDS < 10)) || probe "${1%.py}"; }; }; then
    step "${@:2}"
  else
    record "$2" skipped 0 "needs ${1%.py}"
  fi
}

sanitized() {  # sanitized TOOL LIMIT: small shapes under compute-sanitizer, every tensor in an allocation of its own
  checks=passed needing compute-sanitizer "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 9 \
    "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider tests/clipup_kernels/test_cuda.py -m "not slow" -k small
}

workers=()  # most of the tests' time is Triton compiling
probe xdist && workers=(-n 6)
smoke="triton_is_used or small_experts or (experts_follow and tiled and dropless) or inference_gives"
smoke+=" or (gating_and and 777 and triton) or (rows_and and large and not capacity and not masked) or (host_never and triton)"
smoke+=" or (twenty_runs_agree and triton) or (graph_replays and triton)"
main_case=(--shapes 50000x768x3072)
other_cases=(--shapes 4096x768x3072 50000x512x2048 50000x1024x4096 200000x768x3072 400000x768x3072)  # the largest last

built=
build() {  # the extension, whose CUDA C++ some windows test and measure
  [[ -n $built ]] || step build 120 "$PYTHON" setup.py build_ext --inplace
  built=1
}

window_main() {
  checks=checks step self_check 110 "$PYTHON" -m clipup_kernels.self_check cuda
  step kernels 100 "$PYTHON" benchmarks/gpu_kernels.py --csv "$out/kernels.csv"
  layer forward 85 forward "${main_case[@]}" --dtype bf16
  layer training 110 training "${main_case[@]}" --dtype bf16
  checks=passed step smoke 60 "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider ${workers[@]+"${workers[@]}"} \
    tests/clipup_kernels/test_cuda.py -m "not slow" -k "$smoke"
}

window_choices() {
  step choices 250 "$PYTHON" benchmarks/gpu_choices.py --csv "$out/choices.csv"
}

window_tests() {  # -v: a log that is cut off by the time still names what failed
  build
  checks=passed step cuda_tests 340 "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider ${workers[@]+"${workers[@]}"} \
    tests/clipup_kernels/test_cuda.py -m "not slow"
}

window_sizes() {
  layer forward_sizes 65 forward "${other_cases[@]}" --dtype bf16
  layer training_sizes 80 training "${other_cases[@]}" --dtype bf16
  layer forward_narrow 35 forward --shapes 4096x128x512 200000x128x512 --dtype bf16
  layer forward_fp16 45 forward "${main_case[@]}" --dtype fp16
  layer training_fp16 50 training "${main_case[@]}" --dtype fp16
  build
  step routing_stages 85 "$PYTHON" benchmarks/gpu_stages.py --csv "$out/routing_stages.csv"
}

window_models() {  # with a batch of 64 they wait for the host; a step of L/14 with one of 512 saves 108 GiB
  local throughput=("$PYTHON" benchmarks/clip_throughput.py --device cuda --seconds 4)
  throughput+=(--models ViT-B-16 "ViT-B-16 CLIP-UP" ViT-L-14)
  needing open_clip.py clip_inference 140 "${throughput[@]}" --batch-size 512 --csv "$out/clip_inference.csv"
  needing open_clip.py clip_training 190 "${throughput[@]}" --batch-size 256 --pass fwd_bwd --csv "$out/clip_training.csv"
}

window_sanitizers() {
  build
  sanitized memcheck 170
  sanitized racecheck 170
}

if [[ -n ${WHEELS:-} ]]; then
  wheels=("$WHEELS"/*.whl)
  for half in "$WHEELS"/*.whl.0; do
    whole=$site/${half##*/}
    cat -- "$half" "${half%0}1" > "${whole%.0}" && wheels+=("${whole%.0}")
  done
  # A folder on PYTHONPATH is not searched for .pth files, which some wheels have
  printf 'import os, site\nsite.addsitedir(os.path.dirname(os.path.abspath(__file__)))\n' > "$site/sitecustomize.py"
  step wheels 90 "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site" "${wheels[@]}"
  export PYTHONPATH="$PYTHONPATH:$site"
fi
step device 40 "$PYTHON" -c \
  "import torch, triton; print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__)"
for window in "${windows[@]}"; do "window_$window"; done
tell
