"""The pipeline's parts under the names in its description, used as a PyTorch user would."""

import csv
import math
import random
from datetime import datetime

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import llm_pipeline as lp

SMALL = dict(vocab_size=260, block_size=32, n_layer=2, n_head=4, n_embd=64, dropout=0.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> lp.TokenStore:
    folder = tmp_path_factory.mktemp("names")
    (folder / "raw").mkdir()
    text = "".join(f"{i} times two is {2 * i}.\n" for i in range(3000))
    (folder / "raw/table.txt").write_text(text, encoding="utf-8")
    return lp.build_corpus_from_sources(folder / "raw", processed_dir=folder / "stores")


def test_set_seed_seeds_three_libraries():
    draws = []
    for _ in range(2):
        lp.set_seed(11)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    lp.set_seed()


def test_windows_are_a_torch_dataset():
    data = lp.LMDataset(np.arange(100), 8)
    assert isinstance(data, Dataset) and len(data) == 12
    x, y = data[-1]
    assert x.tolist() == list(range(88, 96)) and torch.equal(y, x + 1) and x.dtype == torch.int64
    with pytest.raises(IndexError):
        data[12]
    for x, y in DataLoader(data, batch_size=5, shuffle=True):
        assert x.shape[1] == 8 and torch.equal(y, x + 1)
    assert len(lp.LMDataset(torch.arange(20), 8, stride=1)) == 12


def test_a_corpus_has_both_splits(store):
    assert len(store.tokens["train"]) > 8 * len(store.tokens["val"]) > 1000
    assert store.tokenizer.decode(store.tokens["train"][:20]).startswith("0 times")


def test_loaders_give_pairs_and_another_order_each_epoch(store):
    train, val = lp.create_dataloaders(store, block_size=32, batch_size=8, seed=5)
    epochs = [[x.clone() for x, _ in train] for _ in range(2)]
    assert len(epochs[0]) == len(epochs[1]) == len(train)
    assert not torch.equal(epochs[0][0], epochs[1][0])
    again, _ = lp.create_dataloaders(store, block_size=32, batch_size=8, seed=5)
    assert torch.equal(next(iter(again))[0], epochs[0][0])
    orders = [torch.cat([y for _, y in val]) for _ in range(2)]
    assert torch.equal(*orders) and len(orders[0]) == (len(store.tokens["val"]) - 1) // 32


def test_layers_on_a_config():
    config = lp.GPTConfig(**SMALL)
    x = torch.randn(2, 7, 64)
    for layer in (lp.CausalSelfAttention(config), lp.TransformerBlock(config), lp.MLP(config)):
        assert layer(x).shape == x.shape


def test_a_loop_of_ones_own(store):
    """Ten lines, as people write them; then perplexity and a sample."""
    lp.set_seed(3)
    model = lp.GPT(lp.GPTConfig(**SMALL))
    train, val = lp.create_dataloaders(store, block_size=32, batch_size=16)
    before = lp.evaluate_perplexity(model, val, max_batches=2)
    assert abs(before["loss"] - math.log(260)) < 0.3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for (x, y), _ in zip(train, range(60), strict=False):
        logits, loss = model(x, y)
        assert logits.shape == (16, 32, 260)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = lp.evaluate_perplexity(model, val, max_batches=2)
    assert after["loss"] < before["loss"] - 2 and after["ppl"] == pytest.approx(
        math.exp(after["loss"])
    )
    text = lp.sample_text(model, lp.ByteTokenizer(), "1 times", max_new_tokens=12, top_k=5)
    assert isinstance(text, str) and text
    idx = torch.randint(256, (2, 5))
    assert model.generate(idx, max_new_tokens=40, temperature=0.7).shape == (2, 45)


def test_the_logger_of_the_description(tmp_path):
    logger = lp.CSVLogger(str(tmp_path / "m.csv"))
    logger.log(10, 0, "train", 2.5)
    logger.log(20, 1, "val", 2.25)
    with open(tmp_path / "m.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["step", "epoch", "split", "loss", "timestamp"]
    assert [(row["step"], row["split"], float(row["loss"])) for row in rows] == [
        ("10", "train", 2.5), ("20", "val", 2.25)]  # fmt: skip
    datetime.fromisoformat(rows[0]["timestamp"])
