// One step of Adam in a subspace of the gradient and back (lifts.Back, lifts.ScaledGradient), of many matrices in one call: products, moments and
// the move of the weight block by block, so that gradient and weight are read as seldom as can be and nothing of their size is made.
//
// Every element of a product is the sum over blocks of BLOCK terms, in order, of chains of fused multiply-adds, in order: the same bits on any
// number of ranks or threads and with any width of vectors. Elementwise arithmetic is that of the eager path (rules.py), each operation rounded
// once. Compile with the architecture's flags: one library for each width of vectors.
//
// Legend: gradient G [rows, columns]; right: basis V [columns, rank], coordinates R = G V [rows, rank]; left: basis U [rows, rank],
// R = Gᵀ U [columns, rank]; moments lie as R does; "long" is R's first side. A panel is PANEL columns of a factor, [k][PANEL] in memory.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_ROWS = 6;
#else
constexpr int LANES = 4, TILE_ROWS = 6;
#endif

namespace {

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));  // whatever the width, for sums in one order

constexpr int PANEL = 2 * LANES;
constexpr int64_t BLOCK = 256;  // terms of a sum
constexpr int64_t AT_ONCE = 192;  // of the long side: their coordinates stay in the second cache; whole tiles and panels
constexpr int64_t THREAD_WORK = 1 << 24;  // multiply-adds that are worth a thread of their own
constexpr float TINY = 1e-8f;  // rules.TINY

enum Lift { BACK = 0, CHANNEL = 1, TENSOR = 2 };

struct Matrix {
    float *weight;
    const float *gradient, *basis;
    float *mean, *square, *norm;  // norm: of the limited step before; null: nothing is limited
    int64_t rows, columns, rank, left;
    float eps, correction;  // of the root, and of the bias (in Back's times its scale)

    int64_t length() const { return left ? columns : rows; }
};

struct Settings {
    float beta2, rest1, rest2;  // beta2, 1 - beta1, 1 - beta2
    float scale, limit;         // of a scaled gradient, and of a norm's growth
    float keep, lr;             // 1 - lr decay (1: no decay), and the rate
    int32_t lift;
};

int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
float at_most(float x, float most) { return x > most ? most : x; }  // NaN stays

// --- products ---------------------------------------------------------------------------------------------------------------------

// tile [HEIGHT, PANEL] = sum over k < count of a[row * row_stride + k * step] times row k of a panel.
template <int HEIGHT>
void tile_of(int64_t count, const float *a, int64_t row_stride, int64_t step, const float *panel, float *tile) {
    Vector sums[HEIGHT][2];
    for (int i = 0; i < HEIGHT; i++) sums[i][0] = sums[i][1] = Vector{};
    for (int64_t k = 0; k < count; k++, panel += PANEL, a += step) {
        Vector first = *reinterpret_cast<const Vector *>(panel), second = *reinterpret_cast<const Vector *>(panel + LANES);
        for (int i = 0; i < HEIGHT; i++) {
            float x = a[i * row_stride];
            sums[i][0] += x * first;
            sums[i][1] += x * second;
        }
    }
    for (int i = 0; i < HEIGHT; i++)
        for (int half = 0; half < 2; half++) *reinterpret_cast<Vector *>(tile + i * PANEL + half * LANES) = sums[i][half];
}

using TileOf = void (*)(int64_t, const float *, int64_t, int64_t, const float *, float *);
constexpr TileOf TILES[] = {nullptr,
                            tile_of<1>,
                            tile_of<2>,
                            tile_of<3>,
                            tile_of<4>,
                            tile_of<5>,
                            tile_of<6>,
#if defined(__AVX512F__)
                            tile_of<7>,
                            tile_of<8>,
                            tile_of<9>,
                            tile_of<10>,
                            tile_of<11>,
                            tile_of<12>
#endif
};

