// Outer products: the multiplicative layer and the convolution. Part of all.inl, inside its namespaces.

// c[r][columns] += a[r] . panel, R rows by V vectors of columns; a row of `a` holds `inputs` values.
template <int R, int V>
inline void tile(const float* a, int64_t a_stride, const float* panel, int64_t width, int64_t inputs, float* c,
                 int64_t c_stride) {
    Vector sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = load(c + r * c_stride + v * LANES);
    for (int64_t i = 0; i < inputs; ++i) {
        Vector b[V];
        for (int v = 0; v < V; ++v) b[v] = load(panel + i * width + v * LANES);
        for (int r = 0; r < R; ++r) {
            const Vector scalar = fill(a[r * a_stride + i]);
            for (int v = 0; v < V; ++v) add_product(sums[r][v], scalar, b[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * c_stride + v * LANES, sums[r][v]);
}

// The same from pairs of bfloat16. (Unrolled by name: only then does GCC keep the sums in registers.)
template <int R, int V>
inline void tile(const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t width, int64_t inputs, float* c,
                 int64_t c_stride) {
#if defined(SPARSECLI_AVX512)
    __m512 sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            sums[r][v] = _mm512_loadu_ps(c + r * c_stride + v * LANES);
        }
    }
    for (int64_t i = 0; i < inputs; i += 2) {
        __m512i b[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            b[v] = _mm512_loadu_si512(panel + i * width + v * 2 * LANES);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512i pair = broadcast_four(a + r * a_stride + i);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                sums[r][v] = add_pairs(sums[r][v], pair, b[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            _mm512_storeu_ps(c + r * c_stride + v * LANES, sums[r][v]);
        }
    }
#else
    Vector sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = load(c + r * c_stride + v * LANES);
    for (int64_t i = 0; i < inputs; i += 2)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            Vector low, high;
            for (int p = 0; p < PARTS; ++p) {
                Ints pairs;
                std::memcpy(&pairs, panel + i * width + (v * LANES + p * WIDTH) * 2, sizeof pairs);
                low.part[p] = (Floats)(pairs << 16);
                high.part[p] = (Floats)(pairs & int32_t(0xffff0000));
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                add_product(sums[r][v], fill(to_float(a[r * a_stride + i])), low);
                add_product(sums[r][v], fill(to_float(a[r * a_stride + i + 1])), high);
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(c + r * c_stride + v * LANES, sums[r][v]);
#endif
}

// Eight-bit products of one group of inputs; `a` is quantised with scale[r] and has row sums total[r]. Panels hold
// weights + 128, since the processor multiplies unsigned with signed bytes.
template <int R, int V>
inline void tile(const int8_t* a, int64_t a_stride, const float* a_scale, const int32_t* total, const uint8_t* panel,
                 int64_t width, int64_t inputs, const float* scale, float* c, int64_t c_stride) {
#if defined(SPARSECLI_AVX512)
    __m512i sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            sums[r][v] = _mm512_set1_epi32(-128 * total[r]);
        }
    }
    for (int64_t i = 0; i < inputs; i += 4) {
        __m512i b[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            b[v] = _mm512_loadu_si512(panel + i * width + v * 4 * LANES);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512i quad = broadcast_four(a + r * a_stride + i);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                sums[r][v] = add_quads(sums[r][v], b[v], quad);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            float* to = c + r * c_stride + v * LANES;
            const __m512 rate = _mm512_mul_ps(_mm512_set1_ps(a_scale[r]), _mm512_loadu_ps(scale + v * LANES));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), rate, _mm512_loadu_ps(to)));
        }
    }
