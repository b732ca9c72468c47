// A CUDA driver library without a device: the few functions that the package
// calls through cuda.bindings. Modules must be machine code, and a launch runs
// the kernel of that name in the emulator, whose libraries, one for each kernel,
// are in the folder SEQCONV_EMULATOR.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {
std::map<long, std::string> names;
long next = 1000;
int shared_allowed = 48 << 10;
void* context = nullptr;
}  // namespace

extern "C" {

// CUDA_ERROR_NO_DEVICE: only the runtime inside a CUDA build of torch asks,
// which is to find no device here. The package leaves this to torch.
int cuInit(unsigned) { return 100; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuGetErrorName(int, const char** name) {
  *name = "error";
  return 0;
}
int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  // CUdevice_attribute: clock 13, processors 16, memory clock 36, bus width 37,
  // capability 75 and 76, shared memory of a multiprocessor 81 and of a block
  // 97
  const std::map<int, int> known = {{13, 1755000}, {16, 132}, {36, 2619000}, {37, 5120},
                                    {75, 9},       {76, 0},   {81, 233472},  {97, 232448}};
  const auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return 0;
}
int cuCtxGetCurrent(void** out) {
  *out = context;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** out, int) {
  *out = (void*)64;
  return 0;
}
int cuCtxSetCurrent(void* given) {
  context = given;
  return 0;
}
int cuMemAlloc(void** out, size_t size) {
  *out = std::malloc(size);
  return 0;
}
int cuMemFree(void* given) {
  std::free(given);
  return 0;
}
int cuMemcpyHtoDAsync(void* to, const void* from, size_t size, void*) {
  std::memcpy(to, from, size);
  return 0;
}
int cuStreamSynchronize(void*) { return 0; }
int cuCtxSynchronize() { return 0; }
int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned, void*, void*,
                      unsigned) {
  if (std::memcmp(code,
                  "\x7f"
                  "ELF",
                  4))
    return 200;
  *library = (void*)code;
  return 0;
}
int cuLibraryGetKernel(void** kernel, void*, const char* name) {
  names[next] = name;
  *kernel = (void*)next++;
  return 0;
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int) {
  if (attribute != 8 || !names.count((long)kernel)) return 1;
  shared_allowed = value;
  return 0;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void*, void** parameters, void** extra) {
  if (context == nullptr) return 201;
  if (!names.count((long)f) || gy * gz * by * bz != 1 || extra || (int)shared > shared_allowed)
    return 1;
  const std::string& name = names[(long)f];
  void* emulator =
      dlopen((std::getenv("SEQCONV_EMULATOR") + ("/" + name + ".so")).c_str(), RTLD_NOW);
  if (emulator == nullptr) return 500;
  using Run =
      const char* (*)(const void*, unsigned, unsigned, size_t, unsigned, const char*, unsigned);
  const Run run = (Run)dlsym(emulator, ("emulate_" + name).c_str());
  if (run == nullptr) return 500;
  const char* error = run(parameters[0], gx, bx, shared, 0, "", 0);
  if (error) std::fprintf(stderr, "%s\n", error);
  return error ? 719 : 0;
}
// Everything is found by name; versions do not matter here.
int cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long, int* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (*function == nullptr) {
    static void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = self ? dlsym(self, name) : nullptr;
  }
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}

}  // extern "C"
