"""Products of rows, ordered by expert, with the weights of the experts.

The kernels find each expert's weight through a table of addresses, so weights stay where data parallelism put them.
They find each expert's rows through `ends`, int32 [experts] on the device, so the host does not wait for the device.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskmoe.transformer.kernels import launching

_ELEMENT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tile(NamedTuple):
    """The part of a product that a program computes, and Triton's options for the program.

    Sizes are fixed by dtype and shapes instead of measured, so that results do not differ from one run to the next.
    """

    tile_rows: int
    tile_columns: int
    tile_depth: int
    num_warps: int
    num_stages: int


def _tile_of_rows(rows: Tensor, columns: int, num_experts: int) -> Tile:
    """Return the tile for products of rows with weights."""
    if rows.dtype == torch.float32:
        return Tile(64, 64, 16, 4, 2)
    if len(rows) <= 64 * num_experts:
        return Tile(64, 128, 64, 4, 3)
    is_wide = columns > 128 and _has_large_shared_memory(rows.device)
    return Tile(128, 256 if is_wide else 128, 64, 8, 3)


def _tile_of_weight(dtype: torch.dtype) -> Tile:
    """Return the tile for gradients of weights, which also holds the values that the products are added to."""
    return Tile(64, 64, 16, 4, 2) if dtype == torch.float32 else Tile(128, 128, 64, 8, 3)


def multiply_rows(rows: Tensor, ends: Tensor, weights: Sequence[Tensor], transpose: bool) -> Tensor:
    """Multiply the rows of each expert by the expert's weight.

    Args:
        rows: [rows, depth], ordered by expert.
        ends: int32 [experts], the end of each expert's rows.
        weights: the contiguous weights of the experts, [depth, columns], or [columns, depth] if `transpose` is set.
        transpose: multiply by the transposed weights.

    Returns:
        [rows, columns].
    """
    rows = rows.contiguous()
    num_rows, depth = rows.shape
    columns = weights[0].shape[0 if transpose else 1]
    product = rows.new_empty(num_rows, columns)
    addresses = tuple(weight.data_ptr() for weight in weights)
    tile = _tile_of_rows(rows, columns, len(weights))
    # This is an upper bound, because each expert's last tile may be incomplete.
    num_row_tiles = num_rows // tile.tile_rows + len(weights)
    launching.launch(
        _multiply_rows,
        (num_row_tiles * triton.cdiv(columns, tile.tile_columns),),
        rows,
        _address_table(addresses, rows.device),
        ends,
        product,
        depth=depth,
        columns=columns,
        transpose=transpose,
        num_experts=len(weights),
        padded_experts=triton.next_power_of_2(len(weights)),
        aligned=_are_aligned(addresses),
        **tile._asdict(),
    )
    return product


def multiply_transposed(
    gradient: Tensor, rows: Tensor, ends: Tensor, results: Sequence[Tensor | None], accumulate: bool
) -> None:
    """Multiply the transposed output gradient of each expert by the expert's rows: the gradient of the weight.

    Products are summed in fp32 and rounded once. The result of an expert without rows is 0.

    Args:
        gradient: [rows, out], ordered by expert.
        rows: [rows, in], ordered by expert.
        ends: int32 [experts], the end of each expert's rows.
        results: where to write the experts' products [out, in]: contiguous tensors of any dtype. The products of
            experts with None are left out.
        accumulate: add the products to the results, which keeps the results of experts without rows.
    """
    gradient, rows = gradient.contiguous(), rows.contiguous()
    out_size, in_size = gradient.shape[1], rows.shape[1]
    tile = _tile_of_weight(rows.dtype)
    num_tiles = triton.cdiv(out_size, tile.tile_rows) * triton.cdiv(in_size, tile.tile_columns)
    for dtype in {result.dtype for result in results if result is not None}:
        addresses = tuple(0 if result is None or result.dtype != dtype else result.data_ptr() for result in results)
        launching.launch(
            _multiply_transposed,
            (num_tiles * len(results),),
            gradient,
            rows,
            ends,
            _address_table(addresses, rows.device),
            out_size=out_size,
            in_size=in_size,
            result_type=_ELEMENT[dtype],
            accumulate=accumulate,
            aligned=_are_aligned(addresses),
            **tile._asdict(),
        )


def _are_aligned(addresses: tuple[int, ...]) -> bool:
    """Return whether Triton can copy 16 bytes at once from or to all addresses."""
    return all(address % 16 == 0 for address in addresses)


@cache
def _has_large_shared_memory(device: torch.device) -> bool:
    """Return whether programs can use 160 KiB of shared memory, as on data-centre GPUs since the A100."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 160 * 1024


