#include "training.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "crew.h"
#include "engine.h"
#include "ops/ops.h"

namespace sparsecli {
namespace {

constexpr int64_t SOURCES = 1024;  // rows whose slices stay in the cache while they are gathered
constexpr int64_t SOME = 256;      // rows of a task
constexpr int64_t MANY = 2048;     // the same where each task packs weights for itself
constexpr int64_t AHEAD = 8;       // rows that are prefetched before they are packed
constexpr int64_t TILE = 64;       // tokens whose logits are computed together
constexpr int64_t PARTIAL = 16;    // sums of gradients that are added in the end, so that threads do not share one

int64_t pieces_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Lists of pairs by row (tokens with their units, or units with their tokens), cut into pieces of consecutive sources.
struct Lists {
    int64_t rows, pieces, sources_each;
    int32_t* index;
    int64_t* bounds;  // (pieces + 1, rows)

    int64_t begin(int64_t piece, int64_t row) const { return bounds[piece * rows + row]; }
    int64_t end(int64_t piece, int64_t row) const { return bounds[(piece + 1) * rows + row]; }
    Gathered gathered(const float* sources, int64_t piece, int64_t row, int64_t count) const {
        const int64_t* at = bounds + piece * rows + row;
        return {sources, piece * sources_each, index, at, at + rows, count};
    }
};

// The memory and the steps of one forward or backward pass over chosen units.
class ChosenUnits {
  public:
    ChosenUnits(const sparsecli_units& units, Crew& crew)
        : u_(units),
          crew_(crew),
          k_(selected_ops()),
          blocks_(u_.d_ff / u_.block_size),
          width_(blocks_ * u_.units_per_block),
          slices_(pieces_of(u_.d_model, SLICE)) {
        // Pieces end with a block, as units of a block are in no order.
        const int64_t most = std::clamp(u_.d_ff / (2 * crew.threads()), SOURCES / 4, SOURCES);
        const int64_t each = std::max(most / u_.block_size, int64_t(1));
        piece_blocks_ = each;
        by_token_ = {u_.tokens, pieces_of(blocks_, each), each * u_.block_size};
        by_token_.index = crew.scratch<int32_t>(u_.tokens * width_);
        by_token_.bounds = crew.scratch<int64_t>((by_token_.pieces + 1) * u_.tokens);
        const int64_t rows = std::max(by_token_.sources_each, SOURCES);
        sources_ = crew.scratch<float>(crew.threads() * rows * SLICE);
        sources_step_ = rows * SLICE;
        // Few threads share one packing of a slice's weights; many need more tasks.
        const int64_t parts = pieces_of(4 * crew.threads(), slices_);
        many_ = std::clamp(pieces_of(u_.tokens, parts), SOME, MANY);
        sums_ = crew.scratch<float>(crew.threads() * many_ * SLICE);
    }

    void forward(float* before, float* raised, float* y) {
        float *packed = packed_room(), *a = pairs(), *h = pairs(), *v = u_.up ? pairs() : nullptr;
        std::vector<Tasks> steps;
        steps.push_back(together({packing(u_.x, packed), of_tokens([&](int64_t t) { list_all(t); })}));
        steps.push_back(dots(u_.first, packed, before));
        steps.push_back(of_tokens([&, a](int64_t t) {
            float* row = before + t * width_;
            for (int64_t i = 0; u_.unit_bias && i < width_; ++i)
                row[i] += u_.unit_bias[by_token_.index[t * width_ + i]];
            list_active(t, row, a);
        }));
        if (u_.up) steps.push_back(dots(u_.up, packed, v));
        steps.push_back(of_tokens([&, a, h, v](int64_t t) {
            const int64_t begin = t * width_, count = by_token_.end(by_token_.pieces - 1, t) - begin;
            if (v) {
                std::fill_n(raised + begin, width_, 0.0f);
                for (int64_t i = begin; i < begin + count; ++i) raised[begin + pair_[i]] = h[i] = v[i];
            } else {
                std::copy_n(a + begin, count, h + begin);
            }
            k_.activate(u_.activation, v ? a + begin : nullptr, h + begin, count);
            for (int64_t i = begin; u_.scale && i < begin + count; ++i) h[i] *= u_.scale[begin + pair_[i]];
        }));
        steps.push_back(sums(by_token_, {{u_.down, h}}, y, u_.bias));
        crew_.run(std::move(steps));
    }

