"""Windows, whole records and their batches: what an epoch holds, in one process or several."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_pipeline as lp

IGNORE = -100  # a target that does not count


def loader(data, batch_size: int = 8, grad_accum: int = 1, rank: int = 0, world_size: int = 1):
    return lp.make_loader(data, lp.StepSampler(data, batch_size, 3, grad_accum, rank, world_size))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A store of records of 60 to 200 tokens of prompt and 3 to 120 of response."""
    folder = tmp_path_factory.mktemp("records")
    rng = random.Random(0)
    rows = []
    for i in range(240):
        letters = "".join(rng.choices("abcdefgh", k=rng.randrange(160)))
        rows.append(dict(instruction=f"t{i}", input=letters, output="Z" * rng.randrange(1, 120)))
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lp.build_corpus_from_sources(
        folder / "a.jsonl", lp.ByteTokenizer(), processed_dir=str(folder / "out")
    )


# --- windows ---


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(n=st.integers(2, 400), block=st.integers(2, 40), stride=st.integers(0, 50), data=st.data())
def test_windows(n, block, stride, data):
    """There are floor((N - 1 - block) / stride) + 1; a masked position is never a target."""
    bounds = data.draw(st.lists(st.integers(0, n), max_size=6, unique=True).map(sorted))
    masked = np.array(bounds[: len(bounds) // 2 * 2], np.int64).reshape(-1, 2)
    windows = lp.LMDataset(np.arange(n), block, stride, masked)
    block = min(block, n - 1)
    assert len(windows) == (n - 1 - block) // (stride or block) + 1
    hidden = {i for start, end in masked for i in range(start, end)}
    for i in range(len(windows)):
        x, y = windows[i]
        start = i * (stride or block)
        assert x.tolist() == list(range(start, start + block))
        assert y.tolist() == [IGNORE if t + 1 in hidden else t + 1 for t in x.tolist()]
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_an_epoch_trains_on_whole_blocks_and_another_on_the_rest():
    """Windows of one epoch do not overlap; what one epoch leaves out, another includes."""
    batches, seen = loader(lp.LMDataset(np.arange(1003), 10), 4), set()
    epochs = []
    for _ in range(60):
        targets = torch.cat([batch.y for batch in batches]).flatten().tolist()
        assert len(set(targets)) == len(targets) == 1000
        seen |= set(targets)
        epochs.append(tuple(targets))
    assert seen == set(range(1, 1003)) and len(set(epochs)) == 60


def test_a_corpus_shorter_than_a_block():
    [batch] = loader(lp.LMDataset(np.arange(6), 100), 4)
    assert batch.x.tolist() == [[0, 1, 2, 3, 4]] and batch.n_targets == 5
    with pytest.raises(lp.UserError):
        lp.LMDataset(np.arange(1), 100)


# --- whole records ---


def by_hand(store, row: int, block_size: int, loss_on: str) -> tuple[list, list]:
    """Inputs and targets of one record, worked out directly."""
    start, length, prompt, *_ = store.index["train"][row].tolist()
    ids = store.tokens["train"][start : start + length].tolist()
    head, answer = ids[:prompt], ids[prompt:][:block_size]
    room = block_size + 1 - len(answer)
    if len(head) > room:
        tail = room // 2
        head = head[: room - tail] + head[len(head) - tail :]
    ids = head + answer
    kept = [IGNORE] * (len(head) - 1) + answer if loss_on == "response" else ids[1:]
    return ids[:-1], kept


@pytest.mark.parametrize("loss_on", ["all", "response"])
@pytest.mark.parametrize("block_size", [400, 120, 2])
def test_records_are_padded_cut_and_masked(records, block_size, loss_on):
    data = lp.InstructionDataset(records, "train", block_size, loss_on)
    assert data.n_cut == (records.index["train"]["length"] > block_size + 1).sum()
    for i in range(0, len(data), 7):
        wanted = by_hand(records, i, block_size, loss_on)
        assert tuple(t.tolist() for t in data[i]) == wanted
    batch = data.collate([data[i] for i in (0, 1, 2, 3)])
    assert batch.x.shape == batch.y.shape and batch.x.shape[1] <= max(block_size, 16)
    assert batch.n_targets == (batch.y != IGNORE).sum()
    for row in range(4):
        n = len(data[row][0])
        assert (batch.x[row, n:] == 256).all() and (batch.y[row, n:] == IGNORE).all()


def test_batches_hold_records_of_like_length(records):
    batches = loader(lp.InstructionDataset(records, "train", 400))
    order = np.random.default_rng(0).permutation(len(batches.dataset))
    groups = [order[i * 8 : i * 8 + 8] for i in range(len(batches))]
    at_random = [batches.dataset.collate([batches.dataset[i] for i in ids]) for ids in groups]
    assert sum(b.x.numel() for b in batches) < 0.8 * sum(b.x.numel() for b in at_random)


def test_an_epoch_takes_each_record_once_and_leaves_none_out_for_good(records):
    batches = loader(lp.InstructionDataset(records, "train", 400), 32)
    assert len(batches) == len(batches.dataset) // 32
    seen = set()
    for _ in range(20):
        ids = [i for batch in batches.batch_sampler for i in batch]
        assert len(set(ids)) == len(ids) == 32 * len(batches)
        seen |= set(ids)
    assert seen == set(range(len(batches.dataset)))


def test_three_records_are_one_pass_an_epoch(tmp_path):
    rows = [dict(prompt=f"p{i}", completion="yes") for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    store = lp.build_corpus_from_sources(
        tmp_path / "a.json", processed_dir=str(tmp_path / "out"), val_fraction=0.0
    )
    train, val = lp.create_dataloaders(store, 200, batch_size=32, dataset=lp.InstructionDataset)
    assert [len(batch.x) for batch in train] == [3] and val is None


def test_answers_are_weighed_where_plain_text_validates(tmp_path):
    rows = "".join(json.dumps(dict(prompt=f"p{i}", completion="yes")) + "\n" for i in range(9))
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "valid.txt").write_text("Once upon a time there was a river.")
    store = lp.build_corpus_from_sources(tmp_path, processed_dir=str(tmp_path / "out"))
    weights = lp.InstructionDataset(store, "train", 64, answer_weight=5)[0][2]
    assert set(weights.tolist()) == {1.0, 5.0}
    assert len(lp.InstructionDataset(store, "val", 64, answer_weight=5)[0]) == 2


# --- a batch is a function of seed and step ---


def dataset(store, kind: str):
    if kind == "windows":
        return lp.LMDataset.from_store(store, "train", 32)
    return lp.InstructionDataset(store, "train", 100)


@pytest.mark.parametrize("kind", ["windows", "records"])
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_any_number_of_processes_sees_the_same_global_batch(records, kind, grad_accum):
    def ids(first: int, rank: int = 0, world_size: int = 1) -> list[int]:
        batches = loader(dataset(records, kind), 8, grad_accum, rank, world_size)
        batches.batch_sampler.first, batches.batch_sampler.end = first, first + 1
        return next(iter(batches.batch_sampler))

    for step in (0, 1, 40, 400):
        whole = ids(step)
        assert len(set(whole)) == 8
        for world_size in (2, 4):
            shares = [ids(step, rank, world_size) for rank in range(world_size)]
            assert sorted(i for share in shares for i in share) == sorted(whole)


@pytest.mark.parametrize("kind", ["windows", "records"])
def test_training_can_begin_at_any_step(records, kind):
    """Across the ends of epochs, as if all earlier steps had been taken."""
    steps = lp.steps(loader(dataset(records, kind)), 0, 70)
    known = [(batch.x, batch.y) for batch in steps]
    for first in (0, 3, 26, 27, 55, 69):
        [batch] = lp.steps(loader(dataset(records, kind)), first, first + 1)
        assert torch.equal(batch.x, known[first][0]) and torch.equal(batch.y, known[first][1])


@pytest.mark.parametrize("kind", ["windows", "records"])
def test_validation_is_the_same_every_time_and_shared_out(records, kind):
    data = dataset(records, kind)

    def rows(rank: int = 0, world_size: int = 1) -> list[list[int]]:
        sampler = lp.ValidationSampler(data, 8, 20, rank, world_size)
        assert len(list(lp.make_loader(data, sampler))) == len(sampler)
        return list(sampler)

    whole = [i for batch in rows() for i in batch]
    assert whole == [i for batch in rows() for i in batch] and len(set(whole)) == 20
    for world_size in (2, 4):
        shares = [rows(rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1, "processes go in step"
        assert sorted(i for share in shares for batch in share for i in batch) == sorted(whole)
