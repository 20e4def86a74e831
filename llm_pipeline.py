# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.2.6; python_version < '3.11'",
#     "numpy==2.4.6; python_version >= '3.11'",
#     "tqdm==4.70.1",
# ]
# ///
"""llm_pipeline: from raw text to a small GPT that you trained yourself, in one file.

    python llm_pipeline.py train --preset cpu-debug          # data -> tokenizer -> GPT
    python llm_pipeline.py train --data_dir book.txt --minutes 10   # the best of ten minutes
    python llm_pipeline.py finetune --ckpt ckpts/best.pth    # learn to follow instructions
    python llm_pipeline.py eval --ckpt ckpts/best.pth        # perplexity, bits per byte, F1
    python llm_pipeline.py sample --ckpt ckpts/best_finetune.pth --prompt "Name a colour."
    python llm_pipeline.py prepare --data_dir data/raw       # raw text -> token store, and a report
    python llm_pipeline.py export --ckpt ckpts/best.pth --out_dir hf   # -> Hugging Face
    python llm_pipeline.py bench --preset tiny-8g            # speed and memory on this machine

`COMMAND --help` shows the flags to begin with, `--help_all` every one. The file is a book in two
parts. Part I is the course, to be read from the top in one sitting:

     1 Tokens          text as bytes, special tokens, the prompt template
     2 Batches         windows and whole records; each step's batch, reproducible
     3 Model           positions, attention, MLP, block, GPT
     4 Optimisation    objectives, AdamW and Muon, schedules
     5 Training        gradients, the step, validation, the loop
     6 Sampling        the key/value cache, the next token, generation
     7 Presets         names that set many settings at once

Part II, the workshop, makes it exact, fast and usable: 8 Runtime, 9 The same, faster,
10 Vocabularies, 11 Corpus, 12 Checkpoints, 13 Interchange, 14 Evaluation, 15 Commands,
16 Command line.
"""

from __future__ import annotations

import argparse
import bz2
import codecs
import contextlib
import copy
import csv
import difflib
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import math
import os
import pickle
import platform
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial, wraps
from itertools import chain, groupby, islice, takewhile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # ctrl-c during the slow imports below: no traceback, exit code 130
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# OpenMP's threads spin while they wait, which on a busy machine slows the thread they wait for
# (tests/bench/beside.py). Read when torch is first imported. Changes no result.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from tqdm import tqdm

__version__ = "2.0"


class UserError(Exception):
    """An error the user can fix. Its message is one line that says what to do next."""


def option(default, help: str, resume="fixed", **limits):
    """A dataclass field that is also a flag. Limits: low, high, above (exclusive), and choices, as
    names or as the table they are the rows of.

    resume: a resumed run keeps its own value and refuses another ("fixed"), keeps it unless
    another is given ("changeable"), or never stored it ("session_only").
    """
    return field(default=default, metadata={"help": help, "resume": resume, **limits})


changeable = partial(option, resume="changeable")
session_only = partial(option, resume="session_only")


class Settings:
    """A command's settings. `explicit` names those the user gave rather than left at a default."""

    explicit: frozenset[str] = frozenset()


# ====================================================================================
# PART I: THE COURSE
# ====================================================================================
# 1. Tokens
#
# Text becomes numbers. Bytes need no training: 256 ids, and four special tokens that text cannot
# spell. Other vocabularies (section 10) have the same interface: vocab_size, the special ids,
# prefix, encode, encode_batch, decode, spec.
#
#     >>> import llm_pipeline as lp
#     >>> lp.ByteTokenizer().encode("Größe").tolist()
#     [71, 114, 195, 182, 195, 159, 101]
#     >>> print(lp.instruction_prompt("Name a colour.") + lp.instruction_response("red"), end="")
#     ### Instruction: Name a colour.
#     ### Input:
#     ### Output: red
# ====================================================================================

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|sep|>")


class ByteTokenizer:
    """UTF-8 bytes 0..255, then pad, bos, eos, sep. Any string comes back as it was."""

    vocab_size = 260
    pad_id, bos_id, eos_id, sep_id = 256, 257, 258, 259
    unk_id = None  # nothing is unknown
    prefix = (bos_id,)  # what every text begins with; a foreign vocabulary may have nothing here
    end_ids = (eos_id, sep_id)  # what ends a text
    cuts_safely = True  # encoded in pieces, a text has the same ids

    def encode(self, text: str) -> np.ndarray:
        """The text's UTF-8 bytes, (n,) uint16. Even lone surrogates, illegal in UTF-8, survive."""
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int], before: Sequence[int] = ()) -> str:
        """Text of the ids, special tokens left out; bytes that are not UTF-8 become U+FFFD.

        before: the ids that precede these. Bytes ignore them; a vocabulary of words needs them to
        know whether a leading space belongs to the text.
        """
        data = bytes(i for i in map(int, ids) if i < 256)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def spec(self) -> dict:
        """Plain data from which `tokenizer_from_spec` makes this tokenizer again."""
        return {"kind": "byte"}


def instruction_prompt(instruction: str, input: str = "", system: str = "") -> str:
    """The one prompt template. The response follows as " text" and a newline, then `sep`.

    Further turns of a conversation follow in the same form; only the first has a system text.
    """
    head = f"### System: {system}\n" if system else ""
    return f"{head}### Instruction: {instruction}\n### Input: {input}\n### Output:"


def instruction_response(output: str) -> str:
    return f" {output}\n"


# ====================================================================================
# 2. Batches
#
# Token ids become inputs x and targets y, the same ids one token ahead. Data sets, samplers and
# loaders are PyTorch's. What is special is the sampler: the batch of step s is a function of
# (seed, s) alone, so that resuming costs nothing, and one process or four see the same batches.
#
# A target that is not to be learned is IGNORE in y: answers that the data says not to train on, the
# prompt under loss_on "response", and padding.
#
#     >>> x, y = lp.LMDataset(range(17), block_size=8)[1]
#     >>> x.tolist(), y.tolist()
#     ([8, 9, 10, 11, 12, 13, 14, 15], [9, 10, 11, 12, 13, 14, 15, 16])
#     >>> train, val = lp.create_dataloaders(lp.build_corpus_from_sources(), 64, batch_size=4)
#     >>> next(iter(train)).x.shape
#     torch.Size([4, 64])
# ====================================================================================

IGNORE = -100  # a target that does not count; F.cross_entropy skips it by default


def set_seed(seed: int = 1337) -> None:
    """Seed Python, NumPy and PyTorch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Without a GPU, torch.manual_seed spends half a millisecond preparing to seed one.
    (torch if torch.accelerator.is_available() else torch.default_generator).manual_seed(seed)


def derive_seed(*parts: int) -> int:
    """An independent 63-bit seed for each tuple of integers, such as (seed, step, micro-batch)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def evenly_spaced(n: int, limit: int) -> np.ndarray:
    """Up to `limit` (0: all) of range(n), evenly spaced."""
    return np.linspace(0, n - 1, min(limit or n, n)).round().astype(np.int64)


@dataclass
class Batch:
    """Inputs and targets, (B, T) int64 each; of preference pairs (B, 2, T), chosen and rejected.

    Unpacks as `x, y = batch`.
    """

    x: Tensor
    y: Tensor  # IGNORE where nothing is to be learned
    weight: Tensor | None = None  # (B, T) how much each target counts; None: all alike
    reference: Tensor | None = None  # (B, 2) log-probabilities of a pair under the base model
    n_targets: float | None = None  # divides its summed loss: a count of targets, weights or pairs

    def __post_init__(self):
        if self.n_targets is None and self.x.ndim == 3:
            self.n_targets = len(self.x)
        elif self.n_targets is None:
            counted = self.y != IGNORE if self.weight is None else self.weight
            self.n_targets = float(counted.sum())

    def __getitem__(self, i: int) -> Tensor:  # unpacking uses it
        return (self.x, self.y)[i]

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}

    def to(self, device: torch.device) -> Batch:
        return replace(self, **{name: t.to(device) for name, t in self.tensors().items()})

    def split(self, parts: int) -> list[Batch]:
        """Up to `parts` micro-batches of whole rows. Their targets stay uncounted: counting would
        make the CPU wait for a GPU."""
        tensors = self.tensors()
        rows = zip(*(t.chunk(parts) for t in tensors.values()), strict=True)
        micro = [dict(zip(tensors, row, strict=True)) for row in rows]
        return [replace(self, **each, n_targets=math.nan) for each in micro]


class LMDataset(Dataset):
    """Windows of `block_size` ids, `stride` apart; targets are the inputs, one token ahead.

    tokens: (N,) ids of any integer type, possibly memory-mapped. If they are too few for a window,
    it shrinks to fit. masked: (n, 2) positions [start, end) that are never targets. Raises
    UserError for fewer than two tokens.
    """

    def __init__(self, tokens, block_size: int, stride: int = 0, masked=None):
        if len(tokens) < 2:
            what = f"{len(tokens)} tokens make no window: add data"
            raise UserError(f"{what}, or split it otherwise (--split_by content, --val_fraction)")
        self.tokens, self.block_size = tokens, min(block_size, len(tokens) - 1)
        self.stride = stride or self.block_size
        self.masked = np.empty((0, 2), np.int64) if masked is None else masked
        self.slack = (len(tokens) - 1 - self.block_size) % self.stride  # tokens left at the end
        self.shift = 0  # moves all windows by up to slack; StepSampler draws it for each epoch

    @classmethod
    def from_store(cls, store: TokenStore, split: str, block_size: int, stride: int = 0):
        return cls(store.tokens[split], block_size, stride, store.masked(split))

    def __len__(self) -> int:
        return (len(self.tokens) - 1 - self.block_size) // self.stride + 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """(x, y) of window i: (block_size,) int64 each."""
        start = self.shift + range(len(self))[i] * self.stride
        end = start + self.block_size + 1
        ids = torch.from_numpy(np.array(self.tokens[start:end], np.int64))
        x, y = ids[:-1], ids[1:].clone()
        # y[j] is token start + 1 + j, so a masked [a, b) is y[a - start - 1 : b - start - 1].
        for a, b in self.masked[np.searchsorted(self.masked[:, 1], start + 1, "right") :]:
            if a >= end:
                break
            y[max(0, a - start - 1) : b - start - 1] = IGNORE
        return x, y

    def collate(self, samples: list[tuple]) -> Batch:
        return pad(samples, 0, self.block_size)


def fit_record(prompt: np.ndarray, response: np.ndarray, limit: int) -> tuple[np.ndarray, int]:
    """A record cut to `limit` ids, and how many of those are prompt.

    The response is kept as far as it fits after one token of prompt; the prompt loses its middle,
    since its beginning says what to do and its end asks for the answer.
    """
    response = response[: limit - 1]
    room = limit - len(response)
    if len(prompt) > room:
        prompt = np.concatenate([prompt[: room - room // 2], prompt[len(prompt) - room // 2 :]])
    return np.concatenate([prompt, response]), len(prompt)


class InstructionDataset(Dataset):
    """Whole records of a store. A sample is (x, y) or, with weights, (x, y, weight), unpadded.

    loss_on: with "all", every token is a target, as in pretraining. With "response", only answers
    are: each trained answer of a conversation is a sample, with all that precedes it as its prompt.
    answer_weight: how much more than other tokens an answer's tokens count in training.
    Raises UserError if the split holds no record, or plain text with no answer to weigh.
    """

    def __init__(self, store: TokenStore, split: str, block_size: int, loss_on="all",
                 answer_weight=1):  # fmt: skip
        self.store, self.split, self.block_size = store, split, block_size
        self.loss_on, self.answer_weight = loss_on, answer_weight if split == "train" else 1
        self.index = index = store.index[split]
        trained = np.flatnonzero(index["trained"])
        self.rows = store.whole_records(split) if loss_on == "all" else trained  # of the index
        if not len(self.rows):
            raise UserError(f"the {split} split holds no records")
        length, prompt = (index[name][self.rows].astype(np.int64) for name in ("length", "prompt"))
        if self.answer_weight > 1 and (prompt <= 1).any():
            raise UserError("plain text has no answers to weigh: leave out --answer_weight")
        response = np.minimum(length - prompt, block_size)
        self.lengths = np.minimum(prompt, block_size + 1 - response) + response  # once cut
        self.n_cut = int((self.lengths < length).sum())

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, how much each counts as a target) of sample i, cut to the block."""
        # The index has a row for each answer: the record begins at start, this answer is
        # [start + prompt, start + length). Rows of one record share start; the last is the longest.
        index, row = self.index, int(self.rows[i])
        start, length, prompt = (int(index[name][row]) for name in ("start", "length", "prompt"))
        ids = self.store.ids(self.split, start, length)
        weight = np.full(length, 1.0 if self.loss_on == "all" else 0.0, np.float32)
        weight[prompt:] = self.answer_weight
        while self.loss_on == "all" and row > 0 and index["start"][row - 1] == start:
            row -= 1  # the answers before the last
            answer = slice(int(index["prompt"][row]), int(index["length"][row]))
            weight[answer] = self.answer_weight if index["trained"][row] else 0.0
        limit = self.block_size + 1
        ids, _ = fit_record(ids[:prompt], ids[prompt:], limit)
        weight, _ = fit_record(weight[:prompt], weight[prompt:], limit)
        return ids, weight

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        ids, weight = self.record(range(len(self))[i])
        y = np.where(weight[1:] > 0, ids[1:], IGNORE)
        sample = torch.from_numpy(ids[:-1]), torch.from_numpy(y)
        return (*sample, torch.from_numpy(weight[1:])) if self.answer_weight > 1 else sample

    def collate(self, samples: list[tuple]) -> Batch:
        return pad(samples, self.store.tokenizer.pad_id, self.block_size)


def pad(samples: list[tuple[Tensor, ...]], pad_id: int, block_size: int) -> Batch:
    """Samples of unequal length as one batch: padding is `pad_id` in x, IGNORE in y, weight 0.

    Widths are multiples of 16, since kernels are built for each shape. With no samples it makes a
    batch in which nothing counts, for a process that is left without a share.
    """
    if not samples:
        x = torch.full((1, min(16, block_size)), pad_id)
        return Batch(x, torch.full_like(x, IGNORE), n_targets=0.0)
    longest = max(len(x) for x, *_ in samples)
    width = min(-(-longest // 16) * 16, max(longest, block_size))
    columns = []
    for column, filler in zip(zip(*samples, strict=True), (pad_id, IGNORE, 0.0), strict=False):
        padded = nn.utils.rnn.pad_sequence(list(column), True, filler)  # (B, longest)
        columns.append(F.pad(padded, (0, width - longest), value=filler))
    return Batch(*columns)


class StepSampler(Sampler):
    """The sample indices of each step's batch, a function of (seed, step).

    Every epoch is shuffled anew and drops what does not fill its last batch; a data set smaller
    than a batch is one batch. Iterating again continues with the next epoch. Micro-batch k of a
    step holds rows [k m, (k + 1) m) of the batch; process r of w takes micro-batches r, w + r, ...,
    so that any number of processes sees the same ones.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed=1337, grad_accum=1, rank=0,
                 world_size=1):  # fmt: skip
        n = len(dataset)
        if n < world_size:
            raise UserError(f"{n} samples for {world_size} processes: start fewer, or add data")
        self.dataset, self.seed = dataset, seed
        self.batch_size = size = min(batch_size, n - n % world_size)
        self.steps_per_epoch = n // size
        self.first, self.end = 0, self.steps_per_epoch  # steps to go through
        self.first_batch_only = False  # --overfit_batch
        self.epoch, self.order = -1, np.empty(0, np.int64)
        self.rows = np.arange(size)[rank::world_size]  # this process's
        if size % (grad_accum * world_size) == 0:  # else the data set is smaller than a batch
            self.rows = np.arange(size).reshape(grad_accum, world_size, -1)[:, rank].ravel()

    def __len__(self) -> int:
        return self.steps_per_epoch

    def begin_epoch(self, epoch: int) -> None:
        """Records of similar length share a batch, which keeps padding low: pools of 64 batches are
        sorted, then the batches shuffled. In batches of 2, lengths 9 2 8 3 become 2 3 | 8 9."""
        rng = np.random.default_rng((self.seed, epoch))
        self.epoch, order = epoch, rng.permutation(len(self.dataset))
        if isinstance(self.dataset, LMDataset):
            self.order, self.dataset.shift = order, int(rng.integers(self.dataset.slack + 1))
            return
        size, n_batches = self.batch_size, self.steps_per_epoch
        order, lengths = order[: n_batches * size], self.dataset.lengths
        pools = [order[i : i + 64 * size] for i in range(0, len(order), 64 * size)]
        pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
        batches = np.concatenate(pools).reshape(n_batches, size)
        self.order = batches[rng.permutation(n_batches)].ravel()

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.end):
            epoch, i = divmod(0 if self.first_batch_only else step, self.steps_per_epoch)
            if epoch != self.epoch:
                self.begin_epoch(epoch)
            batch = self.order[i * self.batch_size : (i + 1) * self.batch_size]
            yield batch[self.rows].tolist()
        self.first, self.end = self.end, self.end + self.steps_per_epoch


class ValidationSampler(Sampler):
    """Up to `limit` (0: all) samples, evenly spaced, in batches that are the same every time.

    Processes take batches in turn, equally many each: gathering sharded weights needs all of them,
    so a process without a share gets an empty batch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, limit: int = 0, rank=0, world_size=1):
        ids = evenly_spaced(len(dataset), limit)
        if not isinstance(dataset, LMDataset):
            ids = ids[np.argsort(dataset.lengths[ids], kind="stable")]
        batches = [ids[i : i + batch_size].tolist() for i in range(0, len(ids), batch_size)]
        batches += [[]] * (-len(batches) % world_size)
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def make_loader(dataset: Dataset, sampler: Sampler) -> DataLoader:
    """A loader without worker processes, which cost ten times what they save. Its own generator
    keeps `iter(loader)` from drawing a number that dropout would have drawn."""
    own = torch.Generator()
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, generator=own)


def create_dataloaders(
    corpus: TokenStore, block_size: int = 256, batch_size: int = 32, seed: int = 1337, *,
    dataset: Callable[[TokenStore, str, int], Dataset] = LMDataset.from_store, stride: int = 0,
    eval_batches: int = 0, grad_accum: int = 1, rt: Runtime | None = None,
) -> tuple[DataLoader, DataLoader | None]:  # fmt: skip
    """Loaders of training and validation batches; the second is None if its split is empty.

    `for x, y in train` is an epoch: (batch_size, block_size) int64 each. dataset: makes a split's
    data set. stride: tokens from one training window to the next (0: block_size). eval_batches: how
    many batches validate (0: all). rt (section 8): which process this is. Raises UserError if there
    is no data.
    """
    rank, world_size = (rt.rank, rt.world_size) if rt else (0, 1)
    more = {"stride": stride} if stride else {}
    data = dataset(corpus, "train", block_size, **more)
    train = make_loader(data, StepSampler(data, batch_size, seed, grad_accum, rank, world_size))
    if len(corpus.tokens["val"]) < 2:
        return train, None
    data = dataset(corpus, "val", block_size)
    # No more rows at a time than training has: what fits there fits here.
    rows = max(1, batch_size // (grad_accum * world_size))
    sampler = ValidationSampler(data, rows, eval_batches * batch_size, rank, world_size)
    return train, make_loader(data, sampler)


def steps(loader: DataLoader, first: int, end: int = sys.maxsize) -> Iterator[Batch]:
    """Training batches of the steps first..end-1, through as many epochs as that takes."""
    loader.batch_sampler.first, loader.batch_sampler.end = first, end
    return iter(loader)


# ====================================================================================
# 3. Model
#
# A decoder-only Transformer, like GPT-2 or Qwen3 depending on its settings. Shapes: B sequences, T
# tokens, C = n_embd, H query heads, K key/value heads, D = head_dim, V = vocab_size. Operations are
# plain PyTorch; section 9 gives some of them faster twins.
#
#     >>> model = lp.GPT(lp.GPTConfig(block_size=64, n_layer=2, n_head=4, n_embd=64))
#     >>> logits, loss = model(torch.randint(256, (2, 8)), torch.randint(256, (2, 8)))
#     >>> logits.shape, loss.item()  # about log(260), that of a uniform guess
#     (torch.Size([2, 8, 260]), 5.57...)
# ====================================================================================


# What settings choose from; filled below, next to the code. A new row is a new value of the flag.
NORMS: dict[str, Callable] = {}
ACTIVATIONS: dict[str, Callable] = {}
ATTENTION: dict[str, Callable] = {}


@dataclass
class ModelSettings(Settings):
    """Model: its shape; a zero means the usual proportion."""

    block_size: int = option(256, "longest context, in tokens", low=2, high=2**20)
    n_layer: int = option(6, "transformer blocks", low=1, high=1024)
    n_head: int = option(8, "query heads", low=1, high=1024)
    n_kv_head: int = option(0, "key and value heads (0: as many as n_head)", low=0, high=1024)
    n_embd: int = option(512, "width of the residual stream", low=1, high=2**16)
    head_dim: int = option(0, "width of a head (0: n_embd / n_head)", low=0, high=2**12)
    n_inner: int = option(0, "width inside the MLP (0: 4 n_embd; swiglu 8/3)", low=0, high=2**20)
    dropout: float = option(0.1, "share of activations zeroed in training", low=0.0, high=0.95)
    token_dropout: float = option(0.0, "share of input tokens hidden", low=0.0, high=0.95)
    bias: bool = option(True, "biases in linear layers and LayerNorm")
    tie_weights: bool = option(True, "one matrix for embedding and head")
    pos: str = option("learned", "how positions enter", choices=("learned", "rope", "alibi"))
    norm: str = option("layernorm", "normalisation", choices=NORMS)
    norm_eps: float = option(1e-5, "added to the variance", above=0.0, high=1.0)
    mlp: str = option("gelu", "activation of the MLP", choices=ACTIVATIONS)
    qk_norm: bool = option(False, "RMSNorm on queries and keys, per head")
    rope_theta: float = option(1e4, "base of the rotary wavelengths", above=1.0, high=1e12)
    attn: str = option("sdpa", "attention: step by step or fused", choices=ATTENTION)
    init_std: float = option(0.02, "standard deviation of the initial weights", above=0.0, high=1.0)
    zero_init: bool = option(False, "start each block as the identity (output matrices at zero)")


@dataclass
class GPTConfig(ModelSettings):
    """The shape of one model, every zero filled in. `ARCHS` (section 7) sets its style."""

    vocab_size: int = option(260, "number of token ids", low=2, high=2**24)

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.head_dim and self.n_head and self.n_embd % self.n_head == 0:
            self.head_dim = self.n_embd // self.n_head
        if not self.n_inner:  # 8/3 gives the three SwiGLU matrices the size of two at 4
            wide = self.mlp == "swiglu"
            self.n_inner = -(-8 * self.n_embd // 96) * 32 if wide else 4 * self.n_embd

    def problems(self) -> list[str]:
        """What makes this shape impossible, one line each."""
        found = []
        if not self.head_dim:
            sizes = f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}"
            found.append(f"{sizes}: change one of them, or give head_dim")
        if self.n_head % self.n_kv_head:
            found.append(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.pos == "rope" and self.head_dim % 2:
            found.append(f"rotary positions need an even head_dim, not {self.head_dim}")
        return found


# --- operations, some of which have a faster twin ---

KERNELS: dict[tuple[str, str], Callable] = {}  # (operation, device type) -> its faster twin


def operation(plain: Callable) -> Callable:
    """An operation written for the reader; section 9 may register a faster twin for a device."""

    @wraps(plain)
    def dispatch(x: Tensor, *args):
        return KERNELS.get((plain.__name__, x.device.type), plain)(x, *args)

    dispatch.plain = plain
    return dispatch


@operation
def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes each element with probability p and scales the others by 1 / (1 - p)."""
    return F.dropout(x, p)


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and self.p else x


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al., 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        # F.layer_norm's own weight and bias get gradients that depend on the number of threads.
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight
        return x if self.bias is None else x + self.bias


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019)."""

    def forward(self, x: Tensor) -> Tensor:  # F.rms_norm warns if weight has another dtype
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * value, the two halves of x (Shazeer, 2020)."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


NORMS |= {
    "layernorm": lambda config: LayerNorm(config.n_embd, config.norm_eps, bias=config.bias),
    "rmsnorm": lambda config: RMSNorm(config.n_embd, config.norm_eps),
}
ACTIVATIONS |= {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "swiglu": swiglu,
}


# --- positions ---


def rotary(config: GPTConfig, pos: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and signed sin that turn queries and keys at the positions `pos`, (T, 1, D) each.

    Pair (i, i + D/2) of a head, as in GPT-NeoX, turns by the angle pos * theta^(-2i/D) (Su et al.,
    2021), so that a query and a key are compared by their distance, wherever they are.
    """
    if config.pos != "rope":
        return None
    half = config.head_dim // 2
    exponent = torch.arange(half, device=pos.device, dtype=torch.float32) / half
    angle = pos[:, None].float() * config.rope_theta**-exponent  # fp32: large angles
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # (T, 1, D/2)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (B, T, heads, D), turned by their positions.

    With D = 4 and angles a, b: (x0, x1, x2, x3) becomes
    (x0 cos a - x2 sin a, x1 cos b - x3 sin b, x2 cos a + x0 sin a, x3 cos b + x1 sin b).
    """
    cos, sin = rotation
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin


def alibi(config: GPTConfig, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
    """What is added to attention scores, (H, Tq, Tk): they fall linearly with distance.

    Each head has its own slope, so that some look near and some far; there is no position embedding
    to outgrow (Press et al., 2022).
    """
    if config.pos != "alibi":
        return None
    H = config.n_head
    n = 2 ** math.floor(math.log2(H))  # where H is no power of two, the rule of the authors' code
    head = torch.arange(H, device=q_pos.device)
    exponents = torch.where(head < n, -8 * (head + 1) / n, -4 * (2 * (head - n) + 1) / n)
    return exponents.exp2()[:, None, None] * (k_pos - q_pos[:, None])


def attention_mask(config: GPTConfig, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
    """What is added to scores, (Tq, Tk) or (H, Tq, Tk): -inf where a token may not look, ALiBi's
    bias elsewhere. None where plain causality, the last query at the last key, says it all."""
    bias = alibi(config, q_pos, k_pos)
    if bias is None and len(q_pos) in (1, len(k_pos)):
        return None
    return torch.where(q_pos[:, None] < k_pos, -math.inf, 0.0 if bias is None else bias)


# --- attention ---


def attention_manual(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p_drop: float) -> Tensor:
    """softmax(Q K^T / sqrt(D) + mask) V (Vaswani et al., 2017), step by step.

    q: (B, H, Tq, D); k, v: (B, K, Tk, D), each key head serving H / K query heads;
    mask broadcasts to (B, H, Tq, Tk). None means causal, with the last query at the last key.
    """
    (H, Tq, D), (K, Tk) = q.shape[1:], k.shape[1:3]
    k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))  # (B, H, Tk, D)
    if mask is None:  # -inf above the diagonal: no token sees those after it
        mask = torch.full((Tq, Tk), -math.inf, dtype=q.dtype, device=q.device).triu(Tk - Tq + 1)
    scores = q @ k.mT / math.sqrt(D) + mask  # (B, H, Tq, Tk)
    weights = scores.softmax(-1)  # each row sums to 1
    weights = dropout(weights, p_drop) if p_drop else weights
    return weights @ v  # (B, H, Tq, D)


@operation
def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p_drop: float) -> Tensor:
    """The same by PyTorch's fused kernels, which never hold the scores. Without a mask, Tq is 1 or
    Tk."""
    causal = False
    if mask is None and q.shape[-2] > 1:  # as a branch: compiled, lengths may be symbols
        causal = True
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, p_drop, causal, enable_gqa=grouped)


ATTENTION |= {"manual": attention_manual, "sdpa": attention_sdpa}


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past; key and value heads may serve groups of query heads."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.config, self.layer = config, layer
        q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.qkv = nn.Linear(config.n_embd, q + 2 * kv, bias=config.bias)  # one product for three
        self.proj = nn.Linear(q, config.n_embd, bias=config.bias)
        self.drop = Dropout(config.dropout)
        if config.qk_norm:  # keeps scores from growing with the weights
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rotation=None, mask: Tensor | None = None, cache=None) -> Tensor:
        """(B, T, C) -> (B, T, C). rotation, mask: `rotary` and `attention_mask` of x's positions.

        cache (section 6): what came before x; extended by x's keys and values.
        """
        c, (B, T, _) = self.config, x.shape
        if rotation is None and mask is None and cache is None:  # used by itself, at 0..T-1
            pos = torch.arange(T, device=x.device)
            rotation, mask = rotary(c, pos), attention_mask(c, pos, pos)
        qkv = self.qkv(x).view(B, T, -1, c.head_dim)  # (B, T, H + 2K, D)
        q, k, v = qkv.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        # (B, heads, T, D); rotation and norm are in fp32, the products in v's dtype.
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if mask is not None:
            mask = mask.to(q.dtype)  # fused kernels require it
        y = ATTENTION[c.attn](q, k, v, mask, c.dropout if self.training else 0.0)
        return self.drop(self.proj(y.transpose(1, 2).reshape(B, T, -1)))  # (B, T, C)


class MLP(nn.Module):
    """Up, activation, down: each token processed on its own."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        halves = 2 if config.mlp == "swiglu" else 1  # gate and value share one matrix
        self.up = nn.Linear(config.n_embd, halves * config.n_inner, bias=config.bias)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.activation(self.up(x))))