    // Gradients of weights lie in new memory: with small pages its first use would take as long as a product.
    void use_huge_pages(float* gradient) const {
#if defined(__linux__)
        constexpr uintptr_t PAGE = uintptr_t(1) << 21;
        const uintptr_t begin = (uintptr_t(gradient) + PAGE - 1) / PAGE * PAGE;
        const uintptr_t end = (uintptr_t(gradient) + size_t(u_.d_ff * u_.d_model) * 4) / PAGE * PAGE;
        if (gradient && begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
    }

    void backward(const float* before, const float* raised, const float* dy, const sparsecli_unit_gradients& wanted) {
        for (float* gradient : {wanted.first, wanted.up, wanted.down}) use_huge_pages(gradient);
        float *packed_x = packed_room(), *packed_dy = packed_room();
        float *a = pairs(), *g = pairs(), *da = pairs(), *h = pairs(), *dv = u_.up ? pairs() : nullptr;
        std::vector<Tasks> steps;
        const Tasks listing = of_tokens([&, a](int64_t t) {
            list_all(t);
            list_active(t, before + t * width_, a);
        });
        steps.push_back(together({packing(u_.x, packed_x), packing(dy, packed_dy), listing}));
        steps.push_back(dots(u_.down, packed_dy, g));
        steps.push_back(of_tokens([&, a, g, da, h, dv](int64_t t) {
            const int64_t begin = t * width_, end = by_token_.end(by_token_.pieces - 1, t);
            k_.activation_slopes(u_.activation, a + begin, end - begin, h + begin, da + begin);
            for (float* zeros : {wanted.mask, wanted.scale})
                if (zeros) std::fill_n(zeros + begin, width_, 0.0f);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t pair = begin + pair_[i];
                const float up = raised ? raised[pair] : 1.0f, scale = u_.scale ? u_.scale[pair] : 1.0f;
                const float value = h[i], dh = g[i] * scale;
                if (dv) dv[i] = dh * value;
                if (wanted.scale) wanted.scale[pair] = g[i] * value * up;
                da[i] *= dh * up;
                h[i] = value * up * scale;
                if (wanted.mask) wanted.mask[pair] = a[i] * da[i];
            }
        }));
        std::vector<Tasks> last;
        if (wanted.x) {
            std::vector<Source> from{{u_.first, da}};
            if (dv) from.push_back({u_.up, dv});
            last.push_back(sums(by_token_, from, wanted.x, nullptr));
        }
        if (wanted.bias) last.push_back(columns(packed_dy, wanted.bias));
        if (wanted.first || wanted.up || wanted.down || wanted.unit_bias) {
            const Lists by_unit = unit_lists();
            float *unit_da = pairs(), *unit_h = pairs(), *unit_dv = dv ? pairs() : nullptr;
            steps.push_back(transposing(by_unit, {da, h, dv}, {unit_da, unit_h, unit_dv}, wanted.unit_bias));
            const auto add = [&](float* out, const float* packed, const float* factor) {
                if (out) last.push_back(sums(by_unit, {{nullptr, factor, packed}}, out, nullptr));
            };
            add(wanted.first, packed_x, unit_da);
            add(wanted.up, packed_x, unit_dv);
            add(wanted.down, packed_dy, unit_h);
        }
        steps.push_back(together(std::move(last)));
        crew_.run(std::move(steps));
    }

  private:
    // Rows and the factors of pairs with them: of weights, or of packed activations.
    struct Source {
        const void* weights;
        const float* factor;
        const float* packed = nullptr;
    };

    float* packed_room() { return crew_.scratch<float>(slices_ * u_.tokens * SLICE); }
    float* pairs() { return crew_.scratch<float>(u_.tokens * by_token_.pieces * piece_blocks_ * u_.units_per_block); }

    Tasks of_tokens(std::function<void(int64_t)> run) const {
        return {pieces_of(u_.tokens, TILE), [this, run](int64_t task, int64_t) {
                    for (int64_t t = task * TILE; t < std::min((task + 1) * TILE, u_.tokens); ++t) run(t);
                }};
    }

