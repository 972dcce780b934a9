#!/usr/bin/env bash
# What needs a GPU, in parts that each end by themselves. Every result is in $OUT as soon as it is there.
# usage: OUT=folder benchmarks/gpu.sh [tests] [bench] [model] [steps] [open]     (the first three by default)
#   tests  kernel tests (6 min at most)            bench  the four kernel benches (5)
#   model  a whole model: decode and memory (4)    steps  the same for 25 % of multi-head attention, and prefill in chunks (3)
#   open   what the list "Not measured yet" of benchmarks/README.md names, shortest first (6); wants the GPU alone
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
parts="${*:-tests bench model}"
run() { # name seconds command…: JSON to $OUT/name.json, the rest to $OUT/name.log
    local name="$1" seconds="$2"; shift 2
    timeout "$seconds" "$@" > "$OUT/$name.json" 2> "$OUT/$name.log" || echo "$name: ended with $?"
    tail -c 600 "$OUT/$name.log"
}
case " $parts " in *" tests "*)
    timeout "${TESTS_S:-360}" python3 -m pytest -q -p no:cacheprovider -n "${WORKERS:-8}" -m gpu tests/attention tests/test_steps_gpu.py \
        2>&1 | tee "$OUT/tests.log" | tail -n 25 ;;
esac
case " $parts " in *" bench "*)
    for case in attention spans blocks decode; do
        timeout 200 python3 -m headwise bench "$case" --out "$OUT" 2>&1 | tee "$OUT/$case.log" | tail -n 45
    done ;;
esac
case " $parts " in *" model "*) run end_to_end 240 python3 benchmarks/end_to_end.py --shapes gqa ;; esac
case " $parts " in *" steps "*)
    run prefill_chunks 60 python3 benchmarks/end_to_end.py --shapes gqa mha --lengths --prefill 32768 --chunk 0 8192
    run end_to_end_mha 120 python3 benchmarks/end_to_end.py --shapes mha --lengths 32768 131072 --batches 1 4 ;;
esac
case " $parts " in *" open "*)
    timeout 90 python3 -m pytest -q -p no:cacheprovider tests/route/test_permute.py tests/route/test_fused.py \
        tests/papers/test_step.py tests/steer/test_var_rows.py > "$OUT/open_tests.log" 2>&1; tail -n 5 "$OUT/open_tests.log"
    run experts 80 python3 benchmarks/experts.py --device cuda --dtype bfloat16
    timeout 60 python3 -m pytest -q -p no:cacheprovider tests/steer/test_vlm_steps.py >> "$OUT/open_tests.log" 2>&1; tail -n 2 "$OUT/open_tests.log"
    run vlm 90 python3 benchmarks/vlm.py overhead --device cuda
    run vlm_kernel 40 python3 benchmarks/vlm.py kernel
    run sweep 60 python3 benchmarks/vision.py sweep --device cuda --rounds 3
    run transformer 60 python3 benchmarks/vision.py transformer --device cuda
    run throughput 70 python3 benchmarks/throughput.py --device cuda
    run patching 150 python3 benchmarks/patching/gpu.py --every 2 --rows 96,384 --out "$OUT/patching_h200.json" ;;
esac
