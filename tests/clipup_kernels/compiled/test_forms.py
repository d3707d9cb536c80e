"""The executor knows what Triton compiles the kernels to."""

import os

import pytest

pytestmark = [pytest.mark.compiled, pytest.mark.slow]


@pytest.mark.parametrize("arch", [80, 90])
def test_every_instruction_of_every_variant_is_known(arch):
    """``pytest -rP`` prints the numbers of variants, opcodes and forms."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process interprets kernels; TRITON_INTERPRET=0 pytest -m compiled")
    from gpu_static import all_variants
    from ptx import instructions, parser

    from clipup_kernels.triton.variants import compile_variant

    variants, forms = list(all_variants(arch)), set()
    for variant in variants:
        program = parser.parse(compile_variant(variant, arch).ptx)
        instructions.compiled(program)
        forms |= {instruction.opcode for instruction in program.instructions}
    opcodes = {form.split(".")[0] for form in forms}
    print(f"{len(variants)} variants, {len(opcodes)} opcodes in {len(forms)} forms")
    assert variants
