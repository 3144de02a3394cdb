// Gradients of y = silu(conv(x)) where y is read twice, by the scan and by x_proj: that of y is grad_y + through W.
//
// A warp has 64 channels of a strip of tokens and walks along it, its block's other warps along other strips. The product
// with W, for 16 tokens at a time, comes from the matrix units through shared memory that is the warp's own, so it waits for
// no other; the tokens' x and grad_y are fetched 8 tokens ahead. grad_x of a token is complete, and written, when the token
// leaves the window.
//
// TAPS; WIDTH, the channels; INNER, the rows of W, a multiple of 16; X_ROW and GRAD_ROW, numbers from one token to the next;
// HAS_BIAS; WARPS and BLOCKS, of a block and of a multiprocessor.

constexpr int CHANNELS = 64, TOKENS = 16, AHEAD = 8, HISTORY = TAPS - 1;
constexpr int ROW = CHANNELS + 8;  // numbers from one row of shared memory to the next: the same column is in other banks

struct Shared {
    u16 matrix[INNER][ROW];
    float product[WARPS][TOKENS][ROW];
};

// Where it stands, which the compiler does not promise of other loads.
INLINE u32 fetch(const bfloat16* from) {
    u32 word;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
}

INLINE void multiply_add(float (&sums)[4], const u32 (&a)[4], u32 first, u32 second) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second));
}

// The words of AHEAD rows from token t on, `row` numbers apart; the last token stands for those behind it.
template <int row> INLINE void fetch(u32 (&words)[AHEAD], const bfloat16* from, int t, int length) {
    const bfloat16* first = from + i64(t) * row;
    if (t + AHEAD <= length) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) words[i] = fetch(first + i * row);
    } else {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) words[i] = fetch(from + i64(min(t + i, length - 1)) * row);
    }
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
    for (int n = 0; n < CHANNELS; n += 32) {  // four sums side by side hide the units' latency
        float sums[4][4] = {};
#pragma unroll
        for (int k = 0; k < INNER / 16; k++)
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const u16* at = &shared.matrix[k * 16 + lane % 16][n + j * 8 + lane / 16 * 8];
                u32 b[4];
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(u32(__cvta_generic_to_shared(at))));
                multiply_add(sums[j], a[k], b[0], b[1]);
                multiply_add(sums[j + 1], a[k], b[2], b[3]);
            }
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                float* to = &product[lane / 4 + i * 4][n + j * 8 + lane % 4 * 2];
                *reinterpret_cast<float2*>(to) = make_float2(sums[j][i], sums[j][i + 1]);
            }
    }
    __syncwarp();
}

// Two channels of a lane along the tokens.
struct Walk {
    float taps[TAPS][2], bias[2], window[HISTORY][2], pending[HISTORY][2], sums[TAPS][2], bias_sum[2];

    // The token's x and the gradient of y; returns the gradient of the token that leaves. Unless it is INSIDE its strip,
    // `there` says whether there is such a token, and `own` whether it counts in the sums.
    template <bool INSIDE> INLINE u32 step(u32 word, u32 grad_word, float2 more, bool there, bool own) {
        const float grads[2] = {low(bfloat16{}, grad_word) + more.x, high(bfloat16{}, grad_word) + more.y};
        float found[2], x[2] = {low(bfloat16{}, word), high(bfloat16{}, word)};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float value = fmaf(taps[HISTORY][c], x[c], bias[c]);
#pragma unroll
            for (int i = 0; i < HISTORY; i++) value = fmaf(taps[i][c], window[i][c], value);
            float opening = sigmoid(value), grad = grads[c] * opening * fmaf(value, 1.0f - opening, 1.0f);
            if (!INSIDE && !there) grad = 0.0f;
            float counted = INSIDE || own ? grad : 0.0f;
            bias_sum[c] += counted;
            sums[HISTORY][c] = fmaf(counted, x[c], sums[HISTORY][c]);
            found[c] = fmaf(grad, taps[0][c], pending[0][c]);
#pragma unroll
            for (int i = 0; i < HISTORY; i++) {
                sums[i][c] = fmaf(counted, window[i][c], sums[i][c]);
                pending[i][c] = i + 1 < HISTORY ? fmaf(grad, taps[i + 1][c], pending[i + 1][c]) : grad * taps[i + 1][c];
                window[i][c] = i + 1 < HISTORY ? window[i + 1][c] : x[c];
            }
        }
        return pair(bfloat16{}, found[0], found[1]);
    }
};

