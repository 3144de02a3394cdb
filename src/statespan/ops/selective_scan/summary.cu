// What a split of the tokens does to the state that it is given, x -> decay x + local, for all splits side by side; and
// the chain of these from one split to the next. FORWARD: x is the state, walked from the split's first token to its
// last, h = Abar h + Bbar B u. REVERSE: x is the gradient that the state gets from behind, walked from the last token to
// the first, c = Abar (C gy + c) with gy the gradient of y before the gate. Macros: see scan.cuh and forward.cu, REVERSE.

#include "scan.cuh"

constexpr int CHANNELS = THREADS / LANES, WIDTH = 8, GROUP = 4;
using Work = Share<TOKENS, CHANNELS, WIDTH>;
using Place = Steps<CHANNELS>;
using OfMatrix = Rows<TOKENS, 1>;
constexpr bool GATED = REVERSE && HAS_Z;
static_assert(CHANNELS % WIDTH == 0 && TOKENS % GROUP == 0);

// x is u or the gradient of y; M is B or C. One block a tile of channels, row and split, of `split` tokens each, from
// split number `first_split` on.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_summary(
    const U* __restrict__ x, i64 x_b, i64 x_t, const DT* __restrict__ dt, i64 dt_b, i64 dt_t, const Z* __restrict__ z,
    i64 z_b, i64 z_t, const MM* __restrict__ M, i64 M_b, i64 M_t, i64 M_g, const float* __restrict__ A,
    const float* __restrict__ dt_bias, const signed char* __restrict__ marks, float* __restrict__ local,
    float* __restrict__ decays, i64 first_split, i64 split, i64 splits, i64 length_, i64 channels, i64 groups) {
    __shared__ alignas(16) float2 steps[TOKENS * Place::PITCH];  // dt, and its factor of u; or dt, gy
    __shared__ alignas(16) float rows[OfMatrix::SIZE];
    __shared__ alignas(16) float biases[CHANNELS];
    __shared__ signed char chunk_marks[TOKENS];
    __shared__ Vector<U, WIDTH> x_slots[Work::VECTORS];
    __shared__ Vector<Z, WIDTH> z_slots[GATED ? Work::VECTORS : 1];
    __shared__ Vector<DT, WIDTH> dt_slots[Work::VECTORS];
    __shared__ Vector<MM, 8> M_slots[OfMatrix::VECTORS];

    int length = int(length_), lane = threadIdx.x % LANES, channel = threadIdx.x / LANES;
    i64 channels_a_group = channels / groups, tiles = (channels_a_group + CHANNELS - 1) / CHANNELS;
    i64 group = blockIdx.x / tiles, first = blockIdx.x % tiles * CHANNELS, batch = blockIdx.y;
    int valid = int(min(i64(CHANNELS), channels_a_group - first));
    first += group * channels_a_group;
    x += batch * x_b + first, dt += batch * dt_b + first, M += batch * M_b + group * M_g;
    if (GATED) z += batch * z_b + first;
    if (SEGMENTS) marks += batch * length;

    if (threadIdx.x < CHANNELS)
        biases[threadIdx.x] = dt_bias && threadIdx.x < valid ? dt_bias[first + threadIdx.x] : 0.0f;
    float value[S], decay_rate[S], product[S], time = 0.0f;  // product: only where the decay is no exponential
    bool fresh = false;                                      // whether a restart has cut what came before
#pragma unroll
    for (int i = 0; i < S; i++) {
        bool there = lane * S + i < STATES && channel < valid;
        decay_rate[i] = there ? scaled(A[(first + channel) * STATES + lane * S + i]) : 0.0f;
        value[i] = 0.0f, product[i] = 1.0f;
    }
    auto fetch = [&](int t0) {
        Work::fetch(dt_slots, dt, dt_t, t0, length, valid);
        Work::fetch(x_slots, x, x_t, t0, length, valid);
        if (GATED) Work::fetch(z_slots, z, z_t, t0, length, valid);
        OfMatrix::fetch(M_slots, M, M_t, t0, length, marks);
    };

    const float2* my_steps = steps + Place::place(channel);
    const float* my_rows = rows + lane * OfMatrix::ROW;
    i64 my_split = blockIdx.z + first_split;
    int from = int(my_split * split), to = int(min(i64(length), (my_split + 1) * split));
    int chunks = (to - from + TOKENS - 1) / TOKENS, t0 = REVERSE ? from + (chunks - 1) * TOKENS : from;
    fetch(t0);
    for (int chunk = 0; chunk < chunks; chunk++, t0 += REVERSE ? -TOKENS : TOKENS) {
        __syncthreads();
        wait_for_copies();
#pragma unroll
        for (int item = 0; item < Work::ITEMS; item++) {
            if (!Work::mine(item)) continue;
            int token = Work::token(item), c = Work::channel(item);
            bool there = t0 + token < length;
            if (SEGMENTS && there) there = marks[t0 + token] != PADDING;
            auto dt_raw = dt_slots[Work::index(item)];
            auto x_raw = x_slots[Work::index(item)];
            auto z_raw = z_slots[GATED ? Work::index(item) : 0];
#pragma unroll
            for (int v = 0; v < WIDTH; v += 2) {
                float2 pair[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float size = dt_raw.get(v + i) + biases[c + v + i], factor = x_raw.get(v + i);
                    size = SOFTPLUS ? softplus(size) : size;
                    if (GATED) factor *= z_raw.get(v + i) * sigmoid(z_raw.get(v + i));
                    if (!REVERSE) factor = input_factor(size, factor);
                    pair[i] = there ? float2{size, factor} : float2{0.0f, 0.0f};
                }
                *reinterpret_cast<float4*>(steps + token * Place::PITCH + Place::place(c + v)) = {
                    pair[0].x, pair[0].y, pair[1].x, pair[1].y};
            }
        }
        OfMatrix::stage(rows, M_slots);
        if (SEGMENTS && threadIdx.x < TOKENS)
            chunk_marks[threadIdx.x] = t0 + threadIdx.x < length ? marks[t0 + threadIdx.x] : PADDING;
        __syncthreads();
        if (chunk + 1 < chunks) fetch(t0 + (REVERSE ? -TOKENS : TOKENS));
#pragma unroll 1
        for (int group_of = 0; group_of < TOKENS; group_of += GROUP) {
            int first_token = REVERSE ? TOKENS - GROUP - group_of : group_of;
            const float2* step_at = my_steps + first_token * Place::PITCH;
            const float* row_at = my_rows + first_token * OfMatrix::PITCH;
#pragma unroll
            for (int index = 0; index < GROUP; index++) {
                int i = REVERSE ? GROUP - 1 - index : index;
                float2 step = step_at[i * Place::PITCH];
                float row[S];
                OfMatrix::read(row, row_at, i);
                bool restarts = SEGMENTS && chunk_marks[first_token + i] == RESTARTS;
                time += step.x;
                fresh |= restarts;
#pragma unroll
                for (int n = 0; n < S; n++) {
                    Step now(step.x, decay_rate[n]);
                    if (DISCRETIZATION == 2) product[n] *= now.decay;
                    if (REVERSE)
                        value[n] = restarts ? 0.0f : now.decay * fmaf(step.y, row[n], value[n]);
                    else
                        value[n] = fmaf(now.decay, restarts ? 0.0f : value[n], step.y * now.scale * row[n]);
                }
            }
        }
    }
    i64 row = (batch * splits + my_split) * channels + first + channel;
#pragma unroll
    for (int i = 0; i < S; i++) {
        int n = lane * S + i;
        if (n >= STATES || channel >= valid) continue;
        local[row * STATES + n] = value[i];
        float decay = DISCRETIZATION == 2 ? product[i] : exp2_(time * decay_rate[i] * (DISCRETIZATION == 1 ? LOG2E : 1.0f));
        decays[row * STATES + n] = fresh ? 0.0f : decay;
    }
}

// What each split is given, in the place of `local`; x [b states] enters the first split (the last for REVERSE), and may
// be null. A decay of zero lets nothing through, no infinity either.
extern "C" __global__ void __launch_bounds__(THREADS) scan_chain(const float* __restrict__ x, float* __restrict__ local,
                                                                 const float* __restrict__ decays, i64 splits, i64 states) {
    i64 state = blockIdx.x * i64(THREADS) + threadIdx.x, batch = blockIdx.y;
    if (state >= states) return;
    constexpr int AT_ONCE = 8;  // splits whose numbers are on their way together
    float value = x ? x[batch * states + state] : 0.0f;
    auto at = [&](i64 index) { return (batch * splits + (REVERSE ? splits - 1 - index : index)) * states + state; };
    for (i64 begin = 0; begin < splits; begin += AT_ONCE) {
        float decay[AT_ONCE], added[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            bool there = begin + i + 1 < splits;  // the last passes nothing on
            decay[i] = there ? decays[at(begin + i)] : 0.0f, added[i] = there ? local[at(begin + i)] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (begin + i < splits) local[at(begin + i)] = value;
            value = decay[i] == 0.0f ? added[i] : fmaf(decay[i], value, added[i]);
        }
    }
}
