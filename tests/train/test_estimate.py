from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from shard_factory import random_rows, write_shards

from codeflow.train.estimate import choose_checkpointing, estimate, render
from codeflow.train.flops import parameter_count, training_flops
from codeflow.train.resolve import Run, resolve

GB = 10**9


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest that says rows of 32K tokens, of which a dry run reads no more."""
    folder = tmp_path_factory.mktemp("estimate") / "data"
    fields = {"length": 32768}
    return write_shards(folder, random_rows(6, 64), length=64, manifest_fields=fields)


def plan(manifest: Path, size: str = "1.2b", *overrides: str) -> Run:
    said = ["model.vocab_size=76800", "train.dtype=bfloat16", *overrides]
    return resolve(manifest, size=size, overrides=said)


def test_numbers_of_a_run(manifest: Path) -> None:
    run = plan(manifest)
    result = estimate(run)
    assert result.parameters == parameter_count(run.model) == pytest.approx(1.19e9, rel=0.01)
    assert result.parameters - result.parameters_without_embeddings == 2 * 76800 * 2048
    (stage,) = result.stages
    assert (stage.steps, stage.row_length) == (200, 32768)
    assert stage.flops_per_token == training_flops(run.model, [32768]) / 32768
    assert stage.flops_per_token == pytest.approx(24.3e9, rel=0.01)
    assert stage.flops_per_token_noncausal / stage.flops_per_token == pytest.approx(1.53, abs=0.01)
    assert result.memory_total == result.memory.total
    assert result.fits
    assert not result.advice


def test_a_size_is_not_allocated(manifest: Path) -> None:
    result = estimate(plan(manifest, "40b"))
    assert result.parameters == pytest.approx(39.8e9, rel=0.01)
    assert not result.fits
    assert "train.parallel=fsdp on" in result.advice
    assert "checkpointing" not in result.advice  # auto has chosen it


def test_the_advice_is_the_mildest_that_fits(manifest: Path) -> None:
    wide = plan(manifest, "1.2b", "train.dtype=float32", "train.checkpointing=none")
    result = estimate(wide, gpu_memory=60 * GB)
    assert not result.fits
    assert "--set train.dtype=bfloat16 --set train.checkpointing=full (" in result.advice
    train = dataclasses.replace(wide.train, dtype="bfloat16", checkpointing="full")
    assert estimate(dataclasses.replace(wide, train=train), gpu_memory=60 * GB).fits
    hopeless = estimate(wide, gpu_memory=GB)
    assert "smaller model" in hopeless.advice


def test_a_plan_for_a_gpu_takes_auto_as_bfloat16(manifest: Path) -> None:
    auto = plan(manifest, "1.2b", "train.dtype=auto", "train.checkpointing=none")
    said = plan(manifest, "1.2b", "train.checkpointing=none")
    assert estimate(auto).memory == estimate(said).memory
    advice = estimate(auto, gpu_memory=60 * GB).advice
    assert "train.dtype" not in advice
    assert "train.checkpointing=full" in advice


def test_auto_checkpoints_only_where_memory_needs_it(manifest: Path) -> None:
    run = plan(manifest)
    assert choose_checkpointing(run, None, 1) == "none"
    assert choose_checkpointing(run, 60 * GB, 1) == "save_attention"
    assert choose_checkpointing(run, 36 * GB, 1) == "full"
    flex = plan(manifest, "1.2b", "train.backend=flex")
    assert choose_checkpointing(flex, 60 * GB, 1) == "full"
    assert choose_checkpointing(run, 10_000 * GB, 1) == "none"
    said = plan(manifest, "1.2b", "train.checkpointing=save_attention")
    assert choose_checkpointing(said, 60 * GB, 1) == "save_attention"


def test_sharding_shares_the_states(manifest: Path) -> None:
    alone = estimate(plan(manifest, "7.6b"))
    shared = estimate(plan(manifest, "7.6b"), world_size=8)
    replicated = estimate(plan(manifest, "7.6b", "train.parallel=ddp"), world_size=8)
    assert (alone.sharded, shared.sharded, replicated.sharded) == (False, True, False)
    assert alone.memory.weights == replicated.memory.weights
    assert alone.memory.weights // 8 <= shared.memory.weights <= alone.memory.weights // 8 + 8
    assert (alone.fits, shared.fits, replicated.fits) == (False, True, False)
    assert not estimate(plan(manifest, "0.6b"), world_size=8).sharded
    assert estimate(plan(manifest, "0.6b", "train.parallel=fsdp"), world_size=8).sharded


def test_muon_needs_less(manifest: Path) -> None:
    adamw, muon = (
        estimate(plan(manifest, "1.2b", f"train.optimizer={o}")) for o in ("adamw", "muon")
    )
    assert muon.memory.optimizer < adamw.memory.optimizer


def test_the_text_says_it_all(manifest: Path) -> None:
    text = render(estimate(plan(manifest, "40b"), world_size=4))
    for part in ("39,", "without embeddings", "32,768", "141.0 GB: does NOT fit", "sharded"):
        assert part in text
    fits = render(estimate(plan(manifest)))
    assert "141.0 GB: fits (a plan may fill 90% of it, 126.9 GB)" in fits
