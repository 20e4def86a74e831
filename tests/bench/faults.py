"""What may go wrong, many times over: `python tests/bench/faults.py [--quick] [NAME ...]`.

Prints a table of what was tried and what held. The last rows take each protection out of the
program in turn and show that a check then fails.
"""

# ruff: noqa: E402 (the tests are found through sys.path)

import contextlib
import functools
import gzip
import io
import os
import random
import resource  # of Unix, as are the signals below
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import test_checkpoint as checkpoints
import test_cli as cli
import test_faults as faults
import test_prepare as preparing
import test_training as training
import torch
from conftest import (
    Child,
    Result,
    differences,
    largest_difference,
    run,
    run_process,
    words,
    write_corpus,
)
from hypothesis import HealthCheck, Phase, given, settings

import llm_pipeline as lp

CHECKS = {}


def check(function):
    """Register a check: (bench) -> (tried, what held), in words."""
    CHECKS[function.__name__] = function
    return function


class Bench:
    """A scratch folder with a corpus, a run that nothing disturbed, and a checkpoint."""

    def __init__(self, folder: Path, share: float):
        self.folder, self.share, self.rng = folder, share, random.Random(0)
        write_corpus(folder / "raw")
        self.corpus = ["--data_dir", folder / "raw", "--processed_dir", folder / "stores",
                       "--val_fraction", "0.2"]  # fmt: skip
        self.whole = folder / "whole"
        run(*self.command(self.whole)).ok()
        self.checkpoint = self.whole / "last.pth"

    def command(self, out_dir: Path, *more) -> list:
        return ["train", *self.corpus, *faults.SHORT, *more, "--out_dir", out_dir]

    def times(self, n: int) -> range:
        return range(max(2, round(n * self.share)))

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))


def counted(held: int, tried: int) -> tuple[bool, str]:
    return held == tried, f"{held} of {tried}"


def holds(function, *args, **more) -> bool:
    """Whether a check that asserts passes."""
    try:
        function(*args, **more)
        return True
    except AssertionError as error:
        print("   ", " ".join(str(error).split())[:300], file=sys.stderr)
        return False


# --- the same bits ---


@check
def same_command_three_times(bench: Bench):
    folders = [bench.fresh() for _ in range(3)]
    for folder in folders:
        run_process(*bench.command(folder)).ok()
    return counted(sum(holds(faults.same, bench.whole, folder) for folder in folders), 3)


@check
def kills_at_random_moments(bench: Bench):
    """One long history of kills for every five, so that runs meet several each."""
    held, kills, wanted = 0, 0, len(bench.times(50))
    while kills < wanted:
        folder = bench.fresh()
        command = bench.command(folder)
        done = faults.kill_until_done(command, folder, bench.rng, min(5, wanted - kills))
        run(*command, "--resume").ok()
        held += done if holds(faults.same, bench.whole, folder) else 0
        kills += done
    return counted(held, kills)


@check
def kills_while_a_store_is_made(bench: Bench):
    kills = len(bench.times(50))
    good = holds(preparing.killed_at_random_moments, bench.fresh(), bench.rng, kills, 2000)
    return good, f"{kills} kills"


@check
def killed_in_every_sync_and_rename(bench: Bench):
    calls = 0
    for after in (False, True):
        base, folder = bench.fresh(), bench.fresh()
        run(*bench.command(base, "--stop_after", 9 if bench.share < 1 else 7)).ok()
        command = bench.command(folder)
        calls += faults.killed_at_every_call(command, bench.whole, base, folder, after)
    return True, f"{calls} of {calls}"


def stopped(bench: Bench, where: str, number: int, count: int) -> None:
    folder = bench.fresh()
    command = bench.command(folder)
    child = Child(*command, hook=functools.partial(faults.signal_in, where, count, number))
    began, result = time.monotonic(), child.finish()
    assert result.code == faults.CODES[number], (where, count, result.err)
    assert time.monotonic() - began < 10  # a second or two of which is the start
    run(*command, "--resume").ok()
    faults.same(bench.whole, folder)


