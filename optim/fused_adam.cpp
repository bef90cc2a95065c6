// One step of Adam whose moments are kept in 8 or 4 bits (or float32), block by block: decode, update, encode and write, all of a block in the core's
// first cache. The same operations in the same order as the eager path (codec_int8.py, codec_int4.py, rules.py, driver.py), each rounded once
// by IEEE 754, and a fused multiply-add where torch's CPU kernels have one: the same bits. Compile with -ffp-contract=off.
//
// Legend: a row is everything behind dim 0; blocks of BLOCK elements lie inside a row, the last one is short.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int BLOCK = 128;
constexpr float TINY = 1.17549435e-38f;
constexpr uint32_t GOLDEN = 0x9E3779B1u;  // rounding.py: 2^32 over the golden ratio, odd

struct Settings {
    float beta2, rest1, rest2;  // beta2, 1 - beta1, 1 - beta2
    float eps, correction;      // of the root, and of the bias
    float keep, lr;             // 1 - lr decay (1: no decay), and the rate
    int32_t writes;             // 1: move the weight; 0: put the update where the weight would be
};

struct Moments {
    uint8_t *mean_codes;
    float *mean_scales;
    uint8_t *square_codes;
    float *square_scales;
};

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Of magnitudes, as integers: a NaN is above infinity and so is not lost.
INLINE float largest(const float *x, int count) {
    uint32_t most = 0;
    for (int i = 0; i < count; i++) {
        uint32_t here = bits_of(x[i]) & 0x7FFFFFFFu;
        most = here > most ? here : most;
    }
    return float_of(most);
}

INLINE float at_least(float x, float least) { return x < least ? least : x; }  // NaN stays
INLINE float at_most(float x, float most) { return x > most ? most : x; }

INLINE float dithered(float steps, float value) {
    int32_t hash = static_cast<int32_t>(bits_of(value) * GOLDEN);
    return steps + static_cast<float>(hash) * 0x1p-32f;
}

INLINE void adam(const float *gradient, float *weight, float *mean, float *square, int count, const Settings &s) {
    for (int i = 0; i < count; i++) {
        float g = gradient[i];
        mean[i] = std::fma(s.rest1, g - mean[i], mean[i]);
        square[i] = std::fma(s.rest2 * g, g, square[i] * s.beta2);
        float root = 1.0f / (1.0f / std::sqrt(square[i]));
        float update = mean[i] / (root + s.eps) * s.correction;
        if (!s.writes) {
            weight[i] = update;
            continue;
        }
        float kept = s.keep == 1.0f ? weight[i] : weight[i] * s.keep;
        weight[i] = std::fma(update, -s.lr, kept);
    }
}

struct Int8 {
    static constexpr int per_byte = 1;

    INLINE void decode(const uint8_t *mean_codes, const uint8_t *square_codes, float mean_scale, float square_scale, float *mean,
                       float *square, int count) {
        for (int i = 0; i < count; i++) {
            float k = static_cast<float>(static_cast<int8_t>(mean_codes[i]));
            mean[i] = k * std::fabs(k) * mean_scale;
            float q = static_cast<float>(square_codes[i]);
            q = q * q;
            square[i] = q * q * square_scale;
        }
    }

    INLINE void encode(const float *mean, const float *square, int count, uint8_t *mean_codes, uint8_t *square_codes, float *mean_scale,
                       float *square_scale) {
        float scale = largest(mean, count) * static_cast<float>(1.0 / (127.0 * 127.0));
        *mean_scale = scale;
        float divisor = at_least(scale, TINY);
        for (int i = 0; i < count; i++) {
            float scaled = mean[i] / divisor;
            float root = 1.0f / std::sqrt(at_least(std::fabs(scaled), 1e-3f));
            mean_codes[i] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(scaled * root)));
        }
        scale = largest(square, count) * static_cast<float>(1.0 / (255.0 * 255.0 * 255.0 * 255.0));
        *square_scale = scale;
        divisor = at_least(scale, TINY);
        for (int i = 0; i < count; i++) {
            float root = 1.0f / std::sqrt(square[i] / divisor);
            root = std::nearbyint(dithered(1.0f / std::sqrt(root), square[i]));
            square_codes[i] = static_cast<uint8_t>(static_cast<int32_t>(at_most(at_least(root, 1.0f), 255.0f)));
        }
    }
};

struct Int4 {
    static constexpr int per_byte = 2;

    // Of a block the second half lies behind the first: the low four bits are one, the high four the other.
    INLINE void decode(const uint8_t *mean_codes, const uint8_t *square_codes, float mean_scale, float square_scale, float *mean,
                       float *square, int count) {
        int half = (count + 1) / 2;
        for (int i = 0; i < count; i++) {
            int at = i < half ? i : i - half, shift = i < half ? 0 : 4;
            float k = static_cast<float>((mean_codes[at] >> shift) & 15) - 8.0f;
            mean[i] = k * std::fabs(k) * mean_scale;
            float q = static_cast<float>((square_codes[at] >> shift) & 15) + 1.0f;
            square[i] = q * q * square_scale;
        }
    }

