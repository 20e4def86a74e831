"""`sample`: conversations that keep their cache, sessions, what an answer looks like."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PROGRAM, run
from test_decoding import MODERN, Parrot, make

import llm_pipeline as lp

RT = lp.Runtime(torch.device("cpu"), torch.float32)
SHAPES = {
    "gpt2": {},
    "gpt2, window": dict(attn_window=50),
    "modern, grouped": MODERN | dict(n_kv_head=2),
    "modern, window": MODERN | dict(attn_window=60),
    "alibi": dict(pos="alibi"),
}


def tuned(block_size=512, **shape):
    """A model with random weights that counts as tuned."""
    model = make(vocab_size=260, block_size=block_size, **shape)
    return lp.Loaded(model, lp.ByteTokenizer(), {"command": "finetune"})


def greedy(**more):
    return lp.SampleConfig(**dict(temperature=0.0, max_new_tokens=20) | more)


def rendered(turns, system=""):
    """A conversation's ids, written out by hand; the last answer is still to come."""
    text, ids = f"### System: {system}\n" if system else "", [257]
    for instruction, input, answer in turns:
        text += f"### Instruction: {instruction}\n### Input: {input}\n### Output:"
        ids += text.encode()
        text = ""
        if answer is not None:
            ids += [*f" {answer}\n".encode(), 259]
    return ids


def reply(model, ids, count=20):
    """The greedy answer without a cache from before, as text."""
    steps = lp.generate(model, torch.tensor(ids), count, (258, 259), temperature=0.0)
    text = lp.ByteTokenizer().decode([token for (token,) in steps if token >= 0])
    return text.removeprefix(" ").removesuffix("\n")


@pytest.mark.parametrize("name", SHAPES)
def test_three_turns_equal_the_conversation_rendered_at_once(name):
    loaded = tuned(**SHAPES[name])
    chat, turns, fed = lp.Chat(loaded, greedy(system="Be brief."), RT), [], []
    hidden = type(loaded.model).hidden

    def counted(self, idx, *rest, **more):
        fed.append(idx.shape[1])
        return hidden(self, idx, *rest, **more)

    for question in (("Name a bird.", ""), ("Which colour?", "a robin"), ("Another <|sep|>?", "")):
        prompt = rendered([*turns, (*question, None)], "Be brief.")
        wanted = reply(loaded.model, prompt)
        loaded.model.hidden = counted.__get__(loaded.model)
        assert "".join(chat.ask(*question)) == wanted
        del loaded.model.hidden
        turns.append((*question, wanted))
        assert chat.turns == turns
    assert len({answer for *_, answer in turns}) == 3
    if "window" not in name:  # the earlier turns were not fed again
        assert sum(fed) < len(prompt) + 3 * 20 + 3 * 8


