"""Layouts of instructions, dialogues and preferences: what is read, trained and refused."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from conftest import needs, run

import llm_pipeline as lp


def rendered(*turns, system: str = "") -> list[tuple[str, str]]:
    """(prompt, response) of each turn (user, answer) or (user, input, answer), by hand."""
    texts = []
    for user, *input, answer in turns:
        head = f"### System: {system}\n" if system and not texts else ""
        body = f"### Instruction: {user}\n### Input: {''.join(input)}\n### Output:"
        texts.append((head + body, f" {answer}\n"))
    return texts


def said(*texts: str, roles=("user", "assistant"), role="role", content="content") -> list[dict]:
    """Messages of texts whose roles take turns."""
    return [{role: roles[i % 2], content: text} for i, text in enumerate(texts)]


def shared(*texts: str) -> list[dict]:
    """The same as ShareGPT has them."""
    return said(*texts, roles=("human", "gpt"), role="from", content="value")


def read(path: Path, rows, **more) -> tuple[list[lp.Record], lp.Report]:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return records(path, **more)


def records(path: Path, **more) -> tuple[list[lp.Record], lp.Report]:
    config = lp.DataConfig(data_dir=str(path), **more)
    report = lp.Report()
    return list(lp.read_records(config, report)), report


def turns(record: lp.Record) -> list[tuple[str, str]]:
    return [(turn.prompt, turn.response) for turn in record.turns]


SYSTEM = {"role": "system", "content": "Be brief."}
TALK = ("Hi, 你好", "Hello!", "And now?", "Bye.")
TWO = rendered(TALK[:2], TALK[2:])
TWO_SYSTEM = rendered(TALK[:2], TALK[2:], system="Be brief.")
ONE = rendered(("Hi", "Hello!"))

# name -> (row, its turns, rejected)
LAYOUTS = {
    "messages": (dict(messages=[SYSTEM, *said(*TALK)]), TWO_SYSTEM, ""),
    "messages of a developer": (
        dict(messages=[SYSTEM | {"role": "developer"}, *said(*TALK)]), TWO_SYSTEM, ""
    ),
    "text parts": (
        dict(messages=[
            {"role": "user", "content": [{"type": "text", "text": "H"},
                                         {"type": "text", "text": "i"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]},
        ]), ONE, "",
    ),
    "parts as values": (
        dict(messages=[
            {"role": "user", "content": [{"type": "text", "value": "Hi"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "Hello!"}]},
        ]), ONE, "",
    ),
    "sharegpt": (
        dict(conversations=[{"from": "system", "value": "Be brief."}, *shared(*TALK)]),
        TWO_SYSTEM, "",
    ),
    "sharegpt, system beside": (
        dict(conversations=shared(*TALK), system="Be brief."), TWO_SYSTEM, ""
    ),
    "sharegpt preference": (
        dict(conversations=shared(*TALK[:3]), chosen=shared("", TALK[3])[1],
             rejected=shared("", "No.")[1]), TWO, " No.\n",
    ),
    "alpaca": (
        dict(instruction="Sort", input="b a", output="a b"), rendered(("Sort", "b a", "a b")), ""
    ),
    "alpaca with a system text": (
        dict(instruction="Hi", input="", output="Hello!", system="Be brief.", history=[]),
        rendered(("Hi", "Hello!"), system="Be brief."), "",
    ),
    "dolly": (
        dict(instruction="Who?", context="Ada wrote it.", response="Ada", category="closed_qa"),
        rendered(("Who?", "Ada wrote it.", "Ada")), "",
    ),
    "question": (dict(question="Hi", answer="Hello!"), ONE, ""),
    "orca": (
        dict(id="1", system_prompt="Be brief.", question="Hi", response="Hello!"),
        rendered(("Hi", "Hello!"), system="Be brief."), "",
    ),
    "completion": (dict(prompt="Hi", completion="Hello!"), ONE, ""),
    "trl completion": (dict(prompt=said("Hi"), completion=said("", "Hello!")[1:]), ONE, ""),
    "trl preference": (
        dict(prompt=said(*TALK[:3]), chosen=said("", TALK[3])[1:], rejected=said("", "No.")[1:]),
        TWO, " No.\n",
    ),
    "trl preference without a prompt": (
        dict(chosen=said(*TALK), rejected=said(*TALK[:3], "No.")), TWO, " No.\n"
    ),
    "ultrafeedback": (
        dict(prompt="Hi", prompt_id="0", chosen=said("Hi", "Hello!"), rejected=said("Hi", "No."),
             messages=said("Hi", "Hello!"), score_chosen=8.5), ONE, " No.\n",
    ),
    "ultrachat": (dict(prompt=TALK[0], prompt_id="0", messages=said(*TALK)), TWO, ""),
    "preference beside another answer": (
        dict(instruction="Hi", input="", output="x", chosen="Hello!", rejected="No."),
        ONE, " No.\n",
    ),
    "two messages of one role in a row": (
        dict(messages=[*said("Hi"), *said("there", "Hello!")]),
        rendered(("Hi\n\nthere", "Hello!")), "",
    ),
    "two answers in a row": (
        dict(messages=[*said("Hi", "Hello"), {"role": "assistant", "content": "you"}]),
        rendered(("Hi", "Hello\n\nyou")), "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    """Every layout: its turns, each answer trained, the rejected answer of a pair."""
    row, wanted, rejected = LAYOUTS[layout]
    [record], _ = read(tmp_path / "a.jsonl", [row])
    assert turns(record) == wanted
    assert record.rejected == rejected
    assert all(turn.trained for turn in record.turns) and not record.is_plain


@pytest.mark.parametrize("ending", ["json", "ndjson", "jsonl", "json.gz", "parquet"])
def test_the_same_rows_in_every_kind_of_file(tmp_path, ending):
    """JSON Lines under any name, and tables, whose rows hold every column (null where unused)."""
    rows = [row for row, _, _ in LAYOUTS.values()]
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
        names = ["messages", "sharegpt", "alpaca", "question", "orca"]
        rows = [LAYOUTS[name][0] for name in names]
        parquet.write_table(pa.Table.from_pylist([dict.fromkeys(
            {key for r in rows for key in r}) | row for row in rows]), path)  # fmt: skip
        wanted = [LAYOUTS[name][1] for name in names]
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
        wanted = [turns for _, turns, _ in LAYOUTS.values()]
    found, _ = records(path)
    assert [turns(record) for record in found] == wanted


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path, delimiter):
    rows = [("Sort, please", "b;a", 'a "b"\nc'), ("你好", "", "x\ty")]
    path = tmp_path / ("a.tsv" if delimiter == "\t" else "a.csv")
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("instruction", "input", "output"), *rows])
    found, _ = records(path)
    assert [turns(record) for record in found] == [rendered(row) for row in rows]
    assert [record.where for record in found] == [f"{path}:2", f"{path}:4"]


# --- what is refused, by name ---

CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
REFUSED = {
    "tool calls": (dict(messages=[*said("Hi"), CALL]), "tool_calls"),
    "a tool's answer": (
        dict(messages=[*said("Hi"), {"role": "tool", "content": "5"}, *said("", "x")[1:]]), "'tool'"
    ),
    "a function call": (
        dict(conversations=[*shared("Hi"), {"from": "function_call", "value": "f"}]),
        "'function_call'",
    ),
    "tools": (dict(conversations=shared("Hi", "x"), tools='[{"name": "f"}]'), "'tools'"),
    "an image part": (dict(messages=[PICTURE, *said("", "x")[1:]]), "image_url"),
    "images": (dict(messages=said("Hi", "x"), images=["a.png"]), "'images'"),
    "an unknown role": (dict(messages=[{"role": "narrator", "content": "x"}]), "'narrator'"),
    "no question": (dict(messages=said("", "Hello!")[1:]), "begin with the user"),
    "no answer": (dict(messages=said("Hi")), "end with an assistant"),
    "a late system text": (dict(messages=[*said("Hi", "x"), SYSTEM]), "system text inside"),
    "a message without text": (
        dict(messages=[{"role": "user"}, *said("", "x")[1:]]), "has no text"
    ),
    "prompt beside text": (dict(prompt="Hi", text="Once"), "'prompt' beside 'text'"),
    "two questions": (dict(prompt="Hi", question="Ho", answer="x"), "both 'prompt' and 'question'"),
    "two inputs": (
        dict(instruction="Hi", input="a", context="b", output="x"), "both 'input' and 'context'"
    ),
    "two dialogues": (dict(prompt="Ho", messages=said("Hi", "x")), "different dialogues"),
    "two system texts": (
        dict(messages=[SYSTEM, *said("Hi", "x")], system="Sing."), "a system text both"
    ),
    "pairs that part early": (
        dict(chosen=said(*TALK), rejected=said("Ho", "x", "y", "z")), "do not share their prompt"
    ),
    "a pair without a prompt": (dict(chosen="a", rejected="b"), "begin with the user"),
    "a history": (dict(instruction="Hi", output="x", history=[["a", "b"]]), "'history'"),
    "a transcript": (
        dict(chosen="\n\nHuman: Hi\n\nAssistant: x", rejected="y"), "a transcript in 'chosen'"
    ),
    "a prompt of a transcript": (
        dict(prompt="Human: Hi\n\nAssistant:", chosen="x", rejected="y"), "transcript in 'prompt'"
    ),
    "unknown columns": (dict(question="Hi", solution="x"), "(question, solution)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(tmp_path, what):
    """Never half-read: refused by name, or counted by name under --bad_records skip."""
    row, word = REFUSED[what]
    good = dict(question="Hi", answer="Hello!")
    with pytest.raises(lp.UserError) as caught:
        read(tmp_path / "a.jsonl", [good, row])
    assert word in str(caught.value) and "a.jsonl:2" in str(caught.value)
    assert "\n" not in str(caught.value)
    found, report = read(tmp_path / "a.jsonl", [good, row, row], bad_records="skip")
    assert [turns(record) for record in found] == [ONE]
    [(what, n)] = [(k, n) for k, n in report.rows["a.jsonl"].items() if k.startswith("skipped")]
    assert word in what and n == 2


def test_a_refusal_lists_what_is_known(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"words": "x"}\n')
    result = run("prepare", "--data_dir", tmp_path / "a.jsonl", "--out_dir", tmp_path / "st")
    result.fails(1, "(words)", "question", "messages", "conversations", "chosen", "text")
    (tmp_path / "a.csv").write_text("id,words\n1,x\n")
    result = run("prepare", "--data_dir", tmp_path / "a.csv", "--out_dir", tmp_path / "st")
    result.fails(1, "a.csv", "id, words", "question", "messages", "--text_field")


# --- in a token store ---


def test_every_answer_is_a_row_over_the_same_tokens(tmp_path):
    """The ids of a conversation by hand: bos, then prompt, answer and sep of each turn."""
    talk = said(*TALK, "Wait!", "Gone.")
    talk[3]["weight"] = 0
    (tmp_path / "a.json").write_text(json.dumps([dict(messages=[SYSTEM, *talk])]))
    flags = ["--data_dir", tmp_path / "a.json", "--out_dir", tmp_path / "st"]
    run("prepare", *flags, "--val_fraction", 0).ok()
    store = lp.TokenStore(tmp_path / "st")
    bos, sep = 257, 259
    ids, rows = [bos], []
    texts = rendered(TALK[:2], TALK[2:], ("Wait!", "Gone."), system="Be brief.")
    for number, (prompt, answer) in enumerate(texts):
        ids += prompt.encode()
        before = len(ids)
        ids += [*answer.encode(), sep]
        rows.append((0, len(ids), before, 0, number != 1, number == 2))
    assert store.tokens["train"].tolist() == ids
    assert store.index["train"].tolist() == rows
