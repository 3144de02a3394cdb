// The gradients of the selective scan, for each split of the tokens on its own: `carries` is the gradient that the state
// after the split gets from behind it. A block takes tiles of channels one after the other, and a split's chunks of EVERY
// tokens from the last to the first. The states of a chunk are computed again: once on from the chunk's start, keeping
// one in PIECE in shared memory, then piece by piece, the last first, in registers, walking back over each at once.
// A thread holds S states of each of KC channels. Sums over states meet in a channel's lanes, sums over channels (of B
// and C) in the lanes that hold the same states, then over the block's warps, then in `partial` over blocks: always in
// the same order. CHAINED: there are more tiles than blocks at once; a split then waits for the one behind it, which began
// long before, and takes the gradient that it got to (`passed`; `progress` counts splits that are done, 0 at first).
// Macros: see scan.cuh, and PIECE, EVERY, BLOCKS, DECAYS (whether a piece's decays stay in registers), CHAINED.

#include "scan.cuh"

constexpr int KC = 2, PIECES = EVERY / PIECE, WIDTH = 4;
constexpr int WARPS = THREADS / 32, CHANNEL_LANES = 32 / LANES, CHANNELS = WARPS * CHANNEL_LANES * KC;
constexpr int VECTORS = PIECE * CHANNELS / WIDTH, PER_TOKEN = CHANNELS / WIDTH;
// Channel lanes hold their states in COPIES different orders, register i that of i ^ order, and neighbouring lanes the
// two channels in either order: so the first rounds of each sum are between registers that are known when compiling.
constexpr int COPIES = CHANNEL_LANES < S ? CHANNEL_LANES : S, SAME = CHANNEL_LANES / COPIES;  // lanes of one order
constexpr int HELD = S / COPIES;                      // of B and of C after these rounds
constexpr int PAIRS = LANES / KC;                     // lanes that still hold parts of a sum over states
constexpr int GROUP = PAIRS < PIECE ? PAIRS : PIECE;  // tokens whose sums over states are taken together
constexpr int PITCH = CHANNELS + (CHANNEL_LANES > 1 ? KC * CHANNEL_LANES : 4);  // of sums over states: stored without conflicts
using OfB = Rows<PIECE, 1>;
using BC = Rows<PIECE, 2>;
using States = Vector<float, S>;
static_assert(VECTORS <= THREADS && THREADS % PER_TOKEN == 0 && LANES >= 4);

// Where a copy of the rows stands: loads of a warp meet in no bank, two orders beside two lanes of states.
INLINE int copy_of_B(int order) { return order * (OfB::SIZE + 8); }
INLINE int copy_of_BC(int order) { return order * BC::SIZE + order % 2 * 4 + order / 2 * 16; }

struct Slope {
    float of_y, of_raw;  // gradient of y before the gate; derivative of dt by what it comes from
};

// One piece in shared memory. In one struct, so that addresses differ by constants only.
struct Shared {
    alignas(16) float2 steps[PIECE * CHANNELS];  // see Step
    alignas(16) Slope slopes[PIECE * CHANNELS];
    alignas(16) float gates[HAS_Z ? PIECE * CHANNELS : 4];  // sigmoid of z
    alignas(16) float rows[COPIES * (BC::SIZE + 8)];
    alignas(16) float ys[HAS_Z ? PIECE * PITCH : 4], of_input[PIECE * PITCH], of_size[PIECE * PITCH];
    alignas(16) float skips[CHANNELS], biases[CHANNELS];
    Vector<float, WIDTH> sums_skip[VECTORS], sums_bias[VECTORS];
    // What comes from memory while the piece before it is walked. All but B and C are needed until a piece is written.
    Vector<U, WIDTH> u_slots[2][VECTORS], g_slots[2][VECTORS];
    Vector<DT, WIDTH> dt_slots[2][VECTORS];
    Vector<Z, WIDTH> z_slots[2][HAS_Z ? VECTORS : 1];
    Vector<BM, 8> B_slots[BC::VECTORS];
    Vector<CM, 8> C_slots[BC::VECTORS];
    signed char marks[PIECE];
};