    // A slice of `count` rows of a matrix as floats, filled up with zeros.
    void pack(const void* matrix, int64_t type, int64_t row, int64_t count, int64_t slice, float* to) const {
        const int64_t column = slice * SLICE, width = std::min(SLICE, u_.d_model - column);
        const int64_t step = u_.d_model * type_bytes(type), bytes = width * type_bytes(type);
        const char* from = (const char*)matrix + row * step + column * type_bytes(type);
        for (int64_t r = 0; r < count; ++r, from += step, to += SLICE) {
            if (r + AHEAD < count)
                for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + AHEAD * step + line);
            if (type == FLOAT32)
                std::memcpy(to, from, size_t(width) * 4);
            else
                k_.widen(from, nullptr, type, width, to);
            std::fill(to + width, to + SLICE, 0.0f);
        }
    }

    // Activations (tokens, d) as (slices, tokens, SLICE).
    Tasks packing(const float* x, float* packed) const {
        return {slices_ * pieces_of(u_.tokens, SOME), [this, x, packed](int64_t task, int64_t) {
                    const int64_t slice = task % slices_, token = task / slices_ * SOME;
                    const int64_t count = std::min(SOME, u_.tokens - token);
                    pack(x, FLOAT32, token, count, slice, packed + (slice * u_.tokens + token) * SLICE);
                }};
    }

    // The units of a token, all of them.
    void list_all(int64_t t) {
        const int64_t k = u_.units_per_block, begin = t * width_;
        for (int64_t i = 0; i < width_; ++i)
            by_token_.index[begin + i] = int32_t(i / k * u_.block_size) + u_.chosen[begin + i];
        for (int64_t piece = 0; piece <= by_token_.pieces; ++piece)
            by_token_.bounds[piece * u_.tokens + t] = begin + std::min(piece * piece_blocks_, blocks_) * k;
    }

    // Keeps those that have a value or a gradient, moved together; `a` is what enters their activations.
    void list_active(int64_t t, const float* before, float* a) {
        const int64_t begin = t * width_;
        int64_t to = begin, piece_end = 0;
        for (int64_t piece = 0; piece < by_token_.pieces; ++piece) {
            int64_t i = piece_end;
            piece_end = by_token_.end(piece, t) - begin;
            by_token_.bounds[piece * u_.tokens + t] = to;
            for (; i < piece_end; ++i) {
                by_token_.index[to] = by_token_.index[begin + i];
                pair_[to] = int32_t(i);
                a[to] = before[i];
                to += u_.activation != RELU || before[i] > 0;
            }
        }
        by_token_.bounds[by_token_.pieces * u_.tokens + t] = to;
    }

    // out = products of the listed rows of weights with their tokens' activations.
    Tasks dots(const void* weights, const float* packed, float* out) const {
        return {by_token_.pieces, [this, weights, packed, out](int64_t piece, int64_t worker) {
                    const int64_t row = piece * by_token_.sources_each;
                    const int64_t count = std::min(by_token_.sources_each, u_.d_ff - row);
                    float* sources = sources_ + worker * sources_step_;
                    for (int64_t slice = 0; slice < slices_; ++slice) {
                        pack(weights, u_.type, row, count, slice, sources);
                        k_.gather_dots(by_token_.gathered(sources, piece, 0, u_.tokens),
                                       packed + slice * u_.tokens * SLICE, slice > 0, out);
                    }
                }};
    }

    // out (rows, d) = sums of listed sources, each times its factor, and of a bias.
    Tasks sums(const Lists& lists, std::vector<Source> from, float* out, const float* bias) const {
        const int64_t most = from[0].weights ? many_ : SOME;
        return {slices_ * pieces_of(lists.rows, most), [=, this](int64_t task, int64_t worker) {
                    const int64_t slice = task % slices_, row = task / slices_ * most;
                    const int64_t count = std::min(most, lists.rows - row);
                    float *y = sums_ + worker * many_ * SLICE, *room = sources_ + worker * sources_step_;
                    std::fill_n(y, count * SLICE, 0.0f);
                    for (const Source& source : from)
                        for (int64_t piece = 0; piece < lists.pieces; ++piece) {
                            const int64_t first = piece * lists.sources_each;
                            const float* rows = source.packed + (slice * u_.tokens + first) * SLICE;
                            if (source.weights) {
                                const int64_t sources = std::min(lists.sources_each, u_.d_ff - first);
                                pack(source.weights, u_.type, first, sources, slice, room);
                                rows = room;
                            }
                            k_.gather_sums(lists.gathered(rows, piece, row, count), source.factor, y);
                        }
                    const int64_t column = slice * SLICE, width = std::min(SLICE, u_.d_model - column);
                    for (int64_t r = 0; r < count; ++r)
                        for (int64_t c = 0; c < width; ++c)
                            out[(row + r) * u_.d_model + column + c] = y[r * SLICE + c] + (bias ? bias[column + c] : 0);
                }};
    }

