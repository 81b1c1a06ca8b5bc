"""Parsers of the commands that look at images, recipes, runs and the machine."""

import argparse
import json
import re
import signal
import sys
from pathlib import Path
from typing import Literal

from dinoforge.cli.keys import (
    EXIT_FINDINGS,
    Commands,
    add_keys,
    check_recipe,
    is_rank,
    number_above_zero,
    parse_keys,
    say_ignored,
    whole_number_from,
)
from dinoforge.system.signals import EXIT_SIGNALS


def add_inspect(commands: Commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show what your images are, and what training would make of them",
        description="Looks at a sample of the images, trains nothing, and says what they are: kinds, sizes, channels, "
        "values and what becomes 0 and 255, labels, copies, unreadable files with reasons, and the keys to say.",
        epilog="example: dinoforge inspect photos/ --report photos.html",
    )
    inspect.add_argument("data", metavar="DATA", help="folder of images, walked recursively")
    inspect.add_argument("--labels", metavar="FILE.csv", help="file name, label; default: names of sub-folders")
    inspect.add_argument("--report", metavar="FILE.html", help="write a page, with crops as the network sees them")
    inspect.add_argument(
        "--images", type=whole_number_from(1), default=1024, metavar="N", help="looked at, at most; default: 1024"
    )
    inspect.add_argument("--seconds", type=number_above_zero, default=8.0, metavar="S", help="of looking; default: 8")
    inspect.add_argument("--json", action="store_true", help="print one line of JSON")
    add_keys(inspect, "recipe keys, such as data.range=[0,4095]")
    inspect.set_defaults(run=_inspect, parser=inspect)


def _inspect(options: argparse.Namespace) -> int:
    keys = parse_keys(options.keys)
    check_recipe("auto", keys)
    if options.images < 1 or options.seconds <= 0:
        options.parser.error("--images and --seconds: expected numbers above 0")
    from dinoforge.commands.inspect import inspect
    from dinoforge.inspection.text import inspection_text

    found = inspect(
        options.data,
        labels=options.labels,
        report=options.report,
        sample=options.images,
        seconds=options.seconds,
        **keys,
    )
    print(json.dumps(found.as_json(), allow_nan=False) if options.json else inspection_text(found))
    if options.report:
        print(f"the page is {options.report}", file=sys.stderr)
    return 0


def add_explain(commands: Commands) -> None:
    explain = commands.add_parser(
        "explain",
        help="say what a recipe does to every parameter, and what a step computes",
        description="Every parameter group with its learning rate and weight decay at a step, all schedules, the "
        "masks, and what a step computes. Allocates no weights: a giant answers as fast as a small one.",
        epilog="example: dinoforge explain --recipe dinov2 --step last optim.layerwise_decay=0.8",
    )
    explain.add_argument("--recipe", default="small", metavar="NAME|FILE", help="default: small; see docs/recipes.md")
    explain.add_argument("--images", type=int, metavar="N", help="images in the data; default: ImageNet-1k's")
    explain.add_argument("--batch", type=int, metavar="B", help="images in a step; default: the recipe's")
    explain.add_argument("--step", type=_step, default=0, metavar="N", help="a step from 0, or last; default: 0")
    explain.add_argument("--plot", metavar="FILE", help="draw the schedules to a .png or .svg file")
    explain.add_argument("--json", action="store_true", help="print one line of JSON")
    add_keys(explain, "recipe keys, such as optim.layerwise_decay=0.8")
    explain.set_defaults(run=_explain, parser=explain)


def _step(text: str) -> int | Literal["last"]:
    try:
        return "last" if text == "last" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number from 0, or last, got {text!r}") from None


def _explain(options: argparse.Namespace) -> int:
    from dinoforge.recipe.load import load_recipe

    keys = parse_keys(options.keys)
    recipe, ignored = load_recipe(options.recipe, keys)

    from dinoforge.planning import explain

    if recipe.init.architecture == "file":
        if recipe.init.weights is None:
            print("without init.weights=RUN|FILE, for the network and crops of dinov2", file=sys.stderr)
        else:
            from dinoforge.commands.recipe import resolve

            recipe, ignored = resolve(options.recipe, keys)

    images = explain.IMAGENET_1K if options.images is None else options.images
    explanation = explain.explain(recipe, images=images, batch=options.batch, step=options.step)
    if options.plot:
        explain.plot_schedules(explanation, Path(options.plot))
    say_ignored(ignored)
    print(json.dumps(explain.explanation_json(explanation)) if options.json else explain.explanation_text(explanation))
    return 0


