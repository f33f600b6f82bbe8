"""Recognition of spoken words in recordings of unequal length.

    python -m examples.spoken_digits --out examples/results/spoken_digits

The recordings are generated speech of ten words (see `examples/common/speech.py`), or files
`{digit}_{speaker}_{index}.wav` in a folder or zip file, such as the Free Spoken Digit Dataset:

    python -m examples.spoken_digits --data recordings.zip --seeds 5 --out runs/spoken_digits

One Perceiver reads log-mel spectrograms, another reads raw samples through learned filters. A token is a frame every
10 ms. Positions are in fixed units, and a mask marks the frames of each recording, so a recording has the same output
by itself as in a padded batch. The baselines are a logistic regression and a support
vector machine on log-mel spectrograms of equal length.

Recordings with index 0 to 4 are the test set, as the data set proposes. Then each speaker is left out once.

Reference: Jaegle et al. 2021 (Perceiver), section 4.2 (raw audio and mel spectrograms of AudioSet).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples.common.command import run_command
from examples.common.run import Result, Run
from examples.common.scores import compare, interval, markdown_table
from examples.common.speech import RATE, Speech, Split, generate, read, splits
from examples.common.speech_scores import baselines, draw, resumed

HOP = 80  # samples between frames, 10 ms
FRAME = 256  # samples of a frame
BATCH = 32
STEPS = {"log-mel": 1000, "raw samples": 2000}
SPEED, TILT, NOISE = math.log(1.25), 0.5, (-4.0, -1.8)  # of the augmentation; noise in log10 of the peak
OPTIONS = {
    "--data": {"type": Path, "help": "folder or zip file of recordings {digit}_{speaker}_{index}.wav"},
    "--seeds": {"type": int, "default": 1, "help": "number of trainings per split, with consecutive seeds"},
    "--resume": {"action": "store_true", "help": "keep the trainings that an interrupted run has stored in --out"},
}


class LogMelFrames(nn.Module):
    """Log-mel spectrograms `b frames 40`, with mean 0 and deviation 1 over the frames of each recording."""

    dim = 40

    def __init__(self) -> None:
        super().__init__()
        self.log_mel = pc.adapters.LogMel(
            RATE, positions=None, num_mels=self.dim, n_fft=FRAME, win_length=200, hop_length=HOP, f_min=50, floor=1e-9
        )

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """Return the spectrograms of recordings `b samples` of these lengths."""
        tokens = self.log_mel(scale(waveform), lengths=lengths)
        return normalize(tokens.content, tokens.mask)


class LearnedFilters(nn.Module):
    """Logarithm of the energies of learned filters, `b frames 64`, on frames of raw samples."""

    dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Linear(FRAME, 2 * self.dim, bias=False)

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """Return the energies of recordings `b samples` of these lengths."""
        padded = F.pad(scale(waveform), (FRAME // 2 + 1, FRAME // 2))
        emphasized = padded[:, 1:] - 0.95 * padded[:, :-1]
        pairs = self.filters(emphasized.unfold(1, FRAME, HOP)).unflatten(-1, (2, self.dim))
        return normalize((pairs.square().sum(-2) + 1e-4).log(), frame_mask(lengths, pairs.shape[1]))


def scale(waveform: Tensor) -> Tensor:
    """Scale recordings to a peak of 1."""
    return waveform / waveform.abs().amax(1, keepdim=True).clamp_min(1e-4)


def frame_mask(lengths: Tensor, num_frames: int) -> Tensor:
    """Mask `b frames` of the frames of each recording."""
    return torch.arange(num_frames, device=lengths.device) < (lengths // HOP + 1)[:, None]


def normalize(frames: Tensor, mask: Tensor) -> Tensor:
    """Subtract the mean of each recording and divide by its deviation; frames after its end are set to zero."""
    valid = mask[..., None].to(frames)
    count = valid.sum((1, 2), keepdim=True) * frames.shape[-1]
    centered = (frames - (frames * valid).sum((1, 2), keepdim=True) / count) * valid
    return centered / ((centered.square().sum((1, 2), keepdim=True) / count).sqrt() + 1e-5)


class SpeechAdapter(nn.Module):
    """Adapter for recordings of unequal length: frames, local context by a convolution, positions in fixed units.

    Args:
        front: Module `(waveform, lengths) -> frames`, with frames after the end of a recording set to zero, such that
            the convolution finds the same after the end of a recording in every batch.
    """

    def __init__(self, front: nn.Module, num_channels: int = 64) -> None:
        super().__init__()
        self.front = front
        self.convolution = nn.Conv1d(front.dim, num_channels, kernel_size=5, padding=2)
        fourier = pc.positions.Fourier(num_axes=1, num_bands=16, max_resolution=64)
        self.positions = pc.positions.FixedGrid(fourier, grid=(100,))  # in units of frames, whatever the length
        self.dim = num_channels + self.positions.dim

    def forward(self, waveform: Tensor, *, lengths: Tensor | None = None) -> pc.Tokens:
        """Convert recordings `b samples` to tokens.

        Args:
            waveform: Samples, zero-padded to the longest recording of the batch.
            lengths: Number of samples of each recording; None if there is no padding.
        """
        if lengths is None:
            lengths = torch.full(waveform.shape[:1], waveform.shape[1], device=waveform.device)
        frames = self.front(waveform, lengths)
        mask = frame_mask(lengths, frames.shape[1])
        content = F.gelu(self.convolution(frames.mT)).mT
        tables = self.positions.tables(content.shape[1:-1], like=content)
        return pc.Tokens(content, tables, mask)


FRONTS: dict[str, type[nn.Module]] = {"log-mel": LogMelFrames, "raw samples": LearnedFilters}


def build(front: nn.Module) -> pc.Perceiver:
    """Build a model from recordings to the logits of ten words, with 16 latents that read the tokens twice."""
    adapter = SpeechAdapter(front)
    mlp = partial(pc.MLP, widening_factor=2, dropout=0.1)
    read = partial(pc.CrossAttend, num_heads=4, attention=partial(pc.MultiHeadAttention, qk_dim=64, v_dim=64), mlp=mlp)
    transformer = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=mlp))
    encoder = pc.Encoder(
        adapter.dim,
        num_latents=16,
        dim=64,
        num_reads=2,
        depth=1,
        num_heads=4,
        cross_attention=read,
        latent_transformer=transformer,
    )
    return pc.Perceiver(adapter, encoder, pc.heads.Classification(encoder.dim, num_classes=10))


def augment(samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Change speed and pitch, onset and end, spectral tilt and noise of each recording at random.

    Returns:
        Samples, zero-padded to the longest recording, and the new lengths.
    """
    rate = torch.exp(uniform(len(samples), -SPEED, SPEED))  # of another speaker: above 1, shorter and higher
    spoken = lengths[:, None] / rate
    lead, tail = (uniform(len(samples), -0.15, 0.15) * spoken for _ in range(2))  # silence, or cut if negative
    total = (spoken + lead + tail).long()
    time = torch.arange(int(total.max()))
    source = (time - lead) * rate
    valid = (source >= 0) & (source < lengths[:, None] - 1) & (time < total)
    index = source.long().clamp(0, samples.shape[1] - 2)
    moved = torch.lerp(samples.gather(1, index), samples.gather(1, index + 1), source - index) * valid
    moved = moved + uniform(len(samples), -TILT, TILT) * F.pad(moved, (1, 0))[:, :-1]
    noise = 10 ** uniform(len(samples), *NOISE) * torch.randn_like(moved)
    return (moved / moved.abs().amax(1, keepdim=True) + noise) * (time < total), total[:, 0]


