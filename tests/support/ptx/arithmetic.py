"""Instructions that compute a register from registers: ``FORMS`` has a function of numpy arrays for every known form.

Sections of the manual: integer 9.7.1, floating point 9.7.3 and 9.7.4, comparisons 9.7.6, logic and shifts 9.7.8,
conversions 9.7.9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Form:
    """``result = compute(*operands)``, each operand viewed as its type."""

    result: str
    operands: tuple[str, ...]
    compute: Callable[..., np.ndarray]


TYPES = {
    "s8": np.int8, "u8": np.uint8, "b8": np.uint8, "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s32": np.int32,
    "u32": np.uint32, "b32": np.uint32, "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "f16": np.float16,
    "f32": np.float32, "f64": np.float64, "pred": np.bool_, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip
"""bfloat16 and pairs are computed from their bits."""
FORMS: dict[str, Form] = {}


def _add(names: str, types: str, result: str, operands: str, compute) -> None:
    """One form for each name and type; T in ``result`` and ``operands`` is the type."""
    for name in names.split():
        for kind in types.split():
            places = tuple(kind if place == "T" else place for place in operands.split())
            FORMS[f"{name}.{kind}"] = Form(kind if result == "T" else result, places, compute)


def flushed(values: np.ndarray) -> np.ndarray:
    """Subnormal float32 as zero of the same sign."""
    small = np.abs(values) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), values), values) if small.any() else values


def _flushing(compute):
    return lambda *values: flushed(compute(*map(flushed, values)))


def fma32(a, b, c) -> np.ndarray:
    """a * b + c in float32, rounded once."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    total = product + c
    bits = total.view(np.int64)
    # Rounding to float64 first matters only where it yields a tie of float32, or a subnormal.
    if (bits & 0x1FFFFFFF == 0x10000000).any() or (np.abs(total) < 2.0**-125).any():
        back = total - product
        rest = (product - (total - back)) + (c - back)  # of the sum; exact (TwoSum)
        odd = np.isfinite(total) & np.isfinite(rest) & (rest != 0) & (bits & 1 == 0)
        total = (bits + np.where(odd, np.where((rest > 0) == (total > 0), 1, -1), 0)).view(np.float64)
    return total.astype(np.float32)


def fma64(a, b, c) -> np.ndarray:
    """a * b + c in float64, rounded once (over long double, which has 64 bits; a tie of it may differ)."""
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


def _fma_bf16(a, b, c) -> np.ndarray:
    """a * b + c in bfloat16, rounded once: the float32 between is rounded to odd."""
    total = bf16_to_f32(a).astype(np.float64) * bf16_to_f32(b) + bf16_to_f32(c)
    near = total.astype(np.float32)
    even = (near != total) & (near.view(np.uint32) & 1 == 0) & np.isfinite(near)
    return f32_to_bf16(
        np.where(even, np.nextafter(near, np.where(total > near, np.inf, -np.inf), dtype=np.float32), near)
    )


def _fma_f16(a, b, c) -> np.ndarray:
    total = a.astype(np.float64) * b.astype(np.float64) + c
    return np.where(np.isnan(total), 0x7FFF, total.astype(np.float16).view(np.uint16)).astype(np.uint16)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; NaN is 0x7FFF."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def f32_to_f16(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), 0x7FFF, values.astype(np.float16).view(np.uint16)).astype(np.uint16)


def tf32(values: np.ndarray) -> np.ndarray:
    """Tensor cores ignore the low 13 bits of a TF32 operand."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return high.astype(np.uint32) << np.uint32(16) | low


def halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low 16 bits."""
    return (values >> np.uint32(16)).astype(np.uint16), values.astype(np.uint16)


def _in_pairs(compute):
    """``compute`` on both halves of packed pairs."""

    def computed(*operands):
        high, low = zip(*map(halves, operands), strict=True)
        return pair(compute(*high), compute(*low))

    return computed