class TransformerBlock(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + MLP(norm(x)).

    The norms are on the branches, not on the residual stream, so that gradients reach the first
    block undiminished (Xiong et al., 2020).
    """

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.norm1 = NORMS[config.norm](config)
        self.attn = CausalSelfAttention(config, layer)
        self.norm2 = NORMS[config.norm](config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation=None, mask: Tensor | None = None, cache=None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation, mask, cache)
        return x + self.mlp(self.norm2(x))


@operation
def head_loss(h: Tensor, weight: Tensor, targets: Tensor, reduction: str, bias=None) -> Tensor:
    """Cross entropy of softmax(h W^T + bias) with the targets: (N,) losses, or their "sum".

    h: (N, C); weight: (V, C); targets: (N,), those equal to IGNORE left out (loss 0).
    """
    logits = F.linear(h, weight).float()  # (N, V)
    if bias is not None:
        logits = logits + bias
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


class GPT(nn.Module):
    """A decoder-only Transformer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.problems():
            raise UserError("; ".join(config.problems()))
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":  # a trained vector for each position (Radford et al., 2019)
            self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layer))
        self.norm_f = NORMS[config.norm](config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.tok_emb.weight
        self.grad_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, init_std). Matrices that write to the residual stream, two in each block, start
        smaller the deeper the model (Radford et al., 2019), or at zero."""
        std = self.config.init_std
        small = 0.0 if self.config.zero_init else std / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                p.normal_(0.0, small if name.endswith(("proj.weight", "down.weight")) else std)
            elif name.endswith("bias"):
                p.zero_()

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C) after the final norm. A cache holds what came before idx.

        Raises ValueError if positions are learned and these go beyond block_size.
        """
        start = 0 if cache is None else cache.length
        end = start + idx.shape[1]
        if end > self.config.block_size and self.config.pos == "learned":
            raise ValueError(f"{end} tokens exceed block_size {self.config.block_size}")
        pos = torch.arange(start, end, device=idx.device)
        mask = attention_mask(self.config, pos, torch.arange(end, device=idx.device))
        h = self.trunk(idx, pos, mask, cache)
        if cache is not None:
            cache.length = end
        return h

    def trunk(self, idx: Tensor, pos: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        """`hidden` for tokens at the positions `pos`, (T,)."""
        rotation = rotary(self.config, pos)
        x = self.tok_emb(idx)
        if self.training and (p := self.config.token_dropout):
            # A hidden token must be told from the others (Gal and Ghahramani, 2016, hide words).
            x = x * dropout(x.new_ones(x.shape[:2]), p)[..., None]
        if self.config.pos == "learned":
            x = x + self.positions(pos)
        x = self.drop(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:  # recomputed in the backward pass
                x = checkpoint(block, x, rotation, mask, use_reentrant=False)
            else:
                x = block(x, rotation, mask, cache)
        return self.norm_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, T) ids -> fp32 logits (B, T, V) for the token after each, and their mean cross
        entropy with the targets (B, T), IGNORE left out; the loss is None without targets."""
        logits = self.head(self.hidden(idx)).float()
        if targets is None:
            return logits, None
        flat = logits.flatten(0, 1), targets.flatten()
        return logits, F.cross_entropy(*flat, ignore_index=IGNORE)

    def losses(self, idx: Tensor, targets: Tensor, reduction="none", among=None) -> Tensor:
        """The same cross entropy for each target, (B, T), 0 where it is IGNORE; or their "sum".

        For training and scoring: a large vocabulary's (B, T, V) logits need never exist (section
        9). among: (ids (M,), bias (M,)) for a softmax over these ids alone, with targets as indices
        into them; for `over_sampled_ids` (section 8).
        """
        h = self.hidden(idx).flatten(0, 1)  # (B T, C)
        ids, bias = among or (None, None)
        weight = self.head.weight if ids is None else F.embedding(ids, self.head.weight)
        losses = head_loss(h, weight, targets.flatten(), reduction, bias)
        return losses if reduction == "sum" else losses.view_as(targets)

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature=1.0, top_k=0, seed=None, **sampling
    ) -> Tensor:
        """(B, T) ids -> (B, T + max_new_tokens): each row followed by its continuation.

        seed: None draws one from PyTorch's generator. sampling: see `sample_next` (section 6).
        """
        seed = torch.randint(2**62, ()).item() if seed is None else seed
        sampling |= dict(temperature=temperature, top_k=top_k)
        training = self.training
        self.eval()
        try:
            new = list(generate(self, idx, max_new_tokens, seed=seed, **sampling))  # steps of B
        finally:
            self.train(training)
        return torch.cat([idx, torch.tensor(new, dtype=idx.dtype, device=idx.device).T], 1)


def fused_rows(config: GPTConfig) -> dict[str, list[int]]:
    """How the rows of a fused weight divide into the matrices it combines."""
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    halves = [config.n_inner] * (2 if config.mlp == "swiglu" else 1)
    return {"attn.qkv": [q, kv, kv], "mlp.up": halves}


# ====================================================================================
# 4. Optimisation
#
# What is minimised (objectives), by what rule (AdamW, Muon), and at which rate (schedules). Each is
# a row of a table, so that the loop never asks which one it runs.
#
#     >>> settings = lp.OptimConfig(warmup_steps=10, lr_schedule="linear", min_lr_ratio=0.0)
#     >>> [round(lp.lr_multiplier(step, 100, settings), 2) for step in (0, 5, 10, 55, 99)]
#     [0.09, 0.55, 1.0, 0.5, 0.01]
# ====================================================================================


# How far from min_lr_ratio to 1 the rate is, at `progress` from 0 to 1 after the warm-up.
SCHEDULES: dict[str, Callable[[float, OptimConfig], float]] = {
    "constant": lambda progress, config: 1.0,
    "linear": lambda progress, config: 1 - progress,
    "cosine": lambda progress, config: 0.5 * (1 + math.cos(math.pi * progress)),
    # Warm-up, stable, decay (Hu et al., 2024).
    "wsd": lambda progress, config: min(1.0, (1 - progress) / max(config.decay_fraction, 1e-9)),
}


@dataclass
class OptimConfig(Settings):
    """Optimisation: batches, optimizer, learning rate."""

    batch_size: int = option(32, "sequences per step, over all processes", low=1, high=2**20)
    grad_accum: int = changeable(1, "micro-batches per batch (dropout differs)", low=1, high=2**16)
    lr: float = option(3e-4, "learning rate of AdamW", above=0.0, high=10.0)
    optimizer: str = option("adamw", "optimizer", choices=("adamw", "muon"))
    muon_lr: float = option(0.02, "learning rate of Muon", above=0.0, high=10.0)
    muon_momentum: float = option(0.95, "momentum of Muon", low=0.0, high=0.9999)
    head_lr_scale: float = option(1.0, "factor on lr for an untied head", above=0.0, high=1e3)
    weight_decay: float = option(0.01, "on matrices only", low=0.0, high=10.0)
    beta2: float = option(0.99, "AdamW's second-moment decay", above=0.0, high=0.99999)
    grad_clip: float = option(1.0, "largest gradient norm (0: no clipping)", low=0.0)
    lr_schedule: str = option("cosine", "course of the learning rate", choices=SCHEDULES)
    warmup_steps: int = option(100, "steps of linear warm-up (at most a tenth of all)", low=0)
    decay_fraction: float = option(0.5, "wsd: the rate falls for this share", low=0.0, high=1.0)
    min_lr_ratio: float = option(0.1, "final learning rate, as a share of lr", low=0.0, high=1.0)
    compile: str = changeable("auto", "torch.compile (auto: CUDA)", choices=("auto", "on", "off"))
    grad_checkpointing: bool = changeable(False, "recompute activations to save memory")
    fsdp: bool = changeable(False, "shard parameters over processes instead of copying them")
    self_test: bool = session_only(True, "compare the device with the CPU before the first step")


Objective = Callable[[Callable, Batch, Settings], tuple[Tensor, dict[str, Tensor]]]


def next_token_loss(losses: Callable, batch: Batch, config=None) -> tuple[Tensor, dict]:
    """Summed cross entropy of the next token, and nothing else to report."""
    if batch.weight is not None:
        return (losses(batch.x, batch.y) * batch.weight).sum(), {}
    return losses(batch.x, batch.y, "sum"), {}


# An objective: (model.losses or its like, batch, settings) -> (summed loss, sums to report), both
# divided later by the batch's n_targets. Section 15 adds preferences and reward. A new one needs
# its function and a row here, which makes it a choice of --objective. If it needs
#  - its own settings: fields of FinetuneConfig, each with a row in OBJECTIVE_OF;
#  - batches of pairs, prompts or the like: its data set in `dataset_of`;
#  - the base model: `tuned_from` says so, and `finetune_loop` gives it to the data set.
OBJECTIVES: dict[str, Objective] = {"ntp": next_token_loss}


@operation
def newton_schulz(X: Tensor) -> Tensor:
    """Pull the singular values of a matrix, or of a stack of them, towards 1.

    X = U S V^T, rows <= columns. A polynomial in X X^T leaves U and V and changes S alone: each
    round maps a singular value s to a s + b s^3 + c s^5, and five of them bring nearly all within
    about 0.3 of 1 (Jordan, 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # none above 1
    for _ in range(5):
        G = X @ X.mT
        X = a * X + (b * G + c * G @ G) @ X
    return X


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan, 2024).

    The gradient of a weight matrix is dominated by a few directions. Setting all singular values of
    an update to the same size lets the rare directions learn as fast as the dominant ones. A fused
    weight is orthogonalised matrix by matrix, as `rows` divides it.
    """

    def __init__(self, params, rows: dict[nn.Parameter, list[int]], lr: float, momentum=0.95,
                 weight_decay=0.1):  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.rows = rows

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            updates = []
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(momentum, group["momentum"]))  # Nesterov
            for p, update in zip(params, self.orthogonalised(params, updates), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])

    def orthogonalised(self, params: list, updates: list[Tensor]) -> list[Tensor]:
        """Each update with its matrices' singular values near 0.2 sqrt(max(rows, columns)).

        That makes an update's root mean square about that of AdamW's, 0.2 (Liu et al., 2025).
        """
        results = []
        for p, update in zip(params, updates, strict=True):
            parts = []
            for m in update.split(self.rows.get(p) or [len(p)]):
                wide = len(m) <= m.shape[1]
                X = newton_schulz(m if wide else m.T)
                parts.append((X if wide else X.T) * (0.2 * math.sqrt(max(m.shape))))
            results.append(torch.cat(parts))
        return results


OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}
EMBEDDINGS = ("tok_emb", "positions")


def make_optimizers(
    model: GPT, config: OptimConfig, kinds=OPTIMIZERS
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters that train, or Muon for the hidden matrices and AdamW for the rest.

    Weight decay is on matrices alone. Each group keeps its `initial_lr`, which schedules scale.
    kinds: the classes to use.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hidden = [p for n, p in trained.items() if n.startswith("blocks.") and p.ndim == 2]
    head = [p for n, p in trained.items() if n == "head.weight"]  # where it is not the embedding
    outer = [p for n, p in trained.items() if p.ndim == 2 and n.split(".")[0] in EMBEDDINGS]
    small = [p for p in trained.values() if p.ndim < 2]  # gains and biases
    assert len(hidden) + len(head) + len(outer) + len(small) == len(trained)  # each exactly once
    decay = config.weight_decay
    groups = [
        dict(params=outer, lr=config.lr, weight_decay=decay),
        dict(params=head, lr=config.lr * config.head_lr_scale, weight_decay=decay),
        dict(params=small, lr=config.lr, weight_decay=0.0),
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        rows = {model.get_parameter(f"blocks.{i}.{name}.weight"): sizes
                for name, sizes in fused_rows(model.config).items()
                for i in range(model.config.n_layer)}  # fmt: skip
        rates = dict(lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=decay)
        optimizers.append(kinds["muon"](hidden, rows, **rates))
    else:
        groups.append(dict(params=hidden, lr=config.lr, weight_decay=decay))
    groups = [g for g in groups if g["params"]]
    fused = next(iter(trained.values())).device.type in ("cpu", "cuda")  # one kernel for them all
    optimizers.append(kinds["adamw"](groups, betas=(0.9, config.beta2), fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def lr_multiplier(step: int, total: int, config: OptimConfig) -> float:
    """The factor on every group's initial_lr at a step: a pure function of the step."""
    warmup = min(config.warmup_steps, total // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = SCHEDULES[config.lr_schedule]((step - warmup) / max(1, total - warmup), config)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * share


# ====================================================================================
# 5. Training
#
# One loop for train and finetune: gradients of a batch, one step, an estimate of the validation
# loss, and `fit` around them. It saves and records through what its `Run` was given.
#
#     $ python llm_pipeline.py train --preset cpu-debug --recipe fast
#
# does all of this; so does your own loop over `create_dataloaders`, `GPT` and any optimizer.
# ====================================================================================


@dataclass
class FitConfig(Settings):
    """Run: how long it lasts, what it evaluates and what it keeps."""

    out_dir: str = session_only("ckpts", "folder of the run")
    resume: bool = session_only(False, "continue from out_dir's last.pth, bit for bit")
    overwrite: bool = session_only(False, "replace the run in out_dir")
    epochs: int = option(5, "passes over the training data", low=1, high=10**6)
    max_steps: int = option(0, "optimizer steps in all, instead of epochs", low=0)
    stop_after: int = session_only(0, "save and stop after N steps of this session", low=0)
    sampled_softmax: int = option(0, "softmax over the batch's ids and N others (0: all)", low=0)
    eval_interval: int = changeable(200, "steps between evaluations", low=1)
    eval_batches: int = changeable(50, "validation batches of an evaluation (0: all)", low=0)
    log_interval: int = changeable(10, "steps between rows of metrics.csv", low=1)
    save_interval: int = changeable(200, "steps between saves of last.pth", low=1)
    patience: int = changeable(0, "stop after N evaluations without improvement (0: never)", low=0)
    overfit_batch: bool = option(False, "sanity check: learn one batch by heart, save nothing")
    wandb: str = changeable("", "log to this Weights & Biases project too")


@dataclass
class Progress:
    """Training state besides weights and moments; stored in checkpoints."""

    step: int = 0  # optimizer steps done
    total: int = 0  # optimizer steps to do
    best: float = math.inf  # lowest validation loss
    best_step: int = 0
    evaluated: int = 0  # step of the last finished evaluation
    misses: int = 0  # evaluations since the best
    base_loss: float | None = None  # validation loss before a finetune's first step
    grad_accum: int = 1  # may grow, and checkpointing come on, when memory runs out
    grad_checkpointing: bool = False


@dataclass
class Run:
    """What one training run consists of; `make_run` (section 15) puts it together."""

    config: TrainConfig | FinetuneConfig  # its FitConfig and OptimConfig, and the seed
    rt: Runtime  # device, dtype, processes (section 8)
    model: GPT  # saved and evaluated
    losses: Callable  # model.losses, perhaps compiled or distributed: trained
    objective: Objective
    optimizers: list[torch.optim.Optimizer]
    train: DataLoader
    val: DataLoader | None
    store: TokenStore | None  # what they read
    progress: Progress
    scaler: torch.amp.GradScaler  # keeps fp16 gradients from vanishing; disabled otherwise
    # The workshop fills these in. Only the recorder has no default that works.
    stop: Stop = False  # true once a signal has asked to stop (section 8)
    save: Callable[[str], None] = lambda name: None  # writes "best" or "last"
    recorder: Recorder | None = None  # metrics.csv, the progress bar; `run_fit` opens it
    gradients: Callable | None = None  # `gradients`, perhaps one that survives a full memory
    grad_sync: Callable = lambda last: contextlib.nullcontext()  # between processes, at the last
    after_step: Callable = lambda seconds: None  # --minutes may move the run's end


class Interrupted(KeyboardInterrupt):
    """A stop signal came in the middle of a step or of an evaluation."""


class Diverged(UserError):
    """A loss or gradient is not finite. Nothing has been updated."""


def trained_parameters(run: Run) -> list[nn.Parameter]:
    """As the optimizers hold them; after an evaluation FSDP's model shows gathered copies."""
    return [p for each in run.optimizers for group in each.param_groups for p in group["params"]]


def drop_gradients(run: Run) -> None:
    for p in trained_parameters(run):
        p.grad = None


def gradients(run: Run, batch: Batch, n_targets: float) -> tuple[Tensor, dict]:
    """Leave the gradient of the loss per target in the parameters. Returns (summed loss, stats).

    n_targets counts those of all processes: the sum of all micro-batches' and processes' gradients
    is then that of the whole batch, whatever is masked where.
    """
    rt, step = run.rt, run.progress.step
    micro_batches = batch.split(run.progress.grad_accum)
    loss_sum, stats = 0.0, Counter()
    for index, micro in enumerate(micro_batches):
        if run.stop and rt.world_size == 1:
            raise Interrupted  # this step's gradients are dropped; resume repeats it
        set_seed(derive_seed(run.config.seed, step, index * rt.world_size + rt.rank))  # dropout
        with run.grad_sync(index == len(micro_batches) - 1), rt.autocast():
            loss, sums = run.objective(run.losses, micro, run.config)
            # DDP averages gradients over processes; n_targets counts all, so we want their sum.
            run.scaler.scale(loss * (rt.world_size / n_targets)).backward()
        loss_sum = loss_sum + loss.detach()
        stats.update({name: value.detach() for name, value in sums.items()})
    return loss_sum, stats


def train_step(run: Run, batch: Batch) -> tuple[float, float, dict]:
    """One optimizer step on this process's rows. Returns (loss per target, gradient norm, stats).

    Raises Diverged, before anything is updated, when loss or gradient is not finite.
    """
    config, rt, step, scaler = run.config, run.rt, run.progress.step, run.scaler
    n_targets = max(rt.sum(batch.n_targets)[0], 1.0)
    loss_sum, stats = (run.gradients or gradients)(run, batch, n_targets)
    for optimizer in run.optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(trained_parameters(run), config.grad_clip or math.inf)
    norm = float(gather(norm))  # (section 8: as one piece on the CPU) this waits for the device
    loss_sum, *sums = rt.sum(float(loss_sum), *map(float, stats.values()))
    loss = loss_sum / n_targets
    # fp16: an overflow skips the update and lowers the scale. At a scale below 1 it is real NaN.
    overflowed = scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() >= 1
    if not (math.isfinite(loss) and (math.isfinite(norm) or overflowed)):
        found = f"loss {loss}, gradient norm {norm}"
        raise Diverged(f"step {step + 1}: {found}: not finite, the weights are not updated")
    scale = lr_multiplier(step, run.progress.total, config)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        if not overflowed:
            scaler.step(optimizer)
    scaler.update()
    drop_gradients(run)
    return loss, norm, {n: s / n_targets for n, s in zip(stats, sums, strict=True)}


@torch.no_grad()
def estimate_loss(run: Run, loader: Iterable[Batch]) -> tuple[float, dict]:
    """Mean loss and statistics per target over a loader. Draws no random number.

    Raises Interrupted when a stop signal comes.
    """
    model, rt, sums = run.model, run.rt, Counter()
    training = model.training
    model.eval()
    try:
        for batch in loader:
            if any(rt.sum(bool(run.stop))):
                raise Interrupted
            with rt.autocast():
                loss, stats = run.objective(model.losses, batch.to(rt.device), run.config)
            found = {"loss": loss, "targets": batch.n_targets} | stats
            real = batch.n_targets > 0  # else an empty stand-in, see ValidationSampler
            sums.update({name: float(value) if real else 0.0 for name, value in found.items()})
    finally:
        model.train(training)
    sums = dict(zip(sums, rt.sum(*sums.values()), strict=True))
    n_targets = max(sums.pop("targets"), 1.0)
    means = {name: value / n_targets for name, value in sums.items()}
    return means.pop("loss"), means


def assess(run: Run, loss: float) -> None:
    """Evaluate, record, and keep the best. Without validation data the training loss is used."""
    p = run.progress
    if run.val:
        loss, stats = estimate_loss(run, run.val)
        run.recorder.validation(loss, stats)
    elif math.isnan(loss):  # resumed here: there is no training loss to judge yet
        return
    p.evaluated, p.misses = p.step, p.misses + 1
    if loss < p.best:
        p.best, p.best_step, p.misses = loss, p.step, 0
        run.save("best")


def fit(run: Run) -> str:
    """The loop of train and finetune. Returns why it ended: done, early, stopped, signal.

    Raises Interrupted when a signal comes in a step or an evaluation; `run_fit` (section 15) saves.
    """
    config, p = run.config, run.progress
    first, saved = p.step, -1  # where this session began; the step last saved
    loss = math.nan  # of the last step; none has been taken yet
    steps_per_epoch = len(run.train)
    batches = steps(run.train, p.step)
    while True:
        # --- before the step: evaluate and save; the model stays as it is ---
        last = p.step == p.total
        # With many short epochs, the interval alone decides.
        epoch_ends = p.step % steps_per_epoch == 0 and p.total <= 50 * steps_per_epoch
        look = p.step % config.eval_interval == 0 or epoch_ends or last
        if look and p.step > p.evaluated:
            assess(run, loss)
        signalled = any(run.rt.sum(bool(run.stop)))  # all stop together
        reasons = {
            "done": last,
            "early": 0 < config.patience <= p.misses,
            "signal": signalled,
            "stopped": 0 < config.stop_after <= p.step - first,
        }
        ended = next((reason for reason, holds in reasons.items() if holds), "")
        due = p.step > first and p.step % config.save_interval == 0
        if (ended or due) and p.step != saved:
            run.save("last")
            saved = p.step
        if ended:
            return ended
        # --- the step ---
        clock = time.perf_counter()
        batch = next(batches).to(run.rt.device)
        loss, norm, stats = train_step(run, batch)
        p.step += 1
        seconds = time.perf_counter() - clock
        run.recorder.step(batch, loss, norm, stats, seconds)
        run.after_step(seconds)


# ====================================================================================
# 6. Sampling
#
# One token at a time. The cache keeps keys and values, so that a new token costs one position's
# work; `sample_next` chooses it; `generate` combines the two.
#
#     >>> lp.load("ckpts/best.pth").generate("Once upon a time", temperature=0.8, seed=1)
# ====================================================================================


class KVCache:
    """Keys and values of the tokens so far, in buffers allocated once: (B, K, size, D) a layer.

    They hold block_size tokens, or fewer if `limit` says so; at block_size `generate` starts again
    from the last half.
    """

    def __init__(self, config: GPTConfig, batch: int, device, dtype: torch.dtype, limit=2**40):
        """limit: most tokens to be stored; rounded up to a power of two: few shapes to compile."""
        size = min(config.block_size, 1 << (limit - 1).bit_length())
        shape = (2, config.n_layer, batch, config.n_kv_head, size, config.head_dim)
        self.keys, self.values = (list(t) for t in torch.zeros(shape, device=device, dtype=dtype))
        self.length = 0  # tokens stored so far
        self.step: Callable | None = None  # section 9's, for these buffers

    def repeat(self, times: int) -> None:
        """Each prefilled sequence becomes `times` sequences that start with it."""
        if times > 1:
            self.step = None
            self.keys = [t.repeat_interleave(times, 0) for t in self.keys]
            self.values = [t.repeat_interleave(times, 0) for t in self.values]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, (B, K, T, D); return all so far. The model counts the tokens
        when all layers have them."""
        keys, values, end = self.keys[layer], self.values[layer], self.length + k.shape[2]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]


def sample_next(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    repetition_penalty: float = 1.0, seen: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:  # fmt: skip
    """Draw the next token of each sequence: logits (B, V) -> (B,) ids.

    The filters apply in this order, as in transformers: repetition penalty (after Keskar et al.,
    2019) on `seen`, (B, V) bool; temperature; top-k; nucleus (Holtzman et al., 2020); min-p (Nguyen
    et al., 2024). Temperature 0 takes the most likely. Generators share the sequences evenly.
    """
    if repetition_penalty != 1.0:
        scaled = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, scaled, logits)
    if temperature == 0.0:
        return logits.argmax(-1)
    # Shifted so that the largest is 0, and divided by what fp32 can hold: no overflow to NaN.
    logits = (logits - logits.max(-1, keepdim=True).values) / max(temperature, 1e-30)
    if 0 < top_k < logits.shape[-1]:
        floor = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -math.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        mass = (ordered.softmax(-1) * 2**40).long()  # integers: every device sums them alike
        enough = max(1, math.ceil(top_p * 2**40))  # the most likely always stays
        dropped = mass.cumsum(-1) - mass >= enough
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)
    probabilities = logits.softmax(-1)
    if min_p > 0.0:
        floor = min_p * probabilities.max(-1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    # A race: of exponential waiting times with rates p, number i ends first with probability p_i.
    # torch.multinomial runs the same race, after it has made the CPU wait for two checks.
    times = torch.empty_like(probabilities)
    generators = generator if isinstance(generator, list) else [generator]
    for part, each in zip(times.chunk(len(generators)), generators, strict=True):
        part.exponential_(generator=each)
    return (probabilities / times).argmax(-1)


@operation
def next_logits(token: Tensor, model: GPT, cache: KVCache) -> Tensor:
    """Feed the newest token of each sequence, (B,) ids -> (B, V) logits of the one after it."""
    return model.head(model.hidden(token[:, None], cache)[:, -1]).float()


@torch.inference_mode()
def generate(
    model: GPT, idx: Tensor, max_new_tokens: int, stop_ids: tuple[int, ...] = (),
    num_samples: int = 1, seed: int | list[int] = 0, **sampling,
) -> Iterator[list[int]]:  # fmt: skip
    """Yield the next id of each of B * num_samples samples, step by step; -1 once one has stopped.

    idx: (B, T) ids; the samples of one row are adjacent and share one prefill.
    seed: for all draws, or one for each row of idx, which then does not depend on the others.
    sampling: the keyword arguments of `sample_next`.
    When the cache is full, decoding continues from the last half of the block.
    """
    device, config, (B, T) = idx.device, model.config, idx.shape
    n, dtype = B * num_samples, model.tok_emb.weight.dtype
    seeds = [seed] if isinstance(seed, int) else seed
    generators = [torch.Generator(device).manual_seed(each) for each in seeds]
    history = idx.repeat_interleave(num_samples, 0)  # (n, T)
    seen = torch.zeros(n, config.vocab_size, dtype=torch.bool, device=device)
    seen.scatter_(1, history, True)
    cache = KVCache(config, B, device, dtype, T + max_new_tokens)
    h = model.hidden(idx[:, -config.block_size :], cache)[:, -1]
    cache.repeat(num_samples)
    logits = model.head(h).float().repeat_interleave(num_samples, 0)  # (n, V)
    alive = [True] * n
    keep = max(1, config.block_size // 2)  # what decoding continues from when the cache is full
    recent = deque(history.unbind(1), maxlen=keep)  # (n,) each
    for step in range(1, max_new_tokens + 1):
        token = sample_next(logits, seen=seen, generator=generators, **sampling)  # (n,)
        if sampling.get("repetition_penalty", 1.0) != 1.0:
            seen.scatter_(1, token[:, None], True)
        ids = token.tolist()
        alive = [a and i not in stop_ids for a, i in zip(alive, ids, strict=True)]
        yield [i if a else -1 for a, i in zip(alive, ids, strict=True)]
        if not any(alive) or step == max_new_tokens:
            return
        recent.append(token)
        if cache.length == config.block_size:
            cache = KVCache(config, n, device, dtype)
            h = model.hidden(torch.stack(tuple(recent), 1), cache)[:, -1]
            logits = model.head(h).float()
        else:
            logits = next_logits(token, model, cache)


# ====================================================================================
# 7. Presets
#
# Names that set many settings at once. Settings are typed fields of dataclasses, each defined where
# it is first needed, with its default, help and limits; flags, --config files and config.json are
# generated from these fields (section 16).
#
#     $ python llm_pipeline.py train -h            # what a first user needs
#     $ python llm_pipeline.py train --help_all    # every field, by topic
# ====================================================================================


# Sized for an RTX 4060 (8 GB) or 4060 Ti (16 GB); the last two: for a laptop, and GPT-2's smallest.
PRESETS = {
    "tiny-8g": dict(block_size=256, n_layer=6, n_head=8, n_embd=512,
                    batch_size=32, grad_accum=1, lr=3e-4, epochs=5),
    "compact-8g": dict(block_size=384, n_layer=6, n_head=8, n_embd=512,
                       batch_size=24, grad_accum=2, lr=3e-4, epochs=6),
    "small-16g": dict(block_size=512, n_layer=8, n_head=8, n_embd=640,
                      batch_size=32, grad_accum=1, lr=2e-4, epochs=6),
    "cpu-debug": dict(block_size=128, n_layer=2, n_head=4, n_embd=256,
                      batch_size=8, grad_accum=1, lr=5e-4, epochs=1),
    "gpt2-124m": dict(block_size=1024, n_layer=12, n_head=12, n_embd=768,
                      batch_size=32, grad_accum=4, lr=6e-4, epochs=1),
}  # fmt: skip

ARCHS = {
    # GPT-2 itself has gelu_tanh; here, as in nanoGPT, GELU is exact.
    "gpt2": dict(pos="learned", norm="layernorm", norm_eps=1e-5, mlp="gelu", qk_norm=False,
                 bias=True),
    "modern": dict(pos="rope", norm="rmsnorm", norm_eps=1e-6, mlp="swiglu", qk_norm=True,
                   bias=False),
}  # fmt: skip


@dataclass
class PresetConfig(Settings):
    """Presets: names that set many settings at once."""

    preset: str = option("tiny-8g", "sizes that fit a machine", choices=tuple(PRESETS))
    recipe: str = option(
        "classic", "classic: the preset; fast: the quickest measured",
        choices=("classic", "fast"),
    )  # fmt: skip
    arch: str = option("gpt2", "gpt2, or modern (Qwen3's architecture)", choices=tuple(ARCHS))


# ====================================================================================
# PART II: THE WORKSHOP
# ====================================================================================


# ====================================================================================
# 8. Runtime
#
# Devices, processes, signals, locks, logging. Look at `StopSignal` and `atomic_write`: because a
# batch depends only on (seed, step), they let a killed run resume and end with the same bits.
#
#     CSVLogger("m.csv").log(1, 0, "train", 2.5)    # a row: step, epoch, split, loss, timestamp
# ====================================================================================

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class RuntimeConfig(Settings):
    """Machine: where a command runs."""

    seed: int = option(1337, "for initialisation, order, dropout and sampling", low=0, high=2**32)
    device: str = changeable("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = option("auto", "for matmuls (float32 trains in TF32 on CUDA)", choices=DTYPES)
    threads: int = changeable(0, "CPU threads (0: measured, or all)", low=0, high=1024)
    vram_limit_gb: float = changeable(0.0, "cap on CUDA memory (0: none)", low=0.0, high=1e4)
    deterministic: bool = option(False, "same command, same bits on CUDA too (always on a CPU)")
    config: str = session_only("", "settings from a json, toml or yaml file")
    debug: bool = session_only(False, "show tracebacks")


def one_line(error: object, limit: int = 200) -> str:
    """An error's text on one line, to name the cause in a message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def optional(module: str, package: str = ""):
    """Import an optional dependency, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = package or module.split(".")[0]
        raise UserError(f"this needs {name}: pip install {name}") from None


def launched(name: str) -> int:
    """RANK, LOCAL_RANK or WORLD_SIZE, as torchrun sets them."""
    return int(os.environ.get(name, 1 if name == "WORLD_SIZE" else 0))


def is_main() -> bool:
    """Whether this is the first process; works before the process group exists."""
    return launched("RANK") == 0


def note(text: str) -> None:
    """Print a line on stderr, above any progress bar, from the first process only."""
    if is_main():
        tqdm.write(text, file=sys.stderr)


# When this runs as a program, a command's time includes the imports.
IMPORT_SECONDS = time.process_time() if __name__ == "__main__" else 0.0


@dataclass
class Runtime:
    """Where this process computes: device, dtype of matrix products, rank among processes."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    started: float = 0.0  # when the command began, on time.perf_counter's clock

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        """Matrix products in `dtype`; operations that need the precision stay in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype.itemsize == 2)

    def sum(self, *values: float) -> list[float]:
        """Element-wise sums over all processes."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def of_first(self, value: float) -> float:
        """The first process's value, on every process."""
        return self.sum(value if self.is_main else 0.0)[0]


def pick_device(name: str, world_size: int = 1) -> torch.device:
    """The device called `name`; "auto" is the fastest here. Raises UserError if it is missing."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if world_size > 1 and name.startswith("cuda:"):
        raise UserError(f"{world_size} processes cannot share {name}: use --device cuda")
    if name == "cuda":  # torch.cuda.set_device needs a number
        name = f"cuda:{launched('LOCAL_RANK')}"
    device = torch.device(name)
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}[device.type]
    if (device.index or 0) >= count:
        raise UserError(f"--device {name}: found {count} {device.type} devices; try --device cpu")
    return device


@lru_cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively; emulated bf16 is slower than fp32."""
    about = Path("/proc/cpuinfo")  # Linux only: avx512_bf16, amx_bf16, Arm's bf16
    return about.exists() and "bf16" in about.read_text()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware has it natively, else fp16 on CUDA, else fp32."""
    if name == "float16" and device.type == "cpu":
        raise UserError("--dtype float16 needs a GPU; on a CPU use bfloat16 or float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def set_up_cuda(device: torch.device, limit_gb: float) -> None:
    """Choose the card, cap this process's memory on it, and choose how attention is computed."""
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    # When the GPU is full, Windows drivers, under WSL2 too, spill to system memory and crawl.
    spills = os.name == "nt" or "microsoft" in platform.release().lower()
    limit = limit_gb * 2**30 or (free if spills else total)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    # Flash attention needs Ampere or newer, and a build that includes it. Decided here, because
    # asking the driver inside a compiled function would break its graph.
    built = torch.backends.cuda.is_flash_attention_available()
    flash = built and torch.cuda.get_device_capability(device)[0] >= 8
    KERNELS["attention_sdpa", "cuda"] = partial(attention_on_cuda, flash=flash)


@contextlib.contextmanager
def runtime(config: RuntimeConfig):
    """Device, dtype, threads, seed and process group of one command."""
    started = time.perf_counter() - IMPORT_SECONDS
    rank, world_size = launched("RANK"), launched("WORLD_SIZE")
    if rank >= world_size:
        raise UserError(f"RANK={rank} and WORLD_SIZE={world_size}: unset both, or use torchrun")
    device = pick_device(config.device, world_size)
    if device.type == "cuda":
        set_up_cuda(device, config.vram_limit_gb)
    threads = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    set_seed(config.seed)
    try:
        if world_size > 1:  # hours, since the first may keep the others waiting for a large store
            backend, card = ("nccl", device) if device.type == "cuda" else ("gloo", None)
            dist.init_process_group(backend, timeout=timedelta(hours=12), device_id=card)
        yield Runtime(device, pick_dtype(config.dtype, device), rank, world_size, started)
    finally:
        torch.set_num_threads(threads)
        if config.deterministic:  # importing torch's compiler for this call takes two seconds
            torch.use_deterministic_algorithms(was_deterministic)
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def training_precision(device: torch.device):
    """In training only: TF32, with a ten-bit mantissa, for fp32 matrix products on CUDA."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_threads(config: RuntimeConfig, rt: Runtime, shape: GPTConfig, rows: int) -> None:
    """Set config.threads, unless given, to the number that is fastest on this machine right now.

    Threads wait for each other, so on a busy machine more of them may be slower. This times a block
    of the model with each power of two in turn. All of these give the same bits, but 3, 6 or 12
    would not, because MKL then splits products differently (tests/test_device.py).
    """
    if rt.device.type != "cpu" or rt.world_size > 1 or config.threads:
        return
    most = torch.get_num_threads()
    seconds = {2**k: 0.0 for k in range(most.bit_length())}
    T = min(shape.block_size, 128)
    rows = max(1, min(rows, int(1.5e9 / (72 * shape.n_embd**2 * T))))  # about 20 ms on one core
    with torch.random.fork_rng(devices=[]):  # later draws stay the same
        block, x = TransformerBlock(shape), torch.randn(rows, T, shape.n_embd)
        for turn in range(6 if len(seconds) > 1 else 0):
            for n in seconds:
                torch.set_num_threads(n)
                start = time.perf_counter()
                with rt.autocast():
                    block(x).float().sum().backward()
                if turn:  # turn 0 warms up
                    seconds[n] += time.perf_counter() - start
    config.threads = min(seconds, key=seconds.get)
    torch.set_num_threads(config.threads)
    if len(seconds) > 1:
        note(f"--threads {config.threads} (measured: the fastest of {[*seconds]} right now)")


HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none


class StopSignal:
    """Turns the first SIGINT, SIGTERM or SIGHUP into `Interrupted`; a second one ends the process.

    Inside `held()` the first only sets the flag, and the code there checks it where it can stop.
    """

    number = 0  # of the first signal
    holding = False

    def __enter__(self):
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # else Python allows no handler
            for number in filter(None, (signal.SIGINT, signal.SIGTERM, HANG_UP)):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup sets this
                    self.previous[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame) -> None:
        self.number, name = number, signal.Signals(number).name
        for each in self.previous:  # a closing terminal sends several SIGHUPs
            signal.signal(each, signal.SIG_IGN if each == HANG_UP else signal.SIG_DFL)
        with contextlib.suppress(OSError):  # bypasses the stream, which may be mid-write
            os.write(2, f"\n{name}: saving and stopping; again to exit at once\n".encode())
        if not self.holding:
            raise Interrupted

    @contextlib.contextmanager
    def held(self):
        self.holding = True
        try:
            yield
        finally:
            self.holding = False

    def __bool__(self) -> bool:
        return bool(self.number)

    def __exit__(self, *exc) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


Stop = StopSignal | bool  # true once a run must stop


@contextlib.contextmanager
def run_lock(folder: Path, name: str = ".lock", wait: bool = False):
    """Lock `folder`, created if missing, for this process; the lock ends with it, however it ends.

    If the block fails before it writes anything else, the folders created here are removed again.
    """
    lock, made = filelock.FileLock(folder / name, timeout=-1 if wait else 0), []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        folder.mkdir(parents=True, exist_ok=True)  # its last holder may have removed it
    except filelock.Timeout:
        raise UserError(f"another run is using {folder}: wait, or pass another --out_dir") from None
    except OSError as error:
        why = f"cannot use {folder} as a folder: {error.strerror}"
        raise UserError(f"{why}; choose another place") from None
    try:
        yield
        made = []
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # a folder with anything but the lock stays
            if made:
                (folder / name).unlink(missing_ok=True)
            for path in made:  # innermost first
                path.rmdir()


@contextlib.contextmanager
def atomic_write(path: Path):
    """Write a binary file that appears at `path` complete or not at all. Raises UserError.

    A temporary file in the same folder is synced, then renamed; syncing the folder then makes the
    new name survive a power cut.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # atomic on POSIX and on Windows
        if os.name != "nt":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        why = f"{error.strerror or error}; any older file there is intact"
        raise UserError(f"cannot write {path}: {why}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def refuse_to_replace(target: Path) -> None:
    """Raise UserError if `target` is a file or a folder that is not empty."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} already exists: remove it, or choose another place")


@contextlib.contextmanager
def write_beside(target: Path) -> Iterator[Path]:
    """An empty folder next to `target` for the block to fill; it then becomes `target`.

    If the block fails, nothing changes; the next call removes what a killed process left behind.
    Raises UserError if `target` is not empty: nothing is ever replaced.
    """
    target = Path(os.path.realpath(target))  # a link's destination, not the link
    refuse_to_replace(target)
    work = target.with_name(f".{target.name}.writing")
    try:
        with run_lock(work):
            try:
                shutil.rmtree(work / "new", ignore_errors=True)
                (work / "new").mkdir()
                yield work / "new"
                if target.exists():
                    target.rmdir()  # empty
                (work / "new").rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None


def write_json(path: str | Path, value) -> None:
    with atomic_write(Path(path)) as file:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        file.write(text.encode("utf-8", "replace"))


class CSVLogger:
    """Rows of a CSV file: step, epoch, split, loss, timestamp (ISO 8601, in UTC), and more.

    Continues an existing log: drops the rows after `step`, and a last row that a crash cut short.
    Raises UserError if the file is not a log.
    """

    COLUMNS = ("step", "epoch", "split", "loss", "timestamp")

    def __init__(self, path: str | Path, step: float = math.inf):
        self.path = Path(path)
        self.rewrite(step)

    def rewrite(self, step: float = math.inf, new: Sequence[str] = ()) -> None:
        """Write the file anew: its rows up to `step`, with the `new` columns added at the end."""
        text = self.path.read_bytes().decode("utf-8", "replace") if self.path.exists() else ""
        whole_lines = text[: text.rfind("\n") + 1].replace("\0", "")  # a crash may leave NULs
        rows = csv.DictReader(io.StringIO(whole_lines))
        self.columns = [*(rows.fieldnames or self.COLUMNS), *new]
        if tuple(self.columns[: len(self.COLUMNS)]) != self.COLUMNS:
            raise UserError(f"{self.path} is not a log of this program: move it away")
        kept = io.StringIO()
        writer = csv.DictWriter(kept, self.columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(r for r in rows if r["step"].isdigit() and int(r["step"]) <= step)
        with atomic_write(self.path) as file:
            file.write(kept.getvalue().encode())

    def log(self, step: int, epoch: int, split: str, loss: float, **more) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        row = dict(step=step, epoch=epoch, split=split, loss=loss, timestamp=now) | more
        if new := [name for name in row if name not in self.columns]:
            self.rewrite(new=new)
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)


class Recorder:
    """Where the first process's numbers go: metrics.csv, the bar, Weights & Biases if asked."""

    def __init__(self, run: Run, path: Path):
        p, config, main = run.progress, run.config, run.rt.is_main
        self.run, self.shown, self.tokens, self.seconds = run, {}, 0, 0.0
        self.log = CSVLogger(path, p.step) if main else None
        self.tracker = None
        if config.wandb and main:
            self.tracker = optional("wandb").init(project=config.wandb, config=asdict(config))
        self.bar = tqdm(
            total=p.total, initial=p.step, disable=not main, unit="step", smoothing=0.05
        )

    def step(self, batch: Batch, loss: float, norm: float, stats: dict, seconds: float) -> None:
        """Count a step that took `seconds`; a row every log_interval."""
        p, config = self.run.progress, self.run.config
        self.tokens += batch.x.numel() * self.run.rt.world_size
        self.seconds += seconds
        if p.step % config.log_interval == 0 or p.step == p.total:
            speed, self.tokens, self.seconds = self.tokens / self.seconds, 0, 0.0
            lr = self.run.optimizers[-1].param_groups[0]["lr"]
            self.write("train", loss, lr=lr, grad_norm=norm, tokens_per_s=round(speed), **stats)
            self.shown |= {"loss": f"{loss:.4f}", "tok/s": f"{speed:,.0f}"}
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def validation(self, loss: float, stats: dict) -> None:
        self.write("val", loss, **stats)
        self.shown["val"] = f"{loss:.4f}"

    def write(self, split: str, loss: float, **more) -> None:
        step = self.run.progress.step
        epoch = max(0, step - 1) // len(self.run.train)
        if self.log:
            self.log.log(step, epoch, split, loss, **more)
        if self.tracker:
            values = {"loss": loss, "epoch": epoch} | more
            self.tracker.log({f"{split}/{name}": v for name, v in values.items()}, step=step)

    def close(self) -> None:
        self.bar.close()
        if self.tracker:
            self.tracker.finish()


# --- memory and processes in training ---


def retry_on_oom(run: Run, batch: Batch, n_targets: float) -> tuple[Tensor, dict]:
    """`gradients`, retried with smaller micro-batches, then checkpointing, if CUDA memory runs out.

    Nothing has been updated by then: the step repeats on the same global batch. Raises UserError.
    """
    p = run.progress
    while True:
        try:
            return gradients(run, batch, n_targets)
        except torch.OutOfMemoryError:
            drop_gradients(run)
        if run.rt.world_size > 1:  # the others wait in a collective
            raise UserError("out of memory: --resume with --grad_checkpointing or --grad_accum N")
        if p.grad_accum < len(batch.x):
            p.grad_accum *= 2
        elif not p.grad_checkpointing:
            p.grad_checkpointing = run.model.grad_checkpointing = True
        else:
            raise UserError(
                "out of memory for one sequence: lower --block_size, or shrink the model"
            )
        now = f"grad_accum {p.grad_accum}, grad_checkpointing {p.grad_checkpointing}"
        note(f"out of memory at step {p.step + 1}: continuing with {now}")
        torch.cuda.empty_cache()


def grad_sync_context(model: GPT, losses: Callable, last: bool):
    """A context that exchanges gradients between processes after the last micro-batch only."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP
        model.set_requires_gradient_sync(last)
    skips = not last and hasattr(losses, "no_sync")  # DDP has it
    return losses.no_sync() if skips else contextlib.nullcontext()


def over_sampled_ids(losses: Callable, n: int, vocab_size: int) -> Callable:
    """`losses` with a softmax over a batch's targets and n other ids, redrawn each time (0: all).

    Each of the n represents (V - T) / n of the V - T ids that are not targets; the logarithm of
    that ratio is added to its logit (Jean et al., 2015).
    """
    if not 0 < n < vocab_size:
        return losses

    def sampled(idx: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
        counted = targets != IGNORE
        present = targets[counted].unique()  # (T,), sorted
        draw = torch.rand(vocab_size, device=idx.device)
        draw[present] = -1.0  # never drawn
        drawn = draw.topk(min(n, vocab_size - len(present))).indices
        ids = torch.cat([present, drawn])
        bias = torch.zeros(len(ids), device=idx.device)
        bias[len(present) :] = math.log(max(vocab_size - len(present), 1) / max(len(drawn), 1))
        places = torch.searchsorted(present, targets.clamp(min=0))
        return losses(idx, torch.where(counted, places, IGNORE), reduction, (ids, bias))

    return sampled


class Losses(nn.Module):
    """`model.losses` as a module's forward, the form that PyTorch compiles and distributes."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, *batch) -> Tensor:
        return self.model.losses(*batch)


def distribute(model: GPT, config: OptimConfig, rt: Runtime, total: int) -> Callable:
    """`model.losses` as training uses it: compiled if it pays, copied or sharded over processes."""
    if config.fsdp:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if rt.world_size == 1:
            raise UserError("--fsdp shards over processes: start with torchrun")
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        register_fsdp_forward_method(model, "losses")
        return model.losses
    net: nn.Module = Losses(model)
    # A short run ends before compilation pays off.
    auto = config.compile == "auto" and rt.device.type == "cuda" and total >= 1000
    if (auto or config.compile == "on") and can_compile(rt.device, config.compile == "on"):
        if model.config.vocab_size > 4096:  # each padded width would unroll its loop anew
            KERNELS["head_loss", rt.device.type] = torch.compiler.disable(chunked_head_loss)
        # Unless --compile is on, code that turns out not to compile runs as is.
        torch._dynamo.config.suppress_errors = config.compile == "auto"
        net = torch.compile(net)
    if rt.world_size > 1:
        net = nn.parallel.DistributedDataParallel(net)
    return net


def can_compile(device: torch.device, required: bool) -> bool:
    """Whether torch.compile works here: it may lack a compiler, Triton or Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        reason = f"torch.compile does not work here: {one_line(error)}"
        if required:
            raise UserError(f"--compile on: {reason}; use --compile off") from None
        note(f"continuing without compiling, which is slower: {reason}")
        return False
    return True


def gather(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU, gathered if FSDP shards it."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu()


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A full tensor, the same on every process, sharded as FSDP shards `like`."""
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def batched(items: Iterable, size: int, weight=lambda _: 0, limit=math.inf) -> Iterator[list]:
    """Lists of up to `size` items, ended early once the sum of their weights reaches `limit`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += weight(item)
        if len(batch) == size or total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def unescape(text: str) -> str:
    r"""Turn `\n`, `\t` and `\\`, as typed in a shell, into the characters they name."""
    table = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda m: table[m.group()], text)


def short_hash(value, size: int = 4) -> str:
    """A hexadecimal digest of plain data, `size` bytes long."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


# ====================================================================================
# 9. The same, faster
#
# Twins of Part I's operations for a CPU or a GPU, each kept because a measurement justifies it
# (tests/bench/README.md); a self-test of the device; decoding in one graph. Look at KERNELS.
#
#     attention_sdpa.plain(q, k, v, None, 0.0)      # the reference for each device's twin
# ====================================================================================


def dropout_by_bytes(x: Tensor, p: float) -> Tensor:
    """Dropout that draws one byte per element, eight to a random word, so that p is rounded to a
    multiple of 1/256. PyTorch's CPU kernel draws singly, which costs as much as the matmuls."""
    kept = 256 - max(1, round(256 * p))  # 256 does not fit in a byte
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    drawn = words.view(torch.uint8)[: x.numel()].view(x.shape)
    keep = torch.lt(drawn, kept, out=torch.empty_like(x))  # 1 or 0 in x's dtype, with no extra pass
    return x * keep.mul_(256 / kept)


def attention_folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p_drop: float) -> Tensor:
    """`attention_manual` with few, large products: CPU fused kernels lack dropout and are slow in
    bf16. Query heads that share a key head are stacked as rows: (B K, G Tq, D)."""
    (B, H, Tq, D), (K, Tk) = q.shape, k.shape[1:3]
    if p_drop == 0.0 and (q.dtype == torch.float32 or (Tq == 1 and Tk < 64)):
        return attention_sdpa.plain(q, k, v, mask, p_drop)
    G = H // K
    if mask is None and Tq == 1:
        mask = q.new_zeros(1, 1)
    elif mask is None:
        mask = torch.full((Tq, Tk), -math.inf, dtype=q.dtype, device=q.device).triu(Tk - Tq + 1)
    if mask.ndim > 2:
        mask = mask.expand(B, H, Tq, Tk).reshape(B * K, G * Tq, Tk)
    elif G > 1:
        mask = mask.repeat(G, 1)
    q, k, v = (t.reshape(B * K, -1, D) for t in (q, k, v))
    scores = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(D))  # (B K, G Tq, Tk)
    weights = scores.softmax(-1)
    weights = dropout(weights, p_drop) if p_drop else weights
    return (weights @ v).view(B, H, Tq, D)


