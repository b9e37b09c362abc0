#!/bin/bash
# Proves and measures dist-train on one GPU, in 25 minutes at the most: the tests marked gpu, then Markdown tables, each
# with the command that gives it.
#
#     tests/benchmarks/gpu.sh [FOLDER_OF_WHEELS] > gpu.md
#
# With a folder of wheels (what pyproject.toml asks for and the machine lacks, pytest, pytest-timeout; liger-kernel to
# compare with) they are unpacked into a folder that is removed afterwards, without network; the machine's own torch
# stays. Else the environment is the one at hand, of $PYTHON or python3. Ends with 1 if a test or a measurement failed;
# what is left when the time is up is told, and not measured.
set -uo pipefail
if (($#)); then
    wheels=("$(realpath "$1")"/*.whl)
    [[ -e ${wheels[0]} ]] || {
        echo "gpu.sh: $1: no wheels there" >&2
        exit 2
    }
fi
cd "$(dirname "$0")/../.." || exit

readonly limit=1500 began=$SECONDS
scratch=$(mktemp -d "${TMPDIR:-/tmp}/dist-train-gpu-XXXXXXXX") || exit
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TRITON_CACHE_DIR=$scratch/triton
export HF_HUB_OFFLINE=1 DS_SKIP_CUDA_CHECK=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error

if (($#)); then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" "${wheels[@]}" || exit
    export PYTHONPATH=$PYTHONPATH:$scratch/site
fi
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "gpu.sh: $python finds no torch with a CUDA device here" >&2
    exit 2
}

failed=()

# section TITLE SECONDS COMMAND...: its output under its command, within so many seconds and what is left of all.
section() {
    local title=$1 seconds=$2 code=0 left=$((limit - (SECONDS - began)))
    shift 2
    printf '\n### %s\n\n    %s\n\n' "$title" "$*"
    if ((left < 20)); then
        echo 'not measured: the time was up'
        failed+=("$title")
        return
    fi
    timeout --kill-after=10 "$((seconds < left ? seconds : left))" "$python" "${@:2}" 2> "$scratch/errors" || code=$?
    if ((code)); then
        printf '\nfailed with exit code %d (124: took more than its time):\n\n' "$code"
        tail -n 15 "$scratch/errors" | sed 's/^/    /'
        failed+=("$title")
    fi
}

echo '# dist-train on one GPU'
echo
"$python" - <<'END'
import deepspeed, torch, transformers
free, total = torch.cuda.mem_get_info()
print(f"{torch.cuda.get_device_name()}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free); torch {torch.__version__}, ", end="")
print(f"CUDA {torch.version.cuda}, transformers {transformers.__version__}, deepspeed {deepspeed.__version__}")
END

here=tests/benchmarks
section 'Tests' 600 python -m pytest -m gpu -q --no-header tests/gpu tests/losses/test_accuracy.py
section 'Attention of packed documents, and the kernel that it takes' 45 python "$here/attention.py" --tokens 8192
section 'MFU of the drafter of 115M parameters' 200 \
    python "$here/training.py" mfu --drafter 115m --batch 16 --length 2048 --steps 40 --stage zero1
section 'Loss against Liger and dense logits' 240 \
    python "$here/losses.py" --names kld ce --paths dense liger liger-triton \
    --vocab 32000 131072 --rows 8192 --dtype bf16 --device cuda
section 'Memory estimate against what is allocated' 200 python "$here/memory.py"
section 'Online distillation from a random 7B' 240 \
    python "$here/training.py" online --drafter 115m --target-layers 32 --target-width 4096 --batch 8 --length 2048 \
    --steps 12 --stage zero1
section 'Evaluation' 90 python "$here/evaluate.py" 300m --device cuda --dtype bf16
section 'Generation' 90 python "$here/generate.py" --device cuda --dtype bf16 --layers 30 --rounds 2

printf '\nTook %d s.\n' "$((SECONDS - began))"
if ((${#failed[@]})); then
    printf 'Failed: %s.\n' "$(IFS=';'; echo "${failed[*]}")"
    exit 1
fi