    INLINE void pack(const int32_t *codes, int count, uint8_t *out) {
        int half = (count + 1) / 2;
        for (int i = 0; i < half; i++) out[i] = static_cast<uint8_t>(codes[i] + (i + half < count ? 16 * codes[i + half] : 0));
    }

    INLINE void encode(const float *mean, const float *square, int count, uint8_t *mean_codes, uint8_t *square_codes, float *mean_scale,
                       float *square_scale) {
        int32_t codes[BLOCK];
        float scale = largest(mean, count) * static_cast<float>(1.0 / 49.0);
        *mean_scale = scale;
        float divisor = at_least(scale, TINY);
        for (int i = 0; i < count; i++) {
            float root = std::nearbyint(std::sqrt(at_least(std::fabs(mean[i]) / divisor - 0.25f, 1e-3f)));
            float sign = mean[i] > 0.0f ? 1.0f : (mean[i] < 0.0f ? -1.0f : 0.0f);
            codes[i] = static_cast<int32_t>(root * sign + 8.0f);
        }
        pack(codes, count, mean_codes);
        scale = largest(square, count) * static_cast<float>(1.0 / 256.0);
        *square_scale = scale;
        divisor = at_least(scale, TINY);
        for (int i = 0; i < count; i++) {
            float root = 1.0f / (1.0f / std::sqrt(square[i] / divisor));
            root = std::nearbyint(dithered(root, square[i]));
            codes[i] = static_cast<int32_t>(at_most(at_least(root, 1.0f), 16.0f)) - 1;
        }
        pack(codes, count, square_codes);
    }
};

template <class Format>
INLINE void run_rows(float *weight, const float *gradient, Moments moments, int64_t from, int64_t to, int64_t columns, Settings s) {
    int64_t blocks = (columns + BLOCK - 1) / BLOCK, code_columns = (columns + Format::per_byte - 1) / Format::per_byte;
    float mean[BLOCK], square[BLOCK];
    for (int64_t row = from; row < to; row++) {
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * BLOCK, at = row * columns + first, code = row * code_columns + first / Format::per_byte;
            int64_t scale = row * blocks + block;
            int count = static_cast<int>(columns - first < BLOCK ? columns - first : BLOCK);
            uint8_t *mean_codes = moments.mean_codes + code, *square_codes = moments.square_codes + code;
            Format::decode(mean_codes, square_codes, moments.mean_scales[scale], moments.square_scales[scale], mean, square, count);
            adam(gradient + at, weight + at, mean, square, count, s);
            Format::encode(mean, square, count, mean_codes, square_codes, moments.mean_scales + scale, moments.square_scales + scale);
        }
    }
}

CLONES void rows_int8(float *weight, const float *gradient, Moments moments, int64_t from, int64_t to, int64_t columns, Settings s) {
    run_rows<Int8>(weight, gradient, moments, from, to, columns, s);
}

CLONES void rows_int4(float *weight, const float *gradient, Moments moments, int64_t from, int64_t to, int64_t columns, Settings s) {
    run_rows<Int4>(weight, gradient, moments, from, to, columns, s);
}

// Moments in float32, which are updated where they lie.
CLONES void rows_whole(float *weight, const float *gradient, Moments moments, int64_t from, int64_t to, int64_t columns, Settings s) {
    float *mean = reinterpret_cast<float *>(moments.mean_codes), *square = reinterpret_cast<float *>(moments.square_codes);
    for (int64_t at = from * columns; at < to * columns; at += BLOCK) {
        int count = static_cast<int>(to * columns - at < BLOCK ? to * columns - at : BLOCK);
        adam(gradient + at, weight + at, mean + at, square + at, count, s);
    }
}

}  // namespace

// All pointers are to contiguous memory; the rows are dealt to ``threads``, which share nothing.
extern "C" void fused_adam(int bits, float *weight, const float *gradient, uint8_t *mean_codes, float *mean_scales, uint8_t *square_codes,
                           float *square_scales, int64_t rows, int64_t columns, const Settings *settings, int threads) {
    Moments moments{mean_codes, mean_scales, square_codes, square_scales};
    auto work = bits == 32 ? rows_whole : bits == 8 ? rows_int8 : rows_int4;
    std::vector<std::thread> others;
    int64_t share = (rows + threads - 1) / threads;
    for (int i = 1; i < threads; i++) {
        int64_t from = i * share < rows ? i * share : rows, to = from + share < rows ? from + share : rows;
        if (from >= to) continue;
        try {
            others.emplace_back(work, weight, gradient, moments, from, to, columns, *settings);
        } catch (const std::system_error &) {  // there are no more threads to be had: its share is done here
            work(weight, gradient, moments, from, to, columns, *settings);
        }
    }
    work(weight, gradient, moments, 0, share < rows ? share : rows, columns, *settings);
    for (auto &other : others) other.join();
}
