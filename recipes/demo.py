"""The whole chain on the shipped tiny trunk: train adapters, evaluate, decode prompts, write the report.

python recipes/demo.py                                       # build/demo, at most 15 minutes on 2 cores
python recipes/demo.py --config recipes/tiny/smoke.yaml      # the same with tiny numbers, under 2 minutes
python recipes/demo.py --resume                              # keeps parts that are finished
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer_pdt.parser import RecipeParser, as_words, load_yaml
from trainer_pdt.recipe_checks import check_command, check_fields
from trainer_pdt.resume import is_finished
from trainer_pdt.runs import MEMORY, TRAIN
from trainer_pdt.telemetry import fingerprint, read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = "recipes/tiny/demo.yaml"
STATE_FILE, OVERRIDES_FILE = "demo.json", "train_overrides.json"
SAYS = {
    "train": "train PDT adapters on the frozen tiny trunk, through accelerate launch",
    "evaluate": "write held-out documents in every mode, count, calibrate the rollback threshold",
    "decode": "decode the prompts, streams side by side",
    "report": "tables and figures",
}


@dataclass
class DemoArguments:
    """
    What the demo runs. Paths are relative to the repository.

    Args:
        demo_folder (`str`): Everything is written here; emptied first unless `resume`.
        train_config (`str`): Recipe of `recipes/train.py`.
        train_options, decode_options, evaluate_options (`dict`): Fields that replace or add to the scripts' own.
        decode_prompts (`list[str]`): Requests to decode.
        expected_minutes (`dict[str, float]`): By part, measured on 2 cores.
        threads (`int`): CPU threads of every part.
        resume (`bool`): Keep finished parts whose command has not changed; training continues at its checkpoint.
    """

    demo_folder: str = field(metadata={"help": "Folder of all results."})
    train_config: str = field(metadata={"help": "Recipe of recipes/train.py."})
    decode_prompts: list[str] = field(metadata={"help": "Requests to decode."})
    train_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of the training recipe."})
    decode_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of recipes/decode.py."})
    evaluate_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Of recipes/evaluate.py."})
    expected_minutes: dict[str, float] = field(default_factory=dict, metadata={"help": "By part, on 2 cores."})
    threads: int = field(default=2, metadata={"help": "CPU threads of every part."})
    resume: bool = field(default=False, metadata={"help": "Keep finished parts."})


def commands(arguments: DemoArguments) -> dict[str, list[list[str]]]:
    """The commands of every part, in order; evaluation calibrates the rollbacks, so it comes before decoding."""
    python, folder = sys.executable, arguments.demo_folder
    model, report = f"{folder}/model", f"{folder}/model/training_report.json"
    launch = [python, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate_configs/cpu.yaml"]
    train = [*launch, "recipes/train.py", "--config", arguments.train_config, f"{folder}/{OVERRIDES_FILE}"]
    decode = [python, "recipes/decode.py", "--model", model, *as_words(arguments.decode_options)]
    evaluate = {"model": model, "output_folder": folder, "training_report": report}
    evaluate |= {"threads": arguments.threads, "workers": arguments.threads}
    page = [python, "-m", "trainer_pdt.evaluation.report", f"{folder}/evaluation.json", "--training", report]
    return {
        "train": [train],
        "evaluate": [[python, "recipes/evaluate.py", *as_words(evaluate | arguments.evaluate_options)]],
        "decode": [
            [*decode, "--prompt", prompt, "--manifest", f"{folder}/decode/prompt_{number}.json"]
            for number, prompt in enumerate(arguments.decode_prompts, start=1)
        ],
        "report": [page],
    }


def prepare(arguments: DemoArguments) -> dict[str, Any]:
    """Empties the demo's own folder unless parts are kept, writes the training overrides; returns finished parts."""
    folder, state_file = ROOT / arguments.demo_folder, ROOT / arguments.demo_folder / STATE_FILE
    model, threads = f"{arguments.demo_folder}/model", arguments.threads
    overrides = {"output_dir": model, "threads": threads, **arguments.train_options}
    recipe = load_yaml(ROOT / arguments.train_config) | overrides
    if not (ROOT / recipe["trunk"] / "model.safetensors").is_file():
        raise SystemExit(f"demo: no trunk in {recipe['trunk']}; `make trunk` trains it")
    check_fields(TRAIN, recipe)
    parts = commands(arguments)
    for command in (*parts["evaluate"], *parts["decode"]):
        check_command(command)
    if folder.is_dir() and any(folder.iterdir()) and not state_file.is_file():
        raise SystemExit(f"demo: {arguments.demo_folder} holds other files; move them or set --demo_folder")
    state = {"settings": fingerprint(recipe), "max_steps": recipe["max_steps"], "parts": {}}
    if arguments.resume and state_file.is_file():
        fresh, state = state, state | read_json(state_file)
        if fresh["settings"] != state["settings"]:
            raise SystemExit(f"demo: {arguments.demo_folder} was made with other settings; leave out --resume")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(state_file, state)
    write_json(folder / OVERRIDES_FILE, overrides)
    return state


