// Gradients of y = silu(conv(x)): a warp has 64 channels of a strip of tokens and walks along it, its window and its tokens'
// unfinished gradients in registers; grad_x of a token is complete, and written, when the token leaves the window.
//
// Where y is read by a product, too (x_proj), the gradient of y is grad_y + through W: the product, for 16 tokens at a time,
// comes from the matrix units through shared memory that is the warp's own, so it waits for no other.
//
// INNER, the rows of W, a multiple of 16, or 0; X_ROW, Y_ROW and GRAD_ROW, numbers from one token to the next of x, grad_y and
// grad_x; HAS_BIAS; SILU; BLOCKS, of a multiprocessor. The others: strips.cuh.

#include "strips.cuh"

constexpr int TOKENS = 16;
constexpr int ROW = CHANNELS + 8;  // numbers from one row of shared memory to the next: the same column is in other banks

#if INNER
struct Shared {
    u16 matrix[INNER][ROW];
    float product[WARPS][TOKENS][ROW];
};

INLINE void multiply_add(float (&sums)[4], const u32 (&a)[4], u32 first, u32 second) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second));
}

// product = TOKENS rows of `through` from token t on times W; the last token stands for those behind it.
INLINE void multiply(Shared& shared, float (&product)[TOKENS][ROW], const bfloat16* through, int t, int length, int lane) {
    u32 a[INNER / 16][4];
    int rows[2] = {min(t + lane / 4, length - 1), min(t + lane / 4 + 8, length - 1)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bfloat16* from = through + i64(rows[i % 2]) * INNER + lane % 4 * 2 + i / 2 * 8;
#pragma unroll
        for (int k = 0; k < INNER / 16; k++) a[k][i] = *reinterpret_cast<const u32*>(from + k * 16);
    }
    __syncwarp();  // all have read the last product
#pragma unroll
    for (int n = 0; n < CHANNELS; n += 16) {  // four sums side by side hide the units' latency
        float sums[2][4] = {};
#pragma unroll
        for (int k = 0; k < INNER / 16; k++)
#pragma unroll
            for (int j = 0; j < 2; j += 2) {
                const u16* at = &shared.matrix[k * 16 + lane % 16][n + j * 8 + lane / 16 * 8];
                u32 b[4];
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(u32(__cvta_generic_to_shared(at))));
                multiply_add(sums[j], a[k], b[0], b[1]);
                multiply_add(sums[j + 1], a[k], b[2], b[3]);
            }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                float* to = &product[lane / 4 + i * 4][n + j * 8 + lane % 4 * 2];
                *reinterpret_cast<float2*>(to) = make_float2(sums[j][i], sums[j][i + 1]);
            }
    }
    __syncwarp();
}
#endif

// A lane's two channels along the tokens, and the rows of the window's tokens.
struct Walk {
    Filter filter;
    Number *grad_x, *grad_initial;
    int start, stop, count;
    float window[SLOTS][2], pending[SLOTS][2], sums[TAPS][2], bias_sum[2];
    int places[SLOTS];  // where there are segments; else they are neighbours

    // The row of the j-th of the window's tokens when token t comes.
    INLINE int place(int j, int t) const { return SEGMENTS ? places[j] : t - HISTORY + j; }

    // Whether the gradient of that row is the strip's to write: the first one has the initial state's, too.
    INLINE bool own(int place) const { return place >= start ? place < stop : HAS_INITIAL && start == 0 && place > NONE; }

    INLINE void finish(const float (&found)[2], int place) const {
        if (!own(place)) return;
        Pair values;
        values.set(found);
        if (!HAS_INITIAL || place >= 0) put(grad_x + i64(place) * GRAD_ROW, values, count);
        else store<ALIGNED>(grad_initial + (place + HISTORY) * WIDTH, values, count);
    }

