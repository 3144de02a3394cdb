// How a thread of the backward walks over the pieces of a chunk, on and back.
// A thread holds S states of each of KC channels. Sums over states meet in a channel's lanes, sums over channels (of B
// and C) in the lanes that hold the same states, and then in `of_matrices` over the block's warps.
// Macros: see scan.cuh, and PIECE, EVERY, DECAYS (tokens of a piece whose decays stay in registers).

constexpr int KC = 2, PIECES = EVERY / PIECE;
constexpr int WARPS = THREADS / 32, CHANNEL_LANES = 32 / LANES, CHANNELS = WARPS * CHANNEL_LANES * KC;
// Channel lanes hold their states in COPIES different orders, register i that of i ^ order, and neighbouring lanes the
// two channels in either order: so the first rounds of each sum are between registers that are known when compiling.
constexpr int COPIES = CHANNEL_LANES < S ? CHANNEL_LANES : S, SAME = CHANNEL_LANES / COPIES;  // lanes of one order
constexpr int HELD = S / COPIES;                      // of B and of C after these rounds
constexpr int PAIRS = LANES / KC;                     // lanes that still hold parts of a sum over states
constexpr int GROUP = PAIRS < PIECE ? PAIRS : PIECE;  // tokens whose sums over states are taken together
constexpr int PITCH = CHANNELS + (CHANNEL_LANES > 1 ? KC * CHANNEL_LANES : 4);  // of sums over states: stored without conflicts
using Place = Steps<CHANNELS>;
using OfB = Rows<PIECE, 1>;
using BC = Rows<PIECE, 2>;
using States = Vector<float, S>;
static_assert(LANES >= 4);

// Where a copy of the rows stands: loads of a warp meet in no bank, two orders beside two lanes of states.
INLINE int copy_of_B(int order) { return order * (OfB::SIZE + 8); }
INLINE int copy_of_BC(int order) { return order * BC::SIZE + order % 2 * 4 + order / 2 * 16; }

struct Slope {
    float of_y, of_raw;  // gradient of y before the gate; derivative of dt by what it comes from
};

// What the walk of a piece reads and writes.
struct Piece {
    alignas(16) float2 steps[PIECE * Place::PITCH];  // see Step
    alignas(16) Slope slopes[PIECE * Place::PITCH];
    alignas(16) float gates[HAS_Z ? PIECE * CHANNELS : 4];  // sigmoid of z
    alignas(16) float rows[COPIES * (BC::SIZE + 8)];
    alignas(16) float ys[HAS_Z ? PIECE * PITCH : 4], of_input[PIECE * PITCH], of_size[PIECE * PITCH];
    alignas(16) float of_matrices[WARPS * PIECE * 2 * PADDED];  // sums of each warp
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

// A thread that walks over a tile.
struct Walk {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32 / CHANNEL_LANES, channel_lane = threadIdx.x % CHANNEL_LANES;
    int order = channel_lane / SAME;
    int place[KC], spot[KC];  // its channels; where their steps and slopes stand
    int at[KC];               // of its channels' states in [d n]
    float decay_rate[KC][S], carry[KC][S], sum_A[KC][S], h[KC][S];
    States* kept;  // the state before each piece

    INLINE int state(int i) const { return lane * S + (i ^ order); }

