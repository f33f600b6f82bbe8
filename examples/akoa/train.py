"""Training of the knee model, followed by one evaluation of the test set.

    python -m examples.akoa.train --data data/AKOA_Analysis --labels labels.csv --out runs/akoa
    python -m examples.akoa.train --data data/AKOA_Analysis --labels folds.csv --out runs/folds --folds 5
    torchrun --nproc-per-node 2 -m examples.akoa.train --data ... --labels ... --out ...

The folder of a run contains run.json (its options), checkpoints/ (best by validation loss, and last), tensorboard/,
history.csv, weights/ (the model, for `perceiver_core.load`), and report.json with report.md and figures. One command at
a time works in it.

The same command with --resume continues an interrupted run, even one that was killed, from the last finished epoch. The
results are the same as without the interruption. The test set is evaluated only once: if only the report is unfinished,
it is made from the stored predictions.

The exit code is 0 if all is done, 2 for invalid arguments, data or files, and 130 or 143 after an interruption by
Ctrl-C or SIGTERM. With torchrun, it is that of torchrun.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_only

import perceiver_core as pc
from examples.akoa import evaluate
from examples.akoa.dataset.datamodule import KneeDataModule
from examples.akoa.dataset.labels import SPLITS
from examples.akoa.dataset.size_option import SizeAction
from examples.akoa.evaluation import results
from examples.akoa.evaluation.cross_validation import summarize_folds
from examples.akoa.evaluation.figures import read_history
from examples.akoa.evaluation.metrics import Report
from examples.akoa.evaluation.report import folds_markdown
from examples.akoa.model import knee_model
from examples.akoa.training.laterality import AtomicCheckpointIO, Laterality
from examples.akoa.training.run_record import (
    RECORD,
    WEIGHTS,
    check_weights,
    read_record,
    rows_digest,
    weights_digest,
    write_record,
)
from examples.akoa.training.trainer import CHECKPOINTS, HISTORY, TrainingOptions, make_trainer, silence_warnings
from examples.common import parse
from examples.common.command import ArgumentParser, run_command
from examples.common.output_folder import output_folder
from examples.common.terminal import printable
from perceiver_core.atomic_files import write_atomically

# Options that may differ when a run is resumed, since the result does not depend on them.
_FREE_OPTIONS = ("data", "labels", "out", "resume", "accelerator", "folds")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: execute(argv), "the same command with --resume continues")


def execute(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate as configured on the command line.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: The data, the labels or the folder of the run are invalid.
    """
    options = read_options(argv)
    if options.folds is None:
        run(options, _make_knees(options), options.out)
        return
    with output_folder(options.out):
        run_folds(options)


