"""Preferences and reward: DPO, ORPO, GRPO, against closed forms and from the command line."""

import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, differences, metrics, needs, run, run_together, tensors, words

import llm_pipeline as lp

# --- closed forms ---


def fixed(logits: torch.Tensor):
    """`losses` of a model whose logits are given: (rows, T, V)."""

    def losses(idx, targets):
        flat = logits.flatten(0, 1), targets.flatten()
        return F.cross_entropy(*flat, reduction="none", ignore_index=lp.IGNORE).view_as(targets)

    return losses


@pytest.fixture
def pairs() -> tuple:
    """Losses and a batch of three pairs of unequal answers; the log-probability and number of
    tokens of each answer."""
    torch.manual_seed(0)
    logits, y, said = torch.randn(6, 7, 11), torch.randint(0, 11, (6, 7)), []
    table = logits.double().log_softmax(-1)
    for row in range(6):
        y[row, : row % 4] = lp.IGNORE
        terms = [float(table[row, t, y[row, t]]) for t in range(row % 4, 7)]
        said.append((sum(terms), len(terms)))
    y = y.view(3, 2, 7)
    return fixed(logits), lp.Batch(torch.zeros_like(y), y, reference=torch.randn(3, 2) * 5), said


def test_dpo_is_the_closed_form(pairs):
    losses, batch, said = pairs
    loss, stats = lp.OBJECTIVES["dpo"](losses, batch, lp.FinetuneConfig(dpo_beta=0.3))
    gains = np.array([total for total, _ in said]) - batch.reference.flatten().numpy()
    margins = 0.3 * (gains[0::2] - gains[1::2])
    assert batch.n_targets == 3
    assert loss.item() == pytest.approx(np.log1p(np.exp(-margins)).sum(), rel=1e-5)
    assert stats["reward_margin"].item() == pytest.approx(margins.sum(), rel=1e-5)
    assert stats["reward_accuracy"].item() == (margins > 0).sum()


def test_orpo_is_the_closed_form(pairs):
    losses, batch, said = pairs
    loss, stats = lp.OBJECTIVES["orpo"](losses, batch, lp.FinetuneConfig(orpo_lambda=0.7))
    mean = np.array([total / n for total, n in said])
    odds = mean - np.log(1 - np.exp(mean))
    ratios = odds[0::2] - odds[1::2]
    wanted = -mean[0::2].sum() + 0.7 * np.log1p(np.exp(-ratios)).sum()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert stats["log_odds_ratio"].item() == pytest.approx(ratios.sum(), rel=1e-4)
    assert stats["accuracy"].item() == (ratios > 0).sum()


def test_orpo_is_trls(pairs):
    """Its odds-ratio term; TRL's likelihood counts the prompt too, ours the answer alone."""
    needs("trl")
    from trl.experimental.orpo import ORPOTrainer

    losses, batch, said = pairs
    mean = torch.tensor([total / n for total, n in said])
    trainer = SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu"))
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trainer, mean[0::2], mean[1::2])
    loss, _ = lp.OBJECTIVES["orpo"](losses, batch, lp.FinetuneConfig(orpo_lambda=0.7))
    assert loss.item() == pytest.approx((-mean[0::2] - theirs).sum().item(), rel=1e-5)


def test_orpo_survives_certainty():
    """An answer of probability one has infinite odds; loss and gradient stay finite."""
    logits = torch.full((2, 1, 3), -100.0)
    logits[:, 0, 0] = 100.0
    logits.requires_grad_()
    y = torch.zeros(1, 2, 1, dtype=torch.int64)
    loss, _ = lp.OBJECTIVES["orpo"](fixed(logits), lp.Batch(y, y), lp.FinetuneConfig())
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "answer", "truth", "worth"),
    [
        ("exact", "ham", "ham", 1),
        ("exact", "hams", "ham", 0),
        ("number", "so it is 1,234.0.", "1234", 1),
        ("number", "3 or 4", "3", 0),
        ("number", "none", "3", 0),
        ("number", "none", "none", 0),
        ("contains", "it is ham.", "ham", 1),
        ("contains", "spam", "ham", 0),
    ],
)
def test_rewards(name, answer, truth, worth):
    assert lp.find_reward(name)("prompt", answer, truth) == worth