// Place i gets what was in i ^ order.
INLINE void to_order(float (&states)[S], int order) {
#pragma unroll
    for (int bit = 1; bit < COPIES; bit *= 2)
#pragma unroll
        for (int i = 0; i < S; i++)
            if (!(i & bit)) {
                float first = states[i], second = states[i + bit];
                states[i] = order & bit ? second : first, states[i + bit] = order & bit ? first : second;
            }
}

// For each order, the rows of B (and C) from `slots`; by all threads together.
template <int MATRICES, class Copy, class... T>
INLINE void stage_orders(float* rows, Copy copy, const Vector<T, 8>*... slots) {
    using Of = Rows<PIECE, MATRICES>;
    constexpr int COUNT = COPIES * PIECE * LANES;
#pragma unroll
    for (int begin = 0; begin < COUNT; begin += THREADS) {
        int item = begin + threadIdx.x;
        if (COUNT % THREADS && item >= COUNT) continue;
        int order = item / (PIECE * LANES), vector = item % (PIECE * LANES), token = vector / LANES, lane = vector % LANES;
        float* to = rows + copy(order) + token * Of::PITCH + lane * Of::ROW;
        ([&] {
            auto part = reinterpret_cast<const Vector<T, S>*>(slots)[vector];
            States ordered;
#pragma unroll
            for (int i = 0; i < S; i++) ordered.words[i] = part.get(i);
            to_order(ordered.words, order);
            *reinterpret_cast<States*>(to) = ordered;
            to += S;
        }(), ...);
    }
}