def _quotient(a, b):
    wide = [value.astype(np.int64) for value in (a, b)]
    quotient = np.abs(wide[0]) // np.where(wide[1] == 0, 1, np.abs(wide[1]))
    return (np.where((wide[0] < 0) != (wide[1] < 0), -quotient, quotient)).astype(a.dtype)


def _remainder(a, b):
    return np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype))


def _shift(kind: str, left: bool):
    bits = np.dtype(TYPES[kind]).itemsize * 8

    def compute(a, by):
        clamped = np.minimum(by, bits - 1).astype(a.dtype)
        moved = a << clamped if left else a >> clamped
        return moved if kind[0] == "s" and not left else np.where(by >= bits, 0, moved).astype(a.dtype)

    return compute


def _field(kind: str):
    """``bfe``: ``length`` bits from ``start``."""

    def compute(a, start, length):
        start, length = start & 0xFF, length & 0xFF
        top = np.minimum(start + length, 32)
        value = a.astype(np.int64) & 0xFFFFFFFF
        value = (value >> np.minimum(start, 63)) & ((1 << np.maximum(top.astype(np.int64) - start, 0)) - 1)
        if kind == "s32":
            sign = (a.astype(np.int64) & 0xFFFFFFFF) >> np.minimum(top.astype(np.int64) - 1, 31) & 1
            value = np.where((length > 0) & (sign == 1), value | -(1 << np.minimum(length.astype(np.int64), 32)), value)
        return value.astype(TYPES[kind])

    return compute


def _extreme(least: bool):
    def compute(a, b):
        chosen = np.fmin(a, b) if least else np.fmax(a, b)
        if np.issubdtype(a.dtype, np.floating):  # -0 is less than +0, and NaN has canonical bits
            zeros = np.logical_or if least else np.logical_and
            signed = zeros(np.signbit(a), np.signbit(b))
            chosen = np.where((a == 0) & (b == 0), np.where(signed, -0.0, 0.0), chosen).astype(a.dtype)
        return chosen

    return compute


def _to_integer(kind: str, to):
    """Rounded by ``to`` and clamped to the type; NaN is 0."""
    least, most = np.iinfo(TYPES[kind]).min, np.iinfo(TYPES[kind]).max

    def compute(a):
        value = np.nan_to_num(to(a.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
        inside = np.clip(value, float(least), float(most))
        exact = np.where(inside >= 2.0**63, 0, inside).astype(np.int64)
        return np.where(value >= float(most), most, exact).astype(TYPES[kind])

    return compute


def _permuted(a, b, selector):
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros_like(a)
    for number in range(4):
        chosen = selector >> np.uint32(4 * number) & np.uint32(0xF)
        byte = both >> (8 * (chosen & np.uint32(7))).astype(np.uint64) & np.uint64(0xFF)
        byte = np.where(chosen & np.uint32(8), np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0)), byte)
        result = result | byte.astype(np.uint32) << np.uint32(8 * number)
    return result


