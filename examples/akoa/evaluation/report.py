"""Markdown text of a report: every metric with its 95 % interval, images by relative links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from examples.akoa.evaluation.metrics import Estimate, Report

NAMES = {
    "perceiver": "Perceiver",
    "linear": "linear model on pixels",
    "linear_mirrored": "linear model, mirrored images added",
    "linear_on_border": "linear model trained on the border alone",
    "majority": "majority class",
}
_DATA_NOTES = {
    "phantom": "**The data is a generated phantom, not AKOA.** It has the names, the structure and "
    "the pitfalls of AKOA; the numbers show that the code works, and nothing about knees.",
    "AKOA": "The data is AKOA, slices of the Osteoarthritis Initiative.",
    "mixed": "**The data mixes AKOA and phantom patients.** The numbers below are meaningless.",
}
_METRICS = {
    "balanced_accuracy": ("balanced accuracy", True),
    "sensitivity_left": ("sensitivity, left", True),
    "sensitivity_right": ("sensitivity, right", True),
    "auc": ("area under the ROC curve", False),
    "log_loss": ("log loss, nats", False),
    "brier": ("Brier score", False),
    "ece": ("calibration error (ECE, 15 bins)", False),
}


def markdown(report: Report) -> str:
    """Format a whole report from the content of report.json."""
    sections = (_overview, _accuracy, _other_metrics, _mirror, _border, _plots, _suspects, _provenance)
    return "\n\n".join(section(report) for section in sections) + "\n"


def folds_markdown(summary: Report) -> str:
    """Format the pooled result of a cross-validation from the return value of `summarize_folds`."""
    data, spread = summary["data"], summary["spread"]
    lines = [
        f"# {summary['folds']} folds, pooled",
        _DATA_NOTES[data["kind"]],
        f"Each of {data['patients']:,} patients ({data['volumes']:,} volumes, {data['slices']:,} "
        "slices) was tested once, by a model that was trained and selected on other patients. "
        f"Intervals are of 95 %, from {summary['draws']:,} bootstrap draws of patients.",
        _accuracy(summary),
        "## Results by fold",
        _table(
            ("fold", "slices", "volumes", "patients"),
            [(str(i), *(f"{100 * fold[level]:.1f} %" for level in spread)) for i, fold in enumerate(summary["each"])]
            + [("mean", *(f"{100 * s['mean']:.1f} %" for s in spread.values()))],
        ),
    ]
    return "\n\n".join(lines) + "\n"


def format_estimate(estimate: Estimate, *, percent: bool = True, signed: bool = False) -> str:
    """Format a value with its interval, such as `97.3 % (94.1 to 99.0)`.

    A dagger marks intervals without width, which occur if all predictions are correct or all are wrong.
    """
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None or low is None or high is None:
        return "not defined"
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    sign = "+" if signed else ""
    mark = " †" if low == high else ""
    ends = f"{scale * low:{sign}.{digits}f} to {scale * high:{sign}.{digits}f}"
    return f"{scale * value:{sign}.{digits}f}{unit} ({ends}){mark}"


def _overview(report: Report) -> str:
    """Section on the data, its split and the number of evaluations."""
    data, looks = report["data"], report["test_looked_at"]
    rows = [
        (part, *(f"{n[key]:,}" for key in ("patients", "knees", "volumes", "slices")),
         f"{100 * n['right_share']:.1f} %")
        for part, n in data["splits"].items()
    ]  # fmt: skip
    times = (
        "The test set was looked at **once** by this run, for this report; other runs are not counted."
        if looks == 1
        else f"The test set was looked at **{looks} times** for runs in this folder. Choices made "
        "after the first look may depend on it, which the intervals do not take into account."
    )
    height, width = data["picture"]
    return "\n\n".join(
        [
            "# Left or right knee: test report",
            _DATA_NOTES[data["kind"]],
            _table(("split", "patients", "knees", "volumes", "slices", "right"), rows),
            "No patient is in two parts of the split. **Patients are the sample:** slices of "
            "one patient are similar, so intervals are of 95 %, from "
            f"{report['draws']:,} bootstrap draws of the test patients. {times}",
            f"The Perceiver has {report['parameters']:,} parameters and reads {height} x {width} gray pixels.",
        ]
    )


def _accuracy(report: Report) -> str:
    """Section on the accuracies of all models, and their differences."""
    rows = [
        (
            NAMES[name],
            format_estimate(result["slice"]["accuracy"]),
            format_estimate(result["volume"]["accuracy"]),
            format_estimate(result["patient"]["accuracy"]),
            format_estimate(result["patient"]["accuracy_wilson"]),
        )
        for name, result in report["models"].items()
    ]
    gaps = [
        (f"Perceiver - {NAMES[name]}", *(format_estimate(g, signed=True) for g in gap.values()))
        for name, gap in report["difference"].items()
    ]
    return "\n\n".join(
        [
            "## Accuracy on the test patients",
            _table(("model", "slices", "volumes", "patients", "patients, Wilson"), rows),
            "The verdict on a volume is the sign of the mean logit of its slices. A patient counts as correct "
            "if all of their volumes are, of both knees and all visits. † If all verdicts are correct, or all "
            "wrong, every bootstrap draw gives the same number and the interval has no width; this does "
            "not mean certainty, and Wilson's interval applies instead.",
            _table(("difference, paired by patient", "slices", "volumes", "patients"), gaps),
        ]
    )


def _other_metrics(report: Report) -> str:
    """Section on further metrics of the Perceiver and of the linear model."""
    ours, linear = report["models"]["perceiver"], report["models"]["linear"]
    rows = [
        (
            label,
            format_estimate(ours["slice"][key], percent=percent),
            format_estimate(ours["volume"][key], percent=percent),
            format_estimate(linear["slice"][key], percent=percent),
        )
        for key, (label, percent) in _METRICS.items()
    ]
    validation = report["validation"]
    return "\n\n".join(
        [
            "## Other metrics",
            _table(("", "Perceiver, slices", "Perceiver, volumes", "linear, slices"), rows),
            "On the validation patients, which selected the weights and the penalty of the linear model, "
            f"the Perceiver is correct on {format_estimate(validation['slice']['accuracy'])} of slices and "
            f"{format_estimate(validation['volume']['accuracy'])} of volumes.",
        ]
    )


def _mirror(report: Report) -> str:
    """Section on the mirror test."""
    mirror = report["mirror"]
    return "\n\n".join(
        [
            "## Mirror test",
            "The mirror image of a left knee is a right knee, so p(right | x) + p(right | mirror "
            "of x) should be 1. This needs no labels. The distance from 1 is "
            f"{format_estimate(mirror['mean'], percent=False)} in the mean and {mirror['max']:.3f} at most (a "
            f"maximum has no bootstrap interval). {format_estimate(mirror['same_verdict'])} of slices get the "
            "same verdict as their mirror image, so one of the two is wrong.",
        ]
    )


def _border(report: Report) -> str:
    """Section on the accuracy with and without the border of the images."""
    rows = [
        (
            NAMES[name],
            *(format_estimate(result[part]) for part in ("whole", "masked", "only") if part in result),
        )
        for name, result in report["border"].items()
    ]
    padded = [row if len(row) == 4 else (row[0], "", "", row[1]) for row in rows]
    return "\n\n".join(
        [
            "## Border test",
            _table(("slices", "whole image", "border black", "all but the border black"), padded),
            "The border is the outer 10 % on each side. The model of the last line was also trained on "
            "the border alone: it shows how much information the border contains, the lines above how much is used.",
        ]
    )


def _plots(report: Report) -> str:
    """Sections of the plots."""
    texts = {
        "curves": (
            "Training",
            "Loss and accuracy over epochs. Training images are augmented; validation images are not, "
            "and are therefore easier.",
        ),
        "confusion": ("Confusion", "Counts, and the share of each true side."),
        "calibration": (
            "Calibration",
            "Above: the share of right knees among the slices with about this p(right). Below: the "
            "number of these slices. A bin of few patients is unreliable.",
        ),
        "abstention": (
            "Abstention",
            "Accuracy of the more confident verdicts alone. Numbers beside points are "
            "thresholds on the probability of the verdict.",
        ),
        "slices": (
            "Errors by slice",
            "The share of wrong verdicts at each slice index. The band is a 95 % interval that "
            "resamples patients; it has no width where the verdicts on no patient, or only one, are wrong.",
        ),
        "attention": (
            "Attention",
            "Attention of the last read: the mean over latents and heads, as a multiple of uniform "
            "attention. Right and left knees with a confident correct verdict, then the most confident errors.",
        ),
        "errors": (
            "Most confident errors",
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


def _abstention(levels: Mapping[str, Sequence[Report]]) -> str:
    """Table of coverage and accuracy at each threshold."""
    rows = [
        (
            f"{by_slice['threshold']:g}",
            *(format_estimate(line[key]) for line in (by_slice, by_volume) for key in ("coverage", "accuracy")),
        )
        for by_slice, by_volume in zip(levels["slice"], levels["volume"], strict=True)
    ]
    header = ("threshold", "slices covered", "accuracy", "volumes covered", "accuracy")
    return _table(header, rows)


def _suspects(report: Report) -> str:
    """Section on volumes and slices whose verdict contradicts the label."""
    volumes, slices = report["suspects"]["volumes"], report["suspects"]["slices"]
    parts = [
        "## Suspected label errors",
        "If a confident verdict contradicts the label, either the model or the label is wrong; look at the "
        "image. If a whole volume disagrees, check the file name first.",
    ]
    if volumes:
        rows = [
            (v["patient"], str(v["visit"]), v["side"], f"{v['probability_right']:.3f}",
             f"{v['disagreeing']} of {v['slices']}", f"`{v['image']}`")
            for v in volumes
        ]  # fmt: skip
        parts.append(_table(("patient", "visit", "label", "p(right)", "slices that disagree", "first file"), rows))
    else:
        parts.append("No volume's verdict contradicts its label.")
    if slices:
        parts.append("Single slices that disagree with their label, in volumes whose verdict agrees:")
        single = [(f"`{s['image']}`", s["side"], f"{s['probability_right']:.3f}") for s in slices]
        parts.append(_table(("file", "label", "p(right)"), single))
    return "\n\n".join(parts)


def _provenance(report: Report) -> str:
    """Section on the command and the settings of the report."""
    penalties = ", ".join(
        f"{NAMES[name]}: inverse penalty {fit['inverse_penalty']:g}"
        + ("" if fit["converged"] else " (the fit did not converge)")
        for name, fit in report["linear"].items()
    )
    return "\n\n".join(
        [
            "## Reproduction",
            f"```console\n$ {report['command']}\n```",
            "All numbers are in [report.json](report.json), each prediction in "
            f"[predictions.csv](predictions.csv). Bootstrap seed {report['seed']}. The linear "
            "models are logistic regressions on standardized pixels, fit on the same training "
            f"patients; their penalty was selected by the validation loss ({penalties}).",
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
