// The gradients of the selective scan, for each split of the tokens on its own: `carries` is the gradient that the state
// after the split gets from behind it. A block takes tiles of channels one after the other, and a split's chunks of EVERY
// tokens from the last to the first. The states of a chunk are computed again: once on from the chunk's start, keeping
// one in PIECE in shared memory, then piece by piece, the last first, in registers, walking back over each at once.
// A thread holds S states of each of KC channels. Sums over states meet in a channel's lanes, sums over channels (of B
// and C) in the lanes that hold the same states, then over the block's warps, then in `partial` over blocks: always in
// the same order. Macros: see scan.cuh, and PIECE, EVERY, BLOCKS.

#include "scan.cuh"

constexpr int KC = 2, PIECES = EVERY / PIECE, WIDTH = 4;
constexpr int WARPS = THREADS / 32, CHANNEL_LANES = 32 / LANES, CHANNELS = WARPS * CHANNEL_LANES * KC;
constexpr int VECTORS = PIECE * CHANNELS / WIDTH, PER_TOKEN = CHANNELS / WIDTH;
// Neighbouring channel lanes hold neighbouring states in swapped order, and neighbouring lanes the two channels: so the
// first round of each sum is between registers that are known when compiling.
constexpr int SWAPS = CHANNEL_LANES > 1 ? 2 : 1;
constexpr int PAIRS = LANES / KC;                     // lanes that still hold parts of a sum over states after it
constexpr int GROUP = PAIRS < PIECE ? PAIRS : PIECE;     // tokens whose sums over states are taken together
using OfB = Rows<PIECE, 1>;
using BC = Rows<PIECE, 2>;
constexpr int PITCH = CHANNELS;
static_assert(VECTORS <= THREADS && THREADS % PER_TOKEN == 0 && LANES >= 4);

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_backward(
    const U* __restrict__ u, i64 u_b, i64 u_t, const DT* __restrict__ dt, i64 dt_b, i64 dt_t, const Z* __restrict__ z,
    i64 z_b, i64 z_t, const BM* __restrict__ B, i64 B_b, i64 B_t, i64 B_g, const CM* __restrict__ C, i64 C_b, i64 C_t,
    i64 C_g, const float* __restrict__ A, const float* __restrict__ D, const float* __restrict__ dt_bias,
    const signed char* __restrict__ marks, const U* __restrict__ grad_y, i64 g_b, i64 g_t,
    const float* __restrict__ starts, const float* __restrict__ carries, U* __restrict__ grad_u, DT* __restrict__ grad_dt,
    Z* __restrict__ grad_z, float* __restrict__ grad_A, float* __restrict__ grad_D, float* __restrict__ grad_bias,
    float* __restrict__ grad_initial, float* partial, i64 split_, i64 tiles_a_block, i64 length_, i64 channels,
    i64 groups) {
    __shared__ alignas(16) float kept[(PIECES - 1) * KC * S * THREADS];
    __shared__ alignas(16) float2 steps[PIECE * CHANNELS];  // see Step
    __shared__ alignas(16) float slopes[PIECE * CHANNELS];  // gradients of y before the gate
    __shared__ alignas(16) float rows[SWAPS * BC::SIZE + 4];
    __shared__ alignas(16) float ys[HAS_Z ? PIECE * PITCH : 4], of_input[PIECE * PITCH], of_size[PIECE * PITCH];
    __shared__ alignas(16) float of_matrices[WARPS * PIECE * 2 * PADDED];
    __shared__ Vector<BM, 8> B_slots[BC::VECTORS];
    __shared__ Vector<CM, 8> C_slots[BC::VECTORS];
    __shared__ signed char piece_marks[PIECE];

    int length = int(length_), split = int(split_), warp = threadIdx.x / 32;
    int lane = threadIdx.x % LANES, channel_lane = threadIdx.x % 32 / LANES, swap = SWAPS > 1 ? channel_lane % 2 : 0;
    i64 channels_a_group = channels / groups, tiles = (channels_a_group + CHANNELS - 1) / CHANNELS;
    i64 blocks_a_group = (tiles + tiles_a_block - 1) / tiles_a_block;
    i64 group = blockIdx.x / blocks_a_group, block = blockIdx.x % blocks_a_group, batch = blockIdx.z;
    int splits = gridDim.y, my_split = blockIdx.y, from = my_split * split, to = min(length, from + split);
    int my_token = threadIdx.x / PER_TOKEN, my_channel = threadIdx.x % PER_TOKEN * WIDTH;  // that this thread brings
    bool brings = threadIdx.x < VECTORS;
    const float* my_B = rows + swap * (OfB::SIZE + 4) + lane * OfB::ROW;  // 4: the copies are read without conflicts
    const float* my_rows = rows + swap * (BC::SIZE + 4) + lane * BC::ROW;
    i64 of_token = groups * STATES, of_matrix = gridDim.z * i64(length) * of_token;
    partial += block * 2 * of_matrix + batch * length * of_token + group * STATES;
    B += batch * B_b + group * B_g, C += batch * C_b + group * C_g;
    if (SEGMENTS) marks += batch * length;

    for (i64 tile = block * tiles_a_block; tile < min(tiles, (block + 1) * tiles_a_block); tile++) {
        i64 first = group * channels_a_group + tile * CHANNELS;
        int valid = int(min(i64(CHANNELS), channels_a_group - tile * CHANNELS)), count = brings ? min(WIDTH, valid - my_channel) : 0;
        const U* tile_u = u + batch * u_b + first;
        const DT* tile_dt = dt + batch * dt_b + first;
        const U* tile_g = grad_y + batch * g_b + first;
        const Z* tile_z = HAS_Z ? z + batch * z_b + first : z;
        float sum_skip[WIDTH], sum_bias[WIDTH];
#pragma unroll
        for (int v = 0; v < WIDTH; v++) sum_skip[v] = sum_bias[v] = 0.0f;
        int place[KC];
        auto state = [&](int i) { return lane * S + (i ^ swap); };
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
                carry[k][i] = there && carries ? carries[(batch * splits + my_split) * channels * STATES + at[k] + state(i)] : 0.0f;
                sum_A[k][i] = 0.0f;
            }
        }

        Vector<U, WIDTH> u_raw, g_raw;
        Vector<DT, WIDTH> dt_raw;
        Vector<Z, WIDTH> z_raw;
        Vector<float, WIDTH> bias;
        float size[WIDTH];
        auto real = [&](int t) { return t < length && !(SEGMENTS && marks[t] == PADDING); };
        auto fetch_input = [&](int t0) {
            load<ALIGNED>(bias, dt_bias + (dt_bias ? first + my_channel : 0), dt_bias ? count : 0);
            int t = t0 + my_token, valid_count = t < length ? count : 0;
            i64 row = t < length ? t : 0;
            load<ALIGNED>(u_raw, tile_u + (row * u_t + my_channel), valid_count);
            load<ALIGNED>(dt_raw, tile_dt + (row * dt_t + my_channel), valid_count);
        };
        auto fetch_slope = [&](int t0) {
            int t = t0 + my_token, valid_count = t < length ? count : 0;
            i64 row = t < length ? t : 0;
            load<ALIGNED>(g_raw, tile_g + (row * g_t + my_channel), valid_count);
            if (HAS_Z) load<ALIGNED>(z_raw, tile_z + (row * z_t + my_channel), valid_count);
        };
        auto stage_steps = [&](int t0) {
            bool there = brings && real(t0 + my_token);
            float4 pairs[WIDTH / 2];
#pragma unroll
            for (int v = 0; v < WIDTH; v += 2) {
                float2 pair[2];
                for (int i = 0; i < 2; i++) {
                    size[v + i] = dt_raw.get(v + i) + bias.get(v + i);
                    if (SOFTPLUS) size[v + i] = softplus(size[v + i]);
                    pair[i] = there ? float2{size[v + i], input_factor(size[v + i], u_raw.get(v + i))} : float2{0.0f, 0.0f};
                }
                pairs[v / 2] = {pair[0].x, pair[0].y, pair[1].x, pair[1].y};
            }
            if (brings)
#pragma unroll
                for (int v = 0; v < WIDTH; v += 2)
                    *reinterpret_cast<float4*>(steps + my_token * CHANNELS + my_channel + v) = pairs[v / 2];
        };
        auto stage_marks = [&](int t0) {
            if (SEGMENTS && threadIdx.x < PIECE) piece_marks[threadIdx.x] = t0 + threadIdx.x < length ? marks[t0 + threadIdx.x] : PADDING;
        };

        for (int chunk = (to - 1) / EVERY * EVERY; chunk >= from; chunk -= EVERY) {
            int pieces = (min(EVERY, length - chunk) + PIECE - 1) / PIECE;
#pragma unroll
            for (int k = 0; k < KC; k++)
#pragma unroll
                for (int i = 0; i < S; i++)
                    h[k][i] = state(i) < STATES && place[k] < valid
                        ? starts[(batch * ((length + EVERY - 1) / EVERY) + chunk / EVERY) * channels * STATES + at[k] + state(i)]
                        : 0.0f;

            // On: the state before each piece but the first.
            if (pieces > 1) {
                fetch_input(chunk);
                OfB::fetch(B_slots, B, B_t, chunk, length, marks);
            }
            for (int piece = 0; piece < pieces - 1; piece++) {
                int t0 = chunk + piece * PIECE;
                stage_steps(t0);
                wait_for_copies();
                OfB::stage(rows, B_slots);
                if (SWAPS > 1) OfB::stage_swapped(rows + OfB::SIZE + 4, B_slots);
                stage_marks(t0);
                __syncthreads();
                if (piece + 2 < pieces) {
                    fetch_input(t0 + PIECE);
                    OfB::fetch(B_slots, B, B_t, t0 + PIECE, length, marks);
                }
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    float row[S];
                    OfB::read(row, my_B, i);
                    bool restarts = SEGMENTS && piece_marks[i] == RESTARTS;
#pragma unroll
                    for (int k = 0; k < KC; k++) {
                        float2 step = steps[i * CHANNELS + place[k]];
#pragma unroll
                        for (int n = 0; n < S; n++) {
                            Step now(step.x, decay_rate[k][n]);
                            h[k][n] = fmaf(now.decay, restarts ? 0.0f : h[k][n], step.y * now.scale * row[n]);
                        }
                    }
                }
#pragma unroll
                for (int k = 0; k < KC; k++)
#pragma unroll
                    for (int n = 0; n < S; n++) kept[((piece * KC + k) * S + n) * THREADS + threadIdx.x] = h[k][n];
                __syncthreads();
            }

            // Back: piece by piece.
            fetch_input(chunk + (pieces - 1) * PIECE);
            fetch_slope(chunk + (pieces - 1) * PIECE);
            BC::fetch(B_slots, B, B_t, chunk + (pieces - 1) * PIECE, length, marks);
            BC::fetch(C_slots, C, C_t, chunk + (pieces - 1) * PIECE, length, marks);
            for (int piece = pieces - 1; piece >= 0; piece--) {
                int t0 = chunk + piece * PIECE, t = t0 + my_token;
                stage_steps(t0);
                bool there = brings && real(t);
                float slope[WIDTH];
#pragma unroll
                for (int v = 0; v < WIDTH; v++) {
                    float gate = HAS_Z ? z_raw.get(v) : 0.0f;
                    slope[v] = there ? g_raw.get(v) * (HAS_Z ? gate * sigmoid(gate) : 1.0f) : 0.0f;
                }
                if (brings)
                    *reinterpret_cast<float4*>(slopes + my_token * CHANNELS + my_channel) = {slope[0], slope[1], slope[2], slope[3]};
                wait_for_copies();
                BC::stage(rows, B_slots, C_slots);
                if (SWAPS > 1) BC::stage_swapped(rows + BC::SIZE + 4, B_slots, C_slots);
                stage_marks(t0);
                __syncthreads();
                if (piece > 0) {
                    BC::fetch(B_slots, B, B_t, t0 - PIECE, length, marks);
                    BC::fetch(C_slots, C, C_t, t0 - PIECE, length, marks);
                }

                // Two lanes have exchanged channels before; the PAIRS lanes of a channel sum GROUP tokens.
                auto pair_sum = [&](const float (&both)[KC]) { return both[0] + __shfl_xor_sync(0xffffffff, both[1], 1); };
                auto collect = [&](float (&sums)[GROUP], int token, float* to) {
                    sum_over_lanes<PAIRS, KC>(sums, lane / KC);
                    if (lane / KC % (PAIRS / GROUP) == 0) to[(token + lane / KC / (PAIRS / GROUP)) * PITCH + place[0]] = sums[0];
                };
                float before[KC][S], states[PIECE][KC][S];
#pragma unroll
                for (int k = 0; k < KC; k++)
#pragma unroll
                    for (int n = 0; n < S; n++)
                        before[k][n] = piece == 0
                            ? (state(n) < STATES && place[k] < valid
                                   ? starts[(batch * ((length + EVERY - 1) / EVERY) + chunk / EVERY) * channels * STATES + at[k] + state(n)]
                                   : 0.0f)
                            : kept[(((piece - 1) * KC + k) * S + n) * THREADS + threadIdx.x];
                float sums_y[GROUP];
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    float row[2 * S];
                    BC::read(row, my_rows, i);
                    bool restarts = SEGMENTS && piece_marks[i] == RESTARTS;
                    float of_y[KC];
#pragma unroll
                    for (int k = 0; k < KC; k++) {
                        float2 step = steps[i * CHANNELS + place[k]];
                        float sum = 0.0f;
#pragma unroll
                        for (int n = 0; n < S; n++) {
                            Step now(step.x, decay_rate[k][n]);
                            float previous = i ? states[i ? i - 1 : 0][k][n] : before[k][n];
                            states[i][k][n] = fmaf(now.decay, restarts ? 0.0f : previous, step.y * now.scale * row[n]);
                            sum = fmaf(states[i][k][n], row[S + n], sum);
                        }
                        of_y[k] = sum;
                    }
                    if (HAS_Z) sums_y[i % GROUP] = pair_sum(of_y);
                    if (HAS_Z && i % GROUP == GROUP - 1) collect(sums_y, i - (GROUP - 1), ys);
                }

                float sums_input[GROUP], sums_size[GROUP];
