"""Every mistake on the command line ends in one sentence that names the flag, before anything is built."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from megatron_recursive.data.preparation import Preparation, vocabulary_digest
from tests.distributed import run_distributed
from tests.quick_start import start_quickly
from tests.unit_tests.training.runs import FLAGS, RECURSION, in_worker, metrics_of, refusals, train

DATA = [flag for flag in FLAGS if flag != "--mock-data"]

# Flags (they follow the tiny run's, and later ones win) | what the sentence says.
FEATURES = [
    ("--num-experts 4", "--num-experts"),
    ("--mtp-num-layers 1", "--mtp-num-layers"),
    ("--multi-latent-attention", "--multi-latent-attention"),
    ("--context-parallel-size 2", "--context-parallel-size"),
    ("--fp8-format e4m3", "--fp8-format"),
    ("--fp4-format e2m1", "--fp4-format"),
    ("--lora-rank 2 --fp8-format e4m3", "adapters beside an 8-bit frozen base (--lora-rank with --fp8-format"),
    ("--lora-rank 2", "--lora-rank 2 leaves all other weights as they are; give those of a model"),
    ("--lora-rank 0", "--lora-rank is 0; give a positive number"),
    ("--lora-rank 2 --lora-alpha 0", "--lora-alpha is 0; give a positive number"),
    ("--lora-per-pass", "--lora-per-pass needs --lora-rank"),
    ("--lora-rank 2 --lora-targets q_proj", "--lora-targets: invalid choice: 'q_proj' (choose from 'linear_qkv'"),
    ("--lora-rank 2 --train-only heads", "--lora-rank and --train-only heads each train weights alone"),
    ("--lora-rank 2 --spec a b", "--lora-rank adapts Megatron's own linears, which --spec a b may replace"),
    ("--lora-rank 2 --lora-per-pass --disable-recursive-refinement", "since a plain model has one pass"),
    ("--lora-rank 2 --lora-per-pass --eval-depths 1", "same passes at every step, which --eval-depths 1 changes"),
    ("--lora-rank 2 --lora-per-pass --throttle", "--throttle divides by the passes that share weights"),
    ("--core-lr-factor 0 --lr-warmup-init 1e-4", "--lr-warmup-init 0.0001 starts all weights at one rate"),
    ("--lora-rank 2 --head-lr-factor 2", "--head-lr-factor 2 says nothing beside --lora-rank"),
    ("--use-megatron-fsdp", "--use-megatron-fsdp"),
    ("--use-torch-fsdp2", "--use-torch-fsdp2"),
    ("--use-mup", "--use-mup"),
    ("--tp-comm-overlap", "--tp-comm-overlap"),
    ("--heterogeneous-layers-config-path x.json", "--heterogeneous-layers-config-path"),
    ("--ckpt-format torch", "--ckpt-format torch_dist"),
    ("--recompute-granularity selective --recompute-modules mlp", "--recompute-modules mlp with biases"),
    ("--recompute-granularity selective --recompute-modules layernorm", "--recompute-modules layernorm"),
    ("--yaml-cfg x.yaml", "YAML configs (--yaml-cfg x.yaml)"),
    ("--logits-load-dir x", "files of logits (--logits-save-dir, --logits-load-dir)"),
    ("--logits-save-dir x", "files of logits (--logits-save-dir, --logits-load-dir)"),
    ("--defer-embedding-wgrad-compute", "deferred weight gradients"),
    ("--delay-wgrad-compute", "deferred weight gradients"),
    ("--te-precision-config-file nowhere", "quantisation by a recipe"),
    ("--fp8-param-gather", "8-bit parameters"),
    ("--fp8-output-proj", "8-bit parameters"),
    ("--cpu-offloading-num-layers 1", "activation offloading"),
    ("--qk-clip", "--qk-clip or --log-max-attention-logit needs --transformer-impl transformer_engine"),
    ("--enable-cuda-graph", "CUDA graphs"),
    ("--external-cuda-graph", "CUDA graphs"),
    ("--hybrid-override-pattern *-", "hybrid layers"),
    ("--tensor-parallel-num-weight-shards 2", "weights in shards"),
    ("--save-activations-interval 1", "files of activations"),
    ("--save-dgrads-interval 1", "files of activations"),
    ("--inprocess-restart", "--inprocess-restart"),
    ("--full-validation --tensor-model-parallel-size 2", "--full-validation over tensor- or pipeline-parallel ranks"),
    ("--dataloader-type external", "--dataloader-type external"),
    ("--init-method-xavier-uniform", "use --init-method-std"),
    ("--pretrained-checkpoint x", "use --init-from-gpt"),
    ("--optimizer lion", "--optimizer: invalid choice: 'lion' (choose from 'adam', 'sgd', 'muon', 'adam_atan2'"),
    ("--evaluate-ema", "--evaluate-ema needs --ema-decay"),
    ("--ema-decay 1", "--ema-decay is 1.0; give a number of at least 0 and below 1"),
    ("--ema-decay 0.9 --no-save-optim", "--ema-decay does not go with --no-save-optim"),
    ("--ema-decay 0.9 --evaluate-ema --skip-train", "--evaluate-ema does not go with --skip-train"),
    ("--optimizer muon --use-distributed-optimizer", "--optimizer muon does not go with --use-distributed-optimizer"),
    ("--optimizer ellis_adam --optimizer-cpu-offload", "ellis_adam does not go with --optimizer-cpu-offload"),
    ("--optimizer muon --muon-scalar-optimizer lion", "--muon-scalar-optimizer: invalid choice: 'lion'"),
    ("--optimizer muon --muon-coefficient-type best", "--muon-coefficient-type best is none of simple, quintic"),
    ("--head-lr-factor -1", "--head-lr-factor is -1.0; give a number of 0 or more"),
    ("--adapter-lr-factor 2", "--adapter-lr-factor needs an adapter, which this model does not have"),
    ("--throttle --disable-recursive-refinement", "--throttle needs layers that are applied more than once"),
    ("--enable-ft-package", "--enable-ft-package needs the package nvidia-resiliency-ext"),
    ("--log-straggler", "--log-straggler needs the package nvidia-ml-py"),
    ("--swiglu --activation-func-clamp-value 1", "has no effect in the fused --swiglu; add --no-bias-swiglu-fusion"),
    ("--activation-func-clamp-value 1", "has no effect without --swiglu or --quick-geglu"),
    ("--openai-gelu --disable-bias-linear", "--openai-gelu has no effect in Megatron 0.19, whose approximation"),
    ("--openai-gelu --swiglu", "--openai-gelu has no effect beside --swiglu"),
    ("--quick-geglu", "--quick-geglu has no fused kernel; add --no-bias-gelu-fusion"),
    ("--freeze-all-layers", "--freeze-all-layers has no effect in Megatron 0.19; use --train-only heads or"),
    ("--attention-backend local", "use --transformer-impl local"),
    ("--position-embedding-type mrope --mrope-section 1 1 2", "--position-embedding-type must be learned_absolute"),
    ("--position-embedding-type relative", "--position-embedding-type must be learned_absolute"),
    ("--transformer-impl inference_optimized", "layers of inference (--transformer-impl inference_optimized)"),
    ("--phase-transition-iterations 3", "--phase-transition-iterations needs --train-samples"),
    ("--bf16 --fp32-residual-connection", "do not support residuals in fp32 (--fp32-residual-connection) yet"),
]
CUDA_ONLY = [
    ("--distributed-backend nccl", "use --distributed-backend gloo"),
    ("--transformer-impl transformer_engine", "use --transformer-impl local"),
    ("--use-flash-attn", "--use-flash-attn"),
    ("--attention-backend flash", "use --attention-backend auto"),
    ("--fp16", "use --bf16"),
    ("--gpu-sniff-test-interval 1", "--gpu-sniff-test-interval needs a CUDA device; on this machine leave it out"),
    ("--optimizer-cuda-graph", "--optimizer-cuda-graph needs a CUDA device"),
]
VALUES = [
    ("--num-latent-refinements 0", "--num-latent-refinements must be at least 1, but is 0"),
    ("--num-refinement-blocks 0", "--num-refinement-blocks must be at least 1, but is 0"),
    ("--num-refinement-blocks -3", "--num-refinement-blocks must be at least 1, but is -3"),
    ("--halt-threshold 0", "--halt-threshold must lie strictly between 0 and 1"),
    ("--halt-threshold 1", "--halt-threshold must lie strictly between 0 and 1"),
    ("--halt-threshold 1.5", "--halt-threshold must lie strictly between 0 and 1"),
    ("--halt-threshold nan", "--halt-threshold must lie strictly between 0 and 1"),
    ("--num-latent-refinements many", "--num-latent-refinements/--L-cycles: invalid int value: 'many'"),
    ("--halt-loss-weight much", "--halt-loss-weight: invalid float value: 'much'"),
    ("--embedding-multiplier 0", "--embedding-multiplier must be a positive number"),
    ("--state-init ones", "--state-init: invalid choice"),
    ("--hidden-size wide", "--hidden-size: invalid int value: 'wide'"),
    ("--no-such-flag 3", "--no-such-flag"),
    ("--disable-recursive-refinement --embedding-multiplier 2", "--embedding-multiplier 2.0 belongs to a recursion"),
    ("--hidden-size 33", "--hidden-size 33 is not divisible by --num-attention-heads 4"),
    ("--num-layers 0", "--num-layers is 0; give a positive number"),
    ("--group-query-attention --num-query-groups 3", "--num-query-groups 3 must divide"),
    ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size 2 does not divide the 1 processes"),
    ("--global-batch-size 5", "--global-batch-size 5 is not divisible by 2"),
    ("--seq-length 32", "--seq-length 32 is larger than --max-position-embeddings 16"),
    ("--train-iters 4 --train-samples 4", "either --train-iters or --train-samples"),
    ("--lr-warmup-fraction 0.1", "one of --lr-warmup-fraction and --lr-warmup-iters"),  # an assertion of Megatron's
    ("--save x", "--save needs --save-interval"),
    ("--vocab-size 0", "--vocab-size is 0"),
    ("--padded-vocab-size 64", "--padded-vocab-size 64 is smaller than the vocabulary of 127"),
    ("--use-checkpoint-args", "--use-checkpoint-args needs a checkpoint"),
    ("--norm-placement last", "--norm-placement: invalid choice"),
    ("--output-norm-scope residual", "--output-norm-scope residual needs --norm-placement post or sandwich"),
    ("--qk-norm-scope full", "--qk-norm-scope full needs --qk-layernorm"),
    ("--norm-placement post --spec a b", "--norm-placement post and --spec exclude each other"),
    ("--qk-layernorm --qk-norm-scope full --apply-wd-to-qk-layernorm", "--apply-wd-to-qk-layernorm does not reach"),
    ("--train-iters -1", "--train-iters is -1; give a positive number"),
    ("--log-interval -1", "--log-interval is -1; give a positive number"),
    ("--eval-iters -1", "--eval-iters is -1; give a number of 0 or more"),
    ("--seed -1", "--seed is -1; give a positive number"),
    ("--kv-channels -1", "--kv-channels is -1; give a positive number"),
    ("--loss-scale nan", "--loss-scale is nan; give a finite number"),
    ("--lr inf", "--lr is inf; give a finite number"),
    ("--glu-linear-offset nan", "--glu-linear-offset is nan; give a finite number"),
    ("--hidden-dropout 1.5", "--hidden-dropout is 1.5; give a number from 0 to 1"),
    ("--adam-beta2 1", "--adam-beta2 is 1; give a number of at least 0 and below 1"),
    ("--kv-channels 3 --position-embedding-type rope", "is odd"),
    ("--num-distributed-optimizer-instances 2", "--num-distributed-optimizer-instances 2 "),
    ("--lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    ("--min-lr 1", "--min-lr 1 is larger than --lr 0.01"),
    ("--lr-warmup-iters 9", "--lr-warmup-iters 9 must be smaller than --lr-decay-iters 9"),
    ("--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler", "excludes --use-checkpoint-opt_param"),
    ("--load nowhere --save there", "--load nowhere holds no checkpoint (latest_checkpointed_iteration.txt is "
                                    "missing); name one, or leave --load out to start from random weights"),
    ("--load there/best --save there", "--load there/best holds no checkpoint"),
    ("--answer-tokens 9 --ddp-average-in-collective", "--ddp-average-in-collective does not go with --answer-tokens"),
    ("--load there --save there --finetune", "name one, or leave --finetune out to start from random weights"),
    ("--exit-on-missing-checkpoint --load nowhere", "needs a checkpoint in --load, but nowhere holds none"),
    ("--ckpt-step 3", "--ckpt-step needs a checkpoint in --load, but it is missing"),
    ("--enable-msc", "--enable-msc was passed but"),
    ("--rampup-batch-size 2 2 8", "has no effect in Megatron 0.19; give --step-batch-size-schedule"),
    ("--step-batch-size-schedule 0:2,64:4", "and --global-batch-size exclude each other"),
    ("--non-persistent-ckpt-type local", "use --non-persistent-ckpt-type global"),
    ("--num-supervision-steps 4 --save x --save-interval 6", "--save-interval 6 would stop within a batch"),
    ("--num-supervision-steps 4 --save x --save-interval 8 --keep-best --eval-iters 1 --eval-interval 6",
     "--eval-interval 6 would stop within a batch"),
    ("--num-supervision-steps 4 --exit-interval 2", "--exit-interval 2 would stop within a batch"),
    ("--num-supervision-steps 4 --iterations-to-skip 3", "--iterations-to-skip takes an iteration for a new batch"),
    ("--num-supervision-steps 4 --disable-recursive-refinement", "the plan of this plain model has none"),
    ("--non-persistent-save-interval 2", "add --non-persistent-ckpt-type global"),
]
LATER = [  # what Megatron finds wrong when it makes its configs of the arguments
    ("--recompute-granularity full", '--recompute-method must be "block" or "uniform"'),
    ("--spec local", "--spec local must be two words"),
    ("--spec nowhere at_all", "--spec nowhere at_all cannot be imported"),
    ("--spec megatron.core.models.gpt.gpt_layer_specs get_gpt_layer_local_spec", "is no layer spec"),
]


def forget() -> None:
    """What a command line has left in Megatron's globals."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    destroy_global_vars()
    destroy_num_microbatches_calculator()


