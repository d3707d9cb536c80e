"""The executor of PTX: every fault of threads is found, and arithmetic is that of the C library, torch and Python."""

import ctypes
import itertools
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import parser, warps
from ptx.arithmetic import FORMS, TYPES
from ptx.faults import Unknown
from ptx.small_programs import ADDED, ZEROS, run

WIDTH = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}
REGISTER = {1: "s", 2: "s", 4: "r", 8: "d"}


def computed(form: str, *operands: np.ndarray) -> np.ndarray:
    """An instruction's result for every thread, through a program."""
    known = FORMS[form]
    lines, names = [], []
    for number, array in enumerate(operands):
        size = array.itemsize
        name = f"%{REGISTER[size]}{number}"
        lines += [f"mad.wide.u32 %d19, %t, {size}, %a{number};", f"ld.global.{WIDTH[size]} {name}, [%d19];"]
        names.append(name)
    if known.operands[-1] == "pred":
        lines.append(f"setp.ne.b32 %p1, {names[-1]}, 0;")
        names[-1] = "%p1"
    if known.result == "pred":
        lines += [f"{form} %p2, {', '.join(names)};", "selp.b32 %r18, 1, 0, %p2;"]
        size, into = 4, "%r18"
    else:
        size = np.dtype(TYPES[known.result]).itemsize
        into = f"%{REGISTER[size]}18"
        lines.append(f"{form} {into}, {', '.join(names)};")
    result = np.zeros(len(operands[0]), TYPES[known.result] if size != 4 or known.result != "pred" else np.uint32)
    lines += [f"mad.wide.u32 %d19, %t, {size}, %a{len(operands)};", f"st.global.{WIDTH[size]} [%d19], {into};"]
    threads = len(result)
    run("\n".join(lines), *operands, result, threads=threads)
    return result


SPECIAL = np.array([0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3.4e38, 65504.0, 1 / 3], np.float32)
GENERATOR = np.random.default_rng(7)


