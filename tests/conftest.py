"""What all tests share: running the real program, a small corpus, comparing checkpoints."""

# ruff: noqa: E402 (threads are set before torch is imported)

import contextlib
import csv
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}
if hasattr(signal, "SIGHUP"):  # under nohup, children would ignore it, but tests send it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "llm_pipeline.py"
sys.path.insert(0, str(ROOT))
# For the server that forks children: it imports this file.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import pytest
import torch

import llm_pipeline as lp


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--count", type=int, default=1, help="kills and signals, times N")


def words(text: str) -> list[str]:
    return text.split()


CPU = words("--device cpu --dtype float32")
SHAPE = words("--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --dropout 0.1")
TINY = [*CPU, *SHAPE, *words("--batch_size 4 --max_steps 12 --lr 1e-3")]


@dataclass
class Result:
    """What a command left behind: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The error lines: ours, and argparse's, which begin with the program's name."""
        said = r"(llm_pipeline\.py[ a-z]*: )?error: "
        return [line for line in self.err.splitlines() if re.match(said, line)]

    def ok(self) -> "Result":
        assert self.code == 0, self.err
        return self

    def fails(self, code: int, *words: str) -> "Result":
        """One clean error with these words in it, and no traceback."""
        assert self.code == code, (self.code, self.err)
        assert "Traceback" not in self.err, self.err
        assert self.errors, self.err
        for word in words:
            assert word in self.err, self.err
        return self


@contextlib.contextmanager
def elsewhere(cwd: Path | None, env: dict[str, str]) -> Iterator[None]:
    """Change the working directory and environment; restores both, and the thread count."""
    before, here, threads = dict(os.environ), os.getcwd(), torch.get_num_threads()
    os.environ.update(env)
    if cwd:
        os.chdir(cwd)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)


def run(*argv, cwd: Path | None = None, **env: str) -> Result:
    """Run `llm_pipeline.py ARGV` inside this process, which saves importing torch again."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        elsewhere(cwd, env),
    ):
        try:
            code = lp.main([str(a) for a in argv])
        except SystemExit as stop:  # argparse, for --help and for its own errors
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return Result(code or 0, out.getvalue(), err.getvalue())


def start(*argv, program: Path = PROGRAM, cwd: Path | None = None, **env) -> subprocess.Popen:
    """Start `llm_pipeline.py ARGV` as a separate process, for signals and kills."""
    return subprocess.Popen(
        [sys.executable, str(program), *map(str, argv)],
        cwd=cwd,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen, within: float = 120) -> Result:
    """Wait for a process; if it hangs, kill it and fail the test."""
    try:
        out, err = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"still running after {within} s: {err[-2000:]}")
    return Result(process.returncode, out, err)


def run_process(*argv, within: float = 120, **more) -> Result:
    return finish(start(*argv, **more), within)


# Modules that a child would otherwise spend its first second importing.
PRELOAD = ["__main__", "conftest", "torch._dynamo", "torch.distributed.fsdp"]


class Child:
    """`llm_pipeline.py ARGV` in a separate process, forked from one that has imported torch.

    `hook` runs in it first, to inject a fault: a function of a module, or a partial of one.
    """

    def __init__(self, *argv, hook: Callable | None = None, **env: str):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.log = Path(tempfile.mkstemp(prefix="child-")[1])
        words = [str(a) for a in argv]
        self.process = context.Process(target=child_main, args=(words, self.log, env, hook))
        self.process.start()
        self.pid = self.process.pid

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def finish(self, within: float = 60) -> Result:
        """Wait for its end; if it hangs, kill it and fail the test."""
        self.process.join(within)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL)
            self.process.join()
            pytest.fail(f"still running after {within} s: {self.log.read_text()[-2000:]}")
        err = self.log.read_text(encoding="utf-8", errors="replace")
        self.log.unlink()
        return Result(self.process.exitcode, "", err)


def child_main(argv: list[str], log: Path, env: dict, hook: Callable | None) -> None:
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if hook:
        hook()
    sys.exit(lp.main(argv))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def together(*argv, n: int = 2, hook=None) -> list[Child]:
    """Start the program as torchrun does, without torchrun's own start-up time."""
    env = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [Child(*argv, hook=hook, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(n)]


def run_together(*argv, n: int = 2) -> list[Result]:
    """Run `together` and expect success; each result's `err` holds stdout and stderr."""
    results = [child.finish(120) for child in together(*argv, n=n)]
    assert [r.code for r in results] == [0] * n, results[0].err + results[-1].err
    return results


def wait_for(condition: Callable, within: float = 30) -> None:
    """Wait until `condition()` holds."""
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {within} s")
        time.sleep(0.005)


def tensors(path: Path, sections=("weights", "optimizer")) -> dict[str, torch.Tensor]:
    """Every weight and optimizer tensor of a checkpoint by name."""
    state, found = lp.load_checkpoint(path), {}

    def walk(name: str, value) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}.{key}", item)
        elif isinstance(value, torch.Tensor):
            found[name] = value

    for section in sections:
        walk(section, state[section])
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def differences(a: Path, b: Path, sections=("weights", "optimizer")) -> list[str]:
    """Names of the tensors of two checkpoints that are not the same, bit for bit."""
    one, two = tensors(a, sections), tensors(b, sections)
    assert one, f"{a} holds no tensors"
    alone = sorted(one.keys() ^ two.keys())
    return alone + [n for n in one if n in two and not torch.equal(bits(one[n]), bits(two[n]))]