def sentences(cases: list[list[str]]) -> list[str]:
    """What ``parse_arguments`` refuses each command line with; the empty string where it does not."""
    from megatron_recursive.errors import UserError
    from megatron_recursive.training.arguments import parse_arguments

    start_quickly()
    said = []
    for flags in cases:
        sys.argv = ["pretrain", *flags]
        try:
            parse_arguments()
            said.append("")
        except UserError as error:
            said.append(str(error))
        forget()
    return said


def batch_of(flags: list[str]) -> int:
    from megatron_recursive.training.arguments import parse_arguments

    start_quickly()
    sys.argv = ["pretrain", *flags]
    return int(parse_arguments()[0].global_batch_size)


def check(cases: list[tuple[list[str], str]], world_size: int = 1) -> None:
    said = run_distributed(sentences, world_size, [flags for flags, _ in cases], timeout=120)[0]
    wrong = []
    for (flags, expected), sentence in zip(cases, said, strict=True):
        one_sentence = sentence.endswith(".") and not sentence.endswith("..") and "\n" not in sentence
        if expected not in sentence or not one_sentence or "(--help" not in sentence and "--" not in sentence:
            wrong.append(f"... {' '.join(flags[-6:])}: {expected!r} expected, but: {sentence!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("table", [FEATURES, CUDA_ONLY, VALUES], ids=["features", "cuda-only", "values"])
def test_flags_are_refused_in_a_sentence(table: list[tuple[str, str]]) -> None:
    check([([*FLAGS, *flags.split()], expected) for flags, expected in table])


def _later(cases: list[str]) -> list[str | None]:
    said = []
    for flags in cases:
        said.append(in_worker([*FLAGS, *RECURSION, *flags.split()]))
        forget()
    return said


def test_what_megatrons_configs_refuse_is_a_sentence() -> None:
    (said,) = run_distributed(_later, 1, [flags for flags, _ in LATER], timeout=120)
    for (flags, expected), sentence in zip(LATER, said, strict=True):
        assert expected in str(sentence) and "--" in str(sentence) and str(sentence).count("\n") == 0, (flags, sentence)


def test_good_flags_are_not_refused() -> None:
    good = ["", "--bf16 --null-tokenizer-pad-id -1", "--hidden-dropout 0", "--vocab-size 200",
            "--detach-between-refinements", "--openai-gelu", "--swiglu --no-bias-swiglu-fusion "
            "--activation-func-clamp-value 1", "--quick-geglu --disable-bias-linear"]  # fmt: skip
    assert run_distributed(sentences, 1, [[*FLAGS, *flags.split()] for flags in good], timeout=60) == [[""] * len(good)]


def test_a_schedule_of_batch_sizes() -> None:
    """Its smallest batch counts; Megatron would find the others wrong when it gets there."""
    drop = {"--global-batch-size", "--train-iters", "--lr-decay-iters", "--lr-warmup-iters"}
    common = [word for i, word in enumerate(FLAGS) if word not in drop and (i == 0 or FLAGS[i - 1] not in drop)]
    samples = [*common, "--train-samples", "64", "--step-batch-size-schedule"]
    stages = ["--pipeline-model-parallel-size", "2"]
    check([
        ([*common, "--train-iters", "9", "--step-batch-size-schedule", "0:4"], "needs --train-samples"),
        ([*samples, "0:4,64:5"], "a batch of 5 is not divisible by 2"),
        ([*samples, "64:4"], "must begin with 0:BATCH"),
        ([*samples, "4"], "Invalid schedule entry"),
    ])  # fmt: skip
    check([([*samples, "0:2,64:8", *stages], "--step-batch-size-schedule 2 makes 1 micro-batches a replica")], 2)
    assert run_distributed(sentences, 2, [[*samples, "0:4,64:8", *stages]], timeout=60) == [[""], [""]]
    assert run_distributed(batch_of, 1, [*samples, "0:4,64:8"], timeout=60) == [8], "what is told of a step"


def test_heads_must_be_divisible_by_the_tensor_parallel_size() -> None:
    flags = "--num-attention-heads 1 --tensor-model-parallel-size 2".split()
    check([([*FLAGS, *flags], "--num-attention-heads 1 is not divisible by --tensor-model-parallel-size 2")], 2)


def write_dataset(prefix: Path, lengths: list[int]) -> None:
    """An indexed dataset of documents 1, 2, 3, ... (the layout is tested in tests/unit_tests/data)."""
    count = len(lengths)
    offsets = [2 * sum(lengths[:i]) for i in range(count)]
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, count, count + 1)
    index += struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *offsets, *range(count + 1))
    prefix.with_suffix(".idx").write_bytes(index)
    tokens = [1 + position % 100 for length in lengths for position in range(length)]
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))


