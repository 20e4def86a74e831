"""Exports answer chat requests: transformers and its server, llama.cpp's, as `sample` does."""

import subprocess
import sys

import pytest
from conftest import CPU, free_port, needs, run, wait_for, words
from test_gguf import llama_server, post

import llm_pipeline as lp

transformers = needs("transformers")
needs("gguf")
needs("xllamacpp")

SHAPE = words("--n_layer 2 --n_head 4 --n_embd 64 --block_size 160 --init_std 0.08 --dropout 0")
SHORT = [*CPU, *words("--batch_size 8 --max_steps 150 --lr 3e-3")]
KINDS = {
    "gpt2": words("--mlp gelu_tanh"),  # as in llama.cpp
    "modern": words("--arch modern --n_kv_head 2 --tokenizer bpe --vocab_size 320"),
}
PROMPTS = [f"Repeat {i}." for i in range(7)] + ["Größe?", "river stone", ""]


@pytest.fixture(scope="module", params=list(KINDS))
def exported(request, tmp_path_factory, corpus):
    """(tuned checkpoint, its Hugging Face folder, its GGUF file)."""
    folder = tmp_path_factory.mktemp(request.param)
    run("train", *corpus, *SHORT, *SHAPE, *KINDS[request.param], "--out_dir", folder).ok()
    more = ["--ckpt", folder / "best.pth", "--out_dir", folder, "--report_samples", 0]
    run("finetune", *corpus, *SHORT, *more).ok()
    ckpt = folder / "best_finetune.pth"
    run("export", "--ckpt", ckpt, "--out_dir", folder / "hf").ok()
    run("export", "--ckpt", ckpt, "--gguf", folder / "model.gguf", "--gguf_type", "f32").ok()
    return ckpt, folder / "hf", folder / "model.gguf"


def sampled(ckpt, prompt):
    flags = ["--temperature", 0, "--max_new_tokens", 60, *CPU]
    return run("sample", "--ckpt", ckpt, "--prompt", prompt, *flags).ok().out.strip()


def chat(prompt, **more):
    return dict(messages=[{"role": "user", "content": prompt}], max_tokens=60, **more)


def test_the_same_answers_everywhere(exported):
    """Ten prompts, greedily: `sample`, transformers, llama.cpp."""
    ckpt, folder, file = exported
    ask = llama_server(file, 160)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    stopped = 0
    for prompt in PROMPTS:
        wanted = sampled(ckpt, prompt)
        [choice] = ask("/v1/chat/completions", **chat(prompt, temperature=0))["choices"]
        assert choice["message"]["content"].strip() == wanted
        stopped += choice["finish_reason"] == "stop"
        asked = chat(prompt)["messages"]
        ids = tokenizer.apply_chat_template(asked, return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=60)[0, ids.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True).strip() == wanted
    assert stopped >= 8  # at their separators


def is_up(url):
    try:
        return post(url, within=5)
    except OSError:
        return False


@pytest.fixture
def transformers_serve(exported, tmp_path):
    """The address of `transformers serve` on an exported folder."""
    for package in ("fastapi", "uvicorn", "openai"):
        needs(package)
    port, log = free_port(), tmp_path / "log"
    code = "from transformers.cli.transformers import main; main()"
    flags = ["serve", str(exported[1]), *words(f"--host 127.0.0.1 --port {port} --device cpu")]
    with open(log, "w") as file:
        server = subprocess.Popen([sys.executable, "-c", code, *flags], stdout=file, stderr=file)
    try:
        wait_for(lambda: server.poll() is not None or is_up(f"http://127.0.0.1:{port}/health"), 90)
        assert server.poll() is None, log.read_text()[-2000:]
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        server.kill()
        server.wait()


def test_transformers_serve_answers(exported, transformers_serve):
    """The answer holds neither the prompt nor a special token, and it stops."""
    for prompt in PROMPTS[:3]:
        wanted = sampled(exported[0], prompt)
        request = chat(prompt, model=str(exported[1]), temperature=0)
        [choice] = post(transformers_serve, request)["choices"]
        assert choice["message"]["content"] == wanted
        assert choice["finish_reason"] == "stop"


def test_llama_cpp_serves_a_conversation(exported):
    """The template renders a second question as we do, and its answer stops."""
    ask, request = llama_server(exported[2], 160), chat("Repeat 3.", temperature=0)
    [first] = ask("/v1/chat/completions", **request)["choices"]
    answer = first["message"]["content"].strip()  # the template adds the space and newline
    request["messages"].append({"role": "assistant", "content": answer})
    request["messages"].append({"role": "user", "content": "Repeat 4."})
    text = ask("/apply-template", messages=request["messages"])["prompt"]
    turns = lp.instruction_prompt("Repeat 3.") + lp.instruction_response(answer) + "<|sep|>"
    assert text.removeprefix("<|bos|>") == turns + lp.instruction_prompt("Repeat 4.")
    [second] = ask("/v1/chat/completions", **request)["choices"]
    assert second["finish_reason"] == "stop" and "<|" not in second["message"]["content"]
