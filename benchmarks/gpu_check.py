"""The first thing to run on a GPU: tests, kernels against their definitions, benchmarks, and two hundred steps of the preset cuda.

    make gpu-check                      (python benchmarks/gpu_check.py)

Each part runs even if the one before failed. Writes gpu-check.json, one file to attach to a report; exits with 1 if something failed.
About ten minutes.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from rotvq.data import SAMPLE, ImageNet10
from rotvq.plan import least_seconds, plan
from rotvq.runs import commit_of, hardware
from rotvq.training import PRESETS, Learner, batches, place

ROOT = Path(__file__).resolve().parent.parent


def tests(device: str) -> dict:
    "The tests that a GPU makes different; a skipped one is counted."
    files = ["tests/test_cuda.py"] if device == "cpu" else ["tests/test_cuda.py", "tests/test_estimators.py", "tests/test_codebook.py", "tests/test_quantizer.py", "tests/test_training.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    passed = device == "cpu" or any(" passed" in line for line in lines[-1:])   # all of them skipped is no success
    return {"ok": done.returncode in (0, 5) and passed, "summary": lines[-1] if lines else done.stderr[-500:], "failed": [line for line in lines if line.startswith("FAILED")]}


def kernels(device: str) -> dict:
    "Gradients of both estimators against explicit matrices in float64, and the lookup against all distances, for several d."
    from rotvq import reflection_trick, rotation_trick
    from rotvq.codebook import nearest_code
    from rotvq.householder import householder_matrix
    from rotvq.rotation import rotation_matrix
    worst, wrong, generator = {}, 0, torch.Generator().manual_seed(0)
    for d in (2, 3, 4, 8, 32, 64, 256):
        z, q, g = torch.randn(3, 512, d, generator=generator)
        a, b = z.double(), q.double()
        unit = lambda x: x / x.norm(dim=1, keepdim=True)
        length = (b.norm(dim=1) / a.norm(dim=1))[:, None, None]
        forms = {"rotation": (rotation_trick, rotation_matrix(a, b)), "reflection": (reflection_trick, householder_matrix(unit(a) - unit(b)))}
        for name, (trick, matrix) in forms.items():
            expected = ((length * matrix).mT @ g.double()[:, :, None])[..., 0]
            x = z.to(device, copy=True).requires_grad_()
            trick(x, q.to(device)).backward(g.to(device))
            error = (x.grad.cpu().double() - expected).norm(dim=1) / expected.norm(dim=1)
            worst[f"{name}, d = {d}"] = error.max().item()
        codes = torch.randn(300, d, generator=generator)
        distances = torch.cdist(a, codes.double())
        chosen = nearest_code(z.to(device), codes.to(device)).cpu()
        excess = distances.gather(1, chosen[:, None])[:, 0] - distances.amin(1)
        wrong += int((excess > 1e-5 * distances.amin(1).clamp_min(1e-3)).sum())
    return {"ok": max(worst.values()) < 1e-5 and wrong == 0, "worst relative error": worst, "codes that are not nearest": wrong}


def benchmarks(device: str) -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("estimators", "quantizer", "step"):
            out = Path(folder) / f"{name}.json"
            done = subprocess.run([sys.executable, f"benchmarks/{name}.py", "--device", device, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
            found[name] = json.loads(out.read_text()) if out.exists() else {"error": done.stderr[-1000:]}
    return {"ok": all("error" not in part for part in found.values()), **found}


def steps(device: str, preset: str, count: int, compiled: bool) -> dict:
    "Speed, memory against the plan, and whether a step waits for the GPU."
    import dataclasses
    config, where = dataclasses.replace(PRESETS[preset], compile=compiled), torch.device(device)
    images = place(ImageNet10("train", config.size, SAMPLE, 1024 if device == "cuda" else 64).images, where)
    learner = Learner(config, "rotation", 0, where)
    learner.begin(0)
    data = batches(images, config, 0, 0, where)
    x = next(data)
    losses = [learner.step(x)[0] for _ in range(12)]                      # the tenth looks at λ once
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
    try:
        learner.step(next(data))
    finally:
        if cuda: torch.cuda.set_sync_debug_mode("default")
    if cuda: torch.cuda.synchronize()
    began = time.perf_counter()
    losses += [learner.step(x)[0] for _ in range(count)]
    if cuda: torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / count
    expected = plan(config, len(images))
    least = least_seconds(expected, torch.cuda.get_device_name() if cuda else "")
    first, last = losses[0].item(), losses[-1].item()
    return {"ok": last < first, "seconds a step": seconds, "pictures a second": len(x) / seconds, "least seconds": least, "planned bytes": expected.memory,
            "peak bytes": torch.cuda.max_memory_allocated() if cuda else None, "loss": [first, last]}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda", help="cpu only shows that this script runs")
    options.add_argument("--preset", choices=list(PRESETS), default="cuda")
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--only", nargs="*", help="some of: tests kernels benchmarks steps compiled")
    options.add_argument("--out", type=Path, default=ROOT / "gpu-check.json")
    args = options.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device here. This check is for a machine with one (nvidia-smi, and a CUDA build of PyTorch).", file=sys.stderr)
        return 1
    parts = {"kernels": lambda: kernels(args.device), "steps": lambda: steps(args.device, args.preset, args.steps, False),
             "compiled": lambda: steps(args.device, args.preset, args.steps, True), "tests": lambda: tests(args.device), "benchmarks": lambda: benchmarks(args.device)}
    found = {"machine": hardware(torch.device(args.device)), "commit": commit_of(ROOT), "preset": args.preset}
    for name, part in parts.items():
        if args.only and name not in args.only: continue
        print(f"==> {name}", flush=True)
        try: found[name] = part()
        except Exception as error: found[name] = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
        print(f"    {'ok' if found[name]['ok'] else 'FAILED'}", flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")
    return int(not all(part["ok"] for part in found.values() if isinstance(part, dict) and "ok" in part))


if __name__ == "__main__":
    sys.exit(main())
