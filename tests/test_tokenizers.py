"""Tokenizers: every text comes back, special tokens stay out of it, ids are the known ones."""

import json
import random
import shutil
import sys

import numpy as np
import pytest
from conftest import needs, run

import llm_pipeline as lp

tokenizers = needs("tokenizers")

ROLES = ("pad", "bos", "eos", "sep")
LITERALS = ["<|sep|>", "<|endoftext|>", "<|pad|>", "<|bos|>", "<|eos|>"]
NAMED = [
    "你好",
    "👩\u200d👩\u200d👧 🇺🇳 👍🏽",
    "e\u0301 é",
    "שָׁלוֹם",
    "\x00\x1f\x7f",
    "a\u2028b\u00a0c",
    "",
]
RANGES = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000), (0x1F300, 0x1FAFF)]
WORDS = ["the", " the", "The", "'s", "'LL", "don't", " 12345", "...", " --", "_", " _a", "é",
         "你好", "😀", "\n", "\n\n", "\r\n", "\t", "  ", " \u00a0", "e\u0301", "\x00", *LITERALS,
         "<|user|>"]  # fmt: skip


def random_strings(n: int) -> list[str]:
    """Half of random characters, half of WORDS."""
    rng, texts = random.Random(0), []
    for _ in range(n // 2):
        texts.append(
            "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randrange(25)))
        )
        texts.append("".join(rng.choices(WORDS, k=rng.randrange(30))))
    return texts


def sentences() -> str:
    people = ["the cat", "a dog", "my old friend", "her naïve brother", "das Mädchen", "你好 世界"]
    verbs = ["sees", "doesn't see", "walks 12 miles to", "sings, loudly, for", "😀 greets"]
    return "\n".join(f"{s} {v} {o}." for s in people for v in verbs for o in people) * 3


def trained_on(folder, text=None, **settings):
    """The store of a text with a vocabulary trained on it."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(sentences() if text is None else text, encoding="utf-8")
    given = dict(doc_delimiter=r"\n", vocab_size=600) | settings
    return lp.build_corpus_from_sources(folder, "bpe", folder=folder / "store", **given)


def without_tiktoken(make):
    """Call `make` as on a machine where tiktoken is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tiktoken", None)
        lp.bpe_tokenizer.cache_clear()
        try:
            return make()
        finally:
            lp.bpe_tokenizer.cache_clear()


@pytest.fixture(scope="module")
def gpt2(data):
    return lp.load_tokenizer(str(data / "gpt2_bpe"))


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Byte-level BPE of 600 entries, trained on a few sentences."""
    folder = tmp_path_factory.mktemp("trained")
    return trained_on(folder, extra_special_tokens="<|user|>,<|tool|>").tokenizer


def test_bytes_are_utf8_and_give_back_any_string():
    tokenizer = lp.ByteTokenizer()
    for text in [*random_strings(10_000), *NAMED, *LITERALS, "\ud800a\udfff"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("你好").tolist() == list("你好".encode())
    assert [getattr(tokenizer, f"{r}_id") for r in ROLES] == [256, 257, 258, 259]
    assert tokenizer.vocab_size == 260 and max(tokenizer.encode("<|sep|>")) < 256
    assert tokenizer.decode([72, 256, 257, 105, 258, 259]) == "Hi"
    assert tokenizer.decode([0xE4, 0xBD]).startswith("\ufffd")


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
def test_bpe_gives_back_any_text_and_makes_no_special_token_of_it(kind, request):
    tokenizer = request.getfixturevalue(kind)
    special = {getattr(tokenizer, f"{role}_id") for role in ROLES}
    strings = random_strings(10_000) + NAMED + LITERALS + WORDS
    for text, ids in zip(strings, tokenizer.encode_batch(strings), strict=True):
        assert tokenizer.decode(ids) == text and not special & set(ids.tolist())
    got = tokenizer.decode(tokenizer.encode("a\ud800b\udfff é"))  # lone surrogates
    assert got == "a\ufffdb\ufffd é"
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("kind", ["byte", "gpt2", "trained"])
def test_spec_makes_the_tokenizer_again(kind, request):
    tokenizer = lp.ByteTokenizer() if kind == "byte" else request.getfixturevalue(kind)
    again = lp.tokenizer_from_spec(json.loads(json.dumps(tokenizer.spec())))
    for name in ("vocab_size", "unk_id", "prefix", "end_ids", *(f"{role}_id" for role in ROLES)):
        assert getattr(again, name) == getattr(tokenizer, name)
    for text in [*NAMED, *LITERALS, sentences()]:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


# --- GPT-2 ---


@pytest.mark.parametrize("has_tiktoken", [True, False])
def test_gpt2_ids_are_the_known_ones(has_tiktoken, gpt2, data, reference):
    """In words, random text, real files."""
    tokenizer = gpt2
    if not has_tiktoken:
        tokenizer = without_tiktoken(lambda: lp.load_tokenizer(str(data / "gpt2_bpe")))
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.vocab_size == 50257 and tokenizer.eos_id == tokenizer.bos_id == 50256
    strings = random_strings(6000) + NAMED
    for text, ids in zip(strings, tokenizer.encode_batch(strings), strict=True):
        assert ids.tolist() == reference.encode_ordinary(text)
    for file in ("sms_spam_collection/SMSSpamCollection", "wikitext-2/wiki.valid.tokens"):
        text = (data / file).read_text(encoding="utf-8")
        wanted = reference.encode_to_numpy(text, disallowed_special=())
        assert np.array_equal(tokenizer.encode(text), wanted)


@pytest.mark.parametrize("text", ["\n" * 1_000_000 + "a", "a" + " " * 1_000_000, "a" * 300_000])
def test_long_runs_of_one_character(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


# --- other people's folders ---


def test_a_hugging_face_folder(gpt2, tmp_path):
    transformers = needs("transformers")
    library = tokenizers.Tokenizer.from_str(gpt2.json)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<|endoftext|>", pad_token="<|mypad|>"
    )
    fast.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = lp.load_tokenizer(str(name))
        assert loaded.pad_id == fast.pad_token_id != loaded.eos_id == 50256
        assert loaded.bos_id is None and not loaded.prefix  # none is declared
        for text in WORDS + NAMED:
            assert loaded.encode(text).tolist() == gpt2.encode(text).tolist()


def test_a_normalizer_is_kept_where_only_the_model_is_described(gpt2, tmp_path):
    """AutoTokenizer would drop the normalizer."""
    needs("transformers")
    library = tokenizers.Tokenizer.from_str(gpt2.json)
    library.normalizer = tokenizers.normalizers.Lowercase()
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 50256}')
    loaded = lp.load_tokenizer(str(tmp_path))
    assert loaded.encode("HELLO").tolist() == gpt2.encode("hello").tolist()


@pytest.mark.parametrize("declared", [True, False], ids=["by its class", "by the model's type"])
def test_a_slow_tokenizer(declared, data, gpt2, tmp_path):
    """vocab.json, merges.txt and tokens added to them."""
    transformers = needs("transformers")
    shutil.copy(data / "gpt2_bpe/encoder.json", tmp_path / "vocab.json")
    shutil.copy(data / "gpt2_bpe/vocab.bpe", tmp_path / "merges.txt")
    (tmp_path / "added_tokens.json").write_text('{"<|user|>": 50257, "<|bot|>": 50258}')
    name = "tokenizer_config.json" if declared else "config.json"
    said = {"tokenizer_class": "GPT2Tokenizer"} if declared else {"model_type": "gpt2"}
    (tmp_path / name).write_text(json.dumps(said))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = lp.load_tokenizer(str(tmp_path))
    assert ours.vocab_size == 50259 and 50257 in ours.encode("a<|user|>b")
    for text in ["a<|user|>b <|bot|>", *WORDS, *NAMED]:
        if text != "<|endoftext|>":  # special in theirs, plain text in ours
            assert ours.encode(text).tolist() == theirs(text)["input_ids"]


def test_what_tokenizers_saves_is_read_with_its_names(tmp_path):
    library = tokenizers.ByteLevelBPETokenizer()
    names = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
    library.train_from_iterator([sentences()], vocab_size=400, special_tokens=names)
    library.save(str(tmp_path / "tokenizer.json"))
    library.save_model(str(tmp_path))
    (tmp_path / "two").mkdir()
    for file in ("vocab.json", "merges.txt"):
        shutil.move(tmp_path / file, tmp_path / "two")
    for name in (tmp_path / "tokenizer.json", tmp_path, tmp_path / "two"):
        loaded = lp.load_tokenizer(str(name))
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 2)
        assert loaded.encode("the cat").tolist() == library.encode("the cat").ids
        assert not set(loaded.encode("<s></s><pad>").tolist()) & {0, 1, 2}


# --- the fast path and the plain one ---


def test_trained_bpe_is_the_same_with_and_without_tiktoken(trained):
    plain = without_tiktoken(lambda: lp.tokenizer_from_spec(trained.spec()))
    for text in random_strings(3000):
        assert plain.encode(text).tolist() == trained.encode(text).tolist()


CHANGES = {  # name: what it does to a tokenizer.json
    "an entry that no merge makes": lambda t: t["model"]["vocab"].update(zebras=9000),
    "tokens that begin alike": lambda t: t["added_tokens"].extend(
        dict(t["added_tokens"][0], id=9000 + i, content=content, special=False)
        for i, content in enumerate(("[TEXT", "[TEXT]"))),
    "prefix space": lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
    "normalizer": lambda t: t.update(normalizer={"type": "Lowercase"}),
    "half of the merges": lambda t: t["model"].update(merges=t["model"]["merges"][::2]),
    "merges reversed": lambda t: t["model"]["merges"].reverse(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_peoples_vocabularies_give_one_answer(trained, change):
    """tiktoken may only replace the library if it gives the same ids."""
    library = json.loads(trained.spec()["json"])
    CHANGES[change](library)
    spec = trained.spec() | {"json": json.dumps(library)}
    plain = tokenizers.Tokenizer.from_str(spec["json"])
    plain.encode_special_tokens = True
    for text in ("zebras", "The zebras", "a [TEXT] [TEXT b", "the cat sees the dog", sentences()):
        wanted = plain.encode(text, add_special_tokens=False).ids
        assert lp.tokenizer_from_spec(spec).encode(text).tolist() == wanted


# --- training ---


def test_tokens_of_the_user_are_made_from_text(tmp_path):
    """In the store and elsewhere, whole, whatever surrounds them; ours never are."""
    text = "".join(f"<|user|>hi {n}<|sep|> <|tool|>x<|user|>\n" for n in range(50))
    extra = "<|user|>,<|tool|>,<|sep|>"  # the last is ours already
    store = trained_on(tmp_path, text, extra_special_tokens=extra, vocab_size=300)
    library = tokenizers.Tokenizer.from_str(store.tokenizer.json)
    user, tool, sep = map(library.token_to_id, ("<|user|>", "<|tool|>", "<|sep|>"))
    ids = [*store.tokens["train"].tolist(), *store.tokens["val"].tolist()]
    assert ids.count(user) == 100 and ids.count(tool) == 50 and sep not in ids
    assert store.tokenizer.decode(store.tokenizer.encode("a<|user|> b")) == "a<|user|> b"
    assert not any("user" in token for token in library.get_vocab() if token != "<|user|>")


def test_a_token_of_the_user_is_never_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(lp, "BLOCK", 100)
    text = "".join(f"<user:name>hi {n} <user:name>\n" for n in range(200))
    more = dict(
        extra_special_tokens="<user:name>", vocab_size=300, doc_delimiter="", val_fraction=0
    )
    store = trained_on(tmp_path, text, **more)
    library = tokenizers.Tokenizer.from_str(store.tokenizer.json)
    assert store.tokens["train"][1:-1].tolist() == library.encode(text).ids


def test_special_tokens_by_our_names_and_others(trained, tmp_path, capsys):
    library = tokenizers.Tokenizer.from_str(trained.json)
    ids = [getattr(trained, f"{role}_id") for role in ROLES]
    assert [library.id_to_token(i) for i in ids] == [f"<|{role}|>" for role in ROLES]
    assert trained.vocab_size == library.get_vocab_size() and trained.end_ids == (2, 3)
    names = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
    tokenizer = trained_on(tmp_path, special_tokens=",".join(names)).tokenizer
    library = tokenizers.Tokenizer.from_str(tokenizer.json)
    assert [library.token_to_id(name) for name in names] == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.decode(tokenizer.encode("<s> the </s>")) == "<s> the </s>"
    assert library.token_to_id("<|bos|>") is None
    with pytest.raises(lp.UserError, match="end-of-text"):
        trained_on(tmp_path / "b", special_tokens="<a>,<b>")
    capsys.readouterr()
    trained_on(tmp_path / "c", special_tokens="<pad>,<begin>,</s>,<turn>")
    assert "pad is <pad>, bos is none, eos is </s>, sep is </s>" in capsys.readouterr().err
    # A token that text can make has no role.
    trained_on(tmp_path / "d", special_tokens="</s>", extra_special_tokens="<sep>")
    assert "eos is </s>, sep is </s>" in capsys.readouterr().err


def test_size_and_frequency_are_limits(tmp_path):
    for size in (260, 340):
        assert trained_on(tmp_path / f"{size}", vocab_size=size).tokenizer.vocab_size == size
    tokenizer = trained_on(tmp_path / "rare", vocab_size=5000, min_frequency=40).tokenizer
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    merged = [text for text in texts if len(text) > 1 and "\ufffd" not in text]
    assert len(merged) > 20 and all(sentences().count(text) >= 40 for text in merged)


@pytest.mark.parametrize("shape", ["text", "instruction", "long"])
def test_bpe_learns_from_training_records_alone(tmp_path, shape):
    """A word that is frequent in one record becomes a token only if the record is trained on."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(60)]
    (tmp_path / "raw").mkdir()
    if shape == "long":
        (tmp_path / "raw/text.txt").write_text("".join(f"{w} " * 300 for w in words), "utf-8")
    else:
        rows = [{"text": f"{w} " * 20} for w in words]
        if shape == "instruction":
            rows = [dict(instruction=f"{w} " * 10, input=w, output=f"{w} " * 10) for w in words]
        (tmp_path / "raw/text.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    flags = dict(folder=tmp_path / "store", vocab_size=3000)
    store = lp.build_corpus_from_sources(tmp_path / "raw", "bpe", **flags)
    seen = {s: set(store.tokenizer.decode(store.tokens[s]).split()) for s in ("train", "val")}
    held_out = [w for w in words if w in seen["val"] - seen["train"]]
    learned = {store.tokenizer.decode([i]).strip() for i in range(store.tokenizer.vocab_size)}
    assert held_out and not learned & set(held_out)
    assert len(learned & seen["train"]) > 40


# --- vocabularies that mark the beginnings of words ---


def sentencepiece_like(folder, scheme="always", fallback=False):
    """A BPE vocabulary as SentencePiece writes them, with or without a token for each byte."""
    decoders = tokenizers.decoders
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(byte_fallback=fallback, unk_token="<unk>", fuse_unk=True)
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.decoder = decoders.Metaspace(prepend_scheme=scheme)
    byte_tokens = []
    if fallback:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    texts = ["the cat sees the dog and the other cat sings " * 3, "a dog walks far away", "#:IOut"]
    library.train_from_iterator(texts, trainer)
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return lp.load_tokenizer(str(folder / "tokenizer.json"))


WORD_STARTS = ["the cat sees the dog", "a dog and the other cat walks far away", "sings"]


@pytest.mark.parametrize("fallback", [False, True], ids=["metaspace", "byte fallback"])
def test_a_stream_of_tokens_keeps_its_spaces(fallback, tmp_path):
    tokenizer = sentencepiece_like(tmp_path, fallback=fallback)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert not tokenizer.cuts_safely
    for text in WORD_STARTS + (["the 你 dog 😀"] if fallback else []):
        ids = tokenizer.encode(text).tolist()
        for before, wanted in (([tokenizer.bos_id], text), (tokenizer.encode("the"), " " + text)):
            assert "".join(lp.text_pieces(ids, tokenizer, "", before)) == wanted


# --- what cannot be used ---


def refuse(tmp_path, tokenizer, *words, text="some text " * 50):
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "raw/a.txt").write_text(text)
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "out"]
    result = run("prepare", *flags, "--tokenizer", tokenizer).fails(1, *words)
    assert len(result.errors) == 1
    assert not list((tmp_path / "out").glob("*/meta.json"))


