"""Documents that share a sequence: attention inside each, losses as if each were alone, and no memory of S x S."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed import run_distributed
from tests.models import Case, Layout, build_model, build_wrapped, mask_of, run_schedule, start_parallel
from tests.parameters import Tensors
from tests.unit_tests.models.comparing import worst_error

LENGTHS = (5, 1, 7, 3)  # the documents of one sample
LOSSES = ("lm loss", "halt loss", "mean halting probability", "expected refinement steps", "total loss")
CASES = {
    "core": Case({"num_refinement_blocks": 3}),
    "learned": Case({"state_norm": "none"}, model={"position_embedding_type": "learned_absolute"}),
    "sampled": Case({"recursion_family": "recurrent", "num_prelude_layers": 1, "num_recurrences": 2,
                     "state_init": "sampled", "injection": "concat"}, transformer={"num_query_groups": 2}),
    "gate": Case({"recursion_family": "looped", "num_refinement_blocks": 3, "exit_gate": True}),
    "plain": Case({"enable_recursive_refinement": False}),
}  # fmt: skip


def packed_and_alone(case: Case) -> dict[str, float]:
    """How far objective, gradients and metrics of packed documents are from their sums over documents on their own."""
    from megatron_recursive.models.documents import Documents

    start_parallel()
    model = build_model(case).train()
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(0, 64, (2, sum(LENGTHS)), generator=generator) for _ in range(2))
    kept = (torch.rand(tokens.shape, generator=generator) > 0.3).float()
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).repeat(2, 1)
    documents = Documents.of(ids)
    assert documents is not None
    places = documents.places(2)

    def of(columns: slice, documents: Any) -> tuple[dict[str, Tensor], Tensors]:
        batch = [each[:, columns] for each in (tokens, places)]
        output = model(*batch, None, labels=labels[:, columns], loss_mask=kept[:, columns], packed_seq_params=documents)
        loss_BS = getattr(output, "objective_BS", output)
        metrics = {name: pair for name, pair in getattr(output, "metrics", {}).items() if name in LOSSES}
        total = (loss_BS * kept[:, columns]).sum()
        model.zero_grad()
        total.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        return {"objective": torch.stack([total.detach(), kept[:, columns].sum()]), **metrics}, gradients

    together, gradients = of(slice(None), documents)
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    alone = [of(slice(end - length, end), None) for length, end in zip(LENGTHS, ends, strict=True)]
    errors = {}
    for name, (total, count) in together.items():
        expected, tokens_there = sum(said[name] for said, _ in alone)
        assert float(count) == float(tokens_there) > 0
        errors[name] = abs(float(total / count) - float(expected / tokens_there))
    summed = {name: sum(found[name] for _, found in alone) for name in gradients}
    errors["gradients"], _ = worst_error(gradients, summed)
    return errors


def all_packed_and_alone() -> dict[str, dict[str, float]]:
    return {name: packed_and_alone(case) for name, case in CASES.items()}


def test_a_packed_batch_has_the_token_weighted_losses_of_its_documents_alone() -> None:
    for name, errors in run_distributed(all_packed_and_alone, 1)[0].items():
        assert len(errors) == {"core": 7, "learned": 7, "plain": 2}.get(name, len(errors))
        assert max(errors.values()) <= 1e-5, (name, errors)


class Largest(TorchDispatchMode):
    """The elements of the largest storage that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.device.type != "meta":
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return result


def largest(masked: bool) -> int:
    """In a step of training and one of evaluation, of one sample of 512 tokens."""
    import tests.models as models

    models.SEQ, models.MICRO_BATCH = 512, 1
    try:
        case = Case(documents=True, masked=masked, micro_batches=1)
        wrapped = build_wrapped(case, Layout())
        with Largest() as watch:
            run_schedule(wrapped, case)
            run_schedule(wrapped, case, forward_only=True)
        return watch.elements
    finally:
        models.SEQ, models.MICRO_BATCH = 16, 2


def test_nothing_of_the_size_of_a_mask_is_made() -> None:
    assert run_distributed(largest, 1, False)[0] < 512 * 512 // 2 < 512 * 512 <= run_distributed(largest, 1, True)[0]


def properties() -> None:
    """Of any ids: attention as under their mask, places, and what a sampled start draws by."""
    from megatron_recursive.models.documents import Documents, attend_inside
    from megatron_recursive.models.layer_specs import fused_attention
    from megatron_recursive.plan.added_parameters import tokens_so_far
    from tests.unit_tests.models.test_layer_specs import make_attention

    attentions = {groups: make_attention("ours", groups) for groups in (1, 2, 4)}
    rows = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=3)

    @settings(deadline=None, max_examples=60, database=None)
    @given(rows, st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
    def check(lengths: list[list[int]], groups: int, seed: int) -> None:
        size = max(map(sum, lengths))
        ids = torch.stack([
            torch.repeat_interleave(torch.arange(len(row) + 1), torch.tensor([*row, size - sum(row)]))
            for row in lengths
        ])  # fmt: skip
        torch.manual_seed(seed)
        qkv = [torch.randn(size, len(ids), heads, 8, dtype=torch.double, requires_grad=True)
               for heads in (4, groups, groups)]  # fmt: skip
        weights = torch.randn(size, len(ids), 32, dtype=torch.double)
        documents, attention = Documents.of(ids), attentions[groups]
        found = []
        for context in (attention(*qkv, None, packed_seq_params=documents), attention(*qkv, mask_of(ids))):
            found.append((context, *torch.autograd.grad((context * weights).sum(), qkv)))
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)
        if documents is None:
            assert all(len(set(row)) == 1 for row in ids.tolist())
            return
        as_on_gpus = attend_inside(documents, *qkv, fused_attention, 0.0, scale=None)
        torch.testing.assert_close(as_on_gpus.flatten(2), found[0][0], rtol=0, atol=1e-12)
        assert sum(documents.lengths) == ids.numel()
        places, tokens = documents.places(len(ids)), torch.randint(0, 50, ids.shape)
        told = tokens_so_far(tokens, places)
        for row, each in enumerate(ids.tolist()):
            for number in set(each):
                mine = slice(each.index(number), each.index(number) + each.count(number))
                assert places[row, mine].tolist() == list(range(each.count(number)))
                assert torch.equal(told[row, mine], tokens_so_far(tokens[row : row + 1, mine])[0])

    check()


def test_attention_and_places_are_those_of_any_documents() -> None:
    run_distributed(properties, 1, timeout=120)


def flash_shapes(grouped: bool) -> list[tuple[int, ...]]:
    """The call that a GPU gets, on tensors without contents: its arguments are known and its gradients have shapes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_recursive.models import documents as module
    from megatron_recursive.models.documents import Documents, flash_inside

    known, module._GROUPED = module._GROUPED, module._GROUPED if grouped else {}
    documents = Documents.of(torch.tensor([[0, 0, 1, 1, 1]]))
    assert documents is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        qkv = [torch.empty(5, heads, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
        context = flash_inside(documents, *qkv, 0.5)
        module._GROUPED = known
        shapes = [context, *torch.autograd.grad(context.sum(), qkv)]
        return [tuple(each.shape) for each in shapes]


def test_torchs_variable_length_attention_takes_the_call() -> None:
    """Its kernel has run on no GPU here."""
    for grouped in (True, False):  # torch 2.11 knows no groups here
        assert run_distributed(flash_shapes, 1, grouped)[0] == [(5, 4, 8), (5, 4, 8), (5, 2, 8), (5, 2, 8)]
