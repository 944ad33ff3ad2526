// A libcuda without a GPU, for the tests: device memory is host memory, streams run at once, captured work is recorded.
// It does what siamtrack/runners/cuda asks for, through cuda-python or pycuda, and counts what was not given back. The
// kernels are the real ones, for the host. cuda-python looks functions up by name; pycuda is linked with them, and has to
// be loaded lazily, since those that nothing calls are not here.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include KERNELS

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500,
       CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };

// CUDA_MEMCPY3D of cuda.h, v2.
struct Copy3D {
    size_t srcXInBytes, srcY, srcZ, srcLOD;
    unsigned srcMemoryType;
    const void* srcHost;
    uint64_t srcDevice;
    void* srcArray;
    void* reserved0;
    size_t srcPitch, srcHeight;
    size_t dstXInBytes, dstY, dstZ, dstLOD;
    unsigned dstMemoryType;
    void* dstHost;
    uint64_t dstDevice;
    void* dstArray;
    void* reserved1;
    size_t dstPitch, dstHeight, WidthInBytes, Height, Depth;
};

struct Node {
    unsigned type;  // 0 kernel, 1 memcpy
    Copy3D copy;
    std::function<void()> run;
};
struct Graph { std::vector<Node*> nodes; };
struct Executable { Graph* graph; std::map<Node*, Copy3D> changed; };
struct Stream { Graph* capturing = nullptr; };

static std::map<std::string, long> held;  // by kind: how many were not given back
static size_t used = 0, limit = size_t(1) << 40;
static std::map<uint64_t, size_t> sizes;
static int retained = 0;
static int context_token, foreign_context_token, device_name_token;
static thread_local std::vector<void*> contexts;  // of this thread; the last is current
static bool ready() { return !contexts.empty() && contexts.back() == &context_token && retained > 0; }

static Result take(void** pointer, size_t bytes, const char* kind) {
    if (!ready()) return INVALID_CONTEXT;
    if (used + bytes > limit) return OUT_OF_MEMORY;
    *pointer = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(*pointer, 0xCD, bytes);
    sizes[(uint64_t)*pointer] = bytes;
    used += bytes;
    ++held[kind];
    return SUCCESS;
}
static Result give(uint64_t pointer, const char* kind) {
    if (!sizes.count(pointer)) return INVALID_VALUE;
    used -= sizes[pointer];
    sizes.erase(pointer);
    free((void*)pointer);
    --held[kind];
    return SUCCESS;
}
static Result add(Stream* stream, unsigned type, const Copy3D& copy, std::function<void()> run) {
    if (!ready()) return INVALID_CONTEXT;
    if (stream->capturing) stream->capturing->nodes.push_back(new Node{type, copy, run});
    else run();
    return SUCCESS;
}
static Result move(Stream* stream, uint64_t to, uint64_t from, size_t bytes, bool from_host) {
    Copy3D copy;
    memset(&copy, 0, sizeof copy);
    copy.srcMemoryType = from_host ? 1 : 2;
    copy.dstMemoryType = 2;
    copy.srcHost = from_host ? (const void*)from : nullptr;
    copy.srcDevice = from_host ? 0 : from;
    copy.dstDevice = to;
    copy.WidthInBytes = bytes;
    copy.Height = copy.Depth = 1;
    return add(stream, 1, copy, [=] { memmove((void*)to, (const void*)from, bytes); });
}

