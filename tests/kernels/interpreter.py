"""Repairs of Triton's interpreter, in which kernels run without a GPU. Importing this module applies them.

The interpreter keeps bfloat16 as raw 16-bit integers and, up to 3.9 at least, multiplies and adds those integers, and
truncates instead of rounding. With the repair, bfloat16 operands are widened to float32 first, and results are rounded
to the nearest even bfloat16.

For each call of a device function, the interpreter looks through all of `triton.language` for functions to replace,
which takes more than half of a kernel's time. With the repair, it does so once for each module and launch.
"""

from __future__ import annotations

import os

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

BF16 = tl.bfloat16


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(numbers: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    nearest = ((bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), nearest)


def is_bf16(handle) -> bool:
    return handle.dtype.scalar == BF16


def numbers_of(handle) -> np.ndarray:
    return widened(handle.data) if is_bf16(handle) else handle.data


def repair() -> None:
    builder = InterpreterBuilder
    plain = {name: getattr(builder, name) for name in ("create_dot", "binary_op", "unary_op", "cast_impl")}
    plain_cast_fp = builder.create_fp_to_fp

    def create_dot(self, a, b, d, *rest):
        if not (is_bf16(a) or is_bf16(b)):
            return plain["create_dot"](self, a, b, d, *rest)
        product = np.matmul(numbers_of(a), numbers_of(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    def binary_op(self, lhs, rhs, op):
        if not is_bf16(lhs):
            return plain["binary_op"](self, lhs, rhs, op)
        result = op(widened(lhs.data), numbers_of(rhs))
        return TensorHandle(result if result.dtype == np.bool_ else rounded(result), lhs.dtype.scalar)

    def unary_op(self, arg, op):
        if not is_bf16(arg):
            return plain["unary_op"](self, arg, op)
        return TensorHandle(rounded(op(widened(arg.data))), BF16)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if target == BF16 and source.is_floating():
            return TensorHandle(rounded(np.asarray(src.data, dtype=np.float32)), BF16)
        if source == BF16 and target.is_floating():
            return TensorHandle(widened(src.data).astype(interpreter._get_np_dtype(target)), target)
        return plain["cast_impl"](self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if BF16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return plain_cast_fp(self, src, dst_type, rounding_mode)

    builder.create_dot, builder.binary_op, builder.unary_op, builder.cast_impl = (
        create_dot,
        binary_op,
        unary_op,
        cast_impl,
    )
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast_impl)
    builder.create_fp_to_fp = create_fp_to_fp


def replace_once() -> None:
    plain, launch = interpreter._patch_lang, GridExecutor.__call__
    done: set[str] = set()

    def patch_lang(fn):
        if fn.__module__ in done:
            return None
        done.add(fn.__module__)
        return plain(fn)

    def launched(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, GridExecutor.__call__ = patch_lang, launched


if os.environ.get("TRITON_INTERPRET") == "1":
    repair()
    replace_once()
