"""A random target and a drafter that guesses it often and not always; and where the real servers are."""

from __future__ import annotations

import pytest
from served_pair import make_pair, named

# On a CPU vLLM 0.32 (vllm/utils/cpu_triton_utils.py) spreads temperature and top-p over draft positions into a copy, as
# whole numbers, that it throws away: sampled answers with a drafter come from other distributions. What its Triton
# kernel does on a GPU, in torch; a plugin of vLLM's own kind puts it in place, in the server that the tests start.
PLUGIN = """
def mend():
    from vllm.utils import cpu_triton_utils

    def expand(output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None):
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
        values = input_val.masked_fill(input_val == replace_from, replace_to)
        output[: int(counts.sum())] = values.repeat_interleave(counts)

    cpu_triton_utils._expand_kernel_impl = expand
"""


@pytest.fixture(scope="session")
def vllm_environment(tmp_path_factory):
    """Of a server with the mend: a folder of Python's path that looks like an installed plugin."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "mended_vllm.py").write_text(PLUGIN)
    about = folder / "mended_vllm-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mended_vllm\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nmended_vllm = mended_vllm:mend\n")
    return {"PYTHONPATH": str(folder), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def vllm_python():
    return named("DIST_TRAIN_VLLM_PYTHON")


@pytest.fixture(scope="session")
def llama_cpp():
    return named("DIST_TRAIN_LLAMA_CPP")


@pytest.fixture(scope="session")
def pair(tiny, tmp_path_factory):
    return make_pair(tiny, tmp_path_factory.mktemp("served"))
