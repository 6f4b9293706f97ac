"""Generation from Megatron checkpoints: any layout, cached, under exits, equal to the model and to its export."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.unit_tests.hf.recursive_models import left_padded
from tests.unit_tests.training.runs import PLAIN, save_to, train

SHAPE = ["--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope",
         "--group-query-attention", "--num-query-groups", "2", "--init-method-std", "0.2", "--halt-bias", "0",
         "--lr", "3e-2"]  # fmt: skip
EXITS = (
    {"exit": "halting", "halt_threshold": 0.5},
    {"exit": "halting", "halt_threshold": 0.52, "max_inference_refinement_steps": 4},
    {"exit": "kl", "exit_threshold": 0.01},
    {"exit": "argmax"},
    {"exit": "output-change", "exit_threshold": 0.2},
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by four ranks, TP 2 x PP 2."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--padded-vocab-size", "256"]
    assert train(*save_to(folder, 6), *SHAPE, *sizes, world_size=4) is None
    return folder


def _teach_halting(model: Any, tokens: Any) -> None:
    """Half of the tokens halt after the first block, which six iterations of training do not achieve."""
    import torch

    head = model.megatron.halting_head
    head.weight.data = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1))
    head.bias.data -= model(tokens, output_blocks=True).block_halting[0].logit().median()


def _check_cache(folder: str) -> tuple[list[float], int]:
    """Largest error of cached decoding against Megatron's own full forward, relative to the largest logit."""
    import torch

    from megatron_recursive.inference.megatron_model import open_megatron
    from megatron_recursive.inference.pass_contexts import PassContexts

    with open_megatron(folder) as (model, _), torch.no_grad():
        plan = model.megatron.plan
        tokens = torch.randint(0, 127, (2, 14), generator=torch.Generator().manual_seed(1))
        full = model.megatron(tokens, torch.arange(14).expand(2, 14), None)[..., :127]
        errors = []
        for cuts in ([6, *range(7, 15)], [1, 4, 14]):  # a prompt and tokens one by one; several tokens at a time
            contexts = PassContexts(14, plan.passes_per_block)
            pieces = [tokens[:, a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
            parts = [model(piece, past_key_values=contexts).logits for piece in pieces]
            errors.append(float((torch.cat(parts, 1) - full).abs().max() / full.abs().max()))
        with pytest.raises(ValueError, match="token id 127 is beyond the vocabulary of 127"):
            model(torch.tensor([[5, 127]]))  # a row of padding, which says something
        return errors, full.shape[-1]


def test_cached_decoding_is_the_full_forward(checkpoint: Path, tmp_path: Path) -> None:
    assert train(*save_to(tmp_path, 6), *SHAPE, recursion=PLAIN) is None
    for folder in (checkpoint, tmp_path):
        ((errors, vocabulary),) = run_distributed(_check_cache, 1, str(folder))
        assert max(errors) < 1e-5 and vocabulary == 127


def _check_against_export(folder: str, target: str) -> list[dict[str, Any]]:
    import torch

    from megatron_recursive.hf.convert.export import export_model
    from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM
    from megatron_recursive.inference.megatron_model import open_megatron

    heard: list[str] = []
    size = export_model(folder, target, say=heard.append).facts["cache_bytes_per_token"]
    found = []
    with open_megatron(folder) as (model, _), torch.no_grad():
        export = RecursiveGPTForCausalLM.from_pretrained(target).eval()
        tokens = torch.randint(0, 126, (2, 7), generator=torch.Generator().manual_seed(2))
        kept = [each for layer in export(tokens).past_key_values.layers for each in (layer.keys, layer.values)]
        assert size == sum(each.nbytes for each in kept) // tokens.numel()
        assert any(f"{size:,} bytes a token" in line and "2 layers are 8 cache" in line for line in heard)
        _teach_halting(model, tokens)
        export.halting_head.weight.data = model.megatron.halting_head.weight.data[None]
        export.halting_head.bias.data = model.megatron.halting_head.bias.data
        for options in ({}, *EXITS):
            ours, theirs = (each(tokens, output_blocks=True, **options) for each in (model, export))
            size = theirs.logits.abs().max()
            row: dict[str, Any] = {"error": float((ours.logits - theirs.logits).abs().max() / size)}
            row["block error"] = float((ours.block_logits[-1] - theirs.block_logits[-1]).abs().max() / size)
            for beams in (1, 3):
                answers = [each.generate(tokens[:1], max_new_tokens=6, num_beams=beams, do_sample=False,
                                         pad_token_id=0, **options) for each in (model, export)]  # fmt: skip
                row[f"beams {beams}"] = torch.equal(*answers)
            if options:
                row["blocks"] = torch.equal(ours.blocks, theirs.blocks)
                row["taken"] = ours.blocks.unique().tolist()
                reports = [each.last_exit_report.to_dict() for each in (model, export)]
                same = ("tokens", "histogram", "decoded_tokens", "mean_decoded_blocks")
                row["reports"] = all(reports[0][name] == reports[1][name] for name in same)
            padded, mask = left_padded(torch.cat([tokens, tokens.flip(0)]), [0, 2, 3, 6])
            greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
            together = [each.generate(padded, attention_mask=mask, **greedy) for each in (model, export)]
            row["padded"] = torch.equal(*together)
            for ids, real, answer in zip(padded, mask, together[0], strict=True):
                alone = model.generate(ids[real == 1][None], **greedy)
                row["padded"] &= torch.equal(answer[-6:], alone[0, -6:])
            if options:
                row["work"] = _counts_its_work(model, padded, mask, options)
            found.append(row)
        for each in (model, export):
            each.config.recursion["max_inference_refinement_steps"] = 1
            each.set_num_refinement_blocks(3)
            taken = each(tokens, exit="halting", halt_threshold=1 - 1e-12).blocks
            found[0][f"depth of {type(each).__name__}"] = int(taken.max()) == 3
    return found


def _counts_its_work(model: Any, padded: Any, mask: Any, options: dict[str, Any]) -> bool:
    """Whether the report has the tokens and scores that went through the layers of a prompt."""
    from megatron_recursive.hf.model.exits_recursive_gpt import Work

    seen, layers = Work(), model.megatron.decoder.layers
    hooks = [layer.self_attention.core_attention.register_forward_pre_hook(
        lambda _, given: seen.add(given[0].shape[:2].numel(), given[0].shape[:2].numel() * len(given[1]))
    ) for layer in layers]  # fmt: skip
    model(padded, attention_mask=mask, **options)
    for hook in hooks:
        hook.remove()
    batch, length = padded.shape
    work = model.last_exit_report._pending[-1][2]
    at_once = (batch * length, batch * length**2)
    return (work.tokens, work.scores, work.fixed_depth) == (seen.tokens, seen.scores, at_once)


@pytest.mark.grid
def test_a_checkpoint_says_what_its_export_says_also_under_exits(checkpoint: Path, tmp_path: Path) -> None:
    (rows,) = run_distributed(_check_against_export, 1, str(checkpoint), str(tmp_path / "export"), timeout=120)
    assert len(rows) == 1 + len(EXITS)
    for row in rows:
        assert row["error"] < 1e-5 and row["block error"] < 1e-5, row
        assert all(value for value in row.values() if isinstance(value, bool)), row
    taken = [row["taken"] for row in rows if "taken" in row]
    assert any(len(each) > 1 for each in taken) and max(map(max, taken)) > 2, "exits that differ, and beyond T"


def _generate(argv: list[str], typed: str = "") -> tuple[str, str]:
    from megatron_recursive.commands import parser_of
    from megatron_recursive.errors import UserError
    from megatron_recursive.inference import command

    heard, refused, sys.stdin = io.StringIO(), "", io.StringIO(typed)
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(io.StringIO()):
        try:
            command.run(parser_of("generate").parse_args(argv))
        except UserError as error:
            refused = str(error)
    return heard.getvalue(), refused


def _refusals(commands: list[list[str]]) -> list[str]:
    return [_generate(argv)[1] for argv in commands]


def _ends(folder: str) -> Any:
    from megatron_recursive.inference import loading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_checkpoint_text", lambda *_: loading.NumberText(127))
        with loading.open_model(folder) as loaded:
            return loaded.model.generation_config.eos_token_id


def test_the_tool_reads_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    def generate(model: Path, *flags: str) -> tuple[list[dict[str, Any]], str]:
        argv = ["--model", str(model), "--json", "--max-tokens", "4", *flags]
        ((heard, refused),) = run_distributed(_generate, 1, argv)
        return [json.loads(line) for line in heard.splitlines()], refused

    *steps, result = generate(checkpoint, "--prompt", "5 6 7", "--show-recursive-steps")[0]
    assert [step["token"] for step in steps] == result["tokens"] and len(steps[0]["blocks"]) == 2
    assert result["text"] == "".join(f" {token}" for token in result["tokens"])
    assert len(generate(checkpoint, "--prompt", "5", "--num-refinement-blocks", "3", "--show-recursive-steps")[0][0]
               ["blocks"]) == 3  # fmt: skip
    (folder,) = generate(checkpoint / "iter_0000006", "--prompt", "5 6 7")[0]
    assert folder["tokens"] == result["tokens"]
    assert generate(checkpoint, "--prompt", "")[0][0]["prompt_tokens"] == 1
    argv = ["--model", str(checkpoint), "--interactive", "--max-tokens", "4"]
    ((said, _),) = run_distributed(_generate, 1, argv, "5 6 7\n/reset\n/depth 3\n5 6 7\n/depth 2\n/reset\n5 6 7\n")
    first, deeper, again = said.splitlines()
    assert first == again == result["text"] != deeper
    refused = {"a": "must hold token ids", "127": "must hold token ids", "1 " * 16: "16 tokens"}
    common = ["--model", str(checkpoint), "--prompt"]
    (sentences,) = run_distributed(_refusals, 1, [*([*common, prompt] for prompt in refused),
                                                  [*common, "5", "--device-map", "auto"]])  # fmt: skip
    for sentence, said in zip([*refused.values(), "--device-map spreads"], sentences, strict=True):
        assert sentence in said

    stop = result["tokens"][1]
    (checkpoint / "tokenizer").mkdir()
    (checkpoint / "tokenizer" / "generation_config.json").write_text(json.dumps({"eos_token_id": [126, stop]}))
    ends = run_distributed(_ends, 1, str(checkpoint))
    assert ends == [[126, stop]], "all that the donor names, not the tokenizer's alone"
    shutil.rmtree(checkpoint / "tokenizer")

    shutil.copytree(checkpoint, tmp_path / "broken")
    next((tmp_path / "broken" / "iter_0000006").glob("*.distcp")).write_bytes(b"")
    assert "damaged" in generate(tmp_path / "broken", "--prompt", "1")[1]
