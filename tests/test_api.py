"""The program as a library: load, train, tune, score, without a command line."""

import json
import threading

import pytest
import torch
from conftest import differences, needs, run

import llm_pipeline as lp

TINY = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, dropout=0.1, batch_size=4, max_steps=12,
            lr=1e-3, device="cpu", dtype="float32")  # fmt: skip


@pytest.fixture
def source(corpus) -> dict:
    """The flags of the small corpus as keywords."""
    names = [flag.removeprefix("--") for flag in corpus[::2]]
    return dict(zip(names, corpus[1::2], strict=True)) | {"val_fraction": 0.2}


def test_a_checkpoint_loads_and_generates(tiny_checkpoint, capfd):
    model = lp.load(tiny_checkpoint, device="cpu", max_new_tokens=9)
    text = model.generate("Repeat", temperature=0)
    assert model.generate("Repeat", temperature=0, num_samples=2) == [text, text]
    several = dict(num_samples=3, top_k=0)
    texts = model.generate("Repeat", **several)
    assert len(set(texts)) == 3
    assert capfd.readouterr().out == ""
    flags = ["--ckpt", tiny_checkpoint, "--device", "cpu", "--max_new_tokens", 9]
    assert run("sample", *flags, "--prompt", "Repeat", "--temperature", 0).out == text + "\n"
    result = run("sample", *flags, "--prompt", "Repeat", "--num_samples", 3, "--top_k", 0)
    assert result.out == "".join(f"{text}\n" for text in texts)


def test_a_store_and_an_export_from_python(source, tiny_checkpoint, tmp_path, capfd):
    store = lp.prepare(**source, out_dir=tmp_path / "store", tokenizer="byte")
    assert store == str(tmp_path / "store")
    best = lp.train(**TINY | {"max_steps": 2}, data_dir=store, out_dir=tmp_path / "run")
    assert lp.evaluate(ckpt=best, data_dir=store, device="cpu")["tokens"] > 0
    needs("transformers")
    assert lp.export(ckpt=best, out_dir=tmp_path / "hf") == str(tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").exists()
    assert capfd.readouterr().out == ""
    with pytest.raises(lp.UserError, match="--gguf and --adapter"):
        lp.export(ckpt=best, gguf="x.gguf", adapter=True)


def test_training_from_python_is_the_same_as_by_the_command(source, corpus, tmp_path, capfd):
    best = lp.train(**source, **TINY, out_dir=tmp_path / "a")
    assert best == str(tmp_path / "a/best.pth")
    assert capfd.readouterr().out == ""
    flags = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    run("train", *corpus, *flags, "--out_dir", tmp_path / "b").ok()
    assert differences(best, tmp_path / "b/best.pth") == []


def test_tune_and_score(source, tiny_checkpoint, tmp_path, capfd):
    tuned = lp.finetune(ckpt=tiny_checkpoint, data_dir=source["data_dir"], max_steps=2,
                        processed_dir=source["processed_dir"], batch_size=4, report_samples=0,
                        out_dir=tmp_path, device="cpu")  # fmt: skip
    assert tuned == str(tmp_path / "best_finetune.pth")
    result = lp.evaluate(**source, ckpt=tuned, device="cpu")
    assert capfd.readouterr().out == ""
    argv = [word for name, value in source.items() for word in (f"--{name}", value)]
    run("eval", *argv, "--ckpt", tuned, "--device", "cpu", "--json", tmp_path / "e.json").ok()
    assert result == json.loads((tmp_path / "e.json").read_text())


def test_resume_takes_up_the_settings_of_the_run(source, tmp_path):
    assert lp.train(**source, **TINY, out_dir=tmp_path / "a", stop_after=5) == ""
    lp.train(resume=True, out_dir=tmp_path / "a", data_dir=source["data_dir"])
    lp.train(**source, **TINY, out_dir=tmp_path / "b")
    assert differences(tmp_path / "a/last.pth", tmp_path / "b/last.pth") == []


def test_training_works_in_another_thread(source, tmp_path):
    """As in a notebook, where signal handlers cannot be set."""
    found = []
    work = threading.Thread(target=lambda: found.append(lp.train(
        **source, **TINY, out_dir=tmp_path)))  # fmt: skip
    work.start()
    work.join(60)
    assert found == [str(tmp_path / "best.pth")]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"learning_rate": 0.1}, "did you mean --lr?"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"batch_size": [8]}, "batch_size must be a whole number"),
        ({"resume": "yes"}, "resume must be true or false"),
    ],
)
def test_a_wrong_setting_is_an_exception_that_says_so(settings, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lp.UserError, match="(?s).*" + word.replace("?", "[?]")):
        lp.train(**settings)


def test_threads_are_given_back_but_by_a_loaded_model(two_threads, source, tiny_checkpoint):
    lp.evaluate(**source, ckpt=tiny_checkpoint, device="cpu", threads=1)
    assert torch.get_num_threads() == 2
    lp.load(tiny_checkpoint, device="cpu", threads=1)
    assert torch.get_num_threads() == 1


def test_a_missing_checkpoint_is_an_exception_that_says_so(tmp_path):
    for function in (lp.load, lambda ckpt: lp.evaluate(ckpt=ckpt)):
        with pytest.raises(lp.UserError, match="no checkpoint at"):
            function(str(tmp_path / "none.pth"))