extern "C" {
// For the tests.
int fake_contexts() { return (int)contexts.size(); }
long fake_held(const char* kind) { return held[kind]; }
int fake_retained() { return retained; }
void fake_limit(size_t bytes) { limit = bytes; }

Result f_init(unsigned) { return SUCCESS; }
Result f_driver_version(int* version) { *version = 13000; return SUCCESS; }
Result f_count(int* count) { *count = 1; return SUCCESS; }
Result f_device(int* device, int) { *device = 0; return SUCCESS; }
Result f_attribute(int* value, int attribute, int) { *value = attribute == 75 ? 9 : 0; return SUCCESS; }
Result f_retain(void** context, int) { ++retained; *context = &context_token; return SUCCESS; }
Result f_state(int, unsigned* flags, int* active) { *flags = 0; *active = retained > 0; return SUCCESS; }
Result f_release(int) { --retained; return SUCCESS; }
Result f_get_current(void** context) { *context = contexts.empty() ? nullptr : contexts.back(); return SUCCESS; }
Result f_push(void* context) { contexts.push_back(context); return SUCCESS; }
Result f_pop(void** context) {
    if (contexts.empty()) return INVALID_CONTEXT;
    *context = contexts.back();
    contexts.pop_back();
    return SUCCESS;
}
Result f_set_current(void* context) {  // replaces the one on top; none removes it
    void* old;
    if (!contexts.empty()) f_pop(&old);
    return context ? f_push(context) : SUCCESS;
}
// A context that is not the primary one, as other users of pycuda may have.
Result f_create(void** context, void*, unsigned, int) { return f_push(*context = &foreign_context_token); }
Result f_detach(void*) { void* old; return f_pop(&old); }
Result f_stream(Stream** stream, unsigned flags) {
    if (!ready() || flags != 1) return INVALID_VALUE;  // 1: does not wait for the legacy stream
    *stream = new Stream;
    ++held["stream"];
    return SUCCESS;
}
Result f_stream_destroy(Stream* stream) { delete stream; --held["stream"]; return SUCCESS; }
Result f_synchronize(Stream* stream) { return stream->capturing ? CAPTURE_UNSUPPORTED : SUCCESS; }
Result f_alloc(uint64_t* address, size_t bytes) { return take((void**)address, bytes, "device"); }
Result f_free(uint64_t address) { return give(address, "device"); }
Result f_host_alloc(void** pointer, size_t bytes, unsigned) { return take(pointer, bytes, "host"); }
Result f_host_free(void* pointer) { return give((uint64_t)pointer, "host"); }
Result f_upload(uint64_t to, const void* from, size_t n, Stream* s) { return move(s, to, (uint64_t)from, n, true); }
Result f_download(void* to, uint64_t from, size_t n, Stream* s) { return move(s, (uint64_t)to, from, n, false); }
Result f_copy(uint64_t to, uint64_t from, size_t n, Stream* s) { return move(s, to, from, n, false); }
Result f_module(void** module, const void* image) {
    *module = memcmp(image, "\x7f" "ELF", 4) ? nullptr : &device_name_token;
    if (!*module) return INVALID_VALUE;
    ++held["module"];
    return SUCCESS;
}
Result f_module_ex(void** module, const void* image, unsigned, int*, void**) { return f_module(module, image); }
Result f_unload(void*) { --held["module"]; return SUCCESS; }
Result f_function(const char** function, void*, const char* name) {
    *function = !strcmp(name, "siamtrack_crop") ? "crop" : !strcmp(name, "siamtrack_check") ? "check" : nullptr;
    return *function ? SUCCESS : NOT_FOUND;
}
Result f_block(const char*, int, int, int) { return SUCCESS; }  // pycuda sets it before each launch, which has its own
Result f_launch(const char* function, unsigned, unsigned, unsigned gz, unsigned, unsigned, unsigned, unsigned,
                       Stream* stream, void** p, void** extra) {
    bool crop = !strcmp(function, "crop");
    void* packed[4];
    if (!p) {  // extra: 1, the arguments as one buffer, 2, its size, 0
        const size_t offsets[4] = {0, 8, 16, 24}, wanted = crop ? 20 : 32;
        if (extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4] || *(size_t*)extra[3] != wanted) return INVALID_VALUE;
        for (int i = 0; i < 4; ++i) packed[i] = (char*)extra[1] + offsets[i];
        p = packed;
    }
    if (crop) {
        auto table = *(const unsigned char**)p[0];
        auto images = *(unsigned char**)p[1];
        int size = *(int*)p[2];
        return add(stream, 0, Copy3D{}, [=] { siamtrack_crop(table, images, size, (int)gz); });
    }
    auto values = *(const unsigned char**)p[0];
    long long count = *(long long*)p[1];
    int half = *(int*)p[2];
    int* flag = *(int**)p[3];
    return add(stream, 0, Copy3D{}, [=] { siamtrack_check(values, count, half, flag); });
}
Result f_begin(Stream* stream, int mode) {
    if (mode != 1 || stream->capturing) return INVALID_VALUE;  // 1: thread-local
    stream->capturing = new Graph;
    ++held["graph"];
    return SUCCESS;
}
Result f_end(Stream* stream, Graph** graph) { *graph = stream->capturing; stream->capturing = nullptr; return SUCCESS; }
Result f_roots(Graph* graph, Node** nodes, size_t* count) {
    if (nodes && !graph->nodes.empty()) nodes[0] = graph->nodes[0];
    *count = graph->nodes.empty() ? 0 : 1;
    return SUCCESS;
}
Result f_type(Node* node, unsigned* type) { *type = node->type; return SUCCESS; }
Result f_get_copy(Node* node, Copy3D* copy) { *copy = node->copy; return SUCCESS; }
Result f_instantiate(Executable** executable, Graph* graph, unsigned long long) {
    *executable = new Executable{graph, {}};
    ++held["executable"];
    return SUCCESS;
}
Result f_set_copy(Executable* executable, Node* node, const Copy3D* copy, void* context) {
    const Copy3D& was = node->copy;
    bool same = copy->srcHost == was.srcHost && copy->dstDevice == was.dstDevice && copy->Height == 1 && copy->Depth == 1;
    if (!same || context != (void*)&context_token || !copy->WidthInBytes) return INVALID_VALUE;
    executable->changed[node] = *copy;
    return SUCCESS;
}
Result f_graph_launch(Executable* executable, Stream*) {
    for (Node* node : executable->graph->nodes) {
        auto changed = executable->changed.find(node);
        if (changed == executable->changed.end()) node->run();
        else memcpy((void*)changed->second.dstDevice, changed->second.srcHost, changed->second.WidthInBytes);
    }
    return SUCCESS;
}
Result f_executable_destroy(Executable* executable) { delete executable; --held["executable"]; return SUCCESS; }
Result f_graph_destroy(Graph* graph) {
    for (Node* node : graph->nodes) delete node;
    delete graph;
    --held["graph"];
    return SUCCESS;
}
Result f_memory(size_t* room, size_t* total) { *room = limit - used; *total = limit; return SUCCESS; }
Result f_event(void** event, unsigned) { *event = malloc(1); ++held["event"]; return SUCCESS; }
Result f_event_record(void*, Stream*) { return SUCCESS; }
Result f_event_elapsed(float* ms, void*, void*) { *ms = 0.25f; return SUCCESS; }
Result f_event_destroy(void* event) { free(event); --held["event"]; return SUCCESS; }
Result f_text(int error, const char** text) { *text = error == OUT_OF_MEMORY ? "out of memory" : "an error"; return SUCCESS; }