// Into rows of PANEL floats, ``stride`` apart; what is there is added to unless this is the first block of the sum.
void put(const float *tile, int64_t height, float *to, int64_t stride, bool first) {
    for (int64_t i = 0; i < height; i++)
        for (int64_t j = 0; j < PANEL; j++) to[i * stride + j] = first ? tile[i * PANEL + j] : to[i * stride + j] + tile[i * PANEL + j];
}

void move(const float *tile, int64_t height, int64_t width, float *weight, int64_t stride, float keep, float lr) {
    for (int64_t i = 0; i < height; i++, tile += PANEL, weight += stride) {
        if (width == PANEL)
            for (int64_t j = 0; j < PANEL; j++) weight[j] = std::fma(tile[j], -lr, weight[j] * keep);
        else
            for (int64_t j = 0; j < width; j++) weight[j] = std::fma(tile[j], -lr, weight[j] * keep);
    }
}

// [count, width] -> panels [count][PANEL] with zeros behind the last column.
void pack(const float *from, int64_t count, int64_t width, float *to) {
    for (int64_t first = 0; first < width; first += PANEL)
        for (int64_t k = 0; k < count; k++, to += PANEL) {
            int64_t here = least(PANEL, width - first);
            std::memcpy(to, from + k * width + first, here * sizeof(float));
            for (int64_t j = here; j < PANEL; j++) to[j] = 0;
        }
}

// One panel of the transpose of [width, count].
void pack_transposed(const float *from, int64_t width, int64_t count, int64_t stride, float *to) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t j = 0; j < PANEL; j++) to[k * PANEL + j] = j < width ? from[j * stride + k] : 0.0f;
}

// --- moments and norms ------------------------------------------------------------------------------------------------------------

// values <- mean / (root of square + eps) * factor, without its last operation where there is no factor
void ratio(float *values, float *mean, float *square, int64_t count, const Settings &s, float eps, const float *factor) {
    for (int64_t i = 0; i < count; i++) {
        float g = values[i];
        mean[i] = std::fma(s.rest1, g - mean[i], mean[i]);
        square[i] = std::fma(s.rest2 * g, g, square[i] * s.beta2);
        float root = 1.0f / (1.0f / std::sqrt(square[i]));
        values[i] = mean[i] / (root + eps);
    }
    if (factor)
        for (int64_t i = 0; i < count; i++) values[i] *= *factor;
}

// The sum of a_i b_i, in four times sixteen chains.
float dot(const float *a, const float *b, int64_t count) {
    Sixteen sums[4] = {};
    int64_t i = 0;
    for (; i + 64 <= count; i += 64)
        for (int j = 0; j < 4; j++)
            sums[j] += *reinterpret_cast<const Sixteen *>(a + i + 16 * j) * *reinterpret_cast<const Sixteen *>(b + i + 16 * j);
    for (; i + 16 <= count; i += 16) sums[0] += *reinterpret_cast<const Sixteen *>(a + i) * *reinterpret_cast<const Sixteen *>(b + i);
    float folded[16], last = 0;
    for (; i < count; i++) last = std::fma(a[i], b[i], last);
    Sixteen whole = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    std::memcpy(folded, &whole, sizeof folded);
    for (int width = 8; width; width /= 2)
        for (int j = 0; j < width; j++) folded[j] += folded[j + width];
    return folded[0] + last;
}

// What a scaled gradient needs to know of each channel: squares of the ratio, of the coordinates and of the gradient; then its factor.
struct Channels {
    float *ratio, *coordinates, *gradient;
};

// Coordinates of one channel -> ratio, in place.
void channel(const Matrix &m, const Settings &s, float *values, int64_t index, const Channels &known) {
    float *mean = m.mean + index * m.rank, *square = m.square + index * m.rank;
    if (s.lift == BACK) {
        ratio(values, mean, square, m.rank, s, m.eps, &m.correction);
        return;
    }
    known.coordinates[index] = dot(values, values, m.rank);
    ratio(values, mean, square, m.rank, s, m.eps, nullptr);
    known.ratio[index] = dot(values, values, m.rank);
}

