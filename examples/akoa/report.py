"""The report as text: every figure with its 95 % interval, pictures by relative links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from examples.akoa.metrics import Estimate

NAMES = {
    "perceiver": "Perceiver",
    "linear": "linear model on pixels",
    "linear_mirrored": "linear model, mirrored pictures added",
    "linear_on_border": "linear model trained on nothing but the border",
    "majority": "majority class",
}
_KINDS = {
    "phantom": "**The data is a generated phantom, not AKOA.** It has the names, the structure and "
    "the traps of AKOA; the numbers say that the code works, and nothing about knees.",
    "AKOA": "The data is AKOA, slices of the Osteoarthritis Initiative.",
    "mixed": "**The data mixes AKOA and phantom patients.** No number below means anything.",
}
_FIGURES = {
    "balanced_accuracy": ("balanced accuracy", True),
    "sensitivity_left": ("sensitivity, left", True),
    "sensitivity_right": ("sensitivity, right", True),
    "auc": ("area under the ROC curve", False),
    "log_loss": ("log loss, nats", False),
    "brier": ("Brier score", False),
    "ece": ("calibration error (ECE, 15 bins)", False),
}


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report, from what report.json holds."""
    sections = [
        _head(report),
        _accuracy(report),
        _others(report),
        _mirror(report),
        _border(report),
        _pictures(report),
        _suspects(report),
        _how(report),
    ]
    return "\n\n".join(sections) + "\n"


def folds_markdown(summary: Mapping[str, Any]) -> str:
    """The pooled result of several folds, from what `summarize_folds` returned."""
    data, spread = summary["data"], summary["spread"]
    lines = [
        f"# {summary['folds']} folds, pooled",
        _KINDS[data["kind"]],
        f"Each of {data['patients']:,} patients ({data['volumes']:,} volumes, {data['slices']:,} "
        "slices) was tested once, by a model that was trained and chosen on other patients. "
        f"Intervals are of 95 %, from {summary['draws']:,} bootstrap draws of patients.",
        _accuracy(summary),
        "## Fold by fold",
        _table(
            ("fold", "slices", "volumes", "patients"),
            [(str(i), *(f"{100 * fold[level]:.1f} %" for level in spread)) for i, fold in enumerate(summary["each"])]
            + [("mean", *(f"{100 * s['mean']:.1f} %" for s in spread.values()))],
        ),
    ]
    return "\n\n".join(lines) + "\n"


def show(given: Estimate, *, percent: bool = True, signed: bool = False) -> str:
    """A figure with its interval, such as `97.3 % (94.1 to 99.0)`.

    An interval without width is marked: resampling verdicts that are all alike shows no variation.
    """
    value, low, high = given["value"], given["low"], given["high"]
    if value is None or low is None or high is None:
        return "not defined"
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    sign = "+" if signed else ""
    mark = " †" if low == high else ""
    ends = f"{scale * low:{sign}.{digits}f} to {scale * high:{sign}.{digits}f}"
    return f"{scale * value:{sign}.{digits}f}{unit} ({ends}){mark}"


def _head(report: Mapping[str, Any]) -> str:
    data, looked = report["data"], report["test_looked_at"]
    rows = [
        (part, *(f"{n[key]:,}" for key in ("patients", "knees", "volumes", "slices")),
         f"{100 * n['right_share']:.1f} %")
        for part, n in data["splits"].items()
    ]  # fmt: skip
    times = (
        "The test set was looked at **once** by this run, for this report; other runs are not counted."
        if looked == 1
        else f"The test set was looked at **{looked} times** for runs in this folder. Choices made "
        "after the first look have seen it, and the intervals do not know that."
    )
    height, width = data["picture"]
    return "\n\n".join(
        [
            "# Left or right knee: test report",
            _KINDS[data["kind"]],
            _table(("split", "patients", "knees", "volumes", "slices", "right"), rows),
            "No patient stands in two parts of the split. **Patients are the sample:** slices of "
            "one patient are alike, so intervals are of 95 %, from "
            f"{report['draws']:,} bootstrap draws of the test patients. {times}",
            f"The Perceiver has {report['parameters']:,} parameters and reads {height} x {width} gray pixels.",
        ]
    )


def _accuracy(report: Mapping[str, Any]) -> str:
    rows = [
        (
            NAMES[name],
            show(figures["slice"]["accuracy"]),
            show(figures["volume"]["accuracy"]),
            show(figures["patient"]["accuracy"]),
            show(figures["patient"]["accuracy_wilson"]),
        )
        for name, figures in report["models"].items()
    ]
    gaps = [
        (f"Perceiver - {NAMES[name]}", *(show(g, signed=True) for g in gap.values()))
        for name, gap in report["difference"].items()
    ]
    return "\n\n".join(
        [
            "## Accuracy on the test patients",
            _table(("model", "slices", "volumes", "patients", "patients, Wilson"), rows),
            "The verdict on a volume is the mean logit of its slices. A patient counts as right "
            "when all of their volumes are, of both knees and all visits. † Where all verdicts are "
            "alike, every bootstrap draw gives the same number and the interval has no width; that "
            "is no certainty, and Wilson's interval is the one to read.",
            _table(("difference, paired by patient", "slices", "volumes", "patients"), gaps),
        ]
    )


