"""Tokenizers: every text comes back, special tokens stay out of it, ids are the known ones."""

import json
import random
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import needs, run
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_pipeline as lp

LITERALS = ["<|sep|>", "<|endoftext|>", "<|pad|>", "<|bos|>", "<|eos|>"]
NAMED = [
    "你好",
    "👩\u200d👩\u200d👧 🇺🇳 👍🏽",
    "e\u0301 é",
    "שָׁלוֹם",
    "\x00\x1f\x7f",
    "a\u2028b\u00a0c",
    "İıſß",
    "\ufeff",
    "",
]
RANGES = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xD800, 0xE000), (0xE000, 0x110000),
          (0x1F300, 0x1FAFF), (0x300, 0x370), (0x2000, 0x2070)]  # fmt: skip
FEW = settings(max_examples=200, deadline=None, database=None, derandomize=True)
WORDS = ["the", " the", "The", "'s", "'LL", "don't", " 12345", "...", " --", "_", " _a"]
WORDS += [
    "é",
    "你好",
    "😀",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "  ",
    " \u00a0",
    "e\u0301",
    "\x00",
    *LITERALS,
]
MIXED = st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=12).map("".join)


def random_strings(n: int, surrogates: bool) -> list[str]:
    rng = random.Random(0)
    ranges = [r for r in RANGES if surrogates or r[0] != 0xD800]
    return [
        "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(25)))
        for _ in range(n)
    ]


def prepared(folder, *flags):
    """The store that `prepare` would make, without its report."""
    config = lp.parse(["prepare", *map(str, flags)])[1]
    return lp.build_corpus_from_sources(config, folder=folder)


def without_tiktoken(make):
    """Call `make` as on a machine where tiktoken is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tiktoken", None)
        return make()


@pytest.fixture(scope="module")
def gpt2(data):
    return lp.load_tokenizer(str(data / "gpt2_bpe"))


@pytest.fixture(scope="module")
def gpt2_plain(data):
    return without_tiktoken(lambda: lp.load_tokenizer(str(data / "gpt2_bpe")))


@pytest.fixture(scope="module")
def reference(data):
    """tiktoken's own GPT-2, from the same files."""
    tiktoken = needs("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(data / "gpt2_bpe/vocab.bpe"), str(data / "gpt2_bpe/encoder.json")
        )
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def sentences() -> str:
    subjects = [
        "the cat",
        "a dog",
        "my old friend",
        "her naïve brother",
        "das Mädchen",
        "你好 世界",
    ]
    verbs = ["sees", "doesn't see", "walks 12 miles to", "sings, loudly, for", "😀 greets"]
    return "\n".join(f"{s} {v} {o}." for s in subjects for v in verbs for o in subjects) * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Byte-level BPE of 600 entries, trained on a few sentences."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "raw").mkdir()
    (folder / "raw/text.txt").write_text(sentences(), encoding="utf-8")
    flags = ["--data_dir", folder / "raw", "--tokenizer", "bpe", "--vocab_size", 600]
    flags += ["--doc_delimiter", r"\n", "--extra_special_tokens", "<|user|>,<|tool|>"]
    return prepared(folder / "store", *flags).tokenizer


@pytest.fixture(scope="module")
def trained_plain(trained):
    return without_tiktoken(lambda: lp.tokenizer_from_spec(trained.spec()))


# --- bytes ---


def test_bytes_give_back_any_string():
    tokenizer = lp.ByteTokenizer()
    strings = random_strings(10_000, surrogates=True) + NAMED + LITERALS
    assert any("\ud800" <= c <= "\udfff" for s in strings for c in s)
    for text in strings:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_are_utf8():
    tokenizer = lp.ByteTokenizer()
    assert tokenizer.encode("你好").tolist() == list("你好".encode())
    names = ("vocab_size", "pad_id", "bos_id", "eos_id", "sep_id")
    assert [getattr(tokenizer, n) for n in names] == [260, 256, 257, 258, 259]
    assert max(tokenizer.encode("<|sep|>")) < 256
    assert tokenizer.decode([72, 256, 257, 105, 258, 259]) == "Hi"
    assert tokenizer.decode([0xE4, 0xBD]).startswith("\ufffd")


# --- any tokenizer ---


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_plain", "trained"])
def test_bpe_gives_back_any_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    assert tokenizer.encode_batch([]) == []
    strings = random_strings(10_000, surrogates=False) + NAMED + LITERALS + WORDS
    for text, ids in zip(strings, tokenizer.encode_batch(strings), strict=True):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_plain", "trained"])
