"""The compiled kernels keep their budgets (some architectures here, all in dev/cuda_budgets.py), and the
script's readers of compiler and disassembler texts see what they should.
"""

import shutil

import pytest

from dbrx_quant.scripts.dev import cuda_budgets as budgets

SASS = """
		Function : _ZN5dbrxq1_11gemv_kernelILi1ELi2EEEvNS_6MatmulE
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/                   LOP3.LUT R5, R4, 0xf000f, R6, 0xea, !PT ;
        /*0030*/                   HMMA.16816.F32 R8, R4, R2, R8 ;
        /*0040*/                   LDG.E.64 R4, [R2.64] ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   EXIT ;
"""


def test_a_loop_is_weighed_by_its_products_and_its_loads_by_bytes():
    listing = budgets.functions(SASS)["gemv 8 rows gated"]
    (body,) = budgets.loops(listing)
    assert len(body) == 5
    assert budgets.weigh_loop(body, 1) == (5 / 8, 16 / 24)


def test_labels_of_nvdisasm_are_addresses_too():
    text = SASS.replace("Function : _Z", ".section .text._Z").replace("MatmulE\n", 'MatmulE,"ax"\n')
    text = text.replace("        /*0010*/", ".L_x_1:\n        /*0010*/").replace("BRA 0x10", "BRA `(.L_x_1)")
    assert len(budgets.loops(budgets.functions(text)["gemv 8 rows gated"])) == 1


def test_spills_and_lost_registers_are_faults():
    text = (
        "ptxas info    : Compiling entry function '_Z14combine_kernel' for 'sm_80'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 64 bytes smem, 400 bytes cmem[0]\n"
    )
    found = budgets.read_ptxas(text)
    assert vars(found["combine"]) == {"registers": 255, "stack": 8, "spills": 16, "shared": 64, "loops": []}
    faults = budgets.broken_budgets(found, readable=False)
    assert [fault for fault in faults if fault.startswith("combine: ")] == [
        "combine: 255 registers, budget 40",
        "combine: 16 bytes spilled, budget 0",
        "combine: 8 bytes of stack, budget 0",
        "combine: 64 bytes of shared memory, budget 0",
    ]
    assert "gemm: not compiled" in faults


@pytest.mark.slow  # compiles all kernels
@pytest.mark.parametrize("arch", ["75", "80", "90", "120"])
def test_the_kernels_keep_their_budgets(arch, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the path")
    kernels, readable = budgets.measure(nvcc, arch, tmp_path)
    assert budgets.broken_budgets(kernels, readable) == []
    spilling = {name for name, kernel in kernels.items() if kernel.spills and not name.endswith("folded")}
    assert spilling <= ({"gemm gated"} if arch == "75" else set())


def test_without_nvcc_the_script_says_so(monkeypatch, capsys):
    monkeypatch.setattr(budgets.shutil, "which", lambda name: None)
    assert budgets.main([]) == budgets.MISSING
    assert "nvcc" in capsys.readouterr().err