    // Sums of activations over all tokens.
    Tasks columns(const float* packed, float* out) const {
        return {slices_, [this, packed, out](int64_t slice, int64_t) {
                    float total[SLICE] = {};
                    const float* from = packed + slice * u_.tokens * SLICE;
                    for (int64_t t = 0; t < u_.tokens; ++t, from += SLICE)
                        for (int64_t c = 0; c < SLICE; ++c) total[c] += from[c];
                    std::copy_n(total, std::min(SLICE, u_.d_model - slice * SLICE), out + slice * SLICE);
                }};
    }

    Lists unit_lists() const {
        Lists lists{u_.d_ff, pieces_of(u_.tokens, SOURCES), SOURCES};
        lists.index =
            (int32_t*)crew_.scratch<int32_t>(u_.tokens * by_token_.pieces * piece_blocks_ * u_.units_per_block);
        lists.bounds = crew_.scratch<int64_t>((lists.pieces + 1) * u_.d_ff);
        return lists;
    }

    // Sorts pairs by their units, tokens in order, with their factors. Every piece of units has room of its own.
    Tasks transposing(const Lists& lists, std::vector<const float*> from, std::vector<float*> to,
                      float* unit_bias) const {
        return {by_token_.pieces, [this, lists, from, to, unit_bias](int64_t piece, int64_t) {
                    const int64_t first = piece * by_token_.sources_each;
                    const int64_t count = std::min(by_token_.sources_each, u_.d_ff - first);
                    std::vector<int64_t> at(size_t(count) + 1);
                    for (int64_t t = 0; t < u_.tokens; ++t)
                        for (int64_t i = by_token_.begin(piece, t); i < by_token_.end(piece, t); ++i)
                            ++at[size_t(by_token_.index[i] - first) + 1];
                    at[0] = piece * u_.tokens * piece_blocks_ * u_.units_per_block;
                    for (int64_t unit = 0; unit < count; ++unit) at[size_t(unit) + 1] += at[size_t(unit)];
                    const int64_t begin = at[0];
                    for (int64_t t = 0; t < u_.tokens; ++t) {
                        if (t % SOURCES == 0)
                            std::copy_n(at.data(), count, lists.bounds + t / SOURCES * u_.d_ff + first);
                        for (int64_t i = by_token_.begin(piece, t); i < by_token_.end(piece, t); ++i) {
                            const int64_t slot = at[size_t(by_token_.index[i] - first)]++;
                            lists.index[slot] = int32_t(t);
                            for (size_t f = 0; f < from.size(); ++f)
                                if (to[f]) to[f][slot] = from[f][i];
                        }
                    }
                    std::copy_n(at.data(), count, lists.bounds + lists.pieces * u_.d_ff + first);
                    for (int64_t unit = 0, i = begin; unit_bias && unit < count; ++unit) {
                        float total = 0;
                        for (; i < at[size_t(unit)]; ++i) total += to[0][i];
                        unit_bias[first + unit] = total;
                    }
                }};
    }

    const sparsecli_units& u_;
    Crew& crew_;
    const Ops& k_;
    const int64_t blocks_, width_, slices_;  // width_: pairs of a token
    int64_t piece_blocks_ = 0, many_ = 0, sources_step_ = 0;
    Lists by_token_{};
    int32_t* pair_ = crew_.scratch<int32_t>(u_.tokens * width_);  // of what is listed: which of its token's pairs
    float *sources_ = nullptr, *sums_ = nullptr;                  // of every worker
};

// A block of the controller's second factor, both ways around and filled up with zeros, and logits of some tokens.
class ControllerBlock {
  public:
    ControllerBlock(const sparsecli_controller& c, const Ops& ops)
        : c_(c),
          k_(ops),
          units_(round_up(c.block_size, LANES)),
          rank_(round_up(c.rank, LANES)),
          second_(new float[units_ * rank_]()),
          transposed_(new float[c.rank * units_]()),
          bias_(new float[units_]()),
          logits_(new float[TILE * units_]),
          hidden_(new float[TILE * rank_]()) {}