// From sums over the channels to a factor for each, left in ``ratio``; double, in the order of the channels.
void factors(const Matrix &m, const Settings &s, const Channels &known) {
    int64_t length = m.length();
    double total = 0, ratios = 0, coordinates = 0, gradients = 0;
    for (int64_t j = 0; j < length; j++) {
        ratios += known.ratio[j];
        coordinates += known.coordinates[j];
        gradients += known.gradient[j];
        if (s.lift == CHANNEL) {
            known.ratio[j] = std::sqrt(known.ratio[j]) / (std::sqrt(known.coordinates[j]) + TINY) * s.scale;
            double squared = static_cast<double>(known.ratio[j]) * known.ratio[j];
            total = std::fma(squared, static_cast<double>(known.gradient[j]), total);
        }
    }
    float whole = 1.0f;
    if (s.lift == TENSOR) {
        whole = s.scale * static_cast<float>(std::sqrt(ratios)) / (static_cast<float>(std::sqrt(coordinates)) + TINY);
        total = static_cast<double>(whole) * whole * gradients;
    }
    float factor = 1.0f;
    if (m.norm) {
        float norm = static_cast<float>(std::sqrt(total)), before = *m.norm;
        factor = before > 0 ? at_most((before + TINY) * s.limit / norm, 1.0f) : 1.0f;
        *m.norm = norm * factor;
    }
    for (int64_t j = 0; j < length; j++) known.ratio[j] = (s.lift == TENSOR ? whole : known.ratio[j]) * factor * m.correction;
}

// The weight by the gradient times the factor of each channel.
void move_scaled(const Matrix &m, const Settings &s, const float *factor, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) {
        float *weight = m.weight + row * m.columns;
        const float *gradient = m.gradient + row * m.columns;
        if (m.left)
            for (int64_t j = 0; j < m.columns; j++) weight[j] = std::fma(gradient[j] * factor[j], -s.lr, weight[j] * s.keep);
        else
            for (int64_t j = 0; j < m.columns; j++) weight[j] = std::fma(gradient[j] * factor[row], -s.lr, weight[j] * s.keep);
    }
}

// --- a part of the long side ---------------------------------------------------------------------------------------------------------

struct Packed {
    float *down, *up;  // panels of the basis [short side, rank], and of a right one's transpose
};

// Groups of TILE_ROWS columns of a block of G, each [count][height]; squares of what is passed are added to ``squares``, if any.
void pack_columns(const Matrix &m, int64_t k, int64_t count, int64_t from, int64_t to, float *block, float *squares) {
    for (int64_t first = from; first < to; first += TILE_ROWS, block += BLOCK * TILE_ROWS) {
        int64_t height = least(TILE_ROWS, to - first);
        const float *gradient = m.gradient + k * m.columns + first;
        for (int64_t i = 0; i < count; i++) {
            if (height == TILE_ROWS) std::memcpy(block + i * TILE_ROWS, gradient + i * m.columns, TILE_ROWS * sizeof(float));
            else std::memcpy(block + i * height, gradient + i * m.columns, height * sizeof(float));
        }
    }
    if (!squares) return;
    float sums[AT_ONCE] = {};
    for (int64_t i = 0; i < count; i++) {
        const float *gradient = m.gradient + (k + i) * m.columns + from;
        for (int64_t j = 0; j < to - from; j++) sums[j] = std::fma(gradient[j], gradient[j], sums[j]);
    }
    for (int64_t j = 0; j < to - from; j++) squares[from + j] = k ? squares[from + j] + sums[j] : sums[j];
}

void down(const Matrix &m, const Packed &packed, float *coordinates, int64_t stride, float *block, float *squares, int64_t from, int64_t to) {
    float tile[TILE_ROWS * PANEL];
    int64_t depth = m.left ? m.rows : m.columns;
    for (int64_t k = 0; k < depth; k += BLOCK) {
        int64_t count = least(BLOCK, depth - k);
        if (m.left) pack_columns(m, k, count, from, to, block, squares);
        for (int64_t first = 0; first < m.rank; first += PANEL)
            for (int64_t row = from; row < to; row += TILE_ROWS) {
                int64_t height = least(TILE_ROWS, to - row);
                const float *panel = packed.down + first * depth + k * PANEL;
                if (m.left) TILES[height](count, block + (row - from) * BLOCK, 1, height, panel, tile);
                else TILES[height](count, m.gradient + row * m.columns + k, m.columns, 1, panel, tile);
                put(tile, height, coordinates + (row - from) * stride + first, stride, k == 0);
            }
    }
}

