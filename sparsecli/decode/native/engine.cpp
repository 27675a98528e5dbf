#include "engine.h"

#include <cmath>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>

#include "forward.h"

using namespace sparsecli;

namespace {

void complain(char* error, const std::string& message) {
    std::snprintf(error, SPARSECLI_ERROR_BYTES, "%s", message.c_str());
}

// Runs `body`; what it throws becomes one line in `error`.
template <class F>
bool guarded(char* error, const F& body) {
    try {
        body();
        return true;
    } catch (const std::bad_alloc&) {
        complain(error, "not enough memory");
    } catch (const std::exception& problem) {
        complain(error, problem.what());
    }
    return false;
}

// Whether there are LSH rotations for every text of at most so many positions.
bool can_hash(const Model& model, int64_t capacity) {
    if (capacity <= model.shape.most_keys) return true;
    for (size_t at = 0; at < model.rotations.size(); ++at) {
        const int64_t level = int64_t(at) % LEVELS;
        const bool needed = level >= level_of(model.shape.most_keys) && level <= level_of(capacity - 1);
        if (needed && !model.rotations[at].data) return false;
    }
    return true;
}

// How many of `tokens` from `start` on go through the blocks together. Keys of a sequence are hashed into one number of
// buckets in a pass.
int64_t pass_length(const std::vector<Token>& tokens, int64_t start, const sparsecli_shape& shape) {
    const int64_t most = std::min(int64_t(tokens.size()) - start, CHUNK);
    for (int64_t held = 1; held < most && shape.hash_rounds; ++held) {
        const Token &last = tokens[size_t(start + held - 1)], &next = tokens[size_t(start + held)];
        const bool hashed = next.sequence == last.sequence && next.position >= shape.most_keys;
        if (hashed && level_of(next.position) != level_of(last.position)) return held;
    }
    return most;
}

template <class F>
void in_passes(const std::vector<Token>& tokens, const sparsecli_shape& shape, const F& body) {
    for (auto start = tokens.begin(); start != tokens.end();) {
        const auto end = start + pass_length(tokens, start - tokens.begin(), shape);
        body(std::vector<Token>(start, end));
        start = end;
    }
}

// Sets the rotary frequencies of each sequence for its new length. Returns the tokens that it holds already, where the
// other frequencies turned them: they are to be computed anew.
std::vector<Token> choose_frequencies(const std::vector<Token>& tokens, const sparsecli_shape& shape) {
    std::vector<Token> again;
    for (size_t i = 0; i < tokens.size(); ++i) {
        Sequence* sequence = tokens[i].sequence;
        if (i + 1 < tokens.size() && tokens[i + 1].sequence == sequence) continue;
        const bool longer = tokens[i].position >= shape.rotary_switch;
        if (sequence->length && longer != sequence->long_frequencies)
            for (int64_t position = 0; position < sequence->length; ++position)
                again.push_back({sequence, position, sequence->ids[size_t(position)], nullptr});
        sequence->long_frequencies = longer;
    }
    return again;
}

// Bounds for which no product of sizes that is computed anywhere leaves 64 bits: a tensor then has less than 2^61
// bytes.
std::string check(const sparsecli_shape& s) {
    const auto wrong = [](const char* what) { return std::string(what) + " is out of range"; };
    const auto outside = [](int64_t value, int64_t first, int64_t last) { return value < first || value > last; };
    if (outside(s.max_positions, 1, int64_t(1) << 30)) return wrong("max_positions, at most 2^30,");
    if (outside(s.activation, RELU, GELU_TANH)) return wrong("activation");
    if (outside(s.projection, DENSE, MULTIPLICATIVE_CONV)) return wrong("projection");
    if (outside(s.output, NO_OUTPUT, MULTIPLICATIVE_CONV_OUTPUT)) return wrong("output");
    if (outside(s.value_concat, NO_CONCAT, CONCAT_WHOLE)) return wrong("value_concat");
    if (outside(s.positions, LEARNED, ROTARY)) return wrong("positions");
    if (outside(s.cache_type, FLOAT32, INT8)) return wrong("the type of the cache");
    if (outside(s.conv_type, FLOAT32, BFLOAT16)) return wrong("the type of convolutions");
    if (outside(s.head_modules, 0, s.vocabulary)) return wrong("head_modules");
    if (outside(s.head_candidates, 0, s.head_modules ? 0 : int64_t(1) << 20)) return wrong("head_candidates");
    if (outside(s.query_modules, 0, s.d_model)) return wrong("query_modules");
    if (outside(s.query_key_norm, NO_NORM, PROJECTION_NORM)) return wrong("query_key_norm");
    if (outside(s.probability_gate, NO_GATE, GATE_OUTPUT)) return wrong("probability_gate");
    const bool whole_texts = s.encoder || s.hash_rounds;  // whose caches may come from elsewhere
    if (outside(s.rotary_switch, 0, whole_texts ? 0 : int64_t(1) << 30)) return wrong("rotary_switch");
    if (outside(s.most_keys, 0, int64_t(1) << 30)) return wrong("the keys that a token attends to");
    if (s.d_model < 1 || s.d_model > 1 << 20) return wrong("d_model");
    if (s.layers < 1 || s.layers > 1 << 16) return wrong("layers");
    if (s.heads < 1 || s.heads > 1 << 16) return wrong("heads");
    if (s.head_width < 1 || s.head_width > MAX_HEAD_WIDTH) return wrong("the width of heads, at most 1024,");
    if (s.rotary_width < 0 || s.rotary_width > s.head_width || s.rotary_width % 2) return wrong("rotary_width");
    if (s.key_value_heads < 1 || s.heads % s.key_value_heads) return wrong("key_value_heads");
    const int64_t most_query_rank = std::min(s.d_model, s.heads * s.head_width), queries = s.query_rank;
    if (queries < 0 || queries > most_query_rank || (queries && s.projection != DENSE)) return wrong("query_rank");
    const int64_t most_key_rank = std::min(s.d_model, s.key_value_heads * s.head_width);
    if (s.key_rank < (queries > 0) || s.key_rank > (queries ? most_key_rank : 0)) return wrong("key_rank");
    if (s.vocabulary < 1 || s.vocabulary > int64_t(1) << 31) return wrong("vocabulary");
    if (s.d_ff < 1 || s.d_ff > int64_t(1) << 30) return wrong("d_ff");
    if (s.modules < 1 || s.d_model % s.modules) return wrong("modules");
    const bool dense = s.projection == DENSE && s.output == DENSE_OUTPUT;
    if (!dense && s.heads * s.head_width != s.d_model) return wrong("the width of heads together");
    if (s.kernel < 1 || s.kernel > 1 << 16) return wrong("kernel");
    if (s.feed_forward < DENSE_UNITS || s.feed_forward > SPARK_UNITS) return wrong("feed_forward");
    if (s.feed_forward == SPARK_UNITS) {
        if (s.rank < 1 || s.rank >= s.d_model) return wrong("the width of the predictor");
        if (!std::isfinite(s.unit_quantile)) return wrong("unit_quantile");
    } else if (s.feed_forward != DENSE_UNITS) {
        const bool mixture = s.feed_forward == MIXTURE_UNITS, sparse = s.feed_forward == SPARSE_UNITS;
        if (s.block_size < 1 || s.d_ff % s.block_size) return wrong("block_size");
        if (!mixture && s.block_size > MAX_BLOCK) return wrong("block_size, at most 4096 units,");
        if (s.rank < (mixture || sparse) || s.rank > 4096)
            return wrong("the rank or the number of experts, at most 4096,");
        const int64_t least = s.feed_forward != PRECISION_UNITS, most = mixture ? s.rank : s.block_size;
        for (int64_t layer = 0; layer < s.layers; ++layer)
            if (s.units_per_block[layer] < least || s.units_per_block[layer] > most) return wrong("units_per_block");
    }
    if (s.head_modules && s.vocabulary % s.head_modules) return wrong("head_modules");
    const bool plain = s.streams == 1 && s.encoder == NO_ENCODER;
    if (!plain && (s.post_norms || s.residual_scale != 1)) return wrong("post_norms");
    for (int64_t layer = 0; layer < s.layers; ++layer) {
        const int64_t window = s.windows[layer], table = s.rotary_tables[layer];
        if (outside(window, 0, int64_t(1) << 30) || (window && (!plain || s.shared_query_key))) return wrong("windows");
        if (outside(table, NO_ROTARY, s.positions == ROTARY ? SLIDING_ROTARY : NO_ROTARY))
            return wrong("rotary_tables");
    }
    if (s.streams < 1 || s.streams > 2 || (s.concatenate && s.streams == 1)) return wrong("streams");
    if (s.attention_layers < 1 || s.attention_layers > s.streams) return wrong("attention_layers");
    const bool shared = s.shared_query_key != OWN_KEYS;
    if (s.shared_query_key < OWN_KEYS || s.shared_query_key > MEAN_OF_TWO || (shared && s.heads != s.key_value_heads))
        return wrong("shared_query_key");
    const int64_t rounds = s.hash_rounds;
    if (rounds < 0 || rounds > 1 << 16 || (rounds && (s.most_keys < 1 || !shared))) return wrong("hash_rounds");
    if (s.encoder < NO_ENCODER || s.encoder > PREFIX) return wrong("encoder");
    if (s.query_modules &&
        (s.encoder != CROSS_ATTENTION || s.d_model % s.query_modules || s.heads * s.head_width != s.d_model))
        return wrong("query_modules");
    if (s.recurrent_layers < 0 || s.recurrent_layers > 64) return wrong("recurrent_layers");
    if (s.recurrent_width < (s.recurrent_layers > 0) || s.recurrent_width > 4096) return wrong("recurrent_width");
    return "";
}

}  // namespace