    void load(int64_t block) {
        const float* from = c_.second + block * c_.block_size * c_.rank;
        for (int64_t n = 0; n < c_.block_size; ++n)
            for (int64_t i = 0; i < c_.rank; ++i)
                second_[n * rank_ + i] = transposed_[i * units_ + n] = from[n * c_.rank + i];
        std::fill_n(bias_.get(), units_, -INFINITY);
        std::copy_n(c_.bias + block * c_.block_size, c_.block_size, bias_.get());
    }

    // Logits (count, units()) of hidden (count, stride).
    float* logits(const float* hidden, int64_t stride, int64_t count) {
        for (int64_t t = 0; t < count; ++t) std::copy_n(bias_.get(), units_, row(t));
        k_.add_matrix_product(hidden, stride, 1, transposed_.get(), c_.rank, count, units_, logits_.get());
        return logits_.get();
    }

    // From the gradient of logits (count, units()) those of hidden (count, rank()) and of this block; `dz` is added to.
    void add_gradients(int64_t count, float* dz, float* dsecond, float* dbias) {
        k_.add_matrix_product(logits_.get(), units_, 1, second_.get(), c_.block_size, count, rank_, dz);
        k_.add_matrix_product(logits_.get(), 1, units_, hidden_.get(), count, units_, rank_, dsecond);
        for (int64_t t = 0; t < count; ++t)
            for (int64_t n = 0; n < units_; ++n) dbias[n] += row(t)[n];
    }

    float* row(int64_t t) { return logits_.get() + t * units_; }
    float* hidden(int64_t t) { return hidden_.get() + t * rank_; }
    int64_t units() const { return units_; }
    int64_t rank() const { return rank_; }

