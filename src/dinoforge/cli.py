"""The command line. Imports nothing heavy before it knows that there is work."""

import argparse
import difflib
import json
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from dinoforge import __version__
from dinoforge.errors import DinoforgeError, has_launcher, is_of_one_rank, record_failure
from dinoforge.terminal import be_patient, leave

if TYPE_CHECKING:
    from dinoforge.features import Skipped

_EXIT_FINDINGS = 1
_EXIT_CRASH = 1
_EXIT_SIGNALS = {"SIGHUP": 129, "SIGINT": 130, "SIGUSR1": 138, "SIGUSR2": 140, "SIGTERM": 143}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0 done; 1 doctor found something, or a data worker died; 2 a user's error; 3 out of memory; 4 another rank is gone;
    129, 130, 138, 140 or 143 stopped by a signal.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    takes_keys = hasattr(options, "keys")
    for text in rest:
        if text.startswith("-") or "=" not in text or not takes_keys:
            options.parser.error(_unrecognized(text, options.parser, takes_keys=takes_keys))
    if takes_keys:
        options.keys = [*options.keys, *rest]
    _require_values(options)
    try:
        return int(options.run(options))
    except DinoforgeError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return _EXIT_SIGNALS["SIGINT"]


def _unrecognized(text: str, parser: argparse.ArgumentParser, *, takes_keys: bool) -> str:
    """What is wrong with an argument that no option takes, and which is nearest to it."""
    expected = "an option of this command" + (" or key=value" if takes_keys else "")
    name = text.partition("=")[0]
    options = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.7)
    if not near and takes_keys:
        from dinoforge.config import nearest_keys

        near = [f"{key}=VALUE" for key in nearest_keys(name.lstrip("-").replace("-", "_"))]
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"unrecognized argument {text!r}{hint}: expected {expected}"


def _require_values(options: argparse.Namespace) -> None:
    """Refuse empty arguments, as when a shell's variable is not set; expand ~, which shells leave in --out=~/run."""
    named = {action.dest: action for action in options.parser._actions}
    for dest, value in vars(options).items():
        several = value if isinstance(value, list) else [value]
        if dest in named and any(isinstance(text, str) and not text.strip() for text in several):
            action = named[dest]
            what = action.option_strings[-1] if action.option_strings else str(action.metavar or dest)
            options.parser.error(f"{what} is empty, as when a variable of the shell is not set: give a value")
        if dest in named and dest != "keys" and isinstance(value, str | list):
            expanded = [os.path.expanduser(text) if isinstance(text, str) else text for text in several]
            setattr(options, dest, expanded if isinstance(value, list) else expanded[0])


def _from(least: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers of at least so many."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return number


def _above_zero(text: str) -> float:
    """A type of arguments: finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _print_error(error: DinoforgeError) -> None:
    """Prints an error that all ranks have once, and one that perhaps only this rank has; or has the launcher do it."""
    record_failure(error)
    if has_launcher():
        return
    rank = os.environ.get("RANK", "").strip() or "0" if _is_rank() else "0"
    if rank == "0":
        print(f"error: {error}", file=sys.stderr)
    elif is_of_one_rank(error):
        print(f"error on rank {rank}: {error}", file=sys.stderr)


def _is_rank() -> bool:
    """Whether torchrun or another launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "").strip() not in ("", "1")