Result cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* found) {
    static const std::map<std::string, void*> functions = {
        {"cuInit", (void*)f_init}, {"cuDriverGetVersion", (void*)f_driver_version}, {"cuDeviceGetCount", (void*)f_count},
        {"cuDeviceGet", (void*)f_device}, {"cuDeviceGetAttribute", (void*)f_attribute},
        {"cuDevicePrimaryCtxRetain", (void*)f_retain}, {"cuDevicePrimaryCtxRelease", (void*)f_release},
        {"cuDevicePrimaryCtxGetState", (void*)f_state}, {"cuCtxPushCurrent", (void*)f_push}, {"cuCtxPopCurrent", (void*)f_pop},
        {"cuCtxGetCurrent", (void*)f_get_current}, {"cuCtxSetCurrent", (void*)f_set_current},
        {"cuStreamCreate", (void*)f_stream}, {"cuStreamDestroy", (void*)f_stream_destroy},
        {"cuStreamSynchronize", (void*)f_synchronize}, {"cuMemAlloc", (void*)f_alloc}, {"cuMemFree", (void*)f_free},
        {"cuMemHostAlloc", (void*)f_host_alloc}, {"cuMemFreeHost", (void*)f_host_free},
        {"cuMemcpyHtoDAsync", (void*)f_upload}, {"cuMemcpyDtoHAsync", (void*)f_download},
        {"cuMemcpyDtoDAsync", (void*)f_copy}, {"cuModuleLoadData", (void*)f_module}, {"cuModuleUnload", (void*)f_unload},
        {"cuModuleGetFunction", (void*)f_function}, {"cuLaunchKernel", (void*)f_launch},
        {"cuStreamBeginCapture", (void*)f_begin}, {"cuStreamEndCapture", (void*)f_end},
        {"cuGraphGetRootNodes", (void*)f_roots}, {"cuGraphNodeGetType", (void*)f_type},
        {"cuGraphMemcpyNodeGetParams", (void*)f_get_copy}, {"cuGraphInstantiate", (void*)f_instantiate},
        {"cuGraphInstantiateWithFlags", (void*)f_instantiate}, {"cuGraphExecMemcpyNodeSetParams", (void*)f_set_copy},
        {"cuGraphLaunch", (void*)f_graph_launch}, {"cuGraphExecDestroy", (void*)f_executable_destroy},
        {"cuGraphDestroy", (void*)f_graph_destroy}, {"cuMemGetInfo", (void*)f_memory}, {"cuEventCreate", (void*)f_event},
        {"cuEventRecord", (void*)f_event_record}, {"cuEventElapsedTime", (void*)f_event_elapsed},
        {"cuEventDestroy", (void*)f_event_destroy}, {"cuGetErrorString", (void*)f_text},
    };
    if (!strcmp(symbol, "cuGetProcAddress") || !strcmp(symbol, "cuGetProcAddress_v2")) {
        *function = (void*)cuGetProcAddress_v2;
        if (found) *found = 0;
        return SUCCESS;
    }
    auto entry = functions.find(symbol);
    *function = entry == functions.end() ? nullptr : entry->second;
    if (found) *found = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
Result cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}