def test_the_ids_of_a_conversation_are_those_of_the_template():
    turns = [("Größe?", "你好", "groß"), ("Again", "", "yes"), ("And", "x", None)]
    found = lp.conversation_ids(lp.ByteTokenizer(), turns, "Be kind.")
    assert found == rendered(turns, "Be kind.")


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_the_ids_of_a_conversation_are_those_of_a_store(tmp_path, system):
    turns = [("Größe?", "", "groß"), ("A literal <|sep|>", "", "yes\nno"), ("And", "", "so on")]
    messages = [{"role": "system", "content": system}] if system else []
    for question, _, answer in turns:
        messages += [{"role": "user", "content": question},
                     {"role": "assistant", "content": answer}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    config = lp.DataConfig(data_dir=str(tmp_path / "a.jsonl"), processed_dir=str(tmp_path / "p"),
                           val_fraction=1e-9)  # fmt: skip
    store = lp.build_corpus_from_sources(config, lp.ByteTokenizer())
    wanted = store.tokens["train"].tolist()
    assert lp.conversation_ids(lp.ByteTokenizer(), turns, system) == wanted


def test_a_new_system_text_and_an_edited_past_leave_no_trace_in_the_cache():
    loaded = tuned()
    chat = lp.Chat(loaded, greedy(), RT)
    "".join(chat.ask("one"))
    chat.system, chat.turns = "Other.", [("a", "b", "c")]
    wanted = rendered([("a", "b", "c"), ("two", "", None)], "Other.")
    assert "".join(chat.ask("two")) == reply(loaded.model, wanted)


def test_an_answer_that_was_broken_off_stays_in_the_conversation():
    loaded = tuned()
    chat = lp.Chat(loaded, greedy(), RT)
    pieces = chat.ask("one")
    said = "".join(next(pieces) for _ in range(5))
    pieces.close()
    assert chat.turns == [("one", "", said)]
    wanted = rendered([("one", "", said), ("two", "", None)])
    assert "".join(chat.ask("two")) == reply(loaded.model, wanted)


def test_the_oldest_turns_make_room_and_that_is_said(capsys):
    loaded = tuned(block_size=128)
    chat = lp.Chat(loaded, greedy(), RT)
    "".join(chat.ask("a" * 30))
    "".join(chat.ask("b" * 30))
    said = capsys.readouterr().err
    assert "oldest turn" in said and "128 tokens" in said
    (kept,) = chat.turns
    assert kept[0] == "b" * 30
    assert kept[2] == reply(loaded.model, rendered([("b" * 30, "", None)]))


@pytest.mark.parametrize("template", ["instruct", "raw"])
def test_a_prompt_longer_than_the_context_is_said(template, capsys):
    """An instruction loses its middle, as in training; of other text the end is read."""
    loaded, text = tuned(block_size=64), "".join(chr(97 + i % 26) for i in range(100))
    found = "".join(lp.sample_text(loaded, greedy(template=template), RT, text))
    assert "tokens and the context 64" in capsys.readouterr().err
    if template == "instruct":
        ids = rendered([(text, "", None)])
        kept = 64 - 64 // 8
        ids = ids[: kept - kept // 2] + ids[len(ids) - kept // 2 :]
        assert found == reply(loaded.model, ids)
    "".join(lp.sample_text(loaded, greedy(template=template), RT, "s"))
    assert "context" not in capsys.readouterr().err


# --- what an answer looks like ---


def parrot(text, template="auto", **settings):
    loaded = lp.Loaded(Parrot(text), lp.ByteTokenizer(), {"command": "finetune"})
    config = lp.SampleConfig(template=template, max_new_tokens=500, **settings)
    return list(lp.sample_text(loaded, config, RT, "x"))


@pytest.mark.parametrize("answer", ["ham", "two\nlines", "", " indented", "ends\n", "\n"])
def test_an_answer_loses_what_the_template_put_around_it(answer):
    text = lp.instruction_response(answer)
    assert "".join(parrot(text)) == answer
    assert "".join(parrot(text, num_samples=2)) == f"{answer}\n{answer}"
    assert "".join(parrot(text, template="raw")) == text


def test_an_answer_appears_as_it_is_made():
    assert [p for p in parrot(" two\nlines\n") if p] == [*"two", "\nl", *"ines"]


# --- a session at a terminal ---


@pytest.fixture(scope="module")
def tuned_checkpoint(tmp_path_factory, corpus, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("tuned")
    flags = ["--device", "cpu", "--dtype", "float32", "--max_steps", "2", "--batch_size", "4"]
    flags += ["--report_samples", "0", "--out_dir", folder]
    run("finetune", *corpus, "--ckpt", tiny_checkpoint, *flags).ok()
    return folder / "best_finetune.pth"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def session(monkeypatch):
    """Runs `sample` with lines typed at a terminal."""

    def typed(ckpt, *lines, flags=()):
        monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in lines)))
        flags = ["--max_new_tokens", 8, *flags]
        return run("sample", "--ckpt", ckpt, "--device", "cpu", *flags).ok()

    return typed


def answers(result):
    return [text for text in result.out.split("> ") if text.strip()]


def test_a_session_has_a_fresh_seed_that_can_be_repeated(tuned_checkpoint, session):
    first = session(tuned_checkpoint, "hello")
    other = session(tuned_checkpoint, "hello")
    assert first.out != other.out
    seed = re.search(r"--seed (\d+)", first.err)[1]
    again = session(tuned_checkpoint, "hello", flags=("--seed", seed))
    assert again.out == first.out


@pytest.mark.parametrize("template", ["auto", "raw"])
def test_the_same_prompt_is_not_answered_alike_twice(tuned_checkpoint, session, template):
    flags = ("--seed", "5", "--template", template, "--max_new_tokens", 30, "--top_k", 0)
    said = answers(session(tuned_checkpoint, "hi", "/new", "hi", "/new", "hi", flags=flags))
    assert len(said) == 3 == len(set(said))


