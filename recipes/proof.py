"""Makes the proof: every trunk, training, ablation and evaluation of one list, each once, and the report over seeds.

What a piece measured is also kept beside the report, in `pieces/`: with those files another machine goes on where this
one stopped, and writes the report without making anything.

python recipes/proof.py --config recipes/tiny/proof.yaml                  # all; goes on where an earlier call stopped
python recipes/proof.py --config recipes/tiny/proof.yaml --minutes 150    # what fits, at least one piece
python recipes/proof.py --config recipes/tiny/proof.yaml --report_only    # the report of what is there
"""

import time
from collections.abc import Sequence
from pathlib import Path

from trainer_pdt.evaluation.proof import ProofArguments, expected_minutes, next_pieces, plan_pieces
from trainer_pdt.evaluation.proof_report import write_proof_report
from trainer_pdt.evaluation.records import keep_records, restore_records
from trainer_pdt.parser import RecipeParser
from trainer_pdt.recipe_checks import check_fields
from trainer_pdt.runs import RESULT_FILE, Run, perform_all
from trainer_pdt.telemetry import command_line

ROOT = Path(__file__).resolve().parents[1]


def show(result: dict) -> str:
    """What is said of a finished piece."""
    return f": {result['seconds'] / 60:.1f} min"


def make_pieces(runs: Sequence[Run], arguments: ProofArguments) -> list[str]:
    """Makes missing pieces as cores come free, while time is left, at least one; returns what failed, in words."""
    started, chosen = time.monotonic(), []

    def choose(going: Sequence[Run], ended: Sequence[Run]) -> list[Run]:
        left = arguments.minutes
        if left is not None:
            left -= (time.monotonic() - started) / 60
        now = next_pieces(runs, going, arguments.cores, left, ended)
        if not chosen and not now:
            now = next_pieces(runs, going, arguments.cores, None, ended)[:1]
        for run in now:
            (run.folder / RESULT_FILE).unlink(missing_ok=True)  # a model that is gone is made again
        chosen.extend(now)
        return now

    return perform_all(choose, arguments.cores, ROOT, "proof", show)


def main(args: Sequence[str] | None = None) -> None:
    """Checks every piece, makes what is missing, reports."""
    (arguments,) = RecipeParser(ProofArguments).parse(args)
    pieces = plan_pieces(arguments, ROOT)
    runs = [run for entry in pieces.values() for run in entry]
    for run in runs:
        check_fields(run.script, run.recipe)
    folders = ROOT / arguments.output, (ROOT / arguments.report).with_suffix("") / "pieces"
    if restored := restore_records(runs, *folders):
        print(f"proof: {len(restored)} pieces are finished by their records in {folders[1]}", flush=True)
    for name, entry in pieces.items():
        done = sum(run.result() is not None for run in entry)
        expected = expected_minutes(entry, arguments.cores)
        print(f"proof: {name}: {done} of {len(entry)} done, about {expected:.0f} min left", flush=True)
    failed = [] if arguments.report_only else make_pieces(runs, arguments)
    keep_records(runs, *folders)
    path = write_proof_report(arguments, pieces, ROOT, command_line())
    print(f"proof: wrote {path}" if path else f"proof: no report before a seed of {arguments.main} is evaluated")
    if failed:
        raise SystemExit("proof: failed, the same command tries again:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
