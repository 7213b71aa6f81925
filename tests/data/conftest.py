"""A small tokenizer, trained once, and a way to write settings."""

import pytest

from llmlab.data.tokenizer import learn_bpe
from llmlab.settings.data import DataSource, TextDataSettings


class Settings(TextDataSettings):
    """A stage's data settings with the seed that every stage has."""

    seed: int = 42


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    learn_bpe([DataSource(name="demo/stories", subset="200kB")], 512, folder, show_progress=False)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from llmlab.data.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture
def make_settings(tmp_path):
    """Returns settings of the given fields whose cache is the test's own."""

    def make(*datasets, **fields):
        return Settings(datasets=list(datasets), cache_dir=str(tmp_path / "cache"), num_proc=1, **fields)

    return make


@pytest.fixture(scope="session")
def sample_id():
    """Returns the name of a row of a mixture or stream: its source, and its number there."""

    def name(rows, index):
        if hasattr(rows, "readers"):
            source, number = rows.schedule.locate(index)
            return f"{rows.readers[source].name}:{number}"
        source, _, number = rows.locate(index)
        return f"{rows.sources[source].name}:{number}"

    return name
