#!/usr/bin/env bash
# All checks and measurements of a machine with a GPU, in one command.
#
#   scripts/gpu_check.sh OUT             all steps
#   scripts/gpu_check.sh OUT STEP...     some of: build probe tests sanitizer compare cudnn
#
# The build of the extension runs beside the probe; what needs it waits. The tests of each strategy
# have a process of their own, as a kernel's fault ends all that a process can do on a GPU.
# Each step has a time limit (LIMIT_PROBE=30, in seconds, changes one), and all together have TOTAL
# (570). Each has a log in OUT/logs.tar.gz and a line in OUT/summary.txt; tables lie beside them.
# No step's failure stops another. The interpreter is $PYTHON; it needs torch with CUDA, pytest and
# what a build needs, and nothing is installed.
# Exit code: 0 where all steps that ran did so with 0.
set -u
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1
shift
wanted=" ${*:-build probe tests sanitizer compare cudnn} "
python=${PYTHON:-python3}
logs=build/gpu_check
rm -rf "$logs"
mkdir -p "$out" "$logs" build/cuda || exit 2
out=$(cd "$out" && pwd)
summary=$out/summary.txt
: >"$summary"
# torch looks for ninja on PATH, where pip's lies beside the interpreter.
found=$(command -v "$python") && PATH="$(dirname "$found"):$PATH"

wants() { [[ $wanted == *" $1 "* ]]; }

limit() {  # step, seconds unless LIMIT_STEP says otherwise or fewer are left
    local name=LIMIT_${1^^} left=$((${TOTAL:-570} - SECONDS))
    local seconds=${!name:-$2}
    echo $((seconds < left ? seconds : left))
}

note() { printf '%-16s %-24s %6s s  %s\n' "$@" >>"$summary"; }

# step NAME SECONDS COMMAND...: runs it, output to its log. 124 or 137: it took too long.
step() {
    local name=$1 seconds=$2 start=$SECONDS code=0
    shift 2
    if [ "$seconds" -le 0 ]; then
        skip "$name" "no time is left"
        return 1
    fi
    echo "== $name (at most $seconds s): $*"
    timeout -s "${SIGNAL:-TERM}" -k 10 "$seconds" "$@" >"$logs/$name.log" 2>&1 </dev/null || code=$?
    tail -n "${TAIL:-3}" "$logs/$name.log"
    note "$name" "exit code $code" $((SECONDS - start)) "$name.log"
    # After each step, so that an interrupted run keeps its results.
    tar -C "$logs" -czf "$logs.$BASHPID" . && mv "$logs.$BASHPID" "$out/logs.tar.gz"
    return "$code"
}

skip() { note "$1" "skipped" 0 "$2"; }

# --- the build, in the background ----------------------------------------------------------------

# FUSEDRNN_CUDA=1 asks setup.py for the CUDA half. Two cores are left to what is measured meanwhile.
export FUSEDRNN_CUDA=1 PYTHONUNBUFFERED=1
# Where nvcc is a script that calls another, torch takes the wrong folder for CUDA's.
if [ -z "${CUDA_HOME:-}" ] && command -v nvcc >/dev/null; then
    top=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | tail -n 1)
    if [ -n "$top" ]; then CUDA_HOME=$(cd "$top" && pwd) && export CUDA_HOME; fi
fi
# For the GPU that is there: a list from the environment may begin with some too old for the kernels.
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch
print(*torch.cuda.get_device_capability(), sep=".")' 2>/dev/null) || TORCH_CUDA_ARCH_LIST=9.0
export TORCH_CUDA_ARCH_LIST
export CUDA_ARCHS=${CUDA_ARCHS:-${TORCH_CUDA_ARCH_LIST/./}}  # of the probe
cores=$(nproc)
export MAX_JOBS=${MAX_JOBS:-$((cores > 3 ? cores - 2 : 1))}
build=
if wants build; then
    # What the doctor misses is in the log, should the build fail.
    (step build "$(limit build 480)" sh -c 'sh scripts/doctor.sh --given "$0"
        exec "$0" setup.py build_ext --inplace' "$python") >"$logs/build.step" &
    build=$!
fi

# --- what needs no build -------------------------------------------------------------------------

step machine 60 sh -c "nvidia-smi; nvcc --version; \"$python\" -c 'import torch; \
    print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name(0))'"

if wants probe; then
    if [ ! -x build/cuda/probe ]; then
        step probe-build 150 bash scripts/build_cuda_probe.sh
    fi
    if [ -x build/cuda/probe ]; then
        step probe "$(limit probe 75)" build/cuda/probe
        "$python" -m bench.cuda.probe_table "$logs/probe.log" >"$out/probe.md"
    else
        skip probe "there is no build/cuda/probe"
    fi
fi

# --- what needs the extension --------------------------------------------------------------------

built=0
if [ -n "$build" ]; then
    wait "$build" || built=$?
    cat "$logs/build.step"
    rm -f "$logs/build.step"
fi
if [ "$built" -ne 0 ]; then
    for name in tests sanitizer compare; do
        if wants "$name"; then skip "$name" "the build failed"; fi
    done
else
    if wants tests; then
        # A protocol that hangs is one test's failure, where pytest-timeout is installed.
        patience=
        if "$python" -c 'import pytest_timeout' 2>/dev/null; then
            patience="--timeout=60 --timeout-method=thread"
        fi
        several="per_step or one_cta or persistent"
        for strategy in per_step one_cta persistent "not ($several)"; do
            name=${strategy%% *}
            # interrupted, pytest tells what has failed so far
            SIGNAL=INT TAIL=15 step "tests-${name/not/others}" "$(limit tests 150)" \
                "$python" -m pytest --maxfail=60 --tb=short --durations=5 -q $patience -m cuda \
                -k "$strategy" tests/test_cuda.py
        done
    fi
    if wants sanitizer; then
        if command -v compute-sanitizer >/dev/null; then
            # torch's allocator would hide an access beyond a tensor inside its own blocks
            export PYTORCH_NO_CUDA_MEMORY_CACHING=1
            ours="--kernel-name kernel_substring=fusedrnn"  # not what ATen and cuBLAS run beside
            compute-sanitizer $ours true >/dev/null 2>&1 || ours=
            for strategy in per_step one_cta persistent; do
                for tool in memcheck racecheck; do
                    FUSEDRNN_CUDA_STRATEGY=$strategy \
                        step "$tool-$strategy" "$(limit sanitizer 90)" compute-sanitizer \
                        --tool "$tool" $ours --error-exitcode 9 "$python" -m bench.cuda.small_run
                done
            done
            unset PYTORCH_NO_CUDA_MEMORY_CACHING
        else
            skip sanitizer "compute-sanitizer is not on PATH"
        fi
    fi
    if wants compare; then
        seconds=$(limit compare 300)
        step compare "$seconds" "$python" -m bench.cuda.compare --out "$out" \
            --total $((seconds > 40 ? seconds - 30 : seconds))
    fi
fi

# --- torch.nn alone ------------------------------------------------------------------------------

if wants cudnn; then
    seconds=$(limit cudnn 220)
    step cudnn "$seconds" "$python" -m bench.cuda.cudnn_table --out "$out" \
        --total $((seconds > 40 ? seconds - 30 : seconds))
fi

echo
echo "== summary, logs in $out/logs.tar.gz"
cat "$summary"
! grep -qv -e ' exit code 0 ' -e ' skipped ' "$summary"
