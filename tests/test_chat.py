"""`sample`: prompts and their template, conversations, sessions at a terminal."""

import io
import re

import pytest
import torch
from conftest import CPU, run

import llm_pipeline as lp


def tuned(block_size=512, **shape):
    """A model with random weights that counts as trained on answers."""
    lp.set_seed(0)
    shape = dict(n_layer=2, n_head=4, n_embd=32, dropout=0.0, init_std=0.3) | shape
    model = lp.GPT(lp.GPTConfig(vocab_size=260, block_size=block_size, **shape)).eval()
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


def written(model, ids, count=20):
    """What greedy decoding writes after ids."""
    steps = lp.generate(model, torch.tensor([ids]), count, (258, 259), temperature=0.0)
    return lp.ByteTokenizer().decode([token for (token,) in steps if token >= 0])


def reply(model, ids, count=20):
    return written(model, ids, count).removeprefix(" ").removesuffix("\n")


# --- prompts ---


def test_sample_text_is_what_the_model_generates():
    model, tokenizer = tuned().model, lp.ByteTokenizer()
    found = lp.sample_text(model, tokenizer, "Größe", max_new_tokens=12, temperature=0.0)
    assert found == written(model, [257, *"Größe".encode()], 12)
    model.train()
    draws = [lp.sample_text(model, tokenizer, "a", 40, top_k=50, seed=s) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2] and model.training
    for wrong in ({"top_p": 0}, {"temprature": 1}, {"seed": "x"}):
        with pytest.raises(lp.UserError, match=next(iter(wrong))):
            lp.sample_text(model, tokenizer, "a", **wrong)


@pytest.mark.parametrize(
    ("state", "flags", "instruct"),
    [
        ({"command": "finetune"}, {}, True),
        ({"command": "train"}, {}, False),
        ({"command": "train", "config": {"answer_weight": 0}}, {}, False),
        ({"command": "train", "config": {"answer_weight": 30}}, {}, True),
        ({}, {"input": "a message"}, True),
        ({}, {"system": "Be brief."}, True),
        ({}, {"template": "instruct"}, True),
        ({"command": "finetune"}, {"template": "raw"}, False),
    ],
)
def test_when_a_prompt_is_an_instruction(state, flags, instruct):
    loaded = tuned()
    loaded.state = state
    wanted = written(loaded.model, [257, *b"Say x."])
    if instruct:
        turn = ("Say x.", flags.get("input", ""), None)
        wanted = reply(loaded.model, rendered([turn], flags.get("system", "")))
    assert "".join(lp.stream_text(loaded, greedy(**flags), "Say x.")) == wanted


@pytest.mark.parametrize("template", ["instruct", "raw"])
def test_a_prompt_longer_than_the_context_is_said(template, capsys):
    """An instruction loses its middle, as in training; other text keeps its end."""
    loaded, text = tuned(block_size=64), "".join(chr(97 + i % 26) for i in range(100))
    found = "".join(lp.stream_text(loaded, greedy(template=template), text))
    assert "tokens and the context 64" in capsys.readouterr().err
    if template == "instruct":
        ids = rendered([(text, "", None)])
        kept = 64 - 64 // 8
        ids = ids[: kept - kept // 2] + ids[len(ids) - kept // 2 :]
        assert found == reply(loaded.model, ids)
    "".join(lp.stream_text(loaded, greedy(template=template), "s"))
    assert "context" not in capsys.readouterr().err


def test_a_prompt_from_a_pipe_loses_the_newline_of_echo(tiny_checkpoint, monkeypatch):
    flags = ["sample", "--ckpt", tiny_checkpoint, *CPU, "--temperature", 0]
    wanted = run(*flags, "--prompt", "sun\n moon").ok().out
    for piped in (b"sun\n moon\n", b"sun\n moon"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped)))
        assert run(*flags).ok().out == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="latin-1"))
    run(*flags).fails(1, "position 2")


# --- text from tokens ---


