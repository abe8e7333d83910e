#!/usr/bin/env bash
# Builds, checks, tests and measures everything on the GPU of this machine, offline, in under 8 minutes.
# Every stage runs under its own time limit and whatever became of the stages before it. The tree stays as it is:
# all work happens in a temporary copy, nothing is installed into the system's Python.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: bench/gpu_suite.sh [--device cuda|cpu] [--quick] [--stages NAME,NAME...] [OUT]

Run it from the root of the project; the Python to use is $PYTHON (python3). It leaves in OUT, by default
bench/results/<card>/:
  yardsticks.csv    every measurement (columns: bench/README.md)
  kernels.csv       every Triton kernel as it is compiled for this card
  dram.csv          bytes at the memory beside those of our accounts, where Nsight Compute is installed
  stages.csv        every stage with its outcome, exit status and seconds
  environment.json  the machine and its software
  suite.log         what the stages printed
  summary.txt       the closing table

  --quick    toy sizes: does everything run? The figures mean nothing.
  --device   cpu goes with --quick only
  --stages   of environment, build, kernels, check, tests, sanitizer, bandwidth, step, compiled, selection, training,
             dram (default: all)

Exit status: 0 all stages passed, 1 some did not, 2 wrong usage, 3 no CUDA device, 130 interrupted (the closing
table is written nevertheless).
TEXT
}

# Seconds each stage may take: 470 in all, which with start-up and summary stays under 8 minutes. What is right comes
# first, then what is fast.
readonly STAGES=(environment build kernels check tests sanitizer bandwidth step compiled selection training dram)
declare -rA LIMITS=(
  [environment]=10 [build]=65 [kernels]=35 [check]=40 [tests]=75 [sanitizer]=45
  [bandwidth]=15 [step]=35 [compiled]=35 [selection]=40 [training]=40 [dram]=35
)

fail_usage() {
  printf 'error: %s\n\n' "$1" >&2
  usage >&2
  exit 2
}

device=cuda
quick=()
out=
wanted=("${STAGES[@]}")
while (($#)); do
  case $1 in
    --device)
      device=${2-}
      shift
      ;;
    --quick) quick=(--quick) ;;
    --stages)
      IFS=, read -r -a wanted <<<"${2-}"
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) fail_usage "unknown option $1" ;;
    *)
      [[ -z $out ]] || fail_usage "expected one OUT, got $out and $1"
      out=$1
      ;;
  esac
  shift || fail_usage "an option lacks its value"
