"""The benchmark of dataset builds: what it measures, what it writes, and the page on the extractive teacher."""

import json
import os
import sys
from pathlib import Path

import pytest

from trainer_pdt import data_benchmark
from trainer_pdt.data_benchmark import PARTS, STAGES, DataBenchmarkArguments, benchmark_data, data_table, run_build
from trainer_pdt.parser import RecipeParser

ROOT = Path(__file__).resolve().parents[3]
MIB = 2**20


def build_of(documents, peak=300, seconds=2.0):
    """What `measured` returns, without building."""
    rates = {"documents": documents, "per_second": documents / 10, "per_cpu_second": documents / 5}
    times = {"seconds": dict.fromkeys(STAGES, seconds), "cpu_seconds": 5.0}
    return {**rates, **times, "imported_bytes": 200 * MIB, "peak_bytes": peak * MIB}


def test_the_recipe_has_all_parts():
    (arguments,) = RecipeParser(DataBenchmarkArguments).parse(["--config", str(ROOT / "recipes/benchmarks/data.yaml")])
    assert tuple(arguments.parts) == PARTS
    assert arguments.memory_documents == [10_000, 100_000]
    assert (arguments.endpoint_bar, arguments.memory_bar, arguments.endpoint_latency) == (0.9, 1.1, 0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ["speed"]}, r"parts=\['speed'\], allowed: some of"),
        ({"parts": []}, r"parts=\[\], allowed"),
        ({"memory_documents": [10, 5]}, r"memory_documents=\[10, 5\], allowed: a small and a large"),
        ({"endpoint_latency": 0.0}, "endpoint_latency=0.0, allowed: above 0"),
        ({"endpoint_documents": 0}, "endpoint_documents=0, allowed: an int of at least 1"),
    ],
)
def test_fields_have_ranges(changes, message):
    with pytest.raises(ValueError, match=message):
        DataBenchmarkArguments(**changes)


@pytest.mark.parametrize(("large", "seconds", "met"), [(320, 2.0, True), (345, 5.0, False)])
def test_bars_follow_from_what_was_measured(tmp_path, monkeypatch, large, seconds, met):
    def fake(documents, folder, **options):
        return build_of(documents, large if documents == 100 else 300, seconds)

    monkeypatch.setattr(data_benchmark, "measured", fake)
    arguments = DataBenchmarkArguments(
        parts=["endpoint", "memory"],
        endpoint_documents=160,
        endpoint_concurrency=4,
        memory_documents=[10, 100],
        output=str(tmp_path / "data.json"),
    )
    report = benchmark_data(arguments)
    # 320 requests; four places of 50 ms each could have made 80 in a second.
    assert report["builds"]["endpoint"]["share"] == pytest.approx(320 / (2 * seconds) / 80)
    assert [(bar["name"], bar["met"]) for bar in report["bars"]] == [("endpoint", met), ("memory", met)]
    assert report["bars"][1]["value"] == pytest.approx(large / 300)
    page = data_table(report)
    assert f"| memory 100 | 100 | 10.0 | 20.0 | {large} (200) |" in page
    assert f"| memory | {large / 300:.3f} | at most 1.10 | {'met' if met else 'missed'} |" in page


def test_a_build_is_measured_by_stage(tmp_path):
    options = {"output_dir": str(tmp_path / "build"), "sources": [{"kind": "worlds", "count": 21}], "shard_size": 21}
    found = run_build({**options, "validation_fraction": 0.3})
    assert list(found["seconds"]) == list(STAGES) and min(found["seconds"].values()) > 0
    assert found["peak_bytes"] >= found["imported_bytes"] > 0 and found["cpu_seconds"] > 0


@pytest.mark.slow
def test_the_command_writes_both_pages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import benchmark

    monkeypatch.setattr(sys, "argv", ["benchmark.py", "data"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "out"
    options = ["--parts", "[procedural, extractive, endpoint]", "--output", str(folder / "data.json")]
    options += ["--procedural_documents", "40", "--extractive_documents", "120", "--endpoint_documents", "24"]
    report = benchmark.main(
        ["data", "--config", str(ROOT / "recipes/benchmarks/data.yaml"), *options, "--endpoint_bar", "0.0"]
    )
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert set(report["builds"]) == {"procedural", "extractive", "endpoint"}
    assert json.loads((folder / "data.json").read_text())["builds"] == report["builds"]
    page = (folder / "extractive_quality.md").read_text(encoding="utf-8")
    assert f"{report['builds']['extractive']['exported']} are exported" in page
    assert "![Documents by stage, reasons and streams](extractive_quality.png)" in page and "## Measures" in page
    assert (folder / "extractive_quality.png").stat().st_size > 10_000
    assert "| endpoint | " in (folder / "data.md").read_text(encoding="utf-8")