def uniform(count: int, low: float, high: float) -> Tensor:
    """Random numbers `count 1` between two limits."""
    return low + (high - low) * torch.rand(count, 1)


def loss(model: nn.Module, speech: Speech) -> Tensor:
    """Cross-entropy on a random batch of augmented recordings."""
    batch = speech[torch.randint(len(speech), (BATCH,))]
    samples, lengths = augment(batch.samples, batch.lengths)
    return F.cross_entropy(model(samples, lengths=lengths), batch.labels, label_smoothing=0.1)


@torch.no_grad()
def predict(model: nn.Module, speech: Speech, batch: int) -> Tensor:
    """Logits of all recordings, padded to the longest of each batch; with a batch of 1, there is no padding."""
    chosen = [speech[i] for i in torch.arange(len(speech)).split(batch)]
    if batch == 1:
        return torch.cat([model(one.samples) for one in chosen])
    return torch.cat([model(some.samples, lengths=some.lengths) for some in chosen])


def train(run: Run, name: str, speech: Speech, split: Split, steps: int, seed: int) -> dict[str, Any]:
    """Train a model and return its predictions for the test recordings, in padded batches and one by one."""
    torch.manual_seed(seed)
    objective = partial(loss, speech=speech[split.train])
    model = run.train(name, build(FRONTS[name]()), objective, steps=steps, lr=2e-3, decay=0.99)
    padded, alone = (predict(model, speech[split.test], batch) for batch in (50, 1))
    return {
        "padded": padded.argmax(1).tolist(),
        "one by one": alone.argmax(1).tolist(),
        "largest difference": (padded - alone).abs().max().item(),
        "trained": run.trained.pop(name),
    }


