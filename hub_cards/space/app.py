"""The Space: `python app.py`. Layout and wiring only; `pdt_space` decodes and draws.

The model that is there at the start is the one that the variable `PDT_MODEL` names, a folder or a Hub repository; or
the one of the card beside this file, in a published Space; or the demo's. The page can load another.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from huggingface_hub import SpaceCard

from pdt_space import view
from pdt_space.session import DISAGREEING, PLANS, ModelShelf, Wish, answer, outline_of

CARD, DEMO_MODEL = Path(__file__).with_name("README.md"), "build/demo/model"
EXAMPLES = [
    "Describe the town of Velmar in three parts.",
    "Tell me about the village of Ostrane in three parts.",
    "Describe the harbour town of Brinmoor in three parts.",
]
OUTLINE_HINT = "1. Farming: main crop; orchard fruit\n2. Places: nearby river\n3. People: mayor; old trade"
# What a visitor can switch; the other interventions are words.
SWITCHES = {
    "Bus off": "ablate",
    "Gate shut": "gate_zero",
    "Notes all zeros": "zero_notes",
    "Notes scrambled": "norm_scramble",
    "Notes arrive a round late": "stale",
    "Own notes only": "self_only",
    "Withdraw blocks at random": "random_gate:0.3",
}
INTRO = """
<div class="pdt-intro"><h1>Parallel Decoder Transformer</h1>
<p>One frozen language model writes all sections of an answer at the same time. The sections see each other only
through notes on a bus; a block that disagrees with them is withdrawn and written again.</p></div>
"""
logger = logging.getLogger(__name__)


def theme() -> gr.themes.Base:
    """Quiet, and without fonts from elsewhere."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="md",
        font=["ui-sans-serif", "system-ui", "Segoe UI", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
    )


class Page:
    """What the page's controls do; every error becomes a message on the page."""

    def __init__(self) -> None:
        self.shelf = ModelShelf()

    def load(self, name: str) -> tuple:
        """Model description, number of streams and what happens to a block that disagrees, message."""
        try:
            loaded = self.shelf.get(name)
        except Exception as error:
            return "", gr.skip(), gr.skip(), problem(error)
        config, saved = loaded.model.config, loaded.model.generation_config
        facts = [("streams", config.num_streams), ("tokens per block", config.block_size)]
        facts += [("notes per block", config.notes_per_block), ("layers with notes", len(config.instrumented_layers))]
        return (
            view.describe(loaded.name, [(name, str(value)) for name, value in facts], loaded.untrained),
            config.num_streams,
            next(words for words, policy in DISAGREEING.items() if policy == saved.commit_policy),
            "",
        )

    def write(self, name: str, *choices: object) -> Iterator[tuple]:
        """Boards as they fill, then the plan for the editor; message."""
        try:
            wish, boards = make_wish(*choices), []
            yield view.notice("info", "Reading the request…"), gr.skip(), ""
            for boards in answer(self.shelf.get(name), wish):
                yield view.stage(boards), gr.skip(), ""
            if wish.plan == "trunk":
                yield gr.skip(), outline_of(boards[0]), ""
        except Exception as error:
            yield "", gr.skip(), problem(error)


def make_wish(
    prompt: str,
    plan: str,
    outline: str,
    num_streams: int,
    switches: list[str],
    words: str,
    compare: bool,
    disagreeing: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    calls_per_second: int,
) -> Wish:
    """The values of the controls as a wish."""
    interventions = [SWITCHES[switch] for switch in switches] + words.split()
    return Wish(
        prompt=prompt,
        num_streams=int(num_streams),
        plan=PLANS[plan],
        outline=outline,
        max_new_tokens=int(max_new_tokens),
        temperature=float(temperature),
        seed=int(seed),
        interventions=tuple(interventions),
        commit_policy=DISAGREEING[disagreeing],
        compare=compare,
        calls_per_second=calls_per_second or None,
    )


def problem(error: Exception) -> str:
    """What went wrong, for the page; what is not the visitor's doing is logged too."""
    if not isinstance(error, (ValueError, OSError)):
        logger.error("unexpected error", exc_info=error)
    return view.notice("error", f"{error}" or type(error).__name__)


def in_line() -> tuple[str, str]:
    """What is shown until it is the visitor's turn: board and message."""
    return view.notice("info", "In line: the model writes one answer at a time."), ""