def test_bpe_replaces_lone_surrogates(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = "a\ud800b\udfff é \ud83d\ude00"
    got = tokenizer.decode(tokenizer.encode(text))
    assert got == re.sub("[\ud800-\udfff]", "\ufffd", text)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_plain", "trained"])
def test_text_never_becomes_a_special_token(kind, request):
    tokenizer = request.getfixturevalue(kind)
    special = {getattr(tokenizer, f"{n}_id") for n in ("pad", "bos", "eos", "sep")}
    extra = ["<|user|>", "<|tool|>"] if kind == "trained" else []
    sizes = tokenizer.token_bytes()
    for literal in LITERALS + extra:
        for text in (literal, f"a {literal}{literal} b"):
            ids = tokenizer.encode(text).tolist()
            assert not special & set(ids)
            assert tokenizer.decode(ids) == text
            assert (sizes[ids] > 0).all(), "special tokens hold no text"


@pytest.mark.parametrize("kind", ["byte", "gpt2", "trained"])
def test_token_bytes_add_up(kind, request):
    tokenizer = lp.ByteTokenizer() if kind == "byte" else request.getfixturevalue(kind)
    sizes = tokenizer.token_bytes()
    assert len(sizes) == tokenizer.vocab_size
    for text in NAMED + LITERALS + [sentences()]:
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    for name in ("pad", "bos", "eos", "sep"):
        assert sizes[getattr(tokenizer, f"{name}_id")] == 0


@pytest.mark.parametrize("kind", ["byte", "gpt2", "trained"])
def test_spec_makes_the_tokenizer_again(kind, request):
    tokenizer = lp.ByteTokenizer() if kind == "byte" else request.getfixturevalue(kind)
    again = lp.tokenizer_from_spec(json.loads(json.dumps(tokenizer.spec())))
    assert again.spec() == tokenizer.spec()
    for name in ("vocab_size", "pad_id", "bos_id", "eos_id", "sep_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    for text in [*NAMED, *LITERALS, sentences()]:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize(
    "spec",
    [{}, {"kind": "magic"}, {"kind": "bpe"}, {"kind": "bpe", "json": "{}", "bos_id": 0},
     {"kind": "bpe", "json": "nonsense"}],
)  # fmt: skip
def test_a_spec_that_lies_is_refused(spec):
    with pytest.raises(lp.UserError):
        lp.tokenizer_from_spec(spec)


@pytest.mark.parametrize("change", [{"eos_id": 10**6}, {"eos_id": -1}, {"sep_id": "3"}])
def test_special_ids_outside_the_vocabulary_are_refused(trained, change):
    with pytest.raises(lp.UserError):
        lp.tokenizer_from_spec(trained.spec() | change)


# --- GPT-2 ---


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_plain"])
def test_gpt2_known_ids(kind, request):
    tokenizer = request.getfixturevalue(kind)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.vocab_size == 50257
    assert tokenizer.eos_id == tokenizer.bos_id == 50256
    assert 50256 not in tokenizer.encode("<|endoftext|>")


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_plain"])
def test_gpt2_ids_are_tiktokens_on_random_text(kind, request, reference):
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(1)
    mixed = ["".join(rng.choices(WORDS, k=rng.randrange(30))) for _ in range(3000)]
    strings = mixed + random_strings(3000, surrogates=False) + NAMED
    for text, ids in zip(strings, tokenizer.encode_batch(strings), strict=True):
        assert ids.tolist() == reference.encode_ordinary(text)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_plain"])
@pytest.mark.parametrize(
    "file",
    ["sms_spam_collection/SMSSpamCollection", "tinyshakespeare/input.txt",
     "fineweb/fineweb_10rows.jsonl", "wikitext-2/wiki.valid.tokens"],
)  # fmt: skip
def test_gpt2_ids_are_tiktokens_on_real_files(kind, file, request, data, reference):
    text = (data / file).read_text(encoding="utf-8")
    ids = request.getfixturevalue(kind).encode(text)
    assert np.array_equal(ids, reference.encode_to_numpy(text, disallowed_special=()))


@pytest.mark.parametrize("text", ["\n" * 1_000_000 + "a", "a" + " " * 1_000_000, "a" * 300_000])
def test_long_runs_of_one_character(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize(
    "names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")], ids="/".join
)
def test_both_pairs_of_names(names, data, tmp_path, gpt2):
    shutil.copy(data / "gpt2_bpe/encoder.json", tmp_path / names[0])
    shutil.copy(data / "gpt2_bpe/vocab.bpe", tmp_path / names[1])
    assert lp.load_tokenizer(str(tmp_path)).spec() == gpt2.spec()


