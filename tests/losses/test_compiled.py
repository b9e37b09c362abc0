"""The compiled loss: the eager one's values and gradients, in few kernels, made once; eager where nothing compiles."""

from __future__ import annotations

import re

import pytest
import torch
from loss_regimes import CASES, closed_form, regimes, worst
from torch import Tensor
from torch._inductor import config
from torch._inductor.graph import GraphLowering

from dist_train.errors import UserError
from dist_train.losses import NAMES, Head, divergence, linear_divergence
from dist_train.losses.block import Block
from dist_train.losses.compiled import _REGIONS
from dist_train.losses.head import Finish
from dist_train.losses.terms import Options

STATISTICS = ("acceptance", "greedy_acceptance", "mu", "tvd", "drafter_entropy", "target_entropy")
MIXED = {"ce": 0.1, "tvdpp": 0.9}


def taken(name: str, z: Tensor, y: Tensor, labels: Tensor, options: dict, compile: bool) -> tuple[Tensor, ...]:
    """Loss, gradient at the logits of the sum [N, V], statistics; the head's weight is the logits themselves."""
    lowest = torch.finfo(z.dtype).min
    weight, target_weight = z.T.clamp_min(lowest).contiguous().requires_grad_(), y.T.clamp_min(lowest).contiguous()
    unit = torch.eye(len(z), dtype=z.dtype)
    found = linear_divergence(name, unit, weight, unit, target_weight, labels=labels, compile=compile, **options)
    (gradient,) = torch.autograd.grad(found.loss * len(z), weight)
    return found.loss.detach(), gradient.T, *(getattr(found, statistic) for statistic in STATISTICS)


def counts(source: str) -> tuple[int, int, int, int]:
    """Of a block, from what Inductor wrote for the CPU: kernels, passes over the vocabulary, tensors of its width that
    are made on the way, and bytes a logit of those that come from outside or go there.
    """
    call = source[source.index("def call(") :]
    kernels = re.findall(r"^ +(?:cpp_fused\w+|extern_kernels\.\w+|torch\.ops\.\S+)\(", call, re.MULTILINE)
    passes = re.findall(r"for\(int64_t x1=static_cast<int64_t>\(0L\); x1<static_cast<int64_t>\(1000L\)", source)
    made = re.findall(r"(\w+) = empty_strided_cpu\(\(6, 1000\)", call)
    outside = re.findall(r"assert_size_stride\(\w+, \(6, 1000\)", call)
    return len(kernels), len(passes), len(made), 4 * len(outside)


def default_or_campaign(name: str, options: dict) -> object:
    """Each case costs some seconds of compiling: the variants of a loss are left to the campaign."""
    is_variant = bool(options) and "decay" not in options
    return pytest.param(name, options, marks=[pytest.mark.campaign] if is_variant else [])


@pytest.mark.parametrize(("name", "options"), [default_or_campaign(*case) for case in CASES])
def test_compiled_is_eager(name, options, capsys, monkeypatch):
    """Within 1e-6 in every regime, and as near to the float64 closed form; in few kernels with little traffic."""
    errors: dict[str, tuple[float, ...]] = {}
    sources: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", sources.append)
    for regime, (z, y) in regimes().items():
        if z.shape != (6, 1000):  # a shape of its own is a region of its own
            continue
        labels = z.argmax(-1) if regime.startswith("masked") else torch.arange(len(z)) * 7
        found = taken(name, z, y, labels, options, compile=True)
        expected = taken(name, z, y, labels, options, compile=False)
        if expected[0].isinf():
            assert found[0] == expected[0]
        else:
            value, gradient = closed_form(name, z, y, labels, **options)
            errors[regime] = (
                worst(found[0][None], expected[0][None].double()),
                worst(found[1], expected[1].double()),
                worst(found[0][None], value.mean()[None]),
                worst(found[1], gradient),
            )
        for one, other in zip(found[2:], expected[2:], strict=True):
            assert worst(one[None], other[None].double()) <= 1e-6
    (source,) = sources  # one region for all regimes
    kernels, passes, scratch, traffic = counts(source)
    with capsys.disabled():
        worst_of = [max(errors, key=lambda regime, k=k: errors[regime][k]) for k in range(4)]
        shown = "".join(f"{errors[regime][k]:10.1e}  {regime:20}" for k, regime in enumerate(worst_of))
        print(f"\n  {name:6}{options or ''} value and gradient: from eager, then from the closed form{shown}")
        print(f"  {name:6} a block: {kernels} kernels, {passes} passes, {scratch} tensors of scratch", end="")
        print(f"; {traffic} bytes a logit")
    assert all(error <= 1e-6 for of_regime in errors.values() for error in of_regime[:2])
    assert all(error <= 2e-6 for of_regime in errors.values() for error in of_regime[2:])
    assert 1 <= kernels <= 12
    assert 1 <= passes <= 12  # as many kernels as there would be if none were fused
    assert scratch <= 4  # of a block, which stays in a cache
    assert 12 <= traffic <= 24