INLINE u32 acquire(const u32* from) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}
INLINE void release(u32* to, u32 value) { asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory"); }
INLINE float from_others(const float* from) {  // as it is in memory now
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
    return value;
}

// A thread's part of a piece; 32 bits are enough for the offset within it.
template <class T> INLINE void bring(Vector<T, WIDTH>* slot, const T* from, i64 stride, int token, int channel, int there) {
    if (VECTORS == THREADS || threadIdx.x < VECTORS) copy_async<ALIGNED>(slot, from + (token * int(stride) + channel), there);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_backward(
    const U* __restrict__ u, i64 u_b, i64 u_t, const DT* __restrict__ dt, i64 dt_b, i64 dt_t, const Z* __restrict__ z,
    i64 z_b, i64 z_t, const BM* __restrict__ B, i64 B_b, i64 B_t, i64 B_g, const CM* __restrict__ C, i64 C_b, i64 C_t,
    i64 C_g, const float* __restrict__ A, const float* __restrict__ D, const float* __restrict__ dt_bias,
    const signed char* __restrict__ marks, const U* __restrict__ grad_y, i64 g_b, i64 g_t,
    const float* __restrict__ starts, const float* __restrict__ carries, U* __restrict__ grad_u, DT* __restrict__ grad_dt,
    Z* __restrict__ grad_z, i64 grad_z_b, i64 grad_z_t, U* __restrict__ y_again, float* __restrict__ grad_A, float* __restrict__ grad_D,
    float* __restrict__ grad_bias, float* __restrict__ grad_initial, float* partial, i64 split_, i64 tiles_a_block,
    float* passed, u32* progress, i64 length_, i64 channels, i64 groups) {
    extern __shared__ float4 dynamic[];
    States* kept = reinterpret_cast<States*>(dynamic);                            // the state before each piece
    float* of_matrices = reinterpret_cast<float*>(kept + PIECES * KC * THREADS);  // sums of each warp
    __shared__ Shared shared;

    int length = int(length_), split = int(split_), warp = threadIdx.x / 32;
    int lane = threadIdx.x % 32 / CHANNEL_LANES, channel_lane = threadIdx.x % CHANNEL_LANES, order = channel_lane / SAME;
    i64 channels_a_group = channels / groups, tiles = (channels_a_group + CHANNELS - 1) / CHANNELS;
    i64 blocks_a_group = (tiles + tiles_a_block - 1) / tiles_a_block;
    i64 group = blockIdx.x / blocks_a_group, block = blockIdx.x % blocks_a_group, batch = blockIdx.y;
    int splits = gridDim.z, my_split = splits - 1 - blockIdx.z, from = my_split * split, to = min(length, from + split);
    int my_token = threadIdx.x / PER_TOKEN, my_channel = threadIdx.x % PER_TOKEN * WIDTH;  // that this thread brings
    int my_vector = my_token * CHANNELS + my_channel;
    bool brings = VECTORS == THREADS || threadIdx.x < VECTORS;
    const float* my_B = shared.rows + copy_of_B(order) + lane * OfB::ROW;
    const float* my_rows = shared.rows + copy_of_BC(order) + lane * BC::ROW;
    i64 of_token = groups * STATES, of_matrix = gridDim.y * i64(length) * of_token;
    float* partial_B = partial + block * 2 * of_matrix + batch * length * of_token + group * STATES;
    float* partial_C = partial_B + of_matrix;
    B += batch * B_b + group * B_g, C += batch * C_b + group * C_g;
    if (SEGMENTS) marks += batch * length;
    if (CHAINED) {  // blocks begin in order, z last: nobody waits for one that cannot begin
        if (threadIdx.x == 0)
            while (acquire(progress + blockIdx.y * gridDim.x + blockIdx.x) < blockIdx.z) asm volatile("nanosleep.u32 100;");
        __syncthreads();
    }

    for (i64 tile = block * tiles_a_block; tile < min(tiles, (block + 1) * tiles_a_block); tile++) {
        i64 first = group * channels_a_group + tile * CHANNELS;
        int valid = int(min(i64(CHANNELS), channels_a_group - tile * CHANNELS)), count = brings ? min(WIDTH, valid - my_channel) : 0;
        const U* tile_u = u + batch * u_b + first;
        const DT* tile_dt = dt + batch * dt_b + first;
        const U* tile_g = grad_y + batch * g_b + first;
        const Z* tile_z = HAS_Z ? z + batch * z_b + first : z;
        for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
            shared.skips[c] = D && c < valid ? D[first + c] : 0.0f;
            shared.biases[c] = dt_bias && c < valid ? dt_bias[first + c] : 0.0f;
        }
        if (brings) shared.sums_skip[threadIdx.x] = shared.sums_bias[threadIdx.x] = Vector<float, WIDTH>{};
        int place[KC];
        auto state = [&](int i) { return lane * S + (i ^ order); };
        float decay_rate[KC][S], carry[KC][S], sum_A[KC][S], h[KC][S];
        int at[KC];  // of this thread's states in [d n]
#pragma unroll
        for (int k = 0; k < KC; k++) {
            place[k] = (warp * KC + (k ^ lane % KC)) * CHANNEL_LANES + channel_lane;
            at[k] = int(first + place[k]) * STATES;
#pragma unroll
            for (int i = 0; i < S; i++) {
                bool there = state(i) < STATES && place[k] < valid;
                decay_rate[k][i] = there ? scaled(A[at[k] + state(i)]) : 0.0f;
                i64 here = (CHAINED ? batch : batch * splits + my_split) * channels * STATES + at[k] + state(i);
                carry[k][i] = there && carries ? carries[here] : 0.0f;
                if (CHAINED && there && my_split + 1 < splits) carry[k][i] = from_others(passed + here);
                sum_A[k][i] = 0.0f;
            }
        }
        auto keep = [&](int piece, const float (&states)[KC][S]) {
#pragma unroll
            for (int k = 0; k < KC; k++) {
                States vector;
                vector.set(states[k]);
                kept[(piece * KC + k) * THREADS + threadIdx.x] = vector;
            }
        };
        auto kept_before = [&](int piece, float (&states)[KC][S]) {
#pragma unroll
            for (int k = 0; k < KC; k++) {
                auto vector = kept[(piece * KC + k) * THREADS + threadIdx.x];
#pragma unroll
                for (int i = 0; i < S; i++) states[k][i] = vector.get(i);
            }
        };

        auto real = [&](int t) { return t < length && !(SEGMENTS && marks[t] == PADDING); };
        auto fetch = [&](int t0, int buffer, bool back) {
            int there = real(t0 + my_token) ? count : 0;  // else zeros come
            bring(&shared.u_slots[buffer][threadIdx.x % VECTORS], tile_u + t0 * u_t, u_t, my_token, my_channel, there);
            bring(&shared.dt_slots[buffer][threadIdx.x % VECTORS], tile_dt + t0 * dt_t, dt_t, my_token, my_channel, there);
            OfB::fetch(shared.B_slots, B, B_t, t0, length, marks);
            if (back) {
                bring(&shared.g_slots[buffer][threadIdx.x % VECTORS], tile_g + t0 * g_t, g_t, my_token, my_channel, there);
                if (HAS_Z) bring(&shared.z_slots[buffer][threadIdx.x % VECTORS], tile_z + t0 * z_t, z_t, my_token, my_channel, there);
                OfB::fetch(shared.C_slots, C, C_t, t0, length, marks);
            }
        };
        auto pieces_of = [&](int chunk) { return (min(EVERY, length - chunk) + PIECE - 1) / PIECE; };
        // The state before a chunk comes into the slot of the last piece.
        auto bring_start = [&](int chunk) {
            const float* start = starts + (batch * ((length + EVERY - 1) / EVERY) + chunk / EVERY) * channels * STATES;
#pragma unroll
            for (int k = 0; k < KC; k++)
                copy_async<STATES % 4 == 0 && S == 4>(kept + ((PIECES - 1) * KC + k) * THREADS + threadIdx.x, start + at[k] + lane * S,
                                            place[k] < valid ? min(S, STATES - lane * S) : 0);
        };
        auto begin = [&] {
            kept_before(PIECES - 1, h);
#pragma unroll
            for (int k = 0; k < KC; k++) to_order(h[k], order);
        };
        // dt and what u counts; of_raw: the derivative of dt by what it comes from.
        auto stage_steps = [&](int t0, int buffer, bool back, float (&of_raw)[WIDTH]) {
            if (!brings) return;
            bool there = real(t0 + my_token);
            auto u_raw = shared.u_slots[buffer][threadIdx.x % VECTORS];
            auto dt_raw = shared.dt_slots[buffer][threadIdx.x % VECTORS];
            auto bias = *reinterpret_cast<const Vector<float, WIDTH>*>(shared.biases + my_channel);
            Vector<float, 2 * WIDTH> pairs;
#pragma unroll
            for (int v = 0; v < WIDTH; v++) {
                float size = dt_raw.get(v) + bias.get(v);
                if (SOFTPLUS) size = back ? softplus(size, of_raw[v]) : softplus(size);
                pairs.words[2 * v] = there ? size : 0.0f, pairs.words[2 * v + 1] = input_factor(size, u_raw.get(v));
            }
            *reinterpret_cast<Vector<float, 2 * WIDTH>*>(shared.steps + my_vector) = pairs;
        };
        auto stage_slopes = [&](int buffer, const float (&of_raw)[WIDTH]) {
            if (!brings) return;
            auto g_raw = shared.g_slots[buffer][threadIdx.x % VECTORS];
            auto z_raw = shared.z_slots[buffer][HAS_Z ? threadIdx.x % VECTORS : 0];
            Vector<float, 2 * WIDTH> pairs;
            Vector<float, WIDTH> open;
#pragma unroll
            for (int v = 0; v < WIDTH; v++) {
                float gate = HAS_Z ? z_raw.get(v) : 0.0f;
                open.words[v] = HAS_Z ? sigmoid(gate) : 0.0f;
                pairs.words[2 * v] = g_raw.get(v) * (HAS_Z ? gate * open.get(v) : 1.0f);
                pairs.words[2 * v + 1] = SOFTPLUS ? of_raw[v] : 1.0f;
            }
            *reinterpret_cast<Vector<float, 2 * WIDTH>*>(shared.slopes + my_vector) = pairs;
            if (HAS_Z) *reinterpret_cast<Vector<float, WIDTH>*>(shared.gates + my_vector) = open;
        };
        auto stage_marks = [&](int t0) {
            if (SEGMENTS && threadIdx.x < PIECE) shared.marks[threadIdx.x] = t0 + threadIdx.x < length ? marks[t0 + threadIdx.x] : PADDING;
        };
        auto finish = [] {  // all of the next piece is there, and all of this one has been read
            wait_for_copies();
            __syncthreads();
        };

        int buffer = 0, last = (to - 1) / EVERY * EVERY;
        fetch(last, 0, pieces_of(last) == 1);
        bring_start(last);
        finish();
        for (int chunk = last; chunk >= from; chunk -= EVERY) {
            int pieces = pieces_of(chunk);
            begin();
            keep(0, h);

            // On: the state before each piece but the first.
            for (int piece = 0; piece < pieces - 1; piece++, buffer ^= 1) {
                int t0 = chunk + piece * PIECE;
                float unused[WIDTH];
                stage_steps(t0, buffer, false, unused);
                stage_orders<1>(shared.rows, copy_of_B, shared.B_slots);
                stage_marks(t0);
                __syncthreads();
                fetch(t0 + PIECE, buffer ^ 1, piece + 2 == pieces);
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    float row[S];
                    OfB::read(row, my_B, i);
                    bool restarts = SEGMENTS && shared.marks[i] == RESTARTS;
#pragma unroll
                    for (int k = 0; k < KC; k++) {
                        float2 step = shared.steps[i * CHANNELS + place[k]];
#pragma unroll
                        for (int n = 0; n < S; n++) {
                            Step now(step.x, decay_rate[k][n]);
                            h[k][n] = fmaf(now.decay, restarts ? 0.0f : h[k][n], step.y * now.scale * row[n]);
                        }
                    }
                }
                keep(piece + 1, h);
                finish();
            }

            // Back: piece by piece.
            for (int piece = pieces - 1; piece >= 0; piece--, buffer ^= 1) {
                int t0 = chunk + piece * PIECE, t = t0 + my_token;
                float of_raw[WIDTH];
                stage_steps(t0, buffer, true, of_raw);
                stage_slopes(buffer, of_raw);
                stage_orders<2>(shared.rows, copy_of_BC, shared.B_slots, shared.C_slots);
                stage_marks(t0);
                __syncthreads();
                if (piece > 0 || chunk > from) fetch(piece ? t0 - PIECE : chunk - EVERY, buffer ^ 1, piece > 0);
                if (piece == 0 && chunk > from) bring_start(chunk - EVERY);

                // Two lanes have exchanged channels before; the PAIRS lanes of a channel sum GROUP tokens.
                auto pair_sum = [&](const float (&both)[KC]) { return both[0] + __shfl_xor_sync(0xffffffff, both[1], CHANNEL_LANES); };
                auto collect = [&](float (&sums)[GROUP], int token, float* to) {
                    sum_over_lanes<PAIRS, KC * CHANNEL_LANES>(sums, lane / KC);
                    if (lane / KC % (PAIRS / GROUP) == 0) to[(token + lane / KC / (PAIRS / GROUP)) * PITCH + place[0]] = sums[0];
                };
                float states[PIECE][KC][S], decays[PIECE][KC][S];
                auto before = [&](int i, float (&previous)[KC][S]) {  // the states before a token of the piece
                    if (i == 0) kept_before(piece, previous);
                    if (i > 0)
#pragma unroll
                        for (int k = 0; k < KC; k++)
#pragma unroll
                            for (int n = 0; n < S; n++) previous[k][n] = states[i ? i - 1 : 0][k][n];
                };
                float sums_y[GROUP];
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    float row[2 * S];
                    BC::read(row, my_rows, i);
                    bool restarts = SEGMENTS && shared.marks[i] == RESTARTS;
                    float of_y[KC], previous[KC][S];
                    before(i, previous);
#pragma unroll
                    for (int k = 0; k < KC; k++) {
                        float2 step = shared.steps[i * CHANNELS + place[k]];
                        float sum = 0.0f;
#pragma unroll
                        for (int n = 0; n < S; n++) {
                            Step now(step.x, decay_rate[k][n]);
                            if (DECAYS) decays[i][k][n] = now.decay;
                            states[i][k][n] = fmaf(now.decay, restarts ? 0.0f : previous[k][n], step.y * now.scale * row[n]);
                            sum = n ? fmaf(states[i][k][n], row[S + n], sum) : states[i][k][n] * row[S + n];
                        }
                        of_y[k] = sum;
                    }
                    if (HAS_Z) sums_y[i % GROUP] = pair_sum(of_y);
                    if (HAS_Z && i % GROUP == GROUP - 1) collect(sums_y, i - (GROUP - 1), shared.ys);
                }

                float sums_input[GROUP], sums_size[GROUP];
#pragma unroll
                for (int i = PIECE - 1; i >= 0; i--) {
                    float row[2 * S], of_row[2 * S], of_inputs[KC], of_sizes[KC], previous[KC][S];
                    BC::read(row, my_rows, i);
                    before(i, previous);
                    bool restarts = SEGMENTS && shared.marks[i] == RESTARTS;
#pragma unroll
                    for (int k = 0; k < KC; k++) {
                        float2 step = shared.steps[i * CHANNELS + place[k]];
                        float gradient = shared.slopes[i * CHANNELS + place[k]].of_y, of_u = 0.0f, of_dt = 0.0f;
#pragma unroll
                        for (int n = 0; n < S; n++) {
                            Step now(step.x, decay_rate[k][n]);
                            if (DECAYS) now.decay = decays[i][k][n];
                            if (restarts) previous[k][n] = 0.0f;
                            float of_h = fmaf(gradient, row[S + n], carry[k][n]), factor = step.y * now.scale;
                            of_row[n] = k ? fmaf(of_h, factor, of_row[n]) : of_h * factor;
                            of_row[S + n] = k ? fmaf(gradient, states[i][k][n], of_row[S + n]) : gradient * states[i][k][n];
                            carry[k][n] = restarts ? 0.0f : of_h * now.decay;
                            if (DISCRETIZATION == 0) {
                                float of_x = carry[k][n] * previous[k][n];
                                of_u = n ? fmaf(of_h, row[n], of_u) : of_h * row[n];
                                of_dt = n ? fmaf(of_x, decay_rate[k][n], of_dt) : of_x * decay_rate[k][n];
                                sum_A[k][n] = fmaf(of_x, step.x, sum_A[k][n]);
                            } else {
                                float of_x = of_h * previous[k][n] * now.decay_x, of_scale = of_h * row[n] * step.y;
                                of_u = fmaf(of_h * row[n], now.scale, of_u);
                                of_dt += fmaf(of_x, decay_rate[k][n], of_scale * now.scale_dt);
                                sum_A[k][n] += fmaf(of_x, step.x, of_scale * now.scale_A);
                            }
                        }
                        of_inputs[k] = of_u;
                        of_sizes[k] = of_dt;
                    }
                    sums_input[i % GROUP] = pair_sum(of_inputs);
                    sums_size[i % GROUP] = pair_sum(of_sizes);
                    // Sums over the lanes' orders, then over the lanes of one order.
#pragma unroll
                    for (int bit = 1; bit < COPIES; bit *= 2)
#pragma unroll
                        for (int n = 0; n < 2 * S; n += 2 * bit)
                            of_row[n] += __shfl_xor_sync(0xffffffff, of_row[n + bit], bit * SAME);
                    float held[2 * HELD];
#pragma unroll
                    for (int n = 0; n < 2 * HELD; n++) held[n] = of_row[n * COPIES];
                    sum_over_lanes<SAME, 1>(held, channel_lane % SAME);
                    constexpr int REST = 2 * HELD > SAME ? 2 * HELD / SAME : 1, SHARED_BY = 2 * HELD < SAME ? SAME / (2 * HELD) : 1;
                    float* to_row = of_matrices + (warp * PIECE + i) * 2 * PADDED + lane * S + order;
#pragma unroll
                    for (int v = 0; v < REST; v++) {
                        int n = channel_lane % SAME / SHARED_BY * REST + v;
                        if (channel_lane % SHARED_BY == 0) to_row[n / HELD * PADDED + n % HELD * COPIES] = held[v];
                    }
                    if (i % GROUP == 0) {
                        collect(sums_input, i, shared.of_input);
                        collect(sums_size, i, shared.of_size);
                    }
                }
                finish();

                if (t < length && count > 0) {
                    auto u_raw = shared.u_slots[buffer][threadIdx.x];
                    auto g_raw = shared.g_slots[buffer][threadIdx.x];
                    auto z_raw = shared.z_slots[buffer][HAS_Z ? threadIdx.x : 0];
                    auto vector = [](const float* from) { return *reinterpret_cast<const Vector<float, WIDTH>*>(from); };
                    auto step = *reinterpret_cast<const Vector<float, 2 * WIDTH>*>(shared.steps + my_vector);
                    auto slopes = *reinterpret_cast<const Vector<float, 2 * WIDTH>*>(shared.slopes + my_vector);
                    int index = my_token * PITCH + my_channel;
                    auto skip = vector(shared.skips + my_channel), of_u = vector(shared.of_input + index), of_dt = vector(shared.of_size + index);
                    auto open = vector(shared.gates + (HAS_Z ? my_vector : 0)), y = vector(shared.ys + (HAS_Z ? index : 0));
                    bool padding = SEGMENTS && shared.marks[my_token] == PADDING;
                    float values_u[WIDTH], values_dt[WIDTH], values_z[WIDTH], values_y[WIDTH];
                    auto sum_skip = shared.sums_skip[threadIdx.x], sum_bias = shared.sums_bias[threadIdx.x];
#pragma unroll
                    for (int v = 0; v < WIDTH; v++) {
                        float input = u_raw.get(v), size = step.get(2 * v), slope = slopes.get(2 * v);
                        if (HAS_Z) {
                            float gate = z_raw.get(v), closed = 1.0f - open.get(v);
                            float opened = fmaf(skip.get(v), input, y.get(v)) * open.get(v);
                            values_z[v] = g_raw.get(v) * opened * fmaf(gate, closed, 1.0f);
                            values_y[v] = padding ? 0.0f : opened * gate;
                        }
                        values_u[v] = fmaf(skip.get(v), slope, DISCRETIZATION == 0 ? of_u.get(v) * size : of_u.get(v));
                        values_dt[v] = DISCRETIZATION == 0 ? fmaf(input, of_u.get(v), LN2 * of_dt.get(v)) : of_dt.get(v);
                        if (SOFTPLUS) values_dt[v] *= slopes.get(2 * v + 1);
                        if (padding) values_u[v] = values_dt[v] = values_z[v] = input = 0.0f;
                        sum_skip.words[v] = fmaf(slope, input, sum_skip.get(v));
                        sum_bias.words[v] += values_dt[v];
                    }
                    shared.sums_skip[threadIdx.x] = sum_skip, shared.sums_bias[threadIdx.x] = sum_bias;
                    i64 place_out = (batch * length + t) * channels + first + my_channel;
                    Vector<U, WIDTH> out_u;
                    out_u.set(values_u);
                    store<ALIGNED>(grad_u + place_out, out_u, count);
                    Vector<DT, WIDTH> out_dt;
                    out_dt.set(values_dt);
                    store<ALIGNED>(grad_dt + place_out, out_dt, count);
                    if (HAS_Z) {
                        Vector<Z, WIDTH> out_z;
                        out_z.set(values_z);
                        store<ALIGNED>(grad_z + (batch * grad_z_b + t * grad_z_t + first + my_channel), out_z, count);
                        if (y_again) {
                            Vector<U, WIDTH> out_y;
                            out_y.set(values_y);
                            store<ALIGNED>(y_again + place_out, out_y, count);
                        }
                    }
                }
#pragma unroll
                for (int begin = 0; begin < PIECE * 2 * PADDED; begin += 2 * THREADS) {
                    int index = begin + 2 * threadIdx.x;
                    if (PIECE * PADDED % THREADS && index >= PIECE * 2 * PADDED) continue;
                    int token = index / (2 * PADDED), which = index / PADDED % 2, n = index % PADDED;
                    if (t0 + token >= length || n >= STATES) continue;
                    float2 sum = {0.0f, 0.0f};
#pragma unroll
                    for (int w = 0; w < WARPS; w++) {
                        auto part = *reinterpret_cast<const float2*>(of_matrices + w * PIECE * 2 * PADDED + index);
                        sum.x += part.x, sum.y += part.y;
                    }
                    if (SEGMENTS && shared.marks[token] == PADDING) sum = {0.0f, 0.0f};
                    float* target = (which ? partial_C : partial_B) + t0 * of_token + (token * int(of_token) + n);
                    bool more = tile > block * tiles_a_block;
                    if (more) {  // only this block adds there: the order is that of its tiles
                        atomicAdd(target, sum.x);
                        if (n + 1 < STATES) atomicAdd(target + 1, sum.y);
                    } else if (STATES % 2 == 0) {
                        *reinterpret_cast<float2*>(target) = sum;
                    } else {
                        target[0] = sum.x;
                        if (n + 1 < STATES) target[1] = sum.y;
                    }
                }
                if (SEGMENTS) __syncthreads();  // shared.marks are read above and written next
            }
        }

        __syncthreads();
        for (int index = threadIdx.x; index < 2 * CHANNELS; index += THREADS) {
            int c = index % CHANNELS;
            auto* sums = reinterpret_cast<const float*>(index < CHANNELS ? shared.sums_skip : shared.sums_bias);
            float sum = 0.0f;
#pragma unroll
            for (int token = 0; token < PIECE; token++) sum += sums[token * CHANNELS + c];
            if (c < valid) (index < CHANNELS ? grad_D : grad_bias)[(batch * splits + my_split) * channels + first + c] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < KC; k++)
#pragma unroll
            for (int i = 0; i < S; i++)
                if (state(i) < STATES && place[k] < valid) {
                    grad_A[(batch * splits + my_split) * channels * STATES + at[k] + state(i)] = sum_A[k][i];
                    if (CHAINED && my_split > 0) passed[batch * channels * STATES + at[k] + state(i)] = carry[k][i];
                    if (my_split == 0) grad_initial[batch * channels * STATES + at[k] + state(i)] = carry[k][i];
                }
    }
    if (CHAINED) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) release(progress + blockIdx.y * gridDim.x + blockIdx.x, blockIdx.z + 1);
    }
}

