"""Arguments of an evaluation."""

from dataclasses import dataclass, field


@dataclass
class EvaluationArguments:
    """
    What to evaluate, and on how much.

    Args:
        model (`str`): Folder or Hub repository of the adapters.
        output_folder (`str`): Receives `evaluation.json`.
        core_documents, hard_documents (`int`): Held-out documents per kind.
        calibration_documents (`int`): Validation documents on which the agreement threshold is set.
        speed_documents (`int`): Documents of the wall-clock comparisons.
        decode_batch (`int`): Documents per decoding call.
        eval_seed (`int`): Seed of sampling.
        control_factor (`int`): How many times as many documents the controls get (no bus, notes zeroed, gate 0, notes
            swapped): their bars are on the upper end of an interval, which narrows with the number of documents.
        threads (`int`): CPU threads.
        workers (`int`): Processes that write documents and share the threads; 1 = this one.
        training_report (`str`, *optional*): `training_report.json` of the run, quoted in the settings.
        nli_scorer (`str`, *optional*): Judges whether sections contradict each other: `"worlds"`, or folder or Hub id
            of a classifier, see `trainer_pdt.nli`; missing = not judged.
    """

    model: str = field(default="build/demo/model", metadata={"help": "Folder or repository of the adapters."})
    output_folder: str = field(default="build/demo", metadata={"help": "Receives evaluation.json."})
    core_documents: int = field(default=128, metadata={"help": "Held-out core documents."})
    hard_documents: int = field(default=48, metadata={"help": "Held-out hard documents."})
    calibration_documents: int = field(default=96, metadata={"help": "Validation documents for calibration."})
    speed_documents: int = field(default=25, metadata={"help": "Documents of the wall-clock comparisons."})
    decode_batch: int = field(default=32, metadata={"help": "Documents per decoding call."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    control_factor: int = field(default=2, metadata={"help": "Documents of the controls, times as many."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    workers: int = field(default=1, metadata={"help": "Processes that write documents and share the threads."})
    training_report: str | None = field(default=None, metadata={"help": "training_report.json of the run."})
    nli_scorer: str | None = field(default=None, metadata={"help": "Scorer of contradictions: worlds, or a model."})

    def __post_init__(self) -> None:
        least = dict.fromkeys(("core_documents", "calibration_documents", "speed_documents", "decode_batch"), 2)
        for name, bound in {
            **least,
            **dict.fromkeys(("control_factor", "threads", "workers"), 1),
            "hard_documents": 0,
        }.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be >= {bound}, got {getattr(self, name)}.")
