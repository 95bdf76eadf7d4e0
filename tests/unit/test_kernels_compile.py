"""The Triton kernels compile for GPUs that this machine need not have, down to machine code.

Triton's interpreter, in which the other tests run them, accepts programs that its compiler refuses.
"""

import os
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="the extra `dev` is not installed")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter is on", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_llr.param_groups import adam_kernel, hyperball_kernel, squares_kernel  # noqa: E402

# Ampere, Hopper, Blackwell.
CAPABILITIES = (80, 90, 100)
I32, I64, F32, F64 = "*i32", "*i64", "*fp32", "*fp64"
# Kernel -> types of its arguments by name; the arguments of many kernels have the same types.
TYPES = {
    **dict.fromkeys(("parameters", "gradients", "first_moments", "second_moments", "copies"), I64),
    **dict.fromkeys(("weights", "negated", "addresses", "positions", "chunk_first"), I64),
    **dict.fromkeys(("order", "offsets"), I64),
    **dict.fromkeys(("chunk_tensor", "chunk_length", "chunk_row", "chunk_matrix"), I32),
    **dict.fromkeys(("row_matrix", "lengths"), I32),
    **dict.fromkeys(("corrections", "rates", "moves"), F32),
    **dict.fromkeys(("partials", "sums"), F64),
    **dict.fromkeys(("tensors", "rows", "matrices"), "i32"),
    **dict.fromkeys(("beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps"), "fp32"),
}
PACKED = {True: "*bf16", False: F32}


def compiled(kernel: Any, constants: dict[str, Any], capability: int) -> Any:
    """A kernel as Triton compiles it, with the types of its arguments by their names."""
    packed = dict.fromkeys(("before", "target"), PACKED[constants.get("BF16", False)])
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else (TYPES | packed)[name] for name in names
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def kernels() -> list[Any]:
    """Every kernel without compile-time flags, with each of them, and with all."""
    cases = []
    for module in (adam_kernel, hyperball_kernel, squares_kernel):
        for name, kernel in vars(module).items():
            if not isinstance(kernel, triton.JITFunction) or not name.endswith("_kernel"):
                continue
            if kernel.module != module.__name__:
                continue
            flags = [arg for arg in kernel.arg_names if arg.isupper() and arg != "BLOCK"]
            for switched_on in dict.fromkeys([(), *((flag,) for flag in flags), tuple(flags)]):
                chosen = {flag: flag in switched_on for flag in flags}
                on = "-".join(flag for flag, value in chosen.items() if value)
                cases.append(pytest.param(kernel, chosen, id=f"{name}-{on}" if on else name))
    return cases


def test_every_kernel_is_compiled() -> None:
    names = {case.id.split("-")[0] for case in kernels()}
    assert names == {
        "_step_kernel", "_sums_kernel", "_total_kernel", "_project_kernel",
        "_square_kernel", "_sum_kernel", "_copy_kernel",
    }  # fmt: skip


@pytest.mark.parametrize(("kernel", "flags"), kernels())
def test_a_kernel_compiles(
    kernel: Any, flags: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not from the cache of an earlier run.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # One of the cards for each: all of them would take minutes.
    capability = CAPABILITIES[sum(flags.values()) % len(CAPABILITIES)]
    result = compiled(kernel, {**flags, "BLOCK": 1024}, capability)
    assert f"sm_{capability}" in result.asm["ptx"]
    assert len(result.asm["cubin"]) > 0
    assert result.metadata.shared <= 48 * 1024
