#!/usr/bin/env bash
# Everything worth measuring on a machine with one GPU, most valuable first, resumable: a part that has left its result
# under OUT is skipped, and a benchmark that was cut short goes on with its next row. Without a GPU it runs on the CPU.
#   OUT=DIR ./scripts/gpu_suite.sh        PYTHON=… for another interpreter; OUT defaults to runs/gpu_suite
#   PARTS="gpu_tests device_base_64" ./scripts/gpu_suite.sh        only these
#   SECONDS_LEFT=560 ./scripts/gpu_suite.sh                        begin no part after so many seconds
#   DRY=1 ./scripts/gpu_suite.sh          every part at tiny geometry, in minutes on a CPU; says nothing about speed
#
# Time plan (measured on an H200 with 16 cores, where a figure is not marked ~, which is an estimate; no part runs longer than
# PART_SECONDS, 540):
#   environment, gpu_tests     TEST_WORKERS processes, 8 unless set                  ~3 min
#   gather_probe       the gather kernel against the copy engine, 1 to 20 MB          13 s
#   step_profile       the kernels of captured steps of Base-8                       15 s
#   device_base_64     captured steps, bf16 and int8 slabs; beside them Hugging Face
#                      generate and Accelerate                                       105 s
#   device_base        Base-8, 128 and 256 in bf16 (Figures 11 and 12)                90 s
#   device_large       Large-128 in bf16                                             ~3 min
#   device_fp8         Base-64 with fp8 slabs                                        ~1 min
#   device_batches     Base-128, batch 8 and 32                                      ~2 min
#   host_base_64       the host-driven engine on the same                            ~2 min
#   decoder_only       OLMoE-1B-7B and Qwen3-30B-A3B in bf16, captured and host-driven,
#                      beside Accelerate (61 GB of page-locked memory for Qwen3)     ~9 min
#   fig11 fig10 fig15 fig16_dram fig16_disk fig14 fig12   the paper's settings      ~25 min
#   training_speed     training beside transformers' own Trainer; reads PREGATE_DATA ~8 min
#   quickstart         the whole road end to end                                     ~2 min
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${OUT:-runs/gpu_suite${DRY:+_dry}}"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
mkdir -p "$out"
begun=$SECONDS
failed=""
tiny=()
share="17%" # of the experts: two whole blocks, which prefetch_all needs
if [ -n "${DRY:-}" ]; then
  share="100%"
  tiny=(bench.prompt_len=8 bench.new_tokens=4 bench.repeats=1)
fi

part() { # name command...
  local name="$1"
  shift
  if [ -n "${PARTS:-}" ] && [[ " $PARTS " != *" $name "* ]]; then return; fi
  if [ -e "$out/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  local left=$((${SECONDS_LEFT:-1000000} - (SECONDS - begun)))
  if [ "$left" -lt 20 ]; then
    echo "== $name: no time left"
    return
  fi
  echo "== $name"
  if timeout "$((left < ${PART_SECONDS:-540} ? left : ${PART_SECONDS:-540}))" "$@" >>"$out/$name.log" 2>&1; then
    touch "$out/$name.done"
  else
    failed="$failed $name"
    echo "   failed or out of time, see $out/$name.log"
    tail -n 15 "$out/$name.log"
  fi
}

bench() { # name experiment override...
  local name="$1" experiment="$2"
  shift 2
  part "$name" "$python" -m pregate.bench "+experiment=$experiment" tracking=jsonl resume=true run_dir="$out/$name" \
    "$@" ${tiny[@]+"bench.models=[${tiny_model:-nano_switch}]" "${tiny[@]}"}
}

part environment "$python" -c 'from pregate.system.machine import environment; import json; print(json.dumps(environment(), indent=1))'
part gpu_tests "$python" -m pytest -m gpu -n "${TEST_WORKERS:-8}"
part gather_probe "$python" -m studies.profiles.gather_probe --out "$out/gather_probe"
part step_profile "$python" -m studies.profiles.step_profile --out "$out/step_profile" ${DRY:+--model nano_switch}
device=("bench.drives=[device]" "bench.slab_dtypes=[source]")
bench device_base_64 device_driven "bench.drives=[device]" "bench.slab_dtypes=[source,int8]"
bench device_base device_driven "bench.models=[switch_base_8,switch_base_128,switch_base_256]" "bench.baselines=[]" \
  "${device[@]}"
bench device_large device_driven "bench.models=[switch_large_128]" "bench.baselines=[]" "${device[@]}"
bench device_fp8 device_driven "bench.drives=[device]" "bench.slab_dtypes=[fp8]" "bench.baselines=[]"
bench device_batches device_driven "bench.models=[switch_base_128]" "bench.batches=[8,32]" "bench.budgets=[$share]" \
  "bench.baselines=[resident]" "${device[@]}"
bench host_base_64 device_driven "bench.drives=[host]" "bench.slab_dtypes=[source]" "bench.baselines=[resident]"
tiny_model=nano_olmoe bench decoder_only device_driven "bench.models=[olmoe_1b_7b,qwen3_30b_a3b]" "bench.slab_dtypes=[source]" \
  "bench.drives=[device,host]" bench.new_tokens=64
bench fig11 fig11_throughput
bench fig10 fig10_block_latency
bench fig15 fig15_cache ${DRY:+"bench.budgets=[10%,20%]"}
bench fig16_dram fig16_disk "bench.tiers=[dram]"
bench fig16_disk fig16_disk "bench.tiers=[disk]"
bench fig14 fig14_active_experts ${DRY:+"bench.active_experts=[1,4]"} ${DRY:+"bench.budgets=[60%]"}
bench fig12 fig12_peak_memory
part training_speed "$python" -m studies.training_speed --out "$out/training_speed" --seconds 40 \
  ${DRY:+--dry}
part quickstart "$python" -m pregate.train +experiment=quickstart tracking=jsonl resume=true run_dir="$out/quickstart"

if compgen -G "$out/*/bench.jsonl" >/dev/null; then
  "$python" scripts/suite_table.py "$out" --out "$out/suite.md"
fi
echo "== results: $(find "$out" -name bench.md -o -name eval.json -o -name suite.md | sort | tr '\n' ' ')"
if [ -n "$failed" ]; then
  echo "== to be run again:$failed"
  exit 1
fi
