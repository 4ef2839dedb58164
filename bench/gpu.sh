#!/usr/bin/env bash
# All that wants a GPU, the most telling first, in calls of ten minutes:
#
#   bash bench/gpu.sh smoke ops          vLLM alone, then groups in it; then the kernels against the reference
#   bash bench/gpu.sh engine sanitize    the engine's tests; compute-sanitizer on the CUDA kernels
#   bash bench/gpu.sh bench              attend, whole groups, ops, and configurations of the Triton kernels
#
# A step that fails does not stop the others; one that no longer fits into the call is not run. The exit status is 0 only
# if every step ran and passed; the last lines say which did not.
#
# Needs nvcc, compute-sanitizer for its part, and a Python with PyTorch for CUDA, Triton, setuptools, pybind11 and pytest:
# .venv/bin/python where `make setup` has made it, else python3. Nothing is installed: the extension is built in place.
#
#   PYTHON   another interpreter
#   OUT      folder for logs.tgz, the results of the benchmarks and configs.json (gpu in bench/results)
#   BUNDLE   folder of a packed vLLM, for a machine without vLLM and network: `bash install.sh FOLDER TARGET` in it must
#            unpack to TARGET and print what to set in the environment
#   BUDGET   seconds that the call may take (570)
#   CACHES   folder for what Triton and vLLM compile, which a later call finds again (/tmp/fastsmc-caches)
set -u
cd "$(dirname "$0")/.."
for part in "${@:-}"; do
  case $part in
    smoke | ops | engine | sanitize | bench) ;;
    *)
      echo "'$part': give one or more of smoke, ops, engine, sanitize, bench" >&2
      exit 2
      ;;
  esac
done
out=${OUT:-bench/results/gpu}
budget=${BUDGET:-570}
caches=${CACHES:-/tmp/fastsmc-caches}
mkdir -p "$out" "$caches" || exit 2
logs=$(mktemp -d)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
summary=()
failed=0
unset LD_PRELOAD

finish() {
  printf '%s\n' "${summary[@]}" | tee "$logs/summary.txt"
  tar -czf "$out/logs.tgz" -C "$logs" . && rm -rf "$logs"
}
trap finish EXIT

step() {  # name, seconds at most, command
  local name=$1 most=$2 begin=$SECONDS left=$((budget - SECONDS)) code
  shift 2
  if [ "$left" -lt 20 ]; then
    summary+=("$name: NOT RUN, $left s are left")
    failed=1
    return 1
  fi
  timeout -k 5 $((most < left ? most : left)) "$@" >"$logs/$name.log" 2>&1
  code=$?
  [ $code -eq 0 ] || failed=1
  # engines that have outlived the step
  nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader 2>&1 | sed "s/^/after $name: /" >>"$logs/left_over.log"
  summary+=("$name: exit $code after $((SECONDS - begin)) s")
  printf '== %s\n%s\n' "${summary[-1]}" "$(tail -n 12 "$logs/$name.log")"
  return $code
}

# -------------------------------------------------------------------------------------- set-up, once on each machine
if [ -n "${BUNDLE:-}" ]; then
  if ! [ -s "$caches/site.env" ]; then
    bash "$BUNDLE/install.sh" "$BUNDLE" "$caches/site" >"$caches/site.part" || exit 3
    mv "$caches/site.part" "$caches/site.env"
  fi
  # shellcheck source=/dev/null
  . "$caches/site.env"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=$caches/triton VLLM_CACHE_ROOT=$caches/vllm XDG_CACHE_HOME=$caches/xdg
