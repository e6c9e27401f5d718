"""The kernels of rotvq.hardware.gpu, compiled ahead of time for GPUs that need not be here:
registers, shared memory, spills, and whether a multiplication was fused into an addition across
lanes.

    python benchmarks/ahead_of_time.py

Triton carries the compilers of NVIDIA and AMD. Writes nbs/results/kernels.json. Takes about three
minutes.
"""

import hashlib
import inspect
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from rotvq.hardware import gpu

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (75, 80, 86, 89, 90, 100, 120)}
TARGETS |= {arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")}
BACKWARD = "pullback", "weighted", "gradient", "straight gradient"  # forms of one kernel
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}
# d up to 8, or no multiple of 16: a thread holds one column, so that nearly every addition of a sum
# is across lanes
JOBS = {
    f"pullback, d = {d}": ("pullback", d, torch.float32, False)
    for d in (2, 3, 4, 8, 12, 32, 100, 256, 1024, 4096, 8192)
}
JOBS |= {
    f"pullback, d = {d}, {dtype}".replace("torch.", ""): ("pullback", d, dtype, False)
    for d, dtype in (
        (4, torch.bfloat16),
        (32, torch.bfloat16),
        (4, torch.float64),
        (32, torch.float64),
        (4096, torch.float64),
    )
}
JOBS |= {f"mirror and γ, d = {d}, float16": ("pullback", d, torch.float16, True) for d in (4, 32)}
JOBS |= {f"weight for all, d = {d}": ("weighted", d, torch.float32, False) for d in (4, 32, 256)}
JOBS |= {f"search, d = {d}": ("search", d, torch.float32, False) for d in (4, 16, 32)}
JOBS |= {f"differences, d = {d}": ("differences", d, torch.float32, False) for d in (4, 32, 256)}
JOBS |= {
    f"{kind}, d = {d}": (kind, d, torch.float32, False)
    for kind in ("lookup", "step")
    for d in (4, 16, 32, 64)
}
JOBS |= {
    f"{kind}, d = {d}": (kind, d, torch.float32, False)
    for kind in ("gradient", "straight gradient")
    for d in (4, 32, 256)
}
JOBS |= {
    f"{kind}, d = {d}": (kind, d, torch.float32, False)
    for kind in ("totals", "average", "sums")
    for d in (4, 32, 256)
}


def source(
    kind: str, d: int, dtype: torch.dtype, mirror: bool, warp: int
) -> tuple[ASTSource, dict]:
    "What Triton compiles, with the options of a launch."
    name, number = "*" + NAMES[dtype], "i32"
    if kind in BACKWARD:
        weighs, pulls = kind == "weighted", "gradient" in kind
        kernel, const = (
            gpu.pullback_kernel,
            gpu.pullback_options(d, dtype, warp)
            | {"mirror": mirror, "has_gamma": mirror, "has_weight": weighs, "next_weight": 0},
        )
        const |= {"turns": "straight" not in kind, "has_pull": pulls}
        types = {
            "g": name,
            "z": name,
            "q": name,
            "out": name,
            "gamma": "*fp32",
            "weight": "*fp32",
            "pull": "*fp32",
            "n": number,
            "d": number,
            "share": "fp32",
        }
        const |= {
            key: None
            for key, there in (("gamma", mirror), ("weight", weighs), ("pull", pulls))
            if not there
        }
    elif kind == "differences":
        kernel, const = gpu.differences_kernel, gpu.differences_options(d)
        types = {key: name for key in ("z", "codes", "origin")} | {
            "indices": "*i64",
            "out": "*i64",
            "n": number,
            "K": number,
            "d": number,
            "rough": "fp32",
        }
    elif kind in ("lookup", "step"):
        kernel, const = (
            gpu.lookup_kernel,
            gpu.lookup_options(d, warp) | {"STEP": kind == "step", "LEARN": kind == "step"},
        )
        types = {
            "z": name,
            "codes": name,
            "out": "*i64",
            "n": number,
            "K": number,
            "d": number,
            "rough": "fp32",
            "share": "fp32",
        }
        written = {
            "value": name,
            "q": name,
            "sums": "*fp64",
            "parts": name,
            "ticket": "*i32",
            "loss": name,
        }
        types, const = (
            (types | written, const) if kind == "step" else (types, const | dict.fromkeys(written))
        )
    elif kind in ("totals", "average"):
        kernel, const = (
            getattr(gpu, f"{kind}_kernel"),
            gpu.average_options(d) | ({"PARTS": gpu.PARTS} if kind == "average" else {}),
        )
        types = (
            {key: name for key in ("codes", "counts", "sums", "totals")}
            | {key: "*i64" for key in ("idle", "waited", "batches")}
            | {"batch": "*fp64"}
        )
        types |= {"learned": "*i1", "K": number, "d": number, "P": number, "new": "fp32"}
    elif kind == "sums":
        kernel, const = gpu.sums_kernel, gpu.sums_options(d)
        types = {
            "z": name,
            "indices": "*i64",
            "sums": "*fp64",
            "n": number,
            "K": number,
            "d": number,
        }
    else:
        kernel, const = gpu.search_kernel, gpu.search_options(d, warp)
        types = {
            "z": name,
            "codes": name,
            "offset": name,
            "out": "*i64",
            "n": number,
            "K": number,
            "d": number,
        }
    options = {
        key: const.pop(key)
        for key in ("num_warps", "num_stages", "enable_fp_fusion")
        if key in const
    }
    names = kernel.arg_names
    signature = {k: "constexpr" if k in const else types[k] for k in names}
    whole = lambda k: (
        k not in ("n", "rough", "P", "new", "share") and (k != "d" or d % 16 == 0)
    )  # what a launch finds out; K is a multiple most of the time
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, k in enumerate(names) if k not in const and whole(k)
    }
    constexprs = {(names.index(k),): v for k, v in const.items()}
    return ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned), options