def test_heads_of_every_family_in_blocks_that_do_not_come_out_even():
    """13 of 20 positions, two chunks, the last block filled up: against the dense float64 reference."""
    generator = torch.Generator().manual_seed(1)
    options = {"drafter_temperature": 0.7, "target_temperature": 2.0}

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight, bias = (part.requires_grad_() for part in (random(2, 10, 6), random(311, 6), random(311)))
    drafter = Head(weight, bias, scale=0.8, softcap=5.0)
    target, states = Head(random(311, 12), scale=0.5, softcap=8.0), random(2, 10, 12)
    mask = (torch.randperm(20, generator=generator) < 13).view(2, 10)
    labels = torch.randint(311, (2, 10), generator=generator)
    found = linear_divergence(MIXED, hidden, drafter, states, target, mask, 8, labels=labels, compile=True, **options)
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight, bias)]
    z = Head(exact[1], exact[2], 0.8, 5.0).logits(exact[0])
    y = Head(target.weight.double(), None, 0.5, 8.0).logits(states.double())
    expected = divergence(MIXED, z, y, mask, labels=labels, **options)
    assert found.positions == 13
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert found.acceptance.item() == pytest.approx(expected.acceptance.item(), rel=1e-5)
    gradients = (
        torch.autograd.grad(loss, x) for loss, x in ((found.loss, (hidden, weight, bias)), (expected.loss, exact))
    )
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_second_step_compiles_nothing():
    """Whatever changes from step to step: positions, their number in the batch, the reward's mean, the labels."""
    generator = torch.Generator().manual_seed(4)

    def step(unmasked: int, num_positions: int, batch_mu: float) -> None:
        hidden = torch.randn(3, 10, 6, generator=generator).requires_grad_()
        mask = (torch.randperm(30, generator=generator) < unmasked).view(3, 10)
        linear_divergence(
            "tvdpp",
            hidden,
            torch.randn(97, 6, generator=generator),
            torch.randn(3, 10, 6, generator=generator),
            torch.randn(97, 6, generator=generator),
            mask,
            16,
            labels=torch.randint(97, (3, 10), generator=generator),
            num_positions=torch.tensor(num_positions),
            unmasked=unmasked,
            normalize="batch",
            batch_mu=torch.tensor(batch_mu),
            compile=True,
        ).loss.backward()

    step(30, 100, 0.3)
    made = len(_REGIONS)
    with torch.compiler.set_stance("fail_on_recompile"):
        for change in ((30, 100, 0.4), (17, 55, 0.2), (1, 3, 0.9), (0, 1, 0.9)):
            step(*change)
    assert len(_REGIONS) == made


def test_without_a_compiler_the_loss_is_eager_and_says_so(capsys):
    z, y = torch.randn(5, 61), torch.randn(5, 61)
    unit = torch.eye(61)
    with config.patch({"cpp.cxx": ("/nowhere/c++",), "force_disable_caches": True}):
        with pytest.raises(UserError, match=r"loss\.compile=true.*cannot be compiled here"):
            linear_divergence("kld", z, unit, y, unit, compile=True)
        found = linear_divergence("kld", z, unit, y, unit, compile="auto")
        again = linear_divergence("kld", z, unit, y, unit, compile="auto")
    expected = linear_divergence("kld", z, unit, y, unit)
    assert found.loss.item() == again.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("loss: eager, because")] == told[:1]
    assert len(told) == 1


