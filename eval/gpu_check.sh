#!/bin/sh
# What can only be checked on a machine with a GPU, in one command:  eval/gpu_check.sh [FOLDER]
#
# Runs the tests marked "gpu", a short training on the GPU that is stopped and resumed, its evaluation, and the speed
# tables; installs and downloads nothing. A step that is done is not repeated, so calling it again goes on where it was
# stopped. Results are JSON files in FOLDER (default: $OUT, else gpu-check/). Exit: 0 when every step passed.
set -u
cd "$(dirname "$0")/.." || exit 2
out=${1:-${OUT:-gpu-check}}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
work=${WORK:-$out/work}
mkdir -p "$out" "$work" || exit 2
failed=0

# step NAME COMMAND…: run once; NAME.json says how it went, NAME.log what it printed.
step() {
    name=$1
    shift
    if [ -f "$out/$name.json" ] && grep -q '"exit": 0' "$out/$name.json"; then
        echo "$name: done before"
        return
    fi
    began=$(date +%s)
    "$@" >"$out/$name.log" 2>&1
    code=$?
    printf '{"step": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" "$(($(date +%s) - began))" >"$out/$name.json"
    echo "$name: exit $code"
    if [ "$code" -ne 0 ]; then
        failed=1
        tail -n 15 "$out/$name.log"
    fi
}

environment() {
    "$python" - "$out/environment.json" <<'PYTHON'
import importlib.metadata as metadata
import json
import platform
import sys

import torch

names = ("dml", "torch", "torchvision", "timm", "faiss-cpu", "faiss-gpu", "lightning-fabric", "numpy")
installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
gpu = torch.cuda.is_available()
found = {
    "python": platform.python_version(),
    "cuda": torch.version.cuda,
    "gpu": torch.cuda.get_device_name(0) if gpu else None,
    "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if gpu else None,
    "versions": {name: installed[name] for name in names if name in installed},
}
with open(sys.argv[1], "w") as handle:
    json.dump(found, handle, indent=1)
print(json.dumps(found))
sys.exit(0 if gpu else 1)
PYTHON
}

gpu_tests() {
    "$python" -m pytest -m gpu -q -p no:cacheprovider --junitxml "$out/pytest.xml" tests
}

pictures() {
    [ -d "$work/pictures" ] || "$python" -m dml.cli.main data demo "$work/pictures"
}

# Train to the first checkpoint, stop as Ctrl-C does, go on: the run must take up where it was, and reach its end.
training() {
    options="--recipe multi_similarity --out $work/run --set train.epochs=40 --set train.accelerator=cuda"
    # shellcheck disable=SC2086
    "$python" -m dml.cli.main train "$work/pictures" $options --set train.precision=bfloat16 --resume auto &
    first=$!
    while [ ! -f "$work/run/checkpoints/last.pt" ] && kill -0 "$first" 2>/dev/null; do sleep 0.2; done
    kill -INT "$first" 2>/dev/null
    wait "$first"
    # shellcheck disable=SC2086
    "$python" -m dml.cli.main train "$work/pictures" $options --set train.precision=bfloat16 --resume auto --json \
        >"$out/training_result.json" 2>"$out/training_resumed.log" || return 1
    cat "$out/training_resumed.log"
    grep -q "going on behind step" "$out/training_resumed.log"
}

evaluation() {
    "$python" -m dml.cli.main eval "$work/run" --json --report "$out/report.html" >"$out/evaluation_result.json"
}

environment || { echo "no CUDA device is visible to torch: nothing to check here"; exit 3; }
step tests gpu_tests
step pictures pictures
step training training
step evaluation evaluation
step speed_search "$python" -m eval.speed search --rows 100000 --dim 128 --out "$out/speed_search_result.json"
step speed_metrics "$python" -m eval.speed metrics --out "$out/speed_metrics_result.json"
exit "$failed"
