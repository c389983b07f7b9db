// Entry points of the grouped products: <kernel>_<math>_<BM>x<BN>_<variant>, <kernel>_wgmma_... of warpgroups.
//
//   math      bf16, f16, f32 (fused multiply-add), tf32 (float tensors)
//   BM x BN   the tile; 128x256 for GPUs with 164 KB of shared memory an SM, 32x128 for few rows an expert
//   variant   of products over rows: nt, the weights run along K in memory; nn, along N
//             of gradients of weights: a or b, the factor that may be gathered
//             any: both of these and every size; the others want rows and bases of tensors at multiples of 16 bytes
#pragma once
#include "tile/shape.cuh"

#define TILE_ENTRY(kernel, Params, math, Math, BM, BN, WM, stages, blocks, variant, ...)                                    \
  PTX_KERNEL(kernel##_##math##_##BM##x##BN##_##variant, (tile::Shape<Math, BM, BN, WM, stages>::THREADS), blocks,              \
             (tile::Shape<Math, BM, BN, WM, stages>::SHARED_BYTES), (kernel<tile::Shape<Math, BM, BN, WM, stages>, __VA_ARGS__>), \
             Params<tile::ElementOf<Math>>)

#define ROW_TILE(kernel, Params, math, Math, ...)                                      \
  TILE_ENTRY(kernel, Params, math, Math, __VA_ARGS__, nt, tile::Major::K, tile::Major::K) \
  TILE_ENTRY(kernel, Params, math, Math, __VA_ARGS__, nn, tile::Major::K, tile::Major::MN)
#define ROW_ANY(kernel, Params, math, Math) \
  TILE_ENTRY(kernel, Params, math, Math, 64, 128, 32, 2, 2, any, tile::Major::ANY, tile::Major::ANY)
#define ROW_TILES_16(kernel, Params, math, Math)            \
  ROW_TILE(kernel, Params, math, Math, 128, 256, 64, 4, 1)  \
  ROW_TILE(kernel, Params, math, Math, 128, 128, 64, 3, 2)  \
  ROW_TILE(kernel, Params, math, Math, 32, 128, 16, 8, 2)   \
  ROW_ANY(kernel, Params, math, Math)
#define ROW_ENTRIES(kernel, Params)                               \
  ROW_TILES_16(kernel, Params, bf16, ptx::bf16)                   \
  ROW_TILES_16(kernel, Params, f16, ptx::f16)                     \
  ROW_TILE(kernel, Params, f32, float, 128, 128, 64, 3, 2)        \
  ROW_TILE(kernel, Params, tf32, tile::tf32, 128, 128, 64, 3, 2)  \
  ROW_ANY(kernel, Params, f32, float)

#define WEIGHT_TILE(kernel, Params, math, Math, ...)                                       \
  TILE_ENTRY(kernel, Params, math, Math, __VA_ARGS__, a, tile::Major::MN, true, false) \
  TILE_ENTRY(kernel, Params, math, Math, __VA_ARGS__, b, tile::Major::MN, false, true)
#define WEIGHT_ANY(kernel, Params, math, Math) \
  TILE_ENTRY(kernel, Params, math, Math, 64, 128, 32, 2, 3, any, tile::Major::ANY, true, true)
#define WEIGHT_TILES_16(kernel, Params, math, Math)            \
  WEIGHT_TILE(kernel, Params, math, Math, 128, 256, 64, 4, 1)  \
  WEIGHT_TILE(kernel, Params, math, Math, 128, 128, 64, 3, 2)  \
  WEIGHT_ANY(kernel, Params, math, Math)
#define WEIGHT_ENTRIES(kernel, Params)                               \
  WEIGHT_TILES_16(kernel, Params, bf16, ptx::bf16)                   \
  WEIGHT_TILES_16(kernel, Params, f16, ptx::f16)                     \
  WEIGHT_TILE(kernel, Params, f32, float, 128, 128, 64, 3, 2)        \
  WEIGHT_TILE(kernel, Params, tf32, tile::tf32, 128, 128, 64, 3, 2)  \
  WEIGHT_ANY(kernel, Params, f32, float)

// By warpgroups, which compute a Tile of one element type.
#define WARPGROUP_ENTRY(kernel, Params, Tile, math, Math, variant, ...)                                                   \
  PTX_CLUSTER_KERNEL(kernel##_wgmma_##math##_128x256_##variant, tile::Tile<Math>::THREADS, 1, tile::Tile<Math>::SHARED_BYTES, \
                     (kernel##_wgmma<tile::Tile<Math>, __VA_ARGS__>), tile::Mapped<Params<Math>>)
#define WARPGROUP_ROWS(kernel, Params, Tile, math, Math)                 \
  WARPGROUP_ENTRY(kernel, Params, Tile, math, Math, nt, tile::Major::K)  \
  WARPGROUP_ENTRY(kernel, Params, Tile, math, Math, nn, tile::Major::MN)
#define WARPGROUP_ROW_ENTRIES(kernel, Params, Tile)   \
  WARPGROUP_ROWS(kernel, Params, Tile, bf16, ptx::bf16) \
  WARPGROUP_ROWS(kernel, Params, Tile, f16, ptx::f16)
#define WARPGROUP_WEIGHTS(kernel, Params, Tile, math, Math)            \
  WARPGROUP_ENTRY(kernel, Params, Tile, math, Math, a, true, false) \
  WARPGROUP_ENTRY(kernel, Params, Tile, math, Math, b, false, true)
#define WARPGROUP_WEIGHT_ENTRIES(kernel, Params, Tile)   \
  WARPGROUP_WEIGHTS(kernel, Params, Tile, bf16, ptx::bf16) \
  WARPGROUP_WEIGHTS(kernel, Params, Tile, f16, ptx::f16)