def test_a_hugging_face_folder(data, gpt2, tmp_path):
    transformers = needs("transformers")
    tokenizers = needs("tokenizers")
    library = tokenizers.Tokenizer.from_str(gpt2.spec()["json"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<|endoftext|>", pad_token="<|mypad|>"
    )
    fast.save_pretrained(tmp_path)
    folder = lp.load_tokenizer(str(tmp_path))
    file = lp.load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert folder.pad_id == fast.pad_token_id != folder.eos_id
    assert folder.eos_id == file.eos_id == 50256
    for text in WORDS + NAMED:
        wanted = gpt2.encode(text).tolist()
        assert folder.encode(text).tolist() == file.encode(text).tolist() == wanted


# --- the fast path and the plain one ---


@FEW
@given(text=MIXED)
def test_trained_bpe_is_the_same_with_and_without_tiktoken(trained, trained_plain, text):
    assert trained_plain.encode(text).tolist() == trained.encode(text).tolist()


def changed(spec: dict, change) -> dict:
    library = json.loads(spec["json"])
    change(library)
    return spec | {"json": json.dumps(library)}


def add_unreachable(library):
    """An entry that no merge makes: whole words must not jump to it."""
    vocab = library["model"]["vocab"]
    vocab["zebras"] = max(vocab.values()) + 1


def add_plain_token(library):
    """An added token that is text: tokenizers finds it before it cuts words."""
    number = max(library["model"]["vocab"].values()) + 1
    token = dict(library["added_tokens"][0], id=number, content="[TEXT]", special=False)
    library["added_tokens"].append(token)


def add_prefix_space(library):
    library["pre_tokenizer"]["add_prefix_space"] = True


def add_normalizer(library):
    library["normalizer"] = {"type": "Lowercase"}


def drop_merges(library):
    library["model"]["merges"] = library["model"]["merges"][::2]


def reverse_merges(library):
    library["model"]["merges"].reverse()


@pytest.mark.parametrize(
    "change",
    [add_unreachable, add_plain_token, add_prefix_space, add_normalizer, drop_merges,
     reverse_merges],
)  # fmt: skip
def test_other_peoples_vocabularies_give_one_answer(trained, change):
    """tiktoken may only stand in where it gives the library's own ids."""
    spec = changed(trained.spec(), change)
    try:
        with_it = lp.tokenizer_from_spec(spec)
    except lp.UserError:
        return
    plain = without_tiktoken(lambda: lp.tokenizer_from_spec(spec))
    for text in ("zebras", "The zebras", "a [TEXT] b", "the cat sees the dog", sentences()):
        assert with_it.encode(text).tolist() == plain.encode(text).tolist()


# --- training ---


def test_trained_special_tokens_keep_their_roles(trained):
    import tokenizers

    library = tokenizers.Tokenizer.from_str(trained.spec()["json"])
    for role in ("pad", "bos", "eos", "sep"):
        assert library.id_to_token(getattr(trained, f"{role}_id")) == f"<|{role}|>"
    assert len({trained.pad_id, trained.bos_id, trained.eos_id, trained.sep_id}) == 4
    for token in ("<|user|>", "<|tool|>"):
        assert library.token_to_id(token) is not None
    assert trained.vocab_size == library.get_vocab_size()


@pytest.mark.parametrize("vocab_size", [260, 300, 340])
def test_vocab_size_is_a_limit(tmp_path, vocab_size):
    (tmp_path / "text.txt").write_text(sentences(), encoding="utf-8")
    flags = ["--data_dir", tmp_path / "text.txt", "--tokenizer", "bpe"]
    tokenizer = prepared(tmp_path / "store", *flags, "--vocab_size", vocab_size).tokenizer
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.decode(tokenizer.encode("你好 x")) == "你好 x"


@pytest.mark.parametrize("least", [2, 40])
def test_min_frequency(tmp_path, least):
    text = sentences()
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    flags = ["--data_dir", tmp_path / "text.txt", "--tokenizer", "bpe", "--vocab_size", 5000]
    tokenizer = prepared(tmp_path / "store", *flags, "--min_frequency", least).tokenizer
    sizes, data = tokenizer.token_bytes(), text.encode()
    merged = [t for t in range(tokenizer.vocab_size) if sizes[t] > 1]
    assert len(merged) > 20
    raw = {number: token for token, number in library_vocab(tokenizer).items()}
    for number in merged:
        assert data.count(raw[number]) >= least, raw[number]


def library_vocab(tokenizer) -> dict[bytes, int]:
    """The bytes of each ordinary token, by GPT-2's alphabet as published."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    of = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}
    vocab = json.loads(tokenizer.spec()["json"])["model"]["vocab"]
    return {bytes(of[c] for c in token): n for token, n in vocab.items() if all(map(of.get, token))}


def marker(number: int) -> str:
    rng = random.Random(number)
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9))


@pytest.mark.parametrize("shape", ["text", "instruction", "long"])
def test_bpe_learns_from_training_records_alone(tmp_path, shape):
    """A word that is frequent in one record becomes a token only if the record is trained on."""
    words = [marker(i) for i in range(60)]
    if shape == "long":
        (tmp_path / "text.txt").write_text("".join(f"{w} " * 300 for w in words), "utf-8")
    else:
        rows = [{"text": f"{w} " * 20} for w in words]
        if shape == "instruction":
            rows = [
                {"instruction": f"{w} " * 10, "input": w, "output": f"{w} " * 10} for w in words
            ]
        (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    flags = ["--data_dir", tmp_path, "--tokenizer", "bpe", "--vocab_size", 3000]
    store = prepared(tmp_path.parent / f"{tmp_path.name}-store", *flags)
    seen = {s: set(store.tokenizer.decode(store.tokens[s]).split()) for s in ("train", "val")}
    held_out = [w for w in words if w in seen["val"] - seen["train"]]
    learned = {token.decode("utf-8", "replace").strip() for token in library_vocab(store.tokenizer)}
    assert held_out
    assert not learned & set(held_out)
    assert len(learned & seen["train"]) > 40


def test_training_twice_gives_the_same_vocabulary(tmp_path):
    (tmp_path / "text.txt").write_text(sentences(), encoding="utf-8")
    flags = ["--data_dir", tmp_path / "text.txt", "--tokenizer", "bpe", "--vocab_size", 500]
    one, two = (prepared(tmp_path / n, *flags) for n in "ab")
    assert one.tokenizer.spec() == two.tokenizer.spec()
    assert one.fingerprint == two.fingerprint


# --- what cannot be used ---


def refuse(tmp_path, tokenizer, *words, code=1):
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "raw/a.txt").write_text("some text " * 50)
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "out"]
    result = run("prepare", *flags, "--tokenizer", tokenizer).fails(code, *words)
    assert len(result.errors) == 1
    assert not list((tmp_path / "out").glob("*/meta.json"))


def test_an_unknown_name_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse(tmp_path, "no-such-name", "no-such-name", "no such file or folder")


def test_a_folder_without_a_vocabulary(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, tmp_path / "empty", "empty", "tokenizer.json")


def test_a_vocabulary_without_merges(tmp_path, data):
    shutil.copy(data / "gpt2_bpe/encoder.json", tmp_path / "vocab.json")
    refuse(tmp_path, tmp_path, tmp_path.name, "merges.txt")


def test_merges_of_another_vocabulary(tmp_path, data):
    shutil.copy(data / "gpt2_bpe/vocab.bpe", tmp_path / "merges.txt")
    vocab = {chr(c): c - 33 for c in range(33, 127)} | {"<|endoftext|>": 94}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    refuse(tmp_path, tmp_path, "vocab.json", "merges.txt")


def test_merges_that_lack_most_of_the_vocabulary(tmp_path, data):
    """Half a download: refused, or at least the same ids with and without tiktoken."""
    shutil.copy(data / "gpt2_bpe/encoder.json", tmp_path / "encoder.json")
    lines = (data / "gpt2_bpe/vocab.bpe").read_text(encoding="utf-8").split("\n")
    (tmp_path / "vocab.bpe").write_text("\n".join(lines[:1000]), encoding="utf-8")
    try:
        tokenizer = lp.load_tokenizer(str(tmp_path))
    except lp.UserError as error:
        assert "encoder.json" in str(error)
        return
    plain = without_tiktoken(lambda: lp.load_tokenizer(str(tmp_path)))
    text = "wonderful tokenizers"
    assert tokenizer.encode(text).tolist() == plain.encode(text).tolist()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "{}", '{"model": 5}', "[" * 100_000, "\ufffd\x00"]
)
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    refuse(tmp_path, tmp_path / "tokenizer.json", "tokenizer.json")
    refuse(tmp_path, tmp_path, "tokenizer.json")


def test_a_vocabulary_without_an_end_of_text(tmp_path):
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    refuse(tmp_path, tmp_path, "end-of-text")


def test_a_name_on_the_hub_takes_nothing_from_the_current_folder(tmp_path, monkeypatch, gpt2):
    tokenizers = needs("tokenizers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "a"}')
    library = tokenizers.Tokenizer.from_str(gpt2.json)
    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", lambda name: library)
    assert lp.load_tokenizer("gpt2").eos_id == gpt2.eos_id


@pytest.mark.parametrize("content", ["5", "[1]", "null", "{", '{"eos_token": 5}', '"x"'])
def test_a_folder_whose_configuration_is_broken(tmp_path, data, content, gpt2):
    """The vocabulary names its end of text itself, so the broken file does no harm."""
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(data / "gpt2_bpe" / name, tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text(content)
    try:
        assert lp.load_tokenizer(str(tmp_path)).eos_id == gpt2.eos_id
    except lp.UserError as error:
        assert "tokenizer_config.json" in str(error)


# --- vocabularies that mark the beginnings of words ---


def sentencepiece_like(fallback: bool) -> lp.BPETokenizer:
    """A BPE vocabulary as SentencePiece writes them, with or without a token for each byte."""
    tokenizers = needs("tokenizers")
    decoders = tokenizers.decoders
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(byte_fallback=fallback, unk_token="<unk>", fuse_unk=True)
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    if fallback:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)] * fallback
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    texts = ["the cat sees the dog and the other cat sings " * 3, "a dog walks far away"]
    library.train_from_iterator(texts, trainer)
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    return lp.BPETokenizer(json.dumps(spec), pad_id=2, bos_id=1, eos_id=2, sep_id=2)


WORD_STARTS = ["the cat sees the dog", "a dog and the other cat walks far away", "sings"]


@pytest.mark.parametrize("fallback", [False, True], ids=["metaspace", "byte fallback"])
def test_a_stream_of_tokens_keeps_its_spaces(fallback):
    tokenizer = sentencepiece_like(fallback)
    for text in WORD_STARTS + ["the 你 dog 😀"] * fallback:
        ids = tokenizer.encode(text).tolist()
        for before, wanted in (([tokenizer.bos_id], text), (tokenizer.encode("the"), " " + text)):
            stream = lp.TextStream(tokenizer, "", before)
            assert "".join(map(stream.add, ids)) + stream.finish() == wanted


@pytest.mark.parametrize("fallback", [False, True], ids=["metaspace", "byte fallback"])
def test_token_bytes_count_the_spaces(fallback):
    tokenizer = sentencepiece_like(fallback)
    sizes = tokenizer.token_bytes()
    for text in WORD_STARTS + ["the 你 dog 😀"] * fallback:
        # One more for the space that such a vocabulary puts before every text.
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode()) + 1
    assert sizes[[tokenizer.bos_id, tokenizer.eos_id]].sum() == 0


def test_ids_far_beyond_the_entries_are_refused(trained):
    spec = trained.spec()
    library = json.loads(spec["json"])
    library["model"]["vocab"]["far"] = 2**31
    with pytest.raises(lp.UserError, match="ids up to 2,147,483,648"):
        lp.tokenizer_from_spec(spec | {"json": json.dumps(library)})


def test_a_pattern_that_panics_is_one_line(trained, tmp_path):
    tokenizers = needs("tokenizers")
    library = tokenizers.Tokenizer.from_str(trained.json)
    pattern = tokenizers.Regex(r"(x+x+)+y")
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.txt").write_text("x" * 4000)
    flags = ["--data_dir", tmp_path / "raw", "--tokenizer", tmp_path / "tokenizer.json"]
    result = run("prepare", *flags, "--out_dir", tmp_path / "store").fails(1, "tokenizer", "Regex")
    assert len(result.errors) == 1