    // A token's x and the gradient of its y, which counts in the sums or not; found: the gradient of the token that leaves.
    INLINE void step(const Pair& token, const Pair& upstream, float2 more, bool counts, float (&found)[2]) {
        const float grads[2] = {upstream.get(0) + more.x, upstream.get(1) + more.y};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float x = token.get(c), grad = grads[c];
            if (SILU) {
                float value = filter.combine(window, x, c), opening = sigmoid(value);
                grad *= opening * fmaf(value, 1.0f - opening, 1.0f);
            }
            float counted = counts ? grad : 0.0f;
            bias_sum[c] += counted;
            sums[HISTORY][c] = fmaf(counted, x, sums[HISTORY][c]);
            found[c] = fmaf(grad, filter.taps[0][c], HISTORY > 0 ? pending[0][c] : 0.0f);
#pragma unroll
            for (int i = 0; i < HISTORY; i++) {
                sums[i][c] = fmaf(counted, window[i][c], sums[i][c]);
                pending[i][c] = fmaf(grad, filter.taps[i + 1][c], i + 1 < HISTORY ? pending[min(i + 1, HISTORY - 1)][c] : 0.0f);
            }
        }
        push(window, token);
    }

    // Where a segment ends: nothing more comes to the window's tokens than `last`.
    INLINE void end(const Number* last, int t) {
#pragma unroll
        for (int i = 0; i < HISTORY; i++) {
            float found[2] = {pending[i][0], pending[i][1]};
            Pair more{};
            if (last) load<ALIGNED>(more, last + i * WIDTH, count);
#pragma unroll
            for (int c = 0; c < 2; c++) found[c] += more.get(c), pending[i][c] = window[i][c] = 0.0f;
            finish(found, place(i, t));
            places[i] = NONE;
        }
    }

    INLINE bool unfinished(int t) const {
        bool found = false;
#pragma unroll
        for (int i = 0; i < HISTORY; i++) found |= own(place(i, t));
        return found;
    }

    // AHEAD tokens from t on, all real and of the strip, as those of the window are.
    INLINE void plain(const float (*product)[ROW], const Pair (&xs)[AHEAD], const Pair (&ys)[AHEAD], int t) {
        Number* to = grad_x + i64(t - HISTORY) * GRAD_ROW;
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            float found[2];
            float2 more = INNER ? *reinterpret_cast<const float2*>(&product[i][2 * lane]) : float2{};
            step(xs[i], ys[i], more, true, found);
            Pair values;
            values.set(found);
            put(to + i * GRAD_ROW, values, count);
        }
    }

    // The same of any tokens, of which these bits say what is padding, and where a segment begins.
    INLINE void any(const float (*product)[ROW], const Pair (&xs)[AHEAD], const Pair (&ys)[AHEAD], int t, int length,
                    u32 padding, u32 restarts) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (t + i >= length) break;
            if (SEGMENTS && restarts >> i & 1) end(nullptr, t + i);
            float found[2] = {};
            if (SEGMENTS && padding >> i & 1) {
                finish(found, t + i);
            } else {
                float2 more = INNER ? *reinterpret_cast<const float2*>(&product[i][2 * lane]) : float2{};
                step(xs[i], ys[i], more, t + i < stop, found);
                finish(found, HISTORY > 0 ? place(0, t + i) : t + i);
#pragma unroll
                for (int j = 0; j < HISTORY; j++) places[j] = j + 1 < HISTORY ? places[min(j + 1, HISTORY - 1)] : t + i;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) conv_backward(
    const Number* grad_y, i64 y_batch, const Number* through, const Number* matrix, const Number* x, i64 x_batch, const float* weight,
    const float* bias, const Number* initial, const Number* grad_final, const SEGMENT* segments, Number* grad_x, i64 grad_batch,
    Number* grad_initial, float* parts, i64 whole, i64 strip) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, length = int(whole);
    int first = blockIdx.x * CHANNELS, channel = first + 2 * lane, count = WIDTH - channel;
#if INNER
    __shared__ __align__(16) Shared shared;
    for (int i = threadIdx.x; i < INNER * CHANNELS / 8; i += 32 * WARPS) {
        int row = i / (CHANNELS / 8), column = i % (CHANNELS / 8) * 8;
        *reinterpret_cast<uint4*>(&shared.matrix[row][column]) =
            *reinterpret_cast<const uint4*>(matrix + row * WIDTH + first + column);
    }
    __syncthreads();
    float (*product)[ROW] = shared.product[warp];
    through += blockIdx.z * whole * INNER;
#else
    float (*product)[ROW] = nullptr;
