/* Peak rate of the multiply instructions of this processor: independent accumulators, operands in
 * registers. Prints one JSON object of GFLOP/s with all threads together; argument: threads. */
#include <cpuid.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TURNS 100000
#define REPETITIONS 20
#define VECTOR_ACCUMULATORS 12
#define TILE_ACCUMULATORS 6
#define EACH(numbers, instruction) ".irp n," numbers "\n\t" instruction "\n\t.endr\n\t"
#define VECTORS "0,1,2,3,4,5,6,7,8,9,10,11"
#define CLOBBERED \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm14", \
        "xmm15"

/* Accumulators 0 to 11 start at zero; both operands (14 and 15) hold ones. */
#define VECTOR_KERNEL(name, width, multiply)                                                          \
    static void name(void) {                                                                         \
        static const float one = 1.0f;                                                               \
        __asm__ volatile(EACH(VECTORS, "vxorps %%xmm\\n, %%xmm\\n, %%xmm\\n")                         \
                         EACH("14,15", "vbroadcastss %1, %%" width "mm\\n")                           \
                         "mov %0, %%ecx\n\t"                                                         \
                         "0:\n\t" EACH(VECTORS, multiply " %%" width "mm14, %%" width "mm15, %%" width "mm\\n") \
                         "dec %%ecx\n\t"                                                             \
                         "jnz 0b\n\t"                                                                \
                         "vzeroupper"                                                                \
                         : : "i"(TURNS), "m"(one) : "ecx", CLOBBERED);                               \
    }

VECTOR_KERNEL(avx2_fma, "y", "vfmadd231ps")
VECTOR_KERNEL(avx512_fma, "z", "vfmadd231ps")
VECTOR_KERNEL(avx512_bf16, "z", "vdpbf16ps")

static void amx_bf16(void) {
    struct {
        unsigned char palette, start, reserved[14];
        unsigned short row_bytes[16];
        unsigned char rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.row_bytes[i] = 64, tiles.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0\n\t"
                     EACH("0,1,2,3,4,5,6,7", "tilezero %%tmm\\n")
                     "mov %1, %%ecx\n\t"
                     "0:\n\t" EACH("0,1,2,3,4,5", "tdpbf16ps %%tmm7, %%tmm6, %%tmm\\n")
                     "dec %%ecx\n\t"
                     "jnz 0b\n\t"
                     "tilerelease"
                     : : "m"(tiles), "i"(TURNS) : "ecx", "memory");
}

static int has_amx_bf16(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

struct job {
    void (*kernel)(void);
    pthread_barrier_t *barrier;
    double best;
};

static void *work(void *argument) {
    struct job *job = argument;
    for (int i = 0; i < REPETITIONS; i++) {
        pthread_barrier_wait(job->barrier);
        double start = now();
        job->kernel();
        double time = now() - start;
        if (i == 0 || time < job->best) job->best = time;
    }
    return NULL;
}

static void print(const char *name, void (*kernel)(void), double flops, int threads) {
    static const char *separator = "";
    pthread_barrier_t barrier;
    pthread_t pool[threads];
    struct job jobs[threads];
    double rate = 0;
    pthread_barrier_init(&barrier, NULL, threads);
    for (int i = 0; i < threads; i++) {
        jobs[i] = (struct job){kernel, &barrier, 0};
        pthread_create(&pool[i], NULL, work, &jobs[i]);
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(pool[i], NULL);
        rate += TURNS * flops / jobs[i].best;
    }
    printf("%s\"%s\": %.1f", separator, name, rate * 1e-9);
    separator = ", ";
}

int main(int count, char **arguments) {
    int threads = count > 1 ? atoi(arguments[1]) : 1;
    double lane = 2 * VECTOR_ACCUMULATORS;
    printf("{");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        print("avx2_fma", avx2_fma, 8 * lane, threads);
    if (__builtin_cpu_supports("avx512f")) print("avx512_fma", avx512_fma, 16 * lane, threads);
    if (__builtin_cpu_supports("avx512bf16")) print("avx512_bf16", avx512_bf16, 32 * lane, threads);
    if (has_amx_bf16()) print("amx_bf16", amx_bf16, 2.0 * 16 * 16 * 32 * TILE_ACCUMULATORS, threads);
    printf("}\n");
    return 0;
}