@lru_cache(maxsize=4096)
def _address_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Return addresses as int64 [experts] on the device; kept, because data parallelism does not move its buffers."""
    # Only a copy from pinned memory does not wait for the device.
    table = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


@triton.jit
def _to_pointer(address: tl.tensor, element: tl.constexpr, aligned: tl.constexpr) -> tl.tensor:
    """Turn an address into a pointer."""
    pointer = address.to(tl.pointer_type(element))  # pyrefly: ignore[bad-argument-type]
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _multiply_rows(
    rows: tl.tensor,
    weights: tl.tensor,
    ends: tl.tensor,
    product: tl.tensor,
    depth: tl.constexpr,
    columns: tl.constexpr,
    transpose: tl.constexpr,
    num_experts: tl.constexpr,
    padded_experts: tl.constexpr,
    aligned: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_depth: tl.constexpr,
) -> None:
    """Compute one tile of `multiply_rows`: some columns of some rows of one expert."""
    # Consecutive programs share weights and rows: 8 tiles of rows for each tile of columns.
    num_column_tiles = tl.cdiv(columns, tile_columns)
    program, num_row_tiles = tl.program_id(0), tl.num_programs(0) // num_column_tiles
    row_tile, column_tile = tl.swizzle2d(
        program // num_column_tiles, program % num_column_tiles, num_row_tiles, num_column_tiles, 8
    )
    # Find the expert with this tile of rows.
    experts = tl.arange(0, padded_experts)
    all_ends = tl.load(ends + experts, experts < num_experts, other=0)
    all_starts = tl.load(ends + experts - 1, (experts > 0) & (experts < num_experts), other=0)
    tiles = tl.cdiv(all_ends - all_starts, tile_rows)
    expert = tl.sum((tl.cumsum(tiles) <= row_tile).to(tl.int32))
    if expert >= num_experts:
        return
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0))
    is_expert = experts == expert
    start = tl.sum(tl.where(is_expert, all_starts, 0)) + (row_tile - first_tile) * tile_rows
    num_rows = tl.sum(tl.where(is_expert, all_ends, 0)) - start
    weight = _to_pointer(tl.load(weights + expert), rows.dtype.element_ty, aligned)  # pyrefly: ignore[missing-attribute]
    # Multiply tiles of [rows, depth] and [depth, columns].
    row, inner = tl.arange(0, tile_rows), tl.arange(0, tile_depth)
    column = column_tile * tile_columns + tl.arange(0, tile_columns)
    row_pointers = rows + start.to(tl.int64) * depth + row[:, None] * depth + inner[None, :]
    if transpose:
        weight_pointers = weight + inner[:, None] + column[None, :] * depth
    else:
        weight_pointers = weight + inner[:, None] * columns + column[None, :]
    sums = tl.zeros((tile_rows, tile_columns), tl.float32)
    for first in range(0, depth, tile_depth):
        is_inside = inner < depth - first
        left = tl.load(row_pointers, (row < num_rows)[:, None] & is_inside[None, :], other=0.0)
        right = tl.load(weight_pointers, is_inside[:, None] & (column < columns)[None, :], other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
        row_pointers += tile_depth
        weight_pointers += tile_depth * (1 if transpose else columns)
    products = product + start.to(tl.int64) * columns + row[:, None] * columns + column[None, :]
    is_valid = (row < num_rows)[:, None] & (column < columns)[None, :]
    tl.store(products, sums.to(product.dtype.element_ty), is_valid)  # pyrefly: ignore[missing-attribute]


@triton.jit
def _multiply_transposed(
    gradient: tl.tensor,
    rows: tl.tensor,
    ends: tl.tensor,
    results: tl.tensor,
    out_size: tl.constexpr,
    in_size: tl.constexpr,
    result_type: tl.constexpr,
    accumulate: tl.constexpr,
    aligned: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_depth: tl.constexpr,
) -> None:
    """Compute one tile of `multiply_transposed`: a part of the gradient of one expert's weight."""
    out_tiles, in_tiles = tl.cdiv(out_size, tile_rows), tl.cdiv(in_size, tile_columns)
    expert, tile = tl.program_id(0) // (out_tiles * in_tiles), tl.program_id(0) % (out_tiles * in_tiles)
    # Consecutive programs share gradients and rows.
    out_tile, in_tile = tl.swizzle2d(tile // in_tiles, tile % in_tiles, out_tiles, in_tiles, 8)
    start, end = tl.load(ends + expert - 1, expert > 0, other=0), tl.load(ends + expert)
    address = tl.load(results + expert)
    if (address == 0) | (accumulate & (start == end)):
        return
    # Multiply tiles of [out, rows] and [rows, in].
    row, out = tl.arange(0, tile_depth), out_tile * tile_rows + tl.arange(0, tile_rows)
    column = in_tile * tile_columns + tl.arange(0, tile_columns)
    gradient_pointers = gradient + start.to(tl.int64) * out_size + row[None, :] * out_size + out[:, None]
    row_pointers = rows + start.to(tl.int64) * in_size + row[:, None] * in_size + column[None, :]
    sums = tl.zeros((tile_rows, tile_columns), tl.float32)
    for first in range(start, end, tile_depth):
        is_inside = row < end - first
        left = tl.load(gradient_pointers, (out < out_size)[:, None] & is_inside[None, :], other=0.0)
        right = tl.load(row_pointers, is_inside[:, None] & (column < in_size)[None, :], other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
        gradient_pointers += tile_depth * out_size
        row_pointers += tile_depth * in_size
    result = _to_pointer(address, result_type, aligned) + out[:, None] * in_size + column[None, :]
    is_valid = (out < out_size)[:, None] & (column < in_size)[None, :]
    if accumulate:
        sums += tl.load(result, is_valid, other=0.0).to(tl.float32)
    tl.store(result, sums.to(result_type), is_valid)