    INLINE Walk(States* kept) : kept(kept + threadIdx.x) {}
    template <class Initial> INLINE void begin_tile(i64 first, int valid, const float* A, Initial initial) {
#pragma unroll
        for (int k = 0; k < KC; k++) {
            place[k] = (warp * KC + (k ^ lane % KC)) * CHANNEL_LANES + channel_lane;
            spot[k] = Place::place(place[k]);
            at[k] = int(first + place[k]) * STATES;
#pragma unroll
            for (int i = 0; i < S; i++) {
                bool there = state(i) < STATES && place[k] < valid;
                decay_rate[k][i] = there ? scaled(A[at[k] + state(i)]) : 0.0f;
                carry[k][i] = there ? initial(at[k] + state(i)) : 0.0f;
                sum_A[k][i] = 0.0f;
            }
        }
    }
    INLINE void keep(int piece) {
#pragma unroll
        for (int k = 0; k < KC; k++) {
            States vector;
            vector.set(h[k]);
            kept[(piece * KC + k) * THREADS] = vector;
        }
    }
    INLINE void kept_before(int piece, float (&states)[KC][S]) const {
#pragma unroll
        for (int k = 0; k < KC; k++) {
            auto vector = kept[(piece * KC + k) * THREADS];
#pragma unroll
            for (int i = 0; i < S; i++) states[k][i] = vector.get(i);
        }
    }
    // The state before a chunk, of [d n], comes into the slot of the last piece.
    INLINE void bring_start(const float* start, int valid) {
#pragma unroll
        for (int k = 0; k < KC; k++)
            copy_async<STATES % 4 == 0 && S == 4>(kept + ((PIECES - 1) * KC + k) * THREADS, start + at[k] + lane * S,
                                                  place[k] < valid ? min(S, STATES - lane * S) : 0);
    }
    INLINE void begin_chunk() {
        kept_before(PIECES - 1, h);
#pragma unroll
        for (int k = 0; k < KC; k++) to_order(h[k], order);
        keep(0);
    }
    INLINE void on(const Piece& piece) {
        const float* my_rows = piece.rows + copy_of_B(order) + lane * OfB::ROW;
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
            float row[S];
            OfB::read(row, my_rows, i);
            bool restarts = SEGMENTS && piece.marks[i] == RESTARTS;
#pragma unroll
            for (int k = 0; k < KC; k++) {
                float2 step = piece.steps[i * Place::PITCH + spot[k]];
#pragma unroll
                for (int n = 0; n < S; n++) {
                    Step now(step.x, decay_rate[k][n]);
                    h[k][n] = fmaf(now.decay, restarts ? 0.0f : h[k][n], step.y * now.scale * row[n]);
                }
            }
        }
    }
    // Two lanes have exchanged channels before; the PAIRS lanes of a channel sum GROUP tokens.
    static INLINE float pair_sum(const float (&both)[KC]) { return both[0] + __shfl_xor_sync(0xffffffff, both[1], CHANNEL_LANES); }
    INLINE void collect(float (&sums)[GROUP], int token, float* to) const {
        sum_over_lanes<PAIRS, KC * CHANNEL_LANES>(sums, lane / KC);
        if (lane / KC % (PAIRS / GROUP) == 0) to[(token + lane / KC / (PAIRS / GROUP)) * PITCH + place[0]] = sums[0];
    }
    // Sums over the lanes' orders, then over the lanes of one order.
    INLINE void collect_rows(float (&of_row)[2 * S], int token, float* of_matrices) const {
#pragma unroll
        for (int bit = 1; bit < COPIES; bit *= 2)
#pragma unroll
            for (int n = 0; n < 2 * S; n += 2 * bit) of_row[n] += __shfl_xor_sync(0xffffffff, of_row[n + bit], bit * SAME);
        float held[2 * HELD];
#pragma unroll
        for (int n = 0; n < 2 * HELD; n++) held[n] = of_row[n * COPIES];
        sum_over_lanes<SAME, 1>(held, channel_lane % SAME);
        constexpr int REST = 2 * HELD > SAME ? 2 * HELD / SAME : 1, SHARED_BY = 2 * HELD < SAME ? SAME / (2 * HELD) : 1;
        float* to = of_matrices + (warp * PIECE + token) * 2 * PADDED + lane * S + order;
#pragma unroll
        for (int v = 0; v < REST; v++) {
            int n = channel_lane % SAME / SHARED_BY * REST + v;
            if (channel_lane % SHARED_BY == 0) to[n / HELD * PADDED + n % HELD * COPIES] = held[v];
        }
    }
    INLINE void back(Piece& piece, int number) {
        const float* my_rows = piece.rows + copy_of_BC(order) + lane * BC::ROW;
        float states[PIECE][KC][S], decays[PIECE][KC][S];
        auto before = [&](int i, float (&previous)[KC][S]) {  // the states before a token of the piece
            if (i == 0) kept_before(number, previous);
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
            bool restarts = SEGMENTS && piece.marks[i] == RESTARTS;
            float of_y[KC], previous[KC][S];
            before(i, previous);
#pragma unroll
            for (int k = 0; k < KC; k++) {
                float2 step = piece.steps[i * Place::PITCH + spot[k]];
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < S; n++) {
                    Step now(step.x, decay_rate[k][n]);
                    if (i >= PIECE - DECAYS) decays[i][k][n] = now.decay;
                    states[i][k][n] = fmaf(now.decay, restarts ? 0.0f : previous[k][n], step.y * now.scale * row[n]);
                    sum = n ? fmaf(states[i][k][n], row[S + n], sum) : states[i][k][n] * row[S + n];
                }
                of_y[k] = sum;
            }
            if (HAS_Z) sums_y[i % GROUP] = pair_sum(of_y);
            if (HAS_Z && i % GROUP == GROUP - 1) collect(sums_y, i - (GROUP - 1), piece.ys);
        }

        float sums_input[GROUP], sums_size[GROUP];
#pragma unroll
        for (int i = PIECE - 1; i >= 0; i--) {
            float row[2 * S], of_row[2 * S], of_inputs[KC], of_sizes[KC], previous[KC][S];
            BC::read(row, my_rows, i);
            before(i, previous);
            bool restarts = SEGMENTS && piece.marks[i] == RESTARTS;
#pragma unroll
            for (int k = 0; k < KC; k++) {
                float2 step = piece.steps[i * Place::PITCH + spot[k]];
                float gradient = piece.slopes[i * Place::PITCH + spot[k]].of_y, of_u = 0.0f, of_dt = 0.0f;
#pragma unroll
                for (int n = 0; n < S; n++) {
                    Step now(step.x, decay_rate[k][n]);
                    if (i >= PIECE - DECAYS) now.decay = decays[i][k][n];
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
            collect_rows(of_row, i, piece.of_matrices);
            if (i % GROUP == 0) {
                collect(sums_input, i, piece.of_input);
                collect(sums_size, i, piece.of_size);
            }
        }
    }
};