def run() -> NoReturn:
    """The program ``dinoforge``."""
    be_patient()
    if not _is_rank() and not has_launcher():
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done: an end in peace, without a traceback of its own
        sys.exit(code)
    try:
        code = main()
    except Exception as error:
        record_failure(error)
        print(f"rank {os.environ.get('RANK', '0')}:", file=sys.stderr)
        traceback.print_exc()
        code = _EXIT_CRASH
    # What libraries do while the interpreter shuts down may wait for ranks that will never come, and gloo's threads,
    # which outlive the process group, may abort the process.
    leave(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinoforge", description="Pretrain vision transformers on your own images, without labels, by DINOv2."
    )
    parser.add_argument("--version", action="version", version=f"dinoforge {__version__}")
    parser.set_defaults(run=partial(_help, parser), parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="pretrain a backbone on a folder of images",
        description="Pretrain a backbone on a folder of images. The same command again continues a run that was "
        "stopped.",
        epilog="example: dinoforge train photos/ --out runs/photos train.steps=2000",
    )
    train.add_argument("data", metavar="DATA", help="folder of images, walked recursively")
    train.add_argument(
        "--recipe",
        default="small",
        metavar="NAME|FILE",
        help="default: small; auto looks at the images",
    )
    train.add_argument("--out", metavar="RUN", help="run directory; default: runs/FOLDER-RECIPE")
    train.add_argument(
        "--labels",
        metavar="FILE.csv",
        help="file name, label; default: names of sub-folders. Never used for training: the teacher is measured by "
        "them while it trains, see probe.*",
    )
    train.add_argument("--dry-run", action="store_true", help="say what would run, and write nothing")
    train.add_argument("--nproc", metavar="N|auto", help="train on N ranks of this machine; auto: one for each GPU")
    train.add_argument(
        "--restarts",
        type=_from(0),
        default=3,
        metavar="N",
        help="with --nproc: new starts after a rank has died; default: 3",
    )
    _add_keys(train, "recipe keys, such as train.steps=2000")
    train.set_defaults(run=_train, parser=train)

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
    inspect.add_argument("--images", type=_from(1), default=1024, metavar="N", help="looked at, at most; default: 1024")
    inspect.add_argument("--seconds", type=_above_zero, default=8.0, metavar="S", help="of looking; default: 8")
    inspect.add_argument("--json", action="store_true", help="print one line of JSON")
    _add_keys(inspect, "recipe keys, such as data.range=[0,4095]")
    inspect.set_defaults(run=_inspect, parser=inspect)

    submit = commands.add_parser(
        "submit",
        help="train as a job of Slurm that is queued again until it is finished",
        description="Queues a training run by submitit, one task for each rank. When the job is pre-empted or its time "
        "is over, the run stops with a checkpoint and is queued again. Needs pip install 'dinoforge[slurm]'.",
        epilog="example: dinoforge submit /data/photos --slurm --out /scratch/run --nodes 2 --gpus-per-node 8",
    )
    submit.add_argument("data", metavar="DATA", help="folder of images that all machines see")
    where = submit.add_mutually_exclusive_group(required=True)
    where.add_argument("--slurm", dest="cluster", action="store_const", const="slurm", help="queue it in Slurm")
    where.add_argument("--local", dest="cluster", action="store_const", const="local", help="try it on this machine")
    submit.add_argument("--recipe", default="small", metavar="NAME|FILE", help="default: small; see docs/recipes.md")
    submit.add_argument("--out", required=True, metavar="RUN", help="run directory that all machines see")
    submit.add_argument("--labels", metavar="FILE.csv", help="as for train")
    submit.add_argument("--nodes", type=_from(1), default=1, metavar="N", help="machines; default: 1")
    submit.add_argument("--gpus-per-node", type=_from(0), default=0, metavar="N", help="and as many ranks; default: 0")
    submit.add_argument("--ranks-per-node", type=_from(1), metavar="N", help="default: one for each GPU, or 1")
    submit.add_argument("--cpus-per-rank", type=_from(1), default=8, metavar="N", help="default: 8")
    submit.add_argument("--minutes", type=_from(1), default=24 * 60, metavar="N", help="of a job; default: a day")
    submit.add_argument("--partition", metavar="NAME", help="of Slurm")
    _add_keys(submit, "recipe keys, such as train.batch_size=1024")
    submit.set_defaults(run=_submit, parser=submit)

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

    bench = commands.add_parser(
        "bench",
        help="measure what limits a run on this machine: data or step",
        description="Times steps and the making of their data on your images, alone and together, and says what "
        "limits and what to change. Writes nothing.",
        epilog="example: dinoforge bench photos/ --recipe small train.batch_size_per_gpu=128",
    )
    bench.add_argument("data", metavar="DATA", help="folder of images, walked recursively")
    bench.add_argument("--recipe", default="small", metavar="NAME|FILE", help="default: small; see docs/recipes.md")
    bench.add_argument("--seconds", type=_above_zero, default=10.0, help="for each of three measurements; default: 10")
    bench.add_argument("--json", action="store_true", help="print one line of JSON")
    _add_keys(bench, "recipe keys, such as data.reduced_decode=true")
    bench.set_defaults(run=_bench, parser=bench)

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
    _add_keys(explain, "recipe keys, such as optim.layerwise_decay=0.8")
    explain.set_defaults(run=_explain, parser=explain)

    plan = commands.add_parser(
        "plan",
        help="estimate what a run takes on GPUs that are not here",
        description="Memory of each GPU by part under DDP and FSDP2, with and without activation checkpointing, "
        "communication and time of a step, hours of the run, images per second that the data has to give. From "
        "published peaks and a stated utilisation: an estimate, not a measurement.",
        epilog="example: dinoforge plan --recipe dinov2 --images 1281167 --gpus 8xH100",
    )
    plan.add_argument("--recipe", default="small", metavar="NAME|FILE", help="default: small; see docs/recipes.md")
    plan.add_argument("--images", type=_from(1), required=True, metavar="N", help="images in the data")
    plan.add_argument("--gpus", required=True, metavar="NxDEVICE", help="such as 8xH100")
    plan.add_argument(
        "--utilisation", type=float, default=0.35, metavar="SHARE", help="of the peak that is reached; default: 0.35"
    )
    plan.add_argument("--json", action="store_true", help="print one line of JSON")
    _add_keys(plan, "recipe keys, such as train.batch_size=1024")
    plan.set_defaults(run=_plan, parser=plan)

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
    _add_keys(compare, "recipe keys that are laid over both")
    compare.set_defaults(run=_compare, parser=compare)

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
        "--channels", type=_from(0), nargs="+", metavar="N", help="shown as red, green, blue, or one as grey; from 0"
    )
    report.add_argument("--device", default="auto", metavar="NAME", help="of the network: cuda:N, mps or cpu")
    report.add_argument("--open", action="store_true", help="open the page in the browser")
    report.set_defaults(run=_report, parser=report)

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

    export = commands.add_parser(
        "export",
        help="write a backbone for another library, and compare its outputs there with ours",
        description="Writes a backbone for another library, runs it there, and prints the largest difference from our "
        "outputs. Nothing is written if they differ.",
        epilog="example: dinoforge export runs/photos --to hf --out photos-backbone",
    )
    export.add_argument("model", metavar="RUN|FILE", help="run directory or weights file")
    export.add_argument("--to", required=True, choices=("safetensors", "official", "timm", "hf", "onnx"))
    export.add_argument("--out", required=True, metavar="PATH", help="file, or folder for hf; must not be there yet")
    export.add_argument("--size", type=_from(1), nargs="+", metavar="PIXELS", help="side, or height and width")
    export.add_argument("--bake", action="store_true", help="make position embeddings for --size alone")
    _add_keys(export, "what a foreign file cannot say, such as student.num_heads=6")
    export.set_defaults(run=_export, parser=export)

    embed = commands.add_parser(
        "embed",
        help="write the features of a folder of images to a file",
        description="Writes the name and the cls token of every image, in the order of the names. The same command "
        "again continues after an interruption. An image that cannot be read gets no row and is listed in "
        "….skipped.txt.",
        epilog="example: dinoforge embed runs/photos photos/ --out features.parquet",
    )
    embed.add_argument("model", metavar="RUN|FILE", help="run directory or weights file")
    embed.add_argument("data", metavar="DATA", help="folder of images, walked recursively")
    embed.add_argument("--out", required=True, metavar="FILE", help="….parquet, or ….npy with ….names.txt")
    embed.add_argument("--patches", action="store_true", help="the patch tokens, too")
    _add_keys(embed, "eval.size=N, eval.crop=true, device=cpu, precision=fp32, student.num_heads=N")
    embed.set_defaults(run=_embed, parser=embed)

    evaluate = commands.add_parser("eval", help="measure a backbone on labelled images")
    evaluate.set_defaults(run=partial(_help, evaluate), parser=evaluate)
    methods = evaluate.add_subparsers(metavar="METHOD")
    for name, what in (
        ("knn", "weighted k-NN"),
        ("linear", "linear classifiers by SGD over a grid of learning rates and layers"),
        ("logreg", "logistic regression by scikit-learn"),
    ):
        method = methods.add_parser(
            name,
            help=f"{what} on frozen features",
            description=f"{what[0].upper()}{what[1:]} on frozen features, beside raw pixels and the untrained network.",
        )
        method.add_argument("model", metavar="RUN|FILE", help="run directory or weights file")
        method.add_argument("--data", required=True, metavar="DIR", help="labelled images")
        method.add_argument(
            "--test", metavar="DIR", help="images to test on; default: five stratified 80/20 splits of --data"
        )
        method.add_argument("--labels", metavar="FILE.csv", help="file name, label; default: names of sub-folders")
        method.add_argument(
            "--shots", type=_from(2), metavar="N", help="at most N labelled images of each class; default: all"
        )
        method.add_argument("--json", action="store_true", help="print one line of JSON")
        _add_keys(method, "eval.size=N, eval.crop=true, device=cpu, precision=fp32, student.num_heads=N")
        method.set_defaults(run=_eval_knn if name == "knn" else _eval_classifier, method=name, parser=method)
    return parser