def stamp() -> str:
    """Of the kernels' source and of how they are compiled: another one than in the file means that
    the file is old."""
    names = "pullback", "search", "differences", "lookup", "totals", "average", "sums"
    kinds = (
        gpu.power_of_two,
        gpu.exponent,
        gpu.nearest_by_differences,
        *(getattr(gpu, f"{name}_kernel") for name in names),
    )
    of = dict.fromkeys(BACKWARD, gpu.pullback_options) | {
        "search": lambda d, _: gpu.search_options(d),
        "differences": lambda d, _: gpu.differences_options(d),
    }
    of |= {
        "lookup": lambda d, _: gpu.lookup_options(d),
        "step": lambda d, _: gpu.lookup_options(d),
        "sums": lambda d, _: gpu.sums_options(d),
    }
    of |= dict.fromkeys(("totals", "average"), lambda d, _: gpu.average_options(d))
    options = [of[kind](d, dtype) for kind, d, dtype, _ in JOBS.values()]
    said = [inspect.getsource(kernel.fn) for kernel in kinds] + [
        f"{name}: {value}" for held in options for name, value in held.items()
    ]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:12]


EXCHANGES = re.compile(
    "SHFL|v_mov_b32_dpp|ds_swizzle|ds_bpermute|ds_permute|v_permlane"
)  # a number from another lane
NVIDIA = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
AMD = re.compile(r"^\s+([a-z]\w+)\s+([^\n;/]*)", re.MULTILINE)


def registers(operand: str) -> set[int]:
    "R7, v7 or v[6:7]."
    names = re.search(r"\bv\[(\d+):(\d+)\]", operand)
    return (
        set(range(int(names[1]), int(names[2]) + 1))
        if names
        else {int(k) for k in re.findall(r"\b[Rv](\d+)\b", operand)}
    )


def fused_across_lanes(code: str) -> int:
    """Fused multiply-adds whose addend an exchange between lanes has just written.

    Such a lane adds its own product exactly and its partner's rounded, the partner the other way
    round: the lanes of a row go on with different sums. Counted down the listing of the machine
    code, NVIDIA's or AMD's."""
    nvidia = "/*0" in code
    count, foreign = 0, set()
    for name, operands in (NVIDIA if nvidia else AMD).findall(code):
        parts = [part.strip() for part in re.split(r",(?![^\[]*\])", operands)]
        written = registers(
            parts[1] if name.startswith("SHFL") and parts[0].startswith("P") else parts[0]
        )
        if name.startswith(
            (
                "ST",
                "RED",
                "ATOM",
                "ISETP",
                "FSETP",
                "DSETP",
                "global_store",
                "ds_write",
                "s_",
                "v_cmp",
            )
        ):
            written = set()
        double = name.startswith(("DADD", "DMUL", "DFMA"))
        if nvidia:
            written |= {
                k + i
                for k in written
                for i in range(2 if double or ".64" in name else 4 if ".128" in name else 1)
            }
        if re.match(r"[FDH]FMA|v_(pk_)?fma_", name):
            addend = registers(parts[3])
        elif name.startswith("v_fmac_"):
            addend = set(written)
        else:
            addend = set()
        if double:
            addend |= {k + 1 for k in addend}
        count += bool(addend & foreign)
        foreign = foreign | written if EXCHANGES.match(name) else foreign - written
    return count


def of_cubin(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin), file.flush()
        usage, code = (
            subprocess.run(
                [BIN / tool, *flags, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", []))
        )
    number = lambda key: int(re.search(key + r":(\d+)", usage).group(1))
    operations = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    return {
        "registers": number("REG"),
        "spills": number("STACK") + number("LOCAL"),
        "float64": sum(
            name[:4] in ("DADD", "DMUL", "DFMA", "DSET") or name.startswith("DMNMX")
            for name in operations
        ),
        "bytes": len(cubin),
        "fused": fused_across_lanes(code),
    }


def compiled(target: str, job: str, **changed) -> dict:
    """One row of the table; spills in bytes of a thread, `float64` counts such instructions (NVIDIA
    only), `fused` those of `fused_across_lanes`. `changed`: other options of the compiler."""
    chip = TARGETS[target]
    made, options = source(*JOBS[job], chip.warp_size)
    kernel = compile(made, target=chip, options=options | changed)
    row = {
        "target": target,
        "kernel": job,
        "warps": options["num_warps"],
        "shared": kernel.metadata.shared,
    }
    if chip.backend == "cuda":
        row |= of_cubin(kernel.asm["cubin"])
        if "float64" in job:
            row["float64"] = None
        return row
    number = lambda key: int(re.search(key + r":?\s+(\d+)", kernel.asm["amdgcn"]).group(1))
    return row | {
        "registers": number(r"\.vgpr_count"),
        "float64": None,
        "fused": fused_across_lanes(kernel.asm["amdgcn"]),
        "spills": number(r"\.vgpr_spill_count") + number(r"\.private_segment_fixed_size"),
        "bytes": len(kernel.asm["hsaco"]),
    }


if __name__ == "__main__":
    rows = []
    for target in TARGETS:
        for job in JOBS:
            rows.append(compiled(target, job))
            print(rows[-1], flush=True)
    result = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "stamp": stamp(),
        "rows": rows,
    }
    (ROOT / "nbs" / "results" / "kernels.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