@check
def signals(bench: Bench):
    held = tried = 0
    moments = {"step": 10, "evaluation": 5, "save": 30}
    for number in faults.CODES:
        for i in bench.times(20):
            where = list(moments)[i % 3]
            tried += 1
            count = bench.rng.randint(1, moments[where])
            held += holds(stopped, bench, where, number, count)
    return counted(held, tried)


@check
def signals_at_start_up(bench: Bench):
    held = tried = 0
    for number in faults.CODES:
        for _ in bench.times(10):
            folder, tried = bench.fresh(), tried + 1
            process = faults.start(*bench.command(folder))
            time.sleep(bench.rng.uniform(0, 3))
            process.send_signal(number)
            result = faults.finish(process, 20)
            run(*bench.command(folder), "--resume").ok()
            good = result.code in (0, -number, faults.CODES[number])
            held += good and "Traceback" not in result.err and holds(
                faults.same, bench.whole, folder)  # fmt: skip
    return counted(held, tried)


@check
def signals_to_one_of_two_processes(bench: Bench):
    held, two = 0, bench.fresh()
    faults.run_together(*bench.command(two))
    for _ in (tries := bench.times(10)):
        folder = bench.fresh()
        children = faults.together(*bench.command(folder), hook=functools.partial(faults.slow, 0.1))
        faults.wait_for((folder / "last.pth").exists, 60)
        time.sleep(bench.rng.uniform(0, 0.5))
        children[bench.rng.randrange(2)].send(signal.SIGTERM)
        codes = [child.finish(30).code for child in children]
        faults.run_together(*bench.command(folder), "--resume")
        held += codes == [143, 143] and holds(faults.same, two, folder)
    return counted(held, len(tries))


@check
def two_runs_into_one_folder(bench: Bench):
    held = 0
    for i in (tries := bench.times(20)):
        folder = bench.fresh()
        first = Child(*bench.command(folder), hook=functools.partial(faults.slow, 0.1))
        faults.wait_for((folder / "last.pth").exists)
        second = run(*bench.command(folder), ("--resume", "--overwrite")[i % 2])
        refused = second.code == 1 and str(folder) in second.err
        if i % 4 == 3:  # the lock dies with its holder
            first.send(signal.SIGKILL)
            first.finish()
            run(*bench.command(folder), "--resume").ok()
        else:
            refused &= first.finish().code == 0
        held += refused and holds(faults.same, bench.whole, folder)
    return counted(held, len(tries))


def survives(bench: Bench, hook, code: int) -> bool:
    """Whether a run that loses its terminal somewhere ends with `code`, and with the same bits."""
    folder = bench.fresh()
    command = bench.command(folder)
    result = Child(*command, hook=hook).finish()
    if code:
        run(*command, "--resume").ok()
    return result.code == code and holds(faults.same, bench.whole, folder)


@check
def a_lost_stderr(bench: Bench):
    """Its reader goes, its disk is full, or there was none."""
    held = 0
    for i in (tries := bench.times(30)):
        hook = functools.partial(faults.lose_stderr, ("pipe", "full", "none")[i % 3])
        held += survives(bench, hook, 0)
    return counted(held, len(tries))


@check
def hang_ups_that_nobody_waits_for(bench: Bench):
    """nohup; the others are among the signals above."""
    return counted(int(survives(bench, faults.ignore_hang_ups, 0)), 1)


@check
def processes_that_hang_or_never_come(bench: Bench):
    tests = (faults.test_a_process_that_does_not_come_is_not_waited_for_without_end,
             faults.test_a_second_signal_is_obeyed_inside_a_library,
             faults.test_a_process_that_hangs_is_not_waited_for_without_end,
             faults.test_a_signal_to_a_process_that_waits_for_a_store)  # fmt: skip
    held = sum(holds(test, list(map(str, bench.corpus)), bench.fresh()) for test in tests)
    return counted(held, len(tests))


# --- several processes ---