def read_options(argv: Sequence[str] | None) -> TrainingOptions:
    """Parse the command line. Exit with code 2 if an argument is invalid."""
    parser = ArgumentParser(
        prog="python -m examples.akoa.train", description="Train the knee model, then evaluate the test set once."
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the PNG files")
    add("--labels", type=Path, required=True, help="labels.csv of generate_labels")
    add("--out", type=Path, default=Path("runs/akoa"), help="folder of the run (%(default)s)")
    add("--epochs", type=parse.count, default=16, help="number of epochs (%(default)s)")
    add("--batch", type=parse.count, default=64, help="images per step and device (%(default)s)")
    add("--lr", type=parse.positive, default=2e-3, help="highest learning rate (%(default)s)")
    add("--weight-decay", type=parse.not_negative, default=0.05, help="weight decay of matrices (%(default)s)")
    add("--label-smoothing", type=parse.share, default=0.0, help="label smoothing (%(default)s)")
    add("--seed", type=parse.seed, default=0, help="seed of weights, order, augmentation, bootstrap (%(default)s)")
    size_help = "one number, or height width (64)"
    add("--size", type=int, nargs="+", action=SizeAction, default=(64, 64), metavar="PIXELS", help=size_help)
    add("--patience", type=parse.count, default=8, help="stop after so many epochs without improvement (%(default)s)")
    add("--limit-batches", type=parse.count, help="maximal number of batches of a training epoch, for trials")
    add("--no-augment", dest="augment", action="store_false", help="do not augment images")
    add("--resume", action="store_true", help="continue the run in --out")
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # by torchrun
    add("--devices", type=parse.count, default=started, help="number of processes or GPUs (%(default)s)")
    add("--accelerator", default="auto", help="auto, cpu, gpu, mps ... (%(default)s)")
    add("--precision", default="32-true", help="32-true, bf16-mixed ... (%(default)s)")
    folds = parser.add_mutually_exclusive_group()
    folds.add_argument("--fold", type=int, metavar="I", help="train one run of a cross-validation")
    folds.add_argument("--folds", type=int, metavar="K", help="train all K runs and summarize them")
    args = parser.parse_args(argv)
    if args.devices > (most := max(8, started, os.cpu_count() or 1, torch.cuda.device_count())):
        parser.error(f"--devices must be at most {most} on this machine; got {args.devices}")
    if args.folds is not None and int(os.environ.get("WORLD_SIZE", args.devices)) > 1:
        parser.error("--folds runs on one device; run the folds one by one with --fold")
    return TrainingOptions(**vars(args))


def run(options: TrainingOptions, knees: KneeDataModule, out: Path) -> Report | None:
    """Train into a folder, and evaluate there.

    Returns:
        The report; None on all ranks but the first.

    Raises:
        ValueError: The folder contains another run.
    """
    if not _first_rank():
        _train(options, knees, out)
        return None
    with output_folder(out, CHECKPOINTS, WEIGHTS):
        _record_options(out, options, knees)
        if options.resume and results.is_complete(out):
            _check_results(out)
            print(f"{printable(out)}: complete already; its test set is not looked at again, see {results.TEXT}")
            return results.read_report(out)
        return finish(_train(options, knees, out), knees, out, options)


def finish(module: Laterality, knees: KneeDataModule, out: Path, options: TrainingOptions) -> Report:
    """Save the best weights as a model, and evaluate the test set unless report.json already counts a look."""
    best = AtomicCheckpointIO().load_checkpoint(out / CHECKPOINTS / "best.ckpt", map_location="cpu")
    module.cpu().load_state_dict(best["state_dict"])
    model = module.model.eval()
    pc.save(model, out / WEIGHTS)
    write_record(out, {**read_record(out), "weights_sha256": weights_digest(model)})
    history = out / HISTORY
    if results.count_looks(out):
        print(f"{printable(out)}: the test set was looked at before and is not again; its report is drawn")
        return results.write_presentation(out, model, knees.split("test"), read_history(history))
    splits = {name: knees.split(name) for name in SPLITS}
    paths = ["--data", str(options.data), "--labels", str(options.labels), "--out", str(options.out)]
    command = printable(f"python -m examples.akoa.train {shlex.join(paths)}")
    return evaluate.evaluate_run(model, splits, out, history=history, seed=options.seed, command=command)


def _train(options: TrainingOptions, knees: KneeDataModule, out: Path) -> Laterality:
    """Train, from the last checkpoint if there is one."""
    seed_everything(options.seed, verbose=False)
    module = Laterality(
        knee_model(options.size),
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        label_smoothing=options.label_smoothing,
    )
    last = out / CHECKPOINTS / "last.ckpt"
    with warnings.catch_warnings():
        silence_warnings()
        trainer = make_trainer(options, out)
        trainer.fit(module, knees, ckpt_path=str(last) if options.resume and last.exists() else None)
    return module


def _check_results(out: Path) -> None:
    """Check that the files of a complete run belong together, unless an older version wrote them."""
    if "weights_sha256" in results.read_report(out):
        model = pc.load(out / WEIGHTS)
        check_weights(out, model)
        results.check_look(out, model)


def run_folds(options: TrainingOptions) -> Report:
    """Train a model for each fold in a folder of its own, then write summary.json and summary.md on all folds.

    Raises:
        ValueError: The number of folds in the labels is not `options.folds`.
    """
    knees = _make_knees(options, fold=0)
    folds = len({row.split for row in knees.all_rows})
    if folds != options.folds:
        raise ValueError(
            f"{options.labels} contains {folds} folds, not {options.folds}; write it with --folds {options.folds}"
        )
    folders = [options.out / f"fold{i}" for i in range(folds)]
    reports = []
    for i, folder in enumerate(folders):
        print(f"fold {i} of {folds}", flush=True)
        reports.append(run(options, knees.with_fold(i), folder) or {})
    summary = summarize_folds(reports, [folder / results.PREDICTIONS for folder in folders], options.seed)
    text = json.dumps(summary, indent=2) + "\n"
    write_atomically({options.out / "summary.json": text, options.out / "summary.md": folds_markdown(summary)})
    print(f"the summary is {printable(options.out / 'summary.md')}")
    return summary


def _make_knees(options: TrainingOptions, fold: int | None = None) -> KneeDataModule:
    """Data module of the run."""
    return KneeDataModule(
        labels=options.labels,
        data=options.data,
        size=options.size,
        batch=options.batch,
        fold=options.fold if fold is None else fold,
        augment=options.augment,
        seed=options.seed,
        progress=_first_rank(),
    )


def _record_options(out: Path, options: TrainingOptions, knees: KneeDataModule) -> None:
    """Write run.json, or check that the existing one has the same options."""
    used = {name: value for name, value in asdict(options).items() if name not in _FREE_OPTIONS}
    expected = json.loads(json.dumps({**used, "rows": rows_digest(knees.rows)}))
    record = out / RECORD
    if not record.exists():
        write_record(out, expected)
        return
    if not options.resume:
        raise ValueError(f"{out} contains a run already; continue it (--resume), or choose another folder (--out)")
    recorded = read_record(out)
    other = sorted(name for name in expected if recorded.get(name) != expected[name])
    if other:
        shown = ", ".join(f"{name} is {recorded.get(name)} in its run.json but {expected[name]} here" for name in other)
        raise ValueError(
            f"{out} contains another run: {shown}; resume it with its own options, or choose another folder"
        )


def _first_rank() -> bool:
    return int(getattr(rank_zero_only, "rank", 0)) == 0


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    sys.exit(main())
