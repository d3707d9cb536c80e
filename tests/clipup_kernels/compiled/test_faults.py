"""The executor names every fault of threads, and raises no alarm over programs without one."""

import numpy as np
import pytest
from ptx.faults import Fault
from ptx.small_programs import ADDED, ZEROS, run

STORE = "mov.b32 %r9, memory;\nadd.s32 %m, %o, %r9;\nst.shared.b32 [%m], %t;\n"
NEXT = "xor.b32 %r2, %o, 128;\nadd.s32 %r2, %r2, %r9;\n"  # of the other warp
COPY = "add.s64 %d1, %a0, %w;\nmov.b32 %r9, memory;\nadd.s32 %m, %o, %r9;\ncp.async.ca.shared.global [%m], [%d1], 4;\n"
OWN = "setp.eq.u32 %p1, %c, 0;\n@!%p1 ret;\nadd.s64 %d1, %a0, %w;\n"  # of the first block
OTHER = "xor.b32 %r2, %t, 1;\nmul.wide.u32 %d2, %r2, 4;\nadd.s64 %d2, %a0, %d2;\n"
DONE = "cp.async.commit_group;\n"
FAULTS = {
    "read without a barrier": (STORE + NEXT + "ld.shared.b32 %r1, [%r2];", "race in shared memory"),
    "write after a read without a barrier": (
        STORE + NEXT + "bar.sync 0;\nld.shared.b32 %r1, [%r2];\nst.shared.b32 [%m], %t;", "race in shared memory",
    ),
    "two values at one address": ("mov.b32 %r9, memory;\nst.shared.b32 [%r9], %t;", "different values"),
    "never written": ("mov.b32 %r9, memory;\nld.shared.b32 %r1, [%r9];", "never written"),
    "past the end of shared memory": ("mov.b32 %r9, 1024;\nst.shared.b32 [%r9], %t;", "1024 of 256 bytes"),
    "not waited for": (COPY + DONE + "cp.async.wait_group 1;\nld.shared.b32 %r1, [%m];", "has not been waited for"),
    "waited, but no barrier": (
        COPY + DONE + "cp.async.wait_group 0;\n" + NEXT + "ld.shared.b32 %r1, [%r2];", "race in shared memory",
    ),
    "written while it is copied": (COPY + DONE + "st.shared.b32 [%m], %t;", "still writing"),
    "a barrier for half of the block": (
        "setp.lt.u32 %p1, %t, 32;\n@%p1 bra $here;\nbra $end;\n$here:\nbar.sync 0;\n$end:", "does not reach",
    ),
    "a barrier that a predicate skips": (
        "setp.lt.u32 %p1, %t, 32;\n@%p1 bar.sync 0;", "a part of the block does not reach",
    ),
    "an odd byte that another block writes": (
        "cvt.u64.u32 %d1, %t;\nadd.s64 %d1, %a0, %d1;\ncvt.u16.u32 %s1, %t;\nsetp.eq.u32 %p1, %c, 0;\n"
        "@%p1 st.global.v2.b8 [%a0], {%s1, %s1};\n@%p1 ret;\nst.global.b8 [%a0+1], %s1;", "two blocks write|different",
    ),
    "a part of the warp": (
        "setp.lt.u32 %p1, %t, 7;\n@!%p1 bra $end;\nshfl.sync.bfly.b32 %r1, %t, 1, 31, -1;\n$end:", "a part of the warp",
    ),
    "a thread outside of its mask": ("shfl.sync.bfly.b32 %r1, %t, 1, 31, 0xFFFF;", "not in its mask"),
    "read beside an atomic addition": (
        ZEROS + ADDED + "red.shared.add.u32 [%r2], %t;\nld.shared.b32 %r1, [%m];", "race.*ld.shared.*added to",
    ),
    "write beside an atomic addition": (
        ZEROS + ADDED + "red.shared.add.u32 [%r2], %t;\nst.shared.b32 [%m], %t;", "race.*st.shared.*added to",
    ),
    "atomic addition beside a write": (STORE + ADDED + "red.shared.add.u32 [%r2], %t;", "race.*red.shared.*written"),
    "atomic addition beside a read": (
        ZEROS + ADDED + "ld.shared.b32 %r1, [%m];\nred.shared.add.u32 [%r2], %t;", "race.*red.shared.*read",
    ),
    "atomic addition to nothing": (
        "mov.b32 %r9, memory;\nred.shared.add.u32 [%r9], %t;", "never written",
    ),
    "a read of one warp and then of two, and a write of one of these": (
        ZEROS + "setp.lt.u32 %p1, %t, 34;\nsetp.ge.u32 %p2, %t, 31;\nand.pred %p1, %p1, %p2;\n"
        "@%p1 ld.shared.b32 %r1, [%r9];\n"
        "bar.warp.sync -1;\nsetp.eq.u32 %p3, %t, 33;\n@%p3 st.shared.b32 [%r9], %t;", "race in shared memory",
    ),
    "outside of the tensors": ("add.s64 %d1, %a0, %w;\nst.global.b32 [%d1+4], %t;", "outside of every tensor"),
    "not aligned": ("add.s64 %d1, %a0, 2;\nld.global.b32 %r1, [%d1];", "not a multiple of 4"),
    "blocks write one address": ("add.s64 %d1, %a0, %w;\nst.global.b32 [%d1], %t;", "two blocks write one address"),
    "a thread reads what another writes, without a barrier": (
        OWN + "st.global.b32 [%d1], %t;\n" + OTHER + "ld.global.b32 %r1, [%d2];", "no barrier after another thread's",
    ),
    "threads write different values, without a barrier": (
        OWN + "st.global.b32 [%d1], %t;\n" + OTHER + "st.global.b32 [%d2], %t;", "no barrier after another thread's",
    ),
    "a thread writes what another reads, without a barrier": (
        OWN + "ld.global.b32 %r1, [%d1];\n" + OTHER + "st.global.b32 [%d2], %t;", "no barrier before another thread's",
    ),
    "a block reads what another writes": (
        "add.s64 %d1, %a0, %w;\nld.global.b32 %r1, [%a0];\nsetp.eq.b32 %p1, %c, 0;\n@%p1 st.global.b32 [%d1], %t;",
        "reads what another block",
    ),
    "a register without a value": ("add.s32 %r1, %r2, 1;", "before it is written"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "words"), FAULTS.values(), ids=FAULTS)
