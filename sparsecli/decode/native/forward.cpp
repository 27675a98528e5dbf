#include "forward.h"

#include "layers/mixture_feed_forward.h"
#include "layers/quantized_feed_forward.h"
#include "layers/spark_feed_forward.h"
#include "layers/sparse_feed_forward.h"

namespace sparsecli {

namespace {

std::unique_ptr<FeedForward> make_feed_forward(Workspace& space) {
    switch (space.shape.feed_forward) {
        case SPARSE_UNITS:
            return std::make_unique<SparseFeedForward>(space);
        case MIXTURE_UNITS:
            return std::make_unique<MixtureFeedForward>(space);
        case SELECTOR_UNITS:
            return std::make_unique<SelectorFeedForward>(space);
        case PRECISION_UNITS:
            return std::make_unique<PrecisionFeedForward>(space);
        case SPARK_UNITS:
            return std::make_unique<SparkFeedForward>(space);
        default:
            return std::make_unique<DenseFeedForward>(space);
    }
}

}  // namespace

Forward::Forward(const Model& model, const Ops& ops, Pool& pool)
    : space_(model, ops, pool),
      embedding_(space_),
      attention_(space_),
      cross_attention_(space_),
      sru_(space_),
      feed_forward_(make_feed_forward(space_)),
      head_(space_) {
    space_.allocate_activations();
}

void Forward::reserve(int64_t positions) {
    space_.reserve(positions);
    attention_.reserve(space_, positions);
}

void Forward::run(const std::vector<Token>& tokens, bool profile) {
    for (const Token& token : tokens) token.sequence->newest = token.position;
    tokens_ += int64_t(tokens.size());
    space_.tokens = &tokens;
    space_.profile = profile;
    head_.begin(tokens);
    const auto job = [this](int64_t worker) {
        Pass pass(space_, worker);
        embedding_.run(pass);
        run_blocks(pass);
        head_.run(pass);
    };
    space_.pool.run(job, tokens.size() == 1);
}

void Forward::run_blocks(Pass& pass) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t layer_idx = 0; layer_idx < pass.shape.layers; ++layer_idx) {
        const Block& block = pass.model.blocks[size_t(layer_idx)];
        if (pass.shape.parallel) {  // the feed-forward layer reads what attention reads
            if (pass.shape.recurrent_layers) sru_.enter(pass, block.recurrence);
            pass.save_norm(block.feed_forward_norm);
        }
        for (int64_t index = 0; index < pass.shape.attention_layers; ++index) {
            attention(pass, block, layer_idx, index);
            pass.swap_streams();
        }
        if (pass.model.crosses()) cross_attention_.run(pass, block.cross, layer_idx);
        feed_forward(pass, block, layer_idx);
        pass.swap_streams();
    }
    const auto passed = std::chrono::steady_clock::now() - start;
    if (!pass.worker) block_stack_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(passed).count();
}

void Forward::attention(Pass& pass, const Block& block, int64_t layer_idx, int64_t index) {
    const AttentionLayer& layer = block.attention[index];
    pass.ahead.clear();
    if (pass.single()) {
        attention_.plan_ahead(pass, layer);
        feed_forward_->plan_ahead(pass, block, layer_idx);
    }
    pass.begin_branch();
    attention_.run(pass, layer, layer_idx * pass.shape.attention_layers + index);
    pass.end_branch(layer.post_norm);
}

void Forward::feed_forward(Pass& pass, const Block& block, int64_t layer_idx) {
    const bool recurrent = pass.shape.recurrent_layers, parallel = pass.shape.parallel;
    if (recurrent && !parallel) sru_.enter(pass, block.recurrence);
    const Activations x = parallel ? pass.saved_norm() : pass.normalized(block.feed_forward_norm);
    pass.mark(OTHER);
    pass.begin_branch();
    feed_forward_->activate(pass, block, layer_idx, x);
    if (recurrent) sru_.leave(pass, block.recurrence, layer_idx);
    feed_forward_->add_sum(pass, block, layer_idx);
    pass.end_branch(block.feed_forward_post_norm);
}

void Forward::read_encoder(const std::vector<Token>& rows) {
    space_.tokens = &rows;
    space_.profile = false;
    const auto job = [this](int64_t worker) {
        Pass pass(space_, worker);
        cross_attention_.read_encoder(pass);
    };
    space_.pool.run(job, false);
}

int64_t Forward::take_active_units(int64_t* units) {
    for (int64_t layer_idx = 0; layer_idx < space_.shape.layers; ++layer_idx) {
        units[layer_idx] = 0;
        for (int64_t worker = 0; worker < space_.pool.threads(); ++worker)
            units[layer_idx] += std::exchange(space_.own_active_units.row(worker)[layer_idx], 0);
    }
    return std::exchange(tokens_, 0);
}

}  // namespace sparsecli