class Parrot(torch.nn.Module):
    """A model that writes `text`, one byte a step, whatever the prompt, and then ends."""

    def __init__(self, text):
        super().__init__()
        self.config = lp.GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=4096)
        self.tok_emb = torch.nn.Embedding(260, 2)
        self.script, self.step = [*text.encode(), 259], 0

    def hidden(self, idx, cache):
        cache.length += idx.shape[1]
        return torch.zeros(*idx.shape, 2)

    def head(self, h):
        logits = torch.full((len(h), 260), -1e9)
        logits[:, self.script[self.step]] = 0.0
        self.step += 1
        return logits


def parrot(text, template="raw", **settings):
    loaded = lp.Loaded(Parrot(text), lp.ByteTokenizer(), {})
    config = lp.SampleConfig(template=template, max_new_tokens=500, **settings)
    return list(lp.stream_text(loaded, config, "x"))


@pytest.mark.parametrize("text", ["plain", "Größe 你好 👋🏽 e\u0301", "", "\n\n", "a\ufffdb"])
def test_streamed_pieces_are_whole_characters_and_add_up(text):
    found = parrot(text)
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert [p for p in found if p] == list(text)  # a character as soon as it is complete


def test_bytes_that_are_no_character_do_not_hold_up_the_rest():
    loaded = lp.Loaded(Parrot(""), lp.ByteTokenizer(), {})
    loaded.model.script = [0xE4, 0xBD, *b"ok", 0xFF, 0xFF, *b"then more text", 0xE4, 258]
    found = list(lp.stream_text(loaded, lp.SampleConfig(), "x"))
    assert "".join(found) == "\ufffdok\ufffd\ufffdthen more text\ufffd"


STOPS = [  # (text, stop, what is shown)
    ("one two three", "two", "one "), ("one two three", "four", "one two three"),
    ("one\ntwo", r"\n", "one"), ("aaab", "aab", "a"), ("abab abac", "abac", "abab "),
    ("end of tex", "text", "end of tex"),  # an unfinished stop is text after all
    ("stop", "stop", ""), ("你好吗", "好", "你"), ("x你", "你好", "x你"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "stop", "wanted"), STOPS)
def test_stop_strings(text, stop, wanted):
    """Tokens are bytes here, so every stop string of two characters spans several."""
    assert "".join(parrot(text, stop=stop)) == wanted
    assert parrot(text, stop=stop, num_samples=2) == [wanted, wanted]


@pytest.mark.parametrize("answer", ["ham", "two\nlines", "", " indented", "ends\n", "\n"])
def test_an_answer_loses_what_the_template_put_around_it(answer):
    text = lp.instruction_response(answer)
    assert "".join(parrot(text, "instruct")) == answer
    assert parrot(text, "instruct", num_samples=2) == [answer, answer]
    assert "".join(parrot(text)) == text


def test_an_answer_appears_as_it_is_made():
    assert [p for p in parrot(" two\nlines\n", "instruct") if p] == [*"two", "\nl", *"ines"]


# --- conversations ---


def test_an_answer_that_was_broken_off_stays_in_the_conversation():
    loaded = tuned()
    chat = lp.Chat(loaded, greedy())
    pieces = chat.ask("one")
    said = "".join(next(pieces) for _ in range(5))
    pieces.close()
    assert chat.turns == [("one", "", said)]
    wanted = rendered([("one", "", said), ("two", "", None)])
    assert "".join(chat.ask("two")) == reply(loaded.model, wanted)


def test_the_oldest_turns_make_room_and_that_is_said(capsys):
    loaded = tuned(block_size=128)
    chat = lp.Chat(loaded, greedy())
    "".join(chat.ask("a" * 30))
    "".join(chat.ask("b" * 30))
    said = capsys.readouterr().err
    assert "oldest turn" in said and "the context 128" in said
    assert chat.turns == [("b" * 30, "", reply(loaded.model, rendered([("b" * 30, "", None)])))]


