/* The emulator for launching code in other languages, as a second driver beside CUDA's.
 *
 * Functions that can fail return a message, or null where all went well. The message stays valid until the thread's next
 * call. Memory is the caller's own. One launch at a time.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Runs all blocks to their end, a multiple of the size of the kernel's clusters. `params` is the kernel's parameter struct
 * of `params_bytes` bytes. */
const char* emulator_launch(const char* kernel, int64_t blocks, const void* params, size_t params_bytes);
/* The launch shape that was given to PTX_KERNEL. */
const char* emulator_kernel(const char* kernel, uint32_t* threads, uint32_t* shared_bytes, size_t* params_bytes);

/* The name of the kernel of this index, null past the last. */
const char* emulator_kernel_name(size_t index);

/* What launches may touch, and how; without any range they may touch everything. */
enum EmulatorUse { EMULATOR_READ_ONLY, EMULATOR_WRITE_ONCE, EMULATOR_READ_WRITE };
void emulator_add_range(const void* base, size_t bytes, const char* name, enum EmulatorUse use);
void emulator_remove_range(const void* base);

/* Fills the 128 bytes of a three-dimensional tensor map: `depth` matrices, `matrix_bytes` apart, of `height` rows, `row_bytes`
 * apart, of `width` elements. A box is a part of one matrix. */
const char* emulator_tensor_map(void* map, const void* base, uint32_t element_bytes, uint64_t width, uint64_t height, uint64_t depth,
                                uint64_t row_bytes, uint64_t matrix_bytes, uint32_t box_width, uint32_t box_height, int swizzle128);

/* How launches are run from now on. */
enum EmulatorCompletion { EMULATOR_LATE, EMULATOR_EARLY, EMULATOR_RANDOM };
void emulator_set_schedule(enum EmulatorCompletion completion, int shuffle, uint64_t seed, int check_races, int workers);

#ifdef __cplusplus
}
#endif
