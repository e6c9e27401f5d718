"""The kernels of rotvq.kernels, compiled ahead of time for GPUs that need not be here: registers, shared memory, spills.

    python benchmarks/ahead_of_time.py

Triton carries the compilers of NVIDIA and AMD. Writes nbs/results/kernels.json. Takes about two minutes.
"""
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from rotvq import kernels

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (75, 80, 86, 89, 90, 100, 120)}
TARGETS |= {arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
JOBS = {f"pullback, d = {d}": ("pullback", d, torch.float32, False) for d in (4, 32, 100, 256, 1024, 4096, 8192)}
JOBS |= {"pullback, d = 32, bfloat16": ("pullback", 32, torch.bfloat16, False), "pullback, d = 32, float64": ("pullback", 32, torch.float64, False), "pullback, d = 4096, float64": ("pullback", 4096, torch.float64, False),
         "mirror and γ, d = 32, float16": ("pullback", 32, torch.float16, True)}
JOBS |= {f"search, d = {d}": ("search", d, torch.float32, False) for d in (4, 20, 32)}


def source(kind: str, d: int, dtype: torch.dtype, mirror: bool, warp: int) -> tuple[ASTSource, dict]:
    "What Triton compiles, with the options of a launch."
    name, number = "*" + NAMES[dtype], "i32"
    if kind == "pullback":
        kernel, const = kernels.pullback_kernel, kernels.pullback_options(d, dtype, warp) | {"mirror": mirror, "has_gamma": mirror}
        types = {"g": name, "z": name, "q": name, "out": name, "gamma": "*fp32", "n": number, "d": number}
        if not mirror: const["gamma"] = None
    else:
        kernel, const = kernels.search_kernel, kernels.search_options(d, warp)
        types = {"z": name, "codes": name, "offset": name, "out": "*i64", "n": number, "K": number, "d": number}
    options = {key: const.pop(key) for key in ("num_warps", "num_stages") if key in const}
    names = kernel.arg_names
    signature = {k: "constexpr" if k in const else types[k] for k in names}
    whole = lambda k: k != "n" and (k != "d" or d % 16 == 0)              # what a launch finds out; K is a multiple most of the time
    aligned = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(names) if k not in const and whole(k)}
    constexprs = {(names.index(k),): v for k, v in const.items()}
    return ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned), options


def of_cubin(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin), file.flush()
        usage, code = (subprocess.run([BIN / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
                       for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", [])))
    number = lambda key: int(re.search(key + r":(\d+)", usage).group(1))
    operations = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    return {"registers": number("REG"), "spills": number("STACK") + number("LOCAL"),
            "float64": sum(name[:4] in ("DADD", "DMUL", "DFMA", "DSET") or name.startswith("DMNMX") for name in operations), "bytes": len(cubin)}


def compiled(target: str, job: str) -> dict:
    "One row of the table; spills in bytes of a thread, `float64` counts such instructions (NVIDIA only)."
    gpu = TARGETS[target]
    made, options = source(*JOBS[job], gpu.warp_size)
    kernel = compile(made, target=gpu, options=options)
    row = {"target": target, "kernel": job, "warps": options["num_warps"], "shared": kernel.metadata.shared}
    if gpu.backend == "cuda":
        row |= of_cubin(kernel.asm["cubin"])
        if "float64" in job: row["float64"] = None
        return row
    number = lambda key: int(re.search(key + r":?\s+(\d+)", kernel.asm["amdgcn"]).group(1))
    return row | {"registers": number(r"\.vgpr_count"), "float64": None,
                  "spills": number(r"\.vgpr_spill_count") + number(r"\.private_segment_fixed_size"), "bytes": len(kernel.asm["hsaco"])}


if __name__ == "__main__":
    rows = []
    for target in TARGETS:
        for job in JOBS:
            rows.append(compiled(target, job))
            print(rows[-1], flush=True)
    result = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
    (ROOT / "nbs" / "results" / "kernels.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
