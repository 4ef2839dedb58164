#!/usr/bin/env bash
# Measures on a CPU what bench/results says of one, most telling first:
#
#   bash bench/cpu.sh OUTDIR [part…]         default: all parts but serve, soak, groups, infill, amortised, order, stderr,
#                                          counterfactual, condition, interchange, alignment, facts, grammar and
#                                          segments_accuracy
#   AGAINST=../old bash bench/cpu.sh OUTDIR against      steps of this tree and of another, in turn
#
# part           minutes on two quiet cores, and what for
# smc            4    README's first table: SMC and stock sampling in turn, the engine as it sets itself up
# step           5    a step's parts, without and with masks
# attend_steps   6    whole steps with attend and with vLLM's attention, in turn
# smc_one_core   6    as smc, but with the model on one core
# ops            2    weigh, draw, resample, reindex
# twist          3    what a twist's head costs a step
# attend_ops     5    one layer's attention, and the costs that the engine's switch goes by (with COSTS=1 it writes them)
# peers          8    genlm-control and llamppl over fastsmc, in turn with their own backend; PEER: its interpreter
#                     (bench/peers/.venv/bin/python)
# grammar       15    steps with a JSON Schema and without in turn, and genlm-control's own JSON path; PEER as above
# infill        25    training and divergences: numbers that a busy machine does not change, only their time
# amortised     20    a twist for many prompts and any continuation, on prompts that it was not trained on: the same
# order          2    orders of ancestors: the same
# stderr        15    whether a run's standard error covers: the same
# counterfactual 25   where texts are left under interventions: the same
# counterfactual_time 3  counterfactuals against the published procedure and against smc, in turn
# p0             4    steps with top_k, top_p, min_p against steps without
# power          8    powers of p0: what a step costs, and the spread of log Ẑ against re-weighted samples
# score          6    continuations of a prompt of 512 tokens against stock prompt_logprobs, in turn
# intervene     17    what interventions cost a step; two engines in turn, with places for them and without
# interchange   25    interchange interventions, Boundless DAS, steered texts in turn with pyvene; PEER as above
# alignment     20    what alignments find where a variable was planted: numbers that a busy machine does not change
# facts          7    where facts stand in SmolLM2: the same
# serve         15    a server against the engine in process, and against a stock server
# soak          30    10,000 requests of random end: what is counted, not timed
# condition     20    questions asked under black boxes, beside genlm-control's AWRS; PEER as above: what is counted
# segments      10    segments against none, a slow reward beside others, its_hub over HTTP; PEER as above
# islands       6     Ray workers against processes by hand, map_prompts against one call, pooling
# segments_accuracy 8  sums in steps by segments, best-of-n and majority: what is counted
# groups        35    several groups against stock, a step by their number, a group beside ordinary requests
# against        6
#
# PYTHON: the interpreter (.venv/bin/python). Everything that is compared runs in turn within one part; medians. Load is
# not refused but recorded, at the start and the end of each part. A part that fails does not stop the others.
set -u
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
  sed -n '2,42s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
python=${PYTHON:-.venv/bin/python}
peer=${PEER:-bench/peers/.venv/bin/python}
out=$1
shift
parts=${*:-smc step attend_steps smc_one_core ops twist attend_ops p0 intervene peers}
mkdir -p "$out"
openmp="$("$python" -c 'import sys; print(sys.prefix)')/lib/libiomp5.so"
if [ -e "$openmp" ]; then export LD_PRELOAD="$openmp"; fi  # as `make` does: keeps OpenMP threads on cores of their own
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
summary=()
failed=0

step() {  # name, command: seconds, exit code, and the load before it
  local name=$1 begin=$SECONDS code load
  shift
  read -r load _ </proc/loadavg
  printf '== %s: load %s; log in %s\n' "$name" "$load" "$out/$name.log"
  "$@" >"$out/$name.log" 2>&1
  code=$?
  [ $code -eq 0 ] || failed=1
  summary+=("$name: exit $code after $((SECONDS - begin)) s, load $load at the start")
  printf '%s\n' "${summary[-1]}"
  tail -n 12 "$out/$name.log"
}

bench() {  # result file's name, script, options
  local name=$1 script=$2
  shift 2
  step "$name" "$python" "bench/$script" "$@" --json "$out/$name.json"
}

cases=16:8,64:8,256:8,256:512
for part in $parts; do
  case $part in
    smc) bench smc_cpu bench_smc.py --cases $cases --repeats 2 ;;
    smc_one_core) VLLM_CPU_OMP_THREADS_BIND=0 bench smc_cpu_one_core bench_smc.py --cases $cases --repeats 2 ;;
    step) bench step_cpu bench_step.py ;;
    groups) bench groups_cpu bench_groups.py ${AGAINST:+--against "$AGAINST"} ;;
    against) bench step_against bench_step.py --against "${AGAINST:?another source tree, built}" --max-tokens 16 ;;
    attend_steps) OMP_NUM_THREADS=1 bench attend_steps_cpu bench_attend.py steps --max-tokens 24 --repeats 3 ;;
    attend_ops) bench attend_ops_cpu bench_attend.py ops --seconds 0.1 ${COSTS:+--costs} ;;
    ops) bench ops_cpu bench_ops.py --seconds 0.8 ;;
    p0) bench p0_cpu bench_p0.py ;;
    power) bench power_cpu bench_power.py ;;
    intervene) bench intervene_cpu bench_intervene.py ;;
    interchange) bench interchange_cpu bench_interchange.py --peer "$peer" ;;
    alignment)
      OMP_NUM_THREADS=1 bench alignment_cpu bench_alignment.py planted --figure docs/figures/alignment.png
      ;;
    facts) OMP_NUM_THREADS=1 bench facts_cpu bench_alignment.py facts --figure docs/figures/facts.png ;;
    serve) bench serve_cpu bench_serve.py ;;
    soak) bench soak_cpu bench_soak.py ;;
    twist) bench twist_cpu bench_twist.py ;;
    peers) bench peers_cpu peers/fastsmc_bench.py --peer "$peer" ;;
    grammar) bench grammar_cpu bench_grammar.py --peer "$peer" ;;
    infill) bench infill_cpu bench_infill.py ;;
    amortised) OMP_NUM_THREADS=1 bench infill_amortised_cpu bench_infill.py amortised ;;
    score) bench score_cpu bench_score.py ;;
    counterfactual) OMP_NUM_THREADS=1 bench counterfactual_cpu bench_counterfactual.py found ;;
    counterfactual_time) bench counterfactual_time_cpu bench_counterfactual.py time ;;
    condition) OMP_NUM_THREADS=1 bench condition_cpu bench_condition.py --max-tokens 20 --seeds 6 --peer "$peer" ;;
    segments) bench segments_cpu bench_segments.py --peer "$peer" ;;
    islands)
        bench islands_cpu bench_islands.py --parts workers
        bench pooling_cpu bench_islands.py --parts pool ;;
    segments_accuracy) bench segments_accuracy_cpu segments_accuracy.py ;;
    stderr) OMP_NUM_THREADS=1 bench stderr_cpu bench_stderr.py ;;
    order) bench resample_order bench_order.py ;;
    *)
      echo "$part: no such part; see the list at the top of bench/cpu.sh" >&2
      exit 2
      ;;
  esac
done
printf '%s\n' "${summary[@]}"
exit $failed