#endif
    int number = blockIdx.y * WARPS + warp, start = number * int(strip), stop = min(start + int(strip), length);
    if (start >= length) return;
    i64 batch = blockIdx.z;
    grad_y += batch * y_batch + channel;
    x += batch * x_batch + channel;
    initial += batch * HISTORY * WIDTH + channel;
    segments += batch * whole;

    Walk walk{Filter(weight, bias, channel), grad_x + batch * grad_batch + channel,
              grad_initial + batch * HISTORY * WIDTH + channel, start, stop, count};
    Pair window[SLOTS];
    i64 current = window_before(window, x, initial, segments, start, X_ROW, count);
#pragma unroll
    for (int i = 0; i < HISTORY; i++) {
        walk.window[i][0] = window[i].get(0), walk.window[i][1] = window[i].get(1);
        walk.places[i] = start == 0 ? i - HISTORY : NONE;
    }
    Pair xs[AHEAD], ys[AHEAD], next_xs[AHEAD], next_ys[AHEAD];
    fetch<X_ROW>(xs, x, start, length, count);
    fetch<Y_ROW>(ys, grad_y, start, length, count);
    i64 numbers = SEGMENTS ? number_at(segments, start + lane, length) : 0;
    Marks marks{0, 0};
    // What follows the strip completes its last gradients.
    for (int t = start; t < length && (t < stop || walk.unfinished(t)); t += AHEAD) {
        int past = t - start;
        if (SEGMENTS && past % 32 == 0) {
            marks = Marks::of(numbers, current);
            numbers = number_at(segments, t + 32 + lane, length);
            if (t >= stop && marks.padding == ~0u) {
                t += 32 - AHEAD;
                fetch<X_ROW>(xs, x, t + AHEAD, length, count);
                fetch<Y_ROW>(ys, grad_y, t + AHEAD, length, count);
                continue;
            }
        }
        u32 padding = marks.padding >> past % 32, restarts = marks.restarts >> past % 32;
#if INNER
        if (past % TOKENS == 0) multiply(shared, shared.product[warp], through, t, length, lane);
#endif
        fetch<X_ROW>(next_xs, x, t + AHEAD, length, count);
        fetch<Y_ROW>(next_ys, grad_y, t + AHEAD, length, count);
        const float (*more)[ROW] = product + past % TOKENS;
        bool ready = t + AHEAD <= stop && ((padding | restarts) & ((1u << AHEAD) - 1)) == 0;
        if (ready && (HISTORY == 0 || (past >= HISTORY && walk.place(0, t) == t - HISTORY))) {
            walk.plain(more, xs, ys, t);
#pragma unroll
            for (int i = 0; i < HISTORY; i++) walk.places[i] = t + AHEAD - HISTORY + i;
        } else {
            walk.any(more, xs, ys, t, length, padding, restarts);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) xs[i] = next_xs[i], ys[i] = next_ys[i];
    }
    if (walk.unfinished(length))  // the row's end
        walk.end(grad_final ? grad_final + batch * HISTORY * WIDTH + channel : nullptr, length);
    parts += (batch * ((whole + strip - 1) / strip) + number) * WIDTH * (TAPS + HAS_BIAS);
#pragma unroll
    for (int c = 0; c < 2; c++) {
        if (c >= count) break;
#pragma unroll
        for (int i = 0; i < TAPS; i++) parts[(channel + c) * TAPS + i] = walk.sums[i][c];
        if (HAS_BIAS) parts[WIDTH * TAPS + channel + c] = walk.bias_sum[c];
    }
}

// The sum over the strips' parts [num_parts columns], in a fixed order: a block has 32 columns, its warps rows in turns.
// Columns from `split` on are those of `others`.
extern "C" __global__ void __launch_bounds__(32 * SUMMING) conv_sums(
    const float* parts, float* sums, float* others, i64 num_parts, i64 columns, i64 split) {
    __shared__ float found[SUMMING][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 column = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 8
        for (i64 row = warp; row < num_parts; row += SUMMING) sum += parts[row * columns + column];
    }
    found[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= columns) return;
#pragma unroll
    for (int i = 1; i < SUMMING; i++) sum += found[i][lane];
    (column < split ? sums[column] : others[column - split]) = sum;
}
