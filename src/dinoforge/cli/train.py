"""Parsers of the commands that train: train and submit."""

import argparse
import os
from pathlib import Path

from dinoforge.cli.keys import Commands, add_keys, check_recipe, is_rank, parse_keys, whole_number_from
from dinoforge.system.signals import EXIT_SIGNALS


def add_train(commands: Commands) -> None:
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
        type=whole_number_from(0),
        default=3,
        metavar="N",
        help="with --nproc: new starts after a rank has died; default: 3",
    )
    add_keys(train, "recipe keys, such as train.steps=2000")
    train.set_defaults(run=_train, parser=train)


def _train(options: argparse.Namespace) -> int:
    keys = parse_keys(options.keys)
    check_recipe(options.recipe, keys)  # a mistyped key is answered before torch is imported

    if options.nproc is not None and not is_rank():
        from dinoforge.cli.ranks import launch
        from dinoforge.system.device import number_of_ranks

        given = ["--recipe", options.recipe] + (["--out", options.out] if options.out else [])
        given += ["--labels", options.labels] if options.labels else []
        given += ["--dry-run"] if options.dry_run else []
        return launch(
            ["train", options.data, *given, *options.keys],
            ranks=number_of_ranks(options.nproc),
            restarts=options.restarts,
        )

    from dinoforge.commands.train import train_as_program

    result = train_as_program(
        options.data, options.recipe, options.out, labels=options.labels, dry_run=options.dry_run, **keys
    )
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return 0  # or else the ranks, which stopped because they were asked to, would be started again
    return EXIT_SIGNALS.get(result.stopped_by or "", 0)


def add_submit(commands: Commands) -> None:
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
    submit.add_argument("--nodes", type=whole_number_from(1), default=1, metavar="N", help="machines; default: 1")
    submit.add_argument(
        "--gpus-per-node", type=whole_number_from(0), default=0, metavar="N", help="and as many ranks; default: 0"
    )
    submit.add_argument(
        "--ranks-per-node", type=whole_number_from(1), metavar="N", help="default: one for each GPU, or 1"
    )
    submit.add_argument("--cpus-per-rank", type=whole_number_from(1), default=8, metavar="N", help="default: 8")
    submit.add_argument(
        "--minutes", type=whole_number_from(1), default=24 * 60, metavar="N", help="of a job; default: a day"
    )
    submit.add_argument("--partition", metavar="NAME", help="of Slurm")
    add_keys(submit, "recipe keys, such as train.batch_size=1024")
    submit.set_defaults(run=_submit, parser=submit)


def _submit(options: argparse.Namespace) -> int:
    check_recipe(options.recipe, parse_keys(options.keys))

    from dinoforge.cli.slurm import Resources, submit

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