# --- GRPO, from the command line ---

TASKS = [("Say a.", "a"), ("Say b.", "b"), ("Say c.", "c"), ("Say d.", "d")]
MODEL = words("--n_layer 1 --n_head 2 --n_embd 32 --block_size 96 --dropout 0")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list:
    """Flags of a corpus of sixty prompts of several lengths, each with one of four answers."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [
        {"instruction": task, "input": "x" * (i % 3), "output": answer, "id": i}
        for i, (task, answer) in enumerate(TASKS * 15)
    ]
    for i, row in enumerate(rows):
        row["input"] += str(i)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "tasks.jsonl").write_text(lines, encoding="utf-8")
    return ["--data_dir", folder / "tasks.jsonl", "--processed_dir", folder / "stores", *CPU,
            "--val_fraction", 0.3]  # fmt: skip


@pytest.fixture(scope="module")
def base(prompts, tmp_path_factory) -> Path:
    """A model that knows the form of an answer and guesses which."""
    folder = tmp_path_factory.mktemp("base")
    flags = words("--answer_weight 5 --batch_size 8 --max_steps 60 --lr 3e-3 --warmup_steps 5")
    run("train", *prompts, *MODEL, *flags, "--out_dir", folder).ok()
    return folder / "last.pth"


GRPO = words("--objective grpo --batch_size 8 --num_generations 4 --max_new_tokens 6 --max_steps 6 "
             "--log_interval 1 --eval_interval 3")  # fmt: skip


def grpo(prompts: list, base: Path, folder: Path, *more) -> list:
    return ["finetune", *prompts, "--ckpt", base, *GRPO, "--out_dir", folder, *more]


def test_grpo_learns_from_reward_alone(prompts, base, tmp_path):
    """The user's own reward, which no answer in the data earns: only samples can teach it."""
    (tmp_path / "taste.py").write_text(
        "def taste(prompt, answer, truth):\n"
        "    assert prompt.startswith('### Instruction: Say') and truth in 'abcd'\n"
        "    return answer.count('b') / 2\n"
    )
    flags = [
        "--reward",
        f"{tmp_path}/taste.py:taste",
        *words("--max_steps 30 --lr 1e-3 --muon_lr 3e-3"),
    ]
    result = run(*grpo(prompts, base, tmp_path / "run", *flags)).ok()
    rewards = [float(row["reward"]) for row in metrics(tmp_path / "run", "train", "_finetune")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
    assert all(float(row["length"]) <= 6 for row in metrics(tmp_path / "run", "train", "_finetune"))
    val = metrics(tmp_path / "run", "val", "_finetune")
    assert all(float(row["loss"]) == pytest.approx(1 - float(row["reward"])) for row in val)
    assert "reward" in result.err


@pytest.mark.parametrize("settings", [{}, {"grpo_normalize": True}, {"kl_beta": 0.5}], ids=str)
def test_grpo_is_the_weighted_next_token_loss(settings, prompts, base):
    """By hand, for each answer: its advantage times its tokens' loss, over the tokens of all.
    Merging equal answers and leaving out groups without variance change nothing."""
    loaded = lp.load_model(str(base))
    model, config = loaded.model, lp.FinetuneConfig(max_new_tokens=6, num_generations=6, **settings)
    store = lp.build_corpus_from_sources(prompts[1], loaded.tokenizer, processed_dir=prompts[3])
    data = lp.PromptDataset(store, "train", 96, max_new_tokens=6)
    rt = lp.Runtime(torch.device("cpu"), torch.float32)
    data.run = SimpleNamespace(model=model, config=config, rt=rt, progress=lp.Progress(step=3))
    with torch.no_grad():
        model.head.weight.mul_(4)  # more confident, so that some answers are equal
        reference = copy.deepcopy(model)
        reference.head.weight.mul_(0.9)
    data.base = reference.losses if config.kl_beta else None
    data.judge = lambda prompt, answer, truth: len(answer) + (answer == truth)
    samples = [data[i] for i in range(8)]
    batch = data.collate(samples)
    loss, stats = lp.OBJECTIVES["grpo"](model.losses, batch, config)

    answers = data.answers(samples, 6, config.temperature)
    wanted, n_tokens, total = 0.0, 0, 0.0
    for (prompt, truth), group in zip(samples, answers, strict=True):
        texts = [loaded.tokenizer.decode(ids).strip() for ids in group]
        truth = loaded.tokenizer.decode(truth.tolist()).strip()
        rewards = np.array([len(text) + (text == truth) for text in texts], float)
        advantages = rewards - rewards.mean()
        if config.grpo_normalize:
            advantages /= rewards.std() + 1e-4
        for ids, advantage in zip(group, advantages, strict=True):
            x = torch.tensor([[*prompt.tolist(), *ids]])
            nll = model.losses(x[:, :-1], x[:, 1:])[0, len(prompt) - 1 :]
            old = reference.losses(x[:, :-1], x[:, 1:])[0, len(prompt) - 1 :].detach()
            ratio = torch.exp(nll - old)  # p_base / p
            wanted = wanted + advantage * nll.sum()
            wanted = wanted + config.kl_beta * (ratio - 1 - ratio.log()).sum()
            n_tokens, total = n_tokens + len(ids), total + rewards.mean() / 6
    assert len(batch.x) < 48 or config.kl_beta
    assert batch.n_targets == n_tokens
    assert float(stats["reward"]) / n_tokens == pytest.approx(total / 8, rel=1e-5)
    assert float(stats["length"]) / n_tokens == pytest.approx(n_tokens / 48, rel=1e-5)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()))
    by_hand = torch.autograd.grad(wanted, list(model.parameters()))
    for name, one, two in zip(names, found, by_hand, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)


