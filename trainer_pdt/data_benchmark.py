"""Cost of a dataset build: documents per second by stage, a waiting teacher's use of its places, memory by size."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from hub_cards import template_path

from .arguments import check_whole
from .data.export import DATASET_FOLDER, REPORT_FILE
from .data.options import OPTIONS
from .data.pipeline import DatasetBuilder
from .data.quality_report import report_markdown
from .evaluation.quality_plot import plot_quality
from .telemetry import command_line, package_versions, read_json
from .toy_endpoint import ToyServer, serving, toy_document
from .training_benchmark import process_memory

STAGES = ("preflight", "plans", "notes", "splits", DATASET_FOLDER)
PARTS = ("procedural", "extractive", "endpoint", "memory")
QUALITY_FILE = "extractive_quality.md"


@dataclass
class DataBenchmarkArguments:
    """
    What is built, each time in a process of its own.

    Args:
        parts (`list[str]`, *optional*): Some of `"procedural"`, `"extractive"`, `"endpoint"` and `"memory"`.
        procedural_documents (`int`, *optional*, defaults to 2000): Documents of the build from procedural worlds.
        extractive_documents (`int`, *optional*, defaults to 400): Installed documents for the extractive teacher; what
            became of them is written beside `output`, as a page with a figure.
        extractive_options (`dict`, *optional*): Further options of that build.
        endpoint_documents (`int`, *optional*, defaults to 400): Toy documents for the chat teacher.
        endpoint_latency (`float`, *optional*, defaults to 0.05): Seconds that its server takes for an answer.
        endpoint_concurrency (`int`, *optional*, defaults to 4): Requests in flight.
        memory_documents (`list[int]`, *optional*, defaults to `[10000, 100000]`): Sizes whose memory is compared.
        output (`str`, *optional*, defaults to `"build/benchmarks/data.json"`): File that is written.
        endpoint_bar (`float`, *optional*, defaults to 0.9): Least share of concurrency / latency.
        memory_bar (`float`, *optional*, defaults to 1.1): Most that memory may grow.
    """

    parts: list[str] = field(default_factory=lambda: [*PARTS], metadata={"help": "What is measured."})
    procedural_documents: int = field(default=2000, metadata={"help": "Procedural documents."})
    extractive_documents: int = field(default=400, metadata={"help": "Installed documents."})
    extractive_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the extractive build."}
    )
    endpoint_documents: int = field(default=400, metadata={"help": "Toy documents for the chat teacher."})
    endpoint_latency: float = field(default=0.05, metadata={"help": "Seconds per answer."})
    endpoint_concurrency: int = field(default=4, metadata={"help": "Requests in flight."})
    memory_documents: list[int] = field(
        default_factory=lambda: [10_000, 100_000], metadata={"help": "Sizes whose memory is compared."}
    )
    output: str = field(default="build/benchmarks/data.json", metadata={"help": "File that is written."})
    endpoint_bar: float = field(default=0.9, metadata={"help": "Least share of concurrency / latency."})
    memory_bar: float = field(default=1.1, metadata={"help": "Most that memory may grow."})

    def __post_init__(self) -> None:
        if not self.parts or set(self.parts) - set(PARTS):
            raise ValueError(f"parts={self.parts}, allowed: some of {list(PARTS)}.")
        for name in ("procedural_documents", "extractive_documents", "endpoint_documents", "endpoint_concurrency"):
            check_whole(name, getattr(self, name), 1)
        if len(self.memory_documents) != 2 or not 0 < self.memory_documents[0] < self.memory_documents[1]:
            raise ValueError(f"memory_documents={self.memory_documents}, allowed: a small and a large number.")
        if self.endpoint_latency <= 0:
            raise ValueError(f"endpoint_latency={self.endpoint_latency}, allowed: above 0.")


def run_build(options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Builds in this process; meant for one of its own.

    Args:
        options (`Mapping`): Fields of the stages' options.

    Returns:
        `dict`: Wall-clock seconds by stage, CPU seconds of the build, bytes held before it and at most.
    """
    disable_progress_bars()
    parts = [kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options}) for kind in OPTIONS]
    builder = DatasetBuilder(*parts, card_template=template_path("dataset_card.md"))
    imported, cpu, before = process_memory("VmRSS"), time.process_time(), time.time()
    builder.run()
    seconds = {}
    for stage in STAGES:
        # A stage's manifest is the last file that it writes.
        after = (builder.root / stage / "manifest.json").stat().st_mtime
        seconds[stage], before = after - before, after
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "imported_bytes": imported,
        "peak_bytes": process_memory("VmHWM"),
    }


