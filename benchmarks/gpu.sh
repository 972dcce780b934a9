#!/usr/bin/env bash
# Everything that needs a GPU, in one go: kernel tests, the four benches, the whole model. Results go to $OUT.
# usage: OUT=folder benchmarks/gpu.sh [tests] [bench] [model]     (all three by default)
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
parts="${*:-tests bench model}"
case " $parts " in *" tests "*)
    timeout "${TESTS_S:-420}" python3 -m pytest -q -p no:cacheprovider -n "${WORKERS:-8}" -m gpu tests/attention 2>&1 | tee "$OUT/tests.log" | tail -n 25 ;;
esac
case " $parts " in *" bench "*)
    for case in attention spans blocks decode; do
        timeout 200 python3 -m headwise bench "$case" --out "$OUT" 2>&1 | tee "$OUT/$case.log" | tail -n 45
    done ;;
esac
case " $parts " in *" model "*)
    timeout 200 python3 benchmarks/end_to_end.py > "$OUT/end_to_end.json" 2> "$OUT/end_to_end.log"; tail -n 40 "$OUT/end_to_end.json"; tail -n 3 "$OUT/end_to_end.log" ;;
esac