def test_data_is_checked_up_front(tmp_path: Path) -> None:
    good, cut, garbage = tmp_path / "good", tmp_path / "cut", tmp_path / "garbage"
    for prefix in (good, cut, garbage):
        write_dataset(prefix, [10] * 20)
    cut.with_suffix(".bin").write_bytes(good.with_suffix(".bin").read_bytes()[:-7])
    garbage.with_suffix(".idx").write_bytes(b"not an index at all" * 20)
    listed = tmp_path / "blend.txt"
    listed.write_text(f"0.5 {good} 0.5 {tmp_path / 'nowhere'}")
    per_split = tmp_path / "splits.json"
    per_split.write_text(f'{{"train": ["1", "{good}"], "valid": "1 {cut}", "test": null}}')
    no_json = tmp_path / "no.json"
    no_json.write_text("{train")
    whole = ["--multiple-validation-sets", "--full-validation", "--train-data-path", "1", str(good), "1", str(good)]
    check([
        (DATA, "No training data: give --data-path"),
        ([*DATA, "--data-path", str(tmp_path / "nowhere")], "nowhere.bin does not exist"),
        ([*DATA, "--data-path", f"{good}.bin"], "give the prefix without .bin"),
        ([*DATA, "--data-path", str(cut)], "cut.bin has 393 bytes but cut.idx promises 400"),
        ([*DATA, "--train-data-path", str(cut)], "--train-data-path"),
        ([*DATA, "--data-path", str(garbage)], "garbage.idx is not an index"),
        ([*DATA, "--data-path", "0.5", str(good), "0.5"], "the weight 0.5 has no prefix"),
        ([*DATA, "--data-path", "0.5", str(good), "lots", str(good)], "the weight 0.5 has no prefix"),
        ([*DATA, "--data-path", "-1", str(good)], "--data-path"),
        ([*DATA, "--data-path", "nan", str(good)], "the weights nan must be positive; leave out"),
        ([*DATA, "--data-args-path", str(listed)], "nowhere.bin does not exist"),
        ([*DATA, "--data-args-path", str(tmp_path / "none.txt")], "--data-args-path"),
        ([*DATA, "--per-split-data-args-path", str(per_split)], "cut.bin has 393 bytes"),
        ([*DATA, "--per-split-data-args-path", str(no_json)], "--per-split-data-args-path"),
        ([*DATA, "--data-path", str(good), "--valid-data-path", str(good)], "--data-path excludes"),
        ([*DATA, "--data-path", "0", str(good), "1", str(good)], "the weights 0 1 must be positive; leave"),
        ([*DATA, "--multiple-validation-sets", "--data-path", str(good)], "needs --full-validation"),
        ([*DATA, *whole, "--valid-data-path", "1", str(good), "1", str(good)], "--valid-data-path has weights"),
    ])  # fmt: skip
    assert run_distributed(sentences, 1, [[*DATA, "--data-path", "0.3", str(good), "0.7", str(good)]]) == [[""]]