INTEGERS = "s16 u16 s32 u32 s64 u64"
_add("add", INTEGERS, "T", "T T", np.add)
_add("sub", INTEGERS, "T", "T T", np.subtract)
_add("mul.lo", INTEGERS, "T", "T T", np.multiply)
_add("mad.lo", INTEGERS, "T", "T T T", lambda a, b, c: a * b + c)
_add("min", INTEGERS, "T", "T T", np.minimum)
_add("max", INTEGERS, "T", "T T", np.maximum)
_add("div", INTEGERS.replace("u64", ""), "T", "T T", _quotient)
_add("div", "u64", "T", "T T", lambda a, b: a // np.maximum(b, np.uint64(1)))
_add("rem", INTEGERS, "T", "T T", _remainder)
_add("neg", "s16 s32 s64", "T", "T", np.negative)
_add("abs", "s16 s32 s64", "T", "T", np.abs)
_add("and", "b16 b32 b64 pred", "T", "T T", lambda a, b: a & b)
_add("or", "b16 b32 b64 pred", "T", "T T", lambda a, b: a | b)
_add("xor", "b16 b32 b64 pred", "T", "T T", lambda a, b: a ^ b)
_add("not", "b16 b32 b64 pred", "T", "T", lambda a: ~a)
for _kind in ("b16", "b32", "b64"):
    _add("shl", _kind, "T", "T u32", _shift(_kind, left=True))
for _kind in ("u16", "u32", "u64", "s16", "s32", "s64"):
    _add("shr", _kind, "T", "T u32", _shift(_kind, left=False))
for _kind, _wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
    _to = TYPES[_wide]
    _add("mul.wide", _kind, _wide, "T T", lambda a, b, to=_to: a.astype(to) * b.astype(to))
    _add("mad.wide", _kind, _wide, f"T T {_wide}", lambda a, b, c, to=_to: a.astype(to) * b.astype(to) + c)
_add("mul.hi", "s32", "T", "T T", lambda a, b: (a.astype(np.int64) * b >> 32).astype(np.int32))
_add("mul.hi", "u32", "T", "T T", lambda a, b: (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32))
for _kind in ("u32", "s32"):
    _add("bfe", _kind, "T", "T u32 u32", _field(_kind))
_add("popc", "b32", "u32", "T", lambda a: np.unpackbits(a[:, None].view(np.uint8), axis=1).sum(1).astype(np.uint32))
_add("prmt", "b32", "T", "T T T", _permuted)
_add("selp", "b16 b32 b64 u16 s16 u32 s32 u64 s64 f16 f32 f64", "T", "T T pred", lambda a, b, p: np.where(p, a, b))
_add("mov", "b16 b32 b64 u16 s16 u32 s32 u64 s64 f32 f64 pred", "T", "T", lambda a: a)

_COMPARED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
for _name, _compare in _COMPARED.items():
    _add(f"setp.{_name}", f"{INTEGERS} b16 b32 b64", "pred", "T T", _compare)
    _ordered = _compare if _name != "ne" else lambda a, b: (a != b) & (a == a) & (b == b)
    _add(f"setp.{_name}", "f16 f32 f64", "pred", "T T", _ordered)
    FORMS[f"setp.{_name}.bf16"] = Form(
        "pred", ("bf16", "bf16"), lambda a, b, c=_ordered: c(bf16_to_f32(a), bf16_to_f32(b))
    )
    _add(f"setp.{_name}u", "f16 f32 f64", "pred", "T T", lambda a, b, c=_compare: c(a, b) | (a != a) | (b != b))
_add("setp.num", "f16 f32 f64", "pred", "T T", lambda a, b: (a == a) & (b == b))
_add("setp.nan", "f16 f32 f64", "pred", "T T", lambda a, b: (a != a) | (b != b))

_FLOATS = {
    "add add.rn": ("T T", np.add), "sub sub.rn": ("T T", np.subtract), "mul mul.rn": ("T T", np.multiply),
    "min": ("T T", _extreme(least=True)), "max": ("T T", _extreme(least=False)), "neg": ("T", np.negative),
    "abs": ("T", np.abs), "div.rn": ("T T", np.divide), "sqrt.rn": ("T", np.sqrt), "rcp.rn": ("T", lambda a: 1 / a),
}  # fmt: skip
for _names, (_places, _compute) in _FLOATS.items():
    _add(_names, "f32 f64", "T", _places, _compute)
    _add(" ".join(f"{_name}.ftz" for _name in _names.split()), "f32", "T", _places, _flushing(_compute))
_APPROXIMATE = {
    "ex2": ("T", np.exp2), "lg2": ("T", np.log2),
    "rsqrt": ("T", lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32)),
    "rcp": ("T", lambda a: 1 / a), "sqrt": ("T", np.sqrt), "div": ("T T", np.divide),
}  # fmt: skip
for _name, (_places, _compute) in _APPROXIMATE.items():
    _add(f"{_name}.approx", "f32", "T", _places, _compute)
    _add(f"{_name}.approx.ftz", "f32", "T", _places, _flushing(_compute))
