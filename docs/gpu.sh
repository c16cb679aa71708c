#!/usr/bin/env bash
# All that a GPU must show, in one command of at most ten minutes: bash docs/gpu.sh
# From the repository's root, with pytest installed. Results in $OUT (gpu_out); its table.md is what
# goes into docs/. PARTS="cuda two" runs these parts alone. Without a GPU the same parts run small.
set -u
export OUT=${OUT:-$PWD/gpu_out} PYTHONUNBUFFERED=1
PY=${PY:-python}
PARTS=${PARTS:-machine cuda demos resume two evaluations bench profile}
mkdir -p "$OUT" && : > "$OUT/table.md"
GPU=$($PY -c "import torch; print(int(torch.cuda.is_available()))")
WORKERS=$(($(nproc) > 4 ? 4 : 1))
if [ "$GPU" = 1 ]; then
    ROWS="photometric lars clustering bank vicreg_2048 step_vicreg step_vicregl step_lc step_cribo step_bagssl"
else
    export DEVICE=cpu
    ROWS="lars tcr_n"
fi

# flags METHOD: without a GPU those of the tests' small runs, on 44 small images
flags() {
    [ "$GPU" = 1 ] || PYTHONPATH=.:tests $PY -c "
import sys, pathlib, helpers
images = pathlib.Path(sys.argv[2], 'images')
if not images.exists():
    helpers.make_images(images / 'train', 44)
    helpers.make_images(images / 'val', 20, seed=1)
print('--data', images, *helpers.SMALL, *helpers.EXTRA[sys.argv[1]])" "$1" "$OUT"
}

# part NAME SECONDS COMMAND...: its output goes to $OUT/NAME.txt, a row to the table. After ten
# minutes in all the rest is left out.
part() {
    local name=$1 limit=$2 begin=$SECONDS code=0
    shift 2
    if [ "$GPU" = 0 ]; then
        limit=$((5 * limit))  # a rehearsal may take its time
    elif [ $((590 - SECONDS)) -lt "$limit" ]; then
        limit=$((590 - SECONDS))
    fi
    if [ "$limit" -lt 1 ]; then echo "| $name | left out | 0 | |" | tee -a "$OUT/table.md"; return; fi
    timeout "$limit" "$@" > "$OUT/$name.txt" 2>&1 || code=$?
    local last
    last=$(grep -v '^ *$' "$OUT/$name.txt" | tail -n 1 | tr '|' '/' | cut -c 1-110)
    echo "| $name | $code | $((SECONDS - begin)) | $last |" | tee -a "$OUT/table.md"
}

asked() { case " $PARTS " in *" $1 "*) ;; *) return 1 ;; esac; }

echo "| part | exit code | seconds | its last line |
| --- | --- | --- | --- |" | tee -a "$OUT/table.md"

if asked machine; then
    part machine 60 bash -c "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv; nproc
        $PY -c 'import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())'"
fi

# Right? Losses against float64, BatchNorm, NCCL, host syncs, bf16, resumption, torch.compile.
if asked cuda; then
    part cuda 180 $PY -m pytest -q tests/test_cuda.py
fi

# Does it train? The five demonstrations, each with its k-NN at the end, side by side.
if asked demos; then
    [ "$GPU" = 1 ] || flags vicreg > "$OUT/flags.txt"  # makes the images before all five ask for them
    for method in vicreg vicregl lc_loss cribo bagssl; do
        part "demo-$method" 120 $PY $method.py --out "$OUT/runs" --name $method \
            --workers $WORKERS $(flags $method) &
    done
    wait
fi

# A run that is killed goes on where its last checkpoint was.
if asked resume; then
    again=($PY vicreg.py $(flags vicreg) --out "$OUT/runs" --name killed --save-minutes 0
           --epochs $((GPU ? 2 : 30)) --log-every 5 --workers $WORKERS)
    last="$OUT/runs/killed/last.pt"
    part killed 60 bash -c '"${@:2}" & until [ -f "$1" ]; do sleep 0.2; done; kill -KILL $!; wait $!' \
        _ "$last" "${again[@]}"
    part resumed 60 "${again[@]}"
    grep -h "resumed at step\|new run" "$OUT/killed.txt" "$OUT/resumed.txt"
fi

# Two processes on one GPU, through gloo: BatchNorm, DDP and the losses' collectives on its tensors.
if asked two; then
    cat > "$OUT/two.py" <<'PYTHON'
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import torch.distributed as dist
os.environ["LOCAL_RANK"] = "0"  # NCCL refuses to share a GPU
init = dist.init_process_group
dist.init_process_group = lambda backend, **how: init("gloo", **how)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
PYTHON
    for method in vicreg cribo; do
        part "two-$method" 60 $PY -m torch.distributed.run --standalone --nproc_per_node=2 \
            "$OUT/two.py" $method.py $(flags $method) --epochs 1 --out "$OUT/runs" \
            --name two-$method --workers $WORKERS
    done
fi

if asked evaluations; then
    run="$OUT/runs/vicreg"
    part knn 40 $PY -m evaluate knn --checkpoint "$run" --baseline
    part linear 40 $PY -m evaluate linear --checkpoint "$run" --no-augment --epochs 2 \
        --batch-size 32
    part correspond 40 $PY -m evaluate correspond --checkpoint "$run"
    part fewshot 40 $PY -m evaluate fewshot --checkpoint "$run" --data shapes
    if [ "$GPU" = 1 ]; then
        part segment 40 $PY -m evaluate segment --checkpoint "$run" --steps 50
        part retrieve 40 $PY -m evaluate retrieve --checkpoint "$run" --subsample 128
    fi
fi

# images/s, the share of the matrix product's FLOP/s, memory.
if asked bench; then
    part bench 200 $PY tests/bench.py --out "$OUT/benchmark.json" --only $ROWS
    grep '^|\|^cpu' "$OUT/bench.txt"
fi

# Where a step's time goes: wall, the GPU's share, launches, the longest kernels.
if asked profile; then
    cat > "$OUT/step_times.py" <<'PYTHON'
import collections, os, sys, time
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
import torch, bench
from torch.profiler import ProfilerActivity, profile
sync = torch.cuda.synchronize if bench.CUDA else lambda: None
for name in sys.argv[1:]:
    step = getattr(bench, f"{name}_step")()
    for _ in range(2):
        step()
    sync()
    begin = time.perf_counter()
    for _ in range(3):
        step()
    sync()
    wall = (time.perf_counter() - begin) / 3 * 1e3
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * bench.CUDA]) as p:
        step()
        sync()
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = [e for e in p.events() if e.device_type == on_gpu]
    busy = sum(e.device_time for e in kernels) / 1e3
    longest = collections.Counter()
    for e in kernels:
        longest[e.name[:50]] += e.device_time / 1e3
    top = "; ".join(f"{kernel} {ms:.1f}" for kernel, ms in longest.most_common(6))
    memory = torch.cuda.max_memory_allocated() / 1e9
    print(f"{name}: {wall:.1f} ms, GPU busy {busy / wall:.0%}, {len(kernels)} launches, "
          f"{memory:.1f} GB; {top}", flush=True)
    del step
    if bench.CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
PYTHON
    [ "$GPU" = 1 ] && methods="vicreg vicregl lc cribo bagssl" || methods="vicreg"
    part profile 100 $PY "$OUT/step_times.py" $methods
    cat "$OUT/profile.txt"
fi

echo
cat "$OUT/table.md"
