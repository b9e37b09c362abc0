"""Training on a GPU is training on a CPU, under each ZeRO stage, and its host does not wait for the device."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed as dist
from runs import distillation, figures, losses, weights

from dist_train.runtime.process_group import started
from dist_train.train import loop
from dist_train.train.outcome import Outcome

pytestmark = pytest.mark.gpu

STAGES = ["zero0", "zero1", "zero2", "zero3"]
HALF_WAY = "checkpoint.every=3"


@pytest.fixture(scope="module")
def of_cpu(tiny, on_cpu, tmp_path_factory):
    """Six steps in fp32 by a process that sees no GPU, with a checkpoint half-way."""
    out = tmp_path_factory.mktemp("cpu") / "run"
    assert "1 rank on cpu" in on_cpu(*distillation(tiny, out, HALF_WAY)).stdout
    return out


@pytest.fixture(scope="module")
def one_step(tiny, on_cpu, tmp_path_factory):
    """The first step alone."""
    out = tmp_path_factory.mktemp("cpu") / "run"
    on_cpu(*distillation(tiny, out, steps=1))
    return out


@pytest.fixture
def trained(command, device):
    """`trained(*arguments)` trains in this process, on the device; what it said."""

    def run(*arguments):
        code, said, complaint = command(*arguments)
        assert code == 0, complaint
        assert f"1 rank on {device.type}" in said
        return said

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_the_cpus(tiny, device, trained, one_step, tmp_path, stage):
    """In fp32: loss and statistics within 1e-5, the norm within 1e-4, weights within a tenth of their step of 5e-3."""
    trained(*distillation(tiny, tmp_path / "run", f"train.deepspeed={stage}", steps=1))
    (found,), (expected,) = figures(tmp_path / "run"), figures(one_step)
    for name in ("train/loss", "train/acceptance", "train/greedy_acceptance", "train/tvd", "train/target_entropy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)
    for name, weight in weights(tmp_path / "run").items():
        torch.testing.assert_close(weight, weights(one_step)[name], rtol=0, atol=5e-4, msg=name)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 3e-2)])
@pytest.mark.parametrize("stage", STAGES)
def test_six_losses_are_the_cpus(tiny, device, trained, of_cpu, tmp_path, stage, precision, bound):
    """Those of the CPU in fp32; by NCCL with one rank."""
    options = (f"train.deepspeed={stage}", f"train.precision={precision}", f"target.precision={precision}")
    trained(*distillation(tiny, tmp_path / "run", *options))
    assert losses(tmp_path / "run") == pytest.approx(losses(of_cpu), rel=bound)


@pytest.mark.parametrize(
    "options",
    [
        ("loss.compile=true",),
        ("train.compile=true",),
        ("target.sharding=zero3", "train.deepspeed=zero2"),
        ("train.gradient_checkpointing=true", "train.micro_batch=8"),
        ("drafter.attention=sdpa", "target.attention=sdpa"),
    ],
    ids=" ".join,
)
def test_what_changes_speed_alone_changes_no_loss(tiny, device, trained, of_cpu, tmp_path, options):
    trained(*distillation(tiny, tmp_path / "run", *options))
    assert losses(tmp_path / "run") == pytest.approx(losses(of_cpu), rel=1e-4)


def test_collectives_of_one_rank(device):
    """By NCCL on a GPU, as a stage asks for them."""
    with started() as runtime:
        assert dist.get_backend() == ("nccl" if device.type == "cuda" else "gloo")
        assert runtime.device == device
        assert runtime.sum(torch.ones(3, dtype=torch.float64, device=device)).tolist() == [1, 1, 1]
        assert runtime.gather({"rank": 0}) == [{"rank": 0}]
        assert runtime.first("value") == runtime.agree(lambda: "value") == runtime.everywhere(lambda: "value")
        runtime.barrier()
    assert not dist.is_initialized()


class Waiting:
    """While armed, what has the host wait for the device is an error, and what waits without saying so is counted."""

    def __init__(self, device, monkeypatch):
        self.on_gpu, self.steps, self.waits = device.type == "cuda", 0, 0
        for holder, name in ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize")):
            monkeypatch.setattr(holder, name, self.counting(getattr(holder, name)))

    def counting(self, call):
        def counted(*arguments, **options):
            self.waits += 1
            return call(*arguments, **options)

        return counted

    def arm(self, mode):
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode(mode)

    def armed(self, call):
        """`call`, during which nothing may wait."""

        def inner(*arguments):
            before = self.waits
            self.arm("error")
            try:
                found = call(*arguments)
            finally:
                self.arm("default")
            self.steps += 1
            assert self.waits == before
            return found

        return inner


@pytest.mark.parametrize("option", ["loss.tvdpp_normalize=position", "loss.tvdpp_normalize=batch", "loss.compile=true"])
@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_the_host_waits_once_a_step_and_late(tiny, device, trained, tmp_path, monkeypatch, stage, option):
    """From batch to log line of the third to the sixth step, of four micro-batches, but for `Outcome.read`."""
    waiting, read = Waiting(device, monkeypatch), Outcome.read
    step, copy, log = loop.Training._optimizer_step, loop.on_device, loop.Metrics.log

    def from_the_third_on(call):
        armed = waiting.armed(call)
        return lambda self, *given: (armed if self.step >= 2 else call)(self, *given)

    steps = []

    def copied(*given):
        return (waiting.armed(copy) if len(steps) >= 2 else copy)(*given)

    def counted_read(self):
        steps.append(self.step)
        return read(self)

    monkeypatch.setattr(loop.Training, "_optimizer_step", from_the_third_on(step))
    monkeypatch.setattr(loop, "on_device", copied)
    monkeypatch.setattr(loop.Metrics, "log", waiting.armed(log))
    monkeypatch.setattr(Outcome, "read", counted_read)
    trained(*distillation(tiny, tmp_path / "run", option, f"train.deepspeed={stage}", "train.precision=bf16"))
    assert steps == [1, 2, 3, 4, 5, 6]
    # Four steps; micro-batches from when two outcomes were read, which is a step late; the sequence that is stored with
    # the checkpoint; six lines.
    assert waiting.steps == 4 + 3 * 4 + 1 + 6


def half_way(run, out):
    """The run as a kill after its first checkpoint would have left it."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    (out / "checkpoints" / "latest").write_text("step-00000003\n")


@pytest.mark.parametrize(("made", "goes_on"), [("zero1", "zero3"), ("zero3", "zero1")])
def test_a_checkpoint_of_the_gpu_goes_on_on_a_cpu(tiny, device, on_cpu, trained, of_cpu, tmp_path, made, goes_on):
    trained(*distillation(tiny, tmp_path / "whole", HALF_WAY, f"train.deepspeed={made}"))
    half_way(tmp_path / "whole", tmp_path / "run")
    said = on_cpu(*distillation(tiny, tmp_path / "run", f"train.deepspeed={goes_on}"), "--resume").stdout
    assert "1 rank on cpu" in said and "resuming at step 3" in said
    assert losses(tmp_path / "run") == pytest.approx(losses(of_cpu), rel=1e-4)


@pytest.mark.parametrize("goes_on", ["zero1", "zero3"])
def test_a_checkpoint_of_a_cpu_goes_on_on_the_gpu(tiny, device, trained, of_cpu, tmp_path, goes_on):
    half_way(of_cpu, tmp_path / "run")
    said = trained(*distillation(tiny, tmp_path / "run", f"train.deepspeed={goes_on}"), "--resume")
    assert "resuming at step 3" in said
    assert losses(tmp_path / "run") == pytest.approx(losses(of_cpu), rel=1e-4)