#else
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
        for (int p = 0; p < PARTS; ++p) {
            const int64_t column = v * LANES + p * WIDTH;
            Ints sums[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[r] = Ints{} - 128 * total[r];
            for (int64_t i = 0; i < inputs; i += 4) {
                Ints quads;
                std::memcpy(&quads, panel + i * width + column * 4, sizeof quads);
                for (int k = 0; k < 4; ++k) {
                    const Ints weights = (quads >> (8 * k)) & 255;
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) sums[r] += weights * int32_t(a[r * a_stride + i + k]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                Floats rate, before;
                float* to = c + r * c_stride + column;
                std::memcpy(&rate, scale + column, sizeof rate);
                std::memcpy(&before, to, sizeof before);
                before += __builtin_convertvector(sums[r], Floats) * (rate * a_scale[r]);
                std::memcpy(to, &before, sizeof before);
            }
        }
#endif
}

// Cuts rows and columns into tiles and calls tile<R, V>(row, column) for each.
template <int R, int V, class F>
inline void cut(int64_t rows, int64_t vectors, int64_t row, int64_t vector, const F& call) {
    if constexpr (V > 1) {
        if (vector + V > vectors) return cut<R, V - 1>(rows, vectors, row, vector, call);
    }
    if constexpr (R > 1) {
        if (row + R > rows) return cut<R - 1, V>(rows, vectors, row, vector, call);
    }
    call.template operator()<R, V>(row, vector * LANES);
}

template <class F>
inline void tiles(int64_t rows, int64_t columns, const F& call) {
    const int64_t vectors = columns / LANES;
    for (int64_t v = 0; v < vectors; v += TILE_VECTORS)
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            if (r < rows) cut<TILE_ROWS, TILE_VECTORS>(rows, vectors, r, v, call);
}

template <class W>
struct TileCall {
    const W* a;
    int64_t a_stride;
    const W* panel;
    int64_t width, inputs;
    float* c;
    int64_t c_stride;
    template <int R, int V>
    void operator()(int64_t row, int64_t column) const {
        constexpr int64_t pack = sizeof(W) == 4 ? 1 : 2;
        tile<R, V>(a + row * a_stride, a_stride, panel + column * pack, width, inputs, c + row * c_stride + column,
                   c_stride);
    }
};

struct IntegerTileCall {
    const int8_t* a;
    int64_t a_stride;
    const float* a_scale;
    const int32_t* total;
    const uint8_t* panel;
    int64_t width, inputs;
    const float* scale;
    float* c;
    int64_t c_stride;
    template <int R, int V>
    void operator()(int64_t row, int64_t column) const {
        tile<R, V>(a + row * a_stride, a_stride, a_scale + row, total + row, panel + column * 4, width, inputs,
                   scale + column, c + row * c_stride + column, c_stride);
    }
};

constexpr int64_t SCRATCH = 96 * 1024;  // bytes of products at a time: they stay in the second-level cache
constexpr int64_t MODULE_TILE = 64;     // modules at a time

// x[i] D[s, i] for inputs [begin, end) as the weights' type.
inline void products(const Matrix& D, int64_t module, const float* x, int64_t begin, int64_t count, float* out) {
    const int64_t at = module * round_up(D.cols, PAD) + begin;
    const float* v = x + begin;
    if (D.type == FLOAT32)
        for (int64_t i = 0; i < count; i += LANES) store(out + i, load(v + i) * load((const float*)D.data + at + i));
    else if (D.type == BFLOAT16)
        for (int64_t i = 0; i < count; i += LANES) store(out + i, load(v + i) * load((const uint16_t*)D.data + at + i));
    else
        for (int64_t i = 0; i < count; i += LANES) store(out + i, load(v + i) * load((const int8_t*)D.data + at + i));
}

// values * inverse as bytes; returns their sum.
inline int32_t narrow(const float* values, int64_t count, float inverse, int8_t* out) {
#if defined(SPARSECLI_AVX512)
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += LANES) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(inverse)));
        _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(whole));
        total = _mm512_add_epi32(total, whole);
    }
    return _mm512_reduce_add_epi32(total);
#else
    int32_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
        out[i] = int8_t(std::nearbyint(values[i] * inverse));
        total += out[i];
    }
    return total;
#endif
}

