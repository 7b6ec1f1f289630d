"""Every setting of `train.joint`, with what it means; the other configs change some of them.

The defaults are the paper's (arXiv 2502.17057) where the paper gives one. Sections of stages that a
run has only where it is asked to are in configs/stages.py.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import stages


def get_config() -> ml_collections.ConfigDict:
    """The paper's settings, without models or data: those come with each config."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # Sets the order of data, dropout and every sampled token.
    config.rounds = 1  # A then B so many times; the paper: once. Each uses the latest generator.
    config.keep = 2  # Latest checkpoints that stay; the last of each round always does.
    # "dpo": on pairs; "reward-sft": on each candidate's negative log-likelihood, by its share
    # softmax(reward / dpo.reward_temperature) in its query's; "grpo": on-policy, section grpo.
    config.step_b = "dpo"  # How the generator learns.
    # "positives": first a pass over step B's queries, by the likelihood of what all their relevant
    # documents begin with, for models that would write nothing alike; "best": by that of the best
    # of their candidates, where worth more than 0. Candidates as in step B, the rest as in dpo.
    config.warm_start = ""  # "": none.

    config.data = data = ml_collections.ConfigDict()
    data.kind = "beir"  # A directory; "pydoc": docstrings of packages; "triples": JSON lines.
    data.path = ""  # The BEIR directory; triples: a directory of files; train.retriever: a file.
    data.url = ""  # Instead of a path: one file, a zip in BEIR layout or triples, to download.
    data.sha256 = ""  # That file's sha256; another file is refused.
    data.md5 = ""  # The same by md5, which BEIR publishes; one of the two is wanted, or both.
    data.cache = ""  # Where it is kept; "": ~/.cache/expandr-jax.
    data.tests = ()  # Further BEIR directories or zips that a run is tested on, after its own data.
    data.weights = ()  # triples: (("FILE", weight), ...), shares of the rows; (): all of all files.
    data.prepared = ""  # triples: where they are prepared, for several runs; "": in the workdir.
    data.dev = ""  # train.retriever: BEIR directory whose dev queries choose the weights; or none.
    data.on_bad = "error"  # train.retriever: what a bad line of triples is, "error" or "skip".
    data.packages = ()  # pydoc: "name==version" of each package to read; requirements-pydoc.txt.
    data.min_pairs = 1  # pydoc: fewest pairs to go on with.
    data.shares = shares = ml_collections.ConfigDict()  # Queries' shares, where no split is given.
    shares.retriever_train = 0.735  # To step A; 7 to 1 against step B, as in the paper.
    shares.generator_train = 0.105  # To step B.
    shares.dev = 0.05  # To choosing settings.
    shares.test = 0.11  # To the results.
    data.max_retriever_train = 0  # Queries of step A at most; 0: all.
    data.max_generator_train = 0  # Queries of step B at most; 0: all.
    data.max_dev = 0  # Dev queries at most; 0: all.
    data.max_test = 0  # Test queries at most; 0: all.

    config.retriever = retriever = ml_collections.ConfigDict()
    retriever.source = ""  # Directory, hub id, or "package:NAME/PATH".
    retriever.shape = ""  # train.plan: a config.json of the model; "": the source's own.
    retriever.sha256 = placeholder(str)  # The weights file's sha256; none or "": not checked.
    retriever.pooling = ""  # "mean", "cls", "last", "block", "decoder", "splade"; "": as files say.
    retriever.normalize = placeholder(bool)  # Vectors to unit length; none: as its files say.
    retriever.bidirectional = False  # A decoder is read without its causal mask; or its files say.
    retriever.end_token = False  # The end-of-text token stands behind each text; or its files say.
    retriever.max_length = 512  # Tokens of a text, its model's at most; longer ones lose their end.
    retriever.query_length = 0  # Tokens of a query, its prompt among them; 0: as max_length.
    # A model's instruction, say; "": nothing. None of these: as its files say.
    retriever.query_prompt = placeholder(str)  # Put before queries.
    retriever.document_prompt = placeholder(str)  # Before documents, and passages for queries.
    retriever.compute_dtype = "float32"  # Type that encoding computes in: "float32" or "bfloat16".
    # "bfloat16", of a decoder "int8", "int4", "nf4": only where contrastive.lora.rank is above 0.
    retriever.weights = "float32"  # Type of the weights, a frozen base's.
    retriever.vectors = "float32"  # Documents' vectors in files; or "float16", "bfloat16", "int8".
    retriever.tokens_per_batch = 2048  # Rows times length of a batch when encoding; TPUs want more.

    config.generator = generator = ml_collections.ConfigDict()
    generator.source = ""  # Directory, hub id, .gguf file, "package:NAME/PATH"; PEFT adapters too.
    generator.shape = ""  # train.plan: a config.json of the model; "": the source's own.
    generator.sha256 = placeholder(str)  # The weights file's sha256; none or "": not checked.
    generator.compute_dtype = "bfloat16"  # In sampling and step B; the adapter stays in float32.
    # "float32", "bfloat16", "int8", "int4" or "nf4"; "": compute_dtype.
    generator.weights = ""  # What the frozen base is kept in.
    generator.remat = "none"  # What DPO's backward pass recomputes: "none", "dots" or "full".
    generator.thinking = False  # Whether a model that can reasons before it answers.
    generator.today = ""  # What chat templates are told, as "2026-11-28"; "": the first day.
    generator.stop = ()  # Strings that end a text; what comes from there on is dropped.
    generator.slots = 128  # Texts that are sampled at once.
    generator.memory_limit = 0.0  # GiB of a device that sampling may take; 0: what the device has.
    # Lengths in tokens that prompts are padded to; longer prompts than the last lose their start.
    generator.prompt_buckets = (64, 128, 256, 512)
    # An OpenAI-compatible server of the same base, unadapted; its key is in EXPANDR_SERVER_KEY.
    generator.server = server = ml_collections.ConfigDict()
    server.url = ""  # As http://127.0.0.1:8000/v1; "": texts are sampled here.
    server.model = ""  # The base's name there.
    server.concurrency = 32  # Requests on their way at once.
    server.retries = 6  # Further tries of a request that fails for a reason that may pass.
    server.timeout = 600.0  # Seconds without a byte (none comes before a whole text) of a try.

    config.lora = lora = ml_collections.ConfigDict()
    lora.rank = 8  # Inner width.
    lora.alpha = 32.0  # Scale times rank.
    lora.dropout = 0.1  # On the adapter's input.
    lora.targets = ("q_proj$", "v_proj$")  # Regular expressions on the projections' paths.

    config.expansion = expansion = _sampling()  # Passages for queries; _sampling has the rest.
    expansion.strategy = "q2d"  # A name in expandr_jax/expansion/strategies.py.
    expansion.template = ""  # Replaces its last prompt; has {query} and may have {passages}.
    expansion.temperature = 1.0  # 0: greedy.
    # "mean" of vectors, as in the paper; or each text and the query searched for themselves, and
    # the results fused by "max", "mean-score" (scaled) or "rrf"; "dev": the best of all on dev.
    expansion.combine = "mean"  # When a system is ranked; step A and rewards have the mean.
    expansion.train_samples = 1  # Expansions of each training query; 0: step A is plain.
    expansion.strip_train_lead_ins = True  # The released code keeps "Here is a passage ..." here.

    config.llara = stages.llara()  # LLaRA's stage before train.retriever's: configs/stages.py.

    config.contrastive = contrastive = ml_collections.ConfigDict()  # Step A.
    contrastive.compute_dtype = "float32"  # "float32" or "bfloat16"; weights stay in float32.
    contrastive.lora = lora = ml_collections.ConfigDict()  # Its base stays as it is.
    lora.rank = 0  # Inner width; 0: all weights are trained, and nothing below counts.
    lora.alpha = 32.0  # Scale times rank.
    lora.dropout = 0.0  # On the adapter's input; contrastive.dropout is of the module's own rates.
    lora.targets = ("_proj$",)  # Regular expressions on the projections' paths; of all of them.
    contrastive.epochs = 3.0  # Passes over the training queries.
    contrastive.batch_size = 64  # Queries a batch; each one's document is a negative of others.
    contrastive.accumulation = 1  # Batches an update, by their mean gradient.
    contrastive.length_window = 0  # Batches sorted by length together, to pad less; 0: none are.
    contrastive.curriculum = False  # From easy to hard triples, by margins or teacher scores.
    contrastive.learning_rate = 3e-5  # Peak.
    contrastive.warmup_steps = 0  # Updates from 0 to the peak; at most half of all.
    contrastive.weight_decay = 0.0  # Decoupled, on matrices; not on biases and norms.
    contrastive.clip_norm = 1.0  # Greatest norm of the gradient.
    contrastive.temperature = 0.02  # tau.
    contrastive.query_weight = 0.5  # The query vector's weight in the mean with its expansions'.
    contrastive.normalize = "both"  # Unit length "before" the mean, "after", "both" or "none".
    contrastive.negatives = 0  # Given ones a query and step; more are drawn from, fewer masked.
    contrastive.plain_share = 0.0  # Share of queries that stay unexpanded in a step.
    contrastive.dropout = False  # The module's own rates, in training.
    # "dots" is as quick as "none" on CPU, where memory costs more than arithmetic, with half of it.
    contrastive.remat = "dots"  # What the backward pass recomputes: "none", "dots" or "full".
    contrastive.micro_batch = 0  # Rows whose graph is in memory at once (GradCache); 0: all.
    contrastive.learn_temperature = False  # Starts from `temperature`; never below 0.01.
    contrastive.symmetric = False  # Documents are compared with all queries, too.
    contrastive.info_nce_weight = 1.0  # Weight of the contrastive loss.
    contrastive.margin_mse_weight = 0.0  # Weight of squared errors of the teacher's score margins.
    contrastive.kl_weight = 0.0  # Weight of the divergence from the teacher's distribution.
    contrastive.teacher_temperature = 1.0  # Divides the teacher's scores in that divergence.
    contrastive.invariance_weight = 0.0  # Weight of the KL by which expansion changes a ranking.
    # FLOPS terms, which make splade's vectors sparse: the sum of squared means of each component.
    contrastive.flops_query_weight = 0.0  # Weight of the queries' term.
    contrastive.flops_document_weight = 0.0  # Weight of the documents' term.
    contrastive.query_likelihood_weight = 0.0  # Weight of LLM-QL's loss, nats a token; of decoders.
    contrastive.query_likelihood_mask = True  # The query sees of the document its end token alone.
    contrastive.query_likelihood_corruption = 0.6  # Share of the document's words left blank.
    contrastive.dimensions = ()  # Matryoshka: the loss's mean over vectors cut to these lengths.
    contrastive.eval_every = 100  # Updates between evaluations on train.retriever's data.dev.
    contrastive.patience = 0  # Evaluations without a gain until it stops; 0: never.
    contrastive.restart = False  # Each round starts from the original weights.
    contrastive.save_every = 100  # Updates between checkpoints.

    config.mining = mining = ml_collections.ConfigDict()  # Where contrastive.negatives is not 0.
    mining.per_query = 4  # Kept of a query, to draw from; 0: none, the data's (judged 0) are used.
    mining.first = 0  # Results left out at the top: relevant documents nobody judged may be there.
    mining.depth = 50  # Results looked at.
    mining.absolute_margin = placeholder(float)  # So far below the positive, but for figret's.
    mining.relative_margin = placeholder(float)  # The same as a share of that score.

    config.candidates = candidates = _sampling()  # Step B, sampling; _sampling has the rest.
    candidates.temperatures = (0.8, 0.9, 1.0, 1.1)
    candidates.per_temperature = 8  # Candidates of a query at each temperature.

    # Prompts that show examples, so that a query's candidates differ by what they were shown; what
    # is learned has none. Examples are texts that were worth the most for some of step B's queries.
    config.demonstrations = demonstrations = ml_collections.ConfigDict()
    demonstrations.prompts = 0  # How many candidates are sampled with; 0: the strategy's own alone.
    demonstrations.examples = 4  # Examples that each shows.
    demonstrations.draws = 16  # Draws of them that are tried; the prompts best on dev are kept.
    demonstrations.queries = 50  # Queries that examples are of, and dev queries, at most.

    config.answer = answer = _sampling()  # Step B, the self-answer; likewise.
    answer.temperature = 1.0  # 0: greedy.
    # Strategies whose prompts show passages cut each of these here, too; so do distill and figret.
    answer.max_characters = 1500  # Characters of a document that a prompt shows.

    config.reward = reward = ml_collections.ConfigDict()
    reward.positive = 1.0  # Weight of 1 / rank among candidates, by similarity to the document.
    reward.answer = 1.0  # Weight of 1 / rank among candidates, by similarity to the self-answer.
    reward.search = "dense"  # How corpus and gain search: "dense", "bm25" or "fused", both of them.
    reward.corpus = 0.0  # Weight of the expanded query's search in the corpus; 0: not searched.
    # "reciprocal_rank": 1 / rank of the document; "ndcg" or "average_precision" of all relevant
    # ones; "softmax_share": theirs of softmax(score / corpus_temperature) over the results;
    # "piecewise_rank" of the first one: 2 falls to 1 over ranks 1 to 10, to 0 at rank 100; "hit": 1
    # where one of the `depth` results holds one of the query's `answers` in queries.jsonl.
    reward.corpus_measure = "reciprocal_rank"  # What that search is worth.
    reward.corpus_temperature = 0.05  # "softmax_share": the smaller, the more the first ones count.
    reward.group = 0.0  # Weight of nDCG@10 of the expanded query over sampled documents.
    reward.group_size = 64  # Documents drawn from the corpus beside a query's relevant ones.
    reward.group_sets = 4  # Draws of them whose nDCG is averaged.
    reward.gain = 0.0  # Weight of what a candidate adds to its query's search; it may be below 0.
    reward.gain_measure = "ndcg"  # What a search is worth there, as for reward.corpus_measure.
    reward.length = 0.0  # Weight of 0 for a text, falling to -1 as it nears max_new_tokens.
    reward.length_cache = 100  # So many tokens short of them it begins to fall.
    reward.format = 0.0  # Weight of 1 for a text that is as the pattern says, and 0 for others.
    reward.format_pattern = ".+"  # A regular expression that all of it matches; . is any character.
    # "my.module:function" each, called as function(queries=[text, ...], texts=[[text, ...], ...],
    # judgements=[{document: grade}, ...]), which gives numbers as `texts` has strings. Training
    # alone imports them; `my.module` lies where the command is started, or is installed.
    reward.functions = ()  # Rewards of one's own.
    reward.function_weights = ()  # A weight for each of them; (): 1.
    reward.function_seconds = 600.0  # Longest call of one; it stops the run.
    reward.query_weight = 0.5  # The query vector's weight in these rankings.
    reward.depth = 100  # Results of the search in the corpus; a document below them counts 0.
    reward.threshold = 0.6  # Least best sum of both similarities for a query to be used.

    config.dpo = dpo = ml_collections.ConfigDict()  # Step B, training.
    dpo.loss = "sigmoid"  # step_b="dpo": "sigmoid", "hinge", "ipo", "robust" or "simpo".
    dpo.reward_temperature = 0.5  # reward-sft: in the reward's units; near 0 the best alone counts.
    dpo.beta = 0.1  # Strength of the tie to the reference.
    dpo.reference = "base"  # What pairs are compared with; "start": as a warm start leaves it.
    dpo.gamma = 0.5  # simpo: margin between the rewards of both, for which beta should be near 2.
    dpo.label_smoothing = 0.0  # Share of pairs, below 0.5, whose chosen text counts as the worse.
    dpo.length_normalized = False  # Mean instead of summed log-probabilities of tokens.
    dpo.sft_weight = 0.0  # Weight of the chosen text's negative log-likelihood per token, added.
    dpo.epochs = 2.0  # Passes over the pairs or candidates.
    dpo.batch_size = 16  # Pairs or candidates a batch.
    dpo.accumulation = 1  # Batches an update, by their mean gradient.
    dpo.learning_rate = 2e-5  # Peak.
    dpo.warmup_steps = 0  # Updates from 0 to the peak; at most half of all.
    dpo.clip_norm = 10.0  # Greatest norm of the gradient.
    dpo.prompt_length = 100  # Tokens of a prompt; longer ones lose their beginning.
    dpo.response_length = 512  # Tokens of a response, its end included; longer ones are cut.
    dpo.on_bad_pair = "error"  # train.generator: stop at the first, or "drop" and count them.
    dpo.dev_share = 0.1  # Share of pairs, or of the candidates' queries, held out by a hash.
    dpo.eval_every = 0  # Updates between evaluations on the pairs held out; 0: at the end only.
    dpo.keep_best = False  # Use the adapter with the lowest loss on them, not the last.
    dpo.chunk = 256  # Response tokens whose logits are in memory at once.
    dpo.save_every = 100  # Updates between checkpoints.

    config.grpo = grpo = _sampling()  # Step B on-policy; _sampling has the rest.
    grpo.top_p = 1.0  # Below 1, texts are not quite the policy's, whose probabilities are learned.
    # "grpo", "dr_grpo", "dapo", "gspo", "rloo" or "cispo": expandr_jax/losses/policy.py.
    grpo.loss = "grpo"  # Which of these is learned.
    # "deviation": reward less the group's mean, by its deviation; "mean": that alone;
    # "leave_one_out": reward less the mean of the others.
    grpo.advantage = ""  # "": as the loss has it.
    grpo.steps = 300  # Steps of a round; each samples, rewards and updates.
    grpo.queries = 16  # Queries a step.
    grpo.samples = 8  # Candidates of each, which are compared with one another.
    grpo.temperature = 1.0  # Divides logits in sampling and in what is learned.
    # Queries whose candidates have equal rewards teach nothing, and are left out.
    grpo.resample = 0  # Times at most that others are drawn in their place.
    # Co-augmentation: texts of documents are learned, too; each is worth the nDCG@10 of searches
    # among a step's documents (reward.group alone), over reward.group_sets draws of a text each.
    grpo.documents = 0  # Documents a query and step: half relevant, a quarter irrelevant, others.
    grpo.document_prompt = "d2e"  # What is asked for them: "d2q", "d2e" (keywords) or "d2d".
    grpo.document_weights = (0.2, 0.1)  # A relevant document's advantages, and another's.
    grpo.mask_cut = False  # Nothing is learned from texts that were cut for their length.
    grpo.minibatches = 1  # Updates that a step's queries are divided among.
    grpo.passes = 1  # Times that a step's queries are learned from.
    grpo.accumulation = 1  # Parts of an update that are computed in turn, to need less memory.
    grpo.learning_rate = 1e-5  # It stays the same after the warm-up.
    grpo.warmup_steps = 0  # Updates from 0 to it.
    grpo.clip_norm = 1.0  # Greatest norm of the gradient.
    grpo.clip_low = placeholder(float)  # How far a ratio may go below 1; none: as the loss has it.
    grpo.clip_high = placeholder(float)  # How far above 1; likewise.
    grpo.kl_weight = 0.0  # Weight of the KL to the base; it is logged without, too.
    # Its estimate is multiplied by the ratio, whose slope the KL's own needs, as in DeepSeek-V3.2.
    grpo.kl_unbiased = False  # Without, as the paper of GRPO has it.
    grpo.entropy_weight = 0.0  # Weight of the entropy, as a bonus.
    # Texts are learned from by exp(log-probability when training - when sampling), at most this.
    grpo.importance_cap = 0.0  # For programs that round otherwise; 0: they are taken for the same.
    grpo.chunk = 256  # Tokens whose logits are in memory at once.
    grpo.save_every = 10  # Steps between checkpoints.
    # Collapsed: watch_steps steps in turn beyond a limit; the start is the mean of the first five.
    grpo.watch_kl = 1.0  # Nats a token above the first step's: what the base would hardly write.
    grpo.watch_entropy = (0.1, 3.0)  # Shares of the start's: one text for all, or noise.
    grpo.watch_repetitive = 0.5  # Share of repetitive texts above the start's.
    grpo.watch_reward = 1.0  # Below the start's, in deviations within a group at the start.
    grpo.watch_steps = 10  # Steps in turn.
    # "stop": it ends with the last good adapter; "back": it goes on from that one at half the rate.
    grpo.on_collapse = "stop"  # What is done then.

    # Stages that a run has where it is asked to; configs/stages.py has the settings of each.
    config.distill = stages.distill()  # Expanded queries' vectors, learned.
    config.figret = stages.figret()  # A last turn on what the retriever fails.
    config.reranker = stages.reranker()  # train.reranker's cross-encoder.

    config.search = search = ml_collections.ConfigDict()
    search.backend = "auto"  # "scann", "exact", or "auto": ScaNN where it is installed.
    # "exact": every document is scored; "index": by the backend, whose recall results.json says.
    search.evaluation = "exact"  # How dev and test queries are searched for.
    search.exact = exact = ml_collections.ConfigDict()
    exact.block_rows = 8192  # Documents in one matrix product.
    exact.query_rows = 1024  # Queries in one matrix product.
    exact.resident_mib = 512  # MiB of documents' vectors that stay on each device meanwhile.
    search.scann = scann = ml_collections.ConfigDict()
    scann.method = "auto"  # "brute": all; "ah": hashed; "tree": those in near leaves; by size.
    scann.ah_from = 20_000  # Documents from which "auto" is "ah".
    scann.tree_from = 100_000  # Documents from which "auto" is "tree".
    scann.leaves = placeholder(int)  # Leaves of the tree; none: the root of the documents' number.
    scann.leaves_to_search = placeholder(int)  # For a query; none: a quarter of them.
    scann.tree_sample = 100_000  # Vectors that the tree is trained on.
    scann.tree_iterations = 12  # Iterations of k-means for the tree.
    scann.soar = placeholder(float)  # Weight of a second leaf for each vector; none: one leaf.
    scann.dimensions_per_block = 2  # Hashed together.
    scann.anisotropic_threshold = 0.2  # Threshold of the loss that the hash is trained by.
    scann.ah_sample = 100_000  # Vectors that the hash is trained on.
    scann.ah_iterations = 10  # Iterations of k-means for the hash.
    scann.reorder = 400  # Documents scored exactly for a query; as many as asked for at least.
    scann.storage = "float32"  # The vectors that those are scored by; or "bfloat16", "int8".

    config.evaluation = evaluation = ml_collections.ConfigDict()
    evaluation.systems = (  # Rows of the results; see expandr_jax/ranking/systems.py.
        "bm25", "zero-shot", "zero-shot+expansion", "fine-tuned", "fine-tuned+expansion",
        "expandr", "expandr-base-generator", "expandr-plain",
    )  # fmt: skip
    evaluation.query_weights = (0.5, 0.6, 0.7, 0.8, 0.9)  # Tried on dev.
    evaluation.samples = (1,)  # How many expansions are averaged; tried on dev.
    # interpolation's parts: weights tried on dev are multiples of 1 / fusion_steps; 0: equal ones.
    evaluation.fusion_steps = 10  # Fewer for more than two parts, as 100 ways are tried at most.
    evaluation.depth = 100  # Documents a query in runs/.
    evaluation.sample_depth = 1000  # Results of the searches that rank single samples.
    evaluation.drop_identical_ids = False  # Leave out a document with its query's id (ArguAna).
    evaluation.rerank = rerank = ml_collections.ConfigDict()  # Where systems have rerank:SYSTEM.
    rerank.source = ""  # A cross-encoder: a directory, hub id or "package:NAME/PATH".
    rerank.depth = 100  # Documents of a query that it reads; the others follow as they were.
    rerank.depths = ()  # Depths tried on dev; (): depth is taken.
    rerank.max_length = 512  # Tokens of a pair, its model's at most; the longer one loses its end.
    rerank.rows = 32  # Pairs that are computed at once; TPUs want more.
    evaluation.listwise = listwise = ml_collections.ConfigDict()  # Where systems have listwise:S.
    listwise.depth = 20  # Documents of a query that are ordered; the others follow as they were.
    listwise.depths = ()  # Depths tried on dev; (): depth is taken.
    listwise.window = 10  # Passages that one prompt shows.
    listwise.stride = 5  # How far the window moves to the top each time; less than window.
    listwise.passage_tokens = 100  # Tokens of each, or as many as generator.prompt_buckets allow.
    evaluation.splade = splade = ml_collections.ConfigDict()  # Where systems have splade.
    splade.source = ""  # SPLADE's encoder: a directory, hub id or "package:NAME/PATH".
    splade.max_length = 512  # Tokens of a text, its model's at most; longer ones lose their end.

    config.export = export = ml_collections.ConfigDict()
    export.dtype = "float32"  # Type of the exported models' weights.

    config.log = log = ml_collections.ConfigDict()  # May be changed when a run is continued.
    log.peak_flops = placeholder(float)  # A device's, a second; none: from a table, if it has it.
    log.wandb = ""  # A project of Weights & Biases that gets each step, too; "": none.
    log.profile_steps = 0  # Steps of each phase that are traced to profile/; 0: none.

    config.mesh = mesh = ml_collections.ConfigDict()  # Sizes multiply to the number of devices.
    mesh.data = -1  # Batches; -1: what the others leave.
    mesh.fsdp = 1  # Batches and parameters.
    mesh.tensor = 1  # Heads and feed-forward.
    # (data, fsdp, tensor) where a phase wants others; parameters move between them on the devices.
    mesh.contrastive = ()  # Step A; (): the sizes above, as for the others.
    mesh.encoding = ()  # Texts to vectors.
    mesh.sampling = ()  # Expansions, candidates and answers.
    mesh.dpo = ()  # Step B.
    mesh.workers = 0  # Processes a host that make step A's batches ahead; 0: a thread does.
    return config


def _sampling() -> ml_collections.ConfigDict:
    """What all sections that sample texts have in common: how these are drawn."""
    section = ml_collections.ConfigDict()
    section.top_p = 0.9  # Probability mass that is sampled from.
    section.top_k = 0  # Tokens that are sampled from, the likeliest; 0: all.
    section.min_p = 0.0  # Least probability as a share of the likeliest token's; 0: any.
    section.repetition_penalty = 1.0  # Above 1, what stands in prompt or text grows less likely.
    section.max_new_tokens = 512  # Longest text, in tokens.
    return section
