"""The losses on a GPU, compiled and eager, against the closed forms in float64 on a CPU."""

from __future__ import annotations

import pytest
import torch
from loss_regimes import closed_form, worst
from torch.profiler import ProfilerActivity, profile

from dist_train.losses import NAMES, Head, divergence, linear_divergence
from dist_train.losses.products import add_outer

pytestmark = pytest.mark.gpu

# As tests/losses/test_accuracy.py has them: for the same rounded logits.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROWS = 96


def random(*shape, seed, scale=1.0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def without_ties(z, y):
    """`y`, moved where log p and log q are so near that fp32 cannot tell them apart: there the gradients jump."""
    distance = torch.log_softmax(z.double(), -1) - torch.log_softmax(y.double(), -1)
    return torch.where(distance.abs() < 1e-5, y + 1e-3, y)


@pytest.mark.parametrize("vocab", [32_000, 128_256])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_is_eager_is_the_closed_form(device, name, dtype, vocab):
    """Value, and gradient at the logits: the heads' weights are the logits, the hidden states unit vectors."""
    z, y = (random(ROWS, vocab, seed=seed, scale=2.0) for seed in (0, 1))
    z, y = z.to(dtype), without_ties(z, y).to(dtype)
    labels = torch.arange(ROWS) * 7
    value, gradient = closed_form(name, z, y, labels)
    unit, target_weight = torch.eye(ROWS, dtype=dtype, device=device), y.T.contiguous().to(device)
    found = {}
    for compile in (True, False):
        weight = z.T.contiguous().to(device).requires_grad_()
        output = linear_divergence(name, unit, weight, unit, target_weight, labels=labels.to(device), compile=compile)
        (taken,) = torch.autograd.grad(output.loss * ROWS, weight)
        found[compile] = output.loss.detach().cpu(), taken.T.cpu()
        assert worst(found[compile][0][None], value.mean()[None]) <= BOUNDS[dtype]
        assert worst(found[compile][1], gradient) <= BOUNDS[dtype]
    (value, gradient), (of_eager, its_gradient) = found[True], found[False]
    assert worst(value[None], of_eager[None].double()) <= BOUNDS[dtype]
    assert worst(gradient, its_gradient.double()) <= BOUNDS[dtype]


@pytest.mark.parametrize("compile", [True, False])
def test_heads_with_bias_scale_and_cap_in_several_chunks(device, compile):
    """200 of 300 positions, the last block filled up: loss, statistics and all gradients of a sum of losses."""
    options = {"drafter_temperature": 0.7, "target_temperature": 2.0, "z_loss": 1e-3}
    objective, vocab = {"ce": 0.1, "tvdpp": 0.9}, 5003
    parts = [random(2, 150, 64, seed=0), random(vocab, 64, seed=1, scale=0.3), random(vocab, seed=2)]
    states, target_weight = random(2, 150, 128, seed=3), random(vocab, 128, seed=4, scale=0.3)
    mask = (torch.randperm(300, generator=torch.Generator().manual_seed(5)) < 200).view(2, 150)
    labels = torch.randint(vocab, (2, 150), generator=torch.Generator().manual_seed(6))

    exact = [part.double().requires_grad_() for part in parts]
    z = Head(exact[1], exact[2], 0.8, 5.0).logits(exact[0])
    y = Head(target_weight.double(), None, 0.5, 8.0).logits(states.double())
    expected = divergence(objective, z, y, mask, labels=labels, **options)

    hidden, weight, bias = (part.to(device).requires_grad_() for part in parts)
    found = linear_divergence(
        objective,
        hidden,
        Head(weight, bias, 0.8, 5.0),
        states.to(device),
        Head(target_weight.to(device), None, 0.5, 8.0),
        mask.to(device),
        64,
        labels=labels.to(device),
        compile=compile,
        **options,
    )
    assert found.positions == 200
    for statistic in ("loss", "acceptance", "greedy_acceptance", "mu", "tvd", "drafter_entropy", "target_entropy"):
        assert getattr(found, statistic).item() == pytest.approx(getattr(expected, statistic).item(), rel=2e-5)
    taken = torch.autograd.grad(found.loss, (hidden, weight, bias))
    for one, other in zip(taken, torch.autograd.grad(expected.loss, exact), strict=True):
        assert (one.cpu() - other).norm() <= 2e-5 * other.norm()


def kernels_of(call):
    """Names of the kernels that `call` starts on the GPU, copies left out."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return [event.name for event in on_device if not event.name.startswith(("Mem", "mem"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_block_takes_few_kernels(name, capsys):
    """Two more blocks of the same shape cost twice what a block does: fused kernels, and the products around them."""
    vocab, rows, dtype, device = 32_000, 256, torch.bfloat16, torch.device("cuda")
    weight = random(vocab, 64, seed=0, device=device, dtype=dtype).requires_grad_()
    target_weight = random(vocab, 64, seed=1, device=device, dtype=dtype)

    def of_blocks(count):
        hidden = random(count * rows, 64, seed=2, device=device, dtype=dtype)
        labels, positions = torch.zeros(count * rows, dtype=torch.long, device=device), count * rows

        def call():
            linear_divergence(
                name,
                hidden,
                weight,
                hidden,
                target_weight,
                None,
                rows,
                labels=labels,
                num_positions=positions,
                compile=True,
            )

        return kernels_of(call)

    two, four = of_blocks(2), of_blocks(4)
    fused = [sum(kernel.startswith("triton") for kernel in kernels) for kernels in (two, four)]
    a_block, fused_of_it = (len(four) - len(two)) / 2, (fused[1] - fused[0]) / 2
    with capsys.disabled():
        print(f"\n  {name:6} a block of {rows} x {vocab}: {a_block:g} kernels, {fused_of_it:g} of them fused")
    assert 1 <= fused_of_it <= 12, two
    assert a_block <= fused_of_it + 12  # two heads, two gradients, a sum, the columns


def test_the_weights_gradient_is_added_up_in_fp32(device):
    """Of bf16 factors, over eight chunks: what bf16 sums would have lost is there; no factor is copied in fp32."""
    rows, vocab, width, chunks = 512, 4096, 64, 8
    total = torch.zeros(vocab, width, device=device)
    exact = torch.zeros(vocab, width, dtype=torch.float64)
    for chunk in range(chunks):
        gradient = random(rows, vocab, seed=chunk, device=device, dtype=torch.bfloat16)
        hidden = random(rows, width, seed=100 + chunk, device=device, dtype=torch.bfloat16)
        level = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            level = torch.cuda.memory_allocated()
        add_outer(total, gradient, hidden)
        if device.type == "cuda" and chunk:  # the first call makes cuBLAS's workspace
            assert torch.cuda.max_memory_allocated() - level < 4 * rows * vocab
        exact += gradient.cpu().double().T @ hidden.cpu().double()
    assert (total.cpu() - exact).norm() <= 1e-5 * exact.norm()
