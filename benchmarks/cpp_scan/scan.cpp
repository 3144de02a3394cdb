// The selective scan in C++ with AVX-512 intrinsics, for comparison: y = (C . h + D u) silu(z), h = exp(dt A) h + dt B u.
//
// float32, one group, N = 16 states, channels a multiple of 16; u, dt, z, y are [b t d], B and C [b t n], A [d n].
// A lane is a channel. The forward keeps the 16 states of a vector of channels in registers through a chunk of time; the
// backward recomputes a chunk's states four at a time from the state before it, and walks back over them.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace scan {

constexpr int STATES = 16;  // of a channel
constexpr int CHUNK = 32;   // steps
constexpr int TILE = 4;     // states that the backward handles at a time
constexpr int BLOCK = 8;    // vectors of channels in a work item
constexpr float LOG2_E = 1.4426950408889634f;

struct Sizes {
    int64_t batch, length, channels;

    int64_t blocks() const { return (channels + BLOCK * WIDTH - 1) / (BLOCK * WIDTH); }
    int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }
};

struct Inputs {
    const float *u, *dt, *A, *B, *C, *D, *z, *dt_bias;
};

// One vector of channels' values over a chunk.
using Line = float[CHUNK][WIDTH];

void load_transposed(Vector* target, const float* A, float scale) {
    alignas(64) float columns[STATES][WIDTH];
    for (int c = 0; c < WIDTH; ++c)
        for (int n = 0; n < STATES; ++n) columns[n][c] = A[c * STATES + n] * scale;
    for (int n = 0; n < STATES; ++n) target[n] = load(columns[n]);
}

void store_transposed(float* target, const Vector* source) {
    for (int n = 0; n < STATES; ++n) {
        alignas(64) float lanes[WIDTH];
        store(lanes, source[n]);
        for (int c = 0; c < WIDTH; ++c) target[c * STATES + n] = lanes[c];
    }
}

void forward_chunk(const Sizes& s, const Inputs& in, float* y, Vector* state, const Vector* rates, int64_t row,
                   int64_t t0, int steps, int64_t c) {
    const Vector bias = load(in.dt_bias + c), skip = load(in.D + c);
    Vector h[STATES];
    for (int n = 0; n < STATES; ++n) h[n] = state[n];
    for (int t = 0; t < steps; ++t) {
        const int64_t at = (row * s.length + t0 + t) * s.channels + c;
        for (const float* p : {in.u, in.dt, in.z}) _mm_prefetch(p + at + CHUNK * s.channels, _MM_HINT_T0);
        const float *B = in.B + (row * s.length + t0 + t) * STATES, *C = in.C + (row * s.length + t0 + t) * STATES;
        Vector slope;
        const Vector u = load(in.u + at), z = load(in.z + at), dt = softplus(load(in.dt + at) + bias, slope);
        const Vector dtu = dt * u;
        Vector sums[2] = {skip * u, _mm512_setzero_ps()};
#pragma GCC unroll 16
        for (int n = 0; n < STATES; ++n) {
            h[n] = fma(exp2(dt * rates[n]), h[n], dtu * all(B[n]));
            sums[n % 2] = fma(h[n], all(C[n]), sums[n % 2]);
        }
        softplus(z, slope);
        store(y + at, (sums[0] + sums[1]) * z * slope);
    }
    for (int n = 0; n < STATES; ++n) state[n] = h[n];
}

void forward_block(const Sizes& s, const Inputs& in, float* y, float* starts, int64_t row, int64_t block) {
    const int64_t first = block * BLOCK * WIDTH;
    const int vectors = int(std::min<int64_t>(BLOCK, (s.channels - first) / WIDTH));
    Vector state[BLOCK][STATES], rates[BLOCK][STATES];
    for (int v = 0; v < vectors; ++v) {
        load_transposed(rates[v], in.A + (first + v * WIDTH) * STATES, LOG2_E);
        for (auto& h : state[v]) h = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < s.chunks(); ++k) {
        const int steps = int(std::min<int64_t>(CHUNK, s.length - k * CHUNK));
        for (int v = 0; v < vectors; ++v) {
            const int64_t c = first + v * WIDTH;
            if (starts)
                for (int n = 0; n < STATES; ++n)
                    store(starts + ((row * s.chunks() + k) * STATES + n) * s.channels + c, state[v][n]);
            forward_chunk(s, in, y, state[v], rates[v], row, k * CHUNK, steps, c);
        }
    }
}

