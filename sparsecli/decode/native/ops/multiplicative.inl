// Outer products: the multiplicative layer and the convolution. Part of all.inl, inside its namespaces.

// c[r][columns] += a[r] . panel, R rows by V vectors of columns; a row of `a` holds `inputs` values.
template <int R, int V>
inline void tile(const float* a, int64_t a_stride, const float* panel, int64_t width, int64_t inputs, float* c,
                 int64_t c_stride) {
    constexpr int N = V * PARTS;
    Floats sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] = floats_of(c + r * c_stride + n * WIDTH);
    for (int64_t i = 0; i < inputs; ++i) {
        Floats b[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) b[n] = floats_of(panel + i * width + n * WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Floats scalar = broadcast(a[r * a_stride + i]);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[r][n] = fused(sums[r][n], scalar, b[n]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) *(FloatsAt*)(c + r * c_stride + n * WIDTH) = sums[r][n];
}

// The same from pairs of bfloat16.
template <int R, int V>
inline void tile(const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t width, int64_t inputs, float* c,
                 int64_t c_stride) {
    constexpr int N = V * PARTS;
    Floats sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] = floats_of(c + r * c_stride + n * WIDTH);
    for (int64_t i = 0; i < inputs; i += 2) {
        Ints b[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) b[n] = *(const IntsAt*)(panel + i * width + n * 2 * WIDTH);
#if defined(SPARSECLI_BF16)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Ints pair = pair_everywhere(a + r * a_stride + i);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[r][n] = add_pairs(sums[r][n], pair, b[n]);
        }
#else
        const auto add = [&](auto half) {
            Floats weights[N];
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) weights[n] = half(b[n]);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Floats scalar = half(pair_everywhere(a + r * a_stride + i));
#pragma GCC unroll 16
                for (int n = 0; n < N; ++n) sums[r][n] = fused(sums[r][n], scalar, weights[n]);
            }
        };
        add([](Ints pairs) { return first_of(pairs); });
        add([](Ints pairs) { return second_of(pairs); });
#endif
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) *(FloatsAt*)(c + r * c_stride + n * WIDTH) = sums[r][n];
}

// Eight-bit products of one group of inputs; `a` is quantised with scale[r] and has row sums total[r]. Panels hold
// weights + 128, since processors multiply unsigned with signed bytes.
template <int R, int V>
inline void tile(const int8_t* a, int64_t a_stride, const float* a_scale, const int32_t* total, const uint8_t* panel,
                 int64_t width, int64_t inputs, const float* scale, float* c, int64_t c_stride) {
    constexpr int N = V * PARTS;
    Ints sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] = Ints{} - 128 * total[r];
    for (int64_t i = 0; i < inputs; i += 4) {
        Ints b[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) b[n] = *(const IntsAt*)(panel + i * width + n * 4 * WIDTH);
#if defined(SPARSECLI_VNNI)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Ints quad = pair_everywhere(a + r * a_stride + i);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[r][n] = add_quads(sums[r][n], b[n], quad);
        }
#else  // as pairs of 16-bit integers, the even and the odd bytes
        Shorts even[N], odd[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            even[n] = (Shorts)(b[n] & 0x00ff00ff);
            odd[n] = (Shorts)(b[n] >> 8 & 0x00ff00ff);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Shorts quad = (Shorts)pair_everywhere(a + r * a_stride + i), a_even = quad << 8 >> 8,
                         a_odd = quad >> 8;
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[r][n] = add_pairs(add_pairs(sums[r][n], even[n], a_even), odd[n], a_odd);
        }
#endif
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            FloatsAt* to = (FloatsAt*)(c + r * c_stride + n * WIDTH);
            const Floats rate = floats_of(scale + n * WIDTH) * a_scale[r];
            *to = fused(*to, __builtin_convertvector(sums[r][n], Floats), rate);
        }
}

// Rows of a tile of V vectors of columns whose sums stay in registers.
template <class W>
constexpr int tile_rows(int vectors) {
#if defined(SPARSECLI_AVX512)
    return vectors == 4 ? 6 : vectors == 2 ? 12 : 16;
#elif defined(SPARSECLI_AVX2)
    return sizeof(W) == 1 ? (vectors == 2 ? 2 : 4) : vectors == 2 ? 3 : 6;
#else
    return vectors == 2 ? 2 : 4;
#endif
}
#if defined(SPARSECLI_AVX512)
constexpr int TILE_VECTORS = 4;
#else
constexpr int TILE_VECTORS = 2;
#endif

// Cuts rows and columns into tiles and calls tile<R, V>(row, column) for each.
template <int R, int V, class F>
inline void tile_column(int64_t rows, int64_t row, int64_t column, const F& call) {
    for (; row + R <= rows; row += R) call.template operator()<R, V>(row, column);
    if constexpr (R > 1)
        if (row < rows) tile_column<R / 2, V>(rows, row, column, call);
}

template <class W, int V, class F>
inline void tile_columns(int64_t rows, int64_t vectors, int64_t vector, const F& call) {
    for (; vector + V <= vectors; vector += V) tile_column<tile_rows<W>(V), V>(rows, 0, vector * LANES, call);
    if constexpr (V > 1)
        if (vector < vectors) tile_columns<W, V / 2>(rows, vectors, vector, call);
}

template <class W, class F>
inline void tiles(int64_t rows, int64_t columns, const F& call) {
    tile_columns<W, TILE_VECTORS>(rows, columns / LANES, 0, call);
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
    typedef int8_t Narrow __attribute__((vector_size(WIDTH)));
    typedef int8_t NarrowAt __attribute__((vector_size(WIDTH), aligned(1), may_alias));
    Ints total = Ints{};
    for (int64_t i = 0; i < count; i += WIDTH) {
        const Ints whole = rounded(floats_of(values + i), broadcast(inverse));
        *(NarrowAt*)(out + i) = __builtin_convertvector(whole, Narrow);
        total += whole;
    }
    int32_t all = 0;
    for (int i = 0; i < WIDTH; ++i) all += total[i];
    return all;
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
                    tiles<float>(
                        modules, columns,
                        TileCall<float>{(const float*)at, chunk, (const float*)E.data + panel + start * columns,
                                        columns, count, sums, PANEL});
                else if (E.type == BFLOAT16)
                    tiles<uint16_t>(modules, columns,
                                    TileCall<uint16_t>{(const uint16_t*)at, chunk,
                                                       (const uint16_t*)E.data + panel + start * columns, columns,
                                                       count, sums, PANEL});
                else
                    for (int64_t g = 0; g * GROUP < count; ++g) {
                        const int64_t size = count - g * GROUP < GROUP ? count - g * GROUP : GROUP;
                        tiles<int8_t>(modules, columns,
                                      IntegerTileCall{(const int8_t*)at + g * GROUP, chunk, scales + g * modules,
                                                      totals + g * modules,
                                                      (const uint8_t*)E.data + panel + (start + g * GROUP) * columns,
                                                      columns, size, E.scale + column, sums, PANEL});
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
                    tiles<float>(modules, columns,
                                 TileCall<float>{(const float*)rows[tap] + window, stride,
                                                 (const float*)kernel.data + panel, columns, inputs, sums, PANEL});
                else
                    tiles<uint16_t>(
                        modules, columns,
                        TileCall<uint16_t>{(const uint16_t*)rows[tap] + window, stride,
                                           (const uint16_t*)kernel.data + panel, columns, inputs, sums, PANEL});
            }
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t c = 0; c < real; ++c) out[(first + s) * width + column + c] = sums[s * PANEL + c];
        }
    }
}
