#!/usr/bin/env bash
# Vision models that want a GPU: the three bundled scene models, a DiT with its head search. Results go to $OUT.
# usage: OUT=folder benchmarks/vision_models.sh [scenes] [dit]     (both by default, side by side)
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=2
parts="${*:-scenes dit}"
place="$(mktemp -d)"
case " $parts " in *" scenes "*)
    for seed in 0 1 2; do
        timeout "${SCENES_S:-560}" python3 -m headwise train scene-vlm --size gpu --seed "$seed" --device cuda -o "$place/$seed" \
            > "$OUT/scene-vlm-$seed.log" 2>&1 &
    done ;;
esac
case " $parts " in *" dit "*)
    timeout "${DIT_S:-560}" python3 -m headwise train flow-dit --size gpu --device cuda -o "$place/dit" > "$OUT/flow-dit.log" 2>&1 &
    timeout "${DIT_S:-560}" python3 -m headwise reproduce headhunter-softpag --scale gpu --json \
        > "$OUT/headhunter-softpag-gpu.json" 2> "$OUT/headhunter-softpag-gpu.log" ;;
esac
wait
for seed in 0 1 2; do
    [ -f "$place/$seed/curves.json" ] || continue
    cp "$place/$seed/scene-vlm/model.safetensors" "$OUT/scene-vlm-$seed.safetensors"
    cp "$place/$seed/scene-vlm/config.json" "$OUT/scene-vlm-config.json"
    cp "$place/$seed/curves.json" "$OUT/scene-vlm-$seed.curves.json"
done
[ -f "$place/dit/curves.json" ] && cp "$place/dit/curves.json" "$OUT/flow-dit.curves.json"
tail -n 3 "$OUT"/*.log
