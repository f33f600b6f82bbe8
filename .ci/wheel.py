"""Run in an empty environment that holds the wheel: imports every public name, and runs a tiny Perceiver."""

import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import torch

import perceiver_core as pc

site_packages = Path(sysconfig.get_path("purelib")).resolve()
package = Path(pc.__file__).resolve().parent
if package.parent != site_packages:
    sys.exit(f"perceiver_core comes from {package}, not from the wheel in {site_packages}")
if not (package / "py.typed").exists():
    sys.exit("the wheel has no py.typed")
missing = [name for name in pc.__all__ if not hasattr(pc, name)]
if missing:
    sys.exit(f"perceiver_core.__all__ names what is not there: {missing}")
if pc.__version__ != version("perceiver-core"):
    sys.exit(f"the package says {pc.__version__}, its wheel {version('perceiver-core')}")

image = pc.adapters.Image(num_channels=3, positions=pc.positions.Fourier(num_axes=2, num_bands=4, max_resolution=13))
encoder = pc.Encoder(image.dim, num_latents=7, dim=16, num_reads=2, depth=1, num_heads=2, share=True)
model = pc.Perceiver(image, encoder, pc.heads.Classification(16, num_classes=5))
logits = model(torch.randn(2, 3, 11, 13))
if logits.shape != (2, 5) or not logits.isfinite().all():
    sys.exit(f"a tiny Perceiver gave {logits}")
print(f"{len(pc.__all__)} public names; a tiny Perceiver runs: {tuple(logits.shape)}")
