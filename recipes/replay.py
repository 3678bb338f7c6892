"""Runs a stored call again on the CPU, without its trunk: `python recipes/replay.py --replay_folder runs/replay`

Says whether the decisions are those of the stored call; leaves with 1 and names the first differences if not.
"""

from dataclasses import dataclass, field

from modeling_pdt import ParallelGenerateOutput
from trainer_pdt.manifest import differences
from trainer_pdt.parser import RecipeParser
from trainer_pdt.replay import read_record, replay
from trainer_pdt.telemetry import write_json

SHOWN = 10


@dataclass
class ReplayArguments:
    replay_folder: str = field(metadata={"help": "Written by recipes/decode.py --replay_folder."})
    trace: str | None = field(default=None, metadata={"help": "JSON file for the trace of the replay."})


def main(args: list[str] | None = None) -> ParallelGenerateOutput:
    """Replays, writes the trace, compares."""
    (arguments,) = RecipeParser(ReplayArguments).parse(args)
    record = read_record(arguments.replay_folder)
    output = replay(arguments.replay_folder)
    trace = output.trace.to_manifest()
    if arguments.trace is not None:
        write_json(arguments.trace, trace)
    found = list(differences(record["trace"], trace))
    seconds = f"{record['trace']['timings']['total_s']:.2f} s then, {trace['timings']['total_s']:.2f} s now"
    if found:
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise SystemExit("replay: differs\n  " + "\n  ".join(found[:SHOWN]) + more)
    print(f"replay: identical, {trace['calls']} calls, {len(trace['events'])} events; {seconds}")
    return output


if __name__ == "__main__":
    main()