def _others(report: Mapping[str, Any]) -> str:
    ours, linear = report["models"]["perceiver"], report["models"]["linear"]
    rows = [
        (
            label,
            show(ours["slice"][key], percent=percent),
            show(ours["volume"][key], percent=percent),
            show(linear["slice"][key], percent=percent),
        )
        for key, (label, percent) in _FIGURES.items()
    ]
    known = report["validation"]
    return "\n\n".join(
        [
            "## Other figures",
            _table(("", "Perceiver, slices", "Perceiver, volumes", "linear, slices"), rows),
            "On the validation patients, which chose the weights and the linear model's penalty, "
            f"the Perceiver has {show(known['slice']['accuracy'])} of slices and "
            f"{show(known['volume']['accuracy'])} of volumes.",
        ]
    )


def _mirror(report: Mapping[str, Any]) -> str:
    mirror = report["mirror"]
    return "\n\n".join(
        [
            "## Mirror test",
            "The mirror image of a left knee is a right knee, so p(right | x) + p(right | mirror "
            "of x) should be 1. This needs no labels. The distance from 1 is "
            f"{show(mirror['mean'], percent=False)} in the mean and {mirror['max']:.3f} at most (a "
            f"maximum has no bootstrap interval). {show(mirror['same_verdict'])} of slices get the "
            "same verdict as their mirror image, which must be wrong for one of the two.",
        ]
    )


def _border(report: Mapping[str, Any]) -> str:
    rows = [
        (
            NAMES[name],
            *(show(figures[see]) for see in ("whole", "masked", "only") if see in figures),
        )
        for name, figures in report["border"].items()
    ]
    padded = [row if len(row) == 4 else (row[0], "", "", row[1]) for row in rows]
    return "\n\n".join(
        [
            "## Does the border give it away?",
            _table(("slices", "whole picture", "border black", "all but the border black"), padded),
            "The border is the outer 10 % on each side. The last line was trained, too, on nothing "
            "but the border: it shows what is there to be found, the lines above what is used.",
        ]
    )


def _pictures(report: Mapping[str, Any]) -> str:
    texts = {
        "curves": (
            "Training",
            "Loss and accuracy over epochs. Training pictures are augmented, validation pictures are not, "
            "so these are easier.",
        ),
        "confusion": ("Confusion", "Counts, and the share of each true side."),
        "calibration": (
            "Calibration",
            "Above: of the slices with about this p(right), how many are right knees. Below: how "
            "many slices those are. A bin of few patients says little.",
        ),
        "abstention": (
            "Abstention",
            "Accuracy where only the more confident verdicts count. Numbers beside points are "
            "thresholds on the probability of the verdict.",
        ),
        "slices": (
            "Errors by slice",
            "The share of wrong verdicts at each slice index. The band is a 95 % interval that "
            "resamples patients; it has no width where no patient, or only one, errs.",
        ),
        "attention": (
            "Attention",
            "Where the last read looks: the mean over latents and heads, as a multiple of an even "
            "spread. Right and left knees with a sure and right verdict, then the most wrong ones.",
        ),
        "errors": (
            "Most confident disagreements",
            "Slices whose verdict contradicts the label: one of each volume, the most confident first.",
        ),
    }
    parts = []
    for name, (title, text) in texts.items():
        if name in report["plots"]:
            parts += [f"## {title}", text, f"![{title}]({report['plots'][name]})"]
        if name == "abstention":
            parts.append(_abstention(report["abstention"]))
    return "\n\n".join(parts)


def _abstention(levels: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = [
        (
            f"{by_slice['threshold']:g}",
            *(show(line[key]) for line in (by_slice, by_volume) for key in ("coverage", "accuracy")),
        )
        for by_slice, by_volume in zip(levels["slice"], levels["volume"], strict=True)
    ]
    header = ("threshold", "slices judged", "accuracy", "volumes judged", "accuracy")
    return _table(header, rows)


def _suspects(report: Mapping[str, Any]) -> str:
    volumes, slices = report["suspects"]["volumes"], report["suspects"]["slices"]
    parts = [
        "## Suspected label errors",
        "A confident verdict against the label is the model's error or the label's; look at the "
        "picture. Where a whole volume disagrees, the name of the file is the first suspect.",
    ]
    if volumes:
        rows = [
            (v["patient"], str(v["visit"]), v["side"], f"{v['probability_right']:.3f}",
             f"{v['disagreeing']} of {v['slices']}", f"`{v['image']}`")
            for v in volumes
        ]  # fmt: skip
        header = ("patient", "visit", "label", "p(right)", "slices that disagree", "first file")
        parts.append(_table(header, rows))
    else:
        parts.append("No volume's verdict contradicts its label.")
    if slices:
        parts.append("Single slices that disagree, of volumes whose verdict does not:")
        alone = [(f"`{s['image']}`", s["side"], f"{s['probability_right']:.3f}") for s in slices]
        parts.append(_table(("file", "label", "p(right)"), alone))
    return "\n\n".join(parts)


def _how(report: Mapping[str, Any]) -> str:
    chosen = ", ".join(
        f"{NAMES[name]}: inverse penalty {fit['inverse_penalty']:g}"
        + ("" if fit["converged"] else " (the fit did not converge)")
        for name, fit in report["linear"].items()
    )
    return "\n\n".join(
        [
            "## How it was made",
            f"```console\n$ {report['command']}\n```",
            "All numbers are in [report.json](report.json), each prediction in "
            f"[predictions.csv](predictions.csv). Bootstrap seed {report['seed']}. The linear "
            "models are logistic regressions on standardized pixels, fit on the same training "
            f"patients; their penalty was chosen by the loss on validation ({chosen}).",
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
