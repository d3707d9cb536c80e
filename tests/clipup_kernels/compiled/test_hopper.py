"""The executor's instructions of sm_90 against layouts built by hand, and faults of asynchronous instructions."""

import struct

import numpy as np
import pytest
import torch
from ptx import machine, parser
from ptx.faults import Fault, Unknown
from ptx.hopper import TENSOR_MAP

SUMS = "{" + ", ".join(f"%r{number}" for number in range(8)) + "}"


def run(body: str, *arrays: np.ndarray, tensor_map: bytes = b"") -> None:
    """A block of 128 threads with pointers %a0, %a1, ... and 16,384 bytes of shared memory from address 0 on; %t is the
    thread, %o and %q its offsets for 4 and 16 bytes."""
    declared = [f".param .u64 p{n}" for n in range(len(arrays))] + [".param .align 64 .b8 map[128]"]
    pointers = "\n".join(f"ld.param.b64 %a{n}, [p{n}];" for n in range(len(arrays)))
    program = parser.parse(
        f".version 8.8\n.target sm_90a\n.shared .align 1024 .b8 memory[16384];\n.visible .entry kernel("
        f"{', '.join(declared)})\n{{\n.reg .pred %p<9>; .reg .b32 %r<20>, %t, %o, %q; .reg .b64 %a<9>, %d<20>;\n"
        f"{pointers}\n"
        f"mov.u32 %t, %tid.x;\nshl.b32 %o, %t, 2;\nshl.b32 %q, %t, 4;\n{body}\nret;\n}}\n"
    )
    arguments = b"".join(struct.pack("<Q", array.ctypes.data) for array in arrays).ljust(
        program.parameters["map"][0], b"\0"
    )
    extents = [(array.ctypes.data, array.nbytes, f"array {n}") for n, array in enumerate(arrays)]
    machine.launch(program, (1, 1, 1), 128, arguments + tensor_map.ljust(128, b"\0"), extents)


