"""Trains every case of an ablation through recipes/train.py and writes what each change does to the measures.

python recipes/ablate.py --config recipes/tiny/ablations.yaml --jobs 2                    # all; continues after a stop
python recipes/ablate.py --config recipes/tiny/ablations.yaml --variants base,with_kd     # some of them
python recipes/ablate.py --config recipes/tiny/ablations.yaml --report_only               # the table of what is there
"""

from collections.abc import Sequence
from pathlib import Path

from modeling_pdt import PDTAdapterConfig
from trainer_pdt import PDTTrainingArguments
from trainer_pdt.ablation import AblationArguments, compare, plan_runs, report_markdown
from trainer_pdt.arguments import CurriculumArguments, DataArguments, ModelArguments
from trainer_pdt.parser import RecipeParser
from trainer_pdt.runs import missing_runs, perform_all
from trainer_pdt.telemetry import command_line, write_json

ROOT = Path(__file__).resolve().parents[1]


def show(result: dict) -> str:
    """What is said of a finished training."""
    return f": value accuracy {result['measures'].get('sibling_value_accuracy', float('nan')):.3f}"


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
        todo = len(missing_runs(runs, (), ()))
        print(f"ablate: {len(runs) - todo} of {len(runs)} runs are kept, {todo} to do", flush=True)
        failed = perform_all(
            lambda going, ended: missing_runs(runs, going, ended)[: arguments.jobs - len(going)],
            *(arguments.jobs, ROOT, "ablate", show),
        )
    print(f"ablate: wrote {write_report(arguments)}")
    if failed:
        raise SystemExit("ablate: failed, the same command tries again:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