def attention_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p_drop: float, flash: bool = False
) -> Tensor:
    """Only the flash kernel takes grouped key heads; otherwise PyTorch would use one that holds all
    scores in fp32. So if flash does not apply, keys and values are repeated."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.shape[2] == 1:  # heads that share a key head become its queries
        mask = mask.view(-1, groups, mask.shape[-1]) if mask is not None and mask.ndim > 2 else mask
        folded = q.reshape(len(q), -1, groups, q.shape[-1])
        return F.scaled_dot_product_attention(folded, k, v, mask, p_drop).reshape(q.shape)
    if groups > 1 and not (flash and mask is None and q.dtype.itemsize == 2):
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    return attention_sdpa.plain(q, k, v, mask, p_drop)


# --- cross entropy of a large vocabulary ---


CHUNK = 512  # rows; the logits of more would overflow CPU caches


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed `head_loss` of h (N, C) without the full (N, V) logits. The forward pass computes each
    chunk's gradient while it has the chunk's logits: softmax(logits), less 1 at the target."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dtype):
        total, low, grad_h = 0.0, weight.to(dtype), torch.empty_like(h)
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # LoRA freezes it
        for i in range(0, len(h), CHUNK):
            rows, y = h[i : i + CHUNK].to(dtype), targets[i : i + CHUNK]
            log_p = F.log_softmax(F.linear(rows, low, bias), -1, dtype=torch.float32)
            total = total + F.nll_loss(log_p, y, ignore_index=IGNORE, reduction="sum")
            p = log_p.exp_()
            p.scatter_add_(1, y.clamp(min=0)[:, None], torch.full_like(p[:, :1], -1.0))
            p = p.mul_((y != IGNORE)[:, None]).to(dtype)
            grad_h[i : i + CHUNK] = p @ low
            if grad_w is not None:
                grad_w += p.T @ rows
        ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad, None if grad_w is None else grad_w * grad, None, None, None


def chunked_head_loss(
    h: Tensor, weight: Tensor, targets: Tensor, reduction: str, bias: Tensor | None = None
) -> Tensor:
    """`head_loss`, in chunks for a large vocabulary, whose logits would take much memory.

    With reduction "none", each loss's weight is known only in the backward pass, which recomputes
    a chunk's logits. (F.linear_cross_entropy ignores autocast.)
    """
    V, kind = len(weight), h.device.type
    if kind == "cuda" and V % 64:  # tensor cores are slow on 50,257 columns
        weight = F.pad(weight, (0, 0, 0, -V % 64))
        bias = h.new_zeros(V) if bias is None else bias
        bias = F.pad(bias, (0, -V % 64), value=-math.inf)
    if V <= 4096:
        return head_loss.plain(h, weight, targets, reduction, bias)
    if reduction == "sum" and torch.is_grad_enabled():
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        return ChunkedCrossEntropy.apply(h, weight, targets, bias, dtype)
    loss_of = head_loss.plain
    if torch.is_grad_enabled():
        loss_of = partial(checkpoint, loss_of, use_reentrant=False, preserve_rng_state=False)
    losses = [
        loss_of(rows, weight, y, "none", bias)
        for rows, y in zip(h.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(losses).sum() if reduction == "sum" else torch.cat(losses)


# --- decoding in one graph ---


class Slots(NamedTuple):
    """A cache as a graph sees it: the newest token's position is a tensor, (1,)."""

    pos: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Like the cache's: store one token's keys and values, (B, K, 1, D); return all slots."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.index_copy_(2, self.pos, k), values.index_copy_(2, self.pos, v)


def static_logits(model: GPT, keys: list, values: list, token: Tensor, pos: Tensor) -> Tensor:
    """`next_logits` with positions in tensors and fixed shapes, for a CUDA graph or a compiler to
    capture. It attends to all slots, with a mask that hides those without a token."""
    slots = torch.arange(keys[0].shape[2], device=pos.device)
    bias = alibi(model.config, pos, slots)
    bias = torch.zeros_like(slots, dtype=torch.float32)[None] if bias is None else bias
    mask = bias.masked_fill(slots > pos, -math.inf).to(keys[0].dtype)
    h = model.trunk(token[:, None], pos, mask, Slots(pos, keys, values))
    return model.head(h[:, -1]).float()


class StepGraph:
    """A decoding step as a CUDA graph, which keeps its inputs and copies later ones into them.
    (torch.cuda.make_graphed_callables leaves cycles that hold the memory of each graph.)"""

    def __init__(self, step: Callable, *inputs: Tensor):
        self.inputs, here, side = inputs, torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):  # warm-up; a replay overwrites the keys written here
            step(*self.inputs)
        here.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.logits


def next_logits_in_a_graph(token: Tensor, model: GPT, cache: KVCache) -> Tensor:
    """One graph instead of hundreds of kernels that take longer to launch than to run: compiled, a
    CUDA graph, or both. It is built on a cache's first call and reused for the others."""
    compiled = getattr(model, "compiled_step", None)
    if not (token.is_cuda or compiled):
        return next_logits.plain(token, model, cache)
    pos = torch.full((1,), cache.length, device=token.device)
    try:
        if cache.step is None:
            step = partial(compiled or partial(static_logits, model), cache.keys, cache.values)
            cache.step = StepGraph(step, token.clone(), pos.clone()) if token.is_cuda else step
        logits = cache.step(token, pos)
    except Exception as error:  # a compiler may raise anything
        note(f"continuing without a graph, which is slower: {one_line(error)}")
        del KERNELS["next_logits", token.device.type]
        return next_logits.plain(token, model, cache)
    cache.length += 1
    return logits


class PackedLinear(nn.Module):
    """A linear layer in bf16, laid out once as oneDNN needs it. Its weight must not change."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def for_decoding(
    model: GPT, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> GPT:
    """Move the model there for good and make it generate as fast as it can; it no longer trains."""
    model.to(device, dtype).eval()
    if compiled and can_compile(device, True):
        step = partial(torch.compile(static_logits, fullgraph=True, dynamic=False), model)
        if device.type == "cpu":  # weights become constants, laid out for Inductor's kernels;
            import torch._inductor.config as inductor  # nothing is timed, so bits stay the same

            how = dict(freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP")
            step = inductor.patch(how)(step)
        model.compiled_step = step
        note("the second token waits for the compiler, up to a minute; later ones are fast")
    plain_bf16 = device.type == "cpu" and dtype == torch.bfloat16 and not compiled
    packs = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if plain_bf16 and packs:
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                model.set_submodule(name, PackedLinear(module))
    return model


# --- optimizers ---


def undecorated(method: Callable) -> Callable:
    """An optimizer's method without its wrapper, which spends a second importing torch._dynamo."""
    return getattr(method, "__wrapped__", method)


def newton_schulz_in_bf16(X: Tensor) -> Tensor:
    """Each round corrects the rounding of the one before, so bf16 is enough if the hardware has it;
    emulated, it is thirty times slower than fp32. Products and sums are fused."""
    native = X.is_cuda or cpu_has_bf16()
    shape = X.shape
    X = (X.bfloat16() if native else X).reshape(-1, *shape[-2:])
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        G = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(G, G, G, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.view(shape)


class QuickAdamW(torch.optim.AdamW):
    add_param_group = undecorated(torch.optim.Optimizer.add_param_group)
    step = torch.no_grad()(undecorated(torch.optim.AdamW.step))


class QuickMuon(Muon):
    """Muon with one batched product for all matrices of a shape: a small model would spend its step
    launching hundreds of tiny ones. Each process orthogonalises sharded matrices in full."""

    add_param_group = undecorated(torch.optim.Optimizer.add_param_group)

    def orthogonalised(self, params: list, updates: list[Tensor]) -> list[Tensor]:
        updates = [u.full_tensor() if hasattr(u, "full_tensor") else u for u in updates]
        results = [torch.empty(u.shape, dtype=u.dtype, device=u.device) for u in updates]
        shapes: dict[tuple, list] = {}  # (rows, columns) -> (matrix, where its result goes)
        for p, update, result in zip(params, updates, results, strict=True):
            rows = self.rows.get(p) or [len(p)]
            for m, out in zip(update.split(rows), result.split(rows), strict=True):
                wide = len(m) <= m.shape[1]
                pair = (m, out) if wide else (m.T, out.T)
                shapes.setdefault(tuple(sorted(m.shape)), []).append(pair)
        for (_, longest), pairs in shapes.items():
            X = newton_schulz(torch.stack([m for m, _ in pairs])) * (0.2 * math.sqrt(longest))
            torch._foreach_copy_([out for _, out in pairs], list(X.unbind()))
        return [distribute_like(r, p) for p, r in zip(params, results, strict=True)]


OPTIMIZERS |= {"adamw": QuickAdamW, "muon": QuickMuon}
KERNELS |= {
    ("dropout", "cpu"): dropout_by_bytes,
    ("attention_sdpa", "cpu"): attention_folded,
    ("attention_sdpa", "cuda"): attention_on_cuda,
    ("newton_schulz", "cpu"): newton_schulz_in_bf16,
    ("newton_schulz", "cuda"): newton_schulz_in_bf16,
}
KERNELS |= {("head_loss", kind): chunked_head_loss for kind in ("cpu", "cuda", "mps")}
KERNELS |= {("next_logits", kind): next_logits_in_a_graph for kind in ("cpu", "cuda", "mps")}


# --- the self-test of a device ---

TRUSTED = ("cpu",)  # devices that need no test


def self_test(shape: GPTConfig, rt: Runtime) -> None:
    """Compare this device and its kernels with Part I's operations on the CPU, in one layer.

    Raises UserError if loss or gradients differ by more than rounding: new drivers and Apple's GPUs
    have been seen to compute wrong results without an error.
    """
    if rt.device.type in TRUSTED:
        return
    T, V = min(shape.block_size, 64), min(shape.vocab_size, 5000)
    small = replace(shape, n_layer=1, block_size=T, vocab_size=V, dropout=0.0, token_dropout=0.0,
                    zero_init=False)  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the run has yet to draw its weights
        set_seed(0)
        model, tokens = GPT(small), torch.randint(V, (2, T + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    twins = dict(KERNELS)
    KERNELS.clear()
    try:
        loss, gradient = loss_and_gradient(
            model, batch, Runtime(torch.device("cpu"), torch.float32)
        )
    finally:
        KERNELS.update(twins)
    for dtype, tolerance in {rt.dtype: 0.05, torch.float32: 1e-3}.items():
        found, estimate = loss_and_gradient(model, batch, replace(rt, dtype=dtype))
        error = ((estimate - gradient).norm() / gradient.norm()).item()
        if not (abs(found / loss - 1) < tolerance and error < tolerance):  # NaN fails too
            raise UserError(
                f"{rt.device} computes wrongly in {str(dtype)[6:]}: loss {found:.4f} against "
                f"{loss:.4f} on the CPU, gradients off by {error:.1%}: try another driver or "
                "torch version, or --device cpu; --no_self_test skips this check"
            )


def loss_and_gradient(model: GPT, batch: Batch, rt: Runtime) -> tuple[float, Tensor]:
    """Mean loss, and the gradient of the summed loss as one vector, on the CPU."""
    model.to(rt.device).zero_grad()
    batch = batch.to(rt.device)
    with rt.autocast():
        loss = model.losses(batch.x, batch.y, "sum")
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return loss.item() / batch.y.numel(), gradient.cpu()


# ====================================================================================
# 10. Vocabularies
#
# Byte-level BPE trained here, and existing vocabularies: a tokenizer.json, the folder of a Hugging
# Face model, GPT-2's own two files. Look at `special_ids`, which finds the tokens that end a text,
# and at `cuts_as_gpt2`, which says whether a long text may be encoded in blocks.
#
#     >>> tokenizer = lp.load_tokenizer("folder/of/gpt2")
#     >>> tokenizer.encode("Hello world").tolist(), tokenizer.eos_id
#     ([15496, 995], 50256)
# ====================================================================================


@dataclass
class TokenizerConfig(Settings):
    """Tokenizer. Commands that take a checkpoint use the tokenizer inside it."""

    tokenizer: str = option("byte", "byte, bpe (trained here), a file, folder or Hub name")
    vocab_size: int = option(8192, "size of a trained BPE vocabulary", low=260, high=2**20)
    min_frequency: int = option(2, "a BPE merge needs this many occurrences", low=1)
    special_tokens: str = option(
        "", "a trained BPE's special tokens; usual names, such as <pad>,<s>,</s>,<sep>, get roles"
    )
    extra_special_tokens: str = option("", "more tokens for a trained BPE, kept whole in text")


class BPETokenizer:
    """A `tokenizers.Tokenizer` behind the interface of `ByteTokenizer`. bos_id may be None."""

    def __init__(self, library_json: str, pad_id, bos_id, eos_id, sep_id, end_ids=()):
        self.json = library_json
        with library_errors("the tokenizer is not valid"):
            self.library = optional("tokenizers").Tokenizer.from_str(library_json)
            self.library.encode_special_tokens = True  # a literal "<|sep|>" is plain text
            self.library.no_padding()
            self.library.no_truncation()
            self.vocab_size = max(self.library.get_vocab().values(), default=0) + 1
        self.pad_id, self.bos_id, self.eos_id, self.sep_id = pad_id, bos_id, eos_id, sep_id
        self.end_ids = tuple(sorted({eos_id, sep_id, *end_ids}))
        self.prefix = [] if bos_id is None else [bos_id]
        library = json.loads(self.library.to_str())
        model = library["model"]
        self.unk_id = model.get("unk_id")  # Unigram has an id; the others name a token
        if model["type"] != "Unigram":
            self.unk_id = model["vocab"].get(model.get("unk_token"))
        self.cuts_safely = cuts_as_gpt2(library)  # encoded in pieces, a text has the same ids
        self.is_byte_level = '"ByteLevel"' in json.dumps(library.get("decoder"))
        self.twin = tiktoken_twin(library) if self.cuts_safely else None

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, (n,) uint32. Lone surrogates become U+FFFD."""
        texts = [SURROGATE.sub("\ufffd", text) for text in texts]
        with library_errors("the tokenizer cannot encode this text"):
            if self.twin is None:
                encoded = self.library.encode_batch_fast(texts, add_special_tokens=False)
                return [np.array(e.ids, np.uint32) for e in encoded]
            if len(texts) == 1:
                return [self.encode_with_twin(texts[0])]
            return list(POOL.map(self.encode_with_twin, texts))

    def encode_with_twin(self, text: str) -> np.ndarray:
        try:
            return self.twin.encode_to_numpy(text)
        except ValueError:  # its pattern gives up on a million spaces in a row
            return np.array(self.library.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Iterable[int], before: Sequence[int] = ()) -> str:
        """The text that `ids` add after `before`: SentencePiece drops the first token's space."""
        ids = [int(i) for i in ids]
        if self.is_byte_level or not before:
            return self.library.decode(ids, skip_special_tokens=True)
        known = self.library.decode(list(before), skip_special_tokens=True)
        return self.library.decode([*before, *ids], skip_special_tokens=True)[len(known) :]

    def spec(self) -> dict:
        ids = {f"{role}_id": getattr(self, f"{role}_id") for role in USUAL_NAMES}
        return {"kind": "bpe", "json": self.json, **ids, "end_ids": list(self.end_ids)}


Tokenizer = ByteTokenizer | BPETokenizer
POOL = ThreadPoolExecutor(os.cpu_count())  # starts its threads when first used
SURROGATE = re.compile("[\ud800-\udfff]")
bpe_tokenizer = lru_cache(maxsize=4)(BPETokenizer)  # a large vocabulary takes a second


@contextlib.contextmanager
def library_errors(complaint: str):
    """One clear line for a library's error: those of gzip, pyarrow, fsspec and others share no
    base class, and panics in tokenizers are BaseExceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{complaint}: {one_line(error)}") from None


def tokenizer_from_spec(spec: dict) -> Tokenizer:
    """The tokenizer that a checkpoint or a store describes. Raises UserError."""
    if spec["kind"] == "byte":
        return ByteTokenizer()
    ids = {f"{role}_id": spec[f"{role}_id"] for role in USUAL_NAMES}
    return bpe_tokenizer(spec["json"], **ids, end_ids=tuple(spec["end_ids"]))


def byte_library():
    """The byte tokenizer as a `tokenizers.Tokenizer`."""
    tokenizers = optional("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE(byte_alphabet(), []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(list(SPECIAL_TOKENS))
    return library


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: {character: byte}.

    Printable Latin-1 maps to itself; the rest are numbered from U+0100 (Radford et al., 2019).
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def train_bpe(texts: Iterable[str], config: TokenizerConfig) -> BPETokenizer:
    """Train byte-level BPE on an iterator of texts, in bounded memory.

    Text never turns into special tokens; the names in --extra_special_tokens always do, and no
    merge crosses their borders. A signal waits until the library is done. Raises UserError.
    """
    special = re.findall(r"[^,\s]+", config.special_tokens) or list(SPECIAL_TOKENS)
    extra = re.findall(r"[^,\s]+", config.extra_special_tokens)
    extra = [name for name in extra if name not in special]
    declared = {
        role: next((name for name in names if name in special), None)
        for role, names in USUAL_NAMES.items()
    }
    if not declared["eos"]:
        raise UserError("--special_tokens has no end-of-text token such as <|endoftext|> or </s>")
    library = optional("tokenizers").ByteLevelBPETokenizer()
    texts = (SURROGATE.sub("\ufffd", text) for text in texts)
    if extra:
        borders = re.compile("|".join(map(re.escape, extra)))
        texts = (piece for text in texts for piece in borders.split(text))
    names = [*special, *extra]
    library.train_from_iterator(
        texts, config.vocab_size, config.min_frequency, show_progress=False, special_tokens=names
    )
    saved = json.loads(library.to_str()) | {"post_processor": None}
    for token in saved["added_tokens"]:
        token["special"] = token["content"] not in extra  # the library matches others in text
    ids = special_ids(library, declared)
    if config.special_tokens:
        token = {number: name for name, number in library.get_vocab().items()} | {None: "none"}
        roles = [f"{role} is {token[ids[f'{role}_id']]}" for role in USUAL_NAMES]
        note(f"special tokens by name: {', '.join(roles)}")
    return bpe_tokenizer(json.dumps(saved), **ids)


# Names of special tokens if a configuration declares none; the first one found counts.
USUAL_NAMES = {
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
    "bos": ("<|bos|>", "<s>", "<bos>", "[BOS]"),
    "eos": ("<|eos|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>", "[EOS]"),
    "sep": ("<|sep|>", "<sep>", "[SEP]"),
}
TOKENIZER_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]  # in a repository on the Hub
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]


def special_ids(library, declared: dict[str, str | None], ends: Sequence[int] = ()) -> dict:
    """The ids that BPETokenizer takes. A missing sep or pad becomes eos; without eos, UserError.

    declared: {role: token, or None for none}, from a configuration. ends: more ids that end texts.
    """
    ids: dict = {}
    for role, usual in USUAL_NAMES.items():
        names = [declared[role]] if role in declared else usual
        known = [library.token_to_id(name) for name in names if name is not None]
        ids[role] = next((number for number in known if number is not None), None)
    ends = tuple(number for number in ends if library.id_to_token(number) is not None)
    if ends and "eos" not in declared:
        ids["eos"] = ends[0]
    if ids["eos"] is None:
        raise UserError("the vocabulary has no end-of-text token such as <|endoftext|> or </s>")
    ids |= {role: ids["eos"] for role in ("sep", "pad") if ids[role] is None}
    return {f"{role}_id": number for role, number in ids.items()} | {"end_ids": ends}


def load_tokenizer(name: str) -> Tokenizer:
    """`byte`, a tokenizer.json, a folder, or a name on the Hub such as gpt2. Raises UserError."""
    if name == "byte":
        return ByteTokenizer()
    path = Path(name)
    if path.name == "tokenizer.json" and path.with_name("tokenizer_config.json").is_file():
        path, name = path.parent, str(path.parent)
    if path.is_file():
        with library_errors(f"{path} is not a tokenizer"):
            library = optional("tokenizers").Tokenizer.from_file(str(path))
        return bpe_tokenizer(library.to_str(), **special_ids(library, {}))
    folder = hf_folder(name, TOKENIZER_FILES)
    has = {file.name for file in folder.iterdir()}
    if {"encoder.json", "vocab.bpe"} <= has and "tokenizer.json" not in has:
        return tokenizer_from_merges(folder / "encoder.json", folder / "vocab.bpe")
    known = {"tokenizer.json", "tokenizer_config.json", "added_tokens.json", "config.json"}
    if {"vocab.json", "merges.txt"} <= has and not has & known:
        return tokenizer_from_merges(folder / "vocab.json", folder / "merges.txt")
    return hf_tokenizer(folder)


def tokenizer_from_merges(vocabulary: Path, merges: Path) -> BPETokenizer:
    """GPT-2's two files, as OpenAI published them or as tokenizers saves them. Raises UserError."""
    tokenizers = optional("tokenizers")
    with library_errors(f"{vocabulary} and {merges.name}"):
        library = tokenizers.ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges))
    names = [*sum(USUAL_NAMES.values(), ()), "<unk>", "<mask>"]
    library.add_special_tokens([name for name in names if library.token_to_id(name) is not None])
    gpt2 = "<|endoftext|>"  # which GPT-2 uses as bos, too
    declared = {} if library.token_to_id(gpt2) is None else {"bos": gpt2, "eos": gpt2}
    return bpe_tokenizer(library.to_str(), **special_ids(library, declared))


def hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, as transformers loads it. Raises UserError.

    Reads a tokenizer.json as is: AutoTokenizer would rebuild it from the model's type, without its
    normalizer. The end ids of the tokenizer, generation and model configurations all end texts.
    """
    transformers = transformers_library()
    with library_errors(f"{folder} holds no tokenizer.json or other usable tokenizer"):
        if (folder / "tokenizer.json").is_file():
            theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        library = theirs.backend_tokenizer
    tokens = {role: getattr(theirs, f"{role}_token") for role in USUAL_NAMES}
    if tokens["bos"] and library.get_vocab() == byte_library().get_vocab():  # ours, exported
        return ByteTokenizer()
    declared = {role: token for role, token in tokens.items() if token is not None}
    configs = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    if any(file.is_file() for file in configs):  # then no bos unless they name one
        declared.setdefault("bos", None)
    ends = []
    for file in (folder / "generation_config.json", folder / "config.json"):
        stated = read_table(file, file.name).get("eos_token_id") if file.is_file() else None
        ends += stated if isinstance(stated, list) else [stated]
    ends = [number for number in ends if type(number) is int and number >= 0]
    return bpe_tokenizer(library.to_str(), **special_ids(library, declared, ends))


def cuts_as_gpt2(library: dict) -> bool:
    """Whether a `tokenizer.json` is byte-level BPE that cuts text as GPT-2's does.

    If so, a piece begins at every space between two letters.
    """
    model, pre = library["model"], library.get("pre_tokenizer") or {}
    odd = any(model.get(name) for name in ("ignore_merges", "byte_fallback", "dropout"))
    if model["type"] != "BPE" or odd or library.get("normalizer"):
        return False
    for token in library.get("added_tokens", []):  # non-special ones are matched in text
        loose = token["lstrip"] or token["rstrip"] or token["single_word"]
        cut = re.search(r"\s", token["content"]) or SAFE_CUT.search(token["content"])
        if not token["special"] and (loose or cut):
            return False
    plain = pre.get("use_regex", True) and not pre.get("add_prefix_space")
    return pre.get("type") == "ByteLevel" and plain


def tiktoken_twin(library: dict):
    """A tiktoken encoder with the same ids as a `tokenizer.json` that cuts as GPT-2's, or None.

    tiktoken merges the adjacent pair of lowest id, tokenizers the pair of lowest merge rank: the
    two agree if every token is a byte or a merge, and the ids rise with the merges.
    """
    try:
        import tiktoken
    except ImportError:
        return None
    vocabulary, added = library["model"]["vocab"], library["added_tokens"]
    alphabet = byte_alphabet()
    words = vocabulary.keys() - {token["content"] for token in added}
    merged = ["".join(pair) for pair in library["model"]["merges"]]
    ids = [vocabulary[word] for word in merged]
    if words != alphabet.keys() | set(merged) or ids != sorted(set(ids)):
        return None
    if not all(token["special"] for token in added):  # others are matched in text first
        return None
    ranks = {bytes(alphabet[c] for c in word): vocabulary[word] for word in words}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding("twin", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# ====================================================================================
# 11. Corpus
#
# files -> rows -> Records -> exact duplicates dropped -> train or val, by hash -> token store.
# Start with `record_from_row`, which reads every layout, `roles_of`, which reads names, and
# `split_records`: a record's side follows from the record itself, so that training data never
# validates.
# ====================================================================================


@dataclass
class DataConfig(Settings):
    """Data: where text comes from and what is kept."""

    data_dir: str = changeable("data/raw", "a folder, a file, or a store made by prepare")
    processed_dir: str = changeable("data/processed", "where token stores are kept")
    val_fraction: float = option(0.1, "share of records kept for validation", low=0.0, high=0.9)
    split_seed: int = option(1337, "salt of the split's hash", low=0)
    split_by: str = option("prompt", "what decides a record's side", choices=("prompt", "content"))
    doc_delimiter: str = option("", r"separates the records of plain text (\n for lines)")
    bad_records: str = option("error", "on malformed lines and entries", choices=("error", "skip"))
    text_field: str = option("text", "column or key that holds plain text")
    join_rows: bool = option(False, "join a split's rows into one text, as for WikiText on the Hub")
    keep_duplicates: bool = option(False, "keep repeated records, which are otherwise dropped")
    min_chars: int = option(1, "drop plain texts shorter than this", low=0)
    max_docs: int = option(0, "stop after this many records (0: all)", low=0)
    max_tokens: int = option(0, "stop after about this many tokens (0: all)", low=0)
    hf_dataset: str = option("", "a dataset on the Hub, or a folder with the same layout")
    hf_config: str = option("", "the dataset's configuration, such as wikitext-103-raw-v1")
    hf_split: str = option("", "one of the dataset's splits (default: all, each used as named)")
    streaming: bool = option(False, "read the dataset as a stream, without downloading all of it")
    add_special_tokens: bool = option(True, "bos and eos around each plain text")


# Commands that share these values agree on which records validate.
SPLIT_SETTINGS = ("split_seed", "val_fraction", "split_by")
# Inherited from a checkpoint: these, what a record is, and how its text begins.
INHERITED = (*SPLIT_SETTINGS, "doc_delimiter", "join_rows", "add_special_tokens")
BLOCK = 1 << 16  # characters processed at a time
PIECE = 1 << 24  # characters; a longer file of plain text becomes several records
LONG_TEXT = 64 * 1024  # bytes; a longer plain text gives its last part to validation


@dataclass
class Turn:
    """A prompt and its answer, both rendered with the templates of section 1."""

    prompt: str  # "" for plain text
    response: str
    trained: bool = True  # False: the answer is only context, as with weight 0


@dataclass
class Record:
    """One unit of text: plain text, an instruction with its answer, or a conversation."""

    turns: list[Turn]  # at least one; the last is trained
    rejected: str = ""  # in a preference pair, the other answer to the last turn
    source: str = ""
    where: str = ""  # file, or file:line
    split: str = ""  # train or val, if a name says so, as in wiki.train.tokens
    unused: Sequence[str] = ()  # names of the row's columns and fields that went unused

    @property
    def is_plain(self) -> bool:
        return not self.turns[-1].prompt

    @property
    def n_characters(self) -> int:
        return sum(len(turn.prompt) + len(turn.response) for turn in self.turns)


# Advice for when more than a tenth of a source is skipped.
ADVICE = {
    "skipped: duplicate": "--keep_duplicates keeps them",
    "skipped: short or empty": "if the rows are lines of one text, --join_rows joins them",
}


class Report:
    """What was read from each source, what was skipped, and why."""

    COLUMNS = ("records", "train", "val", "train_tokens", "val_tokens", "bytes")

    def __init__(self):
        self.rows: dict[str, Counter] = {}
        self.examples: dict[tuple[str, str], str] = {}  # (source, what) -> its first occurrence

    def count(self, source: str, what: str, n: int = 1, where: str = "") -> None:
        """Add to a column, or to a separate line below the source's row."""
        self.rows.setdefault(source, Counter())[what] += n
        if where:
            self.examples.setdefault((source, what), where)

    def skip(self, source: str, why: str, where: str) -> None:
        self.count(source, f"skipped: {why}", where=where)

    def lines(self) -> list[str]:
        table = [f"{'source':<28}" + "".join(f"{c:>14}" for c in self.COLUMNS)]
        for source, row in sorted(self.rows.items()):
            table.append(f"{source[:27]:<28}" + "".join(f"{row[c]:>14,}" for c in self.COLUMNS))
            for what, n in row.items():
                if what in (*self.COLUMNS, "train_bytes", "val_bytes"):
                    continue
                where = self.examples.get((source, what))
                table.append(f"  {what}: {n:,}" + (f" (first: {where})" if where else ""))
                if what in ADVICE and n > 0.1 * row["records"]:
                    table.append(f"    {ADVICE[what]}")
        return table


# --- reading files ---


def open_zst(path: Path, mode: str):
    """Python's own reader: that of the zstandard package accepts truncated files."""
    library = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return optional(library, "backports.zstd").open(path, mode)


UNPACKERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}


def open_binary(path: Path):
    """Open a file to read its bytes, decompressed."""
    return UNPACKERS.get(path.suffix.lower(), open)(path, "rb")


def ending(path: Path) -> str:
    """A file's extension in lower case, ignoring .gz and the like."""
    return Path(path.stem if path.suffix.lower() in UNPACKERS else path.name).suffix.lower()


def encoding_of(head: bytes) -> str:
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"


def read_text(path: Path, size: int = 0) -> Iterator[str]:
    r"""A file's lines, or blocks of `size` characters; `\r\n` and `\r` become `\n`.

    UTF-8, unless a byte order mark says otherwise. Raises UserError on invalid bytes, with their
    offset, on NULs, and if the file cannot be read or decompressed.
    """
    with library_errors(f"cannot read {path}"), open_binary(path) as data:
        encoding = encoding_of(data.peek(4))
        file = io.TextIOWrapper(data, encoding)
        try:
            for number, part in enumerate(iter(partial(file.read, size), "") if size else file):
                if "\0" in part:
                    what = f"{path} contains NULs: it is not text, or is UTF-16 without a BOM"
                    raise UserError(f"{what}; save it as UTF-8")
                yield part if number else part.lstrip("\ufeff")
        except UnicodeDecodeError as error:
            offset = data.tell() - len(error.object) + error.start
            what = f"{path}: invalid {encoding.upper()} at byte {offset}"
            raise UserError(f"{what}; convert it to UTF-8") from None