def test_tokenizers_and_output_folders_are_checked_up_front(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"version": ')
    file = tmp_path / "file"
    file.write_text("occupied")
    hugging_face = [*FLAGS, "--tokenizer-type", "HuggingFaceTokenizer"]
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere" / "at" / "all")
    save = [*FLAGS, "--save-interval", "1", "--save"]
    nowhere = "/proc/none"  # which refuses root too
    at = FLAGS.index("--tokenizer-type")
    check([
        ([*FLAGS[:at], *FLAGS[at + 2:]], "No tokenizer: give --tokenizer-type"),
        (hugging_face, "--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model"),
        ([*hugging_face, "--tokenizer-model", str(tmp_path / "none")], "--tokenizer-model"),
        ([*hugging_face, "--tokenizer-model", str(broken)], "cannot be loaded"),
        ([*save, str(file)], f"--save {file} cannot be written, since {file} is not a folder"),
        ([*save, str(file / "below")], "is not a folder"),
        ([*save, str(dangling)], f"--save {dangling} cannot be written"),
        ([*save, nowhere], f"--save {nowhere} cannot be written, since /proc does not take a file"),
        ([*FLAGS, "--tensorboard-dir", nowhere], f"--tensorboard-dir {nowhere} cannot be written"),
        ([*FLAGS, "--tensorboard-dir", str(file / "below")], "is not a folder"),
    ])  # fmt: skip
    assert file.read_text() == "occupied"


def test_depths_and_states_of_another_family_are_refused_at_their_defaults_too(tmp_path: Path) -> None:
    cases = [("looped", "--num-recurrences 4"), ("recurrent", "--num-refinement-blocks 3"),
             ("recurrent", "--state-norm final"), ("looped", "--state-init zeros")]  # fmt: skip
    said = refusals([["--recursion-family", family, *flag.split()] for family, flag in cases], recursion=[])
    for (family, flag), sentence in zip(cases, said, strict=True):
        assert sentence.startswith(f"{flag} belongs to --recursion-family") and sentence.endswith(f"is {family}.")
    (tmp_path / "args.txt").write_text("--num-refinement-blocks=3\n")  # as an import writes all of them
    (taken,) = refusals([[f"@{tmp_path / 'args.txt'}", "--recursion-family", "recurrent", "--lr", "-1"]], recursion=[])
    assert "belongs" not in taken


def test_a_vocabulary_smaller_than_the_tokenizers(tmp_path: Path) -> None:
    tokenizer_files = pytest.importorskip("tokenizers")
    tokenizer = tokenizer_files.Tokenizer(tokenizer_files.models.WordLevel({f"w{i}": i for i in range(40)}, "w0"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}')
    flags = [*FLAGS, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path)]
    check([([*flags, "--vocab-size", "20"], "--vocab-size 20 is smaller than the tokenizer's vocabulary of 4")])


def test_data_of_another_tokenizer(tmp_path: Path) -> None:
    """Refused where ids have no rows or another meaning; with a record beside the data, or by a look at its ids."""
    words = {f"w{number}": number for number in range(60)}
    write_tokenizer(tmp_path / "own", words)
    write_tokenizer(tmp_path / "grown", {**words, "new": 60})
    write_tokenizer(tmp_path / "other", {f"x{number}": number for number in range(60)})
    for name, vocab_size in (("data", 60), ("large", 300), ("chat", 60), ("chat_supervised", 60)):
        write_dataset(tmp_path / name, [50] * 20)
        digest, size = vocabulary_digest(words, vocab_size), (tmp_path / f"{name}.bin").stat().st_size
        made = Preparation(vocab_size, digest, "own", "", documents=20, tokens=1000, skipped=0, bin_bytes=size,
                           kind="chat" if name == "chat" else "text")  # fmt: skip
        (tmp_path / f"{name}.idx.json").write_text(made.to_json())
    (tmp_path / "chat_tokenizer").mkdir()
    (tmp_path / "chat_tokenizer/chat_template.jinja").write_text("{{ messages[0].content }}")
    write_dataset(tmp_path / "unknown", [50, 101] * 10)

    def flags(data: str, tokenizer: str, *more: str) -> list[str]:
        files = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / tokenizer)]
        at = DATA.index("--vocab-size")
        kept = [*DATA[:at], *DATA[at + 2 :], "--make-vocab-size-divisible-by", "4"]
        return [*kept, *files, "--data-path", str(tmp_path / data), *more]

    chat = [*flags("data", "own")[:-2], "--chat-data", str(tmp_path / "chat"), "--seq-length", "50",
            "--max-position-embeddings", "50"]  # fmt: skip
    check([
        (chat, "was written by another chat template than this run's tokenizer has; give --tokenizer-model"),
        (flags("large", "own"), "--data-path " + str(tmp_path / "large") + " was prepared with a vocabulary of 300"),
        (flags("data", "other"), "was prepared with another tokenizer (own)"),
        (flags("chat", "own"), "holds conversations, of which it would count every token; give --chat-data "),
        (flags("unknown", "own"), "holds the token id 100, but this run's tokenizer makes a vocabulary of 60"),
        (flags("large", "own", "--allow-other-tokenizer"), "was prepared with a vocabulary of 300"),
    ])  # fmt: skip
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "127"]
    good = [flags("data", "own"), flags("data", "grown"), flags("data", "other", "--allow-other-tokenizer"),
            flags("data", "own", *null), flags("unknown", "own", *null)]  # fmt: skip
    assert run_distributed(sentences, 1, good, timeout=120) == [[""] * len(good)]