@check
def one_process_and_several(bench: Bench):
    """50 steps by one, two (DDP, FSDP); saved by two, resumed by one and by four."""
    more = words("--dropout 0 --max_steps 50")
    folders = {name: bench.fresh() for name in ("one", "ddp", "fsdp", "then one", "then four")}
    run(*bench.command(folders["one"], *more)).ok()
    faults.run_together(*bench.command(folders["ddp"], *more))
    faults.run_together(*bench.command(folders["fsdp"], *more, "--fsdp"))
    for name in ("then one", "then four"):
        command = bench.command(folders[name], *more)
        faults.run_together(*command, "--stop_after", 20)
        faults.run_together(*command, "--resume", n=4 if "four" in name else 1)
    far = {n: largest_difference(folders["one"] / "last.pth", f / "last.pth")
           for n, f in folders.items() if n != "one"}  # fmt: skip
    return max(far.values()) < 1e-4, ", ".join(f"{n} {d:.1e}" for n, d in far.items())


@check
def micro_batches_on_one_and_on_two(bench: Bench):
    one, two = bench.fresh(), bench.fresh()
    run(*bench.command(one, "--grad_accum", 2, "--max_steps", 50)).ok()
    faults.run_together(*bench.command(two, "--max_steps", 50))
    wrong = differences(one / "last.pth", two / "last.pth")
    return not wrong, "bit for bit" if not wrong else f"{len(wrong)} tensors differ"


# --- hostile files ---


def loading(bench: Bench, content: bytes) -> bool:
    path = bench.folder / "mutant.pth"
    path.write_bytes(content)
    return holds(checkpoints.refused, path) and checkpoints.refused(path)


