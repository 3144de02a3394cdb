// The recurrence's coefficients for one step: h' = decay h + input B u.

struct Discrete { float decay, input; };
INLINE Discrete discretize(float dt, float A) {
    float step = dt * A;
    if (DISCRETIZATION == 2) {
        float over = 1.0f / (1.0f - 0.5f * step);
        return {(1.0f + 0.5f * step) * over, dt * over};
    }
    float decay = exp2_(LOG2E * step);
    if (DISCRETIZATION == 0) return {decay, dt};
    float mean = (decay - 1.0f) / step;  // (e^s - 1) / s, as a series where that cancels
    if (fabsf(step) < 0.5f) {
        mean = 1.0f;
#pragma unroll
        for (int i = 8; i > 1; i--) mean = fmaf(mean, step / i, 1.0f);
    }
    return {decay, dt * mean};
}