// NVRTC asks for it where there is `cuInit`.
Result cuGetExportTable(const void**, const void*) { return INVALID_VALUE; }

// For those who are linked with this library.
#define EXPORT(name, function) extern decltype(function) name __attribute__((alias(#function)));
EXPORT(cuInit, f_init)
EXPORT(cuDriverGetVersion, f_driver_version)
EXPORT(cuDeviceGetCount, f_count)
EXPORT(cuDeviceGet, f_device)
EXPORT(cuDeviceGetAttribute, f_attribute)
EXPORT(cuDevicePrimaryCtxRetain, f_retain)
EXPORT(cuDevicePrimaryCtxRelease_v2, f_release)
EXPORT(cuCtxCreate_v4, f_create)
EXPORT(cuCtxDetach, f_detach)
EXPORT(cuCtxPushCurrent_v2, f_push)
EXPORT(cuCtxPopCurrent_v2, f_pop)
EXPORT(cuStreamCreate, f_stream)
EXPORT(cuStreamDestroy_v2, f_stream_destroy)
EXPORT(cuStreamSynchronize, f_synchronize)
EXPORT(cuMemAlloc_v2, f_alloc)
EXPORT(cuMemFree_v2, f_free)
EXPORT(cuMemHostAlloc, f_host_alloc)
EXPORT(cuMemFreeHost, f_host_free)
EXPORT(cuMemcpyHtoDAsync_v2, f_upload)
EXPORT(cuMemcpyDtoHAsync_v2, f_download)
EXPORT(cuMemcpyDtoDAsync_v2, f_copy)
EXPORT(cuModuleLoadDataEx, f_module_ex)
EXPORT(cuModuleUnload, f_unload)
EXPORT(cuModuleGetFunction, f_function)
EXPORT(cuFuncSetBlockShape, f_block)
EXPORT(cuLaunchKernel, f_launch)
EXPORT(cuMemGetInfo_v2, f_memory)
EXPORT(cuEventCreate, f_event)
EXPORT(cuEventRecord, f_event_record)
EXPORT(cuEventElapsedTime, f_event_elapsed)
EXPORT(cuEventElapsedTime_v2, f_event_elapsed)
EXPORT(cuEventDestroy_v2, f_event_destroy)
EXPORT(cuGetErrorString, f_text)
}
