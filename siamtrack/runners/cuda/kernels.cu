// Cuts windows out of an image and resizes them bilinearly: the GPU's side of siamtrack/crop.py. And a check of tensors.
//
// The arithmetic is that of OpenCV's 8-bit resize, rounding for rounding, so that a network sees the same crop on the GPU
// as on the CPU: a closed loop can follow a single grey level to another box. Whole numbers, and floating point in which
// no two operations may be contracted, give the same bytes on a GPU and by the host's compiler: what the tests show of
// one holds for the other.

#ifdef __CUDACC__
#define SIAMTRACK_FUNCTION __device__ __forceinline__
#define MULTIPLY(a, b) __dmul_rn(a, b)
#define ADD(a, b) __dadd_rn(a, b)
#else
#include <math.h>
#define SIAMTRACK_FUNCTION static inline
#define MULTIPLY(a, b) ((a) * (b))  // the host compiles with -ffp-contract=off
#define ADD(a, b) ((a) + (b))
#endif

#define WEIGHT_ONE 2048  // weights are fractions of this

// One window; `WINDOW` in windows.py is the same 64 bytes. Positions are in window pixels, not in image pixels.
struct Window {
    int width, height;             // of the window, in image pixels
    int left, top, right, bottom;  // what of it lies inside the image: columns [left, right), rows [top, bottom)
    int first_row;                 // -1: rows [top, bottom) are stored; else two rows for each output row from here on
    int pitch;                     // bytes from one stored row to the next
    double step_x, step_y;         // window pixels per crop pixel
    long long pixels;              // byte offset of the stored rows from the start of the windows' table
    unsigned char fill[4];         // blue, green, red of pixels outside the image
    int unused;
};

// The two pixels that an output pixel lies between, and their weights.
struct Taps {
    int first, second, first_weight, second_weight;
};

// Output pixel `index`, whose centre lies at (index + 0.5) * step, among `extent` pixels.
SIAMTRACK_FUNCTION struct Taps taps_of(int index, double step, int extent) {
    const float position = (float)ADD(MULTIPLY(index + 0.5, step), -0.5);
    const float below = floorf(position), share = position - below, rest = 1.0f - share;
    const int last = extent - 1, first = (int)below;
    struct Taps taps;
    taps.first = first < 0 ? 0 : first < last ? first : last;
    taps.second = first < 0 ? 0 : first < last ? first + 1 : last;
    // Each rounded on its own, half to even: their sum may be one off.
    taps.first_weight = (int)rintf(rest * WEIGHT_ONE);
    taps.second_weight = (int)rintf(share * WEIGHT_ONE);
    return taps;
}

// One value of a window pixel; `stored_row` is where the row is found if it was stored at all.
SIAMTRACK_FUNCTION int value_at(
    const struct Window* window, const unsigned char* pixels, int stored_row, int column, int row, int channel) {
    if (column < window->left || column >= window->right || row < window->top || row >= window->bottom)
        return window->fill[channel];
    return pixels[(long long)stored_row * window->pitch + 3LL * (column - window->left) + channel];
}

// Write the three values of output pixel (x, y).
SIAMTRACK_FUNCTION void crop_pixel(
    const struct Window* window, const unsigned char* table, int x, int y, unsigned char* out) {
    const unsigned char* pixels = table + window->pixels;
    struct Taps across = taps_of(x, window->step_x, window->width);
    if (across.first == across.second) {  // at the sides, but not above and below, one pixel takes all
        across.first_weight = WEIGHT_ONE;
        across.second_weight = 0;
    }
    const struct Taps down = taps_of(y, window->step_y, window->height);
    const int packed = window->first_row >= 0;
    const int upper = packed ? 2 * (y - window->first_row) : down.first - window->top;
    const int lower = packed ? upper + 1 : down.second - window->top;
    for (int channel = 0; channel < 3; ++channel) {
        const int a = value_at(window, pixels, upper, across.first, down.first, channel);
        const int b = value_at(window, pixels, upper, across.second, down.first, channel);
        const int c = value_at(window, pixels, lower, across.first, down.second, channel);
        const int d = value_at(window, pixels, lower, across.second, down.second, channel);
        const int above = a * across.first_weight + b * across.second_weight;
        const int below = c * across.first_weight + d * across.second_weight;
        const int sum = ((down.first_weight * (above >> 4)) >> 16) + ((down.second_weight * (below >> 4)) >> 16);
        out[channel] = (unsigned char)((sum + 2) >> 2);
    }
}

// Whether value i is a number and not infinite.
SIAMTRACK_FUNCTION int is_finite(const unsigned char* values, long long i, int half) {
    if (half) return (((const unsigned short*)values)[i] & 0x7C00u) != 0x7C00u;
    return (((const unsigned int*)values)[i] & 0x7F800000u) != 0x7F800000u;
}

#ifdef __CUDACC__
// table: the windows, one a grid layer, and at their offsets the pixels. images: [layers, size, size, 3].
extern "C" __global__ void siamtrack_crop(const unsigned char* table, unsigned char* images, int size) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= size || y >= size) return;
    const struct Window* window = (const struct Window*)table + blockIdx.z;
    crop_pixel(window, table, x, y, images + (((long long)blockIdx.z * size + y) * size + x) * 3);
}

// Sets flag where a value is infinite or not a number. half: values are 16-bit floats, else 32-bit.
extern "C" __global__ void siamtrack_check(const unsigned char* values, long long count, int half, int* flag) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
        if (!is_finite(values, i, half)) *flag = 1;
}
#else
// The same on the host, for the tests.
#ifdef __cplusplus
extern "C" {
#endif
void siamtrack_crop(const unsigned char* table, unsigned char* images, int size, int count) {
    for (int layer = 0; layer < count; ++layer)
        for (int y = 0; y < size; ++y)
            for (int x = 0; x < size; ++x)
                crop_pixel((const struct Window*)table + layer, table, x, y,
                           images + (((long long)layer * size + y) * size + x) * 3);
}

void siamtrack_check(const unsigned char* values, long long count, int half, int* flag) {
    for (long long i = 0; i < count; ++i)
        if (!is_finite(values, i, half)) *flag = 1;
}
#ifdef __cplusplus
}
#endif
#endif