@check
def bit_flips(bench: Bench):
    content, held = bytearray(bench.checkpoint.read_bytes()), 0
    for _ in (tries := bench.times(300)):
        place = bench.rng.randrange(len(content) * 8)
        content[place // 8] ^= 1 << place % 8
        held += loading(bench, content)
        content[place // 8] ^= 1 << place % 8
    return counted(held, len(tries))


def mangled(content: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, spliced, or a few of these."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        c = rng.randrange(len(content) + 1)
        content = rng.choice([
            content[:a], content[a:], content[:a] + content[b:],
            content[:c] + content[a:b] + content[c:],
            content[:a] + rng.randbytes(rng.randint(1, 9)) + content[a + rng.randint(0, 9) :],
        ])  # fmt: skip
        content = content or b"\0"
    return content


@check
def mutated_checkpoints(bench: Bench):
    content, held = bench.checkpoint.read_bytes(), 0
    for _ in (tries := bench.times(5000)):
        mutant = mangled(content, bench.rng)
        held += mutant == content or loading(bench, mutant)
    return counted(held, len(tries))


@check
def mutated_checkpoints_with_a_valid_seal(bench: Bench):
    """Nothing can tell that they were changed: loaded or refused, but in one clean line."""
    content, held = checkpoints.unsealed(checkpoints.stored(bench.checkpoint)), 0
    for _ in (tries := bench.times(2000)):
        mutant = checkpoints.seal(mangled(content, bench.rng) + b"\0\0")
        (bench.folder / "mutant.pth").write_bytes(mutant)
        held += checkpoints.is_clean(bench.folder / "mutant.pth")
    return counted(held, len(tries))


@check
def checkpoints_that_lie_with_a_valid_seal(bench: Bench):
    tried, wrong, path = 0, [], bench.fresh() / "last.pth"
    for _ in bench.times(10):
        for what, state in checkpoints.lies(checkpoints.stored(bench.checkpoint), bench.rng, 1):
            lp.save_checkpoint(path, state)
            bad = checkpoints.try_all(path, bench.corpus)
            tried, wrong = tried + 1, wrong + bad[:1]
            for line in bad:
                print("   ", what, line[:200], file=sys.stderr)
    return counted(tried - len(wrong), tried)


@check
def pickles_that_would_run_code(bench: Bench):
    """Each kind in several files, then one in each place that reads a file."""
    kinds, places = checkpoints.KINDS, list(checkpoints.PLACES)
    held = sum(
        holds(checkpoints.test_a_pickle_that_would_run_code_is_refused, kind, bench.checkpoint,
              bench.fresh()) for kind in kinds
    ) + sum(
        holds(checkpoints.test_no_place_that_reads_a_file_runs_its_code, place, bench.checkpoint,
              bench.fresh()) for place in places
    )  # fmt: skip
    held += holds(checkpoints.test_the_source_has_no_unsafe_load)
    return counted(held, len(kinds) + len(places) + 1)


def data_files(folder: Path) -> dict[str, bytes]:
    """One good file of each kind that training reads."""
    lines = (folder / "words.jsonl").read_bytes()
    rows = b"[" + b",".join(lines.splitlines()) + b"]"
    spam = b"".join(b"%s\tmessage %d\n" % (b"ham" if i % 3 else b"spam", i) for i in range(40))
    text = "\n\n".join(f"Plain text {i}, 你好." for i in range(40)).encode()
    files = {"a.jsonl": lines, "a.json": rows, "SMSSpamCollection": spam, "a.txt": text}
    files["a.jsonl.gz"] = gzip.compress(lines)
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        table = pyarrow.table({"text": text.decode().split("\n\n")})
        pyarrow.parquet.write_table(table, buffer)
        files["a.parquet"] = buffer.getvalue()
    return files


@check
def mutated_data_files(bench: Bench):
    files, held, folder = data_files(bench.folder / "raw"), 0, bench.fresh()
    for i in (tries := bench.times(2000)):
        name = list(files)[i % len(files)]
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / name).write_bytes(mangled(files[name], bench.rng))
        began = time.monotonic()
        argv = ["prepare", "--data_dir", name, "--processed_dir", "stores", "--out_dir", "s"]
        if i % 2:
            argv += words("--encoding_errors replace --bad_records skip")
        wrong = cli.check_mutant(argv, folder)
        if wrong:
            print("   ", name, wrong[:300], file=sys.stderr)
        held += not wrong and time.monotonic() - began < 5
    return counted(held, len(tries))


@check
def mutated_command_lines(bench: Bench):
    folder, tried, wrong = bench.fresh(), [], []
    (folder / "raw").symlink_to(bench.folder / "raw")
    shutil.copy(bench.checkpoint, folder / "base.pth")

    @settings(max_examples=len(bench.times(2000)), deadline=None, database=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(argv=cli.mutated())
    def attempt(argv):
        began = time.monotonic()
        bad = cli.check_mutant(argv, folder)
        tried.append(argv)
        if bad or time.monotonic() - began > 5:
            wrong.append(argv)
            print("   ", argv, bad[:300], file=sys.stderr)

    attempt()
    return counted(len(tried) - len(wrong), len(tried))


@check
def composed_command_lines(bench: Bench):
    """Under a limit of memory: some of them ask for models of many gigabytes."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (9 * 10**9, limits[1]))
    folder, held = bench.fresh(), 0
    (folder / "raw").symlink_to(bench.folder / "raw")
    shutil.copy(bench.checkpoint, folder / "base.pth")
    for i in (tries := bench.times(4000)):
        if i % 25 == 0:
            cli.furnish(folder)  # again what an earlier line has replaced
        argv, env = cli.composed(bench.rng)
        wrong = cli.check_mutant(argv, folder, **env)
        if wrong:
            print("   ", argv, env, wrong[:300], file=sys.stderr)
        held += not wrong
    resource.setrlimit(resource.RLIMIT_AS, limits)
    return counted(held, len(tries))


# --- disks, memory and numbers that fail ---


@check
def not_a_number_in_loss_and_gradient(bench: Bench):
    held = 0
    for where in ("loss", "gradient"):
        with training.pytest.MonkeyPatch.context() as patch:
            held += holds(training.test_a_step_that_is_not_finite_stops_before_the_update,
                          where, bench.corpus, bench.fresh(), patch)  # fmt: skip
    return counted(held, 2)


def suite(root: Path, file: str, names: str) -> Result:
    """A part of the test suite of the copy of this repository under `root`."""
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/{file}"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([*argv, "-k", names], cwd=root, env=env, capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr)


@check
def full_disk_failing_sync_read_only_folder(bench: Bench):
    names = "disk or grow or read_only or full or temporaries or synced"
    done = suite(Path(__file__).resolve().parents[2], "test_checkpoint.py", names)
    return done.code == 0, done.out.strip().splitlines()[-1]


# What a folder, a store or a base may hold, and who may replace it: (test file, names of tests).
SUITES = {
    "folders that hold a run or foreign files": (
        "test_checkpoint.py", "best_without or resume_where or locked_before or where_it_is_now or "
        "other_command or of_others or in_the_way"),
    "fields that lie, at the door": ("test_checkpoint.py", "at_the_door or moment or targets"),
    "bases of preferences and of other runs": (
        "test_checkpoint.py", "preferences_keep or init_from_keeps or advice or compared"),
    "exports replace exports alone": ("test_interchange.py", "replace or full_disk"),
    "stores replace stores alone": ("test_prepare.py", "other_files or store_before_it or mutated"),
    "results replace results alone": ("test_cli.py", "json_"),
    "streams are stores": ("test_prepare.py", "stream and not fineweb"),
    "spaces, bytes and ids of foreign vocabularies": ("test_tokenizers.py", "space or ids_far or "
                                                      "panics"),
}  # fmt: skip


def kept(bench: Bench, what: str) -> tuple[bool, str]:
    done = suite(Path(__file__).resolve().parents[2], *SUITES[what])
    return done.code == 0, done.out.strip().splitlines()[-1]


for what in SUITES:
    CHECKS[what] = functools.partial(kept, what=what)


# --- each protection removed: (text of the program, what to put there, test that must fail) ---

PROTECTIONS = {
    "sync": ("os.fsync(", "(lambda _: None)(", "test_checkpoint.py", "synced"),
    "checksum": ("found == expected", "found", "test_checkpoint.py", "flipped"),
    "safe load": ("weights_only=True", "weights_only=False", "test_checkpoint.py", "pickle"),
    "door": ("for name, value in leaves(state):", "for name, value in ():",
             "test_checkpoint.py", "at_the_door"),
    "lock": ("fcntl.flock(", "(lambda *_: None)(", "test_faults.py", "second_run"),
    "seed": ("default_generator).manual_seed(seed)", "default_generator).seed()",
             "test_training.py", "same_command"),
    "mask": ("width), IGNORE,", "width), 0,", "test_training.py", "padding"),
    "finite": ("math.isfinite(", "(lambda _: True)(", "test_training.py", "not_finite"),
    "count of all targets": ("world_size / n_targets",
                             "world_size / accum / (micro.y != IGNORE).sum()",
                             "test_training.py", "accumulation_gives"),
}  # fmt: skip


def removed(bench: Bench, what: str) -> tuple[bool, str]:
    old, new, file, names = PROTECTIONS[what]
    here, copy = Path(__file__).resolve().parents[2], bench.fresh() / "copy"
    copy.mkdir()
    shutil.copytree(here / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(here / "pyproject.toml", copy)
    source = (here / "llm_pipeline.py").read_text(encoding="utf-8")
    if old not in source:
        return False, f"the program holds no {old!r}: bring this table up to date"
    (copy / "llm_pipeline.py").write_text(source.replace(old, new), encoding="utf-8")
    done = suite(copy, file, names)
    return done.code == 1 and " failed" in done.out, done.out.strip().splitlines()[-1]


for protection in PROTECTIONS:
    CHECKS[f"without the {protection}"] = functools.partial(removed, what=protection)


def main() -> int:
    chosen = [a for a in sys.argv[1:] if not a.startswith("-")]
    share = 0.1 if "--quick" in sys.argv else 1.0
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), share)
        print(f"{'what':<44}{'held':<8}{'how':<44}{'seconds':>8}")
        for name, function in CHECKS.items():
            if chosen and not any(word in name for word in chosen):
                continue
            began = time.monotonic()
            good, how = function(bench)
            failed += not good
            seconds = time.monotonic() - began
            held = "yes" if good else "NO"
            print(f"{name.replace('_', ' '):<44}{held:<8}{how:<44}{seconds:>8.0f}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