struct Gradients {
    float *u, *dt, *z, *A, *D, *dt_bias;  // A, D and dt_bias [b ..]
    float *B, *C;                         // [b blocks t n]
};

// What the backward knows of one vector of channels in a chunk.
struct Lines {
    alignas(64) Line dt, dtu, u, slope, grad, raw_y, over_B, over_a;
};

void prepare(Lines& l, const Sizes& s, const Inputs& in, const float* grad_y, int64_t at, int64_t c, int steps) {
    const Vector bias = load(in.dt_bias + c), skip = load(in.D + c);
    for (int t = 0; t < steps; ++t, at += s.channels) {
        Vector slope, gate;
        const Vector u = load(in.u + at), z = load(in.z + at), dt = softplus(load(in.dt + at) + bias, slope);
        softplus(z, gate);
        store(l.u[t], u), store(l.dt[t], dt), store(l.dtu[t], dt * u), store(l.slope[t], slope);
        store(l.grad[t], load(grad_y + at) * z * gate);
        store(l.raw_y[t], skip * u);
        store(l.over_B[t], _mm512_setzero_ps()), store(l.over_a[t], _mm512_setzero_ps());
    }
}

// States n to n + TILE of a vector of channels: their history forward, then their gradients backward.
void tile(Lines& l, const float* B, const float* C, const float* start, int64_t stride, const Vector* rates,
          Vector* carries, Vector* sums_A, float (*sums_B)[TILE][WIDTH], float (*sums_C)[TILE][WIDTH], int steps) {
    Vector history[CHUNK + 1][TILE], decays[CHUNK][TILE];
    Vector h[TILE], carry[TILE], sum_A[TILE], rate[TILE];
    for (int i = 0; i < TILE; ++i) {
        history[0][i] = h[i] = load(start + i * stride);
        carry[i] = carries[i], sum_A[i] = sums_A[i], rate[i] = rates[i];
    }
    for (int t = 0; t < steps; ++t) {
        const Vector dt = load(l.dt[t]), dtu = load(l.dtu[t]);
        Vector y = load(l.raw_y[t]);
#pragma GCC unroll 4
        for (int i = 0; i < TILE; ++i) {
            const Vector decay = exp2(dt * rate[i]);
            h[i] = fma(decay, h[i], dtu * all(B[t * STATES + i]));
            y = fma(h[i], all(C[t * STATES + i]), y);
            decays[t][i] = decay, history[t + 1][i] = h[i];
        }
        store(l.raw_y[t], y);
    }
    for (int t = steps - 1; t >= 0; --t) {
        const Vector dt = load(l.dt[t]), dtu = load(l.dtu[t]), grad = load(l.grad[t]);
        Vector over_B = load(l.over_B[t]), over_a = load(l.over_a[t]);
#pragma GCC unroll 4
        for (int i = 0; i < TILE; ++i) {
            const Vector grad_h = fma(grad, all(C[t * STATES + i]), carry[i]);
            store(sums_C[t][i], fma(grad, history[t + 1][i], load(sums_C[t][i])));
            store(sums_B[t][i], fma(grad_h, dtu, load(sums_B[t][i])));
            over_B = fma(grad_h, all(B[t * STATES + i]), over_B);
            carry[i] = grad_h * decays[t][i];
            const Vector grad_exponent = carry[i] * history[t][i];
            over_a = fma(grad_exponent, rate[i], over_a);
            sum_A[i] = fma(grad_exponent, dt, sum_A[i]);
        }
        store(l.over_B[t], over_B), store(l.over_a[t], over_a);
    }
    for (int i = 0; i < TILE; ++i) carries[i] = carry[i], sums_A[i] = sum_A[i];
}

void finish(const Lines& l, const Sizes& s, const Inputs& in, const Gradients& out, const float* grad_y, Vector& sum_D,
            Vector& sum_bias, int64_t at, int64_t c, int steps) {
    const Vector skip = load(in.D + c), ln_2 = all(1 / LOG2_E);
    for (int t = 0; t < steps; ++t, at += s.channels) {
        const Vector u = load(l.u[t]), grad = load(l.grad[t]), over_B = load(l.over_B[t]), z = load(in.z + at);
        Vector gate;
        softplus(z, gate);
        const Vector grad_dt = fma(over_B, u, load(l.over_a[t]) * ln_2) * load(l.slope[t]);
        store(out.u + at, fma(over_B, load(l.dt[t]), grad * skip));
        store(out.dt + at, grad_dt);
        store(out.z + at, load(grad_y + at) * load(l.raw_y[t]) * gate * fma(z, all(1.0f) - gate, all(1.0f)));
        sum_D = fma(grad, u, sum_D), sum_bias = sum_bias + grad_dt;
    }
}