def test_same_command_same_answers_and_resumed_the_same(prompts, base, tmp_path):
    more = words("--dropout 0.1 --kl_beta 0.2")
    run(*grpo(prompts, base, tmp_path / "a", *more)).ok()
    run(*grpo(prompts, base, tmp_path / "b", *more, "--stop_after", 2)).ok()
    run("finetune", "--resume", "--out_dir", tmp_path / "b", "--ckpt", base).ok()
    assert not differences(tmp_path / "a/last_finetune.pth", tmp_path / "b/last_finetune.pth")
    other = run(*grpo(prompts, base, tmp_path / "c", *more, "--seed", 7)).ok()
    assert differences(tmp_path / "a/last_finetune.pth", tmp_path / "c/last_finetune.pth")
    assert other.out


def test_two_processes_write_the_same_answers(prompts, base, tmp_path):
    run(*grpo(prompts, base, tmp_path / "one")).ok()
    run_together(*grpo(prompts, base, tmp_path / "two"))
    for split in ("train", "val"):
        one, two = (metrics(tmp_path / n, split, "_finetune") for n in ("one", "two"))
        for name in ("reward", "length"):
            assert [float(row[name]) for row in one] == pytest.approx(
                [float(row[name]) for row in two], abs=1e-5
            )
    one, two = (tensors(tmp_path / n / "last_finetune.pth", ("weights",)) for n in ("one", "two"))
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-4


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("exactly", "--reward exactly"),
        ("missing.py:f", "FILE.py:function"),
        ("{tmp}/own.py:fails", "no such luck"),
        ("{tmp}/own.py:infinite", "--reward failed"),
    ],
)
def test_rewards_that_cannot_be(reward, said, prompts, base, tmp_path):
    (tmp_path / "own.py").write_text(
        "def fails(prompt, answer, truth):\n    raise ValueError('no such luck')\n"
        "def infinite(prompt, answer, truth):\n    return float('inf')\n"
    )
    flags = ["--reward", reward.format(tmp=tmp_path)]
    run(*grpo(prompts, base, tmp_path / "run", *flags)).fails(1, said)