def documents_in(blocks: Iterator[str], delimiter: str) -> Iterator[str]:
    """The text between delimiters."""
    rest = ""
    # Read at least as much as is left over, so as not to search a long document again per block.
    while more := "".join(islice(blocks, 1 + len(rest) // BLOCK)):
        *documents, rest = (rest + more).split(delimiter)
        yield from documents
    if rest:
        yield rest


# --- rows of JSON and of tables become records ---

# Known column names. A layout is a question and its answer, a dialogue, a preference pair, or
# plain text.
QUESTIONS = ("instruction", "prompt", "question")
ANSWERS = ("output", "completion", "response", "answer")
DIALOGUES = ("messages", "conversations", "conversation")
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
LABELS = ("label", "labels", "sentiment", "class", "target")
MASKS = ("weight", "train", "training", "trainable", "loss")  # OpenAI's, axolotl's and swift's
LAYOUTS = (
    "text; instruction, prompt or question (with input or context, system) and output, "
    "completion, response or answer; messages or conversations; chosen and rejected"
)
# Ignoring these would leave a dialogue incomplete.
UNSUPPORTED = {
    "tools", "functions", "tool_calls", "function_call", "tool_call_id", "image", "images",
    "video", "videos", "audio", "audios", "train_detail", "training_detail", "history",
}  # fmt: skip
REASONING = {"reasoning_content", "reasoning", "thinking"}
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant",
}  # fmt: skip
# Yes and no, as written in JSON, as numbers or in table cells.
FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
EMPTY = (None, "", "[]", [], {})  # values that say nothing


class Message(NamedTuple):
    role: str  # system, user or assistant
    text: str
    trained: bool = True


def present(row: dict, names: Iterable[str], empty: tuple = (None,)) -> str:
    """The one of these columns that the row fills, or "". Raises ValueError if it fills two."""
    found = [name for name in names if row.get(name) not in empty]
    if len(found) > 1:
        raise ValueError(f"both {found[0]!r} and {found[1]!r} are given: drop one")
    return found[0] if found else ""


def text_from(value, name: str) -> str:
    """The text of a column or field. Numbers, lists and objects are written as JSON."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except TypeError:
        raise ValueError(f"{name!r} must be text, not {type(value).__name__}") from None
    if "\0" in text:
        raise ValueError(f"{name!r} contains NULs: remove them")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def take_text(row: dict, names: Iterable[str]) -> str:
    """Take out the text of the one column among these that is not empty; "" if all are."""
    name = present(row, names, (None, ""))
    return text_from(row.pop(name), name) if name else ""


def take_masks(row: dict, names: Iterable[str] = MASKS) -> bool:
    """Take out the masks of a row or message and say whether they let it train. Raises ValueError
    on fractions, such as 0.5."""
    masks = {name: str(row.pop(name)) for name in names if row.get(name) is not None}
    for name, value in masks.items():
        if value.strip().lower() not in FLAGS:
            raise ValueError(f"{name!r} is {value}, but masks and KTO labels must be 0 or 1")
    return all(FLAGS[value.strip().lower()] for value in masks.values())


def take_liking(row: dict, columns: Iterable[str]) -> bool:
    """Take out KTO's label and say whether people liked the answer: True without such a label.
    Numbers count only next to KTO's own columns, since elsewhere they may be classes. Raises
    ValueError if one there is neither 0 nor 1."""
    label = str(row.get("label")).strip().lower()
    is_number = re.fullmatch(r"[-.\d]+", label) is not None
    if label in ("true", "false") or (is_number and {"prompt", "completion"} <= {*columns}):
        return take_masks(row, ("label",))
    return True


def left_over(row: dict, place: str, unsupported: set[str]) -> list[str]:
    """Names of the fields left in a row, all unused. Raises ValueError if one is unsupported."""
    names = [name for name, value in row.items() if value not in EMPTY]
    if odd := unsupported.intersection(names):
        what = f"{min(odd)!r} in {place} is not supported"
        raise ValueError(f"{what}: put it into the content, or drop it")
    return names


def message_from(entry, column: str, unused: list[str]) -> Message:
    """A message from {role, content} (OpenAI) or {from, value} (ShareGPT); content may be a list of
    parts {type: text, text}. Names of other fields are added to `unused`."""
    if not isinstance(entry, dict):
        raise ValueError(f"{column!r} must be a list of {{role, content}} objects")
    rest = {name: entry[name] for name in entry if name not in ("role", "from", "content", "value")}
    trained = take_masks(rest)
    unused += [f"{n} in {column}" for n in left_over(rest, repr(column), UNSUPPORTED | REASONING)]
    role = entry.get("role") or entry.get("from")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"unknown role {role!r} in {column!r} (known: {', '.join(ROLES)})")
    content = entry.get("value") if entry.get("content") is None else entry["content"]
    texts = []
    for part in content if isinstance(content, list) else [content]:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        texts.append(part.get("text") if is_text else part)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a message in {column!r} has no text, or a part that is not text")
    return Message(ROLES[role], text_from("".join(texts), column), trained)


def is_dialogue(value) -> bool:
    """Whether a value is a message, or a list that contains one."""
    entries = value if isinstance(value, list) else [value]
    fields = [entry.keys() for entry in entries if isinstance(entry, dict)]
    return any({"role", "content"} <= names or {"from", "value"} <= names for names in fields)


def take_messages(row: dict, column: str, role: str, unused: list[str]) -> list[Message]:
    """Take out the messages of a column: a list, a single message, or a bare text from `role`."""
    value = row.pop(column)
    if column in (*DIALOGUES, "chosen", "rejected"):
        parsed = json_value(value) if isinstance(value, str) else None  # a table's cell
        value = parsed if is_dialogue(parsed) else value
        if value == []:
            raise ValueError(f"no messages in {column!r}")
    if role and not is_dialogue(value):
        return [Message(role, text_from(value, column))]
    entries = value if isinstance(value, list) else [value]
    return [message_from(entry, column, unused) for entry in entries]


def record_from_row(row: dict, text_field: str = "text", labels: str = "") -> Record:
    """A Record from a row in any of LAYOUTS. Raises ValueError if it has none of them.

    labels: the column that turns plain texts into instructions, or "".
    """
    if isinstance(row, Exception):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if None in row:  # csv's key for cells beyond the last column
        raise ValueError("more cells than the first line has column names")
    row = dict(row)  # the steps below take things out; what is left is unused
    asked, talk = present(row, QUESTIONS), present(row, DIALOGUES)
    preferred = row.get("chosen") is not None  # takes precedence over any other answer
    answer = "chosen" if preferred else present(row, ANSWERS)
    is_pair = preferred and row.get("rejected") is not None
    by_name = text_field != "text" and row.get(text_field) is not None
    if by_name or not (is_pair or talk or (asked and answer)):
        return plain_record(row, text_field, labels, "" if by_name else asked or answer)
    roles = ((asked, "user"), (talk, ""), (answer, "assistant"))  # of bare texts
    return dialogue_record(row, {name: role for name, role in roles if name}, is_pair)


def dialogue_record(row: dict, columns: dict[str, str], is_pair: bool) -> Record:
    """A Record of questions and answers from these columns of the row."""
    trained, liked, unused = take_masks(row), take_liking(row, columns), []
    body: list[Message] = []
    for name, role in columns.items():
        part = take_messages(row, name, role, unused)
        if body and body[-1].role != "assistant" and part[0].role == "assistant":
            body += part
        elif {m.text for m in body} <= {m.text for m in part}:  # UltraFeedback repeats these
            body = part
        else:
            names = " and ".join(map(repr, columns))
            raise ValueError(f"{names} hold different dialogues: drop one")
    rejected = ""
    if is_pair:
        *prompt, last = take_messages(row, "rejected", "assistant", unused)
        if prompt and [m[:2] for m in prompt] != [m[:2] for m in body[:-1]]:
            raise ValueError("'chosen' and 'rejected' do not share their prompt")
        if last.role != "assistant":
            raise ValueError("'rejected' must end with an assistant's answer")
        rejected = instruction_response(last.text)
    extra = take_text(row, INPUTS) if columns.keys() & {*QUESTIONS} else ""
    turns = turns_of(body, take_text(row, SYSTEMS), extra)
    turns[-1].trained = turns[-1].trained and liked
    for turn in turns:
        turn.trained = turn.trained and trained
    return Record(turns, rejected, unused=unused + left_over(row, "the row", UNSUPPORTED))


def turns_of(messages: list[Message], system: str, extra: str) -> list[Turn]:
    """Pair each user message with its answer; consecutive messages of one role are joined.

    system, extra: texts of separate columns, for the first prompt. Raises ValueError.
    """
    joined: list[Message] = []
    for role, group in groupby(messages, key=lambda message: message.role):
        _, texts, trained = zip(*group, strict=True)
        if role == "assistant" and len(set(trained)) > 1:
            raise ValueError("consecutive answers differ in weight: give them the same one")
        joined.append(Message(role, "\n\n".join(texts), trained[0]))
    if joined[0].role == "system":
        if system not in ("", joined[0].text):
            raise ValueError("a system text both in the dialogue and in its own column: drop one")
        system = joined.pop(0).text
    if not joined or [m.role for m in joined] != ["user", "assistant"] * (len(joined) // 2):
        order = "a user's message first, an assistant's answer last, a system text only before both"
        raise ValueError(f"a conversation must have {order}")
    turns = []
    for question, answer in zip(joined[::2], joined[1::2], strict=True):
        prompt = instruction_prompt(question.text, extra, system)
        turns.append(Turn(prompt, instruction_response(answer.text), answer.trained))
        system = extra = ""
    return turns


def plain_record(row: dict, text_field: str, labels: str, half: str) -> Record:
    """A Record of plain text or, if the row has its label, of an instruction to classify it.

    half: the column of a question without an answer, or of an answer without a question, or "".
    """
    text, role = row.get(text_field), row.get("role")
    if half and text is not None:
        raise ValueError(f"{half!r} next to 'text' is half a pair: drop one of the two columns")
    if (isinstance(role, str) and role in ROLES) or {"message_id", "parent_id"} <= row.keys():
        raise ValueError("one message of a dialogue: put all of them in a list called messages")
    if text is None:
        names = [name if row[name] is not None else f"{name} is null" for name in list(row)[:12]]
        what = f"no {text_field!r} and no known layout among the fields ({', '.join(names)})"
        way = "pass the one that holds text with --text_field"
        raise ValueError(f"{what}; {way}, or use {LAYOUTS}")
    if not isinstance(text, str):
        raise ValueError(f"{text_field!r} must be text, not {type(text).__name__}")
    trained, source = take_masks(row), ""
    turn = Turn("", text_from(row.pop(text_field), text_field), trained)
    if labels and row.get(labels) not in EMPTY:
        prompt = instruction_prompt(f"classify the text by {labels}", turn.response)
        answer = instruction_response(text_from(row.pop(labels), labels))
        turn, source = Turn(prompt, answer, trained), labels
    return Record([turn], source=source, unused=left_over(row, "the row", set()))


class Source(NamedTuple):
    """A file, or a split of a data set."""

    name: str
    rows: Callable[[], Iterator[tuple]]  # yields (where, row), or an error in place of a bad row
    split: str = ""  # train or val, if a name says so
    table: str = ""  # if a table, whose texts may be labelled: the source name of its instructions


def records_of(source: Source, labels: str, config: DataConfig, report: Report) -> Iterator[Record]:
    """Records of a source; broken rows and unknown layouts are refused, or counted as skipped.

    labels: the column that turns texts into instructions, or "". Untrained last turns are cut.
    """
    unused: Counter[str] = Counter()
    for where, row in source.rows():
        try:
            record = record_from_row(row, config.text_field, labels if source.table else "")
        except (ValueError, RecursionError) as error:
            why = one_line(error, 400)
            if config.bad_records == "error":
                raise UserError(f"{where}: {why}; fix it, or pass --bad_records skip") from None
            # A JSON error's full text has a column number: each would be a separate reason.
            report.skip(source.name, getattr(error, "msg", why), where)
            continue
        unused.update(record.unused)
        record.where, record.split = where, source.split
        record.source = record.source or (not record.is_plain and source.table) or source.name
        masked = sum(not turn.trained for turn in record.turns)
        if masked:
            what = "answers not trained (weight 0, train false, label false)"
            report.count(record.source, what, masked, where)
        if masked == len(record.turns):
            report.skip(record.source, "no answer to train", where)
            continue
        while not record.turns[-1].trained:
            record.turns.pop()
            record.rejected = ""
        yield record
    if unused:
        what = f"not used: {', '.join(sorted(unused))}"
        report.count(source.name, what, max(unused.values()))


def join_rows(records: Iterable[Record]) -> Iterator[Record]:
    """Join a source's plain texts, one per line: WikiText on the Hub has a row for each line."""
    groups = groupby(records, key=lambda r: (r.source, r.split, r.is_plain))
    for (source, split, is_plain), group in groups:
        if not is_plain:
            yield from group
            continue
        lines = (record.turns[0].response.removesuffix("\n") + "\n" for record in group)
        for batch in batched(lines, sys.maxsize, len, PIECE):
            yield Record([Turn("", "".join(batch))], "", source, source, split)


# --- labels of plain texts: data for classification ---

MAX_LABELS = 10


def label_column(sources: list[Source], config: DataConfig) -> str:
    """The column whose labels turn texts into data for classification, or "".

    It has at most MAX_LABELS different labels, each repeated. A table counts if its first row is a
    labelled text.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for source in sources:
        rows = source.rows() if source.table else ()
        # A stream shows its labels early, or never.
        for number, (_, row) in enumerate(islice(rows, 1000 if config.streaming else None)):
            is_text = isinstance(row, dict) and isinstance(row.get(config.text_field), str)
            filled = {name for name in row if row[name] not in EMPTY} if is_text else set()
            name = next((name for name in LABELS if name in filled), "")
            if filled & {*QUESTIONS, *ANSWERS, *DIALOGUES, "chosen"}:  # not plain text
                name = ""
            if name:
                counts[name, str(row[name])] += 1
            if len(counts) > MAX_LABELS:
                return ""
            if not (name or number):
                break
    names = {name for name, _ in counts}
    is_set = len(names) == 1 and len(counts) > 1 and min(counts.values()) > 1
    return names.pop() if is_set else ""


# --- one reader for each format ---

# A reader yields (where, row) for every row of a file, with an error in place of a bad row. Plain
# text makes rows too, whose only column is the one that --text_field names.


def sms_rows(path: Path, config: DataConfig) -> Iterator[tuple]:
    """SMS Spam Collection: each line is a label, a tab and a message, without quoting."""
    task = "classify if the SMS is spam or ham"
    for number, line in enumerate(read_text(path), 1):
        label, tab, message = line.removesuffix("\n").partition("\t")
        row = dict(instruction=task, input=message, output=label.strip())
        if not tab or not label.strip():
            row = ValueError("no tab between label and message")
        if line.strip():
            yield f"{path}:{number}", row


def json_value(text: str):
    """The value of a JSON text, or the error in its place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def json_rows(path: Path, config: DataConfig) -> Iterator[tuple]:
    """JSON Lines, a JSON list of objects, or one object, whatever the file is called."""
    first = next(filter(str.strip, read_text(path)), "").lstrip()
    is_whole = ending(path) == ".json" and not isinstance(json_value(first), dict)
    if not (first.startswith("[") or is_whole):
        for number, line in enumerate(read_text(path), 1):
            if not line.isspace():
                yield f"{path}:{number}", json_value(line)
        return
    entries = json_value("".join(read_text(path)))
    if isinstance(entries, dict):
        entries = [entries]
    if isinstance(entries, list):
        yield from ((f"{path}: entry {n}", entry) for n, entry in enumerate(entries, 1))
    else:
        what = entries if isinstance(entries, Exception) else f"found a {type(entries).__name__}"
        why = f"expected a JSON list of objects, or one object per line: {one_line(what)}"
        yield str(path), ValueError(why)


def csv_rows(path: Path, config: DataConfig) -> Iterator[tuple]:
    """A table whose first line names its columns, separated by commas, semicolons or tabs.

    A misplaced quote is always an error, as it may swallow the rest of the file.
    """
    csv.field_size_limit(2**31 - 1)
    lines, before = read_text(path), 0
    header = next(lines, "")
    delimiter = max("\t,;" if ending(path) == ".tsv" else ",;\t", key=header.count)
    if said := re.fullmatch(r"sep=(.)\n?", header):  # Excel's line
        delimiter, header, before = said[1], next(lines, ""), 1
    spaced, number = f"{delimiter} " in header, before + 1
    lines = chain([header], lines)
    table = csv.DictReader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaced)
    try:
        table.fieldnames = [name.strip() for name in table.fieldnames or []]
        for name, n in Counter(table.fieldnames).items():
            if name and n > 1:
                raise UserError(f"{path}: two columns are called {name!r}: rename one")
        number = table.line_num + before + 1
        for row in table:
            yield f"{path}:{number}", row
            number = table.line_num + before + 1
    except csv.Error as error:
        what = f"{path}:{number}: {error}"
        raise UserError(f"{what}; close the quote, or double a quote inside text") from None


def parquet_rows(path: Path, config: DataConfig) -> Iterator[tuple]:
    """Rows of a parquet file, read batch by batch."""
    parquet = optional("pyarrow.parquet", "pyarrow")
    with library_errors(f"cannot read {path}"), open_binary(path) as file:
        batches = (batch.to_pylist() for batch in parquet.ParquetFile(file).iter_batches(256))
        for number, row in enumerate(chain.from_iterable(batches), 1):
            yield f"{path}: row {number}", row