// Writes the sums of `rows` rows, `stride` numbers apart; a thread makes four of them, or one without alignment.
template <class T> INLINE void sum_rows(T* to, const float* from, i64 rows, i64 stride) {
    constexpr int COUNT = ALIGNED ? 4 : 1;
    Vector<float, 4> part, sums = {};
    for (i64 row = 0; row < rows; row++) {
        load<ALIGNED>(part, from + row * stride, COUNT);
#pragma unroll
        for (int v = 0; v < COUNT; v++) sums.words[v] += part.get(v);
    }
    Vector<T, 4> vector;
    vector.set(sums.words);
    store<ALIGNED>(to, vector, COUNT);
}

// The sums over blocks of the gradients of B and C; over rows and splits of those of A, D and dt_bias.
extern "C" __global__ void __launch_bounds__(THREADS) scan_sums(
    const float* __restrict__ partial, i64 blocks, const float* __restrict__ of_A, const float* __restrict__ of_channels,
    i64 rows, BM* __restrict__ grad_B, CM* __restrict__ grad_C, float* __restrict__ grad_A, float* __restrict__ grad_D,
    float* __restrict__ grad_bias, i64 of_matrix, i64 channels) {
    i64 at = (blockIdx.x * i64(THREADS) + threadIdx.x) * (ALIGNED ? 4 : 1), states = channels * STATES;
    if (at < of_matrix) return sum_rows(grad_B + at, partial + at, blocks, 2 * of_matrix);
    if ((at -= of_matrix) < of_matrix) return sum_rows(grad_C + at, partial + of_matrix + at, blocks, 2 * of_matrix);
    if ((at -= of_matrix) < states) return sum_rows(grad_A + at, of_A + at, rows, states);
    if ((at -= states) < channels) return sum_rows(grad_D + at, of_channels + at, rows, channels);
    if ((at -= channels) < channels) return sum_rows(grad_bias + at, of_channels + rows * channels + at, rows, channels);
}