arch=$("$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))') || exit 4
built() { "$python" -c "import fastsmc._C as c; assert $arch in c.cuda_archs" 2>/dev/null; }
# egg_info: the entry points, by which potentials have names
built || step build 240 env FASTSMC_BUILD_CUDA=1 "FASTSMC_CUDA_ARCHS=$arch" "$python" setup.py -q egg_info build_ext --inplace
built || exit 5
{
  nvidia-smi
  "$python" -c 'import torch, triton, vllm; print(torch.__version__, triton.__version__, vllm.__version__)'
  "$python" -m fastsmc.cli info
} >"$logs/machine.log" 2>&1
tail -n 14 "$logs/machine.log"

pytest=("$python" -m pytest -q --tb=short -p no:cacheprovider)
each=()  # a test that hangs is ended with its stack in the log, where the plugin for that is there
"$python" -c 'import pytest_timeout' 2>/dev/null && each=(--timeout 120 --timeout-method thread)

# ---------------------------------------------------------------------------------------------------------- the parts
smoke() {
  local run=("$python" bench/gpu_smoke.py)
  step vllm_alone 90 "${run[@]}" --only-vllm --eager --backend TRITON_ATTN ||
    step vllm_alone_v1_runner 60 env VLLM_USE_V2_MODEL_RUNNER=0 "${run[@]}" --only-vllm --eager --backend TRITON_ATTN
  step groups_triton 120 "${run[@]}" --eager --backend TRITON_ATTN ||
    step groups_triton_v1_runner 90 env VLLM_USE_V2_MODEL_RUNNER=0 "${run[@]}" --eager --backend TRITON_ATTN
  step groups_flash 90 "${run[@]}" --eager --backend FLASH_ATTN --dtype float16
  # compiled, with graphs, the engine in a process of its own
  step groups_compiled 150 env VLLM_ENABLE_V1_MULTIPROCESSING=1 "${run[@]}" --backend FLASH_ATTN --dtype bfloat16 ||
    step groups_compiled_no_aot 120 env VLLM_USE_AOT_COMPILE=0 "${run[@]}" --backend FLASH_ATTN --dtype bfloat16
}

ops() {
  step gpu_start 90 "${pytest[@]}" "${each[@]}" tests/test_gpu_start.py
  step ops 200 "${pytest[@]}" "${each[@]}" --maxfail 20 tests/ops --ignore tests/ops/test_interpreted.py -k "cuda or triton"
  step captured 120 "${pytest[@]}" "${each[@]}" tests/test_captured.py -k "cuda or attend or replays"
}

engine() {
  step attend_gpu_tests 200 "${pytest[@]}" "${each[@]}" --maxfail 5 tests/engine/test_attend_gpu.py
  # without attend on the CPU, a model that has to be there, and a second GPU
  step engine_tests 350 "${pytest[@]}" "${each[@]}" --maxfail 10 tests/engine --ignore tests/engine/test_attend.py \
    --ignore tests/engine/test_attend_gpu.py --ignore tests/engine/test_real_model.py \
    --ignore tests/engine/test_tensor_parallel.py
}

sanitize() {  # no initcheck: PyTorch's own kernels, which are watched too, make it complain
  local check=(compute-sanitizer --error-exitcode 9) only=(-k "cuda and not captured and not replays")
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # or what lies behind a tensor is another's and no error
  step memcheck 240 "${check[@]}" --tool memcheck "${pytest[@]}" tests/ops/test_resample.py tests/ops/test_reindex.py \
    tests/ops/test_uniforms.py "${only[@]}"
  # the only kernels with shared memory and barriers
  step racecheck 180 "${check[@]}" --tool racecheck "${pytest[@]}" tests/ops/test_resample.py "${only[@]}"
  step synccheck 120 "${check[@]}" --tool synccheck "${pytest[@]}" tests/ops/test_resample.py "${only[@]}"
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

bench() {
  # in the user's default, the engine in a process of its own
  export VLLM_ENABLE_V1_MULTIPROCESSING=1
  step bench_attend 80 "$python" bench/bench_attend.py gpu --json "$out/attend_gpu.json"
  step bench_smc 220 "$python" bench/bench_smc.py --shapes llama-3.1-8b --max-tokens 128 --repeats 2 \
    --cases 64:512,256:512,1024:512 --json "$out/smc_gpu.json"
  step bench_ops 110 "$python" bench/bench_ops.py --seconds 0.3 --json "$out/ops_gpu.json"
  # keeps what it has found when its time is over
  step tune 150 "$python" bench/tune.py --out "$out/configs.json"
}

for part in "$@"; do $part; done
exit $failed