struct Scratch {
    Lines lines[BLOCK];
    alignas(64) float sums_B[STATES / TILE][CHUNK][TILE][WIDTH];
    alignas(64) float sums_C[STATES / TILE][CHUNK][TILE][WIDTH];
};

void backward_block(const Sizes& s, const Inputs& in, const Gradients& out, const float* grad_y, const float* starts,
                    int64_t row, int64_t block, Scratch& memory) {
    const int64_t first = block * BLOCK * WIDTH;
    const int vectors = int(std::min<int64_t>(BLOCK, (s.channels - first) / WIDTH));
    Vector rates[BLOCK][STATES], carries[BLOCK][STATES], sums_A[BLOCK][STATES], sums_D[BLOCK], sums_bias[BLOCK];
    for (int v = 0; v < vectors; ++v) {
        load_transposed(rates[v], in.A + (first + v * WIDTH) * STATES, LOG2_E);
        sums_D[v] = sums_bias[v] = _mm512_setzero_ps();
        for (int n = 0; n < STATES; ++n) carries[v][n] = sums_A[v][n] = _mm512_setzero_ps();
    }
    for (int64_t k = s.chunks() - 1; k >= 0; --k) {
        const int64_t t0 = k * CHUNK, token = row * s.length + t0;
        const int steps = int(std::min<int64_t>(CHUNK, s.length - t0));
        std::memset(memory.sums_B, 0, sizeof memory.sums_B);
        std::memset(memory.sums_C, 0, sizeof memory.sums_C);
        for (int v = 0; v < vectors; ++v)
            prepare(memory.lines[v], s, in, grad_y, token * s.channels + first + v * WIDTH, first + v * WIDTH, steps);
        for (int n = 0; n < STATES; n += TILE)
            for (int v = 0; v < vectors; ++v)
                tile(memory.lines[v], in.B + token * STATES + n, in.C + token * STATES + n,
                     starts + ((row * s.chunks() + k) * STATES + n) * s.channels + first + v * WIDTH, s.channels,
                     rates[v] + n, carries[v] + n, sums_A[v] + n,
                     memory.sums_B[n / TILE], memory.sums_C[n / TILE], steps);
        for (int v = 0; v < vectors; ++v)
            finish(memory.lines[v], s, in, out, grad_y, sums_D[v], sums_bias[v],
                   token * s.channels + first + v * WIDTH, first + v * WIDTH, steps);
        const int64_t part = ((row * s.blocks() + block) * s.length + t0) * STATES;
        for (int t = 0; t < steps; ++t)
            for (int n = 0; n < STATES; ++n) {
                out.B[part + t * STATES + n] = _mm512_reduce_add_ps(load(memory.sums_B[n / TILE][t][n % TILE]));
                out.C[part + t * STATES + n] = _mm512_reduce_add_ps(load(memory.sums_C[n / TILE][t][n % TILE]));
            }
    }
    for (int v = 0; v < vectors; ++v) {
        const int64_t c = row * s.channels + first + v * WIDTH;
        store_transposed(out.A + c * STATES, sums_A[v]);
        store(out.D + c, sums_D[v]), store(out.dt_bias + c, sums_bias[v]);
    }
}

}  // namespace scan

extern "C" void scan_forward(const scan::Sizes* sizes, const scan::Inputs* in, float* y, float* starts) {
    const int64_t items = sizes->batch * sizes->blocks();
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item)
        scan::forward_block(*sizes, *in, y, starts, item / sizes->blocks(), item % sizes->blocks());
}

extern "C" void scan_backward(const scan::Sizes* sizes, const scan::Inputs* in, const scan::Gradients* out,
                              const float* grad_y, const float* starts) {
    const int64_t items = sizes->batch * sizes->blocks();
#pragma omp parallel
    {
        alignas(64) scan::Scratch memory;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < items; ++item)
            scan::backward_block(*sizes, *in, *out, grad_y, starts, item / sizes->blocks(), item % sizes->blocks(),
                                 memory);
    }
}
