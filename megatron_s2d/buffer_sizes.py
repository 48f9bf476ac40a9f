"""Sizes of temporary buffers that the code allocates and the memory estimate counts. No torch here."""

# kl/fused.py: float32 logits of one chunk, of student and teacher together.
LOGITS_CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}

# kl/fused.py: chunks whose logit gradients are collected for one pair of gradient products. The float32 accumulator of
# the weight's gradient is read and written once per product, which at few rows per chunk costs more than the product.
# On a CPU the gradient overwrites logits.
CHUNKS_PER_PRODUCT = {"cuda": 4, "cpu": 1}

# kl/torch_backend.py: logits of one row block on a CPU; its handful of float32 buffers stays in a core's cache.
ROW_BLOCK_ELEMENTS = 1 << 18

# teachers/frozen.py: positions whose full logits exist at once while top-k entries are selected.
TOP_K_ROWS_PER_CHUNK = 1024

# parallel/p2p.py: rows on the device at once, in each direction.
P2P_BUCKET_BYTES = 128 << 20

# models/tp_comm_overlap.py: buffers of [tokens of a micro-batch, hidden size] that Transformer Engine's layers
# exchange, counted from what it allocates outside of PyTorch.
TP_COMM_OVERLAP_BUFFERS = 13

# models/layers.py: channels of each query and key beside those of the head, where heads have attention sinks; kernels
# want head sizes that it divides.
SINK_CHANNELS = 8

# models/batched_experts.py: rows of all ranks that share experts, up to which every row is multiplied with every expert
# when tokens are decoded.
MOST_BATCHED_EXPERT_ROWS = 512

# models/packed_weights.py: elements of a matrix from which on a CPU multiplies faster with a packed copy.
# Smaller ones stay in a cache.
FEWEST_PACKED_VALUES = 1 << 18

# rollout/megatron/passes.py: tokens of a response from which on these copies pay. Making them takes as long as a few
# tokens.
FEWEST_PREPARED_TOKENS = 16

# rollout/megatron/sampling.py: columns from which on a CPU sums the probabilities of blocks of them, not of each.
FEWEST_COLUMNS_IN_BLOCKS = 4096

# rollout/megatron/batching.py: response positions whose random numbers are drawn at once.
POSITIONS_PER_DRAW = 256

# rollout/megatron/engine.py: tokens of a response that are decoded before the host looks for ended responses. On a GPU
# each look waits for the device; on a CPU it costs nothing, and a row that has ended a full row of every layer.
POSITIONS_PER_CHECK = {"cuda": 16, "cpu": 1}
