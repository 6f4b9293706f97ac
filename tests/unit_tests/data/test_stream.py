"""A folder of .parquet as one sequence of tokens: what preprocessing would make of it, wherever one begins."""

import itertools
import random
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_recursive.data.preprocess import preprocess
from megatron_recursive.data.stream import TokenStream
from megatron_recursive.data.tokenizer import TokenizerChoice, store_tokenizer
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.errors import UserError

TEXTS = [f"{n} {'once upon a time ' * random.Random(n).randint(0, 9)}" for n in range(300)]


def write(folder, texts=TEXTS, files=3, group=20):
    folder.mkdir()
    for number, part in enumerate(itertools.batched(texts, len(texts) // files)):
        pyarrow.parquet.write_table(pyarrow.table({"text": part}), folder / f"{number}.parquet", row_group_size=group)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    train_tokenizer([folder / "texts.txt"], folder / "tok", 320)
    write(folder / "shards")
    return folder


@pytest.fixture(scope="module")
def stored(corpus):
    return store_tokenizer(TokenizerChoice(str(corpus / "tok")), corpus)


def test_an_epoch_is_what_preprocessing_makes_and_the_next_one_another_order(corpus, stored):
    preprocess([corpus / "shards"], corpus / "indexed", corpus / "tok")
    dataset = IndexedDataset(str(corpus / "indexed"))
    documents = [dataset[n].tolist() for n in range(len(dataset))]
    epoch = list(itertools.chain.from_iterable(documents))
    stream = TokenStream(str(corpus / "shards"), stored)
    assert stream.read(0, len(epoch)).tolist() == epoch
    second = stream.read(len(epoch), len(epoch)).tolist()
    assert second != epoch and sorted(second) == sorted(epoch)
    third = stream.read(2 * len(epoch), len(epoch)).tolist()
    assert sorted(third) == sorted(epoch) and third not in (epoch, second)


def test_every_mark_leads_to_the_same_tokens(corpus, stored):
    stream = TokenStream(str(corpus / "shards"), stored)
    rows, marks = [], []
    for start in range(0, 15_000, 50):
        rows.append(stream.read(start, 51))
        marks.append(stream.mark(start))
    groups = [group for group, _ in marks]
    assert groups == sorted(groups) and len(set(groups)) > len(stream.groups)  # into the second epoch
    again = TokenStream(str(corpus / "shards"), stored)
    for number in (299, 7, 120, 298, 0):  # in any order
        again.go_on_from(marks[number])
        assert numpy.array_equal(again.read(50 * number, 51), rows[number])
    assert numpy.array_equal(again.read(50 * 5, 51), rows[5])  # before the mark: from the beginning


def test_identity_is_of_files_tokenizer_and_seed(corpus, stored, tmp_path):
    identity = TokenStream(str(corpus / "shards"), stored).identity
    assert TokenStream(str(write(tmp_path / "copy")), stored).identity == identity
    assert TokenStream(str(write(tmp_path / "other", TEXTS[1:])), stored).identity != identity
    assert TokenStream(str(corpus / "shards"), stored, seed=1).identity != identity


def test_faults_are_told_in_a_sentence(corpus, stored, tmp_path):
    folder = str(write(tmp_path / "shards"))
    whole = (tmp_path / "shards" / "1.parquet").read_bytes()
    (tmp_path / "shards" / "1.parquet").write_bytes(whole[:-50])
    with pytest.raises(UserError, match=r"1.parquet is no readable .parquet file \(.*\); mend it or leave it out"):
        TokenStream(folder, stored)
    (tmp_path / "shards" / "1.parquet").write_bytes(whole[:10] + bytes(400) + whole[410:])
    with pytest.raises(UserError, match="1.parquet is no readable .parquet file"):
        TokenStream(folder, stored).read(0, 10**6)
    empty, rows = write(tmp_path / "empty", [" "] * 9), tmp_path / "rows" / "none.parquet"
    rows.parent.mkdir()
    pyarrow.parquet.ParquetWriter(rows, pyarrow.schema([("text", pyarrow.string())])).close()
    for path, words in ((tmp_path / "none", "--data-stream .*none does not exist"), (corpus, "which is no .parquet"),
                        (empty, "holds no text under 'text'"), (rows.parent, "holds no row")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            TokenStream(str(path), stored).read(0, 1)
    with pytest.raises(UserError, match="has no column 'body'"):
        TokenStream(str(Path(corpus / "shards")), stored, "body").read(0, 1)