def main(arguments: Sequence[str] | None = None) -> Result:
    """Train the models on each split, compare them with the baselines, and write the result and the figure."""
    run = Run("spoken_digits", __doc__, arguments, options=OPTIONS)
    if run.options.data is None:
        speech, tested = generate(200 if run.toy else 8000, 100 if run.toy else 1000)
    else:
        speech = read(run.options.data)
        tested = splits(speech)
    fit = baselines(speech, LogMelFrames())
    correct: dict[str, dict[str, Tensor]] = {}  # percent, `seeds n`, by split and method
    trained, difference = {}, 0.0
    for name, split in tested.items():
        words = speech.labels[split.test]
        scores = {method: 100.0 * (fit_predict(split) == words)[None] for method, fit_predict in fit.items()}
        for front in ("log-mel",) if correct else FRONTS:  # raw samples for the first split only
            steps, results = 3 if run.toy else STEPS[front], []
            for seed in range(run.seed, run.seed + run.options.seeds):
                path = run.out / "runs" / f"{name}, {front}, {steps} steps, seed {seed}.json"
                results.append(
                    resumed(path, run.options.resume, partial(train, run, front, speech, split, steps, seed))
                )
                trained[path.stem] = results[-1]["trained"]
                difference = max(difference, results[-1]["largest difference"])
            for served in ("padded", "one by one"):
                guesses = torch.tensor([result[served] for result in results])
                scores[f"Perceiver, {front}, {served}"] = 100.0 * (guesses == words)
        correct[name] = scores
    run.trained = trained
    return finish(run, speech, correct, difference)


def finish(run: Run, speech: Speech, correct: dict[str, dict[str, Tensor]], difference: float) -> Result:
    """Print the tables, and write result and figure."""
    ours = "Perceiver, log-mel, padded"
    first, *left_out = correct
    tables = {f"{first}, correct, %": compare({name: x.mean(0) for name, x in correct[first].items()}, ours=ours)}
    if left_out:
        scores = {name: torch.cat([correct[one][name].mean(0) for one in left_out]) for name in correct[left_out[0]]}
        tables["one speaker left out, correct, %"] = compare(scores, ours=ours)
        by_speaker = {f"{ours}, {name}": interval(correct[name][ours].mean(0)) for name in left_out}
        tables["each speaker left out, correct, %"] = by_speaker
    for title, rows in tables.items():
        print(markdown_table(rows, title))
    by_seed = {
        name: {method: [round(x, 2) for x in scores.mean(1).tolist()] for method, scores in methods.items()}
        for name, methods in correct.items()
    }
    data = {
        "recordings": len(speech),
        "accuracy by seed": by_seed,
        "largest difference between padded and one by one": difference,
        "seconds of all trainings": round(sum(model["seconds"] for model in run.trained.values())),  # also if resumed
    }
    return run.finish(draw(speech, LogMelFrames(), correct), tables=tables, data=data)


if __name__ == "__main__":
    sys.exit(run_command(main, "the same command with --resume continues"))
