#!/usr/bin/env bash
# The GPU scales of papers 25, 26, 24 and 06 side by side, and what dispatch and routing cost. Results go to $OUT.
# usage: OUT=folder benchmarks/routing_gpu.sh [check] [papers] [bench]     (all three by default; bench wants the GPU alone)
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=2
parts="${*:-check papers bench}"
case " $parts " in *" check "*)
    timeout 200 python3 -m pytest -q -p no:cacheprovider $(ls tests/route/test_permute.py tests/route/test_fused.py tests/papers/test_step.py 2> /dev/null) > "$OUT/routing_check.log" 2>&1
    tail -n 15 "$OUT/routing_check.log" ;;
esac
case " $parts " in *" papers "*)
    for paper in moe-survey graph-of-tokens uoe bam; do
        timeout "${PAPER_S:-420}" python3 -m headwise reproduce $paper --scale gpu --json > "$OUT/$paper.json" 2> "$OUT/$paper.log" &
    done
    wait
    for paper in moe-survey graph-of-tokens uoe bam; do tail -n 2 "$OUT/$paper.log"; grep -E '"(holds|seconds)"' "$OUT/$paper.json"; done ;;
esac
case " $parts " in *" bench "*)
    timeout 200 python3 benchmarks/experts.py --device cuda --dtype bfloat16 > "$OUT/experts.json" 2> "$OUT/experts.log"
    tail -n 3 "$OUT/experts.log"; cat "$OUT/experts.json" ;;
esac
