#!/usr/bin/env bash
# Tests marked gpu and the benchmarks on a machine with a GPU and no network: builds in place, and
# installs nothing. Needs python3 with torch, pybind11, pytest and pytest-benchmark.
set -euo pipefail

cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"

python3 setup.py --quiet build_ext --inplace
ln -sfn ../kernels amalgam/kernels
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

python3 -c 'from amalgam.backends import build_info; print(build_info())' | tee "$out/build.txt"
git rev-parse HEAD 2>/dev/null | tee "$out/commit.txt" || true
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv" || true

# The machine may lack plug-ins that pyproject.toml sets options for; its settings are not needed.
pytest=(python3 -m pytest -c /dev/null --rootdir="$PWD" -p no:cacheprovider)
# At once, as most of their time goes into compiling kernels, each on one core.
files=(tests/ops/test_{student_step,choice_step,teacher_distance,teacher_step}.py tests/test_optimizer.py)
running=()
for file in "${files[@]}"; do
  timeout 330 "${pytest[@]}" -W ignore::pytest.PytestUnknownMarkWarning -q -m gpu "$file" \
    >"$out/$(basename "$file" .py).txt" 2>&1 &
  running+=($!)
done
status=0
for process in "${running[@]}"; do
  wait "$process" || status=$?
done
tail -n 4 "$out"/test_*.txt

# No speed-up on a red gate. Interrupted when the time is up, pytest writes the rows it has.
if [ "$status" -eq 0 ]; then
  timeout --signal=INT --kill-after=10 230 "${pytest[@]}" -q \
    bench/bench_{student_step,choice_step,teacher_step,teacher_distance}.py -k cuda \
    --benchmark-json="$out/rows.json" 2>&1 | tee "$out/bench.txt"
fi
exit "$status"