def test_faults_of_threads_are_found_and_named(body, words):
    with pytest.raises(Fault, match=words):
        run(body, np.zeros(64, np.uint32), blocks=2, shared=256)


STRICT = {
    "a number that does not fit": "cvt.rn.f32.u32 %r1, %t;\nmul.f32 %r1, %r1, 0f4CC00000;\ncvt.rzi.s32.f32 %r2, %r1;",
    "in shared memory": "mov.b32 %r9, memory;\nst.shared.b32 [%r9], 7;",
    "in global memory": OWN + "st.global.b32 [%a0], 7;",
    "in global memory, one after the other": OWN + "st.global.b32 [%d1], 7;\n" + OTHER + "st.global.b32 [%d2], 7;",
}


@pytest.mark.parametrize("body", STRICT.values(), ids=STRICT)
def test_some_faults_are_found_only_where_that_is_asked_for(body):
    run(body, np.zeros(64, np.uint32), blocks=2, shared=256)
    with pytest.raises(Fault, match="equal values|another thread's write|does not fit"):
        run(body, np.zeros(64, np.uint32), blocks=2, shared=256, strict=True)


RIGHT = {
    "a barrier between write and read": OWN
    + "st.global.b32 [%d1], %t;\nbar.sync 0;\n"
    + OTHER
    + "ld.global.b32 %r1, [%d2];",
    "a barrier between": STORE + NEXT + "bar.sync 0;\nld.shared.b32 %r1, [%r2];\nbar.sync 0;\nst.shared.b32 [%m], %t;",
    "a barrier of the warp": STORE
    + "xor.b32 %r2, %o, 4;\nadd.s32 %r2, %r2, %r9;\nbar.warp.sync -1;\nld.shared.b32 %r1, [%r2];",
    "waited, then a barrier": COPY
    + DONE
    + "cp.async.wait_group 0;\nbar.sync 0;\n"
    + NEXT
    + "ld.shared.b32 %r1, [%r2];",
    "the older of two groups": COPY
    + DONE
    + "cp.async.ca.shared.global [%m+256], [%d1], 4;\n"
    + DONE
    + "cp.async.wait_group 1;\nld.shared.b32 %r1, [%m];",
    "atomic additions of two warps": ZEROS + ADDED + "red.shared.add.u32 [%r2], %t;\nred.shared.add.u32 [%r2], 1;",
    "paths that join": (
        "setp.lt.u32 %p1, %t, 7;\n@!%p1 bra $end;\nmov.b32 %r1, 3;\n$end:\nshfl.sync.bfly.b32 %r2, %t, 1, 31, -1;"
    ),
}


@pytest.mark.parametrize("body", RIGHT.values(), ids=RIGHT)
def test_programs_without_a_fault_raise_no_alarm(body):
    run(body, np.zeros(64, np.uint32), blocks=2, shared=512)