struct sparsecli_engine {
    Model model;
    const Ops* ops = &selected_ops();
    Pool pool;
    std::unique_ptr<Forward> forward;
    bool profile = false;

    sparsecli_engine(const sparsecli_shape& shape, int64_t threads, bool pin)
        : model(shape), pool(threads, pin, !shape.units_on_disk) {
        forward = std::make_unique<Forward>(model, *ops, pool);
    }
};

struct sparsecli_sequence {
    Sequence held;
};

extern "C" {

int64_t sparsecli_interface(void) { return 1000 * 15 + int64_t(sizeof(sparsecli_shape)); }

const char* sparsecli_instruction_set(const char* name, char* error) {
    const Ops* found = find_ops(name);
    if (!found) {
        complain(error, std::string(name) + ": this processor or this build does not have these instructions");
        return nullptr;
    }
    select_ops(found);
    return found->name;
}

sparsecli_engine* sparsecli_create(const sparsecli_shape* shape, int64_t threads, int64_t pin, char* error) {
    const std::string problem = check(*shape);
    if (!problem.empty()) {
        complain(error, problem);
        return nullptr;
    }
    sparsecli_engine* engine = nullptr;
    guarded(error, [&] { engine = new sparsecli_engine(*shape, threads, pin != 0); });
    return engine;
}

void sparsecli_destroy(sparsecli_engine* engine) { delete engine; }

int64_t sparsecli_bind(sparsecli_engine* engine, const sparsecli_tensor* tensors, int64_t count, char* error) {
    Model& model = engine->model;
    const bool fine = guarded(error, [&] {
        for (const sparsecli_tensor* tensor = tensors; tensor < tensors + count; ++tensor) {
            const bool known = tensor->layer >= -1 && tensor->layer < model.shape.layers;
            Matrix* matrix = known ? model.find(tensor->layer, tensor->name) : nullptr;
            if (!matrix || tensor->type < FLOAT32 || tensor->type > FLOAT16)
                throw std::runtime_error(std::string(tensor->name) + ": the engine has no such tensor or type");
            *matrix = {tensor->data, tensor->scale, tensor->type, tensor->rows, tensor->cols, tensor->by_rows != 0};
            const bool group_sums = tensor->type == INT4 || tensor->type == INT3;
            model.group_sums = model.group_sums || group_sums;
            model.quantized = model.quantized || tensor->type == INT8 || group_sums;
            model.bytes = model.bytes || of_gguf(tensor->type);
        }
        // Codes of an embedding that is tied to the head lie in memory once.
        if (!model.shape.head_modules && !model.head.weight.data) model.head.weight = model.embedding;
        if (model.shape.head_candidates && !model.exact_head.data) model.exact_head = model.embedding;
    });
    return fine ? 0 : -1;
}

int64_t sparsecli_bind_rotations(sparsecli_engine* engine, int64_t cache_idx, int64_t level, const int64_t* factors,
                                 int64_t count, const float* rotations, int64_t elements, char* error) {
    Model& model = engine->model;
    const sparsecli_shape& shape = model.shape;
    const bool fine = guarded(error, [&] {
        if (!model.hashes() || cache_idx < 0 || cache_idx >= model.caches() || level < 0 || level >= LEVELS)
            throw std::runtime_error("LSH rotations: no such attention layer or length");
        int64_t columns = 0, buckets = 1;
        for (int64_t i = 0; i < count; ++i) {
            if (factors[i] < 2 || factors[i] % 2 || factors[i] > MAX_BUCKETS / buckets)
                throw std::runtime_error("LSH rotations: the number of buckets is out of range");
            buckets *= factors[i];
            columns += factors[i] / 2;
        }
        columns = round_up(columns * shape.hash_rounds, LANES);
        if (count < 1 || columns > MAX_ROTATIONS)
            throw std::runtime_error("LSH rotations: the number of rotations is out of range");
        const int64_t expected = shape.heads * shape.head_width * columns;
        if (elements != expected)
            throw std::runtime_error("LSH rotations: " + std::to_string(elements) + " numbers, expected " +
                                     std::to_string(expected));
        model.rotations[size_t(cache_idx * LEVELS + level)] = {{factors, factors + count}, buckets, columns, rotations};
    });
    return fine ? 0 : -1;
}

sparsecli_sequence* sparsecli_sequence_create(sparsecli_engine* engine, int64_t capacity, int64_t encoder_rows,
                                              char* error) {
    const Model& model = engine->model;
    sparsecli_sequence* sequence = nullptr;
    guarded(error, [&] {
        if (!countable(model, capacity, encoder_rows)) throw std::runtime_error("a sequence cannot be so long");
        auto made = std::make_unique<sparsecli_sequence>();
        made->held.capacity = positions_of(model, capacity, encoder_rows);
        if (!can_hash(model, made->held.capacity))
            throw std::runtime_error("LSH rotations for so long a text are missing");
        made->held.encoder_capacity = encoder_rows;
        allocate(made->held, model);
        sequence = made.release();
    });
    return sequence;
}

void sparsecli_sequence_destroy(sparsecli_sequence* sequence) { delete sequence; }

int64_t sparsecli_sequence_length(const sparsecli_sequence* sequence) {
    return sequence->held.length - sequence->held.prefix;
}

int64_t sparsecli_sequence_truncate(sparsecli_engine* engine, sparsecli_sequence* sequence, int64_t length,
                                    char* error) {
    Sequence& held = sequence->held;
    if (length < 0 || held.prefix + length >= held.length) return 0;
    if (!can_truncate(held, engine->model, length)) {
        complain(error, "layers with a sliding window do not hold the tokens before " + std::to_string(length) +
                            " any more; begin the sequence anew");
        return -1;
    }
    held.length = held.prefix + length;
    if (!held.length) held.stored = 0;
    return 0;
}

int64_t sparsecli_sequence_copy(sparsecli_engine* engine, const sparsecli_sequence* from, int64_t length,
                                sparsecli_sequence* to, char* error) {
    const Model& model = engine->model;
    const Sequence& source = from->held;
    const bool fine = guarded(error, [&] {
        if (model.shape.encoder != NO_ENCODER || model.hashes())
            throw std::runtime_error("tokens of a model with an encoder or LSH attention cannot be copied");
        if (source.capacity != to->held.capacity || length < 0 || length > source.length)
            throw std::runtime_error(std::to_string(length) + " tokens cannot be copied from " +
                                     std::to_string(source.length) + ", or capacities differ");
        if (!can_truncate(source, model, length))
            throw std::runtime_error("layers with a sliding window do not hold the first " + std::to_string(length) +
                                     " tokens any more");
        copy(source, length, model, to->held);
    });
    return fine ? 0 : -1;
}

int64_t sparsecli_sequence_bytes(const sparsecli_engine* engine, int64_t capacity, int64_t encoder_rows) {
    const Model& model = engine->model;
    if (!countable(model, capacity, encoder_rows)) return INT64_MAX;
    return cache_bytes(model, positions_of(model, capacity, encoder_rows), encoder_rows);
}

int64_t sparsecli_read_encoder(sparsecli_engine* engine, sparsecli_sequence* sequence, const float* first,
                               const float* second, int64_t rows, char* error) {
    const sparsecli_shape& shape = engine->model.shape;
    Sequence& held = sequence->held;
    const bool fine = guarded(error, [&] {
        if (shape.encoder == NO_ENCODER) throw std::runtime_error("the model has no encoder");
        if (rows < 1) throw std::runtime_error("the encoder's output is empty");
        if (rows > held.encoder_capacity)
            throw std::runtime_error("the encoder's output has " + std::to_string(rows) +
                                     " rows, the sequence has room for " + std::to_string(held.encoder_capacity));
        engine->forward->reserve(rows);
        held.length = held.prefix = held.encoder_length = held.stored = 0;
        std::vector<Token> all;
        for (int64_t i = 0; i < rows; ++i)
            all.push_back({&held, i, -1, nullptr, {first + i * shape.d_model, second + i * shape.d_model}});
        in_passes(all, shape, [&](const std::vector<Token>& pass) {
            if (engine->model.crosses())
                engine->forward->read_encoder(pass);
            else
                engine->forward->run(pass, false);
        });
        held.encoder_length = rows;
        if (shape.encoder == PREFIX) held.prefix = held.length = rows;
    });
    return fine ? 0 : -1;
}

int64_t sparsecli_import_kv(sparsecli_engine* engine, sparsecli_sequence* sequence, int64_t cache_idx,
                            const float* keys, const float* values, const float* conv_inputs,
                            const float* output_conv_inputs, const float* recurrent_states, int64_t positions,
                            char* error) {
    const Model& model = engine->model;
    const sparsecli_shape& shape = model.shape;
    Sequence& held = sequence->held;
    const bool fine = guarded(error, [&] {
        if (cache_idx < 0 || cache_idx >= model.caches()) throw std::runtime_error("no such attention layer");
        if (positions < 1 || positions > held.capacity)
            throw std::runtime_error(std::to_string(positions) + " positions to import, the sequence holds " +
                                     std::to_string(held.capacity));
        const bool recurrent = shape.recurrent_layers && cache_idx % shape.attention_layers == 0;
        const bool convolved = shape.output == MULTIPLICATIVE_CONV_OUTPUT;
        if (!keys || !values || !conv_inputs == model.convolves() || !output_conv_inputs == convolved ||
            !recurrent_states == recurrent)
            throw std::runtime_error("imported keys, values and states are not those of the model's layers");
        held.length = held.prefix = held.stored = 0;
        import_kv(held, model, *engine->ops, cache_idx,
                  {keys, values, conv_inputs, output_conv_inputs, recurrent_states, positions});
    });
    return fine ? 0 : -1;
}

int64_t sparsecli_import_done(sparsecli_engine* engine, sparsecli_sequence* sequence, int64_t positions, int64_t prefix,
                              char* error) {
    const bool has_prefix = engine->model.shape.encoder == PREFIX;
    Sequence& held = sequence->held;
    const bool fine = guarded(error, [&] {
        if (engine->model.shape.rotary_switch)
            throw std::runtime_error("a model whose rotary frequencies depend on the length cannot import keys");
        if (engine->model.crosses())
            throw std::runtime_error("a model with cross-attention cannot import keys and values");
        if (positions < 1 || positions > held.capacity || prefix < has_prefix || prefix > (has_prefix ? positions : 0))
            throw std::runtime_error(std::to_string(positions) + " positions with a prefix of " +
                                     std::to_string(prefix) + " are out of range");
        held.length = held.stored = positions;
        held.prefix = held.encoder_length = prefix;
    });
    return fine ? 0 : -1;
}

int64_t sparsecli_forward(sparsecli_engine* engine, sparsecli_sequence* const* sequences, const int64_t* ids,
                          int64_t count, int64_t all_logits, float* logits, char* error) {
    const sparsecli_shape& shape = engine->model.shape;
    std::vector<Token> tokens;
    // Every token is checked before anything is computed: an error leaves all sequences as they were.
    int64_t longest = 0;
    bool valid = true;
    const bool fine = guarded(error, [&] {
        tokens.reserve(size_t(count));
        for (int64_t i = 0; i < count; ++i) {
            Sequence* sequence = &sequences[i]->held;
            int64_t position = sequence->length;
            if (i && tokens[size_t(i - 1)].sequence == sequence) position = tokens[size_t(i - 1)].position + 1;
            valid = ids[i] >= 0 && ids[i] < shape.vocabulary;
            if (!valid)
                throw std::runtime_error("token " + std::to_string(ids[i]) + " is not in the vocabulary of " +
                                         std::to_string(shape.vocabulary));
            if (shape.encoder && !sequence->encoder_length)
                throw std::runtime_error("the sequence has no encoder output yet");
            if (position >= sequence->capacity)
                throw std::runtime_error("the sequence is full: it holds " + std::to_string(sequence->capacity) +
                                         " positions");
            if (shape.positions == LEARNED && position - sequence->prefix >= shape.max_positions)
                throw std::runtime_error("position " + std::to_string(position - sequence->prefix) +
                                         " is beyond max_positions " + std::to_string(shape.max_positions));
            tokens.push_back({sequence, position, ids[i], nullptr});
            longest = std::max({longest, position + 1, sequence->encoder_length});
        }
        for (int64_t i = 0; i < count; ++i)
            if (all_logits || i + 1 == count || sequences[i + 1] != sequences[i]) {
                tokens[size_t(i)].logits = logits;
                logits += shape.vocabulary;
            }
        engine->forward->reserve(longest);
        if (shape.rotary_switch) {
            in_passes(choose_frequencies(tokens, shape), shape,
                      [&](const std::vector<Token>& pass) { engine->forward->run(pass, false); });
            for (const Token& token : tokens) {
                token.sequence->ids.resize(size_t(token.position));
                token.sequence->ids.push_back(token.id);
            }
        }
        in_passes(tokens, shape, [&](const std::vector<Token>& pass) {
            engine->forward->run(pass, engine->profile);
            for (const Token& token : pass) {
                token.sequence->length = token.position + 1;
                token.sequence->stored = std::max(token.sequence->stored, token.sequence->length);
            }
        });
    });
    return fine ? 0 : valid ? -1 : -2;
}

void sparsecli_active_units(sparsecli_engine* engine, int64_t* units, int64_t* tokens) {
    *tokens = engine->forward->take_active_units(units);
}

int64_t sparsecli_block_stack_ns(const sparsecli_engine* engine) { return engine->forward->block_stack_ns; }

void sparsecli_profile(sparsecli_engine* engine, double* seconds) {
    engine->profile = true;
    for (int64_t part = 0; part < PART_COUNT; ++part) {
        if (seconds) seconds[part] = engine->forward->seconds()[part];
        engine->forward->seconds()[part] = 0;
    }
}

const char* sparsecli_profile_part(int64_t index) {
    return index >= 0 && index < PART_COUNT ? PART_NAMES[index] : nullptr;
}

}  // extern "C"