@pytest.mark.parametrize("name", [*NAMES, MIXED], ids=str)
def test_the_host_waits_for_nothing(name):
    """No operator whose result the host has to read, forward or backward, where the number of positions is given."""
    seen: set[str] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            seen.add(str(function))
            return function(*arguments, **(options or {}))

    hidden, weight = torch.randn(2, 9, 6).requires_grad_(), torch.randn(31, 6).requires_grad_()
    mask, labels = torch.arange(18).view(2, 9) % 3 > 0, torch.randint(31, (2, 9))
    mu, positions = torch.tensor(0.4), torch.tensor(40)
    with Watch():
        found = linear_divergence(
            name,
            hidden,
            weight,
            torch.randn(2, 9, 6),
            torch.randn(31, 6),
            mask,
            5,
            labels=labels,
            num_positions=positions,
            unmasked=12,
            normalize="batch",
            batch_mu=mu,
        )
        found.loss.backward()
    assert len(seen) > 10
    assert not [name for name in seen if "_local_scalar_dense" in name or "nonzero" in name or "masked_select" in name]


@pytest.mark.parametrize("name", [*NAMES, MIXED], ids=str)
def test_nothing_wide_is_converted_on_a_gpu(name):
    """As it is recorded for any device but a CPU: fp64 is for columns, and bf16 logits become fp32 once each."""
    from torch.fx.experimental.proxy_tensor import make_fx

    rows, vocab = 64, 500
    terms = tuple(name.items()) if isinstance(name, dict) else ((name, 1.0),)
    block = Block(terms, Options(), Finish(1.0, None), Finish(1.0, None))
    wide = [torch.empty(rows, vocab, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    labels = torch.empty(rows, dtype=torch.long, device="meta")
    scale = torch.empty((), dtype=torch.float64, device="meta")
    graph = make_fx(lambda *given: block(*given, traced=True))(*wide, labels, scale, None, wide[0]).graph
    converted = 0
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.numel() >= rows * vocab:
            assert value.dtype != torch.float64, node
            converted += node.target is torch.ops.aten._to_copy.default and value.dtype == torch.float32
        if node.op == "call_function":
            assert node.kwargs.get("dtype") != torch.float64 or all(
                part.meta["val"].numel() <= rows for part in node.all_input_nodes
            ), node
    assert converted <= 2 + any(term == "ce" for term, _ in terms)  # and ce's one-hot


def test_a_gpus_and_a_cpus_rows():
    """Thousands of rows of a usual vocabulary on a GPU, whole shares of every core on a CPU."""
    from dist_train.losses.sizes import block_rows, chunk_rows

    assert chunk_rows(32_000, on_gpu=True, fused=True) >= 2000
    assert block_rows(32_000, torch.device("cuda"), fused=True) >= 2000
    assert block_rows(49_152, torch.device("cpu"), fused=True) % torch.get_num_threads() == 0


def test_a_chunk_that_memory_shrinks_is_told_once(monkeypatch, capfd):
    """A GPU with 600 MB free, of which two tensors in fp32 may take a quarter: 512 rows of 32,000."""
    from dist_train.losses import sizes

    monkeypatch.setattr(sizes, "_TOLD", set())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600_000_000, 80_000_000_000))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    rows = [sizes.affordable_rows(32_000, torch.device("cuda", 0)) for _ in range(3)]
    assert rows == [sizes.chunk_rows(32_000, on_gpu=True) // 4] * 3 and 2 * 4 * rows[0] * 32_000 <= 150_000_000
    told = capfd.readouterr().err
    assert told.startswith(f"loss: {rows[0]} rows of logits at a time, where {4 * rows[0]} would be faster")
    assert told.count("\n") == 1 and "train.micro_batch" in told
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70_000_000_000, 80_000_000_000))
    assert sizes.affordable_rows(32_000, torch.device("cuda", 0)) == 4 * rows[0]
    assert not capfd.readouterr().err