def test_names_and_folders_without_a_tokenizer(tmp_path, data):
    refuse(tmp_path, "no-such-name", "no-such-name", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, tmp_path / "empty", "empty", "tokenizer.json")
    shutil.copy(data / "gpt2_bpe/encoder.json", tmp_path / "vocab.json")  # without its merges
    refuse(tmp_path, tmp_path, tmp_path.name)
    shutil.copy(data / "gpt2_bpe/vocab.bpe", tmp_path / "merges.txt")  # of another vocabulary
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "<|endoftext|>": 1}))
    refuse(tmp_path, tmp_path, "vocab.json", "merges.txt")
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "a.json"))
    refuse(tmp_path, tmp_path / "a.json", "end-of-text")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "{}", '{"model": 5}', "[" * 100_000, "\ufffd\x00"]
)
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    refuse(tmp_path, tmp_path / "tokenizer.json", "tokenizer.json")
    refuse(tmp_path, tmp_path, "tokenizer.json")


def test_a_pattern_that_panics_is_one_line(trained, tmp_path):
    library = tokenizers.Tokenizer.from_str(trained.json)
    pattern = tokenizers.Regex(r"(x+x+)+y")
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    library.save(str(tmp_path / "tokenizer.json"))
    refuse(tmp_path, tmp_path / "tokenizer.json", "tokenizer", "Regex", text="x" * 4000)