void multiplicative(const Matrix& D, const Matrix& E, const float* bias, const float* x, int64_t module_begin,
                    int64_t module_end, int64_t panel_begin, int64_t panel_end, float* out, void* scratch) {
    const int64_t inputs = round_up(E.cols, PAD), width = E.rows, padded = round_up(width, LANES);
    const int64_t column_begin = panel_begin * PANEL;
    const int64_t column_end = panel_end * PANEL < padded ? panel_end * PANEL : padded;
    if (column_begin >= column_end) return;
    // Each chunk of inputs has a sum of its own: its size follows from the layer, not from this thread's share of it.
    const int64_t bytes = type_bytes(E.type), most = D.rows < MODULE_TILE ? D.rows : MODULE_TILE;
    int64_t chunk = SCRATCH / (most * bytes) / GROUP * GROUP;
    chunk = chunk < GROUP ? GROUP : chunk > inputs ? inputs : chunk;
    const int64_t groups = round_up(chunk, GROUP) / GROUP;
    for (int64_t first = module_begin; first < module_end; first += MODULE_TILE) {
        const int64_t modules = first + MODULE_TILE < module_end ? MODULE_TILE : module_end - first;
        // scratch: products (modules, chunk); then their scales and totals [group][module]; then sums
        char* at = (char*)scratch;
        float* scales = (float*)(at + round_up(modules * chunk * bytes, 64));
        int32_t* totals = (int32_t*)(scales + groups * modules);
        float* sums = (float*)(totals + groups * modules);  // (modules, PANEL)
        for (int64_t column = column_begin; column < column_end; column += PANEL) {
            const int64_t columns = column + PANEL < padded ? PANEL : padded - column;
            const int64_t real = column + columns < width ? columns : width - column;
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t m = 0; m < real; ++m) {
                    const int64_t place = (first + s) * width + column + m;
                    out[place] = bias ? bias[place] : 0;
                }
        }
        for (int64_t start = 0; start < inputs; start += chunk) {
            const int64_t count = start + chunk < inputs ? chunk : inputs - start;
            float line[GROUP];
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t g = 0; g * GROUP < count; ++g) {
                    const int64_t size = count - g * GROUP < GROUP ? count - g * GROUP : GROUP;
                    const int64_t place = s * chunk + g * GROUP;
                    if (E.type == FLOAT32) {
                        products(D, first + s, x, start + g * GROUP, size, (float*)at + place);
                        continue;
                    }
                    products(D, first + s, x, start + g * GROUP, size, line);
                    if (E.type == BFLOAT16) {
                        convert(line, BFLOAT16, size, (uint16_t*)at + place);
                        continue;
                    }
                    const float limit = largest_magnitude(line, size);
                    totals[g * modules + s] =
                        narrow(line, size, limit > NOTHING ? 127 / limit : 0, (int8_t*)at + place);
                    scales[g * modules + s] = limit / 127;
                }
            for (int64_t column = column_begin; column < column_end; column += PANEL) {
                const int64_t columns = column + PANEL < padded ? PANEL : padded - column;
                const int64_t real = column + columns < width ? columns : width - column;
                std::memset(sums, 0, size_t(modules * PANEL * 4));
                const int64_t panel = column * inputs;  // elements before this panel
                if (E.type == FLOAT32)
                    tiles(modules, columns,
                          TileCall<float>{(const float*)at, chunk, (const float*)E.data + panel + start * columns,
                                          columns, count, sums, PANEL});
                else if (E.type == BFLOAT16)
                    tiles(modules, columns,
                          TileCall<uint16_t>{(const uint16_t*)at, chunk,
                                             (const uint16_t*)E.data + panel + start * columns, columns, count, sums,
                                             PANEL});
                else
                    for (int64_t g = 0; g * GROUP < count; ++g) {
                        const int64_t size = count - g * GROUP < GROUP ? count - g * GROUP : GROUP;
                        tiles(modules, columns,
                              IntegerTileCall{(const int8_t*)at + g * GROUP, chunk, scales + g * modules,
                                              totals + g * modules,
                                              (const uint8_t*)E.data + panel + (start + g * GROUP) * columns, columns,
                                              size, E.scale + column, sums, PANEL});
                    }
                for (int64_t s = 0; s < modules; ++s) {
                    const float rate = D.type == INT8 ? D.scale[first + s] : 1;
                    float* to = out + (first + s) * width + column;
                    for (int64_t m = 0; m < real; ++m) to[m] += sums[s * PANEL + m] * rate;
                }
            }
        }
    }
}

void convolve(const Matrix& kernel, const float* bias, int64_t taps, const void* const* rows, int64_t stride,
              int64_t lead, int64_t begin, int64_t end, float* out) {
    // `kernel` has taps * inputs columns; each tap is a `panels` matrix of its own.
    const int64_t width = kernel.rows, padded = round_up(width, LANES);
    const int64_t inputs = round_up(kernel.cols / taps, 4);
    constexpr int64_t AT_ONCE = 16;
    float sums[AT_ONCE * PANEL];
    for (int64_t first = begin; first < end; first += AT_ONCE) {
        const int64_t modules = first + AT_ONCE < end ? AT_ONCE : end - first;
        for (int64_t column = 0; column < padded; column += PANEL) {
            const int64_t columns = column + PANEL < padded ? PANEL : padded - column;
            const int64_t real = column + columns < width ? columns : width - column;
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t c = 0; c < columns; ++c) sums[s * PANEL + c] = bias && c < real ? bias[column + c] : 0;
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t panel = tap * inputs * padded + column * inputs;
                const int64_t window = first * stride - lead;
                if (kernel.type == FLOAT32)
                    tiles(modules, columns,
                          TileCall<float>{(const float*)rows[tap] + window, stride, (const float*)kernel.data + panel,
                                          columns, inputs, sums, PANEL});
                else
                    tiles(modules, columns,
                          TileCall<uint16_t>{(const uint16_t*)rows[tap] + window, stride,
                                             (const uint16_t*)kernel.data + panel, columns, inputs, sums, PANEL});
            }
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t c = 0; c < real; ++c) out[(first + s) * width + column + c] = sums[s * PANEL + c];
        }
    }
}