  private:
    const sparsecli_controller& c_;
    const Ops& k_;
    const int64_t units_, rank_;
    const std::unique_ptr<float[]> second_, transposed_, bias_, logits_, hidden_;
};

// A number that looks random for every number.
uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

void choose(const sparsecli_controller& c, Crew& crew, bool decide, float temperature, uint64_t seed, int32_t* chosen,
            float* probabilities) {
    const Ops& k = selected_ops();
    const int64_t blocks = c.d_ff / c.block_size, count = c.units_per_block, width = blocks * count;
    const int64_t groups = std::min(blocks, int64_t(64));
    crew.run({{groups, [&](int64_t group, int64_t) {
                   ControllerBlock block(c, k);
                   std::vector<float> p(size_t(block.units()));
                   for (int64_t b = blocks * group / groups; b < blocks * (group + 1) / groups; ++b) {
                       block.load(b);
                       for (int64_t first = 0; first < c.tokens; first += TILE) {
                           const int64_t tokens = std::min(TILE, c.tokens - first);
                           block.logits(c.hidden + first * c.rank, c.rank, tokens);
                           for (int64_t t = 0; t < tokens; ++t) {
                               const int64_t at = (first + t) * width + b * count;
                               if (probabilities) std::copy_n(block.row(t), block.units(), p.data());
                               if (decide && temperature > 0)
                                   k.add_gumbel_noise(temperature, mixed(seed + uint64_t(first + t)), b * c.block_size,
                                                      block.units(), block.row(t));
                               if (decide) k.choose_largest(block.row(t), block.units(), count, chosen + at);
                               for (int64_t j = 0; decide && j < count; ++j)  // all NaN: padding must not be chosen
                                   if (chosen[at + j] >= c.block_size) chosen[at + j] = 0;
                               if (!probabilities) continue;
                               k.softmax(p.data(), block.units());
                               for (int64_t j = 0; j < count; ++j) probabilities[at + j] = p[size_t(chosen[at + j])];
                           }
                       }
                   }
               }}});
}

void controller_gradients(const sparsecli_controller& c, Crew& crew, const int32_t* chosen, const float* gradient,
                          float* dhidden, float* dsecond, float* dbias) {
    const Ops& k = selected_ops();
    const int64_t blocks = c.d_ff / c.block_size, count = c.units_per_block, width = blocks * count;
    const int64_t groups = std::min(blocks, PARTIAL), rank = round_up(c.rank, LANES);
    float* partial = crew.scratch<float>(groups * c.tokens * rank);
    const Tasks blockwise{
        groups, [&](int64_t group, int64_t) {
            ControllerBlock block(c, k);
            std::vector<float> second(size_t(block.units() * rank)), bias(size_t(block.units())),
                tile(size_t(TILE * rank));
            float* own = partial + group * c.tokens * rank;
            std::fill_n(own, c.tokens * rank, 0.0f);
            int64_t listed[TILE];
            for (int64_t b = blocks * group / groups; b < blocks * (group + 1) / groups; ++b) {
                block.load(b);
                std::fill(second.begin(), second.end(), 0.0f);
                std::fill(bias.begin(), bias.end(), 0.0f);
                for (int64_t t = 0; t < c.tokens;) {
                    int64_t tokens = 0;
                    for (; t < c.tokens && tokens < TILE; ++t) {  // those that have a gradient
                        const float* of_token = gradient + t * width + b * count;
                        if (std::all_of(of_token, of_token + count, [](float g) { return g == 0; })) continue;
                        std::copy_n(c.hidden + t * c.rank, c.rank, block.hidden(tokens));
                        listed[tokens++] = t;
                    }
                    block.logits(block.hidden(0), rank, tokens);
                    for (int64_t i = 0; i < tokens; ++i) {
                        const int64_t at = listed[i] * width + b * count;
                        k.softmax_gradient(block.row(i), block.units(), chosen + at, gradient + at, count);
                        std::copy_n(own + listed[i] * rank, rank, tile.data() + i * rank);
                    }
                    block.add_gradients(tokens, tile.data(), second.data(), bias.data());
                    for (int64_t i = 0; i < tokens; ++i)
                        std::copy_n(tile.data() + i * rank, rank, own + listed[i] * rank);
                }
                for (int64_t n = 0; n < c.block_size; ++n)
                    std::copy_n(second.data() + n * rank, c.rank, dsecond + (b * c.block_size + n) * c.rank);
                std::copy_n(bias.data(), c.block_size, dbias + b * c.block_size);
            }
        }};
    const Tasks adding{pieces_of(c.tokens, TILE), [&](int64_t task, int64_t) {
                           for (int64_t t = task * TILE; t < std::min((task + 1) * TILE, c.tokens); ++t)
                               for (int64_t i = 0; i < c.rank; ++i) {
                                   float total = 0;
                                   for (int64_t group = 0; group < groups; ++group)
                                       total += partial[(group * c.tokens + t) * rank + i];
                                   dhidden[t * c.rank + i] = total;
                               }
                       }};
    crew.run({blockwise, adding});
}

// Runs `body` with the crew. What it throws becomes one line in `error`, and -1.
template <class F>
int64_t with_crew(int64_t threads, char* error, const F& body) {
    try {
        std::unique_lock<std::mutex> lock;
        body(Crew::locked(lock, threads));
        return 0;
    } catch (const std::bad_alloc&) {
        std::snprintf(error, SPARSECLI_ERROR_BYTES, "not enough memory");
    } catch (const std::exception& problem) {
        std::snprintf(error, SPARSECLI_ERROR_BYTES, "%s", problem.what());
    }
    return -1;
}

}  // namespace
}  // namespace sparsecli

using namespace sparsecli;

int64_t sparsecli_units_forward(const sparsecli_units* units, float* before, float* raised, float* y, char* error) {
    return with_crew(units->threads, error, [&](Crew& crew) { ChosenUnits(*units, crew).forward(before, raised, y); });
}

int64_t sparsecli_units_backward(const sparsecli_units* units, const float* before, const float* raised,
                                 const float* dy, const sparsecli_unit_gradients* gradients, char* error) {
    return with_crew(units->threads, error,
                     [&](Crew& crew) { ChosenUnits(*units, crew).backward(before, raised, dy, *gradients); });
}

int64_t sparsecli_controller_choose(const sparsecli_controller* controller, int64_t decide, float temperature,
                                    uint64_t seed, int32_t* chosen, float* probabilities, char* error) {
    return with_crew(controller->threads, error, [&](Crew& crew) {
        choose(*controller, crew, decide != 0, temperature, seed, chosen, probabilities);
    });
}

int64_t sparsecli_controller_backward(const sparsecli_controller* controller, const int32_t* chosen,
                                      const float* gradient, float* hidden, float* second, float* bias, char* error) {
    return with_crew(controller->threads, error, [&](Crew& crew) {
        controller_gradients(*controller, crew, chosen, gradient, hidden, second, bias);
    });
}