def measured(documents: int, folder: Path, **options: Any) -> dict[str, Any]:
    """[`run_build`] in a new process, with documents per second of wall clock and of CPU."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        found = executor.submit(run_build, {"output_dir": str(folder), **options}).result()
    rates = {
        "documents": documents,
        "per_second": documents / sum(found["seconds"].values()),
        "per_cpu_second": documents / found["cpu_seconds"],
    }
    return {**rates, **found}


def procedural_build(documents: int, folder: Path) -> dict[str, Any]:
    """A build from procedural worlds of three streams."""
    return measured(documents, folder, sources=[{"kind": "worlds", "count": documents}])


def extractive_build(arguments: DataBenchmarkArguments, folder: Path) -> dict[str, Any]:
    """A build from what this environment has installed; writes its quality report beside the output."""
    count = arguments.extractive_documents
    options = {**arguments.extractive_options, "sources": [{"kind": "installed", "limit": count}]}
    found = measured(count, folder, teacher="extractive", **options)
    report = read_json(folder / DATASET_FOLDER / REPORT_FILE)
    # The environment may hold fewer.
    stage = report["stages"]["preflight"]
    found["documents"] = stage["rows"] + sum(stage["rejects"].values())
    found["exported"] = report["stages"]["splits"]["rows"]
    target = Path(arguments.output).parent
    target.mkdir(parents=True, exist_ok=True)
    figure = plot_quality(report, target / Path(QUALITY_FILE).with_suffix(".png"))
    page = report_markdown(report).replace("# Quality report\n", quality_opening(found, figure.name), 1)
    (target / QUALITY_FILE).write_text(page, encoding="utf-8")
    return found


def quality_opening(found: Mapping[str, Any], figure: str) -> str:
    """Head of the page of [`extractive_build`]."""
    return (
        "# Extractive teacher on installed documents: quality report\n\n"
        f"`python {command_line()}`\n\n"
        f"{found['documents']} documents with sections that this Python environment holds, of which "
        f"{found['exported']} are exported.\n\n![Documents by stage, reasons and streams]({figure})\n"
    )


def endpoint_build(arguments: DataBenchmarkArguments, folder: Path) -> dict[str, Any]:
    """A build with the chat teacher; the server is in this process, the build in another."""
    folder.mkdir()
    documents = [toy_document(number) for number in range(arguments.endpoint_documents)]
    lines = [
        {"id": d.document_id, "title": d.title, "sections": [{"header": h, "text": t} for h, t in d.sections]}
        for d in documents
    ]
    (folder / "toys.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    columns = {"id": "id", "title": "title", "sections": "sections"}
    sources = [{"kind": "jsonl", "files": [str(folder / "toys.jsonl")], "name": "toys", "columns": columns}]
    # Toy documents are near duplicates of each other.
    choices = {"sources": sources, "near_duplicates": "keep", "near_duplicate_similarity": 1.0}
    with serving(ToyServer(arguments.endpoint_latency)) as server, online():
        teacher = {
            **{"base_url": server.url, "store": str(folder / "answers.sqlite"), "plan_model": "a", "notes_model": "b"},
            "max_concurrency": arguments.endpoint_concurrency,
        }
        found = measured(len(documents), folder / "build", teacher="chat", teacher_options=teacher, **choices)
    ideal = arguments.endpoint_concurrency / arguments.endpoint_latency
    requests = 2 * len(documents) / (found["seconds"]["plans"] + found["seconds"]["notes"])
    return {**found, "requests_per_second": requests, "share": requests / ideal}


@contextmanager
def online() -> Iterator[None]:
    """Child processes may ask the loopback, even where `HF_HUB_OFFLINE` keeps them from the Hub."""
    before = os.environ.pop("HF_HUB_OFFLINE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before


def benchmark_data(arguments: DataBenchmarkArguments) -> dict[str, Any]:
    """Rates, memory and bars; see [`DataBenchmarkArguments`]."""
    report: dict[str, Any] = {
        "command": command_line(),
        "cpu_count": os.cpu_count(),
        "load": os.getloadavg()[1],
        "versions": package_versions(("datasets", "huggingface-hub")),
        "builds": {},
        "bars": [],
    }
    builds, bars = report["builds"], report["bars"]
    work = Path(tempfile.mkdtemp(prefix="data-benchmark-"))
    try:
        if "procedural" in arguments.parts:
            builds["procedural"] = procedural_build(arguments.procedural_documents, work / "procedural")
        if "extractive" in arguments.parts:
            builds["extractive"] = extractive_build(arguments, work / "extractive")
        if "endpoint" in arguments.parts:
            builds["endpoint"] = found = endpoint_build(arguments, work / "endpoint")
            share, bar = found["share"], arguments.endpoint_bar
            bars.append({"name": "endpoint", "value": share, "limit": "at least", "bar": bar, "met": share >= bar})
        if "memory" in arguments.parts:
            peaks = []
            for count in arguments.memory_documents:
                builds[f"memory {count}"] = found = procedural_build(count, work / f"memory{count}")
                peaks.append(found["peak_bytes"])
            growth, bar = peaks[1] / peaks[0], arguments.memory_bar
            bars.append({"name": "memory", "value": growth, "limit": "at most", "bar": bar, "met": growth <= bar})
    finally:
        shutil.rmtree(work)
    return report


def data_table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = ["# Cost of a dataset build", "", f"`python {report['command']}`", ""]
    lines += [
        f"One process per build, {report['cpu_count']} cores with a load of {report['load']:.1f} when it began.",
        "",
    ]
    lines += ["| build | documents | per second | per second of CPU | peak, MiB (imports) |", "|---|---|---|---|---|"]
    for name, build in report["builds"].items():
        peak, imported = (build[key] / 2**20 for key in ("peak_bytes", "imported_bytes"))
        rates = f"{build['per_second']:.1f} | {build['per_cpu_second']:.1f}"
        lines.append(f"| {name} | {build['documents']} | {rates} | {peak:.0f} ({imported:.0f}) |")
    lines += ["", f"| seconds by stage | {' | '.join(STAGES)} |", f"|{'---|' * (len(STAGES) + 1)}"]
    for name, build in report["builds"].items():
        seconds = " | ".join(f"{build['seconds'][stage]:.1f}" for stage in STAGES)
        lines.append(f"| {name} | {seconds} |")
    if report["bars"]:
        lines += ["", "| bar | value | allowed | |", "|---|---|---|---|", *map(_bar_row, report["bars"])]
    return "\n".join(lines) + "\n"


def _bar_row(bar: Mapping[str, Any]) -> str:
    verdict = "met" if bar["met"] else "missed"
    return f"| {bar['name']} | {bar['value']:.3f} | {bar['limit']} {bar['bar']:.2f} | {verdict} |"
