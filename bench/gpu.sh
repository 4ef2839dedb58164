#!/usr/bin/env bash
# All that wants a GPU, in the order in which one wants to know it:
#
#   bash bench/gpu.sh [tests] [sanitize] [bench]       default: all three, about 25 minutes
#
# PYTHON: the interpreter (.venv/bin/python). OUT: for logs and result files (bench/results). A step that fails does not
# stop the others; the last lines say which did.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-bench/results}
parts=${*:-tests sanitize bench}
mkdir -p "$out"
unset LD_PRELOAD
summary=()
failed=0

step() {  # name, seconds at most, command
  local name=$1 most=$2 begin=$SECONDS code
  shift 2
  timeout -k 10 "$most" "$@" >"$out/$name.log" 2>&1
  code=$?
  [ $code -eq 0 ] || failed=1
  summary+=("$name: exit $code after $((SECONDS - begin)) s")
  printf '== %s\n%s\n' "${summary[-1]}" "$(tail -n 15 "$out/$name.log")"
}

pytest=("$python" -m pytest -q --tb=short -p no:cacheprovider)
cuda_only="cuda and not captured and not replays"
for part in $parts; do
  case $part in
    tests)
      step tests_ops 500 "${pytest[@]}" tests/ops tests/test_cuda_build.py --ignore tests/ops/test_interpreted.py
      step tests_captured 200 "${pytest[@]}" tests/test_captured.py
      step tests_attend 300 "${pytest[@]}" tests/engine/test_attend.py tests/engine/test_attend_gpu.py
      step tests_engine 500 "${pytest[@]}" tests/engine
      ;;
    sanitize)
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      for tool in memcheck racecheck initcheck; do
        step "sanitize_$tool" 250 compute-sanitizer --tool $tool --error-exitcode 9 \
          "${pytest[@]}" tests/ops/test_resample.py tests/ops/test_reindex.py tests/ops/test_uniforms.py -k "$cuda_only"
      done
      unset PYTORCH_NO_CUDA_MEMORY_CACHING
      ;;
    bench)
      step tune 300 "$python" bench/tune.py
      step ops_gpu 400 "$python" bench/bench_ops.py --seconds 1 --json "$out/ops_gpu.json"
      step attend_gpu 200 "$python" bench/bench_attend.py gpu --json "$out/attend_gpu.json"
      step smc_gpu 500 "$python" bench/bench_smc.py --shapes llama-3.1-8b --max-tokens 128 --repeats 2 \
        --cases 256:512,1024:512,1024:2048 --json "$out/smc_gpu.json"
      ;;
    *)
      echo "$part: not one of tests, sanitize, bench" >&2
      exit 2
      ;;
  esac
done
printf '%s\n' "${summary[@]}"
exit $failed
