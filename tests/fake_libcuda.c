/* NVIDIA's driver as far as it is asked for devices and kernels, for machines without a GPU.
 *
 * Functions return 0, or what FAKE_CUDA says: "cuInit=100 version=12040" has statuses by function, and the version of
 * CUDA, the number of devices and their compute capability (75 for 7.5). The image of a kernel is not looked at. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int told(const char* name, int otherwise) {
  const char* at = getenv("FAKE_CUDA");
  while (at && (at = strstr(at, name)) && at[strlen(name)] != '=') ++at;
  return at ? atoi(at + strlen(name) + 1) : otherwise;
}

#define STATUS(name, ...) \
  int name(__VA_ARGS__) { return told(#name, 0); }

STATUS(cuInit, unsigned flags)
STATUS(cuFuncSetAttribute, void* function, int attribute, int value)
#ifndef OLD
STATUS(cuFuncLoad, void* function)
#endif
STATUS(cuMemsetD32Async, unsigned long long at, unsigned value, size_t count, void* stream)
STATUS(cuStreamSynchronize, void* stream)
STATUS(cuMemcpyDtoH_v2, void* to, unsigned long long from, size_t bytes)
STATUS(cuTensorMapEncodeTiled, void* map, int type, unsigned rank, void* base, const void* sizes, const void* strides,
       const void* box, const void* steps, int interleave, int swizzle, int promotion, int fill)
STATUS(cuLaunchKernel, void* function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
       unsigned threads_z, unsigned shared, void* stream, void** params, void** extra)

int cuDriverGetVersion(int* version) { return *version = told("version", 13000), 0; }
int cuDeviceGetCount(int* count) { return *count = told("devices", 1), 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char* name, int length, int device) { return snprintf(name, length, "Fake %d", device), 0; }

/* The primary context of device 2 is 3. One context can lie below the current one. */
static __thread void *current, *below;
int cuDevicePrimaryCtxRetain(void** context, int device) {
  return *context = (void*)(device + 1L), told("cuDevicePrimaryCtxRetain", 0);
}
int cuCtxGetCurrent(void** context) { return *context = current, 0; }
int cuCtxSetCurrent(void* context) { return current = context, 0; }
int cuCtxPushCurrent_v2(void* context) { return below = current, current = context, 0; }
int cuCtxPopCurrent_v2(void** context) { return *context = current, current = below, 0; }

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = told("capability", 80);
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 100;
  return 0;
}

/* A module holds its context, in which alone it has functions. */
int cuModuleLoadData(void** module, const void* image) { return *module = current, told("cuModuleLoadData", 0); }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return *function = module, module && module == current ? told("cuModuleGetFunction", 0) : 201;
}

int cuGetErrorName(int status, const char** name) {
  static char text[32];
  return snprintf(text, sizeof text, "CUDA_ERROR_%d", status), *name = text, 0;
}

int cuGetErrorString(int status, const char** description) { return *description = "as told", 0; }
