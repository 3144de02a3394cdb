// The selective scan from the first token to the last: y, the final state, and the state before every `EVERY`th token.
// Blocks of one split of the tokens each, `split` tokens long; `initial` is what each split is given.
// Macros: see scan.cuh, EVERY (0: keep none), and BLOCKS, how many are to run on a multiprocessor at once.

#include "scan.cuh"

constexpr int CHANNELS = THREADS / LANES;      // of a block
constexpr int WIDTH = 8;                       // channels that a thread brings at once
constexpr int GROUP = LANES < 4 ? 4 : LANES > 8 ? 8 : LANES;  // tokens whose sums over states are taken together
constexpr int HELD = GROUP / LANES ? GROUP / LANES : 1, SHARED_BY = LANES / GROUP ? LANES / GROUP : 1;  // sums and lanes
constexpr int PITCH = CHANNELS + (LANES == 1 ? 0 : LANES >= 8 ? 4 : 32 / LANES);  // of y's rows: stores free of conflicts
using Work = Share<TOKENS, CHANNELS, WIDTH>;
using Place = Steps<CHANNELS>;
using BC = Rows<TOKENS, 2>;
static_assert(CHANNELS % WIDTH == 0 && TOKENS % GROUP == 0 && EVERY % TOKENS == 0);

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_forward(
    const U* __restrict__ u, i64 u_b, i64 u_t, const DT* __restrict__ dt, i64 dt_b, i64 dt_t, const Z* __restrict__ z,
    i64 z_b, i64 z_t, const BM* __restrict__ B, i64 B_b, i64 B_t, i64 B_g, const CM* __restrict__ C, i64 C_b, i64 C_t,
    i64 C_g, const float* __restrict__ A, const float* __restrict__ D, const float* __restrict__ dt_bias,
    const signed char* __restrict__ marks, const float* __restrict__ initial, U* __restrict__ y, float* __restrict__ final,
    float* __restrict__ starts, i64 split, i64 length_, i64 channels, i64 groups) {
    __shared__ alignas(16) float2 steps[TOKENS * Place::PITCH];
    __shared__ alignas(16) float ys[TOKENS * PITCH];
    __shared__ alignas(16) float rows[BC::SIZE];
    __shared__ alignas(16) float skips[CHANNELS], biases[CHANNELS];
    __shared__ signed char chunk_marks[TOKENS];
    // What comes from memory while the chunk before it is walked. u and z are needed until the chunk is written.
    __shared__ Vector<U, WIDTH> u_slots[2][Work::VECTORS];
    __shared__ Vector<Z, WIDTH> z_slots[2][HAS_Z ? Work::VECTORS : 1];
    __shared__ Vector<DT, WIDTH> dt_slots[Work::VECTORS];
    __shared__ Vector<BM, 8> B_slots[BC::VECTORS];
    __shared__ Vector<CM, 8> C_slots[BC::VECTORS];

    int splits = gridDim.z, from = int(blockIdx.z * split), all = int(length_), length = int(min(i64(all), from + split));
    int lane = threadIdx.x % LANES, channel = threadIdx.x / LANES;
    i64 channels_a_group = channels / groups, tiles = (channels_a_group + CHANNELS - 1) / CHANNELS;
    i64 group = blockIdx.x / tiles, first = blockIdx.x % tiles * CHANNELS, batch = blockIdx.y;
    int valid = int(min(i64(CHANNELS), channels_a_group - first));
    first += group * channels_a_group;
    u += batch * u_b + first, dt += batch * dt_b + first, y += batch * all * channels + first;
    if (HAS_Z) z += batch * z_b + first;
    if (SEGMENTS) marks += batch * all;
    if (EVERY) starts += (batch * ((all + EVERY - 1) / max(EVERY, 1)) + from / max(EVERY, 1)) * channels * STATES;
    B += batch * B_b + group * B_g, C += batch * C_b + group * C_g;

    if (threadIdx.x < CHANNELS) {
        bool there = threadIdx.x < valid;
        skips[threadIdx.x] = D && there ? D[first + threadIdx.x] : 0.0f;
        biases[threadIdx.x] = dt_bias && there ? dt_bias[first + threadIdx.x] : 0.0f;
    }
    float h[S], decay_rate[S];
#pragma unroll
    for (int i = 0; i < S; i++) {
        int n = lane * S + i;
        bool there = n < STATES && channel < valid;
        decay_rate[i] = there ? scaled(A[(first + channel) * STATES + n]) : 0.0f;
        h[i] = there && initial ? initial[((batch * splits + blockIdx.z) * channels + first + channel) * STATES + n] : 0.0f;
    }
    auto save = [&](float* to) {
#pragma unroll
        for (int i = 0; i < S; i++)
            if (lane * S + i < STATES && channel < valid) to[(first + channel) * STATES + lane * S + i] = h[i];
    };
    auto fetch = [&](int t0, int buffer) {
        Work::fetch(u_slots[buffer], u, u_t, t0, length, valid);
        Work::fetch(dt_slots, dt, dt_t, t0, length, valid);
        if (HAS_Z) Work::fetch(z_slots[buffer], z, z_t, t0, length, valid);
        BC::fetch(B_slots, B, B_t, t0, length, marks);
        BC::fetch(C_slots, C, C_t, t0, length, marks);
    };

    const float2* my_steps = steps + Place::place(channel);
    const float* my_rows = rows + lane * BC::ROW;
    float* my_ys = ys + lane / SHARED_BY * HELD * PITCH + channel;
    // What a group of tokens does to the states, but for the states themselves.
    struct Group {
        float decay[GROUP][S], input[GROUP][S], C[GROUP][S];
        INLINE void read(const float2* steps, const float* rows, const float (&decay_rate)[S]) {
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                float2 step = steps[i * Place::PITCH];
                float row[2 * S];
                BC::read(row, rows, i);
#pragma unroll
                for (int n = 0; n < S; n++) {
                    Step now(step.x, decay_rate[n]);
                    decay[i][n] = now.decay, input[i][n] = step.y * now.scale * row[n], C[i][n] = row[S + n];
                }
            }
        }
    };

    fetch(from, 0);
    __syncthreads();
    int buffer = 0;
    for (int t0 = from; t0 < length; t0 += TOKENS, buffer ^= 1) {
        wait_for_copies();
#pragma unroll
        for (int item = 0; item < Work::ITEMS; item++) {
            if (!Work::mine(item)) continue;
            int token = Work::token(item), c = Work::channel(item);
            bool there = t0 + token < length;
            if (SEGMENTS && there) there = marks[t0 + token] != PADDING;
            auto u_raw = u_slots[buffer][Work::index(item)];
            auto dt_raw = dt_slots[Work::index(item)];
#pragma unroll
            for (int v = 0; v < WIDTH; v += 2) {
                float2 pair[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float size = dt_raw.get(v + i) + biases[c + v + i];
                    size = SOFTPLUS ? softplus(size) : size;
                    pair[i] = there ? float2{size, input_factor(size, u_raw.get(v + i))} : float2{0.0f, 0.0f};
                }
                *reinterpret_cast<float4*>(steps + token * Place::PITCH + Place::place(c + v)) = {
                    pair[0].x, pair[0].y, pair[1].x, pair[1].y};
            }
        }
        BC::stage(rows, B_slots, C_slots);
        if (SEGMENTS && threadIdx.x < TOKENS)
            chunk_marks[threadIdx.x] = t0 + threadIdx.x < length ? marks[t0 + threadIdx.x] : PADDING;
        __syncthreads();
        if (t0 + TOKENS < length) fetch(t0 + TOKENS, buffer ^ 1);
        if (EVERY && t0 % max(EVERY, 1) == 0) {
            save(starts);
            starts += channels * STATES;
        }

        auto walk = [&](const Group& group, int first_token) {
            float sums[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                if (SEGMENTS && chunk_marks[first_token + i] == RESTARTS)
#pragma unroll
                    for (int n = 0; n < S; n++) h[n] = 0.0f;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < S; n++) {
                    h[n] = fmaf(group.decay[i][n], h[n], group.input[i][n]);
                    sum = n ? fmaf(h[n], group.C[i][n], sum) : h[n] * group.C[i][n];
                }
                sums[i] = sum;
            }
            sum_over_lanes<LANES, 1>(sums, lane);
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (lane % SHARED_BY == 0) my_ys[(first_token + i) * PITCH] = sums[i];
        };
        if (AHEAD) {  // a group's exponentials are on their way while the group before it is walked
            Group even, odd;
            even.read(my_steps, my_rows, decay_rate);
#pragma unroll 1
            for (int token = 0; token < TOKENS; token += 2 * GROUP) {
                const float2* at = my_steps + token * Place::PITCH;
                const float* row = my_rows + token * BC::PITCH;
                odd.read(at + GROUP * Place::PITCH, row + GROUP * BC::PITCH, decay_rate);
                walk(even, token);
                if (token + 2 * GROUP < TOKENS) even.read(at + 2 * GROUP * Place::PITCH, row + 2 * GROUP * BC::PITCH, decay_rate);
                walk(odd, token + GROUP);
            }
        } else {
#pragma unroll 1
            for (int token = 0; token < TOKENS; token += GROUP) {
                Group group;
                group.read(my_steps + token * Place::PITCH, my_rows + token * BC::PITCH, decay_rate);
                walk(group, token);
            }
        }
        __syncthreads();

#pragma unroll
        for (int item = 0; item < Work::ITEMS; item++) {
            int token = Work::token(item), c = Work::channel(item), t = t0 + token;
            if (!Work::mine(item) || t >= length) continue;
            bool padding = SEGMENTS && chunk_marks[token] == PADDING;
            auto u_raw = u_slots[buffer][Work::index(item)];
            auto z_raw = z_slots[buffer][HAS_Z ? Work::index(item) : 0];
            float values[WIDTH];
#pragma unroll
            for (int v = 0; v < WIDTH; v++) {
                float value = fmaf(skips[c + v], u_raw.get(v), ys[token * PITCH + c + v]);
                if (HAS_Z) value *= z_raw.get(v) * sigmoid(z_raw.get(v));
                values[v] = padding ? 0.0f : value;
            }
            Vector<U, WIDTH> out;
            out.set(values);
            store<ALIGNED>(y + t * channels + c, out, min(WIDTH, valid - c));
        }
        if (SEGMENTS) __syncthreads();  // chunk_marks are read above and written next
    }
    if (blockIdx.z + 1 == splits) save(final + batch * channels * STATES);
}
