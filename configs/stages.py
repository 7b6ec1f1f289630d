"""Sections of stages that a run has only where it is asked to; configs/base.py has all others."""

import ml_collections


def llara() -> ml_collections.ConfigDict:
    """LLaRA's stage before train.retriever's; the rest is as in step A."""
    llara = ml_collections.ConfigDict()
    llara.epochs = 0.0  # Passes over pairs of passages; 0: none. The rest as in step A.
    llara.passage_words = 32  # Words of a passage, half of a text that is shorter than two.
    llara.pairs = 100_000  # Pairs at most, drawn by the seed; 0: all.
    return llara


def distill() -> ml_collections.ConfigDict:
    """The query tower, which learns the vectors of expanded queries."""
    distill = ml_collections.ConfigDict()
    distill.epochs = 0.0  # Passes over its queries; 0: no query tower is distilled.
    # The more passages a teacher averages, the less of it is chance, which no query tells.
    distill.samples = ()  # How many; tried on dev; (): as many as evaluation.samples has.
    distill.train_queries = 0  # The run's training queries at most; 0: all.
    distill.documents = 4096  # Documents at most that the generator writes further queries for.
    distill.queries_per_document = 1  # For each of them; what is nearly a test query is left out.
    distill.batch_size = 32  # Queries a batch.
    distill.accumulation = 1  # Batches an update, by their mean gradient.
    distill.learning_rate = 5e-5  # Peak.
    distill.warmup_steps = 0  # Updates from 0 to the peak; at most half of all.
    distill.weight_decay = 0.0  # Decoupled, on matrices; not on biases and norms.
    distill.clip_norm = 1.0  # Greatest norm of the gradient.
    distill.cosine_weight = 1.0  # Weight of 1 - cosine of both vectors.
    distill.kl_weight = 0.0  # Weight of the divergence from the ranking by the expanded query.
    distill.temperature = 0.05  # tau of both rankings, and of the control's.
    distill.depth = 16  # Documents that each expanded query finds first: a batch's are ranked.
    distill.control = False  # Another tower, from the same queries and their documents alone.
    distill.eval_every = 0  # Updates between evaluations on dev, the best is kept; 0: none.
    distill.save_every = 100  # Updates between checkpoints.
    return distill


def figret() -> ml_collections.ConfigDict:
    """A last turn on what the retriever fails."""
    figret = ml_collections.ConfigDict()
    figret.rank = 0  # On training queries whose relevant documents it ranks below; 0: none.
    figret.queries = 1024  # How many of these at most; 0: all.
    return figret


def reranker() -> ml_collections.ConfigDict:
    """train.reranker's cross-encoder."""
    reranker = ml_collections.ConfigDict()
    reranker.source = ""  # What it begins as: BERT, its kin or ModernBERT; a head is made.
    reranker.max_length = 256  # Tokens of a pair, its model's at most; the longer text is cut.
    reranker.compute_dtype = "float32"  # "float32" or "bfloat16"; weights stay in float32.
    reranker.remat = "dots"  # What the backward pass recomputes: "none", "dots" or "full".
    # "binary": each pair's cross-entropy; "listwise": the softmax over a query's documents.
    reranker.loss = "listwise"  # What is learned of the scores.
    reranker.negatives = 4  # Given ones a query and step; more are drawn from, fewer masked.
    reranker.dropout = False  # The module's own rates, in training.
    reranker.epochs = 1.0  # Passes over the training queries.
    reranker.batch_size = 16  # Queries a batch, each with its documents.
    reranker.accumulation = 1  # Batches an update, by their mean gradient.
    reranker.learning_rate = 2e-5  # Peak.
    reranker.warmup_steps = 0  # Updates from 0 to the peak; at most half of all.
    reranker.weight_decay = 0.0  # Decoupled, on matrices; not on biases and norms.
    reranker.clip_norm = 1.0  # Greatest norm of the gradient.
    reranker.eval_every = 100  # Updates between evaluations on data.dev.
    reranker.patience = 0  # Evaluations without a gain until it stops; 0: never.
    reranker.save_every = 100  # Updates between checkpoints.
    return reranker