// One panel of W by its share of the product of ``a`` [rows from to to, rank] and ``panel`` [rank][PANEL].
void up(const Matrix &m, const Settings &s, const float *a, int64_t stride, const float *panel, int64_t from, int64_t to, int64_t first,
        int64_t width) {
    float tile[TILE_ROWS * PANEL];
    for (int64_t row = from; row < to; row += TILE_ROWS) {
        int64_t height = least(TILE_ROWS, to - row);
        float *weight = m.weight + row * m.columns + first;
        for (int64_t i = 0; i < height; i++)
            for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(weight + i * m.columns + j, 1);
        for (int64_t k = 0; k < m.rank; k += BLOCK) {
            TILES[height](least(BLOCK, m.rank - k), a + (row - from) * stride + k, stride, 1, panel + k * PANEL, tile);
            move(tile, height, width, weight, m.columns, k ? 1.0f : s.keep, s.lr);
        }
    }
}

void part(const Matrix &m, const Settings &s, const Packed &packed, const Channels &known, float *own, int64_t from, int64_t to) {
    int64_t stride = padded(m.rank, PANEL);
    float *coordinates = own, *block = own + AT_ONCE * stride;
    down(m, packed, coordinates, stride, block, m.left && s.lift != BACK ? known.gradient : nullptr, from, to);
    for (int64_t j = from; j < to; j++) {
        channel(m, s, coordinates + (j - from) * stride, j, known);
        if (!m.left && s.lift != BACK) known.gradient[j] = dot(m.gradient + j * m.columns, m.gradient + j * m.columns, m.columns);
    }
    if (s.lift != BACK) return;
    if (!m.left) {
        for (int64_t first = 0; first < m.columns; first += PANEL)
            up(m, s, coordinates, stride, packed.up + first * m.rank, from, to, first, least(PANEL, m.columns - first));
        return;
    }
    for (int64_t first = from; first < to; first += PANEL) {
        pack_transposed(coordinates + (first - from) * stride, to - first, m.rank, stride, block);
        up(m, s, m.basis, m.rank, block, 0, m.rows, first, least(PANEL, to - first));
    }
}

// Rank 1, where products are of vectors.
void thin_part(const Matrix &m, const Settings &s, const Channels &known, int64_t from, int64_t to) {
    float values[AT_ONCE], sums[2][AT_ONCE];
    for (int64_t j = from; j < to && !m.left; j++) {
        const float *gradient = m.gradient + j * m.columns;
        values[j - from] = dot(gradient, m.basis, m.columns);
        known.gradient[j] = dot(gradient, gradient, m.columns);
    }
    for (int64_t k = 0; k < m.rows && m.left; k += BLOCK) {
        for (int64_t j = 0; j < to - from; j++) sums[0][j] = sums[1][j] = 0;
        for (int64_t i = k; i < least(k + BLOCK, m.rows); i++) {
            const float *gradient = m.gradient + i * m.columns + from;
            float u = m.basis[i];
            for (int64_t j = 0; j < to - from; j++) {
                sums[0][j] = std::fma(u, gradient[j], sums[0][j]);
                sums[1][j] = std::fma(gradient[j], gradient[j], sums[1][j]);
            }
        }
        for (int64_t j = 0; j < to - from; j++) {
            values[j] = k ? values[j] + sums[0][j] : sums[0][j];
            known.gradient[from + j] = k ? known.gradient[from + j] + sums[1][j] : sums[1][j];
        }
    }
    for (int64_t j = from; j < to; j++) channel(m, s, values + j - from, j, known);
}