def test_the_commands_of_a_session(tuned_checkpoint, session, monkeypatch):
    asked = []

    def ask(self, instruction, input=""):
        self.turns.append((instruction, input, "yes"))
        asked.append((self.system, list(self.turns)))
        yield "yes"

    monkeypatch.setattr(lp.Chat, "ask", ask)
    lines = ["one", "/input some text", "two", "/input more", "", "/new", "three",
             "/system Be brief.", "four", "/help", "/nonsense", ""]  # fmt: skip
    result = session(tuned_checkpoint, *lines)
    one, two = ("one", "", "yes"), ("two", "some text", "yes")
    assert asked == [
        ("", [one]),
        ("", [one, two]),
        ("", [one, two, ("two", "more", "yes")]),
        ("", [("three", "", "yes")]),
        ("Be brief.", [("four", "", "yes")]),
    ]
    for command in ("/input", "/system", "/new", "/help", "/nonsense"):
        assert command in result.err


def test_a_base_model_goes_on_with_text(tiny_checkpoint, session):
    result = session(tiny_checkpoint, "sun", flags=("--temperature", "0"))
    single = run("sample", "--ckpt", tiny_checkpoint, "--prompt", "sun", "--temperature", "0",
                 "--device", "cpu", "--max_new_tokens", 8).ok()  # fmt: skip
    assert answers(result) == [single.out]


def test_several_samples_of_a_conversation_are_refused(tuned_checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("hello\n"))
    run("sample", "--ckpt", tuned_checkpoint, "--num_samples", 2).fails(1, "--num_samples")


def test_a_prompt_that_is_not_utf8_is_refused(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="latin-1"))
    run("sample", "--ckpt", tiny_checkpoint, "--device", "cpu").fails(1, "not UTF-8", "byte 2")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_ctrl_c_ends_an_answer_and_not_the_session(tiny_checkpoint):
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, PROGRAM, "sample", "--ckpt", tiny_checkpoint, "--device", "cpu",
               "--temperature", "0", "--max_new_tokens", "1000000"]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stdin=slave, stdout=slave,
                               stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    os.close(slave)
    shown = b""

    def read_until(found, within=60):
        nonlocal shown
        end = time.monotonic() + within
        while not found() and time.monotonic() < end:
            if select.select([master], [], [], 1)[0]:
                shown += os.read(master, 4096)
        assert found(), shown

    try:
        read_until(lambda: b"> " in shown)
        os.write(master, b"sun\r")
        read_until(lambda: len(shown) > 500)  # in the middle of an answer
        shown = b""
        process.send_signal(signal.SIGINT)
        read_until(lambda: shown.endswith(b"> "))
        os.write(master, b"\r")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_arrow_keys_bring_back_what_was_typed(tuned_checkpoint):
    pytest.importorskip("readline", reason="this Python was built without readline")
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, PROGRAM, "sample", "--ckpt", tuned_checkpoint, "--device", "cpu",
               "--max_new_tokens", "2"]  # fmt: skip
    terminal = dict(stdin=slave, stdout=slave, stderr=subprocess.STDOUT, start_new_session=True)
    process = subprocess.Popen(list(map(str, command)), env=os.environ | {"TERM": "xterm"},
                               **terminal)  # fmt: skip
    os.close(slave)
    shown = b""

    def read_until(text, within=60):
        nonlocal shown
        end = time.monotonic() + within
        while text not in shown and time.monotonic() < end:
            shown += os.read(master, 4096)
        assert text in shown, shown
        shown = shown.split(text, 1)[1]

    try:
        read_until(b"> ")
        os.write(master, b"first words\r")
        read_until(b"first words")
        read_until(b"> ")
        os.write(master, b"\x1b[A")
        read_until(b"first words")
        os.write(master, b"\r")
        read_until(b"> ")
        os.write(master, b"\r")
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(master)


# --- sampling ---


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-30])
def test_the_smallest_temperatures_take_the_likeliest(temperature):
    logits = torch.tensor([[0.5, 3.0, -1.0], [2.0, 1.999, 0.0]])
    drawn = lp.sample_next(logits, temperature, generator=torch.Generator().manual_seed(0))
    assert drawn.tolist() == [1, 0]


def test_a_cut_record_keeps_the_response_and_both_ends_of_the_prompt():
    prompt, response = np.arange(10), np.arange(100, 104)
    ids, n = lp.fit_record(prompt, response, 9)
    assert ids.tolist() == [0, 1, 2, 8, 9, 100, 101, 102, 103] and n == 5
    batch = lp.padded([(ids, n), (ids[:4], 1)], 7, 10)
    x, y = batch.x, batch.y
    assert x[0].tolist() == [0, 1, 2, 8, 9, 100, 101, 102, 7, 7]
    assert y[0].tolist() == [-100] * 4 + [100, 101, 102, 103] + [-100] * 2
    assert y[1].tolist() == [1, 2, 8] + [-100] * 7
