from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import wait_for
from shard_factory import stdlib_texts, text_rows, write_shards
from small_runs import SMALL_ARGUMENTS, assert_same_end, lines, small

from codeflow.train.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_can_be_resumed(tmp_path: Path, number: signal.Signals) -> None:
    data = write_shards(tmp_path / "data", text_rows(stdlib_texts(), 64, 12), length=64)
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "codeflow.train", "--shards", str(data), "--out", str(out)]
    rare = ("train.checkpoint_every=100000",)
    said = [*SMALL_ARGUMENTS, "--set", *rare]
    with subprocess.Popen(
        [*command, *said, "--steps", "100000", "--set", "train.schedule=constant"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            file = out / "metrics.jsonl"
            assert wait_for(lambda: file.exists() and file.read_text().count("\n") > 3, 60)
            process.send_signal(number)
            printed = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert f"stopped by {number.name} after step" in printed
    assert "--resume" in printed
    assert "Traceback" not in printed
    (saved,) = (out / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert lines(out)[-1]["step"] == step
    constant = ("train.schedule=constant", *rare)
    small(data, whole, step + 3, *constant)
    small(data, out, step + 3, *constant, resume=True)
    assert_same_end(whole, out, step + 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_twice_at_once_is_one_request(number: signal.Signals) -> None:
    with StopSignals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert signals.caught == number


def test_who_insists_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("codeflow.train.signals.time.monotonic", lambda: now)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        now += 6
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    assert signals.caught is None


def test_other_threads_are_left_alone() -> None:
    failures: list[BaseException] = []

    def body() -> None:
        try:
            with StopSignals():
                pass
        except BaseException as e:
            failures.append(e)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert not failures
