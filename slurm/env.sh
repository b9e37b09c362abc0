# The one file that a site edits: how a compute node finds Python, its libraries and its fast disk.
# Sourced by every batch script before srun; `dist-train submit --env FILE` takes another one instead.

# Modules, if the site has them:
# module load cuda/12.8

# -- Python: one of two -----------------------------------------------------------------------------------------
# 1. A virtual environment: the one in the folder that the job was submitted from, unless one is active already, or
#    DIST_TRAIN_PYTHON says which Python to take.
if [[ -z ${VIRTUAL_ENV:-} && -z ${DIST_TRAIN_PYTHON:-} && -d ${SLURM_SUBMIT_DIR:-.}/.venv ]]; then
    source "${SLURM_SUBMIT_DIR:-.}/.venv/bin/activate"
fi
# 2. A container with dist-train installed, by its kind of image: .sqsh or docker:// for Enroot through Pyxis, .sif for
#    Apptainer. Then the folders that jobs see, `outside:inside`, separated by commas, and Python inside of it:
# container=/shared/images/dist-train.sqsh
# container_mounts=/shared:/shared,/tmp:/tmp
# DIST_TRAIN_PYTHON=python

# -- Disk -------------------------------------------------------------------------------------------------------
# What compilers make goes to the node's own disk: two nodes that build in one shared folder wait for each other's
# locks, and a home on NFS is slow. What lies there is run: the folder is new, this user's alone (mktemp makes it 0700),
# and of a name that nobody could guess and have made before, here or on the job's other nodes.
local_disk=$(mktemp -d "${TMPDIR:-/tmp}/dist-train-XXXXXXXXXXXX") || exit
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$local_disk/torch_extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$local_disk/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$local_disk/inductor}

# -- GPU memory -------------------------------------------------------------------------------------------------
# PyTorch grows its blocks in place, instead of leaving gaps between them:
if [[ -z ${PYTORCH_ALLOC_CONF:-} ]]; then
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
fi

# -- Compute nodes without internet -----------------------------------------------------------------------------
# Fetch on the login node, into a folder that all nodes see:
#   HF_HOME=/shared/huggingface hf download meta-llama/Llama-2-7b-chat-hf        target and its tokenizer
#   HF_HOME=/shared/huggingface hf download --repo-type dataset allenai/c4       what prepare reads by dataset=
# export HF_HOME=/shared/huggingface
# export HF_HUB_OFFLINE=1

# -- Network ----------------------------------------------------------------------------------------------------
# NCCL picks by itself in most places. Where it does not (NCCL_DEBUG=INFO shows what it picked):
# export NCCL_SOCKET_IFNAME=ib0        # network of the first contact
# export NCCL_IB_HCA=mlx5              # InfiniBand adapters, without those of the storage network
# export NCCL_DEBUG=WARN
# A rank that is lost is noticed, rather than waited for:
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# How srun talks to the site's MPI (`srun --mpi=list`), for prepare:
# export DIST_TRAIN_MPI=pmix
