"""Trains every case of an ablation through recipes/train.py and writes what each change does to the measures.

python recipes/ablate.py --config recipes/tiny/ablations.yaml --jobs 2                    # all; continues after a stop
python recipes/ablate.py --config recipes/tiny/ablations.yaml --variants base,with_kd     # some of them
python recipes/ablate.py --config recipes/tiny/ablations.yaml --report_only               # the table of what is there
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from modeling_pdt import PDTAdapterConfig
from trainer_pdt import PDTTrainingArguments
from trainer_pdt.ablation import RESULT_FILE, AblationArguments, Run, compare, plan_runs, report_markdown
from trainer_pdt.arguments import CurriculumArguments, DataArguments, ModelArguments
from trainer_pdt.parser import RecipeParser
from trainer_pdt.resume import is_finished
from trainer_pdt.telemetry import command_line, fingerprint, read_json, write_json
from trainer_pdt.training_report import write_training_report

ROOT = Path(__file__).resolve().parents[1]


def train(run: Run) -> dict:
    """
    The result of a run: the kept one, or that of its training, which goes on where an earlier one stopped.

    The lock passes to the training, so that after a kill of this script nobody works in the folder beside it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "lock", "w") as lock, open(run.folder / "train.log", "a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (kept := run.result()) is not None:
            return kept
        recipe_file = run.folder / "recipe.yaml"
        if recipe_file.is_file() and fingerprint(read_json(recipe_file)) != fingerprint(run.recipe):
            shutil.rmtree(run.model, ignore_errors=True)
        write_json(recipe_file, run.recipe)
        if is_finished(run.model, run.recipe["max_steps"]):
            write_training_report(run.model)
        else:
            threads = str(run.recipe.get("threads") or 1)
            fixed = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **fixed, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "recipes/train.py", "--config", str(recipe_file)]
            handles = {"stdout": log, "stderr": subprocess.STDOUT, "pass_fds": (lock.fileno(),)}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, **handles)
        return read_json(write_json(run.folder / RESULT_FILE, run.measured()))


def train_all(runs: Sequence[Run], jobs: int) -> list[str]:
    """Trains what has no result yet, several at a time; returns what failed, in words."""
    started, failed = time.monotonic(), []
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, run): run for run in runs if run.result() is None}
        print(
            f"ablate: {len(runs) - len(futures)} of {len(runs)} trainings are kept, {len(futures)} to do", flush=True
        )
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                run, minutes = futures[future], (time.monotonic() - started) / 60
                left = f"{done} of {len(futures)}, about {minutes / done * (len(futures) - done):.0f} min left"
                if error := future.exception():
                    failed.append(f"{run.case}, seed {run.seed}: {error}; see {run.folder / 'train.log'}")
                    print(f"ablate: {left}: FAILED {failed[-1]}", flush=True)
                else:
                    value = future.result()["measures"].get("sibling_value_accuracy", float("nan"))
                    print(f"ablate: {left}: {run.case}, seed {run.seed}: value accuracy {value:.3f}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def write_report(arguments: AblationArguments) -> Path:
    """Writes `ablations.json` and `ablations.md` of every case with results for all seeds."""
    results: dict[str, dict[int, dict]] = {}
    arguments.variants = list(arguments.cases)
    for run in plan_runs(arguments, ROOT):
        if (result := run.result()) is not None:
            results.setdefault(run.case, {})[run.seed] = result
    report = compare(arguments, results)
    code = [state for found in results.values() for result in found.values() for state in result["git"] if state]
    report["code"] = sorted({state["sha"][:12] + (", changed" if state["dirty"] else "") for state in code})
    folder = ROOT / (arguments.report_folder or arguments.output)
    write_json(folder / "ablations.json", {**report, "runs": results, "command": command_line()})
    path = folder / "ablations.md"
    path.write_text(report_markdown(report, command_line()), encoding="utf-8")
    return path


def main(args: Sequence[str] | None = None) -> None:
    """Checks every case, trains, reports."""
    (arguments,) = RecipeParser(AblationArguments).parse(args)
    runs, failed = plan_runs(arguments, ROOT), []
    checks = RecipeParser(PDTAdapterConfig, ModelArguments, DataArguments, CurriculumArguments, PDTTrainingArguments)
    for run in runs:
        checks.parse_values(run.recipe)
    if not arguments.report_only:
        failed = train_all(runs, arguments.jobs)
    print(f"ablate: wrote {write_report(arguments)}")
    if failed:
        raise SystemExit("ablate: failed, the same command tries again:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