def add_plan(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="estimate what a run takes on GPUs that are not here",
        description="Memory of each GPU by part under DDP and FSDP2, with and without activation checkpointing, "
        "communication and time of a step, hours of the run, images per second that the data has to give. From "
        "published peaks and a stated utilisation: an estimate, not a measurement.",
        epilog="example: dinoforge plan --recipe dinov2 --images 1281167 --gpus 8xH100",
    )
    plan.add_argument("--recipe", default="small", metavar="NAME|FILE", help="default: small; see docs/recipes.md")
    plan.add_argument("--images", type=whole_number_from(1), required=True, metavar="N", help="images in the data")
    plan.add_argument("--gpus", required=True, metavar="NxDEVICE", help="such as 8xH100")
    plan.add_argument(
        "--utilisation", type=float, default=0.35, metavar="SHARE", help="of the peak that is reached; default: 0.35"
    )
    plan.add_argument("--json", action="store_true", help="print one line of JSON")
    add_keys(plan, "recipe keys, such as train.batch_size=1024")
    plan.set_defaults(run=_plan, parser=plan)


def _plan(options: argparse.Namespace) -> int:
    from dinoforge.recipe.load import load_recipe

    recipe, ignored = load_recipe(options.recipe, parse_keys(options.keys))

    from dinoforge.planning.plan import requirements, requirements_json, requirements_text

    answer = requirements(recipe, images=options.images, gpus=options.gpus, utilisation=options.utilisation)
    say_ignored(ignored)
    print(json.dumps(requirements_json(answer)) if options.json else requirements_text(answer))
    return 0


def add_compare(commands: Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="the differences of two recipes in words",
        description="The differences of two recipes as a table in words: the method first, then augmentation, then "
        "sizes and lengths.",
        epilog="example: dinoforge compare dinov2 bernoulli",
    )
    for name in ("first", "second"):
        compare.add_argument(name, metavar="NAME|FILE", help="a recipe")
    compare.add_argument("--json", action="store_true", help="print one line of JSON")
    add_keys(compare, "recipe keys that are laid over both")
    compare.set_defaults(run=_compare, parser=compare)


def _compare(options: argparse.Namespace) -> int:
    from dinoforge.recipe import compare
    from dinoforge.recipe.load import load_recipe

    keys = parse_keys(options.keys)
    names = (options.first, options.second)
    (first, ignored), (second, also_ignored) = (load_recipe(name, keys) for name in names)
    rows = compare.compare(first, second)
    say_ignored(ignored | also_ignored)
    print(json.dumps(compare.differences_json(rows, names)) if options.json else compare.differences_text(rows, names))
    return 0


def add_bench(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure what limits a run on this machine: data or step",
        description="Times steps and the making of their data on your images, alone and together, and says what "
        "limits and what to change. Writes nothing.",
        epilog="example: dinoforge bench photos/ --recipe small train.batch_size_per_gpu=128",
    )
    bench.add_argument("data", metavar="DATA", help="folder of images, walked recursively")
    bench.add_argument("--recipe", default="small", metavar="NAME|FILE", help="default: small; see docs/recipes.md")
    bench.add_argument(
        "--seconds", type=number_above_zero, default=10.0, help="for each of three measurements; default: 10"
    )
    bench.add_argument("--json", action="store_true", help="print one line of JSON")
    add_keys(bench, "recipe keys, such as data.reduced_decode=true")
    bench.set_defaults(run=_bench, parser=bench)


def _bench(options: argparse.Namespace) -> int:
    keys = parse_keys(options.keys)
    check_recipe(options.recipe, keys)

    from dinoforge.commands.bench import bench
    from dinoforge.planning.bench import result_text

    result = bench(options.data, options.recipe, seconds=options.seconds, **keys)
    print(json.dumps(result.as_json()) if options.json else result_text(result))
    return 0


def add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what is wrong with a run, and which keys to try",
        description="Reads the metrics and the recipe of a run, running or finished, and says in plain words what is "
        "wrong and which keys to try. Exit code: 0 if nothing is, 1 if something is.",
        epilog="example: dinoforge doctor runs/photos",
    )
    doctor.add_argument("model", metavar="RUN", help="run directory")
    doctor.add_argument("--json", action="store_true", help="print one line of JSON")
    doctor.set_defaults(run=_doctor, parser=doctor)


def _doctor(options: argparse.Namespace) -> int:
    from dinoforge.commands.report import doctor

    findings = doctor(options.model)
    if options.json:
        print(json.dumps({"findings": [vars(finding) for finding in findings]}))
    elif not findings:
        print("Nothing is wrong, as far as the metrics show.")
    else:
        print("\n".join(f"step {f.step:,}  {f.name}\n  {f.sentence}" for f in findings))
    return EXIT_FINDINGS if findings else 0


def add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="a page that shows what a run sees and learns",
        description="Writes RUN/report.html, one file that needs no network; of several runs, RUN/comparison.html "
        "with their curves and recipes side by side.",
        epilog="example: dinoforge report runs/photos --open",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    report.add_argument("--data", metavar="DIR", help="the images, if they are no longer where the run had them")
    report.add_argument("--labels", metavar="FILE.csv", help="file name, label; default: names of sub-folders")
    report.add_argument("--figures", metavar="DIR", help="also write each figure of one run, as PNG and SVG")
    report.add_argument(
        "--channels",
        type=whole_number_from(0),
        nargs="+",
        metavar="N",
        help="shown as red, green, blue, or one as grey; from 0",
    )
    report.add_argument("--device", default="auto", metavar="NAME", help="of the network: cuda:N, mps or cpu")
    report.add_argument("--open", action="store_true", help="open the page in the browser")
    report.set_defaults(run=_report, parser=report)


