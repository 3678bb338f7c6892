"""Processes of Hub users, cheap to start: one process imports the libraries once and forks a child per visit.

As a script it is that process: it reads a visit per line (JSON), runs one function of `visits.py` in a child, and
writes the outcome per line. The environment (endpoint, token, caches) is set before any library is imported.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from importlib.abc import MetaPathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = ("modeling_pdt", "trainer_pdt", "hub_cards")


class NoPackage(MetaPathFinder):
    """Refuses this repository's packages: what a stranger's machine does."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            raise ImportError(f"{name} must not be needed")


class Visitors:
    """
    The parent's end.

    Args:
        endpoint (`str`): The Hub.
        home (`Path`): `HF_HOME` of all visits.
    """

    def __init__(self, endpoint: str, home: Path) -> None:
        plain = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_TOKEN")
        environment = {name: value for name, value in os.environ.items() if name not in plain}
        environment.update(
            HF_ENDPOINT=endpoint, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1"
        )
        environment.update(HF_HUB_DISABLE_PROGRESS_BARS="1", OMP_NUM_THREADS="1")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "process.py")],
            cwd=home,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, visit: str, *arguments, package: bool = False, token: str | None = None, **options):
        """Runs `visits.<visit>(*arguments, **options)` in a fresh process; returns its value and what it printed."""
        request = {"visit": visit, "arguments": arguments, "options": options, "package": package, "token": token}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the visitors' process has ended"
        outcome = json.loads(line)
        if "error" in outcome:
            raise AssertionError(f"{visit} failed:\n{outcome['error']}\n{outcome['printed'][-3000:]}")
        return outcome["value"], outcome["printed"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def run_visit(request: dict) -> dict:
    """In the child: the repository's packages are there or not, the token is the user's."""
    if request["package"]:
        sys.path.insert(0, str(ROOT))
    else:
        sys.meta_path.insert(0, NoPackage())
    if request["token"]:
        os.environ["HF_TOKEN"] = request["token"]
    spec = spec_from_file_location("visits", HERE / "visits.py")
    visits = module_from_spec(spec)
    spec.loader.exec_module(visits)
    return getattr(visits, request["visit"])(*request["arguments"], **request["options"])


def serve() -> None:
    """Forks a child per line of standard input."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    # transformers loads lazily: touch what every visit uses, so that children find it loaded.
    _ = (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.PreTrainedModel)
    _ = (transformers.pipelines.TextGenerationPipeline, transformers.AutoTokenizer, peft.PeftModel)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            result, printed = Path(folder, "result"), Path(folder, "printed")
            child = os.fork()
            if child == 0:
                with printed.open("w") as stream:
                    os.dup2(stream.fileno(), 1)
                    os.dup2(stream.fileno(), 2)
                try:
                    outcome = {"value": run_visit(json.loads(line))}
                except BaseException:
                    outcome = {"error": traceback.format_exc()}
                result.write_text(json.dumps(outcome))
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
            os.waitpid(child, 0)
            outcome = json.loads(result.read_text()) if result.exists() else {"error": "the child died"}
            outcome["printed"] = printed.read_text() if printed.exists() else ""
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