done
[[ $device == cuda || $device == cpu ]] || fail_usage "--device: expected cuda or cpu, got '$device'"
[[ $device == cuda || ${#quick[@]} -gt 0 ]] || fail_usage "--device cpu measures nothing worth having: add --quick"
((${#wanted[@]})) || fail_usage "--stages: expected at least one name"
for stage in "${wanted[@]}"; do
  [[ -n $stage && -n ${LIMITS[$stage]-} ]] || fail_usage "--stages: expected some of ${STAGES[*]}, got '$stage'"
done
root=$PWD
[[ -f $root/bench/gpu_suite.sh ]] || fail_usage "run it from the root of the project"
python=$(command -v "${PYTHON:-python3}") || fail_usage "no Python: ${PYTHON:-python3} not found"
[[ $python == /* ]] || python=$root/$python

# The first use of torch also answers whether there is a device. -B: no bytecode in the tree.
slug=$(PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -B -m bench slug --device "$device")
status=$?
if ((status)); then
  ((status == 3)) || echo "error: $python cannot run the benchmarks (torch 2.10 or later is needed)" >&2
  exit "$status"
fi
out=${out:-bench/results/$slug}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
rm -f "$out"/{yardsticks.csv,kernels.csv,dram.csv,stages.csv,environment.json,suite.log,summary.txt}

work=$(mktemp -d) || exit 1
running=
interrupted=0
trap 'rm -rf "$work"' EXIT
trap 'interrupted=1; [[ -z $running ]] || kill "$running"' INT TERM
copy=$work/tree
site=$work/site
mkdir "$copy" "$site"
tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./build --exclude=./runs --exclude=./bench/results \
  --exclude=./data --exclude='*.egg-info' --exclude='*.so' --exclude=__pycache__ -cf - . | tar -C "$copy" -xf -
cd "$copy" && [[ -f bench/gpu_suite.sh ]] || exit 1

# The installed packages come first and the copied tree, for `bench`, last. PYTHONSAFEPATH keeps the working
# directory out of sys.path, where the sources would hide the installed package and its compiled part.
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}:$copy
export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor

build() {
  "$python" -m pip install --no-index --no-build-isolation --no-deps --target "$site" . || return
  "$python" -c 'import granet_kernels as kernels; print(kernels.build_info()); print(kernels.available_backends())'
}

# All kernels for this card, by all processors; what is compiled here the stages behind this find in Triton's cache.
kernels() {
  local some=()
  [[ $device == cuda ]] || some=(--only mask table --target 90) # a sample: does it run?
  "$python" -m bench.kernels "${some[@]:---card}" --out "$out/kernels.csv"
}

# Every kernel once, without torch's own memory pool: each tensor ends where its allocation does.
sanitizer() {
  local tool program
  program=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if [[ $device == cpu || ! -x $program ]]; then
    echo "skipped: no GPU, or no compute-sanitizer (it comes with the CUDA toolkit)"
    return 0
  fi
  local running=() status=0
  for tool in memcheck racecheck; do # side by side: most of their time is loading torch
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -o addopts= -p no:cacheprovider --import-mode=append -q \
      tests/test_gpu_kernels.py -k "every_kernel_once and float32" &
    running+=($!)
  done
  for tool in "${running[@]}"; do wait "$tool" || status=$?; done
  return "$status"
}

# Single kernels, at the clocks and with the caches as they are.
dram() {
  local program
  program=$(command -v ncu || echo "${CUDA_HOME:-/usr/local/cuda}/bin/ncu")
  if [[ $device == cpu || ! -x $program ]]; then
    echo "skipped: no GPU, or no Nsight Compute"
    return 0
  fi
  "$program" --clock-control none --cache-control none --profile-from-start off --print-units base --csv \
    --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum --log-file "$work/ncu.csv" \
    "$python" -m bench.dram run --out "$work/operations.csv" || return
  "$python" -m bench.dram table "$work/ncu.csv" "$work/operations.csv" --out "$out/dram.csv"
}

gpu_tests() {
  # Configured options may name plugins that are not here; a test file whose imports are missing must not
  # keep the others from running. "append" leaves the installed package first in sys.path.
  local files workers=()
  mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
  # Most of their time is Python's and Triton's compiler's.
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 6 --dist loadgroup)
  "$python" -m pytest -m gpu -o addopts= -p no:cacheprovider --import-mode=append --continue-on-collection-errors \
    -v --durations=10 "${workers[@]}" "${files[@]}"
  local status=$?
  if ((status == 5)) && [[ $device == cpu ]]; then
    echo "no test selected: as it should be without a GPU"
    return 0
  fi
  return "$status"
}

measure() { # group, seconds
  local until=$(($(date +%s) + ($2 > 20 ? $2 - 8 : $2 / 2))) # the rest is for the last round
  "$python" -m bench measure --device "$device" "${quick[@]}" --group "$1" --until "$until" --out "$out/yardsticks.csv"
}

stage_body() { # name, limit
  case $1 in
    environment) "$python" -m bench environment --device "$device" --out "$out/environment.json" ;;
    build) build ;;
    kernels) kernels ;;
    check) "$python" -m granet check ;;
    tests) gpu_tests ;;
    sanitizer) sanitizer ;;
    dram) dram ;;
    *) measure "$1" "$2" ;;
  esac
}

# `timeout` runs programs, not functions: it runs a shell that has been given them.
export python site device out work
export -f build kernels gpu_tests sanitizer dram measure stage_body
run_stage() { # name
  local limit=${LIMITS[$1]} begin end status outcome
  [[ $device == cuda ]] || limit=$((limit * 4)) # compiling on a small machine
  printf '%-12s ' "$1"
  printf '\n===== %s (limit %s s)\n' "$1" "$limit" >>"$out/suite.log"
  begin=$(date +%s%N)
  # shellcheck disable=SC2016 # the inner shell expands these
  timeout -k 5 "$limit" bash -c 'quick=("${@:3}"); stage_body "$1" "$2"' stage "$1" "$limit" "${quick[@]}" \
    >>"$out/suite.log" 2>&1 </dev/null &
  running=$!
  wait "$running" # a signal interrupts `wait`, but not a program in the foreground
  status=$?
  ((interrupted)) && wait "$running"
  running=
  end=$(date +%s%N)
  case $interrupted,$status in
    1,*) outcome=interrupted ;;
    *,0) outcome=passed ;;
    *,124) outcome='timed out' ;;
    *,137) outcome=killed ;; # by the limit's second signal, or for want of memory
    *) outcome=failed ;;
  esac
  local seconds
  seconds=$(printf '%d.%d' $(((end - begin) / 1000000000)) $(((end - begin) / 100000000 % 10)))
  printf '%-11s %6s s\n' "$outcome" "$seconds"
  echo "$1,$outcome,$status,$seconds,$limit" >>"$out/stages.csv"
  ((status == 0))
}

log_of() { # stage
  awk -v head="===== $1 " 'index($0, "===== ") == 1 { on = index($0, head) == 1 } on' "$out/suite.log"
}

echo "stage,outcome,exit_status,seconds,limit_s" >"$out/stages.csv"
failed=()
for stage in "${wanted[@]}"; do
  run_stage "$stage" || failed+=("$stage")
  ((interrupted)) && break
done
trap '' INT TERM # whoever is in a hurry gets the summary all the same

{
  echo "granet_kernels on $slug, $(date -u +%Y-%m-%dT%H:%M:%SZ), ${SECONDS} s in all"
  echo
  while IFS=, read -r stage outcome status seconds limit; do
    printf '%-12s %-11s %6s %8s %8s\n' "$stage" "$outcome" "${status/exit_status/exit}" "$seconds" "$limit"
  done <"$out/stages.csv"
  echo
  if [[ -s $out/yardsticks.csv ]]; then
    "$python" -m bench table "$out/yardsticks.csv"
    if [[ $device == cuda && ${#quick[@]} -eq 0 ]]; then
      printf '\n----- targets\n'
      "$python" -m bench targets "$out/yardsticks.csv"
    fi
    if [[ -s $out/dram.csv ]]; then
      printf '\n----- bytes at the memory\n'
      log_of dram | tail -n +2
    fi
  else
    echo "nothing was measured"
  fi
  for stage in "${failed[@]}"; do
    printf '\n----- %s, end of its output (all of it: suite.log)\n' "$stage"
    log_of "$stage" | tail -n 20
  done
} >"$out/summary.txt" 2>&1
echo
cat "$out/summary.txt"
echo
echo "results: $out"
((interrupted)) && exit 130
((${#failed[@]} == 0))