def announce(arguments: DemoArguments) -> None:
    """Says what will run, where results go, and how long it takes."""
    minutes = arguments.expected_minutes
    print(f"demo: one seed, {arguments.threads} threads, results in {arguments.demo_folder}/; in order:")
    for part, text in SAYS.items():
        print(f"  {part:<9} about {minutes.get(part, 0):4.1f} min  {text}")
    print(f"  expected in all: {sum(minutes.values()):.0f} minutes on 2 cores", flush=True)


def run_part(part: str, steps: list[list[str]], threads: int) -> float:
    """Runs the commands of a part, output shown; returns seconds."""
    fixed = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Waiting threads do not spin, which would stall a busy machine.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **MEMORY, **os.environ, **fixed, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    for command in steps:
        shown = shlex.join(["python", *command[1:]])
        print(f"\ndemo: {part}: {shown}", flush=True)
        if code := subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            print(f"demo: {part} failed with exit status {code}: {shown}", file=sys.stderr)
            raise SystemExit("demo: its own message is above; add --resume to keep what is finished")
    return time.monotonic() - started


def main() -> None:
    """Runs the parts in order."""
    words = sys.argv[1:] if "--config" in sys.argv else ["--config", str(ROOT / DEFAULT_CONFIG), *sys.argv[1:]]
    (arguments,) = RecipeParser(DemoArguments).parse(words)
    announce(arguments)
    state = prepare(arguments)
    started, finished, changed = time.monotonic(), state["parts"], False
    state["parts"] = {}
    for part, steps in commands(arguments).items():
        write_json(ROOT / arguments.demo_folder / STATE_FILE, state)
        mark = fingerprint(steps)
        changed = changed or finished.get(part, {}).get("commands") != mark
        model = f"{arguments.demo_folder}/model"
        if part == "train" and changed and is_finished(ROOT / model, state["max_steps"]):
            # Stopped after the model's last file; what training refuses to continue needs its report only.
            steps = [[sys.executable, "-m", "trainer_pdt.training_report", model]]
        if changed:
            state["parts"][part] = {"commands": mark, "seconds": round(run_part(part, steps, arguments.threads), 1)}
        else:
            state["parts"][part] = finished[part]
            print(f"\ndemo: {part}: finished before, kept", flush=True)
    write_json(ROOT / arguments.demo_folder / STATE_FILE, state)
    times = ", ".join(f"{part} {entry['seconds'] / 60:.1f}" for part, entry in state["parts"].items())
    minutes = (time.monotonic() - started) / 60
    print(f"\ndemo: done in {minutes:.1f} minutes ({times}); open {arguments.demo_folder}/index.html")


if __name__ == "__main__":
    main()
