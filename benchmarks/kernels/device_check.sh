#!/usr/bin/env bash
# Kernel tests and benchmarks without the rest of the package: the kernel package alone under an empty `headwise`.
# usage: device_check.sh PYTEST_ARGS... -- BENCH_ARGS...   (a lone word `none` skips that half)
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
site=$(mktemp -d)
mkdir -p "$site/headwise/attention" && touch "$site/headwise/__init__.py" "$site/headwise/attention/__init__.py"
cp -r "$root/src/headwise/attention/triton" "$site/headwise/attention/triton"
printf '[pytest]\nmarkers =\n    gpu: needs a CUDA device\n' > "$site/pytest.ini"
export PYTHONPATH=$site PYTHONUNBUFFERED=1
tests=(); while [ $# -gt 0 ] && [ "$1" != -- ]; do tests+=("$1"); shift; done; shift || true
if [ "${tests[0]:-none}" != none ]; then
    (cd "$root" && timeout 400 python3 -m pytest -q -c "$site/pytest.ini" --rootdir="$root" -p no:cacheprovider --tb=short "${tests[@]}" 2>&1 | cut -c1-200 | tail -n "${LINES_TESTS:-60}")
fi
[ "${1:-none}" != none ] && (cd "$root" && timeout 400 python3 benchmarks/kernels/bench.py "$@" 2>&1)
exit 0