def image(matrix: np.ndarray, by_k: bool, width: int, leading: int, stride: int, first: int = 0) -> np.ndarray:
    """8,192 bytes of shared memory with a matrix [rows, terms], after the figures of 9.7.15.5.1.2.

    Memory has cores of 8 lines of 16 bytes. Without a swizzle each is in one piece. Else a line of ``width`` chunks of
    16 bytes has those of neighboring cores, moved by the line's number.

    Args:
        first: the chunk of a line that the matrix begins at.
    """
    size, memory = matrix.itemsize, np.zeros(8192, np.uint8)
    for (row, term), element in np.ndenumerate(matrix):
        along, across = (term, row) if by_k else (row, term)
        chunk, inner = divmod(along + first * 16 // size, 16 // size)
        group, line = divmod(across, 8)
        if width == 1:
            start = line * 16 + (chunk * leading + group * stride if by_k else chunk * stride + group * leading)
        else:
            atom, chunk = divmod(chunk, width)
            start = atom * leading + group * stride + line * width * 16 + (chunk ^ line * width // 8) * 16
        memory[start + inner * size : start + (inner + 1) * size] = np.frombuffer(element.tobytes(), np.uint8)
    return memory


def descriptor(address: int, width: int, leading: int, stride: int) -> int:
    mode = {1: 0, 8: 1, 4: 2, 2: 3}[width]
    return address >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


FILL = "".join(
    f"add.s64 %d2, %a0, %d0;\nld.global.v4.b32 {{%r8, %r9, %r10, %r11}}, [%d2+{at}];\n"
    f"st.shared.v4.b32 [%q+{at}], {{%r8, %r9, %r10, %r11}};\n"
    for at in range(0, 16384, 2048)
)
PROXY, REGISTERS = "fence.proxy.async.shared::cta;\n", "wgmma.fence.sync.aligned;\n"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;\n", "wgmma.wait_group.sync.aligned 0;\n"
BARRIER = "bar.sync 0;\n"
FENCES, DONE = PROXY + BARRIER + REGISTERS, COMMIT + WAIT
STORE = "".join(f"st.global.b32 [%d3+{4 * number}], %r{number};\n" for number in range(8))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_products_of_warp_groups_read_every_layout_of_shared_memory(kind, width):
    terms = 8 if kind == "tf32" else 16
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    a, b = (torch.randn(rows, terms, generator=torch.Generator().manual_seed(rows)).to(dtype) for rows in (64, 16))
    bits = [(m.view(torch.int32) if kind == "tf32" else m.view(torch.int16)).numpy() for m in (a, b)]
    if kind == "tf32":  # the low bits do not count
        a, b = ((m.view(torch.int32) & ~0x1FFF).view(torch.float32) for m in (a, b))
    expected = (2 * a.double() @ b.double().T).numpy()
    for majors in [(True, True)] if kind == "tf32" else [(True, True), (True, False), (False, True), (False, False)]:
        first = 2 if width > 2 and all(majors) else 0  # a later step along K
        # Cores do not touch each other. Leading offsets of K-major lines do not count.
        layouts = [(256, 512) if width == 1 else (2048 if by_k else 1024, 128 * width) for by_k in majors]
        memory = [
            image(values, by_k, width, *layout, first)
            for values, by_k, layout in zip(bits, majors, layouts, strict=True)
        ]
        given = [descriptor(8192 * n + 16 * first, width, *layout) for n, layout in enumerate(layouts)]
        transposed = "" if kind == "tf32" else "".join(f", {int(not by_k)}" for by_k in majors)
        product = f"wgmma.mma_async.sync.aligned.m64n16k{terms}.f32.{kind}.{kind} {SUMS}, %d4, %d5, "
        result = np.zeros((128, 8), np.float32)
        run(
            f"mul.wide.u32 %d0, %t, 16;\n{FILL}{FENCES}mov.b64 %d4, {given[0]};\nmov.b64 %d5, {given[1]};\n"
            f"{product}0, 1, 1{transposed};\nsetp.eq.u32 %p1, %t, %t;\n{product}%p1, 1, 1{transposed};\n{DONE}"
            f"mul.wide.u32 %d3, %t, 32;\nadd.s64 %d3, %d3, %a1;\n{STORE}",
            np.concatenate(memory), result,
        )  # fmt: skip
        for thread, number in np.ndindex(result.shape):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (number // 2 % 2)
            column = 8 * (number // 4) + 2 * (thread % 4) + number % 2
            assert result[thread, number] == pytest.approx(expected[row, column], abs=1e-4), (majors, thread, number)


def test_stored_matrices_are_those_that_are_loaded():
    """``stmatrix`` is the inverse of ``ldmatrix``."""
    values, result = np.arange(512, dtype=np.uint32).reshape(128, 4), np.zeros((128, 4), np.uint32)
    run(
        "mul.wide.u32 %d0, %t, 16;\nadd.s64 %d1, %a0, %d0;\nld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];\n"
        "xor.b32 %q, %q, 112;\nstmatrix.sync.aligned.m8n8.x4.shared.b16 [%q], {%r1, %r2, %r3, %r4};\nbar.sync 0;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%q];\n"
        "add.s64 %d1, %a1, %d0;\nst.global.v4.b32 [%d1], {%r5, %r6, %r7, %r8};",
        values, result,
    )  # fmt: skip
    np.testing.assert_array_equal(result, values)


def test_one_thread_of_a_warp_is_elected():
    result = np.zeros(128, np.uint32)
    run(
        "elect.sync %r1|%p1, -1;\nselp.b32 %r2, 1, %r1, %p1;\ncvt.u64.u32 %d0, %o;\nadd.s64 %d0, %d0, %a0;\n"
        "st.global.b32 [%d0], %r2;", result,
    )  # fmt: skip
    assert result.reshape(4, 32).sum(1).tolist() == [1, 1, 1, 1]


ARRIVE = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], {bytes};\n"
BOX = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r11], [%d1, {%r12, %r13}], [%r10];\n"
INIT = (
    "setp.eq.u32 %p1, %t, 0;\nmov.b32 %r10, 8192;\nmov.b32 %r11, 0;\nmov.b32 %r12, 8;\nmov.b32 %r13, 10;\n"
    "mov.b64 %d1, map;\ncvta.param.u64 %d1, %d1;\n@%p1 mbarrier.init.shared::cta.b64 [%r10], 1;\nbar.sync 0;\n"
)
UNTIL = (
    "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%r10], 0;\n@!done bra.uni again;\n}\n"
)


def tensor_map(array: np.ndarray, swizzle: int, *box: int) -> bytes:
    return TENSOR_MAP.pack(array.ctypes.data, swizzle, array.itemsize, *array.shape, array.shape[1], *box)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_box_of_a_tensor_is_copied_with_zeros_outside(width):
    """The rest of 16 rows from row 10 of 20 on, and of the columns from column 8 of 40 on, in every swizzle."""
    array = np.arange(1, 801, dtype=np.uint16).reshape(20, 40)
    result = np.zeros(256 * width, np.uint8)
    run(
        INIT + ARRIVE.format(bytes=256 * width) + f"@%p1 {BOX}{UNTIL}cvt.u64.u32 %d0, %o;\nadd.s64 %d0, %d0, %a1;\n"
        + "".join(
            f"setp.lt.u32 %p2, %o, {256 * width - at};\n@%p2 ld.shared.b32 %r1, [%o+{at}];\n"
            f"@%p2 st.global.b32 [%d0+{at}], %r1;\n"
            for at in range(0, 256 * width, 512)
        ),
        array, result, tensor_map=tensor_map(array, {1: 0, 2: 1, 4: 2, 8: 3}[width], 16, 8 * width),
    )  # fmt: skip
    box = np.zeros((16, 8 * width), np.uint16)
    inside = array[10:, 8 : 8 + 8 * width]
    box[: inside.shape[0], : inside.shape[1]] = inside
    np.testing.assert_array_equal(result, image(box, True, width, 16, 128 * width)[: 256 * width])


ZEROS = "mov.b32 %r9, 0;\nst.shared.v4.b32 [%q], {%r9, %r9, %r9, %r9};\nst.shared.b32 [%o+2048], %r9;\n"
A, B = (descriptor(address, 1, 128, 256) for address in (0, 2048))
START = "".join(f"mov.b32 %r{n}, 0;\n" for n in range(8)) + f"mov.b64 %d4, {A};\nmov.b64 %d5, {B};\n"
MULTIPLY = f"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {SUMS}, %d4, %d5, 1, 1, 1, 0, 0;\n"
SMALLER = MULTIPLY.replace("n16", "n8").replace(SUMS, "{%r0, %r1, %r2, %r3}")
PRODUCT = ZEROS + START + FENCES + MULTIPLY + DONE
READ = "add.f32 %r10, %r1, %r2;\n"
ARRIVAL, LOAD = ARRIVE.format(bytes=256), "ld.shared.b32 %r1, [%r11];\n"
COPIED = INIT + ARRIVAL + f"@%p1 {BOX}{UNTIL}"
COPY = "cvt.u64.u32 %d0, %o;\nadd.s64 %d0, %d0, %a0;\ncp.async.ca.shared.global [%o], [%d0], 4;\n"
COPY_WAIT = "cp.async.commit_group;\ncp.async.wait_group 0;\n"
MARK = "//\n"  # the barrier that goes
FAULTS = {
    "a sum read in flight": (PRODUCT + READ, WAIT, WAIT.replace("0", "1"), "not been waited for"),
    "a sum changed in flight": (PRODUCT + "mov.b32 %r1, 0;", WAIT, "", "not been waited for"),
    "a wait without a commit": (PRODUCT + READ, COMMIT, "", "not been waited for"),
    "another shape in flight": (PRODUCT + REGISTERS + SMALLER, WAIT, "", "not been waited for"),
    "overwritten in flight": (PRODUCT + BARRIER + ZEROS, WAIT, "", "still reading"),
    "overwritten without a barrier": (PRODUCT + BARRIER + MARK + ZEROS, BARRIER + MARK, "", "race in shared memory"),
    "written, no barrier": (PRODUCT, BARRIER, "", "race in shared memory"),
    "written, no proxy fence": (PRODUCT, PROXY, "", "no fence.proxy.async"),
    "copied, proxy fence before the wait": (
        ZEROS + BARRIER + COPY + COPY_WAIT + START + FENCES + MULTIPLY + DONE,
        COPY_WAIT + START + PROXY, PROXY + COPY_WAIT + START, "no fence.proxy.async",
    ),
    "sums set, no fence": (PRODUCT, REGISTERS, "", "no wgmma.fence"),
    "sums changed, no fence": (PRODUCT + READ + REGISTERS + MARK + MULTIPLY, REGISTERS + MARK, "", "no wgmma.fence"),
    "a part of the group": (
        "setp.lt.u32 %p1, %t, 128;\n" + ZEROS + START + PROXY + BARRIER + "@!%p1 bra $end;\n" + REGISTERS + "$end:",
        "128;", "32;", "part of the warp group",
    ),
    "a box read before its barrier": (COPIED + UNTIL + LOAD, UNTIL, "", "not been waited for"),
    "a box of fewer bytes than expected": (COPIED, "256;", "272;", "without end"),
    "the other phase": (COPIED + LOAD, "[%r10], 0;", "[%r10], 1;", "without end"),
    "a box without an arrival": (COPIED + LOAD, ARRIVAL, "", "without end"),
    "no init": (COPIED, "@%p1 mbarrier.init.shared::cta.b64 [%r10], 1;\n", "", "never written"),
    "ended before the barrier after its init": (
        INIT + MARK + "setp.eq.u32 %p2, %t, 127;\n@%p2 mbarrier.inval.shared::cta.b64 [%r10];\n",
        BARRIER + MARK, "", "race in shared memory",
    ),
    "a box over stores, no proxy fence": (ZEROS + PROXY + COPIED, PROXY, "", "no fence.proxy.async"),
    "a box over reads, no barrier": (
        ZEROS + PROXY + INIT + "ld.shared.b32 %r1, [%o];\n" + BARRIER + MARK + COPIED.removeprefix(INIT),
        BARRIER + MARK, "", "race in shared memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("right", "old", "new", "words"), FAULTS.values(), ids=FAULTS)
def test_faults_of_asynchronous_instructions_are_found_and_their_right_twins_raise_no_alarm(right, old, new, words):
    array = np.zeros((20, 40), np.uint16)
    box = tensor_map(array, 0, 16, 8)
    run(right, array, tensor_map=box)
    assert old in right
    with pytest.raises(Fault, match=words):
        run(right.replace(old, new), array, tensor_map=box)


@pytest.mark.parametrize(
    "line",
    ["setmaxnreg.inc.sync.aligned.u32 232;", MULTIPLY.replace("%d4", "{%r8, %r9, %r10, %r11}"), "fence.proxy.alias;"],
)
def test_forms_that_the_kernels_do_not_use_are_refused_by_name(line):
    with pytest.raises(Unknown, match=line.split()[0].rstrip(";")):
        run(line)