def _help(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    parser.print_help()
    return 0


def _add_keys(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("keys", nargs="*", metavar="key=value", help=text)


def _keys(texts: Sequence[str]) -> dict[str, Any]:
    from dinoforge.config import parse_override

    return dict(parse_override(text) for text in texts)


def _check(recipe: str, keys: Mapping[str, Any]) -> None:
    """Raises the errors that show without the images."""
    from dinoforge.config import converted, load_recipe

    if recipe == "auto":
        converted(keys)
    else:
        load_recipe(recipe, keys)


def _step(text: str) -> int | Literal["last"]:
    try:
        return "last" if text == "last" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number from 0, or last, got {text!r}") from None


def _train(options: argparse.Namespace) -> int:
    keys = _keys(options.keys)
    _check(options.recipe, keys)  # a mistyped key is answered before torch is imported

    if options.nproc is not None and not _is_rank():
        from dinoforge.training.launch import launch, number_of_ranks

        given = ["--recipe", options.recipe] + (["--out", options.out] if options.out else [])
        given += ["--labels", options.labels] if options.labels else []
        given += ["--dry-run"] if options.dry_run else []
        return launch(
            ["train", options.data, *given, *options.keys],
            ranks=number_of_ranks(options.nproc),
            restarts=options.restarts,
        )

    from dinoforge.api import train_as_program

    result = train_as_program(
        options.data, options.recipe, options.out, labels=options.labels, dry_run=options.dry_run, **keys
    )
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return 0  # or else the ranks, which stopped because they were asked to, would be started again
    return _EXIT_SIGNALS.get(result.stopped_by or "", 0)


def _inspect(options: argparse.Namespace) -> int:
    keys = _keys(options.keys)
    _check("auto", keys)
    if options.images < 1 or options.seconds <= 0:
        options.parser.error("--images and --seconds: expected numbers above 0")
    from dinoforge.api import inspect
    from dinoforge.inspection.text import render

    found = inspect(
        options.data,
        labels=options.labels,
        report=options.report,
        sample=options.images,
        seconds=options.seconds,
        **keys,
    )
    print(json.dumps(found.as_json(), allow_nan=False) if options.json else render(found))
    if options.report:
        print(f"the page is {options.report}", file=sys.stderr)
    return 0


def _submit(options: argparse.Namespace) -> int:
    _check(options.recipe, _keys(options.keys))

    from dinoforge.training.submit import Resources, submit

    resources = Resources(
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node or options.gpus_per_node or 1,
        gpus_per_node=options.gpus_per_node,
        cpus_per_rank=options.cpus_per_rank,
        minutes=options.minutes,
        partition=options.partition,
    )
    recipe = str(Path(options.recipe).resolve()) if Path(options.recipe).is_file() else options.recipe
    out = Path(options.out).resolve()
    labels = ["--labels", str(Path(options.labels).resolve())] if options.labels else []
    arguments = ["train", str(Path(options.data).resolve()), "--recipe", recipe, "--out", str(out), *labels]
    arguments += options.keys
    folder = out.with_name(f"{out.name}-jobs")
    job = submit(arguments, resources, folder=folder, cluster=options.cluster)
    print(f"job {job.job_id}: logs in {folder}, the run in {out}")
    return 0


def _replay(options: argparse.Namespace) -> int:
    from dinoforge.api import replay
    from dinoforge.training.replay import describe, describe_terms

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


def _selfcheck(options: argparse.Namespace) -> int:
    if options.fault:
        return _run_fault(options)

    from dinoforge.selfcheck.lines import Line, render
    from dinoforge.selfcheck.part import PARTS
    from dinoforge.selfcheck.run import selfcheck

    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", options.device):
        options.parser.error(f"--device: expected auto, cpu, cuda, cuda:N or mps, got {options.device!r}")
    if options.nproc is not None and not re.fullmatch(r"auto|[1-9]\d*", options.nproc):
        options.parser.error(f"--nproc: expected a number from 1, or auto, got {options.nproc!r}")
    if unknown := set(options.only) - set(PARTS):
        options.parser.error(f"--only: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_EXIT_SIGNALS["SIGTERM"]))  # ends what it has started, too
    stream = sys.stderr if options.json else sys.stdout

    def show(line: Line) -> None:
        print(render(line), file=stream, flush=True)

    report = selfcheck(device=options.device, nproc=options.nproc, short=options.short, only=options.only, on_line=show)
    print(report.summary(), file=stream, flush=True)
    if options.json:
        print(json.dumps(report.as_json()))
    return 0 if report.passed else _EXIT_FINDINGS


def _run_fault(options: argparse.Namespace) -> int:
    """A run of the self-check in which something is to go wrong, alone or on ranks."""
    if options.nproc is not None and not _is_rank():
        from dinoforge.training.launch import launch, number_of_ranks

        return launch(["selfcheck", "--fault", options.fault], ranks=number_of_ranks(options.nproc), restarts=0)

    from dinoforge.selfcheck.faults import Fault, train_with

    return train_with(Fault.from_json(json.loads(options.fault)))


def _bench(options: argparse.Namespace) -> int:
    keys = _keys(options.keys)
    _check(options.recipe, keys)

    from dinoforge.api import bench
    from dinoforge.training.bench import render

    report = bench(options.data, options.recipe, seconds=options.seconds, **keys)
    print(json.dumps(report.as_json()) if options.json else render(report))
    return 0


def _explain(options: argparse.Namespace) -> int:
    from dinoforge.config import load_recipe

    keys = _keys(options.keys)
    recipe, ignored = load_recipe(options.recipe, keys)

    from dinoforge.training import explain

    if recipe.init.architecture == "file":
        if recipe.init.weights is None:
            print("without init.weights=RUN|FILE, for the network and crops of dinov2", file=sys.stderr)
        else:
            from dinoforge.api import resolve

            recipe, ignored = resolve(options.recipe, keys)

    images = explain.IMAGENET_1K if options.images is None else options.images
    explanation = explain.explain(recipe, images=images, batch=options.batch, step=options.step)
    if options.plot:
        explain.plot_schedules(explanation, Path(options.plot))
    _say_ignored(ignored)
    print(json.dumps(explain.as_json(explanation)) if options.json else explain.render(explanation))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from dinoforge.config import load_recipe

    recipe, ignored = load_recipe(options.recipe, _keys(options.keys))

    from dinoforge.training import clusters

    answer = clusters.requirements(recipe, images=options.images, gpus=options.gpus, utilisation=options.utilisation)
    _say_ignored(ignored)
    print(json.dumps(clusters.as_json(answer)) if options.json else clusters.render(answer))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from dinoforge.config import load_recipe
    from dinoforge.training import compare

    keys = _keys(options.keys)
    names = (options.first, options.second)
    (first, ignored), (second, also_ignored) = (load_recipe(name, keys) for name in names)
    rows = compare.compare(first, second)
    _say_ignored(ignored | also_ignored)
    print(json.dumps(compare.as_json(rows, names)) if options.json else compare.render(rows, names))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from dinoforge.api import doctor

    findings = doctor(options.model)
    if options.json:
        print(json.dumps({"findings": [vars(finding) for finding in findings]}))
    elif not findings:
        print("Nothing is wrong, as far as the metrics show.")
    else:
        print("\n".join(f"step {f.step:,}  {f.name}\n  {f.sentence}" for f in findings))
    return _EXIT_FINDINGS if findings else 0


def _report(options: argparse.Namespace) -> int:
    from dinoforge.api import report

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


def _export(options: argparse.Namespace) -> int:
    if options.size and len(options.size) > 2:
        options.parser.error("--size takes a side, or height and width")
    keys = _keys(options.keys)
    from dinoforge.api import export
    from dinoforge.export.make import render

    size = (options.size[0], options.size[-1]) if options.size else None
    print(render(export(options.model, options.to, options.out, size=size, bake=options.bake, **keys)))
    return 0


def _embed(options: argparse.Namespace) -> int:
    keys = _keys(options.keys)
    from dinoforge.api import write_features
    from dinoforge.embedding import Progress, render

    with Progress() as progress:
        result = write_features(
            options.model, options.data, options.out, patches=options.patches, on_progress=progress, **keys
        )
    print(render(result))
    return 0


def _say_ignored(ignored: Mapping[str, str]) -> None:
    if ignored:
        print(f"ignored  {'; '.join(f'{key}: {reason}' for key, reason in ignored.items())}", file=sys.stderr)


def _eval_knn(options: argparse.Namespace) -> int:
    keys = _keys(options.keys)
    from dinoforge.api import evaluate_knn
    from dinoforge.evaluation.knn import render

    given = {"test": options.test, "labels": options.labels, "shots": options.shots}
    result, skipped = evaluate_knn(options.model, options.data, **given, **keys)
    _print_evaluation(json.dumps(result) if options.json else render(result), skipped)
    return 0


def _eval_classifier(options: argparse.Namespace) -> int:
    keys = _keys(options.keys)
    from dinoforge.api import evaluate_classifier
    from dinoforge.evaluation.classifiers import render

    given = {"test": options.test, "labels": options.labels, "shots": options.shots}
    result, skipped = evaluate_classifier(options.method, options.model, options.data, **given, **keys)
    _print_evaluation(json.dumps(result) if options.json else render(result), skipped)
    return 0


def _print_evaluation(text: str, skipped: "Sequence[Skipped]") -> None:
    for image in skipped:
        print(f"skipped  {image.name}: {image.reason}", file=sys.stderr)
    print(text)


if __name__ == "__main__":
    run()