def floats(number: int, dtype=np.float32) -> list[np.ndarray]:
    """Every combination of special values, and random ones of all magnitudes; in whole warps."""
    columns = np.array(list(itertools.product(SPECIAL, repeat=number))[:512], np.float32).T
    random = GENERATOR.standard_normal((number, 512)) * np.exp2(GENERATOR.integers(-30, 30, (number, 512)))
    both = [np.concatenate([column, values.astype(np.float32)]) for column, values in zip(columns, random, strict=True)]
    return [np.ascontiguousarray(values[: len(values) // 32 * 32].astype(dtype)) for values in both]


def in_parts(form: str, operands: list[np.ndarray]) -> np.ndarray:
    """At most 1,024 threads at a time."""
    return np.concatenate(
        [computed(form, *(array[at : at + 512].copy() for array in operands)) for at in range(0, len(operands[0]), 512)]
    )


def assert_equal_values(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Bitwise, but NaN is NaN."""
    assert ours.dtype == theirs.dtype
    both_nan = np.isnan(ours) & np.isnan(theirs)
    bits = f"u{ours.itemsize}"
    np.testing.assert_array_equal(np.where(both_nan, 0, ours.view(bits)), np.where(both_nan, 0, theirs.view(bits)))


def tensors(arrays) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize(
    ("form", "number", "oracle"),
    [
        ("add.f32", 2, torch.add), ("sub.f32", 2, torch.sub), ("mul.f32", 2, torch.mul), ("neg.f32", 1, torch.neg),
        ("abs.f32", 1, torch.abs), ("div.rn.f32", 2, torch.div),
        ("sqrt.rn.f32", 1, lambda a: a.double().sqrt().float()),  # torch.sqrt of float32 is an ulp off on AMD CPUs
        ("min.f32", 2, lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.minimum(a, b)))),
        ("max.f32", 2, lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.maximum(a, b)))),
    ],
)  # fmt: skip
def test_floating_point_instructions_are_torchs(form, number, oracle):
    operands = floats(number)
    if form[:3] in ("min", "max"):  # torch leaves the sign of zero open
        keep = ~((operands[0] == 0) & (operands[1] == 0))
        operands = [np.ascontiguousarray(values[keep][: keep.sum() // 32 * 32]) for values in operands]
    assert_equal_values(in_parts(form, operands), oracle(*tensors(operands)).numpy())


def test_the_smaller_of_two_zeros_is_the_negative_one():
    zeros = np.tile(np.array([0.0, -0.0], np.float32), 16)
    other = np.ascontiguousarray(zeros[::-1])
    assert (
        np.signbit(computed("min.f32", zeros, other)).all() and not np.signbit(computed("max.f32", zeros, other)).any()
    )


def test_fused_products_and_sums_are_rounded_once_like_the_c_librarys():
    library = ctypes.CDLL("libm.so.6")
    library.fmaf.restype, library.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b, c = floats(3)
    near = np.float32(1) + np.arange(32, dtype=np.float32) * np.float32(2.0**-23)  # ties of the exact sum
    a, b = np.concatenate([a, near]), np.concatenate([b, near[::-1]])
    c = np.concatenate([c, np.full(32, -(2.0**-60), np.float32)])
    theirs = np.array([library.fmaf(*values) for values in zip(a, b, c, strict=True)], np.float32)
    assert_equal_values(in_parts("fma.rn.f32", [a, b, c]), theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_products_and_sums_are_rounded_down_from_what_fractions_give(dtype):
    (values,) = floats(1, dtype)
    values = values[np.abs(values) < 1e30][:480]
    small = [np.full(32, value, dtype) for value in (2.0**-50, -(2.0**-50), 1.0)]  # far below half a step of the sum
    a, b, c = (np.concatenate([np.roll(values, 7 * n), tail]) for n, tail in enumerate(small))
    kind = f"f{8 * np.dtype(dtype).itemsize}"
    for x, y, z, ours in zip(a, b, c, in_parts(f"fma.rm.{kind}", [a, b, c]), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert Fraction(float(ours)) <= exact < Fraction(float(np.nextafter(ours, dtype(np.inf))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_like_torch(dtype):
    (values,) = floats(1)
    ties = (np.arange(0x3F800000, 0x3F800000 + 64 * 0x800, 0x800, np.uint32)).view(np.float32)
    values = np.concatenate([values, ties])
    values = np.ascontiguousarray(values[: len(values) // 32 * 32])
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    ours = torch.from_numpy(in_parts(f"cvt.rn.{kind}.f32", [values]).view(np.int16)).view(dtype)
    theirs = torch.from_numpy(values).to(dtype)
    assert_equal_values(ours.float().numpy(), theirs.float().numpy())
    bits = theirs.view(torch.int16).numpy().view(np.uint16)
    back = in_parts(f"cvt.f32.{kind}", [bits if kind == "bf16" else bits.view(np.float16)])
    assert_equal_values(back, theirs.float().numpy())
    packed = in_parts(f"cvt.rn.{kind}x2.f32", [values, np.roll(values, 1)])
    finite = ~np.isnan(values) & ~np.isnan(np.roll(values, 1))
    both = (bits.astype(np.uint32) << 16 | np.roll(bits, 1))[finite]
    np.testing.assert_array_equal(packed[finite], both)


def _signed(value: int, bits: int) -> int:
    return (value & (1 << bits) - 1) - (value >> bits - 1 & 1) * (1 << bits)


def _field(a: int, start: int, length: int) -> int:
    return (a & 0xFFFFFFFF) >> min(start, 32) & (1 << length) - 1


def _bytes(a: int, b: int, selector: int) -> int:
    pool = list(struct.pack("<II", a & 0xFFFFFFFF, b & 0xFFFFFFFF))
    chosen = [selector >> 4 * n & 15 for n in range(4)]
    return int.from_bytes([(0xFF * (pool[c & 7] >> 7)) if c & 8 else pool[c & 7] for c in chosen], "little")


INTEGER = {
    "add.s32": lambda a, b: a + b, "sub.s32": lambda a, b: a - b, "mul.lo.s32": lambda a, b: a * b,
    "mul.wide.s32": lambda a, b: a * b, "mul.wide.u32": lambda a, b: (a % 2**32) * (b % 2**32),
    "mad.lo.s32": lambda a, b, c: a * b + c, "mul.hi.s32": lambda a, b: a * b >> 32,
    "div.s32": lambda a, b: (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else None,
    "div.u64": lambda a, b: a % 2**64 // (b % 2**64) if b else None,
    "rem.s32": lambda a, b: (abs(a) % abs(b)) * (-1 if a < 0 else 1) if b else None,
    "div.u32": lambda a, b: a % 2**32 // (b % 2**32) if b else None, "min.s32": min, "max.s32": max,
    "min.u32": lambda a, b: min(a % 2**32, b % 2**32), "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b, "neg.s32": lambda a: -a, "popc.b32": lambda a: (a % 2**32).bit_count(),
    "shl.b32": lambda a, b: 0 if b % 2**32 > 31 else a << b % 2**32,
    "shr.u32": lambda a, b: 0 if b % 2**32 > 31 else a % 2**32 >> b % 2**32,
    "shr.s32": lambda a, b: a >> min(b % 2**32, 31), "cvt.s64.s32": lambda a: a, "cvt.u64.u32": lambda a: a % 2**32,
    "bfe.u32": lambda a, b, c: _field(a, b & 31, c & 31), "prmt.b32": lambda a, b, c: _bytes(a, b, c),
    "setp.lt.s32": lambda a, b: a < b, "setp.gt.u32": lambda a, b: a % 2**32 > b % 2**32,
    "bfe.s32": lambda a, b, c: _signed(_field(a, b & 7, (c & 15) + 1), (c & 15) + 1),
}  # fmt: skip


@pytest.mark.parametrize("form", INTEGER)
def test_integer_instructions_are_pythons(form):
    oracle = INTEGER[form]
    values = np.concatenate([np.array([0, 1, -1, 2**31 - 1, -(2**31), 31, 32, 33]), GENERATOR.integers(-99, 99, 56)])
    number = len(FORMS[form].operands)
    grid = list(itertools.product(values, repeat=min(number, 2)))[:: 4 if number > 1 else 1]
    size = np.dtype(TYPES[FORMS[form].operands[0]]).itemsize
    columns = [np.array(column, f"i{size}") for column in zip(*grid, strict=True)]
    columns += [GENERATOR.permutation(columns[0])] * (number - len(columns))
    if form == "bfe.u32":
        columns[1:] = [column & 31 for column in columns[1:]]
    if form == "bfe.s32":
        columns[1:] = [columns[1] & 7, (columns[2] & 15) + 1]
        oracle = lambda a, b, c: _signed(_field(a, b, c), c)  # noqa: E731
    columns = [np.ascontiguousarray(column[: len(column) // 32 * 32]) for column in columns]
    ours = in_parts(form, columns)
    for result, *operands in zip(ours, *columns, strict=True):
        expected = oracle(*map(int, operands))
        if expected is not None:
            assert int(result) % 2 ** (8 * ours.itemsize) == expected % 2 ** (8 * ours.itemsize), operands


def test_shuffles_take_from_the_lane_that_the_manual_says():
    values = GENERATOR.integers(0, 999, (3, 32)).astype(np.uint32)
    lanes = range(32)
    for mode, by, clamp, source in [
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 5, 31, lambda lane: lane + 5 if lane + 5 <= 31 else lane),
        ("bfly", 6, 31, lambda lane: lane ^ 6),
        ("idx", 9, 31, lambda lane: 9),
        ("idx", 1, 0x1C1F & ~0x3 | 0x3, lambda lane: lane & 28 | 1),  # groups of four
    ]:
        moved, _ = warps.shuffle(mode, values, np.full_like(values, by), np.full_like(values, clamp))
        np.testing.assert_array_equal(moved, values[:, [source(lane) for lane in lanes]], mode)


@pytest.mark.parametrize(("form", "kind"), [(form, kind) for form, (kind, _) in warps.MATRICES.items()])
def test_matrix_products_use_the_fragments_of_the_manual(form, kind):
    """PTX ISA, "Matrix Fragments for mma.m16n8k8" and "for mma.m16n8k16 with floating point type"."""
    depth = warps.MATRICES[form][1]
    a, b, c = (torch.randn(*shape) for shape in ((16, depth), (depth, 8), (16, 8)))
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    a, b = (matrix.to(torch.bfloat16).to(dtype) for matrix in (a, b))  # exact in each type

    def bits(values: list[torch.Tensor]) -> int:
        return int.from_bytes(torch.stack(values).view(torch.uint8).numpy().tobytes(), "little")

    left, right, sums = (np.zeros((count, 32), np.uint32) for count in (4, 2, 4))
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        if kind == "tf32":
            left[:, lane] = [bits([a[group + 8 * (i % 2), member + 4 * (i // 2)]]) for i in range(4)]
            right[:, lane] = [bits([b[member + 4 * i, group]]) for i in range(2)]
        else:
            for i in range(8):
                row = group if i < 2 or 4 <= i < 6 else group + 8
                column = member * 2 + (i & 1) + (8 if i >= 4 else 0)
                left[i // 2, lane] |= np.uint32(bits([a[row, column]]) << 16 * (i % 2))
            for i in range(4):
                right[i // 2, lane] |= np.uint32(bits([b[member * 2 + (i & 1) + 8 * (i >= 2), group]]) << 16 * (i % 2))
        sums[:, lane] = [bits([c[group + 8 * (i >= 2), member * 2 + (i & 1)]]) for i in range(4)]
    rows = [[register[None] for register in group] for group in (left, right, sums)]
    ours = warps.multiply(form, *rows)
    expected = a.double() @ b.double() + c.double()
    for lane in range(32):
        for i in range(4):
            value = ours[i].view(np.float32)[0, lane]
            assert value == pytest.approx(expected[lane // 4 + 8 * (i >= 2), lane % 4 * 2 + (i & 1)].item(), abs=1e-5)


def test_matrices_are_loaded_from_shared_memory_straight_and_transposed():
    """PTX ISA, "ldmatrix": thread 4 r + c gets elements 2 c and 2 c + 1 of row r."""
    values = np.arange(4 * 64, dtype=np.uint16)
    for transposed in ("", ".trans"):
        result = np.zeros((32, 4), np.uint32)
        run(
            "mul.wide.u32 %d1, %t, 16;\nadd.s64 %d2, %a0, %d1;\nld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d2];\n"
            "shl.b32 %m, %t, 4;\nmov.b32 %r9, memory;\nadd.s32 %m, %m, %r9;\n"
            "st.shared.v4.b32 [%m], {%r1, %r2, %r3, %r4};\nbar.sync 0;\n"
            f"ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 {{%r1, %r2, %r3, %r4}}, [%m];\n"
            "add.s64 %d2, %a1, %d1;\nst.global.v4.b32 [%d2], {%r1, %r2, %r3, %r4};",
            values, result, threads=32, shared=512,
        )  # fmt: skip
        matrices = values.reshape(4, 8, 8)
        matrices = matrices.transpose(0, 2, 1) if transposed else matrices
        for lane, number in itertools.product(range(32), range(4)):
            low, high = map(int, matrices[number, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])
            assert result[lane, number] == low | high << 16


def test_threads_with_equal_values_are_matched_among_those_in_their_mask():
    values, result = GENERATOR.integers(0, 5, 64).astype(np.uint32), np.zeros(64, np.uint32)
    for halves in (False, True):
        members = (
            "setp.lt.u32 %p1, %r3, 16;\nselp.b32 %r4, 0xFFFF, 0xFFFF0000, %p1;\n" if halves else "mov.u32 %r4, -1;\n"
        )
        run(
            f"and.b32 %r3, %t, 31;\n{members}add.s64 %d1, %a0, %w;\nld.global.nc.b32 %r1, [%d1];\n"
            "match.any.sync.b32 %r2, %r1, %r4;\nadd.s64 %d2, %a1, %w;\nst.global.b32 [%d2], %r2;",
            values, result,
        )  # fmt: skip
        for thread, same in enumerate(result):
            size = 16 if halves else 32
            group = range(thread // size * size, (thread // size + 1) * size)
            assert same == sum(1 << other % 32 for other in group if values[other] == values[thread])


@pytest.mark.parametrize("line", ["atom.shared.add.u32 %r3, [%r2], %t;", "red.shared.add.u32 [%r2], %t;"])
def test_atomic_additions_count_every_thread(line):
    result = np.zeros(64, np.uint32)
    run(
        f"{ZEROS}{ADDED}{line}\nbar.sync 0;\nld.shared.b32 %r1, [%m];\n"
        "add.s64 %d1, %a0, %w;\nst.global.b32 [%d1], %r1;",
        result, shared=256,
    )  # fmt: skip
    np.testing.assert_array_equal(result, np.bincount(np.arange(64) % 8, np.arange(64), minlength=64))


def test_a_kernel_of_several_is_chosen_by_its_name():
    entries = "".join(
        f".entry {name}(\n.param .u64 p\n)\n{{\n.shared .align 4 .u32 of_{name};\n"
        f".loc 2 9 3, function_name $x, inlined_at 1 {at} 5\n"
        "bar.sync 0;\nret;\n}\n"
        for name, at in (("first", 7), ("second", 8))
    )
    text = f'.shared .align 4 .u32 total;\n{entries}.file 1 "some/rows.cu"\n.file 2 "cuda/shuffles.hpp"\n'
    chosen = parser.parse(text, "second")
    assert chosen.name == "second" and chosen.instructions[0].source == "rows.cu:8"
    assert chosen.shared == {"total": 0, "of_second": 4} and chosen.shared_bytes == 8
    with pytest.raises(Unknown, match="2 kernels"):
        parser.parse(text)


@pytest.mark.parametrize(
    "line",
    [
        "atom.shared.add.u32 %r1, [%r9], %t;\nadd.s32 %r2, %r1, 1;",
        "nanosleep.u32 20;",
        "mma.sync.aligned.m8n8k4.row.col.f64 %r1, %r2, %r3;",
        "abs.s8 %s1, %s2;",
    ],
)
def test_unknown_instructions_are_refused_by_name(line):
    with pytest.raises(Unknown, match=line.split()[0]):
        run(line, np.zeros(64, np.uint32))