def write_tokenizer(folder: Path, words: dict[str, int]) -> None:
    tokenizer_files = pytest.importorskip("tokenizers")
    folder.mkdir()
    tokenizer_files.Tokenizer(tokenizer_files.models.WordLevel(words, min(words))).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": min(words)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_too_little_data_for_the_split(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", [200])
    write_dataset(tmp_path / "few", [200] * 4)
    write_dataset(tmp_path / "empty_last", [200] * 19 + [0])
    at = DATA.index("--split")
    unsplit = [*DATA[:at], *DATA[at + 2 :], "--data-path"]
    blend = tmp_path / "blend.txt"
    blend.write_text(str(tmp_path / "few"))
    data = [*DATA, "--data-path", str(tmp_path / "one")]
    check([
        (data, "has 1 documents, so that --split 90,5,5 leaves none for valid"),
        ([*data, "--split", "0,100,0"], "--split 0,100,0 must be"),
        ([*data, "--split", "most,some,few"], "--split most,some,few must be"),
        ([*unsplit, str(tmp_path / "few")],
         "has 4 documents, so that --split 969,30,1 (Megatron's default) leaves none for valid; give --split 3,1,0"),
        ([*unsplit, str(tmp_path / "one")], "give --split 1,0,0"),
        ([*DATA, "--data-path", str(tmp_path / "empty_last")], "leaves none for test; give --split 90,10,0"),
        ([*unsplit[:-1], "--data-args-path", str(blend)], "--data-args-path " + str(blend) + " needs --split"),
    ])  # fmt: skip
    run = tmp_path / "run"
    enough = ["--split", "100,0,0", "--train-iters", "2", "--data-cache-path", str(tmp_path / "cache")]
    assert train(*data[len(DATA) :], *enough, "--metrics-file", run / "metrics.jsonl", flags=DATA) is None
    assert sorted(metrics_of(run)) == [1, 2]