def plain_rows(path: Path, config: DataConfig) -> Iterator[tuple]:
    """One record per file, or per text between delimiters; several from a file above PIECE.

    With --max_tokens they are short, so that little is read beyond what is needed.
    """
    size = 2 * LONG_TEXT if config.max_tokens else PIECE
    part, blocks = "part", read_text(path, BLOCK)  # blocks stay in the CPU's caches
    texts = map("".join, batched(blocks, size // BLOCK))
    if config.doc_delimiter:
        delimiter = text_from(unescape(config.doc_delimiter), "--doc_delimiter")
        part, texts = "document", documents_in(blocks, delimiter)
    first = next(texts, "")  # an empty file is a record too, skipped later
    for number, text in enumerate(chain([first], texts), 1):
        yield f"{path}: {part} {number}", {config.text_field: text}


def arrow_rows(path: Path, config: DataConfig) -> Iterator[tuple]:
    """Rows of a file written by `save_to_disk` of the `datasets` library."""
    datasets = optional("datasets")
    with library_errors(f"cannot read {path}"):
        yield from dataset_rows(datasets.Dataset.from_file(str(path)), str(path))


READERS: dict[str, Callable[[Path, DataConfig], Iterator[tuple]]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson", ".jsonlines", ".jl"), json_rows),
    **dict.fromkeys((".csv", ".tsv"), csv_rows),
    ".parquet": parquet_rows, ".arrow": arrow_rows, ".txt": plain_rows, ".md": plain_rows,
}  # fmt: skip
JSON_START = re.compile(r'\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')  # of an object, or of a list of them


def find_reader(path: Path) -> Callable | None:
    """The reader for a file, by its name and its first bytes; None if it is not a text file.

    Raises UserError if the file cannot be read, or only points to data that was not fetched.
    """
    if not path.is_file():
        return None
    with library_errors(f"cannot read {path}"):
        with open(path, "rb") as file:
            if file.read(99).startswith(b"version https://git-lfs.github.com/spec/"):
                raise UserError(f"{path} is a Git LFS pointer, not the data: run git lfs pull")
        with open_binary(path) as file:
            head = file.read(4096)
    decoder = codecs.getincrementaldecoder(encoding_of(head))  # head may end inside a character
    text = decoder("ignore").decode(head).lstrip("\ufeff")
    is_sms = ending(path) == ".tsv" and text.lstrip().partition("\t")[0] in ("ham", "spam")
    if is_sms or path.name.lower().startswith("smsspamcollection"):
        return sms_rows
    reader = READERS.get(ending(path))
    if reader in (None, plain_rows) and JSON_START.match(text):
        return json_rows
    try:
        is_text = "\0" not in decoder().decode(head)
    except UnicodeDecodeError:
        is_text = False
    return reader or (plain_rows if is_text else None)


# --- data sets of Hugging Face ---


def hub_sources(config: DataConfig, report: Report) -> list[Source]:
    """The splits of --hf_dataset, each used as its name says.

    A data set read in part is split by hash instead: its validation split might not be reached.
    """
    name, splits, sources = config.hf_dataset, hub_splits(config), []
    roles = roles_of([Path(split) for split in splits], Path("."))
    in_part = bool(config.streaming or config.max_docs or config.max_tokens)
    for split, dataset in splits.items():
        role, where = roles[Path(split)], f"{name} {split}"
        if role == "test" or (role == "val" and in_part):
            report.skip(name, f"{role} split, kept out", where)
        else:
            rows = partial(dataset_rows, dataset, where)
            sources.append(Source(name, rows, "" if in_part else role, table=name))
    return sources


def hub_splits(config: DataConfig) -> dict:
    """{split: data set} of --hf_dataset, from `datasets`. Raises UserError if loading fails."""
    datasets = optional("datasets")
    datasets.disable_progress_bars()
    name, split = config.hf_dataset, config.hf_split
    # Stream local files, as the cache of `datasets` may miss an edit; but a slice needs all rows.
    streaming = config.streaming or (bool(find_files(config)) and "[" not in split)
    try:
        if any((Path(name) / saved).exists() for saved in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(name)
            data = data[split] if split and isinstance(data, dict) else data
        else:
            data = datasets.load_dataset(
                name, config.hf_config or None, split=split or None, streaming=streaming
            )
    except Exception as error:
        what = f"cannot load dataset {name!r}: {one_line(error, 160)}"
        raise UserError(f"{what}; check its name, configuration, split and the network") from None
    return data if isinstance(data, dict) else {split or "train": data}


def dataset_rows(dataset, name: str) -> Iterator[tuple]:
    """Rows of a `datasets` object, with class names in place of class numbers."""
    features = dataset.features or {}
    classes = {column: kind for column, kind in features.items() if hasattr(kind, "int2str")}
    with library_errors(f"cannot read {name}"):
        for number, row in enumerate(dataset, 1):
            for column, kind in classes.items():
                known = row[column] is not None and row[column] >= 0
                row[column] = kind.int2str(row[column]) if known else None
            yield f"{name}: row {number}", row


# --- files and roles ---

# Files that mark a folder as a run, a model or a token store, which is not text to read.
OURS = {"best.pth", "last.pth", "best_finetune.pth", "last_finetune.pth", "train.idx",
        "model.safetensors"}  # fmt: skip


def walk(config: DataConfig) -> list[Path]:
    """All paths under --data_dir, sorted. Hidden ones are skipped; links to folders, folders with
    any of OURS and processed_dir are listed but not entered. Raises UserError if --data_dir does
    not exist or a folder cannot be read."""
    root = Path(config.data_dir)
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        raise UserError(f"--data_dir {root} does not exist: pass a file or folder with text")
    found, errors, stores = [], [], os.path.realpath(config.processed_dir)
    for name, folders, files in os.walk(root, onerror=errors.append):
        folder = Path(name)
        if folder != root and (OURS & {*files} or os.path.realpath(name) == stores):
            found.append(folder)
            folders.clear()
            continue
        folders[:] = [n for n in folders if not n.startswith(".")]
        links = [n for n in folders if (folder / n).is_symlink()]
        found += [folder / n for n in (*links, *files) if not n.startswith(".")]
    if errors:
        raise UserError(f"cannot read {errors[0].filename}: {errors[0].strerror}")
    return sorted(found)


def uses_toy_corpus(config: DataConfig) -> bool:
    """Whether to use the toy corpus: if data/raw, however it is spelled, is empty or absent."""
    is_default = os.path.abspath(config.data_dir) == os.path.abspath(DataConfig.data_dir)
    if config.hf_dataset or not is_default:
        return False
    return not os.path.lexists(config.data_dir) or walk(config) == []


def find_files(config: DataConfig) -> list[Path]:
    """Every local file that may be read. Raises UserError if --data_dir does not exist."""
    if config.hf_dataset:
        paths = sorted(Path(config.hf_dataset).rglob("*"))
    else:
        paths = [] if uses_toy_corpus(config) else walk(config)
    return [path for path in paths if path.is_file()]


def size_of_files(config: DataConfig) -> int:
    """Total size of `find_files` in bytes."""
    return sum(path.stat().st_size for path in find_files(config))


ROLE_WORDS = {
    "train": "train", "training": "train",
    "valid": "val", "validation": "val", "val": "val", "dev": "val", "eval": "val",
    "evaluation": "val", "test": "test", "testing": "test",
}  # fmt: skip


def role_in_name(name: str) -> str:
    """The role of the first of ROLE_WORDS in a name, or ""; anything but a letter ends a word."""
    said = map(ROLE_WORDS.get, re.split(r"[^a-z]+", name.lower()))
    return next(filter(None, said), "")


def roles_of(files: list[Path], root: Path) -> dict[Path, str]:
    """The role of each file by the names below `root`: train, val, test (kept out) or "" (by hash).

    The name closest to the file wins. `train` counts only next to something that validates; `val`
    and `test` count only if something else is left to train on.
    """
    named = {}  # the file or folder whose name says its role
    for file in files:
        parts = takewhile(lambda part: part != root, (file, *file.parents))
        named[file] = next((part for part in parts if role_in_name(part.name)), None)
    roles = {file: role_in_name(part.name) if part else "" for file, part in named.items()}
    validated = {named[file].parent for file, role in roles.items() if role == "val"}
    some = set(roles.values())
    nothing_trains, all_is_test = not some & {"train", ""}, some == {"test"}
    for file, role in roles.items():
        if role == "train":
            stands_alone = named[file].parent not in validated
        else:
            stands_alone = nothing_trains if role == "val" else all_is_test
        if stands_alone:
            roles[file] = ""
    return roles


def data_role(config: DataConfig) -> str:
    """The role in the name of --data_dir or a file's folder, if a sibling has its counterpart."""
    if config.hf_dataset:
        return ""
    root = Path(os.path.abspath(config.data_dir))
    for path in [root] if root.is_dir() else [root, root.parent]:
        role = role_in_name(path.name)
        with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
            beside = {role_in_name(e.name) for e in entries if e.is_dir() == path.is_dir()}
            if role and ("val" if role == "train" else "train") in beside:
                return role
    return ""


def toy_rows() -> Iterator[tuple]:
    """A few thousand generated instructions, so that every command runs without any data."""
    rng = np.random.default_rng(0)
    words = ["sun", "moon", "tree", "river", "stone", "cloud", "bird", "fish", "lamp", "book"]
    tasks = {
        "Repeat the words.": lambda text: text,
        "Reverse the order of the words.": lambda text: " ".join(reversed(text.split())),
        "Write the words in upper case.": str.upper,
        "Count the words.": lambda text: str(len(text.split())),
    }
    texts = [" ".join(rng.choice(words, rng.integers(1, 5))) for _ in range(900)]
    rows = [(task, text, answer(text)) for text in texts for task, answer in tasks.items()]
    rows += [("Add the numbers.", f"{a} + {b}", str(a + b)) for a in range(20) for b in range(20)]
    for task, text, answer in dict.fromkeys(rows):  # without repeats
        yield "toy", dict(instruction=task, input=text, output=answer)


MOST_SOURCES = 20  # nobody reads a longer table


def source_names(paths: Iterable[Path], root: Path) -> dict[Path, str]:
    """The source name of each file: its own or, if there are many, its top folder's or `root`'s."""
    names = {path: path.name for path in paths}
    if len(set(names.values())) <= MOST_SOURCES:
        return names
    whole = Path(os.path.abspath(root)).name
    names = {path: next(iter(path.relative_to(root).parts[:-1]), whole) for path in names}
    if len(set(names.values())) <= MOST_SOURCES:
        return names
    return dict.fromkeys(names, whole)


# Files that describe a data set, as the Hub and `save_to_disk` write them.
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def file_sources(config: DataConfig, report: Report) -> list[Source]:
    """The files to read, each with its reader. Raises UserError if none can be read."""
    files, left_out = walk(config), {}
    readers = {path: find_reader(path) for path in files}
    tables = [path for path, reader in readers.items() if reader not in (None, plain_rows)]
    with_tables = {folder for table in tables for folder in table.parents}
    for path, reader in readers.items():
        is_card = reader is plain_rows and path.stem.lower() in ("readme", "license")
        if path.name in ABOUT or (is_card and path.parent in with_tables):
            left_out[path] = "describes a data set"
        elif reader is None:
            left_out[path] = "not text"
    found = [path for path in files if path not in left_out]
    if not found:
        what = f"{len(files)} file(s), none readable as text" if files else "no files"
        what += "".join(f"; {path.name}: {why}" for path, why in islice(left_out.items(), 3))
        way = "add .txt, .json, .jsonl, .csv or .parquet"
        raise UserError(f"--data_dir {config.data_dir}: {what}; {way}")
    roles, whole = roles_of(found, Path(config.data_dir)), data_role(config)
    left_out |= {path: "test split, kept out" for path in found if roles[path] == "test"}
    names = source_names([*found, *left_out], Path(config.data_dir))
    for path, why in left_out.items():
        report.skip(names[path], why, str(path))
    whole = "val" if whole == "test" else whole  # test data passed by name is read, to validate
    sources = []
    for path in [path for path in found if path not in left_out]:
        read = readers[path]
        name = "sms" if read is sms_rows else names[path]
        table = "" if read in (plain_rows, sms_rows) else "instructions"
        sources.append(Source(name, partial(read, path, config), roles[path] or whole, table))
    return sources


def read_records(config: DataConfig, report: Report) -> Iterator[Record]:
    """Every record of the configured sources. Raises UserError if there is nothing to read."""
    if config.hf_dataset:
        sources = hub_sources(config, report)
    elif uses_toy_corpus(config):
        sources = [Source("toy", toy_rows)]
    else:
        sources = file_sources(config, report)
    labels = label_column(sources, config)
    for source in sources:
        found = records_of(source, labels, config, report)
        yield from join_rows(found) if config.join_rows and source.table else found


# --- duplicates and the split ---


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def utf8_blocks(text: str) -> Iterator[bytes]:
    """A text's bytes in blocks, which fit the CPU's caches."""
    for start in range(0, len(text), BLOCK):
        yield encoded(text[start : start + BLOCK])


def identify(record: Record, config: DataConfig) -> tuple[int, str, int]:
    """(identity, side, bytes), which depend on nothing but the record and the settings.

    The side is "train" or "val", or "both" for a long text, whose last part validates.
    """
    salt = config.split_seed.to_bytes(8, "little")
    hasher, size = hashlib.blake2b(digest_size=16, salt=salt), 0
    for number, turn in enumerate(record.turns):
        if number or not turn.trained:
            hasher.update(b"\0\1" if turn.trained else b"\0\2")
        for data in chain(utf8_blocks(turn.prompt), [b"\0"], utf8_blocks(turn.response)):
            hasher.update(data)
            size += len(data)
        size -= 1  # the NUL
    hasher.update(b"\0" + encoded(record.rejected))
    digest = hasher.digest()
    identity, place, side = int.from_bytes(digest[:8], "little"), digest[8:], record.split
    if config.split_by == "prompt" and not record.is_plain:
        first = encoded(record.turns[0].prompt)
        place = hashlib.blake2b(first, digest_size=16, salt=salt).digest()[8:]
    if not side and record.is_plain and size > LONG_TEXT and config.val_fraction:
        side = "both"
    elif not side:
        validates = int.from_bytes(place, "little") < int(config.val_fraction * 2**64)
        side = "val" if validates else "train"
    return identity, side, size


def split_records(
    records: Iterable[Record], config: DataConfig, report: Report, pairs: bool = False
) -> Iterator[tuple[Record, str, int]]:
    """Records without duplicates, each with its side of the split and its size in bytes.

    A lone plain text is split like a long one. With --keep_duplicates a record is dropped only if
    it is on the other side of the split too.
    """
    sides: dict[int, str] = {}  # identity -> side; about 110 bytes each
    waiting: tuple[Record, str, int] | None = None  # the first short plain text, until a second
    n_plain = 0
    for record in records:
        report.count(record.source, "records")
        identity, side, size = identify(record, config)
        text = record.turns[-1].response
        known = sides.get(identity)
        why = ""
        if size == 0 or (record.is_plain and len(text.strip()) < config.min_chars):
            why = "short or empty"
        elif pairs and record.rejected in ("", text):
            why = "no preference"
        elif known and not (config.keep_duplicates and known == side):
            why = "duplicate"
        if why:
            report.skip(record.source, why, record.where)
            continue
        sides[identity] = side
        if record.is_plain and "<|endoftext|>" in text[:BLOCK]:
            what = "<|endoftext|> read as plain text (--doc_delimiter '<|endoftext|>' cuts there)"
            report.count(record.source, what, where=record.where)
        n_plain += record.is_plain
        if record.is_plain and n_plain == 1 and side != "both" and not record.split:
            waiting = record, side, size
            continue
        if record.is_plain and waiting:
            yield waiting
            waiting = None
        yield record, side, size
    if waiting:
        yield waiting[0], "both" if config.val_fraction else "train", waiting[2]


# --- pieces of text and their ids ---


def corpus_records(
    config: DataConfig, report: Report, pairs: bool = False
) -> Iterator[tuple[Record, str]]:
    """Every record to keep, up to --max_docs, with its split: "train" or "val".

    A text on both sides becomes two records; so does a preference pair under `pairs`.
    """
    found = split_records(read_records(config, report), config, report, pairs)
    for record, side, size in islice(found, config.max_docs or None):
        if side == "both":
            text, n_bytes = record.turns[0].response, math.ceil(size * config.val_fraction)
            tail = np.frombuffer(encoded(text[-n_bytes:])[-n_bytes:], np.uint8)
            cut = len(text) - np.count_nonzero(tail & 0xC0 != 0x80)  # characters that start there
            # Validation comes first, since --max_tokens may end the reading in between.
            for split, part in (("val", text[cut:]), ("train", text[:cut])):
                if part:
                    yield replace(record, turns=[Turn("", part)]), split
        else:
            for each in as_pair(record) if pairs else [record]:
                yield each, side


def as_pair(record: Record) -> list[Record]:
    """A preference record as two, chosen and rejected; only the last answer of each is trained."""
    context = [replace(turn, trained=False) for turn in record.turns[:-1]]
    chosen, rejected = record.turns[-1], replace(record.turns[-1], response=record.rejected)
    return [replace(record, turns=[*context, last]) for last in (chosen, rejected)]


def record_texts(record: Record, whole: bool = False) -> list[str]:
    """The texts to encode: prompts and responses, or plain text in blocks.

    whole: plain text in one piece, and each response with the prompt before it, as in chats.
    """
    if record.is_plain:
        text = record.turns[0].response
        return [text] if whole else list(safe_blocks(text))
    texts = [text for turn in record.turns for text in (turn.prompt, turn.response)]
    if whole:
        texts[1::2] = [turn.prompt + turn.response for turn in record.turns]
    return texts


# GPT-2 and similar tokenizers start a new word at a space between letters and at punctuation after
# a letter (for languages without spaces), whatever the text further away.
SAFE_CUT = re.compile(r"[^\W\d_](?= [^\W\d_])|[^\W\d_](?=[.,;:!?。，、；：！？])")


def safe_blocks(text: str) -> Iterator[str]:
    """A text in blocks; if `tokenizer.cuts_safely`, the ids do not depend on the cuts."""
    start = 0
    while cut := SAFE_CUT.search(text, start + BLOCK):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def encode_records(
    records: Iterable[tuple[Record, str]], tokenizer: Tokenizer, ahead: int
) -> Iterator[tuple[Record, str, list[tuple]]]:
    """Each record and its side, with the ids of its turns: (prompt, response), (n,) each; for plain
    text, (empty, block, block, ...).

    ahead: characters to encode at a time. Raises UserError if a response changes the ids of the
    prompt before it, which in a chat is encoded alone.
    """
    whole = not tokenizer.cuts_safely
    for batch in batched(records, 2**16, lambda item: item[0].n_characters, ahead):
        texts = [record_texts(record, whole) for record, _ in batch]
        ids, end = [], 0
        for some in batched(chain.from_iterable(texts), 2**16, len, 128 * BLOCK):
            ids += tokenizer.encode_batch(some)
        for (record, side), each in zip(batch, texts, strict=True):
            found, end = ids[end : end + len(each)], end + len(each)
            if record.is_plain:
                yield record, side, [(found[0][:0], *found)]
                continue
            turns = list(zip(found[::2], found[1::2], strict=True))
            for n, (prompt, both) in enumerate(turns if whole else ()):
                if not np.array_equal(both[: len(prompt)], prompt):
                    what = "this tokenizer encodes a prompt differently with an answer after it"
                    raise UserError(f"{what}: choose another --tokenizer for instructions")
                turns[n] = prompt, both[len(prompt) :]
            yield record, side, turns


class TokenBlocks(IterableDataset):
    """Blocks of `block_size` ids from any iterator of texts, for your own DataLoader.

    The ids of all texts are joined, without special tokens, and cut; the remainder is dropped. A
    block is {"input_ids", "labels", "attention_mask"}, (block_size,) int64 each, for Hugging Face
    models, which shift the labels themselves. Each worker takes its share of the texts.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer, block_size: int = 256):
        self.texts, self.tokenizer, self.block_size = texts, tokenizer, block_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker, held = get_worker_info(), np.empty(0, np.int64)
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for text in islice(self.texts, first, None, step):
            held = np.concatenate([held, self.tokenizer.encode(text)], dtype=np.int64)
            end = len(held) // self.block_size * self.block_size
            for ids in torch.from_numpy(held[:end]).view(-1, self.block_size):
                mask = torch.ones_like(ids)
                yield {"input_ids": ids.clone(), "labels": ids.clone(), "attention_mask": mask}
            held = held[end:]


# --- the writer ---

# One row per answer, trained or not, and per plain text, in the order of the tokens.
INDEX = np.dtype([
    ("start", "<u8"),  # of the record
    ("length", "<u8"),  # from there to the end of this answer, sep included
    ("prompt", "<u4"),  # tokens before the answer; of plain text: 1 with a bos, else 0
    ("source", "<u2"),  # number of the source
    ("trained", "u1"),  # 0: only context, never a target
    ("last", "u1"),  # 1: the record's last row, which covers all of it
])  # fmt: skip
TOKEN_FILES = ("train.bin", "train.idx", "val.bin", "val.idx")


class StoreWriter:
    """Appends records: bos, then each turn's prompt, response and sep; or bos, plain text and eos.
    --no_add_special_tokens leaves out the bos and eos of plain text."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, config: DataConfig):
        self.folder, self.tokenizer, self.config = folder, tokenizer, config
        self.report = Report()
        self.size = {"train": 0, "val": 0}  # tokens
        self.sources: dict[str, int] = {}
        self.lengths = Counter()  # {tokens: records}
        self.files = {name: open(folder / name, "wb") for name in TOKEN_FILES}

    def write(self, record: Record, split: str, ids: list[tuple[np.ndarray, ...]]) -> None:
        """ids: those of each turn, from `encode_records`."""
        tokenizer, counts = self.tokenizer, self.report.rows[record.source]
        special, end = self.config.add_special_tokens or not record.is_plain, [tokenizer.sep_id]
        if record.is_plain:
            end = [tokenizer.eos_id] if special else []
        parts, rows = [tokenizer.prefix if special else []], []
        number = self.sources.setdefault(record.source, len(self.sources))
        length = len(parts[0])
        for turn, (prompt, *response) in zip(record.turns, ids, strict=True):
            parts += [prompt, *response, end]
            before = length + len(prompt)
            length = before + sum(map(len, response)) + len(end)
            last = turn is record.turns[-1]
            rows.append((self.size[split], length, before, number, turn.trained, last))
            size, answer = (sum(map(len, utf8_blocks(t))) for t in (turn.prompt, turn.response))
            counts["bytes"] += size + answer
            counts[f"{split}_bytes"] += size + (answer if turn.trained else 0)
            if tokenizer.unk_id is not None:
                unknown = np.concatenate([prompt, *response]) == tokenizer.unk_id
                if unknown.any():
                    counts["unknown_tokens"] += int(unknown.sum())
        data = np.concatenate(parts, dtype=id_dtype(tokenizer), casting="unsafe")
        self.files[f"{split}.bin"].write(data)
        self.files[f"{split}.idx"].write(np.array(rows, INDEX))
        self.size[split] += length
        self.lengths[length] += 1
        counts[split] += 1
        counts[f"{split}_tokens"] += length


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")


def tokens_needed(config: DataConfig) -> int:
    """Training tokens that a run reads from a stream (0: all, or up to the limits that are set)."""
    limited = config.max_tokens or config.max_docs or not config.streaming
    steps = 0 if limited else getattr(config, "max_steps", 0)
    return steps and steps * config.batch_size * (config.block_size or 1024) + 1


def content_digest(path: Path, kind: str = "blake2b") -> str:
    digest = hashlib.sha256() if kind == "sha256" else hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while data := file.read(2**22):
            digest.update(data)
    return digest.hexdigest()


# --- the store ---

STORE_FORMAT = "llm_pipeline.store.3"


class TokenStore:
    """A prepared corpus on disk, memory-mapped.

    tokens: {split: (n,) ids}. index: {split: (rows,) of INDEX}. meta: meta.json, with "counts" per
    source: records, train, val, train_tokens, val_tokens; train_bytes and val_bytes, UTF-8 bytes of
    the scored text; bytes, of all text; unknown_tokens; and what was skipped.
    """

    def __init__(self, folder: Path):
        """Raises UserError if the folder does not hold a complete store of this version."""
        self.folder = folder = Path(folder)
        try:
            self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if self.meta["format"] != STORE_FORMAT:
                raise ValueError(f"its format {self.meta['format']!r} is not {STORE_FORMAT}")
            self.tokenizer = tokenizer_from_spec(self.meta["tokenizer"])
            self.sources: list[str] = self.meta["sources"]
            self.fingerprint: str = self.meta["fingerprint"]
            kind = id_dtype(self.tokenizer)
            self.tokens = {split: self.map(f"{split}.bin", kind) for split in ("train", "val")}
            self.index = {split: self.map(f"{split}.idx", INDEX) for split in ("train", "val")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{folder} is not a usable token store ({one_line(error)})"
            raise UserError(f"{what}; delete it and run prepare again") from None

    def map(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Map a file after checking its size and, up to 64 MiB, its digest."""
        path, stated = self.folder / name, self.meta["files"][name]
        size = path.stat().st_size
        if size != stated["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes, not {stated['bytes']:,}")
        if size <= 64 * 2**20 and content_digest(path) != stated["blake2b"]:
            raise ValueError(f"{name} has changed since it was written")
        return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)  # 0 bytes have no map

    def whole_records(self, split: str) -> np.ndarray:
        """Numbers of the rows that cover a whole record, (records,)."""
        return np.flatnonzero(self.index[split]["last"])

    def masked(self, split: str) -> np.ndarray:
        """[start, end) of every answer that is never a target, (n, 2) int64, in order."""
        rows = self.index[split][self.index[split]["trained"] == 0]
        start = rows["start"].astype(np.int64)
        return np.stack([start + rows["prompt"], start + rows["length"].astype(np.int64)], axis=1)

    def ids(self, split: str, start: int, length: int) -> np.ndarray:
        """(length,) int64 ids from `start` on."""
        return self.tokens[split][start : start + length].astype(np.int64)


# --- finding or building the store ---

# Settings that say where data and stores are, not what is in them.
PLACES = ("data_dir", "processed_dir", "streaming", "hf_dataset", "hf_config", "hf_split")


def store_key(config: DataConfig, tokenizer: dict, pairs: bool) -> str:
    """Fingerprint of all that decides what a store holds; its folder's name ends with it.

    tokenizer: its spec, or the settings of one yet to be trained.
    """
    stats = [(path, path.stat()) for path in find_files(config)]
    files = [[str(path.absolute()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    if not config.hf_dataset:
        files.append(os.path.abspath(config.data_dir))  # its name may be that of a split
    settings = {f.name: getattr(config, f.name) for f in fields(DataConfig)}
    for name in ("data_dir", "processed_dir", "streaming"):
        del settings[name]
    code = [corpus_code(), {ending: reader.__qualname__ for ending, reader in READERS.items()}]
    need = tokens_needed(config)
    return short_hash([STORE_FORMAT, code, files, settings, tokenizer, pairs, need], 8)


@lru_cache
def corpus_code() -> str:
    """The sections of this file that turn files into tokens: after an edit, stores are rebuilt."""
    parts = re.split(r"^# (\d+)\. ", Path(__file__).read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return sections["1"] + sections["10"] + sections["11"]


def is_store(data_dir: str) -> bool:
    """Whether a folder is a store made earlier."""
    return all((Path(data_dir) / name).is_file() for name in ("meta.json", "train.bin"))


def build_corpus_from_sources(
    data_dir: str | os.PathLike = "data/raw",
    tokenizer: Tokenizer | str | None = None,
    *,
    folder: Path | None = None,
    pairs: bool = False,
    config: DataConfig | None = None,
    **settings,
) -> TokenStore:
    """The token store of a folder, file or --hf_dataset: opened if it exists, else built.

    tokenizer: the one to use, or a value of --tokenizer (bytes by default).
    folder: where the store goes; by default a folder in processed_dir, named by its fingerprint.
    pairs: keep only preference records, chosen and rejected one after the other.
    settings: those of `prepare`, by name; a command passes its own as `config`.
    Raises UserError if there is nothing to read, or a file is damaged.
    """
    if isinstance(tokenizer, str):
        settings, tokenizer = settings | {"tokenizer": tokenizer}, None
    if config is None:
        config = settle(PrepareConfig, {"data_dir": data_dir} | settings)
    if not config.hf_dataset and is_store(config.data_dir):
        store = TokenStore(Path(config.data_dir))
        adopt(config, store, tokenizer, pairs)
    else:
        if uses_toy_corpus(config):
            note(f"no data in {config.data_dir}: using the built-in toy corpus")
        tokenizer = tokenizer or corpus_tokenizer(config, pairs)
        key = store_key(config, tokenizer.spec(), pairs)
        label = Path(config.hf_dataset or os.path.abspath(config.data_dir)).name[:40] or "data"
        folder = folder or Path(config.processed_dir) / f"{label}-{key}"
        with run_lock(folder.parent, f".{folder.name}.lock", wait=True):
            if not is_store(folder):
                with write_beside(folder) as new:
                    write_store(config, tokenizer, new, key, pairs)
        store = TokenStore(folder)
        if store.meta.get("key") != key:
            what = f"{folder} holds a store of other data or settings"
            raise UserError(f"{what}: remove it, or choose another folder")
    rows = store.meta["counts"].items()
    parts = [(name, row.get("train", 0), row.get("val", 0)) for name, row in rows]
    parts = [f"{name} ({n:,} + {m:,} val records)" for name, n, m in parts if n + m]
    note(f"{store.folder} holds {', '.join(parts)}")
    return store


def corpus_tokenizer(config: DataConfig, pairs: bool) -> Tokenizer:
    """The tokenizer that the settings name. A BPE is trained once per request and kept."""
    if config.tokenizer != "bpe":
        return load_tokenizer(config.tokenizer)
    asked = {f.name: getattr(config, f.name) for f in fields(TokenizerConfig)}
    file = Path(config.processed_dir) / f"bpe-{store_key(config, asked, pairs)}.json"
    with run_lock(file.parent, f".{file.name}.lock", wait=True):
        if not file.is_file():
            records = corpus_records(config, Report(), pairs)
            texts = (
                t for record, split in records if split == "train" for t in record_texts(record)
            )
            if need := tokens_needed(config) or config.max_tokens:
                texts = first_characters(texts, 4 * need)  # about as much as will be read
            write_json(file, train_bpe(texts, config).spec())
    return tokenizer_from_spec(read_table(file, str(file)))


def first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts until they total `limit` characters."""
    for text in texts:
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def adopt(config: DataConfig, store: TokenStore, tokenizer: Tokenizer | None, pairs: bool) -> None:
    """The command takes over the store's settings. Raises UserError if it asked for others."""
    if tokenizer is not None and tokenizer.spec() != store.tokenizer.spec():
        raise UserError(f"{store.folder} was prepared with another tokenizer: pass the raw data")
    if pairs != store.meta["pairs"]:
        what = "no preference pairs" if pairs else "preference pairs, rejected answers too"
        raise UserError(f"{store.folder} holds {what}: pass the raw data")
    for name, value in store.meta["settings"].items():
        if name in PLACES or not hasattr(config, name):
            continue
        asked = getattr(config, name)
        if name in config.explicit and value != asked:
            what = f"{store.folder} was prepared with --{name} {value}, not {asked}"
            raise UserError(f"{what}: prepare another store, or pass the raw data")
        setattr(config, name, value)


def write_store(
    config: DataConfig, tokenizer: Tokenizer, folder: Path, key: str, pairs: bool
) -> None:
    """Read every record and write a complete store. Raises UserError if no record is left."""
    writer, spec, started = StoreWriter(folder, tokenizer, config), tokenizer.spec(), time.time()
    total, limit, need = size_of_files(config), config.max_tokens, tokens_needed(config)
    ahead = BLOCK if limit or need else 64 * BLOCK  # with a limit, read little beyond it
    records, full = corpus_records(config, writer.report, pairs), False
    with tqdm(desc="tokenizing", total=total or None, unit="B", unit_scale=True) as bar:
        for record, split, ids in encode_records(records, tokenizer, ahead):
            writer.write(record, split, ids)
            bar.update(record.n_characters)
            full = 0 < limit <= sum(writer.size.values()) or 0 < need <= writer.size["train"]
            if full and not (pairs and writer.lengths.total() % 2):
                note("enough tokens: the text read beyond them is dropped")
                break
    for line in writer.report.lines():
        note(line)
    if not any(writer.size.values()):
        hint = " (preference pairs need chosen and rejected)" if pairs else ""
        raise UserError(f"no usable records in {config.hf_dataset or config.data_dir}{hint}")
    if config.val_fraction and 0 in writer.size.values() and not data_role(config):
        what, way = "the hashes put all records on one side of the split", "add data, name files "
        way += "train or valid, or, if all share one prompt, pass --split_by content"
        if full:
            what, way = "little text was read", "raise --max_tokens or --max_steps"
        missing = "validates" if writer.size["train"] else "trains"
        note(f"{what}, so none {missing}: {way}")
    files = {}
    for name, file in writer.files.items():
        file.close()
        path = folder / name
        files[name] = {"bytes": path.stat().st_size, "blake2b": content_digest(path)}
    if "json" in spec:
        (folder / "tokenizer.json").write_text(spec["json"], encoding="utf-8")
    names = [f.name for kind in (DataConfig, TokenizerConfig) for f in fields(kind)]
    meta = {
        "format": STORE_FORMAT,
        "key": key,
        "fingerprint": short_hash([files, spec], 16),
        "settings": {name: getattr(config, name) for name in names if hasattr(config, name)},
        "pairs": pairs,
        "tokenizer": spec,
        "seconds": {"encoding": time.time() - started},
        "source_bytes": total,
        "files": files,
        "sources": list(writer.sources),
        "counts": writer.report.rows,
        "tokens": writer.size,
        "lengths": {str(n_tokens): n for n_tokens, n in sorted(writer.lengths.items())},
    }
    write_json(folder / "meta.json", meta)


# ====================================================================================
# 12. Checkpoints
#
# One file: weights, optimizer, progress, settings and tokenizer, as plain types and tensors only,
# with a checksum. `open_run` is the only way into a run's folder: lock it, look, then work.
#
#     >>> lp.load_checkpoint("ckpts/last.pth")["progress"]["step"]
# ====================================================================================

CHECKPOINT_FORMAT = "llm_pipeline.checkpoint.4"
# A zip file, such as PyTorch's, may end in a comment after its two-byte length: ours is a checksum.
SEAL = (7 + 32).to_bytes(2, "little") + b"sha256:"


def sealed(content: np.ndarray) -> bytes:
    """The seal that follows these bytes in the file."""
    return SEAL + hashlib.sha256(content).digest()


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` atomically, followed by a checksum: PyTorch verifies none on reading."""
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides a failed write behind its own error
            raise OSError(0, f"the disk may be full: {one_line(error, 80)}") from None
        file.flush()
        seal = sealed(np.memmap(file, np.uint8, "r")[:-2])
        file.seek(-2, os.SEEK_END)  # over the length of the empty comment
        file.write(seal)


def load_checkpoint(path: str | Path) -> dict:
    """Check the checksum, then load safely. Raises UserError if the file is damaged or not ours."""
    path = Path(path)
    if not path.is_file():  # opening a pipe would block
        raise UserError(f"no checkpoint at {path}: train a model first, or give another path")
    try:
        content, size = np.memmap(path, np.uint8, "r"), len(SEAL) + 32
        if content[-size:].tobytes() != sealed(content[:-size]):
            raise ValueError("its checksum is wrong, so it is damaged or not of this program")
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["format"]
    except Exception as error:  # a damaged pickle can raise anything
        unsafe = isinstance(error, pickle.UnpicklingError)
        why = "it holds more than plain data" if unsafe else one_line(error, 120)
        why = f"is not a usable checkpoint: {why}"
        raise UserError(f"{path} {why}; use another, such as last.pth or best.pth") from None
    if version != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is from another version of this program ({version}): train again")
    return state


# --- the model in a checkpoint ---


class WithoutNumbers(TorchFunctionMode):
    """Skips random initialisation: the meta device holds no numbers, but `normal_` would import
    torch's compiler, which takes two seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == "normal_":  # a tensor's, or torch.nn.init's
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def shape_of_model(config: GPTConfig) -> GPT:
    """A model whose tensors have shapes but no memory."""
    with torch.device("meta"), WithoutNumbers():
        return GPT(config)


def build_model(config: GPTConfig, weights: dict[str, Tensor], lora: dict | None = None) -> GPT:
    """The model with these weights, not copied. Raises UserError naming any that do not fit."""
    model = shape_of_model(config)
    if lora:
        with torch.device("meta"):
            add_lora(model, lora)
    if config.tie_weights and "tok_emb.weight" in weights:
        weights = weights | {"head.weight": weights["tok_emb.weight"]}
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit: {one_line(error, 300)}") from None
    if config.tie_weights:
        model.head.weight = model.tok_emb.weight
    return model


def restored(state: dict) -> Loaded:
    """The model and tokenizer of a checkpoint. Takes the weights out of `state`."""
    shape = GPTConfig(**state["model_config"])
    model = build_model(shape, state.pop("weights"), state.get("lora"))
    return Loaded(model, tokenizer_from_spec(state["tokenizer"]), state)


def model_weights(model: GPT) -> dict[str, Tensor]:
    """Each weight once, by name, unsharded and on the CPU."""
    state = model.state_dict()  # puts FSDP's shards back in place
    return {name: gather(state[name]) for name, _ in model.named_parameters()}


def weights_digest(model: GPT) -> str:
    """A hash that identifies these weights, however they were stored."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model_weights(model).items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        hasher.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


# --- the run in a checkpoint ---


def load_optimizer_state(model: GPT, optimizers: list, saved: dict) -> None:
    """Put back the optimizer state that `save_run` stored."""
    names = {p: n for n, p in model.named_parameters()}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            for key, value in saved.get(names[p], {}).items():
                if key == "step":  # AdamW keeps it on the parameter's device on CUDA only
                    value = value.to(p.device) if p.device.type == "cuda" else value
                else:
                    value = distribute_like(value.to(p.device, p.dtype), p)
                optimizer.state[p][key] = value


def save_run(run: Run, about: dict, path: Path) -> None:
    """Write a checkpoint of the run. All processes gather; the first one writes."""
    weights = model_weights(run.model)  # first, since it puts FSDP's shards back in place
    names = {p: n for n, p in run.model.named_parameters()}
    moments = {
        names[p]: {key: gather(torch.as_tensor(value)) for key, value in state.items()}
        for optimizer in run.optimizers
        for p, state in optimizer.state.items()
    }
    state = about | {
        "format": CHECKPOINT_FORMAT,
        "weights": weights,
        "optimizer": moments,
        "scaler": run.scaler.state_dict(),
        "progress": asdict(run.progress),
    }
    if run.rt.is_main:
        save_checkpoint(path, state)
    if run.rt.world_size > 1:
        dist.barrier()


def describe_run(config: FitConfig, rt: Runtime, loaded: Loaded, store) -> dict:
    """What a checkpoint records about its origin: settings, tokenizer, base, data, versions."""
    stored = [f.name for f in fields(config) if f.metadata["resume"] != "session_only"]
    return {
        "command": "finetune" if isinstance(config, FinetuneConfig) else "train",
        "config": {name: getattr(config, name) for name in stored},
        "model_config": asdict(loaded.model.config),
        "tokenizer": loaded.tokenizer.spec(),
        **{name: loaded.state.get(name) for name in ("lora", "base")},
        "data": {"fingerprint": store.fingerprint},
        "versions": {
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "device": rt.device.type,
            "dtype": str(rt.dtype),
            "threads": torch.get_num_threads(),
            "world_size": rt.world_size,
        },
    }


def check_drift(resumed: dict, about: dict) -> None:
    """Refuse to resume with another base or other data; warn of what may change rounding."""
    if resumed["base"] != about["base"]:
        raise UserError("the run began from another base: pass that one with --ckpt")
    if resumed["data"] != about["data"]:
        raise UserError("the data has changed: restore it, or use another --out_dir")
    for name, value in about["versions"].items():
        if (before := resumed["versions"][name]) != value:
            note(f"warning: {name} was {before}, now {value}: results may differ in the last bits")


# --- the folder of a run ---

RUN_FILES = ("last.pth", "best.pth", "config.json", "metrics.csv")


@dataclass
class RunFolder:
    """The folder of a run, locked for this process. A finetune's files carry a suffix, so that they
    can share the folder of its base."""

    path: Path
    suffix: str = ""
    state: dict | None = None  # the last.pth that a resumed run continues from
    about: dict | None = None  # what checkpoints record besides weights, moments and progress

    @property
    def start_flag(self) -> str:
        """The flag that starts a new run of this kind from a checkpoint's weights."""
        return "--ckpt" if self.suffix else "--init_from"

    def file(self, name: str) -> Path:
        return self.path / name.replace(".", f"{self.suffix}.")


def state_to_resume(folder: RunFolder, config: FitConfig) -> dict | None:
    """last.pth's state if --resume finds one, else None, for a new run. Raises UserError rather
    than lose a file that no run wrote or, without --overwrite, another run."""
    last = folder.file("last.pth")
    there = [folder.file(name) for name in RUN_FILES if folder.file(name).exists()]
    if config.resume and last.exists():
        state = load_checkpoint(last)
        if (state["command"] == "finetune") != bool(folder.suffix):
            raise UserError(f"{last} belongs to {state['command']}: choose another --out_dir")
        return state
    saved = [path for path in there if path.suffix == ".pth"]
    for path in saved:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - len(SEAL) - 32))
            if not file.read().startswith(SEAL):
                raise UserError(f"{path} was not written by a run: use another --out_dir")
    if saved and config.resume:
        ways = f"use {folder.start_flag} {saved[0]} and another --out_dir, or --overwrite"
        raise UserError(f"there is no {last.name} to resume: {ways}")
    if config.resume:
        if not config.explicit - {"resume", "out_dir", "debug"}:
            raise UserError(f"{folder.path} holds no run to resume: choose another --out_dir")
        note(f"--resume: {folder.path} holds no run, so a new one starts there from step 0")
    elif there and not config.overwrite:
        ways = "use --resume, --overwrite" if last in saved else "use --overwrite"
        what = f"{folder.path} holds {there[0].name}"
        raise UserError(f"{what}: {ways} or another --out_dir")
    return None


@contextlib.contextmanager
def open_run(config: FitConfig) -> Iterator[RunFolder]:
    """Lock a run's folder, then inspect it. All processes of a run share the lock of the first."""
    suffix = "_finetune" if isinstance(config, FinetuneConfig) else ""
    if config.overfit_batch:  # a sanity check that keeps nothing
        with tempfile.TemporaryDirectory() as nowhere:
            yield RunFolder(Path(nowhere), suffix)
        return
    folder = RunFolder(Path(config.out_dir), suffix)
    with run_lock(folder.path) if is_main() else contextlib.nullcontext():
        if is_main():
            for name in RUN_FILES:  # temporary files that killed runs left
                for path in folder.path.glob(f"*.{folder.file(name).name}.[0-9]*.tmp"):
                    path.unlink(missing_ok=True)
        folder.state = state_to_resume(folder, config)
        yield folder


# ====================================================================================
# 13. Interchange
#
# Models from and for Hugging Face, through transformers' own objects; LoRA, through peft; GGUF for
# llama.cpp. Look at the two tables of names and at `check_logits`: a model from or for Hugging Face
# must compute what transformers' own model computes, or it is refused.
# ====================================================================================

HF_ARCHS = {"gpt2": "gpt2", "qwen3": "modern"}  # model_type: our name in ARCHS
# Our setting: transformers' name. GPT2Config has older names, but accepts these as well.
COMMON_SETTINGS = {
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
}  # fmt: skip
HF_SETTINGS = {
    "gpt2": COMMON_SETTINGS | {
        "n_inner": "n_inner", "norm_eps": "layer_norm_epsilon", "dropout": "resid_pdrop",
    },
    "qwen3": COMMON_SETTINGS | {
        "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
        "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps",
    },
}  # fmt: skip
# Our module: theirs. The rows of several, stacked, make one of ours.
HF_MODULES = {
    "gpt2": {
        "blocks": "transformer.h", "tok_emb": "transformer.wte", "positions": "transformer.wpe",
        "norm_f": "transformer.ln_f", "head": "lm_head",
        "norm1": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj",
        "norm2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
    },
    "qwen3": {
        "blocks": "model.layers", "tok_emb": "model.embed_tokens", "norm_f": "model.norm",
        "head": "lm_head", "norm1": "input_layernorm", "attn.proj": "self_attn.o_proj",
        "attn.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
        "norm2": "post_attention_layernorm",
        "mlp.up": "mlp.gate_proj mlp.up_proj", "mlp.down": "mlp.down_proj",
    },
}  # fmt: skip
GPT2_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh",
                    "gelu_new": "gelu_tanh"}  # fmt: skip


def transformers_library():
    """transformers, with its warnings and progress bars silenced."""
    library = optional("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return library


# --- shapes and names ---


def hf_kind(c: GPTConfig) -> str:
    """The model_type nearest to this shape; `hf_config` checks that it can express the shape."""
    return "qwen3" if c.pos == "rope" else "gpt2"


def hf_config(c: GPTConfig):
    """transformers' config of this shape. Raises UserError naming what no config can express."""
    kind = hf_kind(c)
    shape = {theirs: getattr(c, ours) for ours, theirs in HF_SETTINGS[kind].items()}
    if kind == "gpt2":
        activation = {ours: theirs for theirs, ours in GPT2_ACTIVATIONS.items()}.get(c.mlp, "relu")
        shape |= dict(embd_pdrop=c.dropout, attn_pdrop=c.dropout, activation_function=activation)
    else:
        rope = {"rope_type": "default", "rope_theta": c.rope_theta}
        shape |= dict(rope_parameters=rope, layer_types=["full_attention"] * c.n_layer)
    shape |= {"tie_word_embeddings": c.tie_weights, "dtype": "float32"}
    config = transformers_library().AutoConfig.for_model(kind, **shape)
    if kind == "qwen3":
        config.rope_theta = c.rope_theta  # where transformers 4 reads it
    held, names = hf_shape(config), (*ARCHS[HF_ARCHS[kind]], "n_kv_head", "head_dim")
    if odd := [name for name in names if getattr(c, name) != getattr(held, name)]:
        what = ", ".join(f"{name}={getattr(c, name)}" for name in odd)
        raise UserError(f"no Hugging Face class combines {what} with the rest of {HF_ARCHS[kind]}")
    return config


def hf_shape(hf) -> GPTConfig:
    """Our shape of a transformers config. Raises UserError for what a test of 64 ids might miss."""
    names, arch = HF_SETTINGS[hf.model_type], HF_ARCHS[hf.model_type]
    shape = ARCHS[arch] | {ours: getattr(hf, theirs) for ours, theirs in names.items()}
    if hf.model_type == "gpt2":
        if hf.activation_function not in GPT2_ACTIVATIONS:
            raise UserError(f"activation_function {hf.activation_function!r} is not supported")
        shape |= {"mlp": GPT2_ACTIVATIONS[hf.activation_function], "n_inner": hf.n_inner or 0}
    else:
        rope = hf.rope_parameters
        if rope["rope_type"] != "default":
            raise UserError(f"rope_type {rope['rope_type']!r} is not supported, only 'default'")
        if set(hf.layer_types) != {"full_attention"}:
            raise UserError("sliding-attention layers are not supported")
        shape |= {"rope_theta": float(rope["rope_theta"]), "dropout": 0.0}
    return GPTConfig(**shape)


@dataclass
class TensorRow:
    """One of our tensors, and those of theirs whose rows make it up."""

    ours: str
    theirs: list[str]
    rows: list[int]  # how many each of theirs has
    transposed: bool  # theirs is (in, out), as in GPT-2's Conv1D


def tensor_rows(c: GPTConfig) -> Iterator[TensorRow]:
    """Each tensor of a model of this shape, under both names."""
    modules, is_gpt2 = HF_MODULES[hf_kind(c)], hf_kind(c) == "gpt2"
    for ours, tensor in shape_of_model(c).named_parameters():
        i, module, end = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", ours).groups()
        start = f"{modules['blocks']}.{i}." if i else ""
        theirs = [f"{start}{name}{end or '.weight'}" for name in modules[module].split()]
        rows = fused_rows(c)[module] if len(theirs) > 1 else [len(tensor)]
        yield TensorRow(ours, theirs, rows, is_gpt2 and bool(i) and tensor.ndim == 2)


def to_hf(weights: dict[str, Tensor], c: GPTConfig, conv1d: bool = True) -> dict[str, Tensor]:
    """Our tensors under their names. Without `conv1d`, no matrix is transposed."""
    tensors = {}
    for row in tensor_rows(c):
        for name, part in zip(row.theirs, weights[row.ours].split(row.rows), strict=True):
            tensors[name] = (part.T if row.transposed and conv1d else part).contiguous()
    return tensors


def to_peer(model: GPT):
    """transformers' model with our weights. Raises UserError if no class can hold them."""
    peer = transformers_library().AutoModelForCausalLM.from_config(hf_config(model.config))
    weights = to_hf(model_weights(model), model.config)
    peer.load_state_dict(weights, strict=False, assign=True)
    peer.tie_weights()
    return peer


def check_logits(peer, model: GPT) -> None:
    """Raise UserError unless both models' logits for 64 ids agree, to 1e-4 of the largest."""
    length = min(64, model.config.block_size)
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(model.config.vocab_size, (1, length), generator=draw)
    with torch.no_grad():
        theirs, ours = peer.float().eval()(x).logits, model.cpu().float().eval()(x)[0]
    gap, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not gap <= 1e-4 * scale:  # NaN fails too
        what = f"its logits differ by {gap:.1e} of {scale:.1e}"
        raise UserError(f"{type(peer).__name__} does not compute what our model does: {what}")
    note(f"logits agree with {type(peer).__name__} to {gap:.1e} of {scale:.1e}")


# --- imports ---

OLD_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, in GPT-2 files


def hf_folder(name: str, patterns: list[str]) -> Path:
    """This folder, or the one that these files are downloaded to from the Hub. Raises UserError."""
    if Path(name).is_dir():
        return Path(name)
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        why = f"no such file or folder, and the Hub download failed ({one_line(error, 90)})"
        raise UserError(f"{name}: {why}; pass a local one") from None


def hf_model(folder: Path):
    """transformers' own model of a folder, in float32; a peft adapter is merged into its base.

    Raises UserError for what transformers would silently accept.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError("no .safetensors file; other formats, such as pickles, can run code")
    for file in files:  # transformers would take integers for weights
        with optional("safetensors").safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if not name.endswith(OLD_BUFFERS)]  # noqa: SIM118
            kinds = {opened.get_slice(name).get_dtype() for name in names}
        if odd := kinds - {"F64", "F32", "F16", "BF16"}:
            raise UserError(f"weights stored as {min(odd)}: quantised models are not supported")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        about = read_table(folder / "adapter_config.json", "adapter_config.json")
        base = about.get("base_model_name_or_path")
        if not base:
            raise UserError("the adapter names no base (base_model_name_or_path)")
        peer = hf_model(hf_folder(str(base), MODEL_FILES))
        return optional("peft").PeftModel.from_pretrained(peer, folder).merge_and_unload()
    kind = read_table(folder / "config.json", "config.json").get("model_type")
    if kind not in HF_ARCHS:
        raise UserError(f"model_type {kind!r} is not one of {', '.join(HF_ARCHS)}")
    peer, found = transformers_library().AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
        trust_remote_code=False, ignore_mismatched_sizes=True,  # reported below, by name
    )  # fmt: skip
    for kind, tensors in found.items():  # missing, unexpected, mismatched
        names = [name for name in map(str, tensors) if not name.endswith(OLD_BUFFERS)]
        if names:
            raise UserError(f"its tensors do not fit its config.json: {kind} {min(names)}")
    return peer


def load_hf(name: str) -> Loaded:
    """GPT-2 or Qwen3, from a folder, a peft adapter or the Hub. Raises UserError."""
    folder = hf_folder(name, MODEL_FILES)
    if runs := sorted(folder.glob("*.pth")):
        raise UserError(f"{name} is a run's folder: pass a checkpoint in it, such as {runs[0]}")
    try:
        with library_errors("not a usable model folder"):
            peer = hf_model(folder)
            tied = peer.get_output_embeddings().weight is peer.get_input_embeddings().weight
            config = replace(hf_shape(peer.config), tie_weights=tied)
            theirs, weights = peer.state_dict(), {}
            for row in tensor_rows(config):
                parts = [theirs[name].T if row.transposed else theirs[name] for name in row.theirs]
                weights[row.ours] = torch.cat(parts).contiguous()
            model = build_model(config, weights)
        check_logits(peer, model)
        if not any(folder.glob("*token*")):  # an adapter may leave it to its base
            folder = Path(peer.config.name_or_path)
        tokenizer = load_tokenizer(str(folder.absolute()))
        if tokenizer.vocab_size > config.vocab_size:
            ids = f"{tokenizer.vocab_size} ids, the model only {config.vocab_size}"
            raise UserError(f"the tokenizer has {ids}")
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    template = folder / "chat_template.jinja"
    text = template.read_text("utf-8", "replace") if template.is_file() else ""
    return Loaded(model.train(), tokenizer, {}, "### Instruction: " in text)


@dataclass
class Loaded:
    """A model ready for use, and its origin."""

    model: GPT
    tokenizer: Tokenizer
    state: dict  # the checkpoint without its weights; empty for a Hugging Face model
    uses_our_chat_template: bool = False  # set for Hugging Face models only

    @property
    def expects_template(self) -> bool:
        """Whether it was trained on answers, and so expects prompts in the template."""
        weighed = (self.state.get("config") or {}).get("answer_weight", 0) > 0
        return self.uses_our_chat_template or weighed or self.state.get("command") == "finetune"

    @property
    def split_settings(self) -> dict:
        """The INHERITED settings with which this model has never seen the validation records."""
        usual = {name: getattr(DataConfig, name) for name in INHERITED}
        stored = self.state.get("config") or {}  # a model from elsewhere has none
        return {name: stored.get(name, value) for name, value in usual.items()}

    @property
    def prefix(self) -> list[int]:
        """Ids before a plain text: bos, unless training joined texts without special tokens."""
        return list(self.tokenizer.prefix) if self.split_settings["add_special_tokens"] else []


def load_model(name: str, merge: bool = True, block_size: int | None = None) -> Loaded:
    """A checkpoint of this program, or a Hugging Face folder or name. `merge` folds LoRA in."""
    path = Path(name)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt") or path.is_file():
        state = load_checkpoint(path)
        try:
            loaded = restored(state)
        except UserError as error:
            raise UserError(f"{path} is not a usable checkpoint: {error}") from None
        if state.get("lora") and merge:
            loaded.model.float()  # frozen weights may be bf16, too coarse for small changes
            merge_lora(loaded.model)
    else:
        loaded = load_hf(name)
    resize_block(loaded.model, block_size)
    return loaded


def resize_block(model: GPT, block_size: int | None) -> None:
    """Change the context length: learned positions can only be cut; the others take any length."""
    known = model.config.block_size
    if not block_size or block_size == known:
        return
    if model.config.pos == "learned":
        if block_size > known:
            raise UserError(f"--block_size {block_size}: this model has learned {known} positions")
        model.positions.weight = nn.Parameter(model.positions.weight[:block_size].clone())
    elif block_size > known:
        note(f"block_size {block_size} exceeds the {known} that the model was trained with")
    model.config.block_size = block_size


OVERRIDABLE = ("dropout", "token_dropout", "attn")  # settings that do not change weight shapes


def with_settings(model: GPT, config, **usual) -> GPT:
    """The same weights under the OVERRIDABLE settings that a command sets, else under `usual`."""
    asked = {n: getattr(config, n) for n in OVERRIDABLE if getattr(config, n) is not None}
    return build_model(replace(model.config, **usual | asked), model_weights(model))


# --- exports ---

# `instruction_prompt` and `instruction_response` for transformers and llama.cpp; tokens' names
# replace <|bos|> and <|sep|>. A user's message may have an `input` besides its content.
# Special tokens spelled out in a message are special to those two, but plain characters here.
CHAT_TEMPLATE = r"""
{{- '<|bos|>' }}
{%- for message in messages %}
    {%- set text = message['content'] %}
    {%- if text is not string %}
        {{- raise_exception('only messages of text are supported, no image or other part') }}
    {%- endif %}
    {%- if message['role'] == 'system' or message['role'] == 'developer' %}
        {%- if text %}
            {{- '### System: ' + text + '\n' }}
        {%- endif %}
    {%- elif message['role'] == 'user' %}
        {{- '### Instruction: ' + text + '\n' }}
        {{- '### Input: ' + (message['input'] or '') + '\n' }}
        {{- '### Output:' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + text + '\n' + '<|sep|>' }}
    {%- else %}
        {{- raise_exception('roles are system, developer, user and assistant') }}
    {%- endif %}
{%- endfor %}
""".strip()


def to_hf_tokenizer(loaded: Loaded):
    """transformers' tokenizer with our ids, and the chat template of a tuned model.

    It puts bos before a text if training did. If not, only a tuned model declares a bos, for chats,
    since a declared bos would be put before every text.
    """
    tokenizers, ours = optional("tokenizers"), loaded.tokenizer
    is_bytes = isinstance(ours, ByteTokenizer)
    library = byte_library() if is_bytes else tokenizers.Tokenizer.from_str(ours.json)
    if is_bytes or loaded.state:  # a foreign tokenizer stays as it is
        prefix = [library.id_to_token(number) for number in loaded.prefix]
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*prefix, "$A"], special_tokens=list(zip(prefix, loaded.prefix, strict=True))
        )
    ids = {role: getattr(ours, f"{role}_id") for role in USUAL_NAMES}
    token = {role: library.id_to_token(n) for role, n in ids.items() if n is not None}
    settings: dict = {"model_max_length": loaded.model.config.block_size}
    if loaded.expects_template:
        template = CHAT_TEMPLATE.replace("<|bos|>", token.get("bos", ""))
        settings["chat_template"] = template.replace("<|sep|>", token["sep"])
        ends = "|".join(re.escape(token[role]) for role in ("sep", "eos"))
        settings["response_template"] = {  # how `transformers serve` finds the answer
            "defaults": {"role": "assistant"},
            "start_anchor": "### Output:",
            "fields": {"content": {"content": "text", "close_pattern": rf"\s*(?:{ends})"}},
        }
    elif not loaded.prefix:
        token.pop("bos", None)
    settings |= {f"{role}_token": name for role, name in token.items()}
    # transformers 4 knows the class by this name; transformers 5 would write another.
    kind = type("PreTrainedTokenizerFast", (transformers_library().PreTrainedTokenizerFast,), {})
    return kind(tokenizer_object=library, clean_up_tokenization_spaces=False, **settings)


CHECK_TEXTS = (
    "First Citizen:\nBefore we proceed any further, hear me speak.", " Größe 你好 e\u0301 😀",
    "  two  spaces\t\r\n\n x" + " " * 20 + "y ", "1234567 3.14", "I'll don't WE'RE", "!?...#@",
)  # fmt: skip


class ChatTurn(NamedTuple):
    """A question in a conversation, and its answer: None if it is still to come."""

    instruction: str
    input: str
    answer: str | None


def conversation_ids(tokenizer: Tokenizer, turns: Iterable[ChatTurn], system="") -> list[int]:
    """Ids of a conversation, as in a token store: each prompt is encoded with its answer."""
    ids = list(tokenizer.prefix)
    for instruction, input, answer in turns:
        text = instruction_prompt(instruction, input, system)
        system = ""  # only the first turn has it
        if answer is None:
            return ids + tokenizer.encode(text).tolist()
        ids += [*tokenizer.encode(text + instruction_response(answer)).tolist(), tokenizer.sep_id]
    return ids


def check_tokenizer(loaded: Loaded, theirs) -> None:
    """Raise UserError unless both give texts and, if the model is tuned, chats the same ids."""
    ours = loaded.tokenizer
    for text in CHECK_TEXTS:
        if theirs(text, add_special_tokens=False)["input_ids"] != ours.encode(text).tolist():
            raise UserError(f"export failed its check: the tokenizer has other ids for {text!r}")
    if not loaded.expects_template:
        return
    turns, messages = [("1 + 1?", "Größe 3", "two"), (" ", "", " a\n"), ("Who?", "x\n", "")], []
    for instruction, input, answer in turns:
        messages.append({"role": "user", "content": instruction, "input": input})
        messages.append({"role": "assistant", "content": answer})
    found = theirs.apply_chat_template(messages, return_dict=False)
    if found != conversation_ids(ours, map(ChatTurn._make, turns)):
        what = "a chat encoded at once has other ids than turn by turn, as in training"
        raise UserError(f"export failed its check: {what}; train with another tokenizer")


def save_folder(loaded: Loaded, peer, tokenizer, folder: Path, **options) -> None:
    """Write both for transformers. Raises UserError unless they reload to our ids and logits."""
    with library_errors(f"cannot write {folder.name}"):
        peer.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # which the library makes private
        shutil.copymode(next(folder.glob("*config.json")), file)
    check_tokenizer(loaded, transformers_library().AutoTokenizer.from_pretrained(folder))
    check_logits(hf_model(folder), loaded.model)


def export_model(loaded: Loaded, folder: Path) -> None:
    """Write a Hugging Face folder. Raises UserError unless it computes what our model does."""
    peer, tokenizer = to_peer(loaded.model.float()), to_hf_tokenizer(loaded)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "pad")}
    ids["eos_token_id"] = list(loaded.tokenizer.end_ids)
    peer.config.update(ids)
    sampling = dict(do_sample=True, temperature=0.9, top_k=30)
    peer.generation_config = transformers_library().GenerationConfig(**ids, **sampling)
    save_folder(loaded, peer, tokenizer, folder)


# --- LoRA adapters, through peft ---

LORA_LAYERS = {"qkv": "attn.qkv", "proj": "attn.proj", "up": "mlp.up", "down": "mlp.down"}


def lora_settings(config: FinetuneConfig) -> dict | None:
    """peft.LoraConfig's settings for --method lora, else None. Raises UserError."""
    if config.method != "lora":
        return None
    targets = [LORA_LAYERS.get(t.strip()) for t in config.lora_targets.split(",")]
    if None in targets:
        raise UserError(f"--lora_targets must be among {', '.join(LORA_LAYERS)}")
    settings = dict(lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout)
    return settings | {"r": config.lora_r, "target_modules": targets}


def add_lora(model: GPT, lora: dict) -> None:
    """Wrap the target layers in peft's adapters."""
    peft = optional("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(**lora), model)


def merge_lora(model: nn.Module) -> None:
    """Fold the adapters into the weights."""
    adapted = [(name, m) for name, m in model.named_modules() if hasattr(m, "lora_A")]
    for name, layer in adapted:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    model.requires_grad_(True)


def export_adapter(loaded: Loaded, folder: Path, base: str) -> None:
    """Write a peft adapter. Several matrices that make one of ours share its A and split its B."""
    lora, config = loaded.state.get("lora"), loaded.model.config
    if not lora:
        raise UserError("--adapter: this checkpoint was not tuned with --method lora")
    source = loaded.state["config"]["ckpt"]
    if not base and source.endswith(".pth"):
        raise UserError(f"--adapter needs --base_model, the folder that {source} was exported to")
    base, peft, kind = base or source, optional("peft"), hf_kind(config)
    targets = " ".join(HF_MODULES[kind][name] for name in lora["target_modules"]).split()
    lora = lora | {"target_modules": targets, "fan_in_fan_out": kind == "gpt2"}
    settings = peft.LoraConfig(task_type="CAUSAL_LM", **lora)
    peer, adapters = peft.get_peft_model(hf_model(hf_folder(base, MODEL_FILES)), settings), {}
    trained = loaded.model.float().state_dict()
    for row in tensor_rows(config):
        module = row.ours.removesuffix("weight")
        if f"{module}lora_A.default.weight" not in trained:
            continue
        a, b = (trained[f"{module}lora_{side}.default.weight"] for side in "AB")
        for name, part in zip(row.theirs, b.split(row.rows), strict=True):
            name = f"base_model.model.{name.removesuffix('weight')}"
            adapters |= {f"{name}lora_A.weight": a, f"{name}lora_B.weight": part}
    peft.set_peft_model_state_dict(peer, adapters)
    settings.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    save_folder(loaded, peer, to_hf_tokenizer(loaded), folder, save_embedding_layers=False)


# --- GGUF, the format of llama.cpp ---

# matrix type: (number as a file type, largest error as a share of the matrix's largest value)
GGUF_TYPES = {"f32": (0, 0.0), "f16": (1, 2**-11), "bf16": (32, 2**-8), "q8_0": (7, 2**-7)}
GGUF_SETTINGS = {  # GGUFWriter's methods, without "add_": our settings
    "context_length": "block_size", "embedding_length": "n_embd", "block_count": "n_layer",
    "feed_forward_length": "n_inner", "head_count": "n_head", "head_count_kv": "n_kv_head",
    "key_length": "head_dim", "value_length": "head_dim", "rope_dimension_count": "head_dim",
    "rope_freq_base": "rope_theta", "layer_norm_eps": "norm_eps", "layer_norm_rms_eps": "norm_eps",
}  # fmt: skip


def gguf_vocabulary(loaded: Loaded) -> dict:
    """The tokenizer's settings, under the names of GGUFWriter's methods. Raises UserError."""
    gguf, theirs = optional("gguf"), to_hf_tokenizer(loaded)
    if not loaded.tokenizer.cuts_safely:
        way = "export a folder and use llama.cpp's convert_hf_to_gguf.py"
        raise UserError(f"--gguf supports only GPT-2's way of splitting text: {way}")
    check_tokenizer(loaded, theirs)
    library = theirs.backend_tokenizer
    saved = json.loads(library.to_str())
    added = {t["id"]: "CONTROL" if t["special"] else "USER_DEFINED" for t in saved["added_tokens"]}
    tokens = [library.id_to_token(i) for i in range(loaded.model.config.vocab_size)]
    kinds = ["UNUSED" if t is None else added.get(i, "NORMAL") for i, t in enumerate(tokens)]
    settings = {
        "tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2",
        "token_list": [f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens)],
        "token_types": [gguf.TokenType[kind] for kind in kinds],
        # There must be at least one merge: this one is of bytes that never occur in UTF-8.
        "token_merges": [" ".join(pair) for pair in saved["model"]["merges"]] or ["þ ÿ"],
        "eot_token_id": loaded.tokenizer.sep_id,  # where a tuned model stops
        "add_bos_token": bool(loaded.prefix), "add_space_prefix": False,
        "chat_template": theirs.chat_template,
    }  # fmt: skip
    settings |= {f"{role}_token_id": getattr(theirs, f"{role}_token_id") for role in USUAL_NAMES}
    return {name: value for name, value in settings.items() if value is not None}


def export_gguf(loaded: Loaded, target: Path, dtype: str) -> None:
    """Write a GGUF file: positions and vectors in float32, all other matrices in `dtype`.

    It appears only once it has been read back. Raises UserError for what it cannot hold.
    """
    gguf, config, kind = optional("gguf"), loaded.model.config, hf_kind(loaded.model.config)
    hf_config(config)
    if config.mlp == "relu":
        raise UserError("llama.cpp cannot run --mlp relu: export to a Hugging Face folder instead")
    if config.mlp == "gelu":
        note("llama.cpp approximates GELU with tanh: log-probabilities change by about 1e-3")
    settings = {theirs: getattr(config, ours) for theirs, ours in GGUF_SETTINGS.items()}
    settings |= {"name": target.stem, "file_type": GGUF_TYPES[dtype][0]}
    settings |= {"quantization_version": gguf.GGML_QUANT_VERSION} | gguf_vocabulary(loaded)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), config.n_layer)
    theirs = to_hf(model_weights(loaded.model.float()), config, conv1d=False)
    tensors = {names.get_name(n, (".weight", ".bias")): t.numpy() for n, t in theirs.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        writer = gguf.GGUFWriter(file.name, kind)
        for name, value in settings.items():
            getattr(writer, f"add_{name}")(value)
        for name, tensor in tensors.items():
            is_matrix = tensor.ndim == 2 and not name.startswith("position")
            number = gguf.GGMLQuantizationType[dtype.upper() if is_matrix else "F32"]
            with library_errors(f"cannot store {name} as {dtype} (--gguf_type)"):  # odd widths
                writer.add_tensor(name, gguf.quants.quantize(tensor, number), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written = {tensor.name: tensor for tensor in gguf.GGUFReader(file.name).tensors}
        for name, tensor in tensors.items():
            data = gguf.quants.dequantize(written[name].data, written[name].tensor_type)
            error = np.abs(data.reshape(tensor.shape) - tensor).max()
            if not error <= GGUF_TYPES[dtype][1] * np.abs(tensor).max() + 2**-24:
                what = f"export failed its check: {name} differs by {error:.1e}"
                raise UserError(f"{what}; try --gguf_type f32")


# ====================================================================================
# 14. Evaluation
#
# `evaluate_perplexity` scores a model, `report` gathers all its figures on a corpus, `report_lines`
# prints them: train, finetune and eval end with the same table. Each record is scored by itself,
# and each of its tokens once.
#
#     $ python llm_pipeline.py eval --ckpt ckpts/best.pth --json figures.json
#     >>> train, val = lp.create_dataloaders(lp.build_corpus_from_sources(), block_size=64)
#     >>> lp.evaluate_perplexity(model, val)
#     {'loss': 5.5..., 'ppl': 2..., 'tokens': ...}
# ====================================================================================


@torch.no_grad()
def evaluate_perplexity(
    model: GPT, loader: Iterable, max_batches: int = 0, rt: Runtime | None = None
) -> dict:
    """Mean loss per target in nats, ppl = exp(min(20, loss)), and tokens: the number of targets.

    loader: pairs (x, y) of ids, (B, T) each, with IGNORE in y for what does not count; only the
    first `max_batches` of them (0: all). Each process brings its share. Draws no random numbers.
    Raises UserError if there are no targets.
    """
    rt = rt or Runtime(next(model.parameters()).device, torch.float32)
    training, nll, tokens = model.training, 0.0, 0
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):  # iter(DataLoader) may draw a seed for workers
            for x, y in islice(loader, max_batches or None):
                with rt.autocast():
                    losses = model.losses(x.to(rt.device), y.to(rt.device))
                nll += float(losses.cpu().double().sum())
                tokens += int((y != IGNORE).sum())
    finally:
        model.train(training)
    nll, tokens = rt.sum(nll, tokens)
    if not tokens:
        raise UserError("there are no tokens to score: add data, or choose another split")
    return {"loss": nll / tokens, "ppl": math.exp(min(20.0, nll / tokens)), "tokens": int(tokens)}


def rows_of(store: TokenStore, split: str, source: str = "") -> np.ndarray:
    """Rows of the index, from one source or all."""
    rows = store.index[split]
    return rows[rows["source"] == store.sources.index(source)] if source else rows


def trained_rows(store: TokenStore, split: str, source: str = "") -> np.ndarray:
    """Rows of plain texts and trained answers. Preference pairs alternate chosen and rejected: only
    the chosen are returned."""
    rows = rows_of(store, split, source)
    rows = rows[rows["trained"] == 1]
    return rows[::2] if store.meta["pairs"] else rows


class RecordWindows(Dataset):
    """A source's records, each by itself, cut so that each token is a target once: ds[i] -> (x, y).

    Windows do not overlap, but a record's last one reaches back for as much context as the block
    holds, like lm_eval's rolling windows. A record's first token, answers that the data says not to
    train on, and the eos of a plain text, which only joins texts, are not targets.
    """

    def __init__(self, store: TokenStore, split: str, source: str, block_size: int):
        self.store, self.split, self.block_size = store, split, block_size
        self.masked, rows = store.masked(split), rows_of(store, split, source)
        untrained, rows = rows[rows["trained"] == 0], rows[rows["last"] == 1]
        start, length = (rows[name].astype(np.int64) for name in ("start", "length"))
        joined = store.tokens[split][start + length - 1] == store.tokenizer.eos_id
        n_targets = length - 1 - (joined & (rows["prompt"] <= 1))  # of each record
        self.windows = []  # (position of the first id, targets, how many are scored already)
        for place, n in zip(start.tolist(), n_targets.tolist(), strict=True):
            for first in range(0, n, block_size):
                end = min(first + block_size, n)
                begin = max(0, end - block_size)
                self.windows.append((place + begin, end - begin, first - begin))
        self.lengths = np.array([n for _, n, _ in self.windows])
        self.n_targets = int(n_targets.sum() - (untrained["length"] - untrained["prompt"]).sum())
        self.n_records = len(rows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        place, n, scored_before = self.windows[i]
        window = LMDataset(self.store.tokens[self.split], n, masked=self.masked)
        window.shift = place
        x, y = window[0]
        y[:scored_before] = IGNORE
        return x, y

    def collate(self, samples: list[tuple]) -> Batch:
        return pad(samples, self.store.tokenizer.pad_id, self.block_size)


class Answers(Dataset):
    """A split's trained answers, from one source or all: ds[i] -> (ids before it, its own ids)."""

    def __init__(self, store: TokenStore, split: str, source: str = ""):
        self.store, self.split = store, split
        rows = trained_rows(store, split, source)
        self.rows = rows[rows["prompt"] > 1]  # plain text has at most a bos there
        self.lengths = self.rows["length"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        start, length, prompt = (int(self.rows[name][i]) for name in ("start", "length", "prompt"))
        ids = self.store.ids(self.split, start, length)
        return ids[:prompt], ids[prompt:]


def closed_set(store: TokenStore, source: str) -> list[np.ndarray]:
    """The distinct answers of a source if they are few and repeat, else an empty list."""
    labels: dict[bytes, np.ndarray] = {}
    total = 0
    for _, answer in chain(Answers(store, "train", source), Answers(store, "val", source)):
        labels[answer.tobytes()] = answer
        total += 1
        if len(answer) > 64 or len(labels) > 10:
            return []
    few = 1 < len(labels) <= total // 10
    return [labels[key] for key in sorted(labels)] if few else []


@dataclass
class Evaluation:
    """Measures a model on a corpus. limit: evenly spaced samples of each kind (0: all)."""

    loaded: Loaded
    store: TokenStore
    rt: Runtime
    batch_size: int = 32
    limit: int = 0

    def __post_init__(self):
        self.model = self.loaded.model.to(self.rt.device).eval()
        self.block_size = self.model.config.block_size

    def sampler(self, data: Dataset, limit: int) -> ValidationSampler:
        """This process's batches of up to `limit` samples."""
        return ValidationSampler(data, self.batch_size, limit, self.rt.rank, self.rt.world_size)

    def text(self, source: str, split: str) -> dict:
        """Sums over a source's text, for `figures`; {} if it has none.

        Bytes are those of the scored text, as the store counted them. If only some windows are
        scored, bytes and records are scaled by their share of the tokens.
        """
        data = RecordWindows(self.store, split, source, self.block_size)
        if not data.n_targets:
            return {}
        loader = make_loader(data, self.sampler(data, self.limit))
        shown = tqdm(loader, desc=source, delay=1, leave=False, disable=not self.rt.is_main)
        found = evaluate_perplexity(self.model, shown, rt=self.rt)
        share = found["tokens"] / data.n_targets
        return {
            "nll": found["loss"] * found["tokens"],
            "tokens": found["tokens"],
            "bytes": share * self.store.meta["counts"][source][f"{split}_bytes"],
            "records": share * data.n_records,
        }

    @torch.no_grad()
    def score(self, data: Answers, limit: int, answer: np.ndarray | None = None) -> tuple:
        """Two lists, each answer's loss in nats and whether greedy decoding writes exactly it; and
        their total number of tokens. answer: scored in place of each.

        One forward pass is enough: greedy decoding picks the most likely token after each prefix.
        """
        nlls, exact, tokens = [], [], 0
        for numbers in filter(None, self.sampler(data, limit)):
            samples = []
            for prompt, truth in (data[i] for i in numbers):
                response = truth if answer is None else answer
                ids, first = fit_record(prompt, response, self.block_size + 1)
                ids = torch.from_numpy(ids)
                samples.append((ids[:-1], ids[1:].index_fill(0, torch.arange(first - 1), IGNORE)))
            batch = pad(samples, self.store.tokenizer.pad_id, self.block_size).to(self.rt.device)
            with self.rt.autocast():
                hidden = self.model.hidden(batch.x)
                for h, y in zip(hidden, batch.y, strict=True):
                    logits = self.model.head(h[y != IGNORE]).float()  # (tokens, V)
                    wanted = y[y != IGNORE]
                    nlls.append(F.cross_entropy(logits, wanted, reduction="sum").item())
                    exact.append(torch.equal(logits.argmax(-1), wanted))
                    tokens += len(wanted)
        return nlls, exact, tokens

    def answers(self, split: str, limit: int) -> dict:
        """The answers' loss in nats per token, and the share that greedy decoding gets exactly."""
        nlls, exact, tokens = self.score(Answers(self.store, split), limit)
        n, nll, exact, tokens = self.rt.sum(len(nlls), sum(nlls), sum(exact), tokens)
        return {"records": int(n), "loss": nll / max(tokens, 1), "exact": exact / max(n, 1)}

    def classes(self, source: str, splits: tuple[str, ...]) -> dict:
        """Figures of a classifier that picks the most likely of a small closed set of answers."""
        labels = closed_set(self.store, source)
        if not labels:
            return {}
        numbers = {label.tobytes(): number for number, label in enumerate(labels)}
        table = np.zeros((len(labels), len(labels)), int)  # [true, predicted]
        for split in splits:
            data = Answers(self.store, split, source)
            nlls = [self.score(data, self.limit, label)[0] for label in labels]
            order = chain.from_iterable(self.sampler(data, self.limit))
            for i, guess in zip(order, np.argmin(nlls, 0), strict=True):
                table[numbers[data[i][1].tobytes()], guess] += 1
        table = np.reshape(self.rt.sum(*table.ravel().tolist()), table.shape).astype(int)
        right, true, predicted = table.diagonal(), table.sum(1), table.sum(0)
        scores = {
            "precision": right / np.maximum(predicted, 1),
            "recall": right / np.maximum(true, 1),
            "f1": 2 * right / np.maximum(predicted + true, 1),
            "support": true,
        }
        texts = [self.store.tokenizer.decode(label) for label in labels]
        names = [text.removeprefix(" ").removesuffix("\n") for text in texts]
        return {
            "accuracy": float(right.sum() / max(table.sum(), 1)),
            "classes": {
                name: {key: values[i].item() for key, values in scores.items()}
                for i, name in enumerate(names)
            },
            "confusion": {"labels": names, "true_by_predicted": table.tolist()},
        }

    def examples(self, split: str) -> list[dict]:
        """Three records as texts: given, truth, and what the model writes."""
        rows, tokenizer, found = trained_rows(self.store, split), self.store.tokenizer, []
        width = 120 if isinstance(tokenizer, ByteTokenizer) else 40  # about a line of tokens
        for row in rows[evenly_spaced(len(rows), 3)]:
            start, length, prompt = (int(row[name]) for name in ("start", "length", "prompt"))
            first, temperature = prompt, 0.0
            if prompt <= 1:  # plain text: continue from its middle
                first, temperature = min(max(1, length // 2), width), 0.8
            ids = self.store.ids(split, start, min(length, first + width)).tolist()
            given, truth = ids[:first], ids[first:]
            idx = torch.tensor([given], device=self.rt.device)
            steps = generate(self.model, idx, width, tokenizer.end_ids, temperature=temperature)
            written = [token for (token,) in steps if token >= 0]
            found.append({
                "given": tokenizer.decode(given).strip(),
                "truth": tokenizer.decode(truth, given).strip(),
                "model": tokenizer.decode(written, given).strip(),
            })  # fmt: skip
        return found


def figures(sums: dict) -> dict:
    """Figures from sums over some text; bits_per_byte is nan if only ids are known."""
    loss, size = sums["nll"] / sums["tokens"], sums["bytes"]
    return {
        "loss": loss,
        "ppl": math.exp(min(20.0, loss)),
        "bits_per_byte": sums["nll"] / math.log(2) / size if size else math.nan,
        **{name: round(sums[name]) for name in ("tokens", "bytes", "records")},
    }


def report(
    loaded: Loaded, store: TokenStore, rt: Runtime, split: str = "val", batch_size: int = 32,
    max_batches: int = 0,
) -> dict:  # fmt: skip
    """All figures of a model on a corpus, as plain data: what `eval --json` writes.

    `figures` of the split, and those of each source in `sources`, with accuracy, classes and
    confusion if its answers are a closed set. `answers` of val and train, if records have answers.
    unknown_tokens: in the whole corpus. `examples`: three. max_batches: evenly spaced batches of
    each (0: all, but 500 answers of the other split). Raises UserError if the split is empty.
    """
    asked = Evaluation(loaded, store, rt, batch_size, limit=max_batches * batch_size)
    splits = ("train", "val") if split == "all" else (split,)
    sources, total = {}, Counter()
    for source in store.sources:
        sums = Counter()
        for part in splits:
            sums.update(asked.text(source, part))
        if sums["tokens"]:
            total.update(sums)
            sources[source] = figures(sums) | asked.classes(source, splits)
    if not sources:
        raise UserError(f"the {split} split of this data is empty: score all data with --split all")
    unknown = sum(row.get("unknown_tokens", 0) for row in store.meta["counts"].values())
    result = figures(total) | {"unknown_tokens": unknown, "sources": sources}
    answers = {}
    for part in ("val", "train"):  # one may be there only for comparison
        most = asked.limit * len(store.sources)
        answers[part] = asked.answers(part, most or (0 if part in splits else 500))
    if answers["val"]["records"] + answers["train"]["records"]:
        result["answers"] = answers
    return result | {"examples": asked.examples(splits[-1])}


def report_lines(after: dict, before: dict | None = None) -> list[str]:
    """A report as a table for people; `before` adds earlier figures next to those of `after`."""
    rows = {**after["sources"], "total": after} | ({"total, before": before} if before else {})
    titles = f"{'loss':>9}{'ppl':>16}{'bits/byte':>11}{'tokens':>14}{'records':>12}"
    lines = [f"{'source':<24}{titles}"]
    for name, row in rows.items():
        scores = f"{row['loss']:>9.4f}{row['ppl']:>16,.3f}{row['bits_per_byte']:>11.4f}"
        lines.append(f"{name[:23]:<24}{scores}{row['tokens']:>14,}{row['records']:>12,}")
    if after["unknown_tokens"]:
        lines.append(f"{after['unknown_tokens']:,} tokens are unknown to the vocabulary")
    for split, name in {"val": "held-out", "train": "training"}.items():
        shown = [each["answers"][split] for each in (before, after) if each and "answers" in each]
        if shown and shown[-1]["records"]:
            exact = " -> ".join(f"{each['exact']:.1%}" for each in shown)
            loss = " -> ".join(f"{each['loss']:.4f}" for each in shown)
            count = f"{shown[-1]['records']:,} {name} answers"
            lines.append(f"{count}: exactly right {exact}, loss {loss} nats a token")
    for name, row in after["sources"].items():
        if "accuracy" in row:
            lines += ["", *class_lines(name, row)]
    for number, example in enumerate(after["examples"]):
        if before:
            example = example | {"before": before["examples"][number]["model"]}
        lines += ["", *(f"  {key:<8}{shortened(text)}" for key, text in example.items())]
    return lines


def class_lines(name: str, row: dict) -> list[str]:
    """A source's accuracy, then a line for each class: its scores, and what it was predicted as."""
    labels = [shortened(label)[:15] for label in row["classes"]]
    supports = [found["support"] for found in row["classes"].values()]
    commonest = max(supports) / max(sum(supports), 1)
    score = f"accuracy {row['accuracy']:.4f}; always guessing the majority gives {commonest:.4f}"
    lines = [f"{name}: {score}"]
    titles = f"{'precision':>11}{'recall':>9}{'f1':>9}{'support':>9}"
    lines.append(f"{'true class':<16}{titles}  predicted as {', '.join(labels)}")
    table = row["confusion"]["true_by_predicted"]
    for label, found, taken in zip(labels, row["classes"].values(), table, strict=True):
        scores = f"{found['precision']:>11.4f}{found['recall']:>9.4f}{found['f1']:>9.4f}"
        counts = ", ".join(f"{n:,}" for n in taken)
        lines.append(f"{label:<16}{scores}{found['support']:>9,}  {counts}")
    return lines


def shortened(text: str) -> str:
    """One line of at most 160 characters, with those that would steer a terminal replaced."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", " ".join(text.split()))
    return text if len(text) <= 160 else f"{text[:157]}..."


def example_flags(store: TokenStore, split: str) -> list[str]:
    """`sample`'s flags for a split's shortest prompt or, from plain text, a few words of it."""
    answers = Answers(store, split)
    if not len(answers):
        text = store.tokenizer.decode(store.ids(split, 0, min(60, len(store.tokens[split]))))
        return ["--prompt", " ".join(text.split()[1:7])]  # the first word may be cut
    prompt, _ = answers[np.argmin(answers.rows["prompt"])]
    text = store.tokenizer.decode(prompt)
    pattern = r"(?:### System: .*\n)?### Instruction: (.*)\n### Input: (.*)\n### Output:"
    found = re.fullmatch(pattern, text, re.DOTALL)
    instruction, given = found.groups() if found else (text, "")
    return ["--prompt", instruction, *(["--input", given] if given else [])]


# ====================================================================================
# 15. Commands
#
# train, finetune, eval, sample, prepare, export, bench: each begins with its settings.
# ====================================================================================


@dataclass
class TrainConfig(
    PresetConfig, TokenizerConfig, ModelSettings, FitConfig, OptimConfig, DataConfig, RuntimeConfig
):
    """Train a GPT from scratch, or continue from a pretrained one (--init_from)."""

    init_from: str = changeable("", "start from a checkpoint or a Hugging Face folder or name")
    answer_weight: int = option(0, "whole records; answers count N times (0: windows)", low=0)
    stride: int = option(0, "distance between windows (0: block_size)", low=0)
    minutes: float = session_only(0.0, "fill N minutes: sets size and steps", low=0.0, high=1e6)


def model_config(settings: ModelSettings, vocab_size: int = GPTConfig.vocab_size) -> GPTConfig:
    """The shape that a command's settings ask for, with a vocabulary of `vocab_size` ids."""
    shape = {f.name: getattr(settings, f.name) for f in fields(ModelSettings)}
    return GPTConfig(vocab_size=vocab_size, **shape)


# --- the recipes: settings that suit the text ---

SMALL = 100_000  # bytes; less text than this is learned by heart, in whole records


@dataclass
class CorpusFacts:
    """What is known about the text before it is tokenized; by default, nothing."""

    n_bytes: int = 0
    sizes: Sequence[float] = ()  # bytes of each record, if all have answers
    stored: dict = field(default_factory=dict)  # tokenizer and vocab_size of a prepared store

    def block_size(self, tokenizer: str, vocab_size: int) -> int:
        """A block that holds 95% of the records (of little data, all) with their special tokens: a
        multiple of 16, at most 1,024."""
        longest = int(np.quantile(self.sizes, 1.0 if self.n_bytes < SMALL else 0.95))
        _, bytes_a_token = likely_tokens(tokenizer, vocab_size)
        return min(-(-int(longest / bytes_a_token) // 16) * 16 + 16, 1024)


def corpus_facts(settings: dict, most_bytes: float = math.inf) -> CorpusFacts:
    """Facts about the folder, file or store in the settings; none about a Hub dataset, or for a
    command without data. Files above `most_bytes` are not read, so their facts lack sizes."""
    if "data_dir" not in settings or settings["hf_dataset"]:
        return CorpusFacts()
    config = DataConfig(**{f.name: settings[f.name] for f in fields(DataConfig)})
    try:
        if is_store(config.data_dir):
            return facts_of_store(TokenStore(Path(config.data_dir)))
        return facts_of_files(store_key(config, {}, False), most_bytes, **vars(config))
    except (UserError, OSError):  # reported when the corpus is built
        return CorpusFacts()


def facts_of_store(store: TokenStore) -> CorpusFacts:
    meta, sizes = store.meta, []
    n_bytes = meta["source_bytes"] or sum(row.get("bytes", 0) for row in meta["counts"].values())
    if all((rows["prompt"] > 1).all() for rows in store.index.values()):
        bytes_a_token = n_bytes / sum(map(len, store.tokens.values()))
        sizes = (store.index["train"]["length"] * bytes_a_token).tolist()
    stored = {"tokenizer": meta["tokenizer"]["kind"], "vocab_size": store.tokenizer.vocab_size}
    stored = {name: meta["settings"].get(name, known) for name, known in stored.items()}
    return CorpusFacts(n_bytes, sizes, stored)


@lru_cache
def facts_of_files(fingerprint: str, most_bytes: float, **data) -> CorpusFacts:
    """Reads the files only once for each `fingerprint`."""
    config, sizes = DataConfig(**data), array("q")  # there may be millions
    n_bytes = size_of_files(config)
    for record in read_records(config, Report()) if 0 < n_bytes < most_bytes else ():
        if record.is_plain:  # may be long: stop reading
            return CorpusFacts(n_bytes)
        sizes.append(sum(len(encoded(turn.prompt + turn.response)) for turn in record.turns))
    return CorpusFacts(n_bytes, sizes)


def likely_tokens(tokenizer: str, vocab_size: int) -> tuple[int, float]:
    """Estimates (vocabulary size, bytes of English text per token) for bytes, for a BPE to be
    trained, or for a vocabulary like GPT-2's."""
    ids = {"byte": ByteTokenizer.vocab_size, "bpe": vocab_size}.get(tokenizer, 50_000)
    return ids, 1.0 if tokenizer == "byte" else math.log2(ids) / 4


def classic_recipe(settings: dict, explicit: dict) -> dict:
    """The preset as is. Unless flags say otherwise, little data in which every record has an answer
    is trained on in whole records, in blocks that hold them, and answers count tenfold."""
    asked = explicit.keys() & {"answer_weight", "stride", "max_steps"}
    if asked or "answer_weight" not in settings:  # only `train` has it
        return {}
    facts = corpus_facts(settings, SMALL)
    if not facts.sizes or facts.n_bytes >= SMALL:
        return {}
    plan = {"answer_weight": 10}
    if not settings["init_from"]:
        block_size = facts.block_size(settings["tokenizer"], settings["vocab_size"])
        plan["block_size"] = max(settings["block_size"], block_size)
    return plan


# The fastest rates we measured, at width 128 and 400 steps. Finetuning changes only AdamW's.
FAST_RATES = dict(
    optimizer="muon", muon_lr=0.012, muon_momentum=0.85, head_lr_scale=0.4, beta2=0.95,
    grad_clip=0.0, lr_schedule="linear", warmup_steps=5, min_lr_ratio=0.0,
)  # fmt: skip


def fast_recipe(settings: dict, explicit: dict) -> dict:
    """Tuned for the fewest steps to a given loss; tests/bench/README.md has the tables.

    Small texts are read several times, with dropout and hidden tokens. If every record has an
    answer, whole records with more weight on answers make a better classifier.
    """
    facts = corpus_facts(settings)
    n_bytes, explicit = facts.n_bytes, facts.stored | explicit
    as_windows = explicit.get("answer_weight") == 0 or explicit.get("stride", 0) > 0
    weighed = bool(facts.sizes) and not as_windows
    has_library = importlib.util.find_spec("tokenizers") and not settings.get("init_from")
    bpe = n_bytes >= 1e5 and has_library
    plan = dict(tokenizer="bpe" if bpe else "byte", dropout=0.0, token_dropout=0.0)
    if weighed:
        plan |= dict(answer_weight=30, batch_size=2 * settings["batch_size"])
    if n_bytes:
        # What did best on the texts of tests/bench/README.md: bytes to read in all, most passes,
        # bytes of text per vocabulary id.
        most, most_passes, bytes_an_id = (3e6, 10, 340) if weighed else (4e6, 6, 1100)
        plan["epochs"] = max(min(most_passes, round(most / n_bytes)), settings["epochs"])
        vocab_size = 100 * round(n_bytes / bytes_an_id / 100)
        plan["vocab_size"] = min(max(vocab_size, 300), 8192)
    chosen = settings | plan | explicit
    tokens = chosen["tokenizer"], chosen["vocab_size"]
    if weighed:
        plan["block_size"] = max(settings["block_size"], facts.block_size(*tokens))
    vocab_size, bytes_a_token = likely_tokens(*tokens)
    steps = explicit.get("max_steps", 0)
    if n_bytes:
        block_size = (settings | plan | explicit)["block_size"]
        batch_bytes = block_size * chosen["batch_size"] * bytes_a_token
        steps = steps or chosen["epochs"] * n_bytes / batch_bytes
        passes = steps * batch_bytes / n_bytes
        if passes > 1.5 and weighed:
            plan |= dict(dropout=0.3, token_dropout=0.15)
        elif passes > 1.5:
            plan |= dict(dropout=0.1 if passes > 4.5 else 0.0, token_dropout=0.1)
    device = settings["device"]
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    large = on_cpu and vocab_size >= 8000
    n_head, block_size = settings["n_head"], plan.get("block_size", settings["block_size"])
    rate = min(1, 128 / settings["n_embd"]) * min(1, math.sqrt(400 / max(steps, 1)))
    return FAST_RATES | plan | dict(
        sampled_softmax=min(vocab_size // 4, 4096) if large else 0,
        arch="modern", tie_weights=False, zero_init=True, n_inner=2 * settings["n_embd"],
        n_kv_head=n_head // 2 if n_head % 2 == 0 else n_head, rope_theta=3.0 * block_size,
        lr=float(f"{0.02 * rate:.2g}"), muon_lr=float(f"{0.012 * rate:.2g}"),
    ) | facts.stored  # fmt: skip


# A recipe is a function of the settings so far and those asked for; it overrides arch and preset.
RECIPES = {"classic": classic_recipe, "fast": fast_recipe}


# --- train and finetune ---


def inherited(owner: type, name: str):
    """An option of another dataclass that defaults to the checkpoint's value."""
    about = owner.__dataclass_fields__[name].metadata
    return field(default=None, metadata=about | {"help": f"{about['help']} (from the checkpoint)"})


@dataclass
class CheckpointConfig(DataConfig):
    """Checkpoint: the model to start from. Its settings apply unless a flag overrides them."""

    ckpt: str = changeable("ckpts/best.pth", "checkpoint, or Hugging Face folder or name")
    block_size: int | None = inherited(ModelSettings, "block_size")
    val_fraction: float | None = inherited(DataConfig, "val_fraction")
    split_seed: int | None = inherited(DataConfig, "split_seed")
    split_by: str | None = inherited(DataConfig, "split_by")


@dataclass
class FinetuneConfig(CheckpointConfig, FitConfig, OptimConfig, RuntimeConfig):
    """Tune a checkpoint or Hugging Face model on instructions, preferences or rewards."""

    preset: str = option("", "batch_size and grad_accum of a preset", choices=tuple(PRESETS))
    recipe: str = option("classic", "classic: AdamW; fast: Muon", choices=("classic", "fast"))
    epochs: int = option(3, "passes over the training data", low=1, high=10**6)
    lr: float = option(1e-4, "learning rate of AdamW", above=0.0, high=10.0)
    seed: int = option(2025, "seed of order, dropout and sampling", low=0, high=2**32)
    dropout: float | None = inherited(ModelSettings, "dropout")
    token_dropout: float | None = inherited(ModelSettings, "token_dropout")
    attn: str | None = inherited(ModelSettings, "attn")
    method: str = option("full", "all weights, or LoRA adapters", choices=("full", "lora"))
    lora_r: int = option(8, "rank of the adapters", low=1, high=4096)
    lora_alpha: float = option(16.0, "scale of the adapters times lora_r", above=0.0, high=1e6)
    lora_dropout: float = option(0.0, "dropout before the adapters", low=0.0, high=0.95)
    lora_targets: str = option("qkv,proj,up,down", "layers that get adapters, comma-separated")
    loss_on: str = option("all", "tokens to learn", choices=("all", "response"))
    objective: str = option("ntp", "next token, preferences or reward", choices=OBJECTIVES)
    dpo_beta: float = option(0.1, "DPO: strength of the tie to the base", above=0.0, high=100.0)
    orpo_lambda: float = option(0.1, "ORPO: weight of the odds ratio", low=0.0, high=100.0)
    reward: str = option("exact", "GRPO: exact, number, contains, or FILE.py:function")
    num_generations: int = option(4, "GRPO: answers per prompt in a step", low=2, high=4096)
    max_new_tokens: int = option(64, "GRPO: longest answer, in tokens", low=1, high=2**20)
    temperature: float = option(1.0, "GRPO: sampling temperature", above=0.0, high=100.0)
    grpo_normalize: bool = option(False, "GRPO: divide advantages by their group's deviation")
    kl_beta: float = option(0.0, "GRPO: strength of the tie to the base", low=0.0, high=100.0)
    report_samples: int = changeable(50, "fewest records in a report (0: no report)", low=0)


# Settings that only one objective reads.
OBJECTIVE_OF = {"dpo_beta": "dpo", "orpo_lambda": "orpo"} | dict.fromkeys(
    ("reward", "num_generations", "max_new_tokens", "temperature", "grpo_normalize", "kl_beta"), "grpo"
)  # fmt: skip

# For GRPO, whatever the recipe. tests/bench/README.md lists what was tried.
GRPO_SETTINGS = dict(
    optimizer="muon", muon_lr=8e-4, lr=1e-4, lr_schedule="linear", min_lr_ratio=0.0, warmup_steps=10,
    batch_size=64, max_steps=400, eval_interval=50, compile="off",
)  # fmt: skip


def tuning_recipe(settings: dict, explicit: dict) -> dict:
    """Training settings only, with smaller steps: the shape is the checkpoint's."""
    if settings["objective"] == "grpo":
        return GRPO_SETTINGS | ({"max_steps": 0} if "epochs" in explicit else {})
    return FAST_RATES | dict(lr=0.008) if settings["recipe"] == "fast" else {}


# What --overfit_batch sets, unless told otherwise.
OVERFIT = dict(dropout=0.0, token_dropout=0.0, lr_schedule="constant", max_steps=300,
               log_interval=1, eval_interval=10**9, save_interval=10**9)  # fmt: skip


def open_store(
    config: DataConfig, rt: Runtime, base: Loaded | None = None, resumed=False, pairs=False
) -> TokenStore:
    """The corpus as a token store: the first process builds it, the others find it.

    base: the model to continue from. Its INHERITED settings apply unless others are asked for, so
    that nothing it was trained on validates. A resumed run has its own split.
    """
    inherits = base is not None and not resumed
    for name in INHERITED if inherits else ():
        value, theirs = getattr(config, name), base.split_settings[name]
        if name not in config.explicit and value == getattr(type(config), name):
            setattr(config, name, theirs)
        elif value != theirs and name != "add_special_tokens":
            what = f"--{name} {value} differs from the checkpoint's {theirs}"
            note(f"warning: {what}: it may have been trained on records that validate here")
    # A prepared store must be split the same way. A model from elsewhere has no split; with
    # --split all, none matters.
    if inherits and base.state.get("data") and getattr(config, "split", "") != "all":
        config.explicit |= {*SPLIT_SETTINGS}
    if role := data_role(config):
        side = "training" if role == "train" else "validation"
        note(f"{config.data_dir} is the {role} part of a split: all of it is for {side}")
    if not rt.is_main:
        dist.barrier()
    tokenizer = base.tokenizer if base else None
    store = build_corpus_from_sources(config=config, tokenizer=tokenizer, pairs=pairs)
    if rt.is_main and rt.world_size > 1:
        dist.barrier()
    return store


def dataset_of(config: FitConfig) -> Callable[[TokenStore, str, int], Dataset]:
    """The function that makes a split's data set under these settings."""
    if isinstance(config, FinetuneConfig):
        prompts = partial(PromptDataset, max_new_tokens=config.max_new_tokens)
        kinds = {"grpo": prompts, "dpo": PreferenceDataset, "orpo": PreferenceDataset}
        return kinds.get(config.objective, partial(InstructionDataset, loss_on=config.loss_on))
    if config.answer_weight:
        return partial(InstructionDataset, answer_weight=config.answer_weight)
    return LMDataset.from_store


# The least for a run whose length nobody set: fewer steps teach little, however small the data.
FEWEST_STEPS = 300


def steps_to_take(config: FitConfig, train: DataLoader) -> int:
    """Steps of a new run. Little data is repeated up to FEWEST_STEPS, which `config` then records,
    unless the user set the length; if that is too short to learn much, a note says so."""
    total = config.max_steps or config.epochs * len(train)
    if total >= FEWEST_STEPS or config.overfit_batch:
        return total
    if config.max_steps or "epochs" in config.explicit:
        if total < 100 and not getattr(config, "minutes", 0):
            enough = f"--epochs {-(-FEWEST_STEPS // len(train))} or --max_steps {FEWEST_STEPS}"
            note(f"only {total} steps: {enough} would teach more")
        return total
    passes = FEWEST_STEPS * train.batch_sampler.batch_size / len(train.dataset)
    passes = f"{passes:.0f} passes over little data"
    note(f"{FEWEST_STEPS} steps, {passes}: to change this, set --epochs or --max_steps")
    config.max_steps = FEWEST_STEPS
    if "eval_interval" not in config.explicit:
        config.eval_interval = FEWEST_STEPS // 10
    return FEWEST_STEPS


def make_run(
    config: FitConfig, rt: Runtime, stop: Stop, folder: RunFolder, loaded: Loaded, store: TokenStore
) -> Run:
    """Put a run together: a new one from `loaded`, or the one to resume from the folder's state."""
    if config.self_test:
        self_test(loaded.model.config, rt)
    choose_threads(config, rt, loaded.model.config, config.batch_size // config.grad_accum)
    model, resumed = loaded.model.to(rt.device).train(), folder.state
    block_size, dataset = model.config.block_size, dataset_of(config)
    train, val = create_dataloaders(
        store, block_size, config.batch_size, config.seed, dataset=dataset,
        stride=getattr(config, "stride", 0), eval_batches=config.eval_batches,
        grad_accum=config.grad_accum, rt=rt,
    )  # fmt: skip
    if not val:
        note("the validation split is empty: best.pth will follow the training loss")
    if n_cut := getattr(train.dataset, "n_cut", 0):
        room, way = block_size, "raise --block_size"
        if isinstance(train.dataset, PromptDataset):
            room, way = train.dataset.longest, "raise --block_size, or lower --max_new_tokens"
        what = "the middle of their prompt or the end of their answer"
        note(f"{n_cut:,} training records do not fit into {room} tokens and lose {what}: {way}")
    total = resumed["progress"]["total"] if resumed else steps_to_take(config, train)
    if config.max_steps:  # --minutes may have moved a resumed run's end
        config.max_steps = total
    folder.about = describe_run(config, rt, loaded, store)
    p = Progress(
        total=total,
        grad_accum=config.grad_accum,
        grad_checkpointing=config.grad_checkpointing,
    )
    if resumed:
        check_drift(resumed, folder.about)
        asked = config.explicit & {"grad_accum", "grad_checkpointing"}  # else as memory allowed
        p = Progress(**resumed["progress"] | {name: getattr(config, name) for name in asked})
        if not folder.file("best.pth").exists():  # only last.pth was copied
            p.best = math.inf
    if rt.sum(p.step)[0] != p.step * rt.world_size:
        raise UserError("the processes read different checkpoints: give them all one --out_dir")
    if config.overfit_batch:
        train.batch_sampler.first_batch_only, val = True, None
    model.grad_checkpointing = p.grad_checkpointing
    losses = distribute(model, config, rt, p.total)
    sampled = over_sampled_ids(losses, config.sampled_softmax, model.config.vocab_size)
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    if resumed:
        load_optimizer_state(model, optimizers, resumed["optimizer"])
        if resumed["scaler"]:
            scaler.load_state_dict(resumed["scaler"])
    objective = OBJECTIVES[getattr(config, "objective", "ntp")]
    run = Run(
        config, rt, model, sampled, objective, optimizers, train, val, store, p, scaler, stop,
        gradients=retry_on_oom, grad_sync=partial(grad_sync_context, model, losses),
    )  # fmt: skip
    run.save = lambda name: save_run(run, folder.about, folder.file(f"{name}.pth"))
    return run


def run_fit(run: Run, folder: RunFolder, before: dict | None = None) -> str:
    """Call `fit`, then report how it ended and what it achieved.

    before: the report on the base. Prints and returns best.pth's path; returns "" if a setting
    stopped the run, or with --overfit_batch. Raises Interrupted if a signal stopped it.
    """
    config, p, shape = run.config, run.progress, run.model.config
    if run.rt.is_main:
        if config.overwrite and not folder.state:
            for name in RUN_FILES:
                folder.file(name).unlink(missing_ok=True)
        about = folder.about
        size = about["model_config"]["vocab_size"]
        counted = {"kind": about["tokenizer"]["kind"], "size": size}  # for plot_curves.py
        write_json(folder.file("config.json"), about["config"] | {"vocabulary": counted})
    model = f"{run.model.n_params():,} parameters, {shape.n_layer} layers x {shape.n_embd}"
    steps = f"{p.total:,} steps of {run.train.batch_sampler.batch_size} x {shape.block_size} tokens"
    note(f"{model}, {run.rt.device} {str(run.rt.dtype).removeprefix('torch.')}, {steps}")
    with (
        run.stop.held(),
        contextlib.closing(Recorder(run, folder.file("metrics.csv"))) as run.recorder,
        training_precision(run.rt.device),
    ):
        try:
            if isinstance(config, FinetuneConfig) and run.val and p.base_loss is None:
                p.base_loss, stats = estimate_loss(run, run.val)
                run.recorder.validation(p.base_loss, stats)
            ended = fit(run)
        except Interrupted:  # in a step or an evaluation
            run.save("last")
            ended = "signal"
        except Diverged as error:
            last = folder.file("last.pth")
            way = f"restart with {folder.start_flag} {last}," if last.exists() else "restart with"
            raise UserError(f"{error}; {way} a lower --lr and another --out_dir") from None
    finished = ended in ("done", "early")
    note(how_it_ended(run, folder, finished))
    if ended == "signal":  # another process may have received it
        run.stop.number = run.stop.number or signal.SIGTERM
    if run.stop:
        raise Interrupted
    if not finished or config.overfit_batch:
        return ""
    best = str(folder.file("best.pth"))
    if getattr(config, "report_samples", 1):
        say_result(run, folder, best, before)
    if run.rt.is_main:
        print(best)
    return best


def how_it_ended(run: Run, folder: RunFolder, finished: bool) -> str:
    """One line on how a run ended. Raises UserError if --overfit_batch did not learn its batch."""
    p, base = run.progress, run.progress.base_loss
    best = f"{p.best:.4f} at step {p.best_step}"
    if run.config.overfit_batch:
        if not finished:
            return f"stopped at step {p.step}: nothing was judged or saved"
        if not p.best < 0.05:
            raise UserError(f"could not overfit one batch: loss {best}; check the learning rate")
        return f"overfitted one batch: loss {best}; nothing was saved"
    if not finished:
        return f"stopped at step {p.step}, saved in {folder.file('last.pth')}: --resume continues"
    if base is not None:
        best += f", {'better' if p.best < base else 'NOT better'} than its base's {base:.4f}"
    how = "done" if p.step == p.total else f"stopped early at step {p.step}"
    kind = "validation loss" if run.val else "training loss"
    if run.val and isinstance(run.val.dataset, PromptDataset):
        kind = "share of held-out prompts answered wrongly"
    return f"{how}: best {kind} {best}"


def report_shape(config: FitConfig, store: TokenStore) -> tuple[str, int, int]:
    """(split, batch size, batches per source) for the reports of train and finetune."""
    split = "val" if len(store.tokens["val"]) > 1 else "train"
    rows = max(1, config.batch_size // (config.grad_accum * launched("WORLD_SIZE")))  # what fits
    n = getattr(config, "report_samples", 256) / (rows * len(store.sources))
    return split, rows, math.ceil(n)


def say_result(run: Run, folder: RunFolder, best: str, before: dict | None) -> None:
    """Report on the best checkpoint, say if the last one knows the training data better, and
    suggest what to type next."""
    config, store, p = run.config, run.store, run.progress
    split, batch_size, max_batches = report_shape(config, store)
    after = report(load_model(best), store, run.rt, split, batch_size, max_batches)
    note("\n".join(report_lines(after, before)))
    last, knows_more = str(folder.file("last.pth")), False
    if "answers" in after and p.best_step < p.step:
        known = after["answers"]["train"]["exact"]
        limit = max_batches * batch_size * len(store.sources)
        asked = Evaluation(load_model(last), store, run.rt, batch_size)
        exact = asked.answers("train", limit)["exact"]
        knows_more = exact > known + 0.05
    if knows_more:
        note(f"{last} answers {exact:.0%} of the training questions exactly, {best} (lowest loss "
             f"on held-out data) {known:.0%}: use {last} to ask about the training data")  # fmt: skip
    data = ["--data_dir", str(store.folder)]
    if store.meta["pairs"]:  # other commands refuse such a store
        name = "hf_dataset" if config.hf_dataset else "data_dir"
        data = [f"--{name}", getattr(config, name)]
    hints = [["eval", best, *data, *([] if run.val else ["--split", "train"])]]
    hints += [["sample", best, *example_flags(store, "val" if run.val else "train")]]
    hints += [["export", best]]
    if knows_more:
        hints += [["sample", last, *example_flags(store, "train")]]
    note("next:")
    for command, file, *flags in hints:
        note(f"  python llm_pipeline.py {shlex.join([command, '--ckpt', file, *flags])}")


def train_loop(config: TrainConfig, rt: Runtime, stop: StopSignal, folder: RunFolder) -> str:
    """Train from scratch, from --init_from, or from last.pth. Returns the path of best.pth."""
    if config.minutes and not folder.state:
        return train_within_minutes(config, rt, stop, folder)
    if config.minutes:
        note("--resume keeps the run's number of steps, whatever --minutes says")
    return run_fit(new_run(config, rt, stop, folder), folder)


def new_run(config: TrainConfig, rt: Runtime, stop: StopSignal, folder: RunFolder) -> Run:
    """A run of `train`, ready for its next step."""
    if folder.state:
        loaded = restored(folder.state)
    else:
        chosen = ["tokenizer", "vocab_size", "epochs", "max_steps", "batch_size", "block_size", "lr",
                  "dropout", "token_dropout", "answer_weight", "sampled_softmax"]  # fmt: skip
        if config.tokenizer != "bpe":  # only BPE is trained to a size
            chosen.remove("vocab_size")
        values = ", ".join(f"{name} {getattr(config, name)}" for name in chosen)
        note(f"recipe {config.recipe}: {values}")
        loaded = pretrained(config) if config.init_from else None
    store = open_store(config, rt, loaded, bool(folder.state))
    if not loaded:
        set_seed(config.seed)  # measurements may have drawn numbers
        model = GPT(model_config(config, store.tokenizer.vocab_size))
        loaded = Loaded(model, store.tokenizer, {})
    for f in fields(ModelSettings):
        setattr(config, f.name, getattr(loaded.model.config, f.name))
    return make_run(config, rt, stop, folder, loaded, store)


def pretrained(config: TrainConfig) -> Loaded:
    """--init_from's model, with the settings that may be changed. Raises UserError for others."""
    loaded = load_model(config.init_from)
    own = asdict(loaded.model.config)
    asked = config.explicit & own.keys() - {"block_size", "vocab_size", *OVERRIDABLE}
    clash = [name for name in asked if getattr(config, name) != own[name]]
    if clash:
        raise UserError(f"--init_from {config.init_from} sets {', '.join(clash)}: leave these out")
    if "block_size" in config.explicit or config.block_size < own["block_size"]:
        resize_block(loaded.model, config.block_size)
    loaded.model = with_settings(loaded.model, config)
    loaded.state = loaded.state | {"lora": None, "base": None}  # the base's, not the new run's
    return loaded


# --- train --minutes: a run that ends on time ---

# Sizes to choose from, smallest first, unless the user sets one of SIZES.
RUNGS = (
    dict(preset="cpu-debug", n_head=2, n_embd=64, batch_size=16),
    dict(preset="cpu-debug", n_embd=128, batch_size=16),
    dict(preset="cpu-debug", n_layer=4, n_embd=128, batch_size=16),
    dict(preset="cpu-debug", n_layer=4, batch_size=16),
    dict(preset="cpu-debug", n_layer=6, n_head=6, n_embd=384, batch_size=16),
    dict(preset="tiny-8g"),
    dict(preset="small-16g"),
    dict(preset="gpt2-124m"),
)
SIZES = {"preset", "init_from", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner"}
# A size beats the one before it from about this many tokens per weight of its blocks, or a quarter
# of that if the smaller one has already used up the text (tests/bench/README.md). Chinchilla's 20
# is far more, but these runs have few steps.
ENOUGH = 1
PASSES = 5  # more passes over a text teach hardly anything (Muennighoff et al., 2023)


def choose_size(explicit: dict, n_bytes: int, rt: Runtime, seconds: float) -> dict:
    """The largest of RUNGS that sees enough tokens of the text in `seconds`."""
    if explicit.keys() & SIZES:
        return {}
    speed, chosen, used_up = rt.world_size * training_speed(rt), {}, False
    for rung in RUNGS:
        size = settle(TrainConfig, rung | explicit)
        vocab_size, bytes_a_token = likely_tokens(size.tokenizer, size.vocab_size)
        model = shape_of_model(model_config(size, vocab_size))
        tokens = seconds * speed / (6 * model.n_params())
        most = PASSES * n_bytes / bytes_a_token or math.inf
        needed = ENOUGH * sum(p.numel() for p in model.blocks.parameters())
        if chosen and min(tokens, most) < (needed / 4 if used_up else needed):
            break
        chosen, used_up = rung, tokens >= most
    return chosen


def training_speed(rt: Runtime) -> float:
    """Floating-point operations per second when training a small model, at the best of six steps:
    a moment when the machine is busy must not make the plan too small."""
    model = GPT(GPTConfig(block_size=128, n_layer=2, n_head=4, n_embd=256, dropout=0.0))
    x = torch.zeros(16 if rt.device.type == "cpu" else 256, 128, dtype=torch.int64)
    model, x = model.to(rt.device), x.to(rt.device)

    def step() -> None:
        with rt.autocast():
            loss = model.losses(x, x, "sum")
        loss.backward()
        float(model.tok_emb.weight.grad[0, 0])  # waits for a GPU to finish

    least = min(seconds_of(step) for _ in range(6))
    return rt.of_first(6 * model.n_params() * x.numel() / least)


def seconds_of(work: Callable, *args) -> float:
    began = time.perf_counter()
    work(*args)
    return time.perf_counter() - began


class Clock:
    """Keeps a run within its minutes. Called after each step, it moves the end of the run and of
    its schedule if the machine has become slower or faster."""

    def __init__(
        self, config: TrainConfig, rt: Runtime, stop: Stop, folder: RunFolder, minutes: float
    ):
        """Measures a trial run, which is then discarded: a fiftieth of the time, at least four
        steps, plus one validation batch and a save."""
        self.rt, self.minutes = rt, minutes
        self.recent: list[float] = []  # seconds of the latest steps
        with contextlib.redirect_stderr(io.StringIO()):  # the real run prints the same
            run = new_run(config, rt, stop, folder)
        batches, took, look, per_epoch = steps(run.train, 0), [], 0.0, len(run.train)
        with training_precision(rt.device):
            while len(took) < 4 or (len(took) < 50 and rt.of_first(sum(took)) < 1.2 * minutes):
                took.append(seconds_of(lambda: train_step(run, next(batches).to(rt.device))))
            if run.val:
                look = seconds_of(estimate_loss, run, islice(run.val, 1)) * len(run.val)
        scratch = folder.path / f".last.pth.{os.getpid()}.tmp"  # `open_run` removes such files
        save = seconds_of(save_run, run, folder.about, scratch)
        del run.save  # it is part of a reference cycle, and the run's memory is needed now
        if rt.is_main:
            scratch.unlink()
        step, look, save = map(rt.of_first, (float(np.median(took[1:])), look, save))
        looks = 1 / config.eval_interval + 1 / per_epoch  # per step
        self.step_seconds = step
        self.overhead = (look + save) * looks + save / config.save_interval  # per step
        # Seconds for the last evaluation, the last saves and the report.
        self.end = 2 * (look + save) + 1
        passes = config.epochs if "epochs" in config.explicit else PASSES
        self.most = max(passes * per_epoch, FEWEST_STEPS)  # more steps would teach little

    def steps(self, slowed: float = 1.0) -> int:
        """How many more steps fit if everything takes `slowed` times as long as measured."""
        left = self.rt.of_first(self.rt.started + 58.5 * self.minutes - time.perf_counter())
        return int((left / slowed - self.end) / (self.step_seconds + self.overhead))

    def after_step(self, run: Run, seconds: float) -> None:
        p = run.progress
        self.recent = [*self.recent, seconds][-max(10, p.total // 10) :]
        if p.step % 10 or p.step == p.total:
            return
        slowed = self.rt.of_first(float(np.mean(self.recent)) / self.step_seconds)
        total = min(p.step + max(1, self.steps(slowed)), self.most)
        moved = abs(total - p.total) * slowed * (self.step_seconds + self.overhead)  # seconds
        if moved > 0.04 * 60 * self.minutes:
            p.total = run.recorder.bar.total = run.config.max_steps = total


def train_within_minutes(
    config: TrainConfig, rt: Runtime, stop: StopSignal, folder: RunFolder
) -> str:
    """Train a model of a size, and for a number of steps, that fit into --minutes.

    Its config.json repeats the run bit for bit, unless the clock had to move the run's end. Raises
    UserError if not even one step fits.
    """
    explicit, minutes = {n: getattr(config, n) for n in config.explicit}, config.minutes
    explicit["recipe"] = config.recipe
    del explicit["minutes"]
    base = pretrained(config) if config.init_from else None
    open_store(config, rt, base)  # builds the corpus if necessary
    left = rt.of_first(rt.started + 60 * minutes - time.perf_counter())
    explicit = choose_size(explicit, corpus_facts(vars(config)).n_bytes, rt, left) | explicit
    trial = settle(TrainConfig, explicit | {"self_test": False})
    clock = Clock(trial, rt, stop, folder, minutes)
    planned = min(clock.steps(), clock.most)
    if planned < 1:
        raise UserError(f"--minutes {minutes:g} leaves no time for a step: evaluating and saving "
                        f"take {clock.end:.1f} s: give more")  # fmt: skip
    config = settle(TrainConfig, explicit | {"max_steps": planned, "threads": trial.threads})
    config.minutes = minutes
    speed = config.batch_size * config.block_size / clock.step_seconds
    why = ", since more would teach little" if planned == clock.most else ""
    note(f"minutes {minutes:g}: {planned:,} steps{why}, {speed:,.0f} tokens per second")
    run = new_run(config, rt, stop, folder)
    run.after_step = partial(clock.after_step, run)
    best = run_fit(run, folder)
    if rt.is_main:
        again, moved = folder.file("config.json"), ""
        if config.max_steps != planned:
            write_json(again, read_table(again, str(again)) | {"max_steps": config.max_steps})
            moved = f" (the clock moved its end from step {planned}, and the schedule with it)"
        note(f"for the same {config.max_steps} steps: --config {again} --out_dir ANOTHER{moved}")
    return best


# --- preferences: DPO and ORPO ---


class PreferenceDataset(Dataset):
    """Pairs of responses to one prompt: adjacent records, chosen then rejected. A sample is the
    two records' samples.

    run: the run that trains on them. base: `losses` of the base model, for DPO.
    """

    run: Run | None = None
    base: Callable | None = None

    def __init__(self, store: TokenStore, split: str, block_size: int):
        self.answers = InstructionDataset(store, split, block_size, "response")
        self.lengths, self.n_cut = self.answers.lengths.reshape(-1, 2).max(1), self.answers.n_cut

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple:
        first = 2 * range(len(self))[i]
        return self.answers[first], self.answers[first + 1]

    def collate(self, samples: list[tuple]) -> Batch:
        """A batch of pairs, (B, 2, T)."""
        batch = self.answers.collate(list(chain.from_iterable(samples)))
        if not samples:  # the one row of an empty batch becomes a pair
            batch = Batch(batch.x.expand(2, -1), batch.y.expand(2, -1))
        x, y = (t.unflatten(0, (-1, 2)) for t in batch)
        batch = Batch(x, y, n_targets=float(len(samples)))
        if self.base:
            rt = self.run.rt
            with torch.no_grad(), rt.autocast():
                batch.reference = pair_log_probs(self.base, batch.to(rt.device)).cpu()
        return batch


def pair_log_probs(losses: Callable, batch: Batch) -> Tensor:
    """Log-probabilities of the responses, (B, 2)."""
    flat = losses(batch.x.flatten(0, 1), batch.y.flatten(0, 1))
    return -flat.sum(-1).view(-1, 2)


def preference_loss(losses: Callable, batch: Batch, config) -> tuple[Tensor, dict]:
    """Direct preference optimisation (Rafailov et al., 2023, eq. 7), summed over pairs.

    The reward is implicit: how much more likely the model makes a response than the base does.
    """
    log_probs = pair_log_probs(losses, batch)
    reference = torch.zeros_like(log_probs) if batch.reference is None else batch.reference
    reward = config.dpo_beta * (log_probs - reference)
    margin = reward[:, 0] - reward[:, 1]  # chosen over rejected
    stats = {
        "reward_margin": margin.sum(),
        "reward_accuracy": (margin > 0).float().sum(),
        "chosen_loss": (-log_probs[:, 0] / (batch.y[:, 0] != IGNORE).sum(-1)).sum(),
    }
    return -F.logsigmoid(margin).sum(), stats


def orpo_loss(losses: Callable, batch: Batch, config) -> tuple[Tensor, dict]:
    """Odds ratio preference optimisation (Hong et al., 2024, eq. 6 and 7), summed over pairs.

    The chosen answer's mean loss per token, as in supervised tuning, plus a term that favours its
    odds p / (1 - p) over the rejected one's; p is the geometric mean of the token probabilities.
    """
    mean = pair_log_probs(losses, batch) / (batch.y != IGNORE).sum(-1)  # (B, 2), log p
    log_odds = mean - torch.log(-torch.expm1(mean.clamp(max=-1e-6)))
    ratio = log_odds[:, 0] - log_odds[:, 1]
    loss = -mean[:, 0] - config.orpo_lambda * F.logsigmoid(ratio)
    stats = {
        "log_odds_ratio": ratio.sum(),
        "accuracy": (ratio > 0).float().sum(),
        "chosen_loss": -mean[:, 0].sum(),
    }
    return loss.sum(), stats


# --- reward: GRPO ---


def same_number(prompt: str, answer: str, truth: str) -> bool:
    found = [re.findall(r"-?\d[\d,]*(?:\.\d+)?", text) for text in (answer, truth)]
    last = [float(numbers[-1].replace(",", "")) for numbers in found if numbers]
    return len(last) == 2 and last[0] == last[1]


# What an answer is worth: (prompt, answer, truth) -> a number; the texts are stripped.
REWARDS = {
    "exact": lambda prompt, answer, truth: answer == truth,
    "number": same_number,
    "contains": lambda prompt, answer, truth: truth in answer,
}


def find_reward(name: str) -> Callable:
    """A row of REWARDS, or the function that FILE.py:function names. Raises UserError."""
    if name in REWARDS:
        return REWARDS[name]
    file, _, function = name.rpartition(":")
    try:
        return runpy.run_path(file)[function]
    except Exception as error:  # whatever the user's file raises
        ways = "exact, number, contains or FILE.py:function"
        raise UserError(f"--reward {name}: {one_line(error)}; use {ways}") from None


@dataclass
class AnswerBatch(Batch):
    """A model's answers, each token weighted by its answer's advantage. Validation has no weights:
    it judges the answers and learns nothing."""

    stats: Tensor | None = None  # (B, 2): what each row adds to reward and length, times n_targets


def grpo_loss(losses: Callable, batch: AnswerBatch, config) -> tuple[Tensor, dict]:
    """Group relative policy optimisation (Shao et al., 2024), on-policy: no ratio, no clipping.

    The next-token loss weighted by advantages; with --kl_beta, plus Schulman's estimate (2020) of
    the divergence from the base, r - 1 - log r. In validation, the share of wrong answers.
    """
    reward, length = batch.stats.sum(0)
    stats = {"reward": reward, "length": length}
    if batch.weight is None:
        return batch.n_targets - reward, stats
    nll = losses(batch.x, batch.y)
    loss = (nll * batch.weight).sum()
    if batch.reference is not None:
        log_ratio = (nll + batch.reference) * (batch.y != IGNORE)  # of the base over the model
        loss = loss + config.kl_beta * (log_ratio.exp() - 1 - log_ratio).sum()
    return loss, stats


class PromptDataset(Answers):
    """Prompts that the model answers as they are collated into a batch, for GRPO.

    The weight of an answer's tokens is its advantage: its reward minus the mean reward of the
    prompt's answers. In validation, greedy answers are judged. A prompt is cut to leave room for
    max_new_tokens, but keeps half of the block. run: its model answers; seed, step and prompt
    determine the draws. judge: the reward. base: `losses` of the frozen base. Raises UserError if
    the split has no prompts.
    """

    run: Run | None = None
    judge: Callable | None = None
    base: Callable | None = None

    def __init__(self, store: TokenStore, split: str, block_size: int, max_new_tokens=64):
        super().__init__(store, split)
        self.block_size, self.max_new_tokens = block_size, max_new_tokens
        if not len(self):
            raise UserError(f"the {split} split holds no prompts: GRPO needs instruction records")
        self.longest = max(block_size + 1 - max_new_tokens, -(-block_size // 2))  # of a prompt
        prompts = self.rows["prompt"].astype(np.int64)
        self.lengths = np.minimum(prompts, self.longest)
        self.n_cut = int((prompts > self.longest).sum())

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(prompt, true answer), ids each; the model sees only the prompt."""
        prompt, truth = super().__getitem__(i)
        return fit_record(prompt, truth[:0], self.longest)[0], truth

    @torch.no_grad()
    def answers(self, samples: list[tuple], n: int, temperature: float) -> list[list]:
        """n answers to each prompt, as ids, each with the separator if it ended with one. Prompts
        of equal length are answered together."""
        run, sep = self.run, self.store.tokenizer.sep_id
        same_length, written = defaultdict(list), [[] for _ in samples]
        for row, (prompt, _) in enumerate(samples):
            same_length[len(prompt)].append(row)
        run.model.eval()
        for length, rows in same_length.items():
            x = torch.from_numpy(np.stack([samples[row][0] for row in rows])).to(run.rt.device)
            seeds = [derive_seed(run.config.seed, run.progress.step, *ids) for ids in x.tolist()]
            room = min(self.max_new_tokens, self.block_size + 1 - length)
            steps = list(generate(run.model, x, room, (sep,), n, seeds, temperature=temperature))
            for i, answer in enumerate(zip(*steps, strict=True)):  # -1 once it has ended
                answer = [*answer[: answer.index(-1)], sep] if -1 in answer else list(answer)
                written[rows[i // n]].append(answer)
        run.model.train(self.split == "train")
        return written

    def rewards(self, samples: list, answers: list[list]) -> np.ndarray:
        """(prompts, answers to each). Raises UserError if the user's function fails."""
        decode, table = self.store.tokenizer.decode, []
        try:
            for (prompt, truth), group in zip(samples, answers, strict=True):
                asked, wanted = decode(prompt).strip(), decode(truth).strip()
                table.append([self.judge(asked, decode(ids).strip(), wanted) for ids in group])
            return np.asarray_chkfinite(table, float)
        except Exception as error:
            raise UserError(f"--reward failed: {one_line(error)}") from error

    def collate(self, samples: list[tuple]) -> AnswerBatch:
        config, rt, training = self.run.config, self.run.rt, self.split == "train"
        n, temperature = (config.num_generations, config.temperature) if training else (1, 0.0)
        answers = self.answers(samples, n, temperature)
        rewards = self.rewards(samples, answers)
        tokens = float(sum(len(ids) for group in answers for ids in group))
        advantages = rewards - rewards.mean(1, keepdims=True) if training else rewards
        if training and config.grpo_normalize:
            advantages /= rewards.std(1, keepdims=True) + 1e-4
        rows = self.weighted_rows(samples, answers, advantages) if training else []
        batch = pad(rows, self.store.tokenizer.pad_id, self.block_size)
        if not training:
            stats = torch.tensor([[rewards.sum(), tokens]], dtype=torch.float32)
            return AnswerBatch(*batch, n_targets=float(len(samples)), stats=stats)
        # Means over all processes' answers, spread evenly over the rows. Multiplied by this
        # process's tokens, since the loop sums all processes' rows and divides by all tokens.
        *sums, n = rt.sum(rewards.sum(), tokens, rewards.size)
        stats = torch.tensor([sums], dtype=torch.float32).expand(len(batch.x), 2)
        stats = stats / n * tokens / len(batch.x)
        batch = AnswerBatch(*batch, batch.weight, n_targets=tokens, stats=stats)
        if self.base:
            with torch.no_grad(), rt.autocast():
                batch.reference = -self.base(*batch.to(rt.device)).cpu()
        return batch

    def weighted_rows(self, samples: list, answers: list[list], advantages: np.ndarray) -> list:
        """(x, y, weight) of each answer with a nonzero weight. Equal answers to a prompt become
        one, their weights added. --kl_beta keeps every answer."""
        rows = []
        for (prompt, _), group, gains in zip(samples, answers, advantages, strict=True):
            weights = Counter()
            for k, (answer, gain) in enumerate(zip(group, gains, strict=True)):
                weights[tuple(answer), k if self.base else 0] += gain
            for (answer, _), weight in weights.items():
                ids = torch.tensor([*prompt.tolist(), *answer])
                answered = torch.arange(1, len(ids)) >= len(prompt)
                y = ids[1:].masked_fill(~answered, IGNORE)
                rows.append((ids[:-1], y, answered * float(weight)))
        kept = [row for row in rows if self.base or row[2].any()]
        return kept or rows[:1]  # a batch needs a row


OBJECTIVES |= {"dpo": preference_loss, "orpo": orpo_loss, "grpo": grpo_loss}


def tuned_from(config: FinetuneConfig, base: Loaded, folder: RunFolder) -> Loaded:
    """The model to train: the base under this run's settings, or the one in the folder's state."""
    lora, usual = lora_settings(config), {}
    needs_base = config.objective == "dpo" or config.kl_beta > 0  # it is part of the loss
    if config.objective != "ntp":  # answers and the base's likelihoods use none either
        usual = dict(dropout=0.0, token_dropout=0.0)
    if folder.state:
        model = restored(folder.state).model
    else:
        model = with_settings(base.model, config, **usual)
        if needs_base:  # they share their weights so far, and the base's must not change
            model = copy.deepcopy(model)
        if lora:
            add_lora(model, lora)
    for name, p in model.named_parameters():
        p.requires_grad = not lora or "lora_" in name
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    note(f"training {trained:,} of {model.n_params():,} parameters")
    digest = weights_digest(base.model) if needs_base else None
    return Loaded(model, base.tokenizer, {"lora": lora, "base": digest})


def finetune_loop(config: FinetuneConfig, rt: Runtime, stop: StopSignal, folder: RunFolder) -> str:
    """Tune --ckpt, or resume last_finetune.pth. Returns the path of best_finetune.pth."""
    if config.objective == "grpo" and config.fsdp:
        raise UserError("GRPO cannot write answers with sharded weights: leave out --fsdp")
    judge = find_reward(config.reward) if config.objective == "grpo" else None
    base = load_model(config.ckpt, block_size=config.block_size)
    pairs = dataset_of(config) is PreferenceDataset
    store = open_store(config, rt, base, bool(folder.state), pairs)
    base.model.to(rt.device).eval().requires_grad_(False)
    before = None
    if config.report_samples and not config.overfit_batch:
        before = report(base, store, rt, *report_shape(config, store))
    tuned = tuned_from(config, base, folder)
    if not tuned.state["base"]:
        base.model.cpu()  # frees memory on a GPU; on a CPU the two share their weights
    run = make_run(config, rt, stop, folder, tuned, store)
    for loader in filter(None, (run.train, run.val)):
        loader.dataset.run, loader.dataset.judge = run, judge
        loader.dataset.base = base.model.losses if tuned.state["base"] else None
    return run_fit(run, folder, before)


# --- eval ---


@dataclass
class EvalConfig(CheckpointConfig, RuntimeConfig):
    """Measure a checkpoint: loss, perplexity, bits per byte, exact answers and classes."""

    dtype: str = option("float32", "precision of matrix products", choices=DTYPES)
    split: str = option("val", "records to evaluate", choices=("val", "train", "all"))
    batch_size: int = option(32, "sequences at a time", low=1, high=2**20)
    max_batches: int = option(0, "evenly spaced batches per source (0: all)", low=0)
    json: str = option("", "write the figures to this file")


def eval_command(config: EvalConfig, rt: Runtime, stop: StopSignal) -> dict:
    """Print and return the report of section 14 on --ckpt and the data."""
    loaded = load_model(config.ckpt, block_size=config.block_size)
    store = open_store(config, rt, loaded)
    for split in ("train", "val") if config.split == "all" else (config.split,):
        n_records, n_tokens = len(store.whole_records(split)), len(store.tokens[split])
        place = config.hf_dataset or config.data_dir
        note(f"scoring {place}: {n_records:,} {split} records, {n_tokens:,} tokens")
    note(what_it_was_trained_on(config, loaded, store))
    choose_threads(config, rt, loaded.model.config, config.batch_size)
    result = report(loaded, store, rt, config.split, config.batch_size, config.max_batches)
    if rt.is_main:
        print("\n".join(report_lines(result)))
        if config.json:
            write_json(config.json, result)
    return result


def what_it_was_trained_on(config: EvalConfig, loaded: Loaded, store: TokenStore) -> str:
    """Whether the checkpoint may have been trained on the data it is scored on."""
    trained_on = loaded.state.get("data", {}).get("fingerprint")
    if trained_on is None:
        return "this checkpoint does not say what it was trained on"
    if trained_on == store.fingerprint:
        return "this is the data that the checkpoint was trained on; val was held out"
    what = "this is not the data that the checkpoint was trained on"
    names = [name for name in INHERITED if name != "add_special_tokens"]
    if any(getattr(config, name) != loaded.split_settings[name] for name in names):
        return f"warning: {what}, and the split differs: it may have been trained on any of it"
    keeps = "a record in both keeps its side of the split, except a lone text, one over 64 KiB"
    return f"{what}; {keeps} or one in a file named train, valid or test"


# --- sample and chat ---


@dataclass
class SampleConfig(RuntimeConfig):
    """Generate text; in an interactive session if there is a terminal and no --prompt."""

    dtype: str = option("float32", "precision of weights and matrix products", choices=DTYPES)
    compile: str = option("off", "torch.compile (auto: off)", choices=("auto", "off", "on"))
    ckpt: str = option("ckpts/best.pth", "checkpoint, or Hugging Face folder or name")
    prompt: str | None = option(None, "text to continue, or the instruction")
    input: str = option("", "the instruction's input")
    system: str = option("", "system text before the instruction")
    template: str = option(
        "auto", "prompt as text (raw) or as an instruction (auto: if trained on answers)",
        choices=("auto", "raw", "instruct"),
    )  # fmt: skip
    max_new_tokens: int = option(80, "longest output, in tokens", low=1, high=10**9)
    temperature: float = option(0.9, "0: always the most likely token", low=0.0, high=100.0)
    top_k: int = option(30, "keep the k most likely tokens (0: all)", low=0)
    top_p: float = option(1.0, "keep the most likely tokens that sum to p", above=0.0, high=1.0)
    min_p: float = option(0.0, "drop tokens below p times the most likely", low=0.0, high=1.0)
    repetition_penalty: float = option(1.0, "on tokens seen before", above=0.0, high=100.0)
    stop: str = option("", r"stop at this text (\n means a newline)")
    num_samples: int = option(1, "number of samples, from one prefill", low=1, high=4096)


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # see `sample_next`


def sample_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 80,
    temperature: float = 0.9, top_k: int = 30, **settings,
) -> str:  # fmt: skip
    """The text that a model puts after `prompt`, which is used as is.

    It ends after max_new_tokens, or when the model ends it. settings: others of `SampleConfig`,
    such as top_p and seed. Raises UserError if one is unknown or out of range.
    """
    settings |= dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    config, training = settle(SampleConfig, settings | {"template": "raw"}), model.training
    model.eval()
    try:
        return "".join(stream_text(Loaded(model, tokenizer, {}), config, prompt))
    finally:
        model.train(training)


def is_instruct(loaded: Loaded, config: SampleConfig) -> bool:
    """Whether a prompt is an instruction; "auto" looks at the flags and at the model's training."""
    asked = [f"--{name}" for name in ("input", "system") if getattr(config, name)]
    if asked and config.template == "raw":
        raise UserError(f"{asked[0]} is part of the template: leave out --template raw")
    if config.template == "auto":
        return bool(asked) or loaded.expects_template
    return config.template == "instruct"


def stream_text(
    loaded: Loaded, config: SampleConfig, prompt: str, turns: list[ChatTurn] | None = None
) -> Iterator[str]:
    """What the model puts after a prompt or, if that is an instruction, after the conversation
    that ends with it; `turns`, the conversation before it, loses its oldest if it is too long.

    One sample comes in pieces, as they become certain; several samples come whole. An answer comes
    without the space before it and the newline after it.
    """
    is_answer = is_instruct(loaded, config)
    if is_answer:
        ids = question_ids(loaded, config, prompt, [] if turns is None else turns)
    else:
        ids = text_ids(loaded, prompt)

    def text(tokens: Iterable[int]) -> Iterator[str]:
        pieces = text_pieces(tokens, loaded.tokenizer, unescape(config.stop), ids)
        return answer_text(pieces) if is_answer else pieces

    idx = torch.tensor([ids], device=next(loaded.model.parameters()).device)
    how = (config.max_new_tokens, loaded.tokenizer.end_ids, config.num_samples, config.seed)
    steps = generate(loaded.model, idx, *how, **{name: getattr(config, name) for name in SAMPLING})
    if config.num_samples == 1:
        yield from text(token for (token,) in steps)
    else:
        yield from ("".join(text(tokens)) for tokens in zip(*steps, strict=True))


def text_ids(loaded: Loaded, prompt: str) -> list[int]:
    """Ids of a text to continue."""
    ids = [*loaded.prefix, *loaded.tokenizer.encode(prompt).tolist()]
    if not ids:
        raise UserError("this model's texts begin without a special token: give it a --prompt")
    if len(ids) > (size := loaded.model.config.block_size):
        note(f"the prompt has {len(ids):,} tokens and the context {size:,}: only its end is read")
    return ids


def question_ids(
    loaded: Loaded, config: SampleConfig, prompt: str, turns: list[ChatTurn]
) -> list[int]:
    """Ids of a conversation up to the answer to `prompt`.

    To leave room for an answer in the context, the oldest turns are left out and deleted from
    `turns`, then the middle of the instruction is, as in training; a note says so.
    """
    block_size, question = loaded.model.config.block_size, ChatTurn(prompt, config.input, None)
    room = block_size - min(config.max_new_tokens, block_size // 8)
    while True:
        ids = conversation_ids(loaded.tokenizer, [*turns, question], config.system)
        if len(ids) <= room:
            return ids
        sizes = f"has {len(ids):,} tokens and the context {block_size:,}"
        if not turns:
            note(f"the prompt {sizes}: its middle is left out, to make room for an answer")
            return fit_record(np.array(ids), np.empty(0, np.int64), room)[0].tolist()
        note(f"the conversation {sizes}: its oldest turn is left out")
        del turns[0]


def text_pieces(
    tokens: Iterable[int], tokenizer: Tokenizer, stop: str = "", before: Sequence[int] = ()
) -> Iterator[str]:
    """The text of tokens as it becomes certain: whole characters, and no beginning of `stop`.

    It ends at `stop` or at a negative token. before: the ids that precede the tokens.
    """
    before, ids = list(before)[-8:], []  # ids: tokens that are not text yet
    held = ""  # text that may be the beginning of `stop`
    for token in takewhile(lambda token: token >= 0, tokens):
        ids.append(token)
        piece = tokenizer.decode(ids, before)
        if piece.endswith("\ufffd") and len(ids) < 8:  # perhaps half a character
            continue
        before, ids, held = ids, [], held + piece
        if stop and stop in held:
            break
        keep = max((n for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    held += tokenizer.decode(ids, before)
    yield held.split(stop)[0] if stop else held


def answer_text(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of a response without what `instruction_response` puts around the answer."""
    held, started = "", False
    for piece in pieces:
        text = held + piece
        if not started and text:
            text, started = text.removeprefix(" "), True
        held = "\n" if text.endswith("\n") else ""  # perhaps the last one
        yield text.removesuffix("\n")


class Chat:
    """A session with one model: a conversation if it was trained on answers, else single texts."""

    def __init__(self, loaded: Loaded, config: SampleConfig):
        self.loaded, self.config = loaded, config
        self.turns: list[ChatTurn] = []
        self.asked = 0  # in the whole session

    def ask(self, line: str) -> Iterator[str]:
        """Pieces of what follows a line; an answer joins the conversation."""
        self.asked += 1  # a new seed for each line: only --seed repeats a session
        config = replace(self.config, seed=derive_seed(self.config.seed, self.asked))
        self.config, answer = replace(self.config, input=""), ""
        try:
            for piece in stream_text(self.loaded, config, line, self.turns):
                answer += piece
                yield piece
        finally:
            if is_instruct(self.loaded, config):
                self.turns.append(ChatTurn(line, config.input, answer))

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash, except /quit. Raises UserError."""
        word, _, text = line.removeprefix("/set ").removeprefix("/").partition(" ")
        if word in ("input", "system", "max_new_tokens", "stop", "seed", *SAMPLING):
            value = checked(SampleConfig, word, text.strip())
            config = replace(self.config, **{word: value})
            if word in ("input", "system") and is_instruct(self.loaded, config):
                config.template = "instruct"  # for the following lines too
            self.config = config
        elif word == "help":
            note(CHAT_HELP)
        elif word != "new":
            raise UserError(f"there is no command {line}; /help lists them")
        if word in ("new", "system"):
            self.turns = []


CHAT_HELP = f"""\
/input TEXT      give the next instruction an input
/system TEXT     begin a new conversation with this system text (or without one)
/new             begin a new conversation
/set NAME VALUE  for example /set temperature 0.5; also {", ".join(SAMPLING[1:])},
                 max_new_tokens, stop, seed
/help            show this
/quit            end the session, as ctrl-d or an empty line does; ctrl-c ends an answer"""


def chat_session(loaded: Loaded, config: SampleConfig) -> None:
    """Read prompts from the terminal and answer them until an empty line or the end of input."""
    with contextlib.suppress(ImportError):  # arrow keys and history; Windows has no such module
        import readline  # noqa: F401
    if "seed" not in config.explicit:
        config.seed = int.from_bytes(os.urandom(4), "little")
    if config.num_samples > 1:
        raise UserError("--num_samples needs --prompt: a session continues from a single answer")
    chat = Chat(loaded, config)
    kind = "a conversation" if is_instruct(loaded, config) else "text to continue"
    note(f"{kind}; /help lists the commands; --seed {config.seed} repeats this session")
    with contextlib.suppress(EOFError):
        while (line := input("> ")) and line.strip() != "/quit":
            if line.startswith("/"):
                try:
                    chat.command(line)
                except UserError as error:
                    note(str(error))
                continue
            with (
                contextlib.suppress(KeyboardInterrupt),
                contextlib.closing(chat.ask(line)) as pieces,
            ):
                show(pieces)


def show(pieces: Iterable[str]) -> None:
    """Print pieces of text as they come, then a newline."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def sample_command(config: SampleConfig, rt: Runtime, stop: StopSignal) -> None:
    loaded, prompt = load_model(config.ckpt), config.prompt
    for_decoding(loaded.model, rt.device, rt.dtype, config.compile == "on")
    if prompt is None and sys.stdin.isatty():
        chat_session(loaded, config)
        return
    if prompt is None:
        prompt = sys.stdin.read().removesuffix("\n")  # from `echo ... | sample`
    pieces = stream_text(loaded, config, prompt)
    if config.num_samples == 1:
        show(pieces)
        return
    for number, text in enumerate(pieces, 1):
        note(f"--- sample {number}")
        print(text, flush=True)


# --- prepare ---


DOWNLOADS = {  # name: (address, {file under data_dir: sha256}), or the flags that read it
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        {"tinyshakespeare/input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    ),
    "sms_spam": (
        "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
        {"sms_spam_collection/SMSSpamCollection": "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"},
    ),
    "instructions": (
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/"
        "01_main-chapter-code/instruction-data.json",
        {"instruction-data.json": "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"},
    ),
    "wikitext-2": (
        "https://wikitext.smerity.com/wikitext-2-v1.zip",
        {"wikitext-2/wiki.train.tokens": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
         "wikitext-2/wiki.valid.tokens": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
         "wikitext-2/wiki.test.tokens": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"},
    ),
    "wikitext-2-raw-v1": "--hf_dataset Salesforce/wikitext --hf_config wikitext-2-raw-v1 --join_rows",
    "wikitext-103-raw-v1": "--hf_dataset Salesforce/wikitext --hf_config wikitext-103-raw-v1 --join_rows",
    "fineweb-sample": "--hf_dataset HuggingFaceFW/fineweb --hf_config sample-10BT --streaming --max_tokens 10000000",
}  # fmt: skip


@dataclass
class PrepareConfig(TokenizerConfig, DataConfig, RuntimeConfig):
    """Turn raw text or a Hugging Face dataset into a token store, and report on it."""

    out_dir: str = option("", "the store's folder (default: under processed_dir)")
    block_size: int = option(256, "tokens per block of the sample batch", low=2, high=2**20)
    download: str = option(
        "", "only fetch this public data set into data_dir", choices=("", *DOWNLOADS)
    )
    save_raw: bool = option(False, "keep the rows of --hf_dataset as files under data_dir")
    preview: int = option(0, "show N training samples token by token", low=0)
    check_model: str = option("", "run a batch through this AutoModelForCausalLM")


def download(name: str, data_dir: Path) -> str:
    """Fetch a public data set into data_dir, or print the flags that read it from the Hub.

    Fetches nothing twice. Returns the folder or file to train on. Raises UserError.
    """
    if isinstance(DOWNLOADS[name], str):
        note(f"{name} is on the Hub; this reads it from there:")
        print(f"python llm_pipeline.py prepare {DOWNLOADS[name]}")
        return ""
    address, digests = DOWNLOADS[name]
    files = {data_dir / file: digest for file, digest in digests.items()}
    there = [path for path in files if path.is_file()]
    if {path: content_digest(path, "sha256") for path in there} != files:
        by_hand = f"run the same command again, or provide {', '.join(map(str, files))} by hand"
        with library_errors(f"{name}: cannot fetch {address} ({by_hand})"):
            fetch(address, files)
    first = next(iter(files))
    place = first if first.parent == data_dir else first.parent
    note(f"next: python llm_pipeline.py train --data_dir {shlex.quote(str(place))} --minutes 5")
    print(*files, sep="\n")
    return str(place)


def fetch(address: str, files: dict[Path, str]) -> None:
    """Write `files`, {path: sha256}, from a file or an archive at an address. Raises ValueError."""
    note(f"fetching {address}")
    with tempfile.TemporaryDirectory() as folder:
        fetched = Path(folder) / "fetched"
        torch.hub.download_url_to_file(address, str(fetched))
        if address.endswith(".zip"):
            shutil.unpack_archive(fetched, folder, "zip")
        for path, digest in files.items():
            source = next(Path(folder).rglob(path.name), fetched)
            if content_digest(source, "sha256") != digest:
                raise ValueError(f"the sha256 of {path.name} differs")
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(source.read_bytes())


def saved_raw(config: PrepareConfig) -> PrepareConfig:
    """Save the rows of each split as a file under data_dir. Returns settings that read these."""
    name = Path(config.hf_dataset).name
    folder = Path(config.data_dir) / (f"{name}-{config.hf_config}" if config.hf_config else name)
    folder.mkdir(parents=True, exist_ok=True)
    room = 8 * config.max_tokens or math.inf  # bytes that --max_tokens may need
    for split, data in hub_splits(config).items():
        rows = dataset_rows(data, f"{config.hf_dataset} {split}")
        with atomic_write(folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', split)}.jsonl") as file:
            for _, row in islice(rows, config.max_docs or None):
                line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
                room -= file.write(line.encode("utf-8", "replace"))
                if room < 0:
                    break
        if room < 0:  # the next split would have one row
            break
    note(f"saved the rows of {config.hf_dataset} in {folder}")
    return replace(config, data_dir=str(folder), hf_dataset="", streaming=False)


def prepare_command(config: PrepareConfig, rt: Runtime, stop: StopSignal) -> str:
    """Make a store, or download data. Returns the store's folder, or what was downloaded."""
    if config.download:
        return download(config.download, Path(config.data_dir))
    if config.save_raw:
        config = saved_raw(config)
    folder = Path(config.out_dir) if config.out_dir else None
    store = build_corpus_from_sources(config=config, folder=folder)
    result, batch = store_report(store), sample_batch(store, config.block_size)
    write_json(store.folder / "report.json", result)
    write_json(store.folder / "sample_batch.json", batch)
    for name, value in result.items():
        print(f"{name:<28}{value:>16,}")
    if not is_store(config.data_dir):
        print(streaming_speed(config, store.tokenizer))
    if config.preview:
        preview(store, config.block_size, config.preview)
    if config.check_model:
        print(check_model(config.check_model, torch.tensor(batch["input_ids"])))
    place = shlex.quote(str(store.folder))
    note(f"python plot_curves.py {place} plots the lengths of the records")
    note(f"next: python llm_pipeline.py train --data_dir {place}")
    print(store.folder)
    return str(store.folder)


def store_report(store: TokenStore) -> dict[str, float]:
    """The contents of report.json: counts, tokenizing speed, and the lengths of records."""
    meta, total = store.meta, Counter()
    for row in meta["counts"].values():
        total.update(row)
    figures = {"records read": total["records"]}
    for what, n in total.items():
        if what.startswith("skipped: "):
            figures[f"dropped, {what.removeprefix('skipped: ')}"] = n
    for split, index in store.index.items():
        figures[f"records, {split}"] = n_records = len(store.whole_records(split))
        if len(index) > n_records:  # conversations
            figures[f"answers, {split}"] = len(index)
            figures[f"answers not trained, {split}"] = len(store.masked(split))
        figures[f"tokens, {split}"] = meta["tokens"][split]
    if total["unknown_tokens"]:
        figures["tokens unknown"] = total["unknown_tokens"]
    tokens, seconds = sum(meta["tokens"].values()), max(meta["seconds"]["encoding"], 1e-9)
    figures["vocabulary"] = store.tokenizer.vocab_size
    figures["bytes per token"] = round(total["bytes"] / tokens, 3)
    figures["tokens per second"] = round(tokens / seconds)
    figures["megabytes per second"] = round(total["bytes"] / 1e6 / seconds, 1)
    lengths = np.repeat([int(n) for n in meta["lengths"]], list(meta["lengths"].values()))
    for percent in (5, 25, 50, 75, 95, 100):
        length = np.percentile(lengths, percent, method="inverted_cdf")
        figures[f"tokens in a record, {percent}%"] = int(length)
    return figures


def streaming_speed(config: PrepareConfig, tokenizer: Tokenizer) -> str:
    """How fast raw records become batches, from reading to tensors."""
    records = corpus_records(config, Report())
    texts = (text for record, _ in records for text in record_texts(record))
    blocks = TokenBlocks(texts, tokenizer, config.block_size)
    loader = DataLoader(blocks, batch_size=4, generator=torch.Generator())
    started = time.perf_counter()
    sizes = [batch["input_ids"].numel() for batch in islice(loader, 25)]
    seconds = time.perf_counter() - started
    what = f"streamed {len(sizes)} batches of 4 x {config.block_size} in {seconds:.2f} s"
    return f"{what}: about {sum(sizes) / seconds:,.0f} tokens/s"


def sample_batch(store: TokenStore, block_size: int) -> dict[str, list]:
    """Up to four blocks of training tokens as Hugging Face models take them: labels not shifted."""
    tokens = store.tokens["train" if len(store.tokens["train"]) else "val"]
    width = min(block_size, len(tokens))
    n_rows = min(4, len(tokens) // width)
    rows = tokens[: n_rows * width].reshape(n_rows, width).tolist()
    texts = [store.tokenizer.decode(row) for row in rows]
    mask = np.ones((n_rows, width), int).tolist()
    return {"input_ids": rows, "labels": rows, "attention_mask": mask, "text": texts}


def preview(store: TokenStore, block_size: int, n: int) -> None:
    """Print training samples token by token: position, id, whether it is trained on, text."""
    data = InstructionDataset(store, "train", block_size, loss_on="response")
    for i in evenly_spaced(len(data), n):
        ids, weight = data.record(i)
        print(f"sample {i} of --loss_on response: {len(ids)} tokens")
        for place, token in enumerate(ids.tolist()):
            state = "trained" if weight[place] else "masked"
            print(f"{place:>6}{token:>8}  {state:<8}{store.tokenizer.decode([token])!r}")


def check_model(name: str, ids: Tensor) -> str:
    """A Hugging Face model's loss on a batch with unshifted labels: by its shift, and by ours."""
    what = f"--check_model {name} on ids up to {ids.max()}, --block_size {ids.shape[1]}"
    with library_errors(what):
        model = transformers_library().AutoModelForCausalLM.from_pretrained(name).eval()
        with torch.no_grad():
            out = model(input_ids=ids, labels=ids)
    ours = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    shapes = f"ids {tuple(ids.shape)} -> logits {tuple(out.logits.shape)}"
    if not abs(out.loss.item() - ours.item()) <= 1e-3 * max(1.0, ours.item()):
        found = f"its loss is {out.loss:.4f}, but should be {ours:.4f}"
        raise UserError(f"--check_model {name}: {found}: it does not shift labels as expected")
    return f"{name}: {shapes}, loss {out.loss:.4f}, by our own shift {ours:.4f}"


# --- export ---


@dataclass
class ExportConfig(RuntimeConfig):
    """Write a Hugging Face folder or a GGUF file that computes what the checkpoint computes."""

    ckpt: str = option("ckpts/best.pth", "checkpoint to export")
    out_dir: str = option("export", "folder to write")
    gguf: str = option("", "write this GGUF file, for llama.cpp, instead of a folder")
    gguf_type: str = option("f16", "type of its matrices", choices=tuple(GGUF_TYPES))
    adapter: bool = option(False, "write only the LoRA adapter, for peft")
    base_model: str = option("", "the adapter's base: its exported folder or its name on the Hub")


def export_command(config: ExportConfig, rt: Runtime, stop: StopSignal) -> str:
    """Write the export, check it, and return its path."""
    target = Path(config.gguf or config.out_dir)
    refuse_to_replace(target)  # before a model is loaded
    loaded = load_model(config.ckpt, merge=not config.adapter)
    if config.gguf:
        export_gguf(loaded, target, config.gguf_type)
    else:
        with write_beside(target) as new:
            if config.adapter:
                export_adapter(loaded, new, config.base_model)
            else:
                export_model(loaded, new)
    print(target)
    return str(target)


# --- bench ---


@dataclass
class BenchConfig(PresetConfig, TokenizerConfig, ModelSettings, OptimConfig, RuntimeConfig):
    """Measure speed and memory of a preset on this machine."""

    dtype: str = option("auto", "precision of matrix products", choices=DTYPES)
    vs: str = option("", "compare with Hugging Face transformers", choices=("", "hf"))
    rounds: int = option(5, "measured rounds; medians are reported", low=1, high=1000)
    decode_batch: int = option(1, "sequences decoded at once", low=1, high=4096)
    json: str = option("", "write the figures to this file")


def measure(
    what: str, sides: dict[str, Callable], tokens: int, rt: Runtime, rounds: int
) -> tuple[dict, float]:
    """Median tokens per second of each side, and the fewest seconds of the side "product".

    The sides take turns, A B A B ..., so that drift affects them alike. The first two rounds warm
    up, compile and fill caches; they do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    synchronize = torch.get_device_module(rt.device).synchronize
    for _ in tqdm(range(rounds + 2), desc=f"measuring {what}"):
        for name, side in sides.items():
            synchronize()
            started = time.perf_counter()
            side()
            synchronize()
            times[name].append(time.perf_counter() - started)
    least = min(times.pop("product")[2:])
    speed = {name: tokens / sorted(t[2:])[rounds // 2] for name, t in times.items()}
    result = {f"{name}{what}_tokens_per_s": each for name, each in speed.items()}
    if "hf_" in speed:
        result[f"{what}_ratio"] = speed[""] / speed["hf_"]
    return result, least


def flops_per_token(model: GPT, T: int) -> float:
    """Forward and backward: 6 per parameter in matrix products, 12 L T H D for attention.

    Chowdhery et al. (2022), appendix B; embeddings are looked up, not multiplied.
    """
    c = model.config
    used = sum(p.numel() for b in model.blocks for p in b.parameters()) + model.head.weight.numel()
    return 6 * used + 12 * c.n_layer * T * c.n_head * c.head_dim


def bench_training(config: BenchConfig, rt: Runtime, model: GPT) -> dict:
    """Speed of `train`'s own step (over the whole vocabulary), its share of the speed of matrix
    products (MFU), and peak memory."""
    total = 10**9  # a long run: compiling pays off, the learning rate stays in its warm-up
    model.grad_checkpointing = config.grad_checkpointing
    losses = distribute(model, config, rt, total)
    run = Run(
        config=config, rt=rt, model=model, losses=losses, objective=next_token_loss,
        grad_sync=partial(grad_sync_context, model, losses),
        optimizers=make_optimizers(model, config),
        train=None, val=None, store=None, gradients=retry_on_oom,
        progress=Progress(total=total, grad_accum=config.grad_accum,
                          grad_checkpointing=config.grad_checkpointing),
        scaler=torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16),
    )  # fmt: skip
    # This process's share of a global batch; speed does not depend on the tokens.
    shape = config.batch_size // rt.world_size, config.block_size + 1
    ids = torch.randint(model.config.vocab_size, shape, device=rt.device)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def step() -> None:
        train_step(run, batch)
        run.progress.step += 1

    if rt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    step()
    memory = peak_memory(rt)  # before the peer exists
    n = 8192 if rt.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=rt.device, dtype=rt.dtype) for _ in range(2))
    sides = {"": step, "product": lambda: a @ b}
    if config.vs:
        sides["hf_"] = hf_step(run, batch)
    tokens = config.batch_size * config.block_size
    result, seconds = measure("train", sides, tokens, rt, config.rounds)
    speed = result["train_tokens_per_s"]
    reached = speed * flops_per_token(model, config.block_size) / rt.world_size
    peak = max(2 * n**3 / seconds, reached)  # other processes may have slowed the products
    return result | {
        "step_ms": 1e3 * tokens / speed, "matmul_peak_flops": peak, "mfu": reached / peak,
        "peak_memory_bytes": memory, "grad_accum": run.progress.grad_accum,
        "grad_checkpointing": run.progress.grad_checkpointing,
    }  # fmt: skip


def hf_step(run: Run, batch: Batch) -> Callable:
    """A training step of transformers' model the usual way: autocast, fused AdamW, clipping."""
    config, n_micro = run.config, run.progress.grad_accum
    peer = to_peer(GPT(run.model.config)).to(run.rt.device).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=config.lr, fused=True)

    def step() -> None:
        for micro in batch.split(n_micro):
            with run.rt.autocast():
                loss = peer(input_ids=micro.x, labels=micro.x).loss / n_micro
            loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), config.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_decoding(config: BenchConfig, rt: Runtime, model: GPT) -> dict:
    """Greedy decoding of half a block after a short prompt, and the limit set by bandwidth."""
    n, batch = config.block_size // 2, config.decode_batch
    idx = torch.arange(8, device=rt.device)[None]
    ours = for_decoding(GPT(model.config), rt.device, rt.dtype, config.compile == "on")
    # An fp32 matrix too large for the caches: its products reach the bandwidth limit everywhere.
    width = 16384 if rt.device.type == "cuda" else 8192
    a, b = (torch.randn(width, columns, device=rt.device) for columns in (width, 1))
    sides = {
        "": lambda: list(generate(ours, idx, n, (), batch, temperature=0.0)),
        "product": lambda: a @ b,
    }
    if config.vs:
        peer = to_peer(GPT(model.config)).to(rt.device, rt.dtype).eval()
        peer.generation_config.eos_token_id = None
        ids = idx.expand(batch, -1)
        how = dict(max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(ids))
        sides["hf_"] = lambda: peer.generate(ids, **how)
    result, seconds = measure("decode", sides, batch * n, rt, config.rounds)
    read = sum(t.nbytes for part in (ours.blocks, ours.head) for t in part.state_dict().values())
    limit = max(batch * a.nbytes / seconds / read, result["decode_tokens_per_s"])
    return result | {"decode_limit_tokens_per_s": limit}


def peak_memory(rt: Runtime) -> int:
    """Most bytes in use so far: allocated on CUDA, resident in the process on a CPU."""
    if rt.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bench_command(config: BenchConfig, rt: Runtime, stop: StopSignal) -> None:
    """Measure training and decoding against the machine's limits."""
    vocab_size = config.vocab_size
    if config.tokenizer != "bpe":
        vocab_size = load_tokenizer(config.tokenizer).vocab_size
    model = GPT(model_config(config, vocab_size)).to(rt.device)
    if config.self_test:
        self_test(model.config, rt)
    choose_threads(config, rt, model.config, config.batch_size // config.grad_accum)
    is_cuda = rt.device.type == "cuda"
    result = {
        "params": model.n_params(),
        "device": torch.cuda.get_device_name(rt.device) if is_cuda else platform.processor(),
        "dtype": str(rt.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    with training_precision(rt.device):
        result |= bench_training(config, rt, model)
    result |= bench_decoding(config, rt, model)
    if rt.is_main:
        for name, value in result.items():
            print(f"{name:<28}{value:,.6g}" if isinstance(value, float) else f"{name:<28}{value}")
        if config.json:
            write_json(config.json, result)


# ====================================================================================
# 16. Command line
#
# argparse, generated from the dataclasses: each field of a command's settings is a flag. Look at
# `settle`, which says where settings come from. The Python interface is at the end.
#
#     python llm_pipeline.py train --help_all               every flag, by topic
#     python llm_pipeline.py train --config runs/a/config.json --lr 1e-3
# ====================================================================================


COMMANDS = {  # name: its settings, its function
    "train": (TrainConfig, train_loop),
    "finetune": (FinetuneConfig, finetune_loop),
    "eval": (EvalConfig, eval_command),
    "sample": (SampleConfig, sample_command),
    "prepare": (PrepareConfig, prepare_command),
    "export": (ExportConfig, export_command),
    "bench": (BenchConfig, bench_command),
}
ALONE = {"sample", "prepare", "export"}  # under torchrun, only the first process runs these
# The flags that a command's -h shows: what a new user needs.
FIRST_FLAGS = """
    data_dir ckpt preset recipe arch tokenizer vocab_size minutes epochs max_steps batch_size lr
    block_size n_layer n_head n_embd method loss_on objective reward split max_batches prompt input template stop
    max_new_tokens temperature top_k top_p num_samples download hf_dataset preview gguf gguf_type
    adapter vs json threads out_dir resume config"""
# Settings that name a file or folder.
PATHS = {"data_dir", "processed_dir", "out_dir", "config", "ckpt", "init_from", "json", "gguf",
         "hf_dataset", "tokenizer", "base_model", "check_model", "reward"}  # fmt: skip
# Pairs of settings that exclude each other.
EXCLUSIVE = [("resume", "overwrite"), ("resume", "overfit_batch"), ("minutes", "overfit_batch"),
             ("minutes", "max_steps"), ("gguf", "adapter"), ("streaming", "answer_weight"),
             ("stride", "answer_weight")]  # fmt: skip
# What other programs call our settings: accepted in a --config file, suggested for a flag.
FOREIGN_NAMES = {theirs: ours for ours, names in {
    "block_size": "seq_length seq_len max_seq_length max_length context_length n_ctx n_positions",
    "n_layer": "num_hidden_layers num_layers n_layers", "n_kv_head": "num_key_value_heads",
    "n_head": "num_attention_heads num_heads n_heads heads", "n_inner": "intermediate_size d_ff",
    "n_embd": "hidden_size d_model n_embed embed_dim dim", "compile": "torch_compile",
    "lr": "learning_rate max_lr", "lr_schedule": "lr_scheduler_type", "eval_interval": "eval_steps",
    "batch_size": "per_device_train_batch_size train_batch_size", "max_steps": "max_iters",
    "grad_accum": "gradient_accumulation_steps accumulate_grad_batches",
    "grad_clip": "max_grad_norm gradient_clip_val", "grad_checkpointing": "gradient_checkpointing",
    "epochs": "num_train_epochs num_epochs max_epochs", "hf_dataset": "dataset_name",
    "hf_config": "dataset_config dataset_config_name", "hf_split": "dataset_split",
    "text_field": "text_column", "data_dir": "data_path", "out_dir": "output_dir save_dir",
    "ckpt": "model_name_or_path checkpoint model",
}.items() for theirs in names.split()}  # fmt: skip


def fields_of(cls: type) -> dict:
    """{name: field} of a settings class."""
    return {f.name: f for f in fields(cls)}


def unknown_setting(cls: type, name: str) -> str:
    """What to say about a setting that a command does not have."""
    owners = [word for word, (settings, _) in COMMANDS.items() if name in fields_of(settings)]
    if owners:
        return f"--{name} belongs to {', '.join(owners)}"
    near = difflib.get_close_matches(name, fields_of(cls), 1)
    if FOREIGN_NAMES.get(name) in fields_of(cls):
        near = [FOREIGN_NAMES[name]]
    hint = f"did you mean --{near[0]}?" if near else "--help_all lists them all"
    return f"unknown setting --{name}; {hint}"


def checked(cls: type, name: str, value, where: str = ""):
    """A setting's value, checked, from a flag, a file or a caller; None leaves it unset. Raises
    UserError, whose message begins with `where`."""
    spec = fields_of(cls).get(name)
    if not spec:
        raise UserError(where + unknown_setting(cls, name))
    if value is None:
        return None
    kind = spec.type.split(" | ")[0]
    choices = [word for word in spec.metadata.get("choices", ()) if word]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, bool) and "on" in choices:  # YAML reads these words as booleans
        value = "on" if value else "off"
    if kind == "bool":
        fits, wanted = isinstance(value, bool), "true or false"
    elif kind in ("int", "float"):
        value, fits, wanted = number_within(spec.metadata, kind, value)
    elif choices:
        value = str(value).lower()
        fits, wanted = value in (*choices, spec.default), f"one of {', '.join(choices)}"
    else:
        fits, wanted = isinstance(value, str) and "\0" not in value, "text (in a file: in quotes)"
    if not fits:
        raise UserError(f"{where}{name} must be {wanted}, not {str(value)[:80]!r}")
    return os.path.expanduser(os.path.expandvars(value)) if name in PATHS else value


def number_within(limits: dict, kind: str, value) -> tuple:
    """(value as a number, whether it is within a field's limits, what it must be)."""
    wanted = "a whole number" if kind == "int" else "a number"
    for name, word in dict(above="above", low="from", high="up to").items():
        if name in limits:
            wanted += f" {word} {limits[name]}"
    try:
        number = int(value) if kind == "int" else float(value)
    except (TypeError, ValueError, OverflowError):
        return value, False, wanted
    exact = isinstance(value, str) or (number == value and not isinstance(value, bool))
    within = limits.get("low", -(2**53)) <= number <= limits.get("high", 2**53)
    return number, exact and within and number > limits.get("above", -math.inf), wanted


def settle(cls: type, explicit: dict):
    """A command's settings: defaults < arch < preset < recipe < --config FILE < flags.

    explicit: {setting: value} from flags or a Python caller; None leaves a setting unset.
    Raises UserError.
    """
    explicit = {name: checked(cls, name, value) for name, value in explicit.items()}
    explicit = {name: value for name, value in explicit.items() if value is not None}
    if file := explicit.pop("config", ""):
        explicit = read_config(cls, file) | explicit
    for one, other in EXCLUSIVE:
        if explicit.get(one) and explicit.get(other):
            raise UserError(f"--{one} and --{other} exclude each other: leave one out")
    settings = {name: spec.default for name, spec in fields_of(cls).items()}
    if explicit.get("minutes"):
        settings["recipe"] = "fast"
    chosen = settings | explicit
    # A recipe may set an arch, so it is called first; `values` below has the order of precedence.
    preset = PRESETS.get(chosen.get("preset"), {})
    recipe_of = RECIPES[chosen.get("recipe", "classic")]
    if issubclass(cls, FinetuneConfig):  # the checkpoint's model, finetuning's rates
        preset = {n: v for n, v in preset.items() if n in ("batch_size", "grad_accum")}
        recipe_of = tuning_recipe
    recipe = recipe_of(settings | preset | explicit, explicit)
    arch = ARCHS.get((chosen | recipe | explicit).get("arch"), {})
    overfit = OVERFIT if explicit.get("overfit_batch") else {}
    values = settings | arch | preset | recipe | overfit | explicit
    config = cls(**{name: values[name] for name in settings})
    config.explicit = frozenset(explicit)
    if not explicit.get("resume"):  # with --resume, only once the run's settings are known
        cross_checks(config)
    return config


def take_up(config: FitConfig, folder: RunFolder) -> None:
    """Give `config` the resumed run's settings, except those that may change (see `option`).

    Raises UserError if a fixed setting would change.
    """
    stored = folder.state["config"]
    for name, spec in fields_of(type(config)).items():
        asked, kept = getattr(config, name), stored.get(name, spec.default)
        if name not in config.explicit:
            setattr(config, name, kept)
        elif spec.metadata["resume"] == "fixed" and asked != kept:
            start = f"{folder.start_flag} {folder.file('last.pth')}"
            way = f"leave it out, or start a new run in another --out_dir with {start}"
            raise UserError(f"--resume cannot change {name} (from {kept} to {asked}): {way}")


def read_table(file: Path, what: str) -> dict:
    """The table in a .json, .toml or .yaml file. Raises UserError; its text begins with `what`."""
    read = json.loads
    if file.suffix in (".yaml", ".yml"):
        read = optional("yaml", "pyyaml").safe_load
    elif file.suffix == ".toml":  # part of Python since 3.11
        read = optional("tomllib" if sys.version_info >= (3, 11) else "tomli").loads
    try:
        table = read(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}") from None
    except Exception as error:  # ValueError, RecursionError; pyyaml's share no standard base
        raise UserError(f"{what} is not valid: {one_line(error)}") from None
    if not isinstance(table, dict):
        raise UserError(f"{what} must hold one table, not a {type(table).__name__}")
    return table


def read_config(cls: type, path: str) -> dict:
    """{setting: value} of a --config file, however nested; null and empty text leave it unset.
    Settings of other commands are ignored: any run's config.json will do. Raises UserError."""
    own, found, left_out, where = fields_of(cls), {}, [], f"--config {path}"
    known = {name for settings, _ in COMMANDS.values() for name in fields_of(settings)}
    entries = list(read_table(Path(path), where).items())
    for leaf, value in entries:
        name = leaf if leaf in known else FOREIGN_NAMES.get(leaf, str(leaf))
        if name == "config":
            raise UserError(f"{where}: a file cannot name another with config: merge them into one")
        if name == "vocabulary":  # what a run's config.json says about its tokens
            continue
        if isinstance(value, dict):  # a section such as `training:`; its entries come later
            entries.extend(value.items())
        elif name in known - own.keys():
            left_out.append(name)
        else:
            value = checked(cls, name, None if value == "" else value, f"{where}: ")
            if value is not None and found.setdefault(name, value) != value:
                raise UserError(f"{where}: {name} appears twice, with two values: leave one out")
    if left_out:
        some = ", ".join(left_out[:4])
        note(f"{where}: left out {len(left_out)} settings of other commands ({some} ...)")
    return found


def cross_checks(config: Settings) -> None:
    """Raise UserError if settings that are valid by themselves do not go together."""
    if isinstance(config, ModelSettings):
        for problem in model_config(config).problems():
            raise UserError(problem)
    if isinstance(config, OptimConfig):
        size, parts = config.batch_size, config.grad_accum * launched("WORLD_SIZE")
        if size % parts:
            raise UserError(f"batch_size {size} is not divisible by grad_accum*processes, {parts}")
        if config.fsdp and config.compile == "on":
            raise UserError("--fsdp and --compile on exclude each other: leave one out")
    for name, objective in OBJECTIVE_OF.items() if isinstance(config, FinetuneConfig) else ():
        if objective != config.objective and getattr(config, name) != getattr(FinetuneConfig, name):
            raise UserError(f"--{name} needs --objective {objective}: set that, or leave it out")
    if getattr(config, "method", "full") == "lora" and config.optimizer == "muon":
        raise UserError("--optimizer muon does not suit LoRA's thin matrices: use adamw")
    if getattr(config, "objective", "ntp") != "ntp" and config.sampled_softmax:
        raise UserError(f"{config.objective} needs exact likelihoods: leave --sampled_softmax out")
    if getattr(config, "streaming", False) and not config.hf_dataset:
        raise UserError("--streaming needs a Hub dataset: pass one with --hf_dataset")
    ends = [getattr(config, n, 0) for n in ("max_steps", "max_tokens", "max_docs")]
    if isinstance(config, FitConfig) and config.streaming and not any(ends):
        raise UserError("a stream has no end: set --max_tokens or --max_steps")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", config.device):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {config.device!r}")


# --- flags ---


def program_parser(every_flag: bool) -> tuple[argparse.ArgumentParser, dict]:
    """The program's argparse parser, and each command's by name."""
    plain = argparse.RawDescriptionHelpFormatter
    usual = dict(formatter_class=plain, add_help=False, allow_abbrev=False)
    about, examples, *_ = __doc__.split("\n\n")
    program = argparse.ArgumentParser(Path(__file__).name, description=about, **usual)
    program.epilog = examples
    version = f"%(prog)s {__version__}, torch {torch.__version__}"
    program.add_argument("--version", action="version", version=version, help="print the version")
    program.add_argument("-h", "--help", "--help_all", action="help", help="print this page")
    commands = program.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (settings, _) in COMMANDS.items():
        about = settings.__doc__.split("\n")[0]
        lines = [line for line in examples.splitlines() if f".py {name} " in line]
        parser = commands.add_parser(name, help=about, description=about, **usual)
        parser.usage = f"{program.prog} {name} [--flag VALUE ...]"
        parser.epilog = "\n".join(["examples:", *lines])
        more = f"the most common flags; --help_all: all {len(fields(settings))}"
        parser.add_argument("-h", "--help", "--help_all", action="help", help=more)
        add_flags(parser, settings, every_flag)
    return program, commands.choices


def add_flags(parser: argparse.ArgumentParser, cls: type, every_flag: bool) -> None:
    """Add a flag for each field, grouped by the class that introduces it; `checked` parses it."""
    groups = {}
    for origin in cls.__mro__:
        title = "this command" if origin is cls else origin.__doc__.split("\n")[0].rstrip(".")
        groups[origin] = parser.add_argument_group(title)
    for spec in fields(cls):
        group = [groups[origin] for origin in groups if spec.name in vars(origin)][-1]
        about = spec.metadata["help"].replace("%", "%%")
        if spec.default not in ("", None) and spec.type != "bool":
            about += f" (default: {spec.default})"
        if not every_flag and spec.name not in FIRST_FLAGS.split():
            about = argparse.SUPPRESS
        add = partial(group.add_argument, dest=spec.name, default=argparse.SUPPRESS)
        if spec.type == "bool":  # only the one that changes the default is shown
            on, off = about, argparse.SUPPRESS
            if spec.default and about != argparse.SUPPRESS:
                on, off = off, f"turn off: {about}"
            add(f"--{spec.name}", action="store_true", help=on)
            add(f"--no_{spec.name}", action="store_false", help=off)
        else:
            kind = {"int": "N", "float": "X", "str": "TEXT"}[spec.type.split(" | ")[0]]
            choices = ",".join(filter(None, spec.metadata.get("choices", ())))
            add(f"--{spec.name}", metavar=f"{{{choices}}}" if choices else kind, help=about)


def parse(argv: list[str]) -> tuple[str, Settings]:
    """(command, its settings). A mistake prints the usage line and raises SystemExit(2)."""
    dashed = re.compile(r"^--\w[\w-]*(?==|\Z)")  # --max-steps=5 is --max_steps=5
    words = argv or ["--help"]
    words = [dashed.sub(lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]
    program, parsers = program_parser("--help_all" in words)
    try:
        flags, rest = program.parse_known_args(words)
    finally:
        sys.stdout.flush()  # help whose reader has gone fails here
    explicit = vars(flags)
    name = explicit.pop("command")
    cls, _ = COMMANDS[name]
    try:
        if rest and not rest[0].startswith("--"):
            way = "settings are given as --name value, text with spaces in quotes"
            raise UserError(f"unexpected {rest[0]!r}: {way}")
        if rest:
            raise UserError(unknown_setting(cls, rest[0].partition("=")[0].removeprefix("--")))
        return name, settle(cls, explicit)
    except UserError as error:
        parsers[name].error(str(error))


# --- main ---


def explanation(error: Exception) -> str:
    """The line that explains an error to the user."""
    if isinstance(error, UserError):
        return str(error)
    text = one_line(error, 300)
    memory = r"out of memory|can't allocate memory|not enough memory|calculation overflowed|too big"
    if isinstance(error, MemoryError) or re.search(memory, text):
        return "out of memory: lower --batch_size or --block_size, or raise --grad_accum"
    several = os.environ.get("WORLD_SIZE", "1") != "1"  # as text: it may be the cause of the error
    if several and re.search("(?i)gloo|nccl|connect|timed out", text):
        why = f"another process has ended or does not answer ({one_line(error, 90)})"
        return f"{why}: restart them all with --resume"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot continue: {error.filename or 'a file'}: {error.strerror}"
    return f"{type(error).__name__}: {text} (--debug shows where)"


def carry_out(function: Callable, config: Settings, stop: StopSignal):
    """Call a command's function with its runtime and, for a run, its folder."""
    with contextlib.ExitStack() as held:
        folder = []
        if isinstance(config, FitConfig):
            folder = [held.enter_context(open_run(config))]
            if folder[0].state:
                take_up(config, folder[0])
            if config.resume:
                cross_checks(config)
        rt = held.enter_context(runtime(config))
        return function(config, rt, stop, *folder)


def main(argv: list[str] | None = None) -> int:
    """Run one command; never raises an error that a user can fix.

    Exit codes: 0 done; 1 failed, with one line that says what to do; 2 bad usage (argparse's); 129,
    130 or 143 stopped by SIGHUP, SIGINT or SIGTERM with `last.pth` saved.
    """
    streams = {sys.stdin: "strict", sys.stdout: "replace", sys.stderr: "replace"}
    for stream, errors in streams.items():  # whatever the locale
        if hasattr(stream, "reconfigure"):  # a notebook's has no such method
            stream.reconfigure(encoding="utf-8", errors=errors)
    argv, stop = sys.argv[1:] if argv is None else argv, StopSignal()
    try:
        name, config = parse(argv)
        if name in ALONE and not is_main():
            return 0  # torchrun waits for the first process
        if name in ALONE:
            os.environ["WORLD_SIZE"] = "1"
        # In a `sample` session, ctrl-c ends only an answer.
        with contextlib.nullcontext() if name == "sample" else stop:
            carry_out(COMMANDS[name][1], config, stop)
        sys.stdout.flush()  # a full disk shows up here, while it can still be reported
        return 0
    except KeyboardInterrupt:  # includes Interrupted
        return 128 + (stop.number or signal.SIGINT)
    except BrokenPipeError:  # the reader has gone, as with `| head`: discard what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Exception as error:
        if "--debug" in argv:
            raise
        print(f"error: {explanation(error)}", file=sys.stderr)
        return 1


# --- the same from Python: import llm_pipeline as lp ---


def from_python(name: str, cls: type, function: Callable) -> Callable:
    """A command's function as one called `name`, with settings as keywords. It raises UserError if
    the command fails, and prints only to stderr."""

    def call(**settings):
        config, stop = settle(cls, settings), StopSignal()
        with stop, contextlib.redirect_stdout(sys.stderr):
            result = carry_out(function, config, stop)
        if stop:
            raise KeyboardInterrupt
        return result

    call.__name__, call.__qualname__, call.__doc__ = name, name, function.__doc__
    return call


# lp.train(data_dir="book.txt", preset="cpu-debug")
train = from_python("train", TrainConfig, train_loop)
finetune = from_python("finetune", FinetuneConfig, finetune_loop)
evaluate = from_python("evaluate", EvalConfig, eval_command)  # returns what `eval --json` writes
prepare = from_python("prepare", PrepareConfig, prepare_command)  # returns a --data_dir
export = from_python("export", ExportConfig, export_command)


class TextGenerator:
    """A checkpoint ready to write text: `lp.load("ckpts/best.pth").generate("Once", top_k=5)`."""

    def __init__(self, ckpt: str = "ckpts/best.pth", **settings):
        self.settings = {"ckpt": ckpt} | settings
        config = settle(SampleConfig, self.settings)
        with runtime(config) as rt:
            self.loaded = load_model(config.ckpt)
            for_decoding(self.loaded.model, rt.device, rt.dtype, config.compile == "on")
        if config.threads:  # for whatever is generated later, too
            torch.set_num_threads(config.threads)

    def generate(self, prompt: str, **settings) -> str | list[str]:
        """The text that follows `prompt`, or with num_samples=N > 1 a list of N texts.

        Settings are those of the `sample` command.
        """
        config = settle(SampleConfig, self.settings | settings)
        pieces = list(stream_text(self.loaded, config, prompt))
        return "".join(pieces) if config.num_samples == 1 else pieces


load = TextGenerator

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # torch is imported: can be caught
    sys.exit(main())