#pragma unroll
                for (int i = PIECE - 1; i >= 0; i--) {
                    float row[2 * S], of_row[2 * S], of_inputs[KC], of_sizes[KC];
                    BC::read(row, my_rows, i);
                    bool restarts = SEGMENTS && piece_marks[i] == RESTARTS;
#pragma unroll
                    for (int n = 0; n < 2 * S; n++) of_row[n] = 0.0f;
#pragma unroll
                    for (int k = 0; k < KC; k++) {
                        float2 step = steps[i * CHANNELS + place[k]];
                        float gradient = slopes[i * CHANNELS + place[k]], of_u = 0.0f, of_dt = 0.0f;
#pragma unroll
                        for (int n = 0; n < S; n++) {
                            Step now(step.x, decay_rate[k][n]);
                            float previous = i ? states[i ? i - 1 : 0][k][n] : before[k][n];
                            if (restarts) previous = 0.0f;
                            float of_h = fmaf(gradient, row[S + n], carry[k][n]);
                            of_row[n] = fmaf(of_h, step.y * now.scale, of_row[n]);
                            of_row[S + n] = fmaf(gradient, states[i][k][n], of_row[S + n]);
                            carry[k][n] = restarts ? 0.0f : of_h * now.decay;
                            if (DISCRETIZATION == 0) {
                                float of_x = carry[k][n] * previous;
                                of_u = fmaf(of_h, row[n], of_u);
                                of_dt = fmaf(of_x, decay_rate[k][n], of_dt);
                                sum_A[k][n] = fmaf(of_x, step.x, sum_A[k][n]);
                            } else {
                                float of_x = of_h * previous * now.decay_x, of_scale = of_h * row[n] * step.y;
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
                    float* to_row = of_matrices + (warp * PIECE + i) * 2 * PADDED + lane * S;
                    if constexpr (SWAPS > 1) {
                        constexpr int REST = SWAPS > 1 ? CHANNEL_LANES / 2 : 1, HELD = S > REST ? S / REST : 1, SHARED_BY = S < REST ? REST / S : 1;
                        float halves[S];  // of B's states, then of C's: of each pair the state that this lane has first
#pragma unroll
                        for (int n = 0; n < S; n++)
                            halves[n] = of_row[2 * n] + __shfl_xor_sync(0xffffffff, of_row[2 * n + 1], LANES);
                        sum_over_lanes<REST, 2 * LANES>(halves, channel_lane / 2);
#pragma unroll
                        for (int v = 0; v < HELD; v++) {
                            int n = channel_lane / 2 / SHARED_BY * HELD + v;
                            if (channel_lane / 2 % SHARED_BY == 0)
                                to_row[n / (S / 2) * PADDED + n % (S / 2) * 2 + swap] = halves[v];
                        }
                    } else {
#pragma unroll
                        for (int n = 0; n < 2 * S; n++) to_row[n / S * PADDED + n % S] = of_row[n];
                    }
                    if (i % GROUP == 0) {
                        collect(sums_input, i, of_input);
                        collect(sums_size, i, of_size);
                    }
                }
                fetch_input(t0);
                fetch_slope(t0);
                __syncthreads();

                if (t < length && count > 0) {
                    Vector<float, WIDTH> skip;
                    load<ALIGNED>(skip, D + (D ? first + my_channel : 0), D ? count : 0);
                    float values_u[WIDTH], values_dt[WIDTH], values_z[WIDTH];
#pragma unroll
                    for (int v = 0; v < WIDTH; v++) {
                        int index = my_token * PITCH + my_channel + v;
                        float input = u_raw.get(v), slope_v = g_raw.get(v), of_u = of_input[index], of_dt = of_size[index];
                        if (HAS_Z) {
                            float gate = z_raw.get(v), open = sigmoid(gate);
                            values_z[v] = slope_v * fmaf(skip.get(v), input, ys[index]) * open * fmaf(gate, 1.0f - open, 1.0f);
                            slope_v *= gate * open;
                        }
                        values_u[v] = fmaf(skip.get(v), slope_v, DISCRETIZATION == 0 ? of_u * size[v] : of_u);
                        values_dt[v] = DISCRETIZATION == 0 ? fmaf(input, of_u, LN2 * of_dt) : of_dt;
                        if (SOFTPLUS) values_dt[v] *= sigmoid(dt_raw.get(v) + bias.get(v));
                        if (!there) values_u[v] = values_dt[v] = values_z[v] = 0.0f;
                        sum_skip[v] += there ? slope_v * input : 0.0f;
                        sum_bias[v] += values_dt[v];
                    }
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
                        store<ALIGNED>(grad_z + place_out, out_z, count);
                    }
                }
                if (piece > 0) {
                    fetch_input(t0 - PIECE);
                    fetch_slope(t0 - PIECE);
                }
                for (int index = threadIdx.x; index < PIECE * 2 * PADDED; index += THREADS) {
                    int token = index / (2 * PADDED), which = index / PADDED % 2, n = index % PADDED;
                    if (t0 + token >= length || n >= STATES) continue;
                    float sum = 0.0f;
#pragma unroll
                    for (int w = 0; w < WARPS; w++) sum += of_matrices[w * PIECE * 2 * PADDED + index];
                    if (SEGMENTS && piece_marks[token] == PADDING) sum = 0.0f;
                    float* target = partial + which * of_matrix + (t0 + token) * of_token + n;
                    *target = tile == block * tiles_a_block ? sum : *target + sum;
                }
                if (SEGMENTS) __syncthreads();  // piece_marks are read above and written next
            }
        }

        __syncthreads();
        float* sums = kept;
#pragma unroll
        for (int v = 0; v < WIDTH; v++)
            if (brings) {
                sums[my_token * CHANNELS + my_channel + v] = sum_skip[v];
                sums[(PIECE + my_token) * CHANNELS + my_channel + v] = sum_bias[v];
            }
        __syncthreads();
        for (int index = threadIdx.x; index < 2 * CHANNELS; index += THREADS) {
            int c = index % CHANNELS;
            float sum = 0.0f;
#pragma unroll
            for (int token = 0; token < PIECE; token++) sum += sums[(index / CHANNELS * PIECE + token) * CHANNELS + c];
            if (c < valid) (index < CHANNELS ? grad_D : grad_bias)[(batch * splits + my_split) * channels + first + c] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < KC; k++)
#pragma unroll
            for (int i = 0; i < S; i++)
                if (state(i) < STATES && place[k] < valid) {
                    grad_A[(batch * splits + my_split) * channels * STATES + at[k] + state(i)] = sum_A[k][i];
                    if (my_split == 0) grad_initial[batch * channels * STATES + at[k] + state(i)] = carry[k][i];
                }
    }
}