def test_a_prompt_makes_room_for_the_answer_not_for_the_truth(tmp_path):
    rows = [{"instruction": "Say " + "a" * n, "output": "b" * 90} for n in (20, 200)] * 20
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = lp.build_corpus_from_sources(tmp_path / "tasks.jsonl", processed_dir=tmp_path / "s",
                                         val_fraction=0)  # fmt: skip
    data = lp.PromptDataset(store, "train", 96, max_new_tokens=10)
    whole = {len(lp.instruction_prompt("Say " + "a" * n).encode()) + 1 for n in (20,)}
    assert {len(prompt) for prompt, _ in (data[i] for i in range(len(data)))} == whole | {87}
    assert {len(truth) for _, truth in (data[i] for i in range(len(data)))} == {93}


def test_passes_may_be_asked_for_instead_of_steps():
    assert lp.settle(lp.FinetuneConfig, dict(objective="grpo")).max_steps == 400
    assert lp.settle(lp.FinetuneConfig, dict(objective="grpo", epochs=1)).max_steps == 0


def test_settings_of_an_objective_that_is_not_chosen(prompts, base, tmp_path):
    """GRPO has its own with any recipe; settings that only another objective reads are refused."""
    tuned = [lp.settle(lp.FinetuneConfig, {"objective": "grpo", "recipe": recipe})
             for recipe in ("classic", "fast")]  # fmt: skip
    assert tuned[0].muon_lr == tuned[1].muon_lr and tuned[1].max_steps == 400
    flags = ["finetune", *prompts, "--ckpt", base, "--out_dir", tmp_path / "run"]
    run(*flags, "--kl_beta", 0.1).fails(2, "--kl_beta", "grpo")
    run(*flags, "--objective", "dpo", "--orpo_lambda", 0.2).fails(2, "--orpo_lambda", "orpo")


def test_plain_text_has_no_prompts(base, tmp_path):
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 200)
    flags = ["--data_dir", tmp_path / "book.txt", "--processed_dir", tmp_path / "stores", *CPU]
    run(*grpo(flags, base, tmp_path / "run")).fails(1, "prompts")


# --- preferences, from the command line ---


def test_what_a_run_on_preferences_names_next_can_be_typed(base, tmp_path):
    """The hint names the raw data: the run's store holds rejected answers as well."""
    rows = [dict(prompt=f"Say {n}.", chosen=f"{n}", rejected="no") for n in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="utf-8")
    flags = ["--data_dir", tmp_path / "pairs.jsonl", "--processed_dir", tmp_path / "stores", *CPU]
    tune = words("--objective dpo --max_steps 2 --batch_size 4")
    result = run("finetune", "--ckpt", base, *flags, *tune, "--out_dir", tmp_path).ok()
    # A rejected answer is never the truth.
    counts = [re.findall(rf"(\d+) {name} answers", result.err) for name in ("held-out", "training")]
    assert sum(int(found[-1]) for found in counts) == 40
    truths = re.findall(r"^  truth +(.*)$", result.err, re.MULTILINE)
    assert len(truths) == 3 and all(truth.isdigit() for truth in truths)
    [hint] = [line for line in result.err.splitlines() if "llm_pipeline.py eval" in line]
    [store] = [path for path in (tmp_path / "stores").iterdir() if path.is_dir()]
    scores = run(*words(hint)[2:], "--processed_dir", tmp_path / "stores").ok()
    assert "eval" in hint and str(store) not in hint and scores.out
    again = ["--ckpt", base, "--data_dir", store, "--out_dir", tmp_path / "b", *CPU]
    run("finetune", *again).fails(1, "preference pairs", "raw data")
    run("finetune", *again, *tune).ok()