_add("div.full", "f32", "T", "T T", np.divide)
_add("fma.rn", "f32", "T", "T T T", fma32)
_add("fma.rn.ftz", "f32", "T", "T T T", _flushing(fma32))
_add("fma.rn", "f64", "T", "T T T", fma64)


def _fma_floored(a, b, c):
    """a * b + c, rounded once toward minus infinity; in float64 over long double."""
    product = a.astype(np.longdouble) * b  # of float32, exact
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)  # of the sum; exact (TwoSum)
    near = total.astype(a.dtype)
    return np.where((near > total) | (near == total) & (rest < 0), np.nextafter(near, a.dtype.type(-np.inf)), near)


_add("fma.rm", "f32 f64", "T", "T T T", _fma_floored)

_INTEGER_TYPES = [kind for kind in TYPES if kind[0] in "su"]
for _from in _INTEGER_TYPES:
    for _to in _INTEGER_TYPES:
        FORMS[f"cvt.{_to}.{_from}"] = Form(_to, (_from,), lambda a, to=TYPES[_to]: a.astype(to))
    for _to in ("f32", "f64"):
        FORMS[f"cvt.rn.{_to}.{_from}"] = Form(_to, (_from,), lambda a, to=TYPES[_to]: a.astype(to))
_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
for _name, _to_integral in _ROUNDINGS.items():
    for _from in ("f32", "f64"):
        FORMS[f"cvt.{_name}.{_from}.{_from}"] = Form(_from, (_from,), _to_integral)
        for _to in ("s32", "u32", "s64", "u64"):
            for _saturated in ("", ".sat"):
                FORMS[f"cvt.{_name}{_saturated}.{_to}.{_from}"] = Form(_to, (_from,), _to_integer(_to, _to_integral))
FORMS |= {
    "add.f16": Form("f16", ("f16",) * 2, np.add),
    "add.bf16x2": Form("b32", ("b32",) * 2, _in_pairs(lambda a, b: _fma_bf16(a, np.full_like(a, 0x3F80), b))),
    "add.f16x2": Form(
        "b32", ("b32",) * 2, _in_pairs(lambda a, b: (a.view(np.float16) + b.view(np.float16)).view(np.uint16))
    ),
    "mul.f16": Form("f16", ("f16",) * 2, np.multiply),
    "fma.rn.bf16": Form("b16", ("bf16",) * 3, _fma_bf16),
    "fma.rn.f16": Form("b16", ("f16",) * 3, _fma_f16),
    "cvt.f32.f16": Form("f32", ("f16",), lambda a: a.astype(np.float32)),
    "cvt.f32.bf16": Form("f32", ("bf16",), bf16_to_f32),
    "cvt.f64.f32": Form("f64", ("f32",), lambda a: a.astype(np.float64)),
    "cvt.rn.f32.f64": Form("f32", ("f64",), lambda a: a.astype(np.float32)),
    "cvt.sat.f32.f32": Form("f32", ("f32",), lambda a: np.where(a > 0, np.minimum(a, np.float32(1)), np.float32(0))),
    "cvt.rn.f16.f32": Form("b16", ("f32",), f32_to_f16),
    "cvt.rn.bf16.f32": Form("b16", ("f32",), f32_to_bf16),
    "cvt.rn.f16x2.f32": Form("b32", ("f32", "f32"), lambda high, low: pair(f32_to_f16(high), f32_to_f16(low))),
    "cvt.rn.bf16x2.f32": Form("b32", ("f32", "f32"), lambda high, low: pair(f32_to_bf16(high), f32_to_bf16(low))),
}