def largest_difference(a: Path, b: Path) -> float:
    """The largest difference between the weights of two checkpoints."""
    one, two = tensors(a, ("weights",)), tensors(b, ("weights",))
    assert one.keys() == two.keys()
    return max(float((one[n] - two[n]).abs().max()) for n in one)


def metrics(folder: Path, split: str = "train", suffix: str = "") -> list[dict[str, str]]:
    """Rows of metrics.csv of one split."""
    with open(folder / f"metrics{suffix}.csv", encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def curve(folder: Path, split: str = "train", suffix: str = "") -> list[tuple[int, str]]:
    """(step, loss as it was printed) of one split."""
    return [(int(row["step"]), row["loss"]) for row in metrics(folder, split, suffix)]


def write_corpus(folder: Path, n: int = 24) -> Path:
    """`n` short instruction records of differing lengths."""
    names = words("sun moon tree river stone cloud bird fish lamp book door road hill star rain")
    rows = [
        {
            "instruction": f"Repeat {i}.",
            "input": " ".join(names[(i + k) % len(names)] for k in range(i % 4 + 1)),
            "output": names[i % len(names)] * (i % 3 + 1),
        }
        for i in range(n)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "words.jsonl").write_text(lines, encoding="utf-8")
    return folder


def needs(package: str):
    """Import a package; if it is not installed, skip the test and say what to type."""
    reason = f"needs {package}: pip install -r tests/requirements.txt"
    return pytest.importorskip(package, reason=reason)


@pytest.fixture(scope="session")
def data() -> Path:
    """The real data sets; tests that need them are skipped if there are none."""
    if "LLM_PIPELINE_DATA" not in os.environ:
        pytest.skip("needs public data: set LLM_PIPELINE_DATA as tests/bench/README.md says")
    return Path(os.environ["LLM_PIPELINE_DATA"])


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def count(request) -> int:
    """How many times to repeat the kills and signals (--count N)."""
    return request.config.getoption("--count")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> list[str]:
    """Flags for a small corpus: about 5 steps an epoch at TINY's sizes and batch_size 8."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "raw")
    return [
        *("--data_dir", str(folder / "raw")),
        *("--processed_dir", str(folder / "processed")),
        *("--val_fraction", "0.2"),
    ]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, corpus) -> Path:
    """best.pth of a tiny run on the small corpus, next to its last.pth; read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    run("train", *corpus, *TINY, "--out_dir", folder).ok()
    return folder / "best.pth"
