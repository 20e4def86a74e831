"""Files as people have them, one case per row: what is read, or what the refusal says."""

import bz2
import datetime
import gzip
import json
import lzma
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_pipeline as lp


def jsonl(*rows, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def chat(*texts: str, **last) -> dict:
    """A dialogue of these texts; `last` are further fields of its last message."""
    messages = [dict(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(texts)]
    messages[-1] |= last
    return dict(messages=messages)


def shown(record: lp.Record) -> str:
    """A record on one line: plain text as is, else `question > answer`, or `(answer)` if it is not
    trained on; `system: question + input`; `/ rejected` for a pair."""
    if record.is_plain:
        return record.turns[0].response
    turns = []
    for turn in record.turns:
        task, _, text = turn.prompt.removesuffix("\n### Output:").partition("\n### Input: ")
        answer = turn.response.strip("\n").removeprefix(" ")
        answer = answer if turn.trained else f"({answer})"
        system, _, task = task.rpartition("### Instruction: ")
        if system:
            task = f"{system.strip().removeprefix('### System: ')}: {task}"
        turns.append(f"{task} + {text} > {answer}" if text else f"{task} > {answer}")
    return " | ".join(turns) + (f" / {record.rejected.strip()}" if record.rejected else "")


def read(folder: Path, **more) -> tuple[list[tuple[str, str]], str]:
    """([(record, side), ...], the report's lines) of a folder, file or data set."""
    more = {"data_dir": str(folder)} | more
    config, report = lp.DataConfig(**more), lp.Report()
    found = lp.split_records(lp.read_records(config, report), config, report)
    sides = [(shown(record), record.split or side) for record, side, _ in found]
    return sides, "\n".join(report.lines())


@dataclass
class Case:
    files: dict[str, bytes]
    wanted: list[str] | None = None  # the records, in order; None: refused
    said: tuple[str, ...] = ()  # words in the report or the refusal
    settings: dict = field(default_factory=dict)


QA = [dict(instruction=f"q{i}", output=f"a{i}") for i in range(3)]
READ = [f"q{i} > a{i}" for i in range(3)]
TEXTS = [dict(text=f"Text {i}") for i in range(3)]
PLAIN = [f"Text {i}" for i in range(3)]
PAIR, OTHER = dict(prompt="q", completion="a"), dict(prompt="r", completion="b")
SPAM = [dict(text=f"Message {i}", label=("ham", "spam")[i % 2]) for i in range(4)]
CLASSES = [f"classify the text by label + Message {i} > {('ham', 'spam')[i % 2]}" for i in range(4)]
TABLE = "instruction,output\nq0,a0\nq1,a1\nq2,a2\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
BOM = b"\xef\xbb\xbf"

CASES = {
    # masks
    "weight 0 inside": Case({"a.jsonl": jsonl(
        dict(messages=chat("q", "bad", weight=0)["messages"] + chat("r", "good")["messages"])
    )}, ["q > (bad) | r > good"], ("answers not trained", ": 1")),
    "weight 0 at the end": Case({"a.jsonl": jsonl(chat("q", "a", "r", "b", weight=0))},
                                ["q > a"], ("answers not trained", ": 1")),
    **{f"{name} {value!r}": Case(
        {"a.jsonl": jsonl(chat("q", "a", "r", "b", **{name: value}))}, ["q > a"], (": 1",))
       for name in ("weight", "train", "training", "trainable", "loss")
       for value in (False, 0, 0.0, "0", "False")},
    "masks that train": Case(
        {"a.jsonl": jsonl(chat("q", "a", weight=1.0, train="true", loss=True, trainable="1"))},
        ["q > a"]),
    "no answer is trained": Case({"a.jsonl": jsonl(chat("q", "a", train=False), PAIR)}, ["q > a"],
                                 ("no answer to train: 1",)),
    "a mask of a row": Case({"a.jsonl": jsonl(PAIR | {"weight": 0}, *QA)}, READ,
                            ("no answer to train: 1",)),
    "a mask of a question": Case({"a.jsonl": jsonl(
        dict(messages=[dict(role="user", content="q", train=False),
                       dict(role="assistant", content="a", train=True)])
    )}, ["q > a"]),
    "half a weight": Case({"a.jsonl": jsonl(chat("q", "a", weight=0.5))}, None, ("'weight' is",)),
    "half a weight of a row": Case({"a.jsonl": jsonl(PAIR | {"weight": 0.5})}, None,
                                   ("'weight' is",)),
    "a mask of a text": Case({"a.jsonl": jsonl(dict(text="t", train=False), *TEXTS)}, PLAIN,
                             ("no answer to train: 1",)),
    "masks inside a message": Case({"a.jsonl": jsonl(chat("q", "a", train_detail=[{"end": 1}]))},
                                   None, ("'train_detail'",)),
    # labels
    **{f"kto, {label!r}": Case({"a.jsonl": jsonl(PAIR, OTHER | dict(label=label))}, ["q > a"],
                               ("no answer to train: 1",))
       for label in (False, 0, 0.0, "0", "False", "false")},
    **{f"kto, {label!r}": Case({"a.jsonl": jsonl(OTHER | dict(label=label))}, ["r > b"])
       for label in (True, 1, 1.0, "1", "True", None)},
    "kto in a table": Case({"a.csv": b"prompt,completion,label\nq,a,True\nr,b,False\n"}, ["q > a"],
                           ("no answer to train: 1",)),
    "kto beside messages": Case({"a.jsonl": jsonl(chat("q", "a") | dict(label=True),
                                                  chat("r", "b") | dict(label=False))},
                                ["q > a"], ("no answer to train: 1",)),
    "a dislike is of the last answer": Case({"a.jsonl": jsonl(
        dict(prompt=chat("q", "a", "r")["messages"], completion="bad", label=False),
        chat("s", "b", "t", "worse") | dict(label=False),
    )}, ["q > a", "s > b"]),
    "a weight that is no mask": Case({"people.csv": b"name,weight,bio\nAda,70,Wrote programs\n"},
                                     None, ("no 'text'", "--text_field")),
    "labels beside another layout": Case(
        {"a.jsonl": jsonl(*(PAIR | dict(prompt=f"q{i}", text="t", label=f"topic {i}")
                            for i in range(12))),
         "spam.jsonl": jsonl(*SPAM)}, [*(f"q{i} > a" for i in range(12)), *CLASSES]),
    "numbers of classes beside an answer": Case(
        {"a.jsonl": jsonl(*(row | dict(label=i % 2) for i, row in enumerate(QA)))}, READ,
        ("not used: label: 3",)),
    "more than liked or not": Case({"a.jsonl": jsonl(PAIR | dict(label=2))}, None,
                                   ("'label' is 2", "KTO")),
    "more than liked or not, in a table": Case({"a.csv": b"prompt,completion,label\nq,a,2\n"}, None,
                                               ("'label' is 2", "KTO")),
    "a label of another kind": Case({"a.jsonl": jsonl(PAIR | {"label": "funny"})}, ["q > a"],
                                    ("not used: label",)),
    "text and label": Case({"a.jsonl": jsonl(*SPAM)}, CLASSES),
    "text and label in a table": Case({"spam.csv": b"label,text\n" + b"".join(
        f"{row['label']},{row['text']}\n".encode() for row in SPAM)}, CLASSES),
    "labels as numbers": Case({"a.jsonl": jsonl(*({"text": f"t{i}", "label": i % 2}
                                                  for i in range(4)))},
                              [f"classify the text by label + t{i} > {i % 2}" for i in range(4)]),
    "labels in two files of a split": Case(
        {"train.jsonl": jsonl(*SPAM), "valid.jsonl": jsonl(dict(text="Other", label="ham"))},
        [*CLASSES, "classify the text by label + Other > ham"]),
    "labels that do not repeat": Case(
        {"a.jsonl": jsonl(*(row | dict(label=str(i)) for i, row in enumerate(TEXTS)))}, PLAIN,
        ("not used: label",)),
    "numbers beside a text": Case({"a.jsonl": jsonl(*(dict(text=f"t{i}", topic=i % 2)
                                                      for i in range(4)))},
                                  [f"t{i}" for i in range(4)], ("not used: topic: 4",)),
    "an empty label": Case({"a.csv": b"label,text\n" + b"".join(
        f"{row['label']},{row['text']}\n".encode() for row in SPAM) + b",x\n"}, [*CLASSES, "x"]),
    "a text without its label": Case({"a.jsonl": jsonl(*SPAM, dict(text="x", label=None))},
                                     [*CLASSES, "x"]),
    # encodings
    **{name: Case({"a.txt": "Größe\nzwei".encode(name)}, ["Größe\nzwei"])
       for name in ("utf-8", "utf-8-sig", "utf-16")},
    "marked big-endian": Case({"a.txt": b"\xfe\xff" + "Größe".encode("utf-16-be")}, ["Größe"]),
    "marked twice": Case({"a.jsonl": BOM * 2 + jsonl(*QA)}, READ),
    "UTF-16 lines of JSON": Case({"a.jsonl": jsonl(*QA).decode().encode("utf-16")}, READ),
    "UTF-16 of no known ending": Case({"notes": "Größe".encode("utf-16")}, ["Größe"]),
    "text with NULs": Case({"a.txt": b"a\0b"}, None, ("NULs", "save it as UTF-8")),
    # line ends
    "\\r\\n and an empty line": Case({"a.txt": b"One\r\ntwo\r\n\r\nThree"}, ["One\ntwo", "Three"],
                                     settings=dict(doc_delimiter=r"\n\n")),
    "a lone \\r": Case({"a.txt": b"One\r\rTwo"}, ["One", "Two"],
                       settings=dict(doc_delimiter=r"\n\n")),
    "\\r in JSON": Case({"a.jsonl": jsonl(dict(text="a\r\nb\rc"))}, ["a\nb\nc"]),
    "\\r in messages": Case({"a.jsonl": jsonl(chat("q\r\nr", "a\rb"))}, ["q\nr > a\nb"]),
    "lines that end in \\r": Case({"a.jsonl": jsonl(*QA, end="\r")}, READ),
    "a table of \\r": Case({"a.csv": TABLE.replace("\n", "\r").encode()}, READ),
    # raw JSON
    **{f"JSON Lines as {name}": Case({name: jsonl(*QA)}, READ)
       for name in ("a.jsonlines", "a.jl", "a.ndjson", "train_data", "a.log", "a.txt", "a.json")},
    **{f"a JSON list as {name}": Case({name: json.dumps(QA, indent=1).encode()}, READ)
       for name in ("a.json", "a.jsonl", "a.jl", "data", "a.txt")},
    "one object": Case({"a.json": json.dumps(QA[0], indent=1).encode()}, READ[:1]),
    "rows under a key": Case({"a.json": json.dumps(dict(data=QA)).encode()}, None, ("(data)",)),
    "text that begins with a bracket": Case({"a.txt": b"[1] A note.\n{2} Another."},
                                            ["[1] A note.\n{2} Another."]),
    "a pointer": Case({"train.jsonl": POINTER}, None, ("git lfs pull",)),
    "a pointer to a table": Case({"train.parquet": POINTER}, None, ("git lfs pull",)),
    "a pointer to a packed file": Case({"train.jsonl.gz": POINTER}, None, ("git lfs pull",)),
    # what describes a data set
    "a cloned data set": Case(
        {"README.md": b"---\nlicense: mit\n---\n# Card", "data/train.jsonl": jsonl(*QA),
         "dataset_infos.json": b'{"default": {}}'}, READ,
        ("README.md", "describes a data set")),
    "a folder of notes": Case({"README.md": b"My notes", "monday.md": b"Rain"},
                              ["My notes", "Rain"]),
    # what would be lost
    "reasoning": Case({"a.jsonl": jsonl(chat("q", "a", reasoning_content="hm"))}, None,
                      ("'reasoning_content'", "into the content", "--bad_records skip")),
    "a message's other fields": Case({"a.jsonl": jsonl(chat("q", "a", name="Ann", id=""))},
                                     ["q > a"], ("not used: name in messages",)),
    "other columns": Case({"a.jsonl": jsonl(PAIR | dict(hint="think", n=3, score=0.5))}, ["q > a"],
                          ("not used: hint, n, score: 1",)),
    "columns beside a text": Case({"a.jsonl": jsonl(dict(text="t", input="i", id=3))}, ["t"],
                                  ("not used: id, input: 1",)),
    "messages of a tree": Case({"a.jsonl": jsonl(
        dict(message_id="1", parent_id=None, text="hi", role="prompter"),
        dict(message_id="2", parent_id="1", text="hello", role="assistant"),
    )}, None, ("one message of a dialogue", "messages")),
    # values
    "an object as answer": Case({"a.jsonl": jsonl(dict(instruction="q", output={"ä": [1, 2]}))},
                                ['q > {"ä": [1, 2]}']),
    "objects with fields of messages": Case(
        {"a.jsonl": jsonl(dict(instruction="q", output={"from": "Ann", "role": "boss"}))},
        ['q > {"from": "Ann", "role": "boss"}']),
    "an empty list as answer": Case({"a.jsonl": jsonl(dict(instruction="q", output=[]))},
                                    ["q > []"]),
    "the whole text beside its parts": Case({"a.jsonl": jsonl(PAIR | dict(text="q a"))}, ["q > a"]),
    "numbers": Case({"a.jsonl": jsonl(dict(question=2, answer=4.5),
                                      dict(question="r", answer=True))},
                    ["2 > 4.5", "r > true"]),
    "messages as JSON text": Case(
        {"a.jsonl": jsonl(dict(messages=json.dumps(chat("q", "a")["messages"])))}, ["q > a"]),
    "a pair of JSON texts": Case({"a.jsonl": jsonl(
        {name: json.dumps(chat("q", answer)["messages"])
         for name, answer in dict(chosen="a", rejected="b").items()}
    )}, ["q > a / b"]),
    "an answer that is JSON text": Case({"a.jsonl": jsonl(dict(prompt="q", chosen="[1]",
                                                               rejected="[2]"))},
                                        ["q > [1] / [2]"]),
    "an empty list of messages": Case({"a.jsonl": jsonl(dict(messages=[]))}, None,
                                      ("no messages",)),
    "a null answer": Case({"a.json": json.dumps([dict(instruction="q", output=None)]).encode()},
                          None, ("output is null",)),
    "a null question": Case({"a.jsonl": jsonl(dict(prompt=None, completion="a"))}, None,
                            ("prompt is null",)),
    # tables
    "sep=;": Case({"a.csv": b"sep=;\r\ninstruction;output\r\nq0;a,0\r\n"}, ["q0 > a,0"]),
    "Excel's UTF-16": Case({"a.csv": "instruction\toutput\r\nGröße?\t3 m\r\n".encode("utf-16")},
                           ["Größe? > 3 m"]),
    "spaces behind commas": Case({"a.csv": b'instruction, output\nq0, "a, 0"\n'}, ["q0 > a, 0"]),
    "spaces around names": Case({"a.csv": b" instruction ;output \nq0;a0\n"}, ["q0 > a0"]),
    "a column of texts": Case({"a.csv": b'id,body\n1,"One, two"\n2,Three\n'},
                              ["One, two", "Three"], settings=dict(text_field="body")),
    "a table of one column": Case({"a.tsv": b"text\nHello, world\n"}, ["Hello, world"]),
    "a table without names": Case({"a.tsv": b"positive\tWhat a film\nnegative\tWhat a bore\n"},
                                  None, ("no known layout",)),
    "a row that is short": Case({"a.csv": b"instruction,output\nq0\n"}, None,
                                (":2", "output is null")),
    "errors of one kind": Case({"a.jsonl": b'{"a" 1}\n{"bbb" 1}\n' + jsonl(*QA)}, READ,
                               ("Expecting ':' delimiter: 2",), dict(bad_records="skip")),
    "an open quote": Case({"a.csv": b'text,n\n"two\nlines",1\n"open,2\nb,3\n'}, None,
                          (":4", "close the quote"), dict(bad_records="skip")),
    # packed
    "bz2": Case({"a.jsonl.bz2": bz2.compress(jsonl(*QA))}, READ),
    "xz": Case({"a.txt.xz": lzma.compress(b"Text")}, ["Text"]),
    "gz without an ending": Case({"a.gz": gzip.compress(jsonl(*QA))}, READ),
    "endings in upper case": Case({"a.JSONL": jsonl(*QA), "b.TXT.GZ": gzip.compress(b"Text")},
                                  [*READ, "Text"]),
    # counts and repeats
    "marks of documents": Case({"a.txt": b"One.\n<|endoftext|>\nTwo."},
                               ["One.\n<|endoftext|>\nTwo."],
                               ("--doc_delimiter '<|endoftext|>'",)),
    "blank rows": Case({"a.jsonl": jsonl(*TEXTS, dict(text=""), dict(text=" "), dict(text=""))},
                       PLAIN, ("short or empty: 3", "--join_rows")),
    "repeats": Case({"a.jsonl": jsonl(*QA, *QA)}, READ, ("duplicate: 3", "--keep_duplicates")),
    "repeats that are kept": Case({"a.jsonl": jsonl(*QA, *QA)}, READ * 2,
                                  settings=dict(keep_duplicates=True)),
    "rows that are lines": Case(
        {"a.jsonl": jsonl(*(dict(text=line) for line in ("", " = Title = \n", "", "One.")))},
        ["\n = Title = \n\nOne.\n"], settings=dict(join_rows=True)),
    "documents are no lines": Case({"a.txt": b"One.\n\nTwo."}, ["One.", "Two."],
                                   settings=dict(join_rows=True, doc_delimiter=r"\n\n")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cases(tmp_path, name):
    case = CASES[name]
    for file, content in case.files.items():
        (tmp_path / "raw" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / file).write_bytes(content)
    if case.wanted is None:
        with pytest.raises(lp.UserError) as caught:
            read(tmp_path / "raw", **case.settings)
        said = str(caught.value)
        assert "\n" not in said
    else:
        found, said = read(tmp_path / "raw", **case.settings)
        assert [text for text, _ in found] == case.wanted
    for word in case.said:
        assert word in said, said


# --- instructions, dialogues and preferences ---


def shared(*texts: str) -> list[dict]:
    """A dialogue in ShareGPT's layout."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def said(*texts: str) -> list[dict]:
    return chat(*texts)["messages"]


SYSTEM = {"role": "system", "content": "Be brief."}
TALK = ("Hi, 你好", "Hello!", "And now?", "Bye.")
TWO = "Hi, 你好 > Hello! | And now? > Bye."
ONE = "Hi > Hello!"
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]

# name -> (row, what is read from it)
LAYOUTS = {
    "messages": (dict(messages=[SYSTEM, *said(*TALK)]), f"Be brief.: {TWO}"),
    "messages of a developer": (
        dict(messages=[SYSTEM | {"role": "developer"}, *said(*TALK)]), f"Be brief.: {TWO}"),
    "text parts": (dict(messages=[dict(role="user", content=PARTS), *said("", "Hello!")[1:]]), ONE),
    "sharegpt": (dict(conversations=[{"from": "system", "value": "Be brief."}, *shared(*TALK)]),
                 f"Be brief.: {TWO}"),
    "sharegpt, system beside": (dict(conversations=shared(*TALK), system="Be brief."),
                                f"Be brief.: {TWO}"),
    "sharegpt preference": (
        dict(conversations=shared(*TALK[:3]), chosen=shared("", TALK[3])[1],
             rejected=shared("", "No.")[1]), f"{TWO} / No."),
    "alpaca": (dict(instruction="Sort", input="b a", output="a b"), "Sort + b a > a b"),
    "alpaca with a system text": (
        dict(instruction="Hi", input="", output="Hello!", system="Be brief.", history=[]),
        f"Be brief.: {ONE}"),
    "dolly": (dict(instruction="Who?", context="Ada wrote it.", response="Ada", category="closed"),
              "Who? + Ada wrote it. > Ada"),
    "orca": (dict(id="1", system_prompt="Be brief.", question="Hi", response="Hello!"),
             f"Be brief.: {ONE}"),
    "completion": (dict(prompt="Hi", completion="Hello!"), ONE),
    "trl completion": (dict(prompt=said("Hi"), completion=said("", "Hello!")[1:]), ONE),
    "trl preference": (dict(prompt=said(*TALK[:3]), chosen=said("", TALK[3])[1:],
                            rejected=said("", "No.")[1:]), f"{TWO} / No."),
    "trl preference without a prompt": (
        dict(chosen=said(*TALK), rejected=said(*TALK[:3], "No.")), f"{TWO} / No."),
    "ultrafeedback": (
        dict(prompt="Hi", prompt_id="0", chosen=said("Hi", "Hello!"), rejected=said("Hi", "No."),
             messages=said("Hi", "Hello!"), score_chosen=8.5), f"{ONE} / No."),
    "ultrachat": (dict(prompt=TALK[0], prompt_id="0", messages=said(*TALK)), TWO),
    "preference beside another answer": (
        dict(instruction="Hi", input="", output="x", chosen="Hello!", rejected="No."),
        f"{ONE} / No."),
    "two messages of one role in a row": (
        dict(messages=[*said("Hi"), *said("there", "Hello!")]), "Hi\n\nthere > Hello!"),
    "two answers in a row": (
        dict(messages=[*said("Hi", "Hello"), *said("", "you")[1:]]), "Hi > Hello\n\nyou"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    """Every layout: its turns, each answer trained, the rejected answer of a pair."""
    row, wanted = LAYOUTS[layout]
    (tmp_path / "a.jsonl").write_bytes(jsonl(row))
    assert [text for text, _ in read(tmp_path)[0]] == [wanted]


def test_a_column_that_is_no_text_is_named(tmp_path):
    pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    row = dict(question="q", context=datetime.date(2020, 1, 1), answer="a")
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(lp.UserError, match="row 1: 'context' must be text, not date"):
        read(tmp_path)


def test_layouts_side_by_side_in_a_table(tmp_path):
    """Each row holds every column, null if unused."""
    pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    names = ["messages", "sharegpt", "alpaca", "completion", "orca"]
    rows, wanted = zip(*(LAYOUTS[name] for name in names), strict=True)
    columns = dict.fromkeys(key for row in rows for key in row)
    parquet.write_table(
        pa.Table.from_pylist([columns | row for row in rows]), tmp_path / "a.parquet"
    )
    found, _ = read(tmp_path, keep_duplicates=True)
    assert [text for text, _ in found] == list(wanted)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
REFUSED = {
    "tool calls": (dict(messages=[*said("Hi"), CALL]), "tool_calls"),
    "a tool's answer": (
        dict(messages=[*said("Hi"), dict(role="tool", content="5"), *said("", "x")[1:]]), "'tool'"),
    "tools": (dict(conversations=shared("Hi", "x"), tools='[{"name": "f"}]'), "'tools'"),
    "an image part": (dict(messages=[PICTURE, *said("", "x")[1:]]), "has no text"),
    "images": (dict(messages=said("Hi", "x"), images=["a.png"]), "'images'"),
    "an unknown role": (dict(messages=[{"role": "narrator", "content": "x"}]), "'narrator'"),
    "no question": (dict(messages=said("", "Hello!")[1:]), "a user's message first"),
    "no answer": (dict(messages=said("Hi")), "answer last"),
    "a late system text": (dict(messages=[*said("Hi", "x"), SYSTEM]), "a system text only before"),
    "a message without text": (dict(messages=[{"role": "user"}, *said("", "x")[1:]]), "no text"),
    "prompt beside text": (dict(prompt="Hi", text="Once"), "'prompt' next to 'text'"),
    "two questions": (dict(prompt="Hi", question="Ho", answer="x"), "both 'prompt' and 'question'"),
    "two inputs": (dict(instruction="Hi", input="a", context="b", output="x"), "both 'input' and"),
    "two dialogues": (dict(prompt="Ho", messages=said("Hi", "x")), "different dialogues"),
    "two system texts": (
        dict(messages=[SYSTEM, *said("Hi", "x")], system="Sing."), "a system text both"),
    "pairs that part early": (
        dict(chosen=said(*TALK), rejected=said("Ho", "x", "y", "z")), "do not share their prompt"),
    "a pair without a prompt": (dict(chosen="a", rejected="b"), "a user's message first"),
    "a history": (dict(instruction="Hi", output="x", history=[["a", "b"]]), "'history'"),
    "a transcript": (dict(chosen="Human: Hi\n\nAssistant: x", rejected="y"), "a user's message"),
    "unknown columns": (dict(question="Hi", solution="x"), "(question, solution)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(tmp_path, what):
    """Never half-read: refused by name, or counted by name under --bad_records skip."""
    row, word = REFUSED[what]
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(PAIR, row, row))
    with pytest.raises(lp.UserError) as caught:
        read(path)
    assert word in str(caught.value) and "a.jsonl:2" in str(caught.value)
    found, report = read(path, bad_records="skip")
    assert [text for text, _ in found] == ["q > a"]
    assert re.search(rf"skipped: .*{re.escape(word)}.*: 2 \(first", report)


# --- against other readers ---

CELLS = st.text(st.sampled_from("ab ,;\"\n'é你"), min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6, unique_by=lambda row: row[0]),
    delimiter=st.sampled_from(",;\t"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_tables_as_pandas_reads_them(tmp_path_factory, rows, delimiter, encoding, end):
    pandas = needs("pandas")
    path = tmp_path_factory.mktemp("raw") / "a.csv"
    table = pandas.DataFrame(rows, columns=["question", "answer"])
    table.to_csv(path, sep=delimiter, encoding=encoding, lineterminator=end, index=False)
    known = pandas.read_csv(path, sep=delimiter, encoding=encoding, keep_default_na=False)
    config = lp.DataConfig(data_dir=str(path), keep_duplicates=True)
    found = [record.turns for record in lp.read_records(config, lp.Report())]
    assert found == [
        [lp.Turn(lp.instruction_prompt(question), lp.instruction_response(answer))]
        for question, answer in known.itertuples(index=False)
    ]


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_rows_as_datasets_reads_them(tmp_path, ending):
    """What `datasets` saves, in each of its formats, split by split."""
    datasets = needs("datasets")
    rows = [dict(prompt=f"Größe {i}?", completion=f"{i} m\n\nund", n=i) for i in range(20)]
    parts = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows[:12]),
        validation=datasets.Dataset.from_list(rows[12:16]),
        test=datasets.Dataset.from_list(rows[16:]),
    )
    for name, part in parts.items():
        (tmp_path / "raw").mkdir(exist_ok=True)
        getattr(part, f"to_{ending}")(tmp_path / f"raw/{name}-00000-of-00001.{ending}")
    found, said = read(tmp_path / "raw")
    wanted = [f"{row['prompt']} > {row['completion']}" for row in rows]
    assert [text for text, side in found if side == "train"] == wanted[:12]
    assert [text for text, side in found if side == "val"] == wanted[12:16]
    assert len(found) == 16 and "test split, kept out" in said
    assert sorted(found) == sorted(read("", hf_dataset=str(tmp_path / "raw"))[0])
    parts.save_to_disk(tmp_path / "saved")
    for more in (dict(data_dir=str(tmp_path / "saved")), dict(hf_dataset=str(tmp_path / "saved"))):
        assert sorted(found) == sorted(read("", **more)[0])


# --- data sets of Hugging Face ---


@pytest.fixture
def hub(tmp_path):
    """A local data set with official splits, whose rows are lines."""
    needs("datasets")
    for split in ("train", "validation", "test"):
        lines = [
            "",
            f" = The {split} text = \n",
            "",
            *(f" Line {i} of {split}.\n" for i in range(9)),
        ]
        rows = jsonl(*(dict(text=line) for line in lines))
        (tmp_path / f"{split}.jsonl").write_bytes(rows)
    return tmp_path


def test_official_splits_are_used_by_their_names(hub):
    found, said = read("", hf_dataset=str(hub))
    assert {side for text, side in found if "train" in text} == {"train"}
    assert {side for text, side in found if "validation" in text} == {"val"}
    assert not [text for text, _ in found if "test" in text] and "kept out" in said
    assert "--join_rows" in said
    found, _ = read("", hf_dataset=str(hub), hf_split="test")
    assert len(found) == 10 and {side for _, side in found} <= {"train", "val"}


def test_what_is_read_in_part_validates_by_hash(hub):
    """A stream that ends early would not reach its validation split."""
    for more in (dict(streaming=True), dict(max_docs=5), dict(max_tokens=1000)):
        found, said = read("", hf_dataset=str(hub), split_seed=3, **more)
        assert all("train" in text for text, _ in found) and "val split, kept out" in said
        assert {side for _, side in found} == {"train", "val"}


def test_joined_rows_are_the_running_text(hub):
    """One text per split, as standard perplexity has it."""
    found, _ = read("", hf_dataset=str(hub), join_rows=True)
    wanted = []
    for split in ("train", "validation"):
        rows = [json.loads(line)["text"] for line in (hub / f"{split}.jsonl").open()]
        wanted.append("".join(row.removesuffix("\n") + "\n" for row in rows))
    assert [text for text, _ in found] == wanted
    assert [side for _, side in found] == ["train", "val"]


def test_slices_of_a_split(hub):
    found, _ = read("", hf_dataset=str(hub), hf_split="train[:50%]")
    assert len(found) == 4
    with pytest.raises(lp.UserError, match="cannot load dataset"):
        read("", hf_dataset=str(hub), hf_split="train[:50%]", streaming=True)


def test_names_of_classes(tmp_path):
    datasets = needs("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"])
    )
    rows = dict(text=[f"t{i}" for i in range(6)], label=[0, 0, 1, 1, 0, 1])
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "data")
    names = [("neg", "pos")[label] for label in rows["label"]]
    wanted = {f"classify the text by label + t{i} > {name}" for i, name in enumerate(names)}
    assert {text for text, _ in read("", hf_dataset=str(tmp_path / "data"))[0]} == wanted


# --- end to end ---


MASKED, HELD_OUT = "~", "^"  # they mark text that is never a target, or never trained on


@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(
    talks=st.lists(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=4),
                   min_size=3, max_size=8),
    block_size=st.integers(8, 90), stride=st.integers(0, 40), batch_size=st.integers(1, 5),
)  # fmt: skip
def test_masks_and_held_out_texts_in_every_loader(
    tmp_path_factory, talks, block_size, stride, batch_size
):
    """Masked answers are never targets, in windows or whole records; held-out text never trains."""
    folder = tmp_path_factory.mktemp("raw")
    rows = []
    for n, talk in enumerate([*talks, [(True, 9)]]):
        messages = []
        for turn, (is_trained, length) in enumerate(talk):
            text = ("a" if is_trained else MASKED) * length
            answer = dict(role="assistant", content=text, weight=int(is_trained))
            messages += [dict(role="user", content=f"q{n}.{turn}"), answer]
        rows.append(dict(messages=messages))
    (folder / "data.jsonl").write_bytes(jsonl(*rows))
    held = [dict(prompt=f"{HELD_OUT} {n}", completion=HELD_OUT * 20) for n in range(5)]
    (folder / "eval-00000-of-00001.jsonl").write_bytes(jsonl(*held))
    store = lp.build_corpus_from_sources(
        folder, lp.ByteTokenizer(), processed_dir=str(folder / "out"), val_fraction=0.0
    )
    seen = set()
    for dataset, more in (
        (lp.LMDataset.from_store, dict(stride=stride)),
        (partial(lp.InstructionDataset, loss_on="all"), {}),
        (partial(lp.InstructionDataset, loss_on="response"), {}),
    ):
        train, val = lp.create_dataloaders(store, block_size, batch_size, dataset=dataset, **more)
        for batch in train:
            assert ord(MASKED) not in batch.y and ord(HELD_OUT) not in batch.x
            seen |= set(batch.y.unique().tolist())
        assert val is not None and any(ord(HELD_OUT) in batch.y for batch in val)
    assert ord("a") in seen