// --- a whole matrix ------------------------------------------------------------------------------------------------------------------

struct Sizes {
    int64_t down, up, channels, own;  // floats; own: of each thread
};

Sizes sizes_of(int64_t rows, int64_t columns, int64_t rank, int64_t left, int32_t lift) {
    bool back = lift == BACK, thin = rank == 1 && !back;
    int64_t channels = back ? 0 : 3 * (left ? columns : rows), stride = padded(rank, PANEL);
    if (thin) return {0, 0, channels, 0};
    if (left) return {rows * stride, 0, channels, AT_ONCE * (stride + BLOCK) + PANEL * rank};
    return {columns * stride, back ? padded(columns, PANEL) * rank : 0, channels, AT_ONCE * stride};
}

// Threads that a step of such a matrix has work for.
int64_t useful(int64_t rows, int64_t columns, int64_t rank, int64_t left, int64_t threads) {
    int64_t parts = ((left ? columns : rows) + AT_ONCE - 1) / AT_ONCE;
    return least(threads, least(parts, 1 + rows * columns * rank / THREAD_WORK));
}

// work(index, thread) for every index below count; which thread does it makes no difference to the result.
void dealt(int64_t count, int64_t threads, const std::function<void(int64_t, int64_t)> &work) {
    auto share = [&](int64_t thread) {
        for (int64_t index = thread; index < count; index += threads) work(index, thread);
    };
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < threads; thread++) {
        try {
            others.emplace_back(share, thread);
        } catch (const std::system_error &) {  // there are no more threads to be had: its share is done here
            share(thread);
        }
    }
    share(0);
    for (auto &other : others) other.join();
}

void step(const Matrix &m, const Settings &s, float *scratch, int64_t threads) {
    Sizes sizes = sizes_of(m.rows, m.columns, m.rank, m.left, s.lift);
    bool thin = m.rank == 1 && s.lift != BACK;
    Packed packed{scratch, scratch + sizes.down};
    float *channels = packed.up + sizes.up, *own = channels + sizes.channels;
    Channels known{channels, channels + m.length(), channels + 2 * m.length()};
    if (!thin) pack(m.basis, m.left ? m.rows : m.columns, m.rank, packed.down);
    for (int64_t first = 0; first < m.columns && sizes.up; first += PANEL)
        pack_transposed(m.basis + first * m.rank, m.columns - first, m.rank, m.rank, packed.up + first * m.rank);
    int64_t length = m.length(), parts = (length + AT_ONCE - 1) / AT_ONCE;
    threads = useful(m.rows, m.columns, m.rank, m.left, threads);
    dealt(parts, threads, [&](int64_t index, int64_t thread) {
        int64_t from = index * AT_ONCE, to = least(from + AT_ONCE, length);
        if (thin) thin_part(m, s, known, from, to);
        else part(m, s, packed, known, own + thread * sizes.own, from, to);
    });
    if (s.lift == BACK) return;
    factors(m, s, known);
    int64_t runs = (m.rows + AT_ONCE - 1) / AT_ONCE;
    dealt(runs, least(threads, runs),
          [&](int64_t run, int64_t) { move_scaled(m, s, known.ratio, run * AT_ONCE, least((run + 1) * AT_ONCE, m.rows)); });
}

}  // namespace

// Floats of scratch memory that a step of such a matrix takes.
extern "C" int64_t low_rank_scratch(int64_t rows, int64_t columns, int64_t rank, int64_t left, int32_t lift, int64_t threads) {
    Sizes sizes = sizes_of(rows, columns, rank, left, lift);
    return sizes.down + sizes.up + sizes.channels + useful(rows, columns, rank, left, threads) * sizes.own;
}

// All pointers are to contiguous memory; matrices are stepped one after the other, each by up to ``threads``.
extern "C" void low_rank_step(const Matrix *matrices, int64_t count, const Settings *settings, float *scratch, int64_t threads) {
    for (int64_t i = 0; i < count; i++) step(matrices[i], *settings, scratch, threads);
}
