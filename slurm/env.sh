# The one file that a site edits: how a compute node finds Python, its libraries and its fast disk.
# Sourced by every batch script before srun; `dist-train submit --env FILE` takes another one instead.

# Modules, if the site has them:
# module load cuda/12.8

# Python: the virtual environment in the folder that the job was submitted from, unless one is active already.
if [[ -z ${VIRTUAL_ENV:-} && -d ${SLURM_SUBMIT_DIR:-.}/.venv ]]; then
    source "${SLURM_SUBMIT_DIR:-.}/.venv/bin/activate"
fi

# Compiled operators go to the node's own disk: two nodes that build in one shared folder wait for each other's locks.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${TMPDIR:-/tmp}/dist-train-$USER/torch_extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/dist-train-$USER/triton}

# Compute nodes without internet: fetch targets and tokenizers on the login node (`hf download meta-llama/...`), then:
# export HF_HUB_OFFLINE=1
# export HF_HOME=/shared/huggingface

# NCCL, if it picks the wrong network:
# export NCCL_SOCKET_IFNAME=ib0

# How srun talks to the site's MPI (`srun --mpi=list`), for prepare:
# export DIST_TRAIN_MPI=pmix