# --- a session at a terminal ---


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def session(monkeypatch):
    """Runs `sample` with lines typed at a terminal; takes a checkpoint or a loaded model."""

    def typed(model, *lines, flags=()):
        if isinstance(model, lp.Loaded):
            monkeypatch.setattr(lp, "load_model", lambda name, loaded=model: loaded)
            model = "any.pth"
        monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in lines)))
        flags = ["--max_new_tokens", 8, *flags]
        return run("sample", "--ckpt", model, "--device", "cpu", *flags)

    return typed


def answers(result):
    texts = [text.removesuffix("\n") for text in result.ok().out.split("> ")]
    return [text for text in texts if text]


def test_a_session_has_fresh_seeds_and_can_be_repeated(session):
    """Each answer has its own seed: the same prompt gets different answers."""
    lines = ["hello", "/new", "hello"]
    first, other = (session(tuned(), *lines) for _ in range(2))
    assert len({*answers(first), *answers(other)}) == 4
    seed = re.search(r"--seed (\d+)", first.err)[1]
    assert session(tuned(), *lines, flags=("--seed", seed)).out == first.out


def test_the_commands_of_a_session(session):
    lines = ["one", "/input some text", "two", "three", "/new", "/set max_new_tokens 5", "four",
             "/system Be brief.", "five", "Another <|sep|>?", "/help", "/nonsense", "/quit",
             "no"]  # fmt: skip
    loaded, turns, wanted = tuned(), [], []
    result = session(loaded, *lines, flags=("--temperature", 0))
    for text, input, count, system in (
        ("one", "", 8, ""), ("two", "some text", 8, ""), ("three", "", 8, ""),
        ("four", "", 5, ""), ("five", "", 5, "Be brief."), ("Another <|sep|>?", "", 5, "Be brief."),
    ):  # fmt: skip
        turns = [] if text in ("four", "five") else turns
        wanted.append(reply(loaded.model, rendered([*turns, (text, input, None)], system), count))
        turns.append((text, input, wanted[-1]))
    assert answers(result) == wanted
    for command in ("/input", "/system", "/new", "/set", "/help", "/quit", "/nonsense"):
        assert command in result.err


def test_settings_of_a_session(tiny_checkpoint, session):
    lines = ["/set temperature 0", "sun", "/set max_new_tokens 3", "sun", "/set top_k minus",
             "/set temperature -1", "/temperature 0", "/set ckpt x"]  # fmt: skip
    result = session(tiny_checkpoint, *lines)
    single = run("sample", "--ckpt", tiny_checkpoint, "--prompt", "sun", "--temperature", "0",
                 "--device", "cpu", "--max_new_tokens", 8).ok().out  # fmt: skip
    first, second = answers(result)
    assert first + "\n" == single and single.startswith(second)
    for wrong in ("top_k", "temperature must be", "no command /set ckpt x"):
        assert wrong in result.err


def test_an_input_means_the_template_in_a_session_too(session):
    loaded, lines = tuned(), ["/input some text", "Say it.", "Again."]
    loaded.state = {}
    first = reply(loaded.model, rendered([("Say it.", "some text", None)]), 8)
    turns = [("Say it.", "some text", first), ("Again.", "", None)]
    second = reply(loaded.model, rendered(turns), 8)
    assert answers(session(loaded, *lines, flags=("--temperature", 0))) == [first, second]
    raw = session(loaded, *lines, flags=("--template", "raw"))
    assert "--template raw" in raw.ok().err


def test_several_samples_of_a_conversation_are_refused(session):
    session(tuned(), "hello", flags=("--num_samples", 2)).fails(1, "--num_samples")
    raw = ("--num_samples", 2, "--template", "raw")
    session(tuned(), "hello", flags=raw).fails(1, "--num_samples")


def test_ctrl_c_ends_an_answer_and_not_the_session(session, monkeypatch):
    show, said = lp.show, []

    def interrupted_once(pieces):
        if not said:
            said.append(next(pieces))
            raise KeyboardInterrupt
        show(pieces)

    monkeypatch.setattr(lp, "show", interrupted_once)
    loaded = tuned()
    result = session(loaded, "one", "two", flags=("--temperature", 0))
    turns = [("one", "", said[0]), ("two", "", None)]
    assert answers(result) == [reply(loaded.model, rendered(turns), 8)]
