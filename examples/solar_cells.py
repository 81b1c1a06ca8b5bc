"""The demo: pretrain on 2,624 photographs of solar cells, without labels, and measure what was learned.

    python examples/solar_cells.py [key=value …]

The images are those of the package elpv-dataset: electroluminescence photographs of solar cells, some of them cracked
or inactive. Training sees images only. Labels (defect: an expert's probability of 0.5 or more) serve afterwards, to
ask whether cells of one kind have become neighbours.
"""

import csv
import importlib.util
import sys
from pathlib import Path

import dinoforge
from dinoforge.commands.evaluate import evaluate_knn
from dinoforge.commands.report import report
from dinoforge.errors import DinoforgeError
from dinoforge.evaluation.knn import knn_table
from dinoforge.recipe.load import parse_override

RUN = Path("runs/demo")


def find_data() -> Path:
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        sys.exit("the demo needs its images: pip install 'dinoforge[demo]'")
    return Path(spec.origin).parent / "data"


def write_labels(table: Path, to: Path) -> None:
    """From lines of ``images/cell0001.png  1.0  mono`` to the two columns that ``--labels`` takes."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "label"])
        for name, probability, _ in (line.split() for line in table.read_text(encoding="utf-8").splitlines()):
            writer.writerow([Path(name).name, "defect" if float(probability) >= 0.5 else "fine"])


def main() -> int:
    data = find_data()
    labels = RUN.with_name("demo-labels.csv")
    write_labels(data / "labels.csv", labels)
    result = dinoforge.train(data / "images", "demo", RUN, **dict(parse_override(text) for text in sys.argv[1:]))
    if result.stopped_by in ("SIGINT", "SIGTERM"):
        return 130 if result.stopped_by == "SIGINT" else 143

    print("\nMeasuring: are cells of one kind neighbours?\n")
    knn, _ = evaluate_knn(RUN, data / "images", labels=labels)
    print(knn_table(knn))
    page = report(RUN, labels=labels).page  # once more: with labels, and with this measurement
    print(
        f"""
The network saw the test images in training, but never a label.

In {RUN}: teacher.safetensors is the backbone, summary.json has these numbers, metrics.jsonl every step.

Next, your own images, from a folder of any depth:

    .venv/bin/dinoforge train path/to/images
    .venv/bin/dinoforge eval knn runs/images-small --data path/to/images    # if sub-folders are classes

What it saw, learned and did, to open in a browser: {page}"""
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DinoforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