def plan_controls() -> list[gr.components.Component]:
    """Plan and number of streams."""
    plan = gr.Radio(list(PLANS), value=next(iter(PLANS)), label="Plan", elem_id="plan")
    outline = gr.Textbox(
        label="Plan editor",
        info="A line per stream: number, title, what it owns.",
        value="",
        lines=3,
        placeholder=OUTLINE_HINT,
        elem_id="outline",
    )
    return [plan, outline, gr.Slider(1, 8, value=3, step=1, label="Streams", elem_id="streams")]


def bus_controls() -> list[gr.components.Component]:
    """Interventions and comparison."""
    words = "name[:argument][@streams], for instance stale:2@0,2 freeze:1"
    return [
        gr.CheckboxGroup(list(SWITCHES), label="Interventions on the bus", elem_id="switches"),
        gr.Textbox(label="Further interventions", info=words, value="", elem_id="words"),
        gr.Checkbox(label="Write it again with the bus off, and compare", elem_id="compare"),
    ]


def sampling_controls() -> list[gr.components.Component]:
    """What happens to a block that disagrees, lengths, sampling and pace."""
    return [
        gr.Radio(
            list(DISAGREEING), value=next(iter(DISAGREEING)), label="A block that disagrees", elem_id="disagreeing"
        ),
        gr.Slider(8, 256, value=96, step=8, label="Tokens per stream, at most", elem_id="tokens"),
        gr.Slider(0, 2, value=1.0, step=0.1, label="Temperature; 0 is greedy", elem_id="temperature"),
        gr.Number(value=0, precision=0, label="Seed", elem_id="seed"),
        gr.Slider(0, 60, value=20, step=1, label="Trunk calls per second, at most; 0: no limit", elem_id="pace"),
    ]


def build(model: str) -> gr.Blocks:
    """The page, with a model named."""
    page = Page()
    with gr.Blocks(title="Parallel Decoder Transformer", analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(INTRO)
        with gr.Row(elem_id="ask"):
            prompt = gr.Textbox(label="Request", lines=2, value=EXAMPLES[0], scale=6, elem_id="prompt")
            with gr.Column(scale=1, min_width=130, elem_id="do"):
                run = gr.Button("Write", variant="primary", elem_id="write")
                stop = gr.Button("Stop", elem_id="stop")
        gr.Examples(EXAMPLES, prompt, label="For the tiny model, which knows invented towns")
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=2, min_width=290, elem_id="controls"):
                with gr.Group():
                    name = gr.Textbox(value=model, label="Model: folder or Hub repository", elem_id="model")
                    load = gr.Button("Load", size="sm", elem_id="load")
                description = gr.HTML(elem_id="description")
                plan, outline, num_streams = plan_controls()
                bus = bus_controls()
                with gr.Accordion("Disagreement, length, sampling, pace", open=False, elem_id="more"):
                    disagreeing, *sampling = sampling_controls()
            with gr.Column(scale=6, min_width=300, elem_id="result"):
                message = gr.HTML(elem_id="message")
                start = view.notice("info", "Press Write: the sections appear here, all at once.")
                stage = gr.HTML(start, elem_id="stage")
        described = [description, num_streams, disagreeing, message]
        gr.on([demo.load, load.click, name.submit], page.load, [name], described, show_progress="hidden")
        choices = [plan, outline, num_streams, *bus, disagreeing, *sampling]
        inputs, outputs = [name, prompt, *choices], [stage, outline, message]
        asked = gr.on([run.click, prompt.submit], in_line, None, [stage, message], queue=False, show_progress="hidden")
        writing = asked.then(page.write, inputs, outputs, concurrency_limit=1, show_progress="hidden")
        stop.click(lambda: view.notice("info", "Stopped."), None, message, cancels=writing, show_progress="hidden")
    return demo


def start_model() -> str:
    """The model that is there at the start."""
    published = SpaceCard.load(CARD).data.models[0] if CARD.is_file() else DEMO_MODEL
    return os.environ.get("PDT_MODEL", published)


def serve(model: str, **options: Any) -> str:
    """Serves the page; `options` are those of `launch`. Returns its address."""
    style = view.FOLDER / "style.css"
    _, address, _ = build(model).launch(theme=theme(), css_paths=style, footer_links=[], **options)
    return address


if __name__ == "__main__":
    serve(start_model())
