"""Two processes, each with its own part of the batch, report what one process reports on the whole of it."""

import os
import socket
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fullrank
from alike import differences, numbers
from untouched import changes, everything, same

pytestmark = pytest.mark.slow  # two processes that import everything anew
SECONDS = 120  # after which processes that wait for each other are given up


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.attention_norm(x)).chunk(3, -1))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.calls += 1  # a buffer that a wrapper would send from the first process to the others
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if labels is None:
            return x
        return nn.functional.cross_entropy((x @ self.embed.weight.T).flatten(0, 1), labels.flatten()), x


def decoder():
    torch.manual_seed(0)
    model = Decoder().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that heads differ from uniform attention
    return model


IDS = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(12) < torch.tensor([[12], [7], [12], [9]])).long()
PARTS = (slice(0, 2), slice(2, 4))


def ddp():
    return nn.parallel.DistributedDataParallel(decoder())


def fsdp():
    from torch.distributed.fsdp import fully_shard

    model = decoder()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def changed(build, rank):
    """What examining changes on a model in the middle of its training, and whether a step works after it."""
    model = build().train()
    ids = IDS[PARTS[rank]]
    model(ids).square().sum().backward()
    before = everything(model)
    fullrank.examine(model, ids, spectrum=False, gradients=True)
    found = changes(before, everything(model))
    again = build().train()
    for one in (model, again):  # both have had one backward before this one
        if one is again:
            one(ids).square().sum().backward()
        one(ids).square().sum().backward()
    gradients = [[getattr(p.grad, "_local_tensor", p.grad) for p in one.parameters()] for one in (model, again)]
    return found + ([] if same(*gradients) else ["the next step"])


def said(work):
    """The class and the sentence of what is raised."""
    try:
        work()
    except fullrank.FullrankError as error:
        return type(error).__name__, str(error)
    return None


def broken(rank):
    """A model that gives NaN for one token, which only the second part of the batch holds."""
    ids = IDS[PARTS[rank]].clamp(max=48)
    if rank == 1:
        ids[0, 3] = 49

    class Broken(Block):
        def forward(self, x):
            x = super().forward(x)
            return x * torch.where(x[..., :1].isnan() | self.found(x), torch.nan, 1.0)

        def found(self, x):
            return self.marks.to(x.device)[..., None]

    model = decoder()
    model.blocks[0].__class__ = Broken
    model.blocks[0].marks = ids == 49
    return model, ids


def scenarios(rank):
    part = {"input_ids": IDS[PARTS[rank]]}
    padded = part | {"attention_mask": MASK[PARTS[rank]]}
    report = fullrank.examine(ddp(), part)
    yield "ddp", numbers(report), report.about
    yield "ddp padded", numbers(fullrank.examine(ddp(), padded, spectrum=False)), None
    report = fullrank.examine(fsdp(), part)
    yield "fsdp", numbers(report), report.about
    for name, build in (("ddp", ddp), ("fsdp", fsdp)):
        for what, batch in (("projections", part), ("loss", part | {"labels": part["input_ids"]})):
            report = fullrank.examine(build(), batch, spectrum=False, gradients=True, weights=True)
            yield f"{name} {what}", numbers(report), report.about
    # a row of its own for each sequence: two batches here, one there, is fine where weights are not spread
    uneven = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:3]}] if rank == 0 else {"input_ids": IDS[3:]}
    yield "ddp uneven", numbers(fullrank.examine(ddp(), uneven, spectrum=False)), None
    yield "fsdp uneven", said(lambda: fullrank.examine(fsdp(), uneven, spectrum=False)), None
    yield "plain", numbers(fullrank.examine(decoder(), part, spectrum=False)), None
    yield "ddp no trace", changed(ddp, rank), None
    yield "fsdp no trace", changed(fsdp, rank), None
    for name, build in (("ddp", ddp), ("fsdp", fsdp)):
        empty = part if rank == 0 else {"input_ids": IDS[:2], "attention_mask": torch.zeros(2, 12)}
        yield f"{name} bad mask", said(lambda build=build, empty=empty: fullrank.examine(build(), empty)), None
        yield f"{name} default", said(lambda build=build: fullrank.examine(build())), None
    outside = part if rank == 0 else {"input_ids": IDS[:2] + 50}
    yield "ddp bad batch", said(lambda: fullrank.examine(ddp(), outside)), None
    model, ids = broken(rank)
    wrapped = nn.parallel.DistributedDataParallel(model)
    yield "ddp nan", said(lambda: fullrank.examine(wrapped, ids)), None
    from torch.distributed.fsdp import fully_shard

    model, ids = broken(rank)
    for block in model.blocks:
        fully_shard(block)
    model = fully_shard(model)
    yield "fsdp nan", said(lambda: fullrank.examine(model, ids)), None
    model = fsdp()
    if rank == 1:
        with torch.no_grad():
            next(model.blocks[1].parameters()).to_local()[0] = torch.nan
    yield "fsdp weights", said(lambda: fullrank.examine(model, part)), None
    yield "tensor parallel", said(lambda: fullrank.examine(tensor_parallel(), part)), None


def tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = decoder()
    parallelize_module(model.blocks[0].mlp, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    return model


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        found = {name: (answer, about) for name, answer, about in scenarios(rank)}
        torch.save(found, folder / f"{rank}.pt")
    except Exception:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What both processes found, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.spawn(work, (port, folder), nprocs=2, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_both_processes_report_what_one_reports_on_the_joined_batch(answers, name):
    whole = fullrank.examine(decoder(), {"input_ids": IDS})
    assert {row.metric for row in whole.rows} >= {"token_energy", "similarity_standardized", "bulk_excess"}
    for rank in range(2):
        found, about = answers[rank][name]
        assert not differences(found, whole, tolerance=1e-9)
        assert about["input"]["sequences"] == 4
        assert about["input"]["tokens"] == 48
        assert about["architecture"] == "Decoder"
        assert about["parameters"] == whole.about["parameters"]
        assert about["stacks"] == whole.about["stacks"]
        assert about["nulls"] == whole.about["nulls"]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@pytest.mark.parametrize("what", ["projections", "loss"])
def test_gradients_and_weights_are_those_of_the_joined_batch(answers, name, what):
    batch = {"input_ids": IDS} | ({"labels": IDS} if what == "loss" else {})
    if what == "projections":  # of parameters: norms of independent projections are added up batch by batch
        batch = [{"input_ids": IDS[part]} for part in PARTS]
    whole = fullrank.examine(decoder(), batch, spectrum=False, gradients=True, weights=True)
    assert {row.site for row in whole.rows} >= {"gradient", "weights"}
    for rank in range(2):
        assert not differences(answers[rank][f"{name} {what}"][0], whole, tolerance=1e-9)


def test_padding_of_each_part_is_known(answers):
    whole = fullrank.examine(decoder(), {"input_ids": IDS, "attention_mask": MASK}, spectrum=False)
    assert not differences(answers[0]["ddp padded"][0], whole, tolerance=1e-9)
    assert answers[0]["ddp padded"] == answers[1]["ddp padded"]


def test_copies_may_be_given_different_numbers_of_batches_and_shards_may_not(answers):
    whole = fullrank.examine(decoder(), {"input_ids": IDS}, spectrum=False)
    assert not differences(answers[1]["ddp uneven"][0], whole, tolerance=1e-9)
    for rank in range(2):
        kind, sentence = answers[rank]["fsdp uneven"][0]
        assert kind == "BatchError"
        assert "different numbers of batches" in sentence


def test_a_plain_model_in_a_distributed_job_is_each_process_s_own(answers):
    for rank in range(2):
        alone = fullrank.examine(decoder(), {"input_ids": IDS[PARTS[rank]]}, spectrum=False)
        assert not differences(answers[rank]["plain"][0], alone, tolerance=1e-12)


@pytest.mark.parametrize("name", ["ddp no trace", "fsdp no trace"])
def test_nothing_has_changed_and_the_next_step_is_the_same(answers, name):
    for rank in range(2):
        assert answers[rank][name][0] == []


@pytest.mark.parametrize("name", ["ddp bad mask", "fsdp bad mask", "ddp bad batch"])
def test_what_fails_in_one_process_is_said_in_both(answers, name):
    kind, sentence = answers[1][name][0]
    assert kind == "BatchError"
    assert answers[0][name][0] == (kind, f"process 1 could not examine its part of the batch: {sentence}")


@pytest.mark.parametrize("name", ["ddp nan", "fsdp nan"])
def test_a_stream_that_is_not_finite_in_one_process_ends_both(answers, name):
    kind, sentence = answers[1][name][0]
    assert kind == "NonFiniteError"
    assert "'blocks.0'" in sentence
    assert answers[0][name][0] == (kind, f"process 1 could not examine its part of the batch: {sentence}")


def test_weights_are_looked_at_where_they_are(answers):
    kind, sentence = answers[1]["fsdp weights"][0]
    assert kind == "NonFiniteError"
    assert "blocks.1.attention_norm.weight" in sentence
    assert answers[0]["fsdp weights"][0][0] == kind


@pytest.mark.parametrize("name", ["ddp default", "fsdp default"])
def test_a_distributed_model_is_given_its_batch(answers, name):
    for rank in range(2):
        kind, sentence = answers[rank][name][0]
        assert kind == "BatchError"
        assert "its own part of the batch" in sentence


def test_heads_spread_over_processes_are_refused(answers):
    for rank in range(2):
        kind, sentence = answers[rank]["tensor parallel"][0]
        assert kind == "ModelError"
        assert "tensor-parallel" in sentence