// AHEAD tokens of a strip from t on.
template <bool INSIDE>
INLINE void walk_on(Walk& walk, const float (*product)[ROW], const u32 (&xs)[AHEAD], const u32 (&ys)[AHEAD],
                    bfloat16* grad_x, int t, int start, int stop, int length, int lane) {
    bfloat16* to = grad_x + i64(t - HISTORY) * GRAD_ROW;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        float2 more = *reinterpret_cast<const float2*>(&product[i][2 * lane]);
        u32 found = walk.step<INSIDE>(xs[i], ys[i], more, t + i < length, t + i < stop);
        int place = t + i - HISTORY;
        if (INSIDE || (place >= start && place < stop)) *reinterpret_cast<u32*>(to + i * GRAD_ROW) = found;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) conv_backward(
    const bfloat16* grad_y, const bfloat16* through, const bfloat16* matrix, const bfloat16* x, i64 x_batch,
    const float* weight, const float* bias, bfloat16* grad_x, i64 grad_batch, float* parts, i64 whole,
    i64 strip) {
    __shared__ __align__(16) Shared shared;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, length = int(whole);
    int first = blockIdx.x * CHANNELS, channel = first + 2 * lane;
    for (int i = threadIdx.x; i < INNER * CHANNELS / 8; i += 32 * WARPS) {
        int row = i / (CHANNELS / 8), column = i % (CHANNELS / 8) * 8;
        *reinterpret_cast<uint4*>(&shared.matrix[row][column]) =
            *reinterpret_cast<const uint4*>(matrix + row * WIDTH + first + column);
    }
    __syncthreads();
    int number = blockIdx.y * WARPS + warp, start = number * int(strip), stop = min(start + int(strip), length);
    if (start >= length) return;
    grad_y += blockIdx.z * whole * WIDTH + channel;
    through += blockIdx.z * whole * INNER;
    x += blockIdx.z * x_batch + channel;
    grad_x += blockIdx.z * grad_batch + channel;
    float (&product)[TOKENS][ROW] = shared.product[warp];

    Walk walk = {};
#pragma unroll
    for (int c = 0; c < 2; c++) {
        walk.bias[c] = HAS_BIAS ? bias[channel + c] : 0.0f;
#pragma unroll
        for (int i = 0; i < TAPS; i++) walk.taps[i][c] = weight[(channel + c) * TAPS + i];
    }
#pragma unroll
    for (int i = 0; i < HISTORY; i++) {
        u32 word = start + i >= HISTORY ? fetch(x + i64(start + i - HISTORY) * X_ROW) : 0;
        walk.window[i][0] = low(bfloat16{}, word), walk.window[i][1] = high(bfloat16{}, word);
    }
    u32 xs[AHEAD], ys[AHEAD], next_xs[AHEAD], next_ys[AHEAD];
    fetch<X_ROW>(xs, x, start, length);
    fetch<WIDTH>(ys, grad_y, start, length);
    for (int t = start; t < stop + HISTORY; t += AHEAD) {  // what follows the strip completes its last gradients
        int row = (t - start) % TOKENS;
        if (row == 0) multiply(shared, product, through, t, length, lane);
        fetch<X_ROW>(next_xs, x, t + AHEAD, length);
        fetch<WIDTH>(next_ys, grad_y, t + AHEAD, length);
        if (t > start && t + AHEAD <= stop)
            walk_on<true>(walk, product + row, xs, ys, grad_x, t, start, stop, length, lane);
        else
            walk_on<false>(walk, product + row, xs, ys, grad_x, t, start, stop, length, lane);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) xs[i] = next_xs[i], ys[i] = next_ys[i];
    }
    parts += (blockIdx.z * ((whole + strip - 1) / strip) + number) * WIDTH * (TAPS + HAS_BIAS);
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int i = 0; i < TAPS; i++) parts[(channel + c) * TAPS + i] = walk.sums[i][c];
        if (HAS_BIAS) parts[WIDTH * TAPS + channel + c] = walk.bias_sum[c];
    }
}