def _report(options: argparse.Namespace) -> int:
    from dinoforge.commands.report import report

    written = report(
        *options.runs,
        data=options.data,
        labels=options.labels,
        figures=options.figures,
        channels=options.channels,
        device=options.device,
    )
    print(written.page)
    for path in written.figures:
        print(path)
    for reason in written.missing:
        print(f"left out  {reason}", file=sys.stderr)
    if options.open:
        import webbrowser

        if not webbrowser.open(written.page.resolve().as_uri()):
            print("no browser was found: open the page yourself", file=sys.stderr)
    return 0


def add_replay(commands: Commands) -> None:
    replay = commands.add_parser(
        "replay",
        help="run a batch again whose loss or gradients were not finite",
        description="Runs a batch that a run has saved through the networks of the newest checkpoint that is not "
        "later, and says where values stop being finite. Changes nothing.",
        epilog="example: dinoforge replay runs/photos --batch runs/photos/non_finite/batch_00000120.safetensors",
    )
    replay.add_argument("model", metavar="RUN", help="run directory")
    replay.add_argument("--batch", required=True, metavar="FILE", help="a file of RUN/non_finite")
    replay.add_argument(
        "--precision", choices=("recipe", "fp32"), default="recipe", help="of the forward pass; default: recipe"
    )
    replay.set_defaults(run=_replay, parser=replay)


def _replay(options: argparse.Namespace) -> int:
    from dinoforge.commands.replay import replay
    from dinoforge.runs.replay import describe, describe_terms

    findings, saved, step = replay(options.model, options.batch, precision=options.precision)
    print(f"batch      number {saved.number:,}, skipped at step {saved.step:,}: {describe_terms(saved.terms)}")
    print(f"weights    of step {step:,}")
    print(describe(findings, saved.names))
    if findings.finite:
        print(
            f"With these weights all is finite. They are of {saved.step - step:,} steps before: what happened since "
            "did it, not the images alone. Try a lower optim.base_lr or a longer optim.warmup_length."
        )
    return 0


def add_selfcheck(commands: Commands) -> None:
    selfcheck = commands.add_parser(
        "selfcheck",
        help="see whether everything is right on this machine; made to be pasted into a bug report",
        description="Prints the machine and what a run would take of it, compares steps with the reference's numbers, "
        "goes the way of a user by the commands themselves, kills runs and ranks, and measures memory and speed. Each "
        "line is ok, FAIL, or not here with the reason. Uses no network. Exit code: 1 if something failed, else 0.",
        epilog="example: dinoforge selfcheck --nproc auto",
    )
    selfcheck.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:N, mps or auto")
    selfcheck.add_argument("--nproc", metavar="N|auto", help="also start N ranks; auto: one for each GPU")
    selfcheck.add_argument("--short", action="store_true", help="leave out what takes long on a CPU")
    selfcheck.add_argument("--only", nargs="+", default=[], metavar="PART", help="some parts, such as: steps speed")
    selfcheck.add_argument("--json", action="store_true", help="print one line of JSON, and the others to stderr")
    selfcheck.add_argument("--fault", help=argparse.SUPPRESS)  # how it starts runs that are to go wrong
    selfcheck.set_defaults(run=_selfcheck, parser=selfcheck)


def _selfcheck(options: argparse.Namespace) -> int:
    if options.fault:
        return _run_fault(options)

    from dinoforge.selfcheck.lines import Line, line_text
    from dinoforge.selfcheck.part import PARTS
    from dinoforge.selfcheck.run import selfcheck

    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", options.device):
        options.parser.error(f"--device: expected auto, cpu, cuda, cuda:N or mps, got {options.device!r}")
    if options.nproc is not None and not re.fullmatch(r"auto|[1-9]\d*", options.nproc):
        options.parser.error(f"--nproc: expected a number from 1, or auto, got {options.nproc!r}")
    if unknown := set(options.only) - set(PARTS):
        options.parser.error(f"--only: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_SIGNALS["SIGTERM"]))  # ends what it has started, too
    stream = sys.stderr if options.json else sys.stdout

    def show(line: Line) -> None:
        print(line_text(line), file=stream, flush=True)

    result = selfcheck(device=options.device, nproc=options.nproc, short=options.short, only=options.only, on_line=show)
    print(result.summary(), file=stream, flush=True)
    if options.json:
        print(json.dumps(result.as_json()))
    return 0 if result.passed else EXIT_FINDINGS


def _run_fault(options: argparse.Namespace) -> int:
    """A run of the self-check in which something is to go wrong, alone or on ranks."""
    if options.nproc is not None and not is_rank():
        from dinoforge.cli.ranks import launch
        from dinoforge.system.device import number_of_ranks

        return launch(["selfcheck", "--fault", options.fault], ranks=number_of_ranks(options.nproc), restarts=0)

    from dinoforge.selfcheck.faults import Fault, train_with

    return train_with(Fault.from_json(json.loads(options.fault)))
